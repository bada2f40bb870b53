//! The last things that happened, in a sentence each, for the dashboard. In memory only, and few.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use commonweal_transport::Clock;
use serde::Serialize;

use crate::events::Event;

/// Sentences kept.
const KEPT_MAX: usize = 200;
/// Longest sentence.
const SENTENCE_CHARS_MAX: usize = 600;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Told {
    /// Its number, from 1 since the start.
    pub sequence: u64,
    /// When, ms since 1970.
    pub at_ms: u64,
    /// What kind of event: its name in `--json`.
    pub event: String,
    /// What happened.
    pub sentence: String,
}

/// See the module.
#[derive(Debug)]
pub struct Recent {
    clock: Clock,
    told: Mutex<VecDeque<Told>>,
}

impl Recent {
    /// Nothing yet.
    pub fn new(clock: Clock) -> Self {
        Self { clock, told: Mutex::default() }
    }

    /// Remembers an event, and forgets the oldest one.
    pub fn hear(&self, event: &Event) {
        let name =
            serde_json::to_value(event).ok().and_then(|value| value["event"].as_str().map(str::to_owned));
        let sentence = event.sentence().chars().take(SENTENCE_CHARS_MAX).collect();
        let at_ms = self.clock.unix_ms();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let sequence = told.back().map_or(1, |last| last.sequence + 1);
        if told.len() >= KEPT_MAX {
            told.pop_front();
        }
        told.push_back(Told { sequence, at_ms, event: name.unwrap_or_default(), sentence });
    }

    /// What was told after this number, oldest first.
    pub fn after(&self, sequence: u64) -> Vec<Told> {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.iter().filter(|told| told.sequence > sequence).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use commonweal_protocol::DeviceId;

    use super::*;

    #[test]
    fn the_oldest_is_forgotten_and_numbers_go_on() {
        let recent = Recent::new(Clock::manual(5));
        for number in 0..=KEPT_MAX {
            recent.hear(&Event::Enrolled { device: DeviceId([number as u8; 16]) });
        }
        let all = recent.after(0);
        assert_eq!((all.len(), all[0].sequence), (KEPT_MAX, 2));
        assert_eq!((all[0].at_ms, all[0].event.as_str()), (5, "enrolled"));
        assert_eq!(recent.after(KEPT_MAX as u64).len(), 1);
        recent.hear(&Event::Paused { at: "é".repeat(10_000), process: 1 });
        assert_eq!(recent.after(KEPT_MAX as u64 + 1)[0].sentence.chars().count(), SENTENCE_CHARS_MAX);
    }
}
