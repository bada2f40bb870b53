//! A published adapter as devices learn of it: what it is, how it was measured, who signs. Neighbours: comes with a
//! poll's reply (`task`); its bytes are fetched as `content`; `signature` says what exactly is signed.

use crate::{
    AggregatorKey, BaseHash, Content, Digest, Invalid, RoundId, Signature, SignatureError, SigningKey,
    Version, bounds, signature::Domain,
};
use serde::{Deserialize, Serialize};

/// A published adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Release {
    /// Its version.
    pub version: Version,
    /// The version that its round started from; none for the first.
    pub parent: Option<Version>,
    /// The round that made it; none for one that no round made (the first, or a roll-back's copy).
    pub round: Option<RoundId>,
    /// The frozen base that it belongs to.
    pub base: BaseHash,
    /// BLAKE3 of the adapter's file.
    pub digest: Digest,
    /// Bytes of the adapter's file.
    pub length: u64,
    /// How it was measured.
    pub report_card: ReportCard,
    /// When it was published, ms since 1970.
    pub created_ms: u64,
}

/// A release and the aggregator's signature over it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SignedRelease {
    /// The release.
    pub release: Release,
    /// Over the release's canonical bytes.
    pub signature: Signature,
}

/// News of a release is the signed release itself.
pub type ReleaseNotice = SignedRelease;

/// How a candidate was measured before it was published. A metric that was not measured is none.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ReportCard {
    /// Fraction of answers to red-team prompts that the guard calls safe.
    pub safe_rate: Option<f64>,
    /// Fraction of red-team prompts that are answered in place of refused.
    pub attack_success_rate: Option<f64>,
    /// Fraction of benign prompts that are refused.
    pub over_refusal_rate: Option<f64>,
    /// Mean loss on held-out conversations, nats a token.
    pub held_out_loss: Option<f64>,
    /// Whether the metrics were good enough to publish.
    pub gates: Vec<Gate>,
    /// How the round's updates were merged, by the names in docs/merging.md: LoRA mode, rule, server optimizer, and
    /// `scaffold` if gradients were corrected. Empty for the first release; at most [`bounds::MERGE_NAME_BYTES_MAX`].
    pub merge: String,
    /// How the round went.
    pub counts: RoundCounts,
}

/// A threshold on a metric.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Gate {
    /// What is measured.
    pub metric: Metric,
    /// On which side of the threshold it must be.
    pub direction: Direction,
    /// The threshold.
    pub threshold: f64,
    /// The value measured.
    pub value: f64,
    /// Whether it is on the right side.
    pub passed: bool,
}

/// What a gate measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// See [`ReportCard::safe_rate`].
    SafeRate,
    /// See [`ReportCard::attack_success_rate`].
    AttackSuccessRate,
    /// See [`ReportCard::over_refusal_rate`].
    OverRefusalRate,
    /// See [`ReportCard::held_out_loss`].
    HeldOutLoss,
    /// Held-out loss less the parent release's.
    HeldOutLossRise,
}

/// On which side of its threshold a metric must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// `value >= threshold`.
    AtLeast,
    /// `value <= threshold`.
    AtMost,
}

/// Counts of one round, summed over its devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RoundCounts {
    /// Devices given the task.
    pub devices_selected: u32,
    /// Devices whose update came in time.
    pub devices_received: u32,
    /// Devices whose update was merged.
    pub devices_merged: u32,
    /// Updates whose norm was clipped.
    pub updates_clipped: u32,
    /// Updates that a robust rule left out.
    pub updates_excluded: u32,
    /// Samples drawn on devices.
    pub sampled: u64,
    /// Samples kept as they were.
    pub kept: u64,
    /// Samples dropped.
    pub dropped: u64,
    /// Samples whose answer became a refusal.
    pub refused: u64,
    /// Samples whose answer was rewritten.
    pub revised: u64,
    /// Bytes of updates received.
    pub uploaded_bytes: u64,
    /// Steps of alignment on the server.
    pub align_steps: u32,
}

impl SignedRelease {
    /// Signs a release.
    pub fn sign(key: &SigningKey, release: Release) -> Result<Self, SignatureError> {
        release.check()?;
        Ok(Self { signature: Domain::Release.sign(key, &release)?, release })
    }

    /// The release, if the aggregator signed it.
    pub fn verify(&self, key: &AggregatorKey) -> Result<&Release, SignatureError> {
        Domain::Release.verify(key, &self.release, &self.signature)?;
        Ok(&self.release)
    }
}

impl Release {
    /// The adapter's file, to fetch.
    pub fn content(&self) -> Content {
        Content { digest: self.digest, length: self.length }
    }

    pub(crate) fn check(&self) -> Result<(), Invalid> {
        self.content().check()?;
        self.report_card.check()
    }
}

impl ReportCard {
    /// Whether no gate failed.
    pub fn passed(&self) -> bool {
        self.gates.iter().all(|gate| gate.passed)
    }

    pub(crate) fn check(&self) -> Result<(), Invalid> {
        for (field, rate) in [
            ("safe_rate", self.safe_rate),
            ("attack_success_rate", self.attack_success_rate),
            ("over_refusal_rate", self.over_refusal_rate),
        ] {
            Invalid::unless_within(field, rate.unwrap_or(0.0), 0.0, 1.0)?;
        }
        Invalid::unless_within("held_out_loss", self.held_out_loss.unwrap_or(0.0), 0.0, 1e6)?;
        Invalid::unless_at_most("merge name", self.merge.len() as u64, bounds::MERGE_NAME_BYTES_MAX as u64)?;
        Invalid::unless_at_most("gates", self.gates.len() as u64, bounds::GATES_MAX as u64)?;
        self.gates.iter().try_for_each(Gate::check)
    }
}

impl Gate {
    /// Judges a value by a threshold.
    pub fn judge(metric: Metric, direction: Direction, threshold: f64, value: f64) -> Self {
        let passed = match direction {
            Direction::AtLeast => value >= threshold,
            Direction::AtMost => value <= threshold,
        };
        Self { metric, direction, threshold, value, passed }
    }

    pub(crate) fn check(&self) -> Result<(), Invalid> {
        Invalid::unless_within("gate threshold", self.threshold, -1e6, 1e6)?;
        Invalid::unless_within("gate value", self.value, -1e6, 1e6)?;
        if *self != Self::judge(self.metric, self.direction, self.threshold, self.value) {
            return Err(Invalid::Contradiction { field: "gate verdict" });
        }
        Ok(())
    }
}
