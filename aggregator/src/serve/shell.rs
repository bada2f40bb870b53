//! A server that runs: its sockets, its timers and its signals, and the order in which all of it ends.
//!
//! `serve` has opened everything, `threads` drives and follows.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use commonweal_protocol::Version;
use commonweal_runtime::Cancel;
use commonweal_transport::{Authority, IdentityError, QuicServer, ServeLimits, ServerIdentity};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::threads::{LAST_STEP, Threads};
use super::{Role, ServeError};
use crate::admin::{Admin, Token};
use crate::config::Listen;
use crate::directory::Directory;
use crate::drive::{Driver, ModelStages};
use crate::events::Event;
use crate::observe::{Counts, Observer, Recent, View};
use crate::receive::handler::Service;
use crate::receive::{Parts, Receiver};

/// Lifetime of the aggregator's own certificate, which is issued anew at every start and every day.
const SERVER_LIFE_MS: u64 = 30 * 24 * 3_600_000;
const RELOAD: Duration = Duration::from_secs(24 * 3600);
/// How long the end waits for requests that write, and for the release in force to be read: with what `threads` waits for
/// and the spans it is less than the service manager does (`packaging/`).
const LAST_WRITES: Duration = Duration::from_secs(5);
const LAST_LOOK: Duration = Duration::from_secs(5);

/// What runs.
pub(super) struct Shell {
    pub(super) parts: Parts,
    pub(super) role: Role,
    pub(super) receiver: Arc<Receiver>,
    pub(super) authority: Arc<Authority>,
    pub(super) directory: Directory,
    pub(super) counts: Arc<Counts>,
    pub(super) recent: Arc<Recent>,
    pub(super) cancel: Cancel,
    pub(super) stop: Arc<AtomicBool>,
    pub(super) linger_ms: u64,
}

impl Shell {
    /// Until a signal, or until the wanted rounds are over; then the release in force, if it can be learned.
    pub(super) fn run(
        &self,
        (runtime, hangup): (Runtime, Signal),
        service: Service,
        driver: Option<Driver<ModelStages>>,
    ) -> Result<Option<Version>, ServeError> {
        let result = runtime.block_on(async {
            self.listen(service, driver, hangup).await?;
            Ok(tokio::time::timeout(LAST_LOOK, self.learn_version()).await.ok().flatten())
        });
        // Requests that are still on a blocking thread finish their write; none is waited for longer.
        runtime.shutdown_timeout(LAST_WRITES);
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
        // Before anybody is told that it listens: whoever waited for that may say stop at once.
        let mut signals = Signals::new().map_err(|source| ServeError::System { what: "signals", source })?;
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
        if tokio::time::timeout(LAST_WRITES, port.close()).await.is_err() {
            tracing::warn!("what the operator asked for last is not answered");
        }
        drop(idle);
        // The driver ends at the next step; its stage's calls were cancelled.
        threads.join(LAST_STEP).await
    }

    fn bind(&self, service: Service) -> Result<Arc<QuicServer>, ServeError> {
        let (address, congestion) = (self.parts.config.listen, self.parts.config.receive.congestion);
        let limits = ServeLimits { congestion, ..ServeLimits::default() };
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

    /// The same, without holding up whoever waits for something else too; none if the store does not say.
    async fn learn_version(&self) -> Option<Version> {
        let publisher = self.parts.publisher.clone();
        let head = tokio::task::spawn_blocking(move || publisher.head()).await.ok()?.ok()??;
        Some(head.release.version)
    }

    /// Until every device that was seen has the release, or the time is over.
    async fn linger(&self) {
        let end_ms = self.parts.clock.unix_ms().saturating_add(self.linger_ms);
        while self.parts.clock.unix_ms() < end_ms {
            let Some(version) = self.learn_version().await else { return };
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
