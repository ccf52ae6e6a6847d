//! Supervised fine-tuning data: rows as tokens with a loss mask.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::checks::{self, Check, Finding};
use super::example::{TokenizedRow, WhenLong, pieces, tokenize};
use super::lines::{FileLine, UnreadableRow};
use super::reading::{self, Cache, FileRows, FileSplit, Parsed, RowPart, RowReader, RowReport};
use super::{AlpacaPrompt, DataError, Example, Row, RowError, is_held_out};
use crate::monitor::Monitor;
use crate::text::Tokenizer;

/// The examples of a file, in file order.
pub type Dataset = FileRows<Example, DataReport>;

/// The examples of a file, split into a training and a held-out part.
pub type Split = FileSplit<Example, DataReport>;

/// Settings for reading examples.
#[derive(Debug, Clone, Default)]
pub struct LoadSettings {
    /// Maximum number of tokens of an example. A longer row is truncated, but a longer `text` is split.
    pub max_length: usize,
    /// Prompt format of Alpaca rows; `None` uses the chat template if there is one.
    pub alpaca: Option<AlpacaPrompt>,
    /// Checks to ignore: rows that fail them and cannot be read are skipped.
    pub allow: Vec<Check>,
    /// Context window and vocabulary size of the model, if known.
    pub model: Option<ModelLimits>,
    /// Cache for the tokens of large files; `None` keeps all tokens in memory.
    pub cache: Option<Cache>,
}

/// The two limits of a model that rows are checked against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelLimits {
    /// Context window in tokens.
    pub window: usize,
    /// Number of token ids.
    pub vocab_size: usize,
}

impl From<usize> for LoadSettings {
    fn from(max_length: usize) -> Self {
        Self { max_length, ..Self::default() }
    }
}

/// Counts over the examples of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataReport {
    /// Rows read, including those with nothing to learn.
    pub rows: u64,
    /// Tokens of the examples.
    pub tokens: u64,
    /// Target tokens of the examples.
    pub learned_tokens: u64,
    /// Rows longer than `max_length`, truncated at their end.
    pub truncated: u64,
    /// Texts longer than `max_length`, each split into several examples.
    pub split: u64,
    /// Examples that these texts were split into.
    pub pieces: u64,
    /// Rows dropped because they have no learned token, or none after truncation.
    pub nothing_to_learn: u64,
    /// Rows in which one token spans the border of prompt and response.
    pub boundary_mismatches: u64,
    /// Tokens of the longest row before truncation.
    pub longest: u64,
}

impl fmt::Display for DataReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, tokens, learned_tokens, truncated, longest, .. } = self;
        let Self { split, pieces, nothing_to_learn, boundary_mismatches, .. } = self;
        write!(
            f,
            "{rows} rows, {tokens} tokens ({learned_tokens} learned), longest {longest}; \
             {truncated} truncated, {split} split into {pieces}, \
             {nothing_to_learn} with nothing to learn, {boundary_mismatches} boundary mismatches"
        )
    }
}

impl DataReport {
    fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        self.tokens += other.tokens;
        self.learned_tokens += other.learned_tokens;
        self.truncated += other.truncated;
        self.split += other.split;
        self.pieces += other.pieces;
        self.nothing_to_learn += other.nothing_to_learn;
        self.boundary_mismatches += other.boundary_mismatches;
        self.longest = self.longest.max(other.longest);
    }
}

impl RowReport for DataReport {
    fn rows(&self) -> u64 {
        self.rows
    }
}

impl Dataset {
    /// Reads and tokenizes all rows of a JSONL or Parquet file. Stops early once `monitor` asks to stop.
    ///
    /// # Errors
    /// If rows are invalid (the first few are listed with their lines); if the file has no rows, or nothing
    /// to learn; [`DataError::Stopped`].
    pub fn load<'m>(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: impl Into<LoadSettings>,
        monitor: impl Into<Monitor<'m>>,
    ) -> Result<Self, DataError> {
        let settings = &settings.into();
        ExampleReader { tokenizer, settings }.load(path, settings.cache.as_ref(), monitor.into())
    }

    /// Validates the rows of a file: runs all checks and counts, and keeps no example.
    ///
    /// # Errors
    /// If the file cannot be read at all; [`DataError::Stopped`].
    pub fn examine<'m>(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: &LoadSettings,
        monitor: impl Into<Monitor<'m>>,
    ) -> Result<Self, DataError> {
        ExampleReader { tokenizer, settings }.examine(path, monitor.into())
    }

    /// The examples of the first `rows` rows; rows that cannot be read are skipped.
    ///
    /// # Errors
    /// If the file cannot be read at all.
    pub(crate) fn first(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: &LoadSettings,
        rows: usize,
    ) -> Result<Vec<Example>, DataError> {
        ExampleReader { tokenizer, settings }.first(path, rows)
    }

    /// Loads a file like [`Dataset::load`], and holds out one row in ten (see [`is_held_out`]).
    ///
    /// # Errors
    /// Like [`Dataset::load`], and if no row is left to train on.
    pub fn load_split<'m>(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: impl Into<LoadSettings>,
        monitor: impl Into<Monitor<'m>>,
    ) -> Result<Split, DataError> {
        let settings = &settings.into();
        ExampleReader { tokenizer, settings }.load_split(
            path,
            settings.cache.as_ref(),
            monitor.into(),
        )
    }

    /// Joins several files, in order. The caller reports the check results of each file beforehand.
    ///
    /// # Panics
    /// If `files` is empty.
    pub(crate) fn join(files: Vec<Self>) -> Self {
        reading::join(files, DataReport::add)
    }
}

