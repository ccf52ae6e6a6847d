//! The pretraining corpus: a mixture of named sources with weights. Sources are tokenized once, and the
//! rows of any step are a pure function of their indices.
//!
//! The documents of a source are concatenated into a ring (`shard`). An epoch cuts the ring into rows of T
//! tokens, from a random offset on, and visits them in random order; the source of each row of the run is
//! chosen by weight (`mixture`). Everything depends only on the seed and the row index, so a resumed run
//! needs no state. Nothing is padded: the tokens that do not fill a row at the end of an epoch are others
//! in each epoch.

mod documents;
mod error;
mod mixture;
mod shard;
mod source;

pub(crate) use documents::read_documents;
pub use error::CorpusError;
pub use shard::Tokenizing;
pub use source::SourceSpec;
pub(crate) use source::matching_files;

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

/// Settings for tokenizing a corpus and cutting it into rows.
#[derive(Debug, Clone, PartialEq)]
pub struct CorpusSettings {
    /// Cache folder for the tokenized sources; several runs may share it.
    pub cache: PathBuf,
    /// Number of tokens per row.
    pub sequence_length: usize,
    /// Whether positions and attention are reset at document borders, or run through the whole row.
    pub reset_at_borders: bool,
    /// The fraction of documents that is held out, by a hash of the beginning of each. So a document stays
    /// in its part when others are added, and documents with the same beginning are in the same part.
    pub validation_split: f64,
    /// Seed of the run.
    pub seed: u64,
}

/// A mixture of tokenized sources.
#[derive(Debug)]
pub struct Corpus {
    sources: Vec<CorpusSource>,
    mixture: Mixture,
    borders: Borders,
    /// Number of bytes of text that each token id stands for.
    byte_lengths: Vec<u32>,
    settings: CorpusSettings,
    fingerprint: String,
}

#[derive(Debug)]
struct CorpusSource {
    spec: SourceSpec,
    shard: Shard,
}

/// Position of a row in the corpus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RowPosition {
    /// Index of the source.
    pub source: usize,
    /// Epoch of the source, from 0.
    pub epoch: u64,
    /// Index of the row's first token in the ring of the source.
    pub start: u64,
}

/// Held-out rows of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Validation {
    /// The rows. All their tokens are targets.
    pub batch: Batch,
    /// Number of bytes of text that the targets stand for. An end-of-text token stands for no bytes, but is
    /// predicted too.
    pub bytes: u64,
}

/// Statistics of a source and how much of it was used: a line of the data table in LLaMA's paper.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SourceReport {
    /// Name of the source.
    pub name: String,
    /// Fraction of rows that are drawn from it.
    pub weight: f64,
    /// Number of files.
    pub files: usize,
    /// Number of training documents.
    pub documents: u64,
    /// Bytes of text of the training documents.
    pub bytes: u64,
    /// Tokens of the training documents, end-of-text tokens included.
    pub tokens: u64,
    /// Number of held-out documents.
    pub validation_documents: u64,
    /// Bytes of text of the held-out documents.
    pub validation_bytes: u64,
    /// Tokens of the held-out documents.
    pub validation_tokens: u64,
    /// Number of rows drawn.
    pub rows: u64,
    /// Average number of times each token was used.
    pub epochs: f64,
}

