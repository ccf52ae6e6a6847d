//! An update of GRPO and its forms (Shao et al. 2024): groups of responses to a prompt, compared with
//! one another.

use std::time::Instant;

use quantune_adapters::rng::Stream;
use serde_json::json;

use super::{Rollouts, divergence, finite, mean};
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

impl Rollouts {
    /// Takes an update.
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
        let responses = &scored.responses;
        let temperature = own.rollouts.temperature;
        // With one pass over the responses they are learned from by the policy that gave them.
        let again = own.num_iterations > 1 || own.rollouts.num_mini_batches > 1;
        let by_response = own.advantage == AdvantageEstimator::Rloo;
        let old = match again || self.reference.is_some() {
            true => Some(respond::log_probs(decoder, learner.active(0), responses, temperature)?),
            false => None,
        };
        let reference = match &self.reference {
            Some(active) => Some(respond::log_probs(decoder, active, responses, temperature)?),
            None => None,
        };
        let mut totals: Vec<f32> =
            scored.totals.iter().map(|total| total.unwrap_or(f64::NAN) as f32).collect();
        if let (true, Some(old), Some(reference)) = (by_response, &old, &reference) {
            for ((total, old), reference) in totals.iter_mut().zip(old).zip(reference) {
                let kl: f32 = old.iter().zip(reference).map(|(&p, &r)| kl_k1(p, r)).sum();
                *total -= own.beta as f32 * kl;
            }
        }
        let GroupAdvantages { advantages, reward, reward_std, frac_reward_zero_std } =
            match own.advantage {
                AdvantageEstimator::Grpo => group_advantages(&totals, n, own.scale_rewards),
                AdvantageEstimator::Rloo => rloo_advantages(&totals, n),
            };
        self.times.scoring += began.elapsed();

        let began = Instant::now();
        let masked = |response: &Response| own.mask_truncated_completions && !response.ended;
        let (mut losses, mut norms, mut stats) = (Vec::new(), Vec::new(), Stats::default());
        let mut first = None;
        for epoch in 0..own.num_iterations {
            // Whole groups, so that a prompt is read once for all its responses.
            let mut order: Vec<usize> = (0..prompts.len()).collect();
            let key = [update, epoch as u64];
            Stream::new(self.common.seed, "mini-batches", &key).shuffle(&mut order);
            for groups in order.chunks(prompts.len() / own.rollouts.num_mini_batches) {
                let mini: Vec<usize> =
                    groups.iter().flat_map(|group| group * n..(group + 1) * n).collect();
                // Masked responses have no tokens that count, but are responses.
                let counted = mini.iter().map(|&i| match masked(&responses[i]) {
                    true => 0,
                    false => responses[i].tokens.len(),
                });
                let counted: Vec<usize> = counted.collect();
                let count = match by_response {
                    true => mini.len(),
                    false => own.loss_type.count(&counted),
                };
                let mini: Vec<usize> =
                    mini.into_iter().filter(|&i| !masked(&responses[i])).collect();
                let parts: Vec<MicroBatch> = mini
                    .chunks(self.common.per_device_train_batch_size)
                    .map(|micro| {
                        let rows: Vec<&Response> = micro.iter().map(|&i| &responses[i]).collect();
                        let pick = |values: &Option<Vec<Vec<f32>>>| -> Option<Vec<f32>> {
                            let values = values.as_ref()?;
                            Some(micro.iter().flat_map(|&i| values[i].iter().copied()).collect())
                        };
                        let objective = grpo_objective(
                            own,
                            &rows,
                            &micro.iter().map(|&i| advantages[i]).collect::<Vec<f32>>(),
                            again.then(|| pick(&old)).flatten(),
                            pick(&reference).filter(|_| !by_response),
                        );
                        MicroBatch {
                            batch: respond::lay_out(&rows),
                            objective,
                            scale: 1.0 / count as f64,
                            adapter: 0,
                            epoch: update,
                            temperature,
                        }
                    })
                    .collect();
                if parts.is_empty() {
                    continue; // all of them truncated and left out
                }
                let stepped = learner.step(&parts, learning_rate)?;
                first.get_or_insert((mini, stepped.logps));
                losses.push(stepped.loss);
                norms.push(stepped.grad_norm);
                stats.add(stepped.stats);
            }
        }
        self.times.learning += began.elapsed();

        let tokens: usize = responses.iter().map(|response| response.tokens.len()).sum();
        let clipped = responses.iter().filter(|response| !response.ended).count();
        let count = responses.len() as f64;
        let mut numbers: Numbers = vec![
            ("loss".into(), json!(mean(losses.iter().copied()))),
            ("grad_norm".into(), json!(mean(norms.iter().copied()))),
            ("learning_rate".into(), json!(learning_rate)),
            ("tokens".into(), json!(tokens)),
            ("reward".into(), json!(reward)),
            ("reward_std".into(), json!(finite(reward_std))),
            ("frac_reward_zero_std".into(), json!(frac_reward_zero_std)),
            ("completions/mean_length".into(), json!(tokens as f64 / count)),
            ("completions/clipped_ratio".into(), json!(clipped as f64 / count)),
        ];
        for (source, column) in self.scorer.rewards.sources().iter().zip(&scored.columns) {
            let given: Vec<f64> = column.iter().copied().flatten().collect();
            let name = format!("rewards/{}/mean", source.name());
            numbers.push((name, json!(finite(mean(given.iter().copied())))));
        }
        numbers.extend(stats_numbers(&stats));
        let divergences: Vec<f64> = match (&old, &reference) {
            (Some(old), Some(reference)) => {
                let k1 = |(old, reference): (&Vec<f32>, &Vec<f32>)| divergence(old, reference);
                old.iter().zip(reference).map(k1).collect()
            }
            _ => Vec::new(),
        };
        let all: usize = responses.iter().map(Response::len).sum();
        let work = Work {
            headline: format!("reward {reward:.3}"),
            tokens: all as u64,
            samples: responses.len() as u64,
            ..Work::default()
        };
        // With one step and no reference no old log-probs were taken: stale ones cannot be then, since
        // the ratio is 1 by construction, but what the step read is held to the sampler's.
        self.warn_if_unhealthy(
            state,
            &scored.responses,
            old.as_deref(),
            first.as_ref(),
            &divergences,
            monitor,
        );
        let table = (own.rollouts.sample_steps, own.rollouts.num_samples);
        self.sample_table(state, table, &scored, &divergences, monitor)?;
        Ok((numbers, work))
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
