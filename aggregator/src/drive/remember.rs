//! Adapters and what has their form on disk: read and kept by their hash. Used by the stages of `drive`.

use commonweal_adapter::{Adapter, AdapterKind, Moments};
use commonweal_protocol::{Digest, Version, bounds};

use super::{DriveError, Driver, Stages, is_lost};
use crate::config::Optimizer;
use crate::optimize::OptimizerState;
use crate::receive::chain;

/// What is there, or why it never will be.
pub(super) type Found<T> = Result<Result<T, String>, DriveError>;

impl<S: Stages> Driver<S> {
    /// Reads an adapter, or what has its form.
    pub(super) fn load(&self, digest: &Digest, kind: AdapterKind) -> Found<Adapter> {
        let bytes = match self.parts.storage.blob.read_all(digest, bounds::CONTENT_BYTES_MAX) {
            Ok(bytes) => bytes,
            Err(error) if is_lost(&error) => return Ok(Err(chain(&error))),
            Err(error) => return Err(error.into()),
        };
        let read = self.base.read(kind.name(), &bytes, kind);
        Ok(read.map_err(|error| chain(&error)))
    }

    /// Stores it durably.
    pub(super) fn keep(&self, adapter: &Adapter, kind: AdapterKind) -> Found<Digest> {
        let bytes = match self.base.write_as(adapter, kind) {
            Ok(bytes) => bytes,
            Err(error) => return Ok(Err(chain(&error))),
        };
        let digest = Digest::of(&bytes);
        self.parts.storage.blob.put_if_absent(&digest, bytes.len() as u64, &mut bytes.as_slice())?;
        Ok(Ok(digest))
    }

    /// What this optimizer remembers of the steps up to a release.
    pub(super) fn moments(&self, version: Version, optimizer: Optimizer) -> Found<Option<Moments>> {
        let state = self.parts.publisher.state(version)?;
        let Some(momentum) = state.momentum.filter(|_| state.optimizer == optimizer) else {
            return Ok(Ok(None));
        };
        let momentum = match self.load(&momentum, AdapterKind::Momentum)? {
            Ok(momentum) => momentum,
            Err(reason) => return Ok(Err(reason)),
        };
        let variance = match state.variance {
            None => None,
            Some(variance) => match self.load(&variance, AdapterKind::Variance)? {
                Ok(variance) => Some(variance),
                Err(reason) => return Ok(Err(reason)),
            },
        };
        Ok(Ok(Some(Moments { momentum, variance })))
    }

    /// Stores what is remembered of a step.
    pub(super) fn keep_moments(
        &self,
        moments: Option<&Moments>,
        optimizer: Optimizer,
    ) -> Found<OptimizerState> {
        let mut state = OptimizerState { optimizer, ..OptimizerState::default() };
        let Some(moments) = moments else { return Ok(Ok(state)) };
        let files = [
            (Some(&moments.momentum), AdapterKind::Momentum, &mut state.momentum),
            (moments.variance.as_ref(), AdapterKind::Variance, &mut state.variance),
        ];
        for (moment, kind, place) in files {
            let Some(moment) = moment else { continue };
            match self.keep(moment, kind)? {
                Ok(digest) => *place = Some(digest),
                Err(reason) => return Ok(Err(reason)),
            }
        }
        Ok(Ok(state))
    }
}
