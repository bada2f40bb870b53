//! What a device may send and what becomes of it, on real files: honest, clumsy and hostile.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a test that cannot get its value has failed"
)]

mod support;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use aggregator::optimize::OptimizerState;
use aggregator::publish::{Candidate, Publisher};
use aggregator::receive::handler::{Service, Threads};
use aggregator::receive::{Parts, Receiver};
use aggregator::store::{Coord, Disk, Entry, RealDisk, StoreError, While};
use commonweal_adapter::{
    Adapter, AdapterDelta, AdapterLayout, Bits, CompressOptions, Module, Residual, Target, Trainable,
};
use commonweal_protocol::{
    BaseHash, Digest, Enroll, Fetch, KeyNumber, Open, Poll, Refusal, ReportCard, RoundId, Token, UploadKey,
    Version,
};
use commonweal_transport::{Authority, DeviceKey, Handler as _, Opened, Peer};
use rand::SeedableRng;
use support::*;

fn world() -> World {
    World::new(Arc::new(RealDisk))
}

fn reason<T: std::fmt::Debug>(result: Result<T, commonweal_protocol::Refused>) -> Refusal {
    result.unwrap_err().reason
}

#[test]
fn an_honest_update_is_signed_for_and_counted() {
    let world = world();
    world.assign(&[1]);
    let bytes = update(0.1);
    let accepted = world.upload(1, open(1, &bytes), &bytes).unwrap();
    let receipt = accepted.receipt.verify(&world.parts.signer.keys().lineage().key()).unwrap();
    assert_eq!((receipt.device, receipt.digest), (device(1), Digest::of(&bytes)));
    assert_eq!(world.parts.storage.blob.read_all(&receipt.digest, 1 << 20).unwrap(), bytes);
    assert_eq!(world.parts.desk.admits(receipt.round, &device(1)), Ok(true));
    assert_eq!(std::fs::read_dir(world.dir.path().join("partials")).unwrap().count(), 0);
}

#[test]
fn the_same_upload_again_gets_the_same_receipt_and_counts_once() {
    let world = world();
    world.assign(&[1]);
    let bytes = update(0.1);
    let first = world.upload(1, open(1, &bytes), &bytes).unwrap();
    world.clock.set(NOW_MS + 5_000);
    assert_eq!(world.receiver.open(device(1), open(1, &bytes)).unwrap(), Opened::Done(first));
    assert_eq!(world.receiver.finish(device(1), open(1, &bytes).key()).unwrap(), first);
    let other = update(0.2);
    assert_eq!(reason(world.upload(1, open(1, &other), &other)), Refusal::AlreadySent);
    assert_eq!(world.parts.desk.rounds().progress().0, 1);
}

#[test]
fn an_upload_goes_on_after_a_restart_where_the_durable_bytes_end() {
    let world = world();
    world.assign(&[1]);
    let bytes = update(0.1);
    let announced = open(1, &bytes);
    assert_eq!(world.receiver.open(device(1), announced).unwrap(), Opened::Resume(0));
    assert_eq!(world.receiver.chunk(device(1), announced.key(), &chunk(0, &bytes[..100])).unwrap(), 100);
    let world = World::open(world.dir, Arc::new(RealDisk), |_| {});
    let stray = world.receiver.chunk(device(1), announced.key(), &chunk(100, &bytes[100..]));
    assert_eq!(reason(stray), Refusal::UploadUnknown, "the device opens again and learns the offset");
    assert_eq!(world.receiver.open(device(1), announced).unwrap(), Opened::Resume(100));
    world.receiver.chunk(device(1), announced.key(), &chunk(100, &bytes[100..])).unwrap();
    let accepted = world.receiver.finish(device(1), announced.key()).unwrap();
    // Also the receipt outlives the process, and so does the count.
    let world = World::open(world.dir, Arc::new(RealDisk), |_| {});
    assert_eq!(world.receiver.finish(device(1), announced.key()).unwrap(), accepted);
    assert_eq!(world.parts.desk.admits(announced.round, &device(1)), Ok(true));
    // And the norm, which the merge asks for.
    let norm = world.parts.desk.taken(announced.round, &device(1)).unwrap().unwrap().1.norm.unwrap();
    let expected = 0.1 * (layout().trainable_parameters(Trainable::Both) as f64).sqrt();
    assert!((norm / expected - 1.0).abs() < 0.01, "expected {expected}, got {norm}");
}

