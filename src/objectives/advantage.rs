//! From rewards to advantages: the computations of reinforcement learning that have no gradient. They work on
//! slices, one row or one step at a time, in f64 internally.

use serde::{Deserialize, Serialize};

use crate::string_enum::string_enum;

string_enum! {
    /// Estimator of the KL divergence of policy and reference at a sampled token (Schulman 2020,
    /// "Approximating KL divergence").
    #[derive(Debug)]
    pub enum KlEstimator {
        /// `log π - log π_ref`: unbiased, of either sign.
        K1 = "k1",
        /// `r - 1 - log r` with `r = π_ref / π`: unbiased, never negative, of lower variance.
        K3 = "k3",
    }
}

impl KlEstimator {
    /// The estimate at each of T tokens sampled from the policy.
    pub fn per_token(self, logps: &[f32], ref_logps: &[f32]) -> Vec<f32> {
        let estimate = match self {
            Self::K1 => kl_k1,
            Self::K3 => kl_k3,
        };
        logps.iter().zip(ref_logps).map(|(&logp, &reference)| estimate(logp, reference)).collect()
    }
}

/// `log π - log π_ref` at one token.
pub fn kl_k1(logp: f32, ref_logp: f32) -> f32 {
    logp - ref_logp
}

/// `r - 1 - log r` with `r = π_ref / π` at one token.
pub fn kl_k3(logp: f32, ref_logp: f32) -> f32 {
    let log_ratio = f64::from(ref_logp) - f64::from(logp);
    (log_ratio.exp_m1() - log_ratio) as f32
}

/// The reward at each of a row's S states: `-kl_coef · kl` at its T tokens, plus the response's score
/// at the last state.
///
/// S is T, or T + 1: TRL's PPO adds the state after the last token if a response ended before
/// `response_length`, and puts the score there. The rewards, values and returns of the row then have one entry
/// more than the advantages that are used.
///
/// # Panics
/// If there are fewer states than tokens.
pub fn token_rewards(kl: &[f32], score: f32, kl_coef: f64, states: usize) -> Vec<f32> {
    assert!(states >= kl.len() && states > 0, "{states} states for {} tokens", kl.len());
    let mut rewards = vec![0.0; states];
    for (reward, &kl) in rewards.iter_mut().zip(kl) {
        *reward = (-kl_coef * f64::from(kl)) as f32;
    }
    rewards[states - 1] += score;
    rewards
}

/// Generalized advantage estimation (Schulman et al. 2016, equation 16) over the S states of one
/// row, which is a complete episode: advantages and returns.
///
/// `A_t = δ_t + γ λ A_{t+1}` with `δ_t = r_t + γ V_{t+1} - V_t`; the return is `A_t + V_t`.
pub fn gae(rewards: &[f32], values: &[f32], gamma: f64, lam: f64) -> (Vec<f32>, Vec<f32>) {
    let (mut advantages, mut returns) = (vec![0.0; values.len()], vec![0.0; values.len()]);
    let (mut next_value, mut next_advantage) = (0.0, 0.0);
    for t in (0..values.len()).rev() {
        let value = f64::from(values[t]);
        let delta = f64::from(rewards[t]) + gamma * next_value - value;
        let advantage = delta + gamma * lam * next_advantage;
        advantages[t] = advantage as f32;
        returns[t] = (advantage + value) as f32;
        (next_value, next_advantage) = (value, advantage);
    }
    (advantages, returns)
}

/// Whitens values to variance 1 and, if `shift_mean`, mean 0, over all unmasked tokens of all rows together, as
/// TRL's `masked_whiten` (variance with Bessel's correction, plus 1e-8).
///
/// The variance of a single value is 0 here, and NaN in TRL.
pub fn whiten(values: &mut [f32], shift_mean: bool) {
    let mut moments = RunningMoments::default();
    moments.extend(values);
    let scale = 1.0 / (moments.variance() + 1e-8).sqrt();
    let mean = moments.mean;
    for value in values {
        let centred = (f64::from(*value) - mean) * scale;
        *value = if shift_mean { centred } else { centred + mean } as f32;
    }
}

/// Running mean and variance (Chan et al. 1979), for normalizing rewards over a run. Saved with the run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct RunningMoments {
    /// Number of values.
    pub count: u64,
    /// Their mean.
    pub mean: f64,
    /// The sum of their squared deviations from the mean.
    pub squares: f64,
}

impl RunningMoments {
    /// Adds values.
    pub fn extend(&mut self, values: &[f32]) {
        let Some(more) = Self::of(values) else { return };
        let (old, new) = (self.count as f64, more.count as f64);
        let shift = more.mean - self.mean;
        self.mean += shift * new / (old + new);
        self.squares += more.squares + shift * shift * old * new / (old + new);
        self.count += more.count;
    }

