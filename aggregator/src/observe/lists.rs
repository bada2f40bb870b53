//! Pages of what there are many of: rounds, releases, devices. What the dashboard lists.

use commonweal_protocol::{DeviceId, KeyNumber, Release, RoundId, Version};
use serde::Serialize;

use super::standing::ONLINE_MS;
use super::{ObserveError, Observer};
use crate::desk::{self, Record};

/// Most rows of one page.
pub(crate) const ROWS_MAX: usize = 500;

/// A device as an operator sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceRow {
    /// Its name.
    pub device: DeviceId,
    /// `online`, `away`, `expired` or `revoked`.
    pub state: &'static str,
    /// When it enrolled.
    pub enrolled_ms: u64,
    /// When its certificate ends.
    pub expires_ms: u64,
    /// When it was revoked.
    pub revoked_ms: Option<u64>,
    /// When it asked last, if since this start.
    pub seen_ms: Option<u64>,
    /// The release that it said to have, if since this start.
    pub installed: Option<Version>,
    /// The newest signing key that it said to know when it asked last, if since this start.
    pub key: Option<KeyNumber>,
}

/// Where a page ends that has `limit` rows, newest first, none above `before`.
fn first(end: u64, limit: usize) -> u64 {
    end.saturating_sub(limit as u64)
}

impl Observer {
    /// Finished rounds before `before`, newest first. What grows with a round's devices is left out.
    pub fn rounds(&self, before: Option<u64>, limit: usize) -> Result<Vec<Record>, ObserveError> {
        let coord = self.view.parts.storage.coord.as_ref();
        let count = coord.head(desk::RECORDS)?.map_or(0, |entry| entry.sequence);
        let end = before.unwrap_or(count).min(count);
        let start = first(end, limit.min(ROWS_MAX));
        let mut page = desk::records(coord, RoundId(start), (end - start) as usize)?;
        page.reverse();
        for record in &mut page {
            record.norms.clear();
            record.lineage.clear();
        }
        Ok(page)
    }

    /// Releases before `before`, newest first.
    pub fn releases(&self, before: Option<u64>, limit: usize) -> Result<Vec<Release>, ObserveError> {
        let publisher = &self.view.parts.publisher;
        let count = publisher.head()?.map_or(0, |head| head.release.version.0.saturating_add(1));
        let end = before.unwrap_or(count).min(count);
        let start = first(end, limit.min(ROWS_MAX));
        let page = publisher.history(Version(start), (end - start) as usize)?;
        Ok(page.into_iter().map(|signed| signed.release).rev().collect())
    }

    /// Devices after `after`, by name.
    pub fn devices(&self, after: Option<DeviceId>, limit: usize) -> Result<Vec<DeviceRow>, ObserveError> {
        let now_ms = self.view.parts.clock.unix_ms();
        let (seen, installed) = (self.view.receiver.seen(), self.view.receiver.installed());
        let keys = self.view.receiver.keys_known();
        let row = |(device, record): (DeviceId, crate::receive::enroll::DeviceRecord)| {
            let seen_ms = seen.get(&device).copied();
            let is_online = seen_ms.is_some_and(|seen_ms| now_ms.saturating_sub(seen_ms) < ONLINE_MS);
            let state = match record.revoked_ms {
                Some(_) => "revoked",
                None if record.expires_ms < now_ms => "expired",
                None if is_online => "online",
                None => "away",
            };
            DeviceRow {
                device,
                state,
                enrolled_ms: record.enrolled_ms,
                expires_ms: record.expires_ms,
                revoked_ms: record.revoked_ms,
                seen_ms,
                installed: installed.get(&device).copied(),
                key: keys.get(&device).copied(),
            }
        };
        let devices = self.registry.devices()?.into_iter();
        let rest = devices.filter(|(device, _)| after.is_none_or(|after| *device > after));
        Ok(rest.take(limit.min(ROWS_MAX)).map(row).collect())
    }
}
