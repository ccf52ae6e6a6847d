//! One row as tokens, and which of them are learned.

use std::ops::Range;

use serde_json::{Value, json};

use super::{AlpacaPrompt, Message, Row, RowError};
use crate::text::{ChatTemplate, Special, Tokenizer};

/// The tokens of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids, those of special tokens included.
    pub tokens: Vec<u32>,
    /// Whether token `i` is a target. Token 0 never is: nothing predicts it.
    pub learned: Vec<bool>,
    /// The row in its file, counted from 0 over lines that are not blank.
    pub row: u64,
    /// Its line, counted from 1.
    pub line: u64,
    /// Where it begins in its row: above 0 only in pieces of a long text. Random numbers are keyed
    /// by row and place, so no two tokens of a file share theirs.
    pub start: u32,
}

impl Example {
    /// Targets among the tokens.
    pub fn learned_tokens(&self) -> usize {
        self.learned.iter().filter(|&&l| l).count()
    }
}

/// A row's tokens before it is cut to length.
pub(super) struct TokenizedRow {
    pub tokens: Vec<u32>,
    pub learned: Vec<bool>,
    /// A token holds both given and learned text: inference will see other tokens there.
    pub boundary_mismatch: bool,
    /// What is done if there are more of them than an example may have.
    pub when_long: WhenLong,
}

/// What becomes of a row with more tokens than an example may have.
#[derive(Clone, Copy)]
pub(super) enum WhenLong {
    /// Its end is dropped: the later turns of a conversation mean nothing without the earlier.
    Cut,
    /// It goes on in further examples: a text is worth learning from anywhere.
    Split {
        /// What the tokenizer wants in front of each.
        bos: Option<u32>,
    },
}

/// Tokens, and whether each is learned.
type TokensAndMask = (Vec<u32>, Vec<bool>);

/// Cuts a text into pieces of at most `most` tokens, two or more. Each but the first begins with a
/// token that is only read there: BOS, or without one the last of the piece before. So every token
/// after the text's first is learned once.
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

/// The tokens of a row; one of Alpaca's is laid out by the chat template if there is one, unless
/// `alpaca` says how.
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

/// Tokenized jointly, as the completion will follow the prompt. What is learned begins where the
/// prompt's own tokens and the joint ones part (TRL's rule), which is after the prompt unless a
/// token reaches across the border. An end-of-sequence token is appended unless present, learned.
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

/// The whole conversation rendered once; what the assistant says is learned through its
/// end-of-turn token. A token that reaches over the border of a span belongs to the span.
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
    let mut learned = vec![false; tokens.len() - count]; // of a BOS that was added
    let mut boundary_mismatch = false;
    for (start, end) in encoding.offsets {
        let next = spans.partition_point(|span| span.end <= start);
        let span = spans.get(next).filter(|span| span.start < end);
        learned.push(span.is_some());
        boundary_mismatch |= span.is_some_and(|span| start < span.start);
    }
    Ok(TokenizedRow { tokens, learned, boundary_mismatch, when_long: WhenLong::Cut })
}

/// The text, and the byte ranges of it that are learned, in order.
type Spans = (String, Vec<Range<usize>>);

/// What the template itself marks with `{% generation %}`, if it does.
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

/// From what the template renders up to a message and with it. The whitespace that ends a turn is
/// left out: generation stops at the end-of-turn token, nobody ever asks for what follows it.
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

/// Where the words of an assistant that speaks first begin in `through`, the text through its
/// message. Many templates fail on no messages at all or put a system message of their own before
/// the first, so what precedes its words is not rendered but looked for: it is what the template
/// asks for an answer with after a later turn.
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
