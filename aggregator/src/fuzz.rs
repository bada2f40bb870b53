//! What must hold for any bytes at all that this crate reads, for readers that nothing outside the crate can call. Run by
//! the tests below and by the targets in `fuzz/`; there is no such module in an ordinary build.
//!
//! `fuzz/stored.rs` has what lies in the store, `fuzz/port.rs` what comes to the operator's port.

mod port;
mod stored;

use std::cell::LazyCell;
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

use commonweal_protocol::{AggregatorKey, DeviceId, Digest, RoundId, UploadKey};

pub use port::admin;
pub use stored::stored;

use crate::config::{Config, PREFIX, Settings};
use crate::evaluate::sets::{self, Conversation, ROW_BYTES_MAX, ROWS_MAX, SetError};
use crate::receive::partial::{PartialFiles, PartialMemory, Partials};
use crate::signer::Keys;
use crate::store::RealDisk;

#[cfg(test)]
#[path = "../../fuzz/mutate.rs"]
pub(crate) mod mutate;

/// The longest that may be said about any input: told to a person, it must not be the input again.
pub(crate) const WORDS_MAX: usize = 4096;

/// The length of an error and of its causes.
pub(crate) fn chain_bytes(error: &dyn std::error::Error) -> usize {
    error.to_string().len() + error.source().map_or(0, chain_bytes)
}

/// A file of settings, then after a zero byte the environment and after another what stands behind `--set`: settings mean
/// the same when they are written and read again, and every problem is told.
pub fn settings(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let mut parts = text.splitn(3, '\0');
    let mut part = || parts.next().unwrap_or_default();
    let (file, environment, set) = (part(), part(), part());
    if let Ok(config) = toml::from_str::<Config>(file) {
        let written = toml::to_string(&config).expect("settings have a form");
        let again = toml::from_str::<Config>(&written).expect("they are read again");
        // What is no number is no equal to itself.
        assert!(again == config || format!("{again:?}") == format!("{config:?}"));
    }
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let variables = lines(environment).into_iter().filter_map(|line| {
        let (name, value) = line.split_once('=')?;
        Some((format!("{PREFIX}{name}"), value.to_owned()))
    });
    let settings = match Settings::of_text(file, Path::new("aggregator.toml")) {
        Ok(settings) => settings,
        Err(error) => {
            assert!(error.to_string().contains("aggregator.toml"));
            Settings::new()
        }
    };
    let settings = settings.with_environment(variables).with_set(&lines(set));
    // Paths lead out of this test, whatever they are.
    let settings = settings.with_flags(|config| {
        (config.evaluate.harmful, config.evaluate.benign, config.evaluate.held_out) = (None, None, None);
        (config.align.redteam, config.align.replay) = (None, None);
        let storage = &mut config.storage;
        (storage.password_file, storage.credentials_file, storage.authority) = (None, None, None);
        config.package = "/nowhere".into();
    });
    assert!(settings.checked().is_err(), "there is no package");
    let all = settings.all();
    assert!(!all.is_empty() && all.iter().all(|setting| !setting.key.is_empty()));
    let _ = settings.formed();
}

/// A file of signing keys is refused shortly and without a word of it, or is the same when it is written and read again, and
/// its chain leads from the first key to the one that signs.
pub fn signing(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match Keys::from_pem(text) {
        Ok(keys) => {
            let written = keys.to_pem().expect("keys have a form");
            let again = Keys::from_pem(&written).expect("they are read again");
            assert_eq!(again.lineage(), keys.lineage());
            assert_eq!(AggregatorKey::of(again.signing()), keys.lineage().key());
        }
        Err(error) => assert!(chain_bytes(&error) < WORDS_MAX, "{error}"),
    }
}

/// A file of prompts or conversations gives each as many messages as a file of its size can have, or is refused by its name
/// and line.
pub fn evaluation_set(bytes: &[u8]) {
    let Some((which, rest)) = bytes.split_first() else { return };
    let Ok(text) = std::str::from_utf8(rest) else { return };
    match which % 3 {
        0 => check_set(sets::prompts_of(text, "set.csv"), text, "set.csv"),
        1 => check_set(sets::prompts_of(text, "set.jsonl"), text, "set.jsonl"),
        _ => check_set(sets::conversations_of(text, "set.jsonl"), text, "set.jsonl"),
    }
}

fn check_set(read: Result<Vec<Conversation>, SetError>, text: &str, file: &str) {
    match read {
        Ok(conversations) => {
            assert!((1..=ROWS_MAX).contains(&conversations.len()));
            assert!(conversations.iter().all(|conversation| !conversation.is_empty()));
            let said = conversations.iter().flatten().map(|message| message.content.len()).sum::<usize>();
            assert!(said <= text.len());
            let longest = |conversation: &Conversation| {
                conversation.iter().map(|said| said.content.len()).sum::<usize>()
            };
            assert!(conversations.iter().all(|conversation| longest(conversation) <= ROW_BYTES_MAX));
        }
        Err(error) => {
            assert!(error.to_string().contains(file), "{error}");
            assert!(chain_bytes(&error) < WORDS_MAX, "{error}");
        }
    }
}

