//! A base's frozen weight, read a few rows at a time.

use std::ops::Range;
use std::sync::Arc;

/// A frozen weight `W (rows, cols)` of a layer `y = W x`, in any storage type.
pub trait BaseRows: Sync {
    /// Rows of `W`: outputs of the layer.
    fn rows(&self) -> usize;

    /// Columns of `W`: inputs of the layer.
    fn cols(&self) -> usize;

    /// Reads rows as F32 into `out (rows, cols)`, row-major.
    ///
    /// # Panics
    /// If the range exceeds the rows or `out` has another size.
    fn read(&self, rows: Range<usize>, out: &mut [f32]);
}

impl<T: BaseRows + Send> BaseRows for Arc<T> {
    fn rows(&self) -> usize {
        (**self).rows()
    }

    fn cols(&self) -> usize {
        (**self).cols()
    }

    fn read(&self, rows: Range<usize>, out: &mut [f32]) {
        (**self).read(rows, out);
    }
}
