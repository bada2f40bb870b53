//! Two processes over one store, step by step: what a driver has under way when another takes the lead comes to nothing, and
//! no update comes in through a door that has moved. Real desk, driver, receiver and publisher, a clock set by hand.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a test that cannot get its value has failed"
)]

mod support;

use std::io::Read;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aggregator::desk::{Accepted, DeskError, Next, Taken, peek, records};
use aggregator::drive::{Driver, Stages, Step};
use aggregator::events::{AlignFigures, EvaluateFigures};
use aggregator::laboratory::{Base, LaboratoryError};
use aggregator::receive::{Parts, Receiver};
use aggregator::round::RoundMode;
use aggregator::store::{Blob, MemoryStorage, Put, StoreError};
use commonweal_adapter::Adapter;
use commonweal_protocol::{
    DeviceId, Digest, KeyNumber, Poll, Receipt, Refusal, RoundId, SignedReceipt, SigningKey, Version,
};
use commonweal_transport::{Clock, Opened};
use support::shared::{Problems, config, first_release, process};
use support::{BASE, NOW_MS, chunk, device, layout, open, update};

/// Runs once.
type Hook = Arc<Mutex<Option<Box<dyn FnOnce() + Send>>>>;

fn run(hook: &Hook) {
    let hook = hook.lock().unwrap().take();
    if let Some(hook) = hook {
        hook();
    }
}

/// A process's blobs, where something happens between a stage's result and the state that names it, or while a deletion is
/// under way.
struct Hooked {
    blob: Arc<dyn Blob>,
    stored: Hook,
    deleting: Hook,
}

impl Blob for Hooked {
    fn put_if_absent(&self, digest: &Digest, length: u64, source: &mut dyn Read) -> Result<Put, StoreError> {
        let put = self.blob.put_if_absent(digest, length, source);
        run(&self.stored);
        put
    }

    fn length(&self, digest: &Digest) -> Result<Option<u64>, StoreError> {
        self.blob.length(digest)
    }

    fn read_range(&self, digest: &Digest, offset: u64, length: usize) -> Result<Vec<u8>, StoreError> {
        self.blob.read_range(digest, offset, length)
    }

    fn list_older(
        &self,
        age: Duration,
        after: Option<&Digest>,
        limit: usize,
    ) -> Result<Vec<Digest>, StoreError> {
        self.blob.list_older(age, after, limit)
    }

    fn delete(&self, digest: &Digest) -> Result<(), StoreError> {
        run(&self.deleting);
        self.blob.delete(digest)
    }

    fn deletion_lasts(&self) -> Duration {
        self.blob.deletion_lasts()
    }

    fn mark(&self, owner: &str) -> Result<String, StoreError> {
        self.blob.mark(owner)
    }

    fn free_bytes(&self) -> Result<Option<u64>, StoreError> {
        self.blob.free_bytes()
    }
}

/// What one process's model comes to.
#[derive(Default)]
struct Scripted {
    shift: f32,
    /// What happens once its next alignment is stored.
    then: Option<Box<dyn FnOnce() + Send>>,
    hook: Hook,
    /// Whether its first alignment is cut short.
    is_cut_short: bool,
}

impl Stages for Scripted {
    fn align(
        &mut self,
        _: RoundId,
        mut candidate: Adapter,
    ) -> Result<(Adapter, AlignFigures), LaboratoryError> {
        if std::mem::take(&mut self.is_cut_short) {
            return Err(LaboratoryError::Cancelled);
        }
        candidate.values_mut().iter_mut().for_each(|value| *value += self.shift);
        *self.hook.lock().unwrap() = self.then.take();
        Ok((candidate, AlignFigures::default()))
    }

    fn evaluate(&mut self, _: RoundId, _: &Adapter) -> Result<EvaluateFigures, LaboratoryError> {
        Ok(EvaluateFigures::default())
    }
}

struct World {
    memory: MemoryStorage,
    clock: Clock,
    told: Problems,
    front: Parts,
    receiver: Receiver,
}

impl World {
    fn new() -> Self {
        let memory = MemoryStorage::default();
        first_release(&memory, &base());
        let (clock, told) = (Clock::manual(NOW_MS), Problems::default());
        let front = process(&memory, &settings(), &clock, &told);
        let receiver = Receiver::new(front.clone());
        Self { memory, clock, told, front, receiver }
    }

