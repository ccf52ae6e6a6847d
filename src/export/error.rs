//! Errors of export.

use std::io;
use std::path::PathBuf;

use crate::eval::EvalError;
use crate::model::ModelError;
use crate::text::TextError;
use crate::weights::WeightsError;

/// Why an export failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The base cannot be read, or a file cannot be written.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The base is not a supported model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer cannot be read or converted.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The system reported an error.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The operation, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The format cannot hold a property of the model.
    #[error("{form} cannot hold this model: {reason}")]
    Inexpressible {
        /// "a config.json", "a GGUF".
        form: &'static str,
        /// The property.
        reason: String,
    },
    /// A tensor that is missing, of another shape, or has values that cannot be written.
    #[error("tensor {name:?}: {reason}")]
    Tensor {
        /// Its name.
        name: String,
        /// What was found and what was needed.
        reason: String,
    },
    /// Requested types that do not suit the model.
    #[error("{0}")]
    Types(String),
    /// The written file differs from the model.
    #[error("{}: {reason}; it was removed", path.display())]
    Differs {
        /// The file or folder.
        path: PathBuf,
        /// The difference.
        reason: String,
    },
    /// A text on which nothing can be measured.
    #[error(transparent)]
    Measure(EvalError),
    /// candle reported an error.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl ExportError {
    pub(super) fn tensor(name: &str, reason: impl Into<String>) -> Self {
        Self::Tensor { name: name.into(), reason: reason.into() }
    }
}
