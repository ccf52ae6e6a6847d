//! Sixteen rows of `Q4_0` or `Q4_1` at a time with AVX-512 VNNI: blocks are transposed in registers,
//! so that a lane belongs to a row, and scales and conversions are shared by sixteen.
//!
//! What a lane of the row kernels does with 2 products, one here does with 32: four rows of input
//! cost less than twice one.

use std::arch::x86_64::*;

use super::activations::Activations;
use super::kernel::{self, Output};
use super::x86::Avx512;
use crate::quant::BlockType;

/// Rows of a tile.
pub(super) const ROWS: usize = 16;
/// Bytes of the nibbles of a block, after its scale or its scale and minimum.
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
            BlockType::Q4_0 => inputs::<18>(bytes, x, output),
            BlockType::Q4_1 => inputs::<20>(bytes, x, output),
            _ => 0,
        };
        let rest = Output { first_row: output.first_row + tiled, ..*output };
        let bytes = &bytes[tiled * output.matrix.row_bytes()..];
        kernel::block_rows::<Avx512, i16>(bytes, x, &rest);
    }
}

/// Whole tiles of blocks of `BYTES` bytes, four, two and one rows of input at a time; returns how
/// many rows they were.
///
/// # Safety
/// As [`block_rows`].
unsafe fn inputs<const BYTES: usize>(bytes: &[u8], x: &Activations<i16>, output: &Output) -> usize {
    let tile_bytes = ROWS * output.matrix.row_bytes();
    let tiles = bytes.len() / tile_bytes;
    let bytes = &bytes[..tiles * tile_bytes];
    let mut first = 0;
    while first < x.m() {
        // SAFETY: the caller's promises.
        first += unsafe {
            match x.m() - first {
                1 => rows::<BYTES, 1, 4>(bytes, x, first, output),
                2 | 3 => rows::<BYTES, 2, 2>(bytes, x, first, output),
                _ => rows::<BYTES, 4, 1>(bytes, x, first, output),
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
unsafe fn rows<const BYTES: usize, const M: usize, const CHAINS: usize>(
    bytes: &[u8],
    x: &Activations<i16>,
    first: usize,
    output: &Output,
) -> usize {
    let row_bytes = output.matrix.row_bytes();
    let mask = _mm512_set1_epi16(15);
    for (tile, bytes) in bytes.chunks_exact(ROWS * row_bytes).enumerate() {
        let mut sums = [_mm512_setzero_ps(); M];
        let mut minima = [_mm512_setzero_ps(); M];
        for group in 0..x.groups() {
            let halves = |offset| {
                let at = |row: usize| {
                    let at = row * row_bytes + group * BYTES + offset;
                    // SAFETY: blocks are inside their rows.
                    unsafe { bytes.as_ptr().add(at).cast::<i16>().read_unaligned() }
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
            };
            let scales = halves(0);
            let least = if BYTES == NIBBLES + 4 { halves(2) } else { scales };
            let quarter = |i: usize| {
                let at = |row: usize| {
                    let at = row * row_bytes + (group + 1) * BYTES - NIBBLES;
                    // SAFETY: blocks are inside their rows.
                    unsafe { _mm_loadu_si128(bytes.as_ptr().add(at).cast()) }
                };
                let lower = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(at(i)), at(4 + i));
                let upper =
                    _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(at(8 + i)), at(12 + i));
                _mm512_inserti64x4::<1>(_mm512_castsi256_si512(lower), upper)
            };
            let dwords = transpose([quarter(0), quarter(1), quarter(2), quarter(3)]);
            for line in (0..ROWS * BYTES).step_by(64) {
                let next = ROWS * (row_bytes + group * BYTES) + line;
                _mm_prefetch::<_MM_HINT_T1>(bytes.as_ptr().wrapping_add(next).cast());
            }
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
                for i in 0..M {
                    let x = x.row(first + i)[group].0.as_ptr().cast::<i32>();
                    for j in 0..4 {
                        // SAFETY: a group is 16 pairs of values.
                        let pair = _mm512_set1_epi32(unsafe { *x.add(4 * j + k) });
                        let chain = &mut products[i][j % CHAINS];
                        *chain = _mm512_dpwssd_epi32(*chain, words[j], pair);
                    }
                }
            }
            for i in 0..M {
                let mut all = products[i][0];
                for chain in &products[i][1..] {
                    all = _mm512_add_epi32(all, *chain);
                }
                let (x_scales, x_sums) = x.factors(1, first + i, group);
                let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(all), _mm512_set1_ps(x_scales[0]));
                sums[i] = _mm512_fmadd_ps(scaled, scales, sums[i]);
                minima[i] = _mm512_fmadd_ps(least, _mm512_set1_ps(x_sums[0]), minima[i]);
            }
        }
        let mut y = [[0f32; ROWS]; M];
        for i in 0..M {
            // Values of Q4_0 are their nibbles less 8.
            let factor = _mm512_set1_ps(if BYTES == NIBBLES + 4 { 1.0 } else { -8.0 });
            let all = _mm512_fmadd_ps(minima[i], factor, sums[i]);
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