#[test]
fn another_base_is_refused_by_name() {
    let world = world();
    world.assign(&[1]);
    let other = BaseHash([8; 32]);
    assert_eq!(
        reason(
            world
                .receiver
                .poll(device(1), Poll { base: other, installed: None, key: KeyNumber(0), trouble: None })
        ),
        Refusal::WrongBase
    );
    let bytes = update(0.1);
    let announced = Open { base: other, ..open(1, &bytes) };
    assert_eq!(reason(world.receiver.open(device(1), announced)), Refusal::WrongBase);
    assert!(world.refusals().iter().all(|text| text.contains(&other.to_string())), "the operator sees both");
}

#[test]
fn a_stale_round_and_a_device_without_a_task_are_refused() {
    let world = world();
    world.assign(&[1]);
    let bytes = update(0.1);
    assert_eq!(reason(world.receiver.open(device(1), open(7, &bytes))), Refusal::StaleRound);
    assert_eq!(reason(world.receiver.open(device(5), open(1, &bytes))), Refusal::NotInRound);
    world.clock.set(NOW_MS + 61_000);
    assert_eq!(world.receiver.open(device(1), open(1, &bytes)).unwrap(), Opened::Resume(0));
    world.receiver.chunk(device(1), open(1, &bytes).key(), &chunk(0, &bytes)).unwrap();
    world.parts.desk.next(NOW_MS + 61_000).unwrap();
    assert_eq!(reason(world.receiver.finish(device(1), open(1, &bytes).key())), Refusal::StaleRound, "late");
}

#[test]
fn lies_about_length_and_digest_are_found_and_the_upload_can_start_over() {
    let world = world();
    world.assign(&[1]);
    let bytes = update(0.1);
    let short = Open { length: bytes.len() as u64 + 5, ..open(1, &bytes) };
    assert_eq!(reason(world.upload(1, short, &bytes)), Refusal::LengthMismatch);
    let long = Open { length: bytes.len() as u64 - 5, ..open(1, &bytes) };
    assert_eq!(reason(world.upload(1, long, &bytes)), Refusal::LengthMismatch);
    let other = Open { digest: Digest([4; 32]), ..open(1, &bytes) };
    assert_eq!(reason(world.upload(1, other, &bytes)), Refusal::DigestMismatch);
    world.upload(1, open(1, &bytes), &bytes).unwrap();
}

#[test]
fn chunks_must_be_whole_and_follow_each_other() {
    let world = world();
    world.assign(&[1]);
    let bytes = update(0.1);
    let announced = open(1, &bytes);
    world.receiver.open(device(1), announced).unwrap();
    let send =
        |offset: u64, part: &[u8]| world.receiver.chunk(device(1), announced.key(), &chunk(offset, part));
    assert_eq!(reason(send(10, &bytes[10..20])), Refusal::OffsetMismatch);
    send(0, &bytes[..10]).unwrap();
    assert_eq!(reason(send(0, &bytes[..10])), Refusal::OffsetMismatch, "sent twice");
    let mut damaged = chunk(10, &bytes[10..20]);
    damaged.hash = Digest([0; 32]);
    assert_eq!(reason(world.receiver.chunk(device(1), announced.key(), &damaged)), Refusal::ChunkCorrupt);
    let never_opened = UploadKey { digest: Digest([1; 32]), ..announced.key() };
    assert_eq!(reason(world.receiver.finish(device(1), never_opened)), Refusal::UploadUnknown);
}

#[test]
fn garbage_and_another_shape_are_refused() {
    let world = world();
    world.assign(&[1]);
    let garbage = vec![7_u8; 300];
    assert_eq!(reason(world.upload(1, open(1, &garbage), &garbage)), Refusal::UpdateUnusable);
    // Another layout.
    let modules = vec![Module { target: Target::Q, inputs: 16, outputs: 16 }];
    let layout = Arc::new(AdapterLayout::new(2, 4, 8.0, modules).unwrap());
    let values = vec![0.1; layout.trainable_parameters(Trainable::Both)];
    let delta = AdapterDelta::from_values(layout.clone(), Trainable::Both, values).unwrap();
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let mut residual = Residual::zeros(layout, Trainable::Both);
    let options = CompressOptions::default();
    let bytes =
        commonweal_adapter::compress(&delta, &mut residual, &options, &mut random).unwrap().into_bytes();
    assert_eq!(reason(world.upload(1, open(1, &bytes), &bytes)), Refusal::UpdateUnusable);
}

