//! Names of things, as numbers and digests. In binary forms they are their bytes; in text (JSON, TOML, logs) hex.
//! Neighbours: every message is made of these.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::{fmt, str::FromStr};

/// Why a text is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentifierError {
    /// Not as long as this identifier is.
    #[error("identifier: expected {expected} hex digits, got {got} characters")]
    Length {
        /// Hex digits wanted.
        expected: usize,
        /// Bytes of the text given.
        got: usize,
    },
    /// Not lowercase hex.
    #[error("identifier: expected lowercase hex digits only")]
    NotHex,
}

macro_rules! hex_identifier {
    ($(#[$doc:meta])* $name:ident, $bytes:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub [u8; $bytes]);

        impl FromStr for $name {
            type Err = IdentifierError;
            fn from_str(text: &str) -> Result<Self, IdentifierError> {
                let hex = text.as_bytes();
                if hex.len() != 2 * $bytes {
                    return Err(IdentifierError::Length { expected: 2 * $bytes, got: hex.len() });
                }
                let mut bytes = [0; $bytes];
                data_encoding::HEXLOWER.decode_mut(hex, &mut bytes).map_err(|_| IdentifierError::NotHex)?;
                Ok(Self(bytes))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.serialize_str(&data_encoding::HEXLOWER.encode(&self.0))
                } else {
                    self.0.serialize(serializer)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    let text = String::deserialize(deserializer)?;
                    text.parse().map_err(de::Error::custom)
                } else {
                    Ok(Self(<[u8; $bytes]>::deserialize(deserializer)?))
                }
            }
        }
    };
}

macro_rules! shown_as_hex {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

hex_identifier!(
    /// A device, as named in its certificate: 16 random bytes chosen by the aggregator at enrolment.
    DeviceId, 16
);
shown_as_hex!(DeviceId);

hex_identifier!(
    /// BLAKE3 that identifies a frozen base (see the package manifest): devices with another base are refused.
    BaseHash, 32
);
shown_as_hex!(BaseHash);

hex_identifier!(
    /// BLAKE3 of some bytes: an update, a published adapter, a chunk, a certificate.
    Digest, 32
);
shown_as_hex!(Digest);

impl Digest {
    /// The digest of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

hex_identifier!(
    /// A single-use secret that lets one device enrol. Its debug form does not show it; the aggregator keeps only its
    /// [`Token::digest`].
    Token, 32
);

impl Token {
    /// What the aggregator keeps in place of the token.
    pub fn digest(&self) -> Digest {
        Digest(blake3::derive_key("commonweal enrolment token v1", &self.0))
    }

    /// The token in hex, for an invitation.
    pub fn reveal(&self) -> String {
        data_encoding::HEXLOWER.encode(&self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(hidden)")
    }
}

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = std::num::ParseIntError;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    };
}

counter!(
    /// A round, counted from 1.
    RoundId
);
counter!(
    /// A published adapter, counted from 0 (the start that no round has trained).
    Version
);
counter!(
    /// A key that signs for the aggregator, counted from 0 (the one that its state directory was made with).
    KeyNumber
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_round_trips_and_refuses_what_is_not_hex() {
        let device = DeviceId([0xab; 16]);
        assert_eq!(device.to_string(), "ab".repeat(16));
        assert_eq!(device.to_string().parse::<DeviceId>().unwrap(), device);
        assert_eq!("ab".parse::<DeviceId>(), Err(IdentifierError::Length { expected: 32, got: 2 }));
        assert_eq!("AB".repeat(16).parse::<DeviceId>(), Err(IdentifierError::NotHex));
        assert_eq!("é".repeat(16).parse::<DeviceId>(), Err(IdentifierError::NotHex));
    }

    /// The first vector of BLAKE3's own test vectors (input of no bytes).
    #[test]
    fn digest_is_blake3() {
        assert_eq!(
            Digest::of(b"").to_string(),
            "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
        );
    }

    #[test]
    fn a_token_is_not_shown_and_its_digest_is_not_its_hash() {
        let token = Token([7; 32]);
        assert_eq!(format!("{token:?}"), "Token(hidden)");
        assert_ne!(token.digest(), Digest::of(&token.0));
    }
}
