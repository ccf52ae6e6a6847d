//! `quantune quickstart`: all stages of training a model in a few minutes, without network or model files.
//!
//! Each stage is a command of this binary, printed as it is run, so that it can be repeated by hand. The data
//! is embedded from files next to this one, made by `scripts/pipelines/make_quickstart.py`.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::ops::DeviceName;
use crate::weights::write_atomically;

/// Texts about a village, chats about it, preference data, prompts for reinforcement learning, and evaluation
/// questions whose answers occur in no training text word for word.
const DATA: &[(&str, &str)] = &[
    ("text.txt", include_str!("quickstart/text.txt")),
    ("chats.jsonl", include_str!("quickstart/chats.jsonl")),
    ("comparisons.jsonl", include_str!("quickstart/comparisons.jsonl")),
    ("prompts.jsonl", include_str!("quickstart/prompts.jsonl")),
    ("questions.jsonl", include_str!("quickstart/questions.jsonl")),
    ("LICENSE", include_str!("quickstart/LICENSE")),
];

/// Marker file of a quickstart folder; folders without it are not overwritten.
const MARKER: &str = "quickstart.json";

/// The commands that have a `--device` flag.
const ON_DEVICE: &[&str] = &["pretrain", "sft", "reward", "ppo", "eval"];

/// Number of questions whose answers are printed.
const SHOWN: usize = 6;

#[derive(Debug, clap::Args)]
pub(super) struct Quickstart {
    /// Output directory; an earlier quickstart there is overwritten
    #[arg(long, default_value = "runs/quickstart")]
    out: PathBuf,
    /// Device for training and generation: cpu, cuda, cuda:N or metal; all but cpu require a build with that
    /// feature [default: cpu]
    #[arg(long)]
    device: Option<DeviceName>,
}

impl Quickstart {
    pub(super) fn run(self, threads: usize, json: bool) -> Result<Value> {
        let Self { out, device } = self;
        device.unwrap_or_default().open()?; // fails before anything is written
        if out.join(MARKER).is_file() {
            fs::remove_dir_all(&out).with_context(|| out.display().to_string())?;
        } else if fs::read_dir(&out).is_ok_and(|mut entries| entries.next().is_some()) {
            bail!("{}: contains other files, needed a new directory", out.display());
        }
        let data = out.join("data");
        fs::create_dir_all(&data).with_context(|| data.display().to_string())?;
        write_atomically(out.join(MARKER), |file| file.write_all(b"{}\n"))?;
        for (name, text) in DATA {
            let path = data.join(name);
            fs::write(&path, text).with_context(|| path.display().to_string())?;
        }
        let binary = std::env::current_exe().context("this program's own file")?;
        let (began, stages) = (Instant::now(), Vec::new());
        let mut walkthrough = Walkthrough { binary, out, threads, device, began, stages };
        walkthrough.run()?;
        let models = walkthrough.compare()?;
        if !json {
            walkthrough.print_summary(&models)?;
        }
        let result = json!({
            "seconds": walkthrough.began.elapsed().as_secs_f64(),
            "out": walkthrough.out,
            "stages": walkthrough.stages.iter().map(|stage| json!({
                "stage": stage.name,
                "seconds": stage.seconds,
                "result": stage.result,
            })).collect::<Vec<_>>(),
            "models": models.iter().map(|model| json!({
                "model": model.name,
                "right": model.right,
                "reward": model.reward,
                "length": model.length,
                "entropy": model.entropy,
            })).collect::<Vec<_>>(),
        });
        let path = walkthrough.out.join(MARKER);
        write_atomically(&path, |file| writeln!(file, "{result}"))?;
        Ok(result)
    }
}

/// A completed stage.
struct Stage {
    name: &'static str,
    seconds: f64,
    /// The JSON result of its command.
    result: Value,
}

/// The evaluation of a model on the questions.
struct Model {
    name: &'static str,
    /// Fraction of questions whose answer occurs in the reply.
    right: f64,
    /// Mean score by the reward model.
    reward: f64,
    /// Mean number of tokens per reply.
    length: f64,
    /// Entropy in nats per token.
    entropy: f64,
    /// Replies to all questions.
    replies: Vec<String>,
}

/// The stages so far, and how to run the next.
struct Walkthrough {
    binary: PathBuf,
    out: PathBuf,
    threads: usize,
    device: Option<DeviceName>,
    began: Instant,
    stages: Vec<Stage>,
}

