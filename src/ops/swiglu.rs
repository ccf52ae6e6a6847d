//! The gated activations of feed-forward layers (Shazeer 2020): Llama's, and Gemma's.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::cpu::{Values, exp, par_for_each, values};
use super::{Compute, OpForm};
use crate::isa::{Isa, multiversion};

/// Values per task.
const CHUNK: usize = 1 << 12;
/// Cost per element, in multiply-adds.
const WORK: usize = 16;

/// The activation function of the gate.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Gate {
    /// `silu(g) = g / (1 + e⁻ᵍ)`.
    #[default]
    Silu,
    /// `gelu(g) = g / 2 · (1 + tanh(sqrt(2 / π) (g + 0.044715 g³)))`, GELU by its approximation
    /// (Hendrycks and Gimpel 2016).
    GeluTanh,
}

/// `silu(gate) · up`, element by element.
///
/// Shapes: `gate` and `up` the same, F32 → the same shape.
pub fn swiglu(gate: &Tensor, up: &Tensor, compute: Compute) -> Result<Tensor> {
    gated(Gate::Silu, gate, up, compute)
}

/// `kind(gate) · up`, element by element.
///
/// Shapes: `gate` and `up` the same, F32 → the same shape.
pub fn gated(kind: Gate, gate: &Tensor, up: &Tensor, compute: Compute) -> Result<Tensor> {
    match compute.op_form() {
        OpForm::Kernel => gate.contiguous()?.apply_op2(&up.contiguous()?, Gated { kind }),
        OpForm::Portable => match kind {
            Gate::Silu => gate.silu()?.mul(up),
            Gate::GeluTanh => gate.gelu()?.mul(up),
        },
    }
}

/// `y = kind(gate) · up`, all of the same length.
pub(crate) fn forward(isa: Isa, kind: Gate, gate: &[f32], up: &[f32], y: &mut [f32]) {
    let (work, inputs) = (WORK * y.len(), gate.chunks(CHUNK).zip(up.chunks(CHUNK)));
    let chunks = y.chunks_mut(CHUNK).zip(inputs);
    par_for_each(chunks.collect(), work, |(y, (gate, up))| match kind {
        Gate::Silu => forward_chunk(isa, gate, up, y),
        Gate::GeluTanh => gelu_forward_chunk(isa, gate, up, y),
    });
}

/// Overwrites `gate` and `up` with their gradients. With `s = sigmoid(z)`, and `z = g` for silu or
/// `z = 2 sqrt(2 / π) (g + 0.044715 g³)` for gelu:
/// `dg = dy · u · s (1 + g z' (1 - s))`, `du = dy · g s`.
pub(crate) fn backward(isa: Isa, kind: Gate, gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    let both = gate.par_chunks_mut(CHUNK).zip(up.par_chunks_mut(CHUNK));
    let chunks = both.zip(dy.par_chunks(CHUNK));
    chunks.for_each(|((gate, up), dy)| match kind {
        Gate::Silu => backward_chunk(isa, gate, up, dy),
        Gate::GeluTanh => gelu_backward_chunk(isa, gate, up, dy),
    });
}

/// [`backward`] that also recomputes the forward output into `dy`. It rounds `du` as `dy · (g s)`.
pub(crate) fn backward_recompute(
    isa: Isa,
    kind: Gate,
    gate: &mut [f32],
    up: &mut [f32],
    dy: &mut [f32],
) {
    let both = gate.par_chunks_mut(CHUNK).zip(up.par_chunks_mut(CHUNK));
    let chunks = both.zip(dy.par_chunks_mut(CHUNK));
    chunks.for_each(|((gate, up), dy)| match kind {
        Gate::Silu => backward_recompute_chunk(isa, gate, up, dy),
        Gate::GeluTanh => gelu_backward_recompute_chunk(isa, gate, up, dy),
    });
}

