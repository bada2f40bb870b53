//! Gradients of operators that only move elements: each is the move back.

use crate::differentiate::Tape;
use crate::graph::{GraphError, Node};
use crate::op::Op;

pub(super) fn reshape(tape: &mut Tape<'_>, node: &Node) -> Result<(), GraphError> {
    let x = node.inputs[0];
    let dy = tape.adjoint_or_zeros(node.outputs[0])?;
    let dx = tape.graph.reshape(dy, tape.graph.shape(x).clone())?;
    tape.give(x, dx)
}

pub(super) fn expand(tape: &mut Tape<'_>, node: &Node) -> Result<(), GraphError> {
    let x = node.inputs[0];
    let dy = tape.adjoint_or_zeros(node.outputs[0])?;
    let dx = tape.graph.unbroadcast(dy, &tape.graph.shape(x).clone())?;
    tape.give(x, dx)
}

pub(super) fn transpose(tape: &mut Tape<'_>, node: &Node, permutation: &[usize]) -> Result<(), GraphError> {
    let dy = tape.adjoint_or_zeros(node.outputs[0])?;
    let mut inverse = vec![0; permutation.len()];
    for (to, &from) in permutation.iter().enumerate() {
        inverse[from] = to;
    }
    let dx = tape.graph.transpose(dy, &inverse)?;
    tape.give(node.inputs[0], dx)
}

pub(super) fn split(tape: &mut Tape<'_>, node: &Node, axis: usize) -> Result<(), GraphError> {
    let pieces = node.outputs.iter().map(|&piece| tape.adjoint_or_zeros(piece));
    let pieces = pieces.collect::<Result<Vec<_>, _>>()?;
    let dx = tape.graph.add(Op::Concat { axis }, &pieces)?;
    tape.give(node.inputs[0], dx)
}

pub(super) fn concat(tape: &mut Tape<'_>, node: &Node, axis: usize) -> Result<(), GraphError> {
    let dy = tape.adjoint_or_zeros(node.outputs[0])?;
    let sizes = node.inputs.iter().map(|&input| tape.graph.shape(input).0[axis].clone()).collect();
    let pieces = tape.graph.add_many(Op::Split { axis, sizes }, &[dy])?;
    for (&input, piece) in node.inputs.iter().zip(pieces) {
        if tape.wants(input) {
            tape.give(input, piece)?;
        }
    }
    Ok(())
}

pub(super) fn slice(
    tape: &mut Tape<'_>,
    node: &Node,
    axis: usize,
    start: usize,
    length: usize,
) -> Result<(), GraphError> {
    let x = node.inputs[0];
    let dy = tape.adjoint_or_zeros(node.outputs[0])?;
    let size = tape.graph.shape(x).0[axis].as_fixed().unwrap_or(start + length);
    let dx = tape.graph.add(Op::Pad { axis, before: start, after: size - start - length }, &[dy])?;
    tape.give(x, dx)
}

pub(super) fn pad(tape: &mut Tape<'_>, node: &Node, axis: usize, before: usize) -> Result<(), GraphError> {
    let x = node.inputs[0];
    let dy = tape.adjoint_or_zeros(node.outputs[0])?;
    let length = tape.graph.shape(x).0[axis].as_fixed().unwrap_or_default();
    let dx = tape.graph.add(Op::Slice { axis, start: before, length }, &[dy])?;
    tape.give(x, dx)
}

/// A rotation's transpose is the rotation back: the same cosines, negated sines.
pub(super) fn rotary(tape: &mut Tape<'_>, node: &Node, heads: usize) -> Result<(), GraphError> {
    let (x, positions, cosines, sines) = (node.inputs[0], node.inputs[1], node.inputs[2], node.inputs[3]);
    let dy = tape.adjoint_or_zeros(node.outputs[0])?;
    let back = tape.negated(sines)?;
    let dx = tape.graph.add(Op::RotaryEmbedding { heads }, &[dy, positions, cosines, back])?;
    tape.give(x, dx)
}
