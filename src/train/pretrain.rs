//! Pretraining: all weights of a decoder, in full precision, on a mixture of sources. What is there
//! before the first step and written behind the last; the loop is [`super::run`]'s.
//!
//! Which rows a step learns follows from its number alone, and a checkpoint is the model as a
//! Hugging Face folder beside the optimizer's moments: there is no other state.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::{Tensor, Var};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::TrainError;
use super::fingerprints::{fingerprints_of, same_fingerprints};
use super::log::Numbers;
use super::memory::default_budget;
use super::progress::Work;
use super::run::{Course, LoopSettings, Outcome, take_steps};
use super::run_dir::{Fingerprint, RunDir, read_optimizer, read_state};
use super::settings::{EvalStrategy, FloatType, PretrainSettings, SettingsPart};
use super::state::State;
use crate::data::corpus::{Corpus, CorpusError, SourceReport, SourceSpec};
use crate::data::{Batch, DataError};
use crate::eval::{Bigram, TextLoss, text_loss};
use crate::export::{
    ExportError, ExportSource, FileType, Recipe, VerifyBounds, expressible, verify, write_folder,
    write_gguf,
};
use crate::generate::{Request, Sampling, Settings as Decoding, generate};
use crate::model::full::{FullBuffers, FullModel, working_bytes};
use crate::model::{Adapters, CacheType};
use crate::monitor::Monitor;
use crate::ops::{BackendKind, DeviceName, Values, linear_cross_entropy};
use crate::optim::{AdamW, Gradients, TensorAdamW, clip_factor, global_norm, tensor_norm};
use crate::quant::BlockType;
use crate::text::{Special, TextError, Tokenizer, convert, first_second, today};
use crate::weights::{Checkpoint, write_atomically};

/// What a finished run says of itself; with `results`, the `--json` line of its command.
#[derive(Debug, Clone, Serialize)]
pub struct PretrainSummary {
    /// Optimizer steps.
    pub steps: u64,
    /// Loss of the first step, in nats a token.
    pub loss_first: Option<f64>,
    /// The same, last step.
    pub loss_last: Option<f64>,
    /// Tokens a second in this process's steps.
    pub tokens_per_second: f64,
    /// Numbers of the model.
    pub parameters: usize,
    /// The model's folder.
    pub model: PathBuf,
    /// The GGUF, if one was asked for.
    pub export: Option<PathBuf>,
    /// Layers that are computed anew on the way down.
    pub recomputed_layers: usize,
    /// The step this process took up, if it resumed.
    pub resumed_at: Option<u64>,
    /// What was read of each source.
    pub sources: Vec<SourceReport>,
    /// Evaluations.
    #[serde(skip)]
    pub results: Map<String, Value>,
}

/// Where a run, and each of its checkpoints, has the model.
const MODEL: &str = "model";
/// Tokens that an evaluation reads at once, or a row.
const EVAL_TOKENS: usize = 2048;
/// How often people hear of a tokenization that lasts.
const TELL_EVERY: Duration = Duration::from_secs(5);
/// Tokens that the bigram model beside the evaluations counts at most.
const BIGRAM_TOKENS: u64 = 1 << 22;

/// A run of pretraining, ready for its steps.
pub struct Pretraining {
    settings: PretrainSettings,
    tokenizer: Tokenizer,
    tokenizer_folder: PathBuf,
    corpus: Corpus,
    model: FullModel,
    /// Layers, from the top, whose tapes are kept for the way down.
    kept_layers: usize,
    pub(super) learning: Learning,
}

/// Gradients and optimizer, where the form that runs has them.
pub(super) enum Learning {
    /// In plain buffers.
    Fast { gradients: Gradients, buffers: Box<FullBuffers>, optimizer: AdamW },
    /// On the model's device.
    Portable { gradients: Vec<Tensor>, optimizer: TensorAdamW },
}

