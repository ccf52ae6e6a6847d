//! Chat templates: Jinja as transformers configures it, by minijinja.

use std::ops::Range;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior};
use sha2::{Digest, Sha256};

use super::{TextError, python};

/// Delimiters that the filter of `{% generation %}` puts around its text: Unicode noncharacters, which
/// text for interchange does not contain.
const OPEN: char = '\u{FDD0}';
const CLOSE: char = '\u{FDD1}';

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// The name of the function that returns the time.
const NOW: &str = "strftime_now";

/// A text, and byte ranges of it in order.
type Spanned = (String, Vec<Range<usize>>);

/// Renders a conversation as the text format of a model.
///
/// Rendered as by `apply_chat_template` of transformers, including how Python writes numbers,
/// booleans, lists and JSON.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: Vec<(String, String)>,
    /// Variables set by the user, parsed and as given.
    variables: Vec<(String, Value)>,
    given: serde_json::Map<String, serde_json::Value>,
    now: Option<u64>,
    has_tool_use: bool,
    has_generation: bool,
}

/// Variables that come from the conversation and cannot be set.
const OWN_VARIABLES: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

impl ChatTemplate {
    /// From the template's text, another one used when there are tools, and the variables that
    /// hold special tokens (`bos_token` and so on).
    ///
    /// # Errors
    /// If a template does not parse.
    pub fn new(
        default: &str,
        tool_use: Option<&str>,
        special: &[(&str, Option<&str>)],
    ) -> Result<Self, TextError> {
        let mut environment = environment();
        let (default, mut has_generation) = rewrite_generation(default);
        environment.add_template_owned(DEFAULT, default).map_err(failed)?;
        if let Some(tool_use) = tool_use {
            let (tool_use, also) = rewrite_generation(tool_use);
            has_generation |= also;
            environment.add_template_owned(TOOL_USE, tool_use).map_err(failed)?;
        }
        let special =
            special.iter().filter_map(|&(name, token)| Some((name.into(), token?.into())));
        Ok(Self {
            environment,
            special: special.collect(),
            variables: Vec::new(),
            given: serde_json::Map::new(),
            now: None,
            has_tool_use: tool_use.is_some(),
            has_generation,
        })
    }

    /// Sets the time of `strftime_now`, in seconds since 1970 UTC, so that a run resumed on another day
    /// renders the same texts.
    pub fn set_now(&mut self, now: u64) {
        self.now = Some(now);
        self.environment.add_function(NOW, move |format: String| python::strftime(&format, now));
    }

