//! A fixed slice of rows through an [`Engine`].

use std::ops::ControlFlow;
use std::sync::Arc;

use super::engine::{Engine, Event, Finish, GenerateError, Generated, Job, Usage};
use super::sampling::Sampling;
use crate::model::{ActiveAdapter, Adapters, CacheType, Decoder};

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
    /// `Some(k)` records each chosen token's log-probability and the `k` most likely.
    pub logprobs: Option<usize>,
    /// Whether each choice's log-probability is recorded as it was drawn, and before filters.
    pub draws: bool,
    /// Rows that run at a time; 0 for all.
    pub slots: usize,
}

/// What all rows got, and what it took.
#[derive(Debug, Clone)]
pub struct Generation {
    /// What each request got, in their order.
    pub rows: Vec<Generated>,
    /// What it took.
    pub usage: Usage,
}

/// Continues every row until an end-of-generation token, its `max_tokens`, the end of the model's
/// window, or until `on_token` breaks it off.
///
/// At most `settings.slots` rows run at a time, as in any [`Engine`], which says what that takes.
/// Neighbours with the same prompt and adapters are a group, whose prompt is read once.
///
/// `on_token` gets the row and each new token but the end-of-generation token, as it is chosen.
/// What a row gets depends on its prompt, its key, its adapters and the settings, never on `slots`
/// or on the other rows. `is_end` is asked once for each token of the vocabulary.
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
    let ends: Arc<[u32]> =
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
            key: request.key,
            ends: ends.clone(),
            logprobs: settings.logprobs,
            draws: settings.draws,
            ..Job::new(request.prompt.to_vec(), request.max_tokens.unwrap_or(settings.max_tokens))
        })?;
    }

    let mut rows: Vec<Option<Generated>> = vec![None; requests.len()];
    let mut broken_off = vec![false; requests.len()];
    while !engine.is_idle() {
        for event in engine.step()? {
            match event {
                Event::Token { id, token } => {
                    if on_token(id, token).is_break() {
                        broken_off[id] = true;
                        rows[id] = engine.cancel(id).map(|ended| ended.generated);
                    }
                }
                Event::Finished { id, ended } => {
                    let mut generated = ended.generated;
                    if broken_off[id] {
                        generated.finish = Finish::Callback; // at the token that was its last anyway
                    }
                    rows[id] = Some(generated);
                }
                Event::Failed { error, .. } => return Err(error),
            }
        }
    }
    let rows = rows.into_iter().map(|row| row.expect("an idle engine has ended every row"));
    Ok(Generation { rows: rows.collect(), usage: engine.usage() })
}
