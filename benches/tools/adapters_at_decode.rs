//! The cost of adapters in decode steps: one adapter compared with none, eight on eight rows at once
//! compared with one after the other, and the effect of their 16-bit weights on log-probabilities.
//!
//! `cargo run --release --example adapters_at_decode -- BASE [--rounds 15] [--tokens 64] [--r 16]`;
//! `RAYON_NUM_THREADS` sets the number of threads. Both sides of a comparison alternate in one process
//! on the same prompts; medians and quartiles are printed. Adapters are random, on all
//! linear layers.

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use quantune::generate::{Engine, Event, Job};
use quantune::model::{ActiveAdapter, Adapters, CacheType, Decoder, Rows};
use quantune::ops::Compute;
use quantune::weights::Checkpoint;
use quantune_adapters::rng::Stream;
use quantune_adapters::{Adapter, InitLoraWeights, LoraConfig, Modules, resolve};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let flag = |name: &str, default: usize| -> Result<usize> {
        match args.iter().position(|arg| arg == name) {
            Some(at) => Ok(args.get(at + 1).ok_or("a flag without a value")?.parse()?),
            None => Ok(default),
        }
    };
    let base = args.first().ok_or("needed: the base, a GGUF or a folder")?.clone();
    let (rounds, tokens, r) = (flag("--rounds", 15)?, flag("--tokens", 64)?, flag("--r", 16)?);
    // Run on a thread of the pool: from outside, every parallel region would wake a thread.
    rayon::scope(|_| measure(&base, rounds, tokens, r))
}

fn measure(base: &str, rounds: usize, tokens: usize, r: usize) -> Result<()> {
    let checkpoint = Checkpoint::open(base)?;
    let decoder = Decoder::load(&checkpoint, Compute::default())?;
    let adapters: Vec<Arc<Adapter>> =
        (0..8).map(|seed| adapter(&decoder, r, seed).map(Arc::new)).collect::<Result<_>>()?;
    let active = |adapter: &Arc<Adapter>| -> Arc<[ActiveAdapter]> {
        [ActiveAdapter::frozen(adapter.clone())].into()
    };
    let threads = rayon::current_num_threads();
    println!("{base}, rank {r}, {tokens} tokens a row, {threads} threads, {rounds} rounds");

    let bare = || seconds(&decoder, &[Arc::new([])], tokens);
    let one = || seconds(&decoder, &[active(&adapters[0])], tokens);
    let [bare, one] = take_turns(rounds, [&bare, &one])?;
    println!("one row, no adapter: {:.2} ms a token {bare}", bare.median * 1e3);
    println!("one row, one adapter: {:.2} ms a token {one}", one.median * 1e3);
    println!("an adapter costs {:.1} %", (one.median / bare.median - 1.0) * 100.0);

    let lists: Vec<Arc<[ActiveAdapter]>> = adapters.iter().map(active).collect();
    let together = || seconds(&decoder, &lists, tokens);
    let in_turn = || {
        let each = lists.iter().map(|list| seconds(&decoder, std::slice::from_ref(list), tokens));
        Ok(each.collect::<Result<Vec<f64>>>()?.iter().sum())
    };
    let no_adapters: Vec<Arc<[ActiveAdapter]>> = (0..8).map(|_| Arc::from([])).collect();
    let eight_bare = || seconds(&decoder, &no_adapters, tokens);
    let [together, in_turn, eight_bare] =
        take_turns(rounds.div_ceil(2), [&together, &in_turn, &eight_bare])?;
    println!("eight rows, no adapter: {:.2} ms a step {eight_bare}", eight_bare.median * 1e3);
    println!("eight rows, eight adapters: {:.2} ms a step {together}", together.median * 1e3);
    println!("one after the other: {:.2} ms a token of each {in_turn}", in_turn.median * 1e3);
    println!("together is {:.2} times as fast", in_turn.median / together.median);

    rounding(&checkpoint, &adapters[0])
}

/// An adapter over all linear layers, with updates of about a tenth of the layer's output.
fn adapter(decoder: &Decoder, r: usize, seed: u64) -> Result<Adapter> {
    let config = LoraConfig {
        r,
        lora_alpha: 2.0 * r as f64,
        target_modules: Some(Modules::Expression("all-linear".into())),
        init_lora_weights: InitLoraWeights::Random,
        ..Default::default()
    };
    let targets = resolve(&config, &decoder.linears(), Some("lm_head"))?.targets;
    let adapter = Adapter::new("a", config, &targets, seed, &Device::Cpu)?;
    for lora in adapter.modules.values() {
        lora.b.set(&(lora.b.as_tensor() * 0.1)?)?;
    }
    Ok(adapter)
}

