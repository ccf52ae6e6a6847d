//! Reinforcement learning: samples responses of the policy to the prompts of a file, scores them, and
//! updates the policy. One update of PPO or GRPO is one step of the training loop.

mod evaluate;
mod grpo;
mod load;
mod ppo;
mod sampler;
mod task;

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

pub(super) use task::PolicyTask;

use super::TrainError;
use super::learner::AdapterLearner;
use super::log::Log;
use super::metrics::Numbers;
use super::progress::{Progress, Work};
use super::rows::longest_together;
use super::run_dir::{Fingerprint, RunDir};
use super::settings::CommonSettings;
use super::state::{RolloutState, State};
use crate::data::{Dataset, Prompt, Prompts};
use crate::model::backend::LayerBytes;
use crate::model::layer::AdapterSizes;
use crate::model::scoring::TOKENS_AT_A_TIME;
use crate::model::{ActiveAdapter, Decoder};
use crate::monitor::{LogEvent, Monitor};
use crate::objectives::advantage::kl_k1;
use crate::ops::Compute;
use crate::quant::Bytes;
use crate::rollout::{
    FirstStep, Response, RewardModel, RewardScores, SampleLog, SampleRow, Scorer, diagnose_update,
    respond, table,
};
use crate::text::Tokenizer;
use crate::weights::write_atomically;
use sampler::EpochSampler;

/// Time spent in the phases of updates.
#[derive(Debug, Clone, Copy, Default)]
struct Times {
    generation: Duration,
    scoring: Duration,
    learning: Duration,
}

/// The prompts and reward sources of a reinforcement learning run.
pub(super) struct Rollouts {
    common: CommonSettings,
    task: PolicyTask,
    tokenizer: Tokenizer,
    compute: Compute,
    prompts: Prompts,
    prompt_sampler: EpochSampler,
    held_out: Option<Prompts>,
    held_out_lines: Option<Bytes>,
    /// Text rows of PPO-ptx.
    ptx: Option<(Dataset, EpochSampler)>,
    /// The adapters of the reference, if the algorithm has one.
    reference: Option<Vec<ActiveAdapter>>,
    /// The reward sources.
    scorer: Scorer,
    /// A reward model that is only used in evaluations.
    judge: Option<ActiveAdapter>,
    samples: Option<SampleLog>,
    times: Times,
    fingerprints: Vec<Fingerprint>,
}

/// Responses and their rewards.
struct Scored {
    responses: Vec<Response>,
    texts: Vec<String>,
    /// For each reward source the values of all responses; `None` where it has no value.
    columns: Vec<Vec<Option<f64>>>,
    /// The weighted sums.
    totals: Vec<Option<f64>>,
}

impl Rollouts {
    /// Hashes of the inputs.
    pub(super) fn fingerprints(&self) -> Result<Vec<Fingerprint>, TrainError> {
        let mut prints = vec![("the data".to_string(), self.prompts.sha256.clone())];
        if let Some(held_out) = &self.held_out {
            prints.push(("the held-out data".into(), held_out.sha256.clone()));
        }
        prints.extend(self.fingerprints.iter().cloned());
        Ok(prints)
    }

    /// Prepares the run for the update after `state`.
    pub(super) fn begin(&mut self, run: &RunDir, state: &mut State) -> Result<(), TrainError> {
        if let Some(lines) = &self.held_out_lines {
            write_atomically(run.file("held_out.jsonl"), |file| file.write_all(lines))?;
        }
        let rollouts = state.rollouts.get_or_insert_default();
        if let PolicyTask::Ppo(own) = &self.task {
            rollouts.kl_coef.get_or_insert(own.kl_coef);
        }
        let path = run.file("samples.jsonl");
        self.samples = Some(SampleLog::open(&path, rollouts.samples_bytes)?);
        Ok(())
    }

    /// Updates of the run.
    pub(super) fn total_steps(&self) -> u64 {
        let prompts = self.prompts.rows.len() as u64;
        self.common.total_steps(prompts.div_ceil(self.task.batch_size() as u64))
    }

    /// Upper bound of the tokens of a micro-batch.
    pub(super) fn largest_micro_batch(&self) -> usize {
        let size = self.common.per_device_train_batch_size;
        // Responses of a group share one prompt; if the sizes of groups and micro-batches do not
        // divide each other, a group may begin or end anywhere in a micro-batch.
        let n = self.task.responses_per_prompt();
        let aligned = size.is_multiple_of(n) || n.is_multiple_of(size);
        let prompts = if aligned { size.div_ceil(n) } else { (size - 2) / n + 2 };
        let longest = self.prompts.report.longest as usize;
        let rows = prompts * longest + size * self.task.response_length();
        let ptx = self.ptx.iter().flat_map(|(data, _)| data.rows.lengths());
        rows.max(longest_together(ptx, size))
    }

