//! Adam with decoupled weight decay (Loshchilov and Hutter 2019), with torch's arithmetic.

use std::cell::{Cell, RefCell};

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Var};
use rayon::prelude::*;

use super::CHUNK;
use crate::isa::{Isa, multiversion};

/// The constants of AdamW, under transformers' names.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWSettings {
    /// Decay rate of the first moment.
    pub adam_beta1: f64,
    /// Decay rate of the second moment.
    pub adam_beta2: f64,
    /// Added to the denominator.
    pub adam_epsilon: f64,
    /// Weight decay coefficient, times the learning rate in each step.
    pub weight_decay: f64,
}

/// The optimizer state, with one vector per parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW {
    /// The hyperparameters.
    pub settings: AdamWSettings,
    /// Whether weight decay applies, per parameter.
    pub decays: Vec<bool>,
    /// Learning rate multiplier per parameter (LoRA+, Hayou et al. 2024).
    pub rates: Vec<f64>,
    /// Steps taken.
    pub step: u64,
    /// First moments.
    pub exp_avg: Vec<Vec<f32>>,
    /// Second moments.
    pub exp_avg_sq: Vec<Vec<f32>>,
}

impl AdamW {
    /// A new state for parameters of these lengths, all with weight decay.
    pub fn new(settings: AdamWSettings, lengths: &[usize]) -> Self {
        let zeros: Vec<Vec<f32>> = lengths.iter().map(|&n| vec![0.0; n]).collect();
        let (decays, rates) = (vec![true; lengths.len()], vec![1.0; lengths.len()]);
        Self { settings, decays, rates, step: 0, exp_avg: zeros.clone(), exp_avg_sq: zeros }
    }

    /// The same with a learning rate multiplier per parameter.
    ///
    /// # Panics
    /// If the number of rates differs from the number of parameters.
    pub fn with_rates(self, rates: Vec<f64>) -> Self {
        assert_eq!(rates.len(), self.exp_avg.len(), "one rate per parameter");
        Self { rates, ..self }
    }

    /// The same with weight decay only where `decays` is true, like a parameter group in torch with
    /// `weight_decay` 0.
    ///
    /// # Panics
    /// If the number of flags differs from the number of parameters.
    pub fn with_decays(self, decays: Vec<bool>) -> Self {
        assert_eq!(decays.len(), self.exp_avg.len(), "one flag per parameter");
        Self { decays, ..self }
    }

    /// One step in place: `p ← p (1 - lr · wd)`, then `p ← p - lr · m̂ / (sqrt(v̂) + ε)`, with the
    /// gradients times `factor` (of gradient clipping). Returns whether all parameters are finite after it.
    ///
    /// One pass over all values, with the same arithmetic on any number of threads. `parameters` are F32 on the
    /// CPU, in the order of the state.
    pub fn step(
        &mut self,
        parameters: &[Var],
        gradients: &[Vec<f32>],
        factor: f32,
        lr: f64,
    ) -> Result<bool> {
        self.step += 1;
        let (settings, step) = (&self.settings, self.step);
        let state = self.exp_avg.par_iter_mut().zip(&mut self.exp_avg_sq);
        let state = state.zip(self.decays.par_iter().zip(&self.rates));
        let all = parameters.par_iter().zip(gradients).zip(state);
        let finite = all.map(|((parameter, gradient), ((m, v), (&decays, &rate)))| {
            let update = AdamWUpdate {
                constants: Constants::of(settings, step, factor, lr * rate, decays),
                gradient,
                state: RefCell::new((m, v)),
                finite: Cell::new(true),
            };
            parameter.inplace_op1(&update)?;
            Ok(update.finite.get())
        });
        finite.try_reduce(|| true, |a, b| Ok(a && b))
    }
}

/// Constants of a step that are the same for all elements of a parameter.
#[derive(Clone, Copy)]
pub(super) struct Constants {
    pub factor: f32,
    pub decay: f32,
    pub step_size: f32,
    pub b1: f32,
    pub b2: f32,
    pub eps: f32,
    /// `sqrt(1 - β₂ᵗ)`.
    pub root: f32,
}

impl Constants {
    /// The constants of step `step`, counted from 1.
    pub(super) fn of(
        settings: &AdamWSettings,
        step: u64,
        factor: f32,
        lr: f64,
        decays: bool,
    ) -> Self {
        let AdamWSettings { adam_beta1: b1, adam_beta2: b2, adam_epsilon, weight_decay } =
            *settings;
        Self {
            factor,
            decay: if decays { (1.0 - lr * weight_decay) as f32 } else { 1.0 },
            step_size: (lr / (1.0 - b1.powf(step as f64))) as f32,
            b1: b1 as f32,
            b2: b2 as f32,
            eps: adam_epsilon as f32,
            root: (1.0 - b2.powf(step as f64)).sqrt() as f32,
        }
    }
}

