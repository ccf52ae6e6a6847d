//! Prompts to be answered: rows of reinforcement learning.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use serde_json::{Map, Value};

use super::doctor::{self, Check, Diagnosis, Seen};
use super::lines::{Line, read_all, to_held_out};
use super::rows::PromptRow;
use super::split::is_held_out_text;
use super::{DataError, Dialect, RowError};
use crate::text::{Special, Tokenizer};

/// A prompt, and the row it came in.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// Its tokens: what a response is generated after.
    pub tokens: Vec<u32>,
    /// Its text: as it stands, or as the chat template writes it.
    pub text: String,
    /// The whole row: rewards read its other fields.
    pub row: Map<String, Value>,
    /// Its line, counted from 1.
    pub line: u64,
}

impl Prompt {
    /// Bytes it takes, about: its row is parsed.
    pub fn bytes(&self) -> usize {
        let row = serde_json::to_string(&self.row).map_or(0, |row| row.len());
        size_of::<Self>() + self.tokens.len() * size_of::<u32>() + self.text.len() + 2 * row
    }
}

/// The prompts of a file, in its order.
#[derive(Debug, Clone)]
pub struct Prompts {
    /// At least one.
    pub prompts: Vec<Prompt>,
    /// Tokens of the longest.
    pub longest: usize,
    /// SHA-256 of the whole file, in hex.
    pub sha256: String,
    /// What is wrong with the rows of the whole file, held-out ones among them.
    pub diagnosis: Diagnosis,
}

/// How prompts are read.
#[derive(Debug, Clone, Default)]
pub struct PromptSettings {
    /// Tokens a prompt may have: cut, it would ask for something else.
    pub max_length: usize,
    /// What may be wrong with rows that cannot be read: those are left out.
    pub allow: Vec<Check>,
}

impl From<usize> for PromptSettings {
    fn from(max_length: usize) -> Self {
        Self { max_length, allow: Vec::new() }
    }
}

/// A file in two parts, no prompt in both.
#[derive(Debug, Clone)]
pub struct PromptSplit {
    /// What is trained on.
    pub train: Prompts,
    /// What is held out; small files may leave nothing to it.
    pub held_out: Option<Prompts>,
    /// The held-out rows as the file has them, byte for byte, each with a newline.
    pub held_out_lines: Vec<u8>,
}

impl Prompts {
    /// Reads and tokenizes all rows of a JSONL or Parquet file. A `prompt` that is a string is continued
    /// as it stands; one that is a list of messages is answered, so the chat template asks for an answer
    /// (TRL's rule). Ends early once `stop` is set.
    ///
    /// # Errors
    /// All wrong rows, the first few with their lines, and among them every prompt that is too long; a
    /// file without rows; [`DataError::Stopped`].
    pub fn load(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: impl Into<PromptSettings>,
        stop: &AtomicBool,
    ) -> Result<Self, DataError> {
        let mut prompts = Vec::new();
        let (sha256, diagnosis) = read(path, tokenizer, settings.into(), stop, |line, row| {
            prompts.push(row.prompt(line));
        })?;
        Self::new(path, prompts, sha256, diagnosis)
    }

    /// The same in two parts: one row in ten is held out by its prompt, as
    /// [`is_held_out`](super::is_held_out) says.
    ///
    /// # Errors
    /// As [`Prompts::load`], and if no row is left to train on.
    pub fn load_split(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: impl Into<PromptSettings>,
        stop: &AtomicBool,
    ) -> Result<PromptSplit, DataError> {
        let (mut train, mut held_out) = (Vec::new(), Vec::new());
        let mut held_out_lines = Vec::new();
        let (sha256, diagnosis) = read(path, tokenizer, settings.into(), stop, |line, row| {
            if !row.is_held_out {
                return train.push(row.prompt(line));
            }
            to_held_out(&mut held_out_lines, line);
            held_out.push(row.prompt(line));
        })?;
        if train.is_empty() && !held_out.is_empty() {
            let rows = held_out.len() as u64;
            return Err(DataError::AllHeldOut { path: path.into(), rows });
        }
        let train = Self::new(path, train, sha256.clone(), diagnosis)?;
        let held_out = Self::new(path, held_out, sha256, Diagnosis::default()).ok();
        Ok(PromptSplit { train, held_out, held_out_lines })
    }

    fn new(
        path: &Path,
        prompts: Vec<Prompt>,
        sha256: String,
        diagnosis: Diagnosis,
    ) -> Result<Self, DataError> {
        let longest = prompts.iter().map(|prompt| prompt.tokens.len()).max();
        let longest = longest.ok_or_else(|| DataError::Empty { path: path.into() })?;
        Ok(Self { prompts, longest, sha256, diagnosis })
    }
}

/// Shows all rows that can be read to `add`; the file's SHA-256, and what is wrong with its rows.
fn read(
    path: &Path,
    tokenizer: &Tokenizer,
    settings: PromptSettings,
    stop: &AtomicBool,
    mut add: impl FnMut(&Line, Tokenized),
) -> Result<(String, Diagnosis), DataError> {
    let (mut diagnosis, mut seen) = (Diagnosis::default(), Seen::default());
    let parse = |bytes: &[u8]| tokenized(bytes, tokenizer, settings.max_length);
    let sha256 = read_all(path, stop, parse, |line, row| {
        diagnosis.row(line.number, Some(Dialect::Prompt));
        match row {
            Ok(row) => {
                diagnosis.length(row.tokens.len());
                seen.add(doctor::normalized_prompt(&row.text), line.number);
                if let Some(finding) = doctor::doubled_bos(&row.tokens, tokenizer) {
                    diagnosis.note(line.number, finding);
                }
                add(line, row);
            }
            Err(error) => diagnosis.note(line.number, (Check::of(&error), error.to_string())),
        }
        Ok(())
    })?;
    seen.finish(&mut diagnosis);
    diagnosis.unreadable(path, &settings.allow)?;
    Ok((sha256, diagnosis))
}

struct Tokenized {
    is_held_out: bool,
    tokens: Vec<u32>,
    text: String,
    row: Map<String, Value>,
}

impl Tokenized {
    fn prompt(self, line: &Line) -> Prompt {
        let Self { tokens, text, row, .. } = self;
        Prompt { tokens, text, row, line: line.number }
    }
}

fn tokenized(bytes: &[u8], tokenizer: &Tokenizer, most: usize) -> Result<Tokenized, RowError> {
    let prompt = PromptRow::parse(bytes)?;
    let is_held_out = is_held_out_text(prompt.first_turn());
    let (text, row) = match prompt {
        PromptRow::Text { prompt, row } => (prompt, row),
        PromptRow::Messages { prompt, tools, row } => {
            let template = tokenizer.chat_template().ok_or(RowError::NoTemplate)?;
            let values: Vec<Value> = prompt.into_iter().map(|message| message.value).collect();
            (template.render(&values, tools.as_ref(), true)?, row)
        }
    };
    let tokens = tokenizer.with_bos(tokenizer.encode(&text, Special::Parse)?);
    match tokens.len() {
        0 => Err(RowError::NoTokens { key: "prompt".into() }),
        found if found > most => Err(RowError::PromptTooLong { found, most }),
        _ => Ok(Tokenized { is_held_out, tokens, text, row }),
    }
}
