//! The weighted mean of a round's deltas, one delta at a time.
//!
//! `fedit` averages `A` and `B` apart; `ffa` averages `B` alone, which is the exact average of the products since
//! all devices share `A`. Memory is one accumulator, whatever the number of devices. Sums are integers: any order
//! of arrival, and any split into partial sums, gives the same bits.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::clip::{Clip, clip_factor};
use crate::delta::{AdapterDelta, Trainable};
use crate::layout::AdapterLayout;
use crate::merge::{DEVICES_MAX, MergeError, MergeReport, WEIGHT_MAX, check_update};
use crate::packed::DECODED_VALUE_MAX;

/// Sums are multiples of 2⁻⁵⁶. Values are below 2²², weights at most 2³⁰ and devices at most 2¹⁶, so a sum stays
/// below 2¹²⁴; a value of 1e-9 keeps 26 bits.
const FRACTION_BITS: i32 = 56;
const _: () =
    assert!(DECODED_VALUE_MAX < (1 << 22) as f32 && WEIGHT_MAX <= 1 << 30 && DEVICES_MAX <= 1 << 16);

/// `scaled.round_ties_even() as i128`, the same to the bit, without its two library calls where 64 bits hold the value:
/// there adding and subtracting 3·2⁵¹ rounds what has a fraction.
fn to_fixed(scaled: f64) -> i128 {
    const FRACTION_BELOW: f64 = (1_u64 << 51) as f64;
    const SHIFT: f64 = 3.0 * FRACTION_BELOW;
    let magnitude = scaled.abs();
    if magnitude < FRACTION_BELOW {
        i128::from((scaled + SHIFT - SHIFT) as i64)
    } else if magnitude < (1_u64 << 62) as f64 {
        i128::from(scaled.round_ties_even() as i64)
    } else {
        scaled.round_ties_even() as i128
    }
}

/// A weighted mean in the making. `K` names a device.
#[derive(Clone, Debug)]
pub struct Merger<K> {
    layout: Arc<AdapterLayout>,
    trainable: Trainable,
    bound: Option<f64>,
    sums: Vec<i128>,
    weight_total: u64,
    norms: BTreeMap<K, f64>,
    clipped: BTreeSet<K>,
}

impl<K: Ord + Clone> Merger<K> {
    /// Begins with nothing. Each delta is clipped to the norm `bound`, if there is one ([`Clip::bound`]).
    pub fn new(
        layout: Arc<AdapterLayout>,
        trainable: Trainable,
        bound: Option<f64>,
    ) -> Result<Self, MergeError> {
        let bound = bound.map_or(Ok(None), |bound| Clip::Norm(bound).bound(&[]))?;
        let sums = vec![0; layout.trainable_parameters(trainable)];
        let (norms, clipped) = (BTreeMap::new(), BTreeSet::new());
        Ok(Self { layout, trainable, bound, sums, weight_total: 0, norms, clipped })
    }

    /// Devices so far.
    pub fn devices(&self) -> usize {
        self.norms.len()
    }

    /// Adds a device's delta with a weight (its number of samples, say). On an error nothing has changed.
    pub fn add(&mut self, device: K, weight: u64, delta: &AdapterDelta) -> Result<(), MergeError> {
        check_update(delta, weight, &self.layout, self.trainable)?;
        if self.norms.contains_key(&device) {
            return Err(MergeError::Repeated);
        }
        if self.norms.len() >= DEVICES_MAX {
            return Err(MergeError::Devices { min: 1, max: DEVICES_MAX, got: self.norms.len() + 1 });
        }
        let norm = delta.norm();
        let factor = clip_factor(norm, self.bound);
        let unit = f64::from(FRACTION_BITS).exp2();
        for (sum, value) in self.sums.iter_mut().zip(delta.values()) {
            *sum += to_fixed(f64::from(*value) * factor * unit) * i128::from(weight);
        }
        self.weight_total += weight;
        if factor < 1.0 {
            self.clipped.insert(device.clone());
        }
        self.norms.insert(device, norm);
        Ok(())
    }

    /// Takes in another partial sum of the same round. On an error nothing has changed.
    pub fn absorb(&mut self, other: Self) -> Result<(), MergeError> {
        self.layout.require(&other.layout)?;
        if self.trainable != other.trainable {
            return Err(MergeError::Trainable { expected: self.trainable, got: other.trainable });
        }
        if self.bound != other.bound {
            return Err(MergeError::Bounds);
        }
        if other.norms.keys().any(|device| self.norms.contains_key(device)) {
            return Err(MergeError::Repeated);
        }
        let devices = self.norms.len() + other.norms.len();
        if devices > DEVICES_MAX {
            return Err(MergeError::Devices { min: 1, max: DEVICES_MAX, got: devices });
        }
        for (sum, more) in self.sums.iter_mut().zip(other.sums) {
            *sum += more;
        }
        self.weight_total += other.weight_total;
        self.norms.extend(other.norms);
        self.clipped.extend(other.clipped);
        Ok(())
    }

    /// The mean, and what went into it. Fails without any device.
    pub fn finish(self) -> Result<(AdapterDelta, MergeReport<K>), MergeError> {
        if self.norms.is_empty() {
            return Err(MergeError::Devices { min: 1, max: DEVICES_MAX, got: 0 });
        }
        let unit = f64::from(FRACTION_BITS).exp2() * self.weight_total as f64;
        let values = self.sums.into_iter().map(|sum| (sum as f64 / unit) as f32).collect();
        let delta = AdapterDelta::from_values(self.layout, self.trainable, values)?;
        let report = MergeReport {
            norms: self.norms,
            clipped: self.clipped,
            excluded: BTreeSet::new(),
            bound: self.bound,
            weight_total: self.weight_total,
        };
        Ok((delta, report))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
