//! Norms and the residual stream, forward and backward.

use candle_core::Result;

use super::buffers::{LoraTape, Workspace};
use super::elementwise::add;
use super::layer_pass::LayerPass;
use super::linear::Accumulate;
use crate::model::gradients::GradientBuffers;
use crate::model::layers::{Linear, Norm};
use crate::ops::rms_norm;

impl LayerPass<'_> {
    /// `y = norm(x)`, or a copy without a norm. `x` is rows of the norm's width.
    pub(super) fn norm(&self, norm: Option<&Norm>, x: &[f32], y: &mut [f32]) -> Result<()> {
        let Some(norm) = norm else {
            y.copy_from_slice(x);
            return Ok(());
        };
        let eps = self.config.rms_norm_eps as f32;
        norm.with_factors(|w| rms_norm::forward(self.isa, x, w, eps, y))
    }

    /// The backward pass of [`Self::norm`]: adds the gradient of `x` to `dx`, and that of a trainable
    /// weight to its own.
    pub(super) fn norm_back(
        &self,
        norm: Option<&Norm>,
        x: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        gradients: &mut GradientBuffers,
        work: &mut Workspace,
    ) -> Result<()> {
        let Some(norm) = norm else {
            add(dx, dy, 1.0);
            return Ok(());
        };
        let (isa, eps) = (self.isa, self.config.rms_norm_eps as f32);
        norm.with_factors(|w| match norm.weight.gradient {
            None => rms_norm::backward(isa, x, w, eps, dy, dx),
            Some(index) => {
                let (dw, shares) = (&mut gradients.gradients[index], &mut work.norm_shares);
                rms_norm::backward_with_weight(isa, x, w, eps, dy, dx, dw, shares);
            }
        })
    }

    /// Adds the output of `linear` for `inner` to the residual stream `x`, after the norm and the
    /// multiplier that some families have. With a norm, its input is saved in `branch`.
    pub(super) fn add_to_residual(
        &self,
        (linear, tape): (&Linear, &mut LoraTape),
        inner: &[f32],
        norm: Option<&Norm>,
        x: &mut [f32],
        branch: &mut Vec<f32>,
        work: &mut Workspace,
    ) -> Result<()> {
        let by = self.config.variation.residual_multiplier as f32;
        if norm.is_none() && by == 1.0 {
            return self.project(vec![(linear, x, tape)], inner, Accumulate::Add, work);
        }
        branch.resize(x.len(), 0.0);
        let out = vec![(linear, &mut branch[..], tape)];
        self.project(out, inner, Accumulate::Overwrite, work)?;
        let mut normed = std::mem::take(&mut work.branch);
        normed.resize(x.len(), 0.0);
        self.norm(norm, branch, &mut normed)?;
        add(x, &normed, by);
        work.branch = normed;
        Ok(())
    }

    /// The backward pass of [`Self::add_to_residual`]: the gradient of the output of its linear layer, in
    /// one of two buffers, or `dx` itself.
    pub(super) fn residual_back<'d>(
        &self,
        norm: Option<&Norm>,
        branch: &[f32],
        dx: &'d [f32],
        (scaled, dbranch): (&'d mut Vec<f32>, &'d mut Vec<f32>),
        gradients: &mut GradientBuffers,
        work: &mut Workspace,
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
        self.norm_back(norm, branch, scaled, dbranch, gradients, work)?;
        Ok(dbranch)
    }
}
