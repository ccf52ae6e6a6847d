//! Dry run: reads all inputs, validates the rows, initializes the adapter, and takes a step or two with a
//! learner that is discarded, to predict size, memory and time of a run. It leaves no files behind: tokens of
//! large files are in an existing row cache, or are removed again; those of a killed dry run are removed by the
//! next one of the same run.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use quantune_adapters::delta::Adapter;
use serde::Serialize;

use super::TrainError;
use super::fine_tune::{FineTuning, begin_adapters, new_learner, resolve_settings};
use super::inputs::{BatchSource, Inputs, check_memory, kept_layers, predicted_peak_bytes};
use super::learner::Trainable;
use super::memory::{MemoryEstimate, free};
use super::progress::EARLY_STEPS;
use super::rows::row_cache;
use super::run::{Outcome, Trainer};
use super::run_dir::RunDir;
use super::settings::{RunSettings, Task};
use super::state::State;
use crate::monitor::Monitor;
use crate::weights::{Lock, LockError};

/// The prediction of a dry run.
#[derive(Debug, Clone, Serialize)]
pub struct Forecast {
    /// Number of trainable parameters.
    pub trainable_parameters: usize,
    /// Number of modules they belong to.
    pub modules: usize,
    /// Optimizer steps; of ppo and grpo updates.
    pub steps: u64,
    /// Epochs of the run.
    pub epochs: f64,
    /// Steps of the first pass.
    pub steps_per_epoch: u64,
    /// Tokens of the first epoch; `None` for ppo and grpo, whose responses are not known yet.
    pub tokens_per_epoch: Option<u64>,
    /// Tokens of the largest micro-batch.
    pub largest_micro_batch: usize,
    /// Layers that are recomputed in the backward pass.
    pub recomputed_layers: usize,
    /// Bytes by component; `None` for the reference backend.
    pub memory: Option<MemoryEstimate>,
    /// Their sum, or the peak while the inputs were read, if that is larger.
    pub predicted_peak_rss_bytes: Option<usize>,
    /// Steps that were taken; none if memory would not suffice.
    pub timed_steps: u64,
    /// Seconds of a step with the mean number of tokens, or of the first update.
    pub seconds_per_step: Option<f64>,
    /// Seconds before the first step, for log-probs of all rows under the reference.
    pub reference_seconds: f64,
    /// Seconds of all steps and of the reference, without evaluations. For ppo and grpo it assumes that
    /// responses stay as long as those of the first update.
    pub predicted_seconds: Option<f64>,
    /// Whether the time depends on the length of responses.
    pub time_depends_on_replies: bool,
}

