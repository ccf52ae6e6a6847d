//! Enums whose values have a fixed name in files and on the command line.
//!
//! `string_enum!` makes the enum, its list of values, [`Display`](std::fmt::Display),
//! [`FromStr`](std::str::FromStr) and serde from one list.

/// A closed set of values, each with a name.
pub trait StringEnum: Copy + PartialEq + Sized + 'static {
    /// All values, in the order of their definition.
    const VALUES: &'static [Self];

    /// The name of a value in files and on the command line.
    fn name(self) -> &'static str;

    /// A description of the value for help texts.
    fn description(self) -> &'static str;

    /// The value of a name.
    ///
    /// # Errors
    /// If the name is unknown; the message lists all names.
    fn from_name(name: &str) -> Result<Self, String> {
        let found = Self::VALUES.iter().find(|value| value.name() == name);
        found.copied().ok_or_else(|| {
            let names: Vec<&str> = Self::VALUES.iter().map(|value| value.name()).collect();
            format!("unknown value {name:?}, expected one of {}", names.join(", "))
        })
    }
}

/// Defines an enum whose values have names: `/// Description.` then `Value = "name",`.
macro_rules! string_enum {
    ($(#[$meta:meta])* $vis:vis enum $enum:ident {
        $($(#[doc = $doc:literal])+ $value:ident = $name:literal,)+
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq)]
        $vis enum $enum {
            $($(#[doc = $doc])+ $value,)+
        }

        impl $crate::string_enum::StringEnum for $enum {
            const VALUES: &'static [Self] = &[$(Self::$value),+];

            fn name(self) -> &'static str {
                match self {
                    $(Self::$value => $name,)+
                }
            }

            fn description(self) -> &'static str {
                match self {
                    $(Self::$value => concat!($($doc),+).trim_ascii(),)+
                }
            }
        }

        impl std::fmt::Display for $enum {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str($crate::string_enum::StringEnum::name(*self))
            }
        }

        impl std::str::FromStr for $enum {
            type Err = String;

            fn from_str(name: &str) -> std::result::Result<Self, String> {
                $crate::string_enum::StringEnum::from_name(name)
            }
        }

        impl serde::Serialize for $enum {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                serializer.serialize_str($crate::string_enum::StringEnum::name(*self))
            }
        }

        impl<'de> serde::Deserialize<'de> for $enum {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
                let name = <String as serde::Deserialize>::deserialize(deserializer)?;
                name.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
pub(crate) use string_enum;

#[cfg(test)]
mod tests {
    use super::*;

    string_enum! {
        /// What a test chooses from.
        #[derive(Debug)]
        enum TestChoice {
            /// The first,
            /// on two lines.
            First = "first",
            /// The other.
            SecondOne = "second_one",
        }
    }

    #[test]
    fn names_parse_print_and_survive_json() {
        for &choice in TestChoice::VALUES {
            assert_eq!(choice.to_string().parse(), Ok(choice));
            let json = serde_json::to_string(&choice).unwrap();
            assert_eq!(json, format!("\"{choice}\""));
            assert_eq!(serde_json::from_str::<TestChoice>(&json).unwrap(), choice);
        }
        let error = "third".parse::<TestChoice>().unwrap_err();
        assert_eq!(error, "unknown value \"third\", expected one of first, second_one");
        assert_eq!(TestChoice::First.description(), "The first, on two lines.");
    }
}
