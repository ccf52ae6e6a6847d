//! Preference data: responses to a prompt that are ranked against each other, or labelled good or bad.
//! Used by reward models, DPO, KTO and their variants.
//!
//! The tokens are those of TRL's RewardTrainer, DPOTrainer and KTOTrainer: prompt and response are
//! tokenized jointly, and the prompt ends at the first token in which its own encoding differs from the
//! joint encoding of any response. So prompt and response concatenated are the text of the row, and all
//! responses of a row share one prompt.
//!
//! Two things differ from TRL. Its DPOTrainer treats the common prefix of two *strings* without a prompt
//! as the prompt; here they are whole texts, whose common prefix cancels in any difference of log-probs.
//! And where `chosen` and `rejected` become two labelled responses, they share a prompt.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::Sha256;

use super::checks::{self, Check, Finding};
use super::lines::{FileLine, UnreadableRow};
use super::reading::{Cache, FileRows, FileSplit, Parsed, RowPart, RowReader, RowReport};
use super::row_store::{Record, RowLocation, RowStore, WordReader, hash_tokens, write_words};
use super::rows::{ComparisonKind, ComparisonRow, PreferencePair, Responses};
use super::split::{first_turn_of_responses, is_held_out_text};
use super::{DataError, Message, ModelLimits, RowError};
use crate::monitor::Monitor;
use crate::text::{Special, Tokenizer};

/// A prompt and the responses to it that are compared.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Tokens of the prompt; empty, or only BOS, where whole texts are compared.
    pub prompt: Vec<u32>,
    /// Tokens of each response, after the prompt.
    pub responses: Vec<Vec<u32>>,
    /// Which response is preferred to which.
    pub pairs: Vec<PreferencePair>,
    /// For a KTO row, whether its one response is desirable.
    pub label: Option<bool>,
    /// The row number in its file, counted from 0 over lines that are not blank.
    pub row: u64,
    /// The line number in its file, counted from 1.
    pub line: u64,
}

impl Comparison {
    /// Number of tokens of prompt and responses, the prompt counted once.
    pub fn tokens(&self) -> usize {
        self.prompt.len() + self.responses.iter().map(Vec::len).sum::<usize>()
    }

    /// Number of responses of an encoded comparison.
    pub(super) fn responses_in(bytes: &[u8]) -> usize {
        WordReader::of(bytes).next() as usize
    }
}

/// Labels by their encoded value: none, undesirable, desirable.
const LABELS: [Option<bool>; 3] = [None, Some(false), Some(true)];

impl Record for Comparison {
    /// The number of responses, the number of pairs, the label, the length of each response, the pairs,
    /// and all tokens, those of the prompt first.
    fn encode(&self, bytes: &mut Vec<u8>) {
        let label = LABELS.iter().position(|label| *label == self.label).unwrap_or_default();
        let counts = [self.responses.len(), self.pairs.len(), label];
        let lengths = self.responses.iter().map(Vec::len);
        write_words(counts.into_iter().chain(lengths).map(|count| count as u32), bytes);
        for PreferencePair { better, worse, margin } in &self.pairs {
            write_words([*better as u32, *worse as u32, margin.to_bits()], bytes);
        }
        let tokens = self.prompt.iter().chain(self.responses.iter().flatten());
        write_words(tokens.copied(), bytes);
    }

    fn tag(&self) -> u64 {
        self.tokens() as u64
    }

    fn decode(bytes: &[u8], RowLocation { row, line, tag }: RowLocation) -> Self {
        let mut words = WordReader::of(bytes);
        let (responses, pairs, label) = (words.next(), words.next(), words.next());
        let lengths: Vec<usize> =
            words.take(responses as usize).map(|length| length as usize).collect();
        let mut pair = || PreferencePair {
            better: words.next() as usize,
            worse: words.next() as usize,
            margin: f32::from_bits(words.next()),
        };
        let pairs = (0..pairs).map(|_| pair()).collect();
        let prompt = words.take(tag as usize - lengths.iter().sum::<usize>()).collect();
        let responses = lengths.into_iter().map(|length| words.take(length).collect()).collect();
        let label = LABELS.get(label as usize).copied().flatten();
        Self { prompt, responses, pairs, label, row, line }
    }

    fn tokens_in(_bytes: &[u8], tag: u64) -> usize {
        tag as usize
    }

    fn hash(&self, hasher: &mut Sha256) {
        let lists = std::iter::once(&self.prompt).chain(&self.responses);
        lists.for_each(|tokens| hash_tokens(tokens, hasher));
    }
}

