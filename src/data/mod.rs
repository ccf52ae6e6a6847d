//! Rows to tokens, loss masks and batches.
//!
//! A file is read line by line ([`Row`]), each row becomes tokens of which some are learned
//! ([`Example`]), and an epoch is an order of bins of examples ([`EpochPlan`]) that a step lays end
//! to end ([`Batch`]). Nothing is padded. Rows of preference and reinforcement learning are
//! [`Comparisons`] of responses and [`Prompts`]. What comes out depends on the file, the tokenizer, the
//! settings, the seed and the epoch alone, so (epoch, step) is the whole cursor of a run. What a model
//! is pretrained on is too large to be held: [`corpus`] keeps it on disk.
//!
//! This room does not know that there is a model.

mod batch;
mod cache;
mod comparison;
pub mod corpus;
mod dataset;
pub mod doctor;
mod error;
mod example;
mod examples;
mod lines;
mod mixture;
mod parquet;
mod prompts;
mod rows;
mod split;

pub use batch::{Batch, EpochPlan, EpochSettings};
pub use comparison::{
    Comparison, ComparisonKind, ComparisonReport, ComparisonSettings, ComparisonSplit, Comparisons,
    Limits, Pair, WhenTooLong,
};
pub use dataset::{Cache, DataReport, Dataset, LoadSettings, ModelLimits, Split};
pub use error::{DataError, RowError};
pub use example::Example;
pub use examples::Examples;
pub use lines::first_dialect;
pub use mixture::{DataFile, epoch_examples};
pub use prompts::{Prompt, PromptSettings, PromptSplit, Prompts};
pub use rows::{AlpacaPrompt, Dialect, Message, Row};
pub use split::is_held_out;
