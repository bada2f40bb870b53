//! A device on the bundled model, and a link that answers as the test says.

use std::{
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use commonweal_adapter::{Adapter, AdapterFacts, AdapterKind, disk};
use commonweal_package::Package;
use commonweal_protocol::{
    AggregatorKey, CertificateChain, CompressSettings, Content, Csr, DeviceId, Digest, KeyNumber, Lineage,
    Mode, Open, Poll, PollReply, Receipt, ReconnectWindow, Refusal, RoundId, RoundTask, Scaffold,
    SignedReceipt, SignedRelease, SigningKey, Start, TrainSettings, Version,
};
use commonweal_runtime::{Cancel, Library, Model, OpenOptions};
use commonweal_safety::{Guard, Reviser};
use commonweal_transport::{Link, LinkError, Uploaded};
use edge_client::{
    events::Output,
    install::Expected,
    kept,
    pipeline::{self, Device, Outcome},
    policy::Policy,
    rows::{self, Form},
    sample::Sample,
    store::{Store, StoreError},
    train,
    trust::Trust,
};
use tempfile::TempDir;
use tokio::runtime::Runtime;

pub(crate) fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

pub(crate) fn package() -> PathBuf {
    let path = workspace().join("target/reference/package");
    assert!(path.exists(), "{} is missing: run scripts/setup first", path.display());
    path
}

pub(crate) fn model() -> Model {
    let library = Library::load_with(None, NonZeroUsize::new(1)).unwrap();
    Model::open(&library, &Package::open(package()).unwrap(), OpenOptions::default()).unwrap()
}

pub(crate) fn samples(name: &str, count: usize) -> Vec<(usize, Sample)> {
    let text = fs::read(workspace().join("models/reference/demo").join(name)).unwrap();
    let mut good = rows::read(&text[..], Form::Jsonl, edge_client::forms::sample_of).unwrap().good;
    good.truncate(count);
    good
}

pub(crate) const DEVICE: DeviceId = DeviceId([1; 16]);
/// What the answer to an update says; a poll's says to come back at once.
pub(crate) const AFTER_UPLOAD: ReconnectWindow = ReconnectWindow { after_ms: 60_000, spread_ms: 30_000 };

/// What the aggregator does next, and what it has seen.
#[derive(Default)]
pub(crate) struct Told {
    pub(crate) task: Option<RoundTask>,
    pub(crate) adapter: Vec<u8>,
    /// The control variate's file.
    pub(crate) control: Vec<u8>,
    /// The bytes of the last upload that was tried.
    pub(crate) offered: Vec<u8>,
    pub(crate) refusal: Option<Refusal>,
    /// How many updates are refused before they are taken; all, if it says nothing.
    pub(crate) refusals_left: Option<u32>,
    /// Whom receipts are for, if not for who asked.
    pub(crate) signs_for: Option<DeviceId>,
    /// The keys that signed so far, if there was a rotation.
    pub(crate) lineage: Option<Lineage>,
    pub(crate) is_away: bool,
    /// What is published.
    pub(crate) release: Option<SignedRelease>,
    /// What devices said when they asked.
    pub(crate) polls: Vec<Poll>,
    /// How often bytes were fetched.
    pub(crate) fetches: usize,
    /// Never answers an update.
    pub(crate) is_silent: bool,
    /// Copied here when an update arrives: what a kill just then leaves.
    pub(crate) snapshot: Option<(PathBuf, PathBuf)>,
    pub(crate) opened: Vec<Open>,
}

#[derive(Clone)]
pub(crate) struct FakeLink {
    pub(crate) key: SigningKey,
    pub(crate) told: Arc<Mutex<Told>>,
}

pub(crate) fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

impl Link for FakeLink {
    async fn poll(&self, poll: Poll) -> Result<PollReply, LinkError> {
        let mut told = self.told.lock().unwrap();
        told.polls.push(poll);
        let release = told.release.clone().filter(|signed| Some(signed.release.version) != poll.installed);
        let successions = told.lineage.as_ref().map(|keys| keys.after(poll.key).to_vec()).unwrap_or_default();
        Ok(PollReply { task: told.task, release, successions, reconnect: ReconnectWindow::default() })
    }

    async fn upload(&self, open: &Open, bytes: &[u8]) -> Result<Uploaded, LinkError> {
        let is_silent = {
            let mut told = self.told.lock().unwrap();
            if told.is_silent {
                told.opened.push(*open);
            }
            told.is_silent
        };
        if is_silent {
            std::future::pending::<()>().await;
        }
        let mut told = self.told.lock().unwrap();
        told.offered = bytes.to_vec();
        if told.is_away {
            return Err(LinkError::Stalled { during: "uploading", stall_ms: 1 });
        }
        told.opened.push(*open);
        if let Some((from, to)) = &told.snapshot {
            copy_folder(from, to);
        }
        if told.refusals_left == Some(0) {
            told.refusal = None;
        }
        if let Some(reason) = told.refusal {
            told.refusals_left = told.refusals_left.map(|left| left - 1);
            return Err(LinkError::Refused { reason, reconnect: AFTER_UPLOAD });
        }
        let Open { round, digest, length, .. } = *open;
        let device = told.signs_for.unwrap_or(DEVICE);
        let receipt = Receipt { round, device, digest, length, received_ms: 0 };
        let receipt = SignedReceipt::sign(&self.key, receipt).unwrap();
        Ok(Uploaded { receipt, reconnect: AFTER_UPLOAD, resumed_from: 0, sent_bytes: length })
    }

    async fn fetch(&self, content: Content, partial: &mut Vec<u8>) -> Result<(), LinkError> {
        let mut told = self.told.lock().unwrap();
        told.fetches += 1;
        let is_control = Digest::of(&told.control) == content.digest;
        partial.clone_from(if is_control { &told.control } else { &told.adapter });
        Ok(())
    }

    async fn renew(&self, _: Csr) -> Result<CertificateChain, LinkError> {
        Err(LinkError::OutOfPlace { expected: "nothing" })
    }
}

/// An enrolment at an aggregator whose first key this is.
pub(crate) fn trust(key: &SigningKey) -> Trust {
    Trust::new(DEVICE, Lineage::new(KeyNumber(0), AggregatorKey::of(key)))
}

pub(crate) struct World {
    pub(crate) directory: TempDir,
    pub(crate) _runtime: Runtime,
    pub(crate) device: Device<FakeLink>,
    pub(crate) told: Arc<Mutex<Told>>,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::over(model())
    }

    pub(crate) fn over(model: Model) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let runtime = Runtime::new().unwrap();
        let cancel = Cancel::new();
        let key = SigningKey::from_bytes(&[7; 32]);
        let base = pipeline::base_of(&model);
        let start = Adapter::init(Arc::clone(model.layout()), 1);
        let facts = AdapterFacts { base: base.0, kind: AdapterKind::Assistant };
        let told =
            Arc::new(Mutex::new(Told { adapter: disk::write(&start, &facts).unwrap(), ..Told::default() }));
        let store = Store::open(directory.path()).unwrap();
        let good = [samples("device-1.jsonl", 10), samples("hostile.jsonl", 2)].concat();
        kept::keep(&store, &rows::Parsed { good, bad: Vec::new() }, "demo", 0).unwrap();
        let device = Device {
            id: DEVICE,
            store,
            policy: Policy::default(),
            guard: Guard::from_package(&model, &cancel).unwrap(),
            reviser: Reviser::from_package(&model).unwrap(),
            link: FakeLink { key: key.clone(), told: Arc::clone(&told) },
            expected: Expected { trust: trust(&key), base, layout: Arc::clone(model.layout()) },
            model,
            output: Output::Text,
            runtime: runtime.handle().clone(),
            cancel,
            tracer: None,
        };
        let world = Self { directory, _runtime: runtime, device, told };
        world.begin(1);
        world
    }

    /// The aggregator opens a round.
    pub(crate) fn begin(&self, round: u64) {
        let mut told = self.told.lock().unwrap();
        let (digest, length) = (Digest::of(&told.adapter), told.adapter.len() as u64);
        told.task = Some(RoundTask {
            round: RoundId(round),
            base: self.device.expected.base,
            start: Start { version: Version(1), digest, length },
            mode: Mode::Ffa,
            scaffold: Scaffold::Off,
            train: TrainSettings {
                steps_max: 2,
                warmup_steps: 0,
                accumulation: 2,
                row_tokens_max: 128,
                learning_rate: 1e-3,
                weight_decay: 0.0,
                clip_norm: 1.0,
                proximal_mu: 0.0,
            },
            compress: CompressSettings {
                bits: 4,
                block: 64,
                top_k: Some(0.5),
                rotate: false,
                stochastic: true,
                level: 1,
            },
            seed: 5,
            deadline_ms: 1_000,
        });
    }

    pub(crate) fn tell(&self, change: impl FnOnce(&mut Told)) {
        change(&mut self.told.lock().unwrap());
    }

    /// Another key signs from now on, which the next poll tells of.
    pub(crate) fn rotate(&mut self, seed: u8) {
        let next = SigningKey::from_bytes(&[seed; 32]);
        let key = std::mem::replace(&mut self.device.link.key, next.clone());
        let mut told = self.told.lock().unwrap();
        let first = || Lineage::new(KeyNumber(0), AggregatorKey::of(&key));
        told.lineage.get_or_insert_with(first).succeed(&key, AggregatorKey::of(&next), 1).unwrap();
    }

    pub(crate) fn visit(&self) -> Outcome {
        self.device.visit().unwrap().outcome
    }

    pub(crate) fn opened(&self) -> Vec<Open> {
        self.told.lock().unwrap().opened.clone()
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.directory.path().join(name).exists()
    }
}

/// Keeps the last checkpoint.
#[derive(Default)]
pub(crate) struct Keep(pub(crate) Option<Vec<u8>>, pub(crate) usize);

impl train::Watch for Keep {
    fn step(&mut self, _: u32, _: f32) {
        self.1 += 1;
    }

    fn checkpoint(&mut self, bytes: Vec<u8>) -> Result<(), StoreError> {
        // That of half the way stays.
        self.0.get_or_insert(bytes);
        Ok(())
    }
}
