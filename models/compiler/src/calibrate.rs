//! The inputs that a model's linear layers see over a calibration text, layer by layer, and the codes that `gptq.rs`
//! chooses by them. `weights.rs` asks for each matrix as it comes to it; `compile.rs` brings the text and an [`Engine`],
//! since this crate runs nothing itself.
//!
//! A layer is run twice over the whole text: as floats for its Hessians, then with its chosen codes, so that the next
//! layer sees what the earlier ones really leave (as the paper's own code does). In memory at one time are the text's
//! hidden states (tokens · hidden · 4 bytes), one layer's floats and one Hessian factor (inputs² · 8 bytes, 189 MB for
//! the widest of Qwen2.5-0.5B) beside the layer's four Hessians.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::error::Error;
use std::fmt;

use commonweal_package::ModelConfig;

use crate::architecture::{Source, rotary_tables};
use crate::gptq::{DAMPING, Hessian, HessianError};
use crate::graph::{GraphError, Source as From};
use crate::llama::block::{Gives, LINEARS, block, tensors};
use crate::lower::lower;
use crate::plan::plan;
use crate::quantize::{BlockFormat, Quantized, Scale};
use crate::tensors::{TensorError, Tensors};
use crate::weights::{WeightTable, one_plus};

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
        "calibration needs at least {needed} tokens, one for each input of the widest layer in whole sequences of up \
         to {SEQUENCE_TOKENS}, got {got}"
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
    widest.next_multiple_of(sequence_tokens(model))
}

/// The tokens that a model is calibrated by: whole sequences, from the first on.
pub fn used<'t>(model: &ModelConfig, tokens: &'t [u32]) -> &'t [u32] {
    &tokens[..tokens.len() - tokens.len() % sequence_tokens(model)]
}

fn sequence_tokens(model: &ModelConfig) -> usize {
    SEQUENCE_TOKENS.min(model.context).max(1)
}