impl Learning {
    fn new(model: &FullModel, optimizer: AdamW) -> candle_core::Result<Self> {
        Ok(match model.compute.backend {
            BackendKind::Reference => Self::Portable {
                gradients: Vec::new(),
                optimizer: TensorAdamW::of(optimizer, &model.parameters)?,
            },
            BackendKind::Cpu => {
                let (gradients, buffers) = (model.zero_gradients(), Box::default());
                Self::Fast { gradients, buffers, optimizer }
            }
        })
    }

    /// Optimizer steps taken.
    pub fn optimizer_steps(&self) -> u64 {
        match self {
            Self::Fast { optimizer, .. } => optimizer.step,
            Self::Portable { optimizer, .. } => optimizer.step,
        }
    }

    /// The gradients of a step's loss, from 0. The loss and their norm.
    fn learn(
        &mut self,
        model: &FullModel,
        batches: &[Batch],
        scale: f64,
        kept_layers: usize,
    ) -> candle_core::Result<(f64, f64)> {
        let mut loss = 0.0;
        match self {
            Self::Fast { gradients, buffers, .. } => {
                gradients.par_iter_mut().for_each(|gradient| gradient.fill(0.0));
                for batch in batches {
                    let sum = model.accumulate(batch, scale, kept_layers, gradients, buffers)?;
                    loss += sum * scale;
                }
                Ok((loss, global_norm(gradients)))
            }
            Self::Portable { gradients, .. } => {
                let zeros = model.parameters.iter().map(|var| var.as_tensor().zeros_like());
                *gradients = zeros.collect::<candle_core::Result<_>>()?;
                for batch in batches {
                    loss += model.accumulate_tensors(batch, scale, gradients)? * scale;
                }
                Ok((loss, tensor_norm(gradients)?))
            }
        }
    }

    /// The optimizer's step by what was learned, times `factor`. Whether all is finite behind it.
    fn step(
        &mut self,
        model: &FullModel,
        factor: f32,
        learning_rate: f64,
    ) -> candle_core::Result<bool> {
        let parameters = &model.parameters;
        match self {
            Self::Fast { gradients, optimizer, .. } => {
                optimizer.step(parameters, gradients, factor, learning_rate)
            }
            Self::Portable { gradients, optimizer } => {
                optimizer.step(parameters, gradients, factor, learning_rate)
            }
        }
    }
}

