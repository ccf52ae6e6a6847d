//! Types of settings: values are parsed once, when a table of settings is read, and can list the paths they
//! contain.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::compute::ComputeSetting;
use super::values::{AdvantageEstimator, EvalStrategy, FloatType, Preset, ValueModel};
use crate::data::checks::Check;
use crate::data::corpus::SourceSpec;
use crate::data::{AlpacaPrompt, DataFile};
use crate::rollout::{Rule, RuleError};
use crate::train::TrainError;

/// In a list of settings: a value that is text in files and flags.
pub(super) type Text<T> = T;
/// In a list of settings: an optional value that is text in files and flags.
pub(super) type OptionalText<T> = Option<T>;

/// What [`SettingValue::visit_paths`] calls for each path.
pub type PathVisitor<'a> = dyn FnMut(&mut PathBuf) -> Result<(), TrainError> + 'a;

/// A value of a setting.
pub trait SettingValue: Clone + Serialize + DeserializeOwned {
    /// Whether the value is unset; unset keys are not written to the saved file.
    fn is_unset(&self) -> bool {
        false
    }

    /// Calls `visit` for every path in the value.
    ///
    /// # Errors
    /// Those of `visit`.
    fn visit_paths(&mut self, _visit: &mut PathVisitor) -> Result<(), TrainError> {
        Ok(())
    }
}

/// Values without paths that are always set.
macro_rules! plain_values {
    ($($type:ty),+ $(,)?) => { $(impl SettingValue for $type {})+ };
}

plain_values!(
    usize,
    u64,
    f64,
    bool,
    ByteSize,
    crate::objectives::advantage::KlEstimator,
    crate::objectives::advantage::ScaleRewards,
    crate::objectives::policy::LossForm,
    crate::objectives::preference::PreferenceLossType,
    crate::ops::BackendKind,
    crate::ops::DeviceName,
    crate::optim::ScheduleKind,
    AdvantageEstimator,
    ComputeSetting,
    FloatType,
    Preset,
    ValueModel,
);

/// Values without paths that are unset if empty.
macro_rules! values_that_may_be_empty {
    ($($type:ty: $is_empty:ident),+ $(,)?) => {
        $(impl SettingValue for $type {
            fn is_unset(&self) -> bool {
                self.$is_empty()
            }
        })+
    };
}

values_that_may_be_empty!(
    String: is_empty,
    Vec<String>: is_empty,
    Vec<usize>: is_empty,
    Vec<u32>: is_empty,
    Vec<f64>: is_empty,
    Vec<Check>: is_empty,
    Option<AlpacaPrompt>: is_none,
    Option<EvalStrategy>: is_none,
    Option<bool>: is_none,
    Option<ByteSize>: is_none,
);

impl SettingValue for PathBuf {
    fn is_unset(&self) -> bool {
        self.as_os_str().is_empty()
    }

    fn visit_paths(&mut self, visit: &mut PathVisitor) -> Result<(), TrainError> {
        visit(self)
    }
}

/// Lists of items with a path each.
macro_rules! lists_with_paths {
    ($($item:ty: $path:expr),+ $(,)?) => {
        $(impl SettingValue for Vec<$item> {
            fn is_unset(&self) -> bool {
                self.is_empty()
            }

            fn visit_paths(&mut self, visit: &mut PathVisitor) -> Result<(), TrainError> {
                let of_item: fn(&mut $item, &mut PathVisitor) -> Result<(), TrainError> = $path;
                self.iter_mut().try_for_each(|item| of_item(item, visit))
            }
        })+
    };
}

lists_with_paths!(
    DataFile: |file, visit| visit(&mut file.path),
    AdapterPath: |adapter, visit| visit(&mut adapter.path),
    RewardRule: |rule, visit| match rule {
        RewardRule::JsonSchema(path) => visit(path),
        RewardRule::Other(_) => Ok(()),
    },
    SourceSpec: |source, visit| {
        let mut path = PathBuf::from(&source.glob);
        visit(&mut path)?;
        source.glob = path.display().to_string();
        Ok(())
    },
);

/// Serializes a type as text, and parses it when reading.
macro_rules! as_text {
    ($($type:ty),+) => {
        $(impl TryFrom<String> for $type {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        })+
    };
}

as_text!(ByteSize, AdapterPath, RewardRule);

/// A size in bytes, written as `600MB`, `1.5GiB` or a plain number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ByteSize(pub u64);

