//! What can be wrong with a file of rows, one sentence each; wrong rows are told together.

use std::path::{Path, PathBuf};

use super::RowFormat;
use super::cache::Refused;
use crate::text::TextError;

/// Why a file gave no examples.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The file cannot be opened or read.
    #[error("{}: cannot be read: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Some rows are wrong: the first of them, each with its line.
    #[error("{}", sentences(path, first, *wrong, *rows))]
    Rows {
        /// The file.
        path: PathBuf,
        /// Lines, counted from 1, and what is wrong with them.
        first: Vec<(u64, String)>,
        /// All wrong rows.
        wrong: u64,
        /// All rows.
        rows: u64,
    },
    /// A Parquet file that cannot be used.
    #[error("{}: {reason}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What is wrong and what was needed.
        reason: String,
    },
    /// The system refused to write the tokens of a file, or to read what was written.
    #[error("{}: cannot {action}: {source}", path.display())]
    Cache {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Tokens that are not as they were written.
    #[error("{}: {reason}; remove its folder to have the file tokenized again", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The user asked to stop while the rows were read.
    #[error("stopped while the rows were read")]
    Stopped,
    /// Only blank lines, or none.
    #[error("{}: holds no rows, needs one JSON object per line", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// No row has a learned token.
    #[error(
        "{}: nothing to learn in any of {rows} rows ({truncated} of them longer than the \
         {max_length} tokens kept), needs at least one learned token after a row's first",
        path.display()
    )]
    NothingToLearn {
        /// The file.
        path: PathBuf,
        /// Rows read.
        rows: u64,
        /// Rows cut at their end.
        truncated: u64,
        /// Tokens kept of a row.
        max_length: usize,
    },
    /// No row has responses that are compared, or labelled.
    #[error(
        "{}: nothing to compare in any of {rows} rows ({dropped} responses longer than \
         {max_length} tokens with their prompts), needs at least one pair or label",
        path.display()
    )]
    NothingToCompare {
        /// The file.
        path: PathBuf,
        /// Rows read.
        rows: u64,
        /// Responses left out.
        dropped: u64,
        /// Tokens prompt and response may have.
        max_length: usize,
    },
    /// Rows that would teach nothing or teach wrong, unless a flag says that they may.
    #[error(
        "{}: rows that would teach nothing or teach wrong; mend them, or name what may be with \
         --allow{told}",
        path.display()
    )]
    Defects {
        /// The file.
        path: PathBuf,
        /// The rows, a line each, the first few of each check.
        told: String,
    },
    /// The split leaves no row to train on.
    #[error(
        "{}: all {rows} rows fall into the held-out part (rows with one first prompt stay \
         together), needs more prompts or a held-out file of its own",
        path.display()
    )]
    AllHeldOut {
        /// The file.
        path: PathBuf,
        /// Rows read.
        rows: u64,
    },
}

impl From<Refused> for DataError {
    fn from((action, path, source): Refused) -> Self {
        Self::Cache { action, path, source }
    }
}

