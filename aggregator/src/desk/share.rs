//! The desk of several processes: each follows the one stored state and moves it by compare-and-set, and begins anew from
//! what it finds when another was faster.
//!
//! Updates come in through a *door*, a log whose newest entry says for which round, if any. An update is appended on
//! condition that the door has not moved since before its bytes were stored; whoever closes a round or deletes bytes shuts
//! the door first, and then sees every update that came in. Only who drives moves it. Where there is one process, a lock
//! does the same.
//!
//! Whoever takes the lead begins a *term*, in the same state: what another does after that as if it still drove (a stage's
//! result, a close, a record) is refused, since the term under which it was begun is over. Deletions cannot be refused so:
//! the door tells of them, and where nobody knows how they ended nothing is begun until they have.

use std::sync::RwLockReadGuard;
use std::time::{Duration, Instant};

use commonweal_protocol::RoundId;
use serde::{Deserialize, Serialize};

use super::state::{LOG, load};
use super::{Accepted, Desk, DeskError, Inner, Taken, decode_accepted, queue, received_event};
use crate::round::{Action, Event, Phase};
use crate::store::{Append, PAGE_MAX, StoreError, While};

/// The log of the door.
const DOOR: &str = "door";
/// How long an update waits for the door.
const DOOR_PATIENCE: Duration = Duration::from_secs(5);
const DOOR_LOOK: Duration = Duration::from_millis(100);
/// The inbox is looked through so often at most, and less often the more is in it.
const COUNT_MS: u64 = 200;
const COUNT_ITEMS_PER_MS: u64 = 5;
/// Times that a step is tried while others move the state.
pub(super) const TRIES: u32 = 50;

/// What the door's newest entry says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Stand {
    #[default]
    Shut,
    Open(RoundId),
    /// Shut, while bytes are deleted.
    Sweeping,
}

/// Where the door stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Door {
    sequence: u64,
    stand: Stand,
}

/// Held from before an update's bytes are stored until the inbox names them.
#[derive(Debug)]
pub enum Pass<'desk> {
    /// No sweep begins while it is held.
    Here(RwLockReadGuard<'desk, ()>),
    /// Void once the door has moved.
    Through {
        /// The round whose updates come in.
        round: RoundId,
        /// Where the door stood.
        sequence: u64,
    },
}

/// What of the desk only matters among several.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// Another process moved the state; what is here is to be read again.
    pub(super) is_behind: bool,
    /// This process drives, as far as it knows, and under this term.
    term: Option<u64>,
    /// Of who drives.
    door: Option<Door>,
    /// The round whose door was shut after its merge had begun.
    shut_for: Option<RoundId>,
    /// When what somebody was deleting, and did not end, is over.
    quiet_ms: Option<u64>,
    counted_ms: u64,
    counted: u64,
}

impl Desk {
    /// Whether other processes move the state too.
    pub fn is_shared(&self) -> bool {
        self.is_shared
    }

    /// Takes up what other processes did.
    pub fn look(&self) -> Result<(), DeskError> {
        if !self.is_shared {
            return Ok(());
        }
        self.follow(&mut self.lock())
    }

    pub(super) fn follow(&self, inner: &mut Inner) -> Result<(), DeskError> {
        if !self.is_shared {
            return Ok(());
        }
        let is_known = !inner.is_unsure && !inner.shared.is_behind;
        if is_known && self.storage.coord.scan(LOG, inner.sequence.saturating_add(1), 1)?.is_empty() {
            return Ok(());
        }
        (inner.durable, inner.sequence) = load(self.storage.coord.as_ref())?;
        let rounds = &inner.durable.rounds;
        (inner.work, inner.wake_ms) = rounds.outlook(&self.policy);
        inner.stop = rounds.is_over(&self.policy);
        inner.shared.is_behind = false;
        // Who drives also looks whether the round's end is on record; to the others the state is all there is.
        inner.is_unsure &= self.check_term(inner).is_ok();
        Ok(())
    }

    /// This process drives from now on: nothing that it remembers of another time holds, and nothing that another has under
    /// way is taken.
    pub fn take_lead(&self, now_ms: u64) -> Result<(), DeskError> {
        let mut inner = self.lock();
        inner.shared = Shared { is_behind: true, ..Shared::default() };
        self.begin_term(&mut inner)?;
        inner.shared.term = Some(inner.durable.term);
        // Whoever drove before may have put the round's end on record, but not behind this.
        inner.is_unsure = true;
        self.settle(&mut inner, now_ms)?;
        // While nobody drove, perhaps nobody received either.
        if inner.durable.rounds.is_due(now_ms) {
            self.apply(&mut inner, now_ms, &Event::Resumed)?;
        }
        Ok(())
    }

    fn begin_term(&self, inner: &mut Inner) -> Result<(), DeskError> {
        for _ in 0..TRIES {
            self.follow(inner)?;
            inner.durable.term = inner.durable.term.saturating_add(1);
            let saved = self.save(inner);
            if !self.is_overtaken(inner, &saved) {
                inner.shared.is_behind = saved.is_err();
                return saved;
            }
        }
        Err(DeskError::Contended)
    }

