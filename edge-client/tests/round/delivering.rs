//! What becomes of an update that is sent: taken, refused, damaged, let go, or without an answer.

use std::{collections::BTreeSet, sync::Arc};

use commonweal_adapter::Adapter;
use commonweal_protocol::{DeviceId, Digest, KeyNumber, ReconnectWindow, Refusal, RoundId, SigningKey};
use commonweal_runtime::Cancel;
use edge_client::{
    personal,
    pipeline::{Outcome, PipelineError},
    upload::UploadError,
};

use crate::world::*;

#[test]
fn a_kill_after_the_receipt_does_not_send_the_same_residual_twice() {
    let world = World::new();
    let saved = tempfile::tempdir().unwrap();
    let round = world.directory.path().join("round");
    world.tell(|told| told.snapshot = Some((round.clone(), saved.path().to_owned())));
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    let owed = world.device.store.read("residual.bin").unwrap().unwrap();

    // The receipt is on disk, the rest is as the kill left it; the next round has begun meanwhile.
    copy_folder(saved.path(), &round);
    assert_eq!(world.device.store.read("round/residual.bin").unwrap().unwrap(), owed);
    world.device.store.remove("residual.bin").unwrap();
    world.begin(2);
    world.tell(|told| (told.snapshot, told.is_away) = (None, true));
    assert!(world.device.visit().unwrap_err().is_transient());
    assert_eq!(world.device.store.read("residual.bin").unwrap().unwrap(), owed);
    world.tell(|told| told.is_away = false);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(2)));
    assert_eq!(world.visit(), Outcome::AlreadyDelivered(RoundId(2)));
    assert_eq!(world.opened().len(), 2);
}

#[test]
fn a_receipt_under_a_key_that_followed_is_taken_once_the_device_has_heard_of_it() {
    let mut world = World::new();
    world.tell(|told| told.is_away = true);
    assert!(world.device.visit().unwrap_err().is_transient());
    // The update is packed; what signs for it is a key that no poll has told of.
    world.rotate(21);
    world.tell(|told| told.is_away = false);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    let opened = world.opened();
    assert_eq!((opened.len(), opened[0].digest), (2, opened[1].digest), "the same update again");
    assert_eq!(world.device.expected.trust.number(), KeyNumber(1));
    // After the next rotation a receipt of before counts as it did.
    world.rotate(22);
    assert_eq!(world.visit(), Outcome::AlreadyDelivered(RoundId(1)));
    assert_eq!(world.device.expected.trust.number(), KeyNumber(2));
    assert_eq!(world.opened().len(), 2);

    // A stranger's word is none, however often it is asked for.
    world.begin(2);
    world.device.link.key = SigningKey::from_bytes(&[66; 32]);
    for _ in 0..2 {
        let error = world.device.visit().unwrap_err();
        assert!(matches!(error, PipelineError::Upload(_)), "{error}");
    }
    assert_eq!(world.opened().len(), 4, "offered once a visit, for no poll told of another key");
}

#[test]
fn a_receipt_by_a_retired_key_is_none() {
    let mut world = World::new();
    let retired = world.device.link.key.clone();
    world.rotate(21);
    world.tell(|told| told.task = None);
    assert_eq!(world.visit(), Outcome::Idle);
    assert_eq!(world.device.expected.trust.number(), KeyNumber(1));
    // Whoever has it goes on signing.
    let current = std::mem::replace(&mut world.device.link.key, retired);
    world.begin(2);
    for _ in 0..2 {
        match world.device.visit().unwrap_err() {
            PipelineError::Upload(error) => {
                assert!(matches!(*error, UploadError::Signature { round: RoundId(2), .. }), "{error}");
            }
            error => panic!("{error}"),
        }
    }
    assert!(world.has("round/update.packed") && !world.has("receipts.jsonl"));
    world.device.link.key = current;
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(2)));
}

