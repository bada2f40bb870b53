//! The loss and its gradient with respect to an adapter. The forward is written here with operators that have a
//! gradient rule; the backward is derived from it (`differentiate.rs`). Activations are `[rows, width]` with
//! `rows = batch · time`, but inside the attention.

use std::collections::BTreeMap;

use commonweal_adapter::{AdapterLayout, Part, Target};

use super::{
    Block, Linear, activation, capped, embed, has_bias, head_name, multiply, post_norm, rotary_tables, shape,
    vector,
};
use crate::differentiate::differentiate;
use crate::graph::{Constant, ElementType, Graph, GraphError, Keep, TensorType, ValueId};
use crate::op::{Op, Unary};
use crate::shape::{Dim, Shape};
use crate::{ModelConfig, Quantization};

/// Added to the scores of positions that lie ahead: far below any score, so that their probability is exactly zero,
/// and finite, so that no difference of two is undefined.
const MASKED: f32 = -1e9;

/// Logits of one chunk of the sequence take about this much for a batch of `CHUNKED_ROWS` tokens, unless memory is
/// short. The backward of each chunk expands the head once more, so more chunks cost time.
pub const CHUNK_BYTES: usize = 64 << 20;

/// The batch, in tokens, for which the number of chunks is chosen; larger ones have larger chunks.
const CHUNKED_ROWS: usize = 256;

/// The loss with its gradient, before planning.
#[derive(Debug)]
pub struct TrainGraph {
    /// Forward, then backward.
    pub graph: Graph,
    /// The segment that holds the final norm and the loss, whose backward follows its forward at once.
    pub head_segment: usize,
}

/// Builds `train.onnx`'s graph for the modules of `layout`, at any rank. Of the layers before `first_layer` the adapter
/// is used and not trained: the backward ends there. The logits are computed for about `chunk_bytes` of them at a time.
///
/// Inputs: `input_ids`, `targets` `[batch, time] i64`; `weights [batch, time] f32`, signed, 0 for positions without a
/// loss; `lora_scale [] f32`; and each tensor of the adapter by its canonical name, `rank` not fixed.
/// Outputs: `loss [] f32`, `-Σ weights · log-probability of the target`; `token_logprob [batch, time] f32`; and
/// `grad.{name}` for each trained tensor of the adapter.
pub fn train(
    model: &ModelConfig,
    quantization: &Quantization,
    layout: &AdapterLayout,
    first_layer: usize,
    chunk_bytes: usize,
) -> Result<TrainGraph, GraphError> {
    let mut trainer = Trainer { chunk_bytes, ..Trainer::new(model, quantization, layout)? };
    let (loss, token_logprob) = trainer.forward()?;
    let trained: Vec<(String, ValueId)> = layout
        .tensors()
        .iter()
        .filter(|tensor| tensor.layer >= first_layer)
        .filter_map(|tensor| {
            Some((tensor.name(), *trainer.adapters.get(&(tensor.layer, tensor.target, tensor.part))?))
        })
        .collect();
    let parameters: Vec<ValueId> = trained.iter().map(|&(_, value)| value).collect();
    let mut graph = trainer.graph;
    graph.output("loss", loss)?;
    graph.output("token_logprob", token_logprob)?;
    let gradients = differentiate(&mut graph, loss, &parameters)?;
    for ((name, _), gradient) in trained.iter().zip(gradients) {
        graph.output(format!("grad.{name}"), gradient)?;
    }
    Ok(TrainGraph { graph, head_segment: model.layers })
}

struct Trainer<'m> {
    model: &'m ModelConfig,
    quantization: &'m Quantization,
    chunk_bytes: usize,
    block: Block,
    graph: Graph,
    adapters: BTreeMap<(usize, Target, Part), ValueId>,
    tokens: ValueId,
    targets: ValueId,
    weights: ValueId,
    scale: ValueId,
}

/// What every layer's attention reads.
#[derive(Clone, Copy)]
struct Positions {
    start: ValueId,
    mask: ValueId,
    /// The mask of layers with a window; `mask` where there are none.
    window_mask: ValueId,
}

