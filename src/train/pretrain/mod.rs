//! Pretraining of all weights of a decoder, in full precision, on a mixture of sources: setup before the
//! first step and output after the last one. [`super::run`] is the training loop.
//!
//! The rows of a step follow from its number alone, and a checkpoint is the model as a Hugging Face folder
//! with the optimizer's moments: there is no other state.

mod evaluation;
mod full_training;
mod inputs;
mod output;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::TrainError;
use super::fingerprints::{fingerprints_of, same_fingerprints};
use super::learner::{Learner, Trainable};
use super::log::Log;
use super::memory::default_budget;
use super::metrics::Numbers;
use super::progress::Work;
use super::run::{LoopSettings, Outcome, Trainer, run_training};
use super::run_dir::{Fingerprint, RunDir, read_optimizer, read_state};
use super::settings::{EvalStrategy, FloatType, PretrainSettings, SettingsPart};
use super::state::State;
use crate::data::corpus::{Corpus, CorpusError, SourceReport};
use crate::data::{Batch, DataError};
use crate::export::FileType;
use crate::generate::{Request, Sampling, Settings as Decoding, generate};
use crate::model::{Adapters, CacheType};
use crate::monitor::Monitor;
use crate::optim::AdamW;
use crate::text::{Tokenizer, today};
use evaluation::{bigram_bits_per_byte, evaluate_held_out};
use full_training::{FullTraining, ScaledBatch, named_parameters};
use inputs::{Start, incompatibility, kept_layers, open_corpus, sample_prompts};
use output::{MODEL, ModelWriter, check_writable, tokenizer_folder};

/// The report of a finished run; with `results`, the `--json` line of its command.
#[derive(Debug, Clone, Serialize)]
pub struct PretrainSummary {
    /// Optimizer steps.
    pub steps: u64,
    /// Loss of the first step, in nats per token.
    pub loss_first: Option<f64>,
    /// Loss of the last step.
    pub loss_last: Option<f64>,
    /// Tokens per second in the steps of this process.
    pub tokens_per_second: f64,
    /// Number of parameters.
    pub parameters: usize,
    /// The model's folder.
    pub model: PathBuf,
    /// The exported GGUF, if requested.
    pub export: Option<PathBuf>,
    /// Layers that are recomputed in the backward pass.
    pub recomputed_layers: usize,
    /// The step at which this process resumed, if it did.
    pub resumed_at: Option<u64>,
    /// Statistics of each source.
    pub sources: Vec<SourceReport>,
    /// Evaluations.
    #[serde(skip)]
    pub results: Map<String, Value>,
}

