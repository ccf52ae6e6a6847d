//! Dry runs, recipes, completions, memory budgets and early stopping.

use std::fs;
use std::path::{Path, PathBuf};

use quantune::train::settings::{PretrainSettings, Task};
use quantune::train::{Command, RunSettings};
use serde_json::Value;

use crate::binary::{Lab, base, error, last_json, quantune, reward_adapters, strings, tree, walk};

/// The flags of a command in addition to the common ones, with data of a lab.
fn needs(lab: &Lab, command: &str) -> Vec<String> {
    let [reward, _] = reward_adapters();
    let base = ["--base".to_string(), base()];
    let own: Vec<String> = match command {
        "sft" => vec!["--data".into(), lab.path("rows.jsonl")],
        "reward" | "dpo" => vec!["--data".into(), lab.path("pairs.jsonl")],
        "ppo" => {
            vec!["--data".into(), lab.path("prompts.jsonl"), "--reward-adapter".into(), reward]
        }
        "grpo" => {
            let reward = ["--reward", "length:20:characters"].map(String::from);
            [vec!["--data".into(), lab.path("prompts.jsonl")], reward.to_vec()].concat()
        }
        other => panic!("{other}"),
    };
    [&base[..], &own].concat()
}

/// Sizes that keep replies of the tiny models short.
fn short(command: &str) -> Vec<String> {
    strings(match command {
        "ppo" => &["--batch-size", "8", "--response-length", "8"],
        "grpo" => &["--batch-size", "4", "--max-completion-length", "8"],
        _ => &[],
    })
}

/// A dry run of every command prints the plan and writes nothing, and the run then matches it.
#[test]
fn a_dry_run_prints_the_plan_and_writes_nothing() {
    let lab = Lab::with_comparisons();
    let files = || {
        let mut files = Vec::new();
        walk(lab.folder.path(), &mut files);
        files.sort();
        files
    };
    let before = files();
    for command in ["sft", "reward", "dpo", "ppo", "grpo"] {
        let out = lab.path(command);
        let mut args = strings(&[command, "--out", &out, "--threads", "1"]);
        args.extend([needs(&lab, command), short(command)].concat());
        if command == "sft" {
            args.extend(strings(&["--cache-from", "1"])); // would be kept on disk
        } else {
            args.extend(strings(&["--max-steps", "3"]));
        }
        let dry = |more: &[&str]| quantune(&[&args[..], &strings(more)].concat());
        let told = last_json(&dry(&["--dry-run", "--json"]));
        let shown = String::from_utf8(dry(&["--dry-run"]).stdout).unwrap();
        assert!(shown.ends_with("dry run: nothing was written\n"), "{shown}");
        assert_eq!(files(), before, "{command}");
        assert_eq!(dry(&["--dry-run", "--resume"]).status.code(), Some(2));

        let number = |key: &str| told[key].as_f64().unwrap_or_else(|| panic!("{key}: {told}"));
        let parts = told["memory"].as_object().unwrap().values();
        let sum: f64 = parts.map(|bytes| bytes.as_f64().unwrap()).sum();
        assert!(sum > 0.0 && number("predicted_peak_rss_bytes") >= sum, "{told}");
        assert!(number("predicted_seconds") >= number("reference_seconds"), "{told}");
        assert_eq!(number("reference_seconds") > 0.0, command == "dpo", "{told}");
        assert_eq!(told["time_depends_on_replies"], ["ppo", "grpo"].contains(&command));
        assert_eq!(told["tokens_per_epoch"].is_null(), ["ppo", "grpo"].contains(&command));
        for line in ["trainable parameters", "steps,", "predicted peak memory", "kept tapes"] {
            assert!(shown.contains(line), "{command}: {shown}");
        }

        let done = last_json(&dry(&["--json"]));
        for key in ["trainable_parameters", "steps", "recomputed_layers"] {
            assert_eq!(told[key], done[key], "{command}: {key}");
        }
        assert!(done["predicted_peak_rss_bytes"].as_u64() > Some(0), "{done}");
        assert!(error(&dry(&["--dry-run"])).contains("contains a run already"));
        fs::remove_dir_all(&out).unwrap();
        // Rejected after reading rows: the cache is removed too.
        let refused = error(&dry(&["--dry-run", "--memory-budget", "1MB"]));
        assert!(refused.contains("which is too small"), "{refused}");
        assert_eq!(files(), before, "{command}, refused");
    }
}

