//! The settings of pretraining. Settings shared with fine-tuning have the same name and meaning.

use std::path::PathBuf;

use super::compute::{ComputeSetting, set_backend};
use super::keys::{ByteSize, OptionalText, SettingValue, Text};
use super::lists::OptimizerSettings;
use super::part::{SettingsPart, make_absolute, settings_struct};
use super::validate::ValidationErrors;
use super::values::{FloatType, Preset};
use crate::data::corpus::{CorpusSettings, SourceSpec};
use crate::model::backend::{Backend, with_backend};
use crate::model::config::Variation;
use crate::model::{Config, FAMILIES, ModelError, RopeScaling};
use crate::ops::{BackendKind, Compute, DeviceName, Precision};
use crate::text::first_second;
use crate::train::TrainError;

/// The list of [`PretrainSettings`].
#[rustfmt::skip]
macro_rules! pretrain_settings { ($then:ident) => { $then! {
    /// Settings of pretraining.
    PretrainSettings, PretrainFlags {
        /// Data source, NAME=WEIGHT:FILES: text, JSONL with `text` or `messages`, or Parquet with a `text`
        /// column; FILES is a glob pattern, WEIGHT the relative number of rows; can be repeated
        #[flag(num_args = 1..)]
        source: Vec<Text<SourceSpec>> = Vec::new(),
        /// Tokenizer: a folder with tokenizer.json, as `tokenizer train` writes it [default: that of --base]
        tokenizer: PathBuf = PathBuf::new(),
        /// Continue from this model instead of random weights: a GGUF file or a Hugging Face folder
        #[fingerprint = "the base"]
        base: PathBuf = PathBuf::new(),
        /// Run directory; the model is written to DIR/model
        out: PathBuf = PathBuf::new(),
        /// Cache directory of tokenized sources [default: DIR/corpus]
        cache: PathBuf = PathBuf::new(),
        /// Current date in chat templates that print one, YYYY-MM-DD [default: the day the run starts]
        template_date: String = String::new(),

        /// Model shape: a Hugging Face config.json
        model_config: PathBuf = PathBuf::new(),
        /// Model shape by name; the settings below override parts of it [default: tiny]
        preset: Preset = Preset::Tiny,
        /// Hidden size; 0 uses the preset, here and below
        hidden_size: usize = 0,
        /// Number of layers
        num_hidden_layers: usize = 0,
        /// Number of attention heads
        num_attention_heads: usize = 0,
        /// Number of key-value heads [default: num_attention_heads]
        num_key_value_heads: usize = 0,
        /// Intermediate size of the feed-forward layers
        intermediate_size: usize = 0,
        /// RoPE base frequency [default: 10000]
        rope_theta: f64 = 10_000.0,
        /// Whether lm_head shares the weights of the embedding [default: true]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        tie_word_embeddings: bool = true,
        /// Standard deviation of initial weights; output projections are scaled down by the square root of
        /// twice the number of layers, as in GPT-2 [default: 0.02]
        initializer_range: f64 = 0.02,

        /// Sequence length in tokens [default: 256]
        max_length: usize = 256,
        /// Rows per micro-batch [default: 16]
        per_device_train_batch_size: usize = 16,
        /// Micro-batches per step [default: 1]
        gradient_accumulation_steps: usize = 1,
        /// Reset positions and attention at document borders [default: false]
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        reset_attention: bool = false,
        /// Optimizer steps; overrides max_tokens when above 0 [default: 0]
        max_steps: u64 = 0,
        /// Number of tokens to train on, rounded up to whole steps [default: 0]
        max_tokens: u64 = 0,

        /// Final learning rate, as a fraction of the highest [default: 0.1]
        min_lr_ratio: f64 = 0.1,
        /// Decay phase of warmup_stable_decay, as a fraction of all steps [default: 0.2]
        decay_ratio: f64 = 0.2,

        /// Fraction of the documents that is held out [default: 0.01]
        validation_split: f64 = 0.01,
        /// Number of held-out rows per evaluation; 0 uses all [default: 64]
        eval_rows: usize = 64,
        /// Steps between evaluations; 0 disables them [default: 100]
        eval_steps: u64 = 100,
        /// Steps between printed samples; 0 disables them [default: 100]
        sample_steps: u64 = 100,
        /// Prompt of samples; can be repeated [default: the start of a document]
        #[flag(num_args = 1..)]
        sample_prompt: Vec<String> = Vec::new(),
        /// Number of tokens per sample [default: 48]
        sample_tokens: usize = 48,
        /// Temperature of samples; 0 is greedy [default: 0.8]
        sample_temperature: f64 = 0.8,

        /// Memory limit, such as 600MB or 2GiB: layers whose activations do not fit are recomputed in the
        /// backward pass, which takes up to a third more time [default: 70 % of free memory]
        memory_budget: OptionalText<ByteSize> = None,
        /// Recompute the activations of all layers (true) or none (false), regardless of memory_budget
        #[flag(num_args = 0..=1, default_missing_value = "true")]
        gradient_checkpointing: Option<bool> = None,
        /// Steps between checkpoints [default: 500]
        save_steps: u64 = 500,
        /// Number of checkpoints to keep; 0 keeps all [default: 2]
        save_total_limit: usize = 2,
        /// Seed of initial weights, data order and samples [default: 42]
        seed: u64 = 42,
        /// Precision of matrix products: f32, int16 (block floating point, faster; weights stay f32), or
        /// portable, which means --backend reference [default: f32]
        compute: ComputeSetting = ComputeSetting::Precision(Precision::F32),
        /// Backend: cpu (optimized kernels), or reference (candle ops in f32; slow, but the only backend for
        /// other devices) [default: cpu; reference on other devices]
        backend: BackendKind = BackendKind::Cpu,
        /// Device: cpu, cuda, cuda:N or metal; all but cpu require a build with that feature [default: cpu]
        device: DeviceName = DeviceName::Cpu,
        /// Float type of the written model folder [default: f32]
        dtype: FloatType = FloatType::F32,
        /// Also write the model as this GGUF file
        export: PathBuf = PathBuf::new(),
        /// Type of the GGUF file, as in `quantize --type` [default: F16]
        export_type: String = "F16".into(),
        ..optimizer: OptimizerSettings, OptimizerFlags = OptimizerSettings {
            learning_rate: 1e-3,
            warmup_ratio: 0.02,
            weight_decay: 0.1,
            adam_beta2: 0.95,
            ..Default::default()
        },
    }
} } }
pretrain_settings!(settings_struct);
#[cfg(feature = "cli")]
pub(crate) use pretrain_settings;

