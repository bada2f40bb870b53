//! What the device's owner wants forgotten goes, with everything on this device that was computed from it.
//!
//! A wish is written down before it is carried out, so that a kill in between loses no part of it: the next start goes on.
//! A daemon's visit under way ends for it (`cli/rounds.rs`). Of a sample that a round has drawn, all goes that rounds
//! leave: pairs, checkpoint, packed update, residuals, control variates. They are sums over samples, and no one can be
//! taken out of a sum. What an aggregator has already, stays with it (docs/privacy.md). An endpoint that is running sees
//! that the personal adapter has gone, and that an era has ended (`era.rs`), and lets go of what it holds.

use std::collections::BTreeSet;

use crate::{
    control,
    era::Era,
    kept, owed, personal,
    sample::{Sample, SampleId},
    store::{Held, Store, StoreError},
    units::Span,
};

/// The samples that shall go.
pub(crate) const WISH: &str = "forget.samples";
/// Held while a wish is written down or taken off, which a command and a daemon may do at once.
pub(crate) const WISH_LOCK: &str = "forget.lock";
/// There if everything shall; it must be read without the key, which may be lost.
pub(crate) const WISH_ALL: &str = "forget-all";

/// What a wish came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forgotten {
    /// Whether what rounds left went too.
    pub rounds: bool,
    /// Whether the personal adapter did.
    pub personal: bool,
}

/// Writes down that these samples shall go.
pub fn wish(store: &Store, ids: &BTreeSet<SampleId>) -> Result<(), StoreError> {
    let _held = store.hold(WISH_LOCK)?;
    add_to_wish(store, ids)
}

/// The same for samples that were listed in an era. False, and nothing is written, once it is over: the key that this store
/// has read may have gone with it, and a wish that was sealed with that would never open, nor would the directory.
pub fn wish_of(store: &Store, ids: &BTreeSet<SampleId>, era: Era) -> Result<bool, StoreError> {
    let _held = store.hold(WISH_LOCK)?;
    let is_over = Era::now(store)? != era;
    if !is_over {
        add_to_wish(store, ids)?;
    }
    Ok(!is_over)
}

fn add_to_wish(store: &Store, ids: &BTreeSet<SampleId>) -> Result<(), StoreError> {
    let mut all = kept::read_ids(store, WISH)?.unwrap_or_default();
    all.extend(ids);
    kept::write_ids(store, WISH, &all)
}

/// Writes down that everything sealed shall go.
pub fn wish_all(store: &Store) -> Result<(), StoreError> {
    store.write(WISH_ALL, b"")
}

/// Whether something waits to be forgotten.
pub fn is_wished(store: &Store) -> bool {
    store.exists(WISH) || store.exists(WISH_ALL)
}

/// The samples that are older than the owner wants to keep any.
pub fn expired(store: &Store, keep: Span, now_ms: u64) -> Result<BTreeSet<SampleId>, StoreError> {
    let is_old = |kept: &kept::Kept| now_ms.saturating_sub(kept.added_ms) > keep.ms();
    Ok(kept::all(store)?.iter().filter(|kept| is_old(kept)).map(|kept| kept.sample.id()).collect())
}

/// Forgets what is older than the owner wants to keep anything; the log tells how many samples that was.
pub fn expire(store: &Store, keep: Option<Span>, now_ms: u64) -> Result<(), StoreError> {
    let Some(keep) = keep else { return Ok(()) };
    let old = expired(store, keep, now_ms)?;
    if !old.is_empty() {
        wish(store, &old)?;
        carry_out(store)?;
        tracing::info!("{} samples were older than the policy keeps them, and are forgotten", old.len());
    }
    Ok(())
}

/// The same for whoever does not hold the directory. Tells whether it was looked: not where somebody works, who looks for
/// it at the start and once a day.
pub(crate) fn expire_alone(store: &Store, keep: Option<Span>, now_ms: u64) -> Result<bool, StoreError> {
    if keep.is_none() {
        return Ok(true);
    }
    if store.is_worked_in()? {
        return Ok(false);
    }
    // Who visits looks for it as well, and may take hours.
    let Some(_visiting) = store.try_hold_visit()? else { return Ok(false) };
    expire(store, keep, now_ms)?;
    Ok(true)
}

