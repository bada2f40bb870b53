//! The aggregator of the benchmark: the parts of `aggregator::serve` without a package, and with two stages that do
//! nothing. Store, receiver, desk, merge, publisher and QUIC are the real ones, on real files.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Instant,
};

use aggregator::{
    config::{Config, Gates},
    desk::{Desk, Record},
    directory::Directory,
    drive::{Driver, Stages},
    events::{AlignFigures, EvaluateFigures, Event, Events, Figures},
    laboratory::{Base, LaboratoryError},
    pause::PausePoint,
    publish::{Candidate, Publisher},
    receive::{
        Parts, Receiver,
        enroll::Registry,
        handler::{Service, Threads},
        partial::PartialFiles,
    },
    round::Policy,
    serve,
    store::{Access, RealDisk, Storage},
};
use anyhow::{Context, Result};
use commonweal_adapter::Adapter;
use commonweal_protocol::{Digest, Invitation, ReportCard, RoundId, Token};
use commonweal_runtime::memory;
use commonweal_transport::{Clock, QuicServer, ServeLimits};
use rand::RngCore as _;

use super::{Arguments, BASE, Times, Told};

const DAY_MS: u64 = 24 * 3_600_000;

/// The two stages that need a model, which there is not.
struct NoModel;

impl Stages for NoModel {
    fn align(&mut self, _: RoundId, candidate: Adapter) -> Result<(Adapter, AlignFigures), LaboratoryError> {
        Ok((candidate, AlignFigures::default()))
    }

    fn evaluate(&mut self, _: RoundId, _: &Adapter) -> Result<EvaluateFigures, LaboratoryError> {
        Ok(EvaluateFigures::default())
    }
}

/// Serves until all rounds are over and every device has the last release, or until the standard input ends.
pub(super) fn serve(arguments: &Arguments, path: &Path) -> Result<()> {
    let clock = Clock::system();
    let directory = Directory::create(path, clock.unix_ms())?;
    let base = Base { hash: BASE, layout: arguments.layout()? };
    let parts = open(arguments, &directory, &base, &clock)?;
    let receiver = Arc::new(Receiver::new(parts.clone()));
    let authority = Arc::new(directory.authority()?);
    let registry = Registry::new(parts.storage.coord.clone());
    let service = Service::new(receiver.clone(), registry.clone(), authority.clone(), Threads::Blocking);
    let driver = Driver::new(parts.clone(), base, NoModel);

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let _inside = runtime.enter();
    let identity = authority.issue_server(clock.unix_ms(), DAY_MS)?;
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let server = QuicServer::bind(listen, identity, service, ServeLimits::default(), clock.clone())?;
    let address = server.local_addr();

    let mut invitations = Vec::new();
    for _ in 0..arguments.devices {
        let mut token = Token([0; 32]);
        rand::rng().fill_bytes(&mut token.0);
        registry.invite(&token, clock.unix_ms(), clock.unix_ms() + DAY_MS)?;
        let (host, port) = (address.ip().to_string().parse()?, address.port());
        invitations.push(Invitation { host, port, token, authority: authority.digest() }.to_string());
    }
    tell(&Told::Invitations(invitations));

    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| serve::drive(driver, parts.storage.watch.as_ref(), &clock, &stop));
        // Ends with the devices' process, which closes this when it is done.
        let ended = std::io::stdin().read_to_end(&mut Vec::new());
        stop.store(true, Ordering::SeqCst);
        parts.storage.watch.notify();
        ended
    })?;
    runtime.block_on(server.close());
    Ok(())
}

/// A fresh aggregator with its first release, as `aggregator init` and `serve` make it.
fn open(arguments: &Arguments, directory: &Directory, base: &Base, clock: &Clock) -> Result<Parts> {
    let storage = Storage::open(directory.path(), Access::Exclusive)?;
    let key = directory.signing_key()?;
    let publisher = Publisher::new(storage.coord.clone(), storage.blob.clone(), key.clone(), base.hash);
    let bytes = base.write(&Adapter::init(base.layout.clone(), 0))?;
    let digest = Digest::of(&bytes);
    storage.blob.put_if_absent(&digest, bytes.len() as u64, &mut bytes.as_slice())?;
    let card = ReportCard::default();
    Record::of_base(&card, clock.unix_ms()).append(storage.coord.as_ref())?;
    publisher.publish(
        Candidate {
            round: None,
            parent: None,
            digest,
            state: aggregator::optimize::OptimizerState::default(),
            card,
        },
        clock.unix_ms(),
    )?;
    let config = config(arguments);
    let events = watch(arguments.rounds_in_all());
    let (policy, now_ms) = (config.round.clone(), clock.unix_ms());
    let desk = Desk::open(storage.clone(), publisher.clone(), policy, events.clone(), now_ms)?;
    let partials = PartialFiles::open(&directory.partials(), Arc::new(RealDisk)).context("partials")?;
    Ok(Parts {
        config: Arc::new(config),
        storage,
        partials: Arc::new(partials),
        publisher,
        desk,
        base: base.hash,
        layout: base.layout.clone(),
        key,
        clock: clock.clone(),
        events,
        pause: PausePoint::default(),
    })
}

/// The defaults, but for what needs a model, and for how soon devices come back: a second or two by default.
fn config(arguments: &Arguments) -> Config {
    let mut config = Config {
        round: Policy {
            goal: arguments.devices,
            quorum: arguments.devices,
            over_selection: 1.0,
            last: Some(RoundId(arguments.rounds_in_all())),
            ..Policy::default()
        },
        ..Config::default()
    };
    config.align.enabled = false;
    config.evaluate.gates = Gates::off();
    (config.receive.reconnect_after_ms, config.receive.reconnect_spread_ms) = (10, 10);
    config.receive.requests_per_second = 1_000.0;
    config
}

/// Makes a round's times of its events, and tells them as each round ends.
fn watch(rounds: u64) -> Events {
    struct Marks {
        /// When the release before became the head.
        released: Instant,
        opened: Instant,
        closed: Instant,
        merged: Instant,
    }
    let now = Instant::now();
    let marks = Mutex::new(Marks { released: now, opened: now, closed: now, merged: now });
    Events::to(move |event| {
        let mut marks = marks.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match event {
            Event::RoundOpened { .. } => marks.opened = now,
            Event::RoundClosed { .. } => marks.closed = now,
            Event::Stage { figures: Figures::Merge(_), .. } => marks.merged = now,
            Event::Published { round: Some(round), .. } => {
                let times = Times {
                    whole: (now - marks.released).as_secs_f64(),
                    gather: (marks.opened - marks.released).as_secs_f64(),
                    receive: (marks.closed - marks.opened).as_secs_f64(),
                    merge: (marks.merged - marks.closed).as_secs_f64(),
                    publish: (now - marks.merged).as_secs_f64(),
                };
                marks.released = now;
                tell(&Told::Round(times));
                if round.0 == rounds {
                    tell(&Told::Peak(memory().map(|memory| memory.resident_bytes_max as f64 / 1e6)));
                }
            }
            Event::Refused { .. } | Event::Rejected { .. } | Event::Retrying { .. } => {
                tracing::warn!("{}", event.sentence());
            }
            _ => {}
        }
    })
}

/// A line to the devices' process; without one to hear it, the process is about to end anyway.
fn tell(told: &Told) {
    let line = serde_json::to_string(told).unwrap_or_default();
    let mut stdout = std::io::stdout().lock();
    drop(writeln!(stdout, "{line}").and_then(|()| stdout.flush()));
}
