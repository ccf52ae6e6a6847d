//! The run directory. Files are written in an order that lets a run killed at any moment resume to the same
//! bytes.
//!
//! `metrics.jsonl` is appended to and may run ahead of the last checkpoint; a checkpoint records
//! its length, and a resumed run truncates it to that. A checkpoint is written under a temporary name,
//! synced, and renamed, so that it is atomic. `lock` names the process that uses the directory, and is
//! locked by it.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use candle_core::Var;
use quantune_adapters::delta::Adapter;
use quantune_adapters::format;
use safetensors::tensor::{Dtype, SafeTensors, View};

use super::TrainError;
use super::settings::{Command, FREE_ON_RESUME, PretrainSettings, RunSettings};
use super::state::State;
use super::tensorboard::EventWriter;
use crate::monitor::Monitor;
use crate::optim::AdamW;
use crate::weights::{Lock, LockError, write_atomically};

/// The settings of a run.
const SETTINGS_FILE: &str = "config.toml";
const LOCK_FILE: &str = "lock";
/// The name of the main adapter of a run.
pub(super) const MAIN_ADAPTER: &str = "adapter";
/// The file in a reward model's folder with its accuracy on held-out pairs.
const ACCURACY_FILE: &str = "reward.json";

/// A description of an input of a run, for error messages, and its hash.
pub(super) type Fingerprint = (String, String);

/// The directory of one run, locked by this process.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _lock: Option<Lock>,
}

impl RunDir {
    /// Creates the directory of a new run. Fails if it contains a run.
    pub fn create(
        path: &Path,
        settings: &toml::Table,
        fingerprints: &[Fingerprint],
        monitor: Monitor<'_>,
    ) -> Result<Self, TrainError> {
        Self::check_no_run(path)?;
        fs::create_dir_all(path).map_err(|e| at(path, e))?;
        let run = Self { path: path.into(), _lock: lock(path, monitor)? };
        Self::check_no_run(path)?; // another process may have created a run since the last check
        fs::create_dir_all(run.checkpoints()).map_err(|e| at(path, e))?;
        let text = serde_json::to_string(fingerprints).map_err(|e| at(path, e.into()))?;
        write_atomically(path.join("fingerprints.json"), |file| file.write_all(text.as_bytes()))?;
        let text = toml::to_string(settings).map_err(|e| at(path, io::Error::other(e)))?;
        write_atomically(path.join(SETTINGS_FILE), |file| file.write_all(text.as_bytes()))?;
        Ok(run)
    }

    /// Fails if the directory contains a run, or files that a run would overwrite.
    pub fn check_no_run(path: &Path) -> Result<(), TrainError> {
        if path.join(SETTINGS_FILE).exists() {
            if let Some(holder) = Lock::holder(&path.join(LOCK_FILE)) {
                return Err(TrainError::Held { path: path.into(), holder });
            }
            return Err(TrainError::Exists(path.into()));
        }
        let occupied = |name: &&&str| match fs::read_dir(path.join(name)) {
            Ok(mut entries) => entries.next().is_some(), // a run killed at its start leaves empty ones
            Err(_) => path.join(name).exists(),
        };
        let taken = [
            "metrics.jsonl",
            "samples.jsonl",
            "held_out.jsonl",
            "reference.safetensors",
            "checkpoints",
            "tensorboard",
            "adapter",
            "value_adapter",
            "model",
        ];
        match taken.iter().find(occupied) {
            Some(name) => Err(TrainError::Occupied { path: path.into(), name }),
            None => Ok(()),
        }
    }

    /// The fingerprints saved when the run started.
    pub fn fingerprints(&self) -> Result<Vec<Fingerprint>, TrainError> {
        let path = self.path.join("fingerprints.json");
        let text = fs::read_to_string(&path).map_err(|e| at(&path, e))?;
        serde_json::from_str(&text).map_err(|e| TrainError::Broken { path, reason: e.to_string() })
    }