/// The frame of a packed delta, as `commonweal-adapter` writes it.
#[derive(serde::Serialize, serde::Deserialize)]
struct Frame {
    layout: [u8; 16],
    trainable: Trainable,
    bits: Bits,
    block: u16,
    rotation: Option<u64>,
    kept: u32,
    places: Vec<u8>,
    scales: Vec<u8>,
    levels: Levels,
}

#[derive(serde::Serialize, serde::Deserialize)]
enum Levels {
    Packed(Vec<u8>),
    Ternary { negative: u32, zero: u32, words: Vec<u8> },
}

/// An update whose scales are all this bf16: one raw block of zstd with the high bytes and then the low ones.
fn with_scales(scale: u16) -> Vec<u8> {
    let honest = update(0.1);
    let mut frame: Frame = postcard::from_bytes(&honest[1..]).unwrap();
    let blocks = frame.kept.div_ceil(u32::from(frame.block)) as usize;
    let [high, low] = scale.to_be_bytes();
    let planes = [vec![high; blocks], vec![low; blocks]].concat();
    let length = u8::try_from(planes.len()).unwrap();
    frame.scales =
        [&[0x28, 0xb5, 0x2f, 0xfd, 0x20, length], &(u32::from(length) << 3 | 1).to_le_bytes()[..3]].concat();
    frame.scales.extend(planes);
    postcard::to_extend(&frame, vec![honest[0]]).unwrap()
}

#[test]
fn values_that_are_no_numbers_are_refused() {
    let world = world();
    world.assign(&[1]);
    for (what, scale) in [("NaN", 0x7fc0), ("infinite", 0x7f80), ("negative", 0xbc00)] {
        let bytes = with_scales(scale);
        assert_eq!(reason(world.upload(1, open(1, &bytes), &bytes)), Refusal::UpdateUnusable, "{what}");
        let told = world.refusals().pop().unwrap();
        assert!(told.contains("expected a finite scale"), "{what}: {told}");
    }
    // The same with a number is taken: nothing else was wrong.
    let bytes = with_scales(0x3c00);
    world.upload(1, open(1, &bytes), &bytes).unwrap();
}

#[test]
fn an_update_that_is_too_long_a_vector_is_refused() {
    let world = World::open(tempfile::tempdir().unwrap(), Arc::new(RealDisk), |config| {
        config.receive.norm_max = 1.0;
    });
    world.assign(&[1]);
    let bytes = update(0.5);
    assert_eq!(reason(world.upload(1, open(1, &bytes), &bytes)), Refusal::UpdateUnusable);
    assert!(world.refusals()[0].contains("expected a norm of at most 1"), "{:?}", world.refusals());
    let bytes = update(0.01);
    world.upload(1, open(1, &bytes), &bytes).unwrap();
}

#[test]
fn an_oversized_announcement_is_refused_before_anything_is_stored() {
    let world = world();
    world.assign(&[1]);
    let announced = Open { length: 100 << 20, ..open(1, b"x") };
    assert_eq!(reason(world.receiver.open(device(1), announced)), Refusal::TooLarge);
    assert_eq!(std::fs::read_dir(world.dir.path().join("partials")).unwrap().count(), 0);
}

#[derive(Debug)]
struct Limited(AtomicU64);

