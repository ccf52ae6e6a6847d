//! Fine-tuning of adapters over a frozen base, for every objective: setup before the first step and output
//! after the last one. [`super::run`] is the training loop.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quantune_adapters::delta::Adapter;
use quantune_adapters::format;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::TrainError;
use super::fingerprints::same_fingerprints;
use super::inputs::{BatchSource, Inputs, check_memory, kept_layers, predicted_peak_bytes};
use super::learner::{AdapterLearner, Learner, Trainable};
use super::log::Log;
use super::lora::{begin_adapter, read_adapter, read_scoring, resume_adapter};
use super::metrics::Numbers;
use super::progress::{Progress, Work};
use super::run::{LoopSettings, Outcome, Trainer, run_training};
use super::run_dir::{MAIN_ADAPTER, RunDir, adapter_parameters, read_optimizer, read_state};
use super::settings::{CommonSettings, RunSettings, Task, ValueModel};
use super::state::State;
use crate::data::DataError;
use crate::model::{ActiveAdapter, Decoder};
use crate::monitor::Monitor;
use crate::text::today;
use crate::weights::write_atomically;

/// The folder of PPO's value adapter, if the value head is not on the policy.
const VALUE: &str = "value_adapter";

/// The report of a finished run; with `results`, the `--json` line of its command.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Optimizer steps; of ppo and grpo updates.
    pub steps: u64,
    /// Loss of the first step.
    pub loss_first: Option<f64>,
    /// Loss of the last step.
    pub loss_last: Option<f64>,
    /// Tokens per second in the steps of this process, without padding; for ppo and grpo those of prompts and
    /// responses.
    pub tokens_per_second: f64,
    /// Number of trainable parameters.
    pub trainable_parameters: usize,
    /// The adapter's folder.
    pub adapter: PathBuf,
    /// The kernel of each type of linear layer.
    pub kernels: BTreeMap<String, String>,
    /// Layers that are recomputed in the backward pass, to stay in the memory budget.
    pub recomputed_layers: usize,
    /// The peak memory predicted before the first step; `None` for the reference backend, whose
    /// memory is not predicted.
    pub predicted_peak_rss_bytes: Option<usize>,
    /// Seconds in steps.
    pub seconds: f64,
    /// Seconds predicted after the first two steps.
    pub predicted_seconds: Option<f64>,
    /// The step at which this process resumed, if it did.
    pub resumed_at: Option<u64>,
    /// Results of the command: a report of the data, evaluations, rates.
    #[serde(skip)]
    pub results: Map<String, Value>,
}

