//! [`I16Vector`] for AVX2 and AVX-512.

use std::arch::x86_64::*;

use super::activations::{Activations, GROUP_LEN, LANES};
use super::formats::{FloatFormat, Format};
use super::i16_vector::{ActivationValue, I16Vector};
use super::kernel::{self, Output};

/// 16-bit integers of even and of odd index.
#[derive(Clone, Copy)]
pub(super) struct I16Avx2 {
    even: __m256i,
    odd: __m256i,
}

// SAFETY of all blocks below: the contract of `I16Vector` guarantees AVX2, FMA and F16C; loads and
// stores go through references and slices of at least their size.
#[allow(clippy::undocumented_unsafe_blocks)]
impl I16Vector for I16Avx2 {
    /// The lower half belongs to the first 16 values of a group.
    type Sums = __m256;
    const LANES: usize = 8;
    const UNROLLED: bool = true;

    unsafe fn blocks<F: Format, T: ActivationValue, const M: usize>(
        bytes: &[u8],
        x: &Activations<T>,
        first: usize,
        output: &Output,
    ) -> usize {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn with_features<F: Format, T: ActivationValue, const M: usize>(
            bytes: &[u8],
            x: &Activations<T>,
            first: usize,
            output: &Output,
        ) -> usize {
            unsafe { kernel::blocks::<I16Avx2, F, T, M>(bytes, x, first, output) }
        }
        unsafe { with_features::<F, T, M>(bytes, x, first, output) }
    }

    unsafe fn floats<F: FloatFormat, const M: usize>(
        bytes: &[u8],
        x: &Activations<f32>,
        first: usize,
        output: &Output,
    ) -> usize {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn with_features<F: FloatFormat, const M: usize>(
            bytes: &[u8],
            x: &Activations<f32>,
            first: usize,
            output: &Output,
        ) -> usize {
            unsafe { kernel::floats::<I16Avx2, F, M>(bytes, x, first, output) }
        }
        unsafe { with_features::<F, M>(bytes, x, first, output) }
    }

    #[inline(always)]
    fn prefetch(address: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }

    #[inline(always)]
    unsafe fn nibbles(q: &[u8; 16]) -> Self {
        unsafe {
            let q = _mm256_broadcastsi128_si256(_mm_loadu_si128(q.as_ptr().cast()));
            let mask = _mm256_set1_epi16(15);
            // Shifts of 32 bits also bring in bits of the next word, above the mask.
            let even = _mm256_srlv_epi32(q, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
            let odd = _mm256_srlv_epi32(q, _mm256_setr_epi32(8, 8, 8, 8, 12, 12, 12, 12));
            Self { even: _mm256_and_si256(even, mask), odd: _mm256_and_si256(odd, mask) }
        }
    }

    #[inline(always)]
    unsafe fn bits(q: &[u8; 32], shift: usize, mask: i16) -> Self {
        unsafe {
            let q = _mm256_loadu_si256(q.as_ptr().cast());
            let mask = _mm256_set1_epi16(mask);
            let even = _mm256_srl_epi16(q, _mm_cvtsi32_si128(shift as i32));
            let odd = _mm256_srl_epi16(q, _mm_cvtsi32_si128(shift as i32 + 8));
            Self { even: _mm256_and_si256(even, mask), odd: _mm256_and_si256(odd, mask) }
        }
    }

    #[inline(always)]
    unsafe fn signed_times_256(q: &[u8; 32]) -> Self {
        unsafe {
            let q = _mm256_loadu_si256(q.as_ptr().cast());
            let odd = _mm256_and_si256(q, _mm256_set1_epi16(0xff00u16 as i16));
            Self { even: _mm256_slli_epi16::<8>(q), odd }
        }
    }

    #[inline(always)]
    unsafe fn fifth_bits(bits: u32) -> Self {
        unsafe {
            // Bits 0..16 in all words of the lower half, bits 16..32 in those of the upper.
            let halves = _mm256_set_epi64x(
                0x0302_0302_0302_0302,
                0x0302_0302_0302_0302,
                0x0100_0100_0100_0100,
                0x0100_0100_0100_0100,
            );
            let bits = _mm256_shuffle_epi8(_mm256_set1_epi32(bits as i32), halves);
            let even = _mm256_set1_epi64x(0x0040_0010_0004_0001);
            let even = _mm256_blend_epi32::<0b1100_1100>(even, _mm256_slli_epi16::<8>(even));
            let odd = _mm256_slli_epi16::<1>(even);
            let sixteen = _mm256_set1_epi16(16);
            let test = |bit| {
                let set = _mm256_cmpeq_epi16(_mm256_and_si256(bits, bit), bit);
                _mm256_and_si256(set, sixteen)
            };
            Self { even: test(even), odd: test(odd) }
        }
    }

    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        unsafe {
            Self {
                even: _mm256_or_si256(self.even, other.even),
                odd: _mm256_or_si256(self.odd, other.odd),
            }
        }
    }

