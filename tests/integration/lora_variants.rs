//! LoRA variants compared with PEFT: ten training steps, merged weights, files, combinations; LoftQ with
//! every block type; and their command line.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use quantune::data::{Batch, Example};
use quantune::model::Decoder;
use quantune::objectives::Objective;
use quantune::ops::Compute;
use quantune::optim::{AdamWSettings, Schedule, ScheduleKind};
use quantune::quant::BlockType;
use quantune::train::learner::{Learner, MicroBatch};
use quantune_adapters::base::BaseRows;
use quantune_adapters::combine::{Combination, DareMasks, MaskRequest, UpdateMatrix, combine};
use quantune_adapters::delta::{Adapter, Lora};
use quantune_adapters::initialize::{self, BaseWeights, loftq};
use quantune_adapters::rng::Stream;
use quantune_adapters::{LinearSpec, LoraConfig, format};
use serde_json::Value;

use crate::binary::{Lab, adapter as trained, base, error, last_json, quantune, strings};
use crate::support::{golden, golden_json, load};
use crate::train::rows;

pub fn tensors(path: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest distance between two tensors.
pub fn apart(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    flat(&(a - b).unwrap().abs().unwrap()).into_iter().fold(0.0, f32::max)
}

/// `s B A (out, in)`.
fn product(lora: &Lora) -> Tensor {
    (lora.b.as_detached_tensor().matmul(&lora.a.as_detached_tensor()).unwrap() * lora.scale)
        .unwrap()
}

/// `W + s B A`, with DoRA's magnitudes as row norms.
fn merged(lora: &Lora, base: &dyn BaseRows) -> Tensor {
    let mut values = vec![0f32; base.rows() * base.cols()];
    base.read(0..base.rows(), &mut values);
    let w = Tensor::from_vec(values, (base.rows(), base.cols()), &Device::Cpu).unwrap();
    let merged = (w + product(lora)).unwrap();
    match lora.row_scales(base).unwrap() {
        None => merged,
        Some(scales) => {
            let scales = Tensor::from_vec(scales, (base.rows(), 1), &Device::Cpu).unwrap();
            merged.broadcast_mul(&scales).unwrap()
        }
    }
}

pub fn read(folder: &Path, linears: &[LinearSpec]) -> Adapter {
    let read = format::read_folder(folder, "default", linears, Some("lm_head"), &Device::Cpu);
    read.unwrap().0
}

fn weights(decoder: &Decoder, module: &str) -> Option<Box<dyn BaseRows>> {
    decoder.linear_weight(module).map(|weight| Box::new(weight) as Box<dyn BaseRows>)
}

/// The initial adapter of a PEFT run: its file, or an initialization from the base.
fn begun(run: &str, config: &Value, decoder: &Decoder) -> Adapter {
    let initial = golden(&format!("lora_variants/{run}/initial"));
    let config = LoraConfig::from_json(&config.to_string()).unwrap();
    let linears = decoder.linears();
    if initial.exists() && config.modules_to_save.is_empty() {
        return read(&initial, &linears);
    }
    let base = |module: &str| weights(decoder, module);
    let bases = BaseWeights { base: &base, original: None };
    let begun = initialize::begin("default", config, &linears, Some("lm_head"), bases, 1);
    let (mut adapter, unmatched) = begun.unwrap();
    assert!(unmatched.is_empty());
    if initial.exists() {
        adapter.modules = read(&initial, &linears).modules;
    }
    adapter
}

/// Compares ten steps with PEFT: losses, gradient norms, and the final adapter.
fn ten_steps(run: &str, compute: Compute) {
    let theirs = golden_json(&format!("lora_variants/{run}/run.json"));
    let decoder = load(theirs["base"].as_str().unwrap(), compute);
    let adapter = Arc::new(begun(run, &theirs["config"], &decoder));
    take_steps(run, &theirs, &decoder, &adapter, &rows("llama-tiny"));
    let folder = golden(&format!("lora_variants/{run}/final"));
    if folder.exists() {
        same_adapter(run, &adapter, &read(&folder, &decoder.linears()));
    }
    for (module, square) in theirs["squares"].as_object().into_iter().flatten() {
        let weight = flat(&adapter.saved[module.trim_end_matches(".weight")]);
        let ours: f64 = weight.iter().map(|w| f64::from(*w).powi(2)).sum();
        let theirs = square.as_f64().unwrap();
        assert!((ours / theirs - 1.0).abs() < 1e-6, "{run} {module}: {ours}, PEFT {theirs}");
    }
}

/// Steps over rows, four at a time, with the losses and gradient norms of `theirs`.
pub fn take_steps(
    run: &str,
    theirs: &Value,
    decoder: &Decoder,
    adapter: &Arc<Adapter>,
    rows: &[Example],
) {
    let number = |key: &str| theirs[key].as_f64().unwrap();
    let settings = AdamWSettings {
        adam_beta1: number("adam_beta1"),
        adam_beta2: number("adam_beta2"),
        adam_epsilon: number("adam_epsilon"),
        weight_decay: number("weight_decay"),
    };
    let steps = theirs["steps"].as_array().unwrap();
    let schedule = Schedule {
        kind: ScheduleKind::Cosine,
        learning_rate: number("learning_rate"),
        warmup_steps: number("warmup_steps") as u64,
        total_steps: steps.len() as u64,
        decay_steps: 0,
        min_lr_ratio: 0.0,
    };
    let most = number("max_grad_norm");
    let mut learner =
        Learner::new(decoder, vec![adapter.clone()], settings, most, (0.0, 1)).unwrap();
    for (i, (theirs, rows)) in steps.iter().zip(rows.chunks(4)).enumerate() {
        let batch = Batch::new(rows, &[(0..rows.len()).collect()]);
        let part = MicroBatch {
            scale: 1.0 / batch.count() as f64,
            batch,
            objective: Objective::LanguageModeling,
            adapter: 0,
            epoch: 0,
            temperature: 1.0,
        };
        let stepped = learner.step(&[part], schedule.at(i as u64)).unwrap();
        let close = |what: &str, ours: f64, bound: f64| {
            let theirs = theirs[what].as_f64().unwrap();
            let error = (ours - theirs).abs() / theirs.abs().max(1.0);
            assert!(error < bound, "{run} step {i}: {what} {ours}, PEFT {theirs}");
        };
        close("loss", stepped.loss, 2e-5);
        close("grad_norm", stepped.grad_norm, 1e-4);
    }
}

/// Compares products where a decomposition leaves signs undetermined, else every tensor.
pub fn same_adapter(run: &str, ours: &Adapter, theirs: &Adapter) {
    assert_eq!(ours.modules.len(), theirs.modules.len());
    for (module, lora) in &ours.modules {
        let other = &theirs.modules[module];
        let distance = apart(&product(lora), &product(other));
        assert!(distance < 1e-5, "{run} {module}: {distance:e} from PEFT's");
    }
    if ours.modules.values().any(|lora| lora.frozen_ranks > 0) {
        return;
    }
    for ((name, ours), (other, theirs)) in ours.parameters().iter().zip(theirs.parameters()) {
        assert_eq!(*name, other);
        let distance = apart(ours, &theirs);
        assert!(distance < 1e-5, "{run} {name}: {distance:e} from PEFT's");
    }
}

#[test]
fn ten_training_steps_match_peft() {
    for run in ["dora", "dora-rslora", "pissa", "olora", "dora-pissa"] {
        ten_steps(run, Compute::F32);
    }
    ten_steps("dora", Compute::REFERENCE);
    ten_steps("pissa", Compute::REFERENCE);
}

#[test]
fn ten_training_steps_of_embedding_and_head_match_peft() {
    for run in ["embeddings", "embeddings-tied", "tokens", "tokens-untied", "whole"] {
        ten_steps(run, Compute::F32);
    }
}

#[test]
fn merged_weights_match_peft() {
    let decoder = load("llama-tiny", Compute::F32);
    for run in ["dora", "dora-rslora", "pissa", "olora", "rslora"] {
        let folder = match run {
            "rslora" => golden("train/llama-tiny-rslora/final"),
            _ => golden(&format!("lora_variants/{run}/final")),
        };
        let adapter = read(&folder, &decoder.linears());
        let theirs = tensors(&golden(&format!("lora_variants/{run}/merged.safetensors")));
        assert!(!theirs.is_empty());
        for (name, theirs) in theirs {
            let module = name.trim_end_matches(".weight");
            let base = decoder.linear_weight(module).unwrap();
            let distance = apart(&merged(&adapter.modules[module], &base), &theirs);
            assert!(distance < 1e-5, "{run} {module}: {distance:e} from PEFT's");
        }
    }
}

/// The Llama of the goldens' files: 8 numbers a token, one layer, its own vocabulary 16.
pub fn small_linears(vocabulary: usize) -> Vec<LinearSpec> {
    let spec = |name: &str, in_features, out_features| LinearSpec {
        name: name.into(),
        in_features,
        out_features,
        embedding: name == "model.embed_tokens",
        added_tokens: 0,
    };
    let layer = [("self_attn.q_proj", 8, 8), ("self_attn.v_proj", 8, 4), ("mlp.up_proj", 8, 12)];
    let layer = layer.map(|(name, of_in, out)| spec(&format!("model.layers.0.{name}"), of_in, out));
    let ends = [spec("model.embed_tokens", vocabulary, 8), spec("lm_head", 8, vocabulary)];
    layer.into_iter().chain(ends).collect()
}

struct Weight(Tensor);

impl BaseRows for Weight {
    fn rows(&self) -> usize {
        self.0.dims()[0]
    }

    fn cols(&self) -> usize {
        self.0.dims()[1]
    }

    fn read(&self, rows: std::ops::Range<usize>, out: &mut [f32]) {
        out.copy_from_slice(&flat(&self.0.narrow(0, rows.start, rows.len()).unwrap()));
    }
}

#[test]
fn peft_files_of_embedding_and_head_match_peft() {
    for name in ["embeddings", "tokens", "whole"] {
        let folder = golden(&format!("lora_variants/files/{name}"));
        let adapter = read(&folder, &small_linears(16));
        let theirs = tensors(&folder.join("merged.safetensors"));
        let mut changed = 0;
        for (key, needed) in theirs.iter().filter(|(key, _)| key.starts_with("merged.")) {
            let module = key.trim_start_matches("merged.").trim_end_matches(".weight");
            let base = theirs[&key.replace("merged.", "base.")].clone();
            let ours = if let Some(weight) = adapter.saved.get(module) {
                weight.as_detached_tensor()
            } else if let Some(lora) = adapter.modules.get(module) {
                match module == "model.embed_tokens" {
                    true => (base.clone() + product(lora).t().unwrap()).unwrap(),
                    false => merged(lora, &Weight(base.clone())),
                }
            } else {
                // Token rows, of a head that is the embedding too.
                let tokens = adapter.tokens.as_ref().unwrap();
                assert_eq!(tokens.indices, [2, 5, 9]);
                let mut rows: Vec<Tensor> = base.chunk(16, 0).unwrap();
                for (place, &token) in tokens.indices.iter().enumerate() {
                    rows[token as usize] =
                        tokens.rows.as_detached_tensor().narrow(0, place, 1).unwrap();
                }
                Tensor::cat(&rows, 0).unwrap()
            };
            let distance = apart(&ours, needed);
            assert!(distance < 1e-6, "{name} {module}: {distance:e} from PEFT's");
            changed += usize::from(apart(&base, needed) > 1e-3);
        }
        assert_eq!(changed, 3, "{name}");
    }
}

#[test]
fn combinations_match_peft() {
    let cases = golden_json("lora_variants/combine/cases.json");
    let known = tensors(&golden("lora_variants/combine/combined.safetensors"));
    let linears = small_linears(16);
    for (i, case) in cases.as_array().unwrap().iter().enumerate() {
        let names = case["adapters"].as_array().unwrap().iter();
        let adapters = names.map(|name| {
            read(&golden(&format!("lora_variants/combine/{}", name.as_str().unwrap())), &linears)
        });
        let adapters: Vec<Adapter> = adapters.collect();
        let weights = case["weights"].as_array().unwrap().iter().map(|w| w.as_f64().unwrap());
        let weighted: Vec<_> = adapters.iter().zip(weights).collect();
        let mask = |draw: &MaskRequest<'_>| -> Vec<bool> {
            let MaskRequest { module, adapter, matrix, .. } = draw;
            let mask = &known[&format!("{i}.{module}.{matrix:?}.{adapter}")];
            mask.flatten_all().unwrap().to_vec1::<u8>().unwrap().iter().map(|m| *m == 1).collect()
        };
        let how = Combination {
            method: case["method"].as_str().unwrap().parse().unwrap(),
            density: case["density"].as_f64(),
            majority_sign_method: case["majority_sign_method"].as_str().map(|m| m.parse().unwrap()),
            svd_rank: case["svd_rank"].as_u64().map(|r| r as usize),
            masks: DareMasks::Given(&mask),
        };
        let made = combine("made", &weighted, &how).unwrap();
        let of_modules = known.iter().filter(|(key, _)| {
            let of_case = key.starts_with(&format!("{i}."));
            of_case
                && ![UpdateMatrix::A, UpdateMatrix::B, UpdateMatrix::Product]
                    .iter()
                    .any(|m| key.contains(&format!(".{m:?}.")))
        });
        let mut modules = 0;
        for (key, needed) in of_modules {
            let module = key.split_once('.').unwrap().1;
            let distance = apart(&product(&made.modules[module]), needed);
            assert!(distance < 1e-5, "case {i} {case} {module}: {distance:e} from PEFT's");
            modules += 1;
        }
        assert_eq!(modules, made.modules.len(), "case {i}");
    }
}

