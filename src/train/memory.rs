//! How many layers keep their tapes within a memory budget, and how a budget is written.
//!
//! Keeping or recomputing a tape gives the same bits; the budget buys time, nothing else.

use std::sync::Arc;

use quantune_adapters::delta::Adapter;

use crate::model::layer::Tape;
use crate::model::{Adapters, Decoder, Worn};
use crate::ops::linear_cross_entropy;

/// The share of the memory free at the start that a run takes when no budget is given.
const DEFAULT_SHARE: f64 = 0.7;
/// The budget where the system does not tell how much memory is free.
const FALLBACK: u64 = 4 << 30;

/// Bytes of `600MB`, `1.5GiB`, or a plain number of bytes.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let unit = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let number: f64 = text[..unit].trim().parse().ok()?;
    let unit: f64 = match text[unit..].to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    };
    let bytes = number * unit;
    (bytes.is_finite() && bytes >= 0.0).then_some(bytes as u64)
}

/// The budget of a run that names none: most of what is free now (Linux tells).
pub fn default_budget() -> u64 {
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
    let free = available().map(|bytes| bytes.min(limit.unwrap_or(u64::MAX)));
    free.map_or(FALLBACK, |bytes| (bytes as f64 * DEFAULT_SHARE) as u64)
}

/// Layers that gradients pass: those from the lowest that a trained adapter sits on up.
pub fn passed_layers(decoder: &Decoder, adapters: &[Arc<Adapter>]) -> usize {
    let layers = decoder.config.num_hidden_layers;
    let passed = |adapter: &Arc<Adapter>| {
        let worn = [Worn::trainable(adapter.clone())];
        if decoder.trains_embedding(Adapters::Same(&worn)) {
            return layers;
        }
        let lowest = decoder.lowest_trainable(Adapters::Same(&worn));
        lowest.map_or(0, |(lowest, _)| layers - lowest)
    };
    adapters.iter().map(passed).max().unwrap_or(0)
}

/// Of `layers` layers that gradients pass, how many, from the top, can keep their tapes while
/// micro-batches of `tokens` tokens and adapters of `parameters` numbers, `ranks` of them per token
/// and layer, are trained in `budget` bytes. Everything else a step needs is counted first; it
/// cannot be had for less.
pub fn kept_layers(
    decoder: &Decoder,
    layers: usize,
    tokens: usize,
    parameters: usize,
    ranks: usize,
    budget: u64,
) -> usize {
    let config = &decoder.config;
    let tape = Tape::bytes(config, decoder.compute, tokens, ranks) as u64;
    let float = size_of::<f32>();
    let inputs = layers * tokens * config.hidden_size * float;
    // Values, gradients and two moments.
    let adapter = 4 * parameters * float;
    let fixed = decoder.weight_bytes()
        + inputs
        + adapter
        + linear_cross_entropy::working_bytes(tokens, config.vocab_size)
        + Tape::shared_bytes(config, tokens);
    let room = budget.saturating_sub(fixed as u64);
    if room >= tape * layers as u64 {
        return layers;
    }
    // Layers that are recomputed share a tape of their own.
    (room.saturating_sub(tape) / tape.max(1)).min(layers as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_read() {
        for (text, bytes) in [
            ("600MB", Some(600_000_000)),
            ("1.5GiB", Some(3 << 29)),
            ("2 gb", Some(2_000_000_000)),
            ("1048576", Some(1 << 20)),
            ("-1GB", None),
            ("many", None),
            ("3TB", None),
            ("", None),
        ] {
            assert_eq!(parse_bytes(text), bytes, "{text}");
        }
        assert!(default_budget() > 1 << 20);
    }
}
