//! What a person types, without a model: help, lines on stdout, exit codes, and a state directory that bad luck leaves
//! as it was.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

const VERBS: [&str; 16] = [
    "enroll", "run", "once", "status", "add", "filter", "revise", "train", "chat", "serve", "bench",
    "devices", "pause", "resume", "samples", "forget",
];
const GOOD: &str = r#"{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"hello"}]}"#;

fn edge(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_edge-client"));
    command.args(arguments).stdin(Stdio::null());
    for (variable, _) in std::env::vars_os() {
        if variable.to_string_lossy().starts_with("COMMONWEAL_") {
            command.env_remove(variable);
        }
    }
    command
}

fn run(directory: &Path, arguments: &[&str]) -> Output {
    edge(arguments).arg("--json").arg("--dir").arg(directory).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn object(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{}", stderr(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn every_verb_helps_with_an_example() {
    for verb in VERBS {
        let help = edge(&[verb, "--help"]).output().unwrap();
        let text = String::from_utf8(help.stdout).unwrap();
        assert!(help.status.success() && text.contains(&format!("  edge-client {verb}")), "{verb}: {text}");
        assert!(text.contains("--json"), "{verb}: {text}");
    }
}

#[test]
fn pause_and_resume_are_events_and_stay() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(object(&run(directory.path(), &["pause"]))["event"], "paused");
    assert_eq!(object(&run(directory.path(), &["status"]))["paused"], true);
    assert_eq!(object(&run(directory.path(), &["resume"]))["event"], "resumed");
    assert_eq!(object(&run(directory.path(), &["status"]))["paused"], false);
}

#[test]
fn a_file_that_is_not_there_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let rows = directory.path().join("rows.jsonl");
    fs::write(&rows, GOOD).unwrap();
    let state = directory.path().join("device");
    let output = run(&state, &["add", rows.to_str().unwrap(), "no-such-file.jsonl"]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("no-such-file.jsonl"), "{}", stderr(&output));
    assert_eq!(object(&run(&state, &["status"]))["samples"], 0);
}

