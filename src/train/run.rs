//! The loop, on one page, read downwards: every training command takes its steps here. They differ
//! in where a step's micro-batches come from, in what is minimized over them and in what learns.

use std::path::PathBuf;
use std::time::Instant;

use super::TrainError;
use super::fine_tune::FineTuning;
use super::log::{Log, Numbers};
use super::pretrain::Pretraining;
use super::progress::{Progress, Work};
use super::run_dir::{RunDir, write_state};
use super::settings::EvalStrategy;
use super::state::{BestEvaluation, State};
use crate::monitor::{LogEvent, Monitor};
use crate::optim::Schedule;

/// How a run ended, with what it says of itself.
#[derive(Debug, Clone)]
pub enum Outcome<Summary> {
    /// All steps are done and what was trained is written.
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

/// What the loop drives.
pub enum Course<'a> {
    /// Adapters over a frozen base.
    FineTuning(Box<FineTuning<'a>>),
    /// A whole model.
    Pretraining(Box<Pretraining>),
}

impl Course<'_> {
    fn step(
        &mut self,
        state: &mut State,
        learning_rate: f64,
        monitor: Monitor<'_>,
    ) -> Result<(Numbers, Work), TrainError> {
        match self {
            Self::FineTuning(course) => course.step(state, learning_rate, monitor),
            Self::Pretraining(course) => course.step(state, learning_rate, monitor),
        }
    }

    /// The numbers of an evaluation, or nothing if a stop cut it short.
    fn evaluate(
        &mut self,
        log: &mut Log,
        state: &mut State,
        monitor: Monitor<'_>,
    ) -> Result<Option<Numbers>, TrainError> {
        match self {
            Self::FineTuning(course) => course.evaluate(log, state, monitor),
            Self::Pretraining(course) => course.evaluate(monitor),
        }
    }

    fn epoch_ends(&self, state: &State) -> bool {
        match self {
            Self::FineTuning(course) => course.epoch_ends(state),
            Self::Pretraining(_) => false, // a mixture has no epoch of its own
        }
    }

    fn optimizer_steps(&self) -> u64 {
        match self {
            Self::FineTuning(course) => course.learner.optimizer.step,
            Self::Pretraining(course) => course.learning.optimizer_steps(),
        }
    }

    fn save(&self, run: &RunDir, state: &State, keep: usize) -> Result<(), TrainError> {
        match self {
            Self::FineTuning(course) => course.save(run, state, keep),
            Self::Pretraining(course) => course.save(run, state, keep),
        }
    }
}

/// What the loop asks of a command's settings.
#[derive(Debug, Clone)]
pub struct LoopSettings {
    /// Learning rates, and how many steps there are.
    pub schedule: Schedule,
    /// When held-out data is evaluated.
    pub eval_strategy: EvalStrategy,
    /// Steps between evaluations, with [`EvalStrategy::Steps`].
    pub eval_steps: u64,
    /// Steps between checkpoints.
    pub save_steps: u64,
    /// Checkpoints kept; 0 keeps all.
    pub save_total_limit: usize,
    /// How the best evaluation is found, if one is looked for.
    pub best: Option<BestSettings>,
}

/// How evaluations are compared.
#[derive(Debug, Clone, PartialEq)]
pub struct BestSettings {
    /// The number that is compared, as the evaluation calls it.
    pub metric: String,
    /// Whether more of it is better.
    pub greater: bool,
    /// By how much it must be better.
    pub threshold: f64,
    /// Evaluations without a better one that end the run; 0 never does.
    pub patience: u64,
}

impl BestSettings {
    /// Takes up an evaluation after `step`.
    fn compare(&self, state: &mut State, numbers: &Numbers) -> Result<(), TrainError> {
        let found = numbers.iter().find(|(key, _)| *key == self.metric);
        let Some(value) = found.and_then(|(_, value)| value.as_f64()) else {
            let known = numbers.iter().filter(|(_, value)| value.is_number());
            let known: Vec<&str> = known.map(|(key, _)| &key[..]).collect();
            return Err(TrainError::Settings(format!(
                "metric_for_best_model is {:?}, needed one of {}",
                self.metric,
                known.join(", ")
            )));
        };
        let better = state.best.as_ref().is_none_or(|best| {
            let gain = if self.greater { value - best.value } else { best.value - value };
            gain > self.threshold
        });
        match &mut state.best {
            Some(best) if !better => best.evals_since_best += 1,
            best => *best = Some(BestEvaluation { step: state.step, value, evals_since_best: 0 }),
        }
        Ok(())
    }

