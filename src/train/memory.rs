//! What memory a run takes, and how many layers keep their tapes within a budget of it.
//!
//! Keeping or recomputing a tape gives the same bits; the budget buys time, nothing else.

use std::sync::Arc;

use quantune_adapters::delta::Adapter;
use serde::Serialize;

use crate::model::backend::{HeadBytes, LayerBytes};
use crate::model::layer::Sizes;
use crate::model::{ActiveAdapter, Adapters, Decoder};

/// The share of the memory free at the start that a run takes when no budget is given.
const DEFAULT_SHARE: f64 = 0.7;
/// The budget where the system does not tell how much memory is free.
const FALLBACK: u64 = 4 << 30;

/// The budget of a run that names none: most of what is free now.
pub fn default_budget() -> u64 {
    free().map_or(FALLBACK, |bytes| (bytes as f64 * DEFAULT_SHARE) as u64)
}

/// Memory that is free now (on Linux).
pub fn free() -> Option<u64> {
    let available = || {
        let text = std::fs::read_to_string("/proc/meminfo").ok()?;
        let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
    };
    // A container may have less than the machine.
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let limit = number("/sys/fs/cgroup/memory.max").map(|most| {
        most.saturating_sub(number("/sys/fs/cgroup/memory.current").unwrap_or_default())
    });
    available().map(|bytes| bytes.min(limit.unwrap_or(u64::MAX)))
}

/// Layers that gradients pass: those from the lowest that a trained adapter sits on up.
pub fn passed_layers(decoder: &Decoder, adapters: &[Arc<Adapter>]) -> usize {
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

/// What decides how much memory a run takes, beside how many layers keep their tapes.
#[derive(Debug)]
pub struct Demand<'a> {
    /// The base.
    pub decoder: &'a Decoder,
    /// Its layers that gradients pass.
    pub layers: usize,
    /// Tokens of the largest micro-batch.
    pub tokens: usize,
    /// Whether its head is read: a reward model has one of its own, which is a row.
    pub logits: bool,
    /// Numbers that train.
    pub parameters: usize,
    /// The updates of a layer.
    pub sizes: Sizes,
    /// Bytes of rows or prompts.
    pub token_data: usize,
    /// Bytes of what the reference says of all rows.
    pub reference: usize,
    /// What decoding responses takes.
    pub rollouts: usize,
    /// Bytes of the process with all that is read, but for rows and frozen weights.
    pub process: usize,
}

impl Demand<'_> {
    /// The memory that layers work with.
    pub fn layer_bytes(&self) -> LayerBytes {
        self.decoder.layer_bytes(self.tokens, &self.sizes)
    }
}

/// Bytes of a run's memory at its peak, by what they are for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// The base's matrices, where they are mapped; the system may take their pages back.
    pub frozen_weights: usize,
    /// What trains: values, gradients and both moments.
    pub adapter: usize,
    /// Tapes of layers that keep them, and the one that the others share.
    pub kept_tapes: usize,
    /// Inputs of the layers that are recomputed.
    pub layer_inputs: usize,
    /// Buffers that all layers share.
    pub shared_buffers: usize,
    /// Logits, and the rows they are made of.
    pub logits: usize,
    /// The cache of responses that are decoded at once, and what scoring them takes.
    pub rollouts: usize,
    /// Log-probs under the reference.
    pub reference: usize,
    /// Rows or prompts.
    pub token_data: usize,
    /// The process itself: program, tokenizer, frozen adapters.
    pub process: usize,
}

impl Memory {
    /// Of a run in which the upper `kept` layers keep their tapes. This is the one sum: the budget is
    /// kept by it and the prediction is it.
    pub fn of(demand: &Demand, kept: usize) -> Self {
        let Demand { decoder, layers, tokens, .. } = *demand;
        let config = &decoder.config;
        let LayerBytes { input, tape, shared, .. } = demand.layer_bytes();
        let kept = kept.min(layers);
        let vocabulary = if demand.logits { config.vocab_size } else { 1 };
        let HeadBytes { logits, rows } = decoder.head_bytes(tokens, vocabulary);
        Self {
            frozen_weights: decoder.weight_bytes(),
            adapter: decoder.parameter_bytes(demand.parameters),
            kept_tapes: tape * (kept + usize::from(kept < config.num_hidden_layers)),
            layer_inputs: (layers - kept) * input,
            shared_buffers: shared,
            logits: logits + rows,
            rollouts: demand.rollouts,
            reference: demand.reference,
            token_data: demand.token_data,
            process: demand.process,
        }
    }

    /// Each with its name.
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

    /// All of it.
    pub fn sum(&self) -> usize {
        self.components().iter().map(|(_, bytes)| bytes).sum()
    }
}

/// How many of the layers that gradients pass, from the top, can keep their tapes in `budget` bytes.
/// Everything else a step needs cannot be had for less.
pub fn kept_layers(demand: &Demand, budget: u64) -> usize {
    let fits = |&kept: &usize| Memory::of(demand, kept).sum() as u64 <= budget;
    (0..=demand.layers).rev().find(fits).unwrap_or(0)
}

/// Memory of this process by one of the lines of `/proc/self/status`, where the system has that.
pub fn of_process(line: &str) -> Option<usize> {
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
