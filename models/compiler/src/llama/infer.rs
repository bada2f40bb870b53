//! The decoder with a cache and adapter inputs: prefill and decoding in one graph, on the fused kernels of ONNX
//! Runtime. The caller writes the cache in place: one buffer is bound as `past` and as `present`.

use super::{Block, Linear, embed, has_bias, head_name, multiply, rotary_tables, shape, vector};
use crate::cache_scales::CacheScales;
use crate::graph::{Constant, ElementType, Graph, GraphError, TensorType, ValueId};
use crate::op::{GroupedAttention, Op};
use crate::shape::{Dim, Shape};
use crate::{ModelConfig, Quantization};

/// Names of the inner sizes of the fused adapter inputs, by linear layer.
const RANKS: [&str; 4] = ["rank_qkv", "rank_o", "rank_gate_up", "rank_down"];

/// Whether the graph takes an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InferForm {
    /// `infer.onnx`: the adapter is an input, so that several alternate over one base.
    Adapted,
    /// `infer-base.onnx`: the base alone, which spares three small products and sums at each linear layer.
    Base,
}

/// Builds the graph of `infer.onnx` or, without the adapter's inputs, of `infer-base.onnx`.
///
/// Inputs: `input_ids [batch, new] i64`; `seqlens_k [batch] i32`, tokens in the row with the new ones, less one;
/// `total_seq [1] i32`; `logit_rows [rows] i64`, which of the `batch · new` positions to give logits for; for each
/// layer `past.{i}.key` and `past.{i}.value`, `[batch, kv_heads, cache, head_dim] f32`, or `i8` with `scales`, and for
/// each of its linear layers `lora.{i}.{qkv|o|gate_up|down}.a [inputs, rank]` and `.b [rank, outputs]`.
/// Outputs: `logits [rows, vocab]`, `present.{i}.key`, `present.{i}.value`.
pub fn infer(
    model: &ModelConfig,
    quantization: &Quantization,
    form: InferForm,
    scales: Option<&CacheScales>,
) -> Result<Graph, GraphError> {
    let mut decoder = Decoder { scales, ..Decoder::new(model, quantization, form)? };
    let logits = decoder.run()?;
    decoder.graph.output("logits", logits)?;
    for (layer, (key, value)) in std::mem::take(&mut decoder.present).into_iter().enumerate() {
        decoder.graph.output(format!("present.{layer}.key"), key)?;
        decoder.graph.output(format!("present.{layer}.value"), value)?;
    }
    Ok(decoder.graph)
}

struct Decoder<'m> {
    model: &'m ModelConfig,
    quantization: &'m Quantization,
    form: InferForm,
    block: Block,
    graph: Graph,
    tokens: ValueId,
    lengths: ValueId,
    total: ValueId,
    logit_rows: ValueId,
    tables: (ValueId, ValueId),
    present: Vec<(ValueId, ValueId)>,
    /// Of an 8-bit cache.
    scales: Option<&'m CacheScales>,
}

impl<'m> Decoder<'m> {
    fn new(
        model: &'m ModelConfig,
        quantization: &'m Quantization,
        form: InferForm,
    ) -> Result<Self, GraphError> {
        let mut graph = Graph::new();
        let (batch, new) = (Dim::named("batch"), Dim::named("new"));
        let tokens = graph.input("input_ids", TensorType::i64(shape([&batch, &new])))?;
        let lengths = graph.input("seqlens_k", TensorType::i32(shape([&batch])))?;
        let total = graph.input("total_seq", TensorType::i32([1]))?;
        let logit_rows = graph.input("logit_rows", TensorType::i64([Dim::named("rows")]))?;
        let tables = rotary_tables(&mut graph, model)?;
        let (block, present) = (Block::of(model), Vec::new());
        Ok(Self {
            model,
            quantization,
            form,
            block,
            graph,
            tokens,
            lengths,
            total,
            logit_rows,
            tables,
            present,
            scales: None,
        })
    }

    fn run(&mut self) -> Result<ValueId, GraphError> {
        let (model, hidden) = (self.model, self.model.hidden_size);
        let epsilon = model.rms_norm_eps as f32;
        self.graph.enter("embed", 0);
        let mut residual = embed(&mut self.graph, model, self.quantization, self.tokens)?;
        let weight = self.norm_weight(0)?;
        let mut normed = self.graph.add(Op::RmsNorm { epsilon }, &[residual, weight])?;
        for layer in 0..model.layers {
            self.graph.enter(format!("layers.{layer}"), layer);
            let context = self.attention(layer, normed)?;
            let attended = self.linear(layer, 1, context)?;
            let weight = vector(&mut self.graph, &format!("layers.{layer}.mlp_norm"), hidden)?;
            (normed, residual) = self.skip_norm(attended, residual, weight, epsilon)?;
            let inner = self.gated(layer, normed)?;
            let projected = self.linear(layer, 3, inner)?;
            let weight = self.norm_weight(layer + 1)?;
            (normed, residual) = self.skip_norm(projected, residual, weight, epsilon)?;
        }
        self.graph.enter("head", model.layers);
        self.head(normed)
    }

    /// The weight of the norm before layer `layer`, which for the last is the head's.
    fn norm_weight(&mut self, layer: usize) -> Result<ValueId, GraphError> {
        let name =
            if layer < self.model.layers { format!("layers.{layer}.attn_norm") } else { "norm".into() };
        vector(&mut self.graph, &name, self.model.hidden_size)
    }

