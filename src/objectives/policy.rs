//! Policy gradients over sampled responses: PPO's clipped losses (Schulman et al. 2017), GRPO's
//! (Shao et al. 2024) and its variants.
//!
//! A batch is the concatenated response tokens of its rows, T in total, without padding. Each token has a
//! weight that depends on the whole step ([`LossForm`]), so that any split of the step into micro-batches
//! gives the same gradient.

use super::reward::floats;
use crate::string_enum::string_enum;
use candle_core::{Result, Tensor};

string_enum! {
    /// How token losses are averaged (TRL's `loss_type`).
    #[derive(Debug)]
    pub enum LossForm {
        /// The mean over a row's tokens, then over rows: rows have equal weight, so a token of a long row has
        /// less (Shao et al. 2024).
        Grpo = "grpo",
        /// The mean over all tokens (TRL's `bnpo`; also PPO's).
        Bnpo = "bnpo",
        /// The sum over tokens divided by the maximum length of a response, then the mean over rows, which
        /// has no length bias (Dr. GRPO: Liu et al. 2025).
        DrGrpo = "dr_grpo",
    }
}

impl LossForm {
    /// The weight of each token of a row of `tokens` tokens.
    pub fn weight(self, tokens: usize, max_completion_length: usize) -> f32 {
        match self {
            Self::Grpo => 1.0 / tokens.max(1) as f32,
            Self::Bnpo => 1.0,
            Self::DrGrpo => 1.0 / max_completion_length.max(1) as f32,
        }
    }

    /// The weights of all tokens of the rows, `(T)`.
    pub fn weights(self, tokens: &[usize], max_completion_length: usize) -> Vec<f32> {
        let weight = |&count: &usize| self.weight(count, max_completion_length);
        per_token(&tokens.iter().map(weight).collect::<Vec<_>>(), tokens)
    }

    /// Divisor of the weighted sum over a whole step, from the number of tokens of each row. A masked row (a
    /// truncated completion) has no tokens, but counts as a row.
    pub fn count(self, tokens: &[usize]) -> usize {
        let count = match self {
            Self::Grpo | Self::DrGrpo => tokens.len(),
            Self::Bnpo => tokens.iter().sum(),
        };
        count.max(1)
    }
}

/// Repeats a row's value for each of its tokens: `(R)` → `(T)`.
pub fn per_token(rows: &[f32], tokens: &[usize]) -> Vec<f32> {
    let repeat = |(&value, &count)| std::iter::repeat_n(value, count);
    rows.iter().zip(tokens).flat_map(repeat).collect()
}

/// Sums over the tokens of each row, `(T)` → `(R)`, differentiable: log-probs of whole responses.
pub fn row_sums(values: &Tensor, tokens: &[usize]) -> Result<Tensor> {
    let row = |(row, &count): (usize, &usize)| std::iter::repeat_n(row as u32, count);
    let rows: Vec<u32> = tokens.iter().enumerate().flat_map(row).collect();
    let count = rows.len();
    let rows = Tensor::from_vec(rows, count, values.device())?;
    Tensor::zeros(tokens.len(), values.dtype(), values.device())?.index_add(&rows, values, 0)
}

/// Sampling data of the tokens of a batch (or, for RLOO, of its whole responses).
#[derive(Debug, Clone, Copy)]
pub struct Sampled<'a> {
    /// Log-probs when the batch was sampled, by the training path, `(T)`.
    pub old_logps: &'a [f32],
    /// Advantages, `(T)`.
    pub advantages: &'a [f32],
    /// Weight of each, `(T)`.
    pub weights: &'a [f32],
}

