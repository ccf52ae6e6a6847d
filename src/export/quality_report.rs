//! Quality report of quantized files: perplexity, and KL divergence from the model at full precision.

use std::fmt::Write;

use super::ExportError;
use super::verify::{divergence, log_softmax};
use crate::eval::EvalError;
use crate::model::{ActiveAdapter, Adapters, Decoder, Rows};

/// A model to measure.
#[derive(Debug)]
pub struct ReportCandidate {
    /// Its name in the report.
    pub name: String,
    /// Bytes of its files.
    pub bytes: u64,
    /// The model.
    pub decoder: Decoder,
    /// Its active adapters.
    pub active: Vec<ActiveAdapter>,
}

/// The measurements of one candidate.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct QualityReportRow {
    /// Its name in the report.
    pub name: String,
    /// Bytes of its files.
    pub bytes: u64,
    /// Perplexity as in llama.cpp: over the second half of each chunk, with no context across chunks.
    pub perplexity: f64,
    /// Mean Kullback-Leibler divergence from the reference, in nats per token.
    pub mean_kl: f64,
    /// Fraction of the tokens whose most likely next token is that of the reference.
    pub same_top: f64,
}

/// Number of positions whose logits are in memory at once.
const ROWS: usize = 32;

/// Measures candidates on a text, in chunks of `n_ctx` tokens; with `bos`, the first token of each chunk
/// is replaced by it.
///
/// # Errors
/// If the text is shorter than two chunks, or `n_ctx` is odd, below 4, or exceeds the model's context.
pub fn measure(
    reference: (&Decoder, &[ActiveAdapter]),
    candidates: &[ReportCandidate],
    tokens: &[u32],
    n_ctx: usize,
    bos: Option<u32>,
) -> Result<Vec<QualityReportRow>, ExportError> {
    let most = reference.0.config.max_position_embeddings;
    if n_ctx < 4 || !n_ctx.is_multiple_of(2) || n_ctx > most {
        return Err(ExportError::Measure(EvalError::Context { n_ctx, most }));
    }
    if tokens.len() < 2 * n_ctx {
        let (tokens, needed) = (tokens.len(), 2 * n_ctx);
        return Err(ExportError::Measure(EvalError::TooShort { tokens, needed }));
    }
    let mut sums = vec![(0f64, 0f64, 0usize); candidates.len()];
    let mut scored = 0;
    for chunk in tokens.chunks_exact(n_ctx) {
        let mut chunk = chunk.to_vec();
        if let Some(bos) = bos {
            chunk[0] = bos;
        }
        let places: Vec<u32> = (n_ctx as u32 / 2..n_ctx as u32 - 1).collect();
        scored += places.len();
        let rows = Rows::new(&[&chunk]);
        let hidden = |decoder: &Decoder, active: &[ActiveAdapter]| {
            decoder.hidden_of(&rows, Adapters::Same(active), &places)
        };
        let exact = hidden(reference.0, reference.1)?;
        let others: Vec<_> =
            candidates.iter().map(|c| hidden(&c.decoder, &c.active)).collect::<Result<_, _>>()?;
        for first in (0..places.len()).step_by(ROWS) {
            let many = ROWS.min(places.len() - first);
            let log_probs =
                |decoder: &Decoder, active: &[ActiveAdapter], hidden: &candle_core::Tensor| {
                    let hidden = hidden.narrow(0, first, many)?;
                    let rows = decoder.logits(&hidden, Adapters::Same(active))?.to_vec2::<f32>()?;
                    candle_core::Result::Ok(rows.into_iter().map(log_softmax).collect::<Vec<_>>())
                };
            let exact = log_probs(reference.0, reference.1, &exact)?;
            for ((candidate, hidden), sums) in candidates.iter().zip(&others).zip(&mut sums) {
                let found = log_probs(&candidate.decoder, &candidate.active, hidden)?;
                for (i, (p, q)) in exact.iter().zip(&found).enumerate() {
                    let next = chunk[places[first + i] as usize + 1];
                    sums.0 -= f64::from(q[next as usize]);
                    sums.1 += divergence(p, q);
                    sums.2 += usize::from(top(p) == top(q));
                }
            }
        }
    }
    let n = scored as f64;
    let line = |(candidate, sums): (&ReportCandidate, &(f64, f64, usize))| QualityReportRow {
        name: candidate.name.clone(),
        bytes: candidate.bytes,
        perplexity: (sums.0 / n).exp(),
        mean_kl: sums.1 / n,
        same_top: sums.2 as f64 / n,
    };
    Ok(candidates.iter().zip(&sums).map(line).collect())
}

/// The most likely token.
fn top(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

/// The report as a table of text.
pub fn table(lines: &[QualityReportRow]) -> String {
    let width = lines.iter().map(|line| line.name.chars().count()).max().unwrap_or(0);
    let mut text = format!(
        "{:width$}  {:>9}  {:>10}  {:>9}  {:>8}",
        "", "MB", "perplexity", "mean KL", "same top"
    );
    for line in lines {
        let (name, megabytes) = (&line.name, line.bytes as f64 / 1e6);
        let _ = write!(
            text,
            "\n{name:width$}  {megabytes:9.1}  {:10.4}  {:9.5}  {:7.2}%",
            line.perplexity,
            line.mean_kl,
            100.0 * line.same_top
        );
    }
    text
}
