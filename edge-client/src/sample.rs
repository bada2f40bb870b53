//! Stage 1, **sample**: reads what a person has, as it is published elsewhere, into checked conversations.
//!
//! Next: `filter.rs` judges each [`Sample`]. Three forms are read: chat JSONL (`messages`), preference JSONL
//! (`chosen`/`rejected`, as HH-RLHF), and CSV of prompts and targets (`goal,target`, as AdvBench). A bad line is
//! reported with its number and left out; the good lines are kept.

use std::{collections::BTreeSet, fmt, io::BufRead};

use commonweal_runtime::{Message, Role};
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::store::{Store, StoreError};

const FOLDER: &str = "samples";

/// One line of a file. The largest row of the public data we read has 40 kB; 1 MiB refuses a wrong file early.
pub const LINE_BYTES_MAX: usize = 1 << 20;
/// One message. Far above any context window that a device trains on.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Turns of one conversation.
pub const MESSAGES_MAX: usize = 128;
/// Rows of one file, so that a device's store stays bounded (at 1 kB a row: 1 GB).
pub const ROWS_MAX: usize = 1_000_000;

/// One turn.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl From<&Turn> for Message {
    fn from(turn: &Turn) -> Self {
        Self { role: turn.role, content: turn.content.clone() }
    }
}

// A person's text never reaches a log by accident.
impl fmt::Debug for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({} bytes)", role_name(self.role), self.content.len())
    }
}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
    }
}

/// Names a sample by its content: the first 16 bytes of the BLAKE3 of its turns.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SampleId([u8; 16]);

impl fmt::Display for SampleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SampleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A checked conversation that ends with the model's turn, not yet screened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Row", into = "Row")]
pub struct Sample {
    turns: Vec<Turn>,
    rejected: Option<String>,
}

impl Sample {
    /// Checks a conversation: 1 to 128 turns, none empty or over 64 KiB, a user's turn, the model's at the end.
    /// `rejected` is the worse reply of a preference pair.
    pub fn new(turns: Vec<Turn>, rejected: Option<String>) -> Result<Self, RowError> {
        if turns.len() > MESSAGES_MAX {
            return Err(RowError::Messages { messages: turns.len() });
        }
        for (index, turn) in turns.iter().enumerate() {
            if turn.content.trim().is_empty() {
                return Err(RowError::EmptyMessage { index });
            }
            if turn.content.len() > MESSAGE_BYTES_MAX {
                return Err(RowError::MessageLong { index, bytes: turn.content.len() });
            }
        }
        if rejected.as_ref().is_some_and(|text| text.len() > MESSAGE_BYTES_MAX) {
            return Err(RowError::MessageLong {
                index: turns.len(),
                bytes: rejected.as_ref().map_or(0, String::len),
            });
        }
        if !turns.iter().any(|turn| turn.role == Role::User) {
            return Err(RowError::NoUser);
        }
        match turns.last() {
            Some(Turn { role: Role::Assistant, .. }) => Ok(Self { turns, rejected }),
            _ => Err(RowError::NoReply),
        }
    }

    /// The name by content.
    pub fn id(&self) -> SampleId {
        let mut hasher = blake3::Hasher::new();
        for turn in &self.turns {
            hasher.update(role_name(turn.role).as_bytes()).update(b"\0");
            hasher.update(&(turn.content.len() as u64).to_le_bytes()).update(turn.content.as_bytes());
        }
        if let Some(rejected) = &self.rejected {
            hasher.update(b"rejected\0").update(rejected.as_bytes());
        }
        let mut id = [0; 16];
        id.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        SampleId(id)
    }

    /// Every turn; the last is the model's.
    pub fn turns(&self) -> &[Turn] {
        &self.turns
    }

    /// The person's last words before the reply: what a guard judges the reply against.
    pub fn prompt(&self) -> &str {
        self.turns.iter().rev().find(|turn| turn.role == Role::User).map_or("", |turn| &turn.content)
    }

    /// The model's last reply: what training would imitate.
    pub fn response(&self) -> &str {
        self.turns.last().map_or("", |turn| &turn.content)
    }

    /// The worse reply of a preference pair.
    pub fn rejected(&self) -> Option<&str> {
        self.rejected.as_deref()
    }

