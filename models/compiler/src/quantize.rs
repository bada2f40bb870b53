//! Blockwise symmetric quantization to 4 and 8 bits, in the layout that ONNX Runtime's `MatMulNBits` and
//! `GatherBlockQuantized` share. `weights.rs` sends rows through here on their way to `weights.bin`, or through
//! `gptq.rs`, which chooses other codes on the same grid.
//!
//! A row of `k` weights is cut into blocks; a block has one f32 scale `s` and one code `c` per weight, and stands for
//! the weights `s · (c - zero)`, where `zero` is 8 or 128, the operators' default zero point. Codes are packed in
//! order, at 4 bits two to a byte, the first in the low half. A row whose length is not a multiple of the block is filled
//! up with zeros.
//!
//! The scale is the extreme weight's, or chosen by a small search, after `make_qx_quants` of llama.cpp's k-quants: the extreme weight is put at
//! a few places around the end of the codes' range, every weight is rounded to the nearest code, and the scale is
//! refitted to those codes by least squares; the try with the smallest squared error wins. As in llama.cpp, the error of
//! a large weight may count more: where all count alike, the search pays for many small errors with the block's few large
//! weights, which are what a network leans on. llama.cpp counts by the square of a weight, we by its size
//! (docs/quantization.md).

use std::borrow::Cow;

use commonweal_package::{Bits, Quantization};

/// Tries on either side of the plain scale. More than nine were not seen to help.
const TRIES: i32 = 9;

/// How far one try moves the extreme weight, in codes.
const STEP: f32 = 0.1;

/// Bits and block of a quantized matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockFormat {
    bits: u32,
    block_size: usize,
}

/// How a block's scale is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// The extreme weight gets the lowest code: plain rounding to nearest, as llama.cpp's `q4_0` and ONNX Runtime's own
    /// quantizer have it.
    Extreme,
    /// The least squared error among a few tries.
    Search,
    /// The same with each weight's squared error counted as often as the weight is large.
    Weighted,
}

/// The scales of the embedding and the head, where the layers between are calibrated: one matrix may be both, and an
/// embedding's input is one row.
pub(crate) const UNCALIBRATED: Scale = Scale::Weighted;

/// Quantized rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantized {
    /// Codes, `block_size · bits / 8` bytes per block.
    pub codes: Vec<u8>,
    /// One scale per block.
    pub scales: Vec<f32>,
}

impl Quantized {
    /// Rows one below the other.
    pub(crate) fn joined(parts: Vec<Self>) -> Self {
        let mut whole = Self { codes: Vec::new(), scales: Vec::new() };
        for part in parts {
            whole.codes.extend(part.codes);
            whole.scales.extend(part.scales);
        }
        whole
    }
}

impl BlockFormat {
    /// The format of a quantization; none at 32 bits.
    pub fn of(quantization: &Quantization) -> Option<Self> {
        let block_size = quantization.block_size;
        match quantization.bits {
            Bits::Four => Some(Self { bits: 4, block_size }),
            Bits::Eight => Some(Self { bits: 8, block_size }),
            Bits::Full => None,
        }
    }

    /// The code that stands for zero.
    pub fn zero(self) -> i32 {
        1 << (self.bits - 1)
    }

    /// Bytes of a block's codes.
    pub fn block_bytes(self) -> usize {
        self.block_size * self.bits as usize / 8
    }

