//! A frozen matrix: rows of blocks that are read in place, a tile at a time.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use quantune_adapters::BaseRows;
use rayon::prelude::*;

use super::BlockType;

/// The owner of bytes: a memory map or a buffer.
pub trait Owner: AsRef<[u8]> + Send + Sync {
    /// Advises the system that the bytes at `range` will hardly be read again, so that it can evict the
    /// pages of a map.
    fn forget(&self, range: Range<usize>) {
        let _ = range;
    }
}

impl Owner for Vec<u8> {}

/// A reference-counted slice of a memory map or of a buffer on the heap.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn Owner>,
    range: Range<usize>,
}

impl Bytes {
    /// All bytes of `owner`.
    pub fn new(owner: Arc<dyn Owner>) -> Self {
        let range = 0..(*owner).as_ref().len();
        Self { owner, range }
    }

    /// A sub-slice, or `None` if `range` is out of bounds.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        let start = self.range.start.checked_add(range.start)?;
        let end = self.range.start.checked_add(range.end)?;
        (start <= end && end <= self.range.end)
            .then(|| Self { owner: self.owner.clone(), range: start..end })
    }

    /// Advises the system that the bytes will hardly be read again.
    pub fn forget(&self) {
        self.owner.forget(self.range.clone());
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bytes({:?})", self.range)
    }
}

/// The order of the rows of a matrix in its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// Row `i` is the `i`-th stored row.
    Straight,
    /// llama.cpp's converter stores the rows of `attn_q` and `attn_k` of the `llama` architecture
    /// so that the two halves of a rotary pair are neighbours: per head, logical row
    /// `half * (head_dim / 2) + i` is stored at `2 * i + half`.
    Interleaved {
        /// Rows of one head, an even number.
        head_dim: usize,
    },
}

impl RowOrder {
    /// The period of the permutation, in rows.
    pub(crate) fn stretch(self) -> usize {
        match self {
            Self::Straight => 1,
            Self::Interleaved { head_dim } => head_dim,
        }
    }
}

/// Why bytes cannot be read, or values not quantized, as a matrix.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MatrixError {
    /// The row is not a whole number of blocks.
    #[error("rows of {cols} values are not a whole number of {block_type} blocks of {block_len}")]
    Row {
        /// Number of columns.
        cols: usize,
        /// The block type.
        block_type: BlockType,
        /// Values in a block.
        block_len: usize,
    },
    /// The bytes do not hold `rows x cols` values.
    #[error("{rows} x {cols} values of {block_type} need {needed} bytes, found {found}")]
    Size {
        /// Number of rows.
        rows: usize,
        /// Number of columns.
        cols: usize,
        /// The block type.
        block_type: BlockType,
        /// Bytes the shape needs.
        needed: usize,
        /// Bytes found.
        found: usize,
    },
    /// A value that no block can hold.
    #[error("row {row} has the value {value}, which cannot be quantized")]
    NotFinite {
        /// Its row.
        row: usize,
        /// The infinite or NaN value.
        value: f32,
    },
    /// A range of rows that the matrix does not have, or whose rows are not stored in order.
    #[error("rows {start}..{end} are not a contiguous range of {found} rows in {order:?} order")]
    Window {
        /// The first row.
        start: usize,
        /// The row after the last.
        end: usize,
        /// Rows of the matrix.
        found: usize,
        /// Their order.
        order: RowOrder,
    },
    /// An interleaved order over rows that are not whole heads of even size.
    #[error("{rows} rows cannot be interleaved heads of {head_dim}")]
    Heads {
        /// Rows of the matrix.
        rows: usize,
        /// Rows of a head.
        head_dim: usize,
    },
}

/// A frozen `(rows, cols)` matrix in any block type, read in place.
#[derive(Debug, Clone)]
pub struct FrozenMatrix {
    bytes: Bytes,
    block_type: BlockType,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    order: RowOrder,
    /// Appended rows, F32 on the heap, of an extended vocabulary.
    more: Option<Arc<FrozenMatrix>>,
}

/// Rows per partial sum of the mean, so that it is the same on any number of threads.
const MEAN_ROWS: usize = 1024;

