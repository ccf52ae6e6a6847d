//! Continuous batching: jobs are submitted and finish at any time. Prefill writes prompts to KV caches, then
//! every decode step adds a token to each running row, and a finished row frees its slot for the next.

use std::collections::VecDeque;
use std::sync::Arc;

use candle_core::Result;

use super::sampling::{LogProbs, Sampling, SamplingError};
use crate::model::backend::with_backend;
use crate::model::{ActiveAdapter, Adapters, Backend, CacheType, Decoder, KvCache, Logits, Rows};
use crate::ops::par_for_each;

/// Maximum number of tokens of a prefill pass; bounds the activations, not the KV cache.
const PREFILL_TOKENS: usize = 512;

/// Maximum number of prompts of a prefill pass; bounds the logits of their last tokens.
const PREFILL_PROMPTS: usize = 64;

/// Cost of sampling per logit, in multiply-adds.
const WORK: usize = 8;

/// A prompt to be continued, with its adapters and sampling settings.
#[derive(Debug, Clone)]
pub struct Job {
    /// Prompt tokens, at least one.
    pub prompt: Vec<u32>,
    /// Active adapters for the whole job, even if the registry changes meanwhile.
    pub active: Arc<[ActiveAdapter]>,
    /// Sampling settings.
    pub sampling: Sampling,
    /// Key of the job's random numbers.
    pub rng_key: u64,
    /// Maximum number of new tokens.
    pub max_tokens: usize,
    /// End-of-generation token ids in ascending order.
    pub eos_token_ids: Arc<[u32]>,
    /// `Some(k)` records each sampled token's log-probability and the `k` most likely tokens.
    pub logprobs: Option<usize>,
    /// Whether to record [`Generated::sampled_logps`] and [`Generated::drawn_logps`].
    pub sampled_logps: bool,
    /// Prompt cache of an earlier job: the tokens it has in common with the beginning of the prompt are not
    /// computed again, if the adapters are the same.
    pub prefix: Option<Prefix>,
    /// Whether to return the KV cache at the end, as the prefix of another job.
    pub keep_cache: bool,
}

impl Job {
    /// A job without adapters that decodes up to `max_tokens` tokens greedily.
    pub fn new(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self {
            prompt,
            active: Arc::new([]),
            sampling: Sampling::greedy(),
            rng_key: 0,
            max_tokens,
            eos_token_ids: Arc::new([]),
            logprobs: None,
            sampled_logps: false,
            prefix: None,
            keep_cache: false,
        }
    }
}

/// A prompt cache: tokens, the adapters they were computed with, and their keys and values.
#[derive(Debug, Clone)]
pub struct Prefix {
    tokens: Vec<u32>,
    active: Arc<[ActiveAdapter]>,
    cache: KvCache,
}

impl Prefix {
    /// How many tokens of a prompt are cached for the adapters `active`. Never all of them, because the hidden
    /// state of the last one is needed.
    pub fn cached_len(&self, prompt: &[u32], active: &[ActiveAdapter]) -> usize {
        if !ActiveAdapter::same(&self.active, active)
            || !self.cache.same_rope_scaling(self.tokens.len(), prompt.len())
        {
            return 0;
        }
        let both = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b);
        let both = both.count().min(prompt.len().saturating_sub(1));
        if self.cache.same_rope_scaling(both, prompt.len()) { both } else { 0 }
    }
}

/// Why a row finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// An end-of-generation token.
    Stop,
    /// `max_tokens` or the context window was reached.
    Length,
    /// The caller cancelled it.
    Callback,
}

/// The generated tokens of a row.
#[derive(Debug, Clone)]
pub struct Generated {
    /// The new tokens, including the end-of-generation token, if any.
    pub token_ids: Vec<u32>,
    /// The finish reason.
    pub finish: Finish,
    /// If requested, each new token's natural log-probability under the model, without temperature and filters.
    pub token_logprobs: Vec<f32>,
    /// If requested, the most likely tokens at each new token's position, most likely first.
    pub logprobs: Vec<Vec<(u32, f32)>>,
    /// If requested, each new token's log-probability at the sampling temperature, before filters.
    pub sampled_logps: Vec<f32>,
    /// If requested, each new token's log-probability under the filtered distribution it was drawn from.
    pub drawn_logps: Vec<f32>,
}

