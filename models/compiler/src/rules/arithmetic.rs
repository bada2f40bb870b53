//! Gradients of element-wise operators. `y` is the output, `dy` its gradient.

use std::f32::consts::{FRAC_2_SQRT_PI, SQRT_2};

use crate::differentiate::Tape;
use crate::graph::{GraphError, Node, ValueId};
use crate::op::{Binary, Op, Unary};

pub(super) fn identity(tape: &mut Tape<'_>, node: &Node) -> Result<(), GraphError> {
    let dy = tape.adjoint_or_zeros(node.outputs[0])?;
    tape.give(node.inputs[0], dy)
}

pub(super) fn unary(tape: &mut Tape<'_>, node: &Node, function: Unary) -> Result<(), GraphError> {
    let (x, y) = (node.inputs[0], node.outputs[0]);
    let dy = tape.adjoint_or_zeros(y)?;
    let graph = &mut *tape.graph;
    let dx = match function {
        Unary::Neg => graph.unary(Unary::Neg, dy)?,
        Unary::Exp => graph.times(dy, y)?,
        Unary::Reciprocal => {
            let square = graph.times(y, y)?;
            let scaled = graph.times(dy, square)?;
            graph.unary(Unary::Neg, scaled)?
        }
        Unary::Sqrt => {
            let half = graph.scalar(0.5)?;
            let halved = graph.times(dy, half)?;
            graph.over(halved, y)?
        }
        Unary::Sigmoid => {
            let rest = complement(tape, y)?;
            let slope = tape.graph.times(y, rest)?;
            tape.graph.times(dy, slope)?
        }
        Unary::Tanh => {
            let square = tape.graph.times(y, y)?;
            let slope = complement(tape, square)?;
            tape.graph.times(dy, slope)?
        }
    };
    tape.give(x, dx)
}

pub(super) fn binary(tape: &mut Tape<'_>, node: &Node, function: Binary) -> Result<(), GraphError> {
    let (a, b, y) = (node.inputs[0], node.inputs[1], node.outputs[0]);
    let dy = tape.adjoint_or_zeros(y)?;
    if tape.wants(a) {
        let da = match function {
            Binary::Add | Binary::Sub => dy,
            Binary::Mul => tape.graph.times(dy, b)?,
            Binary::Div => tape.graph.over(dy, b)?,
        };
        give_unbroadcast(tape, a, da)?;
    }
    if tape.wants(b) {
        let db = match function {
            Binary::Add => dy,
            Binary::Sub => tape.graph.unary(Unary::Neg, dy)?,
            Binary::Mul => tape.graph.times(dy, a)?,
            Binary::Div => {
                let scaled = tape.graph.times(dy, y)?;
                let quotient = tape.graph.over(scaled, b)?;
                tape.graph.unary(Unary::Neg, quotient)?
            }
        };
        give_unbroadcast(tape, b, db)?;
    }
    Ok(())
}

/// With `s = sigmoid(alpha x)` and `y = x s`: `dx = dy (s + alpha y (1 - s))`.
pub(super) fn quick_gelu(tape: &mut Tape<'_>, node: &Node, alpha: f32) -> Result<(), GraphError> {
    let (x, y) = (node.inputs[0], node.outputs[0]);
    let dy = tape.adjoint_or_zeros(y)?;
    let factor = tape.graph.scalar(alpha)?;
    let plain = alpha.to_bits() == 1f32.to_bits();
    let scaled = if plain { x } else { tape.graph.times(x, factor)? };
    let sigmoid = tape.graph.unary(Unary::Sigmoid, scaled)?;
    let rest = complement(tape, sigmoid)?;
    let curve = tape.graph.times(y, rest)?;
    let curve = if plain { curve } else { tape.graph.times(curve, factor)? };
    let slope = tape.graph.plus(curve, sigmoid)?;
    let dx = tape.graph.times(dy, slope)?;
    tape.give(x, dx)
}

/// The approximation is `y = x s` with `s = sigmoid(a x + b x³)`, `a = 2 sqrt(2 / π)` and `b = 0.044715 a`, since
/// `(1 + tanh(u)) / 2 = sigmoid(2 u)`: `dx = dy (s + y (1 - s) (a + 3 b x²))`.
pub(super) fn gelu_tanh(tape: &mut Tape<'_>, node: &Node) -> Result<(), GraphError> {
    const A: f32 = SQRT_2 * FRAC_2_SQRT_PI;
    const B: f32 = 0.044_715 * A;
    let (x, y) = (node.inputs[0], node.outputs[0]);
    let dy = tape.adjoint_or_zeros(y)?;
    let graph = &mut *tape.graph;
    let (a, b, three_b) = (graph.scalar(A)?, graph.scalar(B)?, graph.scalar(3.0 * B)?);
    let square = graph.times(x, x)?;
    let cubic = graph.times(square, b)?;
    let factor = graph.plus(cubic, a)?;
    let inner = graph.times(x, factor)?;
    let sigmoid = graph.unary(Unary::Sigmoid, inner)?;
    let steep = graph.times(square, three_b)?;
    let steep = graph.plus(steep, a)?;
    let rest = complement(tape, sigmoid)?;
    let curve = tape.graph.times(y, rest)?;
    let curve = tape.graph.times(curve, steep)?;
    let slope = tape.graph.plus(curve, sigmoid)?;
    let dx = tape.graph.times(dy, slope)?;
    tape.give(x, dx)
}

pub(super) fn choose(tape: &mut Tape<'_>, node: &Node) -> Result<(), GraphError> {
    let (condition, a, b) = (node.inputs[0], node.inputs[1], node.inputs[2]);
    let dy = tape.adjoint_or_zeros(node.outputs[0])?;
    let zero = tape.graph.scalar(0.0)?;
    if tape.wants(a) {
        let da = tape.graph.add(Op::Where, &[condition, dy, zero])?;
        give_unbroadcast(tape, a, da)?;
    }
    if tape.wants(b) {
        let db = tape.graph.add(Op::Where, &[condition, zero, dy])?;
        give_unbroadcast(tape, b, db)?;
    }
    Ok(())
}

/// Gives `value` a gradient in the shape that it was broadcast to.
fn give_unbroadcast(tape: &mut Tape<'_>, value: ValueId, gradient: ValueId) -> Result<(), GraphError> {
    let shape = tape.graph.shape(value).clone();
    let gradient = tape.graph.unbroadcast(gradient, &shape)?;
    tape.give(value, gradient)
}

fn complement(tape: &mut Tape<'_>, x: ValueId) -> Result<ValueId, GraphError> {
    let one = tape.graph.scalar(1.0)?;
    tape.graph.minus(one, x)
}
