//! Fine-tuning: adapters over a frozen base, whatever is minimized. What is there before the first
//! step, and what is written after the last; the steps themselves are [`super::run`]'s.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quantune_adapters::delta::{Adapter, Lora};
use quantune_adapters::format;
use serde::Serialize;
use serde_json::{Map, Value};

use super::TrainError;
use super::fingerprints::{fingerprints_of, same_fingerprints};
use super::learner::Learner;
use super::log::{Log, Numbers};
use super::lora::{begin_adapter, read_adapter, read_frozen};
use super::memory::{Demand, Memory, of_process};
use super::policy::{PolicyTask, Rollouts};
use super::progress::{Progress, Work};
use super::rows::RowLoader;
use super::run::{Course, LoopSettings, Outcome, take_steps};
use super::run_dir::{RunDir, adapter_parameters, read_optimizer, read_state};
use super::settings::{CommonSettings, RunSettings, Task, ValueModel};
use super::state::State;
use super::supervised::Supervised;
use crate::data::DataError;
use crate::model::layer::Sizes;
use crate::model::{ActiveAdapter, Decoder};
use crate::monitor::Monitor;
use crate::ops::{BackendKind, DeviceName};
use crate::quant::BlockType;
use crate::text::{Tokenizer, convert, first_second, today};
use crate::weights::{Checkpoint, write_atomically};

/// Of the process, where the system does not tell.
const UNKNOWN_PROCESS: usize = 32 << 20;

/// What a finished run says of itself; with `results`, the `--json` line of its command.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Optimizer steps; of ppo and grpo updates.
    pub steps: u64,
    /// Loss of the first step.
    pub loss_first: Option<f64>,
    /// The same, last step.
    pub loss_last: Option<f64>,
    /// Real tokens a second in this process's steps: of ppo and grpo, of prompts and responses.
    pub tokens_per_second: f64,
    /// Trainable numbers.
    pub trainable_parameters: usize,
    /// The adapter's folder.
    pub adapter: PathBuf,
    /// Which kernel serves each kind of linear layer.
    pub kernels: BTreeMap<String, String>,
    /// Layers whose tape is rebuilt on the way down, as the memory budget asks.
    pub recomputed_layers: usize,
    /// What was said before the first step of the most memory it would take; nothing of the
    /// portable form, whose memory is candle's.
    pub predicted_peak_rss_bytes: Option<usize>,
    /// Seconds in steps.
    pub seconds: f64,
    /// What they were going to be after the first two steps.
    pub predicted_seconds: Option<f64>,
    /// The step this process took up, if it resumed.
    pub resumed_at: Option<u64>,
    /// What the command adds: what the data came to, evaluations, rates.
    #[serde(skip)]
    pub results: Map<String, Value>,
}

/// Where a step's micro-batches come from.
pub(super) enum Source {
    /// Rows of a file, epoch by epoch.
    Supervised(Box<Supervised>),
    /// Responses of the policy itself to the prompts of a file.
    Rollouts(Box<Rollouts>),
}

/// A run of fine-tuning, ready for its steps.
pub struct FineTuning<'a> {
    /// What makes its steps.
    pub(super) source: Source,
    /// What trains.
    pub learner: Learner<'a>,
    /// What the run calls the adapters, in the learner's order.
    pub(super) names: Vec<&'static str>,
    /// The tokenizer as it stands beside adapters, if tokens were added to the base's.
    pub(super) tokenizer: Vec<(&'static str, String)>,
}

