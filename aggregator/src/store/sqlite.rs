//! `Coord` and `Inbox` in one SQLite file: write-ahead log, `synchronous = FULL`, so that whatever was
//! acknowledged is on disk. The schema's version is checked before anything is read.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};

use super::{Append, Coord, Entry, Inbox, Item, PAGE_MAX, StoreError, While, check_bounds};

/// Each brings the schema from its index to the next number, `user_version`. What was released is never changed.
const MIGRATIONS: &[&str] = &["
CREATE TABLE coord (
    log TEXT NOT NULL, sequence INTEGER NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY (log, sequence)
) WITHOUT ROWID;
CREATE TABLE inbox (
    queue TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL,
    owner TEXT NOT NULL DEFAULT '', lease_until_ms INTEGER NOT NULL DEFAULT 0,
    acknowledged INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (queue, key)
) WITHOUT ROWID;
"];

/// One database file; calls are serialized, each a transaction of its own.
#[derive(Debug)]
pub struct SqliteStore {
    connection: Mutex<Connection>,
}

impl SqliteStore {
    /// Opens or creates the database at `path`.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_with(path, MIGRATIONS)
    }

    /// As a program of a later version does, which has further migrations behind this one's.
    #[cfg(any(test, feature = "contract"))]
    pub fn open_later(path: &Path, further: &[&str]) -> Result<Self, StoreError> {
        Self::open_with(path, &[MIGRATIONS, further].concat())
    }

    fn open_with(path: &Path, migrations: &[&str]) -> Result<Self, StoreError> {
        let subject = path.display().to_string();
        let failed = |error: rusqlite::Error| StoreError::not_done("open", &subject, error);
        let connection = Connection::open(path).map_err(failed)?;
        connection.busy_timeout(Duration::from_secs(10)).map_err(failed)?;
        connection.pragma_update(None, "journal_mode", "WAL").map_err(failed)?;
        connection.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
        let mut store = Self { connection: Mutex::new(connection) };
        store.migrate(&subject, migrations)?;
        Ok(store)
    }

    /// Brings the schema up to date: to the version behind the last of `migrations`, or, where one fails, nowhere.
    fn migrate(&mut self, subject: &str, migrations: &[&str]) -> Result<(), StoreError> {
        let failed = |error: rusqlite::Error| StoreError::not_done("open", subject, error);
        let connection = self.connection.get_mut().unwrap_or_else(PoisonError::into_inner);
        let transaction =
            connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
        let got: i64 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(failed)?;
        let expected = migrations.len() as i64;
        if !(0..=expected).contains(&got) {
            return Err(StoreError::Schema { subject: subject.to_owned(), expected, got });
        }
        for (version, change) in (1_i64..).zip(migrations).skip(got as usize) {
            transaction.execute_batch(change).map_err(failed)?;
            transaction.pragma_update(None, "user_version", version).map_err(failed)?;
        }
        transaction.commit().map_err(failed)
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic between statements rolls its transaction back; the connection stays usable.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read<T>(
        &self,
        operation: &'static str,
        subject: &str,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        query(&self.lock()).map_err(|error| StoreError::not_done(operation, subject, error))
    }

    /// Runs `change` in an immediate transaction. Until the commit an error undoes everything; an error
    /// *of* the commit leaves open whether the pages reached the disk.
    fn write<T>(
        &self,
        operation: &'static str,
        subject: &str,
        change: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut connection = self.lock();
        let transaction = connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(|error| StoreError::not_done(operation, subject, error))?;
        let value = change(&transaction)?;
        transaction.commit().map_err(|error| StoreError::unsure(operation, subject, error))?;
        Ok(value)
    }
}

fn limit_of(limit: usize) -> i64 {
    limit.min(PAGE_MAX) as i64
}

/// A conflict unless the log's head is there.
fn check_head(
    transaction: &Transaction<'_>,
    operation: &'static str,
    wanted: While<'_>,
) -> Result<(), StoreError> {
    let While { log, sequence: expected } = wanted;
    let found: i64 = transaction
        .prepare_cached("SELECT coalesce(max(sequence), 0) FROM coord WHERE log = ?1")
        .and_then(|mut statement| statement.query_row([log], |row| row.get(0)))
        .map_err(|error| StoreError::not_done(operation, log, error))?;
    let found = found as u64;
    if found != expected {
        return Err(StoreError::Conflict { log: log.to_owned(), expected, found });
    }
    Ok(())
}

impl Coord for SqliteStore {
    fn head(&self, log: &str) -> Result<Option<Entry>, StoreError> {
        self.read("read", log, |connection| {
            connection
                .prepare_cached(
                    "SELECT sequence, value FROM coord WHERE log = ?1 ORDER BY sequence DESC LIMIT 1",
                )?
                .query_row([log], |row| {
                    Ok(Entry { sequence: row.get::<_, i64>(0)? as u64, value: row.get(1)? })
                })
                .optional()
        })
    }

    fn move_head(
        &self,
        log: &str,
        expected: u64,
        value: &[u8],
        other: Option<While<'_>>,
    ) -> Result<u64, StoreError> {
        check_bounds(log, "", value)?;
        self.write("append to", log, |transaction| {
            let not_done = |error: rusqlite::Error| StoreError::not_done("append to", log, error);
            other.map_or(Ok(()), |other| check_head(transaction, "append to", other))?;
            check_head(transaction, "append to", While { log, sequence: expected })?;
            let next = expected + 1;
            transaction
                .prepare_cached("INSERT INTO coord (log, sequence, value) VALUES (?1, ?2, ?3)")
                .and_then(|mut statement| statement.execute(params![log, next as i64, value]))
                .map_err(not_done)?;
            Ok(next)
        })
    }

    fn scan(&self, log: &str, from: u64, limit: usize) -> Result<Vec<Entry>, StoreError> {
        self.read("scan", log, |connection| {
            let from = i64::try_from(from).unwrap_or(i64::MAX);
            connection
                .prepare_cached(
                    "SELECT sequence, value FROM coord WHERE log = ?1 AND sequence >= ?2 \
                     ORDER BY sequence LIMIT ?3",
                )?
                .query_map(params![log, from, limit_of(limit)], |row| {
                    Ok(Entry { sequence: row.get::<_, i64>(0)? as u64, value: row.get(1)? })
                })?
                .collect()
        })
    }

    fn logs(&self, prefix: &str, after: &str, limit: usize) -> Result<Vec<String>, StoreError> {
        self.read("list", prefix, |connection| {
            connection
                .prepare_cached(
                    "SELECT DISTINCT log FROM coord WHERE substr(log, 1, length(?1)) = ?1 \
                     AND log >= ?1 AND log > ?2 ORDER BY log LIMIT ?3",
                )?
                .query_map(params![prefix, after, limit_of(limit)], |row| row.get(0))?
                .collect()
        })
    }

    fn truncate(&self, log: &str, below: u64) -> Result<(), StoreError> {
        let below = i64::try_from(below).unwrap_or(i64::MAX);
        self.write("truncate", log, |transaction| {
            transaction
                .execute(
                    "DELETE FROM coord WHERE log = ?1 AND sequence < ?2 \
                     AND sequence < (SELECT max(sequence) FROM coord WHERE log = ?1)",
                    params![log, below],
                )
                .map_err(|error| StoreError::not_done("truncate", log, error))?;
            Ok(())
        })
    }
}

impl Inbox for SqliteStore {
    fn append(
        &self,
        queue: &str,
        key: &str,
        value: &[u8],
        log: Option<While<'_>>,
    ) -> Result<Append, StoreError> {
        check_bounds(queue, key, value)?;
        self.write("append to", queue, |transaction| {
            let not_done = |error: rusqlite::Error| StoreError::not_done("append to", queue, error);
            log.map_or(Ok(()), |log| check_head(transaction, "append to", log))?;
            let found: Option<Vec<u8>> = transaction
                .prepare_cached("SELECT value FROM inbox WHERE queue = ?1 AND key = ?2")
                .and_then(|mut statement| statement.query_row([queue, key], |row| row.get(0)).optional())
                .map_err(not_done)?;
            if let Some(found) = found {
                return Ok(Append::Duplicate(found));
            }
            transaction
                .prepare_cached("INSERT INTO inbox (queue, key, value) VALUES (?1, ?2, ?3)")
                .and_then(|mut statement| statement.execute(params![queue, key, value]))
                .map_err(not_done)?;
            Ok(Append::Appended)
        })
    }

    fn find(&self, queue: &str, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.read("find in", queue, |connection| {
            connection
                .prepare_cached("SELECT value FROM inbox WHERE queue = ?1 AND key = ?2")?
                .query_row([queue, key], |row| row.get(0))
                .optional()
        })
    }

    fn list(&self, queue: &str, limit: usize) -> Result<Vec<Item>, StoreError> {
        self.read("list", queue, |connection| {
            connection
                .prepare_cached("SELECT key, value FROM inbox WHERE queue = ?1 ORDER BY key LIMIT ?2")?
                .query_map(params![queue, limit_of(limit)], |row| {
                    Ok(Item { key: row.get(0)?, value: row.get(1)? })
                })?
                .collect()
        })
    }

    fn claim(
        &self,
        queue: &str,
        owner: &str,
        now_ms: u64,
        lease_ms: u64,
        limit: usize,
    ) -> Result<Vec<Item>, StoreError> {
        self.write("claim from", queue, |transaction| {
            let not_done = |error: rusqlite::Error| StoreError::not_done("claim from", queue, error);
            let items: Vec<Item> = transaction
                .prepare_cached(
                    "SELECT key, value FROM inbox WHERE queue = ?1 AND acknowledged = 0 \
                     AND (owner = '' OR owner = ?2 OR lease_until_ms <= ?3) ORDER BY key LIMIT ?4",
                )
                .and_then(|mut statement| {
                    statement
                        .query_map(params![queue, owner, now_ms as i64, limit_of(limit)], |row| {
                            Ok(Item { key: row.get(0)?, value: row.get(1)? })
                        })?
                        .collect()
                })
                .map_err(not_done)?;
            let until_ms = now_ms.saturating_add(lease_ms) as i64;
            for item in &items {
                transaction
                    .prepare_cached(
                        "UPDATE inbox SET owner = ?3, lease_until_ms = ?4 WHERE queue = ?1 AND key = ?2",
                    )
                    .and_then(|mut statement| statement.execute(params![queue, item.key, owner, until_ms]))
                    .map_err(not_done)?;
            }
            Ok(items)
        })
    }

    fn extend(&self, queue: &str, key: &str, owner: &str, until_ms: u64) -> Result<(), StoreError> {
        self.held(
            "UPDATE inbox SET lease_until_ms = ?4 \
             WHERE queue = ?1 AND key = ?2 AND owner = ?3 AND acknowledged = 0",
            queue,
            key,
            owner,
            Some(until_ms),
        )
    }

    fn ack(&self, queue: &str, key: &str, owner: &str) -> Result<(), StoreError> {
        self.held(
            "UPDATE inbox SET acknowledged = 1 WHERE queue = ?1 AND key = ?2 AND owner = ?3",
            queue,
            key,
            owner,
            None,
        )
    }

    fn purge_through(&self, queue: &str) -> Result<(), StoreError> {
        self.write("purge", queue, |transaction| {
            transaction
                .execute("DELETE FROM inbox WHERE queue <= ?1", [queue])
                .map_err(|error| StoreError::not_done("purge", queue, error))?;
            Ok(())
        })
    }
}

impl SqliteStore {
    fn held(
        &self,
        sql: &str,
        queue: &str,
        key: &str,
        owner: &str,
        until_ms: Option<u64>,
    ) -> Result<(), StoreError> {
        self.write("update", queue, |transaction| {
            let not_done = |error: rusqlite::Error| StoreError::not_done("update", queue, error);
            let changed = transaction
                .prepare_cached(sql)
                .and_then(|mut statement| match until_ms {
                    Some(until_ms) => statement.execute(params![queue, key, owner, until_ms as i64]),
                    None => statement.execute(params![queue, key, owner]),
                })
                .map_err(not_done)?;
            if changed == 0 {
                return Err(StoreError::lease_lost(queue, key, owner));
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_refuses_what_does_not_fit_and_keeps_what_was_stored() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&dir.path().join("aggregator.db")).unwrap();
        store.compare_and_set("log", 0, b"kept").unwrap();
        // The file may not grow: SQLite says the same then as when the disk is full.
        store.lock().pragma_update(None, "max_page_count", 1).unwrap();
        let big = vec![7; 1 << 20];
        assert!(store.compare_and_set("log", 1, &big).unwrap_err().is_determinate());
        assert!(store.append_once("queue", "key", &big).unwrap_err().is_determinate());
        assert_eq!(store.head("log").unwrap(), Some(Entry { sequence: 1, value: b"kept".to_vec() }));
        assert_eq!(store.find("queue", "key").unwrap(), None);
        assert_eq!(store.compare_and_set("log", 1, b"small").unwrap(), 2, "what fits is taken");
    }
}
