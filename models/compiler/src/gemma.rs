//! What the configurations of Gemma 2 and 3 say beyond Llama's (`architecture.rs`), read as `transformers` reads it,
//! defaults included. `config.rs` has the rest, `llama.rs` builds the graphs.

use commonweal_package::{Architecture, Attention, Gemma};
use half::{bf16, f16};
use serde::Deserialize;

use crate::architecture::{RawAttention, declared_bias, window};
use crate::config::{ConfigError, RawRope};
use crate::said::Said;

/// The one activation of a Gemma: GELU, approximated by a hyperbolic tangent.
const ACTIVATION: &str = "gelu_pytorch_tanh";

/// The keys that only Gemma reads.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct RawGemma {
    hidden_activation: Option<String>,
    query_pre_attn_scalar: Option<f64>,
    #[serde(default)]
    attn_logit_softcapping: Said<f64>,
    #[serde(default)]
    final_logit_softcapping: Said<f64>,
    rope_local_base_freq: Option<f64>,
    sliding_window_pattern: Option<usize>,
    use_bidirectional_attention: Option<bool>,
    torch_dtype: Option<String>,
    /// Newer name of `torch_dtype`.
    dtype: Option<String>,
}

fn unsupported(feature: &'static str, got: &dyn ToString) -> ConfigError {
    ConfigError::Unsupported { feature, got: got.to_string() }
}

/// Gemma 2: every second layer has a window, beginning with the first.
pub(crate) fn attention2(raw: &RawAttention, layers: usize) -> Attention {
    let window = window(raw, None, (0..layers).step_by(2));
    Attention { bias: declared_bias(raw), window, ..Attention::default() }
}

/// Gemma 3: all layers have a window but every sixth, or as `sliding_window_pattern` says; heads are normalized.
pub(crate) fn attention3(raw: &RawAttention, layers: usize) -> Attention {
    let pattern = raw.gemma.sliding_window_pattern.unwrap_or(6);
    let window = window(raw, None, (0..layers).filter(|layer| !(layer + 1).is_multiple_of(pattern)));
    Attention { bias: declared_bias(raw), head_norm: true, window, ..Attention::default() }
}

/// What the rest of a Gemma is; nothing for other architectures. `ropes` are the rotary positions of global and of local
/// layers, where the file has them.
pub(crate) fn describe(
    architecture: Architecture,
    attention: &RawAttention,
    hidden_size: usize,
    [rope, local_rope]: [&Option<RawRope>; 2],
) -> Result<Option<Gemma>, ConfigError> {
    let raw = &attention.gemma;
    let (score_cap, logit_cap, is_third) = match architecture {
        // Gemma 3's attention does not read the key, whatever it says.
        Architecture::Gemma3 => (None, raw.final_logit_softcapping.or(None), true),
        Architecture::Gemma2 => {
            (raw.attn_logit_softcapping.or(Some(50.0)), raw.final_logit_softcapping.or(Some(30.0)), false)
        }
        _ => (None, None, false),
    };
    for (feature, asked, done) in [
        ("attn_logit_softcapping", raw.attn_logit_softcapping, score_cap),
        ("final_logit_softcapping", raw.final_logit_softcapping, logit_cap),
    ] {
        if let (Said::Value(cap), None) = (asked, done) {
            return Err(unsupported(feature, &cap));
        }
    }
    if !matches!(architecture, Architecture::Gemma2 | Architecture::Gemma3) {
        return Ok(None);
    }
    if attention.sliding_window.or(None).is_none() {
        return Err(unsupported("sliding_window", &"none"));
    }
    if raw.sliding_window_pattern == Some(0) {
        return Err(unsupported("sliding_window_pattern", &0));
    }
    if let Some(other) = raw.hidden_activation.as_deref().filter(|&name| name != ACTIVATION) {
        return Err(unsupported("hidden_activation", &other));
    }
    if raw.use_bidirectional_attention == Some(true) {
        return Err(unsupported("use_bidirectional_attention", &true));
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
        Some(other) => Err(unsupported("torch_dtype", &other)),
    }
}

/// The rotary base of layers with a window.
fn local_theta(raw: &RawGemma, local: Option<&RawRope>) -> Result<f64, ConfigError> {
    if let Some(other) = local.and_then(|local| local.rope_type.as_deref()).filter(|&kind| kind != "default")
    {
        return Err(unsupported("rope_parameters.sliding_attention", &other));
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
