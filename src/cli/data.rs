//! `quantune data`: validates a dataset before training.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Result, bail};
use serde_json::{Map, Value, json};

use super::{TemplateFlags, open_tokenizer, set_template_date, to_json};
use crate::data::checks::{Check, CheckReport, RowHashes};
use crate::data::{
    AlpacaPrompt, ComparisonKind, ComparisonSettings, Comparisons, DataFile, Dataset, FileRows,
    LengthLimits, LoadSettings, ModelLimits, PromptSettings, Prompts, RowFormat, WhenTooLong,
    first_row_format,
};
use crate::model::Config;
use crate::text::{AddedTokenSpec, Tokenizer};
use crate::weights::Checkpoint;

#[derive(Debug, clap::Args)]
pub(super) struct Data {
    /// Base model: a GGUF file or a Hugging Face folder; only its tokenizer and config are read
    #[arg(long)]
    base: PathBuf,
    /// Data file, JSONL or Parquet, in any format that a trainer reads; can be repeated
    #[arg(long, required = true, value_name = "PATH[=WEIGHT]")]
    data: Vec<DataFile>,
    /// Held-out data file, checked for duplicates of --data
    #[arg(long)]
    eval_data: Option<PathBuf>,
    /// Maximum number of tokens of an example, as in training, or of a `prompt` [default: 1024]
    #[arg(long)]
    max_length: Option<usize>,
    /// Prompt format of `instruction`, `input` and `output` rows: chat (chat template) or text (Alpaca's own
    /// prompt) [default: chat, or text without a chat template]
    #[arg(long)]
    alpaca_prompt: Option<AlpacaPrompt>,
    #[command(flatten)]
    template: TemplateFlags,
    /// Current date in chat templates that print one, YYYY-MM-DD [default: today]
    #[arg(long)]
    template_date: Option<String>,
    /// Tokens that training adds to the vocabulary, as in `sft`, including those of its --adapter and
    /// --frozen-adapter
    #[arg(long, value_delimiter = ',', num_args = 1.., value_name = "TOKEN")]
    add_tokens: Vec<String>,
    /// Special tokens that training would add, such as <|tool|>
    #[arg(long, value_delimiter = ',', num_args = 1.., value_name = "TOKEN")]
    add_special_tokens: Vec<String>,
    /// Checks to ignore, by the names that are printed: no failure, and not reported
    #[arg(long, value_delimiter = ',', value_name = "CHECK")]
    allow: Vec<Check>,
    /// Print the first N rows as the trainer sees them, with learned tokens coloured, or in [[brackets]] without
    /// colours; for `prompt`s, where the reply begins
    #[arg(long, value_name = "N")]
    show_masks: Option<usize>,
}

/// The validation result of a file.
struct ValidatedFile {
    path: PathBuf,
    checks: CheckReport,
    hashes: RowHashes,
    report: Value,
    counts: String,
}

impl Data {
    pub(super) fn run(self, json: bool) -> Result<Value> {
        let checkpoint = Checkpoint::open(&self.base)?;
        let config = Config::read(&checkpoint)?;
        let added = AddedTokenSpec::list(&self.add_tokens, &self.add_special_tokens)?;
        let tokenizer = open_tokenizer(&checkpoint, &[], None)?;
        let mut tokenizer = tokenizer.with_added(&checkpoint, &added)?;
        set_template_date(&mut tokenizer, self.template_date.as_deref())?;
        self.template.change(&mut tokenizer)?;
        let window = config.max_position_embeddings;
        let vocab_size = config.vocab_size.max(tokenizer.rows_needed());
        let limits = ModelLimits { window, vocab_size };

        let files: Vec<&Path> = self.data.iter().map(|file| &*file.path).collect();
        let mut validated = Vec::new();
        for path in &files {
            validated.push(self.validate(path, &tokenizer, limits)?);
            if let Some(count) = self.show_masks.filter(|_| !json) {
                self.show(path, &tokenizer, limits, count)?;
            }
        }
        if let Some(path) = &self.eval_data {
            let mut held_out = self.validate(path, &tokenizer, limits)?;
            for file in &validated {
                file.hashes.report_held_out_duplicates(
                    &file.path,
                    &held_out.hashes,
                    &mut held_out.checks,
                );
            }
            validated.push(held_out);
        }
        let mut faults = Vec::new();
        for ValidatedFile { path, checks, counts, .. } in &validated {
            if !json {
                crate::cli::say!("{}: {checks}\n  {counts}", path.display());
            }
            checks.warnings(path, &self.allow).iter().for_each(|w| eprintln!("warning: {w}"));
            faults.extend(checks.verify(path, &self.allow).err());
        }
        if json {
            // The JSON object contains the findings, so it is printed before the failure.
            let files: Vec<Value> =
                validated.iter().map(ValidatedFile::json).collect::<Result<_>>()?;
            let value = json!({ "files": files, "defects": faults.len() });
            if !faults.is_empty() {
                crate::cli::say!("{value}");
            }
            self.fail(faults)?;
            return Ok(value);
        }
        self.fail(faults)?;
        Ok(Value::Null)
    }

    fn fail(&self, faults: Vec<crate::data::DataError>) -> Result<()> {
        let errors: Vec<String> = faults.iter().map(ToString::to_string).collect();
        if errors.is_empty() { Ok(()) } else { bail!("{}", errors.join("\n")) }
    }

