//! DeBERTa 2 and 3 (He et al., arXiv 2006.03654 and 2111.09543): scores of contents are joined by scores of contents
//! with relative positions, "c2p" for the query's content and "p2c" for the key's. Distances fall into buckets, one each
//! when near and logarithmic when far.

use commonweal_package::{EncoderConfig, ModelError};
use serde::Deserialize;
use serde_json::Value;

use super::config::{Activation, Common, epsilon, keys, only, unsupported};
use super::parts::{Entries, Parts, batch, time};
use super::{Described, Network};
use crate::architecture::Source;
use crate::config::ConfigError;
use crate::graph::{Constant, ElementType, GraphError, ValueId};
use crate::op::Op;

/// Longest context: the graph holds the bucket of each distance, 1 MB of integers at this length.
const CONTEXT_MAX: usize = 1 << 16;

/// A DeBERTa's own facts.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Deberta {
    /// Whether the query's content meets the relative position.
    content_to_position: bool,
    /// Whether the key's content does.
    position_to_content: bool,
    /// Whether positions go through the projections of contents rather than their own.
    shared: bool,
    buckets: Buckets,
    norm_positions: bool,
    /// Whether positions are also added to the words, BERT's way.
    absolute: bool,
    position_rows: usize,
    activation: Activation,
    pooler_activation: Activation,
    epsilon: f32,
}

/// How distances fall into the rows of the table of relative positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Buckets {
    /// Buckets on either side, logarithmic from the half of them on; without, each distance has its own.
    logarithmic: Option<usize>,
    /// The distance at which the last bucket begins.
    furthest: usize,
}

impl Buckets {
    /// Half the rows of the table of relative positions: the row of distance zero.
    fn span(self) -> usize {
        self.logarithmic.unwrap_or(self.furthest)
    }

    /// The row for a distance (`make_log_bucket_position` of `transformers`, in 32-bit floats as there).
    fn row(self, distance: i64) -> i64 {
        let span = self.span() as i64;
        let near = self.logarithmic.map_or(i64::MAX, |buckets| (buckets / 2) as i64);
        let bucket = if distance.abs() <= near {
            distance
        } else {
            let part = |x: f32| libm::logf(x / near as f32);
            let share = part(distance.abs() as f32) / part((self.furthest - 1) as f32);
            let beyond = libm::ceilf(share * (near - 1) as f32) as i64;
            distance.signum() * (near + beyond)
        };
        (bucket + span).clamp(0, 2 * span - 1)
    }
}

