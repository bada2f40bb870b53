//! The tensors of a checkpoint: one `model.safetensors` or the shards that `model.safetensors.index.json` lists.
//! Second stage of `checkpoint.rs`; `weights.rs` reads rows from here.
//!
//! Files are read by position rather than memory-mapped: rows are needed once and in order, memory stays bounded by
//! one chunk of rows, and a file that shrinks while it is read is an error instead of a dead process.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata};
use serde::Deserialize;

use crate::config::read_bounded;

/// Longest safetensors header read. The header of a 405-billion-parameter checkpoint's shard is under 100 kB.
const HEADER_BYTES_MAX: u64 = 16 << 20;

/// Longest index read; that of a 405-billion-parameter checkpoint is about 200 kB.
const INDEX_BYTES_MAX: u64 = 16 << 20;

/// Most shards opened at once.
const SHARDS_MAX: usize = 1024;

/// Every tensor of a checkpoint, found but not yet read.
#[derive(Debug)]
pub struct Tensors {
    shards: Vec<Shard>,
    places: BTreeMap<String, Place>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
}

#[derive(Clone, Debug)]
struct Place {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// First byte in the file.
    start: u64,
}

/// Why a tensor cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TensorError {
    /// A file cannot be opened or read, or ends too early.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The directory has no weights.
    #[error("{} must have model.safetensors or model.safetensors.index.json, got neither", directory.display())]
    NoWeights {
        /// The checkpoint directory.
        directory: PathBuf,
    },
    /// The index is not JSON of the expected form.
    #[error("{} is not an index of shards", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The index names a file outside the checkpoint, or too many files.
    #[error("{} must list up to {SHARDS_MAX} shards beside it, got {got}", path.display())]
    Shards {
        /// The index.
        path: PathBuf,
        /// The offending name or count.
        got: String,
    },
    /// The header's length does not fit the file.
    #[error("{} has a header of {got} bytes, expected at most {max}; the file is truncated or damaged", path.display())]
    HeaderLength {
        /// The file.
        path: PathBuf,
        /// The length that the file says.
        got: u64,
        /// What there is room for.
        max: u64,
    },
    /// The header's text is not JSON, or its offsets, shapes and types contradict each other.
    #[error("{} has a damaged header", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The file's length is not what its header says.
    #[error("{} must be {expected} bytes long by its header, got {got}; the file is truncated or damaged", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// By the header.
        expected: u64,
        /// On disk.
        got: u64,
    },
    /// Two shards have the same tensor.
    #[error("tensor {name} is in more than one file")]
    Twice {
        /// The tensor.
        name: String,
    },
    /// The model needs a tensor that no file has.
    #[error("tensor {name} is missing from the checkpoint")]
    Missing {
        /// The tensor.
        name: String,
    },
    /// The tensor is stored in the packed form of GPTQ or AWQ.
    #[error(
        "tensor {name} must be of floats, got {packed}: a GPTQ or AWQ checkpoint; compile the one it was made from"
    )]
    Packed {
        /// The tensor.
        name: String,
        /// What there is instead.
        packed: String,
    },
    /// The tensor's shape is not the configuration's.
    #[error("tensor {name} must have the shape {expected:?}, got {got:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// By the configuration.
        expected: Vec<usize>,
        /// In the file.
        got: Vec<usize>,
    },
    /// The tensor is not of floats.
    #[error("tensor {name} must be F32, F16 or BF16, got {got:?}")]
    Dtype {
        /// The tensor.
        name: String,
        /// In the file.
        got: Dtype,
    },
    /// The tensor has a value that is not a number.
    #[error("tensor {name} has {got} at row {row}")]
    NotFinite {
        /// The tensor.
        name: String,
        /// Row of the first such value.
        row: usize,
        /// The value.
        got: f32,
    },
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Tensors {
    /// Opens the weight files of a checkpoint and reads their headers.
    pub fn open(directory: &Path) -> Result<Self, TensorError> {
        let single = directory.join("model.safetensors");
        let index = directory.join("model.safetensors.index.json");
        let files = match (single.exists(), index.exists()) {
            (true, _) => vec![single],
            (false, true) => read_index(directory, &index)?,
            (false, false) => return Err(TensorError::NoWeights { directory: directory.into() }),
        };
        let mut tensors = Self { shards: Vec::new(), places: BTreeMap::new() };
        for path in files {
            tensors.add(path)?;
        }
        Ok(tensors)
    }

    /// Checks that a tensor is there, of floats, and has the shape that the configuration gives.
    pub fn check(&self, name: &str, expected: &[usize]) -> Result<(), TensorError> {
        let packed = name.strip_suffix(".weight").map(|stem| format!("{stem}.qweight"));
        if let Some(packed) = packed.filter(|packed| !self.contains(name) && self.contains(packed)) {
            return Err(TensorError::Packed { name: name.into(), packed });
        }
        let place = self.place(name)?;
        if place.shape != expected {
            let (expected, got) = (expected.to_vec(), place.shape.clone());
            return Err(TensorError::Shape { name: name.into(), expected, got });
        }
        width(place.dtype).map(|_| ()).ok_or(TensorError::Dtype { name: name.into(), got: place.dtype })
    }

    /// Whether any file has that tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// Reads some rows of a matrix, or of a vector taken as rows of one value, as 32-bit floats. Every value is finite.
    pub fn rows(&self, name: &str, rows: Range<usize>) -> Result<Vec<f32>, TensorError> {
        let place = self.place(name)?;
        let width = width(place.dtype).ok_or(TensorError::Dtype { name: name.into(), got: place.dtype })?;
        let columns: usize = place.shape.iter().skip(1).product();
        let shard = &self.shards[place.shard];
        let read = |source| TensorError::Read { path: shard.path.clone(), source };
        // The header's shapes were checked against the file's length, so none of this overflows.
        let mut bytes = vec![0; rows.len() * columns * width];
        let mut file = &shard.file;
        file.seek(SeekFrom::Start(place.start + (rows.start * columns * width) as u64)).map_err(read)?;
        file.read_exact(&mut bytes).map_err(read)?;
        let values = floats(place.dtype, &bytes);
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(at) => {
                let (row, got) = (rows.start + at / columns.max(1), values[at]);
                Err(TensorError::NotFinite { name: name.into(), row, got })
            }
        }
    }

    /// Every tensor with its shape.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        self.places.iter().map(|(name, place)| (name.clone(), place.shape.clone())).collect()
    }

    fn place(&self, name: &str) -> Result<&Place, TensorError> {
        self.places.get(name).ok_or_else(|| TensorError::Missing { name: name.into() })
    }

    fn add(&mut self, path: PathBuf) -> Result<(), TensorError> {
        let (file, metadata, start) = open_shard(&path)?;
        let shard = self.shards.len();
        self.shards.push(Shard { path, file });
        for (name, info) in BTreeMap::from_iter(metadata.tensors()) {
            let start = start + info.data_offsets.0 as u64;
            let place = Place { shard, dtype: info.dtype, shape: info.shape.clone(), start };
            if self.places.insert(name.clone(), place).is_some() {
                return Err(TensorError::Twice { name });
            }
        }
        Ok(())
    }
}

