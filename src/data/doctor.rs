//! What is wrong with rows that a trainer would learn from without a word: found while they are read,
//! told with file and line before a run begins.
//!
//! A [`Check`] either stops a run, as what would teach nothing or teach wrong, or is told as a warning.
//! A row that cannot be read is left out; whether the run may go on without it is the user's to say,
//! as of all checks, by their names.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::cache::{map_or_empty, sort_records};
use super::lines::FAULTS_TOLD;
use super::rows::{ComparisonRow, Responses};
use super::{DataError, Dialect, Message, Row, RowError};
use crate::quant::Bytes;
use crate::string_enum::string_enum;
use crate::text::Tokenizer;

/// Lines kept of each check.
const KEPT: usize = 100;

string_enum! {
    /// What is looked for in rows.
    #[derive(Debug, PartialOrd, Ord, Hash)]
    pub enum Check {
        /// No JSON, missing keys, values of another type.
        WrongRows = "wrong-rows",
        /// A role or speaker nobody knows.
        UnknownRoles = "unknown-roles",
        /// A row of another dialect than the file's first.
        MixedDialects = "mixed-dialects",
        /// Ids that the tokenizer or the model does not have.
        OutOfVocabulary = "out-of-vocabulary",
        /// A conversation whose learned part cannot be told from the template's text.
        TemplatePrefix = "template-prefix",
        /// Rows without a learned token; responses of which none are compared.
        NothingToLearn = "nothing-to-learn",
        /// Two tokens that begin a sequence.
        DoubledBos = "doubled-bos",
        /// An answer that does not end in a learned token that ends generation.
        UntrainedEnd = "untrained-end",
        /// An assistant that says nothing.
        EmptyAnswers = "empty-answers",
        /// A conversation that the assistant begins.
        AssistantFirst = "assistant-first",
        /// Two turns of the assistant without one between.
        RepeatedAssistant = "repeated-assistant",
        /// A system message that is not the first.
        LateSystem = "late-system",
        /// A conversation that ends without an answer.
        TrailingUser = "trailing-user",
        /// Two responses compared that are the same.
        IdenticalPairs = "identical-pairs",
        /// A margin that says the worse response is the better.
        WrongMargins = "wrong-margins",
        /// A token that reaches from what is given into what is learned.
        BoundaryMismatch = "boundary-mismatch",
        /// Rows that were there before.
        Duplicates = "duplicates",
        /// Held-out rows that are trained on.
        HeldOutDuplicates = "held-out-duplicates",
        /// Rows longer than `max_length`, cut at their end, or left out where nothing to learn is left.
        Cut = "cut",
        /// Rows longer than the model's window.
        OverWindow = "over-window",
    }
}

impl Check {
    /// Whether a run with such rows teaches nothing or teaches wrong.
    pub fn stops(self) -> bool {
        self < Self::BoundaryMismatch
    }

    /// Whether such rows cannot be read, so that to allow them is to leave them out.
    pub fn leaves_out(self) -> bool {
        self < Self::NothingToLearn && self != Self::MixedDialects
    }

    /// Of a row that cannot be read.
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

/// Something found in a row.
pub(super) type Finding = (Check, String);

/// The rows in which something was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// How many.
    pub rows: u64,
    /// The first of them: lines, counted from 1, and what is wrong there.
    pub first: Vec<(u64, String)>,
}

/// What a file's rows came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// The kind of the first row that has one.
    pub dialect: Option<Dialect>,
    /// All rows.
    pub rows: u64,
    /// How many rows have up to so many tokens, before any cut: powers of two.
    pub lengths: BTreeMap<u64, u64>,
    /// What was found.
    pub findings: BTreeMap<Check, Found>,
}

impl Diagnosis {
    /// Counts a row of so many tokens.
    pub(super) fn length(&mut self, tokens: usize) {
        *self.lengths.entry((tokens as u64).next_power_of_two()).or_default() += 1;
    }

