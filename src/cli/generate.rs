//! `quantune generate`.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::best_of::{BestOf, SampledReply, finish_reason};
use super::loading::Loading;
use super::sampling::SamplingFlags;
use super::{TemplateFlags, load_adapters, open_tokenizer, paths};
use crate::generate::{Request, Sampling, Settings, StopStrings, generate};
use crate::model::{Adapters, CacheType, Decoder};
use crate::text::{DecodeStream, Special, TextError, Tokenizer, first_second};
use crate::train::settings::AdapterPath;
use crate::weights::Checkpoint;

#[derive(Debug, clap::Args)]
pub(super) struct Generate {
    /// Base model: a GGUF file or a Hugging Face folder
    #[arg(long)]
    base: PathBuf,
    /// PEFT adapter folder, PATH or PATH=WEIGHT; can be repeated
    #[arg(long)]
    adapter: Vec<AdapterPath>,
    /// Prompt
    #[arg(long)]
    prompt: String,
    /// System message
    #[arg(long, conflicts_with = "raw")]
    system: Option<String>,
    /// Use the prompt as it is: no chat template, no added special tokens
    #[arg(long)]
    raw: bool,
    /// Maximum number of generated tokens [default: 256]
    #[arg(long)]
    max_tokens: Option<usize>,
    #[command(flatten)]
    sampling: SamplingFlags,
    /// Stop string, not included in the text; can be repeated
    #[arg(long)]
    stop: Vec<String>,
    /// With --json: log-probabilities of the K most likely tokens at each position
    #[arg(long, value_name = "K")]
    logprobs: Option<usize>,
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
    #[command(flatten)]
    best_of: BestOf,
}

/// Number of replies that are decoded in parallel.
const SLOTS: usize = 32;

