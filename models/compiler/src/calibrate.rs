//! Codes by what a model's linear layers see over a calibration text: `gptq.rs` chooses them, layer by layer, as
//! `weights.rs` comes to each matrix. The way through the layers is `layers.rs`.
//!
//! A layer is run twice over the whole text: as floats for its Hessians, then with its chosen codes, so that the next
//! layer sees what the earlier ones really leave (as the paper's own code does). In memory, beside what `layers.rs`
//! holds, are the layer's four Hessians and one Hessian factor (inputs² · 8 bytes, 189 MB for the widest of
//! Qwen2.5-0.5B).

use std::collections::BTreeMap;

use commonweal_package::ModelConfig;

use crate::gptq::{DAMPING, Hessian};
use crate::layers::{CalibrateError, Calibration, Given, Layers, sequence_tokens};
use crate::llama::block::{Gives, LINEARS};
use crate::quantize::{BlockFormat, Quantized};
use crate::tensors::Tensors;

/// The fewest tokens that a model is calibrated by: with fewer than a layer has inputs, its Hessian says nothing about
/// some directions, and the error there goes unseen.
pub fn tokens_min(model: &ModelConfig) -> usize {
    let widest = model.hidden_size.max(model.query_size()).max(model.intermediate_size);
    widest.next_multiple_of(sequence_tokens(model))
}

/// The codes of the layers that the text has come to.
pub(crate) struct Calibrator<'a> {
    layers: Layers<'a>,
    format: BlockFormat,
    next: usize,
    ready: BTreeMap<String, Quantized>,
}

impl<'a> Calibrator<'a> {
    pub(crate) fn new(
        model: &'a ModelConfig,
        format: BlockFormat,
        tensors: &'a Tensors,
        calibration: Calibration<'a>,
    ) -> Result<Self, CalibrateError> {
        let (needed, got) = (tokens_min(model), calibration.tokens.len());
        if got < needed {
            return Err(CalibrateError::TooFew { needed, got });
        }
        // The embedding is not calibrated.
        let layers = Layers::new(model, Some(format), tensors, calibration)?;
        Ok(Self { layers, format, next: 0, ready: BTreeMap::new() })
    }

    /// The codes of a matrix of `weights.bin`; `None` for those outside the layers. Layers must be asked for in order.
    pub(crate) fn matrix(&mut self, name: &str) -> Result<Option<Quantized>, CalibrateError> {
        let next = format!("layers.{}.", self.next);
        if self.next < self.layers.model.layers && name.starts_with(&next) {
            self.layer(self.next)?;
            self.next += 1;
        }
        Ok(self.ready.remove(name))
    }

    fn layer(&mut self, layer: usize) -> Result<(), CalibrateError> {
        let mut given = self.layers.read(layer)?;
        let hessians = self.observe(layer, &given)?;
        for (name, hessian) in LINEARS.into_iter().zip(hessians) {
            let matrix = format!("layers.{layer}.{name}");
            let feedback = hessian
                .factor(DAMPING)
                .map_err(|source| CalibrateError::Hessian { matrix: matrix.clone(), source })?;
            if let Some(tensor) = given.iter_mut().find(|tensor| tensor.name == name) {
                let quantized = feedback.round(self.format, &tensor.values);
                tensor.values = self.format.dequantize(&quantized, feedback.inputs());
                self.ready.insert(matrix, quantized);
            }
        }
        if layer + 1 < self.layers.model.layers { self.layers.advance(layer, &given) } else { Ok(()) }
    }

