//! Metrics of steps and evaluations.

use serde_json::{Value, json};

use crate::objectives::Stats;

/// Named metrics of a step, in the order they are written.
pub(super) type Numbers = Vec<(String, Value)>;

/// The prefix of evaluation metrics.
pub(super) const EVAL: &str = "eval_";

/// The statistics of objectives, under TRL's names.
pub(super) fn stats_numbers(stats: &Stats) -> Numbers {
    stats.metrics().into_iter().map(|(key, value)| (key.to_string(), json!(value))).collect()
}
