//! Reward models, DPO, PPO and GRPO on the command line: every flag has an effect, a killed run resumes to the
//! same bytes, invalid input ends in one error, and unhealthy updates are diagnosed.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Instant;

use candle_core::Device;
use quantune::data::Batch;
use quantune::generate::{Sampling, Settings};
use quantune::model::scoring::target_log_probs;
use quantune::model::{ActiveAdapter, CacheType, Decoder};
use quantune::objectives::policy::GrpoSettings;
use quantune::objectives::{Grpo, Objective};
use quantune::ops::Compute;
use quantune::optim::AdamWSettings;
use quantune::rollout::{
    Cause, Diagnosis, Experience, FirstStep, Response, diagnose_update, ppo, respond,
};
use quantune::train::learner::{Learner, MicroBatch};
use quantune_adapters::delta::Adapter;
use quantune_adapters::format;
use quantune_adapters::rng::Stream;
use serde_json::{Value, json};

use crate::binary::{
    Lab, adapter, base, common_rows, error, every_flag, interrupt, kill, last_json, quantune,
    reward_adapters, strings, tree,
};
use crate::support::{golden, load, model_path};

/// The lines of a run's `metrics.jsonl`.
fn metrics(out: &str) -> Vec<Value> {
    let text = fs::read_to_string(Path::new(out).join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A value of each line that has it.
fn series(out: &str, key: &str) -> Vec<f64> {
    metrics(out).iter().filter_map(|line| line.get(key)?.as_f64()).collect()
}

/// Runs a command to its end and returns its JSON.
fn run(command: &str, flags: &[(&str, &str)], out: &str) -> Value {
    last_json(&quantune(&arguments(command, flags, out)))
}

fn arguments(command: &str, flags: &[(&str, &str)], out: &str) -> Vec<String> {
    let mut args = strings(&[command, "--out", out, "--json"]);
    let given = flags.iter().flat_map(|(flag, value)| [flag.to_string(), value.to_string()]);
    args.extend(given.filter(|part| !part.is_empty()));
    args
}

/// An adapter whose answers end after a few tokens, some sooner than others.
fn ending(lab: &Lab) -> String {
    let row = |i: usize| {
        let (question, answer) = ("of it ".repeat(i % 4), " yes".repeat(i % 4));
        format!("{{\"prompt\": \"question {i} {question}\", \"completion\": \"{answer}\"}}\n")
    };
    lab.write("short.jsonl", &(0..40).map(row).collect::<String>());
    let (base, rows, out) = (base(), lab.path("short.jsonl"), lab.path("ending"));
    let flags = [
        ("--base", &*base),
        ("--data", &*rows),
        ("--r", "8"),
        ("--learning-rate", "0.02"),
        ("--max-steps", "12"),
        ("--packing", "false"),
        ("--allow", "empty-answers"), // empty answers are valid here
        ("--threads", "1"),
    ];
    run("sft", &flags, &out);
    format!("{out}/adapter")
}

#[test]
fn every_flag_of_reward_changes_something() {
    let lab = Lab::with_comparisons();
    let (rows, held_out) = (lab.path("pairs.jsonl"), lab.path("held_out_pairs.jsonl"));
    let (settings, adapter, dated) = (lab.path("settings.toml"), adapter(), lab.dated_base());
    let (base, other_base) = (base(), model_path("qwen2-tiny").display().to_string());
    let base_args: &[(&str, &str)] = &[
        ("--base", &base),
        ("--data", &rows),
        ("--out", "OUT"),
        ("--max-steps", "3"),
        ("--threads", "1"),
        ("--json", ""),
    ];
    let mut table = common_rows(&held_out, ("accuracy", "true"), &settings, &adapter, &dated);
    table.extend([
        vec![("--base", &*other_base)],
        vec![("--max-length", "45")],
        vec![("--gradient-accumulation-steps", "3")],
        vec![("--center-rewards-coefficient", "0.1")],
    ]);
    // killed_runs_resume_to_the_same_bytes, a_dry_run_prints_the_plan_and_writes_nothing
    let tested_apart =
        &["--resume", "--allow", "--loftq-base", "--dry-run", "--device", "--memory-budget"];
    every_flag(&["reward"], base_args, &table, tested_apart, &lab);
}

#[test]
fn every_flag_of_dpo_changes_something() {
    let lab = Lab::with_comparisons();
    let (rows, held_out) = (lab.path("pairs.jsonl"), lab.path("held_out_pairs.jsonl"));
    let labels = lab.path("labels.jsonl");
    let (settings, adapter, dated) = (lab.path("settings.toml"), adapter(), lab.dated_base());
    let (base, other_base) = (base(), model_path("qwen2-tiny").display().to_string());
    let base_args: &[(&str, &str)] = &[
        ("--base", &base),
        ("--data", &rows),
        ("--out", "OUT"),
        ("--max-steps", "3"),
        ("--learning-rate", "0.003"),
        ("--threads", "1"),
        ("--json", ""),
    ];
    let kto = [("--data", &*labels), ("--loss-type", "kto")];
    let mut table =
        common_rows(&held_out, ("rewards/accuracies", "true"), &settings, &adapter, &dated);
    table.extend([
        vec![("--base", &*other_base)],
        vec![("--max-length", "40")],
        vec![("--gradient-accumulation-steps", "3")],
        vec![("--loss-type", "ipo")],
        vec![("--beta", "1")],
        vec![("--label-smoothing", "0.2")],
        vec![("--reference-free", "true")],
        vec![("--ref-adapter", &*adapter)],
        vec![("--loss-type", "simpo"), ("--simpo-gamma", "2")],
        [&kto[..], &[("--desirable-weight", "2")]].concat(),
        [&kto[..], &[("--undesirable-weight", "2")]].concat(),
    ]);
    // killed_runs_resume_to_the_same_bytes, a_dry_run_prints_the_plan_and_writes_nothing
    let tested_apart =
        &["--resume", "--allow", "--loftq-base", "--dry-run", "--device", "--memory-budget"];
    every_flag(&["dpo"], base_args, &table, tested_apart, &lab);
}

#[test]
fn every_flag_of_ppo_changes_something() {
    let lab = Lab::with_comparisons();
    let (rows, held_out) = (lab.path("prompts.jsonl"), lab.path("held_out_prompts.jsonl"));
    let texts = lab.path("rows.jsonl");
    let (settings, adapter, dated) = (lab.path("settings.toml"), adapter(), lab.dated_base());
    let (base, other_base, ending) = (base(), lab.other_base(), ending(&lab));
    let [reward, other_reward] = reward_adapters();
    let base_args: &[(&str, &str)] = &[
        ("--base", &base),
        ("--data", &rows),
        ("--out", "OUT"),
        ("--reward-adapter", &reward),
        ("--max-steps", "3"),
        ("--batch-size", "8"),
        ("--response-length", "8"),
        ("--num-ppo-epochs", "2"),
        ("--learning-rate", "0.003"),
        ("--threads", "1"),
        ("--json", ""),
    ];
    let mut table = common_rows(&held_out, ("length", "false"), &settings, &adapter, &dated);
    table.extend([
        vec![("--base", &*other_base)],
        vec![("--reward-adapter", &*other_reward)],
        vec![("--eval-data", &*held_out), ("--judge-adapter", &*other_reward)],
        vec![("--ref-adapter", &*adapter)],
        vec![("--value-model", "policy")],
        vec![("--value-adapter", &*other_reward)],
        vec![("--batch-size", "4")],
        vec![("--num-mini-batches", "2")],
        vec![("--num-ppo-epochs", "1")],
        vec![("--response-length", "5")],
        vec![("--temperature", "1.5")],
        vec![("--top-k", "5")],
        vec![("--top-p", "0.5")],
        vec![("--adapter", &*ending), ("--missing-eos-penalty", "1")],
        vec![("--score-at-eos", "false")],
        vec![("--kl-coef", "1")],
        vec![("--kl-estimator", "k3")],
        vec![("--target-kl", "0.01")],
        vec![("--target-kl", "0.01"), ("--kl-horizon", "10")],
        vec![("--gamma", "0.5")],
        vec![("--lam", "0.5")],
        vec![("--whiten-rewards", "true")],
        vec![("--normalize-scores", "true")],
        vec![("--clip-scores", "0.01")],
        vec![("--cliprange", "0.001")],
        vec![("--cliprange-value", "0.001")],
        vec![("--vf-coef", "1")],
        vec![("--ptx-data", &*texts)],
        vec![("--ptx-data", &*texts), ("--ptx-coef", "3")],
        vec![("--ptx-data", &*texts), ("--max-length", "50")], // for prompts it only limits the length
        vec![("--eval-data", &*held_out), ("--eval-prompts", "3")],
        vec![("--sample-steps", "1")],
        vec![("--sample-steps", "1"), ("--num-samples", "2")],
    ]);
    let tested_apart = &[
        "--resume",              // killed_runs_resume_to_the_same_bytes
        "--dry-run",             // a_dry_run_prints_the_plan_and_writes_nothing
        "--allow",               // failed_checks_stop_a_run_unless_allowed
        "--rollout-slots",       // the same, with another number: it must not change anything
        "--min-reward-accuracy", // a_reward_model_at_chance_is_rejected
        "--device",              // an_unavailable_device_is_an_error
        "--loftq-base",          // every_initialization_starts_as_the_base
        "--memory-budget",       // a_memory_budget_is_kept_or_refused
    ];
    every_flag(&["ppo"], base_args, &table, tested_apart, &lab);
}

#[test]
fn every_flag_of_grpo_changes_something() {
    let lab = Lab::with_comparisons();
    let (rows, held_out) = (lab.path("prompts.jsonl"), lab.path("held_out_prompts.jsonl"));
    let (settings, adapter, dated) = (lab.path("settings.toml"), adapter(), lab.dated_base());
    let (base, other_base, ending) = (base(), model_path("qwen2-tiny"), ending(&lab));
    let (other_base, reward_model) = (other_base.display().to_string(), lab.reward_model());
    let [reward, _] = reward_adapters();
    // Lengths in characters differ in every group: responses of all of them have advantages.
    let base_args: &[(&str, &str)] = &[
        ("--base", &base),
        ("--data", &rows),
        ("--out", "OUT"),
        ("--reward", "length:20:characters"),
        ("--max-steps", "3"),
        ("--batch-size", "2"),
        ("--num-generations", "4"),
        ("--max-completion-length", "8"),
        ("--learning-rate", "0.003"),
        ("--threads", "1"),
        ("--json", ""),
    ];
    let ends = ("--adapter", &*ending);
    let again = ("--num-iterations", "2");
    let mut table = common_rows(&held_out, ("length", "false"), &settings, &adapter, &dated);
    table.extend([
        vec![("--base", &*other_base)],
        vec![("--reward", "length:40:characters")],
        vec![("--reward-command", "while read -r line; do echo ${#line}; done")],
        vec![("--reward-adapter", &*reward)],
        vec![("--reward-model", &*reward_model)],
        vec![("--reward-weights", "-2")],
        vec![("--beta", "0.1"), ("--ref-adapter", &*adapter)],
        vec![("--batch-size", "4")],
        vec![("--num-generations", "2")],
        vec![("--num-iterations", "2")],
        vec![("--num-mini-batches", "2")],
        vec![("--max-completion-length", "5")],
        vec![("--temperature", "1.5")],
        vec![("--top-k", "5")],
        vec![("--top-p", "0.5")],
        vec![("--reward-adapter", &*reward), ("--score-at-eos", "false")],
        vec![("--advantage", "rloo")],
        vec![("--scale-rewards", "none")],
        vec![ends, ("--loss-type", "dr_grpo")],
        vec![("--beta", "0.5")],
        vec![again, ("--epsilon", "0.001")],
        vec![again, ("--epsilon", "0.001"), ("--epsilon-high", "1")],
        vec![ends, ("--mask-truncated-completions", "true")],
        vec![("--eval-data", &*held_out), ("--eval-prompts", "3")],
        vec![("--sample-steps", "1")],
        vec![("--sample-steps", "1"), ("--num-samples", "2")],
    ]);
    let tested_apart = &[
        "--resume",              // killed_runs_resume_to_the_same_bytes
        "--dry-run",             // a_dry_run_prints_the_plan_and_writes_nothing
        "--allow",               // failed_checks_stop_a_run_unless_allowed
        "--rollout-slots",       // the same, with another number: it must not change anything
        "--min-reward-accuracy", // a_reward_model_at_chance_is_rejected
        "--device",              // an_unavailable_device_is_an_error
        "--loftq-base",          // every_initialization_starts_as_the_base
        "--memory-budget",       // a_memory_budget_is_kept_or_refused
        "--max-length",          // invalid_rollout_settings_are_errors
        "--reward-timeout",      // invalid_rollout_settings_are_errors
    ];
    every_flag(&["grpo"], base_args, &table, tested_apart, &lab);
}

/// Runs `fresh` to its end, then `trials` times with SIGKILL at a random moment, resumes with `resumed`, and
/// compares all files of the runs.
fn check_killed_runs_resume(
    command: &str,
    lab: &Lab,
    fresh: &[(&str, &str)],
    resumed: &[(&str, &str)],
    trials: usize,
) {
    let start = |out: &str, resume: bool| {
        let flags = if resume { [&[("--resume", "")], resumed].concat() } else { fresh.to_vec() };
        let mut process = Command::new(env!("CARGO_BIN_EXE_quantune"));
        process.args(arguments(command, &flags, out)).stderr(Stdio::null()).stdout(Stdio::null());
        process.spawn().unwrap()
    };
    let whole = lab.path(&format!("{command}-whole"));
    let began = Instant::now();
    assert!(start(&whole, false).wait().unwrap().success());
    let duration = began.elapsed();
    let expected = tree(&whole);
    let mut random = Stream::new(9, "kill", &[]);
    let mut taken_up = 0;
    for trial in 0..trials {
        let out = lab.path(&format!("{command}-killed-{trial}"));
        let mut moment = duration.mul_f64(0.2 + 0.8 * random.uniform_f64());
        while !kill(start(&out, false), moment, || true) {
            fs::remove_dir_all(&out).unwrap(); // it finished before it was killed
            moment = moment.mul_f64(0.8);
        }
        let checkpoints = fs::read_dir(Path::new(&out).join("checkpoints"));
        taken_up += usize::from(checkpoints.is_ok_and(|mut entries| entries.next().is_some()));
        let began_at_all = Path::new(&out).join("config.toml").exists();
        assert!(start(&out, began_at_all).wait().unwrap().success(), "{command}, trial {trial}");
        let found = tree(&out);
        assert!(found.keys().eq(expected.keys()), "{command}, trial {trial}: {:?}", found.keys());
        for (name, bytes) in &expected {
            assert!(found[name] == *bytes, "{command}, trial {trial}: {name} differs");
        }
    }
    println!("{command}: {taken_up} of {trials} were taken up at a checkpoint");
    assert!(taken_up > 0, "{command}");
}

/// All of PPO's state: moments of scores, the KL coefficient, two adapters, dropout, samples, and evaluations
/// in between.
#[test]
fn killed_ppo_runs_resume_to_the_same_bytes() {
    let lab = Lab::with_comparisons();
    let (base, rows, texts) = (base(), lab.path("prompts.jsonl"), lab.path("rows.jsonl"));
    let [reward, judge] = reward_adapters();
    let fresh = [
        ("--base", &*base),
        ("--data", &*rows),
        ("--reward-adapter", &*reward),
        ("--judge-adapter", &*judge),
        ("--ptx-data", &*texts),
        ("--max-steps", "10"),
        ("--save-steps", "2"),
        ("--batch-size", "8"),
        ("--num-mini-batches", "2"),
        ("--num-ppo-epochs", "2"),
        ("--per-device-train-batch-size", "2"),
        ("--response-length", "8"),
        ("--learning-rate", "0.003"),
        ("--lora-dropout", "0.1"),
        ("--normalize-scores", "true"),
        ("--target-kl", "0.5"),
        ("--kl-horizon", "50"),
        ("--sample-steps", "1"),
        ("--eval-strategy", "steps"),
        ("--eval-steps", "4"),
        ("--eval-prompts", "4"),
        ("--threads", "2"),
    ];
    // Another number of threads and of rows decoded at once gives the same bits.
    let resumed = [("--threads", "1"), ("--rollout-slots", "3")];
    check_killed_runs_resume("ppo", &lab, &fresh, &resumed, 10);
}

#[test]
fn killed_runs_resume_to_the_same_bytes() {
    let lab = Lab::with_comparisons();
    let (base, prompts, pairs) = (base(), lab.path("prompts.jsonl"), lab.path("pairs.jsonl"));
    let [reward, _] = reward_adapters();
    let common = [
        ("--base", &*base),
        ("--save-steps", "2"),
        ("--learning-rate", "0.003"),
        ("--lora-dropout", "0.1"),
        ("--threads", "2"),
    ];
    let resumed = [("--threads", "1")];
    let own = [
        ("--data", &*prompts),
        ("--reward", "length:20:characters"),
        ("--reward-command", "while read -r line; do echo ${#line}; done"),
        ("--reward-adapter", &*reward),
        ("--beta", "0.1"),
        ("--max-steps", "10"),
        ("--batch-size", "4"),
        ("--num-generations", "4"),
        ("--num-iterations", "2"),
        ("--num-mini-batches", "2"),
        ("--max-completion-length", "8"),
        ("--sample-steps", "3"),
    ];
    let more = [&resumed[..], &[("--rollout-slots", "5")]].concat();
    check_killed_runs_resume("grpo", &lab, &[&common[..], &own].concat(), &more, 3);
    let own = [
        ("--data", &*pairs),
        ("--eval-strategy", "epoch"),
        ("--num-train-epochs", "4"),
        ("--per-device-train-batch-size", "2"),
    ];
    let fresh = [&common[..], &own].concat();
    check_killed_runs_resume("dpo", &lab, &fresh, &resumed, 3);
    check_killed_runs_resume("reward", &lab, &fresh, &resumed, 2);
}

/// Comparisons and prompts cached on disk train to the same bytes as in memory, including held-out rows and
/// fields that rewards read; they are tokenized once, also for a resumed run.
#[test]
fn cached_rows_train_to_the_same_bytes() {
    let lab = Lab::with_comparisons();
    let base = base();
    let [reward, _] = reward_adapters();
    let answered = |i: usize| {
        let (prompt, wanted) = (format!("question {i}"), ["e", "a"][i % 2]);
        json!({"prompt": prompt, "wanted": wanted, "number": 0.1 * i as f64})
    };
    let lines = (0..40).map(|i| format!("{}\n", answered(i)));
    lab.write("answered.jsonl", &lines.collect::<String>());
    let check = |name: &str, command: &str, data: &str, own: &[(&str, &str)]| {
        let (data, cache) = (lab.path(data), lab.path(&format!("{name}-cache")));
        let folders = || {
            let entries = fs::read_dir(&cache).unwrap();
            entries.filter(|entry| entry.as_ref().unwrap().path().is_dir()).count()
        };
        let train = |from: &str| {
            let out = lab.path(&format!("{name}-{from}"));
            let common = [
                ("--base", &*base),
                ("--data", &data),
                ("--cache-from", from),
                ("--cache", &cache),
                ("--max-steps", "3"),
                ("--save-steps", "1"),
                ("--save-total-limit", "0"),
                ("--learning-rate", "0.003"),
                ("--eval-strategy", "epoch"),
                ("--threads", "1"),
            ];
            run(command, &[&common[..], own].concat(), &out);
            out
        };
        let (in_memory, on_disk) = (train("1GB"), train("1"));
        assert_eq!(folders(), 1, "{name}");
        let weights =
            |out: &str| fs::read(Path::new(out).join("adapter/adapter_model.safetensors")).unwrap();
        let held_out = |out: &str| fs::read(Path::new(out).join("held_out.jsonl")).unwrap();
        assert!(weights(&in_memory) == weights(&on_disk), "{name}");
        assert!(!held_out(&in_memory).is_empty(), "{name}");
        assert!(held_out(&in_memory) == held_out(&on_disk), "{name}");
        assert_eq!(series(&in_memory, "eval_loss"), series(&on_disk, "eval_loss"), "{name}");
        assert_eq!(series(&in_memory, "eval_reward"), series(&on_disk, "eval_reward"), "{name}");
        for step in ["step-2", "step-3"] {
            fs::remove_dir_all(Path::new(&on_disk).join("checkpoints").join(step)).unwrap();
        }
        let resumed = run(command, &[("--resume", "")], &on_disk);
        assert_eq!(resumed["resumed_at"], 1, "{name}");
        assert!(weights(&in_memory) == weights(&on_disk), "{name}, resumed");
        assert_eq!(folders(), 1, "{name}: tokenized once");
    };
    check("reward", "reward", "pairs.jsonl", &[]);
    check("dpo", "dpo", "pairs.jsonl", &[]);
    check("kto", "dpo", "labels.jsonl", &[("--loss-type", "kto")]);
    let own = [("--reward-adapter", &*reward), ("--batch-size", "4"), ("--response-length", "6")];
    check("ppo", "ppo", "answered.jsonl", &own);
    let own = [
        ("--reward", "contains:wanted"),
        ("--batch-size", "4"),
        ("--num-generations", "4"),
        ("--max-completion-length", "6"),
    ];
    check("grpo", "grpo", "answered.jsonl", &own);
}

#[cfg(unix)]
#[test]
fn an_interrupted_ppo_run_prints_how_to_resume() {
    let lab = Lab::with_comparisons();
    let (base, rows, [reward, _]) = (base(), lab.path("prompts.jsonl"), reward_adapters());
    let start = |out: &str| {
        let flags = [
            ("--base", &*base),
            ("--data", &*rows),
            ("--reward-adapter", &*reward),
            ("--max-steps", "20"),
            ("--batch-size", "8"),
            ("--response-length", "8"),
            ("--top-k", "5"), // of which it warns
        ];
        let mut process = Command::new(env!("CARGO_BIN_EXE_quantune"));
        process.args(arguments("ppo", &flags, out)).stderr(Stdio::piped()).stdout(Stdio::null());
        process.spawn().unwrap()
    };
    let (whole, stopped) = (lab.path("whole"), lab.path("stopped"));
    assert!(start(&whole).wait_with_output().unwrap().status.success());
    let lines = Path::new(&stopped).join("metrics.jsonl");
    let output = interrupt(start(&stopped), || fs::metadata(&lines).is_ok_and(|f| f.len() > 0));
    assert_eq!(output.status.code(), Some(1));
    let sentence = error(&output);
    assert!(sentence.contains(&format!("quantune ppo --out {stopped} --resume")), "{sentence}");
    let warned = |output: &Output| {
        String::from_utf8_lossy(&output.stderr).matches("sampling filters").count()
    };
    let before = warned(&output);
    assert!(before > 0);
    let output = quantune(&arguments("ppo", &[("--resume", "")], &stopped));
    let resumed = last_json(&output);
    assert!(resumed["resumed_at"].as_u64().unwrap() >= 1);
    // Warnings are not repeated after a resume, but still recorded.
    let warnings = resumed["warnings"].as_array().unwrap();
    assert_eq!(warnings.len(), before + warned(&output), "{warnings:?}");
    let (mut found, mut expected) = (tree(&stopped), tree(&whole));
    for tree in [&mut found, &mut expected] {
        tree.retain(|name, _| !name.starts_with("checkpoints") || name.contains("step-20"));
    }
    assert!(found == expected);
}

/// The KL of a policy from an identical reference is exactly 0.
#[test]
fn a_new_policy_equals_its_reference() {
    let lab = Lab::with_comparisons();
    let (base, rows, adapter) = (base(), lab.path("prompts.jsonl"), adapter());
    let [reward, _] = reward_adapters();
    let check = |name: &str, more: &[(&str, &str)]| {
        let flags = [("--base", &*base), ("--data", &*rows), ("--reward-adapter", &*reward)];
        let steps = [("--max-steps", "2"), ("--learning-rate", "0.003"), ("--batch-size", "8")];
        let out = lab.path(name);
        let found = run("ppo", &[&flags[..], &steps, more].concat(), &out);
        let kl = series(&out, "objective/kl");
        assert!(kl[0] == 0.0 && kl[1] != 0.0, "{name}: {kl:?}");
        assert_eq!(found["objective/kl_first"].as_f64(), Some(0.0), "{name}");
        assert_eq!(found["warnings"], Value::Array(Vec::new()), "{name}");
        let value = Path::new(&out).join("value_adapter/adapter_model.safetensors");
        assert_eq!(value.exists(), !more.contains(&("--value-model", "policy")), "{name}");
        // The next run continues from the policy, wherever the value head was.
        let policy = format!("{out}/adapter");
        let next = [&flags[..], &steps, &[("--adapter", &*policy)]].concat();
        run("ppo", &next, &lab.path(&format!("{name}-next")));
    };
    check("fresh", &[]);
    check("continued", &[("--adapter", &*adapter)]);
    check("shared", &[("--value-model", "policy")]);
    check("dropout", &[("--lora-dropout", "0.3")]);
}

/// Runs `command` with flags over `base` (the last of a name counts), and checks its exit code, its one-line
/// error, and that no adapter is left.
struct Refused<'a> {
    lab: &'a Lab,
    command: &'a str,
    base: &'a [(&'a str, &'a str)],
}

impl Refused<'_> {
    fn check(&self, flags: &[(&str, &str)], words: &[&str]) {
        let kept = self.base.iter().filter(|(flag, _)| !flags.iter().any(|(f, _)| f == flag));
        let all: Vec<(&str, &str)> = kept.chain(flags).copied().collect();
        let all: Vec<(&str, &str)> = all.into_iter().filter(|(_, value)| *value != "-").collect();
        let out = self.lab.path("refused");
        let began = Instant::now();
        let output = quantune(&arguments(self.command, &all, &out));
        assert_eq!(output.status.code(), Some(1), "{} {flags:?}", self.command);
        let sentence = error(&output);
        let stderr = String::from_utf8_lossy(&output.stderr);
        for word in words {
            assert!(stderr.contains(word), "{} {flags:?}: {stderr}", self.command);
        }
        assert!(sentence.lines().count() == 1, "{sentence}");
        assert!(!Path::new(&out).join("adapter").exists(), "{flags:?} left an adapter");
        assert!(began.elapsed().as_secs() < 20, "{flags:?} took too long");
        if Path::new(&out).exists() {
            // A run that started can be resumed; otherwise it was rejected before.
            assert!(Path::new(&out).join("config.toml").exists(), "{flags:?} left half a run");
            fs::remove_dir_all(&out).unwrap();
        }
    }
}

