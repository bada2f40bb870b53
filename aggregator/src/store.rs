//! What the aggregator must not forget, behind five small traits.
//!
//! `receive` writes to [`Inbox`] and [`Blob`], the round and `publish` write to [`Coord`], [`Watch`] only says "look again",
//! and [`Lead`] says who drives, where several could. One machine needs SQLite and files ([`Storage::open`]); several share
//! PostgreSQL and a bucket ([`Storage::of`]). The same contract suite (`contract.rs`) runs on those and on the in-memory
//! twins of the simulation.
//!
//! Errors are split by what a caller may conclude. After a *determinate* error nothing happened. After
//! an *indeterminate* one the operation may or may not have happened, and the caller must look.

mod sqlite;
mod files;
mod memory;
mod watch;
mod lead;
pub mod place;
pub(crate) mod trust;
mod bridge;
mod postgres;
mod http;
mod objects;
mod owner;
mod error;
#[cfg(any(test, feature = "contract"))]
pub mod contract;
#[cfg(test)]
mod tests;

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use commonweal_protocol::Digest;

use crate::config;
use bridge::Bridge;
use error::Cause;
use owner::{MARK, check_owner, owner_of};

pub use error::StoreError;
pub(crate) use files::sync_dir;
pub use files::{Disk, FileBlob, RealDisk};
pub use lead::SoleLead;
pub use memory::{Faults, MemoryStorage};
pub use objects::ObjectBlob;
pub use postgres::{PostgresStore, PostgresWatch};
pub use sqlite::SqliteStore;
#[cfg(test)]
pub(crate) use tests::SmallDisk;
pub use watch::LocalWatch;

/// Largest value of one entry or item: a round's state with its bounded membership fits 16 times.
pub const VALUE_BYTES_MAX: usize = 4 << 20;
/// Longest name of a log, queue or key.
pub const NAME_BYTES_MAX: usize = 200;
/// Most rows that one call returns.
pub const PAGE_MAX: usize = 50_000;

/// One entry of a log. Sequences begin at 1 and have no gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Position in the log.
    pub sequence: u64,
    /// The bytes.
    pub value: Vec<u8>,
}

/// A condition of a write: the head of another log is still where the writer saw it. Whoever moves that head first waits
/// for such writes under way, and sees them afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct While<'log> {
    /// The other log.
    pub log: &'log str,
    /// Where its head must be.
    pub sequence: u64,
}

/// Append-only logs with a compare-and-set head: releases, the round's state, devices and tokens.
pub trait Coord: Send + Sync {
    /// The newest entry of `log`.
    fn head(&self, log: &str) -> Result<Option<Entry>, StoreError>;
    /// Appends `value` if the head's sequence is `expected` (0 for an empty log), and if another log has not moved, where one
    /// is named; returns the new sequence. A conflict names the log that has moved, the other one first.
    fn move_head(
        &self,
        log: &str,
        expected: u64,
        value: &[u8],
        other: Option<While<'_>>,
    ) -> Result<u64, StoreError>;
    /// [`Coord::move_head`], whatever other logs do.
    fn compare_and_set(&self, log: &str, expected: u64, value: &[u8]) -> Result<u64, StoreError> {
        self.move_head(log, expected, value, None)
    }
    /// [`Coord::move_head`], if `other` has not moved.
    fn compare_and_set_while(
        &self,
        log: &str,
        expected: u64,
        value: &[u8],
        other: While<'_>,
    ) -> Result<u64, StoreError> {
        self.move_head(log, expected, value, Some(other))
    }
    /// Entries from sequence `from` upwards, at most `limit`.
    fn scan(&self, log: &str, from: u64, limit: usize) -> Result<Vec<Entry>, StoreError>;
    /// Names of logs that begin with `prefix` and come after `after`, in order, at most `limit`.
    fn logs(&self, prefix: &str, after: &str, limit: usize) -> Result<Vec<String>, StoreError>;
    /// The same with the newest entry of each, for logs whose entries are small.
    fn heads(&self, prefix: &str, after: &str, limit: usize) -> Result<Vec<(String, Entry)>, StoreError> {
        let mut heads = Vec::new();
        for log in self.logs(prefix, after, limit)? {
            if let Some(entry) = self.head(&log)? {
                heads.push((log, entry));
            }
        }
        Ok(heads)
    }
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
    /// Stores exactly `length` bytes of `source` if they hash to `digest`; durable on return. Where several share the blobs,
    /// one that is there already is as new afterwards as any ([`Blob::list_older`]).
    fn put_if_absent(&self, digest: &Digest, length: u64, source: &mut dyn Read) -> Result<Put, StoreError>;
    /// Length of a stored blob.
    fn length(&self, digest: &Digest) -> Result<Option<u64>, StoreError>;
    /// Up to `length` bytes from `offset`; shorter at the end.
    fn read_range(&self, digest: &Digest, offset: u64, length: usize) -> Result<Vec<u8>, StoreError>;
    /// Digests after `after`, in order, at most `limit`.
    fn list(&self, after: Option<&Digest>, limit: usize) -> Result<Vec<Digest>, StoreError> {
        self.list_older(Duration::ZERO, after, limit)
    }
    /// The same, without those that somebody stored within the last `age`, by the store's own clock.
    fn list_older(
        &self,
        age: Duration,
        after: Option<&Digest>,
        limit: usize,
    ) -> Result<Vec<Digest>, StoreError>;
    /// Forgets a blob; absent is not an error.
    fn delete(&self, digest: &Digest) -> Result<(), StoreError>;
    /// Forgets several, and begins nothing after `until`; a failure leaves open which of them are forgotten.
    fn delete_all(&self, digests: &[Digest], until: Option<Instant>) -> Result<(), StoreError> {
        digests.iter().try_for_each(|digest| {
            if until.is_some_and(|until| Instant::now() >= until) {
                return Err(StoreError::not_done("delete blob", &digest.to_string(), "the time is over"));
            }
            self.delete(digest)
        })
    }
    /// How long a deletion may still come to pass that nobody waits for any more.
    fn deletion_lasts(&self) -> Duration {
        Duration::ZERO
    }
    /// Notes whose blobs these are, unless that is noted already; whose they are.
    fn mark(&self, owner: &str) -> Result<String, StoreError>;
    /// Free bytes where blobs are kept, to refuse an upload before it begins; none where no end is known.
    fn free_bytes(&self) -> Result<Option<u64>, StoreError>;

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
    /// Stores an item unless its key is there; durable on return. A conflict if the log has moved, where one is named, whether
    /// the key is there or not.
    fn append(
        &self,
        queue: &str,
        key: &str,
        value: &[u8],
        log: Option<While<'_>>,
    ) -> Result<Append, StoreError>;
    /// [`Inbox::append`], whatever logs do.
    fn append_once(&self, queue: &str, key: &str, value: &[u8]) -> Result<Append, StoreError> {
        self.append(queue, key, value, None)
    }
    /// [`Inbox::append`], if `log` has not moved.
    fn append_once_while(
        &self,
        queue: &str,
        key: &str,
        value: &[u8],
        log: While<'_>,
    ) -> Result<Append, StoreError> {
        self.append(queue, key, value, Some(log))
    }
    /// The item's value, acknowledged or not.
    fn find(&self, queue: &str, key: &str) -> Result<Option<Vec<u8>>, StoreError>;
    /// All items of a queue by key, acknowledged or not, at most `limit`.
    fn list(&self, queue: &str, limit: usize) -> Result<Vec<Item>, StoreError>;
    /// Leases up to `limit` unacknowledged items that nobody else holds at `now_ms`, by key. An item that another claim is
    /// just looking at may be left out. Times are the callers': whose clock is ahead by the length of a lease takes what
    /// another still holds.
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

/// One driver at a time, of all processes that share the stores.
pub trait Lead: Send + Sync {
    /// Takes or prolongs the lead; false if another has it. It lasts for `lease` from before this call, by the store's own
    /// clock: nobody else has it until then.
    fn lead(&self, owner: &str, lease: Duration) -> Result<bool, StoreError>;
    /// Gives it up, if `owner` has it.
    fn resign(&self, owner: &str) -> Result<(), StoreError>;
    /// Whether others could take it, so that everything here may change at any time.
    fn is_shared(&self) -> bool;
}

/// Whether another process may have the same directory open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The server, which holds the directory's lock.
    Exclusive,
    /// A command beside it.
    Shared,
}

