//! Stage 3, **revise**: what the filter flagged is rewritten by the constitution, refused or left out.
//!
//! From `filter.rs`; to `train.rs`, which takes nothing but a [`TrainingPair`]. Only [`revise`] makes one.

use commonweal_runtime::{Cancel, Message};
use commonweal_safety::{Flagged, Guard, ReviseError, ReviseOptions, Reviser, Revision};
use serde::{Deserialize, Serialize};

use crate::{
    filter::Screened,
    policy::{Action, Otherwise, Policy},
    sample::Sample,
};

/// Pairs revised side by side: bounds memory, is how often progress shows, and what a break costs (`chunks.rs`).
const CHUNK_PAIRS: usize = 16;

/// Something that may be trained on: safe as it was, rewritten and judged safe, or a refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainingPair {
    sample: Sample,
    origin: Origin,
}

/// How a pair came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// As the person had it.
    Kept,
    /// Rewritten by the constitution, judged again.
    Revised,
    /// The reply is a refusal.
    Refused,
}

/// How many samples went which way; `kept + revised + refused + dropped` is all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReviseCounts {
    /// As they were.
    pub kept: usize,
    /// Rewritten.
    pub revised: usize,
    /// Replaced by a refusal.
    pub refused: usize,
    /// Left out.
    pub dropped: usize,
    /// Rewrites tried.
    pub attempts: usize,
}

impl TrainingPair {
    /// The conversation, with the reply to avoid where there is one.
    pub fn sample(&self) -> &Sample {
        &self.sample
    }

    /// The conversation to imitate.
    pub fn messages(&self) -> Vec<Message> {
        self.sample.turns().iter().map(Message::from).collect()
    }

    /// The same conversation with the reply to avoid, where there is one: the original of a rewritten pair, or the
    /// rejected side of a published one.
    pub fn rejected(&self) -> Option<Vec<Message>> {
        let rejected = self.sample.rejected().filter(|text| !text.trim().is_empty())?;
        let mut messages = self.messages();
        messages.pop();
        messages.push(Message::assistant(rejected));
        Some(messages)
    }

    /// How it came to be.
    pub fn origin(&self) -> Origin {
        self.origin
    }
}

/// Turns screened samples into pairs that may be trained on; those that stay unsafe are refused or left out, as the
/// policy says. `progress` is told how many samples are done.
pub fn revise(
    guard: &Guard,
    reviser: &Reviser,
    policy: &Policy,
    screened: Vec<Screened>,
    seed: u64,
    cancel: &Cancel,
    mut progress: impl FnMut(usize),
) -> Result<(Vec<TrainingPair>, ReviseCounts), ReviseError> {
    let mut sorted = Sorted::new(reviser, screened);
    progress(sorted.done());
    while let Some(chunk) = sorted.next_chunk() {
        let rewritten = rewrite(guard, reviser, policy, &chunk, seed, cancel)?;
        sorted.take(policy, chunk, rewritten);
        progress(sorted.done());
    }
    Ok(sorted.into_pairs())
}

/// A flagged sample, and its place among all.
pub(crate) type Placed = (usize, Screened);

/// What became of a flagged sample.
#[derive(Serialize, Deserialize)]
pub(crate) struct Rewritten {
    /// The new reply, or the constitution's refusal.
    text: String,
    is_safe: bool,
    attempts: u32,
}

impl From<Revision> for Rewritten {
    fn from(revision: Revision) -> Self {
        match revision {
            Revision::Safe { text, attempts, .. } => Self { text, is_safe: true, attempts },
            Revision::StillUnsafe { attempts, refusal } => Self { text: refusal, is_safe: false, attempts },
        }
    }
}

/// Samples on their way: those that are done, and those that are to be rewritten.
pub(crate) struct Sorted {
    pairs: Vec<(usize, TrainingPair)>,
    flagged: std::iter::Peekable<std::vec::IntoIter<Placed>>,
    counts: ReviseCounts,
}

impl Sorted {
    pub(crate) fn new(reviser: &Reviser, screened: Vec<Screened>) -> Self {
        let mut pairs = Vec::with_capacity(screened.len());
        let mut counts = ReviseCounts::default();
        let mut flagged: Vec<Placed> = Vec::new();
        for (place, one) in screened.into_iter().enumerate() {
            match one.verdict().action {
                Action::Keep => {
                    counts.kept += 1;
                    pairs.push((place, TrainingPair { sample: one.into_parts().0, origin: Origin::Kept }));
                }
                Action::Drop => counts.dropped += 1,
                Action::Refuse => {
                    counts.refused += 1;
                    let refusal =
                        reviser.constitution().refusal_for(one.verdict().category.as_ref()).to_owned();
                    pairs.push((place, replaced(one, refusal, Origin::Refused)));
                }
                Action::Revise => flagged.push((place, one)),
            }
        }
        Self { pairs, flagged: flagged.into_iter().peekable(), counts }
    }

    /// Samples that are done.
    pub(crate) fn done(&self) -> usize {
        self.pairs.len() + self.counts.dropped
    }

    /// The next ones to rewrite.
    pub(crate) fn next_chunk(&mut self) -> Option<Vec<Placed>> {
        self.flagged.peek()?;
        Some(self.flagged.by_ref().take(CHUNK_PAIRS).collect())
    }

    /// What became of a chunk.
    pub(crate) fn take(&mut self, policy: &Policy, chunk: Vec<Placed>, rewritten: Vec<Rewritten>) {
        let counts = &mut self.counts;
        for ((place, one), Rewritten { text, is_safe, attempts }) in chunk.into_iter().zip(rewritten) {
            counts.attempts += attempts as usize;
            match (is_safe, policy.revise.otherwise) {
                (true, _) => {
                    counts.revised += 1;
                    self.pairs.push((place, replaced(one, text, Origin::Revised)));
                }
                (false, Otherwise::Refuse) => {
                    counts.refused += 1;
                    self.pairs.push((place, replaced(one, text, Origin::Refused)));
                }
                (false, Otherwise::Drop) => counts.dropped += 1,
            }
        }
    }

    /// In the order of the samples, so that the same seed trains on the same batches.
    pub(crate) fn into_pairs(mut self) -> (Vec<TrainingPair>, ReviseCounts) {
        self.pairs.sort_by_key(|(place, _)| *place);
        (self.pairs.into_iter().map(|(_, pair)| pair).collect(), self.counts)
    }
}

/// Rewrites a chunk. What comes of it follows from the chunk and the seed alone.
pub(crate) fn rewrite(
    guard: &Guard,
    reviser: &Reviser,
    policy: &Policy,
    chunk: &[Placed],
    seed: u64,
    cancel: &Cancel,
) -> Result<Vec<Rewritten>, ReviseError> {
    let options =
        ReviseOptions { attempts_max: policy.revise.attempts_max, seed, ..ReviseOptions::default() };
    let prompts: Vec<_> = chunk.iter().map(|(_, one)| one.sample().prompt()).collect();
    let flagged: Vec<Flagged<'_>> = chunk
        .iter()
        .zip(&prompts)
        .map(|((_, one), prompt)| Flagged {
            prompt,
            response: one.sample().response(),
            category: one.verdict().category.as_ref(),
        })
        .collect();
    Ok(reviser.revise(guard, &flagged, &options, cancel)?.into_iter().map(Rewritten::from).collect())
}

/// The old reply becomes the rejected side: preference training learns from the pair.
fn replaced(screened: Screened, response: String, origin: Origin) -> TrainingPair {
    let (sample, _) = screened.into_parts();
    TrainingPair { sample: sample.with_response(response), origin }
}
