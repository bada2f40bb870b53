//! A release that cannot be installed: told at the next visit, not fetched again and again, and over with the next one.

use commonweal_protocol::{
    BaseHash, Digest, Fault, ReconnectWindow, Release, ReportCard, RoundId, SignedRelease, SigningKey,
    Trouble, Version,
};
use edge_client::pipeline::{Outcome, PipelineError};

use crate::world::*;

fn publish(world: &World, version: u64, bytes: &[u8], base: BaseHash) {
    let release = Release {
        version: Version(version),
        parent: None,
        round: None,
        base,
        digest: Digest::of(bytes),
        length: bytes.len() as u64,
        report_card: ReportCard::default(),
        created_ms: 0,
    };
    let signed = SignedRelease::sign(&SigningKey::from_bytes(&[7; 32]), release).unwrap();
    world.tell(|told| told.release = Some(signed));
}

fn told(world: &World) -> (Option<Version>, Option<Trouble>) {
    let poll = *world.told.lock().unwrap().polls.last().unwrap();
    (poll.installed, poll.trouble)
}

/// A visit that ends with this release, at a moment that the aggregator chose.
fn uninstallable(world: &World) -> Version {
    match world.device.visit() {
        Err(error @ PipelineError::Release { version, .. }) => {
            assert_eq!(error.reconnect(), Some(ReconnectWindow::default()));
            version
        }
        visited => panic!("{visited:?}"),
    }
}

#[test]
fn a_damaged_release_is_told_of_and_not_fetched_again_until_another_comes() {
    let world = World::new();
    let whole = world.told.lock().unwrap().adapter.clone();
    let damaged = vec![7; 1_000];
    world.tell(|told| (told.task, told.adapter) = (None, damaged.clone()));
    publish(&world, 1, &damaged, world.device.expected.base);
    assert_eq!(uninstallable(&world), Version(1));
    let fetches = world.told.lock().unwrap().fetches;
    // It is heard of, and the rest goes on; a round that starts from it cannot.
    assert_eq!(world.visit(), Outcome::Idle);
    let trouble = Trouble { version: Version(1), fault: Fault::Damaged };
    assert_eq!(told(&world), (None, Some(trouble)));
    // After a kill too.
    let after = World::new();
    let noted = world.device.store.read("trouble.json").unwrap().unwrap();
    after.device.store.write("trouble.json", &noted).unwrap();
    after.tell(|told| told.task = None);
    assert_eq!((after.visit(), told(&after)), (Outcome::Idle, (None, Some(trouble))));
    world.begin(1);
    assert_eq!(world.visit(), Outcome::Troubled(Version(1)));
    assert_eq!(world.told.lock().unwrap().fetches, fetches);

    world.tell(|told| told.adapter = whole.clone());
    publish(&world, 2, &whole, world.device.expected.base);
    world.begin(1);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    assert_eq!(told(&world), (None, Some(trouble)));
    world.visit();
    assert_eq!(told(&world), (Some(Version(2)), None));
}

#[test]
fn another_base_and_the_start_of_a_round_are_told_of_too() {
    let world = World::new();
    let whole = world.told.lock().unwrap().adapter.clone();
    let mut other = world.device.expected.base;
    other.0[0] ^= 1;
    publish(&world, 5, &whole, other);
    world.tell(|told| told.task = None);
    assert_eq!(uninstallable(&world), Version(5));
    world.tell(|told| told.release = None);
    world.visit();
    assert_eq!(told(&world).1, Some(Trouble { version: Version(5), fault: Fault::Base }));

    let world = World::new();
    world.tell(|told| told.adapter = vec![7; 1_000]);
    world.begin(1);
    assert_eq!(uninstallable(&world), Version(1));
    assert_eq!(world.visit(), Outcome::Troubled(Version(1)));
    assert_eq!(told(&world).1, Some(Trouble { version: Version(1), fault: Fault::Damaged }));
    // Nothing that the device knows how to do is lost by it.
    assert!(world.opened().is_empty() && world.has("samples/000001.jsonl"));
}

#[test]
fn a_round_from_a_release_that_was_taken_away_is_not_tried_at_every_visit() {
    let world = World::new();
    let whole = world.told.lock().unwrap().adapter.clone();
    world.tell(|told| told.adapter = vec![7; 1_000]);
    world.begin(1);
    assert_eq!(uninstallable(&world), Version(1));
    // All devices are given another, and the round goes on from the damaged one.
    world.tell(|told| (told.task, told.adapter) = (None, whole.clone()));
    publish(&world, 2, &whole, world.device.expected.base);
    world.visit();
    world.tell(|told| told.adapter = vec![7; 1_000]);
    world.begin(1);
    let fetches = world.told.lock().unwrap().fetches;
    for _ in 0..3 {
        assert_eq!(world.visit(), Outcome::Troubled(Version(1)));
        assert_eq!(told(&world), (Some(Version(2)), None));
    }
    assert_eq!(world.told.lock().unwrap().fetches, fetches);
}
