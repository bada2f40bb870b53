//! The aggregator's signed word that an update is on its disk. Neighbours: ends an upload (`update`); `signature` says
//! what exactly is signed.

use crate::{
    AggregatorKey, DeviceId, Digest, Invalid, ReconnectWindow, RoundId, Signature, SignatureError,
    SigningKey, signature::Domain,
};
use serde::{Deserialize, Serialize};

/// What was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// The round.
    pub round: RoundId,
    /// The device that sent it.
    pub device: DeviceId,
    /// BLAKE3 of the update.
    pub digest: Digest,
    /// Bytes of the update.
    pub length: u64,
    /// When it was made durable, ms since 1970.
    pub received_ms: u64,
}

/// A receipt and the aggregator's signature over it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedReceipt {
    /// What was received.
    pub receipt: Receipt,
    /// Over the receipt's canonical bytes.
    pub signature: Signature,
}

/// The last word of an upload: the receipt, and when to come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// The signed receipt. The same upload gets the same receipt, however often it is sent.
    pub receipt: SignedReceipt,
    /// When to come back.
    pub reconnect: ReconnectWindow,
}

impl SignedReceipt {
    /// Signs a receipt. Only for bytes that are on disk.
    pub fn sign(key: &SigningKey, receipt: Receipt) -> Result<Self, SignatureError> {
        Ok(Self { signature: Domain::Receipt.sign(key, &receipt)?, receipt })
    }

    /// The receipt, if the aggregator signed it.
    pub fn verify(&self, key: &AggregatorKey) -> Result<&Receipt, SignatureError> {
        Domain::Receipt.verify(key, &self.receipt, &self.signature)?;
        Ok(&self.receipt)
    }
}

impl Accepted {
    pub(crate) fn check(&self) -> Result<(), Invalid> {
        self.reconnect.check()
    }
}