    #[inline(always)]
    unsafe fn times(self, factor: i16) -> Self {
        unsafe {
            let shift = _mm_cvtsi32_si128(factor.trailing_zeros() as i32);
            Self {
                even: _mm256_sll_epi16(self.even, shift),
                odd: _mm256_sll_epi16(self.odd, shift),
            }
        }
    }

    #[inline(always)]
    unsafe fn dot_i16(self, x: &[i16; GROUP_LEN]) -> Self::Sums {
        unsafe {
            let x: *const __m256i = x.as_ptr().cast();
            let even = _mm256_madd_epi16(self.even, _mm256_loadu_si256(x));
            let odd = _mm256_madd_epi16(self.odd, _mm256_loadu_si256(x.add(1)));
            _mm256_cvtepi32_ps(_mm256_add_epi32(even, odd))
        }
    }

    #[inline(always)]
    unsafe fn dot_f32(self, x: &[f32; GROUP_LEN]) -> Self::Sums {
        unsafe {
            let wide = |words| _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(words));
            let x = |i: usize| _mm256_loadu_ps(x.as_ptr().add(8 * i));
            let lower = |words| wide(_mm256_castsi256_si128(words));
            let upper = |words| wide(_mm256_extracti128_si256::<1>(words));
            let first = _mm256_mul_ps(lower(self.even), x(0));
            let first = _mm256_fmadd_ps(lower(self.odd), x(2), first);
            let last = _mm256_mul_ps(upper(self.even), x(1));
            let last = _mm256_fmadd_ps(upper(self.odd), x(3), last);
            // Pairwise sums within 128 bits, then a permutation that puts the sums of each half together.
            let pairs = _mm256_hadd_ps(first, last);
            _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(pairs)))
        }
    }

    #[inline(always)]
    unsafe fn zero() -> Self::Sums {
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn add_scaled(sums: Self::Sums, products: Self::Sums, scale: f32) -> Self::Sums {
        unsafe { _mm256_fmadd_ps(products, _mm256_set1_ps(scale), sums) }
    }

    #[inline(always)]
    unsafe fn add_scaled_halves(
        sums: Self::Sums,
        products: Self::Sums,
        [a, b]: [f32; 2],
    ) -> Self::Sums {
        unsafe { _mm256_fmadd_ps(products, _mm256_setr_ps(a, a, a, a, b, b, b, b), sums) }
    }

    #[inline(always)]
    unsafe fn products(a: &[f32; LANES], b: &[f32; LANES]) -> [f32; LANES] {
        let mut products = [0.0; LANES];
        unsafe {
            for i in [0, 8] {
                let (a, b) =
                    (_mm256_loadu_ps(a.as_ptr().add(i)), _mm256_loadu_ps(b.as_ptr().add(i)));
                _mm256_storeu_ps(products.as_mut_ptr().add(i), _mm256_mul_ps(a, b));
            }
        }
        products
    }

    #[inline(always)]
    unsafe fn add_products(sums: Self::Sums, a: &[f32; LANES], b: &[f32; LANES]) -> Self::Sums {
        unsafe {
            let load =
                |values: &[f32; LANES], i: usize| _mm256_loadu_ps(values.as_ptr().add(8 * i));
            let sums = _mm256_fmadd_ps(load(a, 0), load(b, 0), sums);
            _mm256_fmadd_ps(load(a, 1), load(b, 1), sums)
        }
    }

    #[inline(always)]
    unsafe fn add_loaded(sums: Self::Sums, w: Self::Sums, x: &[f32]) -> Self::Sums {
        debug_assert_eq!(x.len(), Self::LANES);
        unsafe { _mm256_fmadd_ps(w, _mm256_loadu_ps(x.as_ptr()), sums) }
    }

    #[inline(always)]
    unsafe fn total(sums: Self::Sums) -> f32 {
        unsafe {
            let sums = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps::<1>(sums));
            let sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
            _mm_cvtss_f32(_mm_add_ss(sums, _mm_shuffle_ps::<1>(sums, sums)))
        }
    }

    #[inline(always)]
    unsafe fn half(bits: u16) -> f32 {
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))) }
    }

    #[inline(always)]
    unsafe fn halves(bits: impl Fn(usize) -> u16) -> [f32; LANES] {
        let mut values = [0.0; LANES];
        let bits = |i| bits(i) as i16;
        unsafe {
            for i in [0, 8] {
                // Assembled in registers: a long load cannot be forwarded from several short stores.
                let halves = _mm_setr_epi16(
                    bits(i),
                    bits(i + 1),
                    bits(i + 2),
                    bits(i + 3),
                    bits(i + 4),
                    bits(i + 5),
                    bits(i + 6),
                    bits(i + 7),
                );
                _mm256_storeu_ps(values.as_mut_ptr().add(i), _mm256_cvtph_ps(halves));
            }
        }
        values
    }

    #[inline(always)]
    unsafe fn load_f32(bytes: &[u8]) -> Self::Sums {
        debug_assert_eq!(bytes.len(), 4 * Self::LANES);
        unsafe { _mm256_loadu_ps(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    unsafe fn load_f16(bytes: &[u8]) -> Self::Sums {
        debug_assert_eq!(bytes.len(), 2 * Self::LANES);
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(bytes.as_ptr().cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(bytes: &[u8]) -> Self::Sums {
        debug_assert_eq!(bytes.len(), 2 * Self::LANES);
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(bytes.as_ptr().cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
}

/// All integers of a group: one `vpmaddwd` covers a group, so that VNNI would not be faster.
#[derive(Clone, Copy)]
pub(super) struct I16Avx512(__m512i);

// SAFETY of all blocks below: the contract of `I16Vector` guarantees AVX-512 F, BW, DQ and VL;
// loads and stores go through references and slices of at least their size.
#[allow(clippy::undocumented_unsafe_blocks)]
impl I16Vector for I16Avx512 {
    /// Quarters 0 and 2 belong to the first 16 values of a group.
    type Sums = __m512;
    const LANES: usize = 16;
    const UNROLLED: bool = true;

    unsafe fn blocks<F: Format, T: ActivationValue, const M: usize>(
        bytes: &[u8],
        x: &Activations<T>,
        first: usize,
        output: &Output,
    ) -> usize {
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
        unsafe fn with_features<F: Format, T: ActivationValue, const M: usize>(
            bytes: &[u8],
            x: &Activations<T>,
            first: usize,
            output: &Output,
        ) -> usize {
            unsafe { kernel::blocks::<I16Avx512, F, T, M>(bytes, x, first, output) }
        }
        unsafe { with_features::<F, T, M>(bytes, x, first, output) }
    }

    unsafe fn floats<F: FloatFormat, const M: usize>(
        bytes: &[u8],
        x: &Activations<f32>,
        first: usize,
        output: &Output,
    ) -> usize {
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
        unsafe fn with_features<F: FloatFormat, const M: usize>(
            bytes: &[u8],
            x: &Activations<f32>,
            first: usize,
            output: &Output,
        ) -> usize {
            unsafe { kernel::floats::<I16Avx512, F, M>(bytes, x, first, output) }
        }
        unsafe { with_features::<F, M>(bytes, x, first, output) }
    }

    #[inline(always)]
    fn prefetch(address: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }

    #[inline(always)]
    unsafe fn nibbles(q: &[u8; 16]) -> Self {
        unsafe {
            let q = _mm512_broadcast_i32x4(_mm_loadu_si128(q.as_ptr().cast()));
            let shifts =
                quarters(0, 0x0004_0004_0004_0004, 0x0008_0008_0008_0008, 0x000c_000c_000c_000c);
            Self(_mm512_and_si512(_mm512_srlv_epi16(q, shifts), _mm512_set1_epi16(15)))
        }
    }

    #[inline(always)]
    unsafe fn bits(q: &[u8; 32], shift: usize, mask: i16) -> Self {
        unsafe {
            let q = _mm512_broadcast_i64x4(_mm256_loadu_si256(q.as_ptr().cast()));
            let odd = quarters(0, 0, 0x0008_0008_0008_0008, 0x0008_0008_0008_0008);
            let shifts = _mm512_add_epi16(odd, _mm512_set1_epi16(shift as i16));
            Self(_mm512_and_si512(_mm512_srlv_epi16(q, shifts), _mm512_set1_epi16(mask)))
        }
    }

    #[inline(always)]
    unsafe fn signed_times_256(q: &[u8; 32]) -> Self {
        unsafe {
            let q = _mm512_broadcast_i64x4(_mm256_loadu_si256(q.as_ptr().cast()));
            // Bytes go to the upper half of words, over zeros.
            let (even, odd) = (
                (0x0680_0480_0280_0080, 0x0e80_0c80_0a80_0880u64 as i64),
                (0x0780_0580_0380_0180, 0x0f80_0d80_0b80_0980u64 as i64),
            );
            let places =
                _mm512_setr_epi64(even.0, even.1, even.0, even.1, odd.0, odd.1, odd.0, odd.1);
            Self(_mm512_shuffle_epi8(q, places))
        }
    }

    #[inline(always)]
    unsafe fn fifth_bits(bits: u32) -> Self {
        unsafe {
            // Bits 0..16 in all words of quarters 0 and 2, bits 16..32 in those of 1 and 3.
            let (first, last) = (0x0100_0100_0100_0100, 0x0302_0302_0302_0302);
            let bits = _mm512_shuffle_epi8(
                _mm512_set1_epi32(bits as i32),
                quarters(first, last, first, last),
            );
            let (even, odd) = (
                (0x0040_0010_0004_0001, 0x4000_1000_0400_0100),
                (0x0080_0020_0008_0002, 0x8000_2000_0800_0200u64 as i64),
            );
            let places =
                _mm512_setr_epi64(even.0, even.1, even.0, even.1, odd.0, odd.1, odd.0, odd.1);
            Self(_mm512_maskz_set1_epi16(_mm512_test_epi16_mask(bits, places), 16))
        }
    }

    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        unsafe { Self(_mm512_or_si512(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn times(self, factor: i16) -> Self {
        unsafe { Self(_mm512_sll_epi16(self.0, _mm_cvtsi32_si128(factor.trailing_zeros() as i32))) }
    }

    #[inline(always)]
    unsafe fn dot_i16(self, x: &[i16; GROUP_LEN]) -> Self::Sums {
        unsafe {
            let x = _mm512_loadu_si512(x.as_ptr().cast());
            _mm512_cvtepi32_ps(_mm512_madd_epi16(self.0, x))
        }
    }

    #[inline(always)]
    unsafe fn dot_f32(self, x: &[f32; GROUP_LEN]) -> Self::Sums {
        unsafe {
            let wide = |words| _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(words));
            let x = |i: usize| _mm512_loadu_ps(x.as_ptr().add(16 * i));
            let even = _mm512_mul_ps(wide(_mm512_castsi512_si256(self.0)), x(0));
            let sums = _mm512_fmadd_ps(wide(_mm512_extracti64x4_epi64::<1>(self.0)), x(1), even);
            // Eight lanes of the first 16 values and eight of the last, as quarters 0 2 and 1 3.
            _mm512_shuffle_f32x4::<0b11_01_10_00>(sums, sums)
        }
    }

    #[inline(always)]
    unsafe fn zero() -> Self::Sums {
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn add_scaled(sums: Self::Sums, products: Self::Sums, scale: f32) -> Self::Sums {
        unsafe { _mm512_fmadd_ps(products, _mm512_set1_ps(scale), sums) }
    }

    #[inline(always)]
    unsafe fn add_scaled_halves(
        sums: Self::Sums,
        products: Self::Sums,
        [a, b]: [f32; 2],
    ) -> Self::Sums {
        unsafe {
            let pair = i64::from(a.to_bits()) | i64::from(b.to_bits()) << 32;
            let pairs = _mm512_castsi512_ps(_mm512_set1_epi64(pair));
            let places = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1);
            _mm512_fmadd_ps(products, _mm512_permutevar_ps(pairs, places), sums)
        }
    }

    #[inline(always)]
    unsafe fn products(a: &[f32; LANES], b: &[f32; LANES]) -> [f32; LANES] {
        let mut products = [0.0; LANES];
        unsafe {
            let product = _mm512_mul_ps(_mm512_loadu_ps(a.as_ptr()), _mm512_loadu_ps(b.as_ptr()));
            _mm512_storeu_ps(products.as_mut_ptr(), product);
        }
        products
    }

    #[inline(always)]
    unsafe fn add_products(sums: Self::Sums, a: &[f32; LANES], b: &[f32; LANES]) -> Self::Sums {
        unsafe { _mm512_fmadd_ps(_mm512_loadu_ps(a.as_ptr()), _mm512_loadu_ps(b.as_ptr()), sums) }
    }

    #[inline(always)]
    unsafe fn add_loaded(sums: Self::Sums, w: Self::Sums, x: &[f32]) -> Self::Sums {
        debug_assert_eq!(x.len(), Self::LANES);
        unsafe { _mm512_fmadd_ps(w, _mm512_loadu_ps(x.as_ptr()), sums) }
    }

    #[inline(always)]
    unsafe fn total(sums: Self::Sums) -> f32 {
        unsafe { _mm512_reduce_add_ps(sums) }
    }

    #[inline(always)]
    unsafe fn half(bits: u16) -> f32 {
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))) }
    }

    #[inline(always)]
    unsafe fn halves(bits: impl Fn(usize) -> u16) -> [f32; LANES] {
        let mut values = [0.0; LANES];
        let bits = |i| bits(i) as i16;
        unsafe {
            let halves = sixteen_words(bits);
            _mm512_storeu_ps(values.as_mut_ptr(), _mm512_cvtph_ps(halves));
        }
        values
    }

    #[inline(always)]
    unsafe fn load_f32(bytes: &[u8]) -> Self::Sums {
        debug_assert_eq!(bytes.len(), 4 * Self::LANES);
        unsafe { _mm512_loadu_ps(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    unsafe fn load_f16(bytes: &[u8]) -> Self::Sums {
        debug_assert_eq!(bytes.len(), 2 * Self::LANES);
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(bytes: &[u8]) -> Self::Sums {
        debug_assert_eq!(bytes.len(), 2 * Self::LANES);
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(bytes.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
}

/// Sixteen words, assembled in registers: a long load cannot be forwarded from several short stores.
///
/// # Safety
/// The CPU must support AVX2.
#[inline(always)]
pub(super) unsafe fn sixteen_words(word: impl Fn(usize) -> i16) -> __m256i {
    // SAFETY: this function's contract guarantees AVX2.
    unsafe {
        _mm256_setr_epi16(
            word(0),
            word(1),
            word(2),
            word(3),
            word(4),
            word(5),
            word(6),
            word(7),
            word(8),
            word(9),
            word(10),
            word(11),
            word(12),
            word(13),
            word(14),
            word(15),
        )
    }
}

/// Each 64-bit argument twice, in one 128-bit lane.
#[inline(always)]
unsafe fn quarters(a: i64, b: i64, c: i64, d: i64) -> __m512i {
    // SAFETY: callers guarantee AVX-512.
    unsafe { _mm512_setr_epi64(a, a, b, b, c, c, d, d) }
}
