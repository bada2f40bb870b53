//! Types of an operator's outputs from the types of its inputs: the check behind every node of `graph.rs`.

use crate::graph::{ElementType, GraphError, TensorType};
use crate::op::{GroupedAttention, MultiHeadAttention, Op, Packing};
use crate::shape::{Dim, Shape};

/// The inputs of one node under inspection.
struct Inputs<'a> {
    op: &'static str,
    kinds: &'a [&'a TensorType],
}

impl Inputs<'_> {
    #[expect(clippy::needless_pass_by_value, reason = "most callers make the values for this message alone")]
    fn error(&self, subject: &'static str, expected: impl ToString, got: impl ToString) -> GraphError {
        GraphError::Type { op: self.op, subject, expected: expected.to_string(), got: got.to_string() }
    }

    fn shape(&self, index: usize) -> &Shape {
        &self.kinds[index].shape
    }

    fn element(&self, index: usize, subject: &'static str, element: ElementType) -> Result<(), GraphError> {
        match self.kinds[index].element {
            got if got == element => Ok(()),
            got => Err(self.error(subject, format!("{element:?}"), format!("{got:?}"))),
        }
    }

    fn floats(&self) -> Result<(), GraphError> {
        (0..self.kinds.len()).try_for_each(|index| self.element(index, "element type", ElementType::F32))
    }

    fn rank(&self, index: usize, subject: &'static str, rank: usize) -> Result<(), GraphError> {
        match self.shape(index).rank() {
            got if got == rank => Ok(()),
            _ => Err(self.error(subject, format!("of {rank} dimensions"), self.shape(index))),
        }
    }

    fn axis(&self, index: usize, axis: usize) -> Result<&Dim, GraphError> {
        let shape = self.shape(index);
        shape.0.get(axis).ok_or_else(|| self.error("axis", format!("below {}", shape.rank()), axis))
    }

    fn last(&self, index: usize) -> Result<&Dim, GraphError> {
        let shape = self.shape(index);
        shape.0.last().ok_or_else(|| self.error("input", "of at least one dimension", shape))
    }

    fn equal(&self, subject: &'static str, expected: &Shape, got: &Shape) -> Result<(), GraphError> {
        if expected == got { Ok(()) } else { Err(self.error(subject, expected, got)) }
    }

    fn broadcast(&self, left: usize, right: usize) -> Result<Shape, GraphError> {
        let (left, right) = (self.shape(left), self.shape(right));
        left.broadcast(right).ok_or_else(|| self.error("shapes", format!("broadcastable to {left}"), right))
    }

    fn fixed(&self, subject: &'static str, dim: &Dim) -> Result<usize, GraphError> {
        dim.as_fixed().ok_or_else(|| self.error(subject, "a fixed size", dim))
    }
}

