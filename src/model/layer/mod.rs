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
//! Lowest first: `layer_pass` (what all units of a layer are computed with) and `buffers`; `update` (the
//! updates of adapters); `linear`; `residual` (norms and the residual stream); `attention` and
//! `feed_forward`; `tape` (what a layer keeps); and here the layer. `reference` has the reference form.

mod attention;
mod buffers;
mod elementwise;
mod feed_forward;
mod layer_pass;
mod linear;
pub(super) mod reference;
mod residual;
mod tape;
mod update;

use candle_core::Result;

use super::cache::PanelCache;
use super::gradients::GradientBuffers;
use super::layers::{Layer, LinearGroup};
pub use buffers::Workspace;
use buffers::take;
pub(super) use layer_pass::LayerPass;
pub use tape::{AdapterSizes, Tape};

impl LayerPass<'_> {
    /// Turns `x (N, hidden_size)` into the layer's output. `taped` says whether `tape` is for a backward
    /// pass (its `x` is the caller's to keep). With a cache, attends to it.
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
        let mut normed = take(&mut work.normed, self.tokens * self.config.hidden_size);
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
    pub(super) fn backward(
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
        let mut normed = take(&mut work.normed, len);
        let mut dnormed = take(&mut work.dnormed, len);
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
