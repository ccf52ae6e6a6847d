//! Writes a tensor into a file, one chunk of rows at a time.

use std::io::{self, Write};

use super::{ExportError, ExportTensor, WrittenTensor};
use crate::quant::{BlockType, RowOrder};

/// Approximate number of values in a chunk.
const VALUES: usize = 1 << 21;

/// How a tensor is stored in a file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct StoredForm {
    pub block_type: BlockType,
    pub order: RowOrder,
    /// What is added to Hugging Face's values.
    pub offset: f32,
}

/// Writes a tensor in a form, and returns its relative error. The [`ExportError`] of a failure is stored
/// in `failed`, because a writer returns [`io::Error`].
pub(super) fn write(
    tensor: &ExportTensor,
    name: &str,
    form: StoredForm,
    importance: Option<&[f32]>,
    file: &mut dyn Write,
    failed: &mut Option<ExportError>,
) -> io::Result<WrittenTensor> {
    let StoredForm { block_type, order, offset } = form;
    let written = |relative_error| WrittenTensor {
        name: name.into(),
        shape: tensor.shape.clone(),
        block_type,
        relative_error,
    };
    if let Some(bytes) = tensor.verbatim(&form) {
        file.write_all(bytes)?;
        return Ok(written(0.0));
    }
    let mut fail = |error: ExportError| {
        let text = error.to_string();
        *failed = Some(error);
        io::Error::other(text)
    };
    let (rows, cols) = (tensor.rows(), tensor.cols());
    // Whole heads, whose rows are reordered.
    let step = order.stretch();
    let chunk = (VALUES / cols / step).max(1) * step;
    let row_bytes = block_type.bytes_for(cols).ok_or_else(|| {
        let reason = format!("rows of {cols} values are not whole {block_type} blocks");
        fail(ExportError::tensor(name, reason))
    })?;
    let (mut off, mut of) = (0f64, 0f64);
    let mut values = vec![0f32; chunk.min(rows) * cols];
    let mut turned = Vec::new();
    let mut bytes = Vec::new();
    let mut back = Vec::new();
    for first in (0..rows).step_by(chunk) {
        let many = chunk.min(rows - first);
        let values = &mut values[..many * cols];
        tensor.read(first..first + many, values).map_err(&mut fail)?;
        let short = offset - tensor.offset();
        if short != 0.0 {
            values.iter_mut().for_each(|value| *value += short);
        }
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            let (row, col, v) = (first + at / cols, at % cols, values[at]);
            let reason = format!("row {row}, column {col} is {v}, needed finite numbers");
            return Err(fail(ExportError::tensor(name, reason)));
        }
        let values: &[f32] = match order {
            RowOrder::Straight => values,
            RowOrder::Interleaved { head_dim } => {
                interleave(values, cols, head_dim, &mut turned);
                &turned
            }
        };
        bytes.resize(many * row_bytes, 0);
        // A vector is a column here, but is quantized as a row.
        let width = if cols == 1 { many } else { cols };
        block_type.quantize(values, width, importance, &mut bytes);
        back.resize(values.len(), 0.0);
        block_type.dequantize(&bytes, &mut back);
        for (value, back) in values.iter().zip(&back) {
            off += f64::from(value - back).powi(2);
            of += f64::from(*value).powi(2);
        }
        if !off.is_finite() {
            let reason = format!("has values that {block_type} cannot hold");
            return Err(fail(ExportError::tensor(name, reason)));
        }
        file.write_all(&bytes)?;
    }
    Ok(written(if of > 0.0 { (off / of).sqrt() } else { 0.0 }))
}

/// Reorders the rows of each head so that the two halves of a rotary pair are neighbours: row
/// `half · (head_dim / 2) + i` goes to `2 · i + half`, as llama.cpp's converter does.
pub(super) fn interleave(values: &[f32], cols: usize, head_dim: usize, out: &mut Vec<f32>) {
    out.resize(values.len(), 0.0);
    let heads = values.chunks_exact(head_dim * cols).zip(out.chunks_exact_mut(head_dim * cols));
    for (values, out) in heads {
        for (row, values) in values.chunks_exact(cols).enumerate() {
            let (half, i) = (row / (head_dim / 2), row % (head_dim / 2));
            out[(2 * i + half) * cols..][..cols].copy_from_slice(values);
        }
    }
}
