//! A round as the device lives it, on the bundled model, with the aggregator's answers written by the test: what a kill,
//! a refusal, a change of mind or a damaged file costs.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::{
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
};

use commonweal_adapter::{Adapter, AdapterDelta, AdapterFacts, AdapterKind, Trainable, disk, pair};
use commonweal_package::Package;
use commonweal_protocol::{
    AggregatorKey, CertificateChain, CompressSettings, Content, Control, Csr, DeviceId, Digest, Mode, Open,
    Poll, PollReply, Receipt, ReconnectWindow, Refusal, RoundId, RoundTask, Scaffold, SignedControl,
    SignedReceipt, SigningKey, Start, TrainSettings, Version,
};
use commonweal_runtime::{Cancel, Library, Model, OpenOptions};
use commonweal_safety::{Guard, Reviser};
use commonweal_transport::{Link, LinkError, Uploaded};
use edge_client::{
    events::Output,
    filter,
    install::Expected,
    pipeline::{self, Device, Outcome, PipelineError},
    policy::{Method, Policy},
    revise::{self, TrainingPair},
    rows::{self, Form},
    sample::{self, Sample},
    store::{Store, StoreError},
    train,
};
use tempfile::TempDir;
use tokio::runtime::Runtime;

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn package() -> PathBuf {
    let path = workspace().join("target/reference/package");
    assert!(path.exists(), "{} is missing: run scripts/setup first", path.display());
    path
}

fn model() -> Model {
    let library = Library::load_with(None, NonZeroUsize::new(1)).unwrap();
    Model::open(&library, &Package::open(package()).unwrap(), OpenOptions::default()).unwrap()
}

fn samples(name: &str, count: usize) -> Vec<(usize, Sample)> {
    let text = fs::read(workspace().join("models/reference/demo").join(name)).unwrap();
    let mut good = rows::read(&text[..], Form::Jsonl, edge_client::forms::sample_of).unwrap().good;
    good.truncate(count);
    good
}

const DEVICE: DeviceId = DeviceId([1; 16]);
/// What the answer to an update says; a poll's says to come back at once.
const AFTER_UPLOAD: ReconnectWindow = ReconnectWindow { after_ms: 60_000, spread_ms: 30_000 };

/// What the aggregator does next, and what it has seen.
#[derive(Default)]
struct Told {
    task: Option<RoundTask>,
    adapter: Vec<u8>,
    /// The control variate's file.
    control: Vec<u8>,
    /// The bytes of the last upload that was tried.
    offered: Vec<u8>,
    refusal: Option<Refusal>,
    /// How many updates are refused before they are taken; all, if it says nothing.
    refusals_left: Option<u32>,
    /// Whom receipts are for, if not for who asked.
    signs_for: Option<DeviceId>,
    is_away: bool,
    /// Copied here when an update arrives: what a kill just then leaves.
    snapshot: Option<(PathBuf, PathBuf)>,
    opened: Vec<Open>,
}

#[derive(Clone)]
struct FakeLink {
    key: SigningKey,
    told: Arc<Mutex<Told>>,
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

impl Link for FakeLink {
    async fn poll(&self, _: Poll) -> Result<PollReply, LinkError> {
        let task = self.told.lock().unwrap().task;
        Ok(PollReply { task, release: None, reconnect: ReconnectWindow::default() })
    }

    async fn upload(&self, open: &Open, bytes: &[u8]) -> Result<Uploaded, LinkError> {
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
        let told = self.told.lock().unwrap();
        let is_control = Digest::of(&told.control) == content.digest;
        partial.clone_from(if is_control { &told.control } else { &told.adapter });
        Ok(())
    }

    async fn renew(&self, _: Csr) -> Result<CertificateChain, LinkError> {
        Err(LinkError::OutOfPlace { expected: "nothing" })
    }
}

struct World {
    directory: TempDir,
    _runtime: Runtime,
    device: Device<FakeLink>,
    told: Arc<Mutex<Told>>,
}

impl World {
    fn new() -> Self {
        Self::over(model())
    }

