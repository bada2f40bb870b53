//! LoRA adapters, from their shape to their merged sum. Pure: no I/O, no clock, no hidden randomness.
//!
//! Modules are declared in the order in which data passes them: a [`layout`] gives an [`adapter`] its shape,
//! [`disk`] and [`peft`] put it into files, training turns it into a [`delta`], a device [`mod@compress`]es that,
//! the aggregator decodes it ([`packed`]), [`clip`]s it, [`mod@merge`]s many of them and steps along the result
//! ([`optimize`]).
//!
//! A device lays an adapter of its own beside the federation's ([`mod@stack`]).
//!
//! Nothing here knows a person's text, a device's address or what time it is.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::float_cmp, reason = "a failed test may panic"))]

pub mod layout;
pub mod adapter;
pub mod disk;
pub mod peft;
pub mod delta;
mod select;
mod rotate;
pub mod quantize;
mod entropy;
mod shares;
pub mod compress;
pub mod packed;
pub mod pair;
pub mod clip;
mod sums;
pub mod mean;
mod robust;
pub mod merge;
pub mod exact;
pub mod optimize;
pub mod scaffold;
pub mod stack;

pub use adapter::{Adapter, AdapterError};
pub use clip::{Clip, clip_norm, median_norm};
pub use compress::{CompressError, CompressOptions, Residual, ResidualError, compress};
pub use delta::{AdapterDelta, Trainable};
pub use disk::{AdapterFacts, AdapterKind, ReadError};
pub use layout::{AdapterLayout, LayoutError, Module, Part, Target, TensorSpec};
pub use mean::Merger;
pub use merge::{MergeError, MergeReport, MergeRule, Update, merge};
pub use optimize::{Adaptive, Moments, ServerOptimizer};
pub use packed::{DecodeError, DecodeLimits, PackedDelta};
pub use peft::{PeftAdapter, export_peft};
pub use quantize::Bits;
pub use stack::stack;
