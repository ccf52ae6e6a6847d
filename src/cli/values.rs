//! How values are written on the command line.

use clap::ValueEnum;
use clap::builder::PossibleValue;

use crate::data::AlpacaPrompt;
use crate::data::checks::Check;
use crate::model::CacheType;
use crate::objectives::advantage::{KlEstimator, ScaleRewards};
use crate::objectives::policy::LossForm;
use crate::objectives::preference::PreferenceLossType;
use crate::optim::ScheduleKind;
use crate::string_enum::StringEnum;
use crate::train::EvalStrategy;
use crate::train::settings::{AdvantageEstimator, FloatType, Preset, ValueModel};

/// Lists the values of string enums in `--help`, in completions and in error messages.
macro_rules! possible_values {
    ($($enum:ty),+ $(,)?) => {
        $(impl ValueEnum for $enum {
            fn value_variants<'a>() -> &'a [Self] {
                Self::VALUES
            }

            fn to_possible_value(&self) -> Option<PossibleValue> {
                let help = self.description().trim_end_matches('.');
                Some(PossibleValue::new(self.name()).help(help))
            }
        })+
    };
}

possible_values!(
    AdvantageEstimator,
    AlpacaPrompt,
    CacheType,
    Check,
    EvalStrategy,
    FloatType,
    KlEstimator,
    LossForm,
    PreferenceLossType,
    Preset,
    ScaleRewards,
    ScheduleKind,
    ValueModel,
);
