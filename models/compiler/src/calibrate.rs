//! The inputs that a model's linear layers see over a calibration text, layer by layer, and the codes that `gptq.rs`
//! chooses by them. `weights.rs` asks for each matrix as it comes to it; `compile.rs` brings the text and an [`Engine`],
//! since this crate runs nothing itself.
//!
//! A layer is run twice over the whole text: as floats for its Hessians, then with its chosen codes, so that the next
//! layer sees what the earlier ones really leave (as the paper's own code does). In memory at one time are the text's
//! hidden states (tokens · hidden · 4 bytes), one layer's floats and one Hessian factor (inputs² · 8 bytes, 189 MB for
//! the widest of Qwen2.5-0.5B) beside the layer's four Hessians.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;

use commonweal_package::ModelConfig;

use crate::architecture::Source;
use crate::gptq::{DAMPING, Hessian, HessianError};
use crate::graph::{GraphError, Source as From};
use crate::llama::block::{Gives, LINEARS, block, tensors};
use crate::lower::lower;
use crate::plan::plan;
use crate::quantize::{BlockFormat, Quantized, Scale};
use crate::tensors::{TensorError, Tensors};
use crate::weights::WeightTable;

/// Tokens of one run, and so the farthest that a calibration token sees back.
pub const SEQUENCE_TOKENS: usize = 512;

/// Why an engine failed.
pub type EngineError = Box<dyn Error + Send + Sync>;

/// Opens ONNX graphs.
pub trait Engine {
    /// Opens a graph of floats; everything that it reads is an input.
    fn open(&mut self, graph: &[u8]) -> Result<Box<dyn Network>, EngineError>;
}

/// An open graph.
pub trait Network {
    /// The values of every output, in the graph's order.
    fn run(&mut self, inputs: &[Input<'_>]) -> Result<Vec<Vec<f32>>, EngineError>;
}

/// A float tensor that a graph is given.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The graph's name for it.
    pub name: &'a str,
    /// Its sizes.
    pub shape: &'a [usize],
    /// Its values, row-major.
    pub values: &'a [f32],
}

/// A text to calibrate by, and what to run the model on it with.
pub struct Calibration<'a> {
    /// The text's tokens, one behind the other. What is left after whole sequences is not used.
    pub tokens: &'a [u32],
    /// Runs the layers.
    pub engine: &'a mut dyn Engine,
}

impl fmt::Debug for Calibration<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Calibration").field("tokens", &self.tokens.len()).finish_non_exhaustive()
    }
}

