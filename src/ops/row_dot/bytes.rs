//! AVX-512 VNNI kernels for `Q8_0` and `Q6_K`: a single row of input streams through the weights row by row,
//! because memory bandwidth is the bound then; several rows of input share tiles of sixteen rows.
//!
//! Both sum in the same order, so that a row gives the same bits alone and in a batch. The products of a
//! group of `Q8_0`, or of a half group of `Q6_K`, which has its own scale, are summed exactly, as
//! integers; times its scales, the `n`-th of a row goes to sum `n % 16`, and the sixteen sums are added
//! in the order of [`total`] at the end.
//!
//! The input of the row-by-row kernel is rounded to the same integers and split into bytes, `128 · high + low`,
//! for an instruction that multiplies 64 of them.

#![allow(clippy::needless_range_loop)] // indices run over several arrays at once, in registers

use std::arch::x86_64::*;

use super::activations::{ActivationBatch, ActivationBatches, Activations, GROUP_LEN, LANES};
use super::kernel::Output;
use super::tile::{
    Blocks, ROWS, lower_halves, multiply, prefetch_next_tile, store_tile, sum_chains,
};
use super::x86::sixteen_words;
use crate::quant::BlockType;

/// Prefetch distance in bytes.
const PREFETCH_DISTANCE: usize = 8192;
/// Offsets that make weights unsigned, so that multiples of the sums of the input must be subtracted:
/// weights of `Q8_0` are multiplied as `q + 128`, those of `Q6_K` as they are stored, `q + 32`.
const Q8_0_OFFSET: i32 = 128;
const Q6_K_OFFSET: i32 = 32;

/// Whether these kernels support a block type.
pub(super) fn has(block_type: BlockType) -> bool {
    matches!(block_type, BlockType::Q8_0 | BlockType::Q6_K)
}

/// Rows of input in bytes.
pub(super) struct ByteActivations {
    /// Two groups each, in the order of the values; `(m, pairs)`.
    values: Vec<BytePair>,
    /// Sums of whole groups and of half groups times the offsets of the weights, in lane order;
    /// `(m, strides)`.
    group_sums: Vec<i32>,
    half_sums: Vec<i32>,
    pairs: usize,
    strides: [usize; 2],
}

/// 64 values, `128 · high + low`.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct BytePair {
    high: [i8; 2 * GROUP_LEN],
    low: [i8; 2 * GROUP_LEN],
}

impl ByteActivations {
    /// # Safety
    /// The CPU must support AVX-512 F and BW.
    pub(super) unsafe fn new(x: &Activations<i16>) -> Self {
        let (m, groups) = (x.m(), x.groups());
        let pairs = groups.div_ceil(2);
        let zeros = BytePair { high: [0; 2 * GROUP_LEN], low: [0; 2 * GROUP_LEN] };
        let strides = [groups, 2 * groups].map(|n| n.next_multiple_of(LANES));
        let mut bytes = Self {
            values: vec![zeros; m * pairs],
            group_sums: vec![0; m * strides[0]],
            half_sums: vec![0; m * strides[1]],
            pairs,
            strides,
        };
        for row in 0..m {
            // SAFETY: this function's contract guarantees AVX-512 and VNNI, and exclusive access to the
            // outputs.
            unsafe { bytes.fill(x, row) };
        }
        bytes
    }

