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
    /// Counts who drove, where several may: whoever takes the lead begins another.
    pub(super) term: u64,
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
    /// What the device announced; kept without its trace, which is told when the update is taken and not needed after.
    #[serde(with = "untraced")]
    pub open: Open,
    /// What it was answered, to be repeated word for word.
    pub receipt: SignedReceipt,
    /// Euclidean norm of the update, so that the merge need not decode it for that; none in an item of version 0.1.
    pub norm: Option<f64>,
    /// The release that it was trained from; noted when it is taken.
    pub start: Option<Version>,
    /// When the device began to bring it, as far as this process knows; not kept.
    #[serde(skip)]
    pub opened_ms: Option<u64>,
}

/// An announcement as it was stored before there were traces.
mod untraced {
    use commonweal_protocol::{BaseHash, DeviceReport, Digest, Open, RoundId};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    type Stored = (RoundId, BaseHash, Digest, u64, u32, DeviceReport);

    pub(super) fn serialize<S: Serializer>(open: &Open, serializer: S) -> Result<S::Ok, S::Error> {
        (open.round, open.base, open.digest, open.length, open.samples, open.report).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Open, D::Error> {
        let (round, base, digest, length, samples, report) = Stored::deserialize(deserializer)?;
        Ok(Open { round, base, digest, length, samples, report, trace: None })
    }
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
    /// The state is of another version of this program.
    #[error(
        "the stored round's state is of another version of aggregator: expected it to begin with {FORM:02x?}, got \
         {begins:02x?}; docs/operations.md says how to upgrade"
    )]
    Version {
        /// Its first bytes.
        begins: Vec<u8>,
    },
    /// No update comes in at this moment.
    #[error("updates are not taken at this moment")]
    Shut,
    /// Bytes may still be deleted by a sweep that was begun before.
    #[error("a sweep that did not come to its end may still be under way")]
    Swept,
    /// Another process has taken the lead since this one did.
    #[error("another process has taken the lead")]
    Superseded,
    /// Other processes were faster, again and again.
    #[error("other processes moved the round's state each time that it was to be moved")]
    Contended,
    /// The round does not take the update.
    #[error(transparent)]
    NotAdmitted(#[from] NotAdmitted),
}

impl DeskError {
    pub(crate) fn damaged(
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

/// Begins the stored state. A state of before version 0.2 of the store has none, and begins with a byte below 16.
const FORM: [u8; 2] = [0xC7, 3];
/// The same without a term; still read, as of term 0.
const TERMLESS: [u8; 2] = [0xC7, 2];

pub(super) fn load(coord: &dyn Coord) -> Result<(Durable, u64), DeskError> {
    let Some(entry) = coord.head(LOG)? else { return Ok((Durable::default(), 0)) };
    let durable =
        match entry.value.split_first_chunk() {
            Some((&FORM, value)) => postcard::from_bytes(value),
            Some((&TERMLESS, value)) => postcard::from_bytes(value)
                .map(|(rounds, progress, control)| Durable { rounds, progress, control, term: 0 }),
            _ => {
                return Err(DeskError::Version {
                    begins: entry.value.iter().take(FORM.len()).copied().collect(),
                });
            }
        };
    Ok((durable.map_err(|error| DeskError::damaged("round's state", error))?, entry.sequence))
}

pub(super) fn encode(durable: &Durable) -> Result<Vec<u8>, DeskError> {
    postcard::to_extend(durable, FORM.to_vec()).map_err(|error| DeskError::damaged("round's state", error))
}

/// The stored state, for who only looks.
pub fn peek(coord: &dyn Coord) -> Result<(Rounds, Progress), DeskError> {
    let (durable, _) = load(coord)?;
    Ok((durable.rounds, durable.progress))
}

pub(crate) fn decode_accepted(bytes: &[u8]) -> Result<Accepted, DeskError> {
    postcard::from_bytes(bytes).map_err(|error| DeskError::damaged("update's receipt", error))
}

#[cfg(test)]
mod tests {
    use commonweal_protocol::{BaseHash, DeviceId, DeviceReport, Digest, Receipt, SigningKey, TraceContext};

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
            trace: None,
        };
        let receipt = Receipt { round, device, digest, length: 5, received_ms: 11 };
        let receipt = SignedReceipt::sign(&SigningKey::from_bytes(&[3; 32]), receipt).unwrap();
        Accepted { open, receipt, norm, start: norm.map(|_| Version(4)), opened_ms: None }
    }

    #[test]
    fn items_are_read_back() {
        for norm in [None, Some(0.0), Some(12.5)] {
            let bytes = postcard::to_allocvec(&accepted(norm)).unwrap();
            assert_eq!(decode_accepted(&bytes).unwrap(), accepted(norm));
            assert!(decode_accepted(&bytes[..bytes.len() - 1]).is_err());
        }
    }

    /// Items of before there were traces are the same bytes.
    #[test]
    fn an_item_is_kept_without_its_trace() {
        let before = accepted(Some(1.5));
        let trace = Some(TraceContext { trace: [5; 16], span: [6; 8] });
        let after = Accepted { open: Open { trace, ..before.open }, opened_ms: Some(7), ..before.clone() };
        let bytes = postcard::to_allocvec(&after).unwrap();
        assert_eq!(bytes, postcard::to_allocvec(&before).unwrap());
        assert_eq!(decode_accepted(&bytes).unwrap(), before);
        let Open { round, base, digest, length, samples, report, .. } = before.open;
        let fields =
            (round, base, digest, length, samples, report, before.receipt, before.norm, before.start);
        assert_eq!(bytes, postcard::to_allocvec(&fields).unwrap());
    }

    #[test]
    fn a_state_of_another_version_is_refused_by_name() {
        let coord = crate::store::MemoryStorage::default().storage().coord;
        assert_eq!(load(coord.as_ref()).unwrap(), (Durable::default(), 0));
        coord.compare_and_set(LOG, 0, &encode(&Durable::default()).unwrap()).unwrap();
        assert_eq!(load(coord.as_ref()).unwrap(), (Durable::default(), 1));
        let before = postcard::to_allocvec(&Durable::default()).unwrap();
        coord.compare_and_set(LOG, 1, &before).unwrap();
        assert!(matches!(load(coord.as_ref()), Err(DeskError::Version { .. })));
    }

    #[test]
    fn a_state_without_a_term_is_read() {
        let coord = crate::store::MemoryStorage::default().storage().coord;
        let mut durable = Durable::default();
        durable.progress.seconds.insert("merge".to_owned(), 1.5);
        let fields = (&durable.rounds, &durable.progress, &durable.control);
        let before = postcard::to_extend(&fields, TERMLESS.to_vec()).unwrap();
        coord.compare_and_set(LOG, 0, &before).unwrap();
        assert_eq!(load(coord.as_ref()).unwrap(), (durable.clone(), 1));
        durable.term = 7;
        coord.compare_and_set(LOG, 1, &encode(&durable).unwrap()).unwrap();
        assert_eq!(load(coord.as_ref()).unwrap(), (durable, 2));
    }
}
