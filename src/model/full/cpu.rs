//! A micro-batch in which all weights train, by the CPU's kernels.

use std::collections::HashMap;

use candle_core::Result;
use rayon::prelude::*;

use super::{EMBEDDING, FullModel};
use crate::data::Batch;
use crate::isa::Isa;
use crate::model::adapters::Adapters;
use crate::model::config::Config;
use crate::model::gradients::GradientBuffers;
use crate::model::layer::{LayerPass, Tape, Workspace};
use crate::model::pass::{Pass, Rows};
use crate::ops::linear_cross_entropy::{LossGrad, loss_and_gradients};
use crate::ops::{Values, rms_norm};

/// Buffers of a step, reused by the next.
#[derive(Debug, Default)]
pub struct FullBuffers {
    work: Workspace,
    /// By layer; of recomputed ones only the input is in use.
    tapes: Vec<Tape>,
    /// The tape of layers that keep none.
    scratch: Tape,
    /// The residual stream and its gradient, `(N, hidden_size)`.
    x: Vec<f32>,
    dx: Vec<f32>,
    read: TargetRows,
}

impl FullBuffers {
    /// Bytes of the buffers of a micro-batch of `tokens` tokens.
    pub fn bytes(config: &Config, tokens: usize, kept_layers: usize) -> usize {
        let layers = config.num_hidden_layers;
        let kept = kept_layers.min(layers);
        let tape = Tape::trainable_bytes(config, tokens);
        let streams = tokens * config.hidden_size * size_of::<f32>();
        let tapes = kept * tape + (layers - kept) * streams;
        let scratch = if kept < layers { tape } else { 0 };
        // The stream, its gradient, and the head's rows, beside what layers share.
        tapes + scratch + 6 * streams + Tape::trainable_shared_bytes(config, tokens)
    }
}

/// The rows that predict something, on their way to the head and back.
#[derive(Debug, Default)]
struct TargetRows {
    /// `(M, hidden_size)`, behind the norm, and the gradients.
    x: Vec<f32>,
    normed: Vec<f32>,
    dnormed: Vec<f32>,
    dx: Vec<f32>,
    targets: Vec<u32>,
}

/// A micro-batch on its way through a model.
struct FullPass<'a> {
    model: &'a FullModel,
    batch: &'a Batch,
    pass: &'a Pass<'a>,
    /// The uppermost layers whose tapes are kept for the backward pass.
    kept_layers: usize,
}

impl FullModel {
    /// One micro-batch by the CPU's kernels: the sum of `-log p(target)` over its targets, in nats. The
    /// gradients of that sum times `scale` (1 / the count of the whole step) are added to `gradients`, in the
    /// order of the parameters.
    ///
    /// Layers below the uppermost `kept_layers` keep only their input in the forward pass and are
    /// recomputed in the backward pass.
    ///
    /// # Errors
    /// If a token or target is outside the vocabulary, or the rows do not part the tokens.
    pub fn accumulate(
        &self,
        batch: &Batch,
        scale: f64,
        kept_layers: usize,
        gradients: &mut [Vec<f32>],
        buffers: &mut FullBuffers,
    ) -> Result<f64> {
        self.check(batch)?;
        if batch.targets.is_empty() {
            return Ok(0.0);
        }
        let rows = Rows {
            tokens: batch.tokens.clone(),
            positions: batch.positions.clone(),
            segments: batch.segments.clone().into(),
        };
        let pass = &Pass::new(&self.config, &self.inv_freq, &rows, Adapters::NONE, None);
        let step = FullPass { model: self, batch, pass, kept_layers };
        step.forward(buffers)?;
        let loss = step.loss(scale, gradients, buffers)?;
        step.loss_backward(gradients, buffers)?;
        step.backward(gradients, buffers)?;
        Ok(loss)
    }
}

