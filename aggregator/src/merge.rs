//! Merges a round's updates into one delta: decode, limit each device's weight, clip, combine.
//!
//! After `receive`; the server's optimizer steps along the delta. Pure: bytes in, delta and figures out. The mean
//! streams (`stream.rs`), an update for each thread in memory; the robust rules hold a bounded set.

mod stream;
mod staleness;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use commonweal_adapter::merge::{ROBUST_DEVICES_MAX, ROBUST_VALUES_MAX, WEIGHT_MAX};
use commonweal_adapter::{
    Adapter, AdapterDelta, AdapterLayout, Clip, DecodeError, DecodeLimits, MergeError, MergeReport,
    MergeRule, Merger, PackedDelta, Trainable, Update, exact,
};
use commonweal_protocol::{DeviceId, DeviceReport, RoundCounts};

use crate::config;
use crate::events::MergeFigures;

/// Why there is no candidate.
#[derive(Debug, thiserror::Error)]
pub enum CandidateError<E> {
    /// An accepted update cannot be read any more.
    #[error("update of device {device} cannot be read")]
    Read {
        /// Whose.
        device: DeviceId,
        /// Why.
        #[source]
        source: E,
    },
    /// An accepted update no longer decodes.
    #[error("update of device {device} does not decode")]
    Decode {
        /// Whose.
        device: DeviceId,
        /// Why.
        #[source]
        source: DecodeError,
    },
    /// The updates do not combine.
    #[error("the updates do not merge")]
    Merge(#[from] MergeError),
}

/// One accepted update, not yet read.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// Whose.
    pub device: DeviceId,
    /// Samples that it says it was trained on.
    pub samples: u32,
    /// Bytes of the update.
    pub length: u64,
    /// What the device counted.
    pub report: DeviceReport,
    /// Euclidean norm of the update, if it is known from receiving it.
    pub norm: Option<f64>,
    /// Releases between the one that it was trained from and the one that it is merged into.
    pub staleness: u32,
}

/// How to merge.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    rule: MergeRule,
    clip: Clip,
    weight_median_factor: f64,
    trainable: Trainable,
    staleness_exponent: f64,
}

impl Options {
    /// The mean of updates that count alike.
    pub fn unweighted(clip: Clip, trainable: Trainable) -> Self {
        Self { rule: MergeRule::Mean, clip, weight_median_factor: 0.0, trainable, staleness_exponent: 0.0 }
    }

    /// The operator's settings; `plain` clips nothing and limits no weight.
    pub fn new(merge: &config::Merge, trainable: Trainable, plain: bool) -> Self {
        Self {
            rule: if plain { MergeRule::Mean } else { merge.rule() },
            clip: if plain { Clip::Off } else { merge.clip() },
            weight_median_factor: if plain { 0.0 } else { merge.weight_median_factor },
            trainable,
            staleness_exponent: 0.0,
        }
    }

    /// Updates that lie behind count less: see `merge/staleness.rs`.
    #[must_use]
    pub fn discounting(self, staleness_exponent: f64) -> Self {
        Self { staleness_exponent, ..self }
    }

    /// What an update's delta is multiplied by.
    fn discount(&self, member: &Member) -> f64 {
        staleness::discount(member.staleness, self.staleness_exponent)
    }
}

/// Merges the updates of `members`, read with `read`, into one delta.
pub fn merge<E: Send>(
    layout: &Arc<AdapterLayout>,
    members: &[Member],
    options: &Options,
    read: impl FnMut(&DeviceId) -> Result<Vec<u8>, E> + Send,
) -> Result<(AdapterDelta, MergeFigures), CandidateError<E>> {
    let mut members = members.to_vec();
    members.sort_by_key(|member| member.device);
    let limits = DecodeLimits::of(layout, options.trainable);
    let decode = |bytes: &[u8]| PackedDelta::decode(bytes, layout, &limits);
    let weights = weights(&members, options.weight_median_factor);
    let (delta, report) = match options.rule {
        MergeRule::Mean => mean(layout, &members, &weights, options, read, decode)?,
        rule => {
            check_robust_size(layout, members.len())?;
            let updates = hold(&members, &weights, options, read, decode)?;
            commonweal_adapter::merge(updates, rule, options.clip)?
        }
    };
    let norm = delta.norm();
    Ok((delta, figures(&members, options, report, norm)))
}

