//! What is left behind a round, and removed: its items, unfinished uploads, and blobs that nothing names any more.

use std::collections::BTreeSet;
use std::time::Duration;

use commonweal_protocol::{Digest, RoundId};

use super::{DriveError, Driver, LEASE_MS, OWNER, Stages};
use crate::canary;
use crate::config;
use crate::desk::{DeskError, RECEIPTS_KEPT_ROUNDS, decode_accepted, queue};
use crate::receive::chain;
use crate::round::{Phase, ROUNDS_BACK_MAX};
use crate::store::{PAGE_MAX, StoreError};

/// Blobs that are deleted by one call.
const DELETED_AT_ONCE: usize = 250;
/// What was stored so lately no sweep takes, where there are others: they may be about to name it, and nobody asks for
/// anything so long after it lost the lead.
const GRACE: Duration = Duration::from_secs(600);
const _: () =
    assert!(GRACE.as_secs() >= 2 * config::LEAD_SECONDS_MAX as u64, "else it could outlive a lease");

impl<S: Stages> Driver<S> {
    /// After a round: its updates are done with. Whatever fails here is done after the next round.
    pub(super) fn clean_up(&self, round: RoundId) {
        let result = (|| -> Result<(), StoreError> {
            let inbox = &self.parts.storage.inbox;
            let now_ms = self.parts.clock.unix_ms();
            for item in inbox.claim(&queue(round), OWNER, now_ms, LEASE_MS, PAGE_MAX)? {
                inbox.ack(&queue(round), &item.key, OWNER)?;
            }
            match round.0.checked_sub(RECEIPTS_KEPT_ROUNDS) {
                Some(old) => inbox.purge_through(&queue(RoundId(old))),
                None => Ok(()),
            }
        })();
        if let Err(error) = result {
            tracing::warn!(%round, error = chain(&error), "clean-up is put off");
        }
        let back = if self.parts.config.round.is_buffered() { ROUNDS_BACK_MAX } else { 0 };
        let oldest = round.0.saturating_add(1).saturating_sub(back);
        if let Err(error) = self.parts.partials.discard_before(oldest) {
            tracing::warn!(%round, %error, "unfinished uploads are left over");
        }
        self.sweep();
    }

    /// Deletes every blob that no release, no candidate and no update of the current round names.
    pub(super) fn sweep(&self) {
        let _blobs = self.parts.desk.sweep_blobs();
        let result = (|| -> Result<usize, DriveError> {
            // Whatever is stored from here on is named before, or stored again behind it.
            self.parts.desk.begin_sweep()?;
            let releases_kept = self.parts.config.receive.releases_kept;
            let named = match self.named(releases_kept) {
                Ok(named) => named,
                Err(error) => {
                    // Nothing is deleted, so nobody has to wait for it. If its end is not on record, the next step sees to it.
                    if let Err(error) = self.parts.desk.end_sweep() {
                        tracing::warn!(error = chain(&error), "the end of a sweep is not on record");
                    }
                    return Err(error);
                }
            };
            let age = if self.lead.is_shared() { GRACE } else { Duration::ZERO };
            let (mut after, mut deleted) = (None, 0);
            loop {
                let page = self.parts.storage.blob.list_older(age, after.as_ref(), PAGE_MAX)?;
                after = page.last().copied();
                if after.is_none() {
                    // A failure leaves it to the next step, which waits until nothing can be under way.
                    self.parts.desk.end_sweep()?;
                    return Ok(deleted);
                }
                let unnamed: Vec<Digest> =
                    page.iter().filter(|digest| !named.contains(digest)).copied().collect();
                for some in unnamed.chunks(DELETED_AT_ONCE) {
                    // An operator may have rolled back meanwhile, and waits for nobody.
                    let kept = self.parts.publisher.kept(releases_kept)?;
                    let some: Vec<Digest> =
                        some.iter().filter(|digest| !kept.contains(digest)).copied().collect();
                    // Nothing refuses a deletion that comes too late.
                    let until = self.lead.held_until();
                    if !self.lead.is_held() {
                        return Err(DriveError::Cancelled);
                    }
                    self.parts.storage.blob.delete_all(&some, until)?;
                    deleted += some.len();
                }
            }
        })();
        match result {
            Ok(deleted) => tracing::debug!(deleted, "swept"),
            Err(error) => tracing::warn!(error = chain(&error), "blobs that nothing names are left over"),
        }
    }

    /// What a release, a candidate or an update of the current round names.
    fn named(&self, releases_kept: u64) -> Result<BTreeSet<Digest>, DriveError> {
        let mut named = self.parts.publisher.kept(releases_kept)?;
        named.extend(self.parts.publisher.kept_states(releases_kept)?);
        // Nor may a trial outlive what it would go back to.
        match canary::read(self.parts.storage.coord.as_ref()) {
            Ok(Some((canary, _))) => {
                named.insert(self.parts.publisher.release(canary.stable)?.release.digest);
                named.extend(self.parts.publisher.state(canary.stable)?.digests());
            }
            Ok(None) => {}
            // It goes back to nothing any more; were nothing deleted, each round would leave its updates behind.
            Err(error @ DeskError::Damaged { .. }) => {
                tracing::warn!(error = chain(&error), "what a trial would go back to is not known");
            }
            Err(error) => return Err(error.into()),
        }
        let rounds = self.parts.desk.rounds();
        // However many releases followed it meanwhile, the round begins there.
        if let Some(start) = rounds.start {
            named.insert(start.digest);
            named.extend(self.parts.publisher.state(start.version)?.digests());
        }
        named.extend(self.parts.desk.progress().merge.unwrap_or_default().state.digests());
        named.extend(self.parts.desk.control().map(|signed| signed.control.digest));
        if let Phase::Aligning { candidate }
        | Phase::Evaluating { candidate }
        | Phase::Publishing { candidate, .. } = &rounds.phase
        {
            named.insert(*candidate);
        }
        for item in self.parts.storage.inbox.list(&queue(rounds.round), PAGE_MAX)? {
            named.insert(decode_accepted(&item.value)?.open.digest);
        }
        Ok(named)
    }
}
