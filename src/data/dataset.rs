//! A file of rows as examples, whole or with a held-out part.

use std::fmt;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use serde::Serialize;

use super::example::{Tokenized, WhenLong, pieces, tokenize};
use super::lines::{Line, read, to_held_out};
use super::{DataError, Example, Row, RowError, is_held_out};
use crate::text::Tokenizer;

/// The examples of a file, in its order.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Rows with something to learn.
    pub examples: Vec<Example>,
    /// What was counted on the way.
    pub report: DataReport,
    /// SHA-256 of the whole file, in hex.
    pub sha256: String,
}

/// A file in two parts, no prompt in both.
#[derive(Debug, Clone)]
pub struct Split {
    /// What is trained on.
    pub train: Dataset,
    /// What is held out; small files may leave nothing to it.
    pub held_out: Option<Dataset>,
    /// The held-out rows as the file has them, byte for byte, each with a newline.
    pub held_out_lines: Vec<u8>,
}

/// What a file's rows came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DataReport {
    /// Rows read, those with nothing to learn included.
    pub rows: u64,
    /// Tokens of the examples.
    pub tokens: u64,
    /// Targets among them.
    pub learned_tokens: u64,
    /// Rows longer than `max_length`, cut at their end.
    pub truncated: u64,
    /// Texts longer than `max_length`, each split into several examples.
    pub split: u64,
    /// What they were split into.
    pub pieces: u64,
    /// Rows dropped because no token of them is learned, or none after the cut.
    pub nothing_to_learn: u64,
    /// Rows in which one token holds both given and learned text.
    pub boundary_mismatches: u64,
    /// Tokens of the longest row before any cut.
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

impl Dataset {
    /// Reads and tokenizes all rows of a JSONL file. Of a row with more than `max_length` tokens
    /// the first are kept; but a `text` is split into examples of that length. Ends early once
    /// `stop` is set.
    ///
    /// # Errors
    /// All wrong rows, the first few with their lines; a file without rows, or without anything
    /// to learn; [`DataError::Stopped`].
    pub fn load(
        path: &Path,
        tokenizer: &Tokenizer,
        max_length: usize,
        stop: &AtomicBool,
    ) -> Result<Self, DataError> {
        let mut all = Part::default();
        let sha256 = read(path, stop, parse(tokenizer), |line, (_, tokenized)| {
            all.add(line, tokenized, max_length);
        })?;
        all.finish(path, sha256, max_length)
    }

    /// The same in two parts: one row in ten is held out, as [`is_held_out`] says.
    ///
    /// # Errors
    /// As [`Dataset::load`], and if no row is left to train on.
    pub fn load_split(
        path: &Path,
        tokenizer: &Tokenizer,
        max_length: usize,
        stop: &AtomicBool,
    ) -> Result<Split, DataError> {
        let (mut train, mut held_out) = (Part::default(), Part::default());
        let mut held_out_lines = Vec::new();
        let sha256 = read(path, stop, parse(tokenizer), |line, (row, tokenized)| {
            if !is_held_out(&row) {
                return train.add(line, tokenized, max_length);
            }
            to_held_out(&mut held_out_lines, line);
            held_out.add(line, tokenized, max_length);
        })?;
        if train.report.rows == 0 && held_out.report.rows > 0 {
            return Err(DataError::AllHeldOut { path: path.into(), rows: held_out.report.rows });
        }
        let train = train.finish(path, sha256.clone(), max_length)?;
        // Held-out rows with nothing to learn cannot be scored: then there is no held-out part.
        let held_out = held_out.finish(path, sha256, max_length).ok();
        Ok(Split { train, held_out, held_out_lines })
    }
}

/// A line to its row and tokens.
fn parse(tokenizer: &Tokenizer) -> impl Fn(&[u8]) -> Result<(Row, Tokenized), RowError> {
    move |bytes| {
        let row = Row::parse(bytes)?;
        let tokenized = tokenize(&row, tokenizer)?;
        Ok((row, tokenized))
    }
}

#[derive(Default)]
struct Part {
    examples: Vec<Example>,
    report: DataReport,
}

impl Part {
    fn add(&mut self, line: &Line, row: Tokenized, max_length: usize) {
        let Tokenized { mut tokens, mut learned, boundary_mismatch, when_long } = row;
        let report = &mut self.report;
        report.rows += 1;
        report.longest = report.longest.max(tokens.len() as u64);
        report.boundary_mismatches += u64::from(boundary_mismatch);
        let pieces = match when_long {
            _ if tokens.len() <= max_length => vec![(tokens, learned)],
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
                vec![(tokens, learned)]
            }
        };
        let mut start = 0;
        for (mut tokens, mut learned) in pieces {
            tokens.shrink_to_fit();
            learned.shrink_to_fit();
            let length = tokens.len();
            let example = Example { tokens, learned, row: line.row, line: line.number, start };
            start += length as u32;
            match example.learned_tokens() {
                0 => report.nothing_to_learn += 1,
                count => {
                    report.tokens += length as u64;
                    report.learned_tokens += count as u64;
                    self.examples.push(example);
                }
            }
        }
    }

    fn finish(self, path: &Path, sha256: String, max_length: usize) -> Result<Dataset, DataError> {
        let Self { examples, report } = self;
        let path = path.to_path_buf();
        if report.rows == 0 {
            return Err(DataError::Empty { path });
        }
        if examples.is_empty() {
            let DataReport { rows, truncated, .. } = report;
            return Err(DataError::NothingToLearn { path, rows, truncated, max_length });
        }
        Ok(Dataset { examples, report, sha256 })
    }
}
