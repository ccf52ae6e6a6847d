//! Reading the rows of a run: files, length limits, the row cache and the held-out part.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::path::Path;

use super::TrainError;
use super::settings::CommonSettings;
use crate::data::checks::{Check, CheckReport};
use crate::data::{
    AlpacaPrompt, Cache, ComparisonKind, ComparisonReport, ComparisonSettings, Comparisons,
    DataReport, Dataset, FileRows, LengthLimits, LoadSettings, ModelLimits, WhenTooLong,
};
use crate::data::{Comparison, Example};
use crate::model::Decoder;
use crate::monitor::Monitor;
use crate::quant::Bytes;
use crate::text::Tokenizer;

/// The rows of a run's files.
pub struct LoadedRows<T, R> {
    /// Training rows.
    pub train: FileRows<T, R>,
    /// Evaluation rows.
    pub held_out: Option<FileRows<T, R>>,
    /// The original lines of the held-out rows, if they were split off here.
    pub held_out_lines: Vec<Bytes>,
    /// Training rows of each file, and how often they occur in an epoch.
    pub files: Vec<(usize, f64)>,
}

/// Loads the rows that the settings of a run name.
pub struct RowLoader<'a> {
    /// The settings of the run.
    pub common: &'a CommonSettings,
    /// The base model.
    pub decoder: &'a Decoder,
    /// The tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Receives warnings, and stops loading.
    pub monitor: Monitor<'a>,
}

impl RowLoader<'_> {
    /// Maximum number of tokens of a row.
    pub fn max_length(&self) -> usize {
        self.common.max_length.min(self.decoder.config.max_position_embeddings)
    }

    fn model_limits(&self) -> ModelLimits {
        let config = &self.decoder.config;
        ModelLimits { window: config.max_position_embeddings, vocab_size: config.vocab_size }
    }

    /// Language modeling rows, of one or several files.
    pub fn examples(
        &self,
        alpaca: Option<AlpacaPrompt>,
    ) -> Result<LoadedRows<Example, DataReport>, TrainError> {
        let common = self.common;
        let settings = LoadSettings {
            max_length: self.max_length(),
            alpaca,
            allow: common.allow.clone(),
            model: Some(self.model_limits()),
            cache: Some(row_cache(common)),
        };
        let evaluates = common.evaluates();
        let splits = evaluates && common.eval_data.as_os_str().is_empty();
        let (mut all, mut held_out, mut held_out_lines) = (Vec::new(), Vec::new(), Vec::new());
        let mut files = Vec::new();
        for file in &common.data {
            let path = &file.path;
            let data = if splits {
                let split =
                    Dataset::load_split(path, self.tokenizer, settings.clone(), self.monitor)?;
                held_out_lines.push(split.held_out_lines);
                held_out.extend(split.held_out);
                split.train
            } else {
                Dataset::load(path, self.tokenizer, settings.clone(), self.monitor)?
            };
            report_checks(&data.checks, path, &common.allow, self.monitor)?;
            files.push((data.rows.len(), file.weight));
            all.push(data);
        }
        if evaluates && !splits {
            let path = &common.eval_data;
            let mut data = Dataset::load(path, self.tokenizer, settings, self.monitor)?;
            for (file, trained) in common.data.iter().zip(&all) {
                trained.hashes.report_held_out_duplicates(
                    &file.path,
                    &data.hashes,
                    &mut data.checks,
                );
            }
            warn(&data.checks, path, &common.allow, self.monitor);
            held_out.push(data);
        }
        if splits && held_out.is_empty() {
            warn_nothing_held_out(common, self.monitor);
            held_out_lines.clear();
        }
        let held_out = (!held_out.is_empty()).then(|| Dataset::join(held_out));
        Ok(LoadedRows { train: Dataset::join(all), held_out, held_out_lines, files })
    }

    /// Rows of compared or labelled responses, of one file.
    pub fn comparisons(
        &self,
        kind: ComparisonKind,
        when_long: WhenTooLong,
    ) -> Result<LoadedRows<Comparison, ComparisonReport>, TrainError> {
        let (common, tokenizer, monitor) = (self.common, self.tokenizer, self.monitor);
        let settings = ComparisonSettings {
            limits: LengthLimits { max_length: self.max_length(), when_long },
            allow: common.allow.clone(),
            model: Some(self.model_limits()),
            cache: Some(row_cache(common)),
        };
        let path = common.data_file();
        let load =
            |path: &Path| Comparisons::load(path, tokenizer, settings.clone(), kind, monitor);
        let (train, held_out, held_out_lines) = if !common.evaluates() {
            (load(path)?, None, Vec::new())
        } else if !common.eval_data.as_os_str().is_empty() {
            let (train, mut held_out) = (load(path)?, load(&common.eval_data)?);
            train.hashes.report_held_out_duplicates(path, &held_out.hashes, &mut held_out.checks);
            warn(&held_out.checks, &common.eval_data, &common.allow, monitor);
            (train, Some(held_out), Vec::new())
        } else {
            let split = Comparisons::load_split(path, tokenizer, settings.clone(), kind, monitor)?;
            let lines = split.held_out.is_some().then_some(split.held_out_lines);
            if lines.is_none() {
                warn_nothing_held_out(common, self.monitor);
            }
            (split.train, split.held_out, lines.into_iter().collect())
        };
        report_checks(&train.checks, path, &common.allow, monitor)?;
        let files = vec![(train.rows.len(), 1.0)];
        Ok(LoadedRows { train, held_out, held_out_lines, files })
    }
}

/// The disk cache for tokens of large files.
pub(super) fn row_cache(common: &CommonSettings) -> Cache {
    let given = !common.cache.as_os_str().is_empty();
    let folder = if given { common.cache.clone() } else { common.out.join("rows") };
    Cache { folder, from_bytes: common.cache_from.0 }
}

/// Total tokens of the `count` longest rows.
pub(super) fn longest_together(lengths: impl Iterator<Item = usize>, count: usize) -> usize {
    let mut longest = BinaryHeap::new();
    for length in lengths {
        longest.push(Reverse(length));
        if longest.len() > count {
            longest.pop();
        }
    }
    longest.into_iter().map(|length| length.0).sum()
}

/// Warns about the findings of the data checks.
///
/// # Errors
/// If the checks found errors that are not in `allow`.
pub(super) fn report_checks(
    checks: &CheckReport,
    path: &Path,
    allow: &[Check],
    monitor: Monitor<'_>,
) -> Result<(), TrainError> {
    warn(checks, path, allow, monitor);
    Ok(checks.verify(path, allow)?)
}

fn warn(checks: &CheckReport, path: &Path, allow: &[Check], monitor: Monitor<'_>) {
    if let Some(format) = checks.format {
        monitor.note(format_args!("{}: rows of {}", path.display(), format.name()));
    }
    for warning in checks.warnings(path, allow) {
        monitor.warn(warning);
    }
}

/// Warns that the requested split has no held-out rows.
pub(super) fn warn_nothing_held_out(common: &CommonSettings, monitor: Monitor<'_>) {
    let files: Vec<String> = common.data.iter().map(ToString::to_string).collect();
    let files = files.join(", ");
    monitor.warn(format_args!("no row of {files} falls into the held-out tenth"));
}
