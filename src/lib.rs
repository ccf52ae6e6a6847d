//! Quantune fine-tunes language models with LoRA directly on quantized weights (GGUF), and covers the
//! steps around it on one consumer machine: pretraining, reward models, preference optimization,
//! reinforcement learning, evaluation, generation, merging and export.
//!
//! - *The base is immutable, adapters are arguments.* One memory-mapped, frozen set of weights is shared
//!   by everything; a forward pass takes the adapters that are active on each row of the batch.
//! - *One decoder.* A model family is a row of properties (`model/config/family.rs`), not code.
//! - *One training loop.* An objective is a pure function of log-probs, scores or values.
//! - *One definition of the answer.* The reference backend, in ordinary differentiable candle operations,
//!   defines every result; the CPU backend, with a hand-written forward and backward pass, is tested
//!   against it, gradients included.
//! - *Reproducible.* All randomness is keyed by (seed, purpose, index): a killed run resumes to the same
//!   bytes.
//!
//! # A run
//!
//! ```no_run
//! use quantune::monitor::Monitor;
//! use quantune::train::{Command, Outcome, RunSettings, train};
//!
//! let mut settings = RunSettings::new(Command::Sft);
//! settings.common.base = "base.gguf".into();
//! settings.common.data = vec!["chats.jsonl".into()];
//! settings.common.out = "runs/first".into();
//! if let Outcome::Done(summary) = train(&settings, false, Monitor::silent())? {
//!     println!("{}", summary.adapter.display());
//! }
//! # Ok::<(), quantune::train::TrainError>(())
//! ```
//!
//! `examples/` has more: loading, generating, swapping and merging adapters. Without the default feature
//! `cli` the library depends on no crate of the command line.
//!
//! # Rooms, lowest first
//!
//! A room (a top-level module) uses the rooms before it in this list, never those after it;
//! `tests/integration/rooms.rs` checks this, and that only `cli` prints. LoRA itself and PEFT's file
//! formats are the crate [`quantune_adapters`], which knows no model file, trainer or quantization.
//!
//! - [`isa`]: the instruction sets of the CPU.
//! - [`monitor`]: progress events and warnings for the caller, and the stop flag.
//! - [`string_enum`]: enums whose values have names. Does not know what the values mean.
//! - [`quant`]: GGML block types over a range of bytes. Does not know where the bytes come from.
//! - [`ops`]: differentiable operations, a file each. Do not know that there is a model.
//! - [`weights`]: GGUF and safetensors files to named tensors. Does not know what a name means.
//! - [`text`]: tokenizer and chat template. Does not know what is learned.
//! - [`data`]: rows to tokens, loss masks and batches, and checks of them; mixtures of texts to shards
//!   and rows. Does not know that there is a model.
//! - [`optim`]: AdamW, schedules, clipping. Does not know where gradients come from.
//! - [`model`]: the decoder, its config, KV cache and loading; full training of all its weights. Does not
//!   know about objectives.
//! - [`generate`]: sampling and continuous batching. Does not know about training.
//! - [`objectives`]: losses, pure functions of log-probs and scores. Do not know about models or data.
//! - [`rollout`]: prompts to responses to rewards to advantages. Does not know how the policy is trained.
//! - [`eval`]: loss, perplexity, diversity. Does not know about training.
//! - [`export`]: models and adapters in the file formats of other programs. Does not know about training.
//! - [`train`]: settings, the training loop, run directory, checkpoints, metrics. Does not know the
//!   command line.
//! - [`cli`]: flags, printing, exit codes. No other room uses it.

#![warn(unreachable_pub)]
// Some of what is not public only serves the command line.
#![cfg_attr(not(feature = "cli"), allow(dead_code, unused_imports))]

#[cfg(feature = "cli")]
pub mod cli;
pub mod data;
pub mod eval;
pub mod export;
pub mod generate;
pub mod isa;
pub mod model;
pub mod monitor;
pub mod objectives;
pub mod ops;
pub mod optim;
pub mod quant;
pub mod rollout;
pub mod string_enum;
pub mod text;
pub mod train;
pub mod weights;