#[derive(Deserialize)]
struct RawDeberta {
    hidden_act: Option<String>,
    layer_norm_eps: Option<f64>,
    type_vocab_size: Option<usize>,
    relative_attention: Option<bool>,
    max_relative_positions: Option<i64>,
    position_buckets: Option<i64>,
    pos_att_type: Option<OneOrMany>,
    share_att_key: Option<bool>,
    norm_rel_ebd: Option<String>,
    position_biased_input: Option<bool>,
    embedding_size: Option<usize>,
    attention_head_size: Option<usize>,
    conv_kernel_size: Option<usize>,
    pooler_hidden_size: Option<usize>,
    pooler_hidden_act: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

pub(super) fn describe(value: &Value, common: &Common) -> Result<Described, ConfigError> {
    let raw: RawDeberta = keys(value)?;
    if raw.relative_attention != Some(true) {
        return Err(unsupported("relative_attention", "false"));
    }
    only("embedding_size", raw.embedding_size, &common.hidden_size)?;
    only("attention_head_size", raw.attention_head_size, &(common.hidden_size / common.heads))?;
    only("conv_kernel_size", raw.conv_kernel_size, &0)?;
    only("pooler_hidden_size", raw.pooler_hidden_size, &common.hidden_size)?;
    if common.positions > CONTEXT_MAX {
        let (name, got) = ("max_position_embeddings", common.positions);
        return Err(ModelError::OutOfRange { name, max: CONTEXT_MAX, got }.into());
    }
    let kinds = match raw.pos_att_type {
        None => Vec::new(),
        Some(OneOrMany::One(text)) => text.to_lowercase().split('|').map(|kind| kind.trim().into()).collect(),
        Some(OneOrMany::Many(list)) => list,
    };
    if kinds.is_empty() || kinds.iter().any(|kind| kind != "c2p" && kind != "p2c") {
        return Err(unsupported("pos_att_type", format!("[{}]", kinds.join(", "))));
    }
    let norm_positions = match raw.norm_rel_ebd.as_deref().map(str::trim) {
        None | Some("none") => false,
        Some("layer_norm") => true,
        Some(other) => return Err(unsupported("norm_rel_ebd", other)),
    };
    let deberta = Deberta {
        content_to_position: kinds.iter().any(|kind| kind == "c2p"),
        position_to_content: kinds.iter().any(|kind| kind == "p2c"),
        shared: raw.share_att_key == Some(true),
        buckets: buckets(raw.position_buckets, raw.max_relative_positions, common.positions)?,
        norm_positions,
        absolute: raw.position_biased_input != Some(false),
        position_rows: common.positions,
        activation: Activation::read("hidden_act", raw.hidden_act.as_deref())?,
        pooler_activation: Activation::read("pooler_hidden_act", raw.pooler_hidden_act.as_deref())?,
        epsilon: epsilon("layer_norm_eps", raw.layer_norm_eps.unwrap_or(1e-7))?,
    };
    let token_types = raw.type_vocab_size.unwrap_or(0);
    Ok(Described { network: Network::Deberta(deberta), context: common.positions, token_types })
}

fn buckets(number: Option<i64>, furthest: Option<i64>, positions: usize) -> Result<Buckets, ConfigError> {
    let stated =
        |got: Option<i64>| got.filter(|&got| got > 0).map(|got| usize::try_from(got).unwrap_or(usize::MAX));
    let (logarithmic, furthest) = (stated(number), stated(furthest).unwrap_or(positions));
    // A logarithmic scale needs two ends that differ: the half of the buckets, and the furthest distance less one.
    let least = logarithmic.map_or(1, |number| (number / 2).max(1).saturating_add(2));
    for (name, got, least) in
        [("position_buckets", logarithmic.unwrap_or(2), 2), ("max_relative_positions", furthest, least)]
    {
        if got < least || got > CONTEXT_MAX {
            return Err(ModelError::OutOfRange { name, max: CONTEXT_MAX, got }.into());
        }
    }
    Ok(Buckets { logarithmic, furthest })
}

impl Deberta {
    pub(super) fn tensors(&self, encoder: &EncoderConfig) -> Vec<(String, Source)> {
        let EncoderConfig { hidden_size: hidden, intermediate_size: inner, .. } = *encoder;
        let mut list = Entries::default();
        list.words("deberta.embeddings.word_embeddings.weight", encoder);
        if self.absolute {
            let theirs = "deberta.embeddings.position_embeddings.weight";
            list.plain("positions", theirs, self.position_rows, hidden);
        }
        if encoder.token_types > 0 {
            let theirs = "deberta.embeddings.token_type_embeddings.weight";
            list.plain("types", theirs, encoder.token_types, hidden);
        }
        list.norm("embed_norm", "deberta.embeddings.LayerNorm", hidden, true);
        list.plain("relative", "deberta.encoder.rel_embeddings.weight", 2 * self.buckets.span(), hidden);
        if self.norm_positions {
            list.norm("relative_norm", "deberta.encoder.LayerNorm", hidden, true);
        }
        for layer in 0..encoder.layers {
            let ours = |name: &str| format!("layers.{layer}.{name}");
            let theirs = |name: &str| format!("deberta.encoder.layer.{layer}.{name}");
            for (name, part) in self.projections() {
                list.linear(
                    &ours(name),
                    &[(theirs(&format!("attention.self.{part}")), hidden)],
                    hidden,
                    true,
                );
            }
            list.linear(&ours("o"), &[(theirs("attention.output.dense"), hidden)], hidden, true);
            list.norm(&ours("attn_norm"), &theirs("attention.output.LayerNorm"), hidden, true);
            list.linear(&ours("up"), &[(theirs("intermediate.dense"), inner)], hidden, true);
            list.linear(&ours("down"), &[(theirs("output.dense"), hidden)], inner, true);
            list.norm(&ours("mlp_norm"), &theirs("output.LayerNorm"), hidden, true);
        }
        list.linear("pooler", &[("pooler.dense".into(), hidden)], hidden, true);
        list.classifier("classifier", encoder.labels.len(), hidden);
        list.0
    }

    /// The linears of the attention, by our name and theirs.
    fn projections(&self) -> Vec<(&'static str, &'static str)> {
        let mut list = vec![("q", "query_proj"), ("k", "key_proj"), ("v", "value_proj")];
        if !self.shared && self.content_to_position {
            list.push(("position_k", "pos_key_proj"));
        }
        if !self.shared && self.position_to_content {
            list.push(("position_q", "pos_query_proj"));
        }
        list
    }

