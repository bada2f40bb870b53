//! Writes a graph (`graph.rs`) as an ONNX file: opset 21 and ONNX Runtime's `com.microsoft` set, weights as external
//! data in `weights.bin`. After `plan.rs`, which gives the order of the nodes; `graphs.rs` calls both. The form of each
//! operator is in `lower/node.rs`, sizes known only when running in `lower/size.rs`.

mod node;
mod size;

use std::collections::BTreeSet;

use prost::Message;

use crate::graph::{Constant, ElementType, Graph, GraphError, NodeId, Source, TensorType as Kind, Value};
use crate::onnx::{
    DataLocation, DataType, Dimension, DimensionValue, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    StringStringEntryProto, TensorProto, TensorShapeProto, TensorType, TypeProto, TypeValue, ValueInfoProto,
};
use crate::shape::Dim;
use crate::weights::WeightTable;
use size::Sizes;

/// The file that holds the weights, beside the graphs.
const WEIGHTS: &str = "weights.bin";
/// The domain of ONNX Runtime's own operators.
const MICROSOFT: &str = "com.microsoft";

/// The bytes of an ONNX file. `order` holds every node once, each after those that it reads.
pub fn lower(
    graph: &Graph,
    order: &[NodeId],
    name: &str,
    table: &WeightTable,
) -> Result<Vec<u8>, GraphError> {
    let mut writer = Writer::default();
    let mut sizes = Sizes::new(graph);
    for &id in order {
        node::lower(graph, graph.node(id), &mut sizes, &mut writer)?;
    }
    let mut initializers = Vec::new();
    for (_, value) in graph.values() {
        match &value.source {
            Source::Weight { entry } => initializers.push(external(value, entry, table)?),
            Source::Constant(constant) => initializers.push(inline(&value.name, &value.kind, constant)),
            Source::Input | Source::Node(_) => {}
        }
    }
    initializers.append(&mut writer.constants);
    let described = |ids: &[crate::graph::ValueId]| ids.iter().map(|&id| describe(graph.value(id))).collect();
    let proto = ModelProto {
        ir_version: Some(10),
        producer_name: "commonweal".into(),
        producer_version: env!("CARGO_PKG_VERSION").into(),
        graph: Some(GraphProto {
            node: writer.nodes,
            name: name.into(),
            initializer: initializers,
            input: described(graph.inputs()),
            output: described(graph.outputs()),
            value_info: between(graph),
        }),
        opset_import: [("", 21), (MICROSOFT, 1)]
            .map(|(domain, version)| OperatorSetIdProto {
                domain: Some(domain.into()),
                version: Some(version),
            })
            .into(),
        metadata_props: Vec::new(),
    };
    Ok(proto.encode_to_vec())
}

/// Nodes and constants as they are written; names are made unique.
#[derive(Default)]
pub(crate) struct Writer {
    nodes: Vec<NodeProto>,
    constants: Vec<TensorProto>,
    next: usize,
}

impl Writer {
    /// A node; its outputs are named by the caller.
    fn push(&mut self, node: NodeProto) {
        self.nodes.push(node);
    }

    /// A name for a value that the graph does not know.
    fn fresh(&mut self, what: &str) -> String {
        self.next += 1;
        format!("lowered/{what}.{}", self.next)
    }

    /// A node with one output of a fresh name.
    fn compute(&mut self, mut node: NodeProto) -> String {
        let name = self.fresh(&node.op_type);
        node.name.clone_from(&name);
        node.output = vec![name.clone()];
        self.push(node);
        name
    }

