//! The architectures that can be compiled, as a table each: what Hugging Face calls them, how their attention differs
//! from Llama's, and which tensors they have. `config.rs` reads the first two; `checkpoint.rs`, `weights.rs` and
//! `random.rs` the tensors; `llama.rs` builds the one block function by them.

use commonweal_package::{Architecture, Attention, Bias, ModelConfig, Window};
use serde::Deserialize;

/// An architecture by the name in `config.json`.
struct Family {
    class: &'static str,
    architecture: Architecture,
    /// Whether the head is tied when the file does not say.
    tied: bool,
    attention: fn(&RawAttention, usize) -> Attention,
}

/// Every architecture that can be compiled.
const FAMILIES: [Family; 5] = [
    Family { class: "LlamaForCausalLM", architecture: Architecture::Llama, tied: false, attention: llama },
    Family {
        class: "MistralForCausalLM",
        architecture: Architecture::Mistral,
        tied: false,
        attention: mistral,
    },
    Family { class: "Qwen2ForCausalLM", architecture: Architecture::Qwen2, tied: false, attention: qwen2 },
    Family { class: "Qwen3ForCausalLM", architecture: Architecture::Qwen3, tied: false, attention: qwen3 },
    Family {
        class: "SmolLM3ForCausalLM",
        architecture: Architecture::SmolLm3,
        tied: true,
        attention: smollm3,
    },
];

/// The keys of `config.json` that only some architectures read.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct RawAttention {
    attention_bias: Option<bool>,
    pub(crate) sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    no_rope_layers: Option<Vec<u8>>,
    no_rope_layer_interval: Option<usize>,
}

/// A layer of a kind that no graph has.
#[derive(Debug)]
pub(crate) struct LayerTypeError(pub(crate) String);

/// What a configuration's architecture is.
#[derive(Debug)]
pub(crate) struct Described {
    pub(crate) architecture: Architecture,
    pub(crate) tied: bool,
    pub(crate) attention: Attention,
}

/// The names of all architectures, encoders included, for people.
pub(crate) fn supported() -> String {
    format!("{}; {}", FAMILIES.map(|family| family.class).join(", "), crate::encoder::supported())
}

/// The architecture of that name, `None` if it is not one of ours.
pub(crate) fn describe(
    class: &str,
    raw: &RawAttention,
    layers: usize,
) -> Option<Result<Described, LayerTypeError>> {
    let family = FAMILIES.iter().find(|family| family.class == class)?;
    let known = |kind: &&String| matches!(kind.as_str(), "full_attention" | "sliding_attention");
    if let Some(other) = raw.layer_types.iter().flatten().find(|kind| !known(kind)) {
        return Some(Err(LayerTypeError(other.clone())));
    }
    let (architecture, tied) = (family.architecture, family.tied);
    Some(Ok(Described { architecture, tied, attention: (family.attention)(raw, layers) }))
}

fn llama(raw: &RawAttention, _: usize) -> Attention {
    Attention { bias: declared_bias(raw), ..Attention::default() }
}

fn mistral(raw: &RawAttention, layers: usize) -> Attention {
    Attention { window: window(raw, 0..layers), ..Attention::default() }
}

fn qwen2(raw: &RawAttention, layers: usize) -> Attention {
    Attention { bias: Bias::Qkv, window: switched_window(raw, layers), ..Attention::default() }
}

fn qwen3(raw: &RawAttention, layers: usize) -> Attention {
    let window = switched_window(raw, layers);
    Attention { bias: declared_bias(raw), head_norm: true, window, ..Attention::default() }
}

fn smollm3(raw: &RawAttention, layers: usize) -> Attention {
    let interval = raw.no_rope_layer_interval.unwrap_or(4).max(1);
    let unrotated = match &raw.no_rope_layers {
        // One means that the layer is rotated, whatever the key is called.
        Some(flags) => (0..layers).filter(|&layer| flags.get(layer) == Some(&0)).collect(),
        None => (0..layers).filter(|layer| (layer + 1).is_multiple_of(interval)).collect(),
    };
    let window = switched_window(raw, layers);
    Attention { bias: declared_bias(raw), window, unrotated, ..Attention::default() }
}

fn declared_bias(raw: &RawAttention) -> Bias {
    if raw.attention_bias == Some(true) { Bias::All } else { Bias::None }
}

/// Windows where `use_sliding_window` asks for them: from `max_window_layers` on, unless `layer_types` says otherwise.
fn switched_window(raw: &RawAttention, layers: usize) -> Option<Window> {
    raw.use_sliding_window.filter(|&on| on)?;
    window(raw, raw.max_window_layers.unwrap_or(layers).min(layers)..layers)
}

