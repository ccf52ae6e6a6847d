//! Readers of GGUF and safetensors files as named, memory-mapped tensors, and writers.
//!
//! A tensor is a range of its file's map: opening copies nothing, and quantized tensors are never copied.
//! The meaning of names, and which tensors a model needs, is known to `model` only.
//!
//! Files are untrusted: every count is checked against the remaining bytes before anything is allocated,
//! and an invalid file is an error of one sentence.

mod atomic;
mod checkpoint;
mod error;
pub mod gguf;
mod inspect;
mod lock;
mod safetensors;
mod value;
mod write;

pub use atomic::write_atomically;
pub use checkpoint::{Checkpoint, StoredTensor};
pub use error::WeightsError;
pub use gguf::Gguf;
pub(crate) use inspect::without_panic;
pub use inspect::{Inspection, InspectionSummary, MetadataLine, TensorLine, TypeTotal, inspect};
pub use lock::{Lock, LockError};
pub use safetensors::{HfFolder, Safetensors, SafetensorsInfo};
pub use value::{GgufArray, GgufValue, OwnedValue, ValueType};
pub use write::{NewTensor, TensorPlan, stream_gguf, stream_safetensors, write_gguf};

use std::fs::File;
#[cfg(unix)]
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::quant::{Bytes, Owner};

/// Maps a regular file.
pub(crate) fn map_file(path: &Path) -> Result<Bytes, WeightsError> {
    let io = |source| WeightsError::Io { action: "open", path: path.into(), source };
    let file = File::open(path).map_err(io)?;
    let about = file.metadata().map_err(io)?;
    if !about.is_file() {
        return Err(WeightsError::format(path, "not a regular file"));
    }
    if about.len() == 0 {
        return Err(WeightsError::format(path, "the file is empty"));
    }
    // SAFETY: the map is private and read-only. Whether another process truncates the file while it is mapped
    // cannot be checked, as in every program that maps model files; our own writers replace files by renaming,
    // which does not change the mapped file.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
    Ok(Bytes::new(Arc::new(Mapped(map))))
}

/// The map of a file, read only.
struct Mapped(memmap2::Mmap);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Owner for Mapped {
    #[cfg(unix)]
    fn forget(&self, range: Range<usize>) {
        // SAFETY: nothing is ever written to the map, so that evicted pages are read again from the file
        // with the same content.
        let advised = unsafe {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            self.0.unchecked_advise_range(advice, range.start, range.len())
        };
        drop(advised); // on failure the pages stay in memory
    }
}
