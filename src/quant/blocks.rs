//! The block types of GGML: layouts as in `ggml-common.h`, values as in `ggml-quants.c`.

use half::{bf16, f16};

/// A GGML tensor type whose values we can read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, missing_docs)] // the format's own names
pub enum BlockType {
    F32,
    F16,
    BF16,
    Q8_0,
}

impl BlockType {
    /// Every type there is.
    pub const ALL: &[Self] = &[Self::F32, Self::F16, Self::BF16, Self::Q8_0];

    /// Where the `f16` scales of a block lie, for making random blocks in tests.
    #[cfg(test)]
    pub(crate) fn scale_offsets(self) -> &'static [usize] {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => &[],
            Self::Q8_0 => &[0],
        }
    }

    /// Values in one block.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 => 32,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8_0 => 34,
        }
    }

    /// Bytes of `values` values, or `None` if they are no whole number of blocks or overflow.
    pub fn bytes_for(self, values: usize) -> Option<usize> {
        let len = self.block_len();
        if !values.is_multiple_of(len) {
            return None;
        }
        (values / len).checked_mul(self.block_bytes())
    }

    /// Reads the values of whole blocks.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            Self::F16 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = f16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
            Self::BF16 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = bf16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
            Self::Q8_0 => {
                for (o, b) in out.chunks_exact_mut(32).zip(bytes.chunks_exact(34)) {
                    let d = f16::from_le_bytes([b[0], b[1]]).to_f32();
                    for (o, q) in o.iter_mut().zip(&b[2..]) {
                        *o = d * f32::from(*q as i8);
                    }
                }
            }
        }
    }
}

impl std::fmt::Display for BlockType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}
