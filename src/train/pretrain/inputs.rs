//! The inputs of a pretraining run: tokenizer, model and tokenized sources.

use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::Device;

use super::output::MODEL;
use crate::data::corpus::{Corpus, CorpusError, SourceSpec};
use crate::model::backend::{Backend, with_backend};
use crate::model::full::FullModel;
use crate::monitor::Monitor;
use crate::ops::DeviceName;
use crate::text::{Special, TextError, Tokenizer, convert, first_second};
use crate::train::TrainError;
use crate::train::settings::PretrainSettings;
use crate::weights::Checkpoint;

/// Interval of progress reports during tokenization.
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// The tokenizer and base of a run.
pub(super) struct Start {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The base whose weights are trained further, if there is one.
    pub base: Option<Checkpoint>,
}

impl Start {
    /// Opens both.
    pub(super) fn open(settings: &PretrainSettings) -> Result<Self, TrainError> {
        let (no_base, no_tokenizer) =
            (settings.base.as_os_str().is_empty(), settings.tokenizer.as_os_str().is_empty());
        let base = if no_base { None } else { Some(Checkpoint::open(&settings.base)?) };
        let mut tokenizer = match &base {
            Some(checkpoint) if no_tokenizer => Tokenizer::open(checkpoint)?,
            _ => Tokenizer::from_folder(&settings.tokenizer)?,
        };
        // Runs started before this setting existed have none.
        if let Some(now) = first_second(&settings.template_date) {
            tokenizer.set_template_time(now);
        }
        Ok(Self { tokenizer, base })
    }

    /// The model of a checkpoint, of the base, or with random weights.
    pub(super) fn model(
        &self,
        settings: &PretrainSettings,
        checkpoint: Option<&Path>,
        device: &Device,
    ) -> Result<FullModel, TrainError> {
        let compute = settings.compute();
        let model = match (checkpoint, &self.base) {
            (Some(folder), _) => FullModel::load(&Checkpoint::open(folder.join(MODEL))?, compute)?,
            (None, Some(base)) => FullModel::load(base, compute)?,
            (None, None) => {
                let config = settings.config(self.tokenizer.vocab_size())?;
                FullModel::random(config, settings.initializer_range, settings.seed, compute)?
            }
        };
        match settings.device {
            DeviceName::Cpu => Ok(model),
            DeviceName::Cuda(_) | DeviceName::Metal => Ok(model.on(device)?),
        }
    }

    /// Tokenizer files converted from a base that is a GGUF.
    pub(super) fn converted_tokenizer(
        &self,
        settings: &PretrainSettings,
    ) -> Result<Option<Vec<(&'static str, String)>>, TrainError> {
        match &self.base {
            Some(Checkpoint::Gguf(gguf)) if settings.tokenizer.as_os_str().is_empty() => {
                Ok(Some(convert::to_folder(gguf, &[])?))
            }
            _ => Ok(None),
        }
    }
}

/// An error message if settings, model and tokenizer are incompatible.
pub(super) fn incompatibility(
    settings: &PretrainSettings,
    model: &FullModel,
    tokenizer: &Tokenizer,
) -> Option<String> {
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

/// The tokens of the prompts of samples.
pub(super) fn sample_prompts(
    settings: &PretrainSettings,
    tokenizer: &Tokenizer,
) -> Result<Vec<Vec<u32>>, TextError> {
    let encode = |text: &String| Ok(tokenizer.with_bos(tokenizer.encode(text, Special::AsText)?));
    settings.sample_prompt.iter().map(encode).collect()
}

/// How many layers keep their tapes within the memory budget; all of them on the reference backend.
pub(super) fn kept_layers(settings: &PretrainSettings, model: &FullModel, budget: u64) -> usize {
    let layers = model.config.num_hidden_layers;
    let recomputes = with_backend!(model.compute.backend, B => B::RECOMPUTES_FULL_TRAINING);
    if !recomputes {
        return layers;
    }
    if let Some(all) = settings.gradient_checkpointing {
        return if all { 0 } else { layers };
    }
    let tokens = settings.per_device_train_batch_size * settings.max_length;
    // Weights, gradients and both moments; and the copy used by evaluations and samples.
    let state = model.parameter_bytes() + size_of::<f32>() * model.parameter_count();
    let fits = |kept: &usize| (state + model.training_bytes(tokens, *kept)) as u64 <= budget;
    (0..=layers).rev().find(fits).unwrap_or(0)
}

/// Opens the tokenized sources; files that are not in the cache are tokenized first.
pub(super) fn open_corpus(
    settings: &PretrainSettings,
    specs: &[SourceSpec],
    tokenizer: &Tokenizer,
    monitor: Monitor<'_>,
) -> Result<Corpus, CorpusError> {
    let mut reported = Instant::now();
    Corpus::open(specs, tokenizer, &settings.corpus(), monitor, |progress| {
        if reported.elapsed() >= REPORT_EVERY {
            reported = Instant::now();
            let (done, all) = (progress.bytes as f64 / 1e6, progress.of as f64 / 1e6);
            let source = progress.source;
            monitor.note(format_args!("tokenizing {source}: {done:.0} of {all:.0} MB"));
        }
    })
}
