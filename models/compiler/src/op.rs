//! The operators of `graph.rs`: those of ONNX (opset 21) and of ONNX Runtime's `com.microsoft` set that the graphs
//! need. `infer.rs` gives their types, `rules/` their gradients, `lower.rs` their ONNX form. `tests/rules.rs` holds
//! each gradient against finite differences of what the runtime library computes.

use crate::graph::ElementType;
use crate::shape::{Dim, Shape};

/// An element-wise function of one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unary {
    /// `-x`
    Neg,
    /// `1 / x`
    Reciprocal,
    /// The square root.
    Sqrt,
    /// `e^x`
    Exp,
    /// `1 / (1 + e^-x)`
    Sigmoid,
    /// The hyperbolic tangent.
    Tanh,
}

/// An element-wise function of two tensors, which broadcast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binary {
    /// `a + b`
    Add,
    /// `a - b`
    Sub,
    /// `a * b`
    Mul,
    /// `a / b`
    Div,
}

/// How a reduction combines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// The sum.
    Sum,
    /// The mean.
    Mean,
}

/// How a quantized matrix is packed: symmetric blocks along the rows, one scale each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packing {
    /// Bits of one weight: 4 or 8.
    pub bits: usize,
    /// Weights that share one scale.
    pub block_size: usize,
}

impl Packing {
    /// Blocks of a row; the last one may be filled up with zeros.
    pub fn blocks(self, columns: usize) -> usize {
        columns.div_ceil(self.block_size)
    }

    /// Bytes of a block's weights.
    pub fn block_bytes(self) -> usize {
        self.block_size * self.bits / 8
    }
}

/// The attributes of an attention with a cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupedAttention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Whether queries, keys and values are one tensor.
    pub fused: bool,
    /// Tokens that a query sees, itself included; without, all before it.
    pub window: Option<usize>,
    /// Whether queries and keys are rotated by their positions.
    pub rotates: bool,
    /// Factor of the products of queries and keys.
    pub scale: f32,
    /// A score becomes `cap · tanh(score / cap)`, where there is a cap.
    pub cap: Option<f32>,
}

/// The attributes of an attention between all tokens of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MultiHeadAttention {
    /// Number of heads.
    pub heads: usize,
    /// Factor of the products of queries and keys.
    pub scale: f32,
}

/// An operator and its attributes. Inputs are in the order of the documentation of each.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// `(x)`: the same tensor under another name.
    Identity,
    /// `(x, y)`: `x`, but only once `y`, of the same shape, has been computed.
    After,
    /// `(x)`
    Unary(Unary),
    /// `(a, b)`
    Binary(Binary),
    /// `(x)`: `x · sigmoid(alpha · x)`, SiLU when alpha is 1.
    QuickGelu {
        /// Slope inside the sigmoid.
        alpha: f32,
    },
    /// `(x)`: `x` times the share of a normal distribution that lies below it.
    Gelu {
        /// Whether that share is approximated by a hyperbolic tangent.
        tanh: bool,
    },
    /// `(a, b)`: whether `a < b`, integers or floats, broadcast.
    Less,
    /// `(condition, a, b)`: `a` where the condition holds, else `b`, broadcast.
    Where,
    /// `(x)`
    Reduce {
        /// How.
        reduction: Reduction,
        /// Over which axes, ascending.
        axes: Vec<usize>,
        /// Whether they stay, with size 1.
        keep: bool,
    },
    /// `(x)`: over the last axis.
    Softmax,
    /// `(x)`: over the last axis.
    LogSoftmax,
    /// `(x, weight)`: `x / sqrt(mean(x²) + epsilon) · weight` over the last axis. The second output is
    /// `1 / sqrt(mean(x²) + epsilon)`, with a last axis of size 1.
    RmsNorm {
        /// Added to the mean square.
        epsilon: f32,
    },
    /// `(x, weight)` or `(x, weight, bias)`: `(x - mean(x)) / sqrt(variance(x) + epsilon) · weight (+ bias)` over the
    /// last axis.
    LayerNorm {
        /// Added to the variance.
        epsilon: f32,
    },
    /// `(x, skip, weight)`: the RMS norm of `x + skip`, and `x + skip`.
    SkipRmsNorm {
        /// Added to the mean square.
        epsilon: f32,
    },
    /// `(a, b)` or `(a, b, c)`: `alpha · aᵀ? bᵀ? (+ c)` over the last two axes, the others broadcast. With `c` all
    /// are matrices and `c` has the shape of the product.
    MatMul {
        /// Whether `a` is transposed.
        transpose_a: bool,
        /// Whether `b` is transposed.
        transpose_b: bool,
        /// Factor of the product.
        alpha: f32,
    },
    /// `(x, packed, scales)`: `x · Wᵀ`, with `W` packed as `[outputs, blocks, bytes]`.
    MatMulNBits {
        /// Of the weights.
        packing: Packing,
        /// 4: activations are rounded to 8 bits; 0: they are not.
        accuracy_level: i64,
    },
    /// `(packed, indices, scales)`: rows of `W` as floats, with `W` packed as `[rows, bytes]`.
    GatherBlockQuantized {
        /// Of the weights.
        packing: Packing,
    },
    /// `(data, indices)`: rows along the axis.
    Gather {
        /// The axis.
        axis: usize,
    },
    /// `(data, indices)`: one element of `data` for each index, along the axis.
    GatherElements {
        /// The axis.
        axis: usize,
    },
    /// `(data, indices, updates)`: `data` with the updates added at the indices along the axis.
    ScatterAdd {
        /// The axis.
        axis: usize,
    },
    /// `(x, positions, cosines, sines)`: turns the pairs `(i, i + head_dim / 2)` of each head of
    /// `[batch, time, heads · head_dim]` by its position times a frequency; `positions` is `[1]`, where the rows
    /// begin.
    RotaryEmbedding {
        /// Number of heads.
        heads: usize,
    },
    /// `(qkv, past key, past value, lengths - 1, total length)`, with `query, key, value` in place of `qkv` if it is not
    /// fused, with `cosines, sines` behind them if it rotates, and with `key scales, value scales` at the end if the past is
    /// of 8-bit integers: causal attention with a cache that it updates; gives the context and the new keys and values.
    GroupQueryAttention(GroupedAttention),
    /// `(query, key, value, bias)`: `softmax(scale · query keyᵀ + bias) value` head by head, all of
    /// `[batch, time, heads · head_dim]`; `bias` is `[batch or 1, heads or 1, time, time]`.
    MultiHeadAttention(MultiHeadAttention),
    /// `(x)`: the same elements in another shape.
    Reshape(Shape),
    /// `(x)`: broadcast to a shape.
    Expand(Shape),
    /// `(x)`
    Transpose {
        /// Which input axis each output axis is.
        permutation: Vec<usize>,
    },
    /// `(x)`: consecutive pieces along an axis.
    Split {
        /// The axis.
        axis: usize,
        /// Their lengths.
        sizes: Vec<Dim>,
    },
    /// `(x, …)`
    Concat {
        /// The axis.
        axis: usize,
    },
    /// `(x)`: elements `start .. start + length` of an axis.
    Slice {
        /// The axis.
        axis: usize,
        /// The first element.
        start: usize,
        /// How many.
        length: usize,
    },
    /// `(x)`: zeros around an axis of fixed size.
    Pad {
        /// The axis.
        axis: usize,
        /// Zeros before.
        before: usize,
        /// Zeros after.
        after: usize,
    },
    /// `()`: the integers from zero up to a size.
    Range(Dim),
    /// `()`: one number everywhere.
    Fill {
        /// The number.
        value: f32,
        /// The shape.
        shape: Shape,
    },
    /// `(x)`
    Cast(ElementType),
}

