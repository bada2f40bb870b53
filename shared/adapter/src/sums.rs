//! Exact sums of weighted values, one for each value of a delta: what [`crate::mean`] adds up.
//!
//! Sums are integers, so any order of additions and any split into partial sums gives the same bits. They are kept in
//! 64 bits for as long as it is certain that they fit, and in 128 from then on; the integers are the same either way.

use crate::merge::{DEVICES_MAX, WEIGHT_MAX};
use crate::packed::DECODED_VALUE_MAX;

/// Sums are multiples of 2⁻⁵⁶. Values are below 2²², weights at most 2³⁰ and devices at most 2¹⁶, so a sum stays
/// below 2¹²⁴; a value of 1e-9 keeps 26 bits.
const FRACTION_BITS: i32 = 56;
const _: () =
    assert!(DECODED_VALUE_MAX < (1 << 22) as f32 && WEIGHT_MAX <= 1 << 30 && DEVICES_MAX <= 1 << 16);

/// Below it, adding [`SHIFT`] rounds a fraction away.
const FRACTION_BELOW: f64 = (1_u64 << 51) as f64;
/// From 2⁵² to 2⁵³ numbers of 64 bits are one apart; this is the middle.
const SHIFT: f64 = 3.0 * FRACTION_BELOW;
/// Values that are looked at together before they are added.
const BLOCK: usize = 1024;

/// See the module.
#[derive(Clone, Debug)]
pub(crate) enum Sums {
    /// No sum is beyond `reach`, which is at most `i64::MAX`.
    Narrow {
        sums: Vec<i64>,
        reach: u128,
    },
    Wide(Vec<i128>),
}

impl Sums {
    pub(crate) fn zeros(count: usize) -> Self {
        Self::Narrow { sums: vec![0; count], reach: 0 }
    }

    /// Adds `weight · factor · value` to each sum; `factor` is at most 1. The caller has checked values and weight.
    pub(crate) fn add(&mut self, values: &[f32], factor: f64, weight: u64) {
        let scale = factor * f64::from(FRACTION_BITS).exp2();
        // Rounding keeps order, so no value comes to more than the largest one.
        let largest = to_fixed(f64::from(largest(values)) * scale).unsigned_abs();
        self.reach_for(largest * u128::from(weight));
        match self {
            Self::Narrow { sums, .. } => {
                for (sums, values) in sums.chunks_mut(BLOCK).zip(values.chunks(BLOCK)) {
                    add_block(sums, values, scale, weight as i64);
                }
            }
            Self::Wide(sums) => {
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum += to_fixed(f64::from(*value) * scale) * i128::from(weight);
                }
            }
        }
    }

    /// Adds other sums, of as many values.
    pub(crate) fn absorb(&mut self, other: Self) {
        if let Self::Narrow { reach, .. } = other {
            self.reach_for(reach);
        }
        match (&mut *self, other) {
            (Self::Narrow { sums, .. }, Self::Narrow { sums: more, .. }) => {
                sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
            }
            (Self::Wide(sums), Self::Narrow { sums: more, .. }) => {
                sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += i128::from(more));
            }
            (Self::Wide(sums), Self::Wide(more)) => {
                sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
            }
            (Self::Narrow { sums: more, .. }, Self::Wide(mut sums)) => {
                sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += i128::from(*more));
                *self = Self::Wide(sums);
            }
        }
    }

    /// Each sum divided by `weight_total`.
    pub(crate) fn means(self, weight_total: u64) -> Vec<f32> {
        let unit = f64::from(FRACTION_BITS).exp2() * weight_total as f64;
        match self {
            Self::Narrow { sums, .. } => sums.into_iter().map(|sum| (sum as f64 / unit) as f32).collect(),
            Self::Wide(sums) => sums.into_iter().map(|sum| (sum as f64 / unit) as f32).collect(),
        }
    }

    /// Makes room for sums to grow by so much.
    fn reach_for(&mut self, more: u128) {
        if let Self::Narrow { sums, reach } = self {
            *reach = reach.saturating_add(more);
            if *reach > i64::MAX as u128 {
                *self = Self::Wide(sums.iter().map(|sum| i128::from(*sum)).collect());
            }
        }
    }
}

fn largest(values: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 16];
    let (chunks, rest) = values.as_chunks::<16>();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, value)| *lane = lane.max(value.abs()));
    }
    lanes.into_iter().chain(rest.iter().map(|value| value.abs())).fold(0.0, f32::max)
}

/// Adds to sums that are known to have room: nothing here wraps around, and without checks compilers make wide
/// instructions of it.
fn add_block(sums: &mut [i64], values: &[f32], scale: f64, weight: i64) {
    if f64::from(largest(values)) * scale < FRACTION_BELOW {
        for (sum, value) in sums.iter_mut().zip(values) {
            let shifted = f64::from(*value) * scale + SHIFT;
            let fixed = shifted.to_bits().wrapping_sub(SHIFT.to_bits()) as i64;
            *sum = sum.wrapping_add(fixed.wrapping_mul(weight));
        }
    } else {
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum += to_fixed(f64::from(*value) * scale) as i64 * weight;
        }
    }
}

