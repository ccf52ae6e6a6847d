//! `quantune pretrain`: training from random weights, or of all weights of a base.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::flags::PretrainFlags;
use super::train::stop_on_ctrl_c;
use super::{UsageError, printer, to_json};
use crate::train::settings::PretrainSettings;
use crate::train::{Outcome, RunDir, pretrain};

/// Flags of `pretrain`.
#[derive(Debug, clap::Args)]
pub(super) struct Pretrain {
    #[command(flatten)]
    flags: PretrainFlags,
    /// TOML file of settings; keys are flags with _ for -; flags take precedence
    #[arg(long)]
    config: Option<PathBuf>,
    /// Resume the run in --out, with its settings
    #[arg(long)]
    resume: bool,
}

impl Pretrain {
    pub(super) fn run(self, json: bool) -> Result<Value> {
        let settings = self.settings()?;
        if settings.out.as_os_str().is_empty() {
            return Err(UsageError("--out is missing".into()).into());
        }
        let stop = stop_on_ctrl_c()?;
        let resume =
            format!("resume with: quantune pretrain --out {} --resume", settings.out.display());
        match pretrain(&settings, self.resume, printer::with_stop(&stop))? {
            Outcome::NotStarted if self.resume => {
                bail!("interrupted before the first step; the run is unchanged; {resume}")
            }
            Outcome::NotStarted => bail!(
                "interrupted before the first step; sources that are already tokenized are kept"
            ),
            Outcome::Interrupted { step, total_steps } => {
                bail!("interrupted at step {step} of {total_steps}, checkpoint saved; {resume}")
            }
            Outcome::Done(summary) => {
                let results = &summary.results;
                if !json {
                    crate::cli::say!(
                        "{} steps, loss {:.4} to {:.4}, {:.0} tokens/s",
                        summary.steps,
                        summary.loss_first.unwrap_or(f64::NAN),
                        summary.loss_last.unwrap_or(f64::NAN),
                        summary.tokens_per_second
                    );
                    let of = |key: &str| results.get(key).and_then(Value::as_f64);
                    if let (Some(first), Some(last)) =
                        (of("eval_bits_per_byte_first"), of("eval_bits_per_byte_last"))
                    {
                        crate::cli::say!("{first:.3} bits per byte before, {last:.3} after");
                    }
                    for source in &summary.sources {
                        crate::cli::say!("source {source}");
                    }
                    crate::cli::say!("model: {}", summary.model.display());
                    if let Some(export) = &summary.export {
                        crate::cli::say!("GGUF: {}", export.display());
                    }
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
    fn settings(&self) -> Result<PretrainSettings> {
        let mut table = toml::Table::new();
        if self.resume {
            let Some(out) = &self.flags.out else { bail!("--resume needs --out") };
            table = RunDir::pretrain_settings(out)?.to_table()?;
        }
        if let Some(path) = &self.config {
            let text = super::read_text(path)?;
            let file: toml::Table =
                toml::from_str(&text).with_context(|| path.display().to_string())?;
            table.extend(file);
            // Errors of the file are reported with its name, before flags are applied.
            PretrainSettings::from_table(table.clone())
                .with_context(|| path.display().to_string())?;
        }
        table.extend(toml::Table::try_from(&self.flags)?);
        Ok(PretrainSettings::from_table(table)?)
    }
}
