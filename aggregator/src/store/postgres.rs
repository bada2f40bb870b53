//! `Coord` and `Inbox` in PostgreSQL, for several processes at once: each call is one statement, and so one transaction.
//!
//! Calls run on the `bridge`, over a bounded pool of connections; one that was lost is replaced. A statement that the
//! server refused did not happen. Whatever else goes wrong once a statement is under way leaves open whether it did.

mod connect;
mod schema;
mod watch;
mod lead;

use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use tokio_postgres::Row;
use tokio_postgres::error::{Severity, SqlState};
use tokio_postgres::types::ToSql;

use super::bridge::Bridge;
use super::{Append, Cause, Coord, Entry, Inbox, Item, PAGE_MAX, StoreError, While, check_bounds};
use crate::config;
use connect::Way;
pub use watch::PostgresWatch;

/// How long a call waits for one of the connections, and a connection for the server.
const POOL: Duration = Duration::from_secs(10);
/// How long a call takes at most; longer than what the server allows a statement.
const PATIENCE: Duration = Duration::from_secs(45);
/// Times that a call looks for a connection that is not lost: a restarted server leaves a pool of them.
const TRIES: usize = 3;

type Parameter = Box<dyn ToSql + Sync + Send>;

/// What a call came to that has no rows.
enum Failure {
    /// Nothing was sent, or the server refused it.
    NotDone(Cause),
    /// It was sent.
    Unsure(Cause),
}

/// One database.
pub struct PostgresStore {
    bridge: Arc<Bridge>,
    pool: Pool,
    way: Way,
}

impl std::fmt::Debug for PostgresStore {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("PostgresStore").field(&self.way.subject).finish()
    }
}

impl PostgresStore {
    /// Reaches the database and brings its schema up to date.
    pub(super) fn open(
        url: &str,
        settings: &config::Storage,
        bridge: Arc<Bridge>,
    ) -> Result<Self, StoreError> {
        Self::open_with(url, settings, bridge, schema::MIGRATIONS.to_vec())
    }

    /// As a program of a later version does, which has further migrations behind this one's.
    #[cfg(any(test, feature = "contract"))]
    pub fn open_later(settings: &config::Storage, further: &[&'static str]) -> Result<Self, StoreError> {
        let bridge = Bridge::start().map_err(|error| StoreError::not_done("open", "a runtime", error))?;
        let url = settings.coordination.as_deref().unwrap_or_default();
        Self::open_with(url, settings, bridge, [schema::MIGRATIONS, further].concat())
    }

    fn open_with(
        url: &str,
        settings: &config::Storage,
        bridge: Arc<Bridge>,
        migrations: Vec<&'static str>,
    ) -> Result<Self, StoreError> {
        let way = Way::find(url, settings)?;
        let manager = Manager::from_config(
            way.config.clone(),
            way.tls.clone(),
            ManagerConfig { recycling_method: RecyclingMethod::Fast },
        );
        let pool = Pool::builder(manager)
            .max_size(settings.connections as usize)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(POOL))
            .create_timeout(Some(POOL))
            .recycle_timeout(Some(POOL))
            .build()
            .map_err(|error| StoreError::not_done("open", &way.subject, error))?;
        let store = Self { bridge, pool, way };
        store.prepare(migrations)?;
        Ok(store)
    }

    fn prepare(&self, migrations: Vec<&'static str>) -> Result<(), StoreError> {
        let (pool, subject) = (self.pool.clone(), self.way.subject.clone());
        let prepared = self.bridge.wait(PATIENCE, async move {
            let mut client =
                pool.get().await.map_err(|error| StoreError::not_done("reach", &subject, error))?;
            connect::check(&client, &subject).await?;
            schema::migrate(&mut client, &subject, &migrations).await
        });
        prepared.unwrap_or_else(|late| Err(StoreError::not_done("reach", &self.way.subject, late)))
    }

