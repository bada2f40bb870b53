//! What must hold for any bytes at all that this crate reads, for readers that nothing outside the crate can call. Run by
//! the tests below and by the targets in `fuzz/`; there is no such module in an ordinary build.
//!
//! `serve/fuzz.rs` has those of the endpoint, `cli/fuzz.rs` those of the commands.

use std::{cell::LazyCell, collections::BTreeSet, fs, sync::Arc};

use commonweal_adapter::{
    AdapterLayout,
    layout::{Module, Target},
};
use commonweal_protocol::{AggregatorKey, BaseHash, DeviceId, KeyNumber, Lineage, SigningKey};
use commonweal_safety::GuardConfig;

use crate::{
    begun::{BEGUN, Begun},
    bus::{is_metered, value_of},
    cli::fuzz::{ADDRESS, address},
    doing, forms,
    install::{self, Expected},
    kept,
    keys::{self, Key},
    personal,
    pipeline::{GIVEN_UP, GivenUp, PACKED_REPORT, PAIRS, PackedReport},
    policy::Policy,
    returns::{LINE_BYTES_MAX, listen},
    rows::{self, Form, Parsed, ReadError},
    sample::{MESSAGE_BYTES_MAX, MESSAGES_MAX, Sample, SampleId},
    seal::{self, NONCE_BYTES},
    settings::SettingsFile,
    spend,
    store::Store,
    trouble,
    trust::{self, Trust},
    upload,
    work::Prepared,
};
pub use crate::{
    cli::fuzz::{evaluation_rows, typed},
    serve::fuzz::{door, request},
};

#[cfg(test)]
#[path = "../../fuzz/mutate.rs"]
pub(crate) mod mutate;

/// The longest that may be said about any input: told to a person, it must not be the input again.
pub(crate) const WORDS_MAX: usize = 4096;

/// The form that the first byte names, and the rest.
pub(crate) fn form_of(bytes: &[u8]) -> Option<(Form, &[u8])> {
    let (first, rest) = bytes.split_first()?;
    Some((if first % 2 == 0 { Form::Jsonl } else { Form::Csv }, rest))
}

/// Rows are given with lines of the file, in order; what is left out is told shortly.
pub(crate) fn check_rows<T>(read: &Result<Parsed<T>, ReadError>, bytes: &[u8]) {
    let lines = bytes.iter().filter(|&&byte| byte == b'\n' || byte == b'\r').count() + 1;
    match read {
        Ok(Parsed { good, bad }) => {
            assert!(good.len() + bad.len() <= lines, "more rows than lines");
            let places: [Vec<usize>; 2] =
                [good.iter().map(|(line, _)| *line).collect(), bad.iter().map(|bad| bad.line).collect()];
            for places in places {
                assert!(
                    places.is_sorted() && places.iter().all(|line| (1..=lines).contains(line)),
                    "{places:?}"
                );
            }
            assert!(bad.iter().all(|bad| bad.to_string().len() < WORDS_MAX));
        }
        Err(error) => assert!(error.to_string().len() < WORDS_MAX, "{error}"),
    }
}

/// A file of conversations gives samples that are within their bounds, and each is written and read again.
pub fn samples(bytes: &[u8]) {
    let Some((form, text)) = form_of(bytes) else { return };
    let read = rows::read(text, form, forms::sample_of);
    check_rows(&read, text);
    for (_, sample) in read.iter().flat_map(|parsed| &parsed.good) {
        check_sample(sample);
        let row = serde_json::to_value(sample).expect("a sample is a row");
        assert_eq!(forms::sample_of(row).expect("it is read again"), *sample);
    }
}

fn check_sample(sample: &Sample) {
    assert!((2..=MESSAGES_MAX).contains(&sample.turns().len()));
    assert!(sample.turns().iter().all(|turn| (1..=MESSAGE_BYTES_MAX).contains(&turn.content.len())));
    assert!(sample.rejected().is_none_or(|text| text.len() <= MESSAGE_BYTES_MAX));
    let replies: usize = sample.exchanges().iter().map(|exchange| exchange.replies.len()).sum();
    assert!(replies >= 1 && !sample.response().is_empty());
}

