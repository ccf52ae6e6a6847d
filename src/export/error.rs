//! Why something could not be exported.

use std::io;
use std::path::PathBuf;

use crate::eval::EvalError;
use crate::model::ModelError;
use crate::text::TextError;
use crate::weights::WeightsError;

/// Why something could not be exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The base cannot be read, or the system does not let us write.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The base is no model we know.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Its tokenizer has no such form.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The form cannot say what the model is.
    #[error("{form} cannot hold this model: {reason}")]
    Inexpressible {
        /// "a config.json", "a GGUF".
        form: &'static str,
        /// What it cannot say.
        reason: String,
    },
    /// A tensor that is missing, of another shape, or has values that cannot be written.
    #[error("tensor {name:?}: {reason}")]
    Tensor {
        /// Its name.
        name: String,
        /// What is wrong and what was needed.
        reason: String,
    },
    /// Types asked for that do not fit.
    #[error("{0}")]
    Types(String),
    /// What was written is not the model.
    #[error("{}: {reason}; it was removed", path.display())]
    Differs {
        /// The file or folder.
        path: PathBuf,
        /// How far it is off.
        reason: String,
    },
    /// A text that nothing can be measured on.
    #[error(transparent)]
    Measure(EvalError),
    /// candle refused.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl ExportError {
    pub(super) fn tensor(name: &str, reason: impl Into<String>) -> Self {
        Self::Tensor { name: name.into(), reason: reason.into() }
    }
}
