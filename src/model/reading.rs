//! What is read from the last layer's output, and the backward pass to it, by hand over plain buffers.
//!
//! This is the fast form of [`Decoder::final_norm`] with [`Decoder::log_probs`] and with a score
//! head; a parity test holds them together, gradients too. Only the rows that something is read
//! from meet the norm and the head.

use candle_core::Result;
use rayon::prelude::*;

use super::adapters::ActiveAdapter;
use super::config::Config;
use super::decoder::Decoder;
use super::gradients::GradientBuffers;
use crate::isa::Isa;
use crate::ops::gemm::PanelType;
use crate::ops::linear_cross_entropy::{Distributions, TargetStatsMut};
use crate::ops::{Values, linear_cross_entropy, rms_norm};

/// Rows of hidden states on their way to a head. Its buffers are used again by the next reading.
#[derive(Debug, Default)]
pub struct Reading {
    /// Which rows of N, `(M)`; one may be read several times.
    rows: Vec<u32>,
    /// Those rows `(M, hidden_size)`, and behind the norm.
    x: Vec<f32>,
    normed: Vec<f32>,
    /// The gradient of what is read to `normed`, or to `x`.
    dnormed: Vec<f32>,
    dx: Vec<f32>,
    targets: Vec<u32>,
    logps: Vec<f32>,
    entropies: Vec<f32>,
    is_argmax: Vec<bool>,
}

impl Reading {
    /// Bytes of its rows and their gradients.
    pub fn bytes(config: &Config, rows: usize) -> usize {
        4 * rows * config.hidden_size * size_of::<f32>()
    }

    /// The distributions whose log-probs were read last.
    pub fn distributions(&self) -> Distributions<'_> {
        Distributions { entropies: &self.entropies, is_argmax: &self.is_argmax }
    }
}