/// A budget between the memory with all tapes and with none is met by recomputing layers; a smaller one is an
/// error that says what is needed, before anything is written.
#[test]
fn a_memory_budget_is_kept_or_refused() {
    let lab = Lab::new();
    let text = |i: usize| format!("{{\"text\": \"{}\"}}\n", "so it goes on ".repeat(300 + i));
    lab.write("texts.jsonl", &(0..8).map(text).collect::<String>());
    let out = lab.path("run");
    let run = |flags: &[&str]| {
        let mut args = strings(&["sft", "--base", &base(), "--data", &lab.path("texts.jsonl")]);
        args.extend(strings(&["--out", &out, "--max-steps", "1", "--max-length", "512"]));
        args.extend(strings(&["--per-device-train-batch-size", "64", "--json"]));
        args.extend(strings(&["--gradient-accumulation-steps", "1"]));
        quantune(&[&args[..], &strings(flags)].concat())
    };
    let bytes = |recomputed: &str| {
        let told = last_json(&run(&["--gradient-checkpointing", recomputed, "--dry-run"]));
        let parts = told["memory"].as_object().unwrap().values();
        parts.map(|bytes| bytes.as_u64().unwrap()).sum::<u64>()
    };
    let (least, most) = (bytes("true"), bytes("false"));
    for dry in [&["--dry-run"][..], &[]] {
        let refused = run(&[&["--memory-budget", "2MB"], dry].concat());
        let sentence = error(&refused);
        let needed =
            "memory_budget is 2MB, which is too small: with every layer recomputed the run takes";
        assert!(sentence.contains(needed) && sentence.contains("8192 tokens"), "{sentence}");
        assert!(!Path::new(&out).exists());
    }
    assert!(most > least + (5 << 20), "{least} {most}: too near to tell");
    let budget = ((least + most) / 2).to_string();
    let done = last_json(&run(&["--memory-budget", &budget]));
    assert!(done["recomputed_layers"].as_u64() > Some(0), "{done}");
}

/// A folder quantized on load can be trained, and its adapter gives the same loss in `eval` on the same
/// quantized base as the run has reported, but not on the unquantized base.
#[test]
fn an_adapter_of_a_folder_quantized_on_load_evaluates_the_same() {
    let lab = Lab::new();
    let (out, held_out) = (lab.path("run"), lab.path("held_out.jsonl"));
    let mut args = strings(&["sft", "--base", &base(), "--data", &lab.path("rows.jsonl")]);
    args.extend(strings(&["--load-type", "Q4_0", "--out", &out, "--max-steps", "4", "--json"]));
    args.extend(strings(&["--eval-data", &held_out, "--learning-rate", "0.005", "--r", "4"]));
    let done = last_json(&quantune(&args));
    assert!(done["loss_last"].as_f64() < done["loss_first"].as_f64(), "{done}");
    let adapter = format!("{out}/adapter");
    let scored = |flags: &[&str]| {
        let args = ["eval", "--base", &base(), "--data", &held_out, "--json"];
        let scored = last_json(&quantune(&strings(&[&args, flags].concat())));
        scored["loss"].as_f64().unwrap()
    };
    let quantized = scored(&["--adapter", &adapter, "--load-type", "Q4_0"]);
    assert_eq!(Some(quantized), done["eval_loss_last"].as_f64());
    assert_ne!(quantized, scored(&["--adapter", &adapter]));
    assert!(quantized < scored(&["--load-type", "Q4_0"]));
}

