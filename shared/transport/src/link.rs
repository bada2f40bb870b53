//! What a device can ask of the aggregator, whatever carries it: the trait, its answers and its errors.
//! Neighbours: `session` implements it once, over any `Wire`; `edge-client` is written against it.

use crate::PutOff;
use commonweal_protocol::{
    CertificateChain, Content, Csr, DecodeError, Digest, EncodeError, Open, Poll, PollReply, ReconnectWindow,
    Refusal, SignedReceipt,
};
use std::{future::Future, io};

/// The device's side of the link. Every call survives cuts by itself: it connects again with a growing pause and goes
/// on where the other side's durable bytes end, until the retries without progress are used up.
pub trait Link: Send + Sync + 'static {
    /// Asks for work and news.
    fn poll(&self, poll: Poll) -> impl Future<Output = Result<PollReply, LinkError>> + Send;

    /// Delivers an update of which `open` is the announcement. Returns once the aggregator has signed for it.
    fn upload(&self, open: &Open, payload: &[u8])
    -> impl Future<Output = Result<Uploaded, LinkError>> + Send;

    /// Completes `partial`, the first bytes of some published content (none at first), and verifies the whole.
    ///
    /// On an error `partial` keeps the chunks that arrived whole, to go on from another time; only if all of it is there
    /// and is not what was asked for, it is emptied.
    fn fetch(
        &self,
        content: Content,
        partial: &mut Vec<u8>,
    ) -> impl Future<Output = Result<(), LinkError>> + Send;

    /// Asks for a fresh certificate for the same device.
    fn renew(&self, csr: Csr) -> impl Future<Output = Result<CertificateChain, LinkError>> + Send;
}

/// An update is delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uploaded {
    /// The aggregator's word. Its signature is the caller's to verify, who knows the key.
    pub receipt: SignedReceipt,
    /// When to come back.
    pub reconnect: ReconnectWindow,
    /// Bytes that the aggregator already held when this call first reached it; the whole length if it had them all.
    pub resumed_from: u64,
    /// Bytes of the update that this call sent, those sent twice counted twice.
    pub sent_bytes: u64,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The aggregator answered no.
    #[error("the aggregator refused: {reason}")]
    Refused {
        /// Why.
        reason: Refusal,
        /// When to come back.
        reconnect: ReconnectWindow,
    },
    /// The aggregator cannot be reached.
    #[error("cannot reach the aggregator at {address}")]
    Unreachable {
        /// Where it was looked for.
        address: String,
        /// What the network said.
        #[source]
        source: io::Error,
    },
    /// Who answered is not the aggregator that this device knows.
    #[error("the peer is not the aggregator that this device knows: {reason}")]
    Untrusted {
        /// What is wrong with its certificate.
        reason: String,
    },
    /// The aggregator does not accept this device's certificate.
    #[error("the aggregator does not accept this device's certificate: {reason}")]
    CertificateRefused {
        /// What it said.
        reason: String,
    },
    /// The connection or the stream ended before the answer.
    #[error("the connection was cut while {during}")]
    Cut {
        /// What was being done.
        during: &'static str,
        /// What the network said.
        #[source]
        source: io::Error,
    },
    /// Nothing moved for the length of the stall window.
    #[error("no progress for {stall_ms} ms while {during}")]
    Stalled {
        /// What was being done.
        during: &'static str,
        /// The window.
        stall_ms: u64,
    },
    /// The answer is not a message.
    #[error("the answer is not a message")]
    Decode(#[from] DecodeError),
    /// The request cannot be sent as it is.
    #[error("the request cannot be sent as it is")]
    Encode(#[from] EncodeError),
    /// The answer is a message, but not to this request.
    #[error("expected {expected}, got another message")]
    OutOfPlace {
        /// What was expected.
        expected: &'static str,
    },
    /// A chunk that arrived, or the whole, is not what it should be.
    #[error("content: expected digest {expected}, got {got}")]
    Corrupt {
        /// Digest announced with the chunk, or asked for.
        expected: Digest,
        /// Digest of what arrived.
        got: Digest,
    },
    /// The payload given is not the one announced.
    #[error("update: announced {announced} bytes with digest {digest}, got other bytes")]
    PayloadMismatch {
        /// Length announced.
        announced: u64,
        /// Digest announced.
        digest: Digest,
    },
    /// The owner of this device lets it move no more for now.
    #[error("this device's budget: it waits {}", .0.reason)]
    PutOff(PutOff),
    /// This device's own keys or certificates do not work.
    #[error("this device's identity cannot be used")]
    Identity(#[from] crate::IdentityError),
}

impl LinkError {
    /// Whether the same request can succeed by being made again.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Refused { reason, .. } => reason.is_transient(),
            Self::Unreachable { .. }
            | Self::Cut { .. }
            | Self::Stalled { .. }
            | Self::OutOfPlace { .. }
            | Self::Corrupt { .. }
            | Self::PutOff(_) => true,
            // A frame that was damaged on its way; a peer that speaks otherwise will fail again, and retries are few.
            Self::Decode(error) => !matches!(error, DecodeError::Version(_)),
            Self::Untrusted { .. }
            | Self::CertificateRefused { .. }
            | Self::Encode(_)
            | Self::PayloadMismatch { .. }
            | Self::Identity(_) => false,
        }
    }

    /// Whether the network, and not the peer's word, stands in the way (exit code 5 and not 4).
    pub fn is_unavailable(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Cut { .. } | Self::Stalled { .. } | Self::PutOff(_))
    }

    /// Until when this device's own budget puts it off, if that is what stands in the way.
    pub fn put_off(&self) -> Option<&PutOff> {
        match self {
            Self::PutOff(put_off) => Some(put_off),
            _ => None,
        }
    }

    /// The refusal, if the aggregator gave one.
    pub fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Refused { reason, .. } => Some(*reason),
            _ => None,
        }
    }
}

impl From<PutOff> for LinkError {
    fn from(put_off: PutOff) -> Self {
        Self::PutOff(put_off)
    }
}

impl From<commonweal_protocol::Refused> for LinkError {
    fn from(refused: commonweal_protocol::Refused) -> Self {
        Self::Refused { reason: refused.reason, reconnect: refused.reconnect }
    }
}
