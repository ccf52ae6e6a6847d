//! Helpers for tests of the binary: data of a few rows, the files that a run writes, and tests of every flag.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use quantune_adapters::rng::Stream;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{golden, model_path};

pub fn quantune(args: &[String]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_quantune")).args(args).output().unwrap()
}

pub fn strings(args: &[&str]) -> Vec<String> {
    args.iter().map(|arg| arg.to_string()).collect()
}

/// The JSON object on the last line of stdout.
pub fn last_json(output: &Output) -> Value {
    let stdout = String::from_utf8(output.stdout.clone()).unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    serde_json::from_str(stdout.lines().last().expect("a line")).unwrap()
}

/// The line of stderr that begins with `error: `.
pub fn error(output: &Output) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    errors[0].to_string()
}

/// A folder with data files of a few rows.
pub struct Lab {
    pub folder: TempDir,
}

impl Lab {
    pub fn new() -> Self {
        let lab = Self { folder: tempfile::tempdir().unwrap() };
        let alpaca = |i: usize| format!(r#"{{"instruction": "Say {i}", "output": "{i}."}}"#);
        lab.write("alpaca.jsonl", &(0..40).map(alpaca).collect::<Vec<_>>().join("\n"));
        let row = |i: usize| {
            let question = format!("question {i} about {}", "words ".repeat(i % 7));
            format!(
                r#"{{"messages": [{{"role": "user", "content": "{question}"}}, {{"role": "assistant", "content": "answer {}"}}]}}"#,
                i * i
            )
        };
        let rows = |range: std::ops::Range<usize>| range.map(row).collect::<Vec<_>>().join("\n");
        lab.write("rows.jsonl", &rows(0..40));
        lab.write("held_out.jsonl", &rows(50..55));
        lab.write("settings.toml", "seed = 5\n");
        lab.write("text.txt", &"a text with several words in it, again and again. ".repeat(40));
        lab
    }

    /// Comparisons, prompts and labelled answers, all as conversations.
    pub fn with_comparisons() -> Self {
        let lab = Self::new();
        let message = |role: &str, content: String| json!([{ "role": role, "content": content }]);
        let question =
            |i: usize| message("user", format!("question {i} {}", "of it ".repeat(i % 4)));
        let answer = |text: String| message("assistant", text);
        let pair = |i: usize| {
            let (good, bad) = (format!("good {}", i * i), format!("bad {i} of all"));
            json!({ "prompt": question(i), "chosen": answer(good), "rejected": answer(bad) })
        };
        let label = |i: usize| {
            let text = answer(format!("answer {i}"));
            json!({ "prompt": question(i), "completion": text, "label": !i.is_multiple_of(3) })
        };
        let prompt = |i: usize| json!({ "prompt": question(i), "answer": i });
        let rows = |row: &dyn Fn(usize) -> Value, range: std::ops::Range<usize>| {
            range.map(|i| format!("{}\n", row(i))).collect::<String>()
        };
        lab.write("pairs.jsonl", &rows(&pair, 0..40));
        lab.write("held_out_pairs.jsonl", &rows(&pair, 50..58));
        lab.write("labels.jsonl", &rows(&label, 0..40));
        lab.write("prompts.jsonl", &rows(&prompt, 0..40));
        lab.write("held_out_prompts.jsonl", &rows(&prompt, 50..58));
        lab
    }

    /// The tiny Llama with a date in its chat template.
    pub fn dated_base(&self) -> String {
        let folder = self.copied_base("dated");
        let template = "{{ strftime_now('%d %b %Y') }}{{ mood | default('') }}{% for m in messages %}<|im_start|>{{ m.role }}\n\
                        {{ m.content }}<|im_end|>\n{% endfor %}\
                        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
        fs::write(folder.join("chat_template.jinja"), template).unwrap();
        self.write("shout.jinja", &template.replace("m.content", "m.content | upper"));
        folder.display().to_string()
    }

    /// The tiny Llama as a sequence classifier with one label.
    pub fn reward_model(&self) -> String {
        let folder = self.copied_base("classifier");
        let path = folder.join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut stream = Stream::new(5, "score", &[]);
        let score: Vec<u8> = (0..64).flat_map(|_| stream.normal().to_le_bytes()).collect();
        let score = TensorView::new(Dtype::F32, vec![1, 64], &score).unwrap();
        let mut tensors = file.tensors();
        tensors.push(("score.weight".into(), score));
        fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
        folder.display().to_string()
    }

    /// The tiny Llama with the matrices of two layers swapped: a different base, to which its
    /// adapters can be attached.
    pub fn other_base(&self) -> String {
        let folder = self.copied_base("other");
        let path = folder.join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut tensors = file.tensors();
        for (name, _) in &mut tensors {
            *name = match name.split_once(".mlp.") {
                Some(("model.layers.0", rest)) => format!("model.layers.1.mlp.{rest}"),
                Some(("model.layers.1", rest)) => format!("model.layers.0.mlp.{rest}"),
                _ => continue,
            };
        }
        fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
        folder.display().to_string()
    }

    /// A copy of the folder of the tiny Llama.
    pub fn copied_base(&self, name: &str) -> PathBuf {
        let folder = self.folder.path().join(name);
        fs::create_dir_all(&folder).unwrap();
        for file in fs::read_dir(model_path("llama-tiny")).unwrap() {
            let file = file.unwrap().path();
            fs::copy(&file, folder.join(file.file_name().unwrap())).unwrap();
        }
        folder
    }

    pub fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.folder.path().join(name), text).unwrap();
    }
}

