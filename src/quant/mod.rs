//! GGML block types over a range of bytes: block layouts, dequantization to `f32`, and quantization from
//! `f32`.
//!
//! Does not know files: bytes are passed as [`Bytes`], usually a slice of a memory map.

mod blocks;
mod matrix;
mod quantize;
#[cfg(test)]
pub(crate) mod testing;

pub use blocks::BlockType;
pub(crate) use blocks::{E2M1_TWICE, NON_LINEAR, half_e8m0, iq4_xs_scale};
pub use matrix::{Bytes, FrozenMatrix, MatrixError, Owner, RowOrder};
