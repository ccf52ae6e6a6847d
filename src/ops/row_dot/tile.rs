//! AVX-512 VNNI kernels for the 4- and 5-bit types, sixteen rows at a time: blocks are transposed in
//! registers, so that each lane holds one row, and scales and conversions are vectorized over sixteen rows.
//!
//! A lane sums 32 products here, where a lane of the row kernels sums 2, and eight rows of input
//! share the unpacking of blocks. For `Q6_K` and `Q8_0` see `bytes`: a single row of input, which is
//! bound by memory bandwidth, is a fifth slower for these types if sixteen rows are read at once.

#![allow(clippy::needless_range_loop)] // indices run over several arrays at once, in registers

use std::arch::asm;
use std::arch::x86_64::*;

use super::activations::{ActivationBatch, ActivationBatches, ActivationGroup, Activations};
use super::formats;
use super::kernel::{self, Output};
use super::x86::I16Avx512;
use crate::quant::BlockType;

/// Rows of a tile.
pub(super) const ROWS: usize = 16;
/// The largest tile that is prefetched into the L1 cache: half of its size.
const L1_TILE_BYTES: usize = 16 * 1024;
/// Rows of blocks times all rows of input; the last rows, too few for a tile, and other types use
/// the row kernels.
///
/// # Safety
/// The CPU must support AVX-512 F, BW, DQ, VL and VNNI, and no other thread may access the elements of
/// `y` that belong to these rows.
pub(super) unsafe fn block_rows(
    bytes: &[u8],
    x: &Activations<i16>,
    batches: &ActivationBatches,
    output: &Output,
) {
    let rest = |tiled: usize| Output { first_row: output.first_row + tiled, ..*output };
    let row_bytes = output.matrix.row_bytes();
    /// Tiles of a block type, then its other rows, fewer than sixteen, one row of input at a time.
    macro_rules! tiles {
        ($tile:ty, $format:ty) => {{
            let tiled = inputs::<$tile>(bytes, batches, output);
            let bytes = &bytes[tiled * row_bytes..];
            kernel::single_inputs::<I16Avx512, $format, i16>(bytes, x, &rest(tiled));
        }};
    }
    // SAFETY: guaranteed by this function's safety contract.
    unsafe {
        match output.matrix.block_type() {
            BlockType::Q4_0 => tiles!(Block32<false, false>, formats::Q4_0),
            BlockType::Q4_1 => tiles!(Block32<true, false>, formats::Q4_1),
            BlockType::Q5_0 => tiles!(Block32<false, true>, formats::Q5_0),
            BlockType::Q5_1 => tiles!(Block32<true, true>, formats::Q5_1),
            BlockType::Q4_K => tiles!(Block256<false>, formats::Q4_K),
            BlockType::Q5_K => tiles!(Block256<true>, formats::Q5_K),
            BlockType::Q2_K => kernel::inputs::<I16Avx512, formats::Q2_K, i16>(bytes, x, output),
            BlockType::Q3_K => kernel::inputs::<I16Avx512, formats::Q3_K, i16>(bytes, x, output),
            BlockType::IQ4_NL => {
                kernel::inputs::<I16Avx512, formats::IQ4_NL, i16>(bytes, x, output)
            }
            BlockType::IQ4_XS => {
                kernel::inputs::<I16Avx512, formats::IQ4_XS, i16>(bytes, x, output)
            }
            BlockType::MXFP4 => kernel::inputs::<I16Avx512, formats::MXFP4, i16>(bytes, x, output),
            BlockType::Q8_0 | BlockType::Q6_K => unreachable!("rows of bytes, see `bytes`"),
            BlockType::F32 | BlockType::F16 | BlockType::BF16 => unreachable!("not in blocks"),
        }
    }
}

