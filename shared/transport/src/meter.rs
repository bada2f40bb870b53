//! What a device's owner lets its link move: counted at the sockets, asked before each request and each piece of a
//! transfer. Neighbours: `quic` counts, `request` asks; whose limits they are is `edge-client`'s matter.

use crate::{LinkError, limits::CONNECTION_WINDOW_BYTES, wire::Wire};
use commonweal_protocol::bounds;
use std::fmt;

/// A question on a new connection: the handshake with both chains, one frame each way, and the close.
const QUESTION_BYTES: u64 = 48 << 10;

/// What may move before a chunk is through: a sender has begun with the next ones, or not ended with those before, as far
/// as the window goes.
const AHEAD_BYTES: u64 = bounds::CHUNK_BYTES_MAX as u64 + CONNECTION_WINDOW_BYTES as u64;

/// Told what the sockets of a link move, and asked whether they may move more.
///
/// Bytes are those of whole datagrams with their IP and UDP headers, in both directions, whatever they carry: handshakes,
/// acknowledgements and what was sent again are among them.
pub trait Meter: fmt::Debug + Send + Sync {
    /// So many bytes went or came.
    fn moved(&self, bytes: u64);

    /// How many did, since there is this meter.
    fn count(&self) -> u64;

    /// Whether a transfer of so many bytes is worth beginning now.
    fn may_begin(&self, bytes: u64) -> Result<(), PutOff>;

    /// Whether so many bytes more may be moved now. What is allowed counts as moved if the process is killed.
    fn may_go_on(&self, bytes: u64) -> Result<(), PutOff>;
}

/// Not now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PutOff {
    /// Until when and why, after "it waits".
    pub reason: String,
    /// Not before, ms since 1970.
    pub until_ms: u64,
}

/// What so many bytes of content come to on the network: an eighth more for headers, frames and the acknowledgements
/// that come back, and a request's worth for the connection.
fn carried(bytes: u64) -> u64 {
    bytes.saturating_add(bytes / 8).saturating_add(QUESTION_BYTES)
}

/// Before a stream is opened.
pub(crate) fn may_ask(wire: &impl Wire) -> Result<(), LinkError> {
    Ok(wire.meter().map_or(Ok(()), |meter| meter.may_go_on(QUESTION_BYTES))?)
}

/// A transfer that was allowed to begin.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Metered {
    /// What it comes to on the network if little is sent again.
    bytes: u64,
    /// The meter's count when it began.
    begun: u64,
}

impl Metered {
    /// Before a transfer of so many bytes of content.
    pub(crate) fn begin(wire: &impl Wire, content: u64) -> Result<Self, LinkError> {
        let bytes = carried(content);
        let Some(meter) = wire.meter() else { return Ok(Self { bytes, begun: 0 }) };
        meter.may_begin(bytes)?;
        Ok(Self { bytes, begun: meter.count() })
    }

    /// Before a chunk, when so many bytes of content may be under way with it at most.
    pub(crate) fn go_on(self, wire: &impl Wire, under_way: u64) -> Result<(), LinkError> {
        let Some(meter) = wire.meter() else { return Ok(()) };
        let most = carried(under_way.min(AHEAD_BYTES));
        // Where much is sent again, only the window bounds what is still to come.
        let left = self.bytes.checked_sub(meter.count().saturating_sub(self.begun)).unwrap_or(most);
        Ok(meter.may_go_on(left.min(most))?)
    }
}