/// How long a prompt with a response may be, and what happens to longer ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct LengthLimits {
    /// Maximum number of tokens of prompt and response.
    pub max_length: usize,
    /// What happens to a longer response.
    pub when_long: WhenTooLong,
}

/// What happens to a response that exceeds the maximum length together with its prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum WhenTooLong {
    /// The response and its pairs are dropped, since a score is of a whole text (TRL's RewardTrainer).
    Drop,
    /// The response is truncated at its end, or dropped if the prompt leaves no room for it (TRL's
    /// DPOTrainer, `keep_start`).
    Cut,
}

impl RowStore<Comparison> {
    /// Number of responses of a row.
    pub(crate) fn responses(&self, index: usize) -> usize {
        Comparison::responses_in(self.encoded(index))
    }
}

/// The comparisons of a file, in file order.
pub type Comparisons = FileRows<Comparison, ComparisonReport>;

/// The comparisons of a file, split into a training and a held-out part. Rows that compare whole texts
/// are split by the preferred text; the same text may occur as a rejected one in the other part.
pub type ComparisonSplit = FileSplit<Comparison, ComparisonReport>;

/// Counts over the comparisons of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComparisonReport {
    /// Rows read, including those with nothing to compare.
    pub rows: u64,
    /// Responses kept.
    pub responses: u64,
    /// Preference pairs.
    pub pairs: u64,
    /// Responses labelled desirable.
    pub desirable: u64,
    /// Responses labelled undesirable.
    pub undesirable: u64,
    /// Tokens kept, each prompt counted once.
    pub tokens: u64,
    /// Tokens of the longest prompt with response, before truncation.
    pub longest: u64,
    /// Responses truncated at their end.
    pub truncated: u64,
    /// Responses dropped because they are too long.
    pub dropped: u64,
    /// Rows dropped because no pair (or label) is left.
    pub nothing_to_compare: u64,
    /// Pairs of responses with equal rank, which give no preference pair.
    pub ties: u64,
    /// Pairs of responses with identical tokens. They are kept, as in TRL.
    pub identical: u64,
    /// Rows in which one token spans the end of the prompt and the start of a response.
    pub boundary_mismatches: u64,
}

impl fmt::Display for ComparisonReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, responses, pairs, desirable, undesirable, tokens, longest, .. } = self;
        let Self { truncated, dropped, nothing_to_compare, ties, identical, .. } = self;
        write!(f, "{rows} rows, {responses} responses, ")?;
        match (desirable, undesirable) {
            (0, 0) => write!(f, "{pairs} pairs")?,
            _ => write!(f, "{desirable} good and {undesirable} bad")?,
        }
        write!(
            f,
            ", {tokens} tokens, longest {longest}; {truncated} responses truncated, {dropped} too \
             long, {nothing_to_compare} rows with nothing to compare, {ties} ties, {identical} \
             pairs of the same tokens, {} boundary mismatches",
            self.boundary_mismatches
        )
    }
}

impl RowReport for ComparisonReport {
    fn rows(&self) -> u64 {
        self.rows
    }
}

impl Comparisons {
    /// Reads and tokenizes all rows of a JSONL or Parquet file. Stops early once `monitor` asks to stop.
    ///
    /// # Errors
    /// If rows are invalid in a way that the settings do not allow (the first few are listed with their
    /// lines); if the file has no rows, or none with a pair or label; [`DataError::Stopped`].
    pub fn load<'m>(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: impl Into<ComparisonSettings>,
        kind: ComparisonKind,
        monitor: impl Into<Monitor<'m>>,
    ) -> Result<Self, DataError> {
        let settings = &settings.into();
        let reader = ComparisonReader { tokenizer, settings, kind };
        reader.load(path, settings.cache.as_ref(), monitor.into())
    }

    /// Validates the rows of a file: runs all checks and counts, and keeps no comparison.
    ///
    /// # Errors
    /// If the file cannot be read at all; [`DataError::Stopped`].
    pub fn examine<'m>(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: &ComparisonSettings,
        kind: ComparisonKind,
        monitor: impl Into<Monitor<'m>>,
    ) -> Result<Self, DataError> {
        ComparisonReader { tokenizer, settings, kind }.examine(path, monitor.into())
    }

    /// The comparisons of the first `rows` rows; rows that cannot be read are skipped.
    ///
    /// # Errors
    /// If the file cannot be read at all.
    pub(crate) fn first(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: &ComparisonSettings,
        kind: ComparisonKind,
        rows: usize,
    ) -> Result<Vec<Comparison>, DataError> {
        ComparisonReader { tokenizer, settings, kind }.first(path, rows)
    }

    /// Loads a file like [`Comparisons::load`], and holds out one row in ten by a hash of its prompt
    /// (see [`is_held_out`](super::is_held_out)).
    ///
    /// # Errors
    /// Like [`Comparisons::load`], and if no row is left to train on.
    pub fn load_split<'m>(
        path: &Path,
        tokenizer: &Tokenizer,
        settings: impl Into<ComparisonSettings>,
        kind: ComparisonKind,
        monitor: impl Into<Monitor<'m>>,
    ) -> Result<ComparisonSplit, DataError> {
        let settings = &settings.into();
        let reader = ComparisonReader { tokenizer, settings, kind };
        reader.load_split(path, settings.cache.as_ref(), monitor.into())
    }
}

