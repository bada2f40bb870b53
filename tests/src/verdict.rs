//! What must hold of the files of an aggregator and its devices, whatever befell them: every receipt's update is merged or
//! waits to be, none is merged twice or from nowhere, rounds and versions have no gap, and what is published can be read.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use aggregator::{
    desk::{Record, records},
    publish::Publisher,
    receive::Parts,
    store::Blob,
};
use anyhow::{Context, Result, ensure};
use commonweal_protocol::{DeviceId, Digest, RoundId, SignedReceipt, Version};
use serde::Serialize;

/// What a device holds in the end.
#[derive(Debug)]
pub struct Held {
    /// Its name.
    pub id: DeviceId,
    /// What it was promised, each checked against the aggregator's key.
    pub receipts: Vec<SignedReceipt>,
}

/// A device that misbehaves, and all that it may have merged.
#[derive(Debug)]
pub struct Peer {
    /// Its name.
    pub id: DeviceId,
    /// Of each round the one update that it made.
    pub made: BTreeMap<RoundId, Digest>,
}

/// Longest blob that is read again: an adapter's file.
const BLOB_BYTES_MAX: u64 = 64 << 20;

/// What there was, all of it as it must be.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Found {
    /// Rounds that ended.
    pub rounds: u64,
    /// With a release.
    pub published: u64,
    /// With too few updates.
    pub abandoned: u64,
    /// Receipts of all devices.
    pub receipts: u64,
    /// Updates that became part of a release.
    pub merged: u64,
}

impl fmt::Display for Found {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rounds, published, abandoned, receipts, merged } = self;
        write!(
            formatter,
            "{rounds} rounds ({published} published, {abandoned} abandoned), {receipts} receipts, {merged} updates merged"
        )
    }
}

/// Judges what an aggregator whose processes have ended has stored.
///
/// # Errors
/// What does not hold.
pub fn judge(parts: &Parts, held: &[Held]) -> Result<Found> {
    let current = parts.desk.round();
    let rounds = records(parts.storage.coord.as_ref(), RoundId(0), current.0 as usize + 2)?;
    let mut found = Found::default();
    let sent = receipts(held)?;
    check_rounds(&rounds, &parts.publisher)?;
    for record in rounds.iter().filter(|record| record.round.0 > 0) {
        found.rounds += 1;
        found.published += u64::from(record.published);
        found.abandoned += u64::from(record.outcome == "abandoned");
        found.merged += record.norms.len() as u64;
        let sent = sent.get(&record.round).cloned().unwrap_or_default();
        check_round(record, &sent, parts.config.round.quorum)?;
    }
    for (round, receipts) in &sent {
        found.receipts += receipts.len() as u64;
        if rounds.iter().any(|record| record.round == *round) {
            continue;
        }
        // A round that is not over has its updates in the inbox.
        for (device, digest) in receipts {
            let taken = parts.desk.taken(*round, device)?;
            let (_, taken) =
                taken.with_context(|| format!("round {round}: the update of {device} is lost"))?;
            ensure!(taken.receipt.receipt.digest == *digest, "round {round}: another update of {device}");
        }
    }
    check_blobs(&parts.publisher, parts.storage.blob.as_ref())?;
    Ok(found)
}

/// Judges what became of devices that misbehave beside honest ones: a round has merged at most one update of each, the one
/// that it made for this round, and nothing of anybody else's. Gives how many of theirs were merged.
///
/// # Errors
/// What does not hold.
pub fn judge_peers(parts: &Parts, honest: &[Held], peers: &[Peer]) -> Result<u64> {
    let current = parts.desk.round();
    let rounds = records(parts.storage.coord.as_ref(), RoundId(0), current.0 as usize + 2)?;
    let honest: BTreeSet<DeviceId> = honest.iter().map(|held| held.id).collect();
    rounds.iter().try_fold(0, |merged, record| Ok(merged + check_peers(record, &honest, peers)?))
}

