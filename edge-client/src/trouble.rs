//! A release that this device was offered and cannot install: what stood in the way, for the aggregator to hear with the
//! next poll, and so that its bytes are not fetched again at every visit.
//!
//! Of `pipeline.rs`; the reasons are of `install.rs`. `trouble.json` holds numbers and one of a few words, and is not
//! sealed. It goes when a release as new is installed; after an hour the same one is tried again, for what was wrong may
//! have been here.

use std::io::ErrorKind;

use commonweal_protocol::{Digest, Fault, Refusal, Trouble, Version};
use commonweal_transport::LinkError;
use serde::{Deserialize, Serialize};

use crate::{
    install::InstallError,
    store::{Store, StoreError},
};

const FILE: &str = "trouble.json";
/// A release that could not be installed is tried again so late.
const AGAIN_MS: u64 = 3_600_000;

/// What is noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Noted {
    version: Version,
    digest: Digest,
    fault: Fault,
    /// In milliseconds since 1970.
    at_ms: u64,
}

impl Noted {
    /// As the aggregator is told.
    pub(crate) fn trouble(self) -> Trouble {
        Trouble { version: self.version, fault: self.fault }
    }

    /// Whether it is of this release, which need not be tried again yet. Whether there is room is asked before any byte
    /// is moved, and may be each time.
    pub(crate) fn is_of(self, version: Version, digest: Digest, now_ms: u64) -> bool {
        let is_it = (self.version, self.digest) == (version, digest);
        is_it && self.fault != Fault::Room && now_ms.abs_diff(self.at_ms) < AGAIN_MS
    }
}

/// What stood in the way, if it was the release and not the network.
fn fault_of(error: &InstallError) -> Option<Fault> {
    match error {
        InstallError::Signature { .. } => Some(Fault::Signature),
        InstallError::Base { .. } => Some(Fault::Base),
        InstallError::Adapter { .. } | InstallError::Fetch { source: LinkError::Corrupt { .. }, .. } => {
            Some(Fault::Damaged)
        }
        InstallError::Layout { .. } => Some(Fault::Layout),
        InstallError::Fetch {
            source: LinkError::Refused { reason: Refusal::ContentUnknown, .. }, ..
        } => Some(Fault::Missing),
        InstallError::Store(StoreError::OverBudget { .. }) => Some(Fault::Room),
        InstallError::Store(StoreError::Io { source, .. }) => {
            let is_full = matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
            is_full.then_some(Fault::Room)
        }
        InstallError::Fetch { .. } | InstallError::NotNewer { .. } | InstallError::Store(_) => None,
    }
}

/// Notes why a release could not be installed; false if the release is not why.
pub(crate) fn note(
    store: &Store,
    version: Version,
    digest: Digest,
    error: &InstallError,
    now_ms: u64,
) -> Result<bool, StoreError> {
    let Some(fault) = fault_of(error) else { return Ok(false) };
    let noted = Noted { version, digest, fault, at_ms: now_ms };
    let bytes = serde_json::to_vec(&noted).map_err(|error| StoreError::Damaged {
        path: store.path(FILE),
        reason: format!("it does not encode: {error}"),
    })?;
    store.write(FILE, &bytes)?;
    Ok(true)
}

/// What another federation's release was, this one's aggregator is not told.
pub(crate) fn forget(store: &Store) -> Result<(), StoreError> {
    store.remove(FILE)
}

/// What is noted; nothing of a release that one as new as it has taken the place of. A damaged file is as good as none.
pub(crate) fn noted(store: &Store, installed: Option<Version>) -> Result<Option<Noted>, StoreError> {
    let Some(bytes) = store.read(FILE)? else { return Ok(None) };
    let noted = serde_json::from_slice::<Noted>(&bytes);
    let noted = noted.inspect_err(|error| tracing::warn!("{FILE} is passed over: {error}")).ok();
    let noted = noted.filter(|noted| installed.is_none_or(|installed| installed < noted.version));
    if noted.is_none() {
        store.remove(FILE)?;
    }
    Ok(noted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_is_noted_until_the_release_is_overtaken_or_an_hour_is_over() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let (version, digest) = (Version(3), Digest([1; 32]));
        let unreachable = LinkError::Stalled { during: "downloading", stall_ms: 1 };
        let unreachable = InstallError::Fetch { digest, source: unreachable };
        assert!(!note(&store, version, digest, &unreachable, 0).unwrap());
        assert_eq!(noted(&store, None).unwrap(), None, "the network is nobody's fault");
        let source = LinkError::Corrupt { expected: digest, got: Digest([2; 32]) };
        assert!(note(&store, version, digest, &InstallError::Fetch { digest, source }, 10).unwrap());
        let told = noted(&store, Some(Version(2))).unwrap().unwrap();
        assert_eq!(told.trouble(), Trouble { version, fault: Fault::Damaged });
        let is_of = |now_ms| told.is_of(version, digest, now_ms);
        assert!(is_of(0) && is_of(AGAIN_MS) && !is_of(AGAIN_MS + 10));
        assert!(!told.is_of(version, Digest([2; 32]), 10) && !told.is_of(Version(4), digest, 10));
        assert_eq!(noted(&store, Some(Version(3))).unwrap(), None);
        assert!(!store.exists(FILE));
        store.write(FILE, b"{").unwrap();
        assert_eq!(noted(&store, None).unwrap(), None);
    }

    #[test]
    fn want_of_room_is_told_and_tried_again_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let (version, digest) = (Version(3), Digest([1; 32]));
        let full = |kind: ErrorKind| {
            InstallError::Store(StoreError::Io { action: "write", path: "x".into(), source: kind.into() })
        };
        assert!(!note(&store, version, digest, &full(ErrorKind::PermissionDenied), 0).unwrap());
        assert!(note(&store, version, digest, &full(ErrorKind::StorageFull), 0).unwrap());
        let told = noted(&store, None).unwrap().unwrap();
        assert_eq!(told.trouble().fault, Fault::Room);
        assert!(!told.is_of(version, digest, 0));
        forget(&store).unwrap();
        assert_eq!(noted(&store, None).unwrap(), None);
    }
}
