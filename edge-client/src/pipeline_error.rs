//! Why a round stopped: one cause a stage, for `pipeline.rs` and the exit codes of the command line.

use std::error::Error;

use commonweal_protocol::{BaseHash, ReconnectWindow, Refusal, Version};
use commonweal_runtime::MemoryError;
use commonweal_safety::{GuardError, ReviseError};
use commonweal_transport::{LinkError, PutOff};

use crate::{
    compress::PackError,
    control::ControlError,
    install::InstallError,
    store::{Store, StoreError},
    train::TrainingError,
    trust::TrustError,
    upload::UploadError,
};

/// Why a visit ended before its time. What was finished is on disk; the next visit goes on from there.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// The aggregator could not be asked.
    #[error("cannot ask the aggregator for work")]
    Poll(#[from] LinkError),
    /// The round is for another base.
    #[error("the round is for base {got}, this device has {expected}")]
    Base {
        /// This device's.
        expected: BaseHash,
        /// The round's.
        got: BaseHash,
    },
    /// The aggregator's newer key is not to be trusted.
    #[error("the aggregator's word cannot be checked")]
    Trust(#[from] TrustError),
    /// A release or the round's start could not be had, which is not its fault.
    #[error("install failed")]
    Install(#[from] InstallError),
    /// A release cannot be installed here. The aggregator is told with the next poll, and may publish another.
    #[error("release {version} cannot be installed")]
    Release {
        /// Which.
        version: Version,
        /// When to come back.
        reconnect: ReconnectWindow,
        /// Why.
        #[source]
        source: Box<InstallError>,
    },
    /// The package that rests does not fit in memory now.
    #[error("package is not opened")]
    Memory(#[from] MemoryError),
    /// The guard failed; no sample passed unseen.
    #[error("filter failed")]
    Filter(#[from] GuardError),
    /// Revision failed.
    #[error("revise failed")]
    Revise(#[from] ReviseError),
    /// The round's correction of gradients could not be had.
    #[error("the round's control variate cannot be used")]
    Control(#[from] ControlError),
    /// Training failed.
    #[error("train failed")]
    Train(#[from] TrainingError),
    /// Packing failed.
    #[error("compress failed")]
    Compress(#[from] PackError),
    /// The update was not delivered, and may be later.
    #[error("upload failed")]
    Upload(#[source] Box<UploadError>),
    /// The visit was ended from outside, by a signal or a pause.
    #[error("cancelled")]
    Cancelled,
    /// The disk refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl PipelineError {
    /// Whether waiting and trying again can help.
    pub fn is_transient(&self) -> bool {
        self.link().is_some_and(LinkError::is_transient)
    }

    /// Whether memory was short, of which there may be more another time: for a training step, or to open what rested.
    pub fn is_want_of_memory(&self) -> bool {
        let mut causes = std::iter::successors(self.source(), |&cause| cause.source());
        matches!(self, Self::Train(TrainingError::Memory(_))) || causes.any(<dyn Error>::is::<MemoryError>)
    }

    /// What the disk, or its budget, had no room for, if that is what it was.
    pub fn over_disk(&self) -> Option<&StoreError> {
        let store = match (self, self.install()) {
            (
                Self::Store(store)
                | Self::Control(ControlError::Store(store))
                | Self::Train(TrainingError::Store(store)),
                _,
            )
            | (_, Some(InstallError::Store(store))) => Some(store),
            _ => None,
        };
        store.filter(|error| error.is_want_of_room())
    }

    /// Until when the owner's budget for the network puts it off, if that is what it was.
    pub fn put_off(&self) -> Option<&PutOff> {
        self.link().and_then(LinkError::put_off)
    }

    /// The aggregator's no, if that is what it was.
    pub fn refusal(&self) -> Option<Refusal> {
        self.link().and_then(LinkError::refusal)
    }

    /// When the aggregator wants to be asked again, if it said so.
    pub fn reconnect(&self) -> Option<ReconnectWindow> {
        match (self, self.link()) {
            (_, Some(LinkError::Refused { reconnect, .. })) | (Self::Release { reconnect, .. }, _) => {
                Some(*reconnect)
            }
            _ => None,
        }
    }

    fn link(&self) -> Option<&LinkError> {
        match (self, self.install()) {
            (Self::Poll(error), _) | (_, Some(InstallError::Fetch { source: error, .. })) => Some(error),
            (Self::Upload(error), _) => error.link(),
            _ => None,
        }
    }

    fn install(&self) -> Option<&InstallError> {
        match self {
            Self::Install(error) | Self::Control(ControlError::Install(error)) => Some(error),
            Self::Release { source, .. } => Some(source),
            _ => None,
        }
    }
}

pub(crate) fn damaged(store: &Store, name: &str, error: &serde_json::Error) -> StoreError {
    let reason = format!("{:?} error at line {}", error.classify(), error.line());
    StoreError::Damaged { path: store.path(name), reason }
}