impl FrozenMatrix {
    /// Checks once that `bytes` are exactly `rows x cols` values of `block_type`.
    pub fn new(
        bytes: Bytes,
        block_type: BlockType,
        rows: usize,
        cols: usize,
    ) -> Result<Self, MatrixError> {
        let block_len = block_type.block_len();
        let row_bytes =
            block_type.bytes_for(cols).ok_or(MatrixError::Row { cols, block_type, block_len })?;
        let needed = row_bytes.saturating_mul(rows);
        if needed != bytes.len() {
            let found = bytes.len();
            return Err(MatrixError::Size { rows, cols, block_type, needed, found });
        }
        let order = RowOrder::Straight;
        Ok(Self { bytes, block_type, rows, cols, row_bytes, order, more: None })
    }

    /// A view of some rows of the same bytes, such as an expert of a `(experts, rows, cols)` tensor.
    ///
    /// # Errors
    /// If the rows are out of range, appended, or not stored in order.
    pub fn window(&self, rows: Range<usize>) -> Result<Self, MatrixError> {
        let in_order = self.order == RowOrder::Straight;
        if !in_order || rows.start > rows.end || rows.end > self.rows {
            let Range { start, end } = rows;
            return Err(MatrixError::Window { start, end, found: self.rows, order: self.order });
        }
        let bytes = rows.start * self.row_bytes..rows.end * self.row_bytes;
        let bytes = self.bytes.slice(bytes).expect("as many bytes as rows");
        Self::new(bytes, self.block_type, rows.len(), self.cols)
    }

