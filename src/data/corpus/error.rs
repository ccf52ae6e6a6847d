//! What can be wrong with the sources of a mixture and with their shards.

use std::path::{Path, PathBuf};

use crate::data::DataError;
use crate::data::cache::IoFailure;
use crate::text::TextError;

/// Why sources gave no corpus.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CorpusError {
    /// A file cannot be read, or holds wrong rows; or the user asked to stop.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The tokenizer refused.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A pattern that is none.
    #[error("{pattern:?} is no pattern of file names: {problem}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A pattern that nothing matches.
    #[error("no file matches {pattern:?}")]
    NoFile {
        /// The pattern.
        pattern: String,
    },
    /// Text that is none.
    #[error("{}: byte {offset} is not UTF-8", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// The byte, counted from 0.
        offset: u64,
    },
    /// Files without any text.
    #[error("source {name:?}: no text in its {files} files, needed a document at least")]
    Empty {
        /// The source.
        name: String,
        /// Its files.
        files: usize,
    },
    /// A source all of whose documents are held out.
    #[error(
        "source {name:?}: all {documents} documents fall into the validation share of {split}, \
         needed more documents (a line `<|endoftext|>` parts those of a text file) or a smaller share"
    )]
    AllHeldOut {
        /// The source.
        name: String,
        /// Its documents.
        documents: u64,
        /// The share.
        split: f64,
    },
    /// A validation share, but no document in it.
    #[error(
        "none of {documents} documents falls into the validation share of {split}, needed more \
         documents (a line `<|endoftext|>` parts those of a text file), a larger share, or 0"
    )]
    NothingHeldOut {
        /// All documents.
        documents: u64,
        /// The share.
        split: f64,
    },
    /// No source, or two of one name, or settings that make no sense.
    #[error("{0}")]
    Settings(String),
    /// The system refused to write, or to read what was written.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A shard that is not as it was written.
    #[error("{}: {reason}; remove its folder to have the source tokenized again", path.display())]
    Shard {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl CorpusError {
    /// For `map_err` of what the system refuses.
    pub(super) fn io(action: &'static str, path: &Path) -> impl Fn(std::io::Error) -> Self {
        move |source| Self::Io { action, path: path.into(), source }
    }
}

impl From<IoFailure> for CorpusError {
    fn from((action, path, source): IoFailure) -> Self {
        Self::Io { action, path, source }
    }
}
