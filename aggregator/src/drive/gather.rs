//! What a merge takes: the updates that were accepted, but for those of devices that were revoked since.
//!
//! A part of the merge stage. If that leaves fewer than the quorum, the round is rejected; and what is damaged rejects it by
//! its device's name, for it was acknowledged and is not left out in silence.

use commonweal_protocol::{DeviceId, RoundId};

use super::remember::Found;
use super::{Driver, LEASE_MS, OWNER, Stages};
use crate::desk::{Accepted, decode_accepted, queue};
use crate::receive::chain;
use crate::receive::enroll::{EnrollError, Registry};
use crate::store::{PAGE_MAX, StoreError};

/// Devices that a reason names.
const NAMED_MAX: usize = 10;

/// What a merge takes, and what it leaves out.
pub(super) struct Gathered {
    pub(super) updates: Vec<Accepted>,
    /// Whose updates are left out.
    pub(super) revoked: Vec<DeviceId>,
}

impl<S: Stages> Driver<S> {
    /// Claims the round's updates.
    pub(super) fn gather(&self, round: RoundId) -> Found<Gathered> {
        let now_ms = self.parts.clock.unix_ms();
        let inbox = &self.parts.storage.inbox;
        let items = inbox.claim(&queue(round), OWNER, now_ms, LEASE_MS, PAGE_MAX)?;
        // A claim leaves out what another is just looking at, as one may that was thought to be dead.
        let there = inbox.list(&queue(round), PAGE_MAX)?.len();
        if items.len() < there {
            let reason = format!("{there} updates are there, {} are free", items.len());
            return Err(StoreError::not_done("claim from", &queue(round), reason).into());
        }
        let registry = Registry::new(self.parts.storage.coord.clone());
        let mut gathered = Gathered { updates: Vec::with_capacity(items.len()), revoked: Vec::new() };
        for item in items {
            let Ok(device) = item.key.parse::<DeviceId>() else {
                return Ok(Err(format!("update of `{}`: expected a device's name", item.key)));
            };
            match registry.is_revoked(&device) {
                Ok(true) => gathered.revoked.push(device),
                Ok(false) => match decode_accepted(&item.value) {
                    Ok(update) => gathered.updates.push(update),
                    Err(error) => return Ok(Err(format!("update of device {device}: {}", chain(&error)))),
                },
                Err(EnrollError::Store(error)) => return Err(error.into()),
                Err(error) => return Ok(Err(format!("update of device {device}: {}", chain(&error)))),
            }
        }
        let (left, out) = (gathered.updates.len(), gathered.revoked.len());
        let quorum = self.parts.config.round.quorum.max(1);
        if out > 0 && left < quorum as usize {
            let names: Vec<String> =
                gathered.revoked.iter().take(NAMED_MAX).map(DeviceId::to_string).collect();
            let (all, more) = (left + out, if out > names.len() { " and others" } else { "" });
            return Ok(Err(format!(
                "{left} of {all} updates are left, the others are of devices that were revoked since ({}{more}); the quorum \
                 is {quorum}",
                names.join(", ")
            )));
        }
        Ok(Ok(gathered))
    }
}