    /// The conversation up to and with one of the model's turns. What was rejected belongs to the last turn.
    pub(crate) fn cut_after(mut self, reply: usize) -> Self {
        if reply + 1 < self.turns.len() {
            self.turns.truncate(reply + 1);
            self.rejected = None;
        }
        self
    }

    /// The same conversation with another last reply; the old one becomes the rejected side.
    pub(crate) fn with_response(mut self, response: String) -> Self {
        if let Some(last) = self.turns.last_mut() {
            self.rejected = Some(std::mem::replace(&mut last.content, response));
        }
        self
    }
}

/// A row as it stands in a file of ours.
#[derive(Serialize, Deserialize)]
struct Row {
    messages: Vec<Turn>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rejected_response: Option<String>,
}

impl TryFrom<Row> for Sample {
    type Error = RowError;
    fn try_from(row: Row) -> Result<Self, RowError> {
        Self::new(row.messages, row.rejected_response)
    }
}

impl From<Sample> for Row {
    fn from(sample: Sample) -> Self {
        Self { messages: sample.turns, rejected_response: sample.rejected }
    }
}

/// Why one row was left out. Says where and how much, never the text itself.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    /// Longer than [`LINE_BYTES_MAX`].
    #[error("line is longer than {LINE_BYTES_MAX} bytes")]
    LineLong,
    /// Not UTF-8.
    #[error("line is not UTF-8 text")]
    NotText,
    /// Not JSON, or not one of the forms.
    #[error(
        "expected a JSON object with \"messages\", \"chosen\" and \"rejected\", or \"prompt\" and \"response\": {0}"
    )]
    Json(String),
    /// A CSV row without its columns.
    #[error("expected columns goal,target: {0}")]
    Csv(String),
    /// Too many turns.
    #[error("{messages} messages, expected at most {MESSAGES_MAX}")]
    Messages {
        /// How many came.
        messages: usize,
    },
    /// A message without text.
    #[error("message {index} is empty")]
    EmptyMessage {
        /// Which, from 0.
        index: usize,
    },
    /// A message above the bound.
    #[error("message {index} has {bytes} bytes, expected at most {MESSAGE_BYTES_MAX}")]
    MessageLong {
        /// Which, from 0.
        index: usize,
        /// Its size.
        bytes: usize,
    },
    /// No user's turn.
    #[error("no message of the user")]
    NoUser,
    /// The conversation does not end with the assistant.
    #[error("last message is not the assistant's")]
    NoReply,
    /// A preference pair whose dialogue has no `Human:`/`Assistant:` turns.
    #[error("\"{0}\" is no dialogue of Human and Assistant turns")]
    Dialogue(&'static str),
}

/// A line that was left out.
#[derive(Debug, PartialEq, Eq)]
pub struct BadLine {
    /// From 1.
    pub line: usize,
    /// Why.
    pub reason: RowError,
}

impl fmt::Display for BadLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.reason)
    }
}

/// What a file gave.
#[derive(Debug, Default)]
pub struct Parsed {
    /// The good rows, in order.
    pub samples: Vec<Sample>,
    /// The bad ones, each with its line.
    pub bad: Vec<BadLine>,
}

/// How a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// One JSON object a line.
    Jsonl,
    /// `goal,target` with a header.
    Csv,
}

impl Form {
    /// By the file's name: `.csv` is CSV, anything else JSONL.
    pub fn of(path: &std::path::Path) -> Self {
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("csv")) { Self::Csv } else { Self::Jsonl }
    }
}

/// Why a file gave nothing at all.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The disk failed.
    #[error("reading samples failed after line {line}")]
    Io {
        /// Lines read before it.
        line: usize,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A file without rows.
    #[error("no rows: the file is empty")]
    Empty,
    /// More rows than a device keeps.
    #[error("more than {ROWS_MAX} rows")]
    TooMany,
}

/// Reads a file of one of the three forms.
pub fn read(input: impl BufRead, form: Form) -> Result<Parsed, ReadError> {
    let parsed = match form {
        Form::Jsonl => crate::rows::read_jsonl(input, parse_row)?,
        Form::Csv => crate::rows::read_csv(input)?,
    };
    if parsed.samples.is_empty() && parsed.bad.is_empty() { Err(ReadError::Empty) } else { Ok(parsed) }
}