    /// Keeps what was found in the row of a line.
    pub(super) fn note(&mut self, line: u64, (check, sentence): Finding) {
        let found = self.findings.entry(check).or_default();
        found.rows += 1;
        if found.first.len() < KEPT {
            found.first.push((line, sentence));
        }
    }

    /// Counts a row, and holds it to the dialect of the first.
    pub(super) fn row(&mut self, line: u64, dialect: Option<Dialect>) {
        self.rows += 1;
        match (self.dialect, dialect) {
            (None, found) => self.dialect = found,
            (Some(first), Some(found)) if first != found => {
                let sentence =
                    format!("is a row of {}, the file began with {}", found.name(), first.name());
                self.note(line, (Check::MixedDialects, sentence));
            }
            _ => {}
        }
    }

    /// Rows that could not be read, unless all that is wrong with them is allowed.
    pub(super) fn unreadable(&self, path: &Path, allow: &[Check]) -> Result<(), DataError> {
        let wrong = |check: &Check| check.leaves_out() && !allow.contains(check);
        let found = self.findings.iter().filter(|(check, _)| wrong(check));
        let found: Vec<&Found> = found.map(|(_, found)| found).collect();
        let wrong = found.iter().map(|found| found.rows).sum();
        if wrong == 0 {
            return Ok(());
        }
        let mut first: Vec<_> = found.iter().flat_map(|found| found.first.clone()).collect();
        first.sort_by_key(|(line, _)| *line);
        first.truncate(FAULTS_TOLD);
        Err(DataError::Rows { path: path.into(), first, wrong, rows: self.rows })
    }

    /// What stops a run, in one error.
    ///
    /// # Errors
    /// If there is any that is not allowed.
    pub fn judge(&self, path: &Path, allow: &[Check]) -> Result<(), DataError> {
        self.unreadable(path, allow)?;
        let stops = |check: &Check| check.stops() && !allow.contains(check);
        let stops = self.findings.iter().filter(|(check, _)| stops(check));
        let told: Vec<String> = stops.map(|(check, found)| told(*check, found, path)).collect();
        match told.is_empty() {
            true => Ok(()),
            false => Err(DataError::Defects { path: path.into(), told: told.concat() }),
        }
    }

    /// What is told of a file beside what stops, a line each with the first place it is found at.
    pub fn warnings(&self, path: &Path, allow: &[Check]) -> Vec<String> {
        let path = path.display();
        let told = self.findings.iter().filter(|(check, _)| !allow.contains(check));
        let warnings = told.filter(|(check, _)| !check.stops());
        let warning = |(check, found): (&Check, &Found)| {
            let place = found.first.first();
            let place = place.map_or(String::new(), |(line, sentence)| {
                format!(", first {path}:{line}: {sentence}")
            });
            format!("{}: {} of {} rows{place}", check, found.rows, self.rows)
        };
        warnings.map(warning).collect()
    }
}

/// A check's rows, a line each.
fn told(check: Check, found: &Found, path: &Path) -> String {
    let path = path.display();
    let first = found.first.iter().take(FAULTS_TOLD);
    let lines = first.map(|(line, sentence)| format!("\n  {path}:{line}: {sentence}"));
    let more = match found.rows - found.first.len().min(FAULTS_TOLD) as u64 {
        0 => String::new(),
        more => format!("\n  and {more} more of `{}`", check),
    };
    lines.collect::<String>() + &more
}

impl fmt::Display for Diagnosis {
    /// The dialect and the histogram of lengths.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dialect = self.dialect.map_or("no known kind", Dialect::name);
        write!(f, "rows of {dialect}")?;
        let most = self.lengths.values().max().copied().unwrap_or(1);
        for (up_to, rows) in &self.lengths {
            let bar = "█".repeat((rows * 40).div_ceil(most) as usize);
            write!(f, "\n  up to {up_to:>7} tokens {rows:>9} {bar}")?;
        }
        Ok(())
    }
}

/// What all rows of a file say: sorted records of a hash and a line, in memory or mapped.
#[derive(Debug, Clone)]
pub struct Seen(Bytes);

