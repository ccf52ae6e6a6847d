//! Input lines, from a terminal with editing and history, or from a pipe.

use std::io::BufRead;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustyline::config::Configurer;
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{Config, Editor};

/// A source of input lines.
pub(super) enum LineInput {
    Terminal { editor: Box<Editor<(), FileHistory>>, history: Option<PathBuf> },
    Lines,
}

/// One line of input.
#[derive(Debug, PartialEq)]
pub(super) enum InputLine {
    /// A line, or several lines that were joined by backslashes or pasted.
    Text(String),
    /// Ctrl-C.
    Interrupted,
    /// Ctrl-D, or the end of stdin.
    End,
}

const PROMPT: &str = "> ";
const CONTINUATION_PROMPT: &str = "… ";

impl LineInput {
    /// Input from a terminal, with the lines of the history file if there is one.
    pub(super) fn terminal(history: Option<PathBuf>) -> Result<Self> {
        let config = Config::builder().bracketed_paste(true).build();
        let mut editor = Editor::with_config(config)?;
        editor.set_auto_add_history(false);
        if let Some(path) = history.as_deref().filter(|path| path.exists()) {
            editor.load_history(path).with_context(|| path.display().to_string())?;
        }
        Ok(Self::Terminal { editor: Box::new(editor), history })
    }

    /// The lines of stdin.
    pub(super) fn lines() -> Self {
        Self::Lines
    }

    /// The next line, joined with its continuation lines.
    pub(super) fn read(&mut self) -> Result<InputLine> {
        let mut text = String::new();
        loop {
            let prompt = if text.is_empty() { PROMPT } else { CONTINUATION_PROMPT };
            match self.line(prompt)? {
                InputLine::Text(line) => match line.strip_suffix('\\') {
                    Some(line) => {
                        text.push_str(line);
                        text.push('\n');
                    }
                    None => {
                        text.push_str(&line);
                        self.remember(&text)?;
                        return Ok(InputLine::Text(text));
                    }
                },
                // Ctrl-C discards an incomplete line; the end of input submits it.
                InputLine::End if !text.is_empty() => return Ok(InputLine::Text(text)),
                other => return Ok(other),
            }
        }
    }

    fn line(&mut self, prompt: &str) -> Result<InputLine> {
        match self {
            Self::Terminal { editor, .. } => match editor.readline(prompt) {
                Ok(line) => Ok(InputLine::Text(line)),
                Err(ReadlineError::Interrupted) => Ok(InputLine::Interrupted),
                Err(ReadlineError::Eof) => Ok(InputLine::End),
                Err(error) => Err(error).context("cannot read from the terminal"),
            },
            Self::Lines => read_line(&mut std::io::stdin().lock()),
        }
    }

    /// Adds a line to the history and its file.
    fn remember(&mut self, line: &str) -> Result<()> {
        let Self::Terminal { editor, history } = self else { return Ok(()) };
        if line.trim().is_empty() || !editor.add_history_entry(line)? {
            return Ok(());
        }
        match history.as_deref() {
            Some(path) => append(editor, path).with_context(|| path.display().to_string()),
            None => Ok(()),
        }
    }
}

fn append(editor: &mut Editor<(), FileHistory>, path: &Path) -> Result<()> {
    Ok(editor.append_history(path)?)
}

/// Reads a line without its newline.
fn read_line(from: &mut impl BufRead) -> Result<InputLine> {
    let mut line = Vec::new();
    if from.read_until(b'\n', &mut line).context("cannot read stdin")? == 0 {
        return Ok(InputLine::End);
    }
    let line = String::from_utf8(line).map_err(|e| {
        anyhow::anyhow!("stdin: byte {} of a line is not UTF-8", e.utf8_error().valid_up_to())
    })?;
    let line = line.strip_suffix('\n').unwrap_or(&line);
    Ok(InputLine::Text(line.strip_suffix('\r').unwrap_or(line).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_no_ends() {
        let mut from = "one\r\n\ntwo".as_bytes();
        let mut next = || read_line(&mut from).unwrap();
        for needed in ["one", "", "two"] {
            assert_eq!(next(), InputLine::Text(needed.into()));
        }
        assert_eq!(next(), InputLine::End);
        let fault = read_line(&mut &b"ab\xff\n"[..]).unwrap_err().to_string();
        assert_eq!(fault, "stdin: byte 2 of a line is not UTF-8");
    }
}