/// Whole tiles times all rows of input; returns how many rows they were.
///
/// # Safety
/// As [`block_rows`].
unsafe fn inputs<B: Block>(bytes: &[u8], x: &ActivationBatches, output: &Output) -> usize {
    let tile_bytes = ROWS * output.matrix.row_bytes();
    let tiles = bytes.len() / tile_bytes;
    let bytes = &bytes[..tiles * tile_bytes];
    for batch in x.iter() {
        // SAFETY: this function's contract guarantees AVX-512 and VNNI, and valid pointers.
        unsafe {
            match batch.rows.len() {
                1 => rows::<B, 1, 4>(bytes, batch, output),
                2 => rows::<B, 2, 2>(bytes, batch, output),
                4 => rows::<B, 4, 1>(bytes, batch, output),
                _ => rows::<B, 8, 1>(bytes, batch, output),
            }
        }
    }
    tiles * ROWS
}

/// Whole tiles times a batch of `M` rows of input. `CHAINS` sums of integers per row of input keep the
/// instructions independent of each other.
///
/// # Safety
/// As [`block_rows`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn rows<B: Block, const M: usize, const CHAINS: usize>(
    bytes: &[u8],
    x: ActivationBatch,
    output: &Output,
) {
    assert_eq!(x.rows.len(), M);
    let row_bytes = output.matrix.row_bytes();
    // The next tile is prefetched into the L1 cache where it fits next to this one; prefetching all lines of a
    // large block at once would exhaust the line fill buffers. One row of Q4_0 or Q5_0 of 576 columns
    // then runs at 27 GB/s instead of 19.
    let near = B::GROUPS == 1 && ROWS * row_bytes <= L1_TILE_BYTES;
    for (tile, bytes) in bytes.chunks_exact(ROWS * row_bytes).enumerate() {
        let mut sums =
            TileSums::<M> { scaled: [_mm512_setzero_ps(); M], minima: [_mm512_setzero_ps(); M] };
        for block in 0..x.groups / B::GROUPS {
            if near {
                prefetch_next_tile::<_MM_HINT_T0>(bytes, row_bytes, block, B::BYTES)
            } else {
                prefetch_next_tile::<_MM_HINT_T1>(bytes, row_bytes, block, B::BYTES)
            }
            let blocks = Blocks { start: bytes[block * B::BYTES..].as_ptr(), row_bytes };
            // SAFETY: this function enables the features, and every row has such a block.
            unsafe { B::add::<M, CHAINS>(blocks, &x, block * B::GROUPS, &mut sums) };
        }
        let mut all = [_mm512_setzero_ps(); M];
        for i in 0..M {
            all[i] = _mm512_fmadd_ps(sums.minima[i], _mm512_set1_ps(B::MINIMUM), sums.scaled[i]);
        }
        // SAFETY: this function's contract guarantees AVX-512 and VNNI, and valid pointers.
        unsafe { store_tile(output, tile * ROWS, x.rows.start, all) };
    }
}

/// Prefetches the `block`-th part of the next tile, as large as one block of all sixteen rows.
#[inline(always)]
pub(super) fn prefetch_next_tile<const HINT: i32>(
    tile: &[u8],
    row_bytes: usize,
    block: usize,
    block_bytes: usize,
) {
    for line in (0..ROWS * block_bytes).step_by(64) {
        let next = ROWS * (row_bytes + block * block_bytes) + line;
        // SAFETY: prefetching never faults, so the address need not be valid.
        unsafe { _mm_prefetch::<HINT>(tile.as_ptr().wrapping_add(next).cast()) }
    }
}

/// Stores the products of sixteen rows of the tile with inputs from `first` on.
///
/// # Safety
/// The CPU must support AVX-512 F, and no other thread may access those elements of `y`.
#[inline(always)]
pub(super) unsafe fn store_tile<const M: usize>(
    output: &Output,
    row: usize,
    first: usize,
    all: [__m512; M],
) {
    let mut y = [[0f32; ROWS]; M];
    for i in 0..M {
        // SAFETY: 16 values.
        unsafe { _mm512_storeu_ps(y[i].as_mut_ptr(), all[i]) };
    }
    for n in 0..ROWS {
        let mut of_row = [0.0; M];
        for i in 0..M {
            of_row[i] = y[i][n];
        }
        // SAFETY: this function's contract guarantees AVX-512 and VNNI, and valid pointers.
        unsafe { output.put(row + n, first, &of_row) };
    }
}