/// Trains. With `resume`, continues the run in `settings.common.out`. The stop flag is checked while
/// rows are read, between the batches of an evaluation, and after each step.
///
/// # Errors
/// Invalid settings or files, a run directory in use, a diverged loss.
pub fn train(
    settings: &RunSettings,
    resume: bool,
    monitor: Monitor<'_>,
) -> Result<Outcome<Summary>, TrainError> {
    let settings = &resolve_settings(settings)?;
    let common = &settings.common;
    // Check the run directory before reading anything.
    let resumed = if resume {
        // Absolute again: earlier versions saved a relative loftq_base.
        let saved = RunDir::settings(settings.command(), &common.out)?.absolute()?.to_table()?;
        Some(RunDir::resume(&common.out, &saved, &settings.to_table()?, monitor)?)
    } else {
        RunDir::check_no_run(&common.out)?;
        None
    };
    let Some(inputs) = Inputs::load(settings, monitor)? else { return Ok(Outcome::NotStarted) };
    let fingerprints = inputs.fingerprints(settings)?;
    let mut checkpoint = None;
    if let Some(run) = &resumed {
        same_fingerprints(&common.out, &run.fingerprints()?, &fingerprints)?;
        checkpoint = run.last_checkpoint()?;
    }
    let (decoder, added) = (&inputs.decoder, &inputs.added_tokens);
    let adapters = match &checkpoint {
        Some(folder) => resume_adapters(settings, decoder, folder, monitor)?,
        None => begin_adapters(settings, decoder, added, monitor)?,
    };
    let (names, adapters): (Vec<&str>, Vec<Adapter>) = adapters.into_iter().unzip();
    let adapters: Vec<Arc<Adapter>> = adapters.into_iter().map(Arc::new).collect();
    let memory_params = inputs.memory_params(common, &adapters);
    let kept_layers = kept_layers(common, &memory_params);
    check_memory(common, &memory_params, kept_layers, monitor)?;
    let recomputed_layers = memory_params.layers - kept_layers;
    let predicted_peak_rss_bytes = predicted_peak_bytes(&memory_params, kept_layers);

    // All checks are done: files are written from here on.
    let run = match resumed {
        Some(run) => run,
        None => RunDir::create(&common.out, &settings.to_table()?, &fingerprints, monitor)?,
    };
    let Inputs { decoder, frozen, source, tokenizer_files, .. } = inputs;
    let mut learner = new_learner(settings, &decoder, &frozen, adapters)?;
    learner.kept_layers = kept_layers;
    let mut tuning = FineTuning { source, learner, names, tokenizer_files };
    let mut state = match &checkpoint {
        Some(folder) => tuning.read_checkpoint(folder)?,
        None => State::default(),
    };
    let resumed_at = resume.then_some(state.step);
    let begun = tuning.begin(&run, &mut state, monitor);
    let total_steps = tuning.total_steps();
    if matches!(begun, Err(TrainError::Data(DataError::Stopped))) {
        return Ok(Outcome::Interrupted { step: state.step, total_steps });
    }
    begun?;
    monitor.note(format_args!(
        "training {} parameters of {} modules, {total_steps} steps from step {}",
        tuning.parameter_count(),
        tuning.module_count(),
        state.step
    ));

    let steps = LoopSettings {
        schedule: common.schedule(total_steps),
        eval_strategy: common.evaluation(),
        eval_steps: common.eval_steps,
        save_steps: common.save_steps,
        save_total_limit: common.save_total_limit,
        best: common.tracks_best().then(|| common.best()),
    };
    let ended = run_training(&mut tuning, &run, (&mut state, checkpoint), &steps, monitor)?;
    let Some((log, progress)) = ended else {
        return Ok(Outcome::Interrupted { step: state.step, total_steps });
    };
    let results = tuning.results(&state, &log, &progress)?;
    tuning.write_results(settings, &run, &state, &results, monitor)?;
    let losses = log.values("loss")?;
    Ok(Outcome::Done(Box::new(Summary {
        steps: state.step,
        loss_first: losses.first().copied(),
        loss_last: losses.last().copied(),
        tokens_per_second: progress.tokens_per_second(),
        trainable_parameters: tuning.parameter_count(),
        adapter: run.file(MAIN_ADAPTER),
        kernels: decoder.kernels(),
        recomputed_layers,
        predicted_peak_rss_bytes,
        seconds: progress.seconds(),
        predicted_seconds: progress.predicted_seconds(),
        resumed_at,
        results,
    })))
}

/// The settings of a run with the current date and absolute paths filled in.
pub(super) fn resolve_settings(settings: &RunSettings) -> Result<RunSettings, TrainError> {
    if let Some(fault) = settings.fault() {
        return Err(TrainError::Settings(fault));
    }
    let mut settings = settings.absolute()?;
    if settings.common.template_date.is_empty() {
        settings.common.template_date = today();
    }
    Ok(settings)
}

/// The adapters that a run trains, before the first step, with the names of their folders.
pub(super) fn begin_adapters(
    settings: &RunSettings,
    decoder: &Decoder,
    added: &[u32],
    monitor: Monitor<'_>,
) -> Result<Vec<(&'static str, Adapter)>, TrainError> {
    let common = &settings.common;
    let hidden_size = decoder.config.hidden_size;
    let mut first = begin_adapter(common, decoder, added, monitor)?;
    let mut adapters = Vec::new();
    match &settings.task {
        Task::Sft(_) | Task::Dpo(_) | Task::Grpo(_) => reject_score_head(&first, common)?,
        Task::Reward(_) => {
            // A reward model has no lm_head whose rows could be trained, in PEFT neither.
            first.head_tokens = None;
            first.config.head_token_indices.clear();
            if first.score.is_none() {
                first.add_score(hidden_size, false, common.seed)?;
            }
        }
        Task::Ppo(own) => {
            reject_score_head(&first, common)?;
            match own.value_model {
                // Values start at 0: a random head would disturb the weights it shares.
                ValueModel::Policy => first.add_score(hidden_size, true, common.seed)?,
                ValueModel::Own => {
                    let given = !own.value_adapter.as_os_str().is_empty();
                    let folder = if given { &own.value_adapter } else { &own.reward_adapter };
                    let value = read_scoring(folder, decoder, monitor)?;
                    adapters.push((VALUE, value.copy("value")?));
                }
            }
        }
    }
    adapters.insert(0, (MAIN_ADAPTER, first));
    Ok(adapters)
}