/// Trains a model's every weight. With `resume`, goes on with the run in `settings.out`. `monitor` is
/// looked at while sources are tokenized, between the batches of an evaluation, and after each step.
pub fn pretrain(
    settings: &PretrainSettings,
    resume: bool,
    monitor: Monitor<'_>,
) -> Result<Outcome<PretrainSummary>, TrainError> {
    if let Some(fault) = settings.fault() {
        return Err(TrainError::Settings(fault));
    }
    let device = settings.device.open().map_err(|e| TrainError::Settings(e.to_string()))?;
    let mut settings = settings.absolute()?;
    // Before the model takes its part of what is free.
    let budget = settings.memory_budget.map_or_else(default_budget, |budget| budget.0);
    let export_type = settings.export_type.parse::<FileType>().map_err(TrainError::Settings)?;
    // Told before anything is read: what is in the way of the run.
    let begun = resume.then(|| RunDir::pretrain_settings(&settings.out)).transpose()?;
    if settings.template_date.is_empty() {
        // Nothing is left to the day of a resume.
        settings.template_date =
            begun.as_ref().map_or_else(today, |begun| begun.template_date.clone());
    }
    let table = settings.to_table()?;
    let resumed = match &begun {
        Some(begun) => Some(RunDir::resume(&settings.out, &begun.to_table()?, &table, monitor)?),
        None => {
            RunDir::vacant(&settings.out)?;
            None
        }
    };

    // What is trained, on what.
    let (mut tokenizer, base) = match settings.base.as_os_str().is_empty() {
        true => (Tokenizer::from_folder(&settings.tokenizer)?, None),
        false => {
            let checkpoint = Checkpoint::open(&settings.base)?;
            let tokenizer = match settings.tokenizer.as_os_str().is_empty() {
                true => Tokenizer::open(&checkpoint)?,
                false => Tokenizer::from_folder(&settings.tokenizer)?,
            };
            (tokenizer, Some(checkpoint))
        }
    };
    // A run that was begun before there was such a setting has none.
    if let Some(now) = first_second(&settings.template_date) {
        tokenizer.set_template_time(now);
    }
    let saved = match &resumed {
        Some(run) => run.last_checkpoint()?,
        None => None,
    };
    let compute = settings.compute();
    let model = match (&saved, &base) {
        (Some(folder), _) => FullModel::load(&Checkpoint::open(folder.join(MODEL))?, compute)?,
        (None, Some(checkpoint)) => FullModel::load(checkpoint, compute)?,
        (None, None) => {
            let config = settings.config(tokenizer.vocab_size())?;
            FullModel::random(config, settings.initializer_range, settings.seed, compute)?
        }
    };
    let model = match settings.device {
        DeviceName::Cpu => model,
        DeviceName::Cuda(_) | DeviceName::Metal => model.on(&device)?,
    };
    let tokenizer_files = match &base {
        Some(Checkpoint::Gguf(gguf)) if settings.tokenizer.as_os_str().is_empty() => {
            Some(convert::to_folder(gguf, &[])?)
        }
        _ => None,
    };
    check_writable(&settings, &model, tokenizer_files.is_some())?;
    if let Some(fault) = misfit(&settings, &model, &tokenizer) {
        return Err(TrainError::Settings(fault));
    }
    let corpus = match open_corpus(&settings, &settings.source, &tokenizer, monitor) {
        Err(CorpusError::Data(DataError::Stopped)) => return Ok(Outcome::NotBegun),
        corpus => corpus?,
    };
    let mut fingerprints: Vec<Fingerprint> =
        vec![("the tokenized sources".into(), corpus.fingerprint().into())];
    fingerprints.extend(fingerprints_of(settings.fingerprinted()?)?);
    let run = match resumed {
        Some(run) => {
            same_fingerprints(&settings.out, &run.fingerprints()?, &fingerprints)?;
            run
        }
        None => RunDir::create(&settings.out, &table, &fingerprints, monitor)?,
    };
    let tokenizer_folder = tokenizer_folder(&settings, tokenizer_files, &run)?;
    let state = saved.as_deref().map(read_state).transpose()?;
    let mut state = state.unwrap_or_default();
    let lengths: Vec<usize> = model.parameters.iter().map(|var| var.elem_count()).collect();
    let optimizer = AdamW::new(settings.optimizer.adamw(), &lengths);
    let mut optimizer = optimizer.with_decays(model.decays(true));
    if let Some(folder) = &saved {
        let parameters = named(&model);
        read_optimizer(folder, &parameters, &mut optimizer, state.optimizer_steps)?;
    }

    // Where it stands.
    let resumed_at = resume.then_some(state.step);
    let total_steps = settings.total_steps();
    for line in corpus.report(total_steps * settings.rows_of_step()) {
        monitor.note(format_args!("source {line}"));
    }
    let bigram = match settings.evaluates() {
        true => bigram_bits_per_byte(&corpus, &settings, model.config.vocab_size),
        false => None,
    };
    if let Some(bits) = bigram {
        let text =
            format_args!("a bigram model of these tokens needs {bits:.3} bits a held-out byte");
        monitor.note(text);
    }
    let parameters = model.parameter_count();
    let step = state.step;
    monitor.note(format_args!(
        "training {parameters} parameters, {total_steps} steps from step {step}"
    ));
    let steps = LoopSettings {
        schedule: settings.schedule(total_steps),
        best: None,
        eval_strategy: match settings.evaluates() {
            true => EvalStrategy::Steps,
            false => EvalStrategy::No,
        },
        eval_steps: settings.eval_steps.max(1),
        save_steps: settings.save_steps,
        save_total_limit: settings.save_total_limit,
    };
    let kept_layers = kept_layers(&settings, &model, budget);
    let learning = Learning::new(&model, optimizer)?;
    let mut course = Course::Pretraining(Box::new(Pretraining {
        settings,
        tokenizer,
        tokenizer_folder,
        corpus,
        model,
        kept_layers,
        learning,
    }));
    let ended = take_steps(&mut course, &run, (&mut state, saved), &steps, monitor)?;
    let (Some((log, progress)), Course::Pretraining(course)) = (ended, course) else {
        return Ok(Outcome::Interrupted { step: state.step, total_steps });
    };

    let folder = run.file(MODEL);
    let settings = &course.settings;
    course.write_folder(&folder, settings.dtype)?;
    let export = match settings.export.as_os_str().is_empty() {
        true => None,
        false => {
            course.write_gguf(export_type, &settings.export)?;
            read_back(&folder, settings, export_type, monitor)?;
            Some(settings.export.clone())
        }
    };
    let mut results = Map::new();
    for key in ["eval_loss", "eval_bits_per_byte"] {
        let values = log.values(key)?;
        for (end, value) in [("first", values.first()), ("last", values.last())] {
            if let Some(value) = value {
                results.insert(format!("{key}_{end}"), json!(value));
            }
        }
    }
    if let Some(bits) = bigram {
        results.insert("bigram_bits_per_byte".into(), json!(bits));
    }
    let losses = log.values("loss")?;
    Ok(Outcome::Done(Box::new(PretrainSummary {
        steps: state.step,
        loss_first: losses.first().copied(),
        loss_last: losses.last().copied(),
        tokens_per_second: progress.tokens_per_second(),
        parameters,
        model: folder,
        export,
        recomputed_layers: course.model.config.num_hidden_layers - course.kept_layers,
        resumed_at,
        sources: course.corpus.report(state.step * settings.rows_of_step()),
        results,
    })))
}

