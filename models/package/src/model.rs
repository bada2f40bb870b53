//! The facts of a model that every stage needs: its dimensions, its quantization, its special tokens.
//! The compiler reads them from a checkpoint, the manifest (`manifest.rs`) carries them, the runtime obeys them.

use serde::{Deserialize, Serialize};

use crate::attention::{Attention, is_default};
use crate::gemma::Gemma;

/// The largest value accepted for any one dimension, so that products of two or three fit in a `usize`:
/// (2^20)^3 = 2^60.
pub const DIMENSION_MAX: usize = 1 << 20;

/// The largest number of layers accepted.
pub const LAYERS_MAX: usize = 1024;

/// The family of networks that a package holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// Llama: RMS norm before each block, rotary positions (rotate-half), grouped queries, gated SiLU.
    Llama,
    /// Mistral: a Llama whose layers see only the nearest tokens.
    Mistral,
    /// Qwen 2 and 2.5: a Llama whose queries, keys and values have a bias.
    Qwen2,
    /// Qwen 3: a Llama whose queries and keys are normalized head by head.
    Qwen3,
    /// SmolLM 3: a Llama some of whose layers have no positions.
    SmolLm3,
    /// Gemma 2: windows in every second layer, capped scores and logits, and what [`Gemma`] says.
    Gemma2,
    /// Gemma 3, text only: windows in most layers, with rotary wavelengths of their own, norms of heads, and what
    /// [`Gemma`] says.
    Gemma3,
}

/// The dimensions and constants of a model, the `[model]` table of a manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// The family of networks.
    pub architecture: Architecture,
    /// A name for people; it is not part of the base's identity.
    pub name: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated layer inside each block.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; a multiple of 16, for the runtime's rotary attention.
    pub head_dim: usize,
    /// Number of tokens, rows of the embedding.
    pub vocab_size: usize,
    /// Longest sequence in tokens.
    pub context: usize,
    /// Base of the rotary wavelengths.
    pub rope_theta: f64,
    /// Added to the mean square before its root.
    pub rms_norm_eps: f64,
    /// Whether the head uses the embedding's matrix.
    pub tied: bool,
    /// How the rotary wavelengths are stretched beyond the original context, if they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// How the attention differs from Llama's.
    #[serde(default, skip_serializing_if = "is_default")]
    pub attention: Attention,
    /// What a Gemma does besides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gemma: Option<Gemma>,
}

/// Llama 3's stretching of long rotary wavelengths (`rope_type = "llama3"` in a Hugging Face configuration).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeScaling {
    /// How much the longest wavelengths are stretched.
    pub factor: f64,
    /// Wavelengths longer than `original_context / low_frequency_factor` are stretched in full.
    pub low_frequency_factor: f64,
    /// Wavelengths shorter than `original_context / high_frequency_factor` are left alone.
    pub high_frequency_factor: f64,
    /// The context length before stretching.
    pub original_context: usize,
}

/// A model's dimensions that cannot be true.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ModelError {
    /// A dimension is zero or too large.
    #[error("{name} must be between 1 and {max}, got {got}")]
    OutOfRange {
        /// The field.
        name: &'static str,
        /// The largest accepted value.
        max: usize,
        /// What the file says.
        got: usize,
    },
    /// A constant is not a positive number.
    #[error("{name} must be a positive number, got {got}")]
    NotPositive {
        /// The field.
        name: &'static str,
        /// What the file says.
        got: f64,
    },
    /// The query heads do not share the key and value heads evenly.
    #[error("heads must be a multiple of kv_heads, got {heads} and {kv_heads}")]
    Heads {
        /// Query heads.
        heads: usize,
        /// Key and value heads.
        kv_heads: usize,
    },
    /// The runtime's rotary attention needs heads of a multiple of sixteen.
    #[error("head_dim must be a multiple of 16, got {got}")]
    HeadDim {
        /// What the file says.
        got: usize,
    },
    /// A list of layers names one that is not there, or is not ascending.
    #[error("layers of {name} must be ascending and below {layers}, got {got:?}")]
    Layers {
        /// The list.
        name: &'static str,
        /// Number of layers.
        layers: usize,
        /// What the file says.
        got: Vec<usize>,
    },
    /// Llama 3's stretching needs its low-frequency factor below its high-frequency factor.
    #[error("rope scaling needs low_frequency_factor < high_frequency_factor, got {low} and {high}")]
    RopeFactors {
        /// The low-frequency factor.
        low: f64,
        /// The high-frequency factor.
        high: f64,
    },
    /// A block of the quantization does not divide a matrix's rows.
    #[error("block size must be 32, 64 or 128, got {got}")]
    BlockSize {
        /// What the file says.
        got: usize,
    },
    /// A special token lies outside the vocabulary.
    #[error("{name} token must be below vocab_size {vocab_size}, got {got}")]
    Token {
        /// Which token.
        name: &'static str,
        /// Rows of the embedding.
        vocab_size: usize,
        /// What the file says.
        got: u32,
    },
    /// Generation would never stop.
    #[error("at least one end-of-sequence token is needed, got none")]
    NoEos,
}

