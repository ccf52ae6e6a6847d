//! Sampling: from logits to a token. Filters have the meaning and order of transformers' logits processors.

use quantune_adapters::rng::Stream;

use crate::isa::{Isa, multiversion};
use crate::ops::exp;

/// Sampling settings. The default samples from the model's own distribution.
///
/// ```
/// use quantune::generate::Sampling;
///
/// let greedy = Sampling::greedy();
/// assert_eq!(greedy.temperature, 0.0);
/// let nucleus = Sampling { temperature: 0.8, top_p: 0.95, seed: 42, ..Sampling::default() };
/// assert_eq!(nucleus.top_k, 0); // not limited
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Temperature, which logits are divided by; 0 is greedy decoding.
    pub temperature: f64,
    /// Top-k: keep only the k most likely tokens; 0 disables it.
    pub top_k: usize,
    /// Top-p (nucleus sampling): keep the smallest set of most likely tokens whose probabilities sum to at
    /// least this (Holtzman et al. 2019); 1 disables it.
    pub top_p: f64,
    /// Min-p: keep tokens whose probability is at least this fraction of that of the most likely token
    /// (Nguyen et al. 2024); 0 disables it.
    pub min_p: f64,
    /// Repetition penalty: positive logits of tokens in the prompt or the response so far are divided by it,
    /// negative ones multiplied (Keskar et al. 2019); 1 disables it.
    pub repetition_penalty: f64,
    /// Seed of the random numbers, which are also keyed by the row's key and the position in the row.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

/// Why no token can be sampled.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SamplingError {
    /// A setting outside its range.
    #[error("{name} is {found}, needed {needed}")]
    Setting {
        /// Name of the setting.
        name: &'static str,
        /// Its value.
        found: f64,
        /// Its valid range.
        needed: &'static str,
    },
    /// A logit is NaN or infinite.
    #[error("the logit of token {token} is {found}: the model computes NaN or Inf")]
    Logit {
        /// The first token with such a logit.
        token: usize,
        /// NaN or infinity.
        found: f32,
    },
    /// No token can be chosen.
    #[error("no token has a logit above minus infinity")]
    Empty,
}

