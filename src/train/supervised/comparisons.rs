//! Shared by reward modelling and preference optimization: collating and scoring responses to a prompt.

use crate::data::{Batch, Comparison, RowStore};
use crate::model::scoring::{runs, target_log_probs};
use crate::model::{ActiveAdapter, Decoder};
use crate::objectives::reward::{WeightedPair, pair_weight};
use crate::train::TrainError;

/// The rows at some indices, decoded from the row store.
pub(super) fn get_rows(
    rows: &RowStore<Comparison>,
    indices: impl Iterator<Item = usize>,
) -> Vec<Comparison> {
    indices.map(|row| rows.get(row)).collect()
}

/// Collates comparisons into a batch, with each prompt once.
pub(super) fn collate(rows: &[&Comparison]) -> Batch {
    let mut batch = Batch::default();
    for row in rows {
        let responses: Vec<&[u32]> = row.responses.iter().map(Vec::as_slice).collect();
        batch.push_group(&row.prompt, &responses, row.row);
    }
    batch
}

/// The pairs of all rows, for responses in the order of the rows; the weights of a row's pairs sum to 1.
pub(super) fn weighted_pairs(rows: &[&Comparison]) -> Vec<WeightedPair> {
    let mut pairs = Vec::new();
    let mut first = 0;
    for row in rows {
        let weight = pair_weight(row.pairs.len());
        pairs.extend(row.pairs.iter().map(|pair| WeightedPair {
            better: first + pair.better,
            worse: first + pair.worse,
            margin: pair.margin,
            weight,
        }));
        first += row.responses.len();
    }
    pairs
}

/// The summed log-probs of each response of each row.
pub fn response_log_probs(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    rows: &[&Comparison],
) -> Result<Vec<Vec<f32>>, TrainError> {
    let mut all = Vec::with_capacity(rows.len());
    for run in runs(rows.iter().map(|row| row.tokens())) {
        let batch = collate(&rows[run.clone()]);
        let logps = target_log_probs(decoder, active, &batch, 1.0)?;
        let mut sums = batch.spans.iter().map(|span| logps[span.clone()].iter().sum::<f32>());
        for row in &rows[run] {
            all.push(sums.by_ref().take(row.responses.len()).collect());
        }
    }
    Ok(all)
}
