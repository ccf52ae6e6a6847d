//! The log of a run: `metrics.jsonl`, and the same metrics for TensorBoard.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::TrainError;
use super::metrics::{EVAL, Numbers};
use super::run_dir::{Metrics, RunDir};
use super::tensorboard::EventWriter;

/// The log of a run.
pub struct Log {
    pub metrics: Metrics,
    events: EventWriter,
    /// The step of the last evaluation.
    pub evaluated: Option<u64>,
    run: PathBuf,
}

impl Log {
    /// Opens the log of a run at `bytes` of its `metrics.jsonl`.
    pub fn open(run: &RunDir, bytes: u64) -> Result<Self, TrainError> {
        let metrics = run.metrics(bytes)?;
        let events = run.events(wall_time())?;
        let mut log = Self { metrics, events, evaluated: None, run: run.file("tensorboard") };
        for line in log.metrics.lines()? {
            log.curves(&line)?;
        }
        Ok(log)
    }

    /// Writes a line: a step's numbers, or an evaluation's, which all begin with `eval_`.
    pub fn push(&mut self, step: u64, numbers: Numbers) -> Result<(), TrainError> {
        let mut line = Map::from_iter([("step".to_string(), json!(step))]);
        line.extend(numbers);
        let line = Value::Object(line);
        self.metrics.push(&line)?;
        self.curves(&line)
    }

    /// All values of a key so far, in order.
    pub fn values(&self, key: &str) -> Result<Vec<f64>, TrainError> {
        let lines = self.metrics.lines()?;
        Ok(lines.iter().filter_map(|line| line.get(key)?.as_f64()).collect())
    }

    fn curves(&mut self, line: &Value) -> Result<(), TrainError> {
        let Some(line) = line.as_object() else { return Ok(()) };
        let step = line.get("step").and_then(Value::as_u64).unwrap_or_default();
        if line.keys().any(|key| key.starts_with(EVAL)) {
            self.evaluated = Some(step);
        }
        let mut write = || -> std::io::Result<()> {
            for (key, value) in line.iter().filter(|(key, _)| *key != "step") {
                let Some(value) = value.as_f64() else { continue };
                let tag = match key.strip_prefix(EVAL) {
                    Some(key) => format!("eval/{key}"),
                    None if key.contains('/') => key.clone(), // already has a group, named as in TRL
                    None => format!("train/{key}"),
                };
                self.events.scalar(&tag, step, value, wall_time())?;
            }
            self.events.flush()
        };
        write().map_err(|source| TrainError::Io { path: self.run.clone(), source })
    }
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64())
}
