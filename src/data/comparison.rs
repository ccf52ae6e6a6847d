//! Responses to a prompt that are compared, or labelled good or bad: rows of reward models, of DPO
//! and its kin.
//!
//! Tokens are those of TRL's RewardTrainer, DPOTrainer and KTOTrainer: prompt and response are
//! tokenized jointly, and the prompt's part ends where its own tokens and the joint ones of any
//! response part. So prompt and response laid end to end are what the row says, and the prompt is
//! the same for all its responses.
//!
//! Two things are not TRL's. Its DPOTrainer takes what two *strings* without a prompt have in common
//! for the prompt; here they are whole texts, whose common beginning drops out of any difference of
//! log-probs. And where `chosen` and `rejected` become two labelled responses, they share a prompt.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use serde::Serialize;
use serde_json::Value;

use super::lines::{Line, read, to_held_out};
use super::rows::{ComparisonRow, Responses};
use super::split::is_held_out_text;
use super::{DataError, Message, RowError};
use crate::text::{Special, Tokenizer};

/// A prompt and the responses to it that are compared.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// The prompt's tokens; none, or a BOS, where whole texts are compared.
    pub prompt: Vec<u32>,
    /// Those that follow it in each response.
    pub responses: Vec<Vec<u32>>,
    /// Which of them is preferred to which.
    pub pairs: Vec<Pair>,
    /// Whether the one response is good, in a row that says so (KTO).
    pub label: Option<bool>,
    /// The row in its file, counted from 0 over lines that are not blank.
    pub row: u64,
    /// Its line, counted from 1.
    pub line: u64,
}

impl Comparison {
    /// Tokens of prompt and responses, the prompt counted once.
    pub fn tokens(&self) -> usize {
        self.prompt.len() + self.responses.iter().map(Vec::len).sum::<usize>()
    }
}

/// Two responses by their places.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    /// The preferred one.
    pub better: usize,
    /// The other.
    pub worse: usize,
    /// By how much, where the row says so.
    pub margin: f32,
}

/// What is wanted of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ComparisonKind {
    /// Responses compared with each other: `chosen`/`rejected` or ranked `responses`.
    Pairs,
    /// Responses labelled one by one: `completion` + `label`; `chosen` and `rejected` become two.
    Labels,
    /// Whatever has responses, compared or not: also `completion` or `text` alone.
    Any,
}

/// How long prompt and response may be together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Tokens, at most.
    pub max_length: usize,
    /// What becomes of a response with more.
    pub when_long: WhenTooLong,
}

/// What becomes of a response too long for its prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenTooLong {
    /// It is left out with its pairs: a score is of a whole text (TRL's RewardTrainer).
    Drop,
    /// Its end is, unless its prompt leaves no room at all (TRL's DPOTrainer, `keep_start`).
    Cut,
}

/// The comparisons of a file, in its order.
#[derive(Debug, Clone)]
pub struct Comparisons {
    /// Rows with something to learn.
    pub comparisons: Vec<Comparison>,
    /// What was counted on the way.
    pub report: ComparisonReport,
    /// SHA-256 of the whole file, in hex.
    pub sha256: String,
}

/// A file in two parts, no prompt in both.
#[derive(Debug, Clone)]
pub struct ComparisonSplit {
    /// What is trained on.
    pub train: Comparisons,
    /// What is held out; small files may leave nothing to it.
    pub held_out: Option<Comparisons>,
    /// The held-out rows as the file has them, byte for byte, each with a newline.
    pub held_out_lines: Vec<u8>,
}

