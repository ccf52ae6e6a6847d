//! The algorithms of reinforcement learning, and what their settings have in common.

use std::path::Path;

use crate::generate::{Sampling, Settings as Generation};
use crate::model::CacheType;
use crate::ops::Compute;
use crate::train::settings::{GrpoSettings, PpoSettings};

/// The algorithm of a run, with its settings.
#[derive(Debug, Clone)]
pub enum PolicyTask {
    /// Proximal policy optimization.
    Ppo(PpoSettings),
    /// Group-relative policy optimization.
    Grpo(GrpoSettings),
}

impl PolicyTask {
    /// Prompts of an update.
    pub fn batch_size(&self) -> usize {
        match self {
            Self::Ppo(own) => own.batch_size,
            Self::Grpo(own) => own.batch_size,
        }
    }

    /// Responses to a prompt.
    pub fn responses_per_prompt(&self) -> usize {
        match self {
            Self::Ppo(_) => 1,
            Self::Grpo(own) => own.num_generations,
        }
    }

    /// Tokens that a response may have.
    pub fn response_length(&self) -> usize {
        match self {
            Self::Ppo(own) => own.response_length,
            Self::Grpo(own) => own.max_completion_length,
        }
    }

    /// The temperature of sampling, and of the policy that is trained.
    pub fn temperature(&self) -> f64 {
        match self {
            Self::Ppo(own) => own.temperature,
            Self::Grpo(own) => own.temperature,
        }
    }

    /// Prompts that an evaluation answers; 0 takes all.
    pub fn eval_prompts(&self) -> usize {
        match self {
            Self::Ppo(own) => own.eval_prompts,
            Self::Grpo(own) => own.eval_prompts,
        }
    }

    /// Whether the policy is compared with a reference.
    pub fn has_reference(&self) -> bool {
        match self {
            Self::Ppo(_) => true,
            Self::Grpo(own) => own.beta > 0.0,
        }
    }

    /// The folder of the reference's adapter, if one is given.
    pub fn ref_adapter(&self) -> &Path {
        match self {
            Self::Ppo(own) => &own.ref_adapter,
            Self::Grpo(own) => &own.ref_adapter,
        }
    }

    /// Whether a response that does not end by itself is scored as if it ended there.
    pub fn score_at_eos(&self) -> bool {
        match self {
            Self::Ppo(own) => own.score_at_eos,
            Self::Grpo(own) => own.score_at_eos,
        }
    }

    /// Whether log-probs of the responses are computed before they are learned from.
    pub fn needs_old_log_probs(&self) -> bool {
        match self {
            Self::Ppo(_) => true,
            Self::Grpo(own) => own.beta > 0.0 || own.num_iterations > 1 || own.num_mini_batches > 1,
        }
    }

    /// How responses are sampled.
    pub fn generation(&self, compute: Compute, seed: u64) -> Generation {
        let (top_k, top_p, slots) = match self {
            Self::Ppo(own) => (own.top_k, own.top_p, own.rollout_slots),
            Self::Grpo(own) => (own.top_k, own.top_p, own.rollout_slots),
        };
        let temperature = self.temperature();
        Generation {
            sampling: Sampling { temperature, top_k, top_p, seed, ..Sampling::default() },
            max_tokens: self.response_length(),
            cache: CacheType::of(compute),
            logprobs: None,
            draws: true,
            slots,
        }
    }
}
