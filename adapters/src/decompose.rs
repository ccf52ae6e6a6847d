//! Leading singular triples, exact and randomized, and the leading part of a QR decomposition, for
//! [`crate::initialize`] and [`crate::combine`].
//!
//! Everything is in `f64` on one thread, so that results do not depend on the number of threads; callers
//! process several matrices in parallel.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat, MatRef, Par, Side};

use crate::rng::Stream;

/// Values of a matrix that are converted to `f64` at a time: 32 MB.
const CHUNK: usize = 1 << 22;
/// Additional columns of the randomized iteration (Halko et al. 2011).
const OVERSAMPLING: usize = 8;

/// The iteration did not converge, which does not happen with finite values.
#[derive(Debug)]
pub(crate) struct NotConverged;

/// A matrix `(rows, cols)` of finite values, row-major.
#[derive(Clone, Copy)]
pub(crate) struct Dense<'a> {
    pub values: &'a [f32],
    pub rows: usize,
    pub cols: usize,
}

/// The k leading singular triples of a matrix, largest first: `U diag(s) Vᵀ`.
pub(crate) struct Singular {
    /// `(rows, k)`.
    pub u: Mat<f64>,
    /// `(k)`.
    pub s: Vec<f64>,
    /// `(cols, k)`.
    pub v: Mat<f64>,
}

