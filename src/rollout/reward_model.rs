//! A separate reward model: a Hugging Face sequence classifier with one label.

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
    /// An error of the checkpoint.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// An error of the model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// An error of the tokenizer.
    #[error(transparent)]
    Text(#[from] TextError),
    /// No score head with one output.
    #[error(
        "{path}: {fault}, needed score.weight [1, {hidden_size}]: a sequence classifier with one label"
    )]
    Head {
        /// The folder.
        path: String,
        /// What is wrong.
        fault: String,
        /// Hidden size of the model.
        hidden_size: usize,
    },
    /// A text longer than its context window.
    #[error(
        "a prompt with its response has {tokens} tokens for the reward model, whose context window is \
         {window}"
    )]
    Long {
        /// Number of tokens.
        tokens: usize,
        /// `max_position_embeddings`.
        window: usize,
    },
    /// A tensor operation failed.
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
    /// Bytes of its weight matrices.
    pub(crate) fn weight_bytes(&self) -> usize {
        self.decoder.weight_bytes()
    }

    /// Loads a folder in the format of transformers' `AutoModelForSequenceClassification`.
    ///
    /// It uses the device and precision of `policy`. A date in its chat template is that of `now`, in
    /// seconds since 1970.
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
            return Err(head("score.weight is missing".into()));
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

    /// The score of each sample, read at its last token.
    ///
    /// A conversation is rendered by the model's own chat template; text is used as it is, followed by the
    /// end-of-sequence token, as in TRL's RewardTrainer.
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

    /// The context window in tokens.
    pub(crate) fn window(&self) -> usize {
        self.decoder.config.max_position_embeddings
    }

    /// Number of tokens of a prompt with an empty response, in this model's tokenizer. The tokens of the
    /// response are added to them; their number may differ from that of the policy's tokenizer.
    pub(crate) fn prompt_tokens(&self, prompt: &Prompt) -> Result<usize, TextError> {
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
