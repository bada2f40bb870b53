//! The shell: owns the lock, the socket, the timers and the threads, and ends them in order.
//!
//! `receive` answers on the runtime's blocking threads; `drive` has a thread of its own, so that model work never
//! delays a device. A process that is killed at any point is taken up by the next: nothing here is state. Where several
//! share the stores, each does its [`Role`], and one of those that may drive does ([`crate::lead`]).

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use commonweal_adapter::exact;
use commonweal_protocol::{CertificateChain, Csr, DeviceId, Mode, RoundId, Version};
use commonweal_runtime::Cancel;
use commonweal_traces::{Traces, TracesError};
use commonweal_transport::{Authority, Clock, IdentityError, QuicServer, ServeLimits, ServerIdentity};

use crate::admin::{Admin, Token};
use crate::config::{Config, ConfigError, Listen};
use crate::desk::{self, Desk, DeskError};
use crate::directory::{Directory, DirectoryError};
use crate::drive::{Driver, ModelStages, Stages, Step};
use crate::events::{Event, Events};
use crate::laboratory::{LaboratoryError, has_guard, open_package};
use crate::lead::Leadership;
use crate::observe::{Counts, Observer, Recent, View};
use crate::pause::PausePoint;
use crate::publish::{PublishError, Publisher};
use crate::receive::enroll::{Certify, Registry};
use crate::receive::handler::{Service, Threads as Where};
use crate::receive::partial::PartialFiles;
use crate::receive::{Parts, Receiver};
use crate::store::{Access, RealDisk, Storage, StoreError, Watch};
use crate::traces::Tracer;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Lifetime of the aggregator's own certificate, which is issued anew at every start and every day.
const SERVER_LIFE_MS: u64 = 30 * 24 * 3_600_000;
const RELOAD: Duration = Duration::from_secs(24 * 3600);
/// How often the driver looks without a hint.
const LOOK: Duration = Duration::from_secs(1);
/// How long the end waits for spans to reach their collector.
const LAST_SPANS: Duration = Duration::from_secs(5);
/// How often, at most, a process looks at what the others do.
const FOLLOW_APART: Duration = Duration::from_millis(50);