    #[target_feature(enable = "avx2,avx512f,avx512bw")]
    unsafe fn fill(&mut self, x: &Activations<i16>, row: usize) {
        let values = &mut self.values[row * self.pairs..];
        let group_sums = &mut self.group_sums[row * self.strides[0]..];
        let half_sums = &mut self.half_sums[row * self.strides[1]..];
        for (i, group) in x.row(row).iter().enumerate() {
            let pair = &mut values[i / 2];
            let at = i % 2 * GROUP_LEN;
            // SAFETY: a group is 64 bytes, and halves of pairs are 32.
            unsafe {
                // Values of even index, then those of odd index.
                let x = _mm512_load_si512(group.0.as_ptr().cast());
                let in_order = |words: __m512i| {
                    let odd = _mm256_slli_epi16::<8>(_mm512_extracti64x4_epi64::<1>(words));
                    let even = _mm512_castsi512_si256(words);
                    _mm256_or_si256(_mm256_and_si256(even, _mm256_set1_epi16(0xff)), odd)
                };
                let high = in_order(_mm512_srai_epi16::<7>(x));
                let low = in_order(_mm512_and_si512(x, _mm512_set1_epi16(127)));
                _mm256_storeu_si256(pair.high[at..].as_mut_ptr().cast(), high);
                _mm256_storeu_si256(pair.low[at..].as_mut_ptr().cast(), low);
                let sums = _mm512_madd_epi16(x, _mm512_set1_epi16(1));
                let upper = _mm512_extracti64x4_epi64::<1>(sums);
                let mut both = [0i32; 8]; // four sums of each half
                let sums = _mm256_add_epi32(_mm512_castsi512_si256(sums), upper);
                _mm256_storeu_si256(both.as_mut_ptr().cast(), sums);
                // Wrapping: NaN and Inf were rounded to arbitrary integers, and their scale is NaN.
                let sum = |four: &[i32]| four.iter().fold(0i32, |sum, x| sum.wrapping_add(*x));
                let (first, last) = (sum(&both[..4]), sum(&both[4..]));
                group_sums[i] = first.wrapping_add(last).wrapping_mul(Q8_0_OFFSET);
                half_sums[2 * i] = first.wrapping_mul(Q6_K_OFFSET);
                half_sums[2 * i + 1] = last.wrapping_mul(Q6_K_OFFSET);
            }
        }
    }

    /// Two groups of a row: high bytes, then low ones.
    #[inline(always)]
    fn pair(&self, row: usize, pair: usize) -> *const __m512i {
        (&raw const self.values[row * self.pairs + pair]).cast()
    }
}

/// Rows of blocks times all rows of input. `bytes` must be `Some` where [`needs`] returns true.
///
/// # Safety
/// The CPU must support AVX-512 F, BW, DQ, VL and VNNI, and no other thread may access the elements of
/// `y` that belong to these rows.
pub(super) unsafe fn block_rows(
    weights: &[u8],
    x: &Activations<i16>,
    (batches, bytes): (&ActivationBatches, Option<&ByteActivations>),
    output: &Output,
) {
    let tiled = weights.len() / output.matrix.row_bytes() / ROWS * ROWS;
    let (tiles, last) = weights.split_at(tiled * output.matrix.row_bytes());
    let rest = Output { first_row: output.first_row + tiled, ..*output };
    for batch in batches.iter() {
        let rows = batch.rows.clone();
        // SAFETY: this function's contract guarantees AVX-512 and VNNI, and exclusive access to the outputs.
        unsafe {
            match (output.matrix.block_type(), rows.len()) {
                (BlockType::Q8_0, 2) => tile::<ByteQ8_0, 2, 2>(tiles, batch, output),
                (BlockType::Q8_0, 4) => tile::<ByteQ8_0, 4, 1>(tiles, batch, output),
                (BlockType::Q8_0, 8) => tile::<ByteQ8_0, 8, 1>(tiles, batch, output),
                (BlockType::Q6_K, 2) => tile::<ByteQ6_K, 2, 2>(tiles, batch, output),
                (BlockType::Q6_K, 4) => tile::<ByteQ6_K, 4, 1>(tiles, batch, output),
                (BlockType::Q6_K, 8) => tile::<ByteQ6_K, 8, 1>(tiles, batch, output),
                (block_type, _) => {
                    stream(block_type, tiles, x, bytes.expect(NEEDED), rows.clone(), output);
                }
            }
            if !last.is_empty() {
                let bytes = bytes.expect(NEEDED);
                stream(output.matrix.block_type(), last, x, bytes, rows, &rest);
            }
        }
    }
}

const NEEDED: &str = "made because `needs` says so";

/// Whether `m` rows of input times this many rows of weights use [`ByteActivations`].
pub(super) fn needs(m: usize, rows: usize) -> bool {
    !m.is_multiple_of(2) || !rows.is_multiple_of(ROWS)
}

