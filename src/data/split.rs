//! Which rows of a file are held out when there is no separate held-out file.

use std::borrow::Cow;

use sha2::{Digest, Sha256};

use super::rows::{PromptRow, Responses};
use super::{Message, Row};

/// Number of leading characters that stand for the prompt of a row without turns.
const PROMPT_CHARS: usize = 200;
/// Number of leading tokens that stand for the prompt of a tokenized row.
const PROMPT_TOKENS: usize = 64;

/// Whether a row is held out, which is decided by SHA-256 of its first user turn, lower-cased and with
/// white space collapsed, for one row in ten. So rows with the same prompt are in the same part, and a
/// row stays in its part when rows are added to the file.
pub fn is_held_out(row: &Row) -> bool {
    is_held_out_text(&first_user_turn(row))
}

/// Whether a row with this first user turn is held out.
pub(super) fn is_held_out_text(prompt: &str) -> bool {
    digest(prompt)[0].is_multiple_of(10)
}

/// Whether a document is in a held-out part of the given fraction, from 0 to 1, by a hash of its
/// beginning.
pub(super) fn is_in_share(document: &str, share: f64) -> bool {
    let [high, low, ..] = digest(beginning(document));
    // 16 bits are precise enough: a smaller fraction would hold out too little to measure with.
    f64::from(u16::from_be_bytes([high, low])) < share * f64::from(1 << 16)
}

fn digest(text: &str) -> [u8; 32] {
    let words: Vec<String> = text.split_whitespace().map(str::to_lowercase).collect();
    Sha256::digest(words.join(" ")).into()
}

fn first_user_turn(row: &Row) -> Cow<'_, str> {
    match row {
        Row::Messages { messages, .. } | Row::Alpaca { messages, .. } => {
            first_user_message(messages.iter()).into()
        }
        Row::PromptCompletion { prompt, .. } => prompt.into(),
        Row::Text(text) => beginning(text).into(),
        Row::Tokens { input_ids, .. } => {
            let ids = input_ids.iter().take(PROMPT_TOKENS);
            ids.map(u32::to_string).collect::<Vec<_>>().join(" ").into()
        }
    }
}

/// Content of the first user message; without a user message, that of the first message.
pub(super) fn first_user_message<'a>(
    mut messages: impl Iterator<Item = &'a Message> + Clone,
) -> &'a str {
    let user = messages.clone().find(|message| message.role == "user").or_else(|| messages.next());
    user.and_then(|message| message.value["content"].as_str()).unwrap_or_default()
}

/// The beginning of a text, which stands for its prompt.
pub(super) fn beginning(text: &str) -> &str {
    match text.char_indices().nth(PROMPT_CHARS) {
        Some((end, _)) => &text[..end],
        None => text,
    }
}

/// The first turn of a prompt-only row, by which it is held out.
pub(super) fn first_turn_of_prompt(row: &PromptRow) -> &str {
    match row {
        PromptRow::Text { prompt, .. } => prompt,
        PromptRow::Messages { prompt, .. } => first_user_message(prompt.iter()),
    }
}

/// The first turn of a row of preference data, by which it is held out.
pub(super) fn first_turn_of_responses(responses: &Responses) -> &str {
    match responses {
        Responses::Texts { prompt, responses } if prompt.is_empty() => beginning(&responses[0]),
        Responses::Texts { prompt, .. } => prompt,
        Responses::Messages { prompt, responses, .. } => {
            first_user_message(prompt.iter().chain(&responses[0]))
        }
    }
}
