//! Prints what the library reports, on stderr: a progress bar on a terminal, a line now and then
//! elsewhere.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::monitor::{LogEvent, Monitor};

/// Interval of printed steps where no progress bar can be drawn.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// A monitor that prints and never stops: Ctrl-C ends the process.
pub(super) fn monitor() -> Monitor<'static> {
    static NEVER: AtomicBool = AtomicBool::new(false);
    with_stop(&NEVER)
}

/// A monitor that prints, and stops when `stop` is set.
pub(super) fn with_stop(stop: &AtomicBool) -> Monitor<'_> {
    Monitor::new(stop, &print)
}

/// The steps of the current run. A process trains one run at a time.
static STEPS: Mutex<Option<Steps>> = Mutex::new(None);

/// The progress display of a run.
struct Steps {
    bar: Option<ProgressBar>,
    started: Instant,
    printed: Instant,
    first_step: u64,
}

impl Steps {
    fn begin(step: u64, total_steps: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = "{bar:30} {pos}/{len} {msg} ETA {eta}";
            let style = ProgressStyle::with_template(style).expect("a fixed template parses");
            let bar = ProgressBar::new(total_steps).with_position(step).with_style(style);
            bar.reset_eta();
            bar
        });
        let now = Instant::now();
        Self { bar, started: now, printed: now, first_step: step }
    }

    fn step(&mut self, step: u64, total_steps: u64, headline: &str, rate: f64) {
        if let Some(bar) = &self.bar {
            bar.set_position(step);
            bar.set_message(format!("{headline}, {rate:.0} tok/s"));
        } else if self.printed.elapsed() >= LINE_EVERY || step == total_steps {
            self.printed = Instant::now();
            let done = (step - self.first_step).max(1) as f64;
            let left = (total_steps - step) as f64;
            let eta = self.started.elapsed().as_secs_f64() / done * left;
            eprintln!("step {step}/{total_steps}: {headline}, {rate:.0} tok/s, ETA {eta:.0} s");
        }
    }
}

fn print(event: LogEvent) {
    let mut steps = STEPS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let bar = steps.as_ref().and_then(|steps| steps.bar.clone());
    let text = |text: &dyn Fn()| match &bar {
        Some(bar) => bar.suspend(text),
        None => text(),
    };
    match event {
        LogEvent::Warning(warning) => text(&|| eprintln!("warning: {warning}")),
        LogEvent::Note(note) => text(&|| eprintln!("{note}")),
        LogEvent::Samples(table) => text(&|| eprint!("{table}")),
        LogEvent::StepsBegin { step, total_steps } => {
            *steps = Some(Steps::begin(step, total_steps))
        }
        LogEvent::Step { step, total_steps, headline, tokens_per_second } => {
            if let Some(steps) = steps.as_mut() {
                steps.step(step, total_steps, headline, tokens_per_second);
            }
        }
        LogEvent::StepsEnd => {
            if let Some(bar) = bar {
                bar.finish_and_clear();
            }
            *steps = None;
        }
        LogEvent::Metrics { .. } => {}
    }
}
