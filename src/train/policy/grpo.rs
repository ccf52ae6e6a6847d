//! An update of GRPO and its variants (Shao et al. 2024): groups of responses to a prompt, whose advantages are
//! relative to the group.

use std::time::Instant;

use quantune_adapters::rng::Stream;
use serde_json::json;

use super::{Rollouts, Scored, divergence, finite, mean};
use crate::data::Prompt;
use crate::monitor::Monitor;
use crate::objectives::advantage::{GroupAdvantages, group_advantages, kl_k1, rloo_advantages};
use crate::objectives::policy::{GrpoSettings as GrpoLoss, per_token};
use crate::objectives::{Grpo, Objective, Stats};
use crate::rollout::{Response, respond};
use crate::train::TrainError;
use crate::train::learner::{AdapterLearner, MicroBatch};
use crate::train::metrics::{Numbers, stats_numbers};
use crate::train::progress::Work;
use crate::train::settings::{AdvantageEstimator, GrpoSettings};
use crate::train::state::State;

/// Log-probs and advantages of the responses of an update, before its optimizer steps.
struct GroupExperience {
    /// Log-probs under the policy before the update, if needed.
    old_logps: Option<Vec<Vec<f32>>>,
    /// Log-probs under the reference, if there is one.
    ref_logps: Option<Vec<Vec<f32>>>,
    groups: GroupAdvantages,
}

/// The optimizer steps of an update.
#[derive(Default)]
struct GrpoSteps {
    losses: Vec<f64>,
    norms: Vec<f64>,
    stats: Stats,
    /// The responses of the first step, and the log-probs of their tokens before it.
    first: Option<(Vec<usize>, Vec<f32>)>,
}

impl Rollouts {
    /// Runs an update.
    pub(super) fn grpo(
        &mut self,
        own: &GrpoSettings,
        learner: &mut AdapterLearner,
        state: &mut State,
        learning_rate: f64,
        monitor: Monitor<'_>,
    ) -> Result<(Numbers, Work), TrainError> {
        let (decoder, update) = (learner.decoder(), state.step);
        let prompts: Vec<Prompt> = self.prompts_of(update);
        let n = own.num_generations;
        let first_key = update * (prompts.len() * n) as u64;
        let scored = self.collect(decoder, learner.active(0), &prompts, n, first_key)?;
        let began = Instant::now();
        let experience = self.group_experience(own, learner, &scored)?;
        self.times.scoring += began.elapsed();
        let began = Instant::now();
        let responses = &scored.responses;
        let steps =
            self.learn_groups(own, learner, (update, learning_rate), responses, &experience)?;
        self.times.learning += began.elapsed();

        let numbers = self.grpo_numbers(&scored, &experience.groups, &steps, learning_rate);
        let GroupExperience { old_logps, ref_logps, groups } = experience;
        let divergences: Vec<f64> = match (&old_logps, &ref_logps) {
            (Some(old), Some(reference)) => {
                let k1 = |(old, reference): (&Vec<f32>, &Vec<f32>)| divergence(old, reference);
                old.iter().zip(reference).map(k1).collect()
            }
            _ => Vec::new(),
        };
        // With one step and no reference, old log-probs are not computed: they cannot be stale, since the ratio
        // is 1 by construction, but those of the step are compared with the sampler's.
        let (old, first) = (old_logps.as_deref(), steps.first.as_ref());
        self.warn_if_unhealthy(state, responses, old, first, &divergences, monitor);
        let table = (own.rollouts.sample_steps, own.rollouts.num_samples);
        self.sample_table(state, table, &scored, &divergences, monitor)?;
        let work = Work {
            headline: format!("reward {:.3}", groups.reward),
            tokens: responses.iter().map(Response::len).sum::<usize>() as u64,
            samples: responses.len() as u64,
            ..Work::default()
        };
        Ok((numbers, work))
    }

