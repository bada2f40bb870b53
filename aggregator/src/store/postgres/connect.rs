//! The way to a PostgreSQL server: password, certificates, time limits, and what a server must be so that a receipt means
//! what it says. Before `postgres.rs`, which keeps the connections, and `watch.rs`, which has one of its own.

use std::time::Duration;

use tokio_postgres::{Client, Config};
use tokio_postgres_rustls::MakeRustlsConnect;
use zeroize::Zeroizing;

use crate::config;
use crate::directory;
use crate::store::place::Database;
use crate::store::{StoreError, refused, trust};

/// Where a password is looked for first, as by PostgreSQL's own programs.
const PASSWORD_VARIABLE: &str = "PGPASSWORD";
const CONNECT: Duration = Duration::from_secs(5);
/// A peer that vanished is noticed after so long.
const SILENCE: Duration = Duration::from_secs(15);

/// For every session: no call hangs on the server, none leaves a transaction open, a commit is on disk when it is
/// answered, and statements see what was committed before them.
const SESSION: &str = "-c statement_timeout=20s -c lock_timeout=10s -c idle_in_transaction_session_timeout=30s \
    -c synchronous_commit=on -c default_transaction_isolation=read\\ committed";

/// Everything that a connection needs.
#[derive(Clone)]
pub(super) struct Way {
    pub(super) config: Config,
    pub(super) tls: MakeRustlsConnect,
    /// How messages name the database; without a password, as the URL is.
    pub(super) subject: String,
}

impl std::fmt::Debug for Way {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("Way").field(&self.subject).finish()
    }
}

impl Way {
    /// Reads the password and the certificates; reaches nothing yet.
    pub(super) fn find(url: &str, settings: &config::Storage) -> Result<Self, StoreError> {
        let Database { mut config } =
            Database::parse(url).map_err(|wrong| refused("storage.coordination", wrong))?;
        if let Some(password) = password(settings)? {
            config.password(password.as_bytes());
        }
        let options = [config.get_options().unwrap_or_default(), SESSION].join(" ");
        config
            .options(options.trim())
            .application_name("commonweal-aggregator")
            .connect_timeout(CONNECT)
            .tcp_user_timeout(SILENCE)
            .keepalives(true)
            .keepalives_idle(SILENCE);
        let hosts: Vec<String> = config.get_hosts().iter().map(|host| format!("{host:?}")).collect();
        let subject = format!("{} at {}", config.get_dbname().unwrap_or_default(), hosts.join(", "));
        Ok(Self { config, tls: MakeRustlsConnect::new(trust::client(settings)?), subject })
    }
}

/// From the environment, or from the file that the settings name; none for servers that ask for none.
fn password(settings: &config::Storage) -> Result<Option<Zeroizing<String>>, StoreError> {
    if let Ok(password) = std::env::var(PASSWORD_VARIABLE) {
        return Ok(Some(Zeroizing::new(password)));
    }
    let Some(path) = &settings.password_file else { return Ok(None) };
    let text = directory::read_private(path)
        .map_err(|error| StoreError::not_done("read", "storage.password_file", error))?;
    Ok(Some(Zeroizing::new(text.trim_end_matches(['\r', '\n']).to_owned())))
}

/// Refuses a server whose commits are not on disk when they are answered: receipts would promise what is not so.
pub(super) async fn check(client: &Client, subject: &str) -> Result<(), StoreError> {
    let failed = |error: tokio_postgres::Error| StoreError::not_done("open", subject, error);
    for (setting, wanted) in [("fsync", "on"), ("full_page_writes", "on"), ("server_encoding", "UTF8")] {
        let got: String = client
            .query_one("SELECT current_setting($1)", &[&setting])
            .await
            .and_then(|row| row.try_get(0))
            .map_err(failed)?;
        if got != wanted {
            return Err(StoreError::Refused {
                subject: format!("database {subject}"),
                expected: format!("{setting} = {wanted}"),
                got,
            });
        }
    }
    Ok(())
}
