//! `quantune sft`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{Usage, to_json};
use crate::train::{Outcome, RunDir, SftFlags, SftSettings, sft};

#[derive(Debug, clap::Args)]
pub struct Sft {
    #[command(flatten)]
    flags: SftFlags,
    /// A TOML file of settings, keys as the flags with _ for -; flags win
    #[arg(long)]
    config: Option<PathBuf>,
    /// Go on with the run in --out; its settings need not be given again
    #[arg(long)]
    resume: bool,
}

impl Sft {
    pub fn run(self, json: bool) -> Result<Value> {
        let settings = self.settings()?;
        let needed = [("base", &settings.base), ("data", &settings.data), ("out", &settings.out)];
        if let Some((name, _)) = needed.iter().find(|(_, path)| path.as_os_str().is_empty()) {
            return Err(Usage(format!("--{name} is missing")).into());
        }
        let stop = Arc::new(AtomicBool::new(false));
        let asked = stop.clone();
        ctrlc::set_handler(move || {
            if asked.swap(true, Ordering::Relaxed) {
                std::process::exit(130); // asked twice: the last checkpoint has to do
            }
            eprintln!("\nstopping, after the step under way; Ctrl-C again stops at once");
        })
        .context("cannot listen for Ctrl-C")?;
        let go_on = format!("go on with: quantune sft --out {} --resume", settings.out.display());
        match sft(&settings, self.resume, &stop)? {
            Outcome::NotBegun if self.resume => {
                bail!("stopped before the first step, the run is as it was; {go_on}")
            }
            Outcome::NotBegun => bail!("stopped before the run began; nothing was written"),
            Outcome::Interrupted { step, total_steps } => {
                bail!("stopped at step {step} of {total_steps}, saved; {go_on}")
            }
            Outcome::Done(summary) => {
                if !json {
                    let show = |loss: Option<f64>| loss.map_or("-".into(), |l| format!("{l:.4}"));
                    crate::cli::say!(
                        "{} steps, loss {} to {}, {:.0} tokens/s",
                        summary.steps,
                        show(summary.loss_first),
                        show(summary.loss_last),
                        summary.tokens_per_second
                    );
                    if summary.eval_loss_first.is_some() {
                        crate::cli::say!(
                            "held-out loss {} before, {} after",
                            show(summary.eval_loss_first),
                            show(summary.eval_loss_last)
                        );
                    }
                    crate::cli::say!("adapter: {}", summary.adapter.display());
                }
                to_json(&summary)
            }
        }
    }

    /// Defaults < the run's own settings (when resuming) < `--config` < flags.
    fn settings(&self) -> Result<SftSettings> {
        let given = toml::Table::try_from(&self.flags)?;
        let mut table = toml::Table::new();
        if self.resume {
            let Some(out) = &self.flags.out else { bail!("--resume needs --out") };
            table = toml::Table::try_from(RunDir::settings(out)?)?;
        }
        if let Some(path) = &self.config {
            let text = super::read_text(path)?;
            let file: toml::Table =
                toml::from_str(&text).with_context(|| path.display().to_string())?;
            table.extend(file);
            // Faults are told with the file's name, before flags come in.
            let settings: Result<SftSettings, _> = table.clone().try_into();
            settings.with_context(|| path.display().to_string())?;
        }
        table.extend(given);
        Ok(table.try_into()?)
    }
}
