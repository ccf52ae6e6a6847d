//! Errors of data files, one sentence each. All invalid rows of a file are reported together.

use std::path::{Path, PathBuf};

use super::RowFormat;
use crate::text::TextError;

/// A failed file operation: the action, the path and the system error.
pub(super) type IoFailure = (&'static str, PathBuf, std::io::Error);

/// Why a data file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The file cannot be opened or read.
    #[error("{}: cannot be read: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system error.
        source: std::io::Error,
    },
    /// Some rows are invalid; the first of them are listed with their lines.
    #[error("{}", sentences(path, first, *wrong, *rows))]
    Rows {
        /// The file.
        path: PathBuf,
        /// Lines, counted from 1, and what is wrong with them.
        first: Vec<(u64, String)>,
        /// Number of invalid rows.
        wrong: u64,
        /// Number of rows.
        rows: u64,
    },
    /// A Parquet file that cannot be read.
    #[error("{}: {reason}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what is needed.
        reason: String,
    },
    /// The tokens of a file cannot be written to the cache, or read from it.
    #[error("{}: cannot {action}: {source}", path.display())]
    Cache {
        /// The failed action.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system error.
        source: std::io::Error,
    },
    /// Cached tokens that do not match their checksum or header.
    #[error("{}: {reason}; remove its folder to have the file tokenized again", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The user interrupted the reading of rows.
    #[error("stopped while the rows were read")]
    Stopped,
    /// The file has no lines, or only blank ones.
    #[error("{}: contains no rows, needs one JSON object per line", path.display())]
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
        /// Rows truncated at their end.
        truncated: u64,
        /// Maximum number of tokens of a row.
        max_length: usize,
    },
    /// No row has a preference pair or a label.
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
        /// Responses dropped because they are too long.
        dropped: u64,
        /// Maximum number of tokens of prompt and response.
        max_length: usize,
    },
    /// Rows that fail checks which are errors and not allowed.
    #[error(
        "{}: rows that would teach nothing or the wrong thing; fix them, or ignore these checks with \
         --allow{defects}",
        path.display()
    )]
    Defects {
        /// The file.
        path: PathBuf,
        /// The rows, one line each, the first few of each check.
        defects: String,
    },
    /// The split leaves no row to train on.
    #[error(
        "{}: all {rows} rows fall into the held-out part (rows with the same first prompt stay \
         together), needs more prompts or a separate held-out file",
        path.display()
    )]
    AllHeldOut {
        /// The file.
        path: PathBuf,
        /// Rows read.
        rows: u64,
    },
}

impl From<IoFailure> for DataError {
    fn from((action, path, source): IoFailure) -> Self {
        Self::Cache { action, path, source }
    }
}

