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
        ("commonweal_driving", 1.0),
        ("commonweal_trials_total{outcome=\"rolled_back\"}", 0.0),
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

    // A token that leaked is replaced without a restart; one that others can read is not taken.
    let path = federation.state().join("admin.token");
    std::fs::remove_file(&path).unwrap();
    aggregator.signal("HUP");
    assert!(aggregator.event("reloaded")["problem"].is_null());
    assert_eq!(metrics(Some(&token)).status, 401);
    let token = federation.admin_token();
    assert_eq!(metrics(Some(&token)).status, 200);
    std::fs::write(&path, "short").unwrap();
    aggregator.signal("HUP");
    assert!(aggregator.event("reloaded")["problem"].as_str().unwrap().contains("at least 16 characters"));
    assert_eq!(metrics(Some(&token)).status, 200);
    std::fs::write(&path, &token).unwrap();

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
    serve.arg("--json").env_remove("COMMONWEAL_ADMIN").env("COMMONWEAL_LOG", "info");
    let log = federation.path("off.log");
    let mut running = commonweal_tests::program::Running::start("aggregator", &mut serve, &log);
    let listening = running.event("listening");
    assert!(listening["admin"].is_null());
    assert!(listening["time_ms"].as_u64().unwrap() > 1_700_000_000_000, "{listening}");
    assert_eq!(running.stop(), 0);
    // Where events are JSON, diagnostics are too.
    let log = std::fs::read_to_string(log).unwrap();
    let line = log.lines().find(|line| line.contains("aggregator::laboratory"));
    let line = line.unwrap_or_else(|| panic!("no word on what the model runs on in\n{log}"));
    let told: serde_json::Value =
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
    assert_eq!((&told["level"], &told["target"]), (&"INFO".into(), &"aggregator::laboratory".into()));
    assert!(told["fields"]["message"].as_str().unwrap().starts_with("device "), "{told}");
}

#[test]
fn a_backup_made_while_it_serves_goes_on_where_it_was() {
    let federation = Federation::new(2, |_| ());
    let mut aggregator = federation.serve_rounds(None, "");
    let devices = federation.enrolled(2);
    let mut running: Vec<_> = devices.iter().map(Device::run).collect();
    aggregator.event("published");
    // Devices stop, so that the copy holds all that they were told; the server goes on.
    running.drain(..).for_each(|device| assert_eq!(device.stop(), 0));
    let copy = federation.path("copy");
    let told = Finished::of(federation.verb("backup").arg("--json").arg(&copy)).with_code(0).objects();
    assert!(told[0]["blobs"].as_u64().unwrap() >= 2, "{told:?}");
    let head =
        Finished::of(federation.verb("status").arg("--json")).with_code(0).objects()[0]["version"].clone();
    drop(aggregator);
    std::fs::remove_dir_all(federation.state()).unwrap();

    let mut serve = commonweal_tests::program::command("aggregator");
    serve.args(["serve", "--json", "--dir"]).arg(&copy);
    let mut restored =
        commonweal_tests::program::Running::start("aggregator", &mut serve, &federation.path("restored.log"));
    assert_eq!(restored.event("listening")["version"], head);
    // The same devices, their certificates and their keys, in the next round of the same lineage.
    let running: Vec<_> = devices.iter().map(Device::run).collect();
    assert_eq!(restored.event("published")["parent"], head);
    drop(running);
    assert_eq!(restored.stop(), 0);
}

#[test]
fn settings_come_from_file_environment_and_flags_and_are_told() {
    let federation = Federation::new(2, |_| ());
    let told = Finished::of(
        federation
            .verb("config")
            .args(["--json", "--threads", "3", "--set", "round.deadline_ms=70000"])
            .env("COMMONWEAL_AGGREGATOR_RECEIVE__RELEASES_KEPT", "7"),
    )
    .with_code(0)
    .objects();
    for (key, value, source) in [
        ("round.goal", 2, "aggregator.toml"),
        ("receive.releases_kept", 7, "COMMONWEAL_AGGREGATOR_RECEIVE__RELEASES_KEPT"),
        ("threads", 3, "flag"),
        ("round.deadline_ms", 70_000, "--set"),
    ] {
        let setting = told.iter().find(|setting| setting["key"] == key).unwrap();
        assert_eq!((&setting["value"], &setting["source"]), (&value.into(), &source.into()), "{key}");
    }
    let refused = Finished::of(
        federation
            .verb("serve")
            .args(["--set", "round.quorum=99"])
            .env("COMMONWEAL_AGGREGATOR_ROUND__GAOL", "1")
            .env("COMMONWEAL_AGGREGATOR_THREADS", "0"),
    )
    .with_code(3);
    for part in ["round.gaol: unknown field", "threads: expected 1 to 1024", "round.quorum from --set"] {
        assert!(refused.stderr.contains(part), "{part} in {}", refused.stderr);
    }
}

