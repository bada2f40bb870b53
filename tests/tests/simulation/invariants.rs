//! What must hold whatever happens.

use std::collections::BTreeSet;

use aggregator::desk::{Record, records};
use aggregator::receive::partial::Partials;
use aggregator::store::Blob;
use commonweal_adapter::{AdapterDelta, AdapterKind, DecodeLimits, PackedDelta, Trainable};
use commonweal_protocol::{DeviceId, Digest, Release, RoundId, Version};
use commonweal_transport::Fault;

use super::world::World;
use super::{ROUNDS, Tally};

/// Bounds that hold at every moment.
pub fn check_running(world: &World) {
    let seed = world.seed;
    let blobs = world.memory.list(None, 10_000).unwrap().len() as u64;
    let tasks = u64::from(world.config.round.selected_max(world.config.round.goal));
    // Kept releases; the round's updates and its candidates; those of the round before until they are swept, and
    // late ones, of which a device has one at most between two sweeps.
    let bound = world.config.receive.releases_kept + 2 * (tasks + 2) + world.devices.len() as u64;
    assert!(blobs <= bound, "seed {seed}: {blobs} blobs, the bound is {bound}");
    let partial = world.partials.bytes_held().unwrap();
    assert!(
        partial <= world.devices.len() as u64 * 4_096,
        "seed {seed}: {partial} bytes of unfinished uploads"
    );
}

/// Everything that was promised was kept; gives the counts.
pub fn check_end(world: &World) -> Tally {
    let seed = world.seed;
    let coord = world.memory.storage().coord;
    let records = records(coord.as_ref(), RoundId(0), 10_000).unwrap();
    let releases: Vec<Release> = world
        .publisher
        .history(Version(0), 10_000)
        .unwrap()
        .into_iter()
        .map(|signed| signed.release)
        .collect();
    let mut tally = faults(world);
    check_lineage(seed, &records, &releases);
    for (index, record) in records.iter().enumerate() {
        assert_eq!(record.round.0, index as u64, "seed {seed}: rounds follow each other");
        match record.outcome.as_str() {
            "base" => continue,
            "published" => tally.published += 1,
            "rejected" => tally.rejected += 1,
            "abandoned" => tally.abandoned += 1,
            other => panic!("seed {seed}: outcome {other}"),
        }
        tally.rounds += 1;
        if world.config.round.is_buffered() {
            tally.stale += check_origins(world, record, &releases);
        } else {
            tally.receipts += check_updates(world, record);
        }
        if record.published {
            tally.merges_checked += u64::from(check_merge(world, record, &releases));
        }
    }
    if world.config.round.is_buffered() {
        tally.receipts = check_receipts(world, &records);
    }
    for device in &world.devices {
        if let Some(installed) = device.installed {
            assert!(installed.0 < releases.len() as u64, "seed {seed}: a release that does not exist");
        }
    }
    // One more round may just have begun.
    tally.rounds = tally.rounds.min(ROUNDS);
    tally
}

/// What went wrong.
fn faults(world: &World) -> Tally {
    let mut tally = Tally {
        kills: world.kills,
        crashes: world.crashes,
        store_faults: world.store_faults,
        partitions: world.partitions,
        clock_steps_back: world.clock_steps_back,
        ..Tally::default()
    };
    for fault in world.link_faults() {
        match fault {
            Fault::CutBefore | Fault::CutInside | Fault::CutAfter => tally.cuts += 1,
            Fault::Duplicate => tally.duplicates += 1,
            Fault::Delay { .. } => tally.delays += 1,
            Fault::Corrupt | Fault::CorruptAnswer => tally.corruptions += 1,
        }
    }
    tally
}

