//! The shape of an adapter: which linear layers it touches, and where each tensor lies in one flat vector.
//!
//! First in the flow: every adapter, delta and packed update refers to a layout. It comes from a package's
//! manifest or from an adapter file and is checked once, here.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::delta::Trainable;

/// Most decoder layers; the largest open models have 126.
pub const LAYERS_MAX: usize = 256;
/// Highest rank of an adapter.
pub const RANK_MAX: usize = 512;
/// Widest input or output of a linear layer.
pub const WIDTH_MAX: usize = 1 << 18;
/// Most values of an adapter: 1 GiB of f32.
pub const VALUES_MAX: usize = 1 << 28;

/// A linear layer inside a decoder block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// Query projection.
    Q,
    /// Key projection.
    K,
    /// Value projection.
    V,
    /// Output projection of the attention.
    O,
    /// Gate of the feed-forward network.
    Gate,
    /// Up projection of the feed-forward network.
    Up,
    /// Down projection of the feed-forward network.
    Down,
}

impl Target {
    /// All targets in canonical order.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Name in tensor names, manifests and command lines.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q => "q",
            Self::K => "k",
            Self::V => "v",
            Self::O => "o",
            Self::Gate => "gate",
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Target {
    type Err = LayoutError;

    fn from_str(name: &str) -> Result<Self, LayoutError> {
        Self::ALL
            .into_iter()
            .find(|target| target.name() == name)
            .ok_or_else(|| LayoutError::Target { got: name.chars().take(32).collect() })
    }
}

/// One adapted linear layer of each block: `outputs × inputs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Module {
    /// Which linear layer.
    pub target: Target,
    /// Width of its input.
    pub inputs: usize,
    /// Width of its output.
    pub outputs: usize,
}

/// The factor a tensor is: `y += scale · B·A·x`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// `A`, `[rank, inputs]`.
    A,
    /// `B`, `[outputs, rank]`.
    B,
}

impl Part {
    /// Name in tensor names.
    pub const fn name(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }
}

/// One tensor of an adapter and its place in the flat values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Decoder block, from 0.
    pub layer: usize,
    /// Linear layer.
    pub target: Target,
    /// Factor.
    pub part: Part,
    /// Rows of the row-major matrix.
    pub rows: usize,
    /// Columns of the row-major matrix.
    pub columns: usize,
    /// Where its `rows · columns` values lie in [`crate::Adapter::values`].
    pub range: Range<usize>,
}

impl TensorSpec {
    /// Canonical name, `layers.{layer}.{target}.{a|b}`.
    pub fn name(&self) -> String {
        format!("layers.{}.{}.{}", self.layer, self.target.name(), self.part.name())
    }

    /// `[rows, columns]`.
    pub const fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }
}

/// Shape of an adapter. The same modules are adapted in every layer, all with one rank.
///
/// Made only by [`AdapterLayout::new`] (also when deserialized), so its sizes can be trusted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RawLayout")]
pub struct AdapterLayout {
    layers: usize,
    rank: usize,
    alpha: f32,
    modules: Vec<Module>,
}

#[derive(Deserialize)]
struct RawLayout {
    layers: usize,
    rank: usize,
    alpha: f32,
    modules: Vec<Module>,
}

impl TryFrom<RawLayout> for AdapterLayout {
    type Error = LayoutError;

    fn try_from(raw: RawLayout) -> Result<Self, LayoutError> {
        Self::new(raw.layers, raw.rank, raw.alpha, raw.modules)
    }
}

/// Why a layout is refused.
#[derive(Debug, Error, PartialEq)]
pub enum LayoutError {
    /// A dimension is zero or too large.
    #[error("{what}: expected 1 to {max}, got {got}")]
    Dimension {
        /// Which dimension.
        what: String,
        /// Largest accepted.
        max: usize,
        /// What was given.
        got: usize,
    },
    /// Alpha is not a positive finite number.
    #[error("adapter alpha: expected a positive number, got {got}")]
    Alpha {
        /// What was given.
        got: f32,
    },
    /// Modules are absent or repeated.
    #[error("adapter modules: expected 1 to 7 different targets, got [{got}]")]
    Modules {
        /// The targets given.
        got: String,
    },
    /// Not the name of a target.
    #[error("adapter target: expected one of q, k, v, o, gate, up, down, got {got:?}")]
    Target {
        /// The name given.
        got: String,
    },
    /// Two layouts that must agree do not.
    #[error("adapter layout: expected {expected}, got {got}")]
    Mismatch {
        /// The layout wanted.
        expected: String,
        /// The layout found.
        got: String,
    },
}

