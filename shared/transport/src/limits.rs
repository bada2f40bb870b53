//! How long, how many, how much: the numbers of a link, and what they come to in memory. Neighbours: `frames` stalls by
//! them, `serve` and `quic` admit by them. Bounds of messages are elsewhere (`commonweal_protocol::bounds`).

use commonweal_protocol::bounds;
use serde::{Deserialize, Serialize};

/// Bytes that may be under way on one connection in each direction, and so be held of it: received and not yet read, or
/// sent and not yet acknowledged. 100 Mbit/s at 168 ms round trip, 26 Mbit/s at 640 ms.
pub(crate) const CONNECTION_WINDOW_BYTES: u32 = 2 << 20;

/// The same, received, until a certificate is verified: an enrolment is one frame.
pub(crate) const STRANGER_WINDOW_BYTES: u32 = 64 << 10;

/// Streams of one connection at once. A device needs two.
pub(crate) const STREAMS_MAX: u32 = 16;

/// Handshakes under way from proven addresses, over those that need no proof.
pub(crate) const HANDSHAKES_OVER_RETRY: usize = 4;

/// First packets of connections not yet accepted, all together.
pub(crate) const INCOMING_BYTES_MAX: u64 = 16 << 20;

const CONNECTIONS_MAX: usize = 512;
const ENROLMENTS_MAX: usize = 64;
const TRANSFERS_MAX: usize = 128;
const HANDSHAKES_BEFORE_RETRY: usize = 64;

/// What a transfer's chunk takes: the frame's buffer, which doubles as it grows and so can be twice as long, and the
/// chunk decoded from it.
const TRANSFER_BYTES_MAX: usize = 3 * bounds::CHUNK_BYTES_MAX;

/// All that peers can make the aggregator hold at the numbers below, if every slot is held by somebody hostile: 2 GiB
/// of windows, 256 MiB of requests (each stream's buffer and the message decoded from it), 384 MiB of chunks, 40 MiB of
/// strangers. One device has 8 connections and 8 transfers, so it takes 64 of them to come to this; one comes to 60 MiB.
/// Not in it: quinn's own records, and what the handler holds (the aggregator's has one whole update at a time).
const HELD_BYTES_MAX: usize = CONNECTIONS_MAX
    * (2 * CONNECTION_WINDOW_BYTES as usize + STREAMS_MAX as usize * 2 * bounds::CONTROL_BYTES_MAX)
    + TRANSFERS_MAX * TRANSFER_BYTES_MAX
    + (ENROLMENTS_MAX + HANDSHAKES_BEFORE_RETRY * (1 + HANDSHAKES_OVER_RETRY))
        * STRANGER_WINDOW_BYTES as usize
    + INCOMING_BYTES_MAX as usize;

const _: () = assert!(HELD_BYTES_MAX <= 3 << 30);
const _: () = assert!(CONNECTION_WINDOW_BYTES as usize >= bounds::FRAME_BYTES_MAX);
const _: () = assert!(STRANGER_WINDOW_BYTES as usize >= bounds::CONTROL_BYTES_MAX);

/// Numbers of the aggregator's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServeLimits {
    /// A stream on which less than `bounds::PROGRESS_BYTES_MIN` moves for so long is given up.
    pub stall_ms: u64,
    /// Connections with a certificate at once.
    pub connections_max: usize,
    /// Connections on the enrolment ALPN at once: anybody can open one, and one address an eighth of them.
    pub enrolments_max: usize,
    /// Requests served at once, all connections together.
    pub requests_max: usize,
    /// Uploads and downloads among them.
    pub transfers_max: usize,
    /// Handshakes under way of addresses that nothing proves. Above, a newcomer must first prove its own (QUIC retry);
    /// four times as many may then be under way, an eighth of them of one address.
    pub handshakes_before_retry: usize,
    /// Congestion control.
    pub congestion: Congestion,
}

impl Default for ServeLimits {
    fn default() -> Self {
        Self {
            stall_ms: 30_000,
            connections_max: CONNECTIONS_MAX,
            enrolments_max: ENROLMENTS_MAX,
            requests_max: 512,
            transfers_max: TRANSFERS_MAX,
            handshakes_before_retry: HANDSHAKES_BEFORE_RETRY,
            congestion: Congestion::Cubic,
        }
    }
}

/// Numbers of the device's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkLimits {
    /// A stream on which less than `bounds::PROGRESS_BYTES_MIN` moves for so long is given up.
    pub stall_ms: u64,
    /// Pause before the first retry; it doubles with each that follows.
    pub retry_first_ms: u64,
    /// Longest pause.
    pub retry_pause_ms_max: u64,
    /// Retries in a row without progress before the request fails.
    pub retries_max: u32,
    /// Seed of the pauses' jitter; different on each device.
    pub seed: u64,
    /// Congestion control.
    pub congestion: Congestion,
}

impl Default for LinkLimits {
    fn default() -> Self {
        Self {
            stall_ms: 30_000,
            retry_first_ms: 500,
            retry_pause_ms_max: 30_000,
            retries_max: 5,
            seed: 0,
            congestion: Congestion::Cubic,
        }
    }
}

/// How fast a sender dares to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Congestion {
    /// The default: fair, slow on links that lose at random.
    #[default]
    Cubic,
    /// Far faster at 1 % random loss, but overshoots: never on a metered link.
    Bbr,
}
