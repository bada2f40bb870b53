//! A step of the desk: an event moves a copy of the state machine, what that leads to is carried out, and the copy is the
//! state once it is saved. Between `desk` (who asks) and `round` (what follows).

use commonweal_protocol::RoundId;

use super::state::{Durable, LOG, Progress, encode};
use super::{Desk, DeskError, Inner, RECORDS, Record, decode_accepted, queue, share};
use crate::events::Event as Told;
use crate::round::{Action, Event, Outcome, Rounds, Summary};
use crate::store::{Item, StoreError, While};

impl Desk {
    /// The inbox is the truth about what came in; the state is behind it after a crash, or after a store that failed
    /// without saying whether it had written.
    pub(super) fn reconcile(&self, inner: &mut Inner, now_ms: u64) -> Result<(), DeskError> {
        let round = inner.durable.rounds.round;
        for item in self.storage.inbox.list(&queue(round), crate::store::PAGE_MAX)? {
            if let Ok(device) = item.key.parse() {
                self.apply(inner, now_ms, &Event::Received(device))?;
            }
        }
        Ok(())
    }

    /// A round whose end is on record is over, though the state behind the record was not saved: a record cannot be taken
    /// back, and what would happen now may be something else. Looked for after whatever failed, and at the start.
    pub(super) fn settle(&self, inner: &mut Inner, now_ms: u64) -> Result<(), DeskError> {
        self.follow(inner)?;
        if !inner.is_unsure {
            return Ok(());
        }
        let round = inner.durable.rounds.round;
        let recorded = self.storage.coord.head(RECORDS)?.map_or(0, |entry| entry.sequence);
        // Entry n is of round n - 1.
        if recorded > round.0 {
            inner.work = None;
            inner.durable.progress = Progress::default();
            self.step(inner, now_ms, Event::Recorded)?;
            inner.finished = Some(round);
        }
        inner.is_unsure = false;
        Ok(())
    }

    /// What an event leads to, once it is known where the round stands.
    pub(super) fn apply(
        &self,
        inner: &mut Inner,
        now_ms: u64,
        event: &Event,
    ) -> Result<Vec<Action>, DeskError> {
        for _ in 0..share::TRIES {
            self.settle(inner, now_ms)?;
            // Any process gives tasks; all else is for who drives.
            if !matches!(event, Event::Polled(..)) {
                self.check_term(inner)?;
            }
            let done = self.step(inner, now_ms, event.clone());
            if !self.is_overtaken(inner, &done) {
                inner.is_unsure = done.is_err();
                return done;
            }
        }
        Err(DeskError::Contended)
    }

    /// One step of the state machine.
    pub(super) fn step(
        &self,
        inner: &mut Inner,
        now_ms: u64,
        event: Event,
    ) -> Result<Vec<Action>, DeskError> {
        self.step_by(inner, now_ms, |rounds| rounds.tick(&self.policy, now_ms, event))
    }

    /// A step on a copy, which becomes the state once it is saved.
    pub(super) fn step_by(
        &self,
        inner: &mut Inner,
        now_ms: u64,
        tick: impl FnOnce(&mut Rounds) -> Vec<Action>,
    ) -> Result<Vec<Action>, DeskError> {
        let mut durable = inner.durable.clone();
        let mut actions = tick(&mut durable.rounds);
        // What only this process would remember the others have to know.
        if self.is_shared && !actions.contains(&Action::Save) && durable.rounds != inner.durable.rounds {
            actions.insert(0, Action::Save);
        }
        let before = std::mem::replace(&mut inner.durable, durable);
        let mut effects = Effects::default();
        for action in &actions {
            if let Err(error) = self.carry_out(inner, &before, action, &mut effects) {
                inner.durable = before;
                return Err(error);
            }
        }
        if effects.work.is_some() || effects.finished.is_some() {
            inner.work = effects.work;
        }
        inner.wake_ms = effects.wake_ms.or(inner.wake_ms.filter(|wake_ms| *wake_ms > now_ms));
        inner.stop |= effects.stop;
        inner.finished = effects.finished.or(inner.finished);
        for told in &effects.told {
            self.events.tell(told);
        }
        // A timer that is set again is nothing to wake anybody for.
        if actions.iter().any(|action| !matches!(action, Action::WakeAt(_))) {
            self.storage.watch.notify();
        }
        Ok(actions)
    }