impl Walkthrough {
    /// From random weights to a merged model, stage by stage.
    fn run(&mut self) -> Result<()> {
        self.stage(
            "tokenizer",
            "tokenizer train --data {data}/text.txt --vocab-size 1024 --out {out}/tokenizer",
        )?;
        // A few chats among the texts, so that the special tokens of chats are trained.
        self.stage(
            "pretrain",
            "pretrain --source village=40:{data}/text.txt chats=1:{data}/chats.jsonl \
             --tokenizer {out}/tokenizer --out {out}/pretrain --preset micro --max-length 128 \
             --per-device-train-batch-size 8 --max-tokens 1100000 --learning-rate 3e-3 \
             --validation-split 0.05 --eval-rows 0 --eval-steps 250 --sample-steps 250 \
             --save-steps 1000",
        )?;
        self.stage(
            "quantize",
            "quantize --base {out}/pretrain/model --out {out}/base.gguf --type Q8_0",
        )?;
        self.stage(
            "sft",
            "sft --base {out}/base.gguf --data {data}/chats.jsonl --out {out}/sft \
             --num-train-epochs 8 --learning-rate 3e-3 --max-length 128 --packing false \
             --per-device-train-batch-size 8 --gradient-accumulation-steps 1",
        )?;
        self.stage(
            "reward",
            "reward --base {out}/base.gguf --adapter {out}/sft/adapter \
             --data {data}/comparisons.jsonl --eval-strategy epoch --num-train-epochs 2 \
             --out {out}/reward --learning-rate 1e-3 --max-length 128",
        )?;
        self.stage(
            "ppo",
            "ppo --base {out}/base.gguf --adapter {out}/sft/adapter \
             --reward-adapter {out}/reward/adapter --data {data}/prompts.jsonl --out {out}/ppo \
             --max-steps 16 --batch-size 32 --num-mini-batches 2 --num-ppo-epochs 2 \
             --per-device-train-batch-size 32 --response-length 24 --temperature 1 \
             --learning-rate 1e-3 --kl-coef 0.1 --missing-eos-penalty 1 --sample-steps 16",
        )?;
        self.stage(
            "merge",
            "merge --base {out}/base.gguf --adapter {out}/ppo/adapter --out {out}/village.gguf \
             --type Q8_0",
        )
    }

    /// Evaluates each model on the questions: correct answers, and scores by the reward model.
    fn compare(&self) -> Result<Vec<Model>> {
        let models = [
            ("base", "base.gguf", ""),
            ("SFT", "base.gguf", "--adapter {out}/sft/adapter"),
            ("PPO", "base.gguf", "--adapter {out}/ppo/adapter"),
            ("merged", "village.gguf", ""),
        ];
        let ask = |(name, base, adapter): (&'static str, &str, &str)| -> Result<Model> {
            let eval = |base: &str, reward: &str, more: &str| {
                self.command(&format!(
                    "eval --base {{out}}/{base} {adapter} --prompts {{data}}/questions.jsonl \
                     --max-tokens 24 --reward {reward} {more}"
                ))
            };
            let file = format!("{name}.replies.jsonl");
            let flags = format!("--temperature 0 --replies {{out}}/{file}");
            let right = eval(base, "contains:answer", &flags)?;
            // The merged model is another base, which the reward adapter does not belong to.
            let judged = match base {
                "base.gguf" => Some(eval(base, "{out}/reward/adapter", "--temperature 1")?),
                _ => None,
            };
            let number = |value: &Value, key: &str| value[key].as_f64().unwrap_or(f64::NAN);
            Ok(Model {
                name,
                right: number(&right, "reward"),
                reward: judged.as_ref().map_or(f64::NAN, |value| number(value, "reward")),
                length: number(&right, "length"),
                entropy: judged.as_ref().map_or(f64::NAN, |value| number(value, "entropy")),
                replies: read_replies(&self.out.join(file))?,
            })
        };
        models.into_iter().map(ask).collect()
    }

