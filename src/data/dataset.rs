//! A file of rows as examples, whole or with a held-out part: in memory, or of a large file in a
//! folder of its own, made once and mapped from then on.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::cache::{self, file_sha256, hex};
use super::doctor::{self, Check, Diagnosis, Finding, Seen};
use super::example::{Tokenized, WhenLong, pieces, tokenize};
use super::examples::{ExamplesWriter, Sink, names};
use super::lines::{Line, Unread, first_lines, read_all};
use super::{AlpacaPrompt, DataError, Dialect, Example, Examples, Row, RowError, is_held_out};
use crate::quant::Bytes;
use crate::text::Tokenizer;
use crate::weights::{map_file, write_atomically};

/// Another number, other folders: to be raised whenever the same file would give other tokens or
/// another diagnosis.
const FORMAT: u32 = 1;
const HEADER: &str = "rows.json";
const SEEN: &str = "rows.seen";
const HELD_OUT: &str = "held_out.jsonl";

/// The examples of a file, in its order.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Rows with something to learn.
    pub examples: Examples,
    /// What was counted on the way.
    pub report: DataReport,
    /// SHA-256 of the whole file, in hex.
    pub sha256: String,
    /// The same of all tokens and masks.
    pub tokens_sha256: String,
    /// What is wrong with the rows of the whole file, held-out ones among them.
    pub diagnosis: Diagnosis,
    /// What all rows of the file say.
    pub seen: Seen,
}

/// A file in two parts, no prompt in both.
#[derive(Debug, Clone)]
pub struct Split {
    /// What is trained on.
    pub train: Dataset,
    /// What is held out; small files may leave nothing to it.
    pub held_out: Option<Dataset>,
    /// The held-out rows as the file has them, byte for byte, each with a newline; of a Parquet file
    /// as JSON.
    pub held_out_lines: Bytes,
}

/// How rows become examples.
#[derive(Debug, Clone, Default)]
pub struct LoadSettings {
    /// Tokens of an example: of a row with more the first are kept; but a `text` is split.
    pub max_length: usize,
    /// How rows of Alpaca's are laid out; without, by the chat template if there is one.
    pub alpaca: Option<AlpacaPrompt>,
    /// What may be wrong with rows that cannot be read: those are left out.
    pub allow: Vec<Check>,
    /// Tokens the model can read at once, and ids it has.
    pub model: Option<ModelLimits>,
    /// Where tokens of large files are kept; without, all are held in memory.
    pub cache: Option<Cache>,
    /// Whether rows are only looked at: then there are no examples.
    pub looks_only: bool,
}

/// What a model can read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelLimits {
    /// Tokens at once.
    pub window: usize,
    /// Ids.
    pub vocab_size: usize,
}

/// Where tokens of large files are kept.
#[derive(Debug, Clone)]
pub struct Cache {
    /// The folder; several runs may share one, and removing it clears it.
    pub folder: PathBuf,
    /// Bytes from which a file is large.
    pub from_bytes: u64,
}

impl From<usize> for LoadSettings {
    fn from(max_length: usize) -> Self {
        Self { max_length, ..Self::default() }
    }
}

/// What a file's rows came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
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

impl Dataset {
    /// Reads and tokenizes all rows of a JSONL or Parquet file. Ends early once `stop` is set.
    ///
    /// # Errors
    /// All rows that cannot be read, the first few with their lines; a file without rows, or without
    /// anything to learn; [`DataError::Stopped`].
    pub fn load(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: impl Into<LoadSettings>,
        stop: &AtomicBool,
    ) -> Result<Self, DataError> {
        let settings = settings.into();
        let loaded = Loaded::of(path, tokenizer, &settings, false, stop)?;
        loaded.diagnosis.unreadable(path, &settings.allow)?;
        loaded.train.finish(path, settings.max_length)?;
        Ok(loaded.whole())
    }

    /// The same, whatever is wrong with the rows: what there is to learn, which may be nothing.
    ///
    /// # Errors
    /// If the file cannot be read at all; [`DataError::Stopped`].
    pub fn examine(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: &LoadSettings,
        stop: &AtomicBool,
    ) -> Result<Self, DataError> {
        Ok(Loaded::of(path, tokenizer, settings, false, stop)?.whole())
    }