/// Trains all weights of a model. With `resume`, continues the run in `settings.out`. The stop flag is checked
/// while sources are tokenized, between the batches of an evaluation, and after each step.
///
/// # Errors
/// Invalid settings or files, a run directory in use, a diverged loss.
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
    // Before memory is allocated for the model.
    let budget = settings.memory_budget.map_or_else(default_budget, |budget| budget.0);
    let export_type = settings.export_type.parse::<FileType>().map_err(TrainError::Settings)?;
    let resumed = open_run(&mut settings, resume, monitor)?;

    let start = Start::open(&settings)?;
    let checkpoint = match &resumed {
        Some(run) => run.last_checkpoint()?,
        None => None,
    };
    let model = start.model(&settings, checkpoint.as_deref(), &device)?;
    let converted_tokenizer = start.converted_tokenizer(&settings)?;
    check_writable(&settings, &model, converted_tokenizer.is_some())?;
    if let Some(fault) = incompatibility(&settings, &model, &start.tokenizer) {
        return Err(TrainError::Settings(fault));
    }
    let corpus = match open_corpus(&settings, &settings.source, &start.tokenizer, monitor) {
        Err(CorpusError::Data(DataError::Stopped)) => return Ok(Outcome::NotStarted),
        corpus => corpus?,
    };
    let fingerprints = fingerprints(&settings, &corpus)?;
    let run = match resumed {
        Some(run) => {
            same_fingerprints(&settings.out, &run.fingerprints()?, &fingerprints)?;
            run
        }
        None => RunDir::create(&settings.out, &settings.to_table()?, &fingerprints, monitor)?,
    };
    let tokenizer_folder = tokenizer_folder(&settings, converted_tokenizer, &run)?;
    let lengths: Vec<usize> = model.parameters.iter().map(|var| var.elem_count()).collect();
    let optimizer = AdamW::new(settings.optimizer.adamw(), &lengths);
    let mut optimizer = optimizer.with_decays(model.decays(true));
    let mut state = State::default();
    if let Some(folder) = &checkpoint {
        state = read_state(folder)?;
        let parameters = named_parameters(&model);
        read_optimizer(folder, &parameters, &mut optimizer, state.optimizer_steps)?;
    }

    let resumed_at = resume.then_some(state.step);
    let total_steps = settings.total_steps();
    for line in corpus.report(total_steps * settings.rows_of_step()) {
        monitor.note(format_args!("source {line}"));
    }
    let mut bigram = None;
    if settings.evaluates() {
        bigram = bigram_bits_per_byte(&corpus, &settings, model.config.vocab_size);
    }
    if let Some(bits) = bigram {
        let text =
            format_args!("a bigram model of these tokens needs {bits:.3} bits a held-out byte");
        monitor.note(text);
    }
    let (parameters, step) = (model.parameter_count(), state.step);
    monitor.note(format_args!(
        "training {parameters} parameters, {total_steps} steps from step {step}"
    ));
    let learner = Learner {
        kept_layers: kept_layers(&settings, &model, budget),
        max_grad_norm: settings.optimizer.max_grad_norm,
        trained: FullTraining::new(model, optimizer)?,
    };
    let steps = loop_settings(&settings);
    let tokenizer = start.tokenizer;
    let mut training = Pretraining { settings, tokenizer, tokenizer_folder, corpus, learner };
    let ended = run_training(&mut training, &run, (&mut state, checkpoint), &steps, monitor)?;
    let Some((log, progress)) = ended else {
        return Ok(Outcome::Interrupted { step: state.step, total_steps });
    };

    let folder = run.file(MODEL);
    training.writer().write_folder(&folder, training.settings.dtype)?;
    let export = training.writer().write_export(export_type, &folder, monitor)?;
    let losses = log.values("loss")?;
    let Pretraining { settings, corpus, learner, .. } = &training;
    Ok(Outcome::Done(Box::new(PretrainSummary {
        steps: state.step,
        loss_first: losses.first().copied(),
        loss_last: losses.last().copied(),
        tokens_per_second: progress.tokens_per_second(),
        parameters,
        model: folder,
        export,
        recomputed_layers: learner.trained.model.config.num_hidden_layers - learner.kept_layers,
        resumed_at,
        sources: corpus.report(state.step * settings.rows_of_step()),
        results: results(&log, bigram)?,
    })))
}

/// The run to resume, or `None` if the directory is free for a new run. Settings that depend on the date
/// are taken from the run.
fn open_run(
    settings: &mut PretrainSettings,
    resume: bool,
    monitor: Monitor<'_>,
) -> Result<Option<RunDir>, TrainError> {
    let begun = resume.then(|| RunDir::pretrain_settings(&settings.out)).transpose()?;
    if settings.template_date.is_empty() {
        settings.template_date =
            begun.as_ref().map_or_else(today, |begun| begun.template_date.clone());
    }
    let Some(begun) = begun else {
        RunDir::check_no_run(&settings.out)?;
        return Ok(None);
    };
    let (saved, given) = (begun.to_table()?, settings.to_table()?);
    RunDir::resume(&settings.out, &saved, &given, monitor).map(Some)
}

/// Hashes of the inputs.
fn fingerprints(
    settings: &PretrainSettings,
    corpus: &Corpus,
) -> Result<Vec<Fingerprint>, TrainError> {
    let mut prints = vec![("the tokenized sources".into(), corpus.fingerprint().into())];
    prints.extend(fingerprints_of(settings.fingerprinted()?)?);
    Ok(prints)
}

