//! Batched decoding: prompts into the cache, then a token a row until the last row ends.

use std::ops::ControlFlow;
use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::sampling::{LogProbs, Sampling, SamplingError};
use crate::model::{Adapters, CacheType, Decoder, KvCache, Rows, Worn};
use crate::ops::Segment;

/// New tokens of one pass over the prompts; bounds the activations, not the cache.
const PREFILL_TOKENS: usize = 512;

/// A row to be continued.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The tokens to go on from, at least one.
    pub prompt: &'a [u32],
    /// What its randomness is keyed by: its number in the data, whatever batch it falls into.
    pub key: u64,
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

/// Continues every row until an end-of-generation token, `max_tokens`, the end of the model's
/// window, or until `on_token` breaks it off.
///
/// `on_token` gets the row and each new token but the end-of-generation token, as it is chosen.
/// A row that ends leaves the batch, and its part of the cache is freed. Memory besides the cache:
/// the activations of at most 512 tokens (or of one a row) and a row of logits for each row.
/// Nothing is learned from: adapters count alike, trainable or not.
pub fn generate(
    decoder: &Decoder,
    adapters: Adapters,
    requests: &[Request],
    settings: &Settings,
    is_end: &dyn Fn(u32) -> bool,
    on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
) -> std::result::Result<Vec<Generated>, GenerateError> {
    check(decoder, adapters, requests, settings)?;
    let mut rows: Vec<Row> = requests.iter().map(Row::new).collect();
    if rows.is_empty() || settings.max_tokens == 0 {
        return Ok(rows.into_iter().map(|row| row.generated).collect());
    }

    let worn = (0..rows.len()).map(|row| adapters.of(row)).collect();
    let cache = KvCache::with_type(&decoder.config, rows.len(), settings.cache);
    let mut batch = Batch { decoder, worn, cache };
    let prompts: Vec<&[u32]> = requests.iter().map(|request| request.prompt).collect();
    let mut hidden = batch.prefill(&prompts)?; // (running, hidden_size)
    let mut running: Vec<usize> = (0..rows.len()).collect();
    loop {
        let logits = decoder.logits(&hidden)?.to_vec2::<f32>()?; // (running, vocab_size)
        let mut goes_on = Vec::with_capacity(running.len());
        for (&index, logits) in running.iter().zip(&logits) {
            let (row, window) = (&mut rows[index], decoder.config.max_position_embeddings);
            let token = row.choose(logits, settings).map_err(|source| GenerateError::Choice {
                row: index,
                position: row.tokens.len(),
                source,
            })?;
            let finish = if is_end(token) {
                Some(Finish::Stop)
            } else if on_token(index, token).is_break() {
                Some(Finish::Callback)
            } else if row.generated.token_ids.len() == settings.max_tokens
                || row.tokens.len() == window
            {
                Some(Finish::Length)
            } else {
                None
            };
            row.generated.finish = finish.unwrap_or(row.generated.finish);
            goes_on.push(finish.is_none());
        }
        batch.retain(&goes_on);
        retain(&mut running, &goes_on);
        if running.is_empty() {
            return Ok(rows.into_iter().map(|row| row.generated).collect());
        }
        let last: Vec<&[u32]> =
            running.iter().map(|&row| &rows[row].tokens[rows[row].tokens.len() - 1..]).collect();
        hidden = batch.hidden(&last, true)?.0;
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
    key: u64,
    generated: Generated,
}

impl Row {
    fn new(request: &Request) -> Self {
        let generated = Generated {
            token_ids: Vec::new(),
            finish: Finish::Length,
            token_logprobs: Vec::new(),
            logprobs: Vec::new(),
        };
        Self { tokens: request.prompt.to_vec(), key: request.key, generated }
    }

    /// Chooses the next token and writes it down.
    fn choose(
        &mut self,
        logits: &[f32],
        settings: &Settings,
    ) -> std::result::Result<u32, SamplingError> {
        let position = self.tokens.len() as u64;
        let token = settings.sampling.choose(logits, &self.tokens, (self.key, position))?;
        if let Some(k) = settings.logprobs {
            let log_probs = LogProbs::new(logits)?;
            self.generated.token_logprobs.push(log_probs.of(token));
            self.generated.logprobs.push(log_probs.top_k(k));
        }
        self.tokens.push(token);
        self.generated.token_ids.push(token);
        Ok(token)
    }
}

/// The rows still running.
struct Batch<'a> {
    decoder: &'a Decoder,
    worn: Vec<&'a [Worn]>,
    cache: KvCache,
}

impl Batch<'_> {
    /// Takes in whole prompts, the first rows first, and gives the hidden states of their last
    /// tokens, `(rows, hidden_size)`.
    fn prefill(&mut self, prompts: &[&[u32]]) -> Result<Tensor> {
        let mut last = Vec::new();
        let mut todo = prompts.to_vec();
        while todo.iter().any(|rest| !rest.is_empty()) {
            let mut room = PREFILL_TOKENS;
            let split = todo.iter().map(|rest| {
                let new = rest.len().min(room);
                room -= new;
                rest.split_at(new)
            });
            let (new, rest): (Vec<&[u32]>, Vec<&[u32]>) = split.unzip();
            let (hidden, segments) = self.hidden(&new, false)?;
            let ends = segments.iter().zip(&rest).filter(|(new, rest)| {
                !new.is_empty() && rest.is_empty() // in the order of the rows, over all passes
            });
            let ends: Vec<u32> = ends.map(|(new, _)| new.tokens.end as u32 - 1).collect();
            if !ends.is_empty() {
                last.push(hidden.index_select(&Tensor::new(ends, hidden.device())?, 0)?);
            }
            todo = rest;
        }
        Tensor::cat(&last, 0)
    }

    /// The hidden states of new tokens of each row, `(N, hidden_size)`, and which are whose. `step`
    /// says that they are a decoding step's, one a row.
    fn hidden(&mut self, new: &[&[u32]], step: bool) -> Result<(Tensor, Arc<[Segment]>)> {
        let new = new.iter().enumerate().map(|(row, new)| (*new, self.cache.len(row)));
        let rows = Rows::after(new);
        let adapters = Adapters::PerRow(&self.worn);
        let hidden = match step {
            true => self.decoder.hidden_step(&rows, adapters, &mut self.cache)?,
            false => self.decoder.hidden_cached(&rows, adapters, &mut self.cache)?,
        };
        Ok((hidden, rows.segments))
    }

    fn retain(&mut self, goes_on: &[bool]) {
        self.cache.retain(goes_on);
        retain(&mut self.worn, goes_on);
    }
}

fn retain<T>(items: &mut Vec<T>, keep: &[bool]) {
    let mut keep = keep.iter();
    items.retain(|_| *keep.next().expect("keep has one entry an item"));
}
