//! The struct generated from each list of settings, which reads, writes and visits its keys.

use std::path::PathBuf;

use super::keys::{PathVisitor, SettingValue};
use crate::train::TrainError;

/// A group of settings; implemented by `settings_struct!` from a list.
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

    /// The files and folders that must not change during the run, with their descriptions.
    ///
    /// # Errors
    /// None; paths are visited as [`Self::visit_paths`] does.
    fn fingerprinted(&self) -> Result<Vec<(String, PathBuf)>, TrainError>;
}

/// Defines a struct from a list of settings. Each setting has its help text, a name (the key of the TOML
/// file and, with `-` for `_`, the flag), a type and a default. `#[flag(..)]` has clap attributes of the
/// flag; `#[fingerprint = "what"]` marks files that must not change during the run.
/// `..group: Settings, Flags = default` includes the settings of another list.
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

        impl $crate::train::settings::SettingsPart for $settings {
            fn keys() -> Vec<&'static str> {
                #[allow(unused_mut)]
                let mut keys = vec![$(stringify!($name)),*];
                $(keys.extend(<$group_type as $crate::train::settings::SettingsPart>::keys());)*
                keys
            }

            fn set(&mut self, key: &str, value: toml::Value) -> Result<bool, $crate::train::TrainError> {
                $(if key == stringify!($name) {
                    self.$name = $crate::train::settings::part::read_value(key, value)?;
                    return Ok(true);
                })*
                $(if $crate::train::settings::SettingsPart::set(&mut self.$group, key, value.clone())? {
                    return Ok(true);
                })*
                Ok(false)
            }

            fn write(&self, table: &mut toml::Table) -> Result<(), $crate::train::TrainError> {
                $($crate::train::settings::part::write_value(stringify!($name), &self.$name, table)?;)*
                $($crate::train::settings::SettingsPart::write(&self.$group, table)?;)*
                Ok(())
            }

            fn visit_paths(&mut self, visit: &mut $crate::train::settings::PathVisitor) -> Result<(), $crate::train::TrainError> {
                $($crate::train::settings::SettingValue::visit_paths(&mut self.$name, visit)?;)*
                $($crate::train::settings::SettingsPart::visit_paths(&mut self.$group, visit)?;)*
                Ok(())
            }

            fn fingerprinted(&self) -> Result<Vec<(String, std::path::PathBuf)>, $crate::train::TrainError> {
                #[allow(unused_mut)]
                let mut found = Vec::new();
                $($($crate::train::settings::part::add_fingerprinted($what, &self.$name, &mut found)?;)?)*
                $(found.extend($crate::train::settings::SettingsPart::fingerprinted(&self.$group)?);)*
                Ok(found)
            }
        }
    };
}
pub(super) use settings_struct;

/// The value of a key.
pub(super) fn read_value<T: SettingValue>(key: &str, value: toml::Value) -> Result<T, TrainError> {
    value.try_into().map_err(|e: toml::de::Error| {
        let message = e.message();
        TrainError::Settings(format!("{key}: {message}"))
    })
}

/// Writes a key, if it is set.
pub(super) fn write_value<T: SettingValue>(
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
pub(super) fn add_fingerprinted<T: SettingValue>(
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

/// Makes a path absolute, if it is set.
pub(super) fn make_absolute(path: &mut PathBuf) -> Result<(), TrainError> {
    if !path.as_os_str().is_empty() {
        let absolute = std::path::absolute(&*path);
        *path = absolute.map_err(|source| TrainError::Io { path: path.clone(), source })?;
    }
    Ok(())
}