/// Partial sums of the sixteen rows of a tile for each row of input.
struct TileSums<const M: usize> {
    scaled: [__m512; M],
    minima: [__m512; M],
}

/// The blocks of sixteen rows at the same block index.
#[derive(Clone, Copy)]
pub(super) struct Blocks {
    pub start: *const u8,
    pub row_bytes: usize,
}

/// A block type.
trait Block {
    /// Groups of 32 values.
    const GROUPS: usize;
    const BYTES: usize;
    /// The factor that block minima are multiplied by at the end.
    const MINIMUM: f32;

    /// Adds the products of a block of each row with groups from `group` on.
    ///
    /// # Safety
    /// The CPU must support AVX-512 and VNNI, and `blocks` must be readable.
    unsafe fn add<const M: usize, const CHAINS: usize>(
        blocks: Blocks,
        x: &ActivationBatch,
        group: usize,
        sums: &mut TileSums<M>,
    );
}

/// `Q4_0`, with minima `Q4_1`, with fifth bits `Q5_0`, with both `Q5_1`.
struct Block32<const MINIMA: bool, const FIFTH: bool>;

impl<const MINIMA: bool, const FIFTH: bool> Block for Block32<MINIMA, FIFTH> {
    const GROUPS: usize = 1;
    const BYTES: usize = 18 + if MINIMA { 2 } else { 0 } + if FIFTH { 4 } else { 0 };
    // Types without stored minima have the scale times the negated zero point instead.
    const MINIMUM: f32 = match (MINIMA, FIFTH) {
        (true, _) => 1.0,
        (false, false) => -8.0,
        (false, true) => -16.0,
    };

    #[inline(always)]
    unsafe fn add<const M: usize, const CHAINS: usize>(
        blocks: Blocks,
        x: &ActivationBatch,
        group: usize,
        sums: &mut TileSums<M>,
    ) {
        // SAFETY: this function's contract guarantees AVX-512 and VNNI, and valid pointers.
        unsafe {
            // The scale, then the minimum and the fifth bits, if any.
            let [head, next, ..] = blocks.dwords(0);
            let scales = lower_halves(head);
            let minima = if MINIMA { upper_halves(head) } else { scales };
            // Bits of the first 16 values and of the last, each twice.
            let fifth = if MINIMA {
                [duplicate_lower(next), duplicate_upper(next)]
            } else {
                [duplicate_upper(head), duplicate_lower(next)]
            };
            let dwords = blocks.dwords(Self::BYTES - 16);
            let pairs = x.values(group);
            let mut products = [[_mm512_setzero_si512(); CHAINS]; M];
            nibbles::<M, CHAINS, FIFTH, 0>(dwords[0], fifth, pairs, &mut products);
            nibbles::<M, CHAINS, FIFTH, 1>(dwords[1], fifth, pairs, &mut products);
            nibbles::<M, CHAINS, FIFTH, 2>(dwords[2], fifth, pairs, &mut products);
            nibbles::<M, CHAINS, FIFTH, 3>(dwords[3], fifth, pairs, &mut products);
            add_scaled(sums, products, scales, minima, x.factors(group));
        }
    }
}

/// Adds the products of the `K`-th four bytes of nibbles; `fifth` are the bits above the first 16
/// values of a group and above the last, each twice.
///
/// # Safety
/// As [`multiply`].
#[inline(always)]
unsafe fn nibbles<const M: usize, const CHAINS: usize, const FIFTH: bool, const K: usize>(
    q: __m512i,
    fifth: [__m512i; 2],
    pairs: *const i32,
    products: &mut [[__m512i; CHAINS]; M],
) {
    // SAFETY: this function's contract guarantees AVX-512 and VNNI, and valid pointers.
    unsafe {
        let mask = _mm512_set1_epi16(15);
        // Even values of both halves of a group, then odd ones: the order of the input.
        let words = [
            _mm512_and_si512(q, mask),
            _mm512_and_si512(_mm512_srli_epi16::<4>(q), mask),
            _mm512_and_si512(_mm512_srli_epi16::<8>(q), mask),
            _mm512_srli_epi16::<12>(q),
        ];
        for j in 0..4 {
            let mut words = words[j];
            if FIFTH {
                // A lane has the values 4 K or 4 K + 1, and the second one after it.
                let value = 4 * K + j / 2;
                let bit = if K == 0 {
                    let up = _mm512_set1_epi32((4 - value as i32) | (2 - value as i32) << 16);
                    _mm512_sllv_epi16(fifth[j % 2], up)
                } else {
                    let down = _mm512_set1_epi32((value as i32 - 4) | (value as i32 - 2) << 16);
                    _mm512_srlv_epi16(fifth[j % 2], down)
                };
                // bit & 16 | words.
                words = _mm512_ternarylogic_epi32::<0xea>(bit, _mm512_set1_epi16(16), words);
            }
            multiply(products, words, pairs, 4 * j + K);
        }
    }
}

