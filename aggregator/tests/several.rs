//! Several processes over one store, each with its own desk, receiver and driver on threads of their own: devices go to any
//! of them, the lead changes hands while its holder believes to have it, and the store fails. Every update that got a
//! receipt is merged once, or its round came to nothing and counted it. Real desk, receiver, merge and publisher.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a test that cannot get its value has failed"
)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use aggregator::config::Config;
use aggregator::desk::{Desk, Record, records};
use aggregator::drive::{Driver, Stages};
use aggregator::events::{AlignFigures, EvaluateFigures};
use aggregator::laboratory::{Base, LaboratoryError};
use aggregator::publish::Publisher;
use aggregator::receive::{Parts, Receiver};
use aggregator::round::RoundMode;
use aggregator::serve;
use aggregator::store::{Faults, MemoryStorage};
use commonweal_adapter::Adapter;
use commonweal_protocol::{DeviceId, Digest, KeyNumber, Poll, RoundId, SigningKey, Version};
use commonweal_transport::{Clock, Opened};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use support::shared::{config, first_release, process};
use support::{BASE, chunk, device, layout, open, update};

const PROCESSES: usize = 3;
/// Some seconds, where nothing is wrong.
const PATIENCE: Duration = Duration::from_secs(300);
const DEVICES: u8 = 8;

/// Stages of one process, whose alignment comes to something else than any other's, as that of another machine may.
struct Passing {
    shift: f32,
}

impl Stages for Passing {
    fn align(
        &mut self,
        _: RoundId,
        mut candidate: Adapter,
    ) -> Result<(Adapter, AlignFigures), LaboratoryError> {
        candidate.values_mut().iter_mut().for_each(|value| *value += self.shift);
        // Long enough for the lead to change hands meanwhile.
        thread::sleep(Duration::from_millis(2));
        Ok((candidate, AlignFigures::default()))
    }

    fn evaluate(&mut self, _: RoundId, _: &Adapter) -> Result<EvaluateFigures, LaboratoryError> {
        Ok(EvaluateFigures::default())
    }
}

type Receipts = BTreeMap<(RoundId, DeviceId), Digest>;

