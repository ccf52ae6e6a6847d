//! Reward models, DPO and its variants, and PPO against TRL: ten steps of the same adapters over the same rows,
//! and stored PPO rollouts scored by both.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use quantune::data::{Batch, Comparison, PreferencePair};
use quantune::model::{ActiveAdapter, Decoder};
use quantune::objectives::Objective;
use quantune::objectives::advantage::KlEstimator;
use quantune::objectives::policy::ppo_metrics;
use quantune::objectives::preference::{PreferenceBatch, PreferenceLossType};
use quantune::ops::Compute;
use quantune::optim::AdamWSettings;
use quantune::rollout::{AdvantageSettings, Experience, Response, ppo, respond};
use quantune::train::learner::{Learner, MicroBatch};
use quantune::train::settings::DpoSettings;
use quantune::train::supervised::{
    PolicyAndReference, preference_batch, response_log_probs, reward_batch, step_constants,
};
use quantune_adapters::delta::Adapter;
use quantune_adapters::format;
use serde_json::Value;

use crate::support::{golden, golden_json, load};

fn adapter(path: &str, decoder: &Decoder) -> Adapter {
    let folder = golden(&format!("rl/{path}"));
    let linears = decoder.linears();
    format::read_folder(&folder, "default", &linears, Some("lm_head"), &Device::Cpu).unwrap().0
}

fn lines(path: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(golden(&format!("rl/{path}"))).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn optimizer(run: &Value) -> AdamWSettings {
    let number = |key: &str| run[key].as_f64().unwrap();
    AdamWSettings {
        adam_beta1: number("adam_beta1"),
        adam_beta2: number("adam_beta2"),
        adam_epsilon: number("adam_epsilon"),
        weight_decay: number("weight_decay"),
    }
}

fn flat(var: &Var) -> Vec<f32> {
    var.flatten_all().unwrap().to_vec1().unwrap()
}

/// `|a - b| / |b|` in Frobenius norms.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    difference / norm(&mut b.iter().map(|&b| f64::from(b)))
}

fn close(what: &str, ours: f64, theirs: f64, bound: f64) {
    let error = (ours - theirs).abs() / theirs.abs().max(1.0);
    assert!(error < bound, "{what} is {ours}, TRL's {theirs}");
}

/// Checks all tensors of a trained adapter against TRL's.
fn arrived(what: &str, ours: &Adapter, theirs: &Adapter) {
    let (ours, theirs) = (ours.parameters(), theirs.parameters());
    assert_eq!(ours.len(), theirs.len());
    for ((name, ours), (_, theirs)) in ours.iter().zip(&theirs) {
        let error = relative(&flat(ours), &flat(theirs));
        assert!(error < 1e-4, "{what}: {name} is {error:e} from TRL's");
    }
}

/// How a step is split into micro-batches.
#[derive(Clone, Copy)]
struct Layout {
    compute: Compute,
    /// Comparisons of a micro-batch.
    micro: usize,
    recompute: bool,
}

const WHOLE: Layout = Layout { compute: Compute::F32, micro: 4, recompute: false };
const SPLIT: Layout = Layout { compute: Compute::F32, micro: 1, recompute: true };
const PORTABLE: Layout = Layout { compute: Compute::REFERENCE, micro: 3, recompute: true };

fn comparison(row: u64, value: &Value) -> Comparison {
    let prompt = value.get("prompt_ids").map(ids).unwrap_or_default();
    let label = value.get("label").map(|label| label.as_bool().unwrap());
    let responses: Vec<Vec<u32>> = match (value.get("responses_ids"), label) {
        (Some(ranked), _) => ranked.as_array().unwrap().iter().map(ids).collect(),
        (None, Some(_)) => vec![ids(&value["completion_ids"])],
        (None, None) => ["chosen_ids", "rejected_ids"].map(|key| ids(&value[key])).into(),
    };
    let margin = value["margin"].as_f64().unwrap_or(0.0) as f32;
    let count = responses.len();
    let pairs = (0..count).flat_map(|better| {
        (better + 1..count).map(move |worse| PreferencePair { better, worse, margin })
    });
    let pairs = pairs.collect();
    Comparison { prompt, responses, pairs, label, row, line: row + 1 }
}

/// The inputs of a step: the current policy, and all rows of the step.
struct Step<'a> {
    decoder: &'a Decoder,
    active: &'a [ActiveAdapter],
    rows: &'a [Comparison],
}