/// An adapter without a score head.
pub fn adapter() -> String {
    golden("train/llama-tiny/final").display().to_string()
}

/// Reward models on the tiny Llama.
pub fn reward_adapters() -> [String; 2] {
    ["reward", "reward-ranked"]
        .map(|name| golden(&format!("rl/{name}/final")).display().to_string())
}

pub fn base() -> String {
    model_path("llama-tiny").display().to_string()
}

/// Everything a run wrote that does not depend on time or path, and is not a copy of the flags.
fn traces(output: &Output, out: Option<&Path>) -> String {
    let mut traces = String::new();
    if output.status.success() {
        let stdout = String::from_utf8(output.stdout.clone()).unwrap();
        match stdout.lines().last().map(serde_json::from_str::<Value>) {
            Some(Ok(mut value)) => {
                let volatile = |key: &str| {
                    key.ends_with("_per_second")
                        || key.starts_with("share_")
                        || key.starts_with("predicted_")
                        || ["peak_rss_bytes", "adapter", "model", "export", "seconds", "tokenizer"]
                            .contains(&key)
                };
                value.as_object_mut().unwrap().retain(|key, _| !volatile(key));
                traces += &value.to_string();
            }
            _ => traces += "no JSON",
        }
    } else {
        traces += &error(output);
    }
    if let Some(out) = out {
        let mut files = Vec::new();
        walk(out, &mut files);
        files.sort();
        for file in files {
            let name = file.strip_prefix(out).unwrap().display().to_string();
            let echoes = ["config.toml", "fingerprints.json", "lock"];
            if name.starts_with("tensorboard") || echoes.contains(&&*name) {
                continue;
            }
            let bytes = fs::read(&file).unwrap();
            let sum =
                bytes.iter().fold(0u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
            traces += &format!("\n{name} {} {sum:x}", bytes.len());
        }
    }
    traces
}

pub fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for path in entries.map(|entry| entry.unwrap().path()) {
        if path.is_dir() { walk(&path, files) } else { files.push(path) }
    }
}

/// The flags in `--help` of a command.
fn flags(command: &[&str]) -> BTreeSet<String> {
    let mut args = strings(command);
    args.push("--help".into());
    let help = String::from_utf8(quantune(&args).stdout).unwrap();
    let lines = help.lines().map(str::trim_start).filter(|line| line.starts_with('-'));
    let long = lines.filter_map(|line| line.split_whitespace().find(|word| word.starts_with("--")));
    let flags = long.map(|flag| flag.trim_end_matches(',').to_string());
    flags.filter(|flag| flag != "--help").collect()
}