    fn over(model: Model) -> Self {
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
        sample::keep(&store, &rows::Parsed { good, bad: Vec::new() }).unwrap();
        let device = Device {
            id: DEVICE,
            store,
            policy: Policy::default(),
            guard: Guard::from_package(&model, &cancel).unwrap(),
            reviser: Reviser::from_package(&model).unwrap(),
            link: FakeLink { key: key.clone(), told: Arc::clone(&told) },
            expected: Expected { key: AggregatorKey::of(&key), base, layout: Arc::clone(model.layout()) },
            model,
            output: Output::Text,
            runtime: runtime.handle().clone(),
            cancel,
        };
        let world = Self { directory, _runtime: runtime, device, told };
        world.begin(1);
        world
    }

    /// The aggregator opens a round.
    fn begin(&self, round: u64) {
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

    fn tell(&self, change: impl FnOnce(&mut Told)) {
        change(&mut self.told.lock().unwrap());
    }

    fn visit(&self) -> Outcome {
        self.device.visit().unwrap().outcome
    }

    fn opened(&self) -> Vec<Open> {
        self.told.lock().unwrap().opened.clone()
    }

    fn has(&self, name: &str) -> bool {
        self.directory.path().join(name).exists()
    }
}

#[test]
fn a_kill_after_the_receipt_does_not_send_the_same_residual_twice() {
    let world = World::new();
    let saved = tempfile::tempdir().unwrap();
    let round = world.directory.path().join("round");
    world.tell(|told| told.snapshot = Some((round.clone(), saved.path().to_owned())));
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    let owed = world.device.store.read("residual.bin").unwrap().unwrap();
    assert_eq!(fs::read(saved.path().join("residual.bin")).unwrap(), owed);

    // The receipt is on disk, the rest is as the kill left it; the next round has begun meanwhile.
    copy_folder(saved.path(), &round);
    world.device.store.remove("residual.bin").unwrap();
    world.begin(2);
    world.tell(|told| (told.snapshot, told.is_away) = (None, true));
    assert!(world.device.visit().unwrap_err().is_transient());
    assert_eq!(world.device.store.read("residual.bin").unwrap().unwrap(), owed);
    world.tell(|told| told.is_away = false);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(2)));
    assert_eq!(world.visit(), Outcome::AlreadyDelivered(RoundId(2)));
    assert_eq!(world.opened().len(), 2);
}

#[test]
fn an_update_whose_receipt_was_lost_is_offered_again_when_its_round_is_over() {
    let world = World::new();
    world.tell(|told| told.is_away = true);
    assert!(world.device.visit().unwrap_err().is_transient());
    let packed = world.device.store.read("round/update.packed").unwrap().unwrap();
    let next = world.device.store.read("round/residual.bin").unwrap();
    world.begin(2);
    world.tell(|told| told.is_away = false);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    assert_eq!(world.opened()[0].digest, Digest::of(&packed));
    assert_eq!(world.device.store.read("residual.bin").unwrap(), next);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(2)));

    // If it was not taken in time, it is let go, and with it what it would have owed.
    world.begin(3);
    world.tell(|told| told.is_away = true);
    assert!(world.device.visit().unwrap_err().is_transient());
    let before = world.device.store.read("residual.bin").unwrap();
    world.begin(4);
    world.tell(|told| (told.is_away, told.refusal) = (false, Some(Refusal::StaleRound)));
    assert_eq!(world.visit(), Outcome::Refused(RoundId(4), Refusal::StaleRound));
    let rounds: Vec<u64> = world.opened().iter().map(|open| open.round.0).collect();
    assert_eq!(rounds, [1, 2, 3, 4]);
    assert_eq!(world.device.store.read("residual.bin").unwrap(), before);
}

