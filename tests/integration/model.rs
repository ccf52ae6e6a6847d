//! The decoder against transformers, on tiny random models.

use std::collections::HashMap;

use candle_core::{Device, Tensor, Var};
use quantune::model::{ActiveAdapter, Adapters, Decoder, GradientBuffers, KvCache, Reading, Rows};
use quantune::ops::{Compute, linear_log_probs};
use quantune::weights::Checkpoint;
use quantune_adapters::config::{InitLoraWeights, LoraConfig, Modules};
use quantune_adapters::delta::Adapter;
use quantune_adapters::targets::resolve;

use crate::support::{golden, golden_json, ids, load, load_uploaded, log_softmax, model_path};

const MODELS: &[&str] = &[
    "llama-tiny",
    "llama-untied",
    "qwen2-tiny",
    "llama-q8_0",
    "llama-q4_0",
    "qwen2-mix",
    "llama-k",
];

/// The largest difference to transformers' log-probs over all positions of both rows, which run
/// packed in one pass.
fn worst(name: &str, decoder: &Decoder) -> f64 {
    let rows: Vec<Vec<u32>> = golden_json(&format!("model/{name}.json"))["input_ids"]
        .as_array()
        .unwrap()
        .iter()
        .map(ids)
        .collect();
    let path = golden(&format!("model/{name}.safetensors"));
    let theirs = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let hidden = decoder.hidden(&Rows::new(&rows), Adapters::NONE).unwrap();
    let ours = log_softmax(&decoder.logits(&hidden, Adapters::NONE).unwrap());
    let theirs = (0..rows.len())
        .flat_map(|row| theirs[&format!("log_probs.{row}")].to_vec2::<f32>().unwrap());
    let mut worst = 0f64;
    let mut positions = 0;
    for (ours, theirs) in ours.iter().zip(theirs) {
        positions += 1;
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in ours.iter().zip(theirs) {
            worst = worst.max((ours - f64::from(theirs)).abs());
        }
    }
    assert_eq!(positions, 57);
    worst
}

#[test]
fn log_probs_match_transformers() {
    for name in MODELS {
        for compute in [Compute::F32, Compute::REFERENCE] {
            let worst = worst(name, &load(name, compute));
            assert!(worst < 1e-3, "{name} {compute:?}: off by {worst}");
        }
        let worst = worst(name, &load_uploaded(name));
        assert!(worst < 1e-3, "{name}, brought to a device: off by {worst}");
    }
}

#[test]
fn integer_products_have_their_own_bounds() {
    for name in MODELS {
        let int16 = worst(name, &load(name, Compute::INT16));
        let int8 = worst(name, &load(name, Compute::INT8));
        // These random models have large logits: their least likely tokens show every error.
        assert!(int16 < 2e-2, "{name}: int16 is off by {int16}");
        assert!(
            int8 > 2.0 * int16 && int8 < 2.0,
            "{name}: int8 is off by {int8}, int16 by {int16}"
        );
    }
}

#[test]
fn one_percent_of_rope_theta_is_detected() {
    for name in ["llama-tiny", "qwen2-tiny"] {
        let folder = tempfile::tempdir().unwrap();
        for file in std::fs::read_dir(model_path(name)).unwrap() {
            let file = file.unwrap().path();
            std::fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
        }
        let path = folder.path().join("config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        let theta = match config["rope_parameters"].is_object() {
            true => &mut config["rope_parameters"]["rope_theta"],
            false => &mut config["rope_theta"],
        };
        *theta = (theta.as_f64().unwrap() * 1.01).into();
        std::fs::write(&path, config.to_string()).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let worst = worst(name, &Decoder::load(&checkpoint, Compute::F32).unwrap());
        assert!(worst > 1e-2, "{name}: only {worst} off");
    }
}

#[test]
fn greedy_decoding_matches_transformers() {
    let fast = MODELS.iter().map(|name| (name, load(name, Compute::F32)));
    for (name, decoder) in fast.chain([(&"llama-q4_0", load_uploaded("llama-q4_0"))]) {
        let golden = golden_json(&format!("model/{name}.json"));
        let rows: Vec<Vec<u32>> = golden["input_ids"].as_array().unwrap().iter().map(ids).collect();
        let theirs: Vec<Vec<u32>> = golden["greedy"].as_array().unwrap().iter().map(ids).collect();
        // Both rows decode in one batch, each at its own length.
        let mut cache = KvCache::new(&decoder, rows.len());
        let mut new = rows.clone();
        let mut ours = vec![Vec::new(); rows.len()];
        while ours[0].len() < theirs[0].len() {
            let input = Rows::after(new.iter().enumerate().map(|(i, r)| (&r[..], cache.len(i))));
            let hidden = match new.iter().all(|new| new.len() == 1) {
                true => decoder.hidden_step(&input, Adapters::NONE, &mut cache).unwrap(),
                false => decoder.hidden_cached(&input, Adapters::NONE, &mut cache).unwrap(),
            };
            let logits = log_softmax(&decoder.logits(&hidden, Adapters::NONE).unwrap());
            for (row, segment) in input.segments.iter().enumerate() {
                let last = &logits[segment.tokens.end - 1];
                let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
                ours[row].push(best as u32);
                new[row] = vec![best as u32];
            }
        }
        assert_eq!(ours, theirs, "{name}");
    }
}