/// The output of a finished job.
#[derive(Debug, Clone)]
pub struct JobOutput {
    /// The generated tokens.
    pub generated: Generated,
    /// The prompt cache, if [`Job::keep_cache`] is set.
    pub prefix: Option<Prefix>,
}

/// An event of a step.
#[derive(Debug)]
pub enum Event {
    /// A new token that is not an end-of-generation token.
    Token {
        /// Id of the job.
        id: usize,
        /// The token.
        token: u32,
    },
    /// A job has finished.
    Finished {
        /// Id of the job.
        id: usize,
        /// Its output.
        output: Box<JobOutput>,
    },
    /// A job has failed and was removed, because its logits contain NaN or Inf. The others continue.
    Failed {
        /// Id of the job.
        id: usize,
        /// The error.
        error: GenerateError,
    },
}

/// Counters of the work done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Decode steps.
    pub steps: usize,
    /// Decode steps times slots, including empty slots.
    pub slot_steps: usize,
    /// New tokens, including end-of-generation tokens. The first of a row comes from prefill, not from a
    /// decode step.
    pub tokens: usize,
    /// Prompt tokens that were computed.
    pub prompt_tokens: usize,
    /// Prompt tokens that were shared with another row of the same group.
    pub shared_prompt_tokens: usize,
    /// Prompt tokens that came from the prompt cache of an earlier job.
    pub cached_prompt_tokens: usize,
    /// Tokens, prompts and new ones, that were computed again because the RoPE scaling changes with the length.
    pub recomputed_tokens: usize,
}

impl Usage {
    /// Slot utilization: 1 if no slot is ever empty; less if first tokens, which need no decode step, have
    /// weight.
    pub fn slot_steps_per_token(&self) -> f64 {
        self.slot_steps as f64 / self.tokens.max(1) as f64
    }

    fn count_prompts(&mut self, groups: &[Group]) {
        for group in groups {
            let (tokens, cached) = (group.tokens().len(), group.cached_len());
            if group.is_requeued() {
                self.recomputed_tokens += tokens;
                continue;
            }
            self.prompt_tokens += tokens - cached;
            self.cached_prompt_tokens += cached;
            self.shared_prompt_tokens += tokens * (group.rows.len() - 1);
        }
    }
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.steps += other.steps;
        self.slot_steps += other.slot_steps;
        self.tokens += other.tokens;
        self.prompt_tokens += other.prompt_tokens;
        self.shared_prompt_tokens += other.shared_prompt_tokens;
        self.cached_prompt_tokens += other.cached_prompt_tokens;
        self.recomputed_tokens += other.recomputed_tokens;
    }
}

