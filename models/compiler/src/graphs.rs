//! The two graphs of a package as ONNX files: built (`llama.rs`), differentiated (`differentiate.rs`), planned
//! (`recompute.rs`, `plan.rs`) and lowered (`lower.rs`). `compile.rs` writes them beside the weights.

use commonweal_adapter::AdapterLayout;

use crate::graph::{Graph, GraphError};
use crate::llama::{self, TrainGraph};
use crate::lower::lower;
use crate::plan::plan;
use crate::recompute::{Recompute, recompute};
use crate::weights::WeightTable;
use crate::{ModelConfig, Quantization};

/// The bytes of `infer.onnx` and of `train.onnx`.
pub fn graphs(
    model: &ModelConfig,
    quantization: &Quantization,
    layout: &AdapterLayout,
    table: &WeightTable,
) -> Result<(Vec<u8>, Vec<u8>), GraphError> {
    let infer = llama::infer(model, quantization)?;
    let TrainGraph { graph: mut train, head_segment } = llama::train(model, quantization, layout)?;
    recompute(&mut train, Recompute::Activations, head_segment);
    let bytes = |graph: &Graph, name| lower(graph, &plan(graph).order, name, table);
    Ok((bytes(&infer, "infer")?, bytes(&train, "train")?))
}
