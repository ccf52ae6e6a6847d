//! Reading a file of rows into row stores, with or without a held-out part. Small files are tokenized in
//! memory; a large file is tokenized once into a cache folder and memory-mapped from there.
//!
//! A [`RowReader`] parses the lines of one kind of row. What is common to all kinds is here: collecting
//! the results of the checks, holding out one row in ten, and writing the cache.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::cache::{self, file_sha256, hex, map_or_empty};
use super::checks::{Check, CheckReport, Finding, RowHashWriter, RowHashes};
use super::lines::{FileLine, UnreadableRow, first_lines, read_all};
use super::row_store::{ByteSink, Record, RowStore, RowStoreWriter, names};
use super::{DataError, RowFormat};
use crate::monitor::Monitor;
use crate::quant::Bytes;
use crate::text::Tokenizer;
use crate::weights::write_atomically;

/// Version of the cache format. Raise it whenever the same file would give other tokens, other check
/// results or other texts of these.
const FORMAT: u32 = 3;
const HEADER: &str = "rows.json";
const HASHES: &str = "rows.seen";
const HELD_OUT: &str = "held_out.jsonl";

/// Cache for the tokens of large files.
#[derive(Debug, Clone)]
pub struct Cache {
    /// The cache folder. Several runs may share it; delete it to clear the cache.
    pub folder: PathBuf,
    /// Files of at least this many bytes are cached.
    pub from_bytes: u64,
}

impl Cache {
    /// Whether a file is large enough to be cached.
    pub(crate) fn keeps(&self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|about| about.len() >= self.from_bytes)
    }
}

/// The rows of a file, in file order.
#[derive(Debug, Clone)]
pub struct FileRows<T, R> {
    /// The rows with something to learn.
    pub rows: RowStore<T>,
    /// Counts over all rows.
    pub report: R,
    /// SHA-256 of the whole file, in hex.
    pub sha256: String,
    /// SHA-256 of all tokens, in hex.
    pub tokens_sha256: String,
    /// Results of the checks over the whole file, held-out rows included.
    pub checks: CheckReport,
    /// Hashes of all rows of the file, for finding duplicates.
    pub hashes: RowHashes,
}

/// A file split into a training and a held-out part; no prompt is in both.
#[derive(Debug, Clone)]
pub struct FileSplit<T, R> {
    /// The training part.
    pub train: FileRows<T, R>,
    /// The held-out part; `None` if it is empty, as it may be for small files.
    pub held_out: Option<FileRows<T, R>>,
    /// The held-out rows byte for byte, each with a newline; rows of a Parquet file as JSON.
    pub held_out_lines: Bytes,
}

/// Counts over the rows of a file.
pub(super) trait RowReport: Clone + Default + Serialize + DeserializeOwned {
    /// Rows read.
    fn rows(&self) -> u64;
}

/// A parsed and tokenized line.
pub(super) struct Parsed<T> {
    pub format: Option<RowFormat>,
    /// Whether the row falls into the held-out tenth.
    pub held_out: bool,
    /// Hash of the normalized row.
    pub hash: u64,
    /// Number of tokens before truncation.
    pub length: usize,
    pub findings: Vec<Finding>,
    pub tokenized: T,
}

/// The training or held-out part while it is written.
pub(super) struct RowPart<T, R> {
    pub rows: RowStoreWriter<T>,
    pub report: R,
}

/// Parses the lines of a file into records of one kind.
pub(super) trait RowReader: Sized + Sync {
    /// A tokenized line.
    type Tokenized: Send;
    /// The stored record.
    type Record: Record;
    /// Counts over the rows.
    type Report: RowReport;

    /// Name of the kind, used in names of cache folders.
    fn kind(&self) -> &'static str;

    /// The tokenizer.
    fn tokenizer(&self) -> &Tokenizer;

    /// Settings that the rows depend on, in addition to the file and the tokenizer: part of the cache key.
    fn settings(&self) -> Value;

    /// Checks to ignore.
    fn allow(&self) -> &[Check];

    /// Parses, tokenizes and checks a line.
    fn parse(&self, line: &[u8]) -> Result<Parsed<Self::Tokenized>, UnreadableRow>;

