//! A conversation: what was said, what is active, and how replies are sampled.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use quantune_adapters::registry::{Registry, RegistryLimits};
use serde_json::{Value, json};

use super::{INTERRUPTED, REPLYING};
use crate::cli::generate::{Text, show};
use crate::cli::{AdapterPath, load_adapters};
use crate::generate::{Engine, Event, Finish, GenerateError, Generated, Job, Prefix, Sampling};
use crate::model::{ActiveAdapter, CacheType, Decoder};
use crate::text::{Special, Tokenizer};
use crate::weights::write_atomically;

/// A conversation with a model.
pub struct Session<'a> {
    decoder: &'a Decoder,
    tokenizer: &'a Tokenizer,
    /// Whether there are no messages, but one growing text.
    raw: bool,
    /// End a reply before any of these.
    pub stop: Vec<String>,
    /// How keys and values are kept.
    pub cache: CacheType,
    /// Tokens of a reply at most.
    pub max_tokens: usize,
    /// The system message.
    pub system: Option<String>,
    sampling: Sampling,
    registry: Registry,
    /// The weight each adapter was loaded with.
    weights: BTreeMap<String, f64>,
    /// What is active from the next reply on.
    active: Vec<(String, ActiveAdapter)>,
    turns: Vec<Turn>,
    /// What was read for the last reply.
    prefix: Option<Prefix>,
    /// Replies sampled so far: none is keyed as another.
    replies: u64,
    end_tokens: Arc<[u32]>,
}

/// What was said, and what came of it.
struct Turn {
    said: String,
    reply: String,
    /// The stop text behind the reply, which a growing text has and nobody is shown.
    stop: String,
}

impl<'a> Session<'a> {
    pub fn new(
        decoder: &'a Decoder,
        tokenizer: &'a Tokenizer,
        raw: bool,
        sampling: Sampling,
    ) -> Self {
        let vocabulary = 0..decoder.config.vocab_size as u32;
        Self {
            decoder,
            tokenizer,
            raw,
            stop: Vec::new(),
            cache: CacheType::default(),
            max_tokens: 0,
            system: None,
            sampling,
            registry: Registry::new(&decoder.linears(), RegistryLimits::default()),
            weights: BTreeMap::new(),
            active: Vec::new(),
            turns: Vec::new(),
            prefix: None,
            replies: 0,
            end_tokens: vocabulary.filter(|&token| tokenizer.is_end_of_generation(token)).collect(),
        }
    }

    /// What one talks with.
    pub fn describe(&self) -> String {
        let window = self.decoder.config.max_position_embeddings;
        let active: Vec<String> = self.active.iter().map(written).collect();
        match &active[..] {
            [] => format!("no adapter, a window of {window} tokens"),
            active => format!("adapter {}, a window of {window} tokens", active.join(", ")),
        }
    }

    /// Says something, and shows what the model says to it. If it cannot, nothing was said.
    pub fn say(&mut self, line: &str) -> Result<()> {
        if line.trim().is_empty() {
            if !self.raw {
                return Ok(());
            }
            if self.turns.is_empty() && line.is_empty() {
                bail!("there is no text to go on from yet");
            }
        }
        let turn = Turn { said: line.into(), reply: String::new(), stop: String::new() };
        self.turns.push(turn);
        self.reply().inspect_err(|_| {
            self.turns.pop();
        })
    }

    /// Another reply to what was said last.
    pub fn regenerate(&mut self) -> Result<()> {
        let Some(turn) = self.turns.last_mut() else { bail!("nothing has been said yet") };
        let (reply, stop) = (std::mem::take(&mut turn.reply), std::mem::take(&mut turn.stop));
        if self.sampling.temperature == 0.0 {
            eprintln!("(at temperature 0 there is one reply: /set temperature VALUE)");
        }
        let result = self.reply();
        if result.is_err() {
            let turn = self.turns.last_mut().expect("nothing took it off");
            (turn.reply, turn.stop) = (reply, stop);
        }
        result
    }

    /// Takes the last message and its reply back.
    pub fn undo(&mut self) -> Result<()> {
        match self.turns.pop() {
            Some(turn) => {
                eprintln!("(taken back: {:?})", turn.said);
                Ok(())
            }
            None => bail!("nothing has been said yet"),
        }
    }

    /// Forgets what was said.
    pub fn reset(&mut self) {
        self.turns.clear();
        self.prefix = None;
    }

    /// Another system message from the next reply on, or none.
    pub fn set_system(&mut self, text: Option<String>) -> Result<()> {
        if self.raw {
            bail!("with --raw there are no messages, and so no system message");
        }
        self.system = text;
        Ok(())
    }

