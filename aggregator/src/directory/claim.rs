//! Makes a state directory, for `init` and `backup`, where there is none.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use commonweal_transport::Authority;

use super::{Directory, DirectoryError, Lock, NEW};
use crate::signer::Keys;
use crate::store::sync_dir;

/// What a new federation would take the place of, whether or not there are settings beside it.
const PARTS: [&str; 5] =
    ["aggregator.db", "aggregator.db-wal", "signing.pem", "authority.pem", "blobs/temporary"];

/// A place in which a state directory is made: nobody else makes one there meanwhile, and no server runs there.
#[derive(Debug)]
pub struct Claim {
    directory: Directory,
    _lock: Lock,
}

impl Claim {
    /// Takes the place, if there is no federation. What an interrupted attempt left behind never served anyone, and goes.
    pub fn of(path: &Path) -> Result<Self, DirectoryError> {
        Directory::require_none(path)?;
        let failed = |source| DirectoryError::File { path: path.to_owned(), source };
        fs::create_dir_all(path).map_err(failed)?;
        let directory = Directory { path: path.to_owned() };
        let lock = directory.lock()?;
        // Somebody may have made one since.
        Directory::require_none(path)?;
        File::create(unfinished(path)).and_then(|file| file.sync_all()).map_err(failed)?;
        sync_dir(path).map_err(failed)?;
        for name in ["aggregator.db", "aggregator.db-wal", "aggregator.db-shm"] {
            match fs::remove_file(path.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
                _ => {}
            }
        }
        Ok(Self { directory, _lock: lock })
    }

    /// Draws its keys: everything but the configuration, which makes it complete and is written last.
    pub fn draw_keys(&self, now_ms: u64) -> Result<Directory, DirectoryError> {
        let directory = self.directory.clone();
        let path = directory.signing_keys_path();
        let pem =
            Keys::draw().to_pem().map_err(|source| DirectoryError::Keys { path: path.clone(), source })?;
        directory.write_secret(&path, pem.as_bytes())?;
        let path = directory.authority_path();
        let authority = Authority::create(now_ms)
            .map_err(|source| DirectoryError::Authority { path: path.clone(), source })?;
        directory.write_secret(&path, authority.to_pem().as_bytes())?;
        Ok(directory)
    }
}

/// There as long as a directory is not complete: the configuration before it has its name.
pub(super) fn unfinished(path: &Path) -> PathBuf {
    path.join(crate::config::FILE).with_extension(NEW)
}

impl Directory {
    /// Refuses a place where there is one already, or what is left of one.
    pub fn require_none(path: &Path) -> Result<(), DirectoryError> {
        let path = path.to_owned();
        if path.join(crate::config::FILE).exists() {
            return Err(DirectoryError::Present { path });
        }
        match Self::part(&path) {
            Some(found) if !unfinished(&path).exists() => Err(DirectoryError::Unconfigured { path, found }),
            _ => Ok(()),
        }
    }

    /// The first part of a federation that is there.
    pub(super) fn part(path: &Path) -> Option<&'static str> {
        PARTS.into_iter().find(|name| path.join(name).exists())
    }

    /// A new one, as [`Claim::draw_keys`] leaves it.
    pub fn create(path: &Path, now_ms: u64) -> Result<Self, DirectoryError> {
        Claim::of(path)?.draw_keys(now_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kill of `init` at any moment leaves what the next one completes.
    #[test]
    fn what_was_interrupted_while_it_was_made_is_made_anew() {
        let (_dir, directory) = made();
        let path = directory.path();
        for name in ["aggregator.db", "aggregator.db-wal"] {
            fs::write(path.join(name), "of the first attempt").unwrap();
        }
        let before = directory.signing_keys().unwrap().lineage().key();
        let again = Directory::create(path, 0).unwrap();
        assert!(!path.join("aggregator.db").exists() && !path.join("aggregator.db-wal").exists());
        assert_ne!(again.signing_keys().unwrap().lineage().key(), before);
        again.write_config("").unwrap();
        assert!(!unfinished(path).exists(), "it is whole");
    }

    #[test]
    fn a_federation_without_its_settings_is_left_as_it_is_by_name() {
        for name in PARTS {
            let dir = tempfile::tempdir().unwrap();
            let part = dir.path().join(name);
            fs::create_dir_all(part.parent().unwrap()).unwrap();
            fs::write(&part, "a federation's").unwrap();
            let made = Directory::create(dir.path(), 0).map(|_| ());
            for refused in [made, Directory::open(dir.path()).map(|_| ())] {
                let told = refused.unwrap_err().to_string();
                assert!(told.contains(&format!("expected aggregator.toml beside {name},")), "{told}");
                assert!(told.contains("aggregator config --defaults"), "{told}");
            }
            assert_eq!(fs::read_to_string(&part).unwrap(), "a federation's");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was added");
        }
    }

    #[test]
    fn nothing_is_made_where_a_server_or_another_attempt_holds_the_lock() {
        let (dir, directory) = made();
        let lock = directory.lock().unwrap();
        let kept = fs::read(directory.signing_keys_path()).unwrap();
        assert!(matches!(Directory::create(directory.path(), 0), Err(DirectoryError::Locked { .. })));
        assert_eq!(fs::read(directory.signing_keys_path()).unwrap(), kept);
        drop(lock);
        let claim = Claim::of(&dir.path().join("other")).unwrap();
        assert!(matches!(claim.directory.lock(), Err(DirectoryError::Locked { .. })), "until it is made");
    }

    fn made() -> (tempfile::TempDir, Directory) {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::create(&dir.path().join("state"), 1_700_000_000_000).unwrap();
        (dir, directory)
    }
}
