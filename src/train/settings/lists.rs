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
    /// Optimizer and learning rate, of fine-tuning and pretraining. Where defaults differ, they are the
    /// command's.
    OptimizerSettings, OptimizerFlags {
        /// Highest learning rate [default: sft 2e-4, reward 1e-4, dpo 2e-5, ppo and grpo 1e-5; pretrain 1e-3]
        learning_rate: f64 = 2e-4,
        /// Shape of the learning rate; warmup_stable_decay falls at the end [default: cosine; ppo and grpo linear]
        lr_scheduler_type: ScheduleKind = ScheduleKind::Cosine,
        /// Warm-up, as a fraction of all steps [default: 0.03; ppo and grpo 0; pretrain 0.02]
        warmup_ratio: f64 = 0.03,
        /// Warm-up steps; above 0 they replace warmup_ratio [default: 0]
        warmup_steps: u64 = 0,
        /// AdamW's weight decay; pretrain decays matrices alone [default: 0; pretrain 0.1]
        weight_decay: f64 = 0.0,
        /// AdamW's decay of the mean gradient [default: 0.9]
        adam_beta1: f64 = 0.9,
        /// AdamW's decay of the mean squared gradient [default: 0.999; pretrain 0.95]
        adam_beta2: f64 = 0.999,
        /// AdamW's epsilon [default: 1e-8]
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
    /// What all training commands have. Where defaults differ, they are the command's.
    CommonSettings, CommonFlags {
        /// The base: a GGUF file or a Hugging Face folder
        #[fingerprint = "the base"]
        base: PathBuf = PathBuf::new(),
        /// Rows, JSONL or Parquet: sft learns `messages`, `conversations` (ShareGPT),
        /// `instruction`/`output` (Alpaca), `prompt`/`completion`, `text` or `input_ids`; reward and dpo
        /// compare `chosen`/`rejected` or ranked `responses`; ppo and grpo answer `prompt`s. sft takes
        /// several files, PATH=WEIGHT for rows that come WEIGHT times in an epoch
        #[flag(value_name = "PATH[=WEIGHT]")]
        data: Vec<DataFile> = Vec::new(),
        /// Held-out rows; without, 1 in 10 of --data is held out when --eval-strategy asks
        eval_data: PathBuf = PathBuf::new(),
        /// The run directory
        out: PathBuf = PathBuf::new(),
        /// A PEFT adapter folder to continue from, instead of a fresh adapter
        adapter: PathBuf = PathBuf::new(),
        /// An adapter that stays as it is and that the trained one is put on top of, and its reference
        /// too, as PATH or PATH=WEIGHT; may be repeated
        #[fingerprint = "the frozen adapter {}"]
        frozen_adapter: Vec<Text<AdapterPath>> = Vec::new(),

        /// Rank of the update (lora_alpha / r) · B · A [default: 16]
        r: usize = 16,
        /// Scale of the update [default: 32]
        lora_alpha: f64 = 32.0,
        /// Probability that an input of A is dropped in training [default: 0]
        lora_dropout: f64 = 0.0,
        /// Modules with an update: names, one regular expression, or all-linear [default: all-linear]
        #[flag(num_args = 1..)]
        target_modules: Vec<String> = vec!["all-linear".into()],
        /// Modules without one: names, or one regular expression
        #[flag(num_args = 1..)]
        exclude_modules: Vec<String> = Vec::new(),
        /// Other ranks, as REGEX=R
        #[flag(num_args = 1..)]
        rank_pattern: Vec<String> = Vec::new(),
        /// Other alphas, as REGEX=ALPHA
        #[flag(num_args = 1..)]
        alpha_pattern: Vec<String> = Vec::new(),
        /// Only these layers, counted from 0; needs target_modules by name
        #[flag(value_delimiter = ',', num_args = 1..)]
        layers_to_transform: Vec<usize> = Vec::new(),
        /// Names of the module lists that layers_to_transform counts in
        #[flag(value_delimiter = ',', num_args = 1..)]
        layers_pattern: Vec<String> = Vec::new(),
        /// Scale by lora_alpha / sqrt(r) (rsLoRA) [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        use_rslora: bool = false,
        /// Give each row of a merged weight a length of its own (DoRA) [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        use_dora: bool = false,
        /// How the adapter begins: true (A random, B zero), false (both random), gaussian, or of the
        /// base: pissa, pissa_niter_N, olora, loftq [default: true]
        init_lora_weights: String = "true".into(),
        /// The base before its quantization, which loftq begins from
        loftq_base: PathBuf = PathBuf::new(),
        /// Modules trained whole beside the updates: embed_tokens, lm_head
        #[flag(value_delimiter = ',', num_args = 1..)]
        modules_to_save: Vec<String> = Vec::new(),
        /// Tokens whose embeddings are trained
        #[flag(value_delimiter = ',', num_args = 1..)]
        trainable_token_indices: Vec<u32> = Vec::new(),
        /// Tokens to add to the vocabulary, text as any other: each is found in a text before that is
        /// cut into words. Rows of embedding and head that the base has without a token are taken first;
        /// further ones begin as the mean of the base's. They train
        #[flag(value_delimiter = ',', num_args = 1.., value_name = "TOKEN")]
        add_tokens: Vec<String> = Vec::new(),
        /// Special tokens to add, such as <|tool|>: never matched in ordinary text
        #[flag(value_delimiter = ',', num_args = 1.., value_name = "TOKEN")]
        add_special_tokens: Vec<String> = Vec::new(),
        /// LoRA+ ratio: learning rate of B over that of A [default: 1]
        loraplus_lr_ratio: f64 = 1.0,
        /// Learning rate of updates of the embedding, with loraplus_lr_ratio [default: 1e-6]
        loraplus_lr_embedding: f64 = 1e-6,

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
        #[fingerprint = "the chat template"]
        chat_template: PathBuf = PathBuf::new(),
        /// A variable of the chat template, as KEY=JSON: enable_thinking=false; may be given again
        #[flag(value_name = "KEY=JSON")]
        chat_template_kwargs: Vec<String> = Vec::new(),
        /// The day, YYYY-MM-DD, that a chat template with a date shows [default: the day the run begins]
        template_date: String = String::new(),
        /// Checks to ignore, by the names that `quantune data` prints: they neither stop the run nor are
        /// reported; unreadable rows are skipped
        #[flag(value_delimiter = ',', value_name = "CHECK")]
        allow: Vec<Check> = Vec::new(),
        /// Size of a file, as 64MB, from which its tokens are kept on disk and not in memory; runs that
        /// share a cache make them once for the same tokenizer, template (and day, where it shows one)
        /// and lengths [default: 64MB]
        cache_from: Text<ByteSize> = ByteSize(64_000_000),
        /// Cache directory of tokenized rows; delete it to clear the cache [default: DIR/rows]
        cache: PathBuf = PathBuf::new(),
        /// Keep the rows in the order of the file [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        no_shuffle: bool = false,
        /// Memory the run may take, as 600MB or 2GiB: layers that do not fit are recomputed in the
        /// backward pass, which costs up to a third more time [default: 70 % of what is free]
        memory_budget: OptionalText<ByteSize> = None,
        /// Recompute all layers, or with false none, whatever the memory budget says
        #[flag(num_args = 0..=1, default_missing_value = "true")]
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
        #[flag(value_name = "TYPE")]
        load_type: String = String::new(),

        /// When held-out rows are evaluated; by default epoch with --eval-data, else no
        eval_strategy: Option<EvalStrategy> = None,
        /// Steps between evaluations with --eval-strategy steps [default: 100]
        eval_steps: u64 = 100,
        /// Steps between checkpoints [default: 100]
        save_steps: u64 = 100,
        /// Checkpoints kept, the best besides where it is looked for; 0 keeps all [default: 2]
        save_total_limit: usize = 2,
        /// Early stopping: evaluations without improvement after which the run ends; 0 is off [default: 0]
        early_stopping_patience: u64 = 0,
        /// Minimum improvement of the metric that counts [default: 0]
        early_stopping_threshold: f64 = 0.0,
        /// Metric that selects the best checkpoint, with or without eval_ [default: loss; ppo and grpo reward]
        metric_for_best_model: String = "loss".into(),
        /// Whether a higher metric is better [default: unless its name ends in loss]
        greater_is_better: Option<bool> = None,
        /// At the end take the adapter of the best evaluation, not the last [default: false]
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
    /// What supervised fine-tuning has of its own.
    SftSettings, SftFlags {
        /// Micro-batches of a step [default: 4]
        gradient_accumulation_steps: usize = 4,
        /// Whether several rows share a bin of max_length tokens [default: true]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        packing: bool = true,
        /// Size of NEFTune's noise on the embeddings, 5 to 15; 0 is none [default: 0]
        neftune_noise_alpha: f64 = 0.0,
        /// How `instruction`, `input` and `output` are laid out: chat (the first two are what the user
        /// says) or text (Alpaca's own prompt) [default: chat, or text where there is no chat template]
        alpaca_prompt: Option<AlpacaPrompt> = None,
    }
} } }
sft_settings!(settings_struct);
#[cfg(feature = "cli")]
pub(crate) use sft_settings;