/// The output types of `op` over inputs of these types.
pub(crate) fn infer(op: &Op, kinds: &[&TensorType]) -> Result<Vec<TensorType>, GraphError> {
    let inputs = Inputs { op: op.name(), kinds };
    let (least, most) = arity(op);
    if kinds.len() < least || kinds.len() > most {
        return Err(GraphError::InputCount { op: op.name(), expected: least, got: kinds.len() });
    }
    let one = match op {
        Op::RmsNorm { .. } => return rms_norm(&inputs),
        Op::SkipRmsNorm { .. } => return skip_rms_norm(&inputs),
        Op::Split { axis, sizes } => return split(&inputs, *axis, sizes),
        Op::GroupQueryAttention(attributes) => return attention(&inputs, *attributes),
        Op::Identity => kinds[0].clone(),
        Op::After => {
            inputs.equal("second input", inputs.shape(0), inputs.shape(1))?;
            kinds[0].clone()
        }
        Op::Unary(_) | Op::QuickGelu { .. } | Op::Gelu { .. } | Op::Softmax | Op::LogSoftmax => {
            inputs.floats()?;
            kinds[0].clone()
        }
        Op::Binary(_) => {
            inputs.floats()?;
            TensorType::f32(inputs.broadcast(0, 1)?)
        }
        Op::Less => {
            inputs.element(1, "second input", kinds[0].element)?;
            TensorType { element: ElementType::Bool, shape: inputs.broadcast(0, 1)? }
        }
        Op::Where => {
            inputs.element(0, "condition", ElementType::Bool)?;
            inputs.element(2, "third input", kinds[1].element)?;
            let shape = inputs.broadcast(1, 2)?;
            let shape = shape
                .broadcast(inputs.shape(0))
                .ok_or_else(|| inputs.error("condition", format!("broadcastable to {shape}"), kinds[0]))?;
            TensorType { element: kinds[1].element, shape }
        }
        Op::Reduce { axes, keep, .. } => reduce(&inputs, axes, *keep)?,
        Op::MatMul { transpose_a, transpose_b, .. } => matmul(&inputs, *transpose_a, *transpose_b)?,
        Op::MatMulNBits { packing, .. } => matmul_n_bits(&inputs, *packing)?,
        Op::GatherBlockQuantized { packing } => gather_block_quantized(&inputs, *packing)?,
        Op::Gather { axis } => {
            inputs.element(1, "indices", ElementType::I64)?;
            inputs.axis(0, *axis)?;
            let (data, indices) = (&inputs.shape(0).0, &inputs.shape(1).0);
            let dims = data[..*axis].iter().chain(indices).chain(&data[axis + 1..]);
            TensorType { element: kinds[0].element, shape: dims.cloned().collect() }
        }
        Op::GatherElements { axis } => {
            along(&inputs, *axis)?;
            TensorType { element: kinds[0].element, shape: inputs.shape(1).clone() }
        }
        Op::ScatterAdd { axis } => {
            along(&inputs, *axis)?;
            inputs.equal("updates", inputs.shape(1), inputs.shape(2))?;
            inputs.element(2, "updates", kinds[0].element)?;
            kinds[0].clone()
        }
        Op::LayerNorm { .. } => layer_norm(&inputs)?,
        Op::MultiHeadAttention(attributes) => whole_attention(&inputs, *attributes)?,
        Op::RotaryEmbedding { heads } => rotary(&inputs, *heads)?,
        Op::Reshape(shape) => {
            let (expected, got) = (inputs.shape(0).elements(), shape.elements());
            if expected != got {
                return Err(inputs.error("number of elements", expected, got));
            }
            TensorType { element: kinds[0].element, shape: shape.clone() }
        }
        Op::Expand(shape) => {
            if inputs.shape(0).broadcast(shape).as_ref() != Some(shape) {
                return Err(inputs.error("input", format!("broadcastable to {shape}"), kinds[0]));
            }
            TensorType { element: kinds[0].element, shape: shape.clone() }
        }
        Op::Transpose { permutation } => {
            let mut sorted = permutation.clone();
            sorted.sort_unstable();
            if !sorted.iter().copied().eq(0..inputs.shape(0).rank()) {
                return Err(inputs.error(
                    "permutation",
                    format!("of {}", kinds[0]),
                    format!("{permutation:?}"),
                ));
            }
            let shape = permutation.iter().map(|&axis| inputs.shape(0).0[axis].clone()).collect();
            TensorType { element: kinds[0].element, shape }
        }
        Op::Concat { axis } => concat(&inputs, *axis)?,
        Op::Slice { axis, start, length } => {
            let size = inputs.fixed("axis", inputs.axis(0, *axis)?)?;
            if start.checked_add(*length).is_none_or(|end| end > size) {
                return Err(inputs.error("range", format!("within {size}"), format!("{start} + {length}")));
            }
            resized(kinds[0], *axis, Dim::fixed(*length))
        }
        Op::Pad { axis, before, after } => {
            let size = inputs.fixed("axis", inputs.axis(0, *axis)?)?;
            resized(kinds[0], *axis, Dim::fixed(before + size + after))
        }
        Op::Range(length) => TensorType::i64([length.clone()]),
        Op::Fill { shape, .. } => TensorType::f32(shape.clone()),
        Op::Cast(element) => TensorType { element: *element, shape: inputs.shape(0).clone() },
    };
    Ok(vec![one])
}

