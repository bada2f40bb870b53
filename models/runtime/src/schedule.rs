//! The learning rate of each step. Pure; `train.rs` asks it before every update.

use serde::{Deserialize, Serialize};

/// How the learning rate goes on after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Stays as it is.
    #[default]
    Constant,
    /// Falls in a straight line, to 0 one step after the last.
    Linear,
    /// Falls along half a cosine, to 0 one step after the last.
    Cosine,
}

impl Schedule {
    /// The factor of the learning rate for a step, counted from 0. During the first `warmup_steps` it rises in equal
    /// parts, the first step not at 0; after them the rest of `steps_max` is the fall.
    pub fn factor(self, step: u64, warmup_steps: u64, steps_max: u64) -> f64 {
        if step < warmup_steps {
            return (step + 1) as f64 / (warmup_steps + 1) as f64;
        }
        let span = steps_max.saturating_sub(warmup_steps).max(1);
        let progress = ((step - warmup_steps) as f64 / span as f64).min(1.0);
        match self {
            Self::Constant => 1.0,
            Self::Linear => 1.0 - progress,
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_then_falls() {
        let at = |schedule: Schedule, step| schedule.factor(step, 3, 11);
        for schedule in [Schedule::Constant, Schedule::Linear, Schedule::Cosine] {
            assert_eq!([at(schedule, 0), at(schedule, 1), at(schedule, 2)], [0.25, 0.5, 0.75]);
            assert_eq!(at(schedule, 3), 1.0);
        }
        assert_eq!(at(Schedule::Constant, 10), 1.0);
        assert_eq!(at(Schedule::Linear, 7), 0.5);
        assert!((at(Schedule::Cosine, 7) - 0.5).abs() < 1e-12);
        assert!((at(Schedule::Cosine, 5) - 0.853_553_39).abs() < 1e-8);
        assert!(at(Schedule::Linear, 10) > 0.0 && at(Schedule::Linear, 11) == 0.0);
    }

    #[test]
    fn degenerate_lengths_do_not_divide_by_zero() {
        assert_eq!(Schedule::Linear.factor(0, 0, 0), 1.0);
        assert_eq!(Schedule::Cosine.factor(5, 9, 3), 6.0 / 10.0);
    }
}
