//! What training changed: trained minus installed, flat in canonical order.
//!
//! Made on a device after training, [`compress`](fn@crate::compress)ed for the wire, decoded and merged by the aggregator, and
//! added to the installed adapter by [`Adapter::plus`].

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, AdapterError, check_values};
use crate::layout::{AdapterLayout, Part, TensorSpec};

/// Which factors training may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trainable {
    /// `A` and `B` (round mode `fedit`: their averages are taken apart, which is biased).
    Both,
    /// `B` alone, `A` frozen and equal everywhere (round mode `ffa`, odd rounds of `rolora`: the average is exact, the
    /// upload smaller).
    BOnly,
    /// `A` alone, `B` frozen and equal everywhere (even rounds of `rolora`).
    AOnly,
}

impl Trainable {
    /// Whether training may change this factor.
    pub fn includes(self, part: Part) -> bool {
        match self {
            Self::Both => true,
            Self::BOnly => part == Part::B,
            Self::AOnly => part == Part::A,
        }
    }
}

/// Change of an adapter. All values are finite; with one factor frozen it has only the values of the other.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterDelta {
    layout: Arc<AdapterLayout>,
    trainable: Trainable,
    values: Vec<f32>,
}

impl AdapterDelta {
    /// `trained − installed`, of the trainable factors.
    pub fn between(
        installed: &Adapter,
        trained: &Adapter,
        trainable: Trainable,
    ) -> Result<Self, AdapterError> {
        installed.layout().require(trained.layout())?;
        let layout = Arc::clone(installed.layout());
        let mut values = Vec::with_capacity(layout.trainable_parameters(trainable));
        for spec in trainable_tensors(&layout, trainable) {
            let before = installed.values().get(spec.range.clone()).unwrap_or_default();
            let after = trained.values().get(spec.range).unwrap_or_default();
            values.extend(after.iter().zip(before).map(|(after, before)| after - before));
        }
        Self::from_values(layout, trainable, values)
    }

    /// Takes the values of the trainable tensors in canonical order; all must be finite.
    pub fn from_values(
        layout: Arc<AdapterLayout>,
        trainable: Trainable,
        values: Vec<f32>,
    ) -> Result<Self, AdapterError> {
        check_values(&values, layout.trainable_parameters(trainable))?;
        Ok(Self { layout, trainable, values })
    }

    /// The adapter's layout.
    pub const fn layout(&self) -> &Arc<AdapterLayout> {
        &self.layout
    }

    /// Which factors it has.
    pub const fn trainable(&self) -> Trainable {
        self.trainable
    }

    /// Values of its tensors, flat in canonical order.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Gives the values away.
    pub fn into_values(self) -> Vec<f32> {
        self.values
    }

    /// Its tensors in order; their ranges are places in a whole [`Adapter`]'s values.
    pub fn tensors(&self) -> impl Iterator<Item = TensorSpec> {
        trainable_tensors(&self.layout, self.trainable)
    }

    /// Euclidean norm over all values.
    pub fn norm(&self) -> f64 {
        sum_of_squares(&self.values).sqrt()
    }
}

/// Added up in eight sums side by side, which processors do at once: one order on every machine.
fn sum_of_squares(values: &[f32]) -> f64 {
    let mut sums = [0.0_f64; 8];
    let (eights, rest) = values.as_chunks::<8>();
    for eight in eights {
        for (sum, value) in sums.iter_mut().zip(eight) {
            *sum += f64::from(*value) * f64::from(*value);
        }
    }
    let rest = rest.iter().map(|value| f64::from(*value) * f64::from(*value));
    sums.into_iter().chain(rest).sum()
}

fn trainable_tensors(
    layout: &AdapterLayout,
    trainable: Trainable,
) -> impl Iterator<Item = TensorSpec> + use<> {
    layout.tensors().into_iter().filter(move |spec| trainable.includes(spec.part))
}