/// At most one release a round, versions without a gap, each after its parent, none of a rejected round.
fn check_lineage(seed: u64, records: &[Record], releases: &[Release]) {
    let mut rounds = BTreeSet::new();
    for (index, release) in releases.iter().enumerate() {
        assert_eq!(release.version.0, index as u64, "seed {seed}: versions have no gap");
        let parent = index.checked_sub(1).map(|parent| Version(parent as u64));
        assert_eq!(release.parent, parent, "seed {seed}: the parent is the release before");
        assert!(release.report_card.passed(), "seed {seed}: published with a failed gate");
        if let Some(round) = release.round {
            assert!(rounds.insert(round), "seed {seed}: round {round} published twice");
        }
    }
    let published: BTreeSet<RoundId> = records
        .iter()
        .filter(|record| record.published && record.round.0 > 0)
        .map(|record| record.round)
        .collect();
    assert_eq!(published, rounds, "seed {seed}: records and releases disagree");
}

/// No receipt without its update in the merge; nothing in the merge twice, or from nowhere. Gives the receipts.
fn check_updates(world: &World, record: &Record) -> u64 {
    let (seed, round) = (world.seed, record.round);
    let merged: BTreeSet<DeviceId> = record.norms.iter().map(|(device, _)| *device).collect();
    assert_eq!(merged.len(), record.norms.len(), "seed {seed}, round {round}: a device was counted twice");
    let sent = world.sent(round.0);
    for device in &merged {
        assert!(sent.contains_key(device), "seed {seed}, round {round}: an update that nobody sent");
    }
    let receipted: BTreeSet<DeviceId> = world
        .devices
        .iter()
        .filter(|device| device.receipts.contains_key(&round))
        .map(|device| device.id)
        .collect();
    if record.norms.is_empty() {
        // Abandoned, or rejected by the merge itself: the updates came to nothing, and the record says so.
        assert!(record.reason.is_some(), "seed {seed}, round {round}: no reason");
        assert!(
            record.updates as usize >= receipted.len(),
            "seed {seed}, round {round}: {} updates recorded, {} receipts",
            record.updates,
            receipted.len()
        );
    } else {
        let lost: Vec<_> = receipted.difference(&merged).collect();
        assert!(lost.is_empty(), "seed {seed}, round {round}: acknowledged and lost: {lost:?}");
        assert!(
            merged.len() as u32 >= world.config.round.quorum,
            "seed {seed}, round {round}: below the quorum"
        );
    }
    receipted.len() as u64
}

/// Buffered: every merged update is one that its device was asked for and sent, from the release that it was given, and
/// not too far behind. Gives the number of those that were behind at all.
fn check_origins(world: &World, record: &Record, releases: &[Release]) -> u64 {
    let (seed, round, policy) = (world.seed, record.round, &world.config.round);
    let devices: BTreeSet<DeviceId> = record.lineage.iter().map(|origin| origin.device).collect();
    assert_eq!(devices.len(), record.lineage.len(), "seed {seed}, round {round}: a device counted twice");
    if record.lineage.is_empty() {
        assert!(record.reason.is_some(), "seed {seed}, round {round}: no reason");
        return 0;
    }
    assert!(devices.len() as u32 >= policy.quorum, "seed {seed}, round {round}: below the quorum");
    let release = releases.iter().find(|release| release.round == Some(round));
    for origin in &record.lineage {
        let device = world.devices.iter().find(|device| device.id == origin.device).unwrap();
        let asked = device.starts.get(&origin.round);
        assert_eq!(asked, Some(&origin.start), "seed {seed}, round {round}: another start than the task's");
        let sent = device.sent[&origin.round].iter().any(|(open, _)| open.digest == origin.digest);
        assert!(sent, "seed {seed}, round {round}: an update that nobody sent");
        assert!(origin.round <= round && origin.staleness <= policy.staleness_max, "seed {seed}: {origin:?}");
        if let Some(parent) = release.and_then(|release| release.parent) {
            let behind = parent.0 - origin.start.0;
            assert_eq!(u64::from(origin.staleness), behind, "seed {seed}, round {round}: {origin:?}");
        }
    }
    record.lineage.iter().filter(|origin| origin.staleness > 0).count() as u64
}

