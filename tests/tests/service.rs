//! `edge-client` as a service: what systemd hears of it, its unit, and the package that brings both.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::{
    fs,
    os::unix::net::UnixDatagram,
    process::Command,
    time::{Duration, Instant},
};

use commonweal_tests::{
    federation::Federation,
    program::{Finished, PATIENCE, Running, workspace},
};

/// Everything that comes until one of it is `wanted`.
fn hear(socket: &UnixDatagram, heard: &mut Vec<String>, wanted: impl Fn(&str) -> bool) {
    let end = Instant::now() + PATIENCE;
    let mut bytes = [0; 4096];
    while !heard.iter().any(|said| wanted(said)) {
        assert!(Instant::now() < end, "only {heard:?}");
        if let Ok(length) = socket.recv(&mut bytes) {
            heard.extend(String::from_utf8_lossy(&bytes[..length]).lines().map(str::to_owned));
        }
    }
}

#[test]
fn systemd_hears_that_it_is_ready_what_it_does_that_it_lives_and_that_it_stops() {
    let federation = Federation::new(1, |_| ());
    let _aggregator = federation.serve_rounds(None, "");
    let device = federation.enrolled(1).remove(0);
    let path = federation.path("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut command = device.command("edge-client", &["run"]);
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "600000");
    let mut running = Running::start("device", &mut command, &federation.path("device.log"));
    let mut heard = Vec::new();
    hear(&socket, &mut heard, |said| said == "READY=1");
    hear(&socket, &mut heard, |said| said == "WATCHDOG=1");
    hear(&socket, &mut heard, |said| said.starts_with("STATUS=round 1: trains"));
    running.stage("install");
    assert!(!heard.iter().any(|said| said == "STOPPING=1"), "{heard:?}");
    assert_eq!(running.stop(), 0);
    hear(&socket, &mut heard, |said| said == "STOPPING=1");
    hear(&socket, &mut heard, |said| said == "STATUS=has stopped");
}

/// `dpkg-deb`, at the root of the repository, below which packages are made.
fn dpkg() -> Command {
    let mut command = Command::new("dpkg-deb");
    command.current_dir(workspace());
    command
}

/// Whether a program is on this machine; the test that needs it says that it is skipped.
fn is_here(program: &str, test: &str) -> bool {
    let is_here = Command::new(program).arg("--version").output().is_ok();
    if !is_here {
        eprintln!("SKIPPED {test}: {program} is not on this machine");
    }
    is_here
}

#[test]
fn the_units_are_what_systemd_understands() {
    if !is_here("systemd-analyze", "the_units_are_what_systemd_understands") {
        return;
    }
    for unit in ["commonweal-edge-client.service", "commonweal-aggregator.service"] {
        let path = workspace().join("packaging").join(unit);
        let told = Finished::of(Command::new("systemd-analyze").arg("verify").arg(path));
        let complaints: Vec<_> = told
            .stderr
            .lines()
            .filter(|line| line.contains(unit))
            // The programs are not installed here.
            .filter(|line| !line.contains("is not executable: No such file or directory"))
            .collect();
        assert!(complaints.is_empty(), "{complaints:?}");
    }
}

#[test]
fn the_package_has_the_program_its_service_and_what_they_need() {
    if !is_here("dpkg-deb", "the_package_has_the_program_its_service_and_what_they_need") {
        return;
    }
    let made = Finished::of(Command::new(workspace().join("scripts/package-deb")).arg("--no-build"));
    let deb = made.with_code(0).stdout.trim().to_owned();
    let files = Finished::of(dpkg().args(["--contents", &deb])).with_code(0).stdout;
    for file in [
        "./usr/bin/edge-client",
        "./usr/lib/systemd/system/commonweal-edge-client.service",
        "./usr/lib/commonweal/libonnxruntime.so",
        "./usr/share/commonweal/package/package.toml",
        "./etc/default/commonweal-edge-client",
        "./usr/share/doc/commonweal-edge-client/policy.toml",
    ] {
        assert!(files.lines().any(|line| line.ends_with(file)), "{file} is not in\n{files}");
    }
    let control = Finished::of(dpkg().args(["--field", &deb])).with_code(0).stdout;
    assert!(control.contains("Package: commonweal-edge-client"), "{control}");
}

#[test]
fn the_policy_of_the_package_is_the_one_that_holds_without_it() {
    let text = fs::read_to_string(workspace().join("packaging/policy.toml")).unwrap();
    let policy: edge_client::policy::Policy = toml::from_str(&text).unwrap();
    assert_eq!(policy, edge_client::policy::Policy::default());
}
