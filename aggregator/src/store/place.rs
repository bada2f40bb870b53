//! Where a federation's state is kept, as the settings name it: URLs of a database and of a place for objects, taken
//! apart and checked before anything is reached. `config` lists what is wrong with them, `postgres` and `objects` go there.
//!
//! No password stands in them: it would be in files, process lists and logs. None of the messages repeats a URL.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use tokio_postgres::config::{Host, SslMode};
use url::Url;

use crate::receive::chain;

/// How the database's URL looks.
const DATABASE_FORM: &str = "postgres://USER@HOST:PORT/DATABASE";

/// Schemes that are known here; what has another is no URL of ours.
const SCHEMES: [&str; 6] = ["postgres", "postgresql", "s3", "file", "http", "https"];

/// A PostgreSQL database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Database {
    pub(super) config: tokio_postgres::Config,
}

impl Database {
    /// Takes a URL apart.
    pub fn parse(text: &str) -> Result<Self, String> {
        let is_ours = ["postgres://", "postgresql://"].iter().any(|scheme| text.starts_with(scheme));
        if !is_ours {
            return Err(format!("expected {DATABASE_FORM}"));
        }
        let mut config: tokio_postgres::Config = text
            .parse()
            .map_err(|error: tokio_postgres::Error| format!("expected {DATABASE_FORM}: {}", chain(&error)))?;
        if config.get_password().is_some() {
            return Err("expected no password in it: PGPASSWORD or storage.password_file has it".to_owned());
        }
        for (what, is_there) in [
            ("user", config.get_user().is_some_and(|user| !user.is_empty())),
            ("host", !config.get_hosts().is_empty()),
            ("database", config.get_dbname().is_some_and(|name| !name.is_empty())),
        ] {
            if !is_there {
                return Err(format!("expected {DATABASE_FORM}: no {what} is named"));
            }
        }
        // Between machines nothing passes in clear unless somebody asked for that.
        let is_said = text.split_once('?').is_some_and(|(_, parameters)| parameters.contains("sslmode="));
        match (is_said, config.get_ssl_mode()) {
            (true, SslMode::Disable | SslMode::Require) => {}
            (true, _) => return Err("sslmode: expected require or disable".to_owned()),
            (false, _) => {
                let is_here = config.get_hosts().iter().all(is_this_machine);
                config.ssl_mode(if is_here { SslMode::Disable } else { SslMode::Require });
            }
        }
        Ok(Self { config })
    }
}

fn is_this_machine(host: &Host) -> bool {
    match host {
        Host::Tcp(name) => is_loopback(name),
        #[cfg(unix)]
        Host::Unix(_) => true,
    }
}

fn is_loopback(name: &str) -> bool {
    name == "localhost"
        || name.parse::<Ipv4Addr>().is_ok_and(|address| address.is_loopback())
        || name.trim_matches(['[', ']']).parse::<Ipv6Addr>().is_ok_and(|address| address.is_loopback())
}

/// A place for blobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Objects {
    /// A folder, which several machines may share.
    Folder(PathBuf),
    /// A bucket that speaks S3.
    Bucket {
        /// Its name.
        name: String,
        /// What all names begin with; empty, or ends with no slash.
        prefix: String,
    },
}

impl Objects {
    /// Takes a URL apart.
    pub fn parse(text: &str) -> Result<Self, String> {
        const FORM: &str = "expected s3://BUCKET/PREFIX or file:///DIRECTORY";
        let url = Url::parse(text).map_err(|error| format!("{FORM}: {error}"))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(format!(
                "{FORM}, without credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY have them"
            ));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(format!("{FORM}, and nothing behind it"));
        }
        match (url.scheme(), url.host_str()) {
            ("file", None) => {
                url.to_file_path().map(Self::Folder).map_err(|()| format!("{FORM}, an absolute path"))
            }
            ("s3", Some(name)) if url.port().is_none() => {
                let prefix = url.path().trim_matches('/').to_owned();
                let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte);
                if !prefix.bytes().all(is_plain) || prefix.split('/').any(|part| part == "." || part == "..")
                {
                    return Err(format!("{FORM}, the prefix of letters, digits and -_./"));
                }
                Ok(Self::Bucket { name: name.to_owned(), prefix })
            }
            _ => Err(FORM.to_owned()),
        }
    }
}

