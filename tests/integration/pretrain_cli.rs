//! Pretraining on the command line: every flag has an effect, a killed run resumes to the same bytes, the
//! result is an ordinary base, and invalid input ends in one error.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use quantune::data::Batch;
use quantune::model::Decoder;
use quantune::model::scoring::target_log_probs;
use quantune::ops::{Compute, Segment};
use quantune::weights::Checkpoint;
use quantune_adapters::rng::Stream;
use serde_json::json;

use crate::binary::{Lab, base, error, every_flag, kill, last_json, quantune, strings};
use crate::support::{golden_json, model_path};

/// Texts of two kinds, and the tokenizer of the tiny Llama.
fn lab() -> (Lab, String) {
    let lab = Lab::new();
    let story = |i: usize| {
        format!("A story of {i} birds that sat on a wall and sang. They sang {} songs.", i * 7)
    };
    let rows = |range: std::ops::Range<usize>| {
        let row = |i: usize| format!("{}\n", json!({ "text": story(i) }));
        range.map(row).collect::<String>()
    };
    lab.write("stories.jsonl", &rows(0..60));
    let note =
        |i: usize| format!("Note {i}: {}\n<|endoftext|>\n", "to be kept in mind. ".repeat(i % 5));
    lab.write("notes.txt", &(0..60).map(note).collect::<String>());
    let chat = |i: usize| {
        let turn = |role: &str, text: String| json!({ "role": role, "content": text });
        let turns = [turn("user", format!("Bird {i}?")), turn("assistant", story(i))];
        format!("{}\n", json!({ "messages": turns }))
    };
    lab.write("chat.jsonl", &(0..60).map(chat).collect::<String>());
    (lab, model_path("llama-tiny").display().to_string())
}

#[test]
fn every_flag_of_pretrain_changes_something() {
    let (lab, tokenizer) = lab();
    let stories = format!("stories=1:{}", lab.path("stories.jsonl"));
    let notes = format!("notes=1:{}", lab.path("notes.txt"));
    let (chat, dated) = (format!("chat=1:{}", lab.path("chat.jsonl")), lab.dated_base());
    let (settings, other) = (lab.path("settings.toml"), base());
    let shape = format!("{other}/config.json");
    let mut qwen = strings(&["tokenizer", "train", "--vocab-size", "270", "--data"]);
    qwen.extend([lab.path("notes.txt"), "--out".into(), lab.path("tokenizer")]);
    assert!(quantune(&qwen).status.success());
    let other_tokenizer = lab.path("tokenizer");
    let base_args: &[(&str, &str)] = &[
        ("--source", &stories),
        ("--tokenizer", &tokenizer),
        ("--out", "OUT"),
        ("--preset", "micro"),
        ("--hidden-size", "32"),
        ("--num-hidden-layers", "2"),
        ("--num-attention-heads", "4"),
        ("--intermediate-size", "48"),
        ("--max-length", "24"),
        ("--per-device-train-batch-size", "3"),
        ("--max-steps", "3"),
        ("--validation-split", "0.2"),
        ("--sample-tokens", "4"),
        ("--learning-rate", "0.01"),
        ("--threads", "1"),
        ("--json", ""),
    ];
    let from_base: &[(&str, &str)] = &[
        ("--preset", "-"),
        ("--hidden-size", "-"),
        ("--num-hidden-layers", "-"),
        ("--num-attention-heads", "-"),
        ("--intermediate-size", "-"),
    ];
    let mut table: Vec<Vec<(&str, &str)>> = [
        &[("--source", &*notes)][..],
        &[("--tokenizer", &other_tokenizer)],
        &[("--out", "OUT/elsewhere")],
        &[("--cache", "OUT/cache")],
        &[("--source", &chat), ("--tokenizer", &dated), ("--template-date", "2020-01-01")],
        &[("--hidden-size", "40")],
        &[("--num-hidden-layers", "1")],
        &[("--num-attention-heads", "2")],
        &[("--num-key-value-heads", "2")],
        &[("--intermediate-size", "64")],
        &[("--hidden-size", "-"), ("--preset", "tiny")],
        &[("--rope-theta", "500")],
        &[("--tie-word-embeddings", "false")],
        &[("--initializer-range", "0.1")],
        &[("--max-length", "16")],
        &[("--per-device-train-batch-size", "2")],
        &[("--gradient-accumulation-steps", "2")],
        &[("--reset-attention", "")],
        &[("--max-steps", "2")],
        &[("--learning-rate", "0.02")],
        &[("--lr-scheduler-type", "constant")],
        &[("--min-lr-ratio", "0.9")],
        &[("--warmup-ratio", "0.9")],
        &[("--warmup-steps", "2")],
        &[("--lr-scheduler-type", "warmup_stable_decay"), ("--decay-ratio", "0.9")],
        &[("--weight-decay", "0.9")],
        &[("--adam-beta1", "0.5")],
        &[("--adam-beta2", "0.5")],
        &[("--adam-epsilon", "0.1")],
        &[("--max-grad-norm", "0.01")],
        &[("--validation-split", "0.4")],
        &[("--eval-rows", "1")],
        &[("--eval-steps", "1")],
        &[("--sample-steps", "2")],
        &[("--sample-prompt", "A bird")],
        &[("--sample-tokens", "7")],
        &[("--sample-temperature", "0")],
        &[("--gradient-checkpointing", "")],
        &[("--memory-budget", "1KB")],
        &[("--save-steps", "1")],
        &[("--save-steps", "1"), ("--save-total-limit", "1")],
        &[("--seed", "7")],
        &[("--compute", "int16")],
        &[("--compute", "portable")],
        &[("--backend", "reference")],
        &[("--dtype", "bf16")],
        &[("--export", "OUT/model.gguf")],
        &[("--export", "OUT/model.gguf"), ("--export-type", "Q8_0")],
        &[("--config", &settings)],
        &[("--threads", "2")],
        &[("--json", "-")],
    ]
    .iter()
    .map(|row| row.to_vec())
    .collect();
    for last in [("--base", &*other), ("--model-config", &*shape)] {
        table.push([from_base, &[last]].concat());
    }
    // Killed runs and results are tested below; devices together with those of the other commands.
    every_flag(&["pretrain"], base_args, &table, &["--resume", "--max-tokens", "--device"], &lab);
}