    /// The examples of the first rows, as many as can be read, whatever is wrong with others.
    ///
    /// # Errors
    /// If the file cannot be read at all.
    pub fn first(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: &LoadSettings,
        rows: usize,
    ) -> Result<Vec<Example>, DataError> {
        let settings = LoadSettings { cache: None, looks_only: false, ..settings.clone() };
        let mut reading = Reading::new(path, &settings, false, None)?;
        first_lines(path, rows, |line| {
            let row = parse(&line.bytes, tokenizer, &settings, false);
            reading.add(line, row).map_err(|error| Reading::refused(None, path, error))
        })?;
        let part = reading.train.finish();
        Ok(part.map_err(|error| Reading::refused(None, path, error))?.examples.iter().collect())
    }

    /// The same in two parts: one row in ten is held out, as [`is_held_out`] says.
    ///
    /// # Errors
    /// As [`Dataset::load`], and if no row is left to train on.
    pub fn load_split(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: impl Into<LoadSettings>,
        stop: &AtomicBool,
    ) -> Result<Split, DataError> {
        let settings = settings.into();
        let loaded = Loaded::of(path, tokenizer, &settings, true, stop)?;
        loaded.diagnosis.unreadable(path, &settings.allow)?;
        if loaded.train.report.rows == 0 && loaded.held_out.report.rows > 0 {
            let rows = loaded.held_out.report.rows;
            return Err(DataError::AllHeldOut { path: path.into(), rows });
        }
        loaded.train.finish(path, settings.max_length)?;
        let sha256 = loaded.sha256.clone();
        let held_out_lines = loaded.held_out_lines.clone();
        // Held-out rows with nothing to learn cannot be scored: then there is no held-out part.
        let part = Some(loaded.held_out.clone()).filter(|part| !part.examples.is_empty());
        let held_out = part.map(|part| Self {
            examples: part.examples,
            report: part.report,
            sha256,
            tokens_sha256: part.tokens_sha256,
            diagnosis: Diagnosis::default(),
            seen: Seen::default(),
        });
        Ok(Split { train: loaded.whole(), held_out, held_out_lines })
    }

    /// Several files as one, in their order. What is wrong with each is to be told before.
    ///
    /// # Panics
    /// If there are none.
    pub fn join(files: Vec<Self>) -> Self {
        let single = |hashes: Vec<&str>| match &hashes[..] {
            [only] => String::from(*only),
            several => hex(&Sha256::digest(several.join(" "))),
        };
        let sha256 = single(files.iter().map(|file| &*file.sha256).collect());
        let tokens_sha256 = single(files.iter().map(|file| &*file.tokens_sha256).collect());
        let mut files = files.into_iter();
        let mut all = Self { sha256, tokens_sha256, ..files.next().expect("a file at least") };
        for file in files {
            all.examples.append(file.examples, all.report.rows);
            all.report.add(&file.report);
        }
        all
    }
}

/// What a file's rows came to, in one part or two.
struct Loaded {
    sha256: String,
    diagnosis: Diagnosis,
    seen: Seen,
    train: Part,
    held_out: Part,
    held_out_lines: Bytes,
}

/// Examples of one part.
#[derive(Debug, Clone)]
struct Part {
    examples: Examples,
    report: DataReport,
    tokens_sha256: String,
}

impl Part {
    fn finish(&self, path: &Path, max_length: usize) -> Result<(), DataError> {
        let path = path.to_path_buf();
        if self.report.rows == 0 {
            return Err(DataError::Empty { path });
        }
        if self.examples.is_empty() {
            let DataReport { rows, truncated, .. } = self.report;
            return Err(DataError::NothingToLearn { path, rows, truncated, max_length });
        }
        Ok(())
    }
}

/// What the folder of a file depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Origin {
    format: u32,
    file: String,
    tokenizer: String,
    template: Option<String>,
    max_length: usize,
    alpaca: Option<AlpacaPrompt>,
    model: Option<ModelLimits>,
    split: bool,
}

/// What is said of a folder: what it depends on, and all that is not examples.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    origin: Origin,
    diagnosis: Diagnosis,
    reports: [DataReport; 2],
    tokens_sha256: [String; 2],
    /// Of each other file, by its name.
    sha256: std::collections::BTreeMap<String, String>,
}

