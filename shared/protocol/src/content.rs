//! Bytes on their way, in either direction: chunks with their hash, and the request for published bytes from an
//! offset. Neighbours: `update` announces what goes up, `release` what comes down.

use crate::{Digest, Invalid, Opaque, bounds};
use serde::{Deserialize, Serialize};

/// A piece of an update or of published content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// Where in the whole the bytes start.
    pub offset: u64,
    /// BLAKE3 of the bytes.
    pub hash: Digest,
    /// The bytes, from 1 to [`bounds::CHUNK_BYTES_MAX`].
    pub bytes: Opaque<{ bounds::CHUNK_BYTES_MAX }>,
}

/// Published bytes as a device knows them: from a release or from a task's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// BLAKE3 of the bytes.
    pub digest: Digest,
    /// How many there are.
    pub length: u64,
}

/// Asks for published bytes, from an offset to the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetch {
    /// BLAKE3 of the whole.
    pub digest: Digest,
    /// Bytes already held.
    pub offset: u64,
}

impl Chunk {
    /// A chunk of these bytes, hashed here.
    pub fn new(offset: u64, bytes: Vec<u8>) -> Result<Self, Invalid> {
        let chunk = Self { offset, hash: Digest::of(&bytes), bytes: Opaque::new(bytes)? };
        chunk.check()?;
        Ok(chunk)
    }

    /// Whether the bytes are those of the hash.
    pub fn is_intact(&self) -> bool {
        Digest::of(&self.bytes) == self.hash
    }

    /// Offset of the first byte after this chunk.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.bytes.len() as u64)
    }

    pub(crate) fn check(&self) -> Result<(), Invalid> {
        Invalid::unless_at_least("chunk bytes", self.bytes.len() as u64, 1u64)?;
        Invalid::unless_at_most("chunk end", self.end(), bounds::CONTENT_BYTES_MAX)
    }
}

impl Content {
    pub(crate) fn check(&self) -> Result<(), Invalid> {
        Invalid::unless_at_least("content length", self.length, 1u64)?;
        Invalid::unless_at_most("content length", self.length, bounds::CONTENT_BYTES_MAX)
    }
}

impl Fetch {
    pub(crate) fn check(&self) -> Result<(), Invalid> {
        Invalid::unless_at_most("fetch offset", self.offset, bounds::CONTENT_BYTES_MAX)
    }
}
