//! The device's directory: identity, samples, the round in progress, installed adapters.
//!
//! Everything is written to a temporary file, synced and renamed, so a kill or a full disk leaves the old file or
//! the new one, never half of either; only the owner can read it. What is marked * is sealed besides (`vault.rs`): its
//! bytes on the disk tell nothing without the key. One process at a time holds the lock. Used by `pipeline.rs` and the
//! commands.
//!
//! ```text
//! device/
//!   device.toml policy.toml           what the owner set
//!   identity/                         key, certificate, CA, address, aggregator's signing keys (`trust.rs`)
//!   store.key                         seals what is marked *, if no other place is named for it
//!   sealed *                          there once nothing of a person's lies in the clear
//!   samples/000001.jsonl … *          what was added, one file an `add` (`kept.rs`)
//!   used.samples *                    which of them a round has drawn
//!   round/ *                          of the round in progress: task, what is drawn, judged and rewritten so far, pairs,
//!                                     training checkpoint, packed update, or why it was given up; what an update that was
//!                                     let go would leave
//!   residual.bin residual-a.bin *     error feedback: what compression has not sent yet; of rounds of A alone
//!   control.bin control-pending.bin * SCAFFOLD: the control variate; the next one, until its round is merged
//!   personal.adapter * personal.samples *  the personal adapter, and what it was trained on
//!   forget.samples * forget-all       what the owner wants forgotten, until it is (`forget.rs`)
//!   releases/<digest>.{release,adapter}  signed releases and their adapters
//!   installed                         which of them is in use
//!   trouble.json                      the last few that could not be installed, and why (`trouble.rs`)
//!   receipts.jsonl                    one line an accepted update
//!   spent.json                        what the network has cost, by date (`spend.rs`); `.damaged`, one that was no account
//!   doing.json                        what `run` does and why it waits, for `status`
//!   paused                            while the owner wants no rounds
//!   forgotten                         a number drawn anew when everything was forgotten (`era.rs`)
//!   lock visit.lock samples.lock      held by the process that works here, while it visits the aggregator, while
//!   forget.lock personal.lock         samples are added or taken away, a wish to forget is written, the personal adapter
//! ```

mod error;
mod disk;
mod opening;

use std::{
    fs::{self, File},
    io::{self, Write},
    path::PathBuf,
    sync::Mutex,
};

use self::disk::{PART, bytes_below, private, replace_in_steps};
pub use self::error::StoreError;
pub(crate) use self::{
    disk::{Stamp, directory_of, replace, sync_directory},
    error::at,
};
use crate::{
    install::Seen,
    units::{Bytes, Limit},
    vault::{self, Vault},
};

/// The device's directory, locked for this process.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
    vault: Vault,
    _lock: Option<File>,
    /// What the owner lets all of it take.
    disk_max: Limit,
    /// The adapter that `install.rs` read last, so that not every poll reads it again.
    pub(crate) seen: Mutex<Option<Seen>>,
    /// Durable steps until a test's kill.
    #[cfg(test)]
    steps_left: std::sync::atomic::AtomicU32,
}

/// A lock of the directory; given back when this is dropped, or with the process.
#[derive(Debug)]
pub struct Held {
    _file: File,
}

impl Store {
    /// A file inside.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Whether there is such a file.
    pub fn exists(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    /// Writes a file as a whole, durably, sealed if it is a person's.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.path(name);
        if vault::is_secret(name) {
            replace_in_steps(&path, &self.vault.seal(name, bytes)?, || self.step())
        } else {
            replace_in_steps(&path, bytes, || self.step())
        }
    }

    /// Writes a file as a whole that need not outlive the machine's next start.
    pub(crate) fn write_fleeting(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let part = self.path(&format!("{name}{PART}"));
        private().write(true).truncate(true).open(&part)?.write_all(bytes)?;
        fs::rename(&part, self.path(name))
    }