/// Runs `command` with and without each row of `table` (which replaces flags of the same name) and
/// requires different output and no error. Every flag of `--help` must be the last of a row
/// or among those `tested_apart`.
pub fn every_flag<'a>(
    command: &[&str],
    base: &[(&str, &str)],
    table: &[impl AsRef<[(&'a str, &'a str)]>],
    tested_apart: &[&str],
    lab: &Lab,
) {
    let run = |row: &[(&str, &str)], number: usize| -> String {
        let out = lab.folder.path().join(format!("run-{number}"));
        let mut args = strings(command);
        let kept = base.iter().filter(|(flag, _)| !row.iter().any(|(f, _)| f == flag));
        for (flag, value) in kept.chain(row) {
            // A row removes a flag of the base with "-".
            if *value == "-" {
                continue;
            }
            args.push(flag.to_string());
            if !value.is_empty() {
                args.push(value.replace("OUT", &out.display().to_string()));
            }
        }
        let output = quantune(&args);
        traces(&output, base.iter().any(|(flag, _)| *flag == "--out").then_some(out.as_path()))
    };
    let plain = run(&[], 0);
    assert!(!plain.starts_with("error"), "{plain}");
    let mut covered: BTreeSet<String> = tested_apart.iter().map(|flag| flag.to_string()).collect();
    for (number, row) in table.iter().map(AsRef::as_ref).enumerate() {
        // The last flag of a row is the one under test; those before it are its preconditions.
        let (flag, scene) = row.split_last().unwrap();
        let without = if scene.is_empty() { plain.clone() } else { run(scene, 2 * number + 1) };
        let with = run(row, 2 * number + 2);
        for traces in [&without, &with] {
            assert!(!traces.starts_with("error"), "{command:?} {row:?}: {traces}");
        }
        assert_ne!(without, with, "{command:?}: {flag:?} changes nothing");
        covered.insert(flag.0.to_string());
    }
    assert_eq!(flags(command).difference(&covered).collect::<Vec<_>>(), Vec::<&String>::new());
}

