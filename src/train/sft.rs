//! Supervised fine-tuning: the loop, on one page, read downwards.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use candle_core::{Device, Var};
use quantune_adapters::config::{InitLoraWeights, LoraConfig, Modules};
use quantune_adapters::delta::Adapter;
use quantune_adapters::{format, targets};
use serde::Serialize;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::TrainError;
use super::memory::{self, default_budget, parse_bytes};
use super::progress::Progress;
use super::run_dir::{
    Fingerprint, Metrics, RunDir, State, read_optimizer, read_state, write_state,
};
use super::settings::{EvalStrategy, SftSettings};
use super::step::{Buffers, StepSettings, accumulate, dropout};
use super::tensorboard::EventWriter;
use crate::data::{Batch, DataError, DataReport, Dataset, EpochPlan, EpochSettings};
use crate::eval::evaluate;
use crate::model::{Adapters, Decoder, Worn};
use crate::objectives::Objective;
use crate::optim::{AdamW, AdamWSettings, Gradients, Schedule, clip_factor, global_norm};
use crate::text::{Tokenizer, first_second, today};
use crate::weights::{Checkpoint, write_atomically};

/// What a finished run says of itself; the `--json` line of `sft`.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Optimizer steps.
    pub steps: u64,
    /// Mean nats per counted token, first step.
    pub loss_first: Option<f64>,
    /// The same, last step.
    pub loss_last: Option<f64>,
    /// Held-out loss before the first step.
    pub eval_loss_first: Option<f64>,
    /// Held-out loss after the last.
    pub eval_loss_last: Option<f64>,
    /// Real tokens a second in this process's steps.
    pub tokens_per_second: f64,
    /// Trainable numbers.
    pub trainable_parameters: usize,
    /// The adapter's folder.
    pub adapter: PathBuf,
    /// Which kernel serves each kind of linear layer.
    pub kernels: BTreeMap<String, String>,
    /// Layers whose tape is rebuilt on the way down, as the memory budget asks.
    pub recomputed_layers: usize,
    /// What the data came to.
    pub data: DataReport,
    /// The step this process took up, if it resumed.
    pub resumed_at: Option<u64>,
}

/// How a run ended.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// All steps are done and the adapter is written.
    Done(Box<Summary>),
    /// Stopped by the user before there was a run; one that was to be resumed is as it was.
    NotBegun,
    /// Stopped by the user before the first step or after a whole one, to be resumed from there.
    Interrupted {
        /// Steps done.
        step: u64,
        /// Steps there are.
        total_steps: u64,
    },
}

