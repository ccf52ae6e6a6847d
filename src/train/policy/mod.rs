//! Reinforcement learning: responses of the policy to the prompts of a file, their rewards, and what
//! is learned from them. One update of PPO or GRPO is one step of the loop.

mod evaluate;
mod grpo;
mod ppo;
mod rounds;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::TrainError;
use super::fine_tune::{strategy, total_steps};
use super::fingerprints::base_fingerprint;
use super::learner::Learner;
use super::log::{Log, Numbers};
use super::lora::read_scoring;
use super::progress::{Progress, Work};
use super::reference;
use super::run_dir::{Fingerprint, RunDir, State, read_accuracy};
use super::settings::{CommonSettings, EvalStrategy, RunSettings, SCHEMA_REWARD, Task};
use super::supervised::{judge as judge_rows, longest_together, row_cache, warn_of_none_held_out};
use crate::data::{Dataset, LoadSettings, Prompt, PromptSettings, Prompts};
use crate::generate::{Sampling, Settings as Generation};
use crate::model::layer::{Sizes, Tape};
use crate::model::scoring::TOKENS_AT_A_TIME;
use crate::model::{ActiveAdapter, CacheType, Decoder};
use crate::monitor::{LogEvent, Monitor};
use crate::objectives::advantage::{RunningMoments, kl_k1};
use crate::ops::{Compute, linear_cross_entropy};
use crate::quant::Bytes;
use crate::rollout::{
    FirstStep, Response, RewardCommand, RewardModel, RewardScores, RewardSource, Rewards,
    SampleLog, SampleRow, Scorer, diagnose_update, respond, table,
};
use crate::text::{Tokenizer, first_second};
use crate::weights::write_atomically;
use rounds::Rounds;

