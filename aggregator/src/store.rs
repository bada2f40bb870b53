//! What the aggregator must not forget, behind four small traits.
//!
//! `receive` writes to [`Inbox`] and [`Blob`], the round and `publish` write to [`Coord`], and
//! [`Watch`] only says "look again". One machine needs SQLite and files ([`Storage::open`]); the same
//! contract suite (`contract.rs`) runs on those and on the in-memory twins of the simulation.
//!
//! Errors are split by what a caller may conclude. After a *determinate* error nothing happened. After
//! an *indeterminate* one the operation may or may not have happened, and the caller must look.

mod sqlite;
mod files;
mod memory;
mod watch;
#[cfg(test)]
mod contract;

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use commonweal_protocol::Digest;

#[cfg(test)]
pub(crate) use contract::SmallDisk;
pub(crate) use files::sync_dir;
pub use files::{Disk, FileBlob, RealDisk};
pub use memory::{Faults, MemoryStorage};
pub use sqlite::SqliteStore;
pub use watch::LocalWatch;

/// Largest value of one entry or item: a round's state with its bounded membership fits 16 times.
pub const VALUE_BYTES_MAX: usize = 4 << 20;
/// Longest name of a log, queue or key.
pub const NAME_BYTES_MAX: usize = 200;
/// Most rows that one call returns.
pub const PAGE_MAX: usize = 10_000;

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why a store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It certainly did not happen.
    #[error("{operation} `{subject}` was not done")]
    Determinate {
        /// The operation's verb.
        operation: &'static str,
        /// The log, key or digest.
        subject: String,
        /// The backend's own error.
        #[source]
        source: Cause,
    },
    /// It may or may not have happened.
    #[error("{operation} `{subject}` may or may not have been done")]
    Indeterminate {
        /// The operation's verb.
        operation: &'static str,
        /// The log, key or digest.
        subject: String,
        /// The backend's own error.
        #[source]
        source: Cause,
    },
    /// Somebody else moved the head. Nothing was written.
    #[error("log `{log}`: expected sequence {expected}, got {found}")]
    Conflict {
        /// The log.
        log: String,
        /// What the caller believed.
        expected: u64,
        /// What is there.
        found: u64,
    },
    /// There is no such thing.
    #[error("{subject} is not stored")]
    Missing {
        /// The log, key or digest.
        subject: String,
    },
    /// A lease ran out and another worker took the item.
    #[error("item `{key}` of queue `{queue}` is no longer leased to `{owner}`")]
    LeaseLost {
        /// The queue.
        queue: String,
        /// The key.
        key: String,
        /// Who believed to hold it.
        owner: String,
    },
    /// Too large, too long, or not what its digest says. Nothing was written.
    #[error("{subject}: expected {expected}, got {got}")]
    Refused {
        /// The log, key or digest.
        subject: String,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
}

impl StoreError {
    /// True when the operation certainly left no trace.
    pub fn is_determinate(&self) -> bool {
        !matches!(self, Self::Indeterminate { .. })
    }

    pub(crate) fn not_done(operation: &'static str, subject: &str, source: impl Into<Cause>) -> Self {
        Self::Determinate { operation, subject: subject.to_owned(), source: source.into() }
    }

    pub(crate) fn unsure(operation: &'static str, subject: &str, source: impl Into<Cause>) -> Self {
        Self::Indeterminate { operation, subject: subject.to_owned(), source: source.into() }
    }
}

/// One entry of a log. Sequences begin at 1 and have no gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Position in the log.
    pub sequence: u64,
    /// The bytes.
    pub value: Vec<u8>,
}

/// Append-only logs with a compare-and-set head: releases, the round's state, devices and tokens.
pub trait Coord: Send + Sync {
    /// The newest entry of `log`.
    fn head(&self, log: &str) -> Result<Option<Entry>, StoreError>;
    /// Appends `value` if the head's sequence is `expected` (0 for an empty log); returns the new one.
    fn compare_and_set(&self, log: &str, expected: u64, value: &[u8]) -> Result<u64, StoreError>;
    /// Entries from sequence `from` upwards, at most `limit`.
    fn scan(&self, log: &str, from: u64, limit: usize) -> Result<Vec<Entry>, StoreError>;
    /// Names of logs that begin with `prefix` and come after `after`, in order, at most `limit`.
    fn logs(&self, prefix: &str, after: &str, limit: usize) -> Result<Vec<String>, StoreError>;
    /// Forgets entries below sequence `below`; the head always stays.
    fn truncate(&self, log: &str, below: u64) -> Result<(), StoreError>;
}

/// Whether `put_if_absent` wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// The bytes are now stored.
    Stored,
    /// They already were.
    Present,
}

/// Bytes named by their BLAKE3 digest: adapters, updates.
pub trait Blob: Send + Sync {
    /// Stores exactly `length` bytes of `source` if they hash to `digest`; durable on return.
    fn put_if_absent(&self, digest: &Digest, length: u64, source: &mut dyn Read) -> Result<Put, StoreError>;
    /// Length of a stored blob.
    fn length(&self, digest: &Digest) -> Result<Option<u64>, StoreError>;
    /// Up to `length` bytes from `offset`; shorter at the end.
    fn read_range(&self, digest: &Digest, offset: u64, length: usize) -> Result<Vec<u8>, StoreError>;
    /// Digests after `after`, in order, at most `limit`.
    fn list(&self, after: Option<&Digest>, limit: usize) -> Result<Vec<Digest>, StoreError>;
    /// Forgets a blob; absent is not an error.
    fn delete(&self, digest: &Digest) -> Result<(), StoreError>;
    /// Free bytes where blobs are kept, to refuse an upload before it begins.
    fn free_bytes(&self) -> Result<u64, StoreError>;

