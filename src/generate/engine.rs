//! Continuous batching: requests come and go while others run; prompts into caches, then a token a
//! row, and a row that ends makes room for the next.

use std::collections::VecDeque;
use std::sync::Arc;

use candle_core::Result;

use super::sampling::{LogProbs, Sampling, SamplingError};
use crate::model::backend::with_backend;
use crate::model::{ActiveAdapter, Adapters, Backend, CacheType, Decoder, KvCache, Logits, Rows};
use crate::ops::par_for_each;

/// Tokens of one pass over the prompts; bounds the activations, not the cache.
const PREFILL_TOKENS: usize = 512;

/// Prompts of one pass; bounds the logits of their last tokens.
const PREFILL_PROMPTS: usize = 64;

/// What a logit costs of a choice, in multiply-adds.
const WORK: usize = 8;

/// A row to be continued, with all it needs: nothing of it is asked for again.
#[derive(Debug, Clone)]
pub struct Job {
    /// The tokens to go on from, at least one.
    pub prompt: Vec<u32>,
    /// What it uses from its first token to its last, whatever is swapped meanwhile.
    pub active: Arc<[ActiveAdapter]>,
    /// How its tokens are chosen.
    pub sampling: Sampling,
    /// What its randomness is keyed by.
    pub key: u64,
    /// Tokens it may get.
    pub max_tokens: usize,
    /// The end-of-generation tokens, rising.
    pub ends: Arc<[u32]>,
    /// `Some(k)` records each chosen token's log-probability and the `k` most likely.
    pub logprobs: Option<usize>,
    /// Whether each choice's log-probability is recorded as it was drawn, and before filters.
    pub draws: bool,
    /// What an earlier job has read of the same row. Of it, what the prompt begins with is not read
    /// again, if it was read under the same adapters.
    pub prefix: Option<Prefix>,
    /// Whether what was read is given back at the end, as the prefix of another job.
    pub keeps: bool,
}

impl Job {
    /// A row of the bare base that may get `max_tokens` tokens with greedy sampling.
    pub fn new(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self {
            prompt,
            active: Arc::new([]),
            sampling: Sampling::greedy(),
            key: 0,
            max_tokens,
            ends: Arc::new([]),
            logprobs: None,
            draws: false,
            prefix: None,
            keeps: false,
        }
    }
}

/// Tokens that have been read under some adapters, and their keys and values.
#[derive(Debug, Clone)]
pub struct Prefix {
    tokens: Vec<u32>,
    active: Arc<[ActiveAdapter]>,
    cache: KvCache,
}

impl Prefix {
    /// How many tokens of a prompt need not be read again under `active`: never all, for the last one's
    /// hidden state is needed.
    pub fn covers(&self, prompt: &[u32], active: &[ActiveAdapter]) -> usize {
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

/// Why a row ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// An end-of-generation token.
    Stop,
    /// `max_tokens`, or the model's window is full.
    Length,
    /// The caller broke off.
    Callback,
}

/// What a row got.
#[derive(Debug, Clone)]
pub struct Generated {
    /// The new tokens, with the end-of-generation token if one came.
    pub token_ids: Vec<u32>,
    /// Why there are no more.
    pub finish: Finish,
    /// If asked for, each new token's log-probability under the model itself, natural log.
    pub token_logprobs: Vec<f32>,
    /// If asked for, each new token's most likely alternatives, itself counted, the most likely first.
    pub logprobs: Vec<Vec<(u32, f32)>>,
    /// If asked for, each new token's log-probability at the sampling temperature, before filters.
    pub sampled_logps: Vec<f32>,
    /// If asked for, the same of the distribution it was drawn from.
    pub drawn_logps: Vec<f32>,
}

/// A row at its end.
#[derive(Debug, Clone)]
pub struct Ended {
    /// What it got.
    pub generated: Generated,
    /// What was read, of jobs that keep it.
    pub prefix: Option<Prefix>,
}

/// What came of a step, by the job's number.
#[derive(Debug)]
pub enum Event {
    /// A new token, and not one that ends the row.
    Token {
        /// The job.
        id: usize,
        /// The token.
        token: u32,
    },
    /// A row has ended by itself.
    Finished {
        /// The job.
        id: usize,
        /// What it got.
        ended: Box<Ended>,
    },
    /// The model's numbers were of no use to a row, which is gone. The others go on.
    Failed {
        /// The job.
        id: usize,
        /// What is wrong.
        error: GenerateError,
    },
}

/// The work of a generation, counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Decoding steps.
    pub steps: usize,
    /// Steps times slots, empty ones counted.
    pub slot_steps: usize,
    /// New tokens, end-of-generation tokens counted. A row's first is no step's: its prompt's.
    pub tokens: usize,
    /// Tokens of prompts that were read.
    pub prompt_tokens: usize,
    /// Tokens of prompts that were not, being a neighbour's.
    pub shared_prompt_tokens: usize,
    /// Tokens of prompts that were not, an earlier job having read them.
    pub kept_prompt_tokens: usize,
    /// Tokens that were read once more, prompts and new ones alike, of rows that came to rotate otherwise.
    pub reread_tokens: usize,
}

