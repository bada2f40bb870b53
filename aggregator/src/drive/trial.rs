//! Looks after the release on trial: begins a trial when a round has published, counts reports, carries a verdict out.
//!
//! `canary` judges; this is its shell, on the thread of `drive`, which alone writes the state. Each write is a
//! compare-and-set; after a kill the head and the log say what is still to do.

use commonweal_protocol::{Release, RoundId, Version};

use super::{DriveError, Driver, Stages};
use crate::canary::{self, Canary, Verdict};
use crate::desk::{self, DeskError};
use crate::events::Event as Told;
use crate::receive::chain;
use crate::receive::enroll::Registry;

/// Counted in one look; the rest in the next.
const WORDS_MAX: usize = 1_000;

impl<S: Stages> Driver<S> {
    /// Notices a new head, and ends the trial if enough is known.
    pub(super) fn look_after_trial(&self) -> Result<(), DriveError> {
        let settings = &self.parts.config.release;
        let Some(head) = self.parts.publisher.head()? else { return Ok(()) };
        let (head, now_ms) = (head.release, self.parts.clock.unix_ms());
        if !settings.is_canary() {
            return self.forget_trials(head.version);
        }
        let (mut canary, sequence) = self.read_canary(head.version)?;
        if let (Some(trial), Some(reason)) = (canary.trial.clone(), canary.verdict.clone()) {
            return self.roll_back(canary, sequence, &head, trial.version, reason);
        }
        if canary.see_head(head.version, head.round.is_some(), now_ms) {
            self.write_canary(&canary, sequence)?;
            if let Some(trial) = &canary.trial {
                let (version, stable, share) = (trial.version, canary.stable, settings.canary_share);
                self.parts.events.tell(&Told::Trial { version, stable, share });
            }
            return Ok(());
        }
        let mut sequence = self.hear_words(&mut canary, sequence)?;
        let Some(trial) = canary.trial.clone() else { return Ok(()) };
        let mut verdict = canary.judge(settings, now_ms);
        let is_held_up = verdict == Verdict::Wait && canary.is_held_up(settings);
        if (verdict != Verdict::Wait || is_held_up) && self.silence_strangers(&mut canary)? {
            sequence = self.write_canary(&canary, sequence)?;
            verdict = canary.judge(settings, now_ms);
        }
        match verdict {
            Verdict::Wait => {}
            Verdict::Fine(reason) => {
                canary.promote(reason.clone(), now_ms);
                self.write_canary(&canary, sequence)?;
                self.parts.events.tell(&Told::Promoted { version: canary.stable, reason });
            }
            Verdict::Worse(reason) => {
                // First on disk: a kill behind the roll-back must not lose why it was.
                canary.verdict = Some(reason.clone());
                let sequence = self.write_canary(&canary, sequence)?;
                return self.roll_back(canary, sequence, &head, trial.version, reason);
            }
        }
        Ok(())
    }

    /// Counts what devices have said of the release on trial, and takes it away. After a kill in between, what was counted
    /// is not counted again.
    fn hear_words(&self, canary: &mut Canary, sequence: u64) -> Result<u64, DriveError> {
        let coord = &self.parts.storage.coord;
        let words = coord.scan(canary::WORDS, canary.counted_word + 1, WORDS_MAX)?;
        let Some(last) = words.last().map(|entry| entry.sequence) else { return Ok(sequence) };
        for entry in words {
            let word = postcard::from_bytes(&entry.value).inspect_err(|error| {
                tracing::warn!(place = entry.sequence, %error, "a device's word on a trial is damaged, and passed over");
            });
            canary.hear(entry.sequence, word.ok());
        }
        let sequence = self.write_canary(canary, sequence)?;
        coord.truncate(canary::WORDS, last)?;
        Ok(sequence)
    }

    /// Whoever was revoked after it said something has no voice. True if somebody had one.
    fn silence_strangers(&self, canary: &mut Canary) -> Result<bool, DriveError> {
        let served = Registry::new(self.parts.storage.coord.clone()).served()?;
        Ok(canary.silence(|device| !served.contains(device)))
    }

    /// Brings back what all devices have, unless that was done before a kill, and tells why.
    fn roll_back(
        &self,
        mut canary: Canary,
        sequence: u64,
        head: &Release,
        version: Version,
        reason: String,
    ) -> Result<(), DriveError> {
        let (to, now_ms) = (canary.stable, self.parts.clock.unix_ms());
        let stable = self.parts.publisher.release(to)?.release;
        let is_done = head.round.is_none() && head.version > version && head.digest == stable.digest;
        let now = if is_done {
            head.version
        } else {
            self.parts.publisher.roll_back_behind(head.version, to, now_ms)?.release.version
        };
        canary.roll_back(now, reason.clone(), now_ms);
        self.write_canary(&canary, sequence)?;
        self.parts.events.tell(&Told::RolledBack { version, to, now, reason });
        Ok(())
    }

    /// Without trials all devices have the head; a later one is held against what is reported from then on.
    fn forget_trials(&self, head: Version) -> Result<(), DriveError> {
        let coord = self.parts.storage.coord.as_ref();
        let (canary, sequence) = match canary::read(coord) {
            Ok(Some(known)) => known,
            Ok(None) => return Ok(()),
            // Nothing of it is needed any more.
            Err(DeskError::Damaged { .. }) => {
                let sequence = coord.head(canary::LOG)?.map_or(0, |entry| entry.sequence);
                return self.write_canary(&Canary::stable(head), sequence).map(|_| ());
            }
            Err(error) => return Err(error.into()),
        };
        if canary.trial.is_some() || canary.stable != head {
            let Canary { counted_round, counted_word, .. } = canary;
            self.write_canary(&Canary { counted_round, counted_word, ..Canary::stable(head) }, sequence)?;
        }
        Ok(())
    }

    /// Counts what devices reported with the updates of a round. Where the state of trials is damaged it cannot, and says so:
    /// a trial stops no round.
    pub(super) fn count_reports(
        &self,
        round: RoundId,
        start: Version,
        updates: &[desk::Accepted],
    ) -> Result<(), DriveError> {
        if !self.parts.config.release.is_canary() {
            return Ok(());
        }
        let (mut canary, sequence) = match self.read_canary(start) {
            Err(DriveError::Desk(error @ DeskError::Damaged { .. })) => {
                self.parts.events.tell(&Told::Uncounted { round, reason: chain(&error) });
                return Ok(());
            }
            known => known?,
        };
        let reports =
            updates.iter().map(|update| (update.start.unwrap_or(start), update.open.report.loss_first));
        canary.count(round.0, reports);
        self.write_canary(&canary, sequence).map(|_| ())
    }

    /// The state and its place in the log; all devices have `version` if there is none.
    fn read_canary(&self, version: Version) -> Result<(Canary, u64), DriveError> {
        Ok(canary::read(self.parts.storage.coord.as_ref())?.unwrap_or((Canary::stable(version), 0)))
    }

    /// Its place in the log.
    fn write_canary(&self, canary: &Canary, sequence: u64) -> Result<u64, DriveError> {
        let bytes = postcard::to_allocvec(canary).map_err(|error| DeskError::damaged("canary", error))?;
        let coord = &self.parts.storage.coord;
        let written = coord.compare_and_set(canary::LOG, sequence, &bytes)?;
        if written.is_multiple_of(64) {
            coord.truncate(canary::LOG, written)?;
        }
        Ok(written)
    }
}
