//! A release on trial: who sees it, what devices' reports do to it, and that a kill after any step changes nothing. Real
//! receiver, desk, merge and publisher on real files; the model's two stages pass candidates on.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a test that cannot get its value has failed"
)]

mod support;

use std::sync::Arc;

use aggregator::canary::{self, Canary};
use aggregator::config::{Config, Gates};
use aggregator::drive::{Driver, Stages, Step};
use aggregator::events::{AlignFigures, EvaluateFigures, Event};
use aggregator::laboratory::LaboratoryError;
use aggregator::store::{MemoryStorage, RealDisk};
use commonweal_adapter::Adapter;
use commonweal_protocol::{
    DeviceReport, Digest, Fault, Fetch, KeyNumber, Poll, Release, ReportCard, RoundId, Trouble, Version,
};
use support::*;

struct Passing;

impl Stages for Passing {
    fn align(
        &mut self,
        _round: RoundId,
        candidate: Adapter,
    ) -> Result<(Adapter, AlignFigures), LaboratoryError> {
        Ok((candidate, AlignFigures::default()))
    }

    fn evaluate(&mut self, _round: RoundId, _: &Adapter) -> Result<EvaluateFigures, LaboratoryError> {
        let report_card = ReportCard { safe_rate: Some(1.0), ..ReportCard::default() };
        Ok(EvaluateFigures { report_card, ..EvaluateFigures::default() })
    }
}

fn trials(config: &mut Config) {
    config.evaluate.gates = Gates { safe_rate_min: Some(0.8), ..Gates::off() };
    (config.round.goal, config.round.quorum, config.round.over_selection) = (8, 8, 1.0);
    (config.release.canary_share, config.release.canary_reports) = (0.5, 8);
}

fn world() -> World {
    World::open(tempfile::tempdir().unwrap(), Arc::new(RealDisk), trials)
}

fn restart(world: World) -> World {
    let World { dir, parts, receiver, .. } = world;
    drop((parts, receiver));
    World::open(dir, Arc::new(RealDisk), trials)
}

/// Eight devices deliver, each with the loss that its training began with.
fn deliver(world: &World, round: u64, loss: f32) {
    for _ in 0..2 {
        for number in 1..=8 {
            world.receiver.poll(device(number), poll(None)).unwrap();
        }
    }
    for number in 1..=8 {
        let bytes = update(0.01 * f32::from(number));
        let mut open = open(round, &bytes);
        let loss_first = loss + 0.01 * f32::from(number);
        open.report = DeviceReport { loss_first, loss_last: loss_first, ..open.report };
        world.upload(number, open, &bytes).unwrap();
    }
}

fn finish(world: &World) {
    let mut driver = Driver::new(world.parts.clone(), world.base.clone(), Passing);
    for _ in 0..20 {
        if driver.step() != Step::Worked {
            return;
        }
    }
    panic!("the stages never come to rest");
}

/// The same with a kill after each step.
fn finish_killed(mut world: World) -> World {
    for _ in 0..20 {
        let mut driver = Driver::new(world.parts.clone(), world.base.clone(), Passing);
        let step = driver.step();
        drop(driver);
        world = restart(world);
        if step != Step::Worked {
            return world;
        }
    }
    panic!("the stages never come to rest");
}

fn poll(installed: Option<u64>) -> Poll {
    Poll { base: BASE, installed: installed.map(Version), key: KeyNumber(0), trouble: None }
}

/// A device that has release 0 and cannot install release 1 says so, as often as it asks.
fn complain(world: &World, number: u8, fault: Fault) {
    let trouble = Some(Trouble { version: Version(1), fault });
    for _ in 0..3 {
        world.receiver.poll(device(number), Poll { trouble, ..poll(Some(0)) }).unwrap();
    }
}

fn state(world: &World) -> Canary {
    canary::read(world.parts.storage.coord.as_ref()).unwrap().unwrap().0
}

fn head(world: &World) -> Release {
    world.parts.publisher.head().unwrap().unwrap().release
}

/// Devices of a hundred, with this release installed, that are told of another.
fn told(world: &World, installed: u64) -> Vec<u64> {
    (100..200)
        .filter_map(|number| {
            let reply = world.receiver.poll(device(number), poll(Some(installed))).unwrap();
            reply.release.map(|signed| signed.release.version.0)
        })
        .collect()
}

