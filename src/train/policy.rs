//! Reinforcement learning: responses of the policy to the prompts of a file, their rewards, and what
//! is learned from them. One update of PPO or GRPO is one step of the loop.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use quantune_adapters::delta::Adapter;
use quantune_adapters::rng::Stream;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::TrainError;
use super::fingerprints::folder_fingerprint;
use super::learner::{Learner, MicroBatch};
use super::log::{Log, Numbers};
use super::lora::read_scoring;
use super::progress::{Progress, Work};
use super::reference;
use super::run::{strategy, total_steps};
use super::run_dir::{Fingerprint, RunDir, State, read_accuracy};
use super::settings::{
    AdvantageEstimator, CommonSettings, EvalStrategy, GrpoSettings, PpoSettings, RunSettings, Task,
    ValueModel,
};
use super::supervised::metrics;
use crate::data::{Batch, Dataset, Prompt, Prompts};
use crate::eval::{Reply, diversity};
use crate::generate::{Sampling, Settings as Generation};
use crate::model::{CacheType, Decoder, Worn};
use crate::objectives::advantage::{
    AdaptiveKl, GroupAdvantages, RunningMoments, group_advantages, kl_k1, rloo_advantages,
};
use crate::objectives::policy::{GrpoSettings as GrpoLoss, ppo_metrics};
use crate::objectives::{Grpo, Objective, Stats};
use crate::ops::Compute;
use crate::rollout::diagnose::{mean_and_error, overoptimized};
use crate::rollout::{
    AdvantageSettings, Evidence, Experience, Response, RewardCommand, RewardModel, RewardSource,
    Rewards, Sample, SampleLog, SampleRow, diagnose, ppo, respond, table,
};
use crate::text::Tokenizer;
use crate::weights::write_atomically;

/// Keys of evaluations' responses begin here; those of training stay below.
const EVAL_KEYS: u64 = 1 << 39;

/// What of a run's state only reinforcement learning has.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RolloutState {
    /// Weight of the divergence now.
    pub kl_coef: Option<f64>,
    /// Mean and variance of the scores so far.
    pub moments: RunningMoments,
    /// Bytes of `samples.jsonl` that belong to the steps so far.
    pub samples_bytes: u64,
}

/// Where the time of updates goes.
#[derive(Debug, Clone, Copy, Default)]
struct Times {
    generation: Duration,
    scoring: Duration,
    learning: Duration,
}

/// The prompts of a run, what judges the responses, and where it stands.
pub struct Rollouts {
    common: CommonSettings,
    task: Task,
    tokenizer: Tokenizer,
    compute: Compute,
    prompts: Prompts,
    held_out: Option<Prompts>,
    held_out_lines: Option<Vec<u8>>,
    ptx: Option<Dataset>,
    /// What the reference wears, if one is asked for.
    reference: Option<Vec<Worn>>,
    /// Scores by adapters on the base: rewards first, the judge last.
    scorers: Vec<Vec<Worn>>,
    judge: Option<Vec<Worn>>,
    reward_model: Option<RewardModel>,
    rewards: Rewards,
    /// What the chat template writes behind an ended answer, if the prompts are conversations: reward
    /// models have read it there.
    after_turn: Vec<u32>,
    samples: Option<SampleLog>,
    times: Times,
    /// Sick updates so far, to say each thing once.
    told: Vec<String>,
    prints: Vec<Fingerprint>,
}

/// Responses and what was given for them.
struct Scored {
    responses: Vec<Response>,
    texts: Vec<String>,
    /// For each reward all responses' values; none where it has no opinion.
    columns: Vec<Vec<Option<f64>>>,
    /// The weighted sums.
    totals: Vec<Option<f64>>,
}