#[test]
fn an_update_whose_receipt_was_lost_is_offered_again_when_its_round_is_over() {
    let world = World::new();
    world.tell(|told| told.is_away = true);
    assert!(world.device.visit().unwrap_err().is_transient());
    let packed = world.device.store.read("round/update.packed").unwrap().unwrap();
    let next = world.device.store.read("round/residual.bin").unwrap();
    world.begin(2);
    world.tell(|told| told.is_away = false);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    assert_eq!(world.opened()[0].digest, Digest::of(&packed));
    assert_eq!(world.device.store.read("residual.bin").unwrap(), next);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(2)));

    // If it was not taken in time, it is let go, and with it what it would have owed.
    world.begin(3);
    world.tell(|told| told.is_away = true);
    assert!(world.device.visit().unwrap_err().is_transient());
    let before = world.device.store.read("residual.bin").unwrap();
    world.begin(4);
    world.tell(|told| (told.is_away, told.refusal) = (false, Some(Refusal::StaleRound)));
    assert_eq!(world.visit(), Outcome::Refused(RoundId(4), Refusal::StaleRound));
    let rounds: Vec<u64> = world.opened().iter().map(|open| open.round.0).collect();
    assert_eq!(rounds, [1, 2, 3, 4]);
    assert_eq!(world.device.store.read("residual.bin").unwrap(), before);
}

/// What is owed after an update that nobody answered and that was let go, since the owner changed the policy.
#[test]
fn an_update_that_was_let_go_is_owed_by_the_aggregators_word_on_the_next() {
    // The first is packed and sent; no answer comes, and the policy changes.
    let let_go = |round: u64, world: &mut World| {
        world.begin(round);
        world.tell(|told| told.is_away = true);
        assert!(world.device.visit().unwrap_err().is_transient());
        let left = world.device.store.read("round/residual.bin").unwrap().unwrap();
        world.device.policy.train.samples_max -= 1;
        world.tell(|told| told.is_away = false);
        left
    };
    let owed = |world: &World| world.device.store.read("residual.bin").unwrap();
    let mut world = World::new();
    world.device.policy.train.samples_max = 9;

    // It was taken.
    for (round, refusal) in [(1, Refusal::AlreadySent), (2, Refusal::StaleRound)] {
        let left = let_go(round, &mut world);
        world.tell(|told| told.refusal = Some(refusal));
        assert_eq!(world.visit(), Outcome::Refused(RoundId(round), refusal));
        assert_eq!(owed(&world), Some(left), "{refusal:?}");
        world.tell(|told| told.refusal = None);
    }
    // It was not: the next one was.
    let left = let_go(3, &mut world);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(3)));
    assert!(owed(&world).is_some_and(|owed| owed != left));
    // It was not, and nor was the next.
    let before = owed(&world);
    let_go(4, &mut world);
    world.tell(|told| told.refusal = Some(Refusal::UpdateUnusable));
    assert_eq!(world.visit(), Outcome::Refused(RoundId(4), Refusal::UpdateUnusable));
    assert_eq!(owed(&world), before);
    world.tell(|told| told.refusal = None);
    // Nobody says: its round is over.
    let left = let_go(5, &mut world);
    world.begin(6);
    world.tell(|told| told.is_away = true);
    assert!(world.device.visit().unwrap_err().is_transient());
    assert_eq!(owed(&world), Some(left));
    world.tell(|told| told.is_away = false);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(6)));
    // One was taken that this device does not know.
    world.begin(7);
    world.tell(|told| told.refusal = Some(Refusal::AlreadySent));
    assert_eq!(world.visit(), Outcome::Refused(RoundId(7), Refusal::AlreadySent));
    assert_eq!(owed(&world), None);
}

#[test]
fn a_visit_that_waits_for_the_network_ends_when_it_is_cancelled() {
    let mut world = World::new();
    world.tell(|told| told.is_silent = true);
    let (told, cancel) = (Arc::clone(&world.told), world.device.cancel.clone());
    let owner = std::thread::spawn(move || {
        while told.lock().unwrap().opened.is_empty() {
            std::thread::yield_now();
        }
        cancel.cancel();
    });
    let error = world.device.visit().unwrap_err();
    owner.join().unwrap();
    assert!(matches!(error, PipelineError::Cancelled), "{error}");
    // What was finished is kept.
    world.device.cancel = Cancel::new();
    world.tell(|told| told.is_silent = false);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    let opened = world.opened();
    assert!(opened.len() == 2 && opened[0] == opened[1], "{opened:?}");
}