#[test]
fn what_devices_report_worse_of_is_rolled_back_for_all_through_kills() {
    let mut world = world();
    finish(&world);
    deliver(&world, 1, 2.0);
    finish(&world);
    assert_eq!(head(&world).version, Version(1));

    deliver(&world, 2, 5.0);
    world = finish_killed(world);
    let release = head(&world);
    assert_eq!((release.version, release.round), (Version(2), None));
    let first = world.parts.publisher.release(Version(0)).unwrap().release;
    assert_eq!(release.digest, first.digest, "the adapter that all had");
    let canary = state(&world);
    assert_eq!((canary.stable, &canary.trial), (Version(2), &None));
    let ended = canary.ended.last().unwrap();
    assert!(ended.rolled_back && ended.version == Version(1), "{ended:?}");
    assert_eq!(told(&world, 1), [2; 100], "all of them");
}

/// Release 1 is on trial; enrolled devices that are shown it.
fn on_trial(world: &World) -> Vec<u8> {
    finish(world);
    deliver(world, 1, 2.0);
    finish(world);
    let members = members(world, Version(1));
    for &number in &members {
        world.enroll(number);
    }
    members
}

fn members(world: &World, head: Version) -> Vec<u8> {
    let canary = state(world);
    (100..200).filter(|number| canary.release_for(&device(*number), head, 0.5) == head).collect()
}

fn words(world: &World) -> u64 {
    world.parts.storage.coord.head(canary::WORDS).unwrap().map_or(0, |entry| entry.sequence)
}

fn complaints(world: &World) -> usize {
    let events = world.events.lock().unwrap();
    events.iter().filter(|event| matches!(event, Event::Troubled { .. })).count()
}

#[test]
fn what_devices_cannot_install_is_rolled_back_for_all_through_kills() {
    let mut world = world();
    let members = on_trial(&world);
    for (place, number) in members[..8].iter().enumerate() {
        complain(&world, *number, if place == 0 { Fault::Room } else { Fault::Damaged });
    }
    assert_eq!((words(&world), complaints(&world)), (8, 8), "each is told once");
    world = finish_killed(world);
    let release = head(&world);
    assert_eq!((release.version, release.round), (Version(2), None));
    let first = world.parts.publisher.release(Version(0)).unwrap().release;
    assert_eq!(release.digest, first.digest, "the adapter that all had");
    let canary = state(&world);
    let ended = canary.ended.last().unwrap();
    assert!(ended.rolled_back && ended.version == Version(1), "{ended:?}");
    assert_eq!((ended.devices.told, ended.devices.failed()), (8, 8));
    let why = "8 of 8 devices cannot install it: its bytes are damaged (7), there is no room for it (1)";
    assert_eq!(ended.reason, why);
    assert_eq!(told(&world, 0), [2; 100], "who has the adapter, by its version");
}

#[test]
fn a_few_that_cannot_install_it_do_not_stop_a_release() {
    let mut world = world();
    let members = on_trial(&world);
    complain(&world, members[0], Fault::Room);
    // One that can after all, and one that has said nothing yet.
    complain(&world, members[1], Fault::Damaged);
    for number in &members[1..9] {
        world.receiver.poll(device(*number), poll(Some(1))).unwrap();
    }
    let reply = world.receiver.poll(device(members[9]), poll(Some(0))).unwrap();
    assert_eq!(reply.release.map(|signed| signed.release.version), Some(Version(1)));
    let count = |world: &World| {
        finish(world);
        state(world).trial.unwrap().words.count()
    };
    let counted = count(&world);
    assert_eq!((counted.told, counted.installed, counted.failed()), (10, 8, 1));
    // Who says it again to a process that has forgotten is counted once.
    world = restart(world);
    complain(&world, members[0], Fault::Room);
    world.receiver.poll(device(members[9]), poll(Some(0))).unwrap();
    assert_eq!(count(&world), counted);
}

#[test]
fn whoever_is_not_shown_what_is_on_trial_has_no_voice() {
    let world = world();
    let members = on_trial(&world);
    let others = (100..200).filter(|number| !members.contains(number));
    for number in others.clone() {
        complain(&world, number, Fault::Damaged);
    }
    assert_eq!((words(&world), complaints(&world)), (0, others.count()), "but the operator hears it");
    // Of releases that there are not, nobody hears.
    let (trouble, heard) = (Some(Trouble { version: Version(9), fault: Fault::Base }), complaints(&world));
    world.receiver.poll(device(members[0]), Poll { trouble, ..poll(Some(9)) }).unwrap();
    finish(&world);
    assert_eq!(complaints(&world), heard);
    let count = state(&world).trial.unwrap().words.count();
    assert_eq!((count.told, count.answered()), (1, 0), "it is told of the one that there is");
}