impl Pretraining {
    /// Takes a step.
    pub fn step(
        &mut self,
        state: &mut State,
        learning_rate: f64,
        monitor: Monitor<'_>,
    ) -> Result<(Numbers, Work), TrainError> {
        let settings = &self.settings;
        let first = state.step * settings.rows_of_step();
        let size = settings.per_device_train_batch_size as u64;
        let batches: Vec<Batch> = (0..settings.gradient_accumulation_steps as u64)
            .map(|part| self.corpus.batch(first + part * size..first + (part + 1) * size))
            .collect();
        let count: usize = batches.iter().map(Batch::count).sum();
        let scale = 1.0 / count.max(1) as f64;
        let (model, learning) = (&self.model, &mut self.learning);
        let (loss, grad_norm) = learning.learn(model, &batches, scale, self.kept_layers)?;
        let diverged = TrainError::Diverged { step: state.step + 1, loss };
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(diverged);
        }
        let most = settings.optimizer.max_grad_norm;
        let factor = if most > 0.0 { clip_factor(grad_norm, most) } else { 1.0 };
        if !learning.step(model, factor, learning_rate)? {
            return Err(diverged);
        }

        let mut numbers: Numbers = vec![
            ("loss".into(), json!(loss)),
            ("grad_norm".into(), json!(grad_norm)),
            ("learning_rate".into(), json!(learning_rate)),
            ("tokens".into(), json!(count)),
        ];
        let mut aside = Duration::ZERO;
        let step = state.step + 1;
        let ends = step == 1 || step == settings.total_steps();
        if settings.sample_steps > 0 && (ends || step.is_multiple_of(settings.sample_steps)) {
            let began = Instant::now();
            let samples = self.samples(step)?;
            aside = began.elapsed();
            for sample in &samples {
                monitor.note(format_args!("  step {step}, loss {loss:.3}: {sample:?}"));
            }
            numbers.push(("samples".into(), json!(samples)));
        }
        let work = Work {
            headline: format!("loss {loss:.4}"),
            tokens: batches.iter().map(|batch| batch.tokens.len() as u64).sum(),
            samples: settings.rows_of_step(),
            aside,
        };
        Ok((numbers, work))
    }

    /// What the model says now, with what it was given.
    fn samples(&self, step: u64) -> Result<Vec<String>, TrainError> {
        let settings = &self.settings;
        let prompts = match settings.sample_prompt.is_empty() {
            true => vec![vec![self.corpus.begin_of_text()]],
            false => sample_prompts(settings, &self.tokenizer)?,
        };
        let requests: Vec<Request> =
            prompts.iter().zip(0..).map(|(prompt, key)| Request::new(prompt, key)).collect();
        let decoder = self.model.decoder(settings.compute())?;
        let decoding = Decoding {
            sampling: Sampling {
                temperature: settings.sample_temperature,
                seed: settings.seed.wrapping_add(step), // not the same luck at each step
                ..Sampling::default()
            },
            max_tokens: settings.sample_tokens,
            cache: CacheType::of(decoder.compute),
            logprobs: None,
            draws: false,
            slots: 0,
        };
        // A model may have more rows than its tokenizer has tokens, and draw one while it is young.
        let known = |token: u32| self.tokenizer.token(token).is_some();
        let is_end = |token| self.tokenizer.is_end_of_generation(token) || !known(token);
        let never = &mut |_: usize, _: u32| ControlFlow::Continue(());
        let none = Adapters::Same(&[]);
        let generated = generate(&decoder, none, &requests, &decoding, &is_end, never)?;
        let texts = prompts.iter().zip(generated.rows).map(|(prompt, row)| {
            let tokens = prompt.iter().chain(&row.token_ids).copied();
            let tokens: Vec<u32> = tokens.filter(|&token| known(token)).collect();
            self.tokenizer.decode(&tokens, true)
        });
        Ok(texts.collect::<Result<_, _>>()?)
    }

    /// Bits per byte of the held-out rows, of all and of each source; nothing if a stop cut it short.
    pub fn evaluate(&mut self, monitor: Monitor<'_>) -> Result<Option<Numbers>, TrainError> {
        let decoder = self.model.decoder(self.settings.compute())?;
        let mut all = TextLoss::default();
        let mut of_sources = Vec::new();
        for (index, source) in self.corpus.sources().enumerate() {
            let batches = held_out(&self.corpus, index, &self.settings);
            let Some(loss) = text_loss(&decoder, batches, monitor.stop)? else { return Ok(None) };
            if loss.tokens > 0 {
                let key = format!("eval_{}_bits_per_byte", source.name);
                of_sources.push((key, json!(loss.bits_per_byte())));
            }
            all.add(&loss);
        }
        let mut numbers: Numbers = vec![
            ("eval_loss".into(), json!(all.loss())),
            ("eval_perplexity".into(), json!(all.loss().exp())),
            ("eval_bits_per_byte".into(), json!(all.bits_per_byte())),
        ];
        if of_sources.len() > 1 {
            numbers.extend(of_sources);
        }
        Ok(Some(numbers))
    }

    /// Writes a checkpoint: the model's folder, exactly, beside the optimizer's moments.
    pub fn save(&self, run: &RunDir, state: &State, keep: usize) -> Result<(), TrainError> {
        let parameters = named(&self.model);
        let copied; // from where the portable form has it
        let optimizer = match &self.learning {
            Learning::Fast { optimizer, .. } => optimizer,
            Learning::Portable { optimizer, .. } => {
                copied = optimizer.on_cpu()?;
                &copied
            }
        };
        run.save(state, &parameters, optimizer, keep, |folder| {
            self.write_folder(&folder.join(MODEL), FloatType::F32)
        })
    }
}

