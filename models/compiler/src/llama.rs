//! The Llama family (`architecture.rs`) as graphs: what both forms share. `llama/infer.rs` decodes with a cache, `llama/train.rs` computes
//! losses and, through `differentiate.rs`, gradients. The blocks read the weights that `weights.rs` lays out.

pub(crate) mod block;
mod infer;
mod train;

pub use infer::{InferForm, infer};
pub use train::{CHUNK_BYTES, TrainGraph, train};

use commonweal_adapter::Target;

use crate::graph::{Graph, GraphError, TensorType, ValueId};
use crate::op::{Op, Packing};
use crate::shape::{Dim, Shape};
use crate::{Accuracy, Bias, Bits, ModelConfig, Quantization};

/// A linear layer of a block as stored: one matrix for several targets, stacked along its rows.
struct Linear {
    /// The matrix's name after `layers.{i}.`.
    name: &'static str,
    /// What is stacked, with the rows of each.
    parts: Vec<(Target, usize)>,
    /// Columns.
    inputs: usize,
}

impl Linear {
    fn rows(&self) -> usize {
        self.parts.iter().map(|(_, rows)| rows).sum()
    }
}

/// The linear layers of a block.
struct Block {
    qkv: Linear,
    o: Linear,
    gate_up: Linear,
    down: Linear,
}

impl Block {
    fn of(model: &ModelConfig) -> Self {
        let (hidden, inner) = (model.hidden_size, model.intermediate_size);
        let (query, kv) = (model.query_size(), model.kv_size());
        let linear = |name, parts: &[(Target, usize)], inputs| Linear { name, parts: parts.into(), inputs };
        Self {
            qkv: linear("qkv", &[(Target::Q, query), (Target::K, kv), (Target::V, kv)], hidden),
            o: linear("o", &[(Target::O, hidden)], query),
            gate_up: linear("gate_up", &[(Target::Gate, inner), (Target::Up, inner)], hidden),
            down: linear("down", &[(Target::Down, hidden)], inner),
        }
    }

    fn linears(&self) -> [&Linear; 4] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }
}

/// Whether a linear layer adds a bias.
fn has_bias(model: &ModelConfig, linear: &str) -> bool {
    match model.attention.bias {
        Bias::None => false,
        Bias::Qkv => linear == "qkv",
        Bias::All => matches!(linear, "qkv" | "o"),
    }
}

/// How the matrices are packed; nothing for floats.
pub(crate) fn packing(quantization: &Quantization) -> Option<Packing> {
    match quantization.bits {
        Bits::Full => None,
        bits => Some(Packing { bits: bits.count(), block_size: quantization.block_size }),
    }
}

fn vector(graph: &mut Graph, name: &str, size: usize) -> Result<ValueId, GraphError> {
    let name = format!("{name}.w");
    graph.weight(name.clone(), name, TensorType::f32([size]))
}

/// A packed matrix as `GatherBlockQuantized` reads it, `[rows, bytes]`, and its scales. Rows end with a whole block.
pub(crate) fn packed_rows(
    graph: &mut Graph,
    name: &str,
    (rows, columns): (usize, usize),
    packing: Packing,
) -> Result<(ValueId, ValueId), GraphError> {
    let bytes = packing.blocks(columns) * packing.block_bytes();
    let weights =
        graph.weight(format!("{name}.q.rows"), format!("{name}.q"), TensorType::u8([rows, bytes]))?;
    Ok((weights, scales(graph, name, rows, columns, packing)?))
}

fn scales(
    graph: &mut Graph,
    name: &str,
    rows: usize,
    columns: usize,
    packing: Packing,
) -> Result<ValueId, GraphError> {
    let name = format!("{name}.s");
    let kind = TensorType::f32([rows, packing.blocks(columns)]);
    match graph.find(&name) {
        Some(known) => Ok(known),
        None => graph.weight(name.clone(), name, kind),
    }
}

