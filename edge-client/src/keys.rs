//! The key that seals the store: a file that only its owner reads, or an entry of the kernel's keyring.
//!
//! Used by `store.rs`. The file is made once, whole or not at all. The keyring's entry is put there by the device's owner,
//! for the kernel forgets it at the next start: a key made there would take all that it sealed with it.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    str::FromStr,
};

use rand::{TryRngCore, rngs::OsRng};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::store::{directory_of, sync_directory};

/// The key's file, if no other place is named; in the state directory.
pub const FILE: &str = "store.key";
const KEY_BYTES: usize = 32;
/// Ends the name of a key that is being destroyed.
const GONE: &str = ".gone";
/// Before the name of an entry of the keyring.
const KEYRING: &str = "keyring:";

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The disk refused.
    #[error("cannot {action} key file {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Others may read it.
    #[error("key file {path} has mode {mode:03o}, expected 600: others may have read it; `chmod 600` it")]
    Mode {
        /// Which.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// It holds something else.
    #[error("{place} has {}, expected {KEY_BYTES} bytes", match .got { Some(got) => format!("{got} bytes"), None => "more".into() })]
    Length {
        /// Which.
        place: String,
        /// How many there are, if that is known.
        got: Option<usize>,
    },
    /// Nothing but zeros: what destroying a key leaves, which anybody knows.
    #[error("{place} has nothing but zeros, which is no key")]
    Zero {
        /// Which.
        place: String,
    },
    /// Nobody has put it there since the system's start.
    #[error(
        "keyring has no entry {name} for this user: `keyctl padd user {name} @u < KEYFILE` puts it there"
    )]
    Absent {
        /// Its name.
        name: String,
    },
    /// The kernel refused, or there is no keyring.
    #[error("keyring entry {name} cannot be read: {reason}")]
    Keyring {
        /// Its name.
        name: String,
        /// The kernel's word.
        reason: String,
    },
}

/// Seals and opens. Never shown, and wiped from memory at its end.
#[derive(Clone)]
pub struct Key(Zeroizing<[u8; KEY_BYTES]>);

impl Key {
    /// A key of these bytes.
    pub fn from_bytes(bytes: [u8; KEY_BYTES]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    pub(crate) fn bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    fn read(place: &str, bytes: &[u8]) -> Result<Self, KeyError> {
        let length = |_| KeyError::Length { place: place.to_owned(), got: Some(bytes.len()) };
        if bytes == [0; KEY_BYTES] {
            return Err(KeyError::Zero { place: place.to_owned() });
        }
        Ok(Self(Zeroizing::new(bytes.try_into().map_err(length)?)))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

/// Where the key is: a path, or `keyring:NAME`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum KeyPlace {
    /// A file of mode 600.
    File(PathBuf),
    /// An entry of type `user` in the user's keyring of the kernel.
    Keyring(String),
}

impl FromStr for KeyPlace {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix(KEYRING) {
            Some("") => Err("expected a name behind `keyring:`".into()),
            Some(name) => Ok(Self::Keyring(name.to_owned())),
            None if text.is_empty() => Err("expected a file or keyring:NAME".into()),
            None => Ok(Self::File(text.into())),
        }
    }
}

impl TryFrom<String> for KeyPlace {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<KeyPlace> for String {
    fn from(place: KeyPlace) -> Self {
        place.to_string()
    }
}

impl fmt::Display for KeyPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Keyring(name) => write!(f, "{KEYRING}{name}"),
        }
    }
}

impl KeyPlace {
    /// The key, if there is one.
    pub fn read(&self) -> Result<Option<Key>, KeyError> {
        match self {
            Self::File(path) => read_file(path),
            Self::Keyring(name) => read_keyring(name).map(Some),
        }
    }

    /// The key that is there, else a new one. Of two processes that do this at once, both get the same.
    pub fn read_or_make(&self) -> Result<Key, KeyError> {
        let path = match self {
            Self::Keyring(name) => return read_keyring(name),
            Self::File(path) => path,
        };
        if let Some(key) = read_file(path)? {
            return Ok(key);
        }
        make_file(path).map_err(|source| KeyError::Io { action: "make", path: path.clone(), source })?;
        let vanished = || io::Error::from(io::ErrorKind::NotFound);
        read_file(path)?.ok_or_else(|| KeyError::Io {
            action: "read",
            path: path.clone(),
            source: vanished(),
        })
    }