    /// A constant vector of integers; equal ones are one value.
    fn integers(&mut self, values: &[i64]) -> String {
        let dims = vec![values.len() as i64];
        self.constant("int64", DataType::Int64, dims, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    /// A constant integer without dimensions.
    fn integer(&mut self, value: i64) -> String {
        self.constant("int64", DataType::Int64, Vec::new(), value.to_le_bytes().to_vec())
    }

    /// A constant float without dimensions.
    fn float(&mut self, value: f32) -> String {
        self.constant("float", DataType::Float, Vec::new(), value.to_le_bytes().to_vec())
    }

    fn constant(&mut self, what: &str, kind: DataType, dims: Vec<i64>, bytes: Vec<u8>) -> String {
        let same = |tensor: &&TensorProto| {
            tensor.data_type == Some(kind as i32)
                && tensor.dims == dims
                && tensor.raw_data.as_ref() == Some(&bytes)
        };
        if let Some(known) = self.constants.iter().find(same) {
            return known.name.clone();
        }
        let name = self.fresh(what);
        self.constants.push(tensor(name.clone(), kind, dims, bytes));
        name
    }
}

fn tensor(name: String, kind: DataType, dims: Vec<i64>, bytes: Vec<u8>) -> TensorProto {
    TensorProto {
        dims,
        data_type: Some(kind as i32),
        name,
        raw_data: Some(bytes),
        external_data: Vec::new(),
        data_location: None,
    }
}

fn data_type(element: ElementType) -> DataType {
    match element {
        ElementType::F32 => DataType::Float,
        ElementType::I64 => DataType::Int64,
        ElementType::I32 => DataType::Int32,
        ElementType::U8 => DataType::Uint8,
        ElementType::I8 => DataType::Int8,
        ElementType::Bool => DataType::Bool,
    }
}

fn inline(name: &str, kind: &Kind, constant: &Constant) -> TensorProto {
    let bytes = match constant {
        Constant::F32(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        Constant::I64(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    };
    let dims = kind.shape.as_fixed().unwrap_or_default().into_iter().map(|size| size as i64).collect();
    tensor(name.into(), data_type(kind.element), dims, bytes)
}

/// A weight as a place in `weights.bin`. The graph may read an entry in another shape, never another size.
fn external(value: &Value, entry: &str, table: &WeightTable) -> Result<TensorProto, GraphError> {
    let wrong = |expected: String, got: String| GraphError::Weight { entry: entry.into(), expected, got };
    let dims = value.kind.shape.as_fixed();
    let dims = dims.ok_or_else(|| wrong("a fixed shape".into(), value.kind.shape.to_string()))?;
    let bytes = dims.iter().product::<usize>() * value.kind.element.size_bytes();
    let found = table.find(entry).ok_or_else(|| wrong(format!("{bytes} bytes"), "no such entry".into()))?;
    if found.length != bytes as u64 {
        return Err(wrong(format!("{bytes} bytes"), format!("{} bytes", found.length)));
    }
    let pair = |key: &str, value: String| StringStringEntryProto { key: key.into(), value };
    Ok(TensorProto {
        dims: dims.into_iter().map(|size| size as i64).collect(),
        data_type: Some(data_type(value.kind.element) as i32),
        name: value.name.clone(),
        raw_data: None,
        external_data: vec![
            pair("location", WEIGHTS.into()),
            pair("offset", found.offset.to_string()),
            pair("length", found.length.to_string()),
        ],
        data_location: Some(DataLocation::External as i32),
    })
}

fn describe(value: &Value) -> ValueInfoProto {
    let dim = value.kind.shape.0.iter().map(|dim| Dimension { value: Some(dimension(dim)) }).collect();
    let tensor = TensorType {
        elem_type: Some(data_type(value.kind.element) as i32),
        shape: Some(TensorShapeProto { dim }),
    };
    let kind = Some(TypeProto { value: Some(TypeValue::Tensor(tensor)) });
    ValueInfoProto { name: value.name.clone(), kind }
}

/// A size, or its formula as a name: equal formulas are equal sizes, and the runtime library reuses the memory of
/// tensors whose sizes have the same names. Where it finds none it searches: without these names it takes 30 times as
/// long to load a graph of gradients.
fn dimension(dim: &Dim) -> DimensionValue {
    match dim.as_fixed() {
        Some(size) => DimensionValue::Value(size as i64),
        None => DimensionValue::Name(dim.to_string()),
    }
}

/// The types of values that are neither inputs nor outputs.
fn between(graph: &Graph) -> Vec<ValueInfoProto> {
    let outputs: BTreeSet<_> = graph.outputs().iter().collect();
    let computed =
        graph.values().filter(|(id, value)| matches!(value.source, Source::Node(_)) && !outputs.contains(id));
    computed.map(|(_, value)| describe(value)).collect()
}
