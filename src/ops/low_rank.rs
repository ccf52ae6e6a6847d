//! Low-rank (LoRA) updates of a few tokens, for decode steps: `y += B (A x)`, both factors read once in place.
//!
//! Each token is summed in a fixed order, independent of the other tokens of the batch and of the
//! thread.

use std::ops::Range;

use half::f16;
use quantune_adapters::decode::{
    A_RANK_BLOCK, B_PANEL, B_PANELS_PER_STRIPE, DECODE_GROUP, DecodeScalar, DecodeWeights,
};

use super::cpu::{SharedMutPtr, prefetch};
use super::lanes::{Element, Lanes, isa_levels};

/// Bytes of a factor per task, as for base weights.
const TASK_BYTES: usize = 32 * 1024;
/// Prefetch distance in bytes.
const PREFETCH_DISTANCE: usize = 1024;

/// Element types of the stored factors.
pub(crate) trait LowRankElement: DecodeScalar + Element {}
impl LowRankElement for f32 {}
impl LowRankElement for f16 {}

/// Blocks of A per task.
pub(crate) fn blocks_of_task<T>(form: &DecodeWeights<T>) -> usize {
    (TASK_BYTES / (A_RANK_BLOCK * padded(form) * size_of::<T>()).max(1)).max(1)
}

/// Blocks of A.
pub(crate) fn blocks<T>(form: &DecodeWeights<T>) -> usize {
    form.r.div_ceil(A_RANK_BLOCK)
}

/// Columns of A with padding.
pub(crate) fn padded<T>(form: &DecodeWeights<T>) -> usize {
    form.in_features.next_multiple_of(DECODE_GROUP)
}

/// Elements of `A x` per token.
pub(crate) fn xa_stride<T>(form: &DecodeWeights<T>) -> usize {
    blocks(form) * A_RANK_BLOCK
}

/// The rows of a buffer that belong to some tokens, in the order of `tokens`.
#[derive(Clone, Copy)]
pub(crate) struct BatchRows<'a> {
    /// Which rows of the batch.
    pub tokens: &'a [usize],
    /// Row stride of the buffer, in elements.
    pub stride: usize,
}

impl<'a> BatchRows<'a> {
    /// Row offsets of the first `M` tokens, if there are as many, and the remaining tokens.
    #[inline(always)]
    fn split<const M: usize>(self) -> Option<([usize; M], Self)> {
        let (first, tokens) = self.tokens.split_first_chunk::<M>()?;
        Some((first.map(|token| token * self.stride), Self { tokens, ..self }))
    }
}

isa_levels! {
    /// `xa = factor · x Aᵀ` for some blocks of A's rows.
    ///
    /// Shapes: `x` are the inputs of the whole batch, each padded to whole groups of 16 and as far from
    /// the next as `tokens` say → `xa (tokens, xa_stride)`, of which the blocks' columns are written.
    ///
    /// # Safety
    /// No other thread may access these columns of `xa`.
    pub(crate) unsafe fn shrink<T: LowRankElement>(form: &DecodeWeights<T>, blocks: Range<usize>, x: &[f32], tokens: BatchRows, factor: f32, xa: SharedMutPtr) = shrink_body;
    /// `y += xa Bᵀ` for some of B's rows. They are read in whole panels of 16.
    ///
    /// Shapes: `xa (tokens, xa_stride)`; `y` are the outputs of the whole batch, each as far from the
    /// next as `tokens` say.
    ///
    /// # Safety
    /// No other thread may access the outputs of these rows.
    pub(crate) unsafe fn expand<T: LowRankElement>(form: &DecodeWeights<T>, rows: Range<usize>, xa: &[f32], y: SharedMutPtr, tokens: BatchRows) = expand_body;
}

/// # Safety
/// As [`shrink`]; to be compiled with the features of `S`.
#[inline(always)]
unsafe fn shrink_body<S: Lanes, T: LowRankElement>(
    form: &DecodeWeights<T>,
    blocks: Range<usize>,
    x: &[f32],
    mut tokens: BatchRows,
    factor: f32,
    mut xa: SharedMutPtr,
) {
    let stride = xa_stride(form);
    loop {
        // SAFETY: this function's contract guarantees exclusive access to the outputs; slices bound the reads.
        unsafe {
            if let Some((at, others)) = tokens.split::<4>() {
                shrink_tokens::<S, T, 4>(form, blocks.clone(), at.map(|at| &x[at..]), factor, xa);
                (tokens, xa) = (others, xa.at(4 * stride));
            } else if let Some((at, others)) = tokens.split::<1>() {
                shrink_tokens::<S, T, 1>(form, blocks.clone(), at.map(|at| &x[at..]), factor, xa);
                (tokens, xa) = (others, xa.at(stride));
            } else {
                return;
            }
        }
    }
}

