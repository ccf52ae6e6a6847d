//! The portable form of the optimizer: AdamW in candle ops, with its state on the device of the parameters. It
//! defines the answer on every device, and a test compares the CPU form with it.

use candle_core::{D, Device, Result, Tensor, Var};

use super::adamw::{AdamW, AdamWSettings, Constants};

/// [`AdamW`] on a device.
#[derive(Debug)]
pub struct TensorAdamW {
    settings: AdamWSettings,
    decays: Vec<bool>,
    rates: Vec<f64>,
    /// Steps taken.
    pub step: u64,
    /// Moments with the shapes of the parameters, F32.
    exp_avg: Vec<Tensor>,
    exp_avg_sq: Vec<Tensor>,
}

impl TensorAdamW {
    /// Moves a state to the device of its parameters.
    ///
    /// # Errors
    /// If the sizes of state and parameters differ, or the device has too little memory.
    pub fn of(state: AdamW, parameters: &[Var]) -> Result<Self> {
        let AdamW { settings, decays, rates, step, exp_avg, exp_avg_sq } = state;
        let brought = |moments: Vec<Vec<f32>>| -> Result<Vec<Tensor>> {
            let both = moments.into_iter().zip(parameters);
            both.map(|(moment, var)| Tensor::from_vec(moment, var.shape(), var.device())).collect()
        };
        let (exp_avg, exp_avg_sq) = (brought(exp_avg)?, brought(exp_avg_sq)?);
        Ok(Self { settings, decays, rates, step, exp_avg, exp_avg_sq })
    }

    /// A copy of the state on the CPU.
    pub(crate) fn on_cpu(&self) -> Result<AdamW> {
        let Self { settings, step, .. } = *self;
        let (decays, rates) = (self.decays.clone(), self.rates.clone());
        let brought = |moments: &[Tensor]| -> Result<Vec<Vec<f32>>> {
            moments.iter().map(|moment| moment.flatten_all()?.to_vec1()).collect()
        };
        let (exp_avg, exp_avg_sq) = (brought(&self.exp_avg)?, brought(&self.exp_avg_sq)?);
        Ok(AdamW { settings, decays, rates, step, exp_avg, exp_avg_sq })
    }

    /// [`AdamW::step`]: the same arithmetic.
    pub(crate) fn step(
        &mut self,
        parameters: &[Var],
        gradients: &[Tensor],
        factor: f32,
        lr: f64,
    ) -> Result<bool> {
        self.step += 1;
        let state = self.exp_avg.iter_mut().zip(&mut self.exp_avg_sq);
        let state = state.zip(self.decays.iter().zip(&self.rates));
        let mut non_finite = Vec::new();
        for ((parameter, gradient), ((m, v), (&decays, &rate))) in
            parameters.iter().zip(gradients).zip(state)
        {
            let c = Constants::of(&self.settings, self.step, factor, lr * rate, decays);
            let of = f64::from;
            let g = (gradient.detach() * of(c.factor))?;
            *m = (&*m + ((&g - &*m)? * of(1.0 - c.b1))?)?;
            *v = ((&*v * of(c.b2))? + (g.sqr()? * of(1.0 - c.b2))?)?;
            let root = ((v.sqrt()? / of(c.root))? + of(c.eps))?;
            let p = (parameter.as_detached_tensor() * of(c.decay))?;
            let p = (p - ((&*m / root)? * of(c.step_size))?)?;
            parameter.set(&p)?;
            non_finite.push(sum(&(p * 0.0)?)?); // 0, or NaN
        }
        Ok(sums(&non_finite)?.iter().all(|sum| *sum == 0.0))
    }
}

/// The Euclidean norm over all gradients; NaN or Inf if one of them is.
pub(crate) fn tensor_norm(gradients: &[Tensor]) -> Result<f64> {
    let squares = gradients.iter().map(|gradient| sum(&gradient.sqr()?));
    let squares = sums(&squares.collect::<Result<Vec<_>>>()?)?;
    Ok(squares.iter().map(|&sum| f64::from(sum)).sum::<f64>().sqrt())
}

/// Sums by rows first, which reduces the rounding error of long F32 sums.
fn sum(x: &Tensor) -> Result<Tensor> {
    x.sum(D::Minus1)?.sum_all()
}

