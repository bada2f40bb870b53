//! Each gradient rule against central differences: the gradient that `differentiate.rs` builds, and the losses beside
//! it, are both computed by the real ONNX Runtime from the lowered graph, so that a rule and the lowering of what it
//! adds are tested together. What has no rule is refused by name.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed test may panic")]

#[path = "onnx_runtime/mod.rs"]
mod onnx_runtime;

use commonweal_compiler::differentiate::differentiate;
use commonweal_compiler::graph::{Constant, ElementType, Graph, GraphError, TensorType, ValueId};
use commonweal_compiler::lower::lower;
use commonweal_compiler::op::{Binary, Op, Reduction, Unary};
use commonweal_compiler::plan::plan;
use commonweal_compiler::shape::{Bindings, Dim, Shape};
use commonweal_compiler::weights::WeightTable;
use onnx_runtime::{Golden, run, session_of};

/// Distance of the two points of a difference. Losses are below 100, so rounding moves a slope by at most
/// 100 · 2^-24 / 0.01 = 6e-4, and the cubic term by about as much.
const STEP: f32 = 0.01;

/// Accepted error, relative to one plus the gradient.
const TOLERANCE: f32 = 2e-3;

fn bindings() -> Bindings {
    Bindings::from([("batch", 2), ("time", 3)])
}

fn batch() -> Dim {
    Dim::named("batch")
}

fn time() -> Dim {
    Dim::named("time")
}

/// A graph whose inputs have values.
struct Probe {
    graph: Graph,
    feeds: Vec<(ValueId, Golden)>,
    parameters: Vec<ValueId>,
}

impl Probe {
    fn new() -> Self {
        Self { graph: Graph::new(), feeds: Vec::new(), parameters: Vec::new() }
    }

    /// An input of different values from `low` to `high`, with respect to which the gradient is taken.
    fn parameter(&mut self, shape: impl Into<Shape>, (low, high): (f32, f32)) -> ValueId {
        let input = self.frozen(shape, (low, high));
        self.parameters.push(input);
        input
    }

    /// The same, without a gradient.
    fn frozen(&mut self, shape: impl Into<Shape>, (low, high): (f32, f32)) -> ValueId {
        let (shape, place) = (shape.into(), self.feeds.len());
        let sizes = shape.evaluate(&bindings()).unwrap();
        let value = |index: usize| low + (high - low) * ((index * 37 + place * 11) % 97) as f32 / 96.0;
        let values = (0..sizes.iter().product()).map(value).collect();
        self.feed(TensorType::f32(shape), Golden::Floats(sizes, values))
    }

    fn indices(&mut self, shape: impl Into<Shape>, values: &[i64]) -> ValueId {
        let shape = shape.into();
        let sizes = shape.evaluate(&bindings()).unwrap();
        self.feed(TensorType::i64(shape), Golden::Integers(sizes, values.into()))
    }

    fn feed(&mut self, kind: TensorType, value: Golden) -> ValueId {
        let input = self.graph.input(format!("input.{}", self.feeds.len()), kind).unwrap();
        self.feeds.push((input, value));
        input
    }

    fn add(&mut self, op: Op, inputs: &[ValueId]) -> ValueId {
        self.graph.add(op, inputs).unwrap()
    }

    /// A loss in which every element of the outputs has another weight, and its gradients.
    fn differentiate(&mut self, outputs: &[ValueId]) -> Result<(ValueId, Vec<ValueId>), GraphError> {
        let mut loss = self.graph.scalar(0.0)?;
        for &output in outputs {
            let weights = self.frozen(self.graph.shape(output).clone(), (-1.0, 1.5));
            let weighted = self.graph.times(output, weights)?;
            let total = self.graph.total(weighted)?;
            loss = self.graph.plus(loss, total)?;
        }
        let gradients = differentiate(&mut self.graph, loss, &self.parameters)?;
        Ok((loss, gradients))
    }

