//! `quantune inspect`.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::Value;

use super::to_json;
use crate::weights::inspect;

#[derive(Debug, clap::Args)]
pub(super) struct Inspect {
    /// A GGUF or safetensors file, a Hugging Face folder or an adapter folder
    path: PathBuf,
}

impl Inspect {
    pub(super) fn run(self, json: bool) -> Result<Value> {
        let inspection = inspect(&self.path)?;
        if !json {
            crate::cli::say!("{inspection}");
        }
        to_json(&inspection)
    }
}
