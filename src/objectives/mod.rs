//! Losses: pure functions of log-probs, scores or values. They return a sum, never a mean, so that the
//! caller can divide by the count of a whole step and any split of the step into micro-batches gives the
//! same gradient.

pub mod advantage;
pub mod policy;
pub mod preference;
pub mod reward;

use candle_core::{Result, Tensor};

use crate::ops::linear_cross_entropy::Distributions;
use policy::{
    GrpoSettings, GrpoStats, PpoPolicyStats, PpoValueStats, Sampled, grpo_loss, ppo_policy_loss,
    ppo_value_loss, row_sums,
};
use preference::{PreferenceBatch, PreferenceStats};
use reward::{RewardStats, WeightedPair, pair_losses};

/// The objective of a micro-batch.
#[derive(Debug, Clone, PartialEq)]
pub enum Objective {
    /// The negative log-likelihood of the learned tokens.
    LanguageModeling,
    /// Scores of compared responses.
    Reward {
        /// For each response the index, in N, of the hidden state of its score.
        rows: Vec<u32>,
        /// Preference pairs of responses.
        pairs: Vec<WeightedPair>,
        /// Weight of the squared sum of a pair's scores.
        center_rewards_coefficient: f64,
    },
    /// Log-probs of compared or labelled responses.
    Preference(Box<PreferenceBatch>),
    /// Log-probs of sampled responses, the values of their states, or both.
    Ppo {
        /// The policy loss.
        policy: Option<Box<PpoPolicy>>,
        /// The value loss.
        value: Option<Box<PpoValue>>,
    },
    /// Log-probs of responses sampled in groups.
    Grpo(Box<Grpo>),
}

/// Inputs of PPO's policy loss, for each sampled token.
#[derive(Debug, Clone, PartialEq)]
pub struct PpoPolicy {
    /// Log-probs when the responses were sampled, by the training path.
    pub old_logps: Vec<f32>,
    /// Advantages.
    pub advantages: Vec<f32>,
    /// Weight of each in the loss.
    pub weights: Vec<f32>,
    /// Clip range of the ratio around 1.
    pub cliprange: f64,
}

/// Inputs of PPO's value loss, for each state.
#[derive(Debug, Clone, PartialEq)]
pub struct PpoValue {
    /// For each state the index, in N, of the hidden state of its value.
    pub rows: Vec<u32>,
    /// Values when the responses were sampled.
    pub old_values: Vec<f32>,
    /// Returns.
    pub returns: Vec<f32>,
    /// Weight of each in the loss, including the value loss coefficient.
    pub weights: Vec<f32>,
    /// Clip range of a value around its old value.
    pub cliprange_value: f64,
}

/// Inputs of GRPO's loss, for each sampled token.
#[derive(Debug, Clone, PartialEq)]
pub struct Grpo {
    /// The loss.
    pub settings: GrpoSettings,
    /// Number of tokens of each response.
    pub tokens: Vec<usize>,
    /// Log-probs when they were sampled, by the training path; without, the current ones are used.
    pub old_logps: Option<Vec<f32>>,
    /// Log-probs under the reference.
    pub ref_logps: Option<Vec<f32>>,
    /// Advantages.
    pub advantages: Vec<f32>,
    /// Weight of each in the loss.
    pub weights: Vec<f32>,
    /// Whether a response is one action (RLOO), with one advantage and weight per response.
    pub by_response: bool,
}

/// The loss of a micro-batch, and statistics.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ObjectiveOutput {
    /// The loss, summed.
    pub loss: f64,
    /// Statistics.
    pub stats: Stats,
    /// Log-probs of the tokens of sampled responses (PPO, GRPO).
    pub logps: Vec<f32>,
}

/// Statistics of the objectives; those of micro-batches can be added.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stats {
    /// Reward modelling.
    pub reward: Option<RewardStats>,
    /// Preference optimization.
    pub preference: Option<PreferenceStats>,
    /// PPO's policy loss.
    pub policy: Option<PpoPolicyStats>,
    /// PPO's value loss.
    pub value: Option<PpoValueStats>,
    /// GRPO.
    pub grpo: Option<GrpoStats>,
    /// Language modelling.
    pub tokens: Option<TokenStats>,
}