/// `Q4_K`, with fifth bits `Q5_K`.
struct Block256<const FIFTH: bool>;

impl<const FIFTH: bool> Block for Block256<FIFTH> {
    const GROUPS: usize = 8;
    const BYTES: usize = if FIFTH { 176 } else { 144 };
    const MINIMUM: f32 = -1.0;

    #[inline(always)]
    unsafe fn add<const M: usize, const CHAINS: usize>(
        blocks: Blocks,
        x: &ActivationBatch,
        group: usize,
        sums: &mut TileSums<M>,
    ) {
        // SAFETY: this function's contract guarantees AVX-512 and VNNI, and valid pointers.
        unsafe {
            // Both scales of a row, then its 8 scales and minima of 6 bits in three words.
            let [both, a, b, c] = blocks.dwords(0);
            let (scale, minimum) = (lower_halves(both), upper_halves(both));
            let field = |word, shift: usize, mask| {
                let shifted = _mm512_srl_epi32(word, _mm_cvtsi32_si128(shift as i32));
                _mm512_and_si512(shifted, _mm512_set1_epi32(mask))
            };
            let high = |word, i: usize| {
                // The two high bits go above the four low ones.
                _mm512_slli_epi32::<4>(field(word, 8 * i + 6, 3))
            };
            let fifth = if FIFTH {
                [blocks.dwords(16), blocks.dwords(32)]
            } else {
                [[_mm512_setzero_si512(); 4]; 2]
            };
            let mask = _mm512_set1_epi16(15);
            for pair in 0..4 {
                let at = Self::BYTES - 128 + 32 * pair;
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
                    let pairs = x.values(group + i);
                    let mut products = [[_mm512_setzero_si512(); CHAINS]; M];
                    for k in 0..8 {
                        let q = dwords[k / 4][k % 4];
                        let q = if half == 0 { q } else { _mm512_srli_epi16::<4>(q) };
                        let mut even = _mm512_and_si512(q, mask);
                        let mut odd = _mm512_and_si512(_mm512_srli_epi16::<8>(q), mask);
                        if FIFTH {
                            let all = fifth[k / 4][k % 4];
                            even = with_fifth_bit(even, all, _mm512_set1_epi16(1 << i));
                            odd = with_fifth_bit(odd, all, _mm512_set1_epi16(1 << i << 8));
                        }
                        multiply(&mut products, even, pairs, k);
                        multiply(&mut products, odd, pairs, 8 + k);
                    }
                    let scales = _mm512_mul_ps(_mm512_cvtepi32_ps(scales), scale);
                    let minima = _mm512_mul_ps(_mm512_cvtepi32_ps(minima), minimum);
                    let factors = x.factors(group + i);
                    add_scaled(sums, products, scales, minima, factors);
                }
            }
        }
    }
}

/// Adds the products of words with the `pair`-th two values of a group of each row of input.
///
/// # Safety
/// The CPU must support AVX-512 and VNNI, and `pairs` must be `M` groups.
#[inline(always)]
pub(super) unsafe fn multiply<const M: usize, const CHAINS: usize>(
    products: &mut [[__m512i; CHAINS]; M],
    words: __m512i,
    pairs: *const i32,
    pair: usize,
) {
    let mut sums = [words; M];
    for i in 0..M {
        sums[i] = products[i][pair % CHAINS];
    }
    // SAFETY: this function's contract guarantees AVX-512 and VNNI, and valid pointers.
    let sums = unsafe { add_pairs(sums, words, pairs.add(pair)) };
    for i in 0..M {
        products[i][pair % CHAINS] = sums[i];
    }
}