    /// Hints of this database, on a connection of its own.
    pub(super) fn watch(&self) -> PostgresWatch {
        PostgresWatch::start(&self.way, &self.bridge)
    }

    fn call(&self, sql: &'static str, parameters: Vec<Parameter>) -> Result<Vec<Row>, Failure> {
        let pool = self.pool.clone();
        let work = async move {
            let parameters: Vec<&(dyn ToSql + Sync)> =
                parameters.iter().map(|it| &**it as &(dyn ToSql + Sync)).collect();
            let mut lost = None;
            for _ in 0..TRIES {
                let client = pool.get().await.map_err(|error| Failure::NotDone(error.into()))?;
                let statement = match client.prepare_cached(sql).await {
                    Ok(statement) => statement,
                    // Nothing that matters was sent on it.
                    Err(error) if error.is_closed() || is_ended(&error) => {
                        lost = Some(error);
                        continue;
                    }
                    Err(error) => return Err(Failure::NotDone(error.into())),
                };
                return client.query(&statement, &parameters).await.map_err(|error| {
                    if is_refused(&error) {
                        Failure::NotDone(error.into())
                    } else {
                        Failure::Unsure(error.into())
                    }
                });
            }
            Err(Failure::NotDone(lost.map_or_else(|| "no connection".into(), Cause::from)))
        };
        self.bridge.wait(PATIENCE, work).unwrap_or_else(|late| Err(Failure::Unsure(late.into())))
    }

    /// Asks, and once more on another connection if the first was lost meanwhile.
    fn read(
        &self,
        operation: &'static str,
        subject: &str,
        sql: &'static str,
        parameters: impl Fn() -> Vec<Parameter>,
    ) -> Result<Vec<Row>, StoreError> {
        let answer = match self.call(sql, parameters()) {
            Err(Failure::Unsure(_)) => self.call(sql, parameters()),
            answer => answer,
        };
        answer.map_err(|(Failure::NotDone(cause) | Failure::Unsure(cause))| {
            StoreError::not_done(operation, subject, cause)
        })
    }

    fn write(
        &self,
        operation: &'static str,
        subject: &str,
        sql: &'static str,
        parameters: Vec<Parameter>,
    ) -> Result<Vec<Row>, StoreError> {
        self.call(sql, parameters).map_err(|failure| match failure {
            Failure::NotDone(cause) => StoreError::not_done(operation, subject, cause),
            Failure::Unsure(cause) => StoreError::unsure(operation, subject, cause),
        })
    }

    /// The sequence of a log's head; 0 for none.
    fn head_sequence(&self, log: &str) -> Result<u64, StoreError> {
        let rows =
            self.read("read", log, "SELECT head FROM commonweal_log WHERE name = $1", || vec![text(log)])?;
        rows.first().map_or(Ok(0), |row| Ok(column::<i64>(row, 0, log)? as u64))
    }

    /// What it is that a log's head was not there.
    fn conflict(&self, wanted: While<'_>) -> Result<StoreError, StoreError> {
        let While { log, sequence: expected } = wanted;
        let found = self.head_sequence(log)?;
        Ok(StoreError::Conflict { log: log.to_owned(), expected, found })
    }

    fn appended(&self, is_new: bool, queue: &str, key: &str) -> Result<Append, StoreError> {
        if is_new {
            return Ok(Append::Appended);
        }
        match self.find(queue, key)? {
            Some(found) => Ok(Append::Duplicate(found)),
            None => Err(StoreError::not_done("append to", queue, "the queue was purged meanwhile")),
        }
    }
}

// The head's row is what writers of a log meet at: the second waits for the first, and then finds another sequence. What
// another log's head has to stay for holds that row until it is done; many may, and who moves it waits for them.
const FIRST: &str = "WITH moved AS (
        INSERT INTO commonweal_log (name, head) VALUES ($1::text, 1) ON CONFLICT DO NOTHING RETURNING head
    ) INSERT INTO commonweal_entry (log, sequence, value) SELECT $1::text, head, $2::bytea FROM moved RETURNING sequence";