fn dimension(what: impl Into<String>, got: usize, max: usize) -> Result<(), LayoutError> {
    if (1..=max).contains(&got) {
        Ok(())
    } else {
        Err(LayoutError::Dimension { what: what.into(), max, got })
    }
}

impl AdapterLayout {
    /// Checks the bounds and brings the modules into canonical order.
    pub fn new(
        layers: usize,
        rank: usize,
        alpha: f32,
        mut modules: Vec<Module>,
    ) -> Result<Self, LayoutError> {
        dimension("adapter layers", layers, LAYERS_MAX)?;
        dimension("adapter rank", rank, RANK_MAX)?;
        if !(alpha.is_finite() && alpha > 0.0) {
            return Err(LayoutError::Alpha { got: alpha });
        }
        modules.sort_by_key(|module| module.target);
        let repeated = modules.windows(2).any(|pair| matches!(pair, [a, b] if a.target == b.target));
        if modules.is_empty() || repeated {
            let names: Vec<&str> = modules.iter().take(8).map(|module| module.target.name()).collect();
            return Err(LayoutError::Modules { got: names.join(", ") });
        }
        for module in &modules {
            dimension(format!("inputs of {}", module.target), module.inputs, WIDTH_MAX)?;
            dimension(format!("outputs of {}", module.target), module.outputs, WIDTH_MAX)?;
        }
        let layout = Self { layers, rank, alpha, modules };
        // 256 · 512 · 7 · 2¹⁹ < 2³⁹: cannot overflow with the bounds above.
        dimension("adapter values", layout.parameters(), VALUES_MAX)?;
        Ok(layout)
    }

    /// Decoder blocks.
    pub const fn layers(&self) -> usize {
        self.layers
    }

    /// Rank of every product `B·A`.
    pub const fn rank(&self) -> usize {
        self.rank
    }

    /// LoRA's alpha.
    pub const fn alpha(&self) -> f32 {
        self.alpha
    }

    /// Adapted linear layers of each block, in canonical order.
    pub fn modules(&self) -> &[Module] {
        &self.modules
    }

    /// Factor of `B·A·x`: `alpha / rank`.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }

    /// Number of f32 values of an adapter of this layout.
    pub fn parameters(&self) -> usize {
        self.of_widths(|module| module.inputs + module.outputs)
    }

    fn of_widths(&self, width: impl Fn(&Module) -> usize) -> usize {
        self.layers * self.rank * self.modules.iter().map(width).sum::<usize>()
    }

    /// Number of values that training may change: all of them, or those of one factor.
    pub fn trainable_parameters(&self, trainable: Trainable) -> usize {
        match trainable {
            Trainable::Both => self.parameters(),
            Trainable::BOnly => self.of_widths(|module| module.outputs),
            Trainable::AOnly => self.of_widths(|module| module.inputs),
        }
    }

    /// Number of tensors: layers × modules × 2.
    pub fn tensor_count(&self) -> usize {
        self.layers * self.modules.len() * 2
    }

    /// All tensors in canonical order: layer, then target in the order of [`Target::ALL`], then `a` before `b`.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut tensors = Vec::with_capacity(self.tensor_count());
        let mut start = 0;
        for layer in 0..self.layers {
            for module in &self.modules {
                for (part, rows, columns) in
                    [(Part::A, self.rank, module.inputs), (Part::B, module.outputs, self.rank)]
                {
                    let range = start..start + rows * columns;
                    start = range.end;
                    tensors.push(TensorSpec { layer, target: module.target, part, rows, columns, range });
                }
            }
        }
        tensors
    }

    /// `Ok` when `other` is the same layout, else an error that shows both.
    pub fn require(&self, other: &Self) -> Result<(), LayoutError> {
        if self == other {
            Ok(())
        } else {
            Err(LayoutError::Mismatch { expected: self.to_string(), got: other.to_string() })
        }
    }

    /// BLAKE3 of the layout's own bytes: marks packed deltas, so that another layout's are refused.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"commonweal adapter layout 1");
        let mut number = |value: usize| {
            hasher.update(&(value as u64).to_le_bytes());
        };
        number(self.layers);
        number(self.rank);
        number(self.alpha.to_bits() as usize);
        for module in &self.modules {
            number(module.target as usize);
            number(module.inputs);
            number(module.outputs);
        }
        hasher.finalize().into()
    }
}

impl fmt::Display for AdapterLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} layers, rank {}, alpha {}, modules", self.layers, self.rank, self.alpha)?;
        for module in &self.modules {
            write!(f, " {} {}→{}", module.target, module.inputs, module.outputs)?;
        }
        Ok(())
    }
}
