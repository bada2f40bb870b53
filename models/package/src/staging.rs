//! A directory that appears whole or not at all: it is filled under a hidden name beside its place and renamed when
//! complete. `write.rs` makes packages this way, the compiler's `random` makes checkpoints.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// A directory in the making. Dropping it unpublished removes everything in it.
#[derive(Debug)]
pub struct Staging {
    out: PathBuf,
    hidden: TempDir,
}

/// Why a directory was not made. Nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum StagingError {
    /// The place is taken.
    #[error("{} already exists and is not an empty directory", path.display())]
    Occupied {
        /// The place.
        path: PathBuf,
    },
    /// The disk, its permissions or its space.
    #[error("{} cannot be written", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Staging {
    /// Begins a directory at `out`, which must be free or an empty directory; missing parents are made.
    pub fn create(out: &Path) -> Result<Self, StagingError> {
        let failed = |path: &Path, source| StagingError::Write { path: path.into(), source };
        let out = std::path::absolute(out).map_err(|source| failed(out, source))?;
        match fs::read_dir(&out).map(|mut entries| entries.next().is_none()) {
            Ok(true) => {}
            Ok(false) => return Err(StagingError::Occupied { path: out }),
            Err(_) if out.is_file() => return Err(StagingError::Occupied { path: out }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(failed(&out, source)),
        }
        let parent = out.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent).map_err(|source| failed(parent, source))?;
        // A sibling, so that the rename stays within one file system.
        let hidden = tempfile::Builder::new()
            .prefix(".unfinished-")
            .tempdir_in(parent)
            .map_err(|source| failed(parent, source))?;
        Ok(Self { out, hidden })
    }

    /// The directory while it is being filled.
    pub fn path(&self) -> &Path {
        self.hidden.path()
    }

    /// The directory's name once it is published, for messages.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// Writes one file: `fill` gets it open, and its final path for messages.
    pub fn write<E: From<StagingError>>(
        &self,
        name: &str,
        fill: impl FnOnce(&mut File, &Path) -> Result<(), E>,
    ) -> Result<(), E> {
        let (path, shown) = (self.path().join(name), self.out.join(name));
        let failed = |source| StagingError::Write { path: shown.clone(), source };
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(failed)?;
        }
        let mut file = File::create(&path).map_err(failed)?;
        fill(&mut file, &shown)?;
        // The file and its name: a package that appears after a crash is whole.
        file.sync_all().map_err(failed)?;
        sync_parent(&path).map_err(failed)?;
        Ok(())
    }

    /// Writes one file from memory.
    pub fn write_bytes(&self, name: &str, bytes: &[u8]) -> Result<(), StagingError> {
        self.write(name, |file, path| {
            io::Write::write_all(file, bytes)
                .map_err(|source| StagingError::Write { path: path.into(), source })
        })
    }

    /// Gives the directory its name.
    pub fn publish(self) -> Result<(), StagingError> {
        let Self { out, hidden } = self;
        let failed = |source| StagingError::Write { path: out.clone(), source };
        make_readable(hidden.path()).map_err(failed)?;
        fs::rename(hidden.path(), &out).map_err(|source| match source.kind() {
            io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => {
                StagingError::Occupied { path: out.clone() }
            }
            _ => failed(source),
        })?;
        // It has another name now; there is nothing left to remove.
        let _ = hidden.keep();
        sync_parent(&out).map_err(failed)
    }
}

/// Writes a whole file beside its name, then gives it the name.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent)?;
    let mut file = tempfile::Builder::new().prefix(".unfinished-").tempfile_in(parent)?;
    io::Write::write_all(&mut file, bytes)?;
    #[cfg(unix)]
    file.as_file().set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    sync_parent(path)
}

/// Temporary directories are private to their maker; a package is not a secret.
fn make_readable(directory: &Path) -> io::Result<()> {
    #[cfg(unix)]
    fs::set_permissions(directory, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    #[cfg(not(unix))]
    let _ = directory;
    Ok(())
}

/// Makes a rename durable; only Unix lets a directory be synchronized.
fn sync_parent(path: &Path) -> io::Result<()> {
    #[cfg(unix)]
    if let Some(parent) = path.parent() {
        File::open(parent)?.sync_all()?;
    }
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}
