//! What a device and the aggregator say to each other: identifiers, messages, bounds, signatures. No I/O, no clock,
//! no randomness.
//!
//! The exchange, in the order of a device's life (bytes and bounds in `docs/wire.md`):
//!
//! ```text
//! device                                                aggregator
//!   Enroll{token, csr}                  ──────────────▶   (ALPN commonweal-enroll/1, once)
//!                                       ◀──────────────  Enrolled{chain, device, signing key}
//!   Poll{base, installed, key}          ──────────────▶   (ALPN commonweal/1, mutual TLS, from here on)
//!                                       ◀──────────────  PollReply{task?, release?, successions, reconnect}
//!   Fetch{digest, offset}               ──────────────▶
//!                                       ◀──────────────  Content{length}, Chunk, Chunk, …
//!   Open{round, base, digest, length…}  ──────────────▶
//!                                       ◀──────────────  Offset            (or Accepted: it is here already)
//!   Chunk, Chunk, …, Finish             ──────────────▶
//!                                       ◀──────────────  Accepted{signed receipt, reconnect}
//!   Renew{csr}                          ──────────────▶
//!                                       ◀──────────────  Renewed{chain}
//! ```
//!
//! Any request can be answered by `Refused{reason, reconnect}`. Every message holds counts, digests and numbers only:
//! no type of this crate has room for what a person wrote.

pub mod bounds;
mod identifiers;
mod opaque;
mod pace;
mod refusal;
mod enrolment;
mod invitation;
mod trouble;
mod task;
mod control;
mod update;
mod content;
mod receipt;
mod release;
mod signature;
mod succession;
mod invalid;
mod message;
mod frame;

pub use content::{Chunk, Content, Fetch};
pub use control::{Control, Scaffold, SignedControl};
pub use enrolment::{CertificateChain, Csr, Enroll, Enrolled, Renew};
pub use frame::{DecodeError, EncodeError, FRAME_VERSION, Header, decode, encode};
pub use identifiers::{BaseHash, DeviceId, Digest, IdentifierError, KeyNumber, RoundId, Token, Version};
pub use invalid::Invalid;
pub use invitation::{Host, Invitation, InvitationError};
pub use message::{EnrolmentReply, EnrolmentRequest, Message, Reply, Request};
pub use opaque::Opaque;
pub use pace::ReconnectWindow;
pub use receipt::{Accepted, Receipt, SignedReceipt};
pub use refusal::{Refusal, Refused};
pub use release::{Direction, Gate, Metric, Release, ReleaseNotice, ReportCard, RoundCounts, SignedRelease};
pub use signature::{AggregatorKey, Signature, SignatureError, SigningKey};
pub use succession::{Lineage, SignedSuccession, Succession, SuccessionError};
pub use task::{CompressSettings, Mode, Poll, PollReply, RoundTask, Start, TrainSettings};
pub use trouble::{Fault, Trouble};
pub use update::{DeviceReport, Open, TraceContext, UploadKey};
