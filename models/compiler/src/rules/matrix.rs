//! The gradient of a product of matrices: of floats, with transposes, a factor, and batches that broadcast; and with a
//! frozen packed matrix.

use crate::differentiate::Tape;
use crate::graph::{Graph, GraphError, Node, Source, TensorType, ValueId};
use crate::op::{Op, Packing};
use crate::shape::Dim;

/// A packed matrix is expanded in pieces of about this many bytes of floats: the vocabulary's would not fit, and a piece
/// that the caches hold is read back from them.
const EXPANDED_BYTES: usize = 16 << 20;

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

/// For `y = x Wᵀ` with `W` packed and frozen: `dx = dy W`, with `W` expanded a few rows at a time just before they are
/// used. The forward may have rounded `x` to 8 bits; its gradient passes straight through.
pub(super) fn matmul_n_bits(tape: &mut Tape<'_>, node: &Node, packing: Packing) -> Result<(), GraphError> {
    let (x, packed, scales) = (node.inputs[0], node.inputs[1], node.inputs[2]);
    if !tape.wants(x) {
        return Ok(());
    }
    let dy = tape.adjoint_or_zeros(node.outputs[0])?;
    let graph = &mut *tape.graph;
    let columns = graph.shape(x).0.last().and_then(Dim::as_fixed).unwrap_or(0);
    let (weights, rows) = rows_of(graph, packed)?;
    // The runtime library would take a second expansion of the same rows for the first, and keep that alive between
    // them. A longer list of rows, whose end nothing reads, tells them apart.
    let uses = graph.nodes().filter(|(_, node)| node.inputs.first() == Some(&weights)).count();
    let all = graph.add(Op::Range((rows + uses).into()), &[])?;
    let last = graph.shape(dy).rank() - 1;
    let bytes = packing.blocks(columns) * packing.block_size * size_of::<f32>();
    let step = (EXPANDED_BYTES / bytes.max(1)).max(1);
    let step = rows.div_ceil(rows.div_ceil(step).max(1)).max(1);
    let mut dx = None;
    for start in (0..rows).step_by(step) {
        let length = step.min(rows - start);
        let piece = graph.sliced(dy, last, start, length)?;
        let which = graph.sliced(all, 0, start, length)?;
        let expanded = graph.add(Op::GatherBlockQuantized { packing }, &[weights, which, scales])?;
        // The sum so far is the product's addend: as an operator of its own the runtime library would put it there
        // too, and then run the node in another order than the planned one.
        let product = Op::MatMul { transpose_a: false, transpose_b: false, alpha: 1.0 };
        let inputs = [piece, expanded].into_iter().chain(dx).collect::<Vec<_>>();
        dx = Some(graph.add(product, &inputs)?);
    }
    let Some(dx) = dx else { return Ok(()) };
    let dx = graph.narrowed(dx, columns)?;
    tape.give(x, dx)
}

/// A packed matrix `[rows, blocks, bytes]` as `GatherBlockQuantized` reads it, `[rows, bytes]`, and its rows.
fn rows_of(graph: &mut Graph, packed: ValueId) -> Result<(ValueId, usize), GraphError> {
    let wrong = |got: String| GraphError::Type {
        op: "MatMulNBits",
        subject: "weights",
        expected: "frozen, of three fixed dimensions".into(),
        got,
    };
    let value = graph.value(packed);
    let Source::Weight { entry } = &value.source else { return Err(wrong("computed ones".into())) };
    let [rows, blocks, bytes] = value.kind.shape.as_fixed().unwrap_or_default()[..] else {
        return Err(wrong(value.kind.shape.to_string()));
    };
    let (entry, name) = (entry.clone(), format!("{entry}.rows"));
    match graph.find(&name) {
        Some(known) => Ok((known, rows)),
        None => Ok((graph.weight(name, entry, TensorType::u8([rows, blocks * bytes]))?, rows)),
    }
}
