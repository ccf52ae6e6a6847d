//! Preference optimization without a reward model: DPO and related losses. All of them depend only on the
//! log-probs of responses; a loss is a variant of [`PreferenceLoss`] with its parameters,
//! and an arm of `preference_losses`. Formulas are those of
//! TRL 1.16 (DPOTrainer, KTOTrainer, and of its experimental trainers ORPO's and CPO's).

use candle_core::{Result, Tensor};

use super::policy::row_sums;
use super::reward::{floats, log_sigmoid};
use crate::string_enum::string_enum;

string_enum! {
    /// The name of a preference loss, the value of `loss_type`.
    #[derive(Debug)]
    pub enum PreferenceLossType {
        /// DPO.
        Sigmoid = "sigmoid",
        /// IPO.
        Ipo = "ipo",
        /// SLiC.
        Hinge = "hinge",
        /// ORPO.
        Orpo = "orpo",
        /// SimPO.
        SimPo = "simpo",
        /// KTO.
        Kto = "kto",
    }
}

/// A preference loss with its own parameters.
///
/// With `h = log π(y_w)/π_ref(y_w) - log π(y_l)/π_ref(y_l)`, the difference of the log-ratios of
/// chosen and rejected:
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PreferenceLoss {
    /// DPO (Rafailov et al. 2023, equation 7): `-log σ(β h)`. Label smoothing ε makes it
    /// conservative (Mitchell 2023): `-(1 - ε) log σ(β h) - ε log σ(-β h)`.
    Sigmoid {
        /// Probability that the labels of a comparison are swapped.
        label_smoothing: f64,
        /// Whether the reference is uniform.
        reference_free: bool,
    },
    /// SLiC (Zhao et al. 2023): `max(0, 1 - β h)`.
    Hinge {
        /// Whether the reference is uniform.
        reference_free: bool,
    },
    /// IPO (Azar et al. 2023, equation 17): `(h' - 1 / 2β)²`, where h' has each log-ratio divided
    /// by the number of tokens of its response.
    Ipo {
        /// Whether the reference is uniform.
        reference_free: bool,
    },
    /// ORPO (Hong et al. 2024, equation 6): the log-odds ratio, weighted by β, plus the negative
    /// log-likelihood of the chosen response. No reference.
    Orpo,
    /// SimPO (Meng et al. 2024, equation 6): log-probs per token, a target margin γ, no reference;
    /// smoothed as DPO is.
    SimPo {
        /// Target margin, in units of reward.
        simpo_gamma: f64,
        /// Probability that the labels of a comparison are swapped.
        label_smoothing: f64,
    },
    /// KTO (Ethayarajh et al. 2024, equation 7): responses labelled good or bad, no pairs; see
    /// `kto_losses`.
    Kto {
        /// Weight of good responses.
        desirable_weight: f64,
        /// Weight of bad responses.
        undesirable_weight: f64,
    },
}

impl PreferenceLoss {
    /// Whether the loss compares the policy with a reference.
    pub fn has_reference(&self) -> bool {
        match *self {
            Self::Sigmoid { reference_free, .. }
            | Self::Hinge { reference_free }
            | Self::Ipo { reference_free } => !reference_free,
            Self::Kto { .. } => true,
            Self::Orpo | Self::SimPo { .. } => false,
        }
    }

    /// Whether responses are labelled good or bad one by one; the other losses compare pairs.
    pub(crate) fn reads_labels(&self) -> bool {
        matches!(self, Self::Kto { .. })
    }

    /// Whether the loss needs at least two rows in a step.
    pub(crate) fn compares_rows(&self) -> bool {
        matches!(self, Self::Kto { .. })
    }

    /// Whether the tokens of prompts are learned too.
    pub(crate) fn learns_prompts(&self) -> bool {
        matches!(self, Self::Orpo)
    }

