//! Files on the disk, whole or not at all: written beside, synced, renamed; and what tells one from another. Of `store.rs`.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::Path,
    time::SystemTime,
};

use super::{StoreError, at};

/// Ends the name of a file that is not whole yet.
pub(super) const PART: &str = ".part";

/// Replaces a file as a whole: temporary file beside it, fsync, rename, fsync of the directory.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    replace_in_steps(path, bytes, || Ok(()))
}

/// `step` is called where a kill would leave another state of the disk.
pub(super) fn replace_in_steps(
    path: &Path,
    bytes: &[u8],
    step: impl Fn() -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let directory = directory_of(path);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(PART);
    let part = directory.join(name);
    let give_up = |source| {
        // A part that does not fit is worth nothing; leaving it would keep the disk full.
        let _ = fs::remove_file(&part);
        at("write", path)(source)
    };
    step()?;
    write_synced(&part, bytes).map_err(give_up)?;
    step()?;
    fs::rename(&part, path).map_err(give_up)?;
    sync_directory(directory).map_err(at("sync", directory))
}

/// The folder that a file lies in; that of a bare name is the working directory.
pub(crate) fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A new file of ours is readable by its owner only: samples, pairs and what was trained on them are a person's own.
pub(super) fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.create(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = private().write(true).truncate(true).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(path)?.sync_all() } else { Ok(()) }
}

/// Bytes of the files in a folder and those below it. What goes away meanwhile has none.
pub(super) fn bytes_below(folder: &Path) -> io::Result<u64> {
    let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let entries = match fs::read_dir(folder) {
        Err(error) if gone(&error) => return Ok(0),
        entries => entries?,
    };
    let mut bytes = 0u64;
    for entry in entries {
        let entry = entry?;
        bytes = bytes.saturating_add(match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path())?,
            Ok(metadata) => metadata.len(),
            Err(error) if gone(&error) => 0,
            Err(error) => return Err(error),
        });
    }
    Ok(bytes)
}

/// Tells a file from the one that was there before: whatever writes or replaces it changes this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    length: u64,
    modified: Option<SystemTime>,
    /// Where there are such: the file's number, and when anything about it was last changed, which nobody can set back.
    changed: (u64, i64, i64),
}

impl Stamp {
    /// Of the file at a path; `None` when there is none.
    pub(crate) fn at(path: &Path) -> io::Result<Option<Self>> {
        match fs::metadata(path) {
            Ok(metadata) => Ok(Some(Self::of(&metadata))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Without what changes with a file's names, owner and permissions.
    pub(super) fn of_content(self) -> Self {
        let (number, ..) = self.changed;
        Self { changed: (number, 0, 0), ..self }
    }

    pub(super) fn of(metadata: &fs::Metadata) -> Self {
        #[cfg(unix)]
        let changed = {
            use std::os::unix::fs::MetadataExt as _;
            (metadata.ino(), metadata.ctime(), metadata.ctime_nsec())
        };
        #[cfg(not(unix))]
        let changed = (0, 0, 0);
        Self { length: metadata.len(), modified: metadata.modified().ok(), changed }
    }
}
