//! The model's two stages, written down: alignment changes nothing, evaluation passes or fails by the seed.

use aggregator::drive::Stages;
use aggregator::events::{AlignFigures, EvaluateFigures};
use aggregator::laboratory::LaboratoryError;
use commonweal_adapter::Adapter;
use commonweal_protocol::{ReportCard, RoundId};

/// The same round always gets the same verdict, however often it is asked for.
#[derive(Clone, Copy, Debug)]
pub struct SeededStages {
    pub seed: u64,
}

impl SeededStages {
    fn draw(self, round: RoundId, what: &str) -> u8 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.seed.to_le_bytes()).update(&round.0.to_le_bytes()).update(what.as_bytes());
        hasher.finalize().as_bytes()[0]
    }
}

impl Stages for SeededStages {
    fn align(
        &mut self,
        round: RoundId,
        candidate: Adapter,
    ) -> Result<(Adapter, AlignFigures), LaboratoryError> {
        if self.draw(round, "align") < 10 {
            return Err(LaboratoryError::NoGuard);
        }
        Ok((candidate, AlignFigures { steps: 1, ..AlignFigures::default() }))
    }

    fn evaluate(&mut self, round: RoundId, _candidate: &Adapter) -> Result<EvaluateFigures, LaboratoryError> {
        let safe_rate = if self.draw(round, "evaluate") < 50 { 0.5 } else { 0.95 };
        let card = ReportCard {
            safe_rate: Some(safe_rate),
            over_refusal_rate: Some(0.0),
            held_out_loss: Some(1.0),
            ..ReportCard::default()
        };
        Ok(EvaluateFigures { report_card: card, ..EvaluateFigures::default() })
    }
}