impl Dense<'_> {
    /// The r leading triples, fewer if the matrix has fewer.
    ///
    /// The vectors of the shorter side are eigenvectors of `W Wᵀ` or `Wᵀ W`, those of the other side
    /// follow by one product, and the singular values are its lengths. Squaring costs half the digits
    /// of the smallest singular values: what is under 1e-8 of the largest is noise, about where the
    /// rounding of the `f32` numbers of W themselves puts it. In exchange nothing as large as W is
    /// decomposed.
    pub(crate) fn leading(self, r: usize) -> Result<Singular, NotConverged> {
        let k = r.min(self.rows).min(self.cols);
        let wide = self.rows < self.cols;
        let gram = self.gram(wide);
        let eigen = gram.self_adjoint_eigen(Side::Lower).map_err(|_| NotConverged)?;
        drop(gram);
        let n = eigen.U().ncols();
        let near = Mat::from_fn(n, k, |row, col| eigen.U()[(row, n - 1 - col)]);
        let mut far = if wide { self.transposed_times(&near) } else { self.times(&near) };
        let mut s = Vec::with_capacity(k);
        for col in 0..k {
            let length = far.col(col).norm_l2();
            s.push(length);
            let inverse = if length > 0.0 { 1.0 / length } else { 0.0 };
            far.col_mut(col).iter_mut().for_each(|value| *value *= inverse);
        }
        let (u, v) = if wide { (near, far) } else { (far, near) };
        Ok(Singular { u, s, v })
    }

    /// The r leading triples by `niter` rounds of randomized subspace iteration (Halko et al. 2011,
    /// algorithm 4.4): for spectra that fall, nearly exact after a few.
    pub(crate) fn leading_randomized(
        self,
        r: usize,
        niter: usize,
        stream: &mut Stream,
    ) -> Result<Singular, NotConverged> {
        let shorter = self.rows.min(self.cols);
        let (k, width) = (r.min(shorter), (r + OVERSAMPLING).min(shorter));
        let start = Mat::from_fn(self.cols, width, |_, _| f64::from(stream.normal()));
        let mut range = self.times(&start).qr().compute_thin_Q(); // (rows, width)
        for _ in 0..niter {
            let other = self.transposed_times(&range).qr().compute_thin_Q(); // (cols, width)
            range = self.times(&other).qr().compute_thin_Q();
        }
        let small = self.transposed_times(&range); // (cols, width) = (rangeᵀ W)ᵀ
        let svd = small.thin_svd().map_err(|_| NotConverged)?;
        Ok(Singular {
            u: product(range.as_ref(), svd.V().subcols(0, k)),
            s: (0..k).map(|i| svd.S()[i]).collect(),
            v: svd.U().subcols(0, k).to_owned(),
        })
    }

    /// The first r columns of Q `(rows, k)` and rows of R `(k, cols)` of `W = Q R`: the first columns
    /// of Q depend on the first columns of W only, and R is `Qᵀ W`.
    pub(crate) fn leading_qr(self, r: usize) -> (Mat<f64>, Mat<f64>) {
        let k = r.min(self.rows).min(self.cols);
        let first = |row, col| f64::from(self.values[row * self.cols + col]);
        let q = Mat::from_fn(self.rows, k, first).qr().compute_thin_Q();
        let r = self.transposed_times(&q).transpose().to_owned();
        (q, r)
    }

    /// The lower half of `W Wᵀ (rows, rows)`, or of `Wᵀ W (cols, cols)`.
    fn gram(self, wide: bool) -> Mat<f64> {
        let n = if wide { self.rows } else { self.cols };
        let mut gram = Mat::zeros(n, n);
        let mut add = |left: MatRef<'_, f64>, right: MatRef<'_, f64>| {
            let (lower, whole) = (BlockStructure::TriangularLower, BlockStructure::Rectangular);
            let sum = gram.as_mut();
            triangular::matmul(sum, lower, Accum::Add, left, whole, right, whole, 1.0, Par::Seq);
        };
        if wide {
            self.column_chunks(|_, w| add(w, w.transpose()))
        } else {
            self.row_chunks(|_, w| add(w.transpose(), w))
        }
        gram
    }

    /// `W M (rows, m)` of `M (cols, m)`.
    fn times(self, right: &Mat<f64>) -> Mat<f64> {
        let mut made = Mat::zeros(self.rows, right.ncols());
        self.row_chunks(|rows, w| {
            let made = made.as_mut().subrows_mut(rows.start, rows.len());
            matmul(made, Accum::Replace, w, right, 1.0, Par::Seq);
        });
        made
    }

    /// `Wᵀ M (cols, m)` of `M (rows, m)`.
    fn transposed_times(self, right: &Mat<f64>) -> Mat<f64> {
        let mut made = Mat::zeros(self.cols, right.ncols());
        self.row_chunks(|rows, w| {
            let right = right.as_ref().subrows(rows.start, rows.len());
            matmul(made.as_mut(), Accum::Add, w.transpose(), right, 1.0, Par::Seq);
        });
        made
    }

    /// W as `f64`, some rows at a time.
    fn row_chunks(self, mut each: impl FnMut(Range<usize>, MatRef<'_, f64>)) {
        let step = (CHUNK / self.cols.max(1)).max(1);
        let mut chunk = Vec::new();
        for start in (0..self.rows).step_by(step) {
            let rows = start..(start + step).min(self.rows);
            let values = &self.values[rows.start * self.cols..rows.end * self.cols];
            chunk.clear();
            chunk.extend(values.iter().map(|&value| f64::from(value)));
            each(rows.clone(), MatRef::from_row_major_slice(&chunk, rows.len(), self.cols));
        }
    }

    /// W as `f64`, some columns at a time.
    fn column_chunks(self, mut each: impl FnMut(Range<usize>, MatRef<'_, f64>)) {
        let step = (CHUNK / self.rows.max(1)).max(1);
        let mut chunk = Vec::new();
        for start in (0..self.cols).step_by(step) {
            let cols = start..(start + step).min(self.cols);
            chunk.clear();
            for row in self.values.chunks_exact(self.cols) {
                chunk.extend(row[cols.clone()].iter().map(|&value| f64::from(value)));
            }
            each(cols.clone(), MatRef::from_row_major_slice(&chunk, self.rows, cols.len()));
        }
    }
}

/// The leading triples of `B A`, of `B (rows, n)` and `A (n, cols)`, exact and without their product:
/// `B = Q R`, `Aᵀ = Q' R'`, and the small `R R'ᵀ (n, n)` is decomposed.
pub(crate) fn leading_of_product(
    b: &Mat<f64>,
    a: &Mat<f64>,
    r: usize,
) -> Result<Singular, NotConverged> {
    let (of_b, of_a) = (b.qr(), a.transpose().qr());
    let small = product(of_b.thin_R(), of_a.thin_R().transpose());
    let svd = small.thin_svd().map_err(|_| NotConverged)?;
    let k = r.min(svd.U().ncols());
    Ok(Singular {
        u: product(of_b.compute_thin_Q().as_ref(), svd.U().subcols(0, k)),
        s: (0..k).map(|i| svd.S()[i]).collect(),
        v: product(of_a.compute_thin_Q().as_ref(), svd.V().subcols(0, k)),
    })
}

fn product(left: MatRef<'_, f64>, right: MatRef<'_, f64>) -> Mat<f64> {
    let mut made = Mat::zeros(left.nrows(), right.ncols());
    matmul(made.as_mut(), Accum::Replace, left, right, 1.0, Par::Seq);
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random numbers whose singular values fall by `decay`.
    fn falling(rows: usize, cols: usize, decay: f64) -> Vec<f32> {
        let mut stream = Stream::new(1, "falling", &[rows as u64]);
        let n = rows.min(cols);
        let mut normal = |rows, cols| Mat::from_fn(rows, cols, |_, _| f64::from(stream.normal()));
        let (u, v) = (normal(rows, n).qr().compute_thin_Q(), normal(cols, n).qr().compute_thin_Q());
        let scaled = Mat::from_fn(rows, n, |row, col| u[(row, col)] * decay.powi(col as i32));
        let w = product(scaled.as_ref(), v.transpose());
        (0..rows * cols).map(|i| w[(i / cols, i % cols)] as f32).collect()
    }

    fn rebuilt(made: &Singular) -> Mat<f64> {
        let scaled =
            Mat::from_fn(made.u.nrows(), made.s.len(), |row, col| made.u[(row, col)] * made.s[col]);
        product(scaled.as_ref(), made.v.transpose())
    }

    /// Against faer's whole decomposition.
    fn check(made: &Singular, w: Dense<'_>, k: usize, tolerance: f64) {
        let whole = Mat::from_fn(w.rows, w.cols, |r, c| f64::from(w.values[r * w.cols + c]));
        let svd = whole.thin_svd().unwrap();
        assert_eq!(made.s.len(), k);
        for (i, s) in made.s.iter().enumerate() {
            assert!((s - svd.S()[i]).abs() < tolerance, "{i}: {s}, needed {}", svd.S()[i]);
        }
        let needed = Singular {
            u: svd.U().subcols(0, k).to_owned(),
            s: made.s.clone(),
            v: svd.V().subcols(0, k).to_owned(),
        };
        let apart = (rebuilt(made) - rebuilt(&needed)).norm_max();
        assert!(apart < tolerance, "{apart}");
    }

    #[test]
    fn leading_triples_match_full_svd() {
        for (rows, cols) in [(40, 24), (24, 40), (30, 30), (5, 1), (1, 7)] {
            let values = falling(rows, cols, 0.8);
            let w = Dense { values: &values, rows, cols };
            for r in [1, 4, 100] {
                let k = r.min(rows).min(cols);
                check(&w.leading(r).unwrap(), w, k, 1e-6);
                let mut stream = Stream::new(3, "start", &[]);
                check(&w.leading_randomized(r, 16, &mut stream).unwrap(), w, k, 1e-6);
            }
        }
        let zeros = Dense { values: &[0.0; 12], rows: 4, cols: 3 };
        let made = zeros.leading(2).unwrap();
        assert_eq!((made.s.as_slice(), rebuilt(&made).norm_max()), (&[0.0, 0.0][..], 0.0));
    }

    #[test]
    fn svd_of_product_matches_full_svd() {
        for (rows, cols, n) in [(20, 30, 5), (6, 30, 9), (4, 3, 8)] {
            let (b, a) = (falling(rows, n, 0.7), falling(n, cols, 0.9));
            let b = Mat::from_fn(rows, n, |row, k| f64::from(b[row * n + k]));
            let a = Mat::from_fn(n, cols, |k, col| f64::from(a[k * cols + col]));
            let dense = product(b.as_ref(), a.as_ref());
            let values: Vec<f32> =
                (0..rows * cols).map(|i| dense[(i / cols, i % cols)] as f32).collect();
            let k = 3.min(rows).min(cols);
            let made = leading_of_product(&b, &a, 3).unwrap();
            check(&made, Dense { values: &values, rows, cols }, k, 1e-6);
        }
    }

    #[test]
    fn leading_qr_matches_full_qr() {
        for (rows, cols, r) in [(12, 9, 4), (9, 12, 4), (3, 8, 5)] {
            let values = falling(rows, cols, 0.9);
            let w = Dense { values: &values, rows, cols };
            let (q, upper) = w.leading_qr(r);
            let whole = Mat::from_fn(rows, cols, |row, col| f64::from(values[row * cols + col]));
            let qr = whole.qr();
            let k = r.min(rows).min(cols);
            let all = qr.compute_thin_Q();
            let needed = product(all.as_ref().subcols(0, k), qr.thin_R().subrows(0, k));
            let apart = (product(q.as_ref(), upper.as_ref()) - needed).norm_max();
            assert!(apart < 1e-6, "{apart}");
            let below = (0..k).flat_map(|row| (0..row).map(move |col| (row, col)));
            assert!(
                below.into_iter().all(|at| upper[at].abs() < 1e-6),
                "R is not upper triangular"
            );
        }
    }
}
