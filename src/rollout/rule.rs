//! Rewards by rule, for responses that can be verified without a model.
//!
//! A rule is written as its name, a colon and an argument:
//!
//! - `exact:FIELD`: the reply equals the field of its row, except for white space at the ends.
//! - `contains:FIELD`: the reply contains the field of its row as whole words, ignoring case.
//! - `numeric:FIELD` or `numeric:FIELD:TOLERANCE`: the last number in the reply equals that of the field
//!   up to TOLERANCE (by default a millionth of it).
//! - `regex:PATTERN`: the pattern matches somewhere in the reply.
//! - `json-schema:FILE`: the reply is JSON that is valid under the schema; a Markdown code fence around it
//!   is ignored.
//! - `length:MIN-MAX` or `length:TARGET`: the length of the reply in tokens, or in characters if
//!   `:characters` is appended.
//!
//! The reward is 1 or 0, except for `length`, where it decreases linearly from 1 at MIN to 0 at length 0,
//! and from 1 at MAX to 0 at twice MAX.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use fancy_regex::Regex;
use jsonschema::Validator;
use serde_json::{Map, Value};

use super::Sample;

/// A rule that scores a reply.
#[derive(Debug)]
pub enum Rule {
    /// The reply equals a field of its row.
    Exact {
        /// The field.
        field: String,
    },
    /// The reply contains a field of its row.
    Contains {
        /// The field.
        field: String,
    },
    /// The last number in the reply equals that of a field.
    Numeric {
        /// The field: a number, or a text whose last number counts.
        field: String,
        /// Absolute tolerance; `None` for a millionth of the number, or of 1 if that is more.
        tolerance: Option<f64>,
    },
    /// The pattern matches somewhere in the reply.
    Regex(Box<Regex>),
    /// The reply is JSON that is valid under a schema.
    JsonSchema(Box<Validator>),
    /// The length of the reply is in a range.
    Length {
        /// Minimum length.
        min: usize,
        /// Maximum length.
        max: usize,
        /// Unit of length.
        unit: Unit,
    },
}

/// Unit of length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Tokens, the end-of-sequence token not counted.
    Tokens,
    /// Unicode scalar values.
    Characters,
}

