//! The commands that train: `quantune sft`, `reward`, `dpo`, `ppo` and `grpo`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::{Map, Value};

use super::flags::CommonFlags;
use super::{UsageError, printer, to_json};
use crate::train::{
    Command, Forecast, Outcome, RunDir, RunSettings, Summary, dry_run, process_status_bytes, train,
};

/// A training command, with its own flags.
#[derive(Debug, clap::Args)]
pub(super) struct Train<F: clap::Args> {
    #[command(flatten)]
    common: CommonFlags,
    #[command(flatten)]
    own: F,
    /// TOML file of settings; keys are flags with _ for -; flags take precedence
    #[arg(long)]
    config: Option<PathBuf>,
    /// Resume the run in --out, with its settings
    #[arg(long)]
    resume: bool,
    /// Print trainable parameters, steps, memory and time of the run, measured over one or two steps, without
    /// writing anything
    #[arg(long, conflicts_with = "resume")]
    dry_run: bool,
}

impl<F: clap::Args + Serialize> Train<F> {
    pub(super) fn run(self, command: Command, json: bool) -> Result<Value> {
        let settings = self.settings(command)?;
        let common = &settings.common;
        let given = |path: &PathBuf| !path.as_os_str().is_empty();
        let needed = [
            ("base", given(&common.base)),
            ("data", !common.data.is_empty()),
            ("out", given(&common.out)),
        ];
        if let Some((name, _)) = needed.iter().find(|(_, given)| !given) {
            return Err(UsageError(format!("--{name} is missing")).into());
        }
        let stop = stop_on_ctrl_c()?;
        let monitor = printer::with_stop(&stop);
        if self.dry_run {
            let Outcome::Done(forecast) = dry_run(&settings, monitor)? else {
                bail!("interrupted; nothing was written")
            };
            if !json {
                say_forecast(&forecast);
            }
            return to_json(&forecast);
        }
        let (name, out) = (command.name(), common.out.display());
        let resume = format!("resume with: quantune {name} --out {out} --resume");
        match train(&settings, self.resume, monitor)? {
            Outcome::NotStarted if self.resume => {
                bail!("interrupted before the first step; the run is unchanged; {resume}")
            }
            Outcome::NotStarted => bail!("interrupted before the first step; nothing was written"),
            Outcome::Interrupted { step, total_steps } => {
                bail!("interrupted at step {step} of {total_steps}, checkpoint saved; {resume}")
            }
            Outcome::Done(summary) => {
                if !json {
                    say_summary(&summary);
                }
                let mut value = to_json(&summary)?;
                if let Some(object) = value.as_object_mut() {
                    object.extend(summary.results);
                }
                Ok(value)
            }
        }
    }

    /// Defaults < the run's own settings (when resuming) < `--config` < flags.
    fn settings(&self, command: Command) -> Result<RunSettings> {
        let mut table = toml::Table::new();
        if self.resume {
            let Some(out) = &self.common.out else { bail!("--resume needs --out") };
            table = RunDir::settings(command, out)?.to_table()?;
        }
        if let Some(path) = &self.config {
            let text = super::read_text(path)?;
            let file: toml::Table =
                toml::from_str(&text).with_context(|| path.display().to_string())?;
            table.extend(file);
            // Errors of the file are reported with its name, before flags are applied.
            RunSettings::from_table(command, table.clone())
                .with_context(|| path.display().to_string())?;
        }
        table.extend(toml::Table::try_from(&self.common)?);
        table.extend(toml::Table::try_from(&self.own)?);
        Ok(RunSettings::from_table(command, table)?)
    }
}

/// A flag that Ctrl-C sets: the run stops after the current step.
pub(super) fn stop_on_ctrl_c() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let asked = stop.clone();
    ctrlc::set_handler(move || {
        if asked.swap(true, Ordering::Relaxed) {
            std::process::exit(130); // pressed twice: exit without another checkpoint
        }
        eprintln!("\nstopping after the current step; press Ctrl-C again to stop at once");
    })
    .context("cannot listen for Ctrl-C")?;
    Ok(stop)
}

