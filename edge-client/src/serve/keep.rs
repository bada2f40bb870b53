//! Chats that may become samples. Nothing is, unless the owner says so twice: in the policy (`[serve] keep_chats`), and
//! for all requests (`--keep-chats`) or for one (the header below). A conversation is kept once, as long as it got: a
//! request that goes on with an earlier one takes its place. What was said before a `forget --all` is not kept after it,
//! nor when a later request says it again. `routes.rs` tells what was said.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use axum::http::HeaderMap;
use commonweal_runtime::{Message, Role};

use crate::{
    era::Era,
    sample::{MESSAGES_MAX, Sample, Turn},
};

/// A client's own wish for one request: `yes` or `no`.
pub(super) const ASKED: &str = "x-commonweal-keep";
/// Whether the chat that is answered becomes a sample.
pub(super) const TOLD: &str = "x-commonweal-kept";
/// A conversation that nobody goes on with for so long is over.
const QUIET: Duration = Duration::from_secs(300);
/// Conversations that may go on at once; the quietest is over if there are more.
const OPEN_MAX: usize = 64;
/// Conversations of before a `forget --all` that are known when they go on; the oldest makes room.
const BARRED_MAX: usize = 256;

/// What the owner has agreed to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Consent {
    /// The policy's `[serve] keep_chats`.
    pub policy: bool,
    /// `--keep-chats`.
    pub all: bool,
}

impl Consent {
    /// Whether a request's chat is kept: the policy comes first, then the request's own wish, then the flag.
    pub(super) fn keeps(self, headers: &HeaderMap) -> bool {
        let wish = headers.get(ASKED).map(|wish| wish.as_bytes().eq_ignore_ascii_case(b"yes"));
        self.policy && wish.unwrap_or(self.all)
    }

    /// In plain words, for whoever starts the endpoint.
    pub fn words(self) -> &'static str {
        match self {
            Self { policy: false, .. } => "chats are not kept",
            Self { policy: true, all: false } => {
                "chats are not kept, but those whose request says \"x-commonweal-keep: yes\" become samples for training"
            }
            Self { policy: true, all: true } => {
                "chats become samples for training, but those whose request says \"x-commonweal-keep: no\""
            }
        }
    }
}

/// Conversations that may still go on, in memory only.
#[derive(Debug, Default)]
pub(super) struct Conversations {
    /// In which all that is held was said.
    era: Era,
    open: Vec<(Vec<Turn>, Instant)>,
    /// What was held when an era ended, by its hash alone.
    barred: VecDeque<blake3::Hash>,
}

impl Conversations {
    /// The era in which all that is held was said.
    pub(super) fn era(&self) -> Era {
        self.era
    }

    /// It is this era now: what was said in another goes.
    pub(super) fn enter(&mut self, era: Era) {
        if era != self.era {
            self.era = era;
            for (turns, _) in std::mem::take(&mut self.open) {
                self.bar(&turns);
            }
        }
    }

    fn bar(&mut self, turns: &[Turn]) {
        if self.barred.len() == BARRED_MAX {
            self.barred.pop_front();
        }
        self.barred.extend(hashes(turns).last());
    }

    /// Whether this goes on with something from before a `forget --all`.
    pub(super) fn is_barred(&self, asked: &[Message]) -> bool {
        !self.barred.is_empty() && hashes(&turns_of(asked)).any(|hash| self.barred.contains(&hash))
    }

    /// A conversation with its answer, asked for in this era; gives what is over because there are too many.
    pub(super) fn hear(&mut self, asked: &[Message], answer: &str, era: Era, now: Instant) -> Option<Sample> {
        let mut turns = turns_of(asked);
        turns.push(Turn { role: Role::Assistant, content: answer.to_owned() });
        if era != self.era {
            self.bar(&turns);
            return None;
        }
        // What is no sample now is none later: too long, or with an empty turn.
        if turns.len() > MESSAGES_MAX || Sample::new(turns.clone(), None).is_err() {
            return None;
        }
        self.open.retain(|(earlier, _)| !turns.starts_with(earlier));
        self.open.push((turns, now));
        if self.open.len() <= OPEN_MAX {
            return None;
        }
        let quietest = (0..self.open.len()).min_by_key(|&index| self.open[index].1)?;
        Sample::new(self.open.swap_remove(quietest).0, None).ok()
    }

    /// What is over by now.
    pub(super) fn over(&mut self, now: Instant) -> Vec<Sample> {
        self.take(|last| now.saturating_duration_since(last) >= QUIET)
    }

    /// Everything: the endpoint ends.
    pub(super) fn all(&mut self) -> Vec<Sample> {
        self.take(|_| true)
    }

    fn take(&mut self, is_over: impl Fn(Instant) -> bool) -> Vec<Sample> {
        let over = self.open.extract_if(.., |(_, last)| is_over(*last));
        over.filter_map(|(turns, _)| Sample::new(turns, None).ok()).collect()
    }
}