/// What of a run's state only reinforcement learning has.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RolloutState {
    /// Weight of the divergence now.
    pub kl_coef: Option<f64>,
    /// Mean and variance of the scores so far.
    pub moments: RunningMoments,
    /// Bytes of `samples.jsonl` that belong to the steps so far.
    pub samples_bytes: u64,
    /// Warnings so far: each is given once in a run, however often it is taken up.
    #[serde(default)]
    pub told: Vec<String>,
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
    prompt_rounds: Rounds,
    held_out: Option<Prompts>,
    held_out_lines: Option<Bytes>,
    /// Text to keep predicting.
    ptx: Option<(Dataset, Rounds)>,
    /// What the reference wears, if one is asked for.
    reference: Option<Vec<ActiveAdapter>>,
    /// What gives the rewards.
    scorer: Scorer,
    /// A reward model that is not trained against.
    judge: Option<ActiveAdapter>,
    samples: Option<SampleLog>,
    times: Times,
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
        below: &[ActiveAdapter],
        tokenizer: Tokenizer,
        monitor: Monitor<'_>,
    ) -> Result<Self, TrainError> {
        let common = settings.common.clone();
        let now = first_second(&common.template_date);
        // A reward model reads what ends a turn behind the response, in the same window.
        let ending = 1 + tokenizer.after_turn().map_or(0, |after| after.len());
        let window = decoder.config.max_position_embeddings.saturating_sub(ending);
        let most = common.max_length.min(window);
        let length = response_length(&settings.task);
        if length >= most {
            let fault = format!(
                "responses may have {length} tokens and prompt and response together {most} \
                 (max_length or the model's window): no room is left for a prompt"
            );
            return Err(TrainError::Settings(fault));
        }
        let cache = Some(row_cache(&common));
        let reading = PromptSettings {
            max_length: most - length,
            allow: common.allow.clone(),
            cache: cache.clone(),
        };
        let load = |path: &Path| Prompts::load(path, &tokenizer, reading.clone(), monitor);
        let given = !common.eval_data.as_os_str().is_empty();
        let (prompts, held_out, held_out_lines) = if strategy(&common) == EvalStrategy::No {
            (load(common.data_file())?, None, None)
        } else if given {
            (load(common.data_file())?, Some(load(&common.eval_data)?), None)
        } else {
            let split =
                Prompts::load_split(common.data_file(), &tokenizer, reading.clone(), monitor)?;
            let lines = split.held_out.is_some().then_some(split.held_out_lines);
            if lines.is_none() {
                warn_of_none_held_out(&common, monitor);
            }
            (split.train, split.held_out, lines)
        };
        judge_rows(&prompts.checks, common.data_file(), &common.allow, monitor)?;
        monitor.note(format_args!("data: {}", prompts.report));

        let mut prints: Vec<Fingerprint> = Vec::new();
        let print = |prints: &mut Vec<Fingerprint>, what: &str, folder: &Path| {
            if !folder.as_os_str().is_empty() {
                prints.push((what.to_string(), base_fingerprint(folder)?));
            }
            Ok::<(), TrainError>(())
        };
        let scoring = |folder: &Path, least: f64| -> Result<ActiveAdapter, TrainError> {
            trusted(folder, least, monitor)?;
            Ok(ActiveAdapter::frozen(Arc::new(read_scoring(folder, decoder, monitor)?)))
        };
        let (mut adapter, mut judge, mut ptx, mut reward_model) = (None, None, None, None);
        let (rewards, wants_reference, ref_adapter, at_eos) = match &settings.task {
            Task::Ppo(own) => {
                print(&mut prints, "the reward adapter", &own.reward_adapter)?;
                adapter = Some(scoring(&own.reward_adapter, own.min_reward_accuracy)?);
                print(&mut prints, "the value adapter", &own.value_adapter)?;
                if !own.judge_adapter.as_os_str().is_empty() {
                    print(&mut prints, "the judge", &own.judge_adapter)?;
                    judge = Some(scoring(&own.judge_adapter, 0.0)?);
                }
                if !own.ptx_data.as_os_str().is_empty() {
                    let reading = LoadSettings { cache, ..LoadSettings::from(most) };
                    let data = Dataset::load(&own.ptx_data, &tokenizer, reading, monitor)?;
                    judge_rows(&data.checks, &own.ptx_data, &common.allow, monitor)?;
                    prints.push(("the ptx data".into(), data.sha256.clone()));
                    let rounds = Rounds::new("ptx", common.seed, true, data.rows.len());
                    ptx = Some((data, rounds));
                }
                let source = RewardSource::Model { name: "reward_adapter".into() };
                (Rewards::new(vec![source], None)?, true, &own.ref_adapter, own.score_at_eos)
            }
            Task::Grpo(own) => {
                let mut sources = Vec::new();
                for spec in &own.reward {
                    if let Some(file) = spec.strip_prefix(SCHEMA_REWARD) {
                        let path = Path::new(file);
                        print(&mut prints, "the JSON schema", path)?;
                    }
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
                    adapter = Some(scoring(&own.reward_adapter, own.min_reward_accuracy)?);
                    sources.push(RewardSource::Model { name: "reward_adapter".into() });
                }
                if !own.reward_model.as_os_str().is_empty() {
                    print(&mut prints, "the reward model", &own.reward_model)?;
                    reward_model = Some(RewardModel::load(&own.reward_model, decoder, now)?);
                    sources.push(RewardSource::Model { name: "reward_model".into() });
                }
                let weights = &own.reward_weights;
                let weights = (!weights.is_empty()).then(|| weights.clone());
                let rewards = Rewards::new(sources, weights)?;
                (rewards, own.beta > 0.0, &own.ref_adapter, own.score_at_eos)
            }
            Task::Sft(_) | Task::Reward(_) | Task::Dpo(_) => {
                unreachable!("they learn from rows as they are")
            }
        };
        let data_file = common.data_file();
        let held_out_file = if given { &*common.eval_data } else { data_file };
        let files = [(data_file, Some(&prompts)), (held_out_file, held_out.as_ref())];
        for (path, prompts) in files {
            for prompt in prompts.iter().flat_map(|prompts| prompts.rows.iter()) {
                rewards.check(&prompt.row).map_err(|e| {
                    let (path, line) = (path.display(), prompt.line);
                    TrainError::Settings(format!("{path}:{line}: {e}"))
                })?;
            }
        }
        if let Some(model) = &reward_model {
            fits(model, &files, length)?;
        }
        let folder = match ref_adapter.as_os_str().is_empty() {
            true => &common.adapter,
            false => ref_adapter,
        };
        if wants_reference {
            print(&mut prints, "the reference adapter", folder)?;
        }
        let reference = match wants_reference {
            true => Some(reference::active(below, folder, decoder, monitor)?),
            false => None,
        };
        let chats = prompts.report.conversations > 0;
        let scorer = Scorer {
            rewards,
            adapter,
            model: reward_model,
            eos: tokenizer.eos().filter(|_| at_eos),
            after: if chats { tokenizer.after_turn()? } else { Vec::new() },
        };
        let shuffled = !common.no_shuffle;
        let prompt_rounds = Rounds::new("prompts", common.seed, shuffled, prompts.rows.len());
        Ok(Self {
            task: settings.task.clone(),
            common,
            tokenizer,
            compute: decoder.compute,
            prompts,
            prompt_rounds,
            held_out,
            held_out_lines,
            ptx,
            reference,
            scorer,
            judge,
            samples: None,
            times: Times::default(),
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
        let prompts = self.prompts.rows.len() as u64;
        total_steps(&self.common, prompts.div_ceil(self.batch_size() as u64))
    }

    /// Tokens of the largest micro-batch there can be.
    pub fn largest_micro_batch(&self) -> usize {
        let size = self.common.per_device_train_batch_size;
        // Responses of a group lie behind one prompt; where groups and micro-batches do not go into
        // each other, a group may begin or end anywhere in one.
        let prompts = match &self.task {
            Task::Grpo(own) => {
                let n = own.num_generations;
                let aligned = size.is_multiple_of(n) || n.is_multiple_of(size);
                if aligned { size.div_ceil(n) } else { (size - 2) / n + 2 }
            }
            _ => size,
        };
        let longest = self.prompts.report.longest as usize;
        let rows = prompts * longest + size * response_length(&self.task);
        let ptx = self.ptx.iter().flat_map(|(data, _)| data.rows.lengths());
        rows.max(longest_together(ptx, size))
    }

    /// Prompts, and those of an update.
    pub fn prompts_and_batch(&self) -> (usize, usize) {
        (self.prompts.rows.len(), self.batch_size())
    }

    /// Bytes of the prompts and of text to keep predicting: in memory, and mapped ones that the run
    /// looks at. All prompts are: whether the rewards can read them is seen before the first step.
    pub fn data_bytes(&self) -> [usize; 2] {
        let prompts = [Some(&self.prompts), self.held_out.as_ref()];
        let prompts = prompts.into_iter().flatten().map(|prompts| prompts.rows.bytes(usize::MAX));
        let ptx = self.ptx.iter().map(|(data, _)| data.rows.bytes(usize::MAX));
        prompts
            .chain(ptx)
            .fold([0, 0], |[held, mapped], [more, others]| [held + more, mapped + others])
    }

    /// Bytes that responses take before they are learned from. Decoding: keys and values of all rows
    /// that are decoded at once, each as long as it can get, and their logits. Scoring, if there is
    /// any: what a forward pass of as many of them as go through the model together works with, beside
    /// the buffers of the steps, which are kept.
    pub fn rollout_bytes(&self, decoder: &Decoder, sizes: &Sizes) -> usize {
        let config = &decoder.config;
        let settings = generation(&self.task, self.compute, self.common.seed);
        let per_prompt = match &self.task {
            Task::Grpo(own) => own.num_generations,
            _ => 1,
        };
        let rows = settings.slots.min(self.batch_size() * per_prompt);
        let tokens = self.prompts.report.longest as usize + settings.max_tokens;
        let number = match settings.cache {
            CacheType::F32 => size_of::<f32>(),
            CacheType::F16 => size_of::<f32>() / 2,
            CacheType::Q8 => 1,
        };
        let keys = config.num_key_value_heads * config.head_dim * config.num_hidden_layers;
        let judge = self.scorer.model.as_ref().map_or(0, RewardModel::weight_bytes);
        let decoding = rows * (2 * keys * tokens * number + config.vocab_size * size_of::<f32>());
        let log_probs = match &self.task {
            Task::Grpo(own) => {
                self.reference.is_some() || own.num_iterations > 1 || own.num_mini_batches > 1
            }
            _ => true,
        };
        if !log_probs && self.scorer.adapter.is_none() {
            return decoding + judge;
        }
        let together = (TOKENS_AT_A_TIME / tokens).clamp(1, self.batch_size() * per_prompt);
        let prompts = together.div_ceil(per_prompt);
        let prompts = prompts * self.prompts.report.longest as usize;
        let (tokens, compute) = (prompts + together * settings.max_tokens, decoder.compute);
        let states = 2 * tokens * config.hidden_size * size_of::<f32>();
        let forward = Tape::bytes(config, compute, tokens, sizes)
            + Tape::shared_bytes(config, compute, tokens, sizes)
            + states;
        let logits = match log_probs {
            true => linear_cross_entropy::working_bytes(tokens, config.vocab_size, compute),
            false => 0,
        };
        // What decoding took is free again before anything is scored.
        judge + decoding.max(forward + logits)
    }

    /// Takes up the run as far as an update needs, and writes nothing.
    pub fn begin_trial(&self, state: &mut State) {
        let rollouts = state.rollouts.get_or_insert_default();
        if let Task::Ppo(own) = &self.task {
            rollouts.kl_coef.get_or_insert(own.kl_coef);
        }
    }

    /// Whether the updates so far have been through all prompts again.
    pub fn epoch_ends(&self, state: &State) -> bool {
        let (batch, all) = (self.batch_size() as u64, self.prompts.rows.len() as u64);
        let epoch = |step: u64| step * batch / all.max(1);
        state.step > 0 && epoch(state.step) != epoch(state.step - 1)
    }

    /// Takes an update.
    pub fn step(
        &mut self,
        learner: &mut Learner,
        state: &mut State,
        learning_rate: f64,
        monitor: Monitor<'_>,
    ) -> Result<(Numbers, Work), TrainError> {
        match self.task.clone() {
            Task::Ppo(own) => self.ppo(&own, learner, state, learning_rate, monitor),
            Task::Grpo(own) => self.grpo(&own, learner, state, learning_rate, monitor),
            _ => unreachable!("they learn from rows as they are"),
        }
    }

    /// What the command's JSON says beside the common part.
    pub fn results(
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
        let told = state.rollouts.as_ref().map(|rollouts| &rollouts.told[..]);
        results.insert("warnings".into(), json!(told.unwrap_or_default()));
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
    fn prompts_of(&mut self, update: u64) -> Vec<Prompt> {
        let batch = self.batch_size() as u64;
        let prompt = |place| self.prompts.rows.get(self.prompt_rounds.at(place));
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
        let settings = generation(&self.task, self.compute, self.common.seed);
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

    /// Looks at an update, and says what is wrong with it, each thing once. `first` are the responses
    /// of its first step, and the log-probs it read.
    fn tell_sickness(
        &self,
        state: &mut State,
        responses: &[Response],
        old: Option<&[Vec<f32>]>,
        first: Option<&(Vec<usize>, Vec<f32>)>,
        kl: &[f64],
        monitor: Monitor<'_>,
    ) {
        // Dropout alone makes another policy of the one that learns.
        let first = first.filter(|_| self.common.lora_dropout == 0.0);
        let first = first.map(|(responses, logps)| FirstStep { responses, logps });
        let found = diagnose_update(responses, old, first, kl);
        if !found.is_healthy() {
            tell(state, found.to_string(), monitor);
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

/// Warns, but not twice of the same thing: numbers in a sentence do not make it another.
fn tell(state: &mut State, sentence: String, monitor: Monitor<'_>) {
    let words = |text: &str| -> String {
        text.chars().filter(|c| c.is_alphabetic() || *c == ' ').collect()
    };
    let told = &mut rollouts_of(state).told;
    if told.iter().all(|told| words(told) != words(&sentence)) {
        monitor.warn(&sentence);
        told.push(sentence);
    }
}

/// What a run's state has of responses.
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
        cache: CacheType::of(compute),
        logprobs: None,
        draws: true,
        slots,
    }
}

/// Refuses a reward model that was no better than it should be on what it had not seen.
fn trusted(folder: &Path, least: f64, monitor: Monitor<'_>) -> Result<(), TrainError> {
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
            monitor.warn(format_args!(
                "{0}: nothing says how well it does on held-out pairs (measure it with: \
                 quantune eval --base BASE --reward {0} --data PAIRS)",
                folder.display()
            ));
            Ok(())
        }
        None => Ok(()),
    }
}

/// Refuses a reward model beside the base whose window is too small for the longest prompt and a
/// response of `length` tokens.
fn fits(
    model: &RewardModel,
    files: &[(&Path, Option<&Prompts>)],
    length: usize,
) -> Result<(), TrainError> {
    let mut longest = (0, String::new());
    for (path, prompts) in files {
        for prompt in prompts.iter().flat_map(|prompts| prompts.rows.iter()) {
            let tokens = model.prompt_tokens(&prompt)?;
            if tokens > longest.0 {
                longest = (tokens, format!("{}:{}", path.display(), prompt.line));
            }
        }
    }
    let (window, (tokens, place)) = (model.window(), longest);
    if tokens + length <= window {
        return Ok(());
    }
    Err(TrainError::Settings(format!(
        "{place}: the longest prompt has {tokens} tokens for the reward model and its response may \
         have {length}, needed {window} together at most: reward_model's window"
    )))
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
