//! Reward modelling: scores of responses, trained on comparisons (Bradley-Terry).

use candle_core::{Device, Tensor};
use serde_json::json;

use super::comparisons::{collate, get_rows, weighted_pairs};
use super::epoch_rows::{EpochLayout, EpochRows, StepBatches};
use crate::data::{Batch, Comparison, ComparisonKind, ComparisonReport, RowStore, WhenTooLong};
use crate::model::scoring::{row_scores, runs};
use crate::model::{ActiveAdapter, Decoder};
use crate::monitor::Monitor;
use crate::objectives::Objective;
use crate::objectives::reward::{Calibration, RewardStats, pair_losses};
use crate::train::TrainError;
use crate::train::metrics::Numbers;
use crate::train::rows::RowLoader;
use crate::train::settings::RewardSettings;

/// Rows of responses to score.
pub struct RewardTraining {
    pub(super) rows: EpochRows<Comparison, ComparisonReport>,
    center_rewards_coefficient: f64,
}

impl RewardTraining {
    /// Loads the rows.
    pub fn load(loader: &RowLoader, own: &RewardSettings) -> Result<Self, TrainError> {
        let layout = EpochLayout {
            max_length: loader.max_length(),
            packing: false,
            gradient_accumulation_steps: own.gradient_accumulation_steps,
        };
        let loaded = loader.comparisons(ComparisonKind::Pairs, WhenTooLong::Drop)?;
        Ok(Self {
            rows: EpochRows::new(loader, layout, loaded),
            center_rewards_coefficient: own.center_rewards_coefficient,
        })
    }

    /// The micro-batches of a step, whose losses are divided by the weights of its pairs.
    pub(super) fn step_batches(&self, bins: &[Vec<Vec<usize>>]) -> StepBatches {
        let (mut batches, mut count) = (Vec::new(), 0.0);
        for bins in bins {
            let rows = get_rows(&self.rows.train.rows, bins.iter().flatten().copied());
            let rows: Vec<&Comparison> = rows.iter().collect();
            count += weighted_pairs(&rows).iter().map(|pair| f64::from(pair.weight)).sum::<f64>();
            batches.push(reward_batch(&rows, self.center_rewards_coefficient));
        }
        StepBatches { batches, count }
    }

    /// Evaluates the held-out rows; `None` if the run was stopped before all rows were evaluated.
    pub fn evaluate(
        &self,
        decoder: &Decoder,
        active: &[ActiveAdapter],
        monitor: Monitor<'_>,
    ) -> Result<Option<Numbers>, TrainError> {
        let Some(held_out) = &self.rows.held_out else { return Ok(Some(Vec::new())) };
        let center = self.center_rewards_coefficient;
        let found = evaluate_rewards(decoder, active, &held_out.rows, center, monitor)?;
        Ok(found.map(|found| {
            let numbers = found.numbers().into_iter();
            numbers.map(|(key, value)| (format!("eval_{key}"), value)).collect()
        }))
    }
}

/// A micro-batch of a reward model.
pub fn reward_batch(rows: &[&Comparison], center_rewards_coefficient: f64) -> (Batch, Objective) {
    let batch = collate(rows);
    let objective = Objective::Reward {
        rows: batch.ends.clone(),
        pairs: weighted_pairs(rows),
        center_rewards_coefficient,
    };
    (batch, objective)
}

/// How well a reward model agrees with comparisons.
#[derive(Debug, Clone, Default)]
pub struct RewardEvaluation {
    /// Loss, accuracy, margins.
    pub stats: RewardStats,
    /// Expected against observed preference.
    pub calibration: Calibration,
    /// The scores of each row's responses.
    pub scores: Vec<Vec<f32>>,
}

impl RewardEvaluation {
    /// Named numbers.
    pub fn numbers(&self) -> Numbers {
        let mut numbers: Numbers = Vec::new();
        numbers.extend(self.stats.metrics().into_iter().map(|(k, v)| (k.to_string(), json!(v))));
        numbers.push(("pairs".into(), json!(self.stats.pairs)));
        let error = self.calibration.expected_calibration_error();
        numbers.push(("calibration_error".into(), json!(error)));
        numbers.push(("brier".into(), json!(self.calibration.brier())));
        numbers
    }
}

/// Evaluates a reward model, the last of `active` with a score head, on comparisons; `None` if it was
/// stopped before all rows were evaluated.
pub fn evaluate_rewards(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    rows: &RowStore<Comparison>,
    center_rewards_coefficient: f64,
    monitor: Monitor<'_>,
) -> Result<Option<RewardEvaluation>, TrainError> {
    let mut evaluation = RewardEvaluation::default();
    let head = active.iter().rev().find_map(|active| active.adapter.score.as_ref());
    let Some(head) = head else {
        return Err(TrainError::Settings("no adapter has a score head".into()));
    };
    for run in runs(rows.lengths()) {
        if monitor.stopped() {
            return Ok(None);
        }
        let rows = get_rows(rows, run);
        let rows: Vec<&Comparison> = rows.iter().collect();
        let batch = collate(&rows);
        let scores = row_scores(decoder, active, head, &batch, batch.ends.clone())?;
        let pairs = weighted_pairs(&rows);
        let mut rest = &scores[..];
        for row in &rows {
            let (of_row, others) = rest.split_at(row.responses.len());
            evaluation.scores.push(of_row.to_vec());
            rest = others;
        }
        for pair in &pairs {
            evaluation.calibration.add(f64::from(scores[pair.better] - scores[pair.worse]));
        }
        let scores = Tensor::new(scores, &Device::Cpu)?;
        let (_, stats) = pair_losses(&scores, &pairs, center_rewards_coefficient)?;
        evaluation.stats.add(&stats);
    }
    Ok(Some(evaluation))
}