    /// Reads an adapter.
    pub fn load(&mut self, name: &str, file: &AdapterPath) -> Result<()> {
        if file.path.join("tokenizer.json").is_file() {
            let mut missing = self.tokenizer.missing(&file.path)?;
            missing.retain(|token| self.tokenizer.id_of(&token.text).is_none());
            if let Some(token) = missing.first() {
                bail!(
                    "{}: comes with {} tokens that this chat was begun without, as {:?}; needed a chat \
                     begun with --adapter {name}={0}",
                    file.path.display(),
                    missing.len(),
                    token.text
                );
            }
        }
        let [ActiveAdapter { adapter, weight, .. }] =
            &load_adapters(std::slice::from_ref(file), self.decoder)?[..]
        else {
            unreachable!("one file is one adapter")
        };
        self.registry.insert(name, adapter.clone())?;
        self.weights.insert(name.into(), *weight);
        Ok(())
    }

    /// Wears these adapters from the next reply on, and no others.
    pub fn wear(&mut self, names: &[(String, Option<f64>)]) -> Result<()> {
        let mut active = Vec::new();
        for (name, weight) in names {
            let adapter = self.registry.get(name)?;
            let weight = weight.or(self.weights.get(name).copied()).unwrap_or(1.0);
            active.push((name.clone(), ActiveAdapter { weight, ..ActiveAdapter::frozen(adapter) }));
        }
        self.active = active;
        Ok(())
    }

    /// Forgets an adapter.
    pub fn drop_adapter(&mut self, name: &str) -> Result<()> {
        self.registry.remove(name)?;
        self.weights.remove(name);
        self.prefix = None; // which may hold it
        let before = self.active.len();
        self.active.retain(|(other, _)| other != name);
        if self.active.len() < before {
            eprintln!("(it was active: now {})", self.describe());
        }
        Ok(())
    }

    /// The adapters there are, those active with a star.
    pub fn list(&self) -> String {
        let listed = self.registry.list();
        if listed.is_empty() {
            return "no adapter is loaded: /load NAME=PATH".into();
        }
        let line = |adapter: &quantune_adapters::registry::RegistryEntry| {
            let active = self.active.iter().find(|(name, _)| *name == adapter.name);
            let (star, weight) = match active {
                Some((_, active)) => ("*", active.weight),
                None => (" ", self.weights[&adapter.name]),
            };
            let megabytes = adapter.bytes as f64 / 1e6;
            format!(
                "{star} {}={weight}  {} modules, {megabytes:.1} MB",
                adapter.name, adapter.modules
            )
        };
        listed.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    /// The settings and their values.
    pub fn settings(&self) -> String {
        let Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed } = self.sampling;
        format!(
            "temperature {temperature}\ntop_k {top_k}\ntop_p {top_p}\nmin_p {min_p}\n\
             repetition_penalty {repetition_penalty}\nseed {seed}\nmax_tokens {}",
            self.max_tokens
        )
    }

