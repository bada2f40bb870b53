//! The graph refuses what does not fit together, and the planner's order is an order, with the memory it says.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

use std::path::Path;

use commonweal_compiler::checkpoint::Checkpoint;
use commonweal_compiler::graph::{Constant, Graph, GraphError, NodeId, TensorType, ValueId};
use commonweal_compiler::llama::{CHUNK_BYTES, InferForm, TrainGraph, infer, train};
use commonweal_compiler::lower::lower;
use commonweal_compiler::op::{Binary, Op, Packing, Unary};
use commonweal_compiler::plan::plan;
use commonweal_compiler::recompute::{Recompute, recompute};
use commonweal_compiler::shape::{Bindings, Dim, Shape};
use commonweal_compiler::weights::WeightTable;
use commonweal_compiler::{Accuracy, Bits, ModelConfig, Quantization};
use commonweal_package::{AdapterDefaults, layout};

fn floats<const N: usize>(graph: &mut Graph, shape: [usize; N]) -> ValueId {
    let name = format!("x{}", graph.inputs().len());
    graph.input(name, TensorType::f32(shape)).unwrap()
}

fn integers<const N: usize>(graph: &mut Graph, shape: [usize; N]) -> ValueId {
    let name = format!("x{}", graph.inputs().len());
    graph.input(name, TensorType::i64(shape)).unwrap()
}

#[test]
fn nodes_that_do_not_fit_are_refused() {
    let mut graph = Graph::new();
    let (a, b, c) = (floats(&mut graph, [2, 3]), floats(&mut graph, [4, 3]), floats(&mut graph, []));
    let time = graph.input("time", TensorType::f32([Dim::named("time")])).unwrap();
    let (i, j) = (integers(&mut graph, [2]), integers(&mut graph, [2, 2]));
    let bytes = graph.input("bytes", TensorType::u8([4, 16])).unwrap();
    let packing = Packing { bits: 4, block_size: 32 };
    let product = |transpose_b| Op::MatMul { transpose_a: false, transpose_b, alpha: 1.0 };
    let split =
        |sizes: &[usize]| Op::Split { axis: 1, sizes: sizes.iter().copied().map(Dim::from).collect() };
    let cases: [(Op, &[ValueId], &str); 24] = [
        (Op::Unary(Unary::Exp), &[], "Exp needs 1 inputs, got 0"),
        (Op::Unary(Unary::Exp), &[i], "must be F32, got I64"),
        (Op::Binary(Binary::Add), &[a, b], "must be broadcastable to [2, 3], got [4, 3]"),
        (Op::Binary(Binary::Add), &[a], "needs 2 inputs, got 1"),
        (Op::After, &[a, b], "second input must be [2, 3], got [4, 3]"),
        (Op::Less, &[a, i], "must be F32, got I64"),
        (Op::Where, &[a, a, a], "condition must be Bool, got F32"),
        (product(false), &[a, b], "inner sizes must be 3, got 4"),
        (product(true), &[a, c], "of at least two dimensions"),
        (product(true), &[a, b, a], "addend must be [2, 4], got [2, 3]"),
        (Op::Gather { axis: 0 }, &[a, b], "indices must be I64, got F32"),
        (Op::Gather { axis: 2 }, &[a, i], "axis must be below 2, got 2"),
        (Op::GatherElements { axis: 1 }, &[b, j], "indices must be [4, 3]"),
        (Op::GatherBlockQuantized { packing }, &[bytes, i, a], "scales must be [4, 1], got [2, 3]"),
        (
            Op::GatherBlockQuantized { packing: Packing { block_size: 48, ..packing } },
            &[bytes, i, a],
            "in blocks that divide 32, got 4 bits, blocks of 48",
        ),
        (Op::Reshape([7].into()), &[a], "number of elements must be 6, got 7"),
        (Op::Expand([2, 4].into()), &[a], "broadcastable to [2, 4], got F32[2, 3]"),
        (Op::Transpose { permutation: vec![0, 0] }, &[a], "permutation"),
        (split(&[1, 1]), &[a], "sum of sizes must be 3, got 2"),
        (Op::Concat { axis: 1 }, &[a, b], "input must be F32[2, 3], got F32[4, 3]"),
        (Op::Slice { axis: 1, start: 2, length: usize::MAX }, &[a], "range must be within 3"),
        (Op::Slice { axis: 0, start: 0, length: 1 }, &[time], "must be a fixed size, got time"),
        (Op::RmsNorm { epsilon: 0.1 }, &[a, time], "weight must be [3], got [time]"),
        (Op::RotaryEmbedding { heads: 1 }, &[a, i, a, a], "input must be of 3 dimensions, got [2, 3]"),
    ];
    for (op, inputs, words) in cases {
        let shown = format!("{op:?}");
        let error = graph.add(op, inputs).expect_err(&shown).to_string();
        assert!(error.contains(words), "{shown}: {error:?} must mention {words:?}");
    }
    assert_eq!(graph.nodes().len(), 0, "what was refused leaves no node");
}