/// Why generation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// An empty prompt.
    #[error("prompt {row} has no tokens, needed at least one")]
    EmptyPrompt {
        /// The row, counted from 0.
        row: usize,
    },
    /// A prompt that fills the context window.
    #[error(
        "prompt {row} has {tokens} tokens: the model's window of {window} has no room for more"
    )]
    LongPrompt {
        /// The row, counted from 0.
        row: usize,
        /// Its length.
        tokens: usize,
        /// `max_position_embeddings`.
        window: usize,
    },
    /// A token outside the vocabulary.
    #[error("prompt {row} has token {token}, the vocabulary has {vocab_size}")]
    Token {
        /// The row, counted from 0.
        row: usize,
        /// The token.
        token: u32,
        /// `vocab_size`.
        vocab_size: usize,
    },
    /// The number of adapter lists differs from the number of prompts.
    #[error("{found} lists of adapters for {rows} prompts, needed one each")]
    Adapters {
        /// Number of adapter lists.
        found: usize,
        /// Number of prompts.
        rows: usize,
    },
    /// A sampling setting out of range.
    #[error(transparent)]
    Setting(SamplingError),
    /// The logits contain NaN or Inf.
    #[error("row {row}, position {position}: {source}")]
    Choice {
        /// The row, counted from 0.
        row: usize,
        /// Position of the token that was to be sampled, from the start of the prompt.
        position: usize,
        /// The error.
        source: SamplingError,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// A continuous-batching engine over one decoder: jobs are submitted at any time, and every [`Self::step`]
/// runs a prefill pass or a decode step.
///
/// At most `slots` rows run at a time; when a row finishes, the next one takes its slot before another token
/// is decoded (Orca's iteration-level scheduling, Yu et al. 2022). Prompts are prefilled ahead, up to 512
/// tokens of at most 64 prompts per pass, and wait with their first token sampled, so that weights are
/// unpacked once for several short prompts. Jobs with the same prompt and adapters that are submitted one
/// after the other form a group, whose prompt is computed once.
///
/// The tokens of a row depend only on its own job, not on `slots` or on the other rows, with two exceptions: in
/// the integer modes a reused prefix was rounded differently from a prompt that is computed as a whole, and an
/// adapter with NaN or Inf affects other prompts of the same prefill pass (a registry rejects such
/// adapters). A job keeps its adapters until it finishes. Memory: the KV caches of at most `slots` rows and
/// of waiting prompts of 512 tokens (or a longer one), a row of logits for each, and the activations of at
/// most 512 tokens (or of one token per row). Trainable adapters are treated like frozen ones; there are no
/// gradients.
///
/// ```
/// use quantune::generate::{Engine, Event, Job, Sampling};
/// use quantune::model::{CacheType, Decoder};
/// use quantune::ops::Compute;
/// use quantune::weights::Checkpoint;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let checkpoint = Checkpoint::open("tests/golden/model/llama-tiny")?;
/// let decoder = Decoder::load(&checkpoint, Compute::F32)?;
/// let mut engine = Engine::new(&decoder, CacheType::of(decoder.compute), 4);
/// let job = Job { sampling: Sampling::greedy(), ..Job::new(vec![1, 5, 9], 8) };
/// let id = engine.submit(job)?;
/// let mut tokens = Vec::new();
/// while !engine.is_idle() {
///     for event in engine.step()? {
///         if let Event::Token { id: of, token } = event {
///             assert_eq!(of, id);
///             tokens.push(token);
///         }
///     }
/// }
/// assert_eq!(tokens.len(), 8);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Engine<'a> {
    decoder: &'a Decoder,
    kind: CacheType,
    slots: usize,
    submitted: usize,
    usage: Usage,
    /// Prompts that wait for prefill.
    waiting: VecDeque<Group>,
    /// Prefilled prompts whose rows wait for a slot.
    prefilled: VecDeque<Prefilled>,
    running: DecodeBatch,
    /// Events to be returned by the next step.
    pending_events: Vec<Event>,
}

impl<'a> Engine<'a> {
    /// An idle engine. `slots` is the maximum number of running rows; 0 is unlimited.
    pub fn new(decoder: &'a Decoder, cache: CacheType, slots: usize) -> Self {
        Self {
            decoder,
            kind: cache,
            slots,
            submitted: 0,
            usage: Usage::default(),
            waiting: VecDeque::new(),
            prefilled: VecDeque::new(),
            running: DecodeBatch { rows: Vec::new(), cache: KvCache::with_type(decoder, 0, cache) },
            pending_events: Vec::new(),
        }
    }

    /// Submits a job and returns its id; ids are counted from 0.
    ///
    /// # Errors
    /// If the prompt is empty, fills the context window or has a token outside the vocabulary, or a setting is
    /// out of range. Such a job gets no id and changes nothing.
    pub fn submit(&mut self, mut job: Job) -> std::result::Result<usize, GenerateError> {
        let id = self.submitted;
        self.check(id, &job)?;
        self.submitted += 1;
        let prefix = job.prefix.take();
        let row = EngineRow::new(id, job, self.decoder.config.max_position_embeddings);
        if row.is_full() {
            let output = Box::new(JobOutput { generated: row.generated, prefix });
            self.pending_events.push(Event::Finished { id, output });
            return Ok(id);
        }
        let fits = |group: &&mut Group| {
            let first = &group.rows[0];
            first.tokens == row.tokens
                && ActiveAdapter::same(&first.job.active, &row.job.active)
                && group.prefix.is_none()
                && prefix.is_none()
        };
        match self.waiting.back_mut().filter(fits) {
            Some(group) => group.rows.push(row),
            None => self.waiting.push_back(Group { rows: vec![row], prefix }),
        }
        Ok(id)
    }

