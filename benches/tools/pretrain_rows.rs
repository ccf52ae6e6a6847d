//! Writes the training and evaluation rows of a pretraining run, so that another program can train on
//! the same data: `pretrain_rows RUN_DIRECTORY OUT_DIRECTORY`.
//!
//! `train.u32` holds the rows of all steps in order, `validation.u32` the held-out rows of an evaluation,
//! both T tokens and the next one, little-endian; `validation.json` the bytes of text
//! that the latter's targets stand for. `benches/peers/pretrain_curve.py` reads them.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, bail};
use quantune::data::Batch;
use quantune::data::corpus::Corpus;
use quantune::text::Tokenizer;
use quantune::train::RunDir;

fn main() -> anyhow::Result<()> {
    let args: Vec<PathBuf> = std::env::args().skip(1).map(PathBuf::from).collect();
    let [run, out] = args.as_slice() else {
        bail!("usage: pretrain_rows RUN_DIRECTORY OUT_DIRECTORY");
    };
    let settings = RunDir::pretrain_settings(run)?;
    let tokenizer = Tokenizer::from_folder(&settings.tokenizer)?;
    let never = AtomicBool::new(false);
    let corpus = Corpus::open(&settings.source, &tokenizer, &settings.corpus(), &never, |_| {})?;

    std::fs::create_dir_all(out)?;
    let file = |name: &str| -> anyhow::Result<_> {
        let path = out.join(name);
        Ok(BufWriter::new(File::create(&path).with_context(|| path.display().to_string())?))
    };
    let mut train = file("train.u32")?;
    for row in 0..settings.total_steps() * settings.rows_of_step() {
        write_row(&mut train, &corpus.batch(row..row + 1))?;
    }
    train.flush()?;
    let (mut validation, mut bytes, mut rows) = (file("validation.u32")?, 0, 0);
    for source in 0..corpus.sources().len() {
        let all = corpus.validation_rows(source);
        let asked = if settings.eval_rows == 0 { all } else { all.min(settings.eval_rows as u64) };
        for row in 0..asked {
            let found = corpus.validation(source, row..row + 1);
            if found.batch.targets.len() < settings.max_length {
                bail!("row {row} of source {source} is short: ask for fewer --eval-rows");
            }
            write_row(&mut validation, &found.batch)?;
            (bytes, rows) = (bytes + found.bytes, rows + 1);
        }
    }
    validation.flush()?;
    let about = serde_json::json!({ "rows": rows, "bytes": bytes, "length": settings.max_length });
    std::fs::write(out.join("validation.json"), about.to_string())?;
    Ok(())
}

/// The tokens of a row, and the target of the last one.
fn write_row(out: &mut impl Write, batch: &Batch) -> anyhow::Result<()> {
    let next = batch.targets.last().map(|&(_, token)| token).context("a row without targets")?;
    for token in batch.tokens.iter().chain([&next]) {
        out.write_all(&token.to_le_bytes())?;
    }
    Ok(())
}
