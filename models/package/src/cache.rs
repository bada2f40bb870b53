//! How keys and values are kept while a model runs. The compiler decides and builds the inference graphs by it, the
//! manifest (`manifest.rs`) records it, the runtime allocates by it.

use serde::{Deserialize, Serialize};

use crate::manifest::Hash;

/// The `[cache]` table of a manifest, absent for the default. It is not part of the base's identity: the graphs alone
/// depend on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "form", rename_all = "lowercase", deny_unknown_fields)]
pub enum CacheForm {
    /// 32-bit floats.
    #[default]
    Float,
    /// 8-bit integers, with scales in the graphs that a calibration text gave.
    Int8 {
        /// Tokens of the calibration text that were read.
        tokens: usize,
        /// BLAKE3 of those tokens, each as four bytes, little endian.
        text: Hash,
    },
}

impl CacheForm {
    /// Bytes of one component of a key or a value.
    pub fn component_bytes(self) -> usize {
        match self {
            Self::Float => 4,
            Self::Int8 { .. } => 1,
        }
    }
}