    fn process(&self) -> Parts {
        process(&self.memory, &settings(), &self.clock, &self.told)
    }

    fn driver(&self, stages: Scripted) -> Driver<Scripted> {
        Driver::new(self.process(), base(), stages)
    }

    fn wait(&self, ms: u64) {
        assert!(self.clock.set(self.clock.unix_ms() + ms));
    }

    /// A round of two devices, and a door for it.
    fn begin(&self, driver: &mut Driver<Scripted>) {
        take_over(&self.memory, driver);
        for number in [1, 2, 1] {
            let poll = Poll { base: BASE, installed: None, key: KeyNumber(0), trouble: None };
            self.receiver.poll(device(number), poll).unwrap();
        }
        self.wait(1_000);
        driver.step();
    }

    fn upload(&self, number: u8) {
        let (id, bytes) = (device(number), update(f32::from(number) / 100.0));
        let open = open(1, &bytes);
        let Ok(Opened::Resume(0)) = self.receiver.open(id, open) else { panic!("it is new") };
        self.receiver.chunk(id, open.key(), &chunk(0, &bytes)).unwrap();
        self.receiver.finish(id, open.key()).unwrap();
    }

    fn is_stored(&self, digest: &Digest) -> bool {
        self.memory.storage().blob.length(digest).unwrap().is_some()
    }

    fn phase(&self) -> &'static str {
        peek(self.memory.storage().coord.as_ref()).unwrap().0.phase.name()
    }
}

fn base() -> Base {
    Base { hash: BASE, layout: layout() }
}

fn settings() -> aggregator::config::Config {
    let mut config = config(RoundMode::Synchronous);
    (config.round.goal, config.round.quorum, config.round.over_selection) = (2, 1, 2.0);
    (config.round.wait_ms, config.round.deadline_ms) = (600_000, 60_000);
    config.storage.lead_seconds = 300;
    config
}

/// What nobody names is swept after so long.
const GRACE: Duration = Duration::from_secs(600);

/// Time passes for who has the lead, who does not notice; another takes it, and begins to drive.
fn take_over(memory: &MemoryStorage, driver: &mut Driver<Scripted>) {
    memory.lapse_lead();
    memory.pass(GRACE);
    driver.lead().doubt();
    driver.step();
    driver.lead().prolong().unwrap();
    driver.step();
}

#[test]
fn a_stage_that_was_overtaken_names_nothing_that_was_swept_meanwhile() {
    let world = World::new();
    let hook = Hook::default();
    let mut parts = world.process();
    let (stored, deleting) = (hook.clone(), Hook::default());
    parts.storage.blob = Arc::new(Hooked { blob: parts.storage.blob.clone(), stored, deleting });
    let other = world.driver(Scripted { shift: 0.2, is_cut_short: true, ..Scripted::default() });
    let other = Arc::new(Mutex::new(other));
    let then = {
        let (memory, other) = (world.memory.clone(), other.clone());
        // Sweeps; its own alignment does not end for now.
        Box::new(move || take_over(&memory, &mut other.lock().unwrap()))
    };
    let mut one =
        Driver::new(parts, base(), Scripted { shift: 0.1, then: Some(then), hook, is_cut_short: false });
    world.begin(&mut one);
    world.upload(1);
    world.upload(2);
    world.wait(1_000);
    one.step();
    assert_eq!(world.phase(), "aligning");
    one.step();
    assert_eq!(world.phase(), "aligning", "what another took over is that one's");
    // Who was overtaken knows by now, though its clock says otherwise.
    one.step();
    assert!(!one.lead().is_held());
    for _ in 0..3 {
        other.lock().unwrap().step();
    }
    let record = &records(world.memory.storage().coord.as_ref(), RoundId(1), 1).unwrap()[0];
    assert_eq!((record.outcome.as_str(), record.lineage.len()), ("published", 2), "{:?}", record.reason);
    for digest in world.front.publisher.kept(40).unwrap() {
        assert!(world.is_stored(&digest));
    }
    assert_eq!(world.front.publisher.head().unwrap().unwrap().release.version, Version(1));
    assert_eq!(*world.told.lock().unwrap(), [""; 0]);
}

