//! A decoder layer on the CPU, forward and backward by hand over plain buffers.
//!
//! This is the fast form of [`Decoder::layer`](super::Decoder::layer), which composes the same
//! layer of portable ops on candle's tape; a parity test holds the two together, gradients too.
//! Written out, a layer needs no tape: a group of linear layers that share their input packs it
//! once and hands all its products to the threads together, an adapter's update is one more term
//! of the base's product, residuals are what sums begin with, and all large buffers are used again
//! by the next layer and the next step.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Result, Tensor};
use half::f16;
use rayon::prelude::*;

use super::cache::KvCache;
use super::config::{Config, Norms, QkNorm};
use super::decoder::{Layer, Linear, Pass, Shared};
use super::few;
use crate::isa::Isa;
use crate::ops::attention::{self, Attended, Heads, Qkv, QkvGrad};
use crate::ops::gemm::{Begin, Out, PackedRows, Panel, Product, Strided, Term, Weights, multiply};
use crate::ops::rope::Turn;
use crate::ops::{Compute, Values, half_tape, rms_norm, swiglu};

/// What a layer keeps for the way down. No product need be computed again from it.
#[derive(Debug, Default)]
pub struct Tape {
    /// Its input `(N, hidden_size)`.
    pub x: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Kept,
    lse: Vec<f32>,
    /// Queries and keys before their norms, where they have some.
    raw_q: Vec<f32>,
    raw_k: Vec<f32>,
    /// The residual stream between attention and feed-forward layer.
    middle: Vec<f32>,
    /// What o and down gave, before the norms behind them, where there are some.
    attention_branch: Vec<f32>,
    inner_branch: Vec<f32>,
    gate: Kept,
    up: Kept,
    lows: [Lows; 7],
}

/// A product kept for the way down: as it is, or in 16 bits where products are integers' anyway.
#[derive(Debug, Default)]
struct Kept {
    exact: Vec<f32>,
    half: Vec<f16>,
}

impl Kept {
    /// Takes what is in `values`, in exchange for the buffer that was kept before.
    fn keep(&mut self, panel: Panel, values: &mut Vec<f32>) {
        match panel {
            Panel::F32 => std::mem::swap(&mut self.exact, values),
            Panel::Int16 | Panel::Int8 => half_tape::narrow(values, &mut self.half),
        }
    }

    /// Keeps a copy.
    fn copy(&mut self, panel: Panel, values: &[f32]) {
        match panel {
            Panel::F32 => {
                self.exact.clear();
                self.exact.extend_from_slice(values);
            }
            Panel::Int16 | Panel::Int8 => half_tape::narrow(values, &mut self.half),
        }
    }

    /// What is kept, by way of a buffer where it is not kept as it is.
    fn read<'k>(&'k self, panel: Panel, buffer: &'k mut Vec<f32>) -> &'k [f32] {
        match panel {
            Panel::F32 => &self.exact,
            Panel::Int16 | Panel::Int8 => {
                buffer.resize(self.half.len(), 0.0);
                half_tape::widen(&self.half, buffer);
                buffer
            }
        }
    }

    /// Gives it back into `values`.
    fn give(&mut self, panel: Panel, values: &mut Vec<f32>) {
        match panel {
            Panel::F32 => std::mem::swap(&mut self.exact, values),
            Panel::Int16 | Panel::Int8 => half_tape::widen(&self.half, values),
        }
    }
}

/// What is kept of a linear layer for the gradients of its updates.
#[derive(Debug, Default)]
struct Lows {
    /// `x · Aᵀ (N, r)` of each update.
    low: Vec<Vec<f32>>,
    /// The base's own product `(N, out)`, where magnitudes train.
    base: Kept,
}

impl Tape {
    /// Bytes of the buffers that all layers share, beside the tapes.
    pub fn shared_bytes(config: &Config, compute: Compute, tokens: usize, sizes: &Sizes) -> usize {
        let (h, i) = (config.hidden_size, config.intermediate_size);
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        // The stream and what a norm makes of it, what attention and gate give and what goes into o
        // and down, and the gradients of all.
        let mut floats = 4 * h + 3 * q + 2 * kv + 4 * i;
        if config.family.norms != Norms::Before {
            floats += 2 * h;
        }
        // Packed are the widest input, and the gradients of outputs that share one.
        let input = h.max(q).max(i);
        let outputs = q.max(h).max(i) + kv.max(i) + kv;
        let mut packed = input + outputs;
        if sizes.magnitudes > 0 {
            floats += outputs + q.max(h).max(i);
            packed += outputs;
        }
        if sizes.dropout {
            floats += input + 2 * h + input;
            packed += input;
        }
        let packed = match compute.backward_panel() {
            Some(Panel::Int16 | Panel::Int8) => packed / 2,
            Some(Panel::F32) | None => packed,
        };
        // Of the layers that share an input, most of a layer's updates; as they are, packed, and
        // their gradients.
        (floats + packed + 2 * sizes.ranks) * tokens * size_of::<f32>()
    }

    /// Bytes a tape of `tokens` tokens takes.
    pub fn bytes(config: &Config, compute: Compute, tokens: usize, sizes: &Sizes) -> usize {
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        let kept = q + 2 * config.intermediate_size + sizes.magnitudes;
        let kept = match compute.forward_panel() {
            Some(Panel::Int16 | Panel::Int8) => kept / 2,
            Some(Panel::F32) | None => kept,
        };
        let mut width = 2 * config.hidden_size + q + 2 * kv + kept;
        if config.family.qk_norm != QkNorm::None {
            width += q + kv;
        }
        if config.family.norms != Norms::Before {
            width += 2 * config.hidden_size;
        }
        (width + config.num_attention_heads + sizes.ranks) * tokens * size_of::<f32>()
    }
}

/// How large the updates are that a layer wears: what its tape and its buffers depend on.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sizes {
    /// Ranks of all its updates together.
    pub ranks: usize,
    /// Outputs of its linear layers that have magnitudes (DoRA), all together.
    pub magnitudes: usize,
    /// Whether dropout draws masks.
    pub dropout: bool,
}

/// Values, or rows of an update, that a thread takes at a time.
const CHUNK: usize = 1 << 14;

