//! Training against PEFT: ten steps of the same adapter over the same rows, the first step's
//! gradients, and invariance of a step under packing, the split into micro-batches and recomputation.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use quantune::data::{Batch, Example};
use quantune::model::{ActiveAdapter, Adapters, Decoder, Rows};
use quantune::objectives::Objective;
use quantune::ops::{Compute, Segment};
use quantune::optim::{
    AdamW, AdamWSettings, Gradients, Schedule, ScheduleKind, clip_factor, global_norm,
};
use quantune::train::step::{Noise, StepSettings, TrainState, dropout};
use quantune_adapters::delta::Adapter;
use quantune_adapters::format;
use serde_json::Value;

use crate::support::{golden, golden_json, load, new_state};

const RUNS: &[&str] = &[
    "llama-tiny",
    "qwen2-tiny",
    "llama-q8_0",
    "llama-q4_0",
    "llama-tiny-rslora",
    "llama-tiny-linear",
];

pub fn adapter(run: &str, which: &str, decoder: &Decoder) -> Adapter {
    let folder = golden(&format!("train/{run}/{which}"));
    let linears = decoder.linears();
    format::read_folder(&folder, "default", &linears, Some("lm_head"), &Device::Cpu).unwrap().0
}

pub fn rows(run: &str) -> Vec<Example> {
    let text = std::fs::read_to_string(golden(&format!("train/{run}/rows.jsonl"))).unwrap();
    let row = |(index, line): (usize, &str)| {
        let row: Value = serde_json::from_str(line).unwrap();
        let numbers = |key: &str| -> Vec<i64> {
            row[key].as_array().unwrap().iter().map(|v| v.as_i64().unwrap()).collect()
        };
        Example {
            tokens: numbers("input_ids").into_iter().map(|id| id as u32).collect(),
            learned: numbers("labels").into_iter().map(|label| label != -100).collect(),
            row: index as u64,
            line: index as u64 + 1,
            start: 0,
        }
    };
    text.lines().enumerate().map(row).collect()
}

/// Gradients and buffers of steps, after the first one.
pub type Buffers = Option<Box<dyn TrainState>>;

/// How a step is batched: the bins of each micro-batch, and whether layers are recomputed.
#[derive(Clone, Copy)]
pub struct Layout {
    /// Rows of a micro-batch.
    pub micro: usize,
    pub recompute: bool,
    pub dropout: f64,
}

const SINGLE: Layout = Layout { micro: 1, recompute: false, dropout: 0.0 };

pub struct Run {
    decoder: Decoder,
    adapter: Arc<Adapter>,
    parameters: Vec<Var>,
    /// Frozen adapters active with the trainable one.
    below: Vec<ActiveAdapter>,
    /// Number of layers that keep their tapes, if neither all nor none.
    kept_layers: Option<usize>,
    /// NEFTune's.
    noise: Option<Noise>,
}

impl Run {
    pub fn new(decoder: Decoder, adapter: Adapter) -> Self {
        let adapter = Arc::new(adapter);
        let parameters = adapter.parameters().into_iter().map(|(_, var)| var).collect();
        Self { decoder, adapter, parameters, below: Vec::new(), kept_layers: None, noise: None }
    }

    /// Loss and gradients of one step over `rows`.
    fn step(&self, rows: &[Example], layout: Layout) -> (f64, Gradients) {
        self.step_with(rows, layout, &mut Buffers::default())
    }

    pub fn step_with(
        &self,
        rows: &[Example],
        layout: Layout,
        buffers: &mut Buffers,
    ) -> (f64, Gradients) {
        let micro: Vec<Batch> = rows
            .chunks(layout.micro)
            .map(|rows| Batch::new(rows, &[(0..rows.len()).collect()]))
            .collect();
        self.step_over(&micro, layout, buffers)
    }