#[test]
fn a_federation_whose_settings_are_lost_is_not_begun_anew_and_goes_on_with_new_ones() {
    let federation = Federation::new(1, |_| ());
    let state = federation.state();
    let keys = || std::fs::read(state.join("signing.pem")).unwrap();
    let (before, settings) = (keys(), state.join("aggregator.toml"));
    std::fs::remove_file(&settings).unwrap();
    let package = commonweal_tests::program::reference("package");
    for verb in ["init", "serve"] {
        let mut command = federation.verb(verb);
        let refused = Finished::of(command.args(["--no-align", "--package"]).arg(&package)).with_code(3);
        let told = "expected aggregator.toml beside aggregator.db";
        assert!(refused.stderr.contains(told), "{verb}: {}", refused.stderr);
    }
    assert_eq!(keys(), before);
    let mut defaults = federation.verb("config");
    defaults.args(["--defaults", "--address", "fl.example.org:4433", "--package"]).arg(&package);
    std::fs::write(&settings, Finished::of(&mut defaults).with_code(0).stdout).unwrap();
    let told = Finished::of(federation.verb("config").arg("--json")).with_code(0).objects();
    let setting = |key: &str| &told.iter().find(|setting| setting["key"] == key).unwrap()["value"];
    assert_eq!(setting("address"), "fl.example.org:4433");
    assert_ne!(setting("round.sampling_seed"), 0, "nobody knows it");
    let head = Finished::of(federation.verb("status").arg("--json")).with_code(0).objects();
    assert_eq!(head[0]["version"], federation.first_version);
}

#[test]
fn the_dashboard_for_grafana_and_the_documents_name_metrics_that_are_there() {
    let root = commonweal_tests::program::workspace();
    let federation = Federation::new(1, |_| ());
    let mut aggregator = federation.serve_rounds(None, "");
    let devices = federation.enrolled(1);
    // A token that is used twice, so that there is a refusal to count.
    let invitation = &federation.invitations(1)[0];
    federation.device("first").call(&["enroll", invitation]).with_code(0);
    assert_ne!(federation.device("late").call(&["enroll", invitation]).code, 0);
    let address = aggregator.admin();
    let token = federation.admin_token();
    let running = devices[0].run();
    aggregator.event("published");
    let metrics = fetch(&address, "/metrics", Some(&token)).body;
    drop(running);
    assert_eq!(aggregator.stop(), 0);
    let there: std::collections::BTreeSet<&str> =
        metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let grafana = std::fs::read_to_string(root.join("docs/grafana.json")).unwrap();
    let _: serde_json::Value = serde_json::from_str(&grafana).unwrap();
    let document = std::fs::read_to_string(root.join("docs/operations.md")).unwrap();
    let named = |text: &str| -> std::collections::BTreeSet<String> {
        text.match_indices("commonweal_")
            .map(|(at, _)| {
                let rest = &text[at..];
                let end = rest.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
                rest[..end.unwrap_or(rest.len())].to_owned()
            })
            .collect()
    };
    let family = |name: &str| {
        let ends = ["_total", "_bucket", "_count", "_sum", "_info"];
        ends.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name).to_owned()
    };
    for (text, file) in [(&grafana, "grafana.json"), (&document, "operations.md")] {
        for name in named(text) {
            assert!(there.contains(family(&name).as_str()), "{file} names {name}, which is not in {there:?}");
        }
    }
    let documented: Vec<String> = named(&document).iter().map(|name| family(name)).collect();
    for name in &there {
        assert!(documented.iter().any(|known| known == name), "docs/operations.md does not name {name}");
    }
}