    /// Constants of the loss that depend on all rows of a step, not only on a micro-batch.
    ///
    /// `mismatched` returns the summed log-probs, under policy and reference, of each row's prompt
    /// with the response of another row, whose index it is given.
    ///
    /// # Errors
    /// Those of `mismatched`.
    pub(crate) fn step_constants<E>(
        &self,
        parts: &[&PreferenceBatch],
        mismatched: impl FnOnce(&[usize]) -> std::result::Result<[Vec<f32>; 2], E>,
    ) -> std::result::Result<StepConstants, E> {
        let mut constants = StepConstants::default();
        match self {
            Self::Kto { .. } => {
                let rows: usize = parts.iter().map(|part| part.tokens.len()).sum();
                // An epoch's last row has no other row to take a response from.
                if rows > 1 {
                    let [policy, reference] = mismatched(&kto_mismatched(rows))?;
                    constants.kl = kto_kl(&policy, &reference);
                }
            }
            Self::Orpo => constants.nll_weight = orpo_nll_weight(parts),
            Self::Sigmoid { .. } | Self::Hinge { .. } | Self::Ipo { .. } | Self::SimPo { .. } => {}
        }
        Ok(constants)
    }
}

/// Constants of a loss that depend on all rows of a step; 0 for losses without such constants.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepConstants {
    /// KTO: the reference point, `kto_kl`.
    pub kl: f64,
    /// ORPO: pairs of the step divided by the tokens of their prompts and chosen responses.
    pub nll_weight: f64,
}

/// The settings of preference optimization, with TRL's names and values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PreferenceSettings {
    /// The loss type.
    pub loss: PreferenceLoss,
    /// Strength of the KL constraint to the reference; for ORPO the weight of the odds ratio, for
    /// SimPO the scale of the rewards.
    pub beta: f64,
}

/// Responses of a micro-batch, compared in pairs or labelled.
#[derive(Debug, Clone, PartialEq)]
pub struct PreferenceBatch {
    /// The loss.
    pub settings: PreferenceSettings,
    /// Number of learned tokens of each response, in order.
    pub tokens: Vec<usize>,
    /// Summed log-probs of each response under the reference, if there is one.
    pub reference: Option<Vec<f32>>,
    /// Pairs or labels of the responses.
    pub judgement: PreferenceJudgement,
    /// Constants of the whole step.
    pub constants: StepConstants,
}

/// Pairs or labels of the responses of a micro-batch.
#[derive(Debug, Clone, PartialEq)]
pub enum PreferenceJudgement {
    /// Preference pairs.
    Pairs {
        /// For each pair the indices of the preferred response and of the other.
        pairs: Vec<(usize, usize)>,
        /// Number of learned tokens of each prompt, if prompts are learned too: their log-probs follow
        /// those of all responses.
        prompts: Vec<usize>,
        /// For each pair the index of its prompt, where prompts are learned too.
        prompt_of: Vec<usize>,
    },
    /// Labels: whether each response is good.
    Labels(Vec<bool>),
}

impl PreferenceBatch {
    /// Divisor of the summed loss: the number of pairs, or of labelled responses.
    pub fn count(&self) -> usize {
        match &self.judgement {
            PreferenceJudgement::Pairs { pairs, .. } => pairs.len(),
            PreferenceJudgement::Labels(labels) => labels.len(),
        }
    }

    /// The losses, from the log-probs of all learned tokens.
    pub(super) fn losses(&self, logps: &Tensor) -> Result<PreferenceLosses> {
        match &self.judgement {
            PreferenceJudgement::Labels(labels) => {
                let sums = row_sums(logps, &self.tokens)?; // (R)
                let reference = self.reference.as_deref().unwrap_or_default();
                kto_losses(&self.settings, &sums, reference, labels, self.constants.kl)
            }
            PreferenceJudgement::Pairs { pairs, prompts, prompt_of } => {
                self.pair_losses(logps, pairs, prompts, prompt_of)
            }
        }
    }