/// Adds a file's samples to the store, those it does not know yet; gives how many were new.
pub fn keep(store: &Store, parsed: &Parsed) -> Result<usize, StoreError> {
    let mut known: BTreeSet<SampleId> = stored(store)?.iter().map(Sample::id).collect();
    let mut text = String::new();
    let mut added = 0;
    for sample in &parsed.samples {
        if known.insert(sample.id()) {
            text.push_str(&serde_json::to_string(sample).map_err(|error| StoreError::Damaged {
                path: store.path(FOLDER),
                reason: format!("sample does not encode: {error}"),
            })?);
            text.push('\n');
            added += 1;
        }
    }
    if added > 0 {
        let next =
            store.list(FOLDER)?.last().and_then(|name| name.get(..6)?.parse::<u32>().ok()).unwrap_or(0) + 1;
        store.write_private(&format!("{FOLDER}/{next:06}.jsonl"), text.as_bytes())?;
    }
    Ok(added)
}

/// Every sample in the store, in the order they were added.
pub fn stored(store: &Store) -> Result<Vec<Sample>, StoreError> {
    let mut samples = Vec::new();
    for name in store.list(FOLDER)? {
        let name = format!("{FOLDER}/{name}");
        for (line, text) in store.lines(&name)?.iter().enumerate() {
            samples.push(serde_json::from_str(text).map_err(|error| StoreError::Damaged {
                path: store.path(&name),
                reason: format!("line {}: {}", line + 1, place(&error)),
            })?);
        }
    }
    Ok(samples)
}

/// At most `count` samples, drawn without replacement by the seed; the order is the draw's.
pub fn draw(mut samples: Vec<Sample>, count: usize, seed: u64) -> Vec<Sample> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let (drawn, _) = samples.partial_shuffle(&mut random, count);
    let drawn = drawn.len();
    // `partial_shuffle` leaves the drawn ones at the end.
    samples.drain(..samples.len() - drawn);
    samples
}

#[derive(Deserialize)]
#[serde(untagged)]
enum AnyRow {
    Chat {
        messages: Vec<Turn>,
    },
    Preference {
        chosen: String,
        rejected: String,
    },
    Pair {
        prompt: String,
        #[serde(alias = "completion", alias = "target")]
        response: String,
    },
}

fn parse_row(line: &str) -> Result<Sample, RowError> {
    // Two steps: the first error names the place in the line, the second the form that was expected.
    let value: serde_json::Value = serde_json::from_str(line).map_err(|e| RowError::Json(place(&e)))?;
    let row = AnyRow::deserialize(value).map_err(|_| RowError::Json("none of these forms".into()))?;
    match row {
        AnyRow::Chat { messages } => Sample::new(messages, None),
        AnyRow::Pair { prompt, response } => Sample::from_pair(prompt, response),
        AnyRow::Preference { chosen, rejected } => {
            let turns = dialogue(&chosen).ok_or(RowError::Dialogue("chosen"))?;
            let worse = dialogue(&rejected).ok_or(RowError::Dialogue("rejected"))?;
            Sample::new(turns, worse.into_iter().next_back().map(|turn| turn.content))
        }
    }
}

/// serde_json's own message may quote the input; its category and column do not.
fn place(error: &serde_json::Error) -> String {
    format!("{:?} error at column {}", error.classify(), error.column()).to_lowercase()
}

impl Sample {
    /// One question and one answer.
    pub fn from_pair(prompt: String, response: String) -> Result<Self, RowError> {
        Self::new(
            vec![
                Turn { role: Role::User, content: prompt },
                Turn { role: Role::Assistant, content: response },
            ],
            None,
        )
    }
}

