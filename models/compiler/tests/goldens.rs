//! Compiled graphs in the real ONNX Runtime against an independent implementation in PyTorch (`goldens/make.py`):
//! logits, loss, log-probabilities and the gradient of every adapter tensor, at 32, 8 and 4 bits, and the stored codes.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed test may panic")]

#[path = "onnx_runtime/mod.rs"]
mod onnx_runtime;

use commonweal_compiler::llama::{CHUNK_BYTES, TrainGraph, train};
use commonweal_compiler::lower::lower;
use commonweal_compiler::plan::plan;
use commonweal_compiler::recompute::{Recompute, recompute};
use commonweal_compiler::weights::WeightTable;
use commonweal_compiler::{Accuracy, Bits, ModelConfig};
use commonweal_package::TrainGraph as Graph;
use onnx_runtime::case::{Case, check};
use onnx_runtime::{Golden, read};

/// What differs between 32-bit and 64-bit floats; measured errors are about 1e-6.
const TOLERANCE: f64 = 2e-5;

/// Fast kernels round activations to 8 bits; measured errors are up to 2e-2.
const TOLERANCE_FAST: f64 = 5e-2;

fn case(variant: &str, bits: u8, accuracy: Accuracy) -> Case {
    let checkpoint = onnx_runtime::goldens().join(variant);
    Case::new(
        &format!("{variant} {bits} {accuracy:?}"),
        &checkpoint,
        (Bits::try_from(bits).unwrap(), accuracy),
        read(&format!("{variant}.inputs.safetensors")),
        read(&format!("{variant}.{bits}.safetensors")),
    )
}

fn gradients_agree(variant: &str, bits: u8) {
    let case = case(variant, bits, Accuracy::Exact);
    let upper = case.package.manifest().model.layers / 2;
    for (graph, first_layer) in [(Graph::Full, 0), (Graph::Frugal, 0), (Graph::Upper, upper)] {
        case.graph_agrees(&case.package.train_graph(graph).unwrap(), graph.file(), TOLERANCE, first_layer);
    }
}

fn logits_agree(variant: &str, bits: u8, accuracy: Accuracy, tolerance: f64) {
    case(variant, bits, accuracy).logits_agree(tolerance);
}

fn codes_agree(variant: &str, bits: u8) {
    let case = case(variant, bits, Accuracy::Exact);
    let manifest = case.package.manifest();
    let table = WeightTable::plan(&manifest.model, &manifest.quantization);
    let file = std::fs::read(case.package.weights()).unwrap();
    assert_eq!(file.len() as u64, table.length());
    let mut compared = 0;
    for (name, golden) in &case.expected {
        let Some(entry) = table.find(name) else { continue };
        let bytes = &file[entry.offset as usize..(entry.offset + entry.length) as usize];
        match golden {
            Golden::Bytes(shape, codes) => assert_eq!((&entry.shape, bytes), (shape, &codes[..]), "{name}"),
            Golden::Floats(shape, scales) => {
                assert_eq!(&entry.shape, shape, "{name}");
                let got: Vec<f32> =
                    bytes.as_chunks().0.iter().map(|&four| f32::from_le_bytes(four)).collect();
                check(&format!("{variant} {bits} {name}"), &got, scales, 1e-7);
            }
            Golden::Integers(..) => panic!("{name} must not be integers"),
        }
        compared += 1;
    }
    let matrices = |model: &ModelConfig| 4 * model.layers + if model.tied { 1 } else { 2 };
    assert_eq!(compared, 2 * matrices(&manifest.model));
}

#[test]
fn gradients_at_32_bits() {
    gradients_agree("tied", 32);
    gradients_agree("untied", 32);
}

#[test]
fn gradients_at_8_bits() {
    gradients_agree("tied", 8);
    gradients_agree("untied", 8);
}

#[test]
fn gradients_at_4_bits() {
    gradients_agree("tied", 4);
    gradients_agree("untied", 4);
}

/// Whatever the backward computes again, the gradient is the same.
#[test]
fn gradients_under_every_policy_of_recomputation() {
    let case = case("untied", 4, Accuracy::Exact);
    let manifest = case.package.manifest();
    let table = WeightTable::plan(&manifest.model, &manifest.quantization);
    for policy in [Recompute::Nothing, Recompute::Activations, Recompute::Layers] {
        let TrainGraph { mut graph, head_segment } =
            train(&manifest.model, &manifest.quantization, case.package.layout(), 0, CHUNK_BYTES).unwrap();
        recompute(&mut graph, policy, head_segment);
        // Beside the weights, which it refers to.
        let path = case.package.directory().join("policy.onnx");
        std::fs::write(&path, lower(&graph, &plan(&graph).order, "policy", &table).unwrap()).unwrap();
        case.graph_agrees(&path, &format!("{policy:?}"), TOLERANCE, 0);
    }
}

#[test]
fn logits_of_exact_kernels() {
    for variant in ["tied", "untied"] {
        for bits in [32, 8, 4] {
            logits_agree(variant, bits, Accuracy::Exact, TOLERANCE);
        }
    }
}

#[test]
fn logits_of_fast_kernels() {
    for variant in ["tied", "untied"] {
        for bits in [8, 4] {
            logits_agree(variant, bits, Accuracy::Fast, TOLERANCE_FAST);
        }
    }
}

#[test]
fn codes_and_scales_in_the_operators_layout() {
    for variant in ["tied", "untied"] {
        for bits in [8, 4] {
            codes_agree(variant, bits);
        }
    }
}
