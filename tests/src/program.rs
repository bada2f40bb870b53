//! The real programs as child processes: one call to its end, or one left running whose JSON events are awaited.
//! Used by `federation.rs` and the tests; what goes wrong here panics with the child's log.

use std::{
    env, fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, sync_channel},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

/// Bounds every wait: far above what any step takes on a slow machine, so that only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(180);
/// Lines of a child that a test has not looked at yet.
const LINES_MAX: usize = 100_000;

/// The workspace's root.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).to_owned()
}

/// A file or folder of the bundled model that `scripts/setup` makes.
///
/// # Panics
/// When it is not there.
pub fn reference(name: &str) -> PathBuf {
    let path = workspace().join("target/reference").join(name);
    assert!(path.exists(), "{} is missing: run scripts/setup first", path.display());
    path
}

/// A program of this workspace, built beside the test that runs.
///
/// # Panics
/// When it was not built.
pub fn program(name: &str) -> PathBuf {
    let path = env::current_exe().ok().and_then(|exe| Some(exe.parent()?.parent()?.join(name)));
    let path = path.unwrap_or_default();
    assert!(path.is_file(), "{} is missing: run scripts/setup first (or cargo build --bins)", path.display());
    path
}

/// A command that sees none of this process's settings but the runtime library's place.
pub fn command(name: &str) -> Command {
    let mut command = Command::new(program(name));
    for (variable, _) in env::vars_os() {
        if variable.to_string_lossy().starts_with("COMMONWEAL_") {
            command.env_remove(variable);
        }
    }
    if env::var_os("ORT_DYLIB_PATH").is_none() {
        command.env("ORT_DYLIB_PATH", workspace().join("target/runtime/libonnxruntime.so"));
    }
    // Every aggregator has its own admin port, for tests run side by side.
    command.env("COMMONWEAL_ADMIN", "127.0.0.1:0");
    command.stdin(Stdio::null()).env("RUST_LOG", "info,ort=warn").env("NO_COLOR", "1");
    // Somebody may be at this machine while its tests run.
    command.env("COMMONWEAL_ALWAYS", "1");
    command
}

/// A call that came to its end.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Exit code; −1 for a signal.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it logged.
    pub stderr: String,
}

impl Finished {
    /// Runs a command to its end.
    ///
    /// # Panics
    /// When it does not start.
    pub fn of(command: &mut Command) -> Self {
        let output = command.output().unwrap_or_else(|error| panic!("{command:?} does not start: {error}"));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let code = output.status.code().unwrap_or(-1);
        Self { code, stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }

    /// The same call, if it ended with this code.
    ///
    /// # Panics
    /// When it ended with another.
    #[expect(clippy::return_self_not_must_use, reason = "the check itself may be all that is wanted")]
    pub fn with_code(self, code: i32) -> Self {
        assert_eq!(self.code, code, "exit code\nstdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }

    /// Stdout, every line of it a JSON object.
    ///
    /// # Panics
    /// When a line is none.
    pub fn objects(&self) -> Vec<Value> {
        let parse = |line: &str| match serde_json::from_str(line) {
            Ok(value @ Value::Object(_)) => value,
            _ => panic!("expected a JSON object on each line of stdout, got `{line}`"),
        };
        self.stdout.lines().map(parse).collect()
    }
}

/// A program left running with `--json`; killed when dropped.
#[derive(Debug)]
pub struct Running {
    name: String,
    child: Child,
    lines: Receiver<String>,
    log: PathBuf,
    /// Every event so far that a wait has seen, in order.
    pub events: Vec<Value>,
}

impl Running {
    /// Starts it; its log goes to `log`.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Self {
        let file = fs::OpenOptions::new().create(true).append(true).open(log);
        let file = file.unwrap_or_else(|error| panic!("{}: {error}", log.display()));
        let child = command.stdout(Stdio::piped()).stderr(file).spawn();
        let mut child = child.unwrap_or_else(|error| panic!("{command:?} does not start: {error}"));
        let (sender, lines) = sync_channel(LINES_MAX);
        if let Some(stdout) = child.stdout.take() {
            thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        Self { name: name.to_owned(), child, lines, log: log.to_owned(), events: Vec::new() }
    }

    /// The next event that `wanted` accepts.
    ///
    /// # Panics
    /// When the program ends first, or nothing comes for [`PATIENCE`].
    pub fn wait_for(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    let event = serde_json::from_str::<Value>(&line)
                        .unwrap_or_else(|_| panic!("{}: expected JSON lines, got `{line}`", self.name));
                    self.events.push(event.clone());
                    if wanted(&event) {
                        return event;
                    }
                }
                Err(error) => {
                    let why = match error {
                        RecvTimeoutError::Timeout => "nothing came in time",
                        RecvTimeoutError::Disconnected => "it ended",
                    };
                    panic!("{}: waited for {what}, {why}; {}", self.name, self.story());
                }
            }
        }
    }

    /// The next event of this name.
    pub fn event(&mut self, name: &str) -> Value {
        self.wait_for(name, |event| event["event"] == name)
    }

    /// The next `stage` event of this stage.
    pub fn stage(&mut self, stage: &str) -> Value {
        self.wait_for(stage, |event| event["event"] == "stage" && event["stage"] == stage)
    }

    /// Where a listening aggregator's admin port is.
    ///
    /// # Panics
    /// When it has not said so.
    pub fn admin(&self) -> String {
        let told = self.events.iter().find_map(|event| event["admin"].as_str());
        told.unwrap_or_else(|| panic!("{} named no admin port; {}", self.name, self.story())).to_owned()
    }

    /// SIGKILL: the program has no say.
    ///
    /// # Panics
    /// When there is no such process any more.
    pub fn kill(mut self) -> ExitStatus {
        assert!(
            self.child.try_wait().ok().flatten().is_none(),
            "{} ended by itself; {}",
            self.name,
            self.story()
        );
        self.child.kill().unwrap_or_else(|error| panic!("{}: {error}", self.name));
        self.child.wait().unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }

    /// A signal by its name.
    ///
    /// # Panics
    /// When it cannot be sent.
    pub fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        let sent = Command::new("kill").args(["-s", name, &id]).status();
        assert!(sent.is_ok_and(|status| status.success()), "{}: no signal was sent", self.name);
    }

    /// SIGTERM, as an operator does; its exit code.
    pub fn stop(self) -> i32 {
        self.signal("TERM");
        self.finish()
    }

    /// Its exit code, once it has ended by itself.
    ///
    /// # Panics
    /// When it does not end within [`PATIENCE`].
    pub fn finish(mut self) -> i32 {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => self.events.extend(serde_json::from_str::<Value>(&line)),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("{} does not end; {}", self.name, self.story()),
            }
        }
        // Stdout is closed: the process is on its last steps.
        self.child.wait().ok().and_then(|status| status.code()).unwrap_or(-1)
    }

    fn story(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let tail: Vec<&str> = log.lines().rev().take(20).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        let events: Vec<String> =
            self.events.iter().filter(|event| event["event"] != "step").map(Value::to_string).collect();
        format!("events:\n{}\nlog:\n{}", events.join("\n"), tail.join("\n"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // An ended child is no error here.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
