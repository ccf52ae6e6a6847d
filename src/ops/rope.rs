//! Rotary position embedding (Su et al. 2021), the half-split form of Hugging Face checkpoints:
//! element `i` of a head is paired with element `i + rotary_dim / 2`. With partial rotary embedding only
//! the first `rotary_dim` elements of a head are rotated.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};

use super::cpu::{Values, par_for_each, values};
use super::{Compute, OpForm};
use crate::isa::{Isa, multiversion};

/// Cosines and sines for the tokens of one batch.
///
/// Shapes: `cos`, `sin` each `(N, rotary_dim / 2)`. Angles are computed in `f64` from the `f32`
/// frequencies, then rounded.
#[derive(Debug, Clone)]
pub(crate) struct Rotation {
    cos: Arc<Vec<f32>>,
    sin: Arc<Vec<f32>>,
    /// Pairs per head.
    half: usize,
    head_dim: usize,
}

impl Rotation {
    /// The rotation of tokens at `positions` by `inv_freq` (`rotary_dim / 2` radians per position), of
    /// whole heads.
    pub(crate) fn new(positions: &[u32], inv_freq: &[f32]) -> Self {
        let half = inv_freq.len();
        let angle = |p: u32, f: f32| f64::from(p) * f64::from(f);
        let of = |f: fn(f64) -> f64, p: u32| inv_freq.iter().map(move |&i| f(angle(p, i)) as f32);
        // A position that occurs in several rows is computed once.
        let end = positions.iter().max().map_or(0, |&last| last as usize + 1);
        let all = |f: fn(f64) -> f64| -> Vec<f32> {
            if end > positions.len() {
                return positions.iter().flat_map(|&p| of(f, p)).collect();
            }
            let table: Vec<f32> = (0..end as u32).flat_map(|p| of(f, p)).collect();
            let rows = positions.iter().flat_map(|&p| &table[p as usize * half..][..half]);
            rows.copied().collect()
        };
        let (cos, sin) = (Arc::new(all(f64::cos)), Arc::new(all(f64::sin)));
        Self { cos, sin, half, head_dim: 2 * half }
    }

    /// Sets the width of a head; values after the rotated pairs are left unchanged.
    pub(crate) fn in_heads_of(self, head_dim: usize) -> Self {
        debug_assert!(2 * self.half <= head_dim);
        Self { head_dim, ..self }
    }

    /// Concatenates the rotations of consecutive tokens.
    ///
    /// # Panics
    /// If `parts` is empty.
    pub(crate) fn joined(parts: &[Self]) -> Self {
        let all = |of: fn(&Self) -> &Arc<Vec<f32>>| {
            Arc::new(parts.iter().flat_map(|part| of(part).iter().copied()).collect())
        };
        let Self { half, head_dim, .. } = parts[0];
        Self { cos: all(|part| &part.cos), sin: all(|part| &part.sin), half, head_dim }
    }

    /// Multiplies cosines and sines by `factor`, which scales queries and keys (YaRN's attention factor). The
    /// backward direction is then not the inverse of the forward one, but still its transpose.
    pub(crate) fn grown(self, factor: f32) -> Self {
        if factor == 1.0 {
            return self;
        }
        let scaled = |values: &[f32]| Arc::new(values.iter().map(|value| value * factor).collect());
        Self { cos: scaled(&self.cos), sin: scaled(&self.sin), ..self }
    }

    fn tokens(&self) -> usize {
        self.cos.len() / self.half
    }
}

/// Rotates every head of every token: `x (N, heads · head_dim)` F32 → the same shape.
pub(crate) fn rope(x: &Tensor, rotation: &Rotation, compute: Compute) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    let head_dim = rotation.head_dim;
    if tokens != rotation.tokens() || width % head_dim != 0 {
        candle_core::bail!(
            "cannot rotate {:?}: positions of {} tokens, heads of {head_dim}",
            x.dims(),
            rotation.tokens()
        );
    }
    match compute.op_form() {
        OpForm::Kernel => x.contiguous()?.apply_op1(Rope { rotation: rotation.clone() }),
        OpForm::Portable => portable(x, rotation, x.device()),
    }
}

