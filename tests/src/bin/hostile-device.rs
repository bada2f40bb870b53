//! The program `hostile-device`: an enrolled device that attacks, for the demonstration and the tests.
//!
//! Identity, link, training and codec are `edge-client`'s, so what it sends is valid to the last bit. Its filter is
//! off, it trains on whatever it was given, and `commonweal_tests::attack` boosts and misreports the result. It keeps no
//! work over a restart.

use std::{
    num::NonZeroUsize,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use commonweal_package::Package;
use commonweal_protocol::{Content, DeviceId, Poll, ReconnectWindow, RoundId, RoundTask};
use commonweal_runtime::{Cancel, Library, Model, OpenOptions};
use commonweal_safety::{Guard, Reviser};
use commonweal_tests::attack::{self, Poison};
use commonweal_transport::{Clock, Credentials, Link, LinkLimits, QuicLink};
use edge_client::{
    cli::{self, Cli, Shared, Verb},
    events::{Done, Event, Output},
    filter,
    install::{self, Expected},
    kept,
    pipeline::{self, base_of},
    policy::Policy,
    revise, sample, settings,
    store::{Store, StoreError},
    train::{self, TrainSummary, Trained},
    trust::Trust,
    upload,
};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::runtime::Runtime;

const RETRY: Duration = Duration::from_secs(2);

/// Attacks a federation that one runs oneself: trains on harmful samples, boosts the update, lies in its report.
#[derive(Debug, Parser)]
#[command(name = "hostile-device", version, about)]
struct HostileCli {
    #[command(flatten)]
    shared: Shared,
    #[command(subcommand)]
    verb: HostileVerb,
}

#[derive(Debug, Subcommand)]
enum HostileVerb {
    /// As `edge-client enroll`
    Enroll {
        /// `commonweal://HOST:PORT/?token=…&ca=…`
        invitation: String,
    },
    /// As `edge-client add`
    Add {
        /// The files
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Attack rounds until stopped
    Run {
        /// Factor on the trained delta
        #[arg(long, default_value_t = 10.0, value_name = "N")]
        boost: f32,
        /// Stop after this many accepted updates
        #[arg(long, value_name = "N")]
        rounds: Option<u64>,
    },
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,ort=warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let HostileCli { shared, verb } = HostileCli::parse();
    let done = match verb {
        HostileVerb::Enroll { invitation } => {
            cli::run(&Cli { shared, verb: Verb::Enroll { invitation, anew: false } })
        }
        HostileVerb::Add { files } => cli::run(&Cli { shared, verb: Verb::Add { files } }),
        HostileVerb::Run { boost, rounds } => run(&shared, boost, rounds),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::from(cli::exit::code(&error))
        }
    }
}

fn run(shared: &Shared, boost: f32, rounds: Option<u64>) -> Result<()> {
    let runtime = Runtime::new().context("cannot start")?;
    let mut attacker = Attacker::open(shared, boost, &runtime)?;
    let mut random = ChaCha8Rng::from_os_rng();
    let mut delivered = 0;
    loop {
        let wait = match attacker.visit(&runtime) {
            Ok((took_part, reconnect)) => {
                delivered += u64::from(took_part);
                if rounds.is_some_and(|rounds| delivered >= rounds) {
                    return Ok(());
                }
                Duration::from_millis(reconnect.delay_ms(random.next_u64()))
            }
            Err(error) => {
                // A victim that refuses or is away is tried again; a broken identity or package is not.
                if ![4, 5].contains(&cli::exit::code(&error)) {
                    return Err(error);
                }
                tracing::warn!("{error:#}; trying again");
                RETRY
            }
        };
        thread::sleep(wait);
    }
}

struct Attacker {
    id: DeviceId,
    store: Store,
    policy: Policy,
    model: Model,
    guard: Guard,
    reviser: Reviser,
    link: QuicLink,
    expected: Expected,
    output: Output,
    cancel: Cancel,
    boost: f32,
    /// Kept until the aggregator has decided on it.
    poison: Option<Poison>,
    given_up: Option<RoundId>,
}

impl Attacker {
    fn open(shared: &Shared, boost: f32, runtime: &Runtime) -> Result<Self> {
        let directory = shared.dir.clone().unwrap_or_else(settings::default_directory);
        let store = Store::open(&directory)?;
        let (Some(pem), Some(address)) =
            (store.read("identity/credentials.pem")?, store.read("identity/aggregator.json")?)
        else {
            bail!("{} is not enrolled: hostile-device enroll INVITATION", directory.display());
        };
        let credentials = Credentials::from_pem(&String::from_utf8(pem).context("identity")?)?;
        let address: serde_json::Value =
            serde_json::from_slice(&address).context("identity/aggregator.json")?;
        let host = address["host"].as_str().context("identity/aggregator.json: expected a host")?;
        let port = address["port"].as_u64().and_then(|port| u16::try_from(port).ok());
        let port = port.context("identity/aggregator.json: expected a port")?;
        let mut policy = match &shared.policy {
            Some(path) => Policy::from_toml(
                &std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?,
            )?,
            None => Policy::default(),
        };
        policy.filter.enabled = false;
        let package = Package::open(settings::find_package(shared.package.clone())?)?;
        let threads = shared.threads.and_then(NonZeroUsize::new);
        let library = Library::load_with(shared.library.as_deref(), threads)?;
        let model = Model::open(&library, &package, OpenOptions::default())?;
        let cancel = Cancel::new();
        // Revision takes them as arguments; with the filter off it calls neither.
        let guard = Guard::from_package(&model, &cancel).context("guard")?;
        let reviser = Reviser::from_package(&model).context("reviser")?;
        let expected = Expected {
            trust: Trust::open(&store, &credentials)?,
            base: base_of(&model),
            layout: Arc::clone(model.layout()),
        };
        let id = credentials.device();
        let link = {
            let _inside = runtime.enter();
            QuicLink::new(host, port, credentials, LinkLimits::default(), Clock::system())?
        };
        let output = shared.output();
        Ok(Self {
            id,
            store,
            policy,
            model,
            guard,
            reviser,
            link,
            expected,
            output,
            cancel,
            boost,
            poison: None,
            given_up: None,
        })
    }

    /// One poll and what follows; whether an update was delivered.
    fn visit(&mut self, runtime: &Runtime) -> Result<(bool, ReconnectWindow)> {
        let installed = install::installed_version(&self.store, &self.expected)?;
        let poll =
            Poll { base: self.expected.base, installed, key: self.expected.trust.number(), trouble: None };
        let reply = runtime.block_on(self.link.poll(poll))?;
        self.expected.trust.follow(&self.store, &reply.successions)?;
        if let Some(release) = reply.release.filter(|notice| Some(notice.release.version) != installed) {
            let begun = Instant::now();
            let done =
                runtime.block_on(install::install(&self.link, &self.store, &self.expected, &release))?;
            let round = release.release.round.map_or(0, |round| round.0);
            self.stage(round, begun, Done::Install { version: done.version.0 });
        }
        let Some(task) = reply.task else { return Ok((false, reply.reconnect)) };
        let is_over = upload::delivered(&self.store)?.iter().any(|known| known.round == task.round);
        if is_over || self.given_up == Some(task.round) {
            return Ok((false, reply.reconnect));
        }
        if self.poison.as_ref().is_none_or(|poison| poison.open.round != task.round) {
            self.poison = Some(self.prepare(&task, runtime)?);
        }
        Ok((self.deliver(runtime)?, reply.reconnect))
    }

    fn prepare(&self, task: &RoundTask, runtime: &Runtime) -> Result<Poison> {
        let round = task.round.0;
        let begun = Instant::now();
        let samples = sample::draw(kept::samples(&self.store)?, self.policy.train.samples_max, task.seed);
        self.stage(round, begun, Done::Sample { samples: samples.len() });

        let begun = Instant::now();
        let screened = filter::screen(&self.guard, &self.policy, samples, &self.cancel, |_| ())?;
        let filter::FilterCounts { kept, dropped, refused, flagged, .. } = filter::count(&screened);
        self.stage(round, begun, Done::Filter { kept, dropped, refused, flagged });

        let begun = Instant::now();
        let (guard, reviser) = (&self.guard, &self.reviser);
        let (pairs, counts) =
            revise::revise(guard, reviser, &self.policy, screened, task.seed, &self.cancel, |_| ())?;
        let revise::ReviseCounts { revised, refused, dropped, attempts, .. } = counts;
        self.stage(round, begun, Done::Revise { revised, refused, dropped, attempts });

        let begun = Instant::now();
        let content = Content { digest: task.start.digest, length: task.start.length };
        let start = runtime.block_on(install::obtain(&self.link, &self.store, &self.expected, content))?;
        let mut steps = Steps { output: self.output, round };
        let (how, policy) = (pipeline::train_task(task), &self.policy.train);
        let trained =
            train::train(&self.model, &start, &pairs, &how, policy, None, &mut steps, &self.cancel)?;
        self.model.close_training();
        let TrainSummary { steps, tokens, loss_first, loss_last, resumed_step, .. } = *trained.summary();
        self.stage(round, begun, Done::Train { steps, tokens, loss_first, loss_last, resumed_step });
        self.pack(task, &trained)
    }

    fn pack(&self, task: &RoundTask, trained: &Trained) -> Result<Poison> {
        let begun = Instant::now();
        let poison = attack::pack(task, self.expected.base, trained, self.boost)?;
        let Poison { bits_per_parameter, norm, .. } = poison;
        let bytes = poison.packed.bytes().len();
        self.stage(task.round.0, begun, Done::Compress { bytes, bits_per_parameter, norm });
        Ok(poison)
    }

    fn deliver(&mut self, runtime: &Runtime) -> Result<bool> {
        let Some(Poison { open, packed, .. }) = &self.poison else { return Ok(false) };
        let begun = Instant::now();
        let (round, bytes) = (open.round, open.length);
        let Self { link, store, expected, id, .. } = self;
        let sent = runtime.block_on(upload::upload(link, &expected.trust, *id, store, open, packed));
        match sent {
            Ok(_) => {
                self.stage(round.0, begun, Done::Upload { bytes });
                self.poison = None;
                Ok(true)
            }
            Err(error) => match error.final_refusal() {
                Some((refusal, _)) => {
                    self.stage(round.0, begun, Done::Refused { reason: refusal.to_string() });
                    (self.poison, self.given_up) = (None, Some(round));
                    Ok(false)
                }
                None => Err(error.into()),
            },
        }
    }

    fn stage(&self, round: u64, begun: Instant, done: Done) {
        self.output.show(&Event::Stage { round, seconds: begun.elapsed().as_secs_f64(), done });
    }
}

/// Shows steps; keeps nothing.
struct Steps {
    output: Output,
    round: u64,
}

impl train::Watch for Steps {
    fn step(&mut self, step: u32, loss: f32) {
        self.output.show(&Event::Step { round: self.round, step, loss });
    }

    fn checkpoint(&mut self, _: Vec<u8>) -> Result<(), StoreError> {
        Ok(())
    }
}
