//! All settings of a training run, each defined once: flag, key of the TOML file, default and help text.
//! Names are PEFT's, TRL's and transformers'.
//!
//! [`CommonSettings`] are shared by all training commands; each command adds its own. In a file they are
//! one flat table.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::TrainError;
use super::best::BestSettings;
use super::metrics::EVAL;
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
    /// When held-out rows are evaluated.
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
    /// Preference optimization without a reward model: DPO and its variants.
    Dpo,
    /// Proximal policy optimization against a reward model.
    Ppo,
    /// Group-relative policy optimization against rewards of any kind.
    Grpo,
}

impl Command {
    /// All commands.
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

/// What every part of a run's settings can do; made by [`settings_struct!`] of a list.
pub trait SettingsPart {
    /// The keys, in the order of the list.
    fn keys() -> Vec<&'static str>;

    /// Sets a key; `false` if this part has no such key.
    ///
    /// # Errors
    /// If the value does not fit the key.
    fn set(&mut self, key: &str, value: toml::Value) -> Result<bool, TrainError>;

    /// Writes all keys that are set.
    ///
    /// # Errors
    /// If a value has no TOML form.
    fn write(&self, table: &mut toml::Table) -> Result<(), TrainError>;

    /// Calls `visit` for every path.
    ///
    /// # Errors
    /// Those of `visit`.
    fn visit_paths(&mut self, visit: &mut PathVisitor) -> Result<(), TrainError>;

