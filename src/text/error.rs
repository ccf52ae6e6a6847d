//! Errors of tokenizers and chat templates.

use std::path::{Path, PathBuf};

use crate::weights::WeightsError;

/// Why text could not be read, tokenized or rendered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// The GGUF's metadata could not be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The system reported an error.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file without a supported tokenizer or template.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what was needed.
        reason: String,
    },
    /// Text that could not be tokenized, or ids that could not be decoded.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A chat template that does not parse, or rejects a conversation.
    #[error("chat template, line {line}: {reason}")]
    Template {
        /// The template's line, counted from 1; 0 if no line is at fault.
        line: usize,
        /// The error; the template's message if it raised one.
        reason: String,
    },
}

impl TextError {
    pub(super) fn format(path: &Path, reason: impl Into<String>) -> Self {
        Self::Format { path: path.into(), reason: reason.into() }
    }
}