/// Checks that the adapter has no score head: a policy cannot be a reward model.
fn reject_score_head(adapter: &Adapter, common: &CommonSettings) -> Result<(), TrainError> {
    match adapter.score {
        None => Ok(()),
        Some(_) => Err(TrainError::Settings(format!(
            "--adapter {}: has a score head, so it is a reward model; needed one that generates",
            common.adapter.display()
        ))),
    }
}

/// The adapters of a checkpoint, with the names of their folders.
fn resume_adapters(
    settings: &RunSettings,
    decoder: &Decoder,
    checkpoint: &Path,
    monitor: Monitor<'_>,
) -> Result<Vec<(&'static str, Adapter)>, TrainError> {
    let folder = |name| RunDir::adapter_folder(checkpoint, name);
    let first = resume_adapter(&folder(MAIN_ADAPTER), &settings.common, decoder, monitor)?;
    let mut adapters = vec![(MAIN_ADAPTER, first)];
    if matches!(&settings.task, Task::Ppo(own) if own.value_model == ValueModel::Own) {
        adapters.push((VALUE, read_adapter(&folder(VALUE), decoder, monitor)?));
    }
    Ok(adapters)
}

/// The learner before its first step.
pub(super) fn new_learner<'a>(
    settings: &RunSettings,
    decoder: &'a Decoder,
    frozen: &[ActiveAdapter],
    adapters: Vec<Arc<Adapter>>,
) -> Result<AdapterLearner<'a>, TrainError> {
    let common = &settings.common;
    let dropout = (common.lora_dropout, common.seed);
    let learner = Learner::new(
        decoder,
        adapters,
        common.optimizer.adamw(),
        common.optimizer.max_grad_norm,
        dropout,
    )?;
    let mut learner = learner.on_top_of(frozen);
    if common.loraplus_lr_ratio != 1.0 {
        let of_embedding = common.loraplus_lr_embedding / common.optimizer.learning_rate;
        learner = learner.with_lora_plus(common.loraplus_lr_ratio, of_embedding)?;
    }
    if let Task::Sft(own) = &settings.task {
        learner.trained.noise_alpha = own.neftune_noise_alpha;
    }
    Ok(learner)
}

/// A run of fine-tuning, ready for its steps.
pub(super) struct FineTuning<'a> {
    /// The source of the micro-batches of a step.
    pub source: BatchSource,
    /// The learner.
    pub learner: AdapterLearner<'a>,
    /// Names of the adapters, in the order of the learner.
    pub names: Vec<&'static str>,
    /// Tokenizer files, written next to adapters if tokens were added.
    pub tokenizer_files: Vec<(&'static str, String)>,
}

impl Trainer for FineTuning<'_> {
    fn step(
        &mut self,
        state: &mut State,
        learning_rate: f64,
        monitor: Monitor<'_>,
    ) -> Result<(Numbers, Work), TrainError> {
        let learner = &mut self.learner;
        match &mut self.source {
            BatchSource::Supervised(source) => source.step(learner, state, learning_rate),
            BatchSource::Rollouts(source) => source.step(learner, state, learning_rate, monitor),
        }
    }

    fn evaluate(
        &mut self,
        log: &mut Log,
        state: &mut State,
        monitor: Monitor<'_>,
    ) -> Result<Option<Numbers>, TrainError> {
        let (decoder, active) = (self.learner.decoder(), &self.learner.active_frozen(0));
        match &mut self.source {
            BatchSource::Supervised(source) => source.evaluate(decoder, active, monitor),
            BatchSource::Rollouts(source) => source.evaluate(decoder, active, state, log, monitor),
        }
    }

    fn epoch_ends(&self, state: &State) -> bool {
        match &self.source {
            BatchSource::Supervised(source) => source.epoch_ends(state),
            BatchSource::Rollouts(source) => source.epoch_ends(state),
        }
    }

    fn optimizer_steps(&self) -> u64 {
        self.learner.trained.optimizer_steps()
    }

    fn save(&self, run: &RunDir, state: &State, keep: usize) -> Result<(), TrainError> {
        let parameters = adapter_parameters(self.named());
        let optimizer = self.learner.trained.optimizer()?;
        run.save(state, &parameters, &optimizer, keep, |folder| {
            for (name, adapter) in self.named() {
                self.write(adapter, &RunDir::adapter_folder(folder, name))?;
            }
            Ok(())
        })
    }
}