    /// Cancels a job and returns its output so far, with [`Finish::Callback`]; no more events are returned for
    /// it. `None` if there is no such job, or it has finished already.
    pub fn cancel(&mut self, id: usize) -> Option<JobOutput> {
        if let Some(index) = self.running.rows.iter().position(|row| row.id == id) {
            let (row, cache) = self.running.remove(index);
            return Some(row.finish(Finish::Callback, Some(cache)));
        }
        for (index, prefilled) in self.prefilled.iter_mut().enumerate() {
            if let Some(at) = prefilled.rows.iter().position(|row| row.id == id) {
                let row = prefilled.rows.remove(at)?;
                let cache = match prefilled.rows.is_empty() {
                    true => self.prefilled.remove(index)?.cache,
                    false => prefilled.cache.clone(),
                };
                return Some(row.finish(Finish::Callback, Some(cache)));
            }
        }
        for (index, group) in self.waiting.iter_mut().enumerate() {
            if let Some(at) = group.rows.iter().position(|row| row.id == id) {
                let (row, prefix) = (group.rows.remove(at), group.prefix.take());
                if group.rows.is_empty() {
                    self.waiting.remove(index);
                }
                return Some(JobOutput { prefix, ..row.finish(Finish::Callback, None) });
            }
        }
        None
    }

    /// Whether there are no unfinished jobs and no pending events.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty()
            && self.prefilled.is_empty()
            && self.running.rows.is_empty()
            && self.pending_events.is_empty()
    }

    /// Counters of the work done so far.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Runs one forward pass: if a slot is free and a prompt waits, prefill of a chunk of prompts with
    /// their first tokens; else a decode step for all running rows. Returns the events in order, a job's
    /// tokens before its end. Does nothing if the engine is idle.
    ///
    /// During decode steps the threads of the current rayon pool spin, and do not run other work.
    ///
    /// # Errors
    /// If a tensor operation fails; the engine cannot be used any more then.
    pub fn step(&mut self) -> std::result::Result<Vec<Event>, GenerateError> {
        while self.has_slot()
            && let Some((row, cache)) = take_prefilled(&mut self.prefilled)
        {
            self.running.admit(row, cache)?;
        }
        self.requeue_rescaled_rows();
        let mut events = std::mem::take(&mut self.pending_events);
        if self.has_slot() && !self.waiting.is_empty() {
            self.prefill_next(&mut events)?;
        } else if !self.running.rows.is_empty() {
            with_backend!(self.decoder.compute.backend, B => B::decoding(|| self.decode(&mut events)))?;
        }
        Ok(events)
    }

    /// Moves running rows back to the prefill queue whose RoPE scaling changes with the next token: their
    /// KV cache is dropped and computed again.
    fn requeue_rescaled_rows(&mut self) {
        let DecodeBatch { rows, cache } = &self.running;
        let changes = |index: &usize| {
            let cached = cache.len(*index);
            !cache.same_rope_scaling(cached, rows[*index].tokens.len())
        };
        let rescaled: Vec<usize> = (0..rows.len()).rev().filter(changes).collect();
        for index in rescaled {
            let (row, _) = self.running.remove(index);
            self.waiting.push_front(Group { rows: vec![row], prefix: None });
        }
    }

    fn has_slot(&self) -> bool {
        self.slots == 0 || self.running.rows.len() < self.slots
    }

    fn check(&self, row: usize, job: &Job) -> std::result::Result<(), GenerateError> {
        job.sampling.check().map_err(GenerateError::Setting)?;
        let config = &self.decoder.config;
        let (window, vocab_size) = (config.max_position_embeddings, config.vocab_size);
        if job.prompt.is_empty() {
            return Err(GenerateError::EmptyPrompt { row });
        }
        if job.prompt.len() >= window {
            return Err(GenerateError::LongPrompt { row, tokens: job.prompt.len(), window });
        }
        if let Some(&token) = job.prompt.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(GenerateError::Token { row, token, vocab_size });
        }
        Ok(())
    }

    /// Prefills the next chunk of prompts and samples their first tokens; their rows then wait for slots.
    fn prefill_next(&mut self, events: &mut Vec<Event>) -> std::result::Result<(), GenerateError> {
        let mut chunk = next_chunk(&mut self.waiting);
        self.usage.count_prompts(&chunk);
        let (caches, logits) = prefill(self.decoder, self.kind, &mut chunk)?;
        // All rows of a group sample from the same logits.
        let rows = chunk.iter_mut().zip(0..);
        let rows = rows.flat_map(|(group, line)| group.rows.iter_mut().map(move |row| (row, line)));
        let mut rows: Vec<(&mut EngineRow, usize)> = rows.collect();
        self.usage.tokens += rows.len();
        let mut statuses = sample_rows(&mut rows, &logits, events).into_iter();
        for (cache, group) in caches.into_iter().zip(chunk) {
            let mut rows = VecDeque::new();
            for row in group.rows {
                match statuses.next().expect("one for every row") {
                    RowStatus::Running => rows.push_back(row),
                    RowStatus::Finished(finish) => {
                        let cache = row.job.keep_cache.then(|| cache.clone());
                        events.push(row.finished_event(finish, cache));
                    }
                    RowStatus::Failed => {}
                }
            }
            if !rows.is_empty() {
                self.prefilled.push_back(Prefilled { cache, rows });
            }
        }
        Ok(())
    }

    /// Runs a decode step: a token for each running row.
    fn decode(&mut self, events: &mut Vec<Event>) -> std::result::Result<(), GenerateError> {
        let batch = &mut self.running;
        let logits = batch.step(self.decoder)?; // of the running rows
        self.usage.steps += 1;
        self.usage.slot_steps += self.slots.max(batch.rows.len());
        self.usage.tokens += batch.rows.len();
        let mut rows: Vec<(&mut EngineRow, usize)> = batch.rows.iter_mut().zip(0..).collect();
        let mut index = 0;
        for status in sample_rows(&mut rows, &logits, events) {
            if status == RowStatus::Running {
                index += 1;
                continue;
            }
            let (row, cache) = batch.remove(index);
            if let RowStatus::Finished(finish) = status {
                events.push(row.finished_event(finish, Some(cache)));
            }
        }
        Ok(())
    }
}