    fn step_over(
        &self,
        micro: &[Batch],
        layout: Layout,
        buffers: &mut Buffers,
    ) -> (f64, Gradients) {
        let count: usize = micro.iter().map(Batch::count).sum();
        let state = buffers.get_or_insert_with(|| new_state(&self.decoder, &self.parameters));
        state.zero_gradients().unwrap();
        let mut active = self.below.clone();
        active.push(ActiveAdapter::trainable(self.adapter.clone()));
        let layers = self.decoder.config.num_hidden_layers;
        let mut loss = 0.0;
        for batch in micro {
            let dropout = dropout(batch, 0, layout.dropout, 7);
            let settings = StepSettings {
                objective: &Objective::LanguageModeling,
                temperature: 1.0,
                scale: 1.0 / count as f64,
                kept_layers: self.kept_layers.unwrap_or(if layout.recompute { 0 } else { layers }),
                active: &active,
                parameters: &self.parameters,
                dropout: dropout.as_ref(),
                noise: self.noise,
            };
            let all = 0..self.parameters.len();
            let judged = state.accumulate(&self.decoder, batch, &settings, all).unwrap();
            loss += judged.loss;
        }
        (loss / count as f64, state.gradients().unwrap())
    }

    fn values(&self) -> Vec<Vec<f32>> {
        self.parameters.iter().map(|v| v.flatten_all().unwrap().to_vec1().unwrap()).collect()
    }

