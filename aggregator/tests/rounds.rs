//! Whole rounds through the real receiver, desk, merge and publisher on real files; only the model's two stages are
//! written down, so that every way in which a round can end is seen.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a test that cannot get its value has failed"
)]

mod support;

use std::sync::Arc;

use aggregator::desk::{Record, records};
use aggregator::drive::{Driver, Stages, Step};
use aggregator::events::{AlignFigures, EvaluateFigures, Event, Figures};
use aggregator::laboratory::LaboratoryError;
use aggregator::round::Phase;
use aggregator::store::{Faults, MemoryStorage, RealDisk};
use commonweal_adapter::{Adapter, AdapterKind};
use commonweal_protocol::{Digest, ReportCard, RoundId, Version};
use support::*;

/// What the stages answer.
#[derive(Clone, Debug)]
struct Script {
    safe_rate: Option<f64>,
    unavailable: bool,
    /// Added to every value by alignment.
    shift: f32,
    aligned: Vec<RoundId>,
}

impl Default for Script {
    fn default() -> Self {
        Self { safe_rate: Some(1.0), unavailable: false, shift: 0.0, aligned: Vec::new() }
    }
}

impl Stages for Script {
    fn align(
        &mut self,
        round: RoundId,
        mut candidate: Adapter,
    ) -> Result<(Adapter, AlignFigures), LaboratoryError> {
        if self.unavailable {
            let (path, source) = ("guard.toml".into(), std::io::ErrorKind::NotFound.into());
            return Err(LaboratoryError::File { path, source });
        }
        self.aligned.push(round);
        candidate.values_mut().iter_mut().for_each(|value| *value += self.shift);
        Ok((candidate, AlignFigures { steps: 3, ..AlignFigures::default() }))
    }

    fn evaluate(
        &mut self,
        _round: RoundId,
        _candidate: &Adapter,
    ) -> Result<EvaluateFigures, LaboratoryError> {
        let card = ReportCard {
            safe_rate: self.safe_rate,
            over_refusal_rate: Some(0.0),
            held_out_loss: Some(1.0),
            ..ReportCard::default()
        };
        Ok(EvaluateFigures { report_card: card, ..EvaluateFigures::default() })
    }
}

fn world() -> World {
    World::new(Arc::new(RealDisk))
}

fn driver(world: &World, script: Script) -> Driver<Script> {
    Driver::new(world.parts.clone(), world.base.clone(), script)
}

/// Runs stages until there is nothing to do; false if it never ends.
fn run(world: &World, driver: &mut Driver<Script>) {
    for _ in 0..100 {
        match driver.step() {
            Step::Worked => {}
            Step::Wait(Some(at_ms)) if at_ms > world.clock.unix_ms() && is_busy(world) => {
                world.clock.set(at_ms);
            }
            Step::Wait(_) | Step::Stop => return,
        }
    }
    panic!("the stages never come to rest");
}

fn is_busy(world: &World) -> bool {
    !matches!(world.parts.desk.rounds().phase, Phase::Waiting { .. } | Phase::Collecting { .. })
}

fn deliver(world: &World, round: u64, values: [f32; 2]) -> [Digest; 2] {
    world.assign(&[1, 2]);
    let numbers = [1, 2];
    std::array::from_fn(|index| {
        let bytes = update(values[index]);
        world.upload(numbers[index], open(round, &bytes), &bytes).unwrap();
        Digest::of(&bytes)
    })
}

fn history(world: &World) -> Vec<Record> {
    records(world.parts.storage.coord.as_ref(), RoundId(0), 100).unwrap()
}

fn head(world: &World) -> commonweal_protocol::Release {
    world.parts.publisher.head().unwrap().unwrap().release
}

fn values(world: &World, digest: &Digest) -> Vec<f32> {
    let bytes = world.parts.storage.blob.read_all(digest, 1 << 20).unwrap();
    world.base.read("release", &bytes, AdapterKind::Assistant).unwrap().into_values()
}