    fn pair_losses(
        &self,
        logps: &Tensor,
        pairs: &[(usize, usize)],
        prompts: &[usize],
        prompt_of: &[usize],
    ) -> Result<PreferenceLosses> {
        let rows: Vec<usize> = self.tokens.iter().chain(prompts).copied().collect();
        let sums = row_sums(logps, &rows)?; // (R + prompts)
        let pick = |indices: Vec<usize>| -> Result<Tensor> {
            let indices: Vec<u32> = indices.into_iter().map(|index| index as u32).collect();
            sums.index_select(&Tensor::new(indices, sums.device())?, 0)
        };
        let (better, worse): (Vec<usize>, Vec<usize>) = pairs.iter().copied().unzip();
        let (chosen, rejected) = (pick(better.clone())?, pick(worse.clone())?); // (P)
        let reference = self.reference.as_ref().map(|values| {
            let of = |indices: &[usize]| -> Vec<f32> {
                indices.iter().map(|&index| values[index]).collect()
            };
            (of(&better), of(&worse))
        });
        let count = |indices: &[usize]| -> Vec<usize> {
            indices.iter().map(|&index| self.tokens[index]).collect()
        };
        let (chosen_tokens, rejected_tokens) = (count(&better), count(&worse));
        let with_prompt = if prompts.is_empty() {
            None
        } else {
            let indices = prompt_of.iter().map(|&prompt| self.tokens.len() + prompt);
            let tokens = prompt_of.iter().zip(&chosen_tokens);
            let tokens: Vec<usize> = tokens.map(|(&p, &c)| prompts[p] + c).collect();
            Some(((pick(indices.collect())? + &chosen)?, tokens))
        };
        let nll = with_prompt.as_ref().map(|(logps, tokens)| NegativeLogLikelihood {
            logps,
            tokens,
            weight: self.constants.nll_weight,
        });
        let logps = PairLogps {
            chosen: &chosen,
            rejected: &rejected,
            reference: reference.as_ref().map(|(c, r)| (&c[..], &r[..])),
            chosen_tokens: &chosen_tokens,
            rejected_tokens: &rejected_tokens,
            nll,
        };
        preference_losses(&self.settings, &logps)
    }
}

/// Log-probs of P pairs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PairLogps<'a> {
    /// Log-probs of the chosen responses under the policy, summed over their tokens, `(P)` F32.
    pub chosen: &'a Tensor,
    /// The same of the rejected.
    pub rejected: &'a Tensor,
    /// The same under the reference, chosen and rejected, `(P)` each. Without, the reference is
    /// uniform (TRL's `reference_free`).
    pub reference: Option<(&'a [f32], &'a [f32])>,
    /// Number of tokens of the chosen responses, `(P)`.
    pub chosen_tokens: &'a [usize],
    /// Tokens of the rejected.
    pub rejected_tokens: &'a [usize],
    /// The likelihood term of ORPO.
    pub nll: Option<NegativeLogLikelihood<'a>>,
}

/// The likelihood of chosen responses with their prompts (as in TRL and ORPO's own code).
#[derive(Debug, Clone, Copy)]
pub(crate) struct NegativeLogLikelihood<'a> {
    /// Log-probs of prompt and chosen response, summed over their predicted tokens, `(P)` F32.
    pub logps: &'a Tensor,
    /// Number of these tokens, `(P)`.
    pub tokens: &'a [usize],
    /// Pairs of the whole step divided by these tokens of the whole step: so that the mean over
    /// tokens and the mean over pairs become one sum over pairs.
    pub weight: f64,
}

/// The losses of P pairs, or of R labelled responses.
#[derive(Debug)]
pub struct PreferenceLosses {
    /// One loss for each, `(P)` F32, differentiable: the caller divides their sum by the number of pairs
    /// (KTO: of responses) of the whole step.
    pub losses: Tensor,
    /// Implicit rewards `β log π/π_ref` of the chosen (KTO: good) responses.
    pub chosen_rewards: Vec<f64>,
    /// The same of the rejected (KTO: bad) responses.
    pub rejected_rewards: Vec<f64>,
    /// Sums.
    pub stats: PreferenceStats,
}