/// A hash of a normalized row and its line, both big-endian: their order is that of the bytes.
type Record = [u8; 16];

fn record(hash: u64, line: u64) -> Record {
    (u128::from(hash) << 64 | u128::from(line)).to_be_bytes()
}

fn hash_and_line(record: &Record) -> (u64, u64) {
    let both = u128::from_be_bytes(*record);
    ((both >> 64) as u64, both as u64)
}

impl Default for Seen {
    fn default() -> Self {
        Self::new(Bytes::new(Arc::new(Vec::new())))
    }
}

impl Seen {
    /// Of records that are sorted.
    pub(super) fn new(records: Bytes) -> Self {
        Self(records)
    }

    fn records(&self) -> &[Record] {
        self.0.as_chunks().0
    }

    /// Tells the rows that were there before.
    pub(super) fn tell(&self, diagnosis: &mut Diagnosis) {
        let mut again = Again::default();
        for same in self.records().chunk_by(|a, b| a[..8] == b[..8]) {
            let (_, first) = hash_and_line(&same[0]);
            same[1..].iter().for_each(|record| again.add(hash_and_line(record).1, first));
        }
        again.tell(Check::Duplicates, diagnosis, |first| {
            format!("is the row of line {first} again")
        });
    }

    /// Tells the rows of a held-out file that are here too.
    pub fn again(&self, path: &Path, held_out: &Self, diagnosis: &mut Diagnosis) {
        let mut again = Again::default();
        let here = self.records();
        for (hash, line) in held_out.records().iter().map(hash_and_line) {
            let at = here.partition_point(|other| hash_and_line(other).0 < hash);
            let found = here.get(at).map(hash_and_line).filter(|(other, _)| *other == hash);
            if let Some((_, here)) = found {
                again.add(line, here);
            }
        }
        let path = path.display();
        again.tell(Check::HeldOutDuplicates, diagnosis, |line| {
            format!("is trained on: {path}:{line}")
        });
    }
}

/// Collects what rows say.
pub(super) enum SeenWriter {
    Memory(Vec<Record>),
    File(PathBuf, BufWriter<File>),
}

impl SeenWriter {
    /// Into a file, or memory.
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
                records.push(record(hash, line));
                Ok(())
            }
            Self::File(_, file) => file.write_all(&record(hash, line)),
        }
    }

    /// Sorted.
    pub fn finish(self) -> io::Result<Seen> {
        match self {
            Self::Memory(mut records) => {
                records.sort_unstable();
                Ok(Seen::new(Bytes::new(Arc::new(records.as_flattened().to_vec()))))
            }
            Self::File(path, file) => {
                file.into_inner().map_err(io::IntoInnerError::into_error)?;
                sort_records::<{ size_of::<Record>() }>(&path)?;
                Ok(Seen::new(map_or_empty(&path)?))
            }
        }
    }
}

/// Lines that say what another says: all are counted, the first are kept.
#[derive(Default)]
struct Again {
    rows: u64,
    /// The line and that of the other.
    first: BTreeSet<(u64, u64)>,
}

impl Again {
    fn add(&mut self, line: u64, other: u64) {
        self.rows += 1;
        self.first.insert((line, other));
        if self.first.len() > KEPT {
            self.first.pop_last();
        }
    }

    fn tell(self, check: Check, diagnosis: &mut Diagnosis, sentence: impl Fn(u64) -> String) {
        if self.rows == 0 {
            return;
        }
        for &(line, other) in &self.first {
            diagnosis.note(line, (check, sentence(other)));
        }
        let found = diagnosis.findings.entry(check).or_default();
        found.rows += self.rows - self.first.len() as u64;
    }
}

/// A hash of what a row says, whatever its case and spacing.
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

/// The same of a row that is compared.
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

/// The same of a prompt.
pub(super) fn normalized_prompt(text: &str) -> u64 {
    let mut hasher = Normalized::default();
    hasher.text(text);
    hasher.finish()
}

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