    /// Opens a run that was started with the settings `saved`. Settings `given` now that would change its
    /// result are rejected.
    pub fn resume(
        path: &Path,
        saved: &toml::Table,
        given: &toml::Table,
        monitor: Monitor<'_>,
    ) -> Result<Self, TrainError> {
        let lock = lock(path, monitor)?;
        let keys = saved.keys().chain(given.keys().filter(|key| !saved.contains_key(*key)));
        let show = |table: &toml::Table, key: &str| {
            table.get(key).map_or("not set".into(), toml::Value::to_string)
        };
        let changed: Vec<String> = keys
            .filter(|key| saved.get(*key) != given.get(*key))
            .filter(|key| !FREE_ON_RESUME.contains(&key.as_str()))
            .map(|key| format!("{key} was {}, is {}", show(saved, key), show(given, key)))
            .collect();
        if !changed.is_empty() {
            return Err(TrainError::Changed { path: path.into(), what: changed.join("; ") });
        }
        let run = Self { path: path.into(), _lock: lock };
        let folder = run.checkpoints();
        fs::create_dir_all(&folder).map_err(|e| at(path, e))?;
        for entry in fs::read_dir(&folder).map_err(|e| at(&folder, e))? {
            let entry = entry.map_err(|e| at(&folder, e))?;
            if entry.file_name().to_string_lossy().ends_with(".partial") {
                fs::remove_dir_all(entry.path()).map_err(|e| at(&entry.path(), e))?;
            }
        }
        Ok(run)
    }

    /// The settings that a run of this command was started with.
    pub fn settings(command: Command, path: &Path) -> Result<RunSettings, TrainError> {
        let table = Self::table(path)?;
        RunSettings::from_table(command, table).map_err(|e| broken(path, &e))
    }

    /// The settings of a pretraining run.
    pub fn pretrain_settings(path: &Path) -> Result<PretrainSettings, TrainError> {
        let table = Self::table(path)?;
        PretrainSettings::from_table(table).map_err(|e| broken(path, &e))
    }

    fn table(path: &Path) -> Result<toml::Table, TrainError> {
        let file = path.join(SETTINGS_FILE);
        let text = fs::read_to_string(&file).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => TrainError::NoRun(path.into()),
            _ => at(&file, e),
        })?;
        toml::from_str(&text).map_err(|e| broken(path, &e))
    }

    /// The last complete checkpoint.
    pub fn last_checkpoint(&self) -> Result<Option<PathBuf>, TrainError> {
        Ok(self.steps()?.pop().map(|step| self.checkpoint(step)))
    }

    /// The folder of the adapter `name` in a checkpoint. The main adapter is at the top level, so that the
    /// checkpoint is a PEFT folder.
    pub fn adapter_folder(checkpoint: &Path, name: &str) -> PathBuf {
        if name == MAIN_ADAPTER { checkpoint.into() } else { checkpoint.join(name) }
    }

    /// Writes a checkpoint and deletes the oldest ones except the last `keep` (0 keeps all) and the best.
    /// `write` writes the trained weights to the folder; its parameters are in the order of the optimizer.
    pub fn save(
        &self,
        state: &State,
        parameters: &[(String, Var)],
        optimizer: &AdamW,
        keep: usize,
        write: impl FnOnce(&Path) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        let folder = self.checkpoints();
        let partial = folder.join(format!(".step-{}.partial", state.step));
        let whole = self.checkpoint(state.step);
        if whole.exists() {
            return Ok(()); // the same step of the same run: the same bytes
        }
        let _ = fs::remove_dir_all(&partial); // left by a killed process
        fs::create_dir_all(&partial).map_err(|e| at(&partial, e))?;
        write(&partial)?;
        let moments = moments(parameters, optimizer);
        let path = partial.join("optimizer.safetensors");
        write_atomically(path, |file| format::write_tensors(file, None, moments))?;
        write_state(&partial, state)?;
        fs::rename(&partial, &whole).map_err(|e| at(&whole, e))?;
        sync_folder(&folder).map_err(|e| at(&folder, e))?;
        if keep > 0 {
            let mut steps = self.steps()?;
            steps.retain(|&step| state.best.as_ref().is_none_or(|best| best.step != step));
            for &step in &steps[..steps.len().saturating_sub(keep)] {
                // Renamed at the end, so that a checkpoint is atomic.
                let old = folder.join(format!(".step-{step}.partial"));
                fs::rename(self.checkpoint(step), &old).map_err(|e| at(&old, e))?;
                fs::remove_dir_all(&old).map_err(|e| at(&old, e))?;
            }
        }
        Ok(())
    }

    /// Opens `metrics.jsonl`, truncated to `bytes`.
    pub fn metrics(&self, bytes: u64) -> Result<Metrics, TrainError> {
        let path = self.path.join("metrics.jsonl");
        let open = || -> io::Result<File> {
            let mut file = File::options().create(true).write(true).truncate(false).open(&path)?;
            if file.metadata()?.len() < bytes {
                return Err(io::Error::other("shorter than recorded in the checkpoint"));
            }
            file.set_len(bytes)?;
            io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
            Ok(file)
        };
        let file = open().map_err(|e| at(&path, e))?;
        Ok(Metrics { path, file, bytes })
    }

    /// Rewrites the TensorBoard file with the metrics so far, because TensorBoard would also show the values
    /// that were truncated.
    pub fn events(&self, wall_time: f64) -> Result<EventWriter, TrainError> {
        let folder = self.path.join("tensorboard");
        let renew = || -> io::Result<EventWriter> {
            fs::create_dir_all(&folder)?;
            for entry in fs::read_dir(&folder)? {
                let entry = entry?;
                if entry.file_name().to_string_lossy().starts_with("events.out.tfevents.") {
                    fs::remove_file(entry.path())?;
                }
            }
            EventWriter::create(&folder, "quantune", wall_time)
        };
        renew().map_err(|e| at(&folder, e))
    }

    /// Writes the accuracy of a reward model on held-out pairs to the adapter's folder.
    pub fn write_accuracy(&self, accuracy: &serde_json::Value) -> Result<(), TrainError> {
        let text = format!("{}\n", serde_json::json!({ "eval_accuracy": accuracy }));
        let path = self.file(MAIN_ADAPTER).join(ACCURACY_FILE);
        Ok(write_atomically(path, |file| file.write_all(text.as_bytes()))?)
    }

    /// A file of the run directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// The checkpoint after a step.
    pub fn checkpoint(&self, step: u64) -> PathBuf {
        self.checkpoints().join(format!("step-{step}"))
    }

    /// The steps of complete checkpoints, in ascending order.
    fn steps(&self) -> Result<Vec<u64>, TrainError> {
        let folder = self.checkpoints();
        let mut steps = Vec::new();
        for entry in fs::read_dir(&folder).map_err(|e| at(&folder, e))? {
            let name = entry.map_err(|e| at(&folder, e))?.file_name();
            let step =
                name.to_str().and_then(|name| name.strip_prefix("step-")?.parse::<u64>().ok());
            steps.extend(step);
        }
        steps.sort_unstable();
        Ok(steps)
    }
}

