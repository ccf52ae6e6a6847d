//! The gated activation of Llama's feed-forward layer (Shazeer 2020).

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::Compute;
use super::cpu::{Values, exp, values};

/// Values a thread takes at a time.
const CHUNK: usize = 4096;

/// `silu(gate) · up`, element by element, with `silu(g) = g / (1 + e⁻ᵍ)`.
///
/// Shapes: `gate` and `up` the same, F32 → the same shape.
pub fn swiglu(gate: &Tensor, up: &Tensor, compute: Compute) -> Result<Tensor> {
    match compute {
        Compute::F32 => gate.contiguous()?.apply_op2(&up.contiguous()?, SwiGlu),
        Compute::Portable => gate.silu()?.mul(up),
    }
}

struct SwiGlu;

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
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
            candle_core::bail!("swiglu: gate is {gate:?}, up is {up:?}");
        }
        let mut y = vec![0f32; gate.len()];
        let inputs = gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK));
        y.par_chunks_mut(CHUNK).zip(inputs).for_each(|(y, (gate, up))| {
            for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
                *y = g * sigmoid(*g) * u;
            }
        });
        Ok((CpuStorage::F32(y), gate_layout.shape().clone()))
    }

    /// With `s = sigmoid(g)`: `dg = dy · u · s (1 + g (1 - s))`, `du = dy · g s`.
    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (g, u, dy) = (Values::of(gate)?, Values::of(up)?, Values::of(&dy)?);
        let (g, u, dy) = (&*g, &*u, &*dy);
        let (mut dg, mut du) = (vec![0f32; g.len()], vec![0f32; g.len()]);
        let inputs = g.par_chunks(CHUNK).zip(u.par_chunks(CHUNK)).zip(dy.par_chunks(CHUNK));
        let outputs = dg.par_chunks_mut(CHUNK).zip(du.par_chunks_mut(CHUNK));
        outputs.zip(inputs).for_each(|((dg, du), ((g, u), dy))| {
            for i in 0..g.len() {
                let s = sigmoid(g[i]);
                dg[i] = dy[i] * u[i] * s * (1.0 + g[i] * (1.0 - s));
                du[i] = dy[i] * g[i] * s;
            }
        });
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
        let run = |compute| move |t: &[Tensor]| swiglu(&t[0], &t[1], compute);
        parity(&inputs, run(Compute::F32), run(Compute::Portable));
        finite_differences(&inputs, run(Compute::F32));
    }
}