    fn set(&self, values: &[Vec<f32>]) {
        for (var, values) in self.parameters.iter().zip(values) {
            var.set(&Tensor::from_slice(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
        }
    }
}

/// `|a - b| / |b|` in Frobenius norms.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    difference / norm(&mut b.iter().map(|&b| f64::from(b)))
}

/// Ten steps from PEFT's initial adapter; losses and the final adapter within float noise of PEFT.
fn ten_steps(name: &str, layout: Layout, compute: Compute) {
    let golden_run = golden_json(&format!("train/{name}/run.json"));
    let decoder = load(golden_run["base"].as_str().unwrap(), compute);
    let run = Run::new(decoder, Adapter { ..adapter_of(name, "initial", &golden_run) });
    let number = |key: &str| golden_run[key].as_f64();
    let settings = AdamWSettings {
        adam_beta1: number("adam_beta1").unwrap_or(0.9),
        adam_beta2: number("adam_beta2").unwrap_or(0.999),
        adam_epsilon: number("adam_epsilon").unwrap_or(1e-8),
        weight_decay: number("weight_decay").unwrap(),
    };
    let lengths: Vec<usize> = run.parameters.iter().map(|var| var.elem_count()).collect();
    let mut optimizer = AdamW::new(settings, &lengths);
    let steps = golden_run["steps"].as_array().unwrap();
    let schedule = Schedule {
        kind: match golden_run["lr_scheduler_type"].as_str().unwrap() {
            "cosine" => ScheduleKind::Cosine,
            "linear" => ScheduleKind::Linear,
            other => panic!("{other}"),
        },
        learning_rate: number("learning_rate").unwrap(),
        warmup_steps: number("warmup_steps").unwrap() as u64,
        total_steps: steps.len() as u64,
        decay_steps: 0,
        min_lr_ratio: 0.0,
    };
    let max_norm = number("max_grad_norm").unwrap();
    let rows = rows(name);
    assert_eq!(rows.len(), 4 * steps.len());
    for (i, (theirs, rows)) in steps.iter().zip(rows.chunks(4)).enumerate() {
        let (loss, gradients) = run.step(rows, layout);
        let close = |what: &str, ours: f64, bound: f64| {
            let theirs = theirs[what].as_f64().unwrap();
            let error = (ours - theirs).abs() / theirs.abs().max(1.0);
            assert!(error < bound, "{name} step {i}: {what} {ours}, PEFT {theirs}");
        };
        close("loss", loss, 2e-5);
        let norm = global_norm(&gradients);
        close("grad_norm", norm, 1e-4);
        close("learning_rate", schedule.at(i as u64), 1e-9);
        if i == 0 {
            first_gradients(name, &run, &gradients);
        }
        let factor = if max_norm > 0.0 { clip_factor(norm, max_norm) } else { 1.0 };
        let learning_rate = schedule.at(i as u64);
        assert!(optimizer.step(&run.parameters, &gradients, factor, learning_rate).unwrap());
    }
    let theirs = adapter(name, "final", &run.decoder);
    for ((name, ours), (_, theirs)) in run.adapter.parameters().iter().zip(theirs.parameters()) {
        let flat = |var: &Var| var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let error = relative(&flat(ours), &flat(&theirs));
        assert!(error < 2e-5, "{name} is {error:e} from PEFT's");
    }
}

fn adapter_of(name: &str, which: &str, run: &Value) -> Adapter {
    adapter(name, which, &load(run["base"].as_str().unwrap(), Compute::F32))
}

fn first_gradients(name: &str, run: &Run, gradients: &Gradients) {
    let path = golden(&format!("train/{name}/gradients.safetensors"));
    let theirs: HashMap<String, Tensor> =
        candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    assert_eq!(theirs.len(), run.parameters.len());
    for ((name, _), ours) in run.adapter.parameters().iter().zip(gradients) {
        let theirs: Vec<f32> = theirs[name].flatten_all().unwrap().to_vec1().unwrap();
        assert!(ours.iter().all(|g| g.is_finite()) && ours.iter().any(|g| *g != 0.0), "{name}");
        let error = relative(ours, &theirs);
        assert!(error < 1e-4, "{name}: gradient {error:e} from PEFT's");
    }
}

#[test]
fn ten_steps_match_peft() {
    for name in RUNS {
        ten_steps(name, SINGLE, Compute::F32);
    }
}

#[test]
fn ten_steps_match_peft_packed_split_and_recomputed() {
    for (micro, recompute) in [(4, true), (4, false), (3, true), (2, false)] {
        ten_steps("llama-q4_0", Layout { micro, recompute, dropout: 0.0 }, Compute::F32);
        ten_steps("qwen2-tiny", Layout { micro, recompute, dropout: 0.0 }, Compute::F32);
    }
    ten_steps("llama-tiny", Layout { micro: 2, recompute: true, dropout: 0.0 }, Compute::REFERENCE);
}

#[test]
fn dropout_does_not_depend_on_batching() {
    let name = "llama-tiny";
    let decoder = load(name, Compute::F32);
    let initial = adapter(name, "initial", &decoder);
    let run = Run::new(decoder, initial);
    let rows = &rows(name)[..4];
    let layout = |micro, recompute| Layout { micro, recompute, dropout: 0.3 };
    let (loss, gradients) = run.step(rows, layout(1, false));
    let (without, _) = run.step(rows, SINGLE);
    assert!((loss - without).abs() > 1e-3, "dropout changes nothing");
    for other in [layout(4, true), layout(3, false), layout(2, true)] {
        let (other_loss, other_gradients) = run.step(rows, other);
        assert!((loss - other_loss).abs() < 1e-6);
        for (a, b) in gradients.iter().zip(&other_gradients) {
            assert!(relative(a, b) < 1e-4);
        }
    }
}

#[test]
fn noise_does_not_depend_on_batching() {
    let name = "llama-tiny";
    for compute in [Compute::F32, Compute::REFERENCE] {
        let decoder = load(name, compute);
        let initial = adapter(name, "initial", &decoder);
        let mut run = Run::new(decoder, initial);
        let rows = &rows(name)[..4];
        let layout = |micro, recompute| Layout { micro, recompute, dropout: 0.0 };
        let (without, _) = run.step(rows, SINGLE);
        run.noise = Some(Noise { alpha: 10.0, seed: 7, epoch: 0 });
        let (loss, gradients) = run.step(rows, layout(1, false));
        assert!((loss - without).abs() > 1e-4, "noise changes nothing");
        for other in [layout(4, true), layout(3, false), layout(2, true)] {
            let (other_loss, other_gradients) = run.step(rows, other);
            assert!((loss - other_loss).abs() < 1e-6, "{compute:?}: {loss} {other_loss}");
            for (a, b) in gradients.iter().zip(&other_gradients) {
                assert!(relative(a, b) < 1e-4);
            }
        }
        run.noise = Some(Noise { alpha: 10.0, seed: 7, epoch: 1 });
        assert_ne!(run.step(rows, SINGLE).0, loss, "another epoch draws anew");
    }
}

#[test]
fn recomputation_gives_the_same_bits() {
    let name = "llama-q8_0";
    for compute in [Compute::F32, Compute::INT16, Compute::INT8] {
        let decoder = load(name, compute);
        let initial = adapter(name, "initial", &decoder);
        let mut run = Run::new(decoder, initial);
        let rows = &rows(name)[..4];
        let layout = |recompute| Layout { micro: 2, recompute, dropout: 0.1 };
        let kept = run.step(rows, layout(false));
        assert_eq!(kept, run.step(rows, layout(true)), "{compute:?}");
        run.kept_layers = Some(1);
        assert_eq!(kept, run.step(rows, layout(false)), "{compute:?}, one layer kept");
    }
}

/// A large, a small and again a large micro-batch through the same buffers give the same bits as with new
/// buffers.
#[test]
fn buffers_carry_no_state() {
    let name = "llama-q4_0";
    let all = rows(name);
    for compute in [Compute::F32, Compute::INT16] {
        let decoder = load(name, compute);
        let initial = adapter(name, "initial", &decoder);
        let run = Run::new(decoder, initial);
        let mut buffers = Buffers::default();
        for (rows, dropout) in
            [(&all[..6], 0.1), (&all[6..7], 0.0), (&all[7..8], 0.2), (&all[..6], 0.1)]
        {
            let layout = Layout { micro: rows.len(), recompute: false, dropout };
            let again = run.step_with(rows, layout, &mut buffers);
            assert_eq!(again, run.step(rows, layout), "{compute:?}, {} rows", rows.len());
        }
    }
}

/// Groups of responses to a prompt, and plain rows: with shared prompts, and the same
/// rows with a copy of the prompt per response.
fn shared_and_whole(name: &str) -> (Batch, Batch) {
    let all = rows(name);
    let (mut shared, mut whole) =
        (Batch::new(&all[..1], &[vec![0]]), Batch::new(&all[..1], &[vec![0]]));
    let groups = [(&all[1], 12, 3..6), (&all[6], 1, 7..9), (&all[9], 0, 10..12)];
    for (prompt, length, responses) in groups {
        let prompt = &prompt.tokens[..length];
        let responses: Vec<&[u32]> = all[responses].iter().map(|row| &row.tokens[..]).collect();
        shared.push_group(prompt, &responses, 50);
        for (i, response) in responses.iter().enumerate() {
            let tokens = [prompt, response].concat();
            let learned = (0..tokens.len()).map(|place| place >= length).collect();
            let first = whole.keys.len();
            let alone =
                Batch::new(&[Example { tokens, learned, row: 50, line: 1, start: 0 }], &[vec![0]]);
            whole = end_to_end(whole, alone);
            // A copy of the prompt has the dropout masks of the prompt.
            let keys = &mut whole.keys[first + length..];
            keys.iter_mut().for_each(|(row, _)| *row |= (i as u64 + 1) << 40);
        }
    }
    shared = end_to_end(shared, Batch::new(&all[12..13], &[vec![0]]));
    whole = end_to_end(whole, Batch::new(&all[12..13], &[vec![0]]));
    (shared, whole)
}

/// Two batches of plain rows concatenated.
fn end_to_end(mut first: Batch, second: Batch) -> Batch {
    let (tokens, targets) = (first.tokens.len(), first.targets.len());
    first.tokens.extend(second.tokens);
    first.positions.extend(second.positions);
    first.keys.extend(second.keys);
    let moved = |range: std::ops::Range<usize>, by| range.start + by..range.end + by;
    first
        .segments
        .extend(second.segments.into_iter().map(|s| Segment::whole(moved(s.tokens, tokens))));
    first.targets.extend(second.targets.iter().map(|(row, token)| (row + tokens as u32, *token)));
    first.ends.extend(second.ends.iter().map(|row| row + tokens as u32));
    first.spans.extend(second.spans.into_iter().map(|span| moved(span, targets)));
    first
}

fn laid_out(batch: &Batch) -> Rows {
    Rows {
        tokens: batch.tokens.clone(),
        positions: batch.positions.clone(),
        segments: batch.segments.clone().into(),
    }
}

/// Sharing a prompt between responses gives the same result as a copy per response: bit-identical in the
/// forward pass, and up to rounding of sums in the backward pass, with dropout.
#[test]
fn shared_prompts_change_no_hidden_state_log_prob_or_gradient() {
    let bounds = [(Compute::REFERENCE, 1e-5), (Compute::F32, 1e-5), (Compute::INT16, 2e-3)];
    for name in ["llama-q4_0", "qwen2-tiny"] {
        let (shared, whole) = shared_and_whole(name);
        assert!(shared.tokens.len() < whole.tokens.len());
        assert_eq!(shared.spans, whole.spans);
        for (compute, bound) in bounds {
            let decoder = load(name, compute);
            let initial = adapter(name, "final", &decoder);
            let run = Run::new(decoder, initial);
            let active = [ActiveAdapter::frozen(run.adapter.clone())];
            let read = |batch: &Batch| {
                let hidden = run.decoder.hidden(&laid_out(batch), Adapters::Same(&active)).unwrap();
                let take = |rows: Vec<u32>| {
                    hidden.index_select(&Tensor::new(rows, &Device::Cpu).unwrap(), 0).unwrap()
                };
                let (rows, tokens): (Vec<u32>, Vec<u32>) = batch.targets.iter().copied().unzip();
                let logps = run.decoder.log_probs(&take(rows), &tokens, &active).unwrap();
                let ends = take(batch.ends.clone()).flatten_all().unwrap();
                (logps, ends.to_vec1::<f32>().unwrap())
            };
            let (ours, theirs) = (read(&shared), read(&whole));
            if compute == Compute::REFERENCE {
                assert!(
                    relative(&ours.0, &theirs.0) < bound && relative(&ours.1, &theirs.1) < bound
                );
            } else {
                assert_eq!(ours, theirs, "{name} {compute:?}");
            }
            for layout in [SINGLE, Layout { micro: 1, recompute: true, dropout: 0.2 }] {
                let step = |batch: &Batch| {
                    run.step_over(std::slice::from_ref(batch), layout, &mut Buffers::default())
                };
                let ((loss, ours), (whole_loss, theirs)) = (step(&shared), step(&whole));
                assert!(
                    (loss - whole_loss).abs() < 1e-6,
                    "{name} {compute:?}: {loss} {whole_loss}"
                );
                for (i, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
                    let error = relative(ours, theirs);
                    assert!(error < bound, "{name} {compute:?}: gradient {i} is {error:e} off");
                }
            }
        }
    }
}

#[test]
fn threads_change_no_bit_of_a_step() {
    let name = "llama-q4_0";
    let (shared, _) = shared_and_whole(name);
    for compute in [Compute::F32, Compute::INT16] {
        let decoder = load(name, compute);
        let initial = adapter(name, "final", &decoder);
        let run = Run::new(decoder, initial);
        let step = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let layout = Layout { micro: 1, recompute: false, dropout: 0.1 };
            let batch = std::slice::from_ref(&shared);
            pool.install(|| run.step_over(batch, layout, &mut Buffers::default()))
        };
        assert_eq!(step(1), step(2), "{compute:?}");
    }
}

