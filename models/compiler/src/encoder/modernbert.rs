//! ModernBERT: rotary positions, a norm before each block, gated feed-forward layers, and attention that is global in
//! every few layers and local in the others, each with its own rotary wavelengths.

use commonweal_package::{DIMENSION_MAX, EncoderConfig, ModelError};
use serde::Deserialize;
use serde_json::Value;

use super::config::{Activation, Common, epsilon, keys, unsupported};
use super::parts::{Entries, Parts};
use super::{Described, Network};
use crate::architecture::{FULL, SLIDING, Source};
use crate::config::{ConfigError, RawRope};
use crate::graph::{Constant, GraphError, TensorType, ValueId};
use crate::op::Op;
use crate::said::Said;

/// A ModernBERT's own facts.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ModernBert {
    global_theta: f64,
    local_theta: f64,
    /// For each layer whether it sees every token.
    global: Vec<bool>,
    /// Tokens on either side that the other layers see.
    local_reach: usize,
    activation: Activation,
    head_activation: Activation,
    epsilon: f32,
    norm_bias: bool,
    attention_bias: bool,
    mlp_bias: bool,
    head_bias: bool,
    pooling: Pooling,
}

/// Which of a row's tokens are classified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pooling {
    First,
    Mean,
}

#[derive(Deserialize)]
struct RawModernBert {
    hidden_activation: Option<String>,
    norm_eps: Option<f64>,
    norm_bias: Option<bool>,
    global_rope_theta: Option<f64>,
    /// Null is the base of the layers that see every token.
    #[serde(default)]
    local_rope_theta: Said<f64>,
    global_attn_every_n_layers: Option<usize>,
    local_attention: Option<usize>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    classifier_pooling: Option<String>,
    classifier_bias: Option<bool>,
    classifier_activation: Option<String>,
    rope_scaling: Option<Value>,
    /// Of `transformers` 5, in place of both bases and of `global_attn_every_n_layers`.
    rope_parameters: Option<RawRope>,
    layer_types: Option<Vec<String>>,
}

pub(super) fn describe(value: &Value, common: &Common) -> Result<Described, ConfigError> {
    let raw: RawModernBert = keys(value)?;
    if let Some(got) = raw.rope_scaling {
        return Err(unsupported("rope_scaling", got.to_string().chars().take(200).collect::<String>()));
    }
    let head_dim = common.hidden_size / common.heads;
    if !head_dim.is_multiple_of(16) {
        return Err(ModelError::HeadDim { got: head_dim }.into());
    }
    let [global_base, local_base] = raw.rope_parameters.map_or(Ok([None; 2]), RawRope::plain_bases)?;
    let global_theta = global_base.or(raw.global_rope_theta).unwrap_or(160_000.0);
    let local_theta = local_base.or(raw.local_rope_theta.or(Some(10_000.0))).unwrap_or(global_theta);
    for (name, got) in [("global_rope_theta", global_theta), ("local_rope_theta", local_theta)] {
        if !(got.is_finite() && got > 0.0) {
            return Err(ModelError::NotPositive { name, got }.into());
        }
    }
    let local_attention = raw.local_attention.unwrap_or(128);
    let global_every = raw.global_attn_every_n_layers.unwrap_or(3);
    for (name, got) in [("local_attention", local_attention), ("global_attn_every_n_layers", global_every)] {
        if got == 0 || got > DIMENSION_MAX {
            return Err(ModelError::OutOfRange { name, max: DIMENSION_MAX, got }.into());
        }
    }
    let global = match raw.layer_types {
        None => (0..common.layers).map(|layer| layer.is_multiple_of(global_every)).collect(),
        Some(types) if types.len() != common.layers => {
            let got = format!("{} for {} layers", types.len(), common.layers);
            return Err(unsupported("layer_types", got));
        }
        Some(types) => types.into_iter().map(is_global).collect::<Result<_, _>>()?,
    };
    let pooling = match raw.classifier_pooling.as_deref() {
        None | Some("cls") => Pooling::First,
        Some("mean") => Pooling::Mean,
        Some(other) => return Err(unsupported("classifier_pooling", other)),
    };
    let modern = ModernBert {
        global_theta,
        local_theta,
        global,
        local_reach: local_attention / 2,
        activation: Activation::read("hidden_activation", raw.hidden_activation.as_deref())?,
        head_activation: Activation::read("classifier_activation", raw.classifier_activation.as_deref())?,
        epsilon: epsilon("norm_eps", raw.norm_eps.unwrap_or(1e-5))?,
        norm_bias: raw.norm_bias == Some(true),
        attention_bias: raw.attention_bias == Some(true),
        mlp_bias: raw.mlp_bias == Some(true),
        head_bias: raw.classifier_bias == Some(true),
        pooling,
    };
    Ok(Described { network: Network::ModernBert(modern), context: common.positions, token_types: 0 })
}