    /// The matrix of `f32` values on the heap, for tests and small weights.
    pub fn from_f32(values: &[f32], rows: usize, cols: usize) -> Result<Self, MatrixError> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self::new(Bytes::new(Arc::new(bytes)), BlockType::F32, rows, cols)
    }

    /// The same matrix with `n` appended rows of F32, all equal to `row (cols)`. Its own rows are not
    /// copied.
    ///
    /// # Errors
    /// If the row has another width.
    pub fn grown(&self, n: usize, row: &[f32]) -> Result<Self, MatrixError> {
        let mut values = match &self.more {
            Some(more) => {
                let mut values = vec![0f32; more.rows * more.cols];
                more.read_tile(0..more.rows, 0..more.cols, &mut values);
                values
            }
            None => Vec::new(),
        };
        let before = values.len() / self.cols.max(1);
        values.extend((0..n).flat_map(|_| row));
        let more = Self::from_f32(&values, before + n, self.cols)?;
        Ok(Self { more: Some(Arc::new(more)), ..self.clone() })
    }

    /// The mean of its own rows, `(cols)`: the initial value of rows of added tokens. The sum is
    /// in `f64`, in partial sums of a fixed number of rows.
    pub fn mean_row(&self) -> Vec<f32> {
        let (rows, cols) = (self.rows, self.cols);
        let firsts: Vec<usize> = (0..rows).step_by(MEAN_ROWS).collect();
        let stretch = |first: usize| -> Vec<f64> {
            let (mut sum, mut values) = (vec![0f64; cols], vec![0f32; cols]);
            for row in first..rows.min(first + MEAN_ROWS) {
                self.read_row(row, &mut values);
                sum.iter_mut().zip(&values).for_each(|(sum, v)| *sum += f64::from(*v));
            }
            sum
        };
        let sums: Vec<Vec<f64>> = firsts.into_par_iter().map(stretch).collect();
        let mut mean = vec![0f64; cols];
        for sum in sums {
            mean.iter_mut().zip(sum).for_each(|(mean, sum)| *mean += sum);
        }
        mean.into_iter().map(|sum| (sum / rows.max(1) as f64) as f32).collect()
    }

    /// A copy on the heap in another block type, quantized row by row in logical order.
    ///
    /// # Errors
    /// If its rows are not whole blocks of that type, or a value is not finite.
    ///
    /// # Panics
    /// If `of` is not in [`BlockType::WRITTEN`]: a bug of the caller.
    pub fn quantized(&self, of: BlockType) -> Result<Self, MatrixError> {
        const VALUES: usize = 1 << 20;
        let (rows, cols) = (self.rows(), self.cols);
        let block_len = of.block_len();
        let row_bytes =
            of.bytes_for(cols).ok_or(MatrixError::Row { cols, block_type: of, block_len })?;
        let mut bytes = vec![0; rows * row_bytes];
        let step = (VALUES / cols.max(1)).clamp(1, rows.max(1));
        let mut values = vec![0f32; step * cols];
        for (first, bytes) in (0..rows).step_by(step).zip(bytes.chunks_mut(step * row_bytes)) {
            let taken = first..rows.min(first + step);
            let values = &mut values[..taken.len() * cols];
            self.read_tile(taken.clone(), 0..cols, values);
            if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                return Err(MatrixError::NotFinite { row: first + at / cols, value: values[at] });
            }
            of.quantize(values, cols, None, bytes);
        }
        Self::new(Bytes::new(Arc::new(bytes)), of, rows, cols)
    }

    /// Advises the system that it will hardly be read again, so that it can evict mapped pages.
    pub fn forget(&self) {
        self.bytes.forget();
    }

    /// The same bytes read in another row order.
    pub fn with_order(self, order: RowOrder) -> Result<Self, MatrixError> {
        if let RowOrder::Interleaved { head_dim } = order
            && (head_dim == 0 || head_dim % 2 != 0 || !self.rows.is_multiple_of(head_dim))
        {
            return Err(MatrixError::Heads { rows: self.rows, head_dim });
        }
        Ok(Self { order, ..self })
    }

    /// Rows: the layer's output features.
    pub fn rows(&self) -> usize {
        self.rows + self.more.as_ref().map_or(0, |more| more.rows)
    }

    /// Rows without appended ones.
    pub fn own_rows(&self) -> usize {
        self.rows
    }

    /// The appended rows, as a separate matrix.
    pub fn more_rows(&self) -> Option<&FrozenMatrix> {
        self.more.as_deref()
    }

    /// Columns: the layer's input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The block type, without appended rows, which are F32.
    pub fn block_type(&self) -> BlockType {
        self.block_type
    }

    /// The bytes without appended rows, in place.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Reads `rows x cols` into `out`, row-major. `cols` must begin and end at block boundaries.
    ///
    /// # Panics
    /// If a range is out of bounds or splits a block, or `out` has another size: a bug of the caller.
    pub fn read_tile(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let block_len = self.block_type.block_len();
        assert!(rows.end <= self.rows() && cols.end <= self.cols);
        assert!(cols.start.is_multiple_of(block_len) && cols.end.is_multiple_of(block_len));
        assert_eq!(out.len(), rows.len() * cols.len());
        if out.is_empty() {
            return;
        }
        let block_bytes = self.block_type.block_bytes();
        let first = cols.start / block_len * block_bytes;
        let last = cols.end / block_len * block_bytes;
        for (row, out) in rows.zip(out.chunks_exact_mut(cols.len())) {
            if let Some(more) = self.more.as_ref().filter(|_| row >= self.rows) {
                more.read_tile(row - self.rows..row - self.rows + 1, cols.clone(), out);
                continue;
            }
            let at = self.stored_row(row) * self.row_bytes;
            self.block_type.dequantize(&self.bytes[at + first..at + last], out);
        }
    }

    /// One whole row into `out`.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        self.read_tile(row..row + 1, 0..self.cols, out);
    }

    /// The bytes of rows in storage order, whose logical index is [`Self::logical_row`]: for kernels that
    /// read memory sequentially.
    pub(crate) fn stored_bytes(&self, rows: Range<usize>) -> &[u8] {
        &self.bytes[rows.start * self.row_bytes..rows.end * self.row_bytes]
    }

    /// The bytes of all rows in logical order, without appended ones, copied if the storage order differs.
    pub(crate) fn bytes_in_order(&self) -> Cow<'_, [u8]> {
        match self.order {
            RowOrder::Straight => Cow::Borrowed(&self.bytes),
            RowOrder::Interleaved { .. } => {
                let stored = |row| self.stored_row(row)..self.stored_row(row) + 1;
                let rows = (0..self.rows).flat_map(|row| self.stored_bytes(stored(row)));
                Cow::Owned(rows.copied().collect())
            }
        }
    }

    /// Bytes of one row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// The order of the rows in the bytes.
    pub(crate) fn order(&self) -> RowOrder {
        self.order
    }

    /// The row that is stored as the `stored`-th.
    pub(crate) fn logical_row(&self, stored: usize) -> usize {
        match self.order {
            RowOrder::Straight => stored,
            RowOrder::Interleaved { head_dim } => {
                let (head, within) = (stored / head_dim, stored % head_dim);
                head * head_dim + within % 2 * (head_dim / 2) + within / 2
            }
        }
    }

    fn stored_row(&self, row: usize) -> usize {
        match self.order {
            RowOrder::Straight => row,
            RowOrder::Interleaved { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let (half, i) = (within / (head_dim / 2), within % (head_dim / 2));
                head * head_dim + 2 * i + half
            }
        }
    }
}

