//! Several adapters as one: their ranks side by side, so that its change of a linear is the sum of theirs.
//!
//! `Σ sᵢ·Bᵢ·Aᵢ = s·[B₁·s₁/s, B₂·s₂/s, …]·[A₁; A₂; …]`, with `s` the first one's scale: the first one's values are taken
//! as they are, those of a `B` with another scale are rounded once. [`part`] takes one out again. A device lays its own
//! adapter beside the federation's this way (`edge-client`).

use std::{ops::Range, sync::Arc};

use ndarray::{Axis, concatenate, s};

use crate::{
    adapter::{Adapter, AdapterError},
    layout::{AdapterLayout, LayoutError, Part, TensorSpec},
};

/// The adapter whose change is the sum of these. They must adapt the same linears; ranks and alphas may differ.
pub fn stack(first: &Adapter, others: &[&Adapter]) -> Result<Adapter, AdapterError> {
    let all: Vec<&Adapter> = [&[first], others].concat();
    let (layout, scale) = (first.layout(), first.layout().scale());
    for other in others.iter().map(|other| other.layout()) {
        if other.layers() != layout.layers() || other.modules() != layout.modules() {
            let (expected, got) = (layout.to_string(), other.to_string());
            return Err(LayoutError::Mismatch { expected, got }.into());
        }
    }
    let rank = all.iter().map(|adapter| adapter.layout().rank()).sum();
    let mut stacked = Adapter::zeros(Arc::new(with_rank(layout, rank, scale)?));
    let specs = stacked.layout().tensors();
    let theirs: Vec<_> = all.iter().map(|adapter| (*adapter, adapter.layout().tensors())).collect();
    for (index, spec) in specs.iter().enumerate() {
        let part = |(adapter, specs): &(&Adapter, Vec<_>)| {
            let matrix = adapter.matrix(&specs[index])?.to_owned();
            let ratio = adapter.layout().scale() / scale;
            Some(if spec.part == Part::B { matrix * ratio } else { matrix })
        };
        let parts: Vec<_> = theirs.iter().filter_map(part).collect();
        let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
        if let (Ok(joined), Some(mut place)) =
            (concatenate(rank_axis(spec.part), &views), stacked.matrix_mut(spec))
        {
            place.assign(&joined);
        }
    }
    Adapter::from_values(Arc::clone(stacked.layout()), stacked.into_values())
}

/// Some ranks of an adapter as one of their own, of the same scale.
pub fn part(whole: &Adapter, ranks: Range<usize>) -> Result<Adapter, AdapterError> {
    let layout = whole.layout();
    if ranks.end > layout.rank() {
        let what = "end of an adapter's ranks".into();
        return Err(LayoutError::Dimension { what, max: layout.rank(), got: ranks.end }.into());
    }
    let mut cut = Adapter::zeros(Arc::new(with_rank(layout, ranks.len(), layout.scale())?));
    for (to, from) in cut.layout().tensors().iter().zip(layout.tensors()) {
        if let (Some(mut place), Some(matrix)) = (cut.matrix_mut(to), whole.matrix(&from)) {
            place.assign(&match to.part {
                Part::A => matrix.slice(s![ranks.clone(), ..]),
                Part::B => matrix.slice(s![.., ranks.clone()]),
            });
        }
    }
    Ok(cut)
}

/// Where the values of some ranks lie in an adapter of this layout, in rising order.
pub fn places(layout: &AdapterLayout, ranks: &Range<usize>) -> Vec<Range<usize>> {
    let of_tensor = |spec: TensorSpec| {
        let (start, columns) = (spec.range.start, spec.columns);
        // Rows of A are ranks, one after the other; each row of B has its ranks side by side.
        let (runs, from, to) = match spec.part {
            Part::A => (1, ranks.start * columns, ranks.end * columns),
            Part::B => (spec.rows, ranks.start, ranks.end),
        };
        (0..runs).map(move |run| start + run * columns + from..start + run * columns + to)
    };
    layout.tensors().into_iter().flat_map(of_tensor).collect()
}

