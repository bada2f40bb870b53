//! Which files of the state directory are sealed, with which key, and how a directory of before comes to be.
//!
//! Of `store.rs`, whose reads and writes pass through here; `seal.rs` is the form, `keys.rs` the key. Sealed is whatever
//! holds a person's text or was computed from it. The file `sealed` is the last that a first start writes: from then on a
//! file that is not sealed is refused, and a key that does not open it is another one.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use rand::{TryRngCore, rngs::OsRng};

use crate::{
    keys::{Key, KeyPlace},
    seal::{self, SealError},
    store::{StoreError, at},
};

/// Says that nothing of a person's lies in the clear, and with which key.
pub(crate) const MARK: &str = "sealed";
/// Folders whose every file is sealed.
pub(crate) const FOLDERS: [&str; 2] = ["samples", "round"];
/// Files that are sealed besides.
pub(crate) const FILES: [&str; 8] = [
    "residual.bin",
    "residual-a.bin",
    "control.bin",
    "control-pending.bin",
    "personal.adapter",
    "personal.samples",
    "used.samples",
    "forget.samples",
];
/// The largest is the checkpoint of a training: the adapter at the round's start and now, and two moments, in 4 bytes
/// each. Of rank 64 over all linears of a model of 8 billion that is 2.7 GB.
const FILE_BYTES_MAX: u64 = 4 << 30;