impl Sampling {
    /// Greedy decoding: always the most likely token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Checks that all settings are in their valid ranges.
    pub fn check(&self) -> Result<(), SamplingError> {
        let Self { temperature, top_p, min_p, repetition_penalty, .. } = *self;
        let checks = [
            ("temperature", temperature, (0.0..f64::INFINITY).contains(&temperature), "0 or more"),
            ("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "more than 0 and at most 1"),
            ("min_p", min_p, (0.0..=1.0).contains(&min_p), "0 to 1"),
            (
                "repetition_penalty",
                repetition_penalty,
                repetition_penalty > 0.0 && repetition_penalty < f64::INFINITY,
                "more than 0",
            ),
        ];
        match checks.into_iter().find(|(_, _, good, _)| !good) {
            Some((name, found, _, needed)) => Err(SamplingError::Setting { name, found, needed }),
            None => Ok(()),
        }
    }

    /// The tokens left after all filters, with their probabilities, which sum to 1.
    ///
    /// `seen` are the tokens of prompt and response so far. Of equally likely tokens at the edge of top-k or
    /// top-p, those with lower ids are kept (transformers keeps all of them in top-k).
    pub fn distribution(
        &self,
        logits: &[f32],
        seen: &[u32],
    ) -> Result<Vec<(u32, f64)>, SamplingError> {
        self.check()?;
        check_logits(logits)?;
        let mut scores: Vec<(u32, f64)> =
            logits.iter().enumerate().map(|(id, &logit)| (id as u32, f64::from(logit))).collect();
        if self.repetition_penalty != 1.0 {
            for &token in seen {
                if let Some(&logit) = logits.get(token as usize) {
                    let logit = f64::from(logit);
                    scores[token as usize].1 = match logit > 0.0 {
                        true => logit / self.repetition_penalty,
                        false => logit * self.repetition_penalty,
                    };
                }
            }
        }
        let best = *scores.iter().min_by(|a, b| by_rank(a, b)).ok_or(SamplingError::Empty)?;
        if best.1 == f64::NEG_INFINITY {
            return Err(SamplingError::Empty);
        }
        if self.temperature == 0.0 {
            return Ok(vec![(best.0, 1.0)]);
        }

        if (1..scores.len()).contains(&self.top_k) {
            scores.select_nth_unstable_by(self.top_k - 1, by_rank);
            scores.truncate(self.top_k);
        }
        // Sorted whenever the unspecified order after top-k could affect the draw.
        if self.top_k > 0 || self.top_p < 1.0 {
            scores.sort_unstable_by(by_rank);
        }
        // The most likely token gets weight 1, so no temperature overflows.
        for (_, score) in &mut scores {
            *score = ((*score - best.1) / self.temperature).exp();
        }
        let mut weights = scores;
        if self.top_p < 1.0 {
            let enough = self.top_p * sum(&weights);
            let mut before = 0.0;
            let stay = weights.iter().take_while(|(_, weight)| {
                let stays = before < enough;
                before += weight;
                stays
            });
            let stay = stay.count();
            weights.truncate(stay);
        }
        weights.retain(|&(_, weight)| weight > 0.0 && weight >= self.min_p);
        let total = sum(&weights);
        for (_, weight) in &mut weights {
            *weight /= total;
        }
        Ok(weights)
    }

    /// Samples a token for the row and position of `place`: the row's key, and the position counted from the
    /// start of its prompt. The token is drawn from [`Self::distribution`]; without filters, from an
    /// approximation of it that is accurate to 1e-6.
    pub fn choose(
        &self,
        logits: &[f32],
        seen: &[u32],
        place: (u64, u64),
    ) -> Result<u32, SamplingError> {
        Ok(self.draw(logits, seen, place)?.0)
    }

    /// Samples a token like [`Self::choose`], and returns its probability too.
    pub fn draw(
        &self,
        logits: &[f32],
        seen: &[u32],
        (key, position): (u64, u64),
    ) -> Result<(u32, f64), SamplingError> {
        let draw = || Stream::new(self.seed, "sample", &[key, position]).uniform_f64();
        // At temperatures close to 0, exponents in `f32` are too imprecise.
        if !self.filters() && (1e-2..1e6).contains(&self.temperature) {
            self.check()?;
            return draw_from_all(Isa::current(), logits, self.temperature, draw());
        }
        let choices = self.distribution(logits, seen)?;
        let draw = draw();
        let mut before = 0.0;
        let choice = choices.iter().find(|(_, probability)| {
            before += probability;
            draw < before
        });
        // Due to rounding, the sum may be slightly less than the draw.
        choice.or(choices.last()).copied().ok_or(SamplingError::Empty)
    }

    /// Whether any filter or penalty changes the model's distribution at this temperature.
    pub fn filters(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0 || self.repetition_penalty != 1.0
    }
}

/// Number of tokens per block; weights are summed block by block.
const BLOCK: usize = 256;
/// Number of partial sums per block, for vectorization.
const SUM_LANES: usize = 16;

/// Samples from the softmax of `logits / temperature` with `draw` from [0, 1), without materializing the
/// distribution: first the block in which the draw falls, then the token in that block. Returns the token
/// and its probability.
fn draw_from_all(
    isa: Isa,
    logits: &[f32],
    temperature: f64,
    draw: f64,
) -> Result<(u32, f64), SamplingError> {
    let (max, sound) = largest(isa, logits);
    if !sound {
        check_logits(logits)?;
    }
    if max == f32::NEG_INFINITY {
        return Err(SamplingError::Empty);
    }
    let inverse = (1.0 / temperature) as f32;
    let mut sums = vec![0f64; logits.len().div_ceil(BLOCK)];
    block_sums(isa, logits, max, inverse, &mut sums);
    let total: f64 = sums.iter().sum();
    let target = draw * total;

    let mut before = 0.0;
    let mut found = 0;
    for (block, sum) in sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
        // Due to rounding, the total may be slightly less than the target; then the last block is taken.
        found = block;
        if before + sum > target {
            break;
        }
        before += sum;
    }
    let start = found * BLOCK;
    let mut choice = (start, 0.0);
    for (token, logit) in (start..).zip(&logits[start..(start + BLOCK).min(logits.len())]) {
        let weight = f64::from(exp((logit - max) * inverse));
        if weight > 0.0 {
            choice = (token, weight);
            before += weight;
            if before > target {
                break;
            }
        }
    }
    Ok((choice.0 as u32, choice.1 / total))
}

