//! The command line: flags, printing, exit codes. Nothing else knows it.
//!
//! People read progress on stderr and results on stdout; with `--json` stdout ends in one JSON
//! object on a line. Exit code 0 is done, 1 failed, 2 wrong usage.

/// Prints a line; where nobody reads stdout any more, ends quietly.
macro_rules! say {
    ($($arg:tt)*) => {{
        use std::io::Write;
        if writeln!(std::io::stdout(), $($arg)*).is_err() {
            std::process::exit(0);
        }
    }};
}
use say;

mod best_of;
mod chat;
mod combining;
mod data;
mod eval;
mod export;
mod generate;
mod inspect;
mod loading;
mod merge;
mod pretrain;
mod quickstart;
mod replies;
mod tokenizer;
mod train;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use serde_json::{Value, json};

use crate::export::lora;
use crate::isa::Isa;
use crate::model::{Decoder, Worn};
use crate::text::{Tokenizer, first_second};
use crate::train::path_and_weight;
use crate::train::settings::{DpoFlags, GrpoFlags, PpoFlags, RewardFlags, SftFlags};
use crate::weights::Checkpoint;

/// LoRA fine-tuning straight on the quantized weights you already run.
#[derive(Debug, Parser)]
#[command(name = "quantune", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, clap::Args)]
struct Common {
    /// End with one JSON object on the last line of stdout
    #[arg(long, global = true)]
    json: bool,
    /// Threads [default: all cores]
    #[arg(long, global = true)]
    threads: Option<usize>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The whole life of a small model in a few minutes, from random weights to PPO
    Quickstart(quickstart::Quickstart),
    /// Train a base from random weights, or another base's every weight, on a mixture of texts
    Pretrain(Box<pretrain::Pretrain>),
    /// Fine-tune: train a LoRA adapter on chats, prompts or text
    Sft(Box<train::Train<SftFlags>>),
    /// Train a reward model: a score of responses, from comparisons
    Reward(Box<train::Train<RewardFlags>>),
    /// Learn from comparisons without a reward model (DPO, IPO, ORPO, SimPO, KTO)
    Dpo(Box<train::Train<DpoFlags>>),
    /// Learn from a reward model by reinforcement (PPO)
    Ppo(Box<train::Train<PpoFlags>>),
    /// Learn from rewards of any kind by comparing responses to a prompt (GRPO, RLOO)
    Grpo(Box<train::Train<GrpoFlags>>),
    /// Loss on rows, perplexity of a text, scores by a reward model, or replies judged and compared
    Eval(Box<eval::Eval>),
    /// Answer a prompt
    Generate(Box<generate::Generate>),
    /// Talk with a model, adapters swapped between replies
    ///
    /// Lines are messages, and those that begin with a slash are commands: /help lists them. A line
    /// that ends in a backslash goes on with the next. Ctrl-C ends a reply, Ctrl-D the program. Where
    /// stdin is no terminal its lines are read as if they were typed, replies go to stdout, and the
    /// first fault ends the program. There is no JSON result: a conversation has no one answer, and
    /// /save writes it as a row of training data.
    Chat(Box<chat::Chat>),
    /// Merge adapters into their base: a Hugging Face folder or a GGUF of any type
    Merge(Box<merge::Merge>),
    /// Write a base as a GGUF of another type
    Quantize(Box<merge::Quantize>),
    /// Write an adapter as a GGUF LoRA or a PEFT folder, or a Modelfile for Ollama
    Export(export::Export),
    /// List what a GGUF, safetensors or adapter file holds
    Inspect(inspect::Inspect),
    /// Look at rows as a trainer would: what is learned of them, and what is wrong with them
    Data(Box<data::Data>),
    /// Turn text into token ids
    #[command(subcommand)]
    Tokenizer(tokenizer::TokenizerCommand),
}

/// Stack of a thread: candle walks the portable form's graphs recursively.
const STACK: usize = 16 << 20;