fn arity(op: &Op) -> (usize, usize) {
    match op {
        Op::Range(_) | Op::Fill { .. } => (0, 0),
        Op::Identity
        | Op::Unary(_)
        | Op::QuickGelu { .. }
        | Op::Gelu { .. }
        | Op::Reduce { .. }
        | Op::Softmax
        | Op::LogSoftmax
        | Op::Reshape(_)
        | Op::Expand(_)
        | Op::Transpose { .. }
        | Op::Split { .. }
        | Op::Slice { .. }
        | Op::Pad { .. }
        | Op::Cast(_) => (1, 1),
        Op::After
        | Op::Binary(_)
        | Op::Less
        | Op::RmsNorm { .. }
        | Op::Gather { .. }
        | Op::GatherElements { .. } => (2, 2),
        Op::Where
        | Op::SkipRmsNorm { .. }
        | Op::MatMulNBits { .. }
        | Op::GatherBlockQuantized { .. }
        | Op::ScatterAdd { .. } => (3, 3),
        Op::MatMul { .. } | Op::LayerNorm { .. } => (2, 3),
        Op::RotaryEmbedding { .. } | Op::MultiHeadAttention(_) => (4, 4),
        Op::GroupQueryAttention(GroupedAttention { fused, rotates, .. }) => {
            let count = if *fused { 1 } else { 3 } + 4 + if *rotates { 2 } else { 0 };
            // An 8-bit cache comes with its scales.
            (count, count + 2)
        }
        Op::Concat { .. } => (1, usize::MAX),
    }
}

fn resized(kind: &TensorType, axis: usize, size: Dim) -> TensorType {
    let mut kind = kind.clone();
    kind.shape.0[axis] = size;
    kind
}

fn rms_norm(inputs: &Inputs<'_>) -> Result<Vec<TensorType>, GraphError> {
    inputs.floats()?;
    let width = inputs.last(0)?;
    inputs.equal("weight", &Shape::from([width.clone()]), inputs.shape(1))?;
    let last = inputs.shape(0).rank() - 1;
    Ok(vec![inputs.kinds[0].clone(), resized(inputs.kinds[0], last, Dim::fixed(1))])
}

fn layer_norm(inputs: &Inputs<'_>) -> Result<TensorType, GraphError> {
    inputs.floats()?;
    let width = Shape::from([inputs.last(0)?.clone()]);
    (1..inputs.kinds.len()).try_for_each(|index| inputs.equal("weight", &width, inputs.shape(index)))?;
    Ok(inputs.kinds[0].clone())
}

fn skip_rms_norm(inputs: &Inputs<'_>) -> Result<Vec<TensorType>, GraphError> {
    inputs.floats()?;
    inputs.equal("skip", inputs.shape(0), inputs.shape(1))?;
    inputs.equal("weight", &Shape::from([inputs.last(0)?.clone()]), inputs.shape(2))?;
    Ok(vec![inputs.kinds[0].clone(), inputs.kinds[0].clone()])
}

fn split(inputs: &Inputs<'_>, axis: usize, sizes: &[Dim]) -> Result<Vec<TensorType>, GraphError> {
    let whole = inputs.axis(0, axis)?;
    match Dim::sum(sizes) {
        Some(sum) if sum == *whole => {}
        sum => {
            return Err(inputs.error("sum of sizes", whole, sum.map_or("unknown".into(), |s| s.to_string())));
        }
    }
    Ok(sizes.iter().map(|size| resized(inputs.kinds[0], axis, size.clone())).collect())
}

fn concat(inputs: &Inputs<'_>, axis: usize) -> Result<TensorType, GraphError> {
    let mut sizes = Vec::with_capacity(inputs.kinds.len());
    for (index, kind) in inputs.kinds.iter().enumerate() {
        let size = inputs.axis(index, axis)?;
        let aligned = resized(kind, axis, inputs.axis(0, axis)?.clone());
        if aligned != *inputs.kinds[0] {
            return Err(inputs.error("input", inputs.kinds[0], kind));
        }
        sizes.push(size);
    }
    let listed = || sizes.iter().map(ToString::to_string).collect::<Vec<_>>().join(" + ");
    let sum = Dim::sum(sizes.iter().copied())
        .ok_or_else(|| inputs.error("sizes along the axis", "sizes that add to one", listed()))?;
    Ok(resized(inputs.kinds[0], axis, sum))
}

fn reduce(inputs: &Inputs<'_>, axes: &[usize], keep: bool) -> Result<TensorType, GraphError> {
    inputs.floats()?;
    for &axis in axes {
        inputs.axis(0, axis)?;
    }
    let dims = inputs.shape(0).0.iter().enumerate().filter_map(|(axis, dim)| match axes.contains(&axis) {
        true if keep => Some(Dim::fixed(1)),
        true => None,
        false => Some(dim.clone()),
    });
    Ok(TensorType::f32(dims.collect::<Shape>()))
}

