//! Opens what a server needs, in an order in which what is wrong is known before anything is changed, and has `shell` run it.
//!
//! `receive` answers on the runtime's blocking threads; `drive` has a thread of its own, so that model work never
//! delays a device. A process that is killed at any point is taken up by the next: nothing here is state. Where several
//! share the stores, each does its [`Role`], and one of those that may drive does ([`crate::lead`]).

mod shell;
mod threads;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use commonweal_adapter::exact;
use commonweal_protocol::{CertificateChain, Csr, DeviceId, Mode, RoundId};
use commonweal_runtime::Cancel;
use commonweal_traces::{Headers, Traces, TracesError};
use commonweal_transport::{Authority, Clock, IdentityError};

use crate::config::{Config, ConfigError};
use crate::desk::{self, Desk, DeskError};
use crate::directory::{Directory, DirectoryError};
use crate::drive::{Driver, ModelStages};
use crate::events::{Event, Events};
use crate::laboratory::{LaboratoryError, has_guard, open_package};
use crate::observe::{Counts, Recent};
use crate::pause::PausePoint;
use crate::publish::{PublishError, Publisher};
use crate::receive::enroll::{Certify, Registry};
use crate::receive::handler::{Service, Threads as Where};
use crate::receive::partial::PartialFiles;
use crate::receive::{Parts, Receiver};
use crate::store::{Access, RealDisk, Storage, StoreError};
use crate::traces::Tracer;
use shell::Shell;
pub use threads::{drive, follow};
use tokio::signal::unix::{SignalKind, signal};

/// How long the end waits for spans to reach their collector.
const LAST_SPANS: Duration = Duration::from_secs(5);

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
    #[error(
        "the store has no release: its database is another one than `init` wrote to, or was lost; look at \
         storage.coordination, or restore a backup (docs/operations.md, Disaster)"
    )]
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
    let collector = config.traces.collector().map_err(|problem| ConfigError::Values(vec![problem]))?;
    let tracer = collector.map(|endpoint| {
        let traces = Traces::start(&endpoint, "commonweal-aggregator", Headers::Environment)?;
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
    let version = shell.run((runtime, hangup), service, driver)?.unwrap_or(head.version);
    events.tell(&Event::Stopped { version });
    if let Some(tracer) = tracer {
        tracer.finish(LAST_SPANS);
    }
    Ok(())
}
