//! Several adapters made into one, by flags that `merge` and `export` share.

use std::sync::Arc;

use anyhow::Result;
use quantune_adapters::combine::{
    Combination, CombinationType, CombineError, DareMasks, MajoritySign, combine,
};

use super::Usage;
use crate::model::ActiveAdapter;

/// How several adapters become one before anything else; names are PEFT's.
#[derive(Debug, clap::Args)]
pub struct Combining {
    /// Make one adapter of all: linear, cat, svd, ties, ties_svd, dare_linear, dare_linear_svd,
    /// dare_ties, dare_ties_svd, magnitude_prune or magnitude_prune_svd
    #[arg(long, value_name = "METHOD")]
    pub combination_type: Option<CombinationType>,
    /// The share of numbers that ties, dare and magnitude_prune keep
    #[arg(long, requires = "combination_type")]
    density: Option<f64>,
    /// Whose sign ties elects: that of the sum (total) or of most (frequency) [default: total]
    #[arg(long, value_name = "HOW", requires = "combination_type")]
    majority_sign_method: Option<MajoritySign>,
    /// Rank of what the svd kinds make [default: the largest there is]
    #[arg(long, value_name = "R", requires = "combination_type")]
    svd_rank: Option<usize>,
    /// Which numbers dare drops [default: 42]
    #[arg(long, requires = "combination_type")]
    seed: Option<u64>,
}

impl Combining {
    /// The adapters as they are, or the one made of them.
    pub fn combine(&self, active: Vec<ActiveAdapter>) -> Result<Vec<ActiveAdapter>> {
        let Some(method) = self.combination_type else { return Ok(active) };
        if self.seed.is_some() && !method.is_random() {
            let name = method.name();
            return Err(Usage(format!("--seed is for the dare kinds, found {name}")).into());
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
            Err(CombineError::Settings(fault)) => Err(Usage(fault).into()),
            Err(error) => Err(error.into()),
        }
    }
}
