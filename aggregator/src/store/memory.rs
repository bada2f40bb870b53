//! The stores in memory, for simulations: the same contract as on disk, and write faults drawn
//! from a seed. A clone shares the contents, so a "killed" aggregator is reopened on what it had stored.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use commonweal_protocol::Digest;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{
    Append, Blob, Coord, Entry, Inbox, Item, Lead, LocalWatch, PAGE_MAX, Put, SoleLead, Storage, StoreError,
    While, check_bounds,
};

/// How often a write fails.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Share of writes that certainly did not happen.
    pub determinate: f64,
    /// Share of writes of which the caller cannot tell; half of them happened.
    pub indeterminate: f64,
}

#[derive(Debug, Default)]
struct Queued {
    value: Vec<u8>,
    owner: String,
    lease_until_ms: u64,
    acknowledged: bool,
}

#[derive(Debug)]
struct Held {
    bytes: Vec<u8>,
    stored: Duration,
}

#[derive(Debug, Default)]
struct Contents {
    logs: BTreeMap<String, BTreeMap<u64, Vec<u8>>>,
    queues: BTreeMap<String, BTreeMap<String, Queued>>,
    blobs: BTreeMap<[u8; 32], Held>,
    /// The store's own clock, by which blobs grow old.
    now: Duration,
    deletion_lasts: Duration,
    fails_to_delete: bool,
    faults: Faults,
    random: Option<ChaCha8Rng>,
    writes_left: Option<u64>,
    free_bytes: Option<u64>,
    owner: Option<String>,
    /// Who drives, where several may.
    lead: Option<String>,
}

impl Contents {
    /// Draws the fate of a write: `Ok` to go on, `Err(None)` not done, `Err(Some(apply))` unknown.
    fn fate(&mut self) -> Result<(), Option<bool>> {
        match &mut self.writes_left {
            Some(0) => return Err(None),
            Some(left) => *left -= 1,
            None => {}
        }
        let faults = self.faults;
        let Some(random) = &mut self.random else { return Ok(()) };
        let drawn: f64 = random.random();
        if drawn < faults.determinate {
            Err(None)
        } else if drawn < faults.determinate + faults.indeterminate {
            Err(Some(random.random()))
        } else {
            Ok(())
        }
    }
}

/// Everything in maps behind one lock.
#[derive(Clone, Debug, Default)]
pub struct MemoryStorage {
    contents: Arc<Mutex<Contents>>,
    is_shared: bool,
}

impl MemoryStorage {
    /// From now on, writes fail as `faults` says, drawn from `seed`.
    pub fn inject(&self, seed: u64, faults: Faults) {
        let mut contents = self.lock();
        contents.faults = faults;
        contents.random = Some(ChaCha8Rng::seed_from_u64(seed));
    }

    /// After this many more writes nothing is written any more, as if the process had been killed there.
    pub fn crash_after(&self, writes: u64) {
        self.lock().writes_left = Some(writes);
    }

    /// Whether [`MemoryStorage::crash_after`]'s writes are used up.
    pub fn has_crashed(&self) -> bool {
        self.lock().writes_left == Some(0)
    }

    /// The same contents for several aggregators at once.
    #[must_use]
    pub fn shared(&self) -> Self {
        Self { is_shared: true, ..self.clone() }
    }

    /// Whoever has the lead loses it, as when time passes, and does not know.
    pub fn lapse_lead(&self) {
        self.lock().lead = None;
    }

    /// Lets blobs grow older.
    pub fn pass(&self, time: Duration) {
        self.lock().now += time;
    }

    /// Pretends that deletions may come to pass for so long after they failed.
    pub fn delay_deletions(&self, lasts: Duration) {
        self.lock().deletion_lasts = lasts;
    }

    /// Whether deletions fail, with no word of whether they will come to pass.
    pub fn fail_deletions(&self, fail: bool) {
        self.lock().fails_to_delete = fail;
    }