    /// Log-probs of the responses, if the settings need them, and advantages.
    fn group_experience(
        &self,
        own: &GrpoSettings,
        learner: &AdapterLearner,
        scored: &Scored,
    ) -> Result<GroupExperience, TrainError> {
        let (decoder, responses) = (learner.decoder(), &scored.responses);
        let temperature = own.rollouts.temperature;
        let mut old_logps = None;
        if self.task.needs_old_log_probs() {
            let policy = learner.active(0);
            old_logps = Some(respond::log_probs(decoder, policy, responses, temperature)?);
        }
        let mut ref_logps = None;
        if let Some(reference) = &self.reference {
            ref_logps = Some(respond::log_probs(decoder, reference, responses, temperature)?);
        }
        let mut totals: Vec<f32> =
            scored.totals.iter().map(|total| total.unwrap_or(f64::NAN) as f32).collect();
        let n = own.num_generations;
        let groups = match own.advantage {
            AdvantageEstimator::Grpo => group_advantages(&totals, n, own.scale_rewards),
            AdvantageEstimator::Rloo => {
                if let (Some(old), Some(reference)) = (&old_logps, &ref_logps) {
                    for ((total, old), reference) in totals.iter_mut().zip(old).zip(reference) {
                        let kl: f32 = old.iter().zip(reference).map(|(&p, &r)| kl_k1(p, r)).sum();
                        *total -= own.beta as f32 * kl;
                    }
                }
                rloo_advantages(&totals, n)
            }
        };
        Ok(GroupExperience { old_logps, ref_logps, groups })
    }

    /// Several passes over the responses, an optimizer step for each of their mini-batches.
    fn learn_groups(
        &self,
        own: &GrpoSettings,
        learner: &mut AdapterLearner,
        (update, learning_rate): (u64, f64),
        responses: &[Response],
        experience: &GroupExperience,
    ) -> Result<GrpoSteps, TrainError> {
        let mut steps = GrpoSteps::default();
        let n = own.num_generations;
        let prompts = responses.len() / n;
        for epoch in 0..own.num_iterations {
            // Whole groups, so that a prompt is computed once for all its responses.
            let mut order: Vec<usize> = (0..prompts).collect();
            let key = [update, epoch as u64];
            Stream::new(self.common.seed, "mini-batches", &key).shuffle(&mut order);
            for groups in order.chunks(prompts / own.rollouts.num_mini_batches) {
                let mini = groups.iter().flat_map(|group| group * n..(group + 1) * n);
                let mini: Vec<usize> = mini.collect();
                let (mini, parts) = self.grpo_parts(own, update, mini, responses, experience);
                if parts.is_empty() {
                    continue; // all of them truncated and masked
                }
                let stepped = learner.step(&parts, learning_rate)?;
                steps.first.get_or_insert((mini, stepped.logps));
                steps.losses.push(stepped.loss);
                steps.norms.push(stepped.grad_norm);
                steps.stats.add(stepped.stats);
            }
        }
        Ok(steps)
    }