/// `scaled.round_ties_even() as i128`, the same to the bit, without its two library calls where 64 bits hold the value:
/// there adding and subtracting 3·2⁵¹ rounds what has a fraction.
fn to_fixed(scaled: f64) -> i128 {
    let magnitude = scaled.abs();
    if magnitude < FRACTION_BELOW {
        i128::from((scaled + SHIFT - SHIFT) as i64)
    } else if magnitude < (1_u64 << 62) as f64 {
        i128::from(scaled.round_ties_even() as i64)
    } else {
        scaled.round_ties_even() as i128
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What each sum is by definition.
    fn plain(terms: &[(Vec<f32>, f64, u64)]) -> Vec<i128> {
        let unit = 2_f64.powi(56);
        let of = |place: usize| -> i128 {
            let term = |(values, factor, weight): &(Vec<f32>, f64, u64)| {
                (f64::from(values[place]) * factor * unit).round_ties_even() as i128 * i128::from(*weight)
            };
            terms.iter().map(term).sum()
        };
        (0..terms[0].0.len()).map(of).collect()
    }

    fn wide(sums: Sums) -> Vec<i128> {
        match sums {
            Sums::Narrow { sums, reach } => {
                assert!(sums.iter().all(|sum| u128::from(sum.unsigned_abs()) <= reach), "beyond {reach}");
                sums.into_iter().map(i128::from).collect()
            }
            Sums::Wide(sums) => sums,
        }
    }

    /// Values of one term: of a magnitude around 10 to the power of `exponent`, zeros and the limits among them.
    fn term(count: usize) -> impl Strategy<Value = (Vec<f32>, f64, u64)> {
        let value = prop_oneof![8 => -1.0_f32..1.0, 1 => Just(0.0), 1 => Just(1.0)];
        let values = (prop::collection::vec(value, count), -12_i32..7).prop_map(|(values, exponent)| {
            let grown = |value: f32| value * 10_f32.powi(exponent);
            values
                .into_iter()
                .map(|value| grown(value).clamp(-DECODED_VALUE_MAX, DECODED_VALUE_MAX))
                .collect()
        });
        (values, prop_oneof![Just(1.0), 1e-9..1.0], prop_oneof![1..50_u64, 1..=WEIGHT_MAX])
    }

    proptest! {
        #[test]
        fn sums_are_those_of_128_bits_in_any_order_and_any_split(
            terms in (1..40_usize).prop_flat_map(|count| prop::collection::vec(term(count), 1..8)),
            split in 0..8_usize,
        ) {
            let sum = |terms: &mut dyn Iterator<Item = &(Vec<f32>, f64, u64)>, count| {
                let mut sums = Sums::zeros(count);
                terms.for_each(|(values, factor, weight)| sums.add(values, *factor, *weight));
                sums
            };
            let count = terms[0].0.len();
            let expected = plain(&terms);
            prop_assert_eq!(&wide(sum(&mut terms.iter(), count)), &expected);
            prop_assert_eq!(&wide(sum(&mut terms.iter().rev(), count)), &expected);
            let (left, right) = terms.split_at(split.min(terms.len()));
            let mut joined = sum(&mut left.iter(), count);
            joined.absorb(sum(&mut right.iter(), count));
            prop_assert_eq!(&wide(joined), &expected);
        }
    }

    #[test]
    fn sums_grow_out_of_64_bits_and_go_on() {
        // 2⁵⁶ · ½ · 2⁷: as much as 64 bits hold below their sign is reached with the second.
        let mut sums = Sums::zeros(2);
        let mut expected = [0_i128; 2];
        for number in 0..5 {
            assert_eq!(matches!(sums, Sums::Narrow { .. }), number < 2, "after {number}");
            sums.add(&[0.5, -0.5], 1.0, 1 << 7);
            expected = [expected[0] + (1 << 62), expected[1] - (1 << 62)];
            assert_eq!(wide(sums.clone()), expected);
        }
        let mut narrow = Sums::zeros(2);
        narrow.add(&[0.25, 0.0], 1.0, 1);
        narrow.absorb(sums);
        assert_eq!(wide(narrow.clone()), [expected[0] + (1 << 54), expected[1]]);
        assert_eq!(narrow.means(1)[1], -5.0 * 64.0);
    }

    #[test]
    fn the_quick_conversion_is_the_plain_one_to_the_bit_on_both_sides_of_each_boundary() {
        for exponent in -3..100 {
            let power = f64::from(exponent).exp2();
            for part in [0.0, 0.25, 0.5, 0.75, 1.0 - f64::EPSILON, f64::EPSILON] {
                for scaled in [power * (1.0 + part), power + part, power - part, power + 0.5, power - 0.5] {
                    for scaled in [scaled, -scaled] {
                        let plain = scaled.round_ties_even() as i128;
                        assert_eq!(to_fixed(scaled), plain, "{scaled}");
                    }
                }
            }
        }
    }
}
