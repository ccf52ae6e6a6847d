//! Swapping adapters in a running engine: every request keeps the adapter it started with, the tokens of a row
//! are those it gets alone, and memory of dropped adapters is freed.

use std::collections::HashMap;
use std::process::Command;
use std::sync::{Arc, Weak};

use candle_core::{DType, Device};
use quantune::generate::{Engine, Event, Finish, Generated, Job, Prefix, Sampling};
use quantune::model::{ActiveAdapter, CacheType, Decoder};
use quantune::ops::Compute;
use quantune_adapters::config::{InitLoraWeights, LoraConfig, Modules};
use quantune_adapters::delta::{Adapter, Magnitude};
use quantune_adapters::registry::{Registry, RegistryLimits};
use quantune_adapters::targets::resolve;

use crate::support::load;

/// An adapter over all linear layers that changes what is generated.
fn adapter(decoder: &Decoder, r: usize, seed: u64) -> Arc<Adapter> {
    let config = LoraConfig {
        r,
        target_modules: Some(Modules::Expression("all-linear".into())),
        init_lora_weights: InitLoraWeights::Random,
        ..Default::default()
    };
    let targets = resolve(&config, &decoder.linears(), Some("lm_head")).unwrap().targets;
    Arc::new(Adapter::new("a", config, &targets, seed, &Device::Cpu).unwrap())
}

fn active(adapter: &Arc<Adapter>, weight: f64) -> ActiveAdapter {
    ActiveAdapter { weight, ..ActiveAdapter::frozen(adapter.clone()) }
}

fn prompt(decoder: &Decoder, index: usize, length: usize) -> Vec<u32> {
    let vocab_size = decoder.config.vocab_size as u32;
    (0..length as u32).map(|t| (t * 31 + index as u32 * 7 + 1) % vocab_size).collect()
}

fn job(prompt: Vec<u32>, active: &[ActiveAdapter], key: u64, max_tokens: usize) -> Job {
    let sampling = Sampling { temperature: 1.5, seed: 8, ..Sampling::default() };
    Job {
        active: active.into(),
        sampling,
        rng_key: key,
        logprobs: Some(2),
        ..Job::new(prompt, max_tokens)
    }
}

/// The result of a row, to the bit.
fn bits(row: &Generated) -> (Vec<u32>, Finish, Vec<u32>) {
    let logprobs = row.token_logprobs.iter().map(|x| x.to_bits()).collect();
    (row.token_ids.clone(), row.finish, logprobs)
}

/// Steps until the engine is idle; returns the finished rows by id.
fn drain(engine: &mut Engine) -> HashMap<usize, Generated> {
    let mut rows = HashMap::new();
    while !engine.is_idle() {
        for event in engine.step().unwrap() {
            if let Event::Finished { id, output } = event {
                assert!(rows.insert(id, output.generated).is_none());
            }
        }
    }
    rows
}

fn alone(decoder: &Decoder, job: Job) -> Generated {
    let mut engine = Engine::new(decoder, CacheType::F32, 1);
    engine.submit(job).unwrap();
    drain(&mut engine).remove(&0).unwrap()
}

fn resident_bytes() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<usize>().ok()? * 1024)
}

/// Set in the process that runs [`a_thousand_swaps`], so that other tests do not add to its memory.
const APART: &str = "QUANTUNE_TEST_SWAPS";

