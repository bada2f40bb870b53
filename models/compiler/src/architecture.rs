//! The architectures that can be compiled, as a table each: what Hugging Face calls them, how their attention differs
//! from Llama's, and which tensors they have. `config.rs` reads the first two, and with `gemma.rs` what Gemma has
//! besides; `checkpoint.rs`, `weights.rs` and `random.rs` the tensors; `llama.rs` builds the one block function by them.

use commonweal_package::{Architecture, Attention, Bias, ModelConfig, Window};
use serde::Deserialize;

use crate::config::ConfigError;
use crate::gemma::{self, RawGemma};
use crate::said::Said;

/// Tokens of a window where `transformers` has one by default.
const WINDOW_TOKENS: usize = 4096;

/// Qwen's layers from this one on have a window, where the file asks for windows and does not say.
const WINDOW_LAYERS_FROM: usize = 28;

/// The kinds of layers that graphs have.
pub(crate) const FULL: &str = "full_attention";
pub(crate) const SLIDING: &str = "sliding_attention";

/// An architecture by the name in `config.json`.
#[derive(Debug)]
pub(crate) struct Family {
    class: &'static str,
    pub(crate) architecture: Architecture,
    /// Whether the head is tied when the file does not say.
    pub(crate) tied: bool,
    /// The base of the rotary wavelengths when the file does not say.
    pub(crate) rope_theta: f64,
    attention: fn(&RawAttention, usize) -> Attention,
}

/// Every architecture that can be compiled.
static FAMILIES: [Family; 7] = [
    Family {
        class: "LlamaForCausalLM",
        architecture: Architecture::Llama,
        tied: false,
        rope_theta: 1e4,
        attention: llama,
    },
    Family {
        class: "MistralForCausalLM",
        architecture: Architecture::Mistral,
        tied: false,
        rope_theta: 1e4,
        attention: mistral,
    },
    Family {
        class: "Qwen2ForCausalLM",
        architecture: Architecture::Qwen2,
        tied: false,
        rope_theta: 1e4,
        attention: qwen2,
    },
    Family {
        class: "Qwen3ForCausalLM",
        architecture: Architecture::Qwen3,
        tied: false,
        rope_theta: 1e4,
        attention: qwen3,
    },
    Family {
        class: "SmolLM3ForCausalLM",
        architecture: Architecture::SmolLm3,
        tied: true,
        rope_theta: 2e6,
        attention: smollm3,
    },
    Family {
        class: "Gemma2ForCausalLM",
        architecture: Architecture::Gemma2,
        tied: true,
        rope_theta: 1e4,
        attention: gemma::attention2,
    },
    Family {
        class: "Gemma3ForCausalLM",
        architecture: Architecture::Gemma3,
        tied: true,
        rope_theta: 1e6,
        attention: gemma::attention3,
    },
];

/// The keys of `config.json` that only some architectures read.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct RawAttention {
    attention_bias: Option<bool>,
    #[serde(default)]
    pub(crate) sliding_window: Said<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    no_rope_layers: Option<Vec<u8>>,
    no_rope_layer_interval: Option<usize>,
    #[serde(flatten)]
    pub(crate) gemma: RawGemma,
}

/// The names of all architectures, encoders included, for people.
pub(crate) fn supported() -> String {
    format!("{}; {}", FAMILIES.each_ref().map(|family| family.class).join(", "), crate::encoder::supported())
}