/// A matrix like a trained one: a few strong directions in noise.
fn matrix(rows: usize, cols: usize) -> Weight {
    let draw = |key: &str, rows: usize, cols: usize, deviation: f32| {
        let mut stream = Stream::new(3, key, &[]);
        let values: Vec<f32> = (0..rows * cols).map(|_| stream.normal() * deviation).collect();
        Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap()
    };
    let strong = draw("left", rows, 4, 0.1).matmul(&draw("right", 4, cols, 0.2)).unwrap();
    Weight((strong + draw("noise", rows, cols, 0.03)).unwrap())
}

/// `‖W - Q - s B A‖` falls with the rounds for every block type, and is below `‖W - Q‖`.
#[test]
fn loftq_reduces_error_of_every_block_type() {
    let weight = matrix(96, 256);
    let values = flat(&weight.0);
    for &of in BlockType::WRITTEN.iter().filter(|of| of.block_len() > 1) {
        let quantize = |values: &[f32]| -> Vec<f32> {
            let mut bytes = vec![0u8; values.len() / of.block_len() * of.block_bytes()];
            of.quantize(values, 256, None, &mut bytes);
            let mut read = vec![0f32; values.len()];
            of.dequantize(&bytes, &mut read);
            read
        };
        let lost = values.iter().zip(quantize(&values)).map(|(w, q)| f64::from(w - q).powi(2));
        let lost = lost.sum::<f64>().sqrt();
        let made = loftq(&weight, 8, 2.0, 5, &quantize).unwrap();
        println!("{of}: {lost:.5}, {:.5?}", made.norms);
        assert!(made.norms[0] < lost, "{of}: {} of {lost}", made.norms[0]);
        assert!(made.norms[4] < made.norms[0], "{of}: {:?}", made.norms);
    }
}

