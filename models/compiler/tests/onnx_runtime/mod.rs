//! Runs compiled graphs through the real ONNX Runtime, for the tests beside this folder.
#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod case;
pub(crate) mod dequantize;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ort::environment::Environment;
use ort::session::builder::SessionBuilder;
use ort::session::{Session, SessionInputValue};
use ort::value::{DynValue, Tensor, ValueRef};
use safetensors::{Dtype, SafeTensors};

/// A tensor of a golden file.
#[derive(Clone, Debug)]
pub(crate) enum Golden {
    Floats(Vec<usize>, Vec<f32>),
    Integers(Vec<usize>, Vec<i64>),
    Bytes(Vec<usize>, Vec<u8>),
}

impl Golden {
    pub(crate) fn floats(&self) -> &[f32] {
        match self {
            Self::Floats(_, values) => values,
            other => panic!("floats expected, got {other:?}"),
        }
    }

    pub(crate) fn value(&self) -> DynValue {
        match self.clone() {
            Self::Floats(shape, values) => Tensor::from_array((shape, values)).unwrap().into_dyn(),
            Self::Integers(shape, values) => Tensor::from_array((shape, values)).unwrap().into_dyn(),
            Self::Bytes(shape, values) => Tensor::from_array((shape, values)).unwrap().into_dyn(),
        }
    }
}

pub(crate) fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens")
}

/// Reads a golden file.
pub(crate) fn read(name: &str) -> BTreeMap<String, Golden> {
    let bytes = std::fs::read(goldens().join(name)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let golden = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let (shape, data) = (view.shape().to_vec(), view.data());
        let golden = match view.dtype() {
            Dtype::F32 => {
                Golden::Floats(shape, data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
            }
            Dtype::I64 => {
                Golden::Integers(shape, data.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b)).collect())
            }
            Dtype::U8 => Golden::Bytes(shape, data.to_vec()),
            other => panic!("unexpected {other:?}"),
        };
        (name, golden)
    };
    tensors.tensors().into_iter().map(golden).collect()
}

/// `‖a - b‖ / ‖b‖`
pub(crate) fn relative_error(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let error = square(&mut got.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    let size = square(&mut expected.iter().map(|b| f64::from(*b)));
    (error / size).sqrt()
}

fn library() -> PathBuf {
    if let Some(path) = std::env::var_os("ORT_DYLIB_PATH") {
        return path.into();
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let path = workspace.join("target/runtime/libonnxruntime.so");
    assert!(path.exists(), "no ONNX Runtime: set ORT_DYLIB_PATH or run scripts/setup");
    path
}

fn environment() -> &'static Environment {
    static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
    ENVIRONMENT.get_or_init(|| {
        #[expect(
            unsafe_code,
            reason = "the library reads this variable when loaded and takes no other setting"
        )]
        // SAFETY: Rust's own readers of the environment take the same lock, and no foreign code runs yet.
        unsafe {
            std::env::set_var("ORT_DISABLE_TELEMETRY", "1");
        }
        ort::init_from(library()).unwrap().with_name("goldens").build().unwrap()
    })
}

/// A graph, loaded.
pub(crate) fn session(path: &Path) -> Session {
    builder().commit_from_file(path).unwrap()
}

/// A graph without weights, loaded.
pub(crate) fn session_of(graph: &[u8]) -> Session {
    builder().commit_from_memory(graph).unwrap()
}

fn builder() -> SessionBuilder {
    Session::builder(environment()).unwrap().with_intra_threads(1).unwrap()
}

/// Runs a graph; gives its outputs, all floats, by name.
pub(crate) fn run(session: &mut Session, inputs: Vec<(String, DynValue)>) -> BTreeMap<String, Vec<f32>> {
    let inputs: Vec<(String, SessionInputValue<'_>)> =
        inputs.into_iter().map(|(name, value)| (name, value.into())).collect();
    let outputs = session.run(inputs).unwrap();
    let floats = |value: ValueRef<'_>| value.try_extract_tensor::<f32>().unwrap().1.to_vec();
    outputs.iter().map(|(name, value)| (name.to_owned(), floats(value))).collect()
}