/// Directional derivatives through every kind of quantized base, B random: 1 %.
#[test]
fn gradients_agree_with_differences_through_quantized_bases() {
    for name in ["llama-q4_0", "llama-q8_0", "qwen2-mix", "llama-k"] {
        let decoder = load(name, Compute::F32);
        let config = quantune_adapters::config::LoraConfig {
            r: 3,
            target_modules: Some(quantune_adapters::config::Modules::Expression(
                "all-linear".into(),
            )),
            init_lora_weights: quantune_adapters::config::InitLoraWeights::Random,
            ..Default::default()
        };
        let resolved =
            quantune_adapters::targets::resolve(&config, &decoder.linears(), Some("lm_head"))
                .unwrap();
        let adapter = Adapter::new("default", config, &resolved.targets, 3, &Device::Cpu).unwrap();
        let vocabulary = decoder.config.vocab_size as u32;
        let run = Run::new(decoder, adapter);
        let rows: Vec<Example> = (0..2u64)
            .map(|row| Example {
                tokens: (0..18).map(|i| (i * 37 + row as u32 * 11 + 5) % vocabulary).collect(),
                learned: (0..18).map(|i| i > 4).collect(),
                row,
                line: row + 1,
                start: 0,
            })
            .collect();
        let (_, gradients) = run.step(&rows, SINGLE);
        let start = run.values();
        for (index, gradient) in gradients.iter().enumerate() {
            assert!(gradient.iter().all(|g| g.is_finite()) && gradient.iter().any(|g| *g != 0.0));
            // Along the gradient, the derivative is its norm.
            let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            let h = 2e-3 / norm.max(1e-3);
            let loss_at = |sign: f64| {
                let mut moved = start.clone();
                for (value, g) in moved[index].iter_mut().zip(gradient) {
                    *value += (sign * h * f64::from(*g)) as f32;
                }
                run.set(&moved);
                run.step(&rows, SINGLE).0
            };
            let numeric = (loss_at(1.0) - loss_at(-1.0)) / (2.0 * h);
            let analytic = norm * norm;
            let error = (numeric - analytic).abs() / analytic;
            let tensor = &run.adapter.parameters()[index].0;
            assert!(error < 1e-2, "{name} {tensor}: gradient² {analytic}, differences {numeric}");
        }
        run.set(&start);
    }
}

