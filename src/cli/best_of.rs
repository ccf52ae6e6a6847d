//! Which of several replies is kept.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

use crate::generate::{Finish, Generated};
use crate::model::{Decoder, Worn};
use crate::rollout::reward_model::RewardModel;
use crate::rollout::{Response, RewardCommand, RewardSource, Rewards, Sample, respond};
use crate::text::{Special, Tokenizer};
use crate::train::read_scoring;

/// Seconds a program gets for all replies.
const TIMEOUT: f64 = 60.0;

#[derive(Debug, clap::Args)]
pub struct BestOf {
    /// Sample N replies and keep the best: by the rewards that follow, without one by the mean
    /// log-probability of its tokens
    #[arg(long, value_name = "N")]
    best_of: Option<usize>,
    /// Reward: regex:PATTERN, json-schema:FILE, length:MIN-MAX, or exact:prompt, numeric:prompt; may
    /// be given again
    #[arg(long, value_name = "RULE", requires = "best_of")]
    reward: Vec<String>,
    /// Reward: a program that reads JSON lines of `prompt` and `completion` and answers each with
    /// {"reward": NUMBER}; may be given again
    #[arg(long, value_name = "COMMAND", requires = "best_of")]
    reward_command: Vec<String>,
    /// Seconds such a program has for all replies [default: 60]
    #[arg(long, value_name = "SECONDS", requires = "reward_command")]
    reward_timeout: Option<f64>,
    /// Reward: an adapter with a score head on the same base, as `reward` makes it
    #[arg(long, value_name = "PATH", requires = "best_of")]
    reward_adapter: Option<PathBuf>,
    /// Reward: a Hugging Face sequence classifier with one label, a model folder of its own
    #[arg(long, value_name = "PATH", requires = "best_of")]
    reward_model: Option<PathBuf>,
    /// Weights of the rewards, in the order --reward, --reward-command, --reward-adapter,
    /// --reward-model [default: 1 each]
    #[arg(
        long,
        value_name = "WEIGHTS",
        value_delimiter = ',',
        allow_hyphen_values = true,
        requires = "best_of"
    )]
    reward_weights: Vec<f64>,
}

/// A reply, and its text up to where it was stopped.
pub struct Candidate {
    /// Its tokens.
    pub generated: Generated,
    /// Its text.
    pub text: String,
}

/// What was made of the replies.
pub struct Judged {
    /// Which is the best, of equals the first.
    pub best: usize,
    /// The reward of each, if there is an opinion on it.
    pub totals: Vec<Option<f64>>,
    /// Each reply with what it got.
    pub candidates: Vec<Value>,
}

impl BestOf {
    /// How many replies are sampled.
    pub fn replies(&self, temperature: f64) -> Result<usize> {
        match self.best_of {
            Some(0) => bail!("--best-of is 0, needed at least 1"),
            Some(2..) if temperature == 0.0 => {
                bail!(
                    "--best-of at --temperature 0 has one reply to choose from, needed more than 0"
                )
            }
            replies => Ok(replies.unwrap_or(1)),
        }
    }

    /// Whether there is a choice to be shown.
    pub fn asked(&self) -> bool {
        self.best_of.is_some()
    }

    /// Whether replies are judged by their own log-probabilities.
    pub fn by_logprobs(&self) -> bool {
        let Self { reward, reward_command, reward_adapter, reward_model, .. } = self;
        let none = reward.is_empty() && reward_command.is_empty();
        self.asked() && none && reward_adapter.is_none() && reward_model.is_none()
    }

    /// Whether replies are read through to what ends a turn.
    pub fn reads_endings(&self) -> bool {
        self.asked() && self.reward_adapter.is_some()
    }

    /// Loads what judges: said before anything is sampled, if it cannot be. `now` is the day that a
    /// reward model's template shows.
    pub fn judge(&self, decoder: &Decoder, now: Option<u64>) -> Result<Judge> {
        let (mut sources, mut adapter, mut model) = (Vec::new(), None, None);
        for spec in &self.reward {
            sources.push(RewardSource::rule(spec)?);
        }
        for command in &self.reward_command {
            let seconds = self.reward_timeout.unwrap_or(TIMEOUT);
            let Some(timeout) = Duration::try_from_secs_f64(seconds).ok().filter(|_| seconds > 0.0)
            else {
                bail!("--reward-timeout is {seconds}, needed seconds above 0");
            };
            sources.push(RewardSource::Command(RewardCommand::start(command, timeout)?));
        }
        if let Some(path) = &self.reward_adapter {
            adapter = Some(Worn::frozen(Arc::new(read_scoring(path, decoder)?)));
            sources.push(RewardSource::Model { name: "reward_adapter".into() });
        }
        if let Some(path) = &self.reward_model {
            model = Some(RewardModel::load(path, decoder.compute, now)?);
            sources.push(RewardSource::Model { name: "reward_model".into() });
        }
        if self.by_logprobs() {
            sources.push(RewardSource::Model { name: "mean_logprob".into() });
        }
        let weights = Some(self.reward_weights.clone()).filter(|weights| !weights.is_empty());
        Ok(Judge { rewards: Rewards::new(sources, weights)?, adapter, model })
    }
}

