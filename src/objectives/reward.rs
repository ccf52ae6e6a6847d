//! Reward modelling: scores of responses held to what people preferred, pair by pair (Bradley and
//! Terry 1952), and whether the probabilities this implies are the ones observed.

use candle_core::{Device, Result, Tensor};

/// Two responses by their places among the scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WeightedPair {
    /// The preferred one.
    pub better: usize,
    /// The other.
    pub worse: usize,
    /// By how much its score should be the higher one at least (Llama 2, section 3.2.2).
    pub margin: f32,
    /// What the pair counts: [`pair_weight`] of the pairs of its prompt.
    pub weight: f32,
}

/// What each of a prompt's pairs counts: all of them together are one comparison, or the model
/// overfits to prompts with many. `1 / C(K, 2)` for K ranked responses without ties (InstructGPT,
/// equation 1); of those with ties, or with responses left out, only the pairs there are.
pub(crate) fn pair_weight(pairs: usize) -> f32 {
    1.0 / pairs.max(1) as f32
}

/// `Σ weight · (-log σ(r_b - r_w - margin) + c · (r_b + r_w)²)` over the pairs: a scalar,
/// differentiable in `scores (R)` F32.
///
/// The centring term keeps scores around 0, which differences alone leave free (Eisenstein et al.
/// 2023; TRL's `center_rewards_coefficient`). What the sum is divided by is the sum of the weights.
///
/// # Errors
/// If a pair names a score that is not there.
pub(crate) fn pair_losses(
    scores: &Tensor,
    pairs: &[WeightedPair],
    center_rewards_coefficient: f64,
) -> Result<(Tensor, RewardStats)> {
    let column = |values: Vec<f32>| Tensor::from_vec(values, pairs.len(), scores.device());
    let side = |place: fn(&WeightedPair) -> usize| {
        let places: Vec<u32> = pairs.iter().map(|pair| place(pair) as u32).collect();
        scores.index_select(&Tensor::from_vec(places, pairs.len(), scores.device())?, 0)
    };
    let better = side(|pair| pair.better)?; // (P)
    let worse = side(|pair| pair.worse)?;
    let margin = column(pairs.iter().map(|pair| pair.margin).collect())?;
    let weight = column(pairs.iter().map(|pair| pair.weight).collect())?;
    let mut losses = log_sigmoid(&((&better - &worse)? - margin)?)?.neg()?; // (P)
    if center_rewards_coefficient != 0.0 {
        let centre = ((&better + &worse)?.sqr()? * center_rewards_coefficient)?;
        losses = (losses + centre)?;
    }
    let loss = (losses * weight)?.sum_all()?;
    let stats = RewardStats::new(scores, pairs, f64::from(loss.to_scalar::<f32>()?))?;
    Ok((loss, stats))
}

/// `log σ(z)`, without overflow for any z.
///
/// Written in `-z`, where candle's derivatives of relu and abs at 0 are both 1: there the
/// derivative is 1/2 only so, and all scores of a new head are equal.
pub(super) fn log_sigmoid(z: &Tensor) -> Result<Tensor> {
    let minus = z.neg()?;
    let tail = (minus.abs()?.neg()?.exp()? + 1.0)?.log()?; // log(1 + exp(-|z|))
    (minus.relu()? + tail)?.neg()
}

/// Sums over the pairs of a batch; those of several batches add up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RewardStats {
    /// Pairs.
    pub pairs: u64,
    /// Their weights: what the loss is divided by.
    pub weight: f64,
    /// The loss.
    pub loss: f64,
    /// Pairs whose better response has the higher score; equal scores are not correct, as in TRL.
    pub correct: u64,
    /// `r_b - r_w` over the pairs.
    pub margin: f64,
    /// Scores of the batch.
    pub scores: u64,
    /// Their sum.
    pub score_sum: f64,
    /// The lowest.
    pub score_min: f64,
    /// The highest.
    pub score_max: f64,
}

impl Default for RewardStats {
    fn default() -> Self {
        Self {
            pairs: 0,
            weight: 0.0,
            loss: 0.0,
            correct: 0,
            margin: 0.0,
            scores: 0,
            score_sum: 0.0,
            score_min: f64::INFINITY,
            score_max: f64::NEG_INFINITY,
        }
    }
}

impl RewardStats {
    fn new(scores: &Tensor, pairs: &[WeightedPair], loss: f64) -> Result<Self> {
        let scores: Vec<f64> = floats(scores)?;
        let mut stats = Self { loss, scores: scores.len() as u64, ..Self::default() };
        for &score in &scores {
            stats.score_sum += score;
            stats.score_min = stats.score_min.min(score);
            stats.score_max = stats.score_max.max(score);
        }
        for pair in pairs {
            let margin = scores[pair.better] - scores[pair.worse];
            stats.pairs += 1;
            stats.weight += f64::from(pair.weight);
            stats.correct += u64::from(margin > 0.0);
            stats.margin += margin;
        }
        Ok(stats)
    }

    /// Adds another batch.
    pub(crate) fn add(&mut self, other: &Self) {
        self.pairs += other.pairs;
        self.weight += other.weight;
        self.loss += other.loss;
        self.correct += other.correct;
        self.margin += other.margin;
        self.scores += other.scores;
        self.score_sum += other.score_sum;
        self.score_min = self.score_min.min(other.score_min);
        self.score_max = self.score_max.max(other.score_max);
    }