#[test]
fn a_cache_of_another_precision_is_rejected() {
    let decoders = [Compute::F32, Compute::REFERENCE].map(|compute| load("llama-tiny", compute));
    let rows = Rows::new(&[[5, 6, 7]]);
    for (decoder, other) in [(&decoders[0], &decoders[1]), (&decoders[1], &decoders[0])] {
        let mut cache = KvCache::new(other, 1);
        let errors = [
            decoder.hidden_cached(&rows, Adapters::NONE, &mut cache),
            decoder.hidden_step(&rows, Adapters::NONE, &mut cache),
            decoder.hidden_cached_of(&rows, Adapters::NONE, &mut cache, &[2]),
        ];
        for error in errors {
            let error = error.unwrap_err().to_string();
            assert!(error.contains("needed one made for this decoder"), "{error}");
        }
        assert!(cache.is_empty());
    }
}

/// A Llama with all biases, none of them 0: all backends agree, in one pass, through the cache and
/// in decode steps.
#[test]
fn biases_count_in_every_form() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(model_path("llama-tiny").join(file), folder.path().join(file)).unwrap();
    }
    let path = folder.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    (config["attention_bias"], config["mlp_bias"]) = (true.into(), true.into());
    std::fs::write(&path, config.to_string()).unwrap();
    let weights = model_path("llama-tiny").join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(weights, &Device::Cpu).unwrap();
    for (name, weight) in tensors.clone() {
        if let Some(module) = name.strip_suffix("_proj.weight") {
            let rows = weight.dim(0).unwrap();
            let bias: Vec<f32> =
                (0..rows).map(|i| ((i * 37 + rows) % 101) as f32 / 101.0).collect();
            let bias = candle_core::Tensor::from_vec(bias, rows, &Device::Cpu).unwrap();
            tensors.insert(format!("{module}_proj.bias"), bias);
        }
    }
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    let load = |compute| Decoder::load(&Checkpoint::open(folder.path()).unwrap(), compute).unwrap();

    let rows: [Vec<u32>; 2] = [(5..30).collect(), (40..52).collect()];
    let flat = |t: candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let exact = flat(load(Compute::REFERENCE).hidden(&Rows::new(&rows), Adapters::NONE).unwrap());
    for (compute, bound) in [(Compute::F32, 1e-4), (Compute::INT16, 2e-2)] {
        let decoder = load(compute);
        let close = |found: &[f32], exact: &[f32], what: &str| {
            let worst = found.iter().zip(exact).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!(found.len() == exact.len() && worst < bound, "{compute:?} {what}: {worst} off");
        };
        let whole = flat(decoder.hidden(&Rows::new(&rows), Adapters::NONE).unwrap());
        close(&whole, &exact, "whole");
        let mut cache = KvCache::new(&decoder, 1);
        let width = decoder.config.hidden_size;
        let read = Rows::after([(&rows[0][..20], 0)].into_iter());
        let read = decoder.hidden_cached(&read, Adapters::NONE, &mut cache).unwrap();
        close(&flat(read), &exact[..20 * width], "cached");
        for position in 20..25 {
            let next = Rows::after([(&rows[0][position..=position], position)].into_iter());
            let step = decoder.hidden_step(&next, Adapters::NONE, &mut cache).unwrap();
            close(&flat(step), &exact[position * width..(position + 1) * width], "decoded");
        }
    }
}

