//! One aggregator that is killed and started again, its devices, and the network between them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use aggregator::config::Config;
use aggregator::desk::{Desk, Record};
use aggregator::drive::{Driver, Step};
use aggregator::events::Events;
use aggregator::laboratory::Base;
use aggregator::pause::PausePoint;
use aggregator::publish::{Candidate, Publisher};
use aggregator::receive::enroll::Registry;
use aggregator::receive::handler::{Service, Threads};
use aggregator::receive::partial::PartialMemory;
use aggregator::receive::{Parts, Receiver};
use aggregator::round::{Policy, RoundMode};
use aggregator::store::{Blob, Faults as StoreFaults, MemoryStorage};
use commonweal_adapter::{Adapter, AdapterLayout, Module, Target};
use commonweal_protocol::{
    Accepted, AggregatorKey, BaseHash, CertificateChain, Chunk, Csr, DeviceId, Digest, Enroll, Enrolled,
    Fetch, KeyNumber, Open, Poll, PollReply, Refusal, Refused, ReportCard, SigningKey, Token, UploadKey,
};
use commonweal_transport::{
    Authority, Clock, ContentPart, Credentials, DeviceKey, Fault, FaultRates, Faults, Handler, LinkLimits,
    Opened, Peer, ServeLimits, SimLink, SimNetwork,
};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::device::{Device, Manner};
use super::stages::SeededStages;

pub const BASE: BaseHash = BaseHash([9; 32]);
pub const START_MS: u64 = 1_700_000_000_000;
const LIFE_MS: u64 = 365 * 24 * 3_600_000;

/// A handler that a kill silences: whatever still runs on behalf of the dead process does nothing more.
pub struct Mortal {
    service: Service,
    alive: Arc<AtomicBool>,
}

macro_rules! mortal {
    ($self:ident, $call:expr) => {
        if $self.alive.load(Ordering::SeqCst) { $call.await } else { Err(Refusal::Internal.into()) }
    };
}

impl Handler for Mortal {
    async fn admit(&self, peer: &Peer) -> Result<(), Refused> {
        mortal!(self, self.service.admit(peer))
    }
    async fn poll(&self, peer: &Peer, poll: Poll) -> Result<PollReply, Refused> {
        mortal!(self, self.service.poll(peer, poll))
    }
    async fn open(&self, peer: &Peer, open: Open) -> Result<Opened, Refused> {
        mortal!(self, self.service.open(peer, open))
    }
    async fn chunk(&self, peer: &Peer, key: UploadKey, chunk: Chunk) -> Result<u64, Refused> {
        mortal!(self, self.service.chunk(peer, key, chunk))
    }
    async fn finish(&self, peer: &Peer, key: UploadKey) -> Result<Accepted, Refused> {
        mortal!(self, self.service.finish(peer, key))
    }
    async fn read(&self, peer: &Peer, fetch: Fetch, length_max: usize) -> Result<ContentPart, Refused> {
        mortal!(self, self.service.read(peer, fetch, length_max))
    }
    async fn renew(&self, peer: &Peer, csr: Csr) -> Result<CertificateChain, Refused> {
        mortal!(self, self.service.renew(peer, csr))
    }
    async fn enroll(&self, enroll: Enroll) -> Result<Enrolled, Refused> {
        mortal!(self, self.service.enroll(enroll))
    }
}

/// A running aggregator: what a kill takes away.
struct Process {
    network: Arc<SimNetwork<Mortal>>,
    driver: Driver<SeededStages>,
    desk: Arc<Desk>,
    alive: Arc<AtomicBool>,
}

/// See the module.
pub struct World {
    pub seed: u64,
    pub memory: MemoryStorage,
    pub partials: PartialMemory,
    pub publisher: Publisher,
    pub key: SigningKey,
    pub base: Base,
    pub devices: Vec<Device>,
    pub kills: u64,
    pub crashes: u64,
    pub store_faults: u64,
    pub partitions: u64,
    pub clock_steps_back: u64,
    /// Devices that reach nobody for so many visits.
    cut_off: BTreeMap<usize, u32>,
    pub config: Arc<Config>,
    clock: Clock,
    authority: Arc<Authority>,
    faults: Faults,
    process: Option<Process>,
}

