//! What outlives a round's merge: the server optimizer's moments and SCAFFOLD's control variate, through rejections,
//! kills and roll-backs; and which form of update a round takes. Real receiver, desk, merge and publisher on real files; the model's two stages pass candidates on.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a test that cannot get its value has failed"
)]

mod support;

use std::sync::Arc;

use aggregator::config::{Config, Gates, Optimizer};
use aggregator::desk::records;
use aggregator::drive::{Driver, Stages, Step};
use aggregator::events::{AlignFigures, EvaluateFigures};
use aggregator::laboratory::LaboratoryError;
use aggregator::publish::Publisher;
use aggregator::receive::{Parts, Receiver};
use aggregator::round::{Policy, RoundMode};
use aggregator::signer::{Keys, Signer};
use aggregator::store::RealDisk;
use commonweal_adapter::{
    Adapter, AdapterDelta, AdapterKind, Bits, CompressOptions, PackedDelta, Residual, Trainable, compress,
    pair,
};
use commonweal_protocol::{
    Fetch, KeyNumber, Mode, Poll, Refusal, ReportCard, RoundId, Scaffold, SigningKey, Version,
};
use commonweal_transport::Opened;
use rand::SeedableRng;
use support::*;

/// Passes every candidate on, with this safe rate.
struct Passing(f64);

impl Stages for Passing {
    fn align(
        &mut self,
        _round: RoundId,
        candidate: Adapter,
    ) -> Result<(Adapter, AlignFigures), LaboratoryError> {
        Ok((candidate, AlignFigures::default()))
    }

    fn evaluate(&mut self, _round: RoundId, _: &Adapter) -> Result<EvaluateFigures, LaboratoryError> {
        let report_card = ReportCard { safe_rate: Some(self.0), ..ReportCard::default() };
        Ok(EvaluateFigures { report_card, ..EvaluateFigures::default() })
    }
}

fn world(change: impl FnOnce(&mut Config)) -> World {
    World::open(tempfile::tempdir().unwrap(), Arc::new(RealDisk), |config| {
        gated(config);
        change(config);
    })
}

/// The stages here measure the safe rate alone.
fn gated(config: &mut Config) {
    config.evaluate.gates = Gates { safe_rate_min: Some(0.8), ..Gates::off() };
}

fn momentum(config: &mut Config) {
    config.merge.optimizer = Optimizer::Fedavgm;
    config.merge.clip_median_factor = 0.0;
}

/// The same state directory after a kill.
fn restart(world: World, change: impl FnOnce(&mut Config)) -> World {
    let World { dir, parts, receiver, .. } = world;
    drop((parts, receiver));
    World::open(dir, Arc::new(RealDisk), |config| {
        gated(config);
        change(config);
    })
}

/// Two devices move every value by 0.1.
fn deliver(world: &World, round: u64) {
    world.assign(&[1, 2]);
    for number in [1, 2] {
        let bytes = update(0.1);
        world.upload(number, open(round, &bytes), &bytes).unwrap();
    }
}

/// Runs stages until there is nothing to do.
fn finish(world: &World, safe_rate: f64) {
    let mut driver = Driver::new(world.parts.clone(), world.base.clone(), Passing(safe_rate));
    for _ in 0..20 {
        if driver.step() != Step::Worked {
            return;
        }
    }
    panic!("the stages never come to rest");
}

fn round(world: &World, number: u64) {
    deliver(world, number);
    finish(world, 1.0);
}

fn release(world: &World, version: u64) -> Vec<f32> {
    let digest = world.parts.publisher.release(Version(version)).unwrap().release.digest;
    let bytes = world.parts.storage.blob.read_all(&digest, 1 << 20).unwrap();
    world.base.read("release", &bytes, AdapterKind::Assistant).unwrap().into_values()
}

/// How far the mean value lies from that of an earlier release; single values have the noise of four bits.
fn moved(world: &World, from: u64, to: u64) -> f32 {
    let (from, to) = (release(world, from), release(world, to));
    from.iter().zip(&to).map(|(from, to)| to - from).sum::<f32>() / from.len() as f32
}

