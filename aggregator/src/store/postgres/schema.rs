//! The tables, by numbered files; a database of a newer program is refused by name. `connect.rs` comes before.

use tokio_postgres::Client;

use super::Cause;
use crate::store::StoreError;

/// Each brings the schema from its index to the next number. A file that was released is never changed.
pub(super) const MIGRATIONS: &[&str] = &[include_str!("0001_logs_and_queues.sql")];

/// Programs that start at once migrate one after the other. The number is this project's own.
const LOCK: i64 = 0x636f_6d6d_6f6e_7765;

const VERSIONS: &str = "CREATE TABLE IF NOT EXISTS commonweal_schema_version (
    version INTEGER PRIMARY KEY, applied_at TIMESTAMPTZ NOT NULL DEFAULT now()
)";

/// Brings the schema up to date: to the version behind the last of `migrations`, or, where one fails, nowhere. With an
/// up-to-date one, nothing is written and no right to make tables is needed.
pub(super) async fn migrate(
    client: &mut Client,
    subject: &str,
    migrations: &[&str],
) -> Result<(), StoreError> {
    let failed = |error: tokio_postgres::Error| StoreError::not_done("open", subject, Cause::from(error));
    let newest = migrations.len() as i32;
    if check(found(client).await.map_err(failed)?, newest, subject)? == newest {
        return Ok(());
    }
    let transaction = client.transaction().await.map_err(failed)?;
    transaction.execute("SELECT pg_advisory_xact_lock($1)", &[&LOCK]).await.map_err(failed)?;
    transaction.batch_execute(VERSIONS).await.map_err(failed)?;
    let found: i32 = transaction
        .query_one("SELECT coalesce(max(version), 0) FROM commonweal_schema_version", &[])
        .await
        .and_then(|row| row.try_get(0))
        .map_err(failed)?;
    // Somebody else may have been here first.
    let found = check(found, newest, subject)?;
    for (version, change) in (1_i32..).zip(migrations).skip(found as usize) {
        transaction.batch_execute(change).await.map_err(failed)?;
        transaction
            .execute("INSERT INTO commonweal_schema_version (version) VALUES ($1)", &[&version])
            .await
            .map_err(failed)?;
        tracing::info!(version, "the database's schema was brought up to date");
    }
    transaction.commit().await.map_err(|error| StoreError::unsure("migrate", subject, Cause::from(error)))
}

async fn found(client: &Client) -> Result<i32, tokio_postgres::Error> {
    let is_there: bool = client
        .query_one("SELECT to_regclass('commonweal_schema_version') IS NOT NULL", &[])
        .await
        .and_then(|row| row.try_get(0))?;
    if !is_there {
        return Ok(0);
    }
    let row =
        client.query_one("SELECT coalesce(max(version), 0) FROM commonweal_schema_version", &[]).await?;
    row.try_get(0)
}

fn check(found: i32, newest: i32, subject: &str) -> Result<i32, StoreError> {
    if (0..=newest).contains(&found) {
        return Ok(found);
    }
    Err(StoreError::Schema { subject: subject.to_owned(), expected: newest.into(), got: found.into() })
}
