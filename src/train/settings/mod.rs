//! All settings of a training run, each defined once: flag, key of the TOML file, default and help text.
//! Names are PEFT's, TRL's and transformers'.
//!
//! [`CommonSettings`] are shared by all training commands; each command adds its own. In a file they are
//! one flat table.

mod compute;
mod keys;
mod lists;
mod optimization;
mod part;
mod pretrain;
mod validate;
mod values;

pub use compute::{ComputeSetting, resolve_compute};
pub use keys::{AdapterPath, ByteSize, PathVisitor, RewardRule, SettingValue};
pub use lists::{
    CommonSettings, DpoSettings, GrpoSettings, OptimizerSettings, PpoSettings, RewardSettings,
    RolloutSettings, SftSettings,
};
#[cfg(feature = "cli")]
pub(crate) use lists::{
    common_settings, dpo_settings, grpo_settings, optimizer_settings, ppo_settings,
    reward_settings, rollout_settings, sft_settings,
};
pub use part::SettingsPart;
pub use pretrain::PretrainSettings;
#[cfg(feature = "cli")]
pub(crate) use pretrain::pretrain_settings;
pub use values::{AdvantageEstimator, EvalStrategy, FloatType, Preset, ValueModel};

use std::path::{Path, PathBuf};

use compute::set_backend;
use part::make_absolute;

use super::TrainError;
use super::best::BestSettings;
use super::metrics::EVAL;
use crate::objectives::preference::{PreferenceLoss, PreferenceLossType, PreferenceSettings};
use crate::ops::Compute;
use crate::optim::ScheduleKind;
use crate::text::{AddedTokenSpec, TextError};

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

    /// The default settings of a command.
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

    /// The command.
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
    /// None.
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

/// Keys that may change when a run is resumed, because they do not affect the result.
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
    pub fn tracks_best(&self) -> bool {
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
}

impl DpoSettings {
    /// The preference loss with its parameters.
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::DeviceName;

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

    /// Finds every key that can hold a path by trial, and checks that the path is made absolute.
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