impl Usage {
    /// 1 where no slot is ever empty, less where first tokens weigh.
    pub fn slot_steps_per_token(&self) -> f64 {
        self.slot_steps as f64 / self.tokens.max(1) as f64
    }

    fn count_prompts(&mut self, groups: &[Group]) {
        for group in groups {
            let (tokens, kept) = (group.tokens().len(), group.kept());
            if group.is_read_again() {
                self.reread_tokens += tokens;
                continue;
            }
            self.prompt_tokens += tokens - kept;
            self.kept_prompt_tokens += kept;
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
        self.kept_prompt_tokens += other.kept_prompt_tokens;
        self.reread_tokens += other.reread_tokens;
    }
}

/// Why nothing could be generated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// A prompt of no tokens.
    #[error("prompt {row} has no tokens, needed at least one to go on from")]
    EmptyPrompt {
        /// The row, from 0.
        row: usize,
    },
    /// A prompt that fills the model's window.
    #[error(
        "prompt {row} has {tokens} tokens: the model's window of {window} has no room for more"
    )]
    LongPrompt {
        /// The row, from 0.
        row: usize,
        /// Its length.
        tokens: usize,
        /// `max_position_embeddings`.
        window: usize,
    },
    /// A token the model does not know.
    #[error("prompt {row} has token {token}, the vocabulary has {vocab_size}")]
    Token {
        /// The row, from 0.
        row: usize,
        /// The token.
        token: u32,
        /// `vocab_size`.
        vocab_size: usize,
    },
    /// Adapters row by row, but not for these rows.
    #[error("{found} lists of adapters for {rows} prompts, needed one each")]
    Adapters {
        /// Lists.
        found: usize,
        /// Prompts.
        rows: usize,
    },
    /// A setting outside its range.
    #[error(transparent)]
    Setting(SamplingError),
    /// The model's numbers are of no use.
    #[error("row {row}, position {position}: {source}")]
    Choice {
        /// The row, from 0.
        row: usize,
        /// Of the token that was to be chosen, from the start of the prompt.
        position: usize,
        /// What is wrong with them.
        source: SamplingError,
    },
    /// candle refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Rows of any kind on their way through one decoder, together: jobs are submitted at any time, and