/// The hand-written head pass against the same composed of ops: scores, log-probs at a temperature, and the
/// gradients of hidden states and score head, also with rows that are read twice.
#[test]
fn readings_by_hand_are_those_of_the_ops() {
    let decoder = load("llama-q4_0", Compute::F32);
    let (width, n) = (decoder.config.hidden_size, 9);
    let wave =
        |n: usize, speed: f32| (0..n).map(|i| (i as f32 * speed).sin()).collect::<Vec<f32>>();
    let x = Var::from_vec(wave(n * width, 0.7), (n, width), &Device::Cpu).unwrap();
    let head = Var::from_vec(wave(width, 0.3), (1, width), &Device::Cpu).unwrap();
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (values, weights) = (flat(&x), flat(&head));
    let normed = |rows: &[u32]| {
        decoder.final_norm(&x.index_select(&Tensor::new(rows, &Device::Cpu).unwrap(), 0).unwrap())
    };
    let close = |ours: &[f32], theirs: &Tensor| {
        let theirs = flat(theirs);
        let norm = |v: &[f32]| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let difference: Vec<f32> = ours.iter().zip(&theirs).map(|(a, b)| a - b).collect();
        assert_eq!(ours.len(), theirs.len());
        assert!(norm(&difference) < 1e-5 * norm(&theirs), "{ours:?} {theirs:?}");
    };
    let upstream = [0.5, -1.0, 2.0, 0.25];
    let given = Tensor::new(&upstream, &Device::Cpu).unwrap();
    let mut reading = Reading::default();

    let rows = [7, 2, 7, 0];
    let scores = normed(&rows).unwrap().matmul(&head.t().unwrap()).unwrap().squeeze(1).unwrap();
    let grads = (&scores * &given).unwrap().sum_all().unwrap().backward().unwrap();
    let (mut dx, mut dhead) = (vec![0f32; n * width], vec![0f32; width]);
    close(&decoder.read_scores(&values, &rows, &weights, &mut reading).unwrap(), &scores);
    decoder.scores_backward(&upstream, &weights, &mut reading, &mut dx, &mut dhead).unwrap();
    close(&dx, grads.get(&x).unwrap());
    close(&dhead, grads.get(&head).unwrap());

    let lm_head = decoder.linear_weight("lm_head").unwrap();
    for temperature in [1.0, 0.7] {
        let targets = [(7, 5), (2, 9), (7, 11), (0, 5)];
        let hot = (normed(&rows).unwrap() * (1.0 / temperature)).unwrap();
        let (weight, tokens) = (&lm_head, targets.map(|(_, token)| token));
        let logps = linear_log_probs(&hot, weight, &tokens, Compute::F32).unwrap();
        let grads = (&logps * &given).unwrap().sum_all().unwrap().backward().unwrap();
        let ours = decoder.read_log_probs(&values, &targets, temperature, &[], true, &mut reading);
        close(ours.unwrap(), &logps);
        let mut dx = vec![0f32; n * width];
        let mut none = GradientBuffers { places: &HashMap::new(), gradients: &mut [] };
        decoder
            .log_probs_backward(&upstream, temperature, &[], &mut reading, &mut dx, &mut none)
            .unwrap();
        close(&dx, grads.get(&x).unwrap());
    }
    let outside = [(0, decoder.config.vocab_size as u32)];
    assert!(decoder.read_log_probs(&values, &outside, 1.0, &[], false, &mut reading).is_err());
}

/// A subset of the tokens gets the same bits as all tokens, in one pass and through the cache, for any
/// adapters.
#[test]
fn log_probs_of_single_tokens_match_those_of_all_tokens() {
    let chosen: &[&[u32]] = &[&[11, 0, 11, 4], &[3], &[], &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]];
    let rows: [&[u32]; 4] = [&[5, 6, 7, 8], &[], &[9, 10, 11], &[3, 4, 5, 6, 7]];
    for compute in [Compute::REFERENCE, Compute::F32, Compute::INT16] {
        let decoder = load("llama-q4_0", compute);
        let config = LoraConfig {
            r: 3,
            target_modules: Some(Modules::Expression("all-linear".into())),
            init_lora_weights: InitLoraWeights::Random,
            ..LoraConfig::default()
        };
        let targets = resolve(&config, &decoder.linears(), Some("lm_head")).unwrap().targets;
        let adapter = Adapter::new("a", config, &targets, 3, &Device::Cpu).unwrap();
        let active = [ActiveAdapter::frozen(adapter.into())];
        let lists: [&[ActiveAdapter]; 4] = [&active, &[], &[], &active];
        let (input, adapters) = (Rows::new(&rows), Adapters::PerRow(&lists));
        let all = decoder.hidden(&input, adapters).unwrap().to_vec2::<f32>().unwrap();
        for chosen in chosen {
            let needed: Vec<_> = chosen.iter().map(|&row| all[row as usize].clone()).collect();
            let whole = decoder.hidden_of(&input, adapters, chosen).unwrap();
            assert_eq!(whole.to_vec2::<f32>().unwrap(), needed, "{compute:?} {chosen:?}");
            let mut cache = KvCache::new(&decoder, rows.len());
            let cached = decoder.hidden_cached_of(&input, adapters, &mut cache, chosen).unwrap();
            assert_eq!(cached.dims(), [chosen.len(), decoder.config.hidden_size]);
            assert_eq!((0..4).map(|row| cache.len(row)).collect::<Vec<_>>(), [4, 0, 3, 5]);
            if compute != Compute::REFERENCE {
                assert_eq!(cached.to_vec2::<f32>().unwrap(), needed, "{compute:?} {chosen:?}");
            }
        }
    }
}
