//! Whether a run of reinforcement learning is sick, and of what: each cause leaves its own trace in
//! the log-probs of the same tokens, taken by the sampler, when they were scored, and when they are
//! learned from.

use std::fmt;

use super::Response;

/// Nats a token by which decoding and training paths may differ, in the mean: their integer kernels
/// round otherwise, and caches are narrower. Measured differences are below 0.02.
const ROUNDING: f64 = 0.15;
/// Nats a token by which two passes of the training path over the same tokens may differ.
const SAME_PATH: f64 = 1e-3;
/// Nats a token that filters may add to what is drawn without being told.
const FILTERED: f64 = 1e-3;
/// Standard errors by which a mean must leave 0 to count, and how many numbers it must be of: the
/// error of a few is itself too uncertain, and every update of a run is looked at.
const CLEARLY: f64 = 5.0;
const SOME: usize = 8;

/// What the first optimizer step of an update read before it moved the policy.
#[derive(Debug, Clone, Copy)]
pub struct FirstStep<'a> {
    /// The responses it learned from, by their places.
    pub responses: &'a [usize],
    /// Log-probs of their tokens, laid end to end.
    pub logps: &'a [f32],
}

/// Log-probs of the tokens of an update, laid end to end.
#[derive(Debug, Clone, Copy)]
struct Evidence<'a> {
    /// As the sampler saw them, at its temperature, before filters.
    sampled: &'a [f32],
    /// Of the draws: after filters.
    drawn: &'a [f32],
    /// By the training path: when they were scored or first learned from.
    old: &'a [f32],
    /// `½ (log π - log π_old)²` a token in the first mini-batch that was learned from, before any step:
    /// 0 but for rounding, if the old policy is the one that learns.
    first_approxkl: f64,
    /// Divergence from the reference of each response, `Σ log π/π_ref` over its tokens, in nats.
    kl: &'a [f64],
}

/// A cause of sickness.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Cause {
    /// Tokens were drawn from a narrower distribution than policy and reference know of.
    SamplingFilters {
        /// Nats a token by which the draws are likelier than the policy says.
        gap: f64,
    },
    /// The training path does not see the tokens, places or neighbours that the sampler saw.
    ShiftedRows {
        /// Mean nats a token between the two.
        gap: f64,
    },
    /// The old log-probs are another policy's than the one that sampled and is about to learn.
    StaleLogProbs {
        /// Mean nats a token between old and current.
        gap: f64,
    },
}

/// What is wrong with an update.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Diagnosis {
    /// The mean divergence and its standard error, if it is clearly negative: which that of a policy
    /// from whose own distribution the tokens were drawn cannot be.
    pub negative_kl: Option<(f64, f64)>,
    /// What was found.
    pub causes: Vec<Cause>,
}

impl Diagnosis {
    /// Whether all is well.
    pub fn is_healthy(&self) -> bool {
        self.negative_kl.is_none() && self.causes.is_empty()
    }
}

/// Looks at an update: at its responses, and their divergences `kl` from the reference if there is
/// one.
///
/// `old` are the log-probs of all responses that were taken before anything was learned, if they
/// were; `first` what the first step read, if it read what is the same policy (dropout makes another).
pub fn diagnose_update(
    responses: &[Response],
    old: Option<&[Vec<f32>]>,
    first: Option<FirstStep>,
    kl: &[f64],
) -> Diagnosis {
    // What the first step learned from; all, where the log-probs of all are known.
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
        // Where none were taken before, the loss takes those of its own pass for the old ones: they
        // cannot be another policy's, and there is nothing to hold them to.
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

/// Looks for every cause at once.
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
        // Stale ones differ from the sampler's too: only those of this policy say where it looks.
        causes.push(Cause::ShiftedRows { gap: shifted });
    }
    let (average, error) = mean_and_error(kl);
    let negative = kl.len() >= SOME && average < -CLEARLY * error && average < -1e-6;
    let negative_kl = negative.then_some((average, error));
    Diagnosis { negative_kl, causes }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SamplingFilters { gap } => write!(
                f,
                "sampling filters (top_k, top_p): draws are {gap:.3} nats a token likelier than the \
                 policy says, and the reference knows nothing of them; sample without filters"
            ),
            Self::ShiftedRows { gap } => write!(
                f,
                "shifted rows: training sees other tokens, positions or padding than the sampler did \
                 ({gap:.3} nats a token apart)"
            ),
            Self::StaleLogProbs { gap } => write!(
                f,
                "stale log-probs: the old ones are not those of the policy that sampled \
                 ({gap:.3} nats a token apart before the first step)"
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
                "KL from the reference is {kl:.3} ± {error:.3} nats a response, which cannot be: no \
                 known cause was found"
            ),
            (Some((kl, error)), false) => {
                write!(
                    f,
                    "negative KL ({kl:.3} ± {error:.3} nats a response): {}",
                    causes.join("; ")
                )
            }
            (None, _) => f.write_str(&causes.join("; ")),
        }
    }
}

/// Whether what is trained for and what judges it part: the reward has risen over the evaluations
/// while the judge, after its best, has clearly fallen. Each is a mean with its standard error.
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

/// Mean, and the standard error of it.
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
    fn each_cause_leaves_its_own_trace() {
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
    fn a_divergence_is_negative_only_clearly() {
        let of = |kl: &[f64]| {
            let none = Evidence { sampled: &[], drawn: &[], old: &[], first_approxkl: 0.0, kl };
            diagnose(&none).negative_kl.is_some()
        };
        assert!(!of(&[0.0; 16]) && !of(&[1.0, -1.2, 0.1].repeat(4)));
        assert!(of(&[-1.0, -1.2, -0.9, -1.1].repeat(2)));
        assert!(!of(&[-0.046, -0.043, -0.041])); // three responses alike, of a policy that is well
    }

    #[test]
    fn a_falling_judge_is_seen_once_it_clearly_falls() {
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
