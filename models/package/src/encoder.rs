//! The package of an encoder that classifies texts: the second kind beside the decoder of `manifest.rs`, with one graph
//! and no adapter. The compiler writes it (`write.rs`), the runtime's classifier opens it; each kind is refused by name
//! where the other is wanted.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::manifest::{FORMAT, Hash, ManifestError, PackageKind, check_files, check_kind, read_toml};
use crate::model::{DIMENSION_MAX, LAYERS_MAX, ModelError, Quantization};
use crate::open::{OpenError, read_manifest, verify_files};

/// Files that every encoder's package has.
pub const ENCODER_REQUIRED: [&str; 3] = ["classify.onnx", "weights.bin", "tokenizer.json"];

/// Files that an encoder's package may have.
pub const ENCODER_OPTIONAL: [&str; 2] = ["LICENSE", "NOTICE"];

/// Most labels. Safety classifiers have 1 to 30.
pub const LABELS_MAX: usize = 256;

/// Longest label in bytes.
const LABEL_BYTES_MAX: usize = 256;

/// Most types of tokens: BERT has two, others one or none.
const TOKEN_TYPES_MAX: usize = 16;

/// What an encoder's package says about itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncoderManifest {
    /// Version of this format, [`FORMAT`].
    pub format: u32,
    /// [`PackageKind::Encoder`].
    pub kind: PackageKind,
    /// SPDX expression of the model's licence, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub licence: Option<String>,
    /// Identifies the classifier; see [`EncoderManifest::identify`].
    pub base: Hash,
    /// Dimensions, labels and limits.
    pub encoder: EncoderConfig,
    /// How the weights are stored.
    pub quantization: Quantization,
    /// Every other file of the package and its BLAKE3.
    pub files: BTreeMap<String, Hash>,
}

/// The facts of an encoder that its users need, the `[encoder]` table of a manifest. What only the graph knows (the
/// form of its attention, its norms) is in the graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncoderConfig {
    /// The family of networks.
    pub architecture: EncoderArchitecture,
    /// A name for people; it is not part of the identity.
    pub name: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside each feed-forward layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Number of heads; divides `hidden_size`.
    pub heads: usize,
    /// Number of tokens, rows of the embedding.
    pub vocab_size: usize,
    /// Longest sequence in tokens, special ones included.
    pub context: usize,
    /// Kinds of tokens that the network tells apart, such as a text and its pair; the graph has the input
    /// `token_type_ids` where there are at least two.
    pub token_types: usize,
    /// Fills the end of shorter rows of a batch.
    pub pad: u32,
    /// How the logits become probabilities.
    pub probabilities: Probabilities,
    /// The labels, in the order of the logits.
    pub labels: Vec<String>,
}

/// A family of encoders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EncoderArchitecture {
    /// BERT: learned positions, norm after each block.
    Bert,
    /// RoBERTa and XLM-RoBERTa: a BERT whose positions begin behind the padding token's number.
    Roberta,
    /// DeBERTa 2 and 3: attention between contents and relative positions.
    Deberta,
    /// ModernBERT: rotary positions, local and global attention, norm before each block.
    ModernBert,
}

/// How logits become probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Probabilities {
    /// Exactly one label holds: the probabilities sum to one.
    Softmax,
    /// Each label holds or not by itself.
    Sigmoid,
}

/// An encoder that cannot be.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EncoderError {
    /// A dimension is zero or too large.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The heads do not share the width evenly.
    #[error("heads must divide hidden_size {hidden_size}, got {heads}")]
    Heads {
        /// Width of the residual stream.
        hidden_size: usize,
        /// Number of heads.
        heads: usize,
    },
    /// A label is empty, too long or there twice.
    #[error("label {index} must be of 1 to {LABEL_BYTES_MAX} bytes and unlike the others, got {got:?}")]
    Label {
        /// Its place.
        index: usize,
        /// Its text, cut.
        got: String,
    },
    /// One label alone always has the probability one.
    #[error("softmax needs at least 2 labels, got {got}")]
    Softmax {
        /// Number of labels.
        got: usize,
    },
}

