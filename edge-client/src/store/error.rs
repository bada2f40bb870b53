//! Why the device's directory cannot be used. Of `store.rs`.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{keys::KeyError, seal::SealError, units::Bytes};

/// Why the device's directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk refused.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// The cause: permission, no space left, …
        #[source]
        source: io::Error,
    },
    /// The directory itself cannot be made.
    #[error("state directory cannot be used: cannot create {path}")]
    Directory {
        /// Where.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// More than a device keeps.
    #[error("{folder} would hold {got} bytes, expected at most {max}")]
    Full {
        /// Which part.
        folder: PathBuf,
        /// Most bytes.
        max: u64,
        /// With what was to be added.
        got: u64,
    },
    /// More than the owner lets the directory hold.
    #[error(
        "{path} needs {more}, and {used} of the {max} that [budget] disk in policy.toml allows {directory} are used"
    )]
    OverBudget {
        /// What was to be written.
        path: PathBuf,
        /// Its bytes.
        more: Bytes,
        /// The whole directory's.
        used: Bytes,
        /// Most of those.
        max: Bytes,
        /// The state directory.
        directory: PathBuf,
    },
    /// Another process works in it.
    #[error("{0} is in use by another edge-client")]
    Locked(PathBuf),
    /// A sealed file does not open.
    #[error("{path} cannot be opened: {source}")]
    Sealed {
        /// Which.
        path: PathBuf,
        /// Why.
        source: SealError,
    },
    /// What the directory was sealed with is not there.
    #[error(
        "the key of {directory} is missing: expected {place}; if it lies elsewhere, --store-key names its place; if it is lost, nothing here can be opened, and `edge-client forget --all` starts anew"
    )]
    KeyLost {
        /// The state directory.
        directory: PathBuf,
        /// Where the key was looked for.
        place: String,
    },
    /// The directory was sealed with another key.
    #[error("{place} is not the key of {directory}: its file `sealed` does not open: {source}")]
    KeyWrong {
        /// The state directory.
        directory: PathBuf,
        /// The key's place.
        place: String,
        /// Why.
        source: SealError,
    },
    /// The key cannot be had.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A file of ours does not parse.
    #[error("{path} is damaged: {reason}")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What was expected.
        reason: String,
    },
}

/// Adds the action and the path to an I/O error.
pub(crate) fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { action, path, source }
}

impl StoreError {
    /// Whether there was no room: by the owner's budget, or on the disk itself.
    pub fn is_want_of_room(&self) -> bool {
        match self {
            Self::OverBudget { .. } => true,
            Self::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            _ => false,
        }
    }
}
