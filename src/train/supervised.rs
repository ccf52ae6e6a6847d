//! Training on the rows of a file: supervised fine-tuning, reward models, preferences. Which rows
//! make a step follows from the seed and the epoch; what is minimized over them is the command's.

use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::TrainError;
use super::fine_tune::{strategy, total_steps};
use super::fingerprints::base_fingerprint;
use super::learner::{Learner, MicroBatch};
use super::log::{Log, Numbers};
use super::memory::parse_bytes;
use super::progress::{Progress, Work};
use super::reference::{self, ReferenceLogps};
use super::run_dir::{Fingerprint, RunDir, State};
use super::settings::{CommonSettings, DpoSettings, EvalStrategy, RunSettings, Task};
use crate::data::checks::{Check, CheckReport};
use crate::data::{
    Batch, Cache, Comparison, ComparisonKind, ComparisonSettings, Comparisons, DataError, Dataset,
    EpochPlan, EpochSettings, LengthLimits, LoadSettings, ModelLimits, RowStore, WhenTooLong,
    epoch_examples,
};
use crate::eval::evaluate;
use crate::model::scoring::{row_scores, runs, target_log_probs};
use crate::model::{ActiveAdapter, Decoder};
use crate::monitor::Monitor;
use crate::objectives::preference::{PreferenceLoss, PreferenceSettings, kto_kl, kto_mismatched};
use crate::objectives::reward::{Calibration, Pair, RewardStats, pair_losses, pair_weight};
use crate::objectives::{Comparison as Compared, Labelled, Objective, Stats};
use crate::quant::Bytes;
use crate::text::Tokenizer;
use crate::weights::write_atomically;

/// Rows whose reference is asked for between two looks at whether to stop.
const REFERENCE_ROWS: usize = 64;

/// Rows of one kind.
enum Rows {
    /// Of tokens to learn.
    Examples(Dataset),
    /// Of responses to compare.
    Comparisons(Comparisons),
}

/// The rows of a run and where they stand.
pub struct Supervised {
    common: CommonSettings,
    task: Task,
    max_length: usize,
    rows: Rows,
    held_out: Option<Rows>,
    /// The held-out rows as the files have them, if they were split off here.
    held_out_lines: Vec<Bytes>,
    /// Examples of each file, and how often they come in an epoch; of comparisons all, once.
    files: Vec<(usize, f64)>,
    plan: EpochPlan,
    planned: u64,
    /// What the trained adapter is put on top of.
    below: Vec<ActiveAdapter>,
    /// What the reference wears, if the loss has one.
    reference: Option<Vec<ActiveAdapter>>,
    /// Summed log-probs under the reference, of the held-out rows behind the others.
    reference_logps: ReferenceLogps,
}

impl Rows {
    fn len(&self) -> usize {
        match self {
            Self::Examples(data) => data.rows.len(),
            Self::Comparisons(data) => data.rows.len(),
        }
    }

    /// The tokens of an example or comparison.
    fn length(&self, index: usize) -> usize {
        match self {
            Self::Examples(data) => data.rows.length(index),
            Self::Comparisons(data) => data.rows.length(index),
        }
    }

    /// The same of all.
    fn lengths(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.len()).map(|index| self.length(index))
    }

    /// Bytes in memory, and mapped ones that were looked at once so many rows were taken.
    fn bytes(&self, taken: usize) -> [usize; 2] {
        match self {
            Self::Examples(data) => data.rows.bytes(taken),
            Self::Comparisons(data) => data.rows.bytes(taken),
        }
    }

    /// The responses of each row that a reference is asked about.
    fn responses(&self) -> Box<dyn Iterator<Item = usize> + '_> {
        match self {
            Self::Examples(_) => Box::new(std::iter::empty()),
            Self::Comparisons(Comparisons { rows, .. }) => {
                Box::new((0..rows.len()).map(|row| rows.responses(row)))
            }
        }
    }
}

