//! A program that starts itself again as another process: it speaks in lines of JSON, and ends when its standard input
//! does, so that it never outlives the one that started it. The benchmarks and `torture` have their aggregators and
//! devices so.

use std::{
    env,
    ffi::OsStr,
    io::{BufRead, BufReader, Lines, Write as _},
    process::{Child as Process, ChildStdin, ChildStdout, Command, ExitCode, ExitStatus, Stdio},
};

use anyhow::{Context, Result};
use serde::{Serialize, de::DeserializeOwned};

/// The other process.
#[derive(Debug)]
pub struct Child {
    process: Process,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Child {
    /// Starts this program with these arguments.
    pub fn start(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<Self> {
        Self::of(Command::new(env::current_exe()?).args(arguments))
    }

    /// Starts a command that comes to this program, such as one that enters a network namespace first.
    pub fn of(command: &mut Command) -> Result<Self> {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let stdout = process.stdout.take().context("a child has no output")?;
        Ok(Self { process, lines: BufReader::new(stdout).lines() })
    }

    /// The next thing that it tells.
    ///
    /// # Errors
    /// It ended, or told something else.
    pub fn hear<T: DeserializeOwned>(&mut self) -> Result<T> {
        let line = self.lines.next().context("the other process ended early")??;
        serde_json::from_str(&line).with_context(|| format!("unexpected words of the other process: {line}"))
    }

    /// Its number, by which the system knows it.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// How it ended, if it did by itself.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.process.try_wait()?)
    }

    /// What keeps it running: it ends when this is dropped.
    pub fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.process.stdin.take()
    }

    /// `kill -9`, and waits until the system has taken everything of it back.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }

    /// Lets it end, and gives how it did.
    pub fn end(mut self) -> Result<ExitStatus> {
        drop(self.take_stdin());
        Ok(self.process.wait()?)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        if let Err(error) = self.process.wait() {
            tracing::warn!("the other process's end: {error}");
        }
    }
}

/// A line to the process that started this one; without one to hear it, this one is about to end anyway.
pub fn tell(told: &impl Serialize) {
    let line = serde_json::to_string(told).unwrap_or_default();
    let mut stdout = std::io::stdout().lock();
    drop(writeln!(stdout, "{line}").and_then(|()| stdout.flush()));
}

/// The whole of such a program: its log goes to stderr, from this level on unless `RUST_LOG` says otherwise, and what
/// went wrong is the last line there and exit code 1.
pub fn program(level: &str, work: impl FnOnce() -> Result<()>) -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match work() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