/// PPO's policy loss, `Σ weight · max(-A r, -A clip(r, 1 ± cliprange))` with `r = π/π_old`
/// (Schulman et al. 2017, equation 7): a scalar, differentiable in `logps (T)` F32.
///
/// `entropies (T)`, if given, are only recorded.
///
/// # Errors
/// If counts differ.
pub fn ppo_policy_loss(
    logps: &Tensor,
    sampled: &Sampled<'_>,
    cliprange: f64,
    entropies: Option<&[f32]>,
) -> Result<(Tensor, PpoPolicyStats)> {
    let clipped = Clipped::new(logps, sampled, cliprange, cliprange)?;
    let loss = (&clipped.losses * column(sampled.weights, logps)?)?.sum_all()?;
    let mut stats = PpoPolicyStats {
        tokens: sampled.old_logps.len() as u64,
        weight: sum(sampled.weights),
        loss: f64::from(loss.to_scalar::<f32>()?),
        entropy: entropies.map(sum),
        ..PpoPolicyStats::default()
    };
    let ratios = floats(&clipped.ratio)?;
    for ((ratio, logp), (&old, &advantage)) in
        ratios.into_iter().zip(floats(logps)?).zip(sampled.old_logps.iter().zip(sampled.advantages))
    {
        let advantage = f64::from(advantage);
        let limited = ratio.clamp(1.0 - cliprange, 1.0 + cliprange);
        stats.approxkl += 0.5 * (logp - f64::from(old)).powi(2);
        stats.clipped += u64::from(-advantage * limited > -advantage * ratio);
        stats.ratio += ratio;
    }
    Ok((loss, stats))
}

/// PPO's value loss, `Σ weight · ½ max((V - R)², (clip(V, V_old ± cliprange_value) - R)²)`: a
/// scalar, differentiable in `values (S)` F32, one for each state.
///
/// # Errors
/// If counts differ.
pub fn ppo_value_loss(
    values: &Tensor,
    old_values: &[f32],
    returns: &[f32],
    weights: &[f32],
    cliprange_value: f64,
) -> Result<(Tensor, PpoValueStats)> {
    let old = column(old_values, values)?;
    let target = column(returns, values)?;
    let lowest = (&old - cliprange_value)?;
    let highest = (&old + cliprange_value)?;
    let clipped = values.maximum(&lowest)?.minimum(&highest)?;
    let free = (values - &target)?.sqr()?;
    let clipped = (clipped - &target)?.sqr()?;
    let losses = (free.maximum(&clipped)? * 0.5)?; // (S)
    let loss = (losses * column(weights, values)?)?.sum_all()?;
    let more = floats(&clipped)?.into_iter().zip(floats(&free)?).filter(|(c, f)| c > f).count();
    let stats = PpoValueStats {
        states: old_values.len() as u64,
        weight: sum(weights),
        loss: f64::from(loss.to_scalar::<f32>()?),
        clipped: more as u64,
    };
    Ok((loss, stats))
}

/// Sums over the tokens of a batch; those of several batches can be added.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PpoPolicyStats {
    /// Tokens.
    pub tokens: u64,
    /// Their weights.
    pub weight: f64,
    /// The loss.
    pub loss: f64,
    /// `½ (log π - log π_old)²`.
    pub approxkl: f64,
    /// Tokens whose clipped loss is greater.
    pub clipped: u64,
    /// `π/π_old`.
    pub ratio: f64,
    /// Entropies, if they were given.
    pub entropy: Option<f64>,
}

impl PpoPolicyStats {
    /// Adds another batch of the same minibatch.
    pub fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.weight += other.weight;
        self.loss += other.loss;
        self.approxkl += other.approxkl;
        self.clipped += other.clipped;
        self.ratio += other.ratio;
        self.entropy = both(self.entropy, other.entropy);
    }
}

/// Sums over the states of a batch; those of several batches can be added.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PpoValueStats {
    /// States.
    pub states: u64,
    /// Their weights.
    pub weight: f64,
    /// The loss.
    pub loss: f64,
    /// States whose clipped loss is greater.
    pub clipped: u64,
}

impl PpoValueStats {
    /// Adds another batch of the same minibatch.
    pub fn add(&mut self, other: &Self) {
        self.states += other.states;
        self.weight += other.weight;
        self.loss += other.loss;
        self.clipped += other.clipped;
    }
}