#[test]
fn invalid_comparison_settings_are_errors() {
    let lab = Lab::with_comparisons();
    let (base, pairs, labels) = (base(), lab.path("pairs.jsonl"), lab.path("labels.jsonl"));
    let (plain, [reward, _]) = (adapter(), reward_adapters());
    let tied = "{\"prompt\": \"p\", \"responses\": [\"a\", \"b\"], \"ranks\": [1, 1]}\n";
    lab.write("ties.jsonl", &tied.repeat(6));
    lab.write("bad.toml", "bata = 1.0\n");
    let wrong = "{\"prompt\": \"p\", \"chosen\": \"a\"}\n";
    lab.write("wrong.jsonl", &(tied.to_string() + wrong));
    let (ties, toml, wrong) =
        (lab.path("ties.jsonl"), lab.path("bad.toml"), lab.path("wrong.jsonl"));
    let base_args = [("--base", &*base), ("--data", &*pairs), ("--max-steps", "1")];
    for command in ["reward", "dpo"] {
        let refused = Refused { lab: &lab, command, base: &base_args };
        refused.check(&[("--data", &ties)], &["ties.jsonl", "nothing to compare in any of 6 rows"]);
        refused.check(&[("--data", &wrong)], &["wrong.jsonl:2"]);
        refused.check(&[("--data", &labels)], &["labels.jsonl:1", "needs `chosen` and `rejected`"]);
        refused.check(&[("--config", &toml)], &["bad.toml", "unknown bata"]);
        refused.check(&[("--max-length", "4")], &["nothing to compare", "longer than 4 tokens"]);
        refused.check(&[("--resume", "")], &["no run to resume"]);
    }
    let dpo = Refused { lab: &lab, command: "dpo", base: &base_args };
    dpo.check(&[("--loss-type", "kto"), ("--data", &ties)], &["ties.jsonl:1", "label"]);
    dpo.check(&[("--loss-type", "kto"), ("--beta", "0")], &["beta is 0"]);
    dpo.check(&[("--adapter", &reward)], &["--adapter", "score head"]);
    dpo.check(&[("--loss-type", "orpo"), ("--ref-adapter", &plain)], &["no reference"]);
    dpo.check(&[("--simpo-gamma", "1")], &["simpo_gamma only applies to loss_type simpo"]);
    let smoothed = [("--loss-type", "hinge"), ("--label-smoothing", "0.1")];
    dpo.check(&smoothed, &["label_smoothing only applies to loss_type sigmoid, simpo"]);
    let alone = [("--loss-type", "kto"), ("--per-device-train-batch-size", "1")];
    let alone = [&alone[..], &[("--gradient-accumulation-steps", "1")]].concat();
    dpo.check(&alone, &["kto compares the rows of a step"]);
}

