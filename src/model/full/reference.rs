//! A micro-batch in which all weights train, in differentiable candle ops on the tape. It defines the answer.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor};

use super::{EMBEDDING, FullModel};
use crate::data::Batch;
use crate::model::adapters::Adapters;
use crate::model::layer::reference::TensorLayerPass;
use crate::model::pass::{Pass, Rows};
use crate::ops::linear_cross_entropy::log_probs_of_logits;
use crate::ops::{Compute, rms_norm};

impl FullModel {
    /// [`FullModel::accumulate`] on candle's tape, where all layers keep everything, with gradients
    /// where the parameters are, F32 in their shapes.
    ///
    /// # Errors
    /// As there, and if the device has too little memory.
    pub fn accumulate_tensors(
        &self,
        batch: &Batch,
        scale: f64,
        gradients: &mut [Tensor],
    ) -> Result<f64> {
        self.check(batch)?;
        if batch.targets.is_empty() {
            return Ok(0.0);
        }
        let (loss, store) = self.loss_and_gradients(batch, scale)?;
        for (parameter, gradient) in self.parameters.iter().zip(gradients) {
            if let Some(added) = store.get(parameter) {
                *gradient = (&*gradient + added.detach())?;
            }
        }
        Ok(loss)
    }

    /// The sum of `-log p(target)`, and the gradients of that times `scale`.
    fn loss_and_gradients(&self, batch: &Batch, scale: f64) -> Result<(f64, GradStore)> {
        let variation = &self.config.variation;
        let rows = Rows {
            tokens: batch.tokens.clone(),
            positions: batch.positions.clone(),
            segments: batch.segments.clone().into(),
        };
        let pass = Pass::new(&self.config, &self.inv_freq, &rows, Adapters::NONE, None);
        let embedding = self.parameter(EMBEDDING);
        let tokens = Tensor::new(&batch.tokens[..], embedding.device())?;
        let mut x = scaled(embedding.index_select(&tokens, 0)?, variation.embedding_multiplier)?; // (N, H)
        for layer in &self.layers {
            let (config, pass, compute) = (&self.config, &pass, Compute::REFERENCE);
            x = TensorLayerPass { config, layer, pass, compute }.forward(&x, None)?;
        }

        let (rows, targets): (Vec<u32>, Vec<u32>) = batch.targets.iter().copied().unzip();
        let count = rows.len();
        let rows = Tensor::from_vec(rows, count, x.device())?;
        let (norm, eps) = (self.norm.factors()?, self.config.rms_norm_eps);
        let x = rms_norm(&x.index_select(&rows, 0)?, &norm, eps, Compute::REFERENCE)?; // (M, H)
        let x = scaled(x, variation.logits_multiplier)?;
        let logits = x.matmul(&self.parameter(self.head).t()?)?; // (M, V)
        let logps = log_probs_of_logits(logits, &targets, self.config.logit_softcap(1.0))?;
        let loss = logps.sum_all()?.neg()?;

        let store = (&loss * scale)?.backward()?;
        Ok((f64::from(loss.to_scalar::<f32>()?), store))
    }

    fn parameter(&self, index: usize) -> &Tensor {
        self.parameters[index].as_tensor()
    }
}

fn scaled(x: Tensor, factor: f64) -> Result<Tensor> {
    if factor == 1.0 { Ok(x) } else { x * factor }
}
