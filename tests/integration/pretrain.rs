//! Full-precision training: ten steps against PyTorch, the CPU backend against the reference and against
//! finite differences, and invariances of a step.

use std::collections::HashMap;

use candle_core::{Device, Tensor, Var};
use quantune::data::Batch;
use quantune::model::{Adapters, Config, Decoder, FullBuffers, FullModel, Rows};
use quantune::ops::{Compute, Segment};
use quantune::optim::{AdamW, AdamWSettings, Gradients, clip_factor, global_norm};
use quantune::train::step::train_state;
use quantune::weights::Checkpoint;
use serde_json::Value;

use crate::model_families::{self, MODELS, VARIANTS};
use crate::support::{golden, golden_json, ids, model_path};

const ADAMW: AdamWSettings =
    AdamWSettings { adam_beta1: 0.9, adam_beta2: 0.999, adam_epsilon: 1e-8, weight_decay: 0.0 };

const RUNS: &[&str] = &["llama-tied", "llama-untied", "qwen2", "qwen3"];

pub fn load(run: &str, compute: Compute) -> FullModel {
    let path = golden(&format!("pretrain/{run}/initial"));
    FullModel::load(&Checkpoint::open(path).unwrap(), compute).unwrap()
}

/// Rows of packed documents; whether attention resets at borders depends on the run.
fn batch(rows: &[Value], documents_apart: bool) -> Batch {
    let mut batch = Batch::default();
    for row in rows {
        let tokens = ids(&row["input_ids"]);
        let lengths = match documents_apart {
            true => ids(&row["documents"]),
            false => vec![tokens.len() as u32],
        };
        let mut left = &tokens[..];
        for length in lengths {
            let (document, rest) = left.split_at(length as usize);
            let start = batch.tokens.len();
            batch.segments.push(Segment::whole(start..start + document.len()));
            batch.positions.extend(0..length);
            batch.tokens.extend(document);
            let targets = document.iter().enumerate().skip(1);
            batch.targets.extend(targets.map(|(i, &token)| ((start + i - 1) as u32, token)));
            left = rest;
        }
    }
    batch
}

/// Mean loss and gradients of a step over micro-batches.
fn step(model: &FullModel, micro: &[Batch], kept_layers: usize) -> (f64, Gradients) {
    let count: usize = micro.iter().map(Batch::count).sum();
    let lengths: Vec<usize> = model.parameters.iter().map(|var| var.elem_count()).collect();
    let optimizer = AdamW::new(ADAMW, &lengths);
    let mut state = train_state(model.compute.backend, &model.parameters, optimizer).unwrap();
    let mut loss = 0.0;
    for batch in micro {
        let scale = 1.0 / count as f64;
        loss += state.accumulate_full(model, batch, scale, kept_layers).unwrap() * scale;
    }
    (loss, state.gradients().unwrap())
}

/// `|a - b| / |b|` in Frobenius norms.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    difference / norm(&mut b.iter().map(|&b| f64::from(b))).max(1e-30)
}

/// Compares all gradients, parameter by parameter.
fn close(what: &str, model: &FullModel, a: &Gradients, b: &Gradients, bound: f64) {
    for ((name, a), b) in model.names.iter().zip(a).zip(b) {
        assert!(b.iter().any(|g| *g != 0.0), "{what}: {name} has no gradient");
        let error = relative(a, b);
        assert!(error < bound, "{what}: the gradient of {name} is off by {error:e}");
    }
}

/// The rows of a step in micro-batches of `micro` rows.
pub fn micro_batches(run: &Value, step: usize, micro: usize) -> Vec<Batch> {
    let apart = run["documents_apart"].as_bool().unwrap();
    let rows = run["steps"][step]["rows"].as_array().unwrap();
    rows.chunks(micro).map(|rows| batch(rows, apart)).collect()
}

