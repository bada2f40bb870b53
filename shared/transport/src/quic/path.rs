//! The way of a connection to the aggregator, and another one when nothing comes over it any more: the device's network may
//! change in the middle of an update, and nobody tells. Neighbours: `device` has it looked after while a stream is open.
//!
//! A connection moves to a fresh socket when the system would send from another address by now, or when nothing came for
//! some seconds though something was said. The aggregator follows it (QUIC's migration), and the stream goes on. If that
//! was no reason, it costs a few packets.

use super::{device::Connected, socket::Sockets};
use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::PoisonError,
    time::Duration,
};
use tokio::{
    task::JoinHandle,
    time::{Instant, MissedTickBehavior},
};

/// How often a path is looked at, while a stream is open.
const LOOK: Duration = Duration::from_secs(1);
/// Nothing came for so long though something was said: at first; twice as long after each move that did not help.
const SILENCE: Duration = Duration::from_secs(3);
/// Datagrams that ask for an answer: a single one may be the last acknowledgement, which does not.
const SAID_MIN: u64 = 2;

/// Looks after a path until it is dropped.
pub(super) struct LookedAfter(JoinHandle<()>);

impl LookedAfter {
    pub(super) fn new(connected: Connected, sockets: Sockets) -> Self {
        Self(tokio::spawn(look_after(connected, sockets)))
    }
}

impl Drop for LookedAfter {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn look_after(connected: Connected, sockets: Sockets) {
    let connection = &connected.connection;
    let mut silence = Silence::new(Instant::now());
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = connection.closed() => return,
            now = ticks.tick() => {
                let stats = connection.stats();
                let why = if has_moved(&connected) {
                    "the system sends from another address"
                } else if silence.is_too_long(stats.udp_rx.datagrams, stats.udp_tx.datagrams, now) {
                    "nothing comes"
                } else {
                    continue;
                };
                match sockets.towards(connection.remote_address()) {
                    Ok(socket) => match connected.endpoint.rebind_abstract(socket) {
                        Ok(()) => tracing::info!("{why}: the connection moves to a fresh socket"),
                        Err(error) => tracing::debug!(%error, "the connection cannot move"),
                    },
                    Err(error) => tracing::debug!(%error, "no fresh socket"),
                }
            }
        }
    }
}

/// Whether the system would send from another address than when this was last asked. While it knows no way at all,
/// nothing has moved.
fn has_moved(connected: &Connected) -> bool {
    let Some(now) = from(connected.connection.remote_address()) else { return false };
    let mut before = connected.from.lock().unwrap_or_else(PoisonError::into_inner);
    before.replace(now).is_some_and(|before| before != now)
}

/// The address that the system would send from; nothing is sent for it.
pub(super) fn from(remote: SocketAddr) -> Option<IpAddr> {
    let socket = UdpSocket::bind(super::socket::any_towards(remote)).ok()?;
    socket.connect(remote).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// How long nothing came, though something was said.
struct Silence {
    /// Datagrams that had come when the last one was noticed, and those sent by then.
    heard: u64,
    said: u64,
    since: Instant,
    patience: Duration,
}

impl Silence {
    fn new(now: Instant) -> Self {
        Self { heard: 0, said: 0, since: now, patience: SILENCE }
    }

    /// Told how many datagrams came and went in all.
    fn is_too_long(&mut self, heard: u64, said: u64, now: Instant) -> bool {
        if heard != self.heard {
            *self = Self { heard, said, ..Self::new(now) };
            return false;
        }
        let is_too_long = said.saturating_sub(self.said) >= SAID_MIN && now - self.since >= self.patience;
        if is_too_long {
            *self = Self { said, since: now, patience: self.patience * 2, ..*self };
        }
        is_too_long
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_too_long_when_something_was_said_and_the_next_time_later() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut silence = Silence::new(start);
        assert!(!silence.is_too_long(5, 7, at(1)));
        // Nothing said but an acknowledgement: whoever waits for the other side is in no hurry.
        assert!(!silence.is_too_long(5, 8, at(60)));
        assert!(!silence.is_too_long(6, 9, at(61)));
        assert!(!silence.is_too_long(6, 20, at(63)));
        assert!(silence.is_too_long(6, 21, at(64)));
        assert!(!silence.is_too_long(6, 30, at(69)));
        assert!(silence.is_too_long(6, 30, at(70)));
        // Once something came, it begins anew.
        assert!(!silence.is_too_long(7, 40, at(71)));
        assert!(silence.is_too_long(7, 50, at(74)));
    }

    #[test]
    fn the_address_that_the_system_sends_from_is_told_for_both_families() {
        for remote in ["127.0.0.1:9", "[::1]:9"] {
            let remote: SocketAddr = remote.parse().unwrap();
            // A machine may have no IPv6.
            if UdpSocket::bind((remote.ip(), 0)).is_ok() {
                assert_eq!(from(remote), Some(remote.ip()));
            }
        }
    }
}
