//! The activations of a product, permuted to the order in which blocks are decoded, with the factors that
//! scales and minima of blocks are multiplied by.

#[cfg(target_arch = "x86_64")]
use std::ops::Range;

use crate::isa::{Isa, multiversion};
use crate::ops::par_for_each;

/// Values per group: the block length of the small block types, the sub-block length of the K-quants.
pub(super) const GROUP_LEN: usize = 32;
/// Scales that kernels process at a time.
pub(super) const LANES: usize = 16;
/// The largest rounded value: four products with the largest words, `-128 · 256`, fit an `i32`, and
/// so do 32 with nibbles or bytes. All these sums are exact in `f32` but for 32 with bytes of `Q8_0`,
/// which are rounded once.
const LEVELS: f32 = 16383.0;
/// Cost of rounding a value, in multiply-adds.
const WORK: usize = 8;

/// 32 values, cache line aligned.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(super) struct ActivationGroup<T>(pub [T; GROUP_LEN]);

/// `m` rows of input, each cut into groups of 32 values.
///
/// Within a group, values of even index come first, then those of odd index: 16-bit lanes unpack the
/// bytes of a block in that order without a shuffle.
pub(super) struct Activations<T> {
    values: Vec<ActivationGroup<T>>, // (m, groups)
    /// By scales per group, one or two.
    factors: [GroupFactors; 2],
    groups: usize,
    m: usize,
}

/// What the scales and minima of a block's parts are multiplied by.
struct GroupFactors {
    scales: Vec<f32>, // (m, stride), one per part
    sums: Vec<f32>,   // (m, stride), scale times the sum of the part's values
    stride: usize,
}

impl<T> Activations<T> {
    /// Rows of input.
    pub(crate) fn m(&self) -> usize {
        self.m
    }

    /// Groups per row, the last one zero-padded.
    pub(super) fn groups(&self) -> usize {
        self.groups
    }

    /// All groups of a row.
    pub(crate) fn row(&self, row: usize) -> &[ActivationGroup<T>] {
        &self.values[row * self.groups..(row + 1) * self.groups]
    }

    /// Scales and scaled sums of 16 parts of a row from `group` on, of which there are `parts` to a
    /// group; zero-padded after the last.
    #[inline(always)]
    pub(crate) fn factors(
        &self,
        parts: usize,
        row: usize,
        group: usize,
    ) -> (&[f32; LANES], &[f32; LANES]) {
        let factors = &self.factors[parts - 1];
        let at = row * factors.stride + parts * group;
        let lanes =
            |values: &'_ [f32]| -> *const [f32; LANES] { values[at..at + LANES].as_ptr().cast() };
        // SAFETY: slices of exactly that length, borrowed as long as `self`.
        unsafe { (&*lanes(&factors.scales), &*lanes(&factors.sums)) }
    }
}

impl Activations<f32> {
    /// The values of `x (m, cols)` in their original order, without factors.
    pub(super) fn straight(isa: Isa, x: &[f32], cols: usize) -> Self {
        Self::of(isa, x, cols, |isa, x, groups, _| copy(isa, x, groups))
    }

    /// The values of `x (m, cols)` unrounded, permuted, with all scales 1.
    pub(super) fn decoded(isa: Isa, x: &[f32], cols: usize) -> Self {
        Self::of(isa, x, cols, reorder)
    }
}

impl Activations<i16> {
    /// The values of `x (m, cols)`, rounded to the nearest of 32767 levels per group.
    ///
    /// A group with a NaN or Inf gets the scale NaN, so that it propagates to the output.
    pub(super) fn rounded(isa: Isa, x: &[f32], cols: usize) -> Self {
        Self::of(isa, x, cols, round)
    }
}

/// Rows of input in batches of 8, 4, 2 and 1. The values and factors of all rows of a batch for one group
/// are contiguous.
#[cfg(target_arch = "x86_64")]
pub(super) struct ActivationBatches {
    values: Vec<ActivationGroup<i16>>, // of a batch (groups, rows)
    factors: Vec<f32>,                 // of a batch (groups, 2, rows): scales, then scaled sums
    groups: usize,
    m: usize,
}

/// Rows of input that are processed together.
#[cfg(target_arch = "x86_64")]
pub(super) struct ActivationBatch<'a> {
    pub rows: Range<usize>,
    /// Groups of a row.
    pub groups: usize,
    values: &'a [ActivationGroup<i16>],
    factors: &'a [f32],
}

#[cfg(target_arch = "x86_64")]
impl ActivationBatches {
    pub(crate) fn new(x: &Activations<i16>) -> Self {
        let (m, groups) = (x.m, x.groups);
        let mut values = vec![ActivationGroup([0; GROUP_LEN]); m * groups];
        let mut factors = vec![0f32; 2 * m * groups];
        let [from, _] = &x.factors;
        for rows in batches_of(m) {
            let many = rows.len();
            let values = &mut values[rows.start * groups..];
            let factors = &mut factors[2 * rows.start * groups..];
            for (i, row) in rows.enumerate() {
                let places = values[i..].iter_mut().step_by(many);
                places.zip(x.row(row)).for_each(|(place, group)| *place = *group);
                let at = row * from.stride..row * from.stride + groups;
                let scales = factors[i..].iter_mut().step_by(2 * many);
                scales.zip(&from.scales[at.clone()]).for_each(|(place, scale)| *place = *scale);
                let sums = factors[many + i..].iter_mut().step_by(2 * many);
                sums.zip(&from.sums[at]).for_each(|(place, sum)| *place = *sum);
            }
        }
        Self { values, factors, groups, m }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = ActivationBatch<'_>> {
        batches_of(self.m).map(|rows| {
            let of = |size: usize| rows.start * size * self.groups..rows.end * size * self.groups;
            ActivationBatch {
                rows: rows.clone(),
                groups: self.groups,
                values: &self.values[of(1)],
                factors: &self.factors[of(2)],
            }
        })
    }
}