#[test]
fn a_thousand_swaps() {
    if std::env::var_os(APART).is_none() {
        let test = ["--exact", "hot_swap::a_thousand_swaps", "--nocapture"];
        let mut apart = Command::new(std::env::current_exe().unwrap());
        let output = apart.args(test).env(APART, "1").output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{stdout}{}", String::from_utf8_lossy(&output.stderr));
        assert!(stdout.contains("1 passed"), "{stdout}");
        print!("{stdout}");
        return;
    }
    const KINDS: usize = 12;
    const PROMPTS: usize = 7;
    let decoder = load("llama-q4_0", Compute::INT16);
    let kinds: Vec<Arc<Adapter>> =
        (0..KINDS).map(|kind| adapter(&decoder, 1 + kind % 5, kind as u64)).collect();
    let job_of = |adapter: &Arc<Adapter>, index: usize| {
        let prompt = prompt(&decoder, index % PROMPTS, 4 + index % PROMPTS);
        job(prompt, &[active(adapter, 1.0)], (index % PROMPTS) as u64, 6)
    };
    let mut expected = HashMap::new();
    for (kind, adapter) in kinds.iter().enumerate() {
        for index in 0..PROMPTS {
            let alone = alone(&decoder, job_of(adapter, index));
            expected.insert((kind, index), bits(&alone));
        }
    }
    let different: std::collections::HashSet<_> =
        (0..KINDS).map(|kind| expected[&(kind, 0)].0.clone()).collect();
    assert!(different.len() > KINDS / 2, "adapters change nothing");

    let registry = Registry::new(&decoder.linears(), RegistryLimits::default());
    registry.insert("voice", Arc::new(kinds[0].copy("0").unwrap())).unwrap();
    let mut engine = Engine::new(&decoder, CacheType::F32, 6);
    let mut asked = HashMap::new();
    let mut dropped: Vec<Weak<Adapter>> = Vec::new();
    let (mut finished, mut warm) = (0, None);
    for swap in 1..=1000usize {
        let kind = swap * 5 % KINDS;
        let fresh = Arc::new(kinds[kind].copy(&kind.to_string()).unwrap());
        dropped.push(Arc::downgrade(&registry.replace("voice", fresh).unwrap()));
        let adapter = registry.get("voice").unwrap();
        let kind: usize = adapter.name.parse().unwrap();
        let id = engine.submit(job_of(&adapter, swap)).unwrap();
        asked.insert(id, (kind, swap % PROMPTS));
        drop(adapter);
        // About as many tokens are decoded as requested: the slots stay full.
        for _ in 0..2 {
            for event in engine.step().unwrap() {
                if let Event::Finished { id, output } = event {
                    let key = asked.remove(&id).unwrap();
                    assert_eq!(bits(&output.generated), expected[&key], "request {id}");
                    finished += 1;
                }
            }
        }
        let held = dropped.iter().filter(|adapter| adapter.strong_count() > 0).count();
        assert!(held <= asked.len(), "{held} dropped adapters for {} requests", asked.len());
        if swap == 300 {
            warm = resident_bytes();
        }
        while asked.len() > 40 {
            for event in engine.step().unwrap() {
                if let Event::Finished { id, output } = event {
                    let key = asked.remove(&id).unwrap();
                    assert_eq!(bits(&output.generated), expected[&key], "request {id}");
                    finished += 1;
                }
            }
        }
    }
    let under_load = asked.len();
    for (id, generated) in drain(&mut engine) {
        assert_eq!(bits(&generated), expected[&asked.remove(&id).unwrap()], "request {id}");
        finished += 1;
    }
    assert_eq!((finished, asked.len()), (1000, 0));
    assert!(dropped.iter().all(|adapter| adapter.upgrade().is_none()));
    if let (Some(warm), Some(end)) = (warm, resident_bytes()) {
        println!("{warm} bytes after 300 swaps, {end} after 1000; {under_load} under way");
        assert!(end < warm + (4 << 20), "memory grew from {warm} to {end} bytes");
    }
}

