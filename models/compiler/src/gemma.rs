//! What the configurations of Gemma 2 and 3 say beyond Llama's (`architecture.rs`), read as `transformers` reads it,
//! defaults included. `config.rs` has the rest, `llama.rs` builds the graphs.

use commonweal_package::{Architecture, Attention, Gemma, Window};
use half::{bf16, f16};
use serde::{Deserialize, Deserializer};

use crate::architecture::{RawAttention, declared_bias, window};
use crate::config::{ConfigError, RawRope};

/// The one activation of a Gemma: GELU, approximated by a hyperbolic tangent.
const ACTIVATION: &str = "gelu_pytorch_tanh";

/// The keys that only Gemma reads.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct RawGemma {
    hidden_activation: Option<String>,
    query_pre_attn_scalar: Option<f64>,
    /// Absent is the default, null is none.
    #[serde(default, deserialize_with = "given")]
    pub(crate) attn_logit_softcapping: Option<Option<f64>>,
    #[serde(default, deserialize_with = "given")]
    pub(crate) final_logit_softcapping: Option<Option<f64>>,
    rope_local_base_freq: Option<f64>,
    sliding_window_pattern: Option<usize>,
    use_bidirectional_attention: Option<bool>,
    torch_dtype: Option<String>,
    /// Newer name of `torch_dtype`.
    dtype: Option<String>,
}

/// Tells a key that is null from one that is not there.
fn given<'de, D: Deserializer<'de>>(value: D) -> Result<Option<Option<f64>>, D::Error> {
    Option::deserialize(value).map(Some)
}

fn unsupported(feature: &'static str, got: impl ToString) -> ConfigError {
    ConfigError::Unsupported { feature, got: got.to_string() }
}

/// Gemma 2: every second layer has a window, beginning with the first.
pub(crate) fn attention2(raw: &RawAttention, layers: usize) -> Result<Attention, ConfigError> {
    let local = (0..layers).step_by(2);
    Ok(Attention {
        bias: declared_bias(raw),
        window: Some(local_layers(raw, local)?),
        ..Attention::default()
    })
}

/// Gemma 3: all layers have a window but every sixth, or as `sliding_window_pattern` says; heads are normalized.
pub(crate) fn attention3(raw: &RawAttention, layers: usize) -> Result<Attention, ConfigError> {
    let pattern = raw.gemma.sliding_window_pattern.unwrap_or(6);
    if pattern == 0 {
        return Err(unsupported("sliding_window_pattern", pattern));
    }
    let local = (0..layers).filter(|layer| !(layer + 1).is_multiple_of(pattern));
    let window = Some(local_layers(raw, local)?);
    Ok(Attention { bias: declared_bias(raw), head_norm: true, window, ..Attention::default() })
}

/// The layers with a window, `usual` unless `layer_types` says otherwise.
fn local_layers(raw: &RawAttention, usual: impl Iterator<Item = usize>) -> Result<Window, ConfigError> {
    let tokens = raw.sliding_window.ok_or_else(|| unsupported("sliding_window", "none"))?;
    Ok(window(raw, usual).unwrap_or(Window { tokens, layers: Vec::new() }))
}

/// What the rest of a Gemma is; nothing for other architectures. `ropes` are the rotary positions of global and of local
/// layers, where the file has them.
pub(crate) fn describe(
    architecture: Architecture,
    raw: &RawGemma,
    hidden_size: usize,
    [rope, local_rope]: [&Option<RawRope>; 2],
) -> Result<Option<Gemma>, ConfigError> {
    let (score_cap, logit_cap, is_third) = match architecture {
        // Gemma 3's attention does not read the key, whatever it says.
        Architecture::Gemma3 => (None, raw.final_logit_softcapping.flatten(), true),
        Architecture::Gemma2 => {
            let cap = |key: Option<Option<f64>>, default| key.unwrap_or(Some(default));
            (cap(raw.attn_logit_softcapping, 50.0), cap(raw.final_logit_softcapping, 30.0), false)
        }
        _ => (None, None, false),
    };
    for (feature, asked, done) in [
        ("attn_logit_softcapping", raw.attn_logit_softcapping, score_cap),
        ("final_logit_softcapping", raw.final_logit_softcapping, logit_cap),
    ] {
        if let (Some(cap), None) = (asked.flatten(), done) {
            return Err(unsupported(feature, cap));
        }
    }
    if !matches!(architecture, Architecture::Gemma2 | Architecture::Gemma3) {
        return Ok(None);
    }
    if let Some(other) = raw.hidden_activation.as_deref().filter(|&name| name != ACTIVATION) {
        return Err(unsupported("hidden_activation", other));
    }
    if raw.use_bidirectional_attention == Some(true) {
        return Err(unsupported("use_bidirectional_attention", true));
    }
    Ok(Some(Gemma {
        embedding_scale: embedding_scale(hidden_size, raw.dtype.as_deref().or(raw.torch_dtype.as_deref()))?,
        query_scalar: raw.query_pre_attn_scalar.unwrap_or(256.0),
        score_cap,
        logit_cap,
        local_theta: is_third.then(|| local_theta(raw, local_rope.as_ref())).transpose()?,
        rope_stretch: rope.as_ref().map(RawRope::linear).transpose()?.flatten(),
    }))
}

/// The root of the hidden size in the checkpoint's own floats, as `transformers` multiplies by it.
fn embedding_scale(hidden_size: usize, floats: Option<&str>) -> Result<f64, ConfigError> {
    let exact = (hidden_size as f64).sqrt();
    match floats {
        None | Some("float32") => Ok(f64::from(exact as f32)),
        Some("bfloat16") => Ok(bf16::from_f64(exact).to_f64()),
        Some("float16") => Ok(f16::from_f64(exact).to_f64()),
        Some(other) => Err(unsupported("torch_dtype", other)),
    }
}

/// The rotary base of layers with a window.
fn local_theta(raw: &RawGemma, local: Option<&RawRope>) -> Result<f64, ConfigError> {
    if let Some(other) = local.and_then(|local| local.rope_type.as_deref()).filter(|&kind| kind != "default")
    {
        return Err(unsupported("rope_parameters.sliding_attention", other));
    }
    Ok(local.and_then(|local| local.rope_theta).or(raw.rope_local_base_freq).unwrap_or(10_000.0))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed test may panic")]
mod tests {
    use super::*;

    #[test]
    fn the_embeddings_scale_is_rounded_to_the_checkpoints_floats() {
        // transformers: "downcasts the below to bfloat16, causing sqrt(3072)=55.4256 to become 55.5".
        assert_eq!(embedding_scale(3072, Some("bfloat16")).unwrap().to_string(), "55.5");
        assert_eq!(embedding_scale(2304, Some("bfloat16")).unwrap().to_string(), "48");
        assert_eq!(embedding_scale(3072, Some("float16")).unwrap().to_string(), "55.4375");
        assert!((embedding_scale(3072, None).unwrap() - 55.425_625_84).abs() < 1e-5);
        assert!(embedding_scale(3072, Some("int8")).unwrap_err().to_string().contains("torch_dtype"));
    }
}
