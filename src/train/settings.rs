//! Every setting of a fine-tuning run, once: flag, key of the TOML file, default and what it
//! means. Names are PEFT's, TRL's and transformers'.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::memory::parse_bytes;
use crate::ops::Compute;
use crate::optim::ScheduleKind;

/// When held-out loss is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum EvalStrategy {
    /// Never.
    No,
    /// Before the first step, every `eval_steps` steps, and after the last.
    Steps,
    /// Before the first step, and after each epoch.
    Epoch,
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

settings! {
    /// One supervised fine-tuning run.
    SftSettings, SftFlags {
        /// The base: a GGUF file or a Hugging Face folder
        base: PathBuf = PathBuf::new(),
        /// Rows to learn: JSONL of `messages`, `prompt`/`completion`, `text` or `input_ids`
        data: PathBuf = PathBuf::new(),
        /// Held-out rows; without, 1 in 10 of --data is held out when --eval-strategy asks
        eval_data: PathBuf = PathBuf::new(),
        /// The run directory
        out: PathBuf = PathBuf::new(),
        /// A PEFT adapter folder to continue from, instead of a fresh adapter
        adapter: PathBuf = PathBuf::new(),

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
        /// How the adapter begins: true (A random, B zero), false (both random) or gaussian [default: true]
        init_lora_weights: String = "true".into(),

        /// Highest learning rate [default: 2e-4]
        learning_rate: f64 = 2e-4,
        /// Shape of the learning rate [default: cosine]
        lr_scheduler_type: ScheduleKind = ScheduleKind::Cosine,
        /// Share of all steps that warm up [default: 0.03]
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
        /// Packed bins (or rows, without packing) of a micro-batch [default: 1]
        per_device_train_batch_size: usize = 1,
        /// Micro-batches of a step [default: 4]
        gradient_accumulation_steps: usize = 4,
        /// Passes over the data [default: 1]
        num_train_epochs: f64 = 1.0,
        /// Steps, instead of num_train_epochs when above 0 [default: 0]
        max_steps: u64 = 0,
        /// Tokens of an example and of a packed bin: a longer `text` is split into several, longer
        /// `messages`, `prompt`/`completion` and `input_ids` rows are cut at their end [default: 1024]
        max_length: usize = 1024,
        /// Whether several rows share a bin of max_length tokens [default: true]
        #[arg(num_args = 0..=1, default_missing_value = "true")]
        packing: bool = true,
        /// The day, YYYY-MM-DD, that a chat template with a date shows [default: the day the run begins]
        template_date: String = String::new(),
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
        /// How products are computed: int16 (block-floating, nearly twice f32's speed), int8 (faster
        /// still, and too rough to train with), f32 (exact), or portable (the slow reference form) [default: int16]
        compute: Compute = Compute::Int16,

        /// When held-out loss is taken; by default epoch with --eval-data, else no
        eval_strategy: Option<EvalStrategy> = None,
        /// Steps between evaluations with --eval-strategy steps [default: 100]
        eval_steps: u64 = 100,
        /// Steps between checkpoints [default: 100]
        save_steps: u64 = 100,
        /// Checkpoints kept; 0 keeps all [default: 2]
        save_total_limit: usize = 2,
    }
}

/// Keys that may differ when a run goes on: they change no result.
pub const FREE_ON_RESUME: &[&str] =
    &["save_total_limit", "out", "memory_budget", "gradient_checkpointing"];

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
    Option<EvalStrategy> => |option| option.is_none();
    Option<bool> => |option| option.is_none();
    String => |text| text.is_empty();
    usize => |_| false;
    u64 => |_| false;
    f64 => |_| false;
    bool => |_| false;
    ScheduleKind => |_| false;
    Compute => |_| false;
}

impl SftSettings {
    /// All that is out of range, in one sentence, or `None`.
    pub fn fault(&self) -> Option<String> {
        let mut faults = Vec::new();
        let mut check = |fine: bool, fault: String| {
            if !fine {
                faults.push(fault);
            }
        };
        for (name, path) in [("base", &self.base), ("data", &self.data), ("out", &self.out)] {
            check(!path.empty(), format!("--{name} is missing"));
        }
        let rates = [
            ("learning_rate", self.learning_rate, f64::MAX),
            ("weight_decay", self.weight_decay, f64::MAX),
            ("max_grad_norm", self.max_grad_norm, f64::MAX),
            ("adam_epsilon", self.adam_epsilon, f64::MAX),
            ("num_train_epochs", self.num_train_epochs, 1e5),
            ("warmup_ratio", self.warmup_ratio, 1.0),
        ];
        for (name, value, most) in rates {
            let fine = value.is_finite() && value >= 0.0 && value <= most;
            let most = if most < f64::MAX { format!(", at most {most}") } else { String::new() };
            check(fine, format!("{name} is {value}, needed 0 or more{most}"));
        }
        for (name, beta) in [("adam_beta1", self.adam_beta1), ("adam_beta2", self.adam_beta2)] {
            check((0.0..1.0).contains(&beta), format!("{name} is {beta}, needed in [0, 1)"));
        }
        let counts = [
            ("per_device_train_batch_size", self.per_device_train_batch_size as u64),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps as u64),
            ("eval_steps", self.eval_steps),
            ("save_steps", self.save_steps),
        ];
        for (name, count) in counts {
            check(count > 0, format!("{name} is 0, needed at least 1"));
        }
        check(self.adam_epsilon as f32 > 0.0, "adam_epsilon is no positive f32".into());
        let budget = &self.memory_budget;
        let fine = budget.is_empty() || parse_bytes(budget).is_some();
        check(fine, format!("memory_budget is {budget:?}, needed a size like 600MB or 2GiB"));
        let p = self.lora_dropout;
        check((0.0..1.0).contains(&p), format!("lora_dropout is {p}, needed in [0, 1)"));
        let seed = self.seed;
        check(i64::try_from(seed).is_ok(), format!("seed is {seed}, needed below 2^63"));
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
                ("init_lora_weights", self.init_lora_weights != plain.init_lora_weights),
            ];
            for (name, _) in own.iter().filter(|(_, set)| *set) {
                check(false, format!("{name} is the adapter's own with --adapter, not to be set"));
            }
        }
        check(self.max_length > 1, format!("max_length is {}, needed 2 or more", self.max_length));
        let some = self.max_steps > 0 || self.num_train_epochs > 0.0;
        check(some, "num_train_epochs and max_steps are both 0: nothing would be trained".into());
        (!faults.is_empty()).then(|| faults.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_survive_the_file() {
        let settings = SftSettings {
            data: "a.jsonl".into(),
            target_modules: vec!["q_proj".into()],
            eval_strategy: Some(EvalStrategy::Steps),
            ..Default::default()
        };
        let text = toml::to_string(&settings).unwrap();
        assert_eq!(toml::from_str::<SftSettings>(&text).unwrap(), settings);
        assert!(!text.contains("exclude_modules"), "{text}");
        assert!(toml::from_str::<SftSettings>("learning_rat = 1.0").is_err());
    }

    #[test]
    fn all_faults_are_told_at_once() {
        let settings = SftSettings { save_steps: 0, adam_beta1: 1.0, ..Default::default() };
        let fault = settings.fault().unwrap();
        for words in ["--base", "--data", "--out", "save_steps", "adam_beta1"] {
            assert!(fault.contains(words), "{fault}");
        }
    }
}
