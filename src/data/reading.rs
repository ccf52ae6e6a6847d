//! A file of rows as the shelves of their kind, whole or with a held-out part: in memory, or of a
//! large file in a folder of its own, made once and mapped from then on.
//!
//! What a line becomes is its [`RowReader`]'s; that what is wrong with it is noted, that one row in ten may
//! be held out, and where all of it is kept, is the same for every kind and is here.

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

/// Another number, other folders: to be raised whenever the same file would give other tokens or
/// another checks.
const FORMAT: u32 = 2;
const HEADER: &str = "rows.json";
const HASHES: &str = "rows.seen";
const HELD_OUT: &str = "held_out.jsonl";

/// Where tokens of large files are kept.
#[derive(Debug, Clone)]
pub struct Cache {
    /// The folder; several runs may share one, and removing it clears it.
    pub folder: PathBuf,
    /// Bytes from which a file is large.
    pub from_bytes: u64,
}

impl Cache {
    /// Whether the tokens of a file are kept here: it is large.
    pub fn keeps(&self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|about| about.len() >= self.from_bytes)
    }
}

/// The rows of a file, in its order.
#[derive(Debug, Clone)]
pub struct FileRows<T, R> {
    /// Those with something to learn.
    pub rows: RowStore<T>,
    /// What was counted on the way.
    pub report: R,
    /// SHA-256 of the whole file, in hex.
    pub sha256: String,
    /// The same of all tokens.
    pub tokens_sha256: String,
    /// What is wrong with the rows of the whole file, held-out ones among them.
    pub checks: CheckReport,
    /// What all rows of the file say.
    pub hashes: RowHashes,
}

/// A file in two parts, no prompt in both.
#[derive(Debug, Clone)]
pub struct FileSplit<T, R> {
    /// What is trained on.
    pub train: FileRows<T, R>,
    /// What is held out; small files may leave nothing to it.
    pub held_out: Option<FileRows<T, R>>,
    /// The held-out rows as the file has them, byte for byte, each with a newline; of a Parquet file
    /// as JSON.
    pub held_out_lines: Bytes,
}

/// What is counted of rows.
pub(super) trait RowReport: Clone + Default + Serialize + DeserializeOwned {
    /// Rows read.
    fn rows(&self) -> u64;
}

/// A row as it comes from a thread.
pub(super) struct Parsed<T> {
    pub format: Option<RowFormat>,
    /// Whether it is one of the one in ten.
    pub held_out: bool,
    /// What it says, whatever its case and spacing.
    pub hash: u64,
    /// Its tokens, before any cut.
    pub length: usize,
    pub findings: Vec<Finding>,
    pub tokenized: T,
}

/// Rows of one part on their way.
pub(super) struct RowPart<T, R> {
    pub rows: RowStoreWriter<T>,
    pub report: R,
}

/// How the lines of a file become rows of a kind.
pub(super) trait RowReader: Sized + Sync {
    /// A line's tokens.
    type Tokenized: Send;
    /// What is kept of it.
    type Record: Record;
    /// What is counted.
    type Report: RowReport;

    /// What a folder of such rows is called.
    fn kind(&self) -> &'static str;

    /// What makes its tokens.
    fn tokenizer(&self) -> &Tokenizer;

    /// What rows depend on beside the file and the tokenizer.
    fn settings(&self) -> Value;

    /// What may be wrong with rows that cannot be read.
    fn allow(&self) -> &[Check];

    /// A line to its tokens, and what is odd about them.
    fn parse(&self, line: &[u8]) -> Result<Parsed<Self::Tokenized>, UnreadableRow>;

    /// Adds what there is to learn of a row; what is odd about its lengths.
    fn add(
        &self,
        line: &FileLine,
        row: Self::Tokenized,
        part: &mut RowPart<Self::Record, Self::Report>,
    ) -> io::Result<Vec<Finding>>;

    /// That nothing of the rows that were counted is kept.
    fn nothing(&self, path: PathBuf, report: &Self::Report) -> DataError;

    /// Reads all rows of a file.
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

    /// The same in two parts.
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
        // Held-out rows with nothing to learn cannot be scored: then there is no held-out part.
        let held_out = (!held_out.rows.is_empty()).then(|| {
            let LoadedPart { rows, report, tokens_sha256 } = held_out.clone();
            let (checks, hashes) = (CheckReport::default(), RowHashes::default());
            let sha256 = loaded.sha256.clone();
            FileRows { rows, report, sha256, tokens_sha256, checks, hashes }
        });
        Ok(FileSplit { train: loaded.train(), held_out, held_out_lines })
    }

    /// What is wrong with rows, and what they come to. None of them is kept.
    fn examine(
        &self,
        path: &Path,
        monitor: Monitor<'_>,
    ) -> Result<FileRows<Self::Record, Self::Report>, DataError> {
        Ok(FileImport::new(path, self, false, RowSink::Nowhere)?.run(monitor)?.train())
    }

    /// What the first rows of a file come to, as many as can be read, whatever is wrong with others.
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

/// Several files as one, in their order. What is wrong with each is to be told before.
///
/// # Panics
/// If there are none.
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
    let mut all = FileRows { sha256, tokens_sha256, ..files.next().expect("a file at least") };
    for file in files {
        all.rows.append(file.rows, all.report.rows());
        add(&mut all.report, &file.report);
    }
    all
}

/// What a file's rows came to, in one part or two.
struct LoadedFile<T, R> {
    sha256: String,
    checks: CheckReport,
    hashes: RowHashes,
    /// What is trained on, and what is held out.
    parts: [LoadedPart<T, R>; 2],
    held_out_lines: Bytes,
}

/// The rows of one part.
#[derive(Clone)]
struct LoadedPart<T, R> {
    rows: RowStore<T>,
    report: R,
    tokens_sha256: String,
}

/// What the folder of a file depends on.
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

/// What is said of a folder: what it depends on, and all that is not rows.
#[derive(Debug, Serialize, Deserialize)]
struct RowsHeader<R> {
    origin: RowsOrigin,
    #[serde(rename = "diagnosis")]
    checks: CheckReport,
    reports: [R; 2],
    tokens_sha256: [String; 2],
    /// Of each other file, by its name.
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

    /// From the folder of the file, which is made if there is none yet.
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

    /// Writes what the readers of the rows have not.
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
            sha256.insert(name, hash.expect("nobody stops it"));
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
            return Err(broken(&path, "is of another file or another tokenizer".into()));
        }
        for name in files(origin.split) {
            let path = folder.join(&name);
            // Read and not mapped: what is only looked over once need not stay in memory.
            let found = file_sha256(&path, &|| true);
            let found = found.map_err(|error| broken(&path, error.to_string()))?;
            if found.as_ref() != header.sha256.get(&name) {
                return Err(broken(&path, "is not as it was written".into()));
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
                .ok_or_else(|| broken(&folder.join(&rows), "is not as its places say".into()))?;
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

    /// That there is something to train on.
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

/// What a cache is for, and what it has by now: nothing removes what is no longer used.
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

/// The files of a folder beside what is said of them.
fn files(split: bool) -> Vec<String> {
    let mut files = vec![HASHES.to_string()];
    files.extend(names("train"));
    if split {
        files.extend(names("held_out"));
        files.push(HELD_OUT.into());
    }
    files
}

/// Where rows are put.
#[derive(Clone, Copy)]
enum RowSink<'a> {
    Nowhere,
    Memory,
    Folder(&'a Path),
}

/// A file that is being read.
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
