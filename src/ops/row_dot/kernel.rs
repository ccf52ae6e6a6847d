//! The loop over rows of blocks: two rows of weights at a time, each decoded once for up to four
//! rows of input.

#![allow(clippy::needless_range_loop)] // indices run over several arrays at once, in registers

use super::activations::{ActivationGroup, Activations, GROUP_LEN, LANES};
use super::formats::*;
use super::i16_vector::{ActivationValue, I16Vector};
use crate::ops::cpu::SharedMutPtr;
use crate::quant::{BlockType, FrozenMatrix};

/// The prefetch distance: the same offset in a later pair of rows, at least
/// a page away.
#[inline(always)]
pub(super) fn ahead(row_bytes: usize) -> usize {
    4096usize.next_multiple_of(2 * row_bytes)
}

/// Where the products of stored rows go.
pub(super) struct Output<'a> {
    pub matrix: &'a FrozenMatrix,
    /// Index of the first stored row in the bytes.
    pub first_row: usize,
    pub y: SharedMutPtr, // (m, stride)
    /// Outputs per row of input: those of this matrix, and of matrices stored side by side with it.
    pub stride: usize,
}

impl Output<'_> {
    /// Stores the products of the `row`-th of these rows with inputs from `first` on.
    ///
    /// # Safety
    /// No other thread may access those elements of `y`.
    #[inline(always)]
    pub(super) unsafe fn put(&self, row: usize, first: usize, values: &[f32]) {
        let row = self.matrix.logical_row(self.first_row + row);
        for (i, value) in values.iter().enumerate() {
            let at = (first + i) * self.stride + row;
            // SAFETY: guaranteed by this function's safety contract.
            unsafe { self.y.at(at).slice(1)[0] = *value };
        }
    }
}

/// Rows of blocks times all rows of input.
///
/// # Safety
/// The CPU must support the features of `W`, and no other thread may access the elements of `y`
/// that belong to these rows.
pub(super) unsafe fn block_rows<W: I16Vector, T: ActivationValue>(
    bytes: &[u8],
    x: &Activations<T>,
    output: &Output,
) {
    // SAFETY: guaranteed by this function's safety contract.
    unsafe {
        match output.matrix.block_type() {
            BlockType::Q4_0 => inputs::<W, Q4_0, T>(bytes, x, output),
            BlockType::Q4_1 => inputs::<W, Q4_1, T>(bytes, x, output),
            BlockType::Q5_0 => inputs::<W, Q5_0, T>(bytes, x, output),
            BlockType::Q5_1 => inputs::<W, Q5_1, T>(bytes, x, output),
            BlockType::Q8_0 => inputs::<W, Q8_0, T>(bytes, x, output),
            BlockType::Q2_K => inputs::<W, Q2_K, T>(bytes, x, output),
            BlockType::Q3_K => inputs::<W, Q3_K, T>(bytes, x, output),
            BlockType::Q4_K => inputs::<W, Q4_K, T>(bytes, x, output),
            BlockType::Q5_K => inputs::<W, Q5_K, T>(bytes, x, output),
            BlockType::Q6_K => inputs::<W, Q6_K, T>(bytes, x, output),
            BlockType::IQ4_NL => inputs::<W, IQ4_NL, T>(bytes, x, output),
            BlockType::IQ4_XS => inputs::<W, IQ4_XS, T>(bytes, x, output),
            BlockType::MXFP4 => inputs::<W, MXFP4, T>(bytes, x, output),
            BlockType::F32 | BlockType::F16 | BlockType::BF16 => unreachable!("not in blocks"),
        }
    }
}

/// One row of input at a time: for few rows of weights, of which nothing is to be gained by more.
///
/// # Safety
/// As [`block_rows`].
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn single_inputs<W: I16Vector, F: Format, T: ActivationValue>(
    bytes: &[u8],
    x: &Activations<T>,
    output: &Output,
) {
    for row in 0..x.m() {
        // SAFETY: guaranteed by this function's safety contract.
        unsafe { W::blocks::<F, T, 1>(bytes, x, row, output) };
    }
}

/// Four, two and one rows of input at a time.
///
/// # Safety
/// As [`block_rows`].
pub(super) unsafe fn inputs<W: I16Vector, F: Format, T: ActivationValue>(
    bytes: &[u8],
    x: &Activations<T>,
    output: &Output,
) {
    let mut first = 0;
    while first < x.m() {
        // SAFETY: guaranteed by this function's safety contract.
        first += unsafe {
            match x.m() - first {
                1 => W::blocks::<F, T, 1>(bytes, x, first, output),
                2 | 3 => W::blocks::<F, T, 2>(bytes, x, first, output),
                _ => W::blocks::<F, T, 4>(bytes, x, first, output),
            }
        };
    }
}