    /// From now on, no write fails.
    pub fn heal(&self) {
        let mut contents = self.lock();
        contents.random = None;
        contents.writes_left = None;
    }

    /// Pretends that this much space is left for blobs.
    pub fn limit_free_bytes(&self, free_bytes: Option<u64>) {
        self.lock().free_bytes = free_bytes;
    }

    /// Bytes and entries held, to check that an aggregator does not grow without bound.
    pub fn usage(&self) -> (usize, usize) {
        let contents = self.lock();
        let bytes = contents.blobs.values().map(|held| held.bytes.len()).sum::<usize>()
            + contents.logs.values().flat_map(BTreeMap::values).map(Vec::len).sum::<usize>()
            + contents
                .queues
                .values()
                .flat_map(BTreeMap::values)
                .map(|queued| queued.value.len())
                .sum::<usize>();
        let entries = contents.blobs.len()
            + contents.logs.values().map(BTreeMap::len).sum::<usize>()
            + contents.queues.values().map(BTreeMap::len).sum::<usize>();
        (bytes, entries)
    }

    /// The seam's view of this.
    pub fn storage(&self) -> Storage {
        Storage {
            coord: Arc::new(self.clone()),
            blob: Arc::new(self.clone()),
            inbox: Arc::new(self.clone()),
            watch: Arc::new(LocalWatch::default()),
            lead: if self.is_shared { Arc::new(self.clone()) } else { Arc::new(SoleLead) },
        }
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write<T>(
        &self,
        operation: &'static str,
        subject: &str,
        change: impl FnOnce(&mut Contents) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut contents = self.lock();
        match contents.fate() {
            Ok(()) => change(&mut contents),
            Err(None) => Err(StoreError::not_done(operation, subject, "injected fault")),
            Err(Some(apply)) => {
                if apply {
                    // A refusal is an answer, not a write: it passes through.
                    change(&mut contents)?;
                }
                Err(StoreError::unsure(operation, subject, "injected fault"))
            }
        }
    }
}

impl Contents {
    fn check(&self, other: Option<While<'_>>) -> Result<(), StoreError> {
        let Some(other) = other else { return Ok(()) };
        let found =
            self.logs.get(other.log).and_then(BTreeMap::last_key_value).map_or(0, |(&sequence, _)| sequence);
        if found == other.sequence {
            return Ok(());
        }
        Err(StoreError::Conflict { log: other.log.to_owned(), expected: other.sequence, found })
    }
}

impl Coord for MemoryStorage {
    fn head(&self, log: &str) -> Result<Option<Entry>, StoreError> {
        let contents = self.lock();
        let newest = contents.logs.get(log).and_then(BTreeMap::last_key_value);
        Ok(newest.map(|(&sequence, value)| Entry { sequence, value: value.clone() }))
    }

    fn move_head(
        &self,
        log: &str,
        expected: u64,
        value: &[u8],
        other: Option<While<'_>>,
    ) -> Result<u64, StoreError> {
        check_bounds(log, "", value)?;
        self.write("append to", log, |contents| {
            contents.check(other)?;
            let entries = contents.logs.entry(log.to_owned()).or_default();
            let found = entries.last_key_value().map_or(0, |(&sequence, _)| sequence);
            if found != expected {
                return Err(StoreError::Conflict { log: log.to_owned(), expected, found });
            }
            entries.insert(expected + 1, value.to_vec());
            Ok(expected + 1)
        })
    }

    fn scan(&self, log: &str, from: u64, limit: usize) -> Result<Vec<Entry>, StoreError> {
        let contents = self.lock();
        let Some(entries) = contents.logs.get(log) else { return Ok(Vec::new()) };
        Ok(entries
            .range(from..)
            .take(limit.min(PAGE_MAX))
            .map(|(&sequence, value)| Entry { sequence, value: value.clone() })
            .collect())
    }

    fn logs(&self, prefix: &str, after: &str, limit: usize) -> Result<Vec<String>, StoreError> {
        let contents = self.lock();
        Ok(contents
            .logs
            .iter()
            .filter(|(log, entries)| log.starts_with(prefix) && log.as_str() > after && !entries.is_empty())
            .take(limit.min(PAGE_MAX))
            .map(|(log, _)| log.clone())
            .collect())
    }

