//! Reads a data file line by line and parses the lines on all threads. Invalid rows are reported together.
//! Rows of a Parquet file are read as the JSON lines they correspond to, counted from 1.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::cache::{file_sha256, hex};
use super::parquet::ParquetRows;
use super::{DataError, Row, RowError, RowFormat};

/// Limits of a chunk that is tokenized by all threads, in lines and in bytes. No more of the file's text is
/// held in memory.
const LINES_AT_A_TIME: usize = 1024;
const BYTES_AT_A_TIME: usize = 16 << 20;
/// Maximum number of bytes of a line.
const LONGEST_LINE: usize = 64 << 20;
/// Number of invalid rows that are listed; the rest are only counted.
pub(super) const FAULTS_SHOWN: usize = 5;

/// Parses every row and passes it to `add`, in order; returns the SHA-256 of the file. After an invalid row,
/// the rest of the file is only checked for further invalid rows. Stops early once `stop` is set.
pub(super) fn read<T: Send>(
    path: &Path,
    stop: &AtomicBool,
    parse: impl Fn(&[u8]) -> Result<T, RowError> + Sync,
    mut add: impl FnMut(&FileLine, T),
) -> Result<String, DataError> {
    let (mut first, mut wrong, mut rows) = (Vec::new(), 0, 0);
    let sha256 = read_all(path, stop, parse, |line, row| {
        rows += 1;
        match row {
            Ok(row) if wrong == 0 => add(line, row),
            Ok(_) => {}
            Err(problem) => {
                wrong += 1;
                if first.len() < FAULTS_SHOWN {
                    first.push((line.number, problem.to_string()));
                }
            }
        }
        Ok(())
    })?;
    if wrong > 0 {
        return Err(DataError::Rows { path: path.into(), first, wrong, rows });
    }
    Ok(sha256)
}

/// Parses every row and passes the result, an error for an invalid row, to `add`, in order; returns the
/// SHA-256 of the file. Stops early once `stop` is set.
pub(super) fn read_all<T: Send, E: Send + From<RowError>>(
    path: &Path,
    stop: &AtomicBool,
    parse: impl Fn(&[u8]) -> Result<T, E> + Sync,
    mut add: impl FnMut(&FileLine, Result<T, E>) -> Result<(), DataError>,
) -> Result<String, DataError> {
    let go_on = || !stop.load(Ordering::Relaxed);
    let mut source = LineSource::open(path, Some(&go_on))?;
    loop {
        let (mut chunk, mut bytes) = (Vec::new(), 0);
        while chunk.len() < LINES_AT_A_TIME
            && bytes < BYTES_AT_A_TIME
            && let Some(line) = source.next(path)?
        {
            bytes += line.bytes.len();
            chunk.push(line);
            if !go_on() {
                return Err(DataError::Stopped);
            }
        }
        if chunk.is_empty() {
            break;
        }
        let parse = |line: &FileLine| match line.too_long {
            true => Err(RowError::TooLong { most: LONGEST_LINE }.into()),
            false => parse(&line.bytes),
        };
        let parsed: Vec<_> = chunk.par_iter().map(parse).collect();
        for (line, row) in chunk.iter().zip(parsed) {
            add(line, row)?;
        }
    }
    Ok(source.sha256())
}

/// Passes the first `most` lines to `take`.
pub(super) fn first_lines(
    path: &Path,
    most: usize,
    mut take: impl FnMut(&FileLine) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let mut source = LineSource::open(path, None)?;
    for _ in 0..most {
        match source.next(path)? {
            Some(line) => take(&line)?,
            None => break,
        }
    }
    Ok(())
}

/// The format of the first row with a known format, among the first lines of a file.
///
/// # Errors
/// If the file cannot be read.
pub(crate) fn first_row_format(path: &Path) -> Result<Option<RowFormat>, DataError> {
    let mut found = None;
    first_lines(path, LINES_AT_A_TIME, |line| {
        found = found.or_else(|| Row::read(&line.bytes).0);
        Ok(())
    })?;
    Ok(found)
}

/// A source of lines.
enum LineSource {
    /// A JSONL file, hashed while it is read.
    Jsonl { lines: LineReader<BufReader<File>>, hasher: Sha256 },
    /// A Parquet file.
    Parquet { rows: ParquetRows, read: u64, sha256: String },
}

