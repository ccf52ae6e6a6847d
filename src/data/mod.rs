//! Rows to tokens, loss masks and batches.
//!
//! A file, JSONL or Parquet, is read line by line ([`Row`], of one [`RowFormat`] a file), and each row
//! becomes tokens: an [`Example`], of which some are learned, a [`Comparison`] of responses, or a
//! [`Prompt`] to be answered. What would teach nothing or teach wrong is found on the way ([`checks`]).
//! Rows lie on [`RowStore`], in memory, or of a large file on disk, made once.
//! Several files with weights are a mixture ([`epoch_examples`]). An epoch is an order of bins of
//! rows ([`EpochPlan`]) that a step lays end to end ([`Batch`]); nothing is padded. What comes
//! out depends on the files, the tokenizer, the settings, the seed and the epoch alone, so (epoch, step)
//! is the whole cursor of a run. What a model is pretrained on is too large to be held: [`corpus`] keeps
//! it on disk.
//!
//! This room does not know that there is a model, but for two numbers that limit rows
//! ([`ModelLimits`]).

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
mod row_store;
mod rows;
mod split;

pub use batch::{Batch, EpochPlan, EpochSettings};
pub use comparison::{
    Comparison, ComparisonKind, ComparisonReport, ComparisonSettings, ComparisonSplit, Comparisons,
    LengthLimits, PreferencePair, WhenTooLong,
};
pub use dataset::{DataReport, Dataset, LoadSettings, ModelLimits, Split};
pub use error::{DataError, RowError};
pub use example::Example;
pub use lines::first_row_format;
pub use mixture::{DataFile, epoch_examples};
pub use prompts::{Prompt, PromptReport, PromptSettings, PromptSplit, Prompts};
pub use reading::{Cache, FileRows, FileSplit};
pub use row_store::{Examples, Record, RowLocation, RowStore};
pub use rows::{AlpacaPrompt, Message, Row, RowFormat};
pub use split::is_held_out;
