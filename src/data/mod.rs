//! Rows to tokens, loss masks and batches.
//!
//! A JSONL or Parquet file is read line by line ([`Row`], of one [`RowFormat`] per file), and each row is
//! tokenized: into an [`Example`] with a loss mask, a [`Comparison`] of responses, or a [`Prompt`] for
//! reinforcement learning. Rows that would teach nothing or the wrong thing are found while reading
//! ([`checks`]). Tokenized rows are held in a [`RowStore`]: in memory, or memory-mapped from a cache on
//! disk if the file is large. Several files with weights form a mixture (`epoch_examples`). An epoch is
//! a sequence of bins of rows ([`EpochPlan`]); the rows of a micro-batch are concatenated without padding
//! ([`Batch`]). The result depends only on the files, the tokenizer, the settings, the seed and the epoch,
//! so (epoch, step) is the complete data cursor of a run. Pretraining data does not fit into memory:
//! [`corpus`] keeps it on disk.
//!
//! This module does not know the model, except for two numbers that limit rows ([`ModelLimits`]).

mod batch;
mod cache;
pub mod checks;
mod comparison;
pub mod corpus;
mod dataset;
mod error;
mod example;
mod lines;
mod mixture;
mod parquet;
mod prompts;
mod reading;
mod row_format;
mod row_store;
mod rows;
mod split;

pub use batch::{Batch, EpochPlan, EpochSettings};
pub use comparison::{
    Comparison, ComparisonReport, ComparisonSettings, ComparisonSplit, Comparisons, LengthLimits,
    WhenTooLong,
};
pub use dataset::{DataReport, Dataset, LoadSettings, ModelLimits, Split};
pub use error::{DataError, RowError};
pub use example::Example;
pub(crate) use lines::first_row_format;
pub use mixture::DataFile;
pub(crate) use mixture::epoch_examples;
pub use prompts::{Prompt, PromptReport, PromptSettings, PromptSplit, Prompts};
pub use reading::{Cache, FileRows, FileSplit};
pub use row_format::RowFormat;
pub use row_store::{Examples, Record, RowLocation, RowStore};
pub use rows::{AlpacaPrompt, ComparisonKind, Message, PreferencePair, Row};
pub use split::is_held_out;