fn sft(lab: &Lab, out: &str, more: &[&str]) -> Vec<String> {
    let (base, rows, out) = (base(), lab.path("rows.jsonl"), lab.path(out));
    let mut args = strings(&["sft", "--base", &base, "--data", &rows, "--out", &out, "--json"]);
    args.extend(strings(&["--max-steps", "2", "--r", "3", "--seed", "5"]));
    args.extend(strings(more));
    args
}

#[test]
fn every_initialization_starts_as_the_base() {
    let lab = Lab::new();
    let first = |out: &str, more: &[&str]| -> f64 {
        last_json(&quantune(&sft(&lab, out, more)))["loss_first"].as_f64().unwrap()
    };
    let plain = first("plain", &[]);
    for (i, more) in [
        &["--init-lora-weights", "pissa"][..],
        &["--init-lora-weights", "pissa_niter_4", "--use-rslora"],
        &["--init-lora-weights", "olora", "--target-modules", "q_proj", "embed_tokens", "lm_head"],
        &["--use-dora"],
        &["--modules-to-save", "embed_tokens,lm_head"],
        &["--trainable-token-indices", "3,7"],
    ]
    .iter()
    .enumerate()
    {
        let loss = first(&format!("run{i}"), more);
        assert!((loss - plain).abs() < 2e-5, "{more:?} begins at {loss}, the base is at {plain}");
    }
    // LoftQ starts nearer to another base: here one that is not the original of any.
    let other = lab.other_base();
    let loftq = ["--init-lora-weights", "loftq", "--loftq-base", &other];
    assert!((first("loftq", &loftq) - plain).abs() > 1e-3);
    let same = base();
    let nothing_lost = ["--init-lora-weights", "loftq", "--loftq-base", &same];
    assert!((first("nothing lost", &nothing_lost) - plain).abs() < 2e-5);
}