/// Locks a run against other processes. Where file locks are not supported, training works without.
fn lock(run: &Path, monitor: Monitor<'_>) -> Result<Option<Lock>, TrainError> {
    let path = run.join(LOCK_FILE);
    match Lock::take(&path) {
        Ok(lock) => Ok(Some(lock)),
        Err(LockError::Held(holder)) => Err(TrainError::Held { path: run.into(), holder }),
        Err(LockError::NoLocks(e)) => {
            monitor.warn(format_args!("{}: cannot be locked: {e}", path.display()));
            Ok(None)
        }
        Err(LockError::Io(e)) => Err(at(&path, e)),
    }
}

/// `metrics.jsonl`, written line by line.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
    /// Length of the file in bytes.
    pub bytes: u64,
}

impl Metrics {
    /// Appends a line.
    pub fn push(&mut self, line: &serde_json::Value) -> Result<(), TrainError> {
        let text = format!("{line}\n");
        self.file.write_all(text.as_bytes()).map_err(|e| at(&self.path, e))?;
        self.bytes += text.len() as u64;
        Ok(())
    }

    /// All lines so far.
    pub fn lines(&self) -> Result<Vec<serde_json::Value>, TrainError> {
        let text = fs::read_to_string(&self.path).map_err(|e| at(&self.path, e))?;
        let broken = |e: serde_json::Error| TrainError::Broken {
            path: self.path.clone(),
            reason: e.to_string(),
        };
        text.lines().map(|line| serde_json::from_str(line).map_err(broken)).collect()
    }

    /// Syncs the file to disk, before a checkpoint refers to it.
    pub fn sync(&self) -> Result<(), TrainError> {
        self.file.sync_all().map_err(|e| at(&self.path, e))
    }
}

/// The accuracy of a reward model on held-out pairs, if its folder has it.
pub(super) fn read_accuracy(folder: &Path) -> Result<Option<f64>, TrainError> {
    let path = folder.join(ACCURACY_FILE);
    let text = match fs::read_to_string(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(|e| at(&path, e))?,
    };
    let value: serde_json::Value = serde_json::from_str(&text)
        .map_err(|e| TrainError::Broken { path: path.clone(), reason: e.to_string() })?;
    Ok(value.get("eval_accuracy").and_then(serde_json::Value::as_f64))
}

