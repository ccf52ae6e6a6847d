//! The mixture a model is pretrained on: named sources with weights, tokenized once, and the rows
//! of any step as a pure function of their numbers.
//!
//! A source's documents lie end to end in a ring (`shard`). An epoch cuts the ring, from a place
//! drawn for the epoch on, into rows of T tokens, and goes through them in a drawn order; which
//! source a row of the run comes from is counted out by weight (`mixture`). All of it depends on
//! the seed and the row's number alone, so a resumed run needs no state. Nothing is padded: what
//! does not fill a row at the end of an epoch is another stretch of the ring in each.

mod documents;
mod error;
mod mixture;
mod shard;
mod source;

pub use documents::{DocumentPiece, read_documents};
pub use error::CorpusError;
pub use source::{SourceSpec, matching_files};

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

use quantune_adapters::rng::Stream;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::Batch;
use super::cache::hex;
use crate::monitor::Monitor;
use crate::text::Tokenizer;
use mixture::{Mixture, Permutation};
use shard::{Borders, Shard, TokenRing};

/// How a corpus is made and cut into rows.
#[derive(Debug, Clone, PartialEq)]
pub struct CorpusSettings {
    /// The folder of the tokenized sources; several runs may share one.
    pub cache: PathBuf,
    /// Tokens of a row.
    pub sequence_length: usize,
    /// Whether positions and attention begin anew with each document, or run through the row.
    pub reset_at_borders: bool,
    /// The share of documents that is held out: by a hash of how each begins, so that a document
    /// stays in its part whatever else there is, and those with one beginning are in one part.
    pub validation_split: f64,
    /// Seed of the run.
    pub seed: u64,
}

/// How far a source is tokenized.
#[derive(Debug, Clone, Copy)]
pub struct Tokenizing<'a> {
    /// Its name.
    pub source: &'a str,
    /// Bytes of text so far.
    pub bytes: u64,
    /// Bytes of its files.
    pub of: u64,
}

/// A mixture of tokenized sources.
#[derive(Debug)]
pub struct Corpus {
    sources: Vec<CorpusSource>,
    mixture: Mixture,
    borders: Borders,
    /// Bytes of text each token stands for.
    byte_lengths: Vec<u32>,
    settings: CorpusSettings,
    fingerprint: String,
}

#[derive(Debug)]
struct CorpusSource {
    spec: SourceSpec,
    shard: Shard,
}

/// Where a row lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RowPosition {
    /// The source, by its index.
    pub source: usize,
    /// Epochs of the source before this one.
    pub epoch: u64,
    /// The row's first token in the ring of the source's.
    pub start: u64,
}

/// Held-out rows of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Validation {
    /// The rows; all their tokens are targets.
    pub batch: Batch,
    /// Bytes of text the targets stand for. An end of text stands for none, but is predicted too:
    /// a text is also where it ends.
    pub bytes: u64,
}

/// What a source is and what was seen of it, a line of the table in LLaMA's paper.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SourceReport {
    /// Its name.
    pub name: String,
    /// The share of rows that are drawn from it.
    pub weight: f64,
    /// Its files.
    pub files: usize,
    /// Documents to train on.
    pub documents: u64,
    /// Bytes of their text.
    pub bytes: u64,
    /// Their tokens, ends of text among them.
    pub tokens: u64,
    /// Documents held out.
    pub validation_documents: u64,
    /// Bytes of their text.
    pub validation_bytes: u64,
    /// Their tokens.
    pub validation_tokens: u64,
    /// Rows drawn.
    pub rows: u64,
    /// How often its tokens were seen on average.
    pub epochs: f64,
}

