//! Derived settings of evaluation, schedule and optimizer.

use super::lists::{CommonSettings, OptimizerSettings};
use super::pretrain::PretrainSettings;
use super::values::EvalStrategy;
use crate::optim::{AdamWSettings, Schedule};

impl CommonSettings {
    /// When held-out rows are evaluated: by default after each epoch if there is held-out data.
    pub fn evaluation(&self) -> EvalStrategy {
        let default = if self.eval_data.as_os_str().is_empty() {
            EvalStrategy::No
        } else {
            EvalStrategy::Epoch
        };
        self.eval_strategy.unwrap_or(default)
    }

    /// Whether held-out rows are evaluated at all.
    pub fn evaluates(&self) -> bool {
        self.evaluation() != EvalStrategy::No
    }

    /// Steps of the run if every epoch has `steps_per_epoch`. A part of an epoch is rounded up to
    /// whole steps, as transformers does.
    pub fn total_steps(&self, steps_per_epoch: u64) -> u64 {
        if self.max_steps > 0 {
            return self.max_steps;
        }
        let whole = self.num_train_epochs.trunc() as u64;
        let part = self.num_train_epochs.fract();
        whole * steps_per_epoch + (part * steps_per_epoch as f64).ceil() as u64
    }

    /// The learning rates of a run of `total_steps`.
    pub fn schedule(&self, total_steps: u64) -> Schedule {
        self.optimizer.schedule(total_steps, total_steps.div_ceil(5), 0.0)
    }
}

impl PretrainSettings {
    /// The learning rates of a run of `total_steps`.
    pub fn schedule(&self, total_steps: u64) -> Schedule {
        let decay_steps = fraction_of(total_steps, self.decay_ratio);
        self.optimizer.schedule(total_steps, decay_steps, self.min_lr_ratio)
    }
}

impl OptimizerSettings {
    /// The constants of AdamW.
    pub fn adamw(&self) -> AdamWSettings {
        AdamWSettings {
            adam_beta1: self.adam_beta1,
            adam_beta2: self.adam_beta2,
            adam_epsilon: self.adam_epsilon,
            weight_decay: self.weight_decay,
        }
    }

    fn schedule(&self, total_steps: u64, decay_steps: u64, min_lr_ratio: f64) -> Schedule {
        Schedule {
            kind: self.lr_scheduler_type,
            learning_rate: self.learning_rate,
            warmup_steps: match self.warmup_steps {
                0 => fraction_of(total_steps, self.warmup_ratio),
                steps => steps,
            },
            total_steps,
            decay_steps,
            min_lr_ratio,
        }
    }
}

fn fraction_of(total_steps: u64, ratio: f64) -> u64 {
    (ratio * total_steps as f64).ceil() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_and_warmup_are_counted_as_transformers_counts_them() {
        let settings = |num_train_epochs, max_steps, warmup_steps| CommonSettings {
            num_train_epochs,
            max_steps,
            optimizer: OptimizerSettings { warmup_steps, warmup_ratio: 0.05, ..Default::default() },
            ..Default::default()
        };
        assert_eq!(settings(1.0, 0, 0).total_steps(11), 11);
        assert_eq!(settings(2.0, 0, 0).total_steps(11), 22);
        assert_eq!(settings(1.5, 0, 0).total_steps(11), 17);
        assert_eq!(settings(1.5, 7, 0).total_steps(11), 7);
        assert_eq!(settings(1.0, 0, 0).schedule(21).warmup_steps, 2);
        assert_eq!(settings(1.0, 0, 5).schedule(21).warmup_steps, 5);
    }
}
