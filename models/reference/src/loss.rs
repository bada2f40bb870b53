//! Held-out loss of a package's base on a file of texts: what `scripts/quantization-table` compares quantizations by.

use std::path::Path;

use anyhow::{Context, Result};
use commonweal_runtime::{Cancel, Model, Texts, mean_loss};
use serde_json::{Value, json};

use crate::show::Progress;

/// Rows scored between two steps of the bar.
const CHUNK: usize = 16;

/// A mean loss.
pub(crate) struct Loss {
    /// Nats a token.
    nats: f64,
    /// Tokens that were predicted.
    tokens: usize,
}

/// The loss of the base alone on at most `tokens_max` tokens of a file, in pieces of at most `length` tokens.
pub(crate) fn loss(
    model: &Model,
    file: &Path,
    length: usize,
    tokens_max: usize,
    progress: Progress,
) -> Result<Loss> {
    let texts = Texts::read(file, model.chat(), tokens_max)?;
    let rows = texts.measured(length.min(model.context()), model.manifest().tokens.bos);
    let (adapter, cancel) = (model.prepare(None)?, Cancel::new());
    let bar = progress.bar(rows.len() as u64, 0);
    let mut scores = Vec::with_capacity(rows.len());
    for chunk in rows.chunks(CHUNK) {
        scores.extend(model.score_rows(&adapter, chunk, &cancel)?);
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    let nats = mean_loss(&scores).with_context(|| format!("{} has nothing to predict", file.display()))?;
    Ok(Loss { nats, tokens: scores.iter().map(|score| score.token_logprobs.len()).sum() })
}

impl Loss {
    /// For scripts.
    pub(crate) fn json(&self, file: &str) -> Value {
        json!({"event": "loss", "file": file, "loss": self.nats, "tokens": self.tokens})
    }

    /// For people.
    pub(crate) fn print(&self, file: &str) {
        println!("{file}: {:.4} nats a token over {} tokens", self.nats, self.tokens);
    }
}
