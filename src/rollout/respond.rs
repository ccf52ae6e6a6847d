//! Responses of the policy, and their log-probs, values and scores under frozen models, computed by the
//! training path.

use std::ops::ControlFlow;
use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::data::Batch;
use crate::generate::{Finish, GenerateError, Request, Settings, generate};
use crate::model::scoring::{log_probs_and_scores, row_scores, runs, target_log_probs};
use crate::model::{ActiveAdapter, Adapters, Decoder};

use super::ppo::{self, state_rows};

/// A response to a prompt.
#[derive(Debug, Clone)]
pub struct Response {
    /// Tokens of the prompt; responses of a group share it.
    pub prompt: Arc<[u32]>,
    /// Tokens of the response, including the end-of-generation token if there is one.
    pub tokens: Vec<u32>,
    /// Key of its random numbers; below 2⁴⁰.
    pub key: u64,
    /// Whether the response ended by itself, not at the length limit.
    pub ended: bool,
    /// Log-probs of its tokens at the sampling temperature, before filters.
    pub sampled_logps: Vec<f32>,
    /// Log-probs of its tokens after filters.
    pub drawn_logps: Vec<f32>,
}

impl Response {
    /// Number of tokens of prompt and response.
    pub fn len(&self) -> usize {
        self.prompt.len() + self.tokens.len()
    }

    /// Whether both prompt and response are empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Generates `per_prompt` responses to each prompt; those of a prompt are consecutive. The keys of their
/// random numbers count up from `first_key`.
pub fn respond(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    prompts: &[Arc<[u32]>],
    per_prompt: usize,
    settings: &Settings,
    is_end: &dyn Fn(u32) -> bool,
    first_key: u64,
) -> std::result::Result<Vec<Response>, GenerateError> {
    let owners: Vec<&Arc<[u32]>> =
        prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, per_prompt)).collect();
    let requests: Vec<Request> =
        owners.iter().zip(first_key..).map(|(prompt, key)| Request::new(prompt, key)).collect();
    let never = &mut |_: usize, _: u32| ControlFlow::Continue(());
    let generated = generate(decoder, Adapters::Same(active), &requests, settings, is_end, never)?;
    let responses = generated.rows.into_iter().zip(owners).zip(first_key..);
    Ok(responses
        .map(|((generated, prompt), key)| Response {
            prompt: prompt.clone(),
            ended: generated.finish == Finish::Stop,
            tokens: generated.token_ids,
            key,
            sampled_logps: generated.sampled_logps,
            drawn_logps: generated.drawn_logps,
        })
        .collect())
}

/// A batch of responses after their prompts; consecutive responses with the same prompt share one copy.
pub fn collate(responses: &[&Response]) -> Batch {
    let mut batch = Batch::default();
    for group in responses.chunk_by(|a, b| Arc::ptr_eq(&a.prompt, &b.prompt)) {
        let tokens: Vec<&[u32]> = group.iter().map(|response| &response.tokens[..]).collect();
        batch.push_group(&group[0].prompt, &tokens, group[0].key);
    }
    batch
}

/// Log-probs of the tokens of each response, with logits divided by `temperature`.
pub fn log_probs(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    responses: &[Response],
    temperature: f64,
) -> Result<Vec<Vec<f32>>> {
    let mut all = Vec::with_capacity(responses.len());
    for run in runs(responses.iter().map(Response::len)) {
        let responses: Vec<&Response> = responses[run].iter().collect();
        let batch = collate(&responses);
        let logps = target_log_probs(decoder, active, &batch, temperature)?;
        all.extend(batch.spans.iter().map(|span| logps[span.clone()].to_vec()));
    }
    Ok(all)
}

/// Values of the states of each response, by a value head `(1, hidden_size)`. `most` is the maximum number
/// of tokens of a response.
pub fn values(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    head: &Tensor,
    responses: &[Response],
    most: usize,
) -> Result<Vec<Vec<f32>>> {
    let mut all = Vec::with_capacity(responses.len());
    for run in runs(responses.iter().map(Response::len)) {
        let responses: Vec<&Response> = responses[run].iter().collect();
        let batch = collate(&responses);
        let states = || responses.iter().map(|response| ppo::states(response.tokens.len(), most));
        let rows = state_rows(&batch, states());
        let mut values = row_scores(decoder, active, head, &batch, rows)?.into_iter();
        all.extend(states().map(|states| values.by_ref().take(states).collect::<Vec<f32>>()));
    }
    Ok(all)
}

/// [`log_probs`] and [`values`] from one forward pass, for a value head on the policy's own adapter. The
/// results are bit-identical.
pub fn log_probs_and_values(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    head: &Tensor,
    responses: &[Response],
    temperature: f64,
    most: usize,
) -> Result<[Vec<Vec<f32>>; 2]> {
    let (mut logps, mut values) = (Vec::new(), Vec::new());
    for run in runs(responses.iter().map(Response::len)) {
        let responses: Vec<&Response> = responses[run].iter().collect();
        let batch = collate(&responses);
        let states = || responses.iter().map(|response| ppo::states(response.tokens.len(), most));
        let rows = state_rows(&batch, states());
        let (of_tokens, of_states) =
            log_probs_and_scores(decoder, active, head, &batch, temperature, &rows)?;
        logps.extend(batch.spans.iter().map(|span| of_tokens[span.clone()].to_vec()));
        let mut rest = of_states.into_iter();
        values.extend(states().map(|states| rest.by_ref().take(states).collect::<Vec<f32>>()));
    }
    Ok([logps, values])
}

/// Scores by a reward head `(1, hidden_size)` at the end of each response. With `eos`, a response that did
/// not end by itself is scored as if it ended with that token. `after` are tokens that followed a complete
/// response in the training data of the reward model; they are appended.
pub fn scores(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    head: &Tensor,
    responses: &[&Response],
    eos: Option<u32>,
    after: &[u32],
) -> Result<Vec<f32>> {
    let mut all = Vec::with_capacity(responses.len());
    for run in runs(responses.iter().map(|response| response.len() + 1 + after.len())) {
        let ended = responses[run].iter().map(|&response| {
            let mut response = response.clone();
            response.tokens.extend(eos.filter(|_| !response.ended));
            if response.ended || eos.is_some() {
                response.tokens.extend(after);
            }
            response
        });
        let ended: Vec<Response> = ended.collect();
        let batch = collate(&ended.iter().collect::<Vec<_>>());
        all.extend(row_scores(decoder, active, head, &batch, batch.ends.clone())?);
    }
    Ok(all)
}