/// Rows with different ranks and weights, several adapters or none: each is bit-identical to running alone,
/// whenever it was submitted and whichever other row was cancelled.
#[test]
fn rows_use_any_adapters() {
    for (compute, name) in [(Compute::F32, "llama-tiny"), (Compute::INT16, "llama-q4_0")] {
        let decoder = load(name, compute);
        let adapters: Vec<Arc<Adapter>> =
            [1, 3, 8, 16].iter().map(|&r| adapter(&decoder, r, r as u64)).collect();
        let lists: Vec<Vec<ActiveAdapter>> = vec![
            vec![],
            vec![active(&adapters[0], 1.0)],
            vec![active(&adapters[1], 0.7)],
            vec![active(&adapters[2], 1.0), active(&adapters[3], -0.5)],
            vec![active(&adapters[3], 1.0)],
            vec![active(&adapters[3], 0.25), active(&adapters[1], 1.0), active(&adapters[0], 2.0)],
        ];
        let jobs: Vec<Job> = (0..30)
            .map(|i| {
                let prompt = prompt(&decoder, i / 2, 3 + (i / 2 * 23) % 57);
                job(prompt, &lists[i * 7 / 2 % lists.len()], i as u64, 3 + i % 9)
            })
            .collect();
        let alone: Vec<_> =
            jobs.iter().map(|job| bits(&self::alone(&decoder, job.clone()))).collect();
        let bare: Vec<_> = jobs
            .iter()
            .map(|job| bits(&self::alone(&decoder, Job { active: Arc::new([]), ..job.clone() })))
            .collect();
        let changed = alone.iter().zip(&bare).filter(|(a, b)| a.0 != b.0).count();
        assert!(changed > 15, "adapters change {changed} rows");

        for slots in [1, 4, 0] {
            let mut engine = Engine::new(&decoder, CacheType::F32, slots);
            let (mut rows, mut cancelled) = (HashMap::new(), 0);
            for (i, job) in jobs.iter().enumerate() {
                assert_eq!(engine.submit(job.clone()).unwrap(), i);
                for _ in 0..i % 3 {
                    for event in engine.step().unwrap() {
                        if let Event::Finished { id, output } = event {
                            rows.insert(id, output.generated);
                        }
                    }
                }
                // The output of a cancelled job is a prefix of the full output.
                if i % 6 == 5
                    && let Some(output) = engine.cancel(i - 2)
                {
                    cancelled += 1;
                    assert_eq!(output.generated.finish, Finish::Callback);
                    let got = output.generated.token_ids;
                    assert_eq!(got, alone[i - 2].0[..got.len()], "{name}, row {}", i - 2);
                    assert!(engine.cancel(i - 2).is_none());
                }
            }
            rows.extend(drain(&mut engine));
            assert_eq!(rows.len() + cancelled, jobs.len());
            assert!(cancelled > 0 || slots == 0, "{slots} slots");
            for (id, row) in rows {
                assert_eq!(bits(&row), alone[id], "{name}, {slots} slots, row {id}");
            }
        }
    }
}

#[test]
fn a_failed_row_leaves_the_others_unchanged() {
    let decoder = load("llama-tiny", Compute::F32);
    let broken = adapter(&decoder, 2, 1);
    let b = &broken.modules.values().next().unwrap().b;
    b.set(&(b.as_tensor() * f64::NAN).unwrap()).unwrap();
    let good = job(prompt(&decoder, 1, 9), &[], 1, 8);
    let bad = job(prompt(&decoder, 2, 9), &[active(&broken, 1.0)], 2, 8);
    let mut engine = Engine::new(&decoder, CacheType::F32, 0);
    engine.submit(good.clone()).unwrap();
    // Prefilled separately: in one pass it would affect the other prompt.
    assert!(matches!(engine.step().unwrap()[..], [Event::Token { id: 0, .. }]));
    engine.submit(bad).unwrap();
    let (mut ended, mut failed) = (Vec::new(), Vec::new());
    while !engine.is_idle() {
        for event in engine.step().unwrap() {
            match event {
                Event::Token { id, .. } => assert_eq!(id, 0),
                Event::Finished { id, output: row } => ended.push((id, row.generated)),
                Event::Failed { id, error } => failed.push((id, error.to_string())),
            }
        }
    }
    assert_eq!(ended.len(), 1);
    assert_eq!(bits(&ended[0].1), bits(&alone(&decoder, good)));
    let [(1, error)] = &failed[..] else { panic!("{failed:?}") };
    assert!(
        error.contains("row 1, position 9") && error.contains("the model computes NaN or Inf"),
        "{error}"
    );
}