#[test]
fn two_updates_become_a_release_with_lineage_figures_and_nothing_left_over() {
    let world = world();
    let start = values(&world, &head(&world).digest);
    let mut driver = driver(&world, Script { shift: 0.5, ..Script::default() });
    let updates = deliver(&world, 1, [0.1, 0.2]);
    run(&world, &mut driver);
    let release = head(&world);
    assert_eq!(
        (release.version, release.parent, release.round),
        (Version(1), Some(Version(0)), Some(RoundId(1)))
    );
    let moved = values(&world, &release.digest);
    let change = moved.iter().zip(&start).map(|(after, before)| after - before).sum::<f32>();
    // Clipped to the median norm, 0.15 in each value: (0.1 + 0.15) / 2; then the alignment's shift. Single values carry
    // the noise of four bits, their mean does not.
    let mean = change / start.len() as f32;
    assert!((mean - 0.625).abs() < 0.005, "{mean}");
    let record = history(&world).pop().unwrap();
    assert_eq!(
        (record.outcome.as_str(), record.updates, record.clipped, record.align_steps),
        ("published", 2, 1, 3)
    );
    assert_eq!(record.uploaded_bytes, updates.iter().map(|_| update(0.1).len() as u64).sum::<u64>());
    for digest in updates {
        assert_eq!(
            world.parts.storage.blob.length(&digest).unwrap(),
            None,
            "an update is kept after its round"
        );
    }
    assert_eq!(world.parts.storage.blob.list(None, 10).unwrap().len(), 2, "two releases");
    let events = world.events.lock().unwrap();
    let stages: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            Event::Stage { figures, .. } => Some(match figures {
                Figures::Merge(_) => "merge",
                Figures::Align(_) => "align",
                Figures::Evaluate(_) => "evaluate",
                Figures::Publish { .. } => "publish",
            }),
            _ => None,
        })
        .collect();
    assert_eq!(stages, ["merge", "align", "evaluate", "publish"]);
    drop(events);
    assert_eq!(opened(&world), [record.opened_ms; 4]);
}

/// When the rounds began, as the events say that end something in them.
fn opened(world: &World) -> Vec<u64> {
    let events = world.events.lock().unwrap();
    let opened = events.iter().filter_map(|event| match event {
        Event::Stage { opened_ms, .. } | Event::Rejected { opened_ms, .. } => Some(*opened_ms),
        _ => None,
    });
    opened.collect()
}

#[test]
fn a_candidate_that_fails_a_gate_leaves_the_release_and_says_why() {
    let world = world();
    let mut unsafe_stages = driver(&world, Script { safe_rate: Some(0.4), ..Script::default() });
    deliver(&world, 1, [0.1, 0.2]);
    run(&world, &mut unsafe_stages);
    assert_eq!(head(&world).version, Version(0));
    let record = history(&world).pop().unwrap();
    assert_eq!(record.outcome, "rejected");
    assert_eq!(record.reason.unwrap(), "safe rate: expected at least 0.8000, got 0.4000");
    assert_eq!(record.candidate.unwrap().safe_rate, Some(0.4));
    assert_eq!(opened(&world), [record.opened_ms; 4], "merge, align, evaluate, and the round's end");
    assert_eq!(record.failed_gates.len(), 1);
    assert_eq!(world.parts.storage.blob.list(None, 10).unwrap().len(), 1, "the candidate is not kept");
    // The next round starts from the release that stayed.
    let mut stages = driver(&world, Script::default());
    deliver(&world, 2, [0.1, 0.2]);
    run(&world, &mut stages);
    assert_eq!((head(&world).version, head(&world).round), (Version(1), Some(RoundId(2))));
}

#[test]
fn a_candidate_whose_gate_was_not_measured_is_not_published() {
    let world = world();
    let mut stages = driver(&world, Script { safe_rate: None, ..Script::default() });
    deliver(&world, 1, [0.1, 0.2]);
    run(&world, &mut stages);
    assert_eq!(head(&world).version, Version(0));
    let record = history(&world).pop().unwrap();
    assert_eq!(record.outcome, "rejected");
    assert_eq!(record.reason.unwrap(), "safe rate: expected a measure, for it has a gate, got none");
}