/// Merges what the updates of `members` make of `start`, by their products: see [`exact`]. All are held.
pub fn merge_products<E: Send>(
    start: &Adapter,
    members: &[Member],
    options: &Options,
    read: impl FnMut(&DeviceId) -> Result<Vec<u8>, E> + Send,
) -> Result<(Adapter, MergeFigures), CandidateError<E>> {
    let mut members = members.to_vec();
    members.sort_by_key(|member| member.device);
    let layout = start.layout();
    exact::check_size(layout, members.len())?;
    let limits = DecodeLimits::of(layout, options.trainable);
    let decode = |bytes: &[u8]| PackedDelta::decode(bytes, layout, &limits);
    let weights = weights(&members, options.weight_median_factor);
    let updates = hold(&members, &weights, options, read, decode)?;
    let (merged, residual, report) = exact::merge_products(start, updates, options.clip)?;
    let moved = AdapterDelta::between(start, &merged, options.trainable).map_err(MergeError::from)?;
    let figures = figures(&members, options, report, moved.norm());
    Ok((merged, MergeFigures { rank_residual: Some(residual), ..figures }))
}

/// All updates at once.
fn hold<E: Send>(
    members: &[Member],
    weights: &[u64],
    options: &Options,
    read: impl FnMut(&DeviceId) -> Result<Vec<u8>, E> + Send,
    decode: impl Fn(&[u8]) -> Result<AdapterDelta, DecodeError> + Sync,
) -> Result<Vec<Update<DeviceId>>, CandidateError<E>> {
    let updates = Mutex::new(Vec::with_capacity(members.len()));
    stream::each(members, 1, read, decode, |place, delta| {
        let (device, weight) = (members[place].device, weights[place]);
        let delta = staleness::shorten(delta, options.discount(&members[place])).map_err(MergeError::from)?;
        updates.lock().unwrap_or_else(PoisonError::into_inner).push(Update { device, weight, delta });
        Ok(())
    })?;
    Ok(updates.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// The mean, with an update for each thread in memory. A bound that depends on the median norm needs all norms first:
/// those that `receive` noted, or else a pass over the updates.
fn mean<E: Send>(
    layout: &Arc<AdapterLayout>,
    members: &[Member],
    weights: &[u64],
    options: &Options,
    mut read: impl FnMut(&DeviceId) -> Result<Vec<u8>, E> + Send,
    decode: impl Fn(&[u8]) -> Result<AdapterDelta, DecodeError> + Sync,
) -> Result<(AdapterDelta, MergeReport<DeviceId>), CandidateError<E>> {
    let threads = stream::threads(layout.trainable_parameters(options.trainable));
    let norms = match options.clip {
        Clip::Median { .. } => norms(members, options, threads, &mut read, &decode)?,
        Clip::Off | Clip::Norm(_) => Vec::new(),
    };
    let bound = options.clip.bound(&norms)?;
    let merger = Mutex::new(Merger::new(Arc::clone(layout), options.trainable, bound)?);
    stream::each(members, threads, read, decode, |place, delta| {
        let delta = staleness::shorten(delta, options.discount(&members[place])).map_err(MergeError::from)?;
        let mut merger = merger.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(merger.add(members[place].device, weights[place], &delta)?)
    })?;
    Ok(merger.into_inner().unwrap_or_else(PoisonError::into_inner).finish()?)
}

/// The norm of each update as it counts, in order.
fn norms<E: Send>(
    members: &[Member],
    options: &Options,
    threads: usize,
    read: impl FnMut(&DeviceId) -> Result<Vec<u8>, E> + Send,
    decode: impl Fn(&[u8]) -> Result<AdapterDelta, DecodeError> + Sync,
) -> Result<Vec<f64>, CandidateError<E>> {
    let known = members.iter().map(|member| Some(member.norm? * options.discount(member)));
    if let Some(known) = known.collect() {
        return Ok(known);
    }
    let norms = Mutex::new(vec![0.0; members.len()]);
    stream::each(members, threads, read, decode, |place, delta| {
        norms.lock().unwrap_or_else(PoisonError::into_inner)[place] =
            delta.norm() * options.discount(&members[place]);
        Ok(())
    })?;
    Ok(norms.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Refuses a robust merge before its updates fill the memory.
fn check_robust_size(layout: &AdapterLayout, devices: usize) -> Result<(), MergeError> {
    if devices > ROBUST_DEVICES_MAX {
        return Err(MergeError::Devices { min: 1, max: ROBUST_DEVICES_MAX, got: devices });
    }
    let values = layout.parameters().saturating_mul(devices);
    if values > ROBUST_VALUES_MAX {
        return Err(MergeError::Values { max: ROBUST_VALUES_MAX, got: values });
    }
    Ok(())
}

/// A device says itself how many samples it has. No one counts for more than `factor` times the median, or
/// one liar would own the mean.
fn weights(members: &[Member], factor: f64) -> Vec<u64> {
    let mut samples: Vec<u64> = members.iter().map(|member| u64::from(member.samples)).collect();
    let limit = if factor > 0.0 {
        let mut sorted = samples.clone();
        sorted.sort_unstable();
        // The lower median: of two devices, the smaller one's word counts.
        let median = sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or(1);
        ((median as f64 * factor) as u64).clamp(1, WEIGHT_MAX)
    } else {
        WEIGHT_MAX
    };
    for samples in &mut samples {
        *samples = (*samples).clamp(1, limit);
    }
    samples
}

/// The norm of each update as its device sent it; the merge saw it discounted.
fn norms_sent(
    members: &[Member],
    merged: &BTreeMap<DeviceId, f64>,
    options: &Options,
) -> Vec<(DeviceId, f64)> {
    let sent = |member: &Member| {
        let merged = merged.get(&member.device).copied().unwrap_or_default();
        let norm = if member.staleness == 0 { None } else { member.norm };
        (member.device, norm.unwrap_or(merged / options.discount(member)))
    };
    members.iter().map(sent).collect()
}

fn figures(
    members: &[Member],
    options: &Options,
    report: MergeReport<DeviceId>,
    merged_norm: f64,
) -> MergeFigures {
    let mut counts = RoundCounts {
        devices_received: members.len() as u32,
        devices_merged: (members.len() - report.excluded.len()) as u32,
        updates_clipped: report.clipped.len() as u32,
        updates_excluded: report.excluded.len() as u32,
        ..RoundCounts::default()
    };
    for member in members {
        counts.sampled += u64::from(member.report.sampled);
        counts.kept += u64::from(member.report.kept);
        counts.dropped += u64::from(member.report.dropped);
        counts.refused += u64::from(member.report.refused);
        counts.revised += u64::from(member.report.revised);
        counts.uploaded_bytes = counts.uploaded_bytes.saturating_add(member.length);
    }
    MergeFigures {
        counts,
        norms: norms_sent(members, &report.norms, options),
        clipped: report.clipped.into_iter().collect(),
        excluded: report.excluded.into_iter().collect(),
        merged_norm,
        ..MergeFigures::default()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use commonweal_adapter::{Bits, CompressOptions, Module, Residual, Target, compress};
    use rand::SeedableRng;

    use super::*;

    fn layout() -> Arc<AdapterLayout> {
        let module = |target, outputs| Module { target, inputs: 16, outputs };
        let modules = vec![module(Target::Q, 16), module(Target::V, 8)];
        Arc::new(AdapterLayout::new(2, 4, 8.0, modules).unwrap())
    }

    /// A packed update whose every value is `value`.
    fn packed(value: f32) -> Vec<u8> {
        let layout = layout();
        let values = vec![value; layout.trainable_parameters(Trainable::Both)];
        let delta = AdapterDelta::from_values(layout.clone(), Trainable::Both, values).unwrap();
        let mut residual = Residual::zeros(layout, Trainable::Both);
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        // A block of equal values is exact at any width whose scale is the largest.
        let options = CompressOptions { bits: Bits::Four, ..CompressOptions::default() };
        compress(&delta, &mut residual, &options, &mut random).unwrap().into_bytes()
    }

    fn run(values: &[(f32, u32)], merge_config: &config::Merge, plain: bool) -> (f32, MergeFigures) {
        let options = Options::new(merge_config, Trainable::Both, plain);
        let device = |index: usize| DeviceId([index as u8; 16]);
        let members: Vec<_> = (0..values.len())
            .map(|index| Member {
                device: device(index),
                samples: values[index].1,
                length: 10,
                report: DeviceReport { kept: 2, sampled: 2, ..DeviceReport::default() },
                norm: None,
                staleness: 0,
            })
            .collect();
        let stored: BTreeMap<_, _> =
            values.iter().enumerate().map(|(index, (value, _))| (device(index), packed(*value))).collect();
        let read = |device: &DeviceId| Ok::<_, Infallible>(stored[device].clone());
        let (delta, figures) = merge(&layout(), &members, &options, read).unwrap();
        (delta.values()[0], figures)
    }

    fn near(got: f32, expected: f32) {
        assert!((got - expected).abs() < 0.01, "expected {expected}, got {got}");
    }

    #[test]
    fn the_mean_is_weighted_by_samples() {
        let plain = config::Merge { weight_median_factor: 0.0, ..config::Merge::default() };
        near(run(&[(0.1, 30), (0.4, 10)], &plain, true).0, 0.175);
    }

    #[test]
    fn one_device_cannot_own_the_mean() {
        let (value, figures) =
            run(&[(0.1, 10), (0.1, 10), (5.0, u32::MAX)], &config::Merge::default(), false);
        // Clipped to the median norm, and weighing 20 of 40 samples.
        near(value, 0.1);
        assert_eq!(figures.clipped, [DeviceId([2; 16])]);
        let (value, figures) = run(&[(0.1, 10), (0.1, 10), (5.0, u32::MAX)], &config::Merge::default(), true);
        near(value, 5.0);
        assert!(figures.clipped.is_empty(), "plain clips nothing");
    }

    #[test]
    fn an_update_is_read_once_if_its_norm_is_known_and_the_candidate_is_the_same() {
        let values = [0.1, 0.2, -0.4, 0.3, 0.25];
        let options = Options::new(&config::Merge::default(), Trainable::Both, false);
        let limits = DecodeLimits::of(&layout(), Trainable::Both);
        let member = |number: usize, is_known: bool| {
            let norm = PackedDelta::decode(&packed(values[number]), &layout(), &limits).unwrap().norm();
            Member {
                device: DeviceId([number as u8; 16]),
                samples: number as u32 + 1,
                length: 10,
                report: DeviceReport::default(),
                norm: is_known.then_some(norm),
                staleness: 0,
            }
        };
        let run = |known: std::ops::Range<usize>| {
            let members: Vec<_> =
                (0..values.len()).map(|number| member(number, known.contains(&number))).collect();
            let mut reads = 0;
            let read = |device: &DeviceId| {
                reads += 1;
                Ok::<_, Infallible>(packed(values[usize::from(device.0[0])]))
            };
            (merge(&layout(), &members, &options, read).unwrap(), reads)
        };
        let ((known, figures), reads) = run(0..values.len());
        assert_eq!((reads, figures.clipped.len()), (values.len(), 2));
        // One that came in under an earlier version of the program, and all of them.
        for kept in [1..values.len(), 0..0] {
            let ((other, other_figures), reads) = run(kept);
            assert_eq!((other, other_figures, reads), (known.clone(), figures.clone(), 2 * values.len()));
        }
    }

    #[test]
    fn robust_rules_leave_a_stray_out() {
        let values = [(0.1, 1), (0.11, 1), (0.09, 1), (0.1, 1), (-3.0, 1)];
        let merge = |rule| config::Merge { rule, clip_median_factor: 0.0, ..config::Merge::default() };
        near(run(&values, &merge(config::Rule::Median), false).0, 0.1);
        near(run(&values, &merge(config::Rule::TrimmedMean), false).0, 0.1);
        let (value, figures) = run(&values, &merge(config::Rule::MultiKrum), false);
        near(value, 0.1);
        assert!(figures.excluded.contains(&DeviceId([4; 16])));
        assert_eq!(figures.counts.kept, 10);
    }

    #[test]
    fn an_update_that_no_longer_decodes_names_its_device() {
        let member = Member {
            device: DeviceId([3; 16]),
            samples: 1,
            length: 1,
            report: DeviceReport::default(),
            norm: None,
            staleness: 0,
        };
        let options = Options::new(&config::Merge::default(), Trainable::Both, false);
        let error = merge(&layout(), &[member], &options, |_| Ok::<_, Infallible>(vec![9, 9])).unwrap_err();
        assert!(error.to_string().contains(&"03".repeat(16)), "{error}");
    }
}