/// Reads the state of a checkpoint.
pub(super) fn read_state(checkpoint: &Path) -> Result<State, TrainError> {
    let path = checkpoint.join("state.json");
    let text = fs::read_to_string(&path).map_err(|e| at(&path, e))?;
    serde_json::from_str(&text).map_err(|e| TrainError::Broken { path, reason: e.to_string() })
}

/// Writes the state of a checkpoint, replacing an existing one.
pub(super) fn write_state(checkpoint: &Path, state: &State) -> Result<(), TrainError> {
    let text = serde_json::to_string(state).map_err(|e| at(checkpoint, e.into()))?;
    Ok(write_atomically(checkpoint.join("state.json"), |file| file.write_all(text.as_bytes()))?)
}

/// Reads the optimizer state of a checkpoint into `optimizer`.
pub(super) fn read_optimizer(
    checkpoint: &Path,
    parameters: &[(String, Var)],
    optimizer: &mut AdamW,
    step: u64,
) -> Result<(), TrainError> {
    let path = checkpoint.join("optimizer.safetensors");
    let bytes = fs::read(&path).map_err(|e| at(&path, e))?;
    let broken = |reason: String| TrainError::Broken { path: path.clone(), reason };
    let tensors = SafeTensors::deserialize(&bytes).map_err(|e| broken(e.to_string()))?;
    let read = |name: &str, into: &mut Vec<f32>| -> Result<(), TrainError> {
        let tensor = tensors.tensor(name).map_err(|e| broken(format!("{name}: {e}")))?;
        if tensor.dtype() != Dtype::F32 || tensor.data().len() != 4 * into.len() {
            return Err(broken(format!("{name} has not the size of the trained parameter")));
        }
        for (value, bytes) in into.iter_mut().zip(tensor.data().chunks_exact(4)) {
            *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Ok(())
    };
    for (i, (name, _)) in parameters.iter().enumerate() {
        read(&format!("exp_avg.{name}"), &mut optimizer.exp_avg[i])?;
        read(&format!("exp_avg_sq.{name}"), &mut optimizer.exp_avg_sq[i])?;
    }
    optimizer.step = step;
    Ok(())
}

/// An optimizer moment to be written; its bytes are made one tensor at a time.
struct Moment<'a> {
    values: &'a [f32],
    shape: Vec<usize>,
}

impl View for Moment<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
    }

    fn data_len(&self) -> usize {
        size_of_val(self.values)
    }
}

/// The trained parameters of all adapters, with unique names.
pub(super) fn adapter_parameters<'a>(
    adapters: impl Iterator<Item = (&'a str, &'a Adapter)>,
) -> Vec<(String, Var)> {
    let named = |(of, adapter): (&str, &Adapter)| {
        let prefix = if of == MAIN_ADAPTER { String::new() } else { format!("{of}.") };
        let parameters = adapter.parameters().into_iter();
        parameters.map(|(name, var)| (format!("{prefix}{name}"), var)).collect::<Vec<_>>()
    };
    adapters.flat_map(named).collect()
}

/// The optimizer's moments with the names of the parameters.
fn moments<'m>(parameters: &[(String, Var)], optimizer: &'m AdamW) -> Vec<(String, Moment<'m>)> {
    let kinds = [("exp_avg", &optimizer.exp_avg), ("exp_avg_sq", &optimizer.exp_avg_sq)];
    let named = |(kind, moments): (&str, &'m Vec<Vec<f32>>)| {
        let moments = parameters.iter().zip(moments).map(|((name, var), values)| {
            (format!("{kind}.{name}"), Moment { values, shape: var.dims().to_vec() })
        });
        moments.collect::<Vec<_>>()
    };
    kinds.into_iter().flat_map(named).collect()
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    match cfg!(unix) {
        true => File::open(folder)?.sync_all(),
        false => Ok(()), // only Unix can open folders
    }
}

/// The settings of the run at `path` are invalid.
fn broken(path: &Path, reason: &dyn std::fmt::Display) -> TrainError {
    TrainError::Broken { path: path.join(SETTINGS_FILE), reason: reason.to_string() }
}

fn at(path: &Path, source: io::Error) -> TrainError {
    TrainError::Io { path: path.into(), source }
}