#[test]
fn invalid_rollout_settings_are_errors() {
    let lab = Lab::with_comparisons();
    let (base, prompts, plain) = (base(), lab.path("prompts.jsonl"), adapter());
    let [reward, _] = reward_adapters();
    let other_base = model_path("llama-untied").display().to_string();
    let long = format!("{{\"prompt\": \"{}\"}}\n", "many words ".repeat(40));
    lab.write("long.jsonl", &format!("{{\"prompt\": \"short\"}}\n{long}"));
    lab.write("no_answer.jsonl", "{\"prompt\": \"p\", \"answer\": \"a\"}\n{\"prompt\": \"q\"}\n");
    lab.write("bad.toml", "kl_cof = 1.0\n");
    let (long, no_answer) = (lab.path("long.jsonl"), lab.path("no_answer.jsonl"));
    let toml = lab.path("bad.toml");
    let base_args = [
        ("--base", &*base),
        ("--data", &*prompts),
        ("--reward-adapter", &*reward),
        ("--max-steps", "1"),
        ("--batch-size", "4"),
    ];
    for command in ["ppo", "grpo"] {
        let length = if command == "ppo" { "--response-length" } else { "--max-completion-length" };
        let base_args = [&base_args[..], &[(length, "8")]].concat();
        let refused = Refused { lab: &lab, command, base: &base_args };
        refused.check(&[("--reward-adapter", &plain)], &[&*plain, "without a score head"]);
        refused.check(&[("--reward-adapter", &base)], &[&*base]);
        refused.check(&[("--base", &other_base)], &["adapter_model.safetensors"]);
        refused.check(&[("--adapter", &reward)], &["--adapter", "score head", "generates"]);
        refused.check(&[("--data", &long)], &["long.jsonl:2: the prompt has", "at most 118"]);
        let cut = [("--max-length", "20")];
        refused.check(&cut, &["prompts.jsonl:1: the prompt has", "at most 12"]);
        refused.check(&[(length, "128")], &["no room is left for a prompt"]);
        refused.check(&[("--num-mini-batches", "3")], &["num_mini_batches is 3", "4 prompts"]);
        refused.check(&[("--config", &toml)], &["bad.toml", "unknown kl_cof"]);
        refused.check(&[("--temperature", "0")], &["temperature is 0"]);
        refused.check(&[("--resume", "")], &["no run to resume"]);
    }
    let ppo = Refused { lab: &lab, command: "ppo", base: &base_args };
    ppo.check(&[("--reward-adapter", "-")], &["--reward-adapter is missing"]);
    ppo.check(&[("--value-adapter", &plain)], &["without a score head"]);
    let judged = [("--eval-strategy", "epoch"), ("--judge-adapter", &*plain)];
    ppo.check(&judged, &["without a score head"]);
    ppo.check(&[("--judge-adapter", &reward)], &["judge_adapter", "--eval-data"]);
    ppo.check(&[("--target-kl", "1"), ("--kl-horizon", "0.1")], &["kl_horizon is 0.1"]);

    let no_reward = [("--reward-adapter", "-"), ("--max-completion-length", "8")];
    let base_args = [&base_args[..2], &base_args[3..], &no_reward].concat();
    let grpo = Refused { lab: &lab, command: "grpo", base: &base_args };
    grpo.check(&[], &["no reward is given"]);
    grpo.check(&[("--reward", "nice")], &["\"nice\" is not a known rule"]);
    let exact = ("--reward", "exact:answer");
    grpo.check(&[exact, ("--data", &no_answer)], &["no_answer.jsonl:2: ", "no field \"answer\""]);
    let held_out = [exact, ("--eval-data", &*no_answer)];
    grpo.check(&held_out, &["no_answer.jsonl:2: ", "no field \"answer\""]);
    grpo.check(&[exact, ("--reward-weights", "1,2")], &["reward_weights has 2 numbers for 1"]);
    // 8 divides the 32 responses of 4 groups, but groups stay whole.
    grpo.check(&[exact, ("--num-mini-batches", "8")], &["num_mini_batches is 8"]);
    grpo.check(&[exact, ("--num-generations", "1")], &["num_generations is 1"]);
    grpo.check(&[("--reward-model", &base)], &["score.weight"]);
    let small = lab.reward_model();
    let config = Path::new(&small).join("config.json");
    let mut read: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    read["max_position_embeddings"] = json!(24);
    fs::write(&config, read.to_string()).unwrap();
    let words = |count: usize| format!("{{\"prompt\": \"{}\"}}\n", "many words ".repeat(count));
    lab.write("longer.jsonl", &(words(1) + &words(12) + &words(11)));
    let longer = [("--reward-model", &*small), ("--data", &*lab.path("longer.jsonl"))];
    grpo.check(&longer, &["longer.jsonl:2: the longest prompt has", "may have 8, needed 24"]);
    lab.write("fitting.jsonl", &words(1));
    let held_out = [("--data", &*lab.path("fitting.jsonl")), ("--eval-data", longer[1].1)];
    grpo.check(&[&longer[..1], &held_out].concat(), &["longer.jsonl:2: the longest prompt"]);
    grpo.check(&[exact, ("--ref-adapter", &plain)], &["there is no reference"]);
    let program = |command: &str, words: &[&str]| {
        grpo.check(&[("--reward-command", command), ("--reward-timeout", "1")], words);
    };
    program("exit 4", &["exited (exit status: 4) after 0 of 32 answers"]);
    program("read -r l; echo 1; echo oh no >&2; exit 3", &["after 1 of 32", "oh no"]);
    program("kill -9 $$", &["SIGKILL"]);
    program("sleep 60", &["has not answered sample 1 of 32 within 1 s"]);
    program("while read -r l; do echo good; done", &["answered sample 1 of 32 with \"good\""]);
    program(
        "for i in 1 2 3; do read -r l; echo 1; done",
        &["exited (exit status: 0)", "after 3 of 32 answers"],
    );
    program("no-such-program-here", &["exited (exit status: 127)"]);
    program("yes 1", &["an extra line"]);
}