    /// Number of prompts, and of prompts per update.
    pub(super) fn prompts_and_batch(&self) -> (usize, usize) {
        (self.prompts.rows.len(), self.task.batch_size())
    }

    /// Bytes of the prompts and of text rows: in memory, and mapped ones that the run reads. All prompts are
    /// read, because the reward sources check them before the first step.
    pub(super) fn data_bytes(&self) -> [usize; 2] {
        let prompts = [Some(&self.prompts), self.held_out.as_ref()];
        let prompts = prompts.into_iter().flatten().map(|prompts| prompts.rows.bytes(usize::MAX));
        let ptx = self.ptx.iter().map(|(data, _)| data.rows.bytes(usize::MAX));
        prompts
            .chain(ptx)
            .fold([0, 0], |[held, mapped], [more, others]| [held + more, mapped + others])
    }

    /// Bytes for sampling and scoring responses. Decoding: the KV cache of all rows that are decoded at once,
    /// each of maximum length, and their logits. Scoring, if there is any: the buffers of a forward pass of as
    /// many responses as are scored together, in addition to the buffers of the steps, which are kept.
    pub(super) fn rollout_bytes(&self, decoder: &Decoder, sizes: &AdapterSizes) -> usize {
        let config = &decoder.config;
        let settings = self.task.generation(self.compute, self.common.seed);
        let per_prompt = self.task.responses_per_prompt();
        let rows = settings.slots.min(self.task.batch_size() * per_prompt);
        let tokens = self.prompts.report.longest as usize + settings.max_tokens;
        let judge = self.scorer.model.as_ref().map_or(0, RewardModel::weight_bytes);
        let logits_of_row = config.vocab_size * size_of::<f32>();
        let decoding = rows * (decoder.cache_bytes(tokens, settings.cache) + logits_of_row);
        let log_probs = self.task.needs_old_log_probs();
        if !log_probs && self.scorer.adapter.is_none() {
            return decoding + judge;
        }
        let together = (TOKENS_AT_A_TIME / tokens).clamp(1, self.task.batch_size() * per_prompt);
        let prompts = together.div_ceil(per_prompt);
        let prompts = prompts * self.prompts.report.longest as usize;
        let tokens = prompts + together * settings.max_tokens;
        let LayerBytes { input, tape, shared, .. } = decoder.layer_bytes(tokens, sizes);
        let forward = tape + shared + 2 * input;
        let logits = match log_probs {
            true => decoder.head_bytes(tokens, config.vocab_size).logits,
            false => 0,
        };
        // The memory of decoding is freed before scoring.
        judge + decoding.max(forward + logits)
    }

    /// Prepares for an update of a dry run, which writes no files.
    pub(super) fn begin_trial(&self, state: &mut State) {
        let rollouts = state.rollouts.get_or_insert_default();
        if let PolicyTask::Ppo(own) = &self.task {
            rollouts.kl_coef.get_or_insert(own.kl_coef);
        }
    }

    /// Whether the last update ended an epoch.
    pub(super) fn epoch_ends(&self, state: &State) -> bool {
        let (batch, all) = (self.task.batch_size() as u64, self.prompts.rows.len() as u64);
        let epoch = |step: u64| step * batch / all.max(1);
        state.step > 0 && epoch(state.step) != epoch(state.step - 1)
    }

    /// Runs an update.
    pub(super) fn step(
        &mut self,
        learner: &mut AdapterLearner,
        state: &mut State,
        learning_rate: f64,
        monitor: Monitor<'_>,
    ) -> Result<(Numbers, Work), TrainError> {
        match self.task.clone() {
            PolicyTask::Ppo(own) => self.ppo(&own, learner, state, learning_rate, monitor),
            PolicyTask::Grpo(own) => self.grpo(&own, learner, state, learning_rate, monitor),
        }
    }

    /// Results of the command for its JSON line.
    pub(super) fn results(
        &self,
        state: &State,
        log: &Log,
        progress: &Progress,
    ) -> Result<Map<String, Value>, TrainError> {
        let mut results = Map::new();
        results.insert("data".into(), json!(self.prompts.report));
        results.insert("samples_per_second".into(), json!(progress.samples_per_second()));
        let Times { generation, scoring, learning } = self.times;
        let all = (generation + scoring + learning).as_secs_f64().max(1e-9);
        for (name, time) in
            [("generation", generation), ("scoring", scoring), ("learning", learning)]
        {
            results.insert(format!("share_{name}"), json!(time.as_secs_f64() / all));
        }
        let trained = ["objective/scores", "objective/kl", "reward"];
        let evaluated = ["eval_reward", "eval_kl", "eval_judge", "eval_length"];
        for key in trained.iter().chain(&evaluated) {
            let values = log.values(key)?;
            if let (Some(first), Some(last)) = (values.first(), values.last()) {
                results.insert(format!("{key}_first"), json!(first));
                results.insert(format!("{key}_last"), json!(last));
            }
        }
        let warnings = state.rollouts.as_ref().map(|rollouts| &rollouts.warnings[..]);
        results.insert("warnings".into(), json!(warnings.unwrap_or_default()));
        Ok(results)
    }