#[test]
fn names_and_constants_are_unique() {
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([2])).unwrap();
    let twice = GraphError::DuplicateName { name: "x".into() };
    assert_eq!(graph.input("x", TensorType::f32([2])), Err(twice.clone()));
    assert_eq!(graph.output("x", x), Err(twice));
    let one = graph.constant(Constant::F32(vec![1.0, 2.0]), [2]).unwrap();
    assert_eq!(graph.constant(Constant::F32(vec![1.0, 2.0]), [2]), Ok(one));
    assert_ne!(graph.constant(Constant::F32(vec![1.0, 2.0]), [1, 2]), Ok(one));
    let error = graph.constant(Constant::F32(vec![1.0]), [2]).unwrap_err().to_string();
    assert!(error.contains("number of values must be 2, got 1"), "{error}");
    // One value under two names, and an input as an output: each is a value of its own.
    graph.output("first", one).unwrap();
    graph.output("second", one).unwrap();
    assert_eq!(graph.outputs().len(), 2);
    assert_ne!(graph.find("first"), graph.find("second"));
}

#[test]
fn weights_must_be_in_the_table_with_their_size() {
    let written = |entry: &str, shape: [usize; 2]| {
        let mut graph = Graph::new();
        let weight = graph.weight("w", entry, TensorType::f32(shape)).unwrap();
        let y = graph.unary(Unary::Neg, weight).unwrap();
        graph.output("y", y).unwrap();
        let table = WeightTable::plan(&model(), &quantization(Bits::Full));
        lower(&graph, &plan(&graph).order, "test", &table)
    };
    assert!(written("layers.0.o.w", [32, 64]).is_ok());
    let error = written("layers.9.o.w", [32, 64]).unwrap_err().to_string();
    assert_eq!(error, "weight layers.9.o.w must hold 8192 bytes, got no such entry");
    let error = written("layers.0.o.w", [32, 65]).unwrap_err().to_string();
    assert_eq!(error, "weight layers.0.o.w must hold 8320 bytes, got 8192 bytes");
}

#[test]
fn sizes_must_come_from_an_input() {
    let mut graph = Graph::new();
    let rows = Dim::named("batch").times(&Dim::named("time"));
    graph.input("x", TensorType::f32([rows.clone()])).unwrap();
    let y = graph.fill(1.0, [rows].into()).unwrap();
    graph.output("y", y).unwrap();
    let error = lower(&graph, &plan(&graph).order, "test", &WeightTable::default()).unwrap_err().to_string();
    assert_eq!(error, "size batch must be a dimension of an input, got none");
}

fn model() -> ModelConfig {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/tied");
    Checkpoint::open(&directory, None).unwrap().model
}

fn quantization(bits: Bits) -> Quantization {
    Quantization { bits, block_size: 32, accuracy: Accuracy::Exact }
}

fn training(policy: Recompute) -> Graph {
    let defaults = AdapterDefaults { rank: 4, alpha: 8.0, targets: commonweal_adapter::Target::ALL.to_vec() };
    let layout = layout(&model(), &defaults).unwrap();
    let TrainGraph { mut graph, head_segment } =
        train(&model(), &quantization(Bits::Four), &layout, 0, CHUNK_BYTES).unwrap();
    recompute(&mut graph, policy, head_segment);
    graph
}

/// Whether a list has every node once, each after those that it reads.
fn is_an_order(graph: &Graph, order: &[NodeId]) -> bool {
    let mut done = vec![false; graph.nodes().len()];
    order.iter().all(|&id| {
        let read = graph.node(id).inputs.iter().filter_map(|&input| graph.producer(input));
        let ready = read.into_iter().all(|producer| done[producer.index()]);
        ready && !std::mem::replace(&mut done[id.index()], true)
    }) && done.iter().all(|&done| done)
}

#[test]
fn plans_are_orders() {
    let inference = |form| infer(&model(), &quantization(Bits::Four), form, None).unwrap();
    let mut graphs = vec![inference(InferForm::Adapted), inference(InferForm::Base)];
    graphs.extend([Recompute::Nothing, Recompute::Activations, Recompute::Layers].map(training));
    for graph in &graphs {
        let plan = plan(graph);
        assert!(is_an_order(graph, &plan.order) && is_an_order(graph, &plan.execution));
        let mut reversed = plan.order.clone();
        reversed.reverse();
        assert!(!is_an_order(graph, &reversed));
    }
}

#[test]
fn the_peak_is_what_is_alive_at_once() {
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32(Shape::from([Dim::named("time")]))).unwrap();
    let kept = graph.unary(Unary::Exp, x).unwrap();
    let mut last = kept;
    for _ in 0..5 {
        last = graph.unary(Unary::Neg, last).unwrap();
    }
    let sum = graph.plus(last, kept).unwrap();
    graph.output("sum", sum).unwrap();
    // At any time the kept one, one that is read and one that is written, of ten floats each.
    let peak = plan(&graph).peak(&graph, &Bindings::from([("time", 10)]));
    assert_eq!(peak.bytes, 3 * 10 * 4);
}

#[test]
fn computing_again_saves_memory() {
    let sizes = Bindings::from([("batch", 4), ("time", 256), ("rank", 4)]);
    let peak = |policy| {
        let graph = training(policy);
        (plan(&graph).peak(&graph, &sizes).bytes, graph.nodes().len())
    };
    let (nothing, activations, layers) =
        (peak(Recompute::Nothing), peak(Recompute::Activations), peak(Recompute::Layers));
    println!("bytes and nodes: {nothing:?} {activations:?} {layers:?}");
    assert!(nothing.0 > activations.0 && activations.0 > layers.0);
    assert!(nothing.1 < activations.1 && activations.1 < layers.1);
}
