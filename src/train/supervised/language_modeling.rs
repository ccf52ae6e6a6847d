//! Supervised fine-tuning: the log-likelihood of the learned tokens of rows.

use serde_json::json;

use super::epoch_rows::{EpochLayout, EpochRows, StepBatches};
use crate::data::{Batch, DataReport, Example};
use crate::eval::evaluate;
use crate::model::{ActiveAdapter, Decoder};
use crate::monitor::Monitor;
use crate::objectives::Objective;
use crate::train::TrainError;
use crate::train::metrics::Numbers;
use crate::train::rows::RowLoader;
use crate::train::settings::SftSettings;

/// The rows of supervised fine-tuning.
pub struct LanguageModeling {
    pub(super) rows: EpochRows<Example, DataReport>,
}

impl LanguageModeling {
    /// Loads the rows.
    pub fn load(loader: &RowLoader, own: &SftSettings) -> Result<Self, TrainError> {
        let layout = EpochLayout {
            max_length: loader.max_length(),
            packing: own.packing,
            gradient_accumulation_steps: own.gradient_accumulation_steps,
        };
        let loaded = loader.examples(own.alpaca_prompt)?;
        Ok(Self { rows: EpochRows::new(loader, layout, loaded) })
    }

    /// The micro-batches of a step, whose losses are divided by its learned tokens.
    pub(super) fn step_batches(&self, bins: &[Vec<Vec<usize>>]) -> StepBatches {
        let batches = bins.iter().map(|bins| Batch::gather(&self.rows.train.rows, bins));
        let batches: Vec<(Batch, Objective)> =
            batches.map(|batch| (batch, Objective::LanguageModeling)).collect();
        let count = batches.iter().map(|(batch, _)| batch.count()).sum::<usize>() as f64;
        StepBatches { batches, count }
    }

    /// The loss of the held-out rows; `None` if the run was stopped before all rows were evaluated.
    pub fn evaluate(
        &self,
        decoder: &Decoder,
        active: &[ActiveAdapter],
        monitor: Monitor<'_>,
    ) -> Result<Option<Numbers>, TrainError> {
        let Some(held_out) = &self.rows.held_out else { return Ok(Some(Vec::new())) };
        let loss = evaluate(decoder, active, &held_out.rows, monitor.stop)?;
        Ok(loss.map(|loss| {
            vec![("eval_loss".into(), json!(loss.loss)), ("eval_tokens".into(), json!(loss.tokens))]
        }))
    }
}