/// A device goes to one process after the other, sends what it is asked for, and keeps what it is promised.
fn take_part(number: u8, receivers: &[Arc<Receiver>], stop: &AtomicBool) -> Receipts {
    let mut random = ChaCha8Rng::seed_from_u64(number.into());
    let mut receipts = Receipts::new();
    let id = device(number);
    while !stop.load(Ordering::SeqCst) {
        thread::sleep(Duration::from_millis(random.random_range(1..8)));
        let receiver = &receivers[random.random_range(0..receivers.len())];
        let Ok(reply) =
            receiver.poll(id, Poll { base: BASE, installed: None, key: KeyNumber(0), trouble: None })
        else {
            continue;
        };
        let Some(task) = reply.task.filter(|task| !receipts.contains_key(&(task.round, id))) else {
            continue;
        };
        let bytes = update(f32::from(number) / 100.0 + (task.round.0 % 50) as f32 / 1000.0);
        let announced = open(task.round.0, &bytes);
        // Tried again at another process until it is promised or refused for good.
        for _ in 0..8 {
            let receiver = &receivers[random.random_range(0..receivers.len())];
            let accepted = match receiver.open(id, announced) {
                Ok(Opened::Done(accepted)) => Ok(accepted),
                Ok(Opened::Resume(offset)) => {
                    let rest = bytes.get(offset as usize..).unwrap_or_default();
                    let sent = if rest.is_empty() {
                        Ok(0)
                    } else {
                        receiver.chunk(id, announced.key(), &chunk(offset, rest))
                    };
                    sent.and_then(|_| receiver.finish(id, announced.key()))
                }
                Err(refused) => Err(refused),
            };
            if let Ok(accepted) = accepted {
                let receipt = accepted.receipt.receipt;
                assert_eq!((receipt.device, receipt.digest), (id, announced.digest));
                receipts.insert((receipt.round, id), receipt.digest);
                break;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
    receipts
}

/// Every process is told that something may have changed, as by a database.
fn hint(parts: &[Parts]) {
    for parts in parts {
        parts.storage.watch.notify();
    }
}

/// Runs until so many rounds are over; what was promised, and what is on record.
fn run(config: &Config, rounds: u64, faults: Faults) -> Outcome {
    let memory = MemoryStorage::default();
    let base = Base { hash: BASE, layout: layout() };
    first_release(&memory, &base);
    let told = Arc::new(Mutex::new(Vec::new()));
    let clock = Clock::system();
    let parts: Vec<Parts> = (0..PROCESSES).map(|_| process(&memory, config, &clock, &told)).collect();
    let receivers: Vec<_> = parts.iter().map(|parts| Arc::new(Receiver::new(parts.clone()))).collect();
    let (no_devices, no_drivers) = (AtomicBool::new(false), AtomicBool::new(false));
    let lapses = AtomicU64::new(0);
    let receipts = thread::scope(|scope| {
        for (number, (parts, receiver)) in (1_u8..).zip(parts.iter().zip(&receivers)) {
            let stages = Passing { shift: f32::from(number) / 1000.0 };
            let driver = Driver::new(parts.clone(), base.clone(), stages);
            let (lead, watch, stop) = (driver.lead(), parts.storage.watch.clone(), &no_drivers);
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    let _ = lead.prolong();
                    thread::sleep(Duration::from_millis(15));
                }
                lead.resign();
            });
            let clock = parts.clock.clone();
            let driven = watch.clone();
            scope.spawn(move || serve::drive(driver, driven.as_ref(), &clock, stop));
            scope.spawn(move || serve::follow(receiver, watch.as_ref(), stop));
        }
        let devices: Vec<_> = (1..=DEVICES)
            .map(|number| {
                let (receivers, stop) = (&receivers, &no_devices);
                scope.spawn(move || take_part(number, receivers, stop))
            })
            .collect();
        let mut random = ChaCha8Rng::seed_from_u64(rounds);
        let current = || memory.storage().coord.head(aggregator::desk::RECORDS).unwrap().unwrap().sequence;
        let begun = Instant::now();
        while current() <= rounds && begun.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(random.random_range(1..30)));
            match random.random_range(0..5) {
                // Somebody else may take it, while this one works on for a while.
                0 => {
                    memory.lapse_lead();
                    lapses.fetch_add(1, Ordering::SeqCst);
                }
                1 => memory.inject(random.random(), faults),
                // What nobody named by now may be swept.
                2 => memory.pass(Duration::from_secs(400)),
                _ => memory.heal(),
            }
            hint(&parts);
        }
        memory.heal();
        no_devices.store(true, Ordering::SeqCst);
        let receipts = devices.into_iter().flat_map(|device| device.join().unwrap()).collect();
        no_drivers.store(true, Ordering::SeqCst);
        hint(&parts);
        receipts
    });
    let records = records(memory.storage().coord.as_ref(), RoundId(1), 10_000).unwrap();
    assert!(records.len() as u64 >= rounds, "only {} of {rounds} rounds came to their end", records.len());
    let problems = told.lock().unwrap();
    let lost = problems.iter().filter(|problem| problem.contains("is not stored")).count();
    assert_eq!(lost, 0, "a sweep took what was promised: {problems:?}");
    let desk = parts[0].desk.clone();
    desk.look().unwrap();
    Outcome { memory, desk, receipts, records, lapses: lapses.into_inner() }
}

struct Outcome {
    memory: MemoryStorage,
    desk: Arc<Desk>,
    receipts: Receipts,
    records: Vec<Record>,
    lapses: u64,
}

