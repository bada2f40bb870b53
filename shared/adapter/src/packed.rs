//! The form of a delta on the wire: written by [`compress`](fn@crate::compress) on a device, read here by the aggregator.
//!
//! ```text
//! u8 version     │ postcard: layout digest (first 16 bytes) · trainable · bits · block · rotation seed? ·
//!                 number of kept values · places of kept values (gaps, zstd; empty when all are kept) ·
//!                 scales (all high bytes, then all low bytes, of bf16; zstd) · levels (see `entropy`)
//! ```
//!
//! Version 2 has 3-bit levels, version 1 all other widths, so that an aggregator of before reads what it asks for.
//!
//! Bytes come from a stranger. The receiver's layout alone decides how much is allocated; whatever does not fit
//! it exactly is refused.

use std::sync::Arc;

use half::bf16;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::adapter::{AdapterError, first};
use crate::delta::{AdapterDelta, Trainable};
use crate::entropy::{self, Coded};
use crate::layout::AdapterLayout;
use crate::quantize::{Bits, Quantized, dequantize};
use crate::rotate::unrotate;
use crate::select;

/// Version of the form, its first byte, of a width.
pub const fn version(bits: Bits) -> u8 {
    match bits {
        Bits::Eight | Bits::Four | Bits::Two => 1,
        Bits::Three => 2,
    }
}

/// Largest magnitude that [`compress`](fn@crate::compress) packs. LoRA's changes are below 1.
pub const COMPRESSED_VALUE_MAX: f32 = 1e3;

/// Largest magnitude that is decoded. A rotated segment of 1024 values of 10³ can have a value of 32·10³; if every
/// one is off by such a step, turning back can add up to 32 · 32·10³ ≈ 10⁶ to one of them. Twice that has room for
/// the value itself and for roundings.
pub const DECODED_VALUE_MAX: f32 = 2.1e6;

/// Smallest and largest block of values with one scale.
pub const BLOCK_RANGE: std::ops::RangeInclusive<usize> = 8..=4096;

/// Fields of the frame behind the version byte, not yet checked.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Frame {
    pub(crate) layout: [u8; 16],
    pub(crate) trainable: Trainable,
    pub(crate) bits: Bits,
    pub(crate) block: u16,
    pub(crate) rotation: Option<u64>,
    pub(crate) kept: u32,
    #[serde(with = "serde_bytes")]
    pub(crate) places: Vec<u8>,
    #[serde(with = "serde_bytes")]
    pub(crate) scales: Vec<u8>,
    pub(crate) levels: Coded,
}

/// A compressed delta as it goes over the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedDelta {
    bytes: Vec<u8>,
    parameters: usize,
}

/// What a receiver accepts besides a layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Most bytes of a packed delta.
    pub bytes_max: usize,
    /// Which factors the round trains; `None` accepts either.
    pub trainable: Option<Trainable>,
}

impl DecodeLimits {
    /// What an honest device of this layout can need: see [`PackedDelta::bytes_max`].
    pub fn of(layout: &AdapterLayout, trainable: Trainable) -> Self {
        Self { bytes_max: PackedDelta::bytes_max(layout, trainable), trainable: Some(trainable) }
    }
}

