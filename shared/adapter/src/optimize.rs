//! What the server makes of a merged delta: a step of `FedAvg`, `FedAvgM`, `FedAdam` or `FedYogi`.
//!
//! On the aggregator, after [`mod@crate::merge`]. Formulas: `FedAvgM` is Hsu et al. 2019 (arXiv 1909.06335), the
//! adaptive ones are algorithm 2 of Reddi et al. 2021 (arXiv 2003.00295), without a correction of the first steps'
//! bias and with `v₋₁ = τ²`. What a step must remember of the steps before, [`Moments`], has an adapter's form; values
//! that a round does not train keep theirs.

use std::sync::Arc;

use crate::adapter::{Adapter, AdapterError};
use crate::delta::AdapterDelta;
use crate::layout::AdapterLayout;

/// A server optimizer, `Δ` being the merged delta.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ServerOptimizer {
    /// `x ← x + η·Δ`.
    FedAvg,
    /// `m ← β·m + Δ`, `x ← x + η·m`.
    FedAvgM {
        /// `β`, 0 to below 1.
        beta: f64,
    },
    /// `m ← β₁·m + (1 − β₁)·Δ`, `v ← β₂·v + (1 − β₂)·Δ²`, `x ← x + η·m / (√v + τ)`.
    FedAdam(Adaptive),
    /// The same, but `v ← v − (1 − β₂)·Δ²·sign(v − Δ²)`.
    FedYogi(Adaptive),
}

/// Constants of the adaptive optimizers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adaptive {
    /// `β₁` and `β₂`, 0 to below 1.
    pub betas: (f64, f64),
    /// `τ`, above 0.
    pub tau: f64,
}

/// What an optimizer remembers from one release to the next.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// `m`.
    pub momentum: Adapter,
    /// `v`; `FedAvgM` has none.
    pub variance: Option<Adapter>,
}

impl ServerOptimizer {
    /// What it begins with; nothing for `FedAvg`.
    pub fn begin(&self, layout: &Arc<AdapterLayout>) -> Option<Moments> {
        let momentum = Adapter::zeros(Arc::clone(layout));
        match self {
            Self::FedAvg => None,
            Self::FedAvgM { .. } => Some(Moments { momentum, variance: None }),
            Self::FedAdam(Adaptive { tau, .. }) | Self::FedYogi(Adaptive { tau, .. }) => {
                let mut variance = momentum.clone();
                variance.values_mut().fill((tau * tau) as f32);
                Some(Moments { momentum, variance: Some(variance) })
            }
        }
    }

    /// One step from `start` at the learning rate `η`, and what is remembered of it. `before` is what was remembered
    /// with `start`; without it, or if it is another optimizer's, this is the first step.
    pub fn step(
        &self,
        start: &Adapter,
        delta: &AdapterDelta,
        learning_rate: f64,
        before: Option<Moments>,
    ) -> Result<(Adapter, Option<Moments>), AdapterError> {
        let layout = start.layout();
        layout.require(delta.layout())?;
        let Some(begun) = self.begin(layout) else {
            return Ok((start.plus(delta, learning_rate as f32)?, None));
        };
        let mut moments = match before {
            Some(before) if before.variance.is_some() == begun.variance.is_some() => before,
            _ => begun,
        };
        layout.require(moments.momentum.layout())?;
        if let Some(variance) = &moments.variance {
            layout.require(variance.layout())?;
        }
        let mut values = start.values().to_vec();
        let mut changes = delta.values().iter();
        for spec in delta.tensors() {
            for (index, change) in spec.range.zip(changes.by_ref()) {
                let (Some(value), Some(momentum)) =
                    (values.get_mut(index), moments.momentum.values_mut().get_mut(index))
                else {
                    continue;
                };
                let variance = moments.variance.as_mut().and_then(|v| v.values_mut().get_mut(index));
                let moved = self.advance(f64::from(*change), momentum, variance);
                *value = (f64::from(*value) + learning_rate * moved) as f32;
            }
        }
        let moments = Moments {
            momentum: Adapter::from_values(Arc::clone(layout), moments.momentum.into_values())?,
            variance: moments
                .variance
                .map(|variance| Adapter::from_values(Arc::clone(layout), variance.into_values()))
                .transpose()?,
        };
        Ok((Adapter::from_values(Arc::clone(layout), values)?, Some(moments)))
    }

    /// The direction of one value's step; its moments are moved on.
    fn advance(&self, change: f64, momentum: &mut f32, variance: Option<&mut f32>) -> f64 {
        match *self {
            Self::FedAvg => change,
            Self::FedAvgM { beta } => {
                let next = beta * f64::from(*momentum) + change;
                *momentum = next as f32;
                next
            }
            Self::FedAdam(Adaptive { betas, tau }) | Self::FedYogi(Adaptive { betas, tau }) => {
                let first = betas.0 * f64::from(*momentum) + (1.0 - betas.0) * change;
                *momentum = first as f32;
                let square = change * change;
                let before = variance.as_ref().map_or(tau * tau, |variance| f64::from(**variance));
                let second = match self {
                    Self::FedYogi(_) if before > square => before - (1.0 - betas.1) * square,
                    Self::FedYogi(_) if before < square => before + (1.0 - betas.1) * square,
                    Self::FedYogi(_) => before,
                    _ => betas.1 * before + (1.0 - betas.1) * square,
                };
                if let Some(variance) = variance {
                    *variance = second as f32;
                }
                first / (second.sqrt() + tau)
            }
        }
    }
}