/// Buffers of a pass, used again by every layer and every pass.
#[derive(Debug, Default)]
pub struct Workspace {
    normed: Vec<f32>,
    attended: Vec<f32>,
    pub(super) few: few::Buffers,
    gate: Vec<f32>,
    up: Vec<f32>,
    inner: Vec<f32>,
    x: PackedRows,
    x_of_update: PackedRows,
    masked: PackedRows,
    lows: Vec<PackedRows>,
    dys: [PackedRows; 3],
    dlows: Vec<Vec<f32>>,
    /// The base's products where DoRA scales them, and gradients on their way to the base.
    bases: [Vec<f32>; 3],
    scaled: Vec<f32>,
    dbases: [PackedRows; 3],
    /// Dropout's of the updates at hand, `(N, in)`.
    masks: Vec<Vec<f32>>,
    through: Vec<f32>,
    turned: Vec<f32>,
    factors: Vec<PackedRows>,
    products: Vec<Vec<f32>>,
    dinner: Vec<f32>,
    dnormed: Vec<f32>,
    dattended: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    /// Gradients of queries, keys or a branch before a norm.
    draw: Vec<f32>,
    /// Outputs of linear layers side by side, where they are one module, and their gradient.
    side_by_side: Vec<f32>,
    /// What o or down gave, and its gradient.
    branch: Vec<f32>,
    dbranch: Vec<f32>,
}

/// The linear layers that share an input, from the bottom of a layer to its top.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// q, k and v.
    Attention,
    /// o.
    Output,
    /// gate and up.
    GateUp,
    /// down.
    Down,
}

/// Where the gradients of trainable adapters are added up.
#[derive(Debug)]
pub struct AdapterGradients<'a> {
    /// As `Adapter::places` has them.
    pub places: &'a HashMap<String, usize>,
    /// One vector per parameter.
    pub gradients: &'a mut [Vec<f32>],
}

impl AdapterGradients<'_> {
    /// The gradient of a module's first parameter, or of one after it.
    pub(super) fn of(&mut self, module: &str, next: usize) -> &mut [f32] {
        &mut self.gradients[self.places[module] + next]
    }
}

/// An adapter on a linear layer for a run of tokens.
struct Update<'a> {
    a: Values<'a>,
    b: Values<'a>,
    r: usize,
    scale: f32,
    trainable: bool,
    tokens: Range<usize>,
    /// Which of the workspace's masks is that of the dropout before A.
    mask: Option<usize>,
    dora: Option<Dora>,
}

/// What DoRA makes of an update: with `s = m / ‖W + scale · B A‖` row by row, the layer's output is
/// `s ⊙ (W x + scale · B A x)`, or the base's and `weight` times the difference to that.
struct Dora {
    /// B with its rows scaled, `(out, r)`.
    b: Vec<f32>,
    /// s and the norms, `(out)`.
    scales: Vec<f32>,
    norms: Arc<[f32]>,
    /// Of the adapter.
    weight: f32,
}

/// What the base's product is multiplied with, output by output, for a run of tokens: 1 and the sum
/// of `weight · (s - 1)` of all DoRA updates that the run wears.
type BaseScales = Vec<(Range<usize>, Vec<f32>)>;

/// A trainable update on its way to its gradients.
struct Trained<'a> {
    linear: &'a Linear,
    /// The gradient of the layer's output, `(N, out)`.
    dy: &'a [f32],
    /// `x · Aᵀ` and its gradient, `(N, r)`.
    low: &'a [f32],
    dlow: &'a [f32],
    base: &'a Kept,
    update: &'a Update<'a>,
}

/// One layer of one pass.
pub struct LayerPass<'a> {
    config: &'a Config,
    layer: &'a Layer,
    pub(super) pass: &'a Pass<'a>,
    pub(super) isa: Isa,
    pub(super) forward: Panel,
    backward: Panel,
    tokens: usize,
    /// Whether products read each weight where it lies, for a token a row. Only in decoding: what is
    /// learned from, and a prompt, is computed one way, however many tokens there are.
    decoding: bool,
}

impl<'a> LayerPass<'a> {
    /// Prepares a layer for the pass, or `None` if `compute` is the portable form.
    pub(super) fn new(
        config: &'a Config,
        layer: &'a Layer,
        pass: &'a Pass<'a>,
        compute: Compute,
    ) -> Option<Self> {
        let (forward, backward) = (compute.forward_panel()?, compute.backward_panel()?);
        let tokens = pass.segments.last().map_or(0, |segment| segment.tokens.end);
        let isa = Isa::current();
        Some(Self { config, layer, pass, isa, forward, backward, tokens, decoding: false })
    }

    /// The layer of a decoding step: a token or so a row, not learned from.
    pub(super) fn decoding(self) -> Self {
        Self { decoding: true, ..self }
    }

