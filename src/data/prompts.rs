//! Prompt-only rows, for reinforcement learning.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::Sha256;

use super::checks::{self, Check, Finding};
use super::lines::{FileLine, UnreadableRow};
use super::reading::{Cache, FileRows, FileSplit, Parsed, RowPart, RowReader, RowReport};
use super::row_store::{Record, RowLocation, WordReader, hash_tokens, write_words};
use super::rows::PromptRow;
use super::split::{first_turn_of_prompt, is_held_out_text};
use super::{DataError, RowError, RowFormat};
use crate::monitor::Monitor;
use crate::text::{Special, Tokenizer};

/// A prompt and its row.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// The prompt's tokens, after which a response is generated.
    pub tokens: Vec<u32>,
    /// The prompt's text: the string of the row, or the output of the chat template.
    pub text: String,
    /// The whole row, since rewards read its other fields.
    pub row: Map<String, Value>,
    /// The line number in its file, counted from 1.
    pub line: u64,
}

impl Record for Prompt {
    /// The tokens, the number of bytes of the text, the text, and the row as JSON.
    fn encode(&self, bytes: &mut Vec<u8>) {
        write_words(self.tokens.iter().copied(), bytes);
        write_words([self.text.len() as u32], bytes);
        bytes.extend_from_slice(self.text.as_bytes());
        serde_json::to_writer(bytes, &self.row).expect("the row was parsed from JSON");
    }

    fn tag(&self) -> u64 {
        self.tokens.len() as u64
    }

    fn decode(bytes: &[u8], RowLocation { line, tag, .. }: RowLocation) -> Self {
        let (words, rest) = bytes.split_at((tag as usize + 1) * size_of::<u32>());
        let mut words = WordReader::of(words);
        let tokens = words.take(tag as usize).collect();
        let (text, row) = rest.split_at(words.next() as usize);
        Self {
            tokens,
            text: String::from_utf8_lossy(text).into_owned(),
            row: serde_json::from_slice(row).unwrap_or_default(),
            line,
        }
    }

    fn tokens_in(_bytes: &[u8], tag: u64) -> usize {
        tag as usize
    }

    fn hash(&self, hasher: &mut Sha256) {
        hash_tokens(&self.tokens, hasher);
    }
}

/// The prompts of a file, in file order.
pub type Prompts = FileRows<Prompt, PromptReport>;

/// The prompts of a file, split into a training and a held-out part.
pub type PromptSplit = FileSplit<Prompt, PromptReport>;

/// Settings for reading prompts.
#[derive(Debug, Clone, Default)]
pub struct PromptSettings {
    /// Maximum number of tokens of a prompt. Prompts are never truncated, since that changes their
    /// meaning.
    pub max_length: usize,
    /// Checks to ignore: rows that fail them and cannot be read are skipped.
    pub allow: Vec<Check>,
    /// Cache for the tokens of large files; `None` keeps all tokens in memory.
    pub cache: Option<Cache>,
}

impl From<usize> for PromptSettings {
    fn from(max_length: usize) -> Self {
        Self { max_length, ..Self::default() }
    }
}

/// Counts over the prompts of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptReport {
    /// Number of prompts.
    pub prompts: u64,
    /// Prompts that are conversations.
    pub conversations: u64,
    /// Tokens of all prompts.
    pub tokens: u64,
    /// Tokens of the longest prompt.
    pub longest: u64,
}

impl fmt::Display for PromptReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { prompts, conversations, tokens, longest } = self;
        write!(
            f,
            "{prompts} prompts, {conversations} of them conversations, {tokens} tokens, longest \
             {longest} tokens"
        )
    }
}

impl RowReport for PromptReport {
    fn rows(&self) -> u64 {
        self.prompts
    }
}

