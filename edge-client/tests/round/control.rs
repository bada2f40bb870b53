//! Rounds that correct gradients (SCAFFOLD) or train one factor at a time (RoLoRA).

use std::sync::Arc;

use commonweal_adapter::{Adapter, AdapterDelta, AdapterFacts, AdapterKind, Trainable, disk, pair};
use commonweal_protocol::{Control, Digest, KeyNumber, Mode, RoundId, Scaffold, SignedControl, SigningKey};
use edge_client::{
    control::ControlError,
    pipeline::{Outcome, PipelineError},
};

use crate::world::*;

impl World {
    /// The round that is open corrects gradients by a control variate of this value everywhere, after these rounds.
    fn correct(&self, value: f32, round: u64, merged: u64) {
        let mut control = Adapter::zeros(Arc::clone(self.device.model.layout()));
        control.values_mut().fill(value);
        let base = self.device.expected.base;
        let facts = AdapterFacts { base: base.0, kind: AdapterKind::Control };
        let file = disk::write(&control, &facts).unwrap();
        let (digest, length) = (Digest::of(&file), file.len() as u64);
        let control = Control { round: RoundId(round), merged, base, digest, length };
        let signed = SignedControl::sign(&self.device.link.key, control).unwrap();
        self.tell(|told| {
            told.control = file;
            told.task.as_mut().unwrap().scaffold = Scaffold::Control(signed);
        });
    }

    fn file(&self, name: &str) -> Option<Vec<u8>> {
        self.device.store.read(name).unwrap()
    }

    /// The device's control variate in one of its files.
    fn own(&self, name: &str) -> Adapter {
        disk::read(&self.file(name).unwrap()[8..]).unwrap().0
    }

    /// The change of the control variate in the last upload.
    fn change(&self) -> AdapterDelta {
        let offered = self.told.lock().unwrap().offered.clone();
        pair::decode(&offered, self.device.model.layout(), Trainable::BOnly, true).unwrap().1.unwrap()
    }
}

#[test]
fn a_control_variate_counts_when_its_round_was_merged_and_a_kill_changes_nothing_about_it() {
    let world = World::new();
    world.tell(|told| told.task.as_mut().unwrap().scaffold = Scaffold::Zero);
    // The network goes away between training and upload.
    world.tell(|told| told.is_away = true);
    assert!(world.device.visit().unwrap_err().is_transient());
    let next = world.file("round/control.bin").unwrap();
    assert!(!world.has("control.bin") && !world.has("control-pending.bin"));
    world.tell(|told| told.is_away = false);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    assert_eq!(world.file("control-pending.bin").unwrap(), next, "the receipt is there, the merge is not");
    assert!(!world.has("control.bin"));
    // It began at zero, so that what it has is what it sent: mean gradients, of B alone.
    let first = world.own("control-pending.bin");
    let sent = Adapter::zeros(Arc::clone(first.layout())).plus(&world.change(), 1.0).unwrap();
    assert_eq!(first, sent);
    assert!(sent.values().iter().any(|value| *value != 0.0));

    // Round 2 is told that round 1 was merged, and is itself never merged.
    world.begin(2);
    world.correct(0.001, 1, 0b1);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(2)));
    assert_eq!(world.own("control.bin"), first);
    let second = world.own("control-pending.bin");
    assert_eq!(second, first.plus(&world.change(), 1.0).unwrap());
    world.begin(3);
    world.correct(0.002, 1, 0b1);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(3)));
    assert_eq!(world.own("control.bin"), first, "what no merge took is forgotten");

    // A new beginning of the aggregator's.
    world.begin(4);
    world.tell(|told| told.task.as_mut().unwrap().scaffold = Scaffold::Zero);
    world.tell(|told| told.is_away = true);
    assert!(world.device.visit().unwrap_err().is_transient());
    assert!(!world.has("control.bin") && !world.has("control-pending.bin"));
}

#[test]
fn the_correction_moves_the_update_and_one_of_a_stranger_is_refused() {
    let offered = |value: f32| {
        let world = World::new();
        world.begin(2);
        world.correct(value, 1, 0b1);
        assert_eq!(world.visit(), Outcome::Delivered(RoundId(2)));
        let offered = world.told.lock().unwrap().offered.clone();
        pair::decode(&offered, world.device.model.layout(), Trainable::BOnly, true).unwrap().0
    };
    assert_ne!(offered(0.0), offered(0.1));

    let mut world = World::new();
    world.correct(0.1, 1, 0b1);
    world.device.expected.trust = trust(&SigningKey::from_bytes(&[8; 32]));
    let error = world.device.visit().unwrap_err();
    assert!(matches!(error, PipelineError::Control(_)), "{error}");
    assert!(world.opened().is_empty());
}

#[test]
fn a_control_variate_by_a_retired_key_is_refused() {
    let mut world = World::new();
    let retired = world.device.link.key.clone();
    world.rotate(21);
    world.tell(|told| told.task = None);
    assert_eq!(world.visit(), Outcome::Idle);
    let current = std::mem::replace(&mut world.device.link.key, retired);
    world.begin(2);
    world.correct(0.1, 1, 0b1);
    let error = world.device.visit().unwrap_err();
    let PipelineError::Control(error) = error else { panic!("{error}") };
    assert!(matches!(error, ControlError::Signature { round: RoundId(1), .. }), "{error}");
    assert!(world.opened().is_empty());
    world.device.link.key = current;
    world.correct(0.1, 1, 0b1);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(2)));
}

#[test]
fn a_rotation_of_the_aggregators_key_costs_nothing_of_a_rounds_work() {
    let mut world = World::new();
    world.begin(2);
    world.correct(0.1, 1, 0b1);
    world.tell(|told| told.is_away = true);
    assert!(world.device.visit().unwrap_err().is_transient());
    // As if a break had come before the update was packed.
    for name in ["round/update.json", "round/update.packed"] {
        world.device.store.remove(name).unwrap();
    }
    let kept = |world: &World| {
        ["round/pairs.json", "round/training.safetensors"]
            .map(|name| std::fs::read(world.directory.path().join(name)).unwrap())
    };
    let before = kept(&world);
    world.rotate(9);
    world.correct(0.1, 1, 0b1);
    assert!(world.device.visit().unwrap_err().is_transient());
    assert_eq!(world.device.expected.trust.number(), KeyNumber(1));
    // Sealed anew, they would have other bytes.
    assert!(kept(&world) == before, "it was gone on with");
    world.tell(|told| told.is_away = false);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(2)));
    // Another control variate is another task.
    world.begin(3);
    world.correct(0.1, 1, 0b1);
    world.tell(|told| told.is_away = true);
    assert!(world.device.visit().unwrap_err().is_transient());
    world.device.store.remove("round/update.json").unwrap();
    let before = kept(&world);
    world.correct(0.2, 1, 0b1);
    assert!(world.device.visit().unwrap_err().is_transient());
    assert!(kept(&world) != before);
}

#[test]
fn what_is_owed_of_each_factor_waits_for_its_turn() {
    let world = World::new();
    let turn = |round: u64| {
        world.begin(round);
        world.tell(|told| told.task.as_mut().unwrap().mode = Mode::Rolora);
        assert_eq!(world.visit(), Outcome::Delivered(RoundId(round)));
        [world.file("residual.bin"), world.file("residual-a.bin")]
    };
    let [b, none] = turn(1);
    assert!(b.is_some() && none.is_none());
    let [still, a] = turn(2);
    assert!(still == b && a.is_some());
    let [moved, still] = turn(3);
    assert!(moved != b && still == a);
}