impl<'m> Trainer<'m> {
    fn new(
        model: &'m ModelConfig,
        quantization: &'m Quantization,
        layout: &AdapterLayout,
    ) -> Result<Self, GraphError> {
        let mut graph = Graph::new();
        let (batch, time, rank) = (Dim::named("batch"), Dim::named("time"), Dim::named("rank"));
        let tokens = graph.input("input_ids", TensorType::i64(shape([&batch, &time])))?;
        let targets = graph.input("targets", TensorType::i64(shape([&batch, &time])))?;
        let weights = graph.input("weights", TensorType::f32(shape([&batch, &time])))?;
        let scale = graph.input("lora_scale", TensorType::f32(Shape::scalar()))?;
        let mut adapters = BTreeMap::new();
        for tensor in layout.tensors() {
            let dims: [Dim; 2] = match tensor.part {
                Part::A => [rank.clone(), tensor.columns.into()],
                Part::B => [tensor.rows.into(), rank.clone()],
            };
            let value = graph.input(tensor.name(), TensorType::f32(dims))?;
            adapters.insert((tensor.layer, tensor.target, tensor.part), value);
        }
        let block = Block::of(model);
        Ok(Self {
            model,
            quantization,
            chunk_bytes: CHUNK_BYTES,
            block,
            graph,
            adapters,
            tokens,
            targets,
            weights,
            scale,
        })
    }

    fn rows() -> Dim {
        Dim::named("batch").times(&Dim::named("time"))
    }

    fn forward(&mut self) -> Result<(ValueId, ValueId), GraphError> {
        let (model, hidden) = (self.model, self.model.hidden_size);
        let epsilon = model.rms_norm_eps as f32;
        self.graph.enter("embed", 0);
        let positions = self.positions()?;
        let tokens = self.graph.reshape(self.tokens, [Self::rows()])?;
        let mut x = embed(&mut self.graph, model, self.quantization, tokens)?;
        self.graph.keep(x, Keep::Always);
        for layer in 0..model.layers {
            self.graph.enter(format!("layers.{layer}.attention"), layer);
            let weight = vector(&mut self.graph, &format!("layers.{layer}.attn_norm"), hidden)?;
            let normed = self.graph.add(Op::RmsNorm { epsilon }, &[x, weight])?;
            let attended = self.attention(layer, normed, positions)?;
            let name = format!("layers.{layer}.attn_post_norm");
            let attended = post_norm(&mut self.graph, model, &name, attended)?;
            x = self.graph.plus(x, attended)?;
            self.graph.keep(x, Keep::Activation);
            self.graph.enter(format!("layers.{layer}.mlp"), layer);
            let weight = vector(&mut self.graph, &format!("layers.{layer}.mlp_norm"), hidden)?;
            let normed = self.graph.add(Op::RmsNorm { epsilon }, &[x, weight])?;
            let gate_up = self.linear(layer, 2, normed)?;
            for &half in &gate_up {
                self.graph.keep(half, Keep::Activation);
            }
            let gate = self.graph.add(activation(model), &[gate_up[0]])?;
            let inner = self.graph.times(gate, gate_up[1])?;
            let projected = self.linear(layer, 3, inner)?;
            let name = format!("layers.{layer}.mlp_post_norm");
            let projected = post_norm(&mut self.graph, model, &name, projected[0])?;
            x = self.graph.plus(x, projected)?;
            self.graph.keep(x, Keep::Always);
        }
        self.graph.enter("head", model.layers);
        let weight = vector(&mut self.graph, "norm", hidden)?;
        let normed = self.graph.add(Op::RmsNorm { epsilon }, &[x, weight])?;
        self.cross_entropy(normed)
    }

    /// Rows begin at position zero; a mask is `[time, time]`, [`MASKED`] where the column lies ahead of the row, and in
    /// layers with a window also where it lies too far behind.
    fn positions(&mut self) -> Result<Positions, GraphError> {
        let time = Dim::named("time");
        let graph = &mut self.graph;
        let start = graph.constant(Constant::I64(vec![0]), [1])?;
        let range = graph.add(Op::Range(time.clone()), &[])?;
        let query = graph.reshape(range, [time.clone(), 1.into()])?;
        let key = graph.reshape(range, [1.into(), time])?;
        let ahead = graph.add(Op::Less, &[query, key])?;
        let (masked, zero) = (graph.scalar(MASKED)?, graph.scalar(0.0)?);
        let mask = graph.add(Op::Where, &[ahead, masked, zero])?;
        graph.keep(mask, Keep::Always);
        let window_mask = match &self.model.attention.window {
            None => mask,
            Some(window) => {
                // Positions are below 2^20: exact as floats.
                let [query, key] = [query, key].map(|at| graph.add(Op::Cast(ElementType::F32), &[at]));
                let reach = graph.scalar(window.tokens as f32 - 1.0)?;
                let farthest = graph.minus(query?, reach)?;
                let behind = graph.add(Op::Less, &[key?, farthest])?;
                let mask = graph.add(Op::Where, &[behind, masked, mask])?;
                graph.keep(mask, Keep::Always);
                mask
            }
        };
        Ok(Positions { start, mask, window_mask })
    }

