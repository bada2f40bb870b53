//! Learning from preferences on the real library.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

mod support;

use commonweal_runtime::{Cancel, Model, Preference, TrainError, TrainOptions, Trainer, TrainingRow};
use support::{adapter, model, row};

const BETA: f64 = 0.2;

fn preferences(model: &Model) -> Vec<Preference> {
    [("how? ", "kindly", "never ask"), ("why not? ", "since it hurts", "do it")]
        .map(|(prompt, chosen, rejected)| Preference {
            chosen: row(model, prompt, chosen),
            rejected: row(model, prompt, rejected),
        })
        .to_vec()
}

fn options() -> TrainOptions {
    TrainOptions { learning_rate: 2e-3, steps_max: 1000, clip_norm: None, ..TrainOptions::default() }
}

#[test]
fn preferences_raise_the_margin_from_zero() {
    let model = model();
    let mut trainer = Trainer::new(&model, adapter(&model, 1), options()).unwrap();
    let pairs = trainer.refer(preferences(&model), &Cancel::new()).unwrap();
    let first = trainer.step_preferences(&pairs, BETA, &Cancel::new()).unwrap();
    // The policy is the reference still.
    assert!(first.margin.abs() < 1e-9 && (first.loss - std::f64::consts::LN_2).abs() < 1e-9, "{first:?}");
    assert_eq!((first.accuracy, first.step), (0.0, 1));
    let mut last = first;
    for _ in 0..15 {
        last = trainer.step_preferences(&pairs, BETA, &Cancel::new()).unwrap();
    }
    assert!(last.margin > 0.1 && last.loss < first.loss && last.accuracy > 0.99, "{last:?}");
    assert!((last.margin - (last.chosen_reward - last.rejected_reward)).abs() < 1e-12);
    // The inference graph sees the same change of the same log-probabilities.
    let reward = |row: &TrainingRow| {
        let logprob = |adapter| {
            let prepared = model.prepare(Some(adapter)).unwrap();
            model.score_rows(&prepared, std::slice::from_ref(row), &Cancel::new()).unwrap()[0].logprob
        };
        BETA * (logprob(trainer.adapter()) - logprob(trainer.start()))
    };
    for pair in preferences(&model) {
        assert!(reward(&pair.chosen) > reward(&pair.rejected));
    }
}

/// The step descends the loss it reports: its directional derivative along the gradient is the gradient's square.
#[test]
fn gradient_is_that_of_the_reported_loss() {
    let model = model();
    let start = adapter(&model, 2);
    let mut warm = Trainer::new(&model, start.clone(), options()).unwrap();
    let pairs = warm.refer(preferences(&model), &Cancel::new()).unwrap();
    // Away from margin 0, where the derivative would be the same for every loss of the margin.
    for _ in 0..5 {
        warm.step_preferences(&pairs, BETA, &Cancel::new()).unwrap();
    }
    let point = warm.adapter().clone();
    let at = |adapter: commonweal_adapter::Adapter| {
        let mut trainer = Trainer::new(&model, adapter, options()).unwrap();
        let report = trainer.step_preferences(&pairs, BETA, &Cancel::new()).unwrap();
        let bytes = trainer.checkpoint().unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let data = tensors.tensor("first_moment").unwrap().data().to_vec();
        let gradient: Vec<f32> =
            data.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap()) / 0.1).collect();
        (report, gradient)
    };
    let (report, gradient) = at(point.clone());
    assert!(report.margin > 0.01, "{report:?}");
    let along = |distance: f32| {
        let mut moved = point.clone();
        let norm = report.grad_norm as f32;
        moved.values_mut().iter_mut().zip(&gradient).for_each(|(value, g)| *value += distance * g / norm);
        at(moved).0.loss
    };
    let slope = (along(5e-3) - along(-5e-3)) / 1e-2;
    assert!((slope - report.grad_norm).abs() < 0.02 * report.grad_norm, "{slope} {}", report.grad_norm);
}

#[test]
fn bad_preferences_are_refused() {
    let model = model();
    let mut trainer = Trainer::new(&model, adapter(&model, 3), options()).unwrap();
    let mut empty = preferences(&model);
    empty[1].rejected.weights.fill(0.0);
    assert!(matches!(trainer.refer(empty, &Cancel::new()), Err(TrainError::NothingToLearn { .. })));
    let pairs = trainer.refer(preferences(&model), &Cancel::new()).unwrap();
    for beta in [0.0, f64::NAN, -0.1] {
        let error = trainer.step_preferences(&pairs, beta, &Cancel::new()).unwrap_err();
        assert!(matches!(error, TrainError::Option { name: "beta", .. }), "{error}");
    }
    assert!(matches!(
        trainer.step_preferences(&[], BETA, &Cancel::new()),
        Err(TrainError::NothingToLearn { rows: 0 })
    ));
    let cancel = Cancel::new();
    cancel.cancel();
    assert!(matches!(trainer.step_preferences(&pairs, BETA, &cancel), Err(TrainError::Cancelled)));
    assert_eq!(trainer.steps_done(), 0);
}
