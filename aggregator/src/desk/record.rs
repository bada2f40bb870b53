//! One line for each round, kept for good: what `aggregator rounds` prints and reports are drawn from.

use std::{collections::BTreeMap, io};

use commonweal_protocol::{DeviceId, Gate, ReportCard, RoundId, Version};
use serde::{Deserialize, Serialize};

use super::{DeskError, Progress};
use crate::events::{AlignFigures, MergeFigures, Origin};
use crate::round::{Outcome, Summary};
use crate::store::{Coord, StoreError, While};

/// The log of records; entry `n` is round `n − 1`.
pub const RECORDS: &str = "rounds";

/// A finished round; round 0 is the first release.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// The round.
    pub round: RoundId,
    /// `base`, `published`, `rejected` or `abandoned`.
    pub outcome: String,
    /// Whether a release came of it.
    pub published: bool,
    /// Why not.
    pub reason: Option<String>,
    /// The release in force after it; the measures below are this release's.
    pub version: Version,
    /// See [`ReportCard::safe_rate`].
    pub safe_rate: Option<f64>,
    /// See [`ReportCard::attack_success_rate`].
    pub attack_success_rate: Option<f64>,
    /// See [`ReportCard::over_refusal_rate`].
    pub over_refusal: Option<f64>,
    /// See [`ReportCard::held_out_loss`].
    pub held_out_loss: Option<f64>,
    /// The candidate's report card; differs from the above when it was rejected.
    pub candidate: Option<ReportCard>,
    /// The candidate's gates that failed.
    pub failed_gates: Vec<Gate>,
    /// Devices with a task.
    pub selected: u32,
    /// Updates in time.
    pub updates: u32,
    /// Their bytes.
    pub uploaded_bytes: u64,
    /// Updates clipped.
    pub clipped: u32,
    /// Updates left out, by a robust rule or because their devices were revoked.
    pub excluded: u32,
    /// Devices whose accepted updates were left out because they were revoked before the merge.
    pub revoked: Vec<DeviceId>,
    /// Of an exact merge: share of the products' norm that lies beyond the adapter's rank.
    pub rank_residual: Option<f64>,
    /// The updates that were merged, and what each was trained from.
    pub lineage: Vec<Origin>,
    /// Norm of each update, by device.
    pub norms: Vec<(DeviceId, f64)>,
    /// Samples over all devices: kept, dropped, turned into a refusal, revised.
    pub samples: BTreeMap<String, u64>,
    /// Optimizer steps of the alignment.
    pub align_steps: u32,
    /// The alignment.
    pub align: Option<AlignFigures>,
    /// Seconds of each stage on the aggregator.
    pub seconds: BTreeMap<String, f64>,
    /// When it opened, ms since 1970.
    pub opened_ms: u64,
    /// When it took no more updates.
    pub closed_ms: u64,
    /// When it ended.
    pub finished_ms: u64,
}

impl Record {
    /// The first release.
    pub fn of_base(card: &ReportCard, now_ms: u64) -> Self {
        let mut record = Self {
            outcome: "base".to_owned(),
            published: true,
            opened_ms: now_ms,
            closed_ms: now_ms,
            finished_ms: now_ms,
            ..Self::default()
        };
        record.measure(Some(card));
        record
    }

    /// A round that ended; `card` is of the release in force.
    pub(super) fn of_round(
        summary: &Summary,
        progress: &Progress,
        version: Version,
        card: Option<&ReportCard>,
    ) -> Self {
        let merge = progress.merge.clone().unwrap_or_default();
        let revoked = merge.revoked().collect();
        let MergeFigures { counts, norms, clipped, excluded, rank_residual, lineage, .. } = merge;
        let (outcome, reason) = match &summary.outcome {
            Outcome::Published { .. } => ("published", None),
            Outcome::Rejected { reason } => ("rejected", Some(reason.clone())),
            Outcome::Abandoned { quorum } => ("abandoned", Some(format!("the quorum is {quorum}"))),
        };
        let candidate = progress.evaluate.as_ref().map(|evaluate| evaluate.report_card.clone());
        let failed = |card: &ReportCard| card.gates.iter().filter(|gate| !gate.passed).copied().collect();
        let mut record = Self {
            round: summary.round,
            outcome: outcome.to_owned(),
            published: outcome == "published",
            reason,
            version,
            failed_gates: candidate.as_ref().map(failed).unwrap_or_default(),
            candidate,
            selected: summary.selected,
            // A merge takes all that is in the inbox, which is the truth; the state may have counted less.
            updates: summary.received.max(counts.devices_received),
            uploaded_bytes: counts.uploaded_bytes,
            clipped: clipped.len() as u32,
            excluded: excluded.len() as u32,
            revoked,
            rank_residual,
            lineage,
            norms,
            samples: [
                ("kept", counts.kept),
                ("dropped", counts.dropped),
                ("refused", counts.refused),
                ("revised", counts.revised),
            ]
            .map(|(name, count)| (name.to_owned(), count))
            .into(),
            align_steps: progress.align.as_ref().map_or(0, |align| align.steps),
            align: progress.align.clone(),
            seconds: progress.seconds.clone(),
            opened_ms: summary.opened_ms,
            closed_ms: summary.closed_ms,
            finished_ms: summary.finished_ms,
            ..Self::default()
        };
        record.measure(card);
        record
    }

    fn measure(&mut self, card: Option<&ReportCard>) {
        let Some(card) = card else { return };
        self.safe_rate = card.safe_rate;
        self.attack_success_rate = card.attack_success_rate;
        self.over_refusal = card.over_refusal_rate;
        self.held_out_loss = card.held_out_loss;
    }

    /// Appends the record unless the round has one.
    pub fn append(&self, coord: &dyn Coord) -> Result<(), DeskError> {
        self.append_while(coord, None)
    }

    /// The same, if another log has not moved.
    pub(super) fn append_while(&self, coord: &dyn Coord, other: Option<While<'_>>) -> Result<(), DeskError> {
        let bytes = serde_json::to_vec(self).map_err(|error| DeskError::damaged("round's record", error))?;
        match coord.move_head(RECORDS, self.round.0, &bytes, other) {
            Ok(_) => Ok(()),
            Err(StoreError::Conflict { log, expected, found }) if log == RECORDS && found > expected => {
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Records from `round` upwards.
pub fn records(coord: &dyn Coord, round: RoundId, limit: usize) -> Result<Vec<Record>, DeskError> {
    coord
        .scan(RECORDS, round.0.saturating_add(1), limit)?
        .iter()
        .map(|entry| {
            let expected = RoundId(entry.sequence.saturating_sub(1));
            let damaged = |error| DeskError::damaged(format!("record of round {expected}"), error);
            let record: Record =
                serde_json::from_slice(&entry.value).map_err(|error| damaged(error.into()))?;
            // Whoever counts on from a record's round would count the same ones for ever.
            if record.round != expected {
                return Err(damaged(io::Error::other(format!("it is of round {}", record.round))));
            }
            Ok(record)
        })
        .collect()
}
