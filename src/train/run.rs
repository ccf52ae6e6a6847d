//! The loop, on one page, read downwards: every training command is this function. They differ in
//! where a step's micro-batches come from and in what is minimized over them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use quantune_adapters::delta::Adapter;
use quantune_adapters::format;
use serde::Serialize;
use serde_json::{Map, Value};

use super::TrainError;
use super::fingerprints::{base_fingerprint, same_fingerprints};
use super::learner::Learner;
use super::log::Log;
use super::lora::{begin_adapter, read_adapter};
use super::policy::Rollouts;
use super::progress::Progress;
use super::run_dir::{RunDir, State, read_optimizer, read_state, write_state};
use super::settings::{CommonSettings, EvalStrategy, RunSettings, Task, ValueModel};
use super::supervised::Supervised;
use crate::data::DataError;
use crate::model::Decoder;
use crate::optim::{AdamWSettings, Schedule};
use crate::text::{Tokenizer, first_second, today};
use crate::weights::Checkpoint;

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
    /// The step this process took up, if it resumed.
    pub resumed_at: Option<u64>,
    /// What the command adds: what the data came to, evaluations, rates.
    #[serde(skip)]
    pub results: Map<String, Value>,
}

/// How a run ended.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// All steps are done and the adapter is written.
    Done(Box<Summary>),
    /// Stopped by the user before there was a run; one that was to be resumed is as it was.
    NotBegun,
    /// Stopped by the user before the first step or after a whole one, to be resumed from there.
    Interrupted {
        /// Steps done.
        step: u64,
        /// Steps there are.
        total_steps: u64,
    },
}

/// Where a step's micro-batches come from.
enum Source {
    /// Rows of a file, epoch by epoch.
    Supervised(Box<Supervised>),
    /// Responses of the policy itself to the prompts of a file.
    Rollouts(Box<Rollouts>),
}

