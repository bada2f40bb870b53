//! Stage 2, **filter**: the guard judges every exchange of a sample; the policy says what follows. A sample that the
//! guard cannot judge is left out, and the others go on.
//!
//! From `sample.rs`; to `revise.rs`, which alone turns a [`Screened`] into something that can be trained on. Nothing
//! else makes a [`Screened`], so skipping the filter does not compile.

use commonweal_runtime::Cancel;
use commonweal_safety::{CategoryId, Guard, GuardError, Judgement, Pair};
use serde::{Deserialize, Serialize};

use crate::{
    policy::{Action, Policy},
    sample::{Exchange, Sample, SampleId},
};

/// Samples judged in one call of the guard: bounds memory, is how often progress shows, and what a break costs
/// (`chunks.rs`).
pub(crate) const CHUNK_SAMPLES: usize = 64;

/// A sample with the guard's judgement and what the policy makes of it.
#[derive(Clone, Debug)]
pub struct Screened {
    sample: Sample,
    verdict: Verdict,
}

/// What was found, and what follows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// What happens to the sample.
    pub action: Action,
    /// Calibrated probability that its worst exchange is unsafe; `None` when the filter is off, or the guard could not
    /// judge it.
    pub probability: Option<f64>,
    /// The kind of harm, when there is one.
    pub category: Option<CategoryId>,
}

/// What of a [`Screened`] is kept while its round is judged: everything but the text, which the store has.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Judgements(Vec<(SampleId, usize, Verdict)>);

impl Judgements {
    /// Of a chunk that was judged.
    pub(crate) fn of(chunk: &[SampleId], screened: &[Screened]) -> Self {
        let of = |(id, one): (&SampleId, &Screened)| (*id, one.sample.turns().len(), one.verdict.clone());
        Self(chunk.iter().zip(screened).map(of).collect())
    }

    /// The same over the samples of that chunk; none if these are others.
    pub(crate) fn over(self, chunk: Vec<Sample>) -> Result<Vec<Screened>, Vec<Sample>> {
        let is_of_it = |(sample, (id, turns, _)): (&Sample, &(SampleId, usize, Verdict))| {
            sample.id() == *id && (1..=sample.turns().len()).contains(turns)
        };
        if chunk.len() != self.0.len() || !chunk.iter().zip(&self.0).all(is_of_it) {
            return Err(chunk);
        }
        let screened = |(sample, (_, turns, verdict)): (Sample, (SampleId, usize, Verdict))| Screened {
            sample: sample.cut_after(turns - 1),
            verdict,
        };
        Ok(chunk.into_iter().zip(self.0).map(screened).collect())
    }
}

/// How many samples take which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FilterCounts {
    /// Safe.
    pub kept: usize,
    /// Left out.
    pub dropped: usize,
    /// Of those, the ones that the guard could not judge.
    pub unjudged: usize,
    /// To be replaced by a refusal.
    pub refused: usize,
    /// To be revised.
    pub flagged: usize,
}