#[test]
fn a_device_that_changes_its_word_is_heard_a_few_times() {
    let world = world();
    let liar = on_trial(&world)[0];
    for version in [0, 1].repeat(50) {
        complain(&world, liar, Fault::Damaged);
        complain(&world, liar, Fault::Base);
        world.receiver.poll(device(liar), poll(Some(version))).unwrap();
    }
    assert!(words(&world) <= 8 && complaints(&world) <= 8, "{} and {}", words(&world), complaints(&world));
    finish(&world);
    assert_eq!(state(&world).trial.unwrap().words.count().told, 1);
}

#[test]
fn who_was_revoked_or_never_enrolled_has_no_voice() {
    let world = world();
    let members = on_trial(&world);
    for number in &members[4..10] {
        world.receiver.poll(device(*number), poll(Some(1))).unwrap();
    }
    for number in &members[..4] {
        complain(&world, *number, Fault::Damaged);
    }
    // Four of ten are too many, two of eight are not.
    for number in &members[..2] {
        world.registry.revoke(&device(*number), NOW_MS).unwrap();
    }
    finish(&world);
    let count = state(&world).trial.unwrap().words.count();
    assert_eq!((count.told, count.failed()), (8, 2));
    // Behind the door, which lets no stranger in.
    let strangers =
        (20..100).filter(|number| state(&world).release_for(&device(*number), Version(1), 0.5).0 == 1);
    for number in strangers.take(8) {
        complain(&world, number, Fault::Damaged);
    }
    finish(&world);
    assert_eq!(state(&world).trial.unwrap().words.count(), count);
    complain(&world, members[10], Fault::Damaged);
    finish(&world);
    assert_eq!(head(&world).version, Version(2), "three of nine are too many");
}

/// Release 2 comes while release 1 is on trial, and joins it: enough was reported, but two devices cannot install release 1.
fn joined() -> (World, Vec<u8>) {
    let world = world();
    let members = on_trial(&world);
    members[..2].iter().for_each(|number| cannot(&world, *number, 1));
    deliver(&world, 2, 1.9);
    finish(&world);
    let canary = state(&world);
    assert_eq!((canary.stable, canary.trial.map(|trial| trial.version)), (Version(0), Some(Version(2))));
    (world, members)
}

fn cannot(world: &World, number: u8, version: u64) {
    let trouble = Some(Trouble { version: Version(version), fault: Fault::Damaged });
    world.receiver.poll(device(number), Poll { trouble, ..poll(None) }).unwrap();
}

/// Many can: release 1 is for all, and release 2 goes on by itself.
fn promote(world: &World, others: &[u8]) {
    for number in others {
        world.receiver.poll(device(*number), poll(Some(1))).unwrap();
    }
    finish(world);
    let canary = state(world);
    assert_eq!((canary.stable, canary.trial.map(|trial| trial.version)), (Version(1), Some(Version(2))));
}

#[test]
fn who_was_heard_in_one_trial_is_heard_in_the_next_of_the_same_release() {
    // The shares are drawn by releases and devices, so they are the same in each world.
    let (first, _) = joined();
    let before = members(&first, Version(2));
    promote(&first, &before[2..]);
    let after = members(&first, Version(2));
    let (world, _) = joined();
    let (both, others): (Vec<u8>, Vec<u8>) = before.into_iter().partition(|number| after.contains(number));
    let complain = || {
        let said = words(&world);
        both[..2].iter().for_each(|number| cannot(&world, *number, 2));
        words(&world) - said
    };
    assert_eq!((complain(), complain()), (2, 0), "once in a trial");
    promote(&world, &others);
    assert_eq!(state(&world).trial.unwrap().words.count().failed(), 0, "that was of the trial before");
    assert_eq!((complain(), complain()), (2, 0));
}

