//! A message as bytes: `length: u32 little-endian | version: u8 | payload: postcard`. The length counts the version
//! and the payload. Neighbours: `message` is what goes in; `commonweal-transport` moves the bytes.
//!
//! The length is judged before anything is allocated: read [`Header::BYTES`], make a [`Header`], then read
//! [`Header::body_bytes`] more and [`decode`] them.

use crate::{Invalid, Message, bounds};

/// The version of every frame of this crate.
pub const FRAME_VERSION: u8 = 3;

/// Why bytes are not a message.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DecodeError {
    /// The frame announces more than may come here.
    #[error("frame: expected at most {limit} bytes, got {got} announced")]
    TooLong {
        /// Largest body that may come here.
        limit: usize,
        /// Body announced.
        got: usize,
    },
    /// A frame without even a version.
    #[error("frame: expected a version byte, got an empty body")]
    Empty,
    /// A version that is not spoken here.
    #[error("frame: expected version {FRAME_VERSION}, got {0}")]
    Version(u8),
    /// Not the encoding of a message that may come here.
    #[error("frame: payload is not a message that may come here")]
    Payload(#[source] postcard::Error),
    /// Bytes after the message.
    #[error("frame: {0} bytes left after the message")]
    Trailing(usize),
    /// A message with a value out of its bounds.
    #[error("frame: message is out of bounds")]
    Invalid(#[from] Invalid),
}

/// Why a message is not sent.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EncodeError {
    /// A value out of its bounds.
    #[error("message to send is out of bounds")]
    Invalid(#[from] Invalid),
    /// No encoding.
    #[error("message to send does not encode")]
    Payload(#[source] postcard::Error),
    /// More than a frame holds.
    #[error("message to send: expected at most {limit} bytes, got {got}")]
    TooLong {
        /// Largest body.
        limit: usize,
        /// Body that it would make.
        got: usize,
    },
}

/// A frame's length, judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    body_bytes: usize,
}

impl Header {
    /// Bytes of a header.
    pub const BYTES: usize = 4;

    /// Judges the length that these bytes announce by the largest that may come here.
    pub fn parse(bytes: [u8; Self::BYTES], body_bytes_max: usize) -> Result<Self, DecodeError> {
        let body_bytes = u32::from_le_bytes(bytes) as usize;
        if body_bytes > body_bytes_max {
            return Err(DecodeError::TooLong { limit: body_bytes_max, got: body_bytes });
        }
        if body_bytes == 0 {
            return Err(DecodeError::Empty);
        }
        Ok(Self { body_bytes })
    }

    /// Bytes that follow: the version and the payload. At least 1, at most the bound given to [`Header::parse`].
    pub fn body_bytes(self) -> usize {
        self.body_bytes
    }
}

/// A whole frame of this message.
pub fn encode<M: Message>(message: &M) -> Result<Vec<u8>, EncodeError> {
    message.check()?;
    let mut frame = vec![0; Header::BYTES];
    frame.push(FRAME_VERSION);
    let mut frame = postcard::to_extend(message, frame).map_err(EncodeError::Payload)?;
    let body_bytes = frame.len() - Header::BYTES;
    let header = u32::try_from(body_bytes).ok().filter(|_| body_bytes <= bounds::FRAME_BYTES_MAX);
    let Some(header) = header else {
        return Err(EncodeError::TooLong { limit: bounds::FRAME_BYTES_MAX, got: body_bytes });
    };
    frame[..Header::BYTES].copy_from_slice(&header.to_le_bytes());
    Ok(frame)
}

/// The message in a frame's body (what follows the header), checked.
pub fn decode<M: Message>(body: &[u8]) -> Result<M, DecodeError> {
    let (&version, payload) = body.split_first().ok_or(DecodeError::Empty)?;
    if version != FRAME_VERSION {
        return Err(DecodeError::Version(version));
    }
    let (message, rest) = postcard::take_from_bytes::<M>(payload).map_err(DecodeError::Payload)?;
    if !rest.is_empty() {
        return Err(DecodeError::Trailing(rest.len()));
    }
    message.check()?;
    Ok(message)
}