multiversion! {
    fn forward_chunk(isa; gate: &[f32], up: &[f32], y: &mut [f32]) {
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            *y = g * sigmoid(*g) * u;
        }
    }

    fn backward_chunk(isa; gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
        for ((g, u), dy) in gate.iter_mut().zip(up).zip(dy) {
            let s = sigmoid(*g);
            let du = dy * *g * s;
            *g = dy * *u * s * (1.0 + *g * (1.0 - s));
            *u = du;
        }
    }

    fn gelu_forward_chunk(isa; gate: &[f32], up: &[f32], y: &mut [f32]) {
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            *y = g * sigmoid(gelu_inner(*g).0) * u;
        }
    }

    fn gelu_backward_chunk(isa; gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
        for ((g, u), dy) in gate.iter_mut().zip(up).zip(dy) {
            let (z, slope) = gelu_inner(*g);
            let s = sigmoid(z);
            let du = dy * *g * s;
            *g = dy * *u * s * (1.0 + *g * slope * (1.0 - s));
            *u = du;
        }
    }

    fn backward_recompute_chunk(isa; gate: &mut [f32], up: &mut [f32], dy: &mut [f32]) {
        for ((g, u), dy) in gate.iter_mut().zip(up).zip(dy) {
            let s = sigmoid(*g);
            let silu = *g * s;
            let (dg, y) = (*dy * *u * s * (1.0 + *g * (1.0 - s)), silu * *u);
            *u = *dy * silu;
            *g = dg;
            *dy = y;
        }
    }

    fn gelu_backward_recompute_chunk(isa; gate: &mut [f32], up: &mut [f32], dy: &mut [f32]) {
        for ((g, u), dy) in gate.iter_mut().zip(up).zip(dy) {
            let (z, slope) = gelu_inner(*g);
            let s = sigmoid(z);
            let gelu = *g * s;
            let (dg, y) = (*dy * *u * s * (1.0 + *g * slope * (1.0 - s)), gelu * *u);
            *u = *dy * gelu;
            *g = dg;
            *dy = y;
        }
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `2 sqrt(2 / π) (g + 0.044715 g³)` and its derivative: `(1 + tanh(x)) / 2 = sigmoid(2x)`.
#[inline(always)]
fn gelu_inner(g: f32) -> (f32, f32) {
    const LINEAR: f32 = 1.595_769;
    const CUBIC: f32 = 0.044_715 * LINEAR;
    (g * (LINEAR + CUBIC * g * g), LINEAR + 3.0 * CUBIC * g * g)
}

struct Gated {
    kind: Gate,
}

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (values(gate, gate_layout)?, values(up, up_layout)?);
        if gate_layout.dims() != up_layout.dims() {
            let (gate, up) = (gate_layout.dims(), up_layout.dims());
            candle_core::bail!("a gated product: gate is {gate:?}, up is {up:?}");
        }
        let mut y = vec![0f32; gate.len()];
        forward(Isa::current(), self.kind, gate, up, &mut y);
        Ok((CpuStorage::F32(y), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (mut dg, mut du) = (Values::of(gate)?.to_vec(), Values::of(up)?.to_vec());
        backward(Isa::current(), self.kind, &mut dg, &mut du, &Values::of(&dy)?);
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        Ok((Some(tensor(dg, gate)?), Some(tensor(du, up)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{finite_differences, normal, parity};
    use super::*;

    #[test]
    fn parity_and_differences() {
        let inputs = [(normal(1, &[7, 50]) * 4.0).unwrap(), normal(2, &[7, 50])];
        for kind in [Gate::Silu, Gate::GeluTanh] {
            let run = |compute| move |t: &[Tensor]| gated(kind, &t[0], &t[1], compute);
            parity(&inputs, run(Compute::F32), run(Compute::REFERENCE));
            finite_differences(&inputs, run(Compute::F32));
        }
    }

    #[test]
    fn backward_recompute_returns_the_output() {
        let values = |seed| normal(seed, &[CHUNK + 5]).to_vec1::<f32>().unwrap();
        let (gate, up, dy) = (values(1), values(2), values(3));
        for isa in Isa::available() {
            for kind in [Gate::Silu, Gate::GeluTanh] {
                let mut y = vec![0.0; gate.len()];
                forward(isa, kind, &gate, &up, &mut y);
                let (mut dg, mut du) = (gate.clone(), up.clone());
                backward(isa, kind, &mut dg, &mut du, &dy);
                let (mut again_g, mut again_u, mut again_y) =
                    (gate.clone(), up.clone(), dy.clone());
                backward_recompute(isa, kind, &mut again_g, &mut again_u, &mut again_y);
                for (found, needed) in [(again_y, y), (again_g, dg), (again_u, du)] {
                    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6 * b.abs().max(1.0);
                    assert!(found.iter().zip(&needed).all(near), "{kind:?} {}", isa.name());
                }
            }
        }
    }
}