    /// The Hessians of a layer's linears over all sequences.
    fn observe(&mut self, layer: usize, given: &[Given]) -> Result<Vec<Hessian>, CalibrateError> {
        let inputs = given.iter().filter(|tensor| LINEARS.contains(&tensor.name.as_str()));
        let mut hessians: Vec<Hessian> = inputs.map(|tensor| Hessian::new(tensor.shape[1])).collect();
        for index in 0..self.layers.states.len() {
            let grams = self.layers.run(layer, given, index, Gives::Grams)?;
            hessians.iter_mut().zip(grams).for_each(|(hessian, gram)| hessian.add(&gram));
        }
        Ok(hessians)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed test may panic")]
mod tests {
    use commonweal_package::{Accuracy, Bits, Quantization};

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::layers::tests::{VARIANTS, goldens, library, tokens};

    fn four_bits() -> BlockFormat {
        let quantization = Quantization { bits: Bits::Four, block_size: 32, accuracy: Accuracy::Exact };
        BlockFormat::of(&quantization).expect("quantized")
    }

    #[test]
    fn grams_are_those_of_the_inputs() {
        let checkpoint = Checkpoint::open(goldens("tied").path(), None).unwrap();
        let (tokens, mut engine) = (tokens(128), library());
        let calibration = Calibration { tokens: &tokens, engine: &mut engine };
        let mut calibrator =
            Calibrator::new(&checkpoint.model, four_bits(), &checkpoint.tensors, calibration).unwrap();
        let given = calibrator.layers.read(0).unwrap();
        let hessians = calibrator.observe(0, &given).unwrap();
        // The first linear reads the normed embedding, which is easily had without a graph.
        let norm = &given.iter().find(|tensor| tensor.name == "attn_norm").unwrap().values;
        let hidden = norm.len();
        let mut wanted = vec![0.0_f64; hidden * hidden];
        for state in calibrator.layers.states.iter().flat_map(|states| states.chunks(hidden)) {
            let square: f64 = state.iter().map(|x| f64::from(*x).powi(2)).sum();
            let root = (square / hidden as f64 + checkpoint.model.rms_norm_eps).sqrt();
            let normed: Vec<f64> =
                state.iter().zip(norm).map(|(x, w)| f64::from(*x) / root * f64::from(*w)).collect();
            for (at, sum) in wanted.iter_mut().enumerate() {
                *sum += normed[at / hidden] * normed[at % hidden];
            }
        }
        assert_eq!(hessians.iter().map(Hessian::inputs).collect::<Vec<_>>(), [32, 64, 32, 64]);
        for (got, want) in hessians[0].values().zip(wanted) {
            assert!((got - want).abs() < 1e-3 * want.abs().max(1.0), "{got}, by hand {want}");
        }
    }

    #[test]
    fn every_architecture_is_calibrated() {
        for variant in VARIANTS {
            let checkpoint = Checkpoint::open(goldens(variant).path(), None).unwrap();
            let (tokens, mut engine) = (tokens(256), library());
            let calibration = Calibration { tokens: &tokens, engine: &mut engine };
            let model = &checkpoint.model;
            let mut calibrator =
                Calibrator::new(model, four_bits(), &checkpoint.tensors, calibration).unwrap();
            assert!(calibrator.matrix("embed").unwrap().is_none(), "the embedding stays");
            for layer in 0..model.layers {
                for linear in LINEARS {
                    let quantized = calibrator.matrix(&format!("layers.{layer}.{linear}")).unwrap().unwrap();
                    assert!(
                        quantized.scales.iter().all(|scale| scale.is_finite()),
                        "{variant} {layer} {linear}"
                    );
                }
            }
            assert!(calibrator.matrix("head").unwrap().is_none() && calibrator.ready.is_empty());
        }
    }

    #[test]
    fn too_little_text_and_foreign_tokens_are_refused() {
        let checkpoint = Checkpoint::open(goldens("tied").path(), None).unwrap();
        let mut engine = library();
        let mut refuse = |tokens: &[u32]| {
            let calibration = Calibration { tokens, engine: &mut engine };
            let refused = Calibrator::new(&checkpoint.model, four_bits(), &checkpoint.tensors, calibration);
            refused.err().unwrap().to_string()
        };
        assert!(refuse(&tokens(63)).contains("at least 64 tokens"));
        assert!(refuse(&[4000; 64]).contains("below 128, got 4000"));
    }
}
