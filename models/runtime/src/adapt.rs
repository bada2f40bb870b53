//! Turns a canonical adapter into the fused inputs of the inference graph. `model.rs` calls it, `infer.rs` binds the
//! result. One base serves many adapters: each call names the one it wants.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use commonweal_adapter::{Adapter, AdapterLayout, Part, Target, TensorSpec};
use commonweal_package::ModelConfig;
use ndarray::Array2;
use ort::value::Tensor;

/// The linears that the graph multiplies together, in the order of their outputs.
const FUSED: [(&str, &[Target]); 4] = [
    ("qkv", &[Target::Q, Target::K, Target::V]),
    ("o", &[Target::O]),
    ("gate_up", &[Target::Gate, Target::Up]),
    ("down", &[Target::Down]),
];

/// An adapter in the form that the graph takes. Cheap to clone; made by [`crate::Model::prepare`].
#[derive(Clone, Debug)]
pub struct PreparedAdapter {
    inner: Arc<Prepared>,
}

#[derive(Debug)]
struct Prepared {
    identity: u64,
    model: u64,
    adapted: bool,
    inputs: Vec<(String, Tensor<f32>)>,
}

/// Why an adapter does not fit a model.
#[derive(Debug, thiserror::Error)]
pub enum AdaptError {
    /// The adapter is for a model of another depth.
    #[error("adapter must have {expected} layers, got {got}")]
    Layers {
        /// Layers of the model.
        expected: usize,
        /// Layers of the adapter.
        got: usize,
    },
    /// The adapter is for a model of other widths.
    #[error("adapter's {target} must be {expected:?} (inputs, outputs), got {got:?}")]
    Shape {
        /// The linear.
        target: Target,
        /// Inputs and outputs of the model's linear.
        expected: (usize, usize),
        /// Inputs and outputs of the adapter's.
        got: (usize, usize),
    },
    /// A value is NaN or infinite.
    #[error("adapter value {index} must be finite, got {got}")]
    NotFinite {
        /// Index into the flat values.
        index: usize,
        /// The value.
        got: f32,
    },
    /// The runtime library could not take the tensors.
    #[error("adapter tensors are not accepted")]
    Engine(#[from] ort::Error),
}

impl PreparedAdapter {
    pub(crate) fn new(
        model: u64,
        config: &ModelConfig,
        adapter: Option<&Adapter>,
        has_base_graph: bool,
    ) -> Result<Self, AdaptError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let adapted = adapter.is_some() || !has_base_graph;
        let fused = if adapted { fuse(config, adapter)? } else { Vec::new() };
        let inputs = fused
            .into_iter()
            .map(|(name, matrix)| Ok((name, Tensor::from_array(matrix)?)))
            .collect::<Result<_, ort::Error>>()?;
        let identity = NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(Self { inner: Arc::new(Prepared { identity, model, adapted, inputs }) })
    }

    /// Distinguishes prepared adapters: a cache filled under one must not be read under another.
    pub(crate) fn identity(&self) -> u64 {
        self.inner.identity
    }

    /// The model it was prepared for.
    pub(crate) fn model(&self) -> u64 {
        self.inner.model
    }

    /// Whether the graph with an adapter's inputs runs it.
    pub(crate) fn is_adapted(&self) -> bool {
        self.inner.adapted
    }

    pub(crate) fn inputs(&self) -> &[(String, Tensor<f32>)] {
        &self.inner.inputs
    }
}

/// Inputs and outputs of a linear of the model.
fn shape(config: &ModelConfig, target: Target) -> (usize, usize) {
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    match target {
        Target::Q => (hidden, config.query_size()),
        Target::K | Target::V => (hidden, config.kv_size()),
        Target::O => (config.query_size(), hidden),
        Target::Gate | Target::Up => (hidden, intermediate),
        Target::Down => (intermediate, hidden),
    }
}

