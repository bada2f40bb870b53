//! `Lead` in PostgreSQL: a row with its holder and its end, by the server's clock, so that no two machines have to agree on
//! the time.

use std::time::Duration;

use super::{PostgresStore, text};
use crate::store::{Lead, StoreError, check_bounds};

const SUBJECT: &str = "the lead";

impl Lead for PostgresStore {
    fn lead(&self, owner: &str, lease: Duration) -> Result<bool, StoreError> {
        const SQL: &str = "INSERT INTO commonweal_lead AS held (name, owner, until)
            VALUES ('drive', $1, clock_timestamp() + $2 * interval '1 millisecond')
            ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, until = excluded.until
            WHERE held.owner = excluded.owner OR held.until <= clock_timestamp() RETURNING TRUE";
        check_bounds(SUBJECT, owner, &[])?;
        let lease_ms = lease.as_millis() as f64;
        let taken = self.write("take", SUBJECT, SQL, vec![text(owner), Box::new(lease_ms)])?;
        Ok(!taken.is_empty())
    }

    fn resign(&self, owner: &str) -> Result<(), StoreError> {
        const SQL: &str = "DELETE FROM commonweal_lead WHERE name = 'drive' AND owner = $1";
        self.write("give up", SUBJECT, SQL, vec![text(owner)]).map(drop)
    }

    fn is_shared(&self) -> bool {
        true
    }
}
