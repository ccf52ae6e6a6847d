//! The command line: every flag has an effect, invalid input ends in one error, and a killed run resumes to
//! the same bytes.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use quantune::weights::{OwnedValue, write_gguf};
use quantune_adapters::rng::Stream;
use serde_json::Value;

use crate::binary::{
    Lab, adapter, base, common_rows, error, every_flag, interrupt, kill, last_json, quantune,
    reward_adapters, strings, walk,
};
use crate::support::{golden, model_path};

#[test]
fn every_flag_of_sft_changes_something() {
    let lab = Lab::new();
    let (rows, held_out, settings) =
        (lab.path("rows.jsonl"), lab.path("held_out.jsonl"), lab.path("settings.toml"));
    let (base, adapter, dated) = (base(), adapter(), lab.dated_base());
    let alpaca = lab.path("alpaca.jsonl");
    let base_args: &[(&str, &str)] = &[
        ("--base", &base),
        ("--data", &rows),
        ("--out", "OUT"),
        ("--max-steps", "3"),
        ("--max-length", "128"),
        ("--threads", "1"),
        ("--json", ""),
    ];
    let other_base = model_path("qwen2-tiny").display().to_string();
    let mut table = common_rows(&held_out, ("tokens", "true"), &settings, &adapter, &dated);
    table.extend([
        vec![("--base", &*other_base)],
        vec![("--max-length", "48")],
        vec![("--gradient-accumulation-steps", "2")],
        vec![("--packing", "false")],
        vec![("--neftune-noise-alpha", "10")],
        vec![("--data", &*alpaca), ("--alpaca-prompt", "text")],
    ]);
    // resume_continues_with_the_next_step, failed_checks_stop_a_run_unless_allowed
    let tested_apart =
        &["--resume", "--allow", "--loftq-base", "--dry-run", "--device", "--memory-budget"];
    every_flag(&["sft"], base_args, &table, tested_apart, &lab);
}

#[test]
fn every_flag_of_data_changes_something() {
    let lab = Lab::new();
    let (rows, held_out, alpaca) =
        (lab.path("rows.jsonl"), lab.path("held_out.jsonl"), lab.path("alpaca.jsonl"));
    let (base, dated) = (base(), lab.dated_base());
    let other_base = model_path("qwen2-tiny").display().to_string();
    let shout = lab.path("shout.jinja");
    let base_args: &[(&str, &str)] =
        &[("--base", &base), ("--data", &rows), ("--threads", "1"), ("--json", "")];
    let table: &[&[(&str, &str)]] = &[
        &[("--base", &other_base)],
        &[("--data", &held_out)],
        &[("--eval-data", &held_out)],
        &[("--max-length", "32")],
        &[("--data", &alpaca), ("--alpaca-prompt", "text")],
        &[("--chat-template", &shout)],
        &[("--base", &dated), ("--chat-template-kwargs", "mood=\"glad\"")],
        &[("--base", &dated), ("--template-date", "2020-01-01")],
        &[("--add-tokens", "question")],
        &[("--add-special-tokens", "answer,words")],
        &[("--threads", "2")],
        &[("--json", "-")],
    ];
    // failed_checks_stop_a_run_unless_allowed, masks_are_shown_in_brackets_or_colours
    every_flag(&["data"], base_args, table, &["--allow", "--show-masks"], &lab);
}