/// A layer's tensor as its graph takes it.
struct Given {
    name: String,
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// A layer's graph, open, and the names of its inputs.
struct Opened {
    names: Vec<String>,
    network: Box<dyn Network>,
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
    networks: BTreeMap<(bool, Option<usize>, bool), Opened>,
    rotary: Vec<Given>,
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
                tensor.values = self.format.dequantize(&quantized, feedback.inputs());
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
                Source::OnePlus(part, length) => {
                    let values = one_plus(self.tensors.rows(&part, 0..length)?);
                    given.push(Given { name, shape: vec![length], values });
                    continue;
                }
                Source::Rotary(..) | Source::Plain(..) => continue,
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
        let Opened { names, network } = match self.networks.entry(key) {
            Entry::Occupied(open) => open.into_mut(),
            Entry::Vacant(place) => {
                let (names, bytes) = graph(self.model, layer, self.time, gives)?;
                let network = self.engine.open(&bytes).map_err(failed)?;
                place.insert(Opened { names, network })
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
        let columns = floats.len();
        let quantized = format.quantize(&format.filled(&floats, columns), Scale::Search);
        states.extend(format.dequantize(&quantized, columns));
    }
    if let Some(gemma) = &model.gemma {
        states.iter_mut().for_each(|value| *value *= gemma.embedding_scale as f32);
    }
    Ok(states)
}

fn rotary(model: &ModelConfig, time: usize) -> Vec<Given> {
    let table = |(name, function, frequencies): (&str, fn(f64) -> f64, Vec<f64>)| {
        let positions = (0..time).flat_map(|position| {
            frequencies.iter().map(move |frequency| function(position as f64 * frequency) as f32)
        });
        Given { name: name.into(), shape: vec![time, frequencies.len()], values: positions.collect() }
    };
    rotary_tables(model).into_iter().map(table).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed test may panic")]
mod tests {
    use std::path::Path;

    use commonweal_package::{Accuracy, Bits, Package, Quantization};
    use commonweal_runtime::{Cancel, Library, Model, OpenOptions, TrainingRow, network};
    use tempfile::TempDir;

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::compile::{CompileOptions, compile};

    struct Runtime(Library);

    struct Layer(network::Network);

    impl Engine for Runtime {
        fn open(&mut self, graph: &[u8]) -> Result<Box<dyn Network>, EngineError> {
            Ok(Box::new(Layer(network::Network::open(&self.0, graph)?)))
        }
    }

    impl Network for Layer {
        fn run(&mut self, inputs: &[Input<'_>]) -> Result<Vec<Vec<f32>>, EngineError> {
            let inputs: Vec<network::NamedTensor<'_>> =
                inputs.iter().map(|input| (input.name, input.shape, input.values)).collect();
            Ok(self.0.run(&inputs)?)
        }
    }

    fn runtime() -> Runtime {
        Runtime(Library::load(None).expect("run scripts/setup"))
    }

    /// A golden checkpoint; those of the architectures share a tokenizer and a template.
    fn goldens(variant: &str) -> TempDir {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens");
        let folder = TempDir::new().unwrap();
        let own = std::fs::read_dir(goldens.join(variant)).unwrap().map(|entry| entry.unwrap().path());
        let text = ["tokenizer.json", "chat_template.jinja"].map(|name| goldens.join("tied").join(name));
        for file in own.chain(text) {
            std::fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
        }
        folder
    }

    /// Both golden checkpoints and one of each architecture: biases, windows, norms of heads, unrotated layers.
    const VARIANTS: [&str; 10] = [
        "tied",
        "untied",
        "architectures/llama-bias",
        "architectures/mistral",
        "architectures/qwen2",
        "architectures/qwen2-window",
        "architectures/qwen3",
        "architectures/smollm3",
        "architectures/gemma2",
        "architectures/gemma3",
    ];

    fn four_bits() -> BlockFormat {
        let quantization = Quantization { bits: Bits::Four, block_size: 32, accuracy: Accuracy::Exact };
        BlockFormat::of(&quantization).expect("quantized")
    }

    fn tokens(count: usize) -> Vec<u32> {
        (0..count as u32).map(|at| at * at % 127).collect()
    }

    /// What the head makes of a state, as log-probabilities; in 64 bits.
    fn logprobs(checkpoint: &Checkpoint, state: &[f32]) -> Vec<f64> {
        let Checkpoint { model, tensors, .. } = checkpoint;
        let mut norm = tensors.rows("model.norm.weight", 0..model.hidden_size).unwrap();
        if model.gemma.is_some() {
            norm = one_plus(norm);
        }
        let head = if model.tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
        let head = tensors.rows(head, 0..model.vocab_size).unwrap();
        let square: f64 = state.iter().map(|x| f64::from(*x).powi(2)).sum();
        let root = (square / state.len() as f64 + model.rms_norm_eps).sqrt();
        let normed: Vec<f64> =
            state.iter().zip(&norm).map(|(x, w)| f64::from(*x) / root * f64::from(*w)).collect();
        let logits: Vec<f64> = head
            .chunks(model.hidden_size)
            .map(|row| row.iter().zip(&normed).map(|(w, x)| f64::from(*w) * x).sum())
            .map(|logit: f64| {
                model.logit_cap().map_or(logit, |cap| f64::from(cap) * (logit / f64::from(cap)).tanh())
            })
            .collect();
        let total = logits.iter().map(|logit| logit.exp()).sum::<f64>().ln();
        logits.into_iter().map(|logit| logit - total).collect()
    }

    #[test]
    fn block_by_block_is_the_model() {
        let mut engine = runtime();
        let ids = tokens(24);
        for variant in VARIANTS {
            let folder = TempDir::new().unwrap();
            let out = folder.path().join("package");
            let source = goldens(variant);
            compile(&CompileOptions { bits: Bits::Full, ..CompileOptions::new(source.path(), &out) })
                .unwrap();
            let whole =
                Model::open(&engine.0, &Package::open(&out).unwrap(), OpenOptions::default()).unwrap();
            let row = TrainingRow { weights: vec![1.0; ids.len()], ids: ids.clone() };
            let scores = whole.score_rows(&whole.prepare(None).unwrap(), &[row], &Cancel::new()).unwrap();

            let checkpoint = Checkpoint::open(source.path(), None).unwrap();
            let (model, tensors) = (&checkpoint.model, &checkpoint.tensors);
            let scale = model.gemma.as_ref().map_or(1.0, |gemma| gemma.embedding_scale as f32);
            let row = |&id: &u32| {
                let row = tensors.rows("model.embed_tokens.weight", id as usize..id as usize + 1).unwrap();
                row.into_iter().map(move |value| scale * value)
            };
            let mut blocks = Calibrator {
                model,
                format: four_bits(),
                tensors,
                engine: &mut engine,
                time: ids.len(),
                states: vec![ids.iter().flat_map(row).collect()],
                networks: BTreeMap::new(),
                rotary: rotary(model, ids.len()),
                next: 0,
                ready: BTreeMap::new(),
            };
            for layer in 0..model.layers {
                let given = blocks.read(layer).unwrap();
                blocks.advance(layer, &given).unwrap();
            }
            let states = blocks.states[0].chunks(model.hidden_size);
            for ((state, next), want) in states.zip(&ids[1..]).zip(&scores[0].token_logprobs) {
                let got = logprobs(&checkpoint, state)[*next as usize];
                assert!((got - f64::from(*want)).abs() < 1e-4, "{variant}: {got}, whole {want}");
            }
        }
    }

    #[test]
    fn grams_are_those_of_the_inputs() {
        let checkpoint = Checkpoint::open(goldens("tied").path(), None).unwrap();
        let (tokens, mut engine) = (tokens(128), runtime());
        let calibration = Calibration { tokens: &tokens, engine: &mut engine };
        let mut calibrator =
            Calibrator::new(&checkpoint.model, four_bits(), &checkpoint.tensors, calibration).unwrap();
        let given = calibrator.read(0).unwrap();
        let hessians = calibrator.observe(0, &given).unwrap();
        // The first linear reads the normed embedding, which is easily had without a graph.
        let norm = &given.iter().find(|tensor| tensor.name == "attn_norm").unwrap().values;
        let hidden = norm.len();
        let mut wanted = vec![0.0_f64; hidden * hidden];
        for state in calibrator.states.iter().flat_map(|states| states.chunks(hidden)) {
            let square: f64 = state.iter().map(|x| f64::from(*x).powi(2)).sum();
            let root = (square / hidden as f64 + checkpoint.model.rms_norm_eps).sqrt();
            let normed: Vec<f64> =
                state.iter().zip(norm).map(|(x, w)| f64::from(*x) / root * f64::from(*w)).collect();
            for (at, sum) in wanted.iter_mut().enumerate() {
                *sum += normed[at / hidden] * normed[at % hidden];
            }
        }
        assert_eq!(hessians.iter().map(Hessian::inputs).collect::<Vec<_>>(), [32, 64, 32, 64]);
        for (got, want) in hessians[0].values().zip(wanted) {
            assert!((got - want).abs() < 1e-3 * want.abs().max(1.0), "{got}, by hand {want}");
        }
    }

    #[test]
    fn every_architecture_is_calibrated() {
        for variant in VARIANTS {
            let checkpoint = Checkpoint::open(goldens(variant).path(), None).unwrap();
            let (tokens, mut engine) = (tokens(256), runtime());
            let calibration = Calibration { tokens: &tokens, engine: &mut engine };
            let model = &checkpoint.model;
            let mut calibrator =
                Calibrator::new(model, four_bits(), &checkpoint.tensors, calibration).unwrap();
            assert!(calibrator.matrix("embed").unwrap().is_none(), "the embedding stays");
            for layer in 0..model.layers {
                for linear in LINEARS {
                    let quantized = calibrator.matrix(&format!("layers.{layer}.{linear}")).unwrap().unwrap();
                    assert!(
                        quantized.scales.iter().all(|scale| scale.is_finite()),
                        "{variant} {layer} {linear}"
                    );
                }
            }
            assert!(calibrator.matrix("head").unwrap().is_none() && calibrator.ready.is_empty());
        }
    }

    #[test]
    fn too_little_text_and_foreign_tokens_are_refused() {
        let checkpoint = Checkpoint::open(goldens("tied").path(), None).unwrap();
        let mut engine = runtime();
        let mut refuse = |tokens: &[u32]| {
            let calibration = Calibration { tokens, engine: &mut engine };
            let refused = Calibrator::new(&checkpoint.model, four_bits(), &checkpoint.tensors, calibration);
            refused.err().unwrap().to_string()
        };
        assert!(refuse(&tokens(63)).contains("at least 64 tokens"));
        assert!(refuse(&[4000; 64]).contains("below 128, got 4000"));
    }
}
