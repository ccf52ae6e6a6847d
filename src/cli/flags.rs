//! The flags of the training commands, generated from the lists of their settings. Flags that are not given are
//! unset, so that they do not override the config file.

use std::path::PathBuf;

use serde::Serialize;

use crate::data::checks::Check;
use crate::data::corpus::SourceSpec;
use crate::data::{AlpacaPrompt, DataFile};
use crate::objectives::advantage::{KlEstimator, ScaleRewards};
use crate::objectives::policy::LossForm;
use crate::objectives::preference::PreferenceLossType;
use crate::ops::{BackendKind, DeviceName};
use crate::optim::ScheduleKind;
use crate::train::EvalStrategy;
use crate::train::settings::{
    AdapterPath, AdvantageEstimator, ByteSize, ComputeSetting, FloatType, Preset, RewardRule,
    ValueModel, common_settings, dpo_settings, grpo_settings, optimizer_settings, ppo_settings,
    pretrain_settings, reward_settings, rollout_settings, sft_settings,
};

/// The type of a flag whose value is kept as text; the settings parse it.
pub(super) trait AsText {
    /// The type of the text.
    type Text;
}

impl<T> AsText for T {
    type Text = String;
}

/// A value as text.
pub(super) type Text<T> = <T as AsText>::Text;
/// A value as text that may be missing.
pub(super) type OptionalText<T> = <T as AsText>::Text;

/// Defines the flags struct of a list of settings.
macro_rules! settings_flags {
    ($(#[doc = $about:literal])* $settings:ident, $flags:ident {
        $($(#[doc = $doc:literal])+ $(#[flag($($flag:tt)*)])? $(#[fingerprint = $what:literal])?
        $name:ident: $type:ty = $default:expr,)*
        $(..$group:ident: $group_type:ident, $group_flags:ident = $group_default:expr,)*
    }) => {
        #[doc = concat!("The flags of `", stringify!($settings), "`; `None` if not given.")]
        #[derive(Debug, Clone, Default, Serialize, clap::Args)]
        pub(crate) struct $flags {
            $($(#[doc = $doc])+
            #[serde(skip_serializing_if = "Option::is_none")]
            #[arg(long, $($($flag)*)?)]
            pub $name: Option<$type>,)*
            $(#[command(flatten)]
            #[serde(flatten)]
            pub $group: $group_flags,)*
        }
    };
}

optimizer_settings!(settings_flags);
rollout_settings!(settings_flags);
common_settings!(settings_flags);
sft_settings!(settings_flags);
reward_settings!(settings_flags);
dpo_settings!(settings_flags);
ppo_settings!(settings_flags);
grpo_settings!(settings_flags);
pretrain_settings!(settings_flags);
