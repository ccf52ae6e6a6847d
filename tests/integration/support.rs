//! Shared test helpers: golden files and small conversions.

use std::path::PathBuf;

use candle_core::Tensor;
use candle_core::Var;
use quantune::model::Decoder;
use quantune::ops::Compute;
use quantune::optim::{AdamW, AdamWSettings};
use quantune::train::step::{TrainState, train_state};
use quantune::weights::Checkpoint;
use serde_json::Value;

/// A file under `tests/golden`.
pub fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
}

pub fn golden_json(path: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden(path)).unwrap()).unwrap()
}

/// A golden model: a folder or a `.gguf`.
pub fn model_path(name: &str) -> PathBuf {
    let folder = golden(&format!("model/{name}"));
    if folder.is_dir() { folder } else { golden(&format!("model/{name}.gguf")) }
}

pub fn load(name: &str, compute: Compute) -> Decoder {
    Decoder::load(&Checkpoint::open(model_path(name)).unwrap(), compute).unwrap()
}

/// The reference backend with weights uploaded to a device, here the CPU.
pub fn load_uploaded(name: &str) -> Decoder {
    load(name, Compute::REFERENCE).on(&candle_core::Device::Cpu).unwrap()
}

/// Log-softmax of each row of `logits (M, V)`, in f64.
pub fn log_softmax(logits: &Tensor) -> Vec<Vec<f64>> {
    let row = |row: Vec<f32>| {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|&l| f64::from(l - max).exp()).sum();
        row.into_iter().map(|l| f64::from(l - max) - sum.ln()).collect()
    };
    logits.to_vec2::<f32>().unwrap().into_iter().map(row).collect()
}

pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

/// Zero gradients for parameters of adapters on `decoder`, in the form of its backend.
pub fn new_state(decoder: &Decoder, parameters: &[Var]) -> Box<dyn TrainState> {
    let settings =
        AdamWSettings { adam_beta1: 0.9, adam_beta2: 0.999, adam_epsilon: 1e-8, weight_decay: 0.0 };
    let lengths: Vec<usize> = parameters.iter().map(|var| var.elem_count()).collect();
    let optimizer = AdamW::new(settings, &lengths);
    train_state(decoder.compute.backend, parameters, optimizer).unwrap()
}
