//! The inputs of a fine-tuning run (base, tokenizer, frozen adapters, rows or prompts), and the memory
//! that the run needs with them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use quantune_adapters::delta::{Adapter, Lora};

use super::TrainError;
use super::fingerprints::fingerprints_of;
use super::lora::read_frozen;
use super::memory::{
    MemoryEstimate, MemoryParams, default_budget, free, layers_with_gradients, process_status_bytes,
};
use super::policy::{PolicyTask, Rollouts};
use super::rows::RowLoader;
use super::run_dir::Fingerprint;
use super::settings::{CommonSettings, RunSettings, Task};
use super::supervised::Supervised;
use crate::data::DataError;
use crate::model::layer::AdapterSizes;
use crate::model::{ActiveAdapter, Decoder};
use crate::monitor::Monitor;
use crate::ops::DeviceName;
use crate::quant::BlockType;
use crate::text::{Tokenizer, convert, first_second};
use crate::weights::Checkpoint;

/// Bytes of the process where the system does not report them.
const UNKNOWN_PROCESS_BYTES: usize = 32 << 20;

/// The source of the micro-batches of a step.
pub(super) enum BatchSource {
    /// Rows of a file, epoch by epoch.
    Supervised(Box<Supervised>),
    /// Responses of the policy itself to the prompts of a file.
    Rollouts(Box<Rollouts>),
}

/// The inputs of a run.
pub(super) struct Inputs {
    /// The base.
    pub decoder: Decoder,
    /// Frozen adapters below the trained one.
    pub frozen: Vec<ActiveAdapter>,
    /// Tokens added to the vocabulary for this run.
    pub added_tokens: Vec<u32>,
    /// Tokenizer files, written next to adapters if tokens were added.
    pub tokenizer_files: Vec<(&'static str, String)>,
    /// The rows or prompts.
    pub source: BatchSource,
    /// Resident bytes of the process with all inputs, without mapped weights.
    process_bytes: usize,
}

impl Inputs {
    /// Reads the inputs; `None` if the run was stopped meanwhile.
    pub(super) fn load(
        settings: &RunSettings,
        monitor: Monitor<'_>,
    ) -> Result<Option<Self>, TrainError> {
        let common = &settings.common;
        let Some(now) = first_second(&common.template_date) else {
            let fault = format!("template_date is {:?}, needed YYYY-MM-DD", common.template_date);
            return Err(TrainError::Settings(fault));
        };
        let load_type = load_type(common)?;
        let device = common.device.open().map_err(|e| TrainError::Settings(e.to_string()))?;
        let program_bytes = process_status_bytes("RssFile:").unwrap_or(0);
        let checkpoint = Checkpoint::open(&common.base)?;
        let adapters = settings.adapters();
        let folders: Vec<&Path> = adapters.iter().map(PathBuf::as_path).collect();
        let tokenizer = Tokenizer::open_with_adapters(&checkpoint, &folders)?;
        let known = tokenizer.len() as u32;
        let mut tokenizer = tokenizer.with_added(&checkpoint, &common.added()?)?;
        let added_tokens: Vec<u32> = (known..tokenizer.len() as u32).collect();
        let tokenizer_files = if tokenizer.added().is_empty() {
            Vec::new()
        } else {
            convert::files_for_adapter(&checkpoint, &tokenizer)?
        };
        let decoder = Decoder::load_as(&checkpoint, common.compute(), load_type)?;
        let mut decoder = decoder.with_vocabulary(tokenizer.rows_needed())?;
        if common.device != DeviceName::Cpu {
            decoder = decoder.on(&device)?;
        }
        let template = Some(&*common.chat_template).filter(|path| !path.as_os_str().is_empty());
        tokenizer.change_template(template, &common.chat_template_kwargs)?;
        tokenizer.set_template_time(now);
        let frozen = read_frozen(common, &decoder, monitor)?;
        let source = match load_source(settings, &decoder, &frozen, tokenizer, monitor) {
            Err(TrainError::Data(DataError::Stopped)) => return Ok(None),
            source => source?,
        };
        let mut process_bytes =
            program_bytes + process_status_bytes("RssAnon:").unwrap_or(UNKNOWN_PROCESS_BYTES);
        if load_type.is_some() {
            // Weights quantized on load are in memory, and counted separately.
            process_bytes = process_bytes.saturating_sub(decoder.weight_bytes());
        }
        Ok(Some(Self { decoder, frozen, added_tokens, tokenizer_files, source, process_bytes }))
    }

    /// Hashes of the inputs.
    pub(super) fn fingerprints(
        &self,
        settings: &RunSettings,
    ) -> Result<Vec<Fingerprint>, TrainError> {
        let mut fingerprints = fingerprints_of(settings.fingerprinted()?)?;
        fingerprints.extend(match &self.source {
            BatchSource::Supervised(source) => source.fingerprints()?,
            BatchSource::Rollouts(source) => source.fingerprints()?,
        });
        Ok(fingerprints)
    }

