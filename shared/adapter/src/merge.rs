//! Many devices' deltas to one: the rules, what they refuse, and a report.
//!
//! On the aggregator, after decoding. The mean streams through [`Merger`]; the robust rules need all deltas at
//! once, so they take a bounded set. Nothing depends on the order in which deltas arrived.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::adapter::{AdapterError, first};
use crate::clip::{Clip, clip_norm};
use crate::delta::{AdapterDelta, Trainable};
use crate::layout::{AdapterLayout, LayoutError};
use crate::mean::Merger;
use crate::packed::DECODED_VALUE_MAX;
use crate::robust;

/// Most devices in a mean.
pub const DEVICES_MAX: usize = 1 << 16;
/// Most devices in a robust merge, whose time grows with their square (Multi-Krum).
pub const ROBUST_DEVICES_MAX: usize = 1024;
/// Most values of all deltas of a robust merge together: 4 GiB of f32.
pub const ROBUST_VALUES_MAX: usize = 1 << 30;
/// Highest weight. Fractions (staleness) are expressed by scaling all weights up.
pub const WEIGHT_MAX: u64 = 1 << 30;

/// One device's part in a merge.
#[derive(Clone, Debug)]
pub struct Update<K> {
    /// Names the device; reports and ties are sorted by it.
    pub device: K,
    /// Weight in the mean, 1 to [`WEIGHT_MAX`].
    pub weight: u64,
    /// What it trained.
    pub delta: AdapterDelta,
}

/// How deltas become one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MergeRule {
    /// Weighted mean. Fits `fedit` and `ffa`, and secure aggregation; bears no dishonest device.
    Mean,
    /// Unweighted median of each coordinate.
    Median,
    /// Unweighted mean of each coordinate without its extremes.
    TrimmedMean {
        /// Share cut off at either end, 0 to below ½; rounded down to whole devices.
        share: f64,
    },
    /// Unweighted mean of the deltas nearest to each other.
    MultiKrum {
        /// Dishonest devices to bear, `f`; needs `2f + 3` devices at least.
        byzantine: usize,
    },
}

/// What a merge did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MergeReport<K: Ord> {
    /// Norm of each delta before clipping.
    pub norms: BTreeMap<K, f64>,
    /// Devices whose delta was shortened.
    pub clipped: BTreeSet<K>,
    /// Devices that Multi-Krum left out.
    pub excluded: BTreeSet<K>,
    /// The norm that deltas were clipped to.
    pub bound: Option<f64>,
    /// Sum of the weights; of unweighted rules the number of deltas that were merged.
    pub weight_total: u64,
}