#[test]
fn a_damaged_record_of_a_device_keeps_no_verdict_from_being_carried_out() {
    let world = world();
    let members = on_trial(&world);
    for number in &members[..8] {
        complain(&world, *number, Fault::Damaged);
    }
    let (coord, log) = (&world.parts.storage.coord, format!("device/{}", device(members[9])));
    let record = coord.head(&log).unwrap().unwrap();
    coord.compare_and_set(&log, record.sequence, b"damaged").unwrap();
    finish(&world);
    let head = head(&world);
    assert_eq!((head.version, head.round), (Version(2), None), "release 0 again, for all");
}

#[test]
fn who_was_revoked_holds_no_release_up() {
    let world = world();
    let members = on_trial(&world);
    complain(&world, members[0], Fault::Damaged);
    complain(&world, members[1], Fault::Damaged);
    for number in &members[..2] {
        world.registry.revoke(&device(*number), NOW_MS).unwrap();
    }
    deliver(&world, 2, 1.9);
    finish(&world);
    assert_eq!(state(&world).stable, Version(1), "enough was reported, and nobody who counts is against it");
}

#[test]
fn a_share_sees_a_release_on_trial_and_nobody_is_told_of_an_older_one() {
    let world = world();
    finish(&world);
    deliver(&world, 1, 2.0);
    finish(&world);
    let share = told(&world, 0);
    assert!((25..=75).contains(&share.len()) && share.iter().all(|version| *version == 1), "{share:?}");
    assert!(told(&world, 1).is_empty());
}

#[test]
fn what_devices_report_no_worse_of_is_for_all_and_what_followed_is_on_trial() {
    let mut world = world();
    finish(&world);
    deliver(&world, 1, 2.0);
    finish(&world);
    deliver(&world, 2, 1.9);
    world = finish_killed(world);
    let canary = state(&world);
    assert_eq!((canary.stable, head(&world).version), (Version(1), Version(2)));
    assert_eq!(canary.trial.map(|trial| trial.version), Some(Version(2)));
    let seen = told(&world, 0);
    assert_eq!(seen.len(), 100, "each of them may have the first");
    assert!(seen.contains(&1) && seen.contains(&2), "{seen:?}");
}

#[test]
fn a_verdict_is_told_with_its_numbers() {
    let world = world();
    finish(&world);
    for (round, loss) in [(1, 2.0), (2, 5.0)] {
        deliver(&world, round, loss);
        finish(&world);
    }
    let events = world.events.lock().unwrap();
    let sentence = events.iter().find(|event| matches!(event, Event::RolledBack { .. })).unwrap().sentence();
    assert!(sentence.contains("median 5.05 of 8 reports, before 2.05 of 8"), "{sentence}");
}

#[test]
fn from_its_publication_on_a_release_is_seen_by_its_share_alone() {
    let world = world();
    finish(&world);
    deliver(&world, 1, 2.0);
    // Until the head has moved, and not a step further.
    let mut driver = Driver::new(world.parts.clone(), world.base.clone(), Passing);
    while head(&world).version == Version(0) {
        assert_eq!(driver.step(), Step::Worked);
    }
    assert_eq!(state(&world).trial, None, "the trial is not written down yet");
    let share = told(&world, 0);
    assert!((25..=75).contains(&share.len()), "{share:?}");
}

#[test]
fn a_kill_behind_a_roll_back_loses_neither_it_nor_why() {
    let world = world();
    finish(&world);
    deliver(&world, 1, 2.0);
    finish(&world);
    let coord = world.parts.storage.coord.clone();
    let (mut canary, sequence) = canary::read(coord.as_ref()).unwrap().unwrap();
    canary.verdict = Some("worse by far".to_owned());
    coord.compare_and_set(canary::LOG, sequence, &postcard::to_allocvec(&canary).unwrap()).unwrap();
    world.parts.publisher.roll_back(Version(0), NOW_MS).unwrap();
    let world = restart(world);
    finish(&world);
    assert_eq!(head(&world).version, Version(2), "it is not done twice");
    let canary = state(&world);
    assert_eq!((canary.stable, &canary.trial, &canary.verdict), (Version(2), &None, &None));
    let ended = canary.ended.last().unwrap();
    assert_eq!((ended.version, ended.reason.as_str()), (Version(1), "worse by far"));
}

