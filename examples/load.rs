//! Loads a model and scores a text: `cargo run --example load [MODEL] [TEXT]`.
//!
//! MODEL is a GGUF file or a Hugging Face folder; without one, a tiny model of the tests is loaded.

use std::error::Error;

use quantune::model::{Adapters, Decoder, Rows};
use quantune::ops::Compute;
use quantune::text::{Special, Tokenizer};
use quantune::weights::Checkpoint;

fn main() -> Result<(), Box<dyn Error>> {
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/model/llama-tiny");
    let mut args = std::env::args().skip(1);
    let model = args.next().unwrap_or_else(|| tiny.into());
    let text = args.next().unwrap_or_else(|| "Once upon a time".into());

    let checkpoint = Checkpoint::open(&model)?;
    let tokenizer = Tokenizer::open(&checkpoint)?;
    // Weights stay in the file, which is memory-mapped; int16 is the fast precision.
    let decoder = Decoder::load(&checkpoint, Compute::INT16)?;
    let config = &decoder.config;
    println!("{} layers, hidden size {}", config.num_hidden_layers, config.hidden_size);

    let tokens = tokenizer.with_bos(tokenizer.encode(&text, Special::AsText)?);
    let hidden = decoder.hidden(&Rows::new(&[&tokens]), Adapters::NONE)?;
    let logits = decoder.logits(&hidden, Adapters::NONE)?;
    println!("{} tokens, logits {:?}", tokens.len(), logits.dims());
    Ok(())
}
