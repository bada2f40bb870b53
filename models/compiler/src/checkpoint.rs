//! A Hugging Face checkpoint directory, opened and checked before anything is written: the configuration
//! (`config.rs`), the tensors (`tensors.rs`) and the text side (`tokenizer.rs`). `compile.rs` begins here.

use std::path::{Path, PathBuf};

use commonweal_package::{ModelConfig, Tokens};

use crate::architecture::tensor_shapes;
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
