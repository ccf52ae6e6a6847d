//! An update in the layout that decode kernels read: for one or a few tokens at a time, with its scales
//! folded in, and in f16 if the rest of decoding has no higher precision.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Result;
use half::f16;

use crate::delta::Lora;

/// Values of a group: rows of A are padded to whole groups.
pub const DECODE_GROUP: usize = 16;
/// Rows of A that a kernel reads at a time: ranks are padded to whole blocks.
pub const A_RANK_BLOCK: usize = 4;
/// Outputs in a panel of B.
pub const B_PANEL: usize = 16;
/// Panels of B in a stripe, which is read as one stream.
pub const B_PANELS_PER_STRIPE: usize = 4;

/// The exponent that the largest f16 value is scaled to: above it rounding may reach infinity; below it,
/// small values lose fewer bits the larger it is.
const TOP: i32 = 14;

/// `B A` with all its factors, for products with a few tokens: `y += weight · factor · B (A x)`.
#[derive(Debug)]
pub struct DecodeWeights<T> {
    /// Rank.
    pub r: usize,
    /// Columns of the layer's weight.
    pub in_features: usize,
    /// Rows of the layer's weight.
    pub out_features: usize,
    /// `A (r, in)` as `(blocks, groups, 4, 16)`, r padded to whole blocks and in to whole groups, by
    /// zeros.
    pub a: Vec<T>,
    /// `B (out, r)` as `(stripes, r, 4, 16)`: a stripe is four panels, the last filled up with zeros.
    pub b: Vec<T>,
    /// A power of two that undoes the scaling of f16 values.
    pub factor: f32,
    /// DoRA's `s (out)`: `W x` becomes `(1 + Σ weight · (s − 1)) ⊙ W x`. In B it is already.
    pub row_scales: Option<Vec<f32>>,
    /// Whether the adapter's parameters have changed since.
    stale: AtomicBool,
}

/// Type of the values of [`DecodeWeights`].
pub trait DecodeScalar: Copy + Default + Send + Sync + 'static {
    /// The exponent of the power of two that values up to `largest` are scaled by when stored.
    fn shift(largest: f32) -> i32;

    /// The nearest value of this type.
    fn round(x: f64) -> Self;

    /// The cache entry for this type.
    fn slot(decode_cache: &mut DecodeWeightsCache) -> &mut Option<Arc<DecodeWeights<Self>>>;
}

impl DecodeScalar for f32 {
    fn shift(_: f32) -> i32 {
        0
    }

    fn round(x: f64) -> Self {
        x as f32
    }

    fn slot(decode_cache: &mut DecodeWeightsCache) -> &mut Option<Arc<DecodeWeights<Self>>> {
        &mut decode_cache.whole
    }
}

impl DecodeScalar for f16 {
    fn shift(largest: f32) -> i32 {
        // Zeros, NaN and infinities are not scaled.
        let exponent = (largest.to_bits() >> 23) as i32 - 127;
        if (-100..128).contains(&exponent) { TOP - exponent } else { 0 }
    }

    fn round(x: f64) -> Self {
        Self::from_f64(x)
    }

    fn slot(decode_cache: &mut DecodeWeightsCache) -> &mut Option<Arc<DecodeWeights<Self>>> {
        &mut decode_cache.half
    }
}

/// The decode weights of an update that have been computed.
#[derive(Debug, Default)]
pub struct DecodeWeightsCache {
    half: Option<Arc<DecodeWeights<f16>>>,
    whole: Option<Arc<DecodeWeights<f32>>>,
    /// How often they were invalidated.
    pub(crate) generation: u64,
}

impl DecodeWeightsCache {
    /// Drops all, and marks those that are in use elsewhere as stale.
    pub(crate) fn invalidate(&mut self) {
        let next = Self { generation: self.generation + 1, ..Self::default() };
        let Self { half, whole, .. } = std::mem::replace(self, next);
        half.iter().for_each(|form| form.stale.store(true, Ordering::Release));
        whole.iter().for_each(|form| form.stale.store(true, Ordering::Release));
    }
}

impl<T> DecodeWeights<T> {
    /// Whether the adapter's parameters are unchanged since it was computed.
    pub fn is_current(&self) -> bool {
        !self.stale.load(Ordering::Acquire)
    }
}

impl<T: DecodeScalar> DecodeWeights<T> {
    /// The decode weights of an update; `row_scales` are DoRA's `s (out)` if it has magnitudes.
    pub fn new(lora: &Lora, row_scales: Option<Vec<f32>>) -> Result<Self> {
        let (r, cols, rows) = (lora.r(), lora.in_features(), lora.out_features());
        let a = lora.a.as_detached_tensor().flatten_all()?.to_vec1::<f32>()?;
        let b = lora.b.as_detached_tensor().flatten_all()?.to_vec1::<f32>()?;
        let scale = |row: usize| {
            let s = row_scales.as_ref().map_or(1.0, |scales| f64::from(scales[row]));
            lora.scale * s
        };
        let scaled = |row: usize, k: usize| f64::from(b[row * r + k]) * scale(row);
        let of_b = (0..rows).flat_map(|row| (0..r).map(move |k| (row, k)));
        let largest_of_b = largest(of_b.map(|(row, k)| scaled(row, k) as f32));
        let (up_a, up_b) = (T::shift(largest(a.iter().copied())), T::shift(largest_of_b));

        let padded = cols.next_multiple_of(DECODE_GROUP);
        let mut of_a = vec![T::default(); r.next_multiple_of(A_RANK_BLOCK) * padded];
        let power = 2f64.powi(up_a);
        for (row, from) in a.chunks_exact(cols.max(1)).enumerate() {
            let block =
                &mut of_a[row / A_RANK_BLOCK * A_RANK_BLOCK * padded..][..A_RANK_BLOCK * padded];
            let groups = block.chunks_exact_mut(A_RANK_BLOCK * DECODE_GROUP);
            for (to, from) in groups.zip(from.chunks(DECODE_GROUP)) {
                for (to, from) in to[row % A_RANK_BLOCK * DECODE_GROUP..].iter_mut().zip(from) {
                    *to = T::round(f64::from(*from) * power);
                }
            }
        }
        const STRIPE: usize = B_PANELS_PER_STRIPE * B_PANEL;
        let mut of_b = vec![T::default(); rows.div_ceil(STRIPE) * r * STRIPE];
        let power = 2f64.powi(up_b);
        for (stripe, to) in of_b.chunks_exact_mut((r * STRIPE).max(1)).enumerate() {
            for (k, to) in to.chunks_exact_mut(STRIPE).enumerate() {
                for (row, to) in (stripe * STRIPE..rows).zip(to) {
                    *to = T::round(scaled(row, k) * power);
                }
            }
        }
        let factor = 2f64.powi(-up_a - up_b) as f32;
        let (a, b, stale) = (of_a, of_b, AtomicBool::new(false));
        Ok(Self { r, in_features: cols, out_features: rows, a, b, factor, row_scales, stale })
    }
}

/// The largest absolute value; NaN counts as larger than all.
fn largest(values: impl Iterator<Item = f32>) -> f32 {
    // Bits of magnitudes order as they do.
    f32::from_bits(values.fold(0, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff)))
}
