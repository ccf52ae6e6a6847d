//! Quantization: from `f32` to blocks, with minimal error.
//!
//! The error `Σ w · (x - q)²` of each block is minimized, with `w` the importance of the value's
//! column, or 1: the error of the layer's output, if `w` is the mean square of its input. Scales
//! are searched for, then refitted by least squares to the resulting integers, as in Lloyd's
//! algorithm (1982); in a K-quant the scales of the whole block and those inside it in turn.
//! The result does not depend on the number of threads.

mod fit;
mod pack;

use rayon::prelude::*;

use super::BlockType;
use crate::isa::{Isa, multiversion};

/// Approximate number of values per task.
const CHUNK: usize = 1 << 14;

/// Minimum weight of a column, as a fraction of the mean: columns that the calibration text never used
/// must not become noise.
const LEAST_WEIGHT: f64 = 1e-4;

impl BlockType {
    /// Quantizes rows of `cols` values to blocks in `out`.
    ///
    /// Shapes: `values (rows, cols)`, `importance (cols)` → `out` `rows · bytes_for(cols)` bytes.
    /// Values must be finite; too large values become infinite in F16.
    ///
    /// # Panics
    /// If the type is not in [`Self::WRITTEN`], `cols` are not whole blocks, or a slice has another size:
    /// a bug of the caller.
    pub fn quantize(self, values: &[f32], cols: usize, importance: Option<&[f32]>, out: &mut [u8]) {
        assert!(Self::WRITTEN.contains(&self), "{self} is only read");
        let row_bytes = self.bytes_for(cols).expect("whole blocks");
        assert!(cols > 0 && values.len().is_multiple_of(cols));
        assert_eq!(out.len(), values.len() / cols * row_bytes);
        let weights = weights(cols, importance);
        let rows = (CHUNK / cols).max(1);
        let isa = Isa::current();
        let chunks = values.par_chunks(rows * cols).zip(out.par_chunks_mut(rows * row_bytes));
        chunks.for_each(|(values, out)| {
            for (row, out) in values.chunks_exact(cols).zip(out.chunks_exact_mut(row_bytes)) {
                quantize_row(isa, self, row, &weights, out);
            }
        });
    }
}

/// Weights of columns, normalized to mean 1.
fn weights(cols: usize, importance: Option<&[f32]>) -> Vec<f32> {
    let Some(importance) = importance else { return vec![1.0; cols] };
    assert_eq!(importance.len(), cols);
    let mean = importance.iter().map(|&w| f64::from(w)).sum::<f64>() / cols as f64;
    if mean.is_nan() || mean <= 0.0 {
        return vec![1.0; cols];
    }
    importance.iter().map(|&w| (f64::from(w) / mean).max(LEAST_WEIGHT) as f32).collect()
}

/// Goes through the blocks of a row; sizes known at compile time let the inner loops vectorize. A
/// macro, as a function passed to a function would be compiled for the lowest ISA level.
macro_rules! each {
    ($block:ident, $values:ident, $weights:ident, $out:ident) => {{
        let blocks = $values.as_chunks().0.iter().zip($weights.as_chunks().0);
        for ((x, w), b) in blocks.zip($out.as_chunks_mut().0) {
            pack::$block(x, w, b);
        }
    }};
}

