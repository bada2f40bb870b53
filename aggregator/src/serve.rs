//! The shell: owns the lock, the socket, the timers and the threads, and ends them in order.
//!
//! `receive` answers on the runtime's blocking threads; `drive` has a thread of its own, so that model work never
//! delays a device. A process that is killed at any point is taken up by the next: nothing here is state.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use commonweal_adapter::exact;
use commonweal_protocol::{CertificateChain, Csr, DeviceId, Mode, RoundId, Version};
use commonweal_runtime::Cancel;
use commonweal_transport::{Authority, Clock, IdentityError, QuicServer, ServeLimits};

use crate::admin::{Admin, Token};
use crate::config::{Config, ConfigError, Listen};
use crate::desk::{self, Desk, DeskError};
use crate::directory::{Directory, DirectoryError};
use crate::drive::{Driver, ModelStages, Stages, Step};
use crate::events::{Event, Events};
use crate::laboratory::{LaboratoryError, has_guard, open_package};
use crate::observe::{Counts, Observer, Recent, View};
use crate::pause::PausePoint;
use crate::publish::{PublishError, Publisher};
use crate::receive::enroll::{Certify, Registry};
use crate::receive::handler::{Service, Threads};
use crate::receive::partial::PartialFiles;
use crate::receive::{Parts, Receiver};
use crate::store::{Access, RealDisk, Storage, StoreError, Watch};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Lifetime of the aggregator's own certificate, which is issued anew at every start and every day.
const SERVER_LIFE_MS: u64 = 30 * 24 * 3_600_000;
const RELOAD: Duration = Duration::from_secs(24 * 3600);
/// How often the driver looks without a hint.
const LOOK: Duration = Duration::from_secs(1);

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
    #[error("round.goal with train.mode exact")]
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

/// How to serve.
#[derive(Clone, Debug)]
pub struct Options {
    /// The state directory.
    pub dir: PathBuf,
    /// Checked settings.
    pub config: Config,
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
    let Options { dir, mut config, rounds, linger_ms } = options;
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
        exact::check_size(&base.layout, config.round.goal as usize)?;
    }
    let storage = Storage::open(&dir, Access::Exclusive)?;
    let signer = directory.signer()?;
    let publisher = Publisher::new(storage.coord.clone(), storage.blob.clone(), signer.clone(), base.hash);
    let head = publisher.head()?.ok_or(ServeError::NoRelease)?.release;
    if head.base != base.hash {
        let (expected, got) = (head.base.to_string(), base.hash.to_string());
        return Err(ServeError::OtherBase { expected, got });
    }
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
    stages.laboratory()?.check_prompts(&config)?;
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
    let service = Service::new(receiver.clone(), registry, authority.clone(), Threads::Blocking);
    let shell = Shell {
        parts,
        receiver,
        authority,
        directory,
        counts,
        recent,
        cancel,
        stop: Arc::default(),
        linger_ms,
    };
    shell.run((runtime, hangup), service, Driver::new(shell.parts.clone(), base, stages))?;
    let version = publisher.head()?.map_or(head.version, |signed| signed.release.version);
    events.tell(&Event::Stopped { version });
    Ok(())
}

struct Shell {
    parts: Parts,
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
        driver: Driver<ModelStages>,
    ) -> Result<(), ServeError> {
        let result = runtime.block_on(self.listen(service, driver, hangup));
        // Requests that are still on a blocking thread finish their write; none is waited for longer.
        runtime.shutdown_timeout(Duration::from_secs(5));
        result
    }

    async fn listen(
        &self,
        service: Service,
        driver: Driver<ModelStages>,
        mut hangup: Signal,
    ) -> Result<(), ServeError> {
        let address = self.parts.config.listen;
        let identity = || self.authority.issue_server(self.parts.clock.unix_ms(), SERVER_LIFE_MS);
        let limits = ServeLimits::default();
        let server = QuicServer::bind(address, identity()?, service, limits, self.parts.clock.clone())
            .map_err(|source| ServeError::Listen { address, source: source.into() })?;
        let server = Arc::new(server);
        let (admin, port) = self.open_port(&server).await?;
        let listening = Event::Listening {
            address: server.local_addr().to_string(),
            admin: admin.map(|address| address.to_string()),
            version: self.version()?,
            round: self.parts.desk.round(),
        };
        self.parts.events.tell(&listening);
        let (finished, mut end) = tokio::sync::oneshot::channel();
        let thread = {
            let (watch, stop) = (self.parts.storage.watch.clone(), self.stop.clone());
            let clock = self.parts.clock.clone();
            std::thread::Builder::new()
                .name("drive".to_owned())
                .spawn(move || {
                    drive(driver, watch.as_ref(), &clock, &stop);
                    if finished.send(()).is_err() {
                        tracing::debug!("ended by a signal");
                    }
                })
                .map_err(|source| ServeError::System { what: "a thread", source })?
        };
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
                _ = reload.tick() => server.reload(identity()?)?,
                _ = hangup.recv() => {
                    server.reload(identity()?)?;
                    let problem = self.directory.admin_token().map(|token| port.replace_token(&token));
                    let problem = problem.err().map(|error| crate::receive::chain(&error));
                    self.parts.events.tell(&Event::Reloaded { problem });
                }
            }
        }
        self.stop.store(true, Ordering::SeqCst);
        self.cancel.cancel();
        self.parts.storage.watch.notify();
        server.close().await;
        port.close().await;
        // The driver ends at the next step; its stage's calls were cancelled.
        join(thread).await
    }

    /// The operator's port, if there is to be one, and where it is.
    async fn open_port(&self, server: &Arc<QuicServer>) -> Result<(Option<SocketAddr>, Port), ServeError> {
        let Listen::At(address) = self.parts.config.admin.listen else { return Ok((None, Port::default())) };
        let refused = |source: std::io::Error| ServeError::Admin { address, source };
        let listener = tokio::net::TcpListener::bind(address).await.map_err(refused)?;
        let local = listener.local_addr().map_err(refused)?;
        let connections = {
            let server = Arc::downgrade(server);
            Arc::new(move || server.upgrade().map_or(0, |server| server.connections()))
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

/// The end of the driver's thread.
async fn join(thread: std::thread::JoinHandle<()>) -> Result<(), ServeError> {
    match tokio::task::spawn_blocking(move || thread.join()).await {
        Ok(Ok(())) => Ok(()),
        _ => Err(ServeError::Driver),
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

    #[tokio::test]
    async fn a_driver_that_panics_is_no_success() {
        join(std::thread::spawn(|| {})).await.unwrap();
        let panicked = std::thread::spawn(|| panic!("a stage's bug"));
        assert!(matches!(join(panicked).await, Err(ServeError::Driver)));
    }
}
