//! A decoder layer on the CPU, forward and backward by hand over plain buffers.
//!
//! This is the CPU form of [`Decoder::layer`](super::Decoder::layer), which composes the same layer of
//! candle ops on a tape; a parity test compares the two, gradients included. Weights may be frozen,
//! frozen with adapters, or trainable: there is one pass for all three.
//!
//! Linear layers that share their input pack it once and compute all their products in one parallel
//! region; an adapter's update is one more term of the base's product; residuals are the initial values of
//! sums; all large buffers are reused by the next layer and the next step.
//!
//! Attention, the feed-forward block, norms and the residual stream, linear layers, the updates of adapters,
//! and the buffers each have a file.

mod attention;
mod feed_forward;
mod linear;
pub(super) mod reference;
mod residual;
pub mod tape;
mod update;

use std::collections::HashMap;

use candle_core::Result;
use rayon::prelude::*;

use super::adapters::AdapterGroup;
use super::cache::PanelCache;
use super::config::Config;
use super::layers::Layer;
use super::pass::Pass;
use crate::isa::Isa;
use crate::ops::gemm::PanelType;
use crate::ops::{Precision, par_for_each};
pub use tape::{Sizes, Tape, Workspace};

/// Values, or rows of an update, per task.
const CHUNK: usize = 1 << 14;

/// Linear layers that share an input: an index into `Layer::groups`, in the order of the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinearGroup(pub(super) usize);

impl LinearGroup {
    const ATTENTION_INPUT: Self = Self(0);
    const ATTENTION_OUTPUT: Self = Self(1);
    /// Of a dense feed-forward block.
    const GATE_UP: Self = Self(2);
    const DOWN: Self = Self(3);
}

/// The buffers in which gradients of trainable adapters or weights are summed.
#[derive(Debug)]
pub struct GradientBuffers<'a> {
    /// Index of the first parameter of each adapted module, see `Adapter::parameter_indices`.
    pub places: &'a HashMap<String, usize>,
    /// One vector per parameter.
    pub gradients: &'a mut [Vec<f32>],
}

impl GradientBuffers<'_> {
    /// The gradient of a module's first parameter, or of one after it.
    pub(super) fn of(&mut self, module: &str, next: usize) -> &mut [f32] {
        &mut self.gradients[self.places[module] + next]
    }
}

/// One layer of one pass.
pub struct LayerPass<'a> {
    config: &'a Config,
    layer: &'a Layer,
    pass: &'a Pass<'a>,
    isa: Isa,
    /// Panels of the products of the forward and of the backward pass.
    forward: PanelType,
    backward: PanelType,
    /// The precision of the tape.
    kept_as: PanelType,
    tokens: usize,
    /// The tokens of each list of adapters in a decode step: products then read each weight in place,
    /// for one token per row. Training and prefill use the packed form for any number of tokens.
    adapter_groups: Option<&'a [AdapterGroup<'a>]>,
}

impl<'a> LayerPass<'a> {
    /// Prepares a layer for the pass.
    pub(super) fn new(
        config: &'a Config,
        layer: &'a Layer,
        pass: &'a Pass<'a>,
        precision: Precision,
    ) -> Self {
        let (forward, backward) = precision.panels();
        let tokens = pass.segments.last().map_or(0, |segment| segment.tokens.end);
        let isa = Isa::current();
        let adapter_groups = None;
        // Full training keeps the tape in F32.
        let trains = layer.attention.o.gradient().is_some();
        let kept_as = if trains { PanelType::F32 } else { forward };
        Self { config, layer, pass, isa, forward, backward, kept_as, tokens, adapter_groups }
    }

