//! Scales of an 8-bit cache, from the keys and values that a model's layers keep over a calibration text. `compile.rs`
//! asks for them before it builds the inference graphs (`llama/infer.rs`), which hold them as constants.
//!
//! Every component of every key and value head has a scale of its own: a few components of the keys are many times
//! larger than the others (Liu et al., KIVI, [arXiv 2402.02750](https://arxiv.org/abs/2402.02750)), and one scale for
//! all of them would leave the others few codes.

use commonweal_package::ModelConfig;

use crate::layers::{CalibrateError, Calibration, Layers};
use crate::llama::block::Gives;
use crate::tensors::Tensors;

/// Codes on either side of zero.
const CODES: f32 = 127.0;

/// How much farther than what was seen a scale reaches: another text, an adapter and the rounding of the weights move
/// keys and values. It costs a third of a bit.
const MARGIN: f32 = 1.25;

/// Part of its head's farthest component that each component's scale reaches at least. What is nearly still over the text
/// may move with an adapter, and a step of a 127th of this is small beside those of the head's other components.
const LEAST: f32 = 1.0 / 16.0;

/// The scales of every layer.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheScales {
    /// Those of each layer, in order.
    pub layers: Vec<LayerScales>,
}

/// The scales of one layer: a component is its code times its scale.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerScales {
    /// Of the rotated keys, `[kv_heads, head_dim]`.
    pub key: Vec<f32>,
    /// Of the values, `[kv_heads, head_dim]`.
    pub value: Vec<f32>,
}

impl CacheScales {
    /// Runs the text once through the layers, as floats.
    pub(crate) fn observe<'a>(
        model: &'a ModelConfig,
        tensors: &'a Tensors,
        calibration: Calibration<'a>,
    ) -> Result<Self, CalibrateError> {
        let mut layers = Layers::new(model, None, tensors, calibration)?;
        let scales =
            (0..model.layers).map(|layer| observe_layer(&mut layers, layer)).collect::<Result<_, _>>()?;
        Ok(Self { layers: scales })
    }
}

fn observe_layer(layers: &mut Layers<'_>, layer: usize) -> Result<LayerScales, CalibrateError> {
    let (head_dim, rotates) = (layers.model.head_dim, layers.model.attention.rotates(layer));
    let given = layers.read(layer)?;
    let mut key = vec![0.0; layers.model.kv_size()];
    let mut value = key.clone();
    for index in 0..layers.states.len() {
        let mut outputs = layers.run(layer, &given, index, Gives::Kept)?;
        let (values, keys) = (outputs.pop().unwrap_or_default(), outputs.pop().unwrap_or_default());
        reach(&mut key, head_dim, &if rotates { radii(&keys, head_dim) } else { keys });
        reach(&mut value, head_dim, &values);
        layers.states[index] = outputs.pop().unwrap_or_default();
    }
    Ok(LayerScales { key: scales(&key, head_dim), value: scales(&value, head_dim) })
}

/// Raises each component's farthest, `[kv_heads, head_dim]`, to what `kept`, `[kv_heads, time, head_dim]`, has.
fn reach(farthest: &mut [f32], head_dim: usize, kept: &[f32]) {
    let heads = farthest.len() / head_dim;
    for (farthest, tokens) in
        farthest.chunks_exact_mut(head_dim).zip(kept.chunks_exact((kept.len() / heads).max(1)))
    {
        for token in tokens.chunks_exact(head_dim) {
            for (far, value) in farthest.iter_mut().zip(token) {
                *far = far.max(value.abs());
            }
        }
    }
}

/// For each component of rotated keys how large a rotation can make it: the text is short, and at a later position a pair
/// `(i, i + head_dim / 2)` has turned farther.
fn radii(keys: &[f32], head_dim: usize) -> Vec<f32> {
    let radii = |key: &[f32]| {
        let (left, right) = key.split_at(head_dim / 2);
        let pair: Vec<f32> = left.iter().zip(right).map(|(a, b)| a.hypot(*b)).collect();
        [pair.clone(), pair].concat()
    };
    keys.chunks_exact(head_dim).flat_map(radii).collect()
}