/// What judges replies, loaded.
pub struct Judge {
    rewards: Rewards,
    adapter: Option<Worn>,
    model: Option<RewardModel>,
}

impl Judge {
    /// Judges the replies to a prompt, those to a conversation with its `messages`. Rules and programs see of a
    /// row its prompt alone.
    pub fn judge(
        &mut self,
        decoder: &Decoder,
        tokenizer: &Tokenizer,
        (prompt, prompt_ids): (&str, &[u32]),
        messages: Option<Vec<Value>>,
        replies: &[Candidate],
    ) -> Result<Judged> {
        let chat = messages.is_some();
        let asked = messages.map_or(json!(prompt), Value::Array);
        let row = Map::from_iter([("prompt".to_string(), asked)]);
        let samples = replies.iter().map(|reply| {
            let Generated { finish, token_ids, .. } = &reply.generated;
            Sample {
                prompt,
                completion: &reply.text,
                tokens: token_ids.len() - usize::from(*finish == Finish::Stop),
                finished: *finish != Finish::Length,
                row: &row,
            }
        });
        let samples: Vec<Sample> = samples.collect();
        let mut models = Vec::new();
        if let Some(worn) = &self.adapter {
            let responses = responses(tokenizer, prompt_ids, replies)?;
            let head = worn.adapter.score.as_ref().context("the adapter has no score head")?;
            let worn = std::slice::from_ref(worn);
            let after = if chat { tokenizer.after_turn()? } else { Vec::new() };
            let eos = tokenizer.eos();
            let scores = respond::scores(decoder, worn, head, &responses, eos, &after)?;
            models.push(scores.into_iter().map(f64::from).collect());
        }
        if let Some(model) = &self.model {
            models.push(model.score(&samples)?);
        }
        if self.rewards.sources().iter().any(|source| source.name() == "mean_logprob") {
            models.push(replies.iter().map(|reply| mean_logprob(&reply.generated)).collect());
        }
        let scores = self.rewards.score(&samples, &models)?;

        let rated = scores.totals.iter().enumerate().filter_map(|(i, total)| Some((i, (*total)?)));
        let best = rated.reduce(|best, next| if next.1 > best.1 { next } else { best });
        let Some((best, _)) = best else {
            bail!("no reward has an opinion on any of the {} replies", replies.len())
        };
        let candidate = |(i, reply): (usize, &Candidate)| {
            let named = self.rewards.sources().iter().zip(&scores.columns);
            let rewards: Map<String, Value> =
                named.map(|(source, column)| (source.name().into(), json!(column[i]))).collect();
            json!({
                "text": reply.text,
                "reward": scores.totals[i],
                "rewards": rewards,
                "tokens": reply.generated.token_ids.len(),
                "finish_reason": finish_reason(reply.generated.finish),
            })
        };
        let candidates = replies.iter().enumerate().map(candidate).collect();
        Ok(Judged { best, totals: scores.totals, candidates })
    }
}

/// As OpenAI's interface names it.
pub fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Length => "length",
        Finish::Stop | Finish::Callback => "stop",
    }
}

/// The replies as a reward model reads them: of one that a stop string ended, the text before it.
fn responses(
    tokenizer: &Tokenizer,
    prompt: &[u32],
    replies: &[Candidate],
) -> Result<Vec<Response>> {
    let prompt: Arc<[u32]> = prompt.into();
    let response = |(key, reply): (u64, &Candidate)| -> Result<Response> {
        let tokens = match reply.generated.finish {
            Finish::Callback => tokenizer.encode(&reply.text, Special::AsText)?,
            Finish::Stop | Finish::Length => reply.generated.token_ids.clone(),
        };
        let ended = reply.generated.finish == Finish::Stop;
        let (sampled_logps, drawn_logps) = (Vec::new(), Vec::new());
        Ok(Response { prompt: prompt.clone(), tokens, key, ended, sampled_logps, drawn_logps })
    };
    (0..).zip(replies).map(response).collect()
}

/// The mean log-probability of a reply's tokens under the model itself, the one that ends it counted.
fn mean_logprob(generated: &Generated) -> f64 {
    let sum: f64 = generated.token_logprobs.iter().map(|&logprob| f64::from(logprob)).sum();
    sum / generated.token_logprobs.len().max(1) as f64
}
