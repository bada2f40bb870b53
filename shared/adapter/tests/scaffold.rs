//! SCAFFOLD against NumPy (`golden/scaffold.py`), that it stops the drift which it is there for, and its update's form.
#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "a failed test may panic")]

use std::sync::Arc;

use commonweal_adapter::{
    Adapter, AdapterDelta, AdapterLayout, Bits, Clip, CompressOptions, MergeRule, Module, PackedDelta,
    Residual, Target, Trainable, Update, compress, merge,
    pair::{self, PairError},
    scaffold::{self, Correction},
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

#[derive(serde::Deserialize)]
struct Golden {
    hessians: Vec<Vec<f64>>,
    optima: Vec<Vec<f64>>,
    start: Vec<f32>,
    rounds: Vec<Round>,
}

#[derive(serde::Deserialize)]
struct Round {
    chosen: Vec<usize>,
    x: Vec<f64>,
    c: Vec<f64>,
    own: Vec<Vec<f64>>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/scaffold.json")).unwrap()
}

fn layout() -> Arc<AdapterLayout> {
    let modules = vec![Module { target: Target::Q, inputs: 3, outputs: 4 }];
    Arc::new(AdapterLayout::new(1, 2, 4.0, modules).unwrap())
}

fn mean(deltas: Vec<AdapterDelta>) -> AdapterDelta {
    let named = deltas.into_iter().enumerate();
    let updates = named.map(|(device, delta)| Update { device, weight: 1, delta }).collect();
    merge(updates, MergeRule::Mean, Clip::Off).unwrap().0
}

/// Devices with quadratics, and the server between them.
struct World {
    golden: Golden,
    x: Adapter,
    c: Adapter,
    own: Vec<Adapter>,
    local: f64,
    steps: usize,
    /// What packing does to a control's change, if it is packed.
    packing: Option<CompressOptions>,
}

impl World {
    fn new(local: f64, steps: usize) -> Self {
        let golden = golden();
        let x = Adapter::from_values(layout(), golden.start.clone()).unwrap();
        let own = vec![Adapter::zeros(layout()); golden.optima.len()];
        Self { golden, x, c: Adapter::zeros(layout()), own, local, steps, packing: None }
    }

    /// A device's round: its delta and the change of its control variate.
    fn train(&mut self, device: usize, is_corrected: bool) -> (AdapterDelta, AdapterDelta) {
        let zeros = Adapter::zeros(layout());
        let (server, own) = if is_corrected { (&self.c, &self.own[device]) } else { (&zeros, &zeros) };
        let mut correction = Correction::new(server, own).unwrap();
        let mut y = self.x.clone();
        for _ in 0..self.steps {
            let (hessian, optimum) = (&self.golden.hessians[device], &self.golden.optima[device]);
            let gradient: Vec<f32> =
                (0..14).map(|at| (hessian[at] * (f64::from(y.values()[at]) - optimum[at])) as f32).collect();
            for (at, value) in y.values_mut().iter_mut().enumerate() {
                let corrected = f64::from(gradient[at]) + f64::from(correction.shift().values()[at]);
                *value = (f64::from(*value) - self.local * corrected) as f32;
            }
            correction.observe(&gradient, &[0..6, 6..14]);
        }
        let mut change = correction.change(own, Trainable::Both).unwrap();
        if let Some(options) = &self.packing {
            change = received(&change, options, device as u64);
        }
        self.own[device] = self.own[device].plus(&change, 1.0).unwrap();
        (AdapterDelta::between(&self.x, &y, Trainable::Both).unwrap(), change)
    }

    fn round(&mut self, chosen: &[usize], rate: f32, is_corrected: bool) {
        let (moves, changes): (Vec<_>, Vec<_>) =
            chosen.iter().map(|device| self.train(*device, is_corrected)).unzip();
        let devices = self.own.len();
        self.x = self.x.plus(&mean(moves), rate).unwrap();
        self.c = scaffold::advance(&self.c, &mean(changes), chosen.len(), devices).unwrap();
    }

    /// Distance from where the sum of all devices' functions is least.
    fn distance(&self) -> f64 {
        let Golden { hessians, optima, .. } = &self.golden;
        let off = |at: usize| {
            let total: f64 = hessians.iter().map(|h| h[at]).sum();
            let best: f64 = hessians.iter().zip(optima).map(|(h, b)| h[at] * b[at]).sum::<f64>() / total;
            f64::from(self.x.values()[at]) - best
        };
        (0..14).map(|at| off(at).powi(2)).sum::<f64>().sqrt()
    }
}

/// What the server decodes of a change that was packed.
fn received(change: &AdapterDelta, options: &CompressOptions, seed: u64) -> AdapterDelta {
    let mut residual = Residual::zeros(layout(), Trainable::Both);
    let packed = compress(change, &mut residual, options, &mut ChaCha8Rng::seed_from_u64(seed)).unwrap();
    let update = pair::join(&packed, &packed);
    pair::decode(&update, &layout(), Trainable::Both, true).unwrap().1.unwrap()
}

fn assert_close(got: &Adapter, expected: &[f64], what: &str) {
    for (got, expected) in got.values().iter().zip(expected) {
        assert!((f64::from(*got) - expected).abs() < 1e-6, "{what}: {got}, NumPy has {expected}");
    }
}

#[test]
fn five_rounds_are_numpys_with_option_two() {
    let mut world = World::new(0.1, 6);
    let rounds = std::mem::take(&mut world.golden.rounds);
    for (number, round) in rounds.iter().enumerate() {
        world.round(&round.chosen, 0.8, true);
        assert_close(&world.x, &round.x, &format!("x of round {number}"));
        assert_close(&world.c, &round.c, &format!("c of round {number}"));
        for (own, expected) in world.own.iter().zip(&round.own) {
            assert_close(own, expected, &format!("a control variate of round {number}"));
        }
    }
}

#[test]
fn fedavg_drifts_where_devices_differ_and_scaffold_does_not() {
    let all = [0, 1, 2, 3];
    let run = |is_corrected, packing| {
        let mut world = World { packing, ..World::new(0.1, 20) };
        for _ in 0..150 {
            world.round(&all, 1.0, is_corrected);
        }
        world.distance()
    };
    let (drifting, corrected) = (run(false, None), run(true, None));
    assert!(drifting > 0.3, "FedAvg ends {drifting} from the optimum");
    assert!(corrected < 1e-4, "SCAFFOLD ends {corrected} from the optimum");
    let three_bits = CompressOptions { block: 8, ..CompressOptions::default() };
    let packed = run(true, Some(three_bits));
    assert!(packed < 1e-3, "SCAFFOLD with changes of three bits ends {packed} from the optimum");
}

#[test]
fn the_server_has_the_mean_of_what_devices_have_however_changes_are_packed() {
    let mut world = World::new(0.1, 6);
    world.packing = Some(CompressOptions { bits: Bits::Two, block: 8, ..CompressOptions::default() });
    for chosen in [[0, 1, 2], [1, 2, 3], [0, 2, 3]] {
        world.round(&chosen, 0.8, true);
    }
    for at in 0..14 {
        let mean = world.own.iter().map(|own| f64::from(own.values()[at])).sum::<f64>() / 4.0;
        assert!((f64::from(world.c.values()[at]) - mean).abs() < 1e-6);
    }
}

#[test]
fn an_update_of_two_parts_is_told_from_one_of_one() {
    let delta = AdapterDelta::from_values(layout(), Trainable::BOnly, vec![0.5; 8]).unwrap();
    let control = AdapterDelta::from_values(layout(), Trainable::BOnly, vec![-0.25; 8]).unwrap();
    let pack = |delta: &AdapterDelta| -> PackedDelta {
        let options = CompressOptions { bits: Bits::Eight, ..CompressOptions::default() };
        let mut residual = Residual::zeros(layout(), Trainable::BOnly);
        compress(delta, &mut residual, &options, &mut ChaCha8Rng::seed_from_u64(1)).unwrap()
    };
    let (one, two) = (pack(&delta), pair::join(&pack(&delta), &pack(&control)));
    assert!(two.len() <= pair::bytes_max(&layout(), Trainable::BOnly, true));
    let (first, second) = pair::decode(&two, &layout(), Trainable::BOnly, true).unwrap();
    assert!((first.values()[0] - 0.5).abs() < 0.01 && (second.unwrap().values()[7] + 0.25).abs() < 0.01);

    let decode = |bytes: &[u8], has_control| pair::decode(bytes, &layout(), Trainable::BOnly, has_control);
    assert!(matches!(decode(one.as_bytes(), true), Err(PairError::Form { .. })));
    assert!(matches!(decode(&two, false), Err(PairError::Delta(_))));
    for end in 0..two.len() {
        decode(&two[..end], true).unwrap_err();
    }
    let mut long = two.clone();
    long[1..5].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(decode(&long, true), Err(PairError::Form { .. })));
    // A part beyond what an honest one can have is refused before it is read.
    let padded = pair::join(&pack(&delta), &pack(&control));
    let padded = [padded, vec![0; PackedDelta::bytes_max(&layout(), Trainable::BOnly)]].concat();
    assert!(matches!(decode(&padded, true), Err(PairError::Control(_))));
}