    /// Sets variables of the template (`chat_template_kwargs` of transformers and vLLM), such as
    /// `enable_thinking`. They override the variables of special tokens.
    ///
    /// # Errors
    /// If one comes from the conversation.
    pub fn set_variables(
        &mut self,
        variables: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<(), TextError> {
        if let Some(name) = OWN_VARIABLES.iter().find(|&&name| variables.contains_key(name)) {
            let reason = format!("{name:?} comes from the conversation and cannot be set");
            return Err(TextError::Template { line: 0, reason });
        }
        let values = variables.iter().map(|(name, value)| (name.clone(), from_json(value)));
        self.variables = values.collect();
        self.given = variables.clone();
        Ok(())
    }

    /// Another template with the same special tokens.
    ///
    /// # Errors
    /// If it does not parse.
    pub fn with_text(&self, text: &str) -> Result<Self, TextError> {
        let special: Vec<(&str, Option<&str>)> =
            self.special.iter().map(|(name, token)| (&**name, Some(&**token))).collect();
        let mut template = Self::new(text, None, &special)?;
        if let Some(now) = self.now {
            template.set_now(now);
        }
        Ok(template)
    }

    /// A hash of everything but the conversation that a rendered text depends on. The time is included only
    /// for templates that may read it; unless it is set, texts of such templates change with the day.
    pub fn fingerprint(&self) -> String {
        let mut hasher = Sha256::new();
        let mut tells_time = false;
        for name in [DEFAULT, TOOL_USE] {
            let source = self.environment.get_template(name).map(|t| t.source().to_owned());
            // Only this function reads the time, and a template can call it only by its name.
            tells_time |= source.as_ref().is_ok_and(|source| source.contains(NOW));
            hasher.update(format!("{:?}", source.ok()));
        }
        let given = serde_json::Value::Object(self.given.clone());
        let now = self.now.filter(|_| tells_time);
        hasher.update(format!("{:?} {given} {now:?}", self.special));
        hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Renders `messages`, a list of objects as the template requires, with optional `tools`;
    /// `add_generation_prompt` appends the prefix of the assistant's message.
    ///
    /// # Errors
    /// If the template fails or rejects the messages (`raise_exception`), with its message.
    pub fn render(
        &self,
        messages: &[serde_json::Value],
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let marked = self.render_marked(messages, tools, add_generation_prompt)?;
        if !self.has_generation {
            return Ok(marked);
        }
        Ok(unmark(&marked).0)
    }

    /// Renders the text with the byte ranges inside `{% generation %}`, which are the assistant's;
    /// `None` if the template has no such blocks.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_with_generation_spans(
        &self,
        messages: &[serde_json::Value],
        tools: Option<&serde_json::Value>,
    ) -> Result<Option<Spanned>, TextError> {
        if !self.has_generation {
            return Ok(None);
        }
        self.render_marked(messages, tools, false).map(|marked| Some(unmark(&marked)))
    }

    fn render_marked(
        &self,
        messages: &[serde_json::Value],
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let name = if tools.is_some() && self.has_tool_use { TOOL_USE } else { DEFAULT };
        let messages: Vec<Value> = messages.iter().map(from_json).collect();
        if self.has_generation && messages.iter().any(|m| m.to_string().contains([OPEN, CLOSE])) {
            let reason = "a message contains U+FDD0 or U+FDD1, which are not characters".into();
            return Err(TextError::Template { line: 0, reason });
        }
        let mut variables = vec![
            ("messages", Value::from(messages)),
            ("tools", tools.map_or(Value::from(()), from_json)),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        let special = self.special.iter().map(|(name, token)| (&**name, Value::from(&**token)));
        variables.extend(special);
        let given = self.variables.iter().map(|(name, value)| (&**name, value.clone()));
        variables.extend(given);
        let template = self.environment.get_template(name).map_err(failed)?;
        template.render(Value::from_pairs(variables)).map_err(failed)
    }
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .expect("the delimiters are Jinja's own"),
    );
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, _, value| {
        match value.kind() {
            ValueKind::Undefined => {}
            ValueKind::String => out.write_str(value.as_str().unwrap_or_default())?,
            _ => out.write_str(&python::str(value)?)?,
        }
        Ok(())
    });
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: Value| python::str(&value));
    environment.add_filter("generation", |text: String| format!("{OPEN}{text}{CLOSE}"));
    // In Jinja a string is a sequence, and `none` is not iterable.
    environment.add_test("sequence", |value: Value| {
        use ValueKind::{Map, Seq, String, Undefined};
        matches!(value.kind(), Undefined | String | Seq | Map)
    });
    environment.add_test("iterable", |value: Value| {
        !value.is_none() && (value.is_undefined() || value.try_iter().is_ok())
    });
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function(NOW, |format: String| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        python::strftime(&format, now)
    });
    environment
}

/// Today as `YYYY-MM-DD`, UTC.
pub fn today() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    python::strftime("%Y-%m-%d", now).unwrap_or_default()
}

/// The first second of a day given as `YYYY-MM-DD`, since 1970 UTC; `None` for an invalid date.
pub fn first_second(date: &str) -> Option<u64> {
    let mut parts = date.splitn(3, '-').map(|part| part.parse::<u64>().ok());
    let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Days before a month in a year that starts in March, so that leap days are last.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1;
    let second = (days - 719_468) * 86_400;
    let same = python::strftime("%Y-%m-%d", second).ok()? == date;
    same.then_some(second) // not the 30th of February
}

