//! Lines, from a terminal with editing and history, or from a pipe.

use std::io::BufRead;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustyline::config::Configurer;
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{Config, Editor};

/// Where lines come from.
pub enum Input {
    Terminal { editor: Box<Editor<(), FileHistory>>, history: Option<PathBuf> },
    Lines,
}

/// What was read.
#[derive(Debug, PartialEq)]
pub enum Line {
    /// A line, or several that a backslash joined or that were pasted.
    Text(String),
    /// Ctrl-C.
    Interrupted,
    /// Ctrl-D, or the end of the pipe.
    End,
}

const PROMPT: &str = "> ";
const GOES_ON: &str = "… ";

impl Input {
    /// A terminal, with the lines of earlier times if there is a file of them.
    pub fn terminal(history: Option<PathBuf>) -> Result<Self> {
        let config = Config::builder().bracketed_paste(true).build();
        let mut editor = Editor::with_config(config)?;
        editor.set_auto_add_history(false);
        if let Some(path) = history.as_deref().filter(|path| path.exists()) {
            editor.load_history(path).with_context(|| path.display().to_string())?;
        }
        Ok(Self::Terminal { editor: Box::new(editor), history })
    }

    /// The lines of stdin.
    pub fn lines() -> Self {
        Self::Lines
    }

    /// The next line, with those it goes on with.
    pub fn read(&mut self) -> Result<Line> {
        let mut text = String::new();
        loop {
            let prompt = if text.is_empty() { PROMPT } else { GOES_ON };
            match self.line(prompt)? {
                Line::Text(line) => match line.strip_suffix('\\') {
                    Some(line) => {
                        text.push_str(line);
                        text.push('\n');
                    }
                    None => {
                        text.push_str(&line);
                        self.remember(&text)?;
                        return Ok(Line::Text(text));
                    }
                },
                // What was begun is given up by Ctrl-C, and said by the end.
                Line::End if !text.is_empty() => return Ok(Line::Text(text)),
                other => return Ok(other),
            }
        }
    }

    fn line(&mut self, prompt: &str) -> Result<Line> {
        match self {
            Self::Terminal { editor, .. } => match editor.readline(prompt) {
                Ok(line) => Ok(Line::Text(line)),
                Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
                Err(ReadlineError::Eof) => Ok(Line::End),
                Err(error) => Err(error).context("cannot read from the terminal"),
            },
            Self::Lines => read_line(&mut std::io::stdin().lock()),
        }
    }

    /// Writes a line down, in the file too.
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

/// A line without its end.
fn read_line(from: &mut impl BufRead) -> Result<Line> {
    let mut line = Vec::new();
    if from.read_until(b'\n', &mut line).context("cannot read stdin")? == 0 {
        return Ok(Line::End);
    }
    let line = String::from_utf8(line).map_err(|e| {
        anyhow::anyhow!("stdin: byte {} of a line is not UTF-8", e.utf8_error().valid_up_to())
    })?;
    let line = line.strip_suffix('\n').unwrap_or(&line);
    Ok(Line::Text(line.strip_suffix('\r').unwrap_or(line).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_no_ends() {
        let mut from = "one\r\n\ntwo".as_bytes();
        let mut next = || read_line(&mut from).unwrap();
        for needed in ["one", "", "two"] {
            assert_eq!(next(), Line::Text(needed.into()));
        }
        assert_eq!(next(), Line::End);
        let fault = read_line(&mut &b"ab\xff\n"[..]).unwrap_err().to_string();
        assert_eq!(fault, "stdin: byte 2 of a line is not UTF-8");
    }
}
