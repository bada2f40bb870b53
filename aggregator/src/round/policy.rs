//! The operator's numbers for a round, checked once.

use commonweal_protocol::RoundId;
use serde::{Deserialize, Serialize};

use super::{ROUNDS_BACK_MAX, Sampling};

/// Most updates of one round: robust merging holds them all, and the state lists their devices.
pub const GOAL_MAX: u32 = 10_000;
/// Most tasks at once: each is in the state, which is written for each that is given.
pub const TASKS_MAX: u32 = 40_000;

/// Whom a round waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum RoundMode {
    /// All devices of a round start from the same release; what comes after its end is discarded.
    #[default]
    Synchronous,
    /// `FedBuff`: devices start from whatever is current, and a round ends with so many updates.
    Buffered,
}

/// When a round opens and closes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Whom a round waits for.
    pub mode: RoundMode,
    /// Updates wanted; in buffered mode the buffer's size, K.
    pub goal: u32,
    /// Tasks handed out for each update wanted, since some devices vanish; in buffered mode, devices at work at once for
    /// each place in the buffer.
    pub over_selection: f64,
    /// Whom a synchronous round asks.
    pub sampling: Sampling,
    /// Seed of the draws, so that no device can tell its turn. Set by `aggregator init`.
    pub sampling_seed: u64,
    /// Updates without which the deadline ends the round with nothing.
    pub quorum: u32,
    /// How long to wait for `goal` devices before opening with at least `quorum`; with a draw, how long devices can
    /// come to be drawn from.
    pub wait_ms: u64,
    /// How long devices have.
    pub deadline_ms: u64,
    /// Buffered: releases that an update may lie behind.
    pub staleness_max: u32,
    /// Buffered: an update that lies τ releases behind counts `(1 + τ)^-staleness_exponent`. 0 counts all alike.
    pub staleness_exponent: f64,
    /// The last round to hold, if any.
    pub last: Option<RoundId>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            mode: RoundMode::Synchronous,
            goal: 8,
            over_selection: 1.3,
            sampling: Sampling::First,
            sampling_seed: 0,
            quorum: 4,
            wait_ms: 60_000,
            deadline_ms: 30 * 60_000,
            staleness_max: 4,
            staleness_exponent: 0.5,
            last: None,
        }
    }
}

/// A number that makes no round.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("round.{field}: expected {expected}, got {got}")]
pub struct PolicyError {
    /// The field.
    pub field: &'static str,
    /// What it may be.
    pub expected: String,
    /// What it is.
    pub got: String,
}

impl Policy {
    /// Every problem at once.
    pub fn problems(&self) -> Vec<PolicyError> {
        let mut problems = Vec::new();
        let over_selection_max = if self.is_buffered() { 64.0 } else { 4.0 };
        let mut check = |holds: bool, field, expected: String, got: String| {
            if !holds {
                problems.push(PolicyError { field, expected, got });
            }
        };
        check((1..=GOAL_MAX).contains(&self.goal), "goal", format!("1 to {GOAL_MAX}"), self.goal.to_string());
        check(
            (1..=self.goal.max(1)).contains(&self.quorum),
            "quorum",
            format!("1 to the goal ({})", self.goal),
            self.quorum.to_string(),
        );
        check(
            (1.0..=over_selection_max).contains(&self.over_selection),
            "over_selection",
            format!("1.0 to {over_selection_max:.1}"),
            self.over_selection.to_string(),
        );
        check(
            self.selected_max(self.goal) <= TASKS_MAX,
            "over_selection",
            format!("at most {TASKS_MAX} tasks at once for the goal"),
            self.selected_max(self.goal).to_string(),
        );
        check(
            (1_000..=7 * 24 * 3_600_000).contains(&self.deadline_ms),
            "deadline_ms",
            "one second to one week".to_owned(),
            self.deadline_ms.to_string(),
        );
        check(
            self.wait_ms <= 24 * 3_600_000,
            "wait_ms",
            "at most one day".to_owned(),
            self.wait_ms.to_string(),
        );
        check(
            (1..=ROUNDS_BACK_MAX).contains(&u64::from(self.staleness_max)),
            "staleness_max",
            format!("1 to {ROUNDS_BACK_MAX}"),
            self.staleness_max.to_string(),
        );
        check(
            (0.0..=4.0).contains(&self.staleness_exponent),
            "staleness_exponent",
            "0.0 to 4.0".to_owned(),
            self.staleness_exponent.to_string(),
        );
        check(
            self.sampling == Sampling::First || !self.is_buffered(),
            "sampling",
            "first in buffered mode, where whoever comes is asked".to_owned(),
            format!("{:?}", self.sampling).to_lowercase(),
        );
        problems
    }

    /// Whether rounds are buffered.
    pub fn is_buffered(&self) -> bool {
        self.mode == RoundMode::Buffered
    }

    /// Tasks handed out for `target` updates.
    pub fn selected_max(&self, target: u32) -> u32 {
        (f64::from(target) * self.over_selection).ceil() as u32
    }

    /// Updates that a round may come to. One process closes it at the goal; where several receive, more come in until who
    /// drives has counted: from everybody with a task, and of a buffer also from those who got one meanwhile.
    pub fn updates_max(&self, is_shared: bool) -> u32 {
        match (is_shared, self.is_buffered()) {
            (false, _) => self.goal,
            (true, false) => self.selected_max(self.goal),
            (true, true) => self.selected_max(self.goal).saturating_add(self.goal.saturating_sub(1)),
        }
    }

    pub(super) fn is_past_last(&self, round: RoundId) -> bool {
        self.last.is_some_and(|last| round.0 > last.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_sound() {
        assert_eq!(Policy::default().problems(), []);
        assert_eq!(Policy::default().selected_max(8), 11);
        assert_eq!(Policy::default().selected_max(1), 2);
        let buffered = Policy { mode: RoundMode::Buffered, ..Policy::default() };
        let most = [false, true]
            .map(|is_shared| (Policy::default().updates_max(is_shared), buffered.updates_max(is_shared)));
        assert_eq!(most, [(8, 8), (11, 18)]);
    }

    #[test]
    fn every_problem_is_named_at_once() {
        let policy =
            Policy { goal: 0, quorum: 9, over_selection: f64::NAN, deadline_ms: 0, ..Policy::default() };
        let fields: Vec<_> = policy.problems().into_iter().map(|problem| problem.field).collect();
        assert_eq!(fields, ["goal", "quorum", "over_selection", "deadline_ms"]);
    }
}