    fn skip_norm(
        &mut self,
        x: ValueId,
        skip: ValueId,
        weight: ValueId,
        epsilon: f32,
    ) -> Result<(ValueId, ValueId), GraphError> {
        let outputs = self.graph.add_many(Op::SkipRmsNorm { epsilon }, &[x, skip, weight])?;
        Ok((outputs[0], outputs[1]))
    }

    fn attention(&mut self, layer: usize, x: ValueId) -> Result<ValueId, GraphError> {
        let ModelConfig { heads, kv_heads, head_dim, ref attention, .. } = *self.model;
        let (fused, rotates) = (!attention.head_norm, attention.rotates(layer));
        let window = attention.window_of(layer);
        let qkv = self.linear(layer, 0, x)?;
        let mut inputs = if fused { vec![qkv] } else { self.normed_heads(layer, qkv)? };
        let cache = [Dim::named("batch"), kv_heads.into(), Dim::named("cache"), head_dim.into()];
        let element = if self.scales.is_some() { ElementType::I8 } else { ElementType::F32 };
        let cache = TensorType { element, shape: cache.into() };
        let key = self.graph.input(format!("past.{layer}.key"), cache.clone())?;
        let value = self.graph.input(format!("past.{layer}.value"), cache)?;
        inputs.extend([key, value, self.lengths, self.total]);
        if rotates {
            inputs.extend([self.tables.0, self.tables.1]);
        }
        inputs.extend(self.cache_scales(layer)?);
        let attributes = GroupedAttention { heads, kv_heads, head_dim, fused, window, rotates };
        let outputs = self.graph.add_many(Op::GroupQueryAttention(attributes), &inputs)?;
        self.present.push((outputs[1], outputs[2]));
        Ok(outputs[0])
    }

    /// The scales of a layer's keys and values, where the cache has any.
    fn cache_scales(&mut self, layer: usize) -> Result<Vec<ValueId>, GraphError> {
        let Some(layer) = self.scales.and_then(|scales| scales.layers.get(layer)) else {
            return Ok(Vec::new());
        };
        [&layer.key, &layer.value]
            .into_iter()
            .map(|scales| self.graph.constant(Constant::F32(scales.clone()), [scales.len()]))
            .collect()
    }

    /// Queries, keys and values apart, each head of the first two normalized.
    fn normed_heads(&mut self, layer: usize, qkv: ValueId) -> Result<Vec<ValueId>, GraphError> {
        let ModelConfig { heads, kv_heads, head_dim, rms_norm_eps, .. } = *self.model;
        let sizes = [heads, kv_heads, kv_heads].map(|heads| (heads * head_dim).into()).to_vec();
        let mut parts = self.graph.add_many(Op::Split { axis: 2, sizes }, &[qkv])?;
        let leading = [Dim::named("batch"), Dim::named("new")];
        for (part, name, heads) in [(0, "q_norm", heads), (1, "k_norm", kv_heads)] {
            let apart = leading.iter().cloned().chain([heads.into(), head_dim.into()]);
            let split = self.graph.reshape(parts[part], apart.collect::<Shape>())?;
            let weight = vector(&mut self.graph, &format!("layers.{layer}.{name}"), head_dim)?;
            let normed = self.graph.add(Op::RmsNorm { epsilon: rms_norm_eps as f32 }, &[split, weight])?;
            let whole = leading.iter().cloned().chain([(heads * head_dim).into()]);
            parts[part] = self.graph.reshape(normed, whole.collect::<Shape>())?;
        }
        Ok(parts)
    }

    fn gated(&mut self, layer: usize, x: ValueId) -> Result<ValueId, GraphError> {
        let fused = self.linear(layer, 2, x)?;
        let sizes = vec![self.model.intermediate_size.into(); 2];
        let halves = self.graph.add_many(Op::Split { axis: 2, sizes }, &[fused])?;
        let gate = self.graph.add(Op::QuickGelu { alpha: 1.0 }, &[halves[0]])?;
        self.graph.times(gate, halves[1])
    }

    /// Linear layer `which` of a block, plus its bias and its adapter: `x W + bias + (x a) b`.
    fn linear(&mut self, layer: usize, which: usize, x: ValueId) -> Result<ValueId, GraphError> {
        let Linear { name, inputs, .. } = *self.block.linears()[which];
        let rows = self.block.linears()[which].rows();
        let matrix = format!("layers.{layer}.{name}");
        let mut base = multiply(&mut self.graph, self.quantization, &matrix, (rows, inputs), x)?;
        if has_bias(self.model, name) {
            let bias = vector(&mut self.graph, &format!("layers.{layer}.{name}_bias"), rows)?;
            base = self.graph.plus(base, bias)?;
        }
        if self.form == InferForm::Base {
            return Ok(base);
        }
        let rank = Dim::named(RANKS[which]);
        let kind = |dims: [Dim; 2]| TensorType::f32(dims);
        let a = self.graph.input(format!("lora.{layer}.{name}.a"), kind([inputs.into(), rank.clone()]))?;
        let b = self.graph.input(format!("lora.{layer}.{name}.b"), kind([rank, rows.into()]))?;
        let inner = self.graph.matmul(x, a)?;
        let adapter = self.graph.matmul(inner, b)?;
        self.graph.plus(base, adapter)
    }

    fn head(&mut self, normed: ValueId) -> Result<ValueId, GraphError> {
        let ModelConfig { hidden_size, vocab_size, .. } = *self.model;
        let positions = Dim::named("batch").times(&Dim::named("new"));
        let flat = self.graph.reshape(normed, [positions, hidden_size.into()])?;
        let chosen = self.graph.add(Op::Gather { axis: 0 }, &[flat, self.logit_rows])?;
        multiply(&mut self.graph, self.quantization, head_name(self.model), (vocab_size, hidden_size), chosen)
    }
}