    /// Turns `x (N, hidden_size)` into the layer's output. `taped` says whether `tape` will be used
    /// for the way down (its `x` is the caller's to keep). With a cache, attends to it.
    pub fn forward(
        &self,
        x: &mut [f32],
        tape: &mut Tape,
        taped: bool,
        work: &mut Workspace,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Result<()> {
        self.attend(x, tape, work, cache)?;
        self.feed_forward(x, tape, taped, work)
    }

    /// [`Self::forward`] of a layer above which only some tokens go on: `chosen`, rising. `narrow` is
    /// the same layer of a pass over those alone, and `x` becomes `(chosen, hidden_size)`.
    pub(super) fn forward_to(
        &self,
        (narrow, chosen): (&LayerPass, &[u32]),
        x: &mut Vec<f32>,
        tape: &mut Tape,
        work: &mut Workspace,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Result<()> {
        self.attend(x, tape, work, cache)?;
        for buffer in [&mut *x, &mut work.attended] {
            let width = buffer.len() / self.tokens.max(1);
            for (i, &row) in chosen.iter().enumerate() {
                let row = row as usize * width;
                buffer.copy_within(row..row + width, i * width);
            }
            buffer.truncate(chosen.len() * width);
        }
        if chosen.is_empty() {
            return Ok(()); // a part of a prompt that ends in a later pass
        }
        narrow.feed_forward(x, tape, false, work)
    }

    /// Leaves what attention makes of `x (N, hidden_size)` in the workspace.
    fn attend(
        &self,
        x: &[f32],
        tape: &mut Tape,
        work: &mut Workspace,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Result<()> {
        let (c, layer, n, isa) = (self.config, self.layer, self.tokens, self.isa);
        let heads = self.heads();
        let (q_width, kv_width) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);
        let Tape { q, k, v, raw_q, raw_k, lse, lows, .. } = tape;
        let [low_q, low_k, low_v, ..] = lows;
        for (buffer, width) in [
            (&mut *q, q_width),
            (k, kv_width),
            (v, kv_width),
            (&mut work.attended, q_width),
            (lse, heads.heads),
            (&mut work.normed, c.hidden_size),
        ] {
            buffer.resize(n * width, 0.0);
        }

        let mut normed = std::mem::take(&mut work.normed);
        self.norm(&layer.input_norm, x, &mut normed)?;
        let outs = [(&mut q[..], low_q), (&mut k[..], low_k), (&mut v[..], low_v)];
        self.project_shared(&layer.qkv, outs, &normed, work)?;
        work.normed = normed;
        for (norm, heads, raw) in [(&layer.q_norm, &mut *q, raw_q), (&layer.k_norm, &mut *k, raw_k)]
        {
            if norm.is_some() {
                raw.resize(heads.len(), 0.0);
                std::mem::swap(raw, heads);
                self.norm(norm, raw, heads)?;
            }
        }
        if let Some(rotation) = self.pass.rotations.of(layer) {
            rotation.rotate(isa, Turn::Forward, q, q_width, q_width);
            rotation.rotate(isa, Turn::Forward, k, kv_width, kv_width);
        }
        let mut out = std::mem::take(&mut work.attended);
        let (qkv, segments) = (qkv(heads, q, k, v), &self.pass.segments);
        let scores = layer.scores;
        match cache {
            Some((cache, index)) => {
                cache.attend_slices(isa, index, qkv, heads, segments, scores, &mut out);
            }
            None => attention::forward(isa, qkv, heads, segments, scores, &mut out, lse),
        }
        work.attended = out;
        Ok(())
    }

    /// Adds to `x (N, hidden_size)` what attention left, then what the rest of the layer makes of it.
    fn feed_forward(
        &self,
        x: &mut [f32],
        tape: &mut Tape,
        taped: bool,
        work: &mut Workspace,
    ) -> Result<()> {
        let (c, layer, n, isa) = (self.config, self.layer, self.tokens, self.isa);
        let Tape { attended, middle, gate, up, attention_branch, inner_branch, lows, .. } = tape;
        let [.., low_o, low_gate, low_up, low_down] = lows;
        for (buffer, width) in [
            (&mut work.gate, c.intermediate_size),
            (&mut work.up, c.intermediate_size),
            (&mut work.inner, c.intermediate_size),
            (&mut work.normed, c.hidden_size),
        ] {
            buffer.resize(n * width, 0.0);
        }

        let mut out = std::mem::take(&mut work.attended);
        let norm = &layer.post_attention_norm;
        self.join((&layer.o, low_o), &out, norm, x, attention_branch, work)?;
        if taped {
            attended.keep(self.forward, &mut out);
        }
        work.attended = out;

        middle.clear();
        middle.extend_from_slice(x);
        let mut normed = std::mem::take(&mut work.normed);
        self.norm(&layer.pre_feedforward_norm, x, &mut normed)?;
        let (mut gates, mut ups) = (std::mem::take(&mut work.gate), std::mem::take(&mut work.up));
        let outs = [(&mut gates[..], low_gate), (&mut ups[..], low_up)];
        self.project_shared(&layer.gate_up, outs, &normed, work)?;
        work.normed = normed;
        let mut inner = std::mem::take(&mut work.inner);
        swiglu::forward(isa, c.family.gate, &gates, &ups, &mut inner);
        if taped {
            gate.keep(self.forward, &mut gates);
            up.keep(self.forward, &mut ups);
        }
        (work.gate, work.up) = (gates, ups);
        let norm = &layer.post_feedforward_norm;
        self.join((&layer.down, low_down), &inner, norm, x, inner_branch, work)?;
        work.inner = inner;
        Ok(())
    }

    /// `y = norm(x)`, or a copy where there is none. `x` is rows of the norm's width end to end.
    fn norm(&self, norm: &Option<Tensor>, x: &[f32], y: &mut [f32]) -> Result<()> {
        match norm {
            Some(norm) => {
                let eps = self.config.rms_norm_eps as f32;
                rms_norm::forward(self.isa, x, &Values::of(norm)?, eps, y);
            }
            None => y.copy_from_slice(x),
        }
        Ok(())
    }

    /// The way back through [`Self::norm`]: adds the gradient of `x` to `dx`.
    fn norm_back(
        &self,
        norm: &Option<Tensor>,
        x: &[f32],
        dy: &[f32],
        dx: &mut [f32],
    ) -> Result<()> {
        match norm {
            Some(norm) => {
                let eps = self.config.rms_norm_eps as f32;
                rms_norm::backward(self.isa, x, &Values::of(norm)?, eps, dy, dx);
            }
            None => add(dx, dy, 1.0),
        }
        Ok(())
    }

    /// [`Self::project`] of layers that share their input, which may be one module.
    fn project_shared<const M: usize>(
        &self,
        shared: &Shared<M>,
        outs: [(&mut [f32], &mut Lows); M],
        x: &[f32],
        work: &mut Workspace,
    ) -> Result<()> {
        match shared {
            Shared::Apart(linears) => {
                let mut linears = linears.iter();
                let outs = outs.map(|(out, low)| {
                    (linears.next().expect("as many as there are outputs"), out, low)
                });
                self.project(outs, x, Onto::Nothing, work)
            }
            Shared::Whole(linear) => {
                let width = linear.weight.rows();
                let mut whole = std::mem::take(&mut work.side_by_side);
                whole.resize(self.tokens * width, 0.0);
                let mut parts = Vec::new();
                let mut lows = Vec::new();
                for (out, low) in outs {
                    parts.push(out);
                    lows.push(low);
                }
                // The first keeps what the module has to.
                let low = lows.swap_remove(0);
                self.project([(linear, &mut whole[..], low)], x, Onto::Nothing, work)?;
                let mut start = 0;
                for part in parts {
                    let of = part.len() / self.tokens.max(1);
                    for (to, from) in
                        part.chunks_exact_mut(of.max(1)).zip(whole.chunks_exact(width))
                    {
                        to.copy_from_slice(&from[start..start + of]);
                    }
                    start += of;
                }
                work.side_by_side = whole;
                Ok(())
            }
        }
    }

    /// [`Self::project_back`] through [`Self::project_shared`].
    fn project_shared_back<const M: usize>(
        &self,
        shared: &Shared<M>,
        dys: [(&[f32], &Lows); M],
        x: &[f32],
        dx: Option<&mut [f32]>,
        gradients: &mut AdapterGradients,
        work: &mut Workspace,
    ) -> Result<()> {
        match shared {
            Shared::Apart(linears) => {
                let mut linears = linears.iter();
                let dys = dys.map(|(dy, low)| {
                    (linears.next().expect("as many as there are outputs"), dy, low)
                });
                self.project_back(dys, x, dx, gradients, work)
            }
            Shared::Whole(linear) => {
                let width = linear.weight.rows();
                let mut whole = std::mem::take(&mut work.side_by_side);
                whole.resize(self.tokens * width, 0.0);
                let mut start = 0;
                for (dy, _) in dys {
                    let of = dy.len() / self.tokens.max(1);
                    for (to, from) in whole.chunks_exact_mut(width).zip(dy.chunks_exact(of.max(1)))
                    {
                        to[start..start + of].copy_from_slice(from);
                    }
                    start += of;
                }
                let dy = [(linear, &whole[..], dys[0].1)];
                let result = self.project_back(dy, x, dx, gradients, work);
                work.side_by_side = whole;
                result
            }
        }
    }

    /// Adds to the residual stream what `linear` makes of `inner`, behind the norm and the multiplier
    /// that a family may have there. With a norm, what is before it stays in `branch`.
    fn join(
        &self,
        (linear, low): (&Linear, &mut Lows),
        inner: &[f32],
        norm: &Option<Tensor>,
        x: &mut [f32],
        branch: &mut Vec<f32>,
        work: &mut Workspace,
    ) -> Result<()> {
        let by = self.config.variation.residual_multiplier as f32;
        if norm.is_none() && by == 1.0 {
            return self.project([(linear, x, low)], inner, Onto::Sum, work);
        }
        branch.resize(x.len(), 0.0);
        self.project([(linear, &mut branch[..], low)], inner, Onto::Nothing, work)?;
        let mut normed = std::mem::take(&mut work.branch);
        normed.resize(x.len(), 0.0);
        self.norm(norm, branch, &mut normed)?;
        add(x, &normed, by);
        work.branch = normed;
        Ok(())
    }

    /// The way back through [`Self::join`]: the gradient of what `linear` gave, put into `work`, or
    /// `dx` itself.
    fn join_back<'d>(
        &self,
        norm: &Option<Tensor>,
        branch: &[f32],
        dx: &'d [f32],
        (scaled, dbranch): (&'d mut Vec<f32>, &'d mut Vec<f32>),
    ) -> Result<&'d [f32]> {
        let by = self.config.variation.residual_multiplier as f32;
        if norm.is_none() && by == 1.0 {
            return Ok(dx);
        }
        scaled.clear();
        scaled.resize(dx.len(), 0.0);
        add(scaled, dx, by);
        if norm.is_none() {
            return Ok(scaled);
        }
        dbranch.clear();
        dbranch.resize(dx.len(), 0.0);
        self.norm_back(norm, branch, scaled, dbranch)?;
        Ok(dbranch)
    }