/// Splits `m` rows into batches of 8, 4, 2 and 1.
#[cfg(target_arch = "x86_64")]
fn batches_of(m: usize) -> impl Iterator<Item = Range<usize>> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let size = [8, 4, 2, 1].into_iter().find(|size| first + size <= m)?;
        first += size;
        Some(first - size..first)
    })
}

#[cfg(target_arch = "x86_64")]
impl ActivationBatch<'_> {
    /// The values of a group, row after row, each as 16 pairs.
    #[inline(always)]
    pub(crate) fn values(&self, group: usize) -> *const i32 {
        self.values[group * self.rows.len()..].as_ptr().cast()
    }

    /// The scales of all rows for a group, then their scaled sums.
    #[inline(always)]
    pub(crate) fn factors(&self, group: usize) -> *const f32 {
        self.factors[2 * group * self.rows.len()..].as_ptr()
    }
}

impl<T: Copy + Default> Activations<T> {
    /// Fills groups and their factors per part (scale, sum) row by row.
    fn of(
        isa: Isa,
        x: &[f32],
        cols: usize,
        fill: impl Fn(Isa, &[f32], &mut [ActivationGroup<T>], &mut [[(f32, f32); 2]]) + Sync + Send,
    ) -> Self
    where
        T: Send,
    {
        let (m, groups) = (x.len() / cols, cols.div_ceil(GROUP_LEN));
        let values = vec![ActivationGroup([T::default(); GROUP_LEN]); m * groups];
        let factors = [1, 2].map(|parts| {
            let stride = parts * groups.next_multiple_of(LANES) + LANES;
            GroupFactors { scales: vec![0.0; m * stride], sums: vec![0.0; m * stride], stride }
        });
        let mut all = Self { values, factors, groups, m };
        let [whole, half] = &mut all.factors;
        let wholes = whole.scales.chunks_mut(whole.stride).zip(whole.sums.chunks_mut(whole.stride));
        let halves = half.scales.chunks_mut(half.stride).zip(half.sums.chunks_mut(half.stride));
        let values = all.values.chunks_mut(groups.max(1));
        let rows = x.chunks_exact(cols).zip(values).zip(wholes.zip(halves));
        par_for_each(rows.collect(), WORK * x.len(), |((x, values), (whole, half))| {
            let mut factors = vec![[(0.0, 0.0); 2]; groups];
            fill(isa, x, values, &mut factors);
            for (group, [a, b]) in factors.iter().enumerate() {
                whole.0[group] = a.0;
                whole.1[group] = a.1 + b.1;
                (half.0[2 * group], half.0[2 * group + 1]) = (a.0, b.0);
                (half.1[2 * group], half.1[2 * group + 1]) = (a.1, b.1);
            }
        });
        all
    }
}

/// Copies groups, zero-padded after the end of `x`.
fn copy(_isa: Isa, x: &[f32], groups: &mut [ActivationGroup<f32>]) {
    for (x, group) in x.chunks(GROUP_LEN).zip(groups) {
        group.0[..x.len()].copy_from_slice(x);
    }
}

multiversion! {
    /// Groups of whole blocks with even values first; per half of a group scale and sum.
    fn reorder(isa; x: &[f32], groups: &mut [ActivationGroup<f32>], factors: &mut [[(f32, f32); 2]]) {
        let xs = x.as_chunks::<GROUP_LEN>().0;
        for ((x, group), factors) in xs.iter().zip(groups).zip(factors) {
            even_first(x, &mut group.0);
            for (x, factors) in x.as_chunks::<16>().0.iter().zip(factors) {
                *factors = (1.0, x.iter().sum());
            }
        }
    }

    /// As [`reorder`], rounded.
    fn round(isa; x: &[f32], groups: &mut [ActivationGroup<i16>], factors: &mut [[(f32, f32); 2]]) {
        // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
        const NEAREST: f32 = 12_582_912.0;
        let xs = x.as_chunks::<GROUP_LEN>().0;
        for ((x, group), factors) in xs.iter().zip(groups).zip(factors) {
            // The bits of absolute values compare like the values, with NaN above all.
            let largest = x.iter().fold(0, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff));
            let largest = f32::from_bits(largest);
            // Where the quotient would overflow, values are treated as zero.
            let inverse = if largest > 1e-30 { LEVELS / largest } else { 0.0 };
            let scale = if largest.is_finite() { largest / LEVELS } else { f32::NAN };
            let mut rounded = [0i32; GROUP_LEN];
            for (rounded, x) in rounded.iter_mut().zip(x) {
                *rounded = (x * inverse + NEAREST).to_bits() as i32 - NEAREST.to_bits() as i32;
            }
            for (rounded, factors) in rounded.as_chunks::<16>().0.iter().zip(factors) {
                // Sixteen values of 15 bits cannot overflow, unless the scale is NaN, which makes them
                // irrelevant.
                let sum = rounded.iter().fold(0i32, |sum, value| sum.wrapping_add(*value));
                *factors = (scale, scale * sum as f32);
            }
            even_first(&rounded.map(|rounded| rounded as i16), &mut group.0);
        }
    }
}

#[inline(always)]
fn even_first<T: Copy>(x: &[T; GROUP_LEN], out: &mut [T; GROUP_LEN]) {
    for i in 0..GROUP_LEN / 2 {
        out[i] = x[2 * i];
        out[GROUP_LEN / 2 + i] = x[2 * i + 1];
    }
}
