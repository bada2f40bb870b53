//! The aggregator: what happens to a device's update, from its arrival to a signed release.
//!
//! ```text
//! receive ─▶ merge ─▶ align ─▶ evaluate ─▶ publish        round: decides when (pure)
//!    └─────── desk: the round's durable state ──────┘     drive: carries out what it decides
//! ```
//!
//! `signer` has the keys that sign, `lead` says which of several processes drives. `serve` owns sockets, timers and disks; `store` is the seam to what must not be lost; `cli` is the
//! operator's side, `observe` what can be seen of it all, `admin` the port that shows it. No type here can hold a person's text: alignment and evaluation read the operator's files.
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed"))]

pub mod config;
pub mod events;
pub mod round;
pub mod desk;
pub mod receive;
pub mod merge;
pub mod optimize;
pub mod laboratory;
pub mod align;
pub mod evaluate;
pub mod publish;
pub mod canary;
pub mod lead;
pub mod drive;
pub mod directory;
pub mod signer;
pub mod backup;
pub mod observe;
pub mod admin;
mod traces;
pub mod serve;
pub mod cli;
pub mod pause;
pub mod store;
#[cfg(any(test, fuzzing))]
pub mod fuzz;

/// What the program allocates with. The system's allocator keeps more of what each thread gave back, so that the peak grew
/// faster with the devices of a round (docs/performance.md).
pub use mimalloc::MiMalloc as Allocator;
