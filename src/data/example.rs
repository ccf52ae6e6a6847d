//! Tokenizing one row, with a loss mask.

use std::ops::Range;

use serde_json::{Value, json};

use super::{AlpacaPrompt, Message, Row, RowError};
use crate::text::{ChatTemplate, Special, Tokenizer};

/// A tokenized row with a loss mask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids, special tokens included.
    pub tokens: Vec<u32>,
    /// The loss mask: whether token `i` is a target. Token 0 never is, since nothing predicts it.
    pub learned: Vec<bool>,
    /// The row number in its file, counted from 0 over lines that are not blank.
    pub row: u64,
    /// The line number in its file, counted from 1.
    pub line: u64,
    /// Start of the example in its row; above 0 only in the pieces of a long text. Random numbers are keyed
    /// by row and position, so no two tokens of a file share one.
    pub start: u32,
}

impl Example {
    /// Number of target tokens.
    pub fn learned_tokens(&self) -> usize {
        self.learned.iter().filter(|&&l| l).count()
    }
}

/// A tokenized row, before it is truncated to the maximum length.
pub(super) struct TokenizedRow {
    pub tokens: Vec<u32>,
    pub learned: Vec<bool>,
    /// Whether a token spans the border of prompt and response, so that inference tokenizes the prompt
    /// differently.
    pub boundary_mismatch: bool,
    /// What happens if the row is longer than an example may be.
    pub when_long: WhenLong,
}

/// What happens to a row that is longer than an example may be.
#[derive(Clone, Copy)]
pub(super) enum WhenLong {
    /// It is truncated at its end, since the later turns of a conversation make no sense without the
    /// earlier ones.
    Cut,
    /// It is split into several examples, since a text can be learned from any position.
    Split {
        /// BOS, if the tokenizer adds it in front of each text.
        bos: Option<u32>,
    },
}

/// Tokens, and the loss mask.
type TokensAndMask = (Vec<u32>, Vec<bool>);

/// Splits a text into pieces of at most `most` tokens, which is at least 2. Every piece but the first begins
/// with a context token that is not learned: BOS, or else the last token of the previous piece. So every
/// token of the text except the first is learned once.
pub(super) fn pieces(
    tokens: &[u32],
    learned: &[bool],
    bos: Option<u32>,
    most: usize,
) -> Vec<TokensAndMask> {
    let first = most.min(tokens.len());
    let mut pieces = vec![(tokens[..first].to_vec(), learned[..first].to_vec())];
    let mut at = first;
    while at < tokens.len() {
        let end = tokens.len().min(at + most - 1);
        let mut piece = (vec![bos.unwrap_or(tokens[at - 1])], vec![false]);
        piece.0.extend(&tokens[at..end]);
        piece.1.extend(&learned[at..end]);
        pieces.push(piece);
        at = end;
    }
    pieces
}

/// Tokenizes a row. An Alpaca row is rendered by the chat template if there is one, unless `alpaca` sets the
/// format.
pub(super) fn tokenize(
    row: &Row,
    tokenizer: &Tokenizer,
    alpaca: Option<AlpacaPrompt>,
) -> Result<TokenizedRow, RowError> {
    let mut tokenized = match row {
        Row::Tokens { input_ids, learned } => ready(input_ids, learned, tokenizer)?,
        Row::Messages { messages, tools } => conversation(messages, tools.as_ref(), tokenizer)?,
        Row::PromptCompletion { prompt, completion } => {
            prompt_completion(prompt, completion, tokenizer)?
        }
        Row::Alpaca { messages, prompt, completion } => {
            let by_template = match alpaca {
                Some(style) => style == AlpacaPrompt::Chat,
                None => tokenizer.chat_template().is_some(),
            };
            match prompt {
                _ if by_template => conversation(messages, None, tokenizer)?,
                Some(prompt) => prompt_completion(prompt, completion, tokenizer)?,
                None => return Err(RowError::AlpacaTurns),
            }
        }
        Row::Text(text) => {
            let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
            let text = prompt_completion("", text, tokenizer)?;
            TokenizedRow { when_long: WhenLong::Split { bos }, ..text }
        }
    };
    if let Some(first) = tokenized.learned.first_mut() {
        *first = false;
    }
    Ok(tokenized)
}

fn ready(ids: &[u32], learned: &[bool], tokenizer: &Tokenizer) -> Result<TokenizedRow, RowError> {
    let vocab_size = tokenizer.vocab_size();
    if let Some(index) = ids.iter().position(|&id| id as usize >= vocab_size) {
        return Err(RowError::OutOfVocabulary { index, token: ids[index], vocab_size });
    }
    let (tokens, learned) = (ids.into(), learned.into());
    Ok(TokenizedRow { tokens, learned, boundary_mismatch: false, when_long: WhenLong::Cut })
}

