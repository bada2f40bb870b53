//! Stage 5, **compress**: packs the delta; what packing loses is kept as the residual and added next time.
//!
//! From `train.rs`; to `upload.rs`. Only [`compress`] and [`Packed::from_disk`] make a [`Packed`], the latter from the
//! bytes that the former left before a restart.

use std::sync::Arc;

use commonweal_adapter::{
    Adapter, AdapterDelta, AdapterError, AdapterLayout, Bits, CompressError, CompressOptions, DecodeError,
    DecodeLimits, PackedDelta, Residual, Trainable,
    pair::{self, PairError},
};
use commonweal_protocol::CompressSettings;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::train::Trained;

/// An update as it is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    bytes: Vec<u8>,
}

impl Packed {
    /// What crosses the wire.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes up an update that a crash left undelivered; refuses bytes that do not decode.
    pub fn from_disk(
        bytes: Vec<u8>,
        layout: &Arc<AdapterLayout>,
        trainable: Trainable,
        has_control: bool,
    ) -> Result<Self, PairError> {
        pair::decode(&bytes, layout, trainable, has_control)?;
        Ok(Self { bytes })
    }
}

/// What packing did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PackSummary {
    /// Of the packed update.
    pub bits_per_parameter: f64,
    /// Norm of the delta before packing.
    pub norm: f64,
}

/// Why nothing was packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The round asks for a width that does not exist.
    #[error("compression: expected 8, 4, 3 or 2 bits, got {got}")]
    Bits {
        /// What it asks.
        got: u8,
    },
    /// What the aggregator will make of the change does not decode.
    #[error("change of the control variate does not come back from its packing")]
    Control(#[from] DecodeError),
    /// A control variate of another adapter, or one that is not finite.
    #[error("control variate cannot be used")]
    Adapter(#[from] AdapterError),
    /// The delta or the settings cannot be packed.
    #[error("delta cannot be packed")]
    Compress(#[from] CompressError),
}

/// The settings of a round as options of the codec.
pub fn options(settings: &CompressSettings) -> Result<CompressOptions, PackError> {
    let bits = Bits::try_from(settings.bits).map_err(|_| PackError::Bits { got: settings.bits })?;
    Ok(CompressOptions {
        bits,
        block: usize::from(settings.block),
        top_k: settings.top_k,
        rotate: settings.rotate,
        stochastic: settings.stochastic,
        level: i32::from(settings.level),
    })
}

/// Packs a delta together with what is owed from before. `residual` then holds what is owed after; keep it only once
/// the update is accepted.
pub fn compress(
    trained: &Trained,
    residual: &mut Residual,
    options: &CompressOptions,
    seed: u64,
) -> Result<(Packed, PackSummary), PackError> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let packed = commonweal_adapter::compress(trained.delta(), residual, options, &mut random)?;
    let summary = summary(trained, packed.as_bytes());
    Ok((Packed { bytes: packed.into_bytes() }, summary))
}

/// The same with the change of the device's control variate behind it. What the third is, the device's next control
/// variate: moved by what the aggregator will decode, so that both have the same; what packing lost of the change is in
/// the next round's.
pub fn compress_corrected(
    trained: &Trained,
    own: &Adapter,
    residual: &mut Residual,
    options: &CompressOptions,
    seed: u64,
) -> Result<(Packed, PackSummary, Adapter), PackError> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let packed = commonweal_adapter::compress(trained.delta(), residual, options, &mut random)?;
    let (layout, trainable) = (trained.delta().layout(), trained.delta().trainable());
    let change = match trained.correction() {
        Some(correction) => correction.change(own, trainable)?,
        None => AdapterDelta::between(own, own, trainable)?,
    };
    let mut none_owed = Residual::zeros(Arc::clone(layout), trainable);
    let control = commonweal_adapter::compress(&change, &mut none_owed, options, &mut random)?;
    let received = PackedDelta::decode(control.as_bytes(), layout, &DecodeLimits::of(layout, trainable))?;
    let next = own.plus(&received, 1.0)?;
    let bytes = pair::join(&packed, &control);
    let summary = summary(trained, &bytes);
    Ok((Packed { bytes }, summary, next))
}

fn summary(trained: &Trained, bytes: &[u8]) -> PackSummary {
    let parameters = trained.delta().values().len();
    PackSummary {
        bits_per_parameter: bytes.len() as f64 * 8.0 / parameters as f64,
        norm: trained.delta().norm(),
    }
}
