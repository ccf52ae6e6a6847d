//! Root mean square normalization (Zhang and Sennrich 2019), differentiable in input and weight.

use candle_core::{CpuStorage, CustomOp2, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::cpu::{Values, par_for_each, values};
use super::{Compute, OpForm};
use crate::isa::{Isa, multiversion};

/// Rows per task.
const ROWS: usize = 32;
/// Cost per value, in multiply-adds.
const WORK: usize = 2;

/// `y = x / sqrt(mean(x²) + eps) · w` over the last dimension.
///
/// Shapes: `x (.., H)` F32, `w (H)` F32 → `y (.., H)` F32.
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64, compute: Compute) -> Result<Tensor> {
    match compute.op_form() {
        OpForm::Kernel => x.contiguous()?.apply_op2(w, RmsNorm { eps: eps as f32 }),
        OpForm::Portable => {
            let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
            x.broadcast_div(&(mean_square + eps)?.sqrt()?)?.broadcast_mul(w)
        }
    }
}

/// The norm of each row: `x (N, H)`, `w (H)` → `y (N, H)`.
pub(crate) fn forward(isa: Isa, x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    let chunk = (ROWS * w.len()).max(1);
    let rows = y.chunks_mut(chunk).zip(x.chunks(chunk));
    par_for_each(rows.collect(), WORK * x.len(), |(y, x)| forward_rows(isa, x, w, eps, y));
}

/// Adds the gradient to `dx (N, H)`: with `r = 1 / rms(x)` and `g = w · dy` it is
/// `r (g - x r² mean(x · g))`.
pub(crate) fn backward(isa: Isa, x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    let chunk = (ROWS * w.len()).max(1);
    let rows = dx.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).zip(dy.par_chunks(chunk));
    rows.for_each(|((dx, x), dy)| backward_rows(isa, x, w, eps, dy, dx));
}

/// Rows per partial sum of the weight gradient.
const PARTIAL_ROWS: usize = 128;

/// [`backward`] that also adds the weight gradient to `dw (H)`: partial sums over chunks of rows, added in
/// order. `partials` is scratch for the partial sums.
#[allow(clippy::too_many_arguments)] // two gradients and scratch
pub(crate) fn backward_with_weight(
    isa: Isa,
    x: &[f32],
    w: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    dw: &mut [f32],
    partials: &mut Vec<f32>,
) {
    let (width, chunk) = (w.len().max(1), (PARTIAL_ROWS * w.len()).max(1));
    partials.clear();
    partials.resize(x.len().div_ceil(chunk) * width, 0.0);
    let rows = dx.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).zip(dy.par_chunks(chunk));
    rows.zip(partials.par_chunks_mut(width)).for_each(|(((dx, x), dy), partial)| {
        backward_rows(isa, x, w, eps, dy, dx);
        weight_gradient(isa, x, eps, dy, partial);
    });
    for partial in partials.chunks_exact(width) {
        dw.iter_mut().zip(partial).for_each(|(sum, partial)| *sum += partial);
    }
}

multiversion! {
    fn forward_rows(isa; x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
        for (y, x) in y.chunks_exact_mut(w.len()).zip(x.chunks_exact(w.len())) {
            let r = inverse_rms(x, eps);
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = x * r * w;
            }
        }
    }

    fn backward_rows(isa; x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
        let rows = x.chunks_exact(w.len()).zip(dy.chunks_exact(w.len()));
        for (dx, (x, dy)) in dx.chunks_exact_mut(w.len()).zip(rows) {
            let r = inverse_rms(x, eps);
            let shrink = r * r * dot3(x, dy, w) / w.len() as f32;
            for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(w) {
                *dx += r * (dy * w - x * shrink);
            }
        }
    }

    fn weight_gradient(isa; x: &[f32], eps: f32, dy: &[f32], dw: &mut [f32]) {
        let width = dw.len();
        for (x, dy) in x.chunks_exact(width).zip(dy.chunks_exact(width)) {
            let r = inverse_rms(x, eps);
            for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
                *dw += dy * x * r;
            }
        }
    }
}