impl PretrainSettings {
    /// The backend and its precision.
    pub fn compute(&self) -> Compute {
        self.compute.on(self.backend)
    }

    /// Key and name of the command in `config.toml`.
    const COMMAND: (&str, &str) = ("command", "pretrain");

    /// One flat table, with the command's name.
    pub fn to_table(&self) -> Result<toml::Table, TrainError> {
        let mut all = toml::Table::from_iter([(
            Self::COMMAND.0.to_string(),
            toml::Value::from(Self::COMMAND.1),
        )]);
        self.write(&mut all)?;
        Ok(all)
    }

    /// The defaults, overridden by `table`. Unknown keys, and a table of
    /// another command, are refused.
    pub fn from_table(mut table: toml::Table) -> Result<Self, TrainError> {
        let fail = |fault: String| Err(TrainError::Settings(fault));
        if let Some(found) = table.remove(Self::COMMAND.0)
            && found.as_str() != Some(Self::COMMAND.1)
        {
            return fail(format!("these are settings of {found}, needed {:?}", Self::COMMAND.1));
        }
        let keys = Self::keys();
        let unknown: Vec<&str> =
            table.keys().map(String::as_str).filter(|key| !keys.contains(key)).collect();
        if !unknown.is_empty() {
            return fail(format!("unknown {} of {}", unknown.join(", "), Self::COMMAND.1));
        }
        set_backend(&mut table).map_err(TrainError::Settings)?;
        let mut settings = Self::default();
        for (key, value) in table {
            settings.set(&key, value)?;
        }
        Ok(settings)
    }

    /// The settings with absolute paths, so that a run can be resumed from any directory.
    pub fn absolute(&self) -> Result<Self, TrainError> {
        let mut settings = self.clone();
        settings.visit_paths(&mut make_absolute)?;
        Ok(settings)
    }

