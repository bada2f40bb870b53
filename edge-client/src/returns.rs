//! Hears from logind, at once, that somebody came back or unlocked the screen. Of `sensors.rs`; `bus.rs` asks the rest.
//!
//! Through `dbus-monitor`, which prints each change of logind's properties as it comes: a name, then its value. Where it
//! is not installed, nothing is heard, and `bus.rs` asks once a second all the same.

use std::{
    io::{self, BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// One that has ended, or could not be started, is started again so late.
const AGAIN: Duration = Duration::from_secs(60);
/// What is read of a line at a time.
pub(crate) const LINE_BYTES_MAX: u64 = 4096;
/// Whose word it is, and no other program's on the bus.
const LOGIND: &str = "org.freedesktop.login1";

/// A `dbus-monitor` that runs as long as this is kept.
#[derive(Debug)]
pub(crate) struct Returns {
    address: String,
    rule: String,
    heard: Arc<Mutex<Option<Instant>>>,
    running: Option<Child>,
    started: Option<Instant>,
}

impl Returns {
    /// At the bus's socket; nothing is started yet.
    pub(crate) fn at(socket: &Path) -> Self {
        Self::of(socket, &format!("sender='{LOGIND}',"))
    }

    fn of(socket: &Path, sender: &str) -> Self {
        let rule = format!(
            "type='signal',{sender}interface='org.freedesktop.DBus.Properties',member='PropertiesChanged',\
             path_namespace='/org/freedesktop/login1'"
        );
        let address = format!("unix:path={}", socket.display());
        Self { address, rule, heard: Arc::default(), running: None, started: None }
    }

    /// Since somebody came back last, if anybody has since this began to listen.
    pub(crate) fn since(&mut self) -> Option<Duration> {
        let is_running = self.running.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)));
        if !is_running && self.started.is_none_or(|started| started.elapsed() >= AGAIN) {
            self.started = Some(Instant::now());
            self.stop();
            match self.start() {
                Ok(child) => self.running = Some(child),
                Err(error) => tracing::debug!(%error, "logind is asked once a second, and not heard"),
            }
        }
        self.heard()
    }

    /// The same, of what was heard so far.
    pub(crate) fn heard(&self) -> Option<Duration> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).map(|heard| heard.elapsed())
    }

    fn start(&self) -> io::Result<Child> {
        let mut child = Command::new("dbus-monitor")
            .args(["--address", &self.address, &self.rule])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let Some(lines) = child.stdout.take() else { return Ok(child) };
        let heard = Arc::clone(&self.heard);
        let hear = move || {
            listen(lines, || *heard.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now()));
        };
        // It ends with the program that it reads.
        if let Err(error) = thread::Builder::new().name("returns".to_owned()).spawn(hear) {
            end(child);
            return Err(error);
        }
        Ok(child)
    }

    fn stop(&mut self) {
        if let Some(child) = self.running.take() {
            end(child);
        }
    }
}

fn end(mut child: Child) {
    let ended = child.kill().and_then(|()| child.wait());
    tracing::trace!(?ended, "dbus-monitor");
}

impl Drop for Returns {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Calls at each hint that is taken back: nobody is idle any more, or a screen is unlocked.
pub(crate) fn listen(lines: impl Read, mut returned: impl FnMut()) {
    let mut lines = BufReader::new(lines);
    let (mut line, mut is_hint) = (Vec::new(), false);
    loop {
        line.clear();
        match lines.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
            Ok(1..) => {}
            Ok(0) | Err(_) => return,
        }
        let text = String::from_utf8_lossy(&line);
        if is_hint && text.trim_end().ends_with("boolean false") {
            returned();
        }
        is_hint = ["\"IdleHint\"", "\"LockedHint\""].iter().any(|name| text.contains(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::tests::OwnBus;

    #[test]
    fn only_a_hint_that_is_taken_back_is_a_return() {
        let returns = |text: &str| {
            let mut count = 0;
            listen(text.as_bytes(), || count += 1);
            count
        };
        let changed = |name: &str, value: &str| {
            format!(
                "signal time=1.5 sender=:1.2 -> destination=(null destination) serial=7 \
                 path=/org/freedesktop/login1; interface=org.freedesktop.DBus.Properties; member=PropertiesChanged\n   \
                 string \"org.freedesktop.login1.Manager\"\n   array [\n      dict entry(\n         \
                 string \"{name}\"\n         variant             boolean {value}\n      )\n   ]\n   array [\n   ]\n"
            )
        };
        assert_eq!(returns(&changed("IdleHint", "false")), 1);
        assert_eq!(returns(&changed("LockedHint", "false")), 1);
        assert_eq!(returns(&changed("IdleHint", "true")), 0);
        assert_eq!(returns(&changed("Docked", "false")), 0);
        assert_eq!(returns(&"x".repeat(100_000)), 0, "a line without an end");
        let told = ["IdleHint", "LockedHint"].map(|name| changed(name, "false")).concat();
        assert_eq!(returns(&(changed("IdleHint", "true") + &told)), 2);
    }

    /// By a real bus of our own, on which a program says what logind does.
    #[test]
    fn a_return_is_heard_as_it_is_said() {
        let Some(bus) = OwnBus::start() else { return };
        if Command::new("dbus-monitor").arg("--help").output().is_err() {
            eprintln!("SKIPPED: this machine has no dbus-monitor");
            return;
        }
        let mut returns = Returns::of(bus.socket(), "");
        let changed = |name: &str, value: &str| {
            let what = [
                "emit",
                "/org/freedesktop/login1",
                "org.freedesktop.DBus.Properties",
                "PropertiesChanged",
                "sa{sv}as",
                "org.freedesktop.login1.Manager",
                "1",
                name,
                "b",
                value,
                "0",
            ];
            let emitted = Command::new("busctl").arg(bus.address()).args(what).status().unwrap();
            assert!(emitted.success());
        };
        // Until it listens, nothing is heard.
        let begun = Instant::now();
        while returns.since().is_none() {
            assert!(begun.elapsed() < Duration::from_secs(60), "nothing is heard");
            changed("IdleHint", "true");
            changed("LockedHint", "false");
        }
        let first = *returns.heard.lock().unwrap();
        changed("IdleHint", "false");
        while *returns.heard.lock().unwrap() == first {
            assert!(begun.elapsed() < Duration::from_secs(60), "nothing more is heard");
            thread::sleep(Duration::from_millis(1));
        }
    }
}
