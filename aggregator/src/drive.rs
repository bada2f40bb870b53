//! Carries out what the round decides: merge, align, evaluate, publish, and the cleaning up after it.
//!
//! One thread, beside the many of `receive`; `desk` says what is next and saves what came of it. Each stage's
//! result is stored before the state names it, so that a killed process begins again at the last finished stage.

mod stages;
mod gather;
mod remember;
mod correct;
mod trial;
mod sweep;

use std::sync::Arc;
use std::time::{Duration, Instant};

use commonweal_adapter::AdapterKind;
use commonweal_protocol::{DeviceId, Digest, Mode, ReportCard, RoundId, Version};

use crate::desk::{self, DeskError, Next};
use crate::evaluate;
use crate::events::{AlignFigures, Event as Told, Figures, Origin};
use crate::laboratory::{Base, LaboratoryError};
use crate::lead::Leadership;
use crate::merge::{self, Member};
use crate::publish::{Candidate, PublishError};
use crate::receive::{Parts, chain};
use crate::round::{Action, Event};
use crate::store::StoreError;
use gather::Gathered;

pub use stages::{ModelStages, Stages};

/// Who claims updates: whoever drives, and only one does.
const OWNER: &str = "drive";
/// How long a claim lasts; longer than any merge.
const LEASE_MS: u64 = 3_600_000;
/// Times that a stage which lacks its library or its files is tried before the round is given up.
const UNAVAILABLE_TRIES_MAX: u32 = 3;
/// First and longest pause before a stage is tried again.
const RETRY_MS: (u64, u64) = (1_000, 60_000);

/// Why a stage did not end.
#[derive(Debug, thiserror::Error)]
enum DriveError {
    #[error(transparent)]
    Desk(#[from] DeskError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Publish(#[from] PublishError),
    #[error("the stage cannot run here and now")]
    Unavailable(#[source] LaboratoryError),
    #[error("the process is ending")]
    Cancelled,
}

/// A stage's end: figures and the event for the round.
type Outcome = Result<(Option<Figures>, Event), DriveError>;

/// What the caller of [`Driver::step`] does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Call again.
    Worked,
    /// Call again at this time at the latest, or when the watch says so.
    Wait(Option<u64>),
    /// The last wanted round is over.
    Stop,
}

/// See the module.
pub struct Driver<S> {
    parts: Parts,
    base: Base,
    stages: S,
    lead: Arc<Leadership>,
    /// Whether this process has driven since it last took the lead.
    is_driving: bool,
    tries: u32,
    retry_ms: u64,
    /// When the trial is looked after again that could not be.
    trial_retry_ms: u64,
}

impl<S> std::fmt::Debug for Driver<S> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Driver").field("tries", &self.tries).finish_non_exhaustive()
    }
}

impl<S: Stages> Driver<S> {
    /// Ready; where there is no other, first removes what an earlier process left and nothing names.
    pub fn new(parts: Parts, base: Base, stages: S) -> Self {
        let lease = Duration::from_secs(parts.config.storage.lead_seconds.into());
        let lead = Arc::new(Leadership::new(parts.storage.lead.clone(), lease));
        let is_driving = !lead.is_shared();
        let driver = Self { parts, base, stages, lead, is_driving, tries: 0, retry_ms: 0, trial_retry_ms: 0 };
        if is_driving {
            driver.sweep();
        }
        driver
    }

    /// Its part in who drives; somebody has to keep it ([`Leadership::keep`]).
    pub fn lead(&self) -> Arc<Leadership> {
        self.lead.clone()
    }

    /// Whether this process drives; takes everything up anew when it comes to that.
    fn drives(&mut self, now_ms: u64) -> Result<bool, DeskError> {
        if self.is_driving && self.parts.desk.is_superseded() {
            self.lead.doubt();
        }
        if !self.lead.is_held() {
            if self.is_driving {
                (self.is_driving, self.retry_ms) = (false, 0);
                self.parts.desk.stand_by();
                self.parts.events.tell(&Told::StandsBy);
            }
            return Ok(false);
        }
        if !self.is_driving {
            if now_ms < self.retry_ms {
                return Ok(false);
            }
            if let Err(error) = self.parts.desk.take_lead(now_ms) {
                self.parts.desk.stand_by();
                self.retry_ms = now_ms.saturating_add(RETRY_MS.0);
                return Err(error);
            }
            (self.is_driving, self.tries, self.retry_ms, self.trial_retry_ms) = (true, 0, 0, 0);
            self.parts.events.tell(&Told::Drives { round: self.parts.desk.round() });
            self.sweep();
        }
        Ok(true)
    }

