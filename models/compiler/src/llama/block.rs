//! One block of the decoder in 32-bit floats, its weights inputs, so that one graph serves every layer of its kind and
//! no more than one layer's weights are in memory. `layers.rs` runs it. Attention is `infer.rs`'s operator over a cache
//! that nothing was written to; there is no adapter.

use super::{Block, activation, has_bias, rotary_names, shape};
use crate::ModelConfig;
use crate::architecture;
use crate::graph::{Constant, ElementType, Graph, GraphError, TensorType, ValueId};
use crate::op::{GroupedAttention, Op};
use crate::shape::Dim;

/// What a block's graph gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Gives {
    /// `y [1, time, hidden]`, the block's output.
    Output,
    /// `{name}.gram` for each of the linear layers `qkv`, `o`, `gate_up` and `down`, the `[inputs, inputs]` product `Xᵀ X` of what goes
    /// into it.
    Grams,
    /// `y`, and `key` and `value [1, kv_heads, time, head_dim]`, what the attention keeps for later tokens.
    Kept,
}

/// Builds the graph of layer `layer` for sequences of `time` tokens.
///
/// Inputs: `x [1, time, hidden]`; each tensor of the layer by its name in `weights.bin` after `layers.{i}.`; and where
/// the layer rotates, its rotary tables `[time, head_dim / 2]`. All are floats.
pub(crate) fn block(
    model: &ModelConfig,
    layer: usize,
    time: usize,
    gives: Gives,
) -> Result<Graph, GraphError> {
    let mut builder =
        Builder { model, layer, time, graph: Graph::new(), grams: Vec::new(), kept: Vec::new() };
    let output = builder.run()?;
    let Builder { mut graph, grams, kept, .. } = builder;
    match gives {
        Gives::Output => graph.output("y", output)?,
        Gives::Grams => {
            for (name, input) in grams {
                let gram = graph.product((input, true), (input, false), 1.0)?;
                graph.output(format!("{name}.gram"), gram)?;
            }
        }
        Gives::Kept => {
            graph.output("y", output)?;
            for (name, kept) in ["key", "value"].into_iter().zip(kept) {
                graph.output(name, kept)?;
            }
        }
    }
    Ok(graph)
}

/// The names of a block's linear layers, in the order of [`Gives::Grams`].
pub(crate) const LINEARS: [&str; 4] = ["qkv", "o", "gate_up", "down"];

struct Builder<'m> {
    model: &'m ModelConfig,
    layer: usize,
    time: usize,
    graph: Graph,
    grams: Vec<(&'static str, ValueId)>,
    kept: Vec<ValueId>,
}