/// `vpdpwssd` of the same words with a pair of values of each row of input, a group apart. The
/// instructions take the pairs as broadcast memory operands: the intrinsic emits a separate broadcast, and
/// eight rows then run out of registers; and LLVM splits the intrinsic if its accumulator is zero.
///
/// # Safety
/// `x` must point at a pair of the first of `M` groups that are contiguous.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn add_pairs<const M: usize>(
    mut sums: [__m512i; M],
    words: __m512i,
    x: *const i32,
) -> [__m512i; M] {
    const { assert!(size_of::<ActivationGroup<i16>>() == 64) }
    macro_rules! add {
        ($($i:literal at $offset:literal),*) => {
            asm!(
                $(concat!("vpdpwssd {", $i, "}, {words}, dword ptr [{x} + ", $offset, "]{{1to16}}"),)*
                $(inout(zmm_reg) sums[$i],)*
                words = in(zmm_reg) words,
                x = in(reg) x,
                options(pure, readonly, nostack, preserves_flags),
            )
        };
    }
    // SAFETY: it reads `M` numbers, which the caller guarantees to be readable.
    unsafe {
        match M {
            1 => add!(0 at 0),
            2 => add!(0 at 0, 1 at 64),
            4 => add!(0 at 0, 1 at 64, 2 at 128, 3 at 192),
            8 => add!(
                0 at 0, 1 at 64, 2 at 128, 3 at 192, 4 at 256, 5 at 320, 6 at 384, 7 at 448
            ),
            _ => unreachable!("rows come by 8, 4, 2 and 1"),
        }
    }
    sums
}

/// The sum of the chains of each row of input.
///
/// # Safety
/// The CPU must support AVX-512 and VNNI.
#[inline(always)]
pub(super) unsafe fn sum_chains<const M: usize, const CHAINS: usize>(
    products: [[__m512i; CHAINS]; M],
) -> [__m512i; M] {
    products.map(|chains| {
        // SAFETY: this function's contract guarantees AVX-512 and VNNI, and valid pointers.
        chains.into_iter().reduce(|a, b| unsafe { _mm512_add_epi32(a, b) }).expect("a chain")
    })
}

/// Adds the products of a group or a half, times the scales of both sides, and its minima times
/// sums; `factors` are the scales of the rows of input, then their sums.
///
/// # Safety
/// The CPU must support AVX-512 and VNNI, and `factors` must be `2 M` numbers.
#[inline(always)]
unsafe fn add_scaled<const M: usize, const CHAINS: usize>(
    sums: &mut TileSums<M>,
    products: [[__m512i; CHAINS]; M],
    scales: __m512,
    minima: __m512,
    factors: *const f32,
) {
    // SAFETY: this function's contract guarantees AVX-512 and VNNI, and valid pointers.
    let all = unsafe { sum_chains(products) };
    for i in 0..M {
        // SAFETY: this function's contract guarantees AVX-512 and VNNI, and valid pointers.
        unsafe {
            let scale = _mm512_set1_ps(*factors.add(i));
            let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(all[i]), scale);
            sums.scaled[i] = _mm512_fmadd_ps(scaled, scales, sums.scaled[i]);
            let sum = _mm512_set1_ps(*factors.add(M + i));
            sums.minima[i] = _mm512_fmadd_ps(minima, sum, sums.minima[i]);
        }
    }
}

/// The `f16` in the lower half of each lane.
///
/// # Safety
/// The CPU must support AVX-512 and VNNI.
#[inline(always)]
pub(super) unsafe fn lower_halves(dwords: __m512i) -> __m512 {
    // SAFETY: this function's contract guarantees AVX-512 and VNNI, and valid pointers.
    unsafe { _mm512_cvtph_ps(_mm512_cvtepi32_epi16(dwords)) }
}

