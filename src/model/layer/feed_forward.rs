//! The feed-forward block of a layer, forward and backward. Another kind of block is another match arm here
//! and a separate file.

use candle_core::Result;

use super::buffers::{LoraTape, TapeBuffer, Workspace, take};
use super::layer_pass::LayerPass;
use crate::model::config::Config;
use crate::model::gradients::GradientBuffers;
use crate::model::layers::{DenseFeedForward, FeedForward, LinearGroup, Norm};
use crate::ops::swiglu;

/// Values of a feed-forward block saved for the backward pass.
#[derive(Debug)]
pub(super) enum FeedForwardTape {
    Dense(DenseTape),
}

impl Default for FeedForwardTape {
    fn default() -> Self {
        Self::Dense(DenseTape::default())
    }
}

impl FeedForwardTape {
    /// Saved values per token in F32, and in a [`TapeBuffer`].
    pub(super) fn width(config: &Config) -> (usize, usize) {
        (0, 2 * config.intermediate_size)
    }
}

#[derive(Debug, Default)]
pub(super) struct DenseTape {
    gate: TapeBuffer,
    up: TapeBuffer,
    gate_up: Vec<LoraTape>,
    down: LoraTape,
    /// The output of `down` before the post-norm, if there is one.
    branch: Vec<f32>,
}

impl LayerPass<'_> {
    /// Adds the block's output for `normed (N, hidden_size)` to the residual stream `x`.
    pub(super) fn feed_forward(
        &self,
        block: &FeedForward,
        output_norm: Option<&Norm>,
        (normed, x): (&[f32], &mut [f32]),
        tape: &mut FeedForwardTape,
        taped: bool,
        work: &mut Workspace,
    ) -> Result<()> {
        match (block, tape) {
            (FeedForward::Dense(dense), FeedForwardTape::Dense(tape)) => {
                self.dense(dense, output_norm, (normed, x), tape, taped, work)
            }
        }
    }

    /// The backward pass of [`Self::feed_forward`]: from `dx`, the gradient of the residual stream after
    /// the block, to that of its input, `dnormed`. With `lowest`, nothing is computed below that group:
    /// `dnormed` is not valid then.
    #[allow(clippy::too_many_arguments)] // a unit, its states, its tape, gradients, buffers
    pub(super) fn feed_forward_back(
        &self,
        block: &FeedForward,
        output_norm: Option<&Norm>,
        (normed, dx, dnormed): (&[f32], &[f32], &mut [f32]),
        tape: &mut FeedForwardTape,
        lowest: Option<LinearGroup>,
        gradients: &mut GradientBuffers,
        work: &mut Workspace,
    ) -> Result<()> {
        match (block, tape) {
            (FeedForward::Dense(dense), FeedForwardTape::Dense(tape)) => {
                let states = (normed, dx, dnormed);
                self.dense_back(dense, output_norm, states, tape, lowest, gradients, work)
            }
        }
    }

    fn dense(
        &self,
        dense: &DenseFeedForward,
        output_norm: Option<&Norm>,
        (normed, x): (&[f32], &mut [f32]),
        tape: &mut DenseTape,
        taped: bool,
        work: &mut Workspace,
    ) -> Result<()> {
        let len = self.tokens * self.config.intermediate_size;
        let DenseTape { gate, up, gate_up, down, branch } = tape;
        let mut gates = take(&mut work.gate, len);
        let mut ups = take(&mut work.up, len);
        let outs = vec![&mut gates[..], &mut ups[..]];
        self.project_all(&dense.gate_up, outs, gate_up, normed, work)?;
        let mut inner = take(&mut work.inner, len);
        swiglu::forward(self.isa, self.config.family.gate, &gates, &ups, &mut inner);
        if taped {
            gate.keep(self.kept_as, &mut gates);
            up.keep(self.kept_as, &mut ups);
        }
        (work.gate, work.up) = (gates, ups);
        self.add_to_residual((&dense.down, down), &inner, output_norm, x, branch, work)?;
        work.inner = inner;
        Ok(())
    }

    #[allow(clippy::too_many_arguments)] // a unit, its states, its tape, gradients, buffers
    fn dense_back(
        &self,
        dense: &DenseFeedForward,
        output_norm: Option<&Norm>,
        (normed, dx, dnormed): (&[f32], &[f32], &mut [f32]),
        tape: &mut DenseTape,
        lowest: Option<LinearGroup>,
        gradients: &mut GradientBuffers,
        work: &mut Workspace,
    ) -> Result<()> {
        let (isa, kind) = (self.isa, self.config.family.gate);
        let len = self.tokens * self.config.intermediate_size;
        let wanted = |group| lowest.is_none_or(|lowest| lowest < group);
        let DenseTape { gate, up, gate_up, down, branch } = tape;
        let (mut gates, mut ups) = (std::mem::take(&mut work.gate), std::mem::take(&mut work.up));
        gate.give(self.kept_as, &mut gates);
        up.give(self.kept_as, &mut ups);
        let mut inner = take(&mut work.inner, len);
        let mut dinner = take(&mut work.dinner, len);
        let (mut scaled, mut dbranch) =
            (std::mem::take(&mut work.branch), std::mem::take(&mut work.dbranch));

        swiglu::forward(isa, kind, &gates, &ups, &mut inner);
        let buffers = (&mut scaled, &mut dbranch);
        let dy = self.residual_back(output_norm, branch, dx, buffers, gradients, work)?;
        let dinner_wanted = wanted(LinearGroup::DOWN).then_some(&mut dinner[..]);
        let dys = [(&dense.down, dy, &*down)];
        self.project_back(&dys, &inner, dinner_wanted, gradients, work)?;
        if wanted(LinearGroup::DOWN) {
            if dense.down.gradient().is_some() {
                // Rounds differently; full training keeps this form so that its results stay bit-identical.
                swiglu::backward_recompute(isa, kind, &mut gates, &mut ups, &mut dinner);
            } else {
                swiglu::backward(isa, kind, &mut gates, &mut ups, &dinner);
            }
            let below = wanted(LinearGroup::GATE_UP).then_some(dnormed);
            let dys = [&gates[..], &ups[..]];
            self.project_all_back(&dense.gate_up, &dys, gate_up, normed, below, gradients, work)?;
        }
        (work.gate, work.up, work.inner, work.dinner) = (gates, ups, inner, dinner);
        (work.branch, work.dbranch) = (scaled, dbranch);
        Ok(())
    }
}
