//! The best evaluation of a run, and early stopping.

use super::TrainError;
use super::metrics::Numbers;
use super::state::{BestEvaluation, State};

/// How evaluations are compared.
#[derive(Debug, Clone, PartialEq)]
pub struct BestSettings {
    /// Name of the metric.
    pub metric: String,
    /// Whether higher is better.
    pub greater: bool,
    /// Minimum improvement that counts.
    pub threshold: f64,
    /// Early stopping patience: evaluations without improvement; 0 is off.
    pub patience: u64,
}

impl BestSettings {
    /// Compares the evaluation after the steps of `state` with the best so far.
    ///
    /// # Errors
    /// If the evaluation has no metric of that name.
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

    /// Whether the patience of early stopping is exhausted.
    pub fn should_stop_early(&self, state: &State) -> bool {
        let evals = state.best.as_ref().map_or(0, |best| best.evals_since_best);
        self.patience > 0 && evals >= self.patience
    }
}
