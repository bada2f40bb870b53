//! Bytes that a message carries and does not read, never more than a bound. Neighbours: `content` and `enrolment`.

use crate::Invalid;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::{fmt, ops::Deref};

/// At most `MAX` bytes: a chunk, a certificate, a signing request. Shown by length only.
#[derive(Clone, PartialEq, Eq)]
pub struct Opaque<const MAX: usize>(Vec<u8>);

impl<const MAX: usize> Opaque<MAX> {
    /// Takes the bytes, unless they are too many.
    pub fn new(bytes: Vec<u8>) -> Result<Self, Invalid> {
        if bytes.len() > MAX {
            return Err(Invalid::TooLarge {
                field: "opaque bytes",
                limit: MAX as u64,
                got: bytes.len() as u64,
            });
        }
        Ok(Self(bytes))
    }

    /// The bytes themselves.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

impl<const MAX: usize> Deref for Opaque<MAX> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl<const MAX: usize> fmt::Debug for Opaque<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{} bytes>", self.0.len())
    }
}

impl<const MAX: usize> Serialize for Opaque<MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de, const MAX: usize> Deserialize<'de> for Opaque<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Borrowed from the frame, so that the bound is checked before anything is copied.
        let bytes: &serde_bytes::Bytes = Deserialize::deserialize(deserializer)?;
        if bytes.len() > MAX {
            return Err(de::Error::invalid_length(bytes.len(), &"opaque bytes within their bound"));
        }
        Ok(Self(bytes.to_vec()))
    }
}
