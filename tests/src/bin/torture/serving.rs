//! An aggregator's process: `modelless.rs` of the tests, with rounds of a few hundred milliseconds. It is alone over its
//! directory, or one of several over a database.

use std::path::Path;

use aggregator::{config::Config, events::Events, round::Policy, serve::Role};
use anyhow::Result;
use commonweal_tests::{
    child::tell,
    modelless::{self, Modelless},
    port,
};
use commonweal_transport::ServeLimits;
use serde::{Deserialize, Serialize};

use crate::peers;

/// MB of the adapter, so that an update is of two chunks: a kill may fall between them.
pub(super) const ADAPTER_MB: u32 = 5;

/// How long a stream may stand still: so short that those which dribble are given up between two kills.
pub(super) const STALL_MS: u64 = 1_000;

/// What the process tells, once.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Listening {
    /// At this port.
    pub(super) port: u16,
    /// One for each device and then one for each hostile peer, if none has enrolled yet.
    pub(super) invitations: Vec<String>,
}

/// The aggregator of a directory, fresh or as it was left.
pub(super) fn open(path: &Path, devices: u32) -> Result<Modelless> {
    let events = Events::to(|event| tracing::debug!("{}", event.sentence()));
    Modelless::open(path, ADAPTER_MB, config(devices), events)
}

/// Serves at a port until the standard input ends; 0 stands for one of its own choice, and for the first start.
pub(super) fn serve(path: &Path, port: u16, devices: u32, role: Role) -> Result<()> {
    let aggregator = open(path, devices)?;
    let (port, invited) = if port == 0 { (port::lasting()?, devices + peers::ENROLLED) } else { (port, 0) };
    let limits = ServeLimits { stall_ms: STALL_MS, ..ServeLimits::default() };
    aggregator.serve_as(role, port, limits, |aggregator, address| {
        let invitations = aggregator.invite(invited, address)?;
        tell(&Listening { port: address.port(), invitations });
        Ok(())
    })
}

/// Rounds that go on whoever is dead: two thirds of the devices are wanted, a third is enough after two seconds.
fn config(devices: u32) -> Config {
    let mut config = modelless::config(Policy {
        goal: (devices * 2 / 3).max(1),
        quorum: (devices / 3).max(1),
        over_selection: 1.5,
        wait_ms: 500,
        deadline_ms: 2_000,
        ..Policy::default()
    });
    (config.receive.reconnect_after_ms, config.receive.reconnect_spread_ms) = (10, 20);
    config.receive.requests_per_second = 1_000.0;
    config.receive.reserve_bytes = 2 << 20;
    config.receive.releases_kept = 2;
    config
}
