//! The graphs of a package as ONNX files: built (`llama.rs`), differentiated (`differentiate.rs`), planned
//! (`recompute.rs`, `plan.rs`) and lowered (`lower.rs`). `compile.rs` writes them beside the weights, which all of them
//! read.

use commonweal_adapter::AdapterLayout;

use crate::cache_scales::CacheScales;
use crate::graph::{Graph, GraphError};
use crate::llama::{self, InferForm, TrainGraph};
use crate::lower::lower;
use crate::plan::plan;
use crate::recompute::{Recompute, recompute};
use crate::weights::WeightTable;
use crate::{ModelConfig, Quantization};

/// The name and the bytes of each graph of a package; with `cache`, keys and values are kept as 8-bit integers.
pub fn graphs(
    model: &ModelConfig,
    quantization: &Quantization,
    cache: Option<&CacheScales>,
    layout: &AdapterLayout,
    table: &WeightTable,
) -> Result<Vec<(&'static str, Vec<u8>)>, GraphError> {
    let write = |graph: &Graph, name| lower(graph, &plan(graph).order, name, table);
    let infer = |name: &'static str, form| {
        Ok::<_, GraphError>((name, write(&llama::infer(model, quantization, form, cache)?, name)?))
    };
    let train = |name: &'static str, policy, first_layer| {
        let chunk_bytes = match policy {
            Recompute::Layers => llama::CHUNK_BYTES / 4,
            _ => llama::CHUNK_BYTES,
        };
        let TrainGraph { mut graph, head_segment } =
            llama::train(model, quantization, layout, first_layer, chunk_bytes)?;
        recompute(&mut graph, policy, head_segment);
        Ok::<_, GraphError>((name, write(&graph, name)?))
    };
    Ok(vec![
        infer("infer.onnx", InferForm::Adapted)?,
        infer("infer-base.onnx", InferForm::Base)?,
        train("train.onnx", Recompute::Activations, 0)?,
        train("train-frugal.onnx", Recompute::Layers, 0)?,
        train("train-upper.onnx", Recompute::Activations, model.layers / 2)?,
    ])
}