/// Rows of [`every_flag`] for the flags of all training commands, except those that depend on the kind
/// of data. `held_out` are other rows of that kind; `metric` and `greater_is_better` compare their
/// evaluations differently from the default.
pub fn common_rows<'a>(
    held_out: &'a str,
    (metric, greater_is_better): (&'a str, &'a str),
    settings: &'a str,
    adapter: &'a str,
    dated: &'a str,
) -> Vec<Vec<(&'a str, &'a str)>> {
    // Written next to the dated base.
    let shout: &'a str = Box::leak(format!("{dated}/../shout.jinja").into_boxed_str());
    let rows: &[&[(&'a str, &'a str)]] = &[
        &[("--data", held_out)],
        &[("--out", "OUT/elsewhere")], // output paths are relative to OUT
        &[("--max-steps", "2")],
        &[("--max-steps", "0"), ("--num-train-epochs", "2")],
        &[("--load-type", "Q8_0")],
        &[("--r", "3")],
        &[("--threads", "2")],
        &[("--json", "-")],
        &[("--eval-data", held_out)],
        &[("--eval-strategy", "epoch")],
        &[("--eval-data", held_out), ("--eval-strategy", "steps"), ("--eval-steps", "1")],
        &[("--adapter", adapter)],
        &[("--frozen-adapter", adapter)],
        &[("--lora-alpha", "4")],
        &[("--lora-dropout", "0.5")],
        &[("--target-modules", "q_proj,v_proj")],
        &[("--exclude-modules", "q_proj")],
        &[("--rank-pattern", "q_proj=1")],
        &[("--alpha-pattern", "q_proj=1")],
        &[("--target-modules", "q_proj"), ("--layers-to-transform", "1")],
        // No module list has this name, so that only the module given by its full path remains.
        &[
            ("--target-modules", "q_proj,model.layers.0.mlp.up_proj"),
            ("--layers-to-transform", "1"),
            ("--layers-pattern", "h"),
        ],
        &[("--use-rslora", "true")],
        &[("--init-lora-weights", "gaussian")],
        &[("--use-dora", "true")],
        &[("--modules-to-save", "lm_head")],
        &[("--trainable-token-indices", "5,300")],
        &[("--add-tokens", "ferry,question")],
        &[("--add-special-tokens", "<|tool|>")],
        &[("--loraplus-lr-ratio", "4")],
        &[
            ("--target-modules", "q_proj,embed_tokens"),
            ("--loraplus-lr-ratio", "4"),
            ("--loraplus-lr-embedding", "0.01"),
        ],
        &[("--learning-rate", "0.01")],
        &[("--lr-scheduler-type", "constant")],
        &[("--warmup-ratio", "0.5")],
        &[("--warmup-steps", "2")],
        &[("--weight-decay", "0.5")],
        &[("--adam-beta1", "0.5")],
        &[("--adam-beta2", "0.5")],
        &[("--adam-epsilon", "0.1")],
        &[("--max-grad-norm", "0.001")],
        &[("--per-device-train-batch-size", "2")],
        &[("--base", dated), ("--template-date", "2020-01-01")],
        &[("--base", dated), ("--chat-template-kwargs", "mood=\"glad\"")],
        &[("--chat-template", shout)],
        &[("--no-shuffle", "")],
        &[("--cache-from", "1")],
        &[("--cache-from", "1"), ("--cache", "OUT/elsewhere")],
        &[("--gradient-checkpointing", "true")],
        &[("--seed", "7")],
        &[("--compute", "portable")],
        &[("--backend", "reference")],
        &[("--save-steps", "1")],
        &[("--save-steps", "1"), ("--save-total-limit", "1")],
        &[("--config", settings)],
    ];
    let mut rows: Vec<Vec<(&str, &str)>> = rows.iter().map(|row| row.to_vec()).collect();
    // Evaluates after every step; with a threshold that none reaches, the first one stays the best.
    let evaluated =
        [("--eval-data", held_out), ("--eval-strategy", "steps"), ("--eval-steps", "1")];
    let (best, patience) =
        (("--load-best-model-at-end", "true"), ("--early-stopping-patience", "1"));
    let threshold = ("--early-stopping-threshold", "1000");
    for last in [
        &[best, threshold, patience][..],
        &[("--max-steps", "5"), best, threshold],
        &[("--early-stopping-patience", "9"), threshold, best],
        &[best, ("--metric-for-best-model", metric)],
        &[best, ("--greater-is-better", greater_is_better)],
    ] {
        rows.push([&evaluated[..], last].concat());
    }
    rows
}

/// Sends SIGKILL after `moment`, as soon as `ready`; returns whether the run was still running.
pub fn kill(mut child: Child, moment: Duration, ready: impl Fn() -> bool) -> bool {
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if began.elapsed() >= moment && ready() {
            break;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    let _ = child.kill(); // an error says that it has just ended
    !child.wait().unwrap().success()
}

/// Sends Ctrl-C as soon as `ready`; returns the output of the process.
#[cfg(unix)]
pub fn interrupt(mut child: Child, ready: impl Fn() -> bool) -> Output {
    while !ready() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was interrupted");
        std::thread::sleep(Duration::from_micros(500));
    }
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    child.wait_with_output().unwrap()
}

/// The files of a run by name, except those that depend on time, path or process.
pub fn tree(out: &str) -> BTreeMap<String, Vec<u8>> {
    let mut files = Vec::new();
    walk(Path::new(out), &mut files);
    let name = |path: &Path| path.strip_prefix(out).unwrap().display().to_string();
    let named = files.into_iter().map(|path| (name(&path), fs::read(&path).unwrap()));
    let own =
        |name: &str| name.starts_with("tensorboard") || name == "config.toml" || name == "lock";
    named.filter(|(name, _)| !own(name)).collect()
}