/// Trains an adapter. With `resume`, goes on with the run in `settings.out`. `stop` is looked at
/// while rows are read, between the batches of an evaluation, and after each step.
pub fn sft(settings: &SftSettings, resume: bool, stop: &AtomicBool) -> Result<Outcome, TrainError> {
    if let Some(fault) = settings.fault() {
        return Err(TrainError::Settings(fault));
    }
    let mut settings = absolute(settings)?;
    if settings.template_date.is_empty() {
        settings.template_date = today();
    }
    let settings = &settings;
    let Some(now) = first_second(&settings.template_date) else {
        let fault = format!("template_date is {:?}, needed YYYY-MM-DD", settings.template_date);
        return Err(TrainError::Settings(fault));
    };
    // Told before anything is read: what is in the way of the run.
    let resumed = if resume {
        Some(RunDir::resume(&settings.out, settings)?)
    } else {
        RunDir::vacant(&settings.out)?;
        None
    };

    // What is trained, on what.
    let checkpoint = Checkpoint::open(&settings.base)?;
    let decoder = Decoder::load(&checkpoint, settings.compute)?;
    let context = decoder.config.max_position_embeddings;
    let max_length = settings.max_length.min(context);
    let mut tokenizer = Tokenizer::open(&checkpoint)?;
    tokenizer.set_template_time(now);
    let data = match load_data(settings, &tokenizer, max_length, stop) {
        Err(TrainError::Data(DataError::Stopped)) => return Ok(Outcome::NotBegun),
        data => data?,
    };
    drop(tokenizer);
    let fingerprints = fingerprints(settings, &data)?;
    let (run, saved, adapter) = if let Some(run) = resumed {
        same_fingerprints(&settings.out, &run.fingerprints()?, &fingerprints)?;
        let saved = run.last_checkpoint()?;
        let adapter = match &saved {
            Some(folder) => read_adapter(folder, &decoder)?,
            None => begin_adapter(settings, &decoder)?,
        };
        (run, saved, adapter)
    } else {
        let adapter = begin_adapter(settings, &decoder)?; // may fail: before anything is written
        (RunDir::create(&settings.out, settings, &fingerprints)?, None, adapter)
    };
    let adapter = Arc::new(adapter);
    let parameters: Vec<Var> = adapter.parameters().into_iter().map(|(_, var)| var).collect();
    let lengths: Vec<usize> = parameters.iter().map(|var| var.elem_count()).collect();
    let mut optimizer = AdamW::new(optimizer_settings(settings), &lengths);

    // Where it stands.
    let mut state = State::default();
    if let Some(folder) = &saved {
        state = read_state(folder)?;
        read_optimizer(folder, &adapter, &mut optimizer, state.step)?;
    }
    let resumed_at = resume.then_some(state.step);
    if let Some(lines) = &data.held_out_lines {
        write_atomically(run.file("held_out.jsonl"), |file| {
            std::io::Write::write_all(file, lines)
        })?;
    }

    let plan = |epoch: u64| {
        EpochPlan::new(
            &data.train.examples,
            &EpochSettings {
                seed: settings.seed,
                epoch,
                shuffle: !settings.no_shuffle,
                packing: settings.packing,
                max_length,
                batch_size: settings.per_device_train_batch_size,
                gradient_accumulation_steps: settings.gradient_accumulation_steps,
            },
        )
    };
    let mut epoch_plan = plan(state.epoch);
    let total_steps = total_steps(settings, epoch_plan.steps() as u64);
    let schedule = schedule(settings, total_steps);
    let mut log = Log::open(&run, state.metrics_bytes)?;
    let worn = [Worn::trainable(adapter.clone())];
    // Whether it came to its end; what a stop cuts short is taken when the run goes on.
    let evaluate = |log: &mut Log, state: &State| -> Result<bool, TrainError> {
        let Some(held_out) = &data.held_out else { return Ok(true) };
        let frozen = [Worn::frozen(adapter.clone())];
        let eval = evaluate(&decoder, Adapters::Same(&frozen), &held_out.examples, stop)?;
        let Some(eval) = eval else { return Ok(false) };
        log.evaluation(state.step, eval.loss, eval.tokens)?;
        Ok(true)
    };
    eprintln!("data: {}", data.train.report);
    eprintln!(
        "training {} parameters of {} modules, {total_steps} steps from step {}",
        adapter.num_parameters(),
        adapter.modules.len(),
        state.step
    );

    let passed = passed_layers(&decoder, &worn);
    let kept_layers = kept_layers(settings, &decoder, passed, max_length, &adapter, &data.train);
    let mut buffers = Buffers::default();
    let mut gradients: Gradients = lengths.iter().map(|&n| vec![0.0; n]).collect();
    let mut progress = Progress::new(state.step, total_steps);
    let due = |state: &State, plan: &EpochPlan| eval_due(settings, state, plan, total_steps);
    if due(&state, &epoch_plan) && log.evaluated != Some(state.step) {
        let complete = evaluate(&mut log, &state)?;
        if let (true, Some(folder)) = (complete, &saved) {
            state.metrics_bytes = log.metrics.bytes;
            log.metrics.sync()?;
            write_state(folder, &state)?;
        }
    }
    if stop.load(Ordering::Relaxed) {
        progress.finish();
        return Ok(Outcome::Interrupted { step: state.step, total_steps });
    }
    while state.step < total_steps {
        if state.step_in_epoch == epoch_plan.steps() as u64 {
            state.epoch += 1;
            state.step_in_epoch = 0;
            epoch_plan = plan(state.epoch);
        }
        let began = Instant::now();
        let micro_batches = epoch_plan.step(state.step_in_epoch as usize).iter();
        let batches: Vec<Batch> =
            micro_batches.map(|bins| Batch::new(&data.train.examples, bins)).collect();
        let count: usize = batches.iter().map(Batch::count).sum();

        gradients.iter_mut().for_each(|gradient| gradient.fill(0.0));
        let mut loss = 0.0;
        for batch in &batches {
            let dropout = dropout(batch, state.epoch, settings.lora_dropout, settings.seed);
            let step = StepSettings {
                objective: Objective::LanguageModelling,
                scale: 1.0 / count as f64,
                kept_layers,
                worn: &worn,
                parameters: &parameters,
                dropout: dropout.as_ref(),
            };
            loss +=
                accumulate(&decoder, batch, &step, &mut gradients, &mut buffers)? / count as f64;
        }
        let grad_norm = global_norm(&gradients);
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(TrainError::Diverged { step: state.step + 1, loss });
        }
        let most = settings.max_grad_norm;
        let factor = if most > 0.0 { clip_factor(grad_norm, most) } else { 1.0 };
        let learning_rate = schedule.at(state.step);
        if !optimizer.step(&parameters, &gradients, factor, learning_rate)? {
            return Err(TrainError::Diverged { step: state.step + 1, loss });
        }

        state.step += 1;
        state.step_in_epoch += 1;
        log.step(state.step, loss, grad_norm, learning_rate, count)?;
        let real = batches.iter().map(|batch| batch.tokens.len() as u64).sum();
        progress.step(state.step, loss, real, began.elapsed());

        let last = state.step == total_steps;
        let complete = !due(&state, &epoch_plan) || evaluate(&mut log, &state)?;
        let stopped = stop.load(Ordering::Relaxed);
        if last || stopped || state.step.is_multiple_of(settings.save_steps) {
            state.metrics_bytes = log.metrics.bytes;
            log.metrics.sync()?;
            run.save(&state, &adapter, &optimizer, settings.save_total_limit)?;
        }
        if stopped && !(last && complete) {
            progress.finish();
            return Ok(Outcome::Interrupted { step: state.step, total_steps });
        }
    }
    progress.finish();

    let folder = run.file("adapter");
    format::write_folder(&adapter, &folder)?;
    let lines = log.metrics.lines()?;
    let of = |key: &str| -> Vec<f64> {
        lines.iter().filter_map(|line| line.get(key)?.as_f64()).collect()
    };
    let (losses, evals) = (of("loss"), of("eval_loss"));
    Ok(Outcome::Done(Box::new(Summary {
        steps: state.step,
        loss_first: losses.first().copied(),
        loss_last: losses.last().copied(),
        eval_loss_first: evals.first().copied(),
        eval_loss_last: evals.last().copied(),
        tokens_per_second: progress.tokens_per_second(),
        trainable_parameters: adapter.num_parameters(),
        adapter: folder,
        kernels: decoder.kernels(),
        recomputed_layers: passed - kept_layers,
        data: data.train.report,
        resumed_at,
    })))
}

