//! Makes a candidate the release: content-addressed bytes, a signature, and a compare-and-set of the head.
//!
//! After `evaluate`; devices learn of the head when they poll `receive`. A release is never changed and
//! versions only rise: a roll-back publishes an old adapter under a new version. It keeps the signature of the key that
//! was in force then; the keys that followed vouch for that one (`signer`).

use std::collections::BTreeSet;
use std::sync::Arc;

use commonweal_protocol::{
    BaseHash, Digest, KeyNumber, Release, ReportCard, RoundId, SignatureError, SignedRelease, Version,
};
use serde::{Deserialize, Serialize};

use crate::optimize::OptimizerState;
use crate::signer::Signer;
use crate::store::{Blob, Coord, PAGE_MAX, StoreError};

/// The log whose entries are the releases; entry `n` is version `n − 1`.
const LOG: &str = "release";

/// Why nothing was published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The store failed; ask again after looking.
    #[error("the release was not stored")]
    Store(#[from] StoreError),
    /// The release's own values are out of bounds.
    #[error("the release cannot be signed")]
    Sign(#[from] SignatureError),
    /// A stored release does not decode or is not ours.
    #[error("stored release {version}: expected one signed by this aggregator")]
    Corrupt {
        /// Its version.
        version: u64,
        /// What is wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The head is not the release that the candidate was made from.
    #[error("the head moved: expected release {expected}, got {found}")]
    Moved {
        /// The candidate's parent.
        expected: Version,
        /// The head.
        found: Version,
    },
    /// There is a release already.
    #[error("expected no release, got {found}")]
    NotFirst {
        /// The head.
        found: Version,
    },
    /// No such release.
    #[error("release {version} does not exist")]
    Unknown {
        /// The version asked for.
        version: Version,
    },
    /// A release of another base: its adapter does not fit this one, and must not be signed as if it did.
    #[error("release {version}: expected one of base {expected}, got one of base {got}")]
    OtherBase {
        /// The version asked for.
        version: Version,
        /// The base in force.
        expected: BaseHash,
        /// The release's.
        got: BaseHash,
    },
    /// A candidate that failed a gate has no way into a release.
    #[error("a candidate that failed a gate is not published")]
    GateFailed,
}

/// What is to be published.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The round that made it; none for the first release.
    pub round: Option<RoundId>,
    /// The release it was made from; none for the first.
    pub parent: Option<Version>,
    /// BLAKE3 of its file, which is stored.
    pub digest: Digest,
    /// What the server's optimizer remembers; its files are stored.
    pub state: OptimizerState,
    /// How it was measured.
    pub card: ReportCard,
}

/// What the log keeps of a release.
#[derive(Serialize, Deserialize)]
struct Entry {
    release: SignedRelease,
    state: OptimizerState,
}

/// The lineage of releases.
#[derive(Clone)]
pub struct Publisher {
    coord: Arc<dyn Coord>,
    blob: Arc<dyn Blob>,
    signer: Signer,
    base: BaseHash,
}

impl std::fmt::Debug for Publisher {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Publisher").field("base", &self.base).finish_non_exhaustive()
    }
}

impl Publisher {
    /// Whether there is any release, whoever signed it.
    pub fn is_any(coord: &dyn Coord) -> Result<bool, StoreError> {
        Ok(coord.head(LOG)?.is_some())
    }

    /// Releases of `base`, signed by the key that is in force when they are published.
    pub fn new(
        coord: Arc<dyn Coord>,
        blob: Arc<dyn Blob>,
        signer: impl Into<Signer>,
        base: BaseHash,
    ) -> Self {
        Self { coord, blob, signer: signer.into(), base }
    }

    /// The number of the key that a stored release was signed with.
    pub fn signed_with(&self, signed: &SignedRelease) -> Option<KeyNumber> {
        let keys = self.signer.keys();
        let place = keys.lineage().keys().position(|key| signed.verify(&key).is_ok())?;
        Some(KeyNumber(keys.lineage().number().0.saturating_sub(place as u64)))
    }

    /// The current release.
    pub fn head(&self) -> Result<Option<SignedRelease>, PublishError> {
        self.coord.head(LOG)?.map(|entry| Ok(self.decode(entry.sequence, &entry.value)?.release)).transpose()
    }

