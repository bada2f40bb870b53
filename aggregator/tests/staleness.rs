//! The merge of updates that lie behind, against NumPy (`golden/staleness.py`).
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::convert::Infallible;
use std::sync::Arc;

use aggregator::config::{Merge, Rule};
use aggregator::merge::{Member, Options, merge};
use commonweal_adapter::{
    AdapterDelta, AdapterLayout, Bits, CompressOptions, Module, Residual, Target, Trainable, compress,
};
use commonweal_protocol::{DeviceId, DeviceReport};
use rand::SeedableRng;

#[derive(serde::Deserialize)]
struct Golden {
    signs: Vec<Vec<f32>>,
    magnitudes: Vec<f64>,
    samples: Vec<u32>,
    behind: Vec<u32>,
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Case {
    rule: String,
    exponent: f64,
    clip: f64,
    merged: Vec<f64>,
}

fn layout() -> Arc<AdapterLayout> {
    let modules = vec![Module { target: Target::Q, inputs: 16, outputs: 16 }];
    Arc::new(AdapterLayout::new(1, 4, 8.0, modules).unwrap())
}

fn packed(values: Vec<f32>) -> Vec<u8> {
    let delta = AdapterDelta::from_values(layout(), Trainable::Both, values).unwrap();
    let mut residual = Residual::zeros(layout(), Trainable::Both);
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let options = CompressOptions { bits: Bits::Eight, ..CompressOptions::default() };
    compress(&delta, &mut residual, &options, &mut random).unwrap().into_bytes()
}

#[test]
fn updates_that_lie_behind_count_as_in_numpy() {
    let golden: Golden = serde_json::from_str(include_str!("golden/staleness.json")).unwrap();
    let updates: Vec<Vec<u8>> = golden
        .signs
        .iter()
        .zip(&golden.magnitudes)
        .map(|(signs, magnitude)| packed(signs.iter().map(|sign| sign * *magnitude as f32).collect()))
        .collect();
    for case in &golden.cases {
        let settings = Merge {
            rule: if case.rule == "mean" { Rule::Mean } else { Rule::Median },
            clip_median_factor: case.clip,
            weight_median_factor: 0.0,
            ..Merge::default()
        };
        let options = Options::new(&settings, Trainable::Both, false).discounting(case.exponent);
        // With the norms that receiving noted, and without.
        for is_known in [true, false] {
            let member = |number: usize| Member {
                device: DeviceId([number as u8; 16]),
                samples: golden.samples[number],
                length: 1,
                report: DeviceReport::default(),
                norm: is_known.then_some(golden.magnitudes[number] * 128_f64.sqrt()),
                staleness: golden.behind[number],
            };
            let members: Vec<_> = (0..updates.len()).map(member).collect();
            let read = |device: &DeviceId| Ok::<_, Infallible>(updates[usize::from(device.0[0])].clone());
            let (delta, figures) = merge(&layout(), &members, &options, read).unwrap();
            for (at, (got, expected)) in delta.values().iter().zip(&case.merged).enumerate() {
                assert!(
                    (f64::from(*got) - expected).abs() < 1e-6,
                    "{}, exponent {}, clip {}: value {at}: expected {expected}, got {got}",
                    case.rule,
                    case.exponent,
                    case.clip
                );
            }
            for (number, (_, norm)) in figures.norms.iter().enumerate() {
                let sent = golden.magnitudes[number] * 128_f64.sqrt();
                assert!((norm - sent).abs() < 1e-5, "the norm is the one sent: expected {sent}, got {norm}");
            }
        }
    }
}
