//! Stage 1, **sample**: a person's conversations, checked, drawn by the round's seed.
//!
//! From `forms.rs`; to `filter.rs`, which judges each [`Sample`]. `kept.rs` keeps them in the state directory.

use std::{borrow::Cow, collections::HashMap, fmt};

use commonweal_runtime::{Message, Role};
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// One message. Far above any context window that a device trains on.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Turns of one conversation.
pub const MESSAGES_MAX: usize = 128;
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

impl SampleId {
    pub(crate) const fn bytes(self) -> [u8; 16] {
        self.0
    }

    pub(crate) const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

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
    pub fn new(turns: Vec<Turn>, rejected: Option<String>) -> Result<Self, SampleError> {
        if turns.len() > MESSAGES_MAX {
            return Err(SampleError::Messages { messages: turns.len() });
        }
        for (index, turn) in turns.iter().enumerate() {
            if turn.content.trim().is_empty() {
                return Err(SampleError::EmptyMessage { index });
            }
            if turn.content.len() > MESSAGE_BYTES_MAX {
                return Err(SampleError::MessageLong { index, bytes: turn.content.len() });
            }
        }
        if rejected.as_ref().is_some_and(|text| text.len() > MESSAGE_BYTES_MAX) {
            return Err(SampleError::MessageLong {
                index: turns.len(),
                bytes: rejected.as_ref().map_or(0, String::len),
            });
        }
        if !turns.iter().any(|turn| turn.role == Role::User) {
            return Err(SampleError::NoUser);
        }
        match turns.last() {
            Some(Turn { role: Role::Assistant, .. }) => Ok(Self { turns, rejected }),
            _ => Err(SampleError::NoReply),
        }
    }

    /// One question and one answer.
    pub fn from_pair(prompt: String, response: String) -> Result<Self, SampleError> {
        let (user, assistant) = (Role::User, Role::Assistant);
        Self::new(
            vec![Turn { role: user, content: prompt }, Turn { role: assistant, content: response }],
            None,
        )
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

    /// What was said before the last reply and after the one before it: what a guard judges the reply against.
    pub fn prompt(&self) -> Cow<'_, str> {
        self.exchanges().pop().map_or(Cow::Borrowed(""), |exchange| exchange.prompt)
    }

    /// Every reply of the model with what was said before it, so that no turn goes unread: a person may say the harmful
    /// half first and "go on" next, and a system's turn asks as well as a person's.
    pub fn exchanges(&self) -> Vec<Exchange<'_>> {
        let mut exchanges: Vec<Exchange<'_>> = Vec::new();
        for (turn, said) in self.turns.iter().enumerate() {
            let open = exchanges.last_mut();
            if said.role == Role::Assistant {
                if let Some(exchange) = open {
                    exchange.replies.push((turn, &said.content));
                } else {
                    let (prompt, replies) = (Cow::Borrowed(""), vec![(turn, said.content.as_str())]);
                    exchanges.push(Exchange { prompt, replies });
                }
            } else if let Some(exchange) = open.filter(|exchange| exchange.replies.is_empty()) {
                let prompt = exchange.prompt.to_mut();
                prompt.push_str("\n\n");
                prompt.push_str(&said.content);
            } else {
                let (prompt, replies) = (Cow::Borrowed(said.content.as_str()), Vec::new());
                exchanges.push(Exchange { prompt, replies });
            }
        }
        exchanges
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

/// The turns of person and system between two replies, and the replies to them.
#[derive(Clone, PartialEq, Eq)]
pub struct Exchange<'s> {
    /// The turns, a blank line between each; nothing where the conversation begins with a reply.
    pub prompt: Cow<'s, str>,
    /// Each reply's turn and text; none where the conversation ends with the person.
    pub replies: Vec<(usize, &'s str)>,
}

impl fmt::Debug for Exchange<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exchange({} bytes, {} replies)", self.prompt.len(), self.replies.len())
    }
}

/// A row as it stands in a file of ours.
#[derive(Serialize, Deserialize)]
pub(crate) struct Row {
    messages: Vec<Turn>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rejected_response: Option<String>,
}

impl TryFrom<Row> for Sample {
    type Error = SampleError;
    fn try_from(row: Row) -> Result<Self, SampleError> {
        Self::new(row.messages, row.rejected_response)
    }
}