/// Copies scalars to the CPU together.
fn sums(numbers: &[Tensor]) -> Result<Vec<f32>> {
    match numbers.is_empty() {
        true => Ok(Vec::new()),
        false => Tensor::stack(numbers, 0)?.to_device(&Device::Cpu)?.to_vec1(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::global_norm;
    use super::*;

    fn wave(shape: &[usize], by: f32) -> Vec<f32> {
        (0..shape.iter().product()).map(|i: usize| (i as f32 * by).sin()).collect()
    }

    /// Steps of both forms with rates, decays and clipping, the second half from a saved state.
    #[test]
    fn cpu_matches_reference() {
        let settings = AdamWSettings {
            adam_beta1: 0.9,
            adam_beta2: 0.95,
            adam_epsilon: 1e-8,
            weight_decay: 0.1,
        };
        let shapes: [&[usize]; 3] = [&[70, 30], &[1], &[33]];
        let var = |shape: &&[usize]| Var::from_vec(wave(shape, 0.3), *shape, &Device::Cpu).unwrap();
        let [fast, portable]: [Vec<Var>; 2] = [(); 2].map(|()| shapes.iter().map(var).collect());
        let lengths = shapes.map(|shape| shape.iter().product());
        let state = AdamW::new(settings, &lengths).with_decays(vec![true, false, false]);
        let mut adam = state.with_rates(vec![1.0, 4.0, 0.5]);
        let mut ours = TensorAdamW::of(adam.clone(), &portable).unwrap();
        for step in 0..6 {
            let gradients: Vec<Vec<f32>> =
                shapes.iter().map(|shape| wave(shape, 0.7 + 0.1 * step as f32)).collect();
            let both = gradients.iter().zip(shapes);
            let tensors: Vec<Tensor> = both
                .map(|(values, shape)| Tensor::from_slice(values, shape, &Device::Cpu).unwrap())
                .collect();
            let (norm, exact) = (tensor_norm(&tensors).unwrap(), global_norm(&gradients));
            assert!((norm - exact).abs() < 1e-6 * exact, "{norm} {exact}");
            assert!(adam.step(&fast, &gradients, 0.3, 1e-2).unwrap());
            assert!(ours.step(&portable, &tensors, 0.3, 1e-2).unwrap());
            if step == 2 {
                ours = TensorAdamW::of(ours.on_cpu().unwrap(), &portable).unwrap();
            }
        }
        let saved = ours.on_cpu().unwrap();
        assert_eq!((saved.step, &saved.decays, &saved.rates), (6, &adam.decays, &adam.rates));
        let values = |vars: &[Var]| -> Vec<Vec<f32>> {
            vars.iter().map(|var| var.flatten_all().unwrap().to_vec1().unwrap()).collect()
        };
        for (what, found, needed) in [
            ("parameters", values(&portable), values(&fast)),
            ("exp_avg", saved.exp_avg, adam.exp_avg),
            ("exp_avg_sq", saved.exp_avg_sq, adam.exp_avg_sq),
        ] {
            for (found, needed) in found.iter().flatten().zip(needed.iter().flatten()) {
                let error = (found - needed).abs();
                assert!(error <= 2e-6 * needed.abs().max(0.1), "{what}: {found}, {needed}");
            }
        }
    }

    #[test]
    fn nan_is_reported() {
        let settings = AdamWSettings {
            adam_beta1: 0.9,
            adam_beta2: 0.99,
            adam_epsilon: 1e-8,
            weight_decay: 0.0,
        };
        for (gradient, finite) in [(1.0, true), (f32::NAN, false), (f32::INFINITY, false)] {
            let parameters = [Var::new(&[2f32, 1.0], &Device::Cpu).unwrap()];
            let state = AdamW::new(settings, &[2]);
            let mut adam = TensorAdamW::of(state, &parameters).unwrap();
            let gradients = [Tensor::new(&[0.5, gradient], &Device::Cpu).unwrap()];
            assert_eq!(tensor_norm(&gradients).unwrap().is_finite(), finite, "{gradient}");
            let step = adam.step(&parameters, &gradients, 1.0, 0.1).unwrap();
            assert_eq!(step, finite, "{gradient}");
        }
    }
}