    /// Holds the gradient with respect to every element of every parameter against the slope of the loss.
    fn check(mut self, name: &str, outputs: &[ValueId]) {
        let (loss, gradients) = self.differentiate(outputs).unwrap_or_else(|error| panic!("{name}: {error}"));
        self.graph.output("loss", loss).unwrap();
        for (index, &gradient) in gradients.iter().enumerate() {
            self.graph.output(format!("gradient.{index}"), gradient).unwrap();
        }
        let order = plan(&self.graph).order;
        let bytes = lower(&self.graph, &order, "probe", &WeightTable::default()).unwrap();
        let mut session = session_of(&bytes);
        let mut run = |feeds: &[(ValueId, Golden)]| {
            let name = |id: ValueId| self.graph.value(id).name.clone();
            run(&mut session, feeds.iter().map(|(id, golden)| (name(*id), golden.value())).collect())
        };
        let at_point = run(&self.feeds);
        let mut compared = 0;
        for (index, parameter) in self.parameters.iter().enumerate() {
            let gradient = &at_point[&format!("gradient.{index}")];
            let place = self.feeds.iter().position(|(id, _)| id == parameter).unwrap();
            assert_eq!(gradient.len(), self.feeds[place].1.floats().len(), "{name}");
            for (element, &exact) in gradient.iter().enumerate() {
                let mut loss_at = |change: f32| {
                    let mut feeds = self.feeds.clone();
                    let Golden::Floats(_, values) = &mut feeds[place].1 else { unreachable!() };
                    values[element] += change;
                    run(&feeds)["loss"][0]
                };
                let slope = (loss_at(STEP) - loss_at(-STEP)) / (2.0 * STEP);
                let error = (slope - exact).abs();
                assert!(
                    error <= TOLERANCE * (1.0 + exact.abs()),
                    "{name}, parameter {index}, element {element}: gradient {exact}, slope {slope}"
                );
                compared += 1;
            }
        }
        assert!(compared > 0, "{name}: nothing was compared");
    }
}

const AROUND_ZERO: (f32, f32) = (-1.0, 1.0);
const ABOVE_ZERO: (f32, f32) = (0.6, 1.7);

#[test]
fn functions_of_one_tensor() {
    for (function, range) in [
        (Unary::Neg, AROUND_ZERO),
        (Unary::Reciprocal, ABOVE_ZERO),
        (Unary::Sqrt, ABOVE_ZERO),
        (Unary::Exp, AROUND_ZERO),
        (Unary::Sigmoid, (-3.0, 3.0)),
        (Unary::Tanh, (-3.0, 3.0)),
    ] {
        let mut probe = Probe::new();
        let x = probe.parameter([2, 3], range);
        let y = probe.add(Op::Unary(function), &[x]);
        probe.check(&format!("{function:?}"), &[y]);
    }
    for alpha in [1.0, 1.702] {
        let mut probe = Probe::new();
        let x = probe.parameter([2, 3], (-3.0, 3.0));
        let y = probe.add(Op::QuickGelu { alpha }, &[x]);
        probe.check(&format!("QuickGelu {alpha}"), &[y]);
    }
    let mut probe = Probe::new();
    let x = probe.parameter([3, 4], (-3.0, 3.0));
    let y = probe.add(Op::Gelu { tanh: true }, &[x]);
    probe.check("Gelu", &[y]);
    for cap in [0.7, 3.0] {
        let mut probe = Probe::new();
        let x = probe.parameter([2, 3], (-3.0, 3.0));
        let y = probe.graph.soft_capped(x, cap).unwrap();
        probe.check(&format!("soft cap {cap}"), &[y]);
    }
    let mut probe = Probe::new();
    let (x, other) = (probe.parameter([2, 3], AROUND_ZERO), probe.parameter([2, 3], AROUND_ZERO));
    let same = probe.add(Op::Identity, &[x]);
    let late = probe.add(Op::After, &[same, other]);
    // `After` reads its second input without depending on it.
    let y = probe.graph.times(late, other).unwrap();
    probe.check("Identity, After", &[y]);
}

#[test]
fn functions_of_two_tensors_that_broadcast() {
    let shapes: [[Shape; 2]; 6] = [
        [[2, 3].into(), [2, 3].into()],
        [[2, 3].into(), [3].into()],
        [[1, 3].into(), [2, 1].into()],
        [Shape::scalar(), [2, 3].into()],
        [[batch(), time(), 2.into()].into(), [time(), 1.into()].into()],
        [[batch(), 1.into()].into(), [batch(), time()].into()],
    ];
    for function in [Binary::Add, Binary::Sub, Binary::Mul, Binary::Div] {
        for [left, right] in &shapes {
            let mut probe = Probe::new();
            let a = probe.parameter(left.clone(), AROUND_ZERO);
            let b = probe.parameter(right.clone(), ABOVE_ZERO);
            let y = probe.add(Op::Binary(function), &[a, b]);
            probe.check(&format!("{function:?} of {left} and {right}"), &[y]);
        }
        let mut probe = Probe::new();
        let x = probe.parameter([4], ABOVE_ZERO);
        let y = probe.add(Op::Binary(function), &[x, x]);
        probe.check(&format!("{function:?} of one tensor with itself"), &[y]);
    }
}

