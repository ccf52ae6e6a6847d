//! Every setting of fine-tuning, once: key of the TOML file, flag, default and help text.

use std::path::PathBuf;

use super::compute::ComputeSetting;
use super::keys::{AdapterPath, ByteSize, OptionalText, RewardRule, Text};
use super::part::settings_struct;
use super::values::{AdvantageEstimator, EvalStrategy, ValueModel};
use crate::data::checks::Check;
use crate::data::{AlpacaPrompt, DataFile};
use crate::objectives::advantage::{KlEstimator, ScaleRewards};
use crate::objectives::policy::LossForm;
use crate::objectives::preference::PreferenceLossType;
use crate::ops::{BackendKind, DeviceName, Precision};
use crate::optim::ScheduleKind;

/// The list of [`OptimizerSettings`].
#[rustfmt::skip]
macro_rules! optimizer_settings { ($then:ident) => { $then! {
    /// Optimizer and learning rate, of fine-tuning and pretraining. Some defaults depend on the
    /// command.
    OptimizerSettings, OptimizerFlags {
        /// Highest learning rate [default: sft 2e-4, reward 1e-4, dpo 2e-5, ppo and grpo 1e-5; pretrain 1e-3]
        learning_rate: f64 = 2e-4,
        /// Learning rate schedule; warmup_stable_decay decays at the end [default: cosine; ppo and grpo linear]
        lr_scheduler_type: ScheduleKind = ScheduleKind::Cosine,
        /// Warm-up, as a fraction of all steps [default: 0.03; ppo and grpo 0; pretrain 0.02]
        warmup_ratio: f64 = 0.03,
        /// Warm-up steps; above 0 they replace warmup_ratio [default: 0]
        warmup_steps: u64 = 0,
        /// AdamW weight decay; in pretrain only of matrices [default: 0; pretrain 0.1]
        weight_decay: f64 = 0.0,
        /// AdamW beta1, decay rate of the first moment [default: 0.9]
        adam_beta1: f64 = 0.9,
        /// AdamW beta2, decay rate of the second moment [default: 0.999; pretrain 0.95]
        adam_beta2: f64 = 0.999,
        /// AdamW epsilon [default: 1e-8]
        adam_epsilon: f64 = 1e-8,
        /// Gradient clipping: maximum global norm; 0 is off [default: 1]
        max_grad_norm: f64 = 1.0,
    }
} } }
optimizer_settings!(settings_struct);
#[cfg(feature = "cli")]
pub(crate) use optimizer_settings;

