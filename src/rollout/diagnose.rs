//! Health checks of reinforcement learning. Each known cause of trouble shows in the log-probs of the same
//! tokens: those of the sampler, those taken when the responses were scored, and those of the first
//! training step.

use std::fmt;

use super::Response;

/// Tolerance, in mean nats per token, between decoding and the training path: their integer kernels round
/// differently, and the KV cache has lower precision. Measured differences are below 0.02.
const ROUNDING: f64 = 0.15;
/// Tolerance, in nats per token, between two passes of the training path over the same tokens.
const SAME_PATH: f64 = 1e-3;
/// Tolerance, in mean nats per token, between the sampler's log-probs before and after its filters.
const FILTERED: f64 = 1e-3;
/// A mean counts as different from 0 if it is this many standard errors away, over at least this many
/// values: the standard error of a few values is uncertain, and every update of a run is checked.
const SIGNIFICANT_ERRORS: f64 = 5.0;
const MIN_VALUES: usize = 8;

/// Log-probs that the first optimizer step of an update computed, before it changed the policy.
#[derive(Debug, Clone, Copy)]
pub struct FirstStep<'a> {
    /// Indices of the responses it learned from.
    pub responses: &'a [usize],
    /// Log-probs of their tokens, concatenated.
    pub logps: &'a [f32],
}

/// Log-probs of the tokens of an update, concatenated.
#[derive(Debug, Clone, Copy)]
struct Evidence<'a> {
    /// Those of the sampler at its temperature, before filters.
    sampled: &'a [f32],
    /// Those of the sampler after filters.
    drawn: &'a [f32],
    /// Those of the training path, when the responses were scored or first learned from.
    old: &'a [f32],
    /// Mean `½ (log π - log π_old)²` per token of the first mini-batch, before any step. It is 0 up to
    /// rounding if the old log-probs are those of the policy that is trained.
    first_approxkl: f64,
    /// KL estimate of each response, `Σ log π/π_ref` over its tokens, in nats.
    kl: &'a [f64],
}

/// A cause of an unhealthy update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Cause {
    /// Tokens were sampled with filters (top-k, top-p, ..) that policy and reference log-probs ignore.
    SamplingFilters {
        /// Mean nats per token by which sampled tokens are more likely after the filters.
        gap: f64,
    },
    /// The training path sees other tokens, positions or padding than the sampler did.
    ShiftedRows {
        /// Mean difference in nats per token.
        gap: f64,
    },
    /// The old log-probs are not those of the policy that sampled and is trained.
    StaleLogProbs {
        /// Mean difference of old and current log-probs, in nats per token.
        gap: f64,
    },
}

/// The result of the health checks of an update.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Diagnosis {
    /// The mean KL estimate and its standard error, if it is significantly negative, which is impossible if
    /// the tokens were sampled from the policy's own distribution.
    pub negative_kl: Option<(f64, f64)>,
    /// The causes found.
    pub causes: Vec<Cause>,
}

impl Diagnosis {
    /// Whether nothing was found.
    pub fn is_healthy(&self) -> bool {
        self.negative_kl.is_none() && self.causes.is_empty()
    }
}

/// Checks an update. `kl` are the KL estimates of its responses, if there is a reference.
///
/// `old` are the log-probs of all responses before the update, if they were computed; `first` are those of
/// the first step, if the policy is the same there (with dropout it is not).
pub fn diagnose_update(
    responses: &[Response],
    old: Option<&[Vec<f32>]>,
    first: Option<FirstStep>,
    kl: &[f64],
) -> Diagnosis {
    // The responses of the first step; all of them if the log-probs of all are known.
    let looked_at: Vec<&Response> = match (old, first) {
        (None, Some(first)) => first.responses.iter().map(|&i| &responses[i]).collect(),
        _ => responses.iter().collect(),
    };
    let all = |part: fn(&Response) -> &Vec<f32>| -> Vec<f32> {
        looked_at.iter().flat_map(|response| part(response).iter().copied()).collect()
    };
    let first_approxkl = match (old, first) {
        (Some(old), Some(first)) => {
            let before: Vec<f32> =
                first.responses.iter().flat_map(|&i| old[i].iter().copied()).collect();
            let squared = |(now, old): (&f32, &f32)| 0.5 * f64::from(now - old).powi(2);
            mean(first.logps.iter().zip(&before).map(squared))
        }
        // Without old log-probs, the loss uses the current ones, which cannot be stale.
        _ => 0.0,
    };
    let by_training = match (old, first) {
        (Some(old), _) => old.concat(),
        (None, Some(first)) => first.logps.to_vec(),
        (None, None) => Vec::new(),
    };
    diagnose(&Evidence {
        sampled: &all(|response| &response.sampled_logps),
        drawn: &all(|response| &response.drawn_logps),
        old: &by_training,
        first_approxkl,
        kl,
    })
}