/// A policy, or a device's settings, is refused shortly or means the same when it is written and read again.
pub fn policy(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match Policy::from_toml(text) {
        Ok(policy) => {
            let written = toml::to_string(&policy).expect("a policy has a form");
            assert_eq!(Policy::from_toml(&written).expect("it is read again"), policy);
            GUARD.with(|guard| match policy.set_thresholds(&mut (**guard).clone()) {
                Ok(()) => {}
                Err(error) => assert!(error.to_string().contains("has a rule for"), "{error}"),
            });
        }
        Err(error) => assert!(chain_bytes(&error) < text.len() + WORDS_MAX, "{error}"),
    }
    if let Ok(settings) = toml::from_str::<SettingsFile>(text) {
        let written = toml::to_string(&settings).expect("settings have a form");
        assert_eq!(toml::from_str::<SettingsFile>(&written).expect("they are read again"), settings);
    }
}

/// The length of an error and of its causes.
pub(crate) fn chain_bytes(error: &dyn std::error::Error) -> usize {
    error.to_string().len() + error.source().map_or(0, chain_bytes)
}

/// A sealed file, whatever became of it on the disk, is refused or is the very file that was sealed.
pub fn sealed(bytes: &[u8]) {
    let key = Key::from_bytes(KEY);
    for name in NAMES {
        match seal::open(&key, name, bytes.to_vec()) {
            Ok(content) => {
                let nonce = bytes.get(9..9 + NONCE_BYTES).and_then(|nonce| nonce.try_into().ok());
                assert_eq!(seal::seal(&key, name, nonce.expect("a nonce"), &content), bytes, "forged");
            }
            Err(error) => assert!(error.to_string().len() < WORDS_MAX, "{error}"),
        }
    }
}

/// The key of the tests' device.
pub(crate) const KEY: [u8; 32] = [7; 32];

/// What a device finds in its directory, by the first byte of an input.
const NAMES: [&str; 15] = [
    "samples/000001.jsonl",
    "used.samples",
    BEGUN,
    PAIRS,
    PACKED_REPORT,
    "personal.adapter",
    "doing.json",
    "installed",
    "receipts.jsonl",
    "forget.samples",
    "trouble.json",
    spend::FILE,
    GIVEN_UP,
    trust::FILE,
    ADDRESS,
];

/// Any bytes in a file of the state directory, sealed as they would be, are refused by the file's name or mean the same
/// when they are written and read again.
pub fn kept_file(bytes: &[u8]) {
    let Some((which, content)) = bytes.split_first() else { return };
    let name = NAMES[usize::from(*which) % NAMES.len()];
    if let Err(error) = WORLD.with(|world| world.read(name, content)) {
        let file = name.rsplit('/').next().unwrap_or(name);
        assert!(error.contains(file) && error.len() < WORDS_MAX, "{name}: {error}");
    }
}

/// What the two programs print that are asked for the system's bus: an answer is a value of one line at most, and returns are
/// fewer than the lines, the first of which tells of none.
pub fn bus(bytes: &[u8]) {
    if let Some(value) = value_of(bytes) {
        assert!(value.len() < bytes.len() && !value.is_empty());
        let _ = is_metered(&value);
    }
    let mut count = 0;
    listen(bytes, || count += 1);
    // A line that is too long is read in pieces.
    let lines = bytes.split(|byte| *byte == b'\n').map(|line| line.len() / LINE_BYTES_MAX as usize + 1);
    assert!(count < lines.sum::<usize>());
}

thread_local! {
    static WORLD: LazyCell<World> = LazyCell::new(World::new);
    static GUARD: LazyCell<GuardConfig> = LazyCell::new(|| {
        GuardConfig::from_toml(include_str!("../../models/reference/guard.toml")).expect("the bundled guard")
    });
}

/// A device's directory.
struct World {
    store: Store,
    expected: Expected,
    _directory: tempfile::TempDir,
}

/// Of the tests' aggregator, which has had one key.
fn lineage() -> Lineage {
    Lineage::new(KeyNumber(0), AggregatorKey::of(&SigningKey::from_bytes(&[5; 32])))
}

