//! Sixteen rows of `Q4_0`, `Q4_1` or `Q4_K` at a time with AVX-512 VNNI: blocks are transposed in registers,
//! so that a lane belongs to a row, and scales and conversions are shared by sixteen.
//!
//! What a lane of the row kernels does with 2 products, one here does with 32: four rows of input
//! cost less than twice one.

#![allow(clippy::needless_range_loop)] // indices run over several arrays at once, in registers

use std::arch::x86_64::*;

use super::activations::Activations;
use super::kernel::{self, Output};
use super::x86::Avx512;
use crate::quant::BlockType;

/// Rows of a tile.
pub(super) const ROWS: usize = 16;
/// Bytes of the nibbles of a small block, after its scale or its scale and minimum.
const NIBBLES: usize = 16;

/// Rows of blocks times all rows of input; the last rows, too few for a tile, and other types take
/// the row kernels.
///
/// # Safety
/// The CPU must have AVX-512 F, BW, DQ, VL and VNNI, and no other thread may touch the elements of
/// `y` that belong to these rows.
pub(super) unsafe fn block_rows(bytes: &[u8], x: &Activations<i16>, output: &Output) {
    // SAFETY: the caller's promises.
    unsafe {
        let tiled = match output.matrix.block_type() {
            BlockType::Q4_0 => inputs::<Small<18>>(bytes, x, output),
            BlockType::Q4_1 => inputs::<Small<20>>(bytes, x, output),
            BlockType::Q4_K => inputs::<Large>(bytes, x, output),
            _ => 0,
        };
        let rest = Output { first_row: output.first_row + tiled, ..*output };
        let bytes = &bytes[tiled * output.matrix.row_bytes()..];
        kernel::block_rows::<Avx512, i16>(bytes, x, &rest);
    }
}

/// Whole tiles, four, two and one rows of input at a time; returns how many rows they were.
///
/// # Safety
/// As [`block_rows`].
unsafe fn inputs<B: Block>(bytes: &[u8], x: &Activations<i16>, output: &Output) -> usize {
    let tile_bytes = ROWS * output.matrix.row_bytes();
    let tiles = bytes.len() / tile_bytes;
    let bytes = &bytes[..tiles * tile_bytes];
    let mut first = 0;
    while first < x.m() {
        // SAFETY: the caller's promises.
        first += unsafe {
            match x.m() - first {
                1 => rows::<B, 1, 4>(bytes, x, first, output),
                2 | 3 => rows::<B, 2, 2>(bytes, x, first, output),
                _ => rows::<B, 4, 1>(bytes, x, first, output),
            }
        };
    }
    tiles * ROWS
}

/// Whole tiles times `M` rows of input from `first` on; returns `M`. `CHAINS` sums of integers per
/// row of input keep the instructions from waiting for each other.
///
/// # Safety
/// As [`block_rows`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn rows<B: Block, const M: usize, const CHAINS: usize>(
    bytes: &[u8],
    x: &Activations<i16>,
    first: usize,
    output: &Output,
) -> usize {
    let row_bytes = output.matrix.row_bytes();
    for (tile, bytes) in bytes.chunks_exact(ROWS * row_bytes).enumerate() {
        let mut sums =
            Sums::<M> { scaled: [_mm512_setzero_ps(); M], minima: [_mm512_setzero_ps(); M] };
        for block in 0..x.groups() / B::GROUPS {
            for line in (0..ROWS * B::BYTES).step_by(64) {
                let next = ROWS * (row_bytes + block * B::BYTES) + line;
                _mm_prefetch::<_MM_HINT_T1>(bytes.as_ptr().wrapping_add(next).cast());
            }
            let blocks = Blocks { start: bytes[block * B::BYTES..].as_ptr(), row_bytes };
            // SAFETY: the CPU has the instructions, and every row such a block.
            unsafe { B::add::<M, CHAINS>(blocks, x, first, block * B::GROUPS, &mut sums) };
        }
        let mut y = [[0f32; ROWS]; M];
        for i in 0..M {
            let all = _mm512_fmadd_ps(sums.minima[i], _mm512_set1_ps(B::MINIMUM), sums.scaled[i]);
            // SAFETY: 16 values.
            unsafe { _mm512_storeu_ps(y[i].as_mut_ptr(), all) };
        }
        for row in 0..ROWS {
            let mut of_row = [0.0; M];
            for i in 0..M {
                of_row[i] = y[i][row];
            }
            // SAFETY: the caller's promise.
            unsafe { output.put(tile * ROWS + row, first, &of_row) };
        }
    }
    M
}

/// What the sixteen rows of a tile come to for each row of input.
struct Sums<const M: usize> {
    scaled: [__m512; M],
    minima: [__m512; M],
}