#[test]
fn a_refused_update_is_not_made_again_and_the_next_round_is_taken() {
    let world = World::new();
    world.tell(|told| told.refusal = Some(Refusal::UpdateUnusable));
    for _ in 0..3 {
        assert_eq!(world.visit(), Outcome::Refused(RoundId(1), Refusal::UpdateUnusable));
    }
    assert_eq!(world.opened().len(), 1, "the same update was sent again");
    assert!(!world.has("round/pairs.json") && !world.has("residual.bin"));
    world.tell(|told| told.refusal = None);
    world.begin(2);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(2)));
}

#[test]
fn an_update_that_arrived_damaged_is_sent_again_but_not_for_ever() {
    let world = World::new();
    for (number, refusal) in [Refusal::DigestMismatch, Refusal::LengthMismatch].into_iter().enumerate() {
        let round = 1 + number as u64;
        world.begin(round);
        world.tell(|told| (told.refusal, told.refusals_left) = (Some(refusal), Some(2)));
        assert_eq!(world.visit(), Outcome::Delivered(RoundId(round)), "{refusal:?}");
        assert_eq!(world.opened().len(), 3 * (number + 1));
    }
    world.begin(3);
    world.tell(|told| (told.refusal, told.refusals_left) = (Some(Refusal::DigestMismatch), None));
    assert_eq!(world.visit(), Outcome::Refused(RoundId(3), Refusal::DigestMismatch));
    let opened = world.opened().split_off(6);
    assert_eq!(opened.len(), 4);
    assert!(opened.iter().all(|open| open == &opened[0]), "another update was sent");
}

#[test]
fn an_update_at_whose_end_the_certificate_is_over_is_kept() {
    let world = World::new();
    world.tell(|told| told.refusal = Some(Refusal::Expired));
    let error = world.device.visit().unwrap_err();
    assert_eq!((error.refusal(), error.is_transient()), (Some(Refusal::Expired), false));
    // With a fresh one, and even in a later round, it is offered again as it was.
    world.begin(2);
    world.tell(|told| told.refusal = None);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    let opened = world.opened();
    assert!(opened.len() == 2 && opened[0] == opened[1], "{opened:?}");
}

#[test]
fn a_receipt_for_another_device_is_none() {
    let world = World::new();
    world.tell(|told| told.signs_for = Some(DeviceId([2; 16])));
    let error = world.device.visit().unwrap_err();
    let error = std::error::Error::source(&error).unwrap().to_string();
    assert!(error.contains(&"02".repeat(16)) && error.contains(&"01".repeat(16)), "{error}");
    assert!(!world.has("receipts.jsonl"));
    world.tell(|told| told.signs_for = None);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
}

#[test]
fn the_window_of_an_updates_answer_counts_and_not_the_polls() {
    let world = World::new();
    assert_eq!(world.device.visit().unwrap().reconnect, AFTER_UPLOAD);
    assert_eq!(world.device.visit().unwrap().reconnect, ReconnectWindow::default());
    world.begin(2);
    world.tell(|told| told.refusal = Some(Refusal::StaleRound));
    assert_eq!(world.device.visit().unwrap().reconnect, AFTER_UPLOAD);
    world.begin(3);
    world.tell(|told| told.refusal = Some(Refusal::Busy));
    assert_eq!(world.device.visit().unwrap_err().reconnect(), Some(AFTER_UPLOAD));
}

#[test]
fn a_device_with_nothing_fit_to_learn_stays_in_the_federation() {
    let mut world = World::new();
    world.device.policy = Policy::from_toml("[filter]\nthreshold = 1e-9\naction = \"drop\"\n").unwrap();
    for _ in 0..2 {
        assert_eq!(world.visit(), Outcome::NoSamples);
    }
    assert!(world.has("round/given-up.json"));
    // The owner changes the policy: the same round is looked at again.
    world.device.policy = Policy::default();
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
}

