//! Reads the operator's evaluation and alignment files: AdvBench's CSV as published, and JSONL rows
//! with `messages` or `prompt`. A malformed file is refused with its line, before a round begins.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use commonweal_runtime::{Message, Role};
use serde::Deserialize;

use crate::config::Config;

/// Most rows of a file.
pub const ROWS_MAX: usize = 100_000;
/// Longest row.
pub const ROW_BYTES_MAX: usize = 256 << 10;
/// Largest file.
pub const FILE_BYTES_MAX: u64 = 256 << 20;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SetError {
    /// It cannot be read.
    #[error("{}: cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// A row is not what it should be.
    #[error("{file}, line {line}: expected {expected}, got {got}")]
    Row {
        /// The file.
        file: String,
        /// Counted from 1.
        line: usize,
        /// What a row looks like.
        expected: &'static str,
        /// What is there.
        got: String,
    },
    /// Nothing in it, or too much.
    #[error("{file}: expected {expected}, got {got}")]
    Size {
        /// The file.
        file: String,
        /// What would do.
        expected: String,
        /// What is there.
        got: String,
    },
}

/// One conversation; without an assistant's answer at its end it is a prompt.
pub type Conversation = Vec<Message>;

/// All sets of a run.
#[derive(Clone, Debug)]
pub struct Sets {
    /// Harmful prompts, to measure by.
    pub harmful: Vec<Conversation>,
    /// Benign prompts, to measure by.
    pub benign: Vec<Conversation>,
    /// Conversations whose loss is measured; none of them is ever trained on.
    pub held_out: Vec<Conversation>,
    /// Harmful prompts, to align by.
    pub redteam: Vec<Conversation>,
    /// Benign conversations, to keep usefulness while aligning.
    pub replay: Vec<Conversation>,
}

impl Sets {
    /// Reads the operator's files; what is not named is bundled.
    pub fn read(config: &Config) -> Result<Self, SetError> {
        let prompts = |path: &Option<PathBuf>, name: &str, bundled: &str| match path {
            Some(path) => read_prompts(path),
            None => prompts_of(bundled, name),
        };
        let (evaluate, align) = (&config.evaluate, &config.align);
        let held_out = match &evaluate.held_out {
            Some(path) => read_conversations(path)?,
            None => conversations_of(HELD_OUT, "heldout.jsonl")?,
        };
        let (held_out, replay) = match &align.replay {
            Some(path) => (held_out, read_conversations(path)?),
            None => held_out.into_iter().partition(|conversation| !is_set_aside(conversation)),
        };
        Ok(Self {
            harmful: prompts(&evaluate.harmful, "eval_harmful.csv", HARMFUL)?,
            benign: prompts(&evaluate.benign, "eval_benign.jsonl", BENIGN)?,
            held_out,
            redteam: prompts(&align.redteam, "redteam.jsonl", REDTEAM)?,
            replay,
        })
    }
}

impl Sets {
    /// Bytes of the longest conversation of all sets.
    pub fn bytes_longest(&self) -> usize {
        let Self { harmful, benign, held_out, redteam, replay } = self;
        let all = [harmful, benign, held_out, redteam, replay].into_iter().flatten();
        let bytes = |conversation: &Conversation| -> usize {
            conversation.iter().map(|message| message.content.len()).sum()
        };
        all.map(bytes).max().unwrap_or(0)
    }
}

const HARMFUL: &str = include_str!("../../../models/reference/demo/eval_harmful.csv");
const BENIGN: &str = include_str!("../../../models/reference/demo/eval_benign.jsonl");
const HELD_OUT: &str = include_str!("../../../models/reference/demo/heldout.jsonl");
const REDTEAM: &str = include_str!("../../../models/reference/demo/redteam.jsonl");

/// A quarter of the held-out conversations, by content: the same ones whatever the order of the file.
fn is_set_aside(conversation: &Conversation) -> bool {
    let mut hasher = blake3::Hasher::new();
    for message in conversation {
        hasher.update(message.content.as_bytes()).update(&[0]);
    }
    hasher.finalize().as_bytes().first().is_some_and(|byte| byte % 4 == 0)
}

const ROW: &str = "{\"messages\":[{\"role\":…,\"content\":…}]} or {\"prompt\":…}";

#[derive(Deserialize)]
struct Row {
    #[serde(default)]
    messages: Vec<Message>,
    #[serde(default)]
    prompt: Option<String>,
}

