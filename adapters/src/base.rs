//! The weight that an update sits on, read a few rows at a time: what the family needs of a base.

use std::ops::Range;
use std::sync::Arc;

/// A frozen weight `W (rows, cols)`, `y = W x`, in whatever type it lies.
pub trait BaseRows: Sync {
    /// Outputs of the layer.
    fn rows(&self) -> usize;

    /// Inputs of the layer.
    fn cols(&self) -> usize;

    /// Reads some rows: `out (rows, cols)`, row by row.
    ///
    /// # Panics
    /// If the rows leave the weight or `out` has another size.
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
