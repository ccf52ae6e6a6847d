//! `quantune export`.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use quantune_adapters::format;
use serde_json::{Value, json};

use super::combining::Combining;
use super::{UsageError, load_adapters, open_tokenizer, paths, to_json};
use crate::export::{load_with_added_tokens, lora, modelfile, types, verify};
use crate::model::{ActiveAdapter, Decoder};
use crate::quant::BlockType;
use crate::text::{Tokenizer, added_by_adapters, convert};
use crate::train::settings::AdapterPath;
use crate::weights::{Checkpoint, write_atomically};

#[derive(Debug, clap::Args)]
pub(super) struct Export {
    /// Base model: a GGUF file or a Hugging Face folder
    #[arg(long)]
    base: PathBuf,
    /// Adapter: a PEFT folder or a GGUF LoRA, PATH or PATH=WEIGHT; several require --combination-type
    #[arg(long, requires = "out")]
    adapter: Vec<AdapterPath>,
    #[command(flatten)]
    combining: Combining,
    /// Output: a file that ends in .gguf, for llama.cpp and Ollama, or a PEFT folder
    #[arg(long, requires = "adapter", required_unless_present = "modelfile")]
    out: Option<PathBuf>,
    /// Type of a GGUF LoRA, F32 or F16 [default: F32]
    #[arg(long = "type", value_name = "TYPE", value_parser = types::block_type, requires = "out")]
    dtype: Option<BlockType>,
    /// Output Modelfile for Ollama, with the base and the adapter
    #[arg(long, value_name = "FILE")]
    modelfile: Option<PathBuf>,
}

impl Export {
    pub(super) fn run(self, json: bool) -> Result<Value> {
        let base = Checkpoint::open(&self.base)?;
        let mut value = json!({});
        if let Some(out) = &self.out {
            value = self.adapter(&base, out, json)?;
        }
        if let Some(path) = &self.modelfile {
            let tokenizer = open_tokenizer(&base, &paths(&self.adapter), None)?;
            let beside = path.parent().unwrap_or(Path::new(""));
            let from = relative(&self.base, beside);
            let adapter = self.out.as_ref().map(|out| relative(out, beside));
            let text = modelfile::modelfile(&from, adapter.as_deref(), &tokenizer)?;
            write_atomically(path, |file| file.write_all(text.as_bytes()))?;
            if !json {
                crate::cli::say!("{}: a Modelfile of {}", path.display(), from.display());
            }
            value["modelfile"] = path.display().to_string().into();
        }
        Ok(value)
    }

    /// Writes the adapter, reads it back, and compares the outputs of the base under both.
    fn adapter(&self, base: &Checkpoint, out: &Path, json: bool) -> Result<Value> {
        if self.adapter.len() > 1 && self.combining.combination_type.is_none() {
            let text = "several --adapter require --combination-type";
            return Err(UsageError(text.into()).into());
        }
        let added = added_by_adapters(base, &paths(&self.adapter))?;
        let decoder = load_with_added_tokens(base, &added)?;
        let active = self.combining.combine(load_adapters(&self.adapter, &decoder)?)?;
        let is_gguf = out.extension().is_some_and(|of| of.eq_ignore_ascii_case("gguf"));
        let dtype = self.dtype.unwrap_or(BlockType::F32);
        let bytes = if is_gguf {
            let (one, config) = (&active[0], &decoder.config);
            lora::write_gguf_lora(&one.adapter, one.weight, config, dtype, out)?.bytes
        } else {
            if dtype != BlockType::F32 {
                let text = "--type only applies to a GGUF LoRA, but --out is a folder, which is always F32";
                return Err(UsageError(text.into()).into());
            }
            if active[0].weight != 1.0 {
                bail!("a PEFT folder cannot store the weight {}", active[0].weight);
            }
            format::write_folder(&active[0].adapter, out)?;
            if !added.is_empty() {
                let tokenizer = Tokenizer::open_with(base, &added)?;
                for (name, text) in convert::files_for_adapter(base, &tokenizer)? {
                    let path = out.join(name);
                    std::fs::create_dir_all(path.parent().unwrap_or(out))?;
                    write_atomically(&path, |file| file.write_all(text.as_bytes()))?;
                }
            }
            std::fs::metadata(out.join(format::TENSORS_FILE))?.len()
        };
        let reread = AdapterPath { path: out.into(), weight: 1.0 };
        let found = load_adapters(&[reread], &decoder)?;
        let distance = check(base, &decoder, &active, &found, out, dtype)?;
        if !json {
            crate::cli::say!(
                "{}: {:.1} MB; read back, mean KL from the adapter on the base is {:.2e} over {} tokens",
                out.display(),
                bytes as f64 / 1e6,
                distance.mean_kl,
                distance.tokens
            );
        }
        Ok(json!({
            "out": out.display().to_string(),
            "bytes": bytes,
            "distance": to_json(&distance)?,
        }))
    }
}

fn check(
    base: &Checkpoint,
    decoder: &Decoder,
    wanted: &[ActiveAdapter],
    found: &[ActiveAdapter],
    out: &Path,
    dtype: BlockType,
) -> Result<verify::Distance> {
    let tokens = verify::tokens(base, &decoder.config)?;
    let distance = lora::distance(decoder, wanted, found, &tokens)?;
    let bounds = match dtype {
        BlockType::F32 => verify::VerifyBounds::F32,
        _ => verify::VerifyBounds::F16,
    };
    if let Err(reason) = bounds.check(distance) {
        // Remove only the files that were written, not other files of the folder.
        let written = match out.is_dir() {
            true => vec![out.join(format::TENSORS_FILE), out.join(format::CONFIG_FILE)],
            false => vec![out.to_path_buf()],
        };
        for path in written {
            let _ = std::fs::remove_file(path); // report the distance instead
        }
        bail!("{}: {reason}; it was removed", out.display());
    }
    Ok(distance)
}

/// A path relative to a folder if it is inside, else absolute.
fn relative(path: &Path, folder: &Path) -> PathBuf {
    let whole = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.into());
    let (path, folder) = (whole(path), whole(folder));
    path.strip_prefix(&folder).map_or(path.clone(), Path::to_path_buf)
}