/// Settings for reading comparisons.
#[derive(Debug, Clone)]
pub struct ComparisonSettings {
    /// Maximum length, and what happens to longer responses.
    pub limits: LengthLimits,
    /// Checks to ignore: rows that fail them and cannot be read are skipped.
    pub allow: Vec<Check>,
    /// Context window and vocabulary size of the model, if known.
    pub model: Option<ModelLimits>,
    /// Cache for the tokens of large files; `None` keeps all tokens in memory.
    pub cache: Option<Cache>,
}

impl From<LengthLimits> for ComparisonSettings {
    fn from(limits: LengthLimits) -> Self {
        Self { limits, allow: Vec::new(), model: None, cache: None }
    }
}

/// Parses lines into comparisons.
struct ComparisonReader<'a> {
    tokenizer: &'a Tokenizer,
    settings: &'a ComparisonSettings,
    kind: ComparisonKind,
}

impl RowReader for ComparisonReader<'_> {
    type Tokenized = TokenizedComparison;
    type Record = Comparison;
    type Report = ComparisonReport;

    fn kind(&self) -> &'static str {
        "comparisons"
    }

    fn tokenizer(&self) -> &Tokenizer {
        self.tokenizer
    }

    fn settings(&self) -> Value {
        let ComparisonSettings { limits, model, .. } = self.settings;
        json!({ "limits": limits, "model": model, "kind": self.kind })
    }

    fn allow(&self) -> &[Check] {
        &self.settings.allow
    }

    fn parse(&self, line: &[u8]) -> Result<Parsed<TokenizedComparison>, UnreadableRow> {
        let Self { tokenizer, settings, kind } = *self;
        let (format, row) = ComparisonRow::read(line, kind);
        let unread = |error| UnreadableRow { format, error };
        let row = row.map_err(unread)?;
        let hash = checks::normalized_comparison(&row);
        let mut findings = checks::check_comparison(&row);
        let (held_out, row) = tokenized(row, tokenizer, kind).map_err(unread)?;
        let in_order = || row.prompt.iter().chain(row.responses.iter().flatten());
        if let Some(limits) = settings.model
            && let Some(index) = in_order().position(|&id| id as usize >= limits.vocab_size)
        {
            let token = in_order().nth(index).copied().unwrap_or_default();
            let vocab_size = limits.vocab_size;
            return Err(unread(RowError::OutOfVocabulary { index, token, vocab_size }));
        }
        let first = row.responses.first().map_or(&[][..], Vec::as_slice);
        let begins: Vec<u32> = row.prompt.iter().chain(first).take(2).copied().collect();
        findings.extend(checks::doubled_bos(&begins, tokenizer));
        let ends = |tokens: &Vec<u32>| tokens.iter().any(|&id| tokenizer.is_end_of_generation(id));
        if let Some(response) = row.responses.iter().position(|response| !ends(response)) {
            let sentence = format!("response {response} holds no token that ends generation");
            findings.push((Check::UntrainedEnd, sentence));
        }
        let longest = row.responses.iter().map(Vec::len).max().unwrap_or_default();
        let length = row.prompt.len() + longest;
        Ok(Parsed { format, held_out, hash, length, findings, tokenized: row })
    }

    fn add(
        &self,
        line: &FileLine,
        row: TokenizedComparison,
        part: &mut RowPart<Comparison, ComparisonReport>,
    ) -> io::Result<Vec<Finding>> {
        let mut found = Vec::new();
        let TokenizedComparison { prompt, responses, mut pairs, labels, unjudged, .. } = row;
        let report = &mut part.report;
        report.rows += 1;
        report.ties += row.ties;
        if row.boundary_mismatch {
            report.boundary_mismatches += 1;
            let sentence = "a token spans the border of prompt and response: the prompt alone is \
                            tokenized differently (usually because it ends in a space)";
            found.push((Check::BoundaryMismatch, sentence.into()));
        }
        let (kept, places) = self.shorten(&prompt, responses, report, &mut found);
        pairs.retain(|pair| places[pair.better].is_some() && places[pair.worse].is_some());
        for pair in &mut pairs {
            let place = |old: usize| places[old].expect("pairs of dropped responses are dropped");
            (pair.better, pair.worse) = (place(pair.better), place(pair.worse));
            let identical = kept[pair.better] == kept[pair.worse];
            report.identical += u64::from(identical);
            found.extend(check_pair(pair, identical));
        }

        let comparison = |responses, pairs, label| Comparison {
            prompt: prompt.clone(),
            responses,
            pairs,
            label,
            row: line.row,
            line: line.number,
        };
        let mut compared = Vec::new();
        if labels.is_empty() {
            // A response that is in no pair would be computed for nothing.
            let (responses, pairs) =
                if unjudged { (kept, pairs) } else { only_paired(kept, pairs) };
            if !responses.is_empty() {
                compared.push(comparison(responses, pairs, None));
            }
        } else {
            let kept_labels = labels.iter().zip(&places).filter(|(_, place)| place.is_some());
            for ((&label, _), response) in kept_labels.zip(kept) {
                *if label { &mut report.desirable } else { &mut report.undesirable } += 1;
                compared.push(comparison(vec![response], Vec::new(), Some(label)));
            }
        }
        if compared.is_empty() {
            report.nothing_to_compare += 1;
            // If the responses were dropped for their length, `Check::Cut` already reports it.
            if found.iter().all(|(check, _)| *check != Check::Cut) {
                let sentence = "nothing of it is compared or labelled";
                found.push((Check::NothingToLearn, sentence.into()));
            }
        }
        for comparison in &compared {
            part.rows.push(comparison, line.row, line.number)?;
            report.responses += comparison.responses.len() as u64;
            report.pairs += comparison.pairs.len() as u64;
            report.tokens += comparison.tokens() as u64;
        }
        // A row counts once per check, however many of its responses fail it.
        let mut reported = HashSet::new();
        found.retain(|(check, _)| reported.insert(*check));
        Ok(found)
    }

    fn nothing(&self, path: PathBuf, report: &ComparisonReport) -> DataError {
        let &ComparisonReport { rows, dropped, .. } = report;
        let max_length = self.settings.limits.max_length;
        DataError::NothingToCompare { path, rows, dropped, max_length }
    }
}

