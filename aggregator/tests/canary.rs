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
use aggregator::store::RealDisk;
use commonweal_adapter::Adapter;
use commonweal_protocol::{DeviceReport, Fetch, KeyNumber, Poll, Release, ReportCard, RoundId, Version};
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
            world
                .receiver
                .poll(device(number), Poll { base: BASE, installed: None, key: KeyNumber(0) })
                .unwrap();
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
            let poll = Poll { base: BASE, installed: Some(Version(installed)), key: KeyNumber(0) };
            let reply = world.receiver.poll(device(number), poll).unwrap();
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
    let ended = canary.last.unwrap();
    assert!(ended.rolled_back && ended.version == Version(1), "{ended:?}");
    assert_eq!(told(&world, 1), [2; 100], "all of them");
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
    let ended = canary.last.unwrap();
    assert_eq!((ended.version, ended.reason.as_str()), (Version(1), "worse by far"));
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
