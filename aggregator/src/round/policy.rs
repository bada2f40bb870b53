//! The operator's numbers for a round, checked once.

use commonweal_protocol::RoundId;
use serde::{Deserialize, Serialize};

/// Most updates of one round: robust merging holds them all, and the state lists their devices.
pub const GOAL_MAX: u32 = 10_000;

/// When a round opens and closes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Updates wanted.
    pub goal: u32,
    /// Tasks handed out for each update wanted, since some devices vanish.
    pub over_selection: f64,
    /// Updates without which the deadline ends the round with nothing.
    pub quorum: u32,
    /// How long to wait for `goal` devices before opening with at least `quorum`.
    pub wait_ms: u64,
    /// How long devices have.
    pub deadline_ms: u64,
    /// The last round to hold, if any.
    pub last: Option<RoundId>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            goal: 8,
            over_selection: 1.3,
            quorum: 4,
            wait_ms: 60_000,
            deadline_ms: 30 * 60_000,
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
            (1.0..=4.0).contains(&self.over_selection),
            "over_selection",
            "1.0 to 4.0".to_owned(),
            self.over_selection.to_string(),
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
        problems
    }

    /// Tasks handed out for `target` updates.
    pub fn selected_max(&self, target: u32) -> u32 {
        (f64::from(target) * self.over_selection).ceil() as u32
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
    }

    #[test]
    fn every_problem_is_named_at_once() {
        let policy =
            Policy { goal: 0, quorum: 9, over_selection: f64::NAN, deadline_ms: 0, ..Policy::default() };
        let fields: Vec<_> = policy.problems().into_iter().map(|problem| problem.field).collect();
        assert_eq!(fields, ["goal", "quorum", "over_selection", "deadline_ms"]);
    }
}
