//! A Hugging Face checkpoint directory, opened and checked before anything is written: the configuration
//! (`config.rs`), the tensors (`tensors.rs`) and the text side (`tokenizer.rs`). `compile.rs` begins here.

use std::path::{Path, PathBuf};

use commonweal_package::{ModelConfig, Tokens};

use crate::config::{self, ConfigError};
use crate::tensors::{TensorError, Tensors};
use crate::tokenizer::{self, Text, TextError};

/// A checkpoint whose every part is present and fits the others. Weights are read later, row by row.
#[derive(Debug)]
pub struct Checkpoint {
    /// Dimensions and constants.
    pub model: ModelConfig,
    /// Special tokens.
    pub tokens: Tokens,
    /// The bytes of `tokenizer.json`.
    pub tokenizer: Vec<u8>,
    /// The chat template, in Jinja.
    pub chat_template: String,
    /// The weights.
    pub tensors: Tensors,
}

/// Why a directory is not a checkpoint that can be compiled.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// There is no such directory.
    #[error("checkpoint {} is not a directory", path.display())]
    NoDirectory {
        /// The path given.
        path: PathBuf,
    },
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The tokenizer, the special tokens or the chat template.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The weights.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

impl Checkpoint {
    /// Opens a checkpoint and checks every part that can be checked without reading the weights through.
    pub fn open(directory: &Path, chat_template: Option<&Path>) -> Result<Self, CheckpointError> {
        if !directory.is_dir() {
            return Err(CheckpointError::NoDirectory { path: directory.into() });
        }
        let config::Config { model, tokens: declared } = config::read(directory)?;
        let Text { tokenizer, chat_template, tokens } =
            tokenizer::read(directory, chat_template, &declared, model.vocab_size)?;
        let tensors = Tensors::open(directory)?;
        for (name, shape) in tensor_shapes(&model) {
            tensors.check(&name, &shape)?;
        }
        Ok(Self { model, tokens, tokenizer, chat_template, tensors })
    }
}

/// Every tensor of a Llama checkpoint by its Hugging Face name, with its shape, in the order of the forward pass.
pub fn tensor_shapes(model: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let hidden = model.hidden_size;
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![model.vocab_size, hidden])];
    for layer in 0..model.layers {
        let mut push = |part: &str, shape: &[usize]| {
            shapes.push((format!("model.layers.{layer}.{part}.weight"), shape.to_vec()));
        };
        push("input_layernorm", &[hidden]);
        push("self_attn.q_proj", &[model.query_size(), hidden]);
        push("self_attn.k_proj", &[model.kv_size(), hidden]);
        push("self_attn.v_proj", &[model.kv_size(), hidden]);
        push("self_attn.o_proj", &[hidden, model.query_size()]);
        push("post_attention_layernorm", &[hidden]);
        push("mlp.gate_proj", &[model.intermediate_size, hidden]);
        push("mlp.up_proj", &[model.intermediate_size, hidden]);
        push("mlp.down_proj", &[hidden, model.intermediate_size]);
    }
    shapes.push(("model.norm.weight".to_owned(), vec![hidden]));
    if !model.tied {
        shapes.push(("lm_head.weight".to_owned(), vec![model.vocab_size, hidden]));
    }
    shapes
}