/// What a file's rows came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ComparisonReport {
    /// Rows read, those with nothing to compare included.
    pub rows: u64,
    /// Responses kept.
    pub responses: u64,
    /// Pairs of them.
    pub pairs: u64,
    /// Responses labelled good.
    pub desirable: u64,
    /// Responses labelled bad.
    pub undesirable: u64,
    /// Tokens kept, those of a prompt counted once.
    pub tokens: u64,
    /// Tokens of the longest prompt with response, before any cut.
    pub longest: u64,
    /// Responses cut at their end.
    pub truncated: u64,
    /// Responses left out for their length.
    pub dropped: u64,
    /// Rows left out because nothing of them is compared (or labelled) any more.
    pub nothing_to_compare: u64,
    /// Pairs of responses ranked the same: no pairs.
    pub ties: u64,
    /// Pairs of responses with the same tokens, kept as TRL keeps them: nothing tells them apart.
    pub identical: u64,
    /// Rows in which a token reaches from the prompt into a response.
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

impl Comparisons {
    /// Reads and tokenizes all rows of a JSONL file. Ends early once `stop` is set.
    ///
    /// # Errors
    /// All wrong rows, the first few with their lines; a file without rows, or in which nothing is
    /// compared; [`DataError::Stopped`].
    pub fn load(
        path: &Path,
        tokenizer: &Tokenizer,
        limits: Limits,
        kind: ComparisonKind,
        stop: &AtomicBool,
    ) -> Result<Self, DataError> {
        let mut all = Part::default();
        let parse = |bytes: &[u8]| tokenized(bytes, tokenizer, kind);
        let sha256 = read(path, stop, parse, |line, (_, row)| all.add(line, row, limits))?;
        all.finish(path, sha256, limits)
    }

    /// The same in two parts: one row in ten is held out by its prompt, as
    /// [`is_held_out`](super::is_held_out) says; rows that compare whole texts by the best of them,
    /// which may come again as the worse one of a row in the other part.
    ///
    /// # Errors
    /// As [`Comparisons::load`], and if no row is left to train on.
    pub fn load_split(
        path: &Path,
        tokenizer: &Tokenizer,
        limits: Limits,
        kind: ComparisonKind,
        stop: &AtomicBool,
    ) -> Result<ComparisonSplit, DataError> {
        let (mut train, mut held_out) = (Part::default(), Part::default());
        let mut held_out_lines = Vec::new();
        let parse = |bytes: &[u8]| tokenized(bytes, tokenizer, kind);
        let sha256 = read(path, stop, parse, |line, (is_held_out, row)| {
            if !is_held_out {
                return train.add(line, row, limits);
            }
            to_held_out(&mut held_out_lines, line);
            held_out.add(line, row, limits);
        })?;
        if train.report.rows == 0 && held_out.report.rows > 0 {
            return Err(DataError::AllHeldOut { path: path.into(), rows: held_out.report.rows });
        }
        let train = train.finish(path, sha256.clone(), limits)?;
        let held_out = held_out.finish(path, sha256, limits).ok();
        Ok(ComparisonSplit { train, held_out, held_out_lines })
    }
}

/// A row as tokens, before anything is too long.
struct Tokenized {
    prompt: Vec<u32>,
    responses: Vec<Vec<u32>>,
    pairs: Vec<Pair>,
    /// For each response, or for none.
    labels: Vec<bool>,
    /// Whether a row without pairs or labels is kept.
    unjudged: bool,
    ties: u64,
    boundary_mismatch: bool,
}

/// Whether a line's row is held out, and its tokens.
fn tokenized(
    bytes: &[u8],
    tokenizer: &Tokenizer,
    kind: ComparisonKind,
) -> Result<(bool, Tokenized), RowError> {
    let row = ComparisonRow::parse(bytes, kind)?;
    let held_out = is_held_out_text(row.responses.first_turn());
    let (own, joint) = match &row.responses {
        Responses::Texts { prompt, responses } => texts(prompt, responses, tokenizer)?,
        Responses::Messages { prompt, responses, tools } => {
            conversations(prompt, responses, tools.as_ref(), tokenizer)?
        }
    };
    // A prompt is shared by its responses only as far as all of them begin with it.
    let shared = |tokens: &Vec<u32>| own.iter().zip(tokens).take_while(|(a, b)| a == b).count();
    let given = joint.iter().map(shared).min().unwrap_or_default();
    let mut responses = Vec::with_capacity(joint.len());
    for (i, mut tokens) in joint.into_iter().enumerate() {
        // What EOS there is belongs to the response: a prompt's own ends nothing.
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
        Tokenized { prompt, responses, pairs, labels, unjudged, ties, boundary_mismatch },
    ))
}

