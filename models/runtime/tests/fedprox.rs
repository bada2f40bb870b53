//! FedProx against NumPy (`golden/fedprox.py`), on the real library: the trainer's whole way from gradient to values.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

mod support;

use std::sync::Arc;

use commonweal_adapter::{Adapter, scaffold::Correction};
use commonweal_runtime::{Cancel, TrainOptions, Trainer, TrainingRow};
use support::{model, row};

#[derive(serde::Deserialize)]
struct Golden {
    x: Vec<f32>,
    c: Vec<f32>,
    learning_rate: f64,
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Case {
    mu: f64,
    path: Vec<Vec<f64>>,
}

#[test]
fn the_path_with_the_proximal_term_is_numpys() {
    let golden: Golden = serde_json::from_str(include_str!("golden/fedprox.json")).unwrap();
    let model = model();
    // One row that is learned and unlearned has no gradient; what is left is the correction, which is the same everywhere:
    // the gradient of the loss in NumPy.
    let learned = row(&model, "hi ", "hello");
    let unlearned =
        TrainingRow { weights: learned.weights.iter().map(|weight| -weight).collect(), ..learned.clone() };
    let rows = [learned, unlearned];
    // No value's way depends on another's, so the few of NumPy's stand for all of the adapter's.
    let spread = |few: &[f32]| {
        let count = model.layout().parameters();
        Adapter::from_values(Arc::clone(model.layout()), few.iter().copied().cycle().take(count).collect())
            .unwrap()
    };
    let correction =
        Correction::new(&spread(&golden.c), &Adapter::zeros(Arc::clone(model.layout()))).unwrap();
    for case in &golden.cases {
        let options = TrainOptions {
            learning_rate: golden.learning_rate,
            proximal_mu: case.mu,
            clip_norm: None,
            ..TrainOptions::default()
        };
        let trainer = Trainer::new(&model, spread(&golden.x), options).unwrap();
        let mut trainer = trainer.corrected(correction.clone()).unwrap();
        for (step, expected) in case.path.iter().enumerate() {
            trainer.step(&rows, &Cancel::new()).unwrap();
            let values = trainer.adapter().values().iter().enumerate();
            for ((at, got), expected) in values.zip(expected.iter().cycle()) {
                assert!(
                    (f64::from(*got) - expected).abs() < 2e-6,
                    "mu {}, step {step}, value {at}: {got}, NumPy has {expected}",
                    case.mu
                );
            }
        }
    }
}