/// Why there are no codes.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    /// The text says too little about the widest layer.
    #[error(
        "calibration needs at least {needed} tokens, one for each input of the widest layer and {SEQUENCE_TOKENS} \
         for a sequence, got {got}"
    )]
    TooFew {
        /// The fewest tokens.
        needed: usize,
        /// The text's.
        got: usize,
    },
    /// A token is none of the model's.
    #[error("calibration tokens must be below {vocab_size}, got {got}")]
    Token {
        /// Rows of the embedding.
        vocab_size: usize,
        /// The token.
        got: u32,
    },
    /// A layer's graph cannot be built.
    #[error("the graph of a layer cannot be built")]
    Graph(#[from] GraphError),
    /// A layer does not run.
    #[error("layer {layer} cannot be run")]
    Engine {
        /// The layer.
        layer: usize,
        /// What the engine said.
        #[source]
        source: EngineError,
    },
    /// The engine gave values of a wrong size.
    #[error("layer {layer} must give {expected} values, got {got}")]
    Output {
        /// The layer.
        layer: usize,
        /// What its graph says.
        expected: usize,
        /// What came.
        got: usize,
    },
    /// What a layer sees has no factor.
    #[error("{matrix} cannot be calibrated")]
    Hessian {
        /// The matrix.
        matrix: String,
        /// Why.
        #[source]
        source: HessianError,
    },
    /// A tensor of the checkpoint cannot be read.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

/// The fewest tokens that a model is calibrated by: with fewer than a layer has inputs, its Hessian says nothing about
/// some directions, and the error there goes unseen.
pub fn tokens_min(model: &ModelConfig) -> usize {
    let widest = model.hidden_size.max(model.query_size()).max(model.intermediate_size);
    widest.max(SEQUENCE_TOKENS.min(model.context))
}

/// A layer's tensor as its graph takes it.
struct Given {
    name: String,
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// The way through the layers.
pub(crate) struct Calibrator<'a> {
    model: &'a ModelConfig,
    format: BlockFormat,
    tensors: &'a Tensors,
    engine: &'a mut dyn Engine,
    time: usize,
    /// What goes into the next layer, `[time, hidden]` for each sequence.
    states: Vec<Vec<f32>>,
    /// Open graphs by what tells layers apart: rotation and window, and what the graph gives.
    networks: BTreeMap<(bool, Option<usize>, bool), (Vec<String>, Box<dyn Network>)>,
    rotary: [Given; 2],
    next: usize,
    ready: BTreeMap<String, Quantized>,
}

impl<'a> Calibrator<'a> {
    pub(crate) fn new(
        model: &'a ModelConfig,
        format: BlockFormat,
        tensors: &'a Tensors,
        calibration: Calibration<'a>,
    ) -> Result<Self, CalibrateError> {
        let Calibration { tokens, engine } = calibration;
        let (needed, got) = (tokens_min(model), tokens.len());
        if got < needed {
            return Err(CalibrateError::TooFew { needed, got });
        }
        let time = SEQUENCE_TOKENS.min(model.context);
        let embed = |sequence| embed(model, format, tensors, sequence);
        let states = tokens.chunks_exact(time).map(embed).collect::<Result<_, _>>()?;
        let rotary = rotary(model, time);
        let (networks, ready) = (BTreeMap::new(), BTreeMap::new());
        Ok(Self { model, format, tensors, engine, time, states, networks, rotary, next: 0, ready })
    }

    /// The codes of a matrix of `weights.bin`; `None` for those outside the layers. Layers must be asked for in order.
    pub(crate) fn matrix(&mut self, name: &str) -> Result<Option<Quantized>, CalibrateError> {
        let next = format!("layers.{}.", self.next);
        if self.next < self.model.layers && name.starts_with(&next) {
            self.layer(self.next)?;
            self.next += 1;
        }
        Ok(self.ready.remove(name))
    }

    fn layer(&mut self, layer: usize) -> Result<(), CalibrateError> {
        let mut given = self.read(layer)?;
        let hessians = self.observe(layer, &given)?;
        for (name, hessian) in LINEARS.into_iter().zip(hessians) {
            let matrix = format!("layers.{layer}.{name}");
            let feedback = hessian
                .factor(DAMPING)
                .map_err(|source| CalibrateError::Hessian { matrix: matrix.clone(), source })?;
            if let Some(tensor) = given.iter_mut().find(|tensor| tensor.name == name) {
                let quantized = feedback.round(self.format, &tensor.values);
                tensor.values = self.format.dequantize(&quantized);
                self.ready.insert(matrix, quantized);
            }
        }
        if layer + 1 < self.model.layers { self.advance(layer, &given) } else { Ok(()) }
    }

    /// A layer's tensors as floats.
    fn read(&self, layer: usize) -> Result<Vec<Given>, CalibrateError> {
        let mut given = Vec::new();
        for (name, source) in tensors(self.model, layer) {
            let (parts, columns) = match source {
                Source::Vector(parts) => (parts, None),
                Source::Matrix(parts, columns) => (parts, Some(columns)),
                Source::Rotary(_) => continue,
            };
            let mut values = Vec::new();
            for (part, rows) in &parts {
                values.extend(self.tensors.rows(part, 0..*rows)?);
            }
            let rows = parts.iter().map(|(_, rows)| rows).sum();
            given.push(Given { name, shape: [Some(rows), columns].into_iter().flatten().collect(), values });
        }
        Ok(given)
    }

    /// The Hessians of a layer's linears over all sequences.
    fn observe(&mut self, layer: usize, given: &[Given]) -> Result<Vec<Hessian>, CalibrateError> {
        let inputs = given.iter().filter(|tensor| LINEARS.contains(&tensor.name.as_str()));
        let mut hessians: Vec<Hessian> = inputs.map(|tensor| Hessian::new(tensor.shape[1])).collect();
        for index in 0..self.states.len() {
            let grams = self.run(layer, given, index, Gives::Grams)?;
            if grams.len() != hessians.len() {
                let (expected, got) = (hessians.len(), grams.len());
                return Err(CalibrateError::Output { layer, expected, got });
            }
            for (hessian, gram) in hessians.iter_mut().zip(grams) {
                let (expected, got) = (hessian.inputs() * hessian.inputs(), gram.len());
                if expected != got {
                    return Err(CalibrateError::Output { layer, expected, got });
                }
                hessian.add(&gram);
            }
        }
        Ok(hessians)
    }

    /// Replaces every state by what the layer makes of it.
    fn advance(&mut self, layer: usize, given: &[Given]) -> Result<(), CalibrateError> {
        for index in 0..self.states.len() {
            let output = self.run(layer, given, index, Gives::Output)?.pop().unwrap_or_default();
            let (expected, got) = (self.states[index].len(), output.len());
            if expected != got {
                return Err(CalibrateError::Output { layer, expected, got });
            }
            self.states[index] = output;
        }
        Ok(())
    }

    fn run(
        &mut self,
        layer: usize,
        given: &[Given],
        index: usize,
        gives: Gives,
    ) -> Result<Vec<Vec<f32>>, CalibrateError> {
        let attention = &self.model.attention;
        let key = (attention.rotates(layer), attention.window_of(layer), gives == Gives::Grams);
        let failed = |source| CalibrateError::Engine { layer, source };
        let (names, network) = match self.networks.entry(key) {
            std::collections::btree_map::Entry::Occupied(open) => open.into_mut(),
            std::collections::btree_map::Entry::Vacant(place) => {
                let (names, bytes) = graph(self.model, layer, self.time, gives)?;
                place.insert((names, self.engine.open(&bytes).map_err(failed)?))
            }
        };
        let shape = [1, self.time, self.model.hidden_size];
        let state = Input { name: "x", shape: &shape, values: &self.states[index] };
        let tensors = given.iter().chain(&self.rotary);
        let tensors = tensors.map(|Given { name, shape, values }| Input { name, shape, values });
        let inputs: Vec<Input<'_>> = [state]
            .into_iter()
            .chain(tensors)
            .filter(|input| names.iter().any(|name| name == input.name))
            .collect();
        network.run(&inputs).map_err(failed)
    }
}

/// A layer's graph as ONNX, and its inputs' names.
fn graph(
    model: &ModelConfig,
    layer: usize,
    time: usize,
    gives: Gives,
) -> Result<(Vec<String>, Vec<u8>), GraphError> {
    let graph = block(model, layer, time, gives)?;
    let names = graph.values().filter(|(_, value)| value.source == From::Input);
    let names = names.map(|(_, value)| value.name.clone()).collect();
    Ok((names, lower(&graph, &plan(&graph).order, "block", &WeightTable::default())?))
}

/// The embedding's rows for a sequence, as they are stored: the embedding is not calibrated.
fn embed(
    model: &ModelConfig,
    format: BlockFormat,
    tensors: &Tensors,
    sequence: &[u32],
) -> Result<Vec<f32>, CalibrateError> {
    let vocab_size = model.vocab_size;
    let mut states = Vec::with_capacity(sequence.len() * model.hidden_size);
    for &token in sequence {
        let row = token as usize;
        if row >= vocab_size {
            return Err(CalibrateError::Token { vocab_size, got: token });
        }
        let floats = tensors.rows("model.embed_tokens.weight", row..row + 1)?;
        states.extend(format.dequantize(&format.quantize(&floats, Scale::Search)));
    }
    Ok(states)
}

fn rotary(model: &ModelConfig, time: usize) -> [Given; 2] {
    let frequencies = model.rotary_frequencies();
    let table = |name: &str, function: fn(f64) -> f64| {
        let positions = (0..time).flat_map(|position| {
            frequencies.iter().map(move |frequency| function(position as f64 * frequency) as f32)
        });
        Given { name: name.into(), shape: vec![time, frequencies.len()], values: positions.collect() }
    };
    [table("rope.cos", libm::cos), table("rope.sin", libm::sin)]
}
