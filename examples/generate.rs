//! Generates text: `cargo run --example generate [MODEL] [PROMPT]`.

use std::error::Error;
use std::ops::ControlFlow;

use quantune::generate::{Request, Sampling, Settings, generate};
use quantune::model::{Adapters, CacheType, Decoder};
use quantune::ops::Compute;
use quantune::text::{Special, Tokenizer};
use quantune::weights::Checkpoint;

fn main() -> Result<(), Box<dyn Error>> {
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/model/llama-tiny");
    let mut args = std::env::args().skip(1);
    let model = args.next().unwrap_or_else(|| tiny.into());
    let prompt = args.next().unwrap_or_else(|| "Once upon a time".into());

    let checkpoint = Checkpoint::open(&model)?;
    let tokenizer = Tokenizer::open(&checkpoint)?;
    let decoder = Decoder::load(&checkpoint, Compute::INT16)?;
    let prompt = tokenizer.with_bos(tokenizer.encode(&prompt, Special::AsText)?);
    let settings = Settings {
        sampling: Sampling { temperature: 0.8, top_p: 0.95, seed: 42, ..Sampling::default() },
        max_tokens: 32,
        cache: CacheType::of(decoder.compute),
        logprobs: None,
        sampled_logps: false,
        slots: 0,
    };
    // Two replies in one batch; the tokens of a row depend only on its own key.
    let requests = [Request::new(&prompt, 0), Request::new(&prompt, 1)];
    let generation = generate(
        &decoder,
        Adapters::NONE,
        &requests,
        &settings,
        &|token| tokenizer.is_end_of_generation(token),
        &mut |_row, _token| ControlFlow::Continue(()),
    )?;
    for reply in generation.rows {
        println!("{:?}", tokenizer.decode(&reply.token_ids, true)?);
    }
    Ok(())
}
