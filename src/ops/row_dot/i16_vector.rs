//! The vector operations that kernels are generic over, one implementation per ISA level, and the portable one.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::activations::{Activations, GROUP_LEN, LANES};
use super::formats::{FloatFormat, Format};
use super::kernel::{self, Output};

/// The 32 integers of a group as 16-bit words, those of even index first, with the operations kernels need.
///
/// # Safety
/// One contract for all functions: the CPU supports the features of the implementing type. References and
/// slices bound all reads and writes, except that [`Self::blocks`] and [`Self::floats`] write to
/// `output`, whose elements of these rows no other thread may access. The other functions are inlined into
/// these two, which enable the features they need.
#[allow(clippy::missing_safety_doc)]
pub(super) trait I16Vector: Copy {
    /// Partial sums of one output element.
    type Sums: Copy;
    /// Lanes of [`Self::Sums`].
    const LANES: usize;
    /// Whether the loop over the groups of a large block is unrolled: shifts are then constants, at eight times the code.
    const UNROLLED: bool;

    /// The kernel over blocks, compiled with the features of its ISA level.
    unsafe fn blocks<F: Format, T: ActivationValue, const M: usize>(
        bytes: &[u8],
        x: &Activations<T>,
        first: usize,
        output: &Output,
    ) -> usize;
    /// The kernel over floats, compiled with the features of its ISA level.
    unsafe fn floats<F: FloatFormat, const M: usize>(
        bytes: &[u8],
        x: &Activations<f32>,
        first: usize,
        output: &Output,
    ) -> usize;

    /// Prefetches the cache line of an address, which need not be valid, into the L2 cache.
    fn prefetch(address: *const u8);

    /// The low nibbles of 16 bytes, then the high ones.
    unsafe fn nibbles(q: &[u8; 16]) -> Self;
    /// `q >> shift & mask` of every byte; the mask must clear bits shifted in from the next byte.
    unsafe fn bits(q: &[u8; 32], shift: usize, mask: i16) -> Self;
    /// 256 times every signed byte.
    unsafe fn signed_times_256(q: &[u8; 32]) -> Self;
    /// 16 where the bit of a value is set.
    unsafe fn fifth_bits(bits: u32) -> Self;
    /// Bitwise or.
    unsafe fn or(self, other: Self) -> Self;
    /// Every word times a power of two.
    unsafe fn times(self, factor: i16) -> Self;

    /// Products with rounded input; those of the group's first 16 values are in other lanes than those of the rest.
    unsafe fn dot_i16(self, x: &[i16; GROUP_LEN]) -> Self::Sums;
    /// Products with `f32` input, in the same lanes.
    unsafe fn dot_f32(self, x: &[f32; GROUP_LEN]) -> Self::Sums;

    unsafe fn zero() -> Self::Sums;
    /// `sums + products · scale`.
    unsafe fn add_scaled(sums: Self::Sums, products: Self::Sums, scale: f32) -> Self::Sums;
    /// `sums + products · scale` with scales for the first and the last 16 values of a group.
    unsafe fn add_scaled_halves(
        sums: Self::Sums,
        products: Self::Sums,
        scales: [f32; 2],
    ) -> Self::Sums;
    /// `a · b`, lane by lane.
    unsafe fn products(a: &[f32; LANES], b: &[f32; LANES]) -> [f32; LANES];
    /// `sums + a · b`.
    unsafe fn add_products(sums: Self::Sums, a: &[f32; LANES], b: &[f32; LANES]) -> Self::Sums;
    /// `sums + w · x` for one vector of `x`.
    unsafe fn add_loaded(sums: Self::Sums, w: Self::Sums, x: &[f32]) -> Self::Sums;
    /// The sum of all lanes.
    unsafe fn total(sums: Self::Sums) -> f32;

    unsafe fn half(bits: u16) -> f32;
    unsafe fn halves(bits: impl Fn(usize) -> u16) -> [f32; LANES];
    /// One vector of little-endian `f32`.
    unsafe fn load_f32(bytes: &[u8]) -> Self::Sums;
    /// One vector of little-endian `f16`.
    unsafe fn load_f16(bytes: &[u8]) -> Self::Sums;
    /// One vector of little-endian `bf16`.
    unsafe fn load_bf16(bytes: &[u8]) -> Self::Sums;
}

/// The element type of prepared input.
pub(super) trait ActivationValue: Copy + Send + Sync {
    /// Products of a group.
    ///
    /// # Safety
    /// The CPU must support the features of `W`.
    unsafe fn dot<W: I16Vector>(words: W, x: &[Self; GROUP_LEN]) -> W::Sums;
}

impl ActivationValue for i16 {
    #[inline(always)]
    unsafe fn dot<W: I16Vector>(words: W, x: &[Self; GROUP_LEN]) -> W::Sums {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe { words.dot_i16(x) }
    }
}

impl ActivationValue for f32 {
    #[inline(always)]
    unsafe fn dot<W: I16Vector>(words: W, x: &[Self; GROUP_LEN]) -> W::Sums {
        // SAFETY: this function's contract guarantees the CPU features of `W`.
        unsafe { words.dot_f32(x) }
    }
}

/// Portable Rust, left to the auto-vectorizer.
#[derive(Clone, Copy)]
pub(super) struct I16Portable([i16; GROUP_LEN]);

impl I16Portable {
    /// Words from values in storage order.
    #[inline(always)]
    fn of(value: impl Fn(usize) -> i16) -> Self {
        let mut words = [0; GROUP_LEN];
        for i in 0..GROUP_LEN / 2 {
            words[i] = value(2 * i);
            words[GROUP_LEN / 2 + i] = value(2 * i + 1);
        }
        Self(words)
    }
}