/// Parses lines into examples.
struct ExampleReader<'a> {
    tokenizer: &'a Tokenizer,
    settings: &'a LoadSettings,
}

impl RowReader for ExampleReader<'_> {
    type Tokenized = TokenizedRow;
    type Record = Example;
    type Report = DataReport;

    fn kind(&self) -> &'static str {
        "rows"
    }

    fn tokenizer(&self) -> &Tokenizer {
        self.tokenizer
    }

    fn settings(&self) -> Value {
        let LoadSettings { max_length, alpaca, model, .. } = self.settings;
        json!({ "max_length": max_length, "alpaca": alpaca, "model": model })
    }

    fn allow(&self) -> &[Check] {
        &self.settings.allow
    }

    fn parse(&self, line: &[u8]) -> Result<Parsed<TokenizedRow>, UnreadableRow> {
        let (format, row) = Row::read(line);
        let unread = |error| UnreadableRow { format, error };
        let row = row.map_err(unread)?;
        let tokenized = tokenize(&row, self.tokenizer, self.settings.alpaca).map_err(unread)?;
        let TokenizedRow { tokens, learned, .. } = &tokenized;
        if let Some(limits) = self.settings.model
            && let Some(index) = tokens.iter().position(|&id| id as usize >= limits.vocab_size)
        {
            let (token, vocab_size) = (tokens[index], limits.vocab_size);
            return Err(unread(RowError::OutOfVocabulary { index, token, vocab_size }));
        }
        let mut findings = match &row {
            Row::Messages { messages, .. } | Row::Alpaca { messages, .. } => {
                checks::check_messages(messages)
            }
            _ => Vec::new(),
        };
        findings.extend(checks::check_tokens(&row, tokens, learned, self.tokenizer));
        let (held_out, hash) = (is_held_out(&row), checks::normalized_hash(&row));
        let length = tokens.len();
        Ok(Parsed { format, held_out, hash, length, findings, tokenized })
    }

    fn add(
        &self,
        line: &FileLine,
        row: TokenizedRow,
        part: &mut RowPart<Example, DataReport>,
    ) -> io::Result<Vec<Finding>> {
        let &LoadSettings { max_length, model, .. } = self.settings;
        let TokenizedRow { mut tokens, mut learned, boundary_mismatch, when_long } = row;
        let report = &mut part.report;
        let mut found = Vec::new();
        let length = tokens.len();
        report.rows += 1;
        report.longest = report.longest.max(length as u64);
        if boundary_mismatch {
            report.boundary_mismatches += 1;
            let sentence = "a token spans the border of prompt and response: the prompt alone is \
                            tokenized differently (usually because it ends in a space)";
            found.push((Check::BoundaryMismatch, sentence.into()));
        }
        if let Some(window) = model.map(|limits| limits.window)
            && length > window
        {
            let sentence =
                format!("has {length} tokens, the model's context window is {window} tokens");
            found.push((Check::OverWindow, sentence));
        }
        let any = learned.contains(&true);
        let pieces = match when_long {
            _ if length <= max_length => vec![(tokens, learned)],
            WhenLong::Split { bos } if max_length > 1 => {
                let pieces = pieces(&tokens, &learned, bos, max_length);
                report.split += 1;
                report.pieces += pieces.len() as u64;
                pieces
            }
            WhenLong::Split { .. } | WhenLong::Cut => {
                report.truncated += 1;
                tokens.truncate(max_length);
                learned.truncate(max_length);
                let left = if learned.contains(&true) { "" } else { ", of which none is learned" };
                let sentence = format!("has {length} tokens, truncated to {max_length}{left}");
                found.push((Check::Cut, sentence));
                vec![(tokens, learned)]
            }
        };
        let (mut start, mut kept) = (0, 0);
        for (tokens, learned) in pieces {
            let length = tokens.len();
            let example = Example { tokens, learned, row: line.row, line: line.number, start };
            start += length as u32;
            match example.learned_tokens() {
                0 => report.nothing_to_learn += 1,
                count => {
                    kept += 1;
                    report.tokens += length as u64;
                    report.learned_tokens += count as u64;
                    part.rows.push(&example, line.row, line.number)?;
                }
            }
        }
        // If truncation removed everything to learn, `Check::Cut` already reports it.
        if kept == 0 && !any {
            let sentence = "has no learned token, so it does not contribute to the loss";
            found.push((Check::NothingToLearn, sentence.into()));
        }
        Ok(found)
    }

    fn nothing(&self, path: PathBuf, report: &DataReport) -> DataError {
        let &DataReport { rows, truncated, .. } = report;
        let max_length = self.settings.max_length;
        DataError::NothingToLearn { path, rows, truncated, max_length }
    }
}
