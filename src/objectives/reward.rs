//! Reward modelling: the pairwise loss of response scores (Bradley and Terry 1952), and the calibration of the
//! probabilities they imply.

use candle_core::{Device, Result, Tensor};

/// A pair of responses, as indices into the scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WeightedPair {
    /// The preferred one.
    pub better: usize,
    /// The other.
    pub worse: usize,
    /// Minimum margin between the scores (Llama 2, section 3.2.2).
    pub margin: f32,
    /// Weight of the pair in the loss: [`pair_weight`] of the pairs of its prompt.
    pub weight: f32,
}

/// The weight of each of a prompt's pairs: all pairs of a prompt together count as one comparison, because
/// the model would overfit to prompts with many. It is `1 / C(K, 2)` for K ranked responses without ties
/// (InstructGPT, equation 1); with ties or dropped responses only the remaining pairs count.
pub fn pair_weight(pairs: usize) -> f32 {
    1.0 / pairs.max(1) as f32
}

/// `Σ weight · (-log σ(r_b - r_w - margin) + c · (r_b + r_w)²)` over the pairs: a scalar,
/// differentiable in `scores (R)` F32.
///
/// The centering term keeps scores around 0, which differences do not determine (Eisenstein et al.
/// 2023; TRL's `center_rewards_coefficient`). The caller divides by the sum of the weights.
///
/// # Errors
/// If an index of a pair is out of range.
pub fn pair_losses(
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
/// Computed from `-z`, because candle's derivatives of relu and abs at 0 are both 1: only this form has the
/// derivative 1/2 at 0, where all scores of a new head are.
pub(super) fn log_sigmoid(z: &Tensor) -> Result<Tensor> {
    let minus = z.neg()?;
    let tail = (minus.abs()?.neg()?.exp()? + 1.0)?.log()?; // log(1 + exp(-|z|))
    (minus.relu()? + tail)?.neg()
}

/// Sums over the pairs of a batch; those of several batches can be added.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RewardStats {
    /// Pairs.
    pub pairs: u64,
    /// Sum of their weights, the divisor of the loss.
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
    pub fn add(&mut self, other: &Self) {
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
    pub fn metrics(&self) -> Vec<(&'static str, f64)> {
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

/// Calibration over held-out pairs: predicted and observed preference.
///
/// Pairs are ordered, the better response first, so that the outcome for `σ(r_b - r_w)` would always be 1. The
/// statistics therefore do not depend on the order: the confidence of the model in the response it prefers,
/// `p = σ(|r_b - r_w|)` in [0.5, 1], and its accuracy. Equal scores count as half correct.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Calibration {
    /// Bins by probability, equally wide from 0.5 to 1.
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
    /// Number of pairs the model ranks correctly.
    pub observed: f64,
}

impl Calibration {
    /// Adds a pair with the margin `r_b - r_w`.
    pub fn add(&mut self, margin: f64) {
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

    /// Number of pairs.
    pub fn pairs(&self) -> u64 {
        self.bins.iter().map(|bin| bin.pairs).sum()
    }

    /// The expected calibration error (Naeini et al. 2015).
    pub fn expected_calibration_error(&self) -> f64 {
        let distance = |bin: &CalibrationBin| (bin.expected - bin.observed).abs();
        self.bins.iter().map(distance).sum::<f64>() / self.pairs().max(1) as f64
    }

    /// The Brier score, the mean squared error of the probabilities (Brier 1950): 0.25 for a model that always
    /// predicts 0.5.
    pub fn brier(&self) -> f64 {
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
    fn calibration_is_of_the_preferred_response() {
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
