//! The training loop of every command. A [`Trainer`] implements the step and owns the parameters.

use std::path::PathBuf;
use std::time::Instant;

use super::TrainError;
use super::best::BestSettings;
use super::log::Log;
use super::metrics::Numbers;
use super::progress::{Progress, Work};
use super::run_dir::{RunDir, write_state};
use super::settings::EvalStrategy;
use super::state::State;
use crate::monitor::{LogEvent, Monitor};
use crate::optim::Schedule;

/// The outcome of a run.
#[derive(Debug, Clone)]
pub enum Outcome<Summary> {
    /// All steps are done and the result is written.
    Done(Box<Summary>),
    /// Stopped by the user before the run started; a run to be resumed is unchanged.
    NotStarted,
    /// Stopped by the user between steps; the run can be resumed.
    Interrupted {
        /// Steps done.
        step: u64,
        /// Total steps.
        total_steps: u64,
    },
}

/// The part of a run that differs by command.
pub(super) trait Trainer {
    /// Takes a step.
    fn step(
        &mut self,
        state: &mut State,
        learning_rate: f64,
        monitor: Monitor<'_>,
    ) -> Result<(Numbers, Work), TrainError>;

    /// Evaluates held-out data; `None` if the run was stopped before all was evaluated.
    fn evaluate(
        &mut self,
        log: &mut Log,
        state: &mut State,
        monitor: Monitor<'_>,
    ) -> Result<Option<Numbers>, TrainError>;

    /// Whether the last step ended an epoch.
    fn epoch_ends(&self, state: &State) -> bool;

    /// Optimizer steps taken.
    fn optimizer_steps(&self) -> u64;

    /// Writes a checkpoint, and keeps the last `keep` of them.
    fn save(&self, run: &RunDir, state: &State, keep: usize) -> Result<(), TrainError>;
}

/// The settings of the loop.
#[derive(Debug, Clone)]
pub(super) struct LoopSettings {
    /// Learning rate schedule and number of steps.
    pub schedule: Schedule,
    /// When held-out data is evaluated.
    pub eval_strategy: EvalStrategy,
    /// Steps between evaluations, with [`EvalStrategy::Steps`].
    pub eval_steps: u64,
    /// Steps between checkpoints.
    pub save_steps: u64,
    /// Checkpoints kept; 0 keeps all.
    pub save_total_limit: usize,
    /// How the best evaluation is selected, if it is tracked.
    pub best: Option<BestSettings>,
}

impl LoopSettings {
    fn evaluates_after(&self, trainer: &dyn Trainer, state: &State) -> bool {
        let ends = state.step == 0 || state.step == self.schedule.total_steps;
        match self.eval_strategy {
            EvalStrategy::No => false,
            EvalStrategy::Steps => ends || state.step.is_multiple_of(self.eval_steps),
            EvalStrategy::Epoch => ends || trainer.epoch_ends(state),
        }
    }

    fn stops_early(&self, state: &State) -> bool {
        self.best.as_ref().is_some_and(|best| best.should_stop_early(state))
    }
}

/// Takes the steps after `state`, whose checkpoint is `saved`. The stop flag is checked between the
/// batches of an evaluation and after each step. Returns the log and the progress of the steps, or
/// `None` if the run was stopped before the last step.
pub(super) fn run_training<'m>(
    trainer: &mut dyn Trainer,
    run: &RunDir,
    (state, saved): (&mut State, Option<PathBuf>),
    settings: &LoopSettings,
    monitor: Monitor<'m>,
) -> Result<Option<(Log, Progress<'m>)>, TrainError> {
    let total_steps = settings.schedule.total_steps;
    let mut log = Log::open(run, state.metrics_bytes)?;
    let mut progress = Progress::new(state.step, total_steps, monitor);
    let save = |log: &Log, state: &mut State, trainer: &dyn Trainer| -> Result<(), TrainError> {
        state.metrics_bytes = log.metrics.bytes;
        log.metrics.sync()?;
        trainer.save(run, state, settings.save_total_limit)
    };

    if settings.evaluates_after(trainer, state) && log.evaluated != Some(state.step) {
        let complete = evaluate(trainer, &mut log, state, settings, monitor)?;
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
    while state.step < total_steps && !settings.stops_early(state) {
        let began = Instant::now();
        let stepped = trainer.step(state, settings.schedule.at(state.step), monitor);
        // A reward failed before the update: the steps so far are saved.
        if matches!(stepped, Err(TrainError::Reward(_) | TrainError::RewardModel(_)))
            && state.step > 0
        {
            save(&log, state, trainer)?;
        }
        let (numbers, work) = stepped?;
        state.step += 1;
        state.optimizer_steps = trainer.optimizer_steps();
        monitor.report(LogEvent::Metrics { step: state.step, metrics: &numbers });
        log.push(state.step, numbers)?;
        progress.step(state.step, &work, began.elapsed());

        let last = state.step == total_steps;
        let evaluated = if settings.evaluates_after(trainer, state) {
            evaluate(trainer, &mut log, state, settings, monitor)
        } else {
            Ok(true)
        };
        let stopped = monitor.stopped();
        let best = state.best.as_ref().is_some_and(|best| best.step == state.step);
        let ends = last || settings.stops_early(state);
        let due = ends || state.step.is_multiple_of(settings.save_steps);
        if due || best || stopped || evaluated.is_err() {
            save(&log, state, trainer)?;
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

/// Evaluates and logs. Returns whether all was evaluated: an evaluation that was stopped is repeated
/// when the run is resumed.
fn evaluate(
    trainer: &mut dyn Trainer,
    log: &mut Log,
    state: &mut State,
    settings: &LoopSettings,
    monitor: Monitor<'_>,
) -> Result<bool, TrainError> {
    let Some(numbers) = trainer.evaluate(log, state, monitor)? else { return Ok(false) };
    // Before the first step there is no checkpoint to return to.
    if let Some(best) = settings.best.as_ref().filter(|_| state.step > 0) {
        best.compare(state, &numbers)?;
    }
    if !numbers.is_empty() {
        monitor.report(LogEvent::Metrics { step: state.step, metrics: &numbers });
        log.push(state.step, numbers)?;
    }
    Ok(true)
}
