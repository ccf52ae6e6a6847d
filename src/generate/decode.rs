//! Batch generation: runs a fixed slice of requests through an [`Engine`].

use std::ops::ControlFlow;
use std::sync::Arc;

use super::engine::{Engine, Event, Finish, GenerateError, Generated, Job, Usage};
use super::sampling::Sampling;
use crate::model::{ActiveAdapter, Adapters, CacheType, Decoder};

/// A prompt to be continued.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Prompt tokens, at least one.
    pub prompt: &'a [u32],
    /// Key of its random numbers: its number in the data, so that results do not depend on batching.
    pub rng_key: u64,
    /// Maximum number of new tokens, if different from [`Settings::max_tokens`].
    pub max_tokens: Option<usize>,
}

impl<'a> Request<'a> {
    /// A request with the `max_tokens` of the settings.
    pub fn new(prompt: &'a [u32], rng_key: u64) -> Self {
        Self { prompt, rng_key, max_tokens: None }
    }
}

/// Generation settings of a batch.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Sampling settings.
    pub sampling: Sampling,
    /// Maximum number of new tokens per row.
    pub max_tokens: usize,
    /// Data type of the KV cache.
    pub cache: CacheType,
    /// `Some(k)` records each sampled token's log-probability and the `k` most likely tokens.
    pub logprobs: Option<usize>,
    /// Whether to record [`Generated::sampled_logps`] and [`Generated::drawn_logps`].
    pub sampled_logps: bool,
    /// Maximum number of rows that run at a time; 0 is all.
    pub slots: usize,
}

/// The output of [`generate`].
#[derive(Debug, Clone)]
pub struct Generation {
    /// The output of each request, in order.
    pub rows: Vec<Generated>,
    /// Counters of the work done.
    pub usage: Usage,
}

/// Continues every row until an end-of-generation token, its `max_tokens`, the end of the context
/// window, or until `on_token` returns [`ControlFlow::Break`].
///
/// At most `settings.slots` rows run at a time; see [`Engine`] for the memory this needs.
/// Consecutive requests with the same prompt and adapters share one prefill of the prompt.
///
/// `on_token` is called with the row and each new token, except end-of-generation tokens.
/// The tokens of a row depend only on its prompt, its key, its adapters and the settings, not on `slots`
/// or on the other rows. `is_end` is called once for each token of the vocabulary.
pub fn generate(
    decoder: &Decoder,
    adapters: Adapters,
    requests: &[Request],
    settings: &Settings,
    is_end: &dyn Fn(u32) -> bool,
    on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
) -> Result<Generation, GenerateError> {
    if let Adapters::PerRow(lists) = adapters
        && lists.len() != requests.len()
    {
        return Err(GenerateError::Adapters { found: lists.len(), rows: requests.len() });
    }
    let slots = match settings.slots {
        0 => requests.len(),
        slots => slots.min(requests.len()),
    };
    let eos_token_ids: Arc<[u32]> =
        (0..decoder.config.vocab_size as u32).filter(|&token| is_end(token)).collect();
    let mut engine = Engine::new(decoder, settings.cache, slots);
    let mut active: Arc<[ActiveAdapter]> = Arc::new([]);
    for (row, request) in requests.iter().enumerate() {
        if !ActiveAdapter::same(&active, adapters.of(row)) {
            active = adapters.of(row).into();
        }
        engine.submit(Job {
            active: active.clone(),
            sampling: settings.sampling.clone(),
            rng_key: request.rng_key,
            eos_token_ids: eos_token_ids.clone(),
            logprobs: settings.logprobs,
            sampled_logps: settings.sampled_logps,
            ..Job::new(request.prompt.to_vec(), request.max_tokens.unwrap_or(settings.max_tokens))
        })?;
    }

    let mut rows: Vec<Option<Generated>> = vec![None; requests.len()];
    let mut cancelled = vec![false; requests.len()];
    while !engine.is_idle() {
        for event in engine.step()? {
            match event {
                Event::Token { id, token } => {
                    if on_token(id, token).is_break() {
                        cancelled[id] = true;
                        rows[id] = engine.cancel(id).map(|output| output.generated);
                    }
                }
                Event::Finished { id, output } => {
                    let mut generated = output.generated;
                    if cancelled[id] {
                        generated.finish = Finish::Callback; // cancelled at its last token
                    }
                    rows[id] = Some(generated);
                }
                Event::Failed { error, .. } => return Err(error),
            }
        }
    }
    let rows = rows.into_iter().map(|row| row.expect("an idle engine has finished every row"));
    Ok(Generation { rows: rows.collect(), usage: engine.usage() })
}