/// Why the server did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The settings, which the package does not bear.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The state directory.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The package or the model.
    #[error(transparent)]
    Laboratory(#[from] LaboratoryError),
    /// The releases.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The round's state.
    #[error(transparent)]
    Desk(#[from] DeskError),
    /// The certificates.
    #[error("the aggregator's certificate cannot be made")]
    Identity(#[from] IdentityError),
    /// There is nothing to start from.
    #[error("the state directory has no release; `aggregator init` was interrupted, run it again")]
    NoRelease,
    /// More devices than an exact merge can take of this adapter.
    #[error("round.goal (with several processes: and round.over_selection) with train.mode exact")]
    Exact(#[from] commonweal_adapter::MergeError),
    /// The package is not the one of the releases.
    #[error("package: expected base {expected}, got {got}")]
    OtherBase {
        /// The releases'.
        expected: String,
        /// The package's.
        got: String,
    },
    /// The socket.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The operator's socket.
    #[error("cannot listen on {address} for operators (admin.listen; `off` for no such port)")]
    Admin {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The thread of the stages.
    #[error("the stages ended with a panic, which the log tells; the round goes on at the next start")]
    Driver,
    /// Spans cannot be sent.
    #[error(transparent)]
    Traces(#[from] TracesError),
    /// Threads or signals.
    #[error("the system refused {what}")]
    System {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// What a process does of it all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// Receives, and drives when it has the lead.
    #[default]
    All,
    /// Answers devices; needs no model.
    Front,
    /// Drives when it has the lead; answers no device.
    Drive,
}

impl Role {
    /// Whether it answers devices.
    pub fn receives(self) -> bool {
        self != Self::Drive
    }

    /// Whether it may drive.
    pub fn drives(self) -> bool {
        self != Self::Front
    }
}

/// How to serve.
#[derive(Clone, Debug)]
pub struct Options {
    /// The state directory.
    pub dir: PathBuf,
    /// Checked settings.
    pub config: Config,
    /// What this process does.
    pub role: Role,
    /// Rounds to hold, counted from this start.
    pub rounds: Option<u64>,
    /// How long to wait, after the last round, for its devices to install the release.
    pub linger_ms: u64,
}

impl Certify for Authority {
    fn certify(
        &self,
        device: DeviceId,
        csr: &Csr,
        now_ms: u64,
        expires_ms: u64,
    ) -> Result<CertificateChain, String> {
        self.issue_device(csr, device, now_ms, expires_ms.saturating_sub(now_ms))
            .map_err(|error| crate::receive::chain(&error))
    }
}

/// Serves until a signal, or until the wanted rounds are over.
pub fn serve(options: Options, events: &Events) -> Result<(), ServeError> {
    let Options { dir, mut config, role, rounds, linger_ms } = options;
    if role != Role::All && config.storage.coordination.is_none() {
        let problem =
            "--role: front and drive need storage.coordination, which all processes of a federation share";
        return Err(ConfigError::Values(vec![problem.to_owned()]).into());
    }
    let clock = Clock::system();
    let (counts, recent) = (Arc::new(Counts::new()), Arc::new(Recent::new(clock.clone())));
    let events = &events.heard_by({
        let (counts, recent) = (counts.clone(), recent.clone());
        move |event| {
            counts.hear(event);
            recent.hear(event);
        }
    });
    // First of all: a signal to reload while the model is opened is one that came early, and no end.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|source| ServeError::System { what: "a runtime", source })?;
    let hangup = {
        let _inside = runtime.enter();
        signal(SignalKind::hangup()).map_err(|source| ServeError::System { what: "signals", source })?
    };
    let directory = Directory::open(&dir)?;
    let _lock = directory.lock()?;
    let (package, base) = open_package(&config.package)?;
    config.check_package(package.manifest().model.context, &base.layout)?;
    if config.align.enabled && !config.plain && !has_guard(&package) {
        return Err(LaboratoryError::NoGuard.into());
    }
    if config.train.mode == Mode::Exact {
        exact::check_size(&base.layout, config.updates_max())?;
    }
    let storage = Storage::of(&dir, &config.storage, Access::Exclusive)?;
    let signer = directory.signer()?;
    let publisher = Publisher::new(storage.coord.clone(), storage.blob.clone(), signer.clone(), base.hash);
    let head = publisher.head()?.ok_or(ServeError::NoRelease)?.release;
    if head.base != base.hash {
        let (expected, got) = (head.base.to_string(), base.hash.to_string());
        return Err(ServeError::OtherBase { expected, got });
    }
    let tracer = config.traces.endpoint.as_ref().map(|endpoint| {
        let traces = Traces::start(endpoint, "commonweal-aggregator")?;
        let aggregator = signer.keys().lineage().first();
        Ok::<_, TracesError>(Arc::new(Tracer::new(traces, aggregator, clock.clone())))
    });
    let tracer = tracer.transpose()?;
    let events = &match tracer.clone() {
        Some(tracer) => events.heard_by(move |event| tracer.hear(event)),
        None => events.clone(),
    };
    let cancel = Cancel::new();
    let config_for_stages = Arc::new(config.clone());
    let mut stages = ModelStages {
        package,
        base: base.clone(),
        config: config_for_stages,
        cancel: cancel.clone(),
        laboratory: None,
    };
    // A library that is missing, or a prompt that has no room, is better known now than after the first round.
    if role.drives() {
        stages.laboratory()?.check_prompts(&config)?;
    }
    if let Some(rounds) = rounds {
        let current = desk::peek(storage.coord.as_ref())?.0.round.0;
        config.round.last = Some(RoundId(current.saturating_add(rounds).saturating_sub(1)));
    }
    let policy = config.round.clone();
    let desk = Desk::open(storage.clone(), publisher.clone(), policy, events.clone(), clock.unix_ms())?;
    let partials = PartialFiles::open(&directory.partials(), Arc::new(RealDisk))
        .map_err(|source| DirectoryError::File { path: directory.partials(), source })?;
    let parts = Parts {
        config: Arc::new(config),
        storage: storage.clone(),
        partials: Arc::new(partials),
        publisher: publisher.clone(),
        desk: desk.clone(),
        base: base.hash,
        layout: base.layout.clone(),
        signer,
        clock: clock.clone(),
        events: events.clone(),
        pause: PausePoint::from_environment(),
    };
    let receiver = Arc::new(Receiver::new(parts.clone()));
    let authority = Arc::new(directory.authority()?);
    let registry = Registry::new(storage.coord.clone());
    let service = Service::new(receiver.clone(), registry, authority.clone(), Where::Blocking);
    let driver = role.drives().then(|| Driver::new(parts.clone(), base, stages));
    let shell = Shell {
        parts,
        role,
        receiver,
        authority,
        directory,
        counts,
        recent,
        cancel,
        stop: Arc::default(),
        linger_ms,
    };
    shell.run((runtime, hangup), service, driver)?;
    let version = publisher.head()?.map_or(head.version, |signed| signed.release.version);
    events.tell(&Event::Stopped { version });
    if let Some(tracer) = tracer {
        tracer.finish(LAST_SPANS);
    }
    Ok(())
}

struct Shell {
    parts: Parts,
    role: Role,
    receiver: Arc<Receiver>,
    authority: Arc<Authority>,
    directory: Directory,
    counts: Arc<Counts>,
    recent: Arc<Recent>,
    cancel: Cancel,
    stop: Arc<AtomicBool>,
    linger_ms: u64,
}

impl Shell {
    fn run(
        &self,
        (runtime, hangup): (Runtime, Signal),
        service: Service,
        driver: Option<Driver<ModelStages>>,
    ) -> Result<(), ServeError> {
        let result = runtime.block_on(self.listen(service, driver, hangup));
        // Requests that are still on a blocking thread finish their write; none is waited for longer.
        runtime.shutdown_timeout(Duration::from_secs(5));
        result
    }

    async fn listen(
        &self,
        service: Service,
        driver: Option<Driver<ModelStages>>,
        mut hangup: Signal,
    ) -> Result<(), ServeError> {
        let server = if self.role.receives() { Some(self.bind(service)?) } else { None };
        let (admin, port) = self.open_port(server.as_ref()).await?;
        let listening = Event::Listening {
            address: server.as_ref().map(|server| server.local_addr().to_string()),
            admin: admin.map(|address| address.to_string()),
            version: self.version()?,
            round: self.parts.desk.round(),
        };
        self.parts.events.tell(&listening);
        // Without a driver nobody ends by himself.
        let (finished, mut end) = tokio::sync::oneshot::channel();
        let mut threads = Threads::of(self.stop.clone());
        let mut idle = None;
        match driver {
            Some(driver) => threads.drive(driver, &self.parts, finished)?,
            None => idle = Some(finished),
        }
        if self.parts.desk.is_shared() {
            threads.follow(&self.parts, &self.receiver)?;
        }
        let mut signals = Signals::new().map_err(|source| ServeError::System { what: "signals", source })?;
        let mut reload = tokio::time::interval(RELOAD);
        reload.tick().await;
        loop {
            tokio::select! {
                () = signals.next() => break,
                ended = &mut end => {
                    // A driver that panicked has told nothing: there is no release to wait for.
                    if ended.is_ok() {
                        tokio::select! { () = self.linger() => {}, () = signals.next() => {} }
                    }
                    break;
                }
                _ = reload.tick() => self.reload(server.as_ref())?,
                _ = hangup.recv() => {
                    self.reload(server.as_ref())?;
                    let problem = self.directory.admin_token().map(|token| port.replace_token(&token));
                    let problem = problem.err().map(|error| crate::receive::chain(&error));
                    self.parts.events.tell(&Event::Reloaded { problem });
                }
            }
        }
        self.stop.store(true, Ordering::SeqCst);
        self.cancel.cancel();
        self.parts.storage.watch.notify();
        if let Some(server) = server {
            server.close().await;
        }
        port.close().await;
        drop(idle);
        // The driver ends at the next step; its stage's calls were cancelled.
        threads.join().await
    }

    fn bind(&self, service: Service) -> Result<Arc<QuicServer>, ServeError> {
        let (address, limits) = (self.parts.config.listen, ServeLimits::default());
        let server = QuicServer::bind(address, self.identity()?, service, limits, self.parts.clock.clone());
        server.map(Arc::new).map_err(|source| ServeError::Listen { address, source: source.into() })
    }

    fn identity(&self) -> Result<ServerIdentity, IdentityError> {
        self.authority.issue_server(self.parts.clock.unix_ms(), SERVER_LIFE_MS)
    }

    fn reload(&self, server: Option<&Arc<QuicServer>>) -> Result<(), ServeError> {
        server.map_or(Ok(()), |server| server.reload(self.identity()?)).map_err(ServeError::from)
    }

    /// The operator's port, if there is to be one, and where it is.
    async fn open_port(
        &self,
        server: Option<&Arc<QuicServer>>,
    ) -> Result<(Option<SocketAddr>, Port), ServeError> {
        let Listen::At(address) = self.parts.config.admin.listen else { return Ok((None, Port::default())) };
        let refused = |source: std::io::Error| ServeError::Admin { address, source };
        let listener = tokio::net::TcpListener::bind(address).await.map_err(refused)?;
        let local = listener.local_addr().map_err(refused)?;
        let connections = {
            let server = server.map(Arc::downgrade);
            Arc::new(move || {
                let server = server.as_ref().and_then(std::sync::Weak::upgrade);
                server.map_or(0, |server| server.connections())
            })
        };
        let observer = Observer::new(View {
            parts: self.parts.clone(),
            receiver: self.receiver.clone(),
            counts: self.counts.clone(),
            recent: self.recent.clone(),
            connections,
            stopping: self.stop.clone(),
            directory: self.directory.path().to_owned(),
        });
        let token = Token::new(&self.directory.admin_token()?);
        let admin = Admin {
            observer: Arc::new(observer),
            token: token.clone(),
            metrics_token: self.parts.config.admin.metrics_token,
        };
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let serving = tokio::spawn(admin.serve(listener, async { drop(stopped.await) }));
        Ok((Some(local), Port { open: Some((stop, serving)), token: Some(token) }))
    }

    fn version(&self) -> Result<Version, ServeError> {
        Ok(self.parts.publisher.head()?.map(|signed| signed.release.version).unwrap_or_default())
    }

    /// Until every device that was seen has the release, or the time is over.
    async fn linger(&self) {
        let end_ms = self.parts.clock.unix_ms().saturating_add(self.linger_ms);
        while self.parts.clock.unix_ms() < end_ms {
            let Ok(version) = self.version() else { return };
            if self.receiver.installed().values().all(|installed| *installed == version) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

/// The operator's port, as long as it is open.
#[derive(Default)]
struct Port {
    open: Option<(tokio::sync::oneshot::Sender<()>, tokio::task::JoinHandle<()>)>,
    token: Option<Token>,
}

impl Port {
    fn replace_token(&self, token: &str) {
        if let Some(held) = &self.token {
            held.replace(token);
        }
    }

    /// Ends what is under way.
    async fn close(self) {
        let Some((stop, serving)) = self.open else { return };
        drop(stop);
        if serving.await.is_err() {
            tracing::error!("the admin port ended with a panic");
        }
    }
}

/// The threads beside the runtime's, and how they end.
struct Threads {
    stop: Arc<AtomicBool>,
    running: Vec<std::thread::JoinHandle<()>>,
    /// Keeps the lead, and is told to stop when the others have: what they end with is still this process's to do.
    lead: Option<(Arc<AtomicBool>, std::thread::JoinHandle<()>)>,
}

impl Threads {
    fn of(stop: Arc<AtomicBool>) -> Self {
        Self { stop, running: Vec::new(), lead: None }
    }

    fn start(
        &mut self,
        name: &str,
        work: impl FnOnce(&AtomicBool) + Send + 'static,
    ) -> Result<(), ServeError> {
        self.running.push(spawn(name, self.stop.clone(), work)?);
        Ok(())
    }

    fn keep(&mut self, lead: Arc<Leadership>) -> Result<(), ServeError> {
        let stop = Arc::new(AtomicBool::new(false));
        self.lead = Some((stop.clone(), spawn("lead", stop, move |stop| lead.keep(stop))?));
        Ok(())
    }

    /// The stages, and the lead that they need.
    fn drive(
        &mut self,
        driver: Driver<ModelStages>,
        parts: &Parts,
        finished: tokio::sync::oneshot::Sender<()>,
    ) -> Result<(), ServeError> {
        let lead = driver.lead();
        if lead.is_shared() {
            self.keep(lead)?;
        }
        let (watch, clock) = (parts.storage.watch.clone(), parts.clock.clone());
        self.start("drive", move |stop| {
            drive(driver, watch.as_ref(), &clock, stop);
            if finished.send(()).is_err() {
                tracing::debug!("ended by a signal");
            }
        })
    }

    /// What others do, and what no device comes back for after it.
    fn follow(&mut self, parts: &Parts, receiver: &Arc<Receiver>) -> Result<(), ServeError> {
        let (receiver, watch) = (receiver.clone(), parts.storage.watch.clone());
        self.start("follow", move |stop| follow(&receiver, watch.as_ref(), stop))
    }

    /// Waits for all of them.
    async fn join(self) -> Result<(), ServeError> {
        let mut ended = Ok(());
        for thread in self.running {
            thread.thread().unpark();
            ended = ended.and(join(thread).await);
        }
        if let Some((stop, thread)) = self.lead {
            stop.store(true, Ordering::SeqCst);
            thread.thread().unpark();
            ended = ended.and(join(thread).await);
        }
        ended
    }
}

fn spawn(
    name: &str,
    stop: Arc<AtomicBool>,
    work: impl FnOnce(&AtomicBool) + Send + 'static,
) -> Result<std::thread::JoinHandle<()>, ServeError> {
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || work(&stop));
    thread.map_err(|source| ServeError::System { what: "a thread", source })
}

/// The end of a thread.
async fn join(thread: std::thread::JoinHandle<()>) -> Result<(), ServeError> {
    match tokio::task::spawn_blocking(move || thread.join()).await {
        Ok(Ok(())) => Ok(()),
        _ => Err(ServeError::Driver),
    }
}

/// Looks at what other processes do until somebody says stop and wakes the watch.
pub fn follow(receiver: &Receiver, watch: &dyn Watch, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        let mark = watch.mark();
        if let Err(error) = receiver.follow() {
            tracing::warn!(error = crate::receive::chain(&error), "the round's state cannot be read");
        }
        watch.wait(mark, LOOK);
        // Hints come by the dozen while devices come.
        std::thread::sleep(FOLLOW_APART);
    }
}

/// Carries out stages until the last wanted round is over or somebody says stop and wakes the watch.
pub fn drive<S: Stages>(mut driver: Driver<S>, watch: &dyn Watch, clock: &Clock, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        let mark = watch.mark();
        match driver.step() {
            Step::Worked => {}
            Step::Stop => return,
            Step::Wait(at_ms) => {
                let until = at_ms.map_or(LOOK, |at_ms| {
                    Duration::from_millis(at_ms.saturating_sub(clock.unix_ms())).min(LOOK)
                });
                watch.wait(mark, until);
            }
        }
    }
}

/// The signals that end a server.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! { _ = self.terminate.recv() => {}, _ = self.interrupt.recv() => {} }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStorage;

    #[tokio::test]
    async fn a_driver_that_panics_is_no_success() {
        join(std::thread::spawn(|| {})).await.unwrap();
        let panicked = std::thread::spawn(|| panic!("a stage's bug"));
        assert!(matches!(join(panicked).await, Err(ServeError::Driver)));
    }

    #[tokio::test]
    async fn the_lead_is_given_up_after_the_last_stage_ended() {
        let memory = MemoryStorage::default().shared();
        let store = memory.storage().lead;
        let lease = Duration::from_secs(3600);
        let lead = Arc::new(Leadership::new(store.clone(), lease));
        lead.prolong().unwrap();
        let mut threads = Threads::of(Arc::default());
        threads.keep(lead).unwrap();
        let other = store.clone();
        let (say, was_held) = std::sync::mpsc::channel();
        threads
            .start("drive", move |stop| {
                while !stop.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                // A stage that goes on for a while after the signal.
                std::thread::sleep(Duration::from_millis(200));
                say.send(!other.lead("other", lease).unwrap()).unwrap();
            })
            .unwrap();
        threads.stop.store(true, Ordering::SeqCst);
        threads.join().await.unwrap();
        assert!(was_held.recv().unwrap(), "another could drive while a stage went on");
        assert!(store.lead("other", lease).unwrap(), "nobody has to wait for it");
    }
}
