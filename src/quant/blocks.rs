//! The block types of GGML: layouts as in `ggml-common.h`, values as in `ggml-quants.c`.

use crate::isa::{Isa, multiversion};

/// A GGML tensor type whose values we can read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types, missing_docs)] // the format's own names
pub enum BlockType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
}

impl BlockType {
    /// All block types.
    pub const ALL: &[Self] = &[
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
        Self::IQ4_NL,
        Self::IQ4_XS,
        Self::MXFP4,
    ];

    /// The types that can also be written: all but the last three.
    pub const WRITTEN: &[Self] = Self::ALL.split_at(Self::ALL.len() - 3).0;

    /// The type with this number in `enum ggml_type`, if we can read it.
    pub fn from_ggml(id: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|block_type| block_type.to_ggml() == id)
    }

    /// Its number in `enum ggml_type`, as GGUF files store it.
    pub fn to_ggml(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2_K => 10,
            Self::Q3_K => 11,
            Self::Q4_K => 12,
            Self::Q5_K => 13,
            Self::Q6_K => 14,
            Self::IQ4_NL => 20,
            Self::IQ4_XS => 23,
            Self::BF16 => 30,
            Self::MXFP4 => 39,
        }
    }

    /// Offsets of the `f16` scales of a block, for random blocks in tests.
    #[cfg(test)]
    pub(crate) fn scale_offsets(self) -> &'static [usize] {
        match self {
            Self::F32 | Self::F16 | Self::BF16 | Self::MXFP4 => &[],
            Self::Q4_0 | Self::Q5_0 | Self::Q8_0 | Self::IQ4_NL | Self::IQ4_XS => &[0],
            Self::Q4_1 | Self::Q5_1 | Self::Q4_K | Self::Q5_K => &[0, 2],
            Self::Q2_K => &[80, 82],
            Self::Q3_K => &[108],
            Self::Q6_K => &[208],
        }
    }

    /// Values in one block.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::IQ4_NL | Self::MXFP4 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
            Self::IQ4_XS => 256,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
            Self::IQ4_NL => 18,
            Self::IQ4_XS => 136,
            Self::MXFP4 => 17,
        }
    }

    /// Bytes of `values` values, or `None` if they are not whole blocks or overflow.
    pub fn bytes_for(self, values: usize) -> Option<usize> {
        let len = self.block_len();
        if !values.is_multiple_of(len) {
            return None;
        }
        (values / len).checked_mul(self.block_bytes())
    }

    /// This type, or if rows of `cols` values are not whole blocks of it, the one that llama.cpp
    /// quantizes them to instead.
    pub fn for_rows_of(self, cols: usize) -> Self {
        if cols.is_multiple_of(self.block_len()) {
            return self;
        }
        let smaller = match self {
            Self::Q2_K | Self::Q3_K => Self::Q4_0,
            Self::Q4_K => Self::Q5_0,
            Self::Q5_K => Self::Q5_1,
            Self::Q6_K => Self::Q8_0,
            other => other,
        };
        if cols.is_multiple_of(smaller.block_len()) { smaller } else { Self::F16 }
    }

    /// A type that can be written, by its name in any case.
    ///
    /// # Errors
    /// If the name is unknown.
    pub fn written(name: &str) -> Result<Self, String> {
        let found = Self::WRITTEN.iter().find(|of| of.to_string() == name.to_uppercase());
        found.copied().ok_or_else(|| {
            let all: Vec<String> = Self::WRITTEN.iter().map(Self::to_string).collect();
            format!("{name:?} is not a tensor type, needed one of {}", all.join(", "))
        })
    }

    /// Reads the values of whole blocks, with the arithmetic of `dequantize_row_*` in ggml.
    /// Bytes need no alignment.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        dequantize(Isa::current(), self, bytes, out);
    }
}

/// Reads block after block; sizes known at compile time let the inner loops vectorize. A macro, as
/// a function passed to a function would be compiled for the lowest ISA level.
macro_rules! each {
    ($block:ident, $bytes:ident, $out:ident) => {
        for (b, y) in $bytes.as_chunks().0.iter().zip($out.as_chunks_mut().0) {
            $block(b, y);
        }
    };
}