    /// Truncates a row to the maximum length and stores it; returns failed checks that concern lengths.
    fn add(
        &self,
        line: &FileLine,
        row: Self::Tokenized,
        part: &mut RowPart<Self::Record, Self::Report>,
    ) -> io::Result<Vec<Finding>>;

    /// The error for a file of which no record is left.
    fn nothing(&self, path: PathBuf, report: &Self::Report) -> DataError;

    /// Loads all rows of a file.
    fn load(
        &self,
        path: &Path,
        cache: Option<&Cache>,
        monitor: Monitor<'_>,
    ) -> Result<FileRows<Self::Record, Self::Report>, DataError> {
        let loaded = LoadedFile::of(path, self, cache, false, monitor)?;
        loaded.checks.unreadable(path, self.allow())?;
        loaded.check(path, self)?;
        Ok(loaded.train())
    }

    /// Loads a file and splits it into a training and a held-out part.
    fn load_split(
        &self,
        path: &Path,
        cache: Option<&Cache>,
        monitor: Monitor<'_>,
    ) -> Result<FileSplit<Self::Record, Self::Report>, DataError> {
        let loaded = LoadedFile::of(path, self, cache, true, monitor)?;
        loaded.checks.unreadable(path, self.allow())?;
        let [train, held_out] = &loaded.parts;
        let rows = held_out.report.rows();
        if train.report.rows() == 0 && rows > 0 {
            return Err(DataError::AllHeldOut { path: path.into(), rows });
        }
        loaded.check(path, self)?;
        let held_out_lines = loaded.held_out_lines.clone();
        // Held-out rows with nothing to learn cannot be scored, so they make no held-out part.
        let held_out = (!held_out.rows.is_empty()).then(|| {
            let LoadedPart { rows, report, tokens_sha256 } = held_out.clone();
            let (checks, hashes) = (CheckReport::default(), RowHashes::default());
            let sha256 = loaded.sha256.clone();
            FileRows { rows, report, sha256, tokens_sha256, checks, hashes }
        });
        Ok(FileSplit { train: loaded.train(), held_out, held_out_lines })
    }

    /// Validates a file: runs all checks and counts, and keeps no record.
    fn examine(
        &self,
        path: &Path,
        monitor: Monitor<'_>,
    ) -> Result<FileRows<Self::Record, Self::Report>, DataError> {
        Ok(FileImport::new(path, self, false, RowSink::Nowhere)?.run(monitor)?.train())
    }

    /// The records of the first `rows` rows of a file; rows that cannot be read are skipped.
    fn first(&self, path: &Path, rows: usize) -> Result<Vec<Self::Record>, DataError> {
        let mut reading = FileImport::new(path, self, false, RowSink::Memory)?;
        first_lines(path, rows, |line| {
            let row = self.parse(&line.bytes);
            reading.add(line, row).map_err(|error| reading.refused(error))
        })?;
        let [train, _] = reading.finish(String::new())?.parts;
        Ok(train.rows.iter().collect())
    }
}

/// Joins several files, in order. The caller reports the check results of each file beforehand; those
/// of the first file are kept.
///
/// # Panics
/// If `files` is empty.
pub(super) fn join<T: Record, R: RowReport>(
    files: Vec<FileRows<T, R>>,
    add: impl Fn(&mut R, &R),
) -> FileRows<T, R> {
    let single = |hashes: Vec<&str>| match &hashes[..] {
        [only] => String::from(*only),
        several => hex(&Sha256::digest(several.join(" "))),
    };
    let sha256 = single(files.iter().map(|file| &*file.sha256).collect());
    let tokens_sha256 = single(files.iter().map(|file| &*file.tokens_sha256).collect());
    let mut files = files.into_iter();
    let mut all = FileRows { sha256, tokens_sha256, ..files.next().expect("at least one file") };
    for file in files {
        all.rows.append(file.rows, all.report.rows());
        add(&mut all.report, &file.report);
    }
    all
}

/// A loaded file: a training part and a held-out part, which may be empty.
struct LoadedFile<T, R> {
    sha256: String,
    checks: CheckReport,
    hashes: RowHashes,
    /// Training part and held-out part.
    parts: [LoadedPart<T, R>; 2],
    held_out_lines: Bytes,
}

