//! `quantune eval`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

use super::loading::Loading;
use super::printer;
use super::replies::Replies;
use super::{TemplateFlags, load_adapters, open_tokenizer, paths, read_text, to_json};
use crate::data::{Comparison, ComparisonKind, Comparisons, Dataset, LengthLimits, WhenTooLong};
use crate::eval::{evaluate, perplexity};
use crate::model::{ActiveAdapter, Decoder};
use crate::objectives::reward::CalibrationBin;
use crate::text::{Special, Tokenizer};
use crate::train::read_scoring;
use crate::train::settings::AdapterPath;
use crate::train::supervised::evaluate_rewards;
use crate::weights::{Checkpoint, write_atomically};

#[derive(Debug, clap::Args)]
pub(super) struct Eval {
    /// Base model: a GGUF file or a Hugging Face folder
    #[arg(long)]
    base: PathBuf,
    /// PEFT adapter folder, PATH or PATH=WEIGHT; can be repeated
    #[arg(long)]
    adapter: Vec<AdapterPath>,
    /// Rows: loss under the loss masks of training, or scores by --reward
    #[arg(long, required_unless_present_any = ["text", "prompts"], conflicts_with = "text")]
    data: Option<PathBuf>,
    /// Reward model, as `reward` writes it: scores the responses of --data, and reports its accuracy on
    /// preference pairs; with --prompts it scores the replies, and may also be a rule as in grpo
    #[arg(long, alias = "reward-adapter", value_name = "ADAPTER", conflicts_with = "text")]
    reward: Option<String>,
    /// With --reward and --data: output file for the scores, one JSON line per row
    #[arg(long, value_name = "FILE", requires = "data", requires = "reward")]
    scores: Option<PathBuf>,
    #[command(flatten)]
    replies: Replies,
    /// Maximum number of tokens of an example of --data. A longer `text` is split; longer `messages`,
    /// `prompt`/`completion` and `input_ids` rows are truncated [default: 1024]
    #[arg(long, conflicts_with_all = ["text", "prompts"])]
    max_length: Option<usize>,
    /// Text file: perplexity as in llama.cpp, over the second half of each chunk
    #[arg(long)]
    text: Option<PathBuf>,
    /// Chunk size of --text in tokens [default: 512]
    #[arg(long, conflicts_with_all = ["data", "prompts"])]
    n_ctx: Option<usize>,
    #[command(flatten)]
    template: TemplateFlags,
    /// Current date in chat templates that print one, YYYY-MM-DD [default: today]
    #[arg(long, conflicts_with = "text")]
    template_date: Option<String>,
    #[command(flatten)]
    loading: Loading,
}

impl Eval {
    pub(super) fn run(self, json: bool) -> Result<Value> {
        let checkpoint = Checkpoint::open(&self.base)?;
        let mut adapters = paths(&self.adapter);
        adapters.extend(self.reward.as_deref().map(Path::new));
        let against = self.replies.against()?;
        adapters.extend(against.as_ref().map(|other| &*other.path));
        let mut tokenizer = open_tokenizer(&checkpoint, &adapters, self.template_date.as_deref())?;
        let decoder = self.loading.decoder(&checkpoint, &tokenizer)?;
        self.template.change(&mut tokenizer)?;
        match (&self.reward, &self.data) {
            (Some(reward), _) if self.replies.asked() => {
                return self.replies.run(&decoder, &tokenizer, &self.adapter, reward, json);
            }
            (Some(reward), Some(data)) => {
                return self.rewards(Path::new(reward), data, &decoder, &tokenizer, json);
            }
            _ => {}
        }
        let active = load_adapters(&self.adapter, &decoder)?;
        let (loss, report) = match (&self.data, &self.text) {
            (Some(data), _) => {
                let max_length = self.max_length.unwrap_or(1024);
                let max_length = max_length.min(decoder.config.max_position_embeddings);
                let never = AtomicBool::new(false); // nothing is lost: Ctrl-C ends the process
                let data = Dataset::load(data, &tokenizer, max_length, &never)?;
                eprintln!("data: {}", data.report);
                let loss = evaluate(&decoder, &active, &data.rows, &never)?;
                (loss.context("stopped")?, Some(data.report))
            }
            (None, Some(text)) => {
                let ids = tokenizer.encode(&read_text(text)?, Special::AsText)?;
                let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
                let ids = tokenizer.with_bos(ids);
                (perplexity(&decoder, &active, &ids, self.n_ctx.unwrap_or(512), bos)?, None)
            }
            (None, None) => bail!("requires --data or --text"),
        };
        if !json {
            let (l, p) = (loss.loss, loss.perplexity());
            crate::cli::say!("loss {l:.4}, perplexity {p:.4} over {} tokens", loss.tokens);
        }
        let mut value = json!({
            "loss": loss.loss,
            "perplexity": loss.perplexity(),
            "tokens": loss.tokens,
            "rows": loss.rows,
            "kernels": decoder.kernels(),
        });
        if let Some(report) = report {
            value["data"] = to_json(&report)?;
        }
        Ok(value)
    }

