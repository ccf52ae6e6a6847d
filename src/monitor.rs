//! Progress events of long operations, and how the caller stops them.
//!
//! The library prints nothing: long-running functions take a [`Monitor`], which receives
//! [`LogEvent`]s and holds the stop flag. A stop flag alone can be used as a monitor that ignores events.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

/// A progress event.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum LogEvent<'a> {
    /// A probable mistake; the work continues.
    Warning(&'a str),
    /// Information for the user, such as what is loaded or waited for.
    Note(&'a str),
    /// A table of sampled responses with their rewards, several lines of text.
    Samples(&'a str),
    /// Training starts (or resumes) after `step` of `total_steps` steps.
    StepsBegin {
        /// Steps done so far.
        step: u64,
        /// Steps of the whole run.
        total_steps: u64,
    },
    /// A training step is done.
    Step {
        /// The step, counted from 1.
        step: u64,
        /// Steps of the whole run.
        total_steps: u64,
        /// The main metric as text: `loss 1.234`.
        headline: &'a str,
        /// Mean training speed of this process so far.
        tokens_per_second: f64,
    },
    /// Metrics of a step or of an evaluation (names with `eval_`), as written to `metrics.jsonl`.
    Metrics {
        /// The step they belong to.
        step: u64,
        /// Names and values.
        metrics: &'a [(String, serde_json::Value)],
    },
    /// The end of the steps: all are done, or the run was stopped.
    StepsEnd,
}

/// Receives progress events, and requests a stop.
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

    /// Whether the caller requested a stop.
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
        Monitor::from(&stop).warn("ignored");
        Monitor::silent().note("ignored");
        assert_eq!(*heard.lock().unwrap(), ["Warning(\"odd\")", "Note(\"3 rows\")"]);
        stop.store(true, Ordering::Relaxed);
        assert!(monitor.stopped() && !Monitor::silent().stopped());
    }
}