/// The stored rows of the training or the held-out part.
#[derive(Clone)]
struct LoadedPart<T, R> {
    rows: RowStore<T>,
    report: R,
    tokens_sha256: String,
}

/// Everything that the cached tokens of a file depend on. Its hash names the cache folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct RowsOrigin {
    format: u32,
    kind: String,
    file: String,
    tokenizer: String,
    template: Option<String>,
    settings: Value,
    split: bool,
}

/// The header file of a cache folder: what the tokens depend on, and everything that is not rows.
#[derive(Debug, Serialize, Deserialize)]
struct RowsHeader<R> {
    origin: RowsOrigin,
    #[serde(rename = "diagnosis")]
    checks: CheckReport,
    reports: [R; 2],
    tokens_sha256: [String; 2],
    /// SHA-256 of every other file of the folder, by file name.
    sha256: BTreeMap<String, String>,
}

impl<T: Record, R: RowReport> LoadedFile<T, R> {
    fn of(
        path: &Path,
        reader: &impl RowReader<Record = T, Report = R>,
        cache: Option<&Cache>,
        split: bool,
        monitor: Monitor<'_>,
    ) -> Result<Self, DataError> {
        match cache {
            Some(cache) if cache.keeps(path) => {
                Self::cached(path, reader, &cache.folder, split, monitor)
            }
            _ => FileImport::new(path, reader, split, RowSink::Memory)?.run(monitor),
        }
    }

    /// Opens the cache folder of the file, after tokenizing the file into it if there is none yet.
    fn cached(
        path: &Path,
        reader: &impl RowReader<Record = T, Report = R>,
        cache: &Path,
        split: bool,
        monitor: Monitor<'_>,
    ) -> Result<Self, DataError> {
        let go_on = || !monitor.stopped();
        let io = |source| DataError::Io { path: path.into(), source };
        let file = file_sha256(path, &go_on).map_err(io)?.ok_or(DataError::Stopped)?;
        let tokenizer = reader.tokenizer();
        let fingerprint = tokenizer.fingerprint();
        let origin = RowsOrigin {
            format: FORMAT,
            kind: reader.kind().into(),
            file: file.clone(),
            tokenizer: fingerprint.map_err(|e| io(io::Error::other(e.to_string())))?,
            template: tokenizer.chat_template().map(|template| template.fingerprint()),
            settings: reader.settings(),
            split,
        };
        let key = hex(&Sha256::digest(serde_json::to_vec(&origin).expect("plain data")));
        let waiting = |holder: &str| {
            let cache = cache.display();
            monitor
                .note(format_args!("data: waiting for {holder}, which is tokenizing into {cache}"));
        };
        let folder =
            cache::folder(cache, (reader.kind(), &key[..16]), monitor.stop, waiting, |folder| {
                monitor.note(format_args!(
                    "data: tokenizing {}, {}",
                    path.display(),
                    shared(cache)
                ));
                let loaded =
                    FileImport::new(path, reader, split, RowSink::Folder(folder))?.run(monitor)?;
                if loaded.sha256 != file {
                    let reason = "changed while it was read".into();
                    return Err(DataError::Broken { path: path.into(), reason });
                }
                loaded.write(folder, origin.clone())
            })?;
        Self::open(&folder, &origin)
    }