impl Loaded {
    fn of(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: &LoadSettings,
        split: bool,
        stop: &AtomicBool,
    ) -> Result<Self, DataError> {
        let bytes = fs::metadata(path).map_or(0, |about| about.len());
        match &settings.cache {
            Some(cache) if bytes >= cache.from_bytes => {
                Self::cached(path, tokenizer, settings, &cache.folder, split, stop)
            }
            _ => Reading::new(path, settings, split, None)?.run(tokenizer, stop),
        }
    }

    /// From the folder of the file, which is made if there is none yet.
    fn cached(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: &LoadSettings,
        cache: &Path,
        split: bool,
        stop: &AtomicBool,
    ) -> Result<Self, DataError> {
        let go_on = || !stop.load(Ordering::Relaxed);
        let io = |source| DataError::Io { path: path.into(), source };
        let file = file_sha256(path, &go_on).map_err(io)?.ok_or(DataError::Stopped)?;
        let refused = |error: crate::text::TextError| DataError::Io {
            path: path.into(),
            source: std::io::Error::other(error.to_string()),
        };
        let origin = Origin {
            format: FORMAT,
            file: file.clone(),
            tokenizer: tokenizer.fingerprint().map_err(refused)?,
            template: tokenizer.chat_template().map(|template| template.fingerprint()),
            max_length: settings.max_length,
            alpaca: settings.alpaca,
            model: settings.model,
            split,
        };
        let key = hex(&Sha256::digest(serde_json::to_vec(&origin).expect("plain data")));
        let folder = cache::folder(cache, ("rows", &key[..16]), |folder| {
            eprintln!(
                "data: tokenizing {}, once for all runs with {}",
                path.display(),
                cache.display()
            );
            let loaded = Reading::new(path, settings, split, Some(folder))?.run(tokenizer, stop)?;
            if loaded.sha256 != file {
                let reason = "changed while it was read".into();
                return Err(DataError::Broken { path: path.into(), reason });
            }
            loaded.write(folder, origin.clone())
        })?;
        Self::open(&folder, &origin)
    }

    /// Writes what the readers of the rows have not.
    fn write(self, folder: &Path, origin: Origin) -> Result<(), DataError> {
        let failed = |action: &'static str, path: PathBuf| {
            move |error: &dyn fmt::Display| {
                DataError::from((action, path, std::io::Error::other(error.to_string())))
            }
        };
        let seen = folder.join(SEEN);
        fs::write(&seen, self.seen.to_bytes())
            .map_err(|error| failed("write", seen.clone())(&error))?;
        let mut sha256 = std::collections::BTreeMap::new();
        for name in Self::files(origin.split) {
            let path = folder.join(&name);
            let hash = file_sha256(&path, &|| true);
            let hash = hash.map_err(|error| failed("read", path)(&error))?;
            sha256.insert(name, hash.expect("nobody stops it"));
        }
        let header = Header {
            origin,
            diagnosis: self.diagnosis,
            reports: [self.train.report, self.held_out.report],
            tokens_sha256: [self.train.tokens_sha256, self.held_out.tokens_sha256],
            sha256,
        };
        let json = serde_json::to_vec_pretty(&header).expect("plain data");
        let path = folder.join(HEADER);
        write_atomically(&path, |file| std::io::Write::write_all(file, &json))
            .map_err(|error| failed("write", path)(&error))
    }

    fn files(split: bool) -> Vec<String> {
        let mut files = vec![SEEN.to_string()];
        files.extend(names("train"));
        if split {
            files.extend(names("held_out"));
            files.push(HELD_OUT.into());
        }
        files
    }

    fn open(folder: &Path, origin: &Origin) -> Result<Self, DataError> {
        let broken = |path: &Path, reason: String| DataError::Broken { path: path.into(), reason };
        let path = folder.join(HEADER);
        let text = fs::read(&path).map_err(|error| broken(&path, error.to_string()))?;
        let header: Header =
            serde_json::from_slice(&text).map_err(|error| broken(&path, error.to_string()))?;
        if header.origin != *origin {
            return Err(broken(&path, "is of another file or another tokenizer".into()));
        }
        for name in Self::files(origin.split) {
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
            let empty = || Bytes::new(std::sync::Arc::new(Vec::new()));
            match fs::metadata(&path) {
                Ok(about) if about.len() == 0 => Ok(empty()),
                _ => map_file(&path).map_err(|error| broken(&path, error.to_string())),
            }
        };
        let [report, held_out_report] = header.reports;
        let [tokens_sha256, held_out_sha256] = header.tokens_sha256;
        let part = |name: &str, report, tokens_sha256| -> Result<Part, DataError> {
            let [words, places] = names(name);
            let examples = Examples::new(map(&words)?, map(&places)?)
                .ok_or_else(|| broken(&folder.join(&words), "is not as its places say".into()))?;
            Ok(Part { examples, report, tokens_sha256 })
        };
        let nothing = || Part {
            examples: Examples::default(),
            report: DataReport::default(),
            tokens_sha256: String::new(),
        };
        Ok(Self {
            sha256: origin.file.clone(),
            diagnosis: header.diagnosis,
            seen: Seen::from_bytes(&map(SEEN)?),
            train: part("train", report, tokens_sha256)?,
            held_out: match origin.split {
                true => part("held_out", held_out_report, held_out_sha256)?,
                false => nothing(),
            },
            held_out_lines: match origin.split {
                true => map(HELD_OUT)?,
                false => Bytes::new(std::sync::Arc::new(Vec::new())),
            },
        })
    }

    fn whole(self) -> Dataset {
        Dataset {
            examples: self.train.examples,
            report: self.train.report,
            sha256: self.sha256,
            tokens_sha256: self.train.tokens_sha256,
            diagnosis: self.diagnosis,
            seen: self.seen,
        }
    }
}

