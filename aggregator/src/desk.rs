//! The round's durable state: applies events to [`Rounds`], saves before anything depends on it, keeps the
//! accepted updates in step with it, and hands the work of the stages to `drive`.
//!
//! Between `round` (pure, below) and `receive` and `drive` (above, on many threads).

mod state;
mod record;
mod step;
mod share;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use commonweal_protocol::{DeviceId, Release, RoundId, SignedControl, Start};

use crate::events::{Event as Told, Events, Figures, MergeFigures};
use crate::publish::Publisher;
use crate::round::{Action, Event, NotAdmitted, Phase, Policy, ROUNDS_BACK_MAX, Rounds};
use crate::store::{Append, Storage};

pub use record::{RECORDS, Record, records};
pub use share::Pass;
pub use state::{Accepted, DeskError, Progress, peek};
use state::{Durable, load};
pub(crate) use state::{RECEIPTS_KEPT_ROUNDS, decode_accepted, queue};

/// What `drive` has to do next.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// A stage's work.
    Work(RoundId, Action),
    /// Nothing before this time, if there is one.
    Wait(Option<u64>),
    /// The last wanted round is over.
    Stop,
}

/// How an offered update ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Taken {
    /// It counts from now on.
    Now,
    /// It was already taken, into this round and with this answer.
    Before(RoundId, Box<Accepted>),
}

struct Inner {
    durable: Durable,
    sequence: u64,
    work: Option<Action>,
    wake_ms: Option<u64>,
    stop: bool,
    /// The last finished round, to be cleaned up.
    finished: Option<RoundId>,
    /// A step failed midway, or a process ended in one: the round's end may be on record and not in the state.
    is_unsure: bool,
    shared: share::Shared,
}

/// See the module.
pub struct Desk {
    storage: Storage,
    publisher: Publisher,
    policy: Policy,
    events: Events,
    /// Whether other processes move the state too (`share.rs`).
    is_shared: bool,
    inner: Mutex<Inner>,
    blobs: RwLock<()>,
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Desk").field("policy", &self.policy).finish_non_exhaustive()
    }
}

