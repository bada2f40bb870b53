//! The exact average of what devices' adapters do: of their products `B·A`, not of their factors.
//!
//! On the aggregator, in place of [`mod@crate::merge`] in rounds of mode `exact`. `Σ wᵢ·Bᵢ·Aᵢ` has a higher rank than the
//! adapter, so it is factored anew and cut to the adapter's: the nearest product of that rank (Eckart and Young 1936),
//! as in `FlexLoRA` (Bai et al. 2024, arXiv 2402.11505). The dense matrix is never formed: with the factors side by
//! side, `[w₁B₁ … wₙBₙ] = Q·R` and `[A₁; …; Aₙ]ᵀ = P·S`, it is `Q·(R·Sᵀ)·Pᵀ`, and only `R·Sᵀ` is decomposed. How much
//! lies beyond the rank is told.
//!
//! All devices' deltas are held at once, as by the robust rules, and at most [`COLUMNS_MAX`] columns side by side.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::adapter::Adapter;
use crate::clip::{Clip, clip_norm};
use crate::delta::{AdapterDelta, Trainable};
use crate::layout::{AdapterLayout, Part, TensorSpec};
use crate::merge::{DEVICES_MAX, MergeError, MergeReport, ROBUST_VALUES_MAX, Update, check_update};

/// Most devices times rank: the time of a module's decomposition grows with its cube.
pub const COLUMNS_MAX: usize = 1024;

/// Columns of a matrix.
type Columns = Vec<Vec<f64>>;

/// Refuses a merge that would take too much memory or time, before its updates are read.
pub fn check_size(layout: &AdapterLayout, devices: usize) -> Result<(), MergeError> {
    let max = COLUMNS_MAX / layout.rank();
    if devices > max {
        return Err(MergeError::Devices { min: 1, max, got: devices });
    }
    let got = layout.parameters().saturating_mul(devices);
    if got > ROBUST_VALUES_MAX {
        return Err(MergeError::Values { max: ROBUST_VALUES_MAX, got });
    }
    Ok(())
}

/// The adapter whose products are nearest to the weighted means of the devices' own, each device being `start` and its
/// delta; and which share of the means' norm that leaves out, 0 to 1.
///
/// `A` has orthogonal rows of the length that `start`'s have on average, `B` the rest, so that training goes on from it
/// as from any adapter.
pub fn merge_products<K: Ord + Clone>(
    start: &Adapter,
    mut updates: Vec<Update<K>>,
    clip: Clip,
) -> Result<(Adapter, f64, MergeReport<K>), MergeError> {
    if updates.is_empty() {
        return Err(MergeError::Devices { min: 1, max: DEVICES_MAX, got: 0 });
    }
    let layout = start.layout();
    check_size(layout, updates.len())?;
    updates.sort_by(|a, b| a.device.cmp(&b.device));
    if updates.windows(2).any(|pair| matches!(pair, [a, b] if a.device == b.device)) {
        return Err(MergeError::Repeated);
    }
    for update in &updates {
        check_update(&update.delta, update.weight, layout, Trainable::Both)?;
    }
    let norms: Vec<f64> = updates.iter().map(|update| update.delta.norm()).collect();
    let bound = clip.bound(&norms)?;
    let weight_total: u64 = updates.iter().map(|update| update.weight).sum();

    let devices: Vec<K> = updates.iter().map(|update| update.device.clone()).collect();
    let (mut clipped, mut members) = (BTreeSet::new(), Vec::with_capacity(updates.len()));
    for Update { device, weight, delta } in updates {
        let (delta, is_shortened) = match bound {
            Some(bound) => clip_norm(delta, bound)?,
            None => (delta, false),
        };
        if is_shortened {
            clipped.insert(device);
        }
        members.push((weight as f64 / weight_total as f64, delta));
    }
    let (adapter, residual) = factor(start, &members)?;
    let norms = devices.into_iter().zip(norms).collect();
    Ok((adapter, residual, MergeReport { norms, clipped, excluded: BTreeSet::new(), bound, weight_total }))
}