    /// Does the next thing, if there is one and it is this process's to do.
    pub fn step(&mut self) -> Step {
        let now_ms = self.parts.clock.unix_ms();
        match self.drives(now_ms) {
            Ok(true) => {}
            Ok(false) => return Step::Wait((now_ms < self.retry_ms).then_some(self.retry_ms)),
            Err(error) => {
                tracing::warn!(error = chain(&error), "the round cannot be taken up yet");
                return Step::Wait(Some(self.retry_ms));
            }
        }
        if let Some(round) = self.parts.desk.take_finished() {
            self.clean_up(round);
        }
        if now_ms < self.retry_ms {
            return Step::Wait(Some(self.retry_ms));
        }
        // A trial that cannot be looked after stops no round.
        if now_ms >= self.trial_retry_ms
            && let Err(error) = self.look_after_trial()
        {
            self.trial_retry_ms = now_ms.saturating_add(RETRY_MS.1);
            let (round, reason) =
                (self.parts.desk.round(), format!("the release on trial: {}", chain(&error)));
            self.parts.events.tell(&Told::Retrying { round, reason, after_ms: RETRY_MS.1 });
        }
        match self.parts.desk.next(now_ms) {
            Ok(Next::Work(round, work)) => {
                self.work(round, &work);
                Step::Worked
            }
            Ok(Next::Wait(at_ms)) => Step::Wait(at_ms),
            Ok(Next::Stop) => Step::Stop,
            // The next step stands by.
            Err(DeskError::Superseded) => Step::Worked,
            Err(error) => {
                self.retry(self.parts.desk.round(), &error);
                Step::Worked
            }
        }
    }

    fn work(&mut self, round: RoundId, work: &Action) {
        let started = Instant::now();
        let outcome = match work {
            Action::Merge => self.merge(round),
            Action::Align(candidate) => self.align(round, candidate),
            Action::Evaluate(candidate) => self.evaluate(round, candidate),
            Action::Publish(candidate, card) => self.publish(round, *candidate, card),
            _ => return,
        };
        let outcome = outcome.and_then(|(figures, event)| {
            let now_ms = self.parts.clock.unix_ms();
            let seconds = started.elapsed().as_secs_f64();
            Ok(self.parts.desk.done(now_ms, (round, work), seconds, figures, event)?)
        });
        match outcome {
            Ok(()) => (self.tries, self.retry_ms) = (0, 0),
            Err(DriveError::Cancelled) => tracing::info!(%round, "stage cancelled, to be taken up again"),
            Err(DriveError::Unavailable(error)) if self.tries + 1 >= UNAVAILABLE_TRIES_MAX => {
                self.tries = 0;
                let reason = format!("unavailable: {}", chain(&error));
                let now_ms = self.parts.clock.unix_ms();
                let refused = Event::Refused(reason);
                if let Err(error) = self.parts.desk.done(now_ms, (round, work), 0.0, None, refused) {
                    self.retry(round, &error);
                }
            }
            Err(error) => self.retry(round, &error),
        }
    }

    fn retry(&mut self, round: RoundId, error: &dyn std::error::Error) {
        let after_ms = (RETRY_MS.0 << self.tries.min(16)).min(RETRY_MS.1);
        self.tries += 1;
        self.retry_ms = self.parts.clock.unix_ms().saturating_add(after_ms);
        self.parts.events.tell(&Told::Retrying { round, reason: chain(error), after_ms });
    }