/// Units of sizes, the largest first of those that are equally common.
const UNITS: [(&str, u64); 6] = [
    ("GB", 1_000_000_000),
    ("GiB", 1 << 30),
    ("MB", 1_000_000),
    ("MiB", 1 << 20),
    ("kB", 1000),
    ("KiB", 1 << 10),
];

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let text = text.trim();
            let unit = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
            let number: f64 = text[..unit].trim().parse().ok()?;
            let unit: f64 = match text[unit..].to_ascii_lowercase().as_str() {
                "" | "b" => 1.0,
                "k" | "kb" => 1e3,
                "m" | "mb" => 1e6,
                "g" | "gb" => 1e9,
                "kib" => 1024.0,
                "mib" => 1024.0 * 1024.0,
                "gib" => 1024.0 * 1024.0 * 1024.0,
                _ => return None,
            };
            let bytes = number * unit;
            (bytes.is_finite() && bytes >= 0.0).then_some(Self(bytes as u64))
        };
        parse().ok_or_else(|| format!("{text:?} is not a size, expected one like 600MB or 2GiB"))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |(_, bytes): &&(&str, u64)| self.0 > 0 && self.0.is_multiple_of(*bytes);
        match UNITS.iter().find(fits) {
            Some((unit, bytes)) => write!(f, "{}{unit}", self.0 / bytes),
            None => write!(f, "{}", self.0),
        }
    }
}

/// An adapter and its weight, written as `PATH` or `PATH=WEIGHT`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AdapterPath {
    /// A PEFT folder or a GGUF LoRA.
    pub path: PathBuf,
    /// Its weight.
    pub weight: f64,
}

impl FromStr for AdapterPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.rsplit_once('=').filter(|_| !Path::new(text).exists()) {
            Some((path, weight)) => match weight.parse::<f64>() {
                Ok(weight) if weight.is_finite() => Ok(Self { path: path.into(), weight }),
                _ => Err(format!("weight {weight:?} is not a number, expected PATH=WEIGHT")),
            },
            None => Ok(Self { path: text.into(), weight: 1.0 }),
        }
    }
}

impl fmt::Display for AdapterPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.path.display(), self.weight)
    }
}

/// A rule-based reward, in the syntax of [`Rule`]; the file of a JSON schema is kept as a path.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum RewardRule {
    /// `json-schema:FILE`; the file is read when the run starts.
    JsonSchema(PathBuf),
    /// Any other rule.
    Other(String),
}

/// The prefix of a rule with a file.
const JSON_SCHEMA: &str = "json-schema:";

impl FromStr for RewardRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(file) = text.strip_prefix(JSON_SCHEMA) {
            return Ok(Self::JsonSchema(file.into()));
        }
        Rule::parse(text).map_err(|error: RuleError| error.to_string())?;
        Ok(Self::Other(text.into()))
    }
}

impl fmt::Display for RewardRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::JsonSchema(path) => write!(f, "{JSON_SCHEMA}{}", path.display()),
            Self::Other(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        let check = |text: &str, bytes: Option<u64>| {
            let size = text.parse::<ByteSize>().ok();
            assert_eq!(size.map(|size| size.0), bytes, "{text}");
            if let Some(size) = size {
                assert_eq!(size.to_string().parse(), Ok(size), "{text}");
            }
        };
        check("600MB", Some(600_000_000));
        check("1.5 GiB", Some(3 << 29));
        check("2g", Some(2_000_000_000));
        check("64kib", Some(65536));
        check("123", Some(123));
        check("0", Some(0));
        check("-1MB", None);
        check("3TB", None);
        check("", None);
        assert_eq!(ByteSize(64_000_000).to_string(), "64MB");
        assert_eq!(ByteSize(3 << 29).to_string(), "1536MiB");
    }

    #[test]
    fn adapters_have_a_weight() {
        let check = |text: &str, path: &str, weight: f64| {
            let adapter: AdapterPath = text.parse().unwrap();
            assert_eq!((adapter.path.to_str(), adapter.weight), (Some(path), weight), "{text}");
            assert_eq!(adapter.to_string().parse(), Ok(adapter), "{text}");
        };
        check("a/b", "a/b", 1.0);
        check("a=0.5", "a", 0.5);
        check("a=b=2", "a=b", 2.0);
        let error = "a=b".parse::<AdapterPath>().unwrap_err();
        assert!(error.contains("PATH=WEIGHT"), "{error}");
    }

    #[test]
    fn reward_rules_are_checked_when_they_are_parsed() {
        let schema: RewardRule = "json-schema:a/b.json".parse().unwrap();
        assert_eq!(schema, RewardRule::JsonSchema("a/b.json".into()));
        for text in ["json-schema:a/b.json", "exact:answer", "length:3-9"] {
            assert_eq!(text.parse::<RewardRule>().unwrap().to_string(), text);
        }
        let error = "nice".parse::<RewardRule>().unwrap_err();
        assert!(error.contains("\"nice\" is not a known rule"), "{error}");
    }
}