/// Why a rule cannot be parsed, or cannot be applied to a row.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuleError {
    /// An unknown rule name.
    #[error(
        "reward {spec:?} is not a known rule, needed exact:FIELD, contains:FIELD, \
         numeric:FIELD[:TOLERANCE], regex:PATTERN, json-schema:FILE, or length:MIN-MAX[:characters]"
    )]
    Unknown {
        /// The specification.
        spec: String,
    },
    /// An invalid argument.
    #[error("reward {spec:?}: {reason}")]
    Argument {
        /// The specification.
        spec: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An invalid schema file.
    #[error("{}: {reason}", path.display())]
    Schema {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A row without the field that a rule compares with.
    #[error("the row has no field {field:?} to compare the reply with; it has {known:?}")]
    NoField {
        /// The field.
        field: String,
        /// The fields of the row.
        known: Vec<String>,
    },
    /// A field of the wrong type.
    #[error("the row's field {field:?} is {found}, needed {needed}")]
    Field {
        /// The field.
        field: String,
        /// The value found.
        found: String,
        /// The value needed.
        needed: &'static str,
    },
}

impl Rule {
    /// Parses a rule in the syntax of the module documentation.
    pub fn parse(spec: &str) -> Result<Self, RuleError> {
        let unknown = || RuleError::Unknown { spec: spec.into() };
        let (word, argument) = spec.split_once(':').ok_or_else(unknown)?;
        let wrong = |reason: String| RuleError::Argument { spec: spec.into(), reason };
        let field = |field: &str| match field {
            "" => Err(wrong("no field, needed the name of a field of the row".into())),
            field => Ok(field.to_string()),
        };
        match word {
            "exact" => Ok(Self::Exact { field: field(argument)? }),
            "contains" => Ok(Self::Contains { field: field(argument)? }),
            "numeric" => {
                let (name, tolerance) = match argument.split_once(':') {
                    Some((name, tolerance)) => (name, Some(tolerance)),
                    None => (argument, None),
                };
                let number = |text: &str| match text.parse::<f64>() {
                    Ok(number) if number >= 0.0 && number.is_finite() => Ok(number),
                    _ => {
                        Err(wrong(format!("tolerance is {text:?}, needed a number of at least 0")))
                    }
                };
                let tolerance = tolerance.map(number).transpose()?;
                Ok(Self::Numeric { field: field(name)?, tolerance })
            }
            "regex" => match Regex::new(argument) {
                Ok(pattern) => Ok(Self::Regex(Box::new(pattern))),
                Err(e) => Err(wrong(format!("not a regular expression: {e}"))),
            },
            "json-schema" => Ok(Self::JsonSchema(Box::new(schema(Path::new(argument))?))),
            "length" => {
                let (range, unit) = match argument.split_once(':') {
                    Some((range, "characters")) => (range, Unit::Characters),
                    Some((range, "tokens")) => (range, Unit::Tokens),
                    Some((_, unit)) => {
                        let reason = format!("unit is {unit:?}, needed tokens or characters");
                        return Err(wrong(reason));
                    }
                    None => (argument, Unit::Tokens),
                };
                let (min, max) = range.split_once('-').unwrap_or((range, range));
                match (min.trim().parse(), max.trim().parse()) {
                    (Ok(min), Ok(max)) if min <= max && max > 0 => {
                        Ok(Self::Length { min, max, unit })
                    }
                    _ => Err(wrong(format!("range is {range:?}, needed MIN-MAX, such as 20-200"))),
                }
            }
            _ => Err(unknown()),
        }
    }

    /// Checks that the rule can be applied to replies to a row. A run does so before the first step.
    pub fn check(&self, row: &Map<String, Value>) -> Result<(), RuleError> {
        match self {
            Self::Exact { field } | Self::Contains { field } => {
                expected_text(row, field).map(|_| ())
            }
            Self::Numeric { field, .. } => expected_number(row, field).map(|_| ()),
            Self::Regex(_) | Self::JsonSchema(_) | Self::Length { .. } => Ok(()),
        }
    }

    /// The reward of a reply.
    pub fn score(&self, sample: &Sample) -> Result<f64, RuleError> {
        let reply = sample.completion;
        let holds = match self {
            Self::Exact { field } => reply.trim() == expected_text(sample.row, field)?.trim(),
            Self::Contains { field } => contains(reply, &expected_text(sample.row, field)?),
            Self::Numeric { field, tolerance } => {
                let expected = expected_number(sample.row, field)?;
                let tolerance = tolerance.unwrap_or(1e-6 * expected.abs().max(1.0));
                last_number(reply).is_some_and(|found| (found - expected).abs() <= tolerance)
            }
            // A pattern that exceeds the backtracking limit counts as not matching.
            Self::Regex(pattern) => pattern.is_match(reply).unwrap_or(false),
            Self::JsonSchema(schema) => serde_json::from_str(without_fence(reply))
                .is_ok_and(|value: Value| schema.is_valid(&value)),
            &Self::Length { min, max, unit } => {
                let length = match unit {
                    Unit::Tokens => sample.tokens,
                    Unit::Characters => reply.chars().count(),
                };
                return Ok(length_reward(length, min, max));
            }
        };
        Ok(f64::from(u8::from(holds)))
    }
}

/// Whether a text contains `words` with no letter or digit directly before or after, ignoring case.
fn contains(text: &str, words: &str) -> bool {
    let (text, words) = (text.to_lowercase(), words.trim().to_lowercase());
    let free = |neighbour: Option<char>| !neighbour.is_some_and(char::is_alphanumeric);
    !words.is_empty()
        && text.match_indices(&words).any(|(at, _)| {
            let before = text[..at].chars().next_back();
            free(before) && free(text[at + words.len()..].chars().next())
        })
}

/// 1 from `min` to `max`, decreasing linearly to 0 at length 0 and at twice `max`.
fn length_reward(length: usize, min: usize, max: usize) -> f64 {
    if length < min {
        length as f64 / min as f64
    } else {
        1.0 - (length.saturating_sub(max) as f64 / max as f64).min(1.0)
    }
}

fn schema(path: &Path) -> Result<Validator, RuleError> {
    let wrong = |reason: String| RuleError::Schema { path: path.into(), reason };
    let text = std::fs::read(path).map_err(|e| wrong(e.to_string()))?;
    let value = serde_json::from_slice(&text).map_err(|e| wrong(format!("not JSON: {e}")))?;
    jsonschema::validator_for(&value).map_err(|e| wrong(format!("not a JSON schema: {e}")))
}

/// The content of a Markdown code fence, or the text itself if it is not one.
fn without_fence(text: &str) -> &str {
    let text = text.trim();
    let inside = || {
        let (info, body) = text.strip_prefix("```")?.split_once('\n')?;
        let body = body.strip_suffix("```")?;
        (!info.contains('`')).then_some(body)
    };
    inside().unwrap_or(text)
}

fn expected<'a>(row: &'a Map<String, Value>, field: &str) -> Result<&'a Value, RuleError> {
    let missing =
        || RuleError::NoField { field: field.into(), known: row.keys().cloned().collect() };
    row.get(field).ok_or_else(missing)
}