multiversion! {
    /// The largest logit, and whether no logit is NaN or infinity.
    fn largest(isa; logits: &[f32]) -> (f32, bool) {
        let mut max = [f32::NEG_INFINITY; SUM_LANES];
        let mut sound = [true; SUM_LANES];
        for part in logits.chunks(SUM_LANES) {
            for ((max, sound), x) in max.iter_mut().zip(&mut sound).zip(part) {
                *sound &= *x < f32::INFINITY;
                *max = if *x > *max { *x } else { *max };
            }
        }
        (max.into_iter().fold(f32::NEG_INFINITY, f32::max), sound.iter().all(|sound| *sound))
    }

    /// The sum of `exp((logit - max) · inverse)` of each block.
    fn block_sums(isa; logits: &[f32], max: f32, inverse: f32, sums: &mut [f64]) {
        for (block, total) in logits.chunks(BLOCK).zip(sums) {
            let mut sums = [0f32; SUM_LANES];
            for part in block.chunks(SUM_LANES) {
                for (sum, x) in sums.iter_mut().zip(part) {
                    *sum += exp((x - max) * inverse);
                }
            }
            *total = sums.iter().map(|&sum| f64::from(sum)).sum();
        }
    }
}

/// Natural log-probabilities of the model's own distribution, without temperature and filters.
#[derive(Debug, Clone, Copy)]
pub struct LogProbs<'a> {
    logits: &'a [f32],
    log_sum_exp: f64,
}

impl<'a> LogProbs<'a> {
    /// Normalizes `logits`, one per token of the vocabulary.
    pub fn new(logits: &'a [f32]) -> Result<Self, SamplingError> {
        check_logits(logits)?;
        let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        if max == f64::NEG_INFINITY {
            return Err(SamplingError::Empty);
        }
        let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
        Ok(Self { logits, log_sum_exp: max + sum.ln() })
    }

    /// The log-probability of a token, with logits divided by `temperature`.
    pub fn at_temperature(
        logits: &[f32],
        token: u32,
        temperature: f64,
    ) -> Result<f32, SamplingError> {
        let at_temperature: Vec<f32> =
            logits.iter().map(|l| (f64::from(*l) / temperature) as f32).collect();
        Ok(LogProbs::new(&at_temperature)?.of(token))
    }

    /// The log-probability of a token.
    pub fn of(&self, token: u32) -> f32 {
        (f64::from(self.logits[token as usize]) - self.log_sum_exp) as f32
    }

    /// The `k` most likely tokens and their log-probabilities, most likely first; ties are ordered by id.
    pub fn top_k(&self, k: usize) -> Vec<(u32, f32)> {
        if k == 0 {
            return Vec::new();
        }
        let ids = (0..).zip(self.logits);
        let mut scores: Vec<(u32, f64)> = ids.map(|(id, &logit)| (id, f64::from(logit))).collect();
        if (1..scores.len()).contains(&k) {
            scores.select_nth_unstable_by(k - 1, by_rank);
        }
        scores.truncate(k);
        scores.sort_unstable_by(by_rank);
        scores.into_iter().map(|(id, _)| (id, self.of(id))).collect()
    }
}

/// The `k` most likely tokens and their natural log-probabilities under the model's own distribution.
pub fn log_probs_top_k(logits: &[f32], k: usize) -> Result<Vec<(u32, f32)>, SamplingError> {
    Ok(LogProbs::new(logits)?.top_k(k))
}

