//! Stage 2, **filter**: the guard judges every exchange of a sample; the policy says what follows.
//!
//! From `sample.rs`; to `revise.rs`, which alone turns a [`Screened`] into something that can be trained on. Nothing
//! else makes a [`Screened`], so skipping the filter does not compile.

use commonweal_runtime::{Cancel, Role};
use commonweal_safety::{CategoryId, Guard, GuardError, Judgement, Pair};

use crate::{
    policy::{Action, Policy},
    sample::Sample,
};

/// Samples judged in one call of the guard: bounds memory, and is how often progress shows.
const CHUNK_SAMPLES: usize = 64;

/// A sample with the guard's judgement and what the policy makes of it.
#[derive(Clone, Debug)]
pub struct Screened {
    sample: Sample,
    verdict: Verdict,
}

/// What was found, and what follows.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// What happens to the sample.
    pub action: Action,
    /// Calibrated probability that its worst exchange is unsafe; `None` when the filter is off.
    pub probability: Option<f64>,
    /// The kind of harm, when there is one.
    pub category: Option<CategoryId>,
}

/// How many samples take which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FilterCounts {
    /// Safe.
    pub kept: usize,
    /// Left out.
    pub dropped: usize,
    /// To be replaced by a refusal.
    pub refused: usize,
    /// To be revised.
    pub flagged: usize,
}

impl Screened {
    /// The sample; cut after its first unsafe exchange, if it has one.
    pub fn sample(&self) -> &Sample {
        &self.sample
    }

    /// What the guard and the policy said.
    pub fn verdict(&self) -> &Verdict {
        &self.verdict
    }

    pub(crate) fn into_parts(self) -> (Sample, Verdict) {
        (self.sample, self.verdict)
    }
}

/// Judges samples; each comes back, in order. `progress` is told how many are done.
pub fn screen(
    guard: &Guard,
    policy: &Policy,
    samples: Vec<Sample>,
    cancel: &Cancel,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Screened>, GuardError> {
    if !policy.filter.enabled {
        tracing::warn!(samples = samples.len(), "the filter is off: every sample is kept unseen");
        let keep = Verdict { action: Action::Keep, probability: None, category: None };
        return Ok(samples.into_iter().map(|sample| Screened { sample, verdict: keep.clone() }).collect());
    }
    let mut screened = Vec::with_capacity(samples.len());
    let mut samples = samples.into_iter().peekable();
    while samples.peek().is_some() {
        let chunk: Vec<Sample> = samples.by_ref().take(CHUNK_SAMPLES).collect();
        screened.extend(screen_chunk(guard, policy, chunk, cancel)?);
        progress(screened.len());
    }
    Ok(screened)
}

/// Counts the ways.
pub fn count(screened: &[Screened]) -> FilterCounts {
    let mut counts = FilterCounts::default();
    for one in screened {
        *match one.verdict.action {
            Action::Keep => &mut counts.kept,
            Action::Drop => &mut counts.dropped,
            Action::Refuse => &mut counts.refused,
            Action::Revise => &mut counts.flagged,
        } += 1;
    }
    counts
}

fn screen_chunk(
    guard: &Guard,
    policy: &Policy,
    chunk: Vec<Sample>,
    cancel: &Cancel,
) -> Result<Vec<Screened>, GuardError> {
    let (mut owners, mut pairs) = (Vec::new(), Vec::new());
    for (owner, sample) in chunk.iter().enumerate() {
        for (reply, pair) in exchanges(sample) {
            owners.push((owner, reply));
            pairs.push(pair);
        }
    }
    let judgements = guard.judge(&pairs, cancel)?;
    let mut found: Vec<Vec<(usize, Judgement)>> = vec![Vec::new(); chunk.len()];
    for ((owner, reply), judgement) in owners.into_iter().zip(judgements) {
        found[owner].push((reply, judgement));
    }
    Ok(chunk.into_iter().zip(found).map(|(sample, found)| decide(policy, sample, &found)).collect())
}

/// Every reply of the model with the person's words before it; the number is the reply's turn.
fn exchanges(sample: &Sample) -> Vec<(usize, Pair<'_>)> {
    let mut prompt = "";
    let mut pairs = Vec::new();
    for (turn, said) in sample.turns().iter().enumerate() {
        match said.role {
            Role::User => prompt = &said.content,
            Role::Assistant => pairs.push((turn, Pair { prompt, response: Some(&said.content) })),
            Role::System => {}
        }
    }
    pairs
}

/// The first exchange that the policy does not keep decides, and ends the conversation: what came after an unsafe
/// reply leans on it.
fn decide(policy: &Policy, sample: Sample, found: &[(usize, Judgement)]) -> Screened {
    let worst = found.iter().map(|(_, judgement)| judgement.probability).fold(0.0, f64::max);
    for (reply, judgement) in found {
        let action = policy.action(judgement.probability, judgement.category.as_ref(), judgement.threshold);
        if action != Action::Keep {
            let verdict = Verdict {
                action,
                probability: Some(judgement.probability),
                category: judgement.category.clone(),
            };
            return Screened { sample: sample.cut_after(*reply), verdict };
        }
    }
    let verdict = Verdict { action: Action::Keep, probability: Some(worst), category: None };
    Screened { sample, verdict }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::Turn;

    fn judgement(probability: f64) -> Judgement {
        Judgement {
            probability,
            log_odds: 0.0,
            category: None,
            threshold: 0.5,
            is_unsafe: probability >= 0.5,
        }
    }

    fn two_exchanges() -> Sample {
        let turn = |role, content: &str| Turn { role, content: content.into() };
        Sample::new(
            vec![
                turn(Role::System, "s"),
                turn(Role::User, "a"),
                turn(Role::Assistant, "b"),
                turn(Role::User, "c"),
                turn(Role::Assistant, "d"),
            ],
            None,
        )
        .unwrap()
    }

    #[test]
    fn every_reply_is_judged_with_the_words_before_it() {
        let sample = two_exchanges();
        let pairs = exchanges(&sample);
        assert_eq!(pairs.iter().map(|(turn, _)| *turn).collect::<Vec<_>>(), [2, 4]);
        assert_eq!((pairs[1].1.prompt, pairs[1].1.response), ("c", Some("d")));
    }

    #[test]
    fn the_first_unsafe_exchange_ends_the_conversation() {
        let policy = Policy::default();
        let screened = decide(&policy, two_exchanges(), &[(2, judgement(0.9)), (4, judgement(0.1))]);
        assert_eq!(screened.verdict.action, Action::Revise);
        assert_eq!(screened.sample.turns().len(), 3);
        let kept = decide(&policy, two_exchanges(), &[(2, judgement(0.2)), (4, judgement(0.4))]);
        assert_eq!(kept.verdict.action, Action::Keep);
        assert_eq!(kept.verdict.probability, Some(0.4));
        assert_eq!(kept.sample.turns().len(), 5);
    }
}