/// A row as it comes from a thread.
struct Parsed {
    dialect: Option<Dialect>,
    held_out: bool,
    hash: u64,
    tokenized: Tokenized,
    findings: Vec<Finding>,
}

/// A file that is being read.
struct Reading<'a> {
    path: &'a Path,
    settings: &'a LoadSettings,
    split: bool,
    diagnosis: Diagnosis,
    seen: Seen,
    train: PartWriter,
    held_out: PartWriter,
    held_out_lines: Sink,
    folder: Option<&'a Path>,
}

struct PartWriter {
    examples: ExamplesWriter,
    report: DataReport,
}

impl<'a> Reading<'a> {
    /// Into memory, or files of a folder.
    fn new(
        path: &'a Path,
        settings: &'a LoadSettings,
        split: bool,
        folder: Option<&'a Path>,
    ) -> Result<Self, DataError> {
        let part = |name: &str, folder| -> std::io::Result<PartWriter> {
            let examples = match settings.looks_only {
                true => ExamplesWriter::nowhere(),
                false => ExamplesWriter::new(folder, name)?,
            };
            Ok(PartWriter { examples, report: DataReport::default() })
        };
        let of_held_out = folder.filter(|_| split);
        let begin = || -> std::io::Result<Self> {
            Ok(Self {
                path,
                settings,
                split,
                diagnosis: Diagnosis::default(),
                seen: Seen::default(),
                train: part("train", folder)?,
                held_out: part("held_out", of_held_out)?,
                held_out_lines: Sink::new(of_held_out, HELD_OUT)?,
                folder,
            })
        };
        begin().map_err(|error| Self::refused(folder, path, error))
    }

    fn refused(folder: Option<&Path>, path: &Path, error: std::io::Error) -> DataError {
        DataError::from(("write", folder.unwrap_or(path).to_path_buf(), error))
    }

    fn run(mut self, tokenizer: &Tokenizer, stop: &AtomicBool) -> Result<Loaded, DataError> {
        let (settings, split) = (self.settings, self.split);
        let parse = |bytes: &[u8]| parse(bytes, tokenizer, settings, split);
        let (path, folder) = (self.path, self.folder);
        let sha256 = read_all(path, stop, parse, |line, row| {
            self.add(line, row).map_err(|error| Self::refused(folder, path, error))
        })?;
        self.seen.finish(&mut self.diagnosis);
        let finish = || -> std::io::Result<Loaded> {
            let lines = self.held_out_lines.finish()?;
            Ok(Loaded {
                sha256,
                diagnosis: self.diagnosis,
                seen: self.seen,
                train: self.train.finish()?,
                held_out: self.held_out.finish()?,
                held_out_lines: Bytes::new(std::sync::Arc::new(lines)),
            })
        };
        finish().map_err(|error| Self::refused(folder, path, error))
    }