    /// One release.
    pub fn release(&self, version: Version) -> Result<SignedRelease, PublishError> {
        Ok(self.entry(version)?.release)
    }

    /// What the server's optimizer remembers of the steps up to a release.
    pub fn state(&self, version: Version) -> Result<OptimizerState, PublishError> {
        Ok(self.entry(version)?.state)
    }

    fn entry(&self, version: Version) -> Result<Entry, PublishError> {
        let sequence = version.0.saturating_add(1);
        match self.coord.scan(LOG, sequence, 1)?.first() {
            Some(entry) if entry.sequence == sequence => self.decode(sequence, &entry.value),
            _ => Err(PublishError::Unknown { version }),
        }
    }

    /// The releases from `version` upwards.
    pub fn history(&self, version: Version, limit: usize) -> Result<Vec<SignedRelease>, PublishError> {
        Ok(self.entries(version, limit)?.into_iter().map(|entry| entry.release).collect())
    }

    fn entries(&self, version: Version, limit: usize) -> Result<Vec<Entry>, PublishError> {
        self.coord
            .scan(LOG, version.0.saturating_add(1), limit)?
            .iter()
            .map(|entry| self.decode(entry.sequence, &entry.value))
            .collect()
    }

    /// Digests of the adapters of the newest `kept` releases.
    pub fn kept(&self, kept: u64) -> Result<BTreeSet<Digest>, PublishError> {
        Ok(self.newest(kept)?.iter().map(|entry| entry.release.release.digest).collect())
    }

    /// Digests of the files of the server's optimizer of the newest `kept` releases.
    pub fn kept_states(&self, kept: u64) -> Result<BTreeSet<Digest>, PublishError> {
        Ok(self.newest(kept)?.iter().flat_map(|entry| entry.state.digests()).collect())
    }

    fn newest(&self, kept: u64) -> Result<Vec<Entry>, PublishError> {
        let Some(head) = self.head()? else { return Ok(Vec::new()) };
        let oldest = (head.release.version.0 + 1).saturating_sub(kept);
        self.entries(Version(oldest), usize::try_from(kept).unwrap_or(usize::MAX))
    }

    /// Publishes a candidate. Doing it again for the same round gives the same release.
    pub fn publish(&self, candidate: Candidate, now_ms: u64) -> Result<SignedRelease, PublishError> {
        if !candidate.card.passed() {
            return Err(PublishError::GateFailed);
        }
        if let Some(published) = self.already(&candidate)? {
            return Ok(published);
        }
        let head = self.head()?;
        let version = match (&head, candidate.parent) {
            (None, None) => Version(0),
            (Some(head), Some(parent)) if head.release.version == parent => {
                Version(parent.0.saturating_add(1))
            }
            (Some(head), None) => return Err(PublishError::NotFirst { found: head.release.version }),
            (found, Some(parent)) => {
                return Err(PublishError::Moved {
                    expected: parent,
                    found: found.as_ref().map_or(Version(0), |head| head.release.version),
                });
            }
        };
        let same = candidate.clone();
        match self.append(version, candidate, now_ms) {
            // Another process may have published this very round in the same moment.
            Err(moved @ PublishError::Moved { .. }) => self.already(&same)?.ok_or(moved),
            published => published,
        }
    }

    /// The release that a round already made of its parent, however the head has moved since.
    fn already(&self, candidate: &Candidate) -> Result<Option<SignedRelease>, PublishError> {
        let (Some(_), Some(parent)) = (candidate.round, candidate.parent) else { return Ok(None) };
        let since = self.history(Version(parent.0.saturating_add(1)), PAGE_MAX)?;
        Ok(since.into_iter().find(|signed| signed.release.round == candidate.round))
    }

    /// Publishes the adapter of an earlier release of the same base again, as the newest version.
    pub fn roll_back(&self, to: Version, now_ms: u64) -> Result<SignedRelease, PublishError> {
        let head = self.head()?.ok_or(PublishError::Unknown { version: to })?;
        self.roll_back_behind(head.release.version, to, now_ms)
    }