/// Rows of blocks times `M` rows of input from `first` on; returns `M`.
///
/// # Safety
/// As [`block_rows`]; to be compiled into a function with the features of `W`.
#[inline(always)]
pub(super) unsafe fn blocks<W: I16Vector, F: Format, T: ActivationValue, const M: usize>(
    bytes: &[u8],
    x: &Activations<T>,
    first: usize,
    output: &Output,
) -> usize {
    let row_bytes = output.matrix.row_bytes();
    let ahead = ahead(row_bytes);
    let chunk = if F::GROUPS == 1 { LANES } else { F::GROUPS };
    let whole = x.groups() / chunk * chunk;
    for (pair, bytes) in bytes.chunks(2 * row_bytes).enumerate() {
        // An odd last row is its own partner.
        let rows = [&bytes[..row_bytes], &bytes[bytes.len() - row_bytes..]];
        let mut y = [[0.0; M]; 2];
        // SAFETY: guaranteed by this function's safety contract.
        unsafe {
            let mut sums = [[W::zero(); M]; 2];
            for group in (0..whole).step_by(chunk) {
                add_chunk::<W, F, T, M>(rows, ahead, x, first, group, chunk, &mut sums);
            }
            if whole < x.groups() {
                add_chunk::<W, F, T, M>(
                    rows,
                    ahead,
                    x,
                    first,
                    whole,
                    x.groups() - whole,
                    &mut sums,
                );
            }
            for r in 0..2 {
                for i in 0..M {
                    y[r][i] = W::total(sums[r][i]);
                }
            }
            output.put(2 * pair, first, &y[0]);
            if bytes.len() > row_bytes {
                output.put(2 * pair + 1, first, &y[1]);
            }
        }
    }
    M
}

/// Adds the products of `n` groups from `group` on: 16 blocks of one group or fewer, or one block.
///
/// # Safety
/// As [`blocks`].
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn add_chunk<W: I16Vector, F: Format, T: ActivationValue, const M: usize>(
    rows: [&[u8]; 2],
    ahead: usize,
    x: &Activations<T>,
    first: usize,
    group: usize,
    n: usize,
    sums: &mut [[W::Sums; M]; 2],
) {
    let (start, end) = (group / F::GROUPS * F::BYTES, (group + n) / F::GROUPS * F::BYTES);
    let blocks = [&rows[0][start..end], &rows[1][start..end]];
    let mut scales = [[[0f32; LANES]; M]; 2];
    let mut xs = [x.row(first).as_ptr(); M];
    for i in 0..M {
        xs[i] = x.row(first + i)[group..group + n].as_ptr();
    }
    // SAFETY: this function's contract guarantees the CPU features of `W`; groups are inside the slices just taken.
    unsafe {
        for r in 0..2 {
            let (of_parts, minima) = F::scales::<W>(blocks[r]);
            for i in 0..M {
                let (x_scales, x_sums) = x.factors(F::PARTS, first + i, group);
                scales[r][i] = W::products(&of_parts, x_scales);
                if F::MINIMA {
                    sums[r][i] = W::add_products(sums[r][i], &minima, x_sums);
                }
            }
        }
        let bytes = [blocks[0].as_ptr(), blocks[1].as_ptr()];
        if F::GROUPS == 1 {
            for g in 0..n {
                let bytes = [bytes[0].add(g * F::BYTES), bytes[1].add(g * F::BYTES)];
                add_group::<W, F, T, M>(bytes, ahead, &xs, &scales, g, 0, sums);
            }
        } else if W::UNROLLED {
            // Unrolled by hand, so that shifts and offsets are compile-time constants.
            add_group::<W, F, T, M>(bytes, ahead, &xs, &scales, 0, 0, sums);
            add_group::<W, F, T, M>(bytes, ahead, &xs, &scales, 1, 1, sums);
            add_group::<W, F, T, M>(bytes, ahead, &xs, &scales, 2, 2, sums);
            add_group::<W, F, T, M>(bytes, ahead, &xs, &scales, 3, 3, sums);
            add_group::<W, F, T, M>(bytes, ahead, &xs, &scales, 4, 4, sums);
            add_group::<W, F, T, M>(bytes, ahead, &xs, &scales, 5, 5, sums);
            add_group::<W, F, T, M>(bytes, ahead, &xs, &scales, 6, 6, sums);
            add_group::<W, F, T, M>(bytes, ahead, &xs, &scales, 7, 7, sums);
        } else {
            for g in 0..n {
                add_group::<W, F, T, M>(bytes, ahead, &xs, &scales, g, g, sums);
            }
        }
    }
}

/// Adds the products of the `g`-th group of a chunk, which is the `of_block`-th of its block.
///
/// # Safety
/// As [`blocks`]; `blocks` must be whole blocks, and each of `xs` have a `g`-th group.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn add_group<W: I16Vector, F: Format, T: ActivationValue, const M: usize>(
    blocks: [*const u8; 2],
    ahead: usize,
    xs: &[*const ActivationGroup<T>; M],
    scales: &[[[f32; LANES]; M]; 2],
    g: usize,
    of_block: usize,
    sums: &mut [[W::Sums; M]; 2],
) {
    for r in 0..2 {
        // SAFETY: this function's contract guarantees the CPU features of `W`; a chunk has at most 16 scales.
        unsafe {
            // One cache line per group, spread evenly: bursts exhaust the line fill buffers.
            W::prefetch(blocks[r].wrapping_add(ahead + of_block * F::BYTES / F::GROUPS));
            let words: W = F::words(std::slice::from_raw_parts(blocks[r], F::BYTES), of_block);
            for i in 0..M {
                let products = T::dot(words, &(*xs[i].add(g)).0);
                let scale = scales[r][i].as_ptr().add(F::PARTS * g);
                sums[r][i] = if F::PARTS == 1 {
                    W::add_scaled(sums[r][i], products, *scale)
                } else {
                    W::add_scaled_halves(sums[r][i], products, [*scale, *scale.add(1)])
                };
            }
        }
    }
}

