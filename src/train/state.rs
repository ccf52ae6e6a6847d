//! The state of a run without tensors. Random numbers are keyed and need no state.

use serde::{Deserialize, Serialize};

use crate::objectives::advantage::RunningMoments;

/// The state of a run between two steps.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct State {
    /// Steps taken; of ppo and grpo updates.
    pub step: u64,
    /// Optimizer steps taken.
    pub optimizer_steps: u64,
    /// The epoch of the next step, from 0.
    pub epoch: u64,
    /// The next step within its epoch, from 0.
    pub step_in_epoch: u64,
    /// Bytes of `metrics.jsonl` that belong to these steps.
    pub metrics_bytes: u64,
    /// The best evaluation so far, if it is tracked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best: Option<BestEvaluation>,
    /// State of reinforcement learning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollouts: Option<RolloutState>,
}

/// The best evaluation of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BestEvaluation {
    /// The step after which it was evaluated.
    pub step: u64,
    /// Value of the metric.
    pub value: f64,
    /// Evaluations without improvement since then.
    #[serde(rename = "worse")]
    pub evals_since_best: u64,
}

/// The state that only reinforcement learning has.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RolloutState {
    /// The current KL coefficient.
    pub kl_coef: Option<f64>,
    /// Mean and variance of the scores so far.
    pub moments: RunningMoments,
    /// Bytes of `samples.jsonl` that belong to the steps so far.
    pub samples_bytes: u64,
    /// Warnings so far: each is printed once per run, also across resumes.
    #[serde(default, rename = "told")]
    pub warnings: Vec<String>,
}