impl Supervised {
    /// Reads the rows.
    pub fn load(
        settings: &RunSettings,
        decoder: &Decoder,
        below: &[ActiveAdapter],
        tokenizer: &Tokenizer,
        monitor: Monitor<'_>,
    ) -> Result<Self, TrainError> {
        let common = settings.common.clone();
        let window = decoder.config.max_position_embeddings;
        let max_length = common.max_length.min(window);
        let model = Some(ModelLimits { window, vocab_size: decoder.config.vocab_size });
        let mut files = Vec::new();
        let cache = Some(row_cache(&common));
        let comparisons = |limits| {
            let (allow, cache) = (common.allow.clone(), cache.clone());
            ComparisonSettings { limits, allow, model, cache }
        };
        let (rows, held_out, held_out_lines) = match &settings.task {
            Task::Reward(_) => {
                let limits = LengthLimits { max_length, when_long: WhenTooLong::Drop };
                let limits = comparisons(limits);
                load_comparisons(&common, tokenizer, monitor, &limits, ComparisonKind::Pairs)?
            }
            Task::Dpo(own) => {
                let limits = LengthLimits { max_length, when_long: WhenTooLong::Cut };
                let kind = match own.loss_type {
                    PreferenceLoss::Kto => ComparisonKind::Labels,
                    _ => ComparisonKind::Pairs,
                };
                load_comparisons(&common, tokenizer, monitor, &comparisons(limits), kind)?
            }
            Task::Sft(own) => {
                let (allow, alpaca) = (common.allow.clone(), own.alpaca_prompt);
                let settings = LoadSettings { max_length, alpaca, allow, model, cache };
                load_examples(&common, tokenizer, &settings, &mut files, monitor)?
            }
            Task::Ppo(_) | Task::Grpo(_) => unreachable!("they make their own rows"),
        };
        if files.is_empty() {
            files.push((rows.len(), 1.0));
        }
        match &rows {
            Rows::Examples(data) => monitor.note(format_args!("data: {}", data.report)),
            Rows::Comparisons(data) => monitor.note(format_args!("data: {}", data.report)),
        }
        let mut source = Self {
            common,
            task: settings.task.clone(),
            max_length,
            rows,
            held_out,
            held_out_lines,
            files,
            plan: EpochPlan::default(),
            planned: 0,
            below: below.to_vec(),
            reference: None,
            reference_logps: ReferenceLogps::default(),
        };
        source.plan = source.plan_of(0);
        Ok(source)
    }

    /// Hashes of what was read.
    pub fn fingerprints(&self) -> Result<Vec<Fingerprint>, TrainError> {
        let (sha256, tokens) = match &self.rows {
            Rows::Examples(data) => (&data.sha256, data.tokens_sha256.clone()),
            Rows::Comparisons(data) => (&data.sha256, data.tokens_sha256.clone()),
        };
        let mut prints = vec![
            ("the data".to_string(), sha256.clone()),
            ("what the tokenizer and chat template make of the data".into(), tokens),
        ];
        if let Some(held_out) = &self.held_out {
            let sha256 = match held_out {
                Rows::Examples(data) => &data.sha256,
                Rows::Comparisons(data) => &data.sha256,
            };
            prints.push(("the held-out data".into(), sha256.clone()));
        }
        if let Some(folder) = self.reference_folder().filter(|path| !path.as_os_str().is_empty()) {
            prints.push(("the reference adapter".into(), base_fingerprint(folder)?));
        }
        Ok(prints)
    }

    /// The folder of the reference's adapter, empty for the bare base, if the loss has a reference.
    fn reference_folder(&self) -> Option<&Path> {
        let Task::Dpo(own) = &self.task else { return None };
        let given = !own.ref_adapter.as_os_str().is_empty();
        let folder = if given { &own.ref_adapter } else { &self.common.adapter };
        (own.loss_type.has_reference() && !own.reference_free).then_some(folder)
    }

    /// Takes up the run: writes what was held out, and computes what the reference says of all rows,
    /// or reads it where it has been computed.
    pub fn begin(
        &mut self,
        decoder: &Decoder,
        run: &RunDir,
        state: &State,
        monitor: Monitor<'_>,
    ) -> Result<(), TrainError> {
        if !self.held_out_lines.is_empty() {
            write_atomically(run.file("held_out.jsonl"), |file| {
                self.held_out_lines
                    .iter()
                    .try_for_each(|lines| std::io::Write::write_all(file, lines))
            })?;
        }
        self.planned = state.epoch;
        self.plan = self.plan_of(state.epoch);
        let (Some(folder), Rows::Comparisons(data)) = (self.reference_folder(), &self.rows) else {
            return Ok(());
        };
        let active = reference::active(&self.below, folder, decoder, monitor)?;
        let mut logps = self.no_reference_logps();
        let held_out = match &self.held_out {
            Some(Rows::Comparisons(held_out)) => Some(&held_out.rows),
            _ => None,
        };
        let parts =
            [(0, &data.rows)].into_iter().chain(held_out.map(|rows| (data.rows.len(), rows)));
        reference::cached(&run.file("reference.safetensors"), &mut logps, |logps| {
            let all: usize = parts.clone().map(|(_, rows)| rows.len()).sum();
            monitor.note(format_args!("reference: log-probs of {all} rows"));
            for (first, rows) in parts {
                for start in (0..rows.len()).step_by(REFERENCE_ROWS) {
                    if monitor.stopped() {
                        return Err(DataError::Stopped.into());
                    }
                    let range = start..rows.len().min(start + REFERENCE_ROWS);
                    let found = asked(decoder, &active, rows, range.clone())?;
                    for (row, found) in range.zip(found) {
                        logps.of_mut(first + row).copy_from_slice(&found);
                    }
                }
            }
            Ok(())
        })?;
        self.reference_logps = logps;
        self.reference = Some(active);
        Ok(())
    }

