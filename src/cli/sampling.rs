//! Sampling flags shared by `generate` and `chat`.

use crate::generate::Sampling;

/// Sampling settings.
#[derive(Debug, Clone, clap::Args)]
pub struct SamplingFlags {
    /// Temperature; 0 is greedy, higher is more random [default: 0.8]
    #[arg(long)]
    temperature: Option<f64>,
    /// Top-k: sample from the k most likely tokens; 0 disables it [default: 40]
    #[arg(long)]
    top_k: Option<usize>,
    /// Top-p (nucleus): sample from the most likely tokens with this total probability; 1 disables it [default: 0.95]
    #[arg(long)]
    top_p: Option<f64>,
    /// Min-p: minimum probability relative to the most likely token; 0 disables it [default: 0.05]
    #[arg(long)]
    min_p: Option<f64>,
    /// Repetition penalty on tokens of the prompt and the reply; 1 disables it [default: 1]
    #[arg(long)]
    repetition_penalty: Option<f64>,
    /// Seed of sampling [default: 42]
    #[arg(long)]
    seed: Option<u64>,
}

impl SamplingFlags {
    /// The sampling settings, with defaults for flags that are not given.
    pub fn sampling(&self) -> Sampling {
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
