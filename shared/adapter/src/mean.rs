//! The weighted mean of a round's deltas, one delta at a time.
//!
//! `fedit` averages `A` and `B` apart; `ffa` averages `B` alone, which is the exact average of the products since
//! all devices share `A`. Memory is one accumulator, whatever the number of devices. Sums are integers
//! (`sums.rs`): any order of arrival, and any split into partial sums, gives the same bits.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::clip::{Clip, clip_factor};
use crate::delta::{AdapterDelta, Trainable};
use crate::layout::AdapterLayout;
use crate::merge::{DEVICES_MAX, MergeError, MergeReport, check_update};
use crate::sums::Sums;

/// A weighted mean in the making. `K` names a device.
#[derive(Clone, Debug)]
pub struct Merger<K> {
    layout: Arc<AdapterLayout>,
    trainable: Trainable,
    bound: Option<f64>,
    sums: Sums,
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
        let sums = Sums::zeros(layout.trainable_parameters(trainable));
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
        self.sums.add(delta.values(), factor, weight);
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
        self.sums.absorb(other.sums);
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
        let values = self.sums.means(self.weight_total);
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
