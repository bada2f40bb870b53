//! All that can be in a frame, in four sets: what a device may send and what it may be answered, on each of the two
//! ALPNs. A set is decoded as a whole, so a message out of place does not decode. Neighbours: `frame` carries them.

use crate::{
    Accepted, CertificateChain, Chunk, Content, Enroll, Enrolled, Fetch, Invalid, Open, Poll, PollReply,
    Refused, Renew,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// A set of messages that can be in a frame. Decoding checks every bound, and so does encoding.
pub trait Message: Serialize + DeserializeOwned + Sized {
    /// Whether every value is in its bounds.
    fn check(&self) -> Result<(), Invalid>;
}

/// From a device with a certificate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// Is there work, is there news?
    Poll(Poll),
    /// Opens or resumes an upload on this stream.
    Open(Open),
    /// Bytes of the upload.
    Chunk(Chunk),
    /// The upload's end.
    Finish,
    /// Published bytes, please.
    Fetch(Fetch),
    /// A fresh certificate, please.
    Renew(Renew),
}

/// To a device with a certificate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[expect(clippy::large_enum_variant, reason = "one lives at a time, and boxes would show in every caller")]
pub enum Reply {
    /// No.
    Refused(Refused),
    /// To [`Request::Poll`].
    Poll(PollReply),
    /// To [`Request::Open`]: bytes held durably; send from here.
    Offset(u64),
    /// To [`Request::Finish`], and to [`Request::Open`] of an update that is already here.
    Accepted(Accepted),
    /// To [`Request::Fetch`]: what the whole is; chunks follow.
    Content(Content),
    /// Bytes of the content.
    Chunk(Chunk),
    /// To [`Request::Renew`].
    Renewed(CertificateChain),
}

/// From a device without a certificate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum EnrolmentRequest {
    /// An identity, please.
    Enroll(Enroll),
}

/// To a device without a certificate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum EnrolmentReply {
    /// No.
    Refused(Refused),
    /// To [`EnrolmentRequest::Enroll`].
    Enrolled(Enrolled),
}

impl Message for Request {
    fn check(&self) -> Result<(), Invalid> {
        match self {
            Self::Poll(_) | Self::Finish | Self::Renew(_) => Ok(()),
            Self::Open(open) => open.check(),
            Self::Chunk(chunk) => chunk.check(),
            Self::Fetch(fetch) => fetch.check(),
        }
    }
}

impl Message for Reply {
    fn check(&self) -> Result<(), Invalid> {
        match self {
            Self::Refused(refused) => refused.check(),
            Self::Poll(reply) => reply.check(),
            Self::Offset(offset) => {
                Invalid::unless_at_most("offset", *offset, crate::bounds::UPDATE_BYTES_MAX)
            }
            Self::Accepted(accepted) => accepted.check(),
            Self::Content(content) => content.check(),
            Self::Chunk(chunk) => chunk.check(),
            Self::Renewed(chain) => chain.check(),
        }
    }
}

impl Message for EnrolmentRequest {
    fn check(&self) -> Result<(), Invalid> {
        let Self::Enroll(_) = self;
        Ok(())
    }
}

impl Message for EnrolmentReply {
    fn check(&self) -> Result<(), Invalid> {
        match self {
            Self::Refused(refused) => refused.check(),
            Self::Enrolled(enrolled) => enrolled.chain.check(),
        }
    }
}