/// # Safety
/// As [`shrink_body`].
#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices run over several arrays at once, in registers
unsafe fn shrink_tokens<S: Lanes, T: LowRankElement, const M: usize>(
    form: &DecodeWeights<T>,
    blocks: Range<usize>,
    x: [&[f32]; M],
    factor: f32,
    xa: SharedMutPtr,
) {
    let (cols, stride) = (padded(form), xa_stride(form));
    let mut xs = [std::ptr::null::<f32>(); M];
    for i in 0..M {
        xs[i] = x[i][..cols].as_ptr();
    }
    for block in blocks {
        let block_of_a = form.a[block * A_RANK_BLOCK * cols..][..A_RANK_BLOCK * cols].as_ptr();
        // SAFETY: a block has four rows, each input has `cols` elements in whole groups; the rest is
        // guaranteed by the caller's.
        unsafe {
            let mut sums = [[S::splat(0.0); M]; A_RANK_BLOCK];
            for at in (0..cols).step_by(DECODE_GROUP) {
                let rows = block_of_a.add(at * A_RANK_BLOCK);
                prefetch_ahead(rows, A_RANK_BLOCK * DECODE_GROUP);
                let mut inputs = [S::splat(0.0); M];
                for i in 0..M {
                    inputs[i] = S::load(xs[i].add(at));
                }
                for k in 0..A_RANK_BLOCK {
                    let w = T::load::<S>(rows.add(k * DECODE_GROUP));
                    for i in 0..M {
                        sums[k][i] = w.mul_add(inputs[i], sums[k][i]);
                    }
                }
            }
            for i in 0..M {
                let xa = xa.at(i * stride + block * A_RANK_BLOCK).slice(A_RANK_BLOCK);
                for k in 0..A_RANK_BLOCK {
                    xa[k] = factor * sums[k][i].sum();
                }
            }
        }
    }
}

/// # Safety
/// As [`expand`]; to be compiled with the features of `S`.
#[inline(always)]
unsafe fn expand_body<S: Lanes, T: LowRankElement>(
    form: &DecodeWeights<T>,
    rows: Range<usize>,
    mut xa: &[f32],
    y: SharedMutPtr,
    mut tokens: BatchRows,
) {
    assert!(rows.end <= form.out_features);
    if form.r == 0 {
        return;
    }
    let stride = xa_stride(form);
    loop {
        // SAFETY: this function's contract guarantees exclusive access to the outputs; slices bound the reads.
        unsafe {
            if let Some((at, others)) = tokens.split::<4>() {
                let y = at.map(|at| y.at(at));
                expand_tokens::<S, T, 4>(form, rows.clone(), xa, stride, &y);
                (tokens, xa) = (others, &xa[4 * stride..]);
            } else if let Some((at, others)) = tokens.split::<1>() {
                let y = at.map(|at| y.at(at));
                expand_tokens::<S, T, 1>(form, rows.clone(), xa, stride, &y);
                (tokens, xa) = (others, &xa[stride..]);
            } else {
                return;
            }
        }
    }
}

/// Prefetches `n` elements at a distance of [`PREFETCH_DISTANCE`].
#[inline(always)]
fn prefetch_ahead<T>(numbers: *const T, n: usize) {
    for line in (0..n * size_of::<T>()).step_by(64) {
        prefetch(numbers.cast::<u8>().wrapping_add(PREFETCH_DISTANCE + line));
    }
}

/// Offset of a panel in B.
#[inline(always)]
fn place<T>(form: &DecodeWeights<T>, panel: usize) -> usize {
    (panel / B_PANELS_PER_STRIPE * form.r * B_PANELS_PER_STRIPE + panel % B_PANELS_PER_STRIPE)
        * B_PANEL
}

