//! An adapter: the values of a layout's tensors, flat in canonical order.
//!
//! Comes from [`Adapter::init`] at a project's start or from a file ([`crate::disk`]); training changes it, and
//! the change is an [`AdapterDelta`].

use std::sync::Arc;

use ndarray::{ArrayView2, ArrayViewMut2};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use thiserror::Error;

use crate::delta::AdapterDelta;
use crate::layout::{AdapterLayout, LayoutError, Part, TensorSpec};

/// Values of a LoRA adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    layout: Arc<AdapterLayout>,
    values: Vec<f32>,
}

/// Why values do not make an adapter or a delta.
#[derive(Debug, Error, PartialEq)]
pub enum AdapterError {
    /// Wrong number of values.
    #[error("adapter values: expected {expected}, got {got}")]
    Length {
        /// What the layout needs.
        expected: usize,
        /// What was given.
        got: usize,
    },
    /// A NaN or an infinity.
    #[error("adapter value {index}: expected a finite number, got {got}")]
    NotFinite {
        /// Position in the flat values.
        index: usize,
        /// What was found.
        got: f32,
    },
    /// The two sides have different layouts.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// Refuses a wrong length and values that are not finite.
pub(crate) fn check_values(values: &[f32], expected: usize) -> Result<(), AdapterError> {
    if values.len() != expected {
        return Err(AdapterError::Length { expected, got: values.len() });
    }
    match first(values, |value| !value.is_finite()) {
        Some((index, got)) => Err(AdapterError::NotFinite { index, got }),
        None => Ok(()),
    }
}

/// The first value that is `bad`, with its place. Asks whole blocks first, without a branch for each value: compilers
/// make wide instructions of that.
pub(crate) fn first(values: &[f32], bad: impl Fn(f32) -> bool) -> Option<(usize, f32)> {
    const BLOCK: usize = 1024;
    let has_bad = |block: &[f32]| block.iter().fold(false, |found, value| found | bad(*value));
    let number = values.chunks(BLOCK).position(has_bad)?;
    let (index, value) = values.iter().enumerate().skip(number * BLOCK).find(|(_, value)| bad(**value))?;
    Some((index, *value))
}

impl Adapter {
    /// Takes values in canonical order; all must be finite.
    pub fn from_values(layout: Arc<AdapterLayout>, values: Vec<f32>) -> Result<Self, AdapterError> {
        check_values(&values, layout.parameters())?;
        Ok(Self { layout, values })
    }

    /// The start of training as in PEFT: `A` uniform in ±1/√inputs (Kaiming with a = √5), `B` zero.
    ///
    /// A seed gives the same adapter on every machine, which `ffa` relies on.
    pub fn init(layout: Arc<AdapterLayout>, seed: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut values = vec![0.0; layout.parameters()];
        for spec in layout.tensors().into_iter().filter(|spec| spec.part == Part::A) {
            let bound = 1.0 / (spec.columns as f32).sqrt();
            for value in values.iter_mut().take(spec.range.end).skip(spec.range.start) {
                // 24 random bits are what an f32 in [0, 1) holds; drawn by hand so that no library changes it.
                let unit = (random.next_u32() >> 8) as f32 / (1 << 24) as f32;
                *value = bound * (2.0 * unit - 1.0);
            }
        }
        Self { layout, values }
    }

    /// An adapter that changes nothing.
    pub fn zeros(layout: Arc<AdapterLayout>) -> Self {
        let values = vec![0.0; layout.parameters()];
        Self { layout, values }
    }

    /// The layout.
    pub const fn layout(&self) -> &Arc<AdapterLayout> {
        &self.layout
    }

    /// All values, flat in canonical order.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The same, to be trained. Writing and subtracting refuse what is not finite.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// Gives the values away.
    pub fn into_values(self) -> Vec<f32> {
        self.values
    }

    /// Matrix of a tensor of this adapter's layout; `None` when `spec` is of another layout.
    pub fn matrix(&self, spec: &TensorSpec) -> Option<ArrayView2<'_, f32>> {
        ArrayView2::from_shape(spec.shape(), self.values.get(spec.range.clone())?).ok()
    }

    /// Changeable matrix of a tensor; `None` when `spec` is of another layout.
    pub fn matrix_mut(&mut self, spec: &TensorSpec) -> Option<ArrayViewMut2<'_, f32>> {
        ArrayViewMut2::from_shape(spec.shape(), self.values.get_mut(spec.range.clone())?).ok()
    }

    /// Matrix number `index` in canonical order; `None` past the end.
    ///
    /// To walk over all of them, [`AdapterLayout::tensors`] with [`Adapter::matrix`] costs less.
    pub fn tensor(&self, index: usize) -> Option<ArrayView2<'_, f32>> {
        self.matrix(self.layout.tensors().get(index)?)
    }

    /// This adapter moved by `factor · delta`.
    pub fn plus(&self, delta: &AdapterDelta, factor: f32) -> Result<Self, AdapterError> {
        self.layout.require(delta.layout())?;
        let mut values = self.values.clone();
        let mut changes = delta.values().iter();
        for spec in delta.tensors() {
            let place = values.get_mut(spec.range).unwrap_or_default();
            place.iter_mut().zip(changes.by_ref()).for_each(|(value, change)| *value += factor * change);
        }
        Self::from_values(Arc::clone(&self.layout), values)
    }
}