    /// Rows of `columns` weights, each filled up with zeros to whole blocks.
    pub fn filled(self, weights: &[f32], columns: usize) -> Cow<'_, [f32]> {
        let width = columns.next_multiple_of(self.block_size);
        if width == columns {
            return Cow::Borrowed(weights);
        }
        let mut filled = Vec::with_capacity(weights.len() / columns * width);
        for row in weights.chunks_exact(columns) {
            filled.extend_from_slice(row);
            filled.resize(filled.len() + width - columns, 0.0);
        }
        Cow::Owned(filled)
    }

    /// Weights that share a scale.
    pub fn block_size(self) -> usize {
        self.block_size
    }

    /// Quantizes whole blocks of finite weights.
    pub fn quantize(self, weights: &[f32], scale: Scale) -> Quantized {
        let blocks = weights.chunks_exact(self.block_size);
        let mut codes = Vec::with_capacity(blocks.len() * self.block_bytes());
        let mut scales = Vec::with_capacity(blocks.len());
        let mut offsets = vec![0; self.block_size];
        for block in blocks {
            scales.push(match scale {
                Scale::Extreme => self.nearest(block, &mut offsets),
                Scale::Search => self.fit(block, |_| 1.0, &mut offsets),
                Scale::Weighted => self.fit(block, f32::abs, &mut offsets),
            });
            self.pack(&offsets, &mut codes);
        }
        Quantized { codes, scales }
    }

    /// The rows of `columns` weights that codes and scales stand for, exactly as the graphs compute them.
    pub fn dequantize(self, quantized: &Quantized, columns: usize) -> Vec<f32> {
        let blocks = quantized.codes.chunks_exact(self.block_bytes()).zip(&quantized.scales);
        let mut weights = Vec::with_capacity(quantized.scales.len() * self.block_size);
        for (codes, scale) in blocks {
            for &byte in codes {
                if self.bits == 4 {
                    weights.push(scale * (i32::from(byte & 15) - self.zero()) as f32);
                    weights.push(scale * (i32::from(byte >> 4) - self.zero()) as f32);
                } else {
                    weights.push(scale * (i32::from(byte) - self.zero()) as f32);
                }
            }
        }
        let width = columns.next_multiple_of(self.block_size);
        if width > columns {
            weights = weights.chunks_exact(width).flat_map(|row| &row[..columns]).copied().collect();
        }
        weights
    }

    /// The code, less the zero point, that is nearest to `weight · inverse`.
    pub(crate) fn offset(self, weight: f32, inverse: f32) -> i32 {
        ((weight * inverse).round_ties_even() as i32).clamp(-self.zero(), self.zero() - 1)
    }

    /// The scale by the extreme weight, and each weight's code less the zero point.
    fn nearest(self, block: &[f32], offsets: &mut [i32]) -> f32 {
        offsets.fill(0);
        let inverse = -(self.zero() as f32) / extreme(block);
        if !inverse.is_finite() {
            return 0.0;
        }
        for (offset, &weight) in offsets.iter_mut().zip(block) {
            *offset = self.offset(weight, inverse);
        }
        inverse.recip()
    }

    /// Finds a block's scale, and leaves its codes less the zero point in `best`. `counts` tells how much the squared error
    /// of a weight counts.
    pub(crate) fn fit(self, block: &[f32], counts: impl Fn(f32) -> f32, best: &mut [i32]) -> f32 {
        best.fill(0);
        let extreme = extreme(block);
        let mut best_scale = 0.0;
        let mut best_gain = 0.0;
        let mut offsets = vec![0; block.len()];
        for attempt in -TRIES..=TRIES {
            // The range has one more code below zero than above, so the extreme weight goes below, whatever its sign.
            let inverse = -(self.zero() as f32 + STEP * attempt as f32) / extreme;
            if !inverse.is_finite() {
                // The block is zero, or so near that it may as well be.
                return best_scale;
            }
            let (mut product, mut square) = (0.0_f64, 0.0_f64);
            for (offset, &weight) in offsets.iter_mut().zip(block) {
                *offset = self.offset(weight, inverse);
                let counted = f64::from(counts(weight)) * f64::from(*offset);
                product += f64::from(weight) * counted;
                square += f64::from(*offset) * counted;
            }
            // With the least-squares scale the squared error is that of all zeros less this gain.
            let gain = product * product / square;
            if gain > best_gain {
                best_gain = gain;
                best_scale = (product / square) as f32;
                best.copy_from_slice(&offsets);
            }
        }
        best_scale
    }

    /// Appends a block's codes.
    pub(crate) fn pack(self, offsets: &[i32], codes: &mut Vec<u8>) {
        let code = |offset: i32| (offset + self.zero()) as u8;
        if self.bits == 4 {
            codes.extend(offsets.as_chunks().0.iter().map(|&[low, high]| code(low) | code(high) << 4));
        } else {
            codes.extend(offsets.iter().map(|&offset| code(offset)));
        }
    }
}

/// The weight farthest from zero; zero for none.
fn extreme(block: &[f32]) -> f32 {
    block.iter().copied().fold(0.0, |a: f32, b| if b.abs() > a.abs() { b } else { a })
}

#[cfg(test)]
mod tests {
    use commonweal_package::Accuracy;
    use proptest::prelude::*;

    use super::*;

    fn format(bits: Bits, block_size: usize) -> BlockFormat {
        let quantization = Quantization { bits, block_size, accuracy: Accuracy::Exact };
        BlockFormat::of(&quantization).expect("quantized")
    }

