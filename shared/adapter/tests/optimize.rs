//! The server's optimizers against Flower's strategies (`golden/optimize.py`), and what they leave alone.
#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "a failed test may panic")]

use std::sync::Arc;

use commonweal_adapter::{
    Adapter, AdapterDelta, AdapterLayout, Module, Target, Trainable,
    optimize::{Adaptive, Moments, ServerOptimizer},
};

#[derive(serde::Deserialize)]
struct Golden {
    start: Vec<f32>,
    means: Vec<Vec<f32>>,
    fedavgm: Vec<Vec<f64>>,
    fedadam: Vec<Vec<f64>>,
    fedyogi: Vec<Vec<f64>>,
}

const RATE: f64 = 0.03;
const MOMENTUM: ServerOptimizer = ServerOptimizer::FedAvgM { beta: 0.9 };
const ADAPTIVE: Adaptive = Adaptive { betas: (0.9, 0.99), tau: 1e-3 };

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/optimize.json")).unwrap()
}

fn layout() -> Arc<AdapterLayout> {
    let modules = vec![Module { target: Target::Q, inputs: 3, outputs: 4 }];
    Arc::new(AdapterLayout::new(1, 2, 4.0, modules).unwrap())
}

fn delta(trainable: Trainable, values: &[f32]) -> AdapterDelta {
    AdapterDelta::from_values(layout(), trainable, values.to_vec()).unwrap()
}

/// The adapter after each delta, all of them whole.
fn releases(optimizer: ServerOptimizer, start: &[f32], deltas: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let mut current = Adapter::from_values(layout(), start.to_vec()).unwrap();
    let mut moments = None;
    let step = |values: &Vec<f32>| {
        let delta = delta(Trainable::Both, values);
        (current, moments) = optimizer.step(&current, &delta, RATE, moments.take()).unwrap();
        current.values().to_vec()
    };
    deltas.iter().map(step).collect()
}

#[test]
fn every_step_is_flowers() {
    let golden = golden();
    for (optimizer, expected) in [
        (MOMENTUM, &golden.fedavgm),
        (ServerOptimizer::FedAdam(ADAPTIVE), &golden.fedadam),
        (ServerOptimizer::FedYogi(ADAPTIVE), &golden.fedyogi),
    ] {
        let got = releases(optimizer, &golden.start, &golden.means);
        for (round, (got, expected)) in got.iter().zip(expected).enumerate() {
            for (got, expected) in got.iter().zip(expected) {
                // Both moments and the adapter are kept in f32 from round to round.
                let off = (f64::from(*got) - expected).abs();
                assert!(off < 1e-7, "{optimizer:?}, round {round}: {got}, Flower has {expected}");
            }
        }
    }
}

#[test]
fn fedavg_remembers_nothing_and_adds_the_delta() {
    let start = Adapter::from_values(layout(), golden().start).unwrap();
    let delta = delta(Trainable::Both, &golden().means[0]);
    let (moved, moments) = ServerOptimizer::FedAvg.step(&start, &delta, 0.5, None).unwrap();
    assert_eq!(moved, start.plus(&delta, 0.5).unwrap());
    assert_eq!(moments, None);
}

#[test]
fn factors_that_a_round_does_not_train_keep_their_values_and_moments() {
    let start = Adapter::from_values(layout(), golden().start).unwrap();
    let optimizer = ServerOptimizer::FedAdam(ADAPTIVE);
    let whole = delta(Trainable::Both, &golden().means[0]);
    let (first, before) = optimizer.step(&start, &whole, RATE, None).unwrap();
    let before = before.unwrap();
    // A is 2 × 3, B 4 × 2.
    for (trainable, count, still) in [(Trainable::BOnly, 8, 0..6), (Trainable::AOnly, 6, 6..14)] {
        let half = delta(trainable, &vec![0.01; count]);
        let (second, after) = optimizer.step(&first, &half, RATE, Some(before.clone())).unwrap();
        let after = after.unwrap();
        for (index, moved) in (0..14).map(|index| (index, !still.contains(&index))) {
            assert_eq!(second.values()[index] != first.values()[index], moved, "value {index}");
            assert_eq!(after.momentum.values()[index] != before.momentum.values()[index], moved);
        }
    }
}

#[test]
fn moments_of_another_kind_begin_anew_and_those_of_another_adapter_are_refused() {
    let start = Adapter::from_values(layout(), golden().start).unwrap();
    let delta = delta(Trainable::Both, &golden().means[0]);
    let (_, momentum) = MOMENTUM.step(&start, &delta, RATE, None).unwrap();
    let adaptive = ServerOptimizer::FedYogi(ADAPTIVE);
    let first = adaptive.step(&start, &delta, RATE, None).unwrap();
    assert_eq!(adaptive.step(&start, &delta, RATE, momentum).unwrap(), first);

    let other = AdapterLayout::new(1, 1, 4.0, layout().modules().to_vec()).unwrap();
    let other = Moments { momentum: Adapter::zeros(Arc::new(other)), variance: None };
    MOMENTUM.step(&start, &delta, RATE, Some(other)).unwrap_err();
}
