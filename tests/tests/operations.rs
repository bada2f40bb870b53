//! The aggregator as its operator sees it: the admin port of a real one, with a real federation behind it.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::{
    io::Write,
    net::TcpListener,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use aggregator::config::Listen;
use commonweal_tests::{
    federation::{Device, Federation},
    http::{Answer, exchange, fetch},
    program::{Finished, PATIENCE},
};

/// The value of one series, by its name and labels as they are written.
fn value(metrics: &str, series: &str) -> f64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("expected {series} in\n{metrics}")).parse().unwrap()
}

/// Asks until `wanted` holds.
fn fetch_until(ask: impl Fn() -> Answer, what: &str, wanted: impl Fn(&str) -> bool) -> String {
    let end = std::time::Instant::now() + PATIENCE;
    loop {
        let answer = ask();
        assert_eq!(answer.status, 200, "{answer:?}");
        if wanted(&answer.body) {
            return answer.body;
        }
        assert!(std::time::Instant::now() < end, "{what} did not come:\n{}", answer.body);
        thread::sleep(Duration::from_millis(200));
    }
}

/// The independent parser's view: every sample's name. `scripts/test` installs it and names the interpreter.
fn check_by_python(metrics: &str) {
    let Ok(python) = std::env::var("COMMONWEAL_PYTHON") else {
        eprintln!("COMMONWEAL_PYTHON is not set: the form of the metrics is not checked by another parser");
        return;
    };
    let program = "import sys\nfrom prometheus_client.openmetrics.parser import text_string_to_metric_families as parse\n\
                   for family in parse(sys.stdin.read()):\n    for sample in family.samples: print(sample.name)\n";
    let mut child = Command::new(python)
        .args(["-c", program])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(metrics.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}\n{metrics}", String::from_utf8_lossy(&output.stderr));
    let names = String::from_utf8_lossy(&output.stdout);
    for name in ["commonweal_rounds_total", "commonweal_round_stage_duration_seconds_bucket"] {
        assert!(names.lines().any(|line| line == name), "{name} in {names}");
    }
}

