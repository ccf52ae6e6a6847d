//! Continuous batching: prompts into caches, then a token a row; a row that ends makes room for
//! the next.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::sampling::{LogProbs, Sampling, SamplingError};
use crate::model::{Adapters, CacheType, Decoder, KvCache, Rows, Worn};
use crate::ops::Values;

/// Tokens of one pass over the prompts; bounds the activations, not the cache.
const PREFILL_TOKENS: usize = 512;

/// Prompts of one pass; bounds the logits of their last tokens.
const PREFILL_PROMPTS: usize = 64;

/// A row to be continued.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The tokens to go on from, at least one.
    pub prompt: &'a [u32],
    /// What its randomness is keyed by: its number in the data, whatever batch it falls into.
    pub key: u64,
    /// Tokens this row may get, if not as many as the settings say.
    pub max_tokens: Option<usize>,
}

impl<'a> Request<'a> {
    /// A row that may get as many tokens as the settings say.
    pub fn new(prompt: &'a [u32], key: u64) -> Self {
        Self { prompt, key, max_tokens: None }
    }
}

/// How the rows of a batch go on.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens a row may get.
    pub max_tokens: usize,
    /// How keys and values are kept.
    pub cache: CacheType,
    /// `Some(k)` records each chosen token's log-probability and the `k` likeliest.
    pub logprobs: Option<usize>,
    /// Whether each choice's log-probability is recorded as it was drawn, and before filters.
    pub draws: bool,
    /// Rows that run at a time; 0 for all.
    pub slots: usize,
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
    /// If asked for, each new token's likeliest alternatives, itself counted, the likeliest first.
    pub logprobs: Vec<Vec<(u32, f32)>>,
    /// If asked for, each new token's log-probability at the sampling temperature, before filters.
    pub sampled_logps: Vec<f32>,
    /// If asked for, the same of the distribution it was drawn from.
    pub drawn_logps: Vec<f32>,
}

/// What all rows got, and what it took.
#[derive(Debug, Clone)]
pub struct Generation {
    /// What each request got, in their order.
    pub rows: Vec<Generated>,
    /// What it took.
    pub usage: Usage,
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
}

impl Usage {
    /// 1 where no slot is ever empty, less where first tokens weigh.
    pub fn slot_steps_per_token(&self) -> f64 {
        self.slot_steps as f64 / self.tokens.max(1) as f64
    }