fn read_index(directory: &Path, path: &Path) -> Result<Vec<PathBuf>, TensorError> {
    let bytes = read_bounded(path, INDEX_BYTES_MAX)
        .map_err(|source| TensorError::Read { path: path.into(), source })?;
    let index: Index =
        serde_json::from_slice(&bytes).map_err(|source| TensorError::Index { path: path.into(), source })?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    let refused = |got| TensorError::Shards { path: path.into(), got };
    if names.is_empty() || names.len() > SHARDS_MAX {
        return Err(refused(names.len().to_string()));
    }
    if let Some(name) = names.iter().find(|name| Path::new(name).file_name() != Some(name.as_ref())) {
        return Err(refused(format!("{name:?}")));
    }
    Ok(names.iter().map(|name| directory.join(name)).collect())
}

/// Opens a safetensors file: `u64 LE length | JSON header | data`. Returns where the data begins.
fn open_shard(path: &Path) -> Result<(File, Metadata, u64), TensorError> {
    let read = |source| TensorError::Read { path: path.into(), source };
    let status = std::fs::metadata(path).map_err(read)?;
    if !status.is_file() {
        return Err(read(io::Error::other("not a plain file")));
    }
    let mut file = File::open(path).map_err(read)?;
    let mut prefix = [0; 8];
    file.read_exact(&mut prefix).map_err(read)?;
    let (got, max) = (u64::from_le_bytes(prefix), status.len().saturating_sub(8).min(HEADER_BYTES_MAX));
    if got > max {
        return Err(TensorError::HeaderLength { path: path.into(), got, max });
    }
    let mut header = vec![0; got as usize];
    file.read_exact(&mut header).map_err(read)?;
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|source| TensorError::Header { path: path.into(), source })?;
    let start = 8 + got;
    let (expected, got) = (start.saturating_add(metadata.data_len() as u64), status.len());
    if expected != got {
        return Err(TensorError::Length { path: path.into(), expected, got });
    }
    Ok((file, metadata, start))
}

/// Bytes of one value of the types that a checkpoint may have.
fn width(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F32 => Some(4),
        Dtype::F16 | Dtype::BF16 => Some(2),
        _ => None,
    }
}

fn floats(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F16 => bytes.as_chunks().0.iter().map(|&pair| f16::from_le_bytes(pair).to_f32()).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|&pair| bf16::from_le_bytes(pair).to_f32()).collect(),
        _ => bytes.as_chunks().0.iter().map(|&four| f32::from_le_bytes(four)).collect(),
    }
}