    fn carry_out(
        &self,
        inner: &mut Inner,
        before: &Durable,
        action: &Action,
        effects: &mut Effects,
    ) -> Result<(), DeskError> {
        let rounds = &inner.durable.rounds;
        match action {
            Action::Save => self.save(inner)?,
            Action::Assign(device) => {
                let is_new = rounds.phase != before.rounds.phase
                    || rounds.given(device) != before.rounds.given(device);
                if is_new {
                    effects.told.push(Told::Assigned { round: rounds.round, device: *device });
                }
            }
            Action::Opened => effects.told.push(Told::RoundOpened {
                round: rounds.round,
                start: rounds.start.map(|start| start.version).unwrap_or_default(),
                target: rounds.progress().1,
            }),
            Action::Closed => effects.told.push(self.closed(&before.rounds)?),
            work @ (Action::Merge | Action::Align(_) | Action::Evaluate(_) | Action::Publish(..)) => {
                effects.work = Some(work.clone());
            }
            Action::Finish(summary) => {
                self.record(summary, &inner.durable.progress, inner.sequence)?;
                inner.durable.progress = Progress::default();
                effects.finished = Some(summary.round);
                let reason = match &summary.outcome {
                    Outcome::Published { .. } => None,
                    Outcome::Rejected { reason } => Some(reason.clone()),
                    Outcome::Abandoned { quorum } => {
                        Some(format!("{} updates by the deadline, the quorum is {quorum}", summary.received))
                    }
                };
                let Summary { round, opened_ms, .. } = *summary;
                effects.told.extend(reason.map(|reason| Told::Rejected { round, opened_ms, reason }));
            }
            Action::WakeAt(at_ms) => effects.wake_ms = Some(*at_ms),
            Action::Stop => effects.stop = true,
        }
        Ok(())
    }

    fn closed(&self, rounds: &Rounds) -> Result<Told, DeskError> {
        let items = self.storage.inbox.list(&queue(rounds.round), crate::store::PAGE_MAX)?;
        // What is damaged is for the merge to name, and keeps no round open.
        let bytes = |item: &Item| decode_accepted(&item.value).map_or(0, |accepted| accepted.open.length);
        let uploaded_bytes = items.iter().map(bytes).fold(0, u64::saturating_add);
        let selected = rounds.selected();
        let received = items.len() as u32;
        Ok(Told::RoundClosed { round: rounds.round, selected, received, uploaded_bytes })
    }

    /// Appends the state. Of an only writer, which the directory's lock makes this process, a head that moved can only be an
    /// own write that was thought to have failed; among several it is another's, and the step is taken anew.
    pub(super) fn save(&self, inner: &mut Inner) -> Result<(), DeskError> {
        let bytes = encode(&inner.durable)?;
        inner.sequence = match self.storage.coord.compare_and_set(LOG, inner.sequence, &bytes) {
            Err(StoreError::Conflict { found, .. }) if !self.is_shared => {
                self.storage.coord.compare_and_set(LOG, found, &bytes)?
            }
            result => result?,
        };
        if inner.sequence.is_multiple_of(64) {
            self.storage.coord.truncate(LOG, inner.sequence)?;
        }
        Ok(())
    }

    /// A record cannot be taken back: among several processes it is written only while the state stands that it is of.
    fn record(&self, summary: &Summary, progress: &Progress, sequence: u64) -> Result<(), DeskError> {
        let head = self.publisher.head()?;
        let card = head.as_ref().map(|signed| &signed.release.report_card);
        let version = head.as_ref().map(|signed| signed.release.version).unwrap_or_default();
        let record = Record::of_round(summary, progress, version, card);
        let state = self.is_shared.then_some(While { log: LOG, sequence });
        record.append_while(self.storage.coord.as_ref(), state)
    }
}

#[derive(Default)]
struct Effects {
    work: Option<Action>,
    wake_ms: Option<u64>,
    stop: bool,
    finished: Option<RoundId>,
    told: Vec<Told>,
}
