//! How block types store integers and scales: the vectorized counterpart of the decoders in `quant`.
//!
//! For every type the dot product is the same sum over parts of a row,
//! `Σ scale · (q · x) + minimum · Σ x`, with unsigned or signed integers `q`: types whose values
//! are `q - 8` have the minimum `-8 · scale`.

#![allow(non_camel_case_types)] // the format's own names

use super::activations::LANES;
use super::i16_vector::I16Vector;
use crate::quant::{E2M1_TWICE, NON_LINEAR, half_e8m0, iq4_xs_scale};

/// An integer block type.
pub(super) trait Format {
    /// Groups of 32 values in a block: 1 or 8.
    const GROUPS: usize;
    /// Bytes of a block.
    const BYTES: usize;
    /// Scales per group of 32 values: 1 or 2.
    const PARTS: usize = 1;
    /// Whether the type has minima.
    const MINIMA: bool = true;

    /// Scales and minima of up to 16 blocks of 32 values, or of one larger block.
    ///
    /// # Safety
    /// The CPU must support the features of `W`.
    unsafe fn scales<W: I16Vector>(blocks: &[u8]) -> ([f32; LANES], [f32; LANES]);

    /// The integers of a block's `i`-th group.
    ///
    /// # Safety
    /// The CPU must support the features of `W`.
    unsafe fn words<W: I16Vector>(block: &[u8], i: usize) -> W;
}

pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q5_0;
pub(super) struct Q5_1;
pub(super) struct Q8_0;
pub(super) struct Q2_K;
pub(super) struct Q3_K;
pub(super) struct Q4_K;
pub(super) struct Q5_K;
pub(super) struct Q6_K;
pub(super) struct IQ4_NL;
pub(super) struct IQ4_XS;
pub(super) struct MXFP4;

impl Format for Q4_0 {
    const GROUPS: usize = 1;
    const BYTES: usize = 18;

    #[inline(always)]
    unsafe fn scales<W: I16Vector>(blocks: &[u8]) -> ([f32; LANES], [f32; LANES]) {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        let scales = unsafe { halves::<W, 18>(blocks, 0) };
        (scales, times(-8.0, scales))
    }

    #[inline(always)]
    unsafe fn words<W: I16Vector>(block: &[u8], _i: usize) -> W {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe { W::nibbles(at(block, 2)) }
    }
}

impl Format for Q4_1 {
    const GROUPS: usize = 1;
    const BYTES: usize = 20;

    #[inline(always)]
    unsafe fn scales<W: I16Vector>(blocks: &[u8]) -> ([f32; LANES], [f32; LANES]) {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe { (halves::<W, 20>(blocks, 0), halves::<W, 20>(blocks, 2)) }
    }

    #[inline(always)]
    unsafe fn words<W: I16Vector>(block: &[u8], _i: usize) -> W {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe { W::nibbles(at(block, 4)) }
    }
}

impl Format for Q5_0 {
    const GROUPS: usize = 1;
    const BYTES: usize = 22;

    #[inline(always)]
    unsafe fn scales<W: I16Vector>(blocks: &[u8]) -> ([f32; LANES], [f32; LANES]) {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        let scales = unsafe { halves::<W, 22>(blocks, 0) };
        (scales, times(-16.0, scales))
    }

    #[inline(always)]
    unsafe fn words<W: I16Vector>(block: &[u8], _i: usize) -> W {
        let high = u32::from_le_bytes(*at(block, 2));
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe { W::nibbles(at(block, 6)).or(W::fifth_bits(high)) }
    }
}

impl Format for Q5_1 {
    const GROUPS: usize = 1;
    const BYTES: usize = 24;

    #[inline(always)]
    unsafe fn scales<W: I16Vector>(blocks: &[u8]) -> ([f32; LANES], [f32; LANES]) {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe { (halves::<W, 24>(blocks, 0), halves::<W, 24>(blocks, 2)) }
    }