impl Pretraining {
    /// What `with` makes of the model as it is now, on its way into files.
    fn written<T>(
        &self,
        with: impl FnOnce(&ExportSource) -> Result<T, ExportError>,
    ) -> Result<T, TrainError> {
        let model = &self.model;
        let parameters = model.on_cpu()?;
        let values = parameters.iter().map(Values::of);
        let values: Vec<Values> = values.collect::<candle_core::Result<_>>()?;
        let named = model.names.iter().zip(&model.parameters).zip(&values);
        let named = named.map(|((name, var), values)| (name.as_str(), var.dims(), &values[..]));
        let source =
            ExportSource::from_memory(model.config.clone(), named, &self.tokenizer_folder)?;
        Ok(with(&source)?)
    }

    fn write_folder(&self, folder: &Path, of: FloatType) -> Result<(), TrainError> {
        let block_type = match of {
            FloatType::F32 => BlockType::F32,
            FloatType::F16 => BlockType::F16,
            FloatType::Bf16 => BlockType::BF16,
        };
        self.written(|source| write_folder(source, block_type, folder))?;
        Ok(())
    }

    fn write_gguf(&self, of: FileType, path: &Path) -> Result<(), TrainError> {
        self.written(|source| write_gguf(source, &Recipe::new(of), None, path))?;
        Ok(())
    }
}