impl FineTuning<'_> {
    /// Takes a step.
    pub fn step(
        &mut self,
        state: &mut State,
        learning_rate: f64,
        monitor: Monitor<'_>,
    ) -> Result<(Numbers, Work), TrainError> {
        match &mut self.source {
            Source::Supervised(source) => source.step(&mut self.learner, state, learning_rate),
            Source::Rollouts(source) => {
                source.step(&mut self.learner, state, learning_rate, monitor)
            }
        }
    }

    /// Evaluates held-out rows or prompts; nothing if a stop cut it short.
    pub fn evaluate(
        &mut self,
        log: &mut Log,
        state: &mut State,
        monitor: Monitor<'_>,
    ) -> Result<Option<Numbers>, TrainError> {
        let (decoder, active) = (self.learner.decoder(), &self.learner.active_frozen(0));
        match &mut self.source {
            Source::Supervised(source) => source.evaluate(decoder, active, monitor),
            Source::Rollouts(source) => source.evaluate(decoder, active, state, log, monitor),
        }
    }

    /// Whether the epoch has just ended.
    pub fn epoch_ends(&self, state: &State) -> bool {
        match &self.source {
            Source::Supervised(source) => source.epoch_ends(state),
            Source::Rollouts(source) => source.epoch_ends(state),
        }
    }

    /// Writes a checkpoint.
    pub fn save(&self, run: &RunDir, state: &State, keep: usize) -> Result<(), TrainError> {
        let parameters = adapter_parameters(self.named());
        run.save(state, &parameters, &self.learner.optimizer, keep, |folder| {
            for (name, adapter) in self.named() {
                self.write(adapter, &RunDir::adapter_folder(folder, name))?;
            }
            Ok(())
        })
    }

    /// Writes an adapter, and beside it the tokenizer that it needs.
    fn write(&self, adapter: &Adapter, folder: &Path) -> Result<(), TrainError> {
        format::write_folder(adapter, folder)?;
        for (name, text) in &self.tokenizer {
            let path = folder.join(name);
            if let Some(parent) = path.parent() {
                let io = |source| TrainError::Io { path: parent.into(), source };
                std::fs::create_dir_all(parent).map_err(io)?;
            }
            write_atomically(&path, |file| file.write_all(text.as_bytes()))?;
        }
        Ok(())
    }

    fn named(&self) -> impl Iterator<Item = (&str, &Adapter)> + Clone {
        let adapters = self.learner.adapters.iter();
        self.names.iter().zip(adapters).map(|(&name, adapter)| (name, adapter.as_ref()))
    }

    /// Steps of the run.
    pub(super) fn total_steps(&self) -> u64 {
        match &self.source {
            Source::Supervised(source) => source.total_steps(),
            Source::Rollouts(source) => source.total_steps(),
        }
    }

    fn results(
        &mut self,
        state: &State,
        log: &Log,
        progress: &Progress,
    ) -> Result<Map<String, Value>, TrainError> {
        match &mut self.source {
            Source::Supervised(source) => source.results(log, progress),
            Source::Rollouts(source) => source.results(state, log, progress),
        }
    }
}