impl Builder<'_> {
    fn run(&mut self) -> Result<ValueId, GraphError> {
        let ModelConfig { hidden_size: hidden, intermediate_size: inner, .. } = *self.model;
        self.graph.enter("block", 0);
        let x = self.graph.input("x", TensorType::f32([1, self.time, hidden]))?;
        let normed = self.norm("attn_norm", x)?;
        let attended = self.attention(normed)?;
        let attended = self.post_norm("attn_post_norm", attended)?;
        let x = self.graph.plus(x, attended)?;
        let normed = self.norm("mlp_norm", x)?;
        let gate_up = self.linear(2, normed)?;
        let sizes = vec![inner.into(); 2];
        let halves = self.graph.add_many(Op::Split { axis: 2, sizes }, &[gate_up])?;
        let gate = self.graph.add(activation(self.model), &[halves[0]])?;
        let gated = self.graph.times(gate, halves[1])?;
        let projected = self.linear(3, gated)?;
        let projected = self.post_norm("mlp_post_norm", projected)?;
        self.graph.plus(x, projected)
    }

    fn post_norm(&mut self, name: &str, x: ValueId) -> Result<ValueId, GraphError> {
        if self.model.gemma.is_some() { self.norm(name, x) } else { Ok(x) }
    }

    fn norm(&mut self, name: &str, x: ValueId) -> Result<ValueId, GraphError> {
        let width = self.graph.shape(x).0.last().cloned().unwrap_or(Dim::fixed(1));
        let weight = self.graph.input(name, TensorType::f32([width]))?;
        self.graph.add(Op::RmsNorm { epsilon: self.model.rms_norm_eps as f32 }, &[x, weight])
    }

    fn linear(&mut self, which: usize, x: ValueId) -> Result<ValueId, GraphError> {
        let block = Block::of(self.model);
        let linear = block.linears()[which];
        let (rows, inputs) = (linear.rows(), linear.inputs);
        let flat = self.graph.reshape(x, [self.time, inputs])?;
        self.grams.push((linear.name, flat));
        let weight = self.graph.input(linear.name, TensorType::f32([rows, inputs]))?;
        let mut product = self.graph.matmul_transposed(flat, weight)?;
        if has_bias(self.model, linear.name) {
            let bias = self.graph.input(format!("{}_bias", linear.name), TensorType::f32([rows]))?;
            product = self.graph.plus(product, bias)?;
        }
        self.graph.reshape(product, [1, self.time, rows])
    }

    fn attention(&mut self, x: ValueId) -> Result<ValueId, GraphError> {
        let ModelConfig { heads, kv_heads, head_dim, ref attention, .. } = *self.model;
        let (fused, rotates) = (!attention.head_norm, attention.rotates(self.layer));
        let window = attention.window_of(self.layer);
        let qkv = self.linear(0, x)?;
        let mut inputs = if fused { vec![qkv] } else { self.normed_heads(qkv)? };
        let cache = shape([&Dim::fixed(1), &kv_heads.into(), &self.time.into(), &head_dim.into()]);
        let empty = self.graph.add(Op::Fill { value: 0.0, shape: cache }, &[])?;
        let last = self.length(self.time as i64 - 1)?;
        let total = self.length(self.time as i64)?;
        inputs.extend([empty, empty, last, total]);
        if rotates {
            for name in rotary_names(self.model, self.layer) {
                inputs.push(self.graph.input(name, TensorType::f32([self.time, head_dim / 2]))?);
            }
        }
        let (scale, cap) = (self.model.score_scale(), self.model.score_cap());
        let attributes = GroupedAttention { heads, kv_heads, head_dim, fused, window, rotates, scale, cap };
        let mut outputs = self.graph.add_many(Op::GroupQueryAttention(attributes), &inputs)?;
        self.kept = outputs.split_off(1);
        self.linear(1, outputs[0])
    }

    fn length(&mut self, tokens: i64) -> Result<ValueId, GraphError> {
        let tokens = self.graph.constant(Constant::I64(vec![tokens]), [1])?;
        self.graph.add(Op::Cast(ElementType::I32), &[tokens])
    }

    /// Queries, keys and values apart, each head of the first two normalized.
    fn normed_heads(&mut self, qkv: ValueId) -> Result<Vec<ValueId>, GraphError> {
        let ModelConfig { heads, kv_heads, head_dim, .. } = *self.model;
        let sizes = [heads, kv_heads, kv_heads].map(|heads| (heads * head_dim).into()).to_vec();
        let mut parts = self.graph.add_many(Op::Split { axis: 2, sizes }, &[qkv])?;
        for (part, name, heads) in [(0, "q_norm", heads), (1, "k_norm", kv_heads)] {
            let apart = self.graph.reshape(parts[part], [1, self.time, heads, head_dim])?;
            let normed = self.norm(name, apart)?;
            parts[part] = self.graph.reshape(normed, [1, self.time, heads * head_dim])?;
        }
        Ok(parts)
    }
}

/// The entries of `weights.bin` that a layer has, by their names after `layers.{i}.`.
pub(crate) fn tensors(model: &ModelConfig, layer: usize) -> Vec<(String, architecture::Source)> {
    let prefix = format!("layers.{layer}.");
    let own = |(name, source): (String, _)| Some((name.strip_prefix(&prefix)?.to_owned(), source));
    architecture::tensors(model).into_iter().filter_map(own).collect()
}
