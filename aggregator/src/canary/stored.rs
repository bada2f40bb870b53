//! The state of trials as it lies in the store, also as a program of before wrote it. Neighbours: `canary` is what is
//! read, `drive` writes it.

use commonweal_protocol::Version;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{Canary, Trial};
use crate::desk::DeskError;
use crate::store::Coord;

/// The log of the state; only its newest entry matters.
pub const LOG: &str = "canary";

/// The stored state and its place in the log; none before the first trial.
pub fn read(coord: &dyn Coord) -> Result<Option<(Canary, u64)>, DeskError> {
    let Some(entry) = coord.head(LOG)? else { return Ok(None) };
    let canary = whole::<Canary>(&entry.value)
        // A program of before wrote it, which knew less.
        .or_else(|error| whole::<Former>(&entry.value).map(Canary::from).map_err(|_| error))
        .map_err(|error| DeskError::damaged("state of trials", error))?;
    Ok(Some((canary, entry.sequence)))
}

/// All of the bytes, for the beginning of one form may be the whole of another.
fn whole<T: DeserializeOwned>(bytes: &[u8]) -> postcard::Result<T> {
    match postcard::take_from_bytes(bytes)? {
        (value, []) => Ok(value),
        _ => Err(postcard::Error::DeserializeBadEncoding),
    }
}

/// The state as it was before devices told what they cannot install.
#[derive(Serialize, Deserialize)]
struct Former {
    stable: Version,
    before: Vec<f32>,
    trial: Option<(Version, Option<Version>, u64, Vec<f32>)>,
    counted_round: u64,
    verdict: Option<String>,
    last: Option<(Version, bool, String, u64)>,
}

impl From<Former> for Canary {
    fn from(Former { stable, before, trial, counted_round, verdict, last }: Former) -> Self {
        let mut canary = Self { counted_round, ..Self::stable(stable) };
        if let Some((version, rolled_back, reason, ended_ms)) = last {
            // Since when it was on trial is not known, nor what was reported.
            canary.note_end(&Trial::new(version, ended_ms), version, rolled_back, reason, ended_ms);
        }
        let trial = trial.map(|(version, reported, since_ms, losses)| Trial {
            reported,
            losses,
            ..Trial::new(version, since_ms)
        });
        Self { before, trial, verdict, ..canary }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStorage;

    fn stored(bytes: &[u8]) -> Result<Option<(Canary, u64)>, DeskError> {
        let store = MemoryStorage::default();
        store.compare_and_set(LOG, 0, bytes).unwrap();
        read(&store)
    }

    #[test]
    fn a_state_of_before_is_read_and_no_part_of_one_is() {
        let before = |trial, counted_round, last| Former {
            stable: Version(4),
            before: vec![1.0, 2.0],
            trial,
            counted_round,
            verdict: Some("worse".into()),
            last,
        };
        let trial = Some((Version(5), Some(Version(5)), 8, vec![3.0; 3]));
        let last = Some((Version(3), true, "worse".to_owned(), 7));
        for trial in [None, trial] {
            for (round, last) in [(0, None), (9, None), (0, last.clone()), (9, last.clone())] {
                let bytes = postcard::to_allocvec(&before(trial.clone(), round, last.clone())).unwrap();
                let (canary, place) = stored(&bytes).unwrap().unwrap();
                assert_eq!((place, canary.stable, canary.counted_round), (1, Version(4), round));
                assert_eq!(canary.verdict.as_deref(), Some("worse"));
                let losses = canary.trial.as_ref().map(|trial| trial.losses.len());
                assert_eq!(losses, trial.as_ref().map(|trial| trial.3.len()));
                let ended = canary.ended.first().map(|ended| (ended.version, ended.rolled_back));
                assert_eq!(ended, last.as_ref().map(|_| (Version(3), true)));
                assert!(stored(&bytes[..bytes.len() - 1]).is_err());
            }
        }
        let canary = Canary { counted_word: 7, ..Canary::stable(Version(2)) };
        let bytes = postcard::to_allocvec(&canary).unwrap();
        assert_eq!(stored(&bytes).unwrap(), Some((canary, 1)));
        assert!(stored(&[bytes, vec![0]].concat()).is_err());
    }
}