/// Errors of a run are errors of a dry run.
#[test]
fn a_dry_run_validates_the_rows() {
    let lab = Lab::new();
    lab.write("odd.jsonl", "{\"messages\": [{\"role\": \"robot\", \"content\": \"x\"}]}\n");
    let (odd, out) = (lab.path("odd.jsonl"), lab.path("run"));
    let args = ["sft", "--base", &base(), "--data", &odd, "--out", &out, "--dry-run"];
    let output = quantune(&strings(&args));
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("`messages[0].role` is \"robot\""));
    assert!(!Path::new(&out).exists());
}

/// The recipes, with their commands.
const RECIPES: &[(&str, &str)] = &[
    ("dpo.toml", "dpo"),
    ("grpo.toml", "grpo"),
    ("ppo.toml", "ppo"),
    ("pretrain.toml", "pretrain"),
    ("reward.toml", "reward"),
    ("sft-chat.toml", "sft"),
    ("sft-dora.toml", "sft"),
];

fn recipes() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/recipes")
}

#[test]
fn recipes_have_no_unknown_keys_and_no_faults() {
    let mut found: Vec<String> = fs::read_dir(recipes())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert_eq!(found, RECIPES.iter().map(|(file, _)| *file).collect::<Vec<_>>());
    for (file, name) in RECIPES {
        let text = fs::read_to_string(recipes().join(file)).unwrap();
        assert!(
            text.contains(&format!("quantune {name} --config scripts/recipes/{file}")),
            "{file}"
        );
        let table: toml::Table = toml::from_str(&text).unwrap();
        let Some(command) = Command::ALL.into_iter().find(|command| command.name() == *name) else {
            PretrainSettings::from_table(table).unwrap();
            continue;
        };
        let mut settings = RunSettings::from_table(command, table).unwrap();
        let common = &mut settings.common;
        (common.base, common.out) = ("base".into(), "out".into());
        common.data = vec!["data.jsonl".into()];
        match &mut settings.task {
            Task::Ppo(own) => own.reward_adapter = "reward".into(),
            Task::Grpo(own) => own.reward = vec!["numeric:answer".parse().unwrap()],
            _ => {}
        }
        assert_eq!(settings.fault(), None, "{file}");
    }
}

#[test]
fn recipes_run() {
    let lab = Lab::with_comparisons();
    for (file, command) in RECIPES {
        let recipe = recipes().join(file).display().to_string();
        let mut args = strings(&[command, "--config", &recipe, "--out", &lab.path(file), "--json"]);
        args.extend(strings(&["--max-steps", "2", "--threads", "1"]));
        if *command == "pretrain" {
            let source = format!("text=1:{}", lab.path("rows.jsonl"));
            let small = ["--preset", "micro", "--max-length", "32", "--validation-split", "0.2"];
            args.extend(strings(&["--source", &source, "--tokenizer", &base()]));
            args.extend(strings(&small));
        } else {
            args.extend([needs(&lab, command), short(command)].concat());
        }
        assert_eq!(last_json(&quantune(&args))["steps"], 2, "{file}");
    }
}

/// The completion script of each shell has all commands.
#[test]
fn completions_name_every_command() {
    let help = String::from_utf8(quantune(&strings(&["--help"])).stdout).unwrap();
    let listed = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let names: Vec<&str> =
        listed.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert!(names.contains(&"sft") && names.contains(&"completions"), "{names:?}");
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let output = quantune(&strings(&["completions", shell]));
        assert!(output.status.success(), "{shell}");
        let script = String::from_utf8(output.stdout).unwrap();
        for name in names.iter().chain(&["--dry-run", "--gradient-checkpointing"]) {
            assert!(script.contains(name.trim_start_matches('-')), "{shell}: no {name}");
        }
        let json = last_json(&quantune(&strings(&["completions", shell, "--json"])));
        assert_eq!(json["script"].as_str().unwrap().trim_end(), script.trim_end());
    }
    assert_eq!(quantune(&strings(&["completions", "command.com"])).status.code(), Some(2));
}

