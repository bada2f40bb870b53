//! The stores that several machines share: PostgreSQL and a bucket that speaks S3, each a real server on the loopback.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use aggregator::config;
use aggregator::store::{Access, Append, PostgresStore, Storage, StoreError, contract};
use commonweal_protocol::Digest;
use commonweal_tests::{bucket::Bucket, postgres::Postgres};

/// As one of several: a sole owner of the folder would take away what the others are writing.
fn open(settings: &config::Storage, dir: &tempfile::TempDir) -> Storage {
    Storage::of(dir.path(), settings, Access::Shared).unwrap()
}

#[test]
fn postgres_keeps_the_contract() {
    let Some(postgres) = Postgres::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    contract::suite(&open(&postgres.settings(dir.path()), &dir));
}

#[test]
fn a_bucket_keeps_the_contract() {
    let Some(bucket) = Bucket::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    contract::suite(&open(&bucket.settings(dir.path(), config::Storage::default()), &dir));
}

#[test]
fn a_database_and_a_bucket_together_keep_the_contract() {
    let (Some(postgres), Some(bucket)) = (Postgres::start(), Bucket::start()) else { return };
    let dir = tempfile::tempdir().unwrap();
    contract::suite(&open(&bucket.settings(dir.path(), postgres.settings(dir.path())), &dir));
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        2,
        "two files of secrets, and nothing of the stores'"
    );
}

#[test]
fn a_bucket_is_its_databases_alone_and_both_are_there_for_the_next_process() {
    let (Some(mut postgres), Some(bucket)) = (Postgres::start(), Bucket::start()) else { return };
    let [one, next] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let settings = bucket.settings(one.path(), postgres.settings(one.path()));
    let name = Digest::of(b"update");
    let storage = open(&settings, &one);
    storage.blob.put_if_absent(&name, 6, &mut b"update".as_slice()).unwrap();
    storage.inbox.append_once("round", "a", name.to_string().as_bytes()).unwrap();
    drop(storage);
    postgres.crash();
    let storage = open(&settings, &next);
    let found = storage.inbox.find("round", "a").unwrap().unwrap();
    assert_eq!(found, name.to_string().as_bytes());
    assert_eq!(storage.blob.read_all(&name, 6).unwrap(), b"update");

    // Another federation's database, which would delete what it does not name.
    let other = config::Storage { coordination: Some(postgres.database("other")), ..settings };
    let refused = Storage::of(next.path(), &other, Access::Shared).unwrap_err();
    assert!(matches!(refused, StoreError::Foreign { .. }), "{refused}");
    assert_eq!(storage.blob.list(None, 9).unwrap(), [name]);
}

#[test]
fn hints_reach_other_processes_and_come_again_after_the_server_did() {
    let Some(mut postgres) = Postgres::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let settings = postgres.settings(dir.path());
    let (one, other) = (open(&settings, &dir), open(&settings, &dir));
    let reaches = || {
        let mark = other.watch.mark();
        let woken = std::thread::scope(|scope| {
            let waiter = scope.spawn(|| other.watch.wait(mark, Duration::from_secs(3600)));
            // A hint may be lost while nobody listens yet.
            while !waiter.is_finished() {
                one.watch.notify();
                std::thread::sleep(Duration::from_millis(20));
            }
            other.watch.mark()
        });
        assert_ne!(woken, mark);
    };
    reaches();
    postgres.crash();
    reaches();
}

#[test]
fn a_server_that_lost_its_power_lost_nothing_and_is_found_again() {
    let Some(mut postgres) = Postgres::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let storage = open(&postgres.settings(dir.path()), &dir);
    assert_eq!(storage.coord.compare_and_set("release", 0, b"one").unwrap(), 1);
    assert_eq!(storage.inbox.append_once("round", "a", b"A").unwrap(), Append::Appended);
    postgres.crash();
    // The connections are lost; the first call on each finds that out, and another takes its place.
    assert_eq!(storage.coord.head("release").unwrap().unwrap().value, b"one");
    assert_eq!(storage.inbox.find("round", "a").unwrap().unwrap(), b"A");
    assert_eq!(storage.coord.compare_and_set("release", 1, b"two").unwrap(), 2);
}

#[test]
fn a_connection_that_is_lost_leaves_open_what_was_done_and_the_store_knows() {
    let Some(postgres) = Postgres::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let storage = open(&postgres.settings(dir.path()), &dir);
    let ended = std::sync::atomic::AtomicBool::new(false);
    let head = || loop {
        if let Ok(head) = storage.coord.head("log") {
            return head.map_or(0, |entry| entry.sequence);
        }
    };
    // Sessions are ended under way, again and again, while a log grows.
    let (unsure, mut sequence) = (std::sync::atomic::AtomicU32::new(0), 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Until one ended in the midst of a write.
            for time in 0..300 {
                if time >= 15 && unsure.load(std::sync::atomic::Ordering::SeqCst) > 0 {
                    break;
                }
                postgres.sql(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid() \
                     AND application_name = 'commonweal-aggregator'",
                );
            }
            ended.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        while !ended.load(std::sync::atomic::Ordering::SeqCst) {
            let value = format!("{sequence}");
            match storage.coord.compare_and_set("log", sequence, value.as_bytes()) {
                Ok(next) => sequence = next,
                Err(error) if error.is_determinate() => {
                    assert!(!matches!(error, StoreError::Conflict { .. }), "{error}");
                    assert_eq!(head(), sequence, "what was not done is not there: {error}");
                }
                Err(_) => {
                    unsure.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    sequence = head();
                }
            }
        }
    });
    let entries = storage.coord.scan("log", 1, 10_000).unwrap();
    for (entry, expected) in entries.iter().zip(0_u64..) {
        assert_eq!((entry.sequence, &*entry.value), (expected + 1, expected.to_string().as_bytes()));
    }
    let unsure = unsure.into_inner();
    eprintln!("{} entries, {unsure} times unsure", entries.len());
    assert!(unsure > 0, "no write was cut short: the test saw nothing");
}