fn matmul(inputs: &Inputs<'_>, transpose_a: bool, transpose_b: bool) -> Result<TensorType, GraphError> {
    inputs.floats()?;
    let matrix = |index: usize, transpose: bool| {
        let dims = &inputs.shape(index).0;
        let Some((batch, [rows, columns])) = dims.split_last_chunk::<2>() else {
            return Err(inputs.error("input", "of at least two dimensions", inputs.shape(index)));
        };
        let batch: Shape = batch.iter().cloned().collect();
        Ok(if transpose {
            (batch, columns.clone(), rows.clone())
        } else {
            (batch, rows.clone(), columns.clone())
        })
    };
    let (batch_a, rows, inner_a) = matrix(0, transpose_a)?;
    let (batch_b, inner_b, columns) = matrix(1, transpose_b)?;
    if inner_a != inner_b {
        return Err(inputs.error("inner sizes", inner_a, inner_b));
    }
    let batch = batch_a
        .broadcast(&batch_b)
        .ok_or_else(|| inputs.error("batches", format!("broadcastable to {batch_a}"), batch_b))?;
    let shape: Shape = batch.0.into_iter().chain([rows, columns]).collect();
    if inputs.kinds.len() == 3 {
        inputs.rank(2, "addend", 2)?;
        inputs.equal("addend", &shape, inputs.shape(2))?;
    }
    Ok(TensorType::f32(shape))
}

/// Blocks of a packed row, the last one filled up, and bytes of a block.
fn packed_width(inputs: &Inputs<'_>, packing: Packing, columns: usize) -> Result<(usize, usize), GraphError> {
    let Packing { bits, block_size } = packing;
    if !matches!(bits, 4 | 8) || block_size == 0 {
        let got = format!("{bits} bits, blocks of {block_size}");
        return Err(inputs.error("packing", "4 or 8 bits in blocks", got));
    }
    Ok((packing.blocks(columns), packing.block_bytes()))
}

fn matmul_n_bits(inputs: &Inputs<'_>, packing: Packing) -> Result<TensorType, GraphError> {
    inputs.element(0, "input", ElementType::F32)?;
    inputs.element(1, "weights", ElementType::U8)?;
    inputs.element(2, "scales", ElementType::F32)?;
    let columns = inputs.fixed("last axis", inputs.last(0)?)?;
    let rows = inputs.fixed("rows", inputs.axis(1, 0)?)?;
    let (blocks, bytes) = packed_width(inputs, packing, columns)?;
    inputs.equal("weights", &Shape::from([rows, blocks, bytes]), inputs.shape(1))?;
    inputs.equal("scales", &Shape::from([rows, blocks]), inputs.shape(2))?;
    let last = inputs.shape(0).rank() - 1;
    Ok(resized(inputs.kinds[0], last, Dim::fixed(rows)))
}

fn gather_block_quantized(inputs: &Inputs<'_>, packing: Packing) -> Result<TensorType, GraphError> {
    inputs.element(0, "weights", ElementType::U8)?;
    inputs.element(1, "indices", ElementType::I64)?;
    inputs.element(2, "scales", ElementType::F32)?;
    inputs.rank(0, "weights", 2)?;
    let rows = inputs.fixed("rows", inputs.axis(0, 0)?)?;
    let columns = inputs.fixed("bytes", inputs.axis(0, 1)?)? * 8 / packing.bits.max(1);
    if !columns.is_multiple_of(packing.block_size.max(1)) {
        let got = format!("{} bits, blocks of {}", packing.bits, packing.block_size);
        return Err(inputs.error("packing", format!("4 or 8 bits in blocks that divide {columns}"), got));
    }
    let (blocks, _) = packed_width(inputs, packing, columns)?;
    inputs.equal("scales", &Shape::from([rows, blocks]), inputs.shape(2))?;
    let dims = inputs.shape(1).0.iter().cloned().chain([Dim::fixed(columns)]);
    Ok(TensorType::f32(dims.collect::<Shape>()))
}

fn along(inputs: &Inputs<'_>, axis: usize) -> Result<(), GraphError> {
    inputs.element(1, "indices", ElementType::I64)?;
    inputs.axis(0, axis)?;
    inputs.rank(1, "indices", inputs.shape(0).rank())?;
    let aligned = resized(inputs.kinds[1], axis, inputs.axis(0, axis)?.clone());
    inputs.equal("indices", inputs.shape(0), &aligned.shape)
}