/// transformers' `tojson`: `json.dumps` without escaping of non-ASCII characters.
fn to_json(value: Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<Value> = kwargs.get("indent")?;
    let options = python::Dumps {
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent: indent.filter(|indent| !indent.is_none()).map(|indent| match indent.as_usize() {
            Some(spaces) => " ".repeat(spaces.min(64)),
            None => indent.to_string(),
        }),
        separators: match kwargs.get::<Option<Vec<String>>>("separators")?.as_deref() {
            None => None,
            Some([item, key]) => Some((item.clone(), key.clone())),
            Some(_) => {
                let words = "tojson: separators are two texts";
                return Err(Error::new(ErrorKind::InvalidOperation, words));
            }
        },
    };
    kwargs.assert_all_used()?;
    python::dumps(&value, &options)
}

/// JSON as a template value. Converted by hand: with `arbitrary_precision`, which gguf-rs enables, serde
/// passes numbers as maps.
fn from_json(value: &serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(b) => Value::from(*b),
        serde_json::Value::Number(number) => {
            let text = number.to_string();
            match text.parse::<i64>() {
                Ok(integer) => Value::from(integer),
                Err(_) => match text.parse::<i128>() {
                    Ok(integer) => Value::from(integer),
                    Err(_) => Value::from(text.parse::<f64>().unwrap_or(f64::NAN)),
                },
            }
        }
        serde_json::Value::String(text) => Value::from(&**text),
        serde_json::Value::Array(items) => items.iter().map(from_json).collect(),
        serde_json::Value::Object(entries) => {
            let entries =
                entries.iter().map(|(key, value)| (Value::from(&**key), from_json(value)));
            Value::from_pairs(entries)
        }
    }
}

/// Rewrites `{% generation %}` to a filter block, which minijinja supports; line numbers and whitespace
/// control stay the same.
fn rewrite_generation(source: &str) -> (String, bool) {
    let mut rewritten = String::with_capacity(source.len());
    let (mut found, mut raw) = (false, false);
    let mut rest = source;
    while let Some(start) = rest.find("{%").into_iter().chain(rest.find("{#")).min() {
        let (before, tag) = rest.split_at(start);
        rewritten.push_str(before);
        let close = if tag.starts_with("{#") && !raw { "#}" } else { "%}" };
        let (tag, after) = tag.split_at(tag.find(close).map_or(tag.len(), |end| end + 2));
        let word = tag.trim_start_matches("{%").trim_end_matches("%}");
        match word.trim_matches(['-', '+']).trim() {
            "raw" => raw = true,
            "endraw" => raw = false,
            "generation" if !raw => {
                found = true;
                rewritten.push_str(&tag.replacen("generation", "filter generation", 1));
                rest = after;
                continue;
            }
            "endgeneration" if !raw => {
                rewritten.push_str(&tag.replacen("endgeneration", "endfilter", 1));
                rest = after;
                continue;
            }
            _ => {}
        }
        rewritten.push_str(tag);
        rest = after;
    }
    rewritten.push_str(rest);
    (rewritten, found)
}

/// Removes the delimiters, and returns the text with the byte ranges that were between them.
fn unmark(marked: &str) -> Spanned {
    let mut text = String::with_capacity(marked.len());
    let mut spans = Vec::new();
    let mut open = Vec::new();
    for c in marked.chars() {
        match c {
            OPEN => open.push(text.len()),
            CLOSE => {
                // A nested block is inside a range already.
                if let Some(start) = open.pop()
                    && open.is_empty()
                {
                    spans.push(start..text.len());
                }
            }
            c => text.push(c),
        }
    }
    (text, spans)
}