    /// Writes the header file; the rows are already written.
    fn write(self, folder: &Path, origin: RowsOrigin) -> Result<(), DataError> {
        let failed = |action: &'static str, path: PathBuf| {
            move |error: &dyn fmt::Display| {
                DataError::from((action, path, io::Error::other(error.to_string())))
            }
        };
        let mut sha256 = BTreeMap::new();
        for name in files(origin.split) {
            let path = folder.join(&name);
            let hash = file_sha256(&path, &|| true);
            let hash = hash.map_err(|error| failed("read", path)(&error))?;
            sha256.insert(name, hash.expect("hashing is not stopped"));
        }
        let [train, held_out] = self.parts;
        let header = RowsHeader {
            origin,
            checks: self.checks,
            reports: [train.report, held_out.report],
            tokens_sha256: [train.tokens_sha256, held_out.tokens_sha256],
            sha256,
        };
        let json = serde_json::to_vec_pretty(&header).expect("plain data");
        let path = folder.join(HEADER);
        write_atomically(&path, |file| io::Write::write_all(file, &json))
            .map_err(|error| failed("write", path)(&error))
    }

    fn open(folder: &Path, origin: &RowsOrigin) -> Result<Self, DataError> {
        let broken = |path: &Path, reason: String| DataError::Broken { path: path.into(), reason };
        let path = folder.join(HEADER);
        let text = fs::read(&path).map_err(|error| broken(&path, error.to_string()))?;
        let header: RowsHeader<R> =
            serde_json::from_slice(&text).map_err(|error| broken(&path, error.to_string()))?;
        if header.origin != *origin {
            return Err(broken(&path, "belongs to another file or another tokenizer".into()));
        }
        for name in files(origin.split) {
            let path = folder.join(&name);
            // Read, not mapped: pages that are only hashed once should not stay in memory.
            let found = file_sha256(&path, &|| true);
            let found = found.map_err(|error| broken(&path, error.to_string()))?;
            if found.as_ref() != header.sha256.get(&name) {
                return Err(broken(&path, "has changed since it was written".into()));
            }
        }
        let map = |name: &str| {
            let path = folder.join(name);
            map_or_empty(&path).map_err(|error| broken(&path, error.to_string()))
        };
        let [report, held_out_report] = header.reports;
        let [tokens_sha256, held_out_sha256] = header.tokens_sha256;
        let part = |name: &str, report, tokens_sha256| -> Result<LoadedPart<T, R>, DataError> {
            let [rows, places] = names(name);
            let rows = RowStore::new([map(&rows)?, map(&places)?], true)
                .ok_or_else(|| broken(&folder.join(&rows), "does not match its index".into()))?;
            Ok(LoadedPart { rows, report, tokens_sha256 })
        };
        let nothing = || LoadedPart {
            rows: RowStore::default(),
            report: R::default(),
            tokens_sha256: String::new(),
        };
        Ok(Self {
            sha256: origin.file.clone(),
            checks: header.checks,
            hashes: RowHashes::new(map(HASHES)?),
            parts: [
                part("train", report, tokens_sha256)?,
                match origin.split {
                    true => part("held_out", held_out_report, held_out_sha256)?,
                    false => nothing(),
                },
            ],
            held_out_lines: match origin.split {
                true => map(HELD_OUT)?,
                false => Bytes::new(Arc::new(Vec::new())),
            },
        })
    }

    /// Fails if there is nothing to train on.
    fn check(
        &self,
        path: &Path,
        reader: &impl RowReader<Record = T, Report = R>,
    ) -> Result<(), DataError> {
        let [LoadedPart { rows, report, .. }, _] = &self.parts;
        match (report.rows(), rows.len()) {
            (0, _) => Err(DataError::Empty { path: path.into() }),
            (_, 0) => Err(reader.nothing(path.into(), report)),
            _ => Ok(()),
        }
    }

    fn train(self) -> FileRows<T, R> {
        let [LoadedPart { rows, report, tokens_sha256 }, _] = self.parts;
        let Self { sha256, checks, hashes, .. } = self;
        FileRows { rows, report, sha256, tokens_sha256, checks, hashes }
    }
}

/// Describes the cache and its size. Nothing is ever evicted, so the message gives its size.
fn shared(cache: &Path) -> String {
    let words = format!("once for all runs with {}", cache.display());
    match cache::holdings(cache, HEADER) {
        (0, _) => words,
        (files, bytes) => format!(
            "{words} (which has the tokens of {files} other file{} already, {:.1} MB; remove what is no \
             longer used)",
            if files == 1 { "" } else { "s" },
            bytes as f64 / 1e6
        ),
    }
}

/// Names of the files of a cache folder, without the header.
fn files(split: bool) -> Vec<String> {
    let mut files = vec![HASHES.to_string()];
    files.extend(names("train"));
    if split {
        files.extend(names("held_out"));
        files.push(HELD_OUT.into());
    }
    files
}

/// Where rows are stored.
#[derive(Clone, Copy)]
enum RowSink<'a> {
    Nowhere,
    Memory,
    Folder(&'a Path),
}

/// A file that is being imported.
struct FileImport<'a, R: RowReader> {
    path: &'a Path,
    reader: &'a R,
    split: bool,
    place: RowSink<'a>,
    checks: CheckReport,
    hashes: RowHashWriter,
    parts: [RowPart<R::Record, R::Report>; 2],
    held_out_lines: ByteSink,
}