fn ten_steps(name: &str, micro: usize, kept_layers: usize, compute: Compute, bound: f64) {
    let run = golden_json(&format!("pretrain/{name}/run.json"));
    let model = load(name, compute);
    let number = |key: &str| run[key].as_f64().unwrap();
    let settings = AdamWSettings {
        adam_beta1: number("adam_beta1"),
        adam_beta2: number("adam_beta2"),
        adam_epsilon: number("adam_epsilon"),
        weight_decay: number("weight_decay"),
    };
    let lengths: Vec<usize> = model.parameters.iter().map(|var| var.elem_count()).collect();
    let decays = model.decays(run["embeddings_decay"].as_bool().unwrap());
    let mut optimizer = AdamW::new(settings, &lengths).with_decays(decays);
    for (i, theirs) in run["steps"].as_array().unwrap().iter().enumerate() {
        let batches = micro_batches(&run, i, micro);
        let (loss, gradients) = step(&model, &batches, kept_layers);
        let count: usize = batches.iter().map(Batch::count).sum();
        assert_eq!(count as u64, theirs["tokens"].as_u64().unwrap());
        let norm = global_norm(&gradients);
        for (what, ours) in [("loss", loss), ("grad_norm", norm)] {
            let theirs = theirs[what].as_f64().unwrap();
            let error = (ours - theirs).abs() / theirs.max(1.0);
            assert!(error < bound, "{name} step {i}: {what} {ours}, torch {theirs}");
        }
        let factor = clip_factor(norm, number("max_grad_norm"));
        let lr = theirs["learning_rate"].as_f64().unwrap();
        assert!(optimizer.step(&model.parameters, &gradients, factor, lr).unwrap());
    }
    let path = golden(&format!("pretrain/{name}/final.safetensors"));
    let theirs: HashMap<String, Tensor> =
        candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    assert_eq!(theirs.len(), model.names.len());
    for (parameter, ours) in model.names.iter().zip(&model.parameters) {
        let theirs = &theirs[parameter];
        assert_eq!(theirs.dims(), ours.dims(), "{parameter}");
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let error = relative(&flat(ours), &flat(theirs));
        assert!(error < bound, "{name}: {parameter} is {error:e} from torch's");
    }
}

#[test]
fn ten_steps_match_torch() {
    for name in RUNS {
        ten_steps(name, 4, 2, Compute::F32, 1e-4);
    }
}

#[test]
fn ten_steps_match_torch_split_recomputed_and_on_reference() {
    ten_steps("llama-untied", 1, 0, Compute::F32, 1e-4);
    ten_steps("qwen2", 3, 1, Compute::F32, 1e-4);
    ten_steps("qwen3", 1, 0, Compute::F32, 1e-4);
    ten_steps("llama-tied", 2, 2, Compute::REFERENCE, 1e-4);
    ten_steps("qwen3", 2, 2, Compute::REFERENCE, 1e-4);
}

/// Integer products round, but the run stays close to the F32 run.
#[test]
fn integer_products_stay_near_torch() {
    ten_steps("llama-tied", 4, 2, Compute::INT16, 5e-3);
    ten_steps("qwen2", 4, 2, Compute::INT16, 5e-3);
    ten_steps("qwen3", 4, 2, Compute::INT16, 5e-3);
}