#[test]
fn work_under_another_policy_is_not_sent() {
    let mut world = World::new();
    world.tell(|told| told.is_away = true);
    world.device.visit().unwrap_err();
    assert!(world.has("round/update.packed"));
    world.device.policy.train.samples_max = 3;
    world.tell(|told| told.is_away = false);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    assert_eq!(world.opened()[0].report.sampled, 3);
}

#[test]
fn a_damaged_file_of_a_round_is_made_again_with_the_same_result() {
    let world = World::new();
    world.tell(|told| told.is_away = true);
    world.device.visit().unwrap_err();
    let packed = world.device.store.read("round/update.packed").unwrap().unwrap();
    for name in ["pairs.json", "training.safetensors", "update.packed"] {
        world.device.store.write(&format!("round/{name}"), b"{\"damaged").unwrap();
    }
    world.tell(|told| told.is_away = false);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    assert_eq!(world.opened()[0].digest, Digest::of(&packed));
}

#[test]
fn a_round_for_another_base_is_refused_with_both_hashes() {
    let world = World::new();
    world.tell(|told| told.task.as_mut().unwrap().base.0[0] ^= 1);
    let error = world.device.visit().unwrap_err();
    let (task, own) = (world.told.lock().unwrap().task.unwrap().base, world.device.expected.base);
    let text = error.to_string();
    assert!(text.contains(&task.to_string()) && text.contains(&own.to_string()), "{text}");
    assert_eq!(edge_client::cli::exit::code(&error.into()), 3);
}

/// Keeps the last checkpoint.
#[derive(Default)]
struct Keep(Option<Vec<u8>>, usize);

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

#[test]
fn training_goes_on_to_the_same_bits_and_the_same_report() {
    let (model, cancel) = (model(), Cancel::new());
    let (guard, reviser) =
        (Guard::from_package(&model, &cancel).unwrap(), Reviser::from_package(&model).unwrap());
    let mut policy = Policy::default();
    policy.train.checkpoint_steps = 3;
    let start = Adapter::init(Arc::clone(model.layout()), 1);
    let task = train::TrainTask {
        steps_max: 6,
        warmup_steps: 0,
        step_rows: 2,
        row_tokens_max: 128,
        learning_rate: 2e-3,
        weight_decay: 0.0,
        clip_norm: 1.0,
        proximal_mu: 0.0,
        trainable: Trainable::Both,
        seed: 3,
        correction: None,
    };
    // Two of three are harmful: their revisions make preference pairs. Rows alone and pairs are both drawn.
    let some: Vec<Sample> = [samples("device-1.jsonl", 4), samples("hostile.jsonl", 8)]
        .concat()
        .into_iter()
        .map(|(_, sample)| sample)
        .collect();
    let screened = filter::screen(&guard, &policy, some, &cancel, |_| ()).unwrap();
    let (pairs, counts) = revise::revise(&guard, &reviser, &policy, screened, 0, &cancel, |_| ()).unwrap();
    assert!(counts.kept >= 3 && counts.revised + counts.refused >= 6, "{counts:?}");
    for method in [Method::Sft, Method::Dpo] {
        policy.train.method = method;
        let run = |pairs: &[TrainingPair], checkpoint: Option<&[u8]>| {
            let mut keep = Keep::default();
            let trained =
                train::train(&model, &start, pairs, &task, &policy.train, checkpoint, &mut keep, &cancel)
                    .unwrap();
            (trained, keep)
        };
        let (whole, keep) = run(&pairs, None);
        let (resumed, kept) = run(&pairs, keep.0.as_deref());
        assert_eq!((keep.1, kept.1), (6, 3), "steps made");
        assert_eq!(resumed.delta(), whole.delta(), "{method:?}");
        let mut summary = *resumed.summary();
        assert_eq!(std::mem::take(&mut summary.resumed_step), 3);
        assert_eq!(summary, *whole.summary(), "{method:?}");
        assert!(summary.tokens > 0 && whole.delta().norm() > 0.0, "{method:?}: {summary:?}");
        // Every step's tokens are told, not the last one's.
        let half = train::TrainTask { steps_max: 3, ..task.clone() };
        let mut watch = Keep::default();
        let half =
            train::train(&model, &start, &pairs, &half, &policy.train, None, &mut watch, &cancel).unwrap();
        assert!(half.summary().tokens < summary.tokens, "{method:?}");
        // What is no checkpoint is not gone on with.
        let (anew, kept) = run(&pairs, Some(b"not a checkpoint"));
        assert_eq!((anew.delta(), kept.1), (whole.delta(), 6));
    }
}

