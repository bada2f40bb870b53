//! How the codes of quantized weights were chosen. The compiler decides, the manifest (`manifest.rs`) records it; no
//! program that reads the weights needs it.

use serde::{Deserialize, Serialize};

use crate::manifest::Hash;

/// The `[rounding]` table of a manifest, absent for the default, which is that of packages of before there was a choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "lowercase", deny_unknown_fields)]
pub enum Rounding {
    /// Each weight to the nearest code; the block's extreme weight sets the scale.
    Rtn,
    /// Each weight to the nearest code; the scale with the least squared error of the weights.
    #[default]
    Mse,
    /// As `Mse`, but the squared error of a weight counts as often as the weight is large.
    Wmse,
    /// The codes with the least squared error of the layer's outputs over a calibration text (GPTQ).
    Gptq {
        /// Tokens of the calibration text that were read.
        tokens: usize,
        /// BLAKE3 of those tokens, each as four bytes, little endian.
        text: Hash,
    },
}

impl Rounding {
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}
