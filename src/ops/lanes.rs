//! Vectors of sixteen `f32` in the registers of each ISA level, and the small matrix product that
//! attention is built from.
//!
//! A kernel is written once over [`Lanes`] and compiled once per ISA level by [`isa_levels!`]. Everything a kernel
//! calls is `#[inline(always)]`, and no closure handles registers, so that it is compiled with the
//! level's features.

#![allow(clippy::needless_range_loop)] // registers are named by constant indices

use std::cell::Cell;
use std::thread::LocalKey;

use half::f16;

use crate::isa::{Isa, IsaLevel};

/// Columns of a group: the matrices a kernel reads are padded to whole groups.
pub(crate) const LANE_GROUP: usize = 16;

/// Sixteen `f32`.
///
/// # Safety
/// One contract for all functions: the CPU has the features of the implementing type's ISA level, and a
/// pointer that is loaded from or stored to is valid for sixteen elements. No alignment is needed.
pub(crate) trait Lanes: Copy {
    /// Rows of a product's tile.
    const ROWS: usize;
    /// Groups of columns of a product's full tile.
    const GROUPS: usize;

    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn load_f16(from: *const f16) -> Self;
    unsafe fn load_i8(from: *const i8) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    /// `self * factor + term`.
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self;
    /// The maximum, or `other` if either is NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// Rounds to the nearest integers.
    unsafe fn round(self) -> Self;
    /// `self * 2ⁿ` for integers `n` in -126..=127, and 0 where `x`, from which `n` was rounded, is
    /// below -126.
    unsafe fn ldexp(self, n: Self, x: Self) -> Self;
    /// `other` in the lanes outside `low..high`.
    unsafe fn within(self, low: isize, high: isize, other: f32) -> Self;
    /// The largest of all lanes.
    unsafe fn largest(self) -> f32;

    /// The sum of all lanes.
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let mut lanes = [0f32; LANE_GROUP];
        // SAFETY: the contract of `Lanes` guarantees the CPU features; the array has sixteen elements.
        unsafe { self.store(lanes.as_mut_ptr()) };
        let mut width = LANE_GROUP / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
            width /= 2;
        }
        lanes[0]
    }
}

/// `2ˣ` to 2 units in the last place: 0 below -126, anything above 127.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn exp2<S: Lanes>(x: S) -> S {
    // Approximately the minimax polynomial in relative error of this degree with `p(0) = 1`
    // on -1/2..1/2: 9.2e-8.
    #[allow(clippy::approx_constant)] // ln 2 would be the Taylor polynomial's
    const TERMS: [f32; 5] = [9.671_513e-3, 5.550_733_6e-2, 2.402_224_2e-1, 6.931_47e-1, 1.0];
    // SAFETY: this function's contract guarantees the CPU features.
    unsafe {
        let n = x.round();
        let f = x.sub(n);
        let mut p = S::splat(1.326_472_7e-3);
        for term in TERMS {
            p = p.mul_add(f, S::splat(term));
        }
        p.ldexp(n, x)
    }
}

