//! BERT and RoBERTa: learned positions, a norm after each block, the first token's row through a dense layer with a
//! hyperbolic tangent. They differ in where positions begin and in the names of their tensors.

use commonweal_package::{EncoderConfig, ModelError};
use serde::Deserialize;
use serde_json::Value;

use super::config::{Activation, Common, epsilon, keys, only, unsupported};
use super::parts::{Entries, Parts};
use super::{Described, Network};
use crate::architecture::Source;
use crate::config::ConfigError;
use crate::graph::{GraphError, ValueId};

/// A BERT's own facts.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Bert {
    names: Names,
    /// Row of the first position in the table.
    position_start: usize,
    position_rows: usize,
    activation: Activation,
    epsilon: f32,
}

/// Where the checkpoint keeps what the two families name differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Names {
    body: &'static str,
    /// The dense layer behind the first token.
    pooler: &'static str,
    classifier: &'static str,
}

const BERT: Names = Names { body: "bert", pooler: "bert.pooler.dense", classifier: "classifier" };
const ROBERTA: Names =
    Names { body: "roberta", pooler: "classifier.dense", classifier: "classifier.out_proj" };

#[derive(Deserialize)]
struct RawBert {
    hidden_act: Option<String>,
    layer_norm_eps: Option<f64>,
    type_vocab_size: Option<usize>,
    position_embedding_type: Option<String>,
    is_decoder: Option<bool>,
    add_cross_attention: Option<bool>,
}

pub(super) fn describe(value: &Value, common: &Common) -> Result<Described, ConfigError> {
    read(value, common, BERT, 0, 2)
}

/// RoBERTa counts positions from behind the number of its padding token.
pub(super) fn describe_roberta(value: &Value, common: &Common) -> Result<Described, ConfigError> {
    read(value, common, ROBERTA, common.pad as usize + 1, 1)
}

fn read(
    value: &Value,
    common: &Common,
    names: Names,
    position_start: usize,
    usual_types: usize,
) -> Result<Described, ConfigError> {
    let raw: RawBert = keys(value)?;
    if let Some(kind) = raw.position_embedding_type.filter(|kind| kind != "absolute") {
        return Err(unsupported("position_embedding_type", kind));
    }
    only("is_decoder", raw.is_decoder, &false)?;
    only("add_cross_attention", raw.add_cross_attention, &false)?;
    let bert = Bert {
        names,
        position_start,
        position_rows: common.positions,
        activation: Activation::read("hidden_act", raw.hidden_act.as_deref())?,
        epsilon: epsilon("layer_norm_eps", raw.layer_norm_eps.unwrap_or(1e-12))?,
    };
    let token_types = raw.type_vocab_size.unwrap_or(usual_types);
    if token_types == 0 {
        return Err(ModelError::OutOfRange { name: "type_vocab_size", max: usual_types, got: 0 }.into());
    }
    // None left is refused with the other sizes.
    let context = common.positions.saturating_sub(position_start);
    Ok(Described { network: Network::Bert(bert), context, token_types })
}

impl Bert {
    pub(super) fn tensors(&self, encoder: &EncoderConfig) -> Vec<(String, Source)> {
        let EncoderConfig { hidden_size: hidden, intermediate_size: inner, .. } = *encoder;
        let Names { body, pooler, classifier } = self.names;
        let mut list = Entries::default();
        list.words(&format!("{body}.embeddings.word_embeddings.weight"), encoder);
        let positions = format!("{body}.embeddings.position_embeddings.weight");
        list.plain("positions", &positions, self.position_rows, hidden);
        let types = format!("{body}.embeddings.token_type_embeddings.weight");
        list.plain("types", &types, encoder.token_types, hidden);
        list.norm("embed_norm", &format!("{body}.embeddings.LayerNorm"), hidden, true);
        for layer in 0..encoder.layers {
            let ours = |name: &str| format!("layers.{layer}.{name}");
            let theirs = |name: &str| format!("{body}.encoder.layer.{layer}.{name}");
            let qkv =
                ["query", "key", "value"].map(|part| (theirs(&format!("attention.self.{part}")), hidden));
            list.linear(&ours("qkv"), &qkv, hidden, true);
            list.linear(&ours("o"), &[(theirs("attention.output.dense"), hidden)], hidden, true);
            list.norm(&ours("attn_norm"), &theirs("attention.output.LayerNorm"), hidden, true);
            list.linear(&ours("up"), &[(theirs("intermediate.dense"), inner)], hidden, true);
            list.linear(&ours("down"), &[(theirs("output.dense"), hidden)], inner, true);
            list.norm(&ours("mlp_norm"), &theirs("output.LayerNorm"), hidden, true);
        }
        list.linear("pooler", &[(pooler.into(), hidden)], hidden, true);
        list.classifier(classifier, encoder.labels.len(), hidden);
        list.0
    }

    pub(super) fn logits(&self, parts: &mut Parts<'_>) -> Result<ValueId, GraphError> {
        let EncoderConfig { hidden_size: hidden, intermediate_size: inner, heads, layers, .. } =
            *parts.encoder;
        let scale = ((hidden / heads) as f32).sqrt().recip();
        parts.graph.enter("embed", 0);
        let words = parts.words()?;
        let typed = parts.plus_types(words)?;
        let placed = parts.plus_positions(typed, self.position_start, self.position_rows)?;
        let mut x = parts.norm("embed_norm", self.epsilon, true, placed)?;
        let bias = parts.padding()?;
        for layer in 0..layers {
            parts.graph.enter(format!("layers.{layer}"), layer);
            let ours = |name: &str| format!("layers.{layer}.{name}");
            let qkv = parts.linear(&ours("qkv"), (3 * hidden, hidden), true, x)?;
            let qkv = parts.thirds(qkv)?;
            let context = parts.attention(qkv, bias, scale)?;
            let attended = parts.linear(&ours("o"), (hidden, hidden), true, context)?;
            let sum = parts.graph.plus(attended, x)?;
            x = parts.norm(&ours("attn_norm"), self.epsilon, true, sum)?;
            let wide = parts.linear(&ours("up"), (inner, hidden), true, x)?;
            let active = parts.graph.add(self.activation.op(), &[wide])?;
            let narrow = parts.linear(&ours("down"), (hidden, inner), true, active)?;
            let sum = parts.graph.plus(narrow, x)?;
            x = parts.norm(&ours("mlp_norm"), self.epsilon, true, sum)?;
        }
        parts.graph.enter("head", layers);
        let first = parts.first(x)?;
        let pooled = parts.linear("pooler", (hidden, hidden), true, first)?;
        let pooled = parts.graph.add(Activation::Tanh.op(), &[pooled])?;
        parts.classifier(pooled)
    }
}
