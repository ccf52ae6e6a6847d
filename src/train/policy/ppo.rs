//! An update of PPO (Schulman et al. 2017; Ziegler et al. 2019): responses, their advantages against
//! the value head, and several passes over them.

use std::time::Instant;

use quantune_adapters::rng::Stream;
use serde_json::json;

use super::{Rollouts, Scored, divergence, mean, rollouts_of};
use crate::data::{Batch, Prompt};
use crate::monitor::Monitor;
use crate::objectives::Objective;
use crate::objectives::advantage::AdaptiveKl;
use crate::objectives::policy::{PpoPolicyStats, PpoValueStats, ppo_metrics};
use crate::rollout::{AdvantageSettings, Experience, Response, ppo, respond};
use crate::train::TrainError;
use crate::train::learner::{AdapterLearner, MicroBatch, Trainable};
use crate::train::metrics::Numbers;
use crate::train::progress::Work;
use crate::train::settings::{PpoSettings, ValueModel};
use crate::train::state::State;

impl Rollouts {
    /// Runs an update.
    pub(super) fn ppo(
        &mut self,
        own: &PpoSettings,
        learner: &mut AdapterLearner,
        state: &mut State,
        learning_rate: f64,
        monitor: Monitor<'_>,
    ) -> Result<(Numbers, Work), TrainError> {
        let update = state.step;
        let prompts: Vec<Prompt> = self.prompts_of(update);
        let first_key = update * prompts.len() as u64;
        let scored = self.collect(learner.decoder(), learner.active(0), &prompts, 1, first_key)?;
        let began = Instant::now();
        let rows = self.experience(own, learner, state, &scored)?;
        self.times.scoring += began.elapsed();
        let began = Instant::now();
        let learned = self.learn(own, learner, update, learning_rate, &scored.responses, &rows)?;
        self.times.learning += began.elapsed();

        let divergences: Vec<f64> =
            rows.iter().map(|row| divergence(&row.old_logps, &row.ref_logps)).collect();
        let of_row = |row: &Experience| row.kl.iter().map(|&kl| f64::from(kl)).sum::<f64>();
        let kl = mean(rows.iter().map(of_row));
        let kl_coef = rollouts_of(state).kl_coef.unwrap_or(own.kl_coef);
        let mut numbers = numbers(&scored.responses, &rows, &learned, (kl, kl_coef), learning_rate);
        let episode = (update + 1) * scored.responses.len() as u64;
        numbers.push(("episode".into(), json!(episode)));
        let old: Vec<Vec<f32>> = rows.iter().map(|row| row.old_logps.clone()).collect();
        let first = learned.first.as_ref();
        self.warn_if_unhealthy(state, &scored.responses, Some(&old), first, &divergences, monitor);
        if own.target_kl > 0.0 {
            let mut adaptive =
                AdaptiveKl { kl_coef, target: own.target_kl, horizon: own.kl_horizon };
            adaptive.update(kl, scored.responses.len());
            rollouts_of(state).kl_coef = Some(adaptive.kl_coef);
        }
        let table = (own.rollouts.sample_steps, own.rollouts.num_samples);
        self.sample_table(state, table, &scored, &divergences, monitor)?;

        let scores = mean(rows.iter().map(|row| f64::from(row.score)));
        let work = Work {
            headline: format!("score {scores:.3}, KL {kl:.3}"),
            tokens: scored.responses.iter().map(Response::len).sum::<usize>() as u64,
            samples: scored.responses.len() as u64,
            ..Work::default()
        };
        Ok((numbers, work))
    }

