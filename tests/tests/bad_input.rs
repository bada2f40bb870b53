//! What a person can get wrong at the command line: each has its exit code and a message that says what to do, and
//! costs nothing that was there before.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use commonweal_tests::program::{Finished, command, reference};

fn edge(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = command("edge-client");
    command.args(arguments).arg("--dir").arg(directory).args(["--threads", "1", "--json"]);
    command
}

fn with_package(mut command: Command, package: &Path) -> Command {
    command.arg("--package").arg(package);
    command
}

fn file(directory: &Path, name: &str, text: &str) -> String {
    let path = directory.join(name);
    fs::write(&path, text).unwrap();
    path.display().to_string()
}

const GOOD: &str = r#"{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"hello"}]}"#;

#[test]
fn a_malformed_line_is_named_and_the_good_ones_are_kept() {
    let directory = tempfile::tempdir().unwrap();
    let other = GOOD.replace("hello", "good day");
    let rows = file(directory.path(), "rows.jsonl", &format!("{GOOD}\n{{\"messages\": [\n{other}\n"));
    let state = directory.path().join("device");
    let added = Finished::of(&mut edge(&state, &["add", &rows])).with_code(0);
    assert!(added.stderr.contains("rows.jsonl: line 2:"), "{}", added.stderr);
    assert!(!added.stderr.contains("good day"), "a person's text is in the log");
    let event = &added.objects()[0];
    assert_eq!((&event["added"], &event["bad"]), (&2.into(), &1.into()));
    let status = &Finished::of(&mut edge(&state, &["status"])).with_code(0).objects()[0];
    assert_eq!(status["samples"], 2);
}

#[test]
fn a_file_without_a_good_line_is_bad_input() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("device");
    let empty = file(directory.path(), "empty.jsonl", "");
    let refused = Finished::of(&mut edge(&state, &["add", &empty])).with_code(3);
    assert!(refused.stderr.contains("empty.jsonl") && refused.stderr.contains("empty"), "{}", refused.stderr);
    let bad = file(directory.path(), "bad.jsonl", "nonsense\n");
    let refused = Finished::of(&mut edge(&state, &["add", &bad])).with_code(3);
    assert!(refused.stderr.contains("line 1"), "{}", refused.stderr);
    let absent = Finished::of(&mut edge(&state, &["add", "no-such-file.jsonl"]));
    assert_ne!(absent.code, 0);
    assert!(absent.stderr.contains("no-such-file.jsonl"), "{}", absent.stderr);
}

#[test]
fn a_missing_runtime_library_is_unavailable_and_names_the_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let rows = file(directory.path(), "rows.jsonl", GOOD);
    let filter = edge(&directory.path().join("device"), &["filter", &rows]);
    let mut filter = with_package(filter, &reference("package"));
    let refused = Finished::of(filter.env("ORT_DYLIB_PATH", "/nonexistent")).with_code(5);
    assert!(refused.stderr.contains("scripts/setup"), "{}", refused.stderr);
    assert!(refused.stderr.contains("/nonexistent"), "{}", refused.stderr);

    let mut init = command("aggregator");
    init.arg("init").arg("--dir").arg(directory.path().join("aggregator"));
    init.args(["--address", "127.0.0.1:4433", "--package"]).arg(reference("package"));
    let refused = Finished::of(init.env("ORT_DYLIB_PATH", "/nonexistent")).with_code(5);
    assert!(refused.stderr.contains("scripts/setup"), "{}", refused.stderr);
    assert!(!directory.path().join("aggregator").exists(), "a failed init left something behind");
}

#[test]
fn a_state_directory_that_cannot_be_made_is_a_clear_error() {
    // A file where the directory should be: refused to root as well, unlike permissions.
    let directory = tempfile::tempdir().unwrap();
    let rows = file(directory.path(), "rows.jsonl", GOOD);
    let taken = PathBuf::from(file(directory.path(), "taken", "text"));
    let refused = Finished::of(&mut edge(&taken, &["add", &rows])).with_code(3);
    assert!(
        refused.stderr.contains("cannot create") && refused.stderr.contains("taken"),
        "{}",
        refused.stderr
    );
    assert_eq!(fs::read_to_string(&taken).unwrap(), "text");

    let mut init = command("aggregator");
    init.arg("init").arg("--dir").arg(&taken).args([
        "--no-evaluate",
        "--address",
        "127.0.0.1:4433",
        "--package",
    ]);
    let refused = Finished::of(init.arg(reference("package"))).with_code(3);
    assert!(refused.stderr.contains("taken"), "{}", refused.stderr);
    assert_eq!(fs::read_to_string(&taken).unwrap(), "text");
}