/// What a run is made on, read before there is a run.
pub(super) struct Loaded {
    /// The base.
    pub decoder: Decoder,
    /// Frozen adapters under the trained one.
    pub below: Vec<ActiveAdapter>,
    /// Tokens that are in the vocabulary for this run only.
    pub added: Vec<u32>,
    /// As in [`FineTuning`].
    pub tokenizer: Vec<(&'static str, String)>,
    /// The rows or prompts.
    pub source: Source,
    /// Bytes of the process with all of that, but for mapped weights.
    process: usize,
}

/// Reads what a run is made on; nothing if a stop cut it short.
pub(super) fn load(
    settings: &RunSettings,
    monitor: Monitor<'_>,
) -> Result<Option<Loaded>, TrainError> {
    let common = &settings.common;
    let Some(now) = first_second(&common.template_date) else {
        let fault = format!("template_date is {:?}, needed YYYY-MM-DD", common.template_date);
        return Err(TrainError::Settings(fault));
    };
    let load_type = match &*common.load_type {
        "" => None,
        name => Some(
            BlockType::written(name)
                .map_err(|e| TrainError::Settings(format!("load_type: {e}")))?,
        ),
    };
    let device = common.device.open().map_err(|e| TrainError::Settings(e.to_string()))?;
    // The program as it lies in memory.
    let program = of_process("RssFile:").unwrap_or(0);
    let checkpoint = Checkpoint::open(&common.base)?;
    let adapters = settings.adapters();
    let folders: Vec<&Path> = adapters.iter().map(PathBuf::as_path).collect();
    let tokenizer = Tokenizer::open_beside(&checkpoint, &folders)?;
    let known = tokenizer.len() as u32;
    let mut tokenizer = tokenizer.with_added(&checkpoint, &common.added()?)?;
    let added: Vec<u32> = (known..tokenizer.len() as u32).collect();
    let beside = match tokenizer.added() {
        [] => Vec::new(),
        _ => convert::beside(&checkpoint, &tokenizer)?,
    };
    let decoder = Decoder::load_as(&checkpoint, common.compute(), load_type)?;
    let mut decoder = decoder.with_vocabulary(tokenizer.rows_needed())?;
    if common.device != DeviceName::Cpu {
        decoder = decoder.on(&device)?;
    }
    let template = Some(&*common.chat_template).filter(|path| !path.as_os_str().is_empty());
    tokenizer.change_template(template, &common.chat_template_kwargs)?;
    tokenizer.set_template_time(now);
    let below = read_frozen(common, &decoder, monitor)?;
    let loader = RowLoader { common, decoder: &decoder, tokenizer: &tokenizer, monitor };
    let supervised = |source: Supervised| Source::Supervised(source.into());
    let rollouts = |task, tokenizer| {
        let loaded = Rollouts::load(common, task, &decoder, &below, tokenizer, monitor);
        loaded.map(|source| Source::Rollouts(source.into()))
    };
    let source = match &settings.task {
        Task::Sft(own) => Supervised::language_modeling(&loader, own).map(supervised),
        Task::Reward(own) => Supervised::reward(&loader, own).map(supervised),
        Task::Dpo(own) => Supervised::preference(&loader, own, &below).map(supervised),
        Task::Ppo(own) => rollouts(PolicyTask::Ppo(own.clone()), tokenizer),
        Task::Grpo(own) => rollouts(PolicyTask::Grpo(own.clone()), tokenizer),
    };
    let source = match source {
        Err(TrainError::Data(DataError::Stopped)) => return Ok(None),
        source => source?,
    };
    let mut process = program + of_process("RssAnon:").unwrap_or(UNKNOWN_PROCESS);
    if load_type.is_some() {
        process = process.saturating_sub(decoder.weight_bytes()); // they are told apart
    }
    Ok(Some(Loaded { decoder, below, added, tokenizer: beside, source, process }))
}

impl Loaded {
    /// What decides how much memory the run takes.
    pub(super) fn demand(&self, common: &CommonSettings, adapters: &[Arc<Adapter>]) -> Demand<'_> {
        let (tokens, passed) = match &self.source {
            Source::Supervised(source) => (source.largest_micro_batch(), &adapters[..1]),
            Source::Rollouts(source) => (source.largest_micro_batch(), adapters),
        };
        let layers = super::memory::passed_layers(&self.decoder, passed);
        let mean = |of: &dyn Fn(&Lora) -> usize| {
            let all = |adapter: &Arc<Adapter>| adapter.modules.values().map(of).sum::<usize>();
            let most = adapters.iter().map(all).max().unwrap_or(0);
            most.div_ceil(layers.max(1))
        };
        let magnitudes = |lora: &Lora| lora.magnitude.as_ref().map_or(0, |_| lora.out_features());
        let sizes = Sizes {
            ranks: mean(&Lora::r),
            magnitudes: mean(&magnitudes),
            dropout: common.lora_dropout > 0.0,
        };
        let ([held, mapped], reference, rollouts) = match &self.source {
            Source::Supervised(source) => (source.data_bytes(), source.reference_bytes(), 0),
            Source::Rollouts(source) => {
                (source.data_bytes(), 0, source.rollout_bytes(&self.decoder, &sizes))
            }
        };
        Demand {
            decoder: &self.decoder,
            layers,
            tokens,
            logits: match &self.source {
                Source::Supervised(source) => source.reads_logits(),
                Source::Rollouts(_) => true,
            },
            parameters: adapters.iter().map(|adapter| adapter.num_parameters()).sum(),
            sizes,
            token_data: held + mapped,
            reference,
            rollouts,
            process: self.process.saturating_sub(held),
        }
    }
}