/// A micro-batch of a step.
type Parts<'a> = dyn Fn(&Step, &[&Comparison]) -> (Batch, Objective) + 'a;

/// Ten steps from TRL's initial adapter: losses, gradients and the final adapter within float noise.
fn ten_steps(
    name: &str,
    layout: Layout,
    parts: &dyn Fn(&Decoder, &[Comparison]) -> Box<Parts<'static>>,
) {
    let run = golden_json(&format!("rl/{name}/run.json"));
    let decoder = load(run["base"].as_str().unwrap(), layout.compute);
    let ours = Arc::new(adapter(&format!("{name}/initial"), &decoder));
    let max_grad_norm = run["max_grad_norm"].as_f64().unwrap();
    let mut learner =
        Learner::new(&decoder, vec![ours.clone()], optimizer(&run), max_grad_norm, (0.0, 0))
            .unwrap();
    learner.kept_layers = if layout.recompute { 0 } else { decoder.config.num_hidden_layers };
    let rows: Vec<Comparison> = (0..)
        .zip(lines(&format!("{name}/rows.jsonl")))
        .map(|(i, row)| comparison(i, &row))
        .collect();
    let parts = parts(&decoder, &rows);
    let steps = run["steps"].as_array().unwrap();
    let size = run["per_device_train_batch_size"].as_u64().unwrap() as usize;
    assert_eq!((steps.len(), rows.len()), (10, 10 * size));
    for (i, (theirs, rows)) in steps.iter().zip(rows.chunks(size)).enumerate() {
        let step = Step { decoder: &decoder, active: learner.active(0), rows };
        let micro: Vec<MicroBatch> = rows
            .chunks(layout.micro)
            .map(|rows| {
                let rows: Vec<&Comparison> = rows.iter().collect();
                let (batch, objective) = parts(&step, &rows);
                let scale = 1.0 / size as f64;
                MicroBatch { batch, objective, scale, adapter: 0, epoch: 0, temperature: 1.0 }
            })
            .collect();
        let stepped = learner.step(&micro, theirs["learning_rate"].as_f64().unwrap()).unwrap();
        let check = |key: &str, ours: f64, bound: f64| {
            let what = format!("{name} step {i}: {key}");
            close(&what, ours, theirs[key].as_f64().unwrap(), bound);
        };
        check("loss", stepped.loss, 1e-4);
        check("grad_norm", stepped.grad_norm, 2e-4);
        if let Some(stats) = stepped.stats.reward {
            let pairs = stats.pairs as f64;
            check("accuracy", stats.correct as f64 / pairs, 1e-6);
            check("margin", stats.margin / pairs, 1e-4);
        }
        if let Some(stats) = stepped.stats.preference {
            for (key, ours) in stats.metrics() {
                check(key, ours, 1e-4);
            }
        }
    }
    arrived(name, &ours, &adapter(&format!("{name}/final"), &decoder));
}

fn reward(name: &str, layout: Layout) {
    let run = golden_json(&format!("rl/{name}/run.json"));
    let center = run["center_rewards_coefficient"].as_f64().unwrap_or(0.0);
    ten_steps(name, layout, &|_, _| Box::new(move |_, rows| reward_batch(rows, center)));
}

#[test]
fn reward_models_match_trl() {
    for name in ["reward", "reward-margin", "reward-ranked"] {
        for layout in [WHOLE, SPLIT] {
            reward(name, layout);
        }
    }
    reward("reward-ranked", PORTABLE);
}

#[test]
fn dpo_matches_trl() {
    for layout in [WHOLE, SPLIT, PORTABLE] {
        ten_steps("dpo", layout, &|decoder, rows| {
            let all: Vec<&Comparison> = rows.iter().collect();
            let reference = response_log_probs(decoder, &[], &all).unwrap();
            for (ours, theirs) in reference.iter().zip(lines("dpo/rows.jsonl")) {
                for (ours, key) in ours.iter().zip(["ref_chosen_logps", "ref_rejected_logps"]) {
                    close(key, f64::from(*ours), theirs[key].as_f64().unwrap(), 1e-5);
                }
            }
            let settings = DpoSettings::default().preference();
            Box::new(move |_, rows| {
                let first = rows[0].row as usize;
                let reference = reference[first..first + rows.len()].concat();
                let (batch, part) = preference_batch(rows, settings, Some(reference));
                (batch, Objective::Preference(part.into()))
            })
        });
    }
}