pub(crate) fn check(config: &ModelConfig, layout: &AdapterLayout) -> Result<(), AdaptError> {
    if layout.layers() != config.layers {
        return Err(AdaptError::Layers { expected: config.layers, got: layout.layers() });
    }
    for module in layout.modules() {
        let (expected, got) = (shape(config, module.target), (module.inputs, module.outputs));
        if expected != got {
            return Err(AdaptError::Shape { target: module.target, expected, got });
        }
    }
    Ok(())
}

/// `lora.{layer}.{fused}.a` `[inputs, r]` and `.b` `[r, outputs]` for every fused linear, with
/// `y = x·W + (x·a)·b`. `a` holds the transposed `A`s side by side; `b` is block-diagonal of the transposed `B`s
/// times `alpha / rank`. A fused linear without an adapter gets `r = 1` of zeros.
fn fuse(config: &ModelConfig, adapter: Option<&Adapter>) -> Result<Vec<(String, Array2<f32>)>, AdaptError> {
    if let Some(adapter) = adapter {
        check(config, adapter.layout())?;
        if let Some((index, &got)) = adapter.values().iter().enumerate().find(|(_, value)| !value.is_finite())
        {
            return Err(AdaptError::NotFinite { index, got });
        }
    }
    let specs = adapter.map(|adapter| adapter.layout().tensors()).unwrap_or_default();
    let mut inputs = Vec::with_capacity(config.layers * FUSED.len() * 2);
    for layer in 0..config.layers {
        for (name, targets) in FUSED {
            let present = |spec: &&TensorSpec| spec.layer == layer && targets.contains(&spec.target);
            let specs: Vec<&TensorSpec> = specs.iter().filter(present).collect();
            let (a, b) = fuse_one(config, adapter, &specs, targets);
            inputs.push((format!("lora.{layer}.{name}.a"), a));
            inputs.push((format!("lora.{layer}.{name}.b"), b));
        }
    }
    Ok(inputs)
}

fn fuse_one(
    config: &ModelConfig,
    adapter: Option<&Adapter>,
    specs: &[&TensorSpec],
    targets: &[Target],
) -> (Array2<f32>, Array2<f32>) {
    let rank: usize = specs.iter().filter(|spec| spec.part == Part::A).map(|spec| spec.rows).sum();
    let inputs = shape(config, targets[0]).0;
    let outputs = targets.iter().map(|&target| shape(config, target).1).sum();
    let mut a = Array2::zeros((inputs, rank.max(1)));
    let mut b = Array2::zeros((rank.max(1), outputs));
    let Some(adapter) = adapter else { return (a, b) };
    let (mut inner, mut output) = (0, 0);
    for &target in targets {
        let width = shape(config, target).1;
        let part = |part| specs.iter().find(|spec| spec.target == target && spec.part == part);
        let matrix = |part_name| part(part_name).and_then(|spec| adapter.matrix(spec));
        if let (Some(down), Some(up)) = (matrix(Part::A), matrix(Part::B)) {
            let ranks = inner..inner + down.nrows();
            a.slice_mut(ndarray::s![.., ranks.clone()]).assign(&down.t());
            b.slice_mut(ndarray::s![ranks.clone(), output..output + width])
                .assign(&(&up.t() * adapter.layout().scale()));
            inner = ranks.end;
        }
        output += width;
    }
    (a, b)
}

#[cfg(test)]
mod tests {
    use commonweal_adapter::Module;
    use commonweal_package::{Architecture, Attention};
    use ndarray::Array1;
    use proptest::prelude::*;

    use super::*;

    fn config() -> ModelConfig {
        ModelConfig {
            architecture: Architecture::Llama,
            name: "test".into(),
            hidden_size: 6,
            intermediate_size: 10,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            head_dim: 8,
            vocab_size: 7,
            context: 16,
            rope_theta: 1e4,
            rms_norm_eps: 1e-5,
            tied: true,
            rope_scaling: None,
            attention: Attention::default(),
            gemma: None,
        }
    }