/// Why deltas are not merged.
#[derive(Debug, Error, PartialEq)]
pub enum MergeError {
    /// Too few or too many.
    #[error("merge: expected {min} to {max} devices, got {got}")]
    Devices {
        /// Fewest.
        min: usize,
        /// Most.
        max: usize,
        /// What came.
        got: usize,
    },
    /// Too much memory for a robust rule.
    #[error("merge: expected at most {max} values of all deltas together, got {got}")]
    Values {
        /// Most.
        max: usize,
        /// What came.
        got: usize,
    },
    /// One device twice.
    #[error("merge: expected one delta of each device, got two of one")]
    Repeated,
    /// A weight out of bounds.
    #[error("merge: expected a weight from 1 to {WEIGHT_MAX}, got {got}")]
    Weight {
        /// What came.
        got: u64,
    },
    /// A value that cannot be summed exactly.
    #[error("merge: expected values of magnitude {DECODED_VALUE_MAX} at most, got {got}")]
    Magnitude {
        /// What came.
        got: f32,
    },
    /// A delta of another adapter.
    #[error("merge: a delta is of another adapter")]
    Layout(#[from] LayoutError),
    /// A delta of another round mode.
    #[error("merge: expected the trainable factors {expected:?}, got {got:?}")]
    Trainable {
        /// What is merged.
        expected: Trainable,
        /// What came.
        got: Trainable,
    },
    /// Partial sums that were clipped differently.
    #[error("merge: expected partial sums with one clipping bound, got two")]
    Bounds,
    /// A clipping bound that is no positive number.
    #[error("merge: expected a positive clipping bound, got {got}")]
    Clip {
        /// What was given.
        got: f64,
    },
    /// A trimmed share out of bounds.
    #[error("merge: expected a trimmed share from 0 to below 0.5, got {got}")]
    Share {
        /// What was given.
        got: f64,
    },
    /// The merged values do not make a delta.
    #[error("merge: the merged values do not make a delta")]
    Merged(#[from] AdapterError),
}

/// Refuses a delta that does not fit the merge.
pub(crate) fn check_update(
    delta: &AdapterDelta,
    weight: u64,
    layout: &AdapterLayout,
    trainable: Trainable,
) -> Result<(), MergeError> {
    layout.require(delta.layout())?;
    if delta.trainable() != trainable {
        return Err(MergeError::Trainable { expected: trainable, got: delta.trainable() });
    }
    if !(1..=WEIGHT_MAX).contains(&weight) {
        return Err(MergeError::Weight { got: weight });
    }
    match first(delta.values(), |value| value.abs() > DECODED_VALUE_MAX) {
        Some((_, got)) => Err(MergeError::Magnitude { got }),
        None => Ok(()),
    }
}

/// Merges a set of deltas that fits into memory.
pub fn merge<K: Ord + Clone>(
    mut updates: Vec<Update<K>>,
    rule: MergeRule,
    clip: Clip,
) -> Result<(AdapterDelta, MergeReport<K>), MergeError> {
    let Some(first) = updates.first() else {
        return Err(MergeError::Devices { min: 1, max: DEVICES_MAX, got: 0 });
    };
    let (layout, trainable) = (first.delta.layout().clone(), first.delta.trainable());
    updates.sort_by(|a, b| a.device.cmp(&b.device));
    if updates.windows(2).any(|pair| matches!(pair, [a, b] if a.device == b.device)) {
        return Err(MergeError::Repeated);
    }
    for update in &updates {
        check_update(&update.delta, update.weight, &layout, trainable)?;
    }
    let norms: Vec<f64> = updates.iter().map(|update| update.delta.norm()).collect();
    let bound = clip.bound(&norms)?;

    match rule {
        MergeRule::Mean => {
            let mut merger = Merger::new(layout, trainable, bound)?;
            for update in updates {
                merger.add(update.device, update.weight, &update.delta)?;
            }
            merger.finish()
        }
        MergeRule::Median => merge_rows(updates, norms, bound, 1, |rows| (robust::median(rows), None)),
        MergeRule::TrimmedMean { share } => {
            if !(0.0..0.5).contains(&share) {
                return Err(MergeError::Share { got: share });
            }
            let trim = (share * updates.len() as f64) as usize;
            merge_rows(updates, norms, bound, 1, |rows| (robust::trimmed_mean(rows, trim), None))
        }
        MergeRule::MultiKrum { byzantine } => {
            let devices_min = byzantine.saturating_mul(2).saturating_add(3);
            merge_rows(updates, norms, bound, devices_min, |rows| {
                let kept = robust::multi_krum(rows, byzantine);
                (robust::mean(rows, &kept), Some(kept))
            })
        }
    }
}

/// Clips sorted updates and applies a robust `rule`, which gives values and, if it chooses, the places it kept.
fn merge_rows<K: Ord + Clone>(
    updates: Vec<Update<K>>,
    norms: Vec<f64>,
    bound: Option<f64>,
    devices_min: usize,
    rule: impl FnOnce(&[Vec<f32>]) -> (Vec<f32>, Option<Vec<usize>>),
) -> Result<(AdapterDelta, MergeReport<K>), MergeError> {
    if updates.len() < devices_min || updates.len() > ROBUST_DEVICES_MAX {
        let (min, max) = (devices_min, ROBUST_DEVICES_MAX);
        return Err(MergeError::Devices { min, max, got: updates.len() });
    }
    let Some(first) = updates.first() else {
        return Err(MergeError::Devices { min: devices_min, max: ROBUST_DEVICES_MAX, got: 0 });
    };
    let (layout, trainable) = (first.delta.layout().clone(), first.delta.trainable());
    let got = updates.len() * layout.trainable_parameters(trainable);
    if got > ROBUST_VALUES_MAX {
        return Err(MergeError::Values { max: ROBUST_VALUES_MAX, got });
    }

    let devices: Vec<K> = updates.iter().map(|update| update.device.clone()).collect();
    let mut clipped = BTreeSet::new();
    let mut rows = Vec::with_capacity(updates.len());
    for Update { device, delta, .. } in updates {
        let (delta, shortened) = match bound {
            Some(bound) => clip_norm(delta, bound)?,
            None => (delta, false),
        };
        if shortened {
            clipped.insert(device);
        }
        rows.push(delta.into_values());
    }
    let (values, kept) = rule(&rows);
    let excluded: BTreeSet<K> = match kept {
        None => BTreeSet::new(),
        Some(kept) => {
            let left_out = devices.iter().enumerate().filter(|(place, _)| !kept.contains(place));
            left_out.map(|(_, device)| device.clone()).collect()
        }
    };
    let weight_total = (devices.len() - excluded.len()) as u64;
    let norms = devices.into_iter().zip(norms).collect();
    let report = MergeReport { norms, clipped, excluded, bound, weight_total };
    Ok((AdapterDelta::from_values(layout, trainable, values)?, report))
}
