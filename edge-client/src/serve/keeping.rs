//! Chats on their way to the disk: what `keep.rs` holds is written by `home.rs` once it is over. What could not be written,
//! for want of room, stays in memory and is tried again. `routes.rs` says what was said; `serve.rs` looks now and then.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use commonweal_runtime::Message;

use super::{home::Home, keep::Conversations};
use crate::{era::Era, sample::Sample, store::StoreError};

/// Looks for samples that are past their time so often.
const EXPIRE: Duration = Duration::from_secs(24 * 3600);
/// After that failed: each look reads all samples.
const EXPIRE_AGAIN: Duration = Duration::from_secs(3600);

/// See the module.
#[derive(Debug)]
pub(super) struct Keeping {
    pub(super) home: Home,
    conversations: Mutex<Conversations>,
    /// Held while something is written, so that nothing is twice: when it is looked again for what is past its time.
    writing: Mutex<Option<Instant>>,
}

impl Keeping {
    pub(super) fn new(home: Home) -> Self {
        Self { home, conversations: Mutex::default(), writing: Mutex::default() }
    }

    /// The era in which a chat is asked for that is to be kept; none if it cannot be: it goes on with what was forgotten,
    /// or too much waits to be written already.
    pub(super) fn era_of(&self, asked: &[Message]) -> Option<Era> {
        let open = told(self.enter())?;
        (!open.is_barred(asked) && !open.is_full()).then(|| open.era())
    }

    /// Holds a conversation until it is over.
    pub(super) fn hear(&self, asked: &[Message], answer: &str, era: Era) {
        if let Some(mut open) = told(self.enter()) {
            open.hear(asked, answer, era, Instant::now());
        }
    }

    /// Lets go of what was forgotten.
    pub(super) fn let_go(&self) {
        drop(self.enter());
    }

    /// What is held, and may be in the era that it is. Where that cannot be told, nothing is kept.
    fn enter(&self) -> Result<MutexGuard<'_, Conversations>, StoreError> {
        let mut open = self.held();
        // Behind the lock, or one that was seen before could be entered after a later one.
        open.enter(self.home.era()?);
        Ok(open)
    }

    fn held(&self) -> MutexGuard<'_, Conversations> {
        self.conversations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what is over by now and what could not be written before; once a day takes away what is past its time.
    pub(super) fn tend(&self, now: Instant) {
        let mut next = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if next.is_none_or(|next| now >= next) {
            match self.home.expire() {
                Ok(true) => *next = Some(now + EXPIRE),
                // Whoever works here looks as well, but may end before the day does: this looks again each time.
                Ok(false) => {}
                Err(error) => {
                    tracing::error!("samples past their time are still there: {error}");
                    *next = Some(now + EXPIRE_AGAIN);
                }
            }
        }
        if let Some(left) = self.write(|open| open.over(now)) {
            tracing::error!("{left} chats wait in memory, and are tried again");
        }
    }

    /// Writes all of it: the endpoint ends.
    pub(super) fn end(&self) {
        let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(left) = self.write(Conversations::all) {
            tracing::error!("{left} chats are lost");
        }
    }

    /// How many chats could not be written, if any. Counts go to the log, never text.
    fn write(&self, take: impl FnOnce(&mut Conversations) -> Vec<Sample>) -> Option<usize> {
        let (era, samples) = told(self.enter()).map(|mut open| (open.era(), take(&mut open)))?;
        if samples.is_empty() {
            return None;
        }
        let count = samples.len();
        match self.home.keep(&samples, era) {
            Ok(Some(added)) => {
                tracing::info!("{added} chats are samples now");
                self.held().written();
                return None;
            }
            Ok(None) => tracing::info!("{count} chats were said before everything was forgotten"),
            Err(error) => {
                tracing::error!("{count} chats could not be kept: {:#}", anyhow::Error::from(error));
            }
        }
        self.put_back(samples, era)
    }

    /// How many of them wait on, if any. If everything was forgotten meanwhile, none does, and a later request that goes on
    /// with one is not kept either.
    fn put_back(&self, samples: Vec<Sample>, era: Era) -> Option<usize> {
        let count = samples.len();
        // By the era that it is now: the store may have found out first that another has begun. While that cannot be told,
        // they wait.
        let entered = told(self.enter());
        let mut open = entered.unwrap_or_else(|| self.held());
        open.put_back(samples, era);
        (open.era() == era).then_some(count)
    }
}