#[test]
fn a_choice_between_two_tensors() {
    let mut probe = Probe::new();
    let (low, high) = (probe.frozen([2, 1], AROUND_ZERO), probe.frozen([3], AROUND_ZERO));
    let condition = probe.add(Op::Less, &[low, high]);
    let (a, b) = (probe.parameter([2, 3], AROUND_ZERO), probe.parameter([3], AROUND_ZERO));
    let y = probe.add(Op::Where, &[condition, a, b]);
    probe.check("Where", &[y]);
}

#[test]
fn products_of_matrices() {
    for (transpose_a, transpose_b) in [(false, false), (false, true), (true, false), (true, true)] {
        for alpha in [1.0, -0.75] {
            let op = Op::MatMul { transpose_a, transpose_b, alpha };
            let matrix = |batches: &[Dim], transposed: bool, [rows, columns]: [usize; 2]| -> Shape {
                let sizes = if transposed { [columns, rows] } else { [rows, columns] };
                batches.iter().cloned().chain(sizes.map(Dim::fixed)).collect()
            };
            let batches: [[Vec<Dim>; 2]; 4] = [
                [vec![], vec![]],
                [vec![batch()], vec![batch()]],
                [vec![batch()], vec![]],
                [vec![batch(), 1.into()], vec![1.into(), time()]],
            ];
            for [left, right] in batches {
                let mut probe = Probe::new();
                let a = probe.parameter(matrix(&left, transpose_a, [2, 3]), AROUND_ZERO);
                let b = probe.parameter(matrix(&right, transpose_b, [3, 4]), AROUND_ZERO);
                let y = probe.add(op.clone(), &[a, b]);
                let shapes = [a, b].map(|id| probe.graph.shape(id).to_string());
                probe.check(&format!("{op:?} of {shapes:?}"), &[y]);
            }
            let mut probe = Probe::new();
            let a = probe.parameter(matrix(&[], transpose_a, [2, 3]), AROUND_ZERO);
            let b = probe.parameter(matrix(&[], transpose_b, [3, 4]), AROUND_ZERO);
            let c = probe.parameter([2, 4], AROUND_ZERO);
            let y = probe.add(op.clone(), &[a, b, c]);
            probe.check(&format!("{op:?} with an addend"), &[y]);
        }
    }
}

#[test]
fn reductions() {
    for reduction in [Reduction::Sum, Reduction::Mean] {
        for axes in [vec![0], vec![1], vec![0, 2], vec![0, 1, 2]] {
            for keep in [true, false] {
                let mut probe = Probe::new();
                let x = probe.parameter([2, 3, 2], AROUND_ZERO);
                let y = probe.add(Op::Reduce { reduction, axes: axes.clone(), keep }, &[x]);
                probe.check(&format!("{reduction:?} over {axes:?}, keep {keep}"), &[y]);
            }
        }
    }
    let mut probe = Probe::new();
    let x = probe.parameter([batch(), time()], AROUND_ZERO);
    let y = probe.add(Op::Reduce { reduction: Reduction::Sum, axes: vec![1], keep: false }, &[x]);
    probe.check("Sum over a size of the run", &[y]);
}

#[test]
fn normalizations() {
    for op in [Op::Softmax, Op::LogSoftmax] {
        let mut probe = Probe::new();
        let x = probe.parameter([batch(), 4.into()], (-2.0, 2.0));
        let y = probe.add(op.clone(), &[x]);
        probe.check(op.name(), &[y]);
    }
    let mut probe = Probe::new();
    let x = probe.parameter([batch(), 4.into()], (-2.0, 2.0));
    let weight = probe.parameter([4], ABOVE_ZERO);
    let y = probe.add(Op::RmsNorm { epsilon: 0.01 }, &[x, weight]);
    probe.check("RmsNorm", &[y]);
}