impl ComparisonReader<'_> {
    /// Truncates or drops responses that are too long. Returns those that are kept, and for each response
    /// its index among the kept ones.
    fn shorten(
        &self,
        prompt: &[u32],
        responses: Vec<Vec<u32>>,
        report: &mut ComparisonReport,
        found: &mut Vec<Finding>,
    ) -> (Vec<Vec<u32>>, Vec<Option<usize>>) {
        let &ComparisonSettings { limits, model, .. } = self.settings;
        let mut kept = Vec::with_capacity(responses.len());
        let mut places = Vec::with_capacity(responses.len());
        for mut response in responses {
            let length = prompt.len() + response.len();
            if let Some(window) = model.map(|limits| limits.window)
                && length > window
            {
                let sentence =
                    format!("has {length} tokens, the model's context window is {window} tokens");
                found.push((Check::OverWindow, sentence));
            }
            report.longest = report.longest.max(length as u64);
            let room = limits.max_length.saturating_sub(prompt.len());
            let fits = match limits.when_long {
                _ if length <= limits.max_length => true,
                WhenTooLong::Cut if room > 0 => {
                    report.truncated += 1;
                    response.truncate(room);
                    true
                }
                WhenTooLong::Cut | WhenTooLong::Drop => {
                    report.dropped += 1;
                    false
                }
            };
            if length > limits.max_length {
                let fate = if fits { "truncated to" } else { "dropped, the limit is" };
                let most = limits.max_length;
                let sentence = format!("prompt and response have {length} tokens, {fate} {most}");
                found.push((Check::Cut, sentence));
            }
            places.push(fits.then_some(kept.len()));
            if fits {
                kept.push(response);
            }
        }
        (kept, places)
    }
}

/// Checks a preference pair.
fn check_pair(pair: &PreferencePair, identical: bool) -> Vec<Finding> {
    let mut found = Vec::new();
    if identical {
        let sentence = "two responses that are compared are the same";
        found.push((Check::IdenticalPairs, sentence.into()));
    }
    if pair.margin < 0.0 {
        let sentence = format!("`margin` is {}: the rejected would be better", pair.margin);
        found.push((Check::WrongMargins, sentence));
    }
    found
}

