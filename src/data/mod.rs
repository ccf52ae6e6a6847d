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
mod comparison;
pub mod corpus;
mod dataset;
mod error;
mod example;
mod lines;
mod prompts;
mod rows;
mod split;

pub use batch::{Batch, EpochPlan, EpochSettings};
pub use comparison::{
    Comparison, ComparisonKind, ComparisonReport, ComparisonSplit, Comparisons, Limits, Pair,
    WhenTooLong,
};
pub use dataset::{DataReport, Dataset, Split};
pub use error::{DataError, RowError};
pub use example::Example;
pub use prompts::{Prompt, PromptSplit, Prompts};
pub use rows::{Message, Row};
pub use split::is_held_out;
