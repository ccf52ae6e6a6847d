//! Progress and throughput of a run, reported after each step.

use std::time::Duration;

use crate::monitor::{LogEvent, Monitor};

/// The work of one step.
#[derive(Debug, Clone, Default)]
pub struct Work {
    /// Its main metric, as text.
    pub headline: String,
    /// Tokens without padding.
    pub tokens: u64,
    /// Rows, comparisons or responses in it.
    pub samples: u64,
    /// Time of the step spent on other things, such as printing samples.
    pub aside: Duration,
}

/// Progress over the steps of one process.
#[derive(Debug)]
pub struct Progress<'a> {
    monitor: Monitor<'a>,
    first_step: u64,
    total_steps: u64,
    tokens: u64,
    samples: u64,
    /// Time in steps, without evaluations, samples and checkpoints.
    spent: Duration,
    /// Time of the first two steps.
    spent_early: Option<Duration>,
    /// Whether the end was reported.
    finished: bool,
}

/// Number of steps from which the total time is predicted.
pub(super) const EARLY_STEPS: u64 = 2;

impl<'a> Progress<'a> {
    /// Starts at `step` of `total_steps`.
    pub fn new(step: u64, total_steps: u64, monitor: Monitor<'a>) -> Self {
        monitor.report(LogEvent::StepsBegin { step, total_steps });
        Self {
            monitor,
            first_step: step,
            total_steps,
            tokens: 0,
            samples: 0,
            spent: Duration::ZERO,
            spent_early: None,
            finished: false,
        }
    }

    /// Seconds in steps.
    pub fn seconds(&self) -> f64 {
        self.spent.as_secs_f64()
    }

    /// The seconds predicted from the first two steps.
    pub fn predicted_seconds(&self) -> Option<f64> {
        let steps = (self.total_steps - self.first_step) as f64;
        self.spent_early.map(|early| early.as_secs_f64() / EARLY_STEPS as f64 * steps)
    }

    /// Real tokens per second of the steps so far.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.spent.as_secs_f64().max(1e-9)
    }

    /// Rows, comparisons or responses per second of the steps so far.
    pub fn samples_per_second(&self) -> f64 {
        self.samples as f64 / self.spent.as_secs_f64().max(1e-9)
    }

    /// Records a step that took `spent`.
    pub fn step(&mut self, step: u64, work: &Work, spent: Duration) {
        self.tokens += work.tokens;
        self.samples += work.samples;
        self.spent += spent.saturating_sub(work.aside);
        if step == self.first_step + EARLY_STEPS && step < self.total_steps {
            self.spent_early = Some(self.spent);
        }
        self.monitor.report(LogEvent::Step {
            step,
            total_steps: self.total_steps,
            headline: &work.headline,
            tokens_per_second: self.tokens_per_second(),
        });
    }

    /// Reports the end of the steps, once.
    pub fn finish(&mut self) {
        if !std::mem::replace(&mut self.finished, true) {
            self.monitor.report(LogEvent::StepsEnd);
        }
    }
}

/// A step that fails ends the steps too.
impl Drop for Progress<'_> {
    fn drop(&mut self) {
        self.finish();
    }
}
