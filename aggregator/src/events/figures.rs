//! What the stages of a round did, in numbers: told in events, kept with the round's state and in its record.

use commonweal_protocol::{DeviceId, Digest, ReportCard, RoundCounts, RoundId, SignedControl, Version};
use serde::{Deserialize, Serialize};

use super::card_sentence;
use crate::optimize::OptimizerState;

/// What a stage did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "stage", rename_all = "snake_case")]
pub enum Figures {
    /// Updates became a candidate.
    Merge(Box<MergeFigures>),
    /// The candidate was tuned.
    Align(AlignFigures),
    /// The candidate was measured.
    Evaluate(EvaluateFigures),
    /// The release was signed and made the head.
    Publish {
        /// Its version.
        version: Version,
    },
}

/// Where a merged update came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Whose it is.
    pub device: DeviceId,
    /// BLAKE3 of its bytes.
    pub digest: Digest,
    /// The round in which its task was given.
    pub round: RoundId,
    /// The release that it was trained from.
    pub start: Version,
    /// Releases between that one and the one that it was merged into.
    pub staleness: u32,
}

/// Figures of a merge.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MergeFigures {
    /// Counts over the round's devices.
    pub counts: RoundCounts,
    /// The updates, and what each was trained from.
    pub lineage: Vec<Origin>,
    /// Norm of each update before clipping, by device.
    pub norms: Vec<(DeviceId, f64)>,
    /// Devices whose update was clipped.
    pub clipped: Vec<DeviceId>,
    /// Devices whose update was left out: by a robust rule, or, and then it is not in the lineage, because they were
    /// revoked.
    pub excluded: Vec<DeviceId>,
    /// Norm of the merged delta; of an exact merge, of what moved the factors.
    pub merged_norm: f64,
    /// Of an exact merge: share of the products' norm that lies beyond the adapter's rank, and is lost.
    pub rank_residual: Option<f64>,
    /// How they were merged; see [`ReportCard::merge`].
    pub method: String,
    /// What the server's optimizer remembers if the candidate is published.
    pub state: OptimizerState,
    /// SCAFFOLD's control variate after this round, if it has one.
    pub control: Option<SignedControl>,
}

impl MergeFigures {
    /// Counts devices whose updates were accepted and not merged, because they were revoked.
    pub(crate) fn leave_out(&mut self, revoked: &[DeviceId]) {
        self.counts.devices_received += revoked.len() as u32;
        self.counts.updates_excluded += revoked.len() as u32;
        self.excluded.extend_from_slice(revoked);
    }

    /// Those devices.
    pub fn revoked(&self) -> impl Iterator<Item = DeviceId> {
        let is_merged = |device: &DeviceId| self.lineage.iter().any(|origin| origin.device == *device);
        self.excluded.iter().copied().filter(move |device| !is_merged(device))
    }
}

/// Figures of an alignment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AlignFigures {
    /// Why there was none, if there was none.
    pub skipped: Option<String>,
    /// Red-team prompts answered.
    pub prompts: u32,
    /// Answers that the guard or the refusal rules let pass.
    pub safe: u32,
    /// Answers rewritten by the constitution and judged safe.
    pub revised: u32,
    /// Answers that became a plain refusal.
    pub refused: u32,
    /// Benign pairs replayed.
    pub replayed: u32,
    /// Optimizer steps.
    pub steps: u32,
    /// Loss of the first step.
    pub loss_first: f64,
    /// Loss of the last step.
    pub loss_last: f64,
}

/// Figures of an evaluation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EvaluateFigures {
    /// Harmful prompts answered.
    pub harmful_prompts: u32,
    /// Benign prompts answered.
    pub benign_prompts: u32,
    /// Held-out conversations scored.
    pub held_out: u32,
    /// What came of it.
    pub report_card: ReportCard,
}

impl Figures {
    pub(super) fn sentence(&self) -> String {
        match self {
            Self::Merge(merge) => format!(
                "merged {} updates, {} clipped, {} left out, norm {:.3}",
                merge.counts.devices_merged,
                merge.clipped.len(),
                merge.excluded.len(),
                merge.merged_norm
            ),
            Self::Align(AlignFigures { skipped: Some(reason), .. }) => format!("not aligned: {reason}"),
            Self::Align(align) => format!(
                "aligned on {} prompts: {} safe, {} revised, {} refused; {} steps, loss {:.3} → {:.3}",
                align.prompts,
                align.safe,
                align.revised,
                align.refused,
                align.steps,
                align.loss_first,
                align.loss_last
            ),
            Self::Evaluate(evaluate) => format!("evaluated: {}", card_sentence(&evaluate.report_card)),
            Self::Publish { version } => format!("published release {version}"),
        }
    }
}