    /// The micro-batches of a mini-batch, with the indices of the responses that are in them.
    fn grpo_parts(
        &self,
        own: &GrpoSettings,
        update: u64,
        mini: Vec<usize>,
        responses: &[Response],
        experience: &GroupExperience,
    ) -> (Vec<usize>, Vec<MicroBatch>) {
        let GroupExperience { old_logps, ref_logps, groups } = experience;
        let masked = |response: &Response| own.mask_truncated_completions && !response.ended;
        let by_response = own.advantage == AdvantageEstimator::Rloo;
        // Masked responses have no learned tokens, but count as responses.
        let counted = mini.iter().map(|&i| &responses[i]);
        let counted = counted.map(|row| if masked(row) { 0 } else { row.tokens.len() });
        let counted: Vec<usize> = counted.collect();
        let count = if by_response { mini.len() } else { own.loss_type.count(&counted) };
        let mini: Vec<usize> = mini.into_iter().filter(|&i| !masked(&responses[i])).collect();
        // With a single step over the responses, the policy is the one that sampled them.
        let several_steps = own.num_iterations > 1 || own.rollouts.num_mini_batches > 1;
        let part = |micro: &[usize]| {
            let rows: Vec<&Response> = micro.iter().map(|&i| &responses[i]).collect();
            let pick = |values: &Option<Vec<Vec<f32>>>| -> Option<Vec<f32>> {
                let values = values.as_ref()?;
                Some(micro.iter().flat_map(|&i| values[i].iter().copied()).collect())
            };
            let objective = grpo_objective(
                own,
                &rows,
                &micro.iter().map(|&i| groups.advantages[i]).collect::<Vec<f32>>(),
                several_steps.then(|| pick(old_logps)).flatten(),
                pick(ref_logps).filter(|_| !by_response),
            );
            MicroBatch {
                batch: respond::collate(&rows),
                objective,
                scale: 1.0 / count as f64,
                adapter: 0,
                epoch: update,
                temperature: own.rollouts.temperature,
            }
        };
        let parts = mini.chunks(self.common.per_device_train_batch_size).map(part).collect();
        (mini, parts)
    }

    /// The metrics of an update, under TRL's names where they exist.
    fn grpo_numbers(
        &self,
        scored: &Scored,
        groups: &GroupAdvantages,
        steps: &GrpoSteps,
        learning_rate: f64,
    ) -> Numbers {
        let responses = &scored.responses;
        let tokens: usize = responses.iter().map(|response| response.tokens.len()).sum();
        let clipped = responses.iter().filter(|response| !response.ended).count();
        let count = responses.len() as f64;
        let mut numbers: Numbers = vec![
            ("loss".into(), json!(mean(steps.losses.iter().copied()))),
            ("grad_norm".into(), json!(mean(steps.norms.iter().copied()))),
            ("learning_rate".into(), json!(learning_rate)),
            ("tokens".into(), json!(tokens)),
            ("reward".into(), json!(groups.reward)),
            ("reward_std".into(), json!(finite(groups.reward_std))),
            ("frac_reward_zero_std".into(), json!(groups.frac_reward_zero_std)),
            ("completions/mean_length".into(), json!(tokens as f64 / count)),
            ("completions/clipped_ratio".into(), json!(clipped as f64 / count)),
        ];
        for (source, column) in self.scorer.rewards.sources().iter().zip(&scored.columns) {
            let given: Vec<f64> = column.iter().copied().flatten().collect();
            let name = format!("rewards/{}/mean", source.name());
            numbers.push((name, json!(finite(mean(given.iter().copied())))));
        }
        numbers.extend(stats_numbers(&steps.stats));
        numbers
    }
}

/// The objective of a micro-batch of GRPO.
fn grpo_objective(
    own: &GrpoSettings,
    responses: &[&Response],
    advantages: &[f32],
    old_logps: Option<Vec<f32>>,
    ref_logps: Option<Vec<f32>>,
) -> Objective {
    let tokens: Vec<usize> = responses.iter().map(|response| response.tokens.len()).collect();
    let by_response = own.advantage == AdvantageEstimator::Rloo;
    let (advantages, weights) = if by_response {
        (advantages.to_vec(), vec![1.0; tokens.len()])
    } else {
        let each = per_token(advantages, &tokens);
        (each, own.loss_type.weights(&tokens, own.max_completion_length))
    };
    let settings = GrpoLoss {
        epsilon: own.epsilon,
        epsilon_high: if own.epsilon_high > 0.0 { own.epsilon_high } else { own.epsilon },
        beta: if by_response { 0.0 } else { own.beta },
    };
    Objective::Grpo(Box::new(Grpo {
        settings,
        tokens,
        old_logps,
        ref_logps,
        advantages,
        weights,
        by_response,
    }))
}