    fn validate(
        &self,
        path: &Path,
        tokenizer: &Tokenizer,
        model: ModelLimits,
    ) -> Result<ValidatedFile> {
        let never = AtomicBool::new(false); // Ctrl-C exits the process, nothing is lost
        match self.kind(path, model)? {
            DatasetKind::Examples(settings) => {
                ValidatedFile::of(path, Dataset::examine(path, tokenizer, &settings, &never)?)
            }
            DatasetKind::Comparisons(settings, kind) => ValidatedFile::of(
                path,
                Comparisons::examine(path, tokenizer, &settings, kind, &never)?,
            ),
            DatasetKind::Prompts(settings) => {
                ValidatedFile::of(path, Prompts::examine(path, tokenizer, &settings, &never)?)
            }
        }
    }

    /// What the rows of a file are read as, by the format of the first.
    fn kind(&self, path: &Path, model: ModelLimits) -> Result<DatasetKind> {
        let max_length = self.max_length.unwrap_or(1024).min(model.window);
        let (allow, alpaca, model) = (self.allow.clone(), self.alpaca_prompt, Some(model));
        let limits = LengthLimits { max_length, when_long: WhenTooLong::Cut };
        let kind = match first_row_format(path)? {
            Some(RowFormat::Compared | RowFormat::Ranked) => ComparisonKind::Pairs,
            Some(RowFormat::Labelled) => ComparisonKind::Labels,
            Some(RowFormat::Prompt) => {
                return Ok(DatasetKind::Prompts(PromptSettings { max_length, allow, cache: None }));
            }
            _ => {
                let cache = None;
                let settings = LoadSettings { max_length, alpaca, allow, model, cache };
                return Ok(DatasetKind::Examples(settings));
            }
        };
        Ok(DatasetKind::Comparisons(ComparisonSettings { limits, allow, model, cache: None }, kind))
    }

    /// Prints the first rows as the trainer sees them.
    fn show(
        &self,
        path: &Path,
        tokenizer: &Tokenizer,
        model: ModelLimits,
        count: usize,
    ) -> Result<()> {
        let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let show = |line: u64, tokens: &[u32], learned: &[bool], ends: bool| -> Result<()> {
            crate::cli::say!("{}:{line}:", path.display());
            let mut text = with_mask((tokens, learned), tokenizer, colours)?;
            if ends {
                text.push_str(&marked("…", colours)); // where the reply begins
            }
            crate::cli::say!("{text}");
            Ok(())
        };
        match self.kind(path, model)? {
            DatasetKind::Examples(settings) => {
                for example in Dataset::first(path, tokenizer, &settings, count)? {
                    show(example.line, &example.tokens, &example.learned, false)?;
                }
            }
            DatasetKind::Comparisons(settings, kind) => {
                for row in Comparisons::first(path, tokenizer, &settings, kind, count)? {
                    for response in &row.responses {
                        let given = row.prompt.len();
                        let tokens = [&row.prompt[..], response].concat();
                        let learned: Vec<bool> = (0..tokens.len()).map(|i| i >= given).collect();
                        show(row.line, &tokens, &learned, false)?;
                    }
                }
            }
            DatasetKind::Prompts(settings) => {
                for prompt in Prompts::first(path, tokenizer, &settings, count)? {
                    let learned = vec![false; prompt.tokens.len()];
                    show(prompt.line, &prompt.tokens, &learned, true)?;
                }
            }
        }
        Ok(())
    }
}

/// What rows are read as.
enum DatasetKind {
    Examples(LoadSettings),
    Comparisons(ComparisonSettings, ComparisonKind),
    Prompts(PromptSettings),
}

impl ValidatedFile {
    fn of<T, R: serde::Serialize + std::fmt::Display>(
        path: &Path,
        data: FileRows<T, R>,
    ) -> Result<Self> {
        let (report, counts) = (to_json(&data.report)?, data.report.to_string());
        let FileRows { checks, hashes, .. } = data;
        Ok(Self { path: path.to_path_buf(), checks, hashes, report, counts })
    }

    fn json(&self) -> Result<Value> {
        let mut value = Map::new();
        value.insert("path".into(), json!(self.path));
        value.insert("report".into(), self.report.clone());
        let Value::Object(checks) = to_json(&self.checks)? else { bail!("no object") };
        value.extend(checks);
        Ok(Value::Object(value))
    }
}

/// The text of a row, with learned parts in green or in brackets.
fn with_mask(
    (tokens, learned): (&[u32], &[bool]),
    tokenizer: &Tokenizer,
    colours: bool,
) -> Result<String> {
    let mut text = String::new();
    let mut start = 0;
    for run in learned.chunk_by(|a, b| a == b) {
        let piece = tokenizer.decode(&tokens[start..start + run.len()], false)?;
        start += run.len();
        match run[0] {
            true => text.push_str(&marked(&piece, colours)),
            false => text.push_str(&piece),
        }
    }
    Ok(text)
}

fn marked(piece: &str, colours: bool) -> String {
    let (open, close) = if colours { ("\u{1b}[32m", "\u{1b}[0m") } else { ("[[", "]]") };
    format!("{open}{piece}{close}")
}
