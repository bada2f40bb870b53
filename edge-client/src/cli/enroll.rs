//! `enroll`: spends an invitation and keeps the identity that it brings.

use anyhow::{Context, Result};
use commonweal_protocol::Invitation;
use commonweal_transport::{Clock, DeviceKey, LinkLimits};

use super::{
    Shared,
    exit::BadInput,
    identity::{Address, Identity},
    open,
};
use crate::{events::Event, install};

pub(super) fn enroll(shared: &Shared, invitation: &str) -> Result<()> {
    let invitation: Invitation = invitation.parse()?;
    let store = open::Place::find(shared)?.store()?;
    let clock = Clock::system();
    // Who missed the time to renew can only enrol anew, as another device.
    let holds = |identity: &Identity| clock.unix_ms() < identity.credentials.expires_ms();
    if let Some(identity) = Identity::read(&store)?.filter(holds) {
        let device = identity.credentials.device();
        return Err(BadInput(format!("this directory already holds the identity of device {device}")).into());
    }
    let runtime = tokio::runtime::Runtime::new().context("cannot start")?;
    let key = DeviceKey::generate()?;
    let limits = LinkLimits::default();
    let credentials = runtime.block_on(commonweal_transport::enroll(&invitation, key, &limits, &clock))?;
    let device = credentials.device().to_string();
    // Versions of another federation's releases do not compare with this one's.
    install::forget(&store)?;
    Identity { credentials, address: Address::of(&invitation) }.keep(&store)?;
    shared.output().show(&Event::Enrolled { device });
    Ok(())
}