/// Whatever is asked of the updates on their way in, by several devices and in any order, the files hold what the memory
/// holds; foreign files in the folder are left alone.
pub fn partial(bytes: &[u8]) {
    PARTIALS.with(|made| {
        let (directory, files) = &**made;
        let memory = PartialMemory::default();
        let keys = [1_u64, 2, u64::MAX]
            .map(|round| UploadKey { round: RoundId(round), digest: Digest([round as u8; 32]) });
        let devices = [DeviceId([1; 16]), DeviceId([0xff; 16])];
        let mut said = bytes;
        while let Some(([operation, which, value], rest)) = said.split_first_chunk() {
            said = rest;
            let key = &keys[usize::from(*which) % keys.len()];
            let device = &devices[usize::from(*which >> 4) % devices.len()];
            let offset = memory.offset(device, key).expect("memory");
            assert_eq!(files.offset(device, key).expect("a file"), offset);
            match operation % 6 {
                0 | 1 => {
                    // Mostly where the bytes held end.
                    let at = if operation & 0x80 == 0 { offset } else { u64::from(*value) };
                    let chunk = vec![*value; usize::from(*operation)];
                    let (ours, theirs) =
                        (files.append(device, key, at, &chunk), memory.append(device, key, at, &chunk));
                    assert_eq!(
                        ours.map_err(|error| error.to_string()),
                        theirs.map_err(|error| error.to_string())
                    );
                }
                2 => both(|held| held.discard(device, key).expect("a file"), files, &memory),
                3 => both(|held| held.discard_others(device, key).expect("a file"), files, &memory),
                4 => both(|held| held.discard_before(u64::from(*value)).expect("a file"), files, &memory),
                _ => {
                    let foreign = directory.path().join(format!("{value}-{which}.part.other"));
                    std::fs::write(foreign, [*value]).expect("a file");
                }
            }
            let whole = |held: &dyn Partials| {
                let mut whole = Vec::new();
                held.read(device, key).ok()?.read_to_end(&mut whole).ok()?;
                Some(whole)
            };
            assert_eq!(whole(files).unwrap_or_default(), whole(&memory).unwrap_or_default());
            assert_eq!(files.bytes_held().expect("files"), memory.bytes_held().expect("memory"));
        }
        for entry in std::fs::read_dir(directory.path()).expect("a folder") {
            std::fs::remove_file(entry.expect("an entry").path()).expect("a file");
        }
    });
}

fn both(change: impl Fn(&dyn Partials), files: &PartialFiles, memory: &PartialMemory) {
    change(files);
    change(memory);
}

thread_local! {
    static PARTIALS: LazyCell<(tempfile::TempDir, PartialFiles)> = LazyCell::new(|| {
        let directory = in_memory();
        let files = PartialFiles::open(directory.path(), Arc::new(RealDisk)).expect("a folder");
        (directory, files)
    });
}

/// A folder in memory where there is such a place: nothing here is worth a disk's time.
fn in_memory() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let directory = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    directory.expect("a directory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_target() {
        mutate::run("settings", 1_000, settings);
    }

    #[test]
    fn signing_target() {
        mutate::run("signing", 4_000, signing);
    }

    /// A file that is refused would test nothing. Its keys are nobody's: nothing trusts them.
    #[test]
    fn signing_seeds_are_read() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds/signing");
        let keys = Keys::from(commonweal_protocol::SigningKey::from_bytes(&[3; 32]));
        let followed = keys.rotated(1).and_then(|keys| keys.rotated(2)).unwrap();
        if std::env::var_os("COMMONWEAL_WRITE_SEEDS").is_some() {
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("first"), keys.to_pem().unwrap().as_bytes()).unwrap();
            std::fs::write(folder.join("followed"), followed.to_pem().unwrap().as_bytes()).unwrap();
        }
        for (name, number) in [("first", 0), ("followed", 2)] {
            let text = std::fs::read_to_string(folder.join(name)).unwrap();
            assert_eq!(Keys::from_pem(&text).unwrap().lineage().number().0, number, "{name}");
        }
    }

    #[test]
    fn evaluation_set_target() {
        mutate::run("evaluation_set", 20_000, evaluation_set);
    }

    #[test]
    fn partial_target() {
        mutate::run("partial", 1_000, partial);
    }

    #[test]
    fn stored_target() {
        mutate::run("stored", 10_000, stored);
    }

    #[test]
    fn admin_target() {
        mutate::run("admin", 2_000, admin);
    }

    /// Seeds that are refused would test nothing. `COMMONWEAL_WRITE_SEEDS=1` writes them anew.
    #[test]
    fn stored_seeds_are_read() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds/stored");
        for (name, bytes) in stored::seeds() {
            let path = folder.join(name);
            if std::env::var_os("COMMONWEAL_WRITE_SEEDS").is_some() {
                std::fs::create_dir_all(&folder).unwrap();
                std::fs::write(&path, &bytes).unwrap();
            }
            assert_eq!(std::fs::read(&path).unwrap(), bytes, "{}", path.display());
        }
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let is_found = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("found-"));
            assert!(is_found || stored::is_read(&std::fs::read(&path).unwrap()), "{}", path.display());
        }
    }
}