#[test]
fn plain_has_no_gates_and_the_card_still_shows_the_loss() {
    let world = World::open(tempfile::tempdir().unwrap(), Arc::new(RealDisk), |config| config.plain = true);
    let mut stages = driver(&world, Script { safe_rate: Some(0.1), shift: 9.0, ..Script::default() });
    deliver(&world, 1, [0.1, 5.0]);
    run(&world, &mut stages);
    let release = head(&world);
    assert_eq!((release.version, release.report_card.safe_rate), (Version(1), Some(0.1)));
    assert!(release.report_card.gates.is_empty());
    let record = history(&world).pop().unwrap();
    assert_eq!((record.clipped, record.align_steps), (0, 0));
    assert_eq!(record.align.unwrap().skipped.as_deref(), Some("the run is plain"));
}

#[test]
fn a_process_that_ends_between_any_two_steps_is_taken_up_where_it_was() {
    for steps in 0..5 {
        let world = world();
        deliver(&world, 1, [0.1, 0.2]);
        let mut first = driver(&world, Script::default());
        for _ in 0..steps {
            first.step();
        }
        let phase = world.parts.desk.rounds().phase.name();
        drop(first);
        let World { dir, parts, receiver, .. } = world;
        drop((parts, receiver));
        let world = World::open(dir, Arc::new(RealDisk), |_| {});
        assert_eq!(world.parts.desk.rounds().phase.name(), phase);
        let mut second = driver(&world, Script::default());
        run(&world, &mut second);
        assert_eq!(head(&world).version, Version(1), "after {steps} steps, in phase {phase}");
        let records = history(&world);
        assert_eq!(records.len(), 2);
        assert_eq!((records[1].updates, records[1].outcome.as_str()), (2, "published"));
        assert!(records[1].seconds.contains_key("merge"), "figures of finished stages are kept");
    }
}

#[test]
fn a_missing_library_is_tried_again_and_then_ends_the_round_with_its_reason() {
    let world = world();
    let mut stages = driver(&world, Script { unavailable: true, ..Script::default() });
    deliver(&world, 1, [0.1, 0.2]);
    run(&world, &mut stages);
    let record = history(&world).pop().unwrap();
    assert_eq!(record.outcome, "rejected");
    assert!(record.reason.unwrap().starts_with("unavailable: guard.toml"), "it says what");
    let retries =
        world.events.lock().unwrap().iter().filter(|event| matches!(event, Event::Retrying { .. })).count();
    assert_eq!(retries, 2);
    assert_eq!(head(&world).version, Version(0));
}

#[test]
fn a_roll_back_during_a_round_wins_over_its_candidate() {
    let world = world();
    let mut stages = driver(&world, Script::default());
    deliver(&world, 1, [0.1, 0.2]);
    run(&world, &mut stages);
    world.assign(&[1, 2]);
    world.parts.publisher.roll_back(Version(0), NOW_MS).unwrap();
    deliver(&world, 2, [0.1, 0.2]);
    run(&world, &mut stages);
    let record = history(&world).pop().unwrap();
    assert_eq!((record.outcome.as_str(), record.version), ("rejected", Version(2)));
    assert!(record.reason.unwrap().contains("the head moved: expected release 1, got 2"));
}

#[test]
fn an_update_that_is_damaged_on_disk_ends_the_round_and_stops_nothing() {
    let world = world();
    let mut stages = driver(&world, Script::default());
    let [damaged, _] = deliver(&world, 1, [0.1, 0.2]);
    world.parts.storage.blob.delete(&damaged).unwrap();
    run(&world, &mut stages);
    let record = history(&world).pop().unwrap();
    assert_eq!(record.outcome, "rejected");
    assert!(record.reason.unwrap().contains(&device(1).to_string()), "the device is named");
    assert!(matches!(world.parts.desk.rounds().phase, Phase::Waiting { .. }));
}