/// All modules, each by itself. Of a delta of both factors, values lie where the adapter's do.
fn factor(start: &Adapter, members: &[(f64, AdapterDelta)]) -> Result<(Adapter, f64), MergeError> {
    let layout = start.layout();
    let mut values = vec![0.0; layout.parameters()];
    let (mut left_out, mut whole) = (0.0, 0.0);
    for pair in layout.tensors().chunks(2) {
        let [a, b] = pair else { continue };
        debug_assert!((a.part, b.part) == (Part::A, Part::B), "A lies before its B");
        let (mut inner, mut outer) = (Columns::new(), Columns::new());
        for (weight, delta) in members {
            inner.extend(rows(&moved(start, delta, a), a.columns, 1.0));
            outer.extend(columns(&moved(start, delta, b), b.columns, *weight));
        }
        let product = Product::nearest(outer, inner, layout.rank());
        left_out += product.left_out;
        whole += product.whole;
        let length = row_length(start, a);
        let places = values.get_mut(a.range.clone()).unwrap_or_default().chunks_mut(a.columns);
        for (place, row) in places.zip(&product.right) {
            place.iter_mut().zip(row).for_each(|(value, row)| *value = (row * length) as f32);
        }
        for (index, place) in values.get_mut(b.range.clone()).unwrap_or_default().iter_mut().enumerate() {
            let (row, column) = (index / b.columns, index % b.columns);
            let column = product.left.get(column).and_then(|column| column.get(row));
            *place = (column.copied().unwrap_or(0.0) / length) as f32;
        }
    }
    let residual = if whole > 0.0 { (left_out / whole).sqrt() } else { 0.0 };
    Ok((Adapter::from_values(Arc::clone(layout), values)?, residual))
}

fn moved(start: &Adapter, delta: &AdapterDelta, spec: &TensorSpec) -> Vec<f64> {
    let of = |values: &[f32]| values.get(spec.range.clone()).unwrap_or_default().to_vec();
    of(start.values()).into_iter().zip(of(delta.values())).map(|(x, d)| f64::from(x) + f64::from(d)).collect()
}

fn rows(values: &[f64], width: usize, factor: f64) -> Columns {
    values.chunks(width).map(|row| row.iter().map(|value| value * factor).collect()).collect()
}

fn columns(values: &[f64], width: usize, factor: f64) -> Columns {
    let column = |at| values.iter().skip(at).step_by(width).map(|value| value * factor).collect();
    (0..width).map(column).collect()
}

/// The root mean square of the rows' lengths; 1 if there is nothing.
fn row_length(start: &Adapter, a: &TensorSpec) -> f64 {
    let values = start.values().get(a.range.clone()).unwrap_or_default();
    let square = values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>() / a.rows as f64;
    if square > 0.0 { square.sqrt() } else { 1.0 }
}

/// A product `left · right` of low rank.
struct Product {
    /// Columns, as long as their singular values.
    left: Columns,
    /// Orthonormal rows.
    right: Columns,
    /// Square of what is beyond the rank.
    left_out: f64,
    /// Square of the norm of all.
    whole: f64,
}

impl Product {
    /// The nearest of this rank to `Σ outerⱼ · innerⱼᵀ`.
    fn nearest(outer: Columns, inner: Columns, rank: usize) -> Self {
        let (outer, inner) = (Qr::of(outer), Qr::of(inner));
        let (mut rotated, mut rotations) = (core(&outer.upper, &inner.upper), Columns::new());
        jacobi(&mut rotated, &mut rotations);
        let squares: Vec<f64> = rotated.iter().map(|column| dot(column, column)).collect();
        let mut order: Vec<usize> = (0..squares.len()).collect();
        order.sort_by(|a, b| squares[*b].total_cmp(&squares[*a]));
        let (kept, rest) = order.split_at(rank.min(order.len()));
        Self {
            left: kept.iter().map(|at| outer.apply(&rotated[*at])).collect(),
            right: kept.iter().map(|at| inner.apply(&rotations[*at])).collect(),
            left_out: rest.iter().map(|at| squares[*at]).sum(),
            whole: squares.iter().sum(),
        }
    }
}

/// `R·Sᵀ`, by columns.
fn core(outer: &Columns, inner: &Columns) -> Columns {
    let (height, width) = (outer.first().map_or(0, Vec::len), inner.first().map_or(0, Vec::len));
    let mut product = vec![vec![0.0; height]; width];
    for (outer, inner) in outer.iter().zip(inner) {
        for (column, factor) in product.iter_mut().zip(inner) {
            column.iter_mut().zip(outer).for_each(|(sum, value)| *sum += factor * value);
        }
    }
    product
}

