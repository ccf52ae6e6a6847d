//! Combining several adapters into one: flags shared by `merge` and `export`.

use std::sync::Arc;

use anyhow::Result;
use quantune_adapters::combine::{
    Combination, CombinationType, CombineError, DareMasks, MajoritySign, combine,
};

use super::UsageError;
use crate::model::ActiveAdapter;

/// Flags for combining adapters. Names are PEFT's.
#[derive(Debug, clap::Args)]
pub(super) struct Combining {
    /// Combine all adapters into one: linear, cat, svd, ties, ties_svd, dare_linear, dare_linear_svd,
    /// dare_ties, dare_ties_svd, magnitude_prune or magnitude_prune_svd
    #[arg(long, value_name = "METHOD")]
    pub combination_type: Option<CombinationType>,
    /// Density: fraction of values that ties, dare and magnitude_prune keep
    #[arg(long, requires = "combination_type")]
    density: Option<f64>,
    /// Sign election of ties: sign of the sum (total) or of the majority (frequency) [default: total]
    #[arg(long, value_name = "HOW", requires = "combination_type")]
    majority_sign_method: Option<MajoritySign>,
    /// Rank of the result of the svd methods [default: the largest rank of the adapters]
    #[arg(long, value_name = "R", requires = "combination_type")]
    svd_rank: Option<usize>,
    /// Seed of the values that dare drops [default: 42]
    #[arg(long, requires = "combination_type")]
    seed: Option<u64>,
}

impl Combining {
    /// The adapters, or the one they are combined into.
    pub(super) fn combine(&self, active: Vec<ActiveAdapter>) -> Result<Vec<ActiveAdapter>> {
        let Some(method) = self.combination_type else { return Ok(active) };
        if self.seed.is_some() && !method.is_random() {
            let name = method.name();
            return Err(
                UsageError(format!("--seed only applies to the dare methods, got {name}")).into()
            );
        }
        let how = Combination {
            method,
            density: self.density,
            majority_sign_method: self.majority_sign_method,
            svd_rank: self.svd_rank,
            masks: DareMasks::Seed(self.seed.unwrap_or(42)),
        };
        let adapters: Vec<_> = active.iter().map(|one| (&*one.adapter, one.weight)).collect();
        match combine("combined", &adapters, &how) {
            Ok(adapter) => Ok(vec![ActiveAdapter::frozen(Arc::new(adapter))]),
            Err(CombineError::Settings(fault)) => Err(UsageError(fault).into()),
            Err(error) => Err(error.into()),
        }
    }
}