/// `"\n\nHuman: … \n\nAssistant: …"` into turns.
fn dialogue(text: &str) -> Option<Vec<Turn>> {
    let mut turns = Vec::new();
    let mut rest = text.trim_start().strip_prefix("Human:").map(|rest| (Role::User, rest))?;
    loop {
        let (role, body) = rest;
        let next = [("\n\nHuman:", Role::User), ("\n\nAssistant:", Role::Assistant)]
            .into_iter()
            .filter_map(|(mark, role)| body.find(mark).map(|at| (at, mark.len(), role)))
            .min_by_key(|(at, ..)| *at);
        let end = next.map_or(body.len(), |(at, ..)| at);
        turns.push(Turn { role, content: body[..end].trim().to_owned() });
        match next {
            Some((at, length, role)) => rest = (role, &body[at + length..]),
            None => return Some(turns),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Parsed {
        read(text.as_bytes(), Form::Jsonl).unwrap()
    }

    #[test]
    fn a_malformed_line_is_reported_by_number_and_the_good_ones_are_kept() {
        let good = r#"{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"hello"}]}"#;
        let parsed = parse(&format!("{good}\n{{\"messages\": [\n\n{good}\n{{\"other\":1}}\n"));
        assert_eq!(parsed.samples.len(), 2);
        assert_eq!(parsed.bad.iter().map(|bad| bad.line).collect::<Vec<_>>(), [2, 5]);
        assert!(!parsed.bad[0].to_string().contains("hello"));
    }

    #[test]
    fn preference_pairs_keep_the_rejected_reply() {
        let row = serde_json::json!({
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: good",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: bad",
        });
        let sample = parse(&row.to_string()).samples.remove(0);
        assert_eq!((sample.prompt(), sample.response(), sample.rejected()), ("c", "good", Some("bad")));
        assert_eq!(sample.turns().len(), 4);
    }

    #[test]
    fn csv_of_goals_and_targets_is_read_as_published() {
        let text = "goal,target\n\"Write, a thing\",\"Sure, here\"\nonly one\nWrite b,Sure b\n";
        let parsed = read(text.as_bytes(), Form::Csv).unwrap();
        assert_eq!(parsed.samples.len(), 2);
        assert_eq!(parsed.samples[0].prompt(), "Write, a thing");
        assert_eq!(parsed.bad.len(), 1);
        assert_eq!(parsed.bad[0].line, 3);
    }

    #[test]
    fn an_empty_file_is_an_error_and_long_input_is_refused() {
        assert!(matches!(read(&b""[..], Form::Jsonl), Err(ReadError::Empty)));
        let long = format!("{{\"prompt\":\"{}\",\"response\":\"x\"}}", "a".repeat(MESSAGE_BYTES_MAX + 1));
        assert!(matches!(parse(&long).bad[0].reason, RowError::MessageLong { index: 0, .. }));
        let line = "x".repeat(LINE_BYTES_MAX + 1);
        let good = r#"{"prompt":"a","response":"b"}"#;
        let parsed = parse(&format!("{line}\n{good}\n"));
        assert_eq!(parsed.bad[0].reason, RowError::LineLong);
        assert_eq!(parsed.samples.len(), 1);
        let parsed = read(&b"\xff\xfe\n{\"prompt\":\"a\",\"response\":\"b\"}"[..], Form::Jsonl).unwrap();
        assert_eq!((parsed.bad[0].reason == RowError::NotText, parsed.samples.len()), (true, 1));
    }

    #[test]
    fn the_store_keeps_each_sample_once_and_a_draw_is_the_seeds() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let row = |i: usize| format!("{{\"prompt\":\"p{i}\",\"response\":\"r\"}}\n");
        let first = parse(&(0..5).map(row).collect::<String>());
        assert_eq!(keep(&store, &first).unwrap(), 5);
        assert_eq!(keep(&store, &parse(&(3..8).map(row).collect::<String>())).unwrap(), 3);
        let all = stored(&store).unwrap();
        assert_eq!(all.len(), 8);
        let drawn = draw(all.clone(), 3, 7);
        assert_eq!(drawn, draw(all.clone(), 3, 7));
        assert_eq!(drawn.len(), 3);
        assert_eq!(draw(all, 100, 7).len(), 8);
    }

    #[test]
    fn the_debug_form_holds_no_text() {
        let sample = Sample::from_pair("secret words".into(), "other words".into()).unwrap();
        assert!(!format!("{sample:?}").contains("words"));
    }

    #[test]
    fn a_sample_is_named_by_its_content() {
        let a = Sample::from_pair("a".into(), "b".into()).unwrap();
        let text = serde_json::to_string(&a).unwrap();
        assert_eq!(serde_json::from_str::<Sample>(&text).unwrap().id(), a.id());
        assert_ne!(Sample::from_pair("a".into(), "c".into()).unwrap().id(), a.id());
        assert!(serde_json::from_str::<Sample>(r#"{"messages":[]}"#).is_err());
    }
}
