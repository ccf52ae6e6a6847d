//! Data validation: checks for rows that a trainer would silently learn wrong things from. They run while
//! the rows are read, and are reported with file and line before training begins.
//!
//! A failed [`Check`] is either an error, if training on such rows would teach nothing or the wrong thing,
//! or a warning. Rows that cannot be read are skipped. The user can ignore any check by its name
//! (`--allow`).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::cache::{map_or_empty, sort_records};
use super::lines::FAULTS_SHOWN;
use super::rows::{ComparisonRow, Responses};
use super::{DataError, Message, Row, RowError, RowFormat};
use crate::quant::Bytes;
use crate::string_enum::string_enum;
use crate::text::Tokenizer;

/// Number of lines that are stored per check.
const KEPT: usize = 100;

string_enum! {
    /// A check that every row goes through.
    #[derive(Debug, PartialOrd, Ord, Hash)]
    pub enum Check {
        /// Invalid JSON, missing keys, or values of the wrong type.
        WrongRows = "wrong-rows",
        /// A message with an unknown role or speaker.
        UnknownRoles = "unknown-roles",
        /// A row in another format than the first row of the file.
        MixedDialects = "mixed-dialects",
        /// Token ids outside the vocabulary of the tokenizer or the model.
        OutOfVocabulary = "out-of-vocabulary",
        /// A conversation whose assistant tokens cannot be located in the output of the chat template.
        TemplatePrefix = "template-prefix",
        /// A row without a learned token, or without any pair or label.
        NothingToLearn = "nothing-to-learn",
        /// Two BOS tokens at the start of a sequence.
        DoubledBos = "doubled-bos",
        /// A response that does not end in a learned end-of-generation token.
        UntrainedEnd = "untrained-end",
        /// An empty assistant message or response.
        EmptyAnswers = "empty-answers",
        /// A conversation that begins with an assistant message.
        AssistantFirst = "assistant-first",
        /// Two consecutive assistant messages.
        RepeatedAssistant = "repeated-assistant",
        /// A system message that is not the first.
        LateSystem = "late-system",
        /// A conversation that ends with a user message.
        TrailingUser = "trailing-user",
        /// A preference pair of two identical responses.
        IdenticalPairs = "identical-pairs",
        /// A negative margin, which means that the rejected response is better.
        WrongMargins = "wrong-margins",
        /// A token that spans the border of prompt and response.
        BoundaryMismatch = "boundary-mismatch",
        /// A row that duplicates an earlier row of the file.
        Duplicates = "duplicates",
        /// A held-out row that is also in the training data.
        HeldOutDuplicates = "held-out-duplicates",
        /// A row longer than `max_length`: truncated, or dropped if nothing to learn is left.
        Cut = "cut",
        /// A row longer than the context window of the model.
        OverWindow = "over-window",
    }
}

impl Check {
    /// Whether a failure is an error, because such rows teach nothing or the wrong thing.
    pub fn stops(self) -> bool {
        self < Self::BoundaryMismatch
    }

    /// Whether such rows cannot be read, so that allowing them means skipping them.
    pub fn leaves_out(self) -> bool {
        self < Self::NothingToLearn && self != Self::MixedDialects
    }

    /// The check that a row fails which cannot be read.
    pub(super) fn of(error: &RowError) -> Self {
        match error {
            RowError::Role { .. } => Self::UnknownRoles,
            RowError::OutOfVocabulary { .. } => Self::OutOfVocabulary,
            RowError::PrefixNotKept { .. }
            | RowError::BeginsWithAssistant
            | RowError::SpanCount { .. } => Self::TemplatePrefix,
            _ => Self::WrongRows,
        }
    }
}

/// A failed check, and its error message.
pub(super) type Finding = (Check, String);

/// The rows that fail one check.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlaggedRows {
    /// Number of rows.
    pub rows: u64,
    /// The first of them: line numbers, counted from 1, and what is wrong there.
    pub first: Vec<(u64, String)>,
}