    /// Puts a file in another's place, durably; fine when there is none. What is sealed is bound to its name: it is sealed
    /// anew, and after a kill both may be there. Then doing it again ends it.
    pub fn rename(&self, from: &str, to: &str) -> Result<(), StoreError> {
        if vault::is_secret(from) || vault::is_secret(to) {
            match self.read(from) {
                Ok(None) => return Ok(()),
                Ok(Some(content)) => self.write(to, &content)?,
                // What it was to take the place of is of before it, and counts no more either.
                Err(error @ StoreError::Sealed { .. }) => {
                    tracing::warn!("{error}; {to} begins anew");
                    self.remove(to)?;
                }
                Err(error) => return Err(error),
            }
            return self.remove(from);
        }
        let path = self.path(to);
        match fs::rename(self.path(from), &path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at("write", &path)(error)),
            _ => sync_directory(directory_of(&path)).map_err(at("sync", &path)),
        }
    }

    /// Refuses to let a folder grow beyond a bound.
    pub fn require_room(&self, folder: &str, more: u64, max: u64) -> Result<(), StoreError> {
        let mut got = more;
        for name in self.list(folder)? {
            let path = self.path(folder).join(name);
            got += fs::metadata(&path).map_err(at("measure", &path))?.len();
        }
        if got > max { Err(StoreError::Full { folder: self.path(folder), max, got }) } else { Ok(()) }
    }

    /// Refuses what would make the whole directory larger than its owner allows. For what can be large; receipts, wishes and
    /// accounts are written in any case.
    pub(crate) fn require_disk(&self, name: &str, more: u64) -> Result<(), StoreError> {
        let Limit(Some(max)) = self.disk_max else { return Ok(()) };
        let used = self.disk_bytes()?;
        if used.saturating_add(more) <= max.count() {
            return Ok(());
        }
        let (more, used) = (Bytes::of(more), Bytes::of(used));
        Err(StoreError::OverBudget {
            path: self.path(name),
            more,
            used,
            max,
            directory: self.directory.clone(),
        })
    }

    /// Refuses what the disk itself has no room for, before its bytes are moved.
    pub(crate) fn require_free(&self, name: &str, more: u64) -> Result<(), StoreError> {
        let free = fs4::available_space(&self.directory).map_err(at("measure", &self.directory))?;
        if free >= more {
            return Ok(());
        }
        Err(at("write", &self.path(name))(io::ErrorKind::StorageFull.into()))
    }

    /// Bytes of all files in the directory.
    pub fn disk_bytes(&self) -> Result<u64, StoreError> {
        bytes_below(&self.directory).map_err(at("measure", &self.directory))
    }

    /// [`Self::write`], if there is room for it beside the file whose place it takes.
    pub(crate) fn write_within(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.require_disk(name, bytes.len() as u64)?;
        self.write(name, bytes)
    }

    /// Reads a file; `None` when it does not exist.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        if vault::is_secret(name) {
            return self.vault.read(name);
        }
        let path = self.path(name);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(at("read", &path)(error)),
        }
    }

    /// Reads a file that can be made again: one that does not open is told on the log and is as good as none.
    pub(crate) fn read_remade(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        match self.read(name) {
            Err(error @ StoreError::Sealed { .. }) => {
                tracing::warn!("{error}; it is made again");
                Ok(None)
            }
            read => read,
        }
    }

    /// What tells a file from a later one; `None` when there is none.
    pub(crate) fn stamp(&self, name: &str) -> Result<Option<Stamp>, StoreError> {
        let path = self.path(name);
        Stamp::at(&path).map_err(at("look at", &path))
    }

    /// The same for a file that is only ever replaced: another name or owner for it make it no other.
    pub(crate) fn stamp_of_content(&self, name: &str) -> Result<Option<Stamp>, StoreError> {
        Ok(self.stamp(name)?.map(Stamp::of_content))
    }

    /// Removes a file, durably; fine when there is none.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        let path = self.path(name);
        self.step()?;
        match fs::remove_file(&path) {
            Ok(()) => sync_directory(directory_of(&path)).map_err(at("sync", &path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(at("remove", &path)(error)),
        }
    }

    /// Appends one line to a file that is not sealed, and syncs it. A line that a kill cut short is passed over by [`Self::lines`].
    pub fn append_line(&self, name: &str, line: &str) -> Result<(), StoreError> {
        debug_assert!(!vault::is_secret(name), "{name} is sealed");
        let path = self.path(name);
        let whole = self.read(name)?.unwrap_or_default();
        let end = whole.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let mut file = private().append(true).open(&path).map_err(at("open", &path))?;
        if end < whole.len() {
            // What a kill cut short would otherwise spoil the next line too.
            file.set_len(end as u64).map_err(at("repair", &path))?;
        }
        file.write_all(format!("{line}\n").as_bytes()).map_err(at("append to", &path))?;
        file.sync_data().and_then(|()| sync_directory(&self.directory)).map_err(at("sync", &path))
    }

    /// Makes a file that is not sealed these bytes, of which it has the first `had`: what follows is written behind them,
    /// and synced. A kill leaves some of it, or bytes that are none of these: whoever goes on from there checks the whole.
    pub(crate) fn extend(&self, name: &str, bytes: &[u8], had: usize) -> Result<(), StoreError> {
        debug_assert!(!vault::is_secret(name), "{name} is sealed");
        self.step()?;
        let path = self.path(name);
        let mut file = private().append(true).open(&path).map_err(at("open", &path))?;
        file.set_len(had as u64).map_err(at("shorten", &path))?;
        file.write_all(bytes.get(had..).unwrap_or_default()).map_err(at("append to", &path))?;
        let directory = directory_of(&path);
        file.sync_all().and_then(|()| sync_directory(directory)).map_err(at("sync", &path))
    }

    /// Bytes of a file; none when it does not exist.
    pub(crate) fn bytes_of(&self, name: &str) -> Result<u64, StoreError> {
        let path = self.path(name);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(metadata.len()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(at("measure", &path)(error)),
        }
    }

    /// The whole lines of a file; none when there is no file.
    pub fn lines(&self, name: &str) -> Result<Vec<String>, StoreError> {
        let bytes = self.read(name)?.unwrap_or_default();
        let end = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        Ok(String::from_utf8_lossy(&bytes[..end]).lines().map(str::to_owned).collect())
    }

    /// Names of the files in a folder, sorted, unfinished ones left out.
    pub fn list(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        let mut names = self.entries(folder)?;
        names.retain(|name| !name.ends_with(PART));
        Ok(names)
    }

    fn entries(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        let path = self.path(folder);
        let entries = match fs::read_dir(&path) {
            // The device's owner may have removed it with all it held.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(at("list", &path))?,
        };
        let mut names = Vec::new();
        for entry in entries {
            names.push(entry.map_err(at("list", &path))?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    /// Empties the folder of the round in progress, but for one file. The folder may have been removed by the device's
    /// owner, to forget what it held.
    pub fn clear_round_but(&self, kept: Option<&str>) -> Result<(), StoreError> {
        let path = self.path("round");
        fs::create_dir_all(&path).map_err(at("create", &path))?;
        let kept = kept.map(|name| self.path(name));
        for entry in fs::read_dir(&path).map_err(at("list", &path))? {
            let entry = entry.map_err(at("list", &path))?.path();
            if Some(&entry) != kept.as_ref() {
                self.step()?;
                fs::remove_file(&entry).map_err(at("remove", &entry))?;
            }
        }
        sync_directory(&path).map_err(at("sync", &path))
    }

    /// Held while the aggregator is visited. Waits until nobody else holds it.
    pub fn hold_visit(&self) -> Result<Held, StoreError> {
        self.hold("visit.lock")
    }

    /// The same, unless somebody else holds it.
    pub(crate) fn try_hold_visit(&self) -> Result<Option<Held>, StoreError> {
        let path = self.path("visit.lock");
        let file = private().write(true).open(&path).map_err(at("open", &path))?;
        match fs4::FileExt::try_lock(&file) {
            Ok(()) => Ok(Some(Held { _file: file })),
            Err(fs4::TryLockError::WouldBlock) => Ok(None),
            Err(fs4::TryLockError::Error(source)) => Err(at("lock", &path)(source)),
        }
    }

    /// Holds one of the locks that a process takes for a while. Waits until nobody else holds it.
    pub(crate) fn hold(&self, lock: &str) -> Result<Held, StoreError> {
        let path = self.path(lock);
        let file = private().write(true).open(&path).map_err(at("open", &path))?;
        fs4::FileExt::lock(&file).map_err(at("lock", &path))?;
        Ok(Held { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_second_process_is_kept_out_and_a_look_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let held = Store::open(directory.path()).unwrap();
        assert!(matches!(Store::open(directory.path()), Err(StoreError::Locked(_))));
        assert!(Store::open_shared(directory.path()).is_ok());
        drop(held);
        assert!(Store::open(directory.path()).is_ok());
    }

    #[test]
    fn an_unwritable_directory_is_a_clear_error() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "x").unwrap();
        let error = Store::open(&file.join("device")).unwrap_err();
        assert!(error.to_string().contains("cannot create"), "{error}");
    }

    #[test]
    fn a_bare_name_lies_in_the_working_directory() {
        assert_eq!(directory_of(Path::new("adapter.safetensors")), Path::new("."));
        assert_eq!(directory_of(Path::new("a/b")), Path::new("a"));
        // What was written must be findable: the directory is synced by this name.
        sync_directory(directory_of(Path::new("adapter.safetensors"))).unwrap();
    }

    /// `/dev/full` is a disk without room, behind the name of the temporary file.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_keeps_the_old_file_and_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.write("a", b"old").unwrap();
        std::os::unix::fs::symlink("/dev/full", store.path("a.part")).unwrap();
        let error = store.write("a", b"new").unwrap_err();
        let text = format!("{error}: {}", std::error::Error::source(&error).unwrap());
        assert!(text.contains("cannot write") && text.contains("No space left"), "{text}");
        assert_eq!(store.read("a").unwrap().unwrap(), b"old");
        // The part is gone: the next write finds room where there is some.
        store.write("a", b"new").unwrap();
        assert_eq!(store.read("a").unwrap().unwrap(), b"new");
    }

    #[test]
    fn a_folder_has_a_bound() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.write("releases/1", b"12345").unwrap();
        store.require_room("releases", 5, 10).unwrap();
        let error = store.require_room("releases", 6, 10).unwrap_err();
        assert!(matches!(error, StoreError::Full { max: 10, got: 11, .. }), "{error}");
    }

    #[test]
    fn the_directory_holds_no_more_than_its_owner_allows_and_says_what_does_not_fit() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let used = store.disk_bytes().unwrap();
        let store = store.within(Limit::of(used + 1_000));
        store.write_within("releases/a", &[1; 600]).unwrap();
        // The file whose place is taken is there until the new one is.
        let error = store.write_within("releases/a", &[2; 600]).unwrap_err();
        assert!(matches!(error, StoreError::OverBudget { .. }));
        let text = error.to_string();
        assert!(text.contains("releases/a needs 600B") && text.contains("[budget] disk"), "{text}");
        assert_eq!(store.read("releases/a").unwrap().unwrap(), [1; 600]);
        store.write_within("releases/b", &[2; 400]).unwrap();
        assert_eq!(store.disk_bytes().unwrap(), used + 1_000);
        // What must be written is.
        store.append_line("receipts.jsonl", "r").unwrap();
        store.within(Limit::OFF).write_within("releases/c", &[3; 5_000]).unwrap();
    }

    #[test]
    fn a_failed_write_keeps_the_old_file() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.write("a", b"old").unwrap();
        // The part's name is taken by a directory: the write fails as on a full disk, before the rename.
        fs::create_dir(directory.path().join("a.part")).unwrap();
        assert!(store.write("a", b"new").is_err());
        assert_eq!(store.read("a").unwrap().unwrap(), b"old");
    }

    #[test]
    fn a_line_cut_short_is_passed_over() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.append_line("l", "one").unwrap();
        store.append_line("l", "two").unwrap();
        let whole = fs::read(store.path("l")).unwrap();
        fs::write(store.path("l"), &whole[..whole.len() - 2]).unwrap();
        assert_eq!(store.lines("l").unwrap(), ["one"]);
        store.append_line("l", "three").unwrap();
        assert_eq!(store.lines("l").unwrap(), ["one", "three"]);
    }

    #[cfg(unix)]
    #[test]
    fn files_are_for_their_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.write("round/pairs.json", b"k").unwrap();
        store.append_line("receipts.jsonl", "r").unwrap();
        for name in ["round/pairs.json", "receipts.jsonl"] {
            assert_eq!(fs::metadata(store.path(name)).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
        }
    }
}
