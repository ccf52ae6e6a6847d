//! The commands that train: `quantune sft`, `reward`, `dpo`, `ppo` and `grpo`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::{Map, Value};

use super::flags::CommonFlags;
use super::{Usage, printer, to_json};
use crate::train::{
    Command, Forecast, Outcome, RunDir, RunSettings, Summary, dry_run, of_process, train,
};

/// A training command with flags of its own.
#[derive(Debug, clap::Args)]
pub struct Train<F: clap::Args> {
    #[command(flatten)]
    common: CommonFlags,
    #[command(flatten)]
    own: F,
    /// A TOML file of settings, keys as the flags with _ for -; flags win
    #[arg(long)]
    config: Option<PathBuf>,
    /// Go on with the run in --out; its settings need not be given again
    #[arg(long)]
    resume: bool,
    /// Say what the run would be, and write nothing: trainable parameters, steps, memory and time, by
    /// its first step or two
    #[arg(long, conflicts_with = "resume")]
    dry_run: bool,
}

impl<F: clap::Args + Serialize> Train<F> {
    pub fn run(self, command: Command, json: bool) -> Result<Value> {
        let settings = self.settings(command)?;
        let common = &settings.common;
        let given = |path: &PathBuf| !path.as_os_str().is_empty();
        let needed = [
            ("base", given(&common.base)),
            ("data", !common.data.is_empty()),
            ("out", given(&common.out)),
        ];
        if let Some((name, _)) = needed.iter().find(|(_, given)| !given) {
            return Err(Usage(format!("--{name} is missing")).into());
        }
        let stop = stop_on_ctrl_c()?;
        let monitor = printer::with_stop(&stop);
        if self.dry_run {
            let Outcome::Done(forecast) = dry_run(&settings, monitor)? else {
                bail!("stopped before anything was said; nothing was written")
            };
            if !json {
                say_forecast(&forecast);
            }
            return to_json(&forecast);
        }
        let (name, out) = (command.name(), common.out.display());
        let go_on = format!("go on with: quantune {name} --out {out} --resume");
        match train(&settings, self.resume, monitor)? {
            Outcome::NotBegun if self.resume => {
                bail!("stopped before the first step, the run is as it was; {go_on}")
            }
            Outcome::NotBegun => bail!("stopped before the run began; nothing was written"),
            Outcome::Interrupted { step, total_steps } => {
                bail!("stopped at step {step} of {total_steps}, saved; {go_on}")
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
            // Faults are told with the file's name, before flags come in.
            RunSettings::from_table(command, table.clone())
                .with_context(|| path.display().to_string())?;
        }
        table.extend(toml::Table::try_from(&self.common)?);
        table.extend(toml::Table::try_from(&self.own)?);
        Ok(RunSettings::from_table(command, table)?)
    }
}

/// What Ctrl-C sets: the step under way is the last.
pub fn stop_on_ctrl_c() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let asked = stop.clone();
    ctrlc::set_handler(move || {
        if asked.swap(true, Ordering::Relaxed) {
            std::process::exit(130); // asked twice: the last checkpoint has to do
        }
        eprintln!("\nstopping, after the step under way; Ctrl-C again stops at once");
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
            "right about {:.1} % of held-out pairs, calibration error {error:.3}",
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
        megabytes(of_process("VmHWM:")),
        megabytes(summary.predicted_peak_rss_bytes)
    );
    if let Some(predicted) = summary.predicted_seconds {
        let seconds = summary.seconds;
        crate::cli::say!("{seconds:.1} s in steps, {predicted:.1} s predicted after two of them");
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
        0 => "all layers keep their tapes".to_string(),
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
        crate::cli::say!("memory: not predicted of the portable form, whose tapes are candle's");
    }
    match (forecast.seconds_per_step, forecast.predicted_seconds) {
        (Some(step), Some(all)) if forecast.time_depends_on_replies => crate::cli::say!(
            "the first update took {step:.1} s, {} such take {}; how long an update really takes \
             depends on how long replies get",
            forecast.steps,
            duration(all)
        ),
        (Some(step), Some(all)) => {
            let before = match forecast.reference_seconds {
                0.0 => String::new(),
                seconds => format!(", {} of them for the reference", duration(seconds)),
            };
            let all = duration(all);
            crate::cli::say!("{step:.2} s a step: {all} in all{before}, without evaluations");
        }
        _ => crate::cli::say!("time: not measured, so much memory is not free"),
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