const NEXT: &str = "WITH moved AS (
        UPDATE commonweal_log SET head = head + 1 WHERE name = $1 AND head = $3 RETURNING head
    ) INSERT INTO commonweal_entry (log, sequence, value) SELECT $1::text, head, $2::bytea FROM moved RETURNING sequence";
const FIRST_WHILE: &str = "WITH held AS (
        SELECT head FROM commonweal_log WHERE name = $3 AND head = $4 FOR SHARE
    ), moved AS (
        INSERT INTO commonweal_log (name, head) SELECT $1::text, 1 FROM held ON CONFLICT DO NOTHING RETURNING head
    ) INSERT INTO commonweal_entry (log, sequence, value) SELECT $1::text, head, $2::bytea FROM moved RETURNING sequence";
const NEXT_WHILE: &str = "WITH held AS (
        SELECT head FROM commonweal_log WHERE name = $4 AND head = $5 FOR SHARE
    ), moved AS (
        UPDATE commonweal_log SET head = commonweal_log.head + 1 FROM held
        WHERE name = $1 AND commonweal_log.head = $3 RETURNING commonweal_log.head
    ) INSERT INTO commonweal_entry (log, sequence, value) SELECT $1::text, head, $2::bytea FROM moved RETURNING sequence";

const APPEND_WHILE: &str = "WITH held AS (
        SELECT head FROM commonweal_log WHERE name = $4 AND head = $5 FOR SHARE
    ), appended AS (
        INSERT INTO commonweal_item (queue, key, value) SELECT $1::text, $2::text, $3::bytea FROM held
        ON CONFLICT DO NOTHING RETURNING key
    ) SELECT (SELECT count(*) FROM held), (SELECT count(*) FROM appended)";

/// The server said no: an error that undoes its statement. One that ends the session may come with a commit.
fn is_refused(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|told| {
        told.parsed_severity() == Some(Severity::Error)
            && *told.code() != SqlState::T_R_STATEMENT_COMPLETION_UNKNOWN
    })
}

/// The server ended the session, to stop or to start again.
fn is_ended(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_none_or(|told| told.parsed_severity() != Some(Severity::Error))
}

fn text(text: &str) -> Parameter {
    Box::new(text.to_owned())
}

fn bytes(bytes: &[u8]) -> Parameter {
    Box::new(bytes.to_vec())
}

/// Numbers beyond the column's are beyond all that is there.
fn number(number: u64) -> Parameter {
    Box::new(i64::try_from(number).unwrap_or(i64::MAX))
}

fn limited(limit: usize) -> Parameter {
    Box::new(limit.min(PAGE_MAX) as i64)
}

fn column<'row, T: tokio_postgres::types::FromSql<'row>>(
    row: &'row Row,
    index: usize,
    subject: &str,
) -> Result<T, StoreError> {
    row.try_get(index).map_err(|error| StoreError::not_done("read", subject, error))
}

fn entry(row: &Row, log: &str) -> Result<Entry, StoreError> {
    Ok(Entry { sequence: column::<i64>(row, 0, log)? as u64, value: column(row, 1, log)? })
}

fn item(row: &Row, queue: &str) -> Result<Item, StoreError> {
    Ok(Item { key: column(row, 0, queue)?, value: column(row, 1, queue)? })
}

/// The first name, in the order of bytes, that does not begin with `prefix`; none for an empty one.
fn end_of(prefix: &str) -> Option<String> {
    let mut end = prefix.as_bytes().to_vec();
    // Names here are ASCII, far below the byte that has none after it.
    let last = end.last_mut()?;
    *last = last.checked_add(1)?;
    String::from_utf8(end).ok()
}

impl Coord for PostgresStore {
    fn head(&self, log: &str) -> Result<Option<Entry>, StoreError> {
        const SQL: &str =
            "SELECT sequence, value FROM commonweal_entry WHERE log = $1 ORDER BY sequence DESC LIMIT 1";
        let rows = self.read("read", log, SQL, || vec![text(log)])?;
        rows.first().map(|row| entry(row, log)).transpose()
    }

