//! `[storage]` of the configuration: a database and a place for objects that several machines share, in place of the
//! state directory's own. `store` opens them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::directory;
use crate::store::place::{Database, Objects, check_endpoint};

/// Longest time of a lead.
pub(crate) const LEAD_SECONDS_MAX: u32 = 300;

/// Where state is kept. Nothing named: SQLite and files in the state directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Storage {
    /// A PostgreSQL database: `postgres://USER@HOST:PORT/DATABASE`.
    pub coordination: Option<String>,
    /// Adapters and updates: `s3://BUCKET/PREFIX`, or `file:///DIRECTORY` that all see.
    pub objects: Option<String>,
    /// File with the database's password; `PGPASSWORD` comes first.
    pub password_file: Option<PathBuf>,
    /// File with the object store's `access_key_id` and `secret_access_key`; `AWS_…` variables or the machine's role if absent.
    pub credentials_file: Option<PathBuf>,
    /// Authorities (PEM) that database and object store answer to; the system's if absent.
    pub authority: Option<PathBuf>,
    /// The object store's address, if it is not Amazon's.
    pub endpoint: Option<String>,
    /// Its region.
    pub region: Option<String>,
    /// Connections to the database, at most.
    pub connections: u32,
    /// How long nothing is decided after the process that drove died.
    pub lead_seconds: u32,
}

impl Default for Storage {
    fn default() -> Self {
        Self {
            coordination: None,
            objects: None,
            password_file: None,
            credentials_file: None,
            authority: None,
            endpoint: None,
            region: None,
            connections: 16,
            lead_seconds: 10,
        }
    }
}

impl Storage {
    /// Whether all is in the state directory.
    pub fn is_local(&self) -> bool {
        self.coordination.is_none() && self.objects.is_none()
    }

    /// The object store's credentials, if a file has them.
    pub(crate) fn credentials(&self) -> Result<Option<Credentials>, String> {
        let Some(path) = &self.credentials_file else { return Ok(None) };
        let text = directory::read_private(path).map_err(|error| crate::receive::chain(&error))?;
        // The parser's own words would repeat the line.
        toml::from_str(&text)
            .map(Some)
            .map_err(|_| format!("{}: expected access_key_id and secret_access_key (TOML)", path.display()))
    }

    /// What cannot be used. None of it repeats a URL: it may hold what nobody should see.
    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut say = |key: &str, found: Result<(), String>| {
            problems.extend(found.err().map(|problem| format!("storage.{key}: {problem}")));
        };
        let checked = |text: &Option<String>, check: &dyn Fn(&str) -> Result<(), String>| {
            text.as_deref().map_or(Ok(()), check)
        };
        say("coordination", checked(&self.coordination, &|url| Database::parse(url).map(drop)));
        say("objects", checked(&self.objects, &|url| Objects::parse(url).map(drop)));
        if self.coordination.is_some() && self.objects.is_none() {
            let why =
                "expected with storage.coordination: whoever shares the database needs the same objects";
            say("objects", Err(why.to_owned()));
        }
        say("endpoint", checked(&self.endpoint, &check_endpoint));
        if let Some(path) = &self.password_file {
            say(
                "password_file",
                directory::read_private(path).map(drop).map_err(|error| crate::receive::chain(&error)),
            );
        }
        if self.credentials_file.is_some() {
            say("credentials_file", self.credentials().map(drop));
        }
        if let Some(path) = &self.authority {
            say(
                "authority",
                crate::store::trust::of_file(path).map(drop).map_err(|error| crate::receive::chain(&error)),
            );
        }
        if !(2..=LEAD_SECONDS_MAX).contains(&self.lead_seconds) {
            say("lead_seconds", Err(format!("expected 2 to {LEAD_SECONDS_MAX}, got {}", self.lead_seconds)));
        }
        if !(2..=1_000).contains(&self.connections) {
            say("connections", Err(format!("expected 2 to 1000, got {}", self.connections)));
        }
        problems
    }
}

/// What opens an object store.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Credentials {
    pub(crate) access_key_id: String,
    pub(crate) secret_access_key: String,
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn all_that_is_wrong_is_told_and_no_password_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let password_file = dir.path().join("password");
        let credentials_file = dir.path().join("credentials");
        std::fs::write(&password_file, "hunter2").unwrap();
        std::fs::write(&credentials_file, "secret_access_key = hunter2").unwrap();
        std::fs::set_permissions(&credentials_file, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::set_permissions(&password_file, std::fs::Permissions::from_mode(0o644)).unwrap();
        let mut storage = Storage {
            coordination: Some("postgres://a:hunter2@b/c".to_owned()),
            objects: Some("gs://bucket".to_owned()),
            password_file: Some(password_file.clone()),
            credentials_file: Some(credentials_file.clone()),
            authority: Some("nowhere.pem".into()),
            endpoint: Some("http://s3.example.org".to_owned()),
            region: None,
            connections: 0,
            lead_seconds: 1,
        };
        let problems = storage.problems();
        for key in [
            "coordination",
            "objects",
            "password_file",
            "credentials_file",
            "authority",
            "endpoint",
            "connections",
            "lead_seconds",
        ] {
            assert!(problems.iter().any(|it| it.starts_with(&format!("storage.{key}: "))), "{problems:?}");
        }
        assert_eq!(problems.len(), 8);
        assert!(!problems.concat().contains("hunter2"), "{problems:?}");
        std::fs::set_permissions(&password_file, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&credentials_file, "access_key_id = \"a\"\nsecret_access_key = \"b\"\n").unwrap();
        storage = Storage {
            credentials_file: Some(credentials_file),
            coordination: Some("postgres://a@b/c".to_owned()),
            objects: Some("s3://bucket/prefix".to_owned()),
            password_file: Some(password_file),
            ..Storage::default()
        };
        assert!(storage.problems().is_empty(), "{:?}", storage.problems());
        assert!(Storage::default().problems().is_empty() && Storage::default().is_local());
    }
}