impl From<Sample> for Row {
    fn from(sample: Sample) -> Self {
        Self { messages: sample.turns, rejected_response: sample.rejected }
    }
}

/// Why a conversation is no sample.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
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

/// The samples of these names, 16 bytes each, in that order; none if one of them is not there.
pub(crate) fn pick(all: &[Sample], names: &[u8]) -> Option<Vec<Sample>> {
    let (names, rest) = names.as_chunks();
    if names.is_empty() || !rest.is_empty() {
        return None;
    }
    let known: HashMap<SampleId, &Sample> = all.iter().map(|sample| (sample.id(), sample)).collect();
    names.iter().map(|name| known.get(&SampleId::from_bytes(*name)).copied().cloned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(prompt: &str) -> Sample {
        Sample::from_pair(prompt.into(), "r".into()).unwrap()
    }

    #[test]
    fn a_draw_is_the_seeds() {
        let all: Vec<Sample> = (0..8).map(|i| sample(&format!("p{i}"))).collect();
        let drawn = draw(all.clone(), 3, 7);
        assert_eq!(drawn, draw(all.clone(), 3, 7));
        assert_eq!(drawn.len(), 3);
        assert_eq!(draw(all.clone(), 100, 7).len(), 8);
        // Named, they are the same among more, and none if one is missing.
        let names: Vec<u8> = drawn.iter().flat_map(|sample| sample.id().bytes()).collect();
        let more = [vec![sample("another")], all.clone()].concat();
        assert_eq!(pick(&more, &names), Some(drawn.clone()));
        let less: Vec<Sample> = all.into_iter().filter(|sample| *sample != drawn[1]).collect();
        assert_eq!((pick(&less, &names), pick(&more, &names[1..]), pick(&more, &[])), (None, None, None));
    }

    #[test]
    fn the_debug_form_holds_no_text() {
        let sample = Sample::from_pair("secret words".into(), "other words".into()).unwrap();
        assert!(!format!("{sample:?}").contains("words"));
    }

    #[test]
    fn every_turn_is_in_an_exchange_and_every_reply_has_its_prompt() {
        let sample = |turns: &[(Role, &str)]| {
            let turns = turns.iter().map(|(role, text)| Turn { role: *role, content: (*text).into() });
            Sample::new(turns.collect(), None).unwrap()
        };
        let (system, user, assistant) = (Role::System, Role::User, Role::Assistant);
        let shown = |sample: &Sample| -> Vec<(String, Vec<(usize, String)>)> {
            let exchanges = sample.exchanges().into_iter();
            let owned = |(turn, text): (usize, &str)| (turn, text.to_owned());
            exchanges
                .map(|one| (one.prompt.into_owned(), one.replies.into_iter().map(owned).collect()))
                .collect()
        };
        let reply = |turn, text: &str| (turn, text.to_owned());
        let halves = sample(&[(user, "harm"), (user, "go on"), (assistant, "r")]);
        assert_eq!(shown(&halves), [("harm\n\ngo on".into(), vec![reply(2, "r")])]);
        assert_eq!(halves.prompt(), "harm\n\ngo on");
        let several = sample(&[
            (assistant, "hello"),
            (system, "s"),
            (user, "a"),
            (assistant, "b"),
            (assistant, "b2"),
            (system, "t"),
            (user, "c"),
            (assistant, "d"),
        ]);
        assert_eq!(
            shown(&several),
            [
                (String::new(), vec![reply(0, "hello")]),
                ("s\n\na".into(), vec![reply(3, "b"), reply(4, "b2")]),
                ("t\n\nc".into(), vec![reply(7, "d")]),
            ]
        );
        assert_eq!(several.prompt(), "t\n\nc");
        assert!(!format!("{:?}", halves.exchanges()).contains("harm"));
    }

    #[test]
    fn a_sample_is_named_by_its_content() {
        let a = Sample::from_pair("a".into(), "b".into()).unwrap().with_response("c".into());
        let text = serde_json::to_string(&a).unwrap();
        assert_eq!(serde_json::from_str::<Sample>(&text).unwrap(), a);
        assert_eq!(serde_json::from_str::<Sample>(&text).unwrap().id(), a.id());
        assert_ne!(Sample::from_pair("a".into(), "c".into()).unwrap().id(), a.id());
        assert!(serde_json::from_str::<Sample>(r#"{"messages":[]}"#).is_err());
    }
}