    /// Another process may drive from now on.
    pub fn stand_by(&self) {
        self.lock().shared.term = None;
    }

    /// Whether another process is known to have taken the lead since this one did.
    pub fn is_superseded(&self) -> bool {
        self.check_term(&self.lock()).is_err()
    }

    /// Refuses what is only for who drives.
    pub(super) fn check_term(&self, inner: &Inner) -> Result<(), DeskError> {
        if self.is_shared && inner.shared.term != Some(inner.durable.term) {
            return Err(DeskError::Superseded);
        }
        Ok(())
    }

    fn door(&self) -> Result<Door, DeskError> {
        let Some(entry) = self.storage.coord.head(DOOR)? else { return Ok(Door::default()) };
        let stand = postcard::from_bytes(&entry.value).map_err(|error| DeskError::damaged("door", error))?;
        Ok(Door { sequence: entry.sequence, stand })
    }

    /// The same for who drives, who alone moves it and remembers where it stands.
    fn own_door(&self, inner: &mut Inner) -> Result<Door, DeskError> {
        let door = match inner.shared.door {
            Some(door) => door,
            None => self.door()?,
        };
        inner.shared.door = Some(door);
        Ok(door)
    }

    /// Moves the door while the state stands, in which the round collects that it opens for and this process drives.
    fn move_door(&self, inner: &mut Inner, stand: Stand) -> Result<(), DeskError> {
        let door = self.own_door(inner)?;
        inner.shared.door = None;
        let value = postcard::to_allocvec(&stand).map_err(|error| DeskError::damaged("door", error))?;
        let coord = &self.storage.coord;
        let state = While { log: LOG, sequence: inner.sequence };
        let sequence = coord.compare_and_set_while(DOOR, door.sequence, &value, state)?;
        inner.shared.door = Some(Door { sequence, stand });
        if sequence.is_multiple_of(64) {
            coord.truncate(DOOR, sequence)?;
        }
        self.storage.watch.notify();
        Ok(())
    }

    /// Leave to delete bytes, and from here on no update comes in whose bytes are not named. None is given while another
    /// sweep may not be over.
    pub fn begin_sweep(&self) -> Result<(), DeskError> {
        if !self.is_shared {
            return Ok(());
        }
        let mut inner = self.lock();
        if self.own_door(&mut inner)?.stand == Stand::Sweeping {
            return Err(DeskError::Swept);
        }
        self.shut_door(&mut inner, Stand::Sweeping)
    }

    /// All that was to be deleted is; who drives opens again with the next step.
    pub fn end_sweep(&self) -> Result<(), DeskError> {
        if !self.is_shared {
            return Ok(());
        }
        self.shut_door(&mut self.lock(), Stand::Shut)
    }

    /// Until when nothing is begun, because of a sweep that did not come to its end: its process may have died, or it was
    /// not answered, and what it asked for may come to pass after all.
    pub(super) fn settle_sweep(&self, inner: &mut Inner, now_ms: u64) -> Result<Option<u64>, DeskError> {
        if !self.is_shared || self.own_door(inner)?.stand != Stand::Sweeping {
            inner.shared.quiet_ms = None;
            return Ok(None);
        }
        let lasts_ms = self.storage.blob.deletion_lasts().as_millis() as u64;
        // A clock that was set back makes it no longer than it is.
        let latest_ms = now_ms.saturating_add(lasts_ms);
        let quiet_ms = inner.shared.quiet_ms.map_or(latest_ms, |quiet_ms| quiet_ms.min(latest_ms));
        inner.shared.quiet_ms = Some(quiet_ms);
        if now_ms < quiet_ms {
            return Ok(Some(quiet_ms));
        }
        self.shut_door(inner, Stand::Shut)?;
        inner.shared.quiet_ms = None;
        Ok(None)
    }

    fn shut_door(&self, inner: &mut Inner, stand: Stand) -> Result<(), DeskError> {
        for _ in 0..TRIES {
            self.follow(inner)?;
            self.check_term(inner)?;
            let moved = self.move_door(inner, stand);
            if !self.is_overtaken(inner, &moved) {
                return moved;
            }
        }
        Err(DeskError::Contended)
    }

    /// What who drives does before a step: the door stands as the round does, and what came in is counted.
    pub(super) fn attend(&self, inner: &mut Inner, now_ms: u64) -> Result<(), DeskError> {
        let round = inner.durable.rounds.round;
        let is_collecting = |inner: &Inner| {
            matches!(inner.durable.rounds.phase, Phase::Collecting { .. })
                && inner.durable.rounds.round == round
        };
        let stand = self.own_door(inner)?.stand;
        if !is_collecting(inner) {
            return if stand == Stand::Shut { Ok(()) } else { self.shut_door(inner, Stand::Shut) };
        }
        if inner.durable.rounds.is_due(now_ms) {
            if stand != Stand::Shut {
                self.shut_door(inner, Stand::Shut)?;
            }
            return self.count_all(inner, now_ms);
        }
        if now_ms >= inner.shared.next_count_ms() || now_ms < inner.shared.counted_ms {
            self.count_all(inner, now_ms)?;
        }
        if !is_collecting(inner) || stand == Stand::Open(round) {
            return Ok(());
        }
        match self.move_door(inner, Stand::Open(round)) {
            // A task was handed out meanwhile: the next step sees to it.
            Err(DeskError::Store(StoreError::Conflict { .. })) => {
                inner.shared.is_behind = true;
                Ok(())
            }
            moved => moved,
        }
    }