/// A path given relative to one directory is found when resuming from another.
#[test]
fn a_loftq_run_resumes_from_another_directory() {
    let lab = Lab::new();
    let (other, out) = (lab.other_base(), lab.path("run"));
    let relative = Path::new(&other).strip_prefix(lab.folder.path()).unwrap();
    let run = |directory: &Path, args: &[String]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantune"));
        last_json(&command.current_dir(directory).args(args).output().unwrap());
    };
    let relative = relative.display().to_string();
    let loftq = ["--init-lora-weights", "loftq", "--loftq-base", &relative, "--save-steps", "1"];
    run(lab.folder.path(), &sft(&lab, "run", &loftq));
    let weights = || fs::read(Path::new(&out).join("adapter/adapter_model.safetensors")).unwrap();
    let trained = weights();
    fs::remove_dir_all(Path::new(&out).join("checkpoints/step-2")).unwrap();
    fs::remove_dir_all(Path::new(&out).join("adapter")).unwrap();
    run(Path::new("/"), &strings(&["sft", "--out", &out, "--resume", "--json"]));
    assert!(weights() == trained, "the resumed run ends with another adapter");
}

#[test]
fn unsupported_initializations_are_reported() {
    let lab = Lab::new();
    let check = |more: &[&str], needed: &str| {
        let found = error(&quantune(&sft(&lab, "run", more)));
        assert!(found.contains(needed), "{more:?}: {found:?} should say {needed:?}");
    };
    check(&["--init-lora-weights", "corda"], "pissa, pissa_niter_N, olora or loftq");
    check(
        &["--init-lora-weights", "pissa", "--lora-dropout", "0.1"],
        "lora_dropout 0.1 with pissa",
    );
    check(&["--init-lora-weights", "loftq"], "needs loftq_base");
    check(&["--loftq-base", "x"], "loftq_base is for init_lora_weights loftq");
    check(
        &["--modules-to-save", "norm"],
        "modules_to_save: found \"norm\", needed score, embed_tokens",
    );
    check(&["--modules-to-save", "score"], "needed embed_tokens or lm_head");
    check(&["--trainable-token-indices", "512"], "found 512, needed less than 512");
    check(&["--use-dora", "--target-modules", "lm_head"], "use_dora with target lm_head");
    check(&["--loraplus-lr-embedding", "1e-3"], "loraplus_lr_ratio is 1");
    check(&["--loraplus-lr-ratio", "0"], "loraplus_lr_ratio is 0");
    assert!(!Path::new(&lab.path("run")).exists());
}