fn assert_near(got: f32, expected: f32) {
    assert!((got - expected).abs() < 0.003, "expected {expected}, got {got}");
}

#[test]
fn momentum_goes_on_from_release_to_release_and_the_card_names_the_merge() {
    let world = world(momentum);
    for number in 1..=3 {
        round(&world, number);
    }
    assert_near(moved(&world, 0, 1), 0.1);
    assert_near(moved(&world, 1, 2), 0.19);
    assert_near(moved(&world, 2, 3), 0.271);
    let card = world.parts.publisher.head().unwrap().unwrap().release.report_card;
    assert_eq!(card.merge, "fedit, mean, fedavgm");
    let blobs = world.parts.storage.blob.list(None, 100).unwrap().len();
    assert_eq!(blobs, 4 + 3, "four releases, and the momentum of all but the first");
}

#[test]
fn a_rejected_candidate_takes_its_momentum_along() {
    let world = world(momentum);
    round(&world, 1);
    deliver(&world, 2);
    finish(&world, 0.4);
    assert_eq!(world.parts.publisher.head().unwrap().unwrap().release.version, Version(1));
    assert_eq!(world.parts.storage.blob.list(None, 100).unwrap().len(), 3, "nothing is left of it");
    round(&world, 3);
    assert_near(moved(&world, 1, 2), 0.19);
}

#[test]
fn a_kill_after_any_step_neither_loses_nor_repeats_a_step_of_the_optimizer() {
    for steps in 0..5 {
        let mut world = world(momentum);
        round(&world, 1);
        deliver(&world, 2);
        let mut driver = Driver::new(world.parts.clone(), world.base.clone(), Passing(1.0));
        for _ in 0..steps {
            driver.step();
        }
        drop(driver);
        world = restart(world, momentum);
        finish(&world, 1.0);
        round(&world, 3);
        assert_near(moved(&world, 1, 2), 0.19);
        assert_near(moved(&world, 2, 3), 0.271);
    }
}

#[test]
fn a_roll_back_goes_on_with_the_momentum_of_its_release() {
    let world = world(momentum);
    round(&world, 1);
    round(&world, 2);
    world.parts.publisher.roll_back(Version(1), NOW_MS).unwrap();
    round(&world, 3);
    assert_near(moved(&world, 3, 4), 0.19);
}

#[test]
fn another_optimizer_begins_anew() {
    let mut world = world(momentum);
    round(&world, 1);
    let adam = |config: &mut Config| {
        momentum(config);
        config.merge.optimizer = Optimizer::Fedadam;
        config.merge.server_learning_rate = 0.01;
    };
    world = restart(world, adam);
    round(&world, 2);
    // m = 0.01, v = 0.1² · 0.01 + 0.99 · τ²: a step of 0.01 · 0.01 / (0.010 + 0.001), in nearly each value.
    assert_near(moved(&world, 1, 2), 0.0091);
    assert!(world.parts.publisher.state(Version(2)).unwrap().variance.is_some());
}

#[test]
fn moments_that_are_lost_on_disk_end_the_round_by_name() {
    let world = world(momentum);
    round(&world, 1);
    let lost = world.parts.publisher.state(Version(1)).unwrap().momentum.unwrap();
    world.parts.storage.blob.delete(&lost).unwrap();
    round(&world, 2);
    let records = records(world.parts.storage.coord.as_ref(), RoundId(2), 1).unwrap();
    assert!(records[0].reason.as_ref().unwrap().contains(&lost.to_string()), "it is named");
}

/// What a round of SCAFFOLD sends: a value for the delta and one for the control's change.
fn corrected(delta: f32, control: f32) -> Vec<u8> {
    pair::join(&packed(Trainable::Both, delta), &packed(Trainable::Both, control))
}

fn packed(trainable: Trainable, value: f32) -> PackedDelta {
    let values = vec![value; layout().trainable_parameters(trainable)];
    let delta = AdapterDelta::from_values(layout(), trainable, values).unwrap();
    let mut residual = Residual::zeros(layout(), trainable);
    // Blocks of equal values are exact but for their scale.
    let options = CompressOptions { bits: Bits::Eight, block: 64, ..CompressOptions::default() };
    compress(&delta, &mut residual, &options, &mut rand_chacha::ChaCha8Rng::seed_from_u64(1)).unwrap()
}