impl Verdict {
    /// What cannot be judged is left out: the strictest that can be done with it.
    fn unjudged() -> Self {
        Self { action: Action::Drop, probability: None, category: None }
    }
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
        return Ok(unseen(samples));
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

/// Keeps every sample as it is: what a filter does that is off.
pub(crate) fn unseen(samples: Vec<Sample>) -> Vec<Screened> {
    tracing::warn!(samples = samples.len(), "the filter is off: every sample is kept unseen");
    let keep = Verdict { action: Action::Keep, probability: None, category: None };
    samples.into_iter().map(|sample| Screened { sample, verdict: keep.clone() }).collect()
}

/// Counts the ways.
pub fn count(screened: &[Screened]) -> FilterCounts {
    let mut counts = FilterCounts::default();
    for one in screened {
        counts.unjudged += usize::from(one.verdict == Verdict::unjudged());
        *match one.verdict.action {
            Action::Keep => &mut counts.kept,
            Action::Drop => &mut counts.dropped,
            Action::Refuse => &mut counts.refused,
            Action::Revise => &mut counts.flagged,
        } += 1;
    }
    counts
}

/// Judges at most [`CHUNK_SAMPLES`] in one call.
pub(crate) fn screen_chunk(
    guard: &Guard,
    policy: &Policy,
    chunk: Vec<Sample>,
    cancel: &Cancel,
) -> Result<Vec<Screened>, GuardError> {
    let exchanges: Vec<Vec<Exchange<'_>>> = chunk.iter().map(Sample::exchanges).collect();
    let (mut owners, mut pairs) = (Vec::new(), Vec::new());
    for (owner, exchange) in
        exchanges.iter().enumerate().flat_map(|(at, of)| of.iter().map(move |one| (at, one)))
    {
        for (reply, response) in &exchange.replies {
            owners.push((owner, *reply));
            pairs.push(Pair { prompt: &exchange.prompt, response: Some(response) });
        }
    }
    let judged = guard.judge_each(&pairs, cancel)?;
    let mut found: Vec<Vec<(usize, Judged)>> = vec![Vec::new(); chunk.len()];
    for ((owner, reply), judged) in owners.into_iter().zip(judged) {
        let judgement = judged.inspect_err(|error| {
            tracing::warn!(sample = %chunk[owner].id(), error = %chain(error), "the guard cannot judge it: left out");
        });
        found[owner].push((reply, judgement.ok()));
    }
    drop(exchanges);
    Ok(chunk.into_iter().zip(found).map(|(sample, found)| decide(policy, sample, &found)).collect())
}

/// What the guard says of one reply; `None` where it cannot.
type Judged = Option<Judgement>;

/// An error and what it came from.
fn chain(error: &GuardError) -> String {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// The first exchange that is not kept decides, and ends the conversation: what came after an unsafe reply leans on it.
fn decide(policy: &Policy, sample: Sample, found: &[(usize, Judged)]) -> Screened {
    let mut worst: f64 = 0.0;
    for (reply, judgement) in found {
        let Some(judgement) = judgement else {
            return Screened { sample, verdict: Verdict::unjudged() };
        };
        worst = worst.max(judgement.probability);
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
    use commonweal_runtime::Role;

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
    fn the_first_unsafe_exchange_ends_the_conversation() {
        let policy = Policy::default();
        let found = |first, second| [(2, Some(judgement(first))), (4, Some(judgement(second)))];
        let screened = decide(&policy, two_exchanges(), &found(0.9, 0.1));
        assert_eq!(screened.verdict.action, Action::Revise);
        assert_eq!(screened.sample.turns().len(), 3);
        let kept = decide(&policy, two_exchanges(), &found(0.2, 0.4));
        assert_eq!(kept.verdict.action, Action::Keep);
        assert_eq!(kept.verdict.probability, Some(0.4));
        assert_eq!(kept.sample.turns().len(), 5);
    }

    #[test]
    fn judgements_without_text_are_laid_over_their_own_samples_only() {
        let policy = Policy::default();
        let samples = || vec![two_exchanges(), Sample::from_pair("p".into(), "r".into()).unwrap()];
        let ids: Vec<SampleId> = samples().iter().map(Sample::id).collect();
        let mut chunk = samples().into_iter();
        let cut = decide(&policy, chunk.next().unwrap(), &[(2, Some(judgement(0.1 + 0.2)))]);
        let whole = decide(&policy, chunk.next().unwrap(), &[(1, Some(judgement(0.9)))]);
        let screened = [cut, whole];
        let bytes = postcard::to_allocvec(&Judgements::of(&ids, &screened)).unwrap();
        let again = || postcard::from_bytes::<Judgements>(&bytes).unwrap();
        let laid = again().over(samples()).unwrap();
        for (laid, screened) in laid.iter().zip(&screened) {
            assert_eq!((&laid.sample, &laid.verdict), (&screened.sample, &screened.verdict));
        }
        let swapped: Vec<Sample> = samples().into_iter().rev().collect();
        assert_eq!(again().over(swapped.clone()).unwrap_err(), swapped);
        assert!(again().over(samples()[..1].to_vec()).is_err());
    }

    #[test]
    fn what_cannot_be_judged_is_left_out_and_counted() {
        let policy = Policy::default();
        let left_out = decide(&policy, two_exchanges(), &[(2, Some(judgement(0.1))), (4, None)]);
        assert_eq!(left_out.verdict, Verdict::unjudged());
        // What was cut off behind an unsafe reply need not be judged.
        let cut = decide(&policy, two_exchanges(), &[(2, Some(judgement(0.9))), (4, None)]);
        assert_eq!(cut.verdict.action, Action::Revise);
        let counts = count(&[left_out, cut]);
        assert_eq!(counts, FilterCounts { dropped: 1, unjudged: 1, flagged: 1, ..FilterCounts::default() });
    }
}