fn scales(farthest: &[f32], head_dim: usize) -> Vec<f32> {
    let of_head = |head: &[f32]| {
        let least = LEAST * head.iter().copied().fold(0.0, f32::max);
        // A head that is still throughout needs any scale but zero.
        let scale = move |&far: &f32| if least > 0.0 { MARGIN / CODES * far.max(least) } else { 1.0 };
        head.iter().map(scale).collect::<Vec<_>>()
    };
    farthest.chunks_exact(head_dim).flat_map(of_head).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed test may panic")]
mod tests {
    use commonweal_package::{Bits, Package};
    use commonweal_runtime::{Cancel, Model, OpenOptions, TrainingRow};
    use tempfile::TempDir;

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::compile::{CacheBits, CompileOptions, compile_with};
    use crate::layers::tests::{VARIANTS, goldens, library, tokens};

    /// Differences of log-probabilities in nats: the mean's and the largest's; measured are 0.03 and 0.11 at most. The
    /// goldens' weights are large, so that an error shows; `tests/int8_cache.rs` has a trained model.
    const TOLERANCES: [f32; 2] = [0.04, 0.2];

    #[test]
    fn a_component_reaches_as_far_as_its_pair_can_turn_and_a_quarter_more() {
        // Two heads of four components, two tokens.
        let keys = [3.0, 0.0, 4.0, 0.0, -0.6, 1.0, 0.8, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        let mut farthest = vec![0.0; 8];
        reach(&mut farthest, 4, &radii(&keys, 4));
        assert_eq!(farthest, [5.0, 1.0, 5.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        let mut plain = vec![0.0; 8];
        reach(&mut plain, 4, &keys);
        assert_eq!(plain, [3.0, 1.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        let codes: Vec<f32> = scales(&plain, 4).iter().map(|scale| scale * CODES / MARGIN).collect();
        for (code, want) in codes[..4].iter().zip([3.0, 1.0, 4.0, 0.25]) {
            assert!((code - want).abs() < 1e-6, "{codes:?}");
        }
        assert_eq!(scales(&plain, 4)[4..], [1.0; 4]);
    }

    #[test]
    fn pairs_share_a_scale_where_a_layer_rotates() {
        for variant in VARIANTS {
            let checkpoint = Checkpoint::open(goldens(variant).path(), None).unwrap();
            let (tokens, mut engine) = (tokens(128), library());
            let calibration = Calibration { tokens: &tokens, engine: &mut engine };
            let model = &checkpoint.model;
            let scales = CacheScales::observe(model, &checkpoint.tensors, calibration).unwrap();
            assert_eq!(scales.layers.len(), model.layers);
            for (layer, LayerScales { key, value }) in scales.layers.iter().enumerate() {
                assert_eq!((key.len(), value.len()), (model.kv_size(), model.kv_size()));
                assert!(key.iter().chain(value).all(|scale| scale.is_finite() && *scale > 0.0));
                let paired = |scales: &[f32]| {
                    scales.chunks(model.head_dim).all(|head| {
                        let (left, right) = head.split_at(model.head_dim / 2);
                        left == right
                    })
                };
                assert_eq!(
                    (paired(key), paired(value)),
                    (model.attention.rotates(layer), false),
                    "{variant}"
                );
            }
        }
    }
    #[test]
    fn every_architecture_computes_nearly_the_same_with_an_8_bit_cache() {
        let (ids, text) = (tokens(40), tokens(128));
        let mut found = Vec::new();
        for variant in VARIANTS {
            let source = goldens(variant);
            let scored = |cache| {
                let folder = TempDir::new().unwrap();
                let out = folder.path().join("package");
                let options =
                    CompileOptions { bits: Bits::Full, cache, ..CompileOptions::new(source.path(), &out) };
                let mut engine = library();
                let calibration =
                    (cache == CacheBits::Eight).then_some(Calibration { tokens: &text, engine: &mut engine });
                compile_with(&options, calibration, &mut |_, _| ()).unwrap();
                // In several runs, so that what was kept is read back.
                let options = OpenOptions { prefill_tokens_max: 7, ..OpenOptions::default() };
                let model = Model::open(&library(), &Package::open(&out).unwrap(), options).unwrap();
                let row = TrainingRow { weights: vec![1.0; ids.len()], ids: ids.clone() };
                let base = model.prepare(None).unwrap();
                model.score_rows(&base, &[row], &Cancel::new()).unwrap().remove(0).token_logprobs
            };
            let (floats, bytes) = (scored(CacheBits::Full), scored(CacheBits::Eight));
            let differences: Vec<f32> = floats.iter().zip(&bytes).map(|(a, b)| (a - b).abs()).collect();
            let largest = differences.iter().copied().fold(0.0, f32::max);
            let mean = differences.iter().sum::<f32>() / differences.len() as f32;
            println!("{variant}: mean difference {mean:.4}, largest {largest:.4}");
            found.push((variant, mean, largest));
        }
        for (variant, mean, largest) in found {
            assert!(mean > 0.0 && mean < TOLERANCES[0], "{variant}: mean {mean}");
            assert!(largest < TOLERANCES[1], "{variant}: largest {largest}");
        }
    }
}