impl FullPass<'_> {
    fn layer(&self, index: usize) -> LayerPass<'_> {
        let FullModel { config, layers, compute, .. } = self.model;
        LayerPass::new(config, &layers[index], self.pass, compute.precision)
    }

    fn keeps(&self, index: usize) -> bool {
        index >= self.model.layers.len().saturating_sub(self.kept_layers)
    }

    /// Embedding and layers: leaves the last layer's output in `x`.
    fn forward(&self, buffers: &mut FullBuffers) -> Result<()> {
        let FullModel { config, parameters, layers, .. } = self.model;
        let FullBuffers { work, tapes, scratch, x, .. } = buffers;
        let width = config.hidden_size;
        embed(&Values::of(&parameters[EMBEDDING])?, width, &self.batch.tokens, x);
        scale_values(x, config.variation.embedding_multiplier);
        tapes.resize_with(layers.len().max(tapes.len()), Tape::default);
        for (index, tape) in tapes[..layers.len()].iter_mut().enumerate() {
            tape.x.clear();
            tape.x.extend_from_slice(x);
            let keeps = self.keeps(index);
            let tape = if keeps { tape } else { &mut *scratch };
            self.layer(index).forward(x, tape, keeps, work, None)?;
        }
        Ok(())
    }

    /// The summed loss at the head: leaves its gradient to the rows that it reads in `dnormed`, and adds
    /// that of the head.
    fn loss(
        &self,
        scale: f64,
        gradients: &mut [Vec<f32>],
        buffers: &mut FullBuffers,
    ) -> Result<f64> {
        let FullModel { config, parameters, norm, head, compute, .. } = self.model;
        let FullBuffers { x, read, .. } = buffers;
        let (width, eps) = (config.hidden_size, config.rms_norm_eps as f32);
        let targets = &self.batch.targets;
        read.targets.clear();
        read.targets.extend(targets.iter().map(|&(_, token)| token));
        for buffer in [&mut read.x, &mut read.normed, &mut read.dnormed] {
            buffer.resize(targets.len() * width, 0.0);
        }
        let rows = read.x.par_chunks_exact_mut(width).with_min_len(64).zip(targets);
        rows.for_each(|(to, &(row, _))| to.copy_from_slice(&x[row as usize * width..][..width]));
        let isa = Isa::current();
        norm.with_factors(|w| rms_norm::forward(isa, &read.x, w, eps, &mut read.normed))?;
        scale_values(&mut read.normed, config.variation.logits_multiplier);
        let weight = Values::of(&parameters[*head])?;
        let grad = LossGrad { x: &mut read.dnormed, head: &mut gradients[*head] };
        let targets_and_cap = (&read.targets[..], config.logit_softcap(1.0));
        let panels = compute.precision.panels();
        Ok(loss_and_gradients(panels, &read.normed, &weight, targets_and_cap, scale as f32, grad))
    }

    /// The backward pass through the final norm: leaves the gradient of the last layer's output in `dx`.
    fn loss_backward(&self, gradients: &mut [Vec<f32>], buffers: &mut FullBuffers) -> Result<()> {
        let FullModel { config, norm, .. } = self.model;
        let FullBuffers { work, x, dx, read, .. } = buffers;
        let (width, eps) = (config.hidden_size, config.rms_norm_eps as f32);
        scale_values(&mut read.dnormed, config.variation.logits_multiplier);
        for (buffer, length) in [(&mut *dx, x.len()), (&mut read.dx, read.x.len())] {
            buffer.clear();
            buffer.resize(length, 0.0);
        }
        let index = norm.weight.gradient.expect("all parameters train");
        let (dw, shares) = (&mut gradients[index], &mut work.norm_shares);
        norm.with_factors(|w| {
            let (x, dy, dx) = (&read.x, &read.dnormed, &mut read.dx);
            rms_norm::backward_with_weight(Isa::current(), x, w, eps, dy, dx, dw, shares);
        })?;
        for (&(row, _), from) in self.batch.targets.iter().zip(read.dx.chunks_exact(width)) {
            let to = &mut dx[row as usize * width..][..width];
            to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        }
        Ok(())
    }

    /// The backward pass through layers and embedding.
    fn backward(&self, gradients: &mut [Vec<f32>], buffers: &mut FullBuffers) -> Result<()> {
        let config = &self.model.config;
        let FullBuffers { work, tapes, scratch, x, dx, .. } = buffers;
        let places = HashMap::new();
        for index in (0..self.model.layers.len()).rev() {
            let mut tape = &mut tapes[index];
            if !self.keeps(index) {
                std::mem::swap(&mut scratch.x, &mut tape.x);
                x.copy_from_slice(&scratch.x);
                self.layer(index).forward(x, scratch, true, work, None)?;
                tape = scratch;
            }
            let mut sink = GradientBuffers { places: &places, gradients: &mut *gradients };
            self.layer(index).backward(dx, tape, None, &mut sink, work)?;
        }
        scale_values(dx, config.variation.embedding_multiplier);
        let gradient = &mut gradients[EMBEDDING];
        embed_back(&self.batch.tokens, dx, config.hidden_size, gradient);
        Ok(())
    }
}

/// The rows of `embedding (V, width)` that `tokens` name: `x (N, width)`.
fn embed(embedding: &[f32], width: usize, tokens: &[u32], x: &mut Vec<f32>) {
    x.resize(tokens.len() * width, 0.0);
    let rows = x.par_chunks_exact_mut(width).with_min_len(64).zip(tokens);
    rows.for_each(|(to, &token)| {
        to.copy_from_slice(&embedding[token as usize * width..][..width]);
    });
}

fn scale_values(values: &mut [f32], factor: f64) {
    if factor != 1.0 {
        values.iter_mut().for_each(|value| *value *= factor as f32);
    }
}

/// Rows of the embedding whose gradient a thread sums.
const EMBEDDING_ROWS: usize = 512;

/// Adds the gradient `dx (N, width)` of embedded tokens to that of the embedding `(V, width)`.
fn embed_back(tokens: &[u32], dx: &[f32], width: usize, gradient: &mut [f32]) {
    let parts = gradient.par_chunks_mut(EMBEDDING_ROWS * width).enumerate();
    parts.for_each(|(part, gradient)| {
        let first = part * EMBEDDING_ROWS;
        for (&token, dx) in tokens.iter().zip(dx.chunks_exact(width)) {
            let Some(row) = (token as usize).checked_sub(first) else { continue };
            if let Some(sums) = gradient.get_mut(row * width..(row + 1) * width) {
                sums.iter_mut().zip(dx).for_each(|(sum, d)| *sum += d);
            }
        }
    });
}
