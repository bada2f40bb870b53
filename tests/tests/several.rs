//! An aggregator of several processes over PostgreSQL and a folder or a bucket: the real programs, models included, and
//! `kill -9`.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::{fs, path::Path};

use aggregator::{
    config,
    store::{Access, Storage},
};
use commonweal_protocol::{Digest, bounds};
use commonweal_tests::{
    bucket::Bucket,
    federation::{Device, Federation},
    postgres::{self, Postgres},
    program::{Finished, Running, command},
};
use serde_json::Value;

fn settings(postgres: &Postgres, folder: &Path) -> config::Storage {
    let objects = Some(format!("file://{}", folder.join("objects").display()));
    config::Storage { objects, lead_seconds: 3, ..postgres.settings(folder) }
}

fn is_release(event: &Value) -> bool {
    assert_ne!(event["event"], "rejected", "{event}");
    event["event"] == "published"
}

fn is_later(event: &Value, release: &Value) -> bool {
    is_release(event) && event["version"].as_u64() > release["version"].as_u64()
}

/// A process in each of the directories, of which the first drives and the other stands by.
fn drivers(directories: &[Federation; 2]) -> [Running; 2] {
    let mut first = directories[0].serve_as("drive");
    first.event("drives");
    [first, directories[1].serve_as("drive")]
}

/// Each round is on record once, and every one but the first, which is the base's, became a release.
fn check_rounds(federation: &Federation) {
    let rounds = Finished::of(federation.verb("rounds").arg("--json")).with_code(0).objects();
    for (record, round) in rounds.iter().zip(0..) {
        assert_eq!(record["round"], round, "each round is on record once");
        assert_eq!(record["outcome"], if round == 0 { "base" } else { "published" }, "{record}");
    }
}

#[test]
fn every_command_works_on_a_database_and_a_backup_of_its_own_means_is_whole() {
    let Some(postgres) = Postgres::start() else { return };
    let shared = tempfile::tempdir().unwrap();
    let storage = settings(&postgres, shared.path());
    let federation = Federation::over(&storage, 1, |_| ());
    assert!(!federation.state().join("aggregator.db").exists() && !federation.state().join("blobs").exists());
    let mut aggregator = federation.serve_rounds(None, "");
    let devices = federation.enrolled(1);
    let device = devices[0].run();
    aggregator.wait_for("a release", is_release);
    device.stop();
    let told = |verb: &[&str]| {
        let mut call = federation.verb(verb[0]);
        Finished::of(call.args(&verb[1..]).arg("--json")).with_code(0).objects()
    };
    let version = told(&["status"])[0]["version"].as_u64().unwrap();
    assert!(version >= 1 && told(&["rounds"]).len() as u64 > version);
    assert_eq!(told(&["devices"]).len(), 1);
    told(&["show", &version.to_string()]);
    told(&["rollback", "0"]);
    assert_eq!(told(&["status"])[0]["version"], version + 1);
    let shown = told(&["config"]);
    let url = shown.iter().find(|setting| setting["key"] == "storage.coordination").unwrap();
    assert_eq!(url["value"], postgres.url(), "without a password there is nothing to hide");

    // What is not in the directory is not copied with it.
    let refused = Finished::of(federation.verb("backup").arg(federation.path("copy"))).with_code(3);
    assert!(refused.stderr.contains("pg_dump"), "{}", refused.stderr);
    // Nor does a second federation begin in the same database, nor a second directory of this one by `init`.
    let again = Finished::of(
        command("aggregator")
            .args(["init", "--no-evaluate", "--dir"])
            .arg(federation.path("again"))
            .args(["--package"])
            .arg(commonweal_tests::program::reference("package"))
            .args(["--set", &format!("storage.coordination={}", postgres.url())])
            .args(["--set", &format!("storage.objects=file://{}", shared.path().join("objects").display())])
            .args([
                "--set",
                &format!("storage.password_file={}", storage.password_file.as_ref().unwrap().display()),
            ]),
    )
    .with_code(3);
    assert!(again.stderr.contains("expected a database without a federation"), "{}", again.stderr);
    assert_eq!(aggregator.stop(), 0);

    // The database by its own means, the objects by theirs, the keys by copying; and back, as after a disaster.
    let dump = shared.path().join("dump");
    let mut dumping = postgres.command("pg_dump");
    let dumped = dumping.args(["--format=custom", "--dbname", &postgres.url()]).output().unwrap();
    assert!(dumped.status.success(), "{}", String::from_utf8_lossy(&dumped.stderr));
    fs::write(&dump, dumped.stdout).unwrap();
    let restored = postgres.database("restored");
    let mut restoring = postgres.command("pg_restore");
    restoring.args(["--exit-on-error", "--no-owner", "--dbname", &restored]);
    postgres::finish(restoring.stdin(fs::File::open(&dump).unwrap()));
    let objects = shared.path().join("objects-restored");
    postgres::finish(
        std::process::Command::new("cp").arg("-r").arg(shared.path().join("objects")).arg(&objects),
    );
    let elsewhere = federation.elsewhere();
    elsewhere.configure(|config| {
        config.storage.coordination = Some(restored.clone());
        config.storage.objects = Some(format!("file://{}", objects.display()));
        // Where devices look for it.
        config.listen = federation.address().parse().unwrap();
    });
    let mut aggregator = elsewhere.serve_rounds(None, "");
    let device = devices[0].run();
    // The round under way at the roll-back came to nothing: the head moved under it.
    let released = aggregator.wait_for("a release", |event| event["event"] == "published");
    assert_eq!(released["parent"], version + 1, "the lineage goes on where it was");
    device.stop();
    assert_eq!(aggregator.stop(), 0);

    // A newer program was here: refused by name, as any state of another version.
    postgres.sql("INSERT INTO commonweal_schema_version (version) VALUES (99)");
    for verb in ["serve", "status"] {
        let refused = Finished::of(&mut federation.verb(verb)).with_code(3);
        assert!(refused.stderr.contains("expected schema version 1, got 99"), "{}", refused.stderr);
    }
}