impl Generate {
    pub(super) fn run(self, json: bool) -> Result<Value> {
        if self.logprobs.is_some() && !json {
            bail!("--logprobs requires --json");
        }
        let sampling = self.sampling.sampling();
        let replies = self.best_of.replies(sampling.temperature)?;
        let checkpoint = Checkpoint::open(&self.base)?;
        let mut adapters = paths(&self.adapter);
        adapters.extend(self.best_of.adapter());
        let mut tokenizer = open_tokenizer(&checkpoint, &adapters, self.template_date.as_deref())?;
        let decoder = self.loading.decoder(&checkpoint, &tokenizer)?;
        self.template.change(&mut tokenizer)?;
        let active = load_adapters(&self.adapter, &decoder)?;
        let prompt = self.prompt_ids(&tokenizer)?;

        let now = self.template_date.as_deref().and_then(first_second);
        let judge = self.best_of.asked().then(|| self.best_of.judge(&decoder, now)).transpose()?;
        let settings = self.settings(sampling, &decoder, &tokenizer, prompt.len());
        let mut texts: Vec<StreamedText> =
            (0..replies).map(|_| StreamedText::new(&tokenizer, &self.stop)).collect();
        let requests: Vec<Request> =
            (0..).zip(&texts).map(|(key, _)| Request::new(&prompt, key)).collect();
        let streams = !json && judge.is_none(); // of several replies, the best is only known at the end
        let started = Instant::now();
        let mut first_token = None;
        let generation = generate(
            &decoder,
            Adapters::Same(&active),
            &requests,
            &settings,
            &|token| tokenizer.is_end_of_generation(token),
            &mut |row, token| {
                first_token.get_or_insert_with(|| started.elapsed().as_secs_f64());
                let piece = texts[row].push(token);
                if streams {
                    show(&piece);
                }
                if texts[row].stopped() {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            },
        )?;
        let seconds = started.elapsed().as_secs_f64();
        let mut candidates = Vec::new();
        for (generated, text) in generation.rows.into_iter().zip(texts) {
            let (text, rest) = text.finish()?;
            if streams {
                show(&rest);
            }
            candidates.push(SampledReply { generated, text });
        }
        let prefill_seconds = first_token.unwrap_or(seconds);
        let tokens_per_second =
            decode_rate(generation.usage.tokens, replies, prefill_seconds, seconds);
        let judged = match judge {
            Some(mut judge) => {
                let prompt = (&self.prompt[..], &prompt[..]);
                let chat = !self.raw && tokenizer.chat_template().is_some();
                let messages = chat.then(|| self.messages());
                Some(judge.judge(&decoder, &tokenizer, prompt, messages, &candidates)?)
            }
            None => None,
        };
        let best = judged.as_ref().map_or(0, |judged| judged.best);
        let SampledReply { generated, text } = candidates.swap_remove(best);
        if let (Some(judged), false) = (&judged, json) {
            show(&text);
            let rewards = judged.totals.iter();
            let rewards =
                rewards.map(|total| total.map_or("-".into(), |total| format!("{total:.3}")));
            let rewards: Vec<String> = rewards.collect();
            eprintln!("best reply: {} (rewards: {})", best + 1, rewards.join(", "));
        }
        if !json {
            crate::cli::say!("");
        }

        let mut value = json!({
            "text": text,
            "token_ids": generated.token_ids,
            "tokens": generated.token_ids.len(),
            "prompt_tokens": prompt.len(),
            "finish_reason": finish_reason(generated.finish),
            "tokens_per_second": tokens_per_second,
            "prompt_tokens_per_second": prompt.len() as f64 / prefill_seconds.max(1e-9),
            "kernels": decoder.kernels(),
            "decode_kernels": decoder.decode_kernels(),
        });
        if let Some(judged) = judged {
            value["best"] = json!(best);
            value["candidates"] = judged.candidates.into();
        }
        if self.logprobs.is_some() {
            value["logprobs"] = generated.logprobs.into_iter().map(logprobs_json).collect();
        }
        Ok(value)
    }

    /// The settings of the engine for a prompt of so many tokens.
    fn settings(
        &self,
        sampling: Sampling,
        decoder: &Decoder,
        tokenizer: &Tokenizer,
        prompt_tokens: usize,
    ) -> Settings {
        let mut max_tokens = self.max_tokens.unwrap_or(256);
        if self.best_of.reads_endings() {
            // The reward model reads the end-of-turn tokens after the reply, in the same context window.
            let ending = 1 + tokenizer.after_turn().map_or(0, |after| after.len());
            let window = decoder.config.max_position_embeddings;
            max_tokens = max_tokens.min(window.saturating_sub(prompt_tokens + ending).max(1));
        }
        Settings {
            sampling,
            max_tokens,
            cache: self.cache_type.unwrap_or(CacheType::of(decoder.compute)),
            logprobs: self.logprobs.or(self.best_of.by_logprobs().then_some(0)),
            sampled_logps: false,
            slots: SLOTS,
        }
    }

    /// The conversation, up to the user message.
    fn messages(&self) -> Vec<Value> {
        let message = |role: &str, content: &str| json!({ "role": role, "content": content });
        let system = self.system.iter().map(|content| message("system", content));
        system.chain([message("user", &self.prompt)]).collect()
    }

    /// Tokens of the prompt, rendered by the chat template; without a template, of the plain text.
    fn prompt_ids(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        if self.raw {
            return Ok(tokenizer.encode(&self.prompt, Special::Parse)?);
        }
        let Some(template) = tokenizer.chat_template() else {
            if self.system.is_some() {
                bail!("--system requires a chat template, which this base does not have");
            }
            eprintln!(
                "note: this base has no chat template; the prompt is continued as plain text"
            );
            return Ok(tokenizer.with_bos(tokenizer.encode(&self.prompt, Special::AsText)?));
        };
        let text = template.render(&self.messages(), None, true)?;
        Ok(tokenizer.with_bos(tokenizer.encode(&text, Special::Parse)?))
    }
}

/// The most likely tokens at a position, with their log-probs.
fn logprobs_json(top: Vec<(u32, f32)>) -> Value {
    let entry = |(token_id, logprob)| json!({ "token_id": token_id, "logprob": logprob });
    top.into_iter().map(entry).collect()
}

/// Tokens per second of decoding. Prefill ends with the first token; all tokens but the first of each reply
/// are decode steps.
fn decode_rate(tokens: usize, replies: usize, prefill_seconds: f64, seconds: f64) -> f64 {
    let (tokens, seconds) = match tokens.saturating_sub(replies) {
        0 => (tokens, seconds),
        decoded => (decoded, seconds - prefill_seconds),
    };
    tokens as f64 / seconds.max(1e-9)
}

/// Streamed text of a reply.
pub(super) struct StreamedText<'a> {
    stream: DecodeStream<'a>,
    stops: StopStrings,
    text: String,
}

impl<'a> StreamedText<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, stops: &[String]) -> Self {
        let stream = tokenizer.decode_stream(true);
        Self { stream, stops: StopStrings::new(stops), text: String::new() }
    }

    /// Appends a token, and returns the new text that cannot be part of a stop string.
    pub(super) fn push(&mut self, token: u32) -> String {
        // Ids of padded vocabularies that the tokenizer does not have produce no text.
        let piece = self.stream.push(token).ok().flatten().unwrap_or_default();
        let piece = self.stops.push(&piece);
        self.text.push_str(&piece);
        piece
    }

    /// Whether a stop string is complete.
    pub(super) fn stopped(&self) -> bool {
        self.stops.stopped()
    }

    /// The whole text, and the part that was held back until now.
    pub(super) fn finish(mut self) -> Result<(String, String), TextError> {
        let held = self.stream.finish()?;
        let rest = self.stops.push(&held) + &self.stops.finish();
        self.text.push_str(&rest);
        Ok((self.text, rest))
    }
}

/// Prints text immediately; exits if stdout is closed.
pub(super) fn show(piece: &str) {
    let mut stdout = std::io::stdout();
    if stdout.write_all(piece.as_bytes()).and_then(|()| stdout.flush()).is_err() {
        std::process::exit(0);
    }
}
