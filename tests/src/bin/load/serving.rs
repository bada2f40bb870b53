//! The aggregator of the load: `modelless.rs` of the tests, with the limits that `aggregator serve` has.

use std::path::Path;

use aggregator::{events::Events, round::Policy};
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
}

/// Serves until the standard input ends.
pub(super) fn serve(arguments: &Arguments, path: &Path) -> Result<()> {
    let mut config = modelless::config(Policy {
        goal: arguments.goal(),
        quorum: 1,
        wait_ms: 5_000,
        deadline_ms: 60_000,
        ..Policy::default()
    });
    config.receive.releases_kept = 3;
    let events = Events::to(|event| tracing::info!("{}", event.sentence()));
    let aggregator = Modelless::open(path, arguments.adapter_mb, config, events)?;
    aggregator.serve(0, ServeLimits::default(), |aggregator, address| {
        tell(&Told { invitations: aggregator.invite(arguments.devices, address)? });
        Ok(())
    })
}