fn scaffold(config: &mut Config) {
    config.train.scaffold = true;
}

/// Two devices whose controls change by these.
fn deliver_corrected(world: &World, round: u64, changes: [f32; 2]) {
    world.assign(&[1, 2]);
    for (number, change) in [1, 2].into_iter().zip(changes) {
        let bytes = corrected(0.1, change);
        world.upload(number, open(round, &bytes), &bytes).unwrap();
    }
}

/// The server's control variate as a device gets it: told by a task, verified, fetched.
fn fetched(world: &World) -> Option<(commonweal_protocol::Control, f32)> {
    world.assign(&[1]);
    let reply = world
        .receiver
        .poll(device(1), Poll { base: BASE, installed: None, key: KeyNumber(0), trouble: None })
        .unwrap();
    let Scaffold::Control(signed) = reply.task.unwrap().scaffold else { return None };
    let control = *signed.verify(&world.parts.signer.keys().lineage().key()).unwrap();
    let fetch = Fetch { digest: control.digest, offset: 0 };
    let part = world.receiver.read(device(1), fetch, 1 << 20).unwrap();
    assert_eq!(part.length, control.length);
    let adapter = world.base.read("control", &part.bytes, AdapterKind::Control).unwrap();
    Some((control, adapter.values()[0]))
}

/// Made under one key, told under the next: a device would not take the retired one's word.
#[test]
fn the_control_variate_is_told_in_the_word_of_the_key_in_force() {
    let world = world(scaffold);
    deliver_corrected(&world, 1, [0.2, 0.4]);
    finish(&world, 1.0);
    let (before, _) = fetched(&world).unwrap();
    let keys = Keys::from(SigningKey::from_bytes(&[3; 32])).rotated(1).unwrap();
    let key = keys.lineage().key();
    let storage = &world.parts.storage;
    let signer = Signer::from(keys);
    let publisher = Publisher::new(storage.coord.clone(), storage.blob.clone(), signer.clone(), BASE);
    let receiver = Receiver::new(Parts { signer, publisher, ..world.parts.clone() });
    let poll = Poll { base: BASE, installed: None, key: KeyNumber(0), trouble: None };
    let Scaffold::Control(signed) = receiver.poll(device(1), poll).unwrap().task.unwrap().scaffold else {
        panic!("no control variate")
    };
    assert_eq!(signed.verify(&key).unwrap(), &before);
}

#[test]
fn the_control_variate_is_merged_once_through_a_kill_after_any_step() {
    for steps in 0..6 {
        let mut world = world(scaffold);
        deliver_corrected(&world, 1, [0.2, 0.4]);
        let mut driver = Driver::new(world.parts.clone(), world.base.clone(), Passing(1.0));
        for _ in 0..steps {
            driver.step();
        }
        drop(driver);
        world = restart(world, scaffold);
        finish(&world, 1.0);
        deliver_corrected(&world, 2, [0.1, 0.1]);
        finish(&world, 1.0);
        let (control, value) = fetched(&world).unwrap();
        assert_near(value, 0.4);
        assert_eq!((control.round, control.merged), (RoundId(2), 0b11));
        let blobs = world.parts.storage.blob.list(None, 100).unwrap().len();
        assert_eq!(blobs, 3 + 1, "three releases and one control variate");
    }
}

#[test]
fn devices_keep_theirs_when_a_candidate_is_rejected_or_rolled_back_and_so_does_the_server() {
    let world = world(scaffold);
    deliver_corrected(&world, 1, [0.2, 0.4]);
    finish(&world, 0.4);
    assert_eq!(world.parts.publisher.head().unwrap().unwrap().release.version, Version(0));
    assert_near(fetched(&world).unwrap().1, 0.3);
    deliver_corrected(&world, 2, [0.1, 0.1]);
    finish(&world, 1.0);
    world.parts.publisher.roll_back(Version(0), NOW_MS).unwrap();
    assert_near(fetched(&world).unwrap().1, 0.4);
}

