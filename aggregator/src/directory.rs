//! The state directory: its lock, its keys, its paths. The keys that sign are `signer`'s.
//!
//! ```text
//! STATE/  aggregator.toml  aggregator.db  blobs/  partials/
//!         authority.pem (0600)  signing.pem (0600)  admin.token (0600)  lock
//! ```
//!
//! `aggregator.toml` makes it complete. Until then `aggregator.new` is there, which becomes it by one renaming: so what was
//! interrupted while it was made is told from a federation whose settings were lost, and only the former is made anew.

mod claim;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use commonweal_transport::{Authority, IdentityError};

use crate::signer::{Keys, KeysError, Signer};
use crate::store::sync_dir;
use claim::unfinished;

pub use claim::Claim;

/// Shortest admin token: nobody guesses 16 characters that were drawn at random.
const TOKEN_BYTES_MIN: usize = 16;

/// How a file's name ends before it is whole.
const NEW: &str = "new";

/// Why a state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// There is none.
    #[error("{}: expected a state directory, make one with `aggregator init`", path.display())]
    Absent {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// There is one already.
    #[error("{}: is a state directory already", path.display())]
    Present {
        /// Where.
        path: PathBuf,
    },
    /// Whoever made it did not come to the end.
    #[error("{}: expected a whole state directory, but `aggregator init` or `aggregator backup`, whichever made it, was interrupted; run that same command again", path.display())]
    Unfinished {
        /// Where.
        path: PathBuf,
    },
    /// There is a federation, but not its settings.
    #[error(
        "{}: expected aggregator.toml beside {found}, which is a federation's: write it again, beginning with what \
         `aggregator config --defaults` prints (docs/operations.md, Disaster); a new federation needs another directory",
        path.display()
    )]
    Unconfigured {
        /// Where.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// It cannot be read or written.
    #[error("{}: cannot be read or written", path.display())]
    File {
        /// Which part.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A server runs on it.
    #[error("{}: another aggregator serves this directory", path.display())]
    Locked {
        /// The lock.
        path: PathBuf,
    },
    /// The signing keys are damaged, or no other can follow them.
    #[error("{}: expected the keys that sign for the aggregator", path.display())]
    Keys {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: KeysError,
    },
    /// Others can read the admin token, or it is too short to be one.
    #[error("{}: expected at least {TOKEN_BYTES_MIN} characters that their owner alone may read (chmod 600)", path.display())]
    Token {
        /// Which file.
        path: PathBuf,
    },
    /// Others can read what nobody else should.
    #[error("{}: expected a file that its owner alone may read (chmod 600)", path.display())]
    Shared {
        /// Which file.
        path: PathBuf,
    },
    /// The authority is damaged.
    #[error("{}: expected a certificate authority", path.display())]
    Authority {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: IdentityError,
    },
}

/// A state directory.
#[derive(Clone, Debug)]
pub struct Directory {
    path: PathBuf,
}

/// Held by the one server of a directory; released with the process, however it ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Directory {
    /// An existing one.
    pub fn open(path: &Path) -> Result<Self, DirectoryError> {
        if path.join(crate::config::FILE).is_file() {
            return Ok(Self { path: path.to_owned() });
        }
        let path = path.to_owned();
        Err(if unfinished(&path).exists() {
            DirectoryError::Unfinished { path }
        } else if let Some(found) = Self::part(&path) {
            DirectoryError::Unconfigured { path, found }
        } else {
            DirectoryError::Absent { path }
        })
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Unfinished uploads.
    pub fn partials(&self) -> PathBuf {
        self.path.join("partials")
    }

    pub(crate) fn signing_keys_path(&self) -> PathBuf {
        self.path.join("signing.pem")
    }

    fn authority_path(&self) -> PathBuf {
        self.path.join("authority.pem")
    }

    /// Writes a file that only its owner may read, whole or not at all.
    fn write_secret(&self, path: &Path, bytes: &[u8]) -> Result<(), DirectoryError> {
        self.write(path, bytes, 0o600)
    }

    /// Writes the configuration.
    pub fn write_config(&self, text: &str) -> Result<(), DirectoryError> {
        self.write(&self.path.join(crate::config::FILE), text.as_bytes(), 0o644)
    }

    fn write(&self, path: &Path, bytes: &[u8], mode: u32) -> Result<(), DirectoryError> {
        self.write_in_steps(path, bytes, mode, |_| ())
    }

    /// Between its steps, which it names, a kill leaves the old file or the new one, whole.
    fn write_in_steps(
        &self,
        path: &Path,
        bytes: &[u8],
        mode: u32,
        between: impl Fn(&'static str),
    ) -> Result<(), DirectoryError> {
        let failed = |source| DirectoryError::File { path: path.to_owned(), source };
        let temporary = path.with_extension(NEW);
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&temporary)
            .map_err(failed)?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed)?;
        between("written");
        fs::rename(&temporary, path).map_err(failed)?;
        between("renamed");
        sync_dir(&self.path).map_err(failed)
    }

    /// What signs receipts and releases, whatever key is in force when it is asked.
    pub fn signer(&self) -> Result<Signer, DirectoryError> {
        Signer::open(self)
    }

    pub(crate) fn signing_keys(&self) -> Result<Keys, DirectoryError> {
        Self::read_signing_keys(&self.signing_keys_path())
    }

    /// Nothing is signed with a key whose file could still be gone after the machine lost its power: a device that has
    /// followed to it could not go back.
    pub(crate) fn read_signing_keys(path: &Path) -> Result<Keys, DirectoryError> {
        let text = read(path)?;
        let keys =
            Keys::from_pem(&text).map_err(|source| DirectoryError::Keys { path: path.to_owned(), source })?;
        path.parent()
            .map_or(Ok(()), sync_dir)
            .map_err(|source| DirectoryError::File { path: path.to_owned(), source })?;
        Ok(keys)
    }

    /// A new key signs from now on, and the one before it is retired. One renaming, so that a kill leaves the one or the
    /// other; `between` is told the steps. Of two rotations at once, one waits for the other and follows it.
    pub fn rotate(&self, now_ms: u64, between: impl Fn(&'static str)) -> Result<Keys, DirectoryError> {
        let path = self.signing_keys_path();
        let failed = |source| DirectoryError::File { path: self.path.clone(), source };
        let directory = File::open(&self.path).map_err(failed)?;
        fs4::FileExt::lock(&directory).map_err(failed)?;
        let refused = |source| DirectoryError::Keys { path: path.clone(), source };
        let keys = self.signing_keys()?.rotated(now_ms).map_err(|error| refused(error.into()))?;
        let text = keys.to_pem().map_err(refused)?;
        between("drawn");
        self.write_in_steps(&path, text.as_bytes(), 0o600, between)?;
        Ok(keys)
    }

    /// The federation's certificate authority.
    pub fn authority(&self) -> Result<Authority, DirectoryError> {
        let path = self.authority_path();
        let text = read(&path)?;
        Authority::from_pem(&text).map_err(|source| DirectoryError::Authority { path, source })
    }

    /// What opens the operator's port; made now if there is none.
    pub fn admin_token(&self) -> Result<zeroize::Zeroizing<String>, DirectoryError> {
        let path = self.path.join("admin.token");
        if !path.exists() {
            let mut drawn = zeroize::Zeroizing::new([0_u8; 32]);
            rand::RngCore::fill_bytes(&mut rand::rng(), drawn.as_mut());
            let token = zeroize::Zeroizing::new(format!("{}\n", blake3::hash(drawn.as_ref()).to_hex()));
            self.write_secret(&path, token.as_bytes())?;
        }
        let failed = |source| DirectoryError::File { path: path.clone(), source };
        let is_shared = fs::metadata(&path).map_err(failed)?.mode() & 0o077 != 0;
        let token = zeroize::Zeroizing::new(read(&path)?.trim().to_owned());
        if is_shared || token.len() < TOKEN_BYTES_MIN {
            return Err(DirectoryError::Token { path });
        }
        Ok(token)
    }

    /// Copies keys, token and, last, the configuration, which makes a directory of `to`.
    pub fn copy_to(&self, to: &Path) -> Result<(), DirectoryError> {
        let copy = Self { path: to.to_owned() };
        for name in ["signing.pem", "authority.pem", "admin.token"] {
            let path = self.path.join(name);
            if name != "admin.token" || path.exists() {
                copy.write_secret(&to.join(name), read(&path)?.as_bytes())?;
            }
        }
        copy.write_config(&read(&self.path.join(crate::config::FILE))?)
    }

    /// Becomes the one server.
    pub fn lock(&self) -> Result<Lock, DirectoryError> {
        let path = self.path.join("lock");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|source| DirectoryError::File { path: path.clone(), source })?;
        match fs4::FileExt::try_lock(&file) {
            Ok(()) => Ok(Lock { _file: file }),
            Err(fs4::TryLockError::WouldBlock) => Err(DirectoryError::Locked { path }),
            Err(fs4::TryLockError::Error(source)) => Err(DirectoryError::File { path, source }),
        }
    }
}