    fn of(values: &[f32]) -> Option<Self> {
        let count = values.len() as u64;
        let mean = values.iter().copied().map(f64::from).sum::<f64>() / count as f64;
        let squares = values.iter().map(|&value| (f64::from(value) - mean).powi(2)).sum();
        (count > 0).then_some(Self { count, mean, squares })
    }

    /// The variance with Bessel's correction; 0 for fewer than two values.
    pub fn variance(&self) -> f64 {
        self.squares / self.count.saturating_sub(1).max(1) as f64
    }

    /// The standard deviation.
    pub fn std(&self) -> f64 {
        self.variance().sqrt()
    }

    /// `value` divided by the standard deviation, after subtracting the mean if `shift_mean`. With fewer
    /// than two values it is not scaled.
    pub fn normalize(&self, value: f32, shift_mean: bool) -> f32 {
        let scale = if self.count < 2 { 1.0 } else { self.std() + f64::from(f32::EPSILON) };
        let mean = if shift_mean { self.mean } else { 0.0 };
        ((f64::from(value) - mean) / scale) as f32
    }
}

/// An adaptive KL coefficient (Ziegler et al. 2019, section 2.2; TRL's `AdaptiveKLController`). Saved with the
/// run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdaptiveKl {
    /// The current coefficient.
    pub kl_coef: f64,
    /// Target KL of a response, in nats (TRL's default 6).
    pub target: f64,
    /// Horizon in episodes (TRL's default 10000).
    pub horizon: f64,
}

impl AdaptiveKl {
    /// Updates the coefficient with the mean KL of `episodes` responses:
    /// `kl_coef · (1 + clip(kl/target - 1, ±0.2) · episodes/horizon)`.
    pub fn update(&mut self, kl: f64, episodes: usize) {
        let error = (kl / self.target - 1.0).clamp(-0.2, 0.2);
        self.kl_coef *= 1.0 + error * episodes as f64 / self.horizon;
    }
}

string_enum! {
    /// Divisor of a group's rewards, plus 1e-4 (TRL's `scale_rewards`).
    #[derive(Debug)]
    pub enum ScaleRewards {
        /// The standard deviation of the group (GRPO: Shao et al. 2024).
        Group = "group",
        /// The standard deviation of all rewards of the step (Liu et al. 2025, "Tricks or traps").
        Batch = "batch",
        /// No scaling, because it favours questions that are too easy or too hard (Dr. GRPO: Liu et al.
        /// 2025).
        None = "none",
    }
}

/// Advantages of responses sampled in groups, and the reward metrics that TRL logs.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupAdvantages {
    /// One advantage per response.
    pub advantages: Vec<f32>,
    /// `reward`: the mean reward.
    pub reward: f64,
    /// `reward_std`: standard deviation over all responses; NaN for a single one.
    pub reward_std: f64,
    /// `frac_reward_zero_std`: fraction of responses in groups with equal rewards.
    pub frac_reward_zero_std: f64,
}

/// Each reward minus the mean of its group (GRPO). `rewards` are ordered by group, with `generations`
/// in each. A NaN means no reward: it gets advantage 0 and is left out of the mean.
///
/// # Panics
/// If the number of rewards is not a multiple of the group size.
pub fn group_advantages(
    rewards: &[f32],
    generations: usize,
    scale: ScaleRewards,
) -> GroupAdvantages {
    let all = Spread::of(rewards);
    let mut found = vec![0.0; rewards.len()];
    let mut flat = 0;
    for (group, advantages) in groups(rewards, generations, &mut found) {
        let spread = Spread::of(group);
        let std = match scale {
            ScaleRewards::Group | ScaleRewards::None => spread.std(generations),
            ScaleRewards::Batch => all.std(rewards.len()),
        };
        for (advantage, &reward) in advantages.iter_mut().zip(group) {
            let centred = f64::from(reward) - spread.mean;
            *advantage = number(match scale {
                ScaleRewards::Group | ScaleRewards::Batch => centred / (std + 1e-4),
                ScaleRewards::None => centred,
            });
        }
        flat += usize::from(std.abs() <= FLAT);
    }
    GroupAdvantages::new(rewards, found, flat * generations)
}

/// Each reward minus the mean of the *other* rewards of its group (RLOO: Ahmadian et al. 2024).
/// Otherwise as [`group_advantages`].
///
/// # Panics
/// If the number of rewards is not a multiple of the group size.
pub fn rloo_advantages(rewards: &[f32], generations: usize) -> GroupAdvantages {
    let mut found = vec![0.0; rewards.len()];
    let mut flat = 0;
    for (group, advantages) in groups(rewards, generations, &mut found) {
        let spread = Spread::of(group);
        for (advantage, &reward) in advantages.iter_mut().zip(group) {
            let reward = f64::from(reward);
            let others = spread.count as f64 - 1.0;
            let baseline = (spread.mean * spread.count as f64 - reward) / others;
            *advantage = if generations > 1 { number(reward - baseline) } else { 0.0 };
        }
        flat += usize::from(spread.std(generations).abs() <= FLAT);
    }
    GroupAdvantages::new(rewards, found, flat * generations)
}

