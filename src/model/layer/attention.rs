//! Self-attention of a layer, forward and backward.

use candle_core::Result;

use super::buffers::{LoraTape, TapeBuffer, Workspace, take};
use super::layer_pass::LayerPass;
use crate::model::cache::PanelCache;
use crate::model::config::{Config, QkNorm};
use crate::model::gradients::GradientBuffers;
use crate::model::layers::{Attention, LinearGroup, Norm};
use crate::ops::attention::{self, AttentionForward, Heads, Qkv, QkvGrad};
use crate::ops::rope::Direction;

/// Values of attention saved for the backward pass.
#[derive(Debug, Default)]
pub(super) struct AttentionTape {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// Queries and keys before their norms, if they have any.
    raw_q: Vec<f32>,
    raw_k: Vec<f32>,
    attended: TapeBuffer,
    lse: Vec<f32>,
    qkv: Vec<LoraTape>,
    o: LoraTape,
    /// The output of `o` before the post-norm, if there is one.
    branch: Vec<f32>,
}

impl AttentionTape {
    /// Saved values per token in F32, and in a [`TapeBuffer`].
    pub(super) fn width(config: &Config) -> (usize, usize) {
        let (q, kv) = widths(config.heads());
        let raw = if config.family.qk_norm == QkNorm::None { 0 } else { q + kv };
        (q + 2 * kv + raw + config.num_attention_heads, q)
    }
}

/// Widths of the queries and of the keys of a token.
fn widths(heads: Heads) -> (usize, usize) {
    (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim)
}