/// The list of [`CommonSettings`].
#[rustfmt::skip]
macro_rules! common_settings { ($then:ident) => { $then! {
    /// Settings of all training commands. Some defaults depend on the command.
    CommonSettings, CommonFlags {
        /// Base model: a GGUF file or a Hugging Face folder
        #[fingerprint = "the base"]
        base: PathBuf = PathBuf::new(),
        /// Data file, JSONL or Parquet, with `messages`, `conversations` (ShareGPT),
        /// `instruction`/`output` (Alpaca), `prompt`/`completion`, `text` or `input_ids` for sft;
        /// `chosen`/`rejected` or ranked `responses` for reward and dpo; `prompt` for ppo and grpo. sft
        /// accepts several files; PATH=WEIGHT uses each row WEIGHT times per epoch
        #[flag(value_name = "PATH[=WEIGHT]")]
        data: Vec<DataFile> = Vec::new(),
        /// Held-out data file; without, 1 in 10 rows of --data is held out if --eval-strategy is epoch or steps
        eval_data: PathBuf = PathBuf::new(),
        /// Run directory
        out: PathBuf = PathBuf::new(),
        /// PEFT adapter folder to continue from, instead of a new adapter
        adapter: PathBuf = PathBuf::new(),
        /// Frozen adapter, active below the trained one and its reference, as PATH or PATH=WEIGHT; can be
        /// repeated
        #[fingerprint = "the frozen adapter {}"]
        frozen_adapter: Vec<Text<AdapterPath>> = Vec::new(),

        /// Rank of the update (lora_alpha / r) · B · A [default: 16]
        r: usize = 16,
        /// Alpha, the scale of the update [default: 32]
        lora_alpha: f64 = 32.0,
        /// Dropout probability of the inputs of A [default: 0]
        lora_dropout: f64 = 0.0,
        /// Modules to adapt: names, one regular expression, or all-linear [default: all-linear]
        #[flag(num_args = 1..)]
        target_modules: Vec<String> = vec!["all-linear".into()],
        /// Modules to exclude: names, or one regular expression
        #[flag(num_args = 1..)]
        exclude_modules: Vec<String> = Vec::new(),
        /// Ranks of modules that match a regular expression, as REGEX=R
        #[flag(num_args = 1..)]
        rank_pattern: Vec<String> = Vec::new(),
        /// Alphas of modules that match a regular expression, as REGEX=ALPHA
        #[flag(num_args = 1..)]
        alpha_pattern: Vec<String> = Vec::new(),
        /// Layers to adapt, counted from 0; requires target_modules by name
        #[flag(value_delimiter = ',', num_args = 1..)]
        layers_to_transform: Vec<usize> = Vec::new(),
        /// Name of the module list that layers_to_transform refers to
        #[flag(value_delimiter = ',', num_args = 1..)]
        layers_pattern: Vec<String> = Vec::new(),
        /// Scale by lora_alpha / sqrt(r) (rsLoRA) [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        use_rslora: bool = false,
        /// Weight-decomposed LoRA (DoRA): train a magnitude for each row of a weight [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        use_dora: bool = false,
        /// Initialization of the adapter: true (A random, B zero), false (both random), gaussian, or
        /// computed from the base: pissa, pissa_niter_N, olora, loftq [default: true]
        init_lora_weights: String = "true".into(),
        /// The base before its quantization, for loftq
        loftq_base: PathBuf = PathBuf::new(),
        /// Modules to train in full in addition to the updates: embed_tokens, lm_head
        #[flag(value_delimiter = ',', num_args = 1..)]
        modules_to_save: Vec<String> = Vec::new(),
        /// Tokens whose embeddings are trained
        #[flag(value_delimiter = ',', num_args = 1..)]
        trainable_token_indices: Vec<u32> = Vec::new(),
        /// Tokens to add to the vocabulary as ordinary text, matched before pre-tokenization. Unused rows of
        /// embedding and lm_head are assigned first; further rows are initialized to the mean of the base's.
        /// The rows are trained
        #[flag(value_delimiter = ',', num_args = 1.., value_name = "TOKEN")]
        add_tokens: Vec<String> = Vec::new(),
        /// Special tokens to add, such as <|tool|>: never matched in ordinary text
        #[flag(value_delimiter = ',', num_args = 1.., value_name = "TOKEN")]
        add_special_tokens: Vec<String> = Vec::new(),
        /// LoRA+ ratio: learning rate of B divided by that of A [default: 1]
        loraplus_lr_ratio: f64 = 1.0,
        /// Learning rate of updates of the embedding, with loraplus_lr_ratio [default: 1e-6]
        loraplus_lr_embedding: f64 = 1e-6,

        /// Micro-batch size: packed bins (or rows, without packing) for sft [default: 1],
        /// comparisons for reward and dpo [default: 8], responses for ppo and grpo [default: 8]
        per_device_train_batch_size: usize = 1,
        /// Number of epochs [default: 1]
        num_train_epochs: f64 = 1.0,
        /// Number of steps; overrides num_train_epochs when above 0 [default: 0]
        max_steps: u64 = 0,
        /// Maximum number of tokens of an example and of a packed bin. A longer `text` is split; longer
        /// `messages`, `prompt`/`completion` and `input_ids` rows and responses of dpo are truncated at their
        /// end; longer comparisons of reward are dropped; longer prompts of ppo and grpo are errors
        /// [default: 1024]
        max_length: usize = 1024,
        /// Jinja file that replaces the model's chat template
        #[fingerprint = "the chat template"]
        chat_template: PathBuf = PathBuf::new(),
        /// Variable of the chat template, such as enable_thinking=false; can be repeated
        #[flag(value_name = "KEY=JSON")]
        chat_template_kwargs: Vec<String> = Vec::new(),
        /// Current date in chat templates that print one, YYYY-MM-DD [default: the day the run starts]
        template_date: String = String::new(),
        /// Checks to ignore, by the names that `quantune data` prints: no failure, and not reported;
        /// unreadable rows are skipped
        #[flag(value_delimiter = ',', value_name = "CHECK")]
        allow: Vec<Check> = Vec::new(),
        /// File size, such as 64MB, from which tokens are cached on disk instead of held in memory. Runs that
        /// share a cache tokenize a file once for the same tokenizer, template (and date, if it prints one)
        /// and lengths [default: 64MB]
        cache_from: Text<ByteSize> = ByteSize(64_000_000),
        /// Cache directory of tokenized rows; delete it to clear the cache [default: DIR/rows]
        cache: PathBuf = PathBuf::new(),
        /// Keep the rows in file order [default: false]
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

        /// When to evaluate on held-out rows [default: epoch with --eval-data, else no]
        eval_strategy: Option<EvalStrategy> = None,
        /// Steps between evaluations with --eval-strategy steps [default: 100]
        eval_steps: u64 = 100,
        /// Steps between checkpoints [default: 100]
        save_steps: u64 = 100,
        /// Number of checkpoints to keep, in addition to the best; 0 keeps all [default: 2]
        save_total_limit: usize = 2,
        /// Early stopping: evaluations without improvement after which the run ends; 0 is off [default: 0]
        early_stopping_patience: u64 = 0,
        /// Minimum improvement of the metric that counts [default: 0]
        early_stopping_threshold: f64 = 0.0,
        /// Metric that selects the best checkpoint, with or without eval_ [default: loss; ppo and grpo reward]
        metric_for_best_model: String = "loss".into(),
        /// Whether a higher metric is better [default: unless its name ends in loss]
        greater_is_better: Option<bool> = None,
        /// Use the adapter of the best evaluation at the end, not the last one [default: false]
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
        /// Whether several rows share a bin of max_length tokens [default: true]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        packing: bool = true,
        /// NEFTune: alpha of the noise on embeddings, 5 to 15; 0 is off [default: 0]
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
        /// Weight of the squared sum of a pair's scores, which keeps them around 0; 0 is off [default: 0]
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
        /// The loss: sigmoid (DPO), ipo, hinge, orpo, simpo, or kto (rows of `prompt`, `completion` and
        /// `label`) [default: sigmoid]
        loss_type: PreferenceLossType = PreferenceLossType::Sigmoid,
        /// Beta: strength of the KL constraint to the reference; for orpo the weight of the odds ratio, for
        /// simpo the scale of the rewards [default: 0.1]
        beta: f64 = 0.1,
        /// Label smoothing: probability that a label is wrong (sigmoid and simpo) [default: 0]
        label_smoothing: f64 = 0.0,
        /// Use no reference model (sigmoid, ipo and hinge) [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        reference_free: bool = false,
        /// Adapter of the reference model [default: --adapter, or the base without one]
        #[fingerprint = "the reference adapter"]
        ref_adapter: PathBuf = PathBuf::new(),
        /// Target reward margin of simpo [default: 0.5]
        simpo_gamma: f64 = 0.5,
        /// Weight of desirable completions in kto [default: 1]
        desirable_weight: f64 = 1.0,
        /// Weight of undesirable completions in kto [default: 1]
        undesirable_weight: f64 = 1.0,
    }
} } }
dpo_settings!(settings_struct);
#[cfg(feature = "cli")]
pub(crate) use dpo_settings;

