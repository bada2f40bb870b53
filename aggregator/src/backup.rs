//! A copy of a state directory, also of one that is being served: whole, checked, and itself a state directory.
//!
//! Bytes are copied before the database and once more after it, and then it is looked whether what the database's snapshot
//! names is there: a round that ended in between may have swept some of it, and then snapshot and pass are made again.
//! The configuration is written last and makes the copy complete. Unfinished uploads are left out; devices send them again.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use commonweal_protocol::{BaseHash, Digest};
use rusqlite::{Connection, OpenFlags};

use crate::config;
use crate::desk::{self, DeskError};
use crate::directory::{Claim, Directory, DirectoryError};
use crate::publish::{PublishError, Publisher};
use crate::round::Phase;
use crate::store::{Access, Blob, FileBlob, PAGE_MAX, Put, RealDisk, Storage, StoreError};

/// Digests listed at once.
const DIGESTS_PAGE: usize = 1_000;
/// Bytes of one blob that are copied at once; as large as any update or adapter may be in memory.
const BLOB_BYTES_MAX: u64 = 4 << 30;

/// Snapshots taken until one is whole.
const SNAPSHOTS_MAX: u32 = 3;

/// Why there is no backup.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// Either directory.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The bytes on either side.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What the snapshot says does not decode.
    #[error(transparent)]
    Desk(#[from] DeskError),
    /// The releases in it cannot be read.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// What is to be copied is not here.
    #[error(
        "storage.coordination or storage.objects is set: the database and the objects are copied by their own means \
         (pg_dump, the bucket's versions), and of this directory only the keys; docs/operations.md, Backup"
    )]
    Elsewhere,
    /// Rounds ended faster than the bytes were copied.
    #[error(
        "the state changed faster than it could be copied, {SNAPSHOTS_MAX} times; try again between two rounds"
    )]
    Busy,
    /// The database's snapshot.
    #[error("{}: no snapshot of the database could be written", path.display())]
    Snapshot {
        /// Where to.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
}

/// What was copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Copied {
    /// Adapters and updates.
    pub blobs: u64,
    /// Their bytes.
    pub blobs_bytes: u64,
    /// Bytes of the database.
    pub database_bytes: u64,
}

/// Copies `from` to `to`, where there must be no state directory yet. What is not in the directory cannot be copied so.
pub fn back_up(from: &Directory, settings: &config::Storage, to: &Path) -> Result<Copied, BackupError> {
    if !settings.is_local() {
        return Err(BackupError::Elsewhere);
    }
    Directory::require_none(to)?;
    let failed = |source| DirectoryError::File { path: to.to_owned(), source };
    // As private as what it is a copy of.
    DirBuilder::new().recursive(true).mode(0o700).create(to).map_err(failed)?;
    let _claim = Claim::of(to)?;
    let source = FileBlob::open(&from.path().join("blobs"), Arc::new(RealDisk), Access::Shared)?;
    let copy = FileBlob::open(&to.join("blobs"), Arc::new(RealDisk), Access::Exclusive)?;
    let mut copied = Copied::default();
    copy_blobs(&source, &copy, &mut copied)?;
    let database = to.join("aggregator.db");
    for _ in 0..SNAPSHOTS_MAX {
        snapshot(&from.path().join("aggregator.db"), &database)
            .map_err(|source| BackupError::Snapshot { path: database.clone(), source })?;
        copied.database_bytes = std::fs::metadata(&database).map_err(failed)?.len();
        copy_blobs(&source, &copy, &mut copied)?;
        if is_whole(from, to, &copy)? {
            from.copy_to(to)?;
            return Ok(copied);
        }
        tracing::info!("a round ended meanwhile; the database is copied again");
    }
    Err(BackupError::Busy)
}

