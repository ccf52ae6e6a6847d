//! `quantune tokenizer`.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};

use super::{read_text, to_json};
use crate::data::corpus::{matching_files, read_documents};
use crate::text::{PreTokenizerKind, Special, TokenizerTrainer, TrainingReport};
use crate::weights::Checkpoint;

/// Interval of progress messages.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Subcommand)]
pub(super) enum TokenizerCommand {
    /// Print the token ids of a text, without added special tokens
    #[command(after_help = super::examples::ENCODE)]
    Encode(Encode),
    /// Train a byte-level BPE tokenizer with special tokens for documents and chats
    #[command(after_help = super::examples::TOKENIZER_TRAIN)]
    Train(TrainTokenizer),
}

#[derive(Debug, clap::Args)]
pub(super) struct Encode {
    /// Base model: a GGUF file or a Hugging Face folder
    #[arg(long)]
    base: PathBuf,
    /// Text file, UTF-8
    #[arg(long)]
    text: PathBuf,
    /// Parse special tokens in the text
    #[arg(long)]
    parse_special: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct TrainTokenizer {
    /// Files or glob patterns: text, JSONL with `text` or `messages`, or Parquet with `text`; `<|endoftext|>`
    /// lines separate the documents of a text file
    #[arg(long, num_args = 1.., required = true)]
    data: Vec<String>,
    /// Vocabulary size, at least 259
    #[arg(long)]
    vocab_size: usize,
    /// Pre-tokenizer by llama.cpp's name: gpt-2, smollm (single digits) or llama-bpe
    #[arg(long, default_value = "smollm")]
    pre_tokenizer: PreTokenizerKind,
    /// New output folder for tokenizer.json and its config files
    #[arg(long)]
    out: PathBuf,
}

impl TokenizerCommand {
    pub(super) fn run(self, json: bool) -> Result<Value> {
        match self {
            Self::Encode(encode) => encode.run(json),
            Self::Train(train) => train.run(json),
        }
    }
}

impl TrainTokenizer {
    fn run(self, json: bool) -> Result<Value> {
        let Self { data, vocab_size, pre_tokenizer, out } = self;
        let started = Instant::now();
        let mut trainer = TokenizerTrainer::new(vocab_size, pre_tokenizer)?;
        let files = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"];
        if let Some(file) = files.iter().find(|file| out.join(file).exists()) {
            anyhow::bail!("{}: has a {file}, needed a new folder", out.display());
        }
        let files: Vec<Vec<PathBuf>> =
            data.iter().map(|pattern| matching_files(pattern)).collect::<Result<_, _>>()?;
        let (mut reported, mut bytes) = (started, 0);
        // Nothing is written until all files are read, so Ctrl-C may simply exit the program.
        read_documents(&files.concat(), &AtomicBool::new(false), &mut |pieces| {
            trainer.add(pieces)?;
            bytes += pieces.iter().map(|piece| piece.text.len()).sum::<usize>();
            if reported.elapsed() >= REPORT_INTERVAL {
                reported = Instant::now();
                eprintln!("counted the words of {:.0} MB", bytes as f64 / 1e6);
            }
            Ok(())
        })?;
        let trained = trainer.train()?;
        trained.write(&out)?;
        let (report, seconds) = (&trained.report, started.elapsed().as_secs_f64());
        print_report(report, vocab_size, seconds);
        if !json {
            crate::cli::say!("{}", out.display());
        }
        let mut result = to_json(report)?;
        result["seconds"] = json!(seconds);
        result["pre_tokenizer"] = json!(pre_tokenizer.name());
        result["tokenizer"] = json!(out);
        Ok(result)
    }
}

fn print_report(report: &TrainingReport, asked: usize, seconds: f64) {
    let TrainingReport { vocab_size, bytes, words, bytes_per_token, .. } = report;
    eprintln!(
        "{vocab_size} tokens from {:.1} MB of text ({words} distinct words) in {seconds:.1} s: \
         {bytes_per_token:.3} bytes per token",
        *bytes as f64 / 1e6
    );
    if *vocab_size < asked {
        eprintln!(
            "warning: the vocabulary has {vocab_size} tokens, not {asked}: no further pair of tokens occurs twice"
        );
    }
}

impl Encode {
    fn run(self, json: bool) -> Result<Value> {
        let Self { base, text, parse_special } = self;
        let tokenizer = crate::text::Tokenizer::open(&Checkpoint::open(base)?)?;
        let special = if parse_special { Special::Parse } else { Special::AsText };
        let ids = tokenizer.encode(&read_text(&text)?, special)?;
        if !json {
            let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
            crate::cli::say!("{}", ids.join(" "));
        }
        Ok(json!({ "tokens": ids.len(), "token_ids": ids }))
    }
}
