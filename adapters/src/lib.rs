//! The LoRA family over candle tensors, in PEFT's file format.
//!
//! An adapter is a set of low-rank updates, each added to one frozen linear layer of some base
//! model: `y = W x + scale · B A x` (LoRA, Hu et al. 2021). This crate holds the updates and
//! the rules of which layers get one. It knows no model file, no quantization, no trainer and no
//! command line: a base is a list of [`LinearSpec`]s. Where the weight `W` itself is needed (DoRA's
//! norms, PiSSA, OLoRA, LoftQ), it is read a few rows at a time through [`BaseRows`].
//!
//! Modules, lowest layer first:
//!
//! - [`rng`]: random numbers keyed by (seed, purpose, index). Knows nothing of tensors.
//! - [`config`]: PEFT's `adapter_config.json`; keys that would change the result are errors. Does not
//!   know which modules a base has.
//! - [`targets`]: which modules of a base a config targets, with which rank and scale, as PEFT
//!   matches names. Does not know tensors.
//! - [`base`]: a base's weight, read by rows.
//! - [`decode`]: an update in the layout that decode kernels read. Does not know these kernels.
//! - [`delta`]: the maths, and an [`Adapter`]: the updates by module. Does not know files.
//! - `validate`: whether an adapter's tensors fit a base and are finite ([`Adapter::mismatches`]).
//! - [`initialize`]: adapters initialized from the base's weights.
//! - [`combine`]: several adapters merged into one.
//! - [`mod@format`]: PEFT's folder and its safetensors, read and written.
//! - [`registry`]: named adapters for one base, swapped while others use them. Does not know files.

#![warn(unreachable_pub)]

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
mod validate;

pub use base::BaseRows;
pub use config::{ConfigError, InitLoraWeights, LoraConfig, Modules};
pub use delta::{Adapter, Dropout, InitError, Lora, Magnitude, TokenKey, TokenRows};
pub use format::FormatError;
pub use registry::{Registry, RegistryError, RegistryLimits};
pub use targets::{LinearSpec, Resolved, Target, TargetError, Unmatched, resolve};
