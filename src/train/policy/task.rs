//! The algorithms of reinforcement learning, and accessors for settings they share.

use std::path::Path;

use crate::generate::{Sampling, Settings as Generation};
use crate::model::CacheType;
use crate::ops::Compute;
use crate::train::settings::{GrpoSettings, PpoSettings, RolloutSettings};

/// The algorithm of a run, with its settings.
#[derive(Debug, Clone)]
pub(crate) enum PolicyTask {
    /// Proximal policy optimization.
    Ppo(PpoSettings),
    /// Group-relative policy optimization.
    Grpo(GrpoSettings),
}

impl PolicyTask {
    /// How responses are sampled and scored.
    pub(crate) fn rollouts(&self) -> &RolloutSettings {
        match self {
            Self::Ppo(own) => &own.rollouts,
            Self::Grpo(own) => &own.rollouts,
        }
    }

    /// Prompts per update.
    pub(crate) fn batch_size(&self) -> usize {
        self.rollouts().batch_size
    }

    /// Responses per prompt.
    pub(crate) fn responses_per_prompt(&self) -> usize {
        match self {
            Self::Ppo(_) => 1,
            Self::Grpo(own) => own.num_generations,
        }
    }

    /// Maximum number of tokens of a response.
    pub(crate) fn response_length(&self) -> usize {
        match self {
            Self::Ppo(own) => own.response_length,
            Self::Grpo(own) => own.max_completion_length,
        }
    }

    /// The temperature of sampling, and of the trained policy.
    pub(crate) fn temperature(&self) -> f64 {
        self.rollouts().temperature
    }

    /// Prompts per evaluation; 0 is all.
    pub(crate) fn eval_prompts(&self) -> usize {
        self.rollouts().eval_prompts
    }

    /// Whether the algorithm needs a reference.
    pub(crate) fn has_reference(&self) -> bool {
        match self {
            Self::Ppo(_) => true,
            Self::Grpo(own) => own.beta > 0.0,
        }
    }

    /// The folder of the reference's adapter, if one is given.
    pub(crate) fn ref_adapter(&self) -> &Path {
        &self.rollouts().ref_adapter
    }

    /// Whether truncated responses are scored as if they ended there.
    pub(crate) fn score_at_eos(&self) -> bool {
        self.rollouts().score_at_eos
    }

    /// Whether log-probs of the responses are computed before the optimizer steps.
    pub(crate) fn needs_old_log_probs(&self) -> bool {
        match self {
            Self::Ppo(_) => true,
            Self::Grpo(own) => {
                own.beta > 0.0 || own.num_iterations > 1 || own.rollouts.num_mini_batches > 1
            }
        }
    }

    /// The generation settings of responses.
    pub(crate) fn generation(&self, compute: Compute, seed: u64) -> Generation {
        let &RolloutSettings { temperature, top_k, top_p, rollout_slots: slots, .. } =
            self.rollouts();
        Generation {
            sampling: Sampling { temperature, top_k, top_p, seed, ..Sampling::default() },
            max_tokens: self.response_length(),
            cache: CacheType::of(compute),
            logprobs: None,
            sampled_logps: true,
            slots,
        }
    }
}