/// The outcome of all checks over a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// The format of the first row that has a known format.
    #[serde(rename = "dialect")]
    pub format: Option<RowFormat>,
    /// Number of rows.
    pub rows: u64,
    /// Histogram of row lengths before truncation: number of rows per power of two (upper bound).
    pub lengths: BTreeMap<u64, u64>,
    /// Failed checks and their rows.
    pub findings: BTreeMap<Check, FlaggedRows>,
}

impl CheckReport {
    /// Adds the length of a row to the histogram.
    pub(super) fn length(&mut self, tokens: usize) {
        *self.lengths.entry((tokens as u64).next_power_of_two()).or_default() += 1;
    }

    /// Records a failed check of the row at a line.
    pub(super) fn note(&mut self, line: u64, (check, sentence): Finding) {
        let found = self.findings.entry(check).or_default();
        found.rows += 1;
        if found.first.len() < KEPT {
            found.first.push((line, sentence));
        }
    }

    /// Counts a row, and checks that it has the format of the first row.
    pub(super) fn row(&mut self, line: u64, format: Option<RowFormat>) {
        self.rows += 1;
        match (self.format, format) {
            (None, found) => self.format = found,
            (Some(first), Some(found)) if first != found => {
                let sentence =
                    format!("is a row of {}, the file began with {}", found.name(), first.name());
                self.note(line, (Check::MixedDialects, sentence));
            }
            _ => {}
        }
    }

    /// Fails if rows could not be read, unless the failed checks are allowed.
    pub(super) fn unreadable(&self, path: &Path, allow: &[Check]) -> Result<(), DataError> {
        let wrong = |check: &Check| check.leaves_out() && !allow.contains(check);
        let found = self.findings.iter().filter(|(check, _)| wrong(check));
        let found: Vec<&FlaggedRows> = found.map(|(_, found)| found).collect();
        let wrong = found.iter().map(|found| found.rows).sum();
        if wrong == 0 {
            return Ok(());
        }
        let mut first: Vec<_> = found.iter().flat_map(|found| found.first.clone()).collect();
        first.sort_by_key(|(line, _)| *line);
        first.truncate(FAULTS_SHOWN);
        Err(DataError::Rows { path: path.into(), first, wrong, rows: self.rows })
    }

    /// Fails if any check failed that is an error and not allowed.
    ///
    /// # Errors
    /// All failed checks, in one error.
    pub fn verify(&self, path: &Path, allow: &[Check]) -> Result<(), DataError> {
        self.unreadable(path, allow)?;
        let stops = |check: &Check| check.stops() && !allow.contains(check);
        let stops = self.findings.iter().filter(|(check, _)| stops(check));
        let defects: Vec<String> = stops.map(|(check, rows)| listing(*check, rows, path)).collect();
        if defects.is_empty() {
            return Ok(());
        }
        Err(DataError::Defects { path: path.into(), defects: defects.concat() })
    }

    /// One warning per failed check that is not an error, with the first line it occurs at.
    pub fn warnings(&self, path: &Path, allow: &[Check]) -> Vec<String> {
        let path = path.display();
        let reported = self.findings.iter().filter(|(check, _)| !allow.contains(check));
        let warnings = reported.filter(|(check, _)| !check.stops());
        let warning = |(check, found): (&Check, &FlaggedRows)| {
            let place = found.first.first();
            let place = place.map_or(String::new(), |(line, sentence)| {
                format!(", first {path}:{line}: {sentence}")
            });
            format!("{}: {} of {} rows{place}", check, found.rows, self.rows)
        };
        warnings.map(warning).collect()
    }
}

/// The rows that fail a check, one line each.
fn listing(check: Check, found: &FlaggedRows, path: &Path) -> String {
    let path = path.display();
    let first = found.first.iter().take(FAULTS_SHOWN);
    let lines = first.map(|(line, sentence)| format!("\n  {path}:{line}: {sentence}"));
    let more = match found.rows - found.first.len().min(FAULTS_SHOWN) as u64 {
        0 => String::new(),
        more => format!("\n  and {more} more of `{}`", check),
    };
    lines.collect::<String>() + &more
}

