//! JSON lines and the kinds of rows they hold, told apart by their keys as TRL does.

use std::io::{BufRead, Read};

use serde_json::{Map, Value};

use super::RowError;

/// Roles a message may have, as OpenAI's and Hugging Face's formats name them.
const ROLES: [&str; 6] = ["system", "user", "assistant", "tool", "developer", "function"];

/// One row, checked but not yet tokenized.
#[derive(Debug, Clone, PartialEq)]
pub enum Row {
    /// `input_ids` (+ `labels`, where -100 marks what is not learned): nothing is added to them.
    Tokens {
        /// The token ids.
        input_ids: Vec<u32>,
        /// One for each token.
        learned: Vec<bool>,
    },
    /// `messages` (+ `tools`), or `prompt` and `completion` as lists of messages: the assistant's
    /// are learned, those of a prompt are not.
    Messages {
        /// The conversation.
        messages: Vec<Message>,
        /// JSON schemas of the tools the template may list.
        tools: Option<Value>,
    },
    /// `prompt` and `completion` as strings: the completion is learned.
    PromptCompletion {
        /// What is given.
        prompt: String,
        /// What is learned.
        completion: String,
    },
    /// `text`: everything is learned.
    Text(String),
}

/// A message of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Its role, one of those known.
    pub role: String,
    /// The message as templates see it, without `train`; a list of text parts is joined by
    /// newlines, as llama.cpp does for templates that know strings only.
    pub value: Value,
    /// Whether it is learned: only the assistant's are, unless `train` is false.
    pub learned: bool,
}

impl Row {
    /// Reads one line. A key whose value is null counts as absent, as tables are exported so.
    pub fn parse(line: &[u8]) -> Result<Self, RowError> {
        let text = std::str::from_utf8(line)
            .map_err(|e| RowError::NotUtf8 { column: e.valid_up_to() + 1 })?;
        let mut row = match serde_json::from_str(text).map_err(json_error)? {
            Value::Object(row) => row,
            other => return Err(RowError::NotAnObject { found: describe(&other) }),
        };
        row.retain(|_, value| !value.is_null());
        if row.contains_key("input_ids") {
            tokens(&row)
        } else if let Some(messages) = row.get("messages") {
            Ok(Self::Messages {
                messages: message_list("messages", messages)?,
                tools: tools(&row)?,
            })
        } else if let (Some(prompt), Some(completion)) = (row.get("prompt"), row.get("completion"))
        {
            prompt_completion(prompt, completion, &row)
        } else if let Some(text) = row.get("text") {
            Ok(Self::Text(string("text", text)?))
        } else {
            Err(RowError::UnknownKind { keys: row.keys().cloned().collect() })
        }
    }
}

fn tokens(row: &Map<String, Value>) -> Result<Row, RowError> {
    // Other masks would be silently ignored: better to say that they are not read.
    for key in ["attention_mask", "completion_mask", "assistant_masks"] {
        if let Some(value) = row.get(key) {
            let ones = value.as_array().is_some_and(|a| a.iter().all(|v| v.as_u64() == Some(1)));
            if !ones {
                let found = "a mask with other entries than 1".into();
                let needed = "`labels` with -100 in its place";
                return Err(RowError::Value { key: key.into(), found, needed });
            }
        }
    }
    let ids = list("input_ids", &row["input_ids"])?;
    let id = |(i, value): (usize, &Value)| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| wrong(&format!("input_ids[{i}]"), value, "a token id"))
    };
    let input_ids = ids.iter().enumerate().map(id).collect::<Result<Vec<u32>, _>>()?;
    let Some(labels) = row.get("labels") else {
        let learned = vec![true; input_ids.len()];
        return Ok(Row::Tokens { input_ids, learned });
    };
    let labels = list("labels", labels)?;
    if labels.len() != input_ids.len() {
        return Err(RowError::LabelCount { labels: labels.len(), input_ids: input_ids.len() });
    }
    let learned =
        labels.iter().zip(&input_ids).enumerate().map(|(i, (label, &id))| match label.as_i64() {
            Some(-100) => Ok(false),
            Some(label) if label == i64::from(id) => Ok(true),
            _ => Err(wrong(&format!("labels[{i}]"), label, "-100 or the token id at its place")),
        });
    let learned = learned.collect::<Result<_, _>>()?;
    Ok(Row::Tokens { input_ids, learned })
}