impl LayerPass<'_> {
    /// Computes the heads' outputs for `x (N, hidden_size)` in `work.attended`. With a cache, attends to it.
    pub(super) fn attend_heads(
        &self,
        attention: &Attention,
        input_norm: Option<&Norm>,
        x: &[f32],
        tape: &mut AttentionTape,
        work: &mut Workspace,
        cache: Option<(&mut PanelCache, usize)>,
    ) -> Result<()> {
        let (n, isa, heads) = (self.tokens, self.isa, self.config.heads());
        let (q_width, kv_width) = widths(heads);
        let AttentionTape { q, k, v, raw_q, raw_k, lse, qkv: tapes, .. } = tape;
        for (buffer, width) in [
            (&mut *q, q_width),
            (k, kv_width),
            (v, kv_width),
            (&mut work.attended, q_width),
            (lse, heads.heads),
        ] {
            buffer.resize(n * width, 0.0);
        }

        let mut normed = take(&mut work.normed, n * self.config.hidden_size);
        self.norm(input_norm, x, &mut normed)?;
        let outs = vec![&mut q[..], &mut k[..], &mut v[..]];
        self.project_all(&attention.qkv, outs, tapes, &normed, work)?;
        work.normed = normed;
        for (norm, heads, raw) in
            [(&attention.q_norm, &mut *q, raw_q), (&attention.k_norm, &mut *k, raw_k)]
        {
            if norm.is_some() {
                raw.resize(heads.len(), 0.0);
                std::mem::swap(raw, heads);
                self.norm(norm.as_ref(), raw, heads)?;
            }
        }
        if let Some(rotation) = self.pass.rotations.of(attention.rope) {
            rotation.rotate(isa, Direction::Forward, q, q_width, q_width);
            rotation.rotate(isa, Direction::Forward, k, kv_width, kv_width);
        }
        let mut out = std::mem::take(&mut work.attended);
        let (qkv, segments) = (qkv(heads, q, k, v), &self.pass.segments);
        match cache {
            Some((cache, index)) => {
                let config = attention.config;
                cache.attend(isa, index, qkv, heads, segments, config, &mut out);
            }
            None => {
                attention::forward(isa, qkv, heads, segments, attention.config, &mut out, lse);
            }
        }
        work.attended = out;
        Ok(())
    }

    /// Adds the output of attention, of `work.attended`, to the residual stream `x (N, hidden_size)`.
    pub(super) fn attention_output(
        &self,
        attention: &Attention,
        norm: Option<&Norm>,
        x: &mut [f32],
        tape: &mut AttentionTape,
        taped: bool,
        work: &mut Workspace,
    ) -> Result<()> {
        let mut out = std::mem::take(&mut work.attended);
        let AttentionTape { o, branch, attended, .. } = tape;
        self.add_to_residual((&attention.o, o), &out, norm, x, branch, work)?;
        if taped {
            attended.keep(self.kept_as, &mut out);
        }
        work.attended = out;
        Ok(())
    }

    /// The backward pass of both: adds the gradient through attention to `dx`, the gradient of the
    /// residual stream after it, which becomes that before it; `x` is the layer's input. With `lowest`,
    /// nothing is computed below that group, and `dx` is not valid.
    #[allow(clippy::too_many_arguments)] // a unit, its states, its tape, gradients, buffers
    pub(super) fn attention_back(
        &self,
        attention: &Attention,
        (input_norm, output_norm): (Option<&Norm>, Option<&Norm>),
        (x, dx): (&[f32], &mut [f32]),
        tape: &mut AttentionTape,
        lowest: Option<LinearGroup>,
        gradients: &mut GradientBuffers,
        work: &mut Workspace,
    ) -> Result<()> {
        let (n, isa, heads) = (self.tokens, self.isa, self.config.heads());
        let (q_width, kv_width) = widths(heads);
        let wanted = |group| lowest.is_none_or(|lowest| lowest < group);
        let AttentionTape { q, k, v, raw_q, raw_k, attended, lse, qkv: tapes, o, branch } = tape;
        let mut out = std::mem::take(&mut work.attended);
        attended.give(self.kept_as, &mut out);
        let mut dattended = take(&mut work.dattended, n * q_width);
        let (mut scaled, mut dbranch) =
            (std::mem::take(&mut work.branch), std::mem::take(&mut work.dbranch));
        let buffers = (&mut scaled, &mut dbranch);
        let dy = self.residual_back(output_norm, branch, dx, buffers, gradients, work)?;
        let dout = wanted(LinearGroup::ATTENTION_OUTPUT).then_some(&mut dattended[..]);
        self.project_back(&[(&attention.o, dy, &*o)], &out, dout, gradients, work)?;
        (work.branch, work.dbranch) = (scaled, dbranch);

        if wanted(LinearGroup::ATTENTION_OUTPUT) {
            let mut dq = take(&mut work.dq, n * q_width);
            let mut dk = take(&mut work.dk, n * kv_width);
            let mut dv = take(&mut work.dv, n * kv_width);
            let left = AttentionForward { out: &out, lse };
            let grad =
                QkvGrad::separate((&mut dq, q_width), (&mut dk, kv_width), (&mut dv, kv_width));
            let (qkv, segments) = (qkv(heads, q, k, v), &self.pass.segments);
            let config = attention.config;
            attention::backward(isa, qkv, heads, segments, config, left, &dattended, grad);
            if let Some(rotation) = self.pass.rotations.of(attention.rope) {
                rotation.rotate(isa, Direction::Backward, &mut dq, q_width, q_width);
                rotation.rotate(isa, Direction::Backward, &mut dk, kv_width, kv_width);
            }
            for (norm, raw, d) in
                [(&attention.q_norm, &*raw_q, &mut dq), (&attention.k_norm, &*raw_k, &mut dk)]
            {
                if norm.is_some() {
                    let mut d_pre_norm = std::mem::take(&mut work.d_pre_norm);
                    d_pre_norm.clear();
                    d_pre_norm.resize(d.len(), 0.0);
                    self.norm_back(norm.as_ref(), raw, d, &mut d_pre_norm, gradients, work)?;
                    std::mem::swap(d, &mut d_pre_norm);
                    work.d_pre_norm = d_pre_norm;
                }
            }

            let mut normed = take(&mut work.normed, n * self.config.hidden_size);
            let mut dnormed = take(&mut work.dnormed, n * self.config.hidden_size);
            self.norm(input_norm, x, &mut normed)?;
            let below = wanted(LinearGroup::ATTENTION_INPUT);
            let dnormed_wanted = below.then_some(&mut dnormed[..]);
            let dys = [&dq[..], &dk[..], &dv[..]];
            let qkv = &attention.qkv;
            self.project_all_back(qkv, &dys, tapes, &normed, dnormed_wanted, gradients, work)?;
            if below {
                self.norm_back(input_norm, x, &dnormed, dx, gradients, work)?;
            }
            (work.normed, work.dnormed) = (normed, dnormed);
            (work.dq, work.dk, work.dv) = (dq, dk, dv);
        }
        (work.attended, work.dattended) = (out, dattended);
        Ok(())
    }
}

/// Queries, keys and values in separate buffers.
fn qkv<'v>(heads: Heads, q: &'v [f32], k: &'v [f32], v: &'v [f32]) -> Qkv<'v> {
    let (q_width, kv_width) = widths(heads);
    Qkv {
        q: attention::StridedHeads { values: q, stride: q_width },
        k: attention::StridedHeads { values: k, stride: kv_width },
        v: attention::StridedHeads { values: v, stride: kv_width },
    }
}