/// Seconds per decode step over rows that use these adapters, without prefill.
fn seconds(decoder: &Decoder, lists: &[Arc<[ActiveAdapter]>], tokens: usize) -> Result<f64> {
    let mut engine = Engine::new(decoder, CacheType::of(decoder.compute), 0);
    for (row, active) in lists.iter().enumerate() {
        let prompt = (0..16).map(|t| 100 + 13 * t + row as u32).collect();
        engine.submit(Job { active: active.clone(), ..Job::new(prompt, tokens + 1) })?;
    }
    let mut begun = 0;
    while begun < lists.len() {
        begun += engine.step()?.iter().filter(|e| matches!(e, Event::Token { .. })).count();
    }
    let (started, before) = (Instant::now(), engine.usage().steps);
    while !engine.is_idle() {
        engine.step()?;
    }
    Ok(started.elapsed().as_secs_f64() / (engine.usage().steps - before) as f64)
}

struct Times {
    median: f64,
    quarters: [f64; 2],
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "({:.2} to {:.2})", self.quarters[0] * 1e3, self.quarters[1] * 1e3)
    }
}

/// Runs all sides once per round, in rotating order; the first round is a warm-up.
fn take_turns<const N: usize>(
    rounds: usize,
    sides: [&dyn Fn() -> Result<f64>; N],
) -> Result<[Times; N]> {
    let mut times = [const { Vec::new() }; N];
    for round in 0..=rounds {
        for side in 0..N {
            let side = (side + round) % N;
            let seconds = sides[side]()?;
            if round > 0 {
                times[side].push(seconds);
            }
        }
    }
    Ok(times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
        Times { median: at(0.5), quarters: [at(0.25), at(0.75)] }
    }))
}

/// Change of log-probabilities if only an adapter's weights are rounded.
fn rounding(checkpoint: &Checkpoint, adapter: &Adapter) -> Result<()> {
    let decoder = Decoder::load(checkpoint, Compute::F32)?;
    let mut stream = Stream::new(3, "tokens", &[]);
    let row: Vec<u32> = (0..256).map(|_| stream.below(40_000) as u32).collect();
    let log_probs = |adapter: Option<Adapter>| -> Result<Vec<f32>> {
        let active: Vec<ActiveAdapter> =
            adapter.map(|a| ActiveAdapter::frozen(Arc::new(a))).into_iter().collect();
        let hidden = decoder.hidden(&Rows::new(&[&row]), Adapters::Same(&active))?;
        let hidden = hidden.narrow(0, 0, row.len() - 1)?;
        Ok(decoder.log_probs(&hidden, &row[1..], &active)?)
    };
    let rounded = |round: &dyn Fn(f32) -> f32| -> Result<Adapter> {
        let copy = adapter.copy("rounded")?;
        for var in copy.modules.values().flat_map(|lora| [&lora.a, &lora.b]) {
            let values = var.flatten_all()?.to_vec1::<f32>()?.into_iter().map(round);
            var.set(
                &Tensor::from_vec(values.collect(), var.shape(), &Device::Cpu)?
                    .to_dtype(DType::F32)?,
            )?;
        }
        Ok(copy)
    };
    let exact = log_probs(Some(adapter.copy("exact")?))?;
    let cases: [(&str, Option<Adapter>); 3] = [
        ("f16", Some(rounded(&|x| f16::from_f32(x).to_f32())?)),
        ("bf16", Some(rounded(&|x| bf16::from_f32(x).to_f32())?)),
        ("without the adapter", None),
    ];
    for (name, adapter) in cases {
        let moved: Vec<f32> =
            log_probs(adapter)?.iter().zip(&exact).map(|(a, b)| (a - b).abs()).collect();
        let mean = moved.iter().sum::<f32>() / moved.len() as f32;
        let most = moved.iter().copied().fold(0.0, f32::max);
        println!("log-probs, {name}: moved by {mean:.1e} in the mean, at most {most:.1e}");
    }
    Ok(())
}