fn is_global(kind: String) -> Result<bool, ConfigError> {
    match kind.as_str() {
        FULL => Ok(true),
        SLIDING => Ok(false),
        _ => Err(unsupported("layer_types", kind)),
    }
}

/// The rotary tables of one base.
#[derive(Clone, Copy)]
struct Tables {
    cosines: ValueId,
    sines: ValueId,
}

impl ModernBert {
    pub(super) fn tensors(&self, encoder: &EncoderConfig) -> Vec<(String, Source)> {
        let EncoderConfig { hidden_size: hidden, intermediate_size: inner, heads, context, .. } = *encoder;
        let mut list = Entries::default();
        list.words("model.embeddings.tok_embeddings.weight", encoder);
        for (name, theta) in [("global", self.global_theta), ("local", self.local_theta)] {
            let frequencies = frequencies(hidden / heads, theta);
            for (function, of) in [("cos", libm::cos as fn(f64) -> f64), ("sin", libm::sin)] {
                list.0.push((
                    format!("rope.{name}.{function}"),
                    Source::Rotary(of, context, frequencies.clone()),
                ));
            }
        }
        list.norm("embed_norm", "model.embeddings.norm", hidden, self.norm_bias);
        for layer in 0..encoder.layers {
            let ours = |name: &str| format!("layers.{layer}.{name}");
            let theirs = |name: &str| format!("model.layers.{layer}.{name}");
            if layer > 0 {
                list.norm(&ours("attn_norm"), &theirs("attn_norm"), hidden, self.norm_bias);
            }
            list.linear(&ours("qkv"), &[(theirs("attn.Wqkv"), 3 * hidden)], hidden, self.attention_bias);
            list.linear(&ours("o"), &[(theirs("attn.Wo"), hidden)], hidden, self.attention_bias);
            list.norm(&ours("mlp_norm"), &theirs("mlp_norm"), hidden, self.norm_bias);
            list.linear(&ours("gate_up"), &[(theirs("mlp.Wi"), 2 * inner)], hidden, self.mlp_bias);
            list.linear(&ours("down"), &[(theirs("mlp.Wo"), hidden)], inner, self.mlp_bias);
        }
        list.norm("norm", "model.final_norm", hidden, self.norm_bias);
        list.linear("head", &[("head.dense".into(), hidden)], hidden, self.head_bias);
        list.norm("head_norm", "head.norm", hidden, self.norm_bias);
        list.classifier("classifier", encoder.labels.len(), hidden);
        list.0
    }