/// The first eight lanes belong to the first 16 values of a group.
impl I16Vector for I16Portable {
    type Sums = [f32; LANES];
    const LANES: usize = LANES;
    const UNROLLED: bool = false;

    unsafe fn blocks<F: Format, T: ActivationValue, const M: usize>(
        bytes: &[u8],
        x: &Activations<T>,
        first: usize,
        output: &Output,
    ) -> usize {
        // SAFETY: portable Rust needs no CPU features; the contract guarantees access to the outputs.
        unsafe { kernel::blocks::<Self, F, T, M>(bytes, x, first, output) }
    }

    unsafe fn floats<F: FloatFormat, const M: usize>(
        bytes: &[u8],
        x: &Activations<f32>,
        first: usize,
        output: &Output,
    ) -> usize {
        // SAFETY: portable Rust needs no CPU features; the contract guarantees access to the outputs.
        unsafe { kernel::floats::<Self, F, M>(bytes, x, first, output) }
    }

    #[inline(always)]
    fn prefetch(_address: *const u8) {}

    #[inline(always)]
    unsafe fn nibbles(q: &[u8; 16]) -> Self {
        Self::of(|i| i16::from(q[i % 16] >> (i / 16 * 4) & 15))
    }

    #[inline(always)]
    unsafe fn bits(q: &[u8; 32], shift: usize, mask: i16) -> Self {
        Self::of(|i| i16::from(q[i] >> shift) & mask)
    }

    #[inline(always)]
    unsafe fn signed_times_256(q: &[u8; 32]) -> Self {
        Self::of(|i| i16::from(q[i] as i8) << 8)
    }

    #[inline(always)]
    unsafe fn fifth_bits(bits: u32) -> Self {
        Self::of(|i| (bits >> i & 1) as i16 * 16)
    }

    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        let mut words = self.0;
        for (word, other) in words.iter_mut().zip(other.0) {
            *word |= other;
        }
        Self(words)
    }

    #[inline(always)]
    unsafe fn times(self, factor: i16) -> Self {
        let mut words = self.0;
        for word in &mut words {
            *word *= factor;
        }
        Self(words)
    }

    #[inline(always)]
    unsafe fn dot_i16(self, x: &[i16; GROUP_LEN]) -> Self::Sums {
        let product = |i: usize| i32::from(self.0[i]) * i32::from(x[i]);
        let mut sums = [0.0; LANES];
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = (product(i) + product(LANES + i)) as f32;
        }
        sums
    }

    #[inline(always)]
    unsafe fn dot_f32(self, x: &[f32; GROUP_LEN]) -> Self::Sums {
        let product = |i: usize| f32::from(self.0[i]) * x[i];
        let mut sums = [0.0; LANES];
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = product(i) + product(LANES + i);
        }
        sums
    }

    #[inline(always)]
    unsafe fn zero() -> Self::Sums {
        [0.0; LANES]
    }

    #[inline(always)]
    unsafe fn add_scaled(mut sums: Self::Sums, products: Self::Sums, scale: f32) -> Self::Sums {
        for (sum, product) in sums.iter_mut().zip(products) {
            *sum += product * scale;
        }
        sums
    }

    #[inline(always)]
    unsafe fn add_scaled_halves(
        mut sums: Self::Sums,
        products: Self::Sums,
        scales: [f32; 2],
    ) -> Self::Sums {
        for i in 0..LANES {
            sums[i] += products[i] * scales[i / 8];
        }
        sums
    }

    #[inline(always)]
    unsafe fn products(a: &[f32; LANES], b: &[f32; LANES]) -> [f32; LANES] {
        let mut products = *a;
        for (product, b) in products.iter_mut().zip(b) {
            *product *= b;
        }
        products
    }

    #[inline(always)]
    unsafe fn add_products(mut sums: Self::Sums, a: &[f32; LANES], b: &[f32; LANES]) -> Self::Sums {
        for i in 0..LANES {
            sums[i] += a[i] * b[i];
        }
        sums
    }

    #[inline(always)]
    unsafe fn add_loaded(mut sums: Self::Sums, w: Self::Sums, x: &[f32]) -> Self::Sums {
        for i in 0..LANES {
            sums[i] += w[i] * x[i];
        }
        sums
    }

    #[inline(always)]
    unsafe fn total(sums: Self::Sums) -> f32 {
        sums.iter().sum()
    }

    #[inline(always)]
    unsafe fn half(bits: u16) -> f32 {
        f16::from_bits(bits).to_f32()
    }

    #[inline(always)]
    unsafe fn halves(bits: impl Fn(usize) -> u16) -> [f32; LANES] {
        let mut halves = [f16::ZERO; LANES];
        for (i, half) in halves.iter_mut().enumerate() {
            *half = f16::from_bits(bits(i));
        }
        let mut values = [0.0; LANES];
        halves.convert_to_f32_slice(&mut values);
        values
    }

    #[inline(always)]
    unsafe fn load_f32(bytes: &[u8]) -> Self::Sums {
        let mut values = [0.0; LANES];
        for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
            *value = f32::from_le_bytes(*bytes);
        }
        values
    }

    #[inline(always)]
    unsafe fn load_f16(bytes: &[u8]) -> Self::Sums {
        // SAFETY: portable Rust needs no CPU features.
        unsafe { Self::halves(|i| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])) }
    }

    #[inline(always)]
    unsafe fn load_bf16(bytes: &[u8]) -> Self::Sums {
        let mut values = [0.0; LANES];
        for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
            *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
        }
        values
    }
}
