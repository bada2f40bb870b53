//! A release that this device was offered and cannot install: what stood in the way, for the aggregator to hear with the
//! next poll and the owner from `status`, and so that its bytes are not fetched again at every visit.
//!
//! Of `pipeline.rs` and `cli/status.rs`; the reasons are of `install.rs`. `trouble.json` holds numbers and one of a few words, and is not
//! sealed. After an hour the same release is tried again, for what was wrong may have been here.

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
/// Of the newest so many: a round may start from another release than the one that is offered.
const NOTED_MAX: usize = 4;

/// A release, and what was wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Noted {
    version: Version,
    digest: Digest,
    fault: Fault,
    /// In milliseconds since 1970.
    at_ms: u64,
}

impl Noted {
    /// As its owner is told.
    pub(crate) fn sentence(&self, now_ms: u64) -> String {
        let Self { version, fault, .. } = self;
        let again = match self.again_ms(now_ms).div_ceil(60_000) {
            0 => "at the next visit".to_owned(),
            1 => "in a minute at the earliest".to_owned(),
            minutes => format!("in {minutes} minutes at the earliest"),
        };
        format!("release {version} cannot be installed: {fault}; tried again {again}")
    }

    /// How long it is not tried again. Whether there is room is asked before any byte is moved, and may be each time.
    pub(crate) fn again_ms(&self, now_ms: u64) -> u64 {
        match self.fault {
            Fault::Room => 0,
            _ => AGAIN_MS.saturating_sub(now_ms.abs_diff(self.at_ms)),
        }
    }
}

/// What is noted; the newest last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Troubles(Vec<Noted>);

impl Troubles {
    /// The newest release that none as new was installed in place of.
    pub(crate) fn newest(&self, installed: Option<Version>) -> Option<&Noted> {
        let open = self.0.iter().filter(|noted| installed.is_none_or(|installed| installed < noted.version));
        open.max_by_key(|noted| noted.version)
    }

    /// The same, as the aggregator is told.
    pub(crate) fn told(&self, installed: Option<Version>) -> Option<Trouble> {
        self.newest(installed).map(|noted| Trouble { version: noted.version, fault: noted.fault })
    }

    /// Whether this release is one of them, and need not be tried again yet; also of one that an earlier or a later one took
    /// the place of, from which a round may start.
    pub(crate) fn are_of(&self, version: Version, digest: Digest, now_ms: u64) -> bool {
        self.0
            .iter()
            .any(|noted| (noted.version, noted.digest) == (version, digest) && noted.again_ms(now_ms) > 0)
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
        InstallError::Store(error) if error.is_want_of_room() => Some(Fault::Room),
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
    let Troubles(mut all) = noted(store)?;
    all.retain(|noted| noted.version != version);
    all.push(Noted { version, digest, fault, at_ms: now_ms });
    let newest = all.split_off(all.len().saturating_sub(NOTED_MAX));
    let bytes = serde_json::to_vec(&Troubles(newest)).map_err(|error| StoreError::Damaged {
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

/// What is noted. A damaged file is as good as none.
pub(crate) fn noted(store: &Store) -> Result<Troubles, StoreError> {
    let Some(bytes) = store.read(FILE)? else { return Ok(Troubles::default()) };
    match serde_json::from_slice(&bytes) {
        Ok(Troubles(all)) if all.len() <= NOTED_MAX => Ok(Troubles(all)),
        read => {
            tracing::warn!("{FILE} is passed over: {:?}", read.err());
            store.remove(FILE)?;
            Ok(Troubles::default())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;

    fn damaged(digest: Digest) -> InstallError {
        let source = LinkError::Corrupt { expected: digest, got: Digest([0; 32]) };
        InstallError::Fetch { digest, source }
    }

    #[test]
    fn trouble_is_told_until_the_release_is_overtaken_and_not_tried_again_for_an_hour() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let (version, digest) = (Version(3), Digest([1; 32]));
        let unreachable = LinkError::Stalled { during: "downloading", stall_ms: 1 };
        let unreachable = InstallError::Fetch { digest, source: unreachable };
        assert!(!note(&store, version, digest, &unreachable, 0).unwrap());
        assert_eq!(noted(&store).unwrap(), Troubles::default(), "the network is nobody's fault");
        assert!(note(&store, version, digest, &damaged(digest), 10).unwrap());
        let troubles = noted(&store).unwrap();
        assert_eq!(troubles.told(Some(Version(2))), Some(Trouble { version, fault: Fault::Damaged }));
        assert_eq!(troubles.told(Some(version)), None);
        let are_of = |now_ms| troubles.are_of(version, digest, now_ms);
        assert!(are_of(0) && are_of(AGAIN_MS) && !are_of(AGAIN_MS + 10));
        let told = |now_ms| troubles.newest(None).unwrap().sentence(now_ms);
        assert_eq!(
            told(10),
            "release 3 cannot be installed: its bytes are damaged; tried again in 60 minutes at the earliest"
        );
        assert!(told(AGAIN_MS).ends_with("in a minute at the earliest"), "{}", told(AGAIN_MS));
        assert!(told(AGAIN_MS + 10).ends_with("at the next visit"), "{}", told(AGAIN_MS + 10));
        assert!(!troubles.are_of(version, Digest([2; 32]), 10) && !troubles.are_of(Version(4), digest, 10));
        store.write(FILE, b"{").unwrap();
        assert_eq!(noted(&store).unwrap(), Troubles::default());
        assert!(!store.exists(FILE));
    }

    #[test]
    fn the_newest_few_are_noted_and_the_newest_of_them_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let digest = |number: u64| Digest([number as u8; 32]);
        for number in [9, 2, 3, 4, 5, 9, 8] {
            note(&store, Version(number), digest(number), &damaged(digest(number)), 0).unwrap();
        }
        let troubles = noted(&store).unwrap();
        let are_of = |number: u64| troubles.are_of(Version(number), digest(number), 0);
        assert_eq!([2, 3, 4, 5, 8, 9].map(are_of), [false, false, true, true, true, true]);
        assert_eq!(troubles.told(None).unwrap().version, Version(9));
        assert_eq!(troubles.told(Some(Version(9))), None);
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
        let troubles = noted(&store).unwrap();
        assert_eq!(troubles.told(None).unwrap().fault, Fault::Room);
        assert!(!troubles.are_of(version, digest, 0));
        forget(&store).unwrap();
        assert_eq!(noted(&store).unwrap(), Troubles::default());
    }
}
