//! An aggregator without a model: store, receiver, desk, merge, publisher and QUIC are the real ones, on real files; the
//! two stages that need a model do nothing. `round-bench`, `load` and `torture` serve it, where thousands of rounds and
//! starts are the matter and not what an adapter says.

use std::{
    fs,
    io::Read as _,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use aggregator::{
    config::{self, Config, Gates},
    desk::{Desk, Record},
    directory::Directory,
    drive::{Driver, Stages},
    events::{AlignFigures, EvaluateFigures, Events},
    laboratory::{Base, LaboratoryError},
    optimize::OptimizerState,
    pause::PausePoint,
    publish::{Candidate, Publisher},
    receive::{
        Parts, Receiver,
        enroll::Registry,
        handler::{Service, Threads},
        partial::PartialFiles,
    },
    round::Policy,
    serve::{self, Role},
    store::{Access, RealDisk, Storage},
};
use anyhow::{Context, Result};
use commonweal_adapter::Adapter;
use commonweal_protocol::{Digest, Invitation, ReportCard, RoundId, Token};
use commonweal_transport::{Authority, Clock, Handler, QuicServer, ServeLimits};
use rand::RngCore as _;

use crate::visitor::{self, BASE};

const DAY_MS: u64 = 24 * 3_600_000;

/// The two stages that need a model, which there is not.
#[derive(Debug)]
struct NoModel;

impl Stages for NoModel {
    fn align(&mut self, _: RoundId, candidate: Adapter) -> Result<(Adapter, AlignFigures), LaboratoryError> {
        Ok((candidate, AlignFigures::default()))
    }

    fn evaluate(&mut self, _: RoundId, _: &Adapter) -> Result<EvaluateFigures, LaboratoryError> {
        Ok(EvaluateFigures::default())
    }
}

/// The defaults but for the round's, and for what needs a model.
pub fn config(round: Policy) -> Config {
    let mut config = Config { round, ..Config::default() };
    config.align.enabled = false;
    config.evaluate.gates = Gates::off();
    config
}

/// Beside an aggregator's directory: where its state is, if it is not in there.
const STORAGE: &str = "storage.json";

/// Has the aggregators whose directories lie in `place` share a database, and a folder for objects.
///
/// # Errors
/// The file cannot be written.
pub fn share(place: &Path, storage: config::Storage) -> Result<()> {
    let objects = Some(format!("file://{}", place.join("objects").display()));
    // Nothing is decided for so long after who drove was killed.
    let storage = config::Storage { objects, lead_seconds: 2, ..storage };
    fs::create_dir_all(place)?;
    Ok(fs::write(place.join(STORAGE), serde_json::to_vec(&storage)?)?)
}

/// An aggregator's directory, open.
#[derive(Debug)]
pub struct Modelless {
    parts: Parts,
    base: Base,
    directory: Directory,
    authority: Arc<Authority>,
    registry: Registry,
}

impl Modelless {
    /// Opens the aggregator in a directory, with an adapter of so many MB (see [`visitor::layout`]); a fresh one begins with
    /// the first adapter as its first release. `events` goes to the caller, who may measure by it.
    pub fn open(path: &Path, adapter_mb: u32, mut config: Config, events: Events) -> Result<Self> {
        if let Ok(storage) = fs::read(path.with_file_name(STORAGE)) {
            config.storage = serde_json::from_slice(&storage)?;
        }
        let (base, clock) = (Base { hash: BASE, layout: visitor::layout(adapter_mb)? }, Clock::system());
        let is_new = Directory::open(path).is_err();
        let directory =
            if is_new { Directory::create(path, clock.unix_ms())? } else { Directory::open(path)? };
        let storage = Storage::of(path, &config.storage, Access::Exclusive)?;
        let signer = directory.signer()?;
        let publisher =
            Publisher::new(storage.coord.clone(), storage.blob.clone(), signer.clone(), base.hash);
        if !Publisher::is_any(storage.coord.as_ref())? {
            first_release(&storage, &publisher, &base, &clock)?;
        }
        if is_new {
            directory
                .write_config("# The program that serves this directory sets everything by itself.\n")?;
        }
        let (policy, now_ms) = (config.round.clone(), clock.unix_ms());
        let desk = Desk::open(storage.clone(), publisher.clone(), policy, events.clone(), now_ms)?;
        let partials = PartialFiles::open(&directory.partials(), Arc::new(RealDisk)).context("partials")?;
        let authority = Arc::new(directory.authority()?);
        let registry = Registry::new(storage.coord.clone());
        let parts = Parts {
            config: Arc::new(config),
            storage,
            partials: Arc::new(partials),
            publisher,
            desk,
            base: base.hash,
            layout: base.layout.clone(),
            signer,
            clock,
            events,
            pause: PausePoint::default(),
        };
        Ok(Self { parts, base, directory, authority, registry })
    }

    /// Makes another directory of the same federation: its keys.
    pub fn copy_keys(from: &Path, to: &Path) -> Result<()> {
        fs::create_dir_all(to)?;
        Ok(Directory::open(from)?.copy_to(to)?)
    }

    /// What answers devices, for whoever looks at it while it serves.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// Invitations of as many devices to an aggregator at an address.
    pub fn invite(&self, devices: u32, address: SocketAddr) -> Result<Vec<String>> {
        let now_ms = self.parts.clock.unix_ms();
        let invite = |_| {
            let mut token = Token([0; 32]);
            rand::rng().fill_bytes(&mut token.0);
            self.registry.invite(&token, now_ms, now_ms + DAY_MS)?;
            let (host, port) = (address.ip().to_string().parse()?, address.port());
            Ok(Invitation { host, port, token, authority: self.authority.digest() }.to_string())
        };
        (0..devices).map(invite).collect()
    }

    /// What answers devices.
    pub fn service(&self) -> Service {
        self.service_of(Arc::new(Receiver::new(self.parts.clone())))
    }

    fn service_of(&self, receiver: Arc<Receiver>) -> Service {
        Service::new(receiver, self.registry.clone(), self.authority.clone(), Threads::Blocking)
    }

    /// Lets `handler` answer at a port of the loopback, 0 for any, under this aggregator's certificate. To be called inside
    /// of a runtime.
    pub fn bind<H: Handler>(&self, port: u16, handler: H, limits: ServeLimits) -> Result<QuicServer> {
        let identity = self.authority.issue_server(self.parts.clock.unix_ms(), DAY_MS)?;
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Ok(QuicServer::bind(listen, identity, handler, limits, self.parts.clock.clone())?)
    }

    /// Serves at a port of the loopback, 0 for any. `listening` is told the address; the end of the standard input ends
    /// it, so that it never outlives the program that started it.
    pub fn serve(
        self,
        port: u16,
        limits: ServeLimits,
        listening: impl FnOnce(&Self, SocketAddr) -> Result<()>,
    ) -> Result<()> {
        self.serve_as(Role::All, port, limits, listening)
    }

    /// The same, as one of several processes over one database. One that only drives listens too, and nobody comes.
    pub fn serve_as(
        self,
        role: Role,
        port: u16,
        limits: ServeLimits,
        listening: impl FnOnce(&Self, SocketAddr) -> Result<()>,
    ) -> Result<()> {
        let clock = &self.parts.clock;
        let receiver = Arc::new(Receiver::new(self.parts.clone()));
        let driver = role.drives().then(|| Driver::new(self.parts.clone(), self.base.clone(), NoModel));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let _inside = runtime.enter();
        let server = self.bind(port, self.service_of(receiver.clone()), limits)?;
        listening(&self, server.local_addr())?;
        let (stop, watch) = (AtomicBool::new(false), self.parts.storage.watch.as_ref());
        let has_driven = AtomicBool::new(false);
        thread::scope(|scope| {
            if let Some(driver) = driver {
                let (lead, stop_keeping) = (driver.lead(), &has_driven);
                let kept = lead.is_shared().then(|| scope.spawn(move || lead.keep(stop_keeping)));
                let stop = &stop;
                scope.spawn(move || {
                    // Also where a stage panics: nobody else would drive while this one keeps the lead.
                    let drive = || serve::drive(driver, watch, clock, stop);
                    let driven = std::panic::catch_unwind(std::panic::AssertUnwindSafe(drive));
                    stop_keeping.store(true, Ordering::SeqCst);
                    if let Some(kept) = kept {
                        kept.thread().unpark();
                    }
                    if let Err(panicked) = driven {
                        std::panic::resume_unwind(panicked);
                    }
                });
            }
            if self.parts.desk.is_shared() {
                scope.spawn(|| serve::follow(&receiver, watch, &stop));
            }
            let ended = std::io::stdin().read_to_end(&mut Vec::new());
            stop.store(true, Ordering::SeqCst);
            watch.notify();
            ended
        })?;
        runtime.block_on(server.close());
        Ok(())
    }

    /// The directory.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }
}

/// A fresh aggregator's first release, as `aggregator init` and `serve` make it.
fn first_release(storage: &Storage, publisher: &Publisher, base: &Base, clock: &Clock) -> Result<()> {
    let bytes = base.write(&Adapter::init(base.layout.clone(), 0))?;
    let digest = Digest::of(&bytes);
    storage.blob.put_if_absent(&digest, bytes.len() as u64, &mut bytes.as_slice())?;
    let card = ReportCard::default();
    Record::of_base(&card, clock.unix_ms()).append(storage.coord.as_ref())?;
    let state = OptimizerState::default();
    publisher.publish(Candidate { round: None, parent: None, digest, state, card }, clock.unix_ms())?;
    Ok(())
}