impl ModelConfig {
    /// Checks that the dimensions are possible and small enough to compute with.
    pub fn check(&self) -> Result<(), ModelError> {
        for (name, got, max) in [
            ("hidden_size", self.hidden_size, DIMENSION_MAX),
            ("intermediate_size", self.intermediate_size, DIMENSION_MAX),
            ("layers", self.layers, LAYERS_MAX),
            ("heads", self.heads, DIMENSION_MAX),
            ("kv_heads", self.kv_heads, DIMENSION_MAX),
            ("head_dim", self.head_dim, DIMENSION_MAX),
            ("heads x head_dim", self.heads.saturating_mul(self.head_dim), DIMENSION_MAX),
            ("vocab_size", self.vocab_size, DIMENSION_MAX),
            ("context", self.context, DIMENSION_MAX),
        ] {
            if got == 0 || got > max {
                return Err(ModelError::OutOfRange { name, max, got });
            }
        }
        for (name, got) in [("rope_theta", self.rope_theta), ("rms_norm_eps", self.rms_norm_eps)] {
            positive(name, got)?;
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(ModelError::Heads { heads: self.heads, kv_heads: self.kv_heads });
        }
        if !self.head_dim.is_multiple_of(16) {
            return Err(ModelError::HeadDim { got: self.head_dim });
        }
        self.attention.check(self.layers)?;
        self.gemma.as_ref().map_or(Ok(()), Gemma::check)?;
        self.rope_scaling.as_ref().map_or(Ok(()), RopeScaling::check)?;
        let local = self.local_rotary_frequencies().unwrap_or_default();
        for frequency in self.rotary_frequencies().into_iter().chain(local) {
            // The graphs have it as a 32-bit float.
            positive("rotary frequency", f64::from(frequency as f32))?;
        }
        Ok(())
    }

