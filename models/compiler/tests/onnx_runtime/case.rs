//! A golden case: a checkpoint compiled, and what an independent implementation computes from it. `goldens.rs` and
//! `architectures.rs` compare both graphs with it.

use std::collections::BTreeMap;
use std::path::Path;

use commonweal_compiler::compile::{CompileOptions, Method, compile};
use commonweal_compiler::{Accuracy, Bits, Quantization};
use commonweal_package::{Package, TrainGraph};
use ort::session::Session;
use ort::value::{DynValue, Tensor};
use tempfile::TempDir;

use super::{Golden, relative_error, run, session};

/// Rank of the goldens' adapters.
const RANK: usize = 4;

pub(crate) struct Case {
    pub(crate) label: String,
    pub(crate) inputs: BTreeMap<String, Golden>,
    pub(crate) expected: BTreeMap<String, Golden>,
    pub(crate) package: Package,
    _directory: TempDir,
}

/// A form of the weights, by its bits and the weights of a block.
pub(crate) fn form(bits: u8, block_size: usize, accuracy: Accuracy) -> Quantization {
    Quantization { bits: Bits::try_from(bits).unwrap(), block_size, accuracy }
}

pub(crate) fn check(name: &str, got: &[f32], expected: &[f32], tolerance: f64) {
    let error = relative_error(got, expected);
    println!("{name}: relative error {error:.1e}");
    assert!(error <= tolerance, "{name}: relative error {error:.1e}, at most {tolerance:.0e} expected");
}

impl Case {
    /// Compiles a checkpoint.
    pub(crate) fn new(
        label: &str,
        checkpoint: &Path,
        Quantization { bits, block_size, accuracy }: Quantization,
        inputs: BTreeMap<String, Golden>,
        expected: BTreeMap<String, Golden>,
    ) -> Self {
        let directory = TempDir::new().unwrap();
        let out = directory.path().join("package");
        // The goldens' codes are of this method; `tests/gptq.rs` has the others.
        let method = Method::Mse;
        let options = CompileOptions::new(checkpoint, &out);
        compile(&CompileOptions { bits, block_size, accuracy, method, ..options }).unwrap();
        let package = Package::open(out).unwrap();
        Self { label: label.into(), inputs, expected, package, _directory: directory }
    }

    /// Runs a gradient graph that lies in the package; gives its outputs by name.
    fn train(&self, graph: &Path) -> BTreeMap<String, Vec<f32>> {
        let mut session = session(graph);
        let wanted: Vec<String> = session.inputs().iter().map(|input| input.name().to_owned()).collect();
        let inputs = self
            .inputs
            .iter()
            .filter(|(name, _)| wanted.contains(name))
            .map(|(name, golden)| (name.clone(), golden.value()))
            .collect();
        run(&mut session, inputs)
    }

    /// Every gradient graph of the package.
    pub(crate) fn gradients_agree(&self, tolerance: f64) {
        let upper = self.package.manifest().model.layers / 2;
        for (graph, first_layer) in
            [(TrainGraph::Full, 0), (TrainGraph::Frugal, 0), (TrainGraph::Upper, upper)]
        {
            let path = self.package.train_graph(graph).unwrap();
            self.graph_agrees(&path, graph.file(), tolerance, first_layer);
        }
    }

    /// What this package computes, in the place of what another implementation does.
    pub(crate) fn computed(&self) -> BTreeMap<String, Golden> {
        let Golden::Floats(shape, _) = &self.expected["logits"] else { panic!("logits must be floats") };
        let graph = self.package.train_graph(TrainGraph::Full).unwrap();
        let flat = |(name, values): (String, Vec<f32>)| (name, Golden::Floats(vec![values.len()], values));
        let mut computed: BTreeMap<String, Golden> = self.train(&graph).into_iter().map(flat).collect();
        let mut inference = session(&self.package.infer_graph());
        let logits = self.infer(&mut inference, (0, shape[1]), &BTreeMap::new()).remove("logits").unwrap();
        computed.insert("logits".into(), Golden::Floats(shape.clone(), logits));
        computed
    }

