//! SCAFFOLD's control variates on the device: its own `cᵢ`, and what a round corrects its gradients by.
//!
//! Used by `pipeline.rs` around `train.rs` and `compress.rs`. A round's next `cᵢ` waits in three places, each left by one
//! renaming: with the round in progress; after the receipt, as pending; and it counts once the aggregator says that it
//! merged that round. So a kill, a round that ended without a merge or a lost receipt leave `cᵢ` what the aggregator
//! has of this device. It never leaves the device but as a packed change.

use std::sync::Arc;

use commonweal_adapter::{Adapter, AdapterFacts, AdapterKind, AdapterLayout, disk, scaffold::Correction};
use commonweal_protocol::{BaseHash, Control, RoundId, Scaffold, SignatureError};
use commonweal_transport::Link;

use crate::{
    install::{self, Expected, InstallError},
    store::{Store, StoreError},
};

const OWN: &str = "control.bin";
const PENDING: &str = "control-pending.bin";
/// The next `cᵢ` of the round in progress.
pub(crate) const NEXT: &str = "round/control.bin";
/// Before the adapter file: the round that it comes from.
const ROUND_BYTES: usize = 8;

/// Why a round's correction cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Not from the aggregator that enrolled this device.
    #[error("control variate of round {round} is not signed by the aggregator")]
    Signature {
        /// The round that made it.
        round: RoundId,
        /// Why.
        #[source]
        source: SignatureError,
    },
    /// Made on another base.
    #[error("control variate of round {round} is for base {got}, this device has {expected}")]
    Base {
        /// The round that made it.
        round: RoundId,
        /// This device's.
        expected: BaseHash,
        /// Its own.
        got: BaseHash,
    },
    /// Its bytes could not be had.
    #[error(transparent)]
    Install(#[from] InstallError),
    /// Of another adapter than the round's start.
    #[error("control variate: expected the layout of the round's start")]
    Layout(#[from] commonweal_adapter::AdapterError),
    /// The disk refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Both control variates at a round's start.
#[derive(Clone, Debug)]
pub struct Controls {
    server: Adapter,
    own: Adapter,
}

impl Controls {
    /// What each gradient of the round is corrected by.
    pub fn correction(&self) -> Result<Correction, commonweal_adapter::AdapterError> {
        Correction::new(&self.server, &self.own)
    }

    /// The device's own.
    pub fn own(&self) -> &Adapter {
        &self.own
    }
}

/// The control variates of a round; none if it does not correct gradients. What was pending counts or is forgotten.
pub async fn begin(
    link: &impl Link,
    store: &Store,
    expected: &Expected,
    scaffold: &Scaffold,
    layout: &Arc<AdapterLayout>,
) -> Result<Option<Controls>, ControlError> {
    let zeros = || Adapter::zeros(Arc::clone(layout));
    let control = match scaffold {
        Scaffold::Off => return Ok(None),
        Scaffold::Zero => {
            // Nothing was merged: whatever is here is of another federation, or of before a new beginning.
            store.remove(OWN)?;
            store.remove(PENDING)?;
            return Ok(Some(Controls { server: zeros(), own: zeros() }));
        }
        Scaffold::Control(signed) => {
            let round = signed.control.round;
            let source = |source| ControlError::Signature { round, source };
            signed.verify(&expected.trust.key()).map_err(source)?
        }
    };
    if control.base != expected.base {
        let (round, got) = (control.round, control.base);
        return Err(ControlError::Base { round, expected: expected.base, got });
    }
    let server = install::obtain(link, store, expected, control.content()).await?;
    server.layout().require(layout).map_err(commonweal_adapter::AdapterError::from)?;
    settle_pending(store, control)?;
    let own = store.read_remade(OWN)?.and_then(|bytes| read(&bytes, expected.base, layout));
    Ok(Some(Controls { server, own: own.unwrap_or_else(zeros) }))
}

/// Writes the next `cᵢ` into the round in progress.
pub(crate) fn write_next(
    store: &Store,
    round: RoundId,
    base: BaseHash,
    next: &Adapter,
) -> Result<(), ControlError> {
    let facts = AdapterFacts { base: base.0, kind: AdapterKind::Control };
    let mut bytes = round.0.to_le_bytes().to_vec();
    bytes.extend(disk::write(next, &facts)?);
    Ok(store.write_within(NEXT, &bytes)?)
}

/// After a receipt; can be done again.
pub(crate) fn await_merge(store: &Store) -> Result<(), StoreError> {
    store.rename(NEXT, PENDING)
}

/// Whether there is one, or one awaits a merge.
pub(crate) fn is_any(store: &Store) -> bool {
    store.exists(OWN) || store.exists(PENDING)
}

/// Another federation's control variates are none here, nor are those of what was forgotten.
pub(crate) fn forget(store: &Store) -> Result<(), StoreError> {
    store.remove(OWN)?;
    store.remove(PENDING)
}

/// What awaits a merge counts if its round is in the aggregator's control variate. A round of before this one has ended.
fn settle_pending(store: &Store, control: &Control) -> Result<(), StoreError> {
    let Some(bytes) = store.read_remade(PENDING)? else { return store.remove(PENDING) };
    let round = bytes.first_chunk::<ROUND_BYTES>().map(|round| RoundId(u64::from_le_bytes(*round)));
    if round.is_some_and(|round| control.includes(round)) {
        store.rename(PENDING, OWN)
    } else {
        tracing::info!(
            "round {} was not merged: its control variate is forgotten",
            round.unwrap_or_default()
        );
        store.remove(PENDING)
    }
}

/// `None` for another base's, another layout's or a damaged one, which the round then begins without.
fn read(bytes: &[u8], base: BaseHash, layout: &Arc<AdapterLayout>) -> Option<Adapter> {
    let (adapter, facts) = disk::read(bytes.get(ROUND_BYTES..)?).ok()?;
    let fits = facts.base == base.0 && facts.kind == AdapterKind::Control && adapter.layout() == layout;
    if !fits {
        tracing::warn!("the device's control variate is of another base or adapter; it begins anew");
    }
    fits.then_some(adapter)
}

#[cfg(test)]
mod tests {
    use super::*;
    use commonweal_adapter::{Module, Target};
    use commonweal_protocol::Digest;

    const BASE: BaseHash = BaseHash([3; 32]);

    fn layout(rank: usize) -> Arc<AdapterLayout> {
        let modules = vec![Module { target: Target::Q, inputs: 3, outputs: 4 }];
        Arc::new(AdapterLayout::new(1, rank, 4.0, modules).unwrap())
    }

    fn control(round: u64, merged: u64) -> Control {
        Control { round: RoundId(round), merged, base: BASE, digest: Digest([0; 32]), length: 1 }
    }

    /// A device whose update of `round` has its receipt.
    fn delivered(store: &Store, round: u64, value: f32) {
        let next = Adapter::from_values(layout(1), vec![value; 7]).unwrap();
        write_next(store, RoundId(round), BASE, &next).unwrap();
        await_merge(store).unwrap();
    }

    fn own(store: &Store) -> Option<f32> {
        store.read(OWN).unwrap().and_then(|bytes| read(&bytes, BASE, &layout(1))).map(|own| own.values()[0])
    }

    #[test]
    fn what_a_merge_took_counts_and_what_none_took_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        delivered(&store, 1, 0.5);
        assert_eq!(own(&store), None, "a receipt alone is no merge");
        settle_pending(&store, &control(1, 0b1)).unwrap();
        settle_pending(&store, &control(1, 0b1)).unwrap();
        assert_eq!(own(&store), Some(0.5));
        // Round 2 was abandoned, round 3 was merged without this device.
        delivered(&store, 2, 0.7);
        settle_pending(&store, &control(3, 0b101)).unwrap();
        assert_eq!((own(&store), store.read(PENDING).unwrap()), (Some(0.5), None));
        delivered(&store, 4, 0.9);
        settle_pending(&store, &control(4, 0b1011)).unwrap();
        assert_eq!(own(&store), Some(0.9));
    }

    #[test]
    fn another_base_or_layout_begins_anew() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        delivered(&store, 1, 0.5);
        settle_pending(&store, &control(1, 1)).unwrap();
        let bytes = store.read(OWN).unwrap().unwrap();
        assert!(read(&bytes, BASE, &layout(1)).is_some());
        assert!(read(&bytes, BaseHash([4; 32]), &layout(1)).is_none());
        assert!(read(&bytes, BASE, &layout(2)).is_none());
        assert!(read(&bytes[..bytes.len() - 1], BASE, &layout(1)).is_none());
    }
}