/// The losses of pairs.
///
/// # Errors
/// If counts differ, the likelihood for ORPO is missing, or the loss is KTO, which has no pairs.
pub(crate) fn preference_losses(
    settings: &PreferenceSettings,
    logps: &PairLogps<'_>,
) -> Result<PreferenceLosses> {
    let &PreferenceSettings { loss, beta } = settings;
    let (chosen, rejected) = (logps.chosen, logps.rejected);
    match loss {
        PreferenceLoss::Sigmoid { label_smoothing, .. } => {
            let [chosen, rejected] = log_ratios(logps)?;
            let losses = smoothed(&((&chosen - &rejected)? * beta)?, label_smoothing)?;
            with_statistics(losses, beta, [&chosen, &rejected], [logps.chosen, logps.rejected])
        }
        PreferenceLoss::Hinge { .. } => {
            let [chosen, rejected] = log_ratios(logps)?;
            let losses = ((&chosen - &rejected)? * -beta)?.affine(1.0, 1.0)?.relu()?;
            with_statistics(losses, beta, [&chosen, &rejected], [logps.chosen, logps.rejected])
        }
        PreferenceLoss::Ipo { .. } => {
            let [chosen, rejected] = log_ratios(logps)?;
            let h = (per_token(&chosen, logps.chosen_tokens)?
                - per_token(&rejected, logps.rejected_tokens)?)?;
            let losses = h.affine(1.0, -0.5 / beta)?.sqr()?;
            with_statistics(losses, beta, [&chosen, &rejected], [logps.chosen, logps.rejected])
        }
        PreferenceLoss::SimPo { simpo_gamma, label_smoothing } => {
            let chosen = per_token(chosen, logps.chosen_tokens)?;
            let rejected = per_token(rejected, logps.rejected_tokens)?;
            let z = (&chosen - &rejected)?.affine(beta, -simpo_gamma)?;
            let losses = smoothed(&z, label_smoothing)?;
            with_statistics(losses, beta, [&chosen, &rejected], [&chosen, &rejected])
        }
        PreferenceLoss::Orpo => {
            let Some(nll) = logps.nll else {
                candle_core::bail!("ORPO needs the log-likelihood of the chosen responses")
            };
            let chosen = per_token(chosen, logps.chosen_tokens)?;
            let rejected = per_token(rejected, logps.rejected_tokens)?;
            let log_odds = (log_odds(&chosen)? - log_odds(&rejected)?)?;
            let ratio = log_sigmoid(&log_odds)?;
            let losses = ((&ratio * -beta)? - (nll.logps * nll.weight)?)?;
            let mut found =
                with_statistics(losses, beta, [&chosen, &rejected], [&chosen, &rejected])?;
            found.stats.log_odds_ratio = floats(&ratio)?.iter().sum();
            found.stats.log_odds_chosen = floats(&log_odds)?.iter().sum();
            found.stats.nll = -floats(nll.logps)?.iter().sum::<f64>();
            found.stats.nll_tokens = nll.tokens.iter().map(|&tokens| tokens as u64).sum();
            Ok(found)
        }
        PreferenceLoss::Kto { .. } => {
            candle_core::bail!("KTO needs labelled responses, not pairs")
        }
    }
}

/// The losses of R labelled responses: `w · (1 - σ(±β (log π/π_ref - kl)))`, + and the desirable
/// weight for those labelled good, - and the undesirable one for the others.
///
/// `logps (R)` F32 are summed over the tokens of each response, `reference (R)` the same under the
/// reference. `kl` is [`kto_kl`] of the whole step, in which there is no gradient.
///
/// # Errors
/// If counts differ.
pub(crate) fn kto_losses(
    settings: &PreferenceSettings,
    logps: &Tensor,
    reference: &[f32],
    labels: &[bool],
    kl: f64,
) -> Result<PreferenceLosses> {
    let &PreferenceSettings { loss, beta } = settings;
    let PreferenceLoss::Kto { desirable_weight, undesirable_weight } = loss else {
        candle_core::bail!("only KTO supports labelled responses")
    };
    if reference.len() != labels.len() {
        let (found, needed) = (reference.len(), labels.len());
        candle_core::bail!("KTO has {found} log-probs of the reference, needed {needed}");
    }
    let column = |values: Vec<f32>| Tensor::from_vec(values, labels.len(), logps.device());
    let signed = |good: f64, bad: f64| -> Vec<f32> {
        labels.iter().map(|&label| if label { good } else { bad } as f32).collect()
    };
    let ratios = (logps - column(reference.to_vec())?)?; // (R)
    let z = (ratios.affine(beta, -beta * kl)? * column(signed(1.0, -1.0))?)?;
    let losses = (log_sigmoid(&z.neg()?)?.exp()? // 1 - σ(z)
        * column(signed(desirable_weight, undesirable_weight))?)?;

    let mut found = PreferenceLosses {
        losses,
        chosen_rewards: Vec::new(),
        rejected_rewards: Vec::new(),
        stats: PreferenceStats::default(),
    };
    for ((ratio, logp), &good) in floats(&ratios)?.into_iter().zip(floats(logps)?).zip(labels) {
        let stats = &mut found.stats;
        if good {
            stats.chosen += 1;
            stats.chosen_rewards += beta * ratio;
            stats.chosen_logps += logp;
            found.chosen_rewards.push(beta * ratio);
        } else {
            stats.rejected += 1;
            stats.rejected_rewards += beta * ratio;
            stats.rejected_logps += logp;
            found.rejected_rewards.push(beta * ratio);
        }
    }
    found.stats.loss = floats(&found.losses)?.iter().sum();
    found.stats.kl = Some((kl * labels.len() as f64, labels.len() as u64));
    Ok(found)
}

