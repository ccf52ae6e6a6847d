//! `quantune chat`: a conversation at the terminal, or line by line from a pipe.
//!
//! Replies go to stdout, everything else to stderr. At a terminal a fault is told and the
//! conversation goes on; in a pipe nobody would notice, so that it ends the program.

mod command;
mod input;
mod session;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use self::command::Command;
use self::input::{Input, Line};
use self::session::Session;
use super::loading::Loading;
use super::sampling::SamplingFlags;
use super::{TemplateFlags, open_tokenizer};
use crate::model::CacheType;
use crate::train::settings::AdapterPath;
use crate::weights::Checkpoint;

#[derive(Debug, clap::Args)]
pub struct Chat {
    /// The base: a GGUF file or a Hugging Face folder
    #[arg(long)]
    base: PathBuf,
    /// An adapter and what it is called, NAME=PATH or NAME=PATH=WEIGHT; may be given again. The first
    /// is active until /adapter takes another
    #[arg(long, value_name = "NAME=PATH")]
    adapter: Vec<NamedAdapter>,
    /// A system message before the conversation
    #[arg(long, conflicts_with = "raw")]
    system: Option<String>,
    /// For bases without a chat template: what is typed goes to the model as it stands, and it goes
    /// on from it until a --stop text; the session is one growing text, an empty line goes on
    #[arg(long)]
    raw: bool,
    /// Tokens of a reply at most [default: 1024; with --raw 256]
    #[arg(long)]
    max_tokens: Option<usize>,
    #[command(flatten)]
    sampling: SamplingFlags,
    /// End a reply before this text; may be given again. \n is a line's end
    #[arg(long)]
    stop: Vec<String>,
    /// How keys and values are kept: f32, f16 (half the memory) or q8 (a quarter) [default: f16, or
    /// f32 where --compute is f32 or portable]
    #[arg(long)]
    cache_type: Option<CacheType>,
    #[command(flatten)]
    template: TemplateFlags,
    /// The day, YYYY-MM-DD, that a chat template with a date shows [default: today]
    #[arg(long, conflicts_with = "raw")]
    template_date: Option<String>,
    #[command(flatten)]
    loading: Loading,
    /// Keep what is typed at the terminal in this file, for the next time
    #[arg(long, value_name = "FILE")]
    history: Option<PathBuf>,
}

/// An adapter on the command line of a chat: `NAME=PATH` or `NAME=PATH=WEIGHT`.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedAdapter {
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

/// Ctrl-C was pressed while a reply came.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// A reply comes: Ctrl-C ends it, else the program.
static REPLYING: AtomicBool = AtomicBool::new(false);

impl Chat {
    pub fn run(self, json: bool) -> Result<Value> {
        if json {
            let reason = "--json: a conversation has no one result; /save FILE writes it as a row";
            bail!(super::Usage(reason.into()));
        }
        let terminal = std::io::stdin().is_terminal();
        if self.history.is_some() && !terminal {
            bail!("--history keeps what is typed at a terminal, and stdin is none");
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
                "{}: this base has no chat template; with --raw it goes on from what is typed",
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
            session.wear(&[(first.name.clone(), None)])?;
        }
        ctrlc::set_handler(|| {
            // Looked at first: a reply may end as soon as it is told to.
            if !REPLYING.load(Ordering::SeqCst) {
                std::process::exit(130);
            }
            INTERRUPTED.store(true, Ordering::SeqCst);
        })
        .context("cannot listen for Ctrl-C")?;

        let mut input = match terminal {
            true => Input::terminal(self.history)?,
            false => Input::lines(),
        };
        if terminal {
            eprintln!("{} — /help lists the commands, Ctrl-D leaves", session.describe());
        }
        loop {
            let told = match input.read()? {
                Line::End => return Ok(Value::Null),
                Line::Interrupted => {
                    eprintln!("(Ctrl-D or /quit leaves)");
                    Ok(())
                }
                Line::Text(line) => match Command::parse(&line) {
                    Ok(Some(Command::Quit)) => return Ok(Value::Null),
                    Ok(Some(command)) => obey(&mut session, command),
                    // Two slashes are one that belongs to the message.
                    Ok(None) => session.say(line.strip_prefix('/').unwrap_or(&line)),
                    Err(fault) => Err(anyhow::anyhow!(fault)),
                },
            };
            match told {
                Err(error) if terminal => eprintln!("error: {}", super::sentence(&error)),
                told => told?,
            }
        }
    }
}

/// Does what a command says.
fn obey(session: &mut Session, command: Command) -> Result<()> {
    match command {
        Command::Wear(names) => session.wear(&names)?,
        Command::Load { name, path } => session.load(&name, &path.parse().map_err(fault)?)?,
        Command::Drop(name) => session.drop_adapter(&name)?,
        Command::List => eprintln!("{}", session.list()),
        Command::Reset => session.reset(),
        Command::System(text) => session.set_system(text)?,
        Command::Undo => session.undo()?,
        Command::Regenerate => session.regenerate()?,
        Command::Set(setting) => match setting {
            Some((key, value)) => session.set(&key, &value)?,
            None => eprintln!("{}", session.settings()),
        },
        Command::Save(path) => session.save(&path)?,
        Command::Help => eprintln!("{}", command::HELP),
        Command::Quit => unreachable!("the loop has ended"),
    }
    Ok(())
}

fn fault(fault: String) -> anyhow::Error {
    anyhow::anyhow!(fault)
}