/// A field as text; numbers and booleans as written in JSON.
fn expected_text(row: &Map<String, Value>, field: &str) -> Result<String, RuleError> {
    match expected(row, field)? {
        Value::String(text) => Ok(text.clone()),
        value @ (Value::Number(_) | Value::Bool(_)) => Ok(value.to_string()),
        other => Err(wrong_field(field, other, "a string or a number")),
    }
}

/// A field as a number; of a text the last number, as in "... #### 42".
fn expected_number(row: &Map<String, Value>, field: &str) -> Result<f64, RuleError> {
    let value = expected(row, field)?;
    let number = match value {
        Value::String(text) => last_number(text),
        Value::Number(number) => number.as_f64().filter(|number| number.is_finite()),
        _ => None,
    };
    number.ok_or_else(|| wrong_field(field, value, "a number or a string that contains one"))
}

fn wrong_field(field: &str, value: &Value, needed: &'static str) -> RuleError {
    RuleError::Field { field: field.into(), found: super::command::cut(&value.to_string()), needed }
}

/// The last number of a text, such as `-1,234.5e6`, with commas only between thousands. A sign counts unless
/// it is between two terms, as in `7-3`.
fn last_number(text: &str) -> Option<f64> {
    static NUMBER: LazyLock<Regex> = LazyLock::new(|| {
        let sign = r"(?:(?<![\w.)])[-+\u{2212}])?";
        let digits = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)";
        let exponent = r"(?:[eE][-+]?\d+)?";
        Regex::new(&format!("{sign}{digits}{exponent}")).expect("a regular expression")
    });
    let last = NUMBER.find_iter(text).map_while(Result::ok).last()?;
    let plain = last.as_str().replace(',', "").replace('\u{2212}', "-");
    plain.parse().ok().filter(|number: &f64| number.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn score(spec: &str, reply: &str, row: Value) -> Result<f64, RuleError> {
        let row = row.as_object().unwrap();
        let tokens = reply.split_whitespace().count();
        let rule = Rule::parse(spec)?;
        rule.check(row)?;
        rule.score(&Sample { prompt: "p", completion: reply, tokens, finished: true, row })
    }

    #[test]
    fn last_numbers() {
        let check =
            |text: &str, number: Option<f64>| assert_eq!(last_number(text), number, "{text}");
        check("no digits", None);
        check("it is 42.", Some(42.0));
        check("first 3, then 4", Some(4.0));
        check("$1,234,567.50 in all", Some(1_234_567.5));
        check("1,2345", Some(2345.0));
        check("(1,234)", Some(1234.0));
        check("-7", Some(-7.0));
        check("x = -7", Some(-7.0));
        check("7-3", Some(3.0));
        check("(2)-3", Some(3.0));
        check("\u{2212}5 degrees", Some(-5.0));
        check("6.02e23", Some(6.02e23));
        check("about .5", Some(0.5));
        check("\\boxed{12}", Some(12.0));
        check("1e999", None);
        check("**18**\n", Some(18.0));
    }

    #[test]
    fn rules_give_rewards() {
        let check = |spec: &str, reply: &str, row: Value, reward: f64| {
            assert_eq!(score(spec, reply, row).unwrap(), reward, "{spec} of {reply:?}");
        };
        let answer = |value: Value| json!({ "prompt": "p", "answer": value });
        check("exact:answer", " Paris\n", answer(json!("Paris")), 1.0);
        check("exact:answer", "Paris.", answer(json!("Paris")), 0.0);
        check("exact:answer", "12", answer(json!(12)), 1.0);
        check("exact:answer", "true", answer(json!(true)), 1.0);
        check("contains:answer", "It is Yellow.", answer(json!("yellow")), 1.0);
        check("contains:answer", "It is yellowish, not yellow!", answer(json!("yellow")), 1.0);
        check("contains:answer", "It is yellowish.", answer(json!("yellow")), 0.0);
        check("contains:answer", "twelve: 12", answer(json!(12)), 1.0);
        check("contains:answer", "112", answer(json!(12)), 0.0);
        check("contains:answer", "anything", answer(json!(" ")), 0.0);
        check("numeric:answer", "so it is 1,000.", answer(json!("10 * 100\n#### 1000")), 1.0);
        check("numeric:answer", "3.0", answer(json!(3)), 1.0);
        check("numeric:answer", "0.1", answer(json!(0.1)), 1.0);
        check("numeric:answer", "3.01", answer(json!(3)), 0.0);
        check("numeric:answer:0.02", "3.01", answer(json!(3)), 1.0);
        check("numeric:answer", "none", answer(json!(3)), 0.0);
        check("regex:^[a-z]+(?=!)", "hello!", answer(json!(0)), 1.0);
        check("regex:a:b=c", "xa:b=cx", answer(json!(0)), 1.0);
        check("regex:^b", "ab", answer(json!(0)), 0.0);
        // Catastrophic without a limit.
        check("regex:^(a|a)*\\1$", &format!("{}b", "a".repeat(64)), answer(json!(0)), 0.0);
        check("length:2-4", "one two three", answer(json!(0)), 1.0);
        check("length:2-4", "one", answer(json!(0)), 0.5);
        check("length:2-4", "1 2 3 4 5 6", answer(json!(0)), 0.5);
        check("length:2-4", &"x ".repeat(99), answer(json!(0)), 0.0);
        check("length:4:characters", "é é!", answer(json!(0)), 1.0);
        check("length:0-4", "", answer(json!(0)), 1.0);
    }

    #[test]
    fn schemas_check_integers_and_floats() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("schema.json");
        let schema = json!({
            "type": "object",
            "properties": {
                "age": { "type": "integer", "minimum": 0 },
                "height": { "type": "number", "exclusiveMaximum": 2.5 },
            },
            "required": ["age"],
        });
        std::fs::write(&path, schema.to_string()).unwrap();
        let spec = format!("json-schema:{}", path.display());
        let check = |reply: &str, reward: f64| {
            assert_eq!(score(&spec, reply, json!({})).unwrap(), reward, "{reply}");
        };
        check(r#"{"age": 4}"#, 1.0);
        check(r#"{"age": 4, "height": 2.25}"#, 1.0);
        check(r#"{"age": 4, "height": 2.5}"#, 0.0);
        check(r#"{"age": 4.5}"#, 0.0);
        check(r#"{"age": -1}"#, 0.0);
        check(r#"{"height": 1}"#, 0.0);
        check("```json\n{\"age\": 4}\n```", 1.0);
        check("Sure! {\"age\": 4}", 0.0);
        check("{\"age\": 4", 0.0);
    }

    #[test]
    fn errors_name_the_rule() {
        let check = |spec: &str, row: Value, sentence: &str| {
            let error = score(spec, "1", row).unwrap_err().to_string();
            assert!(error.starts_with(sentence), "{error}");
        };
        let row = || json!({ "prompt": "p", "solution": "x" });
        check(
            "exakt:answer",
            row(),
            "reward \"exakt:answer\" is not a known rule, needed exact:FIELD",
        );
        check("exact", row(), "reward \"exact\" is not a known rule");
        check("exact:", row(), "reward \"exact:\": no field, needed the name");
        check("numeric:a:-1", row(), "reward \"numeric:a:-1\": tolerance is \"-1\", needed");
        check("regex:(", row(), "reward \"regex:(\": not a regular expression: ");
        check("length:9-3", row(), "reward \"length:9-3\": range is \"9-3\", needed MIN-MAX");
        check("length:0", row(), "reward \"length:0\": range is \"0\", needed MIN-MAX");
        check("length:3-9:words", row(), "reward \"length:3-9:words\": unit is \"words\"");
        check("json-schema:/no/such", row(), "/no/such: ");
        check(
            "exact:answer",
            row(),
            "the row has no field \"answer\" to compare the reply with; it has [\"prompt\", \"solution\"]",
        );
        check("exact:a", json!({ "a": [1] }), "the row's field \"a\" is [1], needed a string or");
        check("numeric:solution", row(), "the row's field \"solution\" is \"x\", needed a number");

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("schema.json");
        let spec = format!("json-schema:{}", path.display());
        for (text, reason) in [
            ("{", "not JSON: "),
            (r#"{"type": "objekt"}"#, "not a JSON schema: "),
            (r#"{"$ref": "https://example.com/a.json"}"#, "not a JSON schema: "),
        ] {
            std::fs::write(&path, text).unwrap();
            check(&spec, row(), &format!("{}: {reason}", path.display()));
        }
    }
}