impl EncoderConfig {
    /// Checks that the facts are possible and small enough to compute with.
    pub fn check(&self) -> Result<(), EncoderError> {
        for (name, got, least, max) in [
            ("hidden_size", self.hidden_size, 1, DIMENSION_MAX),
            ("intermediate_size", self.intermediate_size, 1, DIMENSION_MAX),
            ("layers", self.layers, 1, LAYERS_MAX),
            ("heads", self.heads, 1, DIMENSION_MAX),
            ("vocab_size", self.vocab_size, 1, DIMENSION_MAX),
            ("context", self.context, 1, DIMENSION_MAX),
            ("token_types", self.token_types, 0, TOKEN_TYPES_MAX),
            ("number of labels", self.labels.len(), 1, LABELS_MAX),
        ] {
            if got < least || got > max {
                return Err(ModelError::OutOfRange { name, max, got }.into());
            }
        }
        let Self { hidden_size, heads, vocab_size, pad, .. } = *self;
        if !hidden_size.is_multiple_of(heads) {
            return Err(EncoderError::Heads { hidden_size, heads });
        }
        if pad as usize >= vocab_size {
            return Err(ModelError::Token { name: "pad", vocab_size, got: pad }.into());
        }
        for (index, label) in self.labels.iter().enumerate() {
            if label.is_empty() || label.len() > LABEL_BYTES_MAX || self.labels[..index].contains(label) {
                return Err(EncoderError::Label { index, got: label.chars().take(80).collect() });
            }
        }
        match (self.probabilities, self.labels.len()) {
            (Probabilities::Softmax, got @ 1) => Err(EncoderError::Softmax { got }),
            _ => Ok(()),
        }
    }
}

impl EncoderManifest {
    /// Reads and checks a manifest's text; the files themselves are not looked at.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        check_kind(text, PackageKind::Encoder)?;
        let manifest: Self = read_toml(text)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Checks that the facts are possible and agree with each other.
    pub fn check(&self) -> Result<(), ManifestError> {
        self.encoder.check()?;
        self.quantization.check()?;
        check_files(&self.files, &ENCODER_REQUIRED, &ENCODER_OPTIONAL)?;
        let (expected, got) = (self.identify(), self.base);
        if expected == got { Ok(()) } else { Err(ManifestError::Base { expected, got }) }
    }

    /// The hash that identifies the classifier: of its graph, weights and tokenizer, and of the facts that change what
    /// it answers. Unlike a decoder's base it holds the graph: no adapter depends on it, and a calibration does.
    pub fn identify(&self) -> Hash {
        let EncoderConfig { architecture, context, token_types, pad, probabilities, labels, .. } =
            &self.encoder;
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("commonweal encoder {FORMAT}\n").as_bytes());
        let mut line = |key: &str, value: &dyn fmt::Debug| {
            hasher.update(format!("{key} {value:?}\n").as_bytes());
        };
        line("architecture", architecture);
        line("context", context);
        line("token_types", token_types);
        line("pad", pad);
        line("probabilities", probabilities);
        line("labels", labels);
        line("bits", &self.quantization.bits.count());
        line("block_size", &self.quantization.block_size);
        for file in ENCODER_REQUIRED {
            line(file, &self.files.get(file));
        }
        Hash(*hasher.finalize().as_bytes())
    }
}

/// An encoder's package whose every file has the hash that its manifest says.
#[derive(Clone, Debug)]
pub struct EncoderPackage {
    directory: PathBuf,
    manifest: EncoderManifest,
}

impl EncoderPackage {
    /// Opens a package directory and verifies every file; reads each once from start to end.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, OpenError> {
        let directory = directory.into();
        let text = read_manifest(&directory)?;
        let wrong = |source| OpenError::Manifest { directory: directory.clone(), source };
        let manifest = EncoderManifest::parse(&text).map_err(wrong)?;
        verify_files(&directory, &manifest.files, &ENCODER_REQUIRED)?;
        verify_files(&directory, &manifest.files, &ENCODER_OPTIONAL)?;
        Ok(Self { directory, manifest })
    }

    /// What the package says about itself.
    pub fn manifest(&self) -> &EncoderManifest {
        &self.manifest
    }

    /// The hash that identifies the classifier.
    pub fn base(&self) -> Hash {
        self.manifest.base
    }

    /// The package's directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The graph.
    pub fn graph(&self) -> PathBuf {
        self.directory.join("classify.onnx")
    }

    /// The weights, external data of the graph.
    pub fn weights(&self) -> PathBuf {
        self.directory.join("weights.bin")
    }

    /// The tokenizer, in Hugging Face's form.
    pub fn tokenizer(&self) -> PathBuf {
        self.directory.join("tokenizer.json")
    }
}