    /// Destroys the key's file: what it sealed cannot be opened any more. An entry of the keyring is its owner's.
    pub fn destroy(&self) -> Result<bool, KeyError> {
        let Self::File(path) = self else { return Ok(false) };
        let failed = |source| KeyError::Io { action: "destroy", path: path.clone(), source };
        let directory = directory_of(path);
        let mut gone = path.clone().into_os_string();
        gone.push(GONE);
        let gone = PathBuf::from(gone);
        // First under another name: whoever may not take it away leaves it as it is, and no kill leaves a spoilt key.
        match fs::rename(path, &gone) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => sync_directory(directory).map_err(failed)?,
        }
        match OpenOptions::new().write(true).open(&gone) {
            Ok(mut file) => {
                // As far as the disk obeys: an overwritten block is gone, a moved one is not.
                file.write_all(&[0; KEY_BYTES]).and_then(|()| file.sync_all()).map_err(failed)?;
                fs::remove_file(&gone).and_then(|()| sync_directory(directory)).map_err(failed)?;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(failed(error)),
        }
    }
}

fn read_file(path: &Path) -> Result<Option<Key>, KeyError> {
    let failed = |source| KeyError::Io { action: "read", path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&error.kind()) => {
            return Ok(None);
        }
        Err(error) => return Err(failed(error)),
    };
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Mode { path: path.to_owned(), mode });
        }
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(KEY_BYTES + 1));
    file.take(KEY_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    let place = format!("key file {}", path.display());
    if bytes.len() > KEY_BYTES {
        return Err(KeyError::Length { place, got: None });
    }
    Key::read(&place, &bytes).map(Some)
}

/// A new key under a name of its own, durable, then renamed to the real one, unless another process was first.
fn make_file(path: &Path) -> io::Result<()> {
    let mut bytes = Zeroizing::new([0; KEY_BYTES]);
    OsRng.try_fill_bytes(&mut *bytes).map_err(io::Error::other)?;
    let directory = directory_of(path);
    // Made for its owner alone, of mode 600.
    let mut part = tempfile::Builder::new().prefix(FILE).suffix(".part").tempfile_in(directory)?;
    part.write_all(&*bytes)?;
    part.as_file().sync_all()?;
    match part.persist_noclobber(path) {
        Err(error) if error.error.kind() != io::ErrorKind::AlreadyExists => Err(error.error),
        _ => sync_directory(directory),
    }
}

#[cfg(target_os = "linux")]
fn read_keyring(name: &str) -> Result<Key, KeyError> {
    use linux_keyutils::{KeyError as Refused, KeyRing, KeyRingIdentifier};
    let failed = |error| match error {
        Refused::KeyDoesNotExist => KeyError::Absent { name: name.to_owned() },
        other => KeyError::Keyring { name: name.to_owned(), reason: format!("{other:?}") },
    };
    let ring = KeyRing::from_special_id(KeyRingIdentifier::User, false).map_err(failed)?;
    let entry = ring.search(name).map_err(failed)?;
    let mut bytes = Zeroizing::new([0; KEY_BYTES + 1]);
    let got = entry.read(&mut *bytes).map_err(failed)?;
    let place = format!("keyring entry {name}");
    let bytes = bytes.get(..got).ok_or(KeyError::Length { place: place.clone(), got: Some(got) })?;
    Key::read(&place, bytes)
}