/// Carries out what was wished, while nobody works on a round here. Nothing happens if nothing was.
pub fn carry_out(store: &Store) -> Result<Forgotten, StoreError> {
    let mut forgotten = Forgotten::default();
    loop {
        if store.exists(WISH_ALL) {
            return forget_all(store);
        }
        let Some(ids) = kept::read_ids(store, WISH)? else { return Ok(forgotten) };
        let Forgotten { rounds, personal } = forget(store, &ids)?;
        forgotten.rounds |= rounds;
        forgotten.personal |= personal;
        take_off(store, &ids)?;
    }
}

fn forget(store: &Store, ids: &BTreeSet<SampleId>) -> Result<Forgotten, StoreError> {
    // First what is computed from them, so that what is left never tells of a sample that is no longer listed.
    let is_drawn = kept::used(store)?.is_none_or(|used| !used.is_disjoint(ids));
    let rounds = is_drawn && has_rounds(store)?;
    if is_drawn {
        store.clear_round_but(None)?;
        owed::forget(store)?;
        control::forget(store)?;
    }
    let personal = personal::forget_with(store, ids)?;
    kept::remove(store, ids)?;
    kept::unmark(store, ids)?;
    Ok(Forgotten { rounds, personal })
}

/// What was carried out is wished no more; what was wished meanwhile still is.
fn take_off(store: &Store, ids: &BTreeSet<SampleId>) -> Result<(), StoreError> {
    let _held = store.hold(WISH_LOCK)?;
    let left = &kept::read_ids(store, WISH)?.unwrap_or_default() - ids;
    if left.is_empty() { store.remove(WISH) } else { kept::write_ids(store, WISH, &left) }
}

/// Whether rounds have left anything here.
pub(crate) fn has_rounds(store: &Store) -> Result<bool, StoreError> {
    Ok(!store.list("round")?.is_empty() || owed::is_any(store) || control::is_any(store))
}

/// Until they are dropped, nobody adds a sample, a personal adapter or a wish, or takes one away. Nobody else holds two of
/// these at once, so that whoever waits here is waited for by none that it waits for.
pub(crate) fn hold_all(store: &Store) -> Result<[Held; 3], StoreError> {
    Ok([kept::hold(store)?, personal::hold(store)?, store.hold(WISH_LOCK)?])
}

/// Opens nothing, so that it works without the key.
fn forget_all(store: &Store) -> Result<Forgotten, StoreError> {
    let forgotten = Forgotten { rounds: has_rounds(store)?, personal: personal::exists(store) };
    let _held = hold_all(store)?;
    store.remove_parts()?;
    for name in store.secrets()? {
        store.remove(&name)?;
    }
    // What somebody holds in memory to write it later is of before.
    Era::end(store)?;
    store.remove(WISH_ALL)?;
    Ok(forgotten)
}

/// The samples whose names begin so, which a person has typed. Each must mean one.
pub fn choose(all: &[Sample], beginnings: &[String]) -> Result<BTreeSet<SampleId>, ChooseError> {
    let mut chosen = BTreeSet::new();
    for beginning in beginnings {
        let beginning = beginning.to_lowercase();
        let mut found = all.iter().map(Sample::id).filter(|id| id.to_string().starts_with(&beginning));
        match (found.next(), found.next()) {
            (Some(id), None) => chosen.insert(id),
            (None, _) => return Err(ChooseError::None { beginning }),
            (Some(_), Some(_)) => return Err(ChooseError::Several { beginning }),
        };
    }
    Ok(chosen)
}

/// Why a name does not tell a sample.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChooseError {
    /// No sample has it.
    #[error("no sample's name begins with {beginning:?}: `edge-client samples` lists them")]
    None {
        /// What was typed.
        beginning: String,
    },
    /// It is too short.
    #[error("several samples' names begin with {beginning:?}: type more of it")]
    Several {
        /// What was typed.
        beginning: String,
    },
}

#[cfg(test)]
mod tests;
