//! A prefix that many prompts share, read once: the guard's policy, a system message. `generate.rs` and `score.rs`
//! start the prompts that begin with it behind it.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError},
};

use crate::{
    adapt::PreparedAdapter,
    cancel::{Cancel, Run},
    conversation::Prompt,
    infer::{InferError, Lane, check_prompt},
    model::Model,
};

/// Tokens that a prompt must have behind a prefix. A kernel that multiplies one row rounds another way than one that
/// multiplies several, so with a single token left a score would depend on whether the prefix was shared.
const BEHIND_MIN: usize = 2;

/// A row grows by so many tokens, for prompts behind its prefix.
const ROOM_TOKENS: usize = 256;

/// The cache of a prefix under one adapter. Prompts that do not begin with it, or have less than two tokens behind it,
/// are read whole. What a call gives does not depend on the prefix, but for rounding: fast kernels round the sums of one
/// row of tokens another way than those of several.
#[derive(Debug)]
pub struct SharedPrefix {
    ids: Vec<u32>,
    adapter: u64,
    /// The model knows of it too, and has it forgotten when its memory is wanted for something else.
    row: Arc<Mutex<Row>>,
}

/// One row: the prefix, if it was read since the model last closed, and behind it whatever the last prompt left.
#[derive(Debug)]
pub(crate) struct Row {
    lane: Lane,
    is_read: bool,
}

impl Row {
    /// Gives its memory back, if no call is using it; the next call reads the prefix again.
    pub(crate) fn forget(row: &Mutex<Self>) {
        let mut row = match row.try_lock() {
            Ok(row) => row,
            Err(TryLockError::Poisoned(row)) => row.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        // Where even the smallest row finds no memory, it stays as it is.
        if let Ok(smallest) = row.lane.emptied() {
            *row = Self { lane: smallest, is_read: false };
        }
    }
}

impl Model {
    /// Reads a prefix. Its last token must leave room for one more in the context.
    pub fn share_prefix(
        &self,
        adapter: &PreparedAdapter,
        ids: &[u32],
        cancel: &Cancel,
    ) -> Result<SharedPrefix, InferError> {
        let prefix = self.prefix_at_rest(adapter, ids)?;
        drop(prefix.read(&Run::new(cancel)?, ids.len() + 1)?);
        Ok(prefix)
    }

    /// The same without reading it: the first call that goes on behind it does.
    pub fn prefix_at_rest(&self, adapter: &PreparedAdapter, ids: &[u32]) -> Result<SharedPrefix, InferError> {
        check_prompt(self, 0, ids, self.context() - 1)?;
        let lane = Lane::new(self, adapter, 1, 1)?;
        let row = Arc::new(Mutex::new(Row { lane, is_read: false }));
        self.know_row(&row);
        Ok(SharedPrefix { ids: ids.to_vec(), adapter: adapter.identity(), row })
    }
}

impl SharedPrefix {
    /// The tokens of the prefix.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    pub(crate) fn check(&self, adapter: &PreparedAdapter) -> Result<(), InferError> {
        if adapter.identity() == self.adapter {
            Ok(())
        } else {
            Err(InferError::Foreign { what: "prefix", owner: "adapter" })
        }
    }

    /// The row with room for a prompt that begins with the prefix and goes on.
    pub(crate) fn lane_for(&self, run: &Run, prompt: &[u32]) -> Result<Option<Borrowed<'_>>, InferError> {
        if prompt.len() < self.ids.len() + BEHIND_MIN || !prompt.starts_with(&self.ids) {
            return Ok(None);
        }
        self.read(run, prompt.len()).map(Some)
    }

    /// The row with the prefix in it and room for so many tokens.
    fn read(&self, run: &Run, tokens: usize) -> Result<Borrowed<'_>, InferError> {
        let mut borrowed = Borrowed { row: self.row.lock().unwrap_or_else(PoisonError::into_inner) };
        let Row { lane, is_read } = &mut *borrowed.row;
        if lane.cache.capacity < tokens {
            let kept = if *is_read { self.ids.len() } else { 0 };
            *lane = lane.grown(tokens.next_multiple_of(ROOM_TOKENS), kept)?;
        }
        if !*is_read {
            lane.read(run, &self.ids, 0, &[], |_, _| Ok(()))?;
            *is_read = true;
        }
        Ok(borrowed)
    }
}

/// The row of a prefix while a call uses it. Between calls it holds no session open.
pub(crate) struct Borrowed<'p> {
    row: MutexGuard<'p, Row>,
}

impl Deref for Borrowed<'_> {
    type Target = Lane;

    fn deref(&self) -> &Lane {
        &self.row.lane
    }
}

impl DerefMut for Borrowed<'_> {
    fn deref_mut(&mut self) -> &mut Lane {
        &mut self.row.lane
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        self.row.lane.unbind();
    }
}

/// The longest run of tokens that all prompts begin with, two tokens short of the shortest prompt so that every prompt
/// goes on behind it.
pub fn common_prefix(prompts: &[Prompt]) -> &[u32] {
    let Some((first, others)) = prompts.split_first() else { return &[] };
    let shortest = prompts.iter().map(|prompt| prompt.ids.len()).min().unwrap_or(0);
    let shared =
        |other: &Prompt| first.ids.iter().zip(&other.ids).take_while(|(left, right)| left == right).count();
    let length =
        others.iter().map(shared).min().unwrap_or(first.ids.len()).min(shortest.saturating_sub(BEHIND_MIN));
    &first.ids[..length]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_prefix_leaves_every_prompt_two_tokens() {
        let prompts = |rows: &[&[u32]]| rows.iter().map(|row| Prompt::from(row.to_vec())).collect::<Vec<_>>();
        assert_eq!(common_prefix(&prompts(&[&[1, 2, 3, 4], &[1, 2, 5, 6], &[1, 2, 3, 7]])), [1, 2]);
        assert_eq!(common_prefix(&prompts(&[&[1, 2, 3], &[1, 2, 3, 4]])), [1]);
        assert_eq!(common_prefix(&prompts(&[&[7]])), [0_u32; 0]);
        assert_eq!(common_prefix(&[]), [0_u32; 0]);
    }
}
