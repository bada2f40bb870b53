//! The ONNX form of each operator: one node, or a few where ONNX has no such operator. Called by `lower.rs` for every
//! node in the planned order.

use super::size::{Sizes, integer, plain};
use super::{MICROSOFT, Writer, data_type, tensor};
use crate::graph::{ElementType, Graph, GraphError, Node, ValueId};
use crate::onnx::{AttributeProto, AttributeType, DataType, NodeProto};
use crate::op::{GroupedAttention, MultiHeadAttention, Op};
use crate::shape::{Dim, Shape};

/// Writes one node of the graph.
pub(super) fn lower(
    graph: &Graph,
    node: &Node,
    sizes: &mut Sizes,
    writer: &mut Writer,
) -> Result<(), GraphError> {
    let form = Form { graph, node, sizes, writer };
    form.write()
}

struct Form<'a> {
    graph: &'a Graph,
    node: &'a Node,
    sizes: &'a mut Sizes,
    writer: &'a mut Writer,
}

impl Form<'_> {
    fn write(mut self) -> Result<(), GraphError> {
        let inputs = self.inputs();
        match &self.node.op {
            Op::After => self.after(&inputs),
            Op::RmsNorm { epsilon } => self.rms_norm(&inputs, *epsilon),
            Op::MatMul { transpose_a, transpose_b, alpha } => {
                self.product(inputs, *transpose_a, *transpose_b, *alpha);
            }
            Op::Reduce { axes, keep, .. } => {
                let axes = self.writer.integers(&axes.iter().map(|&axis| axis as i64).collect::<Vec<_>>());
                self.emit("", with(inputs, [axes]), vec![integer("keepdims", i64::from(*keep))]);
            }
            Op::Reshape(shape) => {
                let shape = self.reshaped(shape)?;
                self.emit("", with(inputs, [shape]), vec![]);
            }
            Op::Expand(shape) => {
                let shape = self.sizes.shape(shape, self.writer)?;
                self.emit("", with(inputs, [shape]), vec![]);
            }
            Op::Split { axis, sizes } => {
                let lengths = self.sizes.list(sizes, self.writer)?;
                self.emit("", with(inputs, [lengths]), vec![integer("axis", *axis as i64)]);
            }
            Op::Slice { axis, start, length } => {
                let range = [*start, start + length, *axis];
                let range = range.map(|value| self.writer.integers(&[value as i64]));
                self.emit("", with(inputs, range), vec![]);
            }
            Op::Pad { axis, before, after } => {
                let rank = self.graph.shape(self.node.inputs[0]).rank();
                let mut pads = vec![0; 2 * rank];
                (pads[*axis], pads[rank + axis]) = (*before as i64, *after as i64);
                let pads = self.writer.integers(&pads);
                self.emit("", with(inputs, [pads]), vec![]);
            }
            Op::Range(dim) => {
                let end = self.sizes.of(dim, self.writer)?;
                let end = self.writer.compute(plain("Squeeze", [end]));
                let start = self.sizes.opaque_zero(self.node.phase, self.writer);
                let step = self.writer.integer(1);
                self.emit("", vec![start, end, step], vec![]);
            }
            Op::Fill { value, shape } => {
                let shape = self.sizes.shape(shape, self.writer)?;
                let value = tensor(String::new(), DataType::Float, vec![1], value.to_le_bytes().to_vec());
                let value = AttributeProto {
                    name: "value".into(),
                    t: Some(value),
                    kind: Some(AttributeType::Tensor as i32),
                    ..AttributeProto::default()
                };
                self.emit("", vec![shape], vec![value]);
            }
            op => {
                let (domain, inputs, attributes) = self.direct(op, inputs);
                self.emit(domain, inputs, attributes);
            }
        }
        Ok(())
    }

    /// Operators that are one node whose inputs are the graph's.
    fn direct(&self, op: &Op, inputs: Vec<String>) -> (&'static str, Vec<String>, Vec<AttributeProto>) {
        let axis = |axis: usize| vec![integer("axis", axis as i64)];
        match op {
            Op::QuickGelu { alpha } => (MICROSOFT, inputs, vec![float("alpha", *alpha)]),
            Op::Gelu { tanh: true } => ("", inputs, vec![text("approximate", "tanh")]),
            Op::LayerNorm { epsilon } => ("", inputs, vec![integer("axis", -1), float("epsilon", *epsilon)]),
            Op::MultiHeadAttention(MultiHeadAttention { heads, scale }) => {
                let attributes = vec![integer("num_heads", *heads as i64), float("scale", *scale)];
                (MICROSOFT, whole_attention(inputs), attributes)
            }
            Op::Softmax | Op::LogSoftmax => ("", inputs, vec![integer("axis", -1)]),
            Op::SkipRmsNorm { epsilon } => (MICROSOFT, inputs, vec![float("epsilon", *epsilon)]),
            Op::MatMulNBits { packing, accuracy_level } => {
                let shape = self.graph.shape(self.node.outputs[0]);
                let outputs = shape.0.last().and_then(Dim::as_fixed).unwrap_or(0);
                let width = self.graph.shape(self.node.inputs[0]).0.last().and_then(Dim::as_fixed);
                let attributes = [
                    ("K", width.unwrap_or(0) as i64),
                    ("N", outputs as i64),
                    ("bits", packing.bits as i64),
                    ("block_size", packing.block_size as i64),
                    ("accuracy_level", *accuracy_level),
                ];
                (MICROSOFT, inputs, attributes.map(|(name, value)| integer(name, value)).into())
            }
            Op::GatherBlockQuantized { packing } => {
                let attributes = [
                    ("bits", packing.bits as i64),
                    ("block_size", packing.block_size as i64),
                    ("gather_axis", 0),
                    ("quantize_axis", 1),
                ];
                (MICROSOFT, inputs, attributes.map(|(name, value)| integer(name, value)).into())
            }
            Op::Gather { axis: at } | Op::GatherElements { axis: at } | Op::Concat { axis: at } => {
                ("", inputs, axis(*at))
            }
            Op::ScatterAdd { axis: at } => ("", inputs, with(axis(*at), [text("reduction", "add")])),
            Op::RotaryEmbedding { heads } => (MICROSOFT, inputs, vec![integer("num_heads", *heads as i64)]),
            Op::GroupQueryAttention(attributes) => {
                let is_int8 = |&id: &ValueId| self.graph.value(id).kind.element == ElementType::I8;
                let scales = if self.node.inputs.iter().any(is_int8) { 2 } else { 0 };
                let (unscaled, scales) = inputs.split_at(inputs.len() - scales);
                let (inputs, attributes) = grouped_attention(*attributes, unscaled.to_vec());
                let (inputs, attributes) = scaled_cache(inputs, attributes, scales);
                (MICROSOFT, inputs, attributes)
            }
            Op::Transpose { permutation } => {
                let ints = permutation.iter().map(|&axis| axis as i64).collect();
                let attribute = AttributeProto {
                    name: "perm".into(),
                    ints,
                    kind: Some(AttributeType::Ints as i32),
                    ..AttributeProto::default()
                };
                ("", inputs, vec![attribute])
            }
            Op::Cast(element) => ("", inputs, vec![integer("to", data_type(*element) as i64)]),
            _ => ("", inputs, vec![]),
        }
    }

    fn inputs(&self) -> Vec<String> {
        self.node.inputs.iter().map(|&id| self.graph.value(id).name.clone()).collect()
    }

    fn outputs(&self) -> Vec<String> {
        self.node.outputs.iter().map(|&id| self.graph.value(id).name.clone()).collect()
    }

    fn emit(&mut self, domain: &str, input: Vec<String>, attribute: Vec<AttributeProto>) {
        self.emit_as(self.node.op.name(), domain, input, attribute);
    }

    fn emit_as(&mut self, op: &str, domain: &str, input: Vec<String>, attribute: Vec<AttributeProto>) {
        let mut output = self.outputs();
        if matches!(self.node.op, Op::SkipRmsNorm { .. }) {
            // The sum is the fourth output; mean and deviation, between, are not asked for.
            output.splice(1..1, [String::new(), String::new()]);
        }
        self.writer.push(NodeProto {
            input,
            output,
            name: self.node.name.clone(),
            op_type: op.into(),
            attribute,
            domain: domain.into(),
        });
    }

    /// `x + 0 · y`: the runtime library does not know that this is `x`.
    fn after(&mut self, inputs: &[String]) {
        let zero = self.writer.float(0.0);
        let nothing = self.writer.compute(plain("Mul", [inputs[1].clone(), zero]));
        self.emit_as("Add", "", vec![inputs[0].clone(), nothing], vec![]);
    }

    /// In ONNX's own operators: its checker does not know the runtime library's norm, and the gradient needs the
    /// inverse root.
    fn rms_norm(&mut self, inputs: &[String], epsilon: f32) {
        let outputs = self.outputs();
        let last = self.writer.integers(&[-1]);
        let epsilon = self.writer.float(epsilon);
        let square = self.writer.compute(plain("Mul", [inputs[0].clone(), inputs[0].clone()]));
        let mut mean = plain("ReduceMean", [square, last]);
        mean.attribute.push(integer("keepdims", 1));
        let mean = self.writer.compute(mean);
        let mean = self.writer.compute(plain("Add", [mean, epsilon]));
        let root = self.writer.compute(plain("Sqrt", [mean]));
        self.writer.push(NodeProto {
            output: vec![outputs[1].clone()],
            name: format!("{}.inverse", self.node.name),
            ..plain("Reciprocal", [root])
        });
        let scaled = self.writer.compute(plain("Mul", [inputs[0].clone(), outputs[1].clone()]));
        self.writer.push(NodeProto {
            output: vec![outputs[0].clone()],
            name: self.node.name.clone(),
            ..plain("Mul", [scaled, inputs[1].clone()])
        });
    }

    /// `MatMul` where it can, `Gemm` for other products of matrices, the runtime library's `FusedMatMul` for batches.
    fn product(&mut self, inputs: Vec<String>, transpose_a: bool, transpose_b: bool, alpha: f32) {
        let is_plain = !transpose_a && !transpose_b && (alpha - 1.0).abs() < f32::EPSILON;
        let flag = |name: &str, value: bool| integer(name, i64::from(value));
        let matrices = self.node.inputs.iter().all(|&id| self.graph.shape(id).rank() == 2);
        if inputs.len() == 2 && is_plain {
            self.emit_as("MatMul", "", inputs, vec![]);
        } else if matrices {
            let attributes =
                vec![flag("transA", transpose_a), flag("transB", transpose_b), float("alpha", alpha)];
            self.emit_as("Gemm", "", inputs, attributes);
        } else {
            let attributes =
                vec![flag("transA", transpose_a), flag("transB", transpose_b), float("alpha", alpha)];
            self.emit_as("FusedMatMul", MICROSOFT, inputs, attributes);
        }
    }

    /// A shape for `Reshape`, which infers one size by itself: that spares computing it.
    fn reshaped(&mut self, shape: &Shape) -> Result<String, GraphError> {
        let unknown = shape.0.iter().filter(|dim| dim.as_fixed().is_none()).count();
        if unknown == 1 {
            let sizes: Vec<i64> =
                shape.0.iter().map(|dim| dim.as_fixed().map_or(-1, |size| size as i64)).collect();
            return Ok(self.writer.integers(&sizes));
        }
        self.sizes.shape(shape, self.writer)
    }
}

