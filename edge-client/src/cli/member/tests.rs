//! When a device opens its package and when it gives it back: a real package and a real link, and sensors that say what the
//! test says.

use std::{
    fs,
    net::Ipv4Addr,
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use clap::Parser;
use commonweal_adapter::{Adapter, AdapterFacts, AdapterKind, disk};
use commonweal_package::Package;
use commonweal_protocol::{
    Accepted, BaseHash, CertificateChain, Chunk, CompressSettings, Csr, DeviceId, Digest, Enroll, Enrolled,
    Fetch, Mode, Open, Poll, PollReply, ReconnectWindow, Refused, RoundId, RoundTask, Scaffold, Start,
    TrainSettings, UploadKey, Version,
};
use commonweal_transport::{Authority, ContentPart, Handler, Opened, Peer, QuicServer, ServeLimits};

use super::*;
use crate::{
    cli::{
        Cli,
        identity::{Address, tests::credentials},
    },
    kept,
    pipeline::Outcome,
    rows::Parsed,
    sample::Sample,
    sensors::Sensors,
    store::Store,
    units::Limit,
    when::{Readings, WhenPolicy},
};

const PACKAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/reference/package");
const DAY_MS: u64 = 24 * 3600 * 1000;

/// An aggregator with a round, or without one, that takes no update.
#[derive(Default)]
struct Desk {
    task: Mutex<Option<RoundTask>>,
    adapter: Vec<u8>,
    is_offered: AtomicBool,
}

impl Handler for Desk {
    async fn admit(&self, _: &Peer) -> Result<(), Refused> {
        Ok(())
    }

    async fn poll(&self, _: &Peer, _: Poll) -> Result<PollReply, Refused> {
        let task = *self.task.lock().unwrap();
        Ok(PollReply { task, release: None, successions: vec![], reconnect: ReconnectWindow::default() })
    }

    async fn read(&self, _: &Peer, fetch: Fetch, length_max: usize) -> Result<ContentPart, Refused> {
        let rest = &self.adapter[fetch.offset as usize..];
        let bytes = rest[..rest.len().min(length_max)].to_vec();
        Ok(ContentPart { length: self.adapter.len() as u64, bytes })
    }

    async fn open(&self, _: &Peer, _: Open) -> Result<Opened, Refused> {
        self.is_offered.store(true, Ordering::SeqCst);
        Err(Refusal::Internal.into())
    }

    async fn chunk(&self, _: &Peer, _: UploadKey, _: Chunk) -> Result<u64, Refused> {
        Err(Refusal::Internal.into())
    }

    async fn finish(&self, _: &Peer, _: UploadKey) -> Result<Accepted, Refused> {
        Err(Refusal::Internal.into())
    }

    async fn renew(&self, _: &Peer, _: Csr) -> Result<CertificateChain, Refused> {
        Err(Refusal::Internal.into())
    }

    async fn enroll(&self, _: Enroll) -> Result<Enrolled, Refused> {
        Err(Refusal::Internal.into())
    }
}

/// A person who comes once the device trains, if they come at all.
#[derive(Clone, Default)]
struct Person {
    has_power: Arc<AtomicBool>,
    comes: Arc<AtomicBool>,
    doing: PathBuf,
}

impl Sensors for Person {
    fn read(&mut self) -> Readings {
        let trains = || fs::read_to_string(&self.doing).is_ok_and(|doing| doing.contains("trains, step"));
        let is_there = self.comes.load(Ordering::SeqCst) && trains();
        let idle = if is_there { Duration::ZERO } else { Duration::from_secs(3600) };
        let power = self.has_power.load(Ordering::SeqCst);
        Readings { idle: Some(idle), power: Some(power), ..Readings::default() }
    }
}

fn task(base: BaseHash, adapter: &[u8]) -> RoundTask {
    RoundTask {
        round: RoundId(1),
        base,
        start: Start { version: Version(1), digest: Digest::of(adapter), length: adapter.len() as u64 },
        mode: Mode::Ffa,
        scaffold: Scaffold::Off,
        train: TrainSettings {
            // So many that whoever comes at the first of them comes before the last.
            steps_max: 60,
            warmup_steps: 0,
            accumulation: 1,
            row_tokens_max: 128,
            learning_rate: 1e-3,
            weight_decay: 0.0,
            clip_norm: 1.0,
            proximal_mu: 0.0,
        },
        compress: CompressSettings {
            bits: 4,
            block: 64,
            top_k: None,
            rotate: false,
            stochastic: false,
            level: 1,
        },
        seed: 5,
        deadline_ms: 1_000,
    }
}

#[test]
fn the_package_is_opened_for_work_that_may_be_done_and_given_back_when_the_device_has_waited() {
    assert!(fs::exists(PACKAGE).unwrap(), "{PACKAGE} is missing: run scripts/setup first");
    let package = Package::open(PACKAGE).unwrap();
    let base = BaseHash(package.base().0);
    let start = Adapter::init(Arc::new(package.layout().clone()), 1);
    let facts = AdapterFacts { base: base.0, kind: AdapterKind::Assistant };
    let desk = Arc::new(Desk { adapter: disk::write(&start, &facts).unwrap(), ..Desk::default() });

    let now_ms = Clock::system().unix_ms();
    let authority = Authority::create(now_ms).unwrap();
    let server_identity = authority.issue_server(now_ms, 60 * DAY_MS).unwrap();
    let runtime = Runtime::new().unwrap();
    let server = runtime.block_on(async {
        let any_port = (Ipv4Addr::LOCALHOST, 0).into();
        QuicServer::bind(
            any_port,
            server_identity,
            Arc::clone(&desk),
            ServeLimits::default(),
            Clock::system(),
        )
    });
    let server = server.unwrap();

    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("policy.toml"), "[when]\nnice = 0\n").unwrap();
    let store = Store::open(directory.path()).unwrap();
    let address = Address { host: "127.0.0.1".into(), port: server.local_addr().port() };
    let credentials = credentials(&authority, DeviceId([7; 16]), now_ms);
    Identity { credentials, address }.keep(&store).unwrap();
    let texts =
        ["eggs", "rice", "bread"].map(|what| (format!("How do I keep {what}?"), "In a cool place.".into()));
    let good = texts.map(|(prompt, reply)| (0, Sample::from_pair(prompt, reply).unwrap())).to_vec();
    kept::keep(&store, &Parsed { good, bad: Vec::new() }, "texts", 0).unwrap();
    drop(store);

    let dir = directory.path().to_str().unwrap();
    let cli = Cli::parse_from(["edge-client", "run", "--dir", dir, "--package", PACKAGE, "--device", "cpu"]);
    let mut member = Member::open(&cli.shared, true).unwrap();
    let person = Person { doing: directory.path().join("doing.json"), ..Person::default() };
    member.heed = Some(Heed { rules: WhenPolicy::default(), sensors: Box::new(person.clone()) });

    // It may not work: neither its start nor its turn opens anything.
    let Turn::PutOff { why, .. } = member.turn().unwrap() else { panic!("it may not work") };
    assert!(why.contains("battery"), "{why}");
    assert!(!member.device.model.is_open());
    // Its owner changes the policy meanwhile. One that is wrong changes nothing.
    let own = member.device.guard.config().threshold;
    let becomes = |policy: &str, member: &mut Member| {
        fs::write(directory.path().join("policy.toml"), policy).unwrap();
        assert!(!member.look_at_policy(), "it may still be written");
        let is_taken = member.look_at_policy();
        let Turn::PutOff { why, .. } = member.turn().unwrap() else { return (is_taken, String::new()) };
        (is_taken, why)
    };
    let (is_taken, why) = becomes("[when]\npower = \"no\"\n", &mut member);
    assert!(!is_taken && why.contains("battery"), "{why}");
    let (is_taken, why) =
        becomes("[filter.categories.wepons]\naction = \"drop\"\n[when]\npower = false\n", &mut member);
    assert!(!is_taken && why.contains("battery"), "{why}");
    let another = "[when]\nnice = 0\npower = false\n[filter]\nthreshold = 0.875\n[budget]\ndisk = \"16MB\"\n";
    assert_eq!(becomes(another, &mut member), (true, String::new()));
    let threshold = member.device.guard.config().threshold;
    assert!((threshold - 0.875).abs() < 1e-9, "{threshold}");
    assert_eq!(member.device.policy.budget.disk, Limit::of(16_000_000));
    assert!(member.device.store.require_disk("x", 1 << 30).is_err());
    let (is_taken, why) = becomes("[when]\nnice = 0\n", &mut member);
    assert!(is_taken && why.contains("battery"), "{why}");
    assert!((member.device.guard.config().threshold - own).abs() < 1e-9);
    assert!(!member.device.model.is_open());
    // It may work, and there is nothing to do.
    person.has_power.store(true, Ordering::SeqCst);
    let Turn::Visited(Ok(Visit { outcome: Outcome::Idle, .. })) = member.turn().unwrap() else {
        panic!("there is no round")
    };
    assert!(!member.device.model.is_open());

    *desk.task.lock().unwrap() = Some(task(base, &desk.adapter));
    person.comes.store(true, Ordering::SeqCst);
    let Turn::PutOff { why, .. } = member.turn().unwrap() else { panic!("somebody came") };
    assert!(why.contains("touched 0 s ago"), "{why}");
    // A short break costs no opening, a lasting one gives everything back.
    let rested = member.rested.unwrap();
    member.waits(rested + KEPT / 2);
    assert!(member.device.model.is_open());
    // A visit that finds nothing to do makes the break no longer. Another test of this process may use a model just then.
    person.comes.store(false, Ordering::SeqCst);
    let working = desk.task.lock().unwrap().take();
    let mut is_break_as_long = || {
        let rested = member.rested;
        let Turn::Visited(Ok(Visit { outcome: Outcome::Idle, .. })) = member.turn().unwrap() else {
            panic!("there is no round")
        };
        member.rested == rested
    };
    assert!((0..100).any(|_| is_break_as_long()), "every visit counted as work");
    *desk.task.lock().unwrap() = working;
    let rested = member.rested.unwrap();
    member.waits(rested + KEPT);
    assert!(!member.device.model.is_open());

    // What was begun goes on, with what is opened again.
    assert!(matches!(member.turn().unwrap(), Turn::Visited(Err(_))), "its update is not taken");
    assert!(desk.is_offered.load(Ordering::SeqCst));
}
