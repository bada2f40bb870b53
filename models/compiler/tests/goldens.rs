//! Compiled graphs in the real ONNX Runtime against an independent implementation in PyTorch (`goldens/make.py`):
//! logits, loss, log-probabilities and the gradient of every adapter tensor, at 32, 8 and 4 bits, and the stored codes.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed test may panic")]

#[path = "onnx_runtime/mod.rs"]
mod onnx_runtime;

use std::collections::BTreeMap;
use std::path::Path;

use commonweal_compiler::compile::{CompileOptions, compile};
use commonweal_compiler::llama::{TrainGraph, train};
use commonweal_compiler::lower::lower;
use commonweal_compiler::plan::plan;
use commonweal_compiler::recompute::{Recompute, recompute};
use commonweal_compiler::weights::WeightTable;
use commonweal_compiler::{Accuracy, Bits, ModelConfig};
use commonweal_package::Package;
use onnx_runtime::{Golden, read, relative_error, run, session};
use ort::value::{DynValue, Tensor};
use tempfile::TempDir;

/// What differs between 32-bit and 64-bit floats; measured errors are about 1e-6.
const TOLERANCE: f64 = 2e-5;

/// Fast kernels round activations to 8 bits; measured errors are up to 2e-2.
const TOLERANCE_FAST: f64 = 5e-2;

/// Rank of the goldens' adapter.
const RANK: usize = 4;

struct Case {
    inputs: BTreeMap<String, Golden>,
    expected: BTreeMap<String, Golden>,
    package: Package,
    _directory: TempDir,
}

fn case(variant: &str, bits: u8, accuracy: Accuracy) -> Case {
    let directory = TempDir::new().unwrap();
    let out = directory.path().join("package");
    let options = CompileOptions {
        bits: Bits::try_from(bits).unwrap(),
        accuracy,
        ..CompileOptions::new(onnx_runtime::goldens().join(variant), &out)
    };
    compile(&options).unwrap();
    Case {
        inputs: read(&format!("{variant}.inputs.safetensors")),
        expected: read(&format!("{variant}.{bits}.safetensors")),
        package: Package::open(out).unwrap(),
        _directory: directory,
    }
}

fn check(name: &str, got: &[f32], expected: &[f32], tolerance: f64) {
    let error = relative_error(got, expected);
    println!("{name}: relative error {error:.1e}");
    assert!(error <= tolerance, "{name}: relative error {error:.1e}, at most {tolerance:.0e} expected");
}

fn gradients_agree(variant: &str, bits: u8) {
    let case = case(variant, bits, Accuracy::Exact);
    graph_agrees(&case, &case.package.train_graph(), &format!("{variant} {bits}"));
}

/// Runs a gradient graph that lies in the case's package, and compares every output.
fn graph_agrees(case: &Case, graph: &Path, label: &str) {
    let mut session = session(graph);
    let inputs = case.inputs.iter().map(|(name, golden)| (name.clone(), golden.value())).collect();
    let got = run(&mut session, inputs);
    let is_output = |name: &str| name.starts_with("grad.") || ["loss", "token_logprob"].contains(&name);
    let mut compared = 0;
    for (name, golden) in case.expected.iter().filter(|(name, _)| is_output(name)) {
        let output = got.get(name).unwrap_or_else(|| panic!("train.onnx must give {name}"));
        check(&format!("{label} {name}"), output, golden.floats(), TOLERANCE);
        compared += 1;
    }
    // Loss, log-probabilities and two layers of seven pairs.
    assert_eq!((compared, got.len()), (2 + 2 * 7 * 2, 2 + 2 * 7 * 2));
}

/// The adapter's linears of one layer that share a matrix, as the inference graph takes them: `a` side by side, and
/// `b` block-diagonal with the scale folded in.
fn fuse(case: &Case, layer: usize, targets: &[&str]) -> (DynValue, DynValue) {
    let scale = case.inputs["lora_scale"].floats()[0];
    let tensor = |target: &str, part: &str| case.inputs[&format!("layers.{layer}.{target}.{part}")].floats();
    let ranks = RANK * targets.len();
    let columns = tensor(targets[0], "a").len() / RANK;
    let rows: usize = targets.iter().map(|target| tensor(target, "b").len() / RANK).sum();
    let (mut a, mut b) = (vec![0.0; columns * ranks], vec![0.0; ranks * rows]);
    let mut first_row = 0;
    for (at, target) in targets.iter().enumerate() {
        for (rank, row) in tensor(target, "a").chunks(columns).enumerate() {
            for (column, value) in row.iter().enumerate() {
                a[column * ranks + at * RANK + rank] = *value;
            }
        }
        let own = tensor(target, "b");
        for (row, values) in own.chunks(RANK).enumerate() {
            for (rank, value) in values.iter().enumerate() {
                b[(at * RANK + rank) * rows + first_row + row] = scale * value;
            }
        }
        first_row += own.len() / RANK;
    }
    let matrix = |shape: [usize; 2], values| Tensor::from_array((shape, values)).unwrap().into_dyn();
    (matrix([columns, ranks], a), matrix([ranks, rows], b))
}