    fn merge(&mut self, round: RoundId) -> Outcome {
        self.parts.pause.here("merge", &self.parts.events);
        let rounds = self.parts.desk.rounds();
        let Some(start) = rounds.start else {
            return refused("merge: the round has no start");
        };
        let config = self.parts.config.clone();
        let before = match self.moments(start.version, config.merge.optimizer)? {
            Ok(before) => before,
            Err(reason) => return refused(format!("merge: {reason}")),
        };
        let head = start.version;
        let start = match self.load(&start.digest, AdapterKind::Assistant)? {
            Ok(start) => start,
            Err(reason) => return refused(format!("merge: {reason}")),
        };
        let Gathered { updates, revoked } = match self.gather(round)? {
            Ok(gathered) => gathered,
            Err(reason) => return refused(format!("merge: {reason}")),
        };
        let members: Vec<Member> = updates
            .iter()
            .map(|update| Member {
                device: update.receipt.receipt.device,
                samples: update.open.samples,
                length: update.open.length,
                report: update.open.report,
                norm: update.norm,
                staleness: update.start.map_or(0, |version| rounds.staleness(version)),
            })
            .collect();
        let digests: std::collections::BTreeMap<_, _> =
            updates.iter().map(|update| (update.receipt.receipt.device, update.open.digest)).collect();
        let options = merge::Options::new(&config.merge, config.train.trainable(round), config.plain)
            .discounting(config.round.staleness_exponent);
        let blob = &self.parts.storage.blob;
        let read = |device: &DeviceId| {
            correct::read_part(blob.as_ref(), &digests, device, |(delta, _)| delta.to_vec())
        };
        let merged = match config.train.mode {
            Mode::Exact => merge::merge_products(&start, &members, &options, read)
                .map(|(candidate, figures)| (Ok((candidate, None)), figures)),
            Mode::Fedit | Mode::Ffa | Mode::Rolora => merge::merge(start.layout(), &members, &options, read)
                .map(|(delta, figures)| {
                    let learning_rate = f64::from(config.merge.server_learning_rate);
                    let optimizer = config.merge.server_optimizer();
                    (optimizer.step(&start, &delta, learning_rate, before), figures)
                }),
        };
        let (stepped, mut figures) = match merged {
            Ok(merged) => merged,
            Err(merge::CandidateError::Read { source, .. }) if !is_lost(&source) => return Err(source.into()),
            Err(error) => return refused(format!("merge: {}", chain(&error))),
        };
        let (candidate, moments) = match stepped {
            Ok(stepped) => stepped,
            Err(error) => {
                return refused(format!("merge: the merged adapter is not usable: {}", chain(&error)));
            }
        };
        figures.counts.devices_selected = rounds.selected();
        figures.leave_out(&revoked);
        figures.lineage = lineage(&updates, &members, head);
        figures.method = config.method();
        if config.train.scaffold {
            let trainable = config.train.trainable(round);
            figures.control = match self.correct(round, &members, &digests, trainable)? {
                Ok(control) => Some(control),
                Err(reason) => return refused(format!("merge: control variate: {reason}")),
            };
        }
        figures.state = match self.keep_moments(moments.as_ref(), config.merge.optimizer)? {
            Ok(state) => state,
            Err(reason) => return refused(format!("merge: {reason}")),
        };
        self.count_reports(round, head, &updates)?;
        match self.keep(&candidate, AdapterKind::Assistant)? {
            Ok(digest) => {
                self.parts.pause.here("merged", &self.parts.events);
                Ok((Some(Figures::Merge(Box::new(figures))), Event::Merged(digest)))
            }
            Err(reason) => refused(format!("merge: {reason}")),
        }
    }

    fn align(&mut self, round: RoundId, candidate: &Digest) -> Outcome {
        self.parts.pause.here("align", &self.parts.events);
        let config = &self.parts.config;
        let skipped = match (config.plain, config.align.enabled) {
            (true, _) => Some("the run is plain"),
            (_, false) => Some("switched off"),
            _ => None,
        };
        if let Some(reason) = skipped {
            let figures = AlignFigures { skipped: Some(reason.to_owned()), ..AlignFigures::default() };
            return Ok((Some(Figures::Align(figures)), Event::Aligned(*candidate)));
        }
        let merged = match self.load(candidate, AdapterKind::Assistant)? {
            Ok(merged) => merged,
            Err(reason) => return refused(format!("align: {reason}")),
        };
        match self.stages.align(round, merged) {
            Ok((aligned, figures)) => match self.keep(&aligned, AdapterKind::Assistant)? {
                Ok(digest) => Ok((Some(Figures::Align(figures)), Event::Aligned(digest))),
                Err(reason) => refused(format!("align: {reason}")),
            },
            Err(error) => stage_failed("align", error),
        }
    }

