//! Parsing JSON lines. The format of a row is recognized by its keys, as in TRL: TRL's own formats, Alpaca
//! and ShareGPT.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{RowError, RowFormat};
use crate::string_enum::string_enum;

/// Roles of messages in the formats of OpenAI and Hugging Face.
const ROLES: [&str; 6] = ["system", "user", "assistant", "tool", "developer", "function"];
/// Names of these roles in ShareGPT's `from`, the most common name first.
const SPEAKERS: [(&str, &[&str]); 4] = [
    ("user", &["human", "user"]),
    ("assistant", &["gpt", "assistant", "function_call", "model", "chatgpt", "bing", "bard"]),
    ("system", &["system"]),
    ("tool", &["tool", "observation", "function_response"]),
];

/// A parsed and validated row, not yet tokenized.
#[derive(Debug, Clone, PartialEq)]
pub enum Row {
    /// `input_ids` (+ `labels`, in which -100 masks a token). No tokens are added.
    Tokens {
        /// The token ids.
        input_ids: Vec<u32>,
        /// The loss mask, one entry per token.
        learned: Vec<bool>,
    },
    /// `messages` (+ `tools`), or `prompt` and `completion` as lists of messages. Assistant messages are
    /// learned, but not those of a prompt.
    Messages {
        /// The conversation.
        messages: Vec<Message>,
        /// JSON schemas of tools, for the chat template.
        tools: Option<Value>,
    },
    /// `prompt` and `completion` as strings. The completion is learned.
    PromptCompletion {
        /// The prompt.
        prompt: String,
        /// The learned completion.
        completion: String,
    },
    /// `instruction`, `input` and `output`. The output is learned.
    Alpaca {
        /// The row as a conversation.
        messages: Vec<Message>,
        /// The prompt in Alpaca's own format; `None` if there is a system message or a history.
        prompt: Option<String>,
        /// The learned completion.
        completion: String,
    },
    /// `text`. Everything is learned.
    Text(String),
}

string_enum! {
    /// Prompt format of Alpaca rows.
    #[derive(Debug)]
    pub enum AlpacaPrompt {
        /// The chat template, with the instruction, a newline and the input as the user message (as in
        /// LLaMA-Factory).
        Chat = "chat",
        /// Alpaca's own prompt, "Below is an instruction ...", up to `### Response:` and a newline.
        Text = "text",
    }
}

/// A message of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// The role, one of the known roles.
    pub role: String,
    /// The message as passed to the chat template, without `train`. A list of text parts is joined by
    /// newlines, as in llama.cpp for templates that only accept strings.
    pub value: Value,
    /// Whether the message is learned: only assistant messages are, unless `train` is false.
    pub learned: bool,
}

impl Row {
    /// Parses one line. A key with value null counts as absent, since exported tables have such keys.
    pub fn parse(line: &[u8]) -> Result<Self, RowError> {
        Self::read(line).1
    }

    /// Parses one line, and also returns its format, which is known even for most invalid rows.
    pub(super) fn read(line: &[u8]) -> (Option<RowFormat>, Result<Self, RowError>) {
        match object(line) {
            Ok(row) => (RowFormat::of(&row), Self::of(row)),
            Err(error) => (None, Err(error)),
        }
    }

    fn of(mut row: Map<String, Value>) -> Result<Self, RowError> {
        row.retain(|_, value| !value.is_null());
        if row.contains_key("input_ids") {
            tokens(&row)
        } else if let Some(messages) = row.get("messages") {
            Ok(Self::Messages {
                messages: message_list("messages", messages)?,
                tools: tools(&row)?,
            })
        } else if row.contains_key("conversations") && !row.contains_key("chosen") {
            share_gpt(&row)
        } else if row.contains_key("instruction") && row.contains_key("output") {
            alpaca(&row)
        } else if let (Some(prompt), Some(completion)) = (row.get("prompt"), row.get("completion"))
        {
            prompt_completion(prompt, completion, &row)
        } else if let Some(text) = row.get("text") {
            Ok(Self::Text(string("text", text)?))
        } else {
            let keys = row.keys().cloned().collect();
            match RowFormat::of(&row).filter(|format| !format.is_supervised()) {
                Some(format) => Err(RowError::OfOthers { format }),
                None => Err(RowError::UnknownKind { keys }),
            }
        }
    }
}

