//! Whose word the device takes: the key that signed for the aggregator when the device enrolled, and those that followed
//! it, each signed for by the one before.
//!
//! `pipeline.rs` has each poll's steps followed before it uses what else came; `install.rs`, `control.rs` and `upload.rs`
//! check by the key in force and by no other: a retired one may be in other hands. A key is on disk before anything is
//! checked by it, so the device never goes back to one that it has left.

use std::sync::{Arc, PoisonError, RwLock};

use commonweal_protocol::{
    AggregatorKey, DeviceId, KeyNumber, Lineage, SignedReceipt, SignedSuccession, SuccessionError,
};
use commonweal_transport::Credentials;
use serde::{Deserialize, Serialize};

use crate::store::{Store, StoreError};

/// Beside the credentials, which have the key that it begins with.
pub(crate) const FILE: &str = "identity/succession.json";

/// Why the aggregator's newer key is not taken.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The chain does not hold. It may be an impostor's, or the aggregator's own after its state was lost; whose it is must
    /// be learned from the operator, and then the device enrols anew.
    #[error("the aggregator's new signing key is not the word of the one before")]
    Succession(#[from] SuccessionError),
    /// It could not be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// As it is kept: the enrolment, which its device's name tells from every other, its key, and what followed.
#[derive(Serialize, Deserialize)]
struct Kept {
    device: DeviceId,
    number: KeyNumber,
    key: AggregatorKey,
    steps: Vec<SignedSuccession>,
}

/// What an enrolment before the one that is on disk followed says nothing any more, and may be damaged.
pub(crate) fn forget(store: &Store) -> Result<(), StoreError> {
    store.remove(FILE)
}

/// See the module. Clones share what is followed.
#[derive(Clone, Debug)]
pub struct Trust {
    device: DeviceId,
    lineage: Arc<RwLock<Lineage>>,
}

impl Trust {
    /// Of a device that has just enrolled.
    pub fn new(device: DeviceId, lineage: Lineage) -> Self {
        Self { device, lineage: Arc::new(RwLock::new(lineage)) }
    }

    /// What the device has followed since it enrolled with these credentials.
    pub fn open(store: &Store, credentials: &Credentials) -> Result<Self, StoreError> {
        Self::read(store, credentials.device(), credentials.lineage())
    }

    pub(crate) fn read(store: &Store, device: DeviceId, mut lineage: Lineage) -> Result<Self, StoreError> {
        let Some(bytes) = store.read(FILE)? else { return Ok(Self::new(device, lineage)) };
        let damaged = |reason: String| StoreError::Damaged { path: store.path(FILE), reason };
        let kept: Kept = serde_json::from_slice(&bytes)
            .map_err(|error| damaged(format!("expected a chain of keys: {error}")))?;
        // What an enrolment before this one followed says nothing here.
        if (kept.device, kept.number, kept.key) == (device, lineage.first_number(), lineage.first()) {
            lineage.follow(&kept.steps).map_err(|error| damaged(error.to_string()))?;
        }
        Ok(Self::new(device, lineage))
    }

    /// The key in force.
    pub fn key(&self) -> AggregatorKey {
        self.held().key()
    }

    /// Its number.
    pub fn number(&self) -> KeyNumber {
        self.held().number()
    }

    /// The key that the device enrolled with: it names the aggregator, whatever key signs for it now.
    pub fn first(&self) -> AggregatorKey {
        self.held().first()
    }

    /// Whether this is one of the keys that signed for the aggregator.
    pub fn knows(&self, key: &AggregatorKey) -> bool {
        self.held().keys().any(|known| known == *key)
    }

    /// Whether a receipt on disk is the aggregator's: it counts as it did when it came, whatever key signs now.
    pub fn has_signed(&self, receipt: &SignedReceipt) -> bool {
        self.held().keys().any(|key| receipt.verify(&key).is_ok())
    }

    /// Goes by these steps, durably before it counts. Whether there was one.
    pub fn follow(&self, store: &Store, steps: &[SignedSuccession]) -> Result<bool, TrustError> {
        if steps.is_empty() {
            return Ok(false);
        }
        let mut lineage = self.held();
        lineage.follow(steps)?;
        let kept = Kept {
            device: self.device,
            number: lineage.first_number(),
            key: lineage.first(),
            steps: lineage.steps().to_vec(),
        };
        let bytes = serde_json::to_vec(&kept)
            .map_err(|error| StoreError::Damaged { path: store.path(FILE), reason: error.to_string() })?;
        store.write(FILE, &bytes)?;
        *self.lineage.write().unwrap_or_else(PoisonError::into_inner) = lineage;
        Ok(true)
    }

    fn held(&self) -> Lineage {
        self.lineage.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use commonweal_protocol::SigningKey;

    const DEVICE: DeviceId = DeviceId([1; 16]);
    const OTHER: DeviceId = DeviceId([2; 16]);

    fn secret(seed: u8) -> SigningKey {
        SigningKey::from_bytes(&[seed; 32])
    }

    fn public(seed: u8) -> AggregatorKey {
        AggregatorKey::of(&secret(seed))
    }

    fn steps(rotations: u8) -> Vec<SignedSuccession> {
        let mut lineage = Lineage::new(KeyNumber(0), public(0));
        for seed in 0..rotations {
            lineage.succeed(&secret(seed), public(seed + 1), 1).unwrap();
        }
        lineage.steps().to_vec()
    }

    fn enrolled() -> Lineage {
        Lineage::new(KeyNumber(0), public(0))
    }

    #[test]
    fn what_was_followed_is_there_at_the_next_start() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let trust = Trust::read(&store, DEVICE, enrolled()).unwrap();
        let shared = trust.clone();
        assert!(trust.follow(&store, &steps(2)).unwrap());
        assert!(!trust.follow(&store, &[]).unwrap());
        let again = Trust::read(&store, DEVICE, enrolled()).unwrap();
        for trust in [trust, shared, again] {
            assert_eq!((trust.number(), trust.key(), trust.first()), (KeyNumber(2), public(2), public(0)));
            assert!(trust.knows(&public(1)) && !trust.knows(&public(3)));
        }
        // Enrolled anew, perhaps because what was followed was an impostor's.
        assert_eq!(Trust::read(&store, OTHER, enrolled()).unwrap().number(), KeyNumber(0));
        // With the key that is in force then.
        let anew = Lineage::new(KeyNumber(2), public(2));
        let trust = Trust::read(&store, OTHER, anew.clone()).unwrap();
        assert_eq!((trust.number(), trust.knows(&public(1))), (KeyNumber(2), false));
        trust.follow(&store, &steps(3)[2..]).unwrap();
        assert_eq!(Trust::read(&store, OTHER, anew).unwrap().key(), public(3));
    }

    #[test]
    fn what_cannot_be_kept_or_does_not_hold_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let trust = Trust::read(&store, DEVICE, enrolled()).unwrap();
        trust.follow(&store, &steps(1)).unwrap();
        let error = trust.follow(&store, &steps(3)[2..]).unwrap_err();
        assert!(matches!(error, TrustError::Succession(SuccessionError::Order { .. })), "{error}");
        // A folder where the file is to be: it cannot be replaced.
        std::fs::remove_file(store.path(FILE)).unwrap();
        std::fs::create_dir(store.path(FILE)).unwrap();
        let error = trust.follow(&store, &steps(2)[1..]).unwrap_err();
        assert!(matches!(error, TrustError::Store(_)), "{error}");
        assert_eq!((trust.number(), trust.key()), (KeyNumber(1), public(1)));
    }

    /// To begin again with the first key would be to trust one that was left, perhaps because it was stolen.
    #[test]
    fn a_damaged_file_is_an_error_and_no_way_back() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let trust = Trust::read(&store, DEVICE, enrolled()).unwrap();
        trust.follow(&store, &steps(2)).unwrap();
        let text = String::from_utf8(store.read(FILE).unwrap().unwrap()).unwrap();
        let number = text.replacen("\"number\":2", "\"number\":3", 1);
        for damaged in [&text[..text.len() / 2], "", number.as_str()] {
            store.write(FILE, damaged.as_bytes()).unwrap();
            let error = Trust::read(&store, DEVICE, enrolled()).unwrap_err();
            assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
        }
    }
}
