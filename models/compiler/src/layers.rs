//! A calibration text's way through a model, one layer at a time. `calibrate.rs` watches what goes into each layer's
//! linears, `cache_scales.rs` what its attention keeps; each decides with which weights the text goes on.
//!
//! In memory at one time are the text's hidden states (tokens · hidden · 4 bytes) and one layer's floats; [`needed_bytes`]
//! tells how much that is before anything is allocated.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

use commonweal_package::{Hash, ModelConfig};
use commonweal_runtime::MemoryError;

use crate::architecture::{RotaryTable, Source, rotary_tables};
use crate::engine::{Engine, EngineError, Input, Network};
use crate::gptq::HessianError;
use crate::graph::{Graph, GraphError, Source as From};
use crate::llama::block::{Gives, block, tensors};
use crate::lower::lower;
use crate::plan::plan;
use crate::quantize::{BlockFormat, UNCALIBRATED};
use crate::tensors::{TensorError, Tensors};
use crate::weights::{WeightTable, one_plus};

/// Tokens of one run, and so the farthest that a calibration token sees back.
pub const SEQUENCE_TOKENS: usize = 512;

/// A text to calibrate by, and what to run the model on it with.
pub struct Calibration<'a> {
    /// The text's tokens, one behind the other. What is left after whole sequences is not used.
    pub tokens: &'a [u32],
    /// Runs the layers.
    pub engine: &'a mut dyn Engine,
}

impl Calibration<'_> {
    /// What a manifest records of the text: how many of its tokens are used, and the BLAKE3 of those, each as four bytes,
    /// little endian.
    pub(crate) fn used(&self, model: &ModelConfig) -> (usize, Hash) {
        let tokens = used(model, self.tokens);
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        (tokens.len(), Hash::of(&bytes))
    }
}

impl fmt::Debug for Calibration<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Calibration").field("tokens", &self.tokens.len()).finish_non_exhaustive()
    }
}

/// The tokens that a model is calibrated by: whole sequences, from the first on.
pub fn used<'t>(model: &ModelConfig, tokens: &'t [u32]) -> &'t [u32] {
    &tokens[..tokens.len() - tokens.len() % sequence_tokens(model)]
}

/// Tokens of one run of the model's layers.
pub(crate) fn sequence_tokens(model: &ModelConfig) -> usize {
    SEQUENCE_TOKENS.min(model.context).max(1)
}

/// The program, the runtime library and its threads.
const PROCESS_BYTES: f64 = 50e6;
/// Of a layer's values of a token, how many are alive at once while it runs.
const RUN_WIDTHS: f64 = 2.0;

/// Bytes of the whole process at most, while a text of so many tokens goes through a model's layers; with their Hessians, if
/// codes are chosen by those (`calibrate.rs`). Within a factor of 1.3 of the peaks that were measured, as `compile.rs` tests.
pub fn needed_bytes(model: &ModelConfig, tokens: usize, with_hessians: bool) -> u64 {
    let (hidden, query) = (model.hidden_size as f64, model.query_size() as f64);
    let (qkv, inner) = (model.qkv_size() as f64, model.intermediate_size as f64);
    let (time, float, double) =
        (sequence_tokens(model) as f64, size_of::<f32>() as f64, size_of::<f64>() as f64);
    let states = tokens as f64 * hidden * float;
    // As they were read, and as the library packs them.
    let layer = 2.0 * (hidden * qkv + query * hidden + 3.0 * hidden * inner) * float;
    let scores = model.heads as f64 * time;
    let run = RUN_WIDTHS * time * (3.0 * inner + qkv + 3.0 * hidden + scores) * float;
    // Of the inputs of each linear: what a run gives, as the library has it and as it is copied out, and the sum of it.
    let squares = (2.0 * hidden.powi(2) + query.powi(2) + inner.powi(2)) * (2.0 * float + double);
    // The widest matrix while its codes are chosen, and what they leave of it.
    let rounding = 2.0 * (2.0 * inner * hidden) * double;
    let hessians = if with_hessians { squares + rounding } else { 0.0 };
    (PROCESS_BYTES + states + layer + run + hessians) as u64
}