impl Corpus {
    /// Tokenizes the sources, or takes them from the cache if neither files, tokenizer nor
    /// settings have changed. `on_progress` is called while tokenizing; incomplete shards are removed.
    ///
    /// # Errors
    /// If sources or settings are invalid, a file cannot be used, the share held out is
    /// everything or nothing, or a shard is not as it was written; [`super::DataError::Stopped`].
    pub fn open<'m>(
        specs: &[SourceSpec],
        tokenizer: &Tokenizer,
        settings: &CorpusSettings,
        monitor: impl Into<Monitor<'m>>,
        mut on_progress: impl FnMut(Tokenizing<'_>),
    ) -> Result<Self, CorpusError> {
        check(specs, settings)?;
        let monitor = monitor.into();
        let borders = Borders::of(tokenizer)?;
        let &CorpusSettings { validation_split, ref cache, .. } = settings;
        let mut sources = Vec::new();
        for spec in specs {
            let shard = shard::open(
                spec,
                tokenizer,
                borders,
                validation_split,
                cache,
                monitor,
                &mut on_progress,
            )?;
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

    /// The sources, in order.
    pub fn sources(&self) -> impl ExactSizeIterator<Item = &SourceSpec> {
        self.sources.iter().map(|source| &source.spec)
    }

    /// A hash of all tokens and of the held-out part. If it differs on resume, the data has changed.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The token that documents are conditioned on: BOS if the tokenizer adds it, else the end-of-text token
    /// of the previous document.
    pub(crate) fn begin_of_text(&self) -> u32 {
        self.borders.bos.unwrap_or(self.borders.end)
    }

    /// Number of rows per epoch of a source. It is at least one; a small source repeats within the row.
    pub fn rows_per_epoch(&self, source: usize) -> u64 {
        let tokens = self.sources[source].shard.train.totals.tokens;
        (tokens / self.settings.sequence_length as u64).max(1)
    }

    /// Position of row `row` of the run, counted over all steps and micro-batches.
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

    /// A batch of rows of the run. Each row has T tokens, and the target of each is the next token in the
    /// ring.
    ///
    /// If attention is reset at borders, the context of a document begins with the end-of-text token of the
    /// previous one, which predicts its first token. So all tokens are predicted, none from another
    /// document, and generation starts from the same token. (For models with BOS the context begins with
    /// BOS, which is itself not predicted.)
    pub fn batch(&self, rows: Range<u64>) -> Batch {
        let mut batch = Batch::default();
        for row in rows {
            let RowPosition { source, start, .. } = self.place(row);
            let length = self.settings.sequence_length;
            self.push(&mut batch, &self.sources[source].shard.train, start, length, row);
        }
        batch
    }

    /// Number of rows of the held-out documents of a source. Each of their tokens is a target of one row.
    pub fn validation_rows(&self, source: usize) -> u64 {
        let tokens = self.sources[source].shard.validation.totals.tokens;
        tokens.div_ceil(self.settings.sequence_length as u64)
    }

    /// Held-out rows of a source, in file order. The last row may be shorter, and rows past the last are
    /// skipped.
    pub fn validation(&self, source: usize, rows: Range<u64>) -> Validation {
        let part = &self.sources[source].shard.validation;
        let length = self.settings.sequence_length as u64;
        let mut batch = Batch::default();
        for row in rows.start..rows.end.min(self.validation_rows(source)) {
            let first_target = row * length;
            let count = length.min(part.totals.tokens - first_target);
            // The first token is predicted by the last of the ring, an end-of-text token, as for every
            // document.
            let start = first_target + part.totals.tokens - 1;
            self.push(&mut batch, part, start, count as usize, row);
        }
        let lengths = batch.targets.iter().map(|&(_, token)| self.byte_lengths[token as usize]);
        let bytes = lengths.map(u64::from).sum();
        Validation { batch, bytes }
    }

    /// The statistics of all sources after `rows` rows.
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

    /// Appends a row of `length` tokens of a part, from `start` on, to the batch.
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
            return fault(format!("source {name:?} is given twice"));
        }
        if !(weight.is_finite() && *weight > 0.0) {
            return fault(format!("the weight of {name:?} is {weight}, needed a number above 0"));
        }
    }
    let sum: f64 = specs.iter().map(|spec| spec.weight).sum();
    if !sum.is_finite() {
        return fault(format!("the weights of the sources sum to {sum}, needed a finite number"));
    }
    let CorpusSettings { sequence_length, validation_split, .. } = settings;
    if *sequence_length == 0 {
        return fault("the sequence length is 0, needed at least 1".into());
    }
    if !(0.0..1.0).contains(validation_split) {
        return fault(format!(
            "the validation split is {validation_split}, needed at least 0 and less than 1"
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