/// Layers that gradients pass: those from the lowest trainable adapter up.
fn passed_layers(decoder: &Decoder, worn: &[Worn]) -> usize {
    let layers = decoder.config.num_hidden_layers;
    decoder.lowest_trainable(Adapters::Same(worn)).map_or(0, |(lowest, _)| layers - lowest)
}

/// Of `layers` layers that gradients pass, how many keep their tapes.
fn kept_layers(
    settings: &SftSettings,
    decoder: &Decoder,
    layers: usize,
    max_length: usize,
    adapter: &Adapter,
    data: &Dataset,
) -> usize {
    if let Some(all) = settings.gradient_checkpointing {
        return if all { 0 } else { layers };
    }
    let budget = parse_bytes(&settings.memory_budget).unwrap_or_else(default_budget);
    // The largest micro-batch there can be: its bins full, or the longest rows together.
    let mut lengths: Vec<usize> = data.examples.iter().map(|e| e.tokens.len()).collect();
    lengths.sort_unstable_by_key(|&length| std::cmp::Reverse(length));
    let all: usize = lengths.iter().sum();
    let batch = settings.per_device_train_batch_size;
    let longest: usize = lengths.iter().take(batch).sum();
    let tokens = match settings.packing {
        true => (batch * max_length).max(longest).min(all),
        false => longest,
    };
    let ranks =
        adapter.modules.values().map(|lora| lora.r()).sum::<usize>().div_ceil(layers.max(1));
    memory::kept_layers(decoder, layers, tokens, adapter.num_parameters(), ranks, budget)
}