#[test]
fn changing_a_packed_row_leaves_its_neighbours_bit_equal() {
    let name = "llama-q4_0";
    let decoder = load(name, Compute::F32);
    let initial = Arc::new(adapter(name, "initial", &decoder));
    let active = [ActiveAdapter::frozen(initial)];
    let rows: Vec<Vec<u32>> = rows(name)[..3].iter().map(|row| row.tokens.clone()).collect();
    let mut changed = rows.clone();
    for token in &mut changed[1] {
        *token = (*token + 1) % decoder.config.vocab_size as u32;
    }
    let hidden = |rows: &[Vec<u32>]| {
        let hidden = decoder.hidden(&Rows::new(rows), Adapters::Same(&active)).unwrap();
        hidden.to_vec2::<f32>().unwrap()
    };
    let (before, after) = (hidden(&rows), hidden(&changed));
    let (first, second) = (rows[0].len(), rows[0].len() + rows[1].len());
    assert_eq!(before[..first], after[..first]);
    assert_ne!(before[first..second], after[first..second]);
    assert_eq!(before[second..], after[second..]);
}

/// Rows with different adapters in one batch get the same results as alone.
#[test]
fn every_row_uses_its_own_adapter() {
    let name = "llama-tiny";
    let decoder = load(name, Compute::F32);
    let initial = Arc::new(adapter(name, "initial", &decoder));
    let last = Arc::new(adapter(name, "final", &decoder));
    let rows: Vec<Vec<u32>> = rows(name)[..4].iter().map(|row| row.tokens.clone()).collect();
    let half = ActiveAdapter { weight: 0.5, ..ActiveAdapter::frozen(last.clone()) };
    let lists: [Vec<ActiveAdapter>; 4] = [
        vec![],
        vec![ActiveAdapter::frozen(initial.clone())],
        vec![ActiveAdapter::frozen(initial), half],
        vec![ActiveAdapter::frozen(last)],
    ];
    let active: Vec<&[ActiveAdapter]> = lists.iter().map(|list| &list[..]).collect();
    let together = decoder.hidden(&Rows::new(&rows), Adapters::PerRow(&active)).unwrap();
    let mut start = 0;
    let mut seen = Vec::new();
    for (row, active) in rows.iter().zip(&lists) {
        let alone = decoder.hidden(&Rows::new(&[row]), Adapters::Same(active)).unwrap();
        let part = together.narrow(0, start, row.len()).unwrap();
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let error = relative(&flat(&part), &flat(&alone));
        assert!(error < 1e-5, "{error:e}");
        let bare = decoder.hidden(&Rows::new(&[row]), Adapters::NONE).unwrap();
        seen.push(relative(&flat(&bare), &flat(&alone)));
        start += row.len();
    }
    assert_eq!(seen[0], 0.0);
    assert!(seen[1..].iter().all(|&difference| difference > 1e-3), "{seen:?}");
}

