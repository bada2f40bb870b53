//! Numbers that NumPy computed (`golden/make.py`) and bytes that must not change.
#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "a failed test may panic")]

use std::collections::BTreeSet;
use std::sync::Arc;

use commonweal_adapter::{
    AdapterDelta, AdapterLayout, Bits, Clip, CompressOptions, DecodeLimits, MergeReport, MergeRule, Module,
    PackedDelta, Residual, Target, Trainable, Update, compress, merge,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    rows: Vec<Vec<f32>>,
    weights: Vec<u64>,
    norms: Vec<f64>,
    mean: Vec<f64>,
    #[serde(rename = "mean_clipped_at_0.075")]
    mean_clipped: Vec<f64>,
    #[serde(rename = "clipped_at_0.075")]
    clipped: BTreeSet<usize>,
    mean_clipped_at_median: Vec<f64>,
    median: Vec<f64>,
    median_of_8: Vec<f64>,
    #[serde(rename = "trimmed_mean_0.25")]
    trimmed_mean: Vec<f64>,
    multi_krum_2: Vec<f64>,
    multi_krum_2_excluded: BTreeSet<usize>,
    quantized_8: Vec<f32>,
    quantized_4: Vec<f32>,
    quantized_3: Vec<f32>,
    quantized_2: Vec<f32>,
    quantized_4_top_half: Vec<f32>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/golden.json")).unwrap()
}

fn layout() -> Arc<AdapterLayout> {
    let modules = vec![Module { target: Target::Q, inputs: 3, outputs: 4 }];
    Arc::new(AdapterLayout::new(1, 2, 4.0, modules).unwrap())
}

fn merged(devices: usize, rule: MergeRule, clip: Clip) -> (Vec<f32>, MergeReport<usize>) {
    let golden = golden();
    let rows = golden.rows.into_iter().zip(golden.weights).enumerate().take(devices);
    let updates = rows.map(|(device, (values, weight))| {
        let delta = AdapterDelta::from_values(layout(), Trainable::Both, values).unwrap();
        Update { device, weight, delta }
    });
    let (delta, report) = merge(updates.collect(), rule, clip).unwrap();
    (delta.into_values(), report)
}

#[track_caller]
fn assert_close(got: &[f32], expected: &[f64]) {
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(expected) {
        // Both sides round to f32 once, and clipped values once before.
        assert!((f64::from(*got) - expected).abs() <= 1.3e-7 * expected.abs() + 1e-9, "{got} {expected}");
    }
}

#[test]
fn mean_and_clipping_match_numpy() {
    let golden = golden();
    let (values, report) = merged(9, MergeRule::Mean, Clip::Off);
    assert_close(&values, &golden.mean);
    assert_eq!(report.weight_total, golden.weights.iter().sum::<u64>());
    for (norm, expected) in report.norms.values().zip(&golden.norms) {
        assert!((norm - expected).abs() < 1e-12);
    }
    assert!(report.clipped.is_empty() && report.excluded.is_empty() && report.bound.is_none());

    let (values, report) = merged(9, MergeRule::Mean, Clip::Norm(0.075));
    assert_close(&values, &golden.mean_clipped);
    assert_eq!(report.clipped, golden.clipped);

    let (values, report) = merged(9, MergeRule::Mean, Clip::Median { factor: 1.0 });
    assert_close(&values, &golden.mean_clipped_at_median);
    assert_eq!(report.clipped.len(), 4);
}

#[test]
fn robust_rules_match_numpy() {
    let golden = golden();
    assert_close(&merged(9, MergeRule::Median, Clip::Off).0, &golden.median);
    assert_close(&merged(8, MergeRule::Median, Clip::Off).0, &golden.median_of_8);
    assert_close(&merged(9, MergeRule::TrimmedMean { share: 0.25 }, Clip::Off).0, &golden.trimmed_mean);
    let (values, report) = merged(9, MergeRule::MultiKrum { byzantine: 2 }, Clip::Off);
    assert_close(&values, &golden.multi_krum_2);
    assert_eq!(report.excluded, golden.multi_krum_2_excluded);
    assert_eq!(report.weight_total, 7);
}

fn packed(options: CompressOptions) -> PackedDelta {
    let delta = AdapterDelta::from_values(layout(), Trainable::Both, golden().rows.remove(0)).unwrap();
    let mut residual = Residual::zeros(layout(), Trainable::Both);
    compress(&delta, &mut residual, &options, &mut ChaCha8Rng::seed_from_u64(5)).unwrap()
}

fn decoded(bytes: &[u8]) -> Vec<f32> {
    let limits = DecodeLimits::of(&layout(), Trainable::Both);
    PackedDelta::decode(bytes, &layout(), &limits).unwrap().into_values()
}

#[test]
fn quantization_to_nearest_matches_numpy() {
    let golden = golden();
    let nearest = CompressOptions { bits: Bits::Four, block: 8, ..CompressOptions::default() };
    for (bits, expected) in [
        (Bits::Eight, &golden.quantized_8),
        (Bits::Four, &golden.quantized_4),
        (Bits::Three, &golden.quantized_3),
        (Bits::Two, &golden.quantized_2),
    ] {
        assert_eq!(&decoded(packed(CompressOptions { bits, ..nearest }).as_bytes()), expected, "{bits:?}");
    }
    let half = packed(CompressOptions { top_k: Some(0.5), ..nearest });
    assert_eq!(decoded(half.as_bytes()), golden.quantized_4_top_half);
}

/// Bytes of version 1. Those of an older release must decode for ever; if only the compressor's output changes
/// (a new zstd), replace the bytes and keep the values.
#[test]
fn packed_bytes_are_those_of_version_1() {
    let four = CompressOptions { bits: Bits::Four, block: 8, ..CompressOptions::default() };
    let two = CompressOptions { bits: Bits::Two, top_k: Some(0.5), rotate: true, stochastic: true, ..four };
    for (options, file) in [
        (four, &include_bytes!("golden/four_bits.packed")[..]),
        (two, &include_bytes!("golden/two_bits_rotated_top_half.packed")[..]),
    ] {
        assert_eq!(packed(options).as_bytes(), file);
    }
    assert_eq!(decoded(include_bytes!("golden/four_bits.packed")), golden().quantized_4);
}

/// Every byte of version 2 as `make.py` puts it together from the definition, and what an independent decoder would
/// make of it.
#[test]
fn packed_bytes_are_those_of_version_2() {
    let three = CompressOptions { block: 8, ..CompressOptions::default() };
    let file = include_bytes!("golden/three_bits.packed");
    assert_eq!(packed(three).as_bytes(), file);
    assert_eq!(decoded(file), golden().quantized_3);
}