/// Rows of floats times all rows of input, in `f32`.
///
/// # Safety
/// As [`block_rows`].
pub(super) unsafe fn float_rows<W: I16Vector>(bytes: &[u8], x: &Activations<f32>, output: &Output) {
    // SAFETY: guaranteed by this function's safety contract.
    unsafe {
        match output.matrix.block_type() {
            BlockType::F32 => float_inputs::<W, F32>(bytes, x, output),
            BlockType::F16 => float_inputs::<W, F16>(bytes, x, output),
            BlockType::BF16 => float_inputs::<W, BF16>(bytes, x, output),
            _ => unreachable!("no floats"),
        }
    }
}

/// Four, two and one rows of input at a time.
///
/// # Safety
/// As [`block_rows`].
unsafe fn float_inputs<W: I16Vector, F: FloatFormat>(
    bytes: &[u8],
    x: &Activations<f32>,
    output: &Output,
) {
    let mut first = 0;
    while first < x.m() {
        // SAFETY: guaranteed by this function's safety contract.
        first += unsafe {
            match x.m() - first {
                1 => W::floats::<F, 1>(bytes, x, first, output),
                2 | 3 => W::floats::<F, 2>(bytes, x, first, output),
                _ => W::floats::<F, 4>(bytes, x, first, output),
            }
        };
    }
}

/// Rows of floats times `M` rows of input from `first` on; returns `M`.
///
/// # Safety
/// As [`blocks`].
#[inline(always)]
pub(super) unsafe fn floats<W: I16Vector, F: FloatFormat, const M: usize>(
    bytes: &[u8],
    x: &Activations<f32>,
    first: usize,
    output: &Output,
) -> usize {
    let row_bytes = output.matrix.row_bytes();
    let ahead = ahead(row_bytes);
    let group_bytes = GROUP_LEN * F::BYTES;
    for (pair, bytes) in bytes.chunks(2 * row_bytes).enumerate() {
        // An odd last row is its own partner.
        let rows = [&bytes[..row_bytes], &bytes[bytes.len() - row_bytes..]];
        let mut y = [[0.0; M]; 2];
        // SAFETY: guaranteed by this function's safety contract.
        unsafe {
            let mut sums = [[W::zero(); M]; 2];
            let whole = row_bytes / group_bytes;
            for group in 0..whole {
                let at = group * group_bytes;
                let (a, b) = (&rows[0][at..at + group_bytes], &rows[1][at..at + group_bytes]);
                add_floats::<W, F, M>([a, b], ahead, x, first, group, &mut sums);
            }
            if whole < x.groups() {
                let mut last = [[0u8; 4 * GROUP_LEN]; 2];
                let rest = row_bytes - whole * group_bytes;
                for r in 0..2 {
                    last[r][..rest].copy_from_slice(&rows[r][whole * group_bytes..]);
                }
                let (a, b) = (&last[0][..group_bytes], &last[1][..group_bytes]);
                add_floats::<W, F, M>([a, b], ahead, x, first, whole, &mut sums);
            }
            for r in 0..2 {
                for i in 0..M {
                    y[r][i] = W::total(sums[r][i]);
                }
            }
            output.put(2 * pair, first, &y[0]);
            if bytes.len() > row_bytes {
                output.put(2 * pair + 1, first, &y[1]);
            }
        }
    }
    M
}

/// Adds the products of one group.
///
/// # Safety
/// As [`blocks`].
#[inline(always)]
unsafe fn add_floats<W: I16Vector, F: FloatFormat, const M: usize>(
    rows: [&[u8]; 2],
    ahead: usize,
    x: &Activations<f32>,
    first: usize,
    group: usize,
    sums: &mut [[W::Sums; M]; 2],
) {
    for r in 0..2 {
        for line in (0..rows[r].len()).step_by(64) {
            W::prefetch(rows[r].as_ptr().wrapping_add(ahead + line));
        }
    }
    let mut xs = [&x.row(first)[group].0; M];
    for i in 0..M {
        xs[i] = &x.row(first + i)[group].0;
    }
    for step in 0..GROUP_LEN / W::LANES {
        for r in 0..2 {
            let bytes = &rows[r][step * W::LANES * F::BYTES..][..W::LANES * F::BYTES];
            // SAFETY: guaranteed by this function's safety contract.
            unsafe {
                let w = F::load::<W>(bytes);
                for i in 0..M {
                    let x = &xs[i][step * W::LANES..][..W::LANES];
                    sums[r][i] = W::add_loaded(sums[r][i], w, x);
                }
            }
        }
    }
}
