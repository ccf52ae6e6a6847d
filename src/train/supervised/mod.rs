//! Training on the rows of a file: language modelling, reward models, preferences. The rows of a step follow
//! from the seed and the epoch; each task has its objective in a file.

mod comparisons;
mod epoch_rows;
mod language_modeling;
mod preference;
mod reward;

use serde_json::{Map, Value, json};

pub use comparisons::response_log_probs;
pub use epoch_rows::EpochLayout;
pub use language_modeling::LanguageModeling;
pub use preference::{PolicyAndReference, PreferenceTraining, preference_batch, step_constants};
pub use reward::{RewardEvaluation, RewardTraining, evaluate_rewards, reward_batch};

use super::TrainError;
use super::learner::{AdapterLearner, MicroBatch};
use super::log::Log;
use super::metrics::{Numbers, stats_numbers};
use super::progress::{Progress, Work};
use super::rows::RowLoader;
use super::run_dir::{Fingerprint, RunDir};
use super::settings::{DpoSettings, RewardSettings, SftSettings};
use super::state::State;
use crate::model::{ActiveAdapter, Decoder};
use crate::monitor::Monitor;
use epoch_rows::{PlannedRows, StepBatches};

/// Training on the rows of a file, by task.
pub enum Supervised {
    /// The log-likelihood of learned tokens.
    LanguageModeling(LanguageModeling),
    /// Scores of compared responses.
    Reward(RewardTraining),
    /// Log-probs of compared or labelled responses.
    Preference(Box<PreferenceTraining>),
}

impl Supervised {
    /// Loads rows of tokens to learn.
    pub fn language_modeling(loader: &RowLoader, own: &SftSettings) -> Result<Self, TrainError> {
        LanguageModeling::load(loader, own).map(Self::LanguageModeling)
    }

    /// Loads responses to score.
    pub fn reward(loader: &RowLoader, own: &RewardSettings) -> Result<Self, TrainError> {
        RewardTraining::load(loader, own).map(Self::Reward)
    }

    /// Loads responses to compare, for a policy on top of `frozen`.
    pub fn preference(
        loader: &RowLoader,
        own: &DpoSettings,
        frozen: &[ActiveAdapter],
    ) -> Result<Self, TrainError> {
        let training = PreferenceTraining::load(loader, own, frozen)?;
        Ok(Self::Preference(training.into()))
    }

    fn rows(&self) -> &dyn PlannedRows {
        match self {
            Self::LanguageModeling(task) => &task.rows,
            Self::Reward(task) => &task.rows,
            Self::Preference(task) => &task.rows,
        }
    }

    fn rows_mut(&mut self) -> &mut dyn PlannedRows {
        match self {
            Self::LanguageModeling(task) => &mut task.rows,
            Self::Reward(task) => &mut task.rows,
            Self::Preference(task) => &mut task.rows,
        }
    }

    /// Hashes of the inputs.
    pub fn fingerprints(&self) -> Result<Vec<Fingerprint>, TrainError> {
        let mut prints = self.rows().fingerprints();
        if let Self::Preference(task) = self {
            prints.extend(task.reference_fingerprint()?);
        }
        Ok(prints)
    }

    /// Prepares the run for the step after `state`: writes the held-out split, and computes the log-probs of
    /// all rows under the reference, or reads them if they were computed before.
    pub fn begin(
        &mut self,
        decoder: &Decoder,
        run: &RunDir,
        state: &State,
        monitor: Monitor<'_>,
    ) -> Result<(), TrainError> {
        self.rows().write_held_out(run)?;
        self.rows_mut().set_epoch(state.epoch);
        if let Self::Preference(task) = self {
            task.compute_reference(decoder, run, monitor)?;
        }
        Ok(())
    }

    /// Prepares for the first `steps` steps of a dry run, which writes no files. Returns the fraction of the
    /// reference's work that this was: 0 where there is no reference.
    pub fn begin_trial(
        &mut self,
        decoder: &Decoder,
        steps: usize,
        monitor: Monitor<'_>,
    ) -> Result<f64, TrainError> {
        match self {
            Self::Preference(task) => task.compute_reference_of_steps(decoder, steps, monitor),
            Self::LanguageModeling(_) | Self::Reward(_) => Ok(0.0),
        }
    }

    /// Steps of the run.
    pub fn total_steps(&self) -> u64 {
        self.rows().total_steps()
    }

    /// Upper bound of the tokens of a micro-batch.
    pub fn largest_micro_batch(&self) -> usize {
        self.rows().largest_micro_batch()
    }

