//! What a run would be, before there is one: everything is read, the doctor looks at the rows, the
//! adapter begins, and a step or two are taken by a learner that is thrown away. Nothing is left
//! behind: tokens of large files are in a cache that is there already, or are removed again.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use quantune_adapters::delta::Adapter;
use serde::Serialize;

use super::TrainError;
use super::fine_tune::{
    FineTuning, Source, begin_adapters, check_memory, kept_layers, learner, load, predicted,
    schedule, settled,
};
use super::memory::{Memory, free};
use super::progress::EARLY_STEPS;
use super::run::Outcome;
use super::run_dir::{RunDir, State};
use super::settings::{RunSettings, Task};
use super::supervised::row_cache;

/// What a run would be.
#[derive(Debug, Clone, Serialize)]
pub struct Forecast {
    /// Trainable numbers.
    pub trainable_parameters: usize,
    /// Modules they are in.
    pub modules: usize,
    /// Optimizer steps; of ppo and grpo updates.
    pub steps: u64,
    /// Passes over the data that these are.
    pub epochs: f64,
    /// Steps of the first pass.
    pub steps_per_epoch: u64,
    /// Its tokens; nothing of ppo and grpo, whose responses are not there yet.
    pub tokens_per_epoch: Option<u64>,
    /// Tokens of the largest micro-batch.
    pub largest_micro_batch: usize,
    /// Layers whose tape would be rebuilt on the way down.
    pub recomputed_layers: usize,
    /// Bytes by what they are for; nothing of the portable form.
    pub memory: Option<Memory>,
    /// Their sum, or what reading alone has taken, if that is more.
    pub predicted_peak_rss_bytes: Option<usize>,
    /// Steps that were really taken; none where memory would not do.
    pub timed_steps: u64,
    /// Seconds that a step of a mean number of tokens takes, or that the first update took.
    pub seconds_per_step: Option<f64>,
    /// Seconds before the first step: what the reference says of all rows.
    pub reference_seconds: f64,
    /// Seconds of all steps and of the reference; evaluations come on top. Of ppo and grpo that is
    /// only as long as replies stay as long as those of the first update.
    pub predicted_seconds: Option<f64>,
    /// Whether the time depends on how long replies get.
    pub time_depends_on_replies: bool,
}

/// Says what a run would be. `stop` is looked at while rows are read.
pub fn dry_run(settings: &RunSettings, stop: &AtomicBool) -> Result<Outcome<Forecast>, TrainError> {
    let mut settings = settled(settings)?;
    RunDir::vacant(&settings.common.out)?;
    let needs_folder = !settings.common.cache.exists() && keeps_rows(&settings);
    let scratch = match needs_folder {
        true => Some(Scratch::beside(&settings.common.out)?),
        false => None,
    };
    if let Some(scratch) = &scratch {
        settings.common.cache = scratch.0.clone();
    }
    let (settings, common) = (&settings, &settings.common);
    let Some(loaded) = load(settings, stop)? else { return Ok(Outcome::NotBegun) };
    let (names, adapters): (Vec<&str>, Vec<Adapter>) =
        begin_adapters(settings, &loaded.decoder, &loaded.added)?.into_iter().unzip();
    let adapters: Vec<Arc<Adapter>> = adapters.into_iter().map(Arc::new).collect();
    let demand = loaded.demand(common, &adapters);
    let kept = kept_layers(common, &demand);
    check_memory(common, &demand, kept)?;
    let predicted_peak_rss_bytes = predicted(&demand, kept);
    let memory = predicted_peak_rss_bytes.map(|_| Memory::of(&demand, kept));
    let (layers, tokens, parameters) = (demand.layers, demand.tokens, demand.parameters);
    let decoder = &loaded.decoder;
    let mut trainee = learner(settings, (decoder, &loaded.below), &adapters)?;
    trainee.kept_layers = kept;
    let tokenizer = Vec::new(); // nothing is written
    let mut course = FineTuning { source: loaded.source, learner: trainee, names, tokenizer };
    let steps = course.total_steps();
    let (steps_per_epoch, tokens_per_epoch, epochs) = match &course.source {
        Source::Supervised(source) => {
            let (of_epoch, tokens) = source.epoch();
            (of_epoch, Some(tokens), steps as f64 / of_epoch.max(1) as f64)
        }
        Source::Rollouts(source) => {
            let (prompts, batch) = source.prompts_and_batch();
            let of_epoch = prompts.div_ceil(batch.max(1)) as u64;
            (of_epoch, None, steps as f64 * batch as f64 / prompts.max(1) as f64)
        }
    };
    let mut forecast = Forecast {
        trainable_parameters: parameters,
        modules: adapters.iter().map(|adapter| adapter.modules.len()).sum(),
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
        time_depends_on_replies: matches!(course.source, Source::Rollouts(_)),
    };
    // Swapping would tell nothing of a run, and a full machine might end this one.
    let fits = predicted_peak_rss_bytes.zip(free()).is_none_or(|(needed, free)| {
        let mapped = forecast.memory.as_ref().map_or(0, |memory| memory.frozen_weights);
        needed.saturating_sub(mapped) as u64 <= free
    });
    if fits {
        take_time(&mut course, settings, &mut forecast)?;
    }
    Ok(Outcome::Done(Box::new(forecast)))
}