impl Decoder {
    /// Log-probs of `targets`, each the row of `x (N, hidden_size)` that predicts it and a token, of
    /// logits divided by `temperature`, where all rows use the same: `(M)`, in nats. With `to_learn`, [`Self::log_probs_backward`] may
    /// follow.
    ///
    /// # Errors
    /// If a target is outside the vocabulary.
    ///
    /// # Panics
    /// If `x` has no such row.
    pub fn read_log_probs<'r>(
        &self,
        x: &[f32],
        targets: &[(u32, u32)],
        temperature: f64,
        active: &[ActiveAdapter],
        to_learn: bool,
        reading: &'r mut Reading,
    ) -> Result<&'r [f32]> {
        reading.targets.clear();
        reading.targets.extend(targets.iter().map(|&(_, token)| token));
        linear_cross_entropy::check_targets(&reading.targets, &self.head)?;
        self.gather(x, targets.iter().map(|&(row, _)| row), reading)?;
        scale(&mut reading.normed, self.divided_before_head(temperature));
        let Reading { normed, dnormed, targets, logps, entropies, is_argmax, .. } = reading;
        logps.resize(targets.len(), 0.0);
        entropies.resize(targets.len(), 0.0);
        is_argmax.resize(targets.len(), false);
        let found = TargetStatsMut { logps, entropies, is_argmax };
        dnormed.resize(normed.len(), 0.0);
        let cap = self.config.logit_softcap(temperature);
        if let Some(head) = self.adapted_head(active)? {
            head.forward(self.panels(), normed, (targets, cap), found);
            return Ok(&reading.logps);
        }
        let (panels, head) = (self.panels(), &self.head);
        let gradient = to_learn.then_some(&mut dnormed[..]);
        linear_cross_entropy::forward(panels, normed, head, targets, cap, found, gradient);
        Ok(&reading.logps)
    }

    /// Adds to `dx (N, hidden_size)` what follows from the gradient `dlogps (M)` of the log-probs
    /// that were read last, and to `sink` what follows for trainable parts of the head. `active` is what
    /// they were read with.
    pub fn log_probs_backward(
        &self,
        dlogps: &[f32],
        temperature: f64,
        active: &[ActiveAdapter],
        reading: &mut Reading,
        dx: &mut [f32],
        sink: &mut GradientBuffers,
    ) -> Result<()> {
        let width = self.config.hidden_size;
        if let Some(head) = self.adapted_head(active)? {
            let Reading { normed, dnormed, targets, .. } = reading;
            let cap = self.config.logit_softcap(temperature);
            head.backward(self.panels(), normed, (targets, dlogps, cap), dnormed, sink);
        } else {
            let rows = reading.dnormed.par_chunks_exact_mut(width).zip(dlogps);
            rows.for_each(|(row, d)| row.iter_mut().for_each(|x| *x *= d));
        }
        scale(&mut reading.dnormed, self.divided_before_head(temperature));
        self.scatter(reading, dx)
    }

    /// The scores that `head (hidden_size)` gives chosen rows of `x (N, hidden_size)`: `(M)`.
    ///
    /// # Panics
    /// If `x` has no such row.
    pub fn read_scores(
        &self,
        x: &[f32],
        rows: &[u32],
        head: &[f32],
        reading: &mut Reading,
    ) -> Result<Vec<f32>> {
        self.gather(x, rows.iter().copied(), reading)?;
        let states = reading.normed.par_chunks_exact(head.len());
        Ok(states.map(|state| state.iter().zip(head).map(|(x, w)| x * w).sum()).collect())
    }

    /// Adds to `dx (N, hidden_size)` and to `dhead (hidden_size)` what follows from the gradient
    /// `dscores (M)` of the scores that were read last.
    pub fn scores_backward(
        &self,
        dscores: &[f32],
        head: &[f32],
        reading: &mut Reading,
        dx: &mut [f32],
        dhead: &mut [f32],
    ) -> Result<()> {
        for (state, d) in reading.normed.chunks_exact(head.len()).zip(dscores) {
            dhead.iter_mut().zip(state).for_each(|(sum, x)| *sum += d * x);
        }
        reading.dnormed.resize(reading.normed.len(), 0.0);
        let rows = reading.dnormed.par_chunks_exact_mut(head.len()).zip(dscores);
        rows.for_each(|(row, d)| row.iter_mut().zip(head).for_each(|(dx, w)| *dx = d * w));
        self.scatter(reading, dx)
    }

    /// The panels of forward products and of the products of gradients.
    fn panels(&self) -> (PanelType, PanelType) {
        self.compute.precision.panels()
    }

    /// What hidden states are divided by before the head, for logits divided by `temperature`: where
    /// there is a cap, that comes behind it.
    fn divided_before_head(&self, temperature: f64) -> f64 {
        let capped = self.config.logit_softcap(temperature).is_some();
        let temperature = if capped { 1.0 } else { temperature };
        temperature / self.config.variation.logits_multiplier
    }

    /// Takes rows of `x` and norms them.
    fn gather(
        &self,
        x: &[f32],
        rows: impl Iterator<Item = u32>,
        reading: &mut Reading,
    ) -> Result<()> {
        let (width, eps) = (self.config.hidden_size, self.config.rms_norm_eps as f32);
        reading.rows.clear();
        reading.rows.extend(rows);
        reading.x.clear();
        for &row in &reading.rows {
            reading.x.extend_from_slice(&x[row as usize * width..][..width]);
        }
        reading.normed.resize(reading.x.len(), 0.0);
        let norm = Values::of(&self.norm)?;
        rms_norm::forward(Isa::current(), &reading.x, &norm, eps, &mut reading.normed);
        Ok(())
    }

    /// Adds the gradients of the rows that were taken to theirs, in the order of the rows.
    fn scatter(&self, reading: &mut Reading, dx: &mut [f32]) -> Result<()> {
        let (width, eps) = (self.config.hidden_size, self.config.rms_norm_eps as f32);
        let norm = Values::of(&self.norm)?;
        reading.dx.clear();
        reading.dx.resize(reading.x.len(), 0.0);
        let Reading { rows, x, dnormed, dx: of_rows, .. } = reading;
        rms_norm::backward(Isa::current(), x, &norm, eps, dnormed, of_rows);
        for (&row, from) in rows.iter().zip(of_rows.chunks_exact(width)) {
            let to = &mut dx[row as usize * width..][..width];
            to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        }
        Ok(())
    }
}

/// Divides by what hidden states are divided by.
fn scale(values: &mut [f32], temperature: f64) {
    if temperature != 1.0 {
        let factor = (1.0 / temperature) as f32;
        values.iter_mut().for_each(|value| *value *= factor);
    }
}