/// An object store's own address; in clear only on this machine.
pub fn check_endpoint(text: &str) -> Result<(), String> {
    let form = || "expected https://HOST, or http:// on the loopback".to_owned();
    let url = Url::parse(text).map_err(|_| form())?;
    let is_bare = url.username().is_empty() && url.password().is_none() && url.query().is_none();
    let is_here = match url.host() {
        Some(url::Host::Domain(name)) => is_loopback(name),
        Some(url::Host::Ipv4(address)) => IpAddr::V4(address).is_loopback(),
        Some(url::Host::Ipv6(address)) => IpAddr::V6(address).is_loopback(),
        None => return Err(form()),
    };
    match url.scheme() {
        "https" if is_bare => Ok(()),
        "http" if is_bare && is_here => Ok(()),
        _ => Err(form()),
    }
}

/// Whether a URL must not be shown: it has a password, or is so wrong that it might.
pub fn is_secret(text: &str) -> bool {
    match Url::parse(text) {
        Ok(url) => {
            !SCHEMES.contains(&url.scheme())
                || url.password().is_some()
                || text.to_ascii_lowercase().contains("password")
        }
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_named_by_a_url_without_a_password() {
        let parse = |text: &str| Database::parse(text).map(|database| database.config.get_ssl_mode());
        assert_eq!(parse("postgres://a@127.0.0.1:5433/b"), Ok(SslMode::Disable));
        assert_eq!(parse("postgresql://a@%2Frun%2Fpostgresql/b"), Ok(SslMode::Disable));
        assert_eq!(parse("postgres://a@db.example.org/b"), Ok(SslMode::Require));
        assert_eq!(parse("postgres://a@localhost,db.example.org/b"), Ok(SslMode::Require));
        assert_eq!(parse("postgres://a@db.example.org/b?sslmode=disable"), Ok(SslMode::Disable));
        for (wrong, why) in [
            ("mysql://a@b/c", "expected postgres://"),
            ("postgres://a@b/c?sslmode=prefer", "require or disable"),
            ("postgres://a:hunter2@b/c", "no password"),
            ("postgres://a@b/c?password=hunter2", "no password"),
            ("postgres://b/c", "no user"),
            ("postgres://a@/c", "no host"),
            ("postgres://a@b", "no database"),
            ("postgres://a@b/c?nonsense=1", "nonsense"),
            ("postgres://a:hunter2@b:x/c", "postgres://"),
        ] {
            let error = Database::parse(wrong).unwrap_err();
            assert!(error.contains(why) && !error.contains("hunter2"), "{wrong}: {error}");
        }
    }

    #[test]
    fn objects_are_in_a_bucket_or_a_folder() {
        let bucket = |name: &str, prefix: &str| Objects::Bucket { name: name.into(), prefix: prefix.into() };
        assert_eq!(Objects::parse("s3://bucket"), Ok(bucket("bucket", "")));
        assert_eq!(Objects::parse("s3://bucket/a/b/"), Ok(bucket("bucket", "a/b")));
        assert_eq!(Objects::parse("file:///srv/a%20b"), Ok(Objects::Folder("/srv/a b".into())));
        for wrong in [
            "",
            "bucket",
            "gs://bucket",
            "s3:///a",
            "s3://b?x=1",
            "s3://key:hunter2@b",
            "file://host/a",
            "s3://b/ü",
            "s3://b:9/a",
        ] {
            let error = Objects::parse(wrong).unwrap_err();
            assert!(error.starts_with("expected s3://") && !error.contains("hunter2"), "{wrong}: {error}");
        }
    }

    #[test]
    fn an_object_store_is_spoken_to_in_clear_on_this_machine_only() {
        for right in
            ["https://s3.example.org", "http://127.0.0.1:5000", "http://localhost:1", "http://[::1]:1"]
        {
            check_endpoint(right).unwrap();
        }
        for wrong in ["http://s3.example.org", "https://a:b@c", "ftp://127.0.0.1", "nonsense", "https://a?b"]
        {
            check_endpoint(wrong).unwrap_err();
        }
    }

    #[test]
    fn what_may_hold_a_password_is_not_shown() {
        for secret in ["postgres://a:b@c/d", "postgres://a@c/d?password=b", "a:b@c", "postgres://a:b@c:x/d"] {
            assert!(is_secret(secret), "{secret}");
        }
        assert!(!is_secret("postgres://a@c/d?sslmode=require") && !is_secret("s3://bucket/a"));
    }
}