/// A ShareGPT conversation, with `system` and `tools` beside it or in it.
fn share_gpt(row: &Map<String, Value>) -> Result<Row, RowError> {
    let mut messages = message_list("conversations", &row["conversations"])?;
    if let Some(system) = row.get("system")
        && messages[0].role != "system"
    {
        let system = string("system", system)?;
        if !system.is_empty() {
            messages.insert(0, plain_message("system", &system));
        }
    }
    // Wraps bare functions, as in LLaMA-Factory, into the form that chat templates expect.
    let wrapped = |tool: Value| match tool.get("name").is_some() && tool.get("function").is_none() {
        true => json!({ "type": "function", "function": tool }),
        false => tool,
    };
    let tools = tools(row)?.map(|tools| match tools {
        Value::Array(tools) => tools.into_iter().map(wrapped).collect(),
        other => other,
    });
    Ok(Row::Messages { messages, tools: tools.filter(|tools| tools != &json!([])) })
}

/// An Alpaca row, optionally with LLaMA-Factory's `system` and `history`.
fn alpaca(row: &Map<String, Value>) -> Result<Row, RowError> {
    let text = |key: &str| row.get(key).map_or(Ok(String::new()), |value| string(key, value));
    let (instruction, input) = (text("instruction")?, text("input")?);
    let (system, completion) = (text("system")?, text("output")?);
    let mut messages = Vec::new();
    if !system.is_empty() {
        messages.push(plain_message("system", &system));
    }
    let history = row.get("history").map_or(Ok(&[][..]), |history| list("history", history))?;
    for (i, turn) in history.iter().enumerate() {
        let [Value::String(asked), Value::String(answer)] = list("history", turn)? else {
            let needed = "a pair of a user message and an answer";
            return Err(wrong(&format!("history[{i}]"), turn, needed));
        };
        messages.push(plain_message("user", asked));
        messages.push(plain_message("assistant", answer));
    }
    let prompt = messages.is_empty().then(|| alpaca_prompt(&instruction, &input));
    let asked = match input.is_empty() {
        true => instruction,
        false => format!("{instruction}\n{input}"),
    };
    messages.push(plain_message("user", &asked));
    messages.push(plain_message("assistant", &completion));
    Ok(Row::Alpaca { messages, prompt, completion })
}

/// The prompt of Taori et al. 2023, followed by a newline, as most servers of such models write it.
fn alpaca_prompt(instruction: &str, input: &str) -> String {
    let (more, input) = match input.is_empty() {
        true => (String::new(), String::new()),
        false => (
            ", paired with an input that provides further context".into(),
            format!("### Input:\n{input}\n\n"),
        ),
    };
    format!(
        "Below is an instruction that describes a task{more}. Write a response that appropriately \
         completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
    )
}

fn plain_message(role: &str, content: &str) -> Message {
    let value = json!({ "role": role, "content": content });
    Message { role: role.into(), value, learned: role == "assistant" }
}

/// A parsed and validated row of preference data, not yet tokenized.
pub(super) struct ComparisonRow {
    pub responses: Responses,
    /// Preference pairs of the responses.
    pub pairs: Vec<PreferencePair>,
    /// Whether each response is desirable; empty without labels.
    pub labels: Vec<bool>,
    /// Number of pairs of responses with equal rank.
    pub ties: u64,
    /// The JSON path of each response in the row.
    keys: Vec<String>,
}

/// A pair of responses, by their indices in `Comparison::responses`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PreferencePair {
    /// Index of the preferred response.
    pub better: usize,
    /// Index of the rejected response.
    pub worse: usize,
    /// The margin that the row states; 0 if it states none.
    pub margin: f32,
}

/// Which rows are accepted, and what they become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum ComparisonKind {
    /// Preference pairs: `chosen`/`rejected` or ranked `responses`.
    Pairs,
    /// Labelled responses: `completion` + `label`; `chosen` and `rejected` become two labelled responses.
    Labels,
    /// Any row with responses, compared or not: also `completion` or `text` alone.
    Any,
}

