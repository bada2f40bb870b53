//! The form of the written ONNX files, rule by rule as ONNX's own checker has it (`command.rs` runs that one too, where
//! Python has it): names assigned once and before they are read, known operator sets, complete attributes, and constants
//! whose bytes are there.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

use std::collections::BTreeSet;
use std::path::Path;

use commonweal_compiler::Bits;
use commonweal_compiler::compile::{CompileOptions, compile};
use commonweal_compiler::encoder::{self, EncoderOptions};
use commonweal_compiler::onnx::{
    AttributeProto, AttributeType, DataType, GraphProto, ModelProto, TensorProto, TypeValue, ValueInfoProto,
};
use prost::Message;
use tempfile::TempDir;

fn check_model(bytes: &[u8], weights_bytes: u64) {
    let model = ModelProto::decode(bytes).unwrap();
    assert_eq!(model.ir_version, Some(10));
    let sets: Vec<(String, i64)> =
        model.opset_import.into_iter().map(|set| (set.domain.unwrap(), set.version.unwrap())).collect();
    assert_eq!(sets, [(String::new(), 21), ("com.microsoft".into(), 1)]);
    check_graph(&model.graph.unwrap(), weights_bytes);
}

fn check_graph(graph: &GraphProto, weights_bytes: u64) {
    assert!(!graph.name.is_empty());
    let mut known = BTreeSet::new();
    let mut assign = |name: &str| assert!(known.insert(name.to_owned()), "{name:?} is assigned twice");
    for input in &graph.input {
        assign(&input.name);
    }
    for constant in &graph.initializer {
        assign(&constant.name);
        check_constant(constant, weights_bytes);
    }
    let mut names = BTreeSet::new();
    for node in &graph.node {
        let name = &node.name;
        assert!(!name.is_empty() && names.insert(name), "node name {name:?}");
        assert!(!node.op_type.is_empty() && ["", "com.microsoft"].contains(&&*node.domain), "{name}");
        for input in node.input.iter().filter(|input| !input.is_empty()) {
            assert!(known.contains(input), "{name} reads {input}, which is not computed before it");
        }
        assert!(node.output.iter().any(|output| !output.is_empty()), "{name} computes nothing");
        for output in node.output.iter().filter(|output| !output.is_empty()) {
            assert!(known.insert(output.clone()), "{output:?} is assigned twice");
        }
        for attribute in &node.attribute {
            check_attribute(name, attribute);
        }
    }
    let mut described = BTreeSet::new();
    for value in graph.output.iter().chain(&graph.value_info) {
        assert!(known.contains(&value.name), "{} is described, but never computed", value.name);
        assert!(described.insert(&value.name), "{} is described twice", value.name);
    }
    graph.input.iter().chain(&graph.output).chain(&graph.value_info).for_each(check_type);
    // Each node's outputs have a type, so that the runtime library need not infer any but those of sizes.
    assert!(!graph.value_info.is_empty());
}

fn check_type(value: &ValueInfoProto) {
    let Some(TypeValue::Tensor(tensor)) = value.kind.as_ref().and_then(|kind| kind.value.as_ref()) else {
        unreachable!("{} has no type", value.name)
    };
    let dims = &tensor.shape.as_ref().unwrap().dim;
    assert!(tensor.elem_type.is_some() && dims.iter().all(|dim| dim.value.is_some()), "{}", value.name);
}

fn check_attribute(node: &str, attribute: &AttributeProto) {
    let AttributeProto { name, f, i, s, t, floats, ints, kind } = attribute;
    let present = [
        (AttributeType::Float, f.is_some()),
        (AttributeType::Int, i.is_some()),
        (AttributeType::String, s.is_some()),
        (AttributeType::Tensor, t.is_some()),
        (AttributeType::Floats, !floats.is_empty()),
        (AttributeType::Ints, !ints.is_empty()),
    ];
    let kinds: Vec<i32> =
        present.into_iter().filter_map(|(kind, there)| there.then_some(kind as i32)).collect();
    assert!(!name.is_empty() && kinds == [kind.unwrap()], "{node}: attribute {name:?} is {attribute:?}");
}

fn check_constant(constant: &TensorProto, weights_bytes: u64) {
    let TensorProto { name, dims, data_type, raw_data, external_data, .. } = constant;
    let width = match DataType::try_from(data_type.unwrap()).unwrap() {
        DataType::Int64 => 8,
        DataType::Float | DataType::Int32 => 4,
        DataType::Uint8 | DataType::Bool => 1,
        other => unreachable!("{name} is of {other:?}"),
    };
    let bytes = dims.iter().product::<i64>() as u64 * width;
    if let Some(raw) = raw_data {
        assert!(raw.len() as u64 == bytes && external_data.is_empty(), "{name}");
        return;
    }
    let field = |key: &str| &external_data.iter().find(|pair| pair.key == key).unwrap().value;
    let number = |key: &str| field(key).parse::<u64>().unwrap();
    assert_eq!(field("location"), "weights.bin", "{name}");
    assert!(number("offset").is_multiple_of(4096), "{name} must begin at a page, to be mapped");
    assert!(number("length") == bytes && number("offset") + bytes <= weights_bytes, "{name}");
}

#[test]
fn graphs_have_the_form_of_onnx() {
    let directory = TempDir::new().unwrap();
    for (variant, bits) in [("tied", Bits::Four), ("tied", Bits::Full), ("untied", Bits::Eight)] {
        let out = directory.path().join(format!("{variant}{}", bits.count()));
        let checkpoint = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens").join(variant);
        let summary = compile(&CompileOptions { bits, ..CompileOptions::new(checkpoint, &out) }).unwrap();
        assert_eq!(std::fs::metadata(out.join("weights.bin")).unwrap().len(), summary.weights_bytes);
        for graph in ["infer.onnx", "train.onnx"] {
            check_model(&std::fs::read(out.join(graph)).unwrap(), summary.weights_bytes);
        }
    }
}

#[test]
fn classifiers_have_it_too() {
    let directory = TempDir::new().unwrap();
    let encoders = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/encoders");
    for variant in ["bert", "roberta", "deberta", "deberta-own", "modernbert", "modernbert-mean"] {
        let checkpoint = directory.path().join(variant);
        std::fs::create_dir(&checkpoint).unwrap();
        for (from, name) in
            [(variant, "config.json"), (variant, "model.safetensors"), (".", "tokenizer.json")]
        {
            std::fs::copy(encoders.join(from).join(name), checkpoint.join(name)).unwrap();
        }
        for bits in [Bits::Four, Bits::Full] {
            let out = checkpoint.join(bits.count().to_string());
            let options = EncoderOptions { bits, ..EncoderOptions::new(&checkpoint, &out) };
            let summary = encoder::compile(&options).unwrap();
            check_model(&std::fs::read(out.join("classify.onnx")).unwrap(), summary.weights_bytes);
        }
    }
}
