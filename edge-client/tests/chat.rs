//! `chat` as a person sees it, on the bundled model: piped, and in a terminal of its own.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use rexpect::session::{PtySession, spawn_command};

/// Longest wait for the terminal; a loaded machine may take long.
const WAIT_MS: u64 = 30_000;

fn chat(directory: &Path, arguments: &[&str]) -> Command {
    edge(directory, "chat", arguments)
}

fn edge(directory: &Path, verb: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_edge-client"));
    command.arg(verb).args(arguments);
    command.arg("--dir").arg(directory).env("COMMONWEAL_KEYS", directory.join("keys"));
    command.args([
        "--package".as_ref(),
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/reference/package").as_os_str(),
    ]);
    command.env("RUST_LOG", "info").env("NO_COLOR", "1").env("TERM", "xterm");
    command
}

/// Every file below a folder that holds a text.
fn holding(folder: &Path, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            found.extend(holding(&path, text));
        } else if fs::read(&path).unwrap().windows(text.len()).any(|window| window == text.as_bytes()) {
            found.push(path.display().to_string());
        }
    }
    found
}

#[test]
fn a_pipe_is_answered_and_only_what_is_saved_is_on_disk() {
    let directory = tempfile::tempdir().unwrap();
    let saved = directory.path().join("saved.jsonl");
    let mut child = chat(
        directory.path(),
        &["--json", "--temperature", "0", "--max-tokens", "12", "--system", "Be brief."],
    )
    .stdin(Stdio::piped())
    .stdout(Stdio::piped())
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    let typed = format!(
        "my forgotten words\n/reset\nfirst line\\\nand second\n/nonsense\n\"\"\"\na block\nof lines\n\"\"\"\n\
         /save {0}\n/save {0}\n/quit\nnever said\n",
        saved.display()
    );
    child.stdin.take().unwrap().write_all(typed.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{err}");
    let answers: Vec<serde_json::Value> =
        out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.len(), 3, "{out}");
    assert!(err.contains("no command /nonsense") && err.contains("not saved"), "{err}");
    let row: serde_json::Value = serde_json::from_str(&fs::read_to_string(&saved).unwrap()).unwrap();
    let said: Vec<&str> =
        row["messages"].as_array().unwrap().iter().map(|one| one["content"].as_str().unwrap()).collect();
    assert_eq!((said.len(), said[0]), (5, "Be brief."));
    assert_eq!((said[1], said[3]), ("first line\nand second", "a block\nof lines"));
    assert_eq!(
        (said[2], said[4]),
        (answers[1]["content"].as_str().unwrap(), answers[2]["content"].as_str().unwrap())
    );
    assert_eq!(holding(directory.path(), "and second"), [saved.display().to_string()]);
    assert_eq!(holding(directory.path(), "forgotten"), Vec::<String>::new());
    // What was saved is what `add` reads.
    let mut add = Command::new(env!("CARGO_BIN_EXE_edge-client"));
    add.args(["add", "--json", "--dir"]).arg(directory.path()).arg(&saved);
    let added = add.env("COMMONWEAL_KEYS", directory.path().join("keys")).output().unwrap();
    assert!(String::from_utf8_lossy(&added.stdout).contains("\"added\":1"), "{added:?}");
}

/// The line editor begins a line: it takes the terminal, which it tells by asking for pastes in brackets.
fn exp_prompt(terminal: &mut PtySession) {
    terminal.exp_string("\u{1b}[?2004h").unwrap();
    terminal.exp_string("> ").unwrap();
}

#[test]
fn in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends() {
    let directory = tempfile::tempdir().unwrap();
    let history = directory.path().join("typed");
    let history_name = history.to_str().unwrap();
    // Any token is as probable as any other, so that the answer is as long as the context allows.
    let command =
        chat(directory.path(), &["--max-tokens", "4000", "--temperature", "1000", "--history", history_name]);
    let mut terminal = spawn_command(command, Some(WAIT_MS)).unwrap();
    exp_prompt(&mut terminal);
    terminal.send_line("/system Speak at length.").unwrap();
    exp_prompt(&mut terminal);
    // At the prompt, Ctrl-C gives up what was begun.
    terminal.send("half a ").unwrap();
    terminal.send_control('c').unwrap();
    exp_prompt(&mut terminal);
    terminal.send_line("Tell me a long story").unwrap();
    // The terminal is given back, and the answer begins.
    terminal.exp_string("\u{1b}[?2004l").unwrap();
    terminal.exp_regex("[A-Za-z]{2}").unwrap();
    terminal.send_control('c').unwrap();
    exp_prompt(&mut terminal);
    // Had the answer ended just before, the line editor would have taken the key and, with it, what was typed next.
    let helps = (0..3).any(|_| {
        terminal.send_line("/help").unwrap();
        terminal.exp_string("/save FILE").is_ok()
    });
    assert!(helps);
    exp_prompt(&mut terminal);
    terminal.send_control('d').unwrap();
    terminal.exp_eof().unwrap();
    assert!(fs::read_to_string(&history).unwrap().contains("Speak at length."));
}

#[test]
fn what_is_learned_for_oneself_is_said_with_the_personal_adapter_alone() {
    let directory = tempfile::tempdir().unwrap();
    let rows = directory.path().join("rows.jsonl");
    let row = r#"{"messages":[{"role":"user","content":"Who feeds the cat?"},{"role":"assistant","content":"Ada feeds her."}]}"#;
    fs::write(&rows, format!("{row}\n")).unwrap();
    let says = |more: &[&str]| {
        let asked = ["--prompt", "Who feeds the cat?", "--temperature", "0", "--max-tokens", "12", "--json"];
        let output = chat(directory.path(), &[&asked, more].concat()).output().unwrap();
        let answer: Result<serde_json::Value, _> = serde_json::from_slice(&output.stdout);
        (output.status.code(), answer.map_or_else(|_| String::new(), |answer| answer["content"].to_string()))
    };
    assert_eq!(says(&["--personal"]).0, Some(3));
    let before = says(&[]);
    let train = |more: &[&str]| {
        let asked =
            [rows.to_str().unwrap(), "--personal", "--steps", "20", "--learning-rate", "0.01", "--json"];
        let output = edge(directory.path(), "train", &[&asked, more].concat()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let last = String::from_utf8(output.stdout).unwrap().lines().last().unwrap().to_owned();
        serde_json::from_str::<serde_json::Value>(&last).unwrap()
    };
    let (first, again, anew) = (train(&[]), train(&[]), train(&["--anew"]));
    assert!(again["loss_first"].as_f64() < first["loss_first"].as_f64(), "{first} {again}");
    assert_eq!(anew, first);
    assert!(says(&["--personal"]).1.contains("Ada"), "{:?}", says(&["--personal"]));
    assert_eq!(says(&[]), before);
}