/// Killed 10 times and resumed, on another number of threads: the same bytes.
#[test]
fn a_killed_pretraining_resumes_to_the_same_bytes() {
    let (lab, tokenizer) = lab();
    let (stories, notes) = (lab.path("stories.jsonl"), lab.path("notes.txt"));
    let cache = lab.path("cache");
    let start = |out: &str, resume: bool| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantune"));
        command.args(["pretrain", "--out", out]);
        if resume {
            command.args(["--resume", "--threads", "1"]);
        } else {
            let sources = [format!("stories=2:{stories}"), format!("notes=1:{notes}")];
            command.arg("--source").args(sources).args(["--tokenizer", &tokenizer]);
            command.args(["--cache", &cache, "--hidden-size", "32", "--num-attention-heads", "4"]);
            command.args(["--intermediate-size", "48", "--max-length", "32", "--max-steps", "24"]);
            command.args(["--per-device-train-batch-size", "4", "--save-steps", "3"]);
            command.args(["--gradient-accumulation-steps", "2", "--validation-split", "0.2"]);
            command.args(["--eval-steps", "5", "--sample-steps", "7", "--threads", "2"]);
        }
        command.stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
    };
    let whole = lab.path("whole");
    let began = Instant::now();
    assert!(start(&whole, false).wait().unwrap().success());
    let duration = began.elapsed();
    let bytes = |out: &str, file: &str| fs::read(Path::new(out).join(file)).unwrap();
    let files = [
        "model/model.safetensors",
        "model/config.json",
        "model/tokenizer.json",
        "checkpoints/step-24/optimizer.safetensors",
        "checkpoints/step-24/state.json",
        "metrics.jsonl",
    ];
    let mut random = Stream::new(5, "kill", &[]);
    for trial in 0..10 {
        let out = lab.path(&format!("killed-{trial}"));
        let mut moment = duration.mul_f64(random.uniform_f64());
        while !kill(start(&out, false), moment, || true) {
            fs::remove_dir_all(&out).unwrap(); // it finished before it was killed
            moment = moment.mul_f64(0.5);
        }
        let began_at_all = Path::new(&out).join("config.toml").exists();
        assert!(start(&out, began_at_all).wait().unwrap().success(), "trial {trial}");
        for file in files {
            assert_eq!(bytes(&out, file), bytes(&whole, file), "trial {trial}: {file}");
        }
    }
}

