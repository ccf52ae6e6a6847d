//! Best-of-n: sampling several replies and keeping the one with the highest reward.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::{Map, Value, json};

use super::printer;
use crate::generate::{Finish, Generated};
use crate::model::{ActiveAdapter, Decoder};
use crate::rollout::reward_model::RewardModel;
use crate::rollout::{Answer, Response, RewardCommand, RewardSource, Rewards, Scorer};
use crate::text::{Special, Tokenizer};
use crate::train::read_scoring;

/// Time limit of a reward command for all replies, in seconds.
const TIMEOUT: f64 = 60.0;

#[derive(Debug, clap::Args)]
pub(super) struct BestOf {
    /// Best-of-n: sample N replies and keep the one with the highest reward, or without rewards with the
    /// highest mean log-probability
    #[arg(long, value_name = "N")]
    best_of: Option<usize>,
    /// Reward: regex:PATTERN, json-schema:FILE, length:MIN-MAX, or exact:prompt, numeric:prompt; can be
    /// repeated
    #[arg(long, value_name = "RULE", requires = "best_of")]
    reward: Vec<String>,
    /// Reward: a program that reads JSON lines with `prompt` and `completion`, and answers each with
    /// {"reward": NUMBER}; can be repeated
    #[arg(long, value_name = "COMMAND", requires = "best_of")]
    reward_command: Vec<String>,
    /// Time limit of a reward command for all replies, in seconds [default: 60]
    #[arg(long, value_name = "SECONDS", requires = "reward_command")]
    reward_timeout: Option<f64>,
    /// Reward: an adapter with a score head on the same base, as `reward` writes it
    #[arg(long, value_name = "PATH", requires = "best_of")]
    reward_adapter: Option<PathBuf>,
    /// Reward: a separate model, a folder of a Hugging Face sequence classifier with one label
    #[arg(long, value_name = "PATH", requires = "best_of")]
    reward_model: Option<PathBuf>,
    /// Weights of the rewards, in the order --reward, --reward-command, --reward-adapter,
    /// --reward-model [default: all 1]
    #[arg(
        long,
        value_name = "WEIGHTS",
        value_delimiter = ',',
        allow_hyphen_values = true,
        requires = "best_of"
    )]
    reward_weights: Vec<f64>,
}

/// A generated reply, with its text up to the stop string.
pub(super) struct SampledReply {
    /// The generated tokens.
    pub generated: Generated,
    /// The text.
    pub text: String,
}

/// The rewards of all replies.
pub(super) struct RankedReplies {
    /// Index of the best reply; the first of equals.
    pub best: usize,
    /// The reward of each reply, if any source has an opinion.
    pub totals: Vec<Option<f64>>,
    /// Each reply with its rewards, as JSON.
    pub candidates: Vec<Value>,
}

impl BestOf {
    /// Number of replies to sample.
    pub(super) fn replies(&self, temperature: f64) -> Result<usize> {
        match self.best_of {
            Some(0) => bail!("--best-of is 0, needed at least 1"),
            Some(2..) if temperature == 0.0 => {
                bail!("--best-of requires a --temperature above 0: at 0 all replies are equal")
            }
            replies => Ok(replies.unwrap_or(1)),
        }
    }

    /// The reward adapter, if given.
    pub(super) fn adapter(&self) -> Option<&Path> {
        self.reward_adapter.as_deref()
    }

    /// Whether --best-of is given.
    pub(super) fn asked(&self) -> bool {
        self.best_of.is_some()
    }

    /// Whether replies are ranked by their own log-probabilities.
    pub(super) fn by_logprobs(&self) -> bool {
        let Self { reward, reward_command, reward_adapter, reward_model, .. } = self;
        let none = reward.is_empty() && reward_command.is_empty();
        self.asked() && none && reward_adapter.is_none() && reward_model.is_none()
    }

    /// Whether a reward adapter reads the replies, including their end-of-turn tokens.
    pub(super) fn reads_endings(&self) -> bool {
        self.asked() && self.reward_adapter.is_some()
    }