/// Predicts a run. The stop flag is checked while rows are read.
pub fn dry_run(
    settings: &RunSettings,
    monitor: Monitor<'_>,
) -> Result<Outcome<Forecast>, TrainError> {
    let mut settings = resolve_settings(settings)?;
    RunDir::check_no_run(&settings.common.out)?;
    Scratch::remove_abandoned(&settings.common.out);
    let needs_folder = !settings.common.cache.exists() && keeps_rows(&settings);
    let scratch = match needs_folder {
        true => Some(Scratch::create(&settings.common.out)?),
        false => None,
    };
    if let Some(scratch) = &scratch {
        settings.common.cache = scratch.folder.clone();
    }
    let (settings, common) = (&settings, &settings.common);
    let Some(inputs) = Inputs::load(settings, monitor)? else { return Ok(Outcome::NotStarted) };
    let (names, adapters): (Vec<&str>, Vec<Adapter>) =
        begin_adapters(settings, &inputs.decoder, &inputs.added_tokens, monitor)?
            .into_iter()
            .unzip();
    let adapters: Vec<Arc<Adapter>> = adapters.into_iter().map(Arc::new).collect();
    let memory_params = inputs.memory_params(common, &adapters);
    let kept = kept_layers(common, &memory_params);
    check_memory(common, &memory_params, kept, monitor)?;
    let predicted_peak_rss_bytes = predicted_peak_bytes(&memory_params, kept);
    let memory = predicted_peak_rss_bytes.map(|_| MemoryEstimate::of(&memory_params, kept));
    let (layers, tokens, parameters) =
        (memory_params.layers, memory_params.tokens, memory_params.parameters);
    let decoder = &inputs.decoder;
    let mut learner = new_learner(settings, decoder, &inputs.frozen, adapters)?;
    learner.kept_layers = kept;
    let tokenizer_files = Vec::new(); // nothing is written
    let mut tuning = FineTuning { source: inputs.source, learner, names, tokenizer_files };
    let steps = tuning.total_steps();
    let (steps_per_epoch, tokens_per_epoch, epochs) = match &tuning.source {
        BatchSource::Supervised(source) => {
            let (of_epoch, tokens) = source.epoch();
            (of_epoch, Some(tokens), steps as f64 / of_epoch.max(1) as f64)
        }
        BatchSource::Rollouts(source) => {
            let (prompts, batch) = source.prompts_and_batch();
            let of_epoch = prompts.div_ceil(batch.max(1)) as u64;
            (of_epoch, None, steps as f64 * batch as f64 / prompts.max(1) as f64)
        }
    };
    let mut forecast = Forecast {
        trainable_parameters: parameters,
        modules: tuning.module_count(),
        steps,
        epochs,
        steps_per_epoch,
        tokens_per_epoch,
        largest_micro_batch: tokens,
        recomputed_layers: layers - kept,
        memory,
        predicted_peak_rss_bytes,
        timed_steps: 0,
        seconds_per_step: None,
        reference_seconds: 0.0,
        predicted_seconds: None,
        time_depends_on_replies: matches!(tuning.source, BatchSource::Rollouts(_)),
    };
    // Steps that swap would measure nothing, and the system might kill the process.
    let fits = predicted_peak_rss_bytes.zip(free()).is_none_or(|(needed, free)| {
        let mapped = forecast.memory.as_ref().map_or(0, |memory| memory.frozen_weights);
        needed.saturating_sub(mapped) as u64 <= free
    });
    if fits {
        measure_steps(&mut tuning, settings, &mut forecast, monitor)?;
    }
    Ok(Outcome::Done(Box::new(forecast)))
}

/// Whether the tokens of any data file are cached on disk.
fn keeps_rows(settings: &RunSettings) -> bool {
    let common = &settings.common;
    let cache = row_cache(common);
    let ptx_data = match &settings.task {
        Task::Ppo(own) => Some(&own.ptx_data),
        _ => None,
    };
    let data = common.data.iter().map(|file| &file.path);
    let mut files = data.chain([&common.eval_data]).chain(ptx_data);
    files.any(|path| cache.keeps(path))
}

/// A temporary folder of this dry run, removed on drop. The folder of a killed dry run is not locked.
struct Scratch {
    folder: PathBuf,
    lock: Option<Lock>,
}

/// The lock file in it; `.lock` is used by the cache.
const LOCK_FILE: &str = ".in-use";

impl Scratch {
    /// The parent folder of a run's temporary folders and the prefix of their names: the nearest existing
    /// ancestor of the run directory.
    fn parent_and_prefix(out: &Path) -> (&Path, String) {
        let name = out.file_name().unwrap_or_default().display();
        let parent = out.ancestors().skip(1).find(|folder| folder.is_dir()).unwrap_or(out);
        (parent, format!(".{name}.dry-run-"))
    }

    /// Creates a temporary folder for a run.
    fn create(out: &Path) -> Result<Self, TrainError> {
        let (parent, name) = Self::parent_and_prefix(out);
        let id = std::process::id();
        for number in 0.. {
            let folder = parent.join(format!("{name}{id}-{number}"));
            let refused = match fs::create_dir(&folder) {
                Ok(()) => match Lock::take(&folder.join(LOCK_FILE)) {
                    Ok(lock) => return Ok(Self { folder, lock: Some(lock) }),
                    Err(LockError::NoLocks(_)) => return Ok(Self { folder, lock: None }),
                    // Another dry run is removing it, or has removed it.
                    Err(LockError::Held(_)) => continue,
                    Err(LockError::Io(e)) => e,
                },
                Err(e) => e,
            };
            let another = [ErrorKind::AlreadyExists, ErrorKind::NotFound].contains(&refused.kind());
            if !another || number == 1000 {
                return Err(TrainError::Io { path: folder, source: refused });
            }
        }
        unreachable!("it ends with the numbers")
    }