/// A row of a job that is not finished.
#[derive(Debug)]
struct EngineRow {
    id: usize,
    /// Prompt and new tokens.
    tokens: Vec<u32>,
    /// Maximum length of `tokens`.
    max_len: usize,
    /// The job, with its prompt and prefix moved out.
    job: Job,
    generated: Generated,
}

/// A sampled token, with the log-probabilities to record.
struct SampledToken {
    token: u32,
    logprobs: Option<(f32, Vec<(u32, f32)>)>,
    /// Log-probabilities before and after filters.
    draw: Option<(f32, f32)>,
}

/// The status of a row after a sampled token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RowStatus {
    Running,
    Finished(Finish),
    Failed,
}

impl EngineRow {
    fn new(id: usize, mut job: Job, window: usize) -> Self {
        let generated = Generated {
            token_ids: Vec::new(),
            finish: Finish::Length,
            token_logprobs: Vec::new(),
            logprobs: Vec::new(),
            sampled_logps: Vec::new(),
            drawn_logps: Vec::new(),
        };
        let tokens = std::mem::take(&mut job.prompt);
        let max_len = tokens.len().saturating_add(job.max_tokens).min(window);
        Self { id, tokens, max_len, job, generated }
    }

    fn is_full(&self) -> bool {
        self.tokens.len() >= self.max_len
    }

    /// Samples the next token.
    fn sample(&self, logits: &[f32]) -> std::result::Result<SampledToken, SamplingError> {
        let position = self.tokens.len() as u64;
        let sampling = &self.job.sampling;
        let (token, p) = sampling.draw(logits, &self.tokens, (self.job.rng_key, position))?;
        let draw = match (self.job.sampled_logps, sampling.filters()) {
            (false, _) => None,
            (true, false) => Some((p.ln() as f32, p.ln() as f32)),
            (true, true) => {
                let before = LogProbs::at_temperature(logits, token, sampling.temperature)?;
                Some((before, p.ln() as f32))
            }
        };
        let logprobs = match self.job.logprobs {
            Some(k) => {
                let log_probs = LogProbs::new(logits)?;
                Some((log_probs.of(token), log_probs.top_k(k)))
            }
            None => None,
        };
        Ok(SampledToken { token, logprobs, draw })
    }