/// Rows of weights times rows of input, one by one.
///
/// # Safety
/// As [`block_rows`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn stream(
    block_type: BlockType,
    weights: &[u8],
    x: &Activations<i16>,
    bytes: &ByteActivations,
    rows: std::ops::Range<usize>,
    output: &Output,
) {
    for row in rows {
        for (i, weights) in weights.chunks_exact(output.matrix.row_bytes()).enumerate() {
            // SAFETY: this function's contract guarantees AVX-512 and VNNI, and exclusive access to the
            // outputs.
            unsafe {
                let y = match block_type {
                    BlockType::Q8_0 => q8_0_row(weights, x, bytes, row),
                    _ => q6_k_row(weights, x, bytes, row),
                };
                output.put(i, row, &[y]);
            }
        }
    }
}

/// A row of `Q8_0` times a row of input.
///
/// # Safety
/// As [`block_rows`].
#[inline(always)]
unsafe fn q8_0_row(
    weights: &[u8],
    x: &Activations<i16>,
    bytes: &ByteActivations,
    row: usize,
) -> f32 {
    let blocks = weights.as_chunks::<34>().0;
    let (whole, rest) = blocks.as_chunks::<LANES>();
    // SAFETY: this function's contract guarantees AVX-512 and VNNI; `x` has as many groups as the row has
    // blocks.
    unsafe {
        let mut sums = _mm512_setzero_ps();
        for (i, blocks) in whole.iter().enumerate() {
            sums = q8_0_chunk::<true>(blocks, x, bytes, row, i * LANES, sums);
        }
        if !rest.is_empty() {
            sums = q8_0_chunk::<false>(rest, x, bytes, row, whole.len() * LANES, sums);
        }
        total(sums)
    }
}

/// Adds the products of up to 16 blocks with groups from `first` on; of 16 if they are `WHOLE`.
///
/// # Safety
/// As [`block_rows`].
#[inline(always)]
unsafe fn q8_0_chunk<const WHOLE: bool>(
    blocks: &[[u8; 34]],
    x: &Activations<i16>,
    bytes: &ByteActivations,
    row: usize,
    first: usize,
    sums: __m512,
) -> __m512 {
    // SAFETY: this function's contract guarantees AVX-512 and VNNI; a block is 34 bytes, of which 32 are
    // values.
    unsafe {
        let values = |n: usize| {
            if WHOLE || n < blocks.len() {
                _mm256_loadu_si256(blocks.as_ptr().add(n).cast::<u8>().add(2).cast())
            } else {
                _mm256_setzero_si256() // times zeros of the input
            }
        };
        let mut products = [_mm512_setzero_si512(); 8];
        for p in 0..8 {
            if WHOLE || 2 * p < blocks.len() {
                prefetch(blocks.as_ptr().wrapping_add(2 * p).cast());
                let lower = _mm512_castsi256_si512(values(2 * p));
                let q = _mm512_inserti64x4::<1>(lower, values(2 * p + 1));
                products[p] = signed_dot(q, bytes.pair(row, first / 2 + p));
            }
        }
        let [a, b, c, d, e, f, g, h] = products;
        let (lower, upper) = (quarters([a, b, c, d]), quarters([e, f, g, h]));
        // Quarters 0 and 1 belong to a group, 2 and 3 to the next.
        let all = _mm512_add_epi32(
            _mm512_shuffle_i64x2::<0b10_00_10_00>(lower, upper),
            _mm512_shuffle_i64x2::<0b11_01_11_01>(lower, upper),
        );
        let order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
        let all = _mm512_permutexvar_epi32(order, all);
        let above = bytes.group_sums[row * bytes.strides[0] + first..].as_ptr();
        let all = _mm512_sub_epi32(all, _mm512_loadu_si512(above.cast()));
        let bits = |i: usize| i16::from_le_bytes([blocks[i][0], blocks[i][1]]);
        let halves = if WHOLE {
            sixteen_words(bits)
        } else {
            let mut all = [0i16; LANES];
            for i in 0..blocks.len() {
                all[i] = bits(i);
            }
            _mm256_loadu_si256(all.as_ptr().cast())
        };
        let (x_scales, _) = x.factors(1, row, first);
        add_scaled(sums, all, _mm512_loadu_ps(x_scales.as_ptr()), _mm512_cvtph_ps(halves))
    }
}