/// The list of [`RolloutSettings`].
#[rustfmt::skip]
macro_rules! rollout_settings { ($then:ident) => { $then! {
    /// Settings of sampling and scoring responses, of ppo and grpo. Some defaults depend on the command.
    RolloutSettings, RolloutFlags {
        /// Adapter of the reference model [default: --adapter, or the base without one]
        #[fingerprint = "the reference adapter"]
        ref_adapter: PathBuf = PathBuf::new(),
        /// Prompts per update [default: ppo 32, grpo 4]
        batch_size: usize = 4,
        /// Mini-batches per update, with an optimizer step each [default: 1]
        num_mini_batches: usize = 1,
        /// Temperature of sampling and of the trained policy [default: ppo 0.7, grpo 1]
        temperature: f64 = 1.0,
        /// Top-k sampling; log-probs of policy and reference ignore it; 0 is off [default: 0]
        top_k: usize = 0,
        /// Nucleus sampling (top-p); log-probs of policy and reference ignore it; 1 is off [default: 1]
        top_p: f64 = 1.0,
        /// Score truncated responses as if they ended there [default: true]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        score_at_eos: bool = true,
        /// Prompts of --eval-data per evaluation; 0 is all [default: 64]
        eval_prompts: usize = 64,
        /// Number of rows decoded in parallel [default: 16]
        rollout_slots: usize = 16,
        /// Updates between samples of responses on stderr and in samples.jsonl; 0 is off [default: 10]
        sample_steps: u64 = 10,
        /// Number of responses per sample table [default: 4]
        num_samples: usize = 4,
    }
} } }
rollout_settings!(settings_struct);
#[cfg(feature = "cli")]
pub(crate) use rollout_settings;