    /// The prompts of an update: all of them in turn, shuffled in each epoch.
    fn prompts_of(&mut self, update: u64) -> Vec<Prompt> {
        let batch = self.task.batch_size() as u64;
        let prompt = |place| self.prompts.rows.get(self.prompt_sampler.row_at(place));
        (update * batch..(update + 1) * batch).map(prompt).collect()
    }

    /// Responses to prompts, and their rewards.
    fn collect(
        &mut self,
        decoder: &Decoder,
        active: &[ActiveAdapter],
        prompts: &[Prompt],
        per_prompt: usize,
        first_key: u64,
    ) -> Result<Scored, TrainError> {
        let began = Instant::now();
        let tokens: Vec<Arc<[u32]>> =
            prompts.iter().map(|prompt| prompt.tokens.clone().into()).collect();
        let settings = self.task.generation(self.compute, self.common.seed);
        let tokenizer = &self.tokenizer;
        let is_end = |token| tokenizer.is_end_of_generation(token);
        let responses =
            respond::respond(decoder, active, &tokens, per_prompt, &settings, &is_end, first_key)?;
        self.times.generation += began.elapsed();

        let began = Instant::now();
        let (texts, scores) = self.scorer.score(decoder, tokenizer, prompts, &responses)?;
        self.times.scoring += began.elapsed();
        let RewardScores { columns, totals } = scores;
        Ok(Scored { responses, texts, columns, totals })
    }

    /// Warns about problems of an update, each once per run. `first` are the responses of its first step, and
    /// the log-probs of that step.
    fn warn_if_unhealthy(
        &self,
        state: &mut State,
        responses: &[Response],
        old: Option<&[Vec<f32>]>,
        first: Option<&(Vec<usize>, Vec<f32>)>,
        kl: &[f64],
        monitor: Monitor<'_>,
    ) {
        // With dropout the trained policy differs from the one that sampled.
        let first = first.filter(|_| self.common.lora_dropout == 0.0);
        let first = first.map(|(responses, logps)| FirstStep { responses, logps });
        let found = diagnose_update(responses, old, first, kl);
        if !found.is_healthy() {
            warn_once(state, found.to_string(), monitor);
        }
    }

    /// Writes a few responses to `samples.jsonl`, and reports them as a table.
    fn sample_table(
        &mut self,
        state: &mut State,
        (every, count): (u64, usize),
        scored: &Scored,
        kl: &[f64],
        monitor: Monitor<'_>,
    ) -> Result<(), TrainError> {
        if every == 0 || !(state.step + 1).is_multiple_of(every) {
            return Ok(());
        }
        let Some(samples) = &mut self.samples else { return Ok(()) };
        let step = scored.responses.len().div_ceil(count.max(1)).max(1);
        let names: Vec<String> =
            self.scorer.rewards.sources().iter().map(|source| source.name().to_string()).collect();
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
        monitor.report(LogEvent::Samples(&table(&rows)));
        Ok(())
    }
}

/// Prints a warning once per run: warnings that differ only in numbers count as the same.
fn warn_once(state: &mut State, sentence: String, monitor: Monitor<'_>) {
    let words = |text: &str| -> String {
        text.chars().filter(|c| c.is_alphabetic() || *c == ' ').collect()
    };
    let warnings = &mut rollouts_of(state).warnings;
    if warnings.iter().all(|warning| words(warning) != words(&sentence)) {
        monitor.warn(&sentence);
        warnings.push(sentence);
    }
}

/// The reinforcement learning state of a run.
fn rollouts_of(state: &mut State) -> &mut RolloutState {
    state.rollouts.get_or_insert_default()
}

/// `Σ log π/π_ref` over the tokens of a response, in nats.
fn divergence(logps: &[f32], ref_logps: &[f32]) -> f64 {
    logps.iter().zip(ref_logps).map(|(&p, &r)| f64::from(kl_k1(p, r))).sum()
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0u64), |(sum, count), value| (sum + value, count + 1));
    if count == 0 { 0.0 } else { sum / count as f64 }
}

/// JSON has no NaN.
fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}