/// An error that contains its cause does not repeat it.
#[test]
fn a_missing_file_is_reported_once() {
    let lab = Lab::new();
    let (base, missing, [reward, _]) = (base(), lab.path("missing.jsonl"), reward_adapters());
    let given = [("--base", &*base), ("--data", &*missing), ("--max-steps", "1")];
    let rewarded = [&given[..], &[("--reward-adapter", &*reward)]].concat();
    for (command, flags) in [("sft", &given[..]), ("ppo", &rewarded)] {
        let output = quantune(&arguments(command, flags, &lab.path("out")));
        assert_eq!(output.status.code(), Some(1), "{command}");
        let sentence = error(&output);
        let needed = format!("error: {missing}: cannot be read: ");
        assert!(sentence.starts_with(&needed), "{command}: {sentence}");
        assert_eq!(sentence.matches("os error 2").count(), 1, "{command}: {sentence}");
    }
}

/// The inputs of a run must not change, and a failed reward program loses no step.
#[test]
fn resume_rejects_changed_settings_and_files() {
    let lab = Lab::with_comparisons();
    let (base, prompts, [reward, other]) = (base(), lab.path("prompts.jsonl"), reward_adapters());
    let copy = |from: &str, name: &str| -> String {
        let folder = lab.folder.path().join(name);
        fs::create_dir_all(&folder).unwrap();
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            fs::copy(Path::new(from).join(file), folder.join(file)).unwrap();
        }
        folder.display().to_string()
    };
    let reward = copy(&reward, "reward");
    let out = lab.path("ppo");
    let flags = [
        ("--base", &*base),
        ("--data", &*prompts),
        ("--reward-adapter", &*reward),
        ("--max-steps", "1"),
        ("--batch-size", "4"),
        ("--response-length", "4"),
    ];
    run("ppo", &flags, &out);
    let resume = |command: &str, more: &[(&str, &str)]| {
        quantune(&arguments(command, &[&[("--resume", "")], more].concat(), &out))
    };
    let sentence = error(&resume("grpo", &[]));
    assert!(sentence.contains("settings of \"ppo\", needed \"grpo\""), "{sentence}");
    let sentence = error(&resume("ppo", &[("--gamma", "0.5")]));
    assert!(sentence.contains("gamma was 1.0, is 0.5"), "{sentence}");
    assert!(resume("ppo", &[]).status.success());
    copy(&other, "reward");
    let sentence = error(&resume("ppo", &[]));
    assert!(sentence.contains("the reward adapter changed since the run began"), "{sentence}");

    let (pairs, reference, out) =
        (lab.path("pairs.jsonl"), copy(&adapter(), "ref"), lab.path("dpo"));
    let flags = [
        ("--base", &*base),
        ("--data", &*pairs),
        ("--ref-adapter", &*reference),
        ("--max-steps", "1"),
    ];
    run("dpo", &flags, &out);
    copy(&golden("rl/dpo/final").display().to_string(), "ref");
    let sentence = error(&quantune(&arguments("dpo", &[("--resume", "")], &out)));
    assert!(sentence.contains("the reference adapter changed since the run began"), "{sentence}");

    // It fails in the third update; once it is fixed, the run resumes to the same bytes.
    let mended = lab.path("mended");
    let command = format!(
        "n=0; while read -r line; do n=$((n+1)); [ $n = 20 ] && [ ! -e {mended} ] && exit 3; \
         echo ${{#line}}; done"
    );
    let flags = [
        ("--base", &*base),
        ("--data", &*prompts),
        ("--reward-command", &*command),
        ("--max-steps", "5"),
        ("--save-steps", "1"),
        ("--save-total-limit", "1"),
        ("--batch-size", "2"),
        ("--num-generations", "4"),
        ("--max-completion-length", "4"),
    ];
    let (whole, stopped) = (lab.path("whole"), lab.path("stopped"));
    let sentence = error(&quantune(&arguments("grpo", &flags, &stopped)));
    assert!(sentence.contains("exited (exit status: 3) after 3 of 8 answers"), "{sentence}");
    lab.write("mended", "");
    assert_eq!(run("grpo", &[("--resume", "")], &stopped)["resumed_at"], 2);
    run("grpo", &flags, &whole);
    assert!(tree(&stopped) == tree(&whole));
}

