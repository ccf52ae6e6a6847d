//! Named numbers of steps and evaluations.

use serde_json::{Value, json};

use crate::objectives::Stats;

/// Named numbers of a step, in the order they are written.
pub type Numbers = Vec<(String, Value)>;

/// The prefix of the numbers of an evaluation.
pub const EVAL: &str = "eval_";

/// What objectives counted, under TRL's names.
pub fn stats_numbers(stats: &Stats) -> Numbers {
    stats.metrics().into_iter().map(|(key, value)| (key.to_string(), json!(value))).collect()
}
