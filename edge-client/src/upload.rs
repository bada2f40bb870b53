//! Stage 6, **upload**: delivers the packed update and keeps the aggregator's signed receipt.
//!
//! From `compress.rs`. The link resumes by itself where the aggregator's durable bytes end; sending the same update
//! again brings the same receipt, so a crash between delivery and the receipt's write costs nothing.

use commonweal_protocol::{
    BaseHash, DeviceId, DeviceReport, Digest, Open, ReconnectWindow, Refusal, RoundId, SignatureError,
    SignedReceipt,
};
use commonweal_transport::{Link, LinkError, Uploaded};
use serde::{Deserialize, Serialize};

use crate::{
    compress::Packed,
    store::{Store, StoreError},
    trust::Trust,
};

const RECEIPTS: &str = "receipts.jsonl";
/// How often an update that did not arrive as it was sent is begun again before it is given up. With the first time it
/// is sent four times: half of what the aggregator takes of one device in a round.
const BEGUN_AGAIN_MAX: u32 = 3;

/// One accepted update, as kept on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Delivered {
    /// The round.
    pub round: RoundId,
    /// The aggregator's word.
    pub receipt: SignedReceipt,
}

/// Why an update was not delivered.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// The network or the aggregator.
    #[error("update of round {round} was not delivered")]
    Link {
        /// The round.
        round: RoundId,
        /// Why.
        #[source]
        source: LinkError,
    },
    /// The receipt is not the aggregator's, or under a key that the device has yet to hear of.
    #[error("receipt of round {round} is not signed by the aggregator's key in force")]
    Signature {
        /// The round.
        round: RoundId,
        /// Why.
        #[source]
        source: SignatureError,
    },
    /// The receipt is for something else.
    #[error("receipt: expected {expected} of round {round}, got {got}")]
    OtherUpdate {
        /// The round.
        round: RoundId,
        /// What was sent.
        expected: Digest,
        /// What was signed for.
        got: Digest,
    },
    /// The receipt is another device's.
    #[error("receipt of round {round}: expected device {expected}, got {got}")]
    OtherDevice {
        /// The round.
        round: RoundId,
        /// This device.
        expected: DeviceId,
        /// Whom it was signed for.
        got: DeviceId,
    },
    /// The receipt could not be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl UploadError {
    /// The link's error, if it was the link that failed.
    pub fn link(&self) -> Option<&LinkError> {
        match self {
            Self::Link { source, .. } => Some(source),
            _ => None,
        }
    }

    /// The aggregator's no for good, and when to come back: the round is over, or will never take this update. A device
    /// whose certificate has ended can come back with a fresh one.
    pub fn final_refusal(&self) -> Option<(Refusal, ReconnectWindow)> {
        match self.link() {
            Some(&LinkError::Refused { reason, reconnect })
                if !reason.is_transient() && reason != Refusal::Expired =>
            {
                Some((reason, reconnect))
            }
            _ => None,
        }
    }
}

/// What an update says about itself before its bytes.
pub fn announce(round: RoundId, base: BaseHash, packed: &Packed, report: DeviceReport, samples: u32) -> Open {
    let bytes = packed.bytes();
    Open { round, base, digest: Digest::of(bytes), length: bytes.len() as u64, samples, report }
}

/// Delivers an update of this device and keeps its receipt, durably, before it returns.
pub async fn upload(
    link: &impl Link,
    trust: &Trust,
    device: DeviceId,
    store: &Store,
    open: &Open,
    packed: &Packed,
) -> Result<Uploaded, UploadError> {
    let round = open.round;
    let uploaded =
        send(link, open, packed.bytes()).await.map_err(|source| UploadError::Link { round, source })?;
    let receipt =
        uploaded.receipt.verify(&trust.key()).map_err(|source| UploadError::Signature { round, source })?;
    if receipt.digest != open.digest || receipt.round != round {
        return Err(UploadError::OtherUpdate { round, expected: open.digest, got: receipt.digest });
    }
    if receipt.device != device {
        return Err(UploadError::OtherDevice { round, expected: device, got: receipt.device });
    }
    if !is_delivered(store, trust, round)? {
        let line = serde_json::to_string(&Delivered { round, receipt: uploaded.receipt })
            .map_err(|error| StoreError::Damaged { path: store.path(RECEIPTS), reason: error.to_string() })?;
        store.append_line(RECEIPTS, &line)?;
    }
    Ok(uploaded)
}

/// Sends the bytes; from their beginning again if the aggregator dropped what it held because it was not what was sent.
async fn send(link: &impl Link, open: &Open, bytes: &[u8]) -> Result<Uploaded, LinkError> {
    let mut begun_again = 0;
    loop {
        let sent = link.upload(open, bytes).await;
        let refusal = sent.as_ref().err().and_then(LinkError::refusal);
        let is_dropped = matches!(refusal, Some(Refusal::LengthMismatch | Refusal::DigestMismatch));
        if !is_dropped || begun_again == BEGUN_AGAIN_MAX {
            return sent;
        }
        begun_again += 1;
        tracing::warn!("the update of round {} arrived damaged; sending it again", open.round.0);
    }
}

/// Whether this aggregator has signed for an update of this round. Another one's rounds have the same numbers.
pub fn is_delivered(store: &Store, trust: &Trust, round: RoundId) -> Result<bool, StoreError> {
    let is_for_it =
        |known: &Delivered| known.receipt.receipt.round == round && trust.has_signed(&known.receipt);
    Ok(delivered(store)?.iter().any(|known| known.round == round && is_for_it(known)))
}

/// The receipts on disk, oldest first.
pub fn delivered(store: &Store) -> Result<Vec<Delivered>, StoreError> {
    store
        .lines(RECEIPTS)?
        .iter()
        .map(|line| {
            serde_json::from_str(line).map_err(|error| StoreError::Damaged {
                path: store.path(RECEIPTS),
                reason: format!("expected one receipt a line: {error}"),
            })
        })
        .collect()
}