    pub(super) fn logits(&self, parts: &mut Parts<'_>) -> Result<ValueId, GraphError> {
        let EncoderConfig { hidden_size: hidden, layers, .. } = *parts.encoder;
        parts.graph.enter("embed", 0);
        let words = parts.words()?;
        let mut x = parts.norm("embed_norm", self.epsilon, self.norm_bias, words)?;
        let everywhere = parts.padding()?;
        let near = parts.within(self.local_reach, everywhere)?;
        let (global, local) = (tables(parts, "global")?, tables(parts, "local")?);
        for layer in 0..layers {
            parts.graph.enter(format!("layers.{layer}"), layer);
            let (tables, bias) = if self.global[layer] { (global, everywhere) } else { (local, near) };
            let attended = self.attention(parts, layer, tables, bias, x)?;
            x = parts.graph.plus(x, attended)?;
            let fed = self.feed_forward(parts, layer, x)?;
            x = parts.graph.plus(x, fed)?;
        }
        parts.graph.enter("head", layers);
        let x = parts.norm("norm", self.epsilon, self.norm_bias, x)?;
        let pooled = match self.pooling {
            Pooling::First => parts.first(x)?,
            Pooling::Mean => parts.mean(x)?,
        };
        let dense = parts.linear("head", (hidden, hidden), self.head_bias, pooled)?;
        let active = parts.graph.add(self.head_activation.op(), &[dense])?;
        let normed = parts.norm("head_norm", self.epsilon, self.norm_bias, active)?;
        parts.classifier(normed)
    }

    fn attention(
        &self,
        parts: &mut Parts<'_>,
        layer: usize,
        tables: Tables,
        bias: ValueId,
        x: ValueId,
    ) -> Result<ValueId, GraphError> {
        let EncoderConfig { hidden_size: hidden, heads, .. } = *parts.encoder;
        let name = |part: &str| format!("layers.{layer}.{part}");
        // The first layer's norm would repeat that of the embedding.
        let normed =
            if layer == 0 { x } else { parts.norm(&name("attn_norm"), self.epsilon, self.norm_bias, x)? };
        let qkv = parts.linear(&name("qkv"), (3 * hidden, hidden), self.attention_bias, normed)?;
        let [query, key, value] = parts.thirds(qkv)?;
        let start = parts.graph.constant(Constant::I64(vec![0]), [1])?;
        let mut rotate =
            |x| parts.graph.add(Op::RotaryEmbedding { heads }, &[x, start, tables.cosines, tables.sines]);
        let (query, key) = (rotate(query)?, rotate(key)?);
        let scale = ((hidden / heads) as f32).sqrt().recip();
        let context = parts.attention([query, key, value], bias, scale)?;
        parts.linear(&name("o"), (hidden, hidden), self.attention_bias, context)
    }

    fn feed_forward(&self, parts: &mut Parts<'_>, layer: usize, x: ValueId) -> Result<ValueId, GraphError> {
        let EncoderConfig { hidden_size: hidden, intermediate_size: inner, .. } = *parts.encoder;
        let name = |part: &str| format!("layers.{layer}.{part}");
        let normed = parts.norm(&name("mlp_norm"), self.epsilon, self.norm_bias, x)?;
        let fused = parts.linear(&name("gate_up"), (2 * inner, hidden), self.mlp_bias, normed)?;
        let sizes = vec![inner.into(); 2];
        let halves = parts.graph.add_many(Op::Split { axis: 2, sizes }, &[fused])?;
        let active = parts.graph.add(self.activation.op(), &[halves[0]])?;
        let gated = parts.graph.times(active, halves[1])?;
        parts.linear(&name("down"), (hidden, inner), self.mlp_bias, gated)
    }
}

fn tables(parts: &mut Parts<'_>, name: &str) -> Result<Tables, GraphError> {
    let EncoderConfig { hidden_size, heads, context, .. } = *parts.encoder;
    let kind = TensorType::f32([context, hidden_size / heads / 2]);
    let mut table = |function: &str| {
        let name = format!("rope.{name}.{function}");
        parts.graph.weight(name.clone(), name, kind.clone())
    };
    Ok(Tables { cosines: table("cos")?, sines: table("sin")? })
}

/// The angle that each pair of a head turns by per position.
fn frequencies(head_dim: usize, theta: f64) -> Vec<f64> {
    (0..head_dim / 2).map(|pair| libm::pow(theta, -((2 * pair) as f64) / head_dim as f64)).collect()
}