    /// Changes a setting from the next reply on.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        fn parsed<T: std::str::FromStr>(key: &str, value: &str, needed: &str) -> Result<T> {
            value.parse().map_err(|_| anyhow::anyhow!("{key} is {value:?}, needed {needed}"))
        }
        let mut sampling = self.sampling.clone();
        match key {
            "temperature" => sampling.temperature = parsed(key, value, "a number")?,
            "top_k" => sampling.top_k = parsed(key, value, "a whole number")?,
            "top_p" => sampling.top_p = parsed(key, value, "a number")?,
            "min_p" => sampling.min_p = parsed(key, value, "a number")?,
            "repetition_penalty" => sampling.repetition_penalty = parsed(key, value, "a number")?,
            "seed" => sampling.seed = parsed(key, value, "a whole number")?,
            "max_tokens" => self.max_tokens = parsed(key, value, "a whole number")?,
            _ => bail!(
                "there is no setting {key:?}, only temperature, top_k, top_p, min_p, \
                 repetition_penalty, seed and max_tokens"
            ),
        }
        sampling.check()?;
        self.sampling = sampling;
        Ok(())
    }

    /// Adds the conversation to a file, as a row that can be trained on.
    pub fn save(&self, path: &Path) -> Result<()> {
        if self.turns.is_empty() {
            bail!("nothing has been said yet");
        }
        let row = match self.raw {
            true => json!({ "text": self.text() }),
            false => json!({ "messages": self.messages() }),
        };
        let mut rows = match std::fs::read(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            rows => rows.with_context(|| path.display().to_string())?,
        };
        if rows.last().is_some_and(|&byte| byte != b'\n') {
            rows.push(b'\n');
        }
        writeln!(rows, "{row}")?;
        write_atomically(path, |file| file.write_all(&rows))?;
        eprintln!("(row {} of {})", rows.split(|&b| b == b'\n').count() - 1, path.display());
        Ok(())
    }

    /// The conversation; a reply that is still to come is left out.
    fn messages(&self) -> Vec<Value> {
        let message = |role: &str, content: &str| json!({ "role": role, "content": content });
        let mut messages: Vec<Value> =
            self.system.iter().map(|text| message("system", text)).collect();
        for (index, turn) in self.turns.iter().enumerate() {
            messages.push(message("user", &turn.said));
            if index + 1 < self.turns.len() || !turn.reply.is_empty() {
                messages.push(message("assistant", &turn.reply));
            }
        }
        messages
    }

    /// The growing text.
    fn text(&self) -> String {
        let parts = self.turns.iter().flat_map(|turn| [&*turn.said, &*turn.reply, &*turn.stop]);
        parts.collect()
    }

    /// The tokens that the next reply goes on from.
    fn prompt(&self) -> Result<Vec<u32>> {
        let text = match (self.raw, self.tokenizer.chat_template()) {
            (false, Some(template)) => template.render(&self.messages(), None, true)?,
            _ => self.text(),
        };
        Ok(self.tokenizer.with_bos(self.tokenizer.encode(&text, Special::Parse)?))
    }

    /// Lets the model speak, and shows it as it does.
    fn reply(&mut self) -> Result<()> {
        let prompt = self.prompt()?;
        let window = self.decoder.config.max_position_embeddings;
        let job = Job {
            active: self.active.iter().map(|(_, active)| active.clone()).collect(),
            sampling: self.sampling.clone(),
            key: self.replies,
            ends: self.end_tokens.clone(),
            prefix: self.prefix.take(),
            keeps: true,
            ..Job::new(prompt.clone(), self.max_tokens)
        };
        let mut engine = Engine::new(self.decoder, self.cache, 1);
        let id = engine.submit(job).map_err(|error| match error {
            GenerateError::LongPrompt { tokens, window, .. } => anyhow::anyhow!(
                "with this the conversation has {tokens} tokens, and the model's window of {window} \
                 has no room for a reply: /undo takes the last message back, /reset begins anew"
            ),
            error => error.into(),
        })?;
        self.replies += 1;
        let mut text = Text::new(self.tokenizer, &self.stop);
        REPLYING.store(true, Ordering::Relaxed);
        INTERRUPTED.store(false, Ordering::Relaxed);
        let ended = self.listen(&mut engine, id, &mut text);
        REPLYING.store(false, Ordering::Relaxed);
        let (generated, prefix) = ended?;
        self.prefix = prefix;

        let (reply, rest) = text.finish()?;
        show(&rest);
        crate::cli::say!("");
        let stop = self.stop_behind(&generated, &reply)?;
        let turn = self.turns.last_mut().expect("a reply is to something");
        (turn.reply, turn.stop) = (reply, stop);
        match generated.finish {
            Finish::Length if prompt.len() + generated.token_ids.len() >= window => eprintln!(
                "(the model's window of {window} tokens is full: /undo takes the last message back, \
                 /reset begins anew)"
            ),
            Finish::Length if !self.raw => {
                eprintln!("(cut at {} tokens: /set max_tokens VALUE allows more)", self.max_tokens)
            }
            _ => {}
        }
        Ok(())
    }

    /// Runs a job to its end, a stop text or Ctrl-C, and shows its text.
    fn listen(
        &self,
        engine: &mut Engine,
        id: usize,
        text: &mut Text,
    ) -> Result<(Generated, Option<Prefix>)> {
        loop {
            for event in engine.step()? {
                match event {
                    Event::Token { token, .. } => show(&text.push(token)),
                    Event::Finished { ended, .. } => return Ok((ended.generated, ended.prefix)),
                    Event::Failed { error, .. } => return Err(error.into()),
                }
            }
            if (text.stopped() || INTERRUPTED.load(Ordering::Relaxed))
                && let Some(ended) = engine.cancel(id)
            {
                return Ok((ended.generated, ended.prefix));
            }
        }
    }

    /// The stop text that a reply ended before, as a growing text goes on behind it.
    fn stop_behind(&self, generated: &Generated, reply: &str) -> Result<String> {
        if !self.raw {
            return Ok(String::new());
        }
        // An id the tokenizer lacks has no text.
        let known = |token: &u32| self.tokenizer.token(*token).is_some();
        let tokens: Vec<u32> = generated.token_ids.iter().copied().filter(known).collect();
        let whole = self.tokenizer.decode(&tokens, true)?;
        let rest = whole.strip_prefix(reply).unwrap_or_default();
        let behind = self.stop.iter().filter(|stop| rest.starts_with(stop.as_str()));
        Ok(behind.max_by_key(|stop| stop.len()).cloned().unwrap_or_default())
    }
}

/// A active adapter as the command that wears it has it.
fn written((name, active): &(String, ActiveAdapter)) -> String {
    match active.weight {
        1.0 => name.clone(),
        weight => format!("{name}={weight}"),
    }
}
