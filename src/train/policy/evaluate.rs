//! Evaluation of the policy on held-out prompts.

use serde_json::json;

use super::{Rollouts, divergence, warn_once};
use crate::data::Prompt;
use crate::eval::{Reply, diversity};
use crate::model::{ActiveAdapter, Decoder};
use crate::monitor::Monitor;
use crate::rollout::diagnose::{mean_and_error, overoptimized};
use crate::rollout::{Response, respond};
use crate::train::TrainError;
use crate::train::log::Log;
use crate::train::metrics::Numbers;
use crate::train::state::State;

/// RNG keys of evaluation responses start here; those of training are smaller.
const EVAL_KEYS: u64 = 1 << 39;

impl Rollouts {
    /// Samples responses to held-out prompts and scores them; `None` if the run was stopped before all were
    /// sampled. Of the state only the warnings change.
    pub(crate) fn evaluate(
        &mut self,
        decoder: &Decoder,
        active: &[ActiveAdapter],
        state: &mut State,
        log: &Log,
        monitor: Monitor<'_>,
    ) -> Result<Option<Numbers>, TrainError> {
        let Some(held_out) = &self.held_out else { return Ok(Some(Vec::new())) };
        let most = self.task.eval_prompts();
        let all = held_out.rows.len();
        let most = if most == 0 { all } else { most.min(all) };
        let prompts: Vec<Prompt> = (0..most).map(|row| held_out.rows.get(row)).collect();
        let times = self.times;
        let (mut totals, mut judged, mut kls, mut replies) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut ended, mut surprise, mut tokens) = (0, 0.0, 0);
        // The stop flag is checked between batches; keys are per row, so that batching changes nothing.
        for (first, prompts) in prompts.chunks(64).enumerate() {
            if monitor.stopped() {
                return Ok(None);
            }
            let key = EVAL_KEYS + 64 * first as u64;
            let scored = self.collect(decoder, active, prompts, 1, key)?;
            let temperature = self.task.temperature();
            let logps = respond::log_probs(decoder, active, &scored.responses, temperature)?;
            surprise -= logps.iter().flatten().map(|&logp| f64::from(logp)).sum::<f64>();
            if let Some(reference) = &self.reference {
                let reference =
                    respond::log_probs(decoder, reference, &scored.responses, temperature)?;
                let k1 = |(old, reference): (&Vec<f32>, &Vec<f32>)| divergence(old, reference);
                kls.extend(logps.iter().zip(&reference).map(k1));
            }
            if let Some(judge) = &self.judge {
                let responses: Vec<&Response> = scored.responses.iter().collect();
                let scores = self.scorer.read(decoder, judge, &responses)?;
                judged.extend(scores.into_iter().map(f64::from));
            }
            totals.extend(scored.totals.iter().flatten());
            for response in scored.responses {
                ended += usize::from(response.ended);
                tokens += response.tokens.len();
                replies.push((response.tokens, response.ended));
            }
        }
        self.times = times;
        let (reward, error_of_reward) = mean_and_error(&totals);
        let mut numbers: Numbers = vec![
            ("eval_reward".into(), json!(reward)),
            ("eval_reward_error".into(), json!(error_of_reward)),
            ("eval_length".into(), json!(tokens as f64 / replies.len().max(1) as f64)),
            ("eval_ended".into(), json!(ended as f64 / replies.len().max(1) as f64)),
            ("eval_entropy".into(), json!(surprise / tokens.max(1) as f64)),
        ];
        if !kls.is_empty() {
            let (kl, error) = mean_and_error(&kls);
            numbers.push(("eval_kl".into(), json!(kl)));
            numbers.push(("eval_kl_error".into(), json!(error)));
        }
        let replies: Vec<Reply> = replies
            .iter()
            .map(|(tokens, finished)| Reply {
                tokens: &tokens[..tokens.len() - usize::from(*finished)],
                finished: *finished,
            })
            .collect();
        let spread = diversity(&replies);
        numbers.push(("eval_distinct_1".into(), json!(spread.distinct_1)));
        numbers.push(("eval_distinct_2".into(), json!(spread.distinct_2)));
        numbers.push(("eval_distinct_3".into(), json!(spread.distinct_3)));
        numbers.push(("eval_duplicates".into(), json!(spread.duplicates)));
        if !judged.is_empty() {
            let (judge, error) = mean_and_error(&judged);
            numbers.push(("eval_judge".into(), json!(judge)));
            numbers.push(("eval_judge_error".into(), json!(error)));
            let curve = |key: &str, now: (f64, f64)| -> Result<Vec<(f64, f64)>, TrainError> {
                let errors = log.values(&format!("{key}_error"))?;
                let before = log.values(key)?.into_iter().zip(errors);
                Ok(before.chain([now]).collect())
            };
            let rewards = curve("eval_reward", (reward, error_of_reward))?;
            if overoptimized(&rewards, &curve("eval_judge", (judge, error))?) {
                warn_once(
                    state,
                    "over-optimization: the reward rises while the judge, a reward model that is not \
                     trained against, falls; earlier checkpoints are better, a larger kl_coef helps"
                        .into(),
                    monitor,
                );
            }
        }
        Ok(Some(numbers))
    }
}
