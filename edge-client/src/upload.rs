//! Stage 6, **upload**: delivers the packed update and keeps the aggregator's signed receipt.
//!
//! From `compress.rs`. The link resumes by itself where the aggregator's durable bytes end; sending the same update
//! again brings the same receipt, so a crash between delivery and the receipt's write costs nothing.

use commonweal_protocol::{
    AggregatorKey, BaseHash, DeviceReport, Digest, Open, Refusal, RoundId, SignatureError, SignedReceipt,
};
use commonweal_transport::{Link, LinkError, Uploaded};
use serde::{Deserialize, Serialize};

use crate::{
    compress::Packed,
    store::{Store, StoreError},
};

const RECEIPTS: &str = "receipts.jsonl";

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
    /// The receipt is not the aggregator's.
    #[error("receipt of round {round} is not signed by the aggregator")]
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
    /// The receipt could not be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl UploadError {
    /// The aggregator's no, if that is what it was.
    pub fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Link { source, .. } => source.refusal(),
            _ => None,
        }
    }

    /// Whether this round's update is lost for good: the round is over, or will never take it.
    pub fn is_final(&self) -> bool {
        self.refusal().is_some_and(|refusal| !refusal.is_transient())
    }
}

/// What an update says about itself before its bytes.
pub fn announce(round: RoundId, base: BaseHash, packed: &Packed, report: DeviceReport, samples: u32) -> Open {
    let bytes = packed.bytes();
    Open { round, base, digest: Digest::of(bytes), length: bytes.len() as u64, samples, report }
}

/// Delivers an update and keeps its receipt, durably, before it returns.
pub async fn upload(
    link: &impl Link,
    key: &AggregatorKey,
    store: &Store,
    open: &Open,
    packed: &Packed,
) -> Result<Uploaded, UploadError> {
    let round = open.round;
    let uploaded =
        link.upload(open, packed.bytes()).await.map_err(|source| UploadError::Link { round, source })?;
    let receipt = uploaded.receipt.verify(key).map_err(|source| UploadError::Signature { round, source })?;
    if receipt.digest != open.digest || receipt.round != round {
        return Err(UploadError::OtherUpdate { round, expected: open.digest, got: receipt.digest });
    }
    if delivered(store)?.iter().all(|known| known.round != round) {
        let line = serde_json::to_string(&Delivered { round, receipt: uploaded.receipt })
            .map_err(|error| StoreError::Damaged { path: store.path(RECEIPTS), reason: error.to_string() })?;
        store.append_line(RECEIPTS, &line)?;
    }
    Ok(uploaded)
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