    fn adapter(targets: &[Target], rank: usize, seed: u64) -> Adapter {
        let module = |&target: &Target| {
            let (inputs, outputs) = shape(&config(), target);
            Module { target, inputs, outputs }
        };
        let layout = AdapterLayout::new(2, rank, 5.0, targets.iter().map(module).collect()).unwrap();
        let mut adapter = Adapter::init(Arc::new(layout), seed);
        for (index, value) in adapter.values_mut().iter_mut().enumerate() {
            *value += ((index as u64 * 37 + seed) % 11) as f32 * 0.1 - 0.5;
        }
        adapter
    }

    proptest! {
        /// `(x·a)·b` of the fused inputs equals `scale · B·A·x` of each target, at its place, and 0 elsewhere.
        #[test]
        fn fused_product_is_the_adapters(mask in 1_u8..128, rank in 1_usize..4, seed in 0_u64..100) {
            let chosen: Vec<Target> =
                Target::ALL.into_iter().enumerate().filter(|(bit, _)| mask >> bit & 1 == 1).map(|(_, t)| t).collect();
            let adapter = adapter(&chosen, rank, seed);
            let inputs = fuse(&config(), Some(&adapter)).unwrap();
            for (index, pair) in inputs.chunks(2).enumerate() {
                let (layer, targets) = (index / FUSED.len(), FUSED[index % FUSED.len()].1);
                let x: Array1<f32> = (0..pair[0].1.nrows()).map(|i| (i as f32).sin()).collect();
                let got = x.dot(&pair[0].1).dot(&pair[1].1);
                let mut at = 0;
                for &target in targets {
                    let find = |part| {
                        adapter.layout().tensors().into_iter().find(|spec| {
                            spec.layer == layer && spec.target == target && spec.part == part
                        })
                    };
                    let width = shape(&config(), target).1;
                    let expected = match (find(Part::A), find(Part::B)) {
                        (Some(a), Some(b)) => {
                            let (a, b) = (adapter.matrix(&a).unwrap(), adapter.matrix(&b).unwrap());
                            b.dot(&a.dot(&x)) * adapter.layout().scale()
                        }
                        _ => Array1::zeros(width),
                    };
                    for (got, expected) in got.iter().skip(at).zip(&expected) {
                        prop_assert!((got - expected).abs() < 1e-4);
                    }
                    at += width;
                }
                prop_assert_eq!(at, got.len());
            }
        }
    }

    #[test]
    fn names_and_ranks_are_those_of_the_contract() {
        let inputs = fuse(&config(), Some(&adapter(&[Target::Q, Target::V, Target::Down], 3, 1))).unwrap();
        let shapes: Vec<_> = inputs[..8].iter().map(|(name, m)| (name.as_str(), m.dim())).collect();
        assert_eq!(shapes[0], ("lora.0.qkv.a", (6, 6)));
        assert_eq!(shapes[1], ("lora.0.qkv.b", (6, 32)));
        assert_eq!(shapes[3], ("lora.0.o.b", (1, 6)));
        assert_eq!(shapes[7], ("lora.0.down.b", (3, 6)));
        assert!(fuse(&config(), None).unwrap().iter().all(|(_, m)| m.iter().all(|v| *v == 0.0)));
    }

    #[test]
    fn wrong_adapters_are_refused() {
        let mut bad = adapter(&[Target::Q], 1, 0);
        bad.values_mut()[3] = f32::NAN;
        assert!(matches!(fuse(&config(), Some(&bad)), Err(AdaptError::NotFinite { index: 3, .. })));
        let mut other = config();
        other.hidden_size = 8;
        let error = fuse(&other, Some(&adapter(&[Target::Q], 1, 0))).unwrap_err();
        assert!(matches!(error, AdaptError::Shape { target: Target::Q, .. }), "{error}");
        other.layers = 3;
        assert!(matches!(fuse(&other, Some(&adapter(&[Target::Q], 1, 0))), Err(AdaptError::Layers { .. })));
    }
}
