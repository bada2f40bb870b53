//! Merging: independence from order, bounds, and what is refused.
#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "a failed test may panic")]

use std::sync::Arc;

use commonweal_adapter::{
    AdapterDelta, AdapterLayout, Clip, MergeError, MergeRule, Merger, Module, Target, Trainable, Update,
    clip_norm, median_norm, merge,
};
use proptest::prelude::*;

fn layout() -> Arc<AdapterLayout> {
    let modules = vec![Module { target: Target::V, inputs: 2, outputs: 3 }];
    Arc::new(AdapterLayout::new(1, 1, 1.0, modules).unwrap())
}

fn delta(values: &[f32]) -> AdapterDelta {
    AdapterDelta::from_values(layout(), Trainable::Both, values.to_vec()).unwrap()
}

fn any_updates() -> impl Strategy<Value = Vec<Update<u8>>> {
    // Magnitudes far apart, so that a floating-point sum would depend on its order.
    let value = (-1.0_f32..1.0, -20_i32..3).prop_map(|(value, exponent)| value * 10_f32.powi(exponent));
    let update = (prop::collection::vec(value, 5), 1_u64..100_000);
    prop::collection::vec(update, 7..20).prop_map(|updates| {
        let named = updates.into_iter().enumerate();
        named
            .map(|(device, (values, weight))| Update { device: device as u8, weight, delta: delta(&values) })
            .collect()
    })
}

fn any_rule() -> impl Strategy<Value = MergeRule> {
    prop::sample::select(vec![
        MergeRule::Mean,
        MergeRule::Median,
        MergeRule::TrimmedMean { share: 0.2 },
        MergeRule::MultiKrum { byzantine: 2 },
    ])
}

proptest! {
    #[test]
    fn order_of_arrival_changes_no_bit(
        (updates, shuffled) in any_updates().prop_flat_map(|u| (Just(u.clone()), Just(u).prop_shuffle())),
        rule in any_rule(),
        clip in prop::sample::select(vec![Clip::Off, Clip::Norm(0.5), Clip::Median { factor: 1.0 }]),
        split in 0_usize..7,
    ) {
        let (merged, report) = merge(updates, rule, clip).unwrap();
        if rule == MergeRule::Mean {
            let mut parts = [(); 2].map(|()| Merger::new(layout(), Trainable::Both, report.bound).unwrap());
            for (place, update) in shuffled.iter().enumerate() {
                parts[usize::from(place > split)].add(update.device, update.weight, &update.delta).unwrap();
            }
            let [mut one, two] = parts;
            one.absorb(two).unwrap();
            prop_assert_eq!(one.finish().unwrap(), (merged.clone(), report.clone()));
        }
        prop_assert_eq!(merge(shuffled, rule, clip).unwrap(), (merged, report));
    }

    #[test]
    fn a_merge_lies_between_the_extremes(updates in any_updates(), rule in any_rule()) {
        let (merged, _) = merge(updates.clone(), rule, Clip::Off).unwrap();
        for (coordinate, value) in merged.values().iter().enumerate() {
            let column = updates.iter().map(|update| update.delta.values()[coordinate]);
            let (low, high) = column.fold((f32::MAX, f32::MIN), |(l, h), v| (l.min(v), h.max(v)));
            prop_assert!(*value >= low - 1e-15 && *value <= high + 1e-15, "{value} outside {low} to {high}");
        }
    }

    #[test]
    fn clipping_keeps_the_direction(values in prop::collection::vec(-5.0_f32..5.0, 5), bound in 0.01_f64..20.0) {
        let before = delta(&values);
        let norm = before.norm();
        let (after, clipped) = clip_norm(before, bound).unwrap();
        prop_assert_eq!(clipped, norm > bound);
        prop_assert!(after.norm() <= bound * 1.000_001 || !clipped);
        for (after, before) in after.values().iter().zip(&values) {
            let expected = f64::from(*before) * (bound / norm).min(1.0);
            prop_assert!((f64::from(*after) - expected).abs() < 1e-6);
        }
    }
}

fn with_liars(rule: MergeRule) -> Vec<f32> {
    let honest = [[1.0, 2.0, 3.0, 4.0, 5.0], [1.1, 2.1, 3.1, 4.1, 5.1], [0.9, 1.9, 2.9, 3.9, 4.9]];
    let mut updates: Vec<Update<u8>> = (0..6)
        .map(|device| Update { device, weight: 1, delta: delta(&honest[usize::from(device) % 3]) })
        .collect();
    updates.extend((6..8).map(|device| Update { device, weight: 1 << 30, delta: delta(&[-500.0; 5]) }));
    merge(updates, rule, Clip::Off).unwrap().0.into_values()
}