/// Which response each prompt of a batch is paired with for KTO's KL term: that of the row before
/// it, the first with the last (TRL's rotation by one).
pub(crate) fn kto_mismatched(rows: usize) -> Vec<usize> {
    (0..rows).map(|row| (row + rows - 1) % rows).collect()
}

/// The weight of ORPO's likelihood, which is a mean over the tokens of the step, while the odds ratio is a
/// mean over pairs: with this weight both are divided by the number of pairs.
fn orpo_nll_weight(parts: &[&PreferenceBatch]) -> f64 {
    let (mut all_pairs, mut tokens) = (0, 0);
    for part in parts {
        let PreferenceJudgement::Pairs { pairs, prompts, prompt_of } = &part.judgement else {
            continue;
        };
        all_pairs += pairs.len();
        for (&(better, _), &prompt) in pairs.iter().zip(prompt_of) {
            tokens += part.tokens[better] + prompts[prompt];
        }
    }
    all_pairs as f64 / tokens.max(1) as f64
}

/// KTO's reference point: the mean of `log π/π_ref` over the mismatched responses, at least 0.
pub(crate) fn kto_kl(logps: &[f32], reference: &[f32]) -> f64 {
    let ratios = logps.iter().zip(reference).map(|(&p, &r)| f64::from(p) - f64::from(r));
    (ratios.sum::<f64>() / logps.len().max(1) as f64).max(0.0)
}

/// `log π/π_ref` of chosen and rejected, `(P)` each.
fn log_ratios(logps: &PairLogps<'_>) -> Result<[Tensor; 2]> {
    let Some((chosen, rejected)) = logps.reference else {
        return Ok([logps.chosen.clone(), logps.rejected.clone()]);
    };
    let less = |policy: &Tensor, reference: &[f32]| {
        policy - Tensor::from_slice(reference, reference.len(), policy.device())?
    };
    Ok([less(logps.chosen, chosen)?, less(logps.rejected, rejected)?])
}

/// `-(1 - ε) log σ(z) - ε log σ(-z)`.
fn smoothed(z: &Tensor, label_smoothing: f64) -> Result<Tensor> {
    let losses = log_sigmoid(z)?.neg()?;
    if label_smoothing == 0.0 {
        return Ok(losses);
    }
    let flipped = log_sigmoid(&z.neg()?)?.neg()?;
    (losses * (1.0 - label_smoothing))? + (flipped * label_smoothing)?
}

/// Sums `(P)` over tokens as means over them.
fn per_token(sums: &Tensor, tokens: &[usize]) -> Result<Tensor> {
    let tokens: Vec<f32> = tokens.iter().map(|&tokens| tokens.max(1) as f32).collect();
    let count = tokens.len();
    sums / Tensor::from_vec(tokens, count, sums.device())?
}

/// `log p/(1 - p)` of log-probs per token.
///
/// `log(1 - p)` as `log(tanh(-x/2) (1 + exp x))`, exact near p = 1 where `1 - exp x` cancels. A
/// probability that rounds to 1 is clamped just below, without a gradient there.
fn log_odds(logps: &Tensor) -> Result<Tensor> {
    let x = logps.minimum(-1e-6)?;
    let rest = ((&x * -0.5)?.tanh()?.log()? + (x.exp()? + 1.0)?.log()?)?;
    x - rest
}

/// The result of pairs, from their losses, implicit rewards (times β) and log-probs.
fn with_statistics(
    losses: Tensor,
    beta: f64,
    rewards: [&Tensor; 2],
    logps: [&Tensor; 2],
) -> Result<PreferenceLosses> {
    let scaled = |values: &Tensor| -> Result<Vec<f64>> {
        Ok(floats(values)?.into_iter().map(|value| beta * value).collect())
    };
    let (chosen_rewards, rejected_rewards) = (scaled(rewards[0])?, scaled(rewards[1])?);
    let ahead = chosen_rewards.iter().zip(&rejected_rewards).filter(|(c, r)| c > r).count();
    let stats = PreferenceStats {
        chosen: chosen_rewards.len() as u64,
        rejected: rejected_rewards.len() as u64,
        loss: floats(&losses)?.iter().sum(),
        chosen_rewards: chosen_rewards.iter().sum(),
        rejected_rewards: rejected_rewards.iter().sum(),
        accurate: Some(ahead as u64),
        chosen_logps: floats(logps[0])?.iter().sum(),
        rejected_logps: floats(logps[1])?.iter().sum(),
        ..PreferenceStats::default()
    };
    Ok(PreferenceLosses { losses, chosen_rewards, rejected_rewards, stats })
}