impl Rollouts {
    /// Reads the prompts and loads what judges.
    pub fn load(
        settings: &RunSettings,
        decoder: &Decoder,
        tokenizer: Tokenizer,
        stop: &AtomicBool,
    ) -> Result<Self, TrainError> {
        let common = settings.common.clone();
        let most = common.max_length.min(decoder.config.max_position_embeddings);
        let length = response_length(&settings.task);
        if length >= most {
            let fault = format!(
                "responses may have {length} tokens and prompt and response together {most} \
                 (max_length or the model's window): no room is left for a prompt"
            );
            return Err(TrainError::Settings(fault));
        }
        let load = |path: &Path| Prompts::load(path, &tokenizer, most - length, stop);
        let given = !common.eval_data.as_os_str().is_empty();
        let (prompts, held_out, held_out_lines) = if strategy(&common) == EvalStrategy::No {
            (load(&common.data)?, None, None)
        } else if given {
            (load(&common.data)?, Some(load(&common.eval_data)?), None)
        } else {
            let split = Prompts::load_split(&common.data, &tokenizer, most - length, stop)?;
            let lines = split.held_out.is_some().then_some(split.held_out_lines);
            (split.train, split.held_out, lines)
        };
        let (count, longest) = (prompts.prompts.len(), prompts.longest);
        eprintln!("data: {count} prompts, longest {longest} tokens");

        let mut prints: Vec<Fingerprint> = Vec::new();
        let print = |prints: &mut Vec<Fingerprint>, what: &str, folder: &Path| {
            if !folder.as_os_str().is_empty() {
                prints.push((what.to_string(), folder_fingerprint(folder)?));
            }
            Ok::<(), TrainError>(())
        };
        let scoring = |folder: &Path, least: f64| -> Result<Vec<Worn>, TrainError> {
            trusted(folder, least)?;
            Ok(vec![Worn::frozen(Arc::new(read_scoring(folder, decoder)?))])
        };
        let (mut scorers, mut judge, mut ptx, mut reward_model) = (Vec::new(), None, None, None);
        let (rewards, wants_reference, ref_adapter) = match &settings.task {
            Task::Ppo(own) => {
                print(&mut prints, "the reward adapter", &own.reward_adapter)?;
                scorers.push(scoring(&own.reward_adapter, own.min_reward_accuracy)?);
                if !own.judge_adapter.as_os_str().is_empty() {
                    print(&mut prints, "the judge", &own.judge_adapter)?;
                    judge = Some(scoring(&own.judge_adapter, 0.0)?);
                }
                if !own.ptx_data.as_os_str().is_empty() {
                    let data = Dataset::load(&own.ptx_data, &tokenizer, most, stop)?;
                    prints.push(("the ptx data".into(), data.sha256.clone()));
                    ptx = Some(data);
                }
                let source = RewardSource::Model { name: "reward_adapter".into() };
                (Rewards::new(vec![source], None)?, true, &own.ref_adapter)
            }
            Task::Grpo(own) => {
                let mut sources = Vec::new();
                for spec in &own.reward {
                    let source = RewardSource::rule(spec);
                    sources.push(source.map_err(|e| TrainError::Settings(e.to_string()))?);
                }
                for command in &own.reward_command {
                    let timeout = Duration::from_secs_f64(own.reward_timeout);
                    let command = RewardCommand::start(command, timeout)?;
                    sources.push(RewardSource::Command(command));
                }
                if !own.reward_adapter.as_os_str().is_empty() {
                    print(&mut prints, "the reward adapter", &own.reward_adapter)?;
                    scorers.push(scoring(&own.reward_adapter, own.min_reward_accuracy)?);
                    sources.push(RewardSource::Model { name: "reward_adapter".into() });
                }
                if !own.reward_model.as_os_str().is_empty() {
                    print(&mut prints, "the reward model", &own.reward_model)?;
                    reward_model = Some(RewardModel::load(&own.reward_model, decoder.compute)?);
                    sources.push(RewardSource::Model { name: "reward_model".into() });
                }
                let weights = &own.reward_weights;
                let weights = (!weights.is_empty()).then(|| weights.clone());
                (Rewards::new(sources, weights)?, own.beta > 0.0, &own.ref_adapter)
            }
            Task::Sft(_) | Task::Reward(_) | Task::Dpo(_) => {
                unreachable!("they learn from rows as they are")
            }
        };
        let held_out_file = if given { &common.eval_data } else { &common.data };
        let files = [(&common.data, Some(&prompts)), (held_out_file, held_out.as_ref())];
        for (path, prompts) in files {
            for prompt in prompts.iter().flat_map(|prompts| &prompts.prompts) {
                rewards.check(&prompt.row).map_err(|e| {
                    let (path, line) = (path.display(), prompt.line);
                    TrainError::Settings(format!("{path}:{line}: {e}"))
                })?;
            }
        }
        let folder = match ref_adapter.as_os_str().is_empty() {
            true => &common.adapter,
            false => ref_adapter,
        };
        if wants_reference {
            print(&mut prints, "the reference adapter", folder)?;
        }
        let reference = match wants_reference {
            true => Some(reference::worn(folder, decoder)?),
            false => None,
        };
        let chats = prompts.prompts.iter().any(|prompt| prompt.row["prompt"].is_array());
        let after_turn = if chats { tokenizer.after_turn()? } else { Vec::new() };
        Ok(Self {
            task: settings.task.clone(),
            common,
            tokenizer,
            after_turn,
            compute: decoder.compute,
            prompts,
            held_out,
            held_out_lines,
            ptx,
            reference,
            scorers,
            judge,
            reward_model,
            rewards,
            samples: None,
            times: Times::default(),
            told: Vec::new(),
            prints,
        })
    }

