//! Where typed texts come from: a terminal with a line editor, or a pipe. What was typed is remembered while the program
//! runs, and in a file only where one is named. `chat.rs` asks for one text after the other.

use std::{
    io::{self, BufRead, IsTerminal},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use rustyline::{Config, DefaultEditor, error::ReadlineError};

use super::commands::Lines;

/// Texts that the arrow keys go back to.
const REMEMBERED_MAX: usize = 1_000;
/// A line of a pipe; far above any context.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// Reads texts.
pub(super) enum Reader {
    Terminal { editor: Box<DefaultEditor>, history: Option<PathBuf> },
    Pipe,
}

impl Reader {
    /// The terminal, if stdin is one.
    pub(super) fn open(history: Option<&Path>) -> Result<Self> {
        if !io::stdin().is_terminal() {
            return Ok(Self::Pipe);
        }
        let config = Config::builder().max_history_size(REMEMBERED_MAX)?.auto_add_history(false).build();
        let mut editor = Box::new(DefaultEditor::with_config(config).context("terminal")?);
        if let Some(path) = history.filter(|path| path.exists()) {
            editor.load_history(path).with_context(|| path.display().to_string())?;
        }
        Ok(Self::Terminal { editor, history: history.map(Path::to_owned) })
    }

    pub(super) fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal { .. })
    }

    /// The next text; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<String>> {
        let mut lines = Lines::default();
        loop {
            let line = match self {
                Self::Pipe => read_line()?,
                Self::Terminal { editor, .. } => {
                    let prompt = if lines.is_begun() { "… " } else { "> " };
                    match editor.readline(prompt) {
                        Ok(line) => Some(line),
                        Err(ReadlineError::Eof) => None,
                        // What was begun is given up; the program goes on.
                        Err(ReadlineError::Interrupted) => {
                            lines = Lines::default();
                            continue;
                        }
                        Err(error) => return Err(error).context("terminal"),
                    }
                }
            };
            let text = match line {
                Some(line) => lines.push(&line),
                None if lines.is_begun() => Some(lines.take()),
                None => return Ok(None),
            };
            if let Some(text) = text.filter(|text| !text.trim().is_empty()) {
                self.remember(&text)?;
                return Ok(Some(text));
            }
        }
    }

    fn remember(&mut self, text: &str) -> Result<()> {
        let Self::Terminal { editor, history } = self else { return Ok(()) };
        editor.add_history_entry(text).context("history")?;
        if let Some(path) = history {
            editor.append_history(path).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }
}

fn read_line() -> Result<Option<String>> {
    let mut bytes = Vec::new();
    let mut limited = io::Read::take(io::stdin().lock(), LINE_BYTES_MAX);
    limited.read_until(b'\n', &mut bytes).context("stdin")?;
    if bytes.is_empty() {
        return Ok(None);
    }
    let line = String::from_utf8(bytes).context("stdin: expected UTF-8")?;
    Ok(Some(line.trim_end_matches(['\n', '\r']).to_owned()))
}