fn loop_settings(settings: &PretrainSettings) -> LoopSettings {
    let evaluates = settings.evaluates();
    LoopSettings {
        schedule: settings.schedule(settings.total_steps()),
        best: None,
        eval_strategy: if evaluates { EvalStrategy::Steps } else { EvalStrategy::No },
        eval_steps: settings.eval_steps.max(1),
        save_steps: settings.save_steps,
        save_total_limit: settings.save_total_limit,
    }
}

/// The evaluations of a run, first and last.
fn results(log: &Log, bigram: Option<f64>) -> Result<Map<String, Value>, TrainError> {
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
    Ok(results)
}

/// A run of pretraining, ready for its steps.
struct Pretraining {
    settings: PretrainSettings,
    tokenizer: Tokenizer,
    tokenizer_folder: PathBuf,
    corpus: Corpus,
    learner: Learner<FullTraining>,
}

impl Trainer for Pretraining {
    fn step(
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
        let tokens = batches.iter().map(|batch| batch.tokens.len() as u64).sum();
        let scale = 1.0 / count.max(1) as f64;
        let parts = batches.into_iter().map(|batch| ScaledBatch { batch, scale });
        let parts: Vec<ScaledBatch> = parts.collect();
        let stepped = self.learner.step(&parts, learning_rate)?;
        let loss = stepped.loss;

        let mut numbers: Numbers = vec![
            ("loss".into(), json!(loss)),
            ("grad_norm".into(), json!(stepped.grad_norm)),
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
        let headline = format!("loss {loss:.4}");
        let work = Work { headline, tokens, samples: settings.rows_of_step(), aside };
        Ok((numbers, work))
    }

    fn evaluate(
        &mut self,
        _log: &mut Log,
        _state: &mut State,
        monitor: Monitor<'_>,
    ) -> Result<Option<Numbers>, TrainError> {
        let model = &self.learner.trained.model;
        evaluate_held_out(model, &self.corpus, &self.settings, monitor)
    }

    fn epoch_ends(&self, _state: &State) -> bool {
        false // a mixture has no epochs
    }

    fn optimizer_steps(&self) -> u64 {
        self.learner.trained.optimizer_steps()
    }

    /// Writes a checkpoint: the model's folder in full precision, and the optimizer's moments.
    fn save(&self, run: &RunDir, state: &State, keep: usize) -> Result<(), TrainError> {
        let parameters = self.learner.trained.parameters();
        self.learner.trained.with_optimizer(|optimizer| {
            run.save(state, &parameters, optimizer, keep, |folder| {
                self.writer().write_folder(&folder.join(MODEL), FloatType::F32)
            })
        })
    }
}

impl Pretraining {
    fn writer(&self) -> ModelWriter<'_> {
        let (model, settings) = (&self.learner.trained.model, &self.settings);
        ModelWriter { model, tokenizer_folder: &self.tokenizer_folder, settings }
    }

    /// Samples of the current model, with their prompts.
    fn samples(&self, step: u64) -> Result<Vec<String>, TrainError> {
        let settings = &self.settings;
        let prompts = if settings.sample_prompt.is_empty() {
            vec![vec![self.corpus.begin_of_text()]]
        } else {
            sample_prompts(settings, &self.tokenizer)?
        };
        let requests: Vec<Request> =
            prompts.iter().zip(0..).map(|(prompt, key)| Request::new(prompt, key)).collect();
        let decoder = self.learner.trained.model.decoder(settings.compute())?;
        let decoding = Decoding {
            sampling: Sampling {
                temperature: settings.sample_temperature,
                seed: settings.seed.wrapping_add(step), // other random numbers at each step
                ..Sampling::default()
            },
            max_tokens: settings.sample_tokens,
            cache: CacheType::of(decoder.compute),
            logprobs: None,
            sampled_logps: false,
            slots: 0,
        };
        // A model may have more rows than its tokenizer has tokens, and may sample one early in training.
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
}
