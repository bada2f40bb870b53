//! What goes and what stays, and kills in between.

use std::{path::Path, thread, time::Duration};

use commonweal_adapter::{Adapter, AdapterLayout, Module, Target};
use commonweal_protocol::BaseHash;

use super::*;
use crate::rows::Parsed;

fn sample(number: usize) -> Sample {
    Sample::from_pair(format!("secret {number}"), "r".into()).unwrap()
}

const LEFT: [&str; 11] = [
    "round/task.json",
    "round/drawn.samples",
    "round/judged-0000.bin",
    "round/rewritten-0000.bin",
    "round/pairs.json",
    "round/training.safetensors",
    "round/update.packed",
    "residual.bin",
    "residual-a.bin",
    "control.bin",
    "control-pending.bin",
];

/// Six samples, of which three were drawn and one is in the personal adapter, and all that rounds can leave.
fn filled(store: &Store) {
    personal::tell_samples(store, [sample(4), sample(5)].iter()).unwrap();
    for (name, added) in [("a.jsonl", 1_000), ("b.jsonl", 50_000)] {
        let from = if added == 1_000 { 0..3 } else { 3..6 };
        let good = from.map(|number| (number, sample(number))).collect();
        kept::keep(store, &Parsed { good, bad: Vec::new() }, name, added).unwrap();
    }
    kept::mark_used(store, [0, 1, 4].map(sample).iter()).unwrap();
    for name in LEFT {
        store.write(name, b"computed").unwrap();
    }
    store.write("personal.adapter", b"computed").unwrap();
}

fn ids(numbers: &[usize]) -> BTreeSet<SampleId> {
    numbers.iter().map(|&number| sample(number).id()).collect()
}

fn left(store: &Store) -> Vec<SampleId> {
    kept::samples(store).unwrap().iter().map(Sample::id).collect()
}

fn check(directory: &Path, forgotten: &[usize], rounds: bool, personal: bool) {
    let store = Store::open(directory).unwrap();
    assert!(!is_wished(&store));
    let stay: Vec<usize> = (0..6).filter(|number| !forgotten.contains(number)).collect();
    assert_eq!(left(&store), stay.iter().map(|&number| sample(number).id()).collect::<Vec<_>>());
    for name in LEFT {
        assert_eq!(store.exists(name), !rounds, "{name}");
    }
    assert_eq!(personal::exists(&store), !personal);
    assert!(kept::used(&store).unwrap().unwrap().is_disjoint(&ids(forgotten)));
}

#[test]
fn what_is_computed_from_a_sample_goes_with_it_and_nothing_else_does() {
    for (numbers, rounds, personal) in
        [(&[2][..], false, false), (&[0, 1, 2], true, false), (&[5], false, true), (&[4], true, true)]
    {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        filled(&store);
        wish(&store, &ids(numbers)).unwrap();
        assert!(is_wished(&store));
        assert_eq!(carry_out(&store).unwrap(), Forgotten { rounds, personal }, "{numbers:?}");
        assert_eq!(carry_out(&store).unwrap(), Forgotten::default());
        drop(store);
        check(directory.path(), numbers, rounds, personal);
    }
}

#[test]
fn of_what_a_program_of_before_left_nobody_knows_the_samples() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    filled(&store);
    store.remove("used.samples").unwrap();
    store.remove("personal.samples").unwrap();
    wish(&store, &ids(&[2])).unwrap();
    assert_eq!(carry_out(&store).unwrap(), Forgotten { rounds: true, personal: true });
}

/// Filled, and killed at this durable step from now on.
fn dying(kill_at: u32) -> (tempfile::TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    filled(&store);
    drop(store);
    let dying = Store::open_dying(directory.path(), kill_at).unwrap();
    (directory, dying)
}

/// A kill at every durable step, then another start.
#[test]
fn a_wish_outlives_any_kill() {
    for kill_at in 0.. {
        let (directory, dying) = dying(kill_at);
        let wished = wish(&dying, &ids(&[1, 4]));
        let done = wished.and_then(|()| carry_out(&dying));
        drop(dying);
        let store = Store::open(directory.path()).unwrap();
        let is_wish_whole = is_wished(&store);
        carry_out(&store).unwrap();
        drop(store);
        if is_wish_whole || done.is_ok() {
            check(directory.path(), &[1, 4], true, true);
        } else {
            // The wish itself was never written: everything is as it was.
            check(directory.path(), &[], false, false);
        }
        if done.is_ok() {
            assert!(kill_at > 10, "{kill_at} steps");
            return;
        }
    }
}

