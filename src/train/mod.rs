//! Training: one loop, its run directory, checkpoints and metrics.
//!
//! `run` is the training loop of every command, [`train()`] the setup and output for training adapters,
//! [`pretrain()`] for training a whole model. [`supervised`] makes steps from the rows of a file, `policy`
//! from responses of the model itself; [`learner`] takes the optimizer step. A run depends only on its
//! settings, its data and its base; random numbers are keyed. So the state of a run is a step counter,
//! the adapters and the optimizer's moments, and a run killed at any moment resumes to the same
//! bytes. Does not depend on the command line.

mod best;
mod dry_run;
mod fine_tune;
mod fingerprints;
mod inputs;
pub mod learner;
mod log;
mod lora;
mod memory;
mod metrics;
mod policy;
mod pretrain;
mod progress;
mod reference;
mod rows;
mod run;
mod run_dir;
pub mod settings;
mod state;
pub mod step;
pub mod supervised;
mod tensorboard;

use std::path::PathBuf;

pub use dry_run::{Forecast, dry_run};
pub use fine_tune::{Summary, train};
pub use lora::read_scoring;
pub use memory::{MemoryEstimate, process_status_bytes};
pub use pretrain::{PretrainSummary, pretrain};
pub use run::Outcome;
pub use run_dir::RunDir;
pub use settings::{Command, EvalStrategy, RunSettings};
pub use state::RolloutState;

use quantune_adapters::config::ConfigError;
use quantune_adapters::delta::InitError;
use quantune_adapters::format::FormatError;
use quantune_adapters::targets::TargetError;

use crate::data::DataError;
use crate::data::corpus::CorpusError;
use crate::eval::EvalError;
use crate::export::ExportError;
use crate::generate::GenerateError;
use crate::model::ModelError;
use crate::model::adapter_files::AdapterFileError;
use crate::rollout::{RewardError, RewardModelError, SamplesError, ScoreError};
use crate::text::TextError;
use crate::weights::WeightsError;

/// Why a run could not start or continue.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// Settings out of range.
    #[error("{0}")]
    Settings(String),
    /// The directory contains a run already.
    #[error(
        "{}: contains a run already; use --resume to continue it, or another --out for a new run",
        .0.display()
    )]
    Exists(PathBuf),
    /// The directory holds files that a run would overwrite.
    #[error("{}: contains {name} but no run; use another --out for a new run", path.display())]
    Occupied {
        /// The directory.
        path: PathBuf,
        /// The file that would be overwritten.
        name: &'static str,
    },
    /// Another process uses the directory.
    #[error("{}: {holder} is using this run directory; wait for it or choose another --out", path.display())]
    Held {
        /// The directory.
        path: PathBuf,
        /// The process that uses it.
        holder: String,
    },
    /// There is nothing to resume.
    #[error("{}: contains no run to resume (no config.toml)", .0.display())]
    NoRun(PathBuf),
    /// Inputs or settings of the run have changed.
    #[error("{}: cannot resume: {what}", path.display())]
    Changed {
        /// The run directory.
        path: PathBuf,
        /// All differences.
        what: String,
    },
    /// A file of the run directory is invalid.
    #[error("{}: {reason}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// The error.
        reason: String,
    },
    /// An I/O error.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// Loss, gradients or parameters are NaN or infinite.
    #[error(
        "step {step}: training diverged (loss {loss}; loss, gradients or parameters are NaN or \
         infinite); a lower learning_rate or a max_grad_norm helps most often"
    )]
    Diverged {
        /// The step.
        step: u64,
        /// Its loss.
        loss: f64,
    },
    /// The base.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A file of weights.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The tokenizer or chat template.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A model could not be written.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// An adapter that cannot be read.
    #[error(transparent)]
    AdapterFile(#[from] AdapterFileError),
    /// The mixture of pretraining.
    #[error(transparent)]
    Corpus(#[from] CorpusError),
    /// The adapter's settings.
    #[error("adapter settings: {0}")]
    Adapter(#[from] ConfigError),
    /// The adapter's modules.
    #[error(transparent)]
    Targets(#[from] TargetError),
    /// The adapter's first values.
    #[error(transparent)]
    Init(#[from] InitError),
    /// An adapter file.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The evaluation.
    #[error(transparent)]
    Eval(#[from] EvalError),
    /// The generation of responses.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// The rewards.
    #[error(transparent)]
    Reward(#[from] RewardError),
    /// The table of samples.
    #[error(transparent)]
    Samples(#[from] SamplesError),
    /// A separate reward model.
    #[error(transparent)]
    RewardModel(#[from] RewardModelError),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// A failed reward has its own variant, because the loop then saves a checkpoint first.
impl From<ScoreError> for TrainError {
    fn from(error: ScoreError) -> Self {
        match error {
            ScoreError::Text(error) => error.into(),
            ScoreError::Reward(error) => error.into(),
            ScoreError::RewardModel(error) => error.into(),
            ScoreError::Tensor(error) => error.into(),
        }
    }
}
