//! Losses, advantages and statistics against TRL's code, and gradients against finite
//! differences and any split of a step.

use candle_core::{Device, Tensor, Var};
use serde_json::Value;

use super::Objective;
use super::advantage::{
    KlEstimator, RunningMoments, ScaleRewards, gae, group_advantages, rloo_advantages,
    token_rewards, whiten,
};
use super::policy::{
    GrpoSettings, GrpoStats, LossForm, PpoPolicyStats, PpoValueStats, Sampled, grpo_loss,
    per_token, ppo_metrics, ppo_policy_loss, ppo_value_loss, row_sums,
};
use super::preference::{
    NegativeLogLikelihood, PairLogps, PreferenceLoss, PreferenceLosses, PreferenceSettings, kto_kl,
    kto_losses, kto_mismatched, preference_losses,
};
use super::reward::{RewardStats, WeightedPair, pair_losses, pair_weight};
use crate::train::settings::DpoSettings;

fn cases(name: &str) -> Vec<Value> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/objectives");
    let text = std::fs::read_to_string(format!("{folder}/{name}.json")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap().as_array().unwrap().clone()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| number(v) as f32).collect()
}

/// Values row by row, and the length of each row.
fn rows(value: &Value) -> (Vec<f32>, Vec<usize>) {
    let rows: Vec<Vec<f32>> = value.as_array().unwrap().iter().map(numbers).collect();
    let counts = rows.iter().map(Vec::len).collect();
    (rows.concat(), counts)
}

fn counts(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect()
}

fn var(values: &[f32]) -> Var {
    Var::new(values, &Device::Cpu).unwrap()
}

fn gradient(loss: &Tensor, of: &Var) -> Vec<f32> {
    loss.backward().unwrap().get(of).unwrap().to_vec1().unwrap()
}

fn scalar(loss: &Tensor) -> f64 {
    f64::from(loss.to_scalar::<f32>().unwrap())
}

/// A relative tolerance of 1e-5, or an absolute one below 1.
#[track_caller]
fn close(found: f64, expected: f64, what: &str) {
    let far = (found - expected).abs() / expected.abs().max(1.0);
    assert!(far <= 1e-5, "{what}: {found}, TRL has {expected}");
}

/// `found / count` against TRL's means.
#[track_caller]
fn all_close(found: &[f32], count: f64, expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        close(f64::from(found) / count, f64::from(expected), &format!("{what}[{i}]"));
    }
}

/// Every metric that TRL logs exists and is equal.
#[track_caller]
fn same_metrics(found: &[(&str, f64)], case: &Value, what: &str) {
    for (name, expected) in case["metrics"].as_object().unwrap() {
        let found = found.iter().find(|(found, _)| found == name);
        let found = found.unwrap_or_else(|| panic!("{what}: no {name}")).1;
        close(found, number(expected), &format!("{what}, {name}"));
    }
}

/// The gradient of a loss at `x` against central differences.
#[track_caller]
fn check_slopes(x: &[f32], loss: impl Fn(&Tensor) -> Tensor, what: &str) {
    let at = var(x);
    let found = gradient(&loss(at.as_tensor()), &at);
    const STEP: f32 = 1e-2;
    for i in 0..x.len() {
        let moved = |step: f32| {
            let mut x = x.to_vec();
            x[i] += step;
            scalar(&loss(var(&x).as_tensor()))
        };
        let slope = (moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP);
        let far = (slope - f64::from(found[i])).abs();
        assert!(far < 2e-3 * slope.abs().max(1.0), "{what}[{i}]: {} against {slope}", found[i]);
    }
}

#[test]
fn reward_losses_match_trl() {
    for (i, case) in cases("reward").iter().enumerate() {
        let what = format!("reward {i}");
        let scores = var(&numbers(&case["scores"]));
        let count = scores.elem_count() / 2;
        let margins = case["margins"].as_array().map(|_| numbers(&case["margins"]));
        let pair = |i: usize| WeightedPair {
            better: i,
            worse: count + i,
            margin: margins.as_ref().map_or(0.0, |margins| margins[i]),
            weight: pair_weight(1),
        };
        let pairs: Vec<WeightedPair> = (0..count).map(pair).collect();
        let center = number(&case["center_rewards_coefficient"]);
        let (loss, stats) = pair_losses(&scores, &pairs, center).unwrap();
        close(scalar(&loss) / stats.weight, number(&case["loss"]), &what);
        all_close(&gradient(&loss, &scores), stats.weight, &numbers(&case["gradient"]), &what);
        same_metrics(&stats.metrics(), case, &what);
    }
}

