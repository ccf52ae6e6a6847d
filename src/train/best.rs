//! The best evaluation of a run, and early stopping.

use super::TrainError;
use super::metrics::Numbers;
use super::state::{BestEvaluation, State};

/// How evaluations are compared.
#[derive(Debug, Clone, PartialEq)]
pub struct BestSettings {
    /// The number that is compared, as the evaluation calls it.
    pub metric: String,
    /// Whether more of it is better.
    pub greater: bool,
    /// By how much it must be better.
    pub threshold: f64,
    /// Evaluations without a better one that end the run; 0 never does.
    pub patience: u64,
}

impl BestSettings {
    /// Compares the evaluation after the steps of `state` with the best so far.
    ///
    /// # Errors
    /// If the evaluation has no number of that name.
    pub fn compare(&self, state: &mut State, numbers: &Numbers) -> Result<(), TrainError> {
        let found = numbers.iter().find(|(key, _)| *key == self.metric);
        let Some(value) = found.and_then(|(_, value)| value.as_f64()) else {
            let known = numbers.iter().filter(|(_, value)| value.is_number());
            let known: Vec<&str> = known.map(|(key, _)| &key[..]).collect();
            return Err(TrainError::Settings(format!(
                "metric_for_best_model is {:?}, needed one of {}",
                self.metric,
                known.join(", ")
            )));
        };
        let better = state.best.as_ref().is_none_or(|best| {
            let gain = if self.greater { value - best.value } else { best.value - value };
            gain > self.threshold
        });
        match &mut state.best {
            Some(best) if !better => best.evals_since_best += 1,
            best => *best = Some(BestEvaluation { step: state.step, value, evals_since_best: 0 }),
        }
        Ok(())
    }

    /// Whether so many evaluations were no better that the run ends.
    pub fn should_stop_early(&self, state: &State) -> bool {
        let evals = state.best.as_ref().map_or(0, |best| best.evals_since_best);
        self.patience > 0 && evals >= self.patience
    }
}