/// A secret's file, which others must not be able to read.
pub(crate) fn read_private(path: &Path) -> Result<zeroize::Zeroizing<String>, DirectoryError> {
    let failed = |source| DirectoryError::File { path: path.to_owned(), source };
    if fs::metadata(path).map_err(failed)?.mode() & 0o077 != 0 {
        return Err(DirectoryError::Shared { path: path.to_owned() });
    }
    read(path)
}

/// Keys, tokens and passwords are smaller by far.
const SECRET_BYTES_MAX: u64 = 1 << 20;

fn read(path: &Path) -> Result<zeroize::Zeroizing<String>, DirectoryError> {
    let failed = |source| DirectoryError::File { path: path.to_owned(), source };
    let mut text = zeroize::Zeroizing::new(String::new());
    // A device or a pipe in its place ends too.
    let file = File::open(path).map_err(failed)?;
    file.take(SECRET_BYTES_MAX + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > SECRET_BYTES_MAX {
        return Err(failed(io::Error::other(format!("expected at most {SECRET_BYTES_MAX} bytes"))));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn made() -> (tempfile::TempDir, Directory) {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::create(&dir.path().join("state"), 1_700_000_000_000).unwrap();
        (dir, directory)
    }

    #[test]
    fn secrets_are_for_their_owner_only() {
        let (_dir, directory) = made();
        directory.rotate(1, |_| ()).unwrap();
        for path in [directory.signing_keys_path(), directory.authority_path()] {
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{path:?}");
        }
        directory.signer().unwrap();
        directory.authority().unwrap();
    }

    #[test]
    fn the_admin_token_is_made_once_and_for_its_owner_only() {
        let (_dir, directory) = made();
        let token = directory.admin_token().unwrap();
        assert_eq!((token.len(), directory.admin_token().unwrap()), (64, token.clone()));
        let path = directory.path().join("admin.token");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(directory.admin_token(), Err(DirectoryError::Token { .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "short\n").unwrap();
        assert!(directory.admin_token().unwrap_err().to_string().contains("at least 16 characters"));
    }

    #[test]
    fn a_directory_is_made_once_and_complete_with_its_configuration() {
        let (dir, directory) = made();
        assert!(matches!(Directory::open(dir.path()), Err(DirectoryError::Absent { .. })));
        let unfinished = Directory::open(directory.path()).unwrap_err();
        assert!(matches!(unfinished, DirectoryError::Unfinished { .. }));
        // `init` over what an interrupted `backup` has copied would take its keys away.
        assert!(unfinished.to_string().contains("`aggregator backup`"), "{unfinished}");
        directory.write_config("").unwrap();
        Directory::open(directory.path()).unwrap();
        assert!(matches!(Directory::create(directory.path(), 0), Err(DirectoryError::Present { .. })));
    }

    #[test]
    fn one_server_at_a_time() {
        let (_dir, directory) = made();
        let lock = directory.lock().unwrap();
        assert!(matches!(directory.lock(), Err(DirectoryError::Locked { .. })));
        drop(lock);
        directory.lock().unwrap();
    }

    #[test]
    fn a_place_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = Directory::create(&file.join("state"), 0).unwrap_err();
        assert!(error.to_string().contains("state: cannot be read or written"), "{error}");
    }

    #[test]
    fn a_damaged_key_is_refused() {
        let (_dir, directory) = made();
        fs::write(directory.signing_keys_path(), "nonsense").unwrap();
        assert!(matches!(directory.signer(), Err(DirectoryError::Keys { .. })));
        assert!(matches!(directory.rotate(1, |_| ()), Err(DirectoryError::Keys { .. })));
        assert_eq!(fs::read_to_string(directory.signing_keys_path()).unwrap(), "nonsense");
    }

    #[test]
    fn rotations_at_once_follow_one_another() {
        let (_dir, directory) = made();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| directory.rotate(1, |_| ()).unwrap());
            }
        });
        assert_eq!(directory.signing_keys().unwrap().lineage().steps().len(), 8);
    }
}
