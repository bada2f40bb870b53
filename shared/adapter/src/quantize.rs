//! Blocks of values to small integers and back: one scale a block, symmetric levels around zero.
//!
//! Between `select` or `rotate` and `entropy`. A scale is a bf16: an adapter's changes
//! span 1e-9 to 1e-1, which leaves f16's normal range at its low end (6e-5) but never bf16's, and since values
//! are divided by the *rounded* scale, bf16's shorter mantissa makes the steps at most 1/128 wider and nothing
//! else. Scales are rounded up, so that the largest value of a block still fits.
//!
//! At 8, 4 and 2 bits a block's largest value sets its scale. At 3 bits its root mean square does, and levels have no
//! bound: what counts is not how many there are but their entropy, which `shares` comes down to. A uniform
//! step with an entropy coder behind it is within 0.25 bits of the best that any code of such values can do (Gish and
//! Pierce 1968), and of all values with one mean square normal ones have the highest entropy, so the step bounds the
//! size of an update whatever it holds.

use half::bf16;
use rand::RngCore;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Step of 3-bit levels as a share of the root mean square of their block. Normal values then have an entropy of
/// ½ log₂ 2πe − log₂ 0.72 = 2.52 bits, and with the scales of blocks of 256 stay below 2.6.
pub const STEP_OF_SPREAD: f64 = 0.72;

/// Width of a quantized value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub enum Bits {
    /// 255 levels, −127 to 127.
    Eight,
    /// 15 levels, −7 to 7.
    Four,
    /// As many levels as the values need, in steps of [`STEP_OF_SPREAD`] of their root mean square: about 2.5 bits.
    Three,
    /// Three levels, −1, 0 and 1.
    Two,
}

/// A width other than 8, 4, 3 and 2.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("bits of a quantized value: expected 8, 4, 3 or 2, got {got}")]
pub struct BitsError {
    /// What was given.
    pub got: u8,
}

impl Bits {
    /// All widths, widest first.
    pub const ALL: [Self; 4] = [Self::Eight, Self::Four, Self::Three, Self::Two];

    /// The largest level. At 3 bits no honest one comes near: in a block of 4096 values the largest is 64 times the
    /// root mean square at most, and 64 / 0.72 is 89.
    pub const fn level_max(self) -> i8 {
        match self {
            Self::Eight | Self::Three => 127,
            Self::Four => 7,
            Self::Two => 1,
        }
    }
}

impl From<Bits> for u8 {
    fn from(bits: Bits) -> Self {
        match bits {
            Bits::Eight => 8,
            Bits::Four => 4,
            Bits::Three => 3,
            Bits::Two => 2,
        }
    }
}

impl TryFrom<u8> for Bits {
    type Error = BitsError;

    fn try_from(got: u8) -> Result<Self, BitsError> {
        Self::ALL.into_iter().find(|bits| u8::from(*bits) == got).ok_or(BitsError { got })
    }
}

/// Values as levels: block `i` covers levels `i·block` up to `(i+1)·block`, the last may be shorter.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Quantized {
    pub(crate) block: usize,
    pub(crate) scales: Vec<bf16>,
    pub(crate) levels: Vec<i8>,
}

/// Quantizes `values`. With `random` rounding is stochastic and unbiased, else to the nearest level.
pub(crate) fn quantize(
    values: &[f32],
    bits: Bits,
    block: usize,
    mut random: Option<&mut dyn RngCore>,
) -> Quantized {
    let mut scales = Vec::with_capacity(values.len().div_ceil(block));
    let mut levels = Vec::with_capacity(values.len());
    let level_max = f32::from(bits.level_max());
    for chunk in values.chunks(block) {
        let scale = scale_up(match bits {
            Bits::Three => (STEP_OF_SPREAD * root_mean_square(chunk)) as f32,
            _ => chunk.iter().fold(0.0_f32, |largest, value| largest.max(value.abs())) / level_max,
        });
        scales.push(scale);
        let step = scale.to_f32();
        if step == 0.0 {
            levels.resize(levels.len() + chunk.len(), 0);
            continue;
        }
        for value in chunk {
            let exact = (value / step).clamp(-level_max, level_max);
            let level = match random.as_deref_mut() {
                Some(random) => round_stochastically(exact, random),
                None => exact.round_ties_even(),
            };
            levels.push(level as i8);
        }
    }
    Quantized { block, scales, levels }
}

/// The values that the levels stand for.
pub(crate) fn dequantize(quantized: &Quantized) -> Vec<f32> {
    let mut values = Vec::with_capacity(quantized.levels.len());
    for (chunk, scale) in quantized.levels.chunks(quantized.block).zip(&quantized.scales) {
        let step = scale.to_f32();
        values.extend(chunk.iter().map(|level| f32::from(*level) * step));
    }
    values
}

