//! Adapters as safetensors files: bytes in, bytes out.
//!
//! Packages, releases and the device's store keep adapters in this form. The metadata says what an adapter is
//! for, and the layout follows from metadata and shapes together. Equal adapters give equal bytes, since releases
//! are named by their hash; the safetensors crate's own writer orders metadata by chance, so the header is
//! written here. Reading goes through the crate, which checks offsets and overlaps.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use data_encoding::HEXLOWER;
use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::json;
use thiserror::Error;

use crate::adapter::{Adapter, AdapterError, first};
use crate::layout::{AdapterLayout, LayoutError, Module, Target, TensorSpec};

/// Value of the metadata key `format`.
pub const FORMAT: &str = "commonweal-adapter";

/// Longest header: 256 layers × 14 tensors × at most 128 bytes, and the metadata.
pub const HEADER_BYTES_MAX: usize = 512 * 1024;

/// What an adapter is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdapterKind {
    /// The federated assistant.
    Assistant,
    /// Judges whether a text is harmful.
    Guard,
    /// Rewrites harmful answers.
    Reviser,
    /// No adapter but as many values: SCAFFOLD's control variate.
    Control,
    /// The same: a server optimizer's first moment.
    Momentum,
    /// The same: a server optimizer's second moment.
    Variance,
}

impl AdapterKind {
    const ALL: [Self; 6] =
        [Self::Assistant, Self::Guard, Self::Reviser, Self::Control, Self::Momentum, Self::Variance];

    /// Name in the metadata.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Assistant => "assistant",
            Self::Guard => "guard",
            Self::Reviser => "reviser",
            Self::Control => "control",
            Self::Momentum => "momentum",
            Self::Variance => "variance",
        }
    }
}

impl fmt::Display for AdapterKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a file says of its adapter besides the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdapterFacts {
    /// Hash of the frozen base that it was trained on.
    pub base: [u8; 32],
    /// What it is for.
    pub kind: AdapterKind,
}