/// The `f16` in the upper half of each lane.
///
/// # Safety
/// The CPU must support AVX-512 and VNNI.
#[inline(always)]
unsafe fn upper_halves(dwords: __m512i) -> __m512 {
    // SAFETY: this function's contract guarantees AVX-512 and VNNI, and valid pointers.
    unsafe { lower_halves(_mm512_srli_epi32::<16>(dwords)) }
}

/// The lower half of each lane, duplicated to both halves.
///
/// # Safety
/// The CPU must support AVX-512 and VNNI.
#[inline(always)]
unsafe fn duplicate_lower(dwords: __m512i) -> __m512i {
    // SAFETY: this function's contract guarantees AVX-512 and VNNI, and valid pointers.
    unsafe {
        _mm512_shufflehi_epi16::<0b10_10_00_00>(_mm512_shufflelo_epi16::<0b10_10_00_00>(dwords))
    }
}

/// The upper half of each lane, duplicated to both halves.
///
/// # Safety
/// The CPU must support AVX-512 and VNNI.
#[inline(always)]
unsafe fn duplicate_upper(dwords: __m512i) -> __m512i {
    // SAFETY: this function's contract guarantees AVX-512 and VNNI, and valid pointers.
    unsafe {
        _mm512_shufflehi_epi16::<0b11_11_01_01>(_mm512_shufflelo_epi16::<0b11_11_01_01>(dwords))
    }
}

/// `words + 16` where one of `bits` is set in `all`.
///
/// # Safety
/// The CPU must support AVX-512 and VNNI.
#[inline(always)]
unsafe fn with_fifth_bit(words: __m512i, all: __m512i, bits: __m512i) -> __m512i {
    // SAFETY: this function's contract guarantees AVX-512 and VNNI, and valid pointers.
    unsafe {
        let set = _mm512_test_epi16_mask(all, bits);
        _mm512_mask_add_epi16(words, set, words, _mm512_set1_epi16(16))
    }
}

impl Blocks {
    /// Four times four bytes from `offset` on, of all rows.
    ///
    /// # Safety
    /// The CPU must support AVX-512 and VNNI, and the blocks must be readable.
    #[inline(always)]
    pub(super) unsafe fn dwords(self, offset: usize) -> [__m512i; 4] {
        // SAFETY: this function's contract guarantees AVX-512 and VNNI, and valid pointers.
        unsafe {
            let mut quarters = [_mm512_setzero_si512(); 4];
            for i in 0..4 {
                let lower = _mm256_castsi128_si256(self.sixteen_bytes(i, offset));
                let lower = _mm256_inserti128_si256::<1>(lower, self.sixteen_bytes(4 + i, offset));
                let upper = _mm256_castsi128_si256(self.sixteen_bytes(8 + i, offset));
                let upper = _mm256_inserti128_si256::<1>(upper, self.sixteen_bytes(12 + i, offset));
                quarters[i] = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(lower), upper);
            }
            transpose(quarters)
        }
    }

    /// Sixteen bytes of a row's block.
    ///
    /// # Safety
    /// As [`Self::dwords`].
    #[inline(always)]
    unsafe fn sixteen_bytes(self, row: usize, offset: usize) -> __m128i {
        // SAFETY: this function's contract guarantees AVX-512 and VNNI, and valid pointers.
        unsafe { _mm_loadu_si128(self.start.add(row * self.row_bytes + offset).cast()) }
    }
}

/// Vector `j` holds 16 bytes of rows `j`, `4 + j`, `8 + j` and `12 + j`; result `k` the `k`-th four
/// bytes of all rows in their order.
///
/// # Safety
/// The CPU must support AVX-512 and VNNI.
#[inline(always)]
unsafe fn transpose([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    // SAFETY: this function's contract guarantees AVX-512 and VNNI, and valid pointers.
    unsafe {
        let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
        let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
        [
            _mm512_unpacklo_epi64(ab, cd),
            _mm512_unpackhi_epi64(ab, cd),
            _mm512_unpacklo_epi64(ab_high, cd_high),
            _mm512_unpackhi_epi64(ab_high, cd_high),
        ]
    }
}
