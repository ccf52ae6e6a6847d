//! Prints the token ids of texts, one line each: `tokenize MODEL FILE [--special]`.
//!
//! The texts of FILE are separated by U+001E; with `--special`, special tokens in them are parsed.
//! `scripts/check/tokenizer.sh` compares the ids with llama.cpp's.

use std::path::PathBuf;

use quantune::text::{Special, Tokenizer};
use quantune::weights::Checkpoint;

fn main() -> anyhow::Result<()> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let special = match args.iter().position(|arg| arg == "--special") {
        Some(at) => {
            args.remove(at);
            Special::Parse
        }
        None => Special::AsText,
    };
    let [model, file] = args.as_slice() else {
        anyhow::bail!("usage: tokenize MODEL FILE [--special]");
    };
    let tokenizer = Tokenizer::open(&Checkpoint::open(PathBuf::from(model))?)?;
    for text in std::fs::read_to_string(file)?.split('\u{1e}') {
        println!("{:?}", tokenizer.encode(text, special)?);
    }
    Ok(())
}
