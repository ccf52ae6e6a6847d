//! The optimizer: AdamW, gradient clipping and learning rate schedules. All state is `f32` in a fixed order,
//! so that it can be saved and steps are reproducible to the bit.

mod adamw;
mod schedule;
mod tensors;

use rayon::prelude::*;

pub use adamw::{AdamW, AdamWSettings};
pub use schedule::{Schedule, ScheduleKind};
pub use tensors::{TensorAdamW, tensor_norm};

use crate::isa::{Isa, multiversion};

/// Gradients, one vector per parameter, in the parameters' order.
pub type Gradients = Vec<Vec<f32>>;

/// Elements per task; sums are computed per chunk and added in order.
const CHUNK: usize = 1 << 14;

/// The Euclidean norm over all gradients, summed in f64; NaN or Inf if one of them is.
pub fn global_norm(gradients: &[Vec<f32>]) -> f64 {
    let isa = Isa::current();
    let squares = |g: &Vec<f32>| -> f64 {
        let chunks: Vec<f64> = g.par_chunks(CHUNK).map(|g| sum_of_squares(isa, g)).collect();
        chunks.iter().sum()
    };
    let sums: Vec<f64> = gradients.par_iter().map(squares).collect();
    sums.iter().sum::<f64>().sqrt()
}

/// The gradient clipping factor that reduces a norm to at most `max_norm`, as torch's
/// `clip_grad_norm_`.
pub fn clip_factor(norm: f64, max_norm: f64) -> f32 {
    (max_norm / (norm + 1e-6)).min(1.0) as f32
}

multiversion! {
    /// Summed per lane, so that it vectorizes.
    fn sum_of_squares(isa; values: &[f32]) -> f64 {
        let mut lanes = [0f64; 16];
        let (wide, rest) = values.as_chunks::<16>();
        for values in wide {
            for (lane, &value) in lanes.iter_mut().zip(values) {
                *lane += f64::from(value) * f64::from(value);
            }
        }
        let rest: f64 = rest.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
        lanes.iter().sum::<f64>() + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_only_reduces_the_norm() {
        let gradients = vec![vec![3.0, 0.0], vec![4.0]];
        let norm = global_norm(&gradients);
        assert_eq!(norm, 5.0);
        assert_eq!(clip_factor(norm, 10.0), 1.0);
        let clipped = f64::from(clip_factor(norm, 1.0)) * norm;
        assert!((clipped - 1.0).abs() < 1e-6, "{clipped}");
        assert!(!global_norm(&[vec![1.0, f32::NAN]]).is_finite());
    }

    #[test]
    fn the_norm_is_the_same_bits_on_any_number_of_threads() {
        let gradients: Vec<Vec<f32>> = [3 * CHUNK + 7, 10, CHUNK]
            .map(|n| (0..n).map(|i| (i as f32 * 0.61).cos()).collect())
            .into();
        let exact = gradients.iter().flatten().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| global_norm(&gradients))
        };
        assert_eq!(run(1).to_bits(), run(3).to_bits());
        assert!((run(1) - exact).abs() < 1e-9 * exact);
    }
}
