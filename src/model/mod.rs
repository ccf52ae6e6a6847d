//! The decoder: one forward pass for every family, frozen weights, adapters as arguments.
//!
//! A family is a row of properties ([`config::FAMILIES`]); the same code trains, scores and
//! generates. Activations are flat: the rows of a batch lie end to end and nothing is padded.
//!
//! The files, lowest first; a file uses those before it in this list, never those after it:
//!
//! - [`config`], the properties of a model.
//! - [`adapters`], [`gradients`], [`observe`], [`pass`]: what a pass is made with; `layers`: weights.
//! - [`cache`]: keys and values; `decode_linear`: linear layers of a decode step.
//! - [`layer`]: the units of a layer, forward and backward; `embedding` and `lm_head` beside it.
//! - [`decoder`]: a decoder over frozen weights; [`reading`]: its head on the CPU; [`load`];
//!   [`full`]: a model whose weights all train.
//! - [`backend`]: the trait of what computes them, and its implementations.
//! - [`kv_cache`], `inference`, `device`, `memory`, [`scoring`]: passes by whichever backend a model is for.
//! - [`adapter_files`]: adapters in files, for a decoder.

pub mod adapter_files;
pub mod adapters;
pub mod backend;
pub mod cache;
pub mod config;
mod decode_linear;
pub mod decoder;
mod device;
mod embedding;
pub mod full;
pub mod gradients;
mod inference;
pub mod kv_cache;
pub mod layer;
mod layers;
mod lm_head;
pub mod load;
mod memory;
pub mod observe;
pub mod pass;
pub mod reading;
pub mod scoring;

pub use adapters::{ActiveAdapter, Adapters};
pub use backend::{Backend, Cpu, Reference};
pub use cache::CacheType;
pub use config::{Config, FAMILIES, RopeScaling};
pub use decoder::Decoder;
pub use full::{FullBuffers, FullModel};
pub use gradients::GradientBuffers;
pub use kv_cache::KvCache;
pub use layers::LinearGroup;
pub use lm_head::Logits;
pub use pass::{Pass, Rows};
pub use reading::Reading;

use crate::weights::WeightsError;

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The weights file.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Properties of the model are missing, contradictory or not supported.
    #[error("{path}: {reason}")]
    Config {
        /// The file or folder.
        path: String,
        /// All errors.
        reason: String,
    },
    /// All tensors that are missing or have another shape.
    #[error("{path}: {reason}")]
    Tensors {
        /// The file or folder.
        path: String,
        /// All errors.
        reason: String,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}