fn say_summary(summary: &Summary) {
    let show = |loss: Option<f64>| loss.map_or("-".into(), |loss| format!("{loss:.4}"));
    crate::cli::say!(
        "{} steps, loss {} to {}, {:.0} tokens/s",
        summary.steps,
        show(summary.loss_first),
        show(summary.loss_last),
        summary.tokens_per_second
    );
    let results = &summary.results;
    let number = |key: &str| results.get(key).and_then(Value::as_f64);
    let both = |results: &Map<String, Value>, key: &str| {
        let of = |end: &str| results.get(&format!("{key}_{end}")).and_then(Value::as_f64);
        Some((of("first")?, of("last")?))
    };
    if let Some((first, last)) = both(results, "eval_loss") {
        crate::cli::say!("held-out loss {first:.4} before, {last:.4} after");
    }
    if let Some(accuracy) = number("eval_accuracy") {
        let error = number("eval_calibration_error").unwrap_or(f64::NAN);
        crate::cli::say!(
            "accuracy on held-out pairs {:.1} %, calibration error {error:.3}",
            accuracy * 100.0
        );
    }
    for (key, name) in [
        ("objective/scores", "score"),
        ("reward", "reward"),
        ("objective/kl", "KL"),
        ("eval_reward", "held-out reward"),
        ("eval_judge", "held-out judge"),
    ] {
        if let Some((first, last)) = both(results, key) {
            crate::cli::say!("{name} {first:.3} in the first step, {last:.3} in the last");
        }
    }
    let megabytes = |bytes: Option<usize>| match bytes {
        Some(bytes) => format!("{:.0} MB", bytes as f64 / 1e6),
        None => "-".into(),
    };
    crate::cli::say!(
        "peak memory {}, predicted {}",
        megabytes(process_status_bytes("VmHWM:")),
        megabytes(summary.predicted_peak_rss_bytes)
    );
    if let Some(predicted) = summary.predicted_seconds {
        let seconds = summary.seconds;
        crate::cli::say!("{seconds:.1} s in steps, {predicted:.1} s predicted after the first two");
    }
    crate::cli::say!("adapter: {}", summary.adapter.display());
}

fn say_forecast(forecast: &Forecast) {
    let Forecast { trainable_parameters, modules, steps, epochs, steps_per_epoch, .. } = forecast;
    crate::cli::say!("{trainable_parameters} trainable parameters in {modules} modules");
    let tokens = match forecast.tokens_per_epoch {
        Some(tokens) => format!(", {tokens} tokens"),
        None => String::new(),
    };
    crate::cli::say!(
        "{steps} steps, {epochs:.2} epochs; an epoch: {steps_per_epoch} steps{tokens}"
    );
    let recomputed = match forecast.recomputed_layers {
        0 => "activations of all layers are kept".to_string(),
        layers => format!("{layers} layers are recomputed"),
    };
    let largest = forecast.largest_micro_batch;
    crate::cli::say!("micro-batches of up to {largest} tokens; {recomputed}");
    if let (Some(memory), Some(all)) = (&forecast.memory, forecast.predicted_peak_rss_bytes) {
        for (name, bytes) in memory.components().into_iter().filter(|(_, bytes)| *bytes > 0) {
            crate::cli::say!("{:>10.1} MB  {name}", bytes as f64 / 1e6);
        }
        crate::cli::say!("{:>10.1} MB  predicted peak memory", all as f64 / 1e6);
    } else {
        crate::cli::say!("memory: no prediction for backend reference");
    }
    match (forecast.seconds_per_step, forecast.predicted_seconds) {
        (Some(step), Some(all)) if forecast.time_depends_on_replies => crate::cli::say!(
            "the first update took {step:.1} s, {} updates would take {}; the real time depends on the \
             length of the replies",
            forecast.steps,
            duration(all)
        ),
        (Some(step), Some(all)) => {
            let before = match forecast.reference_seconds {
                0.0 => String::new(),
                seconds => format!(", {} of them for the reference", duration(seconds)),
            };
            let all = duration(all);
            crate::cli::say!("{step:.2} s per step: {all} in total{before}, without evaluations");
        }
        _ => crate::cli::say!("time: not measured, not enough free memory"),
    }
    crate::cli::say!("dry run: nothing was written");
}

/// `37 s`, `12 min` or `3.4 h`.
fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
