//! A file of rows, read line by line and parsed by all threads; wrong rows are told together. Rows of
//! a Parquet file are the lines they would be in JSON, counted from 1.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::cache::{file_sha256, hex};
use super::parquet::ParquetRows;
use super::{DataError, Row, RowError, RowFormat};

/// Lines tokenized at a time, by all threads, or as many as have this many bytes: what is held of
/// the file's text.
const LINES_AT_A_TIME: usize = 1024;
const BYTES_AT_A_TIME: usize = 16 << 20;
/// Bytes a line may have.
const LONGEST_LINE: usize = 64 << 20;
/// Wrong rows told one by one; the rest are counted.
pub(super) const FAULTS_SHOWN: usize = 5;

/// Shows what `parse` makes of every row to `add`, in order; the file's SHA-256. After a wrong row,
/// the rest of the file is read for further wrong ones only. Ends early once `stop` is set.
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

/// The same, wrong rows among them.
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

/// Shows the first lines to `take`.
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

/// The kind of the first row that has one, among the first few.
///
/// # Errors
/// If the file cannot be read.
pub fn first_row_format(path: &Path) -> Result<Option<RowFormat>, DataError> {
    let mut found = None;
    first_lines(path, LINES_AT_A_TIME, |line| {
        found = found.or_else(|| Row::read(&line.bytes).0);
        Ok(())
    })?;
    Ok(found)
}

/// Where lines come from.
enum LineSource {
    /// A file of them, hashed as it is read.
    Jsonl { lines: LineReader<BufReader<File>>, hasher: Sha256 },
    /// A table.
    Parquet { rows: ParquetRows, read: u64, sha256: String },
}

impl LineSource {
    /// Without `go_on`, a table is not hashed.
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

/// What a row would have been, and why it cannot be read.
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
    /// Its row: blank lines are not counted, the first is 0.
    pub row: u64,
    /// Its place in the file, counted from 1.
    pub number: u64,
    /// Its bytes with the newline they end in, without a byte order mark.
    pub bytes: Vec<u8>,
    /// Whether it is longer than a line may be: then no bytes of it are kept, since what is no
    /// JSONL at all may be one line of any length.
    pub too_long: bool,
}

/// The lines of a file, in order.
pub(super) struct LineReader<R> {
    reader: R,
    /// Bytes a line may have.
    most: usize,
    row: u64,
    number: u64,
}

impl<R: BufRead> LineReader<R> {
    pub fn new(reader: R, most: usize) -> Self {
        Self { reader, most, row: 0, number: 0 }
    }

    /// The next line that is not blank, or `None` at the end. `seen` is shown every byte read.
    pub fn next(&mut self, mut seen: impl FnMut(&[u8])) -> std::io::Result<Option<FileLine>> {
        loop {
            let mut bytes = Vec::new();
            // One byte more than there may be tells a line that is too long.
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

    /// Reads on to the end of the line and keeps nothing of it.
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