/// A thin QR decomposition by Householder's reflections (Golub and Van Loan, section 5.2); `Q` stays in its reflections,
/// and is orthogonal whatever the rank.
struct Qr {
    height: usize,
    reflections: Columns,
    /// `R`: of each column as many values as there are reflections.
    upper: Columns,
}

impl Qr {
    fn of(mut columns: Columns) -> Self {
        let height = columns.first().map_or(0, Vec::len);
        let count = height.min(columns.len());
        let mut reflections = Vec::with_capacity(count);
        for at in 0..count {
            let mut normal = columns[at][at..].to_vec();
            normal[0] += dot(&normal, &normal).sqrt().copysign(normal[0]);
            for column in &mut columns[at..] {
                reflect(&mut column[at..], &normal);
            }
            reflections.push(normal);
        }
        for column in &mut columns {
            column.truncate(count);
        }
        Self { height, reflections, upper: columns }
    }

    /// `Q · x`.
    fn apply(&self, x: &[f64]) -> Vec<f64> {
        let mut whole = x.to_vec();
        whole.resize(self.height, 0.0);
        for (at, normal) in self.reflections.iter().enumerate().rev() {
            reflect(&mut whole[at..], normal);
        }
        whole
    }
}

/// Mirrors at the plane that `normal`, of any length, stands on; at none if it is 0.
fn reflect(values: &mut [f64], normal: &[f64]) {
    let square = dot(normal, normal);
    if square > 0.0 {
        let factor = 2.0 * dot(values, normal) / square;
        values.iter_mut().zip(normal).for_each(|(value, normal)| *value -= factor * normal);
    }
}

/// Turns columns until all are orthogonal (Hestenes 1958): then their lengths are the singular values, and `rotations`,
/// of the same number, the right singular vectors.
fn jacobi(columns: &mut Columns, rotations: &mut Columns) {
    const SWEEPS_MAX: usize = 60;
    let count = columns.len();
    *rotations =
        (0..count).map(|at| (0..count).map(|row| f64::from(u8::from(row == at))).collect()).collect();
    for _ in 0..SWEEPS_MAX {
        let mut is_done = true;
        for second in 1..count {
            for first in 0..second {
                let (a, b) = (&columns[first], &columns[second]);
                let (left, right, both) = (dot(a, a), dot(b, b), dot(a, b));
                if both.abs() <= 1e-15 * (left * right).sqrt() {
                    continue;
                }
                is_done = false;
                let ratio = (right - left) / (2.0 * both);
                let tangent = ratio.signum() / (ratio.abs() + ratio.hypot(1.0));
                let cosine = 1.0 / tangent.hypot(1.0);
                for matrix in [&mut *columns, &mut *rotations] {
                    let (head, tail) = matrix.split_at_mut(second);
                    turn(&mut head[first], &mut tail[0], cosine, cosine * tangent);
                }
            }
        }
        if is_done {
            return;
        }
    }
}

fn turn(a: &mut [f64], b: &mut [f64], cosine: f64, sine: f64) {
    for (a, b) in a.iter_mut().zip(b) {
        (*a, *b) = (cosine * *a - sine * *b, sine * *a + cosine * *b);
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_that_are_equal_or_zero_end_the_turning() {
        let mut columns = vec![vec![1.0, 2.0], vec![1.0, 2.0], vec![0.0, 0.0], vec![-3.0, 1e-200]];
        let mut rotations = Columns::new();
        jacobi(&mut columns, &mut rotations);
        for (first, a) in columns.iter().enumerate() {
            for b in &columns[first + 1..] {
                assert!(dot(a, b).abs() < 1e-14, "{a:?} {b:?}");
            }
        }
        let whole: f64 = columns.iter().map(|column| dot(column, column)).sum();
        assert!((whole - 19.0).abs() < 1e-12);
        for (at, rotation) in rotations.iter().enumerate() {
            assert!((dot(rotation, rotation) - 1.0).abs() < 1e-12, "rotation {at}");
        }
    }
}