/// Prompts of a file: each conversation up to its last user message.
pub fn read_prompts(path: &Path) -> Result<Vec<Conversation>, SetError> {
    prompts_of(&read(path)?, &path.display().to_string())
}

/// Conversations that end with an assistant's answer.
pub fn read_conversations(path: &Path) -> Result<Vec<Conversation>, SetError> {
    conversations_of(&read(path)?, &path.display().to_string())
}

/// As [`read_prompts`], of a text named `file`.
pub fn prompts_of(text: &str, file: &str) -> Result<Vec<Conversation>, SetError> {
    let is_csv = Path::new(file).extension().is_some_and(|extension| extension.eq_ignore_ascii_case("csv"));
    let rows = if is_csv { csv_rows(text, file)? } else { jsonl_rows(text, file)? };
    let mut prompts = Vec::with_capacity(rows.len());
    for (line, mut row) in rows {
        while row.last().is_some_and(|message| message.role == Role::Assistant) {
            row.pop();
        }
        if row.last().is_none_or(|message| message.role != Role::User) {
            return Err(SetError::Row {
                file: file.to_owned(),
                line,
                expected: "a message of the user",
                got: "none at the end of the prompt".to_owned(),
            });
        }
        prompts.push(row);
    }
    Ok(prompts)
}

/// As [`read_conversations`], of a text named `file`.
pub fn conversations_of(text: &str, file: &str) -> Result<Vec<Conversation>, SetError> {
    jsonl_rows(text, file)?
        .into_iter()
        .map(|(line, row)| match row.last() {
            Some(last) if last.role == Role::Assistant && row.len() > 1 => Ok(row),
            _ => Err(SetError::Row {
                file: file.to_owned(),
                line,
                expected: "a conversation that ends with the assistant's answer",
                got: "none".to_owned(),
            }),
        })
        .collect()
}

fn read(path: &Path) -> Result<String, SetError> {
    let failed = |source| SetError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    // Not by what the file says of its length: a pipe and a device say that it is nothing.
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(SetError::Size {
            file: path.display().to_string(),
            expected: format!("at most {FILE_BYTES_MAX} bytes"),
            got: "more".to_owned(),
        });
    }
    String::from_utf8(bytes)
        .map_err(|error| failed(std::io::Error::new(std::io::ErrorKind::InvalidData, error)))
}

/// As much of what a file says as a person reads.
fn shown(text: &str) -> String {
    const CHARS_MAX: usize = 200;
    let cut: String = text.chars().take(CHARS_MAX).collect();
    if cut.len() < text.len() { cut + "…" } else { cut }
}

type NumberedRows = Vec<(usize, Conversation)>;

fn bounded(rows: NumberedRows, file: &str) -> Result<NumberedRows, SetError> {
    if rows.is_empty() || rows.len() > ROWS_MAX {
        return Err(SetError::Size {
            file: file.to_owned(),
            expected: format!("1 to {ROWS_MAX} rows"),
            got: rows.len().to_string(),
        });
    }
    Ok(rows)
}

fn jsonl_rows(text: &str, file: &str) -> Result<NumberedRows, SetError> {
    let mut rows = Vec::new();
    for (index, text) in text.lines().enumerate() {
        let line = index + 1;
        let wrong = |got: String| SetError::Row { file: file.to_owned(), line, expected: ROW, got };
        if text.trim().is_empty() {
            continue;
        }
        if text.len() > ROW_BYTES_MAX {
            return Err(wrong(format!("{} bytes, the limit is {ROW_BYTES_MAX}", text.len())));
        }
        let row: Row = serde_json::from_str(text).map_err(|error| wrong(shown(&error.to_string())))?;
        let mut messages = row.messages;
        if let (true, Some(prompt)) = (messages.is_empty(), row.prompt) {
            messages.push(Message::user(prompt));
        }
        if messages.is_empty() {
            return Err(wrong("neither messages nor a prompt".to_owned()));
        }
        rows.push((line, messages));
    }
    bounded(rows, file)
}

