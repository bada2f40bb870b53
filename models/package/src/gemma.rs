//! What Gemma 2 and 3 do that a Llama does not, beside the windows and norms of heads of `attention.rs`.
//! A part of `model.rs`; the compiler builds its graphs by it.

use serde::{Deserialize, Serialize};

use crate::model::{ModelError, positive};

/// What a Gemma does that a Llama does not: the `[model.gemma]` table of a manifest. Every Gemma also has a norm behind
/// each block beside the one before it, and GELU, approximated by a hyperbolic tangent, in place of SiLU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gemma {
    /// Factor of the embedding's rows: the root of the hidden size, rounded to the checkpoint's floats.
    pub embedding_scale: f64,
    /// Products of queries and keys are divided by the root of this, not of the width of a head.
    pub query_scalar: f64,
    /// A score `s` of the attention becomes `cap · tanh(s / cap)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score_cap: Option<f64>,
    /// A logit `l` becomes `cap · tanh(l / cap)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logit_cap: Option<f64>,
    /// Base of the rotary wavelengths in layers with a window, where it is another than `rope_theta`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_theta: Option<f64>,
    /// Rotary wavelengths of base `rope_theta` are this many times as long (linear scaling).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_stretch: Option<f64>,
}

impl Gemma {
    pub(crate) fn check(&self) -> Result<(), ModelError> {
        for (name, got) in [
            ("embedding_scale", Some(self.embedding_scale)),
            ("query_scalar", Some(self.query_scalar)),
            ("score_cap", self.score_cap),
            ("logit_cap", self.logit_cap),
            ("local_theta", self.local_theta),
            ("rope_stretch", self.rope_stretch),
        ] {
            // The graphs have it as a 32-bit float.
            got.map_or(Ok(()), |got| positive(name, f64::from(got as f32)))?;
        }
        Ok(())
    }
}