struct Data {
    train: Dataset,
    held_out: Option<Dataset>,
    /// The held-out rows as the file has them, if they were split off here.
    held_out_lines: Option<Vec<u8>>,
}

/// The settings with their paths made absolute: a run goes on from any directory.
fn absolute(settings: &SftSettings) -> Result<SftSettings, TrainError> {
    let mut settings = settings.clone();
    let paths = [
        &mut settings.base,
        &mut settings.data,
        &mut settings.eval_data,
        &mut settings.adapter,
        &mut settings.out,
    ];
    for path in paths.into_iter().filter(|path| !path.as_os_str().is_empty()) {
        let made = std::path::absolute(&*path);
        *path = made.map_err(|source| TrainError::Io { path: path.clone(), source })?;
    }
    Ok(settings)
}

fn load_data(
    settings: &SftSettings,
    tokenizer: &Tokenizer,
    max_length: usize,
    stop: &AtomicBool,
) -> Result<Data, TrainError> {
    let load = |path: &Path| Dataset::load(path, tokenizer, max_length, stop);
    let given = !settings.eval_data.as_os_str().is_empty();
    if strategy(settings) == EvalStrategy::No {
        return Ok(Data { train: load(&settings.data)?, held_out: None, held_out_lines: None });
    }
    if given {
        let (train, held_out) = (load(&settings.data)?, Some(load(&settings.eval_data)?));
        return Ok(Data { train, held_out, held_out_lines: None });
    }
    let split = Dataset::load_split(&settings.data, tokenizer, max_length, stop)?;
    if split.held_out.is_none() {
        eprintln!("warning: no row of {} falls into the held-out tenth", settings.data.display());
    }
    let held_out_lines = split.held_out.is_some().then_some(split.held_out_lines);
    Ok(Data { train: split.train, held_out: split.held_out, held_out_lines })
}

fn strategy(settings: &SftSettings) -> EvalStrategy {
    let default = match settings.eval_data.as_os_str().is_empty() {
        true => EvalStrategy::No,
        false => EvalStrategy::Epoch,
    };
    settings.eval_strategy.unwrap_or(default)
}

/// Whether the held-out loss belongs to the metrics of this step.
fn eval_due(settings: &SftSettings, state: &State, epoch: &EpochPlan, total_steps: u64) -> bool {
    let ends = state.step == 0 || state.step == total_steps;
    match strategy(settings) {
        EvalStrategy::No => false,
        EvalStrategy::Steps => ends || state.step.is_multiple_of(settings.eval_steps),
        EvalStrategy::Epoch => ends || state.step_in_epoch == epoch.steps() as u64,
    }
}

fn begin_adapter(settings: &SftSettings, decoder: &Decoder) -> Result<Adapter, TrainError> {
    if !settings.adapter.as_os_str().is_empty() {
        let mut adapter = read_adapter(&settings.adapter, decoder)?;
        adapter.config.lora_dropout = settings.lora_dropout;
        return Ok(adapter);
    }
    let config = lora_config(settings)?;
    config.validate()?;
    let resolved = targets::resolve(&config, &decoder.linears(), Some("lm_head"))?;
    for unmatched in &resolved.unmatched {
        eprintln!("warning: {unmatched}");
    }
    let seed = settings.seed;
    Ok(Adapter::new("default", config, &resolved.targets, seed, &Device::Cpu)?)
}

