//! Scoring responses: decoding their texts and running all reward sources. Shared by training, evaluation
//! and best-of-n.

use candle_core::Result as TensorResult;
use serde_json::{Map, Value};

use super::respond::{self, Response};
use super::{RewardError, RewardModel, RewardModelError, RewardScores, Rewards, Sample};
use crate::data::Prompt;
use crate::model::{ActiveAdapter, Decoder};
use crate::text::{TextError, Tokenizer};

/// All reward sources, loaded.
#[derive(Debug)]
pub struct Scorer {
    /// The reward sources and their weights.
    pub rewards: Rewards,
    /// The first model source, if it is an adapter on the base model.
    pub adapter: Option<ActiveAdapter>,
    /// The next model source, if it is a separate reward model.
    pub model: Option<RewardModel>,
    /// If given, the adapter scores a response that did not end by itself as if it ended with this token.
    pub eos: Option<u32>,
    /// The tokens that the chat template writes after a complete answer, which the adapter has seen in
    /// training.
    pub after: Vec<u32>,
}

/// Why responses cannot be scored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScoreError {
    /// A response cannot be decoded.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A reward source failed.
    #[error(transparent)]
    Reward(#[from] RewardError),
    /// The separate reward model failed.
    #[error(transparent)]
    RewardModel(#[from] RewardModelError),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// A response with its prompt.
#[derive(Debug, Clone, Copy)]
pub struct Answer<'a> {
    /// The response.
    pub response: &'a Response,
    /// The text of the response.
    pub text: &'a str,
    /// Whether the response is complete: it ended by itself or at a stop string.
    pub finished: bool,
    /// Text of the prompt.
    pub prompt: &'a str,
    /// The data row of the prompt.
    pub row: &'a Map<String, Value>,
}

impl Scorer {
    /// Texts and rewards of responses; each prompt has the same number of responses, which are consecutive.
    pub(crate) fn score(
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

    /// Rewards of answers whose texts are known. `known` are the scores of the last model source, if the
    /// caller has run it.
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

    /// Scores of responses by an adapter with a score head, with this scorer's `eos` and `after`.
    pub(crate) fn read(
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