/// Over-long samples: the newest exchange counts, a reply loses its end, and only what has no token of a reply left is
/// left out, counted, while the others are learned from.
#[test]
fn samples_that_are_too_long_lose_what_does_not_fit() {
    let (model, cancel) = (model(), Cancel::new());
    let (guard, reviser) =
        (Guard::from_package(&model, &cancel).unwrap(), Reviser::from_package(&model).unwrap());
    let mut policy = Policy::default();
    // Everything is kept: what is tested is the length.
    policy.filter.enabled = false;
    let long = "the bread is in the box and the box is on the shelf. ".repeat(40);
    let chat = |turns: &[(&str, &str)]| -> Sample {
        let messages: Vec<_> = turns
            .iter()
            .flat_map(|(asked, replied)| {
                [("user", asked), ("assistant", replied)]
                    .map(|(role, content)| serde_json::json!({"role": role, "content": content}))
            })
            .collect();
        edge_client::forms::sample_of(serde_json::json!({ "messages": messages })).unwrap()
    };
    let learned = |some: Vec<Sample>| {
        let screened = filter::screen(&guard, &policy, some, &cancel, |_| ()).unwrap();
        let (pairs, _) = revise::revise(&guard, &reviser, &policy, screened, 0, &cancel, |_| ()).unwrap();
        let task = train::TrainTask {
            steps_max: 1,
            warmup_steps: 0,
            step_rows: 1,
            row_tokens_max: 64,
            learning_rate: 1e-3,
            weight_decay: 0.0,
            clip_norm: 1.0,
            proximal_mu: 0.0,
            trainable: Trainable::Both,
            seed: 0,
            correction: None,
        };
        let start = Adapter::init(Arc::clone(model.layout()), 1);
        let mut keep = Keep::default();
        train::train(&model, &start, &pairs, &task, &policy.train, None, &mut keep, &cancel)
            .map(|trained| *trained.summary())
    };
    let short = ("Where is the bread?", "In the box.");
    let newest = learned(vec![chat(&[short])]).unwrap();
    let with_older = learned(vec![chat(&[(&long, &long), short])]).unwrap();
    assert_eq!((with_older.tokens, with_older.too_long), (newest.tokens, 0), "the older exchange goes");
    let cut = learned(vec![chat(&[("Where?", &long)])]).unwrap();
    assert!(cut.too_long == 0 && (30..64).contains(&cut.tokens), "the reply's end goes: {cut:?}");
    let mixed = learned(vec![chat(&[(&long, "Yes.")]), chat(&[short])]).unwrap();
    assert_eq!((mixed.tokens, mixed.too_long), (newest.tokens, 1), "one is left out, the other learned");
    let nothing = learned(vec![chat(&[(&long, "Yes.")])]).unwrap_err().to_string();
    assert_eq!(nothing, "no training pairs: 1 were too long for 64 tokens");
}