    #[inline(always)]
    unsafe fn words<W: I16Vector>(block: &[u8], _i: usize) -> W {
        let high = u32::from_le_bytes(*at(block, 4));
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe { W::nibbles(at(block, 8)).or(W::fifth_bits(high)) }
    }
}

impl Format for Q8_0 {
    const GROUPS: usize = 1;
    const BYTES: usize = 34;
    const MINIMA: bool = false;

    #[inline(always)]
    unsafe fn scales<W: I16Vector>(blocks: &[u8]) -> ([f32; LANES], [f32; LANES]) {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        let scales = unsafe { halves::<W, 34>(blocks, 0) };
        (times(1.0 / 256.0, scales), [0.0; LANES])
    }

    #[inline(always)]
    unsafe fn words<W: I16Vector>(block: &[u8], _i: usize) -> W {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe { W::signed_times_256(at(block, 2)) }
    }
}

impl Format for Q2_K {
    const GROUPS: usize = 8;
    const BYTES: usize = 84;
    const PARTS: usize = 2;

    #[inline(always)]
    unsafe fn scales<W: I16Vector>(block: &[u8]) -> ([f32; LANES], [f32; LANES]) {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        let (d, minimum) = unsafe { (half::<W>(block, 80), half::<W>(block, 82)) };
        let both: &[u8; 16] = at(block, 0);
        let (mut scales, mut minima) = ([0.0; LANES], [0.0; LANES]);
        for i in 0..LANES {
            scales[i] = d * f32::from(both[i] & 15);
            minima[i] = -minimum * f32::from(both[i] >> 4);
        }
        (scales, minima)
    }

    #[inline(always)]
    unsafe fn words<W: I16Vector>(block: &[u8], i: usize) -> W {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe { W::bits(at(block, 16 + i / 4 * 32), 2 * (i % 4), 3) }
    }
}

impl Format for Q3_K {
    const GROUPS: usize = 8;
    const BYTES: usize = 110;
    const PARTS: usize = 2;

    #[inline(always)]
    unsafe fn scales<W: I16Vector>(block: &[u8]) -> ([f32; LANES], [f32; LANES]) {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        let d = unsafe { half::<W>(block, 108) };
        // Four low bits of scales 0..8 and 8..16 in the nibbles of two words, two high bits of
        // scales 0..4, 4..8, 8..12 and 12..16 in the bit pairs of a third.
        let word = |i: usize| u32::from_le_bytes(*at(block, 96 + 4 * i));
        let (low, high) = ([word(0), word(1)], word(2));
        let mut scales = [0.0; LANES];
        for k in 0..4 {
            let low = low[k % 2] >> (4 * (k / 2)) & 0x0f0f_0f0f;
            let bytes = (low | (high >> (2 * k) & 0x0303_0303) << 4).to_le_bytes();
            for j in 0..4 {
                scales[4 * k + j] = d * (f32::from(bytes[j]) - 32.0);
            }
        }
        (scales, times(-4.0, scales))
    }

    #[inline(always)]
    unsafe fn words<W: I16Vector>(block: &[u8], i: usize) -> W {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe {
            let low = W::bits(at(block, 32 + i / 4 * 32), 2 * (i % 4), 3);
            low.or(W::bits(at(block, 0), i, 1).times(4))
        }
    }
}

impl Format for Q4_K {
    const GROUPS: usize = 8;
    const BYTES: usize = 144;

    #[inline(always)]
    unsafe fn scales<W: I16Vector>(block: &[u8]) -> ([f32; LANES], [f32; LANES]) {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe { scales_and_minima::<W>(block) }
    }

    #[inline(always)]
    unsafe fn words<W: I16Vector>(block: &[u8], i: usize) -> W {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe { W::bits(at(block, 16 + i / 2 * 32), 4 * (i % 2), 15) }
    }
}

impl Format for Q5_K {
    const GROUPS: usize = 8;
    const BYTES: usize = 176;

    #[inline(always)]
    unsafe fn scales<W: I16Vector>(block: &[u8]) -> ([f32; LANES], [f32; LANES]) {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe { scales_and_minima::<W>(block) }
    }