/// A conversation continues from its prompt cache, with the same adapters only.
#[test]
fn a_cached_prefix_is_not_recomputed() {
    let decoder = load("llama-tiny", Compute::F32);
    let adapters = [adapter(&decoder, 4, 1), adapter(&decoder, 4, 2)];
    let lists = [vec![], vec![active(&adapters[0], 1.0)], vec![active(&adapters[1], 1.0)]];
    let keeping = |prompt: Vec<u32>, active: &[ActiveAdapter], prefix: Option<Prefix>| {
        let job = job(prompt, active, 0, 7);
        Job { sampling: Sampling::greedy(), prefix, keep_cache: true, ..job }
    };
    for list in &lists {
        let first = prompt(&decoder, 3, 30);
        let mut engine = Engine::new(&decoder, CacheType::F32, 0);
        let mut run = |job: Job| {
            let before = engine.usage();
            engine.submit(job).unwrap();
            loop {
                for event in engine.step().unwrap() {
                    if let Event::Finished { output, .. } = event {
                        let usage = engine.usage();
                        let computed = usage.prompt_tokens - before.prompt_tokens;
                        let cached = usage.cached_prompt_tokens - before.cached_prompt_tokens;
                        return (output, computed, cached);
                    }
                }
            }
        };
        let (output, computed, cached) = run(keeping(first.clone(), list, None));
        assert_eq!((computed, cached), (30, 0));
        let prefix = output.prefix.unwrap();
        // The last of 7 new tokens is not in the cache.
        let mut next = [&first[..], &output.generated.token_ids].concat();
        assert_eq!(prefix.cached_len(&next, list), 36);
        next.extend(prompt(&decoder, 5, 8));
        let (again, computed, cached) = run(keeping(next.clone(), list, Some(prefix.clone())));
        assert_eq!((computed, cached), (9, 36));
        let anew = alone(&decoder, keeping(next.clone(), list, None));
        assert_eq!(again.generated.token_ids, anew.token_ids);
        for (a, b) in again.generated.token_logprobs.iter().zip(&anew.token_logprobs) {
            assert!((a - b).abs() < 1e-4, "{a} and {b}");
        }
        // The same prompt again: all but its last token is cached, bit-identically.
        let (same, computed, cached) = run(keeping(first.clone(), list, Some(prefix.clone())));
        assert_eq!((computed, cached), (1, 29));
        assert_eq!(bits(&same.generated), bits(&output.generated));
        for other in lists.iter().filter(|other| !ActiveAdapter::same(other, list)) {
            assert_eq!(prefix.cached_len(&next, other), 0);
            let (output, computed, cached) =
                run(keeping(next.clone(), other, Some(prefix.clone())));
            assert_eq!((computed, cached), (next.len(), 0));
            let anew = alone(&decoder, keeping(next.clone(), other, None));
            assert_eq!(bits(&output.generated), bits(&anew));
        }
    }
}

