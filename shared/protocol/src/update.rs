//! What a device sends back: the announcement of an update, with counts of how it came to be. The bytes follow as
//! chunks. Neighbours: `task` asked for it, `content` holds the chunks, `receipt` answers.

use crate::{BaseHash, Digest, Invalid, RoundId, bounds};
use serde::{Deserialize, Serialize};

/// Announces an update; the same again resumes it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Open {
    /// The round that it belongs to.
    pub round: RoundId,
    /// The frozen base that it was trained on.
    pub base: BaseHash,
    /// BLAKE3 of the update's bytes.
    pub digest: Digest,
    /// Bytes of the update.
    pub length: u64,
    /// Samples that it was trained on: its weight in the mean.
    pub samples: u32,
    /// How it came to be.
    pub report: DeviceReport,
    /// Where its owner's own traces have its delivery, if the owner lets them be followed.
    pub trace: Option<TraceContext>,
}

/// The place of a span in its trace, as OpenTelemetry has them. Neither says anything else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceContext {
    /// The trace.
    pub trace: [u8; 16],
    /// The span in it.
    pub span: [u8; 8],
}

/// What names an upload, beside the device: the same key is the same upload, however often it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct UploadKey {
    /// The round.
    pub round: RoundId,
    /// The update's digest.
    pub digest: Digest,
}

/// Counts of a device's pipeline for one update. Nothing here is a person's text.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct DeviceReport {
    /// Samples drawn.
    pub sampled: u32,
    /// Samples that the guard let through as they were.
    pub kept: u32,
    /// Samples dropped.
    pub dropped: u32,
    /// Samples whose answer became a refusal.
    pub refused: u32,
    /// Samples whose answer was rewritten by the constitution and passed.
    pub revised: u32,
    /// Rewrites tried.
    pub revision_attempts: u32,
    /// Optimizer steps done.
    pub steps: u32,
    /// Tokens trained on.
    pub trained_tokens: u64,
    /// Loss of the first steps.
    pub loss_first: f32,
    /// Loss of the last steps.
    pub loss_last: f32,
    /// Norm of the delta before it was packed.
    pub delta_norm: f32,
}

impl Open {
    /// What names this upload, beside the device.
    pub fn key(&self) -> UploadKey {
        UploadKey { round: self.round, digest: self.digest }
    }

    pub(crate) fn check(&self) -> Result<(), Invalid> {
        Invalid::unless_at_least("update length", self.length, 1u64)?;
        Invalid::unless_at_most("update length", self.length, bounds::UPDATE_BYTES_MAX)?;
        Invalid::unless_at_least("samples", self.samples, 1u64)?;
        if self.trace.is_some_and(|trace| trace.trace == [0; 16] || trace.span == [0; 8]) {
            return Err(Invalid::NotAllowed { field: "trace's place", got: 0 });
        }
        self.report.check()
    }
}

impl DeviceReport {
    pub(crate) fn check(&self) -> Result<(), Invalid> {
        let sorted = u64::from(self.kept)
            + u64::from(self.dropped)
            + u64::from(self.refused)
            + u64::from(self.revised);
        if sorted > u64::from(self.sampled) {
            return Err(Invalid::Contradiction { field: "samples kept, dropped, refused and revised" });
        }
        Invalid::unless_at_most("report steps", self.steps, bounds::STEPS_MAX)?;
        for (field, value) in [("loss_first", self.loss_first), ("loss_last", self.loss_last)] {
            Invalid::unless_within(field, value.into(), -1e6, 1e6)?;
        }
        Invalid::unless_within("delta_norm", self.delta_norm.into(), 0.0, 1e12)
    }
}
