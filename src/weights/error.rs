//! Errors of reading and writing weights.

use std::path::{Path, PathBuf};

use crate::quant::MatrixError;

/// Why weights could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The system reported an error.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The operation, as a verb: "open", "write".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file is malformed or of an unsupported format.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file or folder.
        path: PathBuf,
        /// What was found and what was needed.
        reason: String,
    },
    /// A required metadata key is missing.
    #[error("{}: no metadata key {key:?}", path.display())]
    MissingKey {
        /// The GGUF file.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// A metadata value of another type.
    #[error("{}: metadata key {key:?} is {found}, needed {needed}", path.display())]
    KeyType {
        /// The GGUF file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Type and value found.
        found: String,
        /// The type needed.
        needed: &'static str,
    },
    /// No tensor of that name.
    #[error("{}: no tensor {name:?}", path.display())]
    MissingTensor {
        /// The file or folder.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor of a type that is not supported.
    #[error(
        "{}: tensor {name:?} is stored as {found}, needed one of {needed}",
        path.display()
    )]
    TensorType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its type.
        found: String,
        /// The types that can be read.
        needed: String,
    },
    /// A tensor with the wrong number of dimensions.
    #[error("tensor {name:?} has shape {found:?}, needed {needed} dimensions")]
    Dimensions {
        /// The tensor.
        name: String,
        /// Its shape, outermost first.
        found: Vec<usize>,
        /// Dimensions needed.
        needed: usize,
    },
    /// A tensor whose rows cannot be read as a matrix.
    #[error("tensor {name:?}: {source}")]
    Matrix {
        /// The tensor.
        name: String,
        /// What is wrong.
        source: MatrixError,
    },
}

impl WeightsError {
    pub(super) fn format(path: &Path, reason: impl Into<String>) -> Self {
        Self::Format { path: path.into(), reason: reason.into() }
    }
}

/// One error of all faults of a file; `Ok` if there are none.
pub(super) fn all_of(path: &Path, faults: &[String]) -> Result<(), WeightsError> {
    const SHOWN: usize = 8;
    if faults.is_empty() {
        return Ok(());
    }
    let mut reason = faults[..faults.len().min(SHOWN)].join("; ");
    if faults.len() > SHOWN {
        reason += &format!("; and {} more", faults.len() - SHOWN);
    }
    Err(WeightsError::format(path, reason))
}