/// What could be had, or a word on the log.
fn told<T>(had: Result<T, StoreError>) -> Option<T> {
    had.inspect_err(|error| tracing::error!("chats cannot be kept: {error}")).ok()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::{
        budget::BudgetPolicy,
        forget, kept,
        keys::{self, KeyPlace},
        policy::{Policy, StorePolicy},
        rows::Parsed,
        store::Store,
        units::{Limit, Span},
    };

    fn keeping(store: &Store, policy: &Policy) -> Keeping {
        let directory = store.path("");
        let key = KeyPlace::File(directory.join(keys::FILE));
        Keeping::new(Home::open(&directory, key, policy).unwrap())
    }

    fn said(keeping: &Keeping, text: &str) {
        let asked = [Message::user(text)];
        keeping.hear(&asked, "b", keeping.era_of(&asked).unwrap());
    }

    fn texts(store: &Store) -> Vec<String> {
        kept::samples(store).unwrap().iter().map(|sample| sample.turns()[0].content.clone()).collect()
    }

    /// An endpoint that has no room until this file is removed.
    fn without_room(store: &Store) -> (Keeping, PathBuf) {
        let filler = store.path("filler");
        std::fs::write(&filler, vec![0; 100_000]).unwrap();
        let disk = Limit::of(store.disk_bytes().unwrap());
        let budget = BudgetPolicy { disk, ..BudgetPolicy::default() };
        (keeping(store, &Policy { budget, ..Policy::default() }), filler)
    }

    #[test]
    fn what_finds_no_room_is_tried_again_until_it_does() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let (keeping, filler) = without_room(&store);
        let later = Instant::now() + Duration::from_secs(3600);
        said(&keeping, "one");
        keeping.tend(later);
        said(&keeping, "two");
        keeping.tend(later);
        assert!(texts(&store).is_empty());
        std::fs::remove_file(&filler).unwrap();
        keeping.tend(later);
        assert_eq!(texts(&store), ["one", "two"]);
        // Once.
        keeping.end();
        assert_eq!(texts(&store).len(), 2);
    }

    #[test]
    fn what_waits_to_be_written_goes_when_everything_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let (keeping, filler) = without_room(&store);
        said(&keeping, "one");
        keeping.tend(Instant::now() + Duration::from_secs(3600));
        std::fs::remove_file(&filler).unwrap();
        forget::wish_all(&store).unwrap();
        forget::carry_out(&store).unwrap();
        said(&keeping, "two");
        keeping.end();
        assert_eq!(texts(&store), ["two"]);
    }

    #[test]
    fn what_is_forgotten_while_it_is_being_written_is_not_kept_when_it_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let keeping = keeping(&store, &Policy::default());
        said(&keeping, "one");
        let asked = |text: &str| [Message::user(text), Message::assistant("b"), Message::user("on")];
        let left = keeping.write(|open| {
            let taken = open.all();
            forget::wish_all(&store).unwrap();
            forget::carry_out(&store).unwrap();
            // A request that comes before the writing has ended.
            open.enter(keeping.home.era().unwrap());
            assert!(open.is_barred(&asked("one")));
            taken
        });
        assert_eq!(left, None);
        assert_eq!(keeping.era_of(&asked("one")), None);
        assert!(keeping.era_of(&asked("two")).is_some());
        keeping.end();
        assert!(texts(&store).is_empty());
    }

    #[test]
    fn samples_past_their_time_go_where_only_the_endpoint_runs() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open_shared(directory.path()).unwrap();
        let add = |text: &str| {
            let old = vec![(0, Sample::from_pair(text.into(), "r".into()).unwrap())];
            kept::keep(&store, &Parsed { good: old, bad: Vec::new() }, "a", 1_000).unwrap();
        };
        let policy =
            Policy { store: StorePolicy { keep: Some(Span::of_seconds(3600)) }, ..Policy::default() };
        let keeping = keeping(&store, &policy);
        let start = Instant::now();
        add("old");
        // `run` holds the directory, and does so itself.
        let working = Store::open(directory.path()).unwrap();
        keeping.tend(start);
        drop(working);
        let visiting = store.hold_visit().unwrap();
        keeping.tend(start);
        drop(visiting);
        assert_eq!(texts(&store), ["old"]);
        // At the next look that can be made, and from then on once a day.
        keeping.tend(start);
        assert!(texts(&store).is_empty());
        add("older");
        keeping.tend(start + EXPIRE / 2);
        assert_eq!(texts(&store), ["older"]);
        keeping.tend(start + EXPIRE);
        assert!(texts(&store).is_empty());
    }
}
