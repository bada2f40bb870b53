//! What compression owes from one update to the next: what the updates that the aggregator has did not say, neither less
//! nor twice.
//!
//! Of `pipeline.rs`. `residual.bin` is what is owed, `residual-a.bin` in rounds that train `A` alone; a packed update comes with what will be owed if it is taken. Only a
//! receipt says that it was. An update that is let go without an answer may have been taken all the same: what it would
//! leave is set aside until the aggregator's word on the next one of that round tells.

use commonweal_adapter::Trainable;
use commonweal_protocol::{Refusal, RoundTask};

use crate::{
    begun::{BEGUN, Begun},
    control,
    pipeline::{Device, PipelineError},
    store::{Store, StoreError},
    task::trainable,
};

const RESIDUAL: &str = "residual.bin";
/// Of rounds that train `A` alone: what is owed of `A` waits there while `B` is trained.
const RESIDUAL_A: &str = "residual-a.bin";
pub(crate) const NEXT_RESIDUAL: &str = "round/residual.bin";
/// What the round's first update leaves, if that one was let go.
const SET_ASIDE: &str = "round/set-aside.bin";

/// Whether anything may be owed.
pub(crate) fn is_any(store: &Store) -> bool {
    store.exists(RESIDUAL) || store.exists(RESIDUAL_A)
}

/// Nothing is owed to another federation, nor of what was forgotten.
pub(crate) fn forget(store: &Store) -> Result<(), StoreError> {
    store.remove(RESIDUAL)?;
    store.remove(RESIDUAL_A)
}

impl<L> Device<L> {
    /// Clears the round's folder for work on another task, or on the same under other terms. `offered` is the round of an
    /// update in it, which may have been sent.
    pub(crate) fn clear_for(&self, task: &RoundTask, offered: bool) -> Result<(), PipelineError> {
        let before = self.read_round::<Begun>(BEGUN)?.map(|begun| begun.task);
        if offered && !self.store.exists(SET_ASIDE) {
            self.store.rename(NEXT_RESIDUAL, SET_ASIDE)?;
        }
        if before.as_ref().is_none_or(|before| before.round != task.round) {
            // Nobody will say any more whether it was taken. Counting it as taken costs at most its lessons; counting it
            // as lost might send twice what was owed before it.
            self.store.rename(SET_ASIDE, residual_of(before.as_ref().unwrap_or(task)))?;
        }
        Ok(self.store.clear_round_but(Some(SET_ASIDE))?)
    }

    /// After a receipt: what is owed now follows from what the aggregator has. Can be done again.
    pub(crate) fn settle(&self, task: &RoundTask) -> Result<(), StoreError> {
        self.store.rename(NEXT_RESIDUAL, residual_of(task))?;
        control::await_merge(&self.store)?;
        self.store.clear_round_but(None)
    }

    /// When a round's update is given up; `refusal` is the aggregator's word on it, if it came so far. What was owed
    /// before it is owed still, unless an earlier one of this round was taken.
    pub(crate) fn owe_still(&self, task: &RoundTask, refusal: Option<Refusal>) -> Result<(), StoreError> {
        match refusal {
            Some(Refusal::AlreadySent) if !self.store.exists(SET_ASIDE) => {
                // One that this device knows nothing of: what it left is not known either.
                self.store.remove(residual_of(task))?;
            }
            // It was taken, or may have been.
            Some(Refusal::AlreadySent | Refusal::StaleRound) | None => {
                self.store.rename(SET_ASIDE, residual_of(task))?;
            }
            // One that was taken would have been the reason.
            Some(_) => {}
        }
        self.store.remove(SET_ASIDE)?;
        self.store.remove(NEXT_RESIDUAL)
    }
}

/// Where what compression owes after rounds like this one is kept.
pub(crate) fn residual_of(task: &RoundTask) -> &'static str {
    match trainable(task.mode, task.round) {
        Trainable::AOnly => RESIDUAL_A,
        Trainable::Both | Trainable::BOnly => RESIDUAL,
    }
}