#[test]
fn export_and_merge_combine_adapters() {
    let lab = Lab::new();
    let (base, adapter) = (base(), trained());
    let other = golden("train/llama-tiny-linear/final").display().to_string();
    let two = [adapter.clone(), format!("{other}=-0.5")];
    let run = |command: &str, out: &str, more: &[&str]| {
        let mut args = strings(&[command, "--base", &base, "--out", &lab.path(out), "--json"]);
        for adapter in &two {
            args.extend(strings(&["--adapter", adapter]));
        }
        args.extend(strings(more));
        quantune(&args)
    };
    let combined = ["--combination-type", "dare_ties_svd", "--density", "0.7", "--svd-rank", "5"];
    last_json(&run("export", "peft", &combined));
    let config = fs::read_to_string(lab.path("peft/adapter_config.json")).unwrap();
    let config = LoraConfig::from_json(&config).unwrap();
    assert_eq!((config.r, config.lora_alpha), (5, 5.0));
    let bytes = |folder: &str| {
        fs::read(lab.path(folder).to_string() + "/adapter_model.safetensors").unwrap()
    };
    last_json(&run("export", "again", &[&combined[..], &["--seed", "42"]].concat()));
    assert_eq!(bytes("peft"), bytes("again"));
    last_json(&run("export", "seeded", &[&combined[..], &["--seed", "7"]].concat()));
    assert_ne!(bytes("peft"), bytes("seeded"));

    // Exactly the sum, whether the adapters are combined first or not.
    last_json(&run("merge", "sum.gguf", &["--type", "F32"]));
    last_json(&run("merge", "cat.gguf", &["--type", "F32", "--combination-type", "cat"]));
    let weights = |file: &str| -> Vec<f32> {
        let base = quantune::weights::Checkpoint::open(lab.path(file)).unwrap();
        let decoder = Decoder::load(&base, Compute::F32).unwrap();
        let weight = decoder.linear_weight("model.layers.1.mlp.up_proj").unwrap();
        let mut values = vec![0f32; weight.rows() * weight.cols()];
        weight.read(0..weight.rows(), &mut values);
        values
    };
    let (sum, cat) = (weights("sum.gguf"), weights("cat.gguf"));
    assert!(sum.iter().zip(&cat).all(|(a, b)| (a - b).abs() < 1e-5));

    let check = |command: &str, more: &[&str], needed: &str| {
        let output = run(command, "none", more);
        assert_eq!(output.status.code(), Some(2), "{more:?}");
        let found = String::from_utf8(output.stderr).unwrap();
        assert!(found.contains(needed), "{more:?}: {found:?} should say {needed:?}");
    };
    check("export", &[], "require --combination-type");
    check("export", &["--combination-type", "tie"], "needed one of linear, cat, svd");
    check("export", &["--combination-type", "ties"], "ties needs a density");
    check("merge", &["--density", "0.5"], "--combination-type");
    check(
        "merge",
        &["--combination-type", "cat", "--seed", "1"],
        "--seed only applies to the dare methods",
    );
    check(
        "merge",
        &["--combination-type", "cat", "--svd-rank", "1"],
        "svd_rank only applies to the svd kinds",
    );
}
