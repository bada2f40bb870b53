//! Gradients of operators that pick elements by index. The indices have none.

use crate::differentiate::Tape;
use crate::graph::{GraphError, Node};
use crate::op::Op;
use crate::shape::{Dim, Shape};

pub(super) fn gather(tape: &mut Tape<'_>, node: &Node, axis: usize) -> Result<(), GraphError> {
    let (data, indices) = (node.inputs[0], node.inputs[1]);
    if tape.graph.shape(indices).rank() != 1 {
        let reason = "only a vector of indices is supported";
        return Err(GraphError::NotDifferentiable { op: node.op.name(), reason });
    }
    let dy = tape.adjoint_or_zeros(node.outputs[0])?;
    let shape = tape.graph.shape(dy).clone();
    let mut column: Shape = (0..shape.rank()).map(|_| Dim::fixed(1)).collect();
    column.0[axis] = shape.0[axis].clone();
    let column = tape.graph.reshape(indices, column)?;
    let everywhere = tape.graph.add(Op::Expand(shape), &[column])?;
    let zeros = tape.graph.fill(0.0, tape.graph.shape(data).clone())?;
    let gradient = tape.graph.add(Op::ScatterAdd { axis }, &[zeros, everywhere, dy])?;
    tape.give(data, gradient)
}

/// The gradient is computed only once the forward has picked its elements (`After`): otherwise an executor may leave
/// the picking, on which no gradient depends, until the end, and keep the large tensor until then.
pub(super) fn gather_elements(tape: &mut Tape<'_>, node: &Node, axis: usize) -> Result<(), GraphError> {
    let (data, indices, y) = (node.inputs[0], node.inputs[1], node.outputs[0]);
    let dy = tape.adjoint_or_zeros(y)?;
    let values = tape.graph.add(Op::After, &[dy, y])?;
    tape.give_scattered(data, axis, indices, values)
}

pub(super) fn scatter_add(tape: &mut Tape<'_>, node: &Node, axis: usize) -> Result<(), GraphError> {
    let (data, indices, updates) = (node.inputs[0], node.inputs[1], node.inputs[2]);
    let dy = tape.adjoint_or_zeros(node.outputs[0])?;
    if tape.wants(data) {
        tape.give(data, dy)?;
    }
    if tape.wants(updates) {
        let picked = tape.graph.add(Op::GatherElements { axis }, &[dy, indices])?;
        tape.give(updates, picked)?;
    }
    Ok(())
}