#[test]
fn all_pairs_of_a_prompt_weigh_as_one_comparison() {
    // Four ranked responses and a pair, in one batch and in two.
    let scores = [0.3f32, -0.1, 0.2, -2.0, 1.0, 1.5];
    let ranked = |responses: usize, first: usize| -> Vec<WeightedPair> {
        let better = (0..responses).flat_map(|b| (b + 1..responses).map(move |w| (b, w)));
        let pair = |(better, worse)| WeightedPair {
            better: first + better,
            worse: first + worse,
            margin: 0.0,
            weight: pair_weight(responses * (responses - 1) / 2),
        };
        better.map(pair).collect()
    };
    let loss = |scores: &Tensor, pairs: &[WeightedPair]| pair_losses(scores, pairs, 0.01).unwrap();
    let whole = var(&scores);
    let (sum, stats) = loss(&whole, &[ranked(4, 0), ranked(2, 4)].concat());
    assert_eq!((stats.pairs, stats.correct), (7, 5), "{stats:?}");
    assert!((stats.weight - 2.0).abs() < 1e-6, "two comparisons");
    let (first, second) = (var(&scores[..4]), var(&scores[4..]));
    let (a, b) = (loss(&first, &ranked(4, 0)), loss(&second, &ranked(2, 0)));
    let mut parts = RewardStats::default();
    [a.1, b.1].iter().for_each(|part| parts.add(part));
    for ((name, found), (_, expected)) in parts.metrics().iter().zip(stats.metrics()) {
        close(*found, expected, name);
    }
    let split = [gradient(&a.0, &first), gradient(&b.0, &second)].concat();
    all_close(&split, 1.0, &gradient(&sum, &whole), "split");
    check_slopes(&scores, |scores| loss(scores, &ranked(6, 0)).0, "scores");
}

/// Runs a case of pairs: losses, and the leaves of the gradient.
fn judge(case: &Value, logps: &[f32]) -> (PreferenceLosses, Var, Var, Option<Var>) {
    let settings = settings(case);
    let half = logps.len() / 2;
    let (chosen, rejected) = (var(&logps[..half]), var(&logps[half..]));
    let reference = case["reference"].as_array().map(|_| numbers(&case["reference"]));
    let tokens = counts(&case["tokens"]);
    let nll =
        case.get("nll_logps").map(|logps| (var(&numbers(logps)), counts(&case["nll_tokens"])));
    let found = preference_losses(
        &settings,
        &PairLogps {
            chosen: &chosen,
            rejected: &rejected,
            reference: reference.as_ref().map(|logps| logps.split_at(half)),
            chosen_tokens: &tokens[..half],
            rejected_tokens: &tokens[half..],
            nll: nll.as_ref().map(|(logps, tokens)| NegativeLogLikelihood {
                logps,
                tokens,
                weight: half as f64 / tokens.iter().sum::<usize>() as f64,
            }),
        },
    );
    (found.unwrap(), chosen, rejected, nll.map(|(logps, _)| logps))
}

fn settings(case: &Value) -> PreferenceSettings {
    let of = |key: &str, otherwise: f64| case[key].as_f64().unwrap_or(otherwise);
    let own = DpoSettings {
        loss_type: serde_json::from_value(case["loss_type"].clone()).unwrap(),
        beta: of("beta", 0.1),
        label_smoothing: of("label_smoothing", 0.0),
        simpo_gamma: of("simpo_gamma", 0.5),
        desirable_weight: of("desirable_weight", 1.0),
        undesirable_weight: of("undesirable_weight", 1.0),
        ..DpoSettings::default()
    };
    own.preference()
}

