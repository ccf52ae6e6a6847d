//! A reward model of its own: a Hugging Face sequence classifier with one label, beside the base.

use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use super::Sample;
use crate::data::{Batch, Prompt};
use crate::model::scoring::{row_scores, runs};
use crate::model::{Decoder, ModelError};
use crate::text::{Special, TextError, Tokenizer};
use crate::weights::{Checkpoint, WeightsError};

/// Why a reward model cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RewardModelError {
    /// The files.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The decoder.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer.
    #[error(transparent)]
    Text(#[from] TextError),
    /// No scalar head.
    #[error(
        "{path}: {fault}, needed score.weight [1, {hidden_size}]: a sequence classifier with one label"
    )]
    Head {
        /// The folder.
        path: String,
        /// What is wrong.
        fault: String,
        /// Width of its hidden states.
        hidden_size: usize,
    },
    /// A text longer than it can read.
    #[error(
        "a prompt and its response have {tokens} tokens for the reward model, whose window is {window}"
    )]
    Long {
        /// Tokens.
        tokens: usize,
        /// `max_position_embeddings`.
        window: usize,
    },
    /// candle refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// A sequence classifier with one label, frozen.
#[derive(Debug)]
pub struct RewardModel {
    decoder: Decoder,
    tokenizer: Tokenizer,
    head: Tensor,
}

impl RewardModel {
    /// Bytes of its matrices, where they lie.
    pub fn weight_bytes(&self) -> usize {
        self.decoder.weight_bytes()
    }

    /// Loads a folder that transformers' `AutoModelForSequenceClassification` reads.
    ///
    /// It runs as `policy` does. Its template shows the day of `now`, seconds since 1970, if it shows
    /// one.
    pub fn load(path: &Path, policy: &Decoder, now: Option<u64>) -> Result<Self, RewardModelError> {
        let checkpoint = Checkpoint::open(path)?;
        let decoder = policy.load_beside(&checkpoint)?;
        let hidden_size = decoder.config.hidden_size;
        let head = |fault: String| RewardModelError::Head {
            path: path.display().to_string(),
            fault,
            hidden_size,
        };
        if !checkpoint.contains("score.weight") {
            return Err(head("there is no score.weight".into()));
        }
        let stored = checkpoint.tensor("score.weight")?;
        if stored.shape != [1, hidden_size] {
            return Err(head(format!("score.weight is {:?}", stored.shape)));
        }
        let mut values = vec![0f32; hidden_size];
        stored.block_type.dequantize(&stored.bytes, &mut values);
        let head = Tensor::from_vec(values, (1, hidden_size), &Device::Cpu)?;
        let mut tokenizer = Tokenizer::open(&checkpoint)?;
        if let Some(now) = now {
            tokenizer.set_template_time(now);
        }
        Ok(Self { decoder, tokenizer, head })
    }

    /// What it makes of each sample, read at its last token.
    ///
    /// A conversation goes through the model's own template; text is taken as it stands, with the
    /// end-of-sequence token after it, as TRL's RewardTrainer puts it there.
    pub fn score(&self, samples: &[Sample]) -> Result<Vec<f64>, RewardModelError> {
        let rows: Vec<Vec<u32>> =
            samples.iter().map(|sample| self.tokens(sample)).collect::<Result<_, _>>()?;
        let window = self.window();
        if let Some(row) = rows.iter().find(|row| row.len() > window) {
            return Err(RewardModelError::Long { tokens: row.len(), window });
        }
        let mut all = Vec::with_capacity(rows.len());
        for run in runs(rows.iter().map(Vec::len)) {
            let mut batch = Batch::default();
            for (key, row) in (0..).zip(&rows[run]) {
                batch.push_group(&[], &[row], key);
            }
            let scores = row_scores(&self.decoder, &[], &self.head, &batch, batch.ends.clone())?;
            all.extend(scores.into_iter().map(f64::from));
        }
        Ok(all)
    }

    /// The tokens it can read at once.
    pub fn window(&self) -> usize {
        self.decoder.config.max_position_embeddings
    }

    /// Tokens of a prompt with an empty response, as it reads them: a response's come on top. Its
    /// tokenizer may cut that into others than the policy's, which nobody knows beforehand.
    pub fn prompt_tokens(&self, prompt: &Prompt) -> Result<usize, TextError> {
        let (prompt, row) = (&prompt.text, &prompt.row);
        let none = Sample { prompt, completion: "", tokens: 0, finished: true, row };
        Ok(self.tokens(&none)?.len())
    }

    fn tokens(&self, sample: &Sample) -> Result<Vec<u32>, TextError> {
        let tokenizer = &self.tokenizer;
        if let (Some(Value::Array(messages)), Some(template)) =
            (sample.row.get("prompt"), tokenizer.chat_template())
        {
            let mut messages = messages.clone();
            messages.push(json!({ "role": "assistant", "content": sample.completion }));
            let text = template.render(&messages, None, false)?;
            return Ok(tokenizer.with_bos(tokenizer.encode(&text, Special::Parse)?));
        }
        let text = format!("{}{}", sample.prompt, sample.completion);
        let mut tokens = tokenizer.with_bos(tokenizer.encode(&text, Special::Parse)?);
        if let Some(eos) = tokenizer.eos()
            && tokens.last() != Some(&eos)
        {
            tokens.push(eos);
        }
        Ok(tokens)
    }
}