/// Element types of a product's right operand.
pub(crate) trait Element: Copy + Send + Sync {
    /// Sixteen of them as `f32`.
    ///
    /// # Safety
    /// As for [`Lanes`].
    unsafe fn load<S: Lanes>(from: *const Self) -> S;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Lanes>(from: *const Self) -> S {
        // SAFETY: the contract of `Element::load` is that of `Lanes`.
        unsafe { S::load(from) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<S: Lanes>(from: *const Self) -> S {
        // SAFETY: the contract of `Element::load` is that of `Lanes`.
        unsafe { S::load_f16(from) }
    }
}

impl Element for i8 {
    #[inline(always)]
    unsafe fn load<S: Lanes>(from: *const Self) -> S {
        // SAFETY: the contract of `Element::load` is that of `Lanes`.
        unsafe { S::load_i8(from) }
    }
}

/// The portable form: four vectors of four, as SSE2 and NEON have them.
#[derive(Clone, Copy)]
pub(crate) struct LanesPortable([[f32; 4]; 4]);

/// `[a, b][i][j]` for all lanes.
macro_rules! each_lane {
    ($i:ident, $j:ident, $value:expr) => {{
        let mut lanes = [[0f32; 4]; 4];
        for $i in 0..4 {
            for $j in 0..4 {
                lanes[$i][$j] = $value;
            }
        }
        LanesPortable(lanes)
    }};
}

impl Lanes for LanesPortable {
    // NEON has twice the registers of SSE2.
    const ROWS: usize = if cfg!(target_arch = "aarch64") { 4 } else { 2 };
    const GROUPS: usize = 1;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([[x; 4]; 4])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the contract of `Lanes` guarantees that the pointer is valid for sixteen elements.
        Self(unsafe { from.cast::<[[f32; 4]; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: the contract of `Lanes` guarantees that the pointer is valid for sixteen elements.
        let values = unsafe { from.cast::<[f16; 16]>().read_unaligned() };
        each_lane!(i, j, f32_of(values[4 * i + j]))
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: the contract of `Lanes` guarantees that the pointer is valid for sixteen elements.
        let values = unsafe { from.cast::<[i8; 16]>().read_unaligned() };
        each_lane!(i, j, f32::from(values[4 * i + j]))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the contract of `Lanes` guarantees that the pointer is valid for sixteen elements.
        unsafe { to.cast::<[[f32; 4]; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        each_lane!(i, j, self.0[i][j] + other.0[i][j])
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        each_lane!(i, j, self.0[i][j] - other.0[i][j])
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        each_lane!(i, j, self.0[i][j] * other.0[i][j])
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        // Without the instruction `f32::mul_add` is a call into the maths library.
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            each_lane!(i, j, self.0[i][j].mul_add(factor.0[i][j], term.0[i][j]))
        } else {
            each_lane!(i, j, self.0[i][j] * factor.0[i][j] + term.0[i][j])
        }
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        each_lane!(i, j, if self.0[i][j] > other.0[i][j] { self.0[i][j] } else { other.0[i][j] })
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
        each_lane!(i, j, (self.0[i][j] + ROUND) - ROUND)
    }
    #[inline(always)]
    unsafe fn ldexp(self, n: Self, x: Self) -> Self {
        each_lane!(i, j, {
            let power = f32::from_bits(((n.0[i][j] as i32).wrapping_add(127) << 23) as u32);
            if x.0[i][j] < -126.0 { 0.0 } else { self.0[i][j] * power }
        })
    }
    #[inline(always)]
    unsafe fn within(self, low: isize, high: isize, other: f32) -> Self {
        each_lane!(i, j, {
            let lane = (4 * i + j) as isize;
            if low <= lane && lane < high { self.0[i][j] } else { other }
        })
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        let mut largest = f32::NEG_INFINITY;
        for four in self.0 {
            for x in four {
                largest = if x > largest { x } else { largest };
            }
        }
        largest
    }
}

/// Converts an `f16` by bits: `f16::to_f32` detects CPU features on every call.
#[inline(always)]
fn f32_of(x: f16) -> f32 {
    let bits = u32::from(x.to_bits());
    // Shifts exponent and mantissa in place, then corrects the bias by a multiplication, which
    // is right for subnormals too.
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    let magnitude = if bits & 0x7c00 == 0x7c00 {
        f32::from_bits(0x7f80_0000 | (bits & 0x03ff) << 13)
    } else {
        magnitude
    };
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{LanesAvx2, LanesAvx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Lanes, f16};

    /// Two registers of eight.
    #[derive(Clone, Copy)]
    pub(crate) struct LanesAvx2(__m256, __m256);

    /// One register of sixteen.
    #[derive(Clone, Copy)]
    pub(crate) struct LanesAvx512(__m512);

    // SAFETY of all blocks below: the contract of `Lanes` guarantees AVX2, FMA and F16C, and pointers are
    // valid for sixteen elements.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Lanes for LanesAvx2 {
        const ROWS: usize = 6;
        const GROUPS: usize = 1;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { Self(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> Self {
            unsafe {
                let (low, high) = (from.cast(), from.add(8).cast());
                Self(_mm256_cvtph_ps(_mm_loadu_si128(low)), _mm256_cvtph_ps(_mm_loadu_si128(high)))
            }
        }
        #[inline(always)]
        unsafe fn load_i8(from: *const i8) -> Self {
            unsafe {
                let all = _mm_loadu_si128(from.cast());
                Self(
                    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(all)),
                    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(all))),
                )
            }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            unsafe { Self(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            unsafe { Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
            unsafe {
                Self(
                    _mm256_fmadd_ps(self.0, factor.0, term.0),
                    _mm256_fmadd_ps(self.1, factor.1, term.1),
                )
            }
        }
        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            unsafe { Self(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn round(self) -> Self {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            unsafe { Self(_mm256_round_ps::<NEAREST>(self.0), _mm256_round_ps::<NEAREST>(self.1)) }
        }
        #[inline(always)]
        unsafe fn ldexp(self, n: Self, x: Self) -> Self {
            unsafe {
                let bias = _mm256_set1_epi32(127);
                let low = _mm256_add_epi32(_mm256_cvtps_epi32(n.0), bias);
                let high = _mm256_add_epi32(_mm256_cvtps_epi32(n.1), bias);
                let low = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(low));
                let high = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(high));
                let product = self.mul(Self(low, high));
                let limit = _mm256_set1_ps(-126.0);
                Self(
                    _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.0, limit), product.0),
                    _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.1, limit), product.1),
                )
            }
        }
        #[inline(always)]
        unsafe fn within(self, low: isize, high: isize, other: f32) -> Self {
            unsafe {
                let (low, high) = (_mm256_set1_ps(low as f32), _mm256_set1_ps(high as f32));
                let other = _mm256_set1_ps(other);
                let first = _mm256_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0);
                let second = _mm256_add_ps(first, _mm256_set1_ps(8.0));
                let keep_first = _mm256_and_ps(
                    _mm256_cmp_ps::<_CMP_LE_OQ>(low, first),
                    _mm256_cmp_ps::<_CMP_LT_OQ>(first, high),
                );
                let keep_second = _mm256_and_ps(
                    _mm256_cmp_ps::<_CMP_LE_OQ>(low, second),
                    _mm256_cmp_ps::<_CMP_LT_OQ>(second, high),
                );
                Self(
                    _mm256_blendv_ps(other, self.0, keep_first),
                    _mm256_blendv_ps(other, self.1, keep_second),
                )
            }
        }
        #[inline(always)]
        unsafe fn largest(self) -> f32 {
            unsafe {
                let eight = _mm256_max_ps(self.0, self.1);
                let four =
                    _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
            }
        }
    }

    // SAFETY of all blocks below: the contract of `Lanes` guarantees AVX-512 F, BW, DQ and VL, and pointers
    // are valid for sixteen elements.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Lanes for LanesAvx512 {
        const ROWS: usize = 8;
        const GROUPS: usize = 2;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { Self(_mm512_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { Self(_mm512_loadu_ps(from)) }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> Self {
            unsafe { Self(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
        }
        #[inline(always)]
        unsafe fn load_i8(from: *const i8) -> Self {
            unsafe { Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())))) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { Self(_mm512_add_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            unsafe { Self(_mm512_sub_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            unsafe { Self(_mm512_mul_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
            unsafe { Self(_mm512_fmadd_ps(self.0, factor.0, term.0)) }
        }
        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            unsafe { Self(_mm512_max_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn round(self) -> Self {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            unsafe { Self(_mm512_roundscale_ps::<NEAREST>(self.0)) }
        }
        #[inline(always)]
        unsafe fn ldexp(self, n: Self, x: Self) -> Self {
            unsafe {
                let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x.0, _mm512_set1_ps(-126.0));
                Self(_mm512_maskz_scalef_ps(keep, self.0, n.0))
            }
        }
        #[inline(always)]
        unsafe fn within(self, low: isize, high: isize, other: f32) -> Self {
            let (low, high) = (low.clamp(0, 16), high.clamp(0, 16));
            let keep = ((1u32 << high) - 1) & !((1u32 << low) - 1);
            unsafe { Self(_mm512_mask_blend_ps(keep as u16, _mm512_set1_ps(other), self.0)) }
        }
        #[inline(always)]
        unsafe fn largest(self) -> f32 {
            unsafe { _mm512_reduce_max_ps(self.0) }
        }
    }
}

/// Compiles a kernel over [`Lanes`] once per ISA level: `unsafe fn name(arguments) = body;` becomes
/// `unsafe fn name(isa, arguments)` that runs `body::<Lanes of the level>(arguments)`.
///
/// `isa` proves that the CPU supports the features; `body` may have further safety requirements.
macro_rules! isa_levels {
    ($($(#[$meta:meta])* $vis:vis unsafe fn $name:ident $(<$g:ident: $bound:path>)? ($($arg:ident: $ty:ty),* $(,)?) = $body:ident;)*) => {$(
        $(#[$meta])*
        $vis unsafe fn $name $(<$g: $bound>)? (isa: $crate::isa::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                use $crate::isa::IsaLevel;
                use $crate::ops::lanes::{LanesAvx2, LanesAvx512, LanesPortable};
                #[target_feature(enable = "avx2,fma,f16c")]
                unsafe fn avx2 $(<$g: $bound>)? ($($arg: $ty),*) {
                    // SAFETY: the features are enabled here; the rest is guaranteed by this function's
                    // safety contract.
                    unsafe { $body::<LanesAvx2 $(, $g)?>($($arg),*) }
                }
                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
                unsafe fn avx512 $(<$g: $bound>)? ($($arg: $ty),*) {
                    // SAFETY: the features are enabled here; the rest is guaranteed by this function's
                    // safety contract.
                    unsafe { $body::<LanesAvx512 $(, $g)?>($($arg),*) }
                }
                // SAFETY: `isa` proves that the CPU supports the features of its level; the rest is what the
                // `# Safety` section of the kernel requires of the caller.
                unsafe {
                    match isa.level() {
                        IsaLevel::Scalar => $body::<LanesPortable $(, $g)?>($($arg),*),
                        IsaLevel::Avx2 | IsaLevel::AvxVnni => avx2 $(::<$g>)? ($($arg),*),
                        IsaLevel::Avx512Vnni => avx512 $(::<$g>)? ($($arg),*),
                    }
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            {
                let _ = isa;
                // SAFETY: portable Rust needs no features; the rest is guaranteed by this function's safety
                // contract.
                unsafe { $body::<$crate::ops::lanes::LanesPortable $(, $g)?>($($arg),*) }
            }
        }
    )*};
}
pub(crate) use isa_levels;

/// Rows of a product's tile on an ISA level: row counts that are multiples of it are fastest.
pub(crate) fn tile_rows(isa: Isa) -> usize {
    #[cfg(target_arch = "x86_64")]
    match isa.level() {
        IsaLevel::Scalar => LanesPortable::ROWS,
        IsaLevel::Avx2 | IsaLevel::AvxVnni => LanesAvx2::ROWS,
        IsaLevel::Avx512Vnni => LanesAvx512::ROWS,
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = isa;
        LanesPortable::ROWS
    }
}

/// The largest number of rows of a tile on any ISA level.
pub(crate) const MAX_TILE_ROWS: usize = 8;

/// The left operand of a [`product`], row-major, or of a [`product_transposed`], column-major.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub values: &'a [f32],
    pub stride: usize,
}

/// The right operand: row `p`, column `c` is at `(c / 16) * group_stride + p * row_stride + c % 16`.
/// A row-major matrix has a group stride of 16, one of panels of 16 columns a row stride of 16.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a, B> {
    pub values: &'a [B],
    pub row_stride: usize,
    pub group_stride: usize,
}

/// `c = a · b`, or `c += a · b` with `accumulate`: `a (rows, depth)`, `b (depth, 16 · groups)`,
/// `c (rows, 16 · groups)` with rows `stride` apart.
///
/// Each element of `c` is summed in the order of `depth`, independent of the tile it is in.
pub(crate) fn product<B: Element>(
    isa: Isa,
    size: (usize, usize, usize),
    a: Left,
    b: Right<B>,
    c: &mut [f32],
    stride: usize,
    accumulate: bool,
) {
    let (rows, _, depth) = size;
    let strides = (a.stride, 1);
    if let Some(product) = checked((rows, depth), size, (a, strides), b, c, stride, accumulate) {
        // SAFETY: all accesses are in bounds, as `checked` asserts.
        unsafe { tiles(isa, product) }
    }
}

/// As [`product`], with `a` column-major: `(depth, rows)`.
pub(crate) fn product_transposed<B: Element>(
    isa: Isa,
    size: (usize, usize, usize),
    a: Left,
    b: Right<B>,
    c: &mut [f32],
    stride: usize,
    accumulate: bool,
) {
    let (rows, _, depth) = size;
    let strides = (1, a.stride);
    if let Some(product) = checked((depth, rows), size, (a, strides), b, c, stride, accumulate) {
        // SAFETY: all accesses are in bounds, as `checked` asserts.
        unsafe { tiles(isa, product) }
    }
}

/// The product if it is not empty, its bounds checked; the left side is stored as `(outer, inner)`, and has the strides
/// of a row and of a step of the depth.
fn checked<B: Element>(
    (outer, inner): (usize, usize),
    (rows, groups, depth): (usize, usize, usize),
    (a, (row_stride, depth_stride)): (Left, (usize, usize)),
    b: Right<B>,
    c: &mut [f32],
    stride: usize,
    accumulate: bool,
) -> Option<TileProduct<B>> {
    if rows == 0 || groups == 0 {
        return None;
    }
    // The end of `width` values behind so many strides; too large to be in bounds if it overflows.
    let end = |steps: &[(usize, usize)], width: usize| {
        let before = steps.iter().map(|&(steps, stride)| steps.saturating_mul(stride));
        before.fold(width, usize::saturating_add)
    };
    if depth > 0 {
        assert!(end(&[(outer - 1, a.stride)], inner) <= a.values.len());
        let last = [(groups - 1, b.group_stride), (depth - 1, b.row_stride)];
        assert!(end(&last, LANE_GROUP) <= b.values.len());
    }
    assert!(end(&[(rows - 1, stride)], groups.saturating_mul(LANE_GROUP)) <= c.len());
    Some(TileProduct {
        size: (rows, groups, depth),
        a: (a.values.as_ptr(), row_stride, depth_stride),
        b: (b.values.as_ptr(), b.row_stride, b.group_stride),
        c: (c.as_mut_ptr(), stride),
        accumulate,
    })
}

/// A product with its bounds checked.
#[derive(Clone, Copy)]
struct TileProduct<B> {
    size: (usize, usize, usize),
    a: (*const f32, usize, usize), // strides of a row and of a step of the depth
    b: (*const B, usize, usize),
    c: (*mut f32, usize),
    accumulate: bool,
}

isa_levels! {
    unsafe fn tiles<B: Element>(product: TileProduct<B>) = tiles_body;
}

#[inline(always)]
unsafe fn tiles_body<S: Lanes, B: Element>(product: TileProduct<B>) {
    let (rows, groups, _) = product.size;
    let mut row = 0;
    while row < rows {
        let m = if rows - row < S::ROWS { rows - row } else { S::ROWS };
        let mut group = 0;
        while group < groups {
            // With few rows, more columns are needed to keep the FMA units busy.
            let together = match groups - group {
                4.. if S::GROUPS == 2 && m <= 4 => 4,
                2.. if S::GROUPS == 2 => 2,
                _ => 1,
            };
            // Tiles that the level does not use are not compiled.
            macro_rules! tile_of {
                ($($m:literal $g:literal),*) => {
                    match (m, together) {
                        $(($m, $g) if const { has_tile::<S>($m, $g) } => {
                            // SAFETY: the caller guarantees that the product is in bounds, and the tile
                            // is inside of it.
                            unsafe { tile::<S, B, $m, $g>(product, row, group) }
                        })*
                        _ => unreachable!("no ISA level uses such a tile"),
                    }
                };
            }
            tile_of!(
                1 1, 2 1, 3 1, 4 1, 5 1, 6 1, 7 1, 8 1, 1 2, 2 2, 3 2, 4 2, 5 2, 6 2, 7 2, 8 2, 1 4,
                2 4, 3 4, 4 4
            );
            group += together;
        }
        row += m;
    }
}

/// Whether a product is cut into tiles of `rows` rows and `groups` groups of columns.
const fn has_tile<S: Lanes>(rows: usize, groups: usize) -> bool {
    rows <= S::ROWS && (groups == 1 || S::GROUPS == 2 && (groups == 2 || rows <= 4))
}

/// `M` rows and `G` groups of columns, held in registers over the whole depth.
#[inline(always)]
unsafe fn tile<S: Lanes, B: Element, const M: usize, const G: usize>(
    product: TileProduct<B>,
    row: usize,
    group: usize,
) {
    let (_, _, depth) = product.size;
    let (a, a_row_stride, a_depth_stride) = product.a;
    let (b, row_stride, group_stride) = product.b;
    let (c, stride) = product.c;
    // SAFETY: the tile lies inside of a product that `checked` found in bounds.
    unsafe {
        let mut a = a.add(row * a_row_stride);
        let mut b = b.add(group * group_stride);
        let mut sums = [[S::splat(0.0); G]; M];
        for _ in 0..depth {
            let mut right = [S::splat(0.0); G];
            for g in 0..G {
                right[g] = B::load::<S>(b.add(g * group_stride));
            }
            for m in 0..M {
                let left = S::splat(*a.add(m * a_row_stride));
                for g in 0..G {
                    sums[m][g] = left.mul_add(right[g], sums[m][g]);
                }
            }
            // Past the end after the last step.
            a = a.wrapping_add(a_depth_stride);
            b = b.wrapping_add(row_stride);
        }
        for m in 0..M {
            for g in 0..G {
                let to = c.add((row + m) * stride + (group + g) * LANE_GROUP);
                let sum = sums[m][g];
                if product.accumulate { S::load(to).add(sum).store(to) } else { sum.store(to) }
            }
        }
    }
}

/// Copies up to 16 rows of `width` values, `stride` apart, as columns of a panel `(width, 16)`;
/// columns without a row become 0.
pub(crate) fn panel(rows: &[f32], stride: usize, count: usize, width: usize, to: &mut [f32]) {
    assert!(count <= LANE_GROUP && to.len() >= width * LANE_GROUP);
    assert!(count == 0 || (count - 1) * stride + width <= rows.len());
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
    let mut row = 0;
    #[cfg(target_arch = "x86_64")]
    while row + 4 <= count {
        use std::arch::x86_64::*;
        let mut column = 0;
        while column + 4 <= width {
            // SAFETY: SSE is part of the target; rows and the panel are in bounds by the
            // assertions.
            unsafe {
                let from = rows.as_ptr().add(row * stride + column);
                let a = _mm_loadu_ps(from);
                let b = _mm_loadu_ps(from.add(stride));
                let c = _mm_loadu_ps(from.add(2 * stride));
                let d = _mm_loadu_ps(from.add(3 * stride));
                let (ab, cd) = (_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
                let (ab_high, cd_high) = (_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d));
                let to = to.as_mut_ptr().add(column * LANE_GROUP + row);
                _mm_storeu_ps(to, _mm_movelh_ps(ab, cd));
                _mm_storeu_ps(to.add(LANE_GROUP), _mm_movehl_ps(cd, ab));
                _mm_storeu_ps(to.add(2 * LANE_GROUP), _mm_movelh_ps(ab_high, cd_high));
                _mm_storeu_ps(to.add(3 * LANE_GROUP), _mm_movehl_ps(cd_high, ab_high));
            }
            column += 4;
        }
        for column in column..width {
            for row in row..row + 4 {
                to[column * LANE_GROUP + row] = rows[row * stride + column];
            }
        }
        row += 4;
    }
    for row in row..count {
        for (column, x) in rows[row * stride..][..width].iter().enumerate() {
            to[column * LANE_GROUP + row] = *x;
        }
    }
    if count < LANE_GROUP {
        for columns in to[..width * LANE_GROUP].chunks_exact_mut(LANE_GROUP) {
            columns[count..].fill(0.0);
        }
    }
}

/// A cache line of `f32`: scratch made of them is aligned for the widest loads.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct CacheLine([f32; LANE_GROUP]);

/// Thread-local scratch memory, reused between calls. Its content is arbitrary.
#[derive(Default)]
pub(crate) struct AlignedScratch {
    lines: Vec<CacheLine>,
}

impl AlignedScratch {
    /// Empty scratch.
    pub(crate) const fn new() -> Self {
        Self { lines: Vec::new() }
    }

    /// Runs `f` with this thread's scratch.
    pub(crate) fn with<R>(
        scratch: &'static LocalKey<Cell<Self>>,
        f: impl FnOnce(&mut Self) -> R,
    ) -> R {
        // Taken, not borrowed: a thread that waits for others may run a task inside another.
        let mut taken = scratch.take();
        let result = f(&mut taken);
        scratch.set(taken);
        result
    }

    /// Slices of the given lengths, each starting at a new cache line.
    pub(crate) fn split<const N: usize>(&mut self, lengths: [usize; N]) -> [&mut [f32]; N] {
        let lines = lengths.map(|length| length.div_ceil(LANE_GROUP));
        let total = lines.iter().sum();
        if self.lines.len() < total {
            self.lines.resize(total, CacheLine([0.0; LANE_GROUP]));
        }
        let mut rest = &mut self.lines[..];
        let mut next = lines.iter().zip(lengths);
        std::array::from_fn(|_| {
            let (&lines, length) = next.next().expect("one per length");
            let (part, behind) = std::mem::take(&mut rest).split_at_mut(lines);
            rest = behind;
            // SAFETY: a line consists of sixteen `f32`.
            unsafe { std::slice::from_raw_parts_mut(part.as_mut_ptr().cast::<f32>(), length) }
        })
    }
}

#[cfg(test)]
mod tests {
    use quantune_adapters::rng::Stream;

    use super::*;

    fn normal(seed: u64, n: usize) -> Vec<f32> {
        let mut stream = Stream::new(seed, "lanes", &[]);
        (0..n).map(|_| stream.normal()).collect()
    }

    #[test]
    fn products_of_every_shape_are_the_naive_sums() {
        for isa in Isa::available() {
            for (rows, groups, depth) in [(1, 1, 0), (3, 1, 5), (8, 2, 17), (13, 3, 64), (23, 5, 9)]
            {
                let (a, width) = (normal(1, rows * depth), groups * LANE_GROUP);
                let (b, before) = (normal(2, depth * width), normal(3, rows * width));
                let b_f16: Vec<f16> = b.iter().map(|&x| f16::from_f32(x)).collect();
                let b_i8: Vec<i8> = b.iter().map(|x| (x * 40.0) as i8).collect();
                let b_f16_exact: Vec<f32> = b_f16.iter().map(|x| x.to_f32()).collect();
                let b_i8_exact: Vec<f32> = b_i8.iter().map(|&x| f32::from(x)).collect();
                for transposed in [false, true] {
                    let stride = if transposed { rows } else { depth };
                    let left = Left { values: &a, stride };
                    let check = |b: &[f32], c: &[f32], accumulate: bool| {
                        for (i, c) in c.iter().enumerate() {
                            let (row, column) = (i / width, i % width);
                            let at = |p| if transposed { p * rows + row } else { row * depth + p };
                            let mut sum = if accumulate { before[i] } else { 0.0 };
                            let mut size = 1.0;
                            for p in 0..depth {
                                let term = a[at(p)] * b[p * width + column];
                                (sum, size) = (sum + term, size + term.abs());
                            }
                            let error = (sum - c).abs() / size;
                            assert!(error < 1e-6, "{isa:?} {rows} {groups} {depth}: {sum} {c}");
                        }
                    };
                    let size = (rows, groups, depth);
                    for accumulate in [false, true] {
                        let mut c = before.clone();
                        multiply(
                            transposed,
                            isa,
                            size,
                            left,
                            rows_of(&b, width),
                            &mut c,
                            accumulate,
                        );
                        check(&b, &c, accumulate);
                        let mut c = before.clone();
                        multiply(
                            transposed,
                            isa,
                            size,
                            left,
                            rows_of(&b_f16, width),
                            &mut c,
                            accumulate,
                        );
                        check(&b_f16_exact, &c, accumulate);
                        let mut c = before.clone();
                        multiply(
                            transposed,
                            isa,
                            size,
                            left,
                            rows_of(&b_i8, width),
                            &mut c,
                            accumulate,
                        );
                        check(&b_i8_exact, &c, accumulate);
                    }
                }
            }
        }
    }

    /// Either product, with contiguous rows of `c`.
    fn multiply<B: Element>(
        transposed: bool,
        isa: Isa,
        size: (usize, usize, usize),
        a: Left,
        b: Right<B>,
        c: &mut [f32],
        accumulate: bool,
    ) {
        let run = if transposed { product_transposed } else { product };
        run(isa, size, a, b, c, size.1 * LANE_GROUP, accumulate);
    }

    fn rows_of<B>(values: &[B], width: usize) -> Right<'_, B> {
        Right { values, row_stride: width, group_stride: LANE_GROUP }
    }

    #[test]
    fn panels_are_transposed_and_padded() {
        for (count, width, stride) in [(16, 8, 9), (5, 7, 7), (0, 3, 3), (13, 64, 70)] {
            let rows = normal(4, count * stride);
            let mut to = vec![f32::NAN; width * LANE_GROUP];
            panel(&rows, stride, count, width, &mut to);
            for (i, x) in to.iter().enumerate() {
                let (column, row) = (i / LANE_GROUP, i % LANE_GROUP);
                let expected = if row < count { rows[row * stride + column] } else { 0.0 };
                assert_eq!(*x, expected);
            }
        }
    }

    isa_levels! {
        unsafe fn exp2_of(x: *mut f32) = exp2_body;
    }

    #[inline(always)]
    unsafe fn exp2_body<S: Lanes>(x: *mut f32) {
        // SAFETY: the test passes sixteen values.
        unsafe { exp2(S::load(x)).store(x) }
    }

    #[test]
    fn exp2_is_exact_to_two_units() {
        for isa in Isa::available() {
            for i in -12600..12690 {
                let x = i as f32 / 100.0;
                let mut y = [x; LANE_GROUP];
                // SAFETY: `y` has sixteen values.
                unsafe { exp2_of(isa, y.as_mut_ptr()) };
                let exact = f64::from(x).exp2();
                let error = (f64::from(y[5]) - exact).abs() / exact;
                assert!(error < 2.5e-7, "{isa:?}: 2^{x} is off by {error:e}");
            }
            let mut edges = [0.0; LANE_GROUP];
            edges[..3].copy_from_slice(&[f32::NEG_INFINITY, -127.0, f32::NAN]);
            // SAFETY: `edges` has sixteen values.
            unsafe { exp2_of(isa, edges.as_mut_ptr()) };
            assert_eq!(edges[..2], [0.0, 0.0]);
            assert!(edges[2].is_nan() && edges[3..] == [1.0; 13]);
        }
    }

    #[test]
    fn every_f16_is_read() {
        for bits in (0..=u16::MAX).filter(|&bits| !f16::from_bits(bits).is_nan()) {
            let x = f16::from_bits(bits);
            assert_eq!(f32_of(x).to_bits(), x.to_f32().to_bits());
        }
    }
}
