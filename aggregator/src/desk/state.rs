//! What of the desk is stored, and under which names.

use std::collections::BTreeMap;

use commonweal_protocol::{Open, RoundId, SignedControl, SignedReceipt, Version};
use serde::{Deserialize, Serialize};

use crate::events::{AlignFigures, EvaluateFigures, MergeFigures};
use crate::round::{NotAdmitted, ROUNDS_BACK_MAX, Rounds};
use crate::store::{Coord, StoreError};

/// The log of the state; only its newest entry matters.
pub(super) const LOG: &str = "round";
/// Rounds whose receipts can still be repeated to a device that missed them.
pub(crate) const RECEIPTS_KEPT_ROUNDS: u64 = 16;
const _: () = assert!(ROUNDS_BACK_MAX < RECEIPTS_KEPT_ROUNDS, "else an update could be taken twice");

/// Everything about the current round that must survive.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Durable {
    pub(super) rounds: Rounds,
    pub(super) progress: Progress,
    /// Of the last merge; devices know theirs whether or not a release came of it, so it outlives the round.
    pub(super) control: Option<SignedControl>,
}

/// What the stages of the current round did so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Figures of the merge.
    pub merge: Option<MergeFigures>,
    /// Figures of the alignment.
    pub align: Option<AlignFigures>,
    /// Figures of the evaluation.
    pub evaluate: Option<EvaluateFigures>,
    /// Seconds of each stage.
    pub seconds: BTreeMap<String, f64>,
}

/// An accepted update, as the inbox keeps it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accepted {
    /// What the device announced.
    pub open: Open,
    /// What it was answered, to be repeated word for word.
    pub receipt: SignedReceipt,
    /// Euclidean norm of the update, so that the merge need not decode it for that; none in an item of version 0.1.
    pub norm: Option<f64>,
    /// The release that it was trained from; noted when it is taken.
    pub start: Option<Version>,
}

/// Why the desk could not do something.
#[derive(Debug, thiserror::Error)]
pub enum DeskError {
    /// The store failed.
    #[error("the round's state was not stored")]
    Store(#[from] StoreError),
    /// A stored state or item does not decode.
    #[error("the stored {what} is damaged")]
    Damaged {
        /// Which thing.
        what: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The lineage cannot be read.
    #[error("the releases cannot be read")]
    Publish(#[from] crate::publish::PublishError),
    /// The round does not take the update.
    #[error(transparent)]
    NotAdmitted(#[from] NotAdmitted),
}

impl DeskError {
    pub(super) fn damaged(
        what: impl Into<String>,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        Self::Damaged { what: what.into(), source: Box::new(source) }
    }
}

/// Queue of a round's accepted updates; sorts by round.
pub(crate) fn queue(round: RoundId) -> String {
    format!("update/{:020}", round.0)
}

pub(super) fn load(coord: &dyn Coord) -> Result<(Durable, u64), DeskError> {
    let Some(entry) = coord.head(LOG)? else { return Ok((Durable::default(), 0)) };
    let durable =
        postcard::from_bytes(&entry.value).map_err(|error| DeskError::damaged("round's state", error))?;
    Ok((durable, entry.sequence))
}

/// The stored state, for who only looks.
pub fn peek(coord: &dyn Coord) -> Result<(Rounds, Progress), DeskError> {
    let (durable, _) = load(coord)?;
    Ok((durable.rounds, durable.progress))
}

pub(crate) fn decode_accepted(bytes: &[u8]) -> Result<Accepted, DeskError> {
    let damaged = |error| DeskError::damaged("update's receipt", error);
    let (before, rest): ((Open, SignedReceipt), &[u8]) = postcard::take_from_bytes(bytes).map_err(damaged)?;
    // A round that was begun by an earlier version goes on: its items end here.
    let (norm, start) =
        if rest.is_empty() { (None, None) } else { postcard::from_bytes(rest).map_err(damaged)? };
    Ok(Accepted { open: before.0, receipt: before.1, norm, start })
}

#[cfg(test)]
mod tests {
    use commonweal_protocol::{BaseHash, DeviceId, DeviceReport, Digest, Receipt, SigningKey};

    use super::*;

    fn accepted(norm: Option<f64>) -> Accepted {
        let (round, device, digest) = (RoundId(3), DeviceId([1; 16]), Digest([2; 32]));
        let open = Open {
            round,
            base: BaseHash([9; 32]),
            digest,
            length: 5,
            samples: 7,
            report: DeviceReport::default(),
        };
        let receipt = Receipt { round, device, digest, length: 5, received_ms: 11 };
        let receipt = SignedReceipt::sign(&SigningKey::from_bytes(&[3; 32]), receipt).unwrap();
        Accepted { open, receipt, norm, start: norm.map(|_| Version(4)) }
    }

    #[test]
    fn items_are_read_back_also_those_of_a_version_that_kept_no_norm() {
        for norm in [None, Some(0.0), Some(12.5)] {
            let bytes = postcard::to_allocvec(&accepted(norm)).unwrap();
            assert_eq!(decode_accepted(&bytes).unwrap(), accepted(norm));
        }
        let Accepted { open, receipt, .. } = accepted(None);
        let before = postcard::to_allocvec(&(open, receipt)).unwrap();
        assert_eq!(decode_accepted(&before).unwrap(), accepted(None));
        assert!(decode_accepted(&before[..before.len() - 1]).is_err());
        assert!(decode_accepted(&[before, vec![1, 0]].concat()).is_err(), "half a norm");
    }
}
