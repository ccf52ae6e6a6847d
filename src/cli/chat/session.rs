//! A chat session: its messages, active adapters and sampling settings.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use quantune_adapters::registry::{Registry, RegistryLimits};
use serde_json::{Value, json};

use super::{INTERRUPTED, REPLYING};
use crate::cli::generate::{StreamedText, show};
use crate::cli::{AdapterPath, load_adapters};
use crate::generate::{Engine, Event, Finish, GenerateError, Generated, Job, Prefix, Sampling};
use crate::model::{ActiveAdapter, CacheType, Decoder};
use crate::text::{Special, Tokenizer};
use crate::weights::write_atomically;

/// A conversation with a model.
pub(super) struct Session<'a> {
    decoder: &'a Decoder,
    tokenizer: &'a Tokenizer,
    /// Whether the session is one growing text instead of messages.
    raw: bool,
    /// Stop strings.
    pub stop: Vec<String>,
    /// Type of the KV cache.
    pub cache: CacheType,
    /// Maximum number of tokens per reply.
    pub max_tokens: usize,
    /// The system message.
    pub system: Option<String>,
    sampling: Sampling,
    registry: Registry,
    /// The weight each adapter was loaded with.
    weights: BTreeMap<String, f64>,
    /// Active adapters, from the next reply on.
    active: Vec<(String, ActiveAdapter)>,
    turns: Vec<ChatTurn>,
    /// The prompt cache of the last reply.
    prefix: Option<Prefix>,
    /// Number of replies sampled so far, which keys their random numbers.
    replies: u64,
    end_tokens: Arc<[u32]>,
}

/// A message and its reply.
struct ChatTurn {
    said: String,
    reply: String,
    /// The stop string after the reply, which is part of a growing text but not printed.
    stop: String,
}

