//! How `scripts/reproduce-paper` reads what this program wrote, and what it refuses; tests alone.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::{
    env, fs,
    process::{Command, Output},
};

use commonweal_tests::program::workspace;

fn python(arguments: &[&str]) -> Output {
    let python = env::var_os("COMMONWEAL_PYTHON").unwrap_or_else(|| "python3".into());
    let mut command = Command::new(python);
    // The report is found from here; it leaves nothing behind.
    command.current_dir(workspace().join("scripts")).env("PYTHONDONTWRITEBYTECODE", "1");
    command.args(arguments).output().unwrap()
}

#[test]
fn lines_end_at_line_feeds_alone_and_a_damaged_one_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("results.jsonl");
    let line = |text: &str| serde_json::json!({ "answer": text }).to_string();
    // The third line was cut by a kill before the run went on, the last by another one, within a letter.
    let mut bytes =
        [&line("a\u{2028}b\u{85}c"), &line("d"), "{\"answer\": \"e", &line("f"), "{\"answer\": \"é"]
            .join("\n")
            .into_bytes();
    bytes.pop();
    fs::write(&path, bytes).unwrap();
    let read = "import pathlib, sys, reproduce_paper_report as report
for _ in range(2): print(ascii([row['answer'] for row in report.lines(pathlib.Path(sys.argv[1]))]))";
    let done = python(&["-c", read, path.to_str().unwrap()]);
    let (out, log) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert_eq!(out, "['a\\u2028b\\x85c', 'd', 'f']\n".repeat(2), "{log}");
    assert_eq!(log.matches("line 3: expected a JSON object").count(), 1, "{log}");
    assert_eq!(log.lines().count(), 1, "{log}");
}

#[test]
fn a_run_with_some_of_the_arms_is_kept_out_of_a_whole_tables_part() {
    for part in [&["--docs"][..], &["--docs", "full"], &["--docs", "quick-bundled"]] {
        let done = python(&[&["reproduce-paper", "--only", "ours"], part].concat());
        let log = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(2), "{log}");
        assert!(log.contains("--docs: with --only expected the name of a part"), "{log}");
    }
}