    /// Runs a gradient graph that lies in the package and trains the layers from `first_layer`, and compares every
    /// output.
    pub(crate) fn graph_agrees(&self, graph: &Path, graph_name: &str, tolerance: f64, first_layer: usize) {
        let got = self.train(graph);
        let is_output = |name: &str| name.starts_with("grad.") || ["loss", "token_logprob"].contains(&name);
        let mut compared = 0;
        let untrained =
            |name: &str| (0..first_layer).any(|layer| name.starts_with(&format!("grad.layers.{layer}.")));
        let expected = self.expected.iter().filter(|(name, _)| is_output(name) && !untrained(name));
        for (name, golden) in expected {
            let output = got.get(name).unwrap_or_else(|| panic!("train.onnx must give {name}"));
            check(&format!("{} {graph_name} {name}", self.label), output, golden.floats(), tolerance);
            compared += 1;
        }
        // Loss, log-probabilities, and seven pairs a trained layer.
        let outputs = 2 + (self.package.manifest().model.layers - first_layer) * 7 * 2;
        assert_eq!((compared, got.len()), (outputs, outputs));
    }

    /// The adapter's linears of one layer that share a matrix, as the inference graph takes them: `a` side by side, and
    /// `b` block-diagonal with the scale folded in.
    fn fuse(&self, layer: usize, targets: &[&str]) -> (DynValue, DynValue) {
        let scale = self.inputs["lora_scale"].floats()[0];
        let tensor =
            |target: &str, part: &str| self.inputs[&format!("layers.{layer}.{target}.{part}")].floats();
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
        &self,
        session: &mut Session,
        (start, time): (usize, usize),
        cache: &BTreeMap<String, Vec<f32>>,
    ) -> BTreeMap<String, Vec<f32>> {
        let Golden::Integers(shape, ids) = &self.inputs["input_ids"] else { panic!("ids must be integers") };
        let (batch, whole) = (shape[0], shape[1]);
        let model = &self.package.manifest().model;
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
        let length = whole.next_multiple_of(8);
        let shape = [batch, model.kv_heads, length, model.head_dim];
        for layer in 0..model.layers {
            for part in ["key", "value"] {
                let empty = || vec![0.0; shape.iter().product()];
                let past = cache.get(&format!("present.{layer}.{part}")).cloned().unwrap_or_else(empty);
                let value = Tensor::from_array((shape, past)).unwrap().into_dyn();
                inputs.push((format!("past.{layer}.{part}"), value));
            }
            let linears = [
                ("qkv", &["q", "k", "v"][..]),
                ("o", &["o"]),
                ("gate_up", &["gate", "up"]),
                ("down", &["down"]),
            ];
            for (linear, targets) in linears {
                let (a, b) = self.fuse(layer, targets);
                inputs.push((format!("lora.{layer}.{linear}.a"), a));
                inputs.push((format!("lora.{layer}.{linear}.b"), b));
            }
        }
        inputs.retain(|(name, _)| session.inputs().iter().any(|input| input.name() == name));
        run(session, inputs)
    }

    /// Every token at once, then the same in three steps over the cache.
    pub(crate) fn logits_agree(&self, tolerance: f64) {
        self.logits_of_agree(&self.package.infer_graph(), tolerance);
    }

    /// The graph of the base alone gives what the other gives with an adapter of zeros.
    pub(crate) fn base_agrees(&mut self, tolerance: f64) {
        let Golden::Floats(shape, _) = self.expected["logits"].clone() else {
            panic!("logits must be floats")
        };
        self.inputs.insert("lora_scale".into(), Golden::Floats(vec![], vec![0.0]));
        let mut adapted = session(&self.package.infer_graph());
        let logits = self.infer(&mut adapted, (0, shape[1]), &BTreeMap::new()).remove("logits").unwrap();
        self.expected.insert("logits".into(), Golden::Floats(shape, logits));
        self.logits_of_agree(&self.package.infer_base_graph().unwrap(), tolerance);
    }

    fn logits_of_agree(&self, graph: &Path, tolerance: f64) {
        let mut session = session(graph);
        let Golden::Floats(shape, expected) = &self.expected["logits"] else {
            panic!("logits must be floats")
        };
        let time = shape[1];
        let whole = self.infer(&mut session, (0, time), &BTreeMap::new());
        check(&format!("{} prefill", self.label), &whole["logits"], expected, tolerance);
        let vocabulary = self.package.manifest().model.vocab_size;
        let mut cache = BTreeMap::new();
        for (start, new) in [(0, time - 2), (time - 2, 1), (time - 1, 1)] {
            cache = self.infer(&mut session, (start, new), &cache);
            let rows = expected.chunks(time * vocabulary);
            let expected: Vec<f32> =
                rows.flat_map(|row| &row[start * vocabulary..(start + new) * vocabulary]).copied().collect();
            let name = format!("{} from {start}", self.label);
            check(&name, &cache["logits"], &expected, tolerance);
        }
    }
}
