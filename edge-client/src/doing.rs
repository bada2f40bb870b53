//! What the device does, in one sentence, for whoever asks `status`.
//!
//! `run` and the stages tell it as they go; it lies in a file that is written often and need not outlive anything.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use commonweal_transport::Clock;
use serde::{Deserialize, Serialize};

use crate::{
    events::{Done, Event},
    notify,
    store::Store,
};

const FILE: &str = "doing.json";

/// What was told last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Doing {
    /// "waits: it runs on its battery".
    pub sentence: String,
    /// Since when, in milliseconds since 1970.
    pub since_ms: u64,
}

/// When this process last said or did something.
static ALIVE: Mutex<Option<Instant>> = Mutex::new(None);

/// Something went on, if only the waiting that was meant.
pub(crate) fn goes_on() {
    *ALIVE.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
}

/// For how long nothing did.
pub(crate) fn silence() -> Duration {
    ALIVE.lock().unwrap_or_else(PoisonError::into_inner).map_or(Duration::ZERO, |at| at.elapsed())
}

/// Tells what the device does from now on. That it cannot be told is no reason to stop.
pub(crate) fn tell(store: &Store, sentence: String, now_ms: u64) {
    goes_on();
    let before = told(store).filter(|before| before.sentence == sentence);
    if before.is_some() {
        return;
    }
    notify::status(&sentence);
    let doing = Doing { sentence, since_ms: now_ms };
    let written = serde_json::to_vec(&doing).map_err(std::io::Error::other);
    if let Err(error) = written.and_then(|bytes| store.write_fleeting(FILE, &bytes)) {
        tracing::debug!("what the device does cannot be told: {error}");
    }
}

/// What was told last, by a process that may have ended since.
pub fn told(store: &Store) -> Option<Doing> {
    serde_json::from_slice(&store.read(FILE).ok()??).ok()
}

/// Tells what comes after an event of a round.
pub(crate) fn after_event(store: &Store, event: &Event) {
    if let Some(sentence) = after(event) {
        tell(store, sentence, Clock::system().unix_ms());
    }
}

fn after(event: &Event) -> Option<String> {
    match event {
        Event::Step { round, step, .. } => Some(format!("round {round}: trains, step {step} done")),
        Event::Stage { round, done, .. } => {
            let next = match done {
                Done::Sample { samples } => format!("the guard judges {samples} samples"),
                Done::Filter { flagged, .. } => format!("rewrites {flagged} samples"),
                Done::Revise { .. } => "begins to train".to_owned(),
                Done::Train { .. } => "packs its update".to_owned(),
                Done::Compress { bytes, .. } => format!("delivers its update of {bytes} bytes"),
                Done::Upload { .. } => "has delivered its update".to_owned(),
                Done::Refused { reason } => format!("its update was refused: {reason}"),
                Done::Install { version } => format!("has installed release {version}"),
            };
            Some(format!("round {round}: {next}"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_counts_from_when_it_was_first_said() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        assert_eq!(told(&store), None);
        for (sentence, at, since) in [("waits", 1, 1), ("waits", 2, 1), ("trains", 3, 3)] {
            tell(&store, sentence.into(), at);
            assert_eq!(told(&store), Some(Doing { sentence: sentence.into(), since_ms: since }));
        }
        std::fs::write(store.path(FILE), b"{").unwrap();
        assert_eq!(told(&store), None);
    }

    #[test]
    fn a_stage_that_is_done_leads_to_the_next() {
        let event = Event::Stage { round: 3, seconds: 1.0, done: Done::Sample { samples: 7 } };
        assert_eq!(after(&event).unwrap(), "round 3: the guard judges 7 samples");
        assert_eq!(after(&Event::Paused), None);
    }
}
