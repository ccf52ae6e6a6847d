//! Sums of squared inputs of the linear layers: the importance matrix.

use std::collections::BTreeMap;
use std::sync::Mutex;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::ops::Values;

/// Sums of the squares of each linear layer's inputs, by the layer's module path.
#[derive(Debug, Default)]
pub struct InputSquares(Mutex<BTreeMap<String, (Vec<f64>, usize)>>);

impl InputSquares {
    /// The mean square of each input.
    pub fn means(&self) -> BTreeMap<String, Vec<f32>> {
        let sums = self.0.lock().expect("no thread has panicked");
        let mean = |(sums, rows): &(Vec<f64>, usize)| {
            sums.iter().map(|sum| (sum / *rows as f64) as f32).collect()
        };
        sums.iter().map(|(name, of)| (name.clone(), mean(of))).collect()
    }

    /// Adds `x (N, in)`.
    pub(super) fn add(&self, name: &str, x: &Tensor) -> Result<()> {
        let (rows, width) = x.dims2()?;
        let x = Values::of(x)?;
        let x: &[f32] = &x;
        let mut all = self.0.lock().expect("no thread has panicked");
        let (sums, seen) = all.entry(name.into()).or_insert_with(|| (vec![0.0; width], 0));
        *seen += rows;
        // By columns, so that each sum goes through the rows in order.
        const COLUMNS: usize = 64;
        sums.par_chunks_mut(COLUMNS).enumerate().for_each(|(chunk, sums)| {
            for row in x.chunks_exact(width) {
                let values = &row[chunk * COLUMNS..];
                sums.iter_mut().zip(values).for_each(|(sum, v)| *sum += f64::from(*v).powi(2));
            }
        });
        Ok(())
    }
}
