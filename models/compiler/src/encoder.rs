//! Encoders that classify texts (BERT, RoBERTa, DeBERTa, ModernBERT), a second way from a checkpoint to a package beside
//! that of decoders: one graph, `classify.onnx`, and no adapter. This file is the table of families; `encoder/config.rs`
//! reads a configuration by it, each family's own file knows its tensors and builds its graph from the parts of
//! `encoder/parts.rs`, and `encoder/compile.rs` writes the package.

mod config;
mod parts;
mod bert;
mod deberta;
mod modernbert;
mod compile;

pub use compile::{EncoderOptions, EncoderSummary, compile, compile_with_progress};
pub use config::Config;
pub(crate) use config::read_file;

use std::path::Path;

use commonweal_package::{EncoderArchitecture, Quantization};
use serde_json::Value;

use crate::architecture::{Source, shapes_of};
use crate::config::{ConfigError, read_json};
use crate::graph::{Graph, GraphError};
use bert::Bert;
use config::Common;
use deberta::Deberta;
use modernbert::ModernBert;
use parts::Parts;

/// A family by the name in `config.json`.
struct Family {
    class: &'static str,
    architecture: EncoderArchitecture,
    /// The padding token when the file does not say.
    pad: u32,
    describe: fn(&Value, &Common) -> Result<Described, ConfigError>,
}

/// Every encoder that can be compiled.
const FAMILIES: [Family; 5] = [
    Family {
        class: "BertForSequenceClassification",
        architecture: EncoderArchitecture::Bert,
        pad: 0,
        describe: bert::describe,
    },
    Family {
        class: "RobertaForSequenceClassification",
        architecture: EncoderArchitecture::Roberta,
        pad: 1,
        describe: bert::describe_roberta,
    },
    Family {
        class: "XLMRobertaForSequenceClassification",
        architecture: EncoderArchitecture::Roberta,
        pad: 1,
        describe: bert::describe_roberta,
    },
    Family {
        class: "DebertaV2ForSequenceClassification",
        architecture: EncoderArchitecture::Deberta,
        pad: 0,
        describe: deberta::describe,
    },
    Family {
        class: "ModernBertForSequenceClassification",
        architecture: EncoderArchitecture::ModernBert,
        pad: 50_283,
        describe: modernbert::describe,
    },
];

/// What a family's own keys say.
#[derive(Debug)]
struct Described {
    network: Network,
    /// Longest sequence.
    context: usize,
    /// Kinds of tokens.
    token_types: usize,
}

/// A network in the terms of its family.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Network {
    Bert(Bert),
    Deberta(Deberta),
    ModernBert(ModernBert),
}

/// The names of all encoders, for people.
pub(crate) fn supported() -> String {
    FAMILIES.map(|family| family.class).join(", ")
}

/// Whether a `config.json` is of an encoder in the table.
pub fn is_encoder(config: &Path) -> Result<bool, ConfigError> {
    let value: Value = read_json(config)?;
    let class = value.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
    Ok(FAMILIES.iter().any(|family| Some(family.class) == class))
}

/// Every tensor of `weights.bin` by its name there, in the order of the forward pass.
pub(crate) fn tensors(config: &Config) -> Vec<(String, Source)> {
    match &config.network {
        Network::Bert(bert) => bert.tensors(&config.encoder),
        Network::Deberta(deberta) => deberta.tensors(&config.encoder),
        Network::ModernBert(modern) => modern.tensors(&config.encoder),
    }
}

/// Every tensor of a checkpoint by its Hugging Face name, with its shape, in the order of the forward pass.
pub fn tensor_shapes(config: &Config) -> Vec<(String, Vec<usize>)> {
    shapes_of(tensors(config))
}

/// Builds `classify.onnx`'s graph.
///
/// Inputs: `input_ids [batch, time] i64`, special tokens included; `lengths [batch] i64`, tokens of each row, at least
/// one, the rest being padding on the right; `token_type_ids [batch, time] i64` where the network tells kinds of tokens
/// apart. Output: `logits [batch, labels]`.
pub fn graph(config: &Config, quantization: &Quantization) -> Result<Graph, GraphError> {
    let mut parts = Parts::new(&config.encoder, quantization)?;
    let logits = match &config.network {
        Network::Bert(bert) => bert.logits(&mut parts)?,
        Network::Deberta(deberta) => deberta.logits(&mut parts)?,
        Network::ModernBert(modern) => modern.logits(&mut parts)?,
    };
    parts.graph.output("logits", logits)?;
    Ok(parts.graph)
}