/// Buffered: every update with a receipt is in exactly one merge, or waits in the open buffer; none is in two. Gives the
/// number of receipts.
fn check_receipts(world: &World, records: &[Record]) -> u64 {
    let seed = world.seed;
    let merged: Vec<Digest> =
        records.iter().flat_map(|record| &record.lineage).map(|origin| origin.digest).collect();
    let known: BTreeSet<Digest> = merged.iter().copied().collect();
    assert_eq!(known.len(), merged.len(), "seed {seed}: an update was merged twice");
    let open = format!("update/{:020}", world.round());
    let waiting = world.memory.storage().inbox.list(&open, 10_000).unwrap();
    let waits =
        |digest: &Digest| waiting.iter().any(|item| item.value.windows(32).any(|part| part == digest.0));
    // The merge itself failed, and its record says so: nothing of that round is in a release.
    let is_failed = |record: &&Record| record.lineage.is_empty() && record.updates > 0;
    let failed: BTreeSet<RoundId> = records.iter().filter(is_failed).map(|record| record.round).collect();
    let mut receipts = 0;
    for receipt in world.devices.iter().flat_map(|device| device.receipts.values()) {
        receipts += 1;
        let (digest, round) = (receipt.receipt.digest, receipt.receipt.round);
        let in_failed = failed.range(round..).next().is_some();
        assert!(
            known.contains(&digest) || waits(&digest) || in_failed,
            "seed {seed}: acknowledged in {round} and lost"
        );
    }
    receipts
}

/// The release is the start moved by the weighted mean of exactly the merged updates, each of which counts less the further it
/// lies behind.
fn check_merge(world: &World, record: &Record, releases: &[Release]) -> bool {
    let (seed, round) = (world.seed, record.round);
    let release = releases.iter().find(|release| release.round == Some(round)).unwrap();
    let parent = &releases[release.parent.unwrap().0 as usize];
    let values = |release: &Release| {
        let bytes = world.memory.read_all(&release.digest, 1 << 20).ok()?;
        let adapter = world.base.read("release", &bytes, AdapterKind::Assistant).unwrap();
        Some(adapter.into_values())
    };
    // Old adapters are no longer kept.
    let (Some(before), Some(after)) = (values(parent), values(release)) else { return false };
    let layout = &world.base.layout;
    let limits = DecodeLimits::of(layout, Trainable::Both);
    let exponent = world.config.round.staleness_exponent;
    let updates: Vec<(f64, f64, AdapterDelta)> = record
        .lineage
        .iter()
        .map(|origin| {
            let sent = &world.sent(origin.round.0)[&origin.device];
            let (open, bytes) = sent
                .iter()
                .find(|(open, _)| open.digest == origin.digest)
                .unwrap_or_else(|| panic!("seed {seed}, round {round}: merged unknown bytes"));
            let delta = PackedDelta::decode(bytes, layout, &limits).unwrap();
            let norm = record.norms.iter().find(|(device, _)| *device == origin.device).unwrap().1;
            assert!((delta.norm() - norm).abs() < 1e-9, "seed {seed}, round {round}: another norm");
            let discount = (1.0 + f64::from(origin.staleness)).powf(-exponent);
            (f64::from(open.samples), discount, delta)
        })
        .collect();
    assert_eq!(updates.len(), record.norms.len(), "seed {seed}, round {round}");
    let total: f64 = updates.iter().map(|(samples, ..)| samples).sum();
    for (index, (before, after)) in before.iter().zip(&after).enumerate() {
        let moved: f64 = updates
            .iter()
            .map(|(samples, discount, delta)| samples * discount * f64::from(delta.values()[index]))
            .sum::<f64>()
            / total;
        let expected = f64::from(*before) + moved;
        assert!(
            (f64::from(*after) - expected).abs() < 1e-5,
            "seed {seed}, round {round}: value {index}: expected {expected}, got {after}"
        );
    }
    true
}