    #[inline(always)]
    unsafe fn words<W: I16Vector>(block: &[u8], i: usize) -> W {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe {
            let low = W::bits(at(block, 48 + i / 2 * 32), 4 * (i % 2), 15);
            low.or(W::bits(at(block, 16), i, 1).times(16))
        }
    }
}

impl Format for Q6_K {
    const GROUPS: usize = 8;
    const BYTES: usize = 210;
    const PARTS: usize = 2;

    #[inline(always)]
    unsafe fn scales<W: I16Vector>(block: &[u8]) -> ([f32; LANES], [f32; LANES]) {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        let d = unsafe { half::<W>(block, 208) };
        let of_parts: &[u8; 16] = at(block, 192);
        let mut scales = [0.0; LANES];
        for (scale, of_part) in scales.iter_mut().zip(of_parts) {
            *scale = d * f32::from(*of_part as i8);
        }
        (scales, times(-32.0, scales))
    }

    #[inline(always)]
    unsafe fn words<W: I16Vector>(block: &[u8], i: usize) -> W {
        // Within each half of 128, group k is the low or high nibbles of one of two ranges of 32 bytes.
        let (of_half, k) = (i / 4, i % 4);
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe {
            let low = W::bits(at(block, 64 * of_half + k % 2 * 32), k / 2 * 4, 15);
            low.or(W::bits(at(block, 128 + 32 * of_half), 2 * k, 3).times(16))
        }
    }
}

impl Format for IQ4_NL {
    const GROUPS: usize = 1;
    const BYTES: usize = 18;
    const MINIMA: bool = false;

    #[inline(always)]
    unsafe fn scales<W: I16Vector>(blocks: &[u8]) -> ([f32; LANES], [f32; LANES]) {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        let scales = unsafe { halves::<W, 18>(blocks, 0) };
        (times(1.0 / 256.0, scales), [0.0; LANES])
    }

    #[inline(always)]
    unsafe fn words<W: I16Vector>(block: &[u8], _i: usize) -> W {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe { W::signed_times_256(&looked_up(at(block, 2), &NON_LINEAR)) }
    }
}

impl Format for IQ4_XS {
    const GROUPS: usize = 8;
    const BYTES: usize = 136;
    const MINIMA: bool = false;

    #[inline(always)]
    unsafe fn scales<W: I16Vector>(block: &[u8]) -> ([f32; LANES], [f32; LANES]) {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        let d = unsafe { half::<W>(block, 0) };
        let mut scales = [0.0; LANES];
        for (i, scale) in scales.iter_mut().take(8).enumerate() {
            *scale = d * iq4_xs_scale(block, i) * (1.0 / 256.0);
        }
        (scales, [0.0; LANES])
    }

    #[inline(always)]
    unsafe fn words<W: I16Vector>(block: &[u8], i: usize) -> W {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe { W::signed_times_256(&looked_up(at(block, 8 + 16 * i), &NON_LINEAR)) }
    }
}

impl Format for MXFP4 {
    const GROUPS: usize = 1;
    const BYTES: usize = 17;
    const MINIMA: bool = false;

    #[inline(always)]
    unsafe fn scales<W: I16Vector>(blocks: &[u8]) -> ([f32; LANES], [f32; LANES]) {
        let mut scales = [0.0; LANES];
        for (scale, block) in scales.iter_mut().zip(blocks.as_chunks::<17>().0) {
            *scale = half_e8m0(block[0]) * (1.0 / 256.0);
        }
        (scales, [0.0; LANES])
    }

    #[inline(always)]
    unsafe fn words<W: I16Vector>(block: &[u8], _i: usize) -> W {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe { W::signed_times_256(&looked_up(at(block, 1), &E2M1_TWICE)) }
    }
}

/// Looks up the low nibbles of 16 bytes, then the high ones, in a table.
#[inline(always)]
fn looked_up(nibbles: &[u8; 16], table: &[i8; 16]) -> [u8; 32] {
    let mut values = [0; 32];
    for j in 0..16 {
        values[j] = table[usize::from(nibbles[j] & 15)] as u8;
        values[j + 16] = table[usize::from(nibbles[j] >> 4)] as u8;
    }
    values
}

