//! The two stages that need a model, behind a trait, so that a simulation can write theirs down.

use std::sync::Arc;

use commonweal_adapter::Adapter;
use commonweal_package::Package;
use commonweal_protocol::RoundId;
use commonweal_runtime::Cancel;

use crate::config::Config;
use crate::events::{AlignFigures, EvaluateFigures};
use crate::laboratory::{Base, Laboratory, LaboratoryError};
use crate::{align, evaluate};

/// Model work; [`Laboratory`], or a twin in simulations.
pub trait Stages: Send {
    /// Aligns a candidate.
    fn align(
        &mut self,
        round: RoundId,
        candidate: Adapter,
    ) -> Result<(Adapter, AlignFigures), LaboratoryError>;

    /// Measures a candidate.
    fn evaluate(&mut self, round: RoundId, candidate: &Adapter) -> Result<EvaluateFigures, LaboratoryError>;
}

/// The real stages, opened when first needed.
#[derive(Debug)]
pub struct ModelStages {
    /// The package.
    pub package: Package,
    /// Its base.
    pub base: Base,
    /// The settings.
    pub config: Arc<Config>,
    /// Ends model calls.
    pub cancel: Cancel,
    /// The open model, once there is one.
    pub laboratory: Option<Laboratory>,
}

impl ModelStages {
    /// The open model.
    pub fn laboratory(&mut self) -> Result<&Laboratory, LaboratoryError> {
        if self.laboratory.is_none() {
            self.laboratory = Some(Laboratory::open(&self.package, &self.base, &self.config, &self.cancel)?);
        }
        self.laboratory.as_ref().ok_or(LaboratoryError::Cancelled)
    }
}

impl Stages for ModelStages {
    fn align(
        &mut self,
        round: RoundId,
        candidate: Adapter,
    ) -> Result<(Adapter, AlignFigures), LaboratoryError> {
        let config = self.config.clone();
        let cancel = self.cancel.clone();
        let trainable = config.train.trainable(round);
        align::align(self.laboratory()?, &config.align, trainable, round, candidate)
            .map_err(|error| if cancel.is_cancelled() { LaboratoryError::Cancelled } else { error })
    }

    fn evaluate(&mut self, _round: RoundId, candidate: &Adapter) -> Result<EvaluateFigures, LaboratoryError> {
        let config = self.config.clone();
        let cancel = self.cancel.clone();
        evaluate::measure(self.laboratory()?, &config.evaluate, candidate, &|_| ())
            .map_err(|error| if cancel.is_cancelled() { LaboratoryError::Cancelled } else { error })
    }
}