/// Responses and their prompt.
pub(super) enum Responses {
    /// Strings. Whole texts have an empty prompt.
    Texts { prompt: String, responses: Vec<String> },
    /// Conversations. Without a prompt in the row, their common prefix is the prompt.
    Messages { prompt: Vec<Message>, responses: Vec<Vec<Message>>, tools: Option<Value> },
}

impl ComparisonRow {
    /// Parses one line, and also returns its format, which is known even for most invalid rows. A key with
    /// value null counts as absent.
    pub(crate) fn read(
        line: &[u8],
        kind: ComparisonKind,
    ) -> (Option<RowFormat>, Result<Self, RowError>) {
        match object(line) {
            Ok(row) => (RowFormat::of(&row), Self::of(row, kind)),
            Err(error) => (None, Err(error)),
        }
    }

    fn of(mut row: Map<String, Value>, kind: ComparisonKind) -> Result<Self, RowError> {
        row.retain(|_, value| !value.is_null());
        let needed = match kind {
            ComparisonKind::Pairs => "`chosen` and `rejected`, or ranked `responses`",
            ComparisonKind::Labels => "`completion` and `label`, or `chosen` and `rejected`",
            ComparisonKind::Any => {
                "`chosen` and `rejected`, `responses`, `completion`, `messages` or `text`"
            }
        };
        let alone = |key: &str| row.get(key).map(|value| (vec![key.to_owned()], vec![value]));
        let compared = row.get("chosen").zip(row.get("rejected"));
        let (keys, values) = if let Some((chosen, rejected)) = compared {
            (vec!["chosen".into(), "rejected".into()], vec![chosen, rejected])
        } else if let (Some(values), false) = (row.get("responses"), kind == ComparisonKind::Labels)
        {
            let least = if kind == ComparisonKind::Pairs { 2 } else { 1 };
            let values = list("responses", values)?;
            if values.len() < least {
                let found = Value::Array(values.to_vec());
                return Err(wrong("responses", &found, "two or more responses"));
            }
            let key = |i| format!("responses[{i}]");
            ((0..values.len()).map(key).collect(), values.iter().collect())
        } else {
            let known: &[&str] = match kind {
                ComparisonKind::Pairs => &[],
                ComparisonKind::Labels => &["completion"],
                ComparisonKind::Any => &["completion", "messages", "text"],
            };
            known.iter().find_map(|key| alone(key)).ok_or_else(|| RowError::OtherKind {
                keys: row.keys().cloned().collect(),
                needed,
            })?
        };
        let responses = responses(&keys, &values, &row)?;
        let labels = match kind {
            ComparisonKind::Labels if compared.is_some() => vec![true, false],
            ComparisonKind::Labels => vec![label(row.get("label").unwrap_or(&Value::Null))?],
            ComparisonKind::Pairs | ComparisonKind::Any => Vec::new(),
        };
        let (pairs, ties) = if labels.is_empty() {
            ranked(values.len(), &row, compared.is_some())?
        } else {
            (Vec::new(), 0)
        };
        Ok(Self { responses, pairs, labels, ties, keys })
    }

    /// The JSON path of a response in the row.
    pub(crate) fn key(&self, response: usize) -> String {
        self.keys[response].clone()
    }
}