    /// Log-probs of the responses under policy and reference, values, rewards and advantages.
    fn experience(
        &self,
        own: &PpoSettings,
        learner: &AdapterLearner,
        state: &mut State,
        scored: &Scored,
    ) -> Result<Vec<Experience>, TrainError> {
        let (decoder, responses) = (learner.decoder(), &scored.responses);
        let temperature = own.rollouts.temperature;
        let reference = self.reference.as_deref().unwrap_or_default();
        let reference = respond::log_probs(decoder, reference, responses, temperature)?;
        let valuer = usize::from(own.value_model == ValueModel::Own);
        let head = learner.trained.adapters[valuer].score.clone().expect("a value head was given");
        let (policy, valuer) = (learner.active(0), learner.active(valuer));
        let most = own.response_length;
        let [old, values] = match own.value_model {
            // Both come from one forward pass of the same adapter.
            ValueModel::Policy => {
                respond::log_probs_and_values(decoder, policy, &head, responses, temperature, most)?
            }
            ValueModel::Own => [
                respond::log_probs(decoder, policy, responses, temperature)?,
                respond::values(decoder, valuer, &head, responses, most)?,
            ],
        };

        let rollouts = rollouts_of(state);
        let raw: Vec<f32> = scored.totals.iter().map(|s| s.unwrap_or(0.0) as f32).collect();
        if own.normalize_scores {
            rollouts.moments.extend(&raw);
        }
        let score = |raw: f32, response: &Response| {
            let mut score = raw;
            if own.normalize_scores {
                score = rollouts.moments.normalize(score, true);
            }
            if own.clip_scores > 0.0 {
                score = score.clamp(-own.clip_scores as f32, own.clip_scores as f32);
            }
            let penalty = if response.ended { 0.0 } else { own.missing_eos_penalty };
            score - penalty as f32
        };
        let mut rows: Vec<Experience> = responses
            .iter()
            .zip(raw)
            .zip(old.into_iter().zip(reference).zip(values))
            .map(|((response, raw), ((old_logps, ref_logps), values))| Experience {
                old_logps,
                ref_logps,
                values,
                score: score(raw, response),
                ..Experience::default()
            })
            .collect();
        let settings = AdvantageSettings {
            kl_coef: rollouts.kl_coef.unwrap_or(own.kl_coef),
            kl_estimator: own.kl_estimator,
            gamma: own.gamma,
            lam: own.lam,
            whiten_rewards: own.whiten_rewards,
        };
        ppo::finish(&mut rows, &settings);
        Ok(rows)
    }

    /// Several passes over the responses, an optimizer step for each of their mini-batches.
    fn learn(
        &mut self,
        own: &PpoSettings,
        learner: &mut AdapterLearner,
        update: u64,
        learning_rate: f64,
        responses: &[Response],
        rows: &[Experience],
    ) -> Result<PpoStepStats, TrainError> {
        let mut learned = PpoStepStats::default();
        for epoch in 0..own.num_ppo_epochs {
            let mut order: Vec<usize> = (0..rows.len()).collect();
            let key = [update, epoch as u64];
            Stream::new(self.common.seed, "mini-batches", &key).shuffle(&mut order);
            for mini in order.chunks(rows.len() / own.rollouts.num_mini_batches) {
                let counts =
                    ppo::MiniBatchCounts::of(&mini.iter().map(|&i| &rows[i]).collect::<Vec<_>>());
                let mut parts = Vec::new();
                for micro in mini.chunks(self.common.per_device_train_batch_size) {
                    let responses: Vec<&Response> = micro.iter().map(|&i| &responses[i]).collect();
                    let rows: Vec<&Experience> = micro.iter().map(|&i| &rows[i]).collect();
                    let batch = respond::collate(&responses);
                    let policy = ppo::policy_part(&rows, counts, own.cliprange);
                    let (vf_coef, cliprange) = (own.vf_coef, own.cliprange_value);
                    let value = ppo::value_part(&rows, &batch, counts, vf_coef, cliprange);
                    let part = |batch: Batch, objective, adapter| MicroBatch {
                        batch,
                        objective,
                        scale: 1.0,
                        adapter,
                        epoch: update,
                        temperature: own.rollouts.temperature,
                    };
                    match own.value_model {
                        ValueModel::Policy => {
                            parts.push(part(batch, ppo::objective(Some(policy), Some(value)), 0));
                        }
                        ValueModel::Own => {
                            let objective = ppo::objective(Some(policy), None);
                            parts.push(part(batch.clone(), objective, 0));
                            parts.push(part(batch, ppo::objective(None, Some(value)), 1));
                        }
                    }
                }
                parts.extend(self.ptx_part(own, learner.trained.optimizer_steps()));
                let stepped = learner.step(&parts, learning_rate)?;
                learned.first.get_or_insert_with(|| (mini.to_vec(), stepped.logps));
                learned.losses.push(stepped.loss);
                learned.norms.push(stepped.grad_norm);
                learned.policies.extend(stepped.stats.policy);
                learned.values.extend(stepped.stats.value);
            }
        }
        Ok(learned)
    }

