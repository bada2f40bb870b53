//! One federation in this process, through the code that runs apart in the field: the aggregator's receiver, desk, driver
//! and stages over its store on disk, the devices' pipeline over theirs, and between them the in-memory link or QUIC.
//!
//! Only the processes and the clock are not real: the clock stands still while devices work, so that no deadline depends
//! on the machine's speed. After a kill everything goes on from the two sides' own directories.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use aggregator::{
    align,
    config::Config,
    desk::{self, Desk, Record},
    directory::Directory,
    drive::{Driver, Stages, Step},
    evaluate,
    events::{AlignFigures, EvaluateFigures, Events},
    laboratory::{Base, Laboratory, LaboratoryError},
    optimize::OptimizerState,
    pause::PausePoint,
    publish::{Candidate, Publisher},
    receive::{
        Parts, Receiver,
        enroll::Registry,
        handler::{Service, Threads},
        partial::PartialFiles,
    },
    store::{Access, RealDisk, Storage},
};
use anyhow::{Context, Result, bail};
use commonweal_adapter::{Adapter, AdapterKind};
use commonweal_protocol::{
    AggregatorKey, CertificateChain, Content, Csr, DeviceId, Digest, Enrolled, KeyNumber, Lineage, Open,
    Poll, PollReply, ReportCard, RoundId, Token, bounds,
};
use commonweal_safety::{Guard, Reviser};
use commonweal_transport::{
    Authority, Clock, Credentials, DeviceKey, FaultRates, Faults, Link, LinkError, LinkLimits, QuicLink,
    QuicServer, ServeLimits, SimLink, SimNetwork, Uploaded,
};
use edge_client::{
    events::Output,
    install::Expected,
    kept,
    pipeline::{Device, Outcome, base_of},
    rows::Parsed,
    store::Store,
    trust::Trust,
};
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use tokio::runtime::Runtime;

use crate::{arms::Arm, clients::Client, hostile};

const START_MS: u64 = 1_700_000_000_000;
const ROUND_MS: u64 = 3_600_000;
const LIFE_MS: u64 = 3650 * 24 * 3_600_000;
/// Visits of a device in a round: the first may find it not yet open.
const VISITS_MAX: usize = 3;
const CREDENTIALS: &str = "identity/credentials.pem";

/// What carries the messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Carrier {
    /// The in-memory twin, without faults.
    Memory,
    /// Real sockets on the loopback, mutual TLS.
    Quic,
}

/// The model and what belongs to it, opened once for all federations of a package.
pub(crate) struct Workshop {
    pub(crate) base: Base,
    pub(crate) laboratory: Laboratory,
    /// The base under the operator's gates.
    pub(crate) card: ReportCard,
}

/// The aggregator's two model stages over a shared workshop.
struct Operator {
    workshop: Arc<Workshop>,
    config: Arc<Config>,
}

impl Stages for Operator {
    fn align(&mut self, round: RoundId, merged: Adapter) -> Result<(Adapter, AlignFigures), LaboratoryError> {
        let trainable = self.config.train.trainable(round);
        align::align(&self.workshop.laboratory, &self.config.align, trainable, round, merged)
    }

    fn evaluate(&mut self, _: RoundId, candidate: &Adapter) -> Result<EvaluateFigures, LaboratoryError> {
        evaluate::measure(&self.workshop.laboratory, &self.config.evaluate, candidate, &|_| ())
    }
}

/// One device's way to the aggregator.
enum Road {
    Memory(Box<SimLink<Service>>),
    Quic(Box<QuicLink>),
}

impl Link for Road {
    async fn poll(&self, poll: Poll) -> Result<PollReply, LinkError> {
        match self {
            Self::Memory(link) => link.poll(poll).await,
            Self::Quic(link) => link.poll(poll).await,
        }
    }

    async fn upload(&self, open: &Open, payload: &[u8]) -> Result<Uploaded, LinkError> {
        match self {
            Self::Memory(link) => link.upload(open, payload).await,
            Self::Quic(link) => link.upload(open, payload).await,
        }
    }

    async fn fetch(&self, content: Content, partial: &mut Vec<u8>) -> Result<(), LinkError> {
        match self {
            Self::Memory(link) => link.fetch(content, partial).await,
            Self::Quic(link) => link.fetch(content, partial).await,
        }
    }

    async fn renew(&self, csr: Csr) -> Result<CertificateChain, LinkError> {
        match self {
            Self::Memory(link) => link.renew(csr).await,
            Self::Quic(link) => link.renew(csr).await,
        }
    }
}

/// The aggregator's end of the link.
enum Server {
    Memory(Arc<SimNetwork<Service>>),
    Quic(QuicServer),
}