    pub(super) fn logits(&self, parts: &mut Parts<'_>) -> Result<ValueId, GraphError> {
        let EncoderConfig { hidden_size: hidden, intermediate_size: inner, layers, .. } = *parts.encoder;
        parts.graph.enter("embed", 0);
        let mut x = parts.words()?;
        if self.absolute {
            x = parts.plus_positions(x, 0, self.position_rows)?;
        }
        x = parts.plus_types(x)?;
        x = parts.norm("embed_norm", self.epsilon, true, x)?;
        let shared =
            Shared { relative: self.relative(parts)?, rows: self.rows(parts)?, padding: parts.padding()? };
        for layer in 0..layers {
            parts.graph.enter(format!("layers.{layer}"), layer);
            let ours = |name: &str| format!("layers.{layer}.{name}");
            let context = self.attention(parts, layer, &shared, x)?;
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
        let pooled = parts.graph.add(self.pooler_activation.op(), &[pooled])?;
        parts.classifier(pooled)
    }

    /// The table of relative positions, `[2 span, hidden]`.
    fn relative(&self, parts: &mut Parts<'_>) -> Result<ValueId, GraphError> {
        let table = parts.matrix("relative", 2 * self.buckets.span(), parts.encoder.hidden_size)?;
        if self.norm_positions { parts.norm("relative_norm", self.epsilon, true, table) } else { Ok(table) }
    }

    /// The row of that table for each query and key, `[time, time]`.
    fn rows(&self, parts: &mut Parts<'_>) -> Result<ValueId, GraphError> {
        let furthest = parts.encoder.context as i64 - 1;
        let rows: Vec<i64> = (-furthest..=furthest).map(|distance| self.buckets.row(distance)).collect();
        let count = rows.len();
        let table = parts.graph.constant(Constant::I64(rows), [count])?;
        let distances = parts.distances()?;
        let middle = parts.graph.scalar(furthest as f32)?;
        let places = parts.graph.plus(distances, middle)?;
        let places = parts.graph.add(Op::Cast(ElementType::I64), &[places])?;
        parts.graph.add(Op::Gather { axis: 0 }, &[table, places])
    }

    fn attention(
        &self,
        parts: &mut Parts<'_>,
        layer: usize,
        shared: &Shared,
        x: ValueId,
    ) -> Result<ValueId, GraphError> {
        let EncoderConfig { hidden_size: hidden, heads, .. } = *parts.encoder;
        let size = (hidden, hidden);
        let name = |part: &str| format!("layers.{layer}.{part}");
        let query = parts.linear(&name("q"), size, true, x)?;
        let key = parts.linear(&name("k"), size, true, x)?;
        let value = parts.linear(&name("v"), size, true, x)?;
        let kinds = 1 + usize::from(self.content_to_position) + usize::from(self.position_to_content);
        let scale = ((kinds * hidden / heads) as f32).sqrt().recip();
        let mut bias = shared.padding;
        if self.content_to_position {
            let projection = if self.shared { "k" } else { "position_k" };
            let positions = parts.linear(&name(projection), size, true, shared.relative)?;
            let scores = picked(parts, query, positions, shared.rows, scale)?;
            bias = parts.graph.plus(scores, bias)?;
        }
        if self.position_to_content {
            let projection = if self.shared { "q" } else { "position_q" };
            let positions = parts.linear(&name(projection), size, true, shared.relative)?;
            // Picked for each key and query, then turned: the distance is still the query's behind the key.
            let rows = parts.graph.transpose(shared.rows, &[1, 0])?;
            let scores = picked(parts, key, positions, rows, scale)?;
            let scores = parts.graph.transpose(scores, &[0, 1, 3, 2])?;
            bias = parts.graph.plus(scores, bias)?;
        }
        parts.attention([query, key, value], bias, scale)
    }
}

/// What all layers read.
struct Shared {
    relative: ValueId,
    rows: ValueId,
    padding: ValueId,
}

/// The scores of contents `[batch, time, hidden]` with relative positions `[2 span, hidden]`, of which `rows
/// [time, time]` are picked: `[batch, heads, time, time]`.
fn picked(
    parts: &mut Parts<'_>,
    contents: ValueId,
    positions: ValueId,
    rows: ValueId,
    scale: f32,
) -> Result<ValueId, GraphError> {
    let EncoderConfig { hidden_size, heads, .. } = *parts.encoder;
    let graph = &mut parts.graph;
    let (heads, head_dim) = (heads.into(), (hidden_size / heads).into());
    let contents = graph.reshape(contents, [batch(), time(), heads, head_dim])?;
    let contents = graph.transpose(contents, &[0, 2, 1, 3])?;
    let dims = graph.shape(contents).0.clone();
    let length = graph.shape(positions).0[0].clone();
    let positions = graph.reshape(positions, [1.into(), length, dims[1].clone(), dims[3].clone()])?;
    let positions = graph.transpose(positions, &[0, 2, 1, 3])?;
    let scores = graph.product((contents, false), (positions, true), scale)?;
    let everywhere = [batch(), dims[1].clone(), time(), time()];
    let rows = graph.reshape(rows, [1.into(), 1.into(), time(), time()])?;
    let rows = graph.add(Op::Expand(everywhere.into()), &[rows])?;
    graph.add(Op::GatherElements { axis: 3 }, &[scores, rows])
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Rows as `transformers` computes them (`goldens/make_encoders.py`), by number of buckets and furthest distance.
    #[test]
    fn distances_fall_into_the_buckets_of_the_reference() {
        let golden = include_str!("../../goldens/encoders/buckets.json");
        let golden: BTreeMap<String, Vec<i64>> = serde_json::from_str(golden).expect("the golden file");
        assert_eq!(golden.len(), 5);
        for (name, rows) in golden {
            let (number, furthest) = name.split_once(' ').expect("two numbers");
            let buckets =
                Buckets { logarithmic: number.parse().ok(), furthest: furthest.parse().expect("a number") };
            let end = buckets.furthest as i64 + 20;
            let got: Vec<i64> = (-end..=end).map(|distance| buckets.row(distance)).collect();
            assert_eq!(got, rows, "{name}");
        }
    }
}