/// What is rewritten is judged by the thresholds that flagged it: filtered again, all of it is kept.
#[test]
fn revisions_pass_the_owners_own_filter() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    fs::write(file("policy.toml"), "[filter]\nthreshold = 0.1\n").unwrap();
    let rows = fs::read_to_string(workspace().join("models/reference/demo/hostile.jsonl")).unwrap();
    fs::write(file("rows.jsonl"), rows.lines().take(40).collect::<Vec<_>>().join("\n")).unwrap();
    let edge = |verb: &str, rows: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_edge-client"))
            .args([verb, rows, "--json", "--threads", "1", "--policy", &file("policy.toml"), "--dir"])
            .arg(directory.path())
            .arg("--package")
            .arg(package())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let pairs = edge("revise", &file("rows.jsonl"));
    let revised: Vec<&str> = pairs.lines().filter(|line| line.contains("\"origin\":\"revised\"")).collect();
    assert!(revised.len() > 20 && revised.iter().all(|line| line.contains("rejected_response")));
    fs::write(file("revised.jsonl"), revised.join("\n")).unwrap();
    let again = edge("filter", &file("revised.jsonl"));
    assert!(again.lines().all(|line| line.contains("\"keep\"") || line.contains("\"filtered\"")), "{again}");
}

/// A runtime library that fails in the middle of a round: real ones, a run that is stopped in the filter and a gradient
/// graph that does not open any more when training begins.
#[test]
fn a_runtime_that_fails_in_the_middle_costs_no_sample() {
    let copied = tempfile::tempdir().unwrap();
    copy_folder(&package().join("adapters"), &copied.path().join("adapters"));
    for entry in fs::read_dir(package()).unwrap().map(Result::unwrap).filter(|entry| entry.path().is_file()) {
        fs::copy(entry.path(), copied.path().join(entry.file_name())).unwrap();
    }
    let library = Library::load_with(None, NonZeroUsize::new(1)).unwrap();
    let opened = Package::open(copied.path()).unwrap();
    let mut world = World::over(Model::open(&library, &opened, OpenOptions::default()).unwrap());
    let samples = |world: &World| sample::stored(&world.device.store).unwrap().len();
    let before = samples(&world);
    assert!(before > 0);

    world.device.cancel.cancel();
    let error = world.device.visit().unwrap_err();
    assert!(matches!(error, PipelineError::Filter(_)) && !error.is_transient(), "{error}");
    assert_eq!(samples(&world), before);
    assert!(!world.has("round/pairs.json"), "a sample passed unseen");

    world.device.cancel = Cancel::new();
    let graph = copied.path().join("train.onnx");
    let whole = fs::read(&graph).unwrap();
    fs::write(&graph, &whole[..whole.len() / 2]).unwrap();
    let error = world.device.visit().unwrap_err();
    assert!(matches!(error, PipelineError::Train(_)) && !error.is_transient(), "{error}");
    let told = format!("{:#}", anyhow::Error::new(error));
    assert!(told.contains("train failed") && told.contains("train.onnx"), "{told}");
    assert_eq!(samples(&world), before);
    // What was filtered and revised is kept; nothing was sent.
    assert!(world.has("round/pairs.json") && world.opened().is_empty());

    fs::write(&graph, &whole).unwrap();
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    assert_eq!(samples(&world), before);
}

impl World {
    /// The round that is open corrects gradients by a control variate of this value everywhere, after these rounds.
    fn correct(&self, value: f32, round: u64, merged: u64) {
        let mut control = Adapter::zeros(Arc::clone(self.device.model.layout()));
        control.values_mut().fill(value);
        let base = self.device.expected.base;
        let facts = AdapterFacts { base: base.0, kind: AdapterKind::Control };
        let file = disk::write(&control, &facts).unwrap();
        let (digest, length) = (Digest::of(&file), file.len() as u64);
        let control = Control { round: RoundId(round), merged, base, digest, length };
        let signed = SignedControl::sign(&self.device.link.key, control).unwrap();
        self.tell(|told| {
            told.control = file;
            told.task.as_mut().unwrap().scaffold = Scaffold::Control(signed);
        });
    }

    fn file(&self, name: &str) -> Option<Vec<u8>> {
        self.device.store.read(name).unwrap()
    }