#[test]
fn a_round_that_ends_without_a_merge_is_not_in_the_control_variate() {
    let world = world(|config| {
        scaffold(config);
        config.round.quorum = 2;
    });
    deliver_corrected(&world, 1, [0.2, 0.4]);
    finish(&world, 1.0);
    world.assign(&[1, 2]);
    let bytes = corrected(0.1, 0.9);
    world.upload(1, open(2, &bytes), &bytes).unwrap();
    world.clock.set(NOW_MS + 60_000);
    finish(&world, 1.0);
    deliver_corrected(&world, 3, [0.1, 0.1]);
    finish(&world, 1.0);
    let (control, value) = fetched(&world).unwrap();
    assert_near(value, 0.4);
    assert!(control.includes(RoundId(1)) && !control.includes(RoundId(2)) && control.includes(RoundId(3)));
}

#[test]
fn a_change_far_longer_than_the_others_is_shortened_and_a_round_without_correction_begins_anew() {
    let mut world = world(|config| {
        scaffold(config);
        config.round.goal = 3;
    });
    world
        .receiver
        .poll(device(103), Poll { base: BASE, installed: None, key: KeyNumber(0), trouble: None })
        .unwrap();
    world.assign(&[1, 2, 3]);
    for (number, change) in [(1, 0.1), (2, 0.1), (3, 90.0)] {
        let bytes = corrected(0.1, change);
        world.upload(number, open(1, &bytes), &bytes).unwrap();
    }
    finish(&world, 1.0);
    let control = world.parts.desk.control().unwrap().control;
    let bytes = world.parts.storage.blob.read_all(&control.digest, 1 << 20).unwrap();
    let adapter = world.base.read("control", &bytes, AdapterKind::Control).unwrap();
    assert_near(adapter.values()[0], (0.1 + 0.1 + 0.4) / 3.0);

    world = restart(world, |_| ());
    deliver(&world, 2);
    finish(&world, 1.0);
    world = restart(world, scaffold);
    assert!(fetched(&world).is_none(), "devices are told that it is zero");
}

#[test]
fn updates_of_another_form_than_the_rounds_are_refused() {
    let refusal = |world: &World, round: u64, bytes: &[u8]| {
        world.upload(1, open(round, bytes), bytes).unwrap_err().reason
    };
    let with = world(scaffold);
    with.assign(&[1]);
    assert_eq!(refusal(&with, 1, &update(0.1)), Refusal::UpdateUnusable);
    let without = world(|_| ());
    without.assign(&[1]);
    assert_eq!(refusal(&without, 1, &corrected(0.1, 0.1)), Refusal::UpdateUnusable);
    let turns = world(|config| config.train.mode = Mode::Rolora);
    turns.assign(&[1, 2]);
    let (a, b) = (packed(Trainable::AOnly, 0.1).into_bytes(), packed(Trainable::BOnly, 0.1).into_bytes());
    assert_eq!(refusal(&turns, 1, &a), Refusal::UpdateUnusable);
    for number in [1, 2] {
        turns.upload(number, open(1, &b), &b).unwrap();
    }
    finish(&turns, 1.0);
    turns.assign(&[1]);
    assert_eq!(refusal(&turns, 2, &b), Refusal::UpdateUnusable);
    turns.upload(1, open(2, &a), &a).unwrap();
}