    /// Whether the objective needs logits; a reward model has a score head instead.
    pub fn reads_logits(&self) -> bool {
        !matches!(self, Self::Reward(_))
    }

    /// Bytes of the rows, including held-out ones: in memory, and mapped ones that the run reads.
    pub fn data_bytes(&self) -> [usize; 2] {
        self.rows().bytes()
    }

    /// Bytes of the log-probs of all rows under the reference.
    pub fn reference_bytes(&self) -> usize {
        match self {
            Self::Preference(task) => task.reference_bytes(),
            Self::LanguageModeling(_) | Self::Reward(_) => 0,
        }
    }

    /// Steps and tokens of the first epoch.
    pub fn epoch(&self) -> (u64, u64) {
        (self.rows().steps_of_epoch(), self.rows().tokens_of_epoch())
    }

    /// Whether the last step ended an epoch.
    pub fn epoch_ends(&self, state: &State) -> bool {
        state.step_in_epoch == self.rows().steps_of_epoch()
    }

    /// Takes a step.
    pub fn step(
        &mut self,
        learner: &mut AdapterLearner,
        state: &mut State,
        learning_rate: f64,
    ) -> Result<(Numbers, Work), TrainError> {
        if self.epoch_ends(state) {
            state.epoch += 1;
            state.step_in_epoch = 0;
        }
        self.rows_mut().set_epoch(state.epoch);
        let bins = self.rows().bins_of_step(state.step_in_epoch);
        let StepBatches { batches, count } = match self {
            Self::LanguageModeling(task) => task.step_batches(&bins),
            Self::Reward(task) => task.step_batches(&bins),
            Self::Preference(task) => task.step_batches(&bins, learner)?,
        };
        let part = |(batch, objective)| MicroBatch {
            batch,
            objective,
            scale: 1.0 / count,
            adapter: 0,
            epoch: state.epoch,
            temperature: 1.0,
        };
        let parts: Vec<MicroBatch> = batches.into_iter().map(part).collect();
        let stepped = learner.step(&parts, learning_rate)?;
        state.step_in_epoch += 1;

        let tokens = parts.iter().map(|part| part.batch.tokens.len()).sum::<usize>() as u64;
        let counted_tokens = match self {
            Self::LanguageModeling(_) => count as u64,
            Self::Reward(_) | Self::Preference(_) => tokens,
        };
        let mut numbers: Numbers = vec![
            ("loss".into(), json!(stepped.loss)),
            ("grad_norm".into(), json!(stepped.grad_norm)),
            ("learning_rate".into(), json!(learning_rate)),
            ("tokens".into(), json!(counted_tokens)),
        ];
        numbers.extend(stats_numbers(&stepped.stats));
        let work = Work {
            headline: format!("loss {:.4}", stepped.loss),
            tokens,
            samples: bins.iter().flatten().flatten().count() as u64,
            ..Work::default()
        };
        Ok((numbers, work))
    }

    /// Evaluates the held-out rows with the current adapters; `None` if the run was stopped
    /// before all rows were evaluated.
    pub fn evaluate(
        &self,
        decoder: &Decoder,
        active: &[ActiveAdapter],
        monitor: Monitor<'_>,
    ) -> Result<Option<Numbers>, TrainError> {
        match self {
            Self::LanguageModeling(task) => task.evaluate(decoder, active, monitor),
            Self::Reward(task) => task.evaluate(decoder, active, monitor),
            Self::Preference(task) => task.evaluate(decoder, active, monitor),
        }
    }

    /// Results of the command for its JSON line.
    pub fn results(
        &self,
        log: &Log,
        progress: &Progress,
    ) -> Result<Map<String, Value>, TrainError> {
        let mut results = Map::new();
        results.insert("data".into(), self.rows().report());
        let losses = log.values("eval_loss")?;
        results.insert("eval_loss_first".into(), json!(losses.first()));
        results.insert("eval_loss_last".into(), json!(losses.last()));
        if !matches!(self, Self::LanguageModeling(_)) {
            results.insert("pairs_per_second".into(), json!(progress.samples_per_second()));
        }
        let lines = log.metrics.lines()?;
        let last = lines.iter().rev().find(|line| line.get("eval_loss").is_some());
        if let Some(Value::Object(last)) = last {
            let own = |key: &str| key.starts_with("eval_") && key != "eval_loss";
            let more = last.iter().filter(|(key, _)| own(key));
            results.extend(more.map(|(key, value)| (key.clone(), value.clone())));
        }
        Ok(results)
    }
}