    /// Room for what the reference says of all rows, those held out too.
    fn no_reference_logps(&self) -> ReferenceLogps {
        let held_out = self.held_out.iter().flat_map(Rows::responses);
        ReferenceLogps::new(self.rows.responses().chain(held_out))
    }

    /// Steps of the run.
    pub fn total_steps(&self) -> u64 {
        let common = &self.common;
        if common.max_steps > 0 || self.files.iter().all(|(_, weight)| weight.fract() == 0.0) {
            return total_steps(common, self.plan.steps() as u64);
        }
        // With parts of files an epoch has other rows than the next, and may have other steps.
        let steps = |epoch| self.plan_of(epoch).steps() as u64;
        let whole = common.num_train_epochs.trunc() as u64;
        let part = common.num_train_epochs.fract();
        let last = if part > 0.0 { (part * steps(whole) as f64).ceil() as u64 } else { 0 };
        (0..whole).map(steps).sum::<u64>() + last
    }

    /// Tokens of the largest micro-batch there can be: its bins full, or the longest rows together.
    pub fn largest_micro_batch(&self) -> usize {
        let batch = self.common.per_device_train_batch_size;
        let longest = longest_together(self.rows.lengths(), batch);
        match &self.task {
            Task::Sft(own) if own.packing => {
                let all: usize = self.rows.lengths().sum();
                (batch * self.max_length).max(longest).min(all)
            }
            _ => longest,
        }
    }

    /// Whether what is learned is read from the base's head.
    pub fn reads_logits(&self) -> bool {
        !matches!(self.task, Task::Reward(_))
    }

    /// Bytes of the rows, held-out ones too: in memory, and mapped ones that the run looks at.
    pub fn data_bytes(&self) -> [usize; 2] {
        let steps = self.total_steps() as f64 / self.plan.steps().max(1) as f64;
        let taken = (steps * self.rows.len() as f64).ceil() as usize;
        let [held, mapped] = self.rows.bytes(taken);
        let of_held_out = self.held_out.as_ref().map(|rows| rows.bytes(usize::MAX));
        let [more, others] = of_held_out.unwrap_or_default();
        [held + more, mapped + others]
    }

    /// Bytes of what the reference is going to say of all rows.
    pub fn reference_bytes(&self) -> usize {
        if self.reference_folder().is_none() {
            return 0;
        }
        let parts = [Some(&self.rows), self.held_out.as_ref()];
        let parts = parts.into_iter().flatten();
        parts.map(|rows| ReferenceLogps::bytes(rows.responses().sum(), rows.len())).sum()
    }

    /// Steps of the first epoch, and tokens.
    pub fn epoch(&self) -> (u64, u64) {
        let bins = (0..self.plan.bins()).flat_map(|bin| self.plan.bin(bin));
        let tokens: usize = bins.map(|row| self.rows.length(row)).sum();
        (self.plan.steps() as u64, tokens as u64)
    }

    /// Takes up the run as far as its first `steps` steps need, and writes nothing. What share of the
    /// reference's work that was: 0 where there is none.
    pub fn begin_trial(
        &mut self,
        decoder: &Decoder,
        steps: usize,
        monitor: Monitor<'_>,
    ) -> Result<f64, TrainError> {
        let (Some(folder), Rows::Comparisons(data)) = (self.reference_folder(), &self.rows) else {
            return Ok(0.0);
        };
        let active = reference::active(&self.below, folder, decoder, monitor)?;
        let mut logps = self.no_reference_logps();
        let held_out = self.held_out.iter().flat_map(Rows::lengths);
        let all: usize = self.rows.lengths().chain(held_out).sum();
        let mut tokens = 0;
        for step in 0..steps.min(self.plan.steps()) {
            let rows: Vec<usize> = self.plan.step(step).into_iter().flatten().flatten().collect();
            tokens += rows.iter().map(|&row| data.rows.length(row)).sum::<usize>();
            let found = asked(decoder, &active, &data.rows, rows.iter().copied())?;
            for (row, found) in rows.into_iter().zip(found) {
                logps.of_mut(row).copy_from_slice(&found);
            }
        }
        self.reference_logps = logps;
        self.reference = Some(active);
        Ok(tokens as f64 / all.max(1) as f64)
    }

    /// Whether the steps so far end an epoch.
    pub fn epoch_ends(&self, state: &State) -> bool {
        state.step_in_epoch == self.plan.steps() as u64
    }

