//! A prefix that many prompts share, read once: the guard's policy, a system message. `generate.rs` and `score.rs`
//! start the prompts that begin with it behind it.

use std::{
    ops::{Deref, DerefMut},
    sync::{Mutex, MutexGuard, PoisonError},
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

/// Room for a prompt behind a prefix before its buffer grows for the first time.
const ROOM_TOKENS: usize = 256;

/// The cache of a prefix under one adapter. Prompts that do not begin with it, or have less than two tokens behind it,
/// are read whole. What a call gives does not depend on the prefix, but for rounding: fast kernels round the sums of one
/// row of tokens another way than those of several.
#[derive(Debug)]
pub struct SharedPrefix {
    ids: Vec<u32>,
    adapter: u64,
    /// One row: the prefix, and behind it whatever the last prompt left.
    lane: Mutex<Lane>,
}

impl Model {
    /// Reads a prefix. Its last token must leave room for one more in the context.
    pub fn share_prefix(
        &self,
        adapter: &PreparedAdapter,
        ids: &[u32],
        cancel: &Cancel,
    ) -> Result<SharedPrefix, InferError> {
        check_prompt(self, 0, ids, self.context() - 1)?;
        let run = Run::new(cancel)?;
        let capacity = self.context().min(ids.len() + ROOM_TOKENS);
        let mut lane = Lane::new(self, adapter, 1, capacity)?;
        lane.read(&run, ids, 0, &[], |_, _| Ok(()))?;
        lane.unbind();
        Ok(SharedPrefix { ids: ids.to_vec(), adapter: adapter.identity(), lane: Mutex::new(lane) })
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
    pub(crate) fn lane_for(&self, prompt: &[u32]) -> Result<Option<Borrowed<'_>>, InferError> {
        if prompt.len() < self.ids.len() + BEHIND_MIN || !prompt.starts_with(&self.ids) {
            return Ok(None);
        }
        let mut lane = self.lane.lock().unwrap_or_else(PoisonError::into_inner);
        if lane.cache.capacity < prompt.len() {
            *lane = lane.grown(prompt.len().next_multiple_of(ROOM_TOKENS), self.ids.len())?;
        }
        Ok(Some(Borrowed { lane }))
    }
}

/// The row of a prefix while a call uses it. Between calls it holds no session open.
pub(crate) struct Borrowed<'p> {
    lane: MutexGuard<'p, Lane>,
}

impl Deref for Borrowed<'_> {
    type Target = Lane;

    fn deref(&self) -> &Lane {
        &self.lane
    }
}

impl DerefMut for Borrowed<'_> {
    fn deref_mut(&mut self) -> &mut Lane {
        &mut self.lane
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        self.lane.unbind();
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
