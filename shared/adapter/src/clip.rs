//! Norm clipping: no device moves the adapter further than a bound.
//!
//! Before merging, always: [`crate::mean`] clips each delta as it arrives, [`merge`](fn@crate::merge) a whole set. A bound
//! from the median needs all norms first: for a streamed mean, note them when deltas are received, ask
//! [`Clip::bound`], then stream.

use serde::{Deserialize, Serialize};

use crate::delta::AdapterDelta;
use crate::merge::MergeError;

/// How far a single delta may reach.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clip {
    /// As far as it does.
    Off,
    /// To this Euclidean norm.
    Norm(f64),
    /// To this multiple of the median norm of the round.
    Median {
        /// The multiple; 1 clips the larger half of the deltas.
        factor: f64,
    },
}

impl Clip {
    /// The bound for a round with these norms; `None` when nothing is clipped.
    ///
    /// A median of zero (most devices changed nothing) clips nothing, or nobody could move the adapter.
    pub fn bound(self, norms: &[f64]) -> Result<Option<f64>, MergeError> {
        let positive = |got: f64| {
            if got.is_finite() && got > 0.0 { Ok(got) } else { Err(MergeError::Clip { got }) }
        };
        match self {
            Self::Off => Ok(None),
            Self::Norm(norm) => positive(norm).map(Some),
            Self::Median { factor } => {
                let bound = positive(factor)? * median_norm(norms).unwrap_or(0.0);
                Ok((bound > 0.0).then_some(bound))
            }
        }
    }
}

/// Median of norms, between the middle two of an even number; `None` of none.
pub fn median_norm(norms: &[f64]) -> Option<f64> {
    let mut sorted = norms.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = *sorted.get((sorted.len() - 1) / 2)?;
    Some(f64::midpoint(lower, upper))
}

/// What a delta of this norm is multiplied with: 1 within the bound, else what brings it there.
pub(crate) fn clip_factor(norm: f64, bound: Option<f64>) -> f64 {
    match bound {
        Some(bound) if norm > bound => bound / norm,
        _ => 1.0,
    }
}

/// `delta`, scaled down to the norm `norm_max` if it is longer, and whether it was.
pub fn clip_norm(delta: AdapterDelta, norm_max: f64) -> Result<(AdapterDelta, bool), MergeError> {
    let bound = Clip::Norm(norm_max).bound(&[])?;
    let factor = clip_factor(delta.norm(), bound);
    if factor >= 1.0 {
        return Ok((delta, false));
    }
    let (layout, trainable) = (delta.layout().clone(), delta.trainable());
    let values = delta.into_values().into_iter().map(|value| (f64::from(value) * factor) as f32).collect();
    Ok((AdapterDelta::from_values(layout, trainable, values)?, true))
}