impl<'a, R: RowReader> FileImport<'a, R> {
    fn new(
        path: &'a Path,
        reader: &'a R,
        split: bool,
        place: RowSink<'a>,
    ) -> Result<Self, DataError> {
        let folder = match place {
            RowSink::Folder(folder) => Some(folder),
            RowSink::Nowhere | RowSink::Memory => None,
        };
        let part = |name: &str, folder| -> io::Result<RowPart<R::Record, R::Report>> {
            let rows = match place {
                RowSink::Nowhere => RowStoreWriter::nowhere(),
                _ => RowStoreWriter::new(folder, name)?,
            };
            Ok(RowPart { rows, report: R::Report::default() })
        };
        let of_held_out = folder.filter(|_| split);
        let begin = || -> io::Result<Self> {
            Ok(Self {
                path,
                reader,
                split,
                place,
                checks: CheckReport::default(),
                hashes: RowHashWriter::new(folder.map(|folder| folder.join(HASHES)))?,
                parts: [part("train", folder)?, part("held_out", of_held_out)?],
                held_out_lines: ByteSink::new(of_held_out, HELD_OUT)?,
            })
        };
        begin().map_err(|error| refused(place, path, error))
    }

    fn refused(&self, error: io::Error) -> DataError {
        refused(self.place, self.path, error)
    }

    fn run(mut self, monitor: Monitor<'_>) -> Result<LoadedFile<R::Record, R::Report>, DataError> {
        let (path, reader) = (self.path, self.reader);
        let sha256 = read_all(
            path,
            monitor.stop,
            |line: &[u8]| reader.parse(line),
            |line, row| self.add(line, row).map_err(|error| self.refused(error)),
        )?;
        self.finish(sha256)
    }

    fn add(
        &mut self,
        line: &FileLine,
        row: Result<Parsed<R::Tokenized>, UnreadableRow>,
    ) -> io::Result<()> {
        let format = match &row {
            Ok(parsed) => parsed.format,
            Err(unread) => unread.format,
        };
        self.checks.row(line.number, format);
        let parsed = match row.map_err(|unread| unread.error) {
            Ok(parsed) => parsed,
            Err(error) => {
                self.checks.note(line.number, (Check::of(&error), error.to_string()));
                return Ok(());
            }
        };
        let held_out = self.split && parsed.held_out;
        self.checks.length(parsed.length);
        self.hashes.add(parsed.hash, line.number)?;
        let part = &mut self.parts[usize::from(held_out)];
        let more = self.reader.add(line, parsed.tokenized, part)?;
        for finding in parsed.findings.into_iter().chain(more) {
            self.checks.note(line.number, finding);
        }
        if held_out {
            self.held_out_lines.write(&line.bytes)?;
            if !line.bytes.ends_with(b"\n") {
                self.held_out_lines.write(b"\n")?;
            }
        }
        Ok(())
    }

    fn finish(mut self, sha256: String) -> Result<LoadedFile<R::Record, R::Report>, DataError> {
        let (path, place) = (self.path, self.place);
        let kept =
            |part: RowPart<R::Record, R::Report>| -> io::Result<LoadedPart<R::Record, R::Report>> {
                let (rows, tokens_sha256) = part.rows.finish()?;
                Ok(LoadedPart { rows, report: part.report, tokens_sha256 })
            };
        let finish = || -> io::Result<LoadedFile<R::Record, R::Report>> {
            let hashes = self.hashes.finish()?;
            hashes.report_duplicates(&mut self.checks);
            let lines = self.held_out_lines.finish()?;
            let [train, held_out] = self.parts;
            Ok(LoadedFile {
                sha256,
                checks: self.checks,
                hashes,
                parts: [kept(train)?, kept(held_out)?],
                held_out_lines: Bytes::new(Arc::new(lines)),
            })
        };
        finish().map_err(|error| refused(place, path, error))
    }
}

fn refused(place: RowSink, path: &Path, error: io::Error) -> DataError {
    let path = match place {
        RowSink::Folder(folder) => folder,
        RowSink::Nowhere | RowSink::Memory => path,
    };
    DataError::from(("write", path.to_path_buf(), error))
}
