//! GPTQ and the weighted search against independent implementations (`goldens/make_gptq.py`, in the paper's own form, and
//! `goldens/make_wmse.py`), and what the first is for: less error in the outputs than rounding to nearest leaves.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

use std::path::Path;

use commonweal_compiler::calibrate::tokens_min;
use commonweal_compiler::gptq::{DAMPING, Hessian, HessianError};
use commonweal_compiler::layers::used;
use commonweal_compiler::quantize::{BlockFormat, Quantized, Scale};
use commonweal_compiler::{Accuracy, Bits, Quantization};
use commonweal_package::ModelConfig;
use safetensors::SafeTensors;

const COLUMNS: usize = 256;

struct Goldens(Vec<u8>);

impl Goldens {
    fn read() -> Self {
        Self::of("gptq.safetensors")
    }

    fn of(name: &str) -> Self {
        Self(std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens").join(name)).unwrap())
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().data().to_vec()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.bytes(name).as_chunks().0.iter().map(|&four| f32::from_le_bytes(four)).collect()
    }

    fn hessian(&self) -> Hessian {
        let mut hessian = Hessian::new(COLUMNS);
        hessian.add(&self.floats("gram"));
        hessian
    }
}

fn format(bits: u8, block_size: usize) -> BlockFormat {
    let quantization =
        Quantization { bits: Bits::try_from(bits).unwrap(), block_size, accuracy: Accuracy::Exact };
    BlockFormat::of(&quantization).unwrap()
}

fn unpacked(bits: u8, codes: &[u8]) -> Vec<u8> {
    match bits {
        4 => codes.iter().flat_map(|byte| [byte & 15, byte >> 4]).collect(),
        _ => codes.to_vec(),
    }
}

#[test]
fn codes_and_scales_are_the_papers() {
    let goldens = Goldens::read();
    let feedback = goldens.hessian().factor(DAMPING).unwrap();
    for (bits, block_size) in [(4, 32), (4, 64), (4, 128), (8, 32)] {
        let name = format!("{bits}.{block_size}");
        let Quantized { codes, scales } =
            feedback.round(format(bits, block_size), &goldens.floats("weights"));
        let wanted = goldens.floats(&format!("scales.{name}"));
        let off = scales.iter().zip(&wanted).map(|(got, wanted)| (got / wanted - 1.0).abs());
        assert!(off.fold(0.0, f32::max) < 1e-4, "scales of {name}");
        assert_eq!(unpacked(bits, &codes), goldens.bytes(&format!("codes.{name}")), "codes of {name}");
    }
}

#[test]
fn weighted_codes_and_scales_are_those_of_weighted_least_squares() {
    let (weights, goldens) = (Goldens::read().floats("weights"), Goldens::of("wmse.safetensors"));
    for (bits, block_size) in [(4, 32), (4, 64), (4, 128), (8, 32)] {
        let name = format!("{bits}.{block_size}");
        let Quantized { codes, scales } = format(bits, block_size).quantize(&weights, Scale::Weighted);
        let wanted = goldens.floats(&format!("scales.{name}"));
        let off = scales.iter().zip(&wanted).map(|(got, wanted)| (got / wanted - 1.0).abs());
        assert!(off.fold(0.0, f32::max) < 1e-4, "scales of {name}");
        assert_eq!(unpacked(bits, &codes), goldens.bytes(&format!("codes.{name}")), "codes of {name}");
    }
}

/// `Σ e H eᵀ` over the rows of the error: the squared error of the outputs over the calibration.
fn output_error(weights: &[f32], rounded: &[f32], gram: &[f32]) -> f64 {
    let row_error = |(weights, rounded): (&[f32], &[f32])| {
        let error: Vec<f64> = weights.iter().zip(rounded).map(|(a, b)| f64::from(a - b)).collect();
        let product = |row: &[f32]| row.iter().zip(&error).map(|(h, e)| f64::from(*h) * e).sum::<f64>();
        gram.chunks(COLUMNS).zip(&error).map(|(row, error)| error * product(row)).sum::<f64>()
    };
    weights.chunks(COLUMNS).zip(rounded.chunks(COLUMNS)).map(row_error).sum()
}

#[test]
fn outputs_are_closer_than_with_rounding_to_nearest() {
    let goldens = Goldens::read();
    let (weights, gram) = (goldens.floats("weights"), goldens.floats("gram"));
    let feedback = goldens.hessian().factor(DAMPING).unwrap();
    for format in [format(4, 32), format(4, 128), format(8, 64)] {
        let error = |quantized| output_error(&weights, &format.dequantize(&quantized, COLUMNS), &gram);
        let nearest = error(format.quantize(&weights, Scale::Search));
        let chosen = error(feedback.round(format, &weights));
        assert!(chosen < 0.6 * nearest, "{format:?}: {chosen} with feedback, {nearest} to nearest");
    }
}

#[test]
fn inputs_that_do_not_depend_on_each_other_leave_rounding_to_nearest() {
    let mut diagonal = vec![0.0; 64 * 64];
    (0..64).for_each(|at| diagonal[at * 65] = 1.0 + at as f32);
    let mut hessian = Hessian::new(64);
    hessian.add(&diagonal);
    let weights: Vec<f32> = (0..64 * 5).map(|at| (at as f32 * 0.7).sin()).collect();
    // Refitted scales move a weight that lies half-way between two codes, so codes may differ by one there.
    let format = format(8, 32);
    let (chosen, nearest) =
        (hessian.factor(DAMPING).unwrap().round(format, &weights), format.quantize(&weights, Scale::Search));
    assert_eq!(chosen.scales, nearest.scales);
    assert!(chosen.codes.iter().zip(&nearest.codes).all(|(a, b)| a.abs_diff(*b) <= 1));
}

#[test]
fn dead_inputs_lose_their_weights_and_a_hessian_of_nothing_is_no_error() {
    let weights = vec![0.5; 32 * 2];
    let quantized = Hessian::new(32).factor(DAMPING).unwrap().round(format(4, 32), &weights);
    assert!(format(4, 32).dequantize(&quantized, 32).iter().all(|weight| weight.abs() < f32::EPSILON));
}

#[test]
fn whole_sequences_cover_the_widest_layer() {
    let model = |intermediate: usize, context: usize| -> ModelConfig {
        serde_json::from_value(serde_json::json!({
            "architecture": "llama", "name": "x", "hidden_size": 64, "intermediate_size": intermediate,
            "layers": 1, "heads": 4, "kv_heads": 4, "head_dim": 16, "vocab_size": 99, "context": context,
            "rope_theta": 10_000.0, "rms_norm_eps": 1e-5, "tied": true,
        }))
        .unwrap()
    };
    for (intermediate, context, least) in
        [(600, 2048, 1024), (512, 2048, 512), (100, 64, 128), (100, 2048, 512)]
    {
        assert_eq!(tokens_min(&model(intermediate, context)), least, "{intermediate}, {context}");
    }
    assert_eq!(used(&model(600, 2048), &[7; 1100]).len(), 1024);
}

#[test]
fn impossible_hessians_are_refused() {
    let factor = |gram: [f32; 4], damping| {
        let mut hessian = Hessian::new(2);
        hessian.add(&gram);
        hessian.factor(damping).map(|_| ())
    };
    assert!(matches!(
        factor([1.0, 0.0, 0.0, f32::NAN], 0.01),
        Err(HessianError::NotFinite { column: 1, .. })
    ));
    assert!(matches!(
        factor([1.0, 2.0, 2.0, 1.0], 0.01),
        Err(HessianError::NotDefinite { column: 0, got }) if got < 0.0
    ));
    assert!(factor([1.0, 1.0, 1.0, 1.0], 0.01).is_ok(), "damping makes up for equal inputs");
}