multiversion! {
    fn dequantize(isa; block_type: BlockType, bytes: &[u8], out: &mut [f32]) {
        match block_type {
            BlockType::F32 => each!(f32_value, bytes, out),
            BlockType::F16 => each!(f16_value, bytes, out),
            BlockType::BF16 => each!(bf16_value, bytes, out),
            BlockType::Q4_0 => each!(q4_0, bytes, out),
            BlockType::Q4_1 => each!(q4_1, bytes, out),
            BlockType::Q5_0 => each!(q5_0, bytes, out),
            BlockType::Q5_1 => each!(q5_1, bytes, out),
            BlockType::Q8_0 => each!(q8_0, bytes, out),
            BlockType::Q2_K => each!(q2_k, bytes, out),
            BlockType::Q3_K => each!(q3_k, bytes, out),
            BlockType::Q4_K => each!(q4_k, bytes, out),
            BlockType::Q5_K => each!(q5_k, bytes, out),
            BlockType::Q6_K => each!(q6_k, bytes, out),
            BlockType::IQ4_NL => each!(iq4_nl, bytes, out),
            BlockType::IQ4_XS => each!(iq4_xs, bytes, out),
            BlockType::MXFP4 => each!(mxfp4, bytes, out),
        }
    }
}

impl std::fmt::Display for BlockType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}

#[inline(always)]
fn f32_value(b: &[u8; 4], y: &mut [f32; 1]) {
    y[0] = f32::from_le_bytes(*b);
}

#[inline(always)]
fn f16_value(b: &[u8; 2], y: &mut [f32; 1]) {
    y[0] = half(b, 0);
}

#[inline(always)]
fn bf16_value(b: &[u8; 2], y: &mut [f32; 1]) {
    y[0] = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
}

/// The `f16` at `at`, without a branch, so that loops over it vectorize.
#[inline(always)]
fn half(b: &[u8], at: usize) -> f32 {
    let bits = u32::from(u16::from_le_bytes([b[at], b[at + 1]]));
    // Exponent and mantissa at the position of `f32`, with an exponent 112 too small: the product corrects
    // that, also for subnormal numbers. Infinities and NaN have all exponent bits set.
    let small = f32::from_bits((bits & 0x7fff) << 13);
    let value = (small * f32::from_bits(0x7780_0000)).to_bits(); // · 2^112
    let infinite = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(value | infinite | (bits & 0x8000) << 16)
}

/// `f16` scale, 32 nibbles: the low ones are values 0..16, the high ones 16..32.
#[inline(always)]
fn q4_0(b: &[u8; 18], y: &mut [f32; 32]) {
    let d = half(b, 0);
    for j in 0..16 {
        let q = b[2 + j];
        y[j] = (i32::from(q & 15) - 8) as f32 * d;
        y[j + 16] = (i32::from(q >> 4) - 8) as f32 * d;
    }
}

/// Scale, minimum, 32 nibbles.
#[inline(always)]
fn q4_1(b: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (half(b, 0), half(b, 2));
    for j in 0..16 {
        let q = b[4 + j];
        y[j] = f32::from(q & 15) * d + m;
        y[j + 16] = f32::from(q >> 4) * d + m;
    }
}

/// Scale, the fifth bits of 32 values, their nibbles.
#[inline(always)]
fn q5_0(b: &[u8; 22], y: &mut [f32; 32]) {
    let d = half(b, 0);
    let high = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
    for j in 0..16 {
        let q = u32::from(b[6 + j]);
        let (x0, x1) = (q & 15 | high >> j << 4 & 16, q >> 4 | high >> (j + 12) & 16);
        y[j] = (x0 as i32 - 16) as f32 * d;
        y[j + 16] = (x1 as i32 - 16) as f32 * d;
    }
}

/// Scale, minimum, the fifth bits of 32 values, their nibbles.
#[inline(always)]
fn q5_1(b: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m) = (half(b, 0), half(b, 2));
    let high = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
    for j in 0..16 {
        let q = u32::from(b[8 + j]);
        let (x0, x1) = (q & 15 | high >> j << 4 & 16, q >> 4 | high >> (j + 12) & 16);
        y[j] = x0 as f32 * d + m;
        y[j + 16] = x1 as f32 * d + m;
    }
}

/// Scale, 32 signed bytes.
#[inline(always)]
fn q8_0(b: &[u8; 34], y: &mut [f32; 32]) {
    let d = half(b, 0);
    for j in 0..32 {
        y[j] = f32::from(b[2 + j] as i8) * d;
    }
}

/// 16 pairs of 4-bit scale and minimum, 256 values of 2 bits, the scales of both.
#[inline(always)]
fn q2_k(b: &[u8; 84], y: &mut [f32; 256]) {
    let (d, dmin) = (half(b, 80), half(b, 82));
    for (i, y) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (dl, ml) = (d * f32::from(b[i] & 15), dmin * f32::from(b[i] >> 4));
        let (q, shift) = two_bits(&b[16..80], i);
        for j in 0..16 {
            y[j] = dl * f32::from(q[j] >> shift & 3) - ml;
        }
    }
}

