//! Rounds that train one factor of LoRA, against NumPy (`golden/factors.py`): which factor a round's mode names, the mean of
//! its updates, and the release that becomes of it.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::convert::Infallible;
use std::sync::Arc;

use aggregator::config::Config;
use aggregator::merge::{Member, Options, merge};
use commonweal_adapter::{
    Adapter, AdapterDelta, AdapterLayout, Bits, CompressOptions, Module, Residual, Target, Trainable,
    compress,
};
use commonweal_protocol::{DeviceId, DeviceReport, Mode, RoundId};
use rand::SeedableRng;

#[derive(serde::Deserialize)]
struct Golden {
    samples: Vec<u32>,
    ffa: Run,
    rolora: Run,
}

#[derive(serde::Deserialize)]
struct Run {
    start: Vec<f32>,
    rounds: Vec<Round>,
}

#[derive(serde::Deserialize)]
struct Round {
    factor: String,
    levels: Vec<Vec<f32>>,
    scales: Vec<f32>,
    release: Vec<f64>,
    products: Vec<f64>,
}

fn layout() -> Arc<AdapterLayout> {
    let module = |target, inputs, outputs| Module { target, inputs, outputs };
    let modules = vec![module(Target::Q, 5, 6), module(Target::Down, 7, 4)];
    Arc::new(AdapterLayout::new(2, 2, 4.0, modules).unwrap())
}

/// A device's update, which the packed form holds exactly.
fn packed(trainable: Trainable, levels: &[f32], scale: f32) -> Vec<u8> {
    let values = levels.iter().map(|level| level * scale).collect();
    let delta = AdapterDelta::from_values(layout(), trainable, values).unwrap();
    let mut residual = Residual::zeros(layout(), trainable);
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let options = CompressOptions { bits: Bits::Eight, ..CompressOptions::default() };
    compress(&delta, &mut residual, &options, &mut random).unwrap().into_bytes()
}

/// The products B·A of all layers and modules.
fn products(adapter: &Adapter) -> Vec<f64> {
    let tensors = layout().tensors();
    let pairs = tensors.chunks(2).flat_map(|specs| {
        let [a, b] = [0, 1].map(|part| adapter.matrix(&specs[part]).unwrap().mapv(f64::from));
        b.dot(&a)
    });
    pairs.collect()
}

fn assert_near(got: impl IntoIterator<Item = f64>, expected: &[f64], what: &str) {
    let got: Vec<f64> = got.into_iter().collect();
    assert_eq!(got.len(), expected.len(), "{what}");
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() < 1e-6, "{what} {at}: {got}, NumPy has {expected}");
    }
}

fn check(mode: Mode, samples: &[u32], run: &Run) {
    let mut config = Config::default();
    config.train.mode = mode;
    (config.merge.clip_median_factor, config.merge.weight_median_factor) = (0.0, 0.0);
    let mut release = Adapter::from_values(layout(), run.start.clone()).unwrap();
    for (number, round) in (1..).zip(&run.rounds) {
        let what = |part: &str| format!("{}, round {number}, {part}", mode.name());
        let trainable = config.train.trainable(RoundId(number));
        let expected = if round.factor == "A" { Trainable::AOnly } else { Trainable::BOnly };
        assert_eq!(trainable, expected, "{}", what("factor"));
        let updates: Vec<Vec<u8>> = round
            .levels
            .iter()
            .zip(&round.scales)
            .map(|(levels, scale)| packed(trainable, levels, *scale))
            .collect();
        let member = |(number, samples): (u8, &u32)| Member {
            device: DeviceId([number; 16]),
            samples: *samples,
            length: 1,
            report: DeviceReport::default(),
            norm: None,
            staleness: 0,
        };
        let members: Vec<_> = (0..).zip(samples).map(member).collect();
        let options = Options::new(&config.merge, trainable, config.plain);
        let read = |device: &DeviceId| Ok::<_, Infallible>(updates[usize::from(device.0[0])].clone());
        let (delta, _) = merge(&layout(), &members, &options, read).unwrap();
        let learning_rate = f64::from(config.merge.server_learning_rate);
        let before = release;
        release = config.merge.server_optimizer().step(&before, &delta, learning_rate, None).unwrap().0;
        for spec in layout().tensors().iter().filter(|spec| !trainable.includes(spec.part)) {
            assert_eq!(before.matrix(spec), release.matrix(spec), "{} is not trained", spec.name());
        }
        assert_near(release.values().iter().copied().map(f64::from), &round.release, &what("value"));
        assert_near(products(&release), &round.products, &what("product"));
    }
}

#[test]
fn ffa_averages_b_as_numpy_does_and_a_stays() {
    let golden: Golden = serde_json::from_str(include_str!("golden/factors.json")).unwrap();
    check(Mode::Ffa, &golden.samples, &golden.ffa);
}

#[test]
fn rolora_averages_the_factor_whose_turn_it_is_as_numpy_does() {
    let golden: Golden = serde_json::from_str(include_str!("golden/factors.json")).unwrap();
    check(Mode::Rolora, &golden.samples, &golden.rolora);
}