    /// Takes a step.
    pub fn step(
        &mut self,
        learner: &mut Learner,
        state: &mut State,
        learning_rate: f64,
    ) -> Result<(Numbers, Work), TrainError> {
        if self.epoch_ends(state) {
            state.epoch += 1;
            state.step_in_epoch = 0;
        }
        if self.planned != state.epoch {
            self.planned = state.epoch;
            self.plan = self.plan_of(state.epoch);
        }
        let bins = self.plan.step(state.step_in_epoch as usize);
        let (parts, count) = self.micro_batches(&bins, state.epoch, learner)?;
        let stepped = learner.step(&parts, learning_rate)?;
        state.step_in_epoch += 1;

        let tokens: usize = parts.iter().map(|part| part.batch.tokens.len()).sum();
        let mut numbers = vec![
            ("loss".to_string(), json!(stepped.loss)),
            ("grad_norm".into(), json!(stepped.grad_norm)),
            ("learning_rate".into(), json!(learning_rate)),
        ];
        match self.rows {
            Rows::Examples(_) => numbers.push(("tokens".into(), json!(count as u64))),
            Rows::Comparisons(_) => numbers.push(("tokens".into(), json!(tokens))),
        }
        numbers.extend(metrics(&stepped.stats));
        let work = Work {
            headline: format!("loss {:.4}", stepped.loss),
            tokens: tokens as u64,
            samples: bins.iter().flatten().flatten().count() as u64,
            ..Work::default()
        };
        Ok((numbers, work))
    }

    /// What is held out under the adapter as it is; `None` if the monitor asked to stop before all went through.
    pub fn evaluate(
        &self,
        decoder: &Decoder,
        active: &[ActiveAdapter],
        monitor: Monitor<'_>,
    ) -> Result<Option<Numbers>, TrainError> {
        match (&self.held_out, &self.task) {
            (None, _) => Ok(Some(Vec::new())),
            (Some(Rows::Examples(data)), _) => {
                let loss = evaluate(decoder, active, &data.rows, monitor.stop)?;
                Ok(loss.map(|loss| {
                    vec![
                        ("eval_loss".into(), json!(loss.loss)),
                        ("eval_tokens".into(), json!(loss.tokens)),
                    ]
                }))
            }
            (Some(Rows::Comparisons(data)), Task::Reward(own)) => {
                let center = own.center_rewards_coefficient;
                let judged = judge_rewards(decoder, active, &data.rows, center, monitor)?;
                Ok(judged.map(|judged| {
                    let numbers = judged.numbers().into_iter();
                    numbers.map(|(key, value)| (format!("eval_{key}"), value)).collect()
                }))
            }
            (Some(Rows::Comparisons(data)), Task::Dpo(own)) => {
                self.evaluate_preferences(decoder, active, own, &data.rows, monitor)
            }
            (Some(Rows::Comparisons(_)), _) => unreachable!("only reward and dpo compare"),
        }
    }

    /// What the command's JSON says beside the common part.
    pub fn results(
        &self,
        log: &Log,
        progress: &Progress,
    ) -> Result<Map<String, Value>, TrainError> {
        let mut results = Map::new();
        let data = match &self.rows {
            Rows::Examples(data) => json!(data.report),
            Rows::Comparisons(data) => json!(data.report),
        };
        results.insert("data".into(), data);
        let losses = log.values("eval_loss")?;
        results.insert("eval_loss_first".into(), json!(losses.first()));
        results.insert("eval_loss_last".into(), json!(losses.last()));
        if let Rows::Comparisons(_) = self.rows {
            results.insert("pairs_per_second".into(), json!(progress.samples_per_second()));
        }
        let last = log.metrics.lines()?;
        let last = last.iter().rev().find(|line| line.get("eval_loss").is_some());
        if let Some(Value::Object(last)) = last {
            let own = |key: &str| key.starts_with("eval_") && key != "eval_loss";
            let more = last.iter().filter(|(key, _)| own(key));
            results.extend(more.map(|(key, value)| (key.clone(), value.clone())));
        }
        Ok(results)
    }

    fn plan_of(&self, epoch: u64) -> EpochPlan {
        let (packing, gradient_accumulation_steps) = match &self.task {
            Task::Sft(own) => (own.packing, own.gradient_accumulation_steps),
            Task::Reward(own) => (false, own.gradient_accumulation_steps),
            Task::Dpo(own) => (false, own.gradient_accumulation_steps),
            Task::Ppo(_) | Task::Grpo(_) => unreachable!("they make their own rows"),
        };
        EpochPlan::of(
            epoch_examples(&self.files, self.common.seed, epoch),
            |row| self.rows.length(row),
            &EpochSettings {
                seed: self.common.seed,
                epoch,
                shuffle: !self.common.no_shuffle,
                packing,
                max_length: self.max_length,
                batch_size: self.common.per_device_train_batch_size,
                gradient_accumulation_steps,
            },
        )
    }

