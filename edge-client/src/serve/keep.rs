//! Chats that may become samples. Nothing is, unless the owner says so twice: in the policy (`[serve] keep_chats`), and
//! for all requests (`--keep-chats`) or for one (the header below). A conversation is kept once, as long as it got: a
//! request that goes on with an earlier one takes its place. `routes.rs` tells what was said.
//!
//! What is held at a `forget --all`, or is answered meanwhile, is not kept after it, nor is a later request that goes on
//! with the whole of it, until the endpoint ends. What had been written by then, or was not to be kept, is known no more:
//! a request that says it again is kept with it.

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
/// Chats that are over and wait to be written, and their bytes. From then on no chat is begun to be kept.
const UNWRITTEN_MAX: usize = 256;
const UNWRITTEN_BYTES_MAX: usize = 8 << 20;
/// Conversations of before a `forget --all` that are known when they go on; the oldest makes room. One `forget` bars what
/// is written or waits to be, what is open, and as many that are answered meanwhile, and finds room for all of them.
const BARRED_MAX: usize = UNWRITTEN_MAX + 2 * OPEN_MAX;

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
    /// What is over and was not written yet.
    unwritten: Vec<Sample>,
    /// What is being written, by its hash alone.
    writing: Vec<blake3::Hash>,
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
            // The older first: they make room first.
            for hash in std::mem::take(&mut self.writing) {
                self.bar_hash(hash);
            }
            for sample in std::mem::take(&mut self.unwritten) {
                self.bar(sample.turns());
            }
            for (turns, _) in std::mem::take(&mut self.open) {
                self.bar(&turns);
            }
        }
    }

    fn bar(&mut self, turns: &[Turn]) {
        if let Some(hash) = hashes(turns).last() {
            self.bar_hash(hash);
        }
    }

    fn bar_hash(&mut self, hash: blake3::Hash) {
        if self.barred.len() == BARRED_MAX {
            self.barred.pop_front();
        }
        self.barred.push_back(hash);
    }

    /// Whether this goes on with something from before a `forget --all`.
    pub(super) fn is_barred(&self, asked: &[Message]) -> bool {
        !self.barred.is_empty() && hashes(&turns_of(asked)).any(|hash| self.barred.contains(&hash))
    }

    /// Whether as much waits to be written as may.
    pub(super) fn is_full(&self) -> bool {
        let bytes = |sample: &Sample| sample.turns().iter().map(|turn| turn.content.len()).sum::<usize>();
        self.writing.len() + self.unwritten.len() >= UNWRITTEN_MAX
            || self.unwritten.iter().map(bytes).sum::<usize>() >= UNWRITTEN_BYTES_MAX
    }

    /// What was taken is written.
    pub(super) fn written(&mut self) {
        self.writing.clear();
    }

    /// What was taken and could not be written waits on, unless everything was forgotten meanwhile.
    pub(super) fn put_back(&mut self, samples: Vec<Sample>, era: Era) {
        self.writing.clear();
        if era == self.era {
            self.unwritten.splice(0..0, samples);
        }
    }

    /// A conversation with its answer, asked for in this era. If there are too many, the quietest is over.
    pub(super) fn hear(&mut self, asked: &[Message], answer: &str, era: Era, now: Instant) {
        let mut turns = turns_of(asked);
        turns.push(Turn { role: Role::Assistant, content: answer.to_owned() });
        if era != self.era {
            return self.bar(&turns);
        }
        // What is no sample now is none later: too long, or with an empty turn.
        if turns.len() > MESSAGES_MAX || Sample::new(turns.clone(), None).is_err() {
            return;
        }
        self.open.retain(|(earlier, _)| !turns.starts_with(earlier));
        self.open.push((turns, now));
        if self.open.len() > OPEN_MAX
            && let Some(quietest) = self.open.iter().map(|(_, last)| *last).min()
        {
            self.end(|last| last == quietest);
        }
    }

    /// What is over by now, with what was before.
    pub(super) fn over(&mut self, now: Instant) -> Vec<Sample> {
        self.end(|last| now.saturating_duration_since(last) >= QUIET);
        self.take()
    }

    /// Everything: the endpoint ends.
    pub(super) fn all(&mut self) -> Vec<Sample> {
        self.end(|_| true);
        self.take()
    }

    /// To be written: until that is done, or they are put back, they are known if everything is forgotten.
    fn take(&mut self) -> Vec<Sample> {
        let taken = std::mem::take(&mut self.unwritten);
        self.writing = taken.iter().filter_map(|sample| hashes(sample.turns()).last()).collect();
        taken
    }

    fn end(&mut self, is_over: impl Fn(Instant) -> bool) {
        let over = self.open.extract_if(.., |(_, last)| is_over(*last));
        self.unwritten.extend(over.filter_map(|(turns, _)| Sample::new(turns, None).ok()));
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
        open.hear(&first, "b", Era::default(), start);
        open.hear(&second, "d", Era::default(), start + QUIET / 2);
        open.hear(&other, "e", Era::default(), start + QUIET / 2);
        assert!(open.over(start + QUIET).is_empty());
        assert_eq!(texts(&open.over(start + QUIET * 2)), ["a|b|c|d", "a|x|c|e"]);
        assert!(open.all().is_empty());
    }

    #[test]
    fn what_is_no_sample_is_not_held_and_the_quietest_makes_room() {
        let (start, mut open) = (Instant::now(), Conversations::default());
        open.hear(&[Message::user(" ")], "b", Era::default(), start);
        open.hear(&[Message::system("only")], "b", Era::default(), start);
        assert!(open.all().is_empty());
        let at = |number: usize| start + Duration::from_secs(number as u64);
        for number in 0..OPEN_MAX {
            open.hear(&[Message::user(format!("q{number}"))], "b", Era::default(), at(number));
        }
        assert!(open.over(at(OPEN_MAX)).is_empty());
        open.hear(&[Message::user("one more")], "b", Era::default(), at(OPEN_MAX));
        assert_eq!(texts(&open.over(at(OPEN_MAX))), ["q0|b"]);
        assert_eq!(open.all().len(), OPEN_MAX);
    }

    #[test]
    fn what_waits_to_be_written_is_bounded_by_number_and_by_bytes() {
        let sample = |text: String| Sample::from_pair(text, "r".into()).unwrap();
        let mut open = Conversations::default();
        open.put_back(
            (1..UNWRITTEN_MAX).map(|number| sample(format!("q{number}"))).collect(),
            Era::default(),
        );
        assert!(!open.is_full());
        open.put_back(vec![sample("first".into())], Era::default());
        assert!(open.is_full());
        // What comes is behind what came before.
        assert_eq!(texts(&open.all())[..2], ["first|r", "q1|r"]);
        assert!(open.is_full(), "they are being written");
        open.written();
        assert!(!open.is_full());
        let large = "x".repeat(crate::sample::MESSAGE_BYTES_MAX);
        open.put_back(vec![sample(large.clone()); UNWRITTEN_BYTES_MAX / large.len()], Era::default());
        assert!(open.unwritten.len() < UNWRITTEN_MAX && open.is_full());
    }

    /// The era before everything is forgotten, and the one after it.
    fn eras() -> (Era, Era) {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let before = Era::now(&store).unwrap();
        forget::wish_all(&store).unwrap();
        forget::carry_out(&store).unwrap();
        (before, Era::now(&store).unwrap())
    }

    fn again(first: &str, answer: &str, second: &str) -> [Message; 3] {
        [Message::user(first), Message::assistant(answer), Message::user(second)]
    }

    #[test]
    fn what_was_said_before_everything_was_forgotten_is_not_kept_when_it_goes_on() {
        let (now, mut open) = (Instant::now(), Conversations::default());
        let (before, after) = eras();
        open.enter(before);
        let held = [Message::user("a")];
        open.hear(&held, "b", before, now);
        open.enter(after);
        // Asked before, and answered after.
        open.hear(&[Message::user("x")], "y", before, now);
        assert!(open.all().is_empty());
        assert!(open.is_barred(&again("a", "b", "c")) && open.is_barred(&again("x", "y", "c")));
        // The same question anew is another conversation.
        assert!(!open.is_barred(&held) && !open.is_barred(&again("a", "z", "c")));
        open.hear(&held, "b", after, now);
        assert_eq!(texts(&open.all()), ["a|b"]);
    }

    #[test]
    fn what_had_been_written_before_everything_was_forgotten_is_known_no_more() {
        let (now, mut open) = (Instant::now(), Conversations::default());
        let (before, after) = eras();
        open.hear(&[Message::user("a")], "b", before, now);
        assert_eq!(texts(&open.all()), ["a|b"]);
        open.written();
        open.enter(after);
        let on = again("a", "b", "c");
        assert!(!open.is_barred(&on));
        open.hear(&on, "d", after, now);
        assert_eq!(texts(&open.all()), ["a|b|c|d"]);
    }

    /// So many wait to be written, as many are held as can be open, and as many are answered when everything is forgotten.
    /// Conversations in the order in which they were said.
    fn forgotten_with(unwritten: usize) -> (Conversations, Vec<String>) {
        let (now, mut open) = (Instant::now(), Conversations::default());
        let (before, after) = eras();
        let said: Vec<String> = (0..unwritten + 2 * OPEN_MAX).map(|number| format!("q{number}")).collect();
        let (waiting, others) = said.split_at(unwritten);
        let waiting = waiting.iter().map(|text| Sample::from_pair(text.clone(), "r".into()).unwrap());
        open.put_back(waiting.collect(), before);
        let (held, answered) = others.split_at(OPEN_MAX);
        for text in held {
            open.hear(&[Message::user(text.clone())], "r", before, now);
        }
        assert_eq!((open.unwritten.len(), open.open.len()), (unwritten, OPEN_MAX));
        open.enter(after);
        for text in answered {
            open.hear(&[Message::user(text.clone())], "r", before, now);
        }
        (open, said)
    }

    #[test]
    fn all_that_one_forget_bars_is_known_and_of_more_the_oldest_makes_room() {
        let is_barred = |open: &Conversations, text: &str| open.is_barred(&again(text, "r", "on"));
        let (open, said) = forgotten_with(UNWRITTEN_MAX);
        assert!(said.iter().all(|text| is_barred(&open, text)));
        let (open, said) = forgotten_with(UNWRITTEN_MAX + OPEN_MAX);
        let known: Vec<bool> = said.iter().map(|text| is_barred(&open, text)).collect();
        assert_eq!(known.iter().position(|&known| known), Some(OPEN_MAX));
        assert!(known[OPEN_MAX..].iter().all(|&known| known));
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