#[test]
fn preference_losses_match_trl() {
    let cases = cases("preference");
    let pairs: Vec<_> = cases.iter().filter(|case| case["loss_type"] != "kto").collect();
    assert_eq!(pairs.len(), 9);
    let kinds_with_slopes = [0, 2, 3, 4, 5, 6, 7];
    for (i, case) in pairs.into_iter().enumerate() {
        let what = format!("{} {i}", case["loss_type"]);
        let logps = numbers(&case["logps"]);
        let (found, chosen, rejected, nll) = judge(case, &logps);
        let count = (logps.len() / 2) as f64;
        let loss = found.losses.sum_all().unwrap();
        close(scalar(&loss) / count, number(&case["loss"]), &what);
        close(found.stats.loss / count, number(&case["loss"]), &what);
        if !case["losses"].is_null() {
            let losses = found.losses.to_vec1::<f32>().unwrap();
            all_close(&losses, 1.0, &numbers(&case["losses"]), &what);
        }
        let slopes = [gradient(&loss, &chosen), gradient(&loss, &rejected)].concat();
        all_close(&slopes, count, &numbers(&case["gradient"]), &what);
        if let Some(nll) = nll {
            let expected = numbers(&case["nll_gradient"]);
            all_close(&gradient(&loss, &nll), count, &expected, &format!("{what} nll"));
        }
        same_metrics(&found.stats.metrics(), case, &what);
        // Finite differences are inaccurate at strong curvature and at the corner of hinge.
        if kinds_with_slopes.contains(&i) {
            for (at, &slope) in slopes.iter().enumerate() {
                let moved = |step: f32| {
                    let mut logps = logps.clone();
                    logps[at] += step;
                    judge(case, &logps).0.stats.loss
                };
                let found = (moved(0.05) - moved(-0.05)) / 0.1;
                let far = (found - f64::from(slope)).abs();
                assert!(far < 2e-3 * found.abs().max(1.0), "{what}[{at}]: {slope} against {found}");
            }
        }
    }
}

#[test]
fn kto_losses_match_trl() {
    let cases = cases("preference");
    let cases: Vec<_> = cases.iter().filter(|case| case["loss_type"] == "kto").collect();
    assert_eq!(cases.len(), 4);
    for (i, case) in cases.into_iter().enumerate() {
        let what = format!("kto {i}");
        let logps = var(&numbers(&case["logps"]));
        let labels: Vec<bool> =
            case["labels"].as_array().unwrap().iter().map(|l| l.as_bool().unwrap()).collect();
        let kl = kto_kl(&numbers(&case["kl_logps"]), &numbers(&case["ref_kl_logps"]));
        let reference = numbers(&case["reference"]);
        let found = kto_losses(&settings(case), &logps, &reference, &labels, kl).unwrap();
        let count = labels.len() as f64;
        let loss = found.losses.sum_all().unwrap();
        close(scalar(&loss) / count, number(&case["loss"]), &what);
        all_close(&gradient(&loss, &logps), count, &numbers(&case["gradient"]), &what);
        same_metrics(&found.stats.metrics(), case, &what);
    }
    assert_eq!(kto_mismatched(4), [3, 0, 1, 2]);
    assert_eq!(kto_mismatched(1), [0]);
}