/// every [`Self::step`] brings those that run a token further.
///
/// At most `slots` rows run at a time; the place of one that ends is taken by the next before
/// another token is decoded (Orca's iteration-level scheduling, Yu et al. 2022). Prompts are read
/// ahead, up to 512 tokens of at most 64 in a pass, and wait with their first token chosen: a matrix
/// is unpacked for a chunk, not for a short prompt. Jobs with the same prompt and adapters that are
/// submitted one after the other are a group, whose prompt is read once.
///
/// What a row gets depends on its own job, never on `slots` or on the other rows; only a prefix that
/// is taken over was rounded otherwise in the integer modes than a prompt that is read, and an
/// adapter with numbers that are not finite spoils the prompts that are read with its own (a registry
/// refuses such adapters). A job holds its adapters until it ends. Memory: the caches of at most `slots` rows and of waiting prompts of
/// 512 tokens (or a longer one), a row of logits for each, and the activations of at most 512 tokens
/// (or of one a row). Nothing is learned from: adapters count alike, trainable or not.
#[derive(Debug)]
pub struct Engine<'a> {
    decoder: &'a Decoder,
    kind: CacheType,
    slots: usize,
    submitted: usize,
    usage: Usage,
    /// Prompts that have not been read.
    waiting: VecDeque<Group>,
    /// Prompts that have been read, whose rows have no slot yet.
    parked: VecDeque<Parked>,
    running: DecodeBatch,
    /// Events of the next step.
    pending_events: Vec<Event>,
}

impl<'a> Engine<'a> {
    /// An engine with nothing to do. `slots` is how many rows run at a time, 0 for all there are.
    pub fn new(decoder: &'a Decoder, cache: CacheType, slots: usize) -> Self {
        Self {
            decoder,
            kind: cache,
            slots,
            submitted: 0,
            usage: Usage::default(),
            waiting: VecDeque::new(),
            parked: VecDeque::new(),
            running: DecodeBatch { rows: Vec::new(), cache: KvCache::with_type(decoder, 0, cache) },
            pending_events: Vec::new(),
        }
    }