    /// The same, right behind the release `head`; refused if another has been published since.
    pub fn roll_back_behind(
        &self,
        head: Version,
        to: Version,
        now_ms: u64,
    ) -> Result<SignedRelease, PublishError> {
        let Entry { release: SignedRelease { release: earlier, .. }, state } = self.entry(to)?;
        if earlier.base != self.base {
            return Err(PublishError::OtherBase { version: to, expected: self.base, got: earlier.base });
        }
        let version = Version(head.0.saturating_add(1));
        let candidate = Candidate {
            round: None,
            parent: Some(head),
            digest: earlier.digest,
            state,
            card: earlier.report_card,
        };
        self.append(version, candidate, now_ms)
    }

    fn append(
        &self,
        version: Version,
        candidate: Candidate,
        now_ms: u64,
    ) -> Result<SignedRelease, PublishError> {
        let length = self
            .blob
            .length(&candidate.digest)?
            .ok_or_else(|| StoreError::Missing { subject: format!("adapter {}", candidate.digest) })?;
        let release = Release {
            version,
            parent: candidate.parent,
            round: candidate.round,
            base: self.base,
            digest: candidate.digest,
            length,
            report_card: candidate.card,
            created_ms: now_ms,
        };
        let signed = SignedRelease::sign(self.signer.keys().signing(), release)?;
        let entry = Entry { release: signed, state: candidate.state };
        let bytes = postcard::to_allocvec(&entry)
            .map_err(|error| StoreError::not_done("encode", "release", error))?;
        match self.coord.compare_and_set(LOG, version.0, &bytes) {
            Ok(_) => Ok(entry.release),
            // It may have happened: the head tells.
            Err(error) if !error.is_determinate() => match self.head()? {
                Some(head) if head == entry.release => Ok(head),
                _ => Err(error.into()),
            },
            Err(StoreError::Conflict { expected, found, .. }) => Err(PublishError::Moved {
                expected: Version(expected.saturating_sub(1)),
                found: Version(found.saturating_sub(1)),
            }),
            Err(error) => Err(error.into()),
        }
    }

    fn decode(&self, sequence: u64, bytes: &[u8]) -> Result<Entry, PublishError> {
        let version = sequence.saturating_sub(1);
        let corrupt =
            |source: Box<dyn std::error::Error + Send + Sync>| PublishError::Corrupt { version, source };
        let entry: Entry = postcard::from_bytes(bytes).map_err(|error| corrupt(error.into()))?;
        if self.signed_with(&entry.release).is_none() {
            return Err(corrupt("no key of this aggregator has signed it".into()));
        }
        let found = entry.release.release.version;
        if found.0 != version {
            return Err(corrupt(format!("its version is {found}").into()));
        }
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Faults, MemoryStorage};
    use commonweal_protocol::{Direction, Gate, Metric, SigningKey};

    fn publisher(memory: &MemoryStorage) -> Publisher {
        let storage = memory.storage();
        Publisher::new(storage.coord, storage.blob, SigningKey::from_bytes(&[3; 32]), BaseHash([1; 32]))
    }

    fn stored(memory: &MemoryStorage, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        memory.put_if_absent(&digest, bytes.len() as u64, &mut &*bytes).unwrap();
        digest
    }

    fn candidate(round: u64, parent: u64, digest: Digest) -> Candidate {
        Candidate {
            round: Some(RoundId(round)),
            parent: Some(Version(parent)),
            digest,
            state: OptimizerState::default(),
            card: ReportCard::default(),
        }
    }

    fn first(memory: &MemoryStorage) -> (Publisher, Digest) {
        let publisher = publisher(memory);
        let digest = stored(memory, b"first");
        let (state, card) = (OptimizerState::default(), ReportCard::default());
        let first = Candidate { round: None, parent: None, digest, state, card };
        assert_eq!(publisher.publish(first, 1).unwrap().release.version, Version(0));
        (publisher, digest)
    }

