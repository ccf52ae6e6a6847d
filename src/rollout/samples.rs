//! Human-readable samples of a run: a file in the run directory, and a table for the terminal.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use unicode_width::UnicodeWidthChar;

/// A sampled response with its rewards.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleRow {
    /// The prompt.
    pub prompt: String,
    /// The response.
    pub response: String,
    /// The weighted sum of rewards; `None` if no source has an opinion.
    pub reward: Option<f64>,
    /// The reward of each source, with its name.
    pub rewards: Vec<(String, Option<f64>)>,
    /// The KL estimate of the response, if there is a reference.
    pub kl: Option<f64>,
    /// Number of tokens of the response.
    pub tokens: usize,
    /// Whether the response ended by itself, not at the length limit.
    pub finished: bool,
}

impl SampleRow {
    fn finish(&self) -> &'static str {
        if self.finished { "stop" } else { "length" }
    }

    fn json(&self, step: u64) -> Value {
        let rewards: Map<String, Value> =
            self.rewards.iter().map(|(name, reward)| (name.clone(), json!(reward))).collect();
        json!({
            "step": step,
            "prompt": self.prompt,
            "response": self.response,
            "reward": self.reward,
            "rewards": rewards,
            "kl": self.kl,
            "tokens": self.tokens,
            "finish": self.finish(),
        })
    }
}

/// The file `samples.jsonl`, which samples are appended to.
#[derive(Debug)]
pub(crate) struct SampleLog {
    path: PathBuf,
    file: File,
    /// Length of the file in bytes. A checkpoint records it, and a resumed run truncates the file to it.
    pub bytes: u64,
}

/// Why samples cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub struct SamplesError {
    /// The file.
    pub path: PathBuf,
    /// The system error.
    pub source: io::Error,
}

impl SampleLog {
    /// Opens the file and truncates it to `bytes`.
    pub(crate) fn open(path: &Path, bytes: u64) -> Result<Self, SamplesError> {
        let open = || -> io::Result<File> {
            let mut file = File::options().create(true).write(true).truncate(false).open(path)?;
            if file.metadata()?.len() < bytes {
                return Err(io::Error::other("shorter than recorded in the checkpoint"));
            }
            file.set_len(bytes)?;
            file.seek(SeekFrom::End(0))?;
            Ok(file)
        };
        match open() {
            Ok(file) => Ok(Self { path: path.into(), file, bytes }),
            Err(source) => Err(SamplesError { path: path.into(), source }),
        }
    }

    /// Appends the samples of a step, one line each.
    pub(crate) fn push(&mut self, step: u64, rows: &[SampleRow]) -> Result<(), SamplesError> {
        let lines: String = rows.iter().map(|row| format!("{}\n", row.json(step))).collect();
        self.file.write_all(lines.as_bytes()).map_err(|e| self.at(e))?;
        self.bytes += lines.len() as u64;
        Ok(())
    }

    /// Syncs the file to disk, which a checkpoint relies on.
    pub(crate) fn sync(&self) -> Result<(), SamplesError> {
        self.file.sync_all().map_err(|e| self.at(e))
    }

    fn at(&self, source: io::Error) -> SamplesError {
        SamplesError { path: self.path.clone(), source }
    }
}

/// Width of the columns of prompt and response, in characters.
const PROMPT: usize = 28;
const RESPONSE: usize = 52;

/// The samples as a table for a terminal of 110 columns, with the end of each prompt and the beginning of
/// each response. Control characters are escaped.
pub(crate) fn table(rows: &[SampleRow]) -> String {
    let mut text = format!(
        "{:>PROMPT$} | {:<RESPONSE$} | {:>7} | {:>6} | tokens\n",
        "prompt", "response", "reward", "kl"
    );
    for row in rows {
        let number = |number: Option<f64>, decimals: usize| {
            number.map_or("-".into(), |number| format!("{number:.decimals$}"))
        };
        let cells = [
            padded(end_of(&escaped(&row.prompt), PROMPT), PROMPT, true),
            padded(beginning_of(&escaped(&row.response), RESPONSE), RESPONSE, false),
            format!("{:>7}", number(row.reward, 3)),
            format!("{:>6}", number(row.kl, 2)),
            format!("{}{}", row.tokens, if row.finished { "" } else { "..." }),
        ];
        text.push_str(&cells.join(" | "));
        text.push('\n');
    }
    text
}