/// A row of `Q6_K` times a row of input.
///
/// # Safety
/// As [`block_rows`].
#[inline(always)]
unsafe fn q6_k_row(
    weights: &[u8],
    x: &Activations<i16>,
    bytes: &ByteActivations,
    row: usize,
) -> f32 {
    // SAFETY: this function's contract guarantees AVX-512 and VNNI; a block is 8 groups.
    unsafe {
        // Positions of the sixteen halves of groups after the sums of four vectors.
        let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        let (nibble, pair) = (_mm512_set1_epi8(15), _mm512_set1_epi8(0x30));
        let by = |lower, upper| {
            let (lower, upper) = (_mm256_set1_epi16(lower), _mm256_set1_epi16(upper));
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(lower), upper)
        };
        let (up, down) = (by(4, 2), by(0, 2));
        let mut sums = _mm512_setzero_ps();
        for (i, block) in weights.as_chunks::<210>().0.iter().enumerate() {
            for line in [0, 64, 128, 192] {
                prefetch(block.as_ptr().wrapping_add(line));
            }
            let mut products = [_mm512_setzero_si512(); 4];
            for half in 0..2 {
                let low = _mm512_loadu_si512(block[64 * half..64 * half + 64].as_ptr().cast());
                let high = &block[128 + 32 * half..160 + 32 * half];
                let high = _mm512_broadcast_i64x4(_mm256_loadu_si256(high.as_ptr().cast()));
                // The two high bits of each value go above its four low ones; each half of a vector is one
                // group.
                let with = |nibbles, bits| {
                    _mm512_ternarylogic_epi32::<0xea>(bits, pair, nibbles) // bits & pair | nibbles
                };
                let first = with(_mm512_and_si512(low, nibble), _mm512_sllv_epi16(high, up));
                let nibbles = _mm512_and_si512(_mm512_srli_epi16::<4>(low), nibble);
                let last = with(nibbles, _mm512_srlv_epi16(high, down));
                let at = 4 * i + 2 * half;
                products[2 * half] = dot(first, bytes.pair(row, at));
                products[2 * half + 1] = dot(last, bytes.pair(row, at + 1));
            }
            let all = _mm512_permutexvar_epi32(order, quarters(products));
            let above = bytes.half_sums[row * bytes.strides[1] + LANES * i..].as_ptr();
            let all = _mm512_sub_epi32(all, _mm512_loadu_si512(above.cast()));
            let (x_scales, _) = x.factors(2, row, 8 * i);
            let of_halves = _mm_loadu_si128(block[192..208].as_ptr().cast());
            let d = _mm_cvtsi32_si128(i32::from(u16::from_le_bytes([block[208], block[209]])));
            let d = _mm512_broadcastss_ps(_mm_cvtph_ps(d));
            let scales = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(of_halves)), d);
            sums = add_scaled(sums, all, _mm512_loadu_ps(x_scales.as_ptr()), scales);
        }
        total(sums)
    }
}

#[inline(always)]
fn prefetch(address: *const u8) {
    // SAFETY: prefetching never faults, so the address need not be valid.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(address.wrapping_add(PREFETCH_DISTANCE).cast()) }
}

/// Signed bytes and 128 times signed input: sums of four products.
///
/// # Safety
/// As [`block_rows`]; `x` must be high bytes, then low ones.
#[inline(always)]
unsafe fn signed_dot(q: __m512i, x: *const __m512i) -> __m512i {
    // SAFETY: this function's contract guarantees AVX-512 and VNNI, and exclusive access to the outputs.
    unsafe { dot(_mm512_xor_si512(q, _mm512_set1_epi8(i8::MIN)), x) }
}

/// Unsigned bytes times signed input: sums of four products.
///
/// # Safety
/// As [`signed_dot`].
#[inline(always)]
unsafe fn dot(q: __m512i, x: *const __m512i) -> __m512i {
    // SAFETY: this function's contract guarantees AVX-512 and VNNI, and exclusive access to the outputs.
    unsafe {
        let high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), q, _mm512_load_si512(x));
        _mm512_dpbusd_epi32(_mm512_slli_epi32::<7>(high), q, _mm512_load_si512(x.add(1)))
    }
}

/// Sums of the four lanes of each quarter of four vectors: quarter `k` of the result has those of
/// quarters `k`, in the order of the vectors.
///
/// # Safety
/// As [`block_rows`].
#[inline(always)]
unsafe fn quarters([a, b, c, d]: [__m512i; 4]) -> __m512i {
    // SAFETY: this function's contract guarantees AVX-512 and VNNI, and exclusive access to the outputs.
    unsafe {
        let pairs =
            |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (ab, cd) = (pairs(a, b), pairs(c, d));
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
    }
}

