//! That a device cannot install a release, and roughly why: it comes with the device's polls, until a release as new is
//! installed. Neighbours: `task` carries it; the aggregator holds it against a release on trial.

use crate::Version;
use serde::{Deserialize, Serialize};

/// What stood in the way. Coarse, and nothing of the device's own words: the device's log has those.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, thiserror::Error,
)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// Not signed by the key that signs for the aggregator.
    #[error("its signature does not hold")]
    Signature,
    /// For another frozen base.
    #[error("it is for another base")]
    Base,
    /// The bytes are not those of its digest, or no adapter.
    #[error("its bytes are damaged")]
    Damaged,
    /// An adapter of another shape.
    #[error("its shape is not the package's")]
    Layout,
    /// Its bytes are not to be had.
    #[error("its bytes are not to be had")]
    Missing,
    /// The device has no room for it.
    #[error("there is no room for it")]
    Room,
}

/// A release that a device was offered and cannot install.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// The release.
    pub version: Version,
    /// Why.
    pub fault: Fault,
}
