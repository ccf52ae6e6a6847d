//! The innermost loops: a tile of 12 rows by 32 columns, per panel type and ISA level.
//!
//! A tile lives in memory as `f32`; a kernel adds `a · b` to it. The integer kernels sum a block of
//! the contraction exactly in `i32`, then add it scaled: the order of the `f32` operations is the
//! same on every ISA level, so that the integer modes give the same bits on each.

use crate::isa::{Isa, IsaLevel};

/// Rows of a tile: 12 x 2 accumulators of 16 lanes leave room in AVX-512's 32 registers, and
/// 6 x 2 of 8 lanes in AVX2's 16.
pub(crate) const TILE_ROWS: usize = 12;
/// Columns of a tile.
pub(crate) const TILE_COLS: usize = 32;

/// `TILE_ROWS x TILE_COLS` sums, row-major.
#[repr(align(64))]
pub(crate) struct Tile(pub [[f32; TILE_COLS]; TILE_ROWS]);

/// One operand of a block-floating product: 32-bit units along the contraction, each for all rows (or
/// columns) of a tile, and a scale per block and row (or column).
#[derive(Clone, Copy)]
pub(super) struct BlockFloatOperand<'a> {
    /// `(units, TILE_ROWS)` or `(units, TILE_COLS)`.
    pub units: &'a [u32],
    /// `(blocks, TILE_ROWS)` or `(blocks, TILE_COLS)`.
    pub scales: &'a [f32],
}

impl BlockFloatOperand<'_> {
    /// The number of units, checked against the other operand's and the scales of both.
    fn depth(a: Self, b: Self, units_per_block: usize) -> usize {
        let depth = a.units.len() / TILE_ROWS;
        assert!(a.units.len() == depth * TILE_ROWS && b.units.len() == depth * TILE_COLS);
        let blocks = depth.div_ceil(units_per_block);
        assert!(a.scales.len() >= blocks * TILE_ROWS && b.scales.len() >= blocks * TILE_COLS);
        depth
    }
}

/// `tile += a · b` in `f32`: a unit is a value's bits.
pub(crate) fn f32_tile(isa: Isa, a: &[u32], b: &[u32], tile: &mut Tile) {
    let depth = a.len() / TILE_ROWS;
    assert!(a.len() == depth * TILE_ROWS && b.len() == depth * TILE_COLS);
    match isa.level() {
        // SAFETY: `isa` was detected, so the CPU supports its level; lengths are checked.
        #[cfg(target_arch = "x86_64")]
        IsaLevel::Avx512Vnni => unsafe {
            let out = tile.0.as_mut_ptr().cast::<f32>();
            let begin = (out.cast_const(), TILE_COLS);
            x86::f32_avx512(depth, a.as_ptr(), b.as_ptr(), begin, (out, TILE_COLS));
        },
        // SAFETY: `isa` was detected, so the CPU supports its level; lengths are checked.
        #[cfg(target_arch = "x86_64")]
        IsaLevel::Avx2 | IsaLevel::AvxVnni => unsafe {
            x86::f32_avx2(depth, a.as_ptr(), b.as_ptr(), tile)
        },
        _ => {
            let columns = b.chunks_exact(TILE_COLS);
            for (a, b) in a.chunks_exact(TILE_ROWS).zip(columns) {
                for (row, a) in tile.0.iter_mut().zip(a) {
                    for (sum, b) in row.iter_mut().zip(b) {
                        *sum += f32::from_bits(*a) * f32::from_bits(*b);
                    }
                }
            }
        }
    }
}