/// The decode weights of an adapter are recomputed after its parameters have changed.
#[test]
fn a_changed_adapter_is_recomputed() {
    for compute in [Compute::F32, Compute::INT16] {
        let decoder = load("llama-q4_0", compute);
        let learning = adapter(&decoder, 4, 1);
        let other = adapter(&decoder, 4, 2);
        let of =
            |adapter: &Arc<Adapter>| job(prompt(&decoder, 1, 9), &[active(adapter, 1.0)], 1, 8);
        let run = |adapter: &Arc<Adapter>| bits(&alone(&decoder, of(adapter)));
        // An engine caches the decode weights of an adapter across steps.
        let mut engine = Engine::new(&decoder, CacheType::F32, 1);
        let mut again = |adapter: &Arc<Adapter>| {
            let id = engine.submit(of(adapter)).unwrap();
            bits(&drain(&mut engine)[&id])
        };
        let before = run(&learning);
        assert_eq!(again(&learning), before);
        for (to, from) in learning.modules.values().zip(other.modules.values()) {
            to.a.set(from.a.as_tensor()).unwrap();
            to.b.set(from.b.as_tensor()).unwrap();
        }
        learning.invalidate_decode_weights();
        assert_ne!(run(&learning), before);
        assert_eq!(run(&learning), run(&other));
        assert_eq!(again(&learning), run(&other));
    }
}

/// Within a row too: from then on the row uses the changed adapter.
#[test]
fn an_adapter_that_changes_within_a_row_is_recomputed() {
    let decoder = load("llama-q4_0", Compute::INT16);
    let (first, last) = (adapter(&decoder, 4, 1), adapter(&decoder, 4, 2));
    let run = |found_before: bool| {
        let (learning, beside) = (adapter(&decoder, 4, 1), adapter(&decoder, 3, 5));
        let mut engine = Engine::new(&decoder, CacheType::F32, 1);
        let active = [active(&beside, 0.5), active(&learning, 1.0)];
        engine.submit(job(prompt(&decoder, 2, 9), &active, 1, 12)).unwrap();
        let steps = if found_before { 4 } else { 1 }; // the first reads the prompt, and decodes nothing
        for _ in 0..steps {
            engine.step().unwrap();
        }
        for (to, from) in learning.modules.values().zip(last.modules.values()) {
            to.a.set(from.a.as_tensor()).unwrap();
            to.b.set(from.b.as_tensor()).unwrap();
        }
        learning.invalidate_decode_weights();
        bits(&drain(&mut engine)[&0])
    };
    let unchanged = {
        let active = [active(&adapter(&decoder, 3, 5), 0.5), active(&first, 1.0)];
        bits(&alone(&decoder, job(prompt(&decoder, 2, 9), &active, 1, 12)))
    };
    let (early, late) = (run(false), run(true));
    assert_eq!(late.2[..4], unchanged.2[..4]);
    assert_ne!(late.2[4..], unchanged.2[4..]);
    assert_eq!(early.2[..1], unchanged.2[..1]);
    assert_ne!(early, late);
}

/// Results do not depend on threads or on engines that run in parallel.
#[test]
fn engines_in_any_pool_and_side_by_side() {
    let decoder = load("llama-q4_0", Compute::INT16);
    // With magnitudes, whose norms are computed in parallel on first use.
    let mut shared = Arc::into_inner(adapter(&decoder, 4, 3)).unwrap();
    for lora in shared.modules.values_mut() {
        let ones = candle_core::Var::ones(lora.out_features(), DType::F32, &Device::Cpu).unwrap();
        lora.magnitude = Some(Magnitude::new(ones));
    }
    let shared = Arc::new(shared);
    let answer = || {
        let mut engine = Engine::new(&decoder, CacheType::F32, 3);
        for row in 0..5 {
            let active = [active(&shared, 1.0), active(&adapter(&decoder, 2, row), 0.5)];
            engine.submit(job(prompt(&decoder, row as usize, 7), &active, row, 10)).unwrap();
        }
        let rows = drain(&mut engine);
        (0..5).map(|id| bits(&rows[&id])).collect::<Vec<_>>()
    };
    let outside = answer();
    for threads in [1, 3, 5] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(pool.install(answer), outside, "{threads} threads");
        shared.invalidate_decode_weights();
        std::thread::scope(|scope| {
            let engines = [(); 3].map(|()| scope.spawn(|| pool.install(answer)));
            for engine in engines {
                assert_eq!(engine.join().unwrap(), outside, "{threads} threads, three engines");
            }
        });
    }
}
