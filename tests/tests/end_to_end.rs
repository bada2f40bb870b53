//! A federation as an operator and its devices run it: the real programs, QUIC on the loopback, the bundled model.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::{fs, path::Path};

use commonweal_adapter::disk;
use commonweal_package::{Hash, Manifest};
use commonweal_protocol::{AggregatorKey, RoundId};
use commonweal_tests::{
    federation::{Device, Federation},
    program::{Finished, command, reference, workspace},
};
use commonweal_transport::Credentials;
use edge_client::{store::Store, upload};

fn receipts(device: &Device) -> (Vec<upload::Delivered>, AggregatorKey) {
    let store = Store::open_shared(device.state()).unwrap();
    let pem = String::from_utf8(store.read("identity/credentials.pem").unwrap().unwrap()).unwrap();
    (upload::delivered(&store).unwrap(), *Credentials::from_pem(&pem).unwrap().signing_key())
}

#[test]
fn a_round_is_trained_merged_published_and_installed() {
    let federation = Federation::new(2, |_| ());
    let mut aggregator = federation.serve();
    let devices = federation.enrolled(2);
    let mut running: Vec<_> = devices.iter().map(Device::run).collect();

    let published = aggregator.event("published");
    assert_eq!(published["round"], 1);
    assert_eq!(published["parent"], federation.first_version);
    let version = published["version"].as_u64().unwrap();
    assert!(version > federation.first_version, "{published}");
    for device in &mut running {
        for stage in ["sample", "filter", "revise", "train", "compress", "upload"] {
            assert_eq!(device.stage(stage)["round"], 1);
        }
        let installed =
            device.wait_for("the head", |event| event["stage"] == "install" && event["version"] == version);
        assert_eq!(installed["round"], 1);
    }
    assert_eq!(aggregator.finish(), 0);
    drop(running);

    for device in &devices {
        let (receipts, key) = receipts(device);
        assert_eq!(receipts.len(), 1);
        assert_eq!(receipts[0].round, RoundId(1));
        receipts[0].receipt.verify(&key).unwrap();
        let mut forged = receipts[0].receipt;
        forged.receipt.length += 1;
        assert!(forged.verify(&key).is_err(), "a changed receipt verifies");

        let status = &device.call(&["status"]).with_code(0).objects()[0];
        assert_eq!(status["installed"], version);
        assert_eq!(status["updates_accepted"], 1);
        assert_eq!(status["samples"], 8);
    }
    let status = &Finished::of(federation.verb("status").arg("--json")).with_code(0).objects()[0];
    assert_eq!(status["version"], version);
    assert_eq!(status["devices"], 2);
    assert_eq!(status["tokens_open"], 0);
    let record = federation.last_round();
    assert_eq!(record["outcome"], "published");
    assert_eq!(record["updates"], 2);
    assert_eq!(record["version"], version);
}

#[test]
fn a_candidate_that_fails_a_gate_is_rejected_with_its_reason() {
    // No model reaches this loss.
    let federation = Federation::new(1, |config| config.evaluate.gates.held_out_loss_max = Some(1e-6));
    let mut aggregator = federation.serve();
    let devices = federation.enrolled(1);
    let device = devices[0].run();
    let rejected = aggregator.wait_for("a decision", |event| {
        event["event"] == "rejected" || event["round"] == 1 && event["event"] == "published"
    });
    assert_eq!(rejected["event"], "rejected", "{rejected}");
    assert!(rejected["reason"].as_str().unwrap().contains("loss"), "{rejected}");
    assert_eq!(aggregator.finish(), 0);
    drop(device);

    let record = federation.last_round();
    assert_eq!(record["outcome"], "rejected");
    assert_eq!(record["version"], federation.first_version);
    assert_eq!(record["failed_gates"].as_array().unwrap().len(), 1);
    let status = &devices[0].call(&["status"]).with_code(0).objects()[0];
    assert_eq!(status["installed"], federation.first_version);
    assert_eq!(status["updates_accepted"], 1);
}

#[test]
fn a_signal_ends_a_device_and_an_aggregator() {
    let federation = Federation::new(2, |_| ());
    let aggregator = federation.serve();
    let mut device = federation.enrolled(1)[0].run();
    // One device of two: the round does not open.
    device.wait_for("no work", |event| event["event"] == "waiting" && event["why"] == "no work");
    assert_eq!(device.stop(), 0);
    assert_eq!(aggregator.stop(), 0);
}