/// The CPU backend's layer against the reference, loss and every gradient, with a frozen adapter
/// below the trainable one and dropout; and the integer modes by their own bounds.
#[test]
fn every_form_of_a_step_agrees() {
    let bounds =
        [(Compute::F32, 5e-6, 1e-5), (Compute::INT16, 1e-3, 5e-3), (Compute::INT8, 0.1, 0.2)];
    for name in ["llama-q4_0", "qwen2-tiny"] {
        for layout in [SINGLE, Layout { micro: 4, recompute: true, dropout: 0.2 }] {
            let step = |compute| {
                let decoder = load(name, compute);
                let initial = adapter(name, "initial", &decoder);
                let last = Arc::new(adapter(name, "final", &decoder));
                let mut run = Run::new(decoder, initial);
                run.below = vec![ActiveAdapter { weight: 0.5, ..ActiveAdapter::frozen(last) }];
                run.step(&rows(name)[..4], layout)
            };
            let (loss, gradients) = step(Compute::REFERENCE);
            for (compute, of_loss, of_gradients) in bounds {
                let (found, found_gradients) = step(compute);
                let error = (found - loss).abs();
                assert!(error < of_loss, "{name} {compute:?}: loss {error:e} off");
                assert!(compute == Compute::F32 || error > 0.0, "{compute:?} is no other form");
                for (i, (found, exact)) in found_gradients.iter().zip(&gradients).enumerate() {
                    let error = relative(found, exact);
                    assert!(error < of_gradients, "{name} {compute:?}: gradient {i} {error:e} off");
                }
            }
        }
    }
}