    /// The device's control variate in one of its files.
    fn own(&self, name: &str) -> Adapter {
        disk::read(&self.file(name).unwrap()[8..]).unwrap().0
    }

    /// The change of the control variate in the last upload.
    fn change(&self) -> AdapterDelta {
        let offered = self.told.lock().unwrap().offered.clone();
        pair::decode(&offered, self.device.model.layout(), Trainable::BOnly, true).unwrap().1.unwrap()
    }
}

#[test]
fn a_control_variate_counts_when_its_round_was_merged_and_a_kill_changes_nothing_about_it() {
    let world = World::new();
    world.tell(|told| told.task.as_mut().unwrap().scaffold = Scaffold::Zero);
    // The network goes away between training and upload.
    world.tell(|told| told.is_away = true);
    assert!(world.device.visit().unwrap_err().is_transient());
    let next = world.file("round/control.bin").unwrap();
    assert!(!world.has("control.bin") && !world.has("control-pending.bin"));
    world.tell(|told| told.is_away = false);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    assert_eq!(world.file("control-pending.bin").unwrap(), next, "the receipt is there, the merge is not");
    assert!(!world.has("control.bin"));
    // It began at zero, so that what it has is what it sent: mean gradients, of B alone.
    let first = world.own("control-pending.bin");
    let sent = Adapter::zeros(Arc::clone(first.layout())).plus(&world.change(), 1.0).unwrap();
    assert_eq!(first, sent);
    assert!(sent.values().iter().any(|value| *value != 0.0));

    // Round 2 is told that round 1 was merged, and is itself never merged.
    world.begin(2);
    world.correct(0.001, 1, 0b1);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(2)));
    assert_eq!(world.own("control.bin"), first);
    let second = world.own("control-pending.bin");
    assert_eq!(second, first.plus(&world.change(), 1.0).unwrap());
    world.begin(3);
    world.correct(0.002, 1, 0b1);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(3)));
    assert_eq!(world.own("control.bin"), first, "what no merge took is forgotten");

    // A new beginning of the aggregator's.
    world.begin(4);
    world.tell(|told| told.task.as_mut().unwrap().scaffold = Scaffold::Zero);
    world.tell(|told| told.is_away = true);
    assert!(world.device.visit().unwrap_err().is_transient());
    assert!(!world.has("control.bin") && !world.has("control-pending.bin"));
}

#[test]
fn the_correction_moves_the_update_and_one_of_a_stranger_is_refused() {
    let offered = |value: f32| {
        let world = World::new();
        world.begin(2);
        world.correct(value, 1, 0b1);
        assert_eq!(world.visit(), Outcome::Delivered(RoundId(2)));
        let offered = world.told.lock().unwrap().offered.clone();
        pair::decode(&offered, world.device.model.layout(), Trainable::BOnly, true).unwrap().0
    };
    assert_ne!(offered(0.0), offered(0.1));

    let mut world = World::new();
    world.correct(0.1, 1, 0b1);
    world.device.expected.key = AggregatorKey::of(&SigningKey::from_bytes(&[8; 32]));
    let error = world.device.visit().unwrap_err();
    assert!(matches!(error, PipelineError::Control(_)), "{error}");
    assert!(world.opened().is_empty());
}

#[test]
fn what_is_owed_of_each_factor_waits_for_its_turn() {
    let world = World::new();
    let turn = |round: u64| {
        world.begin(round);
        world.tell(|told| told.task.as_mut().unwrap().mode = Mode::Rolora);
        assert_eq!(world.visit(), Outcome::Delivered(RoundId(round)));
        [world.file("residual.bin"), world.file("residual-a.bin")]
    };
    let [b, none] = turn(1);
    assert!(b.is_some() && none.is_none());
    let [still, a] = turn(2);
    assert!(still == b && a.is_some());
    let [moved, still] = turn(3);
    assert!(moved != b && still == a);
}