/// Sums over a batch; those of several batches can be added.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PreferenceStats {
    /// Chosen (good) responses.
    pub chosen: u64,
    /// Rejected (bad) ones.
    pub rejected: u64,
    /// The losses.
    pub loss: f64,
    /// Implicit rewards of the chosen.
    pub chosen_rewards: f64,
    /// Of the rejected.
    pub rejected_rewards: f64,
    /// Pairs in which the chosen response has the higher reward; KTO has no pairs.
    pub accurate: Option<u64>,
    /// Log-probs of the chosen; ORPO's and SimPO's are per token.
    pub chosen_logps: f64,
    /// Of the rejected.
    pub rejected_logps: f64,
    /// ORPO: negative log-likelihood of the chosen responses.
    pub nll: f64,
    /// ORPO: number of tokens of the likelihood.
    pub nll_tokens: u64,
    /// ORPO: `log σ` of the log-odds ratios, as TRL's `log_odds_ratio`.
    pub log_odds_ratio: f64,
    /// ORPO: the log-odds ratios.
    pub log_odds_chosen: f64,
    /// KTO: the reference point, summed over responses, and their number.
    pub kl: Option<(f64, u64)>,
}

impl PreferenceStats {
    /// Adds another batch of the same step.
    pub(crate) fn add(&mut self, other: &Self) {
        self.chosen += other.chosen;
        self.rejected += other.rejected;
        self.loss += other.loss;
        self.chosen_rewards += other.chosen_rewards;
        self.rejected_rewards += other.rejected_rewards;
        self.accurate = match (self.accurate, other.accurate) {
            (Some(a), Some(b)) => Some(a + b),
            (a, b) => a.or(b),
        };
        self.chosen_logps += other.chosen_logps;
        self.rejected_logps += other.rejected_logps;
        self.nll += other.nll;
        self.nll_tokens += other.nll_tokens;
        self.log_odds_ratio += other.log_odds_ratio;
        self.log_odds_chosen += other.log_odds_chosen;
        self.kl = match (self.kl, other.kl) {
            (Some((a, m)), Some((b, n))) => Some((a + b, m + n)),
            (a, b) => a.or(b),
        };
    }

    /// Means under TRL's names. As in TRL, there are no metrics of chosen or rejected responses if there are
    /// none.
    pub fn metrics(&self) -> Vec<(&'static str, f64)> {
        let mut metrics = Vec::new();
        let mut side = |count: u64, [reward, logp]: [(&'static str, f64); 2]| {
            if count > 0 {
                metrics.push((reward.0, reward.1 / count as f64));
                metrics.push((logp.0, logp.1 / count as f64));
            }
        };
        let chosen = ("rewards/chosen", self.chosen_rewards);
        side(self.chosen, [chosen, ("logps/chosen", self.chosen_logps)]);
        let rejected = ("rewards/rejected", self.rejected_rewards);
        side(self.rejected, [rejected, ("logps/rejected", self.rejected_logps)]);
        if self.chosen > 0 && self.rejected > 0 {
            let chosen = self.chosen_rewards / self.chosen as f64;
            let rejected = self.rejected_rewards / self.rejected as f64;
            metrics.push(("rewards/margins", chosen - rejected));
        }
        if let Some(accurate) = self.accurate {
            metrics.push(("rewards/accuracies", accurate as f64 / self.chosen.max(1) as f64));
        }
        if self.nll_tokens > 0 {
            let pairs = self.chosen.max(1) as f64;
            metrics.push(("nll_loss", self.nll / self.nll_tokens as f64));
            metrics.push(("log_odds_ratio", self.log_odds_ratio / pairs));
            metrics.push(("log_odds_chosen", self.log_odds_chosen / pairs));
        }
        if let Some((kl, responses)) = self.kl {
            metrics.push(("kl", kl / responses.max(1) as f64));
        }
        metrics
    }
}