/// Trains. With `resume`, goes on with the run in `settings.common.out`. `stop` is looked at while
/// rows are read, between the batches of an evaluation, and after each step.
pub fn train(
    settings: &RunSettings,
    resume: bool,
    stop: &AtomicBool,
) -> Result<Outcome, TrainError> {
    if let Some(fault) = settings.fault() {
        return Err(TrainError::Settings(fault));
    }
    let mut settings = settings.absolute()?;
    if settings.common.template_date.is_empty() {
        settings.common.template_date = today();
    }
    let settings = &settings;
    let common = &settings.common;
    let Some(now) = first_second(&common.template_date) else {
        let fault = format!("template_date is {:?}, needed YYYY-MM-DD", common.template_date);
        return Err(TrainError::Settings(fault));
    };
    // Told before anything is read: what is in the way of the run.
    let resumed = if resume {
        Some(RunDir::resume(&common.out, settings)?)
    } else {
        RunDir::vacant(&common.out)?;
        None
    };

    // What is trained, on what.
    let checkpoint = Checkpoint::open(&common.base)?;
    let decoder = Decoder::load(&checkpoint, common.compute)?;
    let mut tokenizer = Tokenizer::open(&checkpoint)?;
    tokenizer.set_template_time(now);
    let source = match &settings.task {
        Task::Sft(_) | Task::Reward(_) | Task::Dpo(_) => {
            let loaded = Supervised::load(settings, &decoder, &tokenizer, stop);
            loaded.map(|source| Source::Supervised(source.into()))
        }
        Task::Ppo(_) | Task::Grpo(_) => {
            let loaded = Rollouts::load(settings, &decoder, tokenizer, stop);
            loaded.map(|source| Source::Rollouts(source.into()))
        }
    };
    let mut source = match source {
        Err(TrainError::Data(DataError::Stopped)) => return Ok(Outcome::NotBegun),
        source => source?,
    };
    let mut fingerprints = vec![("the base".to_string(), base_fingerprint(&common.base)?)];
    match &source {
        Source::Supervised(source) => fingerprints.extend(source.fingerprints()?),
        Source::Rollouts(source) => fingerprints.extend(source.fingerprints()?),
    }
    let (run, saved, adapters) = if let Some(run) = resumed {
        same_fingerprints(&common.out, &run.fingerprints()?, &fingerprints)?;
        let saved = run.last_checkpoint()?;
        let mut adapters = begin_adapters(settings, &decoder)?;
        if let Some(folder) = &saved {
            for (name, adapter) in &mut adapters {
                *adapter = read_adapter(&RunDir::adapter_folder(folder, name), &decoder)?;
            }
        }
        (run, saved, adapters)
    } else {
        let adapters = begin_adapters(settings, &decoder)?; // may fail: before anything is written
        (RunDir::create(&common.out, settings, &fingerprints)?, None, adapters)
    };
    let names: Vec<&str> = adapters.iter().map(|(name, _)| *name).collect();
    let adapters: Vec<Arc<Adapter>> = adapters.into_iter().map(|(_, a)| Arc::new(a)).collect();
    let named = || names.iter().copied().zip(adapters.iter().map(Arc::as_ref));
    let dropout = (common.lora_dropout, common.seed);
    let adamw = optimizer_settings(common);
    let mut learner =
        Learner::new(&decoder, adapters.clone(), adamw, common.max_grad_norm, dropout)?;

    // Where it stands.
    let mut state = State::default();
    if let Some(folder) = &saved {
        state = read_state(folder)?;
        read_optimizer(folder, named(), &mut learner.optimizer, state.optimizer_steps)?;
    }
    let resumed_at = resume.then_some(state.step);
    let total_steps = match &mut source {
        Source::Supervised(source) => {
            match source.begin(&decoder, &run, &state, stop) {
                Err(TrainError::Data(DataError::Stopped)) => {
                    let total_steps = source.total_steps();
                    return Ok(Outcome::Interrupted { step: state.step, total_steps });
                }
                begun => begun?,
            }
            source.total_steps()
        }
        Source::Rollouts(source) => {
            source.begin(&run, &mut state)?;
            source.total_steps()
        }
    };
    let (tokens, passed) = match &source {
        Source::Supervised(source) => (source.largest_micro_batch(), &adapters[..1]),
        Source::Rollouts(source) => (source.largest_micro_batch(), &adapters[..]),
    };
    let layers = super::memory::passed_layers(&decoder, passed);
    learner.kept_layers = kept_layers(common, &decoder, layers, tokens, &adapters);
    let schedule = schedule(common, total_steps);
    let mut log = Log::open(&run, state.metrics_bytes)?;
    // Whether it came to its end; what a stop cuts short is taken when the run goes on.
    let evaluate =
        |source: &mut Source, log: &mut Log, state: &mut State| -> Result<bool, TrainError> {
            let numbers = match source {
                Source::Supervised(source) => source.evaluate(&decoder, &adapters[0], stop)?,
                Source::Rollouts(source) => {
                    source.evaluate(&decoder, &adapters[0], state, log, stop)?
                }
            };
            let Some(numbers) = numbers else { return Ok(false) };
            if !numbers.is_empty() {
                log.push(state.step, numbers)?;
            }
            Ok(true)
        };
    let parameters: usize = adapters.iter().map(|adapter| adapter.num_parameters()).sum();
    eprintln!(
        "training {parameters} parameters of {} modules, {total_steps} steps from step {}",
        adapters.iter().map(|adapter| adapter.modules.len()).sum::<usize>(),
        state.step
    );

    let mut progress = Progress::new(state.step, total_steps);
    let due = |source: &Source, state: &State| -> bool {
        let ends = state.step == 0 || state.step == total_steps;
        let epoch_ends = match source {
            Source::Supervised(source) => source.epoch_ends(state),
            Source::Rollouts(source) => source.epoch_ends(state),
        };
        match strategy(common) {
            EvalStrategy::No => false,
            EvalStrategy::Steps => ends || state.step.is_multiple_of(common.eval_steps),
            EvalStrategy::Epoch => ends || epoch_ends,
        }
    };
    if due(&source, &state) && log.evaluated != Some(state.step) {
        let complete = evaluate(&mut source, &mut log, &mut state)?;
        if let (true, Some(folder)) = (complete, &saved) {
            state.metrics_bytes = log.metrics.bytes;
            log.metrics.sync()?;
            write_state(folder, &state)?;
        }
    }
    if stop.load(Ordering::Relaxed) {
        progress.finish();
        return Ok(Outcome::Interrupted { step: state.step, total_steps });
    }
    let save = |log: &Log, state: &mut State, learner: &Learner| -> Result<(), TrainError> {
        state.metrics_bytes = log.metrics.bytes;
        log.metrics.sync()?;
        run.save(state, named(), &learner.optimizer, common.save_total_limit)
    };
    while state.step < total_steps {
        let began = Instant::now();
        let learning_rate = schedule.at(state.step);
        let stepped = match &mut source {
            Source::Supervised(source) => source.step(&mut learner, &mut state, learning_rate),
            Source::Rollouts(source) => source.step(&mut learner, &mut state, learning_rate),
        };
        // What judges has failed, before anything was learned: the steps so far are kept.
        if matches!(stepped, Err(TrainError::Reward(_) | TrainError::RewardModel(_)))
            && state.step > 0
        {
            save(&log, &mut state, &learner)?;
        }
        let (numbers, work) = stepped?;
        state.step += 1;
        state.optimizer_steps = learner.optimizer.step;
        log.push(state.step, numbers)?;
        progress.step(state.step, &work, began.elapsed());

        let last = state.step == total_steps;
        let evaluated = match due(&source, &state) {
            true => evaluate(&mut source, &mut log, &mut state),
            false => Ok(true),
        };
        let stopped = stop.load(Ordering::Relaxed);
        if last || stopped || evaluated.is_err() || state.step.is_multiple_of(common.save_steps) {
            save(&log, &mut state, &learner)?;
        }
        let complete = evaluated?;
        if stopped && !(last && complete) {
            progress.finish();
            return Ok(Outcome::Interrupted { step: state.step, total_steps });
        }
    }
    progress.finish();

    let results = match &mut source {
        Source::Supervised(source) => source.results(&log, &progress)?,
        Source::Rollouts(source) => source.results(&state, &log, &progress)?,
    };
    let shared_head =
        matches!(&settings.task, Task::Ppo(own) if own.value_model == ValueModel::Policy);
    for (name, adapter) in named() {
        let folder = run.file(name);
        if shared_head {
            // The policy is to generate; its values stay in the checkpoints.
            let mut policy = adapter.copy("default")?;
            policy.remove_score();
            format::write_folder(&policy, &folder)?;
        } else {
            format::write_folder(adapter, &folder)?;
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
        adapter: run.file(names[0]),
        kernels: decoder.kernels(),
        recomputed_layers: layers - learner.kept_layers,
        resumed_at,
        results,
    })))
}