/// What trains, before its first step.
pub(super) fn learner<'a>(
    settings: &RunSettings,
    loaded: (&'a Decoder, &[ActiveAdapter]),
    adapters: &[Arc<Adapter>],
) -> Result<Learner<'a>, TrainError> {
    let common = &settings.common;
    let (decoder, below) = loaded;
    let dropout = (common.lora_dropout, common.seed);
    let adamw = common.optimizer.adamw();
    let learner =
        Learner::new(decoder, adapters.to_vec(), adamw, common.optimizer.max_grad_norm, dropout)?;
    let mut learner = learner.on_top_of(below);
    if common.loraplus_lr_ratio != 1.0 {
        let of_embedding = common.loraplus_lr_embedding / common.optimizer.learning_rate;
        learner = learner.with_lora_plus(common.loraplus_lr_ratio, of_embedding);
    }
    if let Task::Sft(own) = &settings.task {
        learner.noise_alpha = own.neftune_noise_alpha;
    }
    Ok(learner)
}

/// The settings as a run has them, with nothing left to the day or the folder it is begun in.
pub(super) fn settled(settings: &RunSettings) -> Result<RunSettings, TrainError> {
    if let Some(fault) = settings.fault() {
        return Err(TrainError::Settings(fault));
    }
    let mut settings = settings.absolute()?;
    if settings.common.template_date.is_empty() {
        settings.common.template_date = today();
    }
    Ok(settings)
}