fn turns_of(messages: &[Message]) -> Vec<Turn> {
    let turn = |message: &Message| Turn { role: message.role, content: message.content.clone() };
    messages.iter().map(turn).collect()
}

/// A hash of the first turn, of the first two, and so on.
fn hashes(turns: &[Turn]) -> impl Iterator<Item = blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    turns.iter().map(move |turn| {
        hasher.update(serde_json::json!(turn).to_string().as_bytes());
        hasher.finalize()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{forget, store::Store};

    fn texts(samples: &[Sample]) -> Vec<String> {
        let joined = |sample: &Sample| {
            let turns: Vec<&str> = sample.turns().iter().map(|turn| turn.content.as_str()).collect();
            turns.join("|")
        };
        samples.iter().map(joined).collect()
    }

    #[test]
    fn nothing_is_kept_but_by_the_policy_and_a_second_word() {
        let header = |wish: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(wish) = wish {
                headers.insert(ASKED, wish.parse().unwrap());
            }
            headers
        };
        let keeps = |policy, all, wish| Consent { policy, all }.keeps(&header(wish));
        for wish in [None, Some("yes"), Some("no")] {
            assert!(!keeps(false, false, wish) && !keeps(false, true, wish), "{wish:?}");
        }
        assert!(!keeps(true, false, None) && keeps(true, true, None));
        assert!(keeps(true, false, Some("yes")) && !keeps(true, true, Some("no")));
        assert!(!keeps(true, false, Some("maybe")));
        assert_eq!(Consent::default().words(), "chats are not kept");
    }

    #[test]
    fn a_conversation_is_kept_once_and_as_long_as_it_got() {
        let (start, mut open) = (Instant::now(), Conversations::default());
        let first = [Message::user("a")];
        let second = [Message::user("a"), Message::assistant("b"), Message::user("c")];
        let other = [Message::user("a"), Message::assistant("x"), Message::user("c")];
        assert!(open.hear(&first, "b", Era::default(), start).is_none());
        assert!(open.hear(&second, "d", Era::default(), start + QUIET / 2).is_none());
        assert!(open.hear(&other, "e", Era::default(), start + QUIET / 2).is_none());
        assert!(open.over(start + QUIET).is_empty());
        assert_eq!(texts(&open.over(start + QUIET * 2)), ["a|b|c|d", "a|x|c|e"]);
        assert!(open.all().is_empty());
    }

    #[test]
    fn what_is_no_sample_is_not_held_and_the_quietest_makes_room() {
        let (start, mut open) = (Instant::now(), Conversations::default());
        assert!(
            open.hear(&[Message::user(" ")], "b", Era::default(), start).is_none() && open.all().is_empty()
        );
        assert!(
            open.hear(&[Message::system("only")], "b", Era::default(), start).is_none()
                && open.all().is_empty()
        );
        let at = |number: usize| start + Duration::from_secs(number as u64);
        for number in 0..OPEN_MAX {
            assert!(
                open.hear(&[Message::user(format!("q{number}"))], "b", Era::default(), at(number)).is_none()
            );
        }
        let over = open.hear(&[Message::user("one more")], "b", Era::default(), at(OPEN_MAX)).unwrap();
        assert_eq!(texts(&[over]), ["q0|b"]);
        assert_eq!(open.all().len(), OPEN_MAX);
    }

    #[test]
    fn what_was_said_before_everything_was_forgotten_is_not_kept_when_it_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let (now, mut open) = (Instant::now(), Conversations::default());
        let before = Era::now(&store).unwrap();
        open.enter(before);
        let held = [Message::user("a")];
        assert!(open.hear(&held, "b", before, now).is_none());
        forget::wish_all(&store).unwrap();
        forget::carry_out(&store).unwrap();
        let after = Era::now(&store).unwrap();
        open.enter(after);
        // Asked before, and answered after.
        assert!(open.hear(&[Message::user("x")], "y", before, now).is_none());
        assert!(open.all().is_empty());
        let again =
            |first, answer, second| [Message::user(first), Message::assistant(answer), Message::user(second)];
        assert!(open.is_barred(&again("a", "b", "c")) && open.is_barred(&again("x", "y", "c")));
        // The same question anew is another conversation.
        assert!(!open.is_barred(&held) && !open.is_barred(&again("a", "z", "c")));
        assert!(open.hear(&held, "b", after, now).is_none());
        assert_eq!(texts(&open.all()), ["a|b"]);
    }

    #[test]
    fn no_more_of_before_is_remembered_than_the_bound() {
        let mut open = Conversations::default();
        let turn = |text: String| [Turn { role: Role::User, content: text }];
        for number in 0..=BARRED_MAX {
            open.bar(&turn(format!("q{number}")));
        }
        assert_eq!(open.barred.len(), BARRED_MAX);
        assert!(!open.is_barred(&[Message::user("q0")]) && open.is_barred(&[Message::user("q1")]));
    }
}