#[test]
fn an_exact_merge_averages_what_adapters_do_and_tells_what_lies_beyond_the_rank() {
    let world = world(|config| {
        config.train.mode = Mode::Exact;
        config.merge.clip_median_factor = 0.0;
    });
    let read = |world: &World| {
        let digest = world.parts.publisher.head().unwrap().unwrap().release.digest;
        let bytes = world.parts.storage.blob.read_all(&digest, 1 << 20).unwrap();
        world.base.read("release", &bytes, AdapterKind::Assistant).unwrap()
    };
    let start = read(&world);
    world.assign(&[1, 2]);
    let devices = [(1, 7_u64), (2, 8)].map(|(number, seed)| {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let count = layout().trainable_parameters(Trainable::Both);
        let values = (0..count).map(|_| rand::Rng::random_range(&mut random, -0.3..0.3)).collect();
        let delta = AdapterDelta::from_values(layout(), Trainable::Both, values).unwrap();
        let mut residual = Residual::zeros(layout(), Trainable::Both);
        let options = CompressOptions { bits: Bits::Eight, block: 64, ..CompressOptions::default() };
        let packed = compress(&delta, &mut residual, &options, &mut random).unwrap();
        world.upload(number, open(1, packed.as_bytes()), packed.as_bytes()).unwrap();
        let (received, _) = pair::decode(packed.as_bytes(), &layout(), Trainable::Both, false).unwrap();
        start.plus(&received, 1.0).unwrap()
    });
    finish(&world, 1.0);
    let merged = read(&world);
    let (mut left_out, mut whole) = (0.0, 0.0);
    for specs in layout().tensors().chunks(2) {
        let product =
            |adapter: &Adapter| adapter.matrix(&specs[1]).unwrap().dot(&adapter.matrix(&specs[0]).unwrap());
        let mean = (product(&devices[0]) + product(&devices[1])) / 2.0;
        let off = &mean - &product(&merged);
        left_out += f64::from((&off * &off).sum());
        whole += f64::from((&mean * &mean).sum());
    }
    let records = records(world.parts.storage.coord.as_ref(), RoundId(1), 1).unwrap();
    let told = records[0].rank_residual.unwrap();
    let found = (left_out / whole).sqrt();
    assert!(told > 0.05 && (told - found).abs() < 1e-4, "told {told}, found {found}");
    assert_eq!(records[0].candidate.as_ref().unwrap().merge, "exact, mean, fedavg");
}

fn buffered(config: &mut Config) {
    config.round = Policy {
        mode: RoundMode::Buffered,
        goal: 2,
        quorum: 2,
        over_selection: 2.0,
        staleness_max: 2,
        ..config.round.clone()
    };
    config.merge.clip_median_factor = 0.0;
}

/// A poll's task: its round and the release that it starts from.
fn asked(world: &World, number: u8) -> Option<(u64, u64)> {
    let reply = world
        .receiver
        .poll(device(number), Poll { base: BASE, installed: None, key: KeyNumber(0), trouble: None })
        .unwrap();
    reply.task.map(|task| (task.round.0, task.start.version.0))
}

fn sent(world: &World, number: u8, round: u64, value: f32) -> Result<(), Refusal> {
    let bytes = update(value);
    world.upload(number, open(round, &bytes), &bytes).map(drop).map_err(|refused| refused.reason)
}

#[test]
fn a_slow_devices_update_counts_less_in_a_later_buffer_and_is_merged_once_through_kills() {
    let mut world = world(buffered);
    for number in 1..=4 {
        assert_eq!(asked(&world, number), Some((1, 0)));
    }
    assert_eq!(asked(&world, 5), None, "two places, two devices for each");
    sent(&world, 1, 1, 0.1).unwrap();
    assert_eq!(asked(&world, 1), None, "once in a buffer");
    sent(&world, 2, 1, 0.1).unwrap();
    assert_eq!(sent(&world, 3, 1, 0.1), Err(Refusal::Busy), "a full buffer is merged first");
    finish(&world, 1.0);
    assert_near(moved(&world, 0, 1), 0.1);

    // The third device is a release behind: it counts 1/√2.
    assert_eq!(asked(&world, 1), Some((2, 1)));
    sent(&world, 3, 1, 0.1).unwrap();
    world = restart(world, buffered);
    sent(&world, 3, 1, 0.1).unwrap();
    sent(&world, 1, 2, 0.1).unwrap();
    finish(&world, 1.0);
    assert_near(moved(&world, 1, 2), 0.1 * (1.0 + 0.5_f32.sqrt()) / 2.0);
    let record = records(world.parts.storage.coord.as_ref(), RoundId(2), 1).unwrap().remove(0);
    let behind: Vec<_> =
        record.lineage.iter().map(|origin| (origin.round.0, origin.start.0, origin.staleness)).collect();
    assert_eq!(behind, [(2, 1, 0), (1, 0, 1)]);
    assert_eq!(record.candidate.unwrap().merge, "fedit, mean, fedavg, buffered");

    // The same again, after its buffer was merged, brings its receipt and counts no second time.
    sent(&world, 3, 1, 0.1).unwrap();
    assert_eq!(world.parts.desk.rounds().progress().0, 0);

    // The fourth is two behind, and still taken; after the next release its task is forgotten.
    for number in [5, 6] {
        assert_eq!(asked(&world, number), Some((3, 2)));
        sent(&world, number, 3, 0.1).unwrap();
    }
    finish(&world, 1.0);
    assert_eq!(sent(&world, 4, 1, 0.1), Err(Refusal::StaleRound));
    assert_eq!(asked(&world, 4), Some((4, 3)), "it begins anew");
}