    /// Appends a token.
    fn push(&mut self, choice: SampledToken) {
        if let Some((logprob, top)) = choice.logprobs {
            self.generated.token_logprobs.push(logprob);
            self.generated.logprobs.push(top);
        }
        if let Some((sampled, drawn)) = choice.draw {
            self.generated.sampled_logps.push(sampled);
            self.generated.drawn_logps.push(drawn);
        }
        self.tokens.push(choice.token);
        self.generated.token_ids.push(choice.token);
    }

    /// Finishes the row; its output has the prompt cache if [`Job::keep_cache`] is set.
    fn finish(mut self, finish: Finish, cache: Option<KvCache>) -> JobOutput {
        self.generated.finish = finish;
        let prefix = cache.filter(|_| self.job.keep_cache).map(|cache| {
            // The last sampled token is not in the cache.
            self.tokens.truncate(cache.len(0));
            Prefix { tokens: self.tokens, active: self.job.active, cache }
        });
        JobOutput { generated: self.generated, prefix }
    }

    fn finished_event(self, finish: Finish, cache: Option<KvCache>) -> Event {
        Event::Finished { id: self.id, output: Box::new(self.finish(finish, cache)) }
    }
}

/// Samples the next token of each row, given with the index of its row of `logits (M, vocab_size)`, and
/// pushes token events; returns the status of each row.
fn sample_rows(
    rows: &mut [(&mut EngineRow, usize)],
    logits: &Logits,
    events: &mut Vec<Event>,
) -> Vec<RowStatus> {
    // Sampling from a large vocabulary takes longer than the layers of a small model, so rows run in parallel.
    let mut choices: Vec<Option<_>> = rows.iter().map(|_| None).collect();
    let tasks = rows.iter().zip(&mut choices).collect();
    par_for_each(tasks, WORK * rows.len() * logits.vocab_size(), |((row, line), choice)| {
        *choice = Some(row.sample(logits.row(*line)));
    });
    let mut statuses = Vec::with_capacity(rows.len());
    for ((row, _), choice) in rows.iter_mut().zip(choices) {
        let id = row.id;
        let choice = match choice.expect("every row was sampled") {
            Ok(choice) => choice,
            Err(source) => {
                let error = GenerateError::Choice { row: id, position: row.tokens.len(), source };
                events.push(Event::Failed { id, error });
                statuses.push(RowStatus::Failed);
                continue;
            }
        };
        let token = choice.token;
        row.push(choice);
        let is_eos = row.job.eos_token_ids.binary_search(&token).is_ok();
        if !is_eos {
            events.push(Event::Token { id, token });
        }
        statuses.push(match (is_eos, row.is_full()) {
            (true, _) => RowStatus::Finished(Finish::Stop),
            (false, true) => RowStatus::Finished(Finish::Length),
            (false, false) => RowStatus::Running,
        });
    }
    statuses
}

/// Rows with the same prompt and adapters, which share the prompt's cache.
#[derive(Debug)]
struct Group {
    rows: Vec<EngineRow>,
    /// Prompt cache of a single row.
    prefix: Option<Prefix>,
}

impl Group {
    fn tokens(&self) -> &[u32] {
        &self.rows[0].tokens
    }

    /// Whether it is a row that was running before.
    fn is_requeued(&self) -> bool {
        !self.rows[0].generated.token_ids.is_empty()
    }

    /// How many tokens of the prompt are in the prompt cache.
    fn cached_len(&self) -> usize {
        let row = &self.rows[0];
        self.prefix.as_ref().map_or(0, |prefix| prefix.cached_len(&row.tokens, &row.job.active))
    }
}

/// Removes the next groups to prefill: as many as fit into a pass.
fn next_chunk(waiting: &mut VecDeque<Group>) -> Vec<Group> {
    let (mut chunk, mut tokens) = (Vec::new(), 0);
    while let Some(group) = waiting.front() {
        tokens += group.tokens().len() - group.cached_len();
        if !chunk.is_empty() && (tokens > PREFILL_TOKENS || chunk.len() == PREFILL_PROMPTS) {
            break;
        }
        chunk.extend(waiting.pop_front());
    }
    chunk
}

/// A prefilled prompt, and the rows of its group that wait for a slot. Their first token is sampled, and
/// not yet in the cache.
#[derive(Debug)]
struct Prefilled {
    cache: KvCache,
    rows: VecDeque<EngineRow>,
}