impl Family {
    /// The architecture of the classes that a file names, which must be one of ours.
    pub(crate) fn find(classes: &[String]) -> Result<&'static Self, ConfigError> {
        let family = FAMILIES.iter().find(|family| classes == [family.class]);
        family.ok_or_else(|| ConfigError::Architecture {
            got: if classes.is_empty() { "none".into() } else { classes.join(", ") },
        })
    }

    /// How the attention of its layers differs from Llama's.
    pub(crate) fn attention(&self, raw: &RawAttention, layers: usize) -> Result<Attention, ConfigError> {
        let unsupported = |feature, got| Err(ConfigError::Unsupported { feature, got });
        let types = raw.layer_types.as_deref().unwrap_or_default();
        let known = |kind: &&String| [FULL, SLIDING].contains(&kind.as_str());
        if let Some(other) = types.iter().find(|kind| !known(kind)) {
            return unsupported("layer_types", other.clone());
        }
        if raw.layer_types.is_some() && types.len() != layers {
            return unsupported("layer_types", format!("{} for {layers} layers", types.len()));
        }
        if self.architecture == Architecture::SmolLm3 {
            match &raw.no_rope_layers {
                // A longer one is what `transformers` takes too: it asks layer by layer.
                Some(flags) if flags.len() < layers => {
                    return unsupported("no_rope_layers", format!("{} for {layers} layers", flags.len()));
                }
                None if raw.no_rope_layer_interval == Some(0) => {
                    return unsupported("no_rope_layer_interval", "0".into());
                }
                _ => {}
            }
        }
        let attention = (self.attention)(raw, layers);
        // Some architectures ask other keys, whatever this one says.
        let differs = |(layer, kind): &(usize, &String)| {
            attention.window_of(*layer).is_some() != (kind.as_str() == SLIDING)
        };
        match types.iter().enumerate().find(differs) {
            Some((layer, kind)) => {
                unsupported("layer_types", format!("{kind} of layer {layer} against the other keys"))
            }
            None => Ok(attention),
        }
    }
}

fn llama(raw: &RawAttention, _: usize) -> Attention {
    Attention { bias: declared_bias(raw), ..Attention::default() }
}

fn mistral(raw: &RawAttention, layers: usize) -> Attention {
    let tokens = raw.sliding_window.or(Some(WINDOW_TOKENS));
    let window = tokens.map(|tokens| Window { tokens, layers: (0..layers).collect() });
    Attention { window, ..Attention::default() }
}

fn qwen2(raw: &RawAttention, layers: usize) -> Attention {
    Attention { bias: Bias::Qkv, window: switched_window(raw, layers), ..Attention::default() }
}

fn qwen3(raw: &RawAttention, layers: usize) -> Attention {
    let window = switched_window(raw, layers);
    Attention { bias: declared_bias(raw), head_norm: true, window, ..Attention::default() }
}

fn smollm3(raw: &RawAttention, layers: usize) -> Attention {
    let interval = raw.no_rope_layer_interval.unwrap_or(4);
    let unrotated: Vec<usize> = match &raw.no_rope_layers {
        // One means that the layer is rotated, whatever the key is called.
        Some(flags) => (0..layers).filter(|&layer| flags.get(layer) == Some(&0)).collect(),
        None => (0..layers).filter(|layer| (layer + 1).is_multiple_of(interval)).collect(),
    };
    let window = raw.use_sliding_window.filter(|&on| on);
    let window = window.and_then(|_| self::window(raw, None, unrotated.iter().copied()));
    Attention { bias: declared_bias(raw), window, unrotated, ..Attention::default() }
}

pub(crate) fn declared_bias(raw: &RawAttention) -> Bias {
    if raw.attention_bias == Some(true) { Bias::All } else { Bias::None }
}

/// Windows where `use_sliding_window` asks for them: from `max_window_layers` on, unless `layer_types` says otherwise.
fn switched_window(raw: &RawAttention, layers: usize) -> Option<Window> {
    raw.use_sliding_window.filter(|&on| on)?;
    let first = raw.max_window_layers.unwrap_or(WINDOW_LAYERS_FROM).min(layers);
    window(raw, Some(WINDOW_TOKENS), first..layers)
}

/// The windows of a file, of `unsaid` tokens where it does not say, in the `usual` layers where it does not name them.
pub(crate) fn window(
    raw: &RawAttention,
    unsaid: Option<usize>,
    usual: impl Iterator<Item = usize>,
) -> Option<Window> {
    let tokens = raw.sliding_window.or(unsaid)?;
    let layers: Vec<usize> = match &raw.layer_types {
        None => usual.collect(),
        Some(types) => (0..types.len()).filter(|&layer| types[layer] == SLIDING).collect(),
    };
    (!layers.is_empty()).then_some(Window { tokens, layers })
}

