//! A release whose bytes are damaged on the aggregator's disk, on trial with real devices: it goes back by itself.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::{fs, thread, time::Duration};

use commonweal_tests::{
    federation::{Device, Federation},
    http::fetch,
    program::{Finished, PATIENCE},
};
use serde_json::Value;

const DEVICES: usize = 5;

#[test]
fn a_release_that_devices_cannot_install_goes_back_by_itself() {
    let federation = Federation::new(2, |config| {
        // All devices, but for one in a million.
        (config.release.canary_share, config.release.canary_reports) = (0.999_999, DEVICES as u32);
        // So that all of them are heard.
        config.release.canary_failures = 0.9;
    });
    let mut aggregator = federation.serve_rounds(None, "");
    let (address, token) = (aggregator.admin(), federation.admin_token());
    let trials = || -> Value {
        let answer = fetch(&address, "/api/v1/trials", Some(&token));
        assert_eq!(answer.status, 200, "{answer:?}");
        serde_json::from_str(&answer.body).unwrap()
    };
    let devices = federation.enrolled(DEVICES);
    // Two deliver and are gone before it is published.
    let round: Vec<_> =
        devices[..2].iter().map(|device| device.run_as("edge-client", &["--rounds", "1"])).collect();
    for device in round {
        assert_eq!(device.finish(), 0);
    }
    let version = aggregator.event("published")["version"].as_u64().unwrap();
    assert_eq!(aggregator.event("trial")["version"], version);
    let digest = shown(&federation, version)["release"]["digest"].as_str().unwrap().to_owned();
    let blob = federation.state().join("blobs").join(&digest[..2]).join(&digest);
    let mut bytes = fs::read(&blob).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&blob, bytes).unwrap();
    assert_eq!(trials()["trial"]["devices"]["told"], 0);

    // `once` says so, and the aggregator does not know it yet.
    let once = devices[0].call(&["once"]);
    assert!(once.stderr.contains(&format!("release {version} cannot be installed")), "{}", once.stderr);
    let running: Vec<_> = devices.iter().map(Device::run).collect();
    let troubled = aggregator.event("troubled");
    assert_eq!((&troubled["version"], &troubled["fault"]), (&version.into(), &"damaged".into()));
    let back = aggregator.event("rolled_back");
    let why = "5 of 5 devices cannot install it: its bytes are damaged (5)";
    assert_eq!((&back["version"], &back["reason"]), (&version.into(), &why.into()));
    let told = shown(&federation, version);
    assert_eq!((&told["stage"], &told["stage_reason"]), (&"rolled back".into(), &why.into()));
    let ended = trials()["ended"][0].clone();
    assert_eq!((&ended["rolled_back"], &ended["devices"]["faults"]["damaged"]), (&true.into(), &5.into()));

    // What takes its place is installed by those that ran all the while.
    let now = back["now"].as_u64().unwrap();
    let end = std::time::Instant::now() + PATIENCE;
    loop {
        let listed = fetch(&address, "/api/v1/devices", Some(&token)).body;
        let listed: Vec<Value> = serde_json::from_str(&listed).unwrap();
        if listed.iter().all(|device| device["installed"].as_u64().is_some_and(|installed| installed >= now))
        {
            break;
        }
        assert!(std::time::Instant::now() < end, "release {now} is not installed: {listed:?}");
        thread::sleep(Duration::from_millis(200));
    }
    for device in running {
        assert_eq!(device.stop(), 0);
    }
}

fn shown(federation: &Federation, version: u64) -> Value {
    let mut show = federation.verb("show");
    Finished::of(show.arg(version.to_string()).arg("--json")).with_code(0).objects().remove(0)
}