/// All scales times a factor. (`array::map` is not always inlined, and then not vectorized.)
#[inline(always)]
fn times(factor: f32, mut scales: [f32; LANES]) -> [f32; LANES] {
    for scale in &mut scales {
        *scale *= factor;
    }
    scales
}

/// `N` bytes at an offset known at compile time.
#[inline(always)]
fn at<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..].first_chunk().expect("blocks are whole")
}

/// The `f16` at `offset`.
///
/// # Safety
/// The CPU must support the features of `W`.
#[inline(always)]
unsafe fn half<W: I16Vector>(block: &[u8], offset: usize) -> f32 {
    // SAFETY: this function's contract guarantees the CPU features of `W`.
    unsafe { W::half(u16::from_le_bytes(*at(block, offset))) }
}

/// The `f16` at `offset` of each of up to 16 blocks, zero-padded.
///
/// # Safety
/// The CPU must support the features of `W`.
#[inline(always)]
unsafe fn halves<W: I16Vector, const BYTES: usize>(blocks: &[u8], offset: usize) -> [f32; LANES] {
    let blocks = blocks.as_chunks::<BYTES>().0;
    let bits = |block: &[u8; BYTES]| u16::from_le_bytes([block[offset], block[offset + 1]]);
    // SAFETY: this function's contract guarantees the CPU features of `W`.
    unsafe {
        match blocks.first_chunk::<LANES>() {
            Some(blocks) => W::halves(|i| bits(&blocks[i])),
            None => W::halves(|i| blocks.get(i).map_or(0, bits)),
        }
    }
}

/// The 8 scales and minima of a `Q4_K` or `Q5_K` block: 6 bits each, packed into three words.
///
/// # Safety
/// The CPU must support the features of `W`.
#[inline(always)]
unsafe fn scales_and_minima<W: I16Vector>(block: &[u8]) -> ([f32; LANES], [f32; LANES]) {
    // SAFETY: this function's contract guarantees the CPU features of `W`.
    let (d, minimum) = unsafe { (half::<W>(block, 0), half::<W>(block, 2)) };
    let word = |i: usize| u32::from_le_bytes(*at(block, 4 + 4 * i));
    let (a, b, c) = (word(0), word(1), word(2));
    let bytes = |first: u32, last: u32| (u64::from(first) | u64::from(last) << 32).to_le_bytes();
    let scales = bytes(a & 0x3f3f_3f3f, c & 0x0f0f_0f0f | a >> 2 & 0x3030_3030);
    let minima = bytes(b & 0x3f3f_3f3f, c >> 4 & 0x0f0f_0f0f | b >> 2 & 0x3030_3030);
    let (mut d_scales, mut d_minima) = ([0.0; LANES], [0.0; LANES]);
    for i in 0..8 {
        d_scales[i] = d * f32::from(scales[i]);
        d_minima[i] = -minimum * f32::from(minima[i]);
    }
    (d_scales, d_minima)
}

/// A float type.
pub(super) trait FloatFormat {
    /// Bytes of a value.
    const BYTES: usize;

    /// As many values as a vector of `W` has lanes.
    ///
    /// # Safety
    /// The CPU must support the features of `W`; `bytes` must be that many values.
    unsafe fn load<W: I16Vector>(bytes: &[u8]) -> W::Sums;
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct BF16;

impl FloatFormat for F32 {
    const BYTES: usize = 4;

    #[inline(always)]
    unsafe fn load<W: I16Vector>(bytes: &[u8]) -> W::Sums {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe { W::load_f32(bytes) }
    }
}

impl FloatFormat for F16 {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<W: I16Vector>(bytes: &[u8]) -> W::Sums {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe { W::load_f16(bytes) }
    }
}

impl FloatFormat for BF16 {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<W: I16Vector>(bytes: &[u8]) -> W::Sums {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe { W::load_bf16(bytes) }
    }
}