fn read_adapter(folder: &Path, decoder: &Decoder) -> Result<Adapter, TrainError> {
    let linears = decoder.linears();
    let (adapter, unmatched) =
        format::read_folder(folder, "default", &linears, Some("lm_head"), &Device::Cpu)?;
    for unmatched in unmatched {
        eprintln!("warning: {}: {unmatched}", folder.display());
    }
    Ok(adapter)
}

fn lora_config(settings: &SftSettings) -> Result<LoraConfig, TrainError> {
    // One value that is no plain module name is an expression, as PEFT's strings are.
    let modules = |list: &[String]| match &split(list)[..] {
        [] => None,
        [one] if one == "all-linear" || one.contains(|c: char| !is_name(c)) => {
            Some(Modules::Expression(one.clone()))
        }
        names => Some(Modules::List(names.to_vec())),
    };
    let pattern = |key: &str, list: &[String]| -> Result<Vec<(String, f64)>, TrainError> {
        let pair = |item: &String| {
            let (pattern, value) = item.rsplit_once('=')?;
            Some((pattern.to_string(), value.trim().parse().ok()?))
        };
        let fault =
            |item: &String| TrainError::Settings(format!("{key} {item:?} is not REGEX=NUMBER"));
        split(list).iter().map(|item| pair(item).ok_or_else(|| fault(item))).collect()
    };
    let ranks = pattern("rank_pattern", &settings.rank_pattern)?;
    if let Some((pattern, r)) = ranks.iter().find(|(_, r)| r.fract() != 0.0 || *r < 1.0) {
        let fault = format!("rank_pattern {pattern:?} is {r}, needed a whole number above 0");
        return Err(TrainError::Settings(fault));
    }
    let init_lora_weights = match settings.init_lora_weights.as_str() {
        "true" => InitLoraWeights::KaimingUniform,
        "false" => InitLoraWeights::Random,
        "gaussian" => InitLoraWeights::Gaussian,
        other => {
            let fault = format!("init_lora_weights is {other:?}, needed true, false or gaussian");
            return Err(TrainError::Settings(fault));
        }
    };
    let layers = &settings.layers_to_transform;
    Ok(LoraConfig {
        task_type: Some("CAUSAL_LM".into()),
        base_model_name_or_path: Some(settings.base.display().to_string()),
        r: settings.r,
        lora_alpha: settings.lora_alpha,
        lora_dropout: settings.lora_dropout,
        target_modules: modules(&settings.target_modules),
        exclude_modules: modules(&settings.exclude_modules),
        rank_pattern: ranks.into_iter().map(|(pattern, r)| (pattern, r as usize)).collect(),
        alpha_pattern: pattern("alpha_pattern", &settings.alpha_pattern)?,
        layers_to_transform: (!layers.is_empty()).then(|| layers.clone()),
        layers_pattern: settings.layers_pattern.clone(),
        use_rslora: settings.use_rslora,
        init_lora_weights,
        inference_mode: true, // PEFT loads what is finished as frozen unless told otherwise
        ..LoraConfig::default()
    })
}

/// Values given with commas between them; but a comma inside an expression stays there.
fn split(list: &[String]) -> Vec<String> {
    let pieces = |item: &String| -> Vec<String> {
        match item.chars().all(|c| is_name(c) || matches!(c, ',' | '=' | ' ')) {
            true => item.split(',').map(|piece| piece.trim().to_string()).collect(),
            false => vec![item.clone()],
        }
    };
    list.iter().flat_map(pieces).filter(|piece| !piece.is_empty()).collect()
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_' || c == '.'
}

