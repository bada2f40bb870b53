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
use crate::{
    control,
    events::Event,
    install, owed,
    store::{Store, StoreError},
    trust::{self, Trust},
};

pub(super) fn enroll(shared: &Shared, invitation: &str, is_anew: bool) -> Result<()> {
    let invitation: Invitation = invitation.parse()?;
    let store = open::Place::find(shared)?.store()?;
    let clock = Clock::system();
    // What is given up is not looked at: it may be damaged. The rest is, before an invitation is spent.
    let known = if is_anew { None } else { known(&store, clock.unix_ms())? };
    let runtime = tokio::runtime::Runtime::new().context("cannot start")?;
    let key = DeviceKey::generate()?;
    let limits = LinkLimits::default();
    let credentials = runtime.block_on(commonweal_transport::enroll(&invitation, key, &limits, &clock))?;
    let device = credentials.device().to_string();
    // Nor is anything kept of one that may have been an impostor.
    if !known.is_some_and(|known| known.knows(credentials.signing_key())) {
        forget_federation(&store)?;
    }
    Identity { credentials, address: Address::of(&invitation) }.keep(&store)?;
    // Not before: without its chain, the identity of before would trust the key again that it began with.
    trust::forget(&store)?;
    shared.output().show(&Event::Enrolled { device });
    Ok(())
}

/// Whose word the device takes whose certificate has ended: it can only enrol again, as another. One whose certificate
/// holds need not, and one that cannot tell which keys it has left must not, or it might trust one of those again.
fn known(store: &Store, now_ms: u64) -> Result<Option<Trust>> {
    let unknown = "what this device knows of its aggregator cannot be read; \
                   `edge-client enroll --anew` gives it up, and the installed release with it";
    let Some(Identity { credentials, .. }) = Identity::read(store).context(unknown)? else { return Ok(None) };
    if now_ms < credentials.expires_ms() {
        let device = credentials.device();
        return Err(BadInput(format!(
            "this directory already holds the identity of device {device}; --anew gives it up"
        ))
        .into());
    }
    Trust::open(store, &credentials).map(Some).context(unknown)
}

/// Another federation's versions and round numbers do not compare with this one's, nor was what is owed there owed here.
/// Its receipts stay: they are signed by another key and count for nothing.
fn forget_federation(store: &Store) -> Result<(), StoreError> {
    install::forget(store)?;
    owed::forget(store)?;
    control::forget(store)?;
    store.clear_round_but(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_another_federation_only_receipts_and_samples_stay() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let gone = [
            "installed",
            "residual.bin",
            "residual-a.bin",
            "control.bin",
            "control-pending.bin",
            "round/task.json",
            "round/update.packed",
        ];
        let kept = ["receipts.jsonl", "samples/000001.jsonl"];
        for name in gone.into_iter().chain(kept) {
            store.write(name, b"x").unwrap();
        }
        forget_federation(&store).unwrap();
        assert!(gone.iter().all(|name| store.read(name).unwrap().is_none()));
        assert!(kept.iter().all(|name| store.read(name).unwrap().is_some()));
    }
}