/// As a disk does it: behind the store's back.
fn damage(world: &World, number: u8) {
    let database = rusqlite::Connection::open(world.dir.path().join("aggregator.db")).unwrap();
    let row = "UPDATE inbox SET value = substr(value, 1, 9) WHERE key = ?1";
    assert_eq!(database.execute(row, [device(number).to_string()]).unwrap(), 1);
}

#[test]
fn an_accepted_updates_row_that_is_damaged_ends_the_round_by_its_name_and_stops_nothing() {
    for is_closed in [false, true] {
        let world = world();
        let mut stages = driver(&world, Script::default());
        world.assign(&[1, 2]);
        for number in [1, 2] {
            let bytes = update(0.1 * f32::from(number));
            world.upload(number, open(1, &bytes), &bytes).unwrap();
            if number == 1 && !is_closed {
                damage(&world, 1);
            }
        }
        if is_closed {
            damage(&world, 1);
        }
        run(&world, &mut stages);
        let record = history(&world).pop().unwrap();
        assert_eq!((record.outcome.as_str(), record.updates), ("rejected", 2));
        let named = format!("merge: update of device {}: the stored update's receipt is damaged", device(1));
        let reason = record.reason.unwrap();
        assert!(reason.starts_with(&named), "{reason}");
        assert_eq!(world.parts.desk.taken(RoundId(1), &device(1)).unwrap(), None);
        assert!(world.parts.desk.taken(RoundId(1), &device(2)).unwrap().is_some());
        deliver(&world, 2, [0.1, 0.2]);
        run(&world, &mut stages);
        assert_eq!(head(&world).round, Some(RoundId(2)), "and the next goes on");
    }
}

#[test]
fn the_update_of_a_device_revoked_before_the_merge_is_left_out() {
    let world = world();
    (1..=2).for_each(|number| world.enroll(number));
    let start = values(&world, &head(&world).digest);
    deliver(&world, 1, [0.1, 5.0]);
    world.registry.revoke(&device(2), NOW_MS).unwrap();
    run(&world, &mut driver(&world, Script::default()));
    let release = head(&world);
    let moved = values(&world, &release.digest);
    let mean =
        moved.iter().zip(&start).map(|(after, before)| after - before).sum::<f32>() / start.len() as f32;
    assert!((mean - 0.1).abs() < 0.005, "{mean}");
    let record = history(&world).pop().unwrap();
    assert_eq!((record.outcome.as_str(), record.updates, record.excluded), ("published", 2, 1));
    assert_eq!(record.revoked, [device(2)]);
    let merged: Vec<_> = record.lineage.iter().map(|origin| origin.device).collect();
    assert_eq!((merged, record.norms.len()), (vec![device(1)], 1));
    let counts = release.report_card.counts;
    assert_eq!((counts.devices_received, counts.devices_merged, counts.updates_excluded), (2, 1, 1));
    let told = Event::LeftOut { round: RoundId(1), device: device(2) };
    assert_eq!(world.events.lock().unwrap().iter().filter(|event| **event == told).count(), 1);
}

/// The merge is tried again when its end was not saved.
#[test]
fn whatever_the_store_does_an_update_is_told_once_to_be_left_out() {
    for seed in 0..30 {
        let memory = MemoryStorage::default();
        let world = World::in_memory(&memory, |_| {});
        (1..=2).for_each(|number| world.enroll(number));
        deliver(&world, 1, [0.1, 5.0]);
        world.registry.revoke(&device(2), NOW_MS).unwrap();
        let mut stages = driver(&world, Script::default());
        memory.inject(seed, Faults { determinate: 0.2, indeterminate: 0.2 });
        run(&world, &mut stages);
        memory.inject(seed, Faults::default());
        run(&world, &mut stages);
        let told = Event::LeftOut { round: RoundId(1), device: device(2) };
        let times = world.events.lock().unwrap().iter().filter(|event| **event == told).count();
        assert_eq!(times, 1, "seed {seed}");
        assert_eq!(history(&world).last().unwrap().revoked, [device(2)], "seed {seed}");
    }
}

