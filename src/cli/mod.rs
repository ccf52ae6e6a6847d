//! The command line: flags, printing, exit codes. No other module depends on it.
//!
//! Progress goes to stderr and results to stdout. With `--json`, the last line of stdout is one JSON object.
//! Exit codes: 0 success, 1 failure, 2 invalid usage.

/// Prints a line to stdout; exits quietly if stdout is closed.
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
use crate::train::process_status_bytes;
use crate::train::settings::AdapterPath;
use crate::weights::Checkpoint;
use flags::{DpoFlags, GrpoFlags, PpoFlags, RewardFlags, SftFlags};

/// LoRA fine-tuning straight on the quantized weights you already run.
#[derive(Debug, Parser)]
#[command(name = "quantune", version, about, after_help = examples::PATH)]
struct Cli {
    #[command(subcommand)]
    command: CliCommand,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, clap::Args)]
struct Common {
    /// Print the result as one JSON object on the last line of stdout
    #[arg(long, global = true)]
    json: bool,
    /// Number of threads [default: all cores]
    #[arg(long, global = true)]
    threads: Option<usize>,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Train a small model in a few minutes, from random weights through SFT to PPO
    #[command(after_help = examples::QUICKSTART)]
    Quickstart(quickstart::Quickstart),
    /// Pretrain a model from random weights, or continue training all weights of a base, on a mixture of texts
    #[command(after_help = examples::PRETRAIN)]
    Pretrain(Box<pretrain::Pretrain>),
    /// Supervised fine-tuning: train a LoRA adapter on chats, prompts or text
    #[command(after_help = examples::SFT)]
    Sft(Box<train::Train<SftFlags>>),
    /// Train a reward model on preference data
    #[command(after_help = examples::REWARD)]
    Reward(Box<train::Train<RewardFlags>>),
    /// Preference optimization without a reward model (DPO, IPO, ORPO, SimPO, KTO)
    #[command(after_help = examples::DPO)]
    Dpo(Box<train::Train<DpoFlags>>),
    /// Reinforcement learning with a reward model (PPO)
    #[command(after_help = examples::PPO)]
    Ppo(Box<train::Train<PpoFlags>>),
    /// Reinforcement learning with any rewards, relative to a group of responses (GRPO, RLOO)
    #[command(after_help = examples::GRPO)]
    Grpo(Box<train::Train<GrpoFlags>>),
    /// Evaluate: loss on rows, perplexity of a text, reward scores, or rewards and win rates of replies
    #[command(after_help = examples::EVAL)]
    Eval(Box<eval::Eval>),
    /// Generate a reply to a prompt
    #[command(after_help = examples::GENERATE)]
    Generate(Box<generate::Generate>),
    /// Chat with a model, and swap adapters between replies
    ///
    /// Lines are messages; lines that begin with a slash are commands, listed by /help. A backslash at the
    /// end of a line continues it on the next line. Ctrl-C stops a reply, Ctrl-D exits. If stdin is not a
    /// terminal, its lines are read as input, replies go to stdout, and the first error ends the program.
    /// --json is not supported; /save writes the conversation as a row of training data.
    #[command(after_help = examples::CHAT)]
    Chat(Box<chat::Chat>),
    /// Merge adapters into their base, written as a Hugging Face folder or a GGUF of any type
    #[command(after_help = examples::MERGE)]
    Merge(Box<merge::Merge>),
    /// Quantize a base: write it as a GGUF of another type
    #[command(after_help = examples::QUANTIZE)]
    Quantize(Box<merge::Quantize>),
    /// Convert an adapter to a GGUF LoRA or a PEFT folder, or write a Modelfile for Ollama
    #[command(after_help = examples::EXPORT)]
    Export(export::Export),
    /// List the contents of a GGUF, safetensors or adapter file
    #[command(after_help = examples::INSPECT)]
    Inspect(inspect::Inspect),
    /// Validate a dataset: formats, lengths, loss masks and common mistakes
    #[command(after_help = examples::DATA)]
    Data(Box<data::Data>),
    /// Tokenize text, or train a tokenizer
    #[command(subcommand)]
    Tokenizer(tokenizer::TokenizerCommand),
    /// Print a shell completion script
    #[command(after_help = examples::COMPLETIONS)]
    Completions(completions::Completions),
}