fn check_peers(record: &Record, honest: &BTreeSet<DeviceId>, peers: &[Peer]) -> Result<u64> {
    let round = record.round;
    let mut merged = BTreeSet::new();
    for origin in &record.lineage {
        let device = origin.device;
        ensure!(
            origin.round == round,
            "round {round}: {device} is merged with an update of round {}",
            origin.round
        );
        if honest.contains(&device) {
            continue;
        }
        let peer = peers.iter().find(|peer| peer.id == device);
        let peer = peer.with_context(|| format!("round {round}: {device} is merged, and nobody knows it"))?;
        ensure!(
            peer.made.get(&round) == Some(&origin.digest),
            "round {round}: {device} is merged with what it did not make for it"
        );
        ensure!(merged.insert(device), "round {round}: {device} is merged twice");
    }
    Ok(merged.len() as u64)
}

/// The devices' receipts by round: a device has one of each at most.
fn receipts(held: &[Held]) -> Result<BTreeMap<RoundId, BTreeMap<DeviceId, Digest>>> {
    let mut sent: BTreeMap<RoundId, BTreeMap<DeviceId, Digest>> = BTreeMap::new();
    for Held { id, receipts } in held {
        for signed in receipts {
            let receipt = signed.receipt;
            ensure!(receipt.device == *id, "a receipt of {} in the hands of {id}", receipt.device);
            let former = sent.entry(receipt.round).or_default().insert(*id, receipt.digest);
            ensure!(former.is_none(), "{id} has two receipts of round {}", receipt.round);
        }
    }
    Ok(sent)
}

/// Rounds follow each other, and so do versions; a round has at most one.
fn check_rounds(rounds: &[Record], publisher: &Publisher) -> Result<()> {
    for (index, record) in rounds.iter().enumerate() {
        ensure!(record.round.0 == index as u64, "record {index} is of round {}", record.round);
    }
    let releases = publisher.history(Version(0), rounds.len() + 2)?;
    let mut published = BTreeSet::new();
    for (index, signed) in releases.iter().enumerate() {
        let release = &signed.release;
        ensure!(release.version.0 == index as u64, "release {index} has version {}", release.version);
        if let Some(round) = release.round {
            ensure!(published.insert(round), "round {round} was published twice");
        }
    }
    let recorded: BTreeSet<RoundId> =
        rounds.iter().filter(|record| record.published && record.round.0 > 0).map(|it| it.round).collect();
    ensure!(recorded == published, "records and releases name other rounds");
    Ok(())
}

/// Who has a receipt was merged, once, with what the receipt names. Only a round that had too few updates, or was refused
/// before it was merged, merges nobody.
fn check_round(record: &Record, receipts: &BTreeMap<DeviceId, Digest>, quorum: u32) -> Result<()> {
    let (round, counted, held) = (record.round, record.updates, receipts.len());
    let merged: BTreeMap<DeviceId, Digest> =
        record.lineage.iter().map(|origin| (origin.device, origin.digest)).collect();
    ensure!(merged.len() == record.lineage.len(), "round {round}: a device was merged twice");
    ensure!(merged.len() == record.norms.len(), "round {round}: norms and lineage name other devices");
    ensure!(
        counted as usize >= held,
        "round {round}: {held} receipts, but the record counts {counted} updates"
    );
    if record.outcome == "abandoned" {
        ensure!(
            counted < quorum,
            "round {round}: given up with {counted} updates, and the quorum is {quorum}"
        );
    } else if merged.is_empty() && !receipts.is_empty() {
        let reason = record.reason.as_deref().unwrap_or_default();
        ensure!(!reason.contains("is not stored"), "round {round}: what was promised is lost: {reason}");
    } else {
        for (device, digest) in receipts {
            let found = merged.get(device);
            ensure!(found == Some(digest), "round {round}: {device} has a receipt for what was not merged");
        }
    }
    Ok(())
}