/// `/dev/full` is a disk without room, behind the name of the temporary file.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named_and_what_was_there_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("device");
    let rows = directory.path().join("rows.jsonl");
    fs::write(&rows, GOOD).unwrap();
    assert_eq!(object(&run(&state, &["add", rows.to_str().unwrap()]))["added"], 1);
    fs::write(&rows, GOOD.replace("hello", "good day")).unwrap();
    std::os::unix::fs::symlink("/dev/full", state.join("samples/000002.jsonl.part")).unwrap();
    let output = run(&state, &["add", rows.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    for part in ["cannot write", "000002.jsonl", "No space left"] {
        assert!(stderr(&output).contains(part), "{part} in {}", stderr(&output));
    }
    assert_eq!(object(&run(&state, &["status"]))["samples"], 1);
    // With room again, the same call does it.
    assert_eq!(object(&run(&state, &["add", rows.to_str().unwrap()]))["added"], 1);
}

#[test]
fn a_wrong_file_is_not_told_line_by_line_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    let rows = directory.path().join("rows.jsonl");
    fs::write(&rows, "nonsense\n".repeat(5_000)).unwrap();
    let output = run(directory.path(), &["add", rows.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(3));
    assert!(
        stderr(&output).contains("line 1:") && stderr(&output).contains("4980 more"),
        "{}",
        stderr(&output)
    );
    assert!(stderr(&output).lines().count() < 30);
}

#[test]
fn diagnostics_are_json_lines_where_results_are() {
    let directory = tempfile::tempdir().unwrap();
    let rows = directory.path().join("rows.jsonl");
    fs::write(&rows, format!("nonsense\n{GOOD}\n")).unwrap();
    let add = |flags: &[&str]| {
        let mut command = edge(&["add", rows.to_str().unwrap()]);
        let output =
            command.args(flags).arg("--dir").arg(directory.path()).env("RUST_LOG", "warn").output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        stderr(&output)
    };
    let told = add(&["--json"]);
    let objects: Vec<serde_json::Value> =
        told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(objects.len(), 1, "{told}");
    assert_eq!(
        (&objects[0]["level"], &objects[0]["target"]),
        (&"WARN".into(), &"edge_client::cli::open".into())
    );
    let message = objects[0]["fields"]["message"].as_str().unwrap();
    assert!(message.contains("rows.jsonl: line 1:"), "{message}");
    // A person gets the same as a sentence.
    let told = add(&[]);
    assert!(told.contains("rows.jsonl: line 1:") && !told.trim_start().starts_with('{'), "{told}");
}

#[test]
fn a_reader_who_has_gone_is_no_panic() {
    let directory = tempfile::tempdir().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = edge(&["status", "--dir"]).arg(directory.path()).stdout(writer).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
}

#[test]
fn numbers_that_make_no_sense_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(run(directory.path(), &["status", "--threads", "0"]).status.code(), Some(2));
    let rows = directory.path().join("rows.jsonl");
    fs::write(&rows, GOOD).unwrap();
    let rows = rows.to_str().unwrap();
    for more in [["--steps", "0"], ["--learning-rate", "NaN"], ["--out", "/nonexistent/adapter"]] {
        let output = run(directory.path(), &[&["train", rows], &more[..]].concat());
        assert_eq!(output.status.code(), Some(3), "{more:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(more[0]), "{more:?}: {}", stderr(&output));
    }
}

#[test]
fn bench_names_a_missing_package_before_it_measures() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("none");
    let output = run(directory.path(), &["bench", "--package", missing.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("package.toml is missing"), "{}", stderr(&output));
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// A device that is not there, and a package of another version, are told by name before anything runs.
#[test]
fn a_missing_device_and_another_versions_package_have_their_exit_codes() {
    let directory = tempfile::tempdir().unwrap();
    let output = run(directory.path(), &["devices", "--device", "cuda:0"]);
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    assert!(stderr(&output).contains("has no CUDAExecutionProvider"), "{}", stderr(&output));
    assert_eq!(run(directory.path(), &["devices", "--device", "gpu"]).status.code(), Some(2));
    assert_eq!(object(&run(directory.path(), &["devices", "--device", "cuda:0,cpu"]))["device"], "cpu");

    let package = directory.path().join("package");
    fs::create_dir(&package).unwrap();
    fs::write(package.join("package.toml"), "format = 2\n").unwrap();
    let output = run(directory.path(), &["devices", "--package", package.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("has format 2, this program reads format 1"), "{}", stderr(&output));
}

#[test]
fn keeping_chats_needs_the_policys_word_first_and_status_tells_it() {
    let directory = tempfile::tempdir().unwrap();
    let output = run(directory.path(), &["serve", "--keep-chats"]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("keep_chats = true"), "{}", stderr(&output));
    let status = object(&run(directory.path(), &["status"]));
    assert_eq!((&status["keep_chats"], &status["chats"]), (&false.into(), &"chats are not kept".into()));
    fs::write(directory.path().join("policy.toml"), "[serve]\nkeep_chats = true\n").unwrap();
    let status = object(&run(directory.path(), &["status"]));
    assert_eq!(status["keep_chats"], true);
    assert!(status["chats"].as_str().unwrap().contains("x-commonweal-keep: yes"), "{status}");
}

#[test]
fn a_key_that_can_be_guessed_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let output = run(directory.path(), &["serve", "--api-key", "short"]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("--api-key") && !stderr(&output).contains("short"),
        "{}",
        stderr(&output)
    );
}

/// For an hour nothing is tried, and `run` has nothing to say of it.
#[test]
fn status_tells_of_a_release_that_cannot_be_installed() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(object(&run(directory.path(), &["status"]))["not_installed"], serde_json::Value::Null);
    let now_ms = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64;
    let noted =
        serde_json::json!([{ "version": 7, "digest": "00".repeat(32), "fault": "damaged", "at_ms": now_ms }]);
    fs::write(directory.path().join("trouble.json"), noted.to_string()).unwrap();
    let sentence = object(&run(directory.path(), &["status"]))["not_installed"].clone();
    let sentence = sentence.as_str().unwrap();
    assert!(sentence.starts_with("release 7 cannot be installed: its bytes are damaged;"), "{sentence}");
    assert!(sentence.ends_with("minutes at the earliest"), "{sentence}");
}