    /// Rows of the query matrix: `heads · head_dim`.
    pub fn query_size(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Rows of the key matrix, and of the value matrix: `kv_heads · head_dim`.
    pub fn kv_size(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Rows of the fused query, key and value matrix.
    pub fn qkv_size(&self) -> usize {
        self.query_size() + 2 * self.kv_size()
    }

    /// The rotary angle that each pair of components turns by per position, `head_dim / 2` values in radians.
    /// With `rope_scaling` they are Llama 3's (Hugging Face `modeling_rope_utils._compute_llama3_parameters`).
    pub fn rotary_frequencies(&self) -> Vec<f64> {
        let plain = self.frequencies(self.rope_theta);
        let stretch = self.gemma.as_ref().and_then(|gemma| gemma.rope_stretch);
        match (self.rope_scaling, stretch) {
            (Some(scaling), _) => plain.map(|frequency| scaling.stretch(frequency)).collect(),
            (None, Some(stretch)) => plain.map(|frequency| frequency / stretch).collect(),
            (None, None) => plain.collect(),
        }
    }

    /// The same for layers with a window, where those have a base of their own.
    pub fn local_rotary_frequencies(&self) -> Option<Vec<f64>> {
        let theta = self.gemma.as_ref()?.local_theta?;
        Some(self.frequencies(theta).collect())
    }

    fn frequencies(&self, theta: f64) -> impl Iterator<Item = f64> {
        let head_dim = self.head_dim;
        (0..head_dim / 2).map(move |pair| libm::pow(theta, -((2 * pair) as f64) / head_dim as f64))
    }

    /// The factor of the products of queries and keys.
    pub fn score_scale(&self) -> f32 {
        match &self.gemma {
            None => (self.head_dim as f32).sqrt().recip(),
            Some(gemma) => gemma.query_scalar.sqrt().recip() as f32,
        }
    }

    /// The cap of the scores of the attention.
    pub fn score_cap(&self) -> Option<f32> {
        self.gemma.as_ref()?.score_cap.map(|cap| cap as f32)
    }

    /// The cap of the logits.
    pub fn logit_cap(&self) -> Option<f32> {
        self.gemma.as_ref()?.logit_cap.map(|cap| cap as f32)
    }
}

impl RopeScaling {
    fn check(&self) -> Result<(), ModelError> {
        for (name, got) in [
            ("rope scaling factor", self.factor),
            ("low_frequency_factor", self.low_frequency_factor),
            ("high_frequency_factor", self.high_frequency_factor),
        ] {
            positive(name, got)?;
        }
        if self.original_context == 0 || self.original_context > DIMENSION_MAX {
            let (name, got) = ("original_context", self.original_context);
            return Err(ModelError::OutOfRange { name, max: DIMENSION_MAX, got });
        }
        if self.low_frequency_factor >= self.high_frequency_factor {
            let (low, high) = (self.low_frequency_factor, self.high_frequency_factor);
            return Err(ModelError::RopeFactors { low, high });
        }
        Ok(())
    }

    fn stretch(&self, frequency: f64) -> f64 {
        let wavelength = 2.0 * std::f64::consts::PI / frequency;
        let turns = self.original_context as f64 / wavelength;
        if turns < self.low_frequency_factor {
            frequency / self.factor
        } else if turns > self.high_frequency_factor {
            frequency
        } else {
            let smooth = (turns - self.low_frequency_factor)
                / (self.high_frequency_factor - self.low_frequency_factor);
            (1.0 - smooth) * frequency / self.factor + smooth * frequency
        }
    }
}

pub(crate) fn positive(name: &'static str, got: f64) -> Result<(), ModelError> {
    if got.is_finite() && got > 0.0 { Ok(()) } else { Err(ModelError::NotPositive { name, got }) }
}

/// Bits of one stored weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub enum Bits {
    /// Symmetric 4-bit blocks, zero point 8.
    Four,
    /// Symmetric 8-bit blocks, zero point 128.
    Eight,
    /// 32-bit floats, not quantized.
    Full,
}

impl Bits {
    /// The number of bits: 4, 8 or 32.
    pub fn count(self) -> usize {
        match self {
            Self::Four => 4,
            Self::Eight => 8,
            Self::Full => 32,
        }
    }
}

/// A number of bits that no package uses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("bits must be 4, 8 or 32, got {0}")]
pub struct BitsError(u8);

impl TryFrom<u8> for Bits {
    type Error = BitsError;

    fn try_from(bits: u8) -> Result<Self, BitsError> {
        match bits {
            4 => Ok(Self::Four),
            8 => Ok(Self::Eight),
            32 => Ok(Self::Full),
            other => Err(BitsError(other)),
        }
    }
}

impl From<Bits> for u8 {
    fn from(bits: Bits) -> u8 {
        bits.count() as u8
    }
}

/// How exactly the inference kernels multiply by quantized weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accuracy {
    /// Activations are rounded to 8 bits inside the kernel (`accuracy_level` 4); 2.5 times faster.
    Fast,
    /// Activations stay 32-bit floats (`accuracy_level` 0).
    Exact,
}

/// How the frozen weights are stored, the `[quantization]` table of a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantization {
    /// Bits of one weight.
    pub bits: Bits,
    /// Weights that share one scale: 32, 64 or 128. Unused at 32 bits.
    pub block_size: usize,
    /// How exactly the inference kernels multiply.
    pub accuracy: Accuracy,
}

impl Quantization {
    /// Checks the block size.
    pub fn check(&self) -> Result<(), ModelError> {
        match self.block_size {
            32 | 64 | 128 => Ok(()),
            got => Err(ModelError::BlockSize { got }),
        }
    }
}

/// The special tokens that generation and batching need, the `[tokens]` table of a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tokens {
    /// Begins a sequence, where the model has such a token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bos: Option<u32>,
    /// Any of these ends a generation.
    pub eos: Vec<u32>,
    /// Fills the end of shorter rows of a batch.
    pub pad: u32,
}

impl Tokens {
    /// Checks that there is an end and that every token is in the vocabulary.
    pub fn check(&self, vocab_size: usize) -> Result<(), ModelError> {
        if self.eos.is_empty() {
            return Err(ModelError::NoEos);
        }
        let named = self.bos.iter().map(|&token| ("bos", token));
        let named = named.chain(self.eos.iter().map(|&token| ("eos", token))).chain([("pad", self.pad)]);
        for (name, got) in named {
            if got as usize >= vocab_size {
                return Err(ModelError::Token { name, vocab_size, got });
            }
        }
        Ok(())
    }
}