#[test]
fn a_boosted_update_passes_the_protocol_and_is_clipped_by_the_merge() {
    let federation = Federation::new(3, |_| ());
    let mut aggregator = federation.serve();
    let devices = federation.enrolled(2);
    let hostile = federation.device("hostile");
    let invitation = federation.invitations(1).remove(0);
    let call =
        |arguments: &[&str]| Finished::of(&mut hostile.command("hostile-device", arguments)).with_code(0);
    call(&["enroll", &invitation]);
    let rows = workspace().join("models/reference/demo/hostile.jsonl");
    let added = call(&["add", &rows.display().to_string()]).objects()[0]["added"].as_u64().unwrap();
    assert!(added > 100);
    let mut running: Vec<_> = devices.iter().map(Device::run).collect();
    running.push(hostile.run_as("hostile-device", &["--boost", "50"]));
    let kept = running[2].stage("filter");
    assert_eq!((&kept["kept"], &kept["flagged"]), (&added.into(), &0.into()), "its filter is on");

    let merged = aggregator.stage("merge");
    let id = hostile.call(&["status"]).with_code(0).objects()[0]["device"].clone();
    assert_eq!(merged["clipped"], serde_json::json!([id]));
    let norms = merged["norms"].as_array().unwrap();
    let norm_max = |is_hostile: bool| {
        let of = norms.iter().filter(|norm| (norm[0] == id) == is_hostile);
        of.map(|norm| norm[1].as_f64().unwrap()).fold(0.0, f64::max)
    };
    assert!(norm_max(true) > 5.0 * norm_max(false), "{merged}");
    assert!(merged["merged_norm"].as_f64().unwrap() <= norm_max(false) * 1.001, "{merged}");
    let (receipts, key) = receipts(&hostile);
    receipts[0].receipt.verify(&key).unwrap();
}

#[test]
fn an_invitation_is_good_for_one_device() {
    let federation = Federation::new(2, |_| ());
    let _aggregator = federation.serve();
    let invitation = federation.invitations(1).remove(0);
    let first = federation.device("first");
    first.call(&["enroll", &invitation]).with_code(0);
    let second = federation.device("second");
    let refused = second.call(&["enroll", &invitation]).with_code(4);
    assert!(refused.stderr.contains("token"), "{}", refused.stderr);
    let enrolled = |device: &Device| device.call(&["status"]).with_code(0).objects()[0]["enrolled"].clone();
    assert_eq!(enrolled(&first), true);
    assert_eq!(enrolled(&second), false);

    // An invitation of another aggregator: the certificate is not the one that it pins.
    let pinned = invitation.rsplit_once("&ca=").unwrap().0.to_owned();
    let elsewhere = format!("{pinned}&ca={}", "0".repeat(64));
    federation.device("third").call(&["enroll", &elsewhere]).with_code(4);
}

#[test]
fn a_withdrawn_invitation_is_good_for_nobody() {
    let federation = Federation::new(2, |_| ());
    let mut aggregator = federation.serve();
    let token = |arguments: &[&str]| Finished::of(federation.verb("token").arg("--json").args(arguments));
    let [first, second, third, used]: [String; 4] = federation.invitations(4).try_into().unwrap();
    let told = token(&["--revoke", &first]).with_code(0).objects();
    assert_eq!((&told[0]["event"], &told[0]["invitations"]), (&"withdrawn".into(), &1.into()));
    let refused = |invitation: &str| federation.device("late").call(&["enroll", invitation]).with_code(4);
    assert!(refused(&first).stderr.contains("token"));
    let told = aggregator.event("refused");
    assert!(told["reason"].as_str().unwrap().contains("withdrawn"), "{told}");

    federation.device("early").call(&["enroll", &used]).with_code(0);
    assert_eq!(token(&["--revoke-all"]).with_code(0).objects()[0]["invitations"], 2);
    refused(&second);
    refused(&third);
    let spent = token(&["--revoke", &used]).with_code(3).stderr;
    assert!(spent.contains("the token was spent by device"), "{spent}");
    let wrong = token(&["--revoke", "secret"]).with_code(3).stderr;
    assert!(wrong.contains("--revoke: expected an invitation") && !wrong.contains("secret"), "{wrong}");
}

#[test]
fn a_device_with_another_base_is_refused() {
    let federation = Federation::new(1, |_| ());
    let mut aggregator = federation.serve();
    let device = federation.enrolled(1).remove(0);
    let other = federation.path("other-package");
    change_base(&reference("package"), &other);
    let mut once = command("edge-client");
    once.arg("once").arg("--dir").arg(device.state()).arg("--package").arg(&other).args([
        "--threads",
        "1",
        "--json",
    ]);
    let refused = Finished::of(&mut once).with_code(4);
    assert!(refused.stderr.contains("base"), "{}", refused.stderr);
    let told = aggregator.event("refused");
    assert!(told["reason"].as_str().unwrap().contains("base"), "{told}");
}

/// The same model under another base hash: one comment more in the chat template, its adapters made for it.
fn change_base(from: &Path, to: &Path) {
    let mut manifest = Manifest::parse(&fs::read_to_string(from.join("package.toml")).unwrap()).unwrap();
    fs::create_dir_all(to.join("adapters")).unwrap();
    for name in manifest.files.keys() {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
    let replace = |manifest: &mut Manifest, name: &str, bytes: &[u8]| {
        fs::write(to.join(name), bytes).unwrap();
        manifest.files.insert(name.to_owned(), Hash(*blake3::hash(bytes).as_bytes()));
    };
    let template = fs::read_to_string(from.join("chat_template.jinja")).unwrap() + "{# another base #}";
    replace(&mut manifest, "chat_template.jinja", template.as_bytes());
    manifest.base = manifest.identify();
    for name in ["adapters/guard.safetensors", "adapters/reviser.safetensors"] {
        let (adapter, mut facts) = disk::read(&fs::read(from.join(name)).unwrap()).unwrap();
        facts.base = manifest.base.0;
        replace(&mut manifest, name, &disk::write(&adapter, &facts).unwrap());
    }
    fs::write(to.join("package.toml"), toml::to_string(&manifest).unwrap()).unwrap();
}
