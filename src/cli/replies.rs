//! `quantune eval --prompts`: generates replies to prompts, and reports their reward, their diversity and their
//! win rate against another adapter.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

use super::load_adapters;
use super::printer;
use crate::data::{Prompt, Prompts};
use crate::eval::{Reply, diversity};
use crate::generate::{Sampling, Settings};
use crate::model::{ActiveAdapter, CacheType, Decoder};
use crate::rollout::diagnose::mean_and_error;
use crate::rollout::{Response, RewardSource, Rewards, Scorer, respond};
use crate::text::Tokenizer;
use crate::train::read_scoring;
use crate::train::settings::AdapterPath;
use crate::weights::write_atomically;

/// Number of rows decoded in parallel.
const SLOTS: usize = 16;

/// Flags for generating and comparing replies.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Replies {
    /// Prompts, as `ppo` and `grpo` read them; replies are generated and scored by --reward
    #[arg(long, value_name = "FILE", conflicts_with_all = ["data", "text"], requires = "reward")]
    prompts: Option<PathBuf>,
    /// With --prompts: another adapter, or `base` for none, to compare with (win rate)
    #[arg(long, value_name = "ADAPTER", requires = "prompts")]
    against: Option<String>,
    /// With --prompts: maximum number of tokens per reply [default: 64]
    #[arg(long, requires = "prompts")]
    max_tokens: Option<usize>,
    /// With --prompts: temperature; 0 is greedy [default: 0.7]
    #[arg(long, requires = "prompts")]
    temperature: Option<f64>,
    /// With --prompts: replies per prompt [default: 1]
    #[arg(long, requires = "prompts")]
    samples: Option<usize>,
    /// With --prompts: seed of sampling [default: 42]
    #[arg(long, requires = "prompts")]
    seed: Option<u64>,
    /// With --prompts: output file for the replies and rewards, one JSON line each
    #[arg(long, value_name = "FILE", requires = "prompts")]
    replies: Option<PathBuf>,
}

/// Replies under one set of adapters, and their rewards.
struct ScoredReplies {
    responses: Vec<Response>,
    texts: Vec<String>,
    rewards: Vec<f64>,
}

impl Replies {
    /// Whether prompts were given.
    pub(super) fn asked(&self) -> bool {
        self.prompts.is_some()
    }

    /// The adapter to compare with; `None` without one, or for the base.
    pub(super) fn against(&self) -> Result<Option<AdapterPath>> {
        match self.against.as_deref() {
            None | Some("base") => Ok(None),
            Some(text) => text.parse().map(Some).map_err(anyhow::Error::msg),
        }
    }

    /// Generates and scores the replies.
    pub(super) fn run(
        &self,
        decoder: &Decoder,
        tokenizer: &Tokenizer,
        adapters: &[AdapterPath],
        reward: &str,
        json: bool,
    ) -> Result<Value> {
        let path = self.prompts.as_ref().context("requires --prompts")?;
        let most = self.max_tokens.unwrap_or(64);
        // The reward model reads the end-of-turn tokens after the reply, in the same context window.
        let ending = 1 + tokenizer.after_turn().map_or(0, |after| after.len());
        let window = decoder.config.max_position_embeddings.saturating_sub(ending);
        if most == 0 || most >= window {
            bail!(
                "--max-tokens is {most}, needed at least 1 and less than the context window of {window} tokens"
            );
        }
        if self.samples == Some(0) {
            bail!("--samples is 0, needed at least 1");
        }
        let temperature = self.temperature.unwrap_or(0.7);
        let never = AtomicBool::new(false); // nothing is lost: Ctrl-C ends the process
        let prompts = Prompts::load(path, tokenizer, window - most, &never)?;
        let prompts: Vec<Prompt> = prompts.rows.iter().collect();
        let mut scorer = scorer(reward, decoder, tokenizer, path, &prompts)?;
        let active = load_adapters(adapters, decoder)?;
        let other = match (self.against.as_deref(), self.against()?) {
            (None, _) => None,
            (Some(_), None) => Some(Vec::new()),
            (Some(_), Some(arg)) => Some(load_adapters(&[arg], decoder)?),
        };
        let mut answer = |active: &[ActiveAdapter]| -> Result<ScoredReplies> {
            let tokens: Vec<Arc<[u32]>> =
                prompts.iter().map(|prompt| prompt.tokens.clone().into()).collect();
            let settings = Settings {
                sampling: Sampling {
                    temperature,
                    seed: self.seed.unwrap_or(42),
                    ..Sampling::default()
                },
                max_tokens: most,
                cache: CacheType::of(decoder.compute),
                logprobs: None,
                sampled_logps: false,
                slots: SLOTS,
            };
            let is_end = |token| tokenizer.is_end_of_generation(token);
            let samples = self.samples.unwrap_or(1);
            let responses =
                respond::respond(decoder, active, &tokens, samples, &settings, &is_end, 0)?;
            let (texts, scores) = scorer.score(decoder, tokenizer, &prompts, &responses)?;
            let rewards = scores.totals.iter().map(|total| total.unwrap_or(0.0)).collect();
            Ok(ScoredReplies { responses, texts, rewards })
        };

        let samples = self.samples.unwrap_or(1);
        let judged = answer(&active)?;
        let mut value = Map::from_iter([("prompts".to_string(), json!(prompts.len()))]);
        value.extend(figures(decoder, &active, &judged, (temperature, samples))?);
        let mut lines = self.lines(&prompts, "reply", &judged);
        if let Some(other) = other {
            let others = answer(&other)?;
            let (rate, error) = win_rate(&judged.rewards, &others.rewards, samples);
            value.insert("win_rate".into(), json!(rate));
            value.insert("win_rate_error".into(), json!(error));
            let figures = figures(decoder, &other, &others, (temperature, samples))?;
            value.insert("against".into(), Value::Object(figures));
            lines.extend(self.lines(&prompts, "against", &others));
        }
        if let Some(path) = &self.replies {
            let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
            write_atomically(path, |file| file.write_all(text.as_bytes()))?;
        }
        if !json {
            show("reward", &value);
            if let Some(Value::Object(against)) = value.get("against") {
                show("against", against);
                let number = |key: &str| value.get(key).and_then(Value::as_f64).unwrap_or(0.0);
                crate::cli::say!(
                    "win rate {:.1} % ± {:.1}",
                    number("win_rate") * 100.0,
                    number("win_rate_error") * 100.0
                );
            }
        }
        Ok(Value::Object(value))
    }