/// Where the values of an entry of `weights.bin` come from.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// Vectors of the checkpoint, one behind the other: names and lengths.
    Vector(Vec<(String, usize)>),
    /// A vector of the checkpoint to every value of which one is added: name and length.
    OnePlus(String, usize),
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
    let norm = |name: String, length| match model.gemma {
        None => Source::Vector(vec![(name, length)]),
        Some(_) => Source::OnePlus(name, length),
    };
    let mut list = vec![("embed".to_owned(), whole("model.embed_tokens.weight"))];
    for (name, function, frequencies) in rotary_tables(model) {
        list.push((name.to_owned(), Source::Rotary(function, model.context, frequencies)));
    }
    for layer in 0..model.layers {
        let mut push = |name: &str, source| list.push((format!("layers.{layer}.{name}"), source));
        let theirs = |parts: &[(&str, usize)], kind: &str| -> Vec<(String, usize)> {
            parts.iter().map(|&(part, rows)| (format!("model.layers.{layer}.{part}.{kind}"), rows)).collect()
        };
        let norm = |part: &str, length| norm(format!("model.layers.{layer}.{part}.weight"), length);
        let matrix = |parts: &[(&str, usize)], columns| Source::Matrix(theirs(parts, "weight"), columns);
        let qkv = [("self_attn.q_proj", query), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)];
        push("attn_norm", norm("input_layernorm", hidden));
        push("qkv", matrix(&qkv, hidden));
        if model.attention.bias != Bias::None {
            push("qkv_bias", Source::Vector(theirs(&qkv, "bias")));
        }
        if model.attention.head_norm {
            push("q_norm", norm("self_attn.q_norm", head_dim));
            push("k_norm", norm("self_attn.k_norm", head_dim));
        }
        push("o", matrix(&[("self_attn.o_proj", hidden)], query));
        if model.attention.bias == Bias::All {
            push("o_bias", Source::Vector(theirs(&[("self_attn.o_proj", hidden)], "bias")));
        }
        if model.gemma.is_none() {
            push("mlp_norm", norm("post_attention_layernorm", hidden));
        } else {
            push("attn_post_norm", norm("post_attention_layernorm", hidden));
            push("mlp_norm", norm("pre_feedforward_layernorm", hidden));
            push("mlp_post_norm", norm("post_feedforward_layernorm", hidden));
        }
        push("gate_up", matrix(&[("mlp.gate_proj", inner), ("mlp.up_proj", inner)], hidden));
        push("down", matrix(&[("mlp.down_proj", hidden)], inner));
    }
    list.push(("norm".into(), norm("model.norm.weight".into(), hidden)));
    if !model.tied {
        list.push(("head".into(), whole("lm_head.weight")));
    }
    list
}

/// A rotary table: name, function of the angle, and angle per position of each pair.
pub(crate) type RotaryTable = (&'static str, fn(f64) -> f64, Vec<f64>);

/// The rotary tables of all layers.
pub(crate) fn rotary_tables(model: &ModelConfig) -> Vec<RotaryTable> {
    let global = model.rotary_frequencies();
    let mut tables: Vec<RotaryTable> =
        vec![("rope.cos", libm::cos, global.clone()), ("rope.sin", libm::sin, global)];
    if let Some(local) = model.local_rotary_frequencies() {
        tables.push(("rope.local.cos", libm::cos, local.clone()));
        tables.push(("rope.local.sin", libm::sin, local));
    }
    tables
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
        Source::OnePlus(name, length) => vec![(name, vec![length])],
        Source::Plain(name, rows, columns) => vec![(name, vec![rows, columns])],
        Source::Rotary(..) => Vec::new(),
    };
    list.into_iter().flat_map(shapes).collect()
}
