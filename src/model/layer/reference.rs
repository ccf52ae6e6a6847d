//! A decoder layer composed of operations on candle's tape. In the portable form these are candle
//! ops, which define the answer; otherwise each op has a CPU kernel.

use candle_core::{Result, Tensor};

use crate::model::adapters::ActiveAdapter;
use crate::model::cache::TensorCache;
use crate::model::config::Config;
use crate::model::layers::{FeedForward, Layer, Linear, LinearWeight, Norm, Projection};
use crate::model::pass::Pass;
use crate::ops::{Compute, causal_attention, frozen_linear, gated, rms_norm, rope};

/// One layer of one pass.
pub(in crate::model) struct TensorLayerPass<'a> {
    pub config: &'a Config,
    pub layer: &'a Layer,
    pub pass: &'a Pass<'a>,
    pub compute: Compute,
}

impl TensorLayerPass<'_> {
    /// `x (N, hidden_size)` → the same shape. With a cache, attends to it; it is that of the layer with
    /// this index.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        cache: Option<(&mut TensorCache, usize)>,
    ) -> Result<Tensor> {
        let Layer { input_norm, attention, feed_forward, .. } = self.layer;
        let heads = self.config.heads();
        let h = self.norm(x, input_norm.as_ref())?;
        let kv_width = heads.kv_heads * heads.head_dim;
        let widths = [heads.heads * heads.head_dim, kv_width, kv_width];
        let qkv = self.project(&attention.qkv, &widths, &h)?;
        let [q, k, v] = &qkv[..] else { unreachable!("one per width") };
        let q = self.rotated(self.heads_norm(q, attention.q_norm.as_ref())?)?;
        let k = self.rotated(self.heads_norm(k, attention.k_norm.as_ref())?)?;
        let (segments, config) = (&self.pass.segments, attention.config);
        let attended = match cache {
            Some((cache, index)) => cache.attend(index, &q, (&k, v), heads, segments, config)?,
            None => causal_attention(&q, &k, v, heads, segments, config, self.compute)?,
        };
        let branch = self.linear(&attention.o, &attended)?;
        let x = self.add_to_residual(x, branch, self.layer.post_attention_norm.as_ref())?;

        let h = self.norm(&x, self.layer.pre_feedforward_norm.as_ref())?;
        let branch = self.feed_forward(feed_forward, &h)?;
        self.add_to_residual(&x, branch, self.layer.post_feedforward_norm.as_ref())
    }

    fn feed_forward(&self, block: &FeedForward, x: &Tensor) -> Result<Tensor> {
        match block {
            FeedForward::Dense(dense) => {
                let widths = [self.config.intermediate_size; 2];
                let both = self.project(&dense.gate_up, &widths, x)?;
                let kind = self.config.family.gate;
                let inner = gated(kind, &both[0], &both[1], self.compute)?; // (N, inner)
                self.linear(&dense.down, &inner)
            }
        }
    }

    fn norm(&self, x: &Tensor, norm: Option<&Norm>) -> Result<Tensor> {
        match norm {
            Some(norm) => rms_norm(x, &norm.factors()?, self.config.rms_norm_eps, self.compute),
            None => Ok(x.clone()),
        }
    }

    /// The norm per head, or over all heads of a token.
    fn heads_norm(&self, x: &Tensor, norm: Option<&Norm>) -> Result<Tensor> {
        match norm {
            Some(of) => {
                let width = of.weight.value.dim(0)?;
                self.norm(&x.reshape(((), width))?, norm)?.reshape(x.shape())
            }
            None => Ok(x.clone()),
        }
    }

    fn rotated(&self, x: Tensor) -> Result<Tensor> {
        match self.pass.rotations.of(self.layer.attention.rope) {
            Some(rotation) => rope(&x, rotation, self.compute),
            None => Ok(x),
        }
    }

    fn add_to_residual(&self, x: &Tensor, branch: Tensor, norm: Option<&Norm>) -> Result<Tensor> {
        let by = self.config.variation.residual_multiplier;
        let branch = self.norm(&branch, norm)?;
        x + if by == 1.0 { branch } else { (branch * by)? }
    }

    /// Outputs of linear layers that share their input, with these widths.
    fn project(
        &self,
        projection: &Projection,
        widths: &[usize],
        x: &Tensor,
    ) -> Result<Vec<Tensor>> {
        match projection {
            Projection::Separate(linears) => {
                linears.iter().map(|linear| self.linear(linear, x)).collect()
            }
            Projection::Fused(linear) => {
                let whole = self.linear(linear, x)?;
                let mut start = 0;
                let parts = widths.iter().map(|&width| {
                    start += width;
                    whole.narrow(1, start - width, width)?.contiguous()
                });
                parts.collect()
            }
        }
    }

    /// The base's product plus the updates of each run of rows.
    fn linear(&self, linear: &Linear, x: &Tensor) -> Result<Tensor> {
        if let Some(squares) = self.pass.squares {
            squares.add(&linear.name, x)?;
        }
        let base = match &linear.weight {
            LinearWeight::Frozen { uploaded: Some(weight), .. } => weight.linear(x)?,
            LinearWeight::Frozen { matrix, .. } => frozen_linear(x, matrix, self.compute)?,
            LinearWeight::Trainable { value, .. } => x.matmul(&value.t()?)?,
        };
        let mask = match self.pass.dropout {
            Some(dropout) => Some(dropout.mask(&linear.name, linear.cols(), x.device())?),
            None => None,
        };
        let adapted_by =
            |x: &Tensor, base: &Tensor, mask: Option<&Tensor>, active: &[ActiveAdapter]| {
                let mut y = base.clone();
                for active in active {
                    if let Some(lora) = active.adapter.modules.get(&linear.name) {
                        let mut delta =
                            lora.delta(x, mask.filter(|_| active.trainable), active.trainable)?;
                        if let Some(norms) = lora.row_norms(&**linear.matrix()?)? {
                            let norms = Tensor::new(&*norms, x.device())?;
                            let scaled = lora.scaled(&(base + delta)?, &norms, active.trainable)?;
                            delta = (scaled - base)?;
                        }
                        y = (y + weighted(delta, active.weight)?)?;
                    }
                }
                match &linear.bias {
                    Some(bias) => y.broadcast_add(&bias.value),
                    None => Ok(y),
                }
            };
        let runs = self.pass.adapters.runs(&self.pass.segments);
        if let [(_, active)] = &runs[..] {
            return adapted_by(x, &base, mask.as_ref(), active);
        }
        let parts = runs.into_iter().map(|(tokens, active)| {
            let part = |t: &Tensor| t.narrow(0, tokens.start, tokens.len());
            let mask = mask.as_ref().map(part).transpose()?;
            adapted_by(&part(x)?, &part(&base)?, mask.as_ref(), active)
        });
        Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)
    }
}

fn weighted(delta: Tensor, weight: f64) -> Result<Tensor> {
    if weight == 1.0 { Ok(delta) } else { delta * weight }
}