/// Runs `time` new tokens of each row that start at `start`, after the tokens whose keys and values `cache` holds.
fn infer(
    case: &Case,
    session: &mut ort::session::Session,
    (start, time): (usize, usize),
    cache: &BTreeMap<String, Vec<f32>>,
) -> BTreeMap<String, Vec<f32>> {
    let Golden::Integers(shape, ids) = &case.inputs["input_ids"] else { panic!("ids must be integers") };
    let (batch, whole) = (shape[0], shape[1]);
    let model = &case.package.manifest().model;
    let new: Vec<i64> = ids.chunks(whole).flat_map(|row| &row[start..start + time]).copied().collect();
    let rows: Vec<i64> = (0..(batch * time) as i64).collect();
    let mut inputs: Vec<(String, DynValue)> = vec![
        ("input_ids".into(), Tensor::from_array(([batch, time], new)).unwrap().into_dyn()),
        (
            "seqlens_k".into(),
            Tensor::from_array(([batch], vec![(start + time - 1) as i32; batch])).unwrap().into_dyn(),
        ),
        ("total_seq".into(), Tensor::from_array(([1], vec![(start + time) as i32])).unwrap().into_dyn()),
        ("logit_rows".into(), Tensor::from_array(([rows.len()], rows)).unwrap().into_dyn()),
    ];
    let length = 16;
    let shape = [batch, model.kv_heads, length, model.head_dim];
    for layer in 0..model.layers {
        for part in ["key", "value"] {
            let empty = || vec![0.0; shape.iter().product()];
            let past = cache.get(&format!("present.{layer}.{part}")).cloned().unwrap_or_else(empty);
            let value = Tensor::from_array((shape, past)).unwrap().into_dyn();
            inputs.push((format!("past.{layer}.{part}"), value));
        }
        let linears =
            [("qkv", &["q", "k", "v"][..]), ("o", &["o"]), ("gate_up", &["gate", "up"]), ("down", &["down"])];
        for (linear, targets) in linears {
            let (a, b) = fuse(case, layer, targets);
            inputs.push((format!("lora.{layer}.{linear}.a"), a));
            inputs.push((format!("lora.{layer}.{linear}.b"), b));
        }
    }
    run(session, inputs)
}

fn logits_agree(variant: &str, bits: u8, accuracy: Accuracy, tolerance: f64) {
    let case = case(variant, bits, accuracy);
    let mut session = session(&case.package.infer_graph());
    let expected = case.expected["logits"].floats();
    let whole = infer(&case, &mut session, (0, 9), &BTreeMap::new());
    check(&format!("{variant} {bits} {accuracy:?} prefill"), &whole["logits"], expected, tolerance);
    // The same in three steps, over the cache.
    let vocabulary = case.package.manifest().model.vocab_size;
    let mut cache = BTreeMap::new();
    for (start, time) in [(0, 7), (7, 1), (8, 1)] {
        cache = infer(&case, &mut session, (start, time), &cache);
        let rows = expected.chunks(9 * vocabulary);
        let expected: Vec<f32> =
            rows.flat_map(|row| &row[start * vocabulary..(start + time) * vocabulary]).copied().collect();
        let name = format!("{variant} {bits} {accuracy:?} from {start}");
        check(&name, &cache["logits"], &expected, tolerance);
    }
}

fn codes_agree(variant: &str, bits: u8) {
    let case = case(variant, bits, Accuracy::Exact);
    let manifest = case.package.manifest();
    let table = WeightTable::plan(&manifest.model, &manifest.quantization).unwrap();
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
    let table = WeightTable::plan(&manifest.model, &manifest.quantization).unwrap();
    for policy in [Recompute::Nothing, Recompute::Activations, Recompute::Layers] {
        let TrainGraph { mut graph, head_segment } =
            train(&manifest.model, &manifest.quantization, case.package.layout()).unwrap();
        recompute(&mut graph, policy, head_segment);
        // Beside the weights, which it refers to.
        let path = case.package.directory().join("policy.onnx");
        std::fs::write(&path, lower(&graph, &plan(&graph).order, "policy", &table).unwrap()).unwrap();
        graph_agrees(&case, &path, &format!("{policy:?}"));
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