    /// Means under the names of TRL's RewardTrainer; `loss` is per unit of weight.
    pub(crate) fn metrics(&self) -> Vec<(&'static str, f64)> {
        let pairs = self.pairs.max(1) as f64;
        vec![
            ("loss", self.loss / self.weight.max(f64::MIN_POSITIVE)),
            ("accuracy", self.correct as f64 / pairs),
            ("margin", self.margin / pairs),
            ("min_reward", self.score_min),
            ("mean_reward", self.score_sum / self.scores.max(1) as f64),
            ("max_reward", self.score_max),
        ]
    }
}

/// The values of `(N)` F32 in f64.
pub(super) fn floats(values: &Tensor) -> Result<Vec<f64>> {
    let values = values.to_device(&Device::Cpu)?.to_vec1::<f32>()?;
    Ok(values.into_iter().map(f64::from).collect())
}

/// Bins of a [`Calibration`].
const BINS: usize = 10;

/// Expected against observed preference over held-out pairs.
///
/// Pairs come ordered, the better one first, so a predicted `σ(r_b - r_w)` would be held to an
/// outcome that is always 1. What is asked instead does not depend on the order: how sure the
/// model is of the side it prefers, `p = σ(|r_b - r_w|)` in [0.5, 1], and how often people
/// preferred that side too. Equal scores are right half the time.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Calibration {
    /// By the probability, equally wide from 0.5 to 1.
    pub bins: [CalibrationBin; BINS],
    squared_error: f64,
}

/// The pairs of one bin.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CalibrationBin {
    /// Pairs in it.
    pub pairs: u64,
    /// The sum of their probabilities.
    pub expected: f64,
    /// How many the model is right about.
    pub observed: f64,
}

impl Calibration {
    /// Counts a pair by its `r_b - r_w`.
    pub(crate) fn add(&mut self, margin: f64) {
        let probability = 1.0 / (1.0 + (-margin.abs()).exp());
        let bin = ((probability - 0.5) * 2.0 * BINS as f64) as usize;
        let bin = &mut self.bins[bin.min(BINS - 1)];
        bin.pairs += 1;
        bin.expected += probability;
        bin.observed += match margin {
            _ if margin > 0.0 => 1.0,
            _ if margin < 0.0 => 0.0,
            _ => 0.5,
        };
        let error = if margin > 0.0 { 1.0 - probability } else { probability };
        self.squared_error += error * error;
    }

    /// Pairs counted.
    pub(crate) fn pairs(&self) -> u64 {
        self.bins.iter().map(|bin| bin.pairs).sum()
    }

    /// The mean distance of expected and observed frequency, over pairs (Naeini et al. 2015).
    pub(crate) fn expected_calibration_error(&self) -> f64 {
        let distance = |bin: &CalibrationBin| (bin.expected - bin.observed).abs();
        self.bins.iter().map(distance).sum::<f64>() / self.pairs().max(1) as f64
    }

    /// The mean squared error of the probabilities (Brier 1950): 0.25 for a model that knows
    /// nothing and says so.
    pub(crate) fn brier(&self) -> f64 {
        self.squared_error / self.pairs().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    #[test]
    fn log_sigmoid_neither_overflows_nor_loses_its_gradient() {
        // z, log σ(z), its derivative σ(-z).
        let cases = [
            (-1000.0, -1000.0, 1.0),
            (-100.0, -100.0, 1.0),
            (-1.0, -1.313_261_7, 0.731_058_6),
            (0.0, -std::f32::consts::LN_2, 0.5),
            (1.0, -0.313_261_7, 0.268_941_4),
            (100.0, 0.0, 0.0),
            (1000.0, 0.0, 0.0),
        ];
        for (z, value, slope) in cases {
            let z = Var::new(&[z as f32], &Device::Cpu).unwrap();
            let found = log_sigmoid(&z).unwrap();
            let gradient = found.backward().unwrap();
            let gradient = gradient.get(&z).unwrap().to_vec1::<f32>().unwrap()[0];
            let found = found.to_vec1::<f32>().unwrap()[0];
            assert!((found - value).abs() < 1e-6, "{z}: {found}");
            assert!((gradient - slope).abs() < 1e-6, "{z}: slope {gradient}");
        }
    }

    #[test]
    fn calibration_is_that_of_the_side_the_model_prefers() {
        let mut honest = Calibration::default();
        for (margin, times) in [(3.0f64.ln(), 3), (-(3.0f64.ln()), 1), (0.0, 4)] {
            (0..times).for_each(|_| honest.add(margin)); // 3 to 1 is a probability of 0.75
        }
        assert_eq!(honest.pairs(), 8);
        assert!(honest.expected_calibration_error() < 1e-12, "{honest:?}");
        // Four pairs of p = 0.75, one of them wrong; four that are coin-flips.
        let brier = (3.0 * 0.0625 + 0.5625 + 4.0 * 0.25) / 8.0;
        assert!((honest.brier() - brier).abs() < 1e-12);

        let mut boasting = Calibration::default();
        [50.0, -50.0].into_iter().for_each(|margin| boasting.add(margin));
        assert_eq!(boasting.expected_calibration_error(), 0.5);
        assert_eq!(boasting.brier(), 0.5);
    }
}