    /// The quantities that the memory of the run depends on.
    pub(super) fn memory_params(
        &self,
        common: &CommonSettings,
        adapters: &[Arc<Adapter>],
    ) -> MemoryParams<'_> {
        let (tokens, passed, logits) = match &self.source {
            BatchSource::Supervised(source) => {
                (source.largest_micro_batch(), &adapters[..1], source.reads_logits())
            }
            BatchSource::Rollouts(source) => (source.largest_micro_batch(), adapters, true),
        };
        let layers = layers_with_gradients(&self.decoder, passed);
        let mean = |of: &dyn Fn(&Lora) -> usize| {
            let all = |adapter: &Arc<Adapter>| adapter.modules.values().map(of).sum::<usize>();
            let most = adapters.iter().map(all).max().unwrap_or(0);
            most.div_ceil(layers.max(1))
        };
        let magnitudes = |lora: &Lora| lora.magnitude.as_ref().map_or(0, |_| lora.out_features());
        let sizes = AdapterSizes {
            ranks: mean(&Lora::r),
            magnitudes: mean(&magnitudes),
            dropout: common.lora_dropout > 0.0,
        };
        let ([held, mapped], reference, rollouts) = match &self.source {
            BatchSource::Supervised(source) => (source.data_bytes(), source.reference_bytes(), 0),
            BatchSource::Rollouts(source) => {
                (source.data_bytes(), 0, source.rollout_bytes(&self.decoder, &sizes))
            }
        };
        MemoryParams {
            decoder: &self.decoder,
            layers,
            tokens,
            logits,
            parameters: adapters.iter().map(|adapter| adapter.num_parameters()).sum(),
            sizes,
            token_data: held + mapped,
            reference,
            rollouts,
            process: self.process_bytes.saturating_sub(held),
        }
    }
}

/// The type that matrices are quantized to on load, if any.
fn load_type(common: &CommonSettings) -> Result<Option<BlockType>, TrainError> {
    if common.load_type.is_empty() {
        return Ok(None);
    }
    let found = BlockType::written(&common.load_type);
    found.map(Some).map_err(|e| TrainError::Settings(format!("load_type: {e}")))
}

fn load_source(
    settings: &RunSettings,
    decoder: &Decoder,
    frozen: &[ActiveAdapter],
    tokenizer: Tokenizer,
    monitor: Monitor<'_>,
) -> Result<BatchSource, TrainError> {
    let common = &settings.common;
    let loader = RowLoader { common, decoder, tokenizer: &tokenizer, monitor };
    let supervised = |source: Supervised| BatchSource::Supervised(source.into());
    let rollouts = |task, tokenizer| {
        let source = Rollouts::load(common, task, decoder, frozen, tokenizer, monitor);
        source.map(|source| BatchSource::Rollouts(source.into()))
    };
    match &settings.task {
        Task::Sft(own) => Supervised::language_modeling(&loader, own).map(supervised),
        Task::Reward(own) => Supervised::reward(&loader, own).map(supervised),
        Task::Dpo(own) => Supervised::preference(&loader, own, frozen).map(supervised),
        Task::Ppo(own) => rollouts(PolicyTask::Ppo(own.clone()), tokenizer),
        Task::Grpo(own) => rollouts(PolicyTask::Grpo(own.clone()), tokenizer),
    }
}

/// How many of the layers with gradients keep their tapes.
pub(super) fn kept_layers(settings: &CommonSettings, memory_params: &MemoryParams) -> usize {
    if let Some(all) = settings.gradient_checkpointing {
        return if all { 0 } else { memory_params.layers };
    }
    if settings.device != DeviceName::Cpu && settings.memory_budget.is_none() {
        return 0; // the free memory of the device is not known
    }
    let budget = settings.memory_budget.map_or_else(default_budget, |budget| budget.0);
    super::memory::kept_layers(memory_params, budget)
}

/// Checks that the memory budget suffices with every layer recomputed; without a budget, warns of
/// memory that is not free.
pub(super) fn check_memory(
    settings: &CommonSettings,
    memory_params: &MemoryParams,
    kept_layers: usize,
    monitor: Monitor<'_>,
) -> Result<(), TrainError> {
    if !memory_params.layer_bytes().complete {
        return Ok(()); // the memory of the backend is not known
    }
    let megabytes = |bytes: u64| format!("{:.0} MB", (bytes as f64 / 1e6).ceil());
    if let (Some(budget), None) = (settings.memory_budget, settings.gradient_checkpointing) {
        let memory = MemoryEstimate::of(memory_params, 0);
        let needed = memory.sum() as u64;
        if needed <= budget.0 {
            return Ok(());
        }
        let mut parts = memory.components();
        parts.sort_unstable_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        let parts = parts.iter().filter(|(_, bytes)| *bytes > 0);
        let parts = parts.map(|(name, bytes)| format!("{name} {}", megabytes(*bytes as u64)));
        return Err(TrainError::Settings(format!(
            "memory_budget is {budget}, which is too small: with every layer recomputed the run takes {} \
             ({}), needed that much, or fewer than {} tokens in a micro-batch (max_length, \
             per_device_train_batch_size)",
            megabytes(needed),
            parts.collect::<Vec<_>>().join(", "),
            memory_params.tokens,
        )));
    }
    let memory = MemoryEstimate::of(memory_params, kept_layers);
    let needed = memory.sum().saturating_sub(memory.frozen_weights + memory.process) as u64;
    if let Some(free) = free().filter(|&free| needed > free) {
        monitor.warn(format_args!(
            "the run needs {} more memory, and only {} are free: the system may kill it; \
             fewer tokens in a micro-batch than {} take less (max_length, \
             per_device_train_batch_size)",
            megabytes(needed),
            megabytes(free),
            memory_params.tokens,
        ));
    }
    Ok(())
}

/// The predicted peak memory of the run, including the peak while the inputs were read; `None` for the
/// reference backend, whose memory is not predicted.
pub(super) fn predicted_peak_bytes(
    memory_params: &MemoryParams,
    kept_layers: usize,
) -> Option<usize> {
    let so_far = process_status_bytes("VmHWM:")?;
    memory_params
        .layer_bytes()
        .complete
        .then(|| MemoryEstimate::of(memory_params, kept_layers).sum().max(so_far))
}
