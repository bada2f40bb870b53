//! A delta to few bytes: error feedback, top-k, rotation, block quantization, entropy coding.
//!
//! On a device, between training ([`AdapterDelta::between`]) and upload. What packing loses goes into the
//! [`Residual`], stays on the device and is added to its next delta, so that nothing is lost over the rounds
//! (Karimireddy et al. 2019, arXiv 1901.09847).

use std::sync::Arc;

use rand::RngCore;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::adapter::{AdapterError, check_values};
use crate::delta::{AdapterDelta, Trainable};
use crate::entropy;
use crate::layout::{AdapterLayout, LayoutError};
use crate::packed::{
    BLOCK_RANGE, COMPRESSED_VALUE_MAX, Frame, PackedDelta, layout_mark, restore, scale_planes, scatter,
};
use crate::quantize::{Bits, quantize};
use crate::rotate::rotate;
use crate::select;

/// How a round's deltas are packed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompressOptions {
    /// Width of a level.
    pub bits: Bits,
    /// Values that share a scale, 8 to 4096. At 3 bits 256 costs 0.03 bits a value for scales; the other widths, whose
    /// scale is the largest value's, lose less with 64.
    pub block: usize,
    /// Share of values that is sent, above 0 and at most 1: those of largest magnitude. `None` sends all.
    pub top_k: Option<f32>,
    /// Rotate randomly before quantization, which spreads outliers.
    pub rotate: bool,
    /// Round stochastically, which is unbiased, rather than to the nearest level.
    pub stochastic: bool,
    /// Level of zstd, 1 to 19; above 1 it buys nothing on such data.
    pub level: i32,
}

impl Default for CompressOptions {
    /// 3 bits, blocks of 256, all values, not rotated, to the nearest level, zstd level 1. Rounding to the nearest is
    /// biased, but what it loses stays in the residual, and it loses 30 % less than stochastic rounding.
    fn default() -> Self {
        Self { bits: Bits::Three, block: 256, top_k: None, rotate: false, stochastic: false, level: 1 }
    }
}

impl CompressOptions {
    /// Refuses numbers out of bounds; [`compress`] calls it.
    pub fn validate(&self) -> Result<(), CompressError> {
        if !BLOCK_RANGE.contains(&self.block) {
            return Err(CompressError::Block { got: self.block });
        }
        if let Some(got) = self.top_k.filter(|share| !(*share > 0.0 && *share <= 1.0)) {
            return Err(CompressError::TopK { got });
        }
        if !(1..=19).contains(&self.level) {
            return Err(CompressError::Level { got: self.level });
        }
        Ok(())
    }
}

