//! What people read while a run goes: a bar on a terminal, a line now and then elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a line is printed where no bar can be drawn.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// What a step was, for people.
#[derive(Debug, Clone, Default)]
pub struct Work {
    /// Its most telling number.
    pub headline: String,
    /// Real tokens that went through it.
    pub tokens: u64,
    /// Rows, comparisons or responses of it.
    pub samples: u64,
    /// What of its time was no work on them.
    pub aside: Duration,
}

/// Progress over the steps of one process, on stderr.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    started: Instant,
    printed: Instant,
    first_step: u64,
    total_steps: u64,
    tokens: u64,
    samples: u64,
    /// Time in steps: evaluations, samples and checkpoints are not counted.
    spent: Duration,
    /// Of it, that of the first two steps.
    spent_early: Option<Duration>,
}

/// Steps by which the time of all is predicted.
pub const EARLY_STEPS: u64 = 2;

impl Progress {
    /// Begins at `step` of `total_steps`.
    pub fn new(step: u64, total_steps: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = "{bar:30} {pos}/{len} {msg} ETA {eta}";
            let style = ProgressStyle::with_template(style).expect("a fixed template parses");
            let bar = ProgressBar::new(total_steps).with_position(step).with_style(style);
            bar.reset_eta();
            bar
        });
        let now = Instant::now();
        let first_step = step;
        Self {
            bar,
            started: now,
            printed: now,
            first_step,
            total_steps,
            tokens: 0,
            samples: 0,
            spent: Duration::ZERO,
            spent_early: None,
        }
    }

    /// Seconds in steps.
    pub fn seconds(&self) -> f64 {
        self.spent.as_secs_f64()
    }

    /// What they were going to be, as the first two steps had it.
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

    /// A step is done, in `spent`.
    pub fn step(&mut self, step: u64, work: &Work, spent: Duration) {
        let headline = &work.headline;
        self.tokens += work.tokens;
        self.samples += work.samples;
        self.spent += spent.saturating_sub(work.aside);
        if step == self.first_step + EARLY_STEPS && step < self.total_steps {
            self.spent_early = Some(self.spent);
        }
        let rate = self.tokens_per_second();
        if let Some(bar) = &self.bar {
            bar.set_position(step);
            bar.set_message(format!("{headline}, {rate:.0} tok/s"));
        } else if self.printed.elapsed() >= LINE_EVERY || step == self.total_steps {
            self.printed = Instant::now();
            let done = (step - self.first_step).max(1) as f64;
            let left = (self.total_steps - step) as f64;
            let eta = self.started.elapsed().as_secs_f64() / done * left;
            let total = self.total_steps;
            eprintln!("step {step}/{total}: {headline}, {rate:.0} tok/s, ETA {eta:.0} s");
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