    /// When who drives has to attend again.
    pub(super) fn attend_ms(&self, inner: &Inner) -> Option<u64> {
        let is_collecting = matches!(inner.durable.rounds.phase, Phase::Collecting { .. });
        (self.is_shared && is_collecting).then(|| inner.shared.next_count_ms())
    }

    /// No update follows that a merge would miss: the door was shut after the state began to merge.
    pub(super) fn shut_to_merge(&self, inner: &mut Inner) -> Result<(), DeskError> {
        let round = inner.durable.rounds.round;
        if self.is_shared && inner.work == Some(Action::Merge) && inner.shared.shut_for != Some(round) {
            self.shut_door(inner, Stand::Shut)?;
            inner.shared.shut_for = Some(round);
        }
        Ok(())
    }

    /// Counts all that is in the inbox, in one step.
    fn count_all(&self, inner: &mut Inner, now_ms: u64) -> Result<(), DeskError> {
        let round = inner.durable.rounds.round;
        let items = self.storage.inbox.list(&queue(round), PAGE_MAX)?;
        (inner.shared.counted_ms, inner.shared.counted) = (now_ms, items.len() as u64);
        let devices: Vec<_> = items.iter().filter_map(|item| item.key.parse().ok()).collect();
        for _ in 0..TRIES {
            self.settle(inner, now_ms)?;
            self.check_term(inner)?;
            if inner.durable.rounds.round != round {
                return Ok(());
            }
            let counted = self.step_by(inner, now_ms, |rounds| {
                let count = |device| rounds.tick(&self.policy, now_ms, Event::Received(device));
                devices.iter().copied().flat_map(count).collect()
            });
            if !self.is_overtaken(inner, &counted) {
                inner.is_unsure = counted.is_err();
                return counted.map(drop);
            }
        }
        Err(DeskError::Contended)
    }

    /// Whether a step failed only because another process moved the state first.
    pub(super) fn is_overtaken<T>(&self, inner: &mut Inner, done: &Result<T, DeskError>) -> bool {
        let is_overtaken = self.is_shared
            && matches!(done, Err(DeskError::Store(StoreError::Conflict { log, .. })) if log == LOG);
        inner.shared.is_behind |= is_overtaken;
        // A record may have been written before the state could not be.
        inner.is_unsure |= is_overtaken;
        is_overtaken
    }

    /// Leave to store an update's bytes. Waits for the door for a while.
    pub fn pass(&self) -> Result<Pass<'_>, DeskError> {
        if !self.is_shared {
            return Ok(Pass::Here(self.keep_blobs()));
        }
        let end = Instant::now() + DOOR_PATIENCE;
        loop {
            let mark = self.storage.watch.mark();
            let door = self.door()?;
            if let Stand::Open(round) = door.stand {
                return Ok(Pass::Through { round, sequence: door.sequence });
            }
            if Instant::now() >= end {
                return Err(DeskError::Shut);
            }
            self.storage.watch.wait(mark, DOOR_LOOK);
        }
    }

    /// Appends an update through the door. The state is not moved: who drives counts what is in the inbox.
    pub(super) fn take_through(
        &self,
        accepted: &Accepted,
        (round, sequence): (RoundId, u64),
    ) -> Result<Taken, DeskError> {
        let device = accepted.receipt.receipt.device;
        let (accepted, received, target) = {
            let mut inner = self.lock();
            self.follow(&mut inner)?;
            let rounds = &inner.durable.rounds;
            rounds.admits(&self.policy, accepted.open.round, &device)?;
            if rounds.round != round {
                return Err(DeskError::Shut);
            }
            let (received, target) = rounds.progress();
            (Accepted { start: rounds.trained_from(&device), ..*accepted }, received, target)
        };
        let value = postcard::to_allocvec(&accepted).map_err(|error| DeskError::damaged("receipt", error))?;
        let (queue, door) = (queue(round), While { log: DOOR, sequence });
        let appended = self.storage.inbox.append_once_while(&queue, &device.to_string(), &value, door);
        let taken = match appended {
            Err(StoreError::Conflict { .. }) => return Err(DeskError::Shut),
            Ok(Append::Duplicate(found)) => Taken::Before(round, Box::new(decode_accepted(&found)?)),
            Ok(Append::Appended) => Taken::Now,
            Err(error) => return Err(error.into()),
        };
        if taken == Taken::Now {
            self.storage.watch.notify();
            self.events.tell(&received_event(round, &accepted, (received + 1, target)));
        }
        Ok(taken)
    }
}

impl Shared {
    fn next_count_ms(&self) -> u64 {
        self.counted_ms.saturating_add(COUNT_MS + self.counted / COUNT_ITEMS_PER_MS)
    }
}