    /// The micro-batches of a step, and what their losses are divided by.
    fn micro_batches(
        &self,
        bins: &[Vec<Vec<usize>>],
        epoch: u64,
        learner: &Learner,
    ) -> Result<(Vec<MicroBatch>, f64), TrainError> {
        let part = |(batch, objective): (Batch, Objective), count: f64| MicroBatch {
            batch,
            objective,
            scale: 1.0 / count,
            adapter: 0,
            epoch,
            temperature: 1.0,
        };
        let parts: Vec<(Batch, Objective)>;
        let count = match (&self.rows, &self.task) {
            (Rows::Examples(data), _) => {
                let batches = bins.iter().map(|bins| Batch::gather(&data.rows, bins));
                parts = batches.map(|batch| (batch, Objective::LanguageModelling)).collect();
                parts.iter().map(|(batch, _)| batch.count()).sum::<usize>() as f64
            }
            (Rows::Comparisons(data), Task::Reward(own)) => {
                let center = own.center_rewards_coefficient;
                let part = |bins: &Vec<Vec<usize>>| {
                    let rows = taken(&data.rows, bins.iter().flatten().copied());
                    reward_part(&refs(&rows), center)
                };
                parts = bins.iter().map(part).collect();
                let weights = parts.iter().map(|(_, objective)| match objective {
                    Objective::Reward { pairs, .. } => {
                        pairs.iter().map(|p| f64::from(p.weight)).sum()
                    }
                    _ => 0.0,
                });
                weights.sum()
            }
            (Rows::Comparisons(data), Task::Dpo(own)) => {
                let indices: Vec<Vec<usize>> =
                    bins.iter().map(|bins| bins.iter().flatten().copied().collect()).collect();
                let active = learner.active(0);
                let decoder = learner.decoder();
                parts = self.preference_parts(decoder, active, own, data, &indices)?;
                let count = parts.iter().map(|(_, objective)| match objective {
                    Objective::Preference(compared) => compared.pairs.len(),
                    Objective::Kto(labelled) => labelled.labels.len(),
                    _ => 0,
                });
                count.sum::<usize>() as f64
            }
            (Rows::Comparisons(_), _) => unreachable!("only reward and dpo compare"),
        };
        Ok((parts.into_iter().map(|p| part(p, count)).collect(), count))
    }

    /// The parts of a step of preference optimization, from the rows of each.
    fn preference_parts(
        &self,
        decoder: &Decoder,
        active: &[ActiveAdapter],
        own: &DpoSettings,
        data: &Comparisons,
        indices: &[Vec<usize>],
    ) -> Result<Vec<(Batch, Objective)>, TrainError> {
        let rows_of = |indices: &Vec<usize>| taken(&data.rows, indices.iter().copied());
        let rows: Vec<Vec<Comparison>> = indices.iter().map(rows_of).collect();
        let reference = |rows: &[usize]| self.reference_of(rows.iter().copied());
        if own.loss_type == PreferenceLoss::Kto {
            let all: Vec<&Comparison> = rows.iter().flatten().collect();
            let reference_worn = self.reference.as_deref().unwrap_or_default();
            let kl = kto_reference_point(decoder, active, reference_worn, &all)?;
            let parts = rows.iter().zip(indices).map(|(rows, indices)| {
                labelled_part(&refs(rows), own, reference(indices).unwrap_or_default(), kl)
            });
            return Ok(parts.collect());
        }
        let parts = rows.iter().zip(indices);
        let mut parts: Vec<(Batch, Compared)> = parts
            .map(|(rows, indices)| compared_part(&refs(rows), own, reference(indices)))
            .collect();
        weigh_likelihood(&mut parts);
        let parts = parts.into_iter();
        Ok(parts.map(|(batch, part)| (batch, Objective::Preference(part.into()))).collect())
    }

    /// What the reference says of the responses of rows, one after another, if there is one.
    fn reference_of(&self, rows: impl Iterator<Item = usize>) -> Option<Vec<f32>> {
        self.reference.as_ref()?;
        Some(rows.flat_map(|row| self.reference_logps.of(row).iter().copied()).collect())
    }