    fn lines(&self, prompts: &[Prompt], by: &str, judged: &ScoredReplies) -> Vec<Value> {
        let samples = self.samples.unwrap_or(1);
        let line = |(i, text): (usize, &String)| {
            json!({
                "prompt": prompts[i / samples].text,
                "by": by,
                "response": text,
                "reward": judged.rewards[i],
                "finished": judged.responses[i].ended,
            })
        };
        judged.texts.iter().enumerate().map(line).collect()
    }
}

/// The scorer: a reward model on the base, or a rule.
fn scorer(
    reward: &str,
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    path: &Path,
    prompts: &[Prompt],
) -> Result<Scorer> {
    let folder = Path::new(reward);
    let (adapter, source) = if folder.is_dir() {
        let adapter =
            ActiveAdapter::frozen(Arc::new(read_scoring(folder, decoder, printer::monitor())?));
        (Some(adapter), RewardSource::Model { name: "reward".into() })
    } else {
        let rule = RewardSource::rule(reward)
            .with_context(|| format!("--reward {reward:?} is neither a folder nor a rule"))?;
        (None, rule)
    };
    let rewards = Rewards::new(vec![source], None)?;
    for prompt in prompts {
        rewards
            .check(&prompt.row)
            .with_context(|| format!("{}:{}", path.display(), prompt.line))?;
    }
    let chats = prompts.iter().any(|prompt| prompt.row["prompt"].is_array());
    let after = if chats { tokenizer.after_turn()? } else { Vec::new() };
    Ok(Scorer { rewards, adapter, model: None, eos: tokenizer.eos(), after })
}

/// Reward, length, entropy and diversity of replies.
fn figures(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    judged: &ScoredReplies,
    (temperature, samples): (f64, usize),
) -> Result<Map<String, Value>> {
    let (reward, error) = mean_and_error(&by_prompt(&judged.rewards, samples));
    let replies: Vec<Reply> = judged
        .responses
        .iter()
        .map(|response| Reply {
            tokens: &response.tokens[..response.tokens.len() - usize::from(response.ended)],
            finished: response.ended,
        })
        .collect();
    let spread = diversity(&replies);
    let temperature = if temperature > 0.0 { temperature } else { 1.0 };
    let logps = respond::log_probs(decoder, active, &judged.responses, temperature)?;
    let tokens = logps.iter().map(Vec::len).sum::<usize>().max(1);
    let surprise = -logps.iter().flatten().map(|&logp| f64::from(logp)).sum::<f64>();
    let figures = [
        ("replies", json!(judged.responses.len())),
        ("reward", json!(reward)),
        ("reward_error", json!(error)),
        ("length", json!(spread.mean_length)),
        ("ended", json!(1.0 - spread.truncated)),
        ("entropy", json!(surprise / tokens as f64)),
        ("distinct_1", json!(spread.distinct_1)),
        ("distinct_2", json!(spread.distinct_2)),
        ("distinct_3", json!(spread.distinct_3)),
        ("duplicates", json!(spread.duplicates)),
    ];
    Ok(figures.into_iter().map(|(key, value)| (key.to_string(), value)).collect())
}

/// Win rate: how often our reply to a prompt has the higher reward, a tie counting as half a win; and its
/// standard error over prompts.
fn win_rate(ours: &[f64], theirs: &[f64], samples: usize) -> (f64, f64) {
    let won = |(ours, theirs): (&f64, &f64)| match ours.partial_cmp(theirs) {
        Some(std::cmp::Ordering::Greater) => 1.0,
        Some(std::cmp::Ordering::Equal) => 0.5,
        _ => 0.0,
    };
    let won: Vec<f64> = ours.iter().zip(theirs).map(won).collect();
    mean_and_error(&by_prompt(&won, samples))
}

/// The mean per prompt, since replies to the same prompt are not independent.
fn by_prompt(values: &[f64], samples: usize) -> Vec<f64> {
    let mean = |of_prompt: &[f64]| of_prompt.iter().sum::<f64>() / of_prompt.len() as f64;
    values.chunks(samples).map(mean).collect()
}

fn show(name: &str, figures: &Map<String, Value>) {
    let number = |key: &str| figures.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN);
    crate::cli::say!(
        "{name} {:.4} ± {:.4}; {:.1} tokens per reply, entropy {:.2} nats per token, distinct-2 {:.3}",
        number("reward"),
        number("reward_error"),
        number("length"),
        number("entropy"),
        number("distinct_2")
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tie_is_half_a_win() {
        assert_eq!(win_rate(&[1.0, 2.0, 3.0, 0.0], &[0.0, 2.0, 4.0, -1.0], 1).0, 2.5 / 4.0);
        assert_eq!(by_prompt(&[1.0, 2.0, 3.0, 5.0], 2), [1.5, 4.0]);
    }
}