    fn count_prompts(&mut self, groups: &[Vec<usize>], rows: &[Row]) {
        for group in groups {
            let tokens = rows[group[0]].tokens.len();
            self.prompt_tokens += tokens;
            self.shared_prompt_tokens += tokens * (group.len() - 1);
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

/// Continues every row until an end-of-generation token, its `max_tokens`, the end of the model's
/// window, or until `on_token` breaks it off.
///
/// At most `settings.slots` rows run at a time; the place of one that ends is taken by the next
/// before another step is made (Orca's iteration-level scheduling, Yu et al. 2022). Prompts are
/// read ahead, up to 512 tokens of at most 64 in a pass, and wait with their first token chosen: a
/// matrix is unpacked for a chunk, not for a short prompt. Neighbours with the same prompt and
/// adapters are a group, whose prompt is read once.
///
/// `on_token` gets the row and each new token but the end-of-generation token, as it is chosen.
/// What a row gets depends on its prompt, its key, its adapters and the settings, never on `slots`
/// or on the other rows. Memory: the caches of at most `slots` rows and of waiting prompts of 512
/// tokens (or a longer one), a row of logits for each, and the activations of at most 512 tokens (or
/// of one a row). Nothing is learned from: adapters count alike, trainable or not.
pub fn generate(
    decoder: &Decoder,
    adapters: Adapters,
    requests: &[Request],
    settings: &Settings,
    is_end: &dyn Fn(u32) -> bool,
    on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
) -> std::result::Result<Generation, GenerateError> {
    check(decoder, adapters, requests, settings)?;
    let window = decoder.config.max_position_embeddings;
    let mut rows: Vec<Row> =
        requests.iter().map(|request| Row::new(request, settings.max_tokens, window)).collect();
    let slots = match settings.slots {
        0 => rows.len(),
        slots => slots.min(rows.len()),
    };
    let mut usage = Usage::default();
    let mut waiting = groups(adapters, &rows);
    let mut parked = VecDeque::new();
    let mut batch = Batch::new(decoder, adapters, settings.cache);
    loop {
        while batch.rows.len() < slots {
            if let Some(next) = take_parked(&mut parked) {
                batch.admit(next);
            } else if waiting.is_empty() {
                break;
            } else {
                let chunk = next_chunk(&mut waiting, &rows);
                let (caches, hidden) = prefill(decoder, adapters, settings.cache, &rows, &chunk)?;
                usage.count_prompts(&chunk, &rows);
                // All of a group choose from the same logits.
                let readers = (0..).zip(&chunk);
                let readers =
                    readers.flat_map(|(line, group)| group.iter().map(move |&r| (r, line)));
                let readers: Vec<(usize, usize)> = readers.collect();
                let worn: Vec<&[Worn]> = chunk.iter().map(|group| adapters.of(group[0])).collect();
                let worn = Adapters::PerRow(&worn);
                let logits = decoder.logits(&hidden, worn)?; // (groups, vocab_size)
                let goes_on = choose(&mut rows, &readers, &logits, settings, is_end, on_token)?;
                let mut goes_on = goes_on.into_iter();
                for (cache, mut group) in caches.into_iter().zip(chunk) {
                    retain(&mut group, goes_on.by_ref());
                    parked.push_back(Parked { cache, rows: group.into() });
                }
            }
        }
        if batch.rows.is_empty() {
            usage.tokens = rows.iter().map(|row| row.generated.token_ids.len()).sum();
            let rows = rows.into_iter().map(|row| row.generated).collect();
            return Ok(Generation { rows, usage });
        }
        let hidden = batch.step(&rows)?; // (running, hidden_size)
        usage.steps += 1;
        usage.slot_steps += slots;
        let readers: Vec<(usize, usize)> = batch.rows.iter().copied().zip(0..).collect();
        let worn = Adapters::PerRow(&batch.worn);
        let logits = decoder.logits(&hidden, worn)?; // (running, vocab_size)
        let goes_on = choose(&mut rows, &readers, &logits, settings, is_end, on_token)?;
        batch.retain(&goes_on);
    }
}

fn check(
    decoder: &Decoder,
    adapters: Adapters,
    requests: &[Request],
    settings: &Settings,
) -> std::result::Result<(), GenerateError> {
    settings.sampling.check().map_err(GenerateError::Setting)?;
    if let Adapters::PerRow(lists) = adapters
        && lists.len() != requests.len()
    {
        return Err(GenerateError::Adapters { found: lists.len(), rows: requests.len() });
    }
    let (window, vocab_size) = (decoder.config.max_position_embeddings, decoder.config.vocab_size);
    for (row, Request { prompt, .. }) in requests.iter().enumerate() {
        if prompt.is_empty() {
            return Err(GenerateError::EmptyPrompt { row });
        }
        if prompt.len() >= window {
            return Err(GenerateError::LongPrompt { row, tokens: prompt.len(), window });
        }
        if let Some(&token) = prompt.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(GenerateError::Token { row, token, vocab_size });
        }
    }
    Ok(())
}

/// A row on its way.
struct Row {
    /// Prompt and new tokens.
    tokens: Vec<u32>,
    /// How many these may become.
    most: usize,
    key: u64,
    generated: Generated,
}

/// A token that was chosen, and what is recorded of it.
struct Choice {
    token: u32,
    logprobs: Option<(f32, Vec<(u32, f32)>)>,
    /// Before filters, and as drawn.
    draw: Option<(f32, f32)>,
}

impl Row {
    fn new(request: &Request, max_tokens: usize, window: usize) -> Self {
        let generated = Generated {
            token_ids: Vec::new(),
            finish: Finish::Length,
            token_logprobs: Vec::new(),
            logprobs: Vec::new(),
            sampled_logps: Vec::new(),
            drawn_logps: Vec::new(),
        };
        let tokens = request.prompt.to_vec();
        let new = request.max_tokens.unwrap_or(max_tokens);
        let most = tokens.len().saturating_add(new).min(window);
        Self { tokens, most, key: request.key, generated }
    }

    fn is_full(&self) -> bool {
        self.tokens.len() >= self.most
    }

    /// Chooses the next token.
    fn choose(
        &self,
        logits: &[f32],
        settings: &Settings,
    ) -> std::result::Result<Choice, SamplingError> {
        let position = self.tokens.len() as u64;
        let sampling = &settings.sampling;
        let (token, p) = sampling.draw(logits, &self.tokens, (self.key, position))?;
        let draw = match (settings.draws, sampling.filters()) {
            (false, _) => None,
            (true, false) => Some((p.ln() as f32, p.ln() as f32)),
            (true, true) => {
                let before = LogProbs::heated(logits, token, sampling.temperature)?;
                Some((before, p.ln() as f32))
            }
        };
        let logprobs = match settings.logprobs {
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
}

/// Chooses the next token of each reader, a row and the line of `logits (M, vocab_size)` it reads;
/// whether each goes on.
fn choose(
    rows: &mut [Row],
    readers: &[(usize, usize)],
    logits: &Tensor,
    settings: &Settings,
    is_end: &dyn Fn(u32) -> bool,
    on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
) -> std::result::Result<Vec<bool>, GenerateError> {
    let vocab_size = logits.dim(1)?;
    let logits = Values::of(logits)?;
    let logits: &[f32] = &logits;
    // A vocabulary takes longer than a small model's layers: rows choose in parallel.
    let choices: Vec<_> = readers
        .par_iter()
        .map(|&(row, line)| rows[row].choose(&logits[line * vocab_size..][..vocab_size], settings))
        .collect();
    let mut goes_on = Vec::with_capacity(readers.len());
    for (&(index, _), choice) in readers.iter().zip(choices) {
        let row = &mut rows[index];
        let position = row.tokens.len();
        let choice =
            choice.map_err(|source| GenerateError::Choice { row: index, position, source })?;
        let token = choice.token;
        row.push(choice);
        let finish = if is_end(token) {
            Some(Finish::Stop)
        } else if on_token(index, token).is_break() {
            Some(Finish::Callback)
        } else if row.is_full() {
            Some(Finish::Length)
        } else {
            None
        };
        row.generated.finish = finish.unwrap_or(row.generated.finish);
        goes_on.push(finish.is_none());
    }
    Ok(goes_on)
}

/// Neighbouring rows with the same prompt and adapters, which share the prompt's cache. Rows that
/// may get no token are in none.
fn groups(adapters: Adapters, rows: &[Row]) -> VecDeque<Vec<usize>> {
    let mut groups: VecDeque<Vec<usize>> = VecDeque::new();
    for (index, row) in rows.iter().enumerate().filter(|(_, row)| !row.is_full()) {
        let fits = |group: &&mut Vec<usize>| {
            let first = group[0];
            rows[first].tokens == row.tokens && same(adapters.of(first), adapters.of(index))
        };
        match groups.back_mut().filter(fits) {
            Some(group) => group.push(index),
            None => groups.push_back(vec![index]),
        }
    }
    groups
}

fn same(a: &[Worn], b: &[Worn]) -> bool {
    let equal = |(a, b): (&Worn, &Worn)| {
        Arc::ptr_eq(&a.adapter, &b.adapter) && a.weight.to_bits() == b.weight.to_bits()
    };
    std::ptr::eq(a, b) || a.len() == b.len() && a.iter().zip(b).all(equal)
}

/// The groups whose prompts are read next: as many as fit into a pass.
fn next_chunk(waiting: &mut VecDeque<Vec<usize>>, rows: &[Row]) -> Vec<Vec<usize>> {
    let (mut chunk, mut tokens) = (Vec::new(), 0);
    while let Some(group) = waiting.front() {
        tokens += rows[group[0]].tokens.len();
        if !chunk.is_empty() && (tokens > PREFILL_TOKENS || chunk.len() == PREFILL_PROMPTS) {
            break;
        }
        chunk.extend(waiting.pop_front());
    }
    chunk
}

/// A prompt that has been read, and the rows of its group that have no slot yet. Their first token
/// is chosen, and not yet in the cache.
struct Parked {
    cache: KvCache,
    rows: VecDeque<usize>,
}

/// The next row that takes a slot, with a cache of its own.
fn take_parked(parked: &mut VecDeque<Parked>) -> Option<(usize, KvCache)> {
    loop {
        let next = parked.front_mut()?;
        let row = next.rows.pop_front();
        if row.is_some() && !next.rows.is_empty() {
            return Some((row?, next.cache.clone()));
        }
        let Parked { cache, .. } = parked.pop_front()?;
        if let Some(row) = row {
            return Some((row, cache));
        }
    }
}

/// Takes in the whole prompts of groups and gives a cache for each and the hidden states of their
/// last tokens, `(groups, hidden_size)`. At most 512 tokens go through the model at once.
fn prefill(
    decoder: &Decoder,
    adapters: Adapters,
    cache: CacheType,
    rows: &[Row],
    groups: &[Vec<usize>],
) -> Result<(Vec<KvCache>, Tensor)> {
    let worn = groups.iter().map(|group| adapters.of(group[0])).collect();
    let cache = KvCache::with_type(&decoder.config, groups.len(), cache);
    let mut batch = Batch { decoder, adapters, rows: Vec::new(), worn, cache };
    let mut todo: Vec<&[u32]> = groups.iter().map(|group| &rows[group[0]].tokens[..]).collect();
    let mut last = Vec::new();
    while todo.iter().any(|rest| !rest.is_empty()) {
        let mut room = PREFILL_TOKENS;
        let split = todo.iter().map(|rest| {
            let new = rest.len().min(room);
            room -= new;
            rest.split_at(new)
        });
        let (new, rest): (Vec<&[u32]>, Vec<&[u32]>) = split.unzip();
        let new = batch.after(&new);
        let ends = new.segments.iter().zip(&rest).filter(|(new, rest)| {
            !new.is_empty() && rest.is_empty() // in the order of the groups, over all passes
        });
        let ends: Vec<u32> = ends.map(|(new, _)| new.tokens.end as u32 - 1).collect();
        let adapters = Adapters::PerRow(&batch.worn);
        let hidden = decoder.hidden_cached_of(&new, adapters, &mut batch.cache, &ends)?;
        if !ends.is_empty() {
            last.push(hidden);
        }
        todo = rest;
    }
    Ok((batch.cache.into_rows(), Tensor::cat(&last, 0)?))
}

/// The rows that are running.
struct Batch<'a> {
    decoder: &'a Decoder,
    adapters: Adapters<'a>,
    /// Which they are.
    rows: Vec<usize>,
    worn: Vec<&'a [Worn]>,
    cache: KvCache,
}

impl<'a> Batch<'a> {
    fn new(decoder: &'a Decoder, adapters: Adapters<'a>, cache: CacheType) -> Self {
        let cache = KvCache::with_type(&decoder.config, 0, cache);
        Self { decoder, adapters, rows: Vec::new(), worn: Vec::new(), cache }
    }

    fn admit(&mut self, (row, cache): (usize, KvCache)) {
        self.rows.push(row);
        self.worn.push(self.adapters.of(row));
        self.cache.append(cache);
    }

    /// Takes in the last token of each row and gives their hidden states, `(running, hidden_size)`.
    fn step(&mut self, rows: &[Row]) -> Result<Tensor> {
        let last = |&row: &usize| rows[row].tokens.last_chunk::<1>().expect("a prompt has tokens");
        let last: Vec<&[u32]> = self.rows.iter().map(|row| &last(row)[..]).collect();
        let last = self.after(&last);
        self.decoder.hidden_step(&last, Adapters::PerRow(&self.worn), &mut self.cache)
    }

    /// New tokens of each row, at their positions.
    fn after(&self, new: &[&[u32]]) -> Rows {
        Rows::after(new.iter().enumerate().map(|(row, new)| (*new, self.cache.len(row))))
    }

    fn retain(&mut self, goes_on: &[bool]) {
        self.cache.retain(goes_on);
        retain(&mut self.worn, goes_on.iter().copied());
        retain(&mut self.rows, goes_on.iter().copied());
    }
}

/// Keeps the items for which `keep` says so, and takes no more from it than there are items.
fn retain<T>(items: &mut Vec<T>, mut keep: impl Iterator<Item = bool>) {
    items.retain(|_| keep.next().expect("keep has one entry an item"));
}
