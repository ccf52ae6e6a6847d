//! The LoRA family over candle tensors, in PEFT's file format.
//!
//! An adapter is a set of low-rank updates, each standing beside one frozen linear layer of some
//! base model: `y = W x + scale · B A x` (LoRA, Hu et al. 2021). This crate holds the updates and
//! the rules of where they stand. It knows no model file, no quantization, no trainer and no
//! command line: a base is a list of [`LinearSpec`]s, and `W` is never seen.
//!
//! From the bottom up:
//!
//! - [`rng`]: random numbers keyed by (seed, purpose, index). Knows nothing of tensors.
//! - [`config`]: PEFT's `adapter_config.json`, and the refusal of what would change the result.
//!   Does not know which modules a base has.
//! - [`targets`]: which modules of a base a config means, with which rank and scale, as PEFT
//!   matches names. Does not know tensors.
//! - [`delta`]: the maths, and an [`Adapter`]: the updates by module. Does not know files.
//! - [`base`]: a base's weight, read by rows, for what is made of it.
//! - [`initialize`]: adapters that begin with numbers of the base's own.
//! - [`combine`]: one adapter made of several.
//! - [`decode`]: an update as decoding reads it. Does not know the kernels that do.
//! - [`format`]: PEFT's folder and its safetensors, in and out.
//! - [`registry`]: named adapters for one base, swapped while others use them. Does not know files.

pub mod base;
pub mod combine;
pub mod config;
pub mod decode;
mod decompose;
pub mod delta;
pub mod format;
pub mod initialize;
pub mod registry;
pub mod rng;
pub mod targets;

pub use base::BaseRows;
pub use config::{ConfigError, InitLoraWeights, LoraConfig, Modules};
pub use delta::{Adapter, Dropout, InitError, Lora, Magnitude, TokenKey, TokenRows};
pub use format::FormatError;
pub use registry::{Registry, RegistryError, RegistryLimits};
pub use targets::{LinearSpec, Resolved, Target, TargetError, Unmatched, resolve};