/// `1 / sqrt(mean(x²) + eps)` of one row.
#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mut sums = [0f32; 16];
    let (wide, rest) = x.as_chunks::<16>();
    for x in wide {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum += x * x;
        }
    }
    let sum: f32 = sums.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>();
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

/// `Σ a b c` in independent sums, so that it vectorizes.
#[inline(always)]
fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let ((a, a_rest), (b, b_rest), (c, c_rest)) =
        (a.as_chunks::<16>(), b.as_chunks::<16>(), c.as_chunks::<16>());
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for i in 0..16 {
            sums[i] += a[i] * b[i] * c[i];
        }
    }
    let rest = a_rest.iter().zip(b_rest).zip(c_rest).map(|((a, b), c)| a * b * c);
    sums.iter().sum::<f32>() + rest.sum::<f32>()
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (values(x, x_layout)?, values(w, w_layout)?);
        let width = w.len();
        if x_layout.dims().last() != Some(&width) {
            candle_core::bail!("input is {:?}, the norm needs width {width}", x_layout.dims());
        }
        let mut y = vec![0f32; x.len()];
        forward(Isa::current(), x, w, self.eps, &mut y);
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    /// The gradient of the weight is `Σ_rows dy · x r`.
    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (xs, ws, dys) = (Values::of(x)?, Values::of(w)?, Values::of(&dy)?);
        let (xs, ws, dys) = (&*xs, &*ws, &*dys);
        let isa = Isa::current();
        let mut dx = vec![0f32; xs.len()];
        backward(isa, xs, ws, self.eps, dys, &mut dx);
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        if !w.track_op() {
            return Ok((Some(dx), None));
        }
        let mut dw = vec![0f32; ws.len()];
        weight_gradient(isa, xs, self.eps, dys, &mut dw);
        Ok((Some(dx), Some(Tensor::from_vec(dw, w.shape(), w.device())?)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{finite_differences, normal, parity};
    use super::*;

    #[test]
    fn parity_and_differences() {
        for width in [64, 83] {
            let inputs = [normal(1, &[9, width]), normal(2, &[width])];
            let run = |compute| move |t: &[Tensor]| rms_norm(&t[0], &t[1], 1e-5, compute);
            parity(&inputs, run(Compute::F32), run(Compute::REFERENCE));
            finite_differences(&inputs, run(Compute::F32));
        }
    }

    #[test]
    fn a_frozen_weight_gets_no_gradient() {
        let x = candle_core::Var::from_tensor(&normal(1, &[3, 16])).unwrap();
        let w = normal(2, &[16]);
        let y = rms_norm(&x, &w, 1e-5, Compute::F32).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&x).is_some() && grads.get(&w).is_none());
    }

    /// The weight gradient summed over chunks of rows equals that of all rows at once.
    #[test]
    fn weight_gradient_is_summed_in_partials() {
        let (rows, width, eps) = (2 * PARTIAL_ROWS + 3, 24, 1e-5);
        let values = |seed, len| normal(seed, &[len]).to_vec1::<f32>().unwrap();
        let (x, w, dy) = (values(1, rows * width), values(2, width), values(3, rows * width));
        let isa = Isa::current();
        let (mut dx, mut dw) = (vec![1.0; x.len()], vec![1.0; width]);
        backward(isa, &x, &w, eps, &dy, &mut dx);
        weight_gradient(isa, &x, eps, &dy, &mut dw);
        let (mut found_x, mut found_w) = (vec![1.0; x.len()], vec![1.0; width]);
        let partials = &mut vec![7.0; 5];
        backward_with_weight(isa, &x, &w, eps, &dy, &mut found_x, &mut found_w, partials);
        assert_eq!(found_x, dx);
        let near = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-4 * b.abs().max(1.0);
        assert!(found_w.iter().zip(&dw).all(near), "{found_w:?} {dw:?}");
    }
}
