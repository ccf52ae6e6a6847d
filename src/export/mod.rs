//! Export of models and adapters: merged, quantized, and written in the formats of other programs.
//!
//! An [`ExportSource`] is a list of tensors that are read a few rows at a time: those of a checkpoint with
//! adapters merged into them, or those a training run has in memory. Writers process one tensor after the
//! other, so that memory holds a chunk of one tensor and never a whole model. Written files are opened
//! again and compared with the source ([`verify()`]). A folder becomes the same GGUF as by llama.cpp's
//! converter, and a GGUF becomes a folder; properties that the target format cannot hold are errors.

mod chunk;
mod config;
mod error;
mod folder;
mod gguf;
pub mod imatrix;
pub mod lora;
pub(crate) mod modelfile;
pub mod quality_report;
mod source;
pub mod types;
pub(crate) mod verify;

pub(crate) use config::expressible;
pub use error::ExportError;
pub use folder::write_folder;
pub use gguf::write_gguf;
pub use source::{ExportSource, ExportTensor};
pub use types::{FileType, Recipe};
pub use verify::{Distance, Verified, VerifyBounds, verify};
pub(crate) use verify::{load_with_added_tokens, verify_with_added_tokens};

use crate::quant::BlockType;

/// An importance matrix.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Importance {
    /// By llama.cpp's tensor names: the mean square of each input of a linear layer `(in)` over a text.
    pub columns: std::collections::HashMap<String, Vec<f32>>,
    /// The file it was read from.
    pub file: Option<String>,
    /// The text it was measured on.
    pub dataset: Option<String>,
    /// Chunks of that text.
    pub chunks: Option<u32>,
}

/// A tensor of a written file.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct WrittenTensor {
    /// Its name in the file.
    pub name: String,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    /// Its block type.
    #[serde(serialize_with = "as_text")]
    pub block_type: BlockType,
    /// Relative quantization error `|W - Q| / |W|`, with Frobenius norms.
    pub relative_error: f64,
}

fn as_text<S: serde::Serializer>(of: &BlockType, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(of)
}

/// Result of writing a model or an adapter.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Written {
    /// Bytes of all weight files.
    pub bytes: u64,
    /// Its tensors, in the order of the file.
    pub tensors: Vec<WrittenTensor>,
}