#[test]
fn a_newer_schema_is_refused_by_name_and_many_may_start_at_once() {
    let Some(postgres) = Postgres::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let settings = postgres.settings(dir.path());
    std::thread::scope(|scope| {
        for _ in 0..6 {
            // Each in a directory of its own, as serving programs are.
            scope.spawn(|| open(&settings, &tempfile::tempdir().unwrap()).coord.head("release").unwrap());
        }
    });
    assert_eq!(postgres.sql("SELECT version FROM commonweal_schema_version ORDER BY 1"), "1");
    postgres.sql("INSERT INTO commonweal_schema_version (version) VALUES (99)");
    let error = Storage::of(dir.path(), &settings, Access::Shared).unwrap_err();
    assert!(error.to_string().contains("expected schema version 1, got 99"), "{error}");
    assert!(matches!(error, StoreError::Schema { .. }));
}

#[test]
fn a_later_versions_schema_keeps_what_is_stored_or_is_not_there() {
    let Some(postgres) = Postgres::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let settings = postgres.settings(dir.path());
    contract::migration(
        |further| PostgresStore::open_later(&settings, further),
        "ALTER TABLE commonweal_item ADD COLUMN note TEXT NOT NULL DEFAULT 'later'; \
         UPDATE commonweal_item SET note = 'before'",
        "CREATE TABLE commonweal_half (whole INTEGER NOT NULL); INSERT INTO commonweal_half VALUES (NULL)",
    );
    assert_eq!(postgres.sql("SELECT version FROM commonweal_schema_version ORDER BY 1"), "1\n2");
    let notes = postgres.sql("SELECT note, count(*) FROM commonweal_item GROUP BY 1 ORDER BY 1");
    assert_eq!(notes, "before|30\nlater|2", "the change was made of what was there");
    assert_eq!(postgres.sql("SELECT to_regclass('commonweal_half') IS NULL"), "t");
}

#[test]
fn a_server_that_does_not_keep_what_it_answers_is_refused() {
    let Some(postgres) = Postgres::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let settings = postgres.settings(dir.path());
    postgres.sql("ALTER SYSTEM SET full_page_writes = off");
    postgres.sql("SELECT pg_reload_conf()");
    let refused = loop {
        // The server takes its settings up when it comes to it.
        match Storage::of(dir.path(), &settings, Access::Shared) {
            Ok(_) => std::thread::sleep(Duration::from_millis(20)),
            Err(error) => break error.to_string(),
        }
    };
    assert!(refused.contains("expected full_page_writes = on, got off"), "{refused}");
    // A session's own setting does not matter: the programs ask for what they need.
    postgres.sql("ALTER SYSTEM RESET full_page_writes");
    postgres.sql("ALTER SYSTEM SET synchronous_commit = off");
    postgres.sql("SELECT pg_reload_conf()");
    let storage = loop {
        match Storage::of(dir.path(), &settings, Access::Shared) {
            Ok(storage) => break storage,
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    storage.coord.compare_and_set("log", 0, b"one").unwrap();
}

#[test]
fn nobody_comes_in_without_the_password() {
    let Some(postgres) = Postgres::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut settings = postgres.settings(dir.path());
    fs::write(settings.password_file.as_ref().unwrap(), "another").unwrap();
    let error = Storage::of(dir.path(), &settings, Access::Shared).unwrap_err();
    assert!(error.is_determinate());
    settings.password_file = None;
    Storage::of(dir.path(), &settings, Access::Shared).unwrap_err();
}

#[test]
fn damage_in_a_bucket_is_found_when_a_blob_is_read_whole() {
    let Some(bucket) = Bucket::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let settings = bucket.settings(dir.path(), config::Storage::default());
    let storage = Arc::new(open(&settings, &dir));
    let name = Digest::of(b"intact");
    storage.blob.put_if_absent(&name, 6, &mut b"intact".as_slice()).unwrap();
    bucket.overwrite(&format!("adapters/{name}"), b"broken");
    assert!(matches!(storage.blob.read_all(&name, 6), Err(StoreError::Refused { .. })));
}

#[test]
fn between_machines_the_server_has_to_show_who_it_is() {
    let Some(postgres) = Postgres::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let made = || rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (shown, another) = (made(), made());
    postgres.secure(&shown.cert.pem(), &shown.signing_key.serialize_pem());
    let trusting = |pem: &str, host: &str| {
        let authority = dir.path().join("authority.pem");
        fs::write(&authority, pem).unwrap();
        let settings = postgres.settings(dir.path());
        let url = settings.coordination.as_ref().unwrap().replace("127.0.0.1", host);
        let coordination = Some(format!("{url}?sslmode=require"));
        Storage::of(
            dir.path(),
            &config::Storage { coordination, authority: Some(authority), ..settings },
            Access::Shared,
        )
    };
    let storage = trusting(&shown.cert.pem(), "localhost").unwrap();
    storage.coord.compare_and_set("log", 0, b"one").unwrap();
    let secured = postgres.sql(
        "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE ssl AND \
         application_name = 'commonweal-aggregator'",
    );
    assert_ne!(secured, "0");
    trusting(&another.cert.pem(), "localhost").expect_err("another's certificate");
    trusting(&shown.cert.pem(), "127.0.0.1").expect_err("a certificate of another name");
}
