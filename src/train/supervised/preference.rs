//! Preference optimization: log-probs of responses under the policy and, where the loss has one, a
//! reference, whose log-probs are computed once before the first step.

use std::ops::Range;
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use serde_json::json;

use super::comparisons::{collate, get_rows, response_log_probs, weighted_pairs};
use super::epoch_rows::{EpochLayout, EpochRows, PlannedRows, StepBatches};
use crate::data::{
    Batch, Comparison, ComparisonKind, ComparisonReport, DataError, RowStore, WhenTooLong,
};
use crate::model::scoring::target_log_probs;
use crate::model::{ActiveAdapter, Decoder};
use crate::monitor::Monitor;
use crate::objectives::preference::{
    PreferenceBatch, PreferenceJudgement, PreferenceSettings, StepConstants,
};
use crate::objectives::{Objective, Stats};
use crate::train::TrainError;
use crate::train::fingerprints::base_fingerprint;
use crate::train::learner::AdapterLearner;
use crate::train::metrics::{Numbers, stats_numbers};
use crate::train::reference::{self, ReferenceLogps};
use crate::train::rows::RowLoader;
use crate::train::run_dir::{Fingerprint, RunDir};
use crate::train::settings::DpoSettings;

/// Rows whose reference log-probs are computed between two checks of the stop flag.
const REFERENCE_ROWS: usize = 64;

/// Rows of compared or labelled responses.
pub struct PreferenceTraining {
    pub(super) rows: EpochRows<Comparison, ComparisonReport>,
    settings: PreferenceSettings,
    micro_batch_rows: usize,
    reference: Option<ReferenceModel>,
}

/// The reference model.
struct ReferenceModel {
    /// The folder of its adapter; empty for the base model.
    folder: PathBuf,
    /// Whether that is `--ref-adapter`, whose hash is in the fingerprints of the settings.
    given: bool,
    /// Frozen adapters below both the policy and the reference.
    frozen: Vec<ActiveAdapter>,
    /// Its active adapters, once they are loaded.
    active: Vec<ActiveAdapter>,
    /// Summed log-probs of the responses of all rows, held-out rows last.
    logps: ReferenceLogps,
}

impl PreferenceTraining {
    /// Loads the rows, for a policy on top of `frozen`.
    pub fn load(
        loader: &RowLoader,
        own: &DpoSettings,
        frozen: &[ActiveAdapter],
    ) -> Result<Self, TrainError> {
        let settings = own.preference();
        let layout = EpochLayout {
            max_length: loader.max_length(),
            packing: false,
            gradient_accumulation_steps: own.gradient_accumulation_steps,
        };
        let labels = settings.loss.reads_labels();
        let kind = if labels { ComparisonKind::Labels } else { ComparisonKind::Pairs };
        let loaded = loader.comparisons(kind, WhenTooLong::Cut)?;
        let given = !own.ref_adapter.as_os_str().is_empty();
        let folder = if given { &own.ref_adapter } else { &loader.common.adapter };
        let reference = settings.loss.has_reference().then(|| ReferenceModel {
            folder: folder.clone(),
            given,
            frozen: frozen.to_vec(),
            active: Vec::new(),
            logps: ReferenceLogps::default(),
        });
        Ok(Self {
            rows: EpochRows::new(loader, layout, loaded),
            settings,
            micro_batch_rows: loader.common.per_device_train_batch_size,
            reference,
        })
    }

    /// A hash of the reference's adapter, if it has one that the fingerprints of the settings do not have.
    pub(super) fn reference_fingerprint(&self) -> Result<Option<Fingerprint>, TrainError> {
        let reference = self.reference.as_ref().filter(|reference| !reference.given);
        let folder = reference.map(|reference| &reference.folder);
        match folder.filter(|folder| !folder.as_os_str().is_empty()) {
            Some(folder) => Ok(Some(("the reference adapter".into(), base_fingerprint(folder)?))),
            None => Ok(None),
        }
    }