fn window(raw: &RawAttention, usual: std::ops::Range<usize>) -> Option<Window> {
    let tokens = raw.sliding_window?;
    let layers: Vec<usize> = match &raw.layer_types {
        None => usual.collect(),
        Some(types) => (0..types.len()).filter(|&layer| types[layer] == "sliding_attention").collect(),
    };
    (!layers.is_empty()).then_some(Window { tokens, layers })
}

/// Where the values of an entry of `weights.bin` come from.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// Vectors of the checkpoint, one behind the other: names and lengths.
    Vector(Vec<(String, usize)>),
    /// Matrices of the checkpoint, one below the other: names and rows. The entry's columns are theirs.
    Matrix(Vec<(String, usize)>, usize),
    /// A matrix of the checkpoint that is not quantized: name, rows and columns.
    Plain(String, usize, usize),
    /// A rotary table: this function of position times frequency, for so many positions.
    Rotary(fn(f64) -> f64, usize, Vec<f64>),
}

/// Every tensor of `weights.bin` by its name there, in the order of the forward pass.
pub(crate) fn tensors(model: &ModelConfig) -> Vec<(String, Source)> {
    let ModelConfig { hidden_size: hidden, intermediate_size: inner, head_dim, vocab_size, .. } = *model;
    let (query, kv) = (model.query_size(), model.kv_size());
    let whole = |name: &str| Source::Matrix(vec![(name.to_owned(), vocab_size)], hidden);
    let mut list = vec![
        ("embed".to_owned(), whole("model.embed_tokens.weight")),
        ("rope.cos".to_owned(), Source::Rotary(libm::cos, model.context, model.rotary_frequencies())),
        ("rope.sin".to_owned(), Source::Rotary(libm::sin, model.context, model.rotary_frequencies())),
    ];
    for layer in 0..model.layers {
        let mut push = |name: &str, source| list.push((format!("layers.{layer}.{name}"), source));
        let theirs = |parts: &[(&str, usize)], kind: &str| -> Vec<(String, usize)> {
            parts.iter().map(|&(part, rows)| (format!("model.layers.{layer}.{part}.{kind}"), rows)).collect()
        };
        let vector = |part, length| Source::Vector(theirs(&[(part, length)], "weight"));
        let matrix = |parts: &[(&str, usize)], columns| Source::Matrix(theirs(parts, "weight"), columns);
        let qkv = [("self_attn.q_proj", query), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)];
        push("attn_norm", vector("input_layernorm", hidden));
        push("qkv", matrix(&qkv, hidden));
        if model.attention.bias != Bias::None {
            push("qkv_bias", Source::Vector(theirs(&qkv, "bias")));
        }
        if model.attention.head_norm {
            push("q_norm", vector("self_attn.q_norm", head_dim));
            push("k_norm", vector("self_attn.k_norm", head_dim));
        }
        push("o", matrix(&[("self_attn.o_proj", hidden)], query));
        if model.attention.bias == Bias::All {
            push("o_bias", Source::Vector(theirs(&[("self_attn.o_proj", hidden)], "bias")));
        }
        push("mlp_norm", vector("post_attention_layernorm", hidden));
        push("gate_up", matrix(&[("mlp.gate_proj", inner), ("mlp.up_proj", inner)], hidden));
        push("down", matrix(&[("mlp.down_proj", hidden)], inner));
    }
    list.push(("norm".into(), Source::Vector(vec![("model.norm.weight".into(), hidden)])));
    if !model.tied {
        list.push(("head".into(), whole("lm_head.weight")));
    }
    list
}

/// Every tensor of a checkpoint by its Hugging Face name, with its shape, in the order of the forward pass.
pub fn tensor_shapes(model: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    shapes_of(tensors(model))
}

/// Every tensor of the checkpoint that these entries are made of, with its shape.
pub(crate) fn shapes_of(list: Vec<(String, Source)>) -> Vec<(String, Vec<usize>)> {
    let shapes = |(_, source)| match source {
        Source::Vector(parts) => parts.into_iter().map(|(name, length)| (name, vec![length])).collect(),
        Source::Matrix(parts, columns) => {
            parts.into_iter().map(|(name, rows)| (name, vec![rows, columns])).collect()
        }
        Source::Plain(name, rows, columns) => vec![(name, vec![rows, columns])],
        Source::Rotary(..) => Vec::new(),
    };
    list.into_iter().flat_map(shapes).collect()
}
