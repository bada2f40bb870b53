//! `package.toml`: what a package says about itself, and the hash that identifies its frozen base.
//! Written by `write.rs`, read and checked by `open.rs`.

use std::collections::BTreeMap;
use std::fmt;

use commonweal_adapter::{AdapterLayout, LayoutError, Module, Target};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::attention::{Attention, is_default};
use crate::cache::CacheForm;
use crate::encoder::EncoderError;
use crate::model::{ModelConfig, ModelError, Quantization, Tokens};
use crate::rounding::Rounding;

/// The one version of the manifest that this crate reads and writes.
pub const FORMAT: u32 = 1;

/// Name of the manifest in the package's directory.
pub const MANIFEST: &str = "package.toml";

/// Files that every decoder's package has.
pub const REQUIRED: [&str; 5] =
    ["infer.onnx", "train.onnx", "weights.bin", "tokenizer.json", "chat_template.jinja"];

/// Files that a decoder's package may have.
pub const OPTIONAL: [&str; 10] = [
    "infer-base.onnx",
    "train-frugal.onnx",
    "train-upper.onnx",
    "adapters/guard.safetensors",
    "adapters/guard.words",
    "adapters/reviser.safetensors",
    "guard.toml",
    "constitution.toml",
    "LICENSE",
    "NOTICE",
];

/// The files whose bytes are part of the base's identity.
const IDENTITY: [&str; 3] = ["weights.bin", "tokenizer.json", "chat_template.jinja"];

/// What a package is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PackageKind {
    /// Generates, scores and trains. Its manifest has no `kind`: packages of before there were two stay as they are.
    Decoder,
    /// Classifies whole texts (`encoder.rs`).
    Encoder,
}

impl fmt::Display for PackageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Decoder => "decoder",
            Self::Encoder => "encoder",
        })
    }
}

/// What a decoder's package says about itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format, [`FORMAT`].
    pub format: u32,
    /// SPDX expression of the model's licence, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub licence: Option<String>,
    /// Identifies the frozen base; see [`Manifest::identify`].
    pub base: Hash,
    /// Dimensions and constants.
    pub model: ModelConfig,
    /// How the frozen weights are stored.
    pub quantization: Quantization,
    /// How the codes of the weights were chosen; not part of the base's identity, which the weights' hash is.
    #[serde(default, skip_serializing_if = "Rounding::is_default")]
    pub rounding: Rounding,
    /// How keys and values are kept; not part of the base's identity, since the graphs alone depend on it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub cache: CacheForm,
    /// The adapter that training starts with by default.
    pub adapter: AdapterDefaults,
    /// Special tokens.
    pub tokens: Tokens,
    /// Every other file of the package and its BLAKE3.
    pub files: BTreeMap<String, Hash>,
}

/// The default shape of a trained adapter, the `[adapter]` table of a manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterDefaults {
    /// Inner dimension.
    pub rank: usize,
    /// The adapter's product is scaled by `alpha / rank`.
    pub alpha: f32,
    /// The linears that have an adapter, the same in every layer; the training graph has exactly these.
    pub targets: Vec<Target>,
}

/// A BLAKE3 hash, hexadecimal in text.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, std::hash::Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// The BLAKE3 of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hash({self})")
    }
}

impl From<Hash> for String {
    fn from(hash: Hash) -> String {
        hash.to_string()
    }
}

/// Text that is not a hash.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a hash must be 64 hexadecimal digits, got {0:?}")]
pub struct HashError(String);

impl TryFrom<String> for Hash {
    type Error = HashError;

    fn try_from(text: String) -> Result<Self, HashError> {
        match blake3::Hash::from_hex(&text) {
            Ok(hash) => Ok(Self(*hash.as_bytes())),
            Err(_) => Err(HashError(text.chars().take(80).collect())),
        }
    }
}