    /// Takes a job in and gives its number: they are counted from 0.
    ///
    /// # Errors
    /// If its prompt is empty, fills the window or is none of the vocabulary's, or a setting is out of
    /// range. Such a job has no number and leaves no trace.
    pub fn submit(&mut self, mut job: Job) -> std::result::Result<usize, GenerateError> {
        let id = self.submitted;
        self.check(id, &job)?;
        self.submitted += 1;
        let prefix = job.prefix.take();
        let row = EngineRow::new(id, job, self.decoder.config.max_position_embeddings);
        if row.is_full() {
            let ended = Box::new(Ended { generated: row.generated, prefix });
            self.pending_events.push(Event::Finished { id, ended });
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

    /// Ends a job wherever it is and gives what it got so far, as broken off by the caller; nothing
    /// more is told of it. `None` if there is no such job, or it has ended already.
    pub fn cancel(&mut self, id: usize) -> Option<Ended> {
        if let Some(index) = self.running.rows.iter().position(|row| row.id == id) {
            let (row, cache) = self.running.remove(index);
            return Some(row.end(Finish::Callback, Some(cache)));
        }
        for (index, parked) in self.parked.iter_mut().enumerate() {
            if let Some(at) = parked.rows.iter().position(|row| row.id == id) {
                let row = parked.rows.remove(at)?;
                let cache = match parked.rows.is_empty() {
                    true => self.parked.remove(index)?.cache,
                    false => parked.cache.clone(),
                };
                return Some(row.end(Finish::Callback, Some(cache)));
            }
        }
        for (index, group) in self.waiting.iter_mut().enumerate() {
            if let Some(at) = group.rows.iter().position(|row| row.id == id) {
                let (row, prefix) = (group.rows.remove(at), group.prefix.take());
                if group.rows.is_empty() {
                    self.waiting.remove(index);
                }
                return Some(Ended { prefix, ..row.end(Finish::Callback, None) });
            }
        }
        None
    }

    /// Whether there is nothing to do and nothing to tell.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty()
            && self.parked.is_empty()
            && self.running.rows.is_empty()
            && self.pending_events.is_empty()
    }

    /// What it took so far.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// One pass through the model: where a slot is free and a prompt waits, a chunk of prompts and
    /// their first tokens; else a token for each running row. Gives what has come of it, a job's
    /// tokens in their order and its end after them. Does nothing if there is nothing to do.
    ///
    /// While tokens are decoded the threads of the pool that this is called in, or of rayon's global one,
    /// keep their cores busy, and are not free for other work.
    ///
    /// # Errors
    /// If a tensor operation fails: the rows of that pass are lost, and the engine with them.
    pub fn step(&mut self) -> std::result::Result<Vec<Event>, GenerateError> {
        while self.has_slot()
            && let Some((row, cache)) = take_parked(&mut self.parked)
        {
            self.running.admit(row, cache)?;
        }
        self.reread();
        let mut events = std::mem::take(&mut self.pending_events);
        if self.has_slot() && !self.waiting.is_empty() {
            self.read_prompts(&mut events)?;
        } else if !self.running.rows.is_empty() {
            with_backend!(self.decoder.compute.backend, B => B::decoding(|| self.decode(&mut events)))?;
        }
        Ok(events)
    }

    /// Gives up what has been read of running rows that are about to grow so long that they rotate
    /// otherwise: they wait, to be read anew.
    fn reread(&mut self) {
        let DecodeBatch { rows, cache } = &self.running;
        let turns = |index: &usize| {
            let read = cache.len(*index);
            !cache.same_rope_scaling(read, rows[*index].tokens.len())
        };
        let turning: Vec<usize> = (0..rows.len()).rev().filter(turns).collect();
        for index in turning {
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

    /// Reads the next chunk of prompts, whose rows are parked with their first token.
    fn read_prompts(&mut self, events: &mut Vec<Event>) -> std::result::Result<(), GenerateError> {
        let mut chunk = next_chunk(&mut self.waiting);
        self.usage.count_prompts(&chunk);
        let (caches, logits) = prefill(self.decoder, self.kind, &mut chunk)?;
        // All of a group choose from the same logits.
        let rows = chunk.iter_mut().zip(0..);
        let rows = rows.flat_map(|(group, line)| group.rows.iter_mut().map(move |row| (row, line)));
        let mut rows: Vec<(&mut EngineRow, usize)> = rows.collect();
        self.usage.tokens += rows.len();
        let mut fates = choose(&mut rows, &logits, events).into_iter();
        for (cache, group) in caches.into_iter().zip(chunk) {
            let mut rows = VecDeque::new();
            for row in group.rows {
                match fates.next().expect("one for every row") {
                    Fate::GoesOn => rows.push_back(row),
                    Fate::Ends(finish) => {
                        let cache = row.job.keeps.then(|| cache.clone());
                        events.push(row.finished(finish, cache));
                    }
                    Fate::Fails => {}
                }
            }
            if !rows.is_empty() {
                self.parked.push_back(Parked { cache, rows });
            }
        }
        Ok(())
    }

    /// Brings the rows that run a token further.
    fn decode(&mut self, events: &mut Vec<Event>) -> std::result::Result<(), GenerateError> {
        let batch = &mut self.running;
        let logits = batch.step(self.decoder)?; // of the running rows
        self.usage.steps += 1;
        self.usage.slot_steps += self.slots.max(batch.rows.len());
        self.usage.tokens += batch.rows.len();
        let mut rows: Vec<(&mut EngineRow, usize)> = batch.rows.iter_mut().zip(0..).collect();
        let mut index = 0;
        for fate in choose(&mut rows, &logits, events) {
            if fate == Fate::GoesOn {
                index += 1;
                continue;
            }
            let (row, cache) = batch.remove(index);
            if let Fate::Ends(finish) = fate {
                events.push(row.finished(finish, Some(cache)));
            }
        }
        Ok(())
    }
}

/// A row on its way.
#[derive(Debug)]
struct EngineRow {
    id: usize,
    /// Prompt and new tokens.
    tokens: Vec<u32>,
    /// How many these may become.
    most: usize,
    /// How it goes on; its prompt and prefix are taken.
    job: Job,
    generated: Generated,
}

/// A token that was chosen, and what is recorded of it.
struct Choice {
    token: u32,
    logprobs: Option<(f32, Vec<(u32, f32)>)>,
    /// Before filters, and as drawn.
    draw: Option<(f32, f32)>,
}

/// What becomes of a row after a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    GoesOn,
    Ends(Finish),
    Fails,
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
        let most = tokens.len().saturating_add(job.max_tokens).min(window);
        Self { id, tokens, most, job, generated }
    }

    fn is_full(&self) -> bool {
        self.tokens.len() >= self.most
    }

    /// Chooses the next token.
    fn choose(&self, logits: &[f32]) -> std::result::Result<Choice, SamplingError> {
        let position = self.tokens.len() as u64;
        let sampling = &self.job.sampling;
        let (token, p) = sampling.draw(logits, &self.tokens, (self.job.key, position))?;
        let draw = match (self.job.draws, sampling.filters()) {
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
        Ok(Choice { token, logprobs, draw })
    }

    /// Writes a token down.
    fn push(&mut self, choice: Choice) {
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

    /// The row at its end, with what was read of it if the job keeps it.
    fn end(mut self, finish: Finish, cache: Option<KvCache>) -> Ended {
        self.generated.finish = finish;
        let prefix = cache.filter(|_| self.job.keeps).map(|cache| {
            // The last token chosen has not been read.
            self.tokens.truncate(cache.len(0));
            Prefix { tokens: self.tokens, active: self.job.active, cache }
        });
        Ended { generated: self.generated, prefix }
    }

    fn finished(self, finish: Finish, cache: Option<KvCache>) -> Event {
        Event::Finished { id: self.id, ended: Box::new(self.end(finish, cache)) }
    }
}

/// Chooses the next token of each row, which comes with the line of `logits (M, vocab_size)` it
/// reads, and tells the tokens; what becomes of each.
fn choose(
    rows: &mut [(&mut EngineRow, usize)],
    logits: &Logits,
    events: &mut Vec<Event>,
) -> Vec<Fate> {
    // A vocabulary takes longer than a small model's layers: rows choose in parallel.
    let mut choices: Vec<Option<_>> = rows.iter().map(|_| None).collect();
    let tasks = rows.iter().zip(&mut choices).collect();
    par_for_each(tasks, WORK * rows.len() * logits.vocab_size(), |((row, line), choice)| {
        *choice = Some(row.choose(logits.row(*line)));
    });
    let mut fates = Vec::with_capacity(rows.len());
    for ((row, _), choice) in rows.iter_mut().zip(choices) {
        let id = row.id;
        let choice = match choice.expect("every row has chosen") {
            Ok(choice) => choice,
            Err(source) => {
                let error = GenerateError::Choice { row: id, position: row.tokens.len(), source };
                events.push(Event::Failed { id, error });
                fates.push(Fate::Fails);
                continue;
            }
        };
        let token = choice.token;
        row.push(choice);
        let ends = row.job.ends.binary_search(&token).is_ok();
        if !ends {
            events.push(Event::Token { id, token });
        }
        fates.push(match (ends, row.is_full()) {
            (true, _) => Fate::Ends(Finish::Stop),
            (false, true) => Fate::Ends(Finish::Length),
            (false, false) => Fate::GoesOn,
        });
    }
    fates
}

/// Rows with the same prompt and adapters, which share the prompt's cache.
#[derive(Debug)]
struct Group {
    rows: Vec<EngineRow>,
    /// What of the prompt has been read before, of a row by itself.
    prefix: Option<Prefix>,
}

impl Group {
    fn tokens(&self) -> &[u32] {
        &self.rows[0].tokens
    }

    /// Whether it is a row that was on its way already.
    fn is_read_again(&self) -> bool {
        !self.rows[0].generated.token_ids.is_empty()
    }

    /// How many tokens of the prompt need not be read.
    fn kept(&self) -> usize {
        let row = &self.rows[0];
        self.prefix.as_ref().map_or(0, |prefix| prefix.covers(&row.tokens, &row.job.active))
    }
}

/// The groups whose prompts are read next: as many as fit into a pass.
fn next_chunk(waiting: &mut VecDeque<Group>) -> Vec<Group> {
    let (mut chunk, mut tokens) = (Vec::new(), 0);
    while let Some(group) = waiting.front() {
        tokens += group.tokens().len() - group.kept();
        if !chunk.is_empty() && (tokens > PREFILL_TOKENS || chunk.len() == PREFILL_PROMPTS) {
            break;
        }
        chunk.extend(waiting.pop_front());
    }
    chunk
}

/// A prompt that has been read, and the rows of its group that have no slot yet. Their first token
/// is chosen, and not yet in the cache.
#[derive(Debug)]
struct Parked {
    cache: KvCache,
    rows: VecDeque<EngineRow>,
}

/// The next row that takes a slot, with a cache of its own.
fn take_parked(parked: &mut VecDeque<Parked>) -> Option<(EngineRow, KvCache)> {
    let next = parked.front_mut()?;
    let row = next.rows.pop_front()?;
    if next.rows.is_empty() {
        return Some((row, parked.pop_front()?.cache));
    }
    Some((row, next.cache.clone()))
}

/// Takes in the prompts of groups and gives a cache for each and the logits of their last tokens. At most 512 tokens go through the model at once.
fn prefill(
    decoder: &Decoder,
    kind: CacheType,
    groups: &mut [Group],
) -> Result<(Vec<KvCache>, Logits)> {
    let mut cache = KvCache::with_type(decoder, 0, kind);
    for group in groups.iter_mut() {
        let kept = group.kept();
        let own = group.prefix.take().filter(|_| kept > 0).map(|prefix| prefix.cache);
        let mut own = own.unwrap_or_else(|| KvCache::with_type(decoder, 1, kind));
        own.truncate(0, kept);
        cache.append(own)?;
    }
    let active: Vec<&[ActiveAdapter]> =
        groups.iter().map(|group| &*group.rows[0].job.active).collect();
    let prompts = groups.iter().enumerate();
    let mut todo: Vec<&[u32]> =
        prompts.map(|(row, group)| &group.tokens()[cache.len(row)..]).collect();
    // A row that rotates by its length cannot be read in pieces of which the first are shorter.
    let whole = |row: usize, rest: &[u32]| !cache.same_rope_scaling(1, cache.len(row) + rest.len());
    let whole: Vec<bool> = todo.iter().enumerate().map(|(row, rest)| whole(row, rest)).collect();
    let mut seen: Vec<usize> = (0..groups.len()).map(|row| cache.len(row)).collect();
    let mut passes = Vec::new();
    while todo.iter().any(|rest| !rest.is_empty()) {
        let mut room = PREFILL_TOKENS;
        let split = todo.iter().zip(&whole).map(|(rest, whole)| {
            let new = if *whole && room > 0 { rest.len() } else { rest.len().min(room) };
            room = room.saturating_sub(new);
            rest.split_at(new)
        });
        let (new, rest): (Vec<&[u32]>, Vec<&[u32]>) = split.unzip();
        let rows = Rows::after(new.iter().zip(&seen).map(|(new, seen)| (*new, *seen)));
        seen.iter_mut().zip(&new).for_each(|(seen, new)| *seen += new.len());
        let ends = rows.segments.iter().zip(&rest).filter(|(new, rest)| {
            !new.is_empty() && rest.is_empty() // in the order of the groups, over all passes
        });
        let ends: Vec<u32> = ends.map(|(new, _)| new.tokens.end as u32 - 1).collect();
        passes.push((rows, ends));
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

    /// Takes in the last token of each row and gives their logits.
    fn step(&mut self, decoder: &Decoder) -> Result<Logits> {
        let last: Vec<&[u32]> =
            self.rows.iter().map(|row| &row.tokens[row.tokens.len() - 1..]).collect();
        let last = last.iter().enumerate().map(|(row, new)| (*new, self.cache.len(row)));
        let last = Rows::after(last);
        let active: Vec<&[ActiveAdapter]> = self.rows.iter().map(|row| &*row.job.active).collect();
        decoder.logits_step(&last, Adapters::PerRow(&active), &mut self.cache)
    }
}