    #[test]
    fn versions_rise_and_name_their_parent() {
        let memory = MemoryStorage::default();
        let (publisher, first) = first(&memory);
        let digest = stored(&memory, b"second");
        let second = publisher.publish(candidate(1, 0, digest), 2).unwrap();
        assert_eq!((second.release.version, second.release.parent), (Version(1), Some(Version(0))));
        assert_eq!(publisher.publish(candidate(1, 0, digest), 9).unwrap(), second, "once for each round");
        assert!(matches!(
            publisher.publish(candidate(2, 0, digest), 3),
            Err(PublishError::Moved { expected: Version(0), found: Version(1) })
        ));
        let back = publisher.roll_back(Version(0), 4).unwrap().release;
        assert_eq!((back.version, back.parent, back.digest), (Version(2), Some(Version(1)), first));
        assert_eq!(publisher.history(Version(0), 10).unwrap().len(), 3);
        assert!(matches!(publisher.roll_back(Version(9), 5), Err(PublishError::Unknown { .. })));
        // Whoever decided on it before this one was published takes nothing from it.
        let late = publisher.roll_back_behind(Version(back.version.0 - 1), Version(0), 5);
        assert!(matches!(late, Err(PublishError::Moved { .. })), "{late:?}");
    }

    #[test]
    fn a_roll_back_does_not_cross_a_change_of_base() {
        let memory = MemoryStorage::default();
        let (_, _) = first(&memory);
        let storage = memory.storage();
        let other = BaseHash([2; 32]);
        let publisher = Publisher::new(storage.coord, storage.blob, SigningKey::from_bytes(&[3; 32]), other);
        publisher.publish(candidate(1, 0, stored(&memory, b"second")), 2).unwrap();
        let error = publisher.roll_back(Version(0), 3).unwrap_err();
        assert!(error.to_string().contains(&other.to_string()), "{error}");
        assert!(matches!(error, PublishError::OtherBase { version: Version(0), .. }), "{error}");
        assert_eq!(publisher.head().unwrap().unwrap().release.version, Version(1), "nothing was published");
        publisher.roll_back(Version(1), 4).unwrap();
    }

    #[test]
    fn a_round_that_was_published_and_rolled_back_before_it_was_recorded_is_published() {
        let memory = MemoryStorage::default();
        let (publisher, _) = first(&memory);
        let digest = stored(&memory, b"second");
        let second = publisher.publish(candidate(1, 0, digest), 2).unwrap();
        publisher.roll_back(Version(0), 3).unwrap();
        assert_eq!(publisher.publish(candidate(1, 0, digest), 4).unwrap(), second);
        assert_eq!(publisher.head().unwrap().unwrap().release.version, Version(2), "the roll-back stays");
    }

    #[test]
    fn what_failed_a_gate_is_never_published() {
        let memory = MemoryStorage::default();
        let (publisher, digest) = first(&memory);
        let mut failed = candidate(1, 0, digest);
        failed.card.gates = vec![Gate::judge(Metric::SafeRate, Direction::AtLeast, 0.9, 0.5)];
        assert!(matches!(publisher.publish(failed, 2), Err(PublishError::GateFailed)));
        assert_eq!(publisher.head().unwrap().unwrap().release.version, Version(0));
    }

    #[test]
    fn an_adapter_that_is_not_stored_is_not_published() {
        let memory = MemoryStorage::default();
        let (publisher, _) = first(&memory);
        let error = publisher.publish(candidate(1, 0, Digest([9; 32])), 2).unwrap_err();
        assert!(matches!(error, PublishError::Store(StoreError::Missing { .. })), "{error}");
    }

    #[test]
    fn unsure_writes_end_in_one_release_for_each_round() {
        let memory = MemoryStorage::default();
        let (publisher, digest) = first(&memory);
        memory.inject(5, Faults { determinate: 0.3, indeterminate: 0.4 });
        for round in 1..=50 {
            while publisher.publish(candidate(round, round - 1, digest), round).is_err() {}
        }
        let history = publisher.history(Version(0), 100).unwrap();
        let rounds: Vec<_> = history.iter().filter_map(|signed| signed.release.round).collect();
        assert_eq!(rounds, (1..=50).map(RoundId).collect::<Vec<_>>());
    }

    #[test]
    fn a_release_of_another_key_is_refused() {
        let memory = MemoryStorage::default();
        first(&memory);
        let storage = memory.storage();
        let other =
            Publisher::new(storage.coord, storage.blob, SigningKey::from_bytes(&[4; 32]), BaseHash([1; 32]));
        assert!(matches!(other.head(), Err(PublishError::Corrupt { version: 0, .. })));
    }
}