/// Trains. With `resume`, goes on with the run in `settings.common.out`. The stop flag is looked at while
/// rows are read, between the batches of an evaluation, and after each step.
pub fn train(
    settings: &RunSettings,
    resume: bool,
    monitor: Monitor<'_>,
) -> Result<Outcome<Summary>, TrainError> {
    let settings = &settled(settings)?;
    let common = &settings.common;
    // Told before anything is read: what is in the way of the run.
    let resumed = if resume {
        let saved = RunDir::settings(settings.command(), &common.out)?.to_table()?;
        Some(RunDir::resume(&common.out, &saved, &settings.to_table()?, monitor)?)
    } else {
        RunDir::vacant(&common.out)?;
        None
    };

    // What is trained, on what.
    let Some(loaded) = load(settings, monitor)? else { return Ok(Outcome::NotBegun) };
    let (decoder, source, added) = (&loaded.decoder, &loaded.source, &loaded.added);
    let mut fingerprints = fingerprints_of(settings.fingerprinted()?)?;
    match source {
        Source::Supervised(source) => fingerprints.extend(source.fingerprints()?),
        Source::Rollouts(source) => fingerprints.extend(source.fingerprints()?),
    }
    let mut adapters = begin_adapters(settings, decoder, added, monitor)?;
    let mut saved = None;
    if let Some(run) = &resumed {
        same_fingerprints(&common.out, &run.fingerprints()?, &fingerprints)?;
        saved = run.last_checkpoint()?;
        for (name, adapter) in adapters.iter_mut().filter(|_| saved.is_some()) {
            let folder = RunDir::adapter_folder(saved.as_deref().unwrap_or(&common.out), name);
            let mut read = read_adapter(&folder, decoder, monitor)?;
            read.copy_frozen_ranks(adapter);
            *adapter = read;
        }
    }
    let (names, adapters): (Vec<&str>, Vec<Adapter>) = adapters.into_iter().unzip();
    let adapters: Vec<Arc<Adapter>> = adapters.into_iter().map(Arc::new).collect();
    let demand = loaded.demand(common, &adapters);
    let kept_layers = kept_layers(common, &demand);
    check_memory(common, &demand, kept_layers, monitor)?;
    // All that may be refused has been: now there is something to write.
    let run = match resumed {
        Some(run) => run,
        None => RunDir::create(&common.out, &settings.to_table()?, &fingerprints, monitor)?,
    };
    let (layers, parameters) = (demand.layers, demand.parameters);
    let predicted_peak_rss_bytes = predicted(&demand, kept_layers);
    let Loaded { decoder, below, source, tokenizer, .. } = loaded;
    let mut learner = learner(settings, (&decoder, &below), &adapters)?;
    learner.kept_layers = kept_layers;
    let mut course = FineTuning { source, learner, names, tokenizer };

    // Where it stands.
    let mut state = State::default();
    if let Some(folder) = &saved {
        state = read_state(folder)?;
        let parameters = adapter_parameters(course.named());
        let optimizer = &mut course.learner.optimizer;
        read_optimizer(folder, &parameters, optimizer, state.optimizer_steps)?;
    }
    let resumed_at = resume.then_some(state.step);
    let begun = match &mut course.source {
        Source::Supervised(source) => source.begin(&decoder, &run, &state, monitor),
        Source::Rollouts(source) => source.begin(&run, &mut state),
    };
    let total_steps = course.total_steps();
    match begun {
        Err(TrainError::Data(DataError::Stopped)) => {
            return Ok(Outcome::Interrupted { step: state.step, total_steps });
        }
        begun => begun?,
    }
    monitor.note(format_args!(
        "training {parameters} parameters of {} modules, {total_steps} steps from step {}",
        adapters.iter().map(|adapter| adapter.modules.len()).sum::<usize>(),
        state.step
    ));

    let steps = LoopSettings {
        schedule: common.schedule(total_steps),
        eval_strategy: common.evaluation(),
        eval_steps: common.eval_steps,
        save_steps: common.save_steps,
        save_total_limit: common.save_total_limit,
        best: common.seeks_best().then(|| common.best()),
    };
    let mut course = Course::FineTuning(Box::new(course));
    let ended = take_steps(&mut course, &run, (&mut state, saved), &steps, monitor)?;
    let (Some((log, progress)), Course::FineTuning(mut course)) = (ended, course) else {
        return Ok(Outcome::Interrupted { step: state.step, total_steps });
    };

    let mut results = course.results(&state, &log, &progress)?;
    if let Some(best) = &state.best {
        results.insert("best_step".into(), best.step.into());
        results.insert("best_metric".into(), serde_json::json!(best.value));
    }
    let shared_head =
        matches!(&settings.task, Task::Ppo(own) if own.value_model == ValueModel::Policy);
    for (name, adapter) in course.named() {
        let folder = run.file(name);
        let mut taken = None;
        if let Some(best) = state.best.as_ref().filter(|_| common.load_best_model_at_end) {
            let checkpoint = RunDir::adapter_folder(&run.checkpoint(best.step), name);
            taken = Some(read_adapter(&checkpoint, &decoder, monitor)?);
        }
        let adapter = taken.as_ref().unwrap_or(adapter);
        if shared_head {
            // The policy is to generate; its values stay in the checkpoints.
            let mut policy = adapter.copy("default")?;
            policy.remove_score();
            course.write(&policy, &folder)?;
        } else {
            course.write(adapter, &folder)?;
        }
    }
    if let (Task::Reward(_), Some(accuracy)) = (&settings.task, results.get("eval_accuracy")) {
        run.write_accuracy(accuracy)?;
    }
    let losses = log.values("loss")?;
    Ok(Outcome::Done(Box::new(Summary {
        steps: state.step,
        loss_first: losses.first().copied(),
        loss_last: losses.last().copied(),
        tokens_per_second: progress.tokens_per_second(),
        trainable_parameters: parameters,
        adapter: run.file(course.names[0]),
        kernels: decoder.kernels(),
        recomputed_layers: layers - kept_layers,
        predicted_peak_rss_bytes,
        seconds: progress.seconds(),
        predicted_seconds: progress.predicted_seconds(),
        resumed_at,
        results,
    })))
}

