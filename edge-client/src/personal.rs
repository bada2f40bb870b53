//! The personal adapter: what a person teaches the model for themselves, beside what the federation taught it. It stays on
//! this device. No round reads it: `pipeline.rs` and what it calls know nothing of this file. `cli/offline.rs` trains it,
//! `cli/voices.rs` lays it beside the installed release.
//!
//! Both together change a linear by the sum of what each changes: their ranks stand side by side
//! (`commonweal_adapter::stack`). A later release takes the place of the one that it was trained beside; the personal one
//! stays as it is.

use std::{collections::BTreeSet, sync::Arc};

use commonweal_adapter::{
    Adapter, AdapterError, AdapterFacts, AdapterKind, AdapterLayout, ReadError, disk, stack,
};
use commonweal_protocol::BaseHash;

use crate::{
    kept,
    sample::{Sample, SampleId},
    store::{Held, Stamp, Store, StoreError},
};

const FILE: &str = "personal.adapter";
/// The samples that it was trained on, so that it can be forgotten with them.
const SAMPLES: &str = "personal.samples";
/// Held while the adapter or the list is written or taken away.
const LOCK: &str = "personal.lock";
/// So far the values of a new one are drawn: any number does, and the same file trains the same adapter.
const SEED: u64 = 0;

/// Why there is no personal adapter, or it cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PersonalError {
    /// Its file is no adapter.
    #[error("the personal adapter cannot be read; `edge-client train FILE --personal --anew` makes another")]
    Read(#[from] ReadError),
    /// It was trained for another package.
    #[error(
        "the personal adapter is for base {got}, this package has {expected}; \
         `edge-client train FILE --personal --anew` makes another"
    )]
    Base {
        /// This package's.
        expected: BaseHash,
        /// The adapter's.
        got: BaseHash,
    },
    /// Something that it was trained on was forgotten meanwhile.
    #[error("what the personal adapter was trained on was forgotten while it was trained; it is not kept")]
    Forgotten,
    /// It does not lie beside the release, or has values that are not finite.
    #[error("the personal adapter does not fit")]
    Adapter(#[from] AdapterError),
    /// The disk refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The personal adapter, if there is one.
pub fn read(store: &Store, base: BaseHash) -> Result<Option<Adapter>, PersonalError> {
    let Some(bytes) = store.read(FILE)? else { return Ok(None) };
    let (adapter, facts) = disk::read(&bytes)?;
    if facts.base != base.0 {
        return Err(PersonalError::Base { expected: base, got: BaseHash(facts.base) });
    }
    Ok(Some(adapter))
}

/// Keeps it, in the place of the one before, unless something that it was trained on was forgotten since
/// [`tell_samples`].
pub fn write(
    store: &Store,
    adapter: &Adapter,
    base: BaseHash,
    trained_on: &BTreeSet<SampleId>,
) -> Result<(), PersonalError> {
    let bytes = encode(adapter, base)?;
    let _held = hold(store)?;
    match kept::read_ids(store, SAMPLES)? {
        Some(known) if known.is_superset(trained_on) => {}
        // Of a program of before, whose adapter goes with any sample, and is still there.
        None if exists(store) => {}
        _ => return Err(PersonalError::Forgotten),
    }
    Ok(store.write_within(FILE, &bytes)?)
}

fn encode(adapter: &Adapter, base: BaseHash) -> Result<Vec<u8>, AdapterError> {
    disk::write(adapter, &AdapterFacts { base: base.0, kind: AdapterKind::Assistant })
}

/// Before it is trained from this start: refuses what would then not be kept for want of room.
pub fn require_room(
    store: &Store,
    start: &Adapter,
    kept_ranks: usize,
    base: BaseHash,
) -> Result<(), PersonalError> {
    let bytes = encode(&take(start, kept_ranks)?, base)?;
    Ok(store.require_disk(FILE, bytes.len() as u64)?)
}

/// Until it is dropped, nobody else writes the adapter or takes it away.
pub(crate) fn hold(store: &Store) -> Result<Held, StoreError> {
    store.hold(LOCK)
}

/// Whether there is one.
pub fn exists(store: &Store) -> bool {
    store.exists(FILE)
}

/// What tells the adapter that is there from a later one, and from none. To be asked for before it is read.
pub(crate) fn stamp(store: &Store) -> Result<Option<Stamp>, StoreError> {
    store.stamp_of_content(FILE)
}

/// Before it is trained on these samples: with those of before, for the adapter of before stands until there is another.
pub fn tell_samples<'s>(store: &Store, samples: impl Iterator<Item = &'s Sample>) -> Result<(), StoreError> {
    let _held = hold(store)?;
    let before = kept::read_ids(store, SAMPLES)?;
    if before.is_none() && exists(store) {
        // Of a program of before: what it was trained on is not known, and stays so.
        return Ok(());
    }
    let mut ids = before.unwrap_or_default();
    ids.extend(samples.map(Sample::id));
    kept::write_ids(store, SAMPLES, &ids)
}