    /// Whether enough evaluations were no better.
    fn gives_up(&self, state: &State) -> bool {
        let evals = state.best.as_ref().map_or(0, |best| best.evals_since_best);
        self.patience > 0 && evals >= self.patience
    }
}

/// Takes the steps from `state` on, which `saved` is the checkpoint of. The stop flag is looked at between
/// the batches of an evaluation and after each step. What was written of them and how fast they were,
/// or nothing if the user stopped it before the last.
pub fn take_steps<'m>(
    course: &mut Course,
    run: &RunDir,
    (state, saved): (&mut State, Option<PathBuf>),
    settings: &LoopSettings,
    monitor: Monitor<'m>,
) -> Result<Option<(Log, Progress<'m>)>, TrainError> {
    let total_steps = settings.schedule.total_steps;
    let mut log = Log::open(run, state.metrics_bytes)?;
    let mut progress = Progress::new(state.step, total_steps, monitor);
    let due = |course: &Course, state: &State| -> bool {
        let ends = state.step == 0 || state.step == total_steps;
        match settings.eval_strategy {
            EvalStrategy::No => false,
            EvalStrategy::Steps => ends || state.step.is_multiple_of(settings.eval_steps),
            EvalStrategy::Epoch => ends || course.epoch_ends(state),
        }
    };
    // Whether it came to its end; what a stop cuts short is taken when the run goes on.
    let evaluate =
        |course: &mut Course, log: &mut Log, state: &mut State| -> Result<bool, TrainError> {
            let Some(numbers) = course.evaluate(log, state, monitor)? else { return Ok(false) };
            // Before the first step there is no checkpoint to come back to.
            if let Some(best) = settings.best.as_ref().filter(|_| state.step > 0) {
                best.compare(state, &numbers)?;
            }
            if !numbers.is_empty() {
                monitor.report(LogEvent::Metrics { step: state.step, metrics: &numbers });
                log.push(state.step, numbers)?;
            }
            Ok(true)
        };
    let save = |log: &Log, state: &mut State, course: &Course| -> Result<(), TrainError> {
        state.metrics_bytes = log.metrics.bytes;
        log.metrics.sync()?;
        course.save(run, state, settings.save_total_limit)
    };

    if due(course, state) && log.evaluated != Some(state.step) {
        let complete = evaluate(course, &mut log, state)?;
        if let (true, Some(folder)) = (complete, &saved) {
            state.metrics_bytes = log.metrics.bytes;
            log.metrics.sync()?;
            write_state(folder, state)?;
        }
    }
    if monitor.stopped() {
        progress.finish();
        return Ok(None);
    }
    let given_up = |state: &State| settings.best.as_ref().is_some_and(|best| best.gives_up(state));
    while state.step < total_steps && !given_up(state) {
        let began = Instant::now();
        let stepped = course.step(state, settings.schedule.at(state.step), monitor);
        // What judges has failed, before anything was learned: the steps so far are kept.
        if matches!(stepped, Err(TrainError::Reward(_) | TrainError::RewardModel(_)))
            && state.step > 0
        {
            save(&log, state, course)?;
        }
        let (numbers, work) = stepped?;
        state.step += 1;
        state.optimizer_steps = course.optimizer_steps();
        monitor.report(LogEvent::Metrics { step: state.step, metrics: &numbers });
        log.push(state.step, numbers)?;
        progress.step(state.step, &work, began.elapsed());

        let last = state.step == total_steps;
        let evaluated = match due(course, state) {
            true => evaluate(course, &mut log, state),
            false => Ok(true),
        };
        let stopped = monitor.stopped();
        let best = state.best.as_ref().is_some_and(|best| best.step == state.step);
        let due = last || given_up(state) || state.step.is_multiple_of(settings.save_steps);
        if due || best || stopped || evaluated.is_err() {
            save(&log, state, course)?;
        }
        let complete = evaluated?;
        if stopped && !(last && complete) {
            progress.finish();
            return Ok(None);
        }
    }
    progress.finish();
    Ok(Some((log, progress)))
}