#[test]
fn kto_matches_trl() {
    let run = golden_json("rl/kto/run.json");
    let number = |key: &str| run[key].as_f64().unwrap();
    let own = DpoSettings {
        loss_type: PreferenceLossType::Kto,
        beta: number("beta"),
        desirable_weight: number("desirable_weight"),
        undesirable_weight: number("undesirable_weight"),
        ..DpoSettings::default()
    };
    let settings = own.preference();
    for layout in [WHOLE, SPLIT, PORTABLE] {
        ten_steps("kto", layout, &|_, _| {
            Box::new(move |step, rows| {
                let Step { decoder, active: policy, .. } = *step;
                let reference = response_log_probs(decoder, &[], rows).unwrap().concat();
                let all: Vec<&Comparison> = step.rows.iter().collect();
                let (_, whole_step) = preference_batch(&all, settings, None);
                let models = PolicyAndReference { decoder, policy, reference: &[] };
                let constants =
                    step_constants(&models, &settings, &all, [&whole_step].into_iter()).unwrap();
                let (batch, part) = preference_batch(rows, settings, Some(reference));
                let part = PreferenceBatch { constants, ..part };
                (batch, Objective::Preference(part.into()))
            })
        });
    }
}

/// The first step of the losses without ten golden steps.
#[test]
fn other_preference_losses_match_trl() {
    let run = golden_json("rl/dpo/run.json");
    let decoder = load("llama-tiny", Compute::F32);
    let rows: Vec<Comparison> =
        (0..4).zip(lines("dpo/rows.jsonl")).map(|(i, row)| comparison(i, &row)).collect();
    let all: Vec<&Comparison> = rows.iter().collect();
    let reference = response_log_probs(&decoder, &[], &all).unwrap();
    let check = |name: &str, loss_type: PreferenceLossType, micro: usize| {
        let theirs = &run["first_step"][name];
        let number = |key: &str, default: f64| theirs[key].as_f64().unwrap_or(default);
        let own = DpoSettings {
            loss_type,
            beta: number("beta", 0.1),
            simpo_gamma: number("simpo_gamma", 0.5),
            label_smoothing: number("label_smoothing", 0.0),
            ..DpoSettings::default()
        };
        let settings = own.preference();
        let ours = Arc::new(adapter("dpo/initial", &decoder));
        let mut learner =
            Learner::new(&decoder, vec![ours], optimizer(&run), 0.0, (0.0, 0)).unwrap();
        let mut parts: Vec<_> = all
            .chunks(micro)
            .zip(reference.chunks(micro))
            .map(|(rows, reference)| {
                let reference = settings.loss.has_reference().then(|| reference.concat());
                preference_batch(rows, settings, reference)
            })
            .collect();
        let policy = learner.active(0);
        let models = PolicyAndReference { decoder: &decoder, policy, reference: &[] };
        let all_parts = parts.iter().map(|(_, part)| part);
        let constants = step_constants(&models, &settings, &all, all_parts).unwrap();
        parts.iter_mut().for_each(|(_, part)| part.constants = constants);
        let part = |(batch, part): (Batch, PreferenceBatch)| MicroBatch {
            batch,
            objective: Objective::Preference(part.into()),
            scale: 0.25,
            adapter: 0,
            epoch: 0,
            temperature: 1.0,
        };
        let parts: Vec<MicroBatch> = parts.into_iter().map(part).collect();
        let stepped = learner.step(&parts, 0.0).unwrap();
        for (key, ours) in [("loss", stepped.loss), ("grad_norm", stepped.grad_norm)] {
            let what = format!("{name} in parts of {micro}: {key}");
            close(&what, ours, theirs[key].as_f64().unwrap(), 1e-4);
        }
    };
    for micro in [4, 1] {
        check("hinge", PreferenceLossType::Hinge, micro);
        check("ipo", PreferenceLossType::Ipo, micro);
        check("simpo", PreferenceLossType::SimPo, micro);
        check("orpo", PreferenceLossType::Orpo, micro);
    }
}

/// One field of PPO's experience.
type Part = fn(&Experience) -> &Vec<f32>;