    fn move_head(
        &self,
        log: &str,
        expected: u64,
        value: &[u8],
        other: Option<While<'_>>,
    ) -> Result<u64, StoreError> {
        check_bounds(log, "", value)?;
        let sql = match (expected, other) {
            (0, None) => FIRST,
            (_, None) => NEXT,
            (0, Some(_)) => FIRST_WHILE,
            (_, Some(_)) => NEXT_WHILE,
        };
        let mut parameters = vec![text(log), bytes(value)];
        if expected > 0 {
            parameters.push(number(expected));
        }
        if let Some(other) = other {
            parameters.extend([text(other.log), number(other.sequence)]);
        }
        // A row says that it is done, whatever its form.
        if !self.write("append to", log, sql, parameters)?.is_empty() {
            return Ok(expected.saturating_add(1));
        }
        // Heads never go back: what is not where it was expected now was not then.
        if let Some(other) = other
            && self.head_sequence(other.log)? != other.sequence
        {
            return Err(self.conflict(other)?);
        }
        Err(self.conflict(While { log, sequence: expected })?)
    }

    fn scan(&self, log: &str, from: u64, limit: usize) -> Result<Vec<Entry>, StoreError> {
        const SQL: &str = "SELECT sequence, value FROM commonweal_entry WHERE log = $1 AND sequence >= $2
            ORDER BY sequence LIMIT $3";
        let rows = self.read("scan", log, SQL, || vec![text(log), number(from), limited(limit)])?;
        rows.iter().map(|row| entry(row, log)).collect()
    }

    fn logs(&self, prefix: &str, after: &str, limit: usize) -> Result<Vec<String>, StoreError> {
        const SQL: &str = "SELECT name FROM commonweal_log
            WHERE name >= $1 AND name > $2 AND ($3::text IS NULL OR name < $3) ORDER BY name LIMIT $4";
        let rows = self.read("list", prefix, SQL, || {
            vec![text(prefix), text(after), Box::new(end_of(prefix)), limited(limit)]
        })?;
        rows.iter().map(|row| column(row, 0, prefix)).collect()
    }

    fn heads(&self, prefix: &str, after: &str, limit: usize) -> Result<Vec<(String, Entry)>, StoreError> {
        const SQL: &str = "SELECT sequence, value, log FROM commonweal_log
            JOIN commonweal_entry ON log = name AND sequence = head
            WHERE name >= $1 AND name > $2 AND ($3::text IS NULL OR name < $3) ORDER BY name LIMIT $4";
        let rows = self.read("list", prefix, SQL, || {
            vec![text(prefix), text(after), Box::new(end_of(prefix)), limited(limit)]
        })?;
        rows.iter().map(|row| Ok((column(row, 2, prefix)?, entry(row, prefix)?))).collect()
    }

    fn truncate(&self, log: &str, below: u64) -> Result<(), StoreError> {
        const SQL: &str = "DELETE FROM commonweal_entry WHERE log = $1 AND sequence < $2
            AND sequence < (SELECT head FROM commonweal_log WHERE name = $1)";
        self.write("truncate", log, SQL, vec![text(log), number(below)]).map(drop)
    }
}

impl Inbox for PostgresStore {
    fn append(
        &self,
        queue: &str,
        key: &str,
        value: &[u8],
        log: Option<While<'_>>,
    ) -> Result<Append, StoreError> {
        const SQL: &str = "INSERT INTO commonweal_item (queue, key, value) VALUES ($1, $2, $3)
            ON CONFLICT DO NOTHING RETURNING TRUE";
        check_bounds(queue, key, value)?;
        let mut parameters = vec![text(queue), text(key), bytes(value)];
        let Some(log) = log else {
            let appended = self.write("append to", queue, SQL, parameters)?;
            return self.appended(!appended.is_empty(), queue, key);
        };
        parameters.extend([text(log.log), number(log.sequence)]);
        let rows = self.write("append to", queue, APPEND_WHILE, parameters)?;
        // It is done; an answer without its form leaves open what.
        let count = |index| {
            let counted = rows.first().and_then(|row| row.try_get::<_, i64>(index).ok());
            counted.ok_or_else(|| StoreError::unsure("append to", queue, "the answer has no count"))
        };
        if count(0)? == 0 {
            return Err(self.conflict(log)?);
        }
        self.appended(count(1)? > 0, queue, key)
    }

