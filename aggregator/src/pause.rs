//! Fault points for kill tests: with `COMMONWEAL_PAUSE_AT=POINT` the process halts there for good and says so with
//! a `paused` event, so that a test can `kill -9` at exactly that place.
//!
//! Points, in the order of a round: `upload` (a chunk is durable), `receipt` (an update is taken, its receipt not yet
//! sent), `merge` (about to merge), `merged` (the candidate is stored, the state not yet saved), `align`, `evaluate`,
//! `publish` (about to move the head), `published` (the head moved, the round not yet recorded). Of `keys rotate`: `drawn`
//! (a new key in memory), `written` (on disk beside the old one), `renamed` (in its place).

use crate::events::{Event, Events};

/// Name of the variable.
pub const VARIABLE: &str = "COMMONWEAL_PAUSE_AT";

/// Where to halt, if anywhere.
#[derive(Clone, Debug, Default)]
pub struct PausePoint(Option<String>);

impl PausePoint {
    /// As the environment says.
    pub fn from_environment() -> Self {
        Self(std::env::var(VARIABLE).ok().filter(|point| !point.is_empty()))
    }

    /// Halts if this is the point.
    pub fn here(&self, point: &str, events: &Events) {
        if self.0.as_deref() == Some(point) {
            events.tell(&Event::Paused { at: point.to_owned(), process: std::process::id() });
            loop {
                std::thread::park();
            }
        }
    }
}
