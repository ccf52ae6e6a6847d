//! Root mean square normalization (Zhang and Sennrich 2019), differentiable in input and weight.

use candle_core::{CpuStorage, CustomOp2, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::Compute;
use super::cpu::{Values, values};

/// `y = x / sqrt(mean(x²) + eps) · w` over the last dimension.
///
/// Shapes: `x (.., H)` F32, `w (H)` F32 → `y (.., H)` F32.
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64, compute: Compute) -> Result<Tensor> {
    match compute {
        Compute::F32 => x.contiguous()?.apply_op2(w, RmsNorm { eps: eps as f32 }),
        Compute::Portable => {
            let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
            x.broadcast_div(&(mean_square + eps)?.sqrt()?)?.broadcast_mul(w)
        }
    }
}

struct RmsNorm {
    eps: f32,
}

impl RmsNorm {
    /// `1 / sqrt(mean(x²) + eps)` of one row.
    fn inverse_rms(&self, x: &[f32]) -> f32 {
        let mean_square = dot(x, x) / x.len() as f32;
        1.0 / (mean_square + self.eps).sqrt()
    }
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
        y.par_chunks_exact_mut(width).zip(x.par_chunks_exact(width)).for_each(|(y, x)| {
            let r = self.inverse_rms(x);
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = x * r * w;
            }
        });
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    /// With `r = 1 / rms(x)` and `g = w · dy`: `dx = r (g - x r² mean(x · g))`,
    /// `dw = Σ_rows dy · x r`.
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
        let width = ws.len();

        let mut dx = vec![0f32; xs.len()];
        let rows = xs.par_chunks_exact(width).zip(dys.par_chunks_exact(width));
        dx.par_chunks_exact_mut(width).zip(rows).for_each(|(dx, (x, dy))| {
            let r = self.inverse_rms(x);
            for ((dx, dy), w) in dx.iter_mut().zip(dy).zip(ws) {
                *dx = dy * w;
            }
            let shrink = r * r * dot(x, dx) / width as f32;
            for (dx, x) in dx.iter_mut().zip(x) {
                *dx = r * (*dx - x * shrink);
            }
        });
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        if !w.track_op() {
            return Ok((Some(dx), None));
        }

        let mut dw = vec![0f32; width];
        for (x, dy) in xs.chunks_exact(width).zip(dys.chunks_exact(width)) {
            let r = self.inverse_rms(x);
            for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
                *dw += dy * x * r;
            }
        }
        Ok((Some(dx), Some(Tensor::from_vec(dw, w.shape(), w.device())?)))
    }
}

/// A dot product in eight independent sums, so that it vectorizes.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a8.remainder().iter().zip(b8.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a8.zip(b8) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + rest
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
            parity(&inputs, run(Compute::F32), run(Compute::Portable));
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
}