/// What is odd about a conversation as it is written.
pub(super) fn of_messages(messages: &[Message]) -> Vec<Finding> {
    let mut found = Vec::new();
    let role = |i: usize| messages[i].role.as_str();
    let is_system = |role: &str| matches!(role, "system" | "developer");
    let begins = messages.iter().position(|message| !is_system(&message.role));
    if let Some(begins) = begins {
        if role(begins) == "assistant" {
            let sentence =
                format!("message {begins} begins the conversation and is the assistant's");
            found.push((Check::AssistantFirst, sentence));
        }
        if let Some(late) = (begins..messages.len()).find(|&i| is_system(role(i))) {
            let sentence = format!("message {late} is a {} message, behind others", role(late));
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
        let sentence = format!("message {last} is the user's and the last: nothing answers it");
        found.push((Check::TrailingUser, sentence));
    }
    let empty = |message: &Message| {
        let said = message.value["content"].as_str().unwrap_or_default();
        let calls = message.value["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty());
        message.learned && said.trim().is_empty() && !calls
    };
    if let Some(empty) = messages.iter().position(empty) {
        found.push((Check::EmptyAnswers, format!("message {empty} is learned and says nothing")));
    }
    found
}

/// What is odd about responses as they are written.
pub(super) fn of_comparison(row: &ComparisonRow) -> Vec<Finding> {
    let says_nothing = |check: &Finding| check.0 == Check::EmptyAnswers;
    match &row.responses {
        Responses::Texts { responses, .. } => {
            let empty = responses.iter().position(|response| response.trim().is_empty());
            let sentence = |i: usize| (Check::EmptyAnswers, format!("{} says nothing", row.key(i)));
            empty.map(sentence).into_iter().collect()
        }
        Responses::Messages { prompt, responses, .. } => {
            let mut found: Vec<Finding> = Vec::new();
            for response in responses {
                let whole: Vec<Message> = prompt.iter().chain(response).cloned().collect();
                // Of a prompt nothing is learned, and a text without one may begin as it likes.
                let odd = of_messages(&whole)
                    .into_iter()
                    .filter(|finding| !prompt.is_empty() || finding.0 != Check::AssistantFirst);
                let odd = odd.filter(|finding| {
                    !says_nothing(finding) || of_messages(response).iter().any(says_nothing)
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

/// What is odd about tokens of which these are learned.
pub(super) fn of_tokens(
    row: &Row,
    tokens: &[u32],
    learned: &[bool],
    tokenizer: &Tokenizer,
) -> Vec<Finding> {
    let mut found: Vec<Finding> = doubled_bos(tokens, tokenizer).into_iter().collect();
    if let Row::PromptCompletion { completion, .. } = row
        && completion.trim().is_empty()
    {
        found.push((Check::EmptyAnswers, "`completion` says nothing".into()));
    }
    let ends = |i: usize| tokenizer.is_end_of_generation(tokens[i]);
    let untrained = match row {
        // Whoever made tokens may end rows as they please; but an end that is there is to be learned.
        Row::Tokens { .. } => {
            (0..tokens.len()).find(|&i| ends(i) && i > 0 && !learned[i] && learned[i - 1])
        }
        _ => (0..tokens.len())
            .find(|&i| learned[i] && !learned.get(i + 1).copied().unwrap_or(false) && !ends(i)),
    };
    if let Some(i) = untrained {
        let token = tokenizer.token(tokens[i]).unwrap_or_default();
        let sentence = match learned[i] {
            true => format!("what is learned ends in {token:?}, which does not end generation"),
            false => format!("{token:?} ends what is learned and is not learned itself"),
        };
        found.push((Check::UntrainedEnd, sentence));
    }
    found
}

/// Two tokens in front that begin a sequence.
pub(super) fn doubled_bos(tokens: &[u32], tokenizer: &Tokenizer) -> Option<Finding> {
    let bos = tokenizer.bos()?;
    let token = tokenizer.token(bos).unwrap_or_default();
    let sentence = || format!("begins with {token:?} twice");
    tokens.starts_with(&[bos, bos]).then(|| (Check::DoubledBos, sentence()))
}
