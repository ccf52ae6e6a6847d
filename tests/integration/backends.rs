//! Every backend matches the reference: [`backend_tests!`] defines the same tests for each,
//! so that a new backend gets all of them with one line.

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use quantune::data::Batch;
use quantune::model::scoring::{log_probs_and_scores, row_scores, target_log_probs};
use quantune::model::{ActiveAdapter, Adapters, Decoder, KvCache, Rows};
use quantune::ops::Compute;
use quantune::optim::{AdamW, AdamWSettings};
use quantune::train::step::train_state;

use crate::adapter_kinds::{KINDS, Kind, Step};
use crate::support::{load, log_softmax};

/// Models that differ in biases, tied embeddings and block types.
const MODELS: [&str; 3] = ["llama-tiny", "qwen2-tiny", "llama-q4_0"];

/// The tests of a backend in a precision, with an error bound relative to the reference.
macro_rules! backend_tests {
    ($($name:ident: $compute:expr, $bound:expr;)*) => {$(
        mod $name {
            use super::Compute;

            const COMPUTE: Compute = $compute;
            const BOUND: f64 = $bound;

            #[test]
            fn forward_is_the_references() {
                super::forward_is_the_references(COMPUTE, BOUND);
            }

            #[test]
            fn gradients_of_all_adapter_kinds_are_the_references() {
                super::gradients_are_the_references(COMPUTE, BOUND);
            }

            #[test]
            fn recomputed_layers_change_no_bit() {
                super::recomputed_layers_change_no_bit(COMPUTE);
            }

            #[test]
            fn cached_tokens_give_what_the_whole_row_gives() {
                super::cached_tokens_give_what_the_whole_row_gives(COMPUTE, BOUND);
            }

            #[test]
            fn a_row_alone_is_the_row_among_others() {
                super::a_row_alone_is_the_row_among_others(COMPUTE);
            }

            #[test]
            fn log_probs_and_scores_are_the_references() {
                super::log_probs_and_scores_are_the_references(COMPUTE, BOUND);
            }

            #[test]
            fn optimizer_steps_are_the_references() {
                super::optimizer_steps_are_the_references(COMPUTE, BOUND);
            }
        }
    )*};
}

backend_tests! {
    reference: Compute::REFERENCE, 1e-5;
    cpu_f32: Compute::F32, 1e-5;
    cpu_int16: Compute::INT16, 2e-2;
}

