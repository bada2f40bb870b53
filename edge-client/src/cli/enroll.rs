//! `enroll`: spends an invitation and keeps the identity that it brings.

use anyhow::{Context, Result};
use commonweal_protocol::Invitation;
use commonweal_transport::{Clock, DeviceKey, LinkLimits};

use super::{Shared, exit::BadInput, open, rounds};
use crate::events::Event;

pub(super) fn enroll(shared: &Shared, invitation: &str) -> Result<()> {
    let invitation: Invitation = invitation.parse()?;
    let store = open::Place::find(shared)?.store()?;
    if let Some((credentials, _)) = rounds::credentials(&store)? {
        let device = credentials.device();
        return Err(BadInput(format!("this directory already holds the identity of device {device}")).into());
    }
    let runtime = tokio::runtime::Runtime::new().context("cannot start")?;
    let key = DeviceKey::generate()?;
    let limits = LinkLimits::default();
    let credentials =
        runtime.block_on(commonweal_transport::enroll(&invitation, key, &limits, &Clock::system()))?;
    rounds::keep_credentials(&store, &credentials, &rounds::Address::of(&invitation))?;
    shared.output().show(&Event::Enrolled { device: credentials.device().to_string() });
    Ok(())
}