/// Parses the responses: all strings or all lists of messages, like the prompt or else the first response.
fn responses(
    keys: &[String],
    values: &[&Value],
    row: &Map<String, Value>,
) -> Result<Responses, RowError> {
    // `text` and `messages` are whole, so a `prompt` beside them is ignored.
    let whole = matches!(keys[0].as_str(), "text" | "messages");
    let mut prompt = row.get("prompt").filter(|_| !whole);
    if let (None, Some(turns), false) = (prompt, row.get("conversations"), whole) {
        prompt = Some(turns); // ShareGPT: the turns before the responses
    } else if let (None, Some(asked), false) = (prompt, row.get("instruction"), whole) {
        let input = row.get("input").map_or(Ok(String::new()), |input| string("input", input))?;
        let asked = string("instruction", asked)?;
        let asked = if input.is_empty() { asked } else { format!("{asked}\n{input}") };
        let turn = |role: &str, text: &Value| json!([{ "role": role, "content": text }]);
        let asked = turn("user", &asked.into());
        let said: Vec<Value> = values.iter().map(|value| turn("assistant", value)).collect();
        return message_responses(keys, &said.iter().collect::<Vec<_>>(), Some(&asked), row);
    }
    let in_messages = |value: &Value| value.is_array() || value.is_object();
    let in_messages = in_messages(prompt.unwrap_or(values[0]));
    let named = || keys.iter().zip(values);
    if !in_messages {
        let prompt = prompt.map_or(Ok(String::new()), |prompt| string("prompt", prompt))?;
        let responses = named().map(|(key, value)| string(key, value)).collect::<Result<_, _>>()?;
        return Ok(Responses::Texts { prompt, responses });
    }
    message_responses(keys, values, prompt, row)
}

fn message_responses(
    keys: &[String],
    values: &[&Value],
    prompt: Option<&Value>,
    row: &Map<String, Value>,
) -> Result<Responses, RowError> {
    let read = |(key, value): (&String, &&Value)| match value {
        Value::Array(_) => message_list(key, value),
        // A single message, as in LLaMA-Factory's ShareGPT rows.
        Value::Object(_) => Ok(vec![message(key, value)?]),
        other => Err(wrong(key, other, "a list of messages, like the rest of the row")),
    };
    let mut responses = keys.iter().zip(values).map(read).collect::<Result<Vec<_>, _>>()?;
    let tools = tools(row)?;
    let prompt = match prompt {
        Some(prompt) => message_list("prompt", prompt)?,
        None => shared_beginning(&mut responses),
    };
    Ok(Responses::Messages { prompt, responses, tools })
}

/// Splits off the common prefix of all conversations, but leaves each at least its last message (TRL's
/// `extract_prompt`).
fn shared_beginning(conversations: &mut [Vec<Message>]) -> Vec<Message> {
    let shortest = conversations.iter().map(Vec::len).min().unwrap_or_default();
    let (first, others) = conversations.split_first_mut().expect("a row has responses");
    let same = |&i: &usize| others.iter().all(|other| other[i] == first[i]);
    let shared = (0..shortest - 1).take_while(same).count();
    for other in others {
        other.drain(..shared);
    }
    first.drain(..shared).collect()
}

/// Preference pairs and the number of ties. Responses are ordered by `ranks` (1 is best), by `scores`
/// (higher is better), or else best first.
fn ranked(
    count: usize,
    row: &Map<String, Value>,
    compared: bool,
) -> Result<(Vec<PreferencePair>, u64), RowError> {
    let mut margin = 0.0;
    if let Some(value) = row.get("margin").filter(|_| compared) {
        let found = value.as_f64().map(|margin| margin as f32).filter(|margin| margin.is_finite());
        margin = found.ok_or_else(|| wrong("margin", value, "a number"))?;
    }
    let places = match (row.get("ranks"), row.get("scores")) {
        _ if compared => vec![0.0, 1.0],
        (Some(ranks), Some(_)) => {
            return Err(wrong("ranks", ranks, "no `scores` beside it: give one of the two"));
        }
        (Some(ranks), None) => numbers("ranks", ranks, count, |rank| {
            rank.as_u64().filter(|&rank| rank > 0).map(|rank| rank as f64)
        })?,
        (None, Some(scores)) => {
            numbers("scores", scores, count, |score| score.as_f64().map(|score| -score))?
        }
        (None, None) => (0..count).map(|place| place as f64).collect(),
    };
    let (mut pairs, mut ties) = (Vec::new(), 0);
    for first in 0..count {
        for second in first + 1..count {
            let (better, worse) = match places[first].total_cmp(&places[second]) {
                std::cmp::Ordering::Less => (first, second),
                std::cmp::Ordering::Greater => (second, first),
                std::cmp::Ordering::Equal => {
                    ties += 1;
                    continue;
                }
            };
            pairs.push(PreferencePair { better, worse, margin });
        }
    }
    Ok((pairs, ties))
}