    /// Prints the summary.
    fn print_summary(&self, models: &[Model]) -> Result<()> {
        let questions = DATA.iter().find(|(name, _)| *name == "questions.jsonl");
        let questions = questions.map_or("", |(_, text)| text);
        say!("\nquestions that occur in no training text or chat:");
        let all = questions.lines().count();
        for (index, line) in questions.lines().enumerate().step_by(all.div_ceil(SHOWN).max(1)) {
            let row: Value = serde_json::from_str(line)?;
            say!("\n> {}", row["prompt"][0]["content"].as_str().unwrap_or_default());
            for model in &models[..3] {
                let reply = model.replies.get(index).map_or("", String::as_str);
                say!("{:>6}: {}", model.name, reply.trim().replace('\n', " "));
            }
        }
        say!("\nmodel     right   reward   tokens   entropy");
        for model in models {
            let number = |value: f64| match value.is_nan() {
                true => "-".into(),
                false => format!("{value:.2}"),
            };
            let (right, reward) = (100.0 * model.right, number(model.reward));
            let (length, entropy) = (model.length, number(model.entropy));
            say!("{:8} {right:>5.1} % {reward:>8} {length:>8.1} {entropy:>9}", model.name);
        }
        say!(
            "baseline, the most frequent answer of each kind of question: {:.1} %",
            100.0 * majority_accuracy(questions)?
        );
        say!("\nstage       seconds");
        for stage in &self.stages {
            say!("{:10} {:>8.1}   {}", stage.name, stage.seconds, headline(stage));
        }
        let (all, out) = (self.began.elapsed().as_secs_f64(), self.out.display());
        say!("total      {all:>8.1}   {out}/village.gguf also runs in llama.cpp");
        Ok(())
    }

    fn stage(&mut self, name: &'static str, words: &str) -> Result<()> {
        let began = Instant::now();
        let result = self.command(words)?;
        self.stages.push(Stage { name, seconds: began.elapsed().as_secs_f64(), result });
        Ok(())
    }

    /// Runs a command of this binary, and returns its JSON result.
    fn command(&self, words: &str) -> Result<Value> {
        let place = |word: &str| {
            let data = self.out.join("data").display().to_string();
            word.replace("{data}", &data).replace("{out}", &self.out.display().to_string())
        };
        let mut words: Vec<String> = words.split_whitespace().map(place).collect();
        if let Some(device) = self.device.filter(|_| ON_DEVICE.contains(&&*words[0])) {
            words.extend(["--device".into(), device.to_string()]);
        }
        eprintln!("\n[{:>3.0} s] quantune {}", self.began.elapsed().as_secs_f64(), words.join(" "));
        let mut command = Command::new(&self.binary);
        command.args(&words).args(["--json", "--threads", &self.threads.to_string()]);
        let output = command
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| self.binary.display().to_string())?;
        if !output.status.success() {
            bail!("{} failed with {}", words[0], output.status);
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let last = text.lines().last().unwrap_or_default();
        serde_json::from_str(last).with_context(|| format!("output of {}: {last:?}", words[0]))
    }
}

/// Accuracy of giving the most frequent answer to each kind of question.
fn majority_accuracy(questions: &str) -> Result<f64> {
    let mut counts: BTreeMap<String, BTreeMap<String, usize>> = BTreeMap::new();
    for line in questions.lines() {
        let row: Value = serde_json::from_str(line)?;
        let text = |key: &str| row[key].as_str().unwrap_or_default().to_string();
        *counts.entry(text("kind")).or_default().entry(text("answer")).or_default() += 1;
    }
    let right: usize = counts.values().filter_map(|answers| answers.values().max()).sum();
    Ok(right as f64 / questions.lines().count().max(1) as f64)
}

/// The replies of a file that `eval --replies` wrote.
fn read_replies(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let reply = |line: &str| -> Result<String> {
        let row: Value = serde_json::from_str(line)?;
        Ok(row["response"].as_str().unwrap_or_default().to_string())
    };
    text.lines().map(reply).collect()
}

/// The main numbers of a stage.
fn headline(stage: &Stage) -> String {
    let result = &stage.result;
    let number = |key: &str| result[key].as_f64().unwrap_or(f64::NAN);
    match stage.name {
        "tokenizer" => format!("{:.2} bytes per token", number("bytes_per_token")),
        "pretrain" => format!(
            "{:.3} held-out bits per byte, from {:.3}; bigram model: {:.3}",
            number("eval_bits_per_byte_last"),
            number("eval_bits_per_byte_first"),
            number("bigram_bits_per_byte")
        ),
        "sft" => format!("loss {:.3} to {:.3}", number("loss_first"), number("loss_last")),
        "reward" => {
            format!("accuracy on held-out pairs {:.1} %", 100.0 * number("eval_accuracy"))
        }
        "ppo" => format!(
            "score {:.2} to {:.2}, KL {:.2}",
            number("objective/scores_first"),
            number("objective/scores_last"),
            number("objective/kl_last")
        ),
        _ => String::new(),
    }
}
