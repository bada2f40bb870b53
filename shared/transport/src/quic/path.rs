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
/// Longest time for which another address is no reason to move, after one that was.
const PAUSE_MAX: Duration = Duration::from_secs(64);
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
    let mut address = Address::default();
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = connection.closed() => return,
            now = ticks.tick() => {
                let stats = connection.stats();
                let why = if address.has_moved(&connected, now) {
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

/// The address that the system would send from, look by look.
#[derive(Default)]
struct Address {
    /// One that was not the last look's: it counts if it is there at the next one too.
    seen: Option<IpAddr>,
    /// When the connection moved for its sake, and how long nothing else is a reason from then on.
    moved: Option<(Instant, Duration)>,
}

impl Address {
    /// Whether the system would send from another address than when the connection was made or last moved. While it knows
    /// no way at all, nothing has moved.
    fn has_moved(&mut self, connected: &Connected, now: Instant) -> bool {
        let Some(found) = from(connected.connection.remote_address()) else { return false };
        let mut before = connected.from.lock().unwrap_or_else(PoisonError::into_inner);
        let is_other = self.is_other(*before.get_or_insert(found), found, now);
        if is_other {
            *before = Some(found);
        }
        is_other
    }

    /// Where two uplinks share the way, each new socket may be told another address: that is no move, and each one is a
    /// reason half as soon.
    fn is_other(&mut self, before: IpAddr, found: IpAddr, now: Instant) -> bool {
        let is_steady = self.seen.replace(found) == Some(found);
        let (since, pause) = self.moved.unwrap_or((now, Duration::ZERO));
        if found == before || !is_steady || now - since < pause {
            return false;
        }
        self.moved = Some((now, (pause * 2).clamp(LOOK, PAUSE_MAX)));
        true
    }
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
    fn another_address_counts_at_the_second_look_and_less_and_less_often() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let [one, other] = ["10.0.0.1", "10.0.0.2"].map(|text| text.parse::<IpAddr>().unwrap());
        let mut address = Address::default();
        assert!(!address.is_other(one, one, at(0)));
        assert!(!address.is_other(one, other, at(1)), "it may be for a moment");
        assert!(!address.is_other(one, one, at(2)));
        assert!(!address.is_other(one, other, at(3)));
        assert!(address.is_other(one, other, at(4)));
        // From here on the other one is known.
        let mut moves = 0;
        let (mut before, mut found) = (other, one);
        for second in 5..1000 {
            if address.is_other(before, found, at(second)) {
                moves += 1;
                (before, found) = (found, before);
            }
        }
        assert!((8..30).contains(&moves), "{moves}");
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
