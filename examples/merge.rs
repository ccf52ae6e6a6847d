//! Merges an adapter into its base and writes a Hugging Face folder: `cargo run --example merge`.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use quantune::export::{ExportSource, write_folder};
use quantune::model::adapter_files::open_adapter;
use quantune::model::{ActiveAdapter, Decoder};
use quantune::ops::Compute;
use quantune::quant::BlockType;
use quantune::weights::Checkpoint;

fn main() -> Result<(), Box<dyn Error>> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let out = std::env::temp_dir().join(format!("quantune-merge-{}", std::process::id()));

    let base = Checkpoint::open(golden.join("model/llama-tiny"))?;
    let decoder = Decoder::load(&base, Compute::F32)?;
    let folder = golden.join("train/llama-tiny/final");
    let (adapter, unmatched) = open_adapter(&folder, "final", &decoder)?;
    assert!(unmatched.is_empty());

    // Rows of each weight are read, merged and written a few at a time.
    let active = [ActiveAdapter::frozen(Arc::new(adapter))];
    let source = ExportSource::open(&base, &active)?;
    write_folder(&source, BlockType::F16, &out)?;

    let merged = Decoder::load(&Checkpoint::open(&out)?, Compute::F32)?;
    println!("{}: {} layers", out.display(), merged.config.num_hidden_layers);
    Ok(std::fs::remove_dir_all(&out)?)
}
