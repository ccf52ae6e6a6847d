//! `quantune completions`: shell completion scripts.

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::Shell;
use serde_json::{Value, json};

use super::Cli;

#[derive(Debug, clap::Args)]
pub(super) struct Completions {
    /// Shell
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self, json: bool) -> Result<Value> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "quantune", &mut script);
        let script = String::from_utf8(script).context("the script is not UTF-8")?;
        if !json {
            crate::cli::say!("{}", script.trim_end());
        }
        Ok(json!({ "shell": self.shell.to_string(), "script": script }))
    }
}
