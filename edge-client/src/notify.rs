//! Tells systemd, where it is asked for: ready, stopping, what the device does, and that it is still alive.
//!
//! `run` (`cli/rounds.rs`) calls it, `doing.rs` passes its sentences on and knows how long nothing was said. Without
//! `NOTIFY_SOCKET`, and on other systems than Linux, nothing happens.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::doing;

/// A device that has said nothing for so long hangs: a step, 64 judgements or 16 rewritings take minutes on the slowest
/// device that they fit, and so does opening a package. Longer than systemd's own `WatchdogSec`, and not by mistake: that one
/// bounds how long the process as a whole may stand still, while nobody knows from outside whether one long run of the network
/// goes on. To end a slow one would have it begin again, for ever; to be late for one that hangs costs an hour.
const SILENCE_MAX: Duration = Duration::from_secs(3600);
/// The watchdog looks so often whether it is to end.
const LOOK: Duration = Duration::from_millis(100);

/// The device is open: from here on it takes part.
pub(crate) fn ready() {
    system::send(system::State::Ready);
}

/// It ends by itself or by a signal.
pub(crate) fn stopping() {
    system::send(system::State::Stopping);
}

/// What `systemctl status` shows.
pub(crate) fn status(sentence: &str) {
    system::send(system::State::Status(sentence));
}

/// Says that the process is alive, three times as often as systemd wants to hear it, until it is dropped; not once the
/// work has been silent for too long.
#[derive(Debug)]
pub(crate) struct Watchdog {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// As systemd asks in this process's environment.
    pub(crate) fn start() -> std::io::Result<Self> {
        let end = Arc::new(AtomicBool::new(false));
        let Some(limit) = system::watchdog() else { return Ok(Self { end, thread: None }) };
        let ends = end.clone();
        let thread = thread::Builder::new().name("watchdog".to_owned()).spawn(move || {
            bark(limit / 3, &ends, doing::silence, || system::send(system::State::Alive));
        })?;
        Ok(Self { end, thread: Some(thread) })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::warn!("the watchdog ended with a panic");
        }
    }
}

fn bark(every: Duration, end: &AtomicBool, silence: impl Fn() -> Duration, mut say: impl FnMut()) {
    let mut said: Option<Instant> = None;
    while !end.load(Ordering::SeqCst) {
        if said.is_none_or(|said| said.elapsed() >= every) && silence() < SILENCE_MAX {
            said = Some(Instant::now());
            say();
        }
        thread::sleep(LOOK.min(every));
    }
}

#[cfg(target_os = "linux")]
mod system {
    use std::time::Duration;

    use sd_notify::NotifyState;

    #[derive(Clone, Copy)]
    pub(super) enum State<'s> {
        Ready,
        Stopping,
        Status(&'s str),
        Alive,
    }

    pub(super) fn send(state: State<'_>) {
        let state = match state {
            State::Ready => NotifyState::Ready,
            State::Stopping => NotifyState::Stopping,
            State::Status(sentence) => NotifyState::Status(sentence),
            State::Alive => NotifyState::Watchdog,
        };
        if let Err(error) = sd_notify::notify(&[state]) {
            tracing::debug!("systemd cannot be told: {error}");
        }
    }

    pub(super) fn watchdog() -> Option<Duration> {
        sd_notify::watchdog_enabled()
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use std::time::Duration;

    #[derive(Clone, Copy)]
    pub(super) enum State<'s> {
        Ready,
        Stopping,
        Status(&'s str),
        Alive,
    }

    pub(super) fn send(_: State<'_>) {}

    pub(super) fn watchdog() -> Option<Duration> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often a watchdog speaks whose device is silent for longer at each look, by so much.
    fn spoken(silence_grows: Duration) -> u32 {
        let (looks, spoken) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
        let end = AtomicBool::new(false);
        let silence = || {
            looks.set(looks.get() + 1);
            end.store(looks.get() == 10, Ordering::SeqCst);
            silence_grows * looks.get()
        };
        bark(Duration::ZERO, &end, silence, || spoken.set(spoken.get() + 1));
        spoken.get()
    }

    #[test]
    fn a_device_that_hangs_is_no_longer_called_alive() {
        assert_eq!(spoken(Duration::ZERO), 10);
        assert_eq!(spoken(SILENCE_MAX / 4), 3);
    }
}