/// The same block of sixteen rows.
#[derive(Clone, Copy)]
struct Blocks {
    start: *const u8,
    row_bytes: usize,
}

/// A type of blocks with nibbles.
trait Block {
    /// Groups of 32 values.
    const GROUPS: usize;
    const BYTES: usize;
    /// What the second factors of blocks are multiples of, as a part of a value.
    const MINIMUM: f32;

    /// Adds the products of a block of each row with groups from `group` on.
    ///
    /// # Safety
    /// The CPU must have the instructions, and `blocks` be readable.
    unsafe fn add<const M: usize, const CHAINS: usize>(
        blocks: Blocks,
        x: &Activations<i16>,
        first: usize,
        group: usize,
        sums: &mut Sums<M>,
    );
}

/// `Q4_0` of 18 bytes or `Q4_1` of 20.
struct Small<const BYTES: usize>;

impl<const BYTES: usize> Block for Small<BYTES> {
    const GROUPS: usize = 1;
    const BYTES: usize = BYTES;
    // Values of Q4_0 are their nibbles less 8.
    const MINIMUM: f32 = if BYTES == NIBBLES + 4 { 1.0 } else { -8.0 };

    #[inline(always)]
    unsafe fn add<const M: usize, const CHAINS: usize>(
        blocks: Blocks,
        x: &Activations<i16>,
        first: usize,
        group: usize,
        sums: &mut Sums<M>,
    ) {
        // SAFETY: the caller's promises.
        unsafe {
            let scales = blocks.halves(0);
            let minima = if BYTES == NIBBLES + 4 { blocks.halves(2) } else { scales };
            let dwords = blocks.dwords(BYTES - NIBBLES);
            let mask = _mm512_set1_epi16(15);
            let pairs = pairs(x, first, group);
            let mut products = [[_mm512_setzero_si512(); CHAINS]; M];
            for k in 0..4 {
                let q = dwords[k];
                // Even values of both halves of a group, then odd ones: the order of the input.
                let words = [
                    _mm512_and_si512(q, mask),
                    _mm512_and_si512(_mm512_srli_epi16::<4>(q), mask),
                    _mm512_and_si512(_mm512_srli_epi16::<8>(q), mask),
                    _mm512_srli_epi16::<12>(q),
                ];
                for (j, words) in words.into_iter().enumerate() {
                    multiply(&mut products, words, &pairs, 4 * j + k);
                }
            }
            add_scaled(sums, products, scales, minima, x, first, group);
        }
    }
}

/// `Q4_K`.
struct Large;

impl Block for Large {
    const GROUPS: usize = 8;
    const BYTES: usize = 144;
    const MINIMUM: f32 = -1.0;

    #[inline(always)]
    unsafe fn add<const M: usize, const CHAINS: usize>(
        blocks: Blocks,
        x: &Activations<i16>,
        first: usize,
        group: usize,
        sums: &mut Sums<M>,
    ) {
        // SAFETY: the caller's promises.
        unsafe {
            // Both scales of a row, then its 8 scales and minima of 6 bits in three words.
            let [both, a, b, c] = blocks.dwords(0);
            let scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
            let minimum = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(both)));
            let field = |word, shift: usize, mask| {
                let shifted = _mm512_srl_epi32(word, _mm_cvtsi32_si128(shift as i32));
                _mm512_and_si512(shifted, _mm512_set1_epi32(mask))
            };
            let high = |word, i: usize| {
                // Its two bits land above the four.
                _mm512_slli_epi32::<4>(field(word, 8 * i + 6, 3))
            };
            let mask = _mm512_set1_epi16(15);
            for pair in 0..4 {
                let at = 16 + 32 * pair;
                let dwords = [blocks.dwords(at), blocks.dwords(at + 16)];
                for half in 0..2 {
                    let i = 2 * pair + half;
                    let (scales, minima) = if i < 4 {
                        (field(a, 8 * i, 63), field(b, 8 * i, 63))
                    } else {
                        let i = i - 4;
                        let (low, upper) = (field(c, 8 * i, 15), field(c, 8 * i + 4, 15));
                        (_mm512_or_si512(low, high(a, i)), _mm512_or_si512(upper, high(b, i)))
                    };
                    let pairs = pairs(x, first, group + i);
                    let mut products = [[_mm512_setzero_si512(); CHAINS]; M];
                    for k in 0..8 {
                        let q = dwords[k / 4][k % 4];
                        let q = if half == 0 { q } else { _mm512_srli_epi16::<4>(q) };
                        let even = _mm512_and_si512(q, mask);
                        let odd = _mm512_and_si512(_mm512_srli_epi16::<8>(q), mask);
                        multiply(&mut products, even, &pairs, k);
                        multiply(&mut products, odd, &pairs, 8 + k);
                    }
                    let scales = _mm512_mul_ps(_mm512_cvtepi32_ps(scales), scale);
                    let minima = _mm512_mul_ps(_mm512_cvtepi32_ps(minima), minimum);
                    add_scaled(sums, products, scales, minima, x, first, group + i);
                }
            }
        }
    }
}

