//! The memory estimate of a run, and how many layers can keep their tapes within a memory budget.
//!
//! Keeping or recomputing a tape (gradient checkpointing) gives the same bits; only the time differs.

use std::sync::Arc;

use quantune_adapters::delta::Adapter;
use serde::Serialize;

use crate::model::backend::{HeadBytes, LayerBytes};
use crate::model::layer::AdapterSizes;
use crate::model::{ActiveAdapter, Adapters, Decoder};

/// The default budget, as a fraction of the memory that is free at the start.
const DEFAULT_FRACTION: f64 = 0.7;
/// The default budget where the free memory is not known.
const FALLBACK_BUDGET: u64 = 4 << 30;

/// The default memory budget: most of the free memory.
pub(super) fn default_budget() -> u64 {
    free().map_or(FALLBACK_BUDGET, |bytes| (bytes as f64 * DEFAULT_FRACTION) as u64)
}

/// Free memory in bytes; `None` if the platform does not report it.
pub(super) fn free() -> Option<u64> {
    let available = || {
        let text = std::fs::read_to_string("/proc/meminfo").ok()?;
        let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
    };
    // The limit of a container may be lower than that of the machine.
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let limit = number("/sys/fs/cgroup/memory.max").map(|most| {
        most.saturating_sub(number("/sys/fs/cgroup/memory.current").unwrap_or_default())
    });
    available().map(|bytes| bytes.min(limit.unwrap_or(u64::MAX)))
}

/// Number of layers with a backward pass: those from the lowest with a trained adapter up.
pub(super) fn layers_with_gradients(decoder: &Decoder, adapters: &[Arc<Adapter>]) -> usize {
    let layers = decoder.config.num_hidden_layers;
    let passed = |adapter: &Arc<Adapter>| {
        let active = [ActiveAdapter::trainable(adapter.clone())];
        if decoder.trains_embedding(Adapters::Same(&active)) {
            return layers;
        }
        let lowest = decoder.lowest_trainable(Adapters::Same(&active));
        lowest.map_or(0, |(lowest, _)| layers - lowest)
    };
    adapters.iter().map(passed).max().unwrap_or(0)
}

/// The quantities that the memory of a run depends on, apart from how many layers keep their tapes.
#[derive(Debug)]
pub struct MemoryParams<'a> {
    /// The base.
    pub decoder: &'a Decoder,
    /// Number of its layers with a backward pass.
    pub layers: usize,
    /// Tokens of the largest micro-batch.
    pub tokens: usize,
    /// Whether the lm_head is used: a reward model has a score head instead, which is one row.
    pub logits: bool,
    /// Number of trainable parameters.
    pub parameters: usize,
    /// The updates of a layer.
    pub sizes: AdapterSizes,
    /// Bytes of rows or prompts.
    pub token_data: usize,
    /// Bytes of the log-probs of all rows under the reference.
    pub reference: usize,
    /// Bytes for decoding and scoring responses.
    pub rollouts: usize,
    /// Resident bytes of the process with all inputs, without rows and frozen weights.
    pub process: usize,
}

impl MemoryParams<'_> {
    /// Memory of the layers.
    pub fn layer_bytes(&self) -> LayerBytes {
        self.decoder.layer_bytes(self.tokens, &self.sizes)
    }
}

/// Estimated peak memory of a run, in bytes by component.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemoryEstimate {
    /// The base's mapped matrices; the system can evict their pages.
    pub frozen_weights: usize,
    /// Trainable parameters: values, gradients and both moments.
    pub adapter: usize,
    /// Tapes of the layers that keep them, and one tape that the recomputed layers share.
    pub kept_tapes: usize,
    /// Inputs of the layers that are recomputed.
    pub layer_inputs: usize,
    /// Buffers that all layers share.
    pub shared_buffers: usize,
    /// Logits, and the hidden states they are computed from.
    pub logits: usize,
    /// The KV cache of responses that are decoded at once, and the buffers that score them.
    pub rollouts: usize,
    /// Log-probs under the reference.
    pub reference: usize,
    /// Rows or prompts.
    pub token_data: usize,
    /// The process itself: program, tokenizer, frozen adapters.
    pub process: usize,
}

impl MemoryEstimate {
    /// The estimate if the upper `kept` layers keep their tapes. Both the budget and the predicted peak
    /// use this sum.
    pub fn of(memory_params: &MemoryParams, kept: usize) -> Self {
        let MemoryParams { decoder, layers, tokens, .. } = *memory_params;
        let config = &decoder.config;
        let LayerBytes { input, tape, shared, .. } = memory_params.layer_bytes();
        let kept = kept.min(layers);
        let vocabulary = if memory_params.logits { config.vocab_size } else { 1 };
        let HeadBytes { logits, rows } = decoder.head_bytes(tokens, vocabulary);
        Self {
            frozen_weights: decoder.weight_bytes(),
            adapter: decoder.parameter_bytes(memory_params.parameters),
            kept_tapes: tape * (kept + usize::from(kept < config.num_hidden_layers)),
            layer_inputs: (layers - kept) * input,
            shared_buffers: shared,
            logits: logits + rows,
            rollouts: memory_params.rollouts,
            reference: memory_params.reference,
            token_data: memory_params.token_data,
            process: memory_params.process,
        }
    }

    /// The components with their names.
    pub fn components(&self) -> [(&'static str, usize); 10] {
        [
            ("frozen weights, mapped", self.frozen_weights),
            ("adapter, gradients, moments", self.adapter),
            ("kept tapes", self.kept_tapes),
            ("inputs of recomputed layers", self.layer_inputs),
            ("shared buffers", self.shared_buffers),
            ("logits", self.logits),
            ("decoding of responses", self.rollouts),
            ("reference log-probs", self.reference),
            ("token data", self.token_data),
            ("the process itself", self.process),
        ]
    }

    /// The total.
    pub fn sum(&self) -> usize {
        self.components().iter().map(|(_, bytes)| bytes).sum()
    }
}

/// How many of the layers with a backward pass, from the top, can keep their tapes in `budget` bytes. The
/// rest of the memory of a step cannot be reduced.
pub(super) fn kept_layers(memory_params: &MemoryParams, budget: u64) -> usize {
    let fits = |&kept: &usize| MemoryEstimate::of(memory_params, kept).sum() as u64 <= budget;
    (0..=memory_params.layers).rev().find(fits).unwrap_or(0)
}

/// Memory of this process in bytes, from a line of `/proc/self/status` such as `VmHWM`; `None` on other
/// platforms.
pub fn process_status_bytes(line: &str) -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|found| found.starts_with(line))?;
    Some(line.split_whitespace().nth(1)?.parse::<usize>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_budget_is_above_a_megabyte() {
        assert!(default_budget() > 1 << 20);
    }
}