/// The update of one parameter.
struct AdamWUpdate<'a> {
    constants: Constants,
    gradient: &'a [f32],
    /// Both moments.
    state: RefCell<(&'a mut [f32], &'a mut [f32])>,
    /// Set to whether the parameter is finite after the update.
    finite: Cell<bool>,
}

impl InplaceOp1 for AdamWUpdate<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("a parameter is not contiguous: strides {:?}", layout.stride())
        };
        let CpuStorage::F32(values) = storage else { candle_core::bail!("a parameter is not F32") };
        let values = &mut values[start..end];
        let (m, v) = &mut *self.state.borrow_mut();
        if [self.gradient.len(), m.len(), v.len()] != [values.len(); 3] {
            let (found, needed) = (self.gradient.len(), values.len());
            candle_core::bail!("a gradient of {found} values for a parameter of {needed}");
        }
        let (isa, constants) = (Isa::current(), self.constants);
        let state = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
        let chunks = values.par_chunks_mut(CHUNK).zip(self.gradient.par_chunks(CHUNK)).zip(state);
        let finite = chunks
            .map(|((values, gradient), (m, v))| update(isa, values, gradient, m, v, constants));
        self.finite.set(finite.reduce(|| true, |a, b| a & b));
        Ok(())
    }
}

multiversion! {
    /// Updates some elements, and returns whether they are finite after it.
    fn update(isa; p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], c: Constants) -> bool {
        let mut finite = true;
        for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * c.factor;
            *p *= c.decay;
            *m += (g - *m) * (1.0 - c.b1);
            *v = *v * c.b2 + (1.0 - c.b2) * g * g;
            *p -= c.step_size * (*m / (v.sqrt() / c.root + c.eps));
            finite &= p.is_finite();
        }
        finite
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn values(var: &Var) -> Vec<f32> {
        var.flatten_all().unwrap().to_vec1().unwrap()
    }

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
        let parameter = Var::new(&[1f32], &Device::Cpu).unwrap();
        let mut step = |gradient: f32| {
            let parameter = std::slice::from_ref(&parameter);
            assert!(adam.step(parameter, &[vec![2.0 * gradient]], 0.5, 0.1).unwrap());
            f64::from(values(&parameter[0])[0])
        };
        // 1 · 0.95 - 0.1 · 2 / |2|
        assert!((step(2.0) - 0.85).abs() < 1e-6);
        let (m, v) = (0.9 * 0.2 - 0.1, 0.999 * 0.004 + 0.001);
        let expected = 0.85 * 0.95 - 0.1 * (m / 0.19) / ((v / (1.0 - 0.999f64.powi(2))).sqrt());
        let found = step(-1.0);
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
    }

    #[test]
    fn without_decay_and_gradient_a_parameter_is_unchanged() {
        let settings = AdamWSettings {
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            weight_decay: 0.5,
        };
        let mut adam = AdamW::new(settings, &[1, 1]).with_decays(vec![true, false]);
        let parameters = [2f32, 2.0].map(|value| Var::new(&[value], &Device::Cpu).unwrap());
        assert!(adam.step(&parameters, &[vec![0.0], vec![0.0]], 1.0, 0.1).unwrap());
        assert_eq!(parameters.each_ref().map(values), [[1.9], [2.0]]);
    }

    /// Large and small parameters, steps on one thread and on three, with a NaN.
    #[test]
    fn threads_do_not_change_bits_and_nan_is_reported() {
        let settings = AdamWSettings {
            adam_beta1: 0.9,
            adam_beta2: 0.99,
            adam_epsilon: 1e-8,
            weight_decay: 0.01,
        };
        let lengths = [3 * CHUNK + 5, 1, 700];
        let run = |threads, last: f32| {
            let mut adam = AdamW::new(settings, &lengths);
            let wave = |n: usize| (0..n).map(|i| (i as f32 * 0.37).sin()).collect::<Vec<f32>>();
            let var = |&n: &usize| Var::from_vec(wave(n), n, &Device::Cpu).unwrap();
            let parameters: Vec<Var> = lengths.iter().map(var).collect();
            let mut gradients: Vec<Vec<f32>> = lengths.iter().map(|&n| wave(n)).collect();
            gradients[0][3 * CHUNK] = last;
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let step = || adam.step(&parameters, &gradients, 0.7, 1e-2).unwrap();
            let finite = pool.install(step);
            (finite, parameters.iter().flat_map(values).map(f32::to_bits).collect::<Vec<u32>>())
        };
        assert_eq!(run(1, 0.5), run(3, 0.5));
        assert!(run(3, 0.5).0 && !run(3, f32::NAN).0);
    }
}