/// Why a delta is not packed. The residual is then unchanged.
#[derive(Debug, Error)]
pub enum CompressError {
    /// Block out of bounds.
    #[error("compression block: expected 8 to 4096 values, got {got}")]
    Block {
        /// What was given.
        got: usize,
    },
    /// Share out of bounds.
    #[error("compression top_k: expected a share above 0 and at most 1, got {got}")]
    TopK {
        /// What was given.
        got: f32,
    },
    /// Zstd level out of bounds.
    #[error("compression level: expected 1 to 19, got {got}")]
    Level {
        /// What was given.
        got: i32,
    },
    /// The residual belongs to another layout.
    #[error("residual: belongs to another adapter")]
    Layout(#[from] LayoutError),
    /// The residual belongs to another round mode.
    #[error("residual: expected the trainable factors {expected:?} of the delta, got {got:?}")]
    Trainable {
        /// The delta's.
        expected: Trainable,
        /// The residual's.
        got: Trainable,
    },
    /// Training has diverged.
    #[error("delta with residual: expected values of magnitude {COMPRESSED_VALUE_MAX} at most, got {got}")]
    Magnitude {
        /// What was found.
        got: f32,
    },
    /// Zstd failed, for want of memory.
    #[error("compression: zstd failed")]
    Zstd(#[source] std::io::Error),
    /// Serialization failed, for want of memory.
    #[error("compression: writing the frame failed")]
    Frame(#[source] postcard::Error),
}

/// What packing has lost so far; a device keeps one for each base and mode and never sends it.
///
/// Save the changed residual only once the aggregator's receipt is there: if an upload is given up, the one from
/// before goes with the next delta.
#[derive(Clone, Debug, PartialEq)]
pub struct Residual {
    layout: Arc<AdapterLayout>,
    trainable: Trainable,
    values: Vec<f32>,
}

/// Why saved bytes are not a residual of the expected layout.
#[derive(Debug, Error, PartialEq)]
pub enum ResidualError {
    /// Not made by [`Residual::to_bytes`] for this layout and these factors.
    #[error("saved residual: expected one of the layout {expected}, got another file")]
    Header {
        /// The layout wanted.
        expected: String,
    },
    /// Cut off, too long or not finite.
    #[error("saved residual: damaged")]
    Values(#[from] AdapterError),
}

impl Residual {
    /// Nothing lost yet.
    pub fn zeros(layout: Arc<AdapterLayout>, trainable: Trainable) -> Self {
        let values = vec![0.0; layout.trainable_parameters(trainable)];
        Self { layout, trainable, values }
    }

    /// What is owed, in the order of a delta's values.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Euclidean norm.
    pub fn norm(&self) -> f64 {
        self.values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt()
    }

    fn header(layout: &AdapterLayout, trainable: Trainable) -> [u8; 34] {
        let mut header = [0; 34];
        header[0] = 1;
        header[1] = trainable as u8;
        header[2..].copy_from_slice(&layout.digest());
        header
    }

    /// For the device's own disk: version, factors, layout digest, values as little-endian f32.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Self::header(&self.layout, self.trainable).to_vec();
        bytes.extend(self.values.iter().flat_map(|value| value.to_le_bytes()));
        bytes
    }

    /// Reads [`Residual::to_bytes`]; of another layout or other factors is refused.
    pub fn from_bytes(
        bytes: &[u8],
        layout: Arc<AdapterLayout>,
        trainable: Trainable,
    ) -> Result<Self, ResidualError> {
        let Some(body) = bytes.strip_prefix(&Self::header(&layout, trainable)) else {
            return Err(ResidualError::Header { expected: layout.to_string() });
        };
        let expected = layout.trainable_parameters(trainable);
        let (chunks, rest) = body.as_chunks::<4>();
        if !rest.is_empty() {
            return Err(AdapterError::Length { expected, got: body.len() / 4 }.into());
        }
        let values: Vec<f32> = chunks.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect();
        check_values(&values, expected)?;
        Ok(Self { layout, trainable, values })
    }
}

/// Packs `delta + residual` and leaves in `residual` what that loses. The same inputs and the same generator state
/// give the same bytes on every machine.
pub fn compress(
    delta: &AdapterDelta,
    residual: &mut Residual,
    options: &CompressOptions,
    random: &mut dyn RngCore,
) -> Result<PackedDelta, CompressError> {
    options.validate()?;
    let layout = delta.layout();
    layout.require(&residual.layout)?;
    if delta.trainable() != residual.trainable {
        return Err(CompressError::Trainable { expected: delta.trainable(), got: residual.trainable });
    }
    let owed: Vec<f32> = delta.values().iter().zip(&residual.values).map(|(new, old)| new + old).collect();
    if let Some(got) = owed.iter().find(|value| value.abs() > COMPRESSED_VALUE_MAX) {
        return Err(CompressError::Magnitude { got: *got });
    }

    let total = owed.len();
    let kept = options.top_k.map_or(total, |share| kept_count(share, total));
    let places = (kept < total).then(|| select::largest(&owed, kept));
    let mut sent = match &places {
        None => owed.clone(),
        Some(places) => places.iter().filter_map(|place| owed.get(*place as usize).copied()).collect(),
    };
    let rotation = options.rotate.then(|| random.next_u64());
    if let Some(seed) = rotation {
        rotate(&mut sent, seed);
    }
    let quantized = quantize(&sent, options.bits, options.block, options.stochastic.then_some(random));

    let zstd = |bytes: &[u8]| zstd::bulk::compress(bytes, options.level).map_err(CompressError::Zstd);
    let frame = Frame {
        layout: layout_mark(layout),
        trainable: delta.trainable(),
        bits: options.bits,
        block: options.block as u16,
        rotation,
        kept: kept as u32,
        places: match &places {
            None => Vec::new(),
            Some(places) => zstd(&select::encode_places(places))?,
        },
        scales: zstd(&scale_planes(&quantized.scales))?,
        levels: entropy::encode(&quantized.levels, options.bits, options.level)
            .map_err(CompressError::Zstd)?,
    };
    let packed = PackedDelta::write(&frame, total).map_err(CompressError::Frame)?;

    let received = scatter(restore(&quantized, rotation), places.as_deref(), total);
    residual.values = owed.iter().zip(received).map(|(owed, received)| owed - received).collect();
    Ok(packed)
}

/// At least one value, at most all.
fn kept_count(share: f32, total: usize) -> usize {
    ((f64::from(share) * total as f64).ceil() as usize).clamp(1, total)
}
