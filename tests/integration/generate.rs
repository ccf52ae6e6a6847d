//! Sampling against transformers' logits processors; batched decoding against whole rows.

use std::ops::ControlFlow;
use std::sync::Arc;

use quantune::generate::{
    Finish, Generated, LogProbs, Request, Sampling, Settings, generate, log_probs_top_k,
};
use quantune::model::{ActiveAdapter, Adapters, CacheType, Decoder, Rows};
use quantune::ops::Compute;
use quantune_adapters::config::{InitLoraWeights, LoraConfig, Modules};
use quantune_adapters::delta::Adapter;
use quantune_adapters::rng::Stream;
use quantune_adapters::targets::resolve;

use crate::support::{golden_json, ids, load, log_softmax};

#[test]
fn distributions_match_transformers() {
    let cases = golden_json("generate/sampling.json");
    let cases = cases.as_array().unwrap();
    assert_eq!(cases.len(), 63);
    for case in cases {
        let number = |key: &str| case["settings"][key].as_f64().unwrap();
        let sampling = Sampling {
            temperature: number("temperature"),
            top_k: number("top_k") as usize,
            top_p: number("top_p"),
            min_p: number("min_p"),
            repetition_penalty: number("repetition_penalty"),
            seed: 0,
        };
        let floats = |key: &str| -> Vec<f64> {
            case[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
        };
        let logits: Vec<f32> = floats("logits").into_iter().map(|x| x as f32).collect();
        let seen = ids(&case["seen"]);
        let mut ours = sampling.distribution(&logits, &seen).unwrap();
        ours.sort_by_key(|(id, _)| *id);
        let theirs = case["probabilities"].as_array().unwrap();
        let ids = |choices: &[(u32, f64)]| choices.iter().map(|c| c.0).collect::<Vec<_>>();
        let theirs: Vec<(u32, f64)> = theirs
            .iter()
            .map(|pair| (pair[0].as_u64().unwrap() as u32, pair[1].as_f64().unwrap()))
            .collect();
        assert_eq!(ids(&ours), ids(&theirs), "{sampling:?}");
        for ((_, ours), (_, theirs)) in ours.iter().zip(&theirs) {
            assert!((ours - theirs).abs() < 1e-5, "{sampling:?}: {ours} against {theirs}");
        }

        let theirs = floats("log_probs");
        let log_probs = LogProbs::new(&logits).unwrap();
        let top = log_probs_top_k(&logits, 7).unwrap();
        assert_eq!(top.len(), 7);
        assert!(top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
        for (id, ours) in top.iter().copied().chain((0..48).map(|id| (id, log_probs.of(id)))) {
            assert!((f64::from(ours) - theirs[id as usize]).abs() < 1e-5);
        }
        let rest = (0..48u32).filter(|id| top.iter().all(|(t, _)| t != id));
        assert!(rest.map(|id| theirs[id as usize] as f32).all(|p| p <= top[6].1));
    }
}

/// Prompts of the golden model files.
fn prompts(name: &str) -> Vec<Vec<u32>> {
    golden_json(&format!("model/{name}.json"))["input_ids"]
        .as_array()
        .unwrap()
        .iter()
        .map(ids)
        .collect()
}

fn requests(prompts: &[Vec<u32>]) -> Vec<Request<'_>> {
    (0..).zip(prompts).map(|(key, prompt)| Request::new(prompt, key)).collect()
}

fn settings(sampling: Sampling, max_tokens: usize) -> Settings {
    Settings {
        sampling,
        max_tokens,
        cache: CacheType::F32,
        logprobs: None,
        sampled_logps: false,
        slots: 0,
    }
}

/// Decodes without end-of-generation tokens and without a callback.
fn run(
    decoder: &Decoder,
    adapters: Adapters,
    requests: &[Request],
    settings: &Settings,
) -> Vec<Generated> {
    let listen = &mut |_, _| ControlFlow::Continue(());
    generate(decoder, adapters, requests, settings, &|_| false, listen).unwrap().rows
}

fn tokens(generated: &[Generated]) -> Vec<Vec<u32>> {
    generated.iter().map(|row| row.token_ids.clone()).collect()
}

#[test]
fn greedy_batches_match_transformers_and_single_rows() {
    for name in ["llama-tiny", "qwen2-tiny", "llama-q4_0", "llama-k"] {
        let decoder = load(name, Compute::F32);
        let prompts = prompts(name);
        let theirs = golden_json(&format!("model/{name}.json"));
        let theirs: Vec<Vec<u32>> = theirs["greedy"].as_array().unwrap().iter().map(ids).collect();
        let settings = settings(Sampling::greedy(), theirs[0].len());
        let ours = run(&decoder, Adapters::NONE, &requests(&prompts), &settings);
        assert_eq!(tokens(&ours), theirs, "{name}");
        assert!(ours.iter().all(|row| row.finish == Finish::Length && row.logprobs.is_empty()));
        for (prompt, theirs) in prompts.iter().zip(&theirs) {
            let alone = [Request::new(prompt, 9)];
            assert_eq!(&run(&decoder, Adapters::NONE, &alone, &settings)[0].token_ids, theirs);
        }
    }
}

/// With the reference backend, whose KV cache is in tensors: shared prompts, rows that finish and free their
/// slot, and prompts longer than a prefill pass give the same tokens as with the CPU backend.
#[test]
fn reference_and_cpu_generate_the_same_tokens() {
    for name in ["llama-tiny", "qwen2-tiny"] {
        let [fast, portable] =
            [Compute::F32, Compute::REFERENCE].map(|compute| load(name, compute));
        let mut prompts = long_prompts(&fast);
        prompts.sort(); // each occurs twice
        let mut requests = requests(&prompts);
        for (i, request) in requests.iter_mut().enumerate() {
            request.max_tokens = [None, Some(1), Some(7)][i % 3];
        }
        for cache in [CacheType::F32, CacheType::F16] {
            let of = |decoder: &Decoder| {
                let settings = Settings { cache, slots: 3, ..settings(Sampling::greedy(), 10) };
                tokens(&run(decoder, Adapters::NONE, &requests, &settings))
            };
            assert_eq!(of(&portable), of(&fast), "{name} {cache:?}");
        }
    }
}

/// A batch whose prompts together are longer than one pass, of different lengths.
fn long_prompts(decoder: &Decoder) -> Vec<Vec<u32>> {
    let vocab_size = decoder.config.vocab_size as u32;
    let row = |i: u32| (0..40 + 13 * i).map(|t| (t * t * 31 + 7 * i + t) % vocab_size).collect();
    (0..6).chain(0..6).map(row).collect()
}

/// Also in the default precision, where prefill and decode steps round differently, a row gets the same
/// log-probs to the bit alone and in any batch, for every type of the KV cache.
#[test]
fn int16_rows_do_not_depend_on_the_batch() {
    let decoder = load("llama-q4_0", Compute::INT16);
    let prompts: Vec<Vec<u32>> =
        (0..9u32).map(|row| (0..5 + row).map(|i| (row * 31 + i * 17) % 200).collect()).collect();
    for cache in [CacheType::F32, CacheType::F16, CacheType::Q8] {
        let settings = Settings { cache, logprobs: Some(3), ..settings(Sampling::greedy(), 7) };
        let of = |prompts: &[Vec<u32>]| {
            let rows = run(&decoder, Adapters::NONE, &requests(prompts), &settings);
            rows.into_iter().map(|row| (row.token_ids, row.logprobs)).collect::<Vec<_>>()
        };
        let all = of(&prompts);
        assert_eq!(of(&prompts[..8]), all[..8], "{cache:?}");
        for (prompt, among) in prompts.iter().zip(&all) {
            assert_eq!(of(std::slice::from_ref(prompt))[0], *among, "{cache:?}");
        }
    }
}

#[test]
fn decoded_log_probs_match_one_pass_over_the_row() {
    let decoder = load("llama-tiny", Compute::F32);
    let prompts = long_prompts(&decoder);
    assert!(prompts.iter().map(Vec::len).sum::<usize>() > 512);
    let sampling = Sampling { temperature: 1.5, seed: 3, ..Sampling::default() };
    let settings = Settings { logprobs: Some(5), ..settings(sampling, 9) };
    let ours = run(&decoder, Adapters::NONE, &requests(&prompts), &settings);
    for (prompt, ours) in prompts.iter().zip(&ours) {
        let whole = [&prompt[..], &ours.token_ids].concat();
        let hidden = decoder.hidden(&Rows::new(&[&whole]), Adapters::NONE).unwrap();
        let log_probs = log_softmax(&decoder.logits(&hidden, Adapters::NONE).unwrap());
        assert_eq!((ours.token_ids.len(), ours.logprobs.len()), (9, 9));
        for (i, &token) in ours.token_ids.iter().enumerate() {
            let theirs = &log_probs[prompt.len() - 1 + i];
            let chosen = theirs[token as usize] - f64::from(ours.token_logprobs[i]);
            assert!(chosen.abs() < 1e-4, "off by {chosen}");
            let best = theirs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            assert!((best - f64::from(ours.logprobs[i][0].1)).abs() < 1e-4);
            assert_eq!(ours.logprobs[i].len(), 5);
            for &(id, log_prob) in &ours.logprobs[i] {
                assert!((theirs[id as usize] - f64::from(log_prob)).abs() < 1e-4);
            }
        }
    }
}

#[test]
fn samples_are_keyed_by_seed_row_and_position() {
    let decoder = load("llama-tiny", Compute::F32);
    let prompts = long_prompts(&decoder);
    let requests = requests(&prompts);
    let hot = |seed| settings(Sampling { temperature: 2.0, seed, ..Sampling::default() }, 12);
    let ours = tokens(&run(&decoder, Adapters::NONE, &requests, &hot(5)));
    assert_eq!(ours, tokens(&run(&decoder, Adapters::NONE, &requests, &hot(5))));
    let other = tokens(&run(&decoder, Adapters::NONE, &requests, &hot(6)));
    assert!(ours.iter().zip(&other).all(|(a, b)| a != b));
    // The same prompt with another key gives another sample.
    assert_eq!(prompts[1], prompts[7]);
    assert_ne!(ours[1], ours[7]);

    let turned: Vec<Request> = requests.iter().rev().copied().collect();
    let mut turned = tokens(&run(&decoder, Adapters::NONE, &turned, &hot(5)));
    turned.reverse();
    assert_eq!(ours, turned);
    assert_eq!(ours[4..5], tokens(&run(&decoder, Adapters::NONE, &requests[4..5], &hot(5))));
    // A row that is resumed continues with the same tokens.
    let prompt = [&prompts[2][..], &ours[2][..5]].concat();
    let rest = [Request::new(&prompt, 2)];
    assert_eq!(run(&decoder, Adapters::NONE, &rest, &hot(5))[0].token_ids[..7], ours[2][5..]);
}

#[test]
fn rows_finish_independently() {
    let decoder = load("llama-tiny", Compute::F32);
    let prompts = long_prompts(&decoder);
    let prompts: Vec<&Vec<u32>> = [0, 1, 2, 3].iter().map(|&i| &prompts[i]).collect();
    // A window of 128 tokens: 126 leave room for two.
    let full: Vec<u32> = prompts[3].iter().copied().cycle().take(126).collect();
    let mut requests: Vec<Request> =
        (0..).zip(&prompts).map(|(key, prompt)| Request::new(prompt, key)).collect();
    requests.push(Request::new(&full, 4));
    let hot = settings(Sampling { temperature: 3.0, seed: 1, ..Sampling::default() }, 20);
    let free = tokens(&run(&decoder, Adapters::NONE, &requests, &hot));
    assert_eq!(free[4].len(), 2);

    // Row 0 ends with its fourth token, row 2 is stopped after its second.
    let end = free[0][3];
    let mut heard = vec![Vec::new(); requests.len()];
    let ours = generate(
        &decoder,
        Adapters::NONE,
        &requests,
        &hot,
        &|token| token == end,
        &mut |row, token| {
            heard[row].push(token);
            if row == 2 && heard[row].len() == 2 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        },
    )
    .unwrap()
    .rows;
    for (row, ours) in ours.iter().enumerate() {
        let ended = free[row].iter().position(|&token| token == end);
        let length = ended.map_or(free[row].len(), |at| at + 1);
        let (length, finish) = match (row, ended) {
            (2, None | Some(2..)) => (2, Finish::Callback),
            (_, Some(_)) => (length, Finish::Stop),
            (_, None) => (length, Finish::Length),
        };
        assert_eq!(ours.finish, finish, "row {row}");
        assert_eq!(ours.token_ids, free[row][..length], "row {row}");
        let told = length - usize::from(finish == Finish::Stop);
        assert_eq!(heard[row], free[row][..told], "row {row}");
    }
    let reasons: Vec<Finish> = ours.iter().map(|row| row.finish).collect();
    assert!([Finish::Stop, Finish::Length, Finish::Callback].iter().all(|f| reasons.contains(f)));

    let none = run(&decoder, Adapters::NONE, &requests, &settings(Sampling::greedy(), 0));
    assert!(none.iter().all(|row| row.token_ids.is_empty() && row.finish == Finish::Length));
    assert!(run(&decoder, Adapters::NONE, &[], &hot).is_empty());
}

/// Two adapters over all linear layers that change what is generated.
fn adapters(decoder: &Decoder) -> [[ActiveAdapter; 1]; 2] {
    let config = LoraConfig {
        target_modules: Some(Modules::Expression("all-linear".into())),
        init_lora_weights: InitLoraWeights::Random,
        ..Default::default()
    };
    let targets = resolve(&config, &decoder.linears(), Some("lm_head")).unwrap().targets;
    [1, 2].map(|seed| {
        let device = candle_core::Device::Cpu;
        let adapter = Adapter::new("a", config.clone(), &targets, seed, &device).unwrap();
        [ActiveAdapter::frozen(Arc::new(adapter))]
    })
}

#[test]
fn each_row_uses_its_own_adapter() {
    let decoder = load("llama-tiny", Compute::F32);
    let [one, two] = adapters(&decoder);
    let prompts = long_prompts(&decoder);
    let requests = requests(&prompts);
    // Rows end one after another, so the adapter lists must shift with them.
    let active: Vec<&[ActiveAdapter]> = (0..12).map(|i| [&one[..], &[], &two[..]][i % 3]).collect();
    let hot = settings(Sampling { temperature: 1.5, seed: 8, ..Sampling::default() }, 12);
    let end = |token: u32| token % 16 == 3;
    let go = |adapters: Adapters, requests: &[Request]| {
        let listen = &mut |_, _| ControlFlow::Continue(());
        tokens(&generate(&decoder, adapters, requests, &hot, &end, listen).unwrap().rows)
    };
    let ours = go(Adapters::PerRow(&active), &requests);
    let lengths: std::collections::BTreeSet<usize> = ours.iter().map(Vec::len).collect();
    assert!(lengths.len() > 2, "{lengths:?}");
    let mut bare = 0;
    for (row, ours) in ours.iter().enumerate() {
        let alone = &requests[row..=row];
        assert_eq!(&go(Adapters::Same(active[row]), alone)[0], ours, "row {row}");
        bare += usize::from(&go(Adapters::NONE, alone)[0] == ours);
    }
    assert!(bare < 8, "adapters change nothing");
}

/// Tokens and log-probs are bit-identical to those of each request alone, for any number of slots, in groups
/// that share a prompt, and among rows with other adapters.
#[test]
fn results_do_not_depend_on_slots_or_groups() {
    for (compute, name) in [(Compute::F32, "llama-tiny"), (Compute::INT16, "llama-q4_0")] {
        let decoder = load(name, compute);
        let [one, two] = adapters(&decoder);
        let vocab_size = decoder.config.vocab_size as u32;
        // Groups of 1 to 4 consecutive rows with prompts of 3 to 60 tokens, some with different adapters.
        let (mut prompts, mut active) = (Vec::new(), Vec::new());
        for group in 0..9u32 {
            let prompt: Vec<u32> =
                (0..3 + (group * 23) % 57).map(|t| (t * 31 + group * 7 + 1) % vocab_size).collect();
            for member in 0..1 + group % 4 {
                prompts.push(prompt.clone());
                active
                    .push([&one[..], &[], &two[..]][(group + u32::from(member > 2)) as usize % 3]);
            }
        }
        let mut requests = requests(&prompts);
        for (i, request) in requests.iter_mut().enumerate() {
            request.max_tokens = [None, Some(1), Some(7), Some(0), Some(30)][i % 5];
        }
        let end = |token: u32| token % 16 == 3;
        for cache in [CacheType::F32, CacheType::F16] {
            let sampling = Sampling { temperature: 1.5, seed: 8, ..Sampling::default() };
            let go = |adapters: Adapters, requests: &[Request], slots| {
                let settings = Settings {
                    sampling: sampling.clone(),
                    max_tokens: 20,
                    cache,
                    logprobs: Some(2),
                    sampled_logps: true,
                    slots,
                };
                let mut heard = vec![0; requests.len()];
                let listen = &mut |row: usize, _| {
                    heard[row] += 1;
                    ControlFlow::Continue(())
                };
                let all = generate(&decoder, adapters, requests, &settings, &end, listen).unwrap();
                for (heard, row) in heard.iter().zip(&all.rows) {
                    let ended = usize::from(row.finish == Finish::Stop);
                    assert_eq!(*heard, row.token_ids.len() - ended);
                }
                let bits = |row: Generated| {
                    let bits = row.token_logprobs.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                    (row.token_ids, row.finish, bits, row.logprobs)
                };
                (all.rows.into_iter().map(bits).collect::<Vec<_>>(), all.usage)
            };
            let alone: Vec<_> = (0..requests.len())
                .map(|row| go(Adapters::Same(active[row]), &requests[row..=row], 1).0.remove(0))
                .collect();
            let lengths: std::collections::BTreeSet<usize> =
                alone.iter().map(|row| row.0.len()).collect();
            assert!(lengths.len() > 4, "{lengths:?}");
            for slots in [0, 1, 3, 8, 100] {
                let (rows, usage) = go(Adapters::PerRow(&active), &requests, slots);
                for (row, (ours, alone)) in rows.iter().zip(&alone).enumerate() {
                    assert_eq!(ours, alone, "{name} {cache:?} {slots} slots, row {row}");
                }
                let all: usize = prompts
                    .iter()
                    .zip(&requests)
                    .filter(|(_, r)| r.max_tokens != Some(0))
                    .map(|(p, _)| p.len())
                    .sum();
                assert_eq!(usage.prompt_tokens + usage.shared_prompt_tokens, all);
                assert!(usage.shared_prompt_tokens > 0);
                assert_eq!(usage.tokens, alone.iter().map(|row| row.0.len()).sum::<usize>());
            }
        }
    }
}

/// Replies of 8 to 256 tokens, 64 on 8 slots, leave few slots empty.
#[test]
fn few_slots_stay_empty() {
    let mut decoder = load("llama-tiny", Compute::F32);
    decoder.config.max_position_embeddings = 512;
    let prompts: Vec<Vec<u32>> = (0..64u32).map(|row| vec![1, row, 2 * row]).collect();
    for seed in 0..3 {
        let mut stream = Stream::new(seed, "lengths", &[]);
        let mut requests = requests(&prompts);
        for request in &mut requests {
            request.max_tokens = Some(8 + stream.below(249) as usize);
        }
        let settings = Settings { slots: 8, ..settings(Sampling::default(), 8) };
        let listen = &mut |_, _| ControlFlow::Continue(());
        let all =
            generate(&decoder, Adapters::NONE, &requests, &settings, &|_| false, listen).unwrap();
        let asked: usize = requests.iter().filter_map(|request| request.max_tokens).sum();
        assert_eq!(all.usage.tokens, asked);
        assert_eq!(all.usage.slot_steps, 8 * all.usage.steps);
        let share = all.usage.slot_steps_per_token();
        println!("{share:.3} slot-steps a token");
        assert!(share <= 1.15, "{share}");
    }
}

#[test]
fn invalid_requests_are_errors() {
    let decoder = load("llama-tiny", Compute::F32);
    let check = |adapters: Adapters, prompts: &[&[u32]], sampling: Sampling, sentence: &str| {
        let requests: Vec<Request> = prompts.iter().map(|prompt| Request::new(prompt, 0)).collect();
        let listen = &mut |_, _| panic!("a token of a bad request");
        let settings = settings(sampling, 4);
        let error = generate(&decoder, adapters, &requests, &settings, &|_| false, listen);
        assert_eq!(error.unwrap_err().to_string(), sentence);
    };
    let (none, greedy) = (Adapters::NONE, Sampling::greedy);
    check(none, &[&[1], &[]], greedy(), "prompt 1 has no tokens, needed at least one");
    let vocab_size = decoder.config.vocab_size;
    check(
        none,
        &[&[5, vocab_size as u32]],
        greedy(),
        &format!("prompt 0 has token {vocab_size}, the vocabulary has {vocab_size}"),
    );
    check(
        none,
        &[&[1; 128]],
        greedy(),
        "prompt 0 has 128 tokens: the model's window of 128 has no room for more",
    );
    check(
        Adapters::PerRow(&[]),
        &[&[1]],
        greedy(),
        "0 lists of adapters for 1 prompts, needed one each",
    );
    let hot = Sampling { top_p: 2.0, ..Sampling::default() };
    check(none, &[&[1]], hot, "top_p is 2, needed more than 0 and at most 1");
}