/// What the loss of a language model does: its gradient stays scattered until the softmax takes it.
#[test]
fn picked_log_probabilities() {
    for also_dense in [false, true] {
        let mut probe = Probe::new();
        let x = probe.parameter([3, 5], (-2.0, 2.0));
        let logprobs = probe.add(Op::LogSoftmax, &[x]);
        let targets = probe.indices([3, 1], &[4, 0, 2]);
        let picked = probe.add(Op::GatherElements { axis: 1 }, &[logprobs, targets]);
        let again = probe.add(Op::GatherElements { axis: 1 }, &[logprobs, targets]);
        let outputs = [picked, again, logprobs];
        probe.check("LogSoftmax, GatherElements", &outputs[..if also_dense { 3 } else { 1 }]);
    }
}

#[test]
fn moves_of_elements() {
    let mut probe = Probe::new();
    let x = probe.parameter([batch(), time(), 4.into()], AROUND_ZERO);
    let flat = probe.graph.reshape(x, [batch().times(&time()), 4.into()]).unwrap();
    let split = probe.graph.reshape(flat, [batch(), time(), 2.into(), 2.into()]).unwrap();
    let y = probe.graph.transpose(split, &[2, 0, 3, 1]).unwrap();
    probe.check("Reshape, Transpose", &[y]);

    for (from, to) in [
        (Shape::from([1, 3]), Shape::from([2, 3])),
        (Shape::from([3]), Shape::from([batch(), 3.into()])),
        (Shape::from([batch(), 1.into()]), Shape::from([batch(), time()])),
    ] {
        let mut probe = Probe::new();
        let x = probe.parameter(from.clone(), AROUND_ZERO);
        let y = probe.add(Op::Expand(to.clone()), &[x]);
        probe.check(&format!("Expand {from} to {to}"), &[y]);
    }

    let mut probe = Probe::new();
    let x = probe.parameter([2, 4], AROUND_ZERO);
    let y = probe.add(Op::Slice { axis: 1, start: 1, length: 2 }, &[x]);
    let z = probe.add(Op::Pad { axis: 0, before: 1, after: 2 }, &[x]);
    probe.check("Slice, Pad", &[y, z]);
}

#[test]
fn pieces_and_their_joining() {
    for used in [vec![0], vec![1], vec![0, 1]] {
        let mut probe = Probe::new();
        let x = probe.parameter([2, 5], AROUND_ZERO);
        let sizes = vec![2.into(), 3.into()];
        let pieces = probe.graph.add_many(Op::Split { axis: 1, sizes }, &[x]).unwrap();
        let outputs: Vec<ValueId> = used.iter().map(|&index| pieces[index]).collect();
        probe.check(&format!("Split of which {used:?} is used"), &outputs);
    }
    let mut probe = Probe::new();
    let rows = batch().times(&time());
    let x = probe.parameter([batch(), time(), 2.into()], AROUND_ZERO);
    let x = probe.graph.reshape(x, [rows.clone(), 2.into()]).unwrap();
    // Four pieces of six rows: not all equally long.
    let pieces = probe.graph.add_many(Op::Split { axis: 0, sizes: rows.chunks(4) }, &[x]).unwrap();
    let joined = probe.add(Op::Concat { axis: 0 }, &pieces);
    let y = probe.graph.times(joined, x).unwrap();
    probe.check("Split into chunks, Concat", &[y]);

    let mut probe = Probe::new();
    let (x, y) = (probe.parameter([2, 1], AROUND_ZERO), probe.parameter([2, 3], AROUND_ZERO));
    let frozen = probe.frozen([2, 2], AROUND_ZERO);
    let joined = probe.add(Op::Concat { axis: 1 }, &[x, frozen, y, x]);
    probe.check("Concat of one tensor twice", &[joined]);
}

#[test]
fn rotary_positions() {
    let (heads, head_dim) = (2, 16);
    let mut probe = Probe::new();
    let x = probe.parameter([batch(), time(), (heads * head_dim).into()], AROUND_ZERO);
    let positions = probe.graph.constant(Constant::I64(vec![1]), [1]).unwrap();
    let (cosines, sines) = (probe.frozen([8, head_dim / 2], AROUND_ZERO), probe.frozen([8, 8], AROUND_ZERO));
    let once = probe.add(Op::RotaryEmbedding { heads }, &[x, positions, cosines, sines]);
    let twice = probe.add(Op::RotaryEmbedding { heads }, &[once, positions, cosines, sines]);
    probe.check("RotaryEmbedding", &[twice]);
}