    fn evaluate(&mut self, round: RoundId, candidate: &Digest) -> Outcome {
        self.parts.pause.here("evaluate", &self.parts.events);
        let adapter = match self.load(candidate, AdapterKind::Assistant)? {
            Ok(adapter) => adapter,
            Err(reason) => return refused(format!("evaluate: {reason}")),
        };
        let mut figures = match self.stages.evaluate(round, &adapter) {
            Ok(figures) => figures,
            Err(error) => return stage_failed("evaluate", error),
        };
        let parent = self.parts.desk.rounds().start.map(|start| start.version).unwrap_or_default();
        let parent = self.parts.publisher.release(parent)?.release.report_card;
        let progress = self.parts.desk.progress();
        let card = &mut figures.report_card;
        let merged = progress.merge.unwrap_or_default();
        (card.counts, card.merge) = (merged.counts, merged.method);
        card.counts.align_steps = progress.align.map_or(0, |align| align.steps);
        if !self.parts.config.plain {
            card.gates = evaluate::judge(card, Some(&parent), &self.parts.config.evaluate.gates);
        }
        let config = &self.parts.config;
        let refusal = if config.plain { None } else { evaluate::refusal(card, &config.evaluate.gates) };
        let event = match refusal {
            None => Event::Accepted(Box::new(card.clone())),
            Some(reason) => Event::Refused(reason),
        };
        Ok((Some(Figures::Evaluate(figures)), event))
    }

    fn publish(&mut self, round: RoundId, candidate: Digest, card: &ReportCard) -> Outcome {
        self.parts.pause.here("publish", &self.parts.events);
        let parent = self.parts.desk.rounds().start.map(|start| start.version);
        let state = self.parts.desk.progress().merge.unwrap_or_default().state;
        let card = card.clone();
        let candidate = Candidate { round: Some(round), parent, digest: candidate, state, card };
        let release = match self.parts.publisher.publish(candidate, self.parts.clock.unix_ms()) {
            Ok(signed) => signed.release,
            Err(error @ (PublishError::Moved { .. } | PublishError::GateFailed | PublishError::Sign(_))) => {
                return refused(format!("publish: {}", chain(&error)));
            }
            Err(error) => return Err(error.into()),
        };
        self.parts.pause.here("published", &self.parts.events);
        self.parts.events.tell(&Told::Published {
            round: release.round,
            version: release.version,
            parent: release.parent,
            digest: release.digest,
            report_card: release.report_card,
        });
        let version: Version = release.version;
        Ok((Some(Figures::Publish { version }), Event::Published(version)))
    }
}

/// Where each update came from; `head` is the release that they are merged into.
fn lineage(updates: &[desk::Accepted], members: &[Member], head: Version) -> Vec<Origin> {
    let origin = |(update, member): (&desk::Accepted, &Member)| Origin {
        device: member.device,
        digest: update.open.digest,
        round: update.open.round,
        start: update.start.unwrap_or(head),
        staleness: member.staleness,
    };
    updates.iter().zip(members).map(origin).collect()
}

/// The bytes are gone or damaged for good: trying again would not bring them back.
fn is_lost(error: &StoreError) -> bool {
    matches!(error, StoreError::Missing { .. } | StoreError::Refused { .. })
}

#[expect(clippy::unnecessary_wraps, reason = "it is what a stage ends with")]
fn refused(reason: impl Into<String>) -> Outcome {
    Ok((None, Event::Refused(reason.into())))
}

fn stage_failed(stage: &str, error: LaboratoryError) -> Outcome {
    match error {
        LaboratoryError::Cancelled => Err(DriveError::Cancelled),
        error if error.is_unavailable() => Err(DriveError::Unavailable(error)),
        error => refused(format!("{stage}: {}", chain(&error))),
    }
}