/// Means under the names of TRL's PPO, over all minibatches of all epochs of a step, with equal weight.
///
/// TRL's `approxkl`, `ratio` and entropy are means over padding too (with ratio 1 and unchanged log-probs
/// there); these are over tokens only.
pub fn ppo_metrics(policy: &[PpoPolicyStats], value: &[PpoValueStats]) -> Vec<(&'static str, f64)> {
    let means = |of: &dyn Fn(&PpoPolicyStats) -> f64| -> Vec<f64> {
        policy.iter().map(|stats| of(stats) / stats.tokens.max(1) as f64).collect()
    };
    let value_mean =
        |of: fn(&PpoValueStats) -> f64| mean(&value.iter().map(of).collect::<Vec<_>>());
    let ratios = means(&|stats| stats.ratio);
    let losses: Vec<f64> =
        policy.iter().map(|stats| stats.loss / stats.weight.max(f64::MIN_POSITIVE)).collect();
    let mut metrics = vec![
        ("policy/approxkl_avg", mean(&means(&|stats| stats.approxkl))),
        ("policy/clipfrac_avg", mean(&means(&|stats| stats.clipped as f64))),
        ("loss/policy_avg", mean(&losses)),
        ("loss/value_avg", value_mean(|stats| stats.loss / stats.weight.max(f64::MIN_POSITIVE))),
        ("val/clipfrac_avg", value_mean(|stats| stats.clipped as f64 / stats.states.max(1) as f64)),
        ("val/ratio", mean(&ratios)),
        ("val/ratio_var", variance(&ratios)),
    ];
    if policy.iter().all(|stats| stats.entropy.is_some()) {
        let entropy = mean(&means(&|stats| stats.entropy.unwrap_or_default()));
        metrics.push(("policy/entropy_avg", entropy));
    }
    metrics
}

/// The parameters of GRPO's loss, with TRL's names.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GrpoSettings {
    /// Lower clip range of the ratio below 1.
    pub epsilon: f64,
    /// Upper clip range above 1; larger in DAPO (Yu et al. 2025).
    pub epsilon_high: f64,
    /// Weight of the KL divergence from the reference (k3); with 0 no reference is needed.
    pub beta: f64,
}

/// GRPO's loss, `Σ weight · (-min(r A, clip(r, 1 - ε, 1 + ε_high) A) + β k3)` (Shao et al. 2024,
/// equations 3 and 4): a scalar, differentiable in `logps (T)` F32.
///
/// `tokens (R)` is the number of tokens of each row. `ref_logps (T)` are needed if β is not 0; `entropies (T)`,
/// if given, are only recorded. With the summed log-probs of whole responses
/// ([`row_sums`]), each a row of one "token", with `beta` 0 (KL then is part of the reward), this is
/// RLOO's loss.
///
/// # Errors
/// If counts differ, or the reference is missing.
pub fn grpo_loss(
    logps: &Tensor,
    sampled: &Sampled<'_>,
    tokens: &[usize],
    ref_logps: Option<&[f32]>,
    settings: &GrpoSettings,
    entropies: Option<&[f32]>,
) -> Result<(Tensor, GrpoStats)> {
    let &GrpoSettings { epsilon, epsilon_high, beta } = settings;
    let clipped = Clipped::new(logps, sampled, epsilon, epsilon_high)?;
    let mut losses = clipped.losses; // (T)
    let mut kl = None;
    if beta != 0.0 {
        let Some(ref_logps) = ref_logps else {
            candle_core::bail!("a KL penalty needs log-probs of the reference")
        };
        let log_ratio = (column(ref_logps, logps)? - logps)?;
        let k3 = ((log_ratio.exp()? - &log_ratio)? - 1.0)?;
        kl = Some(floats(&k3)?.iter().sum());
        losses = (losses + (k3 * beta)?)?;
    }
    let loss = (losses * column(sampled.weights, logps)?)?.sum_all()?;
    let mut stats = GrpoStats {
        loss: f64::from(loss.to_scalar::<f32>()?),
        kl,
        entropy: entropies.map(sum),
        ..GrpoStats::default()
    };
    stats.count_clips(&floats(&clipped.ratio)?, sampled.advantages, tokens, settings);
    Ok((loss, stats))
}