    fn evaluate_preferences(
        &self,
        decoder: &Decoder,
        active: &[ActiveAdapter],
        own: &DpoSettings,
        held_out: &RowStore<Comparison>,
        monitor: Monitor<'_>,
    ) -> Result<Option<Numbers>, TrainError> {
        let (mut loss, mut count, mut stats) = (0.0, 0, Stats::default());
        let size = self.common.per_device_train_batch_size;
        for first in (0..held_out.len()).step_by(size) {
            if monitor.stopped() {
                return Ok(None);
            }
            let range = first..held_out.len().min(first + size);
            let rows = taken(held_out, range.clone());
            let rows = refs(&rows);
            // They stand behind those that are trained on.
            let reference = self.reference_of(range.map(|row| self.rows.len() + row));
            let (batch, objective) = if own.loss_type == PreferenceLoss::Kto {
                let reference_worn = self.reference.as_deref().unwrap_or_default();
                let kl = kto_reference_point(decoder, active, reference_worn, &rows)?;
                labelled_part(&rows, own, reference.unwrap_or_default(), kl)
            } else {
                let mut parts = [compared_part(&rows, own, reference)];
                weigh_likelihood(&mut parts);
                let [(batch, part)] = parts;
                (batch, Objective::Preference(part.into()))
            };
            count += match &objective {
                Objective::Preference(part) => part.pairs.len(),
                _ => rows.len(),
            };
            let logps = target_log_probs(decoder, active, &batch, 1.0)?;
            let logps = candle_core::Tensor::new(logps, &candle_core::Device::Cpu)?;
            let (_, judged) = objective.judge(Some(&logps), None, None)?;
            loss += judged.loss;
            stats.add(judged.stats);
        }
        let mut numbers: Numbers = vec![("eval_loss".into(), json!(loss / count.max(1) as f64))];
        let more = metrics(&stats).into_iter();
        numbers.extend(more.map(|(key, value)| (format!("eval_{key}"), value)));
        Ok(Some(numbers))
    }
}

/// Where the tokens of large files are kept.
pub(super) fn row_cache(common: &CommonSettings) -> Cache {
    let given = !common.cache.as_os_str().is_empty();
    let folder = if given { common.cache.clone() } else { common.out.join("rows") };
    Cache { folder, from_bytes: parse_bytes(&common.cache_from).unwrap_or(u64::MAX) }
}

/// The tokens of the longest rows, `count` of them together.
pub(super) fn longest_together(lengths: impl Iterator<Item = usize>, count: usize) -> usize {
    let mut longest = std::collections::BinaryHeap::new();
    for length in lengths {
        longest.push(std::cmp::Reverse(length));
        if longest.len() > count {
            longest.pop();
        }
    }
    longest.into_iter().map(|length| length.0).sum()
}

/// Some of the rows, read anew.
fn taken(rows: &RowStore<Comparison>, which: impl Iterator<Item = usize>) -> Vec<Comparison> {
    which.map(|row| rows.get(row)).collect()
}

fn refs(rows: &[Comparison]) -> Vec<&Comparison> {
    rows.iter().collect()
}

/// The summed log-probs of each response of some of the rows.
fn asked(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    rows: &RowStore<Comparison>,
    which: impl Iterator<Item = usize>,
) -> Result<Vec<Vec<f32>>, TrainError> {
    response_log_probs(decoder, active, &refs(&taken(rows, which)))
}

/// Rows, held-out rows, and these as the files have them if they were split off here.
type Loaded = (Rows, Option<Rows>, Vec<Bytes>);

fn load_examples(
    common: &CommonSettings,
    tokenizer: &Tokenizer,
    settings: &LoadSettings,
    files: &mut Vec<(usize, f64)>,
    monitor: Monitor<'_>,
) -> Result<Loaded, TrainError> {
    let splits = strategy(common) != EvalStrategy::No && common.eval_data.as_os_str().is_empty();
    let (mut all, mut held_out, mut lines) = (Vec::new(), Vec::new(), Vec::new());
    for file in &common.data {
        let path = &file.path;
        let data = if splits {
            let split = Dataset::load_split(path, tokenizer, settings.clone(), monitor)?;
            lines.push(split.held_out_lines);
            held_out.extend(split.held_out);
            split.train
        } else {
            Dataset::load(path, tokenizer, settings.clone(), monitor)?
        };
        judge(&data.checks, path, &common.allow, monitor)?;
        files.push((data.rows.len(), file.weight));
        all.push(data);
    }
    if strategy(common) != EvalStrategy::No && !splits {
        let mut data = Dataset::load(&common.eval_data, tokenizer, settings.clone(), monitor)?;
        for (file, trained) in common.data.iter().zip(&all) {
            trained.hashes.report_held_out_duplicates(&file.path, &data.hashes, &mut data.checks);
        }
        warn(&data.checks, &common.eval_data, &common.allow, monitor);
        held_out.push(data);
    }
    if splits && held_out.is_empty() {
        warn_of_none_held_out(common, monitor);
        lines.clear();
    }
    let held_out = (!held_out.is_empty()).then(|| Rows::Examples(Dataset::join(held_out)));
    Ok((Rows::Examples(Dataset::join(all)), held_out, lines))
}