    /// Turns `dx`, the gradient of the layer's output, into that of its input, and adds up the
    /// gradients of trainable adapters. `tape`, which [`Self::forward`] left, is used up.
    ///
    /// With `lowest`, nothing is computed below that group: `dx` is then of no use.
    pub fn backward(
        &self,
        dx: &mut [f32],
        tape: &mut Tape,
        lowest: Option<Group>,
        gradients: &mut AdapterGradients,
        work: &mut Workspace,
    ) -> Result<()> {
        let (c, layer, n, isa) = (self.config, self.layer, self.tokens, self.isa);
        let heads = self.heads();
        let (q_width, kv_width) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);
        let Tape { x, q, k, v, raw_q, raw_k, attended, lse, middle, gate, up, .. } = tape;
        let (attention_branch, inner_branch) = (&tape.attention_branch, &tape.inner_branch);
        let lows = &tape.lows;
        let [low_q, low_k, low_v, low_o, low_gate, low_up, low_down] = lows;
        let take = |buffer: &mut Vec<f32>, width: usize| {
            let mut buffer = std::mem::take(buffer);
            buffer.resize(n * width, 0.0);
            buffer
        };
        let mut normed = take(&mut work.normed, c.hidden_size);
        let mut dnormed = take(&mut work.dnormed, c.hidden_size);
        let (mut gates, mut ups) = (std::mem::take(&mut work.gate), std::mem::take(&mut work.up));
        let mut out = std::mem::take(&mut work.attended);
        attended.give(self.forward, &mut out);
        gate.give(self.forward, &mut gates);
        up.give(self.forward, &mut ups);
        let mut inner = take(&mut work.inner, c.intermediate_size);
        let mut dinner = take(&mut work.dinner, c.intermediate_size);
        let mut dattended = take(&mut work.dattended, q_width);
        let (mut dq, mut dk, mut dv) = (
            take(&mut work.dq, q_width),
            take(&mut work.dk, kv_width),
            take(&mut work.dv, kv_width),
        );
        let (mut scaled, mut dbranch) =
            (std::mem::take(&mut work.branch), std::mem::take(&mut work.dbranch));
        let wanted = |group| lowest.is_none_or(|lowest| lowest < group);

        'down: {
            swiglu::forward(isa, c.family.gate, &gates, &ups, &mut inner);
            let room = (&mut scaled, &mut dbranch);
            let dy = self.join_back(&layer.post_feedforward_norm, inner_branch, dx, room)?;
            let down = [(&layer.down, dy, low_down)];
            let dinner_wanted = wanted(Group::Down).then_some(&mut dinner[..]);
            self.project_back(down, &inner, dinner_wanted, gradients, work)?;
            if !wanted(Group::Down) {
                break 'down;
            }

            swiglu::backward(isa, c.family.gate, &mut gates, &mut ups, &dinner);
            let norm = &layer.pre_feedforward_norm;
            self.norm(norm, middle, &mut normed)?;
            let both = [(&gates[..], low_gate), (&ups[..], low_up)];
            let dnormed_wanted = wanted(Group::GateUp).then_some(&mut dnormed[..]);
            let shared = &layer.gate_up;
            self.project_shared_back(shared, both, &normed, dnormed_wanted, gradients, work)?;
            if !wanted(Group::GateUp) {
                break 'down;
            }
            self.norm_back(norm, middle, &dnormed, dx)?;

