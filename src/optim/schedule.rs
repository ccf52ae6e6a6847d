//! Learning rate schedules, equal to those of transformers' `get_scheduler`.

use crate::string_enum::string_enum;

string_enum! {
    /// The schedule after the warm-up.
    #[derive(Debug)]
    pub enum ScheduleKind {
        /// Constant, without warm-up.
        Constant = "constant",
        /// Constant after the warm-up.
        ConstantWithWarmup = "constant_with_warmup",
        /// Linear decay.
        Linear = "linear",
        /// Cosine decay.
        Cosine = "cosine",
        /// Constant after the warm-up, then linear decay (Hu et al. 2024).
        WarmupStableDecay = "warmup_stable_decay",
    }
}

/// The learning rate of each step of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The kind of schedule.
    pub kind: ScheduleKind,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Warm-up steps from 0 to the highest learning rate.
    pub warmup_steps: u64,
    /// Steps of the run.
    pub total_steps: u64,
    /// Decay steps of [`ScheduleKind::WarmupStableDecay`].
    pub decay_steps: u64,
    /// Final learning rate, as a fraction of the highest.
    pub min_lr_ratio: f64,
}

impl Schedule {
    /// The learning rate of a step, counted from 0; with a warm-up, that of step 0 is 0.
    pub fn at(&self, step: u64) -> f64 {
        let (step, warmup, total) =
            (step as f64, self.warmup_steps as f64, self.total_steps as f64);
        if self.kind != ScheduleKind::Constant && step < warmup {
            return self.learning_rate * step / warmup.max(1.0);
        }
        let falling = match self.kind {
            ScheduleKind::WarmupStableDecay => (self.decay_steps as f64).min(total - warmup),
            _ => total - warmup,
        };
        let progress = 1.0 - ((total - step) / falling.max(1.0)).clamp(0.0, 1.0);
        let part = match self.kind {
            ScheduleKind::Constant | ScheduleKind::ConstantWithWarmup => 1.0,
            ScheduleKind::Linear | ScheduleKind::WarmupStableDecay => 1.0 - progress,
            ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.learning_rate * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_are_transformers() {
        let schedule = |kind| Schedule {
            kind,
            learning_rate: 2.0,
            warmup_steps: 2,
            total_steps: 10,
            decay_steps: 4,
            min_lr_ratio: 0.0,
        };
        let at = |kind, step| schedule(kind).at(step);
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        close(at(ScheduleKind::Constant, 0), 2.0);
        close(at(ScheduleKind::ConstantWithWarmup, 0), 0.0);
        close(at(ScheduleKind::ConstantWithWarmup, 9), 2.0);
        for kind in [ScheduleKind::Linear, ScheduleKind::Cosine] {
            close(at(kind, 0), 0.0);
            close(at(kind, 1), 1.0);
            close(at(kind, 2), 2.0);
            close(at(kind, 6), 1.0);
            close(at(kind, 10), 0.0);
        }
        close(at(ScheduleKind::Linear, 9), 0.25);
        close(at(ScheduleKind::Cosine, 4), 1.0 + std::f64::consts::FRAC_1_SQRT_2);
        for (step, needed) in [(1, 1.0), (2, 2.0), (6, 2.0), (7, 1.5), (9, 0.5), (10, 0.0)] {
            close(at(ScheduleKind::WarmupStableDecay, step), needed);
        }
        let ending = Schedule { min_lr_ratio: 0.1, ..schedule(ScheduleKind::Cosine) };
        close(ending.at(10), 0.2);
        close(ending.at(6), 1.1);
    }
}