/// Tokenizes prompt and completion jointly. The learned part begins at the first token in which the joint
/// tokens differ from those of the prompt alone (as in TRL), which is after the prompt unless a token spans
/// the border. A learned end-of-sequence token is appended unless there is one.
fn prompt_completion(
    prompt: &str,
    completion: &str,
    tokenizer: &Tokenizer,
) -> Result<TokenizedRow, RowError> {
    let own = tokenizer.with_bos(tokenizer.encode(prompt, Special::Parse)?);
    let joint = tokenizer.encode(&format!("{prompt}{completion}"), Special::Parse)?;
    let mut tokens = tokenizer.with_bos(joint);
    let given = own.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
    if let Some(eos) = tokenizer.eos()
        && tokens[given..].last() != Some(&eos)
    {
        tokens.push(eos);
    }
    let learned = (0..tokens.len()).map(|i| i >= given).collect();
    let boundary_mismatch = given < own.len();
    Ok(TokenizedRow { tokens, learned, boundary_mismatch, when_long: WhenLong::Cut })
}

/// Renders the whole conversation once. Assistant messages are learned up to and including their
/// end-of-turn token. A token that overlaps a learned span is learned.
fn conversation(
    messages: &[Message],
    tools: Option<&Value>,
    tokenizer: &Tokenizer,
) -> Result<TokenizedRow, RowError> {
    let template = tokenizer.chat_template().ok_or(RowError::NoTemplate)?;
    let (text, spans) = match marked_spans(messages, tools, template)? {
        Some(marked) => marked,
        None => prefix_spans(messages, tools, template)?,
    };
    let encoding = tokenizer.encode_with_offsets(&text, Special::Parse)?;
    let count = encoding.ids.len();
    let tokens = tokenizer.with_bos(encoding.ids);
    let mut learned = vec![false; tokens.len() - count]; // for the added BOS, if any
    let mut boundary_mismatch = false;
    for (start, end) in encoding.offsets {
        let next = spans.partition_point(|span| span.end <= start);
        let span = spans.get(next).filter(|span| span.start < end);
        learned.push(span.is_some());
        boundary_mismatch |= span.is_some_and(|span| start < span.start);
    }
    Ok(TokenizedRow { tokens, learned, boundary_mismatch, when_long: WhenLong::Cut })
}

/// The rendered text, and the byte ranges of it that are learned, in order.
type Spans = (String, Vec<Range<usize>>);

/// The spans that the template itself marks with `{% generation %}`, if it does.
fn marked_spans(
    messages: &[Message],
    tools: Option<&Value>,
    template: &ChatTemplate,
) -> Result<Option<Spans>, RowError> {
    let values: Vec<Value> = messages.iter().map(|m| m.value.clone()).collect();
    let Some((text, spans)) = template.render_with_generation_spans(&values, tools)? else {
        return Ok(None);
    };
    let said: Vec<&Message> = messages.iter().filter(|m| m.role == "assistant").collect();
    if said.iter().all(|m| m.learned) {
        return Ok(Some((text, spans)));
    }
    if spans.len() != said.len() {
        return Err(RowError::SpanCount { spans: spans.len(), messages: said.len() });
    }
    let learned = spans.into_iter().zip(said).filter(|(_, m)| m.learned).map(|(span, _)| span);
    Ok(Some((text, learned.collect())))
}

/// The spans found by rendering prefixes: the conversation before a message, and with it. White space at the
/// end of a turn is not learned, since generation stops at the end-of-turn token before it.
fn prefix_spans(
    messages: &[Message],
    tools: Option<&Value>,
    template: &ChatTemplate,
) -> Result<Spans, RowError> {
    let values: Vec<Value> = messages.iter().map(|m| m.value.clone()).collect();
    let text = template.render(&values, tools, false)?;
    let mut spans = Vec::new();
    for i in (0..messages.len()).filter(|&i| messages[i].learned) {
        let through = template.render(&values[..=i], tools, false)?;
        let through = through.trim_end();
        let kept = text.starts_with(through);
        let start = if i == 0 {
            let start = opening(&values[0], tools, template, through);
            kept.then_some(start.ok_or(RowError::BeginsWithAssistant)?)
        } else {
            let before = template.render(&values[..i], tools, true)?;
            (kept && text.starts_with(&before)).then_some(before.len())
        };
        let Some(start) = start else {
            return Err(RowError::PrefixNotKept { message: format!("messages[{i}]") });
        };
        if start < through.len() {
            spans.push(start..through.len());
        }
    }
    Ok((text, spans))
}

/// Start of the content of a first message that is the assistant's, in `through`, the text up to the end of
/// that message. Many templates fail on an empty conversation or insert a default system message, so the
/// text before the content is not rendered but searched for: it is the generation prompt that the template
/// writes after a later turn.
fn opening(
    first: &Value,
    tools: Option<&Value>,
    template: &ChatTemplate,
    through: &str,
) -> Option<usize> {
    let turns = [first.clone(), json!({ "role": "user", "content": "?" })];
    let asked = template.render(&turns, tools, true).ok()?;
    let prompt = asked.strip_prefix(&template.render(&turns, tools, false).ok()?)?.trim_start();
    let at = through.find(prompt).filter(|_| !prompt.is_empty())?;
    Some(at + prompt.len())
}