impl World {
    fn new() -> Self {
        // In memory where there is such a place: nothing here is worth a disk's time.
        let memory = std::path::Path::new("/dev/shm");
        let directory = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        let directory = directory.expect("a directory");
        let key = directory.path().join(keys::FILE);
        fs::write(&key, KEY).expect("a key");
        #[cfg(unix)]
        fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600))
            .expect("a key of our own");
        let store = Store::open(directory.path()).expect("a store");
        let module = Module { target: Target::Q, inputs: 3, outputs: 4 };
        let layout = Arc::new(AdapterLayout::new(1, 2, 4.0, vec![module]).expect("a layout"));
        let trust = Trust::new(DeviceId([0; 16]), lineage());
        let expected = Expected { trust, base: BaseHash([0xba; 32]), layout };
        Self { store, expected, _directory: directory }
    }

    fn read(&self, name: &str, content: &[u8]) -> Result<(), String> {
        let path = self.store.path(name);
        let secret = crate::vault::is_secret(name);
        let lies = if secret {
            seal::seal(&Key::from_bytes(KEY), name, [9; NONCE_BYTES], content)
        } else {
            content.to_vec()
        };
        fs::write(&path, lies).expect("a file");
        let read: Result<(), String> = match name {
            "samples/000001.jsonl" => kept::all(&self.store).map_err(|error| error.to_string()).map(|all| {
                for kept in all {
                    check_sample(&kept.sample);
                }
            }),
            "used.samples" => ids(content, kept::used(&self.store).map_err(|error| error.to_string())),
            "forget.samples" => {
                ids(content, kept::read_ids(&self.store, name).map_err(|error| error.to_string()))
            }
            "personal.adapter" => personal::read(&self.store, self.expected.base)
                .map(drop)
                .map_err(|error| format!("{name}: {error}")),
            "doing.json" => {
                doing::told(&self.store);
                Ok(())
            }
            "trouble.json" => {
                let noted = trouble::noted(&self.store).map_err(|error| error.to_string());
                noted.map(|noted| {
                    fs::write(&path, serde_json::to_vec(&noted).expect("it has a form")).expect("a file");
                    assert_eq!(trouble::noted(&self.store).expect("it is read again"), noted);
                })
            }
            "installed" => install::installed_version(&self.store, &self.expected)
                .map(drop)
                .map_err(|error| error.to_string()),
            "receipts.jsonl" => {
                upload::delivered(&self.store).map_err(|error| error.to_string()).map(|all| {
                    let again =
                        all.iter().map(|one| serde_json::to_string(one).expect("a receipt is a line") + "\n");
                    fs::write(&path, again.collect::<String>()).expect("a file");
                    assert_eq!(upload::delivered(&self.store).expect("they are read again").len(), all.len());
                })
            }
            spend::FILE => spend::read(&self.store).map_err(|error| error.to_string()).map(|ledger| {
                let ledger = ledger.expect("it lies there");
                fs::write(&path, serde_json::to_vec(&ledger).expect("it has a form")).expect("a file");
                assert_eq!(spend::read(&self.store).expect("it is read again"), Some(ledger));
            }),
            trust::FILE => Trust::read(&self.store, DeviceId([0; 16]), lineage())
                .map(|trust| assert!(trust.knows(&lineage().key()), "the key of the enrolment is left out"))
                .map_err(|error| error.to_string()),
            ADDRESS => address(&self.store),
            GIVEN_UP => self.round::<GivenUp>(name),
            BEGUN => self.round::<Begun>(name),
            PAIRS => self.round::<Prepared>(name),
            _ => self.round::<PackedReport>(name),
        };
        fs::remove_file(&path).expect("no file");
        read
    }

    /// A stage's result, as the next one reads it.
    fn round<T: serde::Serialize + serde::de::DeserializeOwned>(&self, name: &str) -> Result<(), String> {
        match crate::pipeline::read_stage::<T>(&self.store, name) {
            Ok(None) => Ok(()),
            Ok(Some(read)) => {
                let written = serde_json::to_vec(&read).expect("what was read has a form");
                serde_json::from_slice::<T>(&written).expect("it is read again");
                Ok(())
            }
            Err(error) => Err(error.to_string()),
        }
    }
}