    /// Hashes of what was read.
    pub fn fingerprints(&self) -> Result<Vec<Fingerprint>, TrainError> {
        let mut prints = vec![("the data".to_string(), self.prompts.sha256.clone())];
        if let Some(held_out) = &self.held_out {
            prints.push(("the held-out data".into(), held_out.sha256.clone()));
        }
        prints.extend(self.prints.iter().cloned());
        Ok(prints)
    }

    /// Takes up the run.
    pub fn begin(&mut self, run: &RunDir, state: &mut State) -> Result<(), TrainError> {
        if let Some(lines) = &self.held_out_lines {
            write_atomically(run.file("held_out.jsonl"), |file| {
                std::io::Write::write_all(file, lines)
            })?;
        }
        let rollouts = state.rollouts.get_or_insert_default();
        if let Task::Ppo(own) = &self.task {
            rollouts.kl_coef.get_or_insert(own.kl_coef);
        }
        let path = run.file("samples.jsonl");
        self.samples = Some(SampleLog::open(&path, rollouts.samples_bytes)?);
        Ok(())
    }

    /// Updates of the run.
    pub fn total_steps(&self) -> u64 {
        let prompts = self.prompts.prompts.len() as u64;
        total_steps(&self.common, prompts.div_ceil(self.batch_size() as u64))
    }

    /// Tokens of the largest micro-batch there can be.
    pub fn largest_micro_batch(&self) -> usize {
        let longest = self.prompts.prompts.iter().map(|prompt| prompt.tokens.len()).max();
        let row = longest.unwrap_or(0) + response_length(&self.task);
        row * self.common.per_device_train_batch_size
    }

    /// Whether the updates so far have been through all prompts again.
    pub fn epoch_ends(&self, state: &State) -> bool {
        let (batch, all) = (self.batch_size() as u64, self.prompts.prompts.len() as u64);
        let epoch = |step: u64| step * batch / all.max(1);
        state.step > 0 && epoch(state.step) != epoch(state.step - 1)
    }

    /// Takes an update.
    pub fn step(
        &mut self,
        learner: &mut Learner,
        state: &mut State,
        learning_rate: f64,
    ) -> Result<(Numbers, Work), TrainError> {
        match self.task.clone() {
            Task::Ppo(own) => self.ppo(&own, learner, state, learning_rate),
            Task::Grpo(own) => self.grpo(&own, learner, state, learning_rate),
            _ => unreachable!("they learn from rows as they are"),
        }
    }