    /// Scores of responses by a reward model, and its accuracy on preference pairs.
    fn rewards(
        &self,
        folder: &Path,
        data: &Path,
        decoder: &Decoder,
        tokenizer: &Tokenizer,
        json: bool,
    ) -> Result<Value> {
        if !self.adapter.is_empty() {
            bail!(
                "--adapter with --reward requires --prompts; --data is scored by the reward model alone"
            );
        }
        let active =
            [ActiveAdapter::frozen(Arc::new(read_scoring(folder, decoder, printer::monitor())?))];
        let max_length = self.max_length.unwrap_or(1024);
        let max_length = max_length.min(decoder.config.max_position_embeddings);
        let limits = LengthLimits { max_length, when_long: WhenTooLong::Drop };
        let never = AtomicBool::new(false); // nothing is lost: Ctrl-C ends the process
        let data = Comparisons::load(data, tokenizer, limits, ComparisonKind::Any, &never)?;
        eprintln!("data: {}", data.report);
        let judged = evaluate_rewards(decoder, &active, &data.rows, 0.0, printer::monitor())?;
        let judged = judged.context("stopped")?;
        if let Some(path) = &self.scores {
            let line = |(row, scores): (Comparison, &Vec<f32>)| {
                format!("{}\n", json!({ "line": row.line, "scores": scores }))
            };
            let lines: String = data.rows.iter().zip(&judged.scores).map(line).collect();
            write_atomically(path, |file| file.write_all(lines.as_bytes()))?;
        }
        let mut value = Map::new();
        value.insert("rows".into(), json!(data.rows.len()));
        let paired = judged.stats.pairs > 0;
        let of_pairs = ["loss", "accuracy", "margin", "pairs", "calibration_error", "brier"];
        let numbers = judged.numbers().into_iter();
        value.extend(numbers.filter(|(key, _)| paired || !of_pairs.contains(&key.as_str())));
        if paired {
            let bin = |bin: &CalibrationBin| {
                let pairs = bin.pairs.max(1) as f64;
                json!({
                    "pairs": bin.pairs,
                    "expected": bin.expected / pairs,
                    "observed": bin.observed / pairs,
                })
            };
            let bins: Vec<Value> =
                judged.calibration.bins.iter().filter(|bin| bin.pairs > 0).map(bin).collect();
            value.insert("calibration".into(), json!(bins));
        }
        if !json {
            let number = |key: &str| value.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN);
            if paired {
                crate::cli::say!(
                    "accuracy {:.1} % on {} pairs, calibration error {:.3}",
                    number("accuracy") * 100.0,
                    judged.stats.pairs,
                    number("calibration_error")
                );
                crate::cli::say!("confidence     accuracy    pairs");
                for bin in judged.calibration.bins.iter().filter(|bin| bin.pairs > 0) {
                    let pairs = bin.pairs as f64;
                    crate::cli::say!(
                        "{:>8.1} % {:>10.1} % {:>8}",
                        bin.expected / pairs * 100.0,
                        bin.observed / pairs * 100.0,
                        bin.pairs
                    );
                }
            }
            crate::cli::say!("mean score {:.4}", number("mean_reward"));
        }
        value.insert("data".into(), to_json(&data.report)?);
        value.insert("kernels".into(), json!(decoder.kernels()));
        Ok(Value::Object(value))
    }
}