/// A reward model trained on random labels has no held-out accuracy, and is rejected by `ppo`.
#[test]
fn a_reward_model_at_chance_is_rejected() {
    let lab = Lab::with_comparisons();
    let row = |i: usize, swapped: bool| {
        let (mut chosen, mut rejected) = (format!("good {}", i * i), format!("bad {i} of all"));
        if swapped {
            std::mem::swap(&mut chosen, &mut rejected);
        }
        let prompt = format!("question {i}");
        format!("{}\n", json!({ "prompt": prompt, "chosen": chosen, "rejected": rejected }))
    };
    let mut coin = Stream::new(1, "coin", &[]);
    lab.write(
        "flips.jsonl",
        &(0..80).map(|i| row(i, coin.uniform_f64() < 0.5)).collect::<String>(),
    );
    // Every pair in both orders, so that the best accuracy is one half.
    let both = |i: usize| row(i, false) + &row(i, true);
    lab.write("held_out_flips.jsonl", &(100..120).map(both).collect::<String>());
    let (base, prompts) = (base(), lab.path("prompts.jsonl"));
    let (flips, held_out, out) =
        (lab.path("flips.jsonl"), lab.path("held_out_flips.jsonl"), lab.path("reward"));
    let flags = [
        ("--base", &*base),
        ("--data", &*flips),
        ("--eval-data", &*held_out),
        ("--learning-rate", "0.002"),
    ];
    let trained = run("reward", &flags, &out);
    assert_eq!(trained["eval_accuracy"], 0.5);
    let model = format!("{out}/adapter");
    let flags = [
        ("--base", &*base),
        ("--data", &*prompts),
        ("--reward-adapter", &*model),
        ("--max-steps", "1"),
        ("--batch-size", "4"),
    ];
    for (command, length) in [("ppo", "--response-length"), ("grpo", "--max-completion-length")] {
        let flags = [&flags[..], &[(length, "4")]].concat();
        let run = |more: &[(&str, &str)]| {
            let out = lab.path(command);
            quantune(&arguments(command, &[&flags[..], more].concat(), &out))
        };
        let sentence = error(&run(&[]));
        for words in
            [&*model, "accuracy on held-out pairs is 50.0 %, needed 60.0 %", "min_reward_accuracy"]
        {
            assert!(sentence.contains(words), "{command}: {sentence}");
        }
        assert!(!Path::new(&lab.path(command)).exists());
        last_json(&run(&[("--min-reward-accuracy", "0")]));
    }
}

