//! What the aggregator signs: receipts, releases, control variates and keys that follow a key, each under its own domain, so that a signature
//! of one can never be shown as a signature of another. Neighbours: `receipt`, `release`, `control` and
//! `succession`.
//!
//! The bytes signed are the domain's label, a zero byte, and the value's postcard encoding: fixed field order, no
//! padding, shortest integers, so one value has one encoding. Ed25519, verified strictly (RFC 8032 without the
//! malleable and small-order cases).

use crate::Invalid;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;

pub use ed25519_dalek::SigningKey;
use ed25519_dalek::{Signer as _, VerifyingKey};

/// Why a signature is not made or not accepted.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    /// The value is out of bounds, and so is not signed.
    #[error("value to sign is out of bounds")]
    Invalid(#[from] Invalid),
    /// The value has no encoding.
    #[error("value to sign does not encode")]
    Encode(#[from] postcard::Error),
    /// The key is no point of the curve.
    #[error("aggregator key is not an ed25519 key")]
    Key(#[source] ed25519_dalek::SignatureError),
    /// The signature is not this key's for this value.
    #[error("signature is not the aggregator's for this value")]
    Mismatch(#[source] ed25519_dalek::SignatureError),
}

/// The public half of the key that signs receipts and releases.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AggregatorKey(pub crate::Digest);

impl AggregatorKey {
    /// The public half of this key.
    pub fn of(key: &SigningKey) -> Self {
        Self(crate::Digest(key.verifying_key().to_bytes()))
    }
}

impl fmt::Debug for AggregatorKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AggregatorKey({})", self.0)
    }
}

/// 64 bytes of Ed25519.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Signature(pub [u8; 64]);

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signature({}…)", data_encoding::HEXLOWER.encode(&self.0[..8]))
    }
}

impl Serialize for Signature {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            return serializer.serialize_str(&data_encoding::HEXLOWER.encode(&self.0));
        }
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Signature {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let wrong = || de::Error::custom("expected 64 bytes of signature");
        if deserializer.is_human_readable() {
            let text = String::deserialize(deserializer)?;
            let bytes = data_encoding::HEXLOWER.decode(text.as_bytes()).map_err(|_| wrong())?;
            return Ok(Self(bytes.try_into().map_err(|_| wrong())?));
        }
        let bytes: &serde_bytes::Bytes = Deserialize::deserialize(deserializer)?;
        Ok(Self((**bytes).try_into().map_err(|_| wrong())?))
    }
}

/// What a signature is about.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Domain {
    Receipt,
    Release,
    Control,
    Succession,
}

impl Domain {
    fn label(self) -> &'static [u8] {
        match self {
            Self::Receipt => b"commonweal receipt v1",
            Self::Release => b"commonweal release v1",
            Self::Control => b"commonweal control v1",
            Self::Succession => b"commonweal succession v1",
        }
    }

    pub(crate) fn canonical<T: Serialize>(self, value: &T) -> Result<Vec<u8>, SignatureError> {
        let mut bytes = self.label().to_vec();
        bytes.push(0);
        Ok(postcard::to_extend(value, bytes)?)
    }

    pub(crate) fn sign<T: Serialize>(self, key: &SigningKey, value: &T) -> Result<Signature, SignatureError> {
        Ok(Signature(key.sign(&self.canonical(value)?).to_bytes()))
    }

    pub(crate) fn verify<T: Serialize>(
        self,
        key: &AggregatorKey,
        value: &T,
        signature: &Signature,
    ) -> Result<(), SignatureError> {
        let key = VerifyingKey::from_bytes(&key.0.0).map_err(SignatureError::Key)?;
        let signature = ed25519_dalek::Signature::from_bytes(&signature.0);
        key.verify_strict(&self.canonical(value)?, &signature).map_err(SignatureError::Mismatch)
    }
}