fn load_comparisons(
    common: &CommonSettings,
    tokenizer: &Tokenizer,
    monitor: Monitor<'_>,
    settings: &ComparisonSettings,
    kind: ComparisonKind,
) -> Result<Loaded, TrainError> {
    let path = common.data_file();
    let load = |path: &Path| Comparisons::load(path, tokenizer, settings.clone(), kind, monitor);
    let (train, held_out, lines) = if strategy(common) == EvalStrategy::No {
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
            warn_of_none_held_out(common, monitor);
        }
        (split.train, split.held_out, lines.into_iter().collect())
    };
    judge(&train.checks, path, &common.allow, monitor)?;
    Ok((Rows::Comparisons(train), held_out.map(Rows::Comparisons), lines))
}

/// Tells what is odd about rows, and refuses what would teach nothing or teach wrong.
pub(super) fn judge(
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

/// Tells that held-out rows were asked for and there are none.
pub(super) fn warn_of_none_held_out(common: &CommonSettings, monitor: Monitor<'_>) {
    let files: Vec<String> = common.data.iter().map(ToString::to_string).collect();
    let files = files.join(", ");
    monitor.warn(format_args!("no row of {files} falls into the held-out tenth"));
}

/// Comparisons laid out, each prompt once.
pub fn lay_out(rows: &[&Comparison]) -> Batch {
    let mut batch = Batch::default();
    for row in rows {
        let responses: Vec<&[u32]> = row.responses.iter().map(Vec::as_slice).collect();
        batch.push_group(&row.prompt, &responses, row.row);
    }
    batch
}

/// A micro-batch of a reward model.
pub fn reward_part(rows: &[&Comparison], center_rewards_coefficient: f64) -> (Batch, Objective) {
    let batch = lay_out(rows);
    let objective = Objective::Reward {
        rows: batch.ends.clone(),
        pairs: weighted_pairs(rows),
        center_rewards_coefficient,
    };
    (batch, objective)
}

/// The pairs of rows whose responses follow one another, each row's counting as one comparison.
fn weighted_pairs(rows: &[&Comparison]) -> Vec<Pair> {
    let mut pairs = Vec::new();
    let mut first = 0;
    for row in rows {
        let weight = pair_weight(row.pairs.len());
        pairs.extend(row.pairs.iter().map(|pair| Pair {
            better: first + pair.better,
            worse: first + pair.worse,
            margin: pair.margin,
            weight,
        }));
        first += row.responses.len();
    }
    pairs
}

fn preference_settings(own: &DpoSettings) -> PreferenceSettings {
    PreferenceSettings {
        loss_type: own.loss_type,
        beta: own.beta,
        label_smoothing: own.label_smoothing,
        simpo_gamma: own.simpo_gamma,
        desirable_weight: own.desirable_weight,
        undesirable_weight: own.undesirable_weight,
    }
}

/// A micro-batch of preferences; the weight of ORPO's likelihood is a whole step's, not known here.
pub fn compared_part(
    rows: &[&Comparison],
    own: &DpoSettings,
    reference: Option<Vec<f32>>,
) -> (Batch, Compared) {
    let mut batch = lay_out(rows);
    let tokens = batch.spans.iter().map(Range::len).collect();
    let pairs = weighted_pairs(rows).into_iter().map(|pair| (pair.better, pair.worse)).collect();
    let mut part = Compared {
        settings: preference_settings(own),
        tokens,
        pairs,
        reference,
        prompts: Vec::new(),
        prompt_of: Vec::new(),
        nll_weight: 0.0,
    };
    if own.loss_type == PreferenceLoss::Orpo {
        let mut start = 0;
        for (index, row) in rows.iter().enumerate() {
            part.prompts.push(batch.learn_prompt(start..start + row.prompt.len()));
            part.prompt_of.extend(row.pairs.iter().map(|_| index));
            start += row.tokens();
        }
    }
    (batch, part)
}

/// ORPO's likelihood is a mean over tokens of the step, its odds ratio one over pairs.
pub fn weigh_likelihood(parts: &mut [(Batch, Compared)]) {
    let (mut pairs, mut tokens) = (0, 0);
    for (_, part) in parts.iter() {
        pairs += part.pairs.len();
        for (&(better, _), &prompt) in part.pairs.iter().zip(&part.prompt_of) {
            tokens += part.tokens[better] + part.prompts[prompt];
        }
    }
    for (_, part) in parts {
        part.nll_weight = pairs as f64 / tokens.max(1) as f64;
    }
}

/// A micro-batch of labelled responses, around the reference point `kl` of their step.
pub fn labelled_part(
    rows: &[&Comparison],
    own: &DpoSettings,
    reference: Vec<f32>,
    kl: f64,
) -> (Batch, Objective) {
    let batch = lay_out(rows);
    let labelled = Labelled {
        settings: preference_settings(own),
        tokens: batch.spans.iter().map(Range::len).collect(),
        labels: rows.iter().map(|row| row.label.unwrap_or(false)).collect(),
        reference,
        kl,
    };
    (batch, Objective::Kto(labelled.into()))
}

/// KTO's reference point of a step: what the policy, which wears `active`, and the reference make of
/// each prompt with another row's response.
pub fn kto_reference_point(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    reference: &[ActiveAdapter],
    rows: &[&Comparison],
) -> Result<f64, TrainError> {
    if rows.len() < 2 {
        return Ok(0.0); // an epoch's last row has no other to be compared with
    }
    // Another row's response may not fit behind this one's prompt.
    let window = decoder.config.max_position_embeddings;
    let room = |row: &Comparison| window.saturating_sub(row.prompt.len()).max(1);
    let mismatched: Vec<Comparison> = kto_mismatched(rows.len())
        .into_iter()
        .zip(rows)
        .map(|(other, row)| Comparison {
            responses: rows[other]
                .responses
                .iter()
                .map(|response| response[..response.len().min(room(row))].to_vec())
                .collect(),
            ..(*row).clone()
        })
        .collect();
    let mismatched: Vec<&Comparison> = mismatched.iter().collect();
    let single = |sums: Vec<Vec<f32>>| -> Vec<f32> { sums.into_iter().flatten().collect() };
    let policy = single(response_log_probs(decoder, active, &mismatched)?);
    let reference = single(response_log_probs(decoder, reference, &mismatched)?);
    Ok(kto_kl(&policy, &reference))
}

/// The summed log-probs of each response of each row.
pub fn response_log_probs(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    rows: &[&Comparison],
) -> Result<Vec<Vec<f32>>, TrainError> {
    let mut all = Vec::with_capacity(rows.len());
    for run in runs(rows.iter().map(|row| row.tokens())) {
        let batch = lay_out(&rows[run.clone()]);
        let logps = target_log_probs(decoder, active, &batch, 1.0)?;
        let mut sums = batch.spans.iter().map(|span| logps[span.clone()].iter().sum::<f32>());
        for row in &rows[run] {
            all.push(sums.by_ref().take(row.responses.len()).collect());
        }
    }
    Ok(all)
}

/// How a reward model does on comparisons.
#[derive(Debug, Clone, Default)]
pub struct RewardJudgement {
    /// Loss, accuracy, margins.
    pub stats: RewardStats,
    /// Expected against observed preference.
    pub calibration: Calibration,
    /// The scores of each row's responses.
    pub scores: Vec<Vec<f32>>,
}

impl RewardJudgement {
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

/// Judges a reward model, the last of `active` with a score head, by comparisons; none if `stop` was
/// set before all went through.
pub fn judge_rewards(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    rows: &RowStore<Comparison>,
    center_rewards_coefficient: f64,
    monitor: Monitor<'_>,
) -> Result<Option<RewardJudgement>, TrainError> {
    let mut judgement = RewardJudgement::default();
    let head = active.iter().rev().find_map(|active| active.adapter.score.as_ref());
    let Some(head) = head else {
        return Err(TrainError::Settings("no adapter has a score head".into()));
    };
    for run in runs(rows.lengths()) {
        if monitor.stopped() {
            return Ok(None);
        }
        let rows = taken(rows, run);
        let rows = refs(&rows);
        let batch = lay_out(&rows);
        let scores = row_scores(decoder, active, head, &batch, batch.ends.clone())?;
        let pairs = weighted_pairs(&rows);
        let mut rest = &scores[..];
        for row in &rows {
            let (of_row, others) = rest.split_at(row.responses.len());
            judgement.scores.push(of_row.to_vec());
            rest = others;
        }
        for pair in &pairs {
            judgement.calibration.add(f64::from(scores[pair.better] - scores[pair.worse]));
        }
        let scores = candle_core::Tensor::new(scores, &candle_core::Device::Cpu)?;
        let (_, stats) = pair_losses(&scores, &pairs, center_rewards_coefficient)?;
        judgement.stats.add(&stats);
    }
    Ok(Some(judgement))
}

/// What objectives counted, under TRL's names.
pub fn metrics(stats: &Stats) -> Numbers {
    let mut found: Vec<(&'static str, f64)> = Vec::new();
    if let Some(reward) = &stats.reward {
        found.extend(reward.metrics().into_iter().filter(|(key, _)| *key != "loss"));
    }
    if let Some(preference) = &stats.preference {
        found.extend(preference.metrics());
    }
    if let Some(grpo) = &stats.grpo {
        found.extend(grpo.metrics());
    }
    if let Some(tokens) = &stats.tokens {
        found.extend(tokens.metrics());
    }
    found.into_iter().map(|(key, value)| (key.to_string(), json!(value))).collect()
}