/// Opens an export again and compares it with the model's folder.
fn read_back(
    folder: &Path,
    settings: &PretrainSettings,
    of: FileType,
    monitor: Monitor<'_>,
) -> Result<(), TrainError> {
    // Both were rounded, each for itself: the coarser one counts.
    let bounds = match (of, settings.dtype) {
        (FileType::F32 | FileType::F16, FloatType::Bf16) => VerifyBounds::BF16,
        (FileType::F32, FloatType::F16) => VerifyBounds::F16,
        (of, _) => VerifyBounds::of(of),
    };
    let verified = verify(&Checkpoint::open(folder)?, &[], &settings.export, bounds)?;
    if let Some(warning) = verified.warning(&settings.export) {
        monitor.warn(warning);
    }
    Ok(())
}

/// The folder of the tokenizer; a GGUF's own is written down beside the run.
fn tokenizer_folder(
    settings: &PretrainSettings,
    files: Option<Vec<(&'static str, String)>>,
    run: &RunDir,
) -> Result<PathBuf, TrainError> {
    let Some(files) = files else { return Ok(own_tokenizer(settings).into()) };
    let folder = run.file("tokenizer");
    let io = |source| TrainError::Io { path: folder.clone(), source };
    std::fs::create_dir_all(&folder).map_err(io)?;
    for (name, text) in files {
        write_atomically(folder.join(name), |file| file.write_all(text.as_bytes()))?;
    }
    Ok(folder)
}

/// The folder that a tokenizer is read from, where it is no GGUF.
fn own_tokenizer(settings: &PretrainSettings) -> &Path {
    match settings.tokenizer.as_os_str().is_empty() {
        true => &settings.base,
        false => &settings.tokenizer,
    }
}

/// Whether what comes out can be said in the forms that are asked for, and put there: better told
/// before the training than after it.
fn check_writable(
    settings: &PretrainSettings,
    model: &FullModel,
    converted: bool,
) -> Result<(), TrainError> {
    expressible(&model.config)?;
    let path = &settings.export;
    if path.as_os_str().is_empty() {
        return Ok(());
    }
    let same = |other: &Path| {
        path.canonicalize().is_ok_and(|p| other.canonicalize().is_ok_and(|o| p == o))
    };
    if same(&settings.base) {
        let fault = format!("--export is {}, the base itself", path.display());
        return Err(TrainError::Settings(fault));
    }
    let own = path.starts_with(&settings.out); // which is made with the run
    if !own && !path.parent().is_some_and(Path::is_dir) {
        let fault = format!("--export is {}, and there is no such folder", path.display());
        return Err(TrainError::Settings(fault));
    }
    if !converted {
        convert::to_gguf(own_tokenizer(settings), model.config.vocab_size, &[])?;
    }
    Ok(())
}

/// The parameters with their names.
fn named(model: &FullModel) -> Vec<(String, Var)> {
    model.names.iter().cloned().zip(model.parameters.iter().cloned()).collect()
}

/// What does not go together, in one sentence.
fn misfit(settings: &PretrainSettings, model: &FullModel, tokenizer: &Tokenizer) -> Option<String> {
    let (found, needed) = (tokenizer.vocab_size(), model.config.vocab_size);
    if found > needed {
        return Some(format!("the tokenizer has {found} tokens, the model {needed}"));
    }
    let (found, most) = (settings.max_length, model.config.max_position_embeddings);
    if found > most {
        return Some(format!("max_length is {found}, the model has {most} positions"));
    }
    let prompts = match sample_prompts(settings, tokenizer) {
        Ok(prompts) => prompts,
        Err(fault) => return Some(fault.to_string()),
    };
    let wrong = prompts.iter().position(|prompt| prompt.is_empty() || prompt.len() >= most)?;
    let (text, found) = (&settings.sample_prompt[wrong], prompts[wrong].len());
    Some(format!("sample_prompt {text:?} has {found} tokens, needed 1 to less than {most}"))
}

fn sample_prompts(
    settings: &PretrainSettings,
    tokenizer: &Tokenizer,
) -> Result<Vec<Vec<u32>>, TextError> {
    let encode = |text: &String| Ok(tokenizer.with_bos(tokenizer.encode(text, Special::AsText)?));
    settings.sample_prompt.iter().map(encode).collect()
}

/// How many layers keep their tapes within the memory budget; all do in the portable form.
fn kept_layers(settings: &PretrainSettings, model: &FullModel, budget: u64) -> usize {
    let layers = model.config.num_hidden_layers;
    if model.compute.backend == BackendKind::Reference {
        return layers;
    }
    if let Some(all) = settings.gradient_checkpointing {
        return if all { 0 } else { layers };
    }
    let tokens = settings.per_device_train_batch_size * settings.max_length;
    // Weights, gradients and both moments; and the copy that an evaluation or a sample reads.
    let state = 5 * size_of::<f32>() * model.parameter_count();
    let (vocabulary, compute) = (model.config.vocab_size, settings.compute());
    let state = state + linear_cross_entropy::working_bytes(tokens, vocabulary, compute);
    let fits = |kept: &usize| {
        let needed = state + working_bytes(&model.config, tokens, *kept);
        needed as u64 <= budget
    };
    (0..=layers).rev().find(fits).unwrap_or(0)
}

fn open_corpus(
    settings: &PretrainSettings,
    specs: &[SourceSpec],
    tokenizer: &Tokenizer,
    monitor: Monitor<'_>,
) -> Result<Corpus, CorpusError> {
    let mut told = Instant::now();
    Corpus::open(specs, tokenizer, &settings.corpus(), monitor, |progress| {
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            let (done, all) = (progress.bytes as f64 / 1e6, progress.of as f64 / 1e6);
            let source = progress.source;
            monitor.note(format_args!("tokenizing {source}: {done:.0} of {all:.0} MB"));
        }
    })
}