/// Leaves no personal adapter, and none that is being trained, if it was or may have been trained on one of these
/// samples. Whether there was one.
pub(crate) fn forget_with(store: &Store, ids: &BTreeSet<SampleId>) -> Result<bool, StoreError> {
    let _held = hold(store)?;
    let is_there = exists(store);
    let is_of = kept::read_ids(store, SAMPLES)?.map_or(is_there, |known| !known.is_disjoint(ids));
    if is_of {
        store.remove(FILE)?;
        store.remove(SAMPLES)?;
    }
    Ok(is_there && is_of)
}

/// The release with the personal adapter beside it.
pub fn beside(release: Option<&Adapter>, personal: &Adapter) -> Result<Adapter, AdapterError> {
    release.map_or_else(|| Ok(personal.clone()), |release| stack(release, &[personal]))
}

/// What training the personal adapter begins with: the release, whose ranks stay as they are, and beside it the personal
/// adapter, a new one if there is none. The second is the number of ranks that stay.
pub fn begin(
    release: Option<&Adapter>,
    personal: Option<Adapter>,
    layout: &Arc<AdapterLayout>,
) -> Result<(Adapter, usize), AdapterError> {
    let personal = personal.unwrap_or_else(|| Adapter::init(Arc::clone(layout), SEED));
    Ok((beside(release, &personal)?, release.map_or(0, |release| release.layout().rank())))
}

/// The personal adapter out of what was trained.
pub fn take(trained: &Adapter, kept_ranks: usize) -> Result<Adapter, AdapterError> {
    stack::part(trained, kept_ranks..trained.layout().rank())
}

#[cfg(test)]
mod tests {
    use super::*;
    use commonweal_adapter::{Module, Target};

    use crate::units::Limit;

    fn layout() -> Arc<AdapterLayout> {
        let module = Module { target: Target::Q, inputs: 3, outputs: 4 };
        Arc::new(AdapterLayout::new(1, 2, 4.0, vec![module]).unwrap())
    }

    fn filled(seed: u64) -> Adapter {
        let mut adapter = Adapter::init(layout(), seed);
        adapter.values_mut().iter_mut().for_each(|value| *value += 0.25);
        adapter
    }

    #[test]
    fn what_is_trained_beside_a_release_is_taken_out_again() {
        let (release, personal) = (filled(1), filled(2));
        let (start, kept) = begin(Some(&release), Some(personal.clone()), &layout()).unwrap();
        assert_eq!((start.layout().rank(), kept), (4, 2));
        assert_eq!(take(&start, kept).unwrap().values(), personal.values());
        assert_eq!(beside(Some(&release), &personal).unwrap(), start);
        // Without a release it is all there is.
        let (start, kept) = begin(None, None, &layout()).unwrap();
        assert_eq!((take(&start, kept).unwrap(), kept), (Adapter::init(layout(), SEED), 0));
    }

    #[test]
    fn the_file_is_for_one_base() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let (ours, other) = (BaseHash([1; 32]), BaseHash([2; 32]));
        assert!(!exists(&store) && read(&store, ours).unwrap().is_none());
        tell_samples(&store, [].iter()).unwrap();
        write(&store, &filled(3), ours, &BTreeSet::new()).unwrap();
        assert!(exists(&store));
        assert_eq!(read(&store, ours).unwrap(), Some(filled(3)));
        assert!(matches!(read(&store, other), Err(PersonalError::Base { .. })));
    }
    #[test]
    fn what_would_not_be_kept_is_refused_before_it_is_trained() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let base = BaseHash([1; 32]);
        tell_samples(&store, [].iter()).unwrap();
        let (start, kept) = begin(Some(&filled(1)), None, &layout()).unwrap();
        let personal = take(&start, kept).unwrap();
        // Beside the one whose place it takes.
        write(&store, &personal, base, &BTreeSet::new()).unwrap();
        let (used, length) = (store.disk_bytes().unwrap(), encode(&personal, base).unwrap().len() as u64);
        let store = store.within(Limit::of(used + length - 1));
        let error = require_room(&store, &start, kept, base).unwrap_err();
        assert!(matches!(error, PersonalError::Store(StoreError::OverBudget { .. })), "{error}");
        let store = store.within(Limit::of(used + length));
        require_room(&store, &start, kept, base).unwrap();
        write(&store, &personal, base, &BTreeSet::new()).unwrap();
    }
}
