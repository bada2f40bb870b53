//! `enroll`: spends an invitation and keeps the identity that it brings.

use anyhow::{Context, Result};
use commonweal_protocol::{AggregatorKey, Invitation, KeyNumber};
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
    trouble,
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
    if !is_of(known.as_ref(), credentials.lineage().number(), *credentials.signing_key())? {
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

/// Whether this is the aggregator that the device knows, by its key in force. A key that it has left is no other
/// federation's: whoever signs with it may have stolen it.
fn is_of(known: Option<&Trust>, number: KeyNumber, key: AggregatorKey) -> Result<bool, BadInput> {
    let Some(known) = known else { return Ok(false) };
    if (known.number(), known.key()) == (number, key) {
        return Ok(true);
    }
    if known.knows(&key) {
        return Err(BadInput(format!(
            "the aggregator signs with key {number}, {}, and this device has followed it to key {}: the older one may be \
             stolen, or the aggregator was restored from a backup. Ask its operator; --anew, with another invitation, \
             trusts it again",
            key.0,
            known.number()
        )));
    }
    Ok(false)
}

/// Another federation's versions and round numbers do not compare with this one's, nor was what is owed there owed here.
/// Its receipts stay: they are signed by another key and count for nothing.
fn forget_federation(store: &Store) -> Result<(), StoreError> {
    install::forget(store)?;
    trouble::forget(store)?;
    owed::forget(store)?;
    control::forget(store)?;
    store.clear_round_but(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use commonweal_protocol::{DeviceId, Lineage, SigningKey};

    #[test]
    fn a_key_that_was_left_is_not_trusted_again_by_enrolling() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let secret = |seed| SigningKey::from_bytes(&[seed; 32]);
        let key = |seed| AggregatorKey::of(&secret(seed));
        let mut lineage = Lineage::new(KeyNumber(3), key(1));
        let trust = Trust::new(DeviceId([1; 16]), lineage.clone());
        lineage.succeed(&secret(1), key(2), 1).unwrap();
        trust.follow(&store, lineage.steps()).unwrap();
        assert!(is_of(Some(&trust), KeyNumber(4), key(2)).unwrap());
        let error = is_of(Some(&trust), KeyNumber(3), key(1)).unwrap_err();
        assert!(error.to_string().contains("--anew"), "{error}");
        // Nor under another number.
        assert!(is_of(Some(&trust), KeyNumber(5), key(1)).is_err());
        assert!(is_of(Some(&trust), KeyNumber(5), key(2)).is_err());
        // Another federation's, or whatever it is after --anew.
        assert!(!is_of(Some(&trust), KeyNumber(0), key(7)).unwrap());
        assert!(!is_of(None, KeyNumber(3), key(1)).unwrap());
    }

    #[test]
    fn of_another_federation_only_receipts_and_samples_stay() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let gone = [
            "installed",
            "trouble.json",
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