/// A manifest that parses but cannot be true.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// The text is not TOML, lacks a key, has an unknown key or a value of a wrong type.
    #[error("{MANIFEST} cannot be read")]
    Syntax(#[source] toml::de::Error),
    /// The manifest is of another version.
    #[error("{MANIFEST} has format {got}, this program reads format {FORMAT}")]
    Format {
        /// The version found, as written.
        got: String,
    },
    /// The package is made for something else.
    #[error("{MANIFEST} must be of kind {expected}, got {got}")]
    Kind {
        /// What is wanted.
        expected: PackageKind,
        /// What the manifest says.
        got: String,
    },
    /// The `[encoder]` table cannot be true.
    #[error("{MANIFEST} describes an impossible encoder")]
    Encoder(#[from] EncoderError),
    /// The `[model]`, `[quantization]` or `[tokens]` table cannot be true.
    #[error("{MANIFEST} describes an impossible model")]
    Model(#[from] ModelError),
    /// The `[adapter]` table cannot be true.
    #[error("{MANIFEST} describes an impossible adapter")]
    Adapter(#[from] LayoutError),
    /// A file that every package has is not in `[files]`.
    #[error("{MANIFEST} must list {file} under [files], got no such entry")]
    Unlisted {
        /// The missing name.
        file: &'static str,
    },
    /// `[files]` has a name that no package has.
    #[error("{MANIFEST} lists {file:?}, which is not a file of a package")]
    Unknown {
        /// The unknown name.
        file: String,
    },
    /// The `base` hash does not follow from the manifest's own facts.
    #[error("{MANIFEST} must have base {expected}, got {got}")]
    Base {
        /// What the facts and hashes give.
        expected: Hash,
        /// What the manifest says.
        got: Hash,
    },
}

impl Manifest {
    /// Reads and checks a manifest's text; the files themselves are not looked at.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        check_kind(text, PackageKind::Decoder)?;
        let manifest: Self = read_toml(text)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Checks that the facts are possible and agree with each other.
    pub fn check(&self) -> Result<(), ManifestError> {
        self.model.check()?;
        self.quantization.check()?;
        self.tokens.check(self.model.vocab_size)?;
        self.layout()?;
        check_files(&self.files, &REQUIRED, &OPTIONAL)?;
        let (expected, got) = (self.identify(), self.base);
        if expected == got { Ok(()) } else { Err(ManifestError::Base { expected, got }) }
    }

    /// The hash that identifies the frozen base: the hashes of the weights, the tokenizer and the chat template, and
    /// the facts of `[model]` and `[quantization]` that say how to read them. Not the graphs, nor the kernels'
    /// accuracy, nor the name: a better graph or another name keeps every trained adapter valid.
    pub fn identify(&self) -> Hash {
        let Self { model, quantization, .. } = self;
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("commonweal base {FORMAT}\n").as_bytes());
        let mut line = |key: &str, value: &dyn fmt::Debug| {
            hasher.update(format!("{key} {value:?}\n").as_bytes());
        };
        line("architecture", &model.architecture);
        line("hidden_size", &model.hidden_size);
        line("intermediate_size", &model.intermediate_size);
        line("layers", &model.layers);
        line("heads", &model.heads);
        line("kv_heads", &model.kv_heads);
        line("head_dim", &model.head_dim);
        line("vocab_size", &model.vocab_size);
        line("context", &model.context);
        line("rope_theta", &model.rope_theta);
        line("rms_norm_eps", &model.rms_norm_eps);
        line("tied", &model.tied);
        line("rope_scaling", &model.rope_scaling);
        // Only where there is something to say: packages of before this fact keep their identity.
        if model.attention != Attention::default() {
            line("attention", &model.attention);
        }
        if let Some(gemma) = &model.gemma {
            line("gemma", gemma);
        }
        line("bits", &quantization.bits.count());
        line("block_size", &quantization.block_size);
        for file in IDENTITY {
            line(file, &self.files.get(file));
        }
        Hash(*hasher.finalize().as_bytes())
    }

    /// The default adapter's tensors.
    pub fn layout(&self) -> Result<AdapterLayout, LayoutError> {
        layout(&self.model, &self.adapter)
    }
}

/// Checks the version and the kind, before anything else is asked of a text.
pub(crate) fn check_kind(text: &str, expected: PackageKind) -> Result<(), ManifestError> {
    match (expected, kind_of(text)?) {
        (PackageKind::Decoder, None) => Ok(()),
        (PackageKind::Encoder, Some(kind)) if kind == PackageKind::Encoder.to_string() => Ok(()),
        (_, got) => {
            let got = got.unwrap_or_else(|| PackageKind::Decoder.to_string());
            Err(ManifestError::Kind { expected, got })
        }
    }
}

/// The kind that a manifest of this version says, if it says one.
pub(crate) fn kind_of(text: &str) -> Result<Option<String>, ManifestError> {
    let table: toml::Table = text.parse().map_err(ManifestError::Syntax)?;
    // The version comes first: another version's unknown keys are no news.
    match table.get("format") {
        Some(toml::Value::Integer(format)) if *format == i64::from(FORMAT) => {}
        Some(other) => return Err(ManifestError::Format { got: other.to_string() }),
        None => return Err(ManifestError::Format { got: "none".into() }),
    }
    Ok(table.get("kind").map(|kind| kind.as_str().map_or_else(|| kind.to_string(), str::to_owned)))
}

pub(crate) fn read_toml<T: DeserializeOwned>(text: &str) -> Result<T, ManifestError> {
    toml::from_str(text).map_err(ManifestError::Syntax)
}

/// Checks the names under `[files]`.
pub(crate) fn check_files(
    files: &BTreeMap<String, Hash>,
    required: &[&'static str],
    optional: &[&'static str],
) -> Result<(), ManifestError> {
    if let Some(&file) = required.iter().find(|&&file| !files.contains_key(file)) {
        return Err(ManifestError::Unlisted { file });
    }
    match files.keys().find(|file| !required.contains(&file.as_str()) && !optional.contains(&file.as_str())) {
        Some(file) => Err(ManifestError::Unknown { file: file.clone() }),
        None => Ok(()),
    }
}

/// The adapter tensors of a model, for the linears that `defaults` names.
pub fn layout(model: &ModelConfig, defaults: &AdapterDefaults) -> Result<AdapterLayout, LayoutError> {
    let modules = defaults.targets.iter().map(|&target| module(model, target)).collect();
    AdapterLayout::new(model.layers, defaults.rank, defaults.alpha, modules)
}

/// Inputs and outputs of one linear of a block.
fn module(model: &ModelConfig, target: Target) -> Module {
    let (hidden, intermediate) = (model.hidden_size, model.intermediate_size);
    let (inputs, outputs) = match target {
        Target::Q => (hidden, model.query_size()),
        Target::K | Target::V => (hidden, model.kv_size()),
        Target::O => (model.query_size(), hidden),
        Target::Gate | Target::Up => (hidden, intermediate),
        Target::Down => (intermediate, hidden),
    };
    Module { target, inputs, outputs }
}