impl FineTuning<'_> {
    /// Reads the optimizer of a checkpoint. Returns the state of the run there.
    fn read_checkpoint(&mut self, folder: &Path) -> Result<State, TrainError> {
        let state = read_state(folder)?;
        let parameters = adapter_parameters(self.named());
        let mut optimizer = self.learner.trained.optimizer()?.into_owned();
        read_optimizer(folder, &parameters, &mut optimizer, state.optimizer_steps)?;
        self.learner.trained.set_optimizer(optimizer)?;
        Ok(state)
    }

    /// Prepares the source of batches for the step after `state`.
    fn begin(
        &mut self,
        run: &RunDir,
        state: &mut State,
        monitor: Monitor<'_>,
    ) -> Result<(), TrainError> {
        match &mut self.source {
            BatchSource::Supervised(source) => {
                source.begin(self.learner.decoder(), run, state, monitor)
            }
            BatchSource::Rollouts(source) => source.begin(run, state),
        }
    }

    /// Steps of the run.
    pub(super) fn total_steps(&self) -> u64 {
        match &self.source {
            BatchSource::Supervised(source) => source.total_steps(),
            BatchSource::Rollouts(source) => source.total_steps(),
        }
    }

    /// Number of trainable parameters.
    pub(super) fn parameter_count(&self) -> usize {
        self.learner.trained.adapters.iter().map(|adapter| adapter.num_parameters()).sum()
    }

    /// Number of modules with an update.
    pub(super) fn module_count(&self) -> usize {
        self.learner.trained.adapters.iter().map(|adapter| adapter.modules.len()).sum()
    }

    fn named(&self) -> impl Iterator<Item = (&str, &Adapter)> + Clone {
        let adapters = self.learner.trained.adapters.iter();
        self.names.iter().zip(adapters).map(|(&name, adapter)| (name, adapter.as_ref()))
    }

    /// Results of the command for the summary.
    fn results(
        &self,
        state: &State,
        log: &Log,
        progress: &Progress,
    ) -> Result<Map<String, Value>, TrainError> {
        let mut results = match &self.source {
            BatchSource::Supervised(source) => source.results(log, progress)?,
            BatchSource::Rollouts(source) => source.results(state, log, progress)?,
        };
        if let Some(best) = &state.best {
            results.insert("best_step".into(), best.step.into());
            results.insert("best_metric".into(), json!(best.value));
        }
        Ok(results)
    }

    /// Writes the adapters, the current ones or those of the best evaluation, into the run directory.
    fn write_results(
        &self,
        settings: &RunSettings,
        run: &RunDir,
        state: &State,
        results: &Map<String, Value>,
        monitor: Monitor<'_>,
    ) -> Result<(), TrainError> {
        let best = state.best.as_ref().filter(|_| settings.common.load_best_model_at_end);
        let shared_head =
            matches!(&settings.task, Task::Ppo(own) if own.value_model == ValueModel::Policy);
        for (name, last) in self.named() {
            let folder = run.file(name);
            let mut best_adapter = None;
            if let Some(best) = best {
                let checkpoint = RunDir::adapter_folder(&run.checkpoint(best.step), name);
                best_adapter = Some(read_adapter(&checkpoint, self.learner.decoder(), monitor)?);
            }
            let adapter = best_adapter.as_ref().unwrap_or(last);
            if shared_head {
                // The result is the policy; the value adapter stays in the checkpoints.
                let mut policy = adapter.copy("default")?;
                policy.remove_score();
                self.write(&policy, &folder)?;
            } else {
                self.write(adapter, &folder)?;
            }
        }
        match (&settings.task, results.get("eval_accuracy")) {
            (Task::Reward(_), Some(accuracy)) => run.write_accuracy(accuracy),
            _ => Ok(()),
        }
    }

    /// Writes an adapter, and the tokenizer that it needs.
    fn write(&self, adapter: &Adapter, folder: &Path) -> Result<(), TrainError> {
        format::write_folder(adapter, folder)?;
        for (name, text) in &self.tokenizer_files {
            let path = folder.join(name);
            if let Some(parent) = path.parent() {
                let io = |source| TrainError::Io { path: parent.into(), source };
                std::fs::create_dir_all(parent).map_err(io)?;
            }
            write_atomically(&path, |file| file.write_all(text.as_bytes()))?;
        }
        Ok(())
    }
}