    fn ppo(
        &mut self,
        own: &PpoSettings,
        learner: &mut Learner,
        state: &mut State,
        learning_rate: f64,
    ) -> Result<(Numbers, Work), TrainError> {
        let (decoder, update) = (learner.decoder(), state.step);
        let prompts: Vec<Prompt> = self.prompts_of(update);
        let first_key = update * prompts.len() as u64;
        let scored = self.collect(decoder, learner.worn(0), &prompts, 1, first_key)?;
        let began = Instant::now();
        let responses = &scored.responses;
        let temperature = own.temperature;
        let old = respond::log_probs(decoder, learner.worn(0), responses, temperature)?;
        let reference = self.reference.as_deref().unwrap_or_default();
        let reference = respond::log_probs(decoder, reference, responses, temperature)?;
        let valuer = usize::from(own.value_model == ValueModel::Own);
        let head = learner.adapters[valuer].score.clone().expect("a value head was given");
        let worn = learner.worn(valuer);
        let values = respond::values(decoder, worn, &head, responses, own.response_length)?;

        let rollouts = state.rollouts.get_or_insert_default();
        let kl_coef = rollouts.kl_coef.unwrap_or(own.kl_coef);
        let raw: Vec<f32> = scored.totals.iter().map(|s| s.unwrap_or(0.0) as f32).collect();
        if own.normalize_scores {
            rollouts.moments.extend(&raw);
        }
        let moments = rollouts.moments;
        let score = |raw: f32, response: &Response| {
            let mut score = raw;
            if own.normalize_scores {
                score = moments.normalize(score, true);
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
        ppo::finish(
            &mut rows,
            &AdvantageSettings {
                kl_coef,
                kl_estimator: own.kl_estimator,
                gamma: own.gamma,
                lam: own.lam,
                whiten_rewards: own.whiten_rewards,
            },
        );
        self.times.scoring += began.elapsed();

        let began = Instant::now();
        let (mut policies, mut valued) = (Vec::new(), Vec::new());
        let (mut losses, mut norms) = (Vec::new(), Vec::new());
        for epoch in 0..own.num_ppo_epochs {
            let mut order: Vec<usize> = (0..rows.len()).collect();
            let key = [update, epoch as u64];
            Stream::new(self.common.seed, "mini-batches", &key).shuffle(&mut order);
            for mini in order.chunks(rows.len() / own.num_mini_batches) {
                let counts = ppo::Counts::of(&mini.iter().map(|&i| &rows[i]).collect::<Vec<_>>());
                let mut parts = Vec::new();
                for micro in mini.chunks(self.common.per_device_train_batch_size) {
                    let responses: Vec<&Response> = micro.iter().map(|&i| &responses[i]).collect();
                    let rows: Vec<&Experience> = micro.iter().map(|&i| &rows[i]).collect();
                    let batch = respond::lay_out(&responses);
                    let policy = ppo::policy_part(&rows, counts, own.cliprange);
                    let (vf_coef, cliprange) = (own.vf_coef, own.cliprange_value);
                    let value = ppo::value_part(&rows, &batch, counts, vf_coef, cliprange);
                    let part = |batch: Batch, objective, adapter| MicroBatch {
                        batch,
                        objective,
                        scale: 1.0,
                        adapter,
                        epoch: update,
                        temperature,
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
                parts.extend(self.ptx_part(own, learner.optimizer.step));
                let stepped = learner.step(&parts, learning_rate)?;
                losses.push(stepped.loss);
                norms.push(stepped.grad_norm);
                policies.extend(stepped.stats.policy);
                valued.extend(stepped.stats.value);
            }
        }
        self.times.learning += began.elapsed();

        let of = |value: &dyn Fn(&Experience) -> f64| mean(rows.iter().map(value));
        let k1 = |row: &Experience| -> f64 {
            let both = row.old_logps.iter().zip(&row.ref_logps);
            both.map(|(&p, &r)| f64::from(kl_k1(p, r))).sum()
        };
        let divergences: Vec<f64> = rows.iter().map(k1).collect();
        let kl = mean(divergences.iter().copied());
        let penalty = of(&|row| -kl_coef * row.kl.iter().map(|&kl| f64::from(kl)).sum::<f64>());
        let scores = of(&|row| f64::from(row.score));
        let entropy = of(&|row| -row.old_logps.iter().map(|&logp| f64::from(logp)).sum::<f64>());
        let tokens: usize = responses.iter().map(|response| response.tokens.len()).sum();
        let mut numbers: Numbers = vec![
            ("loss".into(), json!(mean(losses.iter().copied()))),
            ("grad_norm".into(), json!(mean(norms.iter().copied()))),
            ("learning_rate".into(), json!(learning_rate)),
            ("tokens".into(), json!(tokens)),
            ("objective/kl".into(), json!(kl)),
            ("objective/entropy".into(), json!(entropy)),
            ("objective/non_score_reward".into(), json!(penalty)),
            ("objective/rlhf_reward".into(), json!(scores + penalty)),
            ("objective/scores".into(), json!(scores)),
            ("objective/kl_coef".into(), json!(kl_coef)),
        ];
        for (key, value) in ppo_metrics(&policies, &valued) {
            numbers.push((key.into(), json!(value)));
        }
        let ended = responses.iter().filter(|response| response.ended).count();
        numbers.push(("val/num_eos_tokens".into(), json!(ended)));
        numbers.push(("length".into(), json!(tokens as f64 / responses.len() as f64)));
        numbers.push(("episode".into(), json!((update + 1) * responses.len() as u64)));

        // Dropout alone makes another policy of the one that learns.
        let first = policies.first().filter(|_| self.common.lora_dropout == 0.0);
        let first_approxkl = first.map_or(0.0, |p| p.approxkl / p.tokens.max(1) as f64);
        self.tell_sickness(&scored.responses, &rows, first_approxkl, &divergences);
        if own.target_kl > 0.0 {
            let mut adaptive =
                AdaptiveKl { kl_coef, target: own.target_kl, horizon: own.kl_horizon };
            adaptive.update(kl, responses.len());
            rollouts_of(state).kl_coef = Some(adaptive.kl_coef);
        }
        self.sample_table(state, own.sample_steps, own.num_samples, &scored, &divergences)?;
        let all: usize = scored.responses.iter().map(Response::len).sum();
        let work = Work {
            headline: format!("score {scores:.3}, KL {kl:.3}"),
            tokens: all as u64,
            samples: scored.responses.len() as u64,
        };
        Ok((numbers, work))
    }

    fn grpo(
        &mut self,
        own: &GrpoSettings,
        learner: &mut Learner,
        state: &mut State,
        learning_rate: f64,
    ) -> Result<(Numbers, Work), TrainError> {
        let (decoder, update) = (learner.decoder(), state.step);
        let prompts: Vec<Prompt> = self.prompts_of(update);
        let n = own.num_generations;
        let first_key = update * (prompts.len() * n) as u64;
        let scored = self.collect(decoder, learner.worn(0), &prompts, n, first_key)?;
        let began = Instant::now();
        let responses = &scored.responses;
        let temperature = own.temperature;
        // With one pass over the responses they are learned from by the policy that gave them.
        let again = own.num_iterations > 1 || own.num_mini_batches > 1;
        let by_response = own.advantage == AdvantageEstimator::Rloo;
        let old = match again || by_response && own.beta > 0.0 {
            true => Some(respond::log_probs(decoder, learner.worn(0), responses, temperature)?),
            false => None,
        };
        let reference = match &self.reference {
            Some(worn) => Some(respond::log_probs(decoder, worn, responses, temperature)?),
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
                AdvantageEstimator::Rloo => rloo_advantages(&totals, n, false),
            };
        self.times.scoring += began.elapsed();

        let began = Instant::now();
        let masked = |response: &Response| own.mask_truncated_completions && !response.ended;
        let (mut losses, mut norms, mut stats) = (Vec::new(), Vec::new(), Stats::default());
        for epoch in 0..own.num_iterations {
            // Whole groups, so that a prompt is read once for all its responses.
            let mut order: Vec<usize> = (0..prompts.len()).collect();
            let key = [update, epoch as u64];
            Stream::new(self.common.seed, "mini-batches", &key).shuffle(&mut order);
            for groups in order.chunks(prompts.len() / own.num_mini_batches) {
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
        for (source, column) in self.rewards.sources().iter().zip(&scored.columns) {
            let given: Vec<f64> = column.iter().copied().flatten().collect();
            let name = format!("rewards/{}/mean", source.name());
            numbers.push((name, json!(finite(mean(given.iter().copied())))));
        }
        numbers.extend(metrics(&stats));
        let divergences: Vec<f64> = match (&old, &reference) {
            (Some(old), Some(reference)) => {
                let k1 = |(old, reference): (&Vec<f32>, &Vec<f32>)| -> f64 {
                    old.iter().zip(reference).map(|(&p, &r)| f64::from(kl_k1(p, r))).sum()
                };
                old.iter().zip(reference).map(k1).collect()
            }
            _ => Vec::new(),
        };
        let all: usize = responses.iter().map(Response::len).sum();
        let work = Work {
            headline: format!("reward {reward:.3}"),
            tokens: all as u64,
            samples: responses.len() as u64,
        };
        let rows: Vec<Experience> = old
            .unwrap_or_default()
            .into_iter()
            .map(|old_logps| Experience { old_logps, ..Experience::default() })
            .collect();
        self.tell_sickness(&scored.responses, &rows, 0.0, &divergences);
        self.sample_table(state, own.sample_steps, own.num_samples, &scored, &divergences)?;
        Ok((numbers, work))
    }

    /// Held-out prompts answered by the policy as it is; `None` if `stop` was set before all were.
    pub fn evaluate(
        &mut self,
        decoder: &Decoder,
        adapter: &Arc<Adapter>,
        log: &Log,
        stop: &AtomicBool,
    ) -> Result<Option<Numbers>, TrainError> {
        let Some(held_out) = &self.held_out else { return Ok(Some(Vec::new())) };
        let most = match &self.task {
            Task::Ppo(own) => own.eval_prompts,
            Task::Grpo(own) => own.eval_prompts,
            _ => 0,
        };
        let most = if most == 0 { held_out.prompts.len() } else { most };
        let prompts: Vec<Prompt> = held_out.prompts.iter().take(most).cloned().collect();
        let worn = [Worn::frozen(adapter.clone())];
        let times = self.times;
        let (mut totals, mut judged, mut kls, mut replies) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut ended, mut surprise, mut tokens) = (0, 0.0, 0);
        // A stop is looked at between batches; keys are by row, so they change nothing.
        for (first, prompts) in prompts.chunks(64).enumerate() {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let key = EVAL_KEYS + 64 * first as u64;
            let scored = self.collect(decoder, &worn, prompts, 1, key)?;
            let temperature = temperature(&self.task);
            let logps = respond::log_probs(decoder, &worn, &scored.responses, temperature)?;
            surprise -= logps.iter().flatten().map(|&logp| f64::from(logp)).sum::<f64>();
            if let Some(reference) = &self.reference {
                let reference =
                    respond::log_probs(decoder, reference, &scored.responses, temperature)?;
                let k1 = |(old, reference): (&Vec<f32>, &Vec<f32>)| -> f64 {
                    old.iter().zip(reference).map(|(&p, &r)| f64::from(kl_k1(p, r))).sum()
                };
                kls.extend(logps.iter().zip(&reference).map(k1));
            }
            if let Some(judge) = &self.judge {
                let scores = self.adapter_scores(decoder, judge, &scored.responses)?;
                judged.extend(scores.into_iter().map(f64::from));
            }
            totals.extend(scored.totals.iter().flatten());
            for response in scored.responses {
                ended += usize::from(response.ended);
                tokens += response.tokens.len();
                replies.push((response.tokens, response.ended));
            }
        }
        self.times = times;
        let (reward, error) = mean_and_error(&totals);
        let mut numbers: Numbers = vec![
            ("eval_reward".into(), json!(reward)),
            ("eval_reward_error".into(), json!(error)),
            ("eval_length".into(), json!(tokens as f64 / replies.len().max(1) as f64)),
            ("eval_ended".into(), json!(ended as f64 / replies.len().max(1) as f64)),
            ("eval_entropy".into(), json!(surprise / tokens.max(1) as f64)),
        ];
        if !kls.is_empty() {
            let (kl, error) = mean_and_error(&kls);
            numbers.push(("eval_kl".into(), json!(kl)));
            numbers.push(("eval_kl_error".into(), json!(error)));
        }
        let replies: Vec<Reply> = replies
            .iter()
            .map(|(tokens, finished)| Reply { tokens, finished: *finished })
            .collect();
        let spread = diversity(&replies);
        numbers.push(("eval_distinct_1".into(), json!(spread.distinct_1)));
        numbers.push(("eval_distinct_2".into(), json!(spread.distinct_2)));
        numbers.push(("eval_distinct_3".into(), json!(spread.distinct_3)));
        numbers.push(("eval_duplicates".into(), json!(spread.duplicates)));
        if !judged.is_empty() {
            let (judge, error) = mean_and_error(&judged);
            numbers.push(("eval_judge".into(), json!(judge)));
            numbers.push(("eval_judge_error".into(), json!(error)));
            let curve = |key: &str, now: (f64, f64)| -> Result<Vec<(f64, f64)>, TrainError> {
                let errors = log.values(&format!("{key}_error"))?;
                let before = log.values(key)?.into_iter().zip(errors);
                Ok(before.chain([now]).collect())
            };
            let rewards = curve("eval_reward", (reward, totals_error(&totals)))?;
            if overoptimized(&rewards, &curve("eval_judge", (judge, error))?) {
                self.tell(
                    "over-optimization: the reward rises while the judge, a reward model that is not \
                     trained against, falls; earlier checkpoints are better, a larger kl_coef helps"
                        .into(),
                );
            }
        }
        Ok(Some(numbers))
    }

    /// What the command's JSON says beside the common part.
    pub fn results(
        &self,
        log: &Log,
        progress: &Progress,
    ) -> Result<Map<String, Value>, TrainError> {
        let mut results = Map::new();
        let prompts =
            json!({ "prompts": self.prompts.prompts.len(), "longest": self.prompts.longest });
        results.insert("data".into(), prompts);
        results.insert("samples_per_second".into(), json!(progress.samples_per_second()));
        let Times { generation, scoring, learning } = self.times;
        let all = (generation + scoring + learning).as_secs_f64().max(1e-9);
        for (name, time) in
            [("generation", generation), ("scoring", scoring), ("learning", learning)]
        {
            results.insert(format!("share_{name}"), json!(time.as_secs_f64() / all));
        }
        for key in ["objective/scores", "objective/kl", "reward"] {
            let values = log.values(key)?;
            if let (Some(first), Some(last)) = (values.first(), values.last()) {
                results.insert(format!("{key}_first"), json!(first));
                results.insert(format!("{key}_last"), json!(last));
            }
        }
        for key in ["eval_reward", "eval_kl", "eval_judge", "eval_length"] {
            let values = log.values(key)?;
            if let (Some(first), Some(last)) = (values.first(), values.last()) {
                results.insert(format!("{key}_first"), json!(first));
                results.insert(format!("{key}_last"), json!(last));
            }
        }
        results.insert("warnings".into(), json!(self.told));
        Ok(results)
    }

    fn batch_size(&self) -> usize {
        match &self.task {
            Task::Ppo(own) => own.batch_size,
            Task::Grpo(own) => own.batch_size,
            _ => 1,
        }
    }

    /// The prompts of an update: all of them in turn, in another order each time around.
    fn prompts_of(&self, update: u64) -> Vec<Prompt> {
        let (batch, all) = (self.batch_size() as u64, self.prompts.prompts.len() as u64);
        let mut around: Option<(u64, Vec<usize>)> = None;
        (update * batch..(update + 1) * batch)
            .map(|place| {
                let epoch = place / all;
                if around.as_ref().is_none_or(|(of, _)| *of != epoch) {
                    let mut order: Vec<usize> = (0..all as usize).collect();
                    if !self.common.no_shuffle {
                        Stream::new(self.common.seed, "prompts", &[epoch]).shuffle(&mut order);
                    }
                    around = Some((epoch, order));
                }
                let (_, order) = around.as_ref().expect("just made");
                self.prompts.prompts[order[(place % all) as usize]].clone()
            })
            .collect()
    }

    /// Responses to prompts, and their rewards.
    fn collect(
        &mut self,
        decoder: &Decoder,
        worn: &[Worn],
        prompts: &[Prompt],
        per_prompt: usize,
        first_key: u64,
    ) -> Result<Scored, TrainError> {
        let began = Instant::now();
        let tokens: Vec<Arc<[u32]>> =
            prompts.iter().map(|prompt| prompt.tokens.clone().into()).collect();
        let settings = generation(&self.task, self.compute, self.common.seed);
        let tokenizer = &self.tokenizer;
        let is_end = |token| tokenizer.is_end_of_generation(token);
        let responses =
            respond::respond(decoder, worn, &tokens, per_prompt, &settings, &is_end, first_key)?;
        self.times.generation += began.elapsed();

        let began = Instant::now();
        let texts: Vec<String> = responses
            .iter()
            .map(|response| tokenizer.decode(&response.tokens, true))
            .collect::<Result<_, _>>()?;
        let samples: Vec<Sample> = responses
            .iter()
            .zip(&texts)
            .enumerate()
            .map(|(i, (response, text))| Sample {
                prompt: &prompts[i / per_prompt].text,
                completion: text,
                tokens: response.tokens.len() - usize::from(response.ended),
                finished: response.ended,
                row: &prompts[i / per_prompt].row,
            })
            .collect();
        let mut models = Vec::new();
        for scorer in &self.scorers {
            let scores = self.adapter_scores(decoder, scorer, &responses)?;
            models.push(scores.into_iter().map(f64::from).collect());
        }
        if let Some(model) = &self.reward_model {
            models.push(model.score(&samples)?);
        }
        let scores = self.rewards.score(&samples, &models)?;
        self.times.scoring += began.elapsed();
        Ok(Scored { responses, texts, columns: scores.columns, totals: scores.totals })
    }

    fn adapter_scores(
        &self,
        decoder: &Decoder,
        worn: &[Worn],
        responses: &[Response],
    ) -> Result<Vec<f32>, TrainError> {
        let head = worn.iter().find_map(|worn| worn.adapter.score.as_ref());
        let head = head.expect("read as a scoring adapter");
        let at_eos = match &self.task {
            Task::Ppo(own) => own.score_at_eos,
            Task::Grpo(own) => own.score_at_eos,
            _ => false,
        };
        let eos = self.tokenizer.eos().filter(|_| at_eos);
        Ok(respond::scores(decoder, worn, head, responses, eos, &self.after_turn)?)
    }

    /// Rows of text to keep predicting, beside a step.
    fn ptx_part(&self, own: &PpoSettings, optimizer_step: u64) -> Option<MicroBatch> {
        let data = self.ptx.as_ref()?;
        let (size, all) =
            (self.common.per_device_train_batch_size as u64, data.examples.len() as u64);
        let rows: Vec<usize> = (optimizer_step * size..(optimizer_step + 1) * size)
            .map(|place| {
                let mut order: Vec<usize> = (0..all as usize).collect();
                Stream::new(self.common.seed, "ptx", &[place / all]).shuffle(&mut order);
                order[(place % all) as usize]
            })
            .collect();
        let batch = Batch::new(&data.examples, &[rows]);
        let scale = own.ptx_coef / batch.count().max(1) as f64;
        Some(MicroBatch {
            batch,
            objective: Objective::LanguageModelling,
            scale,
            adapter: 0,
            epoch: optimizer_step,
            temperature: 1.0,
        })
    }

    /// Looks at an update, and says what is wrong with it, each thing once.
    fn tell_sickness(
        &mut self,
        responses: &[Response],
        rows: &[Experience],
        first_approxkl: f64,
        kl: &[f64],
    ) {
        let all = |part: fn(&Response) -> &Vec<f32>| -> Vec<f32> {
            responses.iter().flat_map(|response| part(response).iter().copied()).collect()
        };
        let sampled = all(|response| &response.sampled_logps);
        let drawn = all(|response| &response.drawn_logps);
        let old: Vec<f32> = rows.iter().flat_map(|row| row.old_logps.iter().copied()).collect();
        let evidence = Evidence { sampled: &sampled, drawn: &drawn, old: &old, first_approxkl, kl };
        let found = diagnose(&evidence);
        if !found.is_healthy() {
            self.tell(found.to_string());
        }
    }

    /// Warns, but not twice of the same thing: numbers in a sentence do not make it another.
    fn tell(&mut self, sentence: String) {
        let words = |text: &str| -> String {
            text.chars().filter(|c| c.is_alphabetic() || *c == ' ').collect()
        };
        if self.told.iter().all(|told| words(told) != words(&sentence)) {
            eprintln!("warning: {sentence}");
            self.told.push(sentence);
        }
    }

    /// Writes a few responses where people can read them.
    fn sample_table(
        &mut self,
        state: &mut State,
        every: u64,
        count: usize,
        scored: &Scored,
        kl: &[f64],
    ) -> Result<(), TrainError> {
        if every == 0 || !(state.step + 1).is_multiple_of(every) {
            return Ok(());
        }
        let Some(samples) = &mut self.samples else { return Ok(()) };
        let step = scored.responses.len().div_ceil(count.max(1)).max(1);
        let names: Vec<String> =
            self.rewards.sources().iter().map(|source| source.name().to_string()).collect();
        let mut rows = Vec::new();
        for i in (0..scored.responses.len()).step_by(step) {
            let response = &scored.responses[i];
            rows.push(SampleRow {
                prompt: self.tokenizer.decode(&response.prompt, false)?,
                response: scored.texts[i].clone(),
                reward: scored.totals[i],
                rewards: names.iter().cloned().zip(scored.columns.iter().map(|c| c[i])).collect(),
                kl: kl.get(i).copied(),
                tokens: response.tokens.len(),
                finished: response.ended,
            });
        }
        samples.push(state.step + 1, &rows)?;
        samples.sync()?;
        rollouts_of(state).samples_bytes = samples.bytes;
        eprint!("{}", table(&rows));
        Ok(())
    }
}

fn rollouts_of(state: &mut State) -> &mut RolloutState {
    state.rollouts.get_or_insert_default()
}

fn response_length(task: &Task) -> usize {
    match task {
        Task::Ppo(own) => own.response_length,
        Task::Grpo(own) => own.max_completion_length,
        _ => 0,
    }
}

fn temperature(task: &Task) -> f64 {
    match task {
        Task::Ppo(own) => own.temperature,
        Task::Grpo(own) => own.temperature,
        _ => 1.0,
    }
}

/// How responses are sampled.
fn generation(task: &Task, compute: Compute, seed: u64) -> Generation {
    let (top_k, top_p, slots) = match task {
        Task::Ppo(own) => (own.top_k, own.top_p, own.rollout_slots),
        Task::Grpo(own) => (own.top_k, own.top_p, own.rollout_slots),
        _ => (0, 1.0, 0),
    };
    let temperature = temperature(task);
    Generation {
        sampling: Sampling { temperature, top_k, top_p, seed, ..Sampling::default() },
        max_tokens: response_length(task),
        cache: match compute {
            Compute::F32 | Compute::Portable => CacheType::F32,
            Compute::Int16 | Compute::Int8 => CacheType::F16,
        },
        logprobs: None,
        draws: true,
        slots,
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
        let each = crate::objectives::policy::per_token(advantages, &tokens);
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

/// Refuses a reward model that was no better than it should be on what it had not seen.
fn trusted(folder: &Path, least: f64) -> Result<(), TrainError> {
    match read_accuracy(folder)? {
        Some(accuracy) if accuracy < least => Err(TrainError::Settings(format!(
            "--reward-adapter {}: right about {:.1} % of held-out pairs, needed {:.1} % \
             (min_reward_accuracy): a policy would learn its noise",
            folder.display(),
            accuracy * 100.0,
            least * 100.0
        ))),
        Some(_) => Ok(()),
        None if least > 0.0 => {
            eprintln!(
                "warning: {0}: nothing says how well it does on held-out pairs (measure it with: \
                 quantune eval --reward {0} --data PAIRS)",
                folder.display()
            );
            Ok(())
        }
        None => Ok(()),
    }
}

fn totals_error(totals: &[f64]) -> f64 {
    mean_and_error(totals).1
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0u64), |(sum, count), value| (sum + value, count + 1));
    if count == 0 { 0.0 } else { sum / count as f64 }
}

/// JSON has no NaN.
fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}
