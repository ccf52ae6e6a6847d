//! Responses to their texts to their rewards: what a run, an evaluation and a choice among replies
//! have in common.

use candle_core::Result as TensorResult;
use serde_json::{Map, Value};

use super::respond::{self, Response};
use super::{RewardError, RewardModel, RewardModelError, RewardScores, Rewards, Sample};
use crate::data::Prompt;
use crate::model::{ActiveAdapter, Decoder};
use crate::text::{TextError, Tokenizer};

/// What gives rewards, loaded.
#[derive(Debug)]
pub struct Scorer {
    /// The sources of reward and their weights.
    pub rewards: Rewards,
    /// The first source that is a model, if it is one on the base.
    pub adapter: Option<ActiveAdapter>,
    /// The next, if it is one of its own.
    pub model: Option<RewardModel>,
    /// If given, an adapter reads a response that did not end by itself as if it ended so.
    pub eos: Option<u32>,
    /// What the chat template writes behind an ended answer, if conversations are answered: an adapter
    /// has read it there when it was trained.
    pub after: Vec<u32>,
}

/// Why responses got no rewards.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScoreError {
    /// They have no text.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A source, or what it said.
    #[error(transparent)]
    Reward(#[from] RewardError),
    /// The model beside the base.
    #[error(transparent)]
    RewardModel(#[from] RewardModelError),
    /// candle refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// A response, and what it answers.
#[derive(Debug, Clone, Copy)]
pub struct Answer<'a> {
    /// Its tokens.
    pub response: &'a Response,
    /// Its text.
    pub text: &'a str,
    /// Whether it came to an end: by itself or where somebody stopped it.
    pub finished: bool,
    /// What was asked, as text.
    pub prompt: &'a str,
    /// The row of the data the prompt is from.
    pub row: &'a Map<String, Value>,
}

impl Scorer {
    /// Texts and rewards of responses to prompts, to each prompt as many, one prompt's together.
    pub fn score(
        &mut self,
        decoder: &Decoder,
        tokenizer: &Tokenizer,
        prompts: &[Prompt],
        responses: &[Response],
    ) -> Result<(Vec<String>, RewardScores), ScoreError> {
        let texts: Vec<String> = responses
            .iter()
            .map(|response| tokenizer.decode(&response.tokens, true))
            .collect::<Result<_, _>>()?;
        let per_prompt = (responses.len() / prompts.len().max(1)).max(1);
        let answers: Vec<Answer> = responses
            .chunks(per_prompt)
            .zip(prompts)
            .flat_map(|(group, prompt)| group.iter().map(move |response| (response, prompt)))
            .zip(&texts)
            .map(|((response, prompt), text)| Answer {
                response,
                text,
                finished: response.ended,
                prompt: &prompt.text,
                row: &prompt.row,
            })
            .collect();
        let scores = self.score_answers(decoder, &answers, None)?;
        Ok((texts, scores))
    }

    /// Rewards of answers whose texts are known. `known` are the scores of a last source that is a
    /// model, if the caller has run one.
    pub fn score_answers(
        &mut self,
        decoder: &Decoder,
        answers: &[Answer],
        known: Option<Vec<f64>>,
    ) -> Result<RewardScores, ScoreError> {
        let samples: Vec<Sample> = answers
            .iter()
            .map(|&Answer { response, text, finished, prompt, row }| Sample {
                prompt,
                completion: text,
                tokens: response.tokens.len() - usize::from(response.ended),
                finished,
                row,
            })
            .collect();
        let mut models = Vec::new();
        if let Some(active) = &self.adapter {
            let responses: Vec<&Response> = answers.iter().map(|answer| answer.response).collect();
            let scores = self.read(decoder, active, &responses)?;
            models.push(scores.into_iter().map(f64::from).collect());
        }
        if let Some(model) = &self.model {
            models.push(model.score(&samples)?);
        }
        models.extend(known);
        Ok(self.rewards.score(&samples, &models)?)
    }

    /// What an adapter with a score head makes of responses, read as the rewards' own adapter reads
    /// them.
    pub fn read(
        &self,
        decoder: &Decoder,
        active: &ActiveAdapter,
        responses: &[&Response],
    ) -> TensorResult<Vec<f32>> {
        let Some(head) = &active.adapter.score else {
            candle_core::bail!("the adapter has no score head")
        };
        let active = std::slice::from_ref(active);
        respond::scores(decoder, active, head, responses, self.eos, &self.after)
    }
}
