//! Gradients of reductions and of what is normalized by one. `y` is the output, `dy` its gradient.

use crate::differentiate::{Adjoint, Tape};
use crate::graph::{GraphError, Node};
use crate::op::{Op, Reduction, Unary};
use crate::shape::{Dim, Shape};

pub(super) fn reduce(
    tape: &mut Tape<'_>,
    node: &Node,
    reduction: Reduction,
    axes: &[usize],
) -> Result<(), GraphError> {
    let x = node.inputs[0];
    let mut dy = tape.adjoint_or_zeros(node.outputs[0])?;
    let shape = tape.graph.shape(x).clone();
    if reduction == Reduction::Mean {
        let count = axes.iter().fold(Dim::fixed(1), |count, &axis| count.times(&shape.0[axis]));
        let Some(count) = count.as_fixed() else {
            let reason = "the mean is over an axis whose size is not known when compiling";
            return Err(GraphError::NotDifferentiable { op: node.op.name(), reason });
        };
        let share = tape.graph.scalar(1.0 / count.max(1) as f32)?;
        dy = tape.graph.times(dy, share)?;
    }
    let kept = shape.0.iter().enumerate();
    let kept: Shape =
        kept.map(|(axis, dim)| if axes.contains(&axis) { 1.into() } else { dim.clone() }).collect();
    let dy = tape.graph.reshape(dy, kept)?;
    let dx = tape.graph.add(Op::Expand(shape), &[dy])?;
    tape.give(x, dx)
}

/// `dx = y (dy - sum(dy y))`
pub(super) fn softmax(tape: &mut Tape<'_>, node: &Node) -> Result<(), GraphError> {
    let (x, y) = (node.inputs[0], node.outputs[0]);
    let dy = tape.adjoint_or_zeros(y)?;
    let last = tape.graph.shape(x).rank() - 1;
    let weighted = tape.graph.times(dy, y)?;
    let sum = tape.graph.sum_over(weighted, vec![last])?;
    let centred = tape.graph.minus(dy, sum)?;
    let dx = tape.graph.times(centred, y)?;
    tape.give(x, dx)
}

/// `dx = dy - exp(y) sum(dy)`. A scattered `dy` stays scattered: it is added into the second term in place.
pub(super) fn log_softmax(tape: &mut Tape<'_>, node: &Node) -> Result<(), GraphError> {
    let (x, y) = (node.inputs[0], node.outputs[0]);
    let last = tape.graph.shape(x).rank() - 1;
    let adjoint = tape.take(y);
    let dx = match adjoint {
        Some(Adjoint::Scattered { axis, indices, values }) if axis == last => {
            let sum = tape.graph.sum_over(values, vec![last])?;
            let negated = tape.graph.unary(Unary::Neg, sum)?;
            let probabilities = tape.graph.unary(Unary::Exp, y)?;
            let spread = tape.graph.times(probabilities, negated)?;
            tape.graph.add(Op::ScatterAdd { axis }, &[spread, indices, values])?
        }
        Some(adjoint) => {
            let dy = tape.dense(y, adjoint)?;
            let sum = tape.graph.sum_over(dy, vec![last])?;
            let probabilities = tape.graph.unary(Unary::Exp, y)?;
            let spread = tape.graph.times(probabilities, sum)?;
            tape.graph.minus(dy, spread)?
        }
        None => return Ok(()),
    };
    tape.give(x, dx)
}

/// With `h = x r` the normalized input, `r` the second output, and `d = dy w`: `dx = r (d - h mean(d h))`,
/// `dw = dy h`.
pub(super) fn rms_norm(tape: &mut Tape<'_>, node: &Node) -> Result<(), GraphError> {
    let (x, weight) = (node.inputs[0], node.inputs[1]);
    let (y, inverse) = (node.outputs[0], node.outputs[1]);
    if tape.adjoint(inverse)?.is_some() {
        let reason = "its second output is for its own gradient only";
        return Err(GraphError::NotDifferentiable { op: node.op.name(), reason });
    }
    let dy = tape.adjoint_or_zeros(y)?;
    let last = tape.graph.shape(x).rank() - 1;
    let normalized = tape.graph.times(x, inverse)?;
    if tape.wants(weight) {
        let shape = tape.graph.shape(weight).clone();
        let product = tape.graph.times(dy, normalized)?;
        let gradient = tape.graph.unbroadcast(product, &shape)?;
        tape.give(weight, gradient)?;
    }
    if tape.wants(x) {
        let scaled = tape.graph.times(dy, weight)?;
        let product = tape.graph.times(scaled, normalized)?;
        let mean = Op::Reduce { reduction: Reduction::Mean, axes: vec![last], keep: true };
        let mean = tape.graph.add(mean, &[product])?;
        let along = tape.graph.times(normalized, mean)?;
        let across = tape.graph.minus(scaled, along)?;
        let gradient = tape.graph.times(across, inverse)?;
        tape.give(x, gradient)?;
    }
    Ok(())
}