fn rotary(inputs: &Inputs<'_>, heads: usize) -> Result<TensorType, GraphError> {
    inputs.element(0, "input", ElementType::F32)?;
    inputs.element(1, "positions", ElementType::I64)?;
    inputs.rank(0, "input", 3)?;
    inputs.equal("positions", &Shape::from([1]), inputs.shape(1))?;
    inputs.rank(2, "cosines", 2)?;
    inputs.equal("sines", inputs.shape(2), inputs.shape(3))?;
    let expected = inputs.axis(2, 1)?.times(&Dim::fixed(2 * heads));
    match inputs.axis(0, 2)? {
        got if *got == expected => Ok(inputs.kinds[0].clone()),
        got => Err(inputs.error("width", expected, got)),
    }
}

fn whole_attention(inputs: &Inputs<'_>, attributes: MultiHeadAttention) -> Result<TensorType, GraphError> {
    let MultiHeadAttention { heads, .. } = attributes;
    inputs.floats()?;
    inputs.rank(0, "query", 3)?;
    inputs.equal("key", inputs.shape(0), inputs.shape(1))?;
    inputs.equal("value", inputs.shape(0), inputs.shape(2))?;
    let width = inputs.fixed("width", inputs.axis(0, 2)?)?;
    if heads == 0 || !width.is_multiple_of(heads) {
        return Err(inputs.error("heads", format!("a divisor of {width}"), heads));
    }
    let (batch, time) = (inputs.axis(0, 0)?.clone(), inputs.axis(0, 1)?.clone());
    let scores = Shape::from([batch, heads.into(), time.clone(), time.clone()]);
    inputs.rank(3, "bias", 4)?;
    let squares = inputs.shape(3).0[2..] == [time.clone(), time];
    if !squares || inputs.shape(3).broadcast(&scores).as_ref() != Some(&scores) {
        return Err(inputs.error(
            "bias",
            format!("broadcastable to {scores} along batch and heads"),
            inputs.shape(3),
        ));
    }
    Ok(inputs.kinds[0].clone())
}

fn attention(inputs: &Inputs<'_>, attributes: GroupedAttention) -> Result<Vec<TensorType>, GraphError> {
    let GroupedAttention { heads, kv_heads, head_dim, fused, rotates, .. } = attributes;
    inputs.rank(0, "queries", 3)?;
    let (batch, time) = (inputs.axis(0, 0)?, inputs.axis(0, 1)?);
    let new = |heads: usize| Shape::from([batch.clone(), time.clone(), (heads * head_dim).into()]);
    let past = if fused {
        inputs.equal("qkv", &new(heads + 2 * kv_heads), inputs.shape(0))?;
        1
    } else {
        inputs.equal("query", &new(heads), inputs.shape(0))?;
        inputs.equal("key", &new(kv_heads), inputs.shape(1))?;
        inputs.equal("value", &new(kv_heads), inputs.shape(2))?;
        3
    };
    inputs.rank(past, "past key", 4)?;
    let cache = Shape::from([batch.clone(), kv_heads.into(), inputs.axis(past, 2)?.clone(), head_dim.into()]);
    inputs.equal("past key", &cache, inputs.shape(past))?;
    inputs.equal("past value", &cache, inputs.shape(past + 1))?;
    inputs.element(past + 2, "lengths", ElementType::I32)?;
    inputs.equal("lengths", &Shape::from([batch.clone()]), inputs.shape(past + 2))?;
    inputs.element(past + 3, "total length", ElementType::I32)?;
    inputs.equal("total length", &Shape::from([1]), inputs.shape(past + 3))?;
    if rotates {
        inputs.rank(past + 4, "cosines", 2)?;
        inputs.equal("sines", inputs.shape(past + 4), inputs.shape(past + 5))?;
    }
    let scales = past + 4 + if rotates { 2 } else { 0 };
    inputs.element(past + 1, "past value", inputs.kinds[past].element)?;
    let scaled = inputs.kinds[past].element == ElementType::I8;
    if inputs.kinds.len() != scales + if scaled { 2 } else { 0 } {
        return Err(inputs.error(
            "scales",
            "two for a past of 8-bit integers, else none",
            inputs.kinds.len() - scales,
        ));
    }
    for index in scales..inputs.kinds.len() {
        inputs.equal("scales", &Shape::from([kv_heads * head_dim]), inputs.shape(index))?;
    }
    Ok(vec![TensorType::f32(new(heads)), inputs.kinds[past].clone(), inputs.kinds[past + 1].clone()])
}