/// Why bytes are not a packed delta of the expected layout.
#[derive(Debug, Error)]
pub enum DecodeError {
    /// More bytes than accepted.
    #[error("packed delta: expected at most {max} bytes, got {got}")]
    TooLong {
        /// The limit.
        max: usize,
        /// The length.
        got: usize,
    },
    /// Not a version that there is.
    #[error("packed delta: expected version 1 or 2, got {}", got.map_or_else(|| "nothing".into(), |v| v.to_string()))]
    Version {
        /// The first byte, if there is one.
        got: Option<u8>,
    },
    /// Cut off, or not of this form.
    #[error("packed delta: expected a frame of version 1 or 2, got bytes that are cut off or malformed")]
    Frame(#[source] postcard::Error),
    /// A width that belongs to another version.
    #[error("packed delta: expected {bits}-bit levels in version {expected}, got version {got}")]
    Width {
        /// The width.
        bits: u8,
        /// Its version.
        expected: u8,
        /// The first byte.
        got: u8,
    },
    /// Bytes after the end.
    #[error("packed delta: expected its end, got {got} more bytes")]
    Trailing {
        /// Their number.
        got: usize,
    },
    /// Packed for another layout.
    #[error("packed delta: expected the layout {expected}, got one of another layout")]
    Layout {
        /// The receiver's layout.
        expected: String,
    },
    /// The round trains other factors.
    #[error("packed delta: expected the trainable factors {expected:?}, got {got:?}")]
    Trainable {
        /// What the receiver wants.
        expected: Trainable,
        /// What came.
        got: Trainable,
    },
    /// A number in the header is out of bounds.
    #[error("packed delta: expected {what} from {min} to {max}, got {got}")]
    Bounds {
        /// Which number.
        what: &'static str,
        /// Smallest accepted.
        min: usize,
        /// Largest accepted.
        max: usize,
        /// What came.
        got: usize,
    },
    /// A part does not decompress to what the header promises.
    #[error("packed delta: expected {expected} {what}, got bytes that do not hold exactly those")]
    Part {
        /// `places`, `scales` or `levels`.
        what: &'static str,
        /// How many the header promises.
        expected: usize,
    },
    /// A scale is negative, infinite or no number.
    #[error("packed delta: expected a finite scale of at least 0 for block {block}, got {got}")]
    Scale {
        /// Which block.
        block: usize,
        /// What came.
        got: f32,
    },
    /// A value that no training has.
    #[error("packed delta: expected values of magnitude {DECODED_VALUE_MAX} at most, got {got}")]
    Magnitude {
        /// What came.
        got: f32,
    },
    /// The values do not make a delta.
    #[error("packed delta: its values do not make a delta")]
    Values(#[source] AdapterError),
}

impl PackedDelta {
    /// Most bytes of an honest packed delta: a byte a level, 2 bytes a block of 8, kept places with their gaps
    /// (`n + n/128`), and zstd's bound on data it cannot shrink (1/128 and 64 bytes a part).
    pub fn bytes_max(layout: &AdapterLayout, trainable: Trainable) -> usize {
        let values = layout.trainable_parameters(trainable);
        let parts =
            values + 2 * values.div_ceil(*BLOCK_RANGE.start()) + select::encoded_bytes_max(values, values);
        parts + parts / 128 + 512
    }

    /// Bytes for the wire.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Gives the bytes away.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Bits on the wire for each trainable value of the layout, all headers included.
    pub fn bits_per_parameter(&self) -> f64 {
        self.bytes.len() as f64 * 8.0 / self.parameters as f64
    }

    /// Serializes a frame of `parameters` trainable values.
    pub(crate) fn write(frame: &Frame, parameters: usize) -> Result<Self, postcard::Error> {
        let bytes = postcard::to_extend(frame, vec![version(frame.bits)])?;
        Ok(Self { bytes, parameters })
    }

    /// Reads what a peer sent. Memory and time are bounded by `layout` and `limits`, never by the content.
    pub fn decode(
        bytes: &[u8],
        layout: &Arc<AdapterLayout>,
        limits: &DecodeLimits,
    ) -> Result<AdapterDelta, DecodeError> {
        if bytes.len() > limits.bytes_max {
            return Err(DecodeError::TooLong { max: limits.bytes_max, got: bytes.len() });
        }
        let frame = read_frame(bytes)?;
        if frame.layout != layout_mark(layout) {
            return Err(DecodeError::Layout { expected: layout.to_string() });
        }
        if let Some(expected) = limits.trainable.filter(|expected| *expected != frame.trainable) {
            return Err(DecodeError::Trainable { expected, got: frame.trainable });
        }
        let total = layout.trainable_parameters(frame.trainable);
        let kept = frame.kept as usize;
        within("kept values", kept, 1, total)?;
        let block = usize::from(frame.block);
        within("values a block", block, *BLOCK_RANGE.start(), *BLOCK_RANGE.end())?;

        let places = read_places(&frame.places, kept, total)?;
        let scales = read_scales(&frame.scales, kept.div_ceil(block))?;
        let levels = entropy::decode(&frame.levels, frame.bits, kept)
            .map_err(|_| DecodeError::Part { what: "levels", expected: kept })?;
        let kept_values = restore(&Quantized { block, scales, levels }, frame.rotation);
        // Two infinite values can make a NaN when they are turned back.
        let refused = |value: f32| value.is_nan() || value.abs() > DECODED_VALUE_MAX;
        if let Some((_, got)) = first(&kept_values, refused) {
            return Err(DecodeError::Magnitude { got });
        }
        let values = scatter(kept_values, places.as_deref(), total);
        AdapterDelta::from_values(Arc::clone(layout), frame.trainable, values).map_err(DecodeError::Values)
    }
}

/// What a frame carries of a layout's digest; 128 bits tell layouts apart.
pub(crate) fn layout_mark(layout: &AdapterLayout) -> [u8; 16] {
    let digest = layout.digest();
    std::array::from_fn(|index| digest[index])
}

/// Kept values from their levels. The sender computes its error with this same function.
pub(crate) fn restore(quantized: &Quantized, rotation: Option<u64>) -> Vec<f32> {
    let mut values = dequantize(quantized);
    if let Some(seed) = rotation {
        unrotate(&mut values, seed);
    }
    values
}

/// Puts kept values at their places among `total`; without places they are all.
pub(crate) fn scatter(kept: Vec<f32>, places: Option<&[u32]>, total: usize) -> Vec<f32> {
    let Some(places) = places else { return kept };
    let mut values = vec![0.0; total];
    for (place, value) in places.iter().zip(kept) {
        if let Some(slot) = values.get_mut(*place as usize) {
            *slot = value;
        }
    }
    values
}

/// Scales as two planes: high bytes (sign and most of the exponent) repeat, low bytes do not.
pub(crate) fn scale_planes(scales: &[bf16]) -> Vec<u8> {
    let high = scales.iter().map(|scale| (scale.to_bits() >> 8) as u8);
    high.chain(scales.iter().map(|scale| scale.to_bits() as u8)).collect()
}

fn read_frame(bytes: &[u8]) -> Result<Frame, DecodeError> {
    let (got, body) = match bytes.split_first() {
        Some((&got @ 1..=2, body)) => (got, body),
        other => return Err(DecodeError::Version { got: other.map(|(version, _)| *version) }),
    };
    let (frame, rest): (Frame, &[u8]) = postcard::take_from_bytes(body).map_err(DecodeError::Frame)?;
    let expected = version(frame.bits);
    if got != expected {
        return Err(DecodeError::Width { bits: frame.bits.into(), expected, got });
    }
    if rest.is_empty() { Ok(frame) } else { Err(DecodeError::Trailing { got: rest.len() }) }
}

fn within(what: &'static str, got: usize, min: usize, max: usize) -> Result<(), DecodeError> {
    if (min..=max).contains(&got) { Ok(()) } else { Err(DecodeError::Bounds { what, min, max, got }) }
}

fn read_places(bytes: &[u8], kept: usize, total: usize) -> Result<Option<Vec<u32>>, DecodeError> {
    let malformed = || DecodeError::Part { what: "places", expected: kept };
    if kept == total {
        return if bytes.is_empty() { Ok(None) } else { Err(malformed()) };
    }
    let gaps =
        zstd::bulk::decompress(bytes, select::encoded_bytes_max(kept, total)).map_err(|_| malformed())?;
    select::decode_places(&gaps, kept, total).map(Some).ok_or_else(malformed)
}

fn read_scales(bytes: &[u8], blocks: usize) -> Result<Vec<bf16>, DecodeError> {
    let planes = entropy::inflate(bytes, 2 * blocks)
        .map_err(|_| DecodeError::Part { what: "scales", expected: blocks })?;
    let (high, low) = planes.split_at(blocks);
    let mut scales = Vec::with_capacity(blocks);
    for (block, (high, low)) in high.iter().zip(low).enumerate() {
        let scale = bf16::from_bits(u16::from(*high) << 8 | u16::from(*low));
        if !scale.is_finite() || scale.is_sign_negative() {
            return Err(DecodeError::Scale { block, got: scale.to_f32() });
        }
        scales.push(scale);
    }
    Ok(scales)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Module, Target};
    use crate::shares;

    /// 28 values.
    fn layout() -> Arc<AdapterLayout> {
        let modules = vec![Module { target: Target::K, inputs: 6, outputs: 8 }];
        Arc::new(AdapterLayout::new(1, 2, 4.0, modules).unwrap())
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        zstd::bulk::compress(bytes, 1).unwrap()
    }

    /// What an honest device could send: 28 values of level 3, in blocks of 8 of scale 0.5.
    fn honest() -> Frame {
        Frame {
            layout: layout_mark(&layout()),
            trainable: Trainable::Both,
            bits: Bits::Eight,
            block: 8,
            rotation: None,
            kept: 28,
            places: Vec::new(),
            scales: zstd(&scale_planes(&[bf16::from_f32(0.5); 4])),
            levels: Coded::Packed(zstd(&[3; 28])),
        }
    }

    fn decoded(change: impl FnOnce(&mut Frame)) -> Result<Vec<f32>, DecodeError> {
        let mut frame = honest();
        change(&mut frame);
        let packed = PackedDelta::write(&frame, 28).unwrap();
        let limits = DecodeLimits { bytes_max: 1 << 20, trainable: None };
        PackedDelta::decode(packed.as_bytes(), &layout(), &limits).map(AdapterDelta::into_values)
    }

    #[test]
    fn scales_that_are_no_positive_number_are_refused() {
        assert_eq!(decoded(|_| ()).unwrap(), [1.5; 28]);
        for scale in [bf16::NAN, bf16::INFINITY, bf16::NEG_ZERO, bf16::from_f32(-0.5)] {
            let mut scales = [bf16::ONE; 4];
            scales[2] = scale;
            let error = decoded(|frame| frame.scales = zstd(&scale_planes(&scales))).unwrap_err();
            assert!(matches!(error, DecodeError::Scale { block: 2, .. }), "{error}");
        }
    }

    #[test]
    fn values_that_no_training_has_are_refused() {
        for (rotation, scale) in [
            (None, bf16::MAX),
            (Some(1), bf16::MAX),
            (None, bf16::from_f32(1e6)),
            (Some(1), bf16::from_f32(1e6)),
        ] {
            let error = decoded(|frame| {
                frame.scales = zstd(&scale_planes(&[scale; 4]));
                frame.rotation = rotation;
            });
            assert!(matches!(error, Err(DecodeError::Magnitude { .. })), "{error:?}");
        }
    }

    /// The same 28 values at 3 bits: level 3 of scale 0.5.
    fn three_bits(frame: &mut Frame) {
        frame.bits = Bits::Three;
        frame.levels = Coded::Shared(shares::encode(&[3; 28]));
    }

    #[test]
    fn frames_of_three_bits_are_checked_like_others() {
        assert_eq!(decoded(three_bits).unwrap(), [1.5; 28]);
        for scale in [bf16::NAN, bf16::INFINITY, bf16::NEG_ZERO, bf16::from_f32(-0.5), bf16::MAX] {
            let error = decoded(|frame| {
                three_bits(frame);
                frame.scales = zstd(&scale_planes(&[scale; 4]));
            });
            let refused = matches!(error, Err(DecodeError::Scale { .. } | DecodeError::Magnitude { .. }));
            assert!(refused, "{scale}: {error:?}");
        }
        // One level more than the header says, levels of another width, and a header of another width.
        for levels in [
            Coded::Shared(shares::encode(&[3; 29])),
            Coded::Packed(zstd(&[3; 28])),
            Coded::Ternary { negative: 1, zero: 1, words: Vec::new() },
        ] {
            let error = decoded(|frame| (frame.bits, frame.levels) = (Bits::Three, levels));
            assert!(matches!(error, Err(DecodeError::Part { what: "levels", expected: 28 })), "{error:?}");
        }
        for bits in [Bits::Eight, Bits::Four, Bits::Two] {
            let error = decoded(|frame| {
                three_bits(frame);
                frame.bits = bits;
            });
            assert!(matches!(error, Err(DecodeError::Part { what: "levels", .. })), "{error:?}");
        }
    }

    #[test]
    fn a_width_of_another_version_is_refused() {
        for (width, other) in [(Bits::Eight, 2), (Bits::Three, 1)] {
            let mut frame = honest();
            if width == Bits::Three {
                three_bits(&mut frame);
            }
            let mut bytes = PackedDelta::write(&frame, 28).unwrap().into_bytes();
            bytes[0] = other;
            let limits = DecodeLimits { bytes_max: 1 << 20, trainable: None };
            let error = PackedDelta::decode(&bytes, &layout(), &limits).unwrap_err();
            assert!(matches!(error, DecodeError::Width { got, .. } if got == other), "{error}");
        }
    }

    #[test]
    fn counts_out_of_bounds_are_refused() {
        for kept in [0, 29, u32::MAX] {
            let error = decoded(|frame| frame.kept = kept).unwrap_err();
            assert!(matches!(error, DecodeError::Bounds { what: "kept values", max: 28, .. }), "{error}");
        }
        for block in [0, 7, 4097] {
            let error = decoded(|frame| frame.block = block).unwrap_err();
            assert!(matches!(error, DecodeError::Bounds { what: "values a block", .. }), "{error}");
        }
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let bomb = zstd(&vec![0; 50_000_000]);
        let part = |change: &dyn Fn(&mut Frame)| match decoded(|frame| change(frame)) {
            Err(DecodeError::Part { what, .. }) => what,
            other => panic!("expected a part to be refused, got {other:?}"),
        };
        assert_eq!(part(&|frame| frame.scales.clone_from(&bomb)), "scales");
        assert_eq!(part(&|frame| frame.scales = zstd(&[0; 6])), "scales");
        assert_eq!(part(&|frame| frame.levels = Coded::Packed(bomb.clone())), "levels");
        assert_eq!(part(&|frame| frame.levels = Coded::Packed(zstd(&[0; 27]))), "levels");
        assert_eq!(part(&|frame| frame.bits = Bits::Two), "levels");
        assert_eq!(part(&|frame| frame.places = vec![0]), "places");
        for places in [&bomb, &zstd(&[27, 0]), &zstd(&[0]), &zstd(&[0; 3]), &Vec::new()] {
            let with_two = |frame: &mut Frame| {
                frame.kept = 2;
                frame.places.clone_from(places);
            };
            assert_eq!(part(&with_two), "places");
        }
    }
}