            let room = (&mut scaled, &mut dbranch);
            let dy = self.join_back(&layer.post_attention_norm, attention_branch, dx, room)?;
            let o = [(&layer.o, dy, low_o)];
            let dattended_wanted = wanted(Group::Output).then_some(&mut dattended[..]);
            self.project_back(o, &out, dattended_wanted, gradients, work)?;
            if !wanted(Group::Output) {
                break 'down;
            }
            let left = Attended { out: &out, lse };
            let grad = QkvGrad::apart((&mut dq, q_width), (&mut dk, kv_width), (&mut dv, kv_width));
            let (qkv, segments) = (qkv(heads, q, k, v), &self.pass.segments);
            let scores = layer.scores;
            attention::backward(isa, qkv, heads, segments, scores, left, &dattended, grad);
            if let Some(rotation) = self.pass.rotations.of(layer) {
                rotation.rotate(isa, Turn::Back, &mut dq, q_width, q_width);
                rotation.rotate(isa, Turn::Back, &mut dk, kv_width, kv_width);
            }
            for (norm, raw, d) in
                [(&layer.q_norm, &*raw_q, &mut dq), (&layer.k_norm, &*raw_k, &mut dk)]
            {
                if norm.is_some() {
                    work.draw.clear();
                    work.draw.resize(d.len(), 0.0);
                    self.norm_back(norm, raw, d, &mut work.draw)?;
                    std::mem::swap(d, &mut work.draw);
                }
            }

