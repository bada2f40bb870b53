//! Settings that a round's task hands on to devices.

use commonweal_adapter::Trainable;
use commonweal_protocol::{CompressSettings, Mode, RoundId, TrainSettings};
use serde::{Deserialize, Serialize};

/// See [`TrainSettings`]; `mode` is the round's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields are those of TrainSettings")]
pub struct Train {
    pub mode: Mode,
    pub steps_max: u32,
    pub warmup_steps: u32,
    pub accumulation: u32,
    pub row_tokens_max: u32,
    pub learning_rate: f32,
    pub weight_decay: f32,
    pub clip_norm: f32,
    pub proximal_mu: f32,
    /// SCAFFOLD: devices correct their gradients by control variates.
    pub scaffold: bool,
}

impl Default for Train {
    fn default() -> Self {
        Self {
            mode: Mode::Fedit,
            steps_max: 25,
            warmup_steps: 2,
            accumulation: 8,
            row_tokens_max: 256,
            learning_rate: 1e-3,
            weight_decay: 0.0,
            clip_norm: 1.0,
            proximal_mu: 0.0,
            scaffold: false,
        }
    }
}

impl Train {
    /// As devices are told.
    pub fn settings(&self) -> TrainSettings {
        TrainSettings {
            steps_max: self.steps_max,
            warmup_steps: self.warmup_steps,
            accumulation: self.accumulation,
            row_tokens_max: self.row_tokens_max,
            learning_rate: self.learning_rate,
            weight_decay: self.weight_decay,
            clip_norm: self.clip_norm,
            proximal_mu: self.proximal_mu,
        }
    }

    /// Which factors change in a round.
    pub fn trainable(&self, round: RoundId) -> Trainable {
        match self.mode {
            Mode::Fedit | Mode::Exact => Trainable::Both,
            Mode::Ffa => Trainable::BOnly,
            // B first: while it is zero, A has no gradient.
            Mode::Rolora if round.0 % 2 == 1 => Trainable::BOnly,
            Mode::Rolora => Trainable::AOnly,
        }
    }
}

/// See [`CompressSettings`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields are those of CompressSettings")]
pub struct Compress {
    pub bits: u8,
    pub block: u16,
    pub top_k: Option<f32>,
    pub rotate: bool,
    pub stochastic: bool,
    pub level: u8,
}

impl Default for Compress {
    fn default() -> Self {
        // As the codec's own default, which says why.
        Self { bits: 3, block: 256, top_k: None, rotate: false, stochastic: false, level: 1 }
    }
}

impl Compress {
    /// As devices are told.
    pub fn settings(&self) -> CompressSettings {
        CompressSettings {
            bits: self.bits,
            block: self.block,
            top_k: self.top_k,
            rotate: self.rotate,
            stochastic: self.stochastic,
            level: self.level,
        }
    }
}