/// Why a text did not calibrate a model.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    /// The text is too short.
    #[error(
        "calibration needs at least {needed} tokens, whole sequences of up to {SEQUENCE_TOKENS} (for gptq, with one for each \
         input of the widest layer), got {got}"
    )]
    TooFew {
        /// The fewest tokens.
        needed: usize,
        /// The text's.
        got: usize,
    },
    /// The machine has no room for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
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
    /// The engine gave outputs of wrong sizes.
    #[error("layer {layer} must give outputs of {expected:?} values, got {got:?}")]
    Output {
        /// The layer.
        layer: usize,
        /// What its graph says.
        expected: Vec<usize>,
        /// What came.
        got: Vec<usize>,
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

/// A layer's tensor as its graph takes it.
pub(crate) struct Given {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

/// A layer's graph, open: the names of its inputs, the number of values of each output.
struct Opened {
    names: Vec<String>,
    sizes: Vec<usize>,
    network: Box<dyn Network>,
}

/// The text between two layers.
pub(crate) struct Layers<'a> {
    pub(crate) model: &'a ModelConfig,
    tensors: &'a Tensors,
    engine: &'a mut dyn Engine,
    time: usize,
    /// What goes into the next layer, `[time, hidden]` for each sequence.
    pub(crate) states: Vec<Vec<f32>>,
    /// Open graphs by what tells layers apart: rotation and window, and what the graph gives.
    networks: BTreeMap<(bool, Option<usize>, Gives), Opened>,
    rotary: Vec<Given>,
}

impl<'a> Layers<'a> {
    /// The text before the first layer: the embedding's rows as `format` stores them, or as they are.
    pub(crate) fn new(
        model: &'a ModelConfig,
        format: Option<BlockFormat>,
        tensors: &'a Tensors,
        calibration: Calibration<'a>,
    ) -> Result<Self, CalibrateError> {
        let Calibration { tokens, engine } = calibration;
        let time = sequence_tokens(model);
        if tokens.len() < time {
            return Err(CalibrateError::TooFew { needed: time, got: tokens.len() });
        }
        let embed = |sequence| embed(model, format, tensors, sequence);
        let states = tokens.chunks_exact(time).map(embed).collect::<Result<_, _>>()?;
        let rotary = rotary(model, time);
        Ok(Self { model, tensors, engine, time, states, networks: BTreeMap::new(), rotary })
    }

    /// A layer's tensors as floats.
    pub(crate) fn read(&self, layer: usize) -> Result<Vec<Given>, CalibrateError> {
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

    /// Replaces every state by what the layer makes of it.
    pub(crate) fn advance(&mut self, layer: usize, given: &[Given]) -> Result<(), CalibrateError> {
        for index in 0..self.states.len() {
            self.states[index] = self.run(layer, given, index, Gives::Output)?.pop().unwrap_or_default();
        }
        Ok(())
    }

    /// What a layer gives for sequence `index`.
    pub(crate) fn run(
        &mut self,
        layer: usize,
        given: &[Given],
        index: usize,
        gives: Gives,
    ) -> Result<Vec<Vec<f32>>, CalibrateError> {
        let attention = &self.model.attention;
        let key = (attention.rotates(layer), attention.window_of(layer), gives);
        let failed = |source| CalibrateError::Engine { layer, source };
        let Opened { names, sizes, network } = match self.networks.entry(key) {
            Entry::Occupied(open) => open.into_mut(),
            Entry::Vacant(place) => {
                let graph = block(self.model, layer, self.time, gives)?;
                let bytes = lower(&graph, &plan(&graph).order, "block", &WeightTable::default())?;
                let network = self.engine.open(&bytes).map_err(failed)?;
                place.insert(Opened { names: inputs(&graph), sizes: sizes(&graph), network })
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
        let outputs = network.run(&inputs).map_err(failed)?;
        let got: Vec<usize> = outputs.iter().map(Vec::len).collect();
        if got == *sizes {
            Ok(outputs)
        } else {
            Err(CalibrateError::Output { layer, expected: sizes.clone(), got })
        }
    }
}

/// The names of a graph's inputs.
fn inputs(graph: &Graph) -> Vec<String> {
    let inputs = graph.values().filter(|(_, value)| value.source == From::Input);
    inputs.map(|(_, value)| value.name.clone()).collect()
}

/// The number of values of each of a graph's outputs.
fn sizes(graph: &Graph) -> Vec<usize> {
    let size = |&id| graph.shape(id).as_fixed().unwrap_or_default().iter().product();
    graph.outputs().iter().map(size).collect()
}

/// The embedding's rows for a sequence.
fn embed(
    model: &ModelConfig,
    format: Option<BlockFormat>,
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
        match format {
            None => states.extend(floats),
            Some(format) => {
                let quantized = format.quantize(&format.filled(&floats, floats.len()), UNCALIBRATED);
                states.extend(format.dequantize(&quantized, floats.len()));
            }
        }
    }
    if let Some(gemma) = &model.gemma {
        for value in &mut states {
            *value *= gemma.embedding_scale as f32;
        }
    }
    Ok(states)
}

fn rotary(model: &ModelConfig, time: usize) -> Vec<Given> {
    let table = |(name, function, frequencies): RotaryTable| {
        let positions = (0..time).flat_map(|position| {
            frequencies.iter().map(move |frequency| function(position as f64 * frequency) as f32)
        });
        Given { name: name.into(), shape: vec![time, frequencies.len()], values: positions.collect() }
    };
    rotary_tables(model).into_iter().map(table).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed test may panic")]
pub(crate) mod tests {
    use std::path::Path;

    use commonweal_package::{Bits, Package};
    use commonweal_runtime::{Cancel, Library, Model, OpenOptions, TrainingRow};
    use tempfile::TempDir;

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::compile::{CompileOptions, compile};

    pub(crate) fn library() -> Library {
        Library::load(None).expect("run scripts/setup")
    }

    /// A golden checkpoint; those of the architectures share a tokenizer and a template.
    pub(crate) fn goldens(variant: &str) -> TempDir {
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
    pub(crate) const VARIANTS: [&str; 10] = [
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

    pub(crate) fn tokens(count: usize) -> Vec<u32> {
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
        let mut engine = library();
        let ids = tokens(24);
        for variant in VARIANTS {
            let folder = TempDir::new().unwrap();
            let out = folder.path().join("package");
            let source = goldens(variant);
            compile(&CompileOptions { bits: Bits::Full, ..CompileOptions::new(source.path(), &out) })
                .unwrap();
            let whole = Model::open(&engine, &Package::open(&out).unwrap(), OpenOptions::default()).unwrap();
            let row = TrainingRow { weights: vec![1.0; ids.len()], ids: ids.clone() };
            let scores = whole.score_rows(&whole.prepare(None).unwrap(), &[row], &Cancel::new()).unwrap();

            let checkpoint = Checkpoint::open(source.path(), None).unwrap();
            let (model, tensors) = (&checkpoint.model, &checkpoint.tensors);
            let scale = model.gemma.as_ref().map_or(1.0, |gemma| gemma.embedding_scale as f32);
            let row = |&id: &u32| {
                let row = tensors.rows("model.embed_tokens.weight", id as usize..id as usize + 1).unwrap();
                row.into_iter().map(move |value| scale * value)
            };
            let mut blocks = Layers {
                model,
                tensors,
                engine: &mut engine,
                time: ids.len(),
                states: vec![ids.iter().flat_map(row).collect()],
                networks: BTreeMap::new(),
                rotary: rotary(model, ids.len()),
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
}