/// Sums over the tokens of a batch; those of several batches can be added.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GrpoStats {
    /// Tokens.
    pub tokens: u64,
    /// The loss.
    pub loss: f64,
    /// k3 to the reference, if there is one.
    pub kl: Option<f64>,
    /// Entropies, if they were given.
    pub entropy: Option<f64>,
    /// Tokens whose ratio is clipped from below, with a negative advantage.
    pub low_clipped: u64,
    /// Tokens whose ratio is clipped from above.
    pub high_clipped: u64,
    /// The smallest fraction of a row's tokens clipped from below.
    pub low_min: f64,
    /// The largest fraction of a row's tokens clipped from above.
    pub high_max: f64,
}

impl Default for GrpoStats {
    fn default() -> Self {
        Self {
            tokens: 0,
            loss: 0.0,
            kl: None,
            entropy: None,
            low_clipped: 0,
            high_clipped: 0,
            low_min: f64::INFINITY,
            high_max: f64::NEG_INFINITY,
        }
    }
}

impl GrpoStats {
    fn count_clips(
        &mut self,
        ratios: &[f64],
        advantages: &[f32],
        tokens: &[usize],
        settings: &GrpoSettings,
    ) {
        let mut start = 0;
        for &count in tokens.iter().filter(|&&count| count > 0) {
            let row = start..start + count;
            let (mut low, mut high) = (0, 0);
            for (&ratio, &advantage) in ratios[row.clone()].iter().zip(&advantages[row]) {
                low += u64::from(ratio < 1.0 - settings.epsilon && advantage < 0.0);
                high += u64::from(ratio > 1.0 + settings.epsilon_high && advantage > 0.0);
            }
            self.tokens += count as u64;
            self.low_clipped += low;
            self.high_clipped += high;
            self.low_min = self.low_min.min(low as f64 / count as f64);
            self.high_max = self.high_max.max(high as f64 / count as f64);
            start += count;
        }
    }

    /// Adds another batch of the same step.
    pub fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.loss += other.loss;
        self.kl = both(self.kl, other.kl);
        self.entropy = both(self.entropy, other.entropy);
        self.low_clipped += other.low_clipped;
        self.high_clipped += other.high_clipped;
        self.low_min = self.low_min.min(other.low_min);
        self.high_max = self.high_max.max(other.high_max);
    }

    /// Means over tokens under the names of TRL's GRPOTrainer; empty without tokens.
    pub fn metrics(&self) -> Vec<(&'static str, f64)> {
        if self.tokens == 0 {
            return Vec::new();
        }
        let tokens = self.tokens as f64;
        let mut metrics = Vec::new();
        metrics.extend(self.kl.map(|kl| ("kl", kl / tokens)));
        metrics.extend(self.entropy.map(|entropy| ("entropy", entropy / tokens)));
        let (low, high) = (self.low_clipped as f64 / tokens, self.high_clipped as f64 / tokens);
        metrics.extend([
            ("clip_ratio/low_mean", low),
            ("clip_ratio/low_min", self.low_min),
            ("clip_ratio/high_mean", high),
            ("clip_ratio/high_max", self.high_max),
            ("clip_ratio/region_mean", low + high),
        ]);
        metrics
    }
}

/// The clipped surrogate, unweighted.
struct Clipped {
    losses: Tensor, // (T)
    ratio: Tensor,
}

impl Clipped {
    /// `max(-A r, -A clip(r, 1 - low, 1 + high))`.
    fn new(logps: &Tensor, sampled: &Sampled<'_>, low: f64, high: f64) -> Result<Self> {
        let old = column(sampled.old_logps, logps)?;
        let minus = column(sampled.advantages, logps)?.neg()?;
        let ratio = (logps - old)?.exp()?; // (T)
        let limited = ratio.clamp(1.0 - low, 1.0 + high)?;
        let losses = (&minus * &ratio)?.maximum(&(minus * limited)?)?;
        Ok(Self { losses, ratio })
    }
}

/// Values without a gradient, on the device of `like`.
fn column(values: &[f32], like: &Tensor) -> Result<Tensor> {
    Tensor::from_slice(values, values.len(), like.device())
}

fn sum(values: &[f32]) -> f64 {
    values.iter().copied().map(f64::from).sum()
}

fn both(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a + b),
        (a, b) => a.or(b),
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// The variance with Bessel's correction, as in torch; 0 for fewer than two values.
fn variance(values: &[f64]) -> f64 {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    squares / values.len().saturating_sub(1).max(1) as f64
}
