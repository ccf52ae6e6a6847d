//! Sums and products of buffers, value by value.

use rayon::prelude::*;

use crate::ops::par_for_each;

/// Values, or rows of an update, that a thread takes at a time.
pub(super) const CHUNK: usize = 1 << 14;

/// `a += by · b`.
pub(super) fn add(a: &mut [f32], b: &[f32], by: f32) {
    let chunks = a.chunks_mut(CHUNK).zip(b.chunks(CHUNK));
    par_for_each(chunks.collect(), b.len(), |(a, b)| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += by * b);
    });
}

/// `a *= b`.
pub(super) fn times(a: &mut [f32], b: &[f32]) {
    let chunks = a.par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK));
    chunks.for_each(|(a, b)| a.iter_mut().zip(b).for_each(|(a, b)| *a *= b));
}
