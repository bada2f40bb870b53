//! The link between a device and the aggregator: QUIC with mutual TLS, and an in-memory twin with seeded faults.
//!
//! ```text
//!  device                                                                  aggregator
//!  Link ─ session ─ request ─ frames ─┬─ quic ═══ UDP, TLS 1.3 ═══ quic ─┬─ frames ─ serve ─ Handler
//!                                     └─ sim  ─── memory, faults ─── sim ┘
//! ```
//!
//! [`Link`] is what `edge-client` is written against and [`Handler`] what `aggregator` implements. One implementation
//! of each side's exchange (`session`, `request`; `serve`) runs over any pair of byte streams; the two carriers only
//! open streams and say who is at the other end. This crate never looks into an update or a release.

mod clock;
mod limits;
mod meter;
mod link;
mod session;
mod request;
mod wire;
mod frames;
mod quic;
mod sim;
mod serve;
mod seats;
mod handler;
mod identity;
mod certificate;
mod authority;
mod tls;
#[cfg(feature = "contract")]
pub mod contract;

pub use authority::{Authority, ServerIdentity};
pub use clock::Clock;
pub use handler::{ContentPart, Handler, Opened, Peer};
pub use identity::{Credentials, DeviceKey, IdentityError};
pub use limits::{Congestion, LinkLimits, ServeLimits};
pub use link::{Link, LinkError, Uploaded};
pub use meter::{Meter, PutOff};
pub use quic::{BindError, QuicServer, QuicWire, enroll};
pub use session::Session;
pub use sim::{Fault, FaultRates, Faults, Injected, SimNetwork, SimWire};
pub use tls::{ALPN, ALPN_ENROLMENT};
pub use wire::{Purpose, Stream, Wire};

/// The link that devices use.
pub type QuicLink = Session<QuicWire>;

/// The link of tests and simulations.
pub type SimLink<H> = Session<SimWire<H>>;
