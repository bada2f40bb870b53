//! How a model's attention differs from Llama's: biases, norms per head, windows, layers without positions.
//! A part of `model.rs`; the compiler builds its graphs by it.

use serde::{Deserialize, Serialize};

use crate::model::{DIMENSION_MAX, ModelError};

/// How the attention of a model differs from Llama's; the default does not. The `[model.attention]` table of a manifest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// Which of its linears add a bias.
    #[serde(default, skip_serializing_if = "is_default")]
    pub bias: Bias,
    /// Whether each head's queries and keys are RMS-normalized before they are rotated.
    #[serde(default, skip_serializing_if = "is_default")]
    pub head_norm: bool,
    /// Layers that see only the nearest tokens.
    #[serde(default, skip_serializing_if = "is_default")]
    pub window: Option<Window>,
    /// Layers whose queries and keys are not rotated, ascending.
    #[serde(default, skip_serializing_if = "is_default")]
    pub unrotated: Vec<usize>,
}

/// Linears of the attention that add a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bias {
    /// None of them.
    #[default]
    None,
    /// Queries, keys and values.
    Qkv,
    /// Queries, keys, values and the output.
    All,
}

/// Layers that see only the nearest tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Tokens that a query sees, itself included.
    pub tokens: usize,
    /// The layers, ascending.
    pub layers: Vec<usize>,
}

impl Attention {
    pub(crate) fn check(&self, layers: usize) -> Result<(), ModelError> {
        if let Some(Window { tokens, .. }) = self.window
            && !(1..=DIMENSION_MAX).contains(&tokens)
        {
            return Err(ModelError::OutOfRange { name: "window", max: DIMENSION_MAX, got: tokens });
        }
        let windowed = self.window.as_ref().map_or(&[][..], |window| &window.layers);
        for (name, list) in [("attention.window", windowed), ("attention.unrotated", &self.unrotated)] {
            if !list.is_sorted_by(|a, b| a < b) || list.last().is_some_and(|&last| last >= layers) {
                return Err(ModelError::Layers { name, layers, got: list.to_vec() });
            }
        }
        Ok(())
    }

    /// Tokens that a query of a layer sees, itself included; `None` for all before it.
    pub fn window_of(&self, layer: usize) -> Option<usize> {
        self.window.as_ref().filter(|window| window.layers.contains(&layer)).map(|window| window.tokens)
    }

    /// Whether a layer's queries and keys are rotated by their positions.
    pub fn rotates(&self, layer: usize) -> bool {
        !self.unrotated.contains(&layer)
    }
}

pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}
