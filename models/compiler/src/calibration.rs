//! The text of `model-compiler compile --calibrate`, as tokens. A part of the command, not of the library.

use std::path::Path;

use commonweal_compiler::checkpoint::{Checkpoint, CheckpointError};
use commonweal_runtime::{Chat, ConversationError, Texts, TextsError};

/// Why a calibration text gives no tokens.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TextError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("the checkpoint's text side cannot be used")]
    Chat(#[from] ConversationError),
    #[error(transparent)]
    Texts(#[from] TextsError),
    #[error(
        "calibration needs {needed} tokens, {file} has {got}; add text, or ask for fewer with --calibration-tokens"
    )]
    TooFew { file: String, needed: usize, got: usize },
}

/// The first `count` tokens of a file, in the checkpoint's tokens and chat form.
pub(crate) fn read_tokens(
    file: &Path,
    count: usize,
    checkpoint: &Path,
    chat_template: Option<&Path>,
) -> Result<Vec<u32>, TextError> {
    let Checkpoint { tokenizer, chat_template, tokens, .. } = Checkpoint::open(checkpoint, chat_template)?;
    let chat = Chat::of_checkpoint(&tokenizer, &chat_template, &tokens)?;
    let mut tokens = Texts::read(file, &chat, count)?.tokens();
    if tokens.len() < count {
        let (file, got) = (file.display().to_string(), tokens.len());
        return Err(TextError::TooFew { file, needed: count, got });
    }
    tokens.truncate(count);
    Ok(tokens)
}