    /// The settings of the corpus.
    pub fn corpus(&self) -> CorpusSettings {
        CorpusSettings {
            cache: match self.cache.as_os_str().is_empty() {
                true => self.out.join("corpus"),
                false => self.cache.clone(),
            },
            sequence_length: self.max_length,
            reset_at_borders: self.reset_attention,
            validation_split: self.validation_split,
            seed: self.seed,
        }
    }

    /// Whether held-out rows are evaluated.
    pub fn evaluates(&self) -> bool {
        self.eval_steps > 0 && self.validation_split > 0.0
    }

    /// Total number of steps.
    pub fn total_steps(&self) -> u64 {
        let tokens = self.rows_of_step() * self.max_length as u64;
        if self.max_steps > 0 { self.max_steps } else { self.max_tokens.div_ceil(tokens.max(1)) }
    }

    /// Number of rows per step.
    pub fn rows_of_step(&self) -> u64 {
        (self.per_device_train_batch_size * self.gradient_accumulation_steps) as u64
    }

    /// The config of a new model with this vocabulary size.
    pub fn config(&self, vocab_size: usize) -> Result<Config, ModelError> {
        if !self.model_config.as_os_str().is_empty() {
            let config = Config::from_file(&self.model_config)?;
            if config.vocab_size < vocab_size {
                return Err(ModelError::Config {
                    path: self.model_config.display().to_string(),
                    reason: format!(
                        "vocab_size is {}, and the tokenizer has {vocab_size} tokens",
                        config.vocab_size
                    ),
                });
            }
            return Ok(config);
        }
        let [hidden_size, layers, heads, inner] = self.preset.shape();
        let or = |given: usize, preset: usize| if given > 0 { given } else { preset };
        let hidden_size = or(self.hidden_size, hidden_size);
        let heads = or(self.num_attention_heads, heads);
        if !hidden_size.is_multiple_of(heads) {
            let reason = format!("hidden_size {hidden_size} is not a multiple of {heads} heads");
            return Err(ModelError::Config { path: "the model's shape".into(), reason });
        }
        let config = Config {
            family: &FAMILIES[0],
            hidden_size,
            num_hidden_layers: or(self.num_hidden_layers, layers),
            num_attention_heads: heads,
            num_key_value_heads: or(self.num_key_value_heads, heads),
            head_dim: hidden_size / heads,
            intermediate_size: or(self.intermediate_size, inner),
            vocab_size,
            max_position_embeddings: self.max_length,
            rms_norm_eps: 1e-5,
            rope_theta: self.rope_theta,
            rope_scaling: RopeScaling::None,
            tie_word_embeddings: self.tie_word_embeddings,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            variation: Variation::default(),
        };
        config.checked("the model's shape".into())
    }