/// Stack size per thread: candle traverses graphs of the reference backend recursively.
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
    // Run on a thread of the pool: from outside, every parallel section would wake a thread and sleep until
    // it is done.
    let result = rayon::scope(|_| match cli.command {
        CliCommand::Quickstart(command) => command.run(threads, json),
        CliCommand::Pretrain(command) => command.run(json),
        CliCommand::Sft(command) => command.run(crate::train::Command::Sft, json),
        CliCommand::Reward(command) => command.run(crate::train::Command::Reward, json),
        CliCommand::Dpo(command) => command.run(crate::train::Command::Dpo, json),
        CliCommand::Ppo(command) => command.run(crate::train::Command::Ppo, json),
        CliCommand::Grpo(command) => command.run(crate::train::Command::Grpo, json),
        CliCommand::Eval(command) => command.run(json),
        CliCommand::Generate(command) => command.run(json),
        CliCommand::Chat(command) => command.run(json),
        CliCommand::Merge(command) => command.run(json),
        CliCommand::Quantize(command) => command.run(json),
        CliCommand::Export(command) => command.run(json),
        CliCommand::Inspect(command) => command.run(json),
        CliCommand::Data(command) => command.run(json),
        CliCommand::Tokenizer(command) => command.run(json),
        CliCommand::Completions(command) => command.run(json),
    });
    match result {
        Ok(mut value) => {
            if json {
                if let Some(object) = value.as_object_mut() {
                    object.insert("threads".into(), json!(threads));
                    object.insert("peak_rss_bytes".into(), json!(process_status_bytes("VmHWM:")));
                }
                crate::cli::say!("{value}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {}", sentence(&error));
            if error.is::<UsageError>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// An error with its causes in one sentence. Many errors already contain their cause, which is not repeated.
fn sentence(error: &anyhow::Error) -> String {
    let mut sentence = error.to_string();
    for cause in error.chain().skip(1).map(|cause| cause.to_string()) {
        if !sentence.contains(&cause) {
            sentence = format!("{sentence}: {cause}");
        }
    }
    sentence
}

/// Invalid usage of the command line.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct UsageError(String);

/// Paths of adapters.
fn paths(args: &[AdapterPath]) -> Vec<&Path> {
    args.iter().map(|arg| &*arg.path).collect()
}

/// Loads the adapters of a command.
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

/// Changes to the model's chat template.
#[derive(Debug, Clone, Default, clap::Args)]
struct TemplateFlags {
    /// Jinja file that replaces the model's chat template
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Variable of the chat template, such as enable_thinking=false; can be repeated
    #[arg(long, value_name = "KEY=JSON")]
    chat_template_kwargs: Vec<String>,
}

impl TemplateFlags {
    fn change(&self, tokenizer: &mut Tokenizer) -> Result<()> {
        let file = self.chat_template.as_deref();
        Ok(tokenizer.change_template(file, &self.chat_template_kwargs)?)
    }
}

/// The tokenizer of a base, with tokens that its adapters added and the date of its chat template.
fn open_tokenizer(
    checkpoint: &Checkpoint,
    adapters: &[&Path],
    date: Option<&str>,
) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::open_with_adapters(checkpoint, adapters)?;
    set_template_date(&mut tokenizer, date)?;
    Ok(tokenizer)
}

/// Sets the date of the chat template, if one is given.
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

    /// Splits a line into words like a shell, with single quotes only, ignoring redirection.
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

    /// The help of every command has examples of that command, and each parses; the top-level help has
    /// examples of any command.
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

    /// The top-level help lists the pipeline in order.
    #[test]
    fn help_lists_the_pipeline_in_order() {
        let help = Cli::command().render_help().to_string();
        let steps = ["pretrain", "data", "sft", "reward", "ppo", "merge", "chat"];
        let places = steps.map(|name| help.find(&format!("\n  quantune {name} ")).expect(name));
        assert!(places.is_sorted(), "{help}");
    }

    #[test]
    fn a_cause_is_printed_once() {
        let missing = || anyhow::anyhow!("no such file");
        let check = |error: anyhow::Error, needed: &str| assert_eq!(sentence(&error), needed);
        check(missing(), "no such file");
        check(missing().context("rows.jsonl"), "rows.jsonl: no such file");
        check(missing().context("rows.jsonl: no such file"), "rows.jsonl: no such file");
        let nested = missing().context("a: no such file").context("cannot begin");
        check(nested, "cannot begin: a: no such file");
        let nested = missing().context("the disk is full").context("b: no such file");
        check(nested, "b: no such file: the disk is full");
    }
}
