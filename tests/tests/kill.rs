//! `kill -9` at the worst moments, then a restart: what was acknowledged is still there, the round completes, and no
//! update counts twice. The aggregator halts at its fault points (`aggregator::pause`), so every kill hits its place.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::{fs, path::Path};

use commonweal_protocol::{Digest, SignedReceipt};
use commonweal_tests::{
    federation::{Device, Federation},
    program::{Finished, Running},
};
use edge_client::{store::Store, upload};

fn receipts(device: &Device) -> Vec<SignedReceipt> {
    let store = Store::open_shared(device.state()).unwrap();
    upload::delivered(&store).unwrap().into_iter().map(|delivered| delivered.receipt).collect()
}

/// Round 1 completes on `aggregator` with one update of each device.
fn completes(
    federation: &Federation,
    mut aggregator: Running,
    devices: &[Device],
    mut running: Vec<Running>,
) {
    let merged = aggregator.wait_for("a decision", |event| {
        event["event"] == "rejected" || event["event"] == "published" && event["round"] == 1
    });
    assert_eq!(merged["event"], "published", "{merged}");
    assert_eq!(merged["version"], federation.first_version + 1, "published once");
    assert_eq!(merged["report_card"]["counts"]["devices_merged"], devices.len());
    for device in &mut running {
        // A device installs after its receipt is on disk, however late that came.
        device.wait_for("the head", |event| {
            event["stage"] == "install" && event["version"] == merged["version"]
        });
    }
    drop(running);
    assert_eq!(aggregator.stop(), 0);
    let rounds = Finished::of(federation.verb("rounds").arg("--json")).with_code(0).objects();
    let first: Vec<_> = rounds.iter().filter(|record| record["round"] == 1).collect();
    assert_eq!(first.len(), 1, "{rounds:?}");
    assert_eq!(first[0]["updates"], devices.len());
    for device in devices {
        assert_eq!(receipts(device).len(), 1);
    }
}

fn kill_aggregator_at(point: &str) {
    let federation = Federation::new(2, |_| ());
    let mut aggregator = federation.serve_rounds(None, point);
    let devices = federation.enrolled(2);
    for device in &devices {
        // What is waited for after the kill is this, on each connection that the aggregator took with it.
        fs::write(device.state().join("device.toml"), "stall_seconds = 3\n").unwrap();
    }
    let running: Vec<_> = devices.iter().map(Device::run).collect();
    let paused = aggregator.event("paused");
    assert_eq!(paused["at"], point);
    aggregator.kill();
    let acknowledged: Vec<_> = devices.iter().map(receipts).collect();
    let aggregator = federation.serve_rounds(None, "");
    completes(&federation, aggregator, &devices, running);
    for (device, before) in devices.iter().zip(acknowledged) {
        assert!(receipts(device).starts_with(&before), "an acknowledged update got another receipt");
    }
}

#[test]
fn aggregator_killed_when_a_chunk_is_durable_but_not_acknowledged() {
    kill_aggregator_at("upload");
}

#[test]
fn aggregator_killed_when_an_update_is_taken_but_its_receipt_not_sent() {
    kill_aggregator_at("receipt");
}

#[test]
fn aggregator_killed_before_the_merge() {
    kill_aggregator_at("merge");
}

#[test]
fn aggregator_killed_after_the_merge_before_its_state_is_saved() {
    kill_aggregator_at("merged");
}

#[test]
fn aggregator_killed_before_the_head_moves() {
    kill_aggregator_at("publish");
}

#[test]
fn aggregator_killed_after_the_head_moved_before_the_round_is_on_record() {
    kill_aggregator_at("published");
}

#[test]
fn device_killed_while_training_goes_on_where_it_was() {
    let federation = Federation::new(1, |config| config.train.steps_max = 12);
    let aggregator = federation.serve_rounds(None, "");
    let devices = federation.enrolled(1);
    fs::write(devices[0].state().join("policy.toml"), "[train]\ncheckpoint_steps = 1\n").unwrap();
    let mut device = devices[0].run();
    device.wait_for("step 4", |event| event["event"] == "step" && event["step"] == 4);
    device.kill();
    assert!(receipts(&devices[0]).is_empty());

    let mut device = devices[0].run();
    let trained = device.stage("train");
    // The checkpoint of step 3 was on disk before step 4 was told.
    assert!(trained["resumed_step"].as_u64().unwrap() >= 3, "{trained}");
    assert_eq!(trained["steps"], 12);
    let again = |stage: &str| device.events.iter().any(|event| event["stage"] == stage);
    assert!(!again("filter") && !again("revise"), "judged twice");
    completes(&federation, aggregator, &devices, vec![device]);
}

/// Whether any file below holds these words.
fn holds(folder: &Path, words: &str) -> bool {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).any(|path| {
        if path.is_dir() {
            return holds(&path, words);
        }
        fs::read(path).unwrap().windows(words.len()).any(|window| window == words.as_bytes())
    })
}

