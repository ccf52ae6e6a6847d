//! What long work reports to its caller, and how the caller stops it.
//!
//! The library prints nothing: functions that take long take a [`Monitor`], which hears
//! [`LogEvent`]s and carries the flag that asks them to stop. A flag alone is a monitor that hears
//! nothing. Does not know who listens.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

/// One report of work in progress.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum LogEvent<'a> {
    /// Something is probably not as the user wants it; the work continues.
    Warning(&'a str),
    /// Something that a user may want to read: what is loaded, what is waited for.
    Note(&'a str),
    /// A table of sampled responses with their rewards, several lines of text.
    Samples(&'a str),
    /// Training begins (or resumes) after `step` of `total_steps` steps.
    StepsBegin {
        /// Steps done so far.
        step: u64,
        /// Steps of the whole run.
        total_steps: u64,
    },
    /// A training step is done.
    Step {
        /// Its number, counted from 1.
        step: u64,
        /// Steps of the whole run.
        total_steps: u64,
        /// Its most important number, as text: `loss 1.234`.
        headline: &'a str,
        /// Mean training speed of this process so far.
        tokens_per_second: f64,
    },
    /// Metrics of a step or of an evaluation (names with `eval_`), as `metrics.jsonl` has them.
    Metrics {
        /// The step they belong to.
        step: u64,
        /// Names and values.
        metrics: &'a [(String, serde_json::Value)],
    },
    /// No further step follows: all are done, or the run was stopped.
    StepsEnd,
}

/// Receives the events of long work, and asks it to stop.
///
/// ```
/// use quantune::monitor::{LogEvent, Monitor};
/// use std::sync::atomic::AtomicBool;
///
/// let stop = AtomicBool::new(false);
/// let print = |event: LogEvent| {
///     if let LogEvent::Warning(text) = event {
///         eprintln!("warning: {text}");
///     }
/// };
/// let monitor = Monitor::new(&stop, &print);
/// monitor.warn("3 rows are longer than max_length");
/// assert!(!monitor.stopped());
/// ```
#[derive(Clone, Copy)]
pub struct Monitor<'a> {
    /// Set by the caller to end the work early.
    pub stop: &'a AtomicBool,
    listener: &'a (dyn Fn(LogEvent) + Sync),
}

impl<'a> Monitor<'a> {
    /// Sends events to `listener`; work ends early once `stop` is set.
    pub fn new(stop: &'a AtomicBool, listener: &'a (dyn Fn(LogEvent) + Sync)) -> Self {
        Self { stop, listener }
    }

    /// Whether the caller asked to stop.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Reports an event.
    pub fn report(&self, event: LogEvent) {
        (self.listener)(event);
    }

    /// Reports a warning.
    pub fn warn(&self, text: impl fmt::Display) {
        self.report(LogEvent::Warning(&text.to_string()));
    }

    /// Reports a note.
    pub fn note(&self, text: impl fmt::Display) {
        self.report(LogEvent::Note(&text.to_string()));
    }
}

impl Monitor<'static> {
    /// Ignores all events and never stops.
    pub fn silent() -> Self {
        static NEVER: AtomicBool = AtomicBool::new(false);
        Self::from(&NEVER)
    }
}

/// Ignores all events; work ends early once the flag is set.
impl<'a> From<&'a AtomicBool> for Monitor<'a> {
    fn from(stop: &'a AtomicBool) -> Self {
        Self { stop, listener: &|_| {} }
    }
}

impl fmt::Debug for Monitor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").field("stop", self.stop).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn events_reach_the_listener_and_a_flag_alone_is_silent() {
        let (stop, heard) = (AtomicBool::new(false), Mutex::new(Vec::new()));
        let listener = |event: LogEvent| heard.lock().unwrap().push(format!("{event:?}"));
        let monitor = Monitor::new(&stop, &listener);
        monitor.warn("odd");
        monitor.note(format_args!("{} rows", 3));
        Monitor::from(&stop).warn("nobody hears");
        Monitor::silent().note("nobody hears");
        assert_eq!(*heard.lock().unwrap(), ["Warning(\"odd\")", "Note(\"3 rows\")"]);
        stop.store(true, Ordering::Relaxed);
        assert!(monitor.stopped() && !Monitor::silent().stopped());
    }
}
