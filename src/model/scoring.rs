//! Scoring of given tokens by a frozen model: log-probs of targets, and scores, computed like in training.

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::backend::{Backend, HeadInput, with_backend};
use super::inference::hidden;
use super::{ActiveAdapter, Adapters, Decoder, Rows};
use crate::data::Batch;

/// Tokens per forward pass.
pub const TOKENS_AT_A_TIME: usize = 2048;

/// Splits rows of these lengths into runs of at most [`TOKENS_AT_A_TIME`] tokens, or one row.
pub fn runs(lengths: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut tokens = 0;
    for (row, length) in lengths.enumerate() {
        match runs.last_mut() {
            Some(run) if tokens + length <= TOKENS_AT_A_TIME => {
                run.end = row + 1;
                tokens += length;
            }
            _ => {
                runs.push(row..row + 1);
                tokens = length;
            }
        }
    }
    runs
}

fn rows_of(batch: &Batch) -> Rows {
    Rows {
        tokens: batch.tokens.clone(),
        positions: batch.positions.clone(),
        segments: batch.segments.clone().into(),
    }
}

/// The hidden states that the head reads from some tokens, of which there is at least one.
fn hidden_of<B: Backend>(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    rows: &Rows,
    chosen: &[u32],
) -> Result<B::HeadInput> {
    let found = hidden::<B>(decoder, rows, Adapters::Same(active), None, Some(chosen), false)?;
    Ok(found.expect("of at least one token"))
}

/// The log-probs of a batch's targets, in nats, of logits divided by `temperature`.
pub fn target_log_probs(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    batch: &Batch,
    temperature: f64,
) -> Result<Vec<f32>> {
    let rows = rows_of(batch);
    log_probs_of(decoder, active, &rows, &batch.targets, temperature)
}

/// The log-probs of targets, each the row of N that predicts it and a token.
pub fn log_probs_of(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    rows: &Rows,
    targets: &[(u32, u32)],
    temperature: f64,
) -> Result<Vec<f32>> {
    if targets.is_empty() {
        return Ok(Vec::new());
    }
    let (places, targets): (Vec<u32>, Vec<u32>) = targets.iter().copied().unzip();
    with_backend!(decoder.compute.backend, B => {
        let hidden = hidden_of::<B>(decoder, active, rows, &places)?;
        B::target_log_probs(decoder, &hidden, &targets, temperature, active)
    })
}

/// The scores that a head `(1, hidden_size)` reads from chosen rows, of the N of a batch.
pub fn row_scores(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    head: &Tensor,
    batch: &Batch,
    rows: Vec<u32>,
) -> Result<Vec<f32>> {
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    with_backend!(decoder.compute.backend, B => {
        hidden_of::<B>(decoder, active, &rows_of(batch), &rows)?.scores(head)
    })
}

/// [`target_log_probs`], and [`row_scores`] of the rows in `scored`, from one pass: the same bits.
pub fn log_probs_and_scores(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    head: &Tensor,
    batch: &Batch,
    temperature: f64,
    scored: &[u32],
) -> Result<(Vec<f32>, Vec<f32>)> {
    let backend = decoder.compute.backend;
    with_backend!(backend, B => {
        log_probs_and_scores_by::<B>(decoder, active, head, batch, temperature, scored)
    })
}

fn log_probs_and_scores_by<B: Backend>(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    head: &Tensor,
    batch: &Batch,
    temperature: f64,
    scored: &[u32],
) -> Result<(Vec<f32>, Vec<f32>)> {
    let (places, targets): (Vec<u32>, Vec<u32>) = batch.targets.iter().copied().unzip();
    let mut read: Vec<u32> = places.iter().chain(scored).copied().collect();
    read.sort_unstable();
    read.dedup();
    if read.is_empty() {
        return Ok((Vec::new(), Vec::new()));
    }
    let hidden = hidden_of::<B>(decoder, active, &rows_of(batch), &read)?;
    let of = |rows: &[u32]| {
        let place = |row| read.binary_search(row).expect("all of them were read") as u32;
        let places: Vec<u32> = rows.iter().map(place).collect();
        hidden.select(&places)
    };
    let logps = match targets.is_empty() {
        true => Vec::new(),
        false => B::target_log_probs(decoder, &of(&places)?, &targets, temperature, active)?,
    };
    let found = match scored.is_empty() {
        true => Vec::new(),
        false => of(scored)?.scores(head)?,
    };
    Ok((logps, found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_cut_into_runs() {
        let check = |lengths: &[usize], needed: &[(usize, usize)]| {
            let found = runs(lengths.iter().copied()).into_iter();
            let found: Vec<(usize, usize)> = found.map(|run| (run.start, run.end)).collect();
            assert_eq!(found, needed, "{lengths:?}");
        };
        check(&[], &[]);
        check(&[5000], &[(0, 1)]);
        check(&[1000, 1000, 48, 1, 3000, 7], &[(0, 3), (3, 4), (4, 5), (5, 6)]);
    }
}