fn optimizer_settings(settings: &SftSettings) -> AdamWSettings {
    AdamWSettings {
        adam_beta1: settings.adam_beta1,
        adam_beta2: settings.adam_beta2,
        adam_epsilon: settings.adam_epsilon,
        weight_decay: settings.weight_decay,
    }
}

/// Steps of the run, every epoch having as many ([`EpochPlan::steps`]). A part of an epoch is
/// rounded up to whole steps, as transformers does.
fn total_steps(settings: &SftSettings, steps_of_epoch: u64) -> u64 {
    if settings.max_steps > 0 {
        return settings.max_steps;
    }
    let whole = settings.num_train_epochs.trunc() as u64;
    let part = settings.num_train_epochs.fract();
    whole * steps_of_epoch + (part * steps_of_epoch as f64).ceil() as u64
}

fn schedule(settings: &SftSettings, total_steps: u64) -> Schedule {
    let warmup_steps = match settings.warmup_steps {
        0 => (settings.warmup_ratio * total_steps as f64).ceil() as u64,
        steps => steps,
    };
    Schedule {
        kind: settings.lr_scheduler_type,
        learning_rate: settings.learning_rate,
        warmup_steps,
        total_steps,
    }
}

/// Hashes of what a run reads: another base or other data under a resume are refused by name.
fn fingerprints(settings: &SftSettings, data: &Data) -> Result<Vec<Fingerprint>, TrainError> {
    let mut prints = vec![
        ("the base".to_string(), base_fingerprint(&settings.base)?),
        ("the data".to_string(), data.train.sha256.clone()),
        ("what the tokenizer and chat template make of the data".into(), tokens_print(&data.train)),
    ];
    if let Some(held_out) = &data.held_out {
        prints.push(("the held-out data".into(), held_out.sha256.clone()));
    }
    Ok(prints)
}

fn tokens_print(data: &Dataset) -> String {
    let mut hasher = Sha256::new();
    for example in &data.examples {
        hasher.update((example.tokens.len() as u64).to_le_bytes());
        for (token, learned) in example.tokens.iter().zip(&example.learned) {
            hasher.update((token << 1 | u32::from(*learned)).to_le_bytes());
        }
    }
    hex(hasher)
}

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Names, lengths and both ends of the base's files: whole files of many gigabytes would take
/// longer to hash than to train a step on.
fn base_fingerprint(base: &Path) -> Result<String, TrainError> {
    use std::io::{Read, Seek, SeekFrom};
    const END: u64 = 1 << 20;
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |source| TrainError::Io { path, source }
    };
    let mut files = vec![base.to_path_buf()];
    if base.is_dir() {
        let entries = std::fs::read_dir(base).map_err(io(base))?;
        let entries = entries.map(|entry| entry.map(|e| e.path()));
        files = entries.collect::<Result<_, _>>().map_err(io(base))?;
        files.retain(|path| path.extension().is_some_and(|e| e == "safetensors" || e == "json"));
        files.sort();
    }
    let mut hasher = Sha256::new();
    for path in files {
        let mut hash_ends = || -> std::io::Result<()> {
            let mut file = std::fs::File::open(&path)?;
            let length = file.metadata()?.len();
            hasher.update(path.file_name().unwrap_or_default().as_encoded_bytes());
            hasher.update(length.to_le_bytes());
            let mut bytes = Vec::new();
            file.by_ref().take(END).read_to_end(&mut bytes)?;
            file.seek(SeekFrom::Start(length.saturating_sub(END)))?;
            file.take(END).read_to_end(&mut bytes)?;
            hasher.update(&bytes);
            Ok(())
        };
        hash_ends().map_err(io(&path))?;
    }
    Ok(hex(hasher))
}

fn same_fingerprints(
    run: &Path,
    saved: &[Fingerprint],
    now: &[Fingerprint],
) -> Result<(), TrainError> {
    let changed = saved.iter().filter(|print| !now.contains(print));
    let changed: Vec<&str> = changed.map(|(name, _)| name.as_str()).collect();
    if changed.is_empty() {
        return Ok(());
    }
    let what = format!("{} changed since the run began", changed.join(" and "));
    Err(TrainError::Changed { path: run.into(), what })
}