/// The third bits of 256 values, their low 2 bits, 16 scales of 6 bits, the scale of those.
#[inline(always)]
fn q3_k(b: &[u8; 110], y: &mut [f32; 256]) {
    let d = half(b, 108);
    for (i, y) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        // The low 4 bits of scale i are in nibbles of bytes 0..8, its high 2 in bytes 8..12.
        let low = b[96 + i % 8] >> (4 * (i / 8)) & 15;
        let high = b[104 + i % 4] >> (2 * (i / 4)) & 3;
        let dl = d * (i32::from(low | high << 4) - 32) as f32;
        let (q, shift) = two_bits(&b[32..96], i);
        let hmask = &b[16 * (i % 2)..][..16];
        for j in 0..16 {
            let high = hmask[j] >> (i / 2) & 1;
            y[j] = dl * (i32::from(q[j] >> shift & 3 | high << 2) - 4) as f32;
        }
    }
}

/// The bytes and the shift of the `i`-th run of 16 two-bit values: four runs, 32 values apart,
/// share 16 bytes.
#[inline(always)]
fn two_bits(q: &[u8], i: usize) -> (&[u8], usize) {
    (&q[32 * (i / 8) + 16 * (i % 2)..][..16], i % 8 / 2 * 2)
}

/// Scales of scales and minima, 8 pairs of both in 6 bits, 256 nibbles.
#[inline(always)]
fn q4_k(b: &[u8; 144], y: &mut [f32; 256]) {
    let (d, dmin) = (half(b, 0), half(b, 2));
    for (i, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(&b[4..16], i);
        let (dl, ml) = (d * scale, dmin * min);
        let (q, shift) = (&b[16 + 32 * (i / 2)..][..32], 4 * (i % 2));
        for j in 0..32 {
            y[j] = dl * f32::from(q[j] >> shift & 15) - ml;
        }
    }
}

/// As `Q4_K`, with the fifth bits of 256 values before their nibbles.
#[inline(always)]
fn q5_k(b: &[u8; 176], y: &mut [f32; 256]) {
    let (d, dmin) = (half(b, 0), half(b, 2));
    let high = &b[16..48];
    for (i, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(&b[4..16], i);
        let (dl, ml) = (d * scale, dmin * min);
        let (q, shift) = (&b[48 + 32 * (i / 2)..][..32], 4 * (i % 2));
        for j in 0..32 {
            y[j] = dl * f32::from(q[j] >> shift & 15 | (high[j] >> i & 1) << 4) - ml;
        }
    }
}

/// Pair `i` of the 8 pairs of 6 bits that `Q4_K` and `Q5_K` pack into 12 bytes.
#[inline(always)]
fn scale_and_min(q: &[u8], i: usize) -> (f32, f32) {
    let (scale, min) = if i < 4 {
        (q[i] & 63, q[i + 4] & 63)
    } else {
        (q[i + 4] & 15 | q[i - 4] >> 6 << 4, q[i + 4] >> 4 | q[i] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// 256 nibbles, their high 2 bits, 16 signed scales, the scale of those.
#[inline(always)]
fn q6_k(b: &[u8; 210], y: &mut [f32; 256]) {
    let d = half(b, 208);
    for (i, y) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let dl = d * f32::from(b[192 + i] as i8);
        // Within each half of 128, run k holds values 32 apart: k = 0..4, two groups of 16.
        let (of_half, k, stretch) = (i / 8, i % 8 / 2, i % 2);
        let low = &b[64 * of_half + 32 * (k % 2) + 16 * stretch..][..16];
        let high = &b[128 + 32 * of_half + 16 * stretch..][..16];
        for j in 0..16 {
            let q = low[j] >> (4 * (k / 2)) & 15 | (high[j] >> (2 * k) & 3) << 4;
            y[j] = dl * (i32::from(q) - 32) as f32;
        }
    }
}

/// The values of the nibbles of `IQ4_NL` and `IQ4_XS`.
pub(crate) const NON_LINEAR: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Twice the values of the nibbles of `MXFP4`: E2M1, with a sign, two bits of exponent, one of mantissa.
pub(crate) const E2M1_TWICE: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// `2^(e - 128)`: half an E8M0 scale, because ggml stores E2M1 values doubled.
#[inline(always)]
pub(crate) fn half_e8m0(e: u8) -> f32 {
    // For e below 2 it is subnormal.
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (u32::from(e) - 1) << 23 })
}

/// `f16` scale, 32 nibbles, each of them a value of a table.
#[inline(always)]
fn iq4_nl(b: &[u8; 18], y: &mut [f32; 32]) {
    let d = half(b, 0);
    for j in 0..16 {
        let q = b[2 + j];
        y[j] = d * f32::from(NON_LINEAR[usize::from(q & 15)]);
        y[j + 16] = d * f32::from(NON_LINEAR[usize::from(q >> 4)]);
    }
}