#[test]
fn cpu_matches_reference() {
    for name in RUNS {
        let run = golden_json(&format!("pretrain/{name}/run.json"));
        let portable = load(name, Compute::REFERENCE);
        for index in 0..run["steps"].as_array().unwrap().len() {
            let batches = micro_batches(&run, index, 4);
            let (exact, needed) = step(&portable, &batches, 2);
            let (loss, gradients) = step(&load(name, Compute::F32), &batches, 2);
            assert!((loss - exact).abs() < 1e-5, "{name}: {loss}, portable {exact}");
            close(name, &portable, &gradients, &needed, 1e-4);
            let (loss, gradients) = step(&load(name, Compute::INT16), &batches, 2);
            assert!((loss - exact).abs() < 1e-3, "{name}: {loss}, portable {exact}");
            close(name, &portable, &gradients, &needed, 1e-2);
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    for name in RUNS {
        let run = golden_json(&format!("pretrain/{name}/run.json"));
        let batches = micro_batches(&run, 0, 4);
        let model = load(name, Compute::F32);
        let (_, gradients) = step(&model, &batches, 2);
        differences(name, &model, &batches, &gradients, 1e-2);
    }
}

/// Compares the gradient of every parameter with differences of the loss over a step of this length.
fn differences(
    name: &str,
    model: &FullModel,
    batches: &[Batch],
    gradients: &Gradients,
    step_length: f64,
) {
    for (index, var) in model.parameters.iter().enumerate() {
        let before = var.as_tensor().copy().unwrap();
        // Along the gradient the loss rises by its norm.
        let norm = global_norm(&gradients[index..=index]);
        let along = Tensor::from_slice(&gradients[index], var.shape(), &Device::Cpu).unwrap();
        let h = step_length / norm;
        let at = |sign: f64| {
            var.set(&(&before + (&along * (sign * h)).unwrap()).unwrap()).unwrap();
            step(model, batches, 2).0
        };
        let rise = (at(1.0) - at(-1.0)) / (2.0 * h);
        var.set(&before).unwrap();
        let error = (rise / (norm * norm) - 1.0).abs();
        let parameter = &model.names[index];
        assert!(error < 2e-2, "{name}: {parameter} {rise}, its gradient says {}", norm * norm);
    }
}

/// Full training of every family and its variants: the fast form against the portable one in loss and
/// every gradient, every gradient against differences of the loss, and recomputation to the bit.
#[test]
fn every_family_trains() {
    for (name, checkpoint, _folder) in families() {
        let model = |compute| FullModel::load(&checkpoint, compute).unwrap();
        let batch = whole_rows(&model_families::rows(&name));
        let batches = std::slice::from_ref(&batch);
        let (portable, fast) = (model(Compute::REFERENCE), model(Compute::F32));
        let (exact, needed) = step(&portable, batches, 0);
        let (loss, gradients) = step(&fast, batches, usize::MAX);
        assert!((loss - exact).abs() < 1e-5 * exact, "{name}: {loss}, portable {exact}");
        close(&name, &portable, &gradients, &needed, 1e-4);
        assert_eq!(step(&fast, batches, 0), (loss, gradients.clone()), "{name}: recomputed");
        let (loss, rounded) = step(&model(Compute::INT16), batches, usize::MAX);
        assert!((loss - exact).abs() < 1e-3 * exact, "{name}: {loss}, portable {exact}");
        close(&name, &portable, &rounded, &needed, 2e-2);
        differences(&name, &fast, batches, &gradients, 2e-3); // their losses have more curvature
    }
}

/// A trained model is an ordinary decoder of its family, and a folder of its parameters under Hugging Face's
/// names is the same model, to the bit.
#[test]
fn every_family_is_saved_and_loaded() {
    for (name, checkpoint, _folder) in families() {
        let model = FullModel::load(&checkpoint, Compute::F32).unwrap();
        let base = Decoder::load(&checkpoint, Compute::F32).unwrap();
        let mut expected = quantune::model::load::tensors(&model.config);
        expected.sort();
        let shapes = model.parameters.iter().map(|var| var.dims().to_vec());
        let mut found: Vec<_> = model.names.iter().cloned().zip(shapes).collect();
        found.sort();
        assert_eq!(found, expected, "{name}");
        let decoder = model.decoder(Compute::F32).unwrap();
        assert_eq!(decoder.linears(), base.linears(), "{name}");
        let rows = Rows::new(&model_families::rows(&name));
        let hidden = |decoder: &Decoder| {
            let hidden = decoder.hidden(&rows, Adapters::NONE).unwrap();
            hidden.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(hidden(&decoder), hidden(&base), "{name}");

        // Changed norms, as after training.
        for var in &model.parameters {
            var.set(&(var.as_tensor() * 1.000_123).unwrap()).unwrap();
        }
        let saved = tempfile::tempdir().unwrap();
        let config = checkpoint.path().join("config.json");
        std::fs::copy(config, saved.path().join("config.json")).unwrap();
        let tensors = model.names.iter().cloned().zip(model.on_cpu().unwrap());
        let tensors: HashMap<String, Tensor> = tensors.collect();
        candle_core::safetensors::save(&tensors, saved.path().join("model.safetensors")).unwrap();
        let reloaded =
            FullModel::load(&Checkpoint::open(saved.path()).unwrap(), Compute::F32).unwrap();
        for ((parameter, a), b) in
            model.names.iter().zip(&model.parameters).zip(&reloaded.parameters)
        {
            let flat = |var: &Var| var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(flat(a), flat(b), "{name}: {parameter}");
        }
    }
}

/// Every family and variant: its name, its checkpoint, and the guard of its folder.
fn families() -> Vec<(String, Checkpoint, Option<tempfile::TempDir>)> {
    let model = |name: &&str| {
        let checkpoint = Checkpoint::open(golden(&format!("model_families/{name}"))).unwrap();
        (name.to_string(), checkpoint, None)
    };
    let variant = |name: &&str| {
        let (folder, checkpoint) = model_families::variant(name);
        (name.to_string(), checkpoint, Some(folder))
    };
    MODELS.iter().map(model).chain(VARIANTS.iter().map(variant)).collect()
}

/// Rows whose tokens are all targets except the first.
fn whole_rows(rows: &[Vec<u32>]) -> Batch {
    let mut batch = Batch::default();
    for row in rows {
        let start = batch.tokens.len();
        batch.segments.push(Segment::whole(start..start + row.len()));
        batch.positions.extend(0..row.len() as u32);
        batch.tokens.extend(row);
        let targets = row.iter().enumerate().skip(1);
        batch.targets.extend(targets.map(|(i, &token)| ((start + i - 1) as u32, token)));
    }
    batch
}

#[test]
fn recomputation_threads_and_old_buffers_change_no_bit() {
    let run = golden_json("pretrain/qwen2/run.json");
    let model = load("qwen2", Compute::F32);
    let batches = micro_batches(&run, 0, 2);
    let (loss, gradients) = step(&model, &batches, 2);
    for kept_layers in [0, 1, 7] {
        assert_eq!(step(&model, &batches, kept_layers), (loss, gradients.clone()), "{kept_layers}");
    }
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let found = pool.install(|| step(&model, &batches, 2));
        assert_eq!(found, (loss, gradients.clone()), "{threads} threads");
    }
    // Buffers used by a longer batch before.
    let (mut buffers, mut found) = (FullBuffers::default(), model.zero_gradients());
    let long = &micro_batches(&run, 1, 4)[0];
    model.accumulate(long, 1.0, 2, &mut found, &mut buffers).unwrap();
    found.iter_mut().for_each(|g| g.fill(0.0));
    let count: usize = batches.iter().map(Batch::count).sum();
    for batch in &batches {
        model.accumulate(batch, 1.0 / count as f64, 2, &mut found, &mut buffers).unwrap();
    }
    assert_eq!(found, gradients);
}

/// A base of every supported format can be trained further, and the result is an ordinary decoder.
#[test]
fn a_base_round_trips_through_training_weights() {
    let qwen3 = ["model_families/qwen3", "model_families/qwen3.gguf"].map(golden);
    let others = ["llama-tiny", "llama-untied", "qwen2-tiny", "llama-q4_0"].map(model_path);
    for path in others.into_iter().chain(qwen3) {
        let name = path.display();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let model = FullModel::load(&checkpoint, Compute::F32).unwrap();
        let base = Decoder::load(&checkpoint, Compute::F32).unwrap();
        let decoder = model.decoder(Compute::F32).unwrap();
        assert_eq!(decoder.linears(), base.linears());
        let rows = Rows::new(&[vec![5, 7, 9, 11], vec![3, 2]]);
        let hidden = |decoder: &Decoder| {
            let hidden = decoder.hidden(&rows, Adapters::Same(&[])).unwrap();
            decoder
                .logits(&hidden, Adapters::NONE)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
        };
        let error = relative(&hidden(&decoder), &hidden(&base));
        assert!(error < 1e-5, "{name}: {error:e}");
    }
}

#[test]
fn initial_weights_depend_on_the_seed() {
    let checkpoint = Checkpoint::open(model_path("llama-untied")).unwrap();
    let config = Config::read(&checkpoint).unwrap();
    let values = |seed| -> HashMap<String, Vec<f32>> {
        let model = FullModel::random(config.clone(), 0.02, seed, Compute::F32).unwrap();
        let values = model.parameters.iter().map(|v| v.flatten_all().unwrap().to_vec1().unwrap());
        model.names.iter().cloned().zip(values).collect()
    };
    let (model, other) = (values(1), values(2));
    assert_eq!(model, values(1));
    let deviation = |name: &str| {
        let values = &model[name];
        assert_ne!(values, &other[name]);
        (values.iter().map(|v| f64::from(v * v)).sum::<f64>() / values.len() as f64).sqrt()
    };
    let residual = 0.02 / (2.0 * config.num_hidden_layers as f64).sqrt();
    for (name, std) in [
        ("model.embed_tokens.weight", 0.02),
        ("lm_head.weight", 0.02),
        ("model.layers.1.self_attn.q_proj.weight", 0.02),
        ("model.layers.1.self_attn.o_proj.weight", residual),
        ("model.layers.0.mlp.down_proj.weight", residual),
    ] {
        assert!((deviation(name) / std - 1.0).abs() < 0.05, "{name}");
    }
    assert!(model["model.layers.0.input_layernorm.weight"].iter().all(|w| *w == 1.0));
}

#[test]
fn invalid_settings_are_errors() {
    type Spoil = fn(&mut Batch);
    let model = load("llama-tied", Compute::F32);
    let good = batch(
        golden_json("pretrain/llama-tied/run.json")["steps"][0]["rows"].as_array().unwrap(),
        false,
    );
    let cases: [(Spoil, &str); 5] = [
        (|b| b.tokens[3] = 83, "token 83"),
        (|b| b.targets[3].1 = 99, "token 99"),
        (|b| b.targets[3].0 = 4000, "token 4000"),
        (|b| b.positions.truncate(5), "5 positions"),
        (|b| b.segments[0].tokens.end -= 1, "row 1"),
    ];
    for (spoil, needed) in cases {
        let mut bad = good.clone();
        spoil(&mut bad);
        let mut gradients = model.zero_gradients();
        let error = model.accumulate(&bad, 1.0, 2, &mut gradients, &mut FullBuffers::default());
        let error = error.unwrap_err().to_string();
        assert!(error.contains(needed), "{error}");
    }
}