impl Prompts {
    /// Reads and tokenizes all rows of a JSONL or Parquet file. A `prompt` that is a string is used as it
    /// is; a list of messages is rendered by the chat template with a generation prompt, as in TRL. Stops
    /// early once `monitor` asks to stop.
    ///
    /// # Errors
    /// If rows are invalid (the first few are listed with their lines), which includes prompts that are
    /// too long; if the file has no rows; [`DataError::Stopped`].
    pub fn load<'m>(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: impl Into<PromptSettings>,
        monitor: impl Into<Monitor<'m>>,
    ) -> Result<Self, DataError> {
        let settings = &settings.into();
        PromptReader { tokenizer, settings }.load(path, settings.cache.as_ref(), monitor.into())
    }

    /// Validates the rows of a file: runs all checks and counts, and keeps no prompt.
    ///
    /// # Errors
    /// If the file cannot be read at all; [`DataError::Stopped`].
    pub(crate) fn examine<'m>(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: &PromptSettings,
        monitor: impl Into<Monitor<'m>>,
    ) -> Result<Self, DataError> {
        PromptReader { tokenizer, settings }.examine(path, monitor.into())
    }

    /// The prompts of the first `rows` rows; rows that cannot be read are skipped.
    ///
    /// # Errors
    /// If the file cannot be read at all.
    pub(crate) fn first(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: &PromptSettings,
        rows: usize,
    ) -> Result<Vec<Prompt>, DataError> {
        PromptReader { tokenizer, settings }.first(path, rows)
    }

    /// Loads a file like [`Prompts::load`], and holds out one row in ten by a hash of its prompt (see
    /// [`is_held_out`](super::is_held_out)).
    ///
    /// # Errors
    /// Like [`Prompts::load`], and if no row is left to train on.
    pub fn load_split<'m>(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: impl Into<PromptSettings>,
        monitor: impl Into<Monitor<'m>>,
    ) -> Result<PromptSplit, DataError> {
        let settings = &settings.into();
        PromptReader { tokenizer, settings }.load_split(
            path,
            settings.cache.as_ref(),
            monitor.into(),
        )
    }
}

/// Parses lines into prompts.
struct PromptReader<'a> {
    tokenizer: &'a Tokenizer,
    settings: &'a PromptSettings,
}

/// A parsed and tokenized row.
struct TokenizedPrompt {
    tokens: Vec<u32>,
    text: String,
    row: Map<String, Value>,
}

impl RowReader for PromptReader<'_> {
    type Tokenized = TokenizedPrompt;
    type Record = Prompt;
    type Report = PromptReport;

    fn kind(&self) -> &'static str {
        "prompts"
    }

    fn tokenizer(&self) -> &Tokenizer {
        self.tokenizer
    }

    fn settings(&self) -> Value {
        json!({ "max_length": self.settings.max_length })
    }

    fn allow(&self) -> &[Check] {
        &self.settings.allow
    }

    fn parse(&self, line: &[u8]) -> Result<Parsed<TokenizedPrompt>, UnreadableRow> {
        let format = Some(RowFormat::Prompt); // other keys do not matter
        let (held_out, tokenized) = tokenized(line, self.tokenizer, self.settings.max_length)
            .map_err(|error| UnreadableRow { format, error })?;
        Ok(Parsed {
            format,
            held_out,
            hash: checks::normalized_prompt(&tokenized.text),
            length: tokenized.tokens.len(),
            findings: checks::doubled_bos(&tokenized.tokens, self.tokenizer).into_iter().collect(),
            tokenized,
        })
    }

    fn add(
        &self,
        line: &FileLine,
        row: TokenizedPrompt,
        part: &mut RowPart<Prompt, PromptReport>,
    ) -> io::Result<Vec<Finding>> {
        let TokenizedPrompt { tokens, text, row } = row;
        let report = &mut part.report;
        report.prompts += 1;
        report.conversations += u64::from(row["prompt"].is_array());
        report.tokens += tokens.len() as u64;
        report.longest = report.longest.max(tokens.len() as u64);
        let prompt = Prompt { tokens, text, row, line: line.number };
        part.rows.push(&prompt, line.row, line.number)?;
        Ok(Vec::new())
    }

    fn nothing(&self, path: PathBuf, _report: &PromptReport) -> DataError {
        DataError::Empty { path }
    }
}

/// Whether a row is held out, and the tokenized row.
fn tokenized(
    line: &[u8],
    tokenizer: &Tokenizer,
    most: usize,
) -> Result<(bool, TokenizedPrompt), RowError> {
    let prompt = PromptRow::parse(line)?;
    let held_out = is_held_out_text(first_turn_of_prompt(&prompt));
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
        _ => Ok((held_out, TokenizedPrompt { tokens, text, row })),
    }
}
