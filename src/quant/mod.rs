//! GGML block types over a range of bytes: what a block is, and how it becomes `f32`.
//!
//! Knows nothing of files: bytes arrive as a [`Bytes`], usually a window into a memory map.

mod blocks;
mod matrix;
#[cfg(test)]
pub(crate) mod testing;

pub use blocks::BlockType;
pub use matrix::{Bytes, FrozenMatrix, MatrixError, RowOrder};
