//! The gradient rule of each operator, by family; `differentiate.rs` applies them from the loss backwards.

mod arithmetic;
mod matrix;
mod normalize;
mod arrange;
mod index;

use crate::differentiate::Tape;
use crate::graph::{GraphError, Node};
use crate::op::Op;

/// Gives the inputs of `node` their share of the gradients that its outputs have.
pub(crate) fn apply(tape: &mut Tape<'_>, node: &Node) -> Result<(), GraphError> {
    match &node.op {
        Op::Identity | Op::After => arithmetic::identity(tape, node),
        Op::Unary(function) => arithmetic::unary(tape, node, *function),
        Op::Binary(function) => arithmetic::binary(tape, node, *function),
        Op::QuickGelu { alpha } => arithmetic::quick_gelu(tape, node, *alpha),
        Op::Gelu { tanh: true } => arithmetic::gelu_tanh(tape, node),
        Op::Where => arithmetic::choose(tape, node),
        Op::MatMul { transpose_a, transpose_b, alpha } => {
            matrix::matmul(tape, node, *transpose_a, *transpose_b, *alpha)
        }
        Op::MatMulNBits { packing, .. } => matrix::matmul_n_bits(tape, node, *packing),
        Op::Reduce { reduction, axes, .. } => normalize::reduce(tape, node, *reduction, axes),
        Op::Softmax => normalize::softmax(tape, node),
        Op::LogSoftmax => normalize::log_softmax(tape, node),
        Op::RmsNorm { .. } => normalize::rms_norm(tape, node),
        Op::Reshape(_) => arrange::reshape(tape, node),
        Op::Expand(_) => arrange::expand(tape, node),
        Op::Transpose { permutation } => arrange::transpose(tape, node, permutation),
        Op::Split { axis, .. } => arrange::split(tape, node, *axis),
        Op::Concat { axis } => arrange::concat(tape, node, *axis),
        Op::Slice { axis, start, length } => arrange::slice(tape, node, *axis, *start, *length),
        Op::Pad { axis, before, .. } => arrange::pad(tape, node, *axis, *before),
        Op::RotaryEmbedding { heads } => arrange::rotary(tape, node, *heads),
        Op::Gather { axis } => index::gather(tape, node, *axis),
        Op::GatherElements { axis } => index::gather_elements(tape, node, *axis),
        Op::ScatterAdd { axis } => index::scatter_add(tape, node, *axis),
        Op::Less
        | Op::Gelu { tanh: false }
        | Op::LayerNorm { .. }
        | Op::MultiHeadAttention(_)
        | Op::SkipRmsNorm { .. }
        | Op::GatherBlockQuantized { .. }
        | Op::GroupQueryAttention(_)
        | Op::Range(_)
        | Op::Fill { .. }
        | Op::Cast(_) => Err(GraphError::NotDifferentiable {
            op: node.op.name(),
            reason: "it is made for inference or gives no floats",
        }),
    }
}