fn prompt_completion(
    prompt: &Value,
    completion: &Value,
    row: &Map<String, Value>,
) -> Result<Row, RowError> {
    if !prompt.is_array() {
        let prompt = string("prompt", prompt)?;
        return Ok(Row::PromptCompletion { prompt, completion: string("completion", completion)? });
    }
    let mut messages = message_list("prompt", prompt)?;
    for message in &mut messages {
        message.learned = false;
    }
    messages.extend(message_list("completion", completion)?);
    Ok(Row::Messages { messages, tools: tools(row)? })
}

/// `tools` as a list, or as the JSON text of one (TRL's form for tables without nested columns).
fn tools(row: &Map<String, Value>) -> Result<Option<Value>, RowError> {
    const NEEDED: &str = "a list of tools or the JSON text of one";
    match row.get("tools") {
        None => Ok(None),
        Some(tools @ Value::Array(_)) => Ok(Some(tools.clone())),
        Some(value @ Value::String(text)) => match serde_json::from_str(text) {
            Ok(tools @ Value::Array(_)) => Ok(Some(tools)),
            _ => Err(wrong("tools", value, NEEDED)),
        },
        Some(other) => Err(wrong("tools", other, NEEDED)),
    }
}

fn message_list(key: &str, value: &Value) -> Result<Vec<Message>, RowError> {
    let messages = list(key, value)?;
    if messages.is_empty() {
        return Err(wrong(key, value, "at least one message"));
    }
    let messages = messages.iter().enumerate();
    messages.map(|(i, value)| message(&format!("{key}[{i}]"), value)).collect()
}

fn message(key: &str, value: &Value) -> Result<Message, RowError> {
    let Value::Object(fields) = value else {
        return Err(wrong(key, value, "a message with `role` and `content`"));
    };
    let mut fields = fields.clone();
    let role_key = format!("{key}.role");
    let role = match fields.get("role") {
        Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role.clone(),
        other => {
            let needed = "one of system, user, assistant, tool, developer, function";
            return Err(wrong(&role_key, other.unwrap_or(&Value::Null), needed));
        }
    };
    let assistant = role == "assistant";
    let learned = match fields.shift_remove("train") {
        None | Some(Value::Null) => assistant,
        Some(Value::Bool(train)) if assistant || !train => assistant && train,
        Some(other) if assistant => {
            return Err(wrong(&format!("{key}.train"), &other, "true or false"));
        }
        Some(other) => {
            let needed = "false: only the assistant's messages are learned";
            return Err(wrong(&format!("{key}.train"), &other, needed));
        }
    };
    let calls_tools = fields.get("tool_calls").is_some_and(Value::is_array);
    match fields.get("content") {
        // An assistant that only calls tools says nothing.
        None | Some(Value::Null) if assistant && calls_tools => {}
        content => {
            let content = content_text(&format!("{key}.content"), content.unwrap_or(&Value::Null))?;
            fields.insert("content".into(), Value::String(content));
        }
    }
    Ok(Message { role, value: Value::Object(fields), learned })
}

fn content_text(key: &str, content: &Value) -> Result<String, RowError> {
    const NEEDED: &str = "a string or a list of text parts";
    let parts = match content {
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) => parts,
        other => return Err(wrong(key, other, NEEDED)),
    };
    let text = |(i, part): (usize, &Value)| match (part.get("type"), part.get("text")) {
        (Some(Value::String(kind)), Some(Value::String(text))) if kind == "text" => {
            Ok(text.clone())
        }
        _ => Err(wrong(&format!("{key}[{i}]"), part, "a part {\"type\": \"text\", \"text\": ...}")),
    };
    let texts = parts.iter().enumerate().map(text).collect::<Result<Vec<_>, _>>()?;
    Ok(texts.join("\n"))
}

fn list<'a>(key: &str, value: &'a Value) -> Result<&'a [Value], RowError> {
    value.as_array().map(Vec::as_slice).ok_or_else(|| wrong(key, value, "a list"))
}

fn string(key: &str, value: &Value) -> Result<String, RowError> {
    value.as_str().map(str::to_owned).ok_or_else(|| wrong(key, value, "a string"))
}

fn wrong(key: &str, found: &Value, needed: &'static str) -> RowError {
    RowError::Value { key: key.into(), found: describe(found), needed }
}