    /// Linear layer `which` of a block over `[rows, inputs]`: `x Wᵀ + bias + scale (x Aᵀ) Bᵀ`, one output for each target.
    /// The adapters of one input are multiplied by it at once.
    fn linear(&mut self, layer: usize, which: usize, x: ValueId) -> Result<Vec<ValueId>, GraphError> {
        let Linear { name, ref parts, inputs } = *self.block.linears()[which];
        let (parts, rows) = (parts.clone(), self.block.linears()[which].rows());
        let matrix = format!("layers.{layer}.{name}");
        let mut base = multiply(&mut self.graph, self.quantization, &matrix, (rows, inputs), x)?;
        if has_bias(self.model, name) {
            let bias = vector(&mut self.graph, &format!("layers.{layer}.{name}_bias"), rows)?;
            base = self.graph.plus(base, bias)?;
        }
        let sizes = parts.iter().map(|&(_, rows)| rows.into()).collect();
        let mut outputs = self.pieces(base, 1, sizes)?;
        let adapter = |target, part| self.adapters.get(&(layer, target, part)).copied();
        let adapted = parts.iter().enumerate().filter_map(|(place, &(target, _))| {
            Some((place, adapter(target, Part::A)?, adapter(target, Part::B)?))
        });
        let adapted: Vec<(usize, ValueId, ValueId)> = adapted.collect();
        let down: Vec<ValueId> = adapted.iter().map(|&(_, a, _)| a).collect();
        let stacked = match down.as_slice() {
            [] => return Ok(outputs),
            [one] => *one,
            several => self.graph.add(Op::Concat { axis: 0 }, several)?,
        };
        let inner = self.graph.matmul_transposed(x, stacked)?;
        let inner = self.graph.times(inner, self.scale)?;
        let inner = self.pieces(inner, 1, vec![Dim::named("rank"); adapted.len()])?;
        for ((place, _, b), inner) in adapted.into_iter().zip(inner) {
            self.graph.keep(inner, Keep::Activation);
            let update = self.graph.matmul_transposed(inner, b)?;
            outputs[place] = self.graph.plus(outputs[place], update)?;
        }
        Ok(outputs)
    }

    fn pieces(&mut self, x: ValueId, axis: usize, sizes: Vec<Dim>) -> Result<Vec<ValueId>, GraphError> {
        if sizes.len() == 1 { Ok(vec![x]) } else { self.graph.add_many(Op::Split { axis, sizes }, &[x]) }
    }

    /// Grouped queries attend without copies of the keys: the queries of a group are rows of one matrix.
    fn attention(&mut self, layer: usize, x: ValueId, at: Positions) -> Result<ValueId, GraphError> {
        let ModelConfig { heads, kv_heads, head_dim, .. } = *self.model;
        let qkv = self.linear(layer, 0, x)?;
        let (batch, time, kv, width) =
            (Dim::named("batch"), Dim::named("time"), Dim::fixed(kv_heads), Dim::fixed(head_dim));
        let group = Dim::fixed(heads / kv_heads);
        let grouped_time = group.times(&time);
        let query = self.head_norm(layer, "q_norm", qkv[0], heads)?;
        let key = self.head_norm(layer, "k_norm", qkv[1], kv_heads)?;
        let query = self.rotate(layer, query, heads, at)?;
        let key = self.rotate(layer, key, kv_heads, at)?;
        let mask = match self.model.attention.window_of(layer) {
            Some(_) => at.window_mask,
            None => at.mask,
        };
        let graph = &mut self.graph;
        let query = graph.reshape(query, shape([&batch, &time, &kv, &group, &width]))?;
        let query = graph.transpose(query, &[0, 2, 3, 1, 4])?;
        let query = graph.reshape(query, shape([&batch, &kv, &grouped_time, &width]))?;
        let key = graph.reshape(key, shape([&batch, &time, &kv, &width]))?;
        let key = graph.transpose(key, &[0, 2, 1, 3])?;
        let value = graph.reshape(qkv[2], shape([&batch, &time, &kv, &width]))?;
        let value = graph.transpose(value, &[0, 2, 1, 3])?;
        for operand in [query, key, value] {
            graph.keep(operand, Keep::Activation);
        }
        let scores = graph.product((query, false), (key, true), self.model.score_scale())?;
        let scores = capped(graph, self.model.score_cap(), scores)?;
        let scores = graph.reshape(scores, shape([&batch, &kv, &group, &time, &time]))?;
        let scores = graph.plus(scores, mask)?;
        let probabilities = graph.add(Op::Softmax, &[scores])?;
        let probabilities = graph.reshape(probabilities, shape([&batch, &kv, &grouped_time, &time]))?;
        let context = graph.matmul(probabilities, value)?;
        let context = graph.reshape(context, shape([&batch, &kv, &group, &time, &width]))?;
        let context = graph.transpose(context, &[0, 3, 1, 2, 4])?;
        let context = graph.reshape(context, [Self::rows(), (heads * head_dim).into()])?;
        graph.keep(context, Keep::Activation);
        Ok(self.linear(layer, 1, context)?[0])
    }