            self.norm(&layer.input_norm, x, &mut normed)?;
            let all = [(&dq[..], low_q), (&dk[..], low_k), (&dv[..], low_v)];
            let dnormed_wanted = wanted(Group::Attention).then_some(&mut dnormed[..]);
            let shared = &layer.qkv;
            self.project_shared_back(shared, all, &normed, dnormed_wanted, gradients, work)?;
            if wanted(Group::Attention) {
                self.norm_back(&layer.input_norm, x, &dnormed, dx)?;
            }
        }

        (work.normed, work.dnormed, work.inner, work.dinner) = (normed, dnormed, inner, dinner);
        (work.gate, work.up, work.attended) = (gates, ups, out);
        (work.dattended, work.dq, work.dk, work.dv) = (dattended, dq, dk, dv);
        (work.branch, work.dbranch) = (scaled, dbranch);
        Ok(())
    }

    fn heads(&self) -> Heads {
        Heads {
            heads: self.config.num_attention_heads,
            kv_heads: self.config.num_key_value_heads,
            head_dim: self.config.head_dim,
        }
    }

    /// The updates that rows wear on linear layers. Their masks are drawn, 0 outside their tokens.
    fn updates<'l>(
        &self,
        linears: impl Iterator<Item = &'l Linear>,
        masks: &mut Vec<Vec<f32>>,
    ) -> Result<Vec<Vec<Update<'a>>>> {
        let runs = self.pass.adapters.runs(&self.pass.segments);
        let mut drawn = 0;
        let mut all = Vec::new();
        for linear in linears {
            let mut updates = Vec::new();
            for (tokens, worn) in &runs {
                for worn in *worn {
                    let Some(lora) = worn.adapter.modules.get(&linear.name) else { continue };
                    let mask = self.pass.dropout.filter(|_| worn.trainable).map(|dropout| {
                        if drawn == masks.len() {
                            masks.push(Vec::new());
                        }
                        let (mask, width) = (&mut masks[drawn], lora.in_features());
                        mask.resize(self.tokens * width, 0.0);
                        mask[..tokens.start * width].fill(0.0);
                        mask[tokens.end * width..].fill(0.0);
                        let own = &mut mask[tokens.start * width..tokens.end * width];
                        dropout.draw(&linear.name, tokens.clone(), own);
                        drawn += 1;
                        drawn - 1
                    });
                    let b = Values::of(lora.b.as_tensor())?;
                    let dora = match lora.row_norms(&*linear.weight)? {
                        Some(norms) => {
                            let scales = lora.row_scales(&*linear.weight)?;
                            let scales = scales.expect("norms are of magnitudes");
                            let rows = b.chunks_exact(lora.r()).zip(&scales);
                            let b = rows.flat_map(|(b, s)| b.iter().map(move |b| b * s)).collect();
                            Some(Dora { b, scales, norms, weight: worn.weight as f32 })
                        }
                        None => None,
                    };
                    updates.push(Update {
                        a: Values::of(lora.a.as_tensor())?,
                        b,
                        r: lora.r(),
                        scale: (lora.scale * worn.weight) as f32,
                        trainable: worn.trainable,
                        tokens: tokens.clone(),
                        mask,
                        dora,
                    });
                }
            }
            all.push(updates);
        }
        Ok(all)
    }

    /// The products of linear layers that share the input `x`, updates and biases included.
    fn project<const M: usize>(
        &self,
        outs: [(&Linear, &mut [f32], &mut Lows); M],
        x: &[f32],
        onto: Onto,
        work: &mut Workspace,
    ) -> Result<()> {
        if self.decoding {
            let outs = outs.map(|(linear, out, _)| (linear, out));
            return few::project(self, outs, x, onto, work);
        }
        let (n, isa) = (self.tokens, self.isa);
        let width = outs[0].0.weight.cols();
        let all = Strided { values: x, stride: width };
        work.x.pack(isa, self.forward, all, n, width);
        // Bytes would round what a step changes of an adapter away.
        let of_update = match self.forward {
            Panel::Int8 => Panel::Int16,
            panel => panel,
        };
        if of_update != self.forward {
            work.x_of_update.pack(isa, of_update, all, n, width);
        }
        let x_of_update = if of_update == self.forward { &work.x } else { &work.x_of_update };
        let updates = self.updates(outs.iter().map(|(linear, ..)| *linear), &mut work.masks)?;
        let mut outs = outs;

        // x · Aᵀ of all updates on all tokens at once; the others one by one.
        let mut products = Vec::new();
        let mut apart = Vec::new();
        for ((_, _, lows), updates) in outs.iter_mut().zip(&updates) {
            lows.low.resize_with(updates.len(), Vec::new);
            for (low, update) in lows.low.iter_mut().zip(updates) {
                low.clear();
                low.resize(n * update.r, 0.0);
                if update.tokens.len() < n || update.mask.is_some() {
                    apart.push((low, update));
                    continue;
                }
                let terms = vec![Term { x: x_of_update, weights: update.a(), transposed: true }];
                let out = Out::new(low, update.r, 0);
                products.push(Product { terms, begin: Begin::Zero, out });
            }
        }
        // SAFETY: each product has a buffer to itself.
        unsafe { multiply(isa, &products) };
        drop(products);
        for (low, update) in apart {
            let own = update.tokens.start * width..update.tokens.end * width;
            let mut values = &x[own.clone()];
            if let Some(mask) = update.mask {
                let mask = &mut work.masks[mask][own];
                times(mask, values);
                values = mask;
            }
            let input = Strided { values, stride: width };
            work.masked.pack(isa, of_update, input, update.tokens.len(), width);
            let terms = vec![Term { x: &work.masked, weights: update.a(), transposed: true }];
            let out = Out::new(&mut low[update.tokens.start * update.r..], update.r, 0);
            // SAFETY: one product over one buffer.
            unsafe { multiply(isa, &[Product { terms, begin: Begin::Zero, out }]) };
        }
        let lows = outs.iter().flat_map(|(_, _, lows)| lows.low.iter());
        pack_all(
            isa,
            Panel::F32,
            lows.zip(updates.iter().flatten()).map(|(l, u)| (&l[..], u.r)),
            n,
            &mut work.lows,
        );

        let biases: Vec<Option<Values>> = outs
            .iter()
            .map(|(linear, ..)| linear.bias.as_ref().map(Values::of).transpose())
            .collect::<Result<_>>()?;
        let scales: Vec<BaseScales> = updates.iter().map(|updates| base_scales(updates)).collect();
        let mut bases = std::mem::take(&mut work.bases);
        let mut low = work.lows.iter();
        let mut products = Vec::new();
        let mut after = Vec::new();
        let linears = outs.iter_mut().zip(&mut bases).zip(updates.iter().zip(&scales)).zip(&biases);
        for ((((linear, out, _), base), (updates, scales)), bias) in linears {
            let frozen = Weights::Frozen(&linear.weight);
            let mut terms = vec![Term { x: &work.x, weights: frozen, transposed: true }];
            let mut of_updates = Vec::new();
            for update in updates {
                let x = low.next().expect("packed for every update");
                of_updates.push(Term { x, weights: update.b(), transposed: true });
            }
            if !scales.is_empty() {
                // The base's product meets its scales before anything is added to it.
                base.resize(n * linear.weight.rows(), 0.0);
                let to = Out::new(base, linear.weight.rows(), 0);
                products.push(Product { terms, begin: Begin::Zero, out: to });
                after.push(of_updates);
                continue;
            }
            terms.extend(of_updates);
            let begin = match (onto, bias) {
                (Onto::Nothing, None) => Begin::Zero,
                (Onto::Nothing, Some(bias)) => Begin::Bias(bias),
                (Onto::Sum, bias) => {
                    if let Some(bias) = bias {
                        for row in out.chunks_exact_mut(bias.len()) {
                            row.iter_mut().zip(&**bias).for_each(|(out, b)| *out += b);
                        }
                    }
                    Begin::Add
                }
            };
            let out = Out::new(out, linear.weight.rows(), 0);
            products.push(Product { terms, begin, out });
        }
        // SAFETY: each product has a buffer to itself.
        unsafe { multiply(isa, &products) };
        drop(products);

        let mut products = Vec::new();
        let mut after = after.into_iter();
        let linears = outs.iter_mut().zip(&mut bases).zip(updates.iter().zip(&scales)).zip(&biases);
        for ((((linear, out, lows), base), (updates, scales)), bias) in linears {
            if scales.is_empty() {
                continue;
            }
            if updates.iter().any(|update| update.trainable && update.dora.is_some()) {
                lows.base.copy(self.forward, base);
            }
            scale_rows(base, linear.weight.rows(), scales);
            if onto == Onto::Nothing {
                out.fill(0.0);
            }
            let bias = bias.as_deref();
            let rows = out.par_chunks_exact_mut(linear.weight.rows());
            rows.zip(base.par_chunks_exact(linear.weight.rows())).for_each(|(out, base)| {
                out.iter_mut().zip(base).for_each(|(out, y)| *out += y);
                if let Some(bias) = bias {
                    out.iter_mut().zip(bias).for_each(|(out, b)| *out += b);
                }
            });
            let terms = after.next().expect("one for every scaled layer");
            let out = Out::new(out, linear.weight.rows(), 0);
            products.push(Product { terms, begin: Begin::Add, out });
        }
        // SAFETY: each product has a buffer to itself.
        unsafe { multiply(isa, &products) };
        drop(products);
        work.bases = bases;
        Ok(())
    }

    /// The way back through linear layers that share the input `x`: the gradients of trainable
    /// updates, and, if wanted, that of `x`.
    fn project_back<const M: usize>(
        &self,
        linears: [(&Linear, &[f32], &Lows); M],
        x: &[f32],
        dx: Option<&mut [f32]>,
        gradients: &mut AdapterGradients,
        work: &mut Workspace,
    ) -> Result<()> {
        let (n, isa, panel) = (self.tokens, self.isa, self.backward);
        let width = linears[0].0.weight.cols();
        let updates = self.updates(linears.iter().map(|(linear, ..)| *linear), &mut work.masks)?;
        if dx.is_none() && updates.iter().flatten().all(|update| !update.trainable) {
            return Ok(());
        }
        for ((linear, dy, _), packed) in linears.iter().zip(&mut work.dys) {
            let (values, stride) = (*dy, linear.weight.rows());
            packed.pack(isa, panel, Strided { values, stride }, n, stride);
        }
        let scales: Vec<BaseScales> = updates.iter().map(|updates| base_scales(updates)).collect();
        if dx.is_some() {
            for (((_, dy, _), packed), scales) in
                linears.iter().zip(&mut work.dbases).zip(&scales).filter(|(_, s)| !s.is_empty())
            {
                let stride = dy.len() / n.max(1);
                work.scaled.clear();
                work.scaled.extend_from_slice(dy);
                scale_rows(&mut work.scaled, stride, scales);
                let values = &work.scaled;
                packed.pack(isa, panel, Strided { values, stride }, n, stride);
            }
        }

        // dlow = scale · dy · B, nothing outside its tokens.
        let mut dlows = std::mem::take(&mut work.dlows);
        dlows.resize_with(updates.iter().flatten().count().max(dlows.len()), Vec::new);
        let mut free = dlows.iter_mut();
        let mut products = Vec::new();
        for (updates, dy) in updates.iter().zip(&work.dys) {
            for update in updates {
                let dlow = free.next().expect("one for every update");
                dlow.clear();
                dlow.resize(n * update.r, 0.0);
                let terms = vec![Term { x: dy, weights: update.b(), transposed: false }];
                let out = Out::new(dlow, update.r, 0);
                products.push(Product { terms, begin: Begin::Zero, out });
            }
        }
        // SAFETY: each product has a buffer to itself.
        unsafe { multiply(isa, &products) };
        drop(products);
        for (dlow, update) in dlows.iter_mut().zip(updates.iter().flatten()) {
            dlow[..update.tokens.start * update.r].fill(0.0);
            dlow[update.tokens.end * update.r..].fill(0.0);
        }

        if let Some(dx) = dx {
            let pairs = dlows.iter().zip(updates.iter().flatten()).map(|(l, u)| (&l[..], u.r));
            pack_all(isa, Panel::F32, pairs, n, &mut work.lows);
            let mut packed = work.lows.iter();
            let mut terms = Vec::new();
            let mut apart = Vec::new();
            let dys = work.dys.iter().zip(&work.dbases).zip(&scales);
            for (((linear, ..), updates), ((dy, dbase), scales)) in
                linears.iter().zip(&updates).zip(dys)
            {
                let frozen = Weights::Frozen(&linear.weight);
                let x = if scales.is_empty() { dy } else { dbase };
                terms.push(Term { x, weights: frozen, transposed: false });
                for update in updates {
                    let x = packed.next().expect("packed for every update");
                    let term = Term { x, weights: update.a(), transposed: false };
                    match update.mask {
                        None => terms.push(term),
                        Some(mask) => apart.push((term, &work.masks[mask])),
                    }
                }
            }
            let product = |terms, out| Product { terms, begin: Begin::Zero, out };
            let out = Out::new(dx, width, 0);
            // SAFETY: one product over one buffer.
            unsafe { multiply(isa, &[product(terms, out)]) };
            // What came through dropout meets its mask first.
            for (term, mask) in apart {
                let through = &mut work.through;
                through.resize(n * width, 0.0);
                let out = Out::new(through, width, 0);
                // SAFETY: one product over one buffer.
                unsafe { multiply(isa, &[product(vec![term], out)]) };
                times(through, mask);
                let both = dx.par_chunks_mut(CHUNK).zip(through.par_chunks(CHUNK));
                both.for_each(|(dx, d)| dx.iter_mut().zip(d).for_each(|(dx, d)| *dx += d));
            }
        }
        self.lora_gradients(&linears, x, &updates, &dlows, gradients, work)?;
        work.dlows = dlows;
        Ok(())
    }

    /// `dA += dlowᵀ · x` and `dB += scale · dyᵀ · low` of trainable updates.
    fn lora_gradients(
        &self,
        linears: &[(&Linear, &[f32], &Lows)],
        x: &[f32],
        updates: &[Vec<Update>],
        dlows: &[Vec<f32>],
        gradients: &mut AdapterGradients,
        work: &mut Workspace,
    ) -> Result<()> {
        let (n, isa, panel) = (self.tokens, self.isa, self.backward);
        let width = linears[0].0.weight.cols();
        let dense = |values, cols| Weights::Dense { values, cols, scale: 1.0 };
        let mut dlow = dlows.iter();
        let mut trained = Vec::new();
        for ((linear, dy, lows), updates) in linears.iter().zip(updates) {
            for (update, low) in updates.iter().zip(&lows.low) {
                let dlow = dlow.next().expect("one for every update");
                if update.trainable {
                    trained.push(Trained { linear, dy, low, base: &lows.base, update, dlow });
                }
            }
        }
        if trained.is_empty() {
            return Ok(());
        }

        // All that multiply the same x are stacked, so that it is packed once; the others multiply
        // what is left of x behind their masks.
        let (mut masked, mut plain) = (Vec::new(), Vec::new());
        for one in &trained {
            match one.update.mask {
                Some(mask) => masked.push((one, mask)),
                None => plain.push(one),
            }
        }
        let stacked: usize = plain.iter().map(|one| one.update.r).sum();
        for &(_, mask) in &masked {
            times(&mut work.masks[mask], x);
        }
        let count = 1 + masked.len() + trained.len();
        work.factors.resize_with(count.max(work.factors.len()), PackedRows::default);
        work.products.resize_with(count.max(work.products.len()), Vec::new);
        let turned = &mut work.turned;
        let mut factors = work.factors.iter_mut();
        let mut pack = |turned: &[f32]| {
            let factor = factors.next().expect("as many as were counted");
            let stride = n;
            factor.pack(isa, panel, Strided { values: turned, stride }, turned.len() / n, n);
        };
        turned.clear();
        plain.iter().for_each(|one| turn(one.dlow, one.update.r, turned));
        pack(turned);
        let dlows = masked.iter().map(|(one, _)| (one.dlow, one.update.r));
        let lows = trained.iter().map(|one| (one.low, one.update.r));
        for (low, r) in dlows.chain(lows) {
            turned.clear();
            turn(low, r, turned);
            pack(turned);
        }

        let mut sources = vec![(dense(x, width), stacked, width)];
        let of_masks = masked.iter().map(|&(one, mask)| (&work.masks[mask], one.update.r));
        sources.extend(of_masks.map(|(x, r)| (dense(x, width), r, width)));
        sources.extend(trained.iter().map(|one| {
            let out = one.linear.weight.rows();
            (dense(one.dy, out), one.update.r, out)
        }));
        let mut products = Vec::new();
        for ((&(weights, rows, cols), factor), out) in
            sources.iter().zip(&work.factors).zip(&mut work.products)
        {
            out.resize(rows * cols, 0.0);
            if rows > 0 {
                let terms = vec![Term { x: factor, weights, transposed: false }];
                let out = Out::new(out, cols, 0);
                products.push(Product { terms, begin: Begin::Zero, out });
            }
        }
        // SAFETY: each product has a buffer to itself.
        unsafe { multiply(isa, &products) };
        drop(products);

        let (mut in_stack, mut next_masked) = (0, 1);
        for (i, Trained { linear, dy, base, update, .. }) in trained.iter().enumerate() {
            let place = gradients.places[&linear.name];
            let da = match update.mask {
                None => {
                    let rows = in_stack * width..(in_stack + update.r) * width;
                    in_stack += update.r;
                    &work.products[0][rows]
                }
                Some(_) => {
                    next_masked += 1;
                    &work.products[next_masked - 1][..]
                }
            };
            gradients.gradients[place].iter_mut().zip(da).for_each(|(sum, d)| *sum += d);
            let db = &work.products[1 + masked.len() + i]; // (r, out)
            let scales = update.dora.as_ref().map(|dora| &dora.scales[..]);
            add_turned(&mut gradients.gradients[place + 1], db, update.r, update.scale, scales);
            if let Some(dora) = &update.dora {
                let base = base.read(self.forward, &mut work.scaled); // (N, out)
                let dm = &mut gradients.gradients[place + 2];
                magnitude_gradient(dora, update, (dy, base), db, dm);
            }
        }
        Ok(())
    }
}

