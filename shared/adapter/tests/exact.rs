//! The exact merge against NumPy's SVD of the dense products (`golden/exact.py`), and what it must leave alone.
#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "a failed test may panic")]

use std::sync::Arc;

use commonweal_adapter::{
    Adapter, AdapterDelta, AdapterLayout, Clip, MergeError, Module, Target, Trainable, Update,
    exact::{COLUMNS_MAX, check_size, merge_products},
};
use proptest::prelude::*;

#[derive(serde::Deserialize)]
struct Golden {
    start: Vec<f32>,
    deltas: Vec<Vec<f32>>,
    weights: Vec<u64>,
    products: Vec<Vec<Vec<f64>>>,
    residual: f64,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/exact.json")).unwrap()
}

fn layout() -> Arc<AdapterLayout> {
    let module = |target, inputs, outputs| Module { target, inputs, outputs };
    let modules = vec![module(Target::Q, 3, 4), module(Target::Down, 9, 5)];
    Arc::new(AdapterLayout::new(2, 2, 4.0, modules).unwrap())
}

fn adapter(values: Vec<f32>) -> Adapter {
    Adapter::from_values(layout(), values).unwrap()
}

fn update(device: usize, weight: u64, values: Vec<f32>) -> Update<usize> {
    Update { device, weight, delta: AdapterDelta::from_values(layout(), Trainable::Both, values).unwrap() }
}

/// `B·A` of each module, row by row.
fn products(adapter: &Adapter) -> Vec<Vec<Vec<f64>>> {
    let wide = |spec: &commonweal_adapter::TensorSpec| adapter.matrix(spec).unwrap().mapv(f64::from);
    let product = |pair: &[commonweal_adapter::TensorSpec]| wide(&pair[1]).dot(&wide(&pair[0]));
    let rows = |product: ndarray::Array2<f64>| product.outer_iter().map(|row| row.to_vec()).collect();
    adapter.layout().tensors().chunks(2).map(|pair| rows(product(pair))).collect()
}

fn assert_products(got: &Adapter, expected: &[Vec<Vec<f64>>]) {
    for (module, (got, expected)) in products(got).iter().zip(expected).enumerate() {
        for (got, expected) in got.iter().flatten().zip(expected.iter().flatten()) {
            assert!((got - expected).abs() < 1e-6, "module {module}: {got}, NumPy has {expected}");
        }
    }
}

#[test]
fn products_and_what_is_left_out_are_numpys() {
    let golden = golden();
    let parts = golden.deltas.into_iter().zip(&golden.weights).enumerate();
    let updates: Vec<_> = parts.map(|(at, (values, weight))| update(at, *weight, values)).collect();
    let start = adapter(golden.start);
    let (merged, residual, report) = merge_products(&start, updates.clone(), Clip::Off).unwrap();
    assert_products(&merged, &golden.products);
    assert!((residual - golden.residual).abs() < 1e-9, "{residual}, NumPy has {}", golden.residual);
    assert_eq!(report.weight_total, golden.weights.iter().sum::<u64>());

    let turned = updates.into_iter().rev().collect();
    assert_eq!(merge_products(&start, turned, Clip::Off).unwrap().0, merged, "in any order of arrival");
}

#[test]
fn one_device_or_many_alike_are_merged_to_what_they_do() {
    let golden = golden();
    let start = adapter(golden.start);
    let values = golden.deltas[0].clone();
    let delta = AdapterDelta::from_values(layout(), Trainable::Both, values.clone()).unwrap();
    let expected = products(&start.plus(&delta, 1.0).unwrap());
    for devices in [1, 5] {
        let updates = (0..devices).map(|at| update(at, 1 + at as u64, values.clone())).collect();
        let (merged, residual, _) = merge_products(&start, updates, Clip::Off).unwrap();
        assert_products(&merged, &expected);
        assert!(residual < 1e-7, "{residual}");
    }
}

