//! Where a run is: all that is not a tensor. Random numbers need no state, they are keyed.

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
    /// The best evaluation so far, where one is looked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best: Option<BestEvaluation>,
    /// What only reinforcement learning has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollouts: Option<RolloutState>,
}

/// The best evaluation of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BestEvaluation {
    /// The step it came after.
    pub step: u64,
    /// Its metric.
    pub value: f64,
    /// Evaluations since, none of them better.
    #[serde(rename = "worse")]
    pub evals_since_best: u64,
}

/// The state that only reinforcement learning has.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RolloutState {
    /// The KL coefficient now.
    pub kl_coef: Option<f64>,
    /// Mean and variance of the scores so far.
    pub moments: RunningMoments,
    /// Bytes of `samples.jsonl` that belong to the steps so far.
    pub samples_bytes: u64,
    /// Warnings so far: each is given once in a run, however often it is resumed.
    #[serde(default, rename = "told")]
    pub warnings: Vec<String>,
}