    /// The files and folders that must not change between start and resume of a run, with what they are.
    ///
    /// # Errors
    /// None; paths are visited as [`Self::visit_paths`] does.
    fn fingerprinted(&self) -> Result<Vec<(String, PathBuf)>, TrainError>;
}

/// Makes a struct of a list of settings. Each setting has its help text, a name (the key of the TOML
/// file and, with `-` for `_`, the flag), a type and a default. `#[flag(..)]` says how the flag is
/// written; `#[fingerprint = "what"]` marks files that must not change between start and resume of a run.
/// `..group: Settings, Flags = default` takes in the settings of another list.
macro_rules! settings_struct {
    ($(#[doc = $about:literal])* $settings:ident, $flags:ident {
        $($(#[doc = $doc:literal])+ $(#[flag($($flag:tt)*)])? $(#[fingerprint = $what:literal])?
        $name:ident: $type:ty = $default:expr,)*
        $(..$group:ident: $group_type:ident, $group_flags:ident = $group_default:expr,)*
    }) => {
        $(#[doc = $about])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $settings {
            $($(#[doc = $doc])+ pub $name: $type,)*
            $(#[doc = concat!("Shared settings, see [`", stringify!($group_type), "`].")]
            pub $group: $group_type,)*
        }

        impl Default for $settings {
            fn default() -> Self {
                Self { $($name: $default,)* $($group: $group_default,)* }
            }
        }

        impl SettingsPart for $settings {
            fn keys() -> Vec<&'static str> {
                #[allow(unused_mut)]
                let mut keys = vec![$(stringify!($name)),*];
                $(keys.extend($group_type::keys());)*
                keys
            }

            fn set(&mut self, key: &str, value: toml::Value) -> Result<bool, TrainError> {
                $(if key == stringify!($name) {
                    self.$name = read_value(key, value)?;
                    return Ok(true);
                })*
                $(if self.$group.set(key, value.clone())? {
                    return Ok(true);
                })*
                Ok(false)
            }

            fn write(&self, table: &mut toml::Table) -> Result<(), TrainError> {
                $(write_value(stringify!($name), &self.$name, table)?;)*
                $(self.$group.write(table)?;)*
                Ok(())
            }

            fn visit_paths(&mut self, visit: &mut PathVisitor) -> Result<(), TrainError> {
                $(self.$name.visit_paths(visit)?;)*
                $(self.$group.visit_paths(visit)?;)*
                Ok(())
            }

            fn fingerprinted(&self) -> Result<Vec<(String, PathBuf)>, TrainError> {
                #[allow(unused_mut)]
                let mut found = Vec::new();
                $($(add_fingerprinted($what, &self.$name, &mut found)?;)?)*
                $(found.extend(self.$group.fingerprinted()?);)*
                Ok(found)
            }
        }
    };
}

/// The value of a key.
fn read_value<T: SettingValue>(key: &str, value: toml::Value) -> Result<T, TrainError> {
    value.try_into().map_err(|e: toml::de::Error| {
        let message = e.message();
        TrainError::Settings(format!("{key}: {message}"))
    })
}

/// Writes a key, if it is set.
fn write_value<T: SettingValue>(
    key: &str,
    value: &T,
    table: &mut toml::Table,
) -> Result<(), TrainError> {
    if !value.is_unset() {
        let value =
            toml::Value::try_from(value).map_err(|e| TrainError::Settings(e.to_string()))?;
        table.insert(key.into(), value);
    }
    Ok(())
}

/// Adds the paths of a value; `{}` in `what` is the path.
fn add_fingerprinted<T: SettingValue>(
    what: &str,
    value: &T,
    found: &mut Vec<(String, PathBuf)>,
) -> Result<(), TrainError> {
    value.clone().visit_paths(&mut |path| {
        if !path.as_os_str().is_empty() {
            found.push((what.replace("{}", &path.display().to_string()), path.clone()));
        }
        Ok(())
    })
}

/// Makes a path absolute, unless it is not set.
fn make_absolute(path: &mut PathBuf) -> Result<(), TrainError> {
    if !path.as_os_str().is_empty() {
        let absolute = std::path::absolute(&*path);
        *path = absolute.map_err(|source| TrainError::Io { path: path.clone(), source })?;
    }
    Ok(())
}

mod keys;
mod optimization;
mod pretrain;

pub use keys::{AdapterPath, ByteSize, PathVisitor, RewardRule, SettingValue};
use keys::{OptionalText, Text};
#[cfg(feature = "cli")]
pub(crate) use pretrain::pretrain_settings;
pub use pretrain::{FloatType, Preset, PretrainSettings};

/// The list of [`OptimizerSettings`].
#[rustfmt::skip]
macro_rules! optimizer_settings { ($then:ident) => { $then! {
    /// Settings of optimizer and learning rate, shared by fine-tuning and pretraining. Defaults may differ
    /// by command.
    OptimizerSettings, OptimizerFlags {
        /// Peak learning rate [default: sft 2e-4, reward 1e-4, dpo 2e-5, ppo and grpo 1e-5; pretrain 1e-3]
        learning_rate: f64 = 2e-4,
        /// Learning rate schedule; warmup_stable_decay decays at the end [default: cosine; ppo and grpo linear]
        lr_scheduler_type: ScheduleKind = ScheduleKind::Cosine,
        /// Warm-up fraction: linear warm-up over this fraction of all steps [default: 0.03; ppo and grpo 0; pretrain 0.02]
        warmup_ratio: f64 = 0.03,
        /// Warm-up steps; overrides warmup_ratio when above 0 [default: 0]
        warmup_steps: u64 = 0,
        /// Weight decay of AdamW; pretrain decays only matrices [default: 0; pretrain 0.1]
        weight_decay: f64 = 0.0,
        /// Beta1 of AdamW: decay of the first moment [default: 0.9]
        adam_beta1: f64 = 0.9,
        /// Beta2 of AdamW: decay of the second moment [default: 0.999; pretrain 0.95]
        adam_beta2: f64 = 0.999,
        /// Epsilon of AdamW [default: 1e-8]
        adam_epsilon: f64 = 1e-8,
        /// Gradient clipping: maximum global norm; 0 disables it [default: 1]
        max_grad_norm: f64 = 1.0,
    }
} } }
optimizer_settings!(settings_struct);
#[cfg(feature = "cli")]
pub(crate) use optimizer_settings;

/// The list of [`CommonSettings`].
#[rustfmt::skip]
macro_rules! common_settings { ($then:ident) => { $then! {
    /// Settings shared by all fine-tuning commands. Defaults may differ by command.
    CommonSettings, CommonFlags {
        /// Base model: a GGUF file or a Hugging Face folder
        #[fingerprint = "the base"]
        base: PathBuf = PathBuf::new(),
        /// Training data, JSONL or Parquet. sft: `messages`, `conversations` (ShareGPT),
        /// `instruction`/`output` (Alpaca), `prompt`/`completion`, `text` or `input_ids`; reward and dpo:
        /// `chosen`/`rejected` or ranked `responses`; ppo and grpo: `prompt`. sft accepts several files, and
        /// PATH=WEIGHT to use each row WEIGHT times per epoch
        #[flag(value_name = "PATH[=WEIGHT]")]
        data: Vec<DataFile> = Vec::new(),
        /// Evaluation data; without it, --eval-strategy holds out 1 in 10 rows of --data
        eval_data: PathBuf = PathBuf::new(),
        /// Run directory
        out: PathBuf = PathBuf::new(),
        /// PEFT adapter folder to continue training from, instead of a new adapter
        adapter: PathBuf = PathBuf::new(),
        /// Frozen adapter, active below the trained one and in its reference, PATH or PATH=WEIGHT; can be
        /// repeated
        #[fingerprint = "the frozen adapter {}"]
        frozen_adapter: Vec<Text<AdapterPath>> = Vec::new(),

        /// LoRA rank; the update is (lora_alpha / r) · B · A [default: 16]
        r: usize = 16,
        /// LoRA alpha, the scale of the update [default: 32]
        lora_alpha: f64 = 32.0,
        /// Dropout probability of the LoRA input in training [default: 0]
        lora_dropout: f64 = 0.0,
        /// Modules to adapt: names, one regular expression, or all-linear [default: all-linear]
        #[flag(num_args = 1..)]
        target_modules: Vec<String> = vec!["all-linear".into()],
        /// Modules to exclude: names, or one regular expression
        #[flag(num_args = 1..)]
        exclude_modules: Vec<String> = Vec::new(),
        /// Ranks of matching modules, as REGEX=R
        #[flag(num_args = 1..)]
        rank_pattern: Vec<String> = Vec::new(),
        /// Alphas of matching modules, as REGEX=ALPHA
        #[flag(num_args = 1..)]
        alpha_pattern: Vec<String> = Vec::new(),
        /// Layers to adapt, counted from 0; requires names in target_modules
        #[flag(value_delimiter = ',', num_args = 1..)]
        layers_to_transform: Vec<usize> = Vec::new(),
        /// Names of the module lists that layers_to_transform indexes
        #[flag(value_delimiter = ',', num_args = 1..)]
        layers_pattern: Vec<String> = Vec::new(),
        /// Scale by lora_alpha / sqrt(r) (rsLoRA) [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        use_rslora: bool = false,
        /// Train a magnitude per output row beside the direction (DoRA) [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        use_dora: bool = false,
        /// Initialization: true (A random, B zero), false (both random), gaussian, or computed from the base:
        /// pissa, pissa_niter_N, olora, loftq [default: true]
        init_lora_weights: String = "true".into(),
        /// Base model before quantization, for init_lora_weights loftq
        loftq_base: PathBuf = PathBuf::new(),
        /// Modules to train in full: embed_tokens, lm_head
        #[flag(value_delimiter = ',', num_args = 1..)]
        modules_to_save: Vec<String> = Vec::new(),
        /// Token ids whose embeddings are trained
        #[flag(value_delimiter = ',', num_args = 1..)]
        trainable_token_indices: Vec<u32> = Vec::new(),
        /// Tokens to add to the vocabulary; they match in text before pre-tokenization. Unused rows of the
        /// embedding and lm_head are used first, further rows are initialized with the mean of the base's.
        /// Their rows are trained
        #[flag(value_delimiter = ',', num_args = 1.., value_name = "TOKEN")]
        add_tokens: Vec<String> = Vec::new(),
        /// Special tokens to add to the vocabulary, such as <|tool|>
        #[flag(value_delimiter = ',', num_args = 1.., value_name = "TOKEN")]
        add_special_tokens: Vec<String> = Vec::new(),
        /// LoRA+ ratio: learning rate of B over that of A [default: 1]
        loraplus_lr_ratio: f64 = 1.0,
        /// Learning rate of embedding adapters, with loraplus_lr_ratio [default: 1e-6]
        loraplus_lr_embedding: f64 = 1e-6,

        /// Micro-batch size: packed bins (rows, without packing) for sft [default: 1], comparisons for reward
        /// and dpo [default: 8], responses for ppo and grpo [default: 8]
        per_device_train_batch_size: usize = 1,
        /// Number of epochs [default: 1]
        num_train_epochs: f64 = 1.0,
        /// Optimizer steps; overrides num_train_epochs when above 0 [default: 0]
        max_steps: u64 = 0,
        /// Maximum number of tokens of an example and of a packed bin. A longer `text` is split; longer
        /// `messages`, `prompt`/`completion` and `input_ids` rows and dpo's responses are truncated; longer
        /// comparisons of reward are dropped; longer prompts of ppo and grpo are errors [default: 1024]
        max_length: usize = 1024,
        /// Jinja file that replaces the model's chat template
        #[fingerprint = "the chat template"]
        chat_template: PathBuf = PathBuf::new(),
        /// Variable of the chat template, such as enable_thinking=false; can be repeated
        #[flag(value_name = "KEY=JSON")]
        chat_template_kwargs: Vec<String> = Vec::new(),
        /// Current date in chat templates that print one, YYYY-MM-DD [default: the day the run starts]
        template_date: String = String::new(),
        /// Checks of `quantune data` to ignore; rows that cannot be read are then skipped
        #[flag(value_delimiter = ',', value_name = "CHECK")]
        allow: Vec<Check> = Vec::new(),
        /// Cache the tokens of files of at least this size on disk, instead of in memory; runs that share a
        /// cache tokenize a file once per tokenizer, template (and its date) and length [default: 64MB]
        cache_from: Text<ByteSize> = ByteSize(64_000_000),
        /// Cache directory; delete it to clear the cache [default: DIR/rows]
        cache: PathBuf = PathBuf::new(),
        /// Keep rows in file order [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        no_shuffle: bool = false,
        /// Memory limit, such as 600MB or 2GiB: layers whose activations do not fit are recomputed in the
        /// backward pass, which takes up to a third more time [default: 70 % of free memory]
        memory_budget: OptionalText<ByteSize> = None,
        /// Recompute the activations of all layers (true) or none (false), regardless of memory_budget
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        gradient_checkpointing: Option<bool> = None,
        /// Seed of initialization, order and dropout [default: 42]
        seed: u64 = 42,
        /// Precision of matrix products: int16 (block floating point, nearly twice as fast as f32), int8
        /// (faster, but too imprecise for training), f32, or portable, which means --backend reference
        /// [default: int16; f32 with --backend reference]
        compute: ComputeSetting = ComputeSetting::Precision(Precision::Int16),
        /// Backend: cpu (optimized kernels), or reference (candle ops in f32; slow, but the only backend for
        /// other devices) [default: cpu; reference on other devices]
        backend: BackendKind = BackendKind::Cpu,
        /// Device: cpu, cuda, cuda:N or metal; all but cpu require a build with that feature [default: cpu]
        device: DeviceName = DeviceName::Cpu,
        /// Quantize the matrices of a --base folder on load to a GGUF type, such as Q8_0 or Q4_K [default:
        /// as stored]
        #[flag(value_name = "TYPE")]
        load_type: String = String::new(),

        /// When to evaluate [default: epoch with --eval-data, else no]
        eval_strategy: Option<EvalStrategy> = None,
        /// Steps between evaluations with --eval-strategy steps [default: 100]
        eval_steps: u64 = 100,
        /// Steps between checkpoints [default: 100]
        save_steps: u64 = 100,
        /// Number of checkpoints to keep, besides the best one; 0 keeps all [default: 2]
        save_total_limit: usize = 2,
        /// Early stopping: stop after this many evaluations without improvement; 0 disables it [default: 0]
        early_stopping_patience: u64 = 0,
        /// Minimum change of the metric that counts as an improvement [default: 0]
        early_stopping_threshold: f64 = 0.0,
        /// Metric that selects the best checkpoint, with or without eval_ [default: loss; ppo and grpo reward]
        metric_for_best_model: String = "loss".into(),
        /// Whether a higher metric is better [default: true unless its name ends in loss]
        greater_is_better: Option<bool> = None,
        /// Use the adapter of the best checkpoint at the end, instead of the last [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        load_best_model_at_end: bool = false,
        ..optimizer: OptimizerSettings, OptimizerFlags = OptimizerSettings::default(),
    }
} } }
common_settings!(settings_struct);
#[cfg(feature = "cli")]
pub(crate) use common_settings;

/// The list of [`SftSettings`].
#[rustfmt::skip]
macro_rules! sft_settings { ($then:ident) => { $then! {
    /// Settings of supervised fine-tuning.
    SftSettings, SftFlags {
        /// Micro-batches per step [default: 4]
        gradient_accumulation_steps: usize = 4,
        /// Pack several rows into bins of max_length tokens [default: true]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        packing: bool = true,
        /// NEFTune noise scale, usually 5 to 15; 0 disables it [default: 0]
        neftune_noise_alpha: f64 = 0.0,
        /// Prompt format of `instruction`, `input` and `output` rows: chat (chat template) or text (Alpaca's
        /// own prompt) [default: chat, or text without a chat template]
        alpaca_prompt: Option<AlpacaPrompt> = None,
    }
} } }
sft_settings!(settings_struct);
#[cfg(feature = "cli")]
pub(crate) use sft_settings;

/// The list of [`RewardSettings`].
#[rustfmt::skip]
macro_rules! reward_settings { ($then:ident) => { $then! {
    /// Settings of training a reward model.
    RewardSettings, RewardFlags {
        /// Micro-batches per step [default: 1]
        gradient_accumulation_steps: usize = 1,
        /// Coefficient of the squared sum of the scores of a pair, which centers scores at 0; 0 disables it [default: 0]
        center_rewards_coefficient: f64 = 0.0,
    }
} } }
reward_settings!(settings_struct);
#[cfg(feature = "cli")]
pub(crate) use reward_settings;

/// The list of [`DpoSettings`].
#[rustfmt::skip]
macro_rules! dpo_settings { ($then:ident) => { $then! {
    /// Settings of preference optimization.
    DpoSettings, DpoFlags {
        /// Micro-batches per step [default: 1]
        gradient_accumulation_steps: usize = 1,
        /// Loss: sigmoid (DPO), ipo, hinge, orpo, simpo, or kto (rows of `prompt`, `completion` and `label`)
        /// [default: sigmoid]
        loss_type: PreferenceLossType = PreferenceLossType::Sigmoid,
        /// Strength of the regularization towards the reference; for orpo the weight of the odds ratio loss,
        /// for simpo the reward scale [default: 0.1]
        beta: f64 = 0.1,
        /// Label smoothing: probability that a preference label is wrong (sigmoid and simpo) [default: 0]
        label_smoothing: f64 = 0.0,
        /// Train without a reference model (sigmoid, ipo and hinge) [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        reference_free: bool = false,
        /// Adapter of the reference model [default: --adapter if given, else none]
        #[fingerprint = "the reference adapter"]
        ref_adapter: PathBuf = PathBuf::new(),
        /// Target reward margin of simpo [default: 0.5]
        simpo_gamma: f64 = 0.5,
        /// Weight of desirable completions, for kto [default: 1]
        desirable_weight: f64 = 1.0,
        /// Weight of undesirable completions, for kto [default: 1]
        undesirable_weight: f64 = 1.0,
    }
} } }
dpo_settings!(settings_struct);
#[cfg(feature = "cli")]
pub(crate) use dpo_settings;

string_enum! {
    /// Which adapter the value head is on.
    #[derive(Debug)]
    pub enum ValueModel {
        /// A separate adapter, so that training values does not affect the policy.
        Own = "own",
        /// The policy's adapter: one pass computes both, in half the time and memory.
        Policy = "policy",
    }
}

/// The list of [`RolloutSettings`].
#[rustfmt::skip]
macro_rules! rollout_settings { ($then:ident) => { $then! {
    /// Settings of sampling and scoring responses, shared by ppo and grpo. Defaults may differ by command.
    RolloutSettings, RolloutFlags {
        /// Adapter of the reference model [default: --adapter if given, else none]
        #[fingerprint = "the reference adapter"]
        ref_adapter: PathBuf = PathBuf::new(),
        /// Prompts per update [default: ppo 32, grpo 4]
        batch_size: usize = 4,
        /// Mini-batches per update, with one optimizer step each [default: 1]
        num_mini_batches: usize = 1,
        /// Temperature of sampling and of the trained policy [default: ppo 0.7, grpo 1]
        temperature: f64 = 1.0,
        /// Top-k sampling, which log-probs and KL ignore; 0 disables it [default: 0]
        top_k: usize = 0,
        /// Sample among the most likely tokens that together have this probability (nucleus, top-p); 1 is off [default: 1]
        top_p: f64 = 1.0,
        /// Score a response without an end-of-sequence token as if it had one [default: true]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        score_at_eos: bool = true,
        /// Number of prompts of --eval-data per evaluation; 0 uses all [default: 64]
        eval_prompts: usize = 64,
        /// Number of rows decoded in parallel [default: 16]
        rollout_slots: usize = 16,
        /// Updates between logged samples, on stderr and in samples.jsonl; 0 disables them [default: 10]
        sample_steps: u64 = 10,
        /// Number of responses per logged sample table [default: 4]
        num_samples: usize = 4,
    }
} } }
rollout_settings!(settings_struct);
#[cfg(feature = "cli")]
pub(crate) use rollout_settings;

/// The list of [`PpoSettings`].
#[rustfmt::skip]
macro_rules! ppo_settings { ($then:ident) => { $then! {
    /// Settings of PPO.
    PpoSettings, PpoFlags {
        /// Reward model: an adapter with a score head on the same base, as `reward` writes it
        #[fingerprint = "the reward adapter"]
        reward_adapter: PathBuf = PathBuf::new(),
        /// Second reward model, used only in evaluations; a warning is printed if its score falls while the
        /// reward rises (overoptimization)
        #[fingerprint = "the judge"]
        judge_adapter: PathBuf = PathBuf::new(),
        /// Value head: own (on a separate adapter) or policy (on the policy's adapter) [default: own]
        value_model: ValueModel = ValueModel::Own,
        /// Initial value adapter, with a score head [default: --reward-adapter]
        #[fingerprint = "the value adapter"]
        value_adapter: PathBuf = PathBuf::new(),
        /// Minimum held-out accuracy of the reward model; 0 disables the check [default: 0.6]
        min_reward_accuracy: f64 = 0.6,

        /// Epochs over the responses of an update [default: 4]
        num_ppo_epochs: usize = 4,
        /// Maximum number of tokens of a response [default: 53]
        response_length: usize = 53,
        /// Penalty on the score of a response without an end-of-sequence token [default: 0]
        missing_eos_penalty: f64 = 0.0,

        /// KL coefficient: weight of the KL penalty in the reward [default: 0.05]
        kl_coef: f64 = 0.05,
        /// KL estimator: k1 (unbiased) or k3 (never negative; Schulman 2020) [default: k1]
        kl_estimator: KlEstimator = KlEstimator::K1,
        /// Target KL per response, in nats, for an adaptive kl_coef (Ziegler et al. 2019); 0 keeps kl_coef
        /// constant [default: 0]
        target_kl: f64 = 0.0,
        /// Horizon of the adaptive kl_coef, in responses [default: 10000]
        kl_horizon: f64 = 10000.0,
        /// Discount factor [default: 1]
        gamma: f64 = 1.0,
        /// Lambda of generalized advantage estimation [default: 0.95]
        lam: f64 = 0.95,
        /// Divide rewards by their standard deviation [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        whiten_rewards: bool = false,
        /// Normalize scores by the running mean and standard deviation [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        normalize_scores: bool = false,
        /// Clip scores to this magnitude, after normalization; 0 disables it [default: 0]
        clip_scores: f64 = 0.0,
        /// Clip range of the probability ratio [default: 0.2]
        cliprange: f64 = 0.2,
        /// Clip range of values [default: 0.2]
        cliprange_value: f64 = 0.2,
        /// Weight of the value loss [default: 0.1]
        vf_coef: f64 = 0.1,
        /// Data of an additional language modelling loss (PPO-ptx, Ouyang et al. 2022), as --data of sft
        ptx_data: PathBuf = PathBuf::new(),
        /// Weight of the loss on ptx_data [default: 1]
        ptx_coef: f64 = 1.0,
        ..rollouts: RolloutSettings, RolloutFlags =
            RolloutSettings { batch_size: 32, temperature: 0.7, ..Default::default() },
    }
} } }
ppo_settings!(settings_struct);
#[cfg(feature = "cli")]
pub(crate) use ppo_settings;

string_enum! {
    /// How advantages are computed from the rewards of a group.
    #[derive(Debug)]
    pub enum AdvantageEstimator {
        /// The reward minus the mean of the group (Shao et al. 2024).
        Grpo = "grpo",
        /// The reward minus the mean of the others (Ahmadian et al. 2024).
        Rloo = "rloo",
    }
}

/// The list of [`GrpoSettings`].
#[rustfmt::skip]
macro_rules! grpo_settings { ($then:ident) => { $then! {
    /// Settings of GRPO.
    GrpoSettings, GrpoFlags {
        /// Reward: exact:FIELD, contains:FIELD, numeric:FIELD, regex:PATTERN, json-schema:FILE or
        /// length:MIN-MAX; can be repeated
        #[flag(num_args = 1..)]
        #[fingerprint = "the JSON schema"]
        reward: Vec<Text<RewardRule>> = Vec::new(),
        /// Reward: a program that reads JSON lines with `prompt`, `completion` and the other fields of the
        /// row, and answers each with {"reward": NUMBER}; can be repeated
        #[flag(num_args = 1..)]
        reward_command: Vec<String> = Vec::new(),
        /// Time limit of a reward command per update, in seconds [default: 60]
        reward_timeout: f64 = 60.0,
        /// Reward: an adapter with a score head on the same base, as `reward` writes it
        #[fingerprint = "the reward adapter"]
        reward_adapter: PathBuf = PathBuf::new(),
        /// Reward: a separate model, a folder of a Hugging Face sequence classifier with one label
        #[fingerprint = "the reward model"]
        reward_model: PathBuf = PathBuf::new(),
        /// Weights of the rewards, in the order --reward, --reward-command, --reward-adapter,
        /// --reward-model [default: all 1]
        #[flag(value_delimiter = ',', num_args = 1.., allow_hyphen_values = true)]
        reward_weights: Vec<f64> = Vec::new(),
        /// Minimum held-out accuracy of the reward adapter; 0 disables the check [default: 0.6]
        min_reward_accuracy: f64 = 0.6,

        /// Group size: responses per prompt [default: 8]
        num_generations: usize = 8,
        /// Epochs over the responses of an update [default: 1]
        num_iterations: usize = 1,
        /// Maximum number of tokens of a response [default: 256]
        max_completion_length: usize = 256,

        /// Advantage estimator: grpo (baseline is the group mean; per token) or rloo (baseline is the mean of
        /// the others; per response, with beta as KL penalty in the reward) [default: grpo]
        advantage: AdvantageEstimator = AdvantageEstimator::Grpo,
        /// Scale grpo's advantages by the standard deviation of the group, of the batch, or none (Dr. GRPO)
        /// [default: group]
        scale_rewards: ScaleRewards = ScaleRewards::Group,
        /// Loss normalization: grpo (mean per response), bnpo (mean over tokens), or dr_grpo (divided by
        /// max_completion_length) [default: bnpo]
        loss_type: LossForm = LossForm::Bnpo,
        /// KL coefficient in the loss; 0 uses no reference [default: 0]
        beta: f64 = 0.0,
        /// Clip range of the probability ratio, lower side [default: 0.2]
        epsilon: f64 = 0.2,
        /// Clip range, upper side (Clip-Higher of DAPO, Yu et al. 2025); 0 uses epsilon [default: 0]
        epsilon_high: f64 = 0.0,
        /// Exclude truncated responses from the loss (DAPO) [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        mask_truncated_completions: bool = false,
        ..rollouts: RolloutSettings, RolloutFlags = RolloutSettings::default(),
    }
} } }
grpo_settings!(settings_struct);
#[cfg(feature = "cli")]
pub(crate) use grpo_settings;

/// The settings of one command.
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
    /// Shared settings.
    pub common: CommonSettings,
    /// Settings of the command.
    pub task: Task,
}

impl RunSettings {
    /// The key of `config.toml` that names the command.
    const COMMAND: &str = "command";

    /// A command's defaults.
    pub fn new(command: Command) -> Self {
        let mut common = CommonSettings::default();
        let task = match command {
            Command::Sft => Task::Sft(Default::default()),
            Command::Reward => {
                common.optimizer.learning_rate = 1e-4;
                common.per_device_train_batch_size = 8;
                Task::Reward(Default::default())
            }
            Command::Dpo => {
                common.optimizer.learning_rate = 2e-5;
                common.per_device_train_batch_size = 8;
                Task::Dpo(Default::default())
            }
            Command::Ppo | Command::Grpo => {
                common.optimizer.learning_rate = 1e-5;
                common.per_device_train_batch_size = 8;
                common.optimizer.lr_scheduler_type = ScheduleKind::Linear;
                common.optimizer.warmup_ratio = 0.0;
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
        self.common.write(&mut table)?;
        match &self.task {
            Task::Sft(own) => own.write(&mut table),
            Task::Reward(own) => own.write(&mut table),
            Task::Dpo(own) => own.write(&mut table),
            Task::Ppo(own) => own.write(&mut table),
            Task::Grpo(own) => own.write(&mut table),
        }?;
        // One file is written as a string, several as a list.
        if let Some(toml::Value::Array(files)) = table.get("data")
            && let [file] = &files[..]
        {
            let file = file.clone();
            table.insert("data".into(), file);
        }
        Ok(table)
    }

    /// A command's defaults, overridden by `table`. Unknown keys, and a table that names another command,
    /// are errors.
    pub fn from_table(command: Command, table: toml::Table) -> Result<Self, TrainError> {
        let mut settings = Self::new(command);
        if let Some(found) = table.get(Self::COMMAND)
            && found.as_str() != Some(command.name())
        {
            let fault = format!("these are settings of {found}, needed {:?}", command.name());
            return Err(TrainError::Settings(fault));
        }
        let own_keys = Self::keys(command);
        let known = |key: &&String| {
            let key = key.as_str();
            key == Self::COMMAND || own_keys.contains(&key)
        };
        let unknown: Vec<&str> =
            table.keys().filter(|key| !known(key)).map(String::as_str).collect();
        if !unknown.is_empty() {
            let fault = format!("unknown {} of {}", unknown.join(", "), command.name());
            return Err(TrainError::Settings(fault));
        }
        let mut table = table;
        table.remove(Self::COMMAND);
        set_backend(&mut table).map_err(TrainError::Settings)?;
        if let Some(file @ toml::Value::String(_)) = table.get("data").cloned() {
            table.insert("data".into(), toml::Value::Array(vec![file]));
        }
        for (key, value) in table {
            settings.set(&key, value)?;
        }
        Ok(settings)
    }

    fn set(&mut self, key: &str, value: toml::Value) -> Result<bool, TrainError> {
        if self.common.set(key, value.clone())? {
            return Ok(true);
        }
        match &mut self.task {
            Task::Sft(own) => own.set(key, value),
            Task::Reward(own) => own.set(key, value),
            Task::Dpo(own) => own.set(key, value),
            Task::Ppo(own) => own.set(key, value),
            Task::Grpo(own) => own.set(key, value),
        }
    }

    /// All keys of a command.
    pub fn keys(command: Command) -> Vec<&'static str> {
        let mut keys = CommonSettings::keys();
        keys.extend(match command {
            Command::Sft => SftSettings::keys(),
            Command::Reward => RewardSettings::keys(),
            Command::Dpo => DpoSettings::keys(),
            Command::Ppo => PpoSettings::keys(),
            Command::Grpo => GrpoSettings::keys(),
        });
        keys
    }

    /// The files and folders that must not change between start and resume of a run, with what they are. Data is
    /// not among them: it is hashed as a whole where it is read.
    ///
    /// # Errors
    /// None that paths cause.
    pub fn fingerprinted(&self) -> Result<Vec<(String, PathBuf)>, TrainError> {
        let mut found = self.common.fingerprinted()?;
        found.extend(match &self.task {
            Task::Sft(own) => own.fingerprinted(),
            Task::Reward(own) => own.fingerprinted(),
            Task::Dpo(own) => own.fingerprinted(),
            Task::Ppo(own) => own.fingerprinted(),
            Task::Grpo(own) => own.fingerprinted(),
        }?);
        Ok(found)
    }

    /// The folders of all adapters that the run reads.
    pub fn adapters(&self) -> Vec<PathBuf> {
        let mut folders = vec![self.common.adapter.clone()];
        folders.extend(self.common.frozen_adapter.iter().map(|adapter| adapter.path.clone()));
        match &self.task {
            Task::Sft(_) | Task::Reward(_) => {}
            Task::Dpo(own) => folders.push(own.ref_adapter.clone()),
            Task::Ppo(own) => folders.extend([
                own.rollouts.ref_adapter.clone(),
                own.reward_adapter.clone(),
                own.value_adapter.clone(),
                own.judge_adapter.clone(),
            ]),
            Task::Grpo(own) => {
                folders.extend([own.rollouts.ref_adapter.clone(), own.reward_adapter.clone()]);
            }
        }
        folders.retain(|folder| !folder.as_os_str().is_empty());
        folders
    }

    /// The command that a run's table names.
    pub fn command_of(table: &toml::Table) -> Option<Command> {
        let name = table.get(Self::COMMAND)?.as_str()?;
        Command::ALL.into_iter().find(|command| command.name() == name)
    }

    /// The settings with absolute paths, so that a run can be resumed from any directory.
    pub fn absolute(&self) -> Result<Self, TrainError> {
        let mut settings = self.clone();
        settings.visit_paths(&mut make_absolute)?;
        Ok(settings)
    }

    /// Calls `visit` for every path of the settings.
    ///
    /// # Errors
    /// Those of `visit`.
    pub fn visit_paths(&mut self, visit: &mut PathVisitor) -> Result<(), TrainError> {
        self.common.visit_paths(visit)?;
        match &mut self.task {
            Task::Sft(own) => own.visit_paths(visit),
            Task::Reward(own) => own.visit_paths(visit),
            Task::Dpo(own) => own.visit_paths(visit),
            Task::Ppo(own) => own.visit_paths(visit),
            Task::Grpo(own) => own.visit_paths(visit),
        }
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

/// The backend and precision on `device`, from the flags that were given.
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

/// Keys that may differ when a run is resumed, since they do not change results.
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

/// Collects invalid settings.
#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    /// All errors in one sentence, if there are any.
    fn finish(self) -> Option<String> {
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
    /// All invalid settings in one sentence, or `None`.
    pub fn fault(&self) -> Option<String> {
        let mut faults = Faults::default();
        self.common.faults(&mut faults);
        let plain = |files: &[DataFile]| files.len() < 2 && files.iter().all(|f| f.weight == 1.0);
        let fault = "several --data files, and weights, are only supported by sft: needed one file";
        let mixes = matches!(self.task, Task::Sft(_));
        faults.check(mixes || plain(&self.common.data), fault.into());
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
                let fault = "kto compares the rows of a step: needed at least 2, set per_device_train_batch_size \
                             or gradient_accumulation_steps";
                faults.check(!compares_rows || rows > 1, fault.into());
            }
            Task::Ppo(own) => {
                own.faults(&mut faults);
                let evaluates = match self.common.eval_strategy {
                    Some(strategy) => strategy != EvalStrategy::No,
                    None => !self.common.eval_data.is_unset(),
                };
                let fault = "judge_adapter is used in evaluations: requires --eval-data or \
                             --eval-strategy";
                faults.check(own.judge_adapter.is_unset() || evaluates, fault.into());
            }
            Task::Grpo(own) => own.faults(&mut faults),
        }
        faults.finish()
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
            faults
                .0
                .push(format!("{key} only applies to loss_type {}, got {loss}", losses.join(", ")));
        }
        let referenced = self.preference().loss.has_reference();
        let fault = "ref_adapter is given, but this loss has no reference".to_string();
        faults.check(self.ref_adapter.is_unset() || referenced, fault);
    }

    /// The loss with its parameters.
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

    /// Keys that are set but only apply to other losses, with those losses. A key applies to a loss if it
    /// changes the result of [`Self::preference`].
    fn keys_of_other_losses(&self) -> Vec<(&'static str, Vec<PreferenceLossType>)> {
        let table = |settings: &Self| {
            let mut table = toml::Table::new();
            settings.write(&mut table).map(|()| table).unwrap_or_default()
        };
        let (set, plain) = (table(self), table(&Self::default()));
        let with = |loss_type: PreferenceLossType, key: &str, value: Option<&toml::Value>| {
            let mut settings = Self::default();
            if let Some(value) = value {
                let _ = settings.set(key, value.clone()); // a value of its own type
            }
            Self { loss_type, ..settings }.preference()
        };
        let mut found = Vec::new();
        for key in Self::keys().into_iter().filter(|&key| set.get(key) != plain.get(key)) {
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

impl OptimizerSettings {
    fn faults(&self, faults: &mut Faults) {
        faults.rates([
            ("learning_rate", self.learning_rate, f64::MAX),
            ("warmup_ratio", self.warmup_ratio, 1.0),
            ("weight_decay", self.weight_decay, f64::MAX),
            ("max_grad_norm", self.max_grad_norm, f64::MAX),
            ("adam_epsilon", self.adam_epsilon, f64::MAX),
        ]);
        for (name, beta) in [("adam_beta1", self.adam_beta1), ("adam_beta2", self.adam_beta2)] {
            faults.check((0.0..1.0).contains(&beta), format!("{name} is {beta}, needed in [0, 1)"));
        }
        faults.check(self.adam_epsilon as f32 > 0.0, "adam_epsilon is not a positive f32".into());
    }
}

impl RolloutSettings {
    fn faults(&self, faults: &mut Faults) {
        faults.counts([
            ("batch_size", self.batch_size as u64),
            ("num_mini_batches", self.num_mini_batches as u64),
            ("rollout_slots", self.rollout_slots as u64),
        ]);
        faults.sampling(self.temperature, self.top_p);
        faults.mini_batches(self.num_mini_batches, self.batch_size); // groups stay whole
    }
}

impl PpoSettings {
    fn faults(&self, faults: &mut Faults) {
        faults.check(!self.reward_adapter.is_unset(), "--reward-adapter is missing".into());
        self.rollouts.faults(faults);
        faults.counts([
            ("num_ppo_epochs", self.num_ppo_epochs as u64),
            ("response_length", self.response_length as u64),
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
        let least = 0.2 * self.rollouts.batch_size as f64; // else an update could turn kl_coef negative
        let fault = format!("kl_horizon is {horizon}, needed more than {least} with target_kl");
        faults.check(self.target_kl == 0.0 || horizon > least, fault);
        let own = self.value_model == ValueModel::Own;
        let fault = "value_adapter is given, but value_model is policy".to_string();
        faults.check(own || self.value_adapter.is_unset(), fault);
    }
}

impl GrpoSettings {
    /// Number of reward sources.
    pub fn rewards(&self) -> usize {
        let models = [&self.reward_adapter, &self.reward_model];
        let models = models.iter().filter(|path| !path.is_unset()).count();
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
        self.rollouts.faults(faults);
        faults.counts([
            ("num_iterations", self.num_iterations as u64),
            ("max_completion_length", self.max_completion_length as u64),
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
        let timeout = self.reward_timeout;
        faults.check(timeout > 0.0, format!("reward_timeout is {timeout}, needed more than 0"));
        if self.advantage == AdvantageEstimator::Rloo {
            let plain = Self::default();
            let fault = |name: &str| format!("{name} only applies to advantage grpo, got rloo");
            faults.check(self.scale_rewards == plain.scale_rewards, fault("scale_rewards"));
            faults.check(self.loss_type == plain.loss_type, fault("loss_type"));
        }
        let fault = "ref_adapter is given, but beta is 0: there is no reference".to_string();
        faults.check(self.beta > 0.0 || self.rollouts.ref_adapter.is_unset(), fault);
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

    /// Whether the best checkpoint is tracked.
    pub fn seeks_best(&self) -> bool {
        self.early_stopping_patience > 0 || self.load_best_model_at_end
    }

    /// How the best checkpoint is selected, as in transformers.
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

    /// The data file of a command that reads a single one.
    pub fn data_file(&self) -> &Path {
        self.data.first().map_or(Path::new(""), |file| &file.path)
    }

    fn faults(&self, faults: &mut Faults) {
        let given = [("base", !self.base.is_unset()), ("data", !self.data.is_unset())];
        for (name, given) in given.into_iter().chain([("out", !self.out.is_unset())]) {
            faults.check(given, format!("--{name} is missing"));
        }
        faults.rates([("num_train_epochs", self.num_train_epochs, 1e5)]);
        let ratio = self.loraplus_lr_ratio;
        let fine = ratio.is_finite() && ratio > 0.0;
        faults.check(fine, format!("loraplus_lr_ratio is {ratio}, needed more than 0"));
        faults.rates([("loraplus_lr_embedding", self.loraplus_lr_embedding, f64::MAX)]);
        let own = self.loraplus_lr_embedding != Self::default().loraplus_lr_embedding;
        let fault = "loraplus_lr_embedding is given, but loraplus_lr_ratio is 1: no LoRA+".into();
        faults.check(!own || ratio != 1.0, fault);
        self.optimizer.faults(faults);
        faults.counts([
            ("per_device_train_batch_size", self.per_device_train_batch_size as u64),
            ("eval_steps", self.eval_steps),
            ("save_steps", self.save_steps),
        ]);
        faults.rates([("early_stopping_threshold", self.early_stopping_threshold, f64::MAX)]);
        let evaluates = match self.eval_strategy {
            Some(strategy) => strategy != EvalStrategy::No,
            None => !self.eval_data.is_unset(),
        };
        let fault = "early_stopping_patience and load_best_model_at_end require evaluations: \
                     set --eval-data or --eval-strategy";
        faults.check(!self.seeks_best() || evaluates, fault.into());
        for (key, set) in [
            ("early_stopping_threshold", self.early_stopping_threshold != 0.0),
            ("greater_is_better", self.greater_is_better.is_some()),
        ] {
            let fault = "requires early_stopping_patience or load_best_model_at_end";
            faults.check(!set || self.seeks_best(), format!("{key} {fault}"));
        }
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
        if !self.adapter.is_unset() {
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
                faults
                    .check(false, format!("{name} cannot be set with --adapter, which defines it"));
            }
        }
        faults.check(
            self.max_length > 1,
            format!("max_length is {}, needed at least 2", self.max_length),
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
            settings.common.optimizer.learning_rate = 3e-7;
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

    /// Every key that can hold a path is found by trying: what it then holds is absolute afterwards.
    #[test]
    fn absolute_covers_every_path_key() {
        let mut found = std::collections::BTreeSet::new();
        for command in Command::ALL {
            for key in RunSettings::keys(command) {
                for text in ["somewhere", "json-schema:somewhere"] {
                    let text = toml::Value::from(text);
                    for value in [text.clone(), toml::Value::Array(vec![text])] {
                        let mut settings = RunSettings::new(command);
                        if settings.set(key, value).is_err() {
                            continue;
                        }
                        let mut absolute = settings.absolute().unwrap();
                        absolute
                            .visit_paths(&mut |path| {
                                if path.ends_with("somewhere") {
                                    assert!(path.is_absolute(), "{key}: {}", path.display());
                                    found.insert(key);
                                }
                                Ok(())
                            })
                            .unwrap();
                    }
                }
            }
        }
        let keys = "adapter base cache chat_template data eval_data frozen_adapter judge_adapter \
                    loftq_base out ptx_data ref_adapter reward reward_adapter reward_model \
                    value_adapter";
        assert_eq!(found.into_iter().collect::<Vec<_>>().join(" "), keys);
    }

    #[test]
    fn keys_of_other_commands_are_errors() {
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
    fn all_faults_are_reported_at_once() {
        let mut settings = RunSettings::new(Command::Ppo);
        settings.common.save_steps = 0;
        settings.common.optimizer.adam_beta1 = 1.0;
        let Task::Ppo(own) = &mut settings.task else { panic!() };
        (own.rollouts.num_mini_batches, own.gamma) = (5, 2.0);
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