pub fn layout() -> Arc<AdapterLayout> {
    let modules = vec![Module { target: Target::Q, inputs: 16, outputs: 16 }];
    Arc::new(AdapterLayout::new(1, 2, 4.0, modules).unwrap())
}

fn config(random: &mut ChaCha8Rng, mode: RoundMode) -> Config {
    let mut config = Config::default();
    let goal = random.random_range(1..5);
    config.round = Policy {
        goal,
        over_selection: random.random_range(1.0..1.8),
        quorum: random.random_range(1..=goal),
        wait_ms: random.random_range(0..30_000),
        deadline_ms: random.random_range(20_000..90_000),
        ..Policy::default()
    };
    if mode == RoundMode::Buffered {
        config.round.mode = mode;
        config.round.over_selection = random.random_range(1.0..3.0);
        config.round.staleness_max = random.random_range(1..4);
        config.round.staleness_exponent = random.random_range(0.0..1.5);
    }
    config.receive.releases_kept = 6;
    config.receive.reserve_bytes = 0;
    config.receive.requests_burst = 1_000;
    // So that the merge can be computed again from what the devices sent.
    config.merge.clip_median_factor = 0.0;
    config.merge.weight_median_factor = 0.0;
    config
}

impl World {
    pub fn new(seed: u64, mode: RoundMode) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed ^ 0x5eed);
        let memory = MemoryStorage::default();
        let storage = memory.storage();
        let key = SigningKey::from_bytes(&[3; 32]);
        let base = Base { hash: BASE, layout: layout() };
        let bytes = base.write(&Adapter::init(base.layout.clone(), 0)).unwrap();
        let digest = Digest::of(&bytes);
        memory.put_if_absent(&digest, bytes.len() as u64, &mut bytes.as_slice()).unwrap();
        let publisher = Publisher::new(storage.coord.clone(), storage.blob.clone(), key.clone(), BASE);
        let card = ReportCard {
            safe_rate: Some(0.95),
            over_refusal_rate: Some(0.0),
            held_out_loss: Some(1.0),
            ..ReportCard::default()
        };
        Record::of_base(&card, START_MS).append(storage.coord.as_ref()).unwrap();
        publisher
            .publish(
                Candidate {
                    round: None,
                    parent: None,
                    digest,
                    state: aggregator::optimize::OptimizerState::default(),
                    card,
                },
                START_MS,
            )
            .unwrap();
        let authority = Arc::new(Authority::create(START_MS).unwrap());
        let registry = Registry::new(storage.coord.clone());
        let manners = [
            Manner::Honest,
            Manner::Honest,
            Manner::Honest,
            Manner::Honest,
            Manner::Twice,
            Manner::Vanishing,
            Manner::Garbage,
        ];
        let devices = manners
            .into_iter()
            .enumerate()
            .map(|(index, manner)| {
                let id = DeviceId([index as u8 + 1; 16]);
                Device::new(id, enrol(&registry, &authority, &key, id), manner)
            })
            .collect();
        let rates = FaultRates {
            cut_before: 0.03,
            cut_inside: 0.02,
            cut_after: 0.04,
            duplicate: 0.03,
            delay: 0.1,
            delay_ms_max: 2_000,
            corrupt: 0.02,
            corrupt_answer: 0.02,
        };
        let mut world = Self {
            seed,
            memory,
            partials: PartialMemory::default(),
            publisher,
            key,
            base,
            devices,
            kills: 0,
            crashes: 0,
            store_faults: 0,
            partitions: 0,
            clock_steps_back: 0,
            cut_off: BTreeMap::new(),
            config: Arc::new(config(&mut random, mode)),
            clock: Clock::manual(START_MS),
            authority,
            faults: Faults::seeded(seed, rates, u32::MAX),
            process: None,
        };
        world.start();
        world
    }

    /// Starts the aggregator on what is stored; a store that fails at that moment is healed, as an operator would.
    fn start(&mut self) {
        self.memory.heal();
        let storage = self.memory.storage();
        let events = Events::to(|_| {});
        let desk = Desk::open(
            storage.clone(),
            self.publisher.clone(),
            self.config.round.clone(),
            events.clone(),
            self.clock.unix_ms(),
        )
        .unwrap();
        let parts = Parts {
            config: self.config.clone(),
            storage: storage.clone(),
            partials: Arc::new(self.partials.clone()),
            publisher: self.publisher.clone(),
            desk: desk.clone(),
            base: BASE,
            layout: self.base.layout.clone(),
            signer: self.key.clone().into(),
            clock: self.clock.clone(),
            events,
            pause: PausePoint::default(),
        };
        let receiver = Arc::new(Receiver::new(parts.clone()));
        let registry = Registry::new(storage.coord);
        let service = Service::new(receiver, registry, self.authority.clone(), Threads::Caller);
        let alive = Arc::new(AtomicBool::new(true));
        let identity = self.authority.issue_server(self.clock.unix_ms(), LIFE_MS).unwrap();
        let handler = Mortal { service, alive: alive.clone() };
        let limits = ServeLimits::default();
        let network =
            SimNetwork::new(handler, identity, self.clock.clone(), &limits, self.faults.clone()).unwrap();
        let driver = Driver::new(parts, self.base.clone(), SeededStages { seed: self.seed });
        self.process = Some(Process { network, driver, desk, alive });
    }

    fn process(&mut self) -> &mut Process {
        self.process.as_mut().unwrap()
    }

    /// The current round.
    pub fn round(&self) -> u64 {
        self.process.as_ref().unwrap().desk.round().0
    }

    /// `kill -9` and a new start.
    pub fn kill(&mut self) {
        if let Some(process) = self.process.take() {
            process.alive.store(false, Ordering::SeqCst);
        }
        self.kills += 1;
        self.start();
    }

    /// After so many more writes the process is dead; it is started again when somebody notices.
    pub fn crash_soon(&mut self, writes: u64) {
        self.memory.crash_after(writes);
    }

    fn restart_if_crashed(&mut self) {
        if self.memory.has_crashed() {
            self.crashes += 1;
            self.kill();
        }
    }

    pub fn store_fails(&mut self, random: &mut ChaCha8Rng) {
        self.store_faults += 1;
        self.memory.inject(random.random(), StoreFaults { determinate: 0.1, indeterminate: 0.1 });
    }

    pub fn store_heals(&mut self) {
        self.memory.heal();
    }

    pub fn time_passes(&mut self, ms: u64) {
        self.clock.set(self.clock.unix_ms() + ms);
        self.drive();
    }

    /// An operator, or a time server, corrects the clock.
    pub fn clock_steps_back(&mut self, ms: u64) {
        self.clock_steps_back += 1;
        self.clock.set(self.clock.unix_ms() - ms);
        self.drive();
    }

    /// A network splits: some devices reach nobody for a while.
    pub fn partition(&mut self, random: &mut ChaCha8Rng) {
        self.partitions += 1;
        for index in 0..self.devices.len() {
            if random.random_bool(0.4) {
                self.cut_off.insert(index, random.random_range(1..20));
            }
        }
    }

    /// Whether a visit of the device comes to nothing.
    fn is_cut_off(&mut self, index: usize) -> bool {
        let Some(visits) = self.cut_off.get_mut(&index) else { return false };
        *visits -= 1;
        if *visits == 0 {
            self.cut_off.remove(&index);
        }
        true
    }

    /// The driver does what there is to do, for a while.
    pub fn drive(&mut self) {
        for _ in 0..3 {
            if self.process().driver.step() != Step::Worked {
                break;
            }
        }
        self.restart_if_crashed();
    }

    fn link(&self, index: usize, salt: u64) -> SimLink<Mortal> {
        let process = self.process.as_ref().unwrap();
        let credentials = self.devices[index].credentials.clone();
        let limits = LinkLimits {
            stall_ms: 10_000,
            retry_first_ms: 100,
            retries_max: 2,
            seed: salt,
            ..LinkLimits::default()
        };
        SimLink::over(process.network.device(credentials).unwrap(), limits)
    }

    /// One device visits; sometimes it goes away in the middle.
    pub async fn device_acts(&mut self, random: &mut ChaCha8Rng) {
        let index = random.random_range(0..self.devices.len());
        if self.is_cut_off(index) {
            return;
        }
        let link = self.link(index, random.random());
        let patience_ms = if random.random_bool(0.1) { random.random_range(0..1_500) } else { 3_600_000 };
        let visit = self.devices[index].visit(&link, BASE, &self.base.layout, random);
        // The device's own state is changed between awaits only, so that a visit can end anywhere.
        drop(tokio::time::timeout(std::time::Duration::from_millis(patience_ms), visit).await);
        self.restart_if_crashed();
    }

    /// All devices visit at once, in a random order.
    pub async fn devices_act_together(&mut self, random: &mut ChaCha8Rng) {
        let links: Vec<_> = (0..self.devices.len()).map(|index| self.link(index, random.random())).collect();
        let seeds: Vec<u64> = links.iter().map(|_| random.random()).collect();
        let base = self.base.layout.clone();
        let is_there: Vec<bool> = (0..self.devices.len()).map(|index| !self.is_cut_off(index)).collect();
        let mut visits: Vec<_> = self
            .devices
            .iter_mut()
            .zip(links)
            .zip(seeds)
            .zip(is_there)
            .filter(|(_, is_there)| *is_there)
            .map(|(((device, link), seed), _)| {
                let base = base.clone();
                Box::pin(async move {
                    let mut random = ChaCha8Rng::seed_from_u64(seed);
                    device.visit(&link, BASE, &base, &mut random).await;
                })
            })
            .collect();
        visits.shuffle(random);
        // Polled in turn until all are done: concurrent, and the same for a seed.
        std::future::poll_fn(|context| {
            visits.retain_mut(|visit| visit.as_mut().poll(context).is_pending());
            if visits.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
        drop(visits);
        self.restart_if_crashed();
    }

    /// Everything heals and comes to rest, so that what was promised can be looked up.
    pub async fn settle(&mut self) {
        self.memory.heal();
        let network = self.process().network.clone();
        network.settle().await;
        self.kill();
        self.drive();
    }

    /// Link faults that happened.
    pub fn link_faults(&self) -> Vec<Fault> {
        self.faults.injected().into_iter().map(|injected| injected.fault).collect()
    }

    /// Everything that devices ever tried to deliver in a round.
    pub fn sent(&self, round: u64) -> BTreeMap<DeviceId, Vec<(Open, Vec<u8>)>> {
        let round = commonweal_protocol::RoundId(round);
        self.devices.iter().filter_map(|device| Some((device.id, device.sent.get(&round)?.clone()))).collect()
    }
}

fn enrol(registry: &Registry, authority: &Authority, key: &SigningKey, device: DeviceId) -> Credentials {
    let token = Token(blake3::hash(&device.0).into());
    registry.invite(&token, START_MS, START_MS + 1_000).unwrap();
    let device_key = DeviceKey::generate().unwrap();
    let csr = device_key.csr().unwrap();
    let chain = registry.enroll(authority, &token, &csr, device, START_MS, START_MS + LIFE_MS).unwrap();
    let enrolled = Enrolled { device, chain, signing_key: AggregatorKey::of(key), key_number: KeyNumber(0) };
    Credentials::new(device_key, &enrolled, authority.digest()).unwrap()
}