/// The reference backend, whose gradients and moments are tensors, trains the same model, and resumes from
/// a checkpoint to the same bytes.
#[test]
fn pretraining_on_reference_matches_cpu_and_resumes() {
    let (lab, tokenizer) = lab();
    let stories = format!("stories=1:{}", lab.path("stories.jsonl"));
    let run = |out: &str, flags: &[&str]| {
        let mut args = strings(&["pretrain", "--out", out, "--threads", "1", "--json"]);
        args.extend(strings(flags));
        last_json(&quantune(&args))
    };
    let begin = |out: &str, compute: &str| {
        let new = ["--source", &stories, "--tokenizer", &tokenizer, "--compute", compute];
        let shape =
            ["--hidden-size", "32", "--num-attention-heads", "4", "--intermediate-size", "48"];
        let steps = ["--max-length", "32", "--max-steps", "6", "--save-steps", "3"];
        let pace = ["--learning-rate", "0.01", "--gradient-accumulation-steps", "2"];
        run(out, &[&new[..], &shape, &steps, &pace].concat())
    };
    let (fast, whole, resumed) = (lab.path("fast"), lab.path("whole"), lab.path("resumed"));
    let (fast, portable) = (begin(&fast, "f32"), begin(&whole, "portable"));
    for key in ["loss_first", "loss_last", "eval_loss_last"] {
        let (fast, portable) = (fast[key].as_f64().unwrap(), portable[key].as_f64().unwrap());
        assert!((fast - portable).abs() < 1e-3, "{key}: {portable}, fast {fast}");
    }
    assert!(portable["loss_last"].as_f64() < portable["loss_first"].as_f64());

    fs::rename(&whole, &resumed).unwrap();
    begin(&whole, "portable");
    fs::remove_dir_all(Path::new(&resumed).join("checkpoints/step-6")).unwrap();
    fs::remove_dir_all(Path::new(&resumed).join("model")).unwrap();
    assert_eq!(run(&resumed, &["--resume"])["resumed_at"], 3);
    for file in ["model/model.safetensors", "checkpoints/step-6/optimizer.safetensors"] {
        let bytes = |out: &str| fs::read(Path::new(out).join(file)).unwrap();
        assert_eq!(bytes(&resumed), bytes(&whole), "{file}");
    }
}

/// The folder and the GGUF are the same model and an ordinary base: sft and further pretraining work on
/// both.
#[test]
fn the_result_is_an_ordinary_base() {
    let (lab, tokenizer) = lab();
    let shape = ["--hidden-size", "32", "--num-attention-heads", "4", "--intermediate-size", "64"];
    is_an_ordinary_base(&lab, &tokenizer, &shape);
}

/// As above, with norms of queries and keys.
#[test]
fn the_result_in_qwen3s_shape_is_an_ordinary_base() {
    let (lab, tokenizer) = lab();
    let mut config = golden_json("model_families/qwen3/config.json");
    config["vocab_size"] = 512.into();
    lab.write("qwen3.json", &config.to_string());
    is_an_ordinary_base(&lab, &tokenizer, &["--model-config", &lab.path("qwen3.json")]);
}