    /// The whole blob, refused above `length_max`.
    fn read_all(&self, digest: &Digest, length_max: u64) -> Result<Vec<u8>, StoreError> {
        let subject = || format!("blob {digest}");
        let length = self.length(digest)?.ok_or_else(|| StoreError::Missing { subject: subject() })?;
        if length > length_max {
            return Err(StoreError::Refused {
                subject: subject(),
                expected: format!("at most {length_max} bytes"),
                got: format!("{length}"),
            });
        }
        let mut bytes = Vec::with_capacity(length as usize);
        while (bytes.len() as u64) < length {
            let part = self.read_range(digest, bytes.len() as u64, 1 << 20)?;
            if part.is_empty() {
                break;
            }
            bytes.extend_from_slice(&part);
        }
        let found = Digest::of(&bytes);
        if found != *digest {
            return Err(StoreError::Refused {
                subject: subject(),
                expected: "its own digest".to_owned(),
                got: found.to_string(),
            });
        }
        Ok(bytes)
    }
}

/// One item of a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Unique within the queue.
    pub key: String,
    /// The bytes.
    pub value: Vec<u8>,
}

/// Result of [`Inbox::append_once`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Append {
    /// Stored now.
    Appended,
    /// The key was there before, with this value; nothing changed.
    Duplicate(Vec<u8>),
}

/// Accepted updates, each once, until a merge has taken them.
pub trait Inbox: Send + Sync {
    /// Stores an item unless its key is there; durable on return.
    fn append_once(&self, queue: &str, key: &str, value: &[u8]) -> Result<Append, StoreError>;
    /// The item's value, acknowledged or not.
    fn find(&self, queue: &str, key: &str) -> Result<Option<Vec<u8>>, StoreError>;
    /// All items of a queue by key, acknowledged or not, at most `limit`.
    fn list(&self, queue: &str, limit: usize) -> Result<Vec<Item>, StoreError>;
    /// Leases up to `limit` unacknowledged items that nobody else holds at `now_ms`, by key.
    fn claim(
        &self,
        queue: &str,
        owner: &str,
        now_ms: u64,
        lease_ms: u64,
        limit: usize,
    ) -> Result<Vec<Item>, StoreError>;
    /// Prolongs a lease.
    fn extend(&self, queue: &str, key: &str, owner: &str, until_ms: u64) -> Result<(), StoreError>;
    /// Marks an item as done; it can still be found. Repeating is harmless.
    fn ack(&self, queue: &str, key: &str, owner: &str) -> Result<(), StoreError>;
    /// Forgets a queue and every one that sorts before it, with all their items.
    fn purge_through(&self, queue: &str) -> Result<(), StoreError>;
}

/// A hint that something changed; a waiter must look for itself, and must also look without one.
pub trait Watch: Send + Sync {
    /// Wakes the waiters.
    fn notify(&self);
    /// A mark to be passed to `wait`.
    fn mark(&self) -> u64;
    /// Returns when somebody notified after `mark`, or after `timeout`.
    fn wait(&self, mark: u64, timeout: Duration);
}

/// Whether another process may have the same directory open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The server, which holds the directory's lock.
    Exclusive,
    /// A command beside it.
    Shared,
}

/// The four stores of one aggregator.
#[derive(Clone)]
pub struct Storage {
    /// Logs.
    pub coord: Arc<dyn Coord>,
    /// Blobs.
    pub blob: Arc<dyn Blob>,
    /// Queues.
    pub inbox: Arc<dyn Inbox>,
    /// Hints.
    pub watch: Arc<dyn Watch>,
}

impl std::fmt::Debug for Storage {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Storage")
    }
}

impl Storage {
    /// SQLite and files under `dir`: `aggregator.db` and `blobs/`.
    pub fn open(dir: &Path, access: Access) -> Result<Self, StoreError> {
        let sqlite = Arc::new(SqliteStore::open(&dir.join("aggregator.db"))?);
        Ok(Self {
            coord: sqlite.clone(),
            inbox: sqlite,
            blob: Arc::new(FileBlob::open(&dir.join("blobs"), Arc::new(RealDisk), access)?),
            watch: Arc::new(LocalWatch::default()),
        })
    }
}

/// Refuses names and values beyond the bounds before a backend sees them.
fn check_bounds(name: &str, key: &str, value: &[u8]) -> Result<(), StoreError> {
    let refuse = |expected: String, got: usize| {
        Err(StoreError::Refused { subject: format!("`{name}` `{key}`"), expected, got: got.to_string() })
    };
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return refuse(format!("a name of 1 to {NAME_BYTES_MAX} bytes"), name.len());
    }
    if key.len() > NAME_BYTES_MAX {
        return refuse(format!("a key of at most {NAME_BYTES_MAX} bytes"), key.len());
    }
    if value.len() > VALUE_BYTES_MAX {
        return refuse(format!("a value of at most {VALUE_BYTES_MAX} bytes"), value.len());
    }
    Ok(())
}