/// Queries, keys and values in buffers of their own.
fn qkv<'v>(heads: Heads, q: &'v [f32], k: &'v [f32], v: &'v [f32]) -> Qkv<'v> {
    let kv = heads.kv_heads * heads.head_dim;
    Qkv {
        q: attention::Strided { values: q, stride: heads.heads * heads.head_dim },
        k: attention::Strided { values: k, stride: kv },
        v: attention::Strided { values: v, stride: kv },
    }
}

/// What products are added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Onto {
    Nothing,
    /// What the buffer holds: the residual stream.
    Sum,
}

impl Update<'_> {
    fn a(&self) -> Weights<'_> {
        let cols = self.a.len() / self.r;
        Weights::Dense { values: &self.a, cols, scale: 1.0 }
    }

    fn b(&self) -> Weights<'_> {
        let values = self.dora.as_ref().map_or(&*self.b, |dora| &dora.b);
        Weights::Dense { values, cols: self.r, scale: self.scale }
    }
}

/// What the updates of a layer make of the base's product; nothing without DoRA.
fn base_scales(updates: &[Update]) -> BaseScales {
    let mut all: BaseScales = Vec::new();
    for (update, dora) in updates.iter().filter_map(|u| Some((u, u.dora.as_ref()?))) {
        let last = all.last_mut().filter(|(tokens, _)| *tokens == update.tokens);
        let scales = match last {
            Some((_, scales)) => scales,
            None => {
                all.push((update.tokens.clone(), vec![1.0; dora.scales.len()]));
                &mut all.last_mut().expect("just pushed").1
            }
        };
        scales.iter_mut().zip(&dora.scales).for_each(|(c, s)| *c += dora.weight * (s - 1.0));
    }
    all
}