fn portable(x: &Tensor, rotation: &Rotation, device: &Device) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    let (half, head_dim) = (rotation.half, rotation.head_dim);
    let table = |values: &[f32]| Tensor::from_slice(values, (tokens, 1, half), device);
    let (cos, sin) = (table(&rotation.cos)?, table(&rotation.sin)?);
    let x = x.reshape((tokens, width / head_dim, head_dim))?; // (N, heads, head_dim)
    let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let mut parts = vec![first, second];
    if 2 * half < head_dim {
        parts.push(x.narrow(2, 2 * half, head_dim - 2 * half)?);
    }
    Tensor::cat(&parts, 2)?.reshape((tokens, width))
}

struct Rope {
    rotation: Rotation,
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut y = values(x, layout)?.to_vec();
        let width = layout.dims()[1];
        self.rotation.rotate(Isa::current(), Direction::Forward, &mut y, width, width);
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    /// The gradient of a rotation is the inverse rotation.
    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let mut dx = Values::of(&dy.contiguous()?)?.to_vec();
        let width = x.dim(1)?;
        self.rotation.rotate(Isa::current(), Direction::Backward, &mut dx, width, width);
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

/// The direction of a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// By the positions' angles.
    Forward,
    /// By the negative angles: the gradient.
    Backward,
}

impl Rotation {
    /// Rotates the first `width` values of each row of `x`, with rows `stride` apart.
    pub(crate) fn rotate(
        &self,
        isa: Isa,
        direction: Direction,
        x: &mut [f32],
        stride: usize,
        width: usize,
    ) {
        const ROWS: usize = 16;
        /// Cost per value, in multiply-adds.
        const WORK: usize = 2;
        let Rotation { cos, sin, half, head_dim } = self;
        let angles = cos.chunks(ROWS * half).zip(sin.chunks(ROWS * half));
        let (work, rows) = (WORK * x.len(), x.chunks_mut(ROWS * stride).zip(angles));
        par_for_each(rows.collect(), work, |(x, (cos, sin))| {
            let rows = cos.chunks_exact(*half).zip(sin.chunks_exact(*half));
            for (x, (cos, sin)) in x.chunks_mut(stride).zip(rows) {
                rotate_row(isa, direction, &mut x[..width], *head_dim, cos, sin);
            }
        });
    }
}

multiversion! {
    fn rotate_row(isa; direction: Direction, x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
        let sign = if direction == Direction::Forward { 1.0 } else { -1.0 };
        for head in x.chunks_exact_mut(head_dim) {
            let (a, b) = head.split_at_mut(cos.len()); // `zip` stops at the last pair
            for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                let (x, y, sin) = (*a, *b, sin * sign);
                *a = x * cos - y * sin;
                *b = y * cos + x * sin;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{finite_differences, normal, parity};
    use super::*;

    #[test]
    fn parity_and_differences() {
        let inv_freq: Vec<f32> = (0..4).map(|i| 10f32.powi(-i)).collect();
        for (factor, head_dim) in [(1.0, 8), (1.3, 8), (1.3, 12)] {
            let parts: [&[u32]; 2] = [&[0, 1, 2], &[0, 1, 900]];
            let parts = parts.map(|positions| Rotation::new(positions, &inv_freq));
            let rotation = Rotation::joined(&parts).in_heads_of(head_dim).grown(factor);
            let inputs = [normal(1, &[6, 24])];
            let run = |compute| {
                let rotation = rotation.clone();
                move |t: &[Tensor]| rope(&t[0], &rotation, compute)
            };
            parity(&inputs, run(Compute::F32), run(Compute::REFERENCE));
            finite_differences(&inputs, run(Compute::F32));
        }
    }

    #[test]
    fn a_wrong_count_of_positions_is_an_error() {
        let rotation = Rotation::new(&[0, 1], &[1.0, 0.1]);
        assert!(rope(&normal(1, &[3, 8]), &rotation, Compute::F32).is_err());
        assert!(rope(&normal(1, &[2, 6]), &rotation, Compute::F32).is_err());
    }
}