/// Why a row is invalid.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RowError {
    /// A line longer than the limit.
    #[error(
        "the line is longer than {most} bytes: needs one row per line, and long texts split into \
         several rows"
    )]
    TooLong {
        /// Maximum number of bytes of a line.
        most: usize,
    },
    /// Bytes that are not UTF-8.
    #[error("byte {column} of the line is not UTF-8")]
    NotUtf8 {
        /// The byte in the line, counted from 1.
        column: usize,
    },
    /// Text that is not JSON.
    #[error("is not JSON ({problem} at column {column})")]
    Json {
        /// The parser's message.
        problem: String,
        /// Column in the line, counted from 1.
        column: usize,
    },
    /// JSON, but not an object.
    #[error("found {found}, needs a JSON object")]
    NotAnObject {
        /// The value found.
        found: String,
    },
    /// Keys that match none of the known row formats.
    #[error(
        "unknown kind of row: found the keys {}, known are `input_ids` (+ `labels`), `messages` \
         (+ `tools`), `conversations`, `instruction` + `output`, `prompt` + `completion`, and `text`",
        quoted(keys)
    )]
    UnknownKind {
        /// The keys found.
        keys: Vec<String>,
    },
    /// A row in a format of another command.
    #[error("is a row of {}, which is data for {}, not this command", format.name(), format.learned_by())]
    OfOthers {
        /// The row format.
        format: RowFormat,
    },
    /// An unknown role.
    #[error("`{key}` is {found}, needs one of {known}")]
    Role {
        /// The path of the value in the row.
        key: String,
        /// The value found.
        found: String,
        /// The known roles.
        known: String,
    },
    /// Keys that do not match the requested kind of row.
    #[error("unknown kind of row: found the keys {}, needs {needed}", quoted(keys))]
    OtherKind {
        /// The keys found.
        keys: Vec<String>,
        /// The keys needed.
        needed: &'static str,
    },
    /// A text without tokens.
    #[error("`{key}` has no tokens, needs at least one")]
    NoTokens {
        /// The path of the value in the row.
        key: String,
    },
    /// A prompt that leaves no room for a response.
    #[error(
        "the prompt has {found} tokens, needs at most {most}: the response has to fit into max_length \
         and the model's context window too"
    )]
    PromptTooLong {
        /// Number of tokens.
        found: usize,
        /// Maximum number of tokens.
        most: usize,
    },
    /// A value of the wrong type or shape.
    #[error("`{key}` is {found}, needs {needed}")]
    Value {
        /// The path of the value in the row.
        key: String,
        /// The value found.
        found: String,
        /// The value needed.
        needed: &'static str,
    },
    /// Two lists that must have the same length.
    #[error("`labels` has {labels} entries for {input_ids} `input_ids`")]
    LabelCount {
        /// Entries of `labels`.
        labels: usize,
        /// Entries of `input_ids`.
        input_ids: usize,
    },
    /// A token id outside the vocabulary.
    #[error("`input_ids[{index}]` is {token}, the vocabulary has {vocab_size} tokens")]
    OutOfVocabulary {
        /// Its index in `input_ids`.
        index: usize,
        /// The token id.
        token: u32,
        /// Number of tokens of the vocabulary.
        vocab_size: usize,
    },
    /// An Alpaca row with a system message or history, and no chat template.
    #[error("Alpaca's prompt text does not support `system` and `history`: needs a chat template")]
    AlpacaTurns,
    /// A row of messages, and no chat template.
    #[error("a row of messages needs a chat template, the tokenizer has none")]
    NoTemplate,
    /// A chat template that does not preserve prefixes, so that assistant tokens cannot be located.
    #[error(
        "the chat template rewrites the text before `{message}` when that message is added, so the \
         assistant's tokens cannot be located: needs a template that preserves prefixes or marks \
         assistant messages with {{% generation %}}"
    )]
    PrefixNotKept {
        /// The path of the assistant's message.
        message: String,
    },
    /// A conversation that starts with an assistant message whose start cannot be located.
    #[error(
        "`messages[0]` is the assistant's, and its start cannot be located in the output of the chat \
         template: needs a system or user message before it, or a template that marks assistant \
         messages with {{% generation %}}"
    )]
    BeginsWithAssistant,
    /// A different number of `{% generation %}` blocks than of assistant messages.
    #[error(
        "the chat template marks {spans} {{% generation %}} parts for {messages} assistant \
         messages, so messages with `train: false` cannot be matched to them"
    )]
    SpanCount {
        /// Marked parts.
        spans: usize,
        /// Assistant messages.
        messages: usize,
    },
    /// An error of the tokenizer or the chat template.
    #[error(transparent)]
    Text(#[from] TextError),
}

/// A single invalid row is one sentence; several are listed line by line, as compilers do.
fn sentences(path: &Path, first: &[(u64, String)], wrong: u64, rows: u64) -> String {
    let path = path.display();
    if let (1, [(line, problem)]) = (wrong, first) {
        return format!("{path}:{line}: {problem}");
    }
    let listed = first.iter().map(|(line, problem)| format!("\n  {path}:{line}: {problem}"));
    let more = match wrong - first.len() as u64 {
        0 => String::new(),
        more => format!("\n  and {more} more"),
    };
    format!("{path}: {wrong} of {rows} rows are invalid{}{more}", listed.collect::<String>())
}

/// Keys in backquotes; only the first few if there are many.
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