fn csv_rows(text: &str, file: &str) -> Result<NumberedRows, SetError> {
    let wrong = |line: usize, got: String| SetError::Row {
        file: file.to_owned(),
        line,
        expected: "CSV with a column `goal` or `prompt`",
        got,
    };
    let mut reader = csv::ReaderBuilder::new().from_reader(text.as_bytes());
    let headers = reader.headers().map_err(|error| wrong(1, error.to_string()))?;
    let column = headers
        .iter()
        .position(|name| matches!(name.trim(), "goal" | "prompt" | "Behavior"))
        .ok_or_else(|| wrong(1, format!("`{}`", shown(&headers.iter().collect::<Vec<_>>().join(",")))))?;
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|error| {
            let line = error.position().map_or(0, |position| position.line() as usize);
            wrong(line, error.to_string())
        })?;
        let line = record.position().map_or(0, |position| position.line() as usize);
        if record.as_slice().len() > ROW_BYTES_MAX {
            return Err(wrong(
                line,
                format!("{} bytes, the limit is {ROW_BYTES_MAX}", record.as_slice().len()),
            ));
        }
        match record.get(column).map(str::trim) {
            Some(prompt) if !prompt.is_empty() => rows.push((line, vec![Message::user(prompt)])),
            _ => return Err(wrong(line, "an empty prompt".to_owned())),
        }
    }
    bounded(rows, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advbench_is_read_as_published() {
        let text = "goal,target\n\"Write a script, that\",\"Sure, here\"\nSecond,Sure\n";
        let prompts = prompts_of(text, "harmful.csv").unwrap();
        assert_eq!(prompts.len(), 2);
        assert_eq!(prompts[0][0].content, "Write a script, that");
    }

    #[test]
    fn rows_with_messages_and_prompts_are_read() {
        let text = concat!(
            r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}"#,
            "\n\n",
            r#"{"prompt":"p"}"#
        );
        let prompts = prompts_of(text, "x.jsonl").unwrap();
        assert_eq!(prompts[0].len(), 2, "the answer is cut off");
        assert_eq!(prompts[1][0].content, "p");
        let error = conversations_of(text, "x.jsonl").unwrap_err().to_string();
        assert!(error.starts_with("x.jsonl, line 3: expected a conversation"), "{error}");
    }

    #[test]
    fn malformed_rows_are_named_by_line() {
        let line_of = |text: &str, file: &str| prompts_of(text, file).unwrap_err().to_string();
        assert!(line_of("{\"prompt\":\"a\"}\n{oops", "x.jsonl").starts_with("x.jsonl, line 2: expected"));
        assert!(line_of(r#"{"messages":[{"role":"root","content":""}]}"#, "x.jsonl").contains("line 1"));
        assert!(line_of("{}", "x.jsonl").contains("neither messages nor a prompt"));
        assert!(line_of("", "x.jsonl").contains("expected 1 to 100000 rows, got 0"));
        assert!(line_of("what,why\na,b\n", "x.csv").contains("x.csv, line 1"));
        assert!(line_of("goal,target\na,b\n,c\n", "x.csv").contains("line 3"));
        assert!(line_of("goal,target\na,b,c\n", "x.csv").contains("line 2"));
        assert!(
            line_of(&format!("{{\"prompt\":\"{}\"}}", "x".repeat(ROW_BYTES_MAX)), "x.jsonl")
                .contains("limit")
        );
        let long = "x".repeat(ROW_BYTES_MAX + 1);
        assert!(line_of(&format!("goal\na\n{long}\n"), "x.csv").contains("line 3: "));
        // What a file says is not told at any length.
        for (text, file) in [
            (format!("{long},why\na,b\n"), "x.csv"),
            (format!("{{\"messages\":[{{\"role\":\"{}\"}}]}}", "x".repeat(10_000)), "x.jsonl"),
        ] {
            assert!(line_of(&text, file).len() < 1_000);
        }
    }

    #[test]
    fn the_bundled_sets_are_read_and_replay_is_never_scored() {
        let sets = Sets::read(&Config::default()).unwrap();
        assert!(!sets.harmful.is_empty() && !sets.benign.is_empty() && !sets.redteam.is_empty());
        assert!(sets.replay.len() * 2 < sets.held_out.len() && !sets.replay.is_empty());
        assert!(sets.replay.iter().all(|row| !sets.held_out.contains(row)));
    }

    #[cfg(unix)]
    #[test]
    fn a_file_without_end_is_refused() {
        let error = read_prompts(Path::new("/dev/zero")).unwrap_err().to_string();
        assert!(error.contains("/dev/zero: expected at most"), "{error}");
    }

    #[test]
    fn a_file_that_is_absent_is_named() {
        let error = read_prompts(Path::new("no/such.jsonl")).unwrap_err().to_string();
        assert!(error.contains("no/such.jsonl"), "{error}");
    }
}