impl LineSource {
    /// Opens a file. Without `go_on`, a Parquet file is not hashed.
    fn open(path: &Path, go_on: Option<&dyn Fn() -> bool>) -> Result<Self, DataError> {
        let io = |source| DataError::Io { path: path.into(), source };
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("parquet")) {
            let sha256 = match go_on {
                Some(go_on) => file_sha256(path, go_on).map_err(io)?.ok_or(DataError::Stopped)?,
                None => String::new(),
            };
            return Ok(Self::Parquet { rows: ParquetRows::open(path)?, read: 0, sha256 });
        }
        let lines = LineReader::new(BufReader::new(File::open(path).map_err(io)?), LONGEST_LINE);
        Ok(Self::Jsonl { lines, hasher: Sha256::new() })
    }

    fn next(&mut self, path: &Path) -> Result<Option<FileLine>, DataError> {
        match self {
            Self::Jsonl { lines, hasher } => lines
                .next(|bytes| hasher.update(bytes))
                .map_err(|source| DataError::Io { path: path.into(), source }),
            Self::Parquet { rows, read, .. } => {
                let Some(bytes) = rows.next()? else { return Ok(None) };
                *read += 1;
                Ok(Some(FileLine { row: *read - 1, number: *read, bytes, too_long: false }))
            }
        }
    }

    fn sha256(self) -> String {
        match self {
            Self::Jsonl { hasher, .. } => hex(&hasher.finalize()),
            Self::Parquet { sha256, .. } => sha256,
        }
    }
}

/// A row that cannot be read: its format, as far as known, and the error.
pub(super) struct UnreadableRow {
    pub format: Option<RowFormat>,
    pub error: RowError,
}

impl From<RowError> for UnreadableRow {
    fn from(error: RowError) -> Self {
        Self { format: None, error }
    }
}

/// A line that is not blank.
pub(super) struct FileLine {
    /// Row number, counted from 0 over lines that are not blank.
    pub row: u64,
    /// Line number in the file, counted from 1.
    pub number: u64,
    /// The bytes of the line with its newline, without a byte order mark.
    pub bytes: Vec<u8>,
    /// Whether the line exceeds the maximum length. Its bytes are not kept then, since a file that is not
    /// JSONL may be one line of any length.
    pub too_long: bool,
}

/// Iterates over the lines of a file, in order.
pub(super) struct LineReader<R> {
    reader: R,
    /// Maximum number of bytes of a line.
    most: usize,
    row: u64,
    number: u64,
}

impl<R: BufRead> LineReader<R> {
    pub(crate) fn new(reader: R, most: usize) -> Self {
        Self { reader, most, row: 0, number: 0 }
    }

    /// The next line that is not blank, or `None` at the end. `seen` is called with all bytes read.
    pub(crate) fn next(
        &mut self,
        mut seen: impl FnMut(&[u8]),
    ) -> std::io::Result<Option<FileLine>> {
        loop {
            let mut bytes = Vec::new();
            // Reading one byte more than the maximum detects a line that is too long.
            let mut limited = self.reader.by_ref().take(self.most as u64 + 1);
            if limited.read_until(b'\n', &mut bytes)? == 0 {
                return Ok(None);
            }
            seen(&bytes);
            self.number += 1;
            if self.number == 1 && bytes.starts_with(b"\xef\xbb\xbf") {
                bytes.drain(..3);
            }
            let too_long = bytes.len() > self.most;
            if too_long {
                if !bytes.ends_with(b"\n") {
                    self.skip_line(&mut seen)?;
                }
                bytes = Vec::new();
            } else if bytes.trim_ascii().is_empty() {
                continue;
            }
            self.row += 1;
            return Ok(Some(FileLine { row: self.row - 1, number: self.number, bytes, too_long }));
        }
    }

    /// Skips to the end of the line.
    fn skip_line(&mut self, mut seen: impl FnMut(&[u8])) -> std::io::Result<()> {
        loop {
            let buffer = self.reader.fill_buf()?;
            let end = buffer.iter().position(|&byte| byte == b'\n');
            let part = &buffer[..end.map_or(buffer.len(), |end| end + 1)];
            seen(part);
            let read = part.len();
            self.reader.consume(read);
            if end.is_some() || read == 0 {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_too_long_is_skipped_and_counted() {
        let file = b"12345678\n\n123456789\n123456789 and more\n1234567\n1234567890";
        let mut lines = LineReader::new(file.as_slice(), 9);
        let mut seen = Vec::new();
        let mut found = Vec::new();
        while let Some(line) = lines.next(|bytes| seen.extend_from_slice(bytes)).unwrap() {
            assert_eq!(line.too_long, line.bytes.is_empty());
            found.push((line.row, line.number, line.bytes.len()));
        }
        let needed = [(0, 1, 9), (1, 3, 0), (2, 4, 0), (3, 5, 8), (4, 6, 0)];
        assert_eq!(found, needed);
        assert_eq!(seen, file, "all of it is hashed");
    }
}