    fn add(&mut self, line: &Line, row: Result<Parsed, Unread>) -> std::io::Result<()> {
        let dialect = match &row {
            Ok(parsed) => parsed.dialect,
            Err(unread) => unread.dialect,
        };
        self.diagnosis.row(line.number, dialect);
        let parsed = match row.map_err(|unread| unread.error) {
            Ok(parsed) => parsed,
            Err(error) => {
                self.diagnosis.note(line.number, (Check::of(&error), error.to_string()));
                return Ok(());
            }
        };
        for finding in parsed.findings {
            self.diagnosis.note(line.number, finding);
        }
        self.diagnosis.length(parsed.tokenized.tokens.len());
        self.seen.add(parsed.hash, line.number);
        let part = if parsed.held_out { &mut self.held_out } else { &mut self.train };
        for finding in part.add(line, parsed.tokenized, self.settings)? {
            self.diagnosis.note(line.number, finding);
        }
        if parsed.held_out {
            self.held_out_lines.write(&line.bytes)?;
            if !line.bytes.ends_with(b"\n") {
                self.held_out_lines.write(b"\n")?;
            }
        }
        Ok(())
    }
}

/// A line to its tokens, and what is odd about them.
fn parse(
    bytes: &[u8],
    tokenizer: &Tokenizer,
    settings: &LoadSettings,
    split: bool,
) -> Result<Parsed, Unread> {
    let (dialect, row) = Row::read(bytes);
    let unread = |error| Unread { dialect, error };
    let row = row.map_err(unread)?;
    let tokenized = tokenize(&row, tokenizer, settings.alpaca).map_err(unread)?;
    let Tokenized { tokens, learned, .. } = &tokenized;
    if let Some(limits) = settings.model
        && let Some(index) = tokens.iter().position(|&id| id as usize >= limits.vocab_size)
    {
        let (token, vocab_size) = (tokens[index], limits.vocab_size);
        return Err(unread(RowError::OutOfVocabulary { index, token, vocab_size }));
    }
    let mut findings = match &row {
        Row::Messages { messages, .. } | Row::Alpaca { messages, .. } => {
            doctor::of_messages(messages)
        }
        _ => Vec::new(),
    };
    findings.extend(doctor::of_tokens(&row, tokens, learned, tokenizer));
    let held_out = split && is_held_out(&row);
    Ok(Parsed { dialect, held_out, hash: doctor::normalized_hash(&row), tokenized, findings })
}

impl PartWriter {
    /// Adds a row's examples; what is odd about their lengths.
    fn add(
        &mut self,
        line: &Line,
        row: Tokenized,
        settings: &LoadSettings,
    ) -> std::io::Result<Vec<Finding>> {
        let max_length = settings.max_length;
        let Tokenized { mut tokens, mut learned, boundary_mismatch, when_long } = row;
        let report = &mut self.report;
        let mut found = Vec::new();
        let length = tokens.len();
        report.rows += 1;
        report.longest = report.longest.max(length as u64);
        if boundary_mismatch {
            report.boundary_mismatches += 1;
            let sentence = "a token reaches from what is given into what is learned: a prompt alone \
                            ends in other tokens (mostly, in a space)";
            found.push((Check::BoundaryMismatch, sentence.into()));
        }
        if let Some(window) = settings.model.map(|limits| limits.window)
            && length > window
        {
            let sentence = format!("has {length} tokens, the model reads {window} at once");
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
                let sentence = format!("has {length} tokens, cut to {max_length}{left}");
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
                    self.examples.push(&example)?;
                }
            }
        }
        // Where the cut has taken it, that is told as the cut.
        if kept == 0 && !any {
            let sentence = "no token of it is learned: the loss would be of nothing";
            found.push((Check::NothingToLearn, sentence.into()));
        }
        Ok(found)
    }

    fn finish(self) -> std::io::Result<Part> {
        let (examples, tokens_sha256) = self.examples.finish()?;
        Ok(Part { examples, report: self.report, tokens_sha256 })
    }
}
