//! Reads the `config.json` of an encoder: what all families share, and the labels. The family's own keys are read by
//! its file, through the table of `encoder.rs`. What no graph has is refused by name.

use std::collections::BTreeMap;
use std::path::Path;

use commonweal_package::{DIMENSION_MAX, EncoderConfig, LABELS_MAX, LAYERS_MAX, ModelError, Probabilities};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Described, FAMILIES, Network};
use crate::config::{ConfigError, read_json};
use crate::op::{Op, Unary};

/// An encoder's configuration: the facts that its package states, and the network in its family's terms.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// What the package's manifest says.
    pub encoder: EncoderConfig,
    pub(crate) network: Network,
}

/// What the families' own readers need of the rest.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) hidden_size: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) positions: usize,
    pub(super) pad: u32,
}

#[derive(Deserialize)]
struct RawConfig {
    architectures: Option<Vec<String>>,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    pad_token_id: Option<u32>,
    id2label: Option<BTreeMap<String, String>>,
    num_labels: Option<usize>,
    problem_type: Option<String>,
    quantization_config: Option<Value>,
}

/// A function between two linear layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    Gelu,
    GeluTanh,
    Silu,
    Tanh,
}

impl Activation {
    /// The activation of that name under a key of the file, GELU without one.
    pub(super) fn read(feature: &'static str, name: Option<&str>) -> Result<Self, ConfigError> {
        match name {
            None | Some("gelu") => Ok(Self::Gelu),
            Some("gelu_new" | "gelu_pytorch_tanh") => Ok(Self::GeluTanh),
            Some("silu" | "swish") => Ok(Self::Silu),
            Some("tanh") => Ok(Self::Tanh),
            Some(other) => Err(unsupported(feature, other)),
        }
    }

    pub(super) fn op(self) -> Op {
        match self {
            Self::Gelu => Op::Gelu { tanh: false },
            Self::GeluTanh => Op::Gelu { tanh: true },
            Self::Silu => Op::QuickGelu { alpha: 1.0 },
            Self::Tanh => Op::Unary(Unary::Tanh),
        }
    }
}

/// Reads one `config.json`. The model is named after its directory.
pub(crate) fn read_file(path: &Path) -> Result<Config, ConfigError> {
    let value: Value = read_json(path)?;
    let directory = path.parent().unwrap_or(Path::new(".")).canonicalize().unwrap_or_default();
    let name = directory.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned());
    check(&value, name).map_err(|error| match error {
        // `keys` does not know the file.
        ConfigError::Syntax { source, .. } => ConfigError::Syntax { path: path.into(), source },
        error => error,
    })
}

fn check(value: &Value, name: String) -> Result<Config, ConfigError> {
    let raw: RawConfig = keys(value)?;
    let architectures = raw.architectures.unwrap_or_default();
    let family = FAMILIES.iter().find(|family| architectures == [family.class]);
    let family = family.ok_or_else(|| ConfigError::Architecture {
        got: if architectures.is_empty() { "none".into() } else { architectures.join(", ") },
    })?;
    if let Some(quantized) = raw.quantization_config {
        let method = quantized.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        return Err(unsupported("quantization_config", method));
    }
    // Lists of layers and tables of positions are made next.
    for (name, got, max) in [
        ("hidden_size", raw.hidden_size, DIMENSION_MAX),
        ("layers", raw.num_hidden_layers, LAYERS_MAX),
        ("heads", raw.num_attention_heads, DIMENSION_MAX),
        ("max_position_embeddings", raw.max_position_embeddings, DIMENSION_MAX),
    ] {
        if got == 0 || got > max {
            return Err(ModelError::OutOfRange { name, max, got }.into());
        }
    }
    let pad = raw.pad_token_id.unwrap_or(family.pad);
    let common = Common {
        hidden_size: raw.hidden_size,
        layers: raw.num_hidden_layers,
        heads: raw.num_attention_heads,
        positions: raw.max_position_embeddings,
        pad,
    };
    let labels = labels(raw.id2label, raw.num_labels)?;
    let probabilities = probabilities(raw.problem_type.as_deref(), labels.len())?;
    let Described { network, context, token_types } = (family.describe)(value, &common)?;
    let encoder = EncoderConfig {
        architecture: family.architecture,
        name,
        hidden_size: raw.hidden_size,
        intermediate_size: raw.intermediate_size,
        layers: raw.num_hidden_layers,
        heads: raw.num_attention_heads,
        vocab_size: raw.vocab_size,
        context,
        token_types,
        pad,
        probabilities,
        labels,
    };
    encoder.check()?;
    Ok(Config { encoder, network })
}

/// The labels in the order of the logits. Without names Hugging Face numbers them, and without a number there are two.
fn labels(
    named: Option<BTreeMap<String, String>>,
    number: Option<usize>,
) -> Result<Vec<String>, ConfigError> {
    let count = named.as_ref().map(BTreeMap::len).or(number).unwrap_or(2);
    if count > LABELS_MAX {
        return Err(ModelError::OutOfRange { name: "number of labels", max: LABELS_MAX, got: count }.into());
    }
    if let Some(other) = number.filter(|&number| number != count) {
        return Err(unsupported("num_labels", format!("{other} beside {count} names in id2label")));
    }
    let Some(mut named) = named else {
        return Ok((0..count).map(|label| format!("LABEL_{label}")).collect());
    };
    let name = |label: usize| {
        let found = named.remove(&label.to_string());
        found.ok_or_else(|| unsupported("id2label", format!("{count} names without one for {label}")))
    };
    (0..count).map(name).collect()
}

/// As the text-classification pipeline of `transformers` chooses.
fn probabilities(problem: Option<&str>, labels: usize) -> Result<Probabilities, ConfigError> {
    match problem {
        Some("single_label_classification") => Ok(Probabilities::Softmax),
        Some("multi_label_classification") => Ok(Probabilities::Sigmoid),
        None => Ok(if labels == 1 { Probabilities::Sigmoid } else { Probabilities::Softmax }),
        Some(other) => Err(unsupported("problem_type", other)),
    }
}

/// The keys that a structure names.
pub(super) fn keys<T: DeserializeOwned>(value: &Value) -> Result<T, ConfigError> {
    T::deserialize(value).map_err(|source| ConfigError::Syntax { path: "config.json".into(), source })
}

pub(super) fn unsupported(feature: &'static str, got: impl Into<String>) -> ConfigError {
    ConfigError::Unsupported { feature, got: got.into() }
}

/// Refuses a key whose value is another than the one that the graphs have.
pub(super) fn only<T: PartialEq + ToString>(
    feature: &'static str,
    got: Option<T>,
    accepted: &T,
) -> Result<(), ConfigError> {
    match got {
        Some(got) if got != *accepted => Err(unsupported(feature, got.to_string())),
        _ => Ok(()),
    }
}

/// A constant that is added to a variance.
pub(super) fn epsilon(name: &'static str, got: f64) -> Result<f32, ConfigError> {
    let holds = got.is_finite() && got > 0.0;
    if holds { Ok(got as f32) } else { Err(ModelError::NotPositive { name, got }.into()) }
}
