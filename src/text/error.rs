//! What can be wrong with tokenizers, templates and what they are given.

use std::path::{Path, PathBuf};

use crate::weights::WeightsError;

/// Why text could not be read, tokenized or rendered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// The GGUF's metadata could not be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The system refused.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that holds no tokenizer or template we can use.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what was needed.
        reason: String,
    },
    /// Text that could not be tokenized, or ids that are no text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A chat template that does not parse, or refuses a conversation.
    #[error("chat template, line {line}: {reason}")]
    Template {
        /// The template's line, counted from 1; 0 if no line is at fault.
        line: usize,
        /// What is wrong, in the template's own words if it has any.
        reason: String,
    },
}

impl TextError {
    pub(super) fn format(path: &Path, reason: impl Into<String>) -> Self {
        Self::Format { path: path.into(), reason: reason.into() }
    }
}