/// Stored rollouts through our log-probs, values, scores, advantages and steps.
fn replay(name: &str, compute: Compute, micro: usize) {
    let run = golden_json(&format!("rl/{name}/run.json"));
    let decoder = load(run["base"].as_str().unwrap(), compute);
    let read = |path: &str| Arc::new(adapter(&format!("{name}/{path}"), &decoder));
    let (policy, value, reward) = (read("policy/initial"), read("value/initial"), read("reward"));
    let adapters = vec![policy.clone(), value.clone()];
    let mut learner = Learner::new(&decoder, adapters, optimizer(&run), 0.0, (0.0, 0)).unwrap();
    learner.kept_layers = decoder.config.num_hidden_layers;
    let number = |key: &str| run[key].as_f64().unwrap();
    let temperature = number("temperature") + 1e-7;
    let most = number("response_length") as usize;
    let settings = AdvantageSettings {
        kl_coef: number("kl_coef"),
        kl_estimator: match run["kl_estimator"].as_str().unwrap() {
            "k1" => KlEstimator::K1,
            _ => KlEstimator::K3,
        },
        gamma: number("gamma"),
        lam: number("lam"),
        whiten_rewards: run["whiten_rewards"].as_bool().unwrap(),
    };
    let stored: HashMap<String, Tensor> = candle_core::safetensors::load(
        golden(&format!("rl/{name}/rollouts.safetensors")),
        &Device::Cpu,
    )
    .unwrap();
    let mut steps = run["steps"].as_array().unwrap().iter();
    let updates = lines(&format!("{name}/rollouts.jsonl"));
    assert_eq!(updates.len(), 5);
    for (update, (line, theirs)) in
        updates.iter().zip(run["updates"].as_array().unwrap()).enumerate()
    {
        let queries = line["query_ids"].as_array().unwrap();
        let responses: Vec<Response> = queries
            .iter()
            .zip(line["response_ids"].as_array().unwrap())
            .zip(0..)
            .map(|((query, response), key)| {
                let tokens = ids(response);
                let ended = tokens.last() == Some(&2);
                let (sampled_logps, drawn_logps) = (Vec::new(), Vec::new());
                Response {
                    prompt: ids(query).into(),
                    tokens,
                    key,
                    ended,
                    sampled_logps,
                    drawn_logps,
                }
            })
            .collect();
        let logps = |active: &[ActiveAdapter]| {
            respond::log_probs(&decoder, active, &responses, temperature)
        };
        let (old, reference) = (logps(learner.active(0)).unwrap(), logps(&[]).unwrap());
        let head = value.score.as_ref().unwrap();
        let values = respond::values(&decoder, learner.active(1), head, &responses, most).unwrap();
        let judge = [ActiveAdapter::frozen(reward.clone())];
        let head = reward.score.as_ref().unwrap();
        let all: Vec<&Response> = responses.iter().collect();
        let scores = respond::scores(&decoder, &judge, head, &all, None, &[]).unwrap();
        let mut rows: Vec<Experience> = old
            .into_iter()
            .zip(reference)
            .zip(values.into_iter().zip(scores))
            .zip(&responses)
            .map(|(((old_logps, ref_logps), (values, score)), response)| Experience {
                old_logps,
                ref_logps,
                values,
                score: score - if response.ended { 0.0 } else { 1.0 },
                ..Experience::default()
            })
            .collect();
        ppo::finish(&mut rows, &settings);

        let stored = |key: &str| stored[&format!("{update}.{key}")].to_vec2::<f32>().unwrap();
        let parts: [(&str, Part); 7] = [
            ("logprobs", |row| &row.old_logps),
            ("ref_logprobs", |row| &row.ref_logps),
            ("values", |row| &row.values),
            ("kl", |row| &row.kl),
            ("rewards", |row| &row.rewards),
            ("advantages", |row| &row.advantages),
            ("returns", |row| &row.returns),
        ];
        for (key, part) in parts {
            for (i, (ours, theirs)) in rows.iter().map(part).zip(stored(key)).enumerate() {
                for (t, (&ours, &theirs)) in ours.iter().zip(&theirs).enumerate() {
                    let what = format!("{name} update {update}, row {i}, {key}[{t}]");
                    close(&what, f64::from(ours), f64::from(theirs), 1e-4);
                }
            }
        }

        let (mut policies, mut valued) = (Vec::new(), Vec::new());
        for mini in line["minibatches"].as_array().unwrap() {
            let mini = ids(mini);
            let pick = |i: &u32| &rows[*i as usize];
            let counts = ppo::MiniBatchCounts::of(&mini.iter().map(pick).collect::<Vec<_>>());
            let mut parts = Vec::new();
            for micro in mini.chunks(micro) {
                let of: Vec<&Response> = micro.iter().map(|&i| &responses[i as usize]).collect();
                let rows: Vec<&Experience> = micro.iter().map(pick).collect();
                let batch = respond::collate(&of);
                let policy = ppo::policy_part(&rows, counts, number("cliprange"));
                let (vf_coef, range) = (number("vf_coef"), number("cliprange_value"));
                let value = ppo::value_part(&rows, &batch, counts, vf_coef, range);
                let part = |batch: Batch, objective, adapter| MicroBatch {
                    batch,
                    objective,
                    scale: 1.0,
                    adapter,
                    epoch: 0,
                    temperature,
                };
                parts.push(part(batch.clone(), ppo::objective(Some(policy), None), 0));
                parts.push(part(batch, ppo::objective(None, Some(value)), 1));
            }
            let theirs = steps.next().unwrap();
            let rate = theirs["learning_rate"].as_f64().unwrap();
            let stepped = learner.step(&parts, rate).unwrap();
            let what = |key: &str| format!("{name} update {update}: {key} of a step");
            for (key, ours) in [("loss", stepped.loss), ("grad_norm", stepped.grad_norm)] {
                close(&what(key), ours, theirs[key].as_f64().unwrap(), 2e-4);
            }
            let stats = stepped.stats.policy.unwrap();
            for (key, ours) in [("ratio_masked", stats.ratio), ("approxkl_masked", stats.approxkl)]
            {
                let ours = ours / stats.tokens as f64;
                close(&what(key), ours, theirs[key].as_f64().unwrap(), 1e-4);
            }
            if let Some(entropy) = stats.entropy {
                let ours = entropy / stats.tokens as f64;
                close(&what("entropy"), ours, theirs["entropy_masked"].as_f64().unwrap(), 1e-4);
            }
            policies.push(stats);
            valued.push(stepped.stats.value.unwrap());
        }
        let padded = ["policy/approxkl_avg", "policy/entropy_avg", "val/ratio", "val/ratio_var"]; // means over padding too
        for (key, ours) in ppo_metrics(&policies, &valued) {
            if !padded.contains(&key) {
                let what = format!("{name} update {update}: {key}");
                close(&what, ours, theirs[key].as_f64().unwrap(), 1e-4);
            }
        }
    }
    arrived(name, &policy, &read("policy/final"));
    arrived(name, &value, &read("value/final"));
}

