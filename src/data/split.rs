//! The held-out part of a file that comes without one.

use std::borrow::Cow;

use sha2::{Digest, Sha256};

use super::{Message, Row};

/// Characters of a row without turns that stand for its prompt.
const PROMPT_CHARS: usize = 200;
/// The same for a row that is tokens already.
const PROMPT_TOKENS: usize = 64;

/// Whether a row is one of the one in ten that are held out: by SHA-256 of its first user turn,
/// lower-cased and with its whitespace collapsed. So rows with the same prompt are in one part, and
/// a row stays in its part whatever is added to the file.
pub fn is_held_out(row: &Row) -> bool {
    is_held_out_text(&first_user_turn(row))
}

/// The same of a first user turn.
pub(super) fn is_held_out_text(prompt: &str) -> bool {
    digest(prompt)[0].is_multiple_of(10)
}

/// Whether a document is in the part of this share, from 0 to 1, by how it begins.
pub(super) fn is_in_share(document: &str, share: f64) -> bool {
    let [high, low, ..] = digest(beginning(document));
    // 16 bits are fine enough: of smaller shares nothing would be left to measure with.
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

/// What the user says first; a conversation without a user's turn has its first message for it.
pub(super) fn first_user_message<'a>(
    mut messages: impl Iterator<Item = &'a Message> + Clone,
) -> &'a str {
    let user = messages.clone().find(|message| message.role == "user").or_else(|| messages.next());
    user.and_then(|message| message.value["content"].as_str()).unwrap_or_default()
}

/// What stands for the prompt of a whole text.
pub(super) fn beginning(text: &str) -> &str {
    match text.char_indices().nth(PROMPT_CHARS) {
        Some((end, _)) => &text[..end],
        None => text,
    }
}