/// Parses a list with one number per response.
fn numbers(
    key: &str,
    value: &Value,
    count: usize,
    read: impl Fn(&Value) -> Option<f64>,
) -> Result<Vec<f64>, RowError> {
    let values = list(key, value)?;
    if values.len() != count {
        return Err(wrong(key, value, "one entry per response"));
    }
    let needed = if key == "ranks" { "a rank, from 1 for the best" } else { "a number" };
    let number = |(i, value): (usize, &Value)| {
        read(value).ok_or_else(|| wrong(&format!("{key}[{i}]"), value, needed))
    };
    values.iter().enumerate().map(number).collect()
}

fn label(value: &Value) -> Result<bool, RowError> {
    match (value, value.as_u64()) {
        (Value::Bool(label), _) => Ok(*label),
        (_, Some(0)) => Ok(false),
        (_, Some(1)) => Ok(true),
        _ => Err(wrong("label", value, "true or false")),
    }
}

/// A parsed and validated prompt-only row, not yet tokenized. `row` is the whole row.
pub(super) enum PromptRow {
    /// A string, used as it is.
    Text { prompt: String, row: Map<String, Value> },
    /// A conversation, rendered with a generation prompt.
    Messages { prompt: Vec<Message>, tools: Option<Value>, row: Map<String, Value> },
}

impl PromptRow {
    /// Parses one line.
    pub(crate) fn parse(line: &[u8]) -> Result<Self, RowError> {
        let row = object(line)?;
        match row.get("prompt") {
            None | Some(Value::Null) => Err(RowError::OtherKind {
                keys: row.keys().cloned().collect(),
                needed: "`prompt`, a string or a list of messages",
            }),
            Some(messages @ Value::Array(_)) => {
                let (prompt, tools) = (message_list("prompt", messages)?, tools(&row)?);
                Ok(Self::Messages { prompt, tools, row })
            }
            Some(prompt) => Ok(Self::Text { prompt: string("prompt", prompt)?, row }),
        }
    }
}

/// The `text` or the `messages` of a line; other keys are ignored.
pub(super) fn document(line: &[u8]) -> Result<Row, RowError> {
    let mut row = object(line)?;
    match row.remove("text") {
        Some(Value::String(text)) => return Ok(Row::Text(text)),
        Some(Value::Null) | None => {}
        Some(other) => return Err(wrong("text", &other, "a string")),
    }
    match row.get("messages") {
        Some(Value::Null) | None => {
            let keys = row.keys().cloned().collect();
            Err(RowError::OtherKind { keys, needed: "`text` or `messages`" })
        }
        Some(messages) => {
            Ok(Row::Messages { messages: message_list("messages", messages)?, tools: tools(&row)? })
        }
    }
}

fn object(line: &[u8]) -> Result<Map<String, Value>, RowError> {
    let text =
        std::str::from_utf8(line).map_err(|e| RowError::NotUtf8 { column: e.valid_up_to() + 1 })?;
    match serde_json::from_str(text).map_err(json_error)? {
        Value::Object(row) => Ok(row),
        other => Err(RowError::NotAnObject { found: describe(&other) }),
    }
}