/// The adapters a run trains, with the names of their folders.
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
        Task::Sft(_) | Task::Dpo(_) | Task::Grpo(_) => no_score(&first, common)?,
        Task::Reward(_) => {
            // It has no logits, nor has PEFT's a head to put rows on.
            first.head_tokens = None;
            first.config.head_token_indices.clear();
            if first.score.is_none() {
                first.add_score(hidden_size, false, common.seed)?;
            }
        }
        Task::Ppo(own) => {
            no_score(&first, common)?;
            match own.value_model {
                // Values begin at 0: a head of random numbers would disturb what it shares.
                ValueModel::Policy => first.add_score(hidden_size, true, common.seed)?,
                ValueModel::Own => {
                    let given = !own.value_adapter.as_os_str().is_empty();
                    let folder = if given { &own.value_adapter } else { &own.reward_adapter };
                    let value = super::lora::read_scoring(folder, decoder, monitor)?;
                    adapters.push(("value_adapter", value.copy("value")?));
                }
            }
        }
    }
    adapters.insert(0, ("adapter", first));
    Ok(adapters)
}

/// A policy is no reward model.
fn no_score(adapter: &Adapter, common: &CommonSettings) -> Result<(), TrainError> {
    match adapter.score {
        None => Ok(()),
        Some(_) => Err(TrainError::Settings(format!(
            "--adapter {}: has a score head, so it is a reward model; needed one that generates",
            common.adapter.display()
        ))),
    }
}

/// How many of the layers that gradients pass keep their tapes.
pub(super) fn kept_layers(settings: &CommonSettings, demand: &Demand) -> usize {
    if let Some(all) = settings.gradient_checkpointing {
        return if all { 0 } else { demand.layers };
    }
    if settings.device != DeviceName::Cpu && settings.memory_budget.is_none() {
        return 0; // nobody tells how much memory is free there
    }
    let budget = settings.memory_budget.map(|budget| budget.0);
    let budget = budget.unwrap_or_else(super::memory::default_budget);
    super::memory::kept_layers(demand, budget)
}

/// Refuses a budget that not even recomputing every layer would keep; without one, warns of memory
/// that is not free.
pub(super) fn check_memory(
    settings: &CommonSettings,
    demand: &Demand,
    kept_layers: usize,
    monitor: Monitor<'_>,
) -> Result<(), TrainError> {
    if demand.decoder.compute.backend == BackendKind::Reference {
        return Ok(()); // nobody knows what candle will take
    }
    let megabytes = |bytes: u64| format!("{:.0} MB", (bytes as f64 / 1e6).ceil());
    if let (Some(budget), None) = (settings.memory_budget, settings.gradient_checkpointing) {
        let memory = Memory::of(demand, 0);
        let needed = memory.sum() as u64;
        if needed <= budget.0 {
            return Ok(());
        }
        let mut parts = memory.components();
        parts.sort_unstable_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        let parts = parts.iter().filter(|(_, bytes)| *bytes > 0);
        let parts = parts.map(|(name, bytes)| format!("{name} {}", megabytes(*bytes as u64)));
        return Err(TrainError::Settings(format!(
            "memory_budget is {budget} and cannot be kept: with every layer recomputed the run takes {} \
             ({}), needed that much, or fewer than {} tokens in a micro-batch (max_length, \
             per_device_train_batch_size)",
            megabytes(needed),
            parts.collect::<Vec<_>>().join(", "),
            demand.tokens,
        )));
    }
    let memory = Memory::of(demand, kept_layers);
    let needed = memory.sum().saturating_sub(memory.frozen_weights + memory.process) as u64;
    if let Some(free) = super::memory::free().filter(|&free| needed > free) {
        monitor.warn(format_args!(
            "the run takes {} more than it has now, and {} are free: the system may end it; \
             fewer tokens in a micro-batch than {} take less (max_length, \
             per_device_train_batch_size)",
            megabytes(needed),
            megabytes(free),
            demand.tokens,
        ));
    }
    Ok(())
}

/// The most memory the run will take, with what reading has taken already; nothing of the portable
/// form, whose memory is candle's.
pub(super) fn predicted(demand: &Demand, kept_layers: usize) -> Option<usize> {
    let so_far = of_process("VmHWM:")?;
    let fast = demand.decoder.compute.backend != BackendKind::Reference;
    fast.then(|| Memory::of(demand, kept_layers).sum().max(so_far))
}