#[test]
fn the_admin_port_tells_what_a_federation_does() {
    let federation = Federation::new(2, |_| ());
    let mut aggregator = federation.serve_rounds(None, "");
    let (address, token) = (aggregator.admin(), federation.admin_token());
    let metrics = |token: Option<&str>| fetch(&address, "/metrics", token);

    // Health is for everybody, the rest for whoever knows the token.
    assert_eq!(fetch(&address, "/healthz", None).body, "alive\n");
    let ready = fetch(&address, "/readyz", None);
    assert_eq!((ready.status, ready.body.as_str()), (200, "ready\n"));
    assert!(ready.head.contains("cache-control: no-store") && ready.head.contains("nosniff"), "{ready:?}");
    for wrong in [None, Some(""), Some("0000000000000000"), Some(&token[1..])] {
        let refused = metrics(wrong);
        assert_eq!(refused.status, 401, "{refused:?}");
        assert!(!refused.body.contains("commonweal_"), "{refused:?}");
    }
    assert_eq!(fetch(&address, "/state", Some(&token)).status, 404);
    let endless = format!("GET /healthz HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(100_000));
    assert_eq!(exchange(&address, endless.as_bytes()).status, 431);

    let before = metrics(Some(&token));
    assert!(before.head.contains("application/openmetrics-text; version=1.0.0"), "{}", before.head);
    for (series, wanted) in [
        ("commonweal_ready", 1.0),
        ("commonweal_devices{state=\"active\"}", 0.0),
        ("commonweal_rounds_total{outcome=\"published\"}", 0.0),
        ("commonweal_round_phase{phase=\"waiting\"}", 1.0),
    ] {
        assert!((value(&before.body, series) - wanted).abs() < 1e-9, "{series} in {}", before.body);
    }

    let devices = federation.enrolled(2);
    let running: Vec<_> = devices.iter().map(Device::run).collect();
    let version = aggregator.event("published")["version"].as_u64().unwrap();
    let after = fetch_until(
        || metrics(Some(&token)),
        "the end of the round",
        |text| {
            value(text, "commonweal_rounds_total{outcome=\"published\"}") >= 1.0
                && value(text, "commonweal_devices_current") >= 2.0
        },
    );
    drop(running);
    assert!(value(&after, "commonweal_release_version") >= version as f64);
    for (series, least) in [
        ("commonweal_enrolments_total", 2.0),
        ("commonweal_devices{state=\"active\"}", 2.0),
        ("commonweal_devices_online", 2.0),
        ("commonweal_tasks_assigned_total", 2.0),
        ("commonweal_updates_received_total{outcome=\"accepted\"}", 2.0),
        ("commonweal_updates_received_bytes_total", 1_000.0),
        ("commonweal_releases_published_total", 1.0),
        ("commonweal_round_stage_duration_seconds_count{stage=\"merge\"}", 1.0),
        ("commonweal_round_stage_duration_seconds_count{stage=\"evaluate\"}", 1.0),
        ("commonweal_gate_passed{metric=\"safe_rate\",direction=\"at_least\"}", 1.0),
        ("commonweal_store_bytes{part=\"database\"}", 1_000.0),
        ("commonweal_store_bytes{part=\"blobs\"}", 1_000.0),
        ("commonweal_store_free_bytes", 1.0),
    ] {
        assert!(value(&after, series) >= least, "{series} of at least {least} in\n{after}");
    }
    check_by_python(&after);

    let listed = Finished::of(federation.verb("devices").arg("--json")).with_code(0).objects();
    let name = listed[0]["device"].as_str().unwrap().to_owned();
    assert!(!after.contains(&name), "a device's name is no label");
    Finished::of(federation.verb("revoke").arg(&name)).with_code(0);
    let revoked = metrics(Some(&token)).body;
    assert!((value(&revoked, "commonweal_devices{state=\"revoked\"}") - 1.0).abs() < 1e-9, "{revoked}");
    assert_eq!(aggregator.stop(), 0);

    // Rounds are counted from the first one, whoever counted before.
    let rounds = value(&revoked, "commonweal_rounds_total{outcome=\"published\"}");
    let aggregator = federation.serve_rounds(None, "");
    let again = fetch(&aggregator.admin(), "/metrics", Some(&token)).body;
    assert!(value(&again, "commonweal_rounds_total{outcome=\"published\"}") >= rounds, "{again}");
    assert!(value(&again, "commonweal_updates_received_bytes_total") < 1.0, "{again}");
}

#[test]
fn a_port_that_is_taken_is_named_and_off_is_off() {
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let federation = Federation::new(1, |config| config.receive.reserve_bytes = 1 << 60);
    let taken = holder.local_addr().unwrap().to_string();
    let refused = Finished::of(federation.verb("serve").env("COMMONWEAL_ADMIN", &taken)).with_code(5);
    assert!(
        refused.stderr.contains(&format!("cannot listen on {taken} for operators (admin.listen")),
        "{}",
        refused.stderr
    );

    // A full disk is no reason to die, and one not to be ready.
    let aggregator = federation.serve_rounds(None, "");
    let ready = fetch(&aggregator.admin(), "/readyz", None);
    assert_eq!(ready.status, 503);
    assert!(ready.body.starts_with("disk: expected more than"), "{ready:?}");
    assert_eq!(fetch(&aggregator.admin(), "/healthz", None).status, 200);
    drop(aggregator);

    federation.configure(|config| {
        config.admin.listen = Listen::Off;
    });
    let mut serve = federation.verb("serve");
    serve.arg("--json").env_remove("COMMONWEAL_ADMIN");
    let mut running =
        commonweal_tests::program::Running::start("aggregator", &mut serve, &federation.path("off.log"));
    assert!(running.event("listening")["admin"].is_null());
    assert_eq!(running.stop(), 0);
}