/// `f16` scale, 8 scales of 6 bits (high 2 bits, then low 4), 256 nibbles as in `IQ4_NL`.
#[inline(always)]
fn iq4_xs(b: &[u8; 136], y: &mut [f32; 256]) {
    let d = half(b, 0);
    for (i, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let dl = d * iq4_xs_scale(b, i);
        let q = &b[8 + 16 * i..][..16];
        for j in 0..16 {
            y[j] = dl * f32::from(NON_LINEAR[usize::from(q[j] & 15)]);
            y[j + 16] = dl * f32::from(NON_LINEAR[usize::from(q[j] >> 4)]);
        }
    }
}

/// The `i`-th scale of an `IQ4_XS` block.
#[inline(always)]
pub(crate) fn iq4_xs_scale(b: &[u8], i: usize) -> f32 {
    let high = u16::from_le_bytes([b[2], b[3]]) >> (2 * i) & 3;
    let low = b[4 + i / 2] >> (4 * (i % 2)) & 15;
    f32::from(u16::from(low) | high << 4) - 32.0
}

/// E8M0 scale, 32 nibbles of E2M1 (the OCP microscaling formats).
#[inline(always)]
fn mxfp4(b: &[u8; 17], y: &mut [f32; 32]) {
    let d = half_e8m0(b[0]);
    for j in 0..16 {
        let q = b[1 + j];
        y[j] = d * f32::from(E2M1_TWICE[usize::from(q & 15)]);
        y[j + 16] = d * f32::from(E2M1_TWICE[usize::from(q >> 4)]);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::k_quants::*;

    use super::*;
    use crate::quant::testing::random_blocks;

    /// The same bytes dequantized by candle.
    fn candle_values<T: GgmlType>(bytes: &[u8], values: usize) -> Vec<f32> {
        assert_eq!(bytes.len() / size_of::<T>() * T::BLCK_SIZE, values);
        let mut blocks = vec![T::zeros(); bytes.len() / size_of::<T>()];
        // SAFETY: the blocks are plain `repr(C)` numbers without padding, for which all bytes
        // are valid, and `blocks` owns exactly `bytes.len()` of them.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                blocks.as_mut_ptr().cast::<u8>(),
                bytes.len(),
            );
        }
        let mut out = vec![0.0; values];
        T::to_float(&blocks, &mut out);
        out
    }

    #[test]
    fn every_type_reads_as_candle_reads_it() {
        let values = 256 * 37;
        for &block_type in BlockType::WRITTEN {
            let bytes = random_blocks(block_type, values, 7);
            let theirs = match block_type {
                BlockType::F32 => candle_values::<f32>(&bytes, values),
                BlockType::F16 => candle_values::<half::f16>(&bytes, values),
                BlockType::BF16 => candle_values::<half::bf16>(&bytes, values),
                BlockType::Q4_0 => candle_values::<BlockQ4_0>(&bytes, values),
                BlockType::Q4_1 => candle_values::<BlockQ4_1>(&bytes, values),
                BlockType::Q5_0 => candle_values::<BlockQ5_0>(&bytes, values),
                BlockType::Q5_1 => candle_values::<BlockQ5_1>(&bytes, values),
                BlockType::Q8_0 => candle_values::<BlockQ8_0>(&bytes, values),
                BlockType::Q2_K => candle_values::<BlockQ2K>(&bytes, values),
                BlockType::Q3_K => candle_values::<BlockQ3K>(&bytes, values),
                BlockType::Q4_K => candle_values::<BlockQ4K>(&bytes, values),
                BlockType::Q5_K => candle_values::<BlockQ5K>(&bytes, values),
                BlockType::Q6_K => candle_values::<BlockQ6K>(&bytes, values),
                BlockType::IQ4_NL | BlockType::IQ4_XS | BlockType::MXFP4 => {
                    unreachable!("candle does not support it")
                }
            };
            // Misaligned by one byte: a memory-mapped file guarantees no alignment.
            let shifted = [&[0], &bytes[..]].concat();
            let mut ours = vec![f32::NAN; values];
            block_type.dequantize(&shifted[1..], &mut ours);
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&ours), bits(&theirs), "{block_type}");
            assert!(ours.iter().any(|v| *v != 0.0), "{block_type}");
        }
    }

    #[test]
    fn ggml_type_numbers_round_trip() {
        for &block_type in BlockType::ALL {
            assert_eq!(BlockType::from_ggml(block_type.to_ggml()), Some(block_type));
            let values = 2 * block_type.block_len();
            assert_eq!(block_type.bytes_for(values), Some(2 * block_type.block_bytes()));
        }
        assert_eq!(BlockType::from_ggml(4), None); // Q4_2, which was removed from ggml
        assert_eq!(BlockType::from_ggml(u32::MAX), None);
        assert_eq!(BlockType::Q4_K.bytes_for(255), None);
        assert_eq!(BlockType::F32.bytes_for(usize::MAX), None);
        assert_eq!(BlockType::Q4_K.to_string(), "Q4_K");
    }
}
