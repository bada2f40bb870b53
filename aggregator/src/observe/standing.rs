//! How things stand now, as one value: what `/metrics` and the dashboard show. Reads the stores; before `expose.rs`.

use std::collections::BTreeMap;
use std::path::Path;

use commonweal_protocol::{BaseHash, Release, ReportCard, RoundId, Version};
use serde::Serialize;

use super::{ObserveError, Observer};
use crate::desk;

/// A device that asked within this time is online: far above the time between two polls, and above most trainings.
pub(crate) const ONLINE_MS: u64 = 5 * 60_000;

/// See the module.
#[derive(Clone, Debug, Serialize)]
pub struct Standing {
    /// When this was looked at, ms since 1970.
    pub now_ms: u64,
    /// When the server started, ms since 1970.
    pub started_ms: u64,
    /// Version of the program.
    pub program: &'static str,
    /// The frozen base.
    pub base: BaseHash,
    /// How rounds are merged.
    pub method: String,
    /// Whether clipping, alignment and gates are off.
    pub plain: bool,
    /// Why devices are not served, if so.
    pub obstacles: Vec<String>,
    /// Whether this process drives the rounds, as far as it knows.
    pub driving: bool,
    /// The release in force.
    pub release: Option<Release>,
    /// How the last candidate was measured, published or not; the release's if there was none yet.
    pub card: Option<ReportCard>,
    /// The round.
    pub round: RoundStanding,
    /// The devices.
    pub devices: DeviceCounts,
    /// Tokens that can still be used.
    pub invitations_open: usize,
    /// The disk.
    pub store: StoreStanding,
    /// Connections of devices.
    pub connections_open: usize,
    /// Requests that came faster than `receive.requests_per_second`, since the start.
    pub requests_throttled: u64,
}

/// The round under way, or the next one.
#[derive(Clone, Debug, Serialize)]
pub struct RoundStanding {
    /// Its number.
    pub round: RoundId,
    /// Its phase.
    pub phase: &'static str,
    /// Devices with a task.
    pub selected: u32,
    /// Updates that came.
    pub received: u32,
    /// Updates at which it closes; 0 unless it collects them.
    pub target: u32,
    /// Seconds of each stage that is done.
    pub stage_seconds: BTreeMap<String, f64>,
}

/// Devices by what they may do, and how many do it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DeviceCounts {
    /// May take part.
    pub active: usize,
    /// Their certificate has run out.
    pub expired: usize,
    /// Were revoked.
    pub revoked: usize,
    /// Active ones that asked within five minutes.
    pub online: usize,
    /// Active ones that said to have installed the release in force.
    pub current: usize,
}

/// Bytes on disk.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct StoreStanding {
    /// Of the database.
    pub database_bytes: u64,
    /// Of updates and adapters.
    pub blobs_bytes: u64,
    /// Of unfinished uploads.
    pub partials_bytes: u64,
    /// Still free; none where no end is known.
    pub free_bytes: Option<u64>,
}

pub(super) fn look(observer: &Observer) -> Result<Standing, ObserveError> {
    let parts = &observer.view.parts;
    let now_ms = parts.clock.unix_ms();
    parts.desk.look()?;
    let release = parts.publisher.head()?.map(|signed| signed.release);
    let (rounds, progress) = (parts.desk.rounds(), parts.desk.progress());
    let (received, target) = rounds.progress();
    let last = parts
        .storage
        .coord
        .head(desk::RECORDS)?
        .map_or(RoundId(0), |entry| RoundId(entry.sequence.saturating_sub(1)));
    let candidate = progress.evaluate.as_ref().map(|evaluate| evaluate.report_card.clone());
    let candidate = match candidate {
        Some(card) => Some(card),
        None => {
            desk::records(parts.storage.coord.as_ref(), last, 1)?.pop().and_then(|record| record.candidate)
        }
    };
    Ok(Standing {
        now_ms,
        started_ms: observer.started_ms,
        program: env!("CARGO_PKG_VERSION"),
        base: parts.base,
        method: parts.config.method(),
        plain: parts.config.plain,
        obstacles: observer.obstacles(),
        driving: !parts.desk.is_superseded(),
        card: candidate.or_else(|| release.as_ref().map(|release| release.report_card.clone())),
        round: RoundStanding {
            round: rounds.round,
            phase: rounds.phase.name(),
            selected: rounds.selected(),
            received,
            target,
            stage_seconds: progress.seconds,
        },
        devices: count_devices(observer, release.as_ref().map(|release| release.version), now_ms)?,
        release,
        invitations_open: observer.registry.tokens_open(now_ms)?,
        store: StoreStanding {
            database_bytes: ["aggregator.db", "aggregator.db-wal", "aggregator.db-shm"]
                .iter()
                .map(|name| bytes_under(&observer.view.directory.join(name)))
                .sum(),
            blobs_bytes: bytes_under(&observer.view.directory.join("blobs")),
            partials_bytes: bytes_under(&observer.view.directory.join("partials")),
            free_bytes: observer.free_bytes()?,
        },
        connections_open: (observer.view.connections)(),
        requests_throttled: observer.view.receiver.throttled(),
    })
}

fn count_devices(
    observer: &Observer,
    version: Option<Version>,
    now_ms: u64,
) -> Result<DeviceCounts, ObserveError> {
    let (seen, installed) = (observer.view.receiver.seen(), observer.view.receiver.installed());
    let mut counts = DeviceCounts::default();
    for (device, record) in observer.registry.devices()? {
        if record.revoked_ms.is_some() {
            counts.revoked += 1;
        } else if record.expires_ms < now_ms {
            counts.expired += 1;
        } else {
            counts.active += 1;
            let is_online =
                seen.get(&device).is_some_and(|seen_ms| now_ms.saturating_sub(*seen_ms) < ONLINE_MS);
            counts.online += usize::from(is_online);
            counts.current += usize::from(version.is_some() && installed.get(&device).copied() == version);
        }
    }
    Ok(counts)
}

/// Bytes of a file, or of all files below a folder. What vanishes meanwhile counts nothing.
fn bytes_under(path: &Path) -> u64 {
    let Ok(about) = std::fs::symlink_metadata(path) else { return 0 };
    if !about.is_dir() {
        return if about.is_file() { about.len() } else { 0 };
    }
    let Ok(entries) = std::fs::read_dir(path) else { return 0 };
    entries.filter_map(Result::ok).map(|entry| bytes_under(&entry.path())).sum()
}