/// The next row that gets a slot, with its own copy of the cache.
fn take_prefilled(prefilled: &mut VecDeque<Prefilled>) -> Option<(EngineRow, KvCache)> {
    let next = prefilled.front_mut()?;
    let row = next.rows.pop_front()?;
    if next.rows.is_empty() {
        return Some((row, prefilled.pop_front()?.cache));
    }
    Some((row, next.cache.clone()))
}

/// Prefills the prompts of groups and returns a KV cache for each and the logits of their last tokens. At
/// most 512 tokens go through the model at once.
fn prefill(
    decoder: &Decoder,
    kind: CacheType,
    groups: &mut [Group],
) -> Result<(Vec<KvCache>, Logits)> {
    let mut cache = KvCache::with_type(decoder, 0, kind);
    for group in groups.iter_mut() {
        let cached = group.cached_len();
        let own = group.prefix.take().filter(|_| cached > 0).map(|prefix| prefix.cache);
        let mut own = own.unwrap_or_else(|| KvCache::with_type(decoder, 1, kind));
        own.truncate(0, cached);
        cache.append(own)?;
    }
    let active: Vec<&[ActiveAdapter]> =
        groups.iter().map(|group| &*group.rows[0].job.active).collect();
    let prompts = groups.iter().enumerate();
    let mut todo: Vec<&[u32]> =
        prompts.map(|(row, group)| &group.tokens()[cache.len(row)..]).collect();
    // With a RoPE scaling that depends on the row's length, prefill cannot be chunked.
    let whole = |row: usize, rest: &[u32]| !cache.same_rope_scaling(1, cache.len(row) + rest.len());
    let whole: Vec<bool> = todo.iter().enumerate().map(|(row, rest)| whole(row, rest)).collect();
    let mut lengths: Vec<usize> = (0..groups.len()).map(|row| cache.len(row)).collect();
    let mut passes = Vec::new();
    while todo.iter().any(|rest| !rest.is_empty()) {
        let mut room = PREFILL_TOKENS;
        let split = todo.iter().zip(&whole).map(|(rest, whole)| {
            let new = if *whole && room > 0 { rest.len() } else { rest.len().min(room) };
            room = room.saturating_sub(new);
            rest.split_at(new)
        });
        let (new, rest): (Vec<&[u32]>, Vec<&[u32]>) = split.unzip();
        let rows = Rows::after(new.iter().zip(&lengths).map(|(new, length)| (*new, *length)));
        lengths.iter_mut().zip(&new).for_each(|(length, new)| *length += new.len());
        let last_tokens = rows.segments.iter().zip(&rest).filter(|(new, rest)| {
            !new.is_empty() && rest.is_empty() // in the order of the groups, over all passes
        });
        let last_tokens: Vec<u32> = last_tokens.map(|(new, _)| new.tokens.end as u32 - 1).collect();
        passes.push((rows, last_tokens));
        todo = rest;
    }
    let logits = decoder.logits_cached(&passes, Adapters::PerRow(&active), &mut cache)?;
    Ok((cache.into_rows(), logits))
}

/// The rows that are running.
#[derive(Debug)]
struct DecodeBatch {
    rows: Vec<EngineRow>,
    cache: KvCache,
}

impl DecodeBatch {
    fn admit(&mut self, row: EngineRow, cache: KvCache) -> Result<()> {
        self.rows.push(row);
        self.cache.append(cache)
    }

    fn remove(&mut self, index: usize) -> (EngineRow, KvCache) {
        (self.rows.remove(index), self.cache.take(index))
    }

    /// Runs the last token of each row and returns their logits.
    fn step(&mut self, decoder: &Decoder) -> Result<Logits> {
        let last: Vec<&[u32]> =
            self.rows.iter().map(|row| &row.tokens[row.tokens.len() - 1..]).collect();
        let last = last.iter().enumerate().map(|(row, new)| (*new, self.cache.len(row)));
        let last = Rows::after(last);
        let active: Vec<&[ActiveAdapter]> = self.rows.iter().map(|row| &*row.job.active).collect();
        decoder.logits_step(&last, Adapters::PerRow(&active), &mut self.cache)
    }
}