    /// Number of responses of each row, held-out rows last.
    fn responses(&self) -> impl Iterator<Item = usize> + '_ {
        let held_out = self.rows.held_out.iter().map(|data| &data.rows);
        let parts = std::iter::once(&self.rows.train.rows).chain(held_out);
        parts.flat_map(|rows| (0..rows.len()).map(|row| rows.responses(row)))
    }

    /// Bytes of the log-probs of all rows under the reference.
    pub(super) fn reference_bytes(&self) -> usize {
        if self.reference.is_none() {
            return 0;
        }
        ReferenceLogps::bytes(self.responses().sum(), self.responses().count())
    }

    /// Computes the log-probs of all rows under the reference, or reads them if they were computed before.
    pub(super) fn compute_reference(
        &mut self,
        decoder: &Decoder,
        run: &RunDir,
        monitor: Monitor<'_>,
    ) -> Result<(), TrainError> {
        let mut logps = ReferenceLogps::new(self.responses());
        let Some(reference) = &mut self.reference else { return Ok(()) };
        let active = reference::active(&reference.frozen, &reference.folder, decoder, monitor)?;
        let train = &self.rows.train.rows;
        let held_out = self.rows.held_out.as_ref().map(|data| (train.len(), &data.rows));
        let parts = [(0, train)].into_iter().chain(held_out);
        reference::cached(&run.file("reference.safetensors"), &mut logps, |logps| {
            let all: usize = parts.clone().map(|(_, rows)| rows.len()).sum();
            monitor.note(format_args!("reference: log-probs of {all} rows"));
            for (first, rows) in parts {
                for start in (0..rows.len()).step_by(REFERENCE_ROWS) {
                    if monitor.stopped() {
                        return Err(DataError::Stopped.into());
                    }
                    let range = start..rows.len().min(start + REFERENCE_ROWS);
                    let found = log_probs_of_rows(decoder, &active, rows, range.clone())?;
                    for (row, found) in range.zip(found) {
                        logps.of_mut(first + row).copy_from_slice(&found);
                    }
                }
            }
            Ok(())
        })?;
        (reference.active, reference.logps) = (active, logps);
        Ok(())
    }

    /// Computes the log-probs under the reference of the rows of the first `steps` steps. Returns the
    /// fraction of all tokens that these rows have: 0 without a reference.
    pub(super) fn compute_reference_of_steps(
        &mut self,
        decoder: &Decoder,
        steps: usize,
        monitor: Monitor<'_>,
    ) -> Result<f64, TrainError> {
        let mut logps = ReferenceLogps::new(self.responses());
        let Some(reference) = &mut self.reference else { return Ok(0.0) };
        let active = reference::active(&reference.frozen, &reference.folder, decoder, monitor)?;
        let train = &self.rows.train.rows;
        let held_out = self.rows.held_out.iter().flat_map(|data| data.rows.lengths());
        let all: usize = train.lengths().chain(held_out).sum();
        let mut tokens = 0;
        for step in 0..(steps as u64).min(self.rows.steps_of_epoch()) {
            let rows = self.rows.bins_of_step(step).into_iter().flatten().flatten();
            let rows: Vec<usize> = rows.collect();
            tokens += rows.iter().map(|&row| train.length(row)).sum::<usize>();
            let found = log_probs_of_rows(decoder, &active, train, rows.iter().copied())?;
            for (row, found) in rows.into_iter().zip(found) {
                logps.of_mut(row).copy_from_slice(&found);
            }
        }
        (reference.active, reference.logps) = (active, logps);
        Ok(tokens as f64 / all.max(1) as f64)
    }

    /// Log-probs under the reference of the responses of rows, one after another.
    fn reference_of(&self, rows: impl Iterator<Item = usize>) -> Option<Vec<f32>> {
        let logps = &self.reference.as_ref()?.logps;
        Some(rows.flat_map(|row| logps.of(row).iter().copied()).collect())
    }

    fn models<'a>(
        &'a self,
        decoder: &'a Decoder,
        policy: &'a [ActiveAdapter],
    ) -> PolicyAndReference<'a> {
        let reference = self.reference.as_ref().map_or(&[][..], |reference| &reference.active);
        PolicyAndReference { decoder, policy, reference }
    }

    /// The micro-batches of a step, whose losses are divided by its pairs or labelled responses.
    pub(super) fn step_batches(
        &self,
        bins: &[Vec<Vec<usize>>],
        learner: &AdapterLearner,
    ) -> Result<StepBatches, TrainError> {
        let indices = bins.iter().map(|bins| bins.iter().flatten().copied().collect());
        let indices: Vec<Vec<usize>> = indices.collect();
        let rows = indices.iter();
        let rows = rows.map(|indices| get_rows(&self.rows.train.rows, indices.iter().copied()));
        let rows: Vec<Vec<Comparison>> = rows.collect();
        let mut parts = Vec::new();
        for (rows, indices) in rows.iter().zip(indices) {
            let rows: Vec<&Comparison> = rows.iter().collect();
            let reference = self.reference_of(indices.into_iter());
            parts.push(preference_batch(&rows, self.settings, reference));
        }
        let all: Vec<&Comparison> = rows.iter().flatten().collect();
        let models = self.models(learner.decoder(), learner.active(0));
        let constants = step_constants(&models, &self.settings, &all, parts.iter().map(|p| &p.1))?;
        let count = parts.iter().map(|(_, part)| part.count()).sum::<usize>() as f64;
        let batches = parts.into_iter().map(|(batch, part)| {
            let part = PreferenceBatch { constants, ..part };
            (batch, Objective::Preference(part.into()))
        });
        Ok(StepBatches { batches: batches.collect(), count })
    }

    /// Evaluates the held-out rows, a micro-batch as a step; `None` if the run was stopped before all rows
    /// were evaluated.
    pub fn evaluate(
        &self,
        decoder: &Decoder,
        active: &[ActiveAdapter],
        monitor: Monitor<'_>,
    ) -> Result<Option<Numbers>, TrainError> {
        let Some(held_out) = &self.rows.held_out else { return Ok(Some(Vec::new())) };
        let held_out = &held_out.rows;
        let models = self.models(decoder, active);
        let (mut loss, mut count, mut stats) = (0.0, 0, Stats::default());
        for first in (0..held_out.len()).step_by(self.micro_batch_rows) {
            if monitor.stopped() {
                return Ok(None);
            }
            let range = first..held_out.len().min(first + self.micro_batch_rows);
            let rows = get_rows(held_out, range.clone());
            let rows: Vec<&Comparison> = rows.iter().collect();
            let before = self.rows.train.rows.len(); // held-out rows are after the training rows
            let reference = self.reference_of(range.map(|row| before + row));
            let (batch, mut part) = preference_batch(&rows, self.settings, reference);
            part.constants = step_constants(&models, &self.settings, &rows, [&part].into_iter())?;
            count += part.count();
            let logps = target_log_probs(decoder, active, &batch, 1.0)?;
            let logps = Tensor::new(logps, &Device::Cpu)?;
            let objective = Objective::Preference(part.into());
            let (_, output) = objective.compute(Some(&logps), None, None)?;
            loss += output.loss;
            stats.add(output.stats);
        }
        let mut numbers: Numbers = vec![("eval_loss".into(), json!(loss / count.max(1) as f64))];
        let more = stats_numbers(&stats).into_iter();
        numbers.extend(more.map(|(key, value)| (format!("eval_{key}"), value)));
        Ok(Some(numbers))
    }
}