multiversion! {
    fn quantize_row(isa; of: BlockType, values: &[f32], weights: &[f32], out: &mut [u8]) {
        match of {
            BlockType::F32 => each!(f32_value, values, weights, out),
            BlockType::F16 => each!(f16_value, values, weights, out),
            BlockType::BF16 => each!(bf16_value, values, weights, out),
            BlockType::Q4_0 => each!(q4_0, values, weights, out),
            BlockType::Q4_1 => each!(q4_1, values, weights, out),
            BlockType::Q5_0 => each!(q5_0, values, weights, out),
            BlockType::Q5_1 => each!(q5_1, values, weights, out),
            BlockType::Q8_0 => each!(q8_0, values, weights, out),
            BlockType::Q2_K => each!(q2_k, values, weights, out),
            BlockType::Q3_K => each!(q3_k, values, weights, out),
            BlockType::Q4_K => each!(q4_k, values, weights, out),
            BlockType::Q5_K => each!(q5_k, values, weights, out),
            BlockType::Q6_K => each!(q6_k, values, weights, out),
            BlockType::IQ4_NL | BlockType::IQ4_XS | BlockType::MXFP4 => {
                unreachable!("read-only type, checked above")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::k_quants::*;
    use quantune_adapters::rng::Stream;

    use super::*;

    const COLS: usize = 512;

    /// The rows quantized by the reference quantizer (candle's, ported from ggml).
    fn reference<T: GgmlType>(values: &[f32]) -> Vec<f32> {
        let mut blocks = vec![T::zeros(); values.len() / T::BLCK_SIZE];
        T::from_float(values, &mut blocks);
        let mut out = vec![0.0; values.len()];
        T::to_float(&blocks, &mut out);
        out
    }

    fn of_reference(block_type: BlockType, values: &[f32]) -> Vec<f32> {
        match block_type {
            BlockType::F32 => reference::<f32>(values),
            BlockType::F16 => reference::<half::f16>(values),
            BlockType::BF16 => reference::<half::bf16>(values),
            BlockType::Q4_0 => reference::<BlockQ4_0>(values),
            BlockType::Q4_1 => reference::<BlockQ4_1>(values),
            BlockType::Q5_0 => reference::<BlockQ5_0>(values),
            BlockType::Q5_1 => reference::<BlockQ5_1>(values),
            BlockType::Q8_0 => reference::<BlockQ8_0>(values),
            BlockType::Q2_K => reference::<BlockQ2K>(values),
            BlockType::Q3_K => reference::<BlockQ3K>(values),
            BlockType::Q4_K => reference::<BlockQ4K>(values),
            BlockType::Q5_K => reference::<BlockQ5K>(values),
            BlockType::Q6_K => reference::<BlockQ6K>(values),
            BlockType::IQ4_NL | BlockType::IQ4_XS | BlockType::MXFP4 => unreachable!("only read"),
        }
    }

    fn ours(block_type: BlockType, values: &[f32], importance: Option<&[f32]>) -> Vec<f32> {
        let mut blocks = vec![0; block_type.bytes_for(values.len()).unwrap()];
        block_type.quantize(values, COLS, importance, &mut blocks);
        let mut out = vec![0.0; values.len()];
        block_type.dequantize(&blocks, &mut out);
        out
    }

    fn error(values: &[f32], found: &[f32], importance: Option<&[f32]>) -> f64 {
        let off = values.iter().zip(found).enumerate().map(|(i, (x, y))| {
            let w = importance.map_or(1.0, |importance| importance[i % COLS]);
            f64::from(w) * f64::from(x - y).powi(2)
        });
        off.sum()
    }

    /// Rows like those of trained matrices, and degenerate ones.
    fn tensors() -> Vec<(&'static str, Vec<f32>)> {
        let mut stream = Stream::new(5, "tensors", &[]);
        let normal: Vec<f32> = (0..24 * COLS).map(|_| 0.02 * stream.normal()).collect();
        // Student's t with 3 degrees of freedom.
        let heavy = (0..24 * COLS).map(|_| {
            let squares: f32 = (0..3).map(|_| stream.normal().powi(2)).sum();
            0.02 * stream.normal() / (squares / 3.0).sqrt()
        });
        let heavy = heavy.collect();
        let outliers = normal.iter().enumerate();
        let outliers = outliers.map(|(i, v)| if i % 173 == 0 { v * 40.0 } else { *v }).collect();
        let positive = normal.iter().map(|v| v.abs() + 0.01).collect();
        let sparse = normal.iter().enumerate();
        let sparse = sparse.map(|(i, v)| if i % 37 == 0 { *v } else { 0.0 }).collect();
        vec![
            ("normal", normal),
            ("heavy", heavy),
            ("outliers", outliers),
            ("positive", positive),
            ("sparse", sparse),
        ]
    }

    #[test]
    fn the_error_is_at_most_the_references() {
        for (name, values) in tensors() {
            for &block_type in BlockType::WRITTEN {
                let theirs = error(&values, &of_reference(block_type, &values), None);
                let ours = error(&values, &ours(block_type, &values, None), None);
                println!("{name} {block_type}: {:.4}", ours / theirs);
                assert!(ours <= theirs, "{name} {block_type}: {ours:e}, theirs {theirs:e}");
            }
        }
    }

    #[test]
    fn importance_lowers_the_weighted_error() {
        let mut stream = Stream::new(6, "importance", &[]);
        let importance: Vec<f32> = (0..COLS).map(|_| (1.5 * stream.normal()).exp()).collect();
        let importance = Some(&importance[..]);
        for (name, values) in tensors() {
            for &block_type in &BlockType::WRITTEN[3..] {
                let without = error(&values, &ours(block_type, &values, None), importance);
                let with = error(&values, &ours(block_type, &values, importance), importance);
                println!("{name} {block_type}: {:.4}", with / without);
                // A single value in a block only has the rounding error of its scale.
                let noise = 1e-6 * error(&values, &vec![0.0; values.len()], importance);
                assert!(with <= without + noise, "{name} {block_type}: {with:e} and {without:e}");
            }
        }
    }

    #[test]
    fn zero_constant_and_huge_values_stay_finite() {
        for value in [0.0, -0.0, 1e-30, 0.25, -3.0, 60000.0, -60000.0] {
            let mut values = vec![value; COLS];
            values[7] = 0.0;
            for &block_type in BlockType::WRITTEN {
                for importance in [None, Some(&vec![0.0; COLS][..])] {
                    let found = ours(block_type, &values, importance);
                    let (off, of) =
                        (error(&values, &found, None), error(&values, &[0.0; COLS], None));
                    let part = (off / of.max(1e-30)).sqrt();
                    assert!(part < 0.1 || of < 1e-20, "{block_type} {value}: off by {part}");
                }
            }
        }
    }

    #[test]
    fn every_isa_level_writes_the_same_bytes() {
        let (_, values) = tensors().swap_remove(1);
        for &block_type in BlockType::WRITTEN {
            let bytes = |isa| {
                let mut out = vec![0; block_type.bytes_for(COLS).unwrap()];
                quantize_row(isa, block_type, &values[..COLS], &[1.0; COLS], &mut out);
                out
            };
            let needed = bytes(Isa::SCALAR);
            for isa in Isa::available() {
                assert_eq!(bytes(isa), needed, "{block_type} {isa:?}");
            }
        }
    }
}