    /// The PPO-ptx text rows of an optimizer step.
    fn ptx_part(&mut self, own: &PpoSettings, optimizer_step: u64) -> Option<MicroBatch> {
        let (data, sampler) = self.ptx.as_mut()?;
        let size = self.common.per_device_train_batch_size as u64;
        let places = optimizer_step * size..(optimizer_step + 1) * size;
        let rows: Vec<usize> = places.map(|place| sampler.row_at(place)).collect();
        let batch = Batch::gather(&data.rows, &[rows]);
        let scale = own.ptx_coef / batch.count().max(1) as f64;
        Some(MicroBatch {
            batch,
            objective: Objective::LanguageModeling,
            scale,
            adapter: 0,
            epoch: optimizer_step,
            temperature: 1.0,
        })
    }
}

/// Statistics of the optimizer steps of an update.
#[derive(Debug, Default)]
struct PpoStepStats {
    losses: Vec<f64>,
    norms: Vec<f64>,
    policies: Vec<PpoPolicyStats>,
    values: Vec<PpoValueStats>,
    /// The responses of the first step, and the log-probs of their tokens before it.
    first: Option<(Vec<usize>, Vec<f32>)>,
}

/// The metrics of an update, under TRL's names where they exist.
fn numbers(
    responses: &[Response],
    rows: &[Experience],
    learned: &PpoStepStats,
    (kl, kl_coef): (f64, f64),
    learning_rate: f64,
) -> Numbers {
    let of = |value: &dyn Fn(&Experience) -> f64| mean(rows.iter().map(value));
    let penalty = of(&|row| -kl_coef * row.kl.iter().map(|&kl| f64::from(kl)).sum::<f64>());
    let scores = of(&|row| f64::from(row.score));
    let entropy = of(&|row| -row.old_logps.iter().map(|&logp| f64::from(logp)).sum::<f64>());
    let tokens: usize = responses.iter().map(|response| response.tokens.len()).sum();
    let ended = responses.iter().filter(|response| response.ended).count();
    let mut numbers: Numbers = vec![
        ("loss".into(), json!(mean(learned.losses.iter().copied()))),
        ("grad_norm".into(), json!(mean(learned.norms.iter().copied()))),
        ("learning_rate".into(), json!(learning_rate)),
        ("tokens".into(), json!(tokens)),
        ("objective/kl".into(), json!(kl)),
        ("objective/entropy".into(), json!(entropy)),
        ("objective/non_score_reward".into(), json!(penalty)),
        ("objective/rlhf_reward".into(), json!(scores + penalty)),
        ("objective/scores".into(), json!(scores)),
        ("objective/kl_coef".into(), json!(kl_coef)),
    ];
    let of_steps = ppo_metrics(&learned.policies, &learned.values).into_iter();
    numbers.extend(of_steps.map(|(key, value)| (key.to_string(), json!(value))));
    numbers.push(("val/num_eos_tokens".into(), json!(ended)));
    numbers.push(("length".into(), json!(tokens as f64 / responses.len() as f64)));
    numbers
}
