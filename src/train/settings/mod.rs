//! Every setting of a training run, once: flag, key of the TOML file, default and what it means.
//! Names are PEFT's, TRL's and transformers'.
//!
//! What all commands share is [`CommonSettings`]; each command adds its own. In a file they are one
//! flat table.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::TrainError;
use super::best::BestSettings;
use super::metrics::EVAL;
use super::spec::{parse_bytes, path_and_weight};
use crate::data::checks::Check;
use crate::data::{AlpacaPrompt, DataFile};
use crate::objectives::advantage::{KlEstimator, ScaleRewards};
use crate::objectives::policy::LossForm;
use crate::objectives::preference::{PreferenceLoss, PreferenceLossType, PreferenceSettings};
use crate::ops::{BackendKind, Compute, DeviceName, Precision};
use crate::optim::ScheduleKind;
use crate::string_enum::{StringEnum, string_enum};
use crate::text::{AddedTokenSpec, TextError};

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

/// The commands that train.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Supervised fine-tuning.
    Sft,
    /// A reward model from comparisons.
    Reward,
    /// Preference optimization without a reward model: DPO and its kin.
    Dpo,
    /// Proximal policy optimization against a reward model.
    Ppo,
    /// Group-relative policy optimization against rewards of any kind.
    Grpo,
}

impl Command {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Sft, Self::Reward, Self::Dpo, Self::Ppo, Self::Grpo];

    /// Its name on the command line and in a run's `config.toml`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sft => "sft",
            Self::Reward => "reward",
            Self::Dpo => "dpo",
            Self::Ppo => "ppo",
            Self::Grpo => "grpo",
        }
    }
}