    /// Removes the temporary folders of killed dry runs of a run.
    fn remove_abandoned(out: &Path) {
        let (parent, name) = Self::parent_and_prefix(out);
        for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
            let (found, folder) = (entry.file_name(), entry.path());
            let numbers = found.to_str().and_then(|found| found.strip_prefix(&name));
            let is_number = |text: &str| text.parse::<u32>().is_ok();
            let is_one = numbers
                .and_then(|numbers| numbers.split_once('-'))
                .is_some_and(|(id, number)| is_number(id) && is_number(number));
            if is_one
                && folder.is_dir()
                && let Ok(lock) = Lock::take(&folder.join(LOCK_FILE))
            {
                drop(Self { folder, lock: Some(lock) });
            }
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let gone = fs::remove_dir_all(&self.folder);
        drop(self.lock.take());
        if gone.is_err() {
            // Some systems cannot remove open files. The result of the dry run matters more than this error.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// Takes the first steps of the run, and predicts the total time from their time and tokens.
fn measure_steps(
    tuning: &mut FineTuning,
    settings: &RunSettings,
    forecast: &mut Forecast,
    monitor: Monitor<'_>,
) -> Result<(), TrainError> {
    let schedule = settings.common.schedule(forecast.steps);
    let mut state = State::default();
    let began = Instant::now();
    let trial = match &mut tuning.source {
        BatchSource::Supervised(source) => {
            let trial = EARLY_STEPS.min(forecast.steps);
            let decoder = tuning.learner.decoder();
            let share = source.begin_trial(decoder, trial as usize, monitor)?;
            if share > 0.0 {
                forecast.reference_seconds = began.elapsed().as_secs_f64() / share;
            }
            trial
        }
        BatchSource::Rollouts(source) => {
            source.begin_trial(&mut state);
            1
        }
    };
    let (mut seconds, mut tokens) = (0.0, 0);
    for step in 0..trial {
        let began = Instant::now();
        let (_, work) = tuning.step(&mut state, schedule.at(step), monitor)?;
        state.step += 1;
        state.optimizer_steps = tuning.learner.trained.optimizer_steps();
        // The first step has page faults and allocates buffers, so that the second one counts, if there is one.
        (seconds, tokens) = (began.elapsed().as_secs_f64(), work.tokens);
    }
    forecast.timed_steps = trial;
    let per_step = match forecast.tokens_per_epoch {
        Some(of_epoch) => {
            let mean = of_epoch as f64 / forecast.steps_per_epoch.max(1) as f64;
            seconds / tokens.max(1) as f64 * mean
        }
        None => seconds,
    };
    forecast.seconds_per_step = Some(per_step);
    forecast.predicted_seconds =
        Some(per_step * forecast.steps as f64 + forecast.reference_seconds);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_folder_is_unique_and_removed() {
        let room = tempfile::tempdir().unwrap();
        let here = || fs::read_dir(room.path()).unwrap().count();
        let out = room.path().join("runs/mine");
        let (first, second) = (Scratch::create(&out).unwrap(), Scratch::create(&out).unwrap());
        assert_ne!(first.folder, second.folder);
        assert_eq!(here(), 2, "no parent folder of the run is created");
        fs::write(first.folder.join("rows"), "tokens").unwrap();
        drop((first, second));
        assert_eq!(here(), 0);
        fs::create_dir(room.path().join("runs")).unwrap();
        let created = Scratch::create(&out).unwrap();
        assert_eq!(created.folder.parent(), out.parent());
    }

    #[test]
    fn folders_of_killed_dry_runs_are_removed() {
        let room = tempfile::tempdir().unwrap();
        let out = room.path().join("mine");
        let held = Scratch::create(&out).unwrap();
        let make = |name: &str| {
            fs::create_dir(room.path().join(name)).unwrap();
            fs::write(room.path().join(name).join("rows"), "tokens").unwrap();
            room.path().join(name)
        };
        let names = [".mine.dry-run-1-0", ".mine.dry-run-1-x", ".mine2.dry-run-1-0", ".mine"];
        let [killed, others @ ..] = names.map(make);
        fs::write(killed.join(LOCK_FILE), "1").unwrap();
        let bare = room.path().join(".mine.dry-run-1-1");
        fs::create_dir(&bare).unwrap(); // killed before it locked the folder
        Scratch::remove_abandoned(&out);
        assert!(!killed.exists() && !bare.exists());
        assert!(held.folder.exists() && others.iter().all(|folder| folder.join("rows").exists()));
        drop(held);
        assert_eq!(fs::read_dir(room.path()).unwrap().count(), others.len());
    }
}