fn is_an_ordinary_base(lab: &Lab, tokenizer: &str, shape: &[&str]) {
    let out = lab.path("run");
    let gguf = lab.path("model.gguf");
    let stories = format!("stories=1:{}", lab.path("stories.jsonl"));
    let mut args = strings(&["pretrain", "--source", &stories, "--tokenizer", tokenizer]);
    args.extend(strings(shape));
    args.extend(strings(&["--out", &out, "--max-length", "32", "--max-tokens", "15000"]));
    args.extend(strings(&["--learning-rate", "0.01", "--validation-split", "0.1"]));
    args.extend(strings(&["--export", &gguf, "--export-type", "F32", "--json"]));
    let done = last_json(&quantune(&args));
    let number = |key: &str| done[key].as_f64().unwrap();
    assert!(number("loss_last") < number("loss_first") - 1.0, "{done}");
    assert!(number("eval_bits_per_byte_last") < number("eval_bits_per_byte_first"), "{done}");
    assert_eq!(done["sources"][0]["rows"], 30 * 16);

    let folder = format!("{out}/model");
    let tokens: Vec<u32> = (5..25).collect();
    let batch = Batch {
        positions: (0..20).collect(),
        segments: vec![Segment::whole(0..20)],
        targets: (0..19).map(|row| (row, tokens[row as usize + 1])).collect(),
        tokens,
        ..Batch::default()
    };
    let log_probs = |path: &str| {
        let decoder = Decoder::load(&Checkpoint::open(path).unwrap(), Compute::F32).unwrap();
        target_log_probs(&decoder, &[], &batch, 1.0).unwrap()
    };
    assert_eq!(log_probs(&folder), log_probs(&gguf));

    for (i, base) in [&folder, &gguf].into_iter().enumerate() {
        let run = lab.path(&format!("sft-{i}"));
        let mut args = strings(&["sft", "--base", base, "--data", &lab.path("rows.jsonl")]);
        args.extend(strings(&["--out", &run, "--max-steps", "2", "--max-length", "32", "--json"]));
        last_json(&quantune(&args));
        let run = lab.path(&format!("continued-{i}"));
        let mut args = strings(&["pretrain", "--source", &stories, "--base", base, "--out", &run]);
        args.extend(strings(&["--max-length", "32", "--max-steps", "1", "--warmup-ratio", "0"]));
        args.extend(strings(&["--learning-rate", "1e-4", "--json"]));
        let on = last_json(&quantune(&args));
        assert!(on["loss_first"].as_f64().unwrap() < number("loss_first") - 1.0, "{on}");
    }
}

#[test]
fn invalid_input_ends_in_one_error() {
    let (lab, tokenizer) = lab();
    lab.write("empty.txt", "");
    fs::write(lab.path("latin.txt"), b"caf\xe9 au lait").unwrap();
    lab.write("broken.jsonl", "{\"text\": \"fine\"}\n{\"texts\": 3}\n");
    let out = lab.path("run");
    let check = |source: &str, more: &[&str], words: &[&str]| {
        let mut args = strings(&["pretrain", "--tokenizer", &tokenizer, "--out", &out]);
        if !source.is_empty() {
            args.extend(["--source".to_string(), source.replace("LAB", &lab.path(""))]);
        }
        let given = more.contains(&"--max-steps") || more.contains(&"--max-tokens");
        args.extend(strings(if given { &[] } else { &["--max-steps", "2"] }));
        args.extend(strings(more));
        let error = error(&quantune(&args));
        for words in words {
            assert!(error.contains(words), "{args:?}: {error}");
        }
        assert!(!Path::new(&out).join("config.toml").exists(), "{args:?} began a run");
    };
    check("", &[], &["--source is missing"]);
    check("stories", &[], &["\"stories\" is not a source, needed NAME=WEIGHT:GLOB"]);
    check("a=1:LAB/no/such*.txt", &[], &["no/such*.txt"]);
    check("a=0:LAB/notes.txt", &[], &["the weight of \"a\""]);
    check("a=1:LAB/empty.txt", &[], &["source \"a\": no text in its 1 files"]);
    check("a=1:LAB/latin.txt", &[], &["latin.txt", "byte 3"]);
    check("a=1:LAB/broken.jsonl", &[], &["broken.jsonl:2"]);
    let notes = "a=1:LAB/notes.txt";
    check(notes, &["--max-steps", "0"], &["nothing would be trained"]);
    check(notes, &["--hidden-size", "33"], &["33", "4"]);
    check(notes, &["--template-date", "2024-02-30"], &["\"2024-02-30\", needed YYYY-MM-DD"]);
    check(notes, &["--compute", "int8"], &["compute is int8"]);
    let portable = ["--compute", "portable"];
    for (flag, value) in [("--memory-budget", "1GB"), ("--gradient-checkpointing", "true")] {
        let flags = [&portable[..], &[flag, value]].concat();
        check(notes, &flags, &["only applies to backend cpu; reference keeps all activations"]);
    }
    check(notes, &["--export", "x.gguf", "--export-type", "Q9"], &["\"Q9\" is not a type"]);
    check(notes, &["--base", &base(), "--max-length", "999999"], &["max_length is 999999"]);
    check(notes, &["--base", &base(), "--hidden-size", "64"], &["cannot be set with --base"]);
    check(notes, &["--resume"], &["contains no run to resume"]);
    let taken = lab.path("run");
    fs::create_dir_all(format!("{taken}/model")).unwrap();
    fs::write(format!("{taken}/model/model.safetensors"), "x").unwrap();
    check(notes, &[], &["contains model but no run"]);
}
