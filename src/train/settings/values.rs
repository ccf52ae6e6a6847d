//! Enums that are values of settings.

use crate::string_enum::string_enum;

string_enum! {
    /// When held-out loss is taken.
    #[derive(Debug)]
    pub enum EvalStrategy {
        /// Never.
        No = "no",
        /// Before the first step, every `eval_steps` steps, and after the last.
        Steps = "steps",
        /// Before the first step, and after each epoch.
        Epoch = "epoch",
    }
}

string_enum! {
    /// Which adapter the value head sits on.
    #[derive(Debug)]
    pub enum ValueModel {
        /// A separate adapter, so that training values does not affect the policy.
        Own = "own",
        /// On the policy's: one pass serves both, at half the time and memory.
        Policy = "policy",
    }
}

string_enum! {
    /// How an advantage is made of the rewards of a group.
    #[derive(Debug)]
    pub enum AdvantageEstimator {
        /// Less the mean of the group (Shao et al. 2024).
        Grpo = "grpo",
        /// Less the mean of the others (Ahmadian et al. 2024).
        Rloo = "rloo",
    }
}

string_enum! {
    /// Shapes with a name, all Llama's. Widths from `tiny` on are multiples of 256, which K-quants need.
    #[derive(Debug)]
    pub enum Preset {
        /// Hidden size 128, 4 layers: 0.9 M parameters without the embedding.
        Micro = "micro",
        /// 256 wide, 6 layers: 5 M.
        Tiny = "tiny",
        /// 512 wide, 4 layers: 14 M.
        Mini = "mini",
        /// 512 wide, 8 layers: 27 M.
        Small = "small",
        /// As wide and deep as GPT-2's smallest, 768 and 12: 85 M.
        Gpt2 = "gpt2",
    }
}

impl Preset {
    /// Width, layers, heads, width of the feed-forward layer.
    pub(super) fn shape(self) -> [usize; 4] {
        match self {
            Self::Micro => [128, 4, 4, 384],
            Self::Tiny => [256, 6, 4, 768],
            Self::Mini => [512, 4, 8, 1536],
            Self::Small => [512, 8, 8, 1536],
            Self::Gpt2 => [768, 12, 12, 2048],
        }
    }
}

string_enum! {
    /// How a model's numbers are written.
    #[derive(Debug)]
    pub enum FloatType {
        /// As they are.
        F32 = "f32",
        /// Half precision.
        F16 = "f16",
        /// The upper half of an F32.
        Bf16 = "bf16",
    }
}