#[test]
fn ppo_matches_trl() {
    replay("ppo", Compute::F32, 8);
    replay("ppo", Compute::F32, 3);
    replay("ppo", Compute::REFERENCE, 8);
    replay("ppo-k3", Compute::F32, 8);
}

/// A policy with a value head computes log-probs and values in one pass.
#[test]
fn one_pass_gives_the_log_probs_and_values_of_two() {
    const MOST: usize = 6;
    for compute in [Compute::REFERENCE, Compute::F32, Compute::INT16, Compute::INT8] {
        let decoder = load("llama-tiny", compute);
        let policy = Arc::new(adapter("ppo/value/initial", &decoder));
        let head = policy.score.clone().unwrap();
        let active = [ActiveAdapter::frozen(policy)];
        let shared: Arc<[u32]> = [7, 8, 9].into();
        // Complete and truncated responses, some to the same prompt, and one as long as several.
        let response = |key: u64, prompt: &Arc<[u32]>, length: usize| Response {
            prompt: prompt.clone(),
            tokens: (0..length as u32).map(|i| 20 + i * 3 + key as u32).collect(),
            key,
            ended: length < MOST,
            sampled_logps: Vec::new(),
            drawn_logps: Vec::new(),
        };
        let responses = [
            response(0, &shared, MOST),
            response(1, &shared, 2),
            response(2, &[5].into(), 1),
            response(3, &[4; 40].into(), MOST),
        ];
        for temperature in [1.0, 0.7] {
            let logps = respond::log_probs(&decoder, &active, &responses, temperature).unwrap();
            let values = respond::values(&decoder, &active, &head, &responses, MOST).unwrap();
            let both = respond::log_probs_and_values(
                &decoder,
                &active,
                &head,
                &responses,
                temperature,
                MOST,
            );
            assert!(both.unwrap() == [logps, values], "{compute:?} at {temperature}");
        }
    }
}
