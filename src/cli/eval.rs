//! `quantune eval`.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{AdapterArg, load_adapters, open_tokenizer, read_text, to_json};
use crate::data::Dataset;
use crate::eval::{evaluate, perplexity};
use crate::model::{Adapters, Decoder};
use crate::ops::Compute;
use crate::text::Special;
use crate::weights::Checkpoint;

#[derive(Debug, clap::Args)]
pub struct Eval {
    /// The base: a GGUF file or a Hugging Face folder
    #[arg(long)]
    base: PathBuf,
    /// A PEFT adapter folder, PATH or PATH=WEIGHT; may be given again
    #[arg(long)]
    adapter: Vec<AdapterArg>,
    /// Rows, scored under the masks of training
    #[arg(long, required_unless_present = "text", conflicts_with = "text")]
    data: Option<PathBuf>,
    /// Tokens of an example of --data: a longer `text` is split into several, longer `messages`,
    /// `prompt`/`completion` and `input_ids` rows are cut at their end [default: 1024]
    #[arg(long, conflicts_with = "text")]
    max_length: Option<usize>,
    /// A text, scored as llama.cpp's perplexity: in chunks, the second half of each
    #[arg(long)]
    text: Option<PathBuf>,
    /// Tokens of a chunk of --text [default: 512]
    #[arg(long, conflicts_with = "data")]
    n_ctx: Option<usize>,
    /// The day, YYYY-MM-DD, that a chat template with a date shows [default: today]
    #[arg(long, conflicts_with = "text")]
    template_date: Option<String>,
    /// How products are computed: int16 (block-floating, nearly twice f32's speed), int8 (faster
    /// still, rougher), f32 (exact), or portable (the slow reference form) [default: int16]
    #[arg(long)]
    compute: Option<Compute>,
}

impl Eval {
    pub fn run(self, json: bool) -> Result<Value> {
        let checkpoint = Checkpoint::open(&self.base)?;
        let decoder = Decoder::load(&checkpoint, self.compute.unwrap_or_default())?;
        let tokenizer = open_tokenizer(&checkpoint, self.template_date.as_deref())?;
        let worn = load_adapters(&self.adapter, &decoder)?;
        let adapters = Adapters::Same(&worn);
        let (loss, report) = match (&self.data, &self.text) {
            (Some(data), _) => {
                let max_length = self.max_length.unwrap_or(1024);
                let max_length = max_length.min(decoder.config.max_position_embeddings);
                let never = AtomicBool::new(false); // nothing is lost: Ctrl-C ends the process
                let data = Dataset::load(data, &tokenizer, max_length, &never)?;
                eprintln!("data: {}", data.report);
                let loss = evaluate(&decoder, adapters, &data.examples, &never)?;
                (loss.context("stopped")?, Some(data.report))
            }
            (None, Some(text)) => {
                let ids = tokenizer.encode(&read_text(text)?, Special::AsText)?;
                let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
                let ids = tokenizer.with_bos(ids);
                (perplexity(&decoder, adapters, &ids, self.n_ctx.unwrap_or(512), bos)?, None)
            }
            (None, None) => bail!("needed --data or --text"),
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
}