/// Multiplies rows of `values (N, width)` with the scales of their run.
fn scale_rows(values: &mut [f32], width: usize, scales: &BaseScales) {
    for (tokens, scales) in scales {
        let rows = &mut values[tokens.start * width..tokens.end * width];
        rows.par_chunks_exact_mut(width).for_each(|row| {
            row.iter_mut().zip(scales).for_each(|(y, c)| *y *= c);
        });
    }
}

/// Adds `weight / ‖·‖ · Σ dy ⊙ (W x + scale · B A x)` to the gradient of the magnitudes: the norms
/// are no part of the tape (Liu et al. 2024, section 4.3). `db (r, out)` is `lowᵀ · dy`.
fn magnitude_gradient(
    dora: &Dora,
    update: &Update,
    (dy, base): (&[f32], &[f32]),
    db: &[f32],
    dm: &mut [f32],
) {
    let out = dm.len();
    let columns = 64;
    let (tokens, r, scale, b) = (update.tokens.clone(), update.r, update.scale, &*update.b);
    dm.par_chunks_mut(columns).enumerate().for_each(|(chunk, dm)| {
        let first = chunk * columns;
        let mut sums = vec![0f64; dm.len()];
        for token in tokens.clone() {
            let at = token * out + first;
            let both = dy[at..at + dm.len()].iter().zip(&base[at..at + dm.len()]);
            sums.iter_mut().zip(both).for_each(|(sum, (d, y))| *sum += f64::from(d * y));
        }
        for (i, (dm, sum)) in dm.iter_mut().zip(sums).enumerate() {
            let row = first + i;
            let b = &b[row * r..(row + 1) * r];
            let through: f32 = b.iter().enumerate().map(|(k, b)| b * db[k * out + row]).sum();
            let all = dora.weight * sum as f32 + scale * through;
            *dm += all / dora.norms[row];
        }
    });
}

/// Packs each `(n, r)`, as many as there are.
fn pack_all<'v>(
    isa: Isa,
    panel: Panel,
    all: impl Iterator<Item = (&'v [f32], usize)>,
    n: usize,
    packed: &mut Vec<PackedRows>,
) {
    for (i, (values, stride)) in all.enumerate() {
        if packed.len() <= i {
            packed.push(PackedRows::default());
        }
        packed[i].pack(isa, panel, Strided { values, stride }, n, stride);
    }
}

/// `a += by · b`.
fn add(a: &mut [f32], b: &[f32], by: f32) {
    let chunks = a.par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK));
    chunks.for_each(|(a, b)| a.iter_mut().zip(b).for_each(|(a, b)| *a += by * b));
}

/// `a *= b`.
fn times(a: &mut [f32], b: &[f32]) {
    let chunks = a.par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK));
    chunks.for_each(|(a, b)| a.iter_mut().zip(b).for_each(|(a, b)| *a *= b));
}

/// Appends the transpose of `values (n, r)`.
fn turn(values: &[f32], r: usize, out: &mut Vec<f32>) {
    let (start, n) = (out.len(), values.len() / r);
    out.resize(start + values.len(), 0.0);
    let rows = out[start..].par_chunks_exact_mut(n.max(1)).enumerate();
    rows.for_each(|(i, row)| {
        row.iter_mut().zip(values[i..].iter().step_by(r)).for_each(|(to, value)| *to = *value);
    });
}

/// Adds the transpose of `values (r, m)`, times `scale` and each row's own, to `sums (m, r)`.
fn add_turned(sums: &mut [f32], values: &[f32], r: usize, scale: f32, of_rows: Option<&[f32]>) {
    let m = sums.len() / r;
    let rows = (CHUNK / 4 / r).max(1);
    sums.par_chunks_mut(rows * r).enumerate().for_each(|(chunk, sums)| {
        for (row, sums) in (chunk * rows..).zip(sums.chunks_exact_mut(r)) {
            let scale = of_rows.map_or(scale, |of_rows| scale * of_rows[row]);
            for (j, sum) in sums.iter_mut().enumerate() {
                *sum += scale * values[j * m + row];
            }
        }
    });
}