/// `out = begin + a · b` in `f32` for a whole tile inside wider buffers, its rows a stride
/// apart, without copying it.
///
/// # Safety
/// Both pointers are valid for [`TILE_ROWS`] rows of [`TILE_COLS`] values, and no other thread accesses
/// those of `out`; they may be the same.
pub(super) unsafe fn f32_tile_in_place(
    isa: Isa,
    a: &[u32],
    b: &[u32],
    begin: (*const f32, usize),
    out: (*mut f32, usize),
) {
    let depth = a.len() / TILE_ROWS;
    assert!(a.len() == depth * TILE_ROWS && b.len() == depth * TILE_COLS);
    #[cfg(target_arch = "x86_64")]
    if isa.level() == IsaLevel::Avx512Vnni {
        // SAFETY: `isa` was detected, so the CPU supports its level; lengths are checked; the rest is the
        // caller's.
        unsafe { x86::f32_avx512(depth, a.as_ptr(), b.as_ptr(), begin, out) };
        return;
    }
    let mut tile = Tile([[0.0; TILE_COLS]; TILE_ROWS]);
    // SAFETY: this function's contract guarantees that its pointers are valid for a whole tile.
    unsafe {
        for (i, row) in tile.0.iter_mut().enumerate() {
            row.as_mut_ptr().copy_from(begin.0.add(i * begin.1), TILE_COLS);
        }
    }
    f32_tile(isa, a, b, &mut tile);
    // SAFETY: this function's contract guarantees that its pointers are valid for a whole tile.
    unsafe {
        for (i, row) in tile.0.iter().enumerate() {
            row.as_ptr().copy_to(out.0.add(i * out.1), TILE_COLS);
        }
    }
}

/// `tile += a · b` where a unit is two `i16`.
pub(super) fn int16_tile(
    isa: Isa,
    a: BlockFloatOperand,
    b: BlockFloatOperand,
    units_per_block: usize,
    tile: &mut Tile,
) {
    let depth = BlockFloatOperand::depth(a, b, units_per_block);
    let size = (depth, units_per_block);
    match isa.level() {
        // SAFETY: `isa` was detected, so the CPU supports its level; lengths are checked.
        #[cfg(target_arch = "x86_64")]
        IsaLevel::Avx512Vnni => unsafe { x86::int16_avx512(size, a, b, tile) },
        // SAFETY: `isa` was detected, so the CPU supports its level; lengths are checked.
        #[cfg(target_arch = "x86_64")]
        IsaLevel::AvxVnni => unsafe { x86::int16_avxvnni(size, a, b, tile) },
        // SAFETY: `isa` was detected, so the CPU supports its level; lengths are checked.
        #[cfg(target_arch = "x86_64")]
        IsaLevel::Avx2 => unsafe { x86::int16_avx2(size, a, b, tile) },
        _ => scalar(units_per_block, a, b, None, tile, |a, b| {
            let low = i32::from(a as i16) * i32::from(b as i16);
            low + i32::from((a >> 16) as i16) * i32::from((b >> 16) as i16)
        }),
    }
}

/// `tile += a · b` where a unit is four bytes: `a` holds `q + 128` unsigned, `b` signed ones, and
/// `offsets` `-128 Σ b` per block and column.
pub(crate) fn int8_tile(
    isa: Isa,
    a: BlockFloatOperand,
    b: BlockFloatOperand,
    offsets: &[i32],
    units_per_block: usize,
    tile: &mut Tile,
) {
    let depth = BlockFloatOperand::depth(a, b, units_per_block);
    assert!(offsets.len() >= depth.div_ceil(units_per_block) * TILE_COLS);
    let size = (depth, units_per_block);
    match isa.level() {
        // SAFETY: `isa` was detected, so the CPU supports its level; lengths are checked.
        #[cfg(target_arch = "x86_64")]
        IsaLevel::Avx512Vnni => unsafe { x86::int8_avx512(size, a, b, offsets, tile) },
        // SAFETY: `isa` was detected, so the CPU supports its level; lengths are checked.
        #[cfg(target_arch = "x86_64")]
        IsaLevel::AvxVnni => unsafe { x86::int8_avxvnni(size, a, b, offsets, tile) },
        // SAFETY: `isa` was detected, so the CPU supports its level; lengths are checked.
        #[cfg(target_arch = "x86_64")]
        IsaLevel::Avx2 => unsafe { x86::int8_avx2(size, a, b, offsets, tile) },
        _ => scalar(units_per_block, a, b, Some(offsets), tile, |a, b| {
            let of = |i: u32| i32::from((a >> (8 * i)) as u8) * i32::from((b >> (8 * i)) as i8);
            of(0) + of(1) + of(2) + of(3)
        }),
    }
}