impl fmt::Display for CheckReport {
    /// The row format and the histogram of row lengths.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let format = self.format.map_or("no known kind", RowFormat::name);
        write!(f, "rows of {format}")?;
        let most = self.lengths.values().max().copied().unwrap_or(1);
        for (up_to, rows) in &self.lengths {
            let bar = "█".repeat((rows * 40).div_ceil(most) as usize);
            write!(f, "\n  up to {up_to:>7} tokens {rows:>9} {bar}")?;
        }
        Ok(())
    }
}

/// Hashes of the normalized rows of a file, for finding duplicates: sorted pairs of a hash and a line
/// number, in memory or memory-mapped.
#[derive(Debug, Clone)]
pub struct RowHashes(Bytes);

/// A hash of a normalized row and its line number, both big-endian, so that byte order is sort order.
type HashAndLine = [u8; 16];

fn hash_record(hash: u64, line: u64) -> HashAndLine {
    (u128::from(hash) << 64 | u128::from(line)).to_be_bytes()
}

fn hash_and_line(record: &HashAndLine) -> (u64, u64) {
    let both = u128::from_be_bytes(*record);
    ((both >> 64) as u64, both as u64)
}

impl Default for RowHashes {
    fn default() -> Self {
        Self::new(Bytes::new(Arc::new(Vec::new())))
    }
}

impl RowHashes {
    /// From sorted records.
    pub(super) fn new(records: Bytes) -> Self {
        Self(records)
    }

    fn records(&self) -> &[HashAndLine] {
        self.0.as_chunks().0
    }

    /// Reports rows that duplicate an earlier row of the same file.
    pub(super) fn report_duplicates(&self, checks: &mut CheckReport) {
        let mut duplicates = DuplicateLines::default();
        for same in self.records().chunk_by(|a, b| a[..8] == b[..8]) {
            let (_, first) = hash_and_line(&same[0]);
            same[1..].iter().for_each(|record| duplicates.add(hash_and_line(record).1, first));
        }
        duplicates
            .report(Check::Duplicates, checks, |first| format!("is the row of line {first} again"));
    }

    /// Reports rows of a held-out file that this training file, at `path`, contains too.
    pub fn report_held_out_duplicates(
        &self,
        path: &Path,
        held_out: &Self,
        checks: &mut CheckReport,
    ) {
        let mut duplicates = DuplicateLines::default();
        let here = self.records();
        for (hash, line) in held_out.records().iter().map(hash_and_line) {
            let at = here.partition_point(|other| hash_and_line(other).0 < hash);
            let found = here.get(at).map(hash_and_line).filter(|(other, _)| *other == hash);
            if let Some((_, here)) = found {
                duplicates.add(line, here);
            }
        }
        let path = path.display();
        duplicates.report(Check::HeldOutDuplicates, checks, |line| {
            format!("is trained on: {path}:{line}")
        });
    }
}

/// Collects the hashes of rows.
pub(super) enum RowHashWriter {
    Memory(Vec<HashAndLine>),
    File(PathBuf, BufWriter<File>),
}

impl RowHashWriter {
    /// A writer to a file, or to memory without a path.
    pub fn new(path: Option<PathBuf>) -> io::Result<Self> {
        Ok(match path {
            None => Self::Memory(Vec::new()),
            Some(path) => {
                let file = BufWriter::new(File::create(&path)?);
                Self::File(path, file)
            }
        })
    }

    pub fn add(&mut self, hash: u64, line: u64) -> io::Result<()> {
        match self {
            Self::Memory(records) => {
                records.push(hash_record(hash, line));
                Ok(())
            }
            Self::File(_, file) => file.write_all(&hash_record(hash, line)),
        }
    }

    /// Sorts the hashes.
    pub fn finish(self) -> io::Result<RowHashes> {
        match self {
            Self::Memory(mut records) => {
                records.sort_unstable();
                Ok(RowHashes::new(Bytes::new(Arc::new(records.as_flattened().to_vec()))))
            }
            Self::File(path, file) => {
                file.into_inner().map_err(io::IntoInnerError::into_error)?;
                sort_records::<{ size_of::<HashAndLine>() }>(&path)?;
                Ok(RowHashes::new(map_or_empty(&path)?))
            }
        }
    }
}