    fn truncate(&self, log: &str, below: u64) -> Result<(), StoreError> {
        self.write("truncate", log, |contents| {
            if let Some(entries) = contents.logs.get_mut(log) {
                let head = entries.last_key_value().map_or(0, |(&sequence, _)| sequence);
                entries.retain(|&sequence, _| sequence >= below.min(head));
            }
            Ok(())
        })
    }
}

impl Inbox for MemoryStorage {
    fn append(
        &self,
        queue: &str,
        key: &str,
        value: &[u8],
        log: Option<While<'_>>,
    ) -> Result<Append, StoreError> {
        check_bounds(queue, key, value)?;
        self.write("append to", queue, |contents| {
            contents.check(log)?;
            let items = contents.queues.entry(queue.to_owned()).or_default();
            if let Some(found) = items.get(key) {
                return Ok(Append::Duplicate(found.value.clone()));
            }
            items.insert(key.to_owned(), Queued { value: value.to_vec(), ..Queued::default() });
            Ok(Append::Appended)
        })
    }

    fn find(&self, queue: &str, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let contents = self.lock();
        Ok(contents.queues.get(queue).and_then(|items| items.get(key)).map(|queued| queued.value.clone()))
    }

    fn list(&self, queue: &str, limit: usize) -> Result<Vec<Item>, StoreError> {
        let contents = self.lock();
        let Some(items) = contents.queues.get(queue) else { return Ok(Vec::new()) };
        Ok(items
            .iter()
            .take(limit.min(PAGE_MAX))
            .map(|(key, queued)| Item { key: key.clone(), value: queued.value.clone() })
            .collect())
    }

    fn claim(
        &self,
        queue: &str,
        owner: &str,
        now_ms: u64,
        lease_ms: u64,
        limit: usize,
    ) -> Result<Vec<Item>, StoreError> {
        self.write("claim from", queue, |contents| {
            let Some(items) = contents.queues.get_mut(queue) else { return Ok(Vec::new()) };
            let free = |queued: &&mut Queued| {
                !queued.acknowledged
                    && (queued.owner.is_empty() || queued.owner == owner || queued.lease_until_ms <= now_ms)
            };
            let mut claimed = Vec::new();
            for (key, queued) in items.iter_mut().filter(|(_, queued)| free(queued)).take(limit.min(PAGE_MAX))
            {
                owner.clone_into(&mut queued.owner);
                queued.lease_until_ms = now_ms.saturating_add(lease_ms);
                claimed.push(Item { key: key.clone(), value: queued.value.clone() });
            }
            Ok(claimed)
        })
    }

    fn extend(&self, queue: &str, key: &str, owner: &str, until_ms: u64) -> Result<(), StoreError> {
        self.write("update", queue, |contents| {
            let queued = held(contents, queue, key, owner)?;
            if queued.acknowledged {
                return Err(StoreError::lease_lost(queue, key, owner));
            }
            queued.lease_until_ms = until_ms;
            Ok(())
        })
    }

    fn ack(&self, queue: &str, key: &str, owner: &str) -> Result<(), StoreError> {
        self.write("update", queue, |contents| {
            held(contents, queue, key, owner)?.acknowledged = true;
            Ok(())
        })
    }

    fn purge_through(&self, queue: &str) -> Result<(), StoreError> {
        self.write("purge", queue, |contents| {
            contents.queues.retain(|name, _| name.as_str() > queue);
            Ok(())
        })
    }
}

impl Lead for MemoryStorage {
    fn lead(&self, owner: &str, _: Duration) -> Result<bool, StoreError> {
        self.write("take", "the lead", |contents| {
            let is_free = contents.lead.as_deref().is_none_or(|holder| holder == owner);
            if is_free {
                contents.lead = Some(owner.to_owned());
            }
            Ok(is_free)
        })
    }