fn failed(error: Error) -> TextError {
    let kind = error.kind().to_string();
    let reason = match (error.kind(), error.detail()) {
        (_, None) => kind,
        (ErrorKind::InvalidOperation, Some(words)) => words.into(),
        (_, Some(words)) => format!("{kind}: {words}"),
    };
    TextError::Template { line: error.line().unwrap_or(0), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_convert_to_seconds_and_back() {
        assert_eq!(first_second("1970-01-01"), Some(0));
        assert_eq!(first_second("2024-02-29"), Some(1_709_164_800));
        assert!(first_second(&today()).is_some());
        for wrong in ["2023-02-29", "2024-13-01", "24-1-1", "today", "2024-1-01", ""] {
            assert_eq!(first_second(wrong), None, "{wrong}");
        }
        let mut template = ChatTemplate::new("{{ strftime_now('%d %b') }}", None, &[]).unwrap();
        template.set_now(first_second("2024-07-26").unwrap());
        assert_eq!(template.render(&[], None, false).unwrap(), "26 Jul");
    }

    #[test]
    fn generation_tags_are_rewritten_where_they_are_tags() {
        let check = |source: &str, needed: &str, found: bool| {
            assert_eq!(rewrite_generation(source), (needed.to_owned(), found));
        };
        check(
            "a{%- generation -%}\n{% endgeneration %}",
            "a{%- filter generation -%}\n{% endfilter %}",
            true,
        );
        check("{# {% generation %} #}", "{# {% generation %} #}", false);
        let raw = "{% raw %}{% generation %}{#{% endraw %}";
        check(raw, raw, false);
        check("{% if generation %}{% en", "{% if generation %}{% en", false);
    }

    #[test]
    fn blocks_within_blocks_are_one_span() {
        let marked = format!("é{OPEN}a{OPEN}b{CLOSE}{CLOSE}{OPEN}{CLOSE}");
        assert_eq!(unmark(&marked), ("éab".to_owned(), vec![2..4, 4..4]));
    }

    #[test]
    fn further_variables_reach_the_template_and_its_fingerprint() {
        let source = "{{ bos_token }}{{ enable_thinking }}{{ effort | default('none') }}";
        let mut template = ChatTemplate::new(source, None, &[("bos_token", Some("<s>"))]).unwrap();
        let bare = template.fingerprint();
        assert_eq!(template.render(&[], None, false).unwrap(), "<s>none");
        let set = serde_json::json!({"enable_thinking": false, "bos_token": "!"});
        template.set_variables(set.as_object().unwrap()).unwrap();
        assert_eq!(template.render(&[], None, false).unwrap(), "!Falsenone");
        assert_ne!(template.fingerprint(), bare);
        let own = serde_json::json!({"tools": []});
        let error = template.set_variables(own.as_object().unwrap()).unwrap_err().to_string();
        assert!(error.contains("\"tools\" comes from the conversation"), "{error}");
        let other = template.with_text("{{ bos_token }}other").unwrap();
        assert_eq!(other.render(&[], None, false).unwrap(), "<s>other");
    }

    /// Two days make two fingerprints exactly where a template may show the day, whichever of the two
    /// templates that is.
    #[test]
    fn the_day_is_in_the_fingerprint_where_it_is_in_the_text() {
        let check = |default: &str, tool_use: Option<&str>, dated: bool| {
            let [first, second] = ["2024-07-26", "2024-07-27"].map(|day| {
                let mut template = ChatTemplate::new(default, tool_use, &[]).unwrap();
                template.set_now(first_second(day).unwrap());
                template.fingerprint()
            });
            assert_eq!(first != second, dated, "{default} {tool_use:?}");
        };
        let shown = "{% set now = strftime_now %}{{ now('%d %b') }}";
        let never = "{{ date_string | default('26 Jul 2024') }}";
        check(never, None, false);
        check(never, Some("{{ messages }}"), false);
        check(shown, None, true);
        check(never, Some(shown), true);
        check("{% if x %}{{ strftime_now('%Y') }}{% endif %}", None, true);
    }

    #[test]
    fn a_message_cannot_forge_a_span() {
        let source = "{% generation %}{{ messages[0].content }}{% endgeneration %}";
        let template = ChatTemplate::new(source, None, &[]).unwrap();
        let forged = serde_json::json!({"content": format!("x{CLOSE}")});
        let error = template.render(&[forged], None, false).unwrap_err();
        assert!(error.to_string().contains("U+FDD0"), "{error}");
    }
}
