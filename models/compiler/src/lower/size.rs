//! Sizes that are only known when running, as integers that nodes compute from the shapes of the graph's inputs.
//! `lower/node.rs` asks for them; each is computed once.

use std::collections::BTreeMap;

use super::Writer;
use crate::graph::{Graph, GraphError, Phase};
use crate::onnx::{AttributeProto, AttributeType, NodeProto};
use crate::shape::{Dim, Shape, Symbol};

/// Which input has which named size, and the values computed so far.
pub(super) struct Sizes {
    places: BTreeMap<&'static str, (String, usize)>,
    known: BTreeMap<Dim, String>,
    zeros: BTreeMap<bool, String>,
    /// An input for zeros of the forward, and one for those of the backward.
    anchors: Vec<String>,
}

impl Sizes {
    pub(super) fn new(graph: &Graph) -> Self {
        let mut places = BTreeMap::new();
        let mut anchors = Vec::new();
        for &id in graph.inputs() {
            let value = graph.value(id);
            if value.kind.shape.rank() > 0 {
                anchors.push(value.name.clone());
            }
            for (axis, dim) in value.kind.shape.0.iter().enumerate() {
                if let (1, [Symbol::Named(name)]) = dim.parts() {
                    places.entry(*name).or_insert_with(|| (value.name.clone(), axis));
                }
            }
        }
        Self { places, known: BTreeMap::new(), zeros: BTreeMap::new(), anchors }
    }

    /// A vector of one integer: the size.
    pub(super) fn of(&mut self, dim: &Dim, writer: &mut Writer) -> Result<String, GraphError> {
        if let Some(size) = dim.as_fixed() {
            return Ok(writer.integers(&[size as i64]));
        }
        if let Some(known) = self.known.get(dim) {
            return Ok(known.clone());
        }
        let (factor, symbols) = dim.parts();
        let mut product = (factor != 1).then(|| writer.integers(&[factor as i64]));
        for symbol in symbols {
            let size = match symbol {
                Symbol::Named(name) => self.named(name, writer)?,
                Symbol::Chunk { of, index, count } => {
                    // floor((i + 1) n / count) - floor(i n / count), as `Dim::evaluate` has it.
                    let whole = self.of(of, writer)?;
                    let count = writer.integers(&[*count as i64]);
                    let mut end = |place: usize| {
                        let place = writer.integers(&[place as i64]);
                        let scaled = writer.compute(plain("Mul", [whole.clone(), place]));
                        writer.compute(plain("Div", [scaled, count.clone()]))
                    };
                    let (after, before) = (end(index + 1), end(*index));
                    writer.compute(plain("Sub", [after, before]))
                }
            };
            product = Some(match product {
                None => size,
                Some(product) => writer.compute(plain("Mul", [product, size])),
            });
        }
        let name = product.unwrap_or_else(|| writer.integers(&[1]));
        self.known.insert(dim.clone(), name.clone());
        Ok(name)
    }

    /// A vector of integers: all sizes of a shape.
    pub(super) fn shape(&mut self, shape: &Shape, writer: &mut Writer) -> Result<String, GraphError> {
        self.list(&shape.0, writer)
    }

    /// A vector of integers: these sizes.
    pub(super) fn list(&mut self, dims: &[Dim], writer: &mut Writer) -> Result<String, GraphError> {
        let fixed: Option<Vec<i64>> = dims.iter().map(|dim| dim.as_fixed().map(|size| size as i64)).collect();
        if let Some(fixed) = fixed {
            return Ok(writer.integers(&fixed));
        }
        let parts = dims.iter().map(|dim| self.of(dim, writer)).collect::<Result<Vec<_>, _>>()?;
        let mut concat = plain("Concat", parts);
        concat.attribute.push(integer("axis", 0));
        Ok(writer.compute(concat))
    }

    /// An integer zero without dimensions that the runtime library cannot foresee. What is computed from it is neither
    /// folded into a constant when the graph is loaded (which would expand the packed weights), nor, between forward
    /// and backward, taken for the same (which would keep expanded weights alive from one to the other).
    pub(super) fn opaque_zero(&mut self, phase: Phase, writer: &mut Writer) -> String {
        let second = phase != Phase::Forward && self.anchors.len() > 1;
        if let Some(known) = self.zeros.get(&second) {
            return known.clone();
        }
        let Some(anchor) = self.anchors.get(usize::from(second)).cloned() else { return writer.integer(0) };
        let mut shape = plain("Shape", [anchor]);
        shape.attribute.extend([integer("start", 0), integer("end", 1)]);
        let size = writer.compute(shape);
        let nothing = writer.integers(&[0]);
        let zero = writer.compute(plain("Mul", [size, nothing]));
        let zero = writer.compute(plain("Squeeze", [zero]));
        self.zeros.insert(second, zero.clone());
        zero
    }

    fn named(&self, name: &str, writer: &mut Writer) -> Result<String, GraphError> {
        let Some((input, axis)) = self.places.get(name) else {
            return Err(GraphError::UnknownSize { name: name.into() });
        };
        let mut shape = plain("Shape", [input.clone()]);
        shape.attribute.extend([integer("start", *axis as i64), integer("end", *axis as i64 + 1)]);
        Ok(writer.compute(shape))
    }
}

/// A standard node without attributes; named by `Writer::compute`.
pub(super) fn plain(op: &str, inputs: impl Into<Vec<String>>) -> NodeProto {
    NodeProto { input: inputs.into(), op_type: op.into(), ..NodeProto::default() }
}

/// An integer attribute.
pub(super) fn integer(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        name: name.into(),
        i: Some(value),
        kind: Some(AttributeType::Int as i32),
        ..AttributeProto::default()
    }
}