/// Why bytes are not an adapter file.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The header's length is out of bounds or exceeds the file.
    #[error("adapter file: expected a header of at most {HEADER_BYTES_MAX} bytes inside the file, got {got}")]
    Header {
        /// The length that the file states; 0 if it is too short to state one.
        got: u64,
    },
    /// Not a safetensors file.
    #[error("adapter file: expected safetensors")]
    Safetensors(#[source] SafeTensorError),
    /// A metadata key is absent or has a value that makes no sense.
    #[error("adapter file: expected {expected} for the metadata key {key}, got {got}")]
    Metadata {
        /// The key.
        key: &'static str,
        /// What it should hold.
        expected: &'static str,
        /// What it holds.
        got: String,
    },
    /// Metadata and shapes make no layout.
    #[error("adapter file: no valid layout")]
    Layout(#[from] LayoutError),
    /// A tensor is missing.
    #[error("adapter file: expected the tensor {name}, got none")]
    Missing {
        /// Canonical name.
        name: String,
    },
    /// A tensor that the layout does not have.
    #[error("adapter file: expected {expected} tensors, got {got}")]
    Count {
        /// What the layout has.
        expected: usize,
        /// What the file has.
        got: usize,
    },
    /// A tensor of another shape or type.
    #[error("adapter file: tensor {name}: expected {expected}, got {got}")]
    Tensor {
        /// Canonical name.
        name: String,
        /// Type and shape of the layout.
        expected: String,
        /// Type and shape in the file.
        got: String,
    },
    /// A value is NaN or infinite.
    #[error("adapter file: tensor {name}: expected finite values, got {got}")]
    NotFinite {
        /// Canonical name.
        name: String,
        /// The value.
        got: f32,
    },
}

/// The file's bytes. Refuses values that are not finite.
pub fn write(adapter: &Adapter, facts: &AdapterFacts) -> Result<Vec<u8>, AdapterError> {
    let layout = adapter.layout();
    crate::adapter::check_values(adapter.values(), layout.parameters())?;
    let targets: Vec<&str> = layout.modules().iter().map(|module| module.target.name()).collect();
    let metadata: BTreeMap<&str, String> = BTreeMap::from([
        ("format", FORMAT.to_owned()),
        ("layers", layout.layers().to_string()),
        ("rank", layout.rank().to_string()),
        ("alpha", layout.alpha().to_string()),
        ("targets", targets.join(",")),
        ("base", HEXLOWER.encode(&facts.base)),
        ("kind", facts.kind.name().to_owned()),
    ]);
    Ok(safetensors_bytes(adapter, &json!(metadata), TensorSpec::name))
}

/// A safetensors file with the adapter's tensors in canonical order, named by `name`.
pub(crate) fn safetensors_bytes(
    adapter: &Adapter,
    metadata: &serde_json::Value,
    name: impl Fn(&TensorSpec) -> String,
) -> Vec<u8> {
    // Keys in alphabetical order: serde_json sorts them or not, as another crate's features have it.
    let entries = adapter.layout().tensors().into_iter().map(|spec| {
        let offsets = [4 * spec.range.start, 4 * spec.range.end];
        let entry = json!({ "data_offsets": offsets, "dtype": "F32", "shape": spec.shape() });
        format!(",{}:{entry}", json!(name(&spec)))
    });
    let mut header = format!("{{\"__metadata__\":{metadata}{}}}", entries.collect::<String>());
    // Tensors begin at multiples of 8 bytes, as the format recommends.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut bytes = Vec::with_capacity(8 + header.len() + 4 * adapter.values().len());
    bytes.extend((header.len() as u64).to_le_bytes());
    bytes.extend(header.as_bytes());
    let begin = bytes.len();
    bytes.resize(begin + 4 * adapter.values().len(), 0);
    let places = bytes.get_mut(begin..).unwrap_or_default().as_chunks_mut::<4>().0;
    places.iter_mut().zip(adapter.values()).for_each(|(place, value)| *place = value.to_le_bytes());
    bytes
}

/// Reads [`write()`]'s bytes, or says exactly what is wrong with them.
///
/// Memory is bounded by the length of `bytes`. Compare the layout and the base with those of the package.
pub fn read(bytes: &[u8]) -> Result<(Adapter, AdapterFacts), ReadError> {
    let stated = bytes.first_chunk::<8>().map_or(0, |length| u64::from_le_bytes(*length));
    if stated == 0 || stated > HEADER_BYTES_MAX.min(bytes.len().saturating_sub(8)) as u64 {
        return Err(ReadError::Header { got: stated });
    }
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(ReadError::Safetensors)?;
    let file = SafeTensors::deserialize(bytes).map_err(ReadError::Safetensors)?;
    let layout = read_layout(&header)?;
    let facts = read_facts(&header)?;

    if file.len() > layout.tensor_count() {
        return Err(ReadError::Count { expected: layout.tensor_count(), got: file.len() });
    }
    let mut values = Vec::with_capacity(layout.parameters().min(bytes.len() / 4));
    for spec in layout.tensors() {
        let name = spec.name();
        let Ok(tensor) = file.tensor(&name) else { return Err(ReadError::Missing { name }) };
        if tensor.dtype() != Dtype::F32 || tensor.shape() != spec.shape() {
            let expected = format!("F32 {:?}", spec.shape());
            let got = format!("{:?} {:?}", tensor.dtype(), tensor.shape());
            return Err(ReadError::Tensor { name, expected, got });
        }
        let begin = values.len();
        values.extend(tensor.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
        let read = values.get(begin..).unwrap_or_default();
        if let Some((_, got)) = first(read, |value| !value.is_finite()) {
            return Err(ReadError::NotFinite { name, got });
        }
    }
    let adapter = Adapter::from_values(Arc::new(layout), values);
    adapter.map(|adapter| (adapter, facts)).map_err(|error| match error {
        AdapterError::Layout(error) => ReadError::Layout(error),
        // Every tensor had its shape and finite values, so neither can happen; said rather than panicked.
        AdapterError::Length { expected, got } => ReadError::Count { expected, got },
        AdapterError::NotFinite { index, got } => {
            ReadError::NotFinite { name: format!("value {index}"), got }
        }
    })
}

fn read_layout(header: &Metadata) -> Result<AdapterLayout, ReadError> {
    let format = text(header, "format", FORMAT)?;
    if format != FORMAT {
        return Err(wrong("format", FORMAT, format));
    }
    let layers = number(header, "layers", "a whole number")?;
    let rank = number(header, "rank", "a whole number")?;
    let alpha = number(header, "alpha", "a number")?;
    let mut modules = Vec::new();
    let targets = text(header, "targets", "targets with commas between")?;
    // One more than there are, so that a repeated target is seen and a long list is not followed.
    for target in targets.split(',').take(Target::ALL.len() + 1) {
        let target: Target = target.parse()?;
        let width = |part: &str, axis: usize| {
            let name = format!("layers.0.{target}.{part}");
            let width = header.info(&name).and_then(|info| info.shape.get(axis).copied());
            width.ok_or(ReadError::Missing { name })
        };
        modules.push(Module { target, inputs: width("a", 1)?, outputs: width("b", 0)? });
    }
    Ok(AdapterLayout::new(layers, rank, alpha, modules)?)
}

fn read_facts(header: &Metadata) -> Result<AdapterFacts, ReadError> {
    let hex = text(header, "base", "64 hexadecimal digits")?;
    let base = HEXLOWER.decode(hex.as_bytes()).ok().and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
    let base = base.ok_or_else(|| wrong("base", "64 hexadecimal digits", hex))?;
    let kinds = "assistant, guard, reviser, control, momentum or variance";
    let name = text(header, "kind", kinds)?;
    let kind = AdapterKind::ALL.into_iter().find(|kind| kind.name() == name);
    Ok(AdapterFacts { base, kind: kind.ok_or_else(|| wrong("kind", kinds, name))? })
}

fn text<'h>(header: &'h Metadata, key: &'static str, expected: &'static str) -> Result<&'h str, ReadError> {
    let value = header.metadata().as_ref().and_then(|metadata| metadata.get(key));
    value.map(String::as_str).ok_or_else(|| wrong(key, expected, "nothing"))
}

fn number<T: FromStr>(header: &Metadata, key: &'static str, expected: &'static str) -> Result<T, ReadError> {
    let text = text(header, key, expected)?;
    text.parse().map_err(|_| wrong(key, expected, text))
}

/// Quotes at most 80 characters of what a stranger wrote.
fn wrong(key: &'static str, expected: &'static str, got: &str) -> ReadError {
    ReadError::Metadata { key, expected, got: got.chars().take(80).collect() }
}