impl Disk for Limited {
    fn write(&self, file: &mut std::fs::File, bytes: &[u8]) -> std::io::Result<()> {
        let room = self.0.load(Ordering::SeqCst);
        if room < bytes.len() as u64 {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        self.0.store(room - bytes.len() as u64, Ordering::SeqCst);
        std::io::Write::write_all(file, bytes)
    }
    fn free_bytes(&self, _dir: &Path) -> std::io::Result<u64> {
        Ok(self.0.load(Ordering::SeqCst))
    }
}

#[test]
fn a_full_disk_refuses_new_uploads_and_loses_nothing_accepted() {
    let disk = Arc::new(Limited(AtomicU64::new(1 << 20)));
    let world = World::new(disk.clone());
    world.assign(&[1, 2]);
    let bytes = update(0.1);
    let accepted = world.upload(1, open(1, &bytes), &bytes).unwrap();
    disk.0.store(bytes.len() as u64, Ordering::SeqCst);
    let other = update(0.2);
    assert_eq!(reason(world.receiver.open(device(2), open(1, &other))), Refusal::Busy);
    // Room for it when it was opened, gone while it was stored: no receipt, and it can be sent again.
    disk.0.store(1 << 20, Ordering::SeqCst);
    world.receiver.open(device(2), open(1, &other)).unwrap();
    disk.0.store(10, Ordering::SeqCst);
    let cut = world.receiver.chunk(device(2), open(1, &other).key(), &chunk(0, &other));
    assert_eq!(reason(cut), Refusal::Busy);
    disk.0.store(other.len() as u64, Ordering::SeqCst);
    world.receiver.chunk(device(2), open(1, &other).key(), &chunk(0, &other)).unwrap();
    assert_eq!(reason(world.receiver.finish(device(2), open(1, &other).key())), Refusal::Internal);
    assert_eq!(world.receiver.finish(device(1), open(1, &bytes).key()).unwrap(), accepted);
    disk.0.store(1 << 20, Ordering::SeqCst);
    world.upload(2, open(1, &other), &other).unwrap();
}

#[test]
fn what_a_vanished_device_was_promised_ends_with_its_round() {
    let disk = Arc::new(Limited(AtomicU64::new(1 << 20)));
    let world = World::new(disk.clone());
    world.assign(&[1]);
    let bytes = update(0.1);
    world.receiver.open(device(1), open(1, &bytes)).unwrap();
    world.clock.set(NOW_MS + 61_000);
    world.parts.desk.next(NOW_MS + 61_000).unwrap();
    world.assign(&[2]);
    // Room for this update alone, once as it comes in and once kept.
    disk.0.store(2 * bytes.len() as u64, Ordering::SeqCst);
    world.upload(2, open(2, &bytes), &bytes).unwrap();
}

/// A disk that takes its time.
#[derive(Debug)]
struct Slow;

impl Disk for Slow {
    fn write(&self, file: &mut std::fs::File, bytes: &[u8]) -> std::io::Result<()> {
        std::thread::sleep(std::time::Duration::from_millis(100));
        std::io::Write::write_all(file, bytes)
    }
    fn free_bytes(&self, _dir: &Path) -> std::io::Result<u64> {
        Ok(u64::MAX)
    }
}

#[test]
fn a_stream_that_a_cut_left_behind_does_not_write_into_the_one_that_goes_on() {
    let world = World::new(Arc::new(Slow));
    world.assign(&[1]);
    let bytes = update(0.1);
    let announced = open(1, &bytes);
    world.receiver.open(device(1), announced).unwrap();
    let send = || world.receiver.chunk(device(1), announced.key(), &chunk(0, &bytes));
    let answers = std::thread::scope(|scope| {
        let streams = [scope.spawn(send), scope.spawn(send)];
        streams.map(|stream| stream.join().unwrap().map_err(|refused| refused.reason))
    });
    assert!(answers.contains(&Ok(bytes.len() as u64)), "{answers:?}");
    assert!(answers.contains(&Err(Refusal::OffsetMismatch)), "{answers:?}");
    let answers = std::thread::scope(|scope| {
        let finish = || world.receiver.finish(device(1), announced.key());
        let streams = [scope.spawn(finish), scope.spawn(finish)];
        streams.map(|stream| stream.join().unwrap().unwrap())
    });
    assert_eq!(answers[0], answers[1], "one receipt");
}

#[test]
fn the_rest_of_a_late_update_is_not_taken() {
    let world = world();
    world.assign(&[1]);
    let bytes = update(0.1);
    let announced = open(1, &bytes);
    world.receiver.open(device(1), announced).unwrap();
    world.receiver.chunk(device(1), announced.key(), &chunk(0, &bytes[..10])).unwrap();
    world.parts.desk.next(NOW_MS + 61_000).unwrap();
    let late = world.receiver.chunk(device(1), announced.key(), &chunk(10, &bytes[10..]));
    assert_eq!(reason(late), Refusal::StaleRound);
    assert_eq!(std::fs::read_dir(world.dir.path().join("partials")).unwrap().count(), 0);
}

#[test]
fn an_update_in_crumbs_is_slowed_down() {
    let world = World::open(tempfile::tempdir().unwrap(), Arc::new(RealDisk), |config| {
        config.receive.requests_burst = 4;
    });
    world.assign(&[1]);
    let bytes = update(0.1);
    let announced = open(1, &bytes);
    world.receiver.open(device(1), announced).unwrap();
    let send = |at: usize, end: usize| {
        world.receiver.chunk(device(1), announced.key(), &chunk(at as u64, &bytes[at..end]))
    };
    for at in 0..4 {
        send(at, at + 1).unwrap();
    }
    assert_eq!(reason(send(4, 5)), Refusal::Busy);
    send(4, bytes.len()).unwrap();
    world.receiver.finish(device(1), announced.key()).unwrap();
}

#[test]
fn a_device_that_sends_its_bytes_again_and_again_is_slowed_down() {
    let world = World::open(tempfile::tempdir().unwrap(), Arc::new(RealDisk), |config| {
        config.receive.resends_max = 1;
    });
    world.assign(&[1]);
    let garbage = vec![7_u8; 1_000];
    let mut answers = Vec::new();
    for _ in 0..10 {
        answers.push(reason(world.upload(1, open(1, &garbage), &garbage)));
    }
    assert_eq!(answers[0], Refusal::UpdateUnusable);
    assert_eq!(answers.last(), Some(&Refusal::Busy));
}

#[test]
fn only_published_content_can_be_fetched() {
    let world = world();
    world.assign(&[1]);
    let bytes = update(0.1);
    world.upload(1, open(1, &bytes), &bytes).unwrap();
    let head = world.parts.publisher.head().unwrap().unwrap().release;
    let read = |digest, offset| world.receiver.read(device(2), Fetch { digest, offset }, 64);
    let part = read(head.digest, 8).unwrap();
    assert_eq!((part.length, part.bytes.len()), (head.length, 64));
    assert!(read(head.digest, head.length).unwrap().bytes.is_empty());
    assert_eq!(reason(read(head.digest, head.length + 1)), Refusal::ContentUnknown);
    assert_eq!(reason(read(Digest::of(&bytes), 0)), Refusal::ContentUnknown, "another device's update");
}

/// Tells which operation comes before it is done.
struct Spy<F>(Arc<dyn Coord>, F);

impl<F: Fn(&'static str) + Send + Sync> Coord for Spy<F> {
    fn head(&self, log: &str) -> Result<Option<Entry>, StoreError> {
        self.1("head");
        self.0.head(log)
    }
    fn move_head(
        &self,
        log: &str,
        expected: u64,
        value: &[u8],
        other: Option<While<'_>>,
    ) -> Result<u64, StoreError> {
        self.0.move_head(log, expected, value, other)
    }
    fn scan(&self, log: &str, from: u64, limit: usize) -> Result<Vec<Entry>, StoreError> {
        self.1("scan");
        self.0.scan(log, from, limit)
    }
    fn logs(&self, prefix: &str, after: &str, limit: usize) -> Result<Vec<String>, StoreError> {
        self.0.logs(prefix, after, limit)
    }
    fn truncate(&self, log: &str, below: u64) -> Result<(), StoreError> {
        self.0.truncate(log, below)
    }
}

#[test]
fn content_that_nobody_published_is_looked_for_once() {
    let world = world();
    let scans = Arc::new(AtomicU64::new(0));
    let count = scans.clone();
    let coord = Arc::new(Spy(world.parts.storage.coord.clone(), move |operation| {
        count.fetch_add(u64::from(operation == "scan"), Ordering::SeqCst);
    }));
    let (blob, signer) = (world.parts.storage.blob.clone(), world.parts.signer.clone());
    let publisher = Publisher::new(coord.clone(), blob, signer, BASE);
    let receiver = Receiver::new(Parts { publisher: publisher.clone(), ..world.parts.clone() });
    let read = |digest| receiver.read(device(1), Fetch { digest, offset: 0 }, 64);
    for number in 1..=50 {
        assert_eq!(reason(read(Digest([number; 32]))), Refusal::ContentUnknown);
    }
    assert_eq!(scans.load(Ordering::SeqCst), 1);
    // What is published from then on is found.
    let bytes = world.base.write(&Adapter::init(layout(), 7)).unwrap();
    let digest = Digest::of(&bytes);
    world.parts.storage.blob.put_if_absent(&digest, bytes.len() as u64, &mut bytes.as_slice()).unwrap();
    let parent = Some(Version(0));
    let candidate = Candidate {
        round: Some(RoundId(1)),
        parent,
        digest,
        state: OptimizerState::default(),
        card: ReportCard::default(),
    };
    publisher.publish(candidate, NOW_MS).unwrap();
    assert_eq!(read(digest).unwrap().length, bytes.len() as u64);
}

/// Two devices fetch a release that is new. The second one's request begins and ends while the first one's is between
/// finding the release absent from what it knows and looking at the head.
#[test]
fn a_fetch_beside_another_that_has_just_looked_at_a_new_head_is_answered() {
    let world = world();
    let (blob, signer) = (world.parts.storage.blob.clone(), world.parts.signer.clone());
    let receiver: Arc<OnceLock<Receiver>> = Arc::default();
    let digest = Arc::new(OnceLock::new());
    let fetch = |number| {
        let (receiver, digest) = (receiver.clone(), digest.clone());
        move || {
            let fetch = Fetch { digest: *digest.get().unwrap(), offset: 0 };
            receiver.get().unwrap().read(device(number), fetch, 64).map(|part| part.length)
        }
    };
    let (first, second, answered) = (fetch(1), fetch(2), Arc::new(Mutex::new(None)));
    let meanwhile = {
        let answered = answered.clone();
        move || *answered.lock().unwrap() = Some(second())
    };
    let meanwhile = Mutex::new(Some(meanwhile));
    let coord = Arc::new(Spy(world.parts.storage.coord.clone(), move |operation| {
        let other = if operation == "head" { meanwhile.lock().unwrap().take() } else { None };
        if let Some(other) = other {
            other();
        }
    }));
    let publisher = Publisher::new(coord, blob, signer, BASE);
    let made = Receiver::new(Parts { publisher, ..world.parts.clone() });
    assert!(receiver.set(made).is_ok());

    let bytes = world.base.write(&Adapter::init(layout(), 7)).unwrap();
    digest.set(Digest::of(&bytes)).unwrap();
    let new = *digest.get().unwrap();
    world.parts.storage.blob.put_if_absent(&new, bytes.len() as u64, &mut bytes.as_slice()).unwrap();
    let (round, parent) = (Some(RoundId(1)), Some(Version(0)));
    let (state, card) = (OptimizerState::default(), ReportCard::default());
    let candidate = Candidate { round, parent, digest: new, state, card };
    world.parts.publisher.publish(candidate, NOW_MS).unwrap();

    assert_eq!(first().unwrap(), bytes.len() as u64);
    assert_eq!(answered.lock().unwrap().take().unwrap().unwrap(), bytes.len() as u64);
}

/// Whoever is refused over and over fills neither the operator's log nor, with a certificate, the registry's time.
#[tokio::test]
async fn refusals_do_not_flood_the_operator() {
    let world = World::open(tempfile::tempdir().unwrap(), Arc::new(RealDisk), |config| {
        config.receive.requests_burst = 4;
    });
    let authority = Arc::new(Authority::create(NOW_MS).unwrap());
    let service = Service::new(world.receiver.clone(), world.registry.clone(), authority, Threads::Caller);
    let csr = DeviceKey::generate().unwrap().csr().unwrap();
    for _ in 0..100 {
        let enroll = Enroll { token: Token([7; 32]), csr: csr.clone() };
        assert_eq!(reason(service.enroll(enroll).await), Refusal::TokenRefused);
    }
    assert_eq!(world.refusals().len(), 20);
    let peer = Peer { device: device(1), certificate: Digest([0; 32]), expires_ms: NOW_MS - 1 };
    let mut reasons = Vec::new();
    for _ in 0..100 {
        reasons.push(reason(service.admit(&peer).await));
    }
    assert_eq!((reasons[0], reasons[99]), (Refusal::Expired, Refusal::Busy));
    assert_eq!(world.refusals().len(), 24, "a device's budget of requests");
}

#[test]
fn a_poll_brings_the_task_and_the_release_once() {
    let world = world();
    world.assign(&[]);
    let poll = |installed| {
        world
            .receiver
            .poll(device(1), Poll { base: BASE, installed, key: KeyNumber(0), trouble: None })
            .unwrap()
    };
    let reply = poll(None);
    let (task, release) = (reply.task.unwrap(), reply.release.unwrap());
    release.verify(&world.parts.signer.keys().lineage().key()).unwrap();
    assert_eq!((task.start.version, task.deadline_ms), (Version(0), 60_000));
    world.clock.set(NOW_MS + 1_000);
    let again = poll(Some(Version(0)));
    assert!(again.release.is_none(), "it is installed");
    assert_eq!(again.task.unwrap().deadline_ms, 59_000);
    assert_eq!(again.task.unwrap().seed, task.seed, "the same task again");
}