/// The list of [`RewardSettings`].
#[rustfmt::skip]
macro_rules! reward_settings { ($then:ident) => { $then! {
    /// What training a reward model has of its own.
    RewardSettings, RewardFlags {
        /// Micro-batches of a step [default: 1]
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
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        reference_free: bool = false,
        /// An adapter that makes the reference, instead of the bare base; by default --adapter, if given
        #[fingerprint = "the reference adapter"]
        ref_adapter: PathBuf = PathBuf::new(),
        /// How far apart simpo wants the rewards [default: 0.5]
        simpo_gamma: f64 = 0.5,
        /// Weight of kto's good completions [default: 1]
        desirable_weight: f64 = 1.0,
        /// Weight of kto's bad completions [default: 1]
        undesirable_weight: f64 = 1.0,
    }
} } }
dpo_settings!(settings_struct);
#[cfg(feature = "cli")]
pub(crate) use dpo_settings;

/// The list of [`RolloutSettings`].
#[rustfmt::skip]
macro_rules! rollout_settings { ($then:ident) => { $then! {
    /// How responses are sampled and scored, of ppo and grpo. Where defaults differ, they are the
    /// command's.
    RolloutSettings, RolloutFlags {
        /// An adapter that makes the reference, instead of the bare base; by default --adapter, if given
        #[fingerprint = "the reference adapter"]
        ref_adapter: PathBuf = PathBuf::new(),
        /// Prompts of an update [default: ppo 32, grpo 4]
        batch_size: usize = 4,
        /// Parts that an update's responses are split into, an optimizer step each [default: 1]
        num_mini_batches: usize = 1,
        /// Temperature of sampling, and of the policy that is trained [default: ppo 0.7, grpo 1]
        temperature: f64 = 1.0,
        /// Sample among the k most likely tokens (top-k), which the reference does not; 0 is off [default: 0]
        top_k: usize = 0,
        /// Sample among the most likely tokens that together have this probability (nucleus, top-p); 1 is off [default: 1]
        top_p: f64 = 1.0,
        /// Whether a response that does not end by itself is scored as if it ended there [default: true]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        score_at_eos: bool = true,
        /// Prompts of --eval-data that an evaluation answers; 0 takes all [default: 64]
        eval_prompts: usize = 64,
        /// Rows decoded at once [default: 16]
        rollout_slots: usize = 16,
        /// Updates between tables of sampled responses on stderr and in samples.jsonl; 0 is off [default: 10]
        sample_steps: u64 = 10,
        /// Responses of such a table [default: 4]
        num_samples: usize = 4,
    }
} } }
rollout_settings!(settings_struct);
#[cfg(feature = "cli")]
pub(crate) use rollout_settings;