#[test]
fn picks_by_index() {
    for (axis, indices) in [(0, &[3, 0, 3, 1, 3][..]), (1, &[2, 2, 0])] {
        let mut probe = Probe::new();
        let data = probe.parameter([4, 3], AROUND_ZERO);
        let at = probe.indices([indices.len()], indices);
        let y = probe.add(Op::Gather { axis }, &[data, at]);
        probe.check(&format!("Gather along {axis}"), &[y]);
    }
    let mut probe = Probe::new();
    let data = probe.parameter([3, 4], AROUND_ZERO);
    let at = probe.indices([3, 2], &[1, 1, 0, 3, 2, 2]);
    let y = probe.add(Op::GatherElements { axis: 1 }, &[data, at]);
    probe.check("GatherElements", &[y]);

    let mut probe = Probe::new();
    let (data, updates) = (probe.parameter([3, 4], AROUND_ZERO), probe.parameter([2, 4], AROUND_ZERO));
    let at = probe.indices([2, 4], &[0, 1, 2, 0, 0, 1, 1, 2]);
    let y = probe.add(Op::ScatterAdd { axis: 0 }, &[data, at, updates]);
    probe.check("ScatterAdd", &[y]);
}

/// Why a gradient is refused.
fn refusal(build: impl FnOnce(&mut Probe) -> ValueId) -> String {
    let mut probe = Probe::new();
    let output = build(&mut probe);
    probe.differentiate(&[output]).expect_err("must be refused").to_string()
}

#[test]
fn what_has_no_gradient_is_refused_by_name() {
    let cast = refusal(|probe| {
        let x = probe.parameter([2], AROUND_ZERO);
        probe.add(Op::Cast(ElementType::F32), &[x])
    });
    assert!(cast.starts_with("Cast cannot be differentiated"), "{cast}");
    let fused = refusal(|probe| {
        let (x, skip) = (probe.parameter([2, 4], AROUND_ZERO), probe.frozen([2, 4], AROUND_ZERO));
        let weight = probe.frozen([4], AROUND_ZERO);
        probe.add(Op::SkipRmsNorm { epsilon: 0.1 }, &[x, skip, weight])
    });
    assert!(fused.starts_with("SkipSimplifiedLayerNormalization"), "{fused}");
    let gelu = refusal(|probe| {
        let x = probe.parameter([2], AROUND_ZERO);
        probe.add(Op::Gelu { tanh: false }, &[x])
    });
    assert!(gelu.starts_with("Gelu cannot be differentiated"), "{gelu}");
    let inverse = refusal(|probe| {
        let (x, weight) = (probe.parameter([2, 4], AROUND_ZERO), probe.frozen([4], AROUND_ZERO));
        probe.graph.add_many(Op::RmsNorm { epsilon: 0.1 }, &[x, weight]).unwrap()[1]
    });
    assert!(inverse.contains("second output"), "{inverse}");
    let mean = refusal(|probe| {
        let x = probe.parameter([batch(), 2.into()], AROUND_ZERO);
        probe.add(Op::Reduce { reduction: Reduction::Mean, axes: vec![0], keep: true }, &[x])
    });
    assert!(mean.contains("not known when compiling"), "{mean}");
    let table = refusal(|probe| {
        let data = probe.parameter([4, 3], AROUND_ZERO);
        let at = probe.indices([2, 2], &[0, 1, 2, 3]);
        probe.add(Op::Gather { axis: 0 }, &[data, at])
    });
    assert!(table.contains("vector of indices"), "{table}");
    let unreached = refusal(|probe| {
        probe.parameter([2], AROUND_ZERO);
        probe.frozen([2], AROUND_ZERO)
    });
    assert_eq!(unreached, "the loss must depend on input.0, which it does not");
    let mut probe = Probe::new();
    let x = probe.parameter([2], AROUND_ZERO);
    let error = differentiate(&mut probe.graph, x, &[x]).unwrap_err().to_string();
    assert!(error.contains("must be a scalar, got [2]"), "{error}");
}