    fn error(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    #[test]
    fn packs_low_half_first() {
        let mut weights = vec![0.0; 32];
        weights[0] = -8.0;
        weights[1] = 7.0;
        weights[3] = 1.0;
        let four = format(Bits::Four, 32).quantize(&weights, Scale::Search);
        assert_eq!(four.scales, [1.0]);
        assert_eq!(four.codes[..3], [0xf0, 0x98, 0x88]);
        let mut weights = vec![0.0; 32];
        weights[0] = -128.0;
        weights[1] = 127.0;
        let eight = format(Bits::Eight, 32).quantize(&weights, Scale::Search);
        assert_eq!((eight.scales[0], &eight.codes[..3]), (1.0, &[0, 255, 128][..]));
    }

    #[test]
    fn a_row_is_filled_up_to_whole_blocks() {
        let weights: Vec<f32> = (0..2 * 96).map(|i| (i as f32 * 0.7).sin()).collect();
        let (long, short) = (format(Bits::Four, 64), format(Bits::Four, 32));
        let filled = long.quantize(&long.filled(&weights, 96), Scale::Search);
        assert_eq!((filled.scales.len(), filled.codes.len()), (4, 2 * 64));
        // The second block of a row holds 32 weights and as many zeros: what a block of those 32 alone would be.
        let alone = short.quantize(&weights[64..96], Scale::Search);
        assert_eq!((filled.scales[1], &filled.codes[32..48]), (alone.scales[0], &alone.codes[..]));
        assert!(filled.codes[48..64].iter().all(|&codes| codes == 0x88));
        let back = long.dequantize(&filled, 96);
        assert_eq!(back.len(), weights.len());
        assert!(error(&weights, &back) < 0.01 * weights.iter().map(|w| f64::from(w * w)).sum::<f64>());
    }

    #[test]
    fn zero_and_tiny_blocks_become_zero() {
        for weight in [0.0, 1e-44] {
            let four = format(Bits::Four, 32);
            let quantized = four.quantize(&[weight; 32], Scale::Search);
            assert!(four.dequantize(&quantized, 32).iter().all(|value| value.abs() <= weight));
        }
    }

    #[test]
    fn search_beats_the_plain_scale() {
        let weights: Vec<f32> = (0..1024).map(|i| ((i * i) as f32 * 0.37).sin().powi(3)).collect();
        let four = format(Bits::Four, 32);
        let searched = error(&weights, &four.dequantize(&four.quantize(&weights, Scale::Search), 1024));
        let plain = error(&weights, &four.dequantize(&four.quantize(&weights, Scale::Extreme), 1024));
        assert!(searched < 0.9 * plain, "searched {searched}, plain {plain}");
    }

    #[test]
    fn weighted_search_spares_the_large_weights() {
        let weights: Vec<f32> = (0..1024).map(|i| ((i * i) as f32 * 0.37).sin().powi(3)).collect();
        let four = format(Bits::Four, 32);
        let rounded = |scale| four.dequantize(&four.quantize(&weights, scale), 1024);
        let counted = |rounded: &[f32]| {
            let errors =
                weights.iter().zip(rounded).map(|(w, r)| f64::from(w.abs()) * f64::from(w - r).powi(2));
            errors.sum::<f64>()
        };
        let (alike, by_size) = (rounded(Scale::Search), rounded(Scale::Weighted));
        assert!(counted(&by_size) < 0.98 * counted(&alike), "{} {}", counted(&by_size), counted(&alike));
        assert!(error(&weights, &by_size) > error(&weights, &alike));
    }

    proptest! {
        #[test]
        fn error_is_within_one_step(
            weights in prop::collection::vec(-1e3_f32..1e3, 128),
            (bits, block_size) in prop_oneof![Just((Bits::Four, 32)), Just((Bits::Four, 128)), Just((Bits::Eight, 64))],
        ) {
            let format = format(bits, block_size);
            let back = format.dequantize(&format.quantize(&weights, Scale::Search), 128);
            for (block, back) in weights.chunks(block_size).zip(back.chunks(block_size)) {
                let extreme = block.iter().fold(0.0_f64, |a, b| a.max(f64::from(b.abs())));
                // Half a step everywhere would cost at most this; the search may only do better in the sum.
                let step = extreme / f64::from(format.zero() - 1);
                prop_assert!(error(block, back) <= block.len() as f64 * step * step / 4.0 + 1e-9);
            }
        }

        #[test]
        fn quantizing_again_changes_nothing(weights in prop::collection::vec(-1.0_f32..1.0, 64)) {
            let format = format(Bits::Eight, 32);
            let once = format.dequantize(&format.quantize(&weights, Scale::Search), 64);
            let twice = format.dequantize(&format.quantize(&once, Scale::Search), 64);
            prop_assert!(error(&once, &twice) < 1e-9);
        }
    }
}
