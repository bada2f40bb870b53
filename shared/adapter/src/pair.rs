//! An update with the change of a control variate (`scaffold`): two packed deltas, one behind the other.
//!
//! ```text
//! u8 version = 3 │ u32 little-endian: bytes of the first │ packed delta of the adapter │ packed delta of the control
//! ```
//!
//! Versions 1 and 2 are those of a packed delta alone ([`mod@crate::packed`]).

use std::sync::Arc;

use thiserror::Error;

use crate::delta::{AdapterDelta, Trainable};
use crate::layout::AdapterLayout;
use crate::packed::{DecodeError, DecodeLimits, PackedDelta};

/// Version of the form, its first byte.
pub const VERSION: u8 = 3;

const HEADER_BYTES: usize = 5;

/// Why bytes are not an update of the expected form.
#[derive(Debug, Error)]
pub enum PairError {
    /// The round corrects gradients and the update has one part, or none, or a length beyond its end.
    #[error(
        "update: expected version {VERSION} with a control's change and both parts whole, got {got} bytes that are not"
    )]
    Form {
        /// Bytes that came.
        got: usize,
    },
    /// The adapter's delta does not decode.
    #[error(transparent)]
    Delta(DecodeError),
    /// The control's change does not decode.
    #[error("change of the control variate")]
    Control(#[source] DecodeError),
}

/// Joins the two parts.
pub fn join(delta: &PackedDelta, control: &PackedDelta) -> Vec<u8> {
    let (delta, control) = (delta.as_bytes(), control.as_bytes());
    let mut bytes = Vec::with_capacity(HEADER_BYTES + delta.len() + control.len());
    bytes.push(VERSION);
    bytes.extend((delta.len() as u32).to_le_bytes());
    bytes.extend(delta);
    bytes.extend(control);
    bytes
}

/// The two parts' bytes.
pub fn split(bytes: &[u8]) -> Result<(&[u8], &[u8]), PairError> {
    let malformed = || PairError::Form { got: bytes.len() };
    let (&[version, ref length @ ..], parts) =
        bytes.split_first_chunk::<HEADER_BYTES>().ok_or_else(malformed)?;
    let length = u32::from_le_bytes(*length) as usize;
    if version != VERSION {
        return Err(malformed());
    }
    parts.split_at_checked(length).ok_or_else(malformed)
}

/// Most bytes of an honest update: one packed delta, or two with a header.
pub fn bytes_max(layout: &AdapterLayout, trainable: Trainable, has_control: bool) -> usize {
    let one = PackedDelta::bytes_max(layout, trainable);
    if has_control { HEADER_BYTES + 2 * one } else { one }
}

/// Reads an update as it came: the delta, and the control's change if the round has one.
pub fn decode(
    bytes: &[u8],
    layout: &Arc<AdapterLayout>,
    trainable: Trainable,
    has_control: bool,
) -> Result<(AdapterDelta, Option<AdapterDelta>), PairError> {
    let limits = DecodeLimits::of(layout, trainable);
    if !has_control {
        return Ok((PackedDelta::decode(bytes, layout, &limits).map_err(PairError::Delta)?, None));
    }
    let (delta, control) = split(bytes)?;
    let delta = PackedDelta::decode(delta, layout, &limits).map_err(PairError::Delta)?;
    let control = PackedDelta::decode(control, layout, &limits).map_err(PairError::Control)?;
    Ok((delta, Some(control)))
}