impl Server {
    fn road(&self, credentials: Credentials, clock: &Clock) -> Result<Road> {
        let limits = LinkLimits::default();
        Ok(match self {
            Self::Memory(network) => {
                Road::Memory(Box::new(SimLink::over(network.device(credentials)?, limits)))
            }
            Self::Quic(server) => {
                let port = server.local_addr().port();
                let link = QuicLink::new("127.0.0.1", port, credentials, limits, clock.clone())?;
                Road::Quic(Box::new(link))
            }
        })
    }
}

/// What a federation is, beside its clients.
pub(crate) struct Plan<'p> {
    pub(crate) arm: &'p Arm,
    pub(crate) seed: u64,
    /// Settings of every arm; this arm's come over it.
    pub(crate) common: &'p Config,
    pub(crate) rounds: u64,
    /// Factor on a hostile device's update.
    pub(crate) boost: f32,
    pub(crate) carrier: Carrier,
}

/// A federation that runs.
pub(crate) struct Federation<'p> {
    plan: &'p Plan<'p>,
    workshop: Arc<Workshop>,
    clock: Clock,
    storage: Storage,
    publisher: Publisher,
    desk: Arc<Desk>,
    driver: Driver<Operator>,
    device: Device<Road>,
    members: Vec<Member>,
    // After whatever runs on it.
    server: Server,
    runtime: Runtime,
}

/// A client's own part of a device; model, guard and reviser are shared, since one works at a time.
struct Member {
    id: DeviceId,
    store: Option<Store>,
    credentials: Credentials,
    is_hostile: bool,
}

impl<'p> Federation<'p> {
    /// Begins in `directory`, or goes on there.
    pub(crate) fn open(
        plan: &'p Plan<'p>,
        workshop: &Arc<Workshop>,
        clients: &[Client],
        directory: &Path,
    ) -> Result<Self> {
        let config = plan.arm.config(plan.common);
        config.check()?;
        let config = Arc::new(config);
        let clock = Clock::manual(START_MS);
        let state = directory.join("aggregator");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let place = match Directory::open(&state) {
            Ok(place) => place,
            Err(_) => begin(&state, workshop, &config, plan.seed)?,
        };
        let storage = Storage::open(&state, Access::Exclusive)?;
        let signer = place.signer()?;
        let key = signer.keys().lineage().key();
        let base = &workshop.base;
        let publisher =
            Publisher::new(storage.coord.clone(), storage.blob.clone(), signer.clone(), base.hash);
        let round = desk::peek(storage.coord.as_ref())?.0.round;
        clock.set(START_MS + round.0 * ROUND_MS);
        let events = Events::to(|event| tracing::debug!("{}", event.sentence()));
        let policy = config.round.clone();
        let desk = Desk::open(storage.clone(), publisher.clone(), policy, events.clone(), clock.unix_ms())?;
        let parts = Parts {
            config: config.clone(),
            storage: storage.clone(),
            partials: Arc::new(PartialFiles::open(&place.partials(), Arc::new(RealDisk))?),
            publisher: publisher.clone(),
            desk: desk.clone(),
            base: base.hash,
            layout: base.layout.clone(),
            signer,
            clock: clock.clone(),
            events,
            pause: PausePoint::default(),
        };
        let authority = Arc::new(place.authority()?);
        let registry = Registry::new(storage.coord.clone());
        let mut members = Vec::new();
        for (number, client) in clients.iter().enumerate() {
            let folder = directory.join(format!("device-{number}"));
            let id = device_id(plan.seed, number);
            members.push(Member::open(&folder, id, client, &registry, &authority, key)?);
        }
        let receiver = Arc::new(Receiver::new(parts.clone()));
        let service = Service::new(receiver, registry, authority.clone(), Threads::Blocking);
        let identity = authority.issue_server(START_MS, LIFE_MS)?;
        let limits = ServeLimits::default();
        let server = {
            let _inside = runtime.enter();
            match plan.carrier {
                Carrier::Memory => {
                    let faults = Faults::seeded(0, FaultRates::default(), 0);
                    Server::Memory(SimNetwork::new(service, identity, clock.clone(), &limits, faults)?)
                }
                Carrier::Quic => {
                    let address = ([127, 0, 0, 1], 0).into();
                    Server::Quic(QuicServer::bind(address, identity, service, limits, clock.clone())?)
                }
            }
        };
        let stages = Operator { workshop: workshop.clone(), config: config.clone() };
        let driver = Driver::new(parts, base.clone(), stages);
        let device = device(plan, workshop, &mut members, &server, &clock, key, &runtime)?;
        let workshop = workshop.clone();
        Ok(Self { plan, workshop, clock, storage, publisher, desk, driver, device, members, server, runtime })
    }

