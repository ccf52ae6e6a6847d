//! Every kind of adapter (DoRA, updates of embedding and head, saved modules, token rows): the cpu backend
//! compared with the reference, gradients with finite differences, batches with single rows.

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use quantune::data::{Batch, Example};
use quantune::export::{
    ExportSource, FileType, Recipe, VerifyBounds, verify, write_folder, write_gguf,
};
use quantune::generate::{self, Request, Sampling, Settings};
use quantune::model::{ActiveAdapter, Adapters, CacheType, Decoder, Rows};
use quantune::objectives::Objective;
use quantune::ops::Compute;
use quantune::optim::Gradients;
use quantune::quant::BlockType;
use quantune::train::step::StepSettings;
use quantune::weights::Checkpoint;
use quantune_adapters::config::{InitLoraWeights, LoraConfig};
use quantune_adapters::delta::{Adapter, Lora, Magnitude, TokenRows};
use quantune_adapters::rng::Stream;
use quantune_adapters::targets::Target;

use crate::support::{load, model_path, new_state};
use crate::train::rows;

/// What an adapter of a test has in addition to plain LoRA.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    Plain,
    Dora,
    /// Updates of the embedding and the head.
    Ends,
    /// A whole embedding and head.
    Whole,
    /// Rows of some tokens.
    Tokens,
    /// Rows of some tokens of the embedding, and of others of the head.
    Apart,
}

pub const KINDS: [Kind; 6] =
    [Kind::Plain, Kind::Dora, Kind::Ends, Kind::Whole, Kind::Tokens, Kind::Apart];

fn random(key: &str, shape: (usize, usize), deviation: f32) -> Vec<f32> {
    let mut stream = Stream::new(11, key, &[]);
    (0..shape.0 * shape.1).map(|_| stream.normal() * deviation).collect()
}

