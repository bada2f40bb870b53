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

/// Pairs revised side by side: bounds memory, and is how often progress shows.
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
    let mut pairs = Vec::with_capacity(screened.len());
    let mut counts = ReviseCounts::default();
    let mut flagged: Vec<(usize, Screened)> = Vec::new();
    for (place, one) in screened.into_iter().enumerate() {
        match one.verdict().action {
            Action::Keep => {
                counts.kept += 1;
                pairs.push((place, TrainingPair { sample: one.into_parts().0, origin: Origin::Kept }));
            }
            Action::Drop => counts.dropped += 1,
            Action::Refuse => {
                counts.refused += 1;
                let refusal = reviser.constitution().refusal_for(one.verdict().category.as_ref()).to_owned();
                pairs.push((place, replaced(one, refusal, Origin::Refused)));
            }
            Action::Revise => flagged.push((place, one)),
        }
    }
    let options =
        ReviseOptions { attempts_max: policy.revise.attempts_max, seed, ..ReviseOptions::default() };
    let mut done = pairs.len() + counts.dropped;
    progress(done);
    let mut flagged = flagged.into_iter().peekable();
    while flagged.peek().is_some() {
        let chunk: Vec<(usize, Screened)> = flagged.by_ref().take(CHUNK_PAIRS).collect();
        done += chunk.len();
        let revisions = revise_chunk(guard, reviser, &chunk, &options, cancel)?;
        for ((place, one), revision) in chunk.into_iter().zip(revisions) {
            match (revision, policy.revise.otherwise) {
                (Revision::Safe { text, attempts, .. }, _) => {
                    counts.revised += 1;
                    counts.attempts += attempts as usize;
                    pairs.push((place, replaced(one, text, Origin::Revised)));
                }
                (Revision::StillUnsafe { attempts, refusal }, Otherwise::Refuse) => {
                    counts.refused += 1;
                    counts.attempts += attempts as usize;
                    pairs.push((place, replaced(one, refusal, Origin::Refused)));
                }
                (Revision::StillUnsafe { attempts, .. }, Otherwise::Drop) => {
                    counts.dropped += 1;
                    counts.attempts += attempts as usize;
                }
            }
        }
        progress(done);
    }
    // The order of the samples, so that the same seed trains on the same batches.
    pairs.sort_by_key(|(place, _)| *place);
    Ok((pairs.into_iter().map(|(_, pair)| pair).collect(), counts))
}

fn revise_chunk(
    guard: &Guard,
    reviser: &Reviser,
    chunk: &[(usize, Screened)],
    options: &ReviseOptions,
    cancel: &Cancel,
) -> Result<Vec<Revision>, ReviseError> {
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
    reviser.revise(guard, &flagged, options, cancel)
}

/// The old reply becomes the rejected side: preference training learns from the pair.
fn replaced(screened: Screened, response: String, origin: Origin) -> TrainingPair {
    let (sample, _) = screened.into_parts();
    TrainingPair { sample: sample.with_response(response), origin }
}