/// Looks for all causes.
fn diagnose(evidence: &Evidence) -> Diagnosis {
    let Evidence { sampled, drawn, old, first_approxkl, kl } = *evidence;
    let distance =
        |a: &[f32], b: &[f32]| mean(a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())));
    let mut causes = Vec::new();
    let filters = mean(drawn.iter().zip(sampled).map(|(d, s)| f64::from(d - s)));
    if filters > FILTERED {
        causes.push(Cause::SamplingFilters { gap: filters });
    }
    let stale = (2.0 * first_approxkl).sqrt();
    let shifted = distance(old, sampled);
    if stale > SAME_PATH {
        causes.push(Cause::StaleLogProbs { gap: stale });
    } else if shifted > ROUNDING {
        // Stale log-probs differ from the sampler's too, so this check needs those of the current policy.
        causes.push(Cause::ShiftedRows { gap: shifted });
    }
    let (average, error) = mean_and_error(kl);
    let negative =
        kl.len() >= MIN_VALUES && average < -SIGNIFICANT_ERRORS * error && average < -1e-6;
    let negative_kl = negative.then_some((average, error));
    Diagnosis { negative_kl, causes }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SamplingFilters { gap } => write!(
                f,
                "sampling filters (top_k, top_p): sampled tokens are {gap:.3} nats per token more likely \
                 than under the policy, and the reference ignores the filters; sample without filters"
            ),
            Self::ShiftedRows { gap } => write!(
                f,
                "shifted rows: training sees other tokens, positions or padding than the sampler did \
                 ({gap:.3} nats per token apart)"
            ),
            Self::StaleLogProbs { gap } => write!(
                f,
                "stale log-probs: the old log-probs are not those of the policy that sampled \
                 ({gap:.3} nats per token apart before the first step)"
            ),
        }
    }
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let causes: Vec<String> = self.causes.iter().map(Cause::to_string).collect();
        match (self.negative_kl, causes.is_empty()) {
            (Some((kl, error)), true) => write!(
                f,
                "KL from the reference is {kl:.3} ± {error:.3} nats per response, which is impossible: no \
                 known cause was found"
            ),
            (Some((kl, error)), false) => {
                write!(
                    f,
                    "negative KL ({kl:.3} ± {error:.3} nats per response): {}",
                    causes.join("; ")
                )
            }
            (None, _) => f.write_str(&causes.join("; ")),
        }
    }
}

/// Whether the policy overoptimizes the reward: over the evaluations the training reward has risen since the
/// best score of an independent judge, while that score has fallen significantly. Each value is a mean with
/// its standard error.
pub fn overoptimized(rewards: &[(f64, f64)], judgements: &[(f64, f64)]) -> bool {
    let (Some(&(reward, _)), Some(&(judgement, error))) = (rewards.last(), judgements.last())
    else {
        return false;
    };
    let best = (0..judgements.len()).max_by(|&a, &b| judgements[a].0.total_cmp(&judgements[b].0));
    let Some(best) = best.filter(|&best| best < rewards.len()) else { return false };
    let (best_judgement, best_error) = judgements[best];
    let both = (error * error + best_error * best_error).sqrt();
    reward > rewards[best].0 && judgement < best_judgement - 2.0 * both
}

/// The mean and its standard error.
pub fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let count = values.len().max(1) as f64;
    let average = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - average).powi(2)).sum();
    (average, (squares / (count - 1.0).max(1.0) / count).sqrt())
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1) as f64;
    values.sum::<f64>() / count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_is_found_by_its_log_probs() {
        let well = [-1.0f32, -2.0, -0.5, -3.0];
        let moved = |by: f32| well.map(|logp| logp + by);
        let (up, down) = (moved(0.4), moved(-0.7));
        let check = |drawn: &[f32], old: &[f32], first_approxkl: f64, needed: &str| {
            let (sampled, kl) = (&well[..], &[0.5, 0.1, 0.2][..]);
            let found = diagnose(&Evidence { sampled, drawn, old, first_approxkl, kl });
            let names: Vec<String> = found.causes.iter().map(Cause::to_string).collect();
            match needed {
                "" => assert!(found.is_healthy(), "{names:?}"),
                needed => {
                    assert!(names.len() == 1 && names[0].starts_with(needed), "{names:?}");
                }
            }
        };
        check(&well, &well, 0.0, "");
        check(&up, &well, 0.0, "sampling filters");
        check(&well, &down, 1e-9, "shifted rows");
        check(&well, &down, 0.245, "stale log-probs");
    }

    #[test]
    fn negative_kl_needs_significance() {
        let of = |kl: &[f64]| {
            let none = Evidence { sampled: &[], drawn: &[], old: &[], first_approxkl: 0.0, kl };
            diagnose(&none).negative_kl.is_some()
        };
        assert!(!of(&[0.0; 16]) && !of(&[1.0, -1.2, 0.1].repeat(4)));
        assert!(of(&[-1.0, -1.2, -0.9, -1.1].repeat(2)));
        assert!(!of(&[-0.046, -0.043, -0.041])); // three similar responses of a healthy policy
    }

    #[test]
    fn overoptimization_needs_a_significant_fall() {
        let check = |rewards: &[f64], judgements: &[f64], needed: bool| {
            let with = |values: &[f64]| values.iter().map(|&v| (v, 0.1)).collect::<Vec<_>>();
            assert_eq!(overoptimized(&with(rewards), &with(judgements)), needed, "{judgements:?}");
        };
        check(&[], &[], false);
        check(&[0.0, 1.0], &[0.0, 0.8], false);
        check(&[0.0, 1.0, 2.0], &[0.0, 1.0, 0.9], false);
        check(&[0.0, 1.0, 2.0], &[0.0, 1.0, 0.5], true);
        check(&[0.0, 2.0, 1.0], &[0.0, 1.0, 0.5], false);
    }
}
