//! The portable form of a micro-batch: differentiable candle ops on the tape. It defines the answer.

use candle_core::backprop::GradStore;
use candle_core::{D, Result, Tensor};

use super::{EMBEDDING, FullModel, Layer, Linear};
use crate::data::Batch;
use crate::ops::rope::Rotation;
use crate::ops::{Compute, Segment, causal_attention, rms_norm, rope, swiglu};

use std::sync::Arc;

impl FullModel {
    /// [`FullModel::accumulate`] in the portable form with gradients where the parameters are, F32 in
    /// their shapes.
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
        let (loss, store) = self.judged(batch, scale)?;
        for (parameter, gradient) in self.parameters.iter().zip(gradients) {
            if let Some(added) = store.get(parameter) {
                *gradient = (&*gradient + added.detach())?;
            }
        }
        Ok(loss)
    }

    /// [`FullModel::accumulate`] on candle's tape.
    pub(super) fn portable(
        &self,
        batch: &Batch,
        scale: f64,
        gradients: &mut [Vec<f32>],
    ) -> Result<f64> {
        let (loss, store) = self.judged(batch, scale)?;
        for (parameter, gradient) in self.parameters.iter().zip(gradients) {
            if let Some(added) = store.get(parameter) {
                let added = added.flatten_all()?.to_vec1::<f32>()?;
                gradient.iter_mut().zip(added).for_each(|(sum, value)| *sum += value);
            }
        }
        Ok(loss)
    }

    /// The sum of `-log p(target)`, and the gradients of that times `scale`.
    fn judged(&self, batch: &Batch, scale: f64) -> Result<(f64, GradStore)> {
        let rotation = Rotation::new(&batch.positions, &self.config.inv_freq());
        let rotation = rotation.grown(self.config.rope_growth());
        let segments: Arc<[Segment]> = batch.segments.clone().into();
        let embedding = self.parameter(EMBEDDING);
        let tokens = Tensor::new(&batch.tokens[..], embedding.device())?;
        let mut x = embedding.index_select(&tokens, 0)?; // (N, H)
        for layer in &self.places.layers {
            x = self.layer(layer, &x, &rotation, &segments)?;
        }

        let (rows, targets): (Vec<u32>, Vec<u32>) = batch.targets.iter().copied().unzip();
        let count = rows.len();
        let rows = Tensor::from_vec(rows, count, x.device())?;
        let x = self.norm(self.places.norm, &x.index_select(&rows, 0)?)?; // (M, H)
        let logits = x.matmul(&self.parameter(self.places.head).t()?)?; // (M, V)
        let logps = candle_nn::ops::log_softmax(&logits, D::Minus1)?;
        let targets = Tensor::from_vec(targets, (count, 1), x.device())?;
        let loss = logps.gather(&targets, 1)?.sum_all()?.neg()?;

        let store = (&loss * scale)?.backward()?;
        Ok((f64::from(loss.to_scalar::<f32>()?), store))
    }

    /// `x (N, hidden_size)` → the same shape.
    fn layer(
        &self,
        layer: &Layer,
        x: &Tensor,
        rotation: &Rotation,
        segments: &Arc<[Segment]>,
    ) -> Result<Tensor> {
        const P: Compute = Compute::REFERENCE;
        let heads = self.config.heads();
        let h = self.norm(layer.input_norm, x)?;
        let of_heads = |norm: Option<usize>, x: Tensor| match norm {
            Some(norm) => self.norm(norm, &x.reshape(((), heads.head_dim))?)?.reshape(x.shape()),
            None => Ok(x),
        };
        let q = rope(&of_heads(layer.q_norm, self.linear(&layer.q, &h)?)?, rotation, P)?;
        let k = rope(&of_heads(layer.k_norm, self.linear(&layer.k, &h)?)?, rotation, P)?;
        let v = self.linear(&layer.v, &h)?;
        let attended = causal_attention(&q, &k, &v, heads, segments, None, P)?;
        let x = (x + self.linear(&layer.o, &attended)?)?;
        let h = self.norm(layer.post_attention_norm, &x)?;
        let inner = swiglu(&self.linear(&layer.gate, &h)?, &self.linear(&layer.up, &h)?, P)?;
        x + self.linear(&layer.down, &inner)?
    }

    fn parameter(&self, index: usize) -> &Tensor {
        self.parameters[index].as_tensor()
    }

    fn norm(&self, index: usize, x: &Tensor) -> Result<Tensor> {
        rms_norm(x, self.parameter(index), self.config.rms_norm_eps, Compute::REFERENCE)
    }

    fn linear(&self, linear: &Linear, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.parameter(linear.weight).t()?)?;
        match linear.bias {
            Some(bias) => y.broadcast_add(self.parameter(bias)),
            None => Ok(y),
        }
    }
}