    /// All invalid settings in one sentence, or `None`.
    pub fn fault(&self) -> Option<String> {
        let mut faults = ValidationErrors::default();
        faults.check(!self.out.is_unset(), "--out is missing".into());
        faults.check(!self.source.is_empty(), "--source is missing".into());
        let given = !self.tokenizer.is_unset() || !self.base.is_unset();
        faults.check(given, "--tokenizer is missing".into());
        let plain = Self::default();
        let shape = [
            ("preset", self.preset != plain.preset),
            ("hidden_size", self.hidden_size > 0),
            ("num_hidden_layers", self.num_hidden_layers > 0),
            ("num_attention_heads", self.num_attention_heads > 0),
            ("num_key_value_heads", self.num_key_value_heads > 0),
            ("intermediate_size", self.intermediate_size > 0),
            ("rope_theta", self.rope_theta != plain.rope_theta),
            ("tie_word_embeddings", !self.tie_word_embeddings),
        ];
        let from_file =
            [("--base", !self.base.is_unset()), ("--model-config", !self.model_config.is_unset())];
        for (of, given) in from_file {
            for (name, _) in shape.iter().filter(|(_, set)| given && *set) {
                faults.check(false, format!("{name} cannot be set with {of}, which defines it"));
            }
        }
        let set = self.initializer_range != plain.initializer_range;
        let fault =
            "initializer_range only applies to random weights, but --base is given".to_string();
        faults.check(self.base.is_unset() || !set, fault);
        let set = self.export_type != plain.export_type;
        faults.check(!self.export.is_unset() || !set, "export_type requires export".into());
        let both = !self.base.is_unset() && !self.model_config.is_unset();
        faults.check(!both, "model_config cannot be set with --base, which defines it".into());
        let some = self.max_steps > 0 || self.max_tokens > 0;
        faults.check(some, "max_steps and max_tokens are both 0: nothing would be trained".into());
        faults.counts([
            ("per_device_train_batch_size", self.per_device_train_batch_size as u64),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps as u64),
            ("save_steps", self.save_steps),
            ("sample_tokens", self.sample_tokens as u64),
        ]);
        faults.rates([
            ("min_lr_ratio", self.min_lr_ratio, 1.0),
            ("decay_ratio", self.decay_ratio, 1.0),
            ("initializer_range", self.initializer_range, f64::MAX),
            ("sample_temperature", self.sample_temperature, f64::MAX),
        ]);
        self.optimizer.faults(&mut faults);
        let theta = self.rope_theta;
        let fine = theta.is_finite() && theta > 0.0;
        faults.check(fine, format!("rope_theta is {theta}, needed more than 0"));
        let share = self.validation_split;
        let fine = (0.0..1.0).contains(&share);
        faults.check(fine, format!("validation_split is {share}, needed in [0, 1)"));
        let fine = self.compute().precision != Precision::Int8;
        let fault = "compute is int8, which is too imprecise to train all weights: needed f32, int16 or portable";
        faults.check(fine, fault.into());
        if let Err(fault) = self.device.check(self.compute()) {
            faults.0.push(fault.to_string());
        }
        let portable = with_backend!(self.compute().backend, B => !B::RECOMPUTES_FULL_TRAINING);
        for (name, set) in [
            ("memory_budget", self.memory_budget.is_some()),
            ("gradient_checkpointing", self.gradient_checkpointing == Some(true)),
        ] {
            let fault = "only applies to backend cpu; reference keeps all activations";
            faults.check(!(portable && set), format!("{name} {fault}"));
        }
        let date = &self.template_date;
        let fine = date.is_empty() || first_second(date).is_some();
        faults.check(fine, format!("template_date is {date:?}, needed YYYY-MM-DD"));
        let length = self.max_length;
        faults.check(length > 1, format!("max_length is {length}, needed at least 2"));
        let seed = self.seed;
        faults.check(i64::try_from(seed).is_ok(), format!("seed is {seed}, needed below 2^63"));
        faults.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::string_enum::StringEnum;

    fn settings() -> PretrainSettings {
        PretrainSettings {
            source: vec!["a=1:a.txt".parse().unwrap()],
            tokenizer: "tokenizer".into(),
            out: "run".into(),
            max_tokens: 10_000,
            ..Default::default()
        }
    }

    #[test]
    fn settings_survive_the_file() {
        let text = toml::to_string(&settings().to_table().unwrap()).unwrap();
        let table: toml::Table = toml::from_str(&text).unwrap();
        assert_eq!(PretrainSettings::from_table(table).unwrap(), settings());
        let refused = |text: &str| {
            let table = toml::from_str(text).unwrap();
            PretrainSettings::from_table(table).unwrap_err().to_string()
        };
        assert_eq!(refused("lora_alpha = 1.0"), "unknown lora_alpha of pretrain");
        assert!(refused("command = 'sft'").contains("settings of \"sft\""));
    }

    #[test]
    fn steps_are_rounded_up() {
        assert_eq!(settings().total_steps(), 3); // 4096 tokens each
        assert_eq!(PretrainSettings { max_steps: 7, ..settings() }.total_steps(), 7);
    }

    #[test]
    fn all_faults_are_reported_at_once() {
        assert_eq!(settings().fault(), None);
        let wrong = PretrainSettings {
            base: "base.gguf".into(),
            hidden_size: 5,
            max_tokens: 0,
            compute: ComputeSetting::Precision(Precision::Int8),
            ..settings()
        };
        let fault = wrong.fault().unwrap();
        for words in
            ["hidden_size cannot be set with --base", "nothing would be trained", "compute is int8"]
        {
            assert!(fault.contains(words), "{words}: {fault}");
        }
    }

    #[test]
    fn presets_are_shapes_that_run() {
        for &preset in Preset::VALUES {
            let config = PretrainSettings { preset, ..settings() }.config(512).unwrap();
            assert_eq!(config.hidden_size, config.head_dim * config.num_attention_heads);
        }
    }
}
