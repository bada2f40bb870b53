//! The contract suite over both carriers, with the reference handler. Neighbours: the cases are in `src/contract`; the
//! aggregator runs the same with its own handler.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod reference;

use commonweal_transport::contract::{QuicMedium, SimMedium};
use reference::{Reference, ReferenceSubject};
use std::sync::Arc;

commonweal_transport::contract_suite!(over_quic, ReferenceSubject, QuicMedium);
commonweal_transport::contract_suite!(in_memory, ReferenceSubject, SimMedium<Arc<Reference>>);
