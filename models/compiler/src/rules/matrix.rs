//! The gradient of a product of matrices, with transposes, a factor, and batches that broadcast.

use crate::differentiate::Tape;
use crate::graph::{GraphError, Node};

/// For `y = alpha op(a) op(b)`, where `op` transposes or not: `d op(a) = alpha dy op(b)ᵀ` and
/// `d op(b) = alpha op(a)ᵀ dy`, transposed where the operand was.
pub(super) fn matmul(
    tape: &mut Tape<'_>,
    node: &Node,
    transpose_a: bool,
    transpose_b: bool,
    alpha: f32,
) -> Result<(), GraphError> {
    let (a, b) = (node.inputs[0], node.inputs[1]);
    let dy = tape.adjoint_or_zeros(node.outputs[0])?;
    if tape.wants(a) {
        let da = if transpose_a {
            tape.graph.product((b, transpose_b), (dy, true), alpha)?
        } else {
            tape.graph.product((dy, false), (b, !transpose_b), alpha)?
        };
        let da = tape.graph.unbroadcast(da, &tape.graph.shape(a).clone())?;
        tape.give(a, da)?;
    }
    if tape.wants(b) {
        let db = if transpose_b {
            tape.graph.product((dy, true), (a, transpose_a), alpha)?
        } else {
            tape.graph.product((a, !transpose_a), (dy, false), alpha)?
        };
        let db = tape.graph.unbroadcast(db, &tape.graph.shape(b).clone())?;
        tape.give(b, db)?;
    }
    match node.inputs.get(2) {
        Some(&addend) if tape.wants(addend) => tape.give(addend, dy),
        _ => Ok(()),
    }
}