/// Where numbers go: `metrics.jsonl`, and TensorBoard's curves of the same.
struct Log {
    metrics: Metrics,
    events: EventWriter,
    /// The step of the last evaluation.
    evaluated: Option<u64>,
    run: PathBuf,
}

impl Log {
    fn open(run: &RunDir, bytes: u64) -> Result<Self, TrainError> {
        let metrics = run.metrics(bytes)?;
        let events = run.events(wall_time())?;
        let mut log = Self { metrics, events, evaluated: None, run: run.file("tensorboard") };
        for line in log.metrics.lines()? {
            log.curves(&line)?;
        }
        Ok(log)
    }

    fn step(
        &mut self,
        step: u64,
        loss: f64,
        grad_norm: f64,
        learning_rate: f64,
        tokens: usize,
    ) -> Result<(), TrainError> {
        self.push(json!({
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens": tokens,
        }))
    }

    fn evaluation(&mut self, step: u64, loss: f64, tokens: u64) -> Result<(), TrainError> {
        self.push(json!({ "step": step, "eval_loss": loss, "eval_tokens": tokens }))
    }

    fn push(&mut self, line: serde_json::Value) -> Result<(), TrainError> {
        self.metrics.push(&line)?;
        self.curves(&line)
    }

    fn curves(&mut self, line: &serde_json::Value) -> Result<(), TrainError> {
        let Some(line) = line.as_object() else { return Ok(()) };
        let step = line.get("step").and_then(serde_json::Value::as_u64).unwrap_or_default();
        if line.contains_key("eval_loss") {
            self.evaluated = Some(step);
        }
        let mut write = || -> std::io::Result<()> {
            for (key, value) in line.iter().filter(|(key, _)| *key != "step") {
                let tag = match key.strip_prefix("eval_") {
                    Some(key) => format!("eval/{key}"),
                    None => format!("train/{key}"),
                };
                self.events.scalar(&tag, step, value.as_f64().unwrap_or(f64::NAN), wall_time())?;
            }
            self.events.flush()
        };
        write().map_err(|source| TrainError::Io { path: self.run.clone(), source })
    }
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_and_warmup_are_counted_as_transformers_counts_them() {
        let settings = |epochs, max_steps, warmup_steps| SftSettings {
            num_train_epochs: epochs,
            max_steps,
            warmup_steps,
            warmup_ratio: 0.05,
            ..Default::default()
        };
        assert_eq!(total_steps(&settings(1.0, 0, 0), 11), 11);
        assert_eq!(total_steps(&settings(2.0, 0, 0), 11), 22);
        assert_eq!(total_steps(&settings(1.5, 0, 0), 11), 17);
        assert_eq!(total_steps(&settings(1.5, 7, 0), 11), 7);
        assert_eq!(schedule(&settings(1.0, 0, 0), 21).warmup_steps, 2);
        assert_eq!(schedule(&settings(1.0, 0, 5), 21).warmup_steps, 5);
    }

    #[test]
    fn one_value_is_a_name_or_an_expression() {
        let config = |targets: &[&str]| {
            let target_modules = targets.iter().map(|t| t.to_string()).collect();
            lora_config(&SftSettings { target_modules, ..Default::default() }).unwrap()
        };
        let list =
            |names: &[&str]| Some(Modules::List(names.iter().map(|n| n.to_string()).collect()));
        assert_eq!(config(&["q_proj"]).target_modules, list(&["q_proj"]));
        assert_eq!(config(&["q_proj", "v_proj"]).target_modules, list(&["q_proj", "v_proj"]));
        assert_eq!(config(&["q_proj,v_proj"]).target_modules, list(&["q_proj", "v_proj"]));
        let expression = r".*\.\d{1,2}\..*\.(q|v)_proj";
        assert_eq!(
            config(&[expression]).target_modules,
            Some(Modules::Expression(expression.into()))
        );
    }
}