#[test]
fn a_damaged_package_is_named_with_what_was_expected() {
    let directory = tempfile::tempdir().unwrap();
    let package = directory.path().join("package");
    fs::create_dir_all(package.join("adapters")).unwrap();
    let from = reference("package");
    for folder in ["", "adapters"] {
        for entry in fs::read_dir(from.join(folder)).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_file() {
                fs::copy(entry.path(), package.join(folder).join(entry.file_name())).unwrap();
            }
        }
    }
    let rows = file(directory.path(), "rows.jsonl", GOOD);
    let filter = || with_package(edge(&directory.path().join("device"), &["filter", &rows]), &package);
    Finished::of(&mut filter()).with_code(0);

    let weights = package.join("weights.bin");
    let mut bytes = fs::read(&weights).unwrap();
    let expected = blake3::hash(&bytes).to_string();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    let got = blake3::hash(&bytes).to_string();
    fs::write(&weights, bytes).unwrap();
    let refused = Finished::of(&mut filter()).with_code(3);
    for part in ["weights.bin", &expected, &got] {
        assert!(refused.stderr.contains(part), "{part} in {}", refused.stderr);
    }
}

#[test]
fn an_unknown_setting_is_refused_by_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("device");
    fs::create_dir_all(&state).unwrap();
    file(&state, "device.toml", "threads = 1\nthraeds = 2\n");
    let refused = Finished::of(&mut edge(&state, &["status"])).with_code(3);
    assert!(
        refused.stderr.contains("device.toml") && refused.stderr.contains("thraeds"),
        "{}",
        refused.stderr
    );

    let aggregator = directory.path().join("aggregator");
    let verb = |verb: &str| {
        let mut command = command("aggregator");
        command.arg(verb).arg("--dir").arg(&aggregator);
        command
    };
    let mut init = verb("init");
    init.args(["--no-evaluate", "--address", "127.0.0.1:4433", "--package"]).arg(reference("package"));
    Finished::of(&mut init).with_code(0);
    let path = aggregator.join("aggregator.toml");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("plian = true\n{text}")).unwrap();
    let refused = Finished::of(&mut verb("status")).with_code(3);
    assert!(refused.stderr.contains("plian"), "{}", refused.stderr);
}

/// What cannot be measured is an error, and never a gate less: at `init`, and before `serve` listens.
#[test]
fn prompts_and_answers_that_have_no_room_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let aggregator = directory.path().join("aggregator");
    let verb = |verb: &str| {
        let mut command = command("aggregator");
        command.arg(verb).arg("--dir").arg(&aggregator);
        command
    };
    let init = |option: &[&str]| {
        let mut init = verb("init");
        init.args(option).args(["--address", "127.0.0.1:4433", "--package"]).arg(reference("package"));
        init
    };
    let long = format!("{{\"prompt\":\"{}\"}}", "how do I do it? ".repeat(1000));
    let long = file(directory.path(), "long.jsonl", &long);
    let refused = Finished::of(&mut init(&["--eval-harmful", &long])).with_code(3);
    assert!(refused.stderr.contains("the harmful prompts: expected"), "{}", refused.stderr);
    assert!(!aggregator.exists());

    Finished::of(&mut init(&["--no-evaluate"])).with_code(0);
    let serve = |option: &[&str]| {
        let mut serve = verb("serve");
        serve.args(option).args(["--listen", "127.0.0.1:0"]);
        Finished::of(&mut serve).with_code(3).stderr
    };
    let refused = serve(&["--redteam", &long]);
    assert!(refused.contains("the red-team prompts: expected"), "{refused}");
    let path = aggregator.join("aggregator.toml");
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(text.matches("answer_tokens_max = 48").count(), 1, "{text}");
    fs::write(&path, text.replace("answer_tokens_max = 48", "answer_tokens_max = 1023")).unwrap();
    let refused = serve(&[]);
    assert!(refused.contains("evaluate.answer_tokens_max: expected at most 1022"), "{refused}");
}

#[test]
fn who_is_not_enrolled_is_told_how() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("device");
    for verb in ["once", "run"] {
        let refused =
            Finished::of(&mut with_package(edge(&state, &[verb]), &reference("package"))).with_code(3);
        assert!(refused.stderr.contains("edge-client enroll INVITATION"), "{}", refused.stderr);
    }
    let refused = Finished::of(&mut edge(&state, &["enroll", "https://example.org"])).with_code(3);
    assert!(refused.stderr.contains("commonweal://"), "{}", refused.stderr);
    let mut hostile = command("hostile-device");
    let refused = Finished::of(hostile.arg("run").arg("--dir").arg(&state));
    assert!(refused.stderr.contains("not enrolled"), "{}", refused.stderr);
    assert_ne!(refused.code, 0);
    Finished::of(&mut edge(&state, &["frobnicate"])).with_code(2);
}

#[test]
fn an_aggregator_that_is_away_is_unavailable() {
    let directory = tempfile::tempdir().unwrap();
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    drop(socket);
    let invitation = format!("commonweal://127.0.0.1:{port}/?token={}&ca={}", "0".repeat(64), "0".repeat(64));
    let refused = Finished::of(&mut edge(&directory.path().join("device"), &["enroll", &invitation]));
    assert_eq!(refused.code, 5, "{}", refused.stderr);
}
