//! A question that may take its time, asked on a thread of its own: who looks 40 times a second never waits for an answer.
//! Of `sensors.rs`.

use std::{
    fmt,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// Whoever waits for an answer waits for no longer; `bus.rs` gives up each of two questions after a second.
const PATIENCE: Duration = Duration::from_secs(3);
/// An answer that none has followed for so long is no answer any more.
const STALE: Duration = Duration::from_secs(10);

type Ask<T> = Box<dyn FnMut() -> Option<T> + Send>;

/// The question, and what was answered last. Its thread starts with the first wish for an answer.
pub(super) struct Asking<T> {
    name: &'static str,
    shared: Arc<Shared<T>>,
    unasked: Option<Ask<T>>,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    /// With when it was asked for.
    answer: Option<(Instant, Option<T>)>,
    /// Since when it is being asked for.
    asked: Option<Instant>,
    is_wanted: bool,
    is_over: bool,
}

impl<T: Copy + Send + 'static> Asking<T> {
    pub(super) fn of(name: &'static str, ask: impl FnMut() -> Option<T> + Send + 'static) -> Self {
        let state = State { answer: None, asked: None, is_wanted: false, is_over: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        Self { name, shared, unasked: Some(Box::new(ask)) }
    }

    /// Has it asked if that was longer ago than `again`.
    pub(super) fn wish(&mut self, again: Duration) {
        self.start();
        let oldest = Instant::now().checked_sub(again);
        let mut state = self.shared.state();
        if !state.asked.is_some_and(|asked| is_since(asked, oldest)) && !state.is_answered_since(oldest) {
            state.is_wanted = true;
            self.shared.changed.notify_all();
        }
    }

    /// The last answer, at once; one that is older than `again` is asked for meanwhile.
    pub(super) fn last(&mut self, again: Duration) -> Option<T> {
        self.wish(again);
        self.shared.state().last()
    }

    /// An answer that is no older than `again`, which is waited for, but not for ever.
    pub(super) fn fresh(&mut self, again: Duration) -> Option<T> {
        let oldest = Instant::now().checked_sub(again);
        self.wish(again);
        let is_missing = |state: &mut State<T>| !state.is_answered_since(oldest) && !state.is_over;
        let waited = self.shared.changed.wait_timeout_while(self.shared.state(), PATIENCE, is_missing);
        waited.unwrap_or_else(PoisonError::into_inner).0.last()
    }

    fn start(&mut self) {
        let Some(mut ask) = self.unasked.take() else { return };
        let shared = Arc::clone(&self.shared);
        let started = thread::Builder::new().name(self.name.to_owned()).spawn(move || {
            while let Some(asked) = shared.wished() {
                let answer = ask();
                let mut state = shared.state();
                state.answer = Some((asked, answer));
                state.asked = None;
                shared.changed.notify_all();
            }
        });
        if let Err(error) = started {
            tracing::debug!(%error, "{} is not asked: no thread", self.name);
            self.shared.state().is_over = true;
        }
    }
}

impl<T> Shared<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until an answer is wanted; nothing once nobody can want one.
    fn wished(&self) -> Option<Instant> {
        let is_idle = |state: &mut State<T>| !state.is_wanted && !state.is_over;
        let waited = self.changed.wait_while(self.state(), is_idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        if state.is_over {
            return None;
        }
        state.is_wanted = false;
        state.asked = Some(Instant::now());
        state.asked
    }
}

impl<T: Copy> State<T> {
    fn is_answered_since(&self, oldest: Option<Instant>) -> bool {
        self.answer.is_some_and(|(asked, _)| is_since(asked, oldest))
    }

    fn last(&self) -> Option<T> {
        self.answer.filter(|(asked, _)| asked.elapsed() < STALE).and_then(|(_, answer)| answer)
    }
}

/// Without an oldest, before which there was no time, everything is since.
fn is_since(asked: Instant, oldest: Option<Instant>) -> bool {
    oldest.is_none_or(|oldest| asked >= oldest)
}

impl<T> fmt::Debug for Asking<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Asking").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The thread ends behind the question that it is at; it is not waited for.
impl<T> Drop for Asking<T> {
    fn drop(&mut self) {
        self.shared.state().is_over = true;
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const AGES: Duration = Duration::from_secs(3600);

    fn until(what: &str, mut is_so: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !is_so() {
            assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn an_answer_that_does_not_come_is_waited_for_by_those_only_who_want_to() {
        let (answer, answers) = mpsc::sync_channel(8);
        let mut asking = Asking::of("a question", move || answers.recv().ok());
        answer.send(1).unwrap();
        assert_eq!(asking.fresh(AGES), Some(1), "the first is waited for");
        assert_eq!(asking.fresh(AGES), Some(1), "it is new enough");
        let begun = Instant::now();
        assert_eq!(asking.last(Duration::ZERO), Some(1));
        assert!(begun.elapsed() < PATIENCE / 2, "nobody waited");
        let begun = Instant::now();
        assert_eq!(asking.fresh(Duration::ZERO), Some(1));
        assert!(begun.elapsed() >= PATIENCE, "it was given up");
        answer.send(2).unwrap();
        until("the answer that comes late counts", || asking.last(AGES) == Some(2));
    }

    #[test]
    fn what_is_being_asked_is_not_asked_again_and_nobody_asks_when_it_is_over() {
        let asked = Arc::new(Mutex::new(0));
        let (answer, answers) = mpsc::sync_channel(8);
        let counts = Arc::clone(&asked);
        let mut asking = Asking::of("a question", move || {
            *counts.lock().unwrap() += 1;
            answers.recv().ok()
        });
        assert_eq!(asking.last(AGES), None);
        until("it is asked", || *asked.lock().unwrap() == 1);
        assert_eq!(asking.last(AGES), None);
        assert!(!asking.shared.state().is_wanted, "it would be asked again");
        answer.send(1).unwrap();
        until("it is answered", || asking.last(AGES) == Some(1));
        assert_eq!(*asked.lock().unwrap(), 1);
        drop(asking);
        until("its thread ends", || Arc::strong_count(&asked) == 1);
    }
}