#[test]
fn robust_rules_bear_two_liars_of_eight_and_the_mean_does_not() {
    for rule in
        [MergeRule::Median, MergeRule::TrimmedMean { share: 0.25 }, MergeRule::MultiKrum { byzantine: 2 }]
    {
        for (value, honest) in with_liars(rule).iter().zip([1.0, 2.0, 3.0, 4.0, 5.0]) {
            assert!((value - honest).abs() <= 0.11, "{rule:?}: {value} for {honest}");
        }
    }
    assert!(with_liars(MergeRule::Mean)[0] < -400.0);
}

#[test]
fn ties_are_settled_by_device_and_not_by_arrival() {
    let same = [9, 3, 7, 1, 5].map(|device| Update { device, weight: 1, delta: delta(&[0.1; 5]) });
    let (_, report) = merge(same.into(), MergeRule::MultiKrum { byzantine: 1 }, Clip::Off).unwrap();
    assert_eq!(report.excluded.into_iter().collect::<Vec<u8>>(), [9]);
}

#[test]
fn the_largest_sums_do_not_overflow() {
    let mut merger = Merger::new(layout(), Trainable::Both, None).unwrap();
    for device in 0..=u32::from(u16::MAX) {
        merger.add(device, 1 << 30, &delta(&[2.1e6; 5])).unwrap();
    }
    let full = merger.add(1 << 20, 1, &delta(&[0.0; 5]));
    assert!(matches!(full, Err(MergeError::Devices { .. })));
    assert_eq!(merger.finish().unwrap().0.values(), [2.1e6; 5]);
}

#[test]
fn misfits_are_refused() {
    let mut merger = Merger::new(layout(), Trainable::Both, None).unwrap();
    let good = delta(&[1.0; 5]);
    merger.add(1, 1, &good).unwrap();
    assert_eq!(merger.add(1, 1, &good), Err(MergeError::Repeated));
    assert_eq!(merger.add(2, 0, &good), Err(MergeError::Weight { got: 0 }));
    assert_eq!(merger.add(2, (1 << 30) + 1, &good), Err(MergeError::Weight { got: (1 << 30) + 1 }));
    assert_eq!(merger.add(2, 1, &delta(&[3e6; 5])), Err(MergeError::Magnitude { got: 3e6 }));
    let half = AdapterDelta::from_values(layout(), Trainable::BOnly, vec![0.0; 3]).unwrap();
    assert!(matches!(merger.add(2, 1, &half), Err(MergeError::Trainable { .. })));
    assert_eq!(merger.clone().absorb(merger.clone()), Err(MergeError::Repeated));
    assert_eq!(merger.finish().unwrap().0, good);

    assert!(matches!(Merger::<u8>::new(layout(), Trainable::Both, Some(0.0)), Err(MergeError::Clip { .. })));
    let none = Merger::<u8>::new(layout(), Trainable::Both, None).unwrap().finish();
    assert!(matches!(none, Err(MergeError::Devices { got: 0, .. })));
    assert!(merge::<u8>(vec![], MergeRule::Median, Clip::Off).is_err());

    // The two of device 1 did not arrive one after the other.
    let twice = [1, 2, 1].map(|device| Update { device, weight: 1, delta: delta(&[0.1; 5]) });
    assert_eq!(merge(twice.into(), MergeRule::Median, Clip::Off), Err(MergeError::Repeated));

    let six = || (0..6).map(|device| Update { device, weight: 1, delta: delta(&[0.1; 5]) }).collect();
    let krum = merge::<u8>(six(), MergeRule::MultiKrum { byzantine: 2 }, Clip::Off);
    assert!(matches!(krum, Err(MergeError::Devices { min: 7, got: 6, .. })));
    merge::<u8>(six(), MergeRule::MultiKrum { byzantine: usize::MAX }, Clip::Off).unwrap_err();
    for share in [0.5, -0.1, f64::NAN] {
        let trimmed = merge::<u8>(six(), MergeRule::TrimmedMean { share }, Clip::Off);
        assert!(matches!(trimmed, Err(MergeError::Share { .. })), "{share}");
    }
}

#[test]
fn ffa_merges_the_b_factors_alone() {
    let half = |value| AdapterDelta::from_values(layout(), Trainable::BOnly, vec![value; 3]).unwrap();
    let mut merger = Merger::new(layout(), Trainable::BOnly, None).unwrap();
    merger.add("one", 1, &half(1.0)).unwrap();
    merger.add("two", 3, &half(3.0)).unwrap();
    let (merged, report) = merger.finish().unwrap();
    assert_eq!(merged, half(2.5));
    assert_eq!(report.weight_total, 4);
}

#[test]
fn median_norms() {
    assert_eq!(median_norm(&[]), None);
    assert_eq!(median_norm(&[3.0, 1.0, 2.0]), Some(2.0));
    assert_eq!(median_norm(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    assert_eq!(Clip::Median { factor: 2.0 }.bound(&[0.0, 0.0, 1.0]), Ok(None));
}
