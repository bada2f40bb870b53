//! Compiled graphs in the real ONNX Runtime against an independent implementation in PyTorch (`goldens/make.py`):
//! logits, loss, log-probabilities and the gradient of every adapter tensor in every graph, at 32, 8 and 4 bits, of rows
//! that blocks divide and of rows that are filled up, by exact and by fast kernels; and the stored codes.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed test may panic")]

#[path = "onnx_runtime/mod.rs"]
mod onnx_runtime;

use commonweal_compiler::llama::{CHUNK_BYTES, TrainGraph, train};
use commonweal_compiler::lower::lower;
use commonweal_compiler::plan::plan;
use commonweal_compiler::recompute::{Recompute, recompute};
use commonweal_compiler::weights::WeightTable;
use commonweal_compiler::{Accuracy, ModelConfig};
use onnx_runtime::case::{Case, check, form};
use onnx_runtime::{Golden, read};

/// What differs between 32-bit and 64-bit floats; measured errors are about 1e-6.
const TOLERANCE: f64 = 2e-5;

/// Fast kernels round activations to 8 bits; measured errors are up to 2e-2.
const TOLERANCE_FAST: f64 = 5e-2;

/// The same for gradients, which pass straight through the rounding; measured errors are up to 6e-2.
const TOLERANCE_FAST_GRADIENT: f64 = 1e-1;

/// Every quantized golden: its checkpoint, bits, and weights of a block. Those of `filled` divide none of its rows.
const QUANTIZED: [(&str, u8, usize); 7] = [
    ("tied", 8, 32),
    ("tied", 4, 32),
    ("untied", 8, 32),
    ("untied", 4, 32),
    ("filled", 8, 64),
    ("filled", 4, 64),
    ("filled", 4, 128),
];

fn case((variant, bits, block_size): (&str, u8, usize), accuracy: Accuracy) -> Case {
    let checkpoint = onnx_runtime::goldens().join(variant);
    let name =
        if block_size == 32 { format!("{variant}.{bits}") } else { format!("{variant}.{bits}.{block_size}") };
    Case::new(
        &format!("{name} {accuracy:?}"),
        &checkpoint,
        form(bits, block_size, accuracy),
        read(&format!("{variant}.inputs.safetensors")),
        read(&format!("{name}.safetensors")),
    )
}

fn codes_agree(golden: (&str, u8, usize)) {
    let case = case(golden, Accuracy::Exact);
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
                check(&format!("{} {name}", case.label), &got, scales, 1e-7);
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
    for variant in ["tied", "untied", "filled"] {
        case((variant, 32, 32), Accuracy::Exact).gradients_agree(TOLERANCE);
    }
}

#[test]
fn gradients_of_quantized_weights() {
    for golden in QUANTIZED {
        case(golden, Accuracy::Exact).gradients_agree(TOLERANCE);
    }
}

/// Fast kernels are the default.
#[test]
fn gradients_of_fast_kernels() {
    for golden in QUANTIZED {
        case(golden, Accuracy::Fast).gradients_agree(TOLERANCE_FAST_GRADIENT);
    }
}

/// Whatever the backward computes again, the gradient is the same.
#[test]
fn gradients_under_every_policy_of_recomputation() {
    let case = case(("untied", 4, 32), Accuracy::Exact);
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
    for variant in ["tied", "untied", "filled"] {
        case((variant, 32, 32), Accuracy::Exact).logits_agree(TOLERANCE);
    }
    for golden in QUANTIZED {
        case(golden, Accuracy::Exact).logits_agree(TOLERANCE);
    }
}

#[test]
fn logits_of_fast_kernels() {
    for golden in QUANTIZED {
        case(golden, Accuracy::Fast).logits_agree(TOLERANCE_FAST);
    }
}

#[test]
fn codes_and_scales_in_the_operators_layout() {
    for golden in QUANTIZED {
        codes_agree(golden);
    }
}