/// A policy and its reference, on one base.
pub struct PolicyAndReference<'a> {
    /// The base.
    pub decoder: &'a Decoder,
    /// The adapters of the policy.
    pub policy: &'a [ActiveAdapter],
    /// The adapters of the reference.
    pub reference: &'a [ActiveAdapter],
}

/// The summed log-probs of each response of some of the rows.
fn log_probs_of_rows(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    rows: &RowStore<Comparison>,
    indices: impl Iterator<Item = usize>,
) -> Result<Vec<Vec<f32>>, TrainError> {
    let rows = get_rows(rows, indices);
    response_log_probs(decoder, active, &rows.iter().collect::<Vec<_>>())
}

/// A micro-batch of preferences, without the constants of its step.
pub fn preference_batch(
    rows: &[&Comparison],
    settings: PreferenceSettings,
    reference: Option<Vec<f32>>,
) -> (Batch, PreferenceBatch) {
    let mut batch = collate(rows);
    let tokens = batch.spans.iter().map(Range::len).collect();
    let judgement = if settings.loss.reads_labels() {
        PreferenceJudgement::Labels(rows.iter().map(|row| row.label.unwrap_or(false)).collect())
    } else {
        let pairs = weighted_pairs(rows).into_iter();
        let pairs = pairs.map(|pair| (pair.better, pair.worse)).collect();
        let (mut prompts, mut prompt_of) = (Vec::new(), Vec::new());
        if settings.loss.learns_prompts() {
            let mut start = 0;
            for (index, row) in rows.iter().enumerate() {
                prompts.push(batch.learn_prompt(start..start + row.prompt.len()));
                prompt_of.extend(row.pairs.iter().map(|_| index));
                start += row.tokens();
            }
        }
        PreferenceJudgement::Pairs { pairs, prompts, prompt_of }
    };
    let constants = StepConstants::default();
    (batch, PreferenceBatch { settings, tokens, reference, judgement, constants })
}

/// Constants of the loss that depend on all rows of a step, whose micro-batches are `parts`.
pub fn step_constants<'p>(
    models: &PolicyAndReference,
    settings: &PreferenceSettings,
    rows: &[&Comparison],
    parts: impl Iterator<Item = &'p PreferenceBatch>,
) -> Result<StepConstants, TrainError> {
    let parts: Vec<&PreferenceBatch> = parts.collect();
    settings.loss.step_constants(&parts, |other_rows| {
        let mismatched = mismatched_rows(models.decoder, rows, other_rows);
        let mismatched: Vec<&Comparison> = mismatched.iter().collect();
        let log_probs = |active| -> Result<Vec<f32>, TrainError> {
            Ok(response_log_probs(models.decoder, active, &mismatched)?.concat())
        };
        Ok([log_probs(models.policy)?, log_probs(models.reference)?])
    })
}

/// Each row's prompt with the responses of another row, as far as they fit into the window after it.
fn mismatched_rows(
    decoder: &Decoder,
    rows: &[&Comparison],
    other_rows: &[usize],
) -> Vec<Comparison> {
    let window = decoder.config.max_position_embeddings;
    let pairs = rows.iter().zip(other_rows);
    let mismatched = pairs.map(|(&row, &other)| {
        let room = window.saturating_sub(row.prompt.len()).max(1);
        let responses = rows[other].responses.iter();
        let responses = responses.map(|response| response[..response.len().min(room)].to_vec());
        Comparison { responses: responses.collect(), ..row.clone() }
    });
    mismatched.collect()
}