    /// The layer of a decode step, without gradients, with the `adapter_groups` of the pass.
    pub(super) fn decoding(self, adapter_groups: &'a [AdapterGroup<'a>]) -> Self {
        Self { adapter_groups: Some(adapter_groups), ..self }
    }

    /// Overwrites `x (N, hidden_size)` with the layer's output. `taped`: whether `tape` is for a backward
    /// pass (the caller saves its `x`). With a cache, attends to it.
    pub(super) fn forward(
        &self,
        x: &mut [f32],
        tape: &mut Tape,
        taped: bool,
        work: &mut Workspace,
        cache: Option<(&mut PanelCache, usize)>,
    ) -> Result<()> {
        self.attend(x, tape, work, cache)?;
        self.add_branches(x, tape, taped, work)
    }

    /// [`Self::forward`] of the last layer if only the outputs of some tokens are needed: `chosen`,
    /// in ascending order. `narrow` is the same layer of a pass over only these tokens; `x` becomes
    /// `(chosen, hidden_size)`.
    pub(super) fn forward_to(
        &self,
        (narrow, chosen): (&LayerPass, &[u32]),
        x: &mut Vec<f32>,
        tape: &mut Tape,
        work: &mut Workspace,
        cache: Option<(&mut PanelCache, usize)>,
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
            return Ok(()); // a chunk of a prompt that ends in a later pass
        }
        narrow.add_branches(x, tape, false, work)
    }

    fn attend(
        &self,
        x: &[f32],
        tape: &mut Tape,
        work: &mut Workspace,
        cache: Option<(&mut PanelCache, usize)>,
    ) -> Result<()> {
        let Layer { attention, input_norm, .. } = self.layer;
        self.attend_heads(attention, input_norm.as_ref(), x, &mut tape.attention, work, cache)
    }

    /// Adds the outputs of attention and then of the feed-forward block to `x (N, hidden_size)`.
    fn add_branches(
        &self,
        x: &mut [f32],
        tape: &mut Tape,
        taped: bool,
        work: &mut Workspace,
    ) -> Result<()> {
        let layer = self.layer;
        let norm = layer.post_attention_norm.as_ref();
        self.attention_output(&layer.attention, norm, x, &mut tape.attention, taped, work)?;
        tape.post_attention_residual.clear();
        tape.post_attention_residual.extend_from_slice(x);
        let mut normed = tape::take(&mut work.normed, self.tokens * self.config.hidden_size);
        self.norm(layer.pre_feedforward_norm.as_ref(), x, &mut normed)?;
        let norm = layer.post_feedforward_norm.as_ref();
        let (block, states) = (&layer.feed_forward, (&normed[..], x));
        self.feed_forward(block, norm, states, &mut tape.feed_forward, taped, work)?;
        work.normed = normed;
        Ok(())
    }

    /// Overwrites `dx`, the gradient of the layer's output, with that of its input, and adds the gradients of
    /// trainable adapters or weights. The content of `tape`, written by `Self::forward`, is consumed.
    ///
    /// With `lowest`, nothing is computed below that group, and `dx` is not valid.
    pub fn backward(
        &self,
        dx: &mut [f32],
        tape: &mut Tape,
        lowest: Option<LinearGroup>,
        gradients: &mut GradientBuffers,
        work: &mut Workspace,
    ) -> Result<()> {
        let (layer, len) = (self.layer, self.tokens * self.config.hidden_size);
        let Tape { x, attention, post_attention_residual: residual, feed_forward } = tape;
        let norm = layer.pre_feedforward_norm.as_ref();
        let mut normed = tape::take(&mut work.normed, len);
        let mut dnormed = tape::take(&mut work.dnormed, len);
        self.norm(norm, residual, &mut normed)?;
        let (block, output_norm) = (&layer.feed_forward, layer.post_feedforward_norm.as_ref());
        let states = (&normed[..], &*dx, &mut dnormed[..]);
        self.feed_forward_back(block, output_norm, states, feed_forward, lowest, gradients, work)?;
        let through_block = lowest.is_none_or(|lowest| lowest <= LinearGroup::ATTENTION_OUTPUT);
        if through_block {
            self.norm_back(norm, residual, &dnormed, dx, gradients, work)?;
        }
        (work.normed, work.dnormed) = (normed, dnormed);
        if through_block {
            let norms = (layer.input_norm.as_ref(), layer.post_attention_norm.as_ref());
            let states = (&x[..], dx);
            self.attention_back(
                &layer.attention,
                norms,
                states,
                attention,
                lowest,
                gradients,
                work,
            )?;
        }
        Ok(())
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