#[cfg(not(target_os = "linux"))]
fn read_keyring(name: &str) -> Result<Key, KeyError> {
    Err(KeyError::Keyring { name: name.to_owned(), reason: "only Linux has such a keyring".into() })
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn place() -> (tempfile::TempDir, PathBuf, KeyPlace) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE);
        let place = KeyPlace::File(path.clone());
        (directory, path, place)
    }

    #[test]
    fn a_key_is_made_once_and_for_its_owner() {
        let (directory, path, place) = place();
        assert!(place.read().unwrap().is_none());
        let keys: Vec<_> = std::thread::scope(|scope| {
            let making: Vec<_> = (0..8).map(|_| scope.spawn(|| place.read_or_make())).collect();
            making.into_iter().map(|made| made.join().unwrap()).collect()
        });
        let key = place.read_or_make().unwrap();
        assert_ne!(key.bytes(), &[0; KEY_BYTES]);
        for made in keys {
            assert_eq!(made.unwrap().bytes(), key.bytes());
        }
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(format!("{key:?}"), "Key");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "no part is left");
    }

    #[test]
    fn a_key_that_others_read_or_that_is_none_is_refused_by_name() {
        let (_directory, path, place) = place();
        place.read_or_make().unwrap();
        for mode in [0o640, 0o604, 0o660, 0o601] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = place.read().unwrap_err();
            assert!(matches!(error, KeyError::Mode { mode: got, .. } if got == mode), "{error}");
            assert!(error.to_string().contains(FILE), "{error}");
            // Nor is another made in its place.
            assert!(place.read_or_make().is_err());
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        for bytes in [0, 31, 33, 4096] {
            fs::write(&path, vec![1; bytes]).unwrap();
            let error = place.read().unwrap_err();
            assert!(matches!(error, KeyError::Length { .. }), "{error}");
        }
    }

    #[test]
    fn a_destroyed_key_is_gone() {
        let (_directory, path, place) = place();
        assert!(!place.destroy().unwrap());
        place.read_or_make().unwrap();
        assert!(place.destroy().unwrap() && !path.exists());
    }

    #[test]
    fn a_place_is_a_path_or_an_entry_of_the_keyring() {
        assert_eq!("keyring:mine".parse(), Ok(KeyPlace::Keyring("mine".into())));
        assert_eq!("/run/k".parse(), Ok(KeyPlace::File("/run/k".into())));
        assert!("keyring:".parse::<KeyPlace>().is_err() && "".parse::<KeyPlace>().is_err());
        for text in ["keyring:mine", "/run/k"] {
            assert_eq!(text.parse::<KeyPlace>().unwrap().to_string(), text);
        }
    }

    /// Containers often forbid the keyring: then this says that it was skipped.
    #[cfg(target_os = "linux")]
    #[test]
    fn the_kernels_keyring_gives_what_its_owner_put_there() {
        use linux_keyutils::{KeyRing, KeyRingIdentifier};
        let name = format!("commonweal-test-{}", std::process::id());
        let place = KeyPlace::Keyring(name.clone());
        let ring = KeyRing::from_special_id(KeyRingIdentifier::User, false);
        let Ok(entry) = ring.and_then(|ring| ring.add_key(&name, &[5; KEY_BYTES])) else {
            eprintln!("SKIPPED: this machine lets nobody use the kernel's keyring");
            return;
        };
        let read = place.read_or_make();
        entry.update(&[5; 7]).unwrap();
        let short = place.read_or_make();
        entry.invalidate().unwrap();
        match read {
            // An entry in a keyring that this session does not possess can be made and not read.
            Err(KeyError::Keyring { reason, .. }) => eprintln!("SKIPPED: the keyring refuses: {reason}"),
            read => {
                assert_eq!(read.unwrap().bytes(), &[5; KEY_BYTES]);
                assert!(matches!(short, Err(KeyError::Length { got: Some(7), .. })), "{short:?}");
                assert!(matches!(place.read(), Err(KeyError::Absent { .. } | KeyError::Keyring { .. })));
            }
        }
    }

    #[test]
    fn a_key_of_zeros_is_none_and_destroying_leaves_none() {
        let (directory, path, place) = place();
        let key = place.read_or_make().unwrap();
        assert!(place.destroy().unwrap() && place.read().unwrap().is_none());
        // A kill in the midst of it left the key under its other name: the next time ends it.
        fs::write(directory.path().join(format!("{FILE}{GONE}")), key.bytes()).unwrap();
        assert!(place.destroy().unwrap());
        assert!(!place.destroy().unwrap());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        fs::write(&path, [0; KEY_BYTES]).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(matches!(place.read_or_make(), Err(KeyError::Zero { .. })));
    }
}
