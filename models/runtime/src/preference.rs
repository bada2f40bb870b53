//! Learns from preferences by DPO (Rafailov et al. 2023): the chosen answer becomes more probable than the rejected one,
//! relative to the adapter that training began with. Runs on the same gradient graph as `train.rs`, by signed weights.

use crate::{
    cancel::{Cancel, Run},
    conversation::TrainingRow,
    gradient::gradient,
    train::{TrainError, Trainer, add},
};

/// Two answers to one prompt; weights are 1 on the answers' tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Preference {
    /// The better one.
    pub chosen: TrainingRow,
    /// The worse one.
    pub rejected: TrainingRow,
}

/// A preference with the log-probabilities of both answers under the reference; made by [`Trainer::refer`].
#[derive(Clone, Debug, PartialEq)]
pub struct ReferredPreference {
    preference: Preference,
    chosen_logprob: f64,
    rejected_logprob: f64,
}

/// What a step of preferences did. Rewards are DPO's implicit ones, `β · (log π(answer) − log π₀(answer))`, before the
/// step, averaged over pairs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PreferenceReport {
    /// Steps made so far, this one included.
    pub step: u64,
    /// Mean of `−log σ(margin)`; ln 2 where nothing is learned yet.
    pub loss: f64,
    /// Mean of chosen minus rejected reward.
    pub margin: f64,
    /// Mean reward of the chosen answers.
    pub chosen_reward: f64,
    /// Mean reward of the rejected answers.
    pub rejected_reward: f64,
    /// Share of pairs whose margin is above 0.
    pub accuracy: f64,
    /// Norm of the trainable gradient, proximal term included, before clipping.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
}

impl Trainer {
    /// Adds the reference's log-probabilities, those of the adapter that training began with. Done once per pair,
    /// however often the pair is learned from.
    pub fn refer(
        &self,
        preferences: Vec<Preference>,
        cancel: &Cancel,
    ) -> Result<Vec<ReferredPreference>, TrainError> {
        for (index, preference) in preferences.iter().enumerate() {
            for row in [&preference.chosen, &preference.rejected] {
                self.check_row(index, row)?;
                if row.targets() == 0 {
                    return Err(TrainError::NothingToLearn { rows: 1 });
                }
            }
        }
        let run = Run::new(cancel)?;
        let refer = |preference: Preference| {
            let rows = [&preference.chosen, &preference.rejected];
            // The gradient graph, not the inference graph: its rounding must be that of the steps, or margins
            // would not begin at 0.
            let logprobs =
                gradient(&self.model, &self.start, &rows, &[1.0, -1.0], &self.options, &run)?.logprobs;
            let (chosen_logprob, rejected_logprob) = (logprobs[0], logprobs[1]);
            Ok(ReferredPreference { preference, chosen_logprob, rejected_logprob })
        };
        preferences.into_iter().map(refer).collect()
    }

    /// One update from some pairs. `beta` is how much a difference in log-probability counts; 0.1 is usual, smaller
    /// moves further from the reference.
    pub fn step_preferences(
        &mut self,
        pairs: &[ReferredPreference],
        beta: f64,
        cancel: &Cancel,
    ) -> Result<PreferenceReport, TrainError> {
        self.begin()?;
        if !(beta.is_finite() && beta > 0.0) {
            return Err(TrainError::Option { name: "beta", expected: "above 0", got: beta });
        }
        if pairs.is_empty() {
            return Err(TrainError::NothingToLearn { rows: 0 });
        }
        let run = Run::new(cancel)?;
        let share = 1.0 / pairs.len() as f64;
        let mut total = vec![0.0; self.adapter.values().len()];
        let mut sums = Sums::default();
        for pair in pairs {
            // The loss of a pair depends on its two log-probabilities through one number, the margin, and weights
            // +1 and −1 give the gradient of their difference. So one run yields both, and the derivative by the
            // margin scales the gradient afterwards: half the work of a run for the margin and another for the
            // gradient.
            let rows = [&pair.preference.chosen, &pair.preference.rejected];
            let part = gradient(&self.model, &self.adapter, &rows, &[1.0, -1.0], &self.options, &run)?;
            let chosen = beta * (part.logprobs[0] - pair.chosen_logprob);
            let rejected = beta * (part.logprobs[1] - pair.rejected_logprob);
            let outcome = Outcome::of(chosen - rejected);
            add(&mut total, part.values, share * beta * outcome.pull);
            sums.loss += share * outcome.loss;
            sums.chosen += share * chosen;
            sums.rejected += share * rejected;
            sums.won += if chosen > rejected { share } else { 0.0 };
        }
        let Sums { loss, chosen, rejected, won } = sums;
        let (grad_norm, learning_rate) = self.update(loss, total)?;
        Ok(PreferenceReport {
            step: self.steps_done(),
            loss,
            margin: chosen - rejected,
            chosen_reward: chosen,
            rejected_reward: rejected,
            accuracy: won,
            grad_norm,
            learning_rate,
        })
    }
}

#[derive(Default)]
struct Sums {
    loss: f64,
    chosen: f64,
    rejected: f64,
    won: f64,
}

/// The loss at a margin and minus its derivative.
#[derive(Debug, PartialEq)]
struct Outcome {
    /// `−log σ(margin)`.
    loss: f64,
    /// `σ(−margin)`.
    pull: f64,
}

impl Outcome {
    fn of(margin: f64) -> Self {
        // Written so that neither a large nor a very negative margin overflows.
        let loss = (-margin.abs()).exp().ln_1p() + (-margin).max(0.0);
        Self { loss, pull: 1.0 / (1.0 + margin.exp()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Golden values: torch, −F.logsigmoid(m) and sigmoid(−m).
    #[test]
    fn loss_and_pull_equal_pytorch() {
        for (margin, loss, pull) in [
            (0.0, std::f64::consts::LN_2, 0.5),
            (2.0, 0.126_928_01, 0.119_202_92),
            (-3.0, 3.048_587_35, 0.952_574_13),
            (800.0, 0.0, 0.0),
            (-800.0, 800.0, 1.0),
        ] {
            let outcome = Outcome::of(margin);
            assert!(
                (outcome.loss - loss).abs() < 1e-7 && (outcome.pull - pull).abs() < 1e-7,
                "{margin}: {outcome:?}"
            );
        }
    }
}