/// Standard deviations up to this count as 0 (torch's `isclose`).
const FLAT: f64 = 1e-8;

/// The groups, each with its slice of `out`.
fn groups<'a>(
    rewards: &'a [f32],
    generations: usize,
    out: &'a mut [f32],
) -> impl Iterator<Item = (&'a [f32], &'a mut [f32])> {
    let count = rewards.len();
    let whole = generations > 0 && count.is_multiple_of(generations);
    assert!(whole, "{count} rewards in groups of {generations}");
    rewards.chunks(generations).zip(out.chunks_mut(generations))
}

/// NaN, which means no reward, becomes advantage 0.
fn number(advantage: f64) -> f32 {
    if advantage.is_nan() { 0.0 } else { advantage as f32 }
}

impl GroupAdvantages {
    fn new(rewards: &[f32], advantages: Vec<f32>, without_spread: usize) -> Self {
        let all = Spread::of(rewards);
        Self {
            advantages,
            reward: all.mean,
            reward_std: all.std(usize::MAX),
            frac_reward_zero_std: without_spread as f64 / rewards.len() as f64,
        }
    }
}

/// Mean and variance of the rewards that are not NaN.
struct Spread {
    count: u64,
    mean: f64,
    squares: f64,
}

impl Spread {
    fn of(rewards: &[f32]) -> Self {
        let rewards = || rewards.iter().filter(|r| !r.is_nan()).map(|&r| f64::from(r));
        let count = rewards().count() as u64;
        let mean = rewards().sum::<f64>() / count as f64;
        let squares = rewards().map(|reward| (reward - mean).powi(2)).sum();
        Self { count, mean, squares }
    }

    /// The standard deviation with Bessel's correction, as in torch: NaN for one valid reward among several
    /// responses, but 0 if there is only one response (as in TRL).
    fn std(&self, responses: usize) -> f64 {
        match (responses, self.count) {
            (1, _) => 0.0,
            (_, 0 | 1) => f64::NAN,
            (_, count) => (self.squares / (count - 1) as f64).sqrt(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_moments_are_those_of_all_values() {
        let values: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin() * 3.0 + 100.0).collect();
        let whole = RunningMoments::of(&values).unwrap();
        for size in [1, 7, 50, 100] {
            let mut parts = RunningMoments::default();
            values.chunks(size).for_each(|chunk| parts.extend(chunk));
            parts.extend(&[]);
            assert_eq!(parts.count, 100);
            assert!((parts.mean - whole.mean).abs() < 1e-12, "{parts:?}");
            assert!((parts.squares - whole.squares).abs() < 1e-9, "{parts:?}");
        }
        let saved = serde_json::to_string(&whole).unwrap();
        assert_eq!(serde_json::from_str::<RunningMoments>(&saved).unwrap(), whole);
        let mut one = RunningMoments::default();
        assert_eq!(one.normalize(3.0, true), 3.0);
        one.extend(&[2.0]);
        assert_eq!(one.normalize(3.0, true), 1.0);
    }

    #[test]
    fn whitening_no_or_one_value_is_finite() {
        whiten(&mut [], true);
        let mut one = [5.0];
        whiten(&mut one, true);
        assert_eq!(one, [0.0]);
        whiten(&mut one, false);
        assert_eq!(one, [0.0]);
    }

    #[test]
    fn the_coefficient_follows_its_target() {
        // KL, episodes, the coefficient after: at most a fifth of episodes/horizon at a time.
        for (kl, episodes, expected) in
            [(6.0, 100, 0.2), (60.0, 100, 0.2004), (0.0, 100, 0.1996), (6.6, 10_000, 0.22)]
        {
            let mut adaptive = AdaptiveKl { kl_coef: 0.2, target: 6.0, horizon: 10_000.0 };
            adaptive.update(kl, episodes);
            assert!((adaptive.kl_coef - expected).abs() < 1e-12, "{kl}: {adaptive:?}");
        }
    }

    #[test]
    fn the_score_is_at_the_last_state() {
        assert_eq!(token_rewards(&[1.0, -2.0], 3.0, 0.5, 2), [-0.5, 4.0]);
        assert_eq!(token_rewards(&[1.0, -2.0], 3.0, 0.5, 3), [-0.5, 1.0, 3.0]);
    }
}
