//! `quantune chat`: an interactive conversation in a terminal, or line by line from a pipe.
//!
//! Replies go to stdout, everything else to stderr. In a terminal, an error is printed and the conversation
//! continues; from a pipe, an error ends the program, since nobody would notice it.

mod command;
mod input;
mod session;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use self::command::ChatCommand;
use self::input::{InputLine, LineInput};
use self::session::Session;
use super::loading::Loading;
use super::sampling::SamplingFlags;
use super::{TemplateFlags, open_tokenizer};
use crate::model::CacheType;
use crate::train::settings::AdapterPath;
use crate::weights::Checkpoint;

#[derive(Debug, clap::Args)]
pub(super) struct Chat {
    /// Base model: a GGUF file or a Hugging Face folder
    #[arg(long)]
    base: PathBuf,
    /// Adapter with a name, NAME=PATH or NAME=PATH=WEIGHT; can be repeated. The first is active until
    /// /adapter changes it
    #[arg(long, value_name = "NAME=PATH")]
    adapter: Vec<NamedAdapter>,
    /// System message
    #[arg(long, conflicts_with = "raw")]
    system: Option<String>,
    /// For bases without a chat template: input is passed to the model as it is, and continued until a
    /// --stop string; the session is one growing text, and an empty line continues it
    #[arg(long)]
    raw: bool,
    /// Maximum number of tokens per reply [default: 1024; with --raw 256]
    #[arg(long)]
    max_tokens: Option<usize>,
    #[command(flatten)]
    sampling: SamplingFlags,
    /// Stop string; can be repeated; \n is a newline
    #[arg(long)]
    stop: Vec<String>,
    /// Type of the KV cache: f32, f16 (half the memory) or q8 (a quarter) [default: f16, or f32 with
    /// --compute f32 or portable]
    #[arg(long)]
    cache_type: Option<CacheType>,
    #[command(flatten)]
    template: TemplateFlags,
    /// Current date in chat templates that print one, YYYY-MM-DD [default: today]
    #[arg(long, conflicts_with = "raw")]
    template_date: Option<String>,
    #[command(flatten)]
    loading: Loading,
    /// History file of input lines, kept between sessions; requires a terminal
    #[arg(long, value_name = "FILE")]
    history: Option<PathBuf>,
}

/// A named adapter on the command line: `NAME=PATH` or `NAME=PATH=WEIGHT`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct NamedAdapter {
    name: String,
    file: AdapterPath,
}

impl FromStr for NamedAdapter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, path)) if !name.is_empty() && !path.is_empty() => {
                Ok(Self { name: name.into(), file: path.parse()? })
            }
            _ => Err(format!("{text:?} has no name, needed NAME=PATH or NAME=PATH=WEIGHT")),
        }
    }
}

/// Ctrl-C was pressed during a reply.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// A reply is being generated: Ctrl-C stops it. Otherwise Ctrl-C exits the program.
static REPLYING: AtomicBool = AtomicBool::new(false);

impl Chat {
    pub(super) fn run(self, json: bool) -> Result<Value> {
        if json {
            let reason =
                "--json is not supported by chat; /save FILE writes the conversation as a row";
            bail!(super::UsageError(reason.into()));
        }
        let terminal = std::io::stdin().is_terminal();
        if self.history.is_some() && !terminal {
            bail!("--history requires a terminal, but stdin is not one");
        }
        let sampling = self.sampling.sampling();
        sampling.check()?;
        let checkpoint = Checkpoint::open(&self.base)?;
        let adapters: Vec<&Path> = self.adapter.iter().map(|named| &*named.file.path).collect();
        let mut tokenizer = open_tokenizer(&checkpoint, &adapters, self.template_date.as_deref())?;
        let decoder = self.loading.decoder(&checkpoint, &tokenizer)?;
        self.template.change(&mut tokenizer)?;
        if !self.raw && tokenizer.chat_template().is_none() {
            bail!(
                "{}: this base has no chat template; use --raw to continue plain text",
                self.base.display()
            );
        }
        let mut session = Session::new(&decoder, &tokenizer, self.raw, sampling);
        session.max_tokens = self.max_tokens.unwrap_or(if self.raw { 256 } else { 1024 });
        session.stop = self.stop.iter().map(|stop| stop.replace("\\n", "\n")).collect();
        session.cache = self.cache_type.unwrap_or(CacheType::of(decoder.compute));
        session.system = self.system.clone();
        for NamedAdapter { name, file } in &self.adapter {
            session.load(name, file)?;
        }
        if let Some(first) = self.adapter.first() {
            session.activate(&[(first.name.clone(), None)])?;
        }
        ctrlc::set_handler(|| {
            // Checked first, since the reply may end as soon as INTERRUPTED is set.
            if !REPLYING.load(Ordering::SeqCst) {
                std::process::exit(130);
            }
            INTERRUPTED.store(true, Ordering::SeqCst);
        })
        .context("cannot listen for Ctrl-C")?;

        let mut input = match terminal {
            true => LineInput::terminal(self.history)?,
            false => LineInput::lines(),
        };
        if terminal {
            eprintln!("{} — /help lists commands, Ctrl-D exits", session.describe());
        }
        loop {
            let result = match input.read()? {
                InputLine::End => return Ok(Value::Null),
                InputLine::Interrupted => {
                    eprintln!("(Ctrl-D or /quit exits)");
                    Ok(())
                }
                InputLine::Text(line) => match ChatCommand::parse(&line) {
                    Ok(Some(ChatCommand::Quit)) => return Ok(Value::Null),
                    Ok(Some(command)) => run_command(&mut session, command),
                    // Two slashes escape a message that begins with a slash.
                    Ok(None) => session.say(line.strip_prefix('/').unwrap_or(&line)),
                    Err(fault) => Err(anyhow::anyhow!(fault)),
                },
            };
            match result {
                Err(error) if terminal => eprintln!("error: {}", super::sentence(&error)),
                result => result?,
            }
        }
    }
}

/// Runs a slash command.
fn run_command(session: &mut Session, command: ChatCommand) -> Result<()> {
    match command {
        ChatCommand::Activate(names) => session.activate(&names)?,
        ChatCommand::Load { name, path } => session.load(&name, &path.parse().map_err(fault)?)?,
        ChatCommand::Drop(name) => session.drop_adapter(&name)?,
        ChatCommand::List => eprintln!("{}", session.list()),
        ChatCommand::Reset => session.reset(),
        ChatCommand::System(text) => session.set_system(text)?,
        ChatCommand::Undo => session.undo()?,
        ChatCommand::Regenerate => session.regenerate()?,
        ChatCommand::Set(setting) => match setting {
            Some((key, value)) => session.set(&key, &value)?,
            None => eprintln!("{}", session.settings()),
        },
        ChatCommand::Save(path) => session.save(&path)?,
        ChatCommand::Help => eprintln!("{}", command::HELP),
        ChatCommand::Quit => unreachable!("handled by the loop"),
    }
    Ok(())
}

fn fault(fault: String) -> anyhow::Error {
    anyhow::anyhow!(fault)
}
