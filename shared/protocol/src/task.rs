//! What a device asks first and what it is told to do: poll, and the round's task. Neighbours: `release` comes with
//! the reply, `update` is what the task ends in.

use crate::{
    BaseHash, Digest, Invalid, KeyNumber, ReconnectWindow, ReleaseNotice, RoundId, Scaffold,
    SignedSuccession, Trouble, Version, bounds,
};
use serde::{Deserialize, Serialize};

/// "I hold this base and this release: is there work, is there news?"
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Poll {
    /// The device's frozen base.
    pub base: BaseHash,
    /// The release that it has installed.
    pub installed: Option<Version>,
    /// The newest of the aggregator's keys that it knows.
    pub key: KeyNumber,
    /// A release that it was offered and cannot install.
    pub trouble: Option<Trouble>,
}

/// The answer: work, news, neither or both, and when to come back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PollReply {
    /// A round for this device to take part in.
    pub task: Option<RoundTask>,
    /// A release other than the one that the device has installed.
    pub release: Option<ReleaseNotice>,
    /// The steps from the key that the device knows to the one that signed all else in this reply.
    pub successions: Vec<SignedSuccession>,
    /// When to poll again.
    pub reconnect: ReconnectWindow,
}

/// One round's work.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RoundTask {
    /// The round.
    pub round: RoundId,
    /// The frozen base that it trains on.
    pub base: BaseHash,
    /// The adapter to start from.
    pub start: Start,
    /// What is trained, and so what is averaged.
    pub mode: Mode,
    /// How to train.
    pub train: TrainSettings,
    /// Whether gradients are corrected, and by what.
    pub scaffold: Scaffold,
    /// How to pack the delta.
    pub compress: CompressSettings,
    /// Seed of whatever must be the same on every device of the round.
    pub seed: u64,
    /// Time left to deliver, from this reply.
    pub deadline_ms: u64,
}

/// The adapter that a round starts from: content to fetch, unless it is already installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// Its version.
    pub version: Version,
    /// BLAKE3 of its file.
    pub digest: Digest,
    /// Bytes of its file.
    pub length: u64,
}

/// How LoRA factors are federated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// FedIT (Zhang et al. 2023): A and B are both trained and averaged apart.
    Fedit,
    /// FFA-LoRA (Sun et al. 2024): A stays as it started; only B is trained and sent.
    Ffa,
    /// RoLoRA (Chen et al. 2024): B is trained and sent in odd rounds, A in even ones, so that each average is exact.
    Rolora,
    /// A and B are both trained; their products are averaged and factored anew (FlexLoRA, Bai et al. 2024).
    Exact,
}

impl Mode {
    /// Its name in configurations and report cards.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fedit => "fedit",
            Self::Ffa => "ffa",
            Self::Rolora => "rolora",
            Self::Exact => "exact",
        }
    }
}

/// How a device trains. Same names as the runtime's training options.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TrainSettings {
    /// Optimizer steps at most.
    pub steps_max: u32,
    /// Steps over which the learning rate rises to its peak.
    pub warmup_steps: u32,
    /// Rows whose gradients are summed before a step.
    pub accumulation: u32,
    /// Tokens of a row; longer conversations are cut.
    pub row_tokens_max: u32,
    /// Peak learning rate.
    pub learning_rate: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Norm to which a step's gradient is clipped.
    pub clip_norm: f32,
    /// FedProx's pull towards the start; 0 is none.
    pub proximal_mu: f32,
}

/// How a device packs its delta. Same names as `commonweal-adapter`'s compress options.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CompressSettings {
    /// Bits of a value: 8, 4, 3 or 2.
    pub bits: u8,
    /// Values that share a scale.
    pub block: u16,
    /// Fraction of values kept, the largest; all if none.
    pub top_k: Option<f32>,
    /// Seeded random rotation first.
    pub rotate: bool,
    /// Stochastic rounding.
    pub stochastic: bool,
    /// zstd level.
    pub level: u8,
}

impl PollReply {
    pub(crate) fn check(&self) -> Result<(), Invalid> {
        if let Some(task) = &self.task {
            task.check()?;
        }
        if let Some(release) = &self.release {
            release.release.check()?;
        }
        SignedSuccession::check(&self.successions)?;
        self.reconnect.check()
    }
}

impl RoundTask {
    pub(crate) fn check(&self) -> Result<(), Invalid> {
        self.start.check()?;
        self.train.check()?;
        self.scaffold.check()?;
        self.compress.check()
    }
}

impl Start {
    pub(crate) fn check(&self) -> Result<(), Invalid> {
        Invalid::unless_at_least("start length", self.length, 1u64)?;
        Invalid::unless_at_most("start length", self.length, bounds::CONTENT_BYTES_MAX)
    }
}

impl TrainSettings {
    pub(crate) fn check(&self) -> Result<(), Invalid> {
        Invalid::unless_at_least("steps_max", self.steps_max, 1u64)?;
        Invalid::unless_at_most("steps_max", self.steps_max, bounds::STEPS_MAX)?;
        Invalid::unless_at_most("warmup_steps", self.warmup_steps, self.steps_max)?;
        Invalid::unless_at_least("accumulation", self.accumulation, 1u64)?;
        Invalid::unless_at_most("accumulation", self.accumulation, 4096u64)?;
        Invalid::unless_at_least("row_tokens_max", self.row_tokens_max, 2u64)?;
        Invalid::unless_at_most("row_tokens_max", self.row_tokens_max, bounds::ROW_TOKENS_MAX)?;
        Invalid::unless_within("learning_rate", self.learning_rate.into(), bounds::LEARNING_RATE_MIN, 1.0)?;
        Invalid::unless_within("weight_decay", self.weight_decay.into(), 0.0, 1.0)?;
        Invalid::unless_within("clip_norm", self.clip_norm.into(), 1e-6, 1e6)?;
        Invalid::unless_within("proximal_mu", self.proximal_mu.into(), 0.0, 1e3)
    }
}

impl CompressSettings {
    pub(crate) fn check(&self) -> Result<(), Invalid> {
        if !matches!(self.bits, 2 | 3 | 4 | 8) {
            return Err(Invalid::NotAllowed { field: "compress bits", got: self.bits.into() });
        }
        Invalid::unless_at_least("compress block", self.block, bounds::COMPRESS_BLOCK.0)?;
        Invalid::unless_at_most("compress block", self.block, bounds::COMPRESS_BLOCK.1)?;
        Invalid::unless_within("compress top_k", self.top_k.unwrap_or(1.0).into(), 1e-6, 1.0)?;
        Invalid::unless_at_least("compress level", self.level, bounds::COMPRESS_LEVEL.0)?;
        Invalid::unless_at_most("compress level", self.level, bounds::COMPRESS_LEVEL.1)
    }
}