fn error(found: &[f32], needed: &[f32]) -> f64 {
    assert_eq!(found.len(), needed.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = found.iter().zip(needed).map(|(a, b)| f64::from(a - b));
    let difference = norm(&mut difference.into_iter());
    difference / norm(&mut needed.iter().map(|&b| f64::from(b))).max(1e-6)
}

fn flat(x: &Tensor) -> Vec<f32> {
    x.to_device(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn tokens(rows: &[usize]) -> Vec<Vec<u32>> {
    let row =
        |(row, &n): (usize, &usize)| (0..n).map(|i| ((row * 31 + i * 7) % 97) as u32).collect();
    rows.iter().enumerate().map(row).collect()
}

/// Active adapters of every kind, with weights.
fn active(model: &str, compute: Compute, kind: Kind) -> (Decoder, Vec<ActiveAdapter>) {
    let Step { decoder, active, .. } = Step::new(model, compute, &[(Kind::Plain, 0.7)], kind);
    let frozen = active.into_iter().map(|active| ActiveAdapter { trainable: false, ..active });
    (decoder, frozen.collect())
}

fn forward_is_the_references(compute: Compute, bound: f64) {
    let rows = Rows::new(&tokens(&[9, 1, 17]));
    for (model, kind) in MODELS.into_iter().zip([Kind::Plain, Kind::Dora, Kind::Ends]) {
        let run = |compute| {
            let (decoder, active) = active(model, compute, kind);
            let adapters = Adapters::Same(&active);
            let hidden = decoder.hidden(&rows, adapters).unwrap();
            let logits = decoder.logits(&hidden, adapters).unwrap();
            (flat(&hidden), flat(&logits))
        };
        let ((hidden, logits), (exact_hidden, exact)) = (run(compute), run(Compute::REFERENCE));
        let errors = [error(&hidden, &exact_hidden), error(&logits, &exact)];
        assert!(errors.iter().all(|&error| error < bound), "{model} {kind:?}: {errors:?}");
    }
}

fn gradients_are_the_references(compute: Compute, bound: f64) {
    for kind in KINDS {
        let run =
            |compute| Step::new("llama-untied", compute, &[(Kind::Dora, 0.6)], kind).run(false);
        let ((loss, gradients), (exact_loss, exact)) = (run(compute), run(Compute::REFERENCE));
        assert!((loss - exact_loss).abs() < bound * exact_loss, "{kind:?}: {loss} {exact_loss}");
        for (i, (found, needed)) in gradients.iter().zip(&exact).enumerate() {
            let error = error(found, needed);
            assert!(error < 5.0 * bound, "{kind:?}: gradient {i} is {error:e} off");
        }
    }
}

fn recomputed_layers_change_no_bit(compute: Compute) {
    for kind in KINDS {
        let step = Step::new("llama-untied", compute, &[], kind);
        assert_eq!(step.run(false), step.run(true), "{kind:?}");
    }
}

/// Prompts and decode steps through the cache, with rows of different lengths, one of which is idle.
fn cached_tokens_give_what_the_whole_row_gives(compute: Compute, bound: f64) {
    let rows = tokens(&[12, 5, 9]);
    for model in MODELS {
        let (decoder, active) = active(model, compute, Kind::Plain);
        let adapters = Adapters::Same(&active);
        let mut cache = KvCache::new(&decoder, rows.len());
        let mut found: Vec<Vec<f32>> = vec![Vec::new(); rows.len()];
        for (step, pieces) in [[4, 5, 0], [1, 0, 1], [6, 0, 7], [1, 0, 1]].iter().enumerate() {
            let next: Vec<(&[u32], usize)> = rows
                .iter()
                .zip(pieces)
                .enumerate()
                .map(|(i, (row, n))| (&row[cache.len(i)..][..*n], cache.len(i)))
                .collect();
            let next = Rows::after(next.into_iter());
            let decodes = step % 2 == 1;
            let hidden = if decodes {
                decoder.hidden_step(&next, adapters, &mut cache).unwrap()
            } else {
                decoder.hidden_cached(&next, adapters, &mut cache).unwrap()
            };
            for (found, segment) in found.iter_mut().zip(next.segments.iter()) {
                found.extend(flat(&hidden.narrow(0, segment.tokens.start, segment.len()).unwrap()));
            }
        }
        for (i, (row, found)) in rows.iter().zip(&found).enumerate() {
            assert_eq!(cache.len(i), row.len());
            let whole = flat(&decoder.hidden(&Rows::new(&[row]), adapters).unwrap());
            let error = error(found, &whole);
            assert!(error < bound, "{model} row {i}: {error:e} off");
        }
    }
}

fn a_row_alone_is_the_row_among_others(compute: Compute) {
    let rows = tokens(&[7, 3, 11]);
    for model in MODELS {
        let (decoder, active) = active(model, compute, Kind::Plain);
        let lists: [&[ActiveAdapter]; 3] = [&active, &[], &active[1..]];
        let together = decoder.hidden(&Rows::new(&rows), Adapters::PerRow(&lists)).unwrap();
        let ends = [6u32, 9, 20];
        let chosen = decoder.hidden_of(&Rows::new(&rows), Adapters::PerRow(&lists), &ends).unwrap();
        let mut start = 0;
        for (i, (row, active)) in rows.iter().zip(lists).enumerate() {
            let alone = decoder.hidden(&Rows::new(&[row]), Adapters::Same(active)).unwrap();
            let among = together.narrow(0, start, row.len()).unwrap();
            start += row.len();
            let error = error(&flat(&among), &flat(&alone));
            assert!(error < 1e-5, "{model} row {i}: {error:e} off");
            let last = flat(&among.narrow(0, row.len() - 1, 1).unwrap());
            assert_eq!(flat(&chosen.narrow(0, i, 1).unwrap()), last, "{model} row {i}");
        }
    }
}

fn log_probs_and_scores_are_the_references(compute: Compute, bound: f64) {
    for kind in [Kind::Plain, Kind::Ends] {
        let run = |compute| {
            let step = Step::new("llama-untied", compute, &[], kind);
            let batch = Batch::new(&step.rows, &[(0..step.rows.len()).collect()]);
            let width = step.decoder.config.hidden_size;
            let head: Vec<f32> = (0..width).map(|i| (i as f32 * 0.3).sin()).collect();
            let head = Tensor::from_vec(head, (1, width), &Device::Cpu).unwrap();
            let (decoder, active) = (&step.decoder, &step.active[..]);
            let scored = batch.ends.clone();
            let logps = target_log_probs(decoder, active, &batch, 0.8).unwrap();
            let scores = row_scores(decoder, active, &head, &batch, scored.clone()).unwrap();
            let both = log_probs_and_scores(decoder, active, &head, &batch, 0.8, &scored).unwrap();
            assert_eq!(both, (logps.clone(), scores.clone()), "{kind:?}");
            (logps, scores)
        };
        let ((logps, scores), (exact, exact_scores)) = (run(compute), run(Compute::REFERENCE));
        let errors = [error(&logps, &exact), error(&scores, &exact_scores)];
        assert!(errors.iter().all(|&error| error < bound), "{kind:?}: {errors:?}");
    }
    let (decoder, _) = active("llama-untied", compute, Kind::Plain);
    let hidden = decoder.hidden(&Rows::new(&tokens(&[4])), Adapters::NONE).unwrap();
    let whole = log_softmax(&decoder.logits(&hidden, Adapters::NONE).unwrap());
    let logps = decoder.log_probs(&hidden, &[5, 6, 7, 8], &[]).unwrap();
    let needed: Vec<f32> = (0..4).map(|i| whole[i][i + 5] as f32).collect();
    assert!(error(&logps, &needed) < bound);
}

/// Steps with rates, decays and clipping, the second half from a saved state.
fn optimizer_steps_are_the_references(compute: Compute, bound: f64) {
    let settings =
        AdamWSettings { adam_beta1: 0.9, adam_beta2: 0.95, adam_epsilon: 1e-8, weight_decay: 0.1 };
    let run = |optimizer: Compute| {
        let step = Step::new("llama-untied", compute, &[], Kind::Dora);
        let parameters: Vec<Var> = step.parameters.iter().map(|(_, var)| var.clone()).collect();
        let lengths: Vec<usize> = parameters.iter().map(|var| var.elem_count()).collect();
        let decays = (0..lengths.len()).map(|i| i % 2 == 0).collect();
        let rates = (0..lengths.len()).map(|i| 1.0 + (i % 3) as f64).collect();
        let state = AdamW::new(settings, &lengths).with_decays(decays).with_rates(rates);
        let mut state = train_state(optimizer.backend, &parameters, state).unwrap();
        let decoder = load("llama-untied", optimizer);
        let batch = Batch::new(&step.rows, &[(0..step.rows.len()).collect()]);
        let objective = quantune::objectives::Objective::LanguageModeling;
        let settings = quantune::train::step::StepSettings {
            objective: &objective,
            temperature: 1.0,
            scale: 1.0 / batch.count() as f64,
            kept_layers: 1,
            active: &[ActiveAdapter::trainable(Arc::clone(&step.active[0].adapter))],
            parameters: &parameters,
            dropout: None,
            noise: None,
        };
        let mut norms = Vec::new();
        for i in 0..4 {
            state.zero_gradients().unwrap();
            state.accumulate(&decoder, &batch, &settings, 0..parameters.len()).unwrap();
            norms.push(state.gradient_norm().unwrap() as f32);
            assert!(state.optimizer_step(&parameters, 0.5, 1e-3).unwrap());
            assert_eq!(state.optimizer_steps(), i + 1);
            if i == 1 {
                let saved = state.optimizer().unwrap().into_owned();
                state.set_optimizer(saved, &parameters).unwrap();
            }
        }
        (norms, parameters.iter().map(|var| flat(var)).collect::<Vec<_>>())
    };
    let ((norms, found), (exact_norms, exact)) = (run(compute), run(Compute::REFERENCE));
    assert!(error(&norms, &exact_norms) < bound.max(1e-4), "{norms:?} {exact_norms:?}");
    for (i, (found, needed)) in found.iter().zip(&exact).enumerate() {
        // Adam's first steps are as large as the learning rate, independent of the gradient: a sign changed by
        // rounding changes a value by that much.
        let (error, bound) = (error(found, needed), bound.max(1e-3));
        assert!(error < bound, "parameter {i} is {error:e} off");
    }
}