#[test]
fn a_refused_update_is_not_made_again_and_the_next_round_is_taken() {
    let world = World::new();
    world.tell(|told| told.refusal = Some(Refusal::UpdateUnusable));
    for _ in 0..3 {
        assert_eq!(world.visit(), Outcome::Refused(RoundId(1), Refusal::UpdateUnusable));
    }
    assert_eq!(world.opened().len(), 1, "the same update was sent again");
    assert!(!world.has("round/pairs.json") && !world.has("residual.bin"));
    world.tell(|told| told.refusal = None);
    world.begin(2);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(2)));
}

#[test]
fn an_update_that_arrived_damaged_is_sent_again_but_not_for_ever() {
    let world = World::new();
    for (number, refusal) in [Refusal::DigestMismatch, Refusal::LengthMismatch].into_iter().enumerate() {
        let round = 1 + number as u64;
        world.begin(round);
        world.tell(|told| (told.refusal, told.refusals_left) = (Some(refusal), Some(2)));
        assert_eq!(world.visit(), Outcome::Delivered(RoundId(round)), "{refusal:?}");
        assert_eq!(world.opened().len(), 3 * (number + 1));
    }
    world.begin(3);
    world.tell(|told| (told.refusal, told.refusals_left) = (Some(Refusal::DigestMismatch), None));
    assert_eq!(world.visit(), Outcome::Refused(RoundId(3), Refusal::DigestMismatch));
    let opened = world.opened().split_off(6);
    assert_eq!(opened.len(), 4);
    assert!(opened.iter().all(|open| open == &opened[0]), "another update was sent");
}

#[test]
fn an_update_at_whose_end_the_certificate_is_over_is_kept() {
    let world = World::new();
    world.tell(|told| told.refusal = Some(Refusal::Expired));
    let error = world.device.visit().unwrap_err();
    assert_eq!((error.refusal(), error.is_transient()), (Some(Refusal::Expired), false));
    // With a fresh one, and even in a later round, it is offered again as it was.
    world.begin(2);
    world.tell(|told| told.refusal = None);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    let opened = world.opened();
    assert!(opened.len() == 2 && opened[0] == opened[1], "{opened:?}");
}

#[test]
fn a_receipt_for_another_device_is_none() {
    let world = World::new();
    world.tell(|told| told.signs_for = Some(DeviceId([2; 16])));
    let error = world.device.visit().unwrap_err();
    let error = std::error::Error::source(&error).unwrap().to_string();
    assert!(error.contains(&"02".repeat(16)) && error.contains(&"01".repeat(16)), "{error}");
    assert!(!world.has("receipts.jsonl"));
    world.tell(|told| told.signs_for = None);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
}

#[test]
fn the_window_of_an_updates_answer_counts_and_not_the_polls() {
    let world = World::new();
    assert_eq!(world.device.visit().unwrap().reconnect, AFTER_UPLOAD);
    assert_eq!(world.device.visit().unwrap().reconnect, ReconnectWindow::default());
    world.begin(2);
    world.tell(|told| told.refusal = Some(Refusal::StaleRound));
    assert_eq!(world.device.visit().unwrap().reconnect, AFTER_UPLOAD);
    world.begin(3);
    world.tell(|told| told.refusal = Some(Refusal::Busy));
    assert_eq!(world.device.visit().unwrap_err().reconnect(), Some(AFTER_UPLOAD));
}

#[test]
fn a_personal_adapter_changes_no_bit_of_what_is_sent() {
    let (with, without) = (World::new(), World::new());
    let mut own = Adapter::init(Arc::clone(with.device.model.layout()), 9);
    own.values_mut().iter_mut().for_each(|value| *value += 0.5);
    personal::tell_samples(&with.device.store, [].iter()).unwrap();
    personal::write(&with.device.store, &own, with.device.expected.base, &BTreeSet::new()).unwrap();
    for world in [&with, &without] {
        assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    }
    let sent = |world: &World| world.told.lock().unwrap().offered.clone();
    assert!(!sent(&with).is_empty());
    assert_eq!(sent(&with), sent(&without));
    assert_eq!(personal::read(&with.device.store, with.device.expected.base).unwrap(), Some(own));
}