/// The portable integer kernels, auto-vectorized for the baseline of the target.
#[inline(always)]
fn scalar(
    units_per_block: usize,
    a: BlockFloatOperand,
    b: BlockFloatOperand,
    offsets: Option<&[i32]>,
    tile: &mut Tile,
    product: impl Fn(u32, u32) -> i32,
) {
    let blocks = a.units.chunks(units_per_block * TILE_ROWS);
    let blocks = blocks.zip(b.units.chunks(units_per_block * TILE_COLS)).enumerate();
    for (block, (a_units, b_units)) in blocks {
        let a_scales = &a.scales[block * TILE_ROWS..][..TILE_ROWS];
        let b_scales = &b.scales[block * TILE_COLS..][..TILE_COLS];
        for (i, (row, a_scale)) in tile.0.iter_mut().zip(a_scales).enumerate() {
            let mut sums = [0i32; TILE_COLS];
            if let Some(offsets) = offsets {
                sums.copy_from_slice(&offsets[block * TILE_COLS..][..TILE_COLS]);
            }
            let columns = b_units.chunks_exact(TILE_COLS);
            for (a, b) in a_units.chunks_exact(TILE_ROWS).zip(columns) {
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum += product(a[i], *b);
                }
            }
            for ((value, sum), b_scale) in row.iter_mut().zip(sums).zip(b_scales) {
                *value = (sum as f32).mul_add(a_scale * b_scale, *value);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{BlockFloatOperand, TILE_COLS, TILE_ROWS, Tile};

    /// # Safety
    /// `a` and `b` hold `depth` units for a tile's rows and columns; `begin` and `out` point to a
    /// tile's rows, a stride apart.
    #[target_feature(enable = "avx512f")]
    pub(crate) unsafe fn f32_avx512(
        depth: usize,
        a: *const u32,
        b: *const u32,
        begin: (*const f32, usize),
        out: (*mut f32, usize),
    ) {
        let (a, b): (*const f32, *const f32) = (a.cast(), b.cast());
        // SAFETY: this function's contract guarantees valid pointers to a whole tile; a tile has 12 rows of 32.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); 2]; TILE_ROWS];
            for (i, sums) in sums.iter_mut().enumerate() {
                let row = begin.0.add(i * begin.1);
                *sums = [_mm512_loadu_ps(row), _mm512_loadu_ps(row.add(16))];
            }
            for unit in 0..depth {
                let b = b.add(unit * TILE_COLS);
                let (b0, b1) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
                let a = a.add(unit * TILE_ROWS);
                for (i, [s0, s1]) in sums.iter_mut().enumerate() {
                    let a = _mm512_set1_ps(*a.add(i));
                    *s0 = _mm512_fmadd_ps(a, b0, *s0);
                    *s1 = _mm512_fmadd_ps(a, b1, *s1);
                }
            }
            for (i, [s0, s1]) in sums.into_iter().enumerate() {
                let row = out.0.add(i * out.1);
                _mm512_storeu_ps(row, s0);
                _mm512_storeu_ps(row.add(16), s1);
            }
        }
    }

    /// # Safety
    /// `a` and `b` hold `depth` units for a tile's rows and columns.
    #[target_feature(enable = "avx2,fma")]
    pub(crate) unsafe fn f32_avx2(depth: usize, a: *const u32, b: *const u32, tile: &mut Tile) {
        let (a, b): (*const f32, *const f32) = (a.cast(), b.cast());
        let out = tile.0.as_mut_ptr().cast::<f32>();
        for (first, column) in [(0, 0), (0, 16), (6, 0), (6, 16)] {
            // SAFETY: this function's contract guarantees valid pointers to a whole tile; a quarter of a
            // tile is 6 rows of 16.
            unsafe {
                let mut sums = [[_mm256_setzero_ps(); 2]; 6];
                for (i, sums) in sums.iter_mut().enumerate() {
                    let row = out.add((first + i) * TILE_COLS + column);
                    *sums = [_mm256_load_ps(row), _mm256_load_ps(row.add(8))];
                }
                for unit in 0..depth {
                    let b = b.add(unit * TILE_COLS + column);
                    let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
                    let a = a.add(unit * TILE_ROWS + first);
                    for (i, [s0, s1]) in sums.iter_mut().enumerate() {
                        let a = _mm256_set1_ps(*a.add(i));
                        *s0 = _mm256_fmadd_ps(a, b0, *s0);
                        *s1 = _mm256_fmadd_ps(a, b1, *s1);
                    }
                }
                for (i, [s0, s1]) in sums.into_iter().enumerate() {
                    let row = out.add((first + i) * TILE_COLS + column);
                    _mm256_store_ps(row, s0);
                    _mm256_store_ps(row.add(8), s1);
                }
            }
        }
    }

    /// An integer kernel over 512-bit registers: `$dot` multiplies and adds a unit's values, and
    /// sums begin with `$offsets` if there are any.
    macro_rules! wide {
        ($name:ident, $dot:expr, |$block:ident| $begin:expr, ($($offsets:ident: $ty:ty)?)) => {
            /// # Safety
            /// Both sides hold `depth` units and the scales of their blocks.
            #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
            pub(in crate::ops) unsafe fn $name(
                (depth, units_per_block): (usize, usize),
                a: BlockFloatOperand,
                b: BlockFloatOperand,
                $($offsets: $ty,)?
                tile: &mut Tile,
            ) {
                let (mut a_units, mut b_units) = (a.units.as_ptr(), b.units.as_ptr());
                let out = tile.0.as_mut_ptr().cast::<f32>();
                for ($block, first) in (0..depth).step_by(units_per_block).enumerate() {
                    // SAFETY: this function's contract guarantees that its pointers are valid for a whole tile.
                    unsafe {
                        let mut sums: [[__m512i; 2]; TILE_ROWS] = [$begin; TILE_ROWS];
                        for _ in 0..units_per_block.min(depth - first) {
                            let b0 = _mm512_loadu_si512(b_units.cast());
                            let b1 = _mm512_loadu_si512(b_units.add(16).cast());
                            for (i, [s0, s1]) in sums.iter_mut().enumerate() {
                                let a = _mm512_set1_epi32(*a_units.add(i) as i32);
                                *s0 = $dot(*s0, a, b0);
                                *s1 = $dot(*s1, a, b1);
                            }
                            a_units = a_units.add(TILE_ROWS);
                            b_units = b_units.add(TILE_COLS);
                        }
                        let b_scales = b.scales.as_ptr().add($block * TILE_COLS);
                        let a_scales = a.scales.as_ptr().add($block * TILE_ROWS);
                        let (b0, b1) =
                            (_mm512_loadu_ps(b_scales), _mm512_loadu_ps(b_scales.add(16)));
                        for (i, [s0, s1]) in sums.into_iter().enumerate() {
                            let a = _mm512_set1_ps(*a_scales.add(i));
                            let row = out.add(i * TILE_COLS);
                            let add = |row: *mut f32, sum, b| {
                                let scale = _mm512_mul_ps(a, b);
                                let sum = _mm512_cvtepi32_ps(sum);
                                _mm512_store_ps(row, _mm512_fmadd_ps(sum, scale, _mm512_load_ps(row)));
                            };
                            add(row, s0, b0);
                            add(row.add(16), s1, b1);
                        }
                    }
                }
            }
        };
    }

    wide!(int16_avx512, _mm512_dpwssd_epi32, |block| [_mm512_setzero_si512(); 2], ());
    wide!(
        int8_avx512,
        _mm512_dpbusd_epi32,
        |block| {
            let at = offsets.as_ptr().add(block * TILE_COLS);
            [_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(16).cast())]
        },
        (offsets: &[i32])
    );

    /// The same over 256-bit registers, a quarter of a tile at a time.
    macro_rules! narrow {
        ($name:ident, $features:literal, $dot:expr, |$block:ident, $column:ident| $begin:expr, ($($offsets:ident: $ty:ty)?)) => {
            /// # Safety
            /// Both sides hold `depth` units and the scales of their blocks.
            #[target_feature(enable = $features)]
            pub(in crate::ops) unsafe fn $name(
                (depth, units_per_block): (usize, usize),
                a: BlockFloatOperand,
                b: BlockFloatOperand,
                $($offsets: $ty,)?
                tile: &mut Tile,
            ) {
                let out = tile.0.as_mut_ptr().cast::<f32>();
                for (first_row, $column) in [(0, 0), (0, 16), (6, 0), (6, 16)] {
                    let mut a_units = a.units.as_ptr().wrapping_add(first_row);
                    let mut b_units = b.units.as_ptr().wrapping_add($column);
                    for ($block, first) in (0..depth).step_by(units_per_block).enumerate() {
                        // SAFETY: this function's contract guarantees that its pointers are valid for a
                        // whole tile.
                        unsafe {
                            let mut sums: [[__m256i; 2]; 6] = [$begin; 6];
                            for _ in 0..units_per_block.min(depth - first) {
                                let b0 = _mm256_loadu_si256(b_units.cast());
                                let b1 = _mm256_loadu_si256(b_units.add(8).cast());
                                for (i, [s0, s1]) in sums.iter_mut().enumerate() {
                                    let a = _mm256_set1_epi32(*a_units.add(i) as i32);
                                    *s0 = $dot(*s0, a, b0);
                                    *s1 = $dot(*s1, a, b1);
                                }
                                a_units = a_units.wrapping_add(TILE_ROWS);
                                b_units = b_units.wrapping_add(TILE_COLS);
                            }
                            let b_scales = b.scales.as_ptr().add($block * TILE_COLS + $column);
                            let a_scales = a.scales.as_ptr().add($block * TILE_ROWS + first_row);
                            let (b0, b1) =
                                (_mm256_loadu_ps(b_scales), _mm256_loadu_ps(b_scales.add(8)));
                            for (i, [s0, s1]) in sums.into_iter().enumerate() {
                                let a = _mm256_set1_ps(*a_scales.add(i));
                                let row = out.add((first_row + i) * TILE_COLS + $column);
                                let add = |row: *mut f32, sum, b| {
                                    let scale = _mm256_mul_ps(a, b);
                                    let sum = _mm256_cvtepi32_ps(sum);
                                    let value = _mm256_load_ps(row);
                                    _mm256_store_ps(row, _mm256_fmadd_ps(sum, scale, value));
                                };
                                add(row, s0, b0);
                                add(row.add(8), s1, b1);
                            }
                        }
                    }
                }
            }
        };
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn words(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
    }

    /// Unsigned times signed bytes, as sums of even and of odd ones in 16 bits: `vpmaddubsw` would
    /// saturate.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn bytes(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        let even = _mm256_and_si256(a, _mm256_set1_epi16(0xff));
        let odd = _mm256_srli_epi16::<8>(a);
        let b_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(b));
        let b_odd = _mm256_srai_epi16::<8>(b);
        let sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, b_even));
        _mm256_add_epi32(sum, _mm256_madd_epi16(odd, b_odd))
    }

    narrow!(int16_avx2, "avx2,fma", words, |block, column| [_mm256_setzero_si256(); 2], ());
    narrow!(
        int16_avxvnni,
        "avx2,fma,avxvnni",
        _mm256_dpwssd_avx_epi32,
        |block, column| [_mm256_setzero_si256(); 2],
        ()
    );
    narrow!(
        int8_avx2,
        "avx2,fma",
        bytes,
        |block, column| {
            let at = offsets.as_ptr().add(block * TILE_COLS + column);
            [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(8).cast())]
        },
        (offsets: &[i32])
    );
    narrow!(
        int8_avxvnni,
        "avx2,fma,avxvnni",
        _mm256_dpbusd_avx_epi32,
        |block, column| {
            let at = offsets.as_ptr().add(block * TILE_COLS + column);
            [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(8).cast())]
        },
        (offsets: &[i32])
    );
}