/// `sums + products · x_scales · scales`.
///
/// # Safety
/// As [`block_rows`].
#[inline(always)]
unsafe fn add_scaled(sums: __m512, products: __m512i, x_scales: __m512, scales: __m512) -> __m512 {
    // SAFETY: this function's contract guarantees AVX-512 and VNNI, and exclusive access to the outputs.
    unsafe { _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(products), x_scales), scales, sums) }
}

/// The sum of sixteen lanes: both halves, the halves of that, and so on.
///
/// # Safety
/// As [`block_rows`].
#[inline(always)]
unsafe fn total(sums: __m512) -> f32 {
    // SAFETY: this function's contract guarantees AVX-512 and VNNI, and exclusive access to the outputs.
    unsafe {
        let sums = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps::<1>(sums));
        let sums = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps::<1>(sums));
        let sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
        _mm_cvtss_f32(_mm_add_ss(sums, _mm_shuffle_ps::<1>(sums, sums)))
    }
}

/// Whole tiles times a batch of `M` rows of input. `CHAINS` sums of integers per row of input keep the
/// instructions independent of each other.
///
/// # Safety
/// As [`block_rows`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn tile<B: ByteBlock, const M: usize, const CHAINS: usize>(
    weights: &[u8],
    x: ActivationBatch,
    output: &Output,
) {
    assert_eq!(x.rows.len(), M);
    let row_bytes = output.matrix.row_bytes();
    for (tile, bytes) in weights.chunks_exact(ROWS * row_bytes).enumerate() {
        // A lane is a row of weights.
        let mut sums = [[_mm512_setzero_ps(); M]; LANES];
        for block in 0..x.groups / B::GROUPS {
            prefetch_next_tile::<_MM_HINT_T1>(bytes, row_bytes, block, B::BYTES);
            let blocks = Blocks { start: bytes[block * B::BYTES..].as_ptr(), row_bytes };
            // SAFETY: this function enables the features, and every row has such a block.
            unsafe { B::add::<M, CHAINS>(blocks, &x, block * B::GROUPS, &mut sums) };
        }
        // As [`total`], for all lanes at once.
        for half in [8, 4, 2, 1] {
            for n in 0..half {
                for i in 0..M {
                    sums[n][i] = _mm512_add_ps(sums[n][i], sums[n + half][i]);
                }
            }
        }
        // SAFETY: this function's contract guarantees AVX-512 and VNNI, and exclusive access to the outputs.
        unsafe { store_tile(output, tile * ROWS, x.rows.start, sums[0]) };
    }
}

/// A block type.
trait ByteBlock {
    /// Groups of 32 values.
    const GROUPS: usize;
    const BYTES: usize;

    /// Adds the products of a block of each row with groups from `group` on.
    ///
    /// # Safety
    /// The CPU must support AVX-512 and VNNI, and `blocks` must be readable.
    unsafe fn add<const M: usize, const CHAINS: usize>(
        blocks: Blocks,
        x: &ActivationBatch,
        group: usize,
        sums: &mut [[__m512; M]; LANES],
    );
}

#[allow(non_camel_case_types)] // the format's own names
struct ByteQ8_0;
#[allow(non_camel_case_types)]
struct ByteQ6_K;

impl ByteBlock for ByteQ8_0 {
    const GROUPS: usize = 1;
    const BYTES: usize = 34;

    #[inline(always)]
    unsafe fn add<const M: usize, const CHAINS: usize>(
        blocks: Blocks,
        x: &ActivationBatch,
        group: usize,
        sums: &mut [[__m512; M]; LANES],
    ) {
        // SAFETY: this function's contract guarantees AVX-512 and VNNI, and exclusive access to the outputs.
        unsafe {
            let [head, ..] = blocks.dwords(0);
            let scales = lower_halves(head);
            let pairs = x.values(group);
            let mut products = [[_mm512_setzero_si512(); CHAINS]; M];
            for column in 0..2 {
                let dwords = blocks.dwords(2 + 16 * column);
                for k in 0..4 {
                    add_bytes(&mut products, dwords[k], pairs, 4 * column + k);
                }
            }
            let sums = &mut sums[group % LANES];
            add_scaled_sums(sums, products, scales, x.factors(group));
        }
    }
}