/// Summed in order, so that every machine gets the same bits. Values are bounded far below the overflow of f64.
fn root_mean_square(values: &[f32]) -> f64 {
    let sum: f64 = values.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
    (sum / values.len() as f64).sqrt()
}

/// The smallest bf16 that is not below `scale`; below the normal range zero, whose block is then left to error
/// feedback.
fn scale_up(scale: f32) -> bf16 {
    if scale < f32::MIN_POSITIVE {
        return bf16::ZERO;
    }
    // A positive float's bits grow with its value. Callers bound values far below the overflow to infinity.
    bf16::from_bits((scale.to_bits().saturating_add(0xffff) >> 16) as u16)
}

/// One of the two integers around `exact`, the nearer one likelier, so that the expectation is `exact`.
fn round_stochastically(exact: f32, random: &mut dyn RngCore) -> f32 {
    let below = exact.floor();
    let unit = (random.next_u32() >> 8) as f32 / (1 << 24) as f32;
    if unit < exact - below { below + 1.0 } else { below }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{RngCore, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    proptest! {
        #[test]
        fn errors_stay_within_a_step(
            values in prop::collection::vec(-3.0_f32..3.0, 1..300),
            exponent in -30_i32..3,
            bits in prop::sample::select(&Bits::ALL[..]),
            block in prop::sample::select(&[8_usize, 64, 128][..]),
            seed: Option<u64>,
        ) {
            let values: Vec<f32> = values.iter().map(|value| value * 10_f32.powi(exponent)).collect();
            let mut random = seed.map(ChaCha8Rng::seed_from_u64);
            let source = random.as_mut().map(|random| random as &mut dyn RngCore);
            let quantized = quantize(&values, bits, block, source);
            let restored = dequantize(&quantized);
            for (chunk, back) in values.chunks(block).zip(restored.chunks(block)) {
                // Independent of the code: absmax/levels or 0.72 of the spread, 1/128 for the bf16, halved when
                // rounding to nearest.
                let largest = chunk.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
                let squares: f64 = chunk.iter().map(|value| f64::from(*value).powi(2)).sum();
                let step = match bits {
                    Bits::Three => (0.72 * (squares / chunk.len() as f64).sqrt()) as f32,
                    _ => largest / f32::from(bits.level_max()),
                } * (1.0 + 1.0 / 128.0);
                let bound = if seed.is_some() { step } else { step / 2.0 } * 1.0001 + f32::MIN_POSITIVE * 128.0;
                for (value, back) in chunk.iter().zip(back) {
                    prop_assert!((value - back).abs() <= bound, "{value} became {back}, bound {bound}");
                }
            }
        }
    }

    #[test]
    fn stochastic_rounding_is_unbiased() {
        // Per value, the mean of n draws has a deviation of at most step/(2√n); 5 of those for 64 values are
        // passed by chance with probability 4e-5, and the seed is fixed.
        let values: Vec<f32> = (0..64).map(|i| ((i * 37 % 64) as f32 / 64.0 - 0.5) * 0.02).collect();
        for bits in Bits::ALL {
            let mut random = ChaCha8Rng::seed_from_u64(7);
            let draws = 20_000;
            let mut sums = vec![0.0_f64; values.len()];
            let mut step = 0.0;
            for _ in 0..draws {
                let quantized = quantize(&values, bits, 64, Some(&mut random));
                step = quantized.scales[0].to_f64();
                sums.iter_mut().zip(dequantize(&quantized)).for_each(|(sum, v)| *sum += f64::from(v));
            }
            let bound = 5.0 * step / (2.0 * f64::from(draws).sqrt());
            for (value, sum) in values.iter().zip(sums) {
                let bias = sum / f64::from(draws) - f64::from(*value);
                assert!(bias.abs() < bound, "{bits:?}: value {value}, bias {bias}, bound {bound}");
            }
        }
    }

    #[test]
    fn nearest_rounding_of_known_values() {
        let quantized = quantize(&[7.0, -3.4, 0.4, 0.0, -7.0], Bits::Four, 64, None);
        assert_eq!(quantized.scales, [bf16::from_f32(1.0)]);
        assert_eq!(quantized.levels, [7, -3, 0, 0, -7]);
    }

    #[test]
    fn scales_are_rounded_up() {
        assert_eq!(scale_up(1.0).to_f32(), 1.0);
        assert_eq!(scale_up(1.000_001).to_f32(), 1.007_812_5);
        assert_eq!(scale_up(1e-39), bf16::ZERO);
    }
}
