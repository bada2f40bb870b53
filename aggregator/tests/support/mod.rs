//! A receiver over real files in a temporary directory, with a tiny adapter and a clock set by hand.

#![allow(dead_code, reason = "shared by several test binaries, each of which uses its part")]

pub mod shared;

use std::sync::{Arc, Mutex};

use aggregator::config::Config;
use aggregator::desk::Desk;
use aggregator::events::{Event, Events};
use aggregator::laboratory::Base;
use aggregator::optimize::OptimizerState;
use aggregator::pause::PausePoint;
use aggregator::publish::{Candidate, Publisher};
use aggregator::receive::enroll::{Certify, Registry};
use aggregator::receive::partial::PartialFiles;
use aggregator::receive::{Parts, Receiver};
use aggregator::round::Policy;
use aggregator::store::{
    Access, Blob, Disk, FileBlob, LocalWatch, MemoryStorage, RealDisk, SoleLead, SqliteStore, Storage,
};
use commonweal_adapter::{
    Adapter, AdapterDelta, AdapterLayout, Bits, CompressOptions, Module, Residual, Target, Trainable,
    compress,
};
use commonweal_protocol::{
    BaseHash, CertificateChain, Chunk, Csr, DeviceId, DeviceReport, Digest, KeyNumber, Open, Poll,
    ReportCard, RoundId, SigningKey, Token,
};
use commonweal_transport::Clock;
use rand::SeedableRng;

pub const BASE: BaseHash = BaseHash([9; 32]);
pub const NOW_MS: u64 = 1_700_000_000_000;

pub fn layout() -> Arc<AdapterLayout> {
    let module = |target, outputs| Module { target, inputs: 16, outputs };
    let modules = vec![module(Target::Q, 16), module(Target::V, 8)];
    Arc::new(AdapterLayout::new(2, 4, 8.0, modules).unwrap())
}

pub fn device(number: u8) -> DeviceId {
    DeviceId([number; 16])
}

/// A packed update with this value everywhere.
pub fn update(value: f32) -> Vec<u8> {
    let values = vec![value; layout().trainable_parameters(Trainable::Both)];
    let delta = AdapterDelta::from_values(layout(), Trainable::Both, values).unwrap();
    let mut residual = Residual::zeros(layout(), Trainable::Both);
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let options =
        CompressOptions { bits: Bits::Four, block: 64, stochastic: true, ..CompressOptions::default() };
    compress(&delta, &mut residual, &options, &mut random).unwrap().into_bytes()
}

pub fn open(round: u64, bytes: &[u8]) -> Open {
    Open {
        round: RoundId(round),
        base: BASE,
        digest: Digest::of(bytes),
        length: bytes.len() as u64,
        samples: 10,
        report: DeviceReport::default(),
        trace: None,
    }
}

pub fn chunk(offset: u64, bytes: &[u8]) -> Chunk {
    Chunk::new(offset, bytes.to_vec()).unwrap()
}

/// The first release's adapter.
fn put_first(blob: &dyn Blob) -> Digest {
    let bytes = Base { hash: BASE, layout: layout() }.write(&Adapter::init(layout(), 0)).unwrap();
    let digest = Digest::of(&bytes);
    blob.put_if_absent(&digest, bytes.len() as u64, &mut bytes.as_slice()).unwrap();
    digest
}

/// Certifies whatever comes.
pub struct Stamp;

impl Certify for Stamp {
    fn certify(&self, _: DeviceId, _: &Csr, _: u64, _: u64) -> Result<CertificateChain, String> {
        Ok(CertificateChain(Vec::new()))
    }
}

pub struct World {
    pub dir: tempfile::TempDir,
    pub parts: Parts,
    pub receiver: Arc<Receiver>,
    pub clock: Clock,
    pub events: Arc<Mutex<Vec<Event>>>,
    pub registry: Registry,
    pub base: Base,
}

impl World {
    /// A round of two devices; `disk` is where blobs and unfinished uploads go.
    pub fn new(disk: Arc<dyn Disk>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::open(dir, disk, |_| {})
    }

    /// On a directory that may hold an earlier world's state.
    pub fn open(dir: tempfile::TempDir, disk: Arc<dyn Disk>, change: impl FnOnce(&mut Config)) -> Self {
        Self::open_at(dir, disk, Clock::manual(NOW_MS), change)
    }