    /// Loads the reward sources, so that errors are reported before anything is sampled. `now` sets the date
    /// in the chat template of a reward model.
    pub(super) fn judge(&self, decoder: &Decoder, now: Option<u64>) -> Result<Judge> {
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
            adapter = Some(ActiveAdapter::frozen(Arc::new(read_scoring(
                path,
                decoder,
                printer::monitor(),
            )?)));
            sources.push(RewardSource::Model { name: "reward_adapter".into() });
        }
        if let Some(path) = &self.reward_model {
            model = Some(RewardModel::load(path, decoder, now)?);
            sources.push(RewardSource::Model { name: "reward_model".into() });
        }
        if self.by_logprobs() {
            sources.push(RewardSource::Model { name: "mean_logprob".into() });
        }
        let weights = Some(self.reward_weights.clone()).filter(|weights| !weights.is_empty());
        let rewards = Rewards::new(sources, weights)?;
        let scorer = Scorer { rewards, adapter, model, eos: None, after: Vec::new() };
        Ok(Judge { scorer, by_logprobs: self.by_logprobs() })
    }
}

/// The loaded reward sources.
pub(super) struct Judge {
    scorer: Scorer,
    by_logprobs: bool,
}

impl Judge {
    /// Scores the replies to a prompt, which is a conversation if `messages` are given. The row that rules and
    /// programs see has only the prompt.
    pub(super) fn judge(
        &mut self,
        decoder: &Decoder,
        tokenizer: &Tokenizer,
        (prompt, prompt_ids): (&str, &[u32]),
        messages: Option<Vec<Value>>,
        replies: &[SampledReply],
    ) -> Result<RankedReplies> {
        let chat = messages.is_some();
        let asked = messages.map_or(json!(prompt), Value::Array);
        let row = Map::from_iter([("prompt".to_string(), asked)]);
        self.scorer.eos = tokenizer.eos();
        // Only the adapter needs the template's end-of-turn tokens.
        let reads_endings = chat && self.scorer.adapter.is_some();
        self.scorer.after = if reads_endings { tokenizer.after_turn()? } else { Vec::new() };
        let responses = responses(tokenizer, prompt_ids, replies)?;
        let answers = responses.iter().zip(replies).map(|(response, reply)| Answer {
            response,
            text: &reply.text,
            finished: reply.generated.finish != Finish::Length,
            prompt,
            row: &row,
        });
        let answers: Vec<Answer> = answers.collect();
        let logprobs =
            || replies.iter().map(|reply| mean_logprob(&reply.generated)).collect::<Vec<f64>>();
        let known = self.by_logprobs.then(logprobs);
        let scores = self.scorer.score_answers(decoder, &answers, known)?;

        let rated = scores.totals.iter().enumerate().filter_map(|(i, total)| Some((i, (*total)?)));
        let best = rated.reduce(|best, next| if next.1 > best.1 { next } else { best });
        let Some((best, _)) = best else {
            bail!("no reward source has an opinion on any of the {} replies", replies.len())
        };
        let candidate = |(i, reply): (usize, &SampledReply)| {
            let named = self.scorer.rewards.sources().iter().zip(&scores.columns);
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
        Ok(RankedReplies { best, totals: scores.totals, candidates })
    }
}

/// The finish reason as named in OpenAI's API.
pub(super) fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Length => "length",
        Finish::Stop | Finish::Callback => "stop",
    }
}

/// The replies as responses to score; a reply that a stop string ended is its text before the stop string.
fn responses(
    tokenizer: &Tokenizer,
    prompt: &[u32],
    replies: &[SampledReply],
) -> Result<Vec<Response>> {
    let prompt: Arc<[u32]> = prompt.into();
    let response = |(key, reply): (u64, &SampledReply)| -> Result<Response> {
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

/// Mean log-probability of the tokens of a reply under the model, including the end-of-generation token.
fn mean_logprob(generated: &Generated) -> f64 {
    let sum: f64 = generated.token_logprobs.iter().map(|&logprob| f64::from(logprob)).sum();
    sum / generated.token_logprobs.len().max(1) as f64
}