/// A tokenized row, before the length limit is applied.
struct TokenizedComparison {
    prompt: Vec<u32>,
    responses: Vec<Vec<u32>>,
    pairs: Vec<PreferencePair>,
    /// One label per response; empty if the row has no labels.
    labels: Vec<bool>,
    /// Whether the row is kept even without pairs or labels.
    unjudged: bool,
    ties: u64,
    boundary_mismatch: bool,
}

/// Whether a row is held out, and the tokenized row.
fn tokenized(
    row: ComparisonRow,
    tokenizer: &Tokenizer,
    kind: ComparisonKind,
) -> Result<(bool, TokenizedComparison), RowError> {
    let held_out = is_held_out_text(first_turn_of_responses(&row.responses));
    let (own, joint) = match &row.responses {
        Responses::Texts { prompt, responses } => texts(prompt, responses, tokenizer)?,
        Responses::Messages { prompt, responses, tools } => {
            conversations(prompt, responses, tools.as_ref(), tokenizer)?
        }
    };
    // The shared prompt ends where the first response deviates from it.
    let shared = |tokens: &Vec<u32>| own.iter().zip(tokens).take_while(|(a, b)| a == b).count();
    let given = joint.iter().map(shared).min().unwrap_or_default();
    let mut responses = Vec::with_capacity(joint.len());
    for (i, mut tokens) in joint.into_iter().enumerate() {
        // EOS is part of the response; an EOS within the prompt does not end the response.
        if let (Responses::Texts { .. }, Some(eos)) = (&row.responses, tokenizer.eos())
            && tokens[given..].last() != Some(&eos)
        {
            tokens.push(eos);
        }
        let response = tokens.split_off(given);
        if response.is_empty() {
            return Err(RowError::NoTokens { key: row.key(i) });
        }
        responses.push(response);
    }
    let boundary_mismatch = given < own.len();
    let prompt = own[..given].to_vec();
    let ComparisonRow { pairs, labels, ties, .. } = row;
    let unjudged = kind == ComparisonKind::Any;
    Ok((
        held_out,
        TokenizedComparison { prompt, responses, pairs, labels, unjudged, ties, boundary_mismatch },
    ))
}

/// Tokens of the prompt alone, and of the prompt with each response.
type PromptAndJoint = (Vec<u32>, Vec<Vec<u32>>);

fn texts(
    prompt: &str,
    responses: &[String],
    tokenizer: &Tokenizer,
) -> Result<PromptAndJoint, RowError> {
    let encode = |text: &str| -> Result<Vec<u32>, RowError> {
        Ok(tokenizer.with_bos(tokenizer.encode(text, Special::Parse)?))
    };
    let joint = responses.iter().map(|response| encode(&format!("{prompt}{response}")));
    Ok((encode(prompt)?, joint.collect::<Result<_, _>>()?))
}

fn conversations(
    prompt: &[Message],
    responses: &[Vec<Message>],
    tools: Option<&Value>,
    tokenizer: &Tokenizer,
) -> Result<PromptAndJoint, RowError> {
    let template = tokenizer.chat_template().ok_or(RowError::NoTemplate)?;
    let encode = |messages: &[&Message], asks: bool| -> Result<Vec<u32>, RowError> {
        let values: Vec<Value> = messages.iter().map(|message| message.value.clone()).collect();
        let text = template.render(&values, tools, asks)?;
        Ok(tokenizer.with_bos(tokenizer.encode(&text, Special::Parse)?))
    };
    let given: Vec<&Message> = prompt.iter().collect();
    // Templates fail on an empty conversation, or insert a default system message.
    let own = if given.is_empty() { tokenizer.with_bos(vec![]) } else { encode(&given, true)? };
    let joint = responses.iter().map(|response| {
        let whole: Vec<&Message> = prompt.iter().chain(response).collect();
        encode(&whole, false)
    });
    Ok((own, joint.collect::<Result<_, _>>()?))
}

/// The responses that are in a pair, in order, and the pairs with their new indices.
fn only_paired(
    responses: Vec<Vec<u32>>,
    mut pairs: Vec<PreferencePair>,
) -> (Vec<Vec<u32>>, Vec<PreferencePair>) {
    let paired: HashSet<usize> = pairs.iter().flat_map(|pair| [pair.better, pair.worse]).collect();
    let mut places = vec![0; responses.len()];
    let mut kept = Vec::with_capacity(paired.len());
    for (i, response) in responses.into_iter().enumerate() {
        places[i] = kept.len();
        if paired.contains(&i) {
            kept.push(response);
        }
    }
    for pair in &mut pairs {
        (pair.better, pair.worse) = (places[pair.better], places[pair.worse]);
    }
    (kept, pairs)
}