/// The list of [`PpoSettings`].
#[rustfmt::skip]
macro_rules! ppo_settings { ($then:ident) => { $then! {
    /// What proximal policy optimization has of its own.
    PpoSettings, PpoFlags {
        /// The reward model: an adapter with a score head on the same base, as `reward` makes it
        #[fingerprint = "the reward adapter"]
        reward_adapter: PathBuf = PathBuf::new(),
        /// A second reward model, not trained against: it is read in evaluations and named when it
        /// falls while the reward rises
        #[fingerprint = "the judge"]
        judge_adapter: PathBuf = PathBuf::new(),
        /// Where the value head sits: own (an adapter of its own) or policy (the policy's) [default: own]
        value_model: ValueModel = ValueModel::Own,
        /// What the value adapter begins from: an adapter with a score head; by default --reward-adapter
        #[fingerprint = "the value adapter"]
        value_adapter: PathBuf = PathBuf::new(),
        /// Held-out accuracy a reward model must have had in its training; 0 asks for none [default: 0.6]
        min_reward_accuracy: f64 = 0.6,

        /// Passes over the responses of an update [default: 4]
        num_ppo_epochs: usize = 4,
        /// Tokens a response may have [default: 53]
        response_length: usize = 53,
        /// Penalty on the score of a response that does not end by itself [default: 0]
        missing_eos_penalty: f64 = 0.0,

        /// KL coefficient: weight of the divergence from the reference in the reward [default: 0.05]
        kl_coef: f64 = 0.05,
        /// Its estimate for a token: k1 (unbiased) or k3 (never negative; Schulman 2020) [default: k1]
        kl_estimator: KlEstimator = KlEstimator::K1,
        /// Target KL of a response, in nats, that kl_coef adapts to (Ziegler et al. 2019); 0 keeps kl_coef
        /// constant [default: 0]
        target_kl: f64 = 0.0,
        /// Responses over which kl_coef adapts [default: 10000]
        kl_horizon: f64 = 10000.0,
        /// Discount of rewards to come [default: 1]
        gamma: f64 = 1.0,
        /// Lambda of the generalized advantage estimate [default: 0.95]
        lam: f64 = 0.95,
        /// Whether rewards are divided by their standard deviation [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        whiten_rewards: bool = false,
        /// Whether scores are brought to mean 0 and deviation 1 by those so far [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
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
    /// What group-relative policy optimization has of its own.
    GrpoSettings, GrpoFlags {
        /// Reward: exact:FIELD, contains:FIELD, numeric:FIELD, regex:PATTERN, json-schema:FILE or
        /// length:MIN-MAX; may be given again
        #[flag(num_args = 1..)]
        #[fingerprint = "the JSON schema"]
        reward: Vec<Text<RewardRule>> = Vec::new(),
        /// Reward: a program that reads JSON lines of `prompt`, `completion` and the row's own fields,
        /// and answers each with {"reward": NUMBER}; may be given again
        #[flag(num_args = 1..)]
        reward_command: Vec<String> = Vec::new(),
        /// Seconds such a program has for the responses of an update [default: 60]
        reward_timeout: f64 = 60.0,
        /// Reward: an adapter with a score head on the same base, as `reward` makes it
        #[fingerprint = "the reward adapter"]
        reward_adapter: PathBuf = PathBuf::new(),
        /// Reward: a Hugging Face sequence classifier with one label, a model folder of its own
        #[fingerprint = "the reward model"]
        reward_model: PathBuf = PathBuf::new(),
        /// Weights of the rewards, in the order --reward, --reward-command, --reward-adapter,
        /// --reward-model [default: 1 each]
        #[flag(value_delimiter = ',', num_args = 1.., allow_hyphen_values = true)]
        reward_weights: Vec<f64> = Vec::new(),
        /// Held-out accuracy a reward adapter must have had in its training; 0 asks for none [default: 0.6]
        min_reward_accuracy: f64 = 0.6,

        /// Responses to a prompt, which are compared with one another [default: 8]
        num_generations: usize = 8,
        /// Passes over the responses of an update [default: 1]
        num_iterations: usize = 1,
        /// Tokens a response may have [default: 256]
        max_completion_length: usize = 256,

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
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        mask_truncated_completions: bool = false,
        ..rollouts: RolloutSettings, RolloutFlags = RolloutSettings::default(),
    }
} } }
grpo_settings!(settings_struct);
#[cfg(feature = "cli")]
pub(crate) use grpo_settings;