    /// The RMS norm of each head of `[rows, heads · head_dim]`, where the architecture has one.
    fn head_norm(
        &mut self,
        layer: usize,
        name: &str,
        x: ValueId,
        heads: usize,
    ) -> Result<ValueId, GraphError> {
        if !self.model.attention.head_norm {
            return Ok(x);
        }
        let ModelConfig { head_dim, rms_norm_eps, .. } = *self.model;
        let weight = vector(&mut self.graph, &format!("layers.{layer}.{name}"), head_dim)?;
        let apart = self.graph.reshape(x, [Self::rows(), heads.into(), head_dim.into()])?;
        let normed = self.graph.add(Op::RmsNorm { epsilon: rms_norm_eps as f32 }, &[apart, weight])?;
        self.graph.reshape(normed, [Self::rows(), (heads * head_dim).into()])
    }

    /// Rotary positions over `[rows, heads · head_dim]`, where the layer has them; gives
    /// `[batch, time, heads · head_dim]`.
    fn rotate(
        &mut self,
        layer: usize,
        x: ValueId,
        heads: usize,
        at: Positions,
    ) -> Result<ValueId, GraphError> {
        let width = Dim::fixed(heads * self.model.head_dim);
        let x = self.graph.reshape(x, shape([&Dim::named("batch"), &Dim::named("time"), &width]))?;
        if !self.model.attention.rotates(layer) {
            return Ok(x);
        }
        let [cosines, sines] = rotary_tables(&mut self.graph, self.model, layer)?;
        self.graph.add(Op::RotaryEmbedding { heads }, &[x, at.start, cosines, sines])
    }

    /// The loss and the log-probabilities of the targets, chunk by chunk of the sequence, so that the logits of all of
    /// it never exist at once.
    fn cross_entropy(&mut self, normed: ValueId) -> Result<(ValueId, ValueId), GraphError> {
        let ModelConfig { hidden_size, vocab_size, .. } = *self.model;
        let rows = Self::rows();
        let chunks = rows.chunks(chunk_count(vocab_size, self.chunk_bytes));
        let column = shape([&rows, &Dim::fixed(1)]);
        let targets = self.graph.reshape(self.targets, column.clone())?;
        let weights = self.graph.reshape(self.weights, column)?;
        let normed = self.pieces(normed, 0, chunks.clone())?;
        let targets = self.pieces(targets, 0, chunks.clone())?;
        let weights = self.pieces(weights, 0, chunks)?;
        let head = head_name(self.model);
        let (mut sum, mut picked) = (None, Vec::with_capacity(normed.len()));
        for ((normed, target), weight) in normed.into_iter().zip(targets).zip(weights) {
            let size = (vocab_size, hidden_size);
            let logits = multiply(&mut self.graph, self.quantization, head, size, normed)?;
            let logits = capped(&mut self.graph, self.model.logit_cap(), logits)?;
            let logprobs = self.graph.add(Op::LogSoftmax, &[logits])?;
            let logprob = self.graph.add(Op::GatherElements { axis: 1 }, &[logprobs, target])?;
            let weighted = self.graph.times(logprob, weight)?;
            let total = self.graph.total(weighted)?;
            sum = Some(match sum {
                None => total,
                Some(sum) => self.graph.plus(sum, total)?,
            });
            picked.push(logprob);
        }
        let sum = match sum {
            Some(sum) => sum,
            None => self.graph.scalar(0.0)?,
        };
        let loss = self.graph.unary(Unary::Neg, sum)?;
        let picked = self.graph.add(Op::Concat { axis: 0 }, &picked)?;
        let picked = self.graph.reshape(picked, shape([&Dim::named("batch"), &Dim::named("time")]))?;
        Ok((loss, picked))
    }
}

/// Pieces of the sequence for a vocabulary; at least two, so that none holds all logits.
fn chunk_count(vocab_size: usize, chunk_bytes: usize) -> usize {
    (vocab_size * CHUNKED_ROWS * size_of::<f32>()).div_ceil(chunk_bytes.max(1)).clamp(2, 32)
}