/// Names of samples, as many as there are room for.
fn ids(content: &[u8], read: Result<Option<BTreeSet<SampleId>>, String>) -> Result<(), String> {
    let ids = read?.unwrap_or_default();
    assert_eq!(content.len() % 16, 0);
    assert!(ids.len() <= content.len() / 16);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Ledger;
    use commonweal_adapter::{Adapter, AdapterFacts, AdapterKind, disk};
    use commonweal_protocol::{
        CompressSettings, Digest, Mode, RoundId, RoundTask, Scaffold, Start, TrainSettings, Version,
    };

    #[test]
    fn samples_target() {
        mutate::run("samples", 20_000, samples);
    }

    #[test]
    fn policy_target() {
        mutate::run("policy", 4_000, policy);
    }

    #[test]
    fn sealed_target() {
        mutate::run("sealed", 5_000, sealed);
    }

    #[test]
    fn bus_target() {
        mutate::run("bus", 10_000, bus);
    }

    #[test]
    fn kept_file_target() {
        mutate::run("kept_file", 10_000, kept_file);
    }

    /// What a device writes down whose aggregator has a second key.
    fn followed() -> Vec<u8> {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let mut longer = lineage();
        let next = AggregatorKey::of(&SigningKey::from_bytes(&[6; 32]));
        longer.succeed(&SigningKey::from_bytes(&[5; 32]), next, 1).unwrap();
        Trust::new(DeviceId([0; 16]), lineage()).follow(&store, longer.steps()).unwrap();
        fs::read(store.path(trust::FILE)).unwrap()
    }

    fn seeds() -> Vec<(&'static str, Vec<u8>)> {
        let seal = |content: &[u8]| seal::seal(&Key::from_bytes(KEY), NAMES[0], [9; NONCE_BYTES], content);
        let (expected, base) = WORLD.with(|world| (world.expected.clone(), world.expected.base));
        let adapter = Adapter::init(expected.layout, 1);
        let facts = AdapterFacts { base: base.0, kind: AdapterKind::Assistant };
        let train = TrainSettings {
            steps_max: 25,
            warmup_steps: 2,
            accumulation: 8,
            row_tokens_max: 256,
            learning_rate: 1e-3,
            weight_decay: 0.0,
            clip_norm: 1.0,
            proximal_mu: 0.0,
        };
        let compress =
            CompressSettings { bits: 3, block: 256, top_k: None, rotate: false, stochastic: false, level: 1 };
        let task = RoundTask {
            round: RoundId(1),
            base,
            start: Start { version: Version(0), digest: Digest([0; 32]), length: 1 },
            mode: Mode::Fedit,
            train,
            scaffold: Scaffold::Off,
            compress,
            seed: 0,
            deadline_ms: 0,
        };
        let begun = serde_json::json!({
            "task": task, "policy": Policy::default(), "aggregator": expected.trust.first(), "screening": Digest([1; 32]),
        });
        let mut ledger = Ledger::default();
        let day = |day| jiff::civil::date(2026, 11, day);
        ledger.charge(day(28), 1_000_000, true);
        ledger.charge(day(29), 5, false);
        ledger.look(day(28));
        vec![
            ("sealed/samples", seal(b"{}\n")),
            ("sealed/empty", seal(b"")),
            ("kept_file/personal", [vec![5], disk::write(&adapter, &facts).unwrap()].concat()),
            ("kept_file/task", [vec![2], serde_json::to_vec(&begun).unwrap()].concat()),
            ("kept_file/spent", [vec![11], serde_json::to_vec(&ledger).unwrap()].concat()),
            ("kept_file/succession", [vec![13], followed()].concat()),
        ]
    }

    /// Seeds that are refused would test nothing. `COMMONWEAL_WRITE_SEEDS=1` writes them anew.
    #[test]
    fn the_seeds_are_read() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds");
        for (name, bytes) in seeds() {
            let path = folder.join(name);
            if std::env::var_os("COMMONWEAL_WRITE_SEEDS").is_some() {
                fs::write(&path, &bytes).unwrap();
            }
            assert_eq!(fs::read(&path).unwrap(), bytes, "{}", path.display());
        }
        assert!(seal::open(&Key::from_bytes(KEY), NAMES[0], seeds().swap_remove(0).1).is_ok());
        let entries = |name: &str| fs::read_dir(folder.join(name)).unwrap();
        for path in entries("kept_file").map(|entry| entry.unwrap().path()) {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if !name.starts_with("found-") {
                let bytes = fs::read(&path).unwrap();
                let told = WORLD.with(|world| world.read(NAMES[usize::from(bytes[0])], &bytes[1..]));
                assert!(told.is_ok(), "{name}: {told:?}");
            }
        }
    }
}
