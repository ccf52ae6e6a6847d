//! Quantune fine-tunes language models with LoRA straight on the quantized weights people already
//! run, and takes a model through its whole life on one consumer machine.
//!
//! The base is immutable and adapters are arguments: one memory-mapped, frozen set of weights is
//! shared by everything, and a forward pass is told which adapters each row of the batch wears.
//! There is one decoder (a model family is a row of properties), one training loop (an objective
//! is a pure function of what the head reads), and every operation exists twice: a *portable* form
//! in ordinary differentiable candle ops that defines the answer, and a *fast* CPU form that a
//! parity test holds to it, gradients included. A layer as a whole is such an operation: its fast
//! form is written out, forward and backward, over plain buffers. All randomness is keyed by
//! (seed, purpose, index), so that a killed run resumes to the same bytes. Where there is no base yet,
//! [`train::pretrain`] makes one: the one thing here whose own weights train, and what comes out is a
//! base as any other.
//!
//! # Rooms, bottom to top
//!
//! A room uses the rooms above it in this list, never those below; a test reads the sources and
//! holds them to it. The LoRA maths and PEFT's files are the crate [`quantune_adapters`], which
//! knows no model file, no trainer, no quantization and no command line.
//!
//! - [`isa`]: which instructions the CPU has. Does not know what is computed.
//! - [`monitor`]: what long work reports to its caller, and the flag that stops it. Does not know who
//!   listens.
//! - [`string_enum`]: enums whose values have names. Does not know what the values mean.
//! - [`quant`]: GGML block types over a range of bytes. Does not know where the bytes come from.
//! - [`ops`]: differentiable operations, a file each. Do not know that there is a model.
//! - [`weights`]: GGUF and safetensors files to named tensors. Does not know what a name means.
//! - [`text`]: tokenizer and chat template. Does not know what is learned.
//! - [`data`]: rows to tokens, loss masks and batches, and what is wrong with them; mixtures of texts to
//!   shards and rows. Does not know that there is a model.
//! - [`model`]: the decoder, its config, KV cache and loading; the same decoder with weights that all
//!   train. Does not know about objectives.
//! - [`generate`]: sampling and decoding. Does not know about training.
//! - [`optim`]: AdamW, schedules, clipping. Does not know where gradients come from.
//! - [`objectives`]: losses, pure functions of log-probs and scores. Do not know about models or data.
//! - [`rollout`]: prompts to responses to rewards to advantages. Does not know how the policy changes.
//! - [`eval`]: loss, perplexity, diversity. Does not know about training.
//! - [`export`]: models and adapters in the forms others read. Does not know about training.
//! - [`train`]: the loop, run directory, checkpoints, metrics. Does not know the command line.
//! - [`cli`]: flags, printing, exit codes. Nothing knows it.

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