/// Runs the command line and returns the exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let threads = match cli.common.threads {
        Some(0) => {
            eprintln!("error: --threads is 0, needed at least 1");
            return ExitCode::from(2);
        }
        Some(threads) => threads,
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    if let Ok(name) = std::env::var(Isa::VARIABLE)
        && let Err(fault) = Isa::named(&name)
    {
        eprintln!("error: {fault}");
        return ExitCode::from(2);
    }
    // SAFETY: no thread has been started yet; candle reads this when it starts its own.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).stack_size(STACK);
    if let Err(e) = pool.build_global() {
        eprintln!("error: cannot start {threads} threads: {e}");
        return ExitCode::FAILURE;
    }
    let json = cli.common.json;
    // On one of the pool's own threads: from outside, every parallel stretch of work, a hundred a
    // decoded token, would wake a thread to do it and sleep until it is done.
    let result = rayon::scope(|_| match cli.command {
        Command::Quickstart(command) => command.run(threads, json),
        Command::Pretrain(command) => command.run(json),
        Command::Sft(command) => command.run(crate::train::Command::Sft, json),
        Command::Reward(command) => command.run(crate::train::Command::Reward, json),
        Command::Dpo(command) => command.run(crate::train::Command::Dpo, json),
        Command::Ppo(command) => command.run(crate::train::Command::Ppo, json),
        Command::Grpo(command) => command.run(crate::train::Command::Grpo, json),
        Command::Eval(command) => command.run(json),
        Command::Generate(command) => command.run(json),
        Command::Chat(command) => command.run(json),
        Command::Merge(command) => command.run(json),
        Command::Quantize(command) => command.run(json),
        Command::Export(command) => command.run(json),
        Command::Inspect(command) => command.run(json),
        Command::Data(command) => command.run(json),
        Command::Tokenizer(command) => command.run(json),
    });
    match result {
        Ok(mut value) => {
            if json {
                if let Some(object) = value.as_object_mut() {
                    object.insert("threads".into(), json!(threads));
                    object.insert("peak_rss_bytes".into(), json!(peak_rss_bytes()));
                }
                crate::cli::say!("{value}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {}", sentence(&error));
            if error.is::<Usage>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// An error and what caused it as one sentence. Many errors tell their cause themselves: what the
/// sentence says already is not said again.
fn sentence(error: &anyhow::Error) -> String {
    let mut sentence = error.to_string();
    for cause in error.chain().skip(1).map(|cause| cause.to_string()) {
        if !sentence.contains(&cause) {
            sentence = format!("{sentence}: {cause}");
        }
    }
    sentence
}

/// The command line itself is wrong.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// The most memory this process has had resident, where the system tells (Linux).
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// An adapter on the command line: `PATH` or `PATH=WEIGHT`.
#[derive(Debug, Clone, PartialEq)]
struct AdapterArg {
    path: PathBuf,
    weight: f64,
}

impl std::str::FromStr for AdapterArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, weight) = path_and_weight(text)?;
        Ok(Self { path, weight })
    }
}

/// Loads the adapters of a command for its base.
fn load_adapters(args: &[AdapterArg], decoder: &Decoder) -> Result<Vec<Worn>> {
    let load = |arg: &AdapterArg| -> Result<Worn> {
        let name = arg.path.display().to_string();
        let (adapter, unmatched) = lora::open_adapter(&arg.path, &name, decoder)?;
        for unmatched in unmatched {
            eprintln!("warning: {name}: {unmatched}");
        }
        Ok(Worn { adapter: Arc::new(adapter), weight: arg.weight, trainable: false })
    };
    args.iter().map(load).collect()
}

/// How the chat template differs from the model's own.
#[derive(Debug, Clone, Default, clap::Args)]
struct TemplateFlags {
    /// A Jinja file in the place of the model's own chat template
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// A variable of the chat template, as KEY=JSON: enable_thinking=false; may be given again
    #[arg(long, value_name = "KEY=JSON")]
    chat_template_kwargs: Vec<String>,
}

impl TemplateFlags {
    fn change(&self, tokenizer: &mut Tokenizer) -> Result<()> {
        let file = self.chat_template.as_deref();
        Ok(tokenizer.change_template(file, &self.chat_template_kwargs)?)
    }
}

/// The tokenizer of a base, its template on a given day.
fn open_tokenizer(checkpoint: &Checkpoint, date: Option<&str>) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::open(checkpoint)?;
    if let Some(date) = date {
        let Some(now) = first_second(date) else {
            anyhow::bail!("--template-date is {date:?}, needed YYYY-MM-DD")
        };
        tokenizer.set_template_time(now);
    }
    Ok(tokenizer)
}

fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        anyhow::anyhow!("{}: byte {at} is not UTF-8", path.display())
    })
}

/// A serializable result as a JSON object.
fn to_json(value: &impl serde::Serialize) -> Result<Value> {
    Ok(serde_json::to_value(value)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_flags_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_cause_is_told_once() {
        let missing = || anyhow::anyhow!("no such file");
        let check = |error: anyhow::Error, needed: &str| assert_eq!(sentence(&error), needed);
        check(missing(), "no such file");
        check(missing().context("rows.jsonl"), "rows.jsonl: no such file");
        check(missing().context("rows.jsonl: no such file"), "rows.jsonl: no such file");
        let told = missing().context("a: no such file").context("cannot begin");
        check(told, "cannot begin: a: no such file");
        let told = missing().context("the disk is full").context("b: no such file");
        check(told, "b: no such file: the disk is full");
    }

    #[test]
    fn adapters_take_a_weight() {
        let parse = |text: &str| text.parse::<AdapterArg>();
        assert_eq!(parse("a/b").unwrap(), AdapterArg { path: "a/b".into(), weight: 1.0 });
        assert_eq!(parse("a=0.5").unwrap(), AdapterArg { path: "a".into(), weight: 0.5 });
        assert!(parse("a=b").unwrap_err().contains("PATH=WEIGHT"));
    }
}