impl<'a> Session<'a> {
    pub(super) fn new(
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

    /// Describes the active adapters and the context window.
    pub(super) fn describe(&self) -> String {
        let window = self.decoder.config.max_position_embeddings;
        let active: Vec<String> = self.active.iter().map(written).collect();
        match &active[..] {
            [] => format!("no adapter, a context window of {window} tokens"),
            active => format!("adapter {}, a context window of {window} tokens", active.join(", ")),
        }
    }

    /// Sends a message and prints the reply. If that fails, the message is removed again.
    pub(super) fn say(&mut self, line: &str) -> Result<()> {
        if line.trim().is_empty() {
            if !self.raw {
                return Ok(());
            }
            if self.turns.is_empty() && line.is_empty() {
                bail!("there is no text to continue yet");
            }
        }
        let turn = ChatTurn { said: line.into(), reply: String::new(), stop: String::new() };
        self.turns.push(turn);
        self.reply().inspect_err(|_| {
            self.turns.pop();
        })
    }

    /// Generates another reply to the last message.
    pub(super) fn regenerate(&mut self) -> Result<()> {
        let Some(turn) = self.turns.last_mut() else { bail!("there is no message yet") };
        let (reply, stop) = (std::mem::take(&mut turn.reply), std::mem::take(&mut turn.stop));
        if self.sampling.temperature == 0.0 {
            eprintln!("(at temperature 0 the reply is always the same: /set temperature VALUE)");
        }
        let result = self.reply();
        if result.is_err() {
            let turn = self.turns.last_mut().expect("a turn was there before");
            (turn.reply, turn.stop) = (reply, stop);
        }
        result
    }

    /// Removes the last message and its reply.
    pub(super) fn undo(&mut self) -> Result<()> {
        match self.turns.pop() {
            Some(turn) => {
                eprintln!("(removed: {:?})", turn.said);
                Ok(())
            }
            None => bail!("there is no message yet"),
        }
    }

    /// Removes all messages.
    pub(super) fn reset(&mut self) {
        self.turns.clear();
        self.prefix = None;
    }

    /// Sets or removes the system message, from the next reply on.
    pub(super) fn set_system(&mut self, text: Option<String>) -> Result<()> {
        if self.raw {
            bail!("/system is not supported with --raw");
        }
        self.system = text;
        Ok(())
    }

    /// Loads an adapter.
    pub(super) fn load(&mut self, name: &str, file: &AdapterPath) -> Result<()> {
        if file.path.join("tokenizer.json").is_file() {
            let mut missing = self.tokenizer.missing(&file.path)?;
            missing.retain(|token| self.tokenizer.id_of(&token.text).is_none());
            if let Some(token) = missing.first() {
                bail!(
                    "{}: adds {} tokens that this chat was started without, such as {:?}; restart the \
                     chat with --adapter {name}={0}",
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

    /// Activates these adapters and no others, from the next reply on.
    pub(super) fn activate(&mut self, names: &[(String, Option<f64>)]) -> Result<()> {
        let mut active = Vec::new();
        for (name, weight) in names {
            let adapter = self.registry.get(name)?;
            let weight = weight.or(self.weights.get(name).copied()).unwrap_or(1.0);
            active.push((name.clone(), ActiveAdapter { weight, ..ActiveAdapter::frozen(adapter) }));
        }
        self.active = active;
        Ok(())
    }

    /// Unloads an adapter.
    pub(super) fn drop_adapter(&mut self, name: &str) -> Result<()> {
        self.registry.remove(name)?;
        self.weights.remove(name);
        self.prefix = None; // it may refer to the adapter
        let before = self.active.len();
        self.active.retain(|(other, _)| other != name);
        if self.active.len() < before {
            eprintln!("(it was active: now {})", self.describe());
        }
        Ok(())
    }

    /// Lists the loaded adapters; active ones are marked with a star.
    pub(super) fn list(&self) -> String {
        let listed = self.registry.list();
        if listed.is_empty() {
            return "no adapter is loaded: /load NAME=PATH loads one".into();
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
    pub(super) fn settings(&self) -> String {
        let Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed } = self.sampling;
        format!(
            "temperature {temperature}\ntop_k {top_k}\ntop_p {top_p}\nmin_p {min_p}\n\
             repetition_penalty {repetition_penalty}\nseed {seed}\nmax_tokens {}",
            self.max_tokens
        )
    }

    /// Changes a setting from the next reply on.
    pub(super) fn set(&mut self, key: &str, value: &str) -> Result<()> {
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
                "unknown setting {key:?}; settings are temperature, top_k, top_p, min_p, \
                 repetition_penalty, seed and max_tokens"
            ),
        }
        sampling.check()?;
        self.sampling = sampling;
        Ok(())
    }

    /// Appends the conversation to a file, as a row of training data.
    pub(super) fn save(&self, path: &Path) -> Result<()> {
        if self.turns.is_empty() {
            bail!("there is no message yet");
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

    /// The messages, without a reply that is still missing.
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

    /// Tokens of the prompt of the next reply.
    fn prompt(&self) -> Result<Vec<u32>> {
        let text = match (self.raw, self.tokenizer.chat_template()) {
            (false, Some(template)) => template.render(&self.messages(), None, true)?,
            _ => self.text(),
        };
        Ok(self.tokenizer.with_bos(self.tokenizer.encode(&text, Special::Parse)?))
    }

    /// Generates and streams a reply.
    fn reply(&mut self) -> Result<()> {
        let prompt = self.prompt()?;
        let window = self.decoder.config.max_position_embeddings;
        let job = Job {
            active: self.active.iter().map(|(_, active)| active.clone()).collect(),
            sampling: self.sampling.clone(),
            rng_key: self.replies,
            eos_token_ids: self.end_tokens.clone(),
            prefix: self.prefix.take(),
            keep_cache: true,
            ..Job::new(prompt.clone(), self.max_tokens)
        };
        let mut engine = Engine::new(self.decoder, self.cache, 1);
        let id = engine.submit(job).map_err(|error| match error {
            GenerateError::LongPrompt { tokens, window, .. } => anyhow::anyhow!(
                "the conversation has {tokens} tokens, which leaves no room for a reply in the context \
                 window of {window} tokens: /undo removes the last message, /reset starts anew"
            ),
            error => error.into(),
        })?;
        self.replies += 1;
        let mut text = StreamedText::new(self.tokenizer, &self.stop);
        REPLYING.store(true, Ordering::Relaxed);
        INTERRUPTED.store(false, Ordering::Relaxed);
        let output = self.listen(&mut engine, id, &mut text);
        REPLYING.store(false, Ordering::Relaxed);
        let (generated, prefix) = output?;
        self.prefix = prefix;

        let (reply, rest) = text.finish()?;
        show(&rest);
        crate::cli::say!("");
        let stop = self.stop_behind(&generated, &reply)?;
        let turn = self.turns.last_mut().expect("a reply has a message");
        (turn.reply, turn.stop) = (reply, stop);
        match generated.finish {
            Finish::Length if prompt.len() + generated.token_ids.len() >= window => eprintln!(
                "(the context window of {window} tokens is full: /undo removes the last message, \
                 /reset starts anew)"
            ),
            Finish::Length if !self.raw => {
                eprintln!(
                    "(truncated at {} tokens: /set max_tokens VALUE allows more)",
                    self.max_tokens
                )
            }
            _ => {}
        }
        Ok(())
    }

    /// Runs a job until its end, a stop string or Ctrl-C, and streams its text.
    fn listen(
        &self,
        engine: &mut Engine,
        id: usize,
        text: &mut StreamedText,
    ) -> Result<(Generated, Option<Prefix>)> {
        loop {
            for event in engine.step()? {
                match event {
                    Event::Token { token, .. } => show(&text.push(token)),
                    Event::Finished { output, .. } => return Ok((output.generated, output.prefix)),
                    Event::Failed { error, .. } => return Err(error.into()),
                }
            }
            if (text.stopped() || INTERRUPTED.load(Ordering::Relaxed))
                && let Some(output) = engine.cancel(id)
            {
                return Ok((output.generated, output.prefix));
            }
        }
    }

    /// The stop string that ended a reply, which a growing text continues after.
    fn stop_behind(&self, generated: &Generated, reply: &str) -> Result<String> {
        if !self.raw {
            return Ok(String::new());
        }
        // Ids that the tokenizer does not have produce no text.
        let known = |token: &u32| self.tokenizer.token(*token).is_some();
        let tokens: Vec<u32> = generated.token_ids.iter().copied().filter(known).collect();
        let whole = self.tokenizer.decode(&tokens, true)?;
        let rest = whole.strip_prefix(reply).unwrap_or_default();
        let behind = self.stop.iter().filter(|stop| rest.starts_with(stop.as_str()));
        Ok(behind.max_by_key(|stop| stop.len()).cloned().unwrap_or_default())
    }
}

/// An active adapter in the syntax of `/adapter`.
fn written((name, active): &(String, ActiveAdapter)) -> String {
    match active.weight {
        1.0 => name.clone(),
        weight => format!("{name}={weight}"),
    }
}