type LayOut = dyn Fn(&Response) -> Batch;

fn well(response: &Response) -> Batch {
    respond::collate(&[response])
}

/// Log-probs are read one position too late.
fn shifted_by_one(response: &Response) -> Batch {
    let mut batch = well(response);
    let last = batch.tokens.len() as u32 - 1;
    for (row, _) in &mut batch.targets {
        *row = (*row + 1).min(last);
    }
    batch
}

/// Left padding that is attended to.
fn padded(response: &Response) -> Batch {
    let padding = [0, 0, 0].iter();
    let prompt = padding.chain(response.prompt.iter()).copied().collect();
    respond::collate(&[&Response { prompt, ..response.clone() }])
}

/// How an update learns from its responses.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Learns {
    Ppo,
    /// GRPO in several steps: from old log-probs.
    Grpo,
    /// The same, a response as one action.
    Rloo,
    /// GRPO in one step without a reference: no log-probs are taken before it.
    Once,
}

const ALL: [Learns; 4] = [Learns::Ppo, Learns::Grpo, Learns::Rloo, Learns::Once];

impl Learns {
    fn objective(self, row: &Experience, counts: ppo::MiniBatchCounts) -> Objective {
        if self == Self::Ppo {
            return ppo::objective(Some(ppo::policy_part(&[row], counts, 0.2)), None);
        }
        let (tokens, by_response) = (row.old_logps.len(), self == Self::Rloo);
        let actions = if by_response { 1 } else { tokens };
        Objective::Grpo(Box::new(Grpo {
            settings: GrpoSettings { epsilon: 0.2, epsilon_high: 0.2, beta: 0.0 },
            tokens: vec![tokens],
            old_logps: (self != Self::Once).then(|| row.old_logps.clone()),
            ref_logps: None,
            advantages: vec![1.0; actions],
            weights: vec![1.0; actions],
            by_response,
        }))
    }
}

/// A policy and its reference, responses of the policy, and how they are learned from.
struct Patient {
    decoder: Decoder,
    policy: Arc<Adapter>,
    responses: Vec<Response>,
    /// Correct log-probs of policy and reference.
    old: Vec<Vec<f32>>,
    reference: Vec<Vec<f32>>,
}

const TEMPERATURE: f64 = 0.7;