impl Op {
    /// The operator's name in ONNX, or the nearest to it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Identity => "Identity",
            Self::After => "After",
            Self::Unary(Unary::Neg) => "Neg",
            Self::Unary(Unary::Reciprocal) => "Reciprocal",
            Self::Unary(Unary::Sqrt) => "Sqrt",
            Self::Unary(Unary::Exp) => "Exp",
            Self::Unary(Unary::Sigmoid) => "Sigmoid",
            Self::Unary(Unary::Tanh) => "Tanh",
            Self::Binary(Binary::Add) => "Add",
            Self::Binary(Binary::Sub) => "Sub",
            Self::Binary(Binary::Mul) => "Mul",
            Self::Binary(Binary::Div) => "Div",
            Self::QuickGelu { .. } => "QuickGelu",
            Self::Gelu { .. } => "Gelu",
            Self::Less => "Less",
            Self::Where => "Where",
            Self::Reduce { reduction: Reduction::Sum, .. } => "ReduceSum",
            Self::Reduce { reduction: Reduction::Mean, .. } => "ReduceMean",
            Self::Softmax => "Softmax",
            Self::LogSoftmax => "LogSoftmax",
            Self::RmsNorm { .. } => "SimplifiedLayerNormalization",
            Self::LayerNorm { .. } => "LayerNormalization",
            Self::SkipRmsNorm { .. } => "SkipSimplifiedLayerNormalization",
            Self::MatMul { .. } => "MatMul",
            Self::MatMulNBits { .. } => "MatMulNBits",
            Self::GatherBlockQuantized { .. } => "GatherBlockQuantized",
            Self::Gather { .. } => "Gather",
            Self::GatherElements { .. } => "GatherElements",
            Self::ScatterAdd { .. } => "ScatterElements",
            Self::RotaryEmbedding { .. } => "RotaryEmbedding",
            Self::GroupQueryAttention(_) => "GroupQueryAttention",
            Self::MultiHeadAttention(_) => "MultiHeadAttention",
            Self::Reshape(_) => "Reshape",
            Self::Expand(_) => "Expand",
            Self::Transpose { .. } => "Transpose",
            Self::Split { .. } => "Split",
            Self::Concat { .. } => "Concat",
            Self::Slice { .. } => "Slice",
            Self::Pad { .. } => "Pad",
            Self::Range(_) => "Range",
            Self::Fill { .. } => "ConstantOfShape",
            Self::Cast(_) => "Cast",
        }
    }
}