/// Makes two structs of one list: the settings with their defaults, and the flags, where what is
/// not given stays out of the way of the config file.
macro_rules! settings {
    ($(#[doc = $about:literal])* $settings:ident, $flags:ident {
        $($(#[doc = $doc:literal])+ $(#[arg($($arg:tt)*)])? $name:ident: $type:ty = $default:expr,)*
    }) => {
        $(#[doc = $about])*
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $settings {
            $($(#[doc = $doc])+ #[serde(skip_serializing_if = "is_empty")] pub $name: $type,)*
        }

        impl $settings {
            /// The keys, in order.
            pub const KEYS: &[&str] = &[$(stringify!($name)),*];
        }

        impl Default for $settings {
            fn default() -> Self {
                Self { $($name: $default,)* }
            }
        }

        #[doc = concat!("The flags of [`", stringify!($settings), "`]: only what was given.")]
        #[derive(Debug, Clone, Default, Serialize, clap::Args)]
        pub struct $flags {
            $($(#[doc = $doc])+
            #[serde(skip_serializing_if = "Option::is_none")]
            #[arg(long, $($($arg)*)?)]
            pub $name: Option<$type>,)*
        }
    };
}

mod optimization;
mod pretrain;

pub use pretrain::{FloatType, Preset, PretrainFlags, PretrainSettings};

settings! {
    /// What all training commands have. Where defaults differ, they are the command's.
    CommonSettings, CommonFlags {
        /// The base: a GGUF file or a Hugging Face folder
        base: PathBuf = PathBuf::new(),
        /// Rows, JSONL or Parquet: sft learns `messages`, `conversations` (ShareGPT),
        /// `instruction`/`output` (Alpaca), `prompt`/`completion`, `text` or `input_ids`; reward and dpo
        /// compare `chosen`/`rejected` or ranked `responses`; ppo and grpo answer `prompt`s. sft takes
        /// several files, PATH=WEIGHT for rows that come WEIGHT times in an epoch
        #[arg(value_name = "PATH[=WEIGHT]")]
        data: Vec<DataFile> = Vec::new(),
        /// Held-out rows; without, 1 in 10 of --data is held out when --eval-strategy asks
        eval_data: PathBuf = PathBuf::new(),
        /// The run directory
        out: PathBuf = PathBuf::new(),
        /// A PEFT adapter folder to continue from, instead of a fresh adapter
        adapter: PathBuf = PathBuf::new(),
        /// An adapter that stays as it is and that the trained one is put on top of, and its reference
        /// too, as PATH or PATH=WEIGHT; may be repeated
        frozen_adapter: Vec<String> = Vec::new(),

        /// Rank of the update (lora_alpha / r) · B · A [default: 16]
        r: usize = 16,
        /// Scale of the update [default: 32]
        lora_alpha: f64 = 32.0,
        /// Probability that an input of A is dropped in training [default: 0]
        lora_dropout: f64 = 0.0,
        /// Modules with an update: names, one regular expression, or all-linear [default: all-linear]
        #[arg(num_args = 1..)]
        target_modules: Vec<String> = vec!["all-linear".into()],
        /// Modules without one: names, or one regular expression
        #[arg(num_args = 1..)]
        exclude_modules: Vec<String> = Vec::new(),
        /// Other ranks, as REGEX=R
        #[arg(num_args = 1..)]
        rank_pattern: Vec<String> = Vec::new(),
        /// Other alphas, as REGEX=ALPHA
        #[arg(num_args = 1..)]
        alpha_pattern: Vec<String> = Vec::new(),
        /// Only these layers, counted from 0; needs target_modules by name
        #[arg(value_delimiter = ',', num_args = 1..)]
        layers_to_transform: Vec<usize> = Vec::new(),
        /// Names of the module lists that layers_to_transform counts in
        #[arg(value_delimiter = ',', num_args = 1..)]
        layers_pattern: Vec<String> = Vec::new(),
        /// Scale by lora_alpha / sqrt(r) (rsLoRA) [default: false]
        #[arg(num_args = 0..=1, default_missing_value = "true")]
        use_rslora: bool = false,
        /// Give each row of a merged weight a length of its own (DoRA) [default: false]
        #[arg(num_args = 0..=1, default_missing_value = "true")]
        use_dora: bool = false,
        /// How the adapter begins: true (A random, B zero), false (both random), gaussian, or of the
        /// base: pissa, pissa_niter_N, olora, loftq [default: true]
        init_lora_weights: String = "true".into(),
        /// The base before its quantization, which loftq begins from
        loftq_base: PathBuf = PathBuf::new(),
        /// Modules trained whole beside the updates: embed_tokens, lm_head
        #[arg(value_delimiter = ',', num_args = 1..)]
        modules_to_save: Vec<String> = Vec::new(),
        /// Tokens whose embeddings are trained
        #[arg(value_delimiter = ',', num_args = 1..)]
        trainable_token_indices: Vec<u32> = Vec::new(),
        /// Tokens to add to the vocabulary, text as any other: each is found in a text before that is
        /// cut into words. Rows of embedding and head that the base has without a token are taken first;
        /// further ones begin as the mean of the base's. They train
        #[arg(value_delimiter = ',', num_args = 1.., value_name = "TOKEN")]
        add_tokens: Vec<String> = Vec::new(),
        /// The same for marks as <|tool|>, which are no text
        #[arg(value_delimiter = ',', num_args = 1.., value_name = "TOKEN")]
        add_special_tokens: Vec<String> = Vec::new(),
        /// What B learns faster than A (LoRA+); 1 is as fast [default: 1]
        loraplus_lr_ratio: f64 = 1.0,
        /// Learning rate of updates of the embedding, with loraplus_lr_ratio [default: 1e-6]
        loraplus_lr_embedding: f64 = 1e-6,

        /// Highest learning rate [default: sft 2e-4, reward 1e-4, dpo 2e-5, ppo and grpo 1e-5]
        learning_rate: f64 = 2e-4,
        /// Shape of the learning rate; warmup_stable_decay falls in the last fifth [default: cosine; ppo and grpo linear]
        lr_scheduler_type: ScheduleKind = ScheduleKind::Cosine,
        /// Share of all steps that warm up [default: 0.03; ppo and grpo 0]
        warmup_ratio: f64 = 0.03,
        /// Steps that warm up, instead of warmup_ratio when above 0 [default: 0]
        warmup_steps: u64 = 0,
        /// AdamW's weight decay [default: 0]
        weight_decay: f64 = 0.0,
        /// AdamW's decay of the mean gradient [default: 0.9]
        adam_beta1: f64 = 0.9,
        /// AdamW's decay of the mean squared gradient [default: 0.999]
        adam_beta2: f64 = 0.999,
        /// AdamW's epsilon [default: 1e-8]
        adam_epsilon: f64 = 1e-8,
        /// Gradients are scaled down to this norm; 0 is off [default: 1]
        max_grad_norm: f64 = 1.0,
        /// What a micro-batch holds: packed bins (or rows, without packing) of sft [default: 1],
        /// comparisons of reward and dpo [default: 8], responses of ppo and grpo [default: 8]
        per_device_train_batch_size: usize = 1,
        /// Passes over the data [default: 1]
        num_train_epochs: f64 = 1.0,
        /// Steps, instead of num_train_epochs when above 0 [default: 0]
        max_steps: u64 = 0,
        /// Tokens of an example and of a packed bin: a longer `text` is split into several, longer
        /// `messages`, `prompt`/`completion`, `input_ids` rows and dpo's responses are cut at their end;
        /// comparisons of reward that are longer are left out, prompts of ppo and grpo refused [default: 1024]
        max_length: usize = 1024,
        /// A Jinja file in the place of the model's own chat template
        chat_template: PathBuf = PathBuf::new(),
        /// A variable of the chat template, as KEY=JSON: enable_thinking=false; may be given again
        #[arg(value_name = "KEY=JSON")]
        chat_template_kwargs: Vec<String> = Vec::new(),
        /// The day, YYYY-MM-DD, that a chat template with a date shows [default: the day the run begins]
        template_date: String = String::new(),
        /// What may be wrong with rows, which `quantune data` names: it neither stops the run nor is
        /// told; rows that cannot be read are left out
        #[arg(value_delimiter = ',', value_name = "CHECK")]
        allow: Vec<Check> = Vec::new(),
        /// Size of a file, as 64MB, from which its tokens are kept on disk and not in memory; runs that
        /// share a cache make them once for the same tokenizer, template (and day, where it shows one)
        /// and lengths [default: 64MB]
        cache_from: String = "64MB".into(),
        /// Where they are kept; to clear it, remove it [default: DIR/rows]
        cache: PathBuf = PathBuf::new(),
        /// Rows in the order of the file [default: false]
        #[arg(num_args = 0..=1, default_missing_value = "true")]
        no_shuffle: bool = false,
        /// Memory the run may take, as 600MB or 2GiB: layers that do not fit are recomputed in the
        /// backward pass, which costs up to a third more time [default: 70 % of what is free]
        memory_budget: String = String::new(),
        /// Recompute all layers, or with false none, whatever the memory budget says
        #[arg(num_args = 0..=1, default_missing_value = "true")]
        gradient_checkpointing: Option<bool> = None,
        /// Seed of initialization, order and dropout [default: 42]
        seed: u64 = 42,
        /// Precision of products: int16 (block-floating, nearly twice f32's speed), int8 (faster still,
        /// and too rough to train with), f32 (exact), or portable, which is --backend reference
        /// [default: int16; f32 with --backend reference]
        compute: ComputeSetting = ComputeSetting::Precision(Precision::Int16),
        /// What computes: cpu (kernels for the CPU), or reference (plain candle ops in f32: slow, and the
        /// only backend of other devices than the CPU) [default: cpu; reference on another device]
        backend: BackendKind = BackendKind::Cpu,
        /// Where products are computed: cpu, cuda, cuda:N or metal; the others than cpu are of builds
        /// with the feature of that name [default: cpu]
        device: DeviceName = DeviceName::Cpu,
        /// Quantize the matrices of a --base folder on load, one after the other, to a GGUF's type as
        /// Q8_0 or Q4_K [default: they stay as they are stored]
        #[arg(value_name = "TYPE")]
        load_type: String = String::new(),

        /// When held-out rows are evaluated; by default epoch with --eval-data, else no
        eval_strategy: Option<EvalStrategy> = None,
        /// Steps between evaluations with --eval-strategy steps [default: 100]
        eval_steps: u64 = 100,
        /// Steps between checkpoints [default: 100]
        save_steps: u64 = 100,
        /// Checkpoints kept, the best besides where it is looked for; 0 keeps all [default: 2]
        save_total_limit: usize = 2,
        /// Evaluations without a better one after which the run ends; 0 never ends it [default: 0]
        early_stopping_patience: u64 = 0,
        /// By how much the metric must be better to count [default: 0]
        early_stopping_threshold: f64 = 0.0,
        /// What says which evaluation is better, with or without its eval_ [default: loss; ppo and grpo reward]
        metric_for_best_model: String = "loss".into(),
        /// Whether more of it is better [default: unless its name ends in loss]
        greater_is_better: Option<bool> = None,
        /// At the end take the adapter of the best evaluation, not the last [default: false]
        #[arg(num_args = 0..=1, default_missing_value = "true")]
        load_best_model_at_end: bool = false,
    }
}

settings! {
    /// What supervised fine-tuning has of its own.
    SftSettings, SftFlags {
        /// Micro-batches of a step [default: 4]
        gradient_accumulation_steps: usize = 4,
        /// Whether several rows share a bin of max_length tokens [default: true]
        #[arg(num_args = 0..=1, default_missing_value = "true")]
        packing: bool = true,
        /// Size of NEFTune's noise on the embeddings, 5 to 15; 0 is none [default: 0]
        neftune_noise_alpha: f64 = 0.0,
        /// How `instruction`, `input` and `output` are laid out: chat (the first two are what the user
        /// says) or text (Alpaca's own prompt) [default: chat, or text where there is no chat template]
        alpaca_prompt: Option<AlpacaPrompt> = None,
    }
}

settings! {
    /// What training a reward model has of its own.
    RewardSettings, RewardFlags {
        /// Micro-batches of a step [default: 1]
        gradient_accumulation_steps: usize = 1,
        /// Weight of the squared sum of a pair's scores, which keeps them around 0; 0 is off [default: 0]
        center_rewards_coefficient: f64 = 0.0,
    }
}

settings! {
    /// What preference optimization has of its own.
    DpoSettings, DpoFlags {
        /// Micro-batches of a step [default: 1]
        gradient_accumulation_steps: usize = 1,
        /// The loss: sigmoid (DPO), ipo, hinge, orpo, simpo, or kto (rows of `prompt`, `completion` and
        /// `label`) [default: sigmoid]
        loss_type: PreferenceLossType = PreferenceLossType::Sigmoid,
        /// How strongly the policy is held to the reference; of orpo the weight of the odds ratio, of
        /// simpo the scale of the rewards [default: 0.1]
        beta: f64 = 0.1,
        /// Probability that a comparison is the wrong way round (sigmoid and simpo) [default: 0]
        label_smoothing: f64 = 0.0,
        /// Compare with nothing instead of a reference model (sigmoid, ipo and hinge) [default: false]
        #[arg(num_args = 0..=1, default_missing_value = "true")]
        reference_free: bool = false,
        /// An adapter that makes the reference, instead of the bare base; by default --adapter, if given
        ref_adapter: PathBuf = PathBuf::new(),
        /// How far apart simpo wants the rewards [default: 0.5]
        simpo_gamma: f64 = 0.5,
        /// Weight of kto's good completions [default: 1]
        desirable_weight: f64 = 1.0,
        /// Weight of kto's bad completions [default: 1]
        undesirable_weight: f64 = 1.0,
    }
}

string_enum! {
    /// Which adapter the value head sits on.
    #[derive(Debug)]
    pub enum ValueModel {
        /// On one of its own: the values of a state cannot disturb the policy.
        Own = "own",
        /// On the policy's: one pass serves both, at half the time and memory.
        Policy = "policy",
    }
}

settings! {
    /// What proximal policy optimization has of its own.
    PpoSettings, PpoFlags {
        /// The reward model: an adapter with a score head on the same base, as `reward` makes it
        reward_adapter: PathBuf = PathBuf::new(),
        /// A second reward model, not trained against: it is read in evaluations and named when it
        /// falls while the reward rises
        judge_adapter: PathBuf = PathBuf::new(),
        /// An adapter that makes the reference, instead of the bare base; by default --adapter, if given
        ref_adapter: PathBuf = PathBuf::new(),
        /// Where the value head sits: own (an adapter of its own) or policy (the policy's) [default: own]
        value_model: ValueModel = ValueModel::Own,
        /// What the value adapter begins from: an adapter with a score head; by default --reward-adapter
        value_adapter: PathBuf = PathBuf::new(),
        /// Held-out accuracy a reward model must have had in its training; 0 asks for none [default: 0.6]
        min_reward_accuracy: f64 = 0.6,

        /// Prompts of an update [default: 32]
        batch_size: usize = 32,
        /// Parts that an update's responses are split into, an optimizer step each [default: 1]
        num_mini_batches: usize = 1,
        /// Passes over the responses of an update [default: 4]
        num_ppo_epochs: usize = 4,
        /// Tokens a response may have [default: 53]
        response_length: usize = 53,
        /// Temperature of sampling, and of the policy that is trained [default: 0.7]
        temperature: f64 = 0.7,
        /// Only the k likeliest tokens are sampled: the reference knows nothing of it; 0 is off [default: 0]
        top_k: usize = 0,
        /// Only the likeliest tokens that together have this probability are sampled, as top_k; 1 is off [default: 1]
        top_p: f64 = 1.0,
        /// Taken off the score of a response that does not end by itself [default: 0]
        missing_eos_penalty: f64 = 0.0,
        /// Whether a response that does not end by itself is scored as if it ended there [default: true]
        #[arg(num_args = 0..=1, default_missing_value = "true")]
        score_at_eos: bool = true,

        /// Weight of the divergence from the reference in the reward [default: 0.05]
        kl_coef: f64 = 0.05,
        /// Its estimate for a token: k1 (unbiased) or k3 (never negative; Schulman 2020) [default: k1]
        kl_estimator: KlEstimator = KlEstimator::K1,
        /// Divergence of a response, in nats, that kl_coef is steered to (Ziegler et al. 2019); 0 keeps
        /// kl_coef as it is [default: 0]
        target_kl: f64 = 0.0,
        /// Responses over which the steering acts [default: 10000]
        kl_horizon: f64 = 10000.0,
        /// Discount of rewards to come [default: 1]
        gamma: f64 = 1.0,
        /// Lambda of the generalized advantage estimate [default: 0.95]
        lam: f64 = 0.95,
        /// Whether rewards are divided by their standard deviation [default: false]
        #[arg(num_args = 0..=1, default_missing_value = "true")]
        whiten_rewards: bool = false,
        /// Whether scores are brought to mean 0 and deviation 1 by those so far [default: false]
        #[arg(num_args = 0..=1, default_missing_value = "true")]
        normalize_scores: bool = false,
        /// Scores beyond are cut off, after normalizing; 0 is off [default: 0]
        clip_scores: f64 = 0.0,
        /// How far a step may move a token's probability, as a ratio [default: 0.2]
        cliprange: f64 = 0.2,
        /// How far a step may move a value [default: 0.2]
        cliprange_value: f64 = 0.2,
        /// Weight of the value loss [default: 0.1]
        vf_coef: f64 = 0.1,
        /// Rows of text to keep predicting (PPO-ptx, Ouyang et al. 2022), as --data of sft
        ptx_data: PathBuf = PathBuf::new(),
        /// Weight of their loss [default: 1]
        ptx_coef: f64 = 1.0,

        /// Prompts of --eval-data that an evaluation answers; 0 takes all [default: 64]
        eval_prompts: usize = 64,
        /// Rows decoded at once [default: 16]
        rollout_slots: usize = 16,
        /// Updates between tables of sampled responses on stderr and in samples.jsonl; 0 is off [default: 10]
        sample_steps: u64 = 10,
        /// Responses of such a table [default: 4]
        num_samples: usize = 4,
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

settings! {
    /// What group-relative policy optimization has of its own.
    GrpoSettings, GrpoFlags {
        /// Reward: exact:FIELD, contains:FIELD, numeric:FIELD, regex:PATTERN, json-schema:FILE or
        /// length:MIN-MAX; may be given again
        #[arg(num_args = 1..)]
        reward: Vec<String> = Vec::new(),
        /// Reward: a program that reads JSON lines of `prompt`, `completion` and the row's own fields,
        /// and answers each with {"reward": NUMBER}; may be given again
        #[arg(num_args = 1..)]
        reward_command: Vec<String> = Vec::new(),
        /// Seconds such a program has for the responses of an update [default: 60]
        reward_timeout: f64 = 60.0,
        /// Reward: an adapter with a score head on the same base, as `reward` makes it
        reward_adapter: PathBuf = PathBuf::new(),
        /// Reward: a Hugging Face sequence classifier with one label, a model folder of its own
        reward_model: PathBuf = PathBuf::new(),
        /// Weights of the rewards, in the order --reward, --reward-command, --reward-adapter,
        /// --reward-model [default: 1 each]
        #[arg(value_delimiter = ',', num_args = 1.., allow_hyphen_values = true)]
        reward_weights: Vec<f64> = Vec::new(),
        /// Held-out accuracy a reward adapter must have had in its training; 0 asks for none [default: 0.6]
        min_reward_accuracy: f64 = 0.6,
        /// An adapter that makes the reference, instead of the bare base; by default --adapter, if given
        ref_adapter: PathBuf = PathBuf::new(),

        /// Prompts of an update [default: 4]
        batch_size: usize = 4,
        /// Responses to a prompt, which are compared with one another [default: 8]
        num_generations: usize = 8,
        /// Passes over the responses of an update [default: 1]
        num_iterations: usize = 1,
        /// Parts that an update's responses are split into, an optimizer step each [default: 1]
        num_mini_batches: usize = 1,
        /// Tokens a response may have [default: 256]
        max_completion_length: usize = 256,
        /// Temperature of sampling, and of the policy that is trained [default: 1]
        temperature: f64 = 1.0,
        /// Only the k likeliest tokens are sampled; 0 is off [default: 0]
        top_k: usize = 0,
        /// Only the likeliest tokens that together have this probability are sampled; 1 is off [default: 1]
        top_p: f64 = 1.0,
        /// Whether a response that does not end by itself is scored as if it ended there [default: true]
        #[arg(num_args = 0..=1, default_missing_value = "true")]
        score_at_eos: bool = true,

        /// What a response is compared with: grpo (the mean of its group, token by token) or rloo (the
        /// mean of the others, as one action; beta then weighs the divergence in the reward) [default: grpo]
        advantage: AdvantageEstimator = AdvantageEstimator::Grpo,
        /// What grpo's advantages are divided by: the deviation of the group, of the whole batch, or
        /// none (Dr. GRPO) [default: group]
        scale_rewards: ScaleRewards = ScaleRewards::Group,
        /// How tokens are averaged: grpo (a response counts as one), bnpo (a token counts as one), or
        /// dr_grpo (by max_completion_length) [default: bnpo]
        loss_type: LossForm = LossForm::Bnpo,
        /// Weight of the divergence from the reference in the loss; 0 needs no reference [default: 0]
        beta: f64 = 0.0,
        /// How far a step may lower a token's probability, as a ratio [default: 0.2]
        epsilon: f64 = 0.2,
        /// How far it may raise it (Clip-Higher of DAPO, Yu et al. 2025); 0 takes epsilon [default: 0]
        epsilon_high: f64 = 0.0,
        /// Leave responses that do not end by themselves out of the loss (DAPO) [default: false]
        #[arg(num_args = 0..=1, default_missing_value = "true")]
        mask_truncated_completions: bool = false,

        /// Prompts of --eval-data that an evaluation answers; 0 takes all [default: 64]
        eval_prompts: usize = 64,
        /// Rows decoded at once [default: 16]
        rollout_slots: usize = 16,
        /// Updates between tables of sampled responses on stderr and in samples.jsonl; 0 is off [default: 10]
        sample_steps: u64 = 10,
        /// Responses of such a table [default: 4]
        num_samples: usize = 4,
    }
}

/// What a command has of its own.
#[derive(Debug, Clone, PartialEq)]
pub enum Task {
    /// Supervised fine-tuning.
    Sft(SftSettings),
    /// A reward model.
    Reward(RewardSettings),
    /// Preference optimization.
    Dpo(DpoSettings),
    /// Proximal policy optimization.
    Ppo(PpoSettings),
    /// Group-relative policy optimization.
    Grpo(GrpoSettings),
}

/// The settings of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct RunSettings {
    /// What all commands have.
    pub common: CommonSettings,
    /// What this one adds.
    pub task: Task,
}

impl RunSettings {
    /// The key of `config.toml` that says which command it is of.
    const COMMAND: &str = "command";

    /// A command's defaults.
    pub fn new(command: Command) -> Self {
        let mut common = CommonSettings::default();
        let task = match command {
            Command::Sft => Task::Sft(Default::default()),
            Command::Reward => {
                common.learning_rate = 1e-4;
                common.per_device_train_batch_size = 8;
                Task::Reward(Default::default())
            }
            Command::Dpo => {
                common.learning_rate = 2e-5;
                common.per_device_train_batch_size = 8;
                Task::Dpo(Default::default())
            }
            Command::Ppo | Command::Grpo => {
                common.learning_rate = 1e-5;
                common.per_device_train_batch_size = 8;
                common.lr_scheduler_type = ScheduleKind::Linear;
                common.warmup_ratio = 0.0;
                common.metric_for_best_model = "reward".into();
                match command {
                    Command::Ppo => Task::Ppo(Default::default()),
                    _ => Task::Grpo(Default::default()),
                }
            }
        };
        Self { common, task }
    }

    /// Which command they are for.
    pub fn command(&self) -> Command {
        match &self.task {
            Task::Sft(_) => Command::Sft,
            Task::Reward(_) => Command::Reward,
            Task::Dpo(_) => Command::Dpo,
            Task::Ppo(_) => Command::Ppo,
            Task::Grpo(_) => Command::Grpo,
        }
    }

    /// One flat table, with the command's name.
    pub fn to_table(&self) -> Result<toml::Table, TrainError> {
        let mut table = toml::Table::new();
        table.insert(Self::COMMAND.into(), self.command().name().into());
        let own = match &self.task {
            Task::Sft(own) => toml::Table::try_from(own),
            Task::Reward(own) => toml::Table::try_from(own),
            Task::Dpo(own) => toml::Table::try_from(own),
            Task::Ppo(own) => toml::Table::try_from(own),
            Task::Grpo(own) => toml::Table::try_from(own),
        };
        for part in [toml::Table::try_from(&self.common), own] {
            table.extend(part.map_err(|e| TrainError::Settings(e.to_string()))?);
        }
        // One file is a text, several are a list.
        if let Some(toml::Value::Array(files)) = table.get("data")
            && let [file] = &files[..]
        {
            let file = file.clone();
            table.insert("data".into(), file);
        }
        Ok(table)
    }

    /// A command's defaults, and over them what `table` says. Keys it does not have, and a table
    /// that names another command, are refused.
    pub fn from_table(command: Command, table: toml::Table) -> Result<Self, TrainError> {
        let mut all = Self::new(command).to_table()?;
        if let Some(found) = table.get(Self::COMMAND)
            && found.as_str() != Some(command.name())
        {
            let fault = format!("these are settings of {found}, needed {:?}", command.name());
            return Err(TrainError::Settings(fault));
        }
        let own_keys = Self::keys(command);
        let known = |key: &&String| {
            let key = key.as_str();
            let keys = [&[Self::COMMAND], CommonSettings::KEYS, own_keys];
            keys.iter().any(|keys| keys.contains(&key))
        };
        let unknown: Vec<&str> =
            table.keys().filter(|key| !known(key)).map(String::as_str).collect();
        if !unknown.is_empty() {
            let fault = format!("unknown {} of {}", unknown.join(", "), command.name());
            return Err(TrainError::Settings(fault));
        }
        let mut table = table;
        set_backend(&mut table).map_err(TrainError::Settings)?;
        all.extend(table);
        all.remove(Self::COMMAND);
        if let Some(file @ toml::Value::String(_)) = all.get("data").cloned() {
            all.insert("data".into(), toml::Value::Array(vec![file]));
        }
        let is_common = |key: &String| CommonSettings::KEYS.contains(&key.as_str());
        let (common, own): (toml::Table, toml::Table) =
            all.into_iter().partition(|(key, _)| is_common(key));
        let read = || -> Result<Self, toml::de::Error> {
            let task = match command {
                Command::Sft => Task::Sft(own.try_into()?),
                Command::Reward => Task::Reward(own.try_into()?),
                Command::Dpo => Task::Dpo(own.try_into()?),
                Command::Ppo => Task::Ppo(own.try_into()?),
                Command::Grpo => Task::Grpo(own.try_into()?),
            };
            Ok(Self { common: common.try_into()?, task })
        };
        read().map_err(|e| TrainError::Settings(e.message().to_string()))
    }

    fn keys(command: Command) -> &'static [&'static str] {
        match command {
            Command::Sft => SftSettings::KEYS,
            Command::Reward => RewardSettings::KEYS,
            Command::Dpo => DpoSettings::KEYS,
            Command::Ppo => PpoSettings::KEYS,
            Command::Grpo => GrpoSettings::KEYS,
        }
    }

    /// The folders of all adapters that the run reads, and what they are put on.
    pub fn adapters(&self) -> Result<Vec<PathBuf>, TrainError> {
        let mut folders = vec![self.common.adapter.clone()];
        for text in &self.common.frozen_adapter {
            folders.push(path_and_weight(text).map_err(TrainError::Settings)?.0);
        }
        match &self.task {
            Task::Sft(_) | Task::Reward(_) => {}
            Task::Dpo(own) => folders.push(own.ref_adapter.clone()),
            Task::Ppo(own) => folders.extend([
                own.ref_adapter.clone(),
                own.reward_adapter.clone(),
                own.value_adapter.clone(),
                own.judge_adapter.clone(),
            ]),
            Task::Grpo(own) => {
                folders.extend([own.ref_adapter.clone(), own.reward_adapter.clone()]);
            }
        }
        folders.retain(|folder| !folder.as_os_str().is_empty());
        Ok(folders)
    }

    /// The command that a run's table names.
    pub fn command_of(table: &toml::Table) -> Option<Command> {
        let name = table.get(Self::COMMAND)?.as_str()?;
        Command::ALL.into_iter().find(|command| command.name() == name)
    }

    /// The settings with their paths made absolute: a run goes on from any directory.
    pub fn absolute(&self) -> Result<Self, TrainError> {
        let mut settings = self.clone();
        let common = &mut settings.common;
        let mut paths = vec![
            &mut common.base,
            &mut common.eval_data,
            &mut common.adapter,
            &mut common.out,
            &mut common.chat_template,
            &mut common.cache,
        ];
        paths.extend(common.data.iter_mut().map(|file| &mut file.path));
        match &mut settings.task {
            Task::Sft(_) | Task::Reward(_) => {}
            Task::Dpo(own) => paths.push(&mut own.ref_adapter),
            Task::Ppo(own) => paths.extend([
                &mut own.reward_adapter,
                &mut own.judge_adapter,
                &mut own.ref_adapter,
                &mut own.value_adapter,
                &mut own.ptx_data,
            ]),
            Task::Grpo(own) => {
                for spec in &mut own.reward {
                    if let Some(file) = spec.strip_prefix(SCHEMA_REWARD) {
                        let path = PathBuf::from(file);
                        let made = std::path::absolute(&path);
                        let made = made.map_err(|source| TrainError::Io { path, source })?;
                        *spec = format!("{SCHEMA_REWARD}{}", made.display());
                    }
                }
                paths.extend([&mut own.reward_adapter, &mut own.reward_model, &mut own.ref_adapter])
            }
        }
        for text in &mut common.frozen_adapter {
            let (path, weight) = path_and_weight(text).map_err(TrainError::Settings)?;
            let made = std::path::absolute(&path);
            let made = made.map_err(|source| TrainError::Io { path, source })?;
            *text = format!("{}={weight}", made.display());
        }
        for path in paths.into_iter().filter(|path| !path.as_os_str().is_empty()) {
            let made = std::path::absolute(&*path);
            *path = made.map_err(|source| TrainError::Io { path: path.clone(), source })?;
        }
        Ok(settings)
    }
}

/// The value of `compute` that is another spelling of backend `reference`.
const PORTABLE: &str = "portable";

/// The value of `compute`: a precision, or `portable`. Settings read from a table hold a precision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum ComputeSetting {
    /// A precision of the backend.
    Precision(Precision),
    /// [`BackendKind::Reference`].
    Portable,
}

impl ComputeSetting {
    fn on(self, backend: BackendKind) -> Compute {
        match self {
            Self::Precision(precision) => Compute { backend, precision },
            Self::Portable => Compute::REFERENCE,
        }
    }
}

impl TryFrom<String> for ComputeSetting {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl std::str::FromStr for ComputeSetting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == PORTABLE {
            return Ok(Self::Portable);
        }
        let precision = text.parse().map(Self::Precision);
        precision.map_err(|fault| format!("{fault} or {PORTABLE}"))
    }
}

impl From<ComputeSetting> for String {
    fn from(flag: ComputeSetting) -> Self {
        match flag {
            ComputeSetting::Precision(precision) => precision.to_string(),
            ComputeSetting::Portable => PORTABLE.into(),
        }
    }
}

/// What computes on `device`, from what was given of it.
///
/// # Errors
/// If `compute` is portable and the backend another than the reference.
pub fn resolve_compute(
    device: DeviceName,
    backend: Option<BackendKind>,
    compute: Option<ComputeSetting>,
) -> Result<Compute, String> {
    let backend = match (backend, compute) {
        (Some(backend), Some(ComputeSetting::Portable)) if backend != BackendKind::Reference => {
            return Err(format!(
                "compute is {PORTABLE}, which is backend reference, and backend is {backend}"
            ));
        }
        (_, Some(ComputeSetting::Portable)) => BackendKind::Reference,
        (backend, _) => backend.unwrap_or(device.default_backend()),
    };
    let precision = match compute {
        Some(ComputeSetting::Precision(precision)) => precision,
        Some(ComputeSetting::Portable) | None => backend.default_precision(),
    };
    Ok(Compute { backend, precision })
}

/// Writes backend and precision into a table of settings: the default of one depends on the other,
/// and both on the device. Values that do not parse stay for the caller to report.
fn set_backend(table: &mut toml::Table) -> Result<(), String> {
    fn get<T: std::str::FromStr>(table: &toml::Table, key: &str) -> Result<Option<T>, ()> {
        let Some(value) = table.get(key) else { return Ok(None) };
        value.as_str().and_then(|text| text.parse().ok()).map(Some).ok_or(())
    }
    let given = (get::<DeviceName>(table, "device"), get(table, "backend"), get(table, "compute"));
    let (Ok(device), Ok(backend), Ok(compute)) = given else { return Ok(()) };
    if device.is_none() && backend.is_none() && compute.is_none() {
        return Ok(());
    }
    let keeps_default = compute.is_none();
    let compute = resolve_compute(device.unwrap_or_default(), backend, compute)?;
    table.insert("backend".into(), compute.backend.to_string().into());
    if !keeps_default || compute.backend != BackendKind::Cpu {
        table.insert("compute".into(), compute.precision.to_string().into());
    }
    Ok(())
}

/// What a rule begins with that reads a file.
pub const SCHEMA_REWARD: &str = "json-schema:";

/// Keys that may differ when a run goes on: they change no result.
pub const FREE_ON_RESUME: &[&str] = &[
    "save_total_limit",
    "out",
    "memory_budget",
    "gradient_checkpointing",
    "rollout_slots",
    "reward_timeout",
    "export",
    "export_type",
    "dtype",
    "cache",
    "cache_from",
];

trait Empty {
    fn empty(&self) -> bool;
}

/// Empty lists and paths stay out of the saved file.
fn is_empty<T: Empty>(value: &T) -> bool {
    value.empty()
}

macro_rules! empty {
    ($($type:ty => $empty:expr;)*) => {
        $(impl Empty for $type {
            fn empty(&self) -> bool {
                let empty: fn(&Self) -> bool = $empty;
                empty(self)
            }
        })*
    };
}

empty! {
    PathBuf => |path| path.as_os_str().is_empty();
    Vec<String> => |list| list.is_empty();
    Vec<usize> => |list| list.is_empty();
    Vec<u32> => |list| list.is_empty();
    Vec<f64> => |list| list.is_empty();
    Vec<DataFile> => |list| list.is_empty();
    Vec<Check> => |list| list.is_empty();
    Option<AlpacaPrompt> => |option| option.is_none();
    Option<EvalStrategy> => |option| option.is_none();
    Option<bool> => |option| option.is_none();
    String => |text| text.is_empty();
    usize => |_| false;
    u64 => |_| false;
    f64 => |_| false;
    bool => |_| false;
    ScheduleKind => |_| false;
    ComputeSetting => |_| false;
    BackendKind => |_| false;
    DeviceName => |_| false;
    PreferenceLossType => |_| false;
    ValueModel => |_| false;
    KlEstimator => |_| false;
    AdvantageEstimator => |_| false;
    ScaleRewards => |_| false;
    LossForm => |_| false;
    Preset => |_| false;
    FloatType => |_| false;
}

/// Collects what is out of range.
#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    /// All of them in one sentence, if there are any.
    fn told(self) -> Option<String> {
        (!self.0.is_empty()).then(|| self.0.join("; "))
    }

    fn check(&mut self, fine: bool, fault: String) {
        if !fine {
            self.0.push(fault);
        }
    }

    /// Numbers that are 0 or more.
    fn rates<const N: usize>(&mut self, rates: [(&str, f64, f64); N]) {
        for (name, value, most) in rates {
            let fine = value.is_finite() && value >= 0.0 && value <= most;
            let most = if most < f64::MAX { format!(", at most {most}") } else { String::new() };
            self.check(fine, format!("{name} is {value}, needed 0 or more{most}"));
        }
    }

    /// Counts that are 1 or more.
    fn counts<const N: usize>(&mut self, counts: [(&str, u64); N]) {
        for (name, count) in counts {
            self.check(count > 0, format!("{name} is 0, needed at least 1"));
        }
    }

    fn memory(&mut self, budget: &str) {
        let fine = budget.is_empty() || parse_bytes(budget).is_some();
        self.check(fine, format!("memory_budget is {budget:?}, needed a size like 600MB or 2GiB"));
    }

    fn sampling(&mut self, temperature: f64, top_p: f64) {
        let fine = temperature.is_finite() && temperature > 0.0;
        self.check(fine, format!("temperature is {temperature}, needed more than 0"));
        let fine = top_p > 0.0 && top_p <= 1.0;
        self.check(fine, format!("top_p is {top_p}, needed more than 0 and at most 1"));
    }

    fn mini_batches(&mut self, parts: usize, prompts: usize) {
        let fine = parts <= prompts && prompts.is_multiple_of(parts.max(1));
        let fault = format!(
            "num_mini_batches is {parts}, needed a divisor of the {prompts} prompts of an update"
        );
        self.check(fine, fault);
    }
}

impl RunSettings {
    /// All that is out of range, in one sentence, or `None`.
    pub fn fault(&self) -> Option<String> {
        let mut faults = Faults::default();
        self.common.faults(&mut faults);
        let plain = |files: &[DataFile]| files.len() < 2 && files.iter().all(|f| f.weight == 1.0);
        let fault = "several --data, and weights of them, are of sft: needed one file";
        let mixes = matches!(self.task, Task::Sft(_));
        faults.check(mixes || plain(&self.common.data), fault.into());
        let size = &self.common.cache_from;
        let fault = format!("cache_from is {size:?}, needed a size like 64MB or 1GiB");
        faults.check(parse_bytes(size).is_some(), fault);
        match &self.task {
            Task::Sft(own) => {
                let steps = own.gradient_accumulation_steps as u64;
                faults.counts([("gradient_accumulation_steps", steps)]);
                faults.rates([("neftune_noise_alpha", own.neftune_noise_alpha, f64::MAX)]);
            }
            Task::Reward(own) => {
                let steps = own.gradient_accumulation_steps as u64;
                faults.counts([("gradient_accumulation_steps", steps)]);
                let coefficient = own.center_rewards_coefficient;
                faults.rates([("center_rewards_coefficient", coefficient, f64::MAX)]);
            }
            Task::Dpo(own) => {
                own.faults(&mut faults);
                let rows =
                    self.common.per_device_train_batch_size * own.gradient_accumulation_steps;
                let compares_rows = own.preference().loss.compares_rows();
                let fault = "kto compares the rows of a step: needed at least 2, by \
                             per_device_train_batch_size or gradient_accumulation_steps";
                faults.check(!compares_rows || rows > 1, fault.into());
            }
            Task::Ppo(own) => {
                own.faults(&mut faults);
                let evaluates = match self.common.eval_strategy {
                    Some(strategy) => strategy != EvalStrategy::No,
                    None => !self.common.eval_data.empty(),
                };
                let fault = "judge_adapter is read in evaluations: needed --eval-data or \
                             --eval-strategy";
                faults.check(own.judge_adapter.empty() || evaluates, fault.into());
            }
            Task::Grpo(own) => own.faults(&mut faults),
        }
        faults.told()
    }
}

impl DpoSettings {
    fn faults(&self, faults: &mut Faults) {
        faults.counts([("gradient_accumulation_steps", self.gradient_accumulation_steps as u64)]);
        faults.rates([
            ("label_smoothing", self.label_smoothing, 0.5),
            ("simpo_gamma", self.simpo_gamma, f64::MAX),
            ("desirable_weight", self.desirable_weight, f64::MAX),
            ("undesirable_weight", self.undesirable_weight, f64::MAX),
        ]);
        let beta = self.beta;
        let fine = beta.is_finite() && beta > 0.0;
        faults.check(fine, format!("beta is {beta}, needed more than 0"));
        for (key, losses) in self.keys_of_other_losses() {
            let loss = self.loss_type;
            let losses: Vec<&str> = losses.into_iter().map(StringEnum::name).collect();
            faults.0.push(format!("{key} is of loss_type {}, found {loss}", losses.join(", ")));
        }
        let referenced = self.preference().loss.has_reference();
        let fault = "ref_adapter is given, but this loss has no reference".to_string();
        faults.check(self.ref_adapter.empty() || referenced, fault);
    }

    /// The loss with the parameters it has.
    pub fn preference(&self) -> PreferenceSettings {
        let &Self { label_smoothing, reference_free, simpo_gamma, .. } = self;
        let &Self { desirable_weight, undesirable_weight, beta, .. } = self;
        let loss = match self.loss_type {
            PreferenceLossType::Sigmoid => {
                PreferenceLoss::Sigmoid { label_smoothing, reference_free }
            }
            PreferenceLossType::Hinge => PreferenceLoss::Hinge { reference_free },
            PreferenceLossType::Ipo => PreferenceLoss::Ipo { reference_free },
            PreferenceLossType::Orpo => PreferenceLoss::Orpo,
            PreferenceLossType::SimPo => PreferenceLoss::SimPo { simpo_gamma, label_smoothing },
            PreferenceLossType::Kto => PreferenceLoss::Kto { desirable_weight, undesirable_weight },
        };
        PreferenceSettings { loss, beta }
    }

    /// Keys that are set, but that only other losses have, with these: a loss has a key that changes
    /// what [`Self::preference`] returns.
    fn keys_of_other_losses(&self) -> Vec<(&'static str, Vec<PreferenceLossType>)> {
        let table = |settings: &Self| toml::Table::try_from(settings).unwrap_or_default();
        let (set, plain) = (table(self), table(&Self::default()));
        let with = |loss_type: PreferenceLossType, key: &str, value: Option<&toml::Value>| {
            let mut table = plain.clone();
            table.extend(value.map(|value| (key.to_string(), value.clone())));
            let settings: Self = table.try_into().unwrap_or_default();
            Self { loss_type, ..settings }.preference()
        };
        let mut found = Vec::new();
        for &key in Self::KEYS.iter().filter(|&&key| set.get(key) != plain.get(key)) {
            let has = |&loss: &PreferenceLossType| {
                with(loss, key, set.get(key)) != with(loss, key, plain.get(key))
            };
            let losses: Vec<_> = PreferenceLossType::VALUES.iter().copied().filter(has).collect();
            if !losses.is_empty() && !losses.contains(&self.loss_type) {
                found.push((key, losses));
            }
        }
        found
    }
}

impl PpoSettings {
    fn faults(&self, faults: &mut Faults) {
        faults.check(!self.reward_adapter.empty(), "--reward-adapter is missing".into());
        faults.counts([
            ("batch_size", self.batch_size as u64),
            ("num_mini_batches", self.num_mini_batches as u64),
            ("num_ppo_epochs", self.num_ppo_epochs as u64),
            ("response_length", self.response_length as u64),
            ("rollout_slots", self.rollout_slots as u64),
        ]);
        faults.rates([
            ("min_reward_accuracy", self.min_reward_accuracy, 1.0),
            ("missing_eos_penalty", self.missing_eos_penalty, f64::MAX),
            ("kl_coef", self.kl_coef, f64::MAX),
            ("target_kl", self.target_kl, f64::MAX),
            ("gamma", self.gamma, 1.0),
            ("lam", self.lam, 1.0),
            ("clip_scores", self.clip_scores, f64::MAX),
            ("cliprange", self.cliprange, f64::MAX),
            ("cliprange_value", self.cliprange_value, f64::MAX),
            ("vf_coef", self.vf_coef, f64::MAX),
            ("ptx_coef", self.ptx_coef, f64::MAX),
        ]);
        let horizon = self.kl_horizon;
        let fine = horizon.is_finite() && horizon > 0.0;
        faults.check(fine, format!("kl_horizon is {horizon}, needed more than 0"));
        let least = 0.2 * self.batch_size as f64; // else an update could turn kl_coef negative
        let fault = format!("kl_horizon is {horizon}, needed more than {least} with target_kl");
        faults.check(self.target_kl == 0.0 || horizon > least, fault);
        faults.sampling(self.temperature, self.top_p);
        faults.mini_batches(self.num_mini_batches, self.batch_size);
        let own = self.value_model == ValueModel::Own;
        let fault = "value_adapter is given, but value_model is policy".to_string();
        faults.check(own || self.value_adapter.empty(), fault);
    }
}

impl GrpoSettings {
    /// Kinds of reward there are.
    pub fn rewards(&self) -> usize {
        let models = [&self.reward_adapter, &self.reward_model];
        let models = models.iter().filter(|path| !path.empty()).count();
        self.reward.len() + self.reward_command.len() + models
    }

    fn faults(&self, faults: &mut Faults) {
        let (rewards, weights) = (self.rewards(), self.reward_weights.len());
        let fault = "no reward is given: needed --reward, --reward-command, --reward-adapter or \
                     --reward-model";
        faults.check(rewards > 0, fault.into());
        let fault = format!("reward_weights has {weights} numbers for {rewards} rewards");
        faults.check(weights == 0 || weights == rewards, fault);
        let fine = self.reward_weights.iter().all(|weight| weight.is_finite());
        faults.check(fine, "reward_weights are not all finite".into());
        faults.counts([
            ("batch_size", self.batch_size as u64),
            ("num_iterations", self.num_iterations as u64),
            ("num_mini_batches", self.num_mini_batches as u64),
            ("max_completion_length", self.max_completion_length as u64),
            ("rollout_slots", self.rollout_slots as u64),
        ]);
        let n = self.num_generations;
        let fault = format!("num_generations is {n}, needed at least 2: responses are compared");
        faults.check(n > 1, fault);
        faults.rates([
            ("reward_timeout", self.reward_timeout, 1e9),
            ("min_reward_accuracy", self.min_reward_accuracy, 1.0),
            ("beta", self.beta, f64::MAX),
            ("epsilon", self.epsilon, f64::MAX),
            ("epsilon_high", self.epsilon_high, f64::MAX),
        ]);
        faults.sampling(self.temperature, self.top_p);
        faults.mini_batches(self.num_mini_batches, self.batch_size); // groups stay whole
        let timeout = self.reward_timeout;
        faults.check(timeout > 0.0, format!("reward_timeout is {timeout}, needed more than 0"));
        if self.advantage == AdvantageEstimator::Rloo {
            let plain = Self::default();
            let fault = |name: &str| format!("{name} is of advantage grpo, found rloo");
            faults.check(self.scale_rewards == plain.scale_rewards, fault("scale_rewards"));
            faults.check(self.loss_type == plain.loss_type, fault("loss_type"));
        }
        let fault = "ref_adapter is given, but beta is 0: there is no reference".to_string();
        faults.check(self.beta > 0.0 || self.ref_adapter.empty(), fault);
    }
}

impl CommonSettings {
    /// The backend and its precision.
    pub fn compute(&self) -> Compute {
        self.compute.on(self.backend)
    }

    /// The tokens that are added to the vocabulary.
    pub fn added(&self) -> Result<Vec<AddedTokenSpec>, TextError> {
        AddedTokenSpec::list(&self.add_tokens, &self.add_special_tokens)
    }

    /// Whether evaluations are compared.
    pub fn seeks_best(&self) -> bool {
        self.early_stopping_patience > 0 || self.load_best_model_at_end
    }

    /// How they are, as transformers does it.
    pub fn best(&self) -> BestSettings {
        let name = &self.metric_for_best_model;
        let metric = if name.starts_with(EVAL) { name.clone() } else { format!("{EVAL}{name}") };
        BestSettings {
            greater: self.greater_is_better.unwrap_or(!metric.ends_with("loss")),
            metric,
            threshold: self.early_stopping_threshold,
            patience: self.early_stopping_patience,
        }
    }

    /// The file of a command that takes one.
    pub fn data_file(&self) -> &Path {
        self.data.first().map_or(Path::new(""), |file| &file.path)
    }

    fn faults(&self, faults: &mut Faults) {
        let given = [("base", !self.base.empty()), ("data", !self.data.empty())];
        for (name, given) in given.into_iter().chain([("out", !self.out.empty())]) {
            faults.check(given, format!("--{name} is missing"));
        }
        faults.rates([
            ("learning_rate", self.learning_rate, f64::MAX),
            ("weight_decay", self.weight_decay, f64::MAX),
            ("max_grad_norm", self.max_grad_norm, f64::MAX),
            ("adam_epsilon", self.adam_epsilon, f64::MAX),
            ("num_train_epochs", self.num_train_epochs, 1e5),
            ("warmup_ratio", self.warmup_ratio, 1.0),
        ]);
        let ratio = self.loraplus_lr_ratio;
        let fine = ratio.is_finite() && ratio > 0.0;
        faults.check(fine, format!("loraplus_lr_ratio is {ratio}, needed more than 0"));
        faults.rates([("loraplus_lr_embedding", self.loraplus_lr_embedding, f64::MAX)]);
        let own = self.loraplus_lr_embedding != Self::default().loraplus_lr_embedding;
        let fault = "loraplus_lr_embedding is given, but loraplus_lr_ratio is 1: no LoRA+".into();
        faults.check(!own || ratio != 1.0, fault);
        for (name, beta) in [("adam_beta1", self.adam_beta1), ("adam_beta2", self.adam_beta2)] {
            faults.check((0.0..1.0).contains(&beta), format!("{name} is {beta}, needed in [0, 1)"));
        }
        faults.counts([
            ("per_device_train_batch_size", self.per_device_train_batch_size as u64),
            ("eval_steps", self.eval_steps),
            ("save_steps", self.save_steps),
        ]);
        faults.rates([("early_stopping_threshold", self.early_stopping_threshold, f64::MAX)]);
        let evaluates = match self.eval_strategy {
            Some(strategy) => strategy != EvalStrategy::No,
            None => !self.eval_data.empty(),
        };
        let fault = "early_stopping_patience and load_best_model_at_end compare evaluations: \
                     needed --eval-data or --eval-strategy";
        faults.check(!self.seeks_best() || evaluates, fault.into());
        for (key, set) in [
            ("early_stopping_threshold", self.early_stopping_threshold != 0.0),
            ("greater_is_better", self.greater_is_better.is_some()),
        ] {
            let fault = "needs early_stopping_patience or load_best_model_at_end";
            faults.check(!set || self.seeks_best(), format!("{key} {fault}"));
        }
        faults.check(self.adam_epsilon as f32 > 0.0, "adam_epsilon is no positive f32".into());
        faults.memory(&self.memory_budget);
        if let Err(fault) = self.device.check(self.compute()) {
            faults.0.push(fault.to_string());
        }
        if let Err(fault) = self.added() {
            faults.0.push(fault.to_string());
        }
        let p = self.lora_dropout;
        faults.check((0.0..1.0).contains(&p), format!("lora_dropout is {p}, needed in [0, 1)"));
        let seed = self.seed;
        faults.check(i64::try_from(seed).is_ok(), format!("seed is {seed}, needed below 2^63"));
        if !self.adapter.empty() {
            let plain = Self::default();
            let own = [
                ("r", self.r != plain.r),
                ("lora_alpha", self.lora_alpha != plain.lora_alpha),
                ("target_modules", self.target_modules != plain.target_modules),
                ("exclude_modules", self.exclude_modules != plain.exclude_modules),
                ("rank_pattern", self.rank_pattern != plain.rank_pattern),
                ("alpha_pattern", self.alpha_pattern != plain.alpha_pattern),
                ("layers_to_transform", self.layers_to_transform != plain.layers_to_transform),
                ("layers_pattern", self.layers_pattern != plain.layers_pattern),
                ("use_rslora", self.use_rslora != plain.use_rslora),
                ("use_dora", self.use_dora != plain.use_dora),
                ("init_lora_weights", self.init_lora_weights != plain.init_lora_weights),
                ("loftq_base", self.loftq_base != plain.loftq_base),
                ("modules_to_save", self.modules_to_save != plain.modules_to_save),
                (
                    "trainable_token_indices",
                    self.trainable_token_indices != plain.trainable_token_indices,
                ),
            ];
            for (name, _) in own.iter().filter(|(_, set)| *set) {
                faults.check(
                    false,
                    format!("{name} is the adapter's own with --adapter, not to be set"),
                );
            }
        }
        faults.check(
            self.max_length > 1,
            format!("max_length is {}, needed 2 or more", self.max_length),
        );
        let some = self.max_steps > 0 || self.num_train_epochs > 0.0;
        faults.check(
            some,
            "num_train_epochs and max_steps are both 0: nothing would be trained".into(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_survive_the_file() {
        for command in Command::ALL {
            let mut settings = RunSettings::new(command);
            settings.common.data = vec!["a.jsonl".into()];
            settings.common.target_modules = vec!["q_proj".into()];
            settings.common.eval_strategy = Some(EvalStrategy::Steps);
            settings.common.learning_rate = 3e-7;
            let text = toml::to_string(&settings.to_table().unwrap()).unwrap();
            let table: toml::Table = toml::from_str(&text).unwrap();
            assert_eq!(RunSettings::command_of(&table), Some(command));
            assert_eq!(RunSettings::from_table(command, table).unwrap(), settings);
            assert!(text.contains("data = \"a.jsonl\""), "{text}");
            settings.common.data.push("b.jsonl=0.5".parse().unwrap());
            let table = toml::from_str(&toml::to_string(&settings.to_table().unwrap()).unwrap());
            assert_eq!(RunSettings::from_table(command, table.unwrap()).unwrap(), settings);
            assert_eq!(
                settings.fault().unwrap().contains("several --data"),
                command != Command::Sft
            );
            assert!(!text.contains("exclude_modules"), "{text}");
        }
    }

    #[test]
    fn keys_of_others_are_refused() {
        let refused = |command, text: &str| {
            let table = toml::from_str(text).unwrap();
            RunSettings::from_table(command, table).unwrap_err().to_string()
        };
        assert_eq!(refused(Command::Sft, "learning_rat = 1.0"), "unknown learning_rat of sft");
        assert_eq!(refused(Command::Sft, "beta = 1.0\nlam = 1"), "unknown beta, lam of sft");
        assert!(refused(Command::Dpo, "command = 'sft'").contains("settings of \"sft\""));
        assert!(refused(Command::Dpo, "beta = 'x'").contains("invalid type"));
    }

    /// `portable` is a spelling of the reference backend, in files of earlier versions too.
    #[test]
    fn backend_and_precision_default_to_each_other() {
        let read = |text: &str| {
            let settings = RunSettings::from_table(Command::Sft, toml::from_str(text).unwrap());
            settings.map(|settings| {
                let saved = settings.to_table().unwrap();
                let saved = ["compute", "backend"].map(|key| saved[key].as_str().unwrap().into());
                (settings.common.compute(), saved)
            })
        };
        let check = |text: &str, compute, saved: [&str; 2]| {
            assert_eq!(read(text).unwrap(), (compute, saved.map(String::from)), "{text}");
        };
        check("", Compute::INT16, ["int16", "cpu"]);
        check("compute = 'int8'", Compute::INT8, ["int8", "cpu"]);
        check("backend = 'cpu'", Compute::INT16, ["int16", "cpu"]);
        for text in [
            "compute = 'portable'",
            "backend = 'reference'",
            "compute = 'f32'\nbackend = 'reference'",
            "compute = 'portable'\nbackend = 'reference'",
            "device = 'metal'",
            "device = 'cuda:1'\ncompute = 'portable'",
        ] {
            check(text, Compute::REFERENCE, ["f32", "reference"]);
        }
        let error = read("compute = 'portable'\nbackend = 'cpu'").unwrap_err().to_string();
        let needed = "compute is portable, which is backend reference, and backend is cpu";
        assert!(error.contains(needed), "{error}");
        let coarse = read("compute = 'int16'\nbackend = 'reference'").unwrap().0;
        let fault = DeviceName::Cpu.check(coarse).unwrap_err().to_string();
        assert_eq!(fault, "compute is int16, which backend reference does not have: needed f32");
    }

    #[test]
    fn all_faults_are_told_at_once() {
        let mut settings = RunSettings::new(Command::Ppo);
        settings.common.save_steps = 0;
        settings.common.adam_beta1 = 1.0;
        let Task::Ppo(own) = &mut settings.task else { panic!() };
        (own.num_mini_batches, own.gamma) = (5, 2.0);
        let fault = settings.fault().unwrap();
        for words in [
            "--base",
            "--data",
            "--out",
            "save_steps",
            "adam_beta1",
            "--reward-adapter is missing",
            "num_mini_batches is 5",
            "gamma is 2",
        ] {
            assert!(fault.contains(words), "{words}: {fault}");
        }
    }
}
