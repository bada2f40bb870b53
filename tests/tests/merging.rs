//! Ways to merge that change what devices do, with the real programs over QUIC: SCAFFOLD through kills, RoLoRA's turns,
//! buffers that wait for nobody.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use aggregator::round::RoundMode;
use aggregator::store::{Access, Storage};
use commonweal_adapter::{Adapter, AdapterKind, Part, disk};
use commonweal_protocol::{Digest, Mode, bounds};
use commonweal_tests::{
    federation::{Device, Federation},
    program::{Finished, Running},
};
use edge_client::store::Store;

/// The values of an adapter that an event names.
fn adapter(federation: &Federation, digest: &str) -> Adapter {
    let storage = Storage::open(&federation.state(), Access::Shared).unwrap();
    let digest: Digest = digest.parse().unwrap();
    disk::read(&storage.blob.read_all(&digest, bounds::CONTENT_BYTES_MAX).unwrap()).unwrap().0
}

/// All of a kind that the aggregator keeps.
fn kept(federation: &Federation, kind: AdapterKind) -> Vec<Adapter> {
    let storage = Storage::open(&federation.state(), Access::Shared).unwrap();
    let read = |digest: &Digest| storage.blob.read_all(digest, bounds::CONTENT_BYTES_MAX).unwrap();
    let files = storage.blob.list(None, 1_000).unwrap();
    let files = files.iter().filter_map(|digest| disk::read(&read(digest)).ok());
    files.filter(|(_, facts)| facts.kind == kind).map(|(adapter, _)| adapter).collect()
}

/// The digest of each release that is published until the server ends.
fn releases(mut aggregator: Running, rounds: u64) -> Vec<String> {
    let release = |round: u64| {
        let published = aggregator.wait_for("a release", |event| {
            event["event"] == "rejected" || event["event"] == "published" && event["round"] == round
        });
        assert_eq!(published["event"], "published", "{published}");
        published["digest"].as_str().unwrap().to_owned()
    };
    let digests = (1..=rounds).map(release).collect();
    assert_eq!(aggregator.finish(), 0);
    digests
}

/// What a device would correct with if the round that it waits for was merged.
fn control(device: &Device) -> Adapter {
    let store = Store::open_shared(device.state()).unwrap();
    let bytes = store.read("control-pending.bin").unwrap().unwrap();
    disk::read(&bytes[8..]).unwrap().0
}

#[test]
fn scaffolds_control_variates_agree_after_three_rounds_in_the_first_of_which_all_were_killed() {
    let federation = Federation::new(2, |config| config.train.scaffold = true);
    let mut aggregator = federation.serve_rounds(None, "upload");
    let devices = federation.enrolled(2);
    let running: Vec<_> = devices.iter().map(Device::run).collect();
    aggregator.event("paused");
    for device in running {
        device.kill();
    }
    aggregator.kill();
    for device in &devices {
        for name in ["control.bin", "control-pending.bin"] {
            assert!(!device.state().join(name).exists(), "{name} without a receipt");
        }
    }

    let aggregator = federation.serve_rounds(Some(3), "");
    let running: Vec<_> = devices.iter().map(Device::run).collect();
    releases(aggregator, 3);
    drop(running);
    let server = kept(&federation, AdapterKind::Control);
    let [server] = &server[..] else { panic!("expected one control variate, got {}", server.len()) };
    let own: Vec<Adapter> = devices.iter().map(control).collect();
    assert_ne!(own[0], own[1], "the devices have other data");
    let largest = server.values().iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    assert!(largest > 0.0, "nothing was merged into it");
    for (at, value) in server.values().iter().enumerate() {
        let mean = f32::midpoint(own[0].values()[at], own[1].values()[at]);
        assert!(
            (value - mean).abs() <= 1e-5 * largest,
            "value {at}: server {value}, mean of the devices {mean}"
        );
    }
    let record = federation.last_round();
    assert_eq!(record["candidate"]["merge"], "fedit, mean, fedavg, scaffold", "{record}");
}

#[test]
fn rolora_trains_and_sends_b_then_a() {
    let federation = Federation::new(2, |config| config.train.mode = Mode::Rolora);
    let first = kept(&federation, AdapterKind::Assistant).remove(0);
    let aggregator = federation.serve_rounds(Some(2), "");
    let devices = federation.enrolled(2);
    let running: Vec<_> = devices.iter().map(Device::run).collect();
    let digests = releases(aggregator, 2);
    drop(running);
    let (second, third) = (adapter(&federation, &digests[0]), adapter(&federation, &digests[1]));
    for (before, after, moved) in [(&first, &second, Part::B), (&second, &third, Part::A)] {
        let mut changed = 0;
        for spec in before.layout().tensors() {
            let is_same = before.matrix(&spec) == after.matrix(&spec);
            assert!(is_same || spec.part == moved, "{} moved in another's turn", spec.name());
            changed += usize::from(!is_same);
        }
        assert!(changed > 0, "nothing was learned in the turn of {moved:?}");
    }
    for device in &devices {
        for name in ["residual.bin", "residual-a.bin"] {
            assert!(device.state().join(name).exists(), "each factor keeps what is owed of it: {name}");
        }
    }
}

#[test]
fn buffered_rounds_follow_each_other_while_a_device_is_killed_and_another_is_slow() {
    let federation = Federation::new(2, |config| {
        config.round.mode = RoundMode::Buffered;
        config.round.over_selection = 2.0;
    });
    let aggregator = federation.serve_rounds(Some(3), "");
    let devices = federation.enrolled(4);
    let mut running: Vec<_> = devices.iter().map(Device::run).collect();
    running.remove(0).kill();
    let digests = releases(aggregator, 3);
    drop(running);
    assert_eq!(digests.iter().collect::<std::collections::BTreeSet<_>>().len(), 3, "{digests:?}");
    let told = Finished::of(federation.verb("rounds").arg("--json")).with_code(0);
    let rounds: Vec<_> = told.objects().into_iter().filter(|record| record["round"] != 0).collect();
    assert_eq!(rounds.len(), 3);
    let mut merged = std::collections::BTreeSet::new();
    for record in &rounds {
        assert_eq!(record["candidate"]["merge"], "fedit, mean, fedavg, buffered", "{record}");
        let lineage = record["lineage"].as_array().unwrap();
        assert_eq!(lineage.len(), 2, "{record}");
        for origin in lineage {
            assert!(merged.insert(origin["digest"].to_string()), "an update in two releases: {origin}");
            assert!(origin["start"].as_u64() < record["version"].as_u64(), "{record}");
        }
    }
}