/// Orders by score, highest first; ties by id. Scores are never NaN.
fn by_rank(a: &(u32, f64), b: &(u32, f64)) -> std::cmp::Ordering {
    b.1.partial_cmp(&a.1).expect("scores are numbers").then(a.0.cmp(&b.0))
}

fn sum(weights: &[(u32, f64)]) -> f64 {
    weights.iter().map(|(_, weight)| weight).sum()
}

/// Fails on NaN and positive infinity. Minus infinity is valid: the token is excluded.
fn check_logits(logits: &[f32]) -> Result<(), SamplingError> {
    match logits.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY) {
        Some(token) => Err(SamplingError::Logit { token, found: logits[token] }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 8] = [0.5, 2.0, -1.0, 2.0, 1.5, f32::NEG_INFINITY, 0.0, -3.0];

    fn survivors(sampling: &Sampling) -> Vec<u32> {
        let choices = sampling.distribution(&LOGITS, &[]).unwrap();
        let total: f64 = choices.iter().map(|(_, p)| p).sum();
        assert!((total - 1.0).abs() < 1e-12, "{total}");
        let mut ids: Vec<u32> = choices.into_iter().map(|(id, _)| id).collect();
        ids.sort_unstable();
        ids
    }

    #[test]
    fn ties_go_to_the_lower_id() {
        assert_eq!(survivors(&Sampling::greedy()), [1]);
        let all = Sampling::default();
        assert_eq!(survivors(&all), [0, 1, 2, 3, 4, 6, 7]);
        assert_eq!(survivors(&Sampling { top_k: 1, ..all.clone() }), [1]);
        assert_eq!(survivors(&Sampling { top_k: 3, ..all.clone() }), [1, 3, 4]);
        assert_eq!(survivors(&Sampling { top_k: 100, ..all.clone() }), [0, 1, 2, 3, 4, 6, 7]);
        assert_eq!(survivors(&Sampling { top_p: 1e-9, ..all.clone() }), [1]);
        assert_eq!(survivors(&Sampling { min_p: 1.0, ..all.clone() }), [1, 3]);
        assert_eq!(survivors(&Sampling { temperature: 1e-300, ..all }), [1, 3]);
        let ids: Vec<u32> = log_probs_top_k(&LOGITS, 4).unwrap().iter().map(|l| l.0).collect();
        assert_eq!(ids, [1, 3, 4, 0]);
        assert_eq!(log_probs_top_k(&LOGITS, 0).unwrap(), []);
        assert_eq!(log_probs_top_k(&LOGITS, 100).unwrap().len(), 8);
    }

    #[test]
    fn repetition_penalty_applies_once_per_token_and_to_greedy() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::greedy() };
        assert_eq!(sampling.choose(&LOGITS, &[1, 1, 3, 3, 99], (0, 0)), Ok(4));
        let sampling = Sampling { temperature: 1.0, ..sampling };
        let weights = sampling.distribution(&LOGITS, &[1, 1, 2]).unwrap();
        let of = |id| weights.iter().find(|(other, _)| *other == id).unwrap().1.ln();
        assert!((of(1) - of(6) - 1.0).abs() < 1e-12);
        assert!((of(2) - of(6) + 2.0).abs() < 1e-12);
    }

    #[test]
    fn log_probs_keep_their_digits() {
        let logits = [1000.0f32, 999.0, -1000.0];
        let ours = LogProbs::new(&logits).unwrap();
        let log_z = 1f64.exp().recip().ln_1p();
        assert!((f64::from(ours.of(0)) + log_z).abs() < 1e-7);
        assert_eq!(ours.of(2), -2000.3132);
    }

    #[test]
    fn frequencies_are_the_probabilities() {
        let sampling = Sampling { temperature: 0.8, top_p: 0.97, seed: 11, ..Sampling::default() };
        let expected = sampling.distribution(&LOGITS, &[]).unwrap();
        let draws = 20_000;
        let mut counts = [0f64; LOGITS.len()];
        for position in 0..draws {
            counts[sampling.choose(&LOGITS, &[], (3, position)).unwrap() as usize] += 1.0;
        }
        let chi_square: f64 = expected
            .iter()
            .map(|&(id, p)| {
                let mean = p * draws as f64;
                (counts[id as usize] - mean).powi(2) / mean
            })
            .sum();
        let inside: f64 = expected.iter().map(|&(id, _)| counts[id as usize]).sum();
        assert_eq!(inside, draws as f64, "a filtered token was drawn");
        assert_eq!(expected.len(), 5);
        // The 99.9 % point of chi-square with 4 degrees of freedom.
        assert!(chi_square < 18.47, "{chi_square}");
    }

    /// Sampling without the list against the listed distribution: the same token, unless the draw is within
    /// rounding of the border of two tokens.
    #[test]
    fn sampling_by_blocks_matches_the_listed_distribution() {
        let mut stream = Stream::new(4, "logits", &[]);
        let mut logits: Vec<f32> = (0..1000).map(|_| 4.0 * stream.normal()).collect();
        logits[..300].fill(f32::NEG_INFINITY);
        logits[999] = f32::NEG_INFINITY;
        for isa in Isa::available() {
            for temperature in [0.02, 1.0, 1.7] {
                let sampling = Sampling { temperature, ..Sampling::default() };
                let listed = sampling.distribution(&logits, &[]).unwrap();
                let mut before = 0.0;
                for &(token, probability) in &listed {
                    // The list's rounding is 1e-7 of all: less than a hundredth of these.
                    let draws = [1e-2, 0.5, 0.99].map(|part| before + part * probability);
                    for draw in draws.into_iter().filter(|_| probability > 1e-4) {
                        let (drawn, p) = draw_from_all(isa, &logits, temperature, draw).unwrap();
                        assert_eq!(drawn, token, "{isa:?}, temperature {temperature}, {draw}");
                        assert!((p / probability - 1.0).abs() < 2e-5, "{p}, not {probability}");
                    }
                    before += probability;
                }
                for draw in [0.0, 1.0 - f64::EPSILON / 2.0] {
                    let (drawn, _) = draw_from_all(isa, &logits, temperature, draw).unwrap();
                    assert!((300..999).contains(&drawn), "{drawn} has no weight");
                }
            }
        }
    }

    #[test]
    fn invalid_settings_and_logits_are_errors() {
        let check = |sampling: Sampling, sentence: &str| {
            assert_eq!(sampling.check().unwrap_err().to_string(), sentence);
            assert!(sampling.choose(&LOGITS, &[], (0, 0)).is_err());
        };
        let ok = Sampling::default;
        check(Sampling { temperature: -1.0, ..ok() }, "temperature is -1, needed 0 or more");
        check(Sampling { temperature: f64::NAN, ..ok() }, "temperature is NaN, needed 0 or more");
        check(Sampling { top_p: 0.0, ..ok() }, "top_p is 0, needed more than 0 and at most 1");
        check(Sampling { top_p: 1.5, ..ok() }, "top_p is 1.5, needed more than 0 and at most 1");
        check(Sampling { min_p: -0.1, ..ok() }, "min_p is -0.1, needed 0 to 1");
        check(
            Sampling { repetition_penalty: 0.0, ..ok() },
            "repetition_penalty is 0, needed more than 0",
        );

        for bad in [f32::NAN, f32::INFINITY] {
            let error = Sampling::greedy().choose(&[0.0, bad], &[], (0, 0)).unwrap_err();
            assert!(error.to_string().starts_with("the logit of token 1 is "), "{error}");
            assert!(log_probs_top_k(&[0.0, bad], 1).is_err());
        }
        for none in [&[][..], &[f32::NEG_INFINITY; 2]] {
            assert_eq!(ok().choose(none, &[], (0, 0)), Err(SamplingError::Empty));
            assert_eq!(log_probs_top_k(none, 1), Err(SamplingError::Empty));
        }
    }
}