impl ByteBlock for ByteQ6_K {
    const GROUPS: usize = 8;
    const BYTES: usize = 210;

    #[inline(always)]
    unsafe fn add<const M: usize, const CHAINS: usize>(
        blocks: Blocks,
        x: &ActivationBatch,
        group: usize,
        sums: &mut [[__m512; M]; LANES],
    ) {
        // SAFETY: this function's contract guarantees AVX-512 and VNNI, and exclusive access to the outputs.
        unsafe {
            // The last 16 bytes of a block end with both bytes of the scale of its scales.
            let [.., tail] = blocks.dwords(Self::BYTES - 16);
            let d = lower_halves(_mm512_srli_epi32::<16>(tail));
            let of_halves = blocks.dwords(192);
            let (nibble, pair) = (_mm512_set1_epi8(15), _mm512_set1_epi8(0x30));
            for half in 0..2 {
                for column in 0..2 {
                    let lows = [0, 32].map(|at| 64 * half + at + 16 * column);
                    let lows = [blocks.dwords(lows[0]), blocks.dwords(lows[1])];
                    let highs = blocks.dwords(128 + 32 * half + 16 * column);
                    for k in 0..4 {
                        let of_block = 4 * half + k;
                        let pairs = x.values(group + of_block);
                        let mut products = [[_mm512_setzero_si512(); CHAINS]; M];
                        for j in 0..4 {
                            let (low, high) = (lows[k % 2][j], highs[j]);
                            let low = if k < 2 { low } else { _mm512_srli_epi16::<4>(low) };
                            let high = match k {
                                0 => _mm512_slli_epi16::<4>(high),
                                1 => _mm512_slli_epi16::<2>(high),
                                2 => high,
                                _ => _mm512_srli_epi16::<2>(high),
                            };
                            let nibbles = _mm512_and_si512(low, nibble);
                            // high & pair | nibbles.
                            let q = _mm512_ternarylogic_epi32::<0xea>(high, pair, nibbles);
                            let q = _mm512_sub_epi8(q, _mm512_set1_epi8(Q6_K_OFFSET as i8));
                            add_bytes(&mut products, q, pairs, 4 * column + j);
                        }
                        let n = 2 * of_block + column;
                        // The byte of each lane, with its sign.
                        let up = _mm_cvtsi32_si128(24 - 8 * (n as i32 % 4));
                        let of_half = _mm512_sll_epi32(of_halves[n / 4], up);
                        let of_half = _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(of_half));
                        let scales = _mm512_mul_ps(of_half, d);
                        add_scaled_sums(
                            &mut sums[n],
                            products,
                            scales,
                            x.factors(group + of_block),
                        );
                    }
                }
            }
        }
    }
}

/// Adds the products of four signed bytes a row, the `k`-th of a group, with each row of input.
///
/// # Safety
/// As [`multiply`].
#[inline(always)]
unsafe fn add_bytes<const M: usize, const CHAINS: usize>(
    products: &mut [[__m512i; CHAINS]; M],
    bytes: __m512i,
    pairs: *const i32,
    k: usize,
) {
    // SAFETY: this function's contract guarantees AVX-512 and VNNI, and exclusive access to the outputs.
    unsafe {
        let even = _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(bytes));
        multiply(products, even, pairs, k);
        multiply(products, _mm512_srai_epi16::<8>(bytes), pairs, 8 + k);
    }
}

/// Adds products times the scales of both sides for each row of input; `factors` begin with the
/// scales of those.
///
/// # Safety
/// The CPU must support AVX-512 and VNNI, and `factors` must be `M` numbers.
#[inline(always)]
unsafe fn add_scaled_sums<const M: usize, const CHAINS: usize>(
    sums: &mut [__m512; M],
    products: [[__m512i; CHAINS]; M],
    scales: __m512,
    factors: *const f32,
) {
    // SAFETY: this function's contract guarantees AVX-512 and VNNI, and exclusive access to the outputs.
    unsafe {
        let all = sum_chains(products);
        for i in 0..M {
            sums[i] = add_scaled(sums[i], all[i], _mm512_set1_ps(*factors.add(i)), scales);
        }
    }
}
