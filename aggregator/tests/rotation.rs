//! What devices are told once a key was rotated: the steps from the key that they know, and nothing but the word of the
//! one in force, whatever key signed it then.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a test that cannot get its value has failed"
)]

mod support;

use std::sync::Arc;

use aggregator::publish::{PublishError, Publisher};
use aggregator::receive::{Parts, Receiver};
use aggregator::signer::{Keys, Signer};
use aggregator::store::RealDisk;
use commonweal_protocol::{AggregatorKey, KeyNumber, Lineage, Poll, SigningKey, Version};
use commonweal_transport::Opened;
use support::{BASE, NOW_MS, World, device, open, update};

fn world() -> World {
    World::open(tempfile::tempdir().unwrap(), Arc::new(RealDisk), |_| ())
}

/// The same aggregator after so many rotations.
fn rotated(world: &World, rotations: u64) -> (Receiver, Publisher, Lineage) {
    let mut keys = Keys::from(SigningKey::from_bytes(&[3; 32]));
    for number in 0..rotations {
        keys = keys.rotated(NOW_MS + number).unwrap();
    }
    let lineage = keys.lineage().clone();
    let signer = Signer::from(keys);
    let storage = &world.parts.storage;
    let publisher = Publisher::new(storage.coord.clone(), storage.blob.clone(), signer.clone(), BASE);
    let parts = Parts { signer, publisher: publisher.clone(), ..world.parts.clone() };
    (Receiver::new(parts), publisher, lineage)
}

#[test]
fn a_device_is_told_the_steps_from_its_own_key_and_a_release_in_the_word_of_the_last() {
    let world = world();
    let first = world.parts.signer.keys().lineage().key();
    let (receiver, publisher, lineage) = rotated(&world, 3);
    let poll = |key| {
        receiver
            .poll(device(1), Poll { base: BASE, installed: None, key: KeyNumber(key), trouble: None })
            .unwrap()
    };
    for known in 0..=4 {
        let reply = poll(known);
        assert_eq!(reply.successions.len() as u64, 3_u64.saturating_sub(known));
        let release = reply.release.unwrap();
        release.verify(&lineage.key()).unwrap();
        assert!(release.verify(&first).is_err());
        let stored = publisher.head().unwrap().unwrap();
        assert_eq!(stored.release, release.release, "the value is the same");
        stored.verify(&first).unwrap();
    }
    assert_eq!(receiver.keys_known()[&device(1)], KeyNumber(4), "as it said last");
    let mut device = Lineage::new(KeyNumber(0), first);
    device.follow(&poll(0).successions).unwrap();
    assert_eq!(device.key(), lineage.key());
}

#[test]
fn a_receipt_of_before_is_repeated_in_the_word_of_the_key_in_force() {
    let world = world();
    world.assign(&[1]);
    let bytes = update(0.1);
    let before = world.upload(1, open(1, &bytes), &bytes).unwrap().receipt;
    let (receiver, _, lineage) = rotated(&world, 2);
    let Opened::Done(again) = receiver.open(device(1), open(1, &bytes)).unwrap() else {
        panic!("taken before")
    };
    assert_eq!(again.receipt.verify(&lineage.key()).unwrap(), &before.receipt);
    let finished = receiver.finish(device(1), open(1, &bytes).key()).unwrap();
    assert_eq!(finished.receipt, again.receipt);
    // Without a rotation it is the same to the byte.
    let Opened::Done(same) = world.receiver.open(device(1), open(1, &bytes)).unwrap() else { panic!() };
    assert_eq!(same.receipt, before);
}

#[test]
fn releases_of_every_key_are_read_and_a_roll_back_is_the_word_of_the_last() {
    let world = world();
    let (_, once, _) = rotated(&world, 1);
    assert!(matches!(once.roll_back(Version(0), NOW_MS), Ok(signed) if signed.release.version == Version(1)));
    let head = once.head().unwrap().unwrap();
    assert_eq!(once.signed_with(&head), Some(KeyNumber(1)));
    assert_eq!(once.signed_with(&once.release(Version(0)).unwrap()), Some(KeyNumber(0)));
    // Another key number 1, as after a backup of before: it has not signed this.
    let (_, other, lineage) = rotated(&world, 1);
    assert_ne!(lineage.key(), AggregatorKey::of(&SigningKey::from_bytes(&[3; 32])));
    assert!(matches!(other.head(), Err(PublishError::Corrupt { version: 1, .. })));
}