/// What is wrong with one row.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RowError {
    /// A line too long to be a row.
    #[error(
        "the line is longer than {most} bytes: needs one row a line, long texts in several rows"
    )]
    TooLong {
        /// Bytes a line may have.
        most: usize,
    },
    /// Bytes that are no text.
    #[error("byte {column} of the line is not UTF-8")]
    NotUtf8 {
        /// The byte in the line, counted from 1.
        column: usize,
    },
    /// Text that is no JSON.
    #[error("is not JSON ({problem} at column {column})")]
    Json {
        /// What the parser said.
        problem: String,
        /// Where in the line, counted from 1.
        column: usize,
    },
    /// JSON, but no object.
    #[error("found {found}, a row is a JSON object")]
    NotAnObject {
        /// What it is.
        found: String,
    },
    /// Keys that make none of the known kinds.
    #[error(
        "unknown kind of row: found the keys {}, known are `input_ids` (+ `labels`), `messages` \
         (+ `tools`), `conversations`, `instruction` + `output`, `prompt` + `completion`, and `text`",
        quoted(keys)
    )]
    UnknownKind {
        /// The keys found.
        keys: Vec<String>,
    },
    /// Rows that another command learns from.
    #[error("is a row of {}, which is for {}, not this command", format.name(), format.learned_by())]
    OfOthers {
        /// What kind of row it is.
        format: RowFormat,
    },
    /// A role that is none.
    #[error("`{key}` is {found}, needs one of {known}")]
    Role {
        /// The path of the value in the row.
        key: String,
        /// What is there.
        found: String,
        /// Those there are.
        known: String,
    },
    /// Keys that do not make what is asked for.
    #[error("unknown kind of row: found the keys {}, needs {needed}", quoted(keys))]
    OtherKind {
        /// The keys found.
        keys: Vec<String>,
        /// What is asked for.
        needed: &'static str,
    },
    /// A text that is nothing.
    #[error("`{key}` has no tokens, needs at least one")]
    NoTokens {
        /// The path of the value in the row.
        key: String,
    },
    /// More than may stand before a response.
    #[error(
        "the prompt has {found} tokens, needs at most {most}: max_length or the model's window has to \
         hold the response too"
    )]
    PromptTooLong {
        /// Tokens it has.
        found: usize,
        /// Tokens it may have.
        most: usize,
    },
    /// A value of the wrong shape.
    #[error("`{key}` is {found}, needs {needed}")]
    Value {
        /// The path of the value in the row.
        key: String,
        /// What is there.
        found: String,
        /// What should be.
        needed: &'static str,
    },
    /// Two lists that should be as long as each other.
    #[error("`labels` has {labels} entries for {input_ids} `input_ids`")]
    LabelCount {
        /// Entries of `labels`.
        labels: usize,
        /// Entries of `input_ids`.
        input_ids: usize,
    },
    /// A token id the tokenizer does not have.
    #[error("`input_ids[{index}]` is {token}, the vocabulary has {vocab_size} tokens")]
    OutOfVocabulary {
        /// Its place in `input_ids`.
        index: usize,
        /// The id.
        token: u32,
        /// Tokens of the vocabulary.
        vocab_size: usize,
    },
    /// More than Alpaca's prompt has words for.
    #[error("`system` and `history` have no place in Alpaca's prompt text: needs a chat template")]
    AlpacaTurns,
    /// Messages, but nothing to render them with.
    #[error("a row of messages needs a chat template, the tokenizer has none")]
    NoTemplate,
    /// A template from which the assistant's words cannot be told.
    #[error(
        "the chat template rewrites what precedes `{message}` when it is added, so what the \
         assistant said cannot be told from its text: needs a template that keeps its prefix or \
         marks the assistant's words with {{% generation %}}"
    )]
    PrefixNotKept {
        /// The path of the assistant's message.
        message: String,
    },
    /// A first message whose beginning is not to be found.
    #[error(
        "`messages[0]` is the assistant's, and where its words begin cannot be told from the chat \
         template: needs a system or user message before it, or a template that marks the \
         assistant's words with {{% generation %}}"
    )]
    BeginsWithAssistant,
    /// `{% generation %}` blocks that are no messages.
    #[error(
        "the chat template marks {spans} {{% generation %}} parts for {messages} assistant \
         messages, so those with `train: false` cannot be told apart"
    )]
    SpanCount {
        /// Marked parts.
        spans: usize,
        /// Messages of the assistant.
        messages: usize,
    },
    /// The tokenizer or the template refused.
    #[error(transparent)]
    Text(#[from] TextError),
}

/// One wrong row is a sentence of its own; several stand under each other, as compilers tell them.
fn sentences(path: &Path, first: &[(u64, String)], wrong: u64, rows: u64) -> String {
    let path = path.display();
    if let (1, [(line, problem)]) = (wrong, first) {
        return format!("{path}:{line}: {problem}");
    }
    let told = first.iter().map(|(line, problem)| format!("\n  {path}:{line}: {problem}"));
    let more = match wrong - first.len() as u64 {
        0 => String::new(),
        more => format!("\n  and {more} more"),
    };
    format!("{path}: {wrong} of {rows} rows are wrong{}{more}", told.collect::<String>())
}

/// Keys in backquotes; of a row that is no row, the first few.
fn quoted(keys: &[String]) -> String {
    const MOST: usize = 8;
    const CHARS: usize = 40;
    let short = |key: &String| match key.char_indices().nth(CHARS) {
        Some((end, _)) => format!("`{}...`", &key[..end]),
        None => format!("`{key}`"),
    };
    let shown = keys.iter().take(MOST).map(short).collect::<Vec<_>>().join(", ");
    match keys.len() {
        0 => "(none)".into(),
        count if count > MOST => format!("{shown} and {} more", count - MOST),
        _ => shown,
    }
}
