//! `Blob` as files named by their BLAKE3 digest: written to a temporary name, fsynced, renamed, and the
//! directory fsynced, so that a name that exists always holds the whole blob.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use commonweal_protocol::Digest;

use super::{Access, Blob, MARK, NAME_BYTES_MAX, PAGE_MAX, Put, StoreError, owner_of};

/// A temporary file that was not written to for so long belongs to nobody.
const LEFT_OVER: Duration = Duration::from_secs(24 * 3600);

/// The only door to disk space, so that tests can fill it.
pub trait Disk: Send + Sync + std::fmt::Debug {
    /// Writes all of `bytes` at the file's position.
    fn write(&self, file: &mut File, bytes: &[u8]) -> io::Result<()>;
    /// Bytes that an ordinary user may still write below `dir`.
    fn free_bytes(&self, dir: &Path) -> io::Result<u64>;
}

/// The machine's disk.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn write(&self, file: &mut File, bytes: &[u8]) -> io::Result<()> {
        file.write_all(bytes)
    }

    fn free_bytes(&self, dir: &Path) -> io::Result<u64> {
        fs4::available_space(dir)
    }
}

/// How long a removal in a shared folder may be under way.
const LATE: Duration = Duration::from_secs(10);

/// Blobs in a directory, fanned out by the digest's first byte.
#[derive(Debug)]
pub struct FileBlob {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    /// Whether others may store and delete here too.
    access: Access,
    next_temporary: AtomicU64,
}

impl FileBlob {
    /// Opens or creates `dir`. A sole owner also removes what an interrupted write left behind; others what is so old
    /// that nobody writes it any more.
    pub fn open(dir: &Path, disk: Arc<dyn Disk>, access: Access) -> Result<Self, StoreError> {
        let failed = |error: io::Error| StoreError::not_done("open", &dir.display().to_string(), error);
        let temporary = dir.join("temporary");
        if access == Access::Exclusive && temporary.exists() {
            fs::remove_dir_all(&temporary).map_err(failed)?;
        }
        fs::create_dir_all(&temporary).map_err(failed)?;
        for file in fs::read_dir(&temporary).map_err(failed)? {
            let file = file.map_err(failed)?;
            let age = file.metadata().and_then(|about| about.modified()).map(|written| written.elapsed());
            if matches!(age, Ok(Ok(age)) if age > LEFT_OVER) {
                // Another process may do the same at the same time.
                drop(fs::remove_file(file.path()));
            }
        }
        Ok(Self { dir: dir.to_owned(), disk, access, next_temporary: AtomicU64::new(0) })
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        self.dir.join(&name[..2]).join(name)
    }

    fn temporary(&self, name: &str) -> PathBuf {
        let number = self.next_temporary.fetch_add(1, Ordering::Relaxed);
        // Several machines may share the folder, where the same number can be two processes.
        let mark = format!("{name}.{}.{number}.{:016x}", std::process::id(), rand::random::<u64>());
        self.dir.join("temporary").join(mark)
    }

    /// The time by the clock that files are dated by, which may be another machine's.
    fn now(&self) -> io::Result<SystemTime> {
        let path = self.temporary("clock");
        // Nothing is written: a full disk is swept too.
        let now = File::create_new(&path).and_then(|file| file.metadata()?.modified());
        drop(fs::remove_file(&path));
        now
    }

    fn write_temporary(
        &self,
        path: &Path,
        digest: &Digest,
        length: u64,
        source: &mut dyn Read,
    ) -> Result<(), StoreError> {
        let name = digest.to_string();
        let failed = |error: io::Error| StoreError::not_done("write blob", &name, error);
        let mut file = File::create_new(path).map_err(failed)?;
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0_u8; 64 << 10];
        let mut written = 0_u64;
        loop {
            let count = source.read(&mut buffer).map_err(failed)?;
            if count == 0 {
                break;
            }
            written += count as u64;
            if written > length {
                break;
            }
            let part = buffer.get(..count).unwrap_or_default();
            hasher.update(part);
            self.disk.write(&mut file, part).map_err(failed)?;
        }
        if written != length {
            return Err(StoreError::Refused {
                subject: format!("blob {name}"),
                expected: format!("{length} bytes"),
                got: if written > length { "more".to_owned() } else { written.to_string() },
            });
        }
        let found = Digest::from(hasher.finalize());
        if found != *digest {
            return Err(StoreError::Refused {
                subject: format!("blob {name}"),
                expected: "that digest".to_owned(),
                got: found.to_string(),
            });
        }
        file.sync_all().map_err(failed)
    }
}

/// Makes renames and removals within `dir` durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