/// Every kept release can be read and is what its digest says.
fn check_blobs(publisher: &Publisher, blob: &dyn Blob) -> Result<()> {
    for digest in publisher.kept(1)? {
        let bytes = blob.read_all(&digest, BLOB_BYTES_MAX)?;
        ensure!(Digest::of(&bytes) == digest, "the release's file {digest} is damaged");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

    use aggregator::events::Origin;

    use super::*;

    const A: DeviceId = DeviceId([1; 16]);
    const B: DeviceId = DeviceId([2; 16]);

    fn round(outcome: &str, merged: &[DeviceId]) -> Record {
        let origin = |device: &DeviceId| Origin {
            device: *device,
            digest: Digest([7; 32]),
            round: RoundId(1),
            start: Version(0),
            staleness: 0,
        };
        Record {
            round: RoundId(1),
            outcome: outcome.to_owned(),
            published: outcome == "published",
            updates: merged.len() as u32,
            norms: merged.iter().map(|device| (*device, 1.0)).collect(),
            lineage: merged.iter().map(origin).collect(),
            ..Record::default()
        }
    }

    fn receipts(devices: &[DeviceId]) -> BTreeMap<DeviceId, Digest> {
        devices.iter().map(|device| (*device, Digest([7; 32]))).collect()
    }

    #[test]
    fn what_is_lost_or_counted_twice_is_found() {
        let refused = |record: &Record, devices: &[DeviceId]| {
            check_round(record, &receipts(devices), 2)
                .err()
                .map_or_else(String::new, |error| error.to_string())
        };
        for outcome in ["published", "rejected"] {
            assert_eq!(refused(&round(outcome, &[A, B]), &[A]), "");
            let uncounted = refused(&round(outcome, &[A]), &[A, B]);
            assert!(uncounted.contains("2 receipts, but the record counts 1"), "{uncounted}");
            let lost = refused(&Record { updates: 2, ..round(outcome, &[A]) }, &[A, B]);
            assert!(lost.contains("has a receipt for what was not merged"), "{lost}");
            let mut other = round(outcome, &[A]);
            other.lineage[0].digest = Digest([8; 32]);
            assert!(refused(&other, &[A]).contains("has a receipt for what was not merged"));
        }
        let twice = refused(&round("published", &[A, A]), &[A]);
        assert!(twice.contains("merged twice"), "{twice}");
        // Refused before it was merged, or with too few.
        assert_eq!(refused(&Record { updates: 2, ..round("rejected", &[]) }, &[A, B]), "");
        let reason = Some("merge: blob 07 is not stored".to_owned());
        let lost = refused(&Record { updates: 2, reason, ..round("rejected", &[]) }, &[A, B]);
        assert!(lost.contains("what was promised is lost"), "{lost}");
        assert_eq!(refused(&Record { updates: 1, ..round("abandoned", &[]) }, &[A]), "");
        let enough = refused(&Record { updates: 2, ..round("abandoned", &[]) }, &[A, B]);
        assert!(enough.contains("given up with 2 updates, and the quorum is 2"), "{enough}");
    }

    #[test]
    fn what_peers_got_beyond_their_own_is_found() {
        let honest = BTreeSet::from([A]);
        let made = |round, digest| BTreeMap::from([(RoundId(round), Digest([digest; 32]))]);
        let judged = |record: &Record, made: BTreeMap<RoundId, Digest>| {
            check_peers(record, &honest, &[Peer { id: B, made }]).map_err(|error| error.to_string())
        };
        let record = round("published", &[A, B]);
        assert_eq!(judged(&record, made(1, 7)), Ok(1));
        assert_eq!(judged(&round("published", &[A]), made(1, 7)), Ok(0));
        for (record, made, part) in [
            (&record, made(1, 8), "what it did not make"),
            (&record, made(2, 7), "what it did not make"),
            (&round("published", &[B, B]), made(1, 7), "merged twice"),
            (&round("published", &[DeviceId([3; 16])]), made(1, 7), "nobody knows it"),
        ] {
            let found = judged(record, made).unwrap_err();
            assert!(found.contains(part), "expected {part}, got {found}");
        }
        let mut again = round("published", &[A]);
        again.lineage[0].round = RoundId(0);
        assert!(judged(&again, made(1, 7)).unwrap_err().contains("an update of round 0"));
    }

    #[test]
    fn rounds_without_a_record_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let config = crate::modelless::config(aggregator::round::Policy::default());
        let events = aggregator::events::Events::to(|_| ());
        let aggregator = crate::modelless::Modelless::open(directory.path(), 1, config, events).unwrap();
        let publisher = &aggregator.parts().publisher;
        let mut rounds = vec![Record { round: RoundId(0), published: true, ..Record::default() }];
        check_rounds(&rounds, publisher).unwrap();
        // Recorded as published, and there is no such release.
        rounds.push(round("published", &[A]));
        assert!(check_rounds(&rounds, publisher).is_err());
        rounds[1] = Record { round: RoundId(2), ..Record::default() };
        assert!(check_rounds(&rounds, publisher).is_err());
    }
}