/// Lines that duplicate another line. All are counted, the first few are stored.
#[derive(Default)]
struct DuplicateLines {
    rows: u64,
    /// The line, and the line that it duplicates.
    first: BTreeSet<(u64, u64)>,
}

impl DuplicateLines {
    fn add(&mut self, line: u64, other: u64) {
        self.rows += 1;
        self.first.insert((line, other));
        if self.first.len() > KEPT {
            self.first.pop_last();
        }
    }

    fn report(self, check: Check, checks: &mut CheckReport, sentence: impl Fn(u64) -> String) {
        if self.rows == 0 {
            return;
        }
        for &(line, other) in &self.first {
            checks.note(line, (check, sentence(other)));
        }
        let found = checks.findings.entry(check).or_default();
        found.rows += self.rows - self.first.len() as u64;
    }
}

/// Hash of a row, ignoring case and white space.
pub(super) fn normalized_hash(row: &Row) -> u64 {
    let mut hasher = Normalized::default();
    match row {
        Row::Tokens { input_ids, learned } => {
            input_ids.iter().for_each(|id| hasher.0.update(id.to_le_bytes()));
            learned.iter().for_each(|&learned| hasher.0.update([u8::from(learned)]));
        }
        Row::Messages { messages, .. } | Row::Alpaca { messages, .. } => hasher.messages(messages),
        Row::PromptCompletion { prompt, completion } => {
            hasher.text(prompt);
            hasher.text(completion);
        }
        Row::Text(text) => hasher.text(text),
    }
    hasher.finish()
}

/// Hash of a row of preference data, ignoring case and white space.
pub(super) fn normalized_comparison(row: &ComparisonRow) -> u64 {
    let mut hasher = Normalized::default();
    match &row.responses {
        Responses::Texts { prompt, responses } => {
            hasher.text(prompt);
            responses.iter().for_each(|response| hasher.text(response));
        }
        Responses::Messages { prompt, responses, .. } => {
            hasher.messages(prompt);
            responses.iter().for_each(|response| hasher.messages(response));
        }
    }
    hasher.finish()
}

/// Hash of a prompt, ignoring case and white space.
pub(super) fn normalized_prompt(text: &str) -> u64 {
    let mut hasher = Normalized::default();
    hasher.text(text);
    hasher.finish()
}

/// Hashes texts in lower case, with white space collapsed.
#[derive(Default)]
struct Normalized(Sha256);

impl Normalized {
    fn text(&mut self, text: &str) {
        for word in text.split_whitespace() {
            self.0.update(word.to_lowercase());
            self.0.update(" ");
        }
        self.0.update([0]);
    }

    fn messages(&mut self, messages: &[Message]) {
        for message in messages {
            self.text(&message.role);
            self.text(message.value["content"].as_str().unwrap_or_default());
            let fields = message.value.as_object().into_iter().flatten();
            for (key, value) in fields.filter(|(key, _)| *key != "role" && *key != "content") {
                self.text(&format!("{key}: {value}"));
            }
        }
    }

    fn finish(self) -> u64 {
        let digest: [u8; 32] = self.0.finalize().into();
        let (first, _) = digest.as_chunks();
        u64::from_le_bytes(first[0])
    }
}

