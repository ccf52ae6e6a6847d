//! The decoder: one forward pass for every family, frozen weights, adapters as arguments.
//!
//! A family is a row of properties ([`config::FAMILIES`]); the same code trains, scores and
//! generates. Activations are packed: the rows of a batch are concatenated without padding.

pub mod adapter_files;
pub mod adapters;
pub mod backend;
pub mod cache;
pub mod config;
mod decode_linear;
pub mod decoder;
mod embedding;
pub mod full;
pub mod layer;
mod layers;
mod lm_head;
pub mod load;
pub mod observe;
pub mod pass;
pub mod reading;
pub mod scoring;

pub use adapters::{ActiveAdapter, Adapters};
pub use backend::{Backend, Cpu, Reference};
pub use cache::{CacheType, KvCache};
pub use config::{Config, FAMILIES, RopeScaling};
pub use decoder::Decoder;
pub use full::{FullBuffers, FullModel};
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