#[test]
fn a_devices_damaged_record_rejects_the_round_with_its_update_by_its_name() {
    let world = world();
    (1..=2).for_each(|number| world.enroll(number));
    deliver(&world, 1, [0.1, 0.2]);
    let (coord, log) = (&world.parts.storage.coord, format!("device/{}", device(2)));
    let record = coord.head(&log).unwrap().unwrap();
    coord.compare_and_set(&log, record.sequence, b"damaged").unwrap();
    run(&world, &mut driver(&world, Script::default()));
    let reason = history(&world).pop().unwrap().reason.unwrap();
    assert_eq!(reason.find(&format!("merge: update of device {}: ", device(2))), Some(0), "{reason}");
}

#[test]
fn a_round_that_revoked_devices_leave_without_a_quorum_is_rejected() {
    let world = World::open(tempfile::tempdir().unwrap(), Arc::new(RealDisk), |config| {
        config.round.quorum = 2;
    });
    world.enroll(2);
    deliver(&world, 1, [0.1, 0.2]);
    world.registry.revoke(&device(2), NOW_MS).unwrap();
    let mut stages = driver(&world, Script::default());
    run(&world, &mut stages);
    let record = history(&world).pop().unwrap();
    assert_eq!((record.outcome.as_str(), record.updates), ("rejected", 2));
    let reason = record.reason.unwrap();
    assert!(reason.contains("1 of 2 updates are left") && reason.contains("the quorum is 2"), "{reason}");
    assert_eq!(head(&world).version, Version(0));
    assert_eq!(world.parts.desk.round(), RoundId(2));
}

#[test]
fn a_candidate_that_is_lost_on_disk_ends_the_round_and_stops_nothing() {
    let world = world();
    let mut stages = driver(&world, Script::default());
    deliver(&world, 1, [0.1, 0.2]);
    assert_eq!(stages.step(), Step::Worked);
    let Phase::Aligning { candidate } = world.parts.desk.rounds().phase else { panic!("it was merged") };
    world.parts.storage.blob.delete(&candidate).unwrap();
    run(&world, &mut stages);
    let record = history(&world).pop().unwrap();
    assert_eq!(record.outcome, "rejected");
    assert!(record.reason.unwrap().contains(&candidate.to_string()), "it is named");
    assert!(matches!(world.parts.desk.rounds().phase, Phase::Waiting { .. }));
}

#[test]
fn a_rounds_start_is_kept_while_the_round_lasts() {
    let world = World::open(tempfile::tempdir().unwrap(), Arc::new(RealDisk), |config| {
        config.receive.releases_kept = 2;
    });
    let mut stages = driver(&world, Script::default());
    deliver(&world, 1, [0.1, 0.2]);
    run(&world, &mut stages);
    let start = head(&world).digest;
    world.assign(&[1, 2]);
    for _ in 0..2 {
        world.parts.publisher.roll_back(Version(0), NOW_MS).unwrap();
    }
    // A start of the process sweeps.
    let stages = driver(&world, Script::default());
    drop(stages);
    assert!(world.parts.storage.blob.length(&start).unwrap().is_some(), "devices still fetch it");
}

#[test]
fn a_round_without_a_quorum_is_recorded_and_the_next_begins() {
    let world =
        World::open(tempfile::tempdir().unwrap(), Arc::new(RealDisk), |config| config.round.quorum = 2);
    let mut stages = driver(&world, Script::default());
    world.assign(&[1, 2]);
    let bytes = update(0.1);
    world.upload(1, open(1, &bytes), &bytes).unwrap();
    world.clock.set(NOW_MS + 60_000);
    run(&world, &mut stages);
    let record = history(&world).pop().unwrap();
    assert_eq!((record.outcome.as_str(), record.updates), ("abandoned", 1));
    assert_eq!(world.parts.desk.round(), RoundId(2));
    let stale = world.receiver.open(device(2), open(1, &update(0.3))).unwrap_err();
    assert_eq!(stale.reason, commonweal_protocol::Refusal::StaleRound);
}