/// Token ids after the base's vocabulary are valid if training would add these tokens.
#[test]
fn data_accepts_tokens_that_training_adds() {
    let lab = Lab::new();
    lab.write("ids.jsonl", r#"{"input_ids": [5, 512, 513]}"#);
    let look = |named: &[&str]| {
        let args = ["data", "--base", &base(), "--data", &lab.path("ids.jsonl")];
        quantune(&strings(&[&args, named].concat()))
    };
    assert!(error(&look(&[])).contains("512"));
    assert!(error(&look(&["--add-tokens", "ferry"])).contains("513"));
    let both = look(&["--add-tokens", "ferry", "--add-special-tokens", "<|tool|>"]);
    assert!(both.status.success(), "{}", String::from_utf8_lossy(&both.stderr));
}

#[test]
fn masks_are_shown_in_brackets_or_colours() {
    let lab = Lab::new();
    let args = strings(&["data", "--base", &base(), "--data", &lab.path("rows.jsonl")]);
    let shown = quantune(&[args, strings(&["--show-masks", "2"])].concat());
    let shown = String::from_utf8(shown.stdout).unwrap();
    let learned: Vec<&str> =
        shown.split("[[").skip(1).filter_map(|rest| Some(rest.split_once("]]")?.0)).collect();
    assert_eq!(learned, ["answer 0<|im_end|>", "answer 1<|im_end|>"], "{shown}");
    assert!(shown.contains("rows.jsonl:2:\n"), "{shown}");
}

/// Prompts are validated as in `ppo` and `grpo`, and the start of the reply is shown.
#[test]
fn data_validates_prompts() {
    let lab = Lab::new();
    let long = "word ".repeat(200);
    let rows = [
        r#"{"prompt": "The river", "answer": "is long"}"#.to_string(),
        r#"{"prompt": [{"role": "user", "content": "Why?"}]}"#.into(),
        r#"{"prompt": "the  RIVER"}"#.into(),
        format!(r#"{{"prompt": "{long}"}}"#),
        r#"{"prompt": [{"role": "alien", "content": "Why?"}]}"#.into(),
        r#"{"prompt": ""}"#.into(),
    ];
    lab.write("asked.jsonl", &rows.join("\n"));
    let data = lab.path("asked.jsonl");
    let look = |flags: &[&str]| {
        let args = ["data", "--base", &base(), "--data", &data, "--max-length", "100"];
        quantune(&strings(&[&args, flags].concat()))
    };
    let found = look(&["--json"]);
    assert_eq!(found.status.code(), Some(1));
    let stdout = String::from_utf8(found.stdout).unwrap();
    let value: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    let file = &value["files"][0];
    assert_eq!((&file["dialect"], &file["rows"]), (&Value::from("prompt"), &Value::from(6)));
    let report = &file["report"];
    assert_eq!((&report["prompts"], &report["conversations"]), (&Value::from(3), &Value::from(1)));
    let lines = |check: &str| {
        let first = file["findings"][check]["first"].as_array().unwrap();
        first.iter().map(|line| line[0].as_u64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(lines("wrong-rows"), [4, 6]); // too long, and empty
    assert_eq!(lines("unknown-roles"), [5]);
    assert_eq!(lines("duplicates"), [3]);

    let shown = look(&["--allow", "wrong-rows,unknown-roles,duplicates", "--show-masks", "2"]);
    assert!(shown.status.success(), "{shown:?}");
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains(":1:\nThe river[[…]]\n"), "{shown}");
    assert!(shown.contains("<|im_start|>assistant\n[[…]]\n"), "{shown}");
    assert!(shown.contains("3 prompts, 1 of them conversations"), "{shown}");
}

/// A run stops before anything is written, and reports each row with its file and line; `--allow` ignores them.
#[test]
fn failed_checks_stop_a_run_unless_allowed() {
    let lab = Lab::new();
    let row = |roles: &[&str]| {
        let message =
            |role: &&str| serde_json::json!({"role": role, "content": format!("a {role}")});
        format!(
            "{}\n",
            serde_json::json!({ "messages": roles.iter().map(message).collect::<Vec<_>>() })
        )
    };
    let good = row(&["user", "assistant"]);
    let odd = [row(&["user", "assistant", "user"]), row(&["user"]), row(&["user", "robot"])];
    lab.write("odd.jsonl", &(good.clone() + &odd.concat() + "\n{\"text\": \"other\"}\n" + &good));
    let odd = lab.path("odd.jsonl");
    let out = lab.path("run");
    let run = |allow: &str| {
        let mut args = strings(&["sft", "--base", &base(), "--data", &odd, "--out", &out]);
        args.extend(strings(&["--max-steps", "1", "--allow", allow, "--json"]));
        quantune(&args)
    };
    let told = |output: &std::process::Output| String::from_utf8(output.stderr.clone()).unwrap();
    let at = |line: u64, words: &str| format!("{odd}:{line}: {words}");
    let role = at(4, "`messages[1].role` is \"robot\", needs one of system");
    let refused = run("duplicates");
    assert!(told(&refused).contains(&role) && refused.status.code() == Some(1), "{refused:?}");
    let refused = run("unknown-roles");
    let words = told(&refused);
    for needed in [
        at(2, "message 2 is the user's and the last: it has no answer"),
        at(3, "has no learned token"),
        at(6, "is a row of `text`, the file began with `messages`"),
    ] {
        assert!(words.contains(&needed), "{words} says nothing of {needed}");
    }
    assert!(words.contains("warning: duplicates: 1 of 6 rows, first"), "{words}");
    assert_eq!(refused.status.code(), Some(1));
    assert!(!Path::new(&out).exists());
    let all = "unknown-roles,trailing-user,nothing-to-learn,mixed-dialects,duplicates";
    let done = run(all);
    assert!(!told(&done).contains("warning"), "{done:?}");
    assert_eq!(last_json(&done)["data"]["rows"], 5);

    let look = |allow: &str| {
        let args =
            strings(&["data", "--base", &base(), "--data", &odd, "--json", "--allow", allow]);
        quantune(&args)
    };
    let found = look("duplicates");
    assert_eq!(found.status.code(), Some(1));
    let stdout = String::from_utf8(found.stdout).unwrap();
    let value: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    let findings = value["files"][0]["findings"].as_object().unwrap();
    let names: Vec<&String> = findings.keys().collect();
    let needed =
        ["unknown-roles", "mixed-dialects", "nothing-to-learn", "trailing-user", "duplicates"];
    assert_eq!(names, needed);
    assert_eq!(findings["unknown-roles"]["first"][0][0], 4);
    assert_eq!(last_json(&look(all))["defects"], 0);
}

/// Two files, one of them with weight 0.5, with tokens cached on disk: interrupted after any step and resumed,
/// a run has the same bytes as with tokens in memory.
#[test]
fn a_mixture_resumes_to_the_same_bytes_from_memory_and_disk() {
    let lab = Lab::new();
    let text =
        |i: usize| format!("{{\"text\": \"{}\"}}\n", format!("text {i} goes. ").repeat(1 + i % 9));
    lab.write("texts.jsonl", &(0..30).map(text).collect::<String>());
    let run = |out: &str, cache_from: &str, epochs: &str| {
        let texts = format!("{}=0.5", lab.path("texts.jsonl"));
        let mut args = strings(&["sft", "--base", &base(), "--data", &lab.path("rows.jsonl")]);
        args.extend(strings(&["--data", &texts, "--out", &lab.path(out), "--r", "2", "--json"]));
        args.extend(strings(&[
            "--num-train-epochs",
            epochs,
            "--max-length",
            "48",
            "--threads",
            "1",
        ]));
        args.extend(strings(&["--save-steps", "1", "--save-total-limit", "0"]));
        args.extend(strings(&["--cache-from", cache_from, "--lora-dropout", "0.1"]));
        args.extend(strings(&["--cache", &lab.path("cache")]));
        last_json(&quantune(&args))
    };
    let whole = run("whole", "1GB", "3");
    let on_disk = run("on_disk", "1", "3");
    assert_eq!(on_disk["loss_last"], whole["loss_last"]);
    let folders = |path: &str| {
        let entries = fs::read_dir(lab.path(path)).unwrap();
        entries.filter(|entry| entry.as_ref().unwrap().path().is_dir()).count()
    };
    assert_eq!(folders("cache"), 2);
    let weights = |out: &str| {
        fs::read(Path::new(&lab.path(out)).join("adapter/adapter_model.safetensors")).unwrap()
    };
    assert!(weights("whole") == weights("on_disk"));
    let steps = whole["steps"].as_u64().unwrap();
    for step in [1, steps / 2, steps - 1] {
        for later in step + 1..=steps {
            let _ = fs::remove_dir_all(format!("{}/checkpoints/step-{later}", lab.path("on_disk")));
        }
        let resumed =
            quantune(&strings(&["sft", "--out", &lab.path("on_disk"), "--resume", "--json"]));
        assert_eq!(last_json(&resumed)["resumed_at"], step);
        assert!(weights("whole") == weights("on_disk"), "from step {step}");
    }
    assert_eq!(folders("cache"), 2, "tokenized once");
}

/// A run whose last checkpoint is step 2 continues with steps 3 and 4, to the same bytes; here with split
/// texts and dropout, whose random numbers are keyed by row and position.
#[test]
fn resume_continues_with_the_next_step() {
    let lab = Lab::new();
    let text =
        |i: usize| format!("{{\"text\": \"{}\"}}\n", format!("text {i} goes on. ").repeat(20 + i));
    lab.write("texts.jsonl", &(0..12).map(text).collect::<String>());
    let out = lab.path("run");
    let mut fresh = strings(&["sft", "--base", &base(), "--data", &lab.path("texts.jsonl")]);
    fresh.extend(strings(&["--out", &out, "--max-steps", "4", "--max-length", "48", "--json"]));
    fresh.extend(strings(&["--save-steps", "1", "--save-total-limit", "0", "--r", "2"]));
    fresh.extend(strings(&["--lora-dropout", "0.2", "--learning-rate", "1e-3"]));
    let whole = last_json(&quantune(&fresh));
    assert_eq!(whole["data"]["split"], 12);
    assert!(whole["data"]["pieces"].as_u64().unwrap() > 24, "{whole}");
    assert!(whole["resumed_at"].is_null());
    let files = || {
        let mut files = Vec::new();
        walk(Path::new(&out), &mut files);
        files.retain(|file| !file.components().any(|part| part.as_os_str() == "tensorboard"));
        files.sort();
        files.into_iter().map(|file| (fs::read(&file).unwrap(), file)).collect::<Vec<_>>()
    };
    let before = files();
    for gone in ["adapter", "checkpoints/step-3", "checkpoints/step-4"] {
        fs::remove_dir_all(Path::new(&out).join(gone)).unwrap();
    }
    let resumed = quantune(&strings(&["sft", "--out", &out, "--resume", "--json"]));
    let stderr = String::from_utf8_lossy(&resumed.stderr).into_owned();
    assert!(stderr.contains("4 steps from step 2"), "{stderr}");
    let resumed = last_json(&resumed);
    assert_eq!((&resumed["resumed_at"], &resumed["steps"]), (&Value::from(2), &Value::from(4)));
    assert_eq!(resumed["loss_last"], whole["loss_last"]);
    assert!(files() == before);
}

/// Every token of a long text is scored, for any number of pieces.
#[test]
fn a_long_text_is_scored_whole() {
    let lab = Lab::new();
    lab.write("long.jsonl", &format!("{{\"text\": \"{}\"}}", "it goes on and on. ".repeat(6)));
    let scored = |max_length: &str| {
        let (base, data) = (base(), lab.path("long.jsonl"));
        let flags = ["--data", &data, "--max-length", max_length, "--json"];
        last_json(&quantune(&strings(&[&["eval", "--base", &base], &flags[..]].concat())))
    };
    let (whole, split) = (scored("1000"), scored("16"));
    for key in ["tokens", "rows"] {
        assert_eq!(split[key], whole[key], "{key}");
    }
    assert_ne!(split["loss"], whole["loss"]);
    assert_eq!(
        (&split["data"]["split"], &whole["data"]["split"]),
        (&Value::from(1), &Value::from(0))
    );
}

#[test]
fn every_flag_of_eval_changes_something() {
    let lab = Lab::with_comparisons();
    let (rows, held_out) = (lab.path("rows.jsonl"), lab.path("held_out.jsonl"));
    let (base, adapter, dated) = (base(), adapter(), lab.dated_base());
    let base_args: &[(&str, &str)] =
        &[("--base", &base), ("--data", &rows), ("--threads", "1"), ("--json", "")];
    let other_base = model_path("qwen2-tiny").display().to_string();
    let [reward, other_reward] = reward_adapters();
    let prompts = lab.path("held_out_prompts.jsonl");
    let shout = lab.path("shout.jinja");
    let asked = [("--data", "-"), ("--prompts", &*prompts), ("--reward", &*reward)];
    let mut table: Vec<Vec<(&str, &str)>> = vec![
        vec![("--base", &other_base)],
        vec![("--load-type", "Q8_0")],
        vec![("--data", &held_out)],
        vec![("--threads", "2")],
        vec![("--json", "-")],
        vec![("--adapter", &adapter)],
        vec![("--max-length", "32")],
        vec![("--base", &dated), ("--template-date", "2020-01-01")],
        vec![("--base", &dated), ("--chat-template-kwargs", "mood=\"glad\"")],
        vec![("--chat-template", &*shout)],
        vec![("--compute", "portable")],
        vec![("--backend", "reference")],
    ];
    let of_replies = [
        ("--against", &*adapter),
        ("--max-tokens", "5"),
        ("--temperature", "0"),
        ("--samples", "2"),
        ("--seed", "7"),
    ];
    table.extend(of_replies.map(|flag| [&asked[..], &[flag]].concat()));
    // They exclude --data, require each other, or write a file.
    let tested_apart =
        &["--text", "--n-ctx", "--prompts", "--reward", "--scores", "--replies", "--device"];
    every_flag(&["eval"], base_args, &table, tested_apart, &lab);

    let (pairs, file) = (lab.path("pairs.jsonl"), lab.path("file.jsonl"));
    let judged = |flags: &[&str]| {
        let args = [&["eval", "--base", &*base], flags, &["--json"]].concat();
        last_json(&quantune(&strings(&args)))
    };
    let lines = || -> Vec<Value> {
        let text = fs::read_to_string(&file).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let of_pairs = judged(&["--data", &pairs, "--reward", &reward, "--scores", &file]);
    assert_eq!((&of_pairs["rows"], &of_pairs["pairs"]), (&Value::from(40), &Value::from(40)));
    let is_right = |line: &&Value| {
        let score = |i: usize| line["scores"][i].as_f64().unwrap();
        score(0) > score(1)
    };
    let right = lines().iter().filter(is_right).count();
    assert_eq!(of_pairs["accuracy"].as_f64().unwrap(), right as f64 / 40.0);
    assert_ne!(judged(&["--data", &pairs, "--reward", &other_reward])["loss"], of_pairs["loss"]);
    let of_prompts = judged(&["--prompts", &prompts, "--reward", &reward, "--replies", &file]);
    let rewards: Vec<f64> = lines().iter().map(|line| line["reward"].as_f64().unwrap()).collect();
    let mean = rewards.iter().sum::<f64>() / rewards.len() as f64;
    assert_eq!(rewards.len(), 8);
    assert!((of_prompts["reward"].as_f64().unwrap() - mean).abs() < 1e-9);
    assert_ne!(judged(&["--prompts", &prompts, "--reward", "length:3"])["reward"], mean);

    lab.write("other.txt", &"another text with words in it, again and again. ".repeat(40));
    let scored = |text: &str, n_ctx: &str| {
        let (base, text) = (base.clone(), lab.path(text));
        let args = ["eval", "--base", &base, "--text", &text, "--n-ctx", n_ctx, "--json"];
        let scored = last_json(&quantune(&strings(&args)));
        (scored["loss"].as_f64().unwrap(), scored["tokens"].as_u64().unwrap())
    };
    let (loss, tokens) = scored("text.txt", "64");
    assert_ne!(scored("other.txt", "64").0, loss);
    // The second half of each chunk is scored, except its first token.
    let chunks = |scored: u64, n_ctx: u64| scored / (n_ctx / 2 - 1);
    assert_eq!(chunks(scored("text.txt", "32").1, 32) / 2, chunks(tokens, 64));
}

#[test]
fn every_flag_of_generate_changes_something() {
    let lab = Lab::new();
    let reward_adapter = golden("rl/reward/final").display().to_string();
    let reward_model = lab.reward_model();
    let (base, adapter, dated) = (base(), adapter(), lab.dated_base());
    let shout = lab.path("shout.jinja");
    let base_args: &[(&str, &str)] = &[
        ("--base", &base),
        ("--prompt", "one two three"),
        ("--max-tokens", "12"),
        ("--temperature", "3"),
        ("--top-k", "0"),
        ("--top-p", "1"),
        ("--min-p", "0"),
        ("--threads", "1"),
        ("--json", ""),
    ];
    let other_base = model_path("qwen2-tiny").display().to_string();
    let table: &[&[(&str, &str)]] = &[
        &[("--base", &other_base)],
        &[("--logprobs", "2"), ("--load-type", "Q8_0")],
        &[("--prompt", "four")],
        &[("--max-tokens", "5")],
        &[("--temperature", "0")],
        &[("--top-k", "2")],
        &[("--top-p", "0.2")],
        &[("--min-p", "0.5")],
        &[("--threads", "2")],
        &[("--json", "-")],
        &[("--adapter", &adapter)],
        &[("--system", "be brief")],
        &[("--raw", "")],
        &[("--repetition-penalty", "5")],
        &[("--seed", "1")],
        &[("--stop", "Uh")],
        &[("--logprobs", "2")],
        &[("--logprobs", "2"), ("--cache-type", "q8")],
        &[("--base", &dated), ("--template-date", "2020-01-01")],
        &[("--base", &dated), ("--chat-template-kwargs", "mood=\"glad\"")],
        &[("--chat-template", &shout)],
        &[("--compute", "portable")],
        &[("--backend", "reference")],
        &[("--best-of", "4")],
        &[("--best-of", "4"), ("--reward", "length:3:characters")],
        &[("--best-of", "4"), ("--reward-command", "while read -r l; do echo ${#l}; done")],
        &[("--best-of", "4"), ("--reward-adapter", &reward_adapter)],
        &[("--best-of", "4"), ("--reward-model", &reward_model)],
        &[("--best-of", "4"), ("--reward", "length:3"), ("--reward-weights", "-2")],
    ];
    let tested_apart = &["--reward-timeout", "--device"];
    every_flag(&["generate"], base_args, table, tested_apart, &lab);
}

/// Every command that computes rejects an unavailable device, and a backend that the device does not support.
#[test]
fn an_unavailable_device_is_an_error() {
    let lab = Lab::with_comparisons();
    let (base, rows, pairs) = (base(), lab.path("rows.jsonl"), lab.path("pairs.jsonl"));
    let (prompts, out) = (lab.path("held_out_prompts.jsonl"), lab.path("out"));
    let [reward, _] = reward_adapters();
    let mut commands: Vec<Vec<&str>> = Vec::new();
    for (command, data) in [("sft", &*rows), ("reward", &*pairs), ("dpo", &*pairs)] {
        commands.push(vec![command, "--data", data, "--out", &*out]);
    }
    let data = ["--data", &*prompts, "--out", &*out];
    commands.push([&["ppo"], &data[..], &["--reward-adapter", &*reward]].concat());
    commands.push([&["grpo"], &data[..], &["--reward", "length:3"]].concat());
    commands.push(vec!["eval", "--data", &*rows]);
    commands.push(vec!["generate", "--prompt", "one"]);
    commands.push(vec!["chat"]);
    let source = format!("rows=1:{rows}");
    commands.push(vec!["pretrain", "--source", &*source, "--max-steps", "1", "--out", &*out]);
    let refused = |args: &[&str], needed: &str| {
        let output = quantune(&strings(args));
        assert!(!output.status.success(), "{args:?}");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(told.contains(needed) && !told.contains("panicked"), "{args:?}: {told}");
        assert!(!std::path::Path::new(&out).exists(), "{args:?} left something behind");
    };
    let check = |command: &[&str], flags: &[&str], needed: &str| {
        refused(&[command, &["--base", &*base], flags].concat(), needed);
    };
    if !cfg!(feature = "cuda") {
        let needed = "`cargo build --release --features cuda`";
        refused(&["quickstart", "--out", &out, "--device", "cuda"], needed);
    }
    refused(&["quickstart", "--out", &out, "--device", "gpu"], "\"gpu\" is not a device");
    for command in &commands {
        if !cfg!(feature = "cuda") {
            let needed = "`cargo build --release --features cuda`";
            check(command, &["--device", "cuda"], needed);
            check(command, &["--device", "cuda:1", "--compute", "portable"], needed);
        }
        let needed = "compute is int16, which only the CPU has: needed portable on device metal";
        check(command, &["--device", "metal", "--compute", "int16"], needed);
        check(command, &["--device", "gpu"], "\"gpu\" is not a device, needed cpu, cuda");
    }
    // `--device cpu` is the default, with the cpu backend.
    let of = |flags: &[&str]| {
        let args = [&["eval", "--base", &*base, "--data", &*rows, "--json"], flags].concat();
        last_json(&quantune(&strings(&args)))["loss"].clone()
    };
    assert_eq!(of(&["--device", "cpu"]), of(&[]));
}

/// The best of several replies is one of them; the first is the reply without best-of.
#[test]
fn best_of_keeps_the_reply_with_the_highest_reward() {
    let (base, adapter) = (base(), golden("rl/reward/final").display().to_string());
    let hot = ["--temperature", "3", "--top-k", "0", "--top-p", "1", "--min-p", "0"];
    let run = |flags: &[&str]| -> Value {
        let args = ["generate", "--base", &base, "--prompt", "one two", "--max-tokens", "12"];
        last_json(&quantune(&strings(&[&args, &hot[..], flags, &["--json"]].concat())))
    };
    let alone = run(&[]);
    assert!(alone.get("candidates").is_none());
    let check = |flags: &[&str]| -> Vec<f64> {
        let found = run(&[&["--best-of", "40"], flags].concat());
        let candidates = found["candidates"].as_array().unwrap();
        assert_eq!(candidates.len(), 40, "{flags:?}");
        assert_eq!(candidates[0]["text"], alone["text"], "{flags:?}");
        let rewards: Vec<f64> =
            candidates.iter().map(|c| c["reward"].as_f64().unwrap_or(f64::NEG_INFINITY)).collect();
        let best = rewards.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let place = rewards.iter().position(|reward| *reward == best).unwrap();
        assert_eq!(found["best"], place, "{flags:?}");
        assert_eq!(found["text"], candidates[place]["text"], "{flags:?}");
        assert!(rewards.iter().any(|reward| *reward != rewards[0]), "{flags:?}: {rewards:?}");
        rewards
    };
    assert!(check(&[]).iter().all(|logprob| *logprob < 0.0));
    assert!(check(&["--reward", "regex:^[a-z ]"]).contains(&1.0));
    let by_adapter = check(&["--reward-adapter", &adapter]);
    // A program with no opinion on most replies, and a weight.
    let command = "i=0; while read -r l; do i=$((i+1)); \
                   case $i in *0) echo $i;; *) echo null;; esac; done";
    let by_command = check(&["--reward-command", command]);
    assert_eq!(by_command[9], 10.0);
    assert_eq!(by_command[8], f64::NEG_INFINITY);
    let both = check(&[
        "--reward-adapter",
        &adapter,
        "--reward-command",
        command,
        "--reward-weights",
        "-0.5,2",
    ]);
    assert!((both[9] - (2.0 * by_adapter[9] - 5.0)).abs() < 1e-9);
    assert!((both[8] - 2.0 * by_adapter[8]).abs() < 1e-9);
    // Text after a stop string is not scored.
    let cut = run(&["--best-of", "3", "--stop", "e", "--reward", "regex:e"]);
    assert!(cut["candidates"].as_array().unwrap().iter().all(|c| c["reward"] == 0.0));
}

#[test]
fn invalid_reward_sources_of_best_of_are_errors() {
    let (base, plain) = (base(), adapter());
    let check = |flags: &[&str], code: i32, sentence: &str| {
        let args = ["generate", "--base", &base, "--prompt", "x", "--max-tokens", "3"];
        let output = quantune(&strings(&[&args, flags].concat()));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {stderr}");
        assert!(stderr.contains(sentence), "{flags:?}: {stderr}");
        if code == 1 {
            error(&output);
        }
    };
    let two = |flags: &[&'static str]| [&["--best-of", "2"], flags].concat();
    check(&["--best-of", "0"], 1, "--best-of is 0, needed at least 1");
    check(&two(&["--temperature", "0"]), 1, "--best-of requires a --temperature above 0");
    check(&["--reward", "length:3"], 2, "--best-of");
    check(&two(&["--reward-timeout", "3"]), 2, "--reward-command");
    check(
        &two(&["--reward", "nice"]),
        1,
        "reward \"nice\" is not a known rule, needed exact:FIELD",
    );
    check(&two(&["--reward", "exact:answer"]), 1, "the row has no field \"answer\"");
    check(&two(&["--reward", "length:3", "--reward-weights", "1,2"]), 1, "2 reward weights for 1");
    check(&two(&["--reward-command", "cat"]), 1, "answered sample 1 of 2 with");
    check(&two(&["--reward-command", "exit 4"]), 1, "exited (exit status: 4) after 0 of 2 answers");
    check(&two(&["--reward-command", "yes null"]), 1, "reward");
    let slow = two(&["--reward-command", "sleep 60", "--reward-timeout", "0.2"]);
    check(&slow, 1, "has not answered sample 1 of 2 within 0.2 s");
    let never = two(&["--reward-command", "cat", "--reward-timeout", "0"]);
    check(&never, 1, "--reward-timeout is 0, needed seconds above 0");
    check(&["--best-of", "2", "--reward-adapter", &plain], 1, "without a score head");
    check(&["--best-of", "2", "--reward-model", &base], 1, "score.weight");
}

#[test]
fn every_flag_of_inspect_and_tokenizer_changes_something() {
    let lab = Lab::new();
    let gguf = model_path("llama-q8_0").display().to_string();
    let table: &[&[(&str, &str)]] = &[&[("--threads", "2")], &[("--json", "-")]];
    every_flag(&["inspect", &gguf], &[("--threads", "1"), ("--json", "")], table, &[], &lab);
    let (text, base) = (lab.path("text.txt"), base());
    lab.write("special.txt", "<|im_start|>user");
    let special = lab.path("special.txt");
    let other_base = model_path("qwen2-tiny").display().to_string();
    let base_args: &[(&str, &str)] =
        &[("--base", &base), ("--text", &text), ("--threads", "1"), ("--json", "")];
    let table: &[&[(&str, &str)]] = &[
        &[("--base", &other_base)],
        &[("--text", &special)],
        &[("--text", &special), ("--parse-special", "")],
        &[("--threads", "2")],
        &[("--json", "-")],
    ];
    every_flag(&["tokenizer", "encode"], base_args, table, &[], &lab);
}

#[test]
fn invalid_input_ends_in_one_error() {
    let lab = Lab::new();
    let rows = lab.path("rows.jsonl");
    lab.write("empty.jsonl", "\n");
    lab.write("broken.jsonl", "{\"text\": \"fine\"}\n{\"text\": \n");
    let many = "{\"text\": 1}\n{\"text\": \"fine\"}\n".repeat(9);
    lab.write("many.jsonl", &many);
    lab.write("role.jsonl", r#"{"messages": [{"role": "wizard", "content": "x"}]}"#);
    lab.write("nothing.jsonl", r#"{"messages": [{"role": "user", "content": "x"}]}"#);
    lab.write("bad.toml", "learning_rat = 1.0\n");
    lab.write("a_file", "");
    let mut truncated = fs::read(model_path("llama-q8_0")).unwrap();
    truncated.truncate(truncated.len() / 2);
    fs::write(lab.folder.path().join("truncated.gguf"), truncated).unwrap();
    let wide_adapter = golden("train/llama-q4_0/final").display().to_string();
    let out = lab.path("out");
    let base = base();
    let sft = |extra: &[(&str, &str)]| {
        let mut args: Vec<(&str, &str)> =
            vec![("--base", &base), ("--data", &rows), ("--out", &out), ("--max-steps", "1")];
        args.retain(|(flag, _)| !extra.iter().any(|(f, _)| f == flag));
        args.extend(extra);
        let flat = args.iter().flat_map(|(flag, value)| [flag.to_string(), value.to_string()]);
        let mut command = strings(&["sft"]);
        command.extend(flat.filter(|part| !part.is_empty()));
        command
    };
    let path = |name: &str| lab.path(name);
    let cases: Vec<(Vec<String>, Vec<&str>)> = vec![
        (sft(&[("--base", &path("nowhere.gguf"))]), vec!["nowhere.gguf"]),
        (sft(&[("--base", &path("a_file"))]), vec!["a_file", "GGUF"]),
        (sft(&[("--base", &path("truncated.gguf"))]), vec!["truncated.gguf"]),
        (sft(&[("--data", &path("empty.jsonl"))]), vec!["empty.jsonl", "no rows"]),
        (sft(&[("--data", &path("broken.jsonl"))]), vec!["broken.jsonl:2"]),
        (sft(&[("--data", &path("many.jsonl"))]), vec!["many.jsonl: 9 of 18 rows are invalid"]),
        (sft(&[("--data", &path("role.jsonl"))]), vec!["role.jsonl:1", "wizard"]),
        (sft(&[("--data", &path("nothing.jsonl"))]), vec!["nothing.jsonl", "nothing to learn"]),
        (sft(&[("--out", &path("a_file/run"))]), vec!["a_file"]),
        (sft(&[("--adapter", &wide_adapter)]), vec!["adapter_model.safetensors"]),
        (sft(&[("--config", &path("bad.toml"))]), vec!["bad.toml", "learning_rat"]),
        (sft(&[("--save-steps", "0")]), vec!["save_steps"]),
        (sft(&[("--lora-dropout", "1")]), vec!["lora_dropout is 1"]),
        (
            sft(&[("--adapter", &wide_adapter), ("--r", "4")]),
            vec!["r cannot be set with --adapter"],
        ),
        (sft(&[("--target-modules", "nothing_like_it")]), vec!["nothing_like_it", "q_proj"]),
        (sft(&[("--resume", "")]), vec!["no run to resume"]),
    ];
    for (args, words) in cases {
        let output = quantune(&args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let error = error(&output);
        for word in words {
            assert!(error.contains(word), "{args:?}: {error}");
        }
        assert!(!Path::new(&out).join("adapter").exists(), "{args:?} left an adapter");
    }
    for usage in
        [&["sft", "--no-such-flag"][..], &["sft", "--out", &out, "--data", &rows], &["eval"]]
    {
        assert_eq!(quantune(&strings(usage)).status.code(), Some(2), "{usage:?}");
    }

    // All invalid rows of a file together, the first few with their lines.
    let output = quantune(&sft(&[("--data", &path("many.jsonl"))]));
    let stderr = String::from_utf8(output.stderr).unwrap();
    for line in [1, 3, 5, 7, 9] {
        let told = format!("  {}:{line}: `text` is 1, needs a string\n", path("many.jsonl"));
        assert!(stderr.contains(&told), "{stderr}");
    }
    assert!(stderr.ends_with("  and 4 more\n") && !stderr.contains("jsonl:11"), "{stderr}");

    // An existing run is not overwritten, and is not resumed with another configuration.
    let trained = quantune(&sft(&[]));
    assert!(trained.status.success(), "{}", String::from_utf8_lossy(&trained.stderr));
    assert!(error(&quantune(&sft(&[]))).contains("--resume"));
    let changed = quantune(&sft(&[("--learning-rate", "1"), ("--resume", "")]));
    let sentence = error(&changed);
    assert!(sentence.contains("learning_rate was") && sentence.contains("is 1"), "{sentence}");
    let elsewhere = quantune(&sft(&[("--learning-rate", "2e-4"), ("--resume", "")]));
    assert!(elsewhere.status.success(), "{}", String::from_utf8_lossy(&elsewhere.stderr));
    let occupied = lab.path("occupied");
    fs::create_dir_all(&occupied).unwrap();
    fs::write(Path::new(&occupied).join("metrics.jsonl"), "mine").unwrap();
    assert!(error(&quantune(&sft(&[("--out", &occupied)]))).contains("metrics.jsonl"));
    lab.write("rows.jsonl", r#"{"text": "other data than before, long enough"}"#);
    assert!(error(&quantune(&sft(&[("--resume", "")]))).contains("the data changed"));
}

/// Files on which gguf-rs panics, whose summary `inspect` prints: listed, with nothing on stderr.
#[test]
fn inspect_prints_nothing_if_the_other_reader_panics() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.gguf");
    let check = |words: &str| {
        let output = quantune(&strings(&["inspect", &path.display().to_string(), "--json"]));
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        let listed = last_json(&output);
        assert!(listed["summary"].is_null() && listed.to_string().contains(words), "{listed}");
    };
    let file_type = ("general.file_type".to_string(), OwnedValue::from("none"));
    write_gguf(&path, &[file_type], &[]).unwrap();
    check("general.file_type");

    // A tensor of type 40, gguf-rs's "Count".
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend([1u64, 0, 1].into_iter().flat_map(u64::to_le_bytes)); // tensors, keys, name
    bytes.extend(b"t\x01\0\0\0");
    bytes.extend(32u64.to_le_bytes());
    bytes.extend(40u32.to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(32) + 4096, 0);
    fs::write(&path, bytes).unwrap();
    check("NVFP4");
}

/// Killed 20 times, sometimes while a checkpoint is being written, and resumed: the same bytes.
#[test]
fn a_killed_run_resumes_to_the_same_bytes() {
    let lab = Lab::new();
    let start = |out: &str, resume: bool| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantune"));
        command.args(["sft", "--out", out]);
        if resume {
            // A different number of threads gives the same bits.
            command.args(["--resume", "--threads", "1"]);
        } else {
            command.args(["--base", &base(), "--data", &lab.path("rows.jsonl")]);
            command.args(["--max-steps", "12", "--save-steps", "2", "--save-total-limit", "2"]);
            command.args(["--lora-dropout", "0.1", "--max-length", "96", "--r", "4"]);
            command.args(["--gradient-accumulation-steps", "4", "--learning-rate", "1e-3"]);
            command.args(["--eval-strategy", "steps", "--eval-steps", "5", "--threads", "2"]);
        }
        command.stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
    };
    let whole = lab.path("whole");
    let began = Instant::now();
    assert!(start(&whole, false).wait().unwrap().success());
    let duration = began.elapsed();
    let bytes = |out: &str, file: &str| fs::read(Path::new(out).join(file)).unwrap();
    let files = [
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "checkpoints/step-12/optimizer.safetensors",
        "checkpoints/step-12/state.json",
        "metrics.jsonl",
    ];
    let mut random = Stream::new(5, "kill", &[]);
    let mut inside = 0;
    let has_partial = |out: &str| {
        let entries = fs::read_dir(Path::new(out).join("checkpoints"));
        entries.is_ok_and(|mut entries| {
            entries.any(|e| e.is_ok_and(|e| e.file_name().to_string_lossy().ends_with(".partial")))
        })
    };
    for trial in 0..20 {
        let out = lab.path(&format!("killed-{trial}"));
        let mut moment = duration.mul_f64(random.uniform_f64());
        // Every other trial waits until a checkpoint is being written.
        while !kill(start(&out, false), moment, || trial % 2 == 0 || has_partial(&out)) {
            fs::remove_dir_all(&out).unwrap(); // it finished before it was killed
            moment = moment.mul_f64(0.5);
        }
        inside += usize::from(has_partial(&out));
        let began_at_all = Path::new(&out).join("config.toml").exists();
        assert!(start(&out, began_at_all).wait().unwrap().success(), "trial {trial}");
        for file in files {
            assert_eq!(bytes(&out, file), bytes(&whole, file), "trial {trial}: {file}");
        }
    }
    println!("{inside} of 20 were killed inside a checkpoint");
    assert!(inside > 0);
}

/// Two processes on one run: the second one reports the first, until the first is killed.
#[cfg(unix)]
#[test]
fn a_run_directory_is_locked_by_one_process() {
    let lab = Lab::new();
    let out = lab.path("run");
    let mut fresh = strings(&["sft", "--base", &base(), "--data", &lab.path("rows.jsonl")]);
    fresh.extend(strings(&["--out", &out, "--max-steps", "20", "--r", "2"]));
    let resumed = strings(&["sft", "--out", &out, "--resume"]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantune"));
    let mut first =
        command.args(&fresh).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let metrics = Path::new(&out).join("metrics.jsonl");
    while !fs::metadata(&metrics).is_ok_and(|file| file.len() > 0) {
        std::thread::sleep(Duration::from_micros(500));
    }
    let pid = first.id().to_string();
    assert!(Command::new("kill").args(["-STOP", &pid]).status().unwrap().success());
    std::thread::sleep(Duration::from_millis(200)); // a pending write may still finish
    let before = fs::read(&metrics).unwrap();
    for args in [&fresh, &resumed] {
        let output = quantune(args);
        assert_eq!(output.status.code(), Some(1));
        let sentence = error(&output);
        assert!(
            sentence.contains(&format!("process {pid} is using this run directory")),
            "{sentence}"
        );
    }
    assert_eq!(fs::read(&metrics).unwrap(), before);

    first.kill().unwrap(); // SIGKILL: the process cannot release the lock itself
    assert!(!first.wait().unwrap().success());
    assert!(error(&quantune(&fresh)).contains("use --resume to continue it"));
    assert!(quantune(&resumed).status.success());
}

/// Ctrl-C stops after a complete step and prints how to resume, and resuming gives the same bytes.
#[cfg(unix)]
#[test]
fn an_interrupted_run_prints_how_to_resume() {
    let lab = Lab::new();
    let start = |out: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantune"));
        command.args(["sft", "--base", &base(), "--data", &lab.path("rows.jsonl"), "--out", out]);
        command.args(["--max-steps", "60", "--max-length", "96", "--learning-rate", "1e-3"]);
        command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
    };
    let (whole, stopped) = (lab.path("whole"), lab.path("stopped"));
    assert!(start(&whole).wait_with_output().unwrap().status.success());
    let metrics = Path::new(&stopped).join("metrics.jsonl");
    let output = interrupt(start(&stopped), || fs::metadata(&metrics).is_ok_and(|f| f.len() > 0));
    assert_eq!(output.status.code(), Some(1));
    let sentence = error(&output);
    assert!(sentence.contains(&format!("quantune sft --out {stopped} --resume")), "{sentence}");
    let resumed = quantune(&strings(&["sft", "--out", &stopped, "--resume", "--json"]));
    assert!(last_json(&resumed)["resumed_at"].as_u64().unwrap() >= 1);
    for file in ["adapter/adapter_model.safetensors", "metrics.jsonl"] {
        let bytes = |out: &str| fs::read(Path::new(out).join(file)).unwrap();
        assert_eq!(bytes(&stopped), bytes(&whole), "{file}");
    }
}

/// A run that waits for another one to fill the cache reports it, and can be interrupted with Ctrl-C.
#[cfg(unix)]
#[test]
fn a_run_waiting_for_the_cache_reports_it_and_can_be_interrupted() {
    let lab = Lab::new();
    let (cache, out) = (lab.path("cache"), lab.path("run"));
    fs::create_dir(&cache).unwrap();
    let lock = quantune::weights::Lock::take(&Path::new(&cache).join(".lock")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantune"));
    command.args(["sft", "--base", &base(), "--data", &lab.path("rows.jsonl"), "--out", &out]);
    command.args(["--max-steps", "2", "--cache-from", "1", "--cache", &cache]);
    let told = lab.path("stderr");
    command.stderr(fs::File::create(&told).unwrap()).stdout(Stdio::null());
    let needed = format!("waiting for process {}, which is tokenizing into", std::process::id());
    let said = || fs::read_to_string(&told).unwrap().contains(&needed);
    let output = interrupt(command.spawn().unwrap(), said);
    assert_eq!(output.status.code(), Some(1));
    let text = fs::read_to_string(&told).unwrap();
    assert!(text.contains("interrupted before the first step; nothing was written"), "{text}");
    assert_eq!(text.matches("waiting for").count(), 1, "{text}");
    assert!(!Path::new(&out).exists());
    drop(lock);
}

/// Ctrl-C while rows are read: a new run leaves no files, and a run to be resumed is unchanged.
#[cfg(unix)]
#[test]
fn an_interrupt_while_rows_are_read_leaves_no_trace() {
    use std::io::Write;

    let lab = Lab::new();
    let (data, out) = (lab.path("endless.jsonl"), lab.path("run"));
    fs::copy(lab.path("rows.jsonl"), &data).unwrap();
    let mut fresh = strings(&["sft", "--base", &base(), "--data", &data, "--out", &out]);
    fresh.extend(strings(&["--max-steps", "2"]));
    let resumed = strings(&["sft", "--out", &out, "--resume"]);
    // Reads rows from an endless pipe until interrupted.
    let interrupted = |args: &[String]| -> String {
        fs::remove_file(&data).unwrap();
        assert!(Command::new("mkfifo").arg(&data).status().unwrap().success());
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantune"));
        let child = command.args(args).stderr(Stdio::piped()).stdout(Stdio::null()).spawn();
        let pipe = data.clone();
        let (opened, is_open) = std::sync::mpsc::channel();
        let writer = std::thread::spawn(move || {
            let mut pipe = fs::File::options().write(true).open(pipe).unwrap();
            let _ = opened.send(());
            while pipe.write_all(b"{\"text\": \"one more row\"}\n").is_ok() {}
        });
        is_open.recv_timeout(Duration::from_secs(60)).expect("the rows are read");
        let output = interrupt(child.unwrap(), || true);
        writer.join().unwrap();
        assert_eq!(output.status.code(), Some(1));
        error(&output)
    };

    let sentence = interrupted(&fresh);
    assert!(
        sentence.contains("interrupted before the first step; nothing was written"),
        "{sentence}"
    );
    assert!(!Path::new(&out).exists());

    fs::remove_file(&data).unwrap();
    fs::copy(lab.path("rows.jsonl"), &data).unwrap();
    assert!(quantune(&fresh).status.success());
    fs::remove_dir_all(Path::new(&out).join("adapter")).unwrap();
    let files = || {
        let mut files = Vec::new();
        walk(Path::new(&out), &mut files);
        files.sort();
        files.into_iter().map(|file| (fs::read(&file).unwrap(), file)).collect::<Vec<_>>()
    };
    let before = files();
    let sentence = interrupted(&resumed);
    assert!(sentence.contains("the run is unchanged; resume with: quantune sft"), "{sentence}");
    assert!(files() == before);
}

/// Ctrl-C in the evaluation before the first step, after a middle step and after the last: the
/// resumed run repeats that evaluation, to the same bytes.
#[cfg(unix)]
#[test]
fn an_interrupted_evaluation_is_repeated() {
    let lab = Lab::new();
    let held_out = fs::read_to_string(lab.path("held_out.jsonl")).unwrap() + "\n";
    lab.write("long.jsonl", &held_out.repeat(300));
    let start = |out: &str, resume: bool| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantune"));
        command.args(["sft", "--out", out]);
        if resume {
            command.arg("--resume");
        } else {
            command.args(["--base", &base(), "--data", &lab.path("rows.jsonl"), "--r", "2"]);
            command.args(["--max-steps", "3", "--learning-rate", "1e-3", "--lora-dropout", "0.1"]);
            command.args(["--eval-data", &lab.path("long.jsonl")]);
            command.args(["--eval-strategy", "steps", "--eval-steps", "2"]);
        }
        command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
    };
    let (whole, stopped) = (lab.path("whole"), lab.path("stopped"));
    assert!(start(&whole, false).wait_with_output().unwrap().status.success());
    let metrics = Path::new(&stopped).join("metrics.jsonl");
    let lines = || fs::read_to_string(&metrics).unwrap_or_default();
    for step in [0, 2, 3] {
        let output = interrupt(start(&stopped, step > 0), || match step {
            0 => metrics.exists(),
            _ => lines().contains(&format!("{{\"step\":{step},\"loss\"")),
        });
        assert_eq!(output.status.code(), Some(1));
        let sentence = error(&output);
        assert!(
            sentence.contains(&format!("interrupted at step {step} of 3, checkpoint saved")),
            "{sentence}"
        );
        assert!(!lines().contains(&format!("{{\"step\":{step},\"eval_loss\"")), "{}", lines());
    }
    assert!(!Path::new(&stopped).join("adapter").exists());
    assert!(start(&stopped, true).wait_with_output().unwrap().status.success());
    let files =
        ["adapter/adapter_model.safetensors", "metrics.jsonl", "checkpoints/step-3/state.json"];
    for file in files {
        let bytes = |out: &str| fs::read(Path::new(out).join(file)).unwrap();
        assert_eq!(bytes(&stopped), bytes(&whole), "{file}");
    }
}

/// All ISA levels of this CPU, through the binary: the losses are equal, the
/// kernels are reported; f32, int16 and int8 have different losses.
#[test]
fn every_isa_level_and_precision_trains_alike() {
    let lab = Lab::new();
    let run = |level: &str, compute: &str| {
        let out = lab.folder.path().join(format!("{level}-{compute}"));
        let (out, rows) = (out.display().to_string(), lab.path("rows.jsonl"));
        let args = ["sft", "--base", &base(), "--data", &rows, "--out", &out, "--max-steps", "2"];
        let args = strings(&[&args[..], &["--compute", compute, "--json"]].concat());
        let binary = env!("CARGO_BIN_EXE_quantune");
        Command::new(binary).args(args).env("QUANTUNE_ISA", level).output().unwrap()
    };
    let available: Vec<&str> = quantune::isa::Isa::available().map(|isa| isa.name()).collect();
    let mut losses = Vec::new();
    for (compute, bound) in [("f32", 1e-4), ("int16", 1e-3), ("int8", 5e-2)] {
        let per_level: Vec<f64> = available
            .iter()
            .map(|level| {
                let json = last_json(&run(level, compute));
                let kernels = json["kernels"].to_string();
                assert!(kernels.contains(level) && kernels.contains(compute), "{kernels}");
                json["loss_last"].as_f64().unwrap()
            })
            .collect();
        for loss in &per_level {
            assert!((loss - per_level[0]).abs() < bound, "{compute}: {available:?} {per_level:?}");
        }
        losses.push(per_level[0]);
    }
    assert!(losses[0] != losses[1] && losses[1] != losses[2], "{losses:?}");
    let output = run("avx10", "f32");
    assert_eq!(output.status.code(), Some(2));
    assert!(error(&output).contains("avx10"));
}