/// A value in few words; the beginning of a long one.
fn describe(value: &Value) -> String {
    let text = match value {
        Value::Null => return "missing".into(),
        Value::Array(items) if items.is_empty() => return "an empty list".into(),
        Value::Array(items) => return format!("a list of {}", items.len()),
        Value::Object(_) => return "an object".into(),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => value.to_string(),
    };
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn json_error(error: serde_json::Error) -> RowError {
    let text = error.to_string();
    let problem = text.rsplit_once(" at line ").map_or(text.as_str(), |(problem, _)| problem);
    RowError::Json { problem: problem.into(), column: error.column() }
}

/// A line that is not blank.
pub(super) struct Line {
    /// Its row: blank lines are not counted, the first is 0.
    pub row: u64,
    /// Its place in the file, counted from 1.
    pub number: u64,
    /// Its bytes with the newline they end in, without a byte order mark.
    pub bytes: Vec<u8>,
    /// Whether it is longer than a line may be: then no bytes of it are kept, since what is no
    /// JSONL at all may be one line of any length.
    pub too_long: bool,
}

/// The lines of a file, in order.
pub(super) struct Lines<R> {
    reader: R,
    /// Bytes a line may have.
    most: usize,
    row: u64,
    number: u64,
}

impl<R: BufRead> Lines<R> {
    pub fn new(reader: R, most: usize) -> Self {
        Self { reader, most, row: 0, number: 0 }
    }

    /// The next line that is not blank, or `None` at the end. `seen` is shown every byte read.
    pub fn next(&mut self, mut seen: impl FnMut(&[u8])) -> std::io::Result<Option<Line>> {
        loop {
            let mut bytes = Vec::new();
            // One byte more than there may be tells a line that is too long.
            let mut limited = self.reader.by_ref().take(self.most as u64 + 1);
            if limited.read_until(b'\n', &mut bytes)? == 0 {
                return Ok(None);
            }
            seen(&bytes);
            self.number += 1;
            if self.number == 1 && bytes.starts_with(b"\xef\xbb\xbf") {
                bytes.drain(..3);
            }
            let too_long = bytes.len() > self.most;
            if too_long {
                if !bytes.ends_with(b"\n") {
                    self.skip_line(&mut seen)?;
                }
                bytes = Vec::new();
            } else if bytes.trim_ascii().is_empty() {
                continue;
            }
            self.row += 1;
            return Ok(Some(Line { row: self.row - 1, number: self.number, bytes, too_long }));
        }
    }

    /// Reads on to the end of the line and keeps nothing of it.
    fn skip_line(&mut self, mut seen: impl FnMut(&[u8])) -> std::io::Result<()> {
        loop {
            let buffer = self.reader.fill_buf()?;
            let end = buffer.iter().position(|&byte| byte == b'\n');
            let part = &buffer[..end.map_or(buffer.len(), |end| end + 1)];
            seen(part);
            let read = part.len();
            self.reader.consume(read);
            if end.is_some() || read == 0 {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_too_long_is_skipped_and_counted() {
        let file = b"12345678\n\n123456789\n123456789 and more\n1234567\n1234567890";
        let mut lines = Lines::new(file.as_slice(), 9);
        let mut seen = Vec::new();
        let mut found = Vec::new();
        while let Some(line) = lines.next(|bytes| seen.extend_from_slice(bytes)).unwrap() {
            assert_eq!(line.too_long, line.bytes.is_empty());
            found.push((line.row, line.number, line.bytes.len()));
        }
        let needed = [(0, 1, 9), (1, 3, 0), (2, 4, 0), (3, 5, 8), (4, 6, 0)];
        assert_eq!(found, needed);
        assert_eq!(seen, file, "all of it is hashed");
    }

    #[test]
    fn templates_see_messages_as_strings_and_without_our_key() {
        let line = r#"{"messages": [
            {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "tool_calls": [{"id": 1}], "train": false}
        ], "tools": "[{\"name\": \"f\"}]", "text": null}"#;
        let Row::Messages { messages, tools } = Row::parse(line.as_bytes()).unwrap() else {
            panic!("messages");
        };
        let values: Vec<_> = messages.iter().map(|m| m.value.to_string()).collect();
        let expected = [
            r#"{"role":"user","name":"Ann","content":"a\nb"}"#,
            r#"{"role":"assistant","content":null,"tool_calls":[{"id":1}]}"#,
        ];
        assert_eq!(values, expected);
        assert_eq!(messages.iter().map(|m| m.learned).collect::<Vec<_>>(), [false, false]);
        assert_eq!(tools.unwrap().to_string(), r#"[{"name":"f"}]"#);
    }
}