impl Corpus {
    /// Tokenizes the sources, or takes them from the cache if neither files, tokenizer nor
    /// settings have changed. `told` hears of what is tokenized; nothing is left half made.
    ///
    /// # Errors
    /// If sources or settings make no sense, a file cannot be used, the share held out is
    /// everything or nothing, or a shard is not as it was written; [`super::DataError::Stopped`].
    pub fn open<'m>(
        specs: &[SourceSpec],
        tokenizer: &Tokenizer,
        settings: &CorpusSettings,
        monitor: impl Into<Monitor<'m>>,
        mut told: impl FnMut(Tokenizing<'_>),
    ) -> Result<Self, CorpusError> {
        check(specs, settings)?;
        let monitor = monitor.into();
        let borders = Borders::of(tokenizer)?;
        let &CorpusSettings { validation_split, ref cache, .. } = settings;
        let mut sources = Vec::new();
        for spec in specs {
            let shard =
                shard::open(spec, tokenizer, borders, validation_split, cache, monitor, &mut told)?;
            sources.push(CorpusSource { spec: spec.clone(), shard });
        }
        let shards = || sources.iter().map(|source| &source.shard);
        if validation_split > 0.0 && shards().all(|shard| shard.validation.totals.documents == 0) {
            let documents = shards().map(|shard| shard.train.totals.documents).sum();
            return Err(CorpusError::NothingHeldOut { documents, split: validation_split });
        }
        let mut hasher = Sha256::new();
        for CorpusSource { spec, shard } in &sources {
            let Shard { train, validation, .. } = shard;
            for text in [&spec.name, &train.totals.sha256, &validation.totals.sha256] {
                hasher.update(text);
                hasher.update([0]);
            }
        }
        let weights: Vec<f64> = specs.iter().map(|spec| spec.weight).collect();
        Ok(Self {
            sources,
            mixture: Mixture::new(&weights),
            borders,
            byte_lengths: tokenizer.byte_lengths(),
            settings: settings.clone(),
            fingerprint: hex(&hasher.finalize()),
        })
    }

    /// The sources, in their order.
    pub fn sources(&self) -> impl ExactSizeIterator<Item = &SourceSpec> {
        self.sources.iter().map(|source| &source.spec)
    }

    /// A hash of all tokens and of what is held out: another one under a resume is other data.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The token that ends each document.
    pub fn end_of_text(&self) -> u32 {
        self.borders.end
    }

    /// The token that documents are read behind: BOS where the tokenizer adds it, else the end of the
    /// one before.
    pub fn begin_of_text(&self) -> u32 {
        self.borders.bos.unwrap_or(self.borders.end)
    }

    /// Rows of an epoch of a source; at least one, a small source going round within it.
    pub fn rows_per_epoch(&self, source: usize) -> u64 {
        let tokens = self.sources[source].shard.train.totals.tokens;
        (tokens / self.settings.sequence_length as u64).max(1)
    }

    /// Where row `row` of the run lies, counted over all steps and micro-batches.
    pub fn place(&self, row: u64) -> RowPosition {
        let (source, row) = self.mixture.place(row);
        let rows = self.rows_per_epoch(source);
        let (epoch, row) = (row / rows, row % rows);
        let CorpusSource { spec, shard } = &self.sources[source];
        let purpose = format!("order of source {}", spec.name);
        let mut random = Stream::new(self.settings.seed, &purpose, &[epoch]);
        let offset = random.below(shard.train.totals.tokens);
        let row = Permutation::new(rows, &mut random).of(row);
        let start = offset + row * self.settings.sequence_length as u64;
        RowPosition { source, epoch, start: start % shard.train.totals.tokens }
    }

    /// Rows of the run, each of T tokens with a target each: the next one, for a row's last token the
    /// one behind the row.
    ///
    /// If attention stops at borders, a document's context begins with the end-of-text token of
    /// the one before it, which predicts its first token: so all tokens are predicted, none from
    /// another document, and the same token begins a text when the model generates. (For models
    /// with BOS the context begins with that, which is itself not predicted.)
    pub fn batch(&self, rows: Range<u64>) -> Batch {
        let mut batch = Batch::default();
        for row in rows {
            let RowPosition { source, start, .. } = self.place(row);
            let length = self.settings.sequence_length;
            self.push(&mut batch, &self.sources[source].shard.train, start, length, row);
        }
        batch
    }

    /// Rows of a source's held-out documents. Each of their tokens is a target of one row.
    pub fn validation_rows(&self, source: usize) -> u64 {
        let tokens = self.sources[source].shard.validation.totals.tokens;
        tokens.div_ceil(self.settings.sequence_length as u64)
    }