/// Escapes control characters, bidirectional controls and zero-width characters, in Rust's syntax.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}' => out.extend(c.escape_unicode()),
            c if c.is_control() => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    out
}

fn width(c: char) -> usize {
    c.width().unwrap_or(0)
}

fn beginning_of(text: &str, columns: usize) -> String {
    if text.chars().map(width).sum::<usize>() <= columns {
        return text.into();
    }
    let mut left = columns - 1;
    let fits = |c: &char| {
        let fits = width(*c) <= left;
        left = left.saturating_sub(width(*c));
        fits
    };
    text.chars().take_while(fits).collect::<String>() + "…"
}

fn end_of(text: &str, columns: usize) -> String {
    let turned: String = text.chars().rev().collect();
    beginning_of(&turned, columns).chars().rev().collect()
}

fn padded(text: String, columns: usize, right: bool) -> String {
    let taken: usize = text.chars().map(width).sum();
    let room = " ".repeat(columns.saturating_sub(taken));
    if right { room + &text } else { text + &room }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(prompt: &str, response: &str) -> SampleRow {
        SampleRow {
            prompt: prompt.into(),
            response: response.into(),
            reward: Some(1.25),
            rewards: vec![("exact:answer".into(), Some(1.0)), ("rm".into(), None)],
            kl: None,
            tokens: 3,
            finished: true,
        }
    }

    #[test]
    fn a_log_is_truncated_to_its_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("samples.jsonl");
        let mut log = SampleLog::open(&path, 0).unwrap();
        log.push(1, &[row("p", "a\nb"), row("q", "\u{1b}[2J")]).unwrap();
        log.sync().unwrap();
        let kept = log.bytes;
        log.push(2, &[row("r", "c")]).unwrap();
        assert!(log.bytes > kept);
        drop(log);

        let mut log = SampleLog::open(&path, kept).unwrap();
        assert_eq!(log.bytes, kept);
        log.push(3, &[row("s", "d")]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.len() as u64, log.bytes);
        let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let steps: Vec<u64> = lines.iter().map(|line| line["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, [1, 1, 3]);
        assert_eq!(lines[0]["response"], "a\nb");
        assert_eq!(lines[0]["rewards"].to_string(), r#"{"exact:answer":1.0,"rm":null}"#);
        assert_eq!((&lines[0]["kl"], &lines[0]["finish"]), (&Value::Null, &json!("stop")));

        let error = SampleLog::open(&path, 9999).unwrap_err().to_string();
        assert!(
            error.ends_with("samples.jsonl: shorter than recorded in the checkpoint"),
            "{error}"
        );
    }

    #[test]
    fn tables_keep_their_columns() {
        let long = "the quick brown fox jumps over the lazy dog, ".repeat(4);
        let rows = [
            row("short", "a\tb\nc\u{1b}[31m\u{202e}"),
            row(&long, &long),
            SampleRow {
                finished: false,
                kl: Some(-0.5),
                ..row("日本語の長い文章です。とても長い文章です", "日本語")
            },
            row(&"e\u{301}".repeat(60), &"é".repeat(52)),
        ];
        let text = table(&rows);
        let columns = |line: &str| -> Vec<usize> {
            let parts: Vec<&str> = line.split(" | ").collect();
            parts[..4].iter().map(|part| part.chars().map(width).sum()).collect()
        };
        for line in text.lines() {
            assert_eq!(columns(line), [PROMPT, RESPONSE, 7, 6], "{line}");
            assert!(line.chars().all(|c| !c.is_control()));
        }
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].contains("short | a\\tb\\nc\\u{1b}[31m\\u{202e} "), "{}", lines[1]);
        assert!(lines[2].starts_with('…') && lines[2].contains("… |"), "{}", lines[2]);
        assert!(lines[3].ends_with("|  -0.50 | 3..."), "{}", lines[3]);
        assert!(lines[4].contains(&"é".repeat(52)), "{}", lines[4]);
    }
}