/// Several panels of a stripe at a time, to have independent sums, or as many as overlap the
/// rows.
///
/// # Safety
/// As [`expand_body`].
#[inline(always)]
unsafe fn expand_tokens<S: Lanes, T: LowRankElement, const M: usize>(
    form: &DecodeWeights<T>,
    rows: Range<usize>,
    xa: &[f32],
    stride: usize,
    y: &[SharedMutPtr; M],
) {
    let (mut panel, end) = (rows.start / B_PANEL, rows.end.div_ceil(B_PANEL));
    while panel < end {
        // SAFETY: this function's contract guarantees exclusive access to the outputs; slices bound the reads.
        unsafe {
            let whole = |panels| panel.is_multiple_of(panels) && panel + panels <= end;
            panel += if whole(B_PANELS_PER_STRIPE) {
                expand_panels::<S, T, M, B_PANELS_PER_STRIPE>(form, panel, &rows, xa, stride, y)
            } else if whole(2) {
                expand_panels::<S, T, M, 2>(form, panel, &rows, xa, stride, y)
            } else {
                expand_panels::<S, T, M, 1>(form, panel, &rows, xa, stride, y)
            };
        }
    }
}

/// `N` panels of a stripe; returns `N`.
///
/// # Safety
/// As [`expand_body`].
#[inline(always)]
#[allow(clippy::needless_range_loop)] // as above
unsafe fn expand_panels<S: Lanes, T: LowRankElement, const M: usize, const N: usize>(
    form: &DecodeWeights<T>,
    panel: usize,
    rows: &Range<usize>,
    xa: &[f32],
    stride: usize,
    y: &[SharedMutPtr; M],
) -> usize {
    let b =
        form.b[place(form, panel)..][..((form.r - 1) * B_PANELS_PER_STRIPE + N) * B_PANEL].as_ptr();
    // SAFETY: the panels are a stripe's width apart and inside the slice taken above; this
    // function's contract guarantees exclusive access to the outputs.
    unsafe {
        let mut sums = [[S::splat(0.0); M]; N];
        for k in 0..form.r {
            let b = b.add(k * B_PANELS_PER_STRIPE * B_PANEL);
            prefetch_ahead(b, N * B_PANEL);
            let mut factors = [S::splat(0.0); M];
            for i in 0..M {
                factors[i] = S::splat(xa[i * stride + k]);
            }
            for p in 0..N {
                let w = T::load::<S>(b.add(p * B_PANEL));
                for i in 0..M {
                    sums[p][i] = w.mul_add(factors[i], sums[p][i]);
                }
            }
        }
        for p in 0..N {
            // A panel at the end of the rows is only partly written.
            let first = (panel + p) * B_PANEL;
            let (from, to) = (first.max(rows.start), rows.end.min(first + B_PANEL));
            for i in 0..M {
                let mut update = [0f32; B_PANEL];
                sums[p][i].store(update.as_mut_ptr());
                let y = y[i].at(from).slice(to - from);
                for (y, update) in y.iter_mut().zip(&update[from - first..]) {
                    *y += update;
                }
            }
        }
    }
    N
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};
    use quantune_adapters::delta::Lora;
    use quantune_adapters::rng::Stream;

    use super::*;
    use crate::isa::Isa;

    fn update(r: usize, cols: usize, rows: usize, size: f32) -> Lora {
        let mut stream = Stream::new(5, "low_rank", &[r as u64, cols as u64]);
        let mut draw = |rows: usize, cols: usize, size: f32| {
            let values: Vec<f32> = (0..rows * cols).map(|_| size * stream.normal()).collect();
            Var::from_vec(values, (rows, cols), &Device::Cpu).unwrap()
        };
        Lora::new(draw(r, cols, 0.05), draw(rows, r, size), 2.0)
    }

    /// `y += weight · update(x)` by the kernels, a task at a time: the tokens are part of a larger batch, in
    /// which no other element may change.
    fn fast<T: LowRankElement>(
        isa: Isa,
        form: &DecodeWeights<T>,
        weight: f32,
        x: &[f32],
        y: &mut [f32],
    ) {
        let (n, rows, cols) = (x.len() / form.in_features, form.out_features, padded(form));
        let tokens: Vec<usize> = (0..n).map(|i| 2 * (n - i)).collect();
        let mut inputs = vec![0.0; (2 * n + 1) * cols];
        let mut outputs = vec![7.0; (2 * n + 1) * rows];
        for (i, token) in tokens.iter().enumerate() {
            let x = &x[i * form.in_features..][..form.in_features];
            inputs[token * cols..][..x.len()].copy_from_slice(x);
            outputs[token * rows..][..rows].copy_from_slice(&y[i * rows..][..rows]);
        }
        let of = |stride| BatchRows { tokens: &tokens, stride };
        let mut xa = vec![f32::NAN; n * xa_stride(form)];
        let target = SharedMutPtr::new(&mut xa);
        // SAFETY: only one thread runs.
        unsafe {
            for block in 0..blocks(form) {
                let factor = weight * form.factor;
                shrink(isa, form, block..block + 1, &inputs, of(cols), factor, target);
            }
            // Ranges that end within a panel, between two, and between two stripes.
            let mut first = 0;
            for border in [rows / 2, rows / 2 + 1, rows.min(64).max(rows / 2 + 1), rows] {
                let border = border.min(rows);
                expand(isa, form, first..border, &xa, SharedMutPtr::new(&mut outputs), of(rows));
                first = border;
            }
        }
        for (token, output) in outputs.chunks_exact(rows).enumerate() {
            match tokens.iter().position(|t| *t == token) {
                Some(i) => y[i * rows..][..rows].copy_from_slice(output),
                None => assert!(output.iter().all(|y| *y == 7.0), "token {token} was written to"),
            }
        }
    }

    #[test]
    fn updates_equal_the_product_of_their_factors() {
        fn check<T: LowRankElement>(lora: &Lora, scales: Option<&[f32]>, n: usize, tolerance: f64) {
            let (r, cols, rows) = (lora.r(), lora.in_features(), lora.out_features());
            let form = DecodeWeights::<T>::new(lora, scales.map(<[f32]>::to_vec)).unwrap();
            let values = |var: &Var| var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let (a, b) = (values(&lora.a), values(&lora.b));
            let mut stream = Stream::new(6, "x", &[]);
            let x: Vec<f32> = (0..n * cols).map(|_| stream.normal()).collect();
            let dot = |a: &[f32], b: &[f32]| -> f64 {
                a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
            };
            let mut exact = Vec::new();
            for x in x.chunks(cols) {
                let xa: Vec<f32> = a.chunks(cols).map(|a| dot(a, x) as f32).collect();
                for (row, b) in b.chunks(r).enumerate() {
                    let s = scales.map_or(1.0, |scales| f64::from(scales[row]));
                    exact.push(0.7 * lora.scale * s * dot(b, &xa));
                }
            }
            for isa in Isa::available() {
                let mut y = vec![0.0; n * rows];
                fast(isa, &form, 0.7, &x, &mut y);
                let of = |values: &mut dyn Iterator<Item = f64>| {
                    values.map(|v| v * v).sum::<f64>().sqrt()
                };
                let off = of(&mut y.iter().zip(&exact).map(|(y, e)| f64::from(*y) - e));
                let size = of(&mut exact.iter().copied());
                let name = format!("r {r}, {cols} to {rows}, {n} tokens, {}", isa.name());
                assert!(off <= tolerance * size, "{name}: off by {:e}", off / size);
                // A token gives the same bits alone and in a batch.
                for (x, among) in x.chunks(cols).zip(y.chunks(rows)) {
                    let mut alone = vec![0.0; rows];
                    fast(isa, &form, 0.7, x, &mut alone);
                    assert_eq!(alone, among, "{name}");
                }
            }
        }
        for (r, cols, rows) in [(1, 16, 64), (3, 60, 50), (4, 33, 130), (16, 576, 192)] {
            let scales: Vec<f32> = (0..rows).map(|row| 0.5 + row as f32 / 100.0).collect();
            // Values are rounded to 16 bits.
            for size in [1.0, 1e-3, 1e-7, 1e6] {
                let lora = update(r, cols, rows, size);
                for scales in [None, Some(&scales[..])] {
                    for n in [1, 2, 6] {
                        check::<f16>(&lora, scales, n, 6e-4);
                        check::<f32>(&lora, scales, n, 1e-6);
                    }
                }
            }
        }
    }

    #[test]
    fn non_finite_factors_give_non_finite_outputs() {
        let lora = update(4, 32, 70, 1.0);
        let mut b = lora.b.to_vec2::<f32>().unwrap();
        b[66][2] = f32::INFINITY;
        lora.b.set(&candle_core::Tensor::new(b, &Device::Cpu).unwrap()).unwrap();
        let form = DecodeWeights::<f16>::new(&lora, None).unwrap();
        let mut y = vec![0.0; 70];
        fast(Isa::current(), &form, 1.0, &[1.0; 32], &mut y);
        assert!(!y[66].is_finite() && y[65].is_finite());
    }
}
