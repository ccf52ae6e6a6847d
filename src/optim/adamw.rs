//! Adam with decoupled weight decay (Loshchilov and Hutter 2019), with torch's arithmetic.

use rayon::prelude::*;

use super::Gradients;

/// The constants of AdamW, under transformers' names.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWSettings {
    /// Decay of the mean of gradients.
    pub adam_beta1: f64,
    /// Decay of the mean of squared gradients.
    pub adam_beta2: f64,
    /// Added to the root of the mean square.
    pub adam_epsilon: f64,
    /// Fraction of `learning_rate · parameter` taken off each step.
    pub weight_decay: f64,
}

/// The optimizer's state, as many vectors as parameters.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW {
    /// Its constants.
    pub settings: AdamWSettings,
    /// Steps taken.
    pub step: u64,
    /// Mean of gradients.
    pub exp_avg: Vec<Vec<f32>>,
    /// Mean of squared gradients.
    pub exp_avg_sq: Vec<Vec<f32>>,
}

impl AdamW {
    /// A fresh state for parameters of these lengths.
    pub fn new(settings: AdamWSettings, lengths: &[usize]) -> Self {
        let zeros: Vec<Vec<f32>> = lengths.iter().map(|&n| vec![0.0; n]).collect();
        Self { settings, step: 0, exp_avg: zeros.clone(), exp_avg_sq: zeros }
    }

    /// One step: `p ← p (1 - lr · wd)`, then `p ← p - lr · m̂ / (sqrt(v̂) + ε)`.
    pub fn step(&mut self, parameters: &mut [Vec<f32>], gradients: &Gradients, lr: f64) {
        self.step += 1;
        let AdamWSettings { adam_beta1: b1, adam_beta2: b2, adam_epsilon, weight_decay } =
            self.settings;
        let correction1 = 1.0 - b1.powf(self.step as f64);
        let correction2 = (1.0 - b2.powf(self.step as f64)).sqrt();
        let decay = (1.0 - lr * weight_decay) as f32;
        let step_size = (lr / correction1) as f32;
        let (b1, b2, eps, root) = (b1 as f32, b2 as f32, adam_epsilon as f32, correction2 as f32);
        let state = self.exp_avg.par_iter_mut().zip(self.exp_avg_sq.par_iter_mut());
        parameters.par_iter_mut().zip(gradients.par_iter()).zip(state).for_each(
            |((parameters, gradients), (m, v))| {
                let state = m.iter_mut().zip(v);
                for ((p, &g), (m, v)) in parameters.iter_mut().zip(gradients).zip(state) {
                    *p *= decay;
                    *m += (g - *m) * (1.0 - b1);
                    *v = *v * b2 + (1.0 - b2) * g * g;
                    *p -= step_size * (*m / (v.sqrt() / root + eps));
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two steps by hand, as torch.optim.AdamW(lr=0.1, weight_decay=0.5) takes them.
    #[test]
    fn two_steps_by_hand() {
        let settings = AdamWSettings {
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            weight_decay: 0.5,
        };
        let mut adam = AdamW::new(settings, &[1]);
        let mut p = vec![vec![1.0f32]];
        adam.step(&mut p, &vec![vec![2.0]], 0.1);
        // 1 · 0.95 - 0.1 · 2 / |2|
        assert!((p[0][0] - 0.85).abs() < 1e-6);
        adam.step(&mut p, &vec![vec![-1.0]], 0.1);
        let (m, v) = (0.9 * 0.2 - 0.1, 0.999 * 0.004 + 0.001);
        let expected = 0.85 * 0.95 - 0.1 * (m / 0.19) / ((v / (1.0 - 0.999f64.powi(2))).sqrt());
        assert!((f64::from(p[0][0]) - expected).abs() < 1e-6, "{} {expected}", p[0][0]);
    }
}