/// A bias of the projections and a mask of padding stand between the value and the bias of the scores.
fn whole_attention(mut inputs: Vec<String>) -> Vec<String> {
    inputs.splice(3..3, [String::new(), String::new()]);
    inputs
}

/// One fused tensor stands for three inputs. The window's attribute counts the tokens that a query sees, itself
/// included (`tests/architectures.rs` holds it against windows of an independent implementation).
fn grouped_attention(
    attributes: GroupedAttention,
    mut inputs: Vec<String>,
) -> (Vec<String>, Vec<AttributeProto>) {
    let GroupedAttention { heads, kv_heads, fused, window, rotates, scale, cap, .. } = attributes;
    if fused {
        inputs.splice(1..1, [String::new(), String::new()]);
    }
    let mut attributes = vec![
        integer("num_heads", heads as i64),
        integer("kv_num_heads", kv_heads as i64),
        integer("do_rotary", i64::from(rotates)),
        float("scale", scale),
    ];
    attributes.extend(cap.map(|cap| float("softcap", cap)));
    attributes.extend(window.map(|tokens| integer("local_window_size", tokens as i64)));
    (inputs, attributes)
}

/// An 8-bit cache's scales are the last two inputs, the positions, biases and sinks between absent: one for each component
/// of each head.
fn scaled_cache(
    mut inputs: Vec<String>,
    mut attributes: Vec<AttributeProto>,
    scales: &[String],
) -> (Vec<String>, Vec<AttributeProto>) {
    const FIRST_SCALE: usize = 12;
    if !scales.is_empty() {
        inputs.resize(FIRST_SCALE, String::new());
        inputs.extend_from_slice(scales);
        attributes.extend([
            text("k_quant_type", "PER_CHANNEL"),
            text("v_quant_type", "PER_CHANNEL"),
            integer("kv_cache_bit_width", 8),
        ]);
    }
    (inputs, attributes)
}

fn with<T>(mut list: Vec<T>, more: impl IntoIterator<Item = T>) -> Vec<T> {
    list.extend(more);
    list
}

fn float(name: &str, value: f32) -> AttributeProto {
    AttributeProto {
        name: name.into(),
        f: Some(value),
        kind: Some(AttributeType::Float as i32),
        ..AttributeProto::default()
    }
}

fn text(name: &str, value: &str) -> AttributeProto {
    AttributeProto {
        name: name.into(),
        s: Some(value.as_bytes().to_vec()),
        kind: Some(AttributeType::String as i32),
        ..AttributeProto::default()
    }
}
