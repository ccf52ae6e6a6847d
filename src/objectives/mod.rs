//! Losses: pure functions of what the head reads. They return a sum over what they count, never
//! a mean, so that the caller can divide by the count of a whole step and any split of the step
//! into micro-batches gives the same gradient.

pub mod advantage;
pub mod policy;
pub mod preference;
pub mod reward;

use candle_core::{Result, Tensor};

/// What is minimized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Objective {
    /// The negative log-likelihood of the learned tokens.
    LanguageModelling,
}

impl Objective {
    /// The loss summed over the counted tokens: a scalar, differentiable in `logps`.
    ///
    /// `logps (M)` F32 are the log-probabilities of the M learned tokens, in nats.
    pub fn sum(self, logps: &Tensor) -> Result<Tensor> {
        match self {
            Self::LanguageModelling => logps.sum_all()?.neg(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn language_modelling_is_the_sum_of_surprise() {
        let logps = Var::new(&[-1.0f32, -2.5], &Device::Cpu).unwrap();
        let loss = Objective::LanguageModelling.sum(&logps).unwrap();
        assert_eq!(loss.to_scalar::<f32>().unwrap(), 3.5);
        let grads = loss.backward().unwrap();
        assert_eq!(grads.get(&logps).unwrap().to_vec1::<f32>().unwrap(), [-1.0, -1.0]);
    }
}
