//! Checks of settings before a run: all errors are reported at once.

use super::keys::SettingValue;
use super::part::SettingsPart;
use super::values::{AdvantageEstimator, EvalStrategy, ValueModel};
use super::{
    CommonSettings, DpoSettings, GrpoSettings, OptimizerSettings, PpoSettings, RolloutSettings,
    RunSettings, Task,
};
use crate::data::DataFile;
use crate::objectives::preference::PreferenceLossType;
use crate::string_enum::StringEnum;

/// Collects what is out of range.
#[derive(Default)]
pub(super) struct ValidationErrors(pub(super) Vec<String>);

impl ValidationErrors {
    /// All of them in one sentence, if there are any.
    pub(super) fn finish(self) -> Option<String> {
        (!self.0.is_empty()).then(|| self.0.join("; "))
    }

    pub(super) fn check(&mut self, fine: bool, fault: String) {
        if !fine {
            self.0.push(fault);
        }
    }

    /// Numbers that are 0 or more.
    pub(super) fn rates<const N: usize>(&mut self, rates: [(&str, f64, f64); N]) {
        for (name, value, most) in rates {
            let fine = value.is_finite() && value >= 0.0 && value <= most;
            let most = if most < f64::MAX { format!(", at most {most}") } else { String::new() };
            self.check(fine, format!("{name} is {value}, needed 0 or more{most}"));
        }
    }

    /// Counts that are 1 or more.
    pub(super) fn counts<const N: usize>(&mut self, counts: [(&str, u64); N]) {
        for (name, count) in counts {
            self.check(count > 0, format!("{name} is 0, needed at least 1"));
        }
    }

    pub(super) fn sampling(&mut self, temperature: f64, top_p: f64) {
        let fine = temperature.is_finite() && temperature > 0.0;
        self.check(fine, format!("temperature is {temperature}, needed more than 0"));
        let fine = top_p > 0.0 && top_p <= 1.0;
        self.check(fine, format!("top_p is {top_p}, needed more than 0 and at most 1"));
    }

    pub(super) fn mini_batches(&mut self, parts: usize, prompts: usize) {
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
        let mut faults = ValidationErrors::default();
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
                let fault = "kto compares the rows of a step: needed at least 2, set \
                             per_device_train_batch_size or gradient_accumulation_steps";
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
    fn faults(&self, faults: &mut ValidationErrors) {
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

    /// Keys that are set, but that only other losses have, with these: a loss has a key that changes
    /// what [`Self::preference`] returns.
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
    pub(super) fn faults(&self, faults: &mut ValidationErrors) {
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
    fn faults(&self, faults: &mut ValidationErrors) {
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
    fn faults(&self, faults: &mut ValidationErrors) {
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
    /// Kinds of reward there are.
    pub fn rewards(&self) -> usize {
        let models = [&self.reward_adapter, &self.reward_model];
        let models = models.iter().filter(|path| !path.is_unset()).count();
        self.reward.len() + self.reward_command.len() + models
    }

    fn faults(&self, faults: &mut ValidationErrors) {
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
    fn faults(&self, faults: &mut ValidationErrors) {
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
        faults.check(!self.tracks_best() || evaluates, fault.into());
        for (key, set) in [
            ("early_stopping_threshold", self.early_stopping_threshold != 0.0),
            ("greater_is_better", self.greater_is_better.is_some()),
        ] {
            let fault = "requires early_stopping_patience or load_best_model_at_end";
            faults.check(!set || self.tracks_best(), format!("{key} {fault}"));
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
