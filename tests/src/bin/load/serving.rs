//! The aggregator of the load: `modelless.rs` of the tests, with the limits that `aggregator serve` has.

use std::path::Path;

use aggregator::{events::Events, round::Policy, serve::Role};
use anyhow::Result;
use commonweal_tests::{
    child::tell,
    modelless::{self, Modelless},
};
use commonweal_transport::ServeLimits;
use serde::{Deserialize, Serialize};

use crate::Arguments;

/// What the aggregator's process tells, once.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Told {
    /// One for each device.
    pub(super) invitations: Vec<String>,
    /// Where it listens.
    pub(super) port: u16,
}

/// Serves until the standard input ends.
pub(super) fn serve(arguments: &Arguments, path: &Path, role: Role) -> Result<()> {
    // One of them invites for all.
    let invited = if role == Role::Drive { 0 } else { arguments.devices };
    open(arguments, path)?.serve_as(role, 0, ServeLimits::default(), |aggregator, address| {
        tell(&Told { invitations: aggregator.invite(invited, address)?, port: address.port() });
        Ok(())
    })
}

/// The aggregator of a directory, fresh or as it was left.
pub(super) fn open(arguments: &Arguments, path: &Path) -> Result<Modelless> {
    let mut config = modelless::config(Policy {
        goal: arguments.goal(),
        quorum: 1,
        wait_ms: 5_000,
        deadline_ms: 60_000,
        ..Policy::default()
    });
    config.receive.releases_kept = 3;
    let events = Events::to(|event| tracing::info!("{}", event.sentence()));
    Modelless::open(path, arguments.adapter_mb, config, events)
}