/// The held-out rows of a source that evaluations read, a few at a time.
fn held_out(
    corpus: &Corpus,
    source: usize,
    settings: &PretrainSettings,
) -> impl Iterator<Item = (Batch, u64)> {
    let all = corpus.validation_rows(source);
    let rows = match settings.eval_rows as u64 {
        0 => all,
        rows => rows.min(all),
    };
    let at_once = (EVAL_TOKENS / settings.max_length).max(1);
    (0..rows).step_by(at_once).map(move |first| {
        let found = corpus.validation(source, first..rows.min(first + at_once as u64));
        (found.batch, found.bytes)
    })
}

/// What a bigram model of the first rows of the run makes of the held-out rows.
fn bigram_bits_per_byte(
    corpus: &Corpus,
    settings: &PretrainSettings,
    vocab_size: usize,
) -> Option<f64> {
    let mut bigram = Bigram::new(vocab_size);
    let length = settings.max_length as u64;
    let rows = BIGRAM_TOKENS / length;
    let rows = rows.min(settings.total_steps() * settings.rows_of_step());
    for row in 0..rows {
        bigram.learn(&corpus.batch(row..row + 1).tokens);
    }
    let mut sum = TextLoss::default();
    for source in 0..corpus.sources().len() {
        for (batch, bytes) in held_out(corpus, source, settings) {
            for &(row, token) in &batch.targets {
                sum.nats += bigram.nats(&[batch.tokens[row as usize], token]);
            }
            sum.tokens += batch.targets.len() as u64;
            sum.bytes += bytes;
        }
    }
    (sum.bytes > 0).then(|| sum.bits_per_byte())
}