/// Statistics of the learned tokens of language modelling.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TokenStats {
    /// Number of tokens.
    pub count: u64,
    /// Number of tokens that are the most likely one.
    pub argmax_count: u64,
    /// Summed entropy of the predicted distributions, in nats.
    pub entropy: f64,
}

impl TokenStats {
    fn new(known: Distributions) -> Self {
        Self {
            count: known.is_argmax.len() as u64,
            argmax_count: known.is_argmax.iter().filter(|is_argmax| **is_argmax).count() as u64,
            entropy: known.entropies.iter().map(|&entropy| f64::from(entropy)).sum(),
        }
    }

    fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.argmax_count += other.argmax_count;
        self.entropy += other.entropy;
    }

    /// Means, under TRL's names.
    pub fn metrics(&self) -> [(&'static str, f64); 2] {
        let of = |sum: f64| sum / self.count.max(1) as f64;
        [("mean_token_accuracy", of(self.argmax_count as f64)), ("entropy", of(self.entropy))]
    }
}

impl Stats {
    /// Means under TRL's names; without those of PPO, which are means over several steps.
    pub fn metrics(&self) -> Vec<(&'static str, f64)> {
        let mut found: Vec<(&'static str, f64)> = Vec::new();
        if let Some(reward) = &self.reward {
            found.extend(reward.metrics().into_iter().filter(|(key, _)| *key != "loss"));
        }
        if let Some(preference) = &self.preference {
            found.extend(preference.metrics());
        }
        if let Some(grpo) = &self.grpo {
            found.extend(grpo.metrics());
        }
        if let Some(tokens) = &self.tokens {
            found.extend(tokens.metrics());
        }
        found
    }

    /// Adds the statistics of another micro-batch.
    pub fn add(&mut self, other: Self) {
        fn merge<T>(into: &mut Option<T>, other: Option<T>, add: impl Fn(&mut T, &T)) {
            match (into.as_mut(), other) {
                (Some(sum), Some(other)) => add(sum, &other),
                (None, other) => *into = other,
                (Some(_), None) => {}
            }
        }
        merge(&mut self.reward, other.reward, RewardStats::add);
        merge(&mut self.preference, other.preference, PreferenceStats::add);
        merge(&mut self.policy, other.policy, PpoPolicyStats::add);
        merge(&mut self.value, other.value, PpoValueStats::add);
        merge(&mut self.grpo, other.grpo, GrpoStats::add);
        merge(&mut self.tokens, other.tokens, TokenStats::add);
    }
}

impl Objective {
    /// Whether the objective needs log-probs of targets.
    pub fn reads_log_probs(&self) -> bool {
        match self {
            Self::Reward { .. } => false,
            Self::Ppo { policy, .. } => policy.is_some(),
            Self::LanguageModeling | Self::Preference(_) | Self::Grpo(_) => true,
        }
    }

    /// Indices, in N, of the hidden states of scores or values.
    pub fn score_rows(&self) -> Option<&[u32]> {
        match self {
            Self::Reward { rows, .. } => Some(rows),
            Self::Ppo { value, .. } => Some(&value.as_ref()?.rows),
            Self::LanguageModeling | Self::Preference(_) | Self::Grpo(_) => None,
        }
    }