#[test]
fn what_a_kill_leaves_on_the_disk_tells_no_word_and_is_forgotten_by_name() {
    let federation = Federation::new(1, |config| config.train.steps_max = 200);
    let aggregator = federation.serve_rounds(None, "");
    let devices = federation.enrolled(1);
    let state = devices[0].state();
    fs::write(state.join("policy.toml"), "[train]\ncheckpoint_steps = 1\nsteps_max = 200\n").unwrap();
    let mut device = devices[0].run();
    device.wait_for("step 3", |event| event["event"] == "step" && event["step"] == 3);
    device.kill();
    assert!(
        ["pairs.json", "training.safetensors"].iter().all(|name| state.join("round").join(name).exists())
    );
    for words in ["boil", "messages", "content"] {
        assert!(!holds(&state.join("samples"), words) && !holds(&state.join("round"), words), "{words}");
    }
    // Without its key, what the kill left opens to nobody, and nothing is lost by trying.
    let key = state.join("store.key");
    fs::rename(&key, state.join("aside")).unwrap();
    let refused = devices[0].call(&["once"]).with_code(3);
    assert!(refused.stderr.contains("store.key"), "{}", refused.stderr);
    fs::rename(state.join("aside"), &key).unwrap();

    // A sample is forgotten while the daemon trains on it: that work ends, and is done again without it.
    let mut device = devices[0].run();
    let resumed = device.wait_for("a step", |event| event["event"] == "step");
    assert!(resumed["step"].as_u64().unwrap() >= 3, "{resumed}");
    let listed = devices[0].call(&["samples"]).with_code(0).objects();
    assert!(listed.len() == 8 && listed.iter().all(|sample| sample["state"] == "used"), "{listed:?}");
    let name = listed[0]["sample"].as_str().unwrap();
    let forgotten = devices[0].call(&["forget", &name[..12]]).with_code(0).objects().remove(0);
    assert_eq!((&forgotten["samples"], &forgotten["rounds"]), (&1.into(), &true.into()), "{forgotten}");
    let drawn = device.wait_for("the stage anew", |event| event["stage"] == "sample");
    assert_eq!(drawn["samples"], 7);
    device.kill();
    aggregator.kill();

    let everything = devices[0].call(&["forget", "--all"]).with_code(0).objects().remove(0);
    assert_eq!((&everything["samples"], &everything["key"]), (&7.into(), &true.into()), "{everything}");
    assert!(!key.exists() && !state.join("round/pairs.json").exists());
    assert!(devices[0].call(&["samples"]).with_code(0).objects().is_empty());
}

/// Both sides die with the aggregator halted at `point`; the device sends the update that it had, untrained again.
fn kill_device_at(point: &str) {
    let federation = Federation::new(1, |_| ());
    let mut aggregator = federation.serve_rounds(None, point);
    let devices = federation.enrolled(1);
    let device = devices[0].run();
    aggregator.event("paused");
    device.kill();
    aggregator.kill();
    assert!(receipts(&devices[0]).is_empty());
    let store = Store::open_shared(devices[0].state()).unwrap();
    let packed = store.read("round/update.packed").unwrap().unwrap();

    let aggregator = federation.serve_rounds(None, "");
    let mut device = devices[0].run();
    device.stage("upload");
    assert!(device.events.iter().all(|event| event["stage"] != "train"), "trained twice");
    let sent = receipts(&devices[0]).remove(0).receipt;
    assert_eq!((sent.digest, sent.length), (Digest::of(&packed), packed.len() as u64));
    completes(&federation, aggregator, &devices, vec![device]);
}

#[test]
fn device_killed_while_uploading_sends_the_same_update() {
    kill_device_at("upload");
}

#[test]
fn device_killed_before_its_receipt_arrives_gets_it_again() {
    kill_device_at("receipt");
}

/// Rules that cannot hold, then rules that hold anywhere.
#[test]
fn a_daemon_waits_while_its_owners_rules_do_not_hold_and_says_why() {
    let federation = Federation::new(1, |_| ());
    let mut aggregator = federation.serve_rounds(None, "");
    let devices = federation.enrolled(1);
    let policy = devices[0].state().join("policy.toml");
    let none = "idle = \"0s\"\npower = false\nunmetered = false\ntemperature_max_c = 120.0\n";
    fs::write(&policy, format!("[when]\n{none}memory_free_min = \"1000TB\"\n")).unwrap();
    let run = || {
        let mut command = devices[0].command("edge-client", &["run"]);
        command.env_remove("COMMONWEAL_ALWAYS");
        Running::start("device-0", &mut command, &devices[0].state().with_extension("log"))
    };
    let mut device = run();
    let waiting = device.event("waiting");
    assert!(waiting["why"].as_str().unwrap().contains("memory is short"), "{waiting}");
    let status = devices[0].call(&["status"]).with_code(0).objects().remove(0);
    assert_eq!(status["may_work"], false);
    let doing = status["doing"]["sentence"].as_str().unwrap();
    assert!(doing.starts_with("waits: memory is short"), "{doing}");
    // By hand it works at once.
    assert_eq!(device.stop(), 0);
    assert!(devices[0].call(&["status"]).with_code(0).objects()[0]["doing"].is_null());
    let once = devices[0].call(&["once", "--heed-rules"]).with_code(0).objects().remove(0);
    assert_eq!(once["event"], "waiting");

    fs::write(&policy, format!("[when]\n{none}memory_free_min = \"0B\"\n")).unwrap();
    let mut device = run();
    device.stage("upload");
    aggregator.event("published");
}
