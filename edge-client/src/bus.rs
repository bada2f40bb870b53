//! What two services on the system's bus know: logind, whether anybody is there, and NetworkManager, whether the network is
//! metered. Of `sensors.rs`, which asks once a second at most, on threads of their own; `returns.rs` hears logind in between.
//!
//! Asked through systemd's own `busctl`, whose answer is a type and a value: `b true`, `t 1764406800000000`, `u 4`.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// A bus or a service that is not there is looked for again so often.
const AGAIN: Duration = Duration::from_secs(60);
/// Waits so long for an answer, and looks for it so often.
const PATIENCE: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(2);
/// Longest answer read.
const ANSWER_BYTES_MAX: u64 = 4096;
const LOGIND: [&str; 3] =
    ["org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager"];
const NETWORK: [&str; 3] =
    ["org.freedesktop.NetworkManager", "/org/freedesktop/NetworkManager", "org.freedesktop.NetworkManager"];

/// The bus at a socket.
#[derive(Debug)]
pub(crate) struct Bus {
    socket: PathBuf,
    logind_failed: Option<Instant>,
    network_failed: Option<Instant>,
}

impl Bus {
    pub(crate) fn at(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), logind_failed: None, network_failed: None }
    }

    /// Since everybody left, as logind has it; nothing while somebody is there.
    pub(crate) fn idle(&mut self) -> Option<Duration> {
        let ask = |property| ask(&self.socket, LOGIND, property);
        unless_failed(&mut self.logind_failed, || {
            if ask("IdleHint")? == "false" {
                return Some(Duration::ZERO);
            }
            let since = Duration::from_micros(ask("IdleSinceHint")?.parse().ok()?);
            Some(SystemTime::now().duration_since(UNIX_EPOCH).ok()?.saturating_sub(since))
        })
    }

    /// Whether the network is metered, or NetworkManager guesses so.
    pub(crate) fn metered(&mut self) -> Option<bool> {
        let socket = &self.socket;
        unless_failed(&mut self.network_failed, || is_metered(&ask(socket, NETWORK, "Metered")?))
    }
}

/// NetworkManager's `NMMetered`: 1 yes, 2 no, 3 a guess of yes, 4 a guess of no.
pub(crate) fn is_metered(value: &str) -> Option<bool> {
    match value {
        "1" | "3" => Some(true),
        "2" | "4" => Some(false),
        _ => None,
    }
}

fn unless_failed<T>(failed: &mut Option<Instant>, ask: impl FnOnce() -> Option<T>) -> Option<T> {
    if failed.is_some_and(|failed| failed.elapsed() < AGAIN) {
        return None;
    }
    let answer = ask();
    *failed = if answer.is_none() { Some(Instant::now()) } else { None };
    answer
}

fn ask(socket: &Path, [service, path, interface]: [&str; 3], property: &str) -> Option<String> {
    if !socket.exists() {
        return None;
    }
    let mut asking = Command::new("busctl")
        .arg(format!("--address=unix:path={}", socket.display()))
        .args(["--timeout=1", "--auto-start=no", "get-property", service, path, interface, property])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    // `--timeout` bounds the call and not the connecting.
    let begun = Instant::now();
    let status = loop {
        match asking.try_wait().ok()? {
            Some(status) => break status,
            None if begun.elapsed() < PATIENCE => std::thread::sleep(LOOK),
            None => {
                let killed = asking.kill().and_then(|()| asking.wait());
                tracing::debug!(?killed, property, "the system's bus does not answer");
                return None;
            }
        }
    };
    // A property is a few bytes, which the pipe holds.
    let mut answer = Vec::new();
    asking.stdout.take()?.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).ok()?;
    if status.success() { value_of(&answer) } else { None }
}

/// The value of an answer.
pub(crate) fn value_of(answer: &[u8]) -> Option<String> {
    Some(std::str::from_utf8(answer).ok()?.trim().split_once(' ')?.1.to_owned())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{fs, process::Child};

    use super::*;

    /// A real bus of our own, without the services but with the bus itself to ask.
    pub(crate) struct OwnBus {
        socket: PathBuf,
        daemon: Child,
        _directory: tempfile::TempDir,
    }

    impl OwnBus {
        /// None where the machine lacks what it takes.
        pub(crate) fn start() -> Option<Self> {
            let directory = tempfile::tempdir().unwrap();
            let socket = directory.path().join("bus");
            let config = directory.path().join("bus.conf");
            let text = format!(
                "<busconfig><type>system</type><listen>unix:path={}</listen><auth>EXTERNAL</auth>\
                 <policy context=\"default\"><allow send_destination=\"*\"/><allow receive_sender=\"*\"/>\
                 <allow own=\"*\"/><allow user=\"*\"/></policy></busconfig>",
                socket.display()
            );
            fs::write(&config, text).unwrap();
            let config = format!("--config-file={}", config.display());
            let has_busctl = Command::new("busctl").arg("--version").output().is_ok();
            let daemon = Command::new("dbus-daemon").args([&config, "--nofork", "--nopidfile"]).spawn();
            let (Ok(daemon), true) = (daemon, has_busctl) else {
                eprintln!("SKIPPED: this machine has no dbus-daemon or no busctl");
                return None;
            };
            let bus = Self { socket, daemon, _directory: directory };
            let begun = Instant::now();
            while bus.features().is_none() {
                assert!(begun.elapsed() < Duration::from_secs(60), "the bus does not tell of itself");
                std::thread::sleep(Duration::from_millis(20));
            }
            Some(bus)
        }

        pub(crate) fn socket(&self) -> &Path {
            &self.socket
        }

        /// As `busctl` wants it.
        pub(crate) fn address(&self) -> String {
            format!("--address=unix:path={}", self.socket.display())
        }

        fn features(&self) -> Option<String> {
            let itself = ["org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus"];
            ask(&self.socket, itself, "Features")
        }
    }

    impl Drop for OwnBus {
        fn drop(&mut self) {
            self.daemon.kill().unwrap();
            self.daemon.wait().unwrap();
        }
    }

    #[test]
    fn a_real_bus_is_asked_and_what_it_does_not_have_is_not_known() {
        let Some(own) = OwnBus::start() else { return };
        let mut bus = Bus::at(own.socket());
        assert_eq!((bus.idle(), bus.metered()), (None, None), "a bus without the services");
    }

    #[test]
    fn a_guess_counts_and_not_to_know_does_not() {
        assert_eq!(
            ["0", "1", "2", "3", "4"].map(is_metered),
            [None, Some(true), Some(false), Some(true), Some(false)]
        );
    }
}