impl Patient {
    fn new(compute: Compute, top_k: usize) -> Self {
        let decoder = load("llama-tiny", compute);
        let policy = Self::adapter(&decoder, "ppo/policy/initial");
        let mut stream = Stream::new(3, "prompts", &[]);
        let mut prompt = |length: usize| -> Arc<[u32]> {
            (0..length).map(|_| 3 + (stream.uniform_f64() * 500.0) as u32).collect()
        };
        let prompts: Vec<Arc<[u32]>> = (0..16).map(|i| prompt(2 + i % 5)).collect();
        let settings = Settings {
            sampling: Sampling { temperature: TEMPERATURE, top_k, seed: 1, ..Sampling::default() },
            max_tokens: 12,
            cache: CacheType::F16,
            logprobs: None,
            sampled_logps: true,
            slots: 4,
        };
        let active = [ActiveAdapter::frozen(policy.clone())];
        let is_end = |token| token == 2;
        let responses =
            respond::respond(&decoder, &active, &prompts, 1, &settings, &is_end, 0).unwrap();
        let of = |active: &[ActiveAdapter]| {
            respond::log_probs(&decoder, active, &responses, TEMPERATURE)
        };
        let (old, reference) = (of(&active).unwrap(), of(&[]).unwrap());
        Self { decoder, policy, responses, old, reference }
    }

    fn adapter(decoder: &Decoder, path: &str) -> Arc<Adapter> {
        let (folder, linears) = (golden(&format!("rl/{path}")), decoder.linears());
        let read = format::read_folder(&folder, "default", &linears, Some("lm_head"), &Device::Cpu);
        Arc::new(read.unwrap().0)
    }

    /// Takes a step from these old log-probs, over most responses, collated like this and in another
    /// order; and diagnoses the update.
    fn diagnosis(&self, learns: Learns, old: &[Vec<f32>], lay_out: &LayOut) -> Diagnosis {
        let settings = AdamWSettings {
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            weight_decay: 0.0,
        };
        let adapters = vec![Arc::new(self.policy.copy("default").unwrap())];
        let mut learner = Learner::new(&self.decoder, adapters, settings, 1.0, (0.0, 0)).unwrap();
        learner.kept_layers = self.decoder.config.num_hidden_layers;
        let rows: Vec<Experience> = old
            .iter()
            .map(|old| Experience {
                old_logps: old.clone(),
                advantages: vec![1.0; old.len()],
                ..Experience::default()
            })
            .collect();
        let counts = ppo::MiniBatchCounts::of(&rows.iter().collect::<Vec<_>>());
        let order: Vec<usize> = (2..rows.len()).rev().collect();
        let parts: Vec<MicroBatch> = order
            .iter()
            .map(|&i| MicroBatch {
                batch: lay_out(&self.responses[i]),
                objective: learns.objective(&rows[i], counts),
                scale: 1.0,
                adapter: 0,
                epoch: 0,
                temperature: TEMPERATURE,
            })
            .collect();
        let logps = learner.step(&parts, 1e-3).unwrap().logps;
        let first = Some(FirstStep { responses: &order, logps: &logps });
        if learns == Learns::Once {
            return diagnose_update(&self.responses, None, first, &[]);
        }
        let kl: Vec<f64> = old
            .iter()
            .zip(&self.reference)
            .map(|(old, reference)| {
                old.iter().zip(reference).map(|(old, other)| f64::from(old - other)).sum()
            })
            .collect();
        diagnose_update(&self.responses, Some(old), first, &kl)
    }

    /// Log-probs of the responses collated like this.
    fn log_probs(&self, lay_out: &LayOut) -> Vec<Vec<f32>> {
        let active = [ActiveAdapter::frozen(self.policy.clone())];
        let of = |response: &Response| {
            target_log_probs(&self.decoder, &active, &lay_out(response), TEMPERATURE).unwrap()
        };
        self.responses.iter().map(of).collect()
    }
}

#[test]
fn a_healthy_update_is_not_diagnosed() {
    for compute in [Compute::F32, Compute::INT16, Compute::INT8] {
        let patient = Patient::new(compute, 0);
        for learns in ALL {
            let found = patient.diagnosis(learns, &patient.old, &well);
            assert!(found.is_healthy(), "{compute:?} {learns:?}: {found}");
        }
    }
}

/// Each cause is introduced into a healthy update, and must be the only one found.
#[test]
fn each_cause_of_an_unhealthy_update_is_reported() {
    let patient = Patient::new(Compute::INT16, 0);
    let check = |what: &str, found: &Diagnosis, sick: &dyn Fn(&Cause) -> bool, words: &str| {
        assert!(found.causes.len() == 1 && sick(&found.causes[0]), "{what}: {found:?}");
        assert!(found.to_string().contains(words), "{what}: {found}");
    };
    let filtered = Patient::new(Compute::INT16, 5);
    let is_filter = |cause: &Cause| matches!(cause, Cause::SamplingFilters { .. });
    for learns in ALL {
        let found = filtered.diagnosis(learns, &filtered.old, &well);
        check("top_k", &found, &is_filter, "sampling filters (top_k, top_p)");
    }

    // Scores and loss have the same wrong positions.
    let is_shift = |cause: &Cause| matches!(cause, Cause::ShiftedRows { .. });
    let layouts: [(&str, &LayOut); 2] = [("a place late", &shifted_by_one), ("padded", &padded)];
    for (what, lay_out) in layouts {
        let old = patient.log_probs(lay_out);
        for learns in ALL {
            let found = patient.diagnosis(learns, &old, lay_out);
            check(&format!("{what} {learns:?}"), &found, &is_shift, "shifted rows");
        }
        let found = patient.diagnosis(Learns::Ppo, &old, lay_out);
        assert!(found.negative_kl.is_some(), "{what}: {found:?}");
        assert!(found.to_string().starts_with("negative KL (-"), "{what}: {found}");
    }

    // Log-probs of another policy: an earlier adapter, or none.
    let is_stale = |cause: &Cause| matches!(cause, Cause::StaleLogProbs { .. });
    let other = [ActiveAdapter::frozen(Patient::adapter(&patient.decoder, "ppo/policy/final"))];
    for (what, active) in [("of another adapter", &other[..]), ("of the base", &[])] {
        let old = respond::log_probs(&patient.decoder, active, &patient.responses, TEMPERATURE);
        let old = old.unwrap();
        for learns in [Learns::Ppo, Learns::Grpo, Learns::Rloo] {
            let found = patient.diagnosis(learns, &old, &well);
            check(&format!("{what} {learns:?}"), &found, &is_stale, "stale log-probs");
        }
    }
}

/// Problems are reported once on stderr and once in the JSON; healthy updates are not.
#[test]
fn a_run_warns_of_filters_and_of_nothing_else() {
    let lab = Lab::with_comparisons();
    let (base, prompts, [reward, _]) = (base(), lab.path("prompts.jsonl"), reward_adapters());
    let ending = ending(&lab);
    let check = |name: &str, more: &[(&str, &str)], warnings: usize| {
        let flags = [
            ("--base", &*base),
            ("--data", &*prompts),
            ("--reward-adapter", &*reward),
            ("--learning-rate", "0.001"),
            ("--max-steps", "4"),
            ("--batch-size", "8"),
        ];
        let command = name.split_once(' ').unwrap().0;
        let flags = [&flags[..], more].concat();
        let output = quantune(&arguments(command, &flags, &lab.path(name)));
        let stderr = String::from_utf8_lossy(&output.stderr).to_string();
        let found = last_json(&output);
        let found = found["warnings"].as_array().unwrap();
        assert_eq!(found.len(), warnings, "{name}: {found:?}");
        assert_eq!(
            stderr.matches("warning: sampling filters").count(),
            warnings,
            "{name}: {stderr}"
        );
        for warning in found {
            assert!(warning.as_str().unwrap().starts_with("sampling filters"), "{name}: {warning}");
        }
    };
    let ppo = [("--response-length", "12"), ("--num-mini-batches", "2")];
    let grpo = [("--max-completion-length", "12"), ("--beta", "0.1"), ("--num-iterations", "2")];
    let with = |flags: &[(&'static str, &'static str)], more: &[(&'static str, &'static str)]| {
        [flags, more].concat()
    };
    check("ppo well", &ppo, 0);
    check("ppo dropout", &with(&ppo, &[("--lora-dropout", "0.2")]), 0);
    check("ppo f32", &with(&ppo, &[("--compute", "f32")]), 0);
    check("ppo ending", &[&ppo[..], &[("--adapter", &*ending)]].concat(), 0);
    check("ppo top_k", &with(&ppo, &[("--top-k", "5")]), 1);
    check("ppo top_p", &with(&ppo, &[("--top-p", "0.5")]), 1);
    check("grpo well", &grpo, 0);
    check("grpo dropout", &with(&grpo, &[("--lora-dropout", "0.2")]), 0);
    check("grpo top_k", &with(&grpo, &[("--top-k", "5")]), 1);
    let once = [("--max-completion-length", "12"), ("--mask-truncated-completions", "true")];
    check("grpo once", &[&once[..1], &[("--adapter", &*ending)]].concat(), 0);
    check("grpo masked", &[&once[..], &[("--adapter", &*ending)]].concat(), 0);
    check("grpo once dropout", &with(&once[..1], &[("--lora-dropout", "0.2")]), 0);
    check("grpo once top_k", &with(&once[..1], &[("--top-k", "5")]), 1);
}

