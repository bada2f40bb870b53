//! Opens the device's directory, locks it, and seals what a program of before left in the clear. Of `store.rs`.

use std::{
    fs::{self, OpenOptions},
    path::Path,
    sync::Mutex,
    time::Duration,
};

use super::{PART, Store, StoreError, at, private};
use crate::{
    keys::{self, KeyPlace},
    units::Limit,
    vault::{self, Vault},
};

/// Tries to lock the directory, and the pause between two.
const LOCK_TRIES: usize = 5;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

impl Store {
    /// Opens the directory, made if absent, and locks it. Its key is in the directory.
    pub fn open(directory: &Path) -> Result<Self, StoreError> {
        Self::open_with(directory, KeyPlace::File(directory.join(keys::FILE)))
    }

    /// Opens the directory, made if absent, and locks it. What a program of before left in the clear is sealed.
    pub fn open_with(directory: &Path, key: KeyPlace) -> Result<Self, StoreError> {
        let mut store = Self::lock(directory, key)?;
        store.seal_all()?;
        Ok(store)
    }

    /// Opens the directory and locks it, without a look at its key.
    pub(crate) fn lock(directory: &Path, key: KeyPlace) -> Result<Self, StoreError> {
        let shared = Self::open_shared_with(directory, key)?;
        let path = directory.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(at("open", &path))?;
        for _ in 0..LOCK_TRIES {
            match fs4::FileExt::try_lock(&lock) {
                Ok(()) => return Ok(Self { _lock: Some(lock), ..shared }),
                // Whoever asks whether somebody works here holds it for a moment.
                Err(fs4::TryLockError::WouldBlock) => std::thread::sleep(LOCK_PAUSE),
                Err(fs4::TryLockError::Error(source)) => return Err(at("lock", &path)(source)),
            }
        }
        Err(StoreError::Locked(directory.to_owned()))
    }

    /// Opens the directory without the lock, to look at it while a daemon runs. Its key is in the directory.
    pub fn open_shared(directory: &Path) -> Result<Self, StoreError> {
        Self::open_shared_with(directory, KeyPlace::File(directory.join(keys::FILE)))
    }

    /// Opens the directory without the lock. The key is asked for when something sealed is read or written.
    pub fn open_shared_with(directory: &Path, key: KeyPlace) -> Result<Self, StoreError> {
        for part in ["identity", "samples", "round", "releases"] {
            let path = directory.join(part);
            fs::create_dir_all(&path).map_err(|source| StoreError::Directory { path, source })?;
        }
        Ok(Self {
            directory: directory.to_owned(),
            vault: Vault::new(directory, key),
            _lock: None,
            disk_max: Limit::OFF,
            seen: Mutex::default(),
            #[cfg(test)]
            steps_left: u32::MAX.into(),
        })
    }

    /// The same, which holds no more than its owner allows.
    #[must_use]
    pub fn within(self, disk_max: Limit) -> Self {
        Self { disk_max, ..self }
    }

    /// What it holds at most from now on.
    pub(crate) fn set_disk_max(&mut self, disk_max: Limit) {
        self.disk_max = disk_max;
    }

    /// Opens the directory as a process that is killed after so many durable steps.
    #[cfg(test)]
    pub(crate) fn open_dying(directory: &Path, steps: u32) -> Result<Self, StoreError> {
        let mut store = Self::lock(directory, KeyPlace::File(directory.join(keys::FILE)))?;
        store.steps_left = steps.into();
        store.seal_all()?;
        Ok(store)
    }

    /// Whether a process works here.
    pub fn is_worked_in(&self) -> Result<bool, StoreError> {
        let path = self.path("lock");
        let lock = private().write(true).open(&path).map_err(at("open", &path))?;
        match fs4::FileExt::try_lock_shared(&lock) {
            Ok(()) => Ok(false),
            Err(fs4::TryLockError::WouldBlock) => Ok(true),
            Err(fs4::TryLockError::Error(source)) => Err(at("lock", &path)(source)),
        }
    }

    /// A kill may come here.
    #[cfg_attr(
        not(test),
        expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "kills are the tests'")
    )]
    pub(super) fn step(&self) -> Result<(), StoreError> {
        #[cfg(test)]
        {
            use std::sync::atomic::Ordering;
            let spend = |left: u32| if left == u32::MAX { Some(left) } else { left.checked_sub(1) };
            if self.steps_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend).is_err() {
                return Err(at("outlive the test's kill in", &self.directory)(
                    std::io::ErrorKind::Interrupted.into(),
                ));
            }
        }
        Ok(())
    }

    /// Seals what lies in the clear, each file by one rename, and then says that it is done. Whatever a kill leaves of
    /// that is read by what it is.
    fn seal_all(&mut self) -> Result<(), StoreError> {
        self.vault.key()?;
        if self.vault.is_marked() {
            return Ok(());
        }
        self.remove_parts()?;
        for name in self.secrets()? {
            let written = fs::metadata(self.path(&name)).and_then(|known| known.modified());
            if let Some(content) = self.vault.read(&name)? {
                self.write(&name, &content)?;
                // A sample of before is as old as its file.
                if let Ok(written) = written {
                    let path = self.path(&name);
                    let file = OpenOptions::new().write(true).open(&path).map_err(at("open", &path))?;
                    file.set_modified(written).map_err(at("date", &path))?;
                }
            }
        }
        self.write(vault::MARK, b"")?;
        self.vault = Vault::new(&self.directory, self.vault.place().clone());
        self.vault.key().map(|_| ())
    }

    /// Every sealed file that there is, or that a program of before left in its place, but for the mark.
    pub(crate) fn secrets(&self) -> Result<Vec<String>, StoreError> {
        let mut names = Vec::new();
        for folder in vault::FOLDERS {
            names.extend(self.list(folder)?.into_iter().map(|name| format!("{folder}/{name}")));
        }
        names.extend(vault::FILES.iter().filter(|name| self.exists(name)).map(|&name| name.to_owned()));
        Ok(names)
    }

    /// Removes what writes that a kill cut short have left of sealed files.
    pub(crate) fn remove_parts(&self) -> Result<(), StoreError> {
        for folder in vault::FOLDERS {
            for name in self.entries(folder)?.iter().filter(|name| name.ends_with(PART)) {
                self.remove(&format!("{folder}/{name}"))?;
            }
        }
        vault::FILES.iter().try_for_each(|name| self.remove(&format!("{name}{PART}")))
    }

    /// Ends what nobody has the key of any more: the mark, then the key itself. Only where nothing sealed is left.
    pub(crate) fn unseal(&mut self) -> Result<bool, StoreError> {
        self.remove(vault::MARK)?;
        let place = self.vault.place().clone();
        let is_destroyed = place.destroy()?;
        self.vault = Vault::new(&self.directory, place);
        Ok(is_destroyed)
    }
}