/// Whether all that the copied database needs to go on was copied: the release in force, and of the round under way its
/// start, its candidate and its updates.
fn is_whole(from: &Directory, to: &Path, copy: &FileBlob) -> Result<bool, BackupError> {
    let storage = Storage::open(to, Access::Shared)?;
    let base = BaseHash([0; 32]);
    let publisher = Publisher::new(storage.coord.clone(), storage.blob.clone(), from.signer()?, base);
    let mut named = publisher.kept(1)?;
    named.extend(publisher.kept_states(1)?);
    let (rounds, progress) = desk::peek(storage.coord.as_ref())?;
    if let Some(start) = rounds.start {
        named.insert(start.digest);
        named.extend(publisher.state(start.version)?.digests());
    }
    named.extend(progress.merge.unwrap_or_default().state.digests());
    if let Phase::Aligning { candidate }
    | Phase::Evaluating { candidate }
    | Phase::Publishing { candidate, .. } = rounds.phase
    {
        named.insert(candidate);
    }
    for item in storage.inbox.list(&desk::queue(rounds.round), PAGE_MAX)? {
        match desk::decode_accepted(&item.value) {
            Ok(update) => {
                named.insert(update.open.digest);
            }
            // Its round will be rejected by its name, there as here.
            Err(error) => tracing::warn!(%error, key = item.key, "the copy has a damaged update"),
        }
    }
    for digest in named {
        if copy.length(&digest)?.is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}

fn copy_blobs(source: &FileBlob, copy: &FileBlob, copied: &mut Copied) -> Result<(), StoreError> {
    let mut after: Option<Digest> = None;
    loop {
        let page = source.list(after.as_ref(), DIGESTS_PAGE)?;
        let Some(last) = page.last() else { return Ok(()) };
        after = Some(*last);
        for digest in &page {
            if copy.length(digest)?.is_some() {
                continue;
            }
            // What was swept since it was listed is named by nothing any more.
            let bytes = match source.read_all(digest, BLOB_BYTES_MAX) {
                Err(StoreError::Missing { .. }) => continue,
                bytes => bytes?,
            };
            if copy.put_if_absent(digest, bytes.len() as u64, &mut bytes.as_slice())? == Put::Stored {
                copied.blobs += 1;
                copied.blobs_bytes += bytes.len() as u64;
            }
        }
    }
}

/// One moment of the database, whoever writes to it. An earlier attempt's is replaced.
fn snapshot(from: &Path, to: &Path) -> rusqlite::Result<()> {
    let _ = std::fs::remove_file(to);
    let connection = Connection::open_with_flags(from, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    connection.busy_timeout(Duration::from_secs(10))?;
    connection.execute("VACUUM INTO ?1", [to.to_string_lossy()])?;
    let copy = Connection::open_with_flags(to, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    copy.pragma_update(None, "journal_mode", "WAL")?;
    let verdict: String = copy.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
    if verdict == "ok" { Ok(()) } else { Err(rusqlite::Error::InvalidParameterName(verdict)) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_copy_is_a_state_directory_and_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let from = Directory::create(&dir.path().join("state"), 1_700_000_000_000).unwrap();
        from.admin_token().unwrap();
        from.rotate(1_700_000_000_001, |_| ()).unwrap();
        from.write_config("plain = true\n").unwrap();
        let storage = Storage::open(from.path(), Access::Exclusive).unwrap();
        let bytes = b"an adapter".as_slice();
        storage.blob.put_if_absent(&Digest::of(bytes), bytes.len() as u64, &mut &*bytes).unwrap();
        storage.coord.compare_and_set("log", 0, b"first").unwrap();

        let to = dir.path().join("copy");
        let copied = back_up(&from, &config::Storage::default(), &to).unwrap();
        assert_eq!((copied.blobs, copied.blobs_bytes), (1, 10));
        // What happens after it is not in it.
        storage.coord.compare_and_set("log", 1, b"second").unwrap();
        let copy = Directory::open(&to).unwrap();
        let keys = |directory: &Directory| directory.signer().unwrap().keys();
        assert_eq!(keys(&copy).lineage(), keys(&from).lineage());
        assert_eq!(keys(&copy).signing().to_bytes(), keys(&from).signing().to_bytes());
        assert_eq!(copy.admin_token().unwrap(), from.admin_token().unwrap());
        copy.authority().unwrap();
        let mode = std::fs::metadata(&to).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "the copy is its owner's alone");
        for name in ["signing.pem", "authority.pem", "admin.token"] {
            let mode = std::fs::metadata(to.join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        let stored = Storage::open(&to, Access::Exclusive).unwrap();
        assert_eq!(stored.coord.head("log").unwrap().unwrap().value, b"first");
        assert_eq!(stored.blob.read_all(&Digest::of(bytes), 100).unwrap(), bytes);
        let again = back_up(&from, &config::Storage::default(), &to).unwrap_err();
        assert!(again.to_string().contains("copy: is a state directory already"), "{again}");
        // Nor over a federation whose settings are lost; but what was interrupted is done again.
        std::fs::remove_file(to.join(config::FILE)).unwrap();
        let again = back_up(&from, &config::Storage::default(), &to).unwrap_err();
        assert!(again.to_string().contains("beside aggregator.db"), "{again}");
        std::fs::write(to.join("aggregator.new"), "").unwrap();
        back_up(&from, &config::Storage::default(), &to).unwrap();
        Directory::open(&to).unwrap();
    }
}