impl Blob for FileBlob {
    fn put_if_absent(&self, digest: &Digest, length: u64, source: &mut dyn Read) -> Result<Put, StoreError> {
        let name = digest.to_string();
        let target = self.path(digest);
        let folder = target.parent().unwrap_or(&self.dir);
        let failed = |error: io::Error| StoreError::not_done("write blob", &name, error);
        let is_there = target.exists();
        // Among several it is stored again, so that none of them takes it for an old one.
        if is_there && self.access == Access::Exclusive {
            // Whoever renamed it there may have ended before it was durable, and this answer says that it is.
            sync_dir(folder).and_then(|()| sync_dir(&self.dir)).map_err(failed)?;
            return Ok(Put::Present);
        }
        let temporary = self.temporary(&name);
        if let Err(error) = self.write_temporary(&temporary, digest, length, source) {
            drop(fs::remove_file(&temporary));
            return Err(error);
        }
        if !folder.exists() {
            fs::create_dir_all(folder).map_err(failed)?;
            sync_dir(&self.dir).map_err(failed)?;
        }
        let unsure = |error: io::Error| StoreError::unsure("write blob", &name, error);
        fs::rename(&temporary, &target).map_err(unsure)?;
        sync_dir(folder).map_err(unsure)?;
        Ok(if is_there { Put::Present } else { Put::Stored })
    }

    fn length(&self, digest: &Digest) -> Result<Option<u64>, StoreError> {
        match fs::metadata(self.path(digest)) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StoreError::not_done("look for blob", &digest.to_string(), error)),
        }
    }

    fn read_range(&self, digest: &Digest, offset: u64, length: usize) -> Result<Vec<u8>, StoreError> {
        let name = digest.to_string();
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => StoreError::Missing { subject: format!("blob {name}") },
            _ => StoreError::not_done("read blob", &name, error),
        };
        let mut file = File::open(self.path(digest)).map_err(failed)?;
        let available = file.metadata().map_err(failed)?.len().saturating_sub(offset);
        file.seek(SeekFrom::Start(offset)).map_err(failed)?;
        let mut bytes = Vec::with_capacity(available.min(length as u64) as usize);
        file.take(length as u64).read_to_end(&mut bytes).map_err(failed)?;
        Ok(bytes)
    }

    fn list_older(
        &self,
        age: Duration,
        after: Option<&Digest>,
        limit: usize,
    ) -> Result<Vec<Digest>, StoreError> {
        let failed = |error: io::Error| StoreError::not_done("list", &self.dir.display().to_string(), error);
        let now = if age.is_zero() { None } else { Some(self.now().map_err(failed)?) };
        let mut digests: Vec<Digest> = Vec::new();
        for folder in fs::read_dir(&self.dir).map_err(failed)? {
            let folder = folder.map_err(failed)?;
            if folder.file_name().len() != 2 {
                continue;
            }
            for file in fs::read_dir(folder.path()).map_err(failed)? {
                let file = file.map_err(failed)?;
                // Whatever else an operator put here is not a blob.
                let Some(Ok(digest)) = file.file_name().to_str().map(str::parse) else { continue };
                if let Some(now) = now {
                    match file.metadata().and_then(|about| about.modified()) {
                        Ok(stored) if now.duration_since(stored).is_ok_and(|since| since >= age) => {}
                        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
                        // Too new, or just deleted.
                        _ => continue,
                    }
                }
                digests.push(digest);
            }
        }
        digests.sort_unstable_by_key(|digest| digest.0);
        if let Some(after) = after {
            digests.retain(|digest| digest.0 > after.0);
        }
        digests.truncate(limit.min(PAGE_MAX));
        Ok(digests)
    }

    fn delete(&self, digest: &Digest) -> Result<(), StoreError> {
        match fs::remove_file(self.path(digest)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::not_done("delete blob", &digest.to_string(), error))
            }
            _ => Ok(()),
        }
    }

    fn deletion_lasts(&self) -> Duration {
        match self.access {
            Access::Exclusive => Duration::ZERO,
            // A file server that hung does at last what a process asked that has died since.
            Access::Shared => LATE,
        }
    }

    fn mark(&self, owner: &str) -> Result<String, StoreError> {
        let failed = |error: io::Error| StoreError::not_done("mark", &self.dir.display().to_string(), error);
        let path = self.dir.join(MARK);
        if !path.exists() {
            let temporary = self.temporary(MARK);
            let marked = File::create_new(&temporary)
                .and_then(|mut file| {
                    self.disk.write(&mut file, owner.as_bytes())?;
                    file.sync_all()
                })
                // Whole or not at all, and not in the place of another's.
                .and_then(|()| fs::hard_link(&temporary, &path))
                .and_then(|()| sync_dir(&self.dir));
            drop(fs::remove_file(&temporary));
            match marked {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
                _ => {}
            }
        }
        let mut bytes = Vec::new();
        let file = File::open(&path).map_err(failed)?;
        file.take(NAME_BYTES_MAX as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
        owner_of(bytes)
    }

    fn free_bytes(&self) -> Result<Option<u64>, StoreError> {
        self.disk
            .free_bytes(&self.dir)
            .map(Some)
            .map_err(|error| StoreError::not_done("measure", &self.dir.display().to_string(), error))
    }
}