/// Rows of the embedding, for tokens of any shape.
fn embed(
    graph: &mut Graph,
    model: &ModelConfig,
    quantization: &Quantization,
    tokens: ValueId,
) -> Result<ValueId, GraphError> {
    let size = (model.vocab_size, model.hidden_size);
    let rows = if let Some(packing) = packing(quantization) {
        let (weights, scales) = packed_rows(graph, "embed", size, packing)?;
        let rows = graph.add(Op::GatherBlockQuantized { packing }, &[weights, tokens, scales])?;
        graph.narrowed(rows, size.1)?
    } else {
        let weights = graph.weight("embed.w", "embed.w", TensorType::f32([size.0, size.1]))?;
        graph.add(Op::Gather { axis: 0 }, &[weights, tokens])?
    };
    let Some(gemma) = &model.gemma else { return Ok(rows) };
    let scale = graph.scalar(gemma.embedding_scale as f32)?;
    graph.times(rows, scale)
}

/// The activation of the gated layer.
fn activation(model: &ModelConfig) -> Op {
    if model.gemma.is_some() { Op::Gelu { tanh: true } } else { Op::QuickGelu { alpha: 1.0 } }
}

/// What a block adds to the residual stream, normalized where the architecture has a norm behind the block too.
fn post_norm(graph: &mut Graph, model: &ModelConfig, name: &str, x: ValueId) -> Result<ValueId, GraphError> {
    if model.gemma.is_none() {
        return Ok(x);
    }
    let weight = vector(graph, name, model.hidden_size)?;
    graph.add(Op::RmsNorm { epsilon: model.rms_norm_eps as f32 }, &[x, weight])
}

/// Logits, bent to stay within a cap where there is one.
fn capped(graph: &mut Graph, cap: Option<f32>, x: ValueId) -> Result<ValueId, GraphError> {
    cap.map_or(Ok(x), |cap| graph.soft_capped(x, cap))
}

/// `x Wᵀ` with a frozen matrix of `rows` by `columns`.
pub(crate) fn multiply(
    graph: &mut Graph,
    quantization: &Quantization,
    name: &str,
    (rows, columns): (usize, usize),
    x: ValueId,
) -> Result<ValueId, GraphError> {
    let known = |graph: &mut Graph, entry: String, kind| match graph.find(&entry) {
        Some(known) => Ok(known),
        None => graph.weight(entry.clone(), entry, kind),
    };
    let Some(packing) = packing(quantization) else {
        let weight = known(graph, format!("{name}.w"), TensorType::f32([rows, columns]))?;
        return graph.matmul_transposed(x, weight);
    };
    let accuracy_level = match quantization.accuracy {
        Accuracy::Fast => 4,
        Accuracy::Exact => 0,
    };
    let blocks = Shape::from([rows, packing.blocks(columns), packing.block_bytes()]);
    let weight = known(graph, format!("{name}.q"), TensorType::u8(blocks))?;
    let scales = scales(graph, name, rows, columns, packing)?;
    graph.add(Op::MatMulNBits { packing, accuracy_level }, &[x, weight, scales])
}

fn head_name(model: &ModelConfig) -> &'static str {
    if model.tied { "embed" } else { "head" }
}

/// The rotary tables of a layer, cosines and sines, `[context, head_dim / 2]` each.
fn rotary_tables(graph: &mut Graph, model: &ModelConfig, layer: usize) -> Result<[ValueId; 2], GraphError> {
    let kind = TensorType::f32([model.context, model.head_dim / 2]);
    let [cosines, sines] = rotary_names(model, layer).map(|name| match graph.find(name) {
        Some(known) => Ok(known),
        None => graph.weight(name, name, kind.clone()),
    });
    Ok([cosines?, sines?])
}

/// The names of a layer's rotary tables in `weights.bin`.
fn rotary_names(model: &ModelConfig, layer: usize) -> [&'static str; 2] {
    let has_local = model.gemma.as_ref().is_some_and(|gemma| gemma.local_theta.is_some());
    match model.attention.window_of(layer) {
        Some(_) if has_local => ["rope.local.cos", "rope.local.sin"],
        _ => ["rope.cos", "rope.sin"],
    }
}

fn shape<const N: usize>(dims: [&Dim; N]) -> Shape {
    dims.into_iter().cloned().collect()
}
