//! Errors of the sources of a mixture and of their shards.

use std::path::{Path, PathBuf};

use crate::data::DataError;
use crate::data::error::IoFailure;
use crate::text::TextError;

/// Why a corpus cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CorpusError {
    /// A file cannot be read or has invalid rows, or the user interrupted the run.
    #[error(transparent)]
    Data(#[from] DataError),
    /// An error of the tokenizer.
    #[error(transparent)]
    Text(#[from] TextError),
    /// An invalid glob pattern.
    #[error("{pattern:?} is not a valid glob pattern: {problem}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A pattern that no file matches.
    #[error("no file matches {pattern:?}")]
    NoFile {
        /// The pattern.
        pattern: String,
    },
    /// A text file that is not UTF-8.
    #[error("{}: byte {offset} is not UTF-8", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Offset of the invalid byte, counted from 0.
        offset: u64,
    },
    /// A source without any text.
    #[error("source {name:?}: no text in its {files} files, needed at least one document")]
    Empty {
        /// The source.
        name: String,
        /// Number of files.
        files: usize,
    },
    /// A source all of whose documents are held out.
    #[error(
        "source {name:?}: all {documents} documents fall into the validation split of {split}, needed \
         more documents (`<|endoftext|>` lines separate those of a text file) or a smaller split"
    )]
    AllHeldOut {
        /// The source.
        name: String,
        /// Number of documents.
        documents: u64,
        /// The validation split.
        split: f64,
    },
    /// A validation split without any document.
    #[error(
        "none of {documents} documents falls into the validation split of {split}, needed more \
         documents (`<|endoftext|>` lines separate those of a text file), a larger split, or 0"
    )]
    NothingHeldOut {
        /// Number of documents.
        documents: u64,
        /// The validation split.
        split: f64,
    },
    /// No source, two sources of the same name, or invalid settings.
    #[error("{0}")]
    Settings(String),
    /// A file or folder cannot be written or read.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The failed action.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system error.
        source: std::io::Error,
    },
    /// A shard that does not match its checksum or header.
    #[error("{}: {reason}; remove its folder to have the source tokenized again", path.display())]
    Shard {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl CorpusError {
    /// For `map_err` of I/O errors.
    pub(super) fn io(action: &'static str, path: &Path) -> impl Fn(std::io::Error) -> Self {
        move |source| Self::Io { action, path: path.into(), source }
    }
}

impl From<IoFailure> for CorpusError {
    fn from((action, path, source): IoFailure) -> Self {
        Self::Io { action, path, source }
    }
}