/// The adapters a run trains, with the names of their folders.
fn begin_adapters(
    settings: &RunSettings,
    decoder: &Decoder,
) -> Result<Vec<(&'static str, Adapter)>, TrainError> {
    let common = &settings.common;
    let hidden_size = decoder.config.hidden_size;
    let mut first = begin_adapter(common, decoder)?;
    let mut adapters = Vec::new();
    match &settings.task {
        Task::Sft(_) | Task::Dpo(_) | Task::Grpo(_) => no_score(&first, common)?,
        Task::Reward(_) => {
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
                    let value = super::lora::read_scoring(folder, decoder)?;
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

/// Of `layers` layers that gradients pass, how many keep their tapes while micro-batches of
/// `tokens` tokens pass them.
fn kept_layers(
    settings: &CommonSettings,
    decoder: &Decoder,
    layers: usize,
    tokens: usize,
    adapters: &[Arc<Adapter>],
) -> usize {
    if let Some(all) = settings.gradient_checkpointing {
        return if all { 0 } else { layers };
    }
    let budget = super::memory::parse_bytes(&settings.memory_budget)
        .unwrap_or_else(super::memory::default_budget);
    let ranks = |adapter: &Arc<Adapter>| adapter.modules.values().map(|lora| lora.r()).sum();
    let ranks: usize = adapters.iter().map(ranks).max().unwrap_or(0);
    let parameters = adapters.iter().map(|adapter| adapter.num_parameters()).sum();
    let ranks = ranks.div_ceil(layers.max(1));
    super::memory::kept_layers(decoder, layers, tokens, parameters, ranks, budget)
}

/// When held-out rows are evaluated.
pub fn strategy(settings: &CommonSettings) -> EvalStrategy {
    let default = match settings.eval_data.as_os_str().is_empty() {
        true => EvalStrategy::No,
        false => EvalStrategy::Epoch,
    };
    settings.eval_strategy.unwrap_or(default)
}

fn optimizer_settings(settings: &CommonSettings) -> AdamWSettings {
    AdamWSettings {
        adam_beta1: settings.adam_beta1,
        adam_beta2: settings.adam_beta2,
        adam_epsilon: settings.adam_epsilon,
        weight_decay: settings.weight_decay,
    }
}

/// Steps of the run, every epoch having as many. A part of an epoch is rounded up to whole steps,
/// as transformers does.
pub fn total_steps(settings: &CommonSettings, steps_of_epoch: u64) -> u64 {
    if settings.max_steps > 0 {
        return settings.max_steps;
    }
    let whole = settings.num_train_epochs.trunc() as u64;
    let part = settings.num_train_epochs.fract();
    whole * steps_of_epoch + (part * steps_of_epoch as f64).ceil() as u64
}

fn schedule(settings: &CommonSettings, total_steps: u64) -> Schedule {
    let warmup_steps = match settings.warmup_steps {
        0 => (settings.warmup_ratio * total_steps as f64).ceil() as u64,
        steps => steps,
    };
    Schedule {
        kind: settings.lr_scheduler_type,
        learning_rate: settings.learning_rate,
        warmup_steps,
        total_steps,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_and_warmup_are_counted_as_transformers_counts_them() {
        let settings = |epochs, max_steps, warmup_steps| CommonSettings {
            num_train_epochs: epochs,
            max_steps,
            warmup_steps,
            warmup_ratio: 0.05,
            ..Default::default()
        };
        assert_eq!(total_steps(&settings(1.0, 0, 0), 11), 11);
        assert_eq!(total_steps(&settings(2.0, 0, 0), 11), 22);
        assert_eq!(total_steps(&settings(1.5, 0, 0), 11), 17);
        assert_eq!(total_steps(&settings(1.5, 7, 0), 11), 7);
        assert_eq!(schedule(&settings(1.0, 0, 0), 21).warmup_steps, 2);
        assert_eq!(schedule(&settings(1.0, 0, 5), 21).warmup_steps, 5);
    }
}