fn tokens(row: &Map<String, Value>) -> Result<Row, RowError> {
    // Masks other than `labels` are not supported: an error is better than ignoring them.
    for key in ["attention_mask", "completion_mask", "assistant_masks"] {
        if let Some(value) = row.get(key) {
            let ones = value.as_array().is_some_and(|a| a.iter().all(|v| v.as_u64() == Some(1)));
            if !ones {
                let found = "a mask with other entries than 1".into();
                let needed = "`labels` with -100 instead";
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
            _ => {
                Err(wrong(&format!("labels[{i}]"), label, "-100 or the token id at this position"))
            }
        });
    let learned = learned.collect::<Result<_, _>>()?;
    Ok(Row::Tokens { input_ids, learned })
}

fn prompt_completion(
    prompt: &Value,
    completion: &Value,
    row: &Map<String, Value>,
) -> Result<Row, RowError> {
    if row.get("label").is_some_and(|label| self::label(label).is_ok()) {
        return Err(RowError::OfOthers { format: RowFormat::Labelled });
    }
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

/// `tools` as a list, or as a string of JSON (as in TRL, for tables without nested columns).
fn tools(row: &Map<String, Value>) -> Result<Option<Value>, RowError> {
    const NEEDED: &str = "a list of tools or the JSON text of one";
    match row.get("tools") {
        None | Some(Value::Null) => Ok(None),
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
    if fields.contains_key("from") && !fields.contains_key("role") {
        from_share_gpt(key, &mut fields)?;
    }
    // As for keys of a row: tables have a column for every key that any message has.
    fields.retain(|key, value| key == "content" || !value.is_null());
    let role = match fields.get("role") {
        Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role.clone(),
        other => return Err(unknown_role(&format!("{key}.role"), other, ROLES.join(", "))),
    };
    let assistant = role == "assistant";
    let learned = match fields.shift_remove("train") {
        None => match fields.shift_remove("weight").map(|weight| (weight.as_u64(), weight)) {
            None => assistant,
            // OpenAI's name of `train`.
            Some((Some(weight @ (0 | 1)), _)) => assistant && weight == 1,
            Some((_, weight)) => return Err(wrong(&format!("{key}.weight"), &weight, "0 or 1")),
        },
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
    if let Some(Value::Array(calls)) = fields.get_mut("tool_calls") {
        calls.iter_mut().for_each(arguments_as_object);
    }
    match fields.get("content") {
        // An assistant message with only tool calls has no content.
        None | Some(Value::Null) if assistant && calls_tools => {}
        content => {
            let content = content_text(&format!("{key}.content"), content.unwrap_or(&Value::Null))?;
            fields.insert("content".into(), Value::String(content));
        }
    }
    Ok(Message { role, value: Value::Object(fields), learned })
}

/// Converts `from` and `value` to `role` and `content`, and a `function_call` to `tool_calls`.
fn from_share_gpt(key: &str, fields: &mut Map<String, Value>) -> Result<(), RowError> {
    let from = fields.shift_remove("from");
    let value = fields.shift_remove("value").unwrap_or(Value::Null);
    let speaker = from.as_ref().and_then(Value::as_str).unwrap_or_default();
    let role = SPEAKERS.iter().find(|(_, names)| names.contains(&speaker)).map(|(role, _)| *role);
    let Some(role) = role else {
        let known: Vec<&str> = SPEAKERS.iter().flat_map(|(_, names)| *names).copied().collect();
        return Err(unknown_role(&format!("{key}.from"), from.as_ref(), known.join(", ")));
    };
    fields.insert("role".into(), role.into());
    if speaker != "function_call" {
        fields.insert("content".into(), value);
        return Ok(());
    }
    let calls = value.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
    let calls = match calls.unwrap_or_else(|| value.clone()) {
        Value::Array(calls) => calls,
        call => vec![call],
    };
    if calls.is_empty() || calls.iter().any(|call| !call["name"].is_string()) {
        let needed = "calls as {\"name\": ..., \"arguments\": {...}}, or the JSON text of them";
        return Err(wrong(&format!("{key}.value"), &value, needed));
    }
    let call = |call: Value| json!({ "type": "function", "function": call });
    fields.insert("content".into(), "".into());
    fields.insert("tool_calls".into(), calls.into_iter().map(call).collect());
    Ok(())
}

/// Parses the `arguments` of a tool call, which OpenAI's format writes as JSON text, into the object that
/// chat templates expect. vLLM's server does the same, so training and serving see the same text.
/// Arguments that are not an object stay as they are.
fn arguments_as_object(call: &mut Value) {
    let function = match call.get("function") {
        Some(_) => &mut call["function"],
        None => call,
    };
    if let Some(Value::String(text)) = function.get("arguments")
        && let Ok(object @ Value::Object(_)) = serde_json::from_str::<Value>(text)
    {
        function["arguments"] = object;
    }
}

fn unknown_role(key: &str, found: Option<&Value>, known: String) -> RowError {
    let found = describe(found.unwrap_or(&Value::Null));
    RowError::Role { key: key.into(), found, known }
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

/// A short description of a value; long values are truncated.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_string_content_and_no_train_key() {
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