#[test]
fn what_was_begun_in_another_term_is_refused() {
    let world = World::new();
    let mut driver = world.driver(Scripted::default());
    world.begin(&mut driver);
    world.upload(1);
    let [one, other] = [world.process().desk, world.process().desk];
    let now_ms = world.clock.unix_ms();
    assert!(matches!(one.next(now_ms), Err(DeskError::Superseded)), "it never took the lead");
    one.take_lead(now_ms).unwrap();
    assert!(matches!(one.next(now_ms), Ok(Next::Wait(_))) && !one.is_superseded());
    other.take_lead(now_ms).unwrap();
    // The deadline, at which a round of one update is closed, and one without is given up.
    let late_ms = now_ms + 600_000;
    assert!(matches!(one.next(late_ms), Err(DeskError::Superseded)) && one.is_superseded());
    assert!(matches!(one.begin_sweep(), Err(DeskError::Superseded)));
    assert_eq!(world.phase(), "collecting");
    assert!(matches!(other.next(late_ms), Ok(Next::Work(RoundId(1), _))));
    assert_eq!(world.phase(), "merging");
    let refused = aggregator::round::Event::Refused("of another term".to_owned());
    let merge = aggregator::round::Action::Merge;
    one.done(late_ms, (RoundId(1), &merge), 0.0, None, refused).unwrap();
    assert_eq!(world.phase(), "merging");
}

fn accepted(id: DeviceId, bytes: &[u8]) -> Accepted {
    let open = open(1, bytes);
    let (digest, length) = (open.digest, open.length);
    let receipt = Receipt { round: open.round, device: id, digest, length, received_ms: NOW_MS };
    let receipt = SignedReceipt::sign(&SigningKey::from_bytes(&[3; 32]), receipt).unwrap();
    Accepted { open, receipt, norm: Some(1.0), start: None, opened_ms: None }
}

#[test]
fn no_update_comes_in_through_a_door_that_has_moved() {
    let world = World::new();
    let [mut one, mut other] = [(); 2].map(|()| world.driver(Scripted::default()));
    world.begin(&mut one);
    let (desk, blob) = (&world.front.desk, &world.front.storage.blob);
    let [first, second] = [1_u8, 2].map(|number| update(f32::from(number) / 100.0));
    let store =
        |bytes: &[u8]| blob.put_if_absent(&Digest::of(bytes), bytes.len() as u64, &mut &*bytes).unwrap();
    let now_ms = || world.clock.unix_ms();

    // A sweep between the bytes and their name takes them, and the name is refused.
    let pass = desk.pass().unwrap();
    store(&first);
    take_over(&world.memory, &mut other);
    assert!(!world.is_stored(&Digest::of(&first)), "nothing names them yet");
    let update = accepted(device(1), &first);
    assert!(matches!(desk.take(now_ms(), &update, &pass), Err(DeskError::Shut)));
    let pass = desk.pass().unwrap();
    store(&first);
    assert_eq!(desk.take(now_ms(), &update, &pass).unwrap(), Taken::Now);

    // What the inbox names no sweep takes.
    take_over(&world.memory, &mut one);
    assert!(world.is_stored(&Digest::of(&first)), "a receipt was sent for them");

    // Nor does one come in behind a close.
    let pass = desk.pass().unwrap();
    store(&second);
    world.wait(600_000);
    one.step();
    assert_eq!(world.phase(), "aligning");
    let late = desk.take(now_ms(), &accepted(device(2), &second), &pass);
    assert!(matches!(late, Err(DeskError::Shut | DeskError::NotAdmitted(_))), "{late:?}");
    world.memory.pass(GRACE);
    for _ in 0..4 {
        one.step();
    }
    let record = &records(world.memory.storage().coord.as_ref(), RoundId(1), 1).unwrap()[0];
    let merged: Vec<_> = record.lineage.iter().map(|origin| origin.device).collect();
    assert_eq!((record.outcome.as_str(), merged), ("published", vec![device(1)]));
    assert!(!world.is_stored(&Digest::of(&second)), "swept after the round");
}