/// With a trainable adapter on one module only, nothing below is computed, and the gradients are
/// those of a full adapter for this module.
#[test]
fn gradients_of_a_single_module_are_those_of_the_whole() {
    let name = "llama-tiny";
    let rows = &rows(name)[..4];
    let whole = adapter(name, "initial", &load(name, Compute::F32));
    for module in ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"] {
        let frozen: Vec<String> =
            whole.modules.keys().filter(|m| !m.ends_with(module)).cloned().collect();
        let mut trainable = whole.clone();
        let mut rest = whole.clone();
        trainable.modules.retain(|m, _| !frozen.contains(m));
        rest.modules.retain(|m, _| frozen.contains(m));
        let run = Run::new(load(name, Compute::F32), whole.clone());
        let (loss, gradients) = run.step(rows, SINGLE);
        let mut part = Run::new(load(name, Compute::F32), trainable);
        part.below = vec![ActiveAdapter::frozen(Arc::new(rest))];
        let (part_loss, part_gradients) = part.step(rows, SINGLE);
        assert!((loss - part_loss).abs() < 1e-6);
        let names = run.adapter.parameters();
        let wanted = names.iter().zip(&gradients).filter(|((n, _), _)| n.contains(module));
        let mut compared = 0;
        for ((_, whole), part) in wanted.zip(&part_gradients) {
            let error = relative(part, whole);
            assert!(error < 1e-5, "{module}: {error:e}");
            compared += 1;
        }
        assert_eq!(compared, part_gradients.len());
    }
}
