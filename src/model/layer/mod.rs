//! A decoder layer on the CPU, forward and backward by hand over plain buffers.
//!
//! This is the fast form of [`Decoder::layer`](super::Decoder::layer), which composes the same
//! layer of portable ops on candle's tape; a parity test holds the two together, gradients too.
//! Written out, a layer needs no tape: a group of linear layers that share their input packs it
//! once and hands all its products to the threads together, an adapter's update is one more term
//! of the base's product, residuals are what sums begin with, and all large buffers are used again
//! by the next layer and the next step.
//!
//! This file is the pass itself; a file each has the linear layers (`project`), the updates they
//! wear (`update`) and the buffers (`tape`).

mod project;
mod tape;
mod update;

use std::collections::HashMap;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::adapters::AdapterGroup;
use super::cache::KvCache;
use super::config::Config;
use super::layers::{Layer, Linear};
use super::pass::Pass;
use crate::isa::Isa;
use crate::ops::attention::{self, Attended, Heads, Qkv, QkvGrad};
use crate::ops::gemm::PanelType;
use crate::ops::rope::Direction;
use crate::ops::{BackendKind, Compute, Values, par_for_each, rms_norm, swiglu};
pub(super) use project::Onto;
use tape::Lows;
pub use tape::{Sizes, Tape, Workspace};

/// Values, or rows of an update, that a thread takes at a time.
const CHUNK: usize = 1 << 14;

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

/// One layer of one pass.
pub struct LayerPass<'a> {
    config: &'a Config,
    layer: &'a Layer,
    pub(super) pass: &'a Pass<'a>,
    pub(super) isa: Isa,
    pub(super) forward: PanelType,
    backward: PanelType,
    tokens: usize,
    /// Which tokens wear what, in a decoding step: given, products read each weight where it lies, for a
    /// token a row. What is learned from, and a prompt, is computed one way, however many tokens there are.
    pub(super) adapter_groups: Option<&'a [AdapterGroup<'a>]>,
}

impl<'a> LayerPass<'a> {
    /// Prepares a layer for the pass, or `None` if `compute` is the portable form.
    pub(super) fn new(
        config: &'a Config,
        layer: &'a Layer,
        pass: &'a Pass<'a>,
        compute: Compute,
    ) -> Option<Self> {
        if compute.backend == BackendKind::Reference {
            return None;
        }
        let (forward, backward) = compute.precision.panels();
        let tokens = pass.segments.last().map_or(0, |segment| segment.tokens.end);
        let isa = Isa::current();
        Some(Self { config, layer, pass, isa, forward, backward, tokens, adapter_groups: None })
    }

    /// The layer of a decoding step: a token or so a row, not learned from. `adapter_groups` are the pass's.
    pub(super) fn decoding(self, adapter_groups: &'a [AdapterGroup<'a>]) -> Self {
        Self { adapter_groups: Some(adapter_groups), ..self }
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
        let heads = self.config.heads();
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
            rotation.rotate(isa, Direction::Forward, q, q_width, q_width);
            rotation.rotate(isa, Direction::Forward, k, kv_width, kv_width);
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
        let heads = self.config.heads();
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
            let grad =
                QkvGrad::separate((&mut dq, q_width), (&mut dk, kv_width), (&mut dv, kv_width));
            let (qkv, segments) = (qkv(heads, q, k, v), &self.pass.segments);
            let scores = layer.scores;
            attention::backward(isa, qkv, heads, segments, scores, left, &dattended, grad);
            if let Some(rotation) = self.pass.rotations.of(layer) {
                rotation.rotate(isa, Direction::Backward, &mut dq, q_width, q_width);
                rotation.rotate(isa, Direction::Backward, &mut dk, kv_width, kv_width);
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
}

/// Queries, keys and values in buffers of their own.
pub(super) fn qkv<'v>(heads: Heads, q: &'v [f32], k: &'v [f32], v: &'v [f32]) -> Qkv<'v> {
    let kv = heads.kv_heads * heads.head_dim;
    Qkv {
        q: attention::StridedHeads { values: q, stride: heads.heads * heads.head_dim },
        k: attention::StridedHeads { values: k, stride: kv },
        v: attention::StridedHeads { values: v, stride: kv },
    }
}

/// `a += by · b`.
fn add(a: &mut [f32], b: &[f32], by: f32) {
    let chunks = a.chunks_mut(CHUNK).zip(b.chunks(CHUNK));
    par_for_each(chunks.collect(), b.len(), |(a, b)| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += by * b);
    });
}

/// `a *= b`.
fn times(a: &mut [f32], b: &[f32]) {
    let chunks = a.par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK));
    chunks.for_each(|(a, b)| a.iter_mut().zip(b).for_each(|(a, b)| *a *= b));
}
