//! From gradients to steps: clipping, schedules, AdamW. All state is plain `f32` in a fixed order,
//! so that it can be saved and a step repeats to the bit.

mod adamw;
mod schedule;

pub use adamw::{AdamW, AdamWSettings};
pub use schedule::{Schedule, ScheduleKind};

/// Gradients, one vector per parameter, in the parameters' order.
pub type Gradients = Vec<Vec<f32>>;

/// The Euclidean norm over all gradients, summed in f64.
pub fn global_norm(gradients: &Gradients) -> f64 {
    let squares = |g: &Vec<f32>| g.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>();
    gradients.iter().map(squares).sum::<f64>().sqrt()
}

/// Scales all gradients so that their norm is at most `max_norm`, as torch's `clip_grad_norm_`.
pub fn clip(gradients: &mut Gradients, norm: f64, max_norm: f64) {
    let scale = max_norm / (norm + 1e-6);
    if scale < 1.0 {
        for gradient in gradients {
            for value in gradient {
                *value *= scale as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_keeps_the_direction() {
        let mut gradients = vec![vec![3.0, 0.0], vec![4.0]];
        let norm = global_norm(&gradients);
        assert_eq!(norm, 5.0);
        clip(&mut gradients, norm, 10.0);
        assert_eq!(gradients, [vec![3.0, 0.0], vec![4.0]]);
        clip(&mut gradients, norm, 1.0);
        assert!((global_norm(&gradients) - 1.0).abs() < 1e-6);
        assert!((gradients[0][0] / gradients[1][0] - 0.75).abs() < 1e-6);
    }
}
