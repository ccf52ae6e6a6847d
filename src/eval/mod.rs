//! Evaluation: mean loss under the loss masks of training, and perplexity as computed by llama.cpp.

mod bigram;
pub(crate) mod diversity;

use std::sync::atomic::{AtomicBool, Ordering};

use crate::data::{Batch, Examples};
use crate::model::scoring::{log_probs_of, target_log_probs};
use crate::model::{ActiveAdapter, Decoder, Rows};
pub(crate) use bigram::Bigram;
pub use diversity::{Diversity, Reply, distinct, diversity};

/// Number of tokens per forward pass.
const TOKENS_AT_A_TIME: usize = 2048;

/// Why an evaluation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// The text has too few tokens.
    #[error("the text has {tokens} tokens, needed at least {needed} (twice n_ctx, as llama.cpp)")]
    TooShort {
        /// Number of tokens of the text.
        tokens: usize,
        /// Minimum number of tokens: two chunks.
        needed: usize,
    },
    /// A context size that the model does not support.
    #[error("n_ctx is {n_ctx}, needed an even number from 4 to the model's {most} positions")]
    Context {
        /// The requested context size.
        n_ctx: usize,
        /// The model's maximum context size.
        most: usize,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Mean loss over target tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    /// Mean loss in nats per target token.
    pub loss: f64,
    /// Number of target tokens.
    pub tokens: u64,
    /// Number of rows.
    pub rows: u64,
}

impl Loss {
    /// `e^loss`.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

/// The mean loss over the learned tokens of `examples`; `None` if `stop` was set before the end.
pub fn evaluate(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    examples: &Examples,
    stop: &AtomicBool,
) -> Result<Option<Loss>, EvalError> {
    let (mut sum, mut tokens) = (0.0, 0);
    let mut next = 0;
    while next < examples.len() {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let first = next;
        let mut length = 0;
        while next < examples.len()
            && (next == first || length + examples.length(next) <= TOKENS_AT_A_TIME)
        {
            length += examples.length(next);
            next += 1;
        }
        let batch = Batch::gather(examples, &[(first..next).collect()]);
        let rows = Rows {
            tokens: batch.tokens,
            positions: batch.positions,
            segments: batch.segments.into(),
        };
        let logps = log_probs_of(decoder, active, &rows, &batch.targets, 1.0)?;
        sum -= logps.iter().map(|&logp| f64::from(logp)).sum::<f64>();
        tokens += batch.targets.len() as u64;
    }
    Ok(Some(Loss { loss: sum / tokens.max(1) as f64, tokens, rows: examples.rows() }))
}

/// Loss over documents, comparable between tokenizers.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct TextLoss {
    /// Summed loss of all target tokens, in nats.
    pub nats: f64,
    /// Number of target tokens.
    pub tokens: u64,
    /// Number of bytes of text that they stand for.
    pub bytes: u64,
}

impl TextLoss {
    /// Adds another sum.
    pub(crate) fn add(&mut self, other: &Self) {
        self.nats += other.nats;
        self.tokens += other.tokens;
        self.bytes += other.bytes;
    }

    /// Bits per byte of text, which is comparable between tokenizers.
    pub fn bits_per_byte(&self) -> f64 {
        self.nats / std::f64::consts::LN_2 / self.bytes.max(1) as f64
    }

    /// Mean loss in nats per token.
    pub fn loss(&self) -> f64 {
        self.nats / self.tokens.max(1) as f64
    }
}

/// The loss over batches of text. Each batch comes with the number of bytes that its targets stand for.
/// `None` if `stop` was set before the end.
pub fn text_loss(
    decoder: &Decoder,
    batches: impl Iterator<Item = (Batch, u64)>,
    stop: &AtomicBool,
) -> Result<Option<TextLoss>, EvalError> {
    let mut sum = TextLoss::default();
    for (batch, bytes) in batches {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let logps = target_log_probs(decoder, &[], &batch, 1.0)?;
        sum.nats -= logps.iter().map(|&logp| f64::from(logp)).sum::<f64>();
        sum.tokens += batch.targets.len() as u64;
        sum.bytes += bytes;
    }
    Ok(Some(sum))
}

/// Perplexity of a text as computed by llama.cpp's `llama-perplexity`: independent chunks of `n_ctx` tokens, of
/// which the second half is scored. With `bos`, the first token of each chunk is replaced by it.
pub fn perplexity(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    tokens: &[u32],
    n_ctx: usize,
    bos: Option<u32>,
) -> Result<Loss, EvalError> {
    let most = decoder.config.max_position_embeddings;
    if n_ctx < 4 || !n_ctx.is_multiple_of(2) || n_ctx > most {
        return Err(EvalError::Context { n_ctx, most });
    }
    if tokens.len() < 2 * n_ctx {
        return Err(EvalError::TooShort { tokens: tokens.len(), needed: 2 * n_ctx });
    }
    let (mut sum, mut scored) = (0.0, 0);
    for chunk in tokens.chunks_exact(n_ctx) {
        let mut chunk = chunk.to_vec();
        if let Some(bos) = bos {
            chunk[0] = bos;
        }
        let targets: Vec<(u32, u32)> =
            (n_ctx / 2..n_ctx - 1).map(|i| (i as u32, chunk[i + 1])).collect();
        let logps = log_probs_of(decoder, active, &Rows::new(&[chunk]), &targets, 1.0)?;
        sum -= logps.iter().map(|&logp| f64::from(logp)).sum::<f64>();
        scored += targets.len() as u64;
    }
    let rows = (tokens.len() / n_ctx) as u64;
    Ok(Loss { loss: sum / scored as f64, tokens: scored, rows })
}