    /// The same, by this clock.
    pub fn open_at(
        dir: tempfile::TempDir,
        disk: Arc<dyn Disk>,
        clock: Clock,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let sqlite = Arc::new(SqliteStore::open(&dir.path().join("aggregator.db")).unwrap());
        // The first release is written as the operator does, on a disk with room.
        let roomy = FileBlob::open(&dir.path().join("blobs"), Arc::new(RealDisk), Access::Exclusive).unwrap();
        let blob = FileBlob::open(&dir.path().join("blobs"), disk.clone(), Access::Exclusive).unwrap();
        let storage = Storage {
            coord: sqlite.clone(),
            inbox: sqlite,
            blob: Arc::new(blob),
            watch: Arc::new(LocalWatch::default()),
            lead: Arc::new(SoleLead),
        };
        let first = put_first(&roomy);
        Self::on(dir, disk, storage, first, clock, change)
    }

    /// On a store in memory, which a test can break.
    pub fn in_memory(memory: &MemoryStorage, change: impl FnOnce(&mut Config)) -> Self {
        let (dir, storage) = (tempfile::tempdir().unwrap(), memory.storage());
        let first = put_first(storage.blob.as_ref());
        Self::on(dir, Arc::new(RealDisk), storage, first, Clock::manual(NOW_MS), change)
    }

    fn on(
        dir: tempfile::TempDir,
        disk: Arc<dyn Disk>,
        storage: Storage,
        digest: Digest,
        clock: Clock,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let key = SigningKey::from_bytes(&[3; 32]);
        let base = Base { hash: BASE, layout: layout() };
        let publisher = Publisher::new(storage.coord.clone(), storage.blob.clone(), key.clone(), BASE);
        if publisher.head().unwrap().is_none() {
            let card = ReportCard::default();
            aggregator::desk::Record::of_base(&card, NOW_MS).append(storage.coord.as_ref()).unwrap();
            publisher
                .publish(
                    Candidate { round: None, parent: None, digest, state: OptimizerState::default(), card },
                    NOW_MS,
                )
                .unwrap();
        }
        let mut config = Config::default();
        config.receive.reserve_bytes = 0;
        config.round = Policy {
            goal: 2,
            over_selection: 2.0,
            quorum: 1,
            wait_ms: 600_000,
            deadline_ms: 60_000,
            ..Policy::default()
        };
        change(&mut config);
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = {
            let events = events.clone();
            Events::to(move |event| events.lock().unwrap().push(event.clone()))
        };
        let desk = Desk::open(
            storage.clone(),
            publisher.clone(),
            config.round.clone(),
            sink.clone(),
            clock.unix_ms(),
        )
        .unwrap();
        let registry = Registry::new(storage.coord.clone());
        let parts = Parts {
            config: Arc::new(config),
            partials: Arc::new(PartialFiles::open(&dir.path().join("partials"), disk).unwrap()),
            storage,
            publisher,
            desk,
            base: BASE,
            layout: layout(),
            signer: key.into(),
            clock: clock.clone(),
            events: sink,
            pause: PausePoint::default(),
        };
        let receiver = Arc::new(Receiver::new(parts.clone()));
        Self { dir, parts, receiver, clock, events, registry, base }
    }

    /// Opens a round for two, with a task for each of these devices.
    pub fn assign(&self, devices: &[u8]) {
        for number in [101, 102] {
            self.receiver
                .poll(device(number), Poll { base: BASE, installed: None, key: KeyNumber(0), trouble: None })
                .unwrap();
        }
        for number in devices {
            let poll = Poll { base: BASE, installed: None, key: KeyNumber(0), trouble: None };
            let reply = self.receiver.poll(device(*number), poll).unwrap();
            assert!(reply.task.is_some(), "device {number} has no task");
        }
    }

    /// The whole of an upload.
    pub fn upload(
        &self,
        number: u8,
        open: Open,
        bytes: &[u8],
    ) -> Result<commonweal_protocol::Accepted, commonweal_protocol::Refused> {
        let device = device(number);
        match self.receiver.open(device, open)? {
            commonweal_transport::Opened::Done(accepted) => Ok(accepted),
            commonweal_transport::Opened::Resume(offset) => {
                let rest = bytes.get(offset as usize..).unwrap_or_default();
                if !rest.is_empty() {
                    self.receiver.chunk(device, open.key(), &chunk(offset, rest))?;
                }
                self.receiver.finish(device, open.key())
            }
        }
    }

    /// Puts a device on the list of those that may take part.
    pub fn enroll(&self, number: u8) {
        let (token, csr) = (Token([number; 32]), Csr::new(vec![1]).unwrap());
        self.registry.invite(&token, NOW_MS, NOW_MS + 1_000).unwrap();
        self.registry.enroll(&Stamp, &token, &csr, device(number), NOW_MS, NOW_MS + 1_000).unwrap();
    }

    /// Everything that operators were told about refusals.
    pub fn refusals(&self) -> Vec<String> {
        self.events
            .lock()
            .unwrap()
            .iter()
            .filter_map(|event| match event {
                Event::Refused { reason, .. } => Some(reason.clone()),
                _ => None,
            })
            .collect()
    }
}