/// Tokens of the prompt alone, and of it with each response.
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
    // Templates fail on no messages at all, or put a system message of their own there.
    let own = if given.is_empty() { tokenizer.with_bos(vec![]) } else { encode(&given, true)? };
    let joint = responses.iter().map(|response| {
        let whole: Vec<&Message> = prompt.iter().chain(response).collect();
        encode(&whole, false)
    });
    Ok((own, joint.collect::<Result<_, _>>()?))
}

#[derive(Default)]
struct Part {
    comparisons: Vec<Comparison>,
    report: ComparisonReport,
}

impl Part {
    fn add(&mut self, line: &Line, row: Tokenized, limits: Limits) {
        let Tokenized { prompt, responses, mut pairs, labels, unjudged, .. } = row;
        let report = &mut self.report;
        report.rows += 1;
        report.ties += row.ties;
        report.boundary_mismatches += u64::from(row.boundary_mismatch);

        let mut kept = Vec::with_capacity(responses.len());
        let mut places = Vec::with_capacity(responses.len()); // of each response among the kept
        for mut response in responses {
            let length = prompt.len() + response.len();
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
            places.push(fits.then_some(kept.len()));
            if fits {
                response.shrink_to_fit();
                kept.push(response);
            }
        }
        pairs.retain(|pair| places[pair.better].is_some() && places[pair.worse].is_some());
        for pair in &mut pairs {
            let place = |old: usize| places[old].expect("kept: the pair was");
            (pair.better, pair.worse) = (place(pair.better), place(pair.worse));
            report.identical += u64::from(kept[pair.better] == kept[pair.worse]);
        }

        let comparison = |responses, pairs, label| Comparison {
            prompt: prompt.clone(),
            responses,
            pairs,
            label,
            row: line.row,
            line: line.number,
        };
        let before = self.comparisons.len();
        if labels.is_empty() {
            // A response in no pair would be computed for nothing.
            let (responses, pairs) =
                if unjudged { (kept, pairs) } else { only_paired(kept, pairs) };
            if !responses.is_empty() {
                self.comparisons.push(comparison(responses, pairs, None));
            }
        } else {
            let kept_labels = labels.iter().zip(&places).filter(|(_, place)| place.is_some());
            for ((&label, _), response) in kept_labels.zip(kept) {
                *if label { &mut report.desirable } else { &mut report.undesirable } += 1;
                self.comparisons.push(comparison(vec![response], Vec::new(), Some(label)));
            }
        }
        report.nothing_to_compare += u64::from(self.comparisons.len() == before);
        for comparison in &self.comparisons[before..] {
            report.responses += comparison.responses.len() as u64;
            report.pairs += comparison.pairs.len() as u64;
            report.tokens += comparison.tokens() as u64;
        }
    }

    fn finish(self, path: &Path, sha256: String, limits: Limits) -> Result<Comparisons, DataError> {
        let Self { comparisons, report } = self;
        let path = path.to_path_buf();
        if report.rows == 0 {
            return Err(DataError::Empty { path });
        }
        if comparisons.is_empty() {
            let ComparisonReport { rows, dropped, .. } = report;
            let max_length = limits.max_length;
            return Err(DataError::NothingToCompare { path, rows, dropped, max_length });
        }
        Ok(Comparisons { comparisons, report, sha256 })
    }
}

/// The responses that are in a pair, in their order, and the pairs by their new places.
fn only_paired(responses: Vec<Vec<u32>>, mut pairs: Vec<Pair>) -> (Vec<Vec<u32>>, Vec<Pair>) {
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