#[test]
fn an_update_whose_bytes_went_with_its_round_is_unknown_and_no_failure() {
    let world = World::new();
    let [mut one, other] = [(); 2].map(|()| world.driver(Scripted::default()));
    let stored = Hook::default();
    let mut parts = world.front.clone();
    let blob = Hooked { blob: parts.storage.blob.clone(), stored: stored.clone(), deleting: Hook::default() };
    parts.storage.blob = Arc::new(blob);
    let receiver = Receiver::new(parts);
    world.begin(&mut one);
    let (id, bytes) = (device(1), update(0.1));
    let open = open(1, &bytes);
    let bring = || {
        assert!(matches!(receiver.open(id, open), Ok(Opened::Resume(0))));
        receiver.chunk(id, open.key(), &chunk(0, &bytes)).unwrap();
        receiver.finish(id, open.key())
    };
    // The door moves once the bytes are stored, and what was held of them is gone before they are stored again.
    *stored.lock().unwrap() = Some({
        let (memory, partials, mut other) = (world.memory.clone(), world.front.partials.clone(), other);
        Box::new(move || {
            take_over(&memory, &mut other);
            partials.discard_before(2).unwrap();
        })
    });
    assert_eq!(bring().unwrap_err().reason, Refusal::UploadUnknown);
    assert_eq!(*world.told.lock().unwrap(), [""; 0], "the aggregator did not fail");
    assert_eq!(bring().unwrap().receipt.receipt.digest, open.digest, "it is brought again");
}

#[test]
fn what_was_stored_lately_outlives_a_sweep_and_storing_it_again_counts() {
    let world = World::new();
    let [mut one, mut other] = [(); 2].map(|()| world.driver(Scripted::default()));
    world.begin(&mut one);
    let bytes = update(0.5);
    let digest = Digest::of(&bytes);
    let blob = &world.front.storage.blob;
    let sweep_after = |age: Duration, by: &mut Driver<Scripted>| {
        world.memory.pass(age);
        world.memory.lapse_lead();
        by.lead().doubt();
        by.step();
        by.lead().prolong().unwrap();
        by.step();
        world.is_stored(&digest)
    };
    blob.put_if_absent(&digest, bytes.len() as u64, &mut &*bytes).unwrap();
    assert!(sweep_after(GRACE / 2, &mut other), "somebody may be about to name it");
    let again = blob.put_if_absent(&digest, bytes.len() as u64, &mut &*bytes).unwrap();
    assert_eq!(again, Put::Present);
    assert!(sweep_after(GRACE / 2, &mut one), "it was stored again");
    assert!(!sweep_after(GRACE / 2, &mut other), "nobody named it");
}

#[test]
fn nothing_is_begun_while_a_deletion_may_come_late() {
    const LASTS: Duration = Duration::from_secs(10);
    let world = World::new();
    world.memory.delay_deletions(LASTS);
    let bytes = update(0.5);
    let mut parts = world.process();
    let deleting = Hook::default();
    let blob =
        Hooked { blob: parts.storage.blob.clone(), stored: Hook::default(), deleting: deleting.clone() };
    parts.storage.blob = Arc::new(blob);
    let mut one = Driver::new(parts, base(), Scripted::default());
    world.begin(&mut one);
    let (blob, digest) = (&world.front.storage.blob, Digest::of(&bytes));
    blob.put_if_absent(&digest, bytes.len() as u64, &mut &*bytes).unwrap();
    let other = Arc::new(Mutex::new(world.driver(Scripted::default())));
    let is_open = || world.memory.storage().coord.head("door").unwrap().unwrap().value.first() == Some(&1);
    assert!(is_open());

    // Whoever swept is overtaken in the midst of it, and the other has no way to know how that ends.
    *deleting.lock().unwrap() = Some({
        let (memory, other) = (world.memory.clone(), other.clone());
        Box::new(move || take_over(&memory, &mut other.lock().unwrap()))
    });
    world.memory.lapse_lead();
    one.lead().doubt();
    one.step();
    world.memory.pass(GRACE);
    one.lead().prolong().unwrap();
    one.step();
    let mut other = other.lock().unwrap();
    let quiet_ms = world.clock.unix_ms() + LASTS.as_millis() as u64;
    assert_eq!(other.step(), Step::Wait(Some(quiet_ms)));
    assert!(!is_open());
    world.wait(LASTS.as_millis() as u64);
    other.step();
    assert!(is_open(), "it is over by now");

    // So does one whose own deletion failed.
    blob.put_if_absent(&digest, bytes.len() as u64, &mut &*bytes).unwrap();
    drop(other);
    let mut one = world.driver(Scripted::default());
    world.memory.lapse_lead();
    world.memory.pass(GRACE);
    one.lead().prolong().unwrap();
    world.memory.fail_deletions(true);
    one.step();
    assert!(!is_open() && world.is_stored(&digest));
    world.memory.fail_deletions(false);
    world.wait(LASTS.as_millis() as u64);
    one.step();
    assert!(is_open());
}