/// The list of [`PpoSettings`].
#[rustfmt::skip]
macro_rules! ppo_settings { ($then:ident) => { $then! {
    /// Settings of proximal policy optimization.
    PpoSettings, PpoFlags {
        /// Reward model: an adapter with a score head on the same base, as `reward` writes it
        #[fingerprint = "the reward adapter"]
        reward_adapter: PathBuf = PathBuf::new(),
        /// Second reward model for evaluations only, which detects reward over-optimization: its score falls
        /// while the reward rises
        #[fingerprint = "the judge"]
        judge_adapter: PathBuf = PathBuf::new(),
        /// Location of the value head: own (a separate adapter) or policy (the policy's adapter) [default: own]
        value_model: ValueModel = ValueModel::Own,
        /// Adapter with a score head that initializes the value adapter [default: --reward-adapter]
        #[fingerprint = "the value adapter"]
        value_adapter: PathBuf = PathBuf::new(),
        /// Minimum held-out accuracy of the reward model, from its training; 0 is off [default: 0.6]
        min_reward_accuracy: f64 = 0.6,

        /// Epochs over the responses of an update [default: 4]
        num_ppo_epochs: usize = 4,
        /// Maximum number of tokens of a response [default: 53]
        response_length: usize = 53,
        /// Penalty on the score of a truncated response [default: 0]
        missing_eos_penalty: f64 = 0.0,

        /// KL coefficient: weight of the divergence from the reference in the reward [default: 0.05]
        kl_coef: f64 = 0.05,
        /// KL estimator: k1 (unbiased) or k3 (never negative; Schulman 2020) [default: k1]
        kl_estimator: KlEstimator = KlEstimator::K1,
        /// Target KL of a response, in nats, to which kl_coef adapts (Ziegler et al. 2019); 0 keeps kl_coef
        /// constant [default: 0]
        target_kl: f64 = 0.0,
        /// Horizon in responses over which kl_coef adapts [default: 10000]
        kl_horizon: f64 = 10000.0,
        /// Discount factor [default: 1]
        gamma: f64 = 1.0,
        /// Lambda of generalized advantage estimation (GAE) [default: 0.95]
        lam: f64 = 0.95,
        /// Divide rewards by their standard deviation [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        whiten_rewards: bool = false,
        /// Normalize scores by their running mean and standard deviation [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        normalize_scores: bool = false,
        /// Clip scores to this absolute value, after normalizing; 0 is off [default: 0]
        clip_scores: f64 = 0.0,
        /// Clip range of the policy ratio [default: 0.2]
        cliprange: f64 = 0.2,
        /// Clip range of values [default: 0.2]
        cliprange_value: f64 = 0.2,
        /// Weight of the value loss [default: 0.1]
        vf_coef: f64 = 0.1,
        /// Text rows for a language modelling loss (PPO-ptx, Ouyang et al. 2022), as --data of sft
        ptx_data: PathBuf = PathBuf::new(),
        /// Weight of the PPO-ptx loss [default: 1]
        ptx_coef: f64 = 1.0,
        ..rollouts: RolloutSettings, RolloutFlags =
            RolloutSettings { batch_size: 32, temperature: 0.7, ..Default::default() },
    }
} } }
ppo_settings!(settings_struct);
#[cfg(feature = "cli")]
pub(crate) use ppo_settings;

