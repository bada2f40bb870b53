//! The frozen base in memory, once for all graphs of a package: `weights.bin` is mapped, each graph's sessions are given
//! the same tensors, and what the kernels rearrange for themselves is shared too. `model.rs` opens its sessions with
//! it. Left to itself, each session would map the file and rearrange the weights for itself.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    path::Path,
    ptr::NonNull,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use memmap2::Mmap;
use ort::{
    AsPointer,
    memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType},
    session::builder::{PrepackedWeights, SessionBuilder},
    value::{DynValue, Value},
};
use ort_sys::ONNXTensorElementDataType as Element;
use prost::Message;

/// Longest graph file read: those of the largest models are a few megabytes.
const GRAPH_BYTES_MAX: u64 = 1 << 28;

/// Why a graph's weights cannot be given to a session.
#[derive(Debug, thiserror::Error)]
pub enum FrozenError {
    /// A file cannot be read.
    #[error("{file} cannot be read")]
    Read {
        /// The file.
        file: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The graph is not one.
    #[error("{file} is not an ONNX graph")]
    Graph {
        /// The file.
        file: String,
        /// Why.
        #[source]
        source: prost::DecodeError,
    },
    /// A weight does not lie in the file of weights, or is of a kind that packages do not have.
    #[error("weight {name} must be {expected}, got {got}")]
    Weight {
        /// The weight.
        name: String,
        /// What it should be.
        expected: &'static str,
        /// What the graph says.
        got: String,
    },
}

/// The mapped weights of a package.
pub(crate) struct Frozen {
    /// Tensors over the map, by name. They are dropped before it.
    tensors: Mutex<BTreeMap<String, Arc<DynValue>>>,
    prepacked: Mutex<PrepackedWeights>,
    /// Whether a session was given the weights since their prepared form was given back.
    lent: AtomicBool,
    map: Mmap,
}

impl Frozen {
    pub(crate) fn map(weights: &Path) -> Result<Self, FrozenError> {
        let failed = |source| FrozenError::Read { file: weights.display().to_string(), source };
        let file = File::open(weights).map_err(failed)?;
        #[expect(unsafe_code, reason = "a file can only be mapped so")]
        // SAFETY: the file is a package's, which nothing writes to: packages are made beside their place and renamed.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        let prepacked = Mutex::new(PrepackedWeights::new());
        Ok(Self { tensors: Mutex::default(), prepacked, lent: AtomicBool::new(false), map })
    }

    /// Gives a session of the graph at `path` the weights that it names.
    pub(crate) fn lend(&self, path: &Path, builder: SessionBuilder) -> Result<SessionBuilder, LendError> {
        let prepacked = self.prepacked.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.lent.store(true, Ordering::Relaxed);
        let mut builder = builder.with_prepacked_weights(&prepacked).map_err(ort::Error::from)?;
        let mut tensors = self.tensors.lock().unwrap_or_else(PoisonError::into_inner);
        for tensor in external_tensors(path)? {
            let place = tensor.place()?;
            let value = if let Some(known) = tensors.get(&tensor.name) {
                known.clone()
            } else {
                let value = Arc::new(self.tensor(&tensor, &place)?);
                tensors.insert(tensor.name.clone(), value.clone());
                value
            };
            builder = builder.with_initializer(&tensor.name, value).map_err(ort::Error::from)?;
        }
        Ok(builder)
    }

    /// Gives back the prepared form of the weights, as soon as no session reads it any more; the next one prepares them
    /// anew.
    pub(crate) fn forget(&self) {
        *self.prepacked.lock().unwrap_or_else(PoisonError::into_inner) = PrepackedWeights::new();
        self.lent.store(false, Ordering::Relaxed);
        self.rest();
    }

    /// Whether their prepared form may be held.
    pub(crate) fn is_lent(&self) -> bool {
        self.lent.load(Ordering::Relaxed)
    }