    /// Held-out rows of a source, in the order of its files; the last row is shorter. Rows past
    /// the last are left out.
    pub fn validation(&self, source: usize, rows: Range<u64>) -> Validation {
        let part = &self.sources[source].shard.validation;
        let length = self.settings.sequence_length as u64;
        let mut batch = Batch::default();
        for row in rows.start..rows.end.min(self.validation_rows(source)) {
            let first_target = row * length;
            let count = length.min(part.totals.tokens - first_target);
            // The first token follows the ring's last: an end of text, as all documents do.
            let start = first_target + part.totals.tokens - 1;
            self.push(&mut batch, part, start, count as usize, row);
        }
        let lengths = batch.targets.iter().map(|&(_, token)| self.byte_lengths[token as usize]);
        let bytes = lengths.map(u64::from).sum();
        Validation { batch, bytes }
    }

    /// The table of sources after `rows` rows.
    pub fn report(&self, rows: u64) -> Vec<SourceReport> {
        let weights: f64 = self.sources.iter().map(|source| source.spec.weight).sum();
        let counts = self.mixture.counts(rows);
        let line = |(CorpusSource { spec, shard }, rows): (&CorpusSource, u64)| {
            let Shard { files, train, validation } = shard;
            let tokens_seen = rows as f64 * self.settings.sequence_length as f64;
            SourceReport {
                name: spec.name.clone(),
                weight: spec.weight / weights,
                files: *files,
                documents: train.totals.documents,
                bytes: train.totals.bytes,
                tokens: train.totals.tokens,
                validation_documents: validation.totals.documents,
                validation_bytes: validation.totals.bytes,
                validation_tokens: validation.totals.tokens,
                rows,
                epochs: tokens_seen / train.totals.tokens as f64,
            }
        };
        self.sources.iter().zip(counts).map(line).collect()
    }

    /// Lays `length` tokens of a part from `start` on behind what the batch holds.
    fn push(&self, batch: &mut Batch, part: &TokenRing, start: u64, length: usize, key: u64) {
        let mut row = Vec::with_capacity(length + 1);
        part.read(start, length + 1, &mut row);
        let reset = self.settings.reset_at_borders;
        let begins = |token: u32| reset && self.borders.begins_document(token);
        let learned = |token: u32| self.borders.bos != Some(token);
        batch.push_packed(&row, key, begins, learned);
    }
}

fn check(specs: &[SourceSpec], settings: &CorpusSettings) -> Result<(), CorpusError> {
    let fault = |text: String| Err(CorpusError::Settings(text));
    if specs.is_empty() {
        return fault("no sources, needed at least one: NAME=WEIGHT:GLOB".into());
    }
    let mut names = HashSet::new();
    for SourceSpec { name, weight, .. } in specs {
        if !names.insert(name) {
            return fault(format!("source {name:?} is there twice"));
        }
        if !(weight.is_finite() && *weight > 0.0) {
            return fault(format!("the weight of {name:?} is {weight}, needed a number above 0"));
        }
    }
    let sum: f64 = specs.iter().map(|spec| spec.weight).sum();
    if !sum.is_finite() {
        return fault(format!("the weights of the sources sum to {sum}, needed a number"));
    }
    let CorpusSettings { sequence_length, validation_split, .. } = settings;
    if *sequence_length == 0 {
        return fault("rows of 0 tokens, needed at least 1".into());
    }
    if !(0.0..1.0).contains(validation_split) {
        return fault(format!(
            "a validation share of {validation_split}, needed at least 0 and less than 1"
        ));
    }
    Ok(())
}

impl fmt::Display for SourceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, weight, files, documents, bytes, tokens, .. } = self;
        let (percent, megabytes) = (weight * 100.0, *bytes as f64 / 1e6);
        write!(
            f,
            "{name}: {percent:.1} % of rows, {documents} documents of {files} files, \
             {megabytes:.1} MB, {tokens} tokens, {} held out, {:.2} epochs",
            self.validation_documents, self.epochs
        )
    }
}