fn with_rank(layout: &AdapterLayout, rank: usize, scale: f32) -> Result<AdapterLayout, LayoutError> {
    AdapterLayout::new(layout.layers(), rank, scale * rank as f32, layout.modules().to_vec())
}

fn rank_axis(part: Part) -> Axis {
    match part {
        Part::A => Axis(0),
        Part::B => Axis(1),
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array1;
    use proptest::prelude::*;

    use super::*;
    use crate::layout::{Module, Target};

    fn adapter(rank: usize, alpha: f32, seed: u64) -> Adapter {
        let modules = [(Target::Q, 5, 4), (Target::Down, 3, 6)]
            .map(|(target, inputs, outputs)| Module { target, inputs, outputs })
            .to_vec();
        let mut adapter = Adapter::init(Arc::new(AdapterLayout::new(2, rank, alpha, modules).unwrap()), seed);
        for (index, value) in adapter.values_mut().iter_mut().enumerate() {
            *value += ((index as u64 * 31 + seed * 7) % 13) as f32 * 0.1 - 0.6;
        }
        adapter
    }

    /// What an adapter adds to a linear's output, linear by linear.
    fn changes(adapter: &Adapter) -> Vec<Array1<f32>> {
        let specs = adapter.layout().tensors();
        let change = |pair: &[TensorSpec]| {
            let (a, b) = (adapter.matrix(&pair[0]).unwrap(), adapter.matrix(&pair[1]).unwrap());
            let x: Array1<f32> = (0..a.ncols()).map(|at| (at as f32 * 1.7).cos()).collect();
            b.dot(&a.dot(&x)) * adapter.layout().scale()
        };
        specs.chunks(2).map(change).collect()
    }

    proptest! {
        /// The stacked adapter adds what both add; each part of it adds what that one adds; and the places of a part's
        /// ranks hold its values.
        #[test]
        fn the_stack_is_the_sum(
            ranks in (1_usize..5, 1_usize..5),
            alphas in (0.5_f32..20.0, 0.5_f32..20.0),
            seed in 0_u64..50,
        ) {
            let (one, two) = (adapter(ranks.0, alphas.0, seed), adapter(ranks.1, alphas.1, seed + 1));
            let both = stack(&one, &[&two]).unwrap();
            prop_assert_eq!(both.layout().rank(), ranks.0 + ranks.1);
            for ((sum, one), two) in changes(&both).iter().zip(changes(&one)).zip(changes(&two)) {
                for (sum, expected) in sum.iter().zip(&(one + two)) {
                    prop_assert!((sum - expected).abs() <= 1e-4 * (1.0 + expected.abs()), "{} {}", sum, expected);
                }
            }
            let (first, second) =
                (part(&both, 0..ranks.0).unwrap(), part(&both, ranks.0..ranks.0 + ranks.1).unwrap());
            prop_assert_eq!(first.values(), one.values());
            for (got, expected) in changes(&second).iter().zip(changes(&two)) {
                for (got, expected) in got.iter().zip(&expected) {
                    prop_assert!((got - expected).abs() <= 1e-4 * (1.0 + expected.abs()));
                }
            }
            let held: Vec<f32> = places(both.layout(), &(ranks.0..ranks.0 + ranks.1))
                .into_iter()
                .flat_map(|place| both.values()[place].to_vec())
                .collect();
            prop_assert_eq!(held.as_slice(), second.values());
        }
    }

    #[test]
    fn adapters_of_other_linears_do_not_stack() {
        let modules = vec![Module { target: Target::Q, inputs: 5, outputs: 4 }];
        let other = Adapter::zeros(Arc::new(AdapterLayout::new(2, 1, 1.0, modules).unwrap()));
        let error = stack(&adapter(1, 1.0, 0), &[&other]).unwrap_err();
        assert!(matches!(error, AdapterError::Layout(LayoutError::Mismatch { .. })), "{error}");
        assert!(part(&adapter(2, 1.0, 0), 1..3).is_err());
    }
}