#[test]
fn buffers_open_by_themselves_so_that_devices_that_wait_with_an_update_are_not_waited_for() {
    let world = world(|config| {
        buffered(config);
        config.round.over_selection = 1.0;
    });
    finish(&world, 1.0);
    assert_eq!(world.parts.desk.rounds().phase.name(), "collecting", "before any device came");
    for round in 1..=3 {
        for number in [1, 2] {
            assert_eq!(asked(&world, number), Some((round, round - 1)));
        }
        for number in [1, 2] {
            sent(&world, number, round, 0.1).unwrap();
        }
        finish(&world, 1.0);
    }
    let released = world.parts.publisher.head().unwrap().unwrap().release.version;
    assert_eq!(released, Version(3));
}

#[test]
fn a_rejected_buffer_takes_its_updates_along_and_the_slow_ones_stay() {
    let world = world(buffered);
    for number in 1..=3 {
        asked(&world, number).unwrap();
    }
    for number in 1..=2 {
        sent(&world, number, 1, 0.1).unwrap();
    }
    finish(&world, 0.1);
    sent(&world, 3, 1, 0.2).unwrap();
    assert_eq!(asked(&world, 1), Some((2, 0)));
    sent(&world, 1, 2, 0.2).unwrap();
    finish(&world, 1.0);
    assert_near(moved(&world, 0, 1), 0.2);
    let record = records(world.parts.storage.coord.as_ref(), RoundId(2), 1).unwrap().remove(0);
    assert!(record.lineage.iter().all(|origin| origin.staleness == 0), "no release lies between");
}

#[test]
fn a_buffer_leaves_out_the_update_of_a_device_that_was_revoked_since() {
    let world = world(|config| {
        buffered(config);
        config.round.quorum = 1;
    });
    (1..=2).for_each(|number| world.enroll(number));
    for number in 1..=2 {
        asked(&world, number).unwrap();
        sent(&world, number, 1, 0.1 * f32::from(number)).unwrap();
    }
    world.registry.revoke(&device(2), NOW_MS).unwrap();
    finish(&world, 1.0);
    assert_near(moved(&world, 0, 1), 0.1);
    let record = records(world.parts.storage.coord.as_ref(), RoundId(1), 1).unwrap().remove(0);
    assert_eq!((record.lineage.len(), record.revoked), (1, vec![device(2)]));
}

#[test]
fn an_upload_that_a_merge_interrupts_goes_on_behind_it_where_it_was() {
    let world = world(buffered);
    for number in 1..=3 {
        asked(&world, number).unwrap();
    }
    let bytes = update(0.1);
    let (slow, announced) = (device(3), open(1, &bytes));
    let half = bytes.len() / 2;
    assert_eq!(world.receiver.open(slow, announced).unwrap(), Opened::Resume(0));
    world.receiver.chunk(slow, announced.key(), &chunk(0, &bytes[..half])).unwrap();
    for number in 1..=2 {
        sent(&world, number, 1, 0.1).unwrap();
    }
    // The buffer is full and not merged yet.
    let rest = chunk(half as u64, &bytes[half..]);
    let refused = world.receiver.chunk(slow, announced.key(), &rest).unwrap_err();
    assert_eq!(refused.reason, Refusal::Busy);
    finish(&world, 1.0);
    assert_eq!(world.receiver.open(slow, announced).unwrap(), Opened::Resume(half as u64));
    sent(&world, 3, 1, 0.1).unwrap();
}