    /// Holds the rounds that are left; `told` hears of each with its record and the seconds of its devices.
    pub(crate) fn run(&mut self, mut told: impl FnMut(&Record, f64) -> Result<()>) -> Result<()> {
        self.drive(None)?;
        loop {
            let round = self.desk.round();
            if round.0 > self.plan.rounds {
                return Ok(());
            }
            self.clock.set(START_MS + round.0 * ROUND_MS);
            let begun = Instant::now();
            self.devices(round)?;
            let device_seconds = begun.elapsed().as_secs_f64();
            self.drive(Some(round))?;
            let records = desk::records(self.storage.coord.as_ref(), round, 1)?;
            told(records.first().with_context(|| format!("round {round}: no record"))?, device_seconds)?;
        }
    }

    /// The aggregator's records of all rounds.
    pub(crate) fn records(&self) -> Result<Vec<Record>> {
        Ok(desk::records(self.storage.coord.as_ref(), RoundId(1), usize::MAX >> 1)?)
    }

    /// Values of an update.
    pub(crate) fn trained_values(&self) -> usize {
        let trainable = self.plan.arm.config(self.plan.common).train.trainable(RoundId(1));
        self.workshop.base.layout.trainable_parameters(trainable)
    }

    /// The release in force.
    pub(crate) fn head(&self) -> Result<(Digest, Adapter)> {
        let head = self.publisher.head()?.context("no release")?.release;
        let bytes = self.storage.blob.read_all(&head.digest, bounds::CONTENT_BYTES_MAX)?;
        Ok((head.digest, self.workshop.base.read("release", &bytes, AdapterKind::Assistant)?))
    }

    /// The round's clients, drawn by the seed, visit until each has delivered or has given up.
    fn devices(&mut self, round: RoundId) -> Result<()> {
        let goal = self.plan.common.round.goal as usize;
        let mut chosen = choose(self.members.len(), goal, self.plan.seed, round);
        for _ in 0..VISITS_MAX {
            let mut waiting = Vec::new();
            for &number in &chosen {
                match self.visit(number)? {
                    Outcome::Idle => waiting.push(number),
                    outcome => tracing::debug!(%round, number, ?outcome, "visited"),
                }
            }
            chosen = waiting;
        }
        Ok(())
    }

    fn visit(&mut self, number: usize) -> Result<Outcome> {
        let member = &mut self.members[number];
        let road = {
            let _inside = self.runtime.enter();
            self.server.road(member.credentials.clone(), &self.clock)?
        };
        // The one device becomes this member; its store goes back afterwards.
        let store = member.store.take().context("a device is at work already")?;
        let before = std::mem::replace(&mut self.device.store, store);
        (self.device.id, self.device.link) = (member.id, road);
        let outcome = if member.is_hostile {
            hostile::visit(&self.device, self.plan.boost)
        } else {
            self.device.visit().map(|visit| visit.outcome).map_err(anyhow::Error::from)
        };
        member.store = Some(std::mem::replace(&mut self.device.store, before));
        outcome.with_context(|| format!("device {number}"))
    }

    /// Lets the aggregator work until it waits for devices; a round that lacks some is closed by its deadline.
    fn drive(&mut self, round: Option<RoundId>) -> Result<()> {
        loop {
            match self.driver.step() {
                Step::Worked => {}
                Step::Stop => return Ok(()),
                Step::Wait(at_ms) => match (round, at_ms) {
                    (Some(round), Some(at_ms)) if self.desk.round() == round => {
                        if !self.clock.set(at_ms.max(self.clock.unix_ms() + 1)) || at_ms > ends_ms(round) {
                            bail!("round {round} does not end");
                        }
                    }
                    (Some(round), None) if self.desk.round() == round => bail!("round {round} did not open"),
                    _ => return Ok(()),
                },
            }
        }
    }
}

/// The clients of a round.
fn choose(count: usize, goal: usize, seed: u64, round: RoundId) -> Vec<usize> {
    let mut chosen: Vec<usize> = (0..count).collect();
    let mut random = ChaCha8Rng::seed_from_u64(seed << 32 | round.0);
    chosen.shuffle(&mut random);
    chosen.truncate(goal);
    chosen
}

/// In how many of the rounds each client takes part.
pub(crate) fn turns(count: usize, goal: usize, seed: u64, rounds: u64) -> Vec<u32> {
    let mut turns = vec![0; count];
    for round in 1..=rounds {
        for number in choose(count, goal, seed, RoundId(round)) {
            turns[number] += 1;
        }
    }
    turns
}