/// An sft run with a learning rate so high that it soon stops improving.
fn overheated(lab: &Lab, out: &str, more: &[&str]) -> Vec<String> {
    let mut args = strings(&["sft", "--base", &base(), "--data", &lab.path("rows.jsonl")]);
    args.extend(strings(&["--eval-data", &lab.path("held_out.jsonl"), "--out", out, "--json"]));
    args.extend(strings(&["--eval-strategy", "steps", "--eval-steps", "1", "--max-steps", "8"]));
    args.extend(strings(&["--learning-rate", "1.0", "--r", "2", "--save-steps", "1"]));
    args.extend(strings(&["--threads", "1", "--max-length", "96"]));
    args.extend(strings(more));
    args
}

/// Early stopping ends a run at the same step with the same bytes, wherever it was resumed.
#[test]
fn early_stopping_resumes_to_the_same_bytes() {
    let lab = Lab::new();
    let out = lab.path("run");
    let flags = ["--early-stopping-patience", "2", "--save-total-limit", "0"];
    let whole = last_json(&quantune(&overheated(&lab, &out, &flags)));
    let steps = whole["steps"].as_u64().unwrap();
    assert!((3..8).contains(&steps), "{whole}");
    assert_eq!(whole["best_step"], steps - 2);
    let before = tree(&out);
    for step in 1..steps {
        fs::remove_dir_all(Path::new(&out).join("adapter")).unwrap();
        for later in step + 1..=steps {
            fs::remove_dir_all(Path::new(&out).join(format!("checkpoints/step-{later}"))).unwrap();
        }
        let resumed = last_json(&quantune(&strings(&["sft", "--out", &out, "--resume", "--json"])));
        assert_eq!(resumed["resumed_at"], step);
        assert!(tree(&out) == before, "from step {step}");
    }
}

/// The best checkpoint is not deleted by the rotation, and its adapter is the result of the run. If the
/// highest loss is the best, it is among the first; if the lowest is, it can be any.
#[test]
fn the_best_checkpoint_is_kept_and_loaded() {
    for greater in [true, false] {
        let lab = Lab::new();
        let out = lab.path("run");
        let greater_flag = greater.to_string();
        let mut flags = vec!["--load-best-model-at-end", "true", "--save-total-limit", "1"];
        if greater {
            flags.extend(["--greater-is-better", &greater_flag]);
        }
        let done = last_json(&quantune(&overheated(&lab, &out, &flags)));
        let best = done["best_step"].as_u64().unwrap();
        assert!((best < 8 || !greater) && done["steps"] == 8, "{done}");
        let evaluated: Vec<f64> = fs::read_to_string(Path::new(&out).join("metrics.jsonl"))
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap())
            .filter(|line| line["step"] != 0)
            .filter_map(|line| line.get("eval_loss")?.as_f64())
            .collect();
        let sign = if greater { 1.0 } else { -1.0 };
        let most = evaluated.iter().map(|loss| sign * loss).fold(f64::NEG_INFINITY, f64::max);
        assert_eq!(done["best_metric"].as_f64(), Some(sign * most));
        assert_eq!(evaluated[best as usize - 1], sign * most);
        let weights = |folder: &str| {
            fs::read(Path::new(&out).join(folder).join("adapter_model.safetensors")).unwrap()
        };
        assert!(weights("adapter") == weights(&format!("checkpoints/step-{best}")));
        if best < 8 {
            assert!(weights("adapter") != weights("checkpoints/step-8"));
        }
        let kept = fs::read_dir(Path::new(&out).join("checkpoints")).unwrap().count();
        assert_eq!(kept, 2); // the best, and the last of the others
    }
}
