//! What goes into the state machine and what comes out of it.

use commonweal_protocol::{DeviceId, Digest, ReportCard, RoundId, Start, Version};
use serde::{Deserialize, Serialize};

/// What happened outside.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The process has started; the phase's work begins again.
    Resumed,
    /// The round's end is on record, although the state behind it was not saved: it is over.
    Recorded,
    /// A timer ran out.
    TimePassed,
    /// A device asked for work; `start` is the release it would begin from.
    Polled(DeviceId, Start),
    /// This is the release in force: a buffered round begins without waiting for a device.
    Head(Start),
    /// A device's update is on disk.
    Received(DeviceId),
    /// The updates became a candidate.
    Merged(Digest),
    /// The candidate was aligned, or passed on untouched.
    Aligned(Digest),
    /// The candidate was measured and no gate failed (or gates are off).
    Accepted(Box<ReportCard>),
    /// The release is the head.
    Published(Version),
    /// A stage or a gate refused the candidate; the previous release stays.
    Refused(String),
}

/// What the shell must do, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Make the state durable before anything that follows.
    Save,
    /// The device takes part in the round.
    Assign(DeviceId),
    /// A round has begun.
    Opened,
    /// No more updates are taken.
    Closed,
    /// Merge the round's updates.
    Merge,
    /// Align the candidate.
    Align(Digest),
    /// Measure the candidate.
    Evaluate(Digest),
    /// Publish the candidate.
    Publish(Digest, Box<ReportCard>),
    /// Record how the round ended; recording twice must be harmless.
    Finish(Summary),
    /// Send `TimePassed` then.
    WakeAt(u64),
    /// The last wanted round is over.
    Stop,
}

/// How a round ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// A release came of it.
    Published {
        /// Its version.
        version: Version,
    },
    /// A stage or gate refused the candidate.
    Rejected {
        /// Which and why.
        reason: String,
    },
    /// Too few updates by the deadline.
    Abandoned {
        /// How many would have done.
        quorum: u32,
    },
}

/// A finished round.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// The round.
    pub round: RoundId,
    /// When it opened.
    pub opened_ms: u64,
    /// When it took no more updates.
    pub closed_ms: u64,
    /// When it ended.
    pub finished_ms: u64,
    /// Devices that had a task.
    pub selected: u32,
    /// Updates that came in time.
    pub received: u32,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// Why a device's update is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAdmitted {
    /// The round is over, or not yet begun.
    #[error("round {named} takes no updates, the current one is {current}")]
    StaleRound {
        /// What the device named.
        named: u64,
        /// What is current.
        current: u64,
    },
    /// The release that the update was trained from lies too far back.
    #[error("the update of round {round} is {got} releases behind, at most {most} are taken")]
    TooStale {
        /// What the device named.
        round: u64,
        /// Releases since.
        got: u32,
        /// The operator's bound.
        most: u32,
    },
    /// The buffer is full and its round not over; the next one takes the update.
    #[error("round {current} is being merged")]
    Merging {
        /// What is current.
        current: u64,
    },
    /// The round has enough devices, and this is none of them.
    #[error("the device was not selected for this round")]
    NotSelected,
}