#[test]
fn who_drives_is_killed_and_another_goes_on_and_so_with_who_answers() {
    let Some(postgres) = Postgres::start() else { return };
    let shared = tempfile::tempdir().unwrap();
    let first = Federation::over(&settings(&postgres, shared.path()), 2, |_| ());
    // The second front answers where the first did, as behind a balancer: it is started when that one is dead.
    let others = [first.elsewhere(), first.elsewhere()];
    let mut front = first.serve_as("front");
    let [mut driver, mut other] = drivers(&others);
    let devices = first.enrolled(2);
    for device in &devices {
        fs::write(device.state().join("device.toml"), "stall_seconds = 3\n").unwrap();
    }
    let running: Vec<_> = devices.iter().map(Device::run).collect();
    let released = driver.wait_for("a release", is_release);
    // In the midst of a round.
    front.event("received");
    driver.kill();
    other.event("drives");
    // It may have to tell of the same release once more, where the one before died between that and the record.
    let next = other.wait_for("a later release", |event| is_later(event, &released));
    front.event("received");
    front.kill();
    let front = first.serve_as("front");
    other.wait_for("a later release", |event| is_later(event, &next));
    drop(running);
    assert_eq!((front.stop(), other.stop()), (0, 0));
    check_rounds(&first);
}

#[test]
fn over_a_bucket_who_drives_is_killed_and_another_goes_on() {
    let (Some(postgres), Some(bucket)) = (Postgres::start(), Bucket::start()) else { return };
    let shared = tempfile::tempdir().unwrap();
    let storage = bucket.settings(shared.path(), settings(&postgres, shared.path()));
    let first = Federation::over(&storage, 1, |_| ());
    let others = [first.elsewhere(), first.elsewhere()];
    let mut front = first.serve_as("front");
    let [mut driver, mut other] = drivers(&others);
    let device = first.enrolled(1)[0].run();
    let released = driver.wait_for("a release", is_release);
    // The update is in the bucket and its row in the database; that is all that the other one has of it.
    front.wait_for("an update of a later round", |event| {
        event["event"] == "received" && event["round"].as_u64() > released["round"].as_u64()
    });
    driver.kill();
    other.event("drives");
    let next = other.wait_for("a later release", |event| is_later(event, &released));
    device.stop();
    assert_eq!((front.stop(), other.stop()), (0, 0));
    check_rounds(&first);

    let kept = Storage::of(shared.path(), &storage, Access::Shared).unwrap();
    for event in [released, next] {
        let digest: Digest = event["digest"].as_str().unwrap().parse().unwrap();
        kept.blob.read_all(&digest, bounds::CONTENT_BYTES_MAX).unwrap();
    }
    for directory in [&first, &others[0], &others[1]] {
        for name in ["aggregator.db", "blobs"] {
            assert!(!directory.state().join(name).exists(), "{name} beside the stores that are shared");
        }
    }
    assert!(!shared.path().join("objects").exists(), "objects in a folder");
}

#[test]
fn nothing_acknowledged_is_lost_whoever_is_killed() {
    if Postgres::start().is_none() {
        return;
    }
    let told =
        Finished::of(command("torture").args(["--fronts", "2", "--cycles", "25", "--seed", "5", "--json"]))
            .with_code(0)
            .objects();
    let killed = &told[0]["killed"];
    assert!(killed["published"].as_u64() >= Some(2) && killed["receipts"].as_u64() > Some(0), "{told:?}");
    for peers in ["slow_strangers", "slow_device", "replays", "corrupted"] {
        assert!(told[0]["peers"][peers]["tries"].as_u64() > Some(0), "{peers}: {told:?}");
    }
    // They reach what they are aimed at: a receipt that is said again, and what is sent being refused for what it is.
    assert!(told[0]["peers"]["replays"]["receipts"].as_u64() > Some(0), "{told:?}");
    let refused = told[0]["peers"]["corrupted"]["refused"].as_object().unwrap();
    assert!(refused.values().filter_map(Value::as_u64).sum::<u64>() > 0, "{told:?}");
}

#[test]
fn roles_need_a_database() {
    let federation = Federation::new(1, |_| ());
    let refused = Finished::of(federation.verb("serve").args(["--role", "front"])).with_code(3);
    assert!(refused.stderr.contains("need storage.coordination"), "{}", refused.stderr);
    let half = Finished::of(
        federation.verb("serve").args(["--set", "storage.coordination=postgres://a@127.0.0.1/b"]),
    )
    .with_code(3);
    assert!(half.stderr.contains("storage.objects: expected with storage.coordination"), "{}", half.stderr);
}
