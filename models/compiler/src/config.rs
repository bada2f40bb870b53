//! Reads `config.json` and `generation_config.json` of a Hugging Face checkpoint into a [`ModelConfig`] and the special
//! tokens that they declare. First stage of `checkpoint.rs`. What the compiler cannot build is refused by name.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use commonweal_package::{Architecture, EncoderError, LAYERS_MAX, ModelConfig, ModelError, RopeScaling};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::architecture::{Family, RawAttention, supported};
use crate::gemma;
use crate::said::Said;

/// Longest configuration file read. Real ones are a few kB.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// What the configuration files of a checkpoint say.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Dimensions and constants.
    pub model: ModelConfig,
    /// Special tokens by number, `generation_config.json` before `config.json`.
    pub tokens: DeclaredTokens,
}

/// Special tokens as configuration files declare them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeclaredTokens {
    /// Begins a sequence.
    pub bos: Option<u32>,
    /// Any of these ends a generation.
    pub eos: Vec<u32>,
    /// Fills shorter rows.
    pub pad: Option<u32>,
}

/// Why a configuration cannot be compiled.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not there or cannot be read.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not JSON, lacks a key or has a value of a wrong type.
    #[error("{} is not a model configuration", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// Another family of networks.
    #[error("architecture {got} is not supported; supported are {}", supported())]
    Architecture {
        /// What the file says.
        got: String,
    },
    /// A feature that the graphs do not have.
    #[error("{feature} is not supported, got {got}")]
    Unsupported {
        /// The key in the file.
        feature: &'static str,
        /// Its value.
        got: String,
    },
    /// An encoder's facts are impossible.
    #[error("the configuration describes an impossible encoder")]
    Encoder(#[from] EncoderError),
    /// The dimensions are impossible.
    #[error("the configuration describes an impossible model")]
    Model(#[from] ModelError),
}

/// What is asked before anything else.
#[derive(Deserialize)]
struct Named {
    architectures: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct RawConfig {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    rope_theta: Option<f64>,
    rms_norm_eps: Option<f64>,
    tie_word_embeddings: Option<bool>,
    mlp_bias: Option<bool>,
    hidden_act: Option<String>,
    #[serde(flatten)]
    attention: RawAttention,
    rope_scaling: Option<RawRope>,
    /// Newer name of `rope_scaling` and `rope_theta` together.
    rope_parameters: Option<RawRope>,
    quantization_config: Option<serde_json::Value>,
    vision_config: Option<serde_json::Value>,
    #[serde(flatten)]
    tokens: RawTokens,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(crate) struct RawRope {
    pub(crate) rope_type: Option<String>,
    /// Older name of `rope_type`. Files written for both have both.
    #[serde(rename = "type")]
    older_type: Option<String>,
    pub(crate) rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    /// Newer Gemma 3: one for each kind of layer.
    full_attention: Option<Box<RawRope>>,
    sliding_attention: Option<Box<RawRope>>,
    partial_rotary_factor: Option<f64>,
    /// What no graph would obey.
    #[serde(flatten)]
    others: BTreeMap<String, serde_json::Value>,
}

impl RawRope {
    /// The same with one name for its kind. A scaling without a kind, and keys that would be overlooked, are refused by
    /// name; an unknown kind is left to those who know the kinds.
    fn settled(self, feature: &'static str) -> Result<Self, ConfigError> {
        let refused = |got: String| Err(ConfigError::Unsupported { feature, got });
        let Self { rope_type, older_type, .. } = &self;
        if let (Some(kind), Some(older)) = (rope_type, older_type)
            && kind != older
        {
            return refused(format!("rope_type {kind} with type {older}"));
        }
        let rope_type = rope_type.clone().or_else(|| older_type.clone());
        let scales = self.factor.is_some()
            || self.low_freq_factor.is_some()
            || self.high_freq_factor.is_some()
            || self.original_max_position_embeddings.is_some();
        if rope_type.is_none() && scales {
            return refused("a scaling without rope_type".into());
        }
        if let Some(factor) = self.partial_rotary_factor.filter(|factor| !(1.0..=1.0).contains(factor)) {
            return refused(format!("partial_rotary_factor {factor}"));
        }
        let is_known = matches!(rope_type.as_deref(), None | Some("default" | "linear" | "llama3"));
        if let Some((key, _)) = self.others.iter().find(|(_, value)| is_known && !value.is_null()) {
            return refused(format!("the key {key}"));
        }
        let settled = |rope: Option<Box<Self>>| -> Result<Option<Box<Self>>, ConfigError> {
            let Some(rope) = rope else { return Ok(None) };
            if rope.full_attention.is_some() || rope.sliding_attention.is_some() {
                return Err(ConfigError::Unsupported {
                    feature,
                    got: "kinds of layers within a kind".into(),
                });
            }
            rope.settled(feature).map(|rope| Some(Box::new(rope)))
        };
        let (full_attention, sliding_attention) =
            (settled(self.full_attention)?, settled(self.sliding_attention)?);
        if (full_attention.is_some() || sliding_attention.is_some()) && (rope_type.is_some() || scales) {
            return refused("one for each kind of layer, and one for all".into());
        }
        Ok(Self { rope_type, older_type: None, full_attention, sliding_attention, ..self })
    }

    /// The one of both names of a file. Where both are there, they must say the same.
    fn of_file(newer: Option<Self>, older: Option<Self>) -> Result<Option<Self>, ConfigError> {
        let newer = newer.map(|rope| rope.settled("rope_parameters")).transpose()?;
        let older = older.map(|rope| rope.settled("rope_scaling")).transpose()?;
        if let (Some(newer), Some(older)) = (&newer, &older) {
            // The older one has its base elsewhere.
            let rope_theta = older.rope_theta.or(newer.rope_theta);
            if *newer != (Self { rope_theta, ..older.clone() }) {
                let got = "another than rope_parameters".into();
                return Err(ConfigError::Unsupported { feature: "rope_scaling", got });
            }
        }
        Ok(newer.or(older))
    }

    /// The bases of layers that see everything and of those with a window, where the file says them. Nothing is scaled.
    pub(crate) fn plain_bases(self) -> Result<[Option<f64>; 2], ConfigError> {
        let refused = |got: String| Err(ConfigError::Unsupported { feature: "rope_parameters", got });
        let Self { rope_type, rope_theta, full_attention, sliding_attention, .. } =
            self.settled("rope_parameters")?;
        if rope_type.is_some() || rope_theta.is_some() {
            return refused("one for all layers".into());
        }
        let mut bases = [None; 2];
        for (base, rope) in bases.iter_mut().zip([full_attention, sliding_attention]) {
            let Some(rope) = rope else { continue };
            if let Some(other) = rope.rope_type.filter(|kind| kind != "default") {
                return refused(other);
            }
            *base = rope.rope_theta;
        }
        Ok(bases)
    }

    /// The factor of linear scaling.
    pub(crate) fn linear(&self) -> Result<Option<f64>, ConfigError> {
        match (self.rope_type.as_deref(), self.factor) {
            (Some("linear"), None) => {
                Err(ConfigError::Unsupported { feature: "rope_scaling.factor", got: "none".into() })
            }
            (Some("linear"), factor) => Ok(factor),
            _ => Ok(None),
        }
    }
}

#[derive(Default, Deserialize)]
#[expect(clippy::struct_field_names, reason = "the names of the file's keys")]
struct RawTokens {
    bos_token_id: Option<u32>,
    eos_token_id: Option<OneOrMany>,
    pad_token_id: Option<i64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl From<RawTokens> for DeclaredTokens {
    fn from(raw: RawTokens) -> Self {
        let eos = match raw.eos_token_id {
            None => Vec::new(),
            Some(OneOrMany::One(token)) => vec![token],
            Some(OneOrMany::Many(tokens)) => tokens,
        };
        // Some checkpoints write -1 for "none".
        let pad = raw.pad_token_id.and_then(|token| u32::try_from(token).ok());
        Self { bos: raw.bos_token_id, eos, pad }
    }
}

/// Reads the configuration files of a checkpoint directory.
pub fn read(directory: &Path) -> Result<Config, ConfigError> {
    let mut config = read_file(&directory.join("config.json"))?;
    let path = directory.join("generation_config.json");
    if path.exists() {
        let generation = DeclaredTokens::from(read_json::<RawTokens>(&path)?);
        let declared = &mut config.tokens;
        declared.bos = generation.bos.or(declared.bos);
        declared.pad = generation.pad.or(declared.pad);
        if !generation.eos.is_empty() {
            declared.eos = generation.eos;
        }
    }
    Ok(config)
}

/// Reads one `config.json`. The model is named after its directory.
pub fn read_file(path: &Path) -> Result<Config, ConfigError> {
    // First: other architectures may keep their dimensions elsewhere, and that would be no news.
    let Named { architectures } = read_json(path)?;
    let family = Family::find(&architectures.unwrap_or_default())?;
    let raw: RawConfig = read_json(path)?;
    let directory = path.parent().unwrap_or(Path::new(".")).canonicalize().unwrap_or_default();
    let name = directory.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned());
    check(raw, family, name)
}

fn check(raw: RawConfig, family: &Family, name: String) -> Result<Config, ConfigError> {
    let unsupported =
        |feature, got: &dyn ToString| ConfigError::Unsupported { feature, got: got.to_string() };
    // Lists of layers are made next.
    if raw.num_hidden_layers > LAYERS_MAX {
        let (name, max, got) = ("layers", LAYERS_MAX, raw.num_hidden_layers);
        return Err(ModelError::OutOfRange { name, max, got }.into());
    }
    let Family { architecture, tied, rope_theta, .. } = *family;
    let attention = family.attention(&raw.attention, raw.num_hidden_layers)?;
    if let Some(vision) = raw.vision_config {
        let got = vision.get("model_type").and_then(|kind| kind.as_str()).unwrap_or("one");
        return Err(unsupported("vision_config", &got));
    }
    if raw.mlp_bias == Some(true) {
        return Err(unsupported("mlp_bias", &true));
    }
    if let (Architecture::Llama, Said::Value(window)) = (architecture, raw.attention.sliding_window) {
        return Err(unsupported("sliding_window", &window));
    }
    // Gemma has a key of its own (`gemma.rs`).
    let is_gemma = matches!(architecture, Architecture::Gemma2 | Architecture::Gemma3);
    if let Some(activation) = raw.hidden_act.filter(|name| !is_gemma && name != "silu") {
        return Err(unsupported("hidden_act", &activation));
    }
    if let Some(quantized) = raw.quantization_config {
        let method = quantized.get("quant_method").and_then(|method| method.as_str()).unwrap_or("unknown");
        return Err(unsupported("quantization_config", &method));
    }
    let (rope, local_rope) = match RawRope::of_file(raw.rope_parameters, raw.rope_scaling)? {
        Some(RawRope { full_attention, sliding_attention, .. })
            if full_attention.is_some() || sliding_attention.is_some() =>
        {
            if architecture != Architecture::Gemma3 {
                return Err(unsupported("rope_parameters", &"one for each kind of layer"));
            }
            (full_attention.map(|rope| *rope), sliding_attention.map(|rope| *rope))
        }
        rope => (rope, None),
    };
    let gemma = gemma::describe(architecture, &raw.attention, raw.hidden_size, [&rope, &local_rope])?;
    let rope_theta = rope.as_ref().and_then(|rope| rope.rope_theta).or(raw.rope_theta).unwrap_or(rope_theta);
    let stretches = gemma.as_ref().is_some_and(|gemma| gemma.rope_stretch.is_some());
    let rope_scaling = rope.as_ref().filter(|_| !stretches).map(scaling).transpose()?.flatten();
    let heads = raw.num_attention_heads;
    let model = ModelConfig {
        architecture,
        name,
        hidden_size: raw.hidden_size,
        intermediate_size: raw.intermediate_size,
        layers: raw.num_hidden_layers,
        heads,
        kv_heads: raw.num_key_value_heads.unwrap_or(heads),
        head_dim: raw.head_dim.or(raw.hidden_size.checked_div(heads)).unwrap_or(0),
        vocab_size: raw.vocab_size,
        context: raw.max_position_embeddings,
        rope_theta,
        rms_norm_eps: raw.rms_norm_eps.unwrap_or(1e-6),
        tied: raw.tie_word_embeddings.unwrap_or(tied),
        rope_scaling,
        attention,
        gemma,
    };
    model.check()?;
    Ok(Config { model, tokens: raw.tokens.into() })
}

fn scaling(rope: &RawRope) -> Result<Option<RopeScaling>, ConfigError> {
    let missing = |feature| ConfigError::Unsupported { feature, got: "none".into() };
    match rope.rope_type.as_deref() {
        None | Some("default") => Ok(None),
        Some("llama3") => Ok(Some(RopeScaling {
            factor: rope.factor.ok_or(missing("rope_scaling.factor"))?,
            low_frequency_factor: rope.low_freq_factor.ok_or(missing("rope_scaling.low_freq_factor"))?,
            high_frequency_factor: rope.high_freq_factor.ok_or(missing("rope_scaling.high_freq_factor"))?,
            original_context: rope
                .original_max_position_embeddings
                .ok_or(missing("rope_scaling.original_max_position_embeddings"))?,
        })),
        Some(other) => Err(ConfigError::Unsupported { feature: "rope_scaling", got: other.into() }),
    }
}

/// The bytes of a configuration file.
pub(crate) fn read_bytes(path: &Path) -> Result<Vec<u8>, ConfigError> {
    read_bounded(path, CONFIG_BYTES_MAX).map_err(|source| ConfigError::Read { path: path.into(), source })
}

pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    serde_json::from_slice(&read_bytes(path)?)
        .map_err(|source| ConfigError::Syntax { path: path.into(), source })
}

/// Reads a plain file of at most `bytes_max` bytes.
pub(crate) fn read_bounded(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    // A pipe or a device would block or never end.
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::other("not a plain file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        return Err(io::Error::other(format!("longer than {bytes_max} bytes")));
    }
    Ok(bytes)
}