    /// The summed loss: a scalar, differentiable in `logps` and `scores`.
    ///
    /// `logps (M)` F32 are the log-probabilities of the M targets, in nats, `scores (S)` F32 those of
    /// [`Self::score_rows`]. Statistics of the M distributions are only recorded.
    ///
    /// # Errors
    /// If an input of the objective is missing, or counts differ.
    pub fn compute(
        &self,
        logps: Option<&Tensor>,
        scores: Option<&Tensor>,
        distributions: Option<Distributions>,
    ) -> Result<(Tensor, ObjectiveOutput)> {
        let entropies = distributions.map(|known| known.entropies);
        let needed = |read: Option<&Tensor>, what: &str| match read {
            Some(read) => Ok(read.clone()),
            None => candle_core::bail!("this objective needs {what}"),
        };
        let logps = || needed(logps, "log-probs");
        match self {
            Self::LanguageModeling => {
                let logps = logps()?;
                let values = logps.to_vec1::<f32>()?;
                // The tape sums in f32; the reported loss is the sum of the same terms in f64.
                let loss = -values.iter().map(|&logp| f64::from(logp)).sum::<f64>();
                let tokens = distributions.map(TokenStats::new);
                let stats = Stats { tokens, ..Stats::default() };
                Ok((
                    logps.sum_all()?.neg()?,
                    ObjectiveOutput { loss, stats, ..ObjectiveOutput::default() },
                ))
            }
            Self::Reward { pairs, center_rewards_coefficient, .. } => {
                let scores = needed(scores, "scores")?;
                let (sum, stats) = pair_losses(&scores, pairs, *center_rewards_coefficient)?;
                let loss = stats.loss;
                let stats = Stats { reward: Some(stats), ..Stats::default() };
                Ok((sum, ObjectiveOutput { loss, stats, ..ObjectiveOutput::default() }))
            }
            Self::Preference(batch) => {
                let found = batch.losses(&logps()?)?;
                let loss = found.stats.loss;
                let stats = Stats { preference: Some(found.stats), ..Stats::default() };
                Ok((
                    found.losses.sum_all()?,
                    ObjectiveOutput { loss, stats, ..ObjectiveOutput::default() },
                ))
            }
            Self::Ppo { policy, value } => {
                let (mut total, mut output) = (None, ObjectiveOutput::default());
                if let Some(policy) = policy {
                    let PpoPolicy { old_logps, advantages, weights, cliprange } = &**policy;
                    let sampled = Sampled { old_logps, advantages, weights };
                    let logps = logps()?;
                    let (sum, stats) = ppo_policy_loss(&logps, &sampled, *cliprange, entropies)?;
                    output.logps = logps.to_vec1()?;
                    output.loss += stats.loss;
                    output.stats.policy = Some(stats);
                    total = Some(sum);
                }
                if let Some(value) = value {
                    let scores = needed(scores, "values")?;
                    let PpoValue { old_values, returns, weights, cliprange_value, .. } = &**value;
                    let (sum, stats) =
                        ppo_value_loss(&scores, old_values, returns, weights, *cliprange_value)?;
                    output.loss += stats.loss;
                    output.stats.value = Some(stats);
                    total = Some(match total {
                        Some(total) => (total + sum)?,
                        None => sum,
                    });
                }
                match total {
                    Some(total) => Ok((total, output)),
                    None => {
                        candle_core::bail!("the objective has neither a policy nor a value part")
                    }
                }
            }
            Self::Grpo(grpo) => grpo.compute(&logps()?, entropies),
        }
    }
}

impl Grpo {
    fn compute(
        &self,
        logps: &Tensor,
        entropies: Option<&[f32]>,
    ) -> Result<(Tensor, ObjectiveOutput)> {
        let own = logps.to_vec1::<f32>()?;
        let old_logps = self.old_logps.as_ref().unwrap_or(&own);
        let (advantages, weights) = (&self.advantages[..], &self.weights[..]);
        let reference = self.ref_logps.as_deref();
        let (sum, stats) = if self.by_response {
            let mut old = vec![0f32; self.tokens.len()];
            let mut start = 0;
            for (sum, &count) in old.iter_mut().zip(&self.tokens) {
                *sum = old_logps[start..start + count].iter().sum();
                start += count;
            }
            let rows = row_sums(logps, &self.tokens)?;
            let sampled = Sampled { old_logps: &old, advantages, weights };
            let ones = vec![1; self.tokens.len()];
            grpo_loss(&rows, &sampled, &ones, None, &self.settings, None)?
        } else {
            let sampled = Sampled { old_logps, advantages, weights };
            grpo_loss(logps, &sampled, &self.tokens, reference, &self.settings, entropies)?
        };
        let loss = stats.loss;
        let stats = Stats { grpo: Some(stats), ..Stats::default() };
        Ok((sum, ObjectiveOutput { loss, stats, logps: own }))
    }
}

#[cfg(test)]
mod tests;