/// Whether a file of rows is so large that its tokens go to disk.
fn keeps_rows(settings: &RunSettings) -> bool {
    let common = &settings.common;
    let from_bytes = row_cache(common).from_bytes;
    let ptx_data = match &settings.task {
        Task::Ppo(own) => Some(&own.ptx_data),
        _ => None,
    };
    let data = common.data.iter().map(|file| &file.path);
    let mut files = data.chain([&common.eval_data]).chain(ptx_data);
    files.any(|path| fs::metadata(path).is_ok_and(|about| about.len() >= from_bytes))
}

/// A folder of this dry run alone, which is gone with it, however it ends.
struct Scratch(PathBuf);

impl Scratch {
    /// Beside the place of a run, or as near as there are folders, made anew.
    fn beside(out: &Path) -> Result<Self, TrainError> {
        let name = out.file_name().unwrap_or_default().display();
        let id = std::process::id();
        let parent = out.ancestors().skip(1).find(|folder| folder.is_dir()).unwrap_or(out);
        let mut number = 0;
        loop {
            let folder = parent.join(format!(".{name}.dry-run-{id}-{number}"));
            match fs::create_dir(&folder) {
                Ok(()) => return Ok(Self(folder)),
                // A killed one's, whose process had the same number.
                Err(e) if e.kind() == ErrorKind::AlreadyExists && number < 1000 => number += 1,
                Err(source) => return Err(TrainError::Io { path: folder, source }),
            }
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0); // what came of the dry run is what to tell
    }
}

/// Takes the first steps of the run, and reckons from their time and tokens what all will take.
fn take_time(
    course: &mut FineTuning,
    settings: &RunSettings,
    forecast: &mut Forecast,
) -> Result<(), TrainError> {
    let schedule = schedule(&settings.common, forecast.steps);
    let mut state = State::default();
    let began = Instant::now();
    let trial = match &mut course.source {
        Source::Supervised(source) => {
            let trial = EARLY_STEPS.min(forecast.steps);
            let decoder = course.learner.decoder();
            let share = source.begin_trial(decoder, trial as usize)?;
            if share > 0.0 {
                forecast.reference_seconds = began.elapsed().as_secs_f64() / share;
            }
            trial
        }
        Source::Rollouts(source) => {
            source.begin_trial(&mut state);
            1
        }
    };
    let (mut seconds, mut tokens) = (0.0, 0);
    for step in 0..trial {
        let began = Instant::now();
        let (_, work) = course.step(&mut state, schedule.at(step))?;
        state.step += 1;
        state.optimizer_steps = course.learner.optimizer.step;
        // The first step meets cold pages and buffers that are not there yet: where there is a second,
        // that is the measure.
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
    fn a_scratch_folder_is_nobody_elses_and_goes() {
        let room = tempfile::tempdir().unwrap();
        let here = || fs::read_dir(room.path()).unwrap().count();
        let out = room.path().join("runs/mine");
        let (first, second) = (Scratch::beside(&out).unwrap(), Scratch::beside(&out).unwrap());
        assert_ne!(first.0, second.0);
        assert_eq!(here(), 2, "no folder above the run's is made");
        fs::write(first.0.join("rows"), "tokens").unwrap();
        drop((first, second));
        assert_eq!(here(), 0);
        fs::create_dir(room.path().join("runs")).unwrap();
        let beside = Scratch::beside(&out).unwrap();
        assert_eq!(beside.0.parent(), out.parent());
    }
}