impl Desk {
    /// Takes up the round where the last process left it.
    pub fn open(
        storage: Storage,
        publisher: Publisher,
        policy: Policy,
        events: Events,
        now_ms: u64,
    ) -> Result<Arc<Self>, DeskError> {
        let (durable, sequence) = load(storage.coord.as_ref())?;
        let inner = Inner {
            durable,
            sequence,
            work: None,
            wake_ms: None,
            stop: false,
            finished: None,
            is_unsure: true,
            shared: share::Shared::default(),
        };
        let is_shared = storage.lead.is_shared();
        let (inner, blobs) = (Mutex::new(inner), RwLock::new(()));
        let desk = Self { storage, publisher, policy, events, is_shared, inner, blobs };
        if is_shared {
            // The round goes on whether or not this process is there.
            desk.look()?;
        } else {
            desk.apply(&mut desk.lock(), now_ms, &Event::Resumed)?;
            desk.reconcile(&mut desk.lock(), now_ms)?;
        }
        Ok(Arc::new(desk))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held from storing an update's bytes until the inbox names them, so that no sweep falls in between.
    fn keep_blobs(&self) -> RwLockReadGuard<'_, ()> {
        self.blobs.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held while blobs that nothing names are deleted.
    pub fn sweep_blobs(&self) -> RwLockWriteGuard<'_, ()> {
        self.blobs.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The current round, or the next one.
    pub fn round(&self) -> RoundId {
        self.lock().durable.rounds.round
    }

    /// The state machine as it stands.
    pub fn rounds(&self) -> Rounds {
        self.lock().durable.rounds.clone()
    }

    /// What the stages did so far.
    pub fn progress(&self) -> Progress {
        self.lock().durable.progress.clone()
    }

    /// SCAFFOLD's control variate; none before the first merge with one, and after one without.
    pub fn control(&self) -> Option<SignedControl> {
        self.lock().durable.control
    }

    /// A device is ready for work; true if it has a task of the current round. The release that the round
    /// starts from comes with it.
    pub fn poll(
        &self,
        now_ms: u64,
        device: DeviceId,
        start: Start,
    ) -> Result<Option<(RoundId, Start, u64)>, DeskError> {
        let mut inner = self.lock();
        let actions = self.apply(&mut inner, now_ms, &Event::Polled(device, start))?;
        if !actions.contains(&Action::Assign(device)) {
            return Ok(None);
        }
        Ok(inner.durable.rounds.task(&device, now_ms))
    }

    /// Whether an update would be counted now; `Ok(true)` if it already is.
    pub fn admits(&self, round: RoundId, device: &DeviceId) -> Result<bool, NotAdmitted> {
        self.lock().durable.rounds.admits(&self.policy, round, device)
    }

    /// Takes an update into the round, durably and once. Whoever closes the round waits for this, so an
    /// update is either in before the merge or was never acknowledged.
    pub fn take(&self, now_ms: u64, accepted: &Accepted, pass: &Pass<'_>) -> Result<Taken, DeskError> {
        if let Pass::Through { round, sequence } = pass {
            return self.take_through(accepted, (*round, *sequence));
        }
        let device = accepted.receipt.receipt.device;
        let mut inner = self.lock();
        self.settle(&mut inner, now_ms)?;
        inner.durable.rounds.admits(&self.policy, accepted.open.round, &device)?;
        // The round that merges it, which in buffered mode may be a later one than it names.
        let round = inner.durable.rounds.round;
        let accepted = Accepted { start: inner.durable.rounds.trained_from(&device), ..*accepted };
        let value = postcard::to_allocvec(&accepted).map_err(|error| DeskError::damaged("receipt", error))?;
        let taken = match self.storage.inbox.append_once(&queue(round), &device.to_string(), &value)? {
            Append::Appended => Taken::Now,
            Append::Duplicate(found) => Taken::Before(round, Box::new(decode_accepted(&found)?)),
        };
        self.apply(&mut inner, now_ms, &Event::Received(device))?;
        if taken == Taken::Now {
            let (received, target) = inner.durable.rounds.progress();
            self.events.tell(&received_event(round, &accepted, (received, target)));
        }
        Ok(taken)
    }

    /// What was taken from a device for a round, if its receipt is still kept, and the round that it was taken into.
    pub fn taken(&self, round: RoundId, device: &DeviceId) -> Result<Option<(RoundId, Accepted)>, DeskError> {
        let now = self.round();
        let newest = if self.policy.is_buffered() {
            now.0.min(round.0.saturating_add(ROUNDS_BACK_MAX))
        } else {
            round.0
        };
        for into in (round.0..=newest).map(RoundId) {
            let Some(bytes) = self.storage.inbox.find(&queue(into), &device.to_string())? else { continue };
            let accepted = match decode_accepted(&bytes) {
                Ok(accepted) => accepted,
                // Its round is over: merged, or rejected for this row. The device takes *stale* for *may have been taken*.
                Err(error) if into < now => {
                    tracing::warn!(round = %into, %device, %error, "a damaged receipt is passed over");
                    continue;
                }
                Err(error) => return Err(error),
            };
            if accepted.open.round == round {
                return Ok(Some((into, accepted)));
            }
        }
        Ok(None)
    }

    /// Counts what is in the inbox of round `into`, if a failing store kept that from happening.
    pub fn count_again(&self, now_ms: u64, into: RoundId, device: DeviceId) -> Result<(), DeskError> {
        if self.is_shared {
            // Who drives counts by the inbox.
            return Ok(());
        }
        let mut inner = self.lock();
        if inner.durable.rounds.round == into {
            self.apply(&mut inner, now_ms, &Event::Received(device))?;
        }
        Ok(())
    }

    /// What a stage has to do, after seeing to the time.
    pub fn next(&self, now_ms: u64) -> Result<Next, DeskError> {
        let mut inner = self.lock();
        self.settle(&mut inner, now_ms)?;
        self.check_term(&inner)?;
        if let Some(quiet_ms) = self.settle_sweep(&mut inner, now_ms)? {
            return Ok(Next::Wait(Some(quiet_ms)));
        }
        if inner.work.is_none() {
            if self.is_shared {
                self.attend(&mut inner, now_ms)?;
            } else if inner.durable.rounds.is_due(now_ms) {
                self.reconcile(&mut inner, now_ms)?;
            }
            self.apply(&mut inner, now_ms, &Event::TimePassed)?;
            self.open_by_itself(&mut inner, now_ms)?;
        }
        self.shut_to_merge(&mut inner)?;
        Ok(match &inner.work {
            Some(work) => Next::Work(inner.durable.rounds.round, work.clone()),
            None if inner.stop => Next::Stop,
            None => {
                let wakes = [inner.wake_ms, self.attend_ms(&inner)];
                Next::Wait(wakes.into_iter().flatten().min())
            }
        })
    }

    /// A buffered round begins as soon as the one before it is over: devices that wait with an update ask for no task.
    fn open_by_itself(&self, inner: &mut Inner, now_ms: u64) -> Result<(), DeskError> {
        if self.policy.is_buffered()
            && matches!(inner.durable.rounds.phase, Phase::Waiting { .. })
            && let Some(head) = self.publisher.head()?
        {
            self.apply(inner, now_ms, &Event::Head(start_of(&head.release)))?;
        }
        Ok(())
    }

    /// A stage's work is done: its figures and its event are saved together. What another process did meanwhile, or took
    /// over, is left to that one: it may have swept what this one stored and nothing names yet.
    pub fn done(
        &self,
        now_ms: u64,
        (round, work): (RoundId, &Action),
        seconds: f64,
        figures: Option<Figures>,
        event: Event,
    ) -> Result<(), DeskError> {
        let mut inner = self.lock();
        self.settle(&mut inner, now_ms)?;
        if self.check_term(&inner).is_err() {
            tracing::info!(%round, "another process drives");
            return Ok(());
        }
        if inner.durable.rounds.round != round || inner.work.as_ref() != Some(work) {
            tracing::info!(%round, "the stage is done already");
            return Ok(());
        }
        let before = (inner.durable.progress.clone(), inner.durable.control);
        let opened_ms = inner.durable.rounds.opened_ms();
        if let Some(figures) = &figures {
            let progress = &mut inner.durable.progress;
            let stage = match figures {
                Figures::Merge(merge) => {
                    progress.merge = Some(MergeFigures::clone(merge));
                    inner.durable.control = merge.control;
                    "merge"
                }
                Figures::Align(align) => {
                    progress.align = Some(align.clone());
                    "align"
                }
                Figures::Evaluate(evaluate) => {
                    progress.evaluate = Some(evaluate.clone());
                    "evaluate"
                }
                Figures::Publish { .. } => "publish",
            };
            inner.durable.progress.seconds.insert(stage.to_owned(), seconds);
        }
        let done = self.step(&mut inner, now_ms, event);
        let is_overtaken = self.is_overtaken(&mut inner, &done);
        if done.is_err() {
            (inner.durable.progress, inner.durable.control) = before;
        }
        if is_overtaken {
            tracing::info!(%round, "another process drives");
            return Ok(());
        }
        inner.is_unsure = done.is_err();
        done?;
        drop(inner);
        if let Some(figures) = figures {
            // With the stage that is on record, and so once, however often it was tried.
            if let Figures::Merge(merge) = &figures {
                for device in merge.revoked() {
                    self.events.tell(&Told::LeftOut { round, device });
                }
            }
            self.events.tell(&Told::Stage { round, opened_ms, seconds, figures });
        }
        Ok(())
    }

    /// The round that ended and has not been cleaned up since.
    pub fn take_finished(&self) -> Option<RoundId> {
        self.lock().finished.take()
    }
}

/// A release as tasks name it.
pub(crate) fn start_of(release: &Release) -> Start {
    Start { version: release.version, digest: release.digest, length: release.length }
}

/// What is told of an update that was taken, with how many there are now and how many close the round.
fn received_event(round: RoundId, accepted: &Accepted, (received, target): (u32, u32)) -> Told {
    Told::Received {
        round,
        device: accepted.receipt.receipt.device,
        bytes: accepted.open.length,
        digest: accepted.open.digest,
        task_round: accepted.open.round,
        opened_ms: accepted.opened_ms,
        trace: accepted.open.trace,
        samples: accepted.open.samples,
        received,
        target,
    }
}