/// A verdict, its roll-back and its end are writes of their own: a kill after any of them, and after any before.
#[test]
fn a_kill_after_any_write_ends_a_trial_as_none_does() {
    let ended_after = |writes: u64| {
        let memory = MemoryStorage::default();
        let world = World::in_memory(&memory, trials);
        finish(&world);
        deliver(&world, 1, 2.0);
        finish(&world);
        deliver(&world, 2, 5.0);
        memory.crash_after(writes);
        let mut driver = Driver::new(world.parts.clone(), world.base.clone(), Passing);
        for _ in 0..20 {
            if driver.step() != Step::Worked || memory.has_crashed() {
                break;
            }
        }
        let is_killed = memory.has_crashed();
        drop((driver, world));
        memory.heal();
        let world = World::in_memory(&memory, trials);
        finish(&world);
        let release = head(&world);
        assert_eq!((release.version, release.round), (Version(2), None), "after {writes} writes");
        let canary = state(&world);
        assert_eq!((canary.stable, canary.trial), (Version(2), None), "after {writes} writes");
        (canary.ended, is_killed)
    };
    let (undisturbed, _) = ended_after(u64::MAX);
    assert!(undisturbed.last().unwrap().rolled_back, "{undisturbed:?}");
    let mut writes = 0;
    loop {
        let (ended, is_killed) = ended_after(writes);
        assert_eq!(ended, undisturbed, "after {writes} writes");
        if !is_killed {
            break;
        }
        writes += 1;
    }
    assert!(writes > 3, "{writes} writes");
}

#[test]
fn what_all_devices_have_is_kept_however_many_releases_follow() {
    let few = |config: &mut Config| {
        trials(config);
        config.receive.releases_kept = 2;
        config.release.canary_reports = 200;
    };
    let world = World::open(tempfile::tempdir().unwrap(), Arc::new(RealDisk), few);
    finish(&world);
    for round in 1..=5 {
        deliver(&world, round, 2.0);
        finish(&world);
    }
    let canary = state(&world);
    assert_eq!((canary.stable, head(&world).version), (Version(0), Version(5)));
    let first = world.parts.publisher.release(Version(0)).unwrap().release;
    let fetch = Fetch { digest: first.digest, offset: 0 };
    assert!(!world.receiver.read(device(1), fetch, 100).unwrap().bytes.is_empty());
    world.parts.publisher.roll_back(Version(0), NOW_MS).unwrap();
}

#[test]
fn trials_that_are_switched_off_are_over() {
    let world = world();
    finish(&world);
    deliver(&world, 1, 2.0);
    finish(&world);
    assert!(state(&world).trial.is_some());
    let World { dir, parts, receiver, .. } = world;
    drop((parts, receiver));
    let off = |config: &mut Config| {
        trials(config);
        config.release.canary_share = 0.0;
    };
    let world = World::open(dir, Arc::new(RealDisk), off);
    finish(&world);
    let canary = state(&world);
    assert_eq!((canary.stable, &canary.trial, canary.before.len()), (Version(1), &None, 0));
}

#[test]
fn a_damaged_state_of_trials_stops_no_round_and_is_made_anew_without_trials() {
    let world = world();
    on_trial(&world);
    let coord = world.parts.storage.coord.clone();
    let sequence = coord.head(canary::LOG).unwrap().unwrap().sequence;
    coord.compare_and_set(canary::LOG, sequence, b"nonsense").unwrap();
    deliver(&world, 2, 2.0);
    finish(&world);
    assert_eq!(head(&world).round, Some(RoundId(2)));
    let sent = Digest::of(&update(0.01));
    assert_eq!(world.parts.storage.blob.length(&sent).unwrap(), None, "what is done with is swept");
    let is_told = |wanted: fn(&Event) -> bool| world.events.lock().unwrap().iter().any(wanted);
    assert!(is_told(|event| matches!(event, Event::Uncounted { round: RoundId(2), .. })));
    assert!(is_told(|event| matches!(event, Event::Retrying { reason, .. } if reason.contains("damaged"))));
    assert_eq!(told(&world, 0), [0; 0], "nobody is shown what is not known to be for it");
    let fetch = Fetch { digest: head(&world).digest, offset: 0 };
    assert!(!world.receiver.read(device(1), fetch, 100).unwrap().bytes.is_empty());

    let World { dir, parts, receiver, .. } = world;
    drop((parts, receiver));
    let world = World::open(dir, Arc::new(RealDisk), |config| {
        trials(config);
        config.release.canary_share = 0.0;
    });
    finish(&world);
    assert_eq!(state(&world), Canary::stable(Version(2)));
    assert_eq!(told(&world, 0), [2; 100]);
}