#[test]
fn an_adapter_that_does_nothing_can_still_be_trained() {
    let start = Adapter::init(layout(), 3);
    let updates = vec![update(0, 1, vec![0.0; layout().parameters()])];
    let (merged, residual, _) = merge_products(&start, updates, Clip::Off).unwrap();
    assert_eq!(residual, 0.0);
    for pair in merged.layout().tensors().chunks(2) {
        let (a, b) = (merged.matrix(&pair[0]).unwrap(), merged.matrix(&pair[1]).unwrap());
        assert!(b.iter().all(|value| *value == 0.0));
        assert!(a.outer_iter().all(|row| row.dot(&row) > 0.01), "a row of zeros would learn nothing");
    }
}

#[test]
fn clipping_and_limits_are_those_of_the_other_rules() {
    let golden = golden();
    let start = adapter(golden.start);
    let long = golden.deltas[1].iter().map(|value| value * 100.0).collect();
    let updates = vec![update(0, 1, golden.deltas[0].clone()), update(1, 1, long)];
    let (_, _, report) = merge_products(&start, updates, Clip::Norm(1.0)).unwrap();
    assert!(report.clipped.contains(&1) && report.bound == Some(1.0));

    let twice = vec![update(0, 1, golden.deltas[0].clone()), update(0, 1, golden.deltas[1].clone())];
    assert_eq!(merge_products(&start, twice, Clip::Off).unwrap_err(), MergeError::Repeated);
    let none = merge_products::<usize>(&start, Vec::new(), Clip::Off);
    assert!(matches!(none, Err(MergeError::Devices { got: 0, .. })));
    let half = AdapterDelta::from_values(layout(), Trainable::BOnly, vec![0.0; 36]).unwrap();
    let half = vec![Update { device: 0, weight: 1, delta: half }];
    assert!(matches!(merge_products(&start, half, Clip::Off), Err(MergeError::Trainable { .. })));
    check_size(&layout(), COLUMNS_MAX / 2).unwrap();
    let got = COLUMNS_MAX / 2 + 1;
    assert_eq!(check_size(&layout(), got), Err(MergeError::Devices { min: 1, max: COLUMNS_MAX / 2, got }));
}

proptest! {
    /// No other adapter of this rank is nearer: not the mean of the factors either.
    #[test]
    fn it_is_nearer_to_the_mean_of_the_products_than_the_mean_of_the_factors(
        deltas in prop::collection::vec(prop::collection::vec(-1.0_f32..1.0, 84), 2..6),
    ) {
        let start = Adapter::init(layout(), 1);
        let devices: Vec<Adapter> = deltas
            .iter()
            .map(|values| {
                let delta = AdapterDelta::from_values(layout(), Trainable::Both, values.clone()).unwrap();
                start.plus(&delta, 1.0).unwrap()
            })
            .collect();
        let count = devices.len() as f64;
        let all: Vec<_> = devices.iter().map(products).collect();
        let distance = |adapter: &Adapter| {
            let mut square = 0.0;
            for (module, product) in products(adapter).iter().enumerate() {
                for (row, values) in product.iter().enumerate() {
                    for (column, value) in values.iter().enumerate() {
                        let mean = all.iter().map(|own| own[module][row][column]).sum::<f64>() / count;
                        square += (value - mean).powi(2);
                    }
                }
            }
            square.sqrt()
        };
        let updates: Vec<_> = deltas.iter().enumerate().map(|(at, values)| update(at, 1, values.clone())).collect();
        let (exact, residual, _) = merge_products(&start, updates.clone(), Clip::Off).unwrap();
        let apart = commonweal_adapter::merge(updates, commonweal_adapter::MergeRule::Mean, Clip::Off).unwrap().0;
        let apart = start.plus(&apart, 1.0).unwrap();
        prop_assert!(distance(&exact) <= distance(&apart) + 1e-5);
        prop_assert!((0.0..=1.0).contains(&residual));
    }
}