fn var(values: Vec<f32>, shape: (usize, usize)) -> Var {
    Var::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// A random adapter, keyed by its name.
fn adapter(decoder: &Decoder, name: &str, kind: Kind) -> Adapter {
    let config = LoraConfig {
        init_lora_weights: InitLoraWeights::Random,
        r: 3,
        lora_alpha: 6.0,
        ..LoraConfig::default()
    };
    let layers = decoder.linears().into_iter().filter(|spec| spec.name.starts_with("model.layers"));
    let targets: Vec<Target> = layers.map(|spec| Target { spec, r: 3, scale: 2.0 }).collect();
    let mut adapter =
        Adapter::new(name, config, &targets, name.len() as u64, &Device::Cpu).unwrap();
    let (vocabulary, width) = (decoder.config.vocab_size, decoder.config.hidden_size);
    match kind {
        Kind::Plain => {}
        Kind::Dora => {
            for (module, lora) in &mut adapter.modules {
                let m = random(&format!("{name} {module}"), (lora.out_features(), 1), 0.3);
                let m: Vec<f32> = m.iter().map(|m| m + 1.0).collect();
                let rows = m.len();
                let m = Var::from_vec(m, rows, &Device::Cpu).unwrap();
                lora.magnitude = Some(Magnitude::new(m));
            }
        }
        Kind::Ends => {
            for (module, inputs, outputs) in
                [("model.embed_tokens", vocabulary, width), ("lm_head", width, vocabulary)]
            {
                let a = random(&format!("{name} {module} A"), (3, inputs), 0.1);
                let b = random(&format!("{name} {module} B"), (outputs, 3), 0.1);
                let lora = Lora::new(var(a, (3, inputs)), var(b, (outputs, 3)), 2.0);
                adapter.modules.insert(module.into(), lora);
            }
        }
        Kind::Whole => {
            for module in ["model.embed_tokens", "lm_head"] {
                let whole = random(&format!("{name} {module}"), (vocabulary, width), 0.1);
                adapter.saved.insert(module.into(), var(whole, (vocabulary, width)));
            }
        }
        Kind::Tokens | Kind::Apart => {
            let rows = |key: &str, step| {
                let indices: Vec<u32> = (0..vocabulary as u32).rev().step_by(step).collect();
                let indices: Vec<u32> = indices.into_iter().rev().collect();
                let rows = random(&format!("{name}{key}"), (indices.len(), width), 0.2);
                let rows = var(rows, (indices.len(), width));
                Some(TokenRows { indices, rows })
            };
            adapter.tokens = rows("", 3);
            if kind == Kind::Apart {
                adapter.head_tokens = rows(" head", 4);
            }
        }
    }
    adapter
}

pub struct Step {
    pub rows: Vec<Example>,
    pub decoder: Decoder,
    /// The trainable adapter last.
    pub active: Vec<ActiveAdapter>,
    pub parameters: Vec<(String, Var)>,
}

impl Step {
    pub fn new(model: &str, compute: Compute, below: &[(Kind, f64)], kind: Kind) -> Self {
        Self::over(load(model, compute), below, kind)
    }

    fn over(decoder: Decoder, below: &[(Kind, f64)], kind: Kind) -> Self {
        let mut active = Vec::new();
        for (i, &(kind, weight)) in below.iter().enumerate() {
            let adapter = Arc::new(adapter(&decoder, &format!("below{i}"), kind));
            active.push(ActiveAdapter { adapter, weight, trainable: false });
        }
        let trained = Arc::new(adapter(&decoder, "trained", kind));
        let parameters = trained.parameters();
        active.push(ActiveAdapter::trainable(trained));
        let mut rows = rows("llama-tiny");
        rows.truncate(3);
        Self { rows, decoder, active, parameters }
    }

    /// The loss over a few rows, and the gradients.
    pub fn run(&self, recomputed: bool) -> (f64, Gradients) {
        let rows = &self.rows;
        let batch = Batch::new(rows, &[(0..rows.len()).collect()]);
        let vars: Vec<Var> = self.parameters.iter().map(|(_, var)| var.clone()).collect();
        let mut state = new_state(&self.decoder, &vars);
        let settings = StepSettings {
            objective: &Objective::LanguageModeling,
            temperature: 0.8,
            scale: 1.0 / batch.count() as f64,
            kept_layers: if recomputed { 0 } else { self.decoder.config.num_hidden_layers },
            active: &self.active,
            parameters: &vars,
            dropout: None,
            noise: None,
        };
        let judged = state.accumulate(&self.decoder, &batch, &settings, 0..vars.len()).unwrap();
        (judged.loss / batch.count() as f64, state.gradients().unwrap())
    }
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}

/// Loss and every gradient match the reference, with and without a frozen adapter below.
#[test]
fn every_kind_trains_like_the_reference() {
    for model in ["llama-tiny", "llama-untied", "qwen2-tiny", "llama-q8_0"] {
        for kind in KINDS {
            for below in [&[][..], &[(Kind::Dora, 0.6), (Kind::Ends, 1.0), (Kind::Whole, 0.3)]] {
                let check =
                    |compute, recomputed| Step::new(model, compute, below, kind).run(recomputed);
                let (loss, gradients) = check(Compute::F32, false);
                let (exact_loss, exact) = check(Compute::REFERENCE, false);
                let at = format!("{model} {kind:?} below {below:?}");
                assert!((loss - exact_loss).abs() < 2e-6 * exact_loss, "{at}: {loss} {exact_loss}");
                let names = Step::new(model, Compute::F32, below, kind).parameters;
                for ((ours, exact), (name, _)) in gradients.iter().zip(&exact).zip(names) {
                    let difference: Vec<f32> = ours.iter().zip(exact).map(|(a, b)| a - b).collect();
                    let bound = 1e-4 * norm(exact) + 1e-8;
                    assert!(
                        norm(&difference) < bound,
                        "{at} {name}: {} of {}",
                        norm(&difference),
                        norm(exact)
                    );
                }
                assert_eq!((loss, gradients), check(Compute::F32, true), "{at} recomputed");
            }
        }
    }
}

/// With weights uploaded to a device (here the CPU), loss and gradients match the reference.
#[test]
fn every_kind_trains_on_uploaded_weights() {
    for (model, recomputed) in [("llama-untied", false), ("qwen2-mix", true), ("llama-q4_0", true)]
    {
        for kind in KINDS {
            let below = [(Kind::Dora, 0.6), (Kind::Ends, 1.0), (Kind::Whole, 0.3)];
            let step = Step::new(model, Compute::REFERENCE, &below, kind);
            let (exact_loss, exact) = step.run(recomputed);
            let decoder = step.decoder.on(&candle_core::Device::Cpu).unwrap();
            let (loss, gradients) = Step { decoder, ..step }.run(recomputed);
            let at = format!("{model} {kind:?}");
            assert!((loss - exact_loss).abs() < 1e-6 * exact_loss, "{at}: {loss} {exact_loss}");
            for (i, (ours, exact)) in gradients.iter().zip(&exact).enumerate() {
                let difference: Vec<f32> = ours.iter().zip(exact).map(|(a, b)| a - b).collect();
                let (error, size) = (norm(&difference), norm(exact));
                assert!(
                    error < 1e-5 * size + 1e-8,
                    "{at}: gradient {i} is {error:e} of {size:e} off"
                );
            }
        }
    }
}

/// With added tokens the cpu backend, the reference and uploaded weights agree, also in rows and loss of
/// the added tokens; results of the other tokens do not change.
#[test]
fn every_kind_trains_with_added_tokens() {
    for model in ["llama-tiny", "llama-untied", "llama-q4_0"] {
        let grown = |compute| load(model, compute).with_vocabulary(515).unwrap();
        for kind in [Kind::Whole, Kind::Tokens, Kind::Apart] {
            let run = |decoder| {
                let mut step = Step::over(decoder, &[(Kind::Ends, 0.5)], kind);
                for token in step.rows.iter_mut().flat_map(|row| &mut row.tokens) {
                    *token = if *token % 5 == 0 { 512 + *token / 5 % 3 } else { *token };
                }
                step.run(false)
            };
            let (exact_loss, exact) = run(grown(Compute::REFERENCE));
            let uploaded = grown(Compute::REFERENCE).on(&Device::Cpu).unwrap();
            for (loss, gradients) in [run(grown(Compute::F32)), run(uploaded)] {
                let at = format!("{model} {kind:?}");
                assert!((loss - exact_loss).abs() < 2e-6 * exact_loss, "{at}: {loss} {exact_loss}");
                for (i, (ours, exact)) in gradients.iter().zip(&exact).enumerate() {
                    let difference: Vec<f32> = ours.iter().zip(exact).map(|(a, b)| a - b).collect();
                    let (error, size) = (norm(&difference), norm(exact));
                    assert!(
                        error < 1e-4 * size + 1e-8,
                        "{at}: gradient {i}: {error:e} of {size:e}"
                    );
                }
            }
        }
        for compute in [Compute::F32, Compute::INT16] {
            let hidden = Tensor::from_vec(random("hidden", (3, 64), 1.0), (3, 64), &Device::Cpu);
            let hidden = hidden.unwrap();
            let logits = |decoder: &Decoder| {
                let logits = decoder.logits(&hidden, Adapters::NONE).unwrap();
                logits.to_vec2::<f32>().unwrap()
            };
            let decoder = grown(compute);
            for (ours, own) in logits(&decoder).iter().zip(logits(&load(model, compute))) {
                assert_eq!(ours[..512], own, "{model} {compute}");
                let mean = own.iter().sum::<f32>() / 512.0;
                assert!(ours[512..].iter().all(|logit| (logit - mean).abs() < 1e-3), "{model}");
            }
        }
    }
}

/// Along a random direction of each parameter, central differences of the loss match the gradient.
#[test]
fn gradients_are_those_of_finite_differences() {
    for kind in KINDS {
        let step = Step::new("llama-untied", Compute::F32, &[(Kind::Dora, 0.6)], kind);
        let (_, gradients) = step.run(false);
        for ((name, var), gradient) in step.parameters.iter().zip(&gradients) {
            let original: Vec<f32> = var.flatten_all().unwrap().to_vec1().unwrap();
            // Along the gradient itself, where the difference is largest compared with rounding. Row
            // norms stay the same, as DoRA treats them as constants.
            let length = norm(gradient);
            if length < 0.02 {
                continue;
            }
            let step_size = (1e-3 / length).clamp(0.002, 0.05) / length;
            let moved = |by: f64| {
                let values = original.iter().zip(gradient);
                let values: Vec<f32> =
                    values.map(|(v, g)| (f64::from(*v) + by * f64::from(*g)) as f32).collect();
                let values = Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap();
                var.set(&values).unwrap();
                step.run(false).0
            };
            let slope = (moved(step_size) - moved(-step_size)) / (2.0 * step_size);
            moved(0.0);
            let exact = length * length;
            assert!(
                (slope - exact).abs() < 0.02 * exact + 1e-7,
                "{kind:?} {name}: {slope} {exact}"
            );
        }
    }
}

/// Rows with different adapters in one batch match single rows, in a forward pass and in generation; integer
/// precisions and the reference are close. Also with added tokens.
#[test]
fn mixed_adapter_batch_matches_single_rows() {
    for vocabulary in [512, 515] {
        rows_wear_what_they_wear_alone_over(vocabulary);
    }
}

fn rows_wear_what_they_wear_alone_over(vocabulary: usize) {
    let load = |compute| load("llama-untied", compute).with_vocabulary(vocabulary).unwrap();
    let decoder = load(Compute::F32);
    let lists: Vec<Vec<ActiveAdapter>> = KINDS
        .iter()
        .enumerate()
        .map(|(i, &kind)| {
            let mut active =
                vec![ActiveAdapter::frozen(Arc::new(adapter(&decoder, &format!("n{i}"), kind)))];
            if i % 2 == 0 {
                let adapter = Arc::new(adapter(&decoder, "second", Kind::Dora));
                active.push(ActiveAdapter { adapter, weight: -0.5, trainable: false });
            }
            active
        })
        .chain([Vec::new()])
        .collect();
    let active: Vec<&[ActiveAdapter]> = lists.iter().map(|list| &list[..]).collect();
    let texts: Vec<Vec<u32>> =
        (0..active.len() as u32).map(|i| vec![5 + i, 9, 30 + i, 7]).collect();
    let logits = |decoder: &Decoder, rows: &[&[u32]], active: &[&[ActiveAdapter]]| {
        let adapters = Adapters::PerRow(active);
        let rows = Rows::new(rows);
        let ends: Vec<u32> = rows.segments.iter().map(|s| s.tokens.end as u32 - 1).collect();
        let hidden = decoder.hidden_of(&rows, adapters, &ends).unwrap();
        decoder.logits(&hidden, adapters).unwrap().to_vec2::<f32>().unwrap()
    };
    let rows: Vec<&[u32]> = texts.iter().map(|row| &row[..]).collect();
    let together = logits(&decoder, &rows, &active);
    let portable = logits(&load(Compute::REFERENCE), &rows, &active);
    let uploaded = load(Compute::REFERENCE).on(&Device::Cpu).unwrap();
    let uploaded = logits(&uploaded, &rows, &active);
    for (ours, exact) in uploaded.iter().flatten().zip(portable.iter().flatten()) {
        assert!((ours - exact).abs() < 1e-4, "{ours}, before the upload {exact}");
    }
    for (i, row) in together.iter().enumerate() {
        let alone = &logits(&decoder, &rows[i..=i], &active[i..=i])[0];
        let close =
            |a: &[f32], b: &[f32], bound: f32| a.iter().zip(b).all(|(a, b)| (a - b).abs() < bound);
        assert!(close(row, alone, 1e-5), "row {i} alone");
        assert!(close(row, &portable[i], 1e-4), "row {i} in the portable form");
    }
    for (i, one) in together.iter().enumerate() {
        for other in &together[i + 1..] {
            assert!(
                one.iter().zip(other).any(|(a, b)| (a - b).abs() > 1e-2),
                "row {i} is another's"
            );
        }
    }

    let settings = Settings {
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        max_tokens: 12,
        cache: CacheType::F32,
        logprobs: None,
        sampled_logps: false,
        slots: 4,
    };
    let go_on = |rows: &[&[u32]], active: &[&[ActiveAdapter]]| {
        let requests: Vec<Request> =
            rows.iter().enumerate().map(|(i, row)| Request::new(row, i as u64)).collect();
        let adapters = Adapters::PerRow(active);
        let never = |_| false;
        let generation =
            generate::generate(&decoder, adapters, &requests, &settings, &never, &mut |_, _| {
                std::ops::ControlFlow::Continue(())
            });
        let rows = generation.unwrap().rows.into_iter();
        rows.map(|row| row.token_ids).collect::<Vec<_>>()
    };
    let together = go_on(&rows, &active);
    for i in 0..rows.len() {
        assert_eq!(together[i], go_on(&rows[i..=i], &active[i..=i])[0], "row {i}");
    }
}

/// Merged into a folder and a GGUF, every kind gives the same log-probs as the active adapter, also at weights
/// other than 1; a tied head becomes untied where only one of the two matrices changes.
#[test]
fn every_kind_merges_exactly() {
    for model in ["llama-tiny", "llama-untied", "qwen2-tiny", "llama-q8_0"] {
        let decoder = load(model, Compute::F32);
        let checkpoint = Checkpoint::open(model_path(model)).unwrap();
        for kind in KINDS {
            let one = Arc::new(adapter(&decoder, "one", kind));
            let other = Arc::new(adapter(&decoder, "other", Kind::Dora));
            let active = [
                ActiveAdapter { adapter: one, weight: 1.0, trainable: false },
                ActiveAdapter { adapter: other, weight: 0.6, trainable: false },
            ];
            for active in [&active[..1], &active[..]] {
                let source = ExportSource::open(&checkpoint, active).unwrap();
                let tied = decoder.config.tie_word_embeddings;
                let apart = matches!(kind, Kind::Ends | Kind::Whole | Kind::Apart);
                assert_eq!(source.config.tie_word_embeddings, tied && !apart, "{model} {kind:?}");
                let out = tempfile::tempdir().unwrap();
                let gguf = out.path().join("merged.gguf");
                write_gguf(&source, &Recipe::new(FileType::F32), None, &gguf).unwrap();
                verify(&checkpoint, active, &gguf, VerifyBounds::F32).unwrap();
                if model != "llama-q8_0" {
                    let folder = out.path().join("merged");
                    write_folder(&source, BlockType::F32, &folder).unwrap();
                    verify(&checkpoint, active, &folder, VerifyBounds::F32).unwrap();
                }
            }
        }
    }
}