impl BaseRows for FrozenMatrix {
    fn rows(&self) -> usize {
        FrozenMatrix::rows(self)
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn read(&self, rows: Range<usize>, out: &mut [f32]) {
        self.read_tile(rows, 0..self.cols, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_are_llama_cpps_permutation() {
        // One head of 4 rows: stored 0 2 1 3 is logical 0 1 2 3.
        let stored = [0.0, 2.0, 1.0, 3.0];
        let matrix = FrozenMatrix::from_f32(&stored, 4, 1).unwrap();
        let matrix = matrix.with_order(RowOrder::Interleaved { head_dim: 4 }).unwrap();
        let mut out = [0.0; 4];
        matrix.read_tile(0..4, 0..1, &mut out);
        assert_eq!(out, [0.0, 1.0, 2.0, 3.0]);
        for stored in 0..4 {
            assert_eq!(matrix.stored_row(matrix.logical_row(stored)), stored);
        }
    }

    #[test]
    fn a_grown_matrix_is_its_own_rows_and_more() {
        let bytes = crate::quant::testing::random_blocks(BlockType::Q4_0, 3000 * 64, 5);
        let bytes = Bytes::new(Arc::new(bytes));
        let matrix = FrozenMatrix::new(bytes, BlockType::Q4_0, 3000, 64).unwrap();
        let mut own = vec![0.0; 3000 * 64];
        matrix.read_tile(0..3000, 0..64, &mut own);
        let mean = matrix.mean_row();
        for (col, mean) in mean.iter().enumerate() {
            let exact = own.iter().skip(col).step_by(64).map(|v| f64::from(*v)).sum::<f64>() / 3e3;
            assert!((f64::from(*mean) - exact).abs() < 1e-6);
        }
        let grown = matrix.grown(2, &mean).unwrap().grown(1, &own[..64]).unwrap();
        assert_eq!((grown.rows(), grown.own_rows()), (3003, 3000));
        assert_eq!(grown.mean_row(), mean);
        let mut found = vec![0.0; 5 * 32];
        grown.read_tile(2998..3003, 32..64, &mut found);
        let needed = [&own[2998 * 64..][..64], &own[2999 * 64..], &mean, &mean, &own[..64]];
        for (found, needed) in found.chunks(32).zip(needed) {
            assert_eq!(found, &needed[32..]);
        }
        assert!(matrix.grown(2, &mean[1..]).is_err());
    }

    #[test]
    fn sizes_are_checked_before_anything_is_read() {
        let bytes = |n: usize| Bytes::new(Arc::new(vec![0u8; n]));
        assert!(FrozenMatrix::new(bytes(68), BlockType::Q8_0, 2, 32).is_ok());
        assert!(matches!(
            FrozenMatrix::new(bytes(68), BlockType::Q8_0, 3, 32),
            Err(MatrixError::Size { needed: 102, found: 68, .. })
        ));
        assert!(matches!(
            FrozenMatrix::new(bytes(68), BlockType::Q8_0, 2, 33),
            Err(MatrixError::Row { cols: 33, .. })
        ));
    }
}
