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
mod completions;
mod data;
mod eval;
mod examples;
mod export;
mod flags;
mod generate;
mod inspect;
mod loading;
mod merge;
mod pretrain;
mod printer;
mod quickstart;
mod replies;
mod sampling;
mod tokenizer;
mod train;
mod values;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use serde_json::{Value, json};

use crate::isa::Isa;
use crate::model::{ActiveAdapter, Decoder, adapter_files};
use crate::text::{Tokenizer, first_second};
use crate::train::of_process;
use crate::train::settings::AdapterPath;
use crate::weights::Checkpoint;
use flags::{DpoFlags, GrpoFlags, PpoFlags, RewardFlags, SftFlags};

/// LoRA fine-tuning straight on the quantized weights you already run.
#[derive(Debug, Parser)]
#[command(name = "quantune", version, about, after_help = examples::PATH)]
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
    #[command(after_help = examples::QUICKSTART)]
    Quickstart(quickstart::Quickstart),
    /// Train a base from random weights, or another base's every weight, on a mixture of texts
    #[command(after_help = examples::PRETRAIN)]
    Pretrain(Box<pretrain::Pretrain>),
    /// Fine-tune: train a LoRA adapter on chats, prompts or text
    #[command(after_help = examples::SFT)]
    Sft(Box<train::Train<SftFlags>>),
    /// Train a reward model: a score of responses, from comparisons
    #[command(after_help = examples::REWARD)]
    Reward(Box<train::Train<RewardFlags>>),
    /// Learn from comparisons without a reward model (DPO, IPO, ORPO, SimPO, KTO)
    #[command(after_help = examples::DPO)]
    Dpo(Box<train::Train<DpoFlags>>),
    /// Learn from a reward model by reinforcement (PPO)
    #[command(after_help = examples::PPO)]
    Ppo(Box<train::Train<PpoFlags>>),
    /// Learn from rewards of any kind by comparing responses to a prompt (GRPO, RLOO)
    #[command(after_help = examples::GRPO)]
    Grpo(Box<train::Train<GrpoFlags>>),
    /// Loss on rows, perplexity of a text, scores by a reward model, or replies judged and compared
    #[command(after_help = examples::EVAL)]
    Eval(Box<eval::Eval>),
    /// Answer a prompt
    #[command(after_help = examples::GENERATE)]
    Generate(Box<generate::Generate>),
    /// Talk with a model, adapters swapped between replies
    ///
    /// Lines are messages, and those that begin with a slash are commands: /help lists them. A line
    /// that ends in a backslash goes on with the next. Ctrl-C ends a reply, Ctrl-D the program. Where
    /// stdin is no terminal its lines are read as if they were typed, replies go to stdout, and the
    /// first fault ends the program. There is no JSON result: a conversation has no one answer, and
    /// /save writes it as a row of training data.
    #[command(after_help = examples::CHAT)]
    Chat(Box<chat::Chat>),
    /// Merge adapters into their base: a Hugging Face folder or a GGUF of any type
    #[command(after_help = examples::MERGE)]
    Merge(Box<merge::Merge>),
    /// Write a base as a GGUF of another type
    #[command(after_help = examples::QUANTIZE)]
    Quantize(Box<merge::Quantize>),
    /// Write an adapter as a GGUF LoRA or a PEFT folder, or a Modelfile for Ollama
    #[command(after_help = examples::EXPORT)]
    Export(export::Export),
    /// List what a GGUF, safetensors or adapter file holds
    #[command(after_help = examples::INSPECT)]
    Inspect(inspect::Inspect),
    /// Look at rows as a trainer would: what is learned of them, and what is wrong with them
    #[command(after_help = examples::DATA)]
    Data(Box<data::Data>),
    /// Turn text into token ids
    #[command(subcommand)]
    Tokenizer(tokenizer::TokenizerCommand),
    /// Print what a shell needs to complete commands and flags
    #[command(after_help = examples::COMPLETIONS)]
    Completions(completions::Completions),
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
    // On one of the pool's own threads: from outside, every parallel stretch of work would wake a thread
    // to do it and sleep until it is done.
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
        Command::Completions(command) => command.run(json),
    });
    match result {
        Ok(mut value) => {
            if json {
                if let Some(object) = value.as_object_mut() {
                    object.insert("threads".into(), json!(threads));
                    object.insert("peak_rss_bytes".into(), json!(of_process("VmHWM:")));
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

/// Where adapters are.
fn paths(args: &[AdapterPath]) -> Vec<&Path> {
    args.iter().map(|arg| &*arg.path).collect()
}

/// Loads the adapters of a command for its base.
fn load_adapters(args: &[AdapterPath], decoder: &Decoder) -> Result<Vec<ActiveAdapter>> {
    let load = |arg: &AdapterPath| -> Result<ActiveAdapter> {
        let name = arg.path.display().to_string();
        let (adapter, unmatched) = adapter_files::open_adapter(&arg.path, &name, decoder)?;
        for unmatched in unmatched {
            eprintln!("warning: {name}: {unmatched}");
        }
        Ok(ActiveAdapter { adapter: Arc::new(adapter), weight: arg.weight, trainable: false })
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

/// The tokenizer of a base with the tokens that its adapters came with, its template on a given day.
fn open_tokenizer(
    checkpoint: &Checkpoint,
    adapters: &[&Path],
    date: Option<&str>,
) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::open_beside(checkpoint, adapters)?;
    set_template_date(&mut tokenizer, date)?;
    Ok(tokenizer)
}

/// Pins the day that a tokenizer's template shows, if one is given.
fn set_template_date(tokenizer: &mut Tokenizer, date: Option<&str>) -> Result<()> {
    let Some(date) = date else { return Ok(()) };
    let Some(now) = first_second(date) else {
        anyhow::bail!("--template-date is {date:?}, needed YYYY-MM-DD")
    };
    tokenizer.set_template_time(now);
    Ok(())
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

    /// The words of a line as a shell has them, with only single quotes and no redirection.
    fn words(line: &str) -> Vec<String> {
        let line = line.split(" > ").next().unwrap();
        let mut words = vec![String::new()];
        for (i, part) in line.split('\'').enumerate() {
            if i % 2 == 1 {
                words.last_mut().unwrap().push_str(part);
                continue;
            }
            for (i, piece) in part.split(' ').enumerate() {
                if i > 0 {
                    words.push(String::new());
                }
                words.last_mut().unwrap().push_str(piece);
            }
        }
        words.retain(|word| !word.is_empty());
        words
    }

    /// Every command's help has examples, and each of them parses: as one of that command, of the
    /// whole's help as one of any.
    #[test]
    fn examples_in_help_parse() {
        fn check(command: &clap::Command, path: &[&str]) {
            let path = [path, &[command.get_name()]].concat();
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let lines: Vec<&str> =
                help.lines().map(str::trim).filter(|line| line.starts_with("quantune ")).collect();
            let lines: Vec<&str> =
                lines.into_iter().filter(|line| !line.contains("COMMAND")).collect();
            let leaf = !command.has_subcommands();
            assert!(lines.len() >= if leaf { 2 } else { 0 }, "{path:?} has {}", lines.len());
            for line in lines {
                let words = words(line);
                assert!(!leaf || path.iter().zip(&words).all(|(a, b)| a == b), "{path:?}: {line}");
                if let Err(e) = Cli::try_parse_from(&words) {
                    panic!("{line}: {e}");
                }
            }
            command.get_subcommands().for_each(|inner| check(inner, &path));
        }
        check(&Cli::command(), &[]);
    }

    /// Every `quantune` command in the shell blocks of README.md and docs/ parses.
    #[test]
    fn commands_in_documentation_parse() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let docs = std::fs::read_dir(root.join("docs")).unwrap();
        let mut pages: Vec<_> = docs.map(|entry| entry.unwrap().path()).collect();
        pages.push(root.join("README.md"));
        let mut parsed = 0;
        for page in pages {
            let text = std::fs::read_to_string(&page).unwrap().replace("\\\n", " ");
            for block in text.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next()) {
                for line in block.lines() {
                    let line = line.split(" # ").next().unwrap().trim();
                    let line =
                        line.replace("cargo run --release -- ", "quantune ").replace('"', "'");
                    if !line.starts_with("quantune ") {
                        continue;
                    }
                    parsed += 1;
                    if let Err(e) = Cli::try_parse_from(words(&line)) {
                        panic!("{}: {line}: {e}", page.display());
                    }
                }
            }
        }
        assert!(parsed > 30, "{parsed}");
    }

    /// What leads to a model to talk with stands in the order it is done in.
    #[test]
    fn help_shows_the_way() {
        let help = Cli::command().render_help().to_string();
        let way = ["pretrain", "data", "sft", "reward", "ppo", "merge", "chat"];
        let places = way.map(|name| help.find(&format!("\n  quantune {name} ")).expect(name));
        assert!(places.is_sorted(), "{help}");
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
}