/// Whether a file of the state directory is sealed.
pub(crate) fn is_secret(name: &str) -> bool {
    match name.split_once('/') {
        Some((folder, _)) => FOLDERS.contains(&folder),
        None => name == MARK || FILES.contains(&name),
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Vault {
    directory: PathBuf,
    place: KeyPlace,
    key: OnceLock<Key>,
    is_marked: bool,
}

impl Vault {
    pub(crate) fn new(directory: &Path, place: KeyPlace) -> Self {
        let is_marked = directory.join(MARK).exists();
        Self { directory: directory.to_owned(), place, key: OnceLock::new(), is_marked }
    }

    /// Whether all is sealed. If not, what lies in the clear is of before, and read as it is.
    pub(crate) fn is_marked(&self) -> bool {
        self.is_marked
    }

    pub(crate) fn place(&self) -> &KeyPlace {
        &self.place
    }

    /// The key. One is made where nothing was sealed yet; else it is the one that sealed the rest.
    pub(crate) fn key(&self) -> Result<&Key, StoreError> {
        if let Some(key) = self.key.get() {
            return Ok(key);
        }
        let key = if self.is_marked { self.proven()? } else { self.place.read_or_make()? };
        Ok(self.key.get_or_init(|| key))
    }

    fn proven(&self) -> Result<Key, StoreError> {
        let (directory, place) = (self.directory.clone(), self.place.to_string());
        let Some(key) = self.place.read()? else { return Err(StoreError::KeyLost { directory, place }) };
        let path = self.directory.join(MARK);
        let mark = read_bounded(&path).map_err(at("read", &path))?;
        match seal::open(&key, MARK, mark) {
            Ok(_) => Ok(key),
            Err(source) => Err(StoreError::KeyWrong { directory, place, source }),
        }
    }

    /// A file's bytes for the disk.
    pub(crate) fn seal(&self, name: &str, content: &[u8]) -> Result<Vec<u8>, StoreError> {
        let mut nonce = [0; seal::NONCE_BYTES];
        OsRng.try_fill_bytes(&mut nonce).map_err(|error| {
            at("draw a nonce for", &self.directory.join(name))(std::io::Error::other(error))
        })?;
        Ok(seal::seal(self.key()?, name, nonce, content))
    }

    /// A file's content from the disk; `None` when there is none.
    pub(crate) fn read(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.directory.join(name);
        let bytes = match read_bounded(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(at("read", &path)(error)),
        };
        let refused = |source| StoreError::Sealed { path: path.clone(), source };
        match seal::is_sealed(&bytes) {
            true => seal::open(self.key()?, name, bytes).map_err(refused).map(Some),
            false if self.is_marked => Err(refused(SealError::Plain)),
            false => Ok(Some(bytes)),
        }
    }
}

/// The size first: what a wrong file is is said before it is in memory.
fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    let bytes = fs::metadata(path)?.len();
    if bytes > FILE_BYTES_MAX {
        let text = format!("it has {bytes} bytes, expected at most {FILE_BYTES_MAX}");
        return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, text));
    }
    fs::read(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{keys, store::Store};

    fn before(directory: &Path) -> Vec<(&'static str, &'static [u8])> {
        let files: Vec<(&str, &[u8])> = vec![
            ("samples/000001.jsonl", b"{\"messages\":[]}\n"),
            ("samples/000002.jsonl", b"secret words\n"),
            ("round/pairs.json", b"secret pairs"),
            ("residual.bin", b"secret residual"),
            ("personal.adapter", b"secret adapter"),
        ];
        for (name, content) in &files {
            fs::create_dir_all(directory.join(name).parent().unwrap()).unwrap();
            fs::write(directory.join(name), content).unwrap();
        }
        for (name, content) in [("installed", "1 x"), ("receipts.jsonl", "{}\n"), ("policy.toml", "")] {
            fs::write(directory.join(name), content).unwrap();
        }
        // Of a write that a kill cut short.
        fs::write(directory.join("samples/000003.jsonl.part"), b"secret part").unwrap();
        fs::write(directory.join("residual.bin.part"), b"secret part").unwrap();
        files
    }

    /// Every byte in the directory.
    fn all(directory: &Path) -> Vec<u8> {
        let mut bytes = Vec::new();
        for entry in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
            bytes.extend(if entry.is_dir() { all(&entry) } else { fs::read(entry).unwrap() });
        }
        bytes
    }

    fn holds(directory: &Path, words: &str) -> bool {
        all(directory).windows(words.len()).any(|window| window == words.as_bytes())
    }

    #[test]
    fn a_directory_of_before_is_sealed_at_its_first_start() {
        let directory = tempfile::tempdir().unwrap();
        let files = before(directory.path());
        assert!(holds(directory.path(), "secret"));
        // Whoever only looks finds it as it was, and changes nothing.
        let look = Store::open_shared(directory.path()).unwrap();
        assert_eq!(look.read("residual.bin").unwrap().unwrap(), b"secret residual");
        assert!(holds(directory.path(), "secret residual"));
        let store = Store::open(directory.path()).unwrap();
        assert!(!holds(directory.path(), "secret"));
        for (name, content) in files {
            assert_eq!(store.read(name).unwrap().unwrap(), content, "{name}");
        }
        assert_eq!(fs::read(store.path("installed")).unwrap(), b"1 x");
        // From now on, what is not sealed was put there by somebody else.
        fs::write(store.path("samples/000003.jsonl"), b"planted").unwrap();
        drop(store);
        let store = Store::open(directory.path()).unwrap();
        let error = store.read("samples/000003.jsonl").unwrap_err();
        assert!(error.to_string().contains("000003.jsonl"), "{error}");
        assert!(matches!(error, StoreError::Sealed { source: SealError::Plain, .. }));
        assert_eq!(fs::read(store.path("samples/000003.jsonl")).unwrap(), b"planted", "nothing is lost");
    }

    /// A kill at every durable step of the first start, then another start.
    #[test]
    fn a_first_start_that_is_killed_loses_nothing() {
        for kill_at in 0.. {
            let directory = tempfile::tempdir().unwrap();
            let files = before(directory.path());
            let is_whole = Store::open_dying(directory.path(), kill_at).is_ok();
            let look = Store::open_shared(directory.path()).unwrap();
            for (name, content) in &files {
                assert_eq!(look.read(name).unwrap().unwrap(), *content, "{name}, killed at {kill_at}");
            }
            let store = Store::open(directory.path()).unwrap();
            assert!(!holds(directory.path(), "secret"), "killed at {kill_at}");
            for (name, content) in &files {
                assert_eq!(store.read(name).unwrap().unwrap(), *content, "{name}, killed at {kill_at}");
            }
            if is_whole {
                assert!(kill_at > 2 * files.len() as u32, "{kill_at} steps");
                return;
            }
        }
    }

    #[test]
    fn another_key_a_lost_key_and_a_damaged_file_are_told_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.write("samples/000001.jsonl", b"a\n").unwrap();
        store.write("samples/000002.jsonl", b"b\n").unwrap();
        drop(store);
        let (key, aside) = (directory.path().join(keys::FILE), directory.path().join("aside"));
        fs::rename(&key, &aside).unwrap();
        let error = Store::open(directory.path()).unwrap_err();
        assert!(
            matches!(error, StoreError::KeyLost { .. }) && error.to_string().contains(keys::FILE),
            "{error}"
        );
        assert!(!key.exists(), "no other key is made");
        KeyPlace::File(key.clone()).read_or_make().unwrap();
        let error = Store::open(directory.path()).unwrap_err();
        assert!(matches!(error, StoreError::KeyWrong { .. }), "{error}");
        fs::rename(&aside, &key).unwrap();

        let store = Store::open(directory.path()).unwrap();
        let path = store.path("samples/000001.jsonl");
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        let other = fs::read(store.path("samples/000002.jsonl")).unwrap();
        for damaged in [&flipped[..], &whole[..whole.len() - 1], &whole[..20], &other] {
            fs::write(&path, damaged).unwrap();
            let error = store.read("samples/000001.jsonl").unwrap_err();
            assert!(error.to_string().contains("000001.jsonl"), "{error}");
            assert_eq!(fs::read(&path).unwrap(), damaged, "nothing is lost");
            assert_eq!(store.read("samples/000002.jsonl").unwrap().unwrap(), b"b\n");
        }
        fs::write(&path, &whole).unwrap();
        assert_eq!(store.read("samples/000001.jsonl").unwrap().unwrap(), b"a\n");
    }

    #[test]
    fn what_is_of_a_person_is_sealed_and_what_others_read_is_not() {
        for name in ["samples/000001.jsonl", "round/anything", "residual.bin", "personal.adapter", MARK] {
            assert!(is_secret(name), "{name}");
        }
        for name in
            ["identity/credentials.pem", "releases/x.adapter", "installed", "receipts.jsonl", "paused"]
        {
            assert!(!is_secret(name), "{name}");
        }
    }

    #[test]
    fn a_sealed_file_is_renamed_with_its_content() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.write("round/residual.bin", b"owed").unwrap();
        store.rename("round/residual.bin", "residual.bin").unwrap();
        store.rename("round/residual.bin", "residual.bin").unwrap();
        assert_eq!(store.read("residual.bin").unwrap().unwrap(), b"owed");
        assert!(!store.path("round/residual.bin").exists());
    }

    #[test]
    fn a_damaged_residual_stops_nothing_and_is_not_sent_twice() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.write("residual.bin", b"owed before").unwrap();
        store.write("round/residual.bin", b"owed").unwrap();
        fs::write(store.path("round/residual.bin"), b"damaged").unwrap();
        store.rename("round/residual.bin", "residual.bin").unwrap();
        assert!(!store.exists("round/residual.bin") && !store.exists("residual.bin"));
    }
}
