//! The rows of a run and the batch plan of the current epoch, for every task.

use std::fmt::Display;
use std::io::Write;

use serde::Serialize;
use serde_json::{Value, json};

use crate::data::{Batch, EpochPlan, EpochSettings, FileRows, Record, epoch_examples};
use crate::objectives::Objective;
use crate::quant::Bytes;
use crate::train::TrainError;
use crate::train::rows::{LoadedRows, RowLoader, longest_together};
use crate::train::run_dir::{Fingerprint, RunDir};
use crate::train::settings::CommonSettings;
use crate::weights::write_atomically;

/// How rows are batched into steps.
#[derive(Debug, Clone, Copy)]
pub struct EpochLayout {
    /// Maximum number of tokens of a packed bin.
    pub max_length: usize,
    /// Whether several rows share a bin.
    pub packing: bool,
    /// Micro-batches per step.
    pub gradient_accumulation_steps: usize,
}

/// The rows of a run and the batch plan of the current epoch.
pub(super) struct EpochRows<T, R> {
    common: CommonSettings,
    layout: EpochLayout,
    /// Training rows.
    pub train: FileRows<T, R>,
    /// Evaluation rows.
    pub held_out: Option<FileRows<T, R>>,
    held_out_lines: Vec<Bytes>,
    files: Vec<(usize, f64)>,
    plan: EpochPlan,
    /// The epoch that the plan is for.
    epoch: u64,
}

/// The micro-batches of a step.
pub(super) struct StepBatches {
    /// Batches and their objectives.
    pub batches: Vec<(Batch, Objective)>,
    /// Divisor of the summed loss.
    pub count: f64,
}

/// Batch planning, independent of the row type.
pub(super) trait PlannedRows {
    /// The data report of the command's JSON line.
    fn report(&self) -> Value;

    /// Hashes of the data.
    fn fingerprints(&self) -> Vec<Fingerprint>;

    /// Writes the held-out split, if it was made here.
    fn write_held_out(&self, run: &RunDir) -> Result<(), TrainError>;

    /// Plans `epoch`, unless it is the current one.
    fn set_epoch(&mut self, epoch: u64);

    /// Steps of the current epoch.
    fn steps_of_epoch(&self) -> u64;

    /// Tokens of the current epoch.
    fn tokens_of_epoch(&self) -> u64;

    /// The rows of a step of the current epoch, by micro-batch and bin.
    fn bins_of_step(&self, step: u64) -> Vec<Vec<Vec<usize>>>;

    /// Steps of the run.
    fn total_steps(&self) -> u64;

    /// Upper bound of the tokens of a micro-batch: full bins, or the longest rows together.
    fn largest_micro_batch(&self) -> usize;

    /// Bytes of the rows, including held-out ones: in memory, and mapped ones that the run reads.
    fn bytes(&self) -> [usize; 2];
}

impl<T: Record, R: Display + Serialize> EpochRows<T, R> {
    /// The rows with a plan of the first epoch.
    pub(super) fn new(loader: &RowLoader, layout: EpochLayout, loaded: LoadedRows<T, R>) -> Self {
        let LoadedRows { train, held_out, held_out_lines, files } = loaded;
        loader.monitor.note(format_args!("data: {}", train.report));
        let mut rows = Self {
            common: loader.common.clone(),
            layout,
            train,
            held_out,
            held_out_lines,
            files,
            plan: EpochPlan::default(),
            epoch: 0,
        };
        rows.plan = rows.plan_of(0);
        rows
    }

    fn plan_of(&self, epoch: u64) -> EpochPlan {
        let EpochLayout { max_length, packing, gradient_accumulation_steps } = self.layout;
        EpochPlan::of(
            epoch_examples(&self.files, self.common.seed, epoch),
            |row| self.train.rows.length(row),
            &EpochSettings {
                seed: self.common.seed,
                epoch,
                shuffle: !self.common.no_shuffle,
                packing,
                max_length,
                batch_size: self.common.per_device_train_batch_size,
                gradient_accumulation_steps,
            },
        )
    }
}

impl<T: Record, R: Display + Serialize> PlannedRows for EpochRows<T, R> {
    fn report(&self) -> Value {
        json!(self.train.report)
    }

    fn fingerprints(&self) -> Vec<Fingerprint> {
        let tokens = self.train.tokens_sha256.clone();
        let mut prints = vec![
            ("the data".to_string(), self.train.sha256.clone()),
            ("what the tokenizer and chat template make of the data".into(), tokens),
        ];
        if let Some(held_out) = &self.held_out {
            prints.push(("the held-out data".into(), held_out.sha256.clone()));
        }
        prints
    }

    fn write_held_out(&self, run: &RunDir) -> Result<(), TrainError> {
        if self.held_out_lines.is_empty() {
            return Ok(());
        }
        Ok(write_atomically(run.file("held_out.jsonl"), |file| {
            self.held_out_lines.iter().try_for_each(|lines| file.write_all(lines))
        })?)
    }

    fn set_epoch(&mut self, epoch: u64) {
        if self.epoch != epoch {
            self.epoch = epoch;
            self.plan = self.plan_of(epoch);
        }
    }

    fn steps_of_epoch(&self) -> u64 {
        self.plan.steps() as u64
    }

    fn tokens_of_epoch(&self) -> u64 {
        let bins = (0..self.plan.bins()).flat_map(|bin| self.plan.bin(bin));
        bins.map(|row| self.train.rows.length(row)).sum::<usize>() as u64
    }

    fn bins_of_step(&self, step: u64) -> Vec<Vec<Vec<usize>>> {
        self.plan.step(step as usize)
    }

    fn total_steps(&self) -> u64 {
        let common = &self.common;
        if common.max_steps > 0 || self.files.iter().all(|(_, weight)| weight.fract() == 0.0) {
            return common.total_steps(self.steps_of_epoch());
        }
        // With fractional file weights, epochs have different rows, and may have different numbers of steps.
        let steps = |epoch| self.plan_of(epoch).steps() as u64;
        let whole = common.num_train_epochs.trunc() as u64;
        let part = common.num_train_epochs.fract();
        let last = if part > 0.0 { (part * steps(whole) as f64).ceil() as u64 } else { 0 };
        (0..whole).map(steps).sum::<u64>() + last
    }

    fn largest_micro_batch(&self) -> usize {
        let batch = self.common.per_device_train_batch_size;
        let longest = longest_together(self.train.rows.lengths(), batch);
        if !self.layout.packing {
            return longest;
        }
        let all: usize = self.train.rows.lengths().sum();
        (batch * self.layout.max_length).max(longest).min(all)
    }

    fn bytes(&self) -> [usize; 2] {
        let steps = self.total_steps() as f64 / self.plan.steps().max(1) as f64;
        let read = (steps * self.train.rows.len() as f64).ceil() as usize;
        let [held, mapped] = self.train.rows.bytes(read);
        let of_held_out = self.held_out.as_ref().map(|data| data.rows.bytes(usize::MAX));
        let [held_too, mapped_too] = of_held_out.unwrap_or_default();
        [held + held_too, mapped + mapped_too]
    }
}