/// Checks the messages of a conversation.
pub(super) fn check_messages(messages: &[Message]) -> Vec<Finding> {
    let mut found = Vec::new();
    let role = |i: usize| messages[i].role.as_str();
    let is_system = |role: &str| matches!(role, "system" | "developer");
    let begins = messages.iter().position(|message| !is_system(&message.role));
    if let Some(begins) = begins {
        if role(begins) == "assistant" {
            let sentence =
                format!("message {begins} is the first of the conversation and the assistant's");
            found.push((Check::AssistantFirst, sentence));
        }
        if let Some(late) = (begins..messages.len()).find(|&i| is_system(role(i))) {
            let sentence = format!("message {late} is a {} message after others", role(late));
            found.push((Check::LateSystem, sentence));
        }
    }
    let both = |&i: &usize| role(i) == "assistant" && role(i + 1) == "assistant";
    if let Some(first) = (0..messages.len().saturating_sub(1)).find(both) {
        let sentence = format!("messages {first} and {} are both the assistant's", first + 1);
        found.push((Check::RepeatedAssistant, sentence));
    }
    let last = messages.len().saturating_sub(1);
    let answered = messages.iter().any(|message| message.role == "assistant");
    if answered && role(last) == "user" {
        let sentence = format!("message {last} is the user's and the last: it has no answer");
        found.push((Check::TrailingUser, sentence));
    }
    let empty = |message: &Message| {
        let said = message.value["content"].as_str().unwrap_or_default();
        let calls = message.value["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty());
        message.learned && said.trim().is_empty() && !calls
    };
    if let Some(empty) = messages.iter().position(empty) {
        found.push((Check::EmptyAnswers, format!("message {empty} is learned and empty")));
    }
    found
}

/// Checks the texts or messages of a row of preference data.
pub(super) fn check_comparison(row: &ComparisonRow) -> Vec<Finding> {
    let is_empty_answer = |check: &Finding| check.0 == Check::EmptyAnswers;
    match &row.responses {
        Responses::Texts { responses, .. } => {
            let empty = responses.iter().position(|response| response.trim().is_empty());
            let sentence = |i: usize| (Check::EmptyAnswers, format!("{} is empty", row.key(i)));
            empty.map(sentence).into_iter().collect()
        }
        Responses::Messages { prompt, responses, .. } => {
            let mut found: Vec<Finding> = Vec::new();
            for response in responses {
                let whole: Vec<Message> = prompt.iter().chain(response).cloned().collect();
                // Nothing of a prompt is learned, and a text without a prompt may begin with any role.
                let odd = check_messages(&whole)
                    .into_iter()
                    .filter(|finding| !prompt.is_empty() || finding.0 != Check::AssistantFirst);
                let odd = odd.filter(|finding| {
                    !is_empty_answer(finding)
                        || check_messages(response).iter().any(is_empty_answer)
                });
                for finding in odd {
                    if found.iter().all(|(check, _)| *check != finding.0) {
                        found.push(finding);
                    }
                }
            }
            found
        }
    }
}

/// Checks the tokens of a row and its loss mask.
pub(super) fn check_tokens(
    row: &Row,
    tokens: &[u32],
    learned: &[bool],
    tokenizer: &Tokenizer,
) -> Vec<Finding> {
    let mut found: Vec<Finding> = doubled_bos(tokens, tokenizer).into_iter().collect();
    if let Row::PromptCompletion { completion, .. } = row
        && completion.trim().is_empty()
    {
        found.push((Check::EmptyAnswers, "`completion` is empty".into()));
    }
    let ends = |i: usize| tokenizer.is_end_of_generation(tokens[i]);
    let untrained = match row {
        // Tokenized rows need not end in an end-of-generation token; but if they do, it must be learned.
        Row::Tokens { .. } => {
            (0..tokens.len()).find(|&i| ends(i) && i > 0 && !learned[i] && learned[i - 1])
        }
        _ => (0..tokens.len())
            .find(|&i| learned[i] && !learned.get(i + 1).copied().unwrap_or(false) && !ends(i)),
    };
    if let Some(i) = untrained {
        let token = tokenizer.token(tokens[i]).unwrap_or_default();
        let sentence = match learned[i] {
            true => format!("the last learned token is {token:?}, which does not end generation"),
            false => format!("{token:?} follows the last learned token and is not learned"),
        };
        found.push((Check::UntrainedEnd, sentence));
    }
    found
}

/// Checks for two BOS tokens at the start.
pub(super) fn doubled_bos(tokens: &[u32], tokenizer: &Tokenizer) -> Option<Finding> {
    let bos = tokenizer.bos()?;
    let token = tokenizer.token(bos).unwrap_or_default();
    let sentence = || format!("begins with {token:?} twice");
    tokens.starts_with(&[bos, bos]).then(|| (Check::DoubledBos, sentence()))
}