    /// The pages that opening a session read are not needed again soon: its kernels have their own form of most.
    #[cfg(unix)]
    pub(crate) fn rest(&self) {
        #[expect(unsafe_code, reason = "the advice is unsafe for maps that are written to")]
        // SAFETY: the map is of a file and read-only, so pages that are dropped are read from the file again.
        let advised = unsafe { self.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        if let Err(error) = advised {
            tracing::debug!(%error, "pages of the weights stay in memory");
        }
    }

    /// Other systems take back what they need by themselves.
    #[cfg(not(unix))]
    pub(crate) fn rest(&self) {}

    fn tensor(&self, tensor: &TensorProto, place: &Place) -> Result<DynValue, LendError> {
        let end = place.offset.checked_add(place.bytes);
        let Some(bytes) = end.and_then(|end| self.map.get(place.offset..end)) else {
            let (expected, got) = ("inside the file of weights", format!("bytes from {}", place.offset));
            return Err(FrozenError::Weight { name: tensor.name.clone(), expected, got }.into());
        };
        let info = MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::Default)?;
        let mut value = std::ptr::null_mut();
        #[expect(unsafe_code, reason = "the library takes tensors over memory that it does not own only so")]
        // SAFETY: the bytes are as many as the shape and element say (`Place`), aligned to a page by the package's
        // format and to their element by the check there, and outlive the value: `tensors` and the sessions, which
        // hold them too, are dropped before `map`. The library only reads weights.
        let status = unsafe {
            (ort::api().CreateTensorWithDataAsOrtValue)(
                info.ptr(),
                bytes.as_ptr().cast_mut().cast(),
                bytes.len(),
                tensor.dims.as_ptr(),
                tensor.dims.len(),
                place.element,
                &raw mut value,
            )
        };
        #[expect(unsafe_code, reason = "the status is the library's")]
        // SAFETY: it was just returned and is used once.
        unsafe {
            ort::Error::result_from_status(status)?;
        }
        let Some(value) = NonNull::new(value) else {
            let (expected, got) = ("a tensor", "nothing from the library".into());
            return Err(FrozenError::Weight { name: tensor.name.clone(), expected, got }.into());
        };
        #[expect(unsafe_code, reason = "the value is the library's")]
        // SAFETY: the pointer is a value that was just made and that nothing else releases.
        Ok(unsafe { Value::from_ptr(value, Some(&Allocator::default())) })
    }
}

/// Why a session did not get its weights.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LendError {
    #[error(transparent)]
    Frozen(#[from] FrozenError),
    #[error(transparent)]
    Engine(#[from] ort::Error),
}

/// Where a tensor lies in the file.
struct Place {
    offset: usize,
    bytes: usize,
    element: Element,
}

fn external_tensors(path: &Path) -> Result<Vec<TensorProto>, FrozenError> {
    let file = path.display().to_string();
    let read = || {
        let length = path.metadata()?.len();
        if length > GRAPH_BYTES_MAX {
            return Err(io::Error::other(format!(
                "at most {GRAPH_BYTES_MAX} bytes are read, it has {length}"
            )));
        }
        std::fs::read(path)
    };
    let bytes = read().map_err(|source| FrozenError::Read { file: file.clone(), source })?;
    let model = ModelProto::decode(bytes.as_slice()).map_err(|source| FrozenError::Graph { file, source })?;
    let mut tensors = model.graph.unwrap_or_default().initializer;
    tensors.retain(|tensor| !tensor.external_data.is_empty());
    Ok(tensors)
}

// The fields of ONNX's messages (onnx.proto3) that say where weights lie; the others are skipped.

#[derive(Message)]
struct ModelProto {
    #[prost(message, optional, tag = "7")]
    graph: Option<GraphProto>,
}

#[derive(Message)]
struct GraphProto {
    #[prost(message, repeated, tag = "5")]
    initializer: Vec<TensorProto>,
}

#[derive(Message)]
struct TensorProto {
    #[prost(int64, repeated, tag = "1")]
    dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    data_type: i32,
    #[prost(string, tag = "8")]
    name: String,
    #[prost(message, repeated, tag = "13")]
    external_data: Vec<EntryProto>,
}

#[derive(Message)]
struct EntryProto {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

impl TensorProto {
    fn place(&self) -> Result<Place, FrozenError> {
        let wrong = |expected, got| FrozenError::Weight { name: self.name.clone(), expected, got };
        let (element, width) = match self.data_type {
            1 => (Element::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4),
            2 => (Element::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 1),
            other => return Err(wrong("of floats or bytes", format!("ONNX's data type {other}"))),
        };
        let number = |key: &str| {
            let entry = self.external_data.iter().find(|entry| entry.key == key);
            entry.and_then(|entry| entry.value.parse::<usize>().ok())
        };
        let size = self.dims.iter().try_fold(width, |size: usize, &dim| {
            usize::try_from(dim).ok().and_then(|dim| size.checked_mul(dim))
        });
        let (offset, bytes) = (number("offset"), number("length"));
        match (offset, bytes) {
            (Some(offset), Some(bytes)) if Some(bytes) == size && offset.is_multiple_of(width) => {
                Ok(Place { offset, bytes, element })
            }
            _ => Err(wrong("at an offset, as long as its shape", format!("{offset:?}, {bytes:?}, {size:?}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(dims: &[i64], offset: &str, length: &str) -> TensorProto {
        let entry = |key: &str, value: &str| EntryProto { key: key.into(), value: value.into() };
        let external_data =
            vec![entry("location", "weights.bin"), entry("offset", offset), entry("length", length)];
        TensorProto { dims: dims.into(), data_type: 1, name: "w".into(), external_data }
    }

    #[test]
    fn a_weight_that_its_shape_does_not_fit_is_refused() {
        assert!(tensor(&[2, 3], "4096", "24").place().is_ok());
        for (dims, offset, length) in [
            (&[2, 3][..], "4096", "23"),
            (&[2, 3], "4095", "24"),
            (&[2, -3], "4096", "24"),
            (&[i64::MAX, i64::MAX], "0", "0"),
            (&[2, 3], "x", "24"),
        ] {
            assert!(tensor(dims, offset, length).place().is_err(), "{dims:?} {offset} {length}");
        }
    }

    #[test]
    fn a_weight_outside_the_file_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0; 4096]).unwrap();
        let Ok(library) = crate::Library::load(None) else {
            eprintln!("SKIPPED: the runtime library is absent; run scripts/setup");
            return;
        };
        let frozen = Frozen::map(file.path()).unwrap();
        let tensor = tensor(&[2, 3], "4096", "24");
        let error = frozen.tensor(&tensor, &tensor.place().unwrap()).unwrap_err().to_string();
        assert_eq!(error, "weight w must be inside the file of weights, got bytes from 4096");
        drop(library);
    }
}
