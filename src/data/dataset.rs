//! A file of rows as examples, whole or with a held-out part.

use std::fmt;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::example::{Tokenized, WhenLong, pieces, tokenize};
use super::rows::{Line, Lines};
use super::{DataError, Example, Row, RowError, is_held_out};
use crate::text::Tokenizer;

/// Lines tokenized at a time, by all threads, or as many as have this many bytes: what is held of
/// the file's text.
const LINES_AT_A_TIME: usize = 1024;
const BYTES_AT_A_TIME: usize = 16 << 20;
/// Bytes a line may have.
const LONGEST_LINE: usize = 64 << 20;
/// Wrong rows told one by one; the rest are counted.
const FAULTS_TOLD: usize = 5;

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
        let sha256 = read(path, tokenizer, stop, |_, line, tokenized| {
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
        let sha256 = read(path, tokenizer, stop, |row, line, tokenized| {
            if !is_held_out(row) {
                return train.add(line, tokenized, max_length);
            }
            held_out_lines.extend_from_slice(&line.bytes);
            if !line.bytes.ends_with(b"\n") {
                held_out_lines.push(b'\n');
            }
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

/// Shows every row in order to `add`, tokenized; the file's SHA-256. After a wrong row, the rest of
/// the file is read for further wrong ones only.
fn read(
    path: &Path,
    tokenizer: &Tokenizer,
    stop: &AtomicBool,
    mut add: impl FnMut(&Row, &Line, Tokenized),
) -> Result<String, DataError> {
    let io = |source| DataError::Io { path: path.into(), source };
    let file = File::open(path).map_err(io)?;
    let mut lines = Lines::new(BufReader::new(file), LONGEST_LINE);
    let mut hasher = Sha256::new();
    let (mut first, mut wrong, mut rows) = (Vec::new(), 0, 0);
    loop {
        let (mut chunk, mut bytes) = (Vec::new(), 0);
        while chunk.len() < LINES_AT_A_TIME
            && bytes < BYTES_AT_A_TIME
            && let Some(line) = lines.next(|bytes| hasher.update(bytes)).map_err(io)?
        {
            bytes += line.bytes.len();
            chunk.push(line);
            if stop.load(Ordering::Relaxed) {
                return Err(DataError::Stopped);
            }
        }
        if chunk.is_empty() {
            break;
        }
        rows += chunk.len() as u64;
        let parse = |line: &Line| -> Result<(Row, Tokenized), RowError> {
            if line.too_long {
                return Err(RowError::TooLong { most: LONGEST_LINE });
            }
            let row = Row::parse(&line.bytes)?;
            let tokenized = tokenize(&row, tokenizer)?;
            Ok((row, tokenized))
        };
        let parsed: Vec<_> = chunk.par_iter().map(parse).collect();
        for (line, row) in chunk.iter().zip(parsed) {
            match row {
                Ok((row, tokenized)) if wrong == 0 => add(&row, line, tokenized),
                Ok(_) => {}
                Err(problem) => {
                    wrong += 1;
                    if first.len() < FAULTS_TOLD {
                        first.push((line.number, problem));
                    }
                }
            }
        }
    }
    if wrong > 0 {
        return Err(DataError::Rows { path: path.into(), first, wrong, rows });
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
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
