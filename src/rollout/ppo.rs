//! From scored responses to PPO's training targets: rewards per token, advantages, returns, and the
//! micro-batches of a step (Schulman et al. 2017; Ziegler et al. 2019). States and rewards are at the same
//! positions as in TRL's PPOTrainer.

use crate::data::Batch;
use crate::objectives::advantage::{KlEstimator, gae, token_rewards, whiten};
use crate::objectives::{Objective, PpoPolicy, PpoValue};

/// Settings of advantage estimation. Names are TRL's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdvantageSettings {
    /// Coefficient of the KL penalty.
    pub kl_coef: f64,
    /// The KL estimator.
    pub kl_estimator: KlEstimator,
    /// Discount factor.
    pub gamma: f64,
    /// Lambda of generalized advantage estimation.
    pub lam: f64,
    /// Whether rewards are scaled to standard deviation 1 (keeping their mean).
    pub whiten_rewards: bool,
}

/// The training targets of a response.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Experience {
    /// Log-probs of its T tokens under the policy that sampled it, computed by the training path.
    pub old_logps: Vec<f32>,
    /// Log-probs of its T tokens under the reference.
    pub ref_logps: Vec<f32>,
    /// Values of its S states: before each token, and after the last token of a response that is shorter
    /// than the maximum.
    pub values: Vec<f32>,
    /// Total reward, penalties included.
    pub score: f32,
    /// KL estimate at each token.
    pub kl: Vec<f32>,
    /// Reward of each state.
    pub rewards: Vec<f32>,
    /// Advantage of each token.
    pub advantages: Vec<f32>,
    /// Return of each state.
    pub returns: Vec<f32>,
}

/// Number of states of a response of `tokens` tokens, of at most `most`. As in TRL, the state after the last
/// token counts if the response is shorter than `most`, and the score is given there.
pub fn states(tokens: usize, most: usize) -> usize {
    if tokens < most { tokens + 1 } else { tokens }
}

/// Computes KL estimates, rewards, advantages and returns of all responses of an update from their
/// log-probs, values and scores.
pub fn finish(rows: &mut [Experience], settings: &AdvantageSettings) {
    for row in rows.iter_mut() {
        row.kl = settings.kl_estimator.per_token(&row.old_logps, &row.ref_logps);
        let states = row.values.len();
        row.rewards = token_rewards(&row.kl, row.score, settings.kl_coef, states);
    }
    if settings.whiten_rewards {
        whiten_all(rows, |row| &mut row.rewards, false);
    }
    for row in rows.iter_mut() {
        let (mut advantages, returns) =
            gae(&row.rewards, &row.values, settings.gamma, settings.lam);
        advantages.truncate(row.old_logps.len());
        (row.advantages, row.returns) = (advantages, returns);
    }
    whiten_all(rows, |row| &mut row.advantages, true);
}

/// Whitens one field over all rows together.
fn whiten_all(
    rows: &mut [Experience],
    part: impl Fn(&mut Experience) -> &mut Vec<f32>,
    shift_mean: bool,
) {
    let mut all: Vec<f32> = rows.iter_mut().flat_map(|row| part(row).clone()).collect();
    whiten(&mut all, shift_mean);
    let mut all = all.into_iter();
    for row in rows {
        for (value, whitened) in part(row).iter_mut().zip(all.by_ref()) {
            *value = whitened;
        }
    }
}

/// Indices of the hidden states, in the N of [`collate`](super::respond::collate), from which the values of
/// the states are read.
pub fn state_rows(batch: &Batch, states: impl Iterator<Item = usize>) -> Vec<u32> {
    let mut rows = Vec::new();
    for ((span, &end), states) in batch.spans.iter().zip(&batch.ends).zip(states) {
        rows.extend(batch.targets[span.clone()].iter().map(|&(row, _)| row));
        if states > span.len() {
            rows.push(end);
        }
    }
    rows
}

/// Numbers of tokens and states of a mini-batch, which its losses are divided by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MiniBatchCounts {
    tokens: usize,
    states: usize,
}

impl MiniBatchCounts {
    /// Counts the tokens and states of a mini-batch.
    pub fn of(rows: &[&Experience]) -> Self {
        Self {
            tokens: rows.iter().map(|row| row.old_logps.len()).sum(),
            states: rows.iter().map(|row| row.values.len()).sum(),
        }
    }
}

/// The policy loss of a micro-batch with the responses of `rows`.
pub fn policy_part(rows: &[&Experience], counts: MiniBatchCounts, cliprange: f64) -> PpoPolicy {
    let all = |part: fn(&Experience) -> &Vec<f32>| -> Vec<f32> {
        rows.iter().flat_map(|row| part(row).iter().copied()).collect()
    };
    let old_logps = all(|row| &row.old_logps);
    let weights = vec![1.0 / counts.tokens as f32; old_logps.len()];
    PpoPolicy { old_logps, advantages: all(|row| &row.advantages), weights, cliprange }
}

/// The value loss of a micro-batch with the responses of `rows`; `batch` is their
/// [`collate`](super::respond::collate).
pub fn value_part(
    rows: &[&Experience],
    batch: &Batch,
    counts: MiniBatchCounts,
    vf_coef: f64,
    cliprange_value: f64,
) -> PpoValue {
    let all = |part: fn(&Experience) -> &Vec<f32>| -> Vec<f32> {
        rows.iter().flat_map(|row| part(row).iter().copied()).collect()
    };
    let old_values = all(|row| &row.values);
    let weights = vec![(vf_coef / counts.states as f64) as f32; old_values.len()];
    PpoValue {
        rows: state_rows(batch, rows.iter().map(|row| row.values.len())),
        old_values,
        returns: all(|row| &row.returns),
        weights,
        cliprange_value,
    }
}

/// The objective made of policy and value loss.
pub fn objective(policy: Option<PpoPolicy>, value: Option<PpoValue>) -> Objective {
    Objective::Ppo { policy: policy.map(Box::new), value: value.map(Box::new) }
}
