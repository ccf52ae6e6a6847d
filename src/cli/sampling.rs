//! Sampling flags shared by `generate` and `chat`.

use crate::generate::Sampling;

/// Sampling settings.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct SamplingFlags {
    /// 0 is greedy; higher is more random [default: 0.8]
    #[arg(long)]
    temperature: Option<f64>,
    /// Top-k: only the k most likely tokens; 0 is off [default: 40]
    #[arg(long)]
    top_k: Option<usize>,
    /// Nucleus (top-p): the most likely tokens that together have this probability [default: 0.95]
    #[arg(long)]
    top_p: Option<f64>,
    /// Min-p: only tokens with this fraction of the highest probability [default: 0.05]
    #[arg(long)]
    min_p: Option<f64>,
    /// Repetition penalty: divides the logits of tokens that occurred; 1 is off [default: 1]
    #[arg(long)]
    repetition_penalty: Option<f64>,
    /// Seed of sampling [default: 42]
    #[arg(long)]
    seed: Option<u64>,
}

impl SamplingFlags {
    /// The sampling settings, with defaults for flags that are not given.
    pub(super) fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature.unwrap_or(0.8),
            top_k: self.top_k.unwrap_or(40),
            top_p: self.top_p.unwrap_or(0.95),
            min_p: self.min_p.unwrap_or(0.05),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            seed: self.seed.unwrap_or(42),
        }
    }
}