/// The list of [`GrpoSettings`].
#[rustfmt::skip]
macro_rules! grpo_settings { ($then:ident) => { $then! {
    /// Settings of group-relative policy optimization.
    GrpoSettings, GrpoFlags {
        /// Reward: exact:FIELD, contains:FIELD, numeric:FIELD, regex:PATTERN, json-schema:FILE or
        /// length:MIN-MAX; can be repeated
        #[flag(num_args = 1..)]
        #[fingerprint = "the JSON schema"]
        reward: Vec<Text<RewardRule>> = Vec::new(),
        /// Reward: a program that reads JSON lines of `prompt`, `completion` and the row's own fields,
        /// and answers each with {"reward": NUMBER}; can be repeated
        #[flag(num_args = 1..)]
        reward_command: Vec<String> = Vec::new(),
        /// Time limit of a reward command for the responses of an update, in seconds [default: 60]
        reward_timeout: f64 = 60.0,
        /// Reward: an adapter with a score head on the same base, as `reward` writes it
        #[fingerprint = "the reward adapter"]
        reward_adapter: PathBuf = PathBuf::new(),
        /// Reward: a separate model, a folder of a Hugging Face sequence classifier with one label
        #[fingerprint = "the reward model"]
        reward_model: PathBuf = PathBuf::new(),
        /// Weights of the rewards, in the order --reward, --reward-command, --reward-adapter,
        /// --reward-model [default: 1 each]
        #[flag(value_delimiter = ',', num_args = 1.., allow_hyphen_values = true)]
        reward_weights: Vec<f64> = Vec::new(),
        /// Minimum held-out accuracy of a reward adapter, from its training; 0 is off [default: 0.6]
        min_reward_accuracy: f64 = 0.6,

        /// Group size: responses per prompt [default: 8]
        num_generations: usize = 8,
        /// Epochs over the responses of an update [default: 1]
        num_iterations: usize = 1,
        /// Maximum number of tokens of a response [default: 256]
        max_completion_length: usize = 256,

        /// Advantage estimator: grpo (baseline is the mean of the group, with losses per token) or rloo
        /// (baseline is the mean of the other responses, which are one action each; beta is then the KL
        /// coefficient in the reward) [default: grpo]
        advantage: AdvantageEstimator = AdvantageEstimator::Grpo,
        /// Divisor of advantages in grpo: the standard deviation of the group, of the whole batch, or none
        /// (Dr. GRPO) [default: group]
        scale_rewards: ScaleRewards = ScaleRewards::Group,
        /// Averaging of token losses: grpo (responses have equal weight), bnpo (tokens have equal weight), or
        /// dr_grpo (divided by max_completion_length) [default: bnpo]
        loss_type: LossForm = LossForm::Bnpo,
        /// Weight of the KL divergence from the reference in the loss; 0 needs no reference [default: 0]
        beta: f64 = 0.0,
        /// Lower clip range of the policy ratio [default: 0.2]
        epsilon: f64 = 0.2,
        /// Upper clip range of the policy ratio (Clip-Higher of DAPO, Yu et al. 2025); 0 uses epsilon
        /// [default: 0]
        epsilon_high: f64 = 0.0,
        /// Mask truncated responses in the loss (DAPO) [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        mask_truncated_completions: bool = false,
        ..rollouts: RolloutSettings, RolloutFlags = RolloutSettings::default(),
    }
} } }
grpo_settings!(settings_struct);
#[cfg(feature = "cli")]
pub(crate) use grpo_settings;