#[test]
fn everything_goes_without_the_key_too_and_survives_any_kill() {
    for kill_at in 0.. {
        let (directory, dying) = dying(kill_at);
        let done = wish_all(&dying).and_then(|()| carry_out(&dying));
        drop(dying);
        std::fs::remove_file(directory.path().join(crate::keys::FILE)).unwrap();
        let key = crate::keys::KeyPlace::File(directory.path().join(crate::keys::FILE));
        let mut store = Store::lock(directory.path(), key).unwrap();
        wish_all(&store).unwrap();
        carry_out(&store).unwrap();
        assert!(store.secrets().unwrap().is_empty());
        store.unseal().unwrap();
        drop(store);
        let store = Store::open(directory.path()).unwrap();
        assert!(kept::all(&store).unwrap().is_empty() && !is_wished(&store));
        if done.is_ok() {
            return;
        }
    }
}

#[test]
fn what_is_wished_while_another_wish_is_carried_out_stays_wished() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    filled(&store);
    wish(&store, &ids(&[1])).unwrap();
    forget(&store, &ids(&[1])).unwrap();
    wish(&store, &ids(&[4])).unwrap();
    take_off(&store, &ids(&[1])).unwrap();
    assert_eq!(kept::read_ids(&store, WISH).unwrap(), Some(ids(&[4])));
    carry_out(&store).unwrap();
    assert!(!is_wished(&store));
    drop(store);
    check(directory.path(), &[1, 4], true, true);
}

#[test]
fn a_wish_that_is_being_written_goes_with_everything() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    filled(&store);
    wish_all(&store).unwrap();
    let held = store.hold(WISH_LOCK).unwrap();
    thread::scope(|scope| {
        let forgetting = scope.spawn(|| carry_out(&store).unwrap());
        // Long enough for whoever does not wait.
        for _ in 0..200 {
            if !forgetting.is_finished() {
                thread::sleep(Duration::from_millis(1));
            }
        }
        add_to_wish(&store, &ids(&[1])).unwrap();
        drop(held);
    });
    assert!(!is_wished(&store) && store.secrets().unwrap().is_empty());
}

#[test]
fn what_was_listed_before_everything_was_forgotten_is_not_wished_with_a_key_that_has_gone() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = Store::open(directory.path()).unwrap();
    filled(&store);
    let looking = Store::open_shared(directory.path()).unwrap();
    let era = Era::now(&looking).unwrap();
    assert_eq!(left(&looking).len(), 6);
    assert!(wish_of(&looking, &ids(&[1]), era).unwrap());
    assert!(is_wished(&looking));
    wish_all(&store).unwrap();
    carry_out(&store).unwrap();
    assert!(store.unseal().unwrap());
    drop(store);
    assert!(!wish_of(&looking, &ids(&[2]), era).unwrap());
    assert!(!is_wished(&looking));
    Store::open(directory.path()).unwrap();
}

#[test]
fn an_adapter_in_training_is_not_kept_once_its_samples_are_forgotten() {
    let modules = vec![Module { target: Target::Q, inputs: 3, outputs: 4 }];
    let layout = std::sync::Arc::new(AdapterLayout::new(1, 1, 4.0, modules).unwrap());
    let (adapter, base) = (Adapter::init(layout, 0), BaseHash([3; 32]));
    for all in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let write = |numbers: &[usize]| personal::write(&store, &adapter, base, &ids(numbers));
        personal::tell_samples(&store, [sample(1), sample(2)].iter()).unwrap();
        if all { wish_all(&store) } else { wish(&store, &ids(&[2])) }.unwrap();
        carry_out(&store).unwrap();
        assert!(matches!(write(&[1, 2]), Err(personal::PersonalError::Forgotten)));
        personal::tell_samples(&store, [sample(1)].iter()).unwrap();
        write(&[1]).unwrap();
        assert!(personal::exists(&store));
    }
}

#[test]
fn what_is_older_than_the_owner_keeps_is_expired() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    filled(&store);
    let keep = Span::of_seconds(10);
    assert_eq!(expired(&store, keep, 11_000).unwrap(), ids(&[]));
    assert_eq!(expired(&store, keep, 11_001).unwrap(), ids(&[0, 1, 2]));
    // A clock that went back expires nothing.
    assert_eq!(expired(&store, keep, 0).unwrap(), ids(&[]));
}

#[test]
fn a_beginning_must_mean_one_sample() {
    let all: Vec<Sample> = (0..40).map(sample).collect();
    let name = all[3].id().to_string();
    assert_eq!(choose(&all, &[name[..12].to_uppercase()]), Ok(ids(&[3])));
    assert_eq!(choose(&all, &["xyz".into()]), Err(ChooseError::None { beginning: "xyz".into() }));
    assert_eq!(choose(&all, &[String::new()]), Err(ChooseError::Several { beginning: String::new() }));
}