    fn find(&self, queue: &str, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        const SQL: &str = "SELECT value FROM commonweal_item WHERE queue = $1 AND key = $2";
        let rows = self.read("find in", queue, SQL, || vec![text(queue), text(key)])?;
        rows.first().map(|row| column(row, 0, queue)).transpose()
    }

    fn list(&self, queue: &str, limit: usize) -> Result<Vec<Item>, StoreError> {
        const SQL: &str = "SELECT key, value FROM commonweal_item WHERE queue = $1 ORDER BY key LIMIT $2";
        let rows = self.read("list", queue, SQL, || vec![text(queue), limited(limit)])?;
        rows.iter().map(|row| item(row, queue)).collect()
    }

    fn claim(
        &self,
        queue: &str,
        owner: &str,
        now_ms: u64,
        lease_ms: u64,
        limit: usize,
    ) -> Result<Vec<Item>, StoreError> {
        // A row that another claim holds at this moment is left to that one.
        const SQL: &str = "WITH free AS (
                SELECT key FROM commonweal_item WHERE queue = $1 AND NOT acknowledged
                AND (owner = '' OR owner = $2 OR lease_until_ms <= $3) ORDER BY key LIMIT $4
                FOR UPDATE SKIP LOCKED
            ) UPDATE commonweal_item AS item SET owner = $2, lease_until_ms = $5 FROM free
            WHERE item.queue = $1 AND item.key = free.key RETURNING item.key, item.value";
        check_bounds(queue, owner, &[])?;
        let until_ms = now_ms.saturating_add(lease_ms);
        let parameters = vec![text(queue), text(owner), number(now_ms), limited(limit), number(until_ms)];
        let rows = self.write("claim from", queue, SQL, parameters)?;
        let mut items: Vec<Item> = rows.iter().map(|row| item(row, queue)).collect::<Result<_, _>>()?;
        items.sort_unstable_by(|one, other| one.key.cmp(&other.key));
        Ok(items)
    }

    fn extend(&self, queue: &str, key: &str, owner: &str, until_ms: u64) -> Result<(), StoreError> {
        const SQL: &str = "UPDATE commonweal_item SET lease_until_ms = $4
            WHERE queue = $1 AND key = $2 AND owner = $3 AND NOT acknowledged RETURNING TRUE";
        let parameters = vec![text(queue), text(key), text(owner), number(until_ms)];
        held(&self.write("update", queue, SQL, parameters)?, queue, key, owner)
    }

    fn ack(&self, queue: &str, key: &str, owner: &str) -> Result<(), StoreError> {
        const SQL: &str = "UPDATE commonweal_item SET acknowledged = TRUE
            WHERE queue = $1 AND key = $2 AND owner = $3 RETURNING TRUE";
        let parameters = vec![text(queue), text(key), text(owner)];
        held(&self.write("update", queue, SQL, parameters)?, queue, key, owner)
    }

    fn purge_through(&self, queue: &str) -> Result<(), StoreError> {
        const SQL: &str = "DELETE FROM commonweal_item WHERE queue <= $1";
        self.write("purge", queue, SQL, vec![text(queue)]).map(drop)
    }
}

/// Whether anything was changed: only what its owner holds is.
fn held(changed: &[Row], queue: &str, key: &str, owner: &str) -> Result<(), StoreError> {
    if changed.is_empty() {
        return Err(StoreError::lease_lost(queue, key, owner));
    }
    Ok(())
}