    fn resign(&self, owner: &str) -> Result<(), StoreError> {
        self.write("give up", "the lead", |contents| {
            contents.lead.take_if(|holder| holder == owner);
            Ok(())
        })
    }

    fn is_shared(&self) -> bool {
        self.is_shared
    }
}

fn held<'contents>(
    contents: &'contents mut Contents,
    queue: &str,
    key: &str,
    owner: &str,
) -> Result<&'contents mut Queued, StoreError> {
    contents
        .queues
        .get_mut(queue)
        .and_then(|items| items.get_mut(key))
        .filter(|queued| queued.owner == owner)
        .ok_or_else(|| StoreError::lease_lost(queue, key, owner))
}

impl Blob for MemoryStorage {
    fn put_if_absent(&self, digest: &Digest, length: u64, source: &mut dyn Read) -> Result<Put, StoreError> {
        let name = digest.to_string();
        {
            let mut contents = self.lock();
            let now = contents.now;
            if let Some(held) = contents.blobs.get_mut(&digest.0) {
                held.stored = now;
                return Ok(Put::Present);
            }
        }
        let mut bytes = Vec::new();
        source
            .take(length.saturating_add(1))
            .read_to_end(&mut bytes)
            .map_err(|error| StoreError::not_done("write blob", &name, error))?;
        let refused = |expected: String, got: String| StoreError::Refused {
            subject: format!("blob {name}"),
            expected,
            got,
        };
        if bytes.len() as u64 != length {
            return Err(refused(format!("{length} bytes"), bytes.len().to_string()));
        }
        let found = Digest::of(&bytes);
        if found != *digest {
            return Err(refused("that digest".to_owned(), found.to_string()));
        }
        self.write("write blob", &name, |contents| {
            if contents.free_bytes.is_some_and(|free| free < length) {
                return Err(StoreError::not_done("write blob", &name, "no space left"));
            }
            let stored = contents.now;
            contents.blobs.insert(digest.0, Held { bytes, stored });
            Ok(Put::Stored)
        })
    }

    fn length(&self, digest: &Digest) -> Result<Option<u64>, StoreError> {
        Ok(self.lock().blobs.get(&digest.0).map(|held| held.bytes.len() as u64))
    }

    fn read_range(&self, digest: &Digest, offset: u64, length: usize) -> Result<Vec<u8>, StoreError> {
        let contents = self.lock();
        let Held { bytes, .. } = contents
            .blobs
            .get(&digest.0)
            .ok_or_else(|| StoreError::Missing { subject: format!("blob {digest}") })?;
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let end = start.saturating_add(length).min(bytes.len());
        Ok(bytes.get(start..end).unwrap_or_default().to_vec())
    }

    fn list_older(
        &self,
        age: Duration,
        after: Option<&Digest>,
        limit: usize,
    ) -> Result<Vec<Digest>, StoreError> {
        let contents = self.lock();
        Ok(contents
            .blobs
            .iter()
            .filter(|(key, held)| {
                after.is_none_or(|after| **key > after.0) && contents.now.saturating_sub(held.stored) >= age
            })
            .take(limit.min(PAGE_MAX))
            .map(|(key, _)| Digest(*key))
            .collect())
    }

    fn delete(&self, digest: &Digest) -> Result<(), StoreError> {
        self.write("delete blob", &digest.to_string(), |contents| {
            if contents.fails_to_delete {
                return Err(StoreError::unsure("delete blob", &digest.to_string(), "no answer"));
            }
            contents.blobs.remove(&digest.0);
            Ok(())
        })
    }

    fn deletion_lasts(&self) -> Duration {
        self.lock().deletion_lasts
    }

    fn mark(&self, owner: &str) -> Result<String, StoreError> {
        Ok(self.lock().owner.get_or_insert_with(|| owner.to_owned()).clone())
    }

    fn free_bytes(&self) -> Result<Option<u64>, StoreError> {
        Ok(self.lock().free_bytes)
    }
}