#[test]
fn missing_inputs_of_preference_losses_are_errors() {
    let logps = var(&[-1.0, -2.0]);
    let pairs = PairLogps {
        chosen: &logps,
        rejected: &logps,
        reference: None,
        chosen_tokens: &[1, 1],
        rejected_tokens: &[1, 1],
        nll: None,
    };
    let kto = PreferenceLoss::Kto { desirable_weight: 1.0, undesirable_weight: 1.0 };
    for (loss, expected) in [
        (PreferenceLoss::Orpo, "ORPO needs the log-likelihood"),
        (kto, "KTO needs labelled responses"),
    ] {
        let settings = PreferenceSettings { loss, beta: 0.1 };
        let error = preference_losses(&settings, &pairs).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    // A model with probability 1 has infinite odds, but a finite loss and gradient.
    let certain = var(&[0.0, -1e-9]);
    let settings = PreferenceSettings { loss: PreferenceLoss::Orpo, beta: 0.1 };
    let nll = NegativeLogLikelihood { logps: &certain, tokens: &[1, 1], weight: 1.0 };
    let pairs = PairLogps { chosen: &certain, nll: Some(nll), ..pairs };
    let loss = preference_losses(&settings, &pairs).unwrap().losses.sum_all().unwrap();
    assert!(scalar(&loss).is_finite());
    assert!(gradient(&loss, &certain).iter().all(|slope| slope.is_finite()));
}

#[test]
fn ppo_matches_trl_from_log_probs_to_gradients() {
    for (i, case) in cases("ppo").iter().enumerate() {
        let what = format!("ppo {i}");
        let of = |key: &str| number(&case[key]);
        let estimator: KlEstimator = serde_json::from_value(case["kl_estimator"].clone()).unwrap();
        let (logps, tokens) = rows(&case["logps"]);
        let (ref_logps, _) = rows(&case["ref_logps"]);
        let (values, states) = rows(&case["values"]);
        let scores = numbers(&case["scores"]);

        let kl = estimator.per_token(&logps, &ref_logps);
        all_close(&kl, 1.0, &rows(&case["kl"]).0, &format!("{what}, kl"));
        let (mut rewards, mut token, mut state) = (Vec::new(), 0, 0);
        for ((&tokens, &states), &score) in tokens.iter().zip(&states).zip(&scores) {
            let kl = &kl[token..token + tokens];
            rewards.extend(token_rewards(kl, score, of("kl_coef"), states));
            token += tokens;
        }
        if case["whiten_rewards"] == true {
            whiten(&mut rewards, false);
        }
        all_close(&rewards, 1.0, &rows(&case["rewards"]).0, &format!("{what}, rewards"));
        let (mut advantages, mut returns) = (Vec::new(), Vec::new());
        for (&tokens, &states) in tokens.iter().zip(&states) {
            let row = state..state + states;
            let found = gae(&rewards[row.clone()], &values[row], of("gamma"), of("lam"));
            advantages.extend(&found.0[..tokens]);
            returns.extend(found.1);
            state += states;
        }
        whiten(&mut advantages, true);
        all_close(&advantages, 1.0, &rows(&case["advantages"]).0, &format!("{what}, advantages"));
        all_close(&returns, 1.0, &rows(&case["returns"]).0, &format!("{what}, returns"));

        let weights = LossForm::Bnpo.weights(&tokens, 0);
        let count = LossForm::Bnpo.count(&tokens) as f64;
        let new = rows(&case["new_logps"]).0;
        let policy = var(&new);
        let sampled = Sampled { old_logps: &logps, advantages: &advantages, weights: &weights };
        let (loss, policy_stats) =
            ppo_policy_loss(&policy, &sampled, of("cliprange"), None).unwrap();
        close(scalar(&loss) / count, of("policy_loss"), &what);
        let expected = rows(&case["policy_gradient"]).0;
        all_close(&gradient(&loss, &policy), count, &expected, &what);

        let weights = vec![1.0; values.len()];
        let value = var(&rows(&case["new_values"]).0);
        let (loss, value_stats) =
            ppo_value_loss(&value, &values, &returns, &weights, of("cliprange_value")).unwrap();
        let count = values.len() as f64;
        close(scalar(&loss) / count, of("value_loss"), &what);
        let expected = rows(&case["value_gradient"]).0;
        all_close(&gradient(&loss, &value), count, &expected, &what);

        let metrics = ppo_metrics(&[policy_stats], &[value_stats]);
        same_metrics(&metrics, case, &what);
        let metric = |name: &str| metrics.iter().find(|(found, _)| *found == name).unwrap().1;
        close(metric("loss/policy_avg"), of("policy_loss"), &what);
        close(metric("loss/value_avg"), of("value_loss"), &what);
    }
}

#[test]
fn ppo_metrics_are_means_over_minibatches() {
    let policy = |ratio: f64, entropy| PpoPolicyStats {
        tokens: 2,
        weight: 2.0,
        ratio,
        entropy,
        ..PpoPolicyStats::default()
    };
    let metric = |policy: &[PpoPolicyStats], name: &str| {
        let value = PpoValueStats { states: 1, ..PpoValueStats::default() };
        ppo_metrics(policy, &[value]).into_iter().find(|(found, _)| *found == name).map(|m| m.1)
    };
    let both = [policy(2.0, Some(3.0)), policy(3.0, Some(5.0))];
    assert_eq!(metric(&both, "val/ratio"), Some(1.25));
    assert_eq!(metric(&both, "val/ratio_var"), Some(0.125));
    assert_eq!(metric(&both, "policy/entropy_avg"), Some(2.0));
    assert_eq!(metric(&[policy(2.0, None)], "policy/entropy_avg"), None);
}

#[test]
fn group_advantages_match_trl() {
    let cases = cases("advantages");
    assert_eq!(cases.len(), 36);
    for case in &cases {
        let (kind, rewards) = (case["kind"].as_str().unwrap(), numbers(&case["rewards"]));
        let generations = case["generations"].as_u64().unwrap() as usize;
        let found = match kind {
            "group" => group_advantages(&rewards, generations, ScaleRewards::Group),
            "batch" => group_advantages(&rewards, generations, ScaleRewards::Batch),
            "none" => group_advantages(&rewards, generations, ScaleRewards::None),
            "rloo" => rloo_advantages(&rewards, generations),
            kind => panic!("{kind}"),
        };
        let what = format!("{kind} of {generations} in {rewards:?}");
        // TRL computes in f32, and divides by small numbers for groups with little spread.
        let expected = numbers(&case["advantages"]);
        for (i, (&found, &expected)) in found.advantages.iter().zip(&expected).enumerate() {
            assert!((found - expected).abs() < 2e-4, "{what}[{i}]: {found}, TRL has {expected}");
        }
        close(found.frac_reward_zero_std, number(&case["frac_reward_zero_std"]), &what);
    }
}

/// GRPO's loss over some rows of a case, and its inputs.
fn grpo(case: &Value, take: std::ops::Range<usize>) -> (Tensor, GrpoStats, Var) {
    let some =
        |key: &str| rows(&Value::Array(case[key].as_array().unwrap()[take.clone()].to_vec()));
    let (logps, tokens) = some("logps");
    let settings = GrpoSettings {
        epsilon: number(&case["epsilon"]),
        epsilon_high: number(&case["epsilon_high"]),
        beta: number(&case["beta"]),
    };
    let advantages = per_token(&numbers(&case["advantages"])[take.clone()], &tokens);
    let longest = case["max_completion_length"].as_u64().unwrap() as usize;
    let sampled = Sampled {
        old_logps: &some("old_logps").0,
        advantages: &advantages,
        weights: &form(case).weights(&tokens, longest),
    };
    let (reference, entropies) = (some("ref_logps").0, some("entropies").0);
    let logps = var(&logps);
    let (loss, stats) =
        grpo_loss(&logps, &sampled, &tokens, Some(&reference), &settings, Some(&entropies))
            .unwrap();
    (loss, stats, logps)
}

fn form(case: &Value) -> LossForm {
    serde_json::from_value(case["loss_type"].clone()).unwrap()
}

#[test]
fn grpo_losses_match_trl_in_any_split() {
    let cases = cases("grpo");
    let cases: Vec<_> = cases.iter().filter(|case| case["loss_type"] != "rloo").collect();
    assert_eq!(cases.len(), 5);
    for (i, case) in cases.into_iter().enumerate() {
        let what = format!("{} {i}", case["loss_type"]);
        let count = form(case).count(&rows(&case["logps"]).1) as f64;
        let expected = rows(&case["gradient"]).0;
        let (loss, stats, logps) = grpo(case, 0..4);
        close(scalar(&loss) / count, number(&case["loss"]), &what);
        all_close(&gradient(&loss, &logps), count, &expected, &what);
        same_metrics(&stats.metrics(), case, &what);

        let (mut loss, mut slopes, mut stats) = (0.0, Vec::new(), GrpoStats::default());
        for part in [0..1, 1..4] {
            let (sum, more, logps) = grpo(case, part);
            loss += scalar(&sum);
            slopes.extend(gradient(&sum, &logps));
            stats.add(&more);
        }
        close(loss / count, number(&case["loss"]), &what);
        all_close(&slopes, count, &expected, &what);
        same_metrics(&stats.metrics(), case, &what);
    }
}

#[test]
fn rloo_equals_grpo_over_whole_responses() {
    let cases = cases("grpo");
    let case = cases.iter().find(|case| case["loss_type"] == "rloo").unwrap();
    let (logps, tokens) = rows(&case["logps"]);
    let logps = var(&logps);
    let old = row_sums(&var(&rows(&case["old_logps"]).0), &tokens).unwrap();
    let advantages = numbers(&case["advantages"]);
    let sampled = Sampled {
        old_logps: &old.to_vec1::<f32>().unwrap(),
        advantages: &advantages,
        weights: &[1.0; 4],
    };
    let settings = GrpoSettings { epsilon: 0.2, epsilon_high: 0.2, beta: 0.0 };
    let sums = row_sums(&logps, &tokens).unwrap();
    let (loss, stats) = grpo_loss(&sums, &sampled, &[1; 4], None, &settings, None).unwrap();
    close(scalar(&loss) / 4.0, number(&case["loss"]), "rloo");
    all_close(&gradient(&loss, &logps), 4.0, &rows(&case["gradient"]).0, "rloo");
    let mut metrics = stats.metrics();
    metrics.push(("entropy", number(&case["metrics"]["entropy"]))); // over tokens, computed by the caller
    same_metrics(&metrics, case, "rloo");
}

#[test]
fn policy_gradients_match_finite_differences() {
    let logps = [-1.0f32, -2.0, -0.5, -3.0];
    let old = [-1.05f32, -1.5, -0.52, -3.9];
    let sampled = Sampled {
        old_logps: &old,
        advantages: &[1.0, 0.5, -2.0, -1.0],
        weights: &[1.0, 0.5, 0.25, 2.0],
    };
    let ppo = |logps: &Tensor| ppo_policy_loss(logps, &sampled, 0.2, None).unwrap().0;
    check_slopes(&logps, ppo, "ppo");
    let settings = GrpoSettings { epsilon: 0.2, epsilon_high: 0.3, beta: 0.1 };
    let reference = [-1.3f32, -1.0, -0.5, -2.0];
    let grpo = |logps: &Tensor| {
        grpo_loss(logps, &sampled, &[3, 1], Some(&reference), &settings, None).unwrap().0
    };
    check_slopes(&logps, grpo, "grpo");
    let value = |values: &Tensor| {
        ppo_value_loss(values, &old, &[0.0, -2.5, 1.0, -3.0], sampled.weights, 0.2).unwrap().0
    };
    check_slopes(&logps, value, "value");
    // On policy, the clipped loss has the gradient of REINFORCE (Williams 1992).
    let now = var(&old);
    let reinforce = sampled.advantages.iter().zip(sampled.weights).map(|(a, w)| -a * w);
    all_close(&gradient(&ppo(&now), &now), 1.0, &reinforce.collect::<Vec<f32>>(), "on policy");
}

#[test]
fn whitened_rewards_have_no_scale() {
    let mut values: Vec<f32> = (0..50).map(|i| 100.0 + (i as f32 * 1.7).sin()).collect();
    whiten(&mut values, true);
    let mut moments = RunningMoments::default();
    moments.extend(&values);
    close(moments.mean, 0.0, "mean");
    close(moments.variance(), 1.0, "variance");
}

#[test]
fn language_modelling_is_the_sum_of_surprise() {
    let logps = Var::new(&[-1.0f32, -2.5], &Device::Cpu).unwrap();
    let (loss, output) = Objective::LanguageModeling.compute(Some(&logps), None, None).unwrap();
    assert_eq!((loss.to_scalar::<f32>().unwrap(), output.loss), (3.5, 3.5));
    let grads = loss.backward().unwrap();
    assert_eq!(grads.get(&logps).unwrap().to_vec1::<f32>().unwrap(), [-1.0, -1.0]);
    assert!(Objective::LanguageModeling.compute(None, None, None).is_err());
}