/// Answers reach the rewarded length under every loss type.
#[test]
fn grpo_learns_what_is_rewarded() {
    let lab = Lab::with_comparisons();
    let (base, prompts, ending) = (base(), lab.path("prompts.jsonl"), ending(&lab));
    let reward_model = lab.reward_model();
    let [reward_adapter, _] = reward_adapters();
    let check = |name: &str, reward: (&str, &str), more: &[(&str, &str)], rise: f64| {
        let flags = [
            ("--base", &*base),
            ("--data", &*prompts),
            reward,
            ("--max-steps", "15"),
            ("--batch-size", "4"),
            ("--num-generations", "8"),
            ("--max-completion-length", "16"),
            ("--learning-rate", "0.002"),
            ("--threads", "1"),
        ];
        let out = lab.path(name);
        let found = run("grpo", &[&flags[..], more].concat(), &out);
        let rewards = series(&out, "reward");
        let mean = |rewards: &[f64]| rewards.iter().sum::<f64>() / rewards.len() as f64;
        let (first, last) = (mean(&rewards[..3]), mean(&rewards[12..]));
        println!("{name}: {first} to {last}");
        assert!(last > first + rise, "{name}: {rewards:?}");
        assert_eq!(found["reward_first"].as_f64().unwrap(), rewards[0], "{name}");
        assert_eq!(found["reward_last"].as_f64().unwrap(), rewards[14], "{name}");
    };
    let short = |name: &str, more: &[(&str, &str)]| {
        let more = [&[("--adapter", &*ending)], more].concat();
        check(name, ("--reward", "length:1-3"), &more, 0.1);
    };
    short("grpo", &[]);
    short("rloo", &[("--advantage", "rloo"), ("--beta", "0.01")]);
    short("dr_grpo", &[("--loss-type", "dr_grpo"), ("--scale-rewards", "none")]);
    short("masked", &[("--mask-truncated-completions", "true")]);
    short("again", &[("--num-iterations", "2"), ("--num-mini-batches", "2")]);
    check("classifier", ("--reward-model", &reward_model), &[], 1.0);
    check("adapter", ("--reward-adapter", &reward_adapter), &[], 0.1);
}

#[test]
fn ppo_learns_what_is_rewarded() {
    let lab = Lab::with_comparisons();
    let (base, prompts, [reward, _]) = (base(), lab.path("prompts.jsonl"), reward_adapters());
    let check = |name: &str, more: &[(&str, &str)]| {
        let flags = [
            ("--base", &*base),
            ("--data", &*prompts),
            ("--reward-adapter", &*reward),
            ("--max-steps", "20"),
            ("--batch-size", "16"),
            ("--response-length", "8"),
            ("--learning-rate", "0.003"),
            ("--threads", "1"),
        ];
        let out = lab.path(name);
        run("ppo", &[&flags[..], more].concat(), &out);
        let scores = series(&out, "objective/scores");
        let mean = |scores: &[f64]| scores.iter().sum::<f64>() / scores.len() as f64;
        let (first, last) = (mean(&scores[..3]), mean(&scores[17..]));
        println!("{name}: {first} to {last}");
        assert!(last > first + 0.3, "{name}: {scores:?}");
    };
    check("own", &[]);
    check("shared", &[("--value-model", "policy")]);
}

/// The loss on ptx data is part of the gradient from the first step on.
#[test]
fn ptx_rows_are_in_the_gradient() {
    let lab = Lab::with_comparisons();
    let (base, prompts, [reward, _]) = (base(), lab.path("prompts.jsonl"), reward_adapters());
    let texts = lab.path("rows.jsonl");
    let norm = |name: &str, more: &[(&str, &str)]| {
        let flags = [
            ("--base", &*base),
            ("--data", &*prompts),
            ("--reward-adapter", &*reward),
            ("--max-steps", "1"),
            ("--num-ppo-epochs", "1"),
            ("--batch-size", "8"),
            ("--response-length", "8"),
        ];
        let out = lab.path(name);
        run("ppo", &[&flags[..], more].concat(), &out);
        (series(&out, "loss")[0], series(&out, "grad_norm")[0])
    };
    let (plain, with) = (norm("plain", &[]), norm("ptx", &[("--ptx-data", &texts)]));
    let none = norm("none", &[("--ptx-data", &texts), ("--ptx-coef", "0")]);
    // A mean over tokens of about ln 512 nats.
    assert!((4.0..20.0).contains(&(with.0 - plain.0)), "{plain:?} {with:?}");
    assert!((with.1 - plain.1).abs() > 1e-3 * plain.1, "{plain:?} {with:?}");
    assert!((none.1 - plain.1).abs() < 1e-6 * plain.1, "{plain:?} {none:?}");
}

#[test]
fn every_preference_loss_decreases() {
    let lab = Lab::with_comparisons();
    let (base, pairs, labels) = (base(), lab.path("pairs.jsonl"), lab.path("labels.jsonl"));
    let held_out = lab.path("held_out_pairs.jsonl");
    for loss in ["sigmoid", "ipo", "hinge", "orpo", "simpo", "kto"] {
        let flags = [
            ("--base", &*base),
            ("--data", if loss == "kto" { &*labels } else { &*pairs }),
            ("--eval-data", &*held_out), // for kto two labelled answers a row
            ("--loss-type", loss),
            ("--num-train-epochs", "4"),
            ("--learning-rate", "0.003"),
            ("--threads", "1"),
        ];
        let out = lab.path(loss);
        let found = run("dpo", &flags, &out);
        let (first, last) =
            (found["loss_first"].as_f64().unwrap(), found["loss_last"].as_f64().unwrap());
        assert!(last < 0.9 * first, "{loss}: {first} to {last}");
        let margins = series(&out, "rewards/margins");
        assert!(margins.last() > margins.first(), "{loss}: {margins:?}");
        let losses = series(&out, "eval_loss");
        assert_eq!(losses.len(), 5, "{loss}");
        if loss != "kto" {
            assert!(losses[4] < losses[0], "{loss}: {losses:?}"); // its labels are no preference
        }
        let cached = Path::new(&out).join("reference.safetensors").exists();
        assert_eq!(cached, !["orpo", "simpo"].contains(&loss), "{loss}");
    }
}