fn ends_ms(round: RoundId) -> u64 {
    START_MS + (round.0 + 1) * ROUND_MS
}

/// As `aggregator init`: the first release is the untrained adapter.
fn begin(state: &Path, workshop: &Workshop, config: &Config, seed: u64) -> Result<Directory> {
    let directory = Directory::create(state, START_MS)?;
    let storage = Storage::open(state, Access::Exclusive)?;
    let base = &workshop.base;
    let bytes = base.write(&Adapter::init(base.layout.clone(), seed))?;
    let digest = Digest::of(&bytes);
    storage.blob.put_if_absent(&digest, bytes.len() as u64, &mut bytes.as_slice())?;
    let signer = directory.signer()?;
    let publisher = Publisher::new(storage.coord.clone(), storage.blob.clone(), signer, base.hash);
    let card = workshop.card.clone();
    Record::of_base(&card, START_MS).append(storage.coord.as_ref())?;
    publisher.publish(
        Candidate { round: None, parent: None, digest, state: OptimizerState::default(), card },
        START_MS,
    )?;
    directory.write_config(&toml::to_string(config)?)?;
    Ok(directory)
}

impl Member {
    /// Enrolls the client, or reads what an earlier process enrolled, and stores its samples.
    fn open(
        folder: &Path,
        id: DeviceId,
        client: &Client,
        registry: &Registry,
        authority: &Authority,
        key: AggregatorKey,
    ) -> Result<Self> {
        let store = Store::open(folder)?;
        let credentials = if let Some(pem) = store.read(CREDENTIALS)? {
            Credentials::from_pem(&String::from_utf8(pem)?)?
        } else {
            let token = Token(blake3::hash(folder.to_string_lossy().as_bytes()).into());
            registry.invite(&token, START_MS, START_MS + LIFE_MS)?;
            let device_key = DeviceKey::generate()?;
            let csr = device_key.csr()?;
            let chain = registry.enroll(authority, &token, &csr, id, START_MS, START_MS + LIFE_MS)?;
            let enrolled = Enrolled { device: id, chain, signing_key: key, key_number: KeyNumber(0) };
            let credentials = Credentials::new(device_key, &enrolled, authority.digest())?;
            let good = client.samples.iter().cloned().enumerate().collect();
            kept::keep(&store, &Parsed { good, bad: Vec::new() }, "paper", 0)?;
            store.write(CREDENTIALS, credentials.to_pem().as_bytes())?;
            credentials
        };
        Ok(Self { id, store: Some(store), credentials, is_hostile: client.is_hostile })
    }
}

/// The device that becomes each member in turn.
fn device(
    plan: &Plan<'_>,
    workshop: &Workshop,
    members: &mut [Member],
    server: &Server,
    clock: &Clock,
    key: AggregatorKey,
    runtime: &Runtime,
) -> Result<Device<Road>> {
    let Laboratory { model, cancel, .. } = &workshop.laboratory;
    let policy = plan.arm.policy();
    let guard = Guard::from_package(model, cancel)?;
    let mut thresholds = guard.config().clone();
    policy.set_thresholds(&mut thresholds)?;
    let guard = guard.with_thresholds(thresholds)?;
    let _inside = runtime.enter();
    let first = members.first().context("no client")?;
    let scratch = first.store.as_ref().context("no store")?.path("../nobody");
    Ok(Device {
        id: first.id,
        store: Store::open(&scratch)?,
        policy,
        guard,
        reviser: Reviser::from_package(model)?,
        link: server.road(first.credentials.clone(), clock)?,
        expected: Expected {
            trust: Trust::new(first.id, Lineage::new(KeyNumber(0), key)),
            base: base_of(model),
            layout: model.layout().clone(),
        },
        model: model.clone(),
        output: Output::Json,
        runtime: runtime.handle().clone(),
        cancel: cancel.clone(),
        tracer: None,
    })
}

/// The same device for the same seed: a merge adds up in the order of the names.
fn device_id(seed: u64, number: usize) -> DeviceId {
    let mut id = [0; 16];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(&(number as u64).to_le_bytes()).finalize_xof().fill(&mut id);
    DeviceId(id)
}

/// Sums over rounds.
pub(crate) fn sum<'r>(records: impl Iterator<Item = &'r BTreeMap<String, u64>>) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    for one in records {
        for (name, value) in one {
            *sums.entry(name.clone()).or_default() += value;
        }
    }
    sums
}

/// A federation's folder under `out`.
pub(crate) fn folder(out: &Path, arm: &Arm, seed: u64) -> PathBuf {
    let plain: String = arm
        .name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .collect();
    out.join("federations").join(format!("{plain}-{seed}"))
}
