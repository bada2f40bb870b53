//! Why a peer is refused: coarse on purpose, since a peer needs to know what to do and not what we know. The log of
//! the one who refuses has the rest. Neighbours: any request can be answered so.

use crate::{Invalid, ReconnectWindow};
use serde::{Deserialize, Serialize};

/// The reason, and so what the device should do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// Not a message that belongs here.
    #[error("the message was malformed or out of place")]
    Malformed,
    /// A frame version that this side does not speak.
    #[error("the frame's version is not spoken here")]
    UnsupportedVersion,
    /// Beyond a bound.
    #[error("the message or the update is too large")]
    TooLarge,
    /// Too much at once; come back in the window.
    #[error("the aggregator is busy")]
    Busy,
    /// Its own fault; come back in the window.
    #[error("the aggregator failed")]
    Internal,
    /// The device's certificate was revoked.
    #[error("the device is revoked")]
    Revoked,
    /// The device's certificate is past its time: enrol again.
    #[error("the device's certificate has expired")]
    Expired,
    /// An enrolment token that is unknown, used or past its time.
    #[error("the enrolment token is unknown, used or expired")]
    TokenRefused,
    /// A certificate signing request that cannot be signed.
    #[error("the certificate signing request is not acceptable")]
    CsrRefused,
    /// Another frozen base than this federation's.
    #[error("the frozen base is not this federation's")]
    WrongBase,
    /// The round is over.
    #[error("the round is over")]
    StaleRound,
    /// No such round, or this device has no part in it.
    #[error("the device has no part in this round")]
    NotInRound,
    /// This device has sent another update for this round.
    #[error("another update of this device is already accepted for this round")]
    AlreadySent,
    /// No such upload is open on this aggregator: open it again.
    #[error("no such upload is open")]
    UploadUnknown,
    /// The chunk does not start where the bytes held end: open again and learn the offset.
    #[error("the chunk does not start where the bytes held end")]
    OffsetMismatch,
    /// A chunk's bytes are not those of its hash.
    #[error("the chunk does not match its hash")]
    ChunkCorrupt,
    /// More or fewer bytes than were announced.
    #[error("the update is not of the announced length")]
    LengthMismatch,
    /// The whole is not that of the announced digest; what was held is dropped.
    #[error("the update does not match the announced digest")]
    DigestMismatch,
    /// The bytes are whole but not an update that this round can merge.
    #[error("the update cannot be merged in this round")]
    UpdateUnusable,
    /// Nothing published has this digest, or the offset is past its end.
    #[error("no such content is published")]
    ContentUnknown,
}

impl Refusal {
    /// Whether the same request can succeed later without anything else changing.
    pub fn is_transient(self) -> bool {
        matches!(
            self,
            Self::Busy | Self::Internal | Self::UploadUnknown | Self::OffsetMismatch | Self::ChunkCorrupt
        )
    }
}

/// A refusal as it is sent: the reason, and when to come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("refused: {reason}")]
pub struct Refused {
    /// Why.
    pub reason: Refusal,
    /// When to come back.
    pub reconnect: ReconnectWindow,
}

impl Refused {
    pub(crate) fn check(&self) -> Result<(), Invalid> {
        self.reconnect.check()
    }
}

impl From<Refusal> for Refused {
    fn from(reason: Refusal) -> Self {
        Self { reason, reconnect: ReconnectWindow { after_ms: 5_000, spread_ms: 10_000 } }
    }
}