fn judge(outcome: Outcome) -> Vec<Record> {
    let Outcome { memory, desk, receipts, records, lapses } = outcome;
    let mut merged: BTreeMap<(RoundId, DeviceId), Digest> = BTreeMap::new();
    for (record, number) in records.iter().zip(1..) {
        assert_eq!(record.round, RoundId(number), "each round is on record once");
        let devices: BTreeSet<_> = record.lineage.iter().map(|origin| origin.device).collect();
        assert_eq!(devices.len(), record.lineage.len(), "nobody is merged twice in round {number}");
        for origin in &record.lineage {
            let before = merged.insert((origin.round, origin.device), origin.digest);
            assert_eq!(before, None, "an update of {} is merged twice", origin.device);
        }
    }
    let outcome = |round: RoundId| records.iter().find(|record| record.round == round);
    let mut dropped: BTreeMap<RoundId, u32> = BTreeMap::new();
    for (key, digest) in &receipts {
        if let Some(found) = merged.get(key) {
            assert_eq!(found, digest);
            continue;
        }
        // What a round that is not over has is in its inbox; a buffer also takes what was asked for in one given up before.
        let kept = desk.taken(key.0, &key.1).unwrap();
        if kept.is_some_and(|(into, taken)| into == desk.round() && taken.open.digest == *digest) {
            continue;
        }
        match outcome(key.0) {
            Some(record) if record.outcome == "abandoned" => *dropped.entry(key.0).or_default() += 1,
            record => panic!("{key:?} was promised and is lost: {record:?}"),
        }
    }
    for (round, dropped) in &dropped {
        let record = outcome(*round).unwrap();
        assert!(record.updates >= *dropped, "round {round} counted {} of {dropped}", record.updates);
        assert!(record.updates < 2, "round {round} had its quorum and was given up");
    }
    let storage = memory.storage();
    let key = SigningKey::from_bytes(&[3; 32]);
    let publisher = Publisher::new(storage.coord, storage.blob.clone(), key, BASE);
    let releases = publisher.history(Version(1), 10_000).unwrap();
    let published: Vec<_> = releases.iter().filter_map(|release| release.release.round).collect();
    let recorded: Vec<_> =
        records.iter().filter(|record| record.published).map(|record| record.round).collect();
    assert_eq!(published, recorded, "what is on record is what was published");
    for digest in publisher.kept(40).unwrap() {
        storage.blob.read_all(&digest, 1 << 20).unwrap();
    }
    eprintln!(
        "{} rounds, {} published, {} receipts, {} merged, the lead lapsed {lapses} times",
        records.len(),
        published.len(),
        receipts.len(),
        merged.len()
    );
    records
}

/// So that the rest is not true of nothing.
fn came_to_something(records: &[Record]) {
    let published = records.iter().filter(|record| record.published).count();
    assert!(published > records.len() / 3, "of {} rounds {published} were published", records.len());
}

#[test]
fn what_is_promised_is_merged_once_whoever_drives() {
    let faults = Faults { determinate: 0.0, indeterminate: 0.0 };
    came_to_something(&judge(run(&config(RoundMode::Synchronous), 40, faults)));
}

#[test]
fn what_is_promised_is_merged_once_though_the_store_fails_too() {
    let faults = Faults { determinate: 0.1, indeterminate: 0.1 };
    came_to_something(&judge(run(&config(RoundMode::Synchronous), 40, faults)));
}

#[test]
fn buffers_are_filled_by_whoever_receives() {
    let faults = Faults { determinate: 0.05, indeterminate: 0.05 };
    came_to_something(&judge(run(&config(RoundMode::Buffered), 40, faults)));
}

/// Devices that were asked in a buffer that was given up come when the next one is filled.
#[test]
fn what_comes_after_a_buffer_was_given_up_is_in_the_next() {
    let mut config = config(RoundMode::Buffered);
    config.round.deadline_ms = 4;
    let records = judge(run(&config, 80, Faults { determinate: 0.0, indeterminate: 0.0 }));
    let given_up: BTreeSet<_> =
        records.iter().filter(|record| record.outcome == "abandoned").map(|record| record.round).collect();
    assert!(!given_up.is_empty(), "none of {} buffers was given up", records.len());
    let mut merged = records.iter().flat_map(|record| &record.lineage);
    assert!(merged.any(|origin| given_up.contains(&origin.round)), "nothing that came late was merged");
}
