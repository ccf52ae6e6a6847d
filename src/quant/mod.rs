//! GGML block types over a range of bytes: what a block is, how it becomes `f32`, and how `f32`
//! become blocks.
//!
//! Knows nothing of files: bytes arrive as a [`Bytes`], usually a window into a memory map.

mod blocks;
mod matrix;
mod quantize;
#[cfg(test)]
pub(crate) mod testing;

pub use blocks::BlockType;
pub(crate) use blocks::{E2M1_TWICE, NON_LINEAR, half_e8m0, iq4_xs_scale};
pub use matrix::{Bytes, FrozenMatrix, MatrixError, Owner, RowOrder};