/// A group of each row of input, as 16 pairs of values.
#[inline(always)]
fn pairs<const M: usize>(x: &Activations<i16>, first: usize, group: usize) -> [*const i32; M] {
    let mut pairs = [std::ptr::null(); M];
    for i in 0..M {
        pairs[i] = x.row(first + i)[group].0.as_ptr().cast();
    }
    pairs
}

/// Adds the products of words with the `pair`-th two values of a group of each row of input.
///
/// # Safety
/// The CPU must have the instructions, and `pairs` be of groups.
#[inline(always)]
unsafe fn multiply<const M: usize, const CHAINS: usize>(
    products: &mut [[__m512i; CHAINS]; M],
    words: __m512i,
    pairs: &[*const i32; M],
    pair: usize,
) {
    for i in 0..M {
        let chain = &mut products[i][pair % CHAINS];
        // SAFETY: the caller's promises.
        unsafe {
            *chain = _mm512_dpwssd_epi32(*chain, words, _mm512_set1_epi32(*pairs[i].add(pair)));
        }
    }
}

/// Adds the products of a group, times the scales of both sides, and its minima times sums.
///
/// # Safety
/// The CPU must have the instructions.
#[inline(always)]
unsafe fn add_scaled<const M: usize, const CHAINS: usize>(
    sums: &mut Sums<M>,
    products: [[__m512i; CHAINS]; M],
    scales: __m512,
    minima: __m512,
    x: &Activations<i16>,
    first: usize,
    group: usize,
) {
    for i in 0..M {
        let (x_scales, x_sums) = x.factors(1, first + i, group);
        // SAFETY: the caller's promise.
        unsafe {
            let mut all = products[i][0];
            for chain in &products[i][1..] {
                all = _mm512_add_epi32(all, *chain);
            }
            let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(all), _mm512_set1_ps(x_scales[0]));
            sums.scaled[i] = _mm512_fmadd_ps(scaled, scales, sums.scaled[i]);
            sums.minima[i] = _mm512_fmadd_ps(minima, _mm512_set1_ps(x_sums[0]), sums.minima[i]);
        }
    }
}

impl Blocks {
    /// The `f16` at `offset` of each row's block.
    ///
    /// # Safety
    /// The CPU must have the instructions, and the blocks be readable.
    #[inline(always)]
    unsafe fn halves(self, offset: usize) -> __m512 {
        // SAFETY: the caller's promises.
        unsafe {
            let at = |row: usize| {
                let at = self.start.add(row * self.row_bytes + offset);
                at.cast::<i16>().read_unaligned()
            };
            let halves = _mm256_setr_epi16(
                at(0),
                at(1),
                at(2),
                at(3),
                at(4),
                at(5),
                at(6),
                at(7),
                at(8),
                at(9),
                at(10),
                at(11),
                at(12),
                at(13),
                at(14),
                at(15),
            );
            _mm512_cvtph_ps(halves)
        }
    }

    /// Four times four bytes from `offset` on, of all rows.
    ///
    /// # Safety
    /// As [`Self::halves`].
    #[inline(always)]
    unsafe fn dwords(self, offset: usize) -> [__m512i; 4] {
        // SAFETY: the caller's promises.
        unsafe {
            let at =
                |row: usize| _mm_loadu_si128(self.start.add(row * self.row_bytes + offset).cast());
            let quarters = |i: usize| {
                let lower = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(at(i)), at(4 + i));
                let upper =
                    _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(at(8 + i)), at(12 + i));
                _mm512_inserti64x4::<1>(_mm512_castsi256_si512(lower), upper)
            };
            transpose([quarters(0), quarters(1), quarters(2), quarters(3)])
        }
    }
}

/// Vector `j` holds 16 bytes of rows `j`, `4 + j`, `8 + j` and `12 + j`; result `k` the `k`-th four
/// bytes of all rows in their order.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
    let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
    [
        _mm512_unpacklo_epi64(ab, cd),
        _mm512_unpackhi_epi64(ab, cd),
        _mm512_unpacklo_epi64(ab_high, cd_high),
        _mm512_unpackhi_epi64(ab_high, cd_high),
    ]
}