/// The stores of one aggregator.
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
    /// Who drives.
    pub lead: Arc<dyn Lead>,
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
            lead: Arc::new(SoleLead),
        })
    }
}

impl Storage {
    /// Where the settings say; what they do not name is under `dir`, as in [`Storage::open`]. Objects of another federation
    /// are refused.
    pub fn of(dir: &Path, settings: &config::Storage, access: Access) -> Result<Self, StoreError> {
        if settings.is_local() {
            return Self::open(dir, access);
        }
        let storage = Self::reach(dir, settings, access)?;
        if settings.objects.is_some() {
            check_owner(storage.coord.as_ref(), storage.blob.as_ref())?;
        }
        Ok(storage)
    }

    fn reach(dir: &Path, settings: &config::Storage, access: Access) -> Result<Self, StoreError> {
        let bridge = Bridge::start().map_err(|error| StoreError::not_done("open", "a runtime", error))?;
        let blob: Arc<dyn Blob> = match &settings.objects {
            None => Arc::new(FileBlob::open(&dir.join("blobs"), Arc::new(RealDisk), access)?),
            Some(url) => objects(url, settings, bridge.clone())?,
        };
        let Some(url) = &settings.coordination else {
            let sqlite = Arc::new(SqliteStore::open(&dir.join("aggregator.db"))?);
            let (watch, lead) = (Arc::new(LocalWatch::default()), Arc::new(SoleLead));
            return Ok(Self { coord: sqlite.clone(), inbox: sqlite, blob, watch, lead });
        };
        let postgres = Arc::new(PostgresStore::open(url, settings, bridge)?);
        let watch = Arc::new(postgres.watch());
        Ok(Self { coord: postgres.clone(), inbox: postgres.clone(), blob, watch, lead: postgres })
    }
}

/// What is in the database of the settings, for who has no state directory yet; none where they name none.
pub fn database(settings: &config::Storage) -> Result<Option<Arc<dyn Coord>>, StoreError> {
    let Some(url) = &settings.coordination else { return Ok(None) };
    let bridge = Bridge::start().map_err(|error| StoreError::not_done("open", "a runtime", error))?;
    Ok(Some(Arc::new(PostgresStore::open(url, settings, bridge)?)))
}

fn objects(url: &str, settings: &config::Storage, bridge: Arc<Bridge>) -> Result<Arc<dyn Blob>, StoreError> {
    Ok(match place::Objects::parse(url).map_err(|wrong| refused("storage.objects", wrong))? {
        // Others may be writing there.
        place::Objects::Folder(path) => Arc::new(FileBlob::open(&path, Arc::new(RealDisk), Access::Shared)?),
        place::Objects::Bucket { name, prefix } => {
            Arc::new(ObjectBlob::bucket(&name, &prefix, settings, bridge)?)
        }
    })
}

/// A setting that cannot be used; what it is set to may be no one's to see.
fn refused(setting: &str, expected: String) -> StoreError {
    StoreError::Refused { subject: setting.to_owned(), expected, got: "something else".to_owned() }
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
