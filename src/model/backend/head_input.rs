//! What the head reads in inference.

use std::fmt::Debug;

use candle_core::{Result, Tensor};

use crate::model::adapters::Adapters;
use crate::model::decoder::Decoder;
use crate::model::lm_head::{Logits, scores};

/// Hidden states after the final norm, `(M, hidden_size)`, where a backend keeps them.
pub trait HeadInput: Debug + Sized {
    /// Some of the rows, in any order; a row may be selected several times.
    fn select(&self, rows: &[u32]) -> Result<Self>;

    /// Concatenates parts, at least one.
    fn concat(parts: Vec<Self>) -> Result<Self>;

    /// As a tensor `(M, hidden_size)`, for callers that inspect hidden states.
    fn into_tensor(self) -> Result<Tensor>;

    /// The inverse of [`Self::into_tensor`].
    fn from_tensor(hidden: &Tensor) -> Result<Self>;

    /// The scores (M) that a score head `weight (1, hidden_size)` gives to them.
    fn scores(&self, weight: &Tensor) -> Result<Vec<f32>>;

    /// Their logits, each row under its own adapters.
    fn logits(&self, decoder: &Decoder, adapters: Adapters) -> Result<Logits>;
}

impl HeadInput for Tensor {
    fn select(&self, rows: &[u32]) -> Result<Self> {
        self.index_select(&Self::new(rows, self.device())?, 0)
    }

    fn concat(parts: Vec<Self>) -> Result<Self> {
        Self::cat(&parts, 0)
    }

    fn into_tensor(self) -> Result<Tensor> {
        Ok(self)
    }

    fn from_tensor(hidden: &Tensor) -> Result<Self> {
        Ok(hidden.clone())
    }

    fn scores(&self, weight: &Tensor) -> Result<Vec<f32>> {
        scores(self, weight)?.to_vec1()
    }

    fn logits(&self, decoder: &Decoder, adapters: Adapters) -> Result<Logits> {
        decoder.lm_head().logits(self, adapters)
    }
}
