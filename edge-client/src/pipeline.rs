//! What a device does with a poll's answer: install what was published, then the round's stages in order.
//!
//! This file decides; `work.rs` has the stages done one after the other. Each leaves its result in `round/`, so that
//! after a kill the round goes on with the stage that was not finished: pairs, training checkpoint, packed update, receipt.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use commonweal_adapter::Adapter;
use commonweal_protocol::{
    DeviceId, DeviceReport, Digest, Open, Poll, PollReply, ReconnectWindow, Refusal, RoundId, RoundTask,
    SignedRelease, Start, Version,
};
use commonweal_runtime::{Cancel, Model};
use commonweal_safety::{Guard, Reviser};
use commonweal_transport::{Clock, Link};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::runtime::Handle;

use crate::{
    begun::{BEGUN, Begun},
    compress::Packed,
    control, doing,
    events::{Done, Event, Output},
    install::{self, Expected, InstallError},
    pipeline_error::damaged,
    policy::Policy,
    store::{Store, StoreError},
    traces::Tracer,
    train::TrainingError,
    trouble,
    upload::{self, UploadError},
};

pub use crate::pipeline_error::PipelineError;
pub use crate::task::{base_of, train_task, trainable};

pub(crate) const GIVEN_UP: &str = "round/given-up.json";
pub(crate) const PAIRS: &str = "round/pairs.json";
pub(crate) const CHECKPOINT: &str = "round/training.safetensors";
pub(crate) const PACKED: &str = "round/update.packed";
pub(crate) const PACKED_REPORT: &str = "round/update.json";
/// How soon a cancelled handle ends what waits for the network.
const CANCEL_LOOK: Duration = Duration::from_millis(50);

/// A device that is ready to take part.
#[derive(Debug)]
pub struct Device<L> {
    /// Who it is: receipts name it.
    pub id: DeviceId,
    /// Its directory, locked.
    pub store: Store,
    /// What its owner decided.
    pub policy: Policy,
    /// The one base in memory.
    pub model: Model,
    /// Over that base.
    pub guard: Guard,
    /// Over that base.
    pub reviser: Reviser,
    /// To the aggregator.
    pub link: L,
    /// What adapters are checked against.
    pub expected: Expected,
    /// How events are shown.
    pub output: Output,
    /// Where the link's futures run.
    pub runtime: Handle,
    /// Stops whatever runs.
    pub cancel: Cancel,
    /// Where spans of its updates go, if its owner wants them to.
    pub tracer: Option<Tracer>,
}

/// What a visit to the aggregator came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// There was no work.
    Idle,
    /// There is a round, but nothing to train on.
    NoSamples,
    /// Training with this round's settings diverged.
    Diverged(RoundId),
    /// This round's update was delivered before.
    AlreadyDelivered(RoundId),
    /// An update was delivered; the receipt is on disk.
    Delivered(RoundId),
    /// The aggregator did not take it.
    Refused(RoundId, Refusal),
    /// The release that the round starts from cannot be installed here, which the aggregator is told.
    Troubled(Version),
}

/// A visit's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visit {
    /// What it came to.
    pub outcome: Outcome,
    /// When to come back.
    pub reconnect: ReconnectWindow,
}

/// Why this round gets no update, so that the next poll does not do all the work again.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(crate) enum GivenUp {
    NothingToLearn,
    Diverged,
    Refused(Refusal),
}

/// The packed update's report, as kept on disk beside it.
#[derive(Serialize, Deserialize)]
pub(crate) struct PackedReport {
    pub(crate) report: DeviceReport,
    pub(crate) samples: u32,
}

impl<L: Link> Device<L> {
    /// What a kill left undelivered, or one poll and everything that follows from it.
    pub fn visit(&self) -> Result<Visit, PipelineError> {
        if let Some(visit @ Visit { outcome: Outcome::Delivered(_), .. }) = self.finish_begun()? {
            return Ok(visit);
        }
        let PollReply { task, reconnect, .. } = self.poll()?;
        match task {
            None => Ok(Visit { outcome: Outcome::Idle, reconnect }),
            Some(task) => self.take_part(&task, reconnect),
        }
    }

    /// Asks for work and news, goes on to the aggregator's newest key, and installs what was published.
    pub fn poll(&self) -> Result<PollReply, PipelineError> {
        let installed = install::installed_version(&self.store, &self.expected)?;
        let noted = trouble::noted(&self.store)?;
        let trust = &self.expected.trust;
        let (base, key, trouble) = (self.expected.base, trust.number(), noted.told(installed));
        let reply = self.ask(self.link.poll(Poll { base, installed, key, trouble }))??;
        if trust.follow(&self.store, &reply.successions)? {
            self.output
                .show(&Event::KeyFollowed { number: trust.number().0, key: trust.key().0.to_string() });
        }
        let now_ms = Clock::system().unix_ms();
        let is_news = |signed: &&SignedRelease| {
            let (version, digest) = (signed.release.version, signed.release.digest);
            Some(version) != installed && !noted.are_of(version, digest, now_ms)
        };
        if let Some(release) = reply.release.as_ref().filter(is_news) {
            let begun = Instant::now();
            let done = self.ask(install::install(&self.link, &self.store, &self.expected, release))?;
            let (version, digest) = (release.release.version, release.release.digest);
            let done = done.map_err(|error| self.not_installed(version, digest, reply.reconnect, error))?;
            let round = release.release.round.map_or(0, |round| round.0);
            self.stage(round, begun, Done::Install { version: done.version.0 });
        }
        Ok(reply)
    }

    /// Notes what the aggregator is to hear, if the release is why it was not installed.
    fn not_installed(
        &self,
        version: Version,
        digest: Digest,
        reconnect: ReconnectWindow,
        error: InstallError,
    ) -> PipelineError {
        let now_ms = Clock::system().unix_ms();
        match trouble::note(&self.store, version, digest, &error, now_ms) {
            Ok(false) => return error.into(),
            Ok(true) => {}
            // On a full disk, say. What went wrong first is told.
            Err(unwritten) => tracing::warn!("the aggregator will not hear of it: {unwritten}"),
        }
        PipelineError::Release { version, reconnect, source: Box::new(error) }
    }

    /// Waits for the network's answer, or until the visit is cancelled. What is dropped then loses nothing: bytes that
    /// came are kept, and bytes that went are where the aggregator's durable ones end.
    pub(crate) fn ask<T>(&self, asked: impl Future<Output = T>) -> Result<T, PipelineError> {
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                answer = asked => Ok(answer),
                () = until_cancelled(&self.cancel) => Err(PipelineError::Cancelled),
            }
        })
    }

    /// The window is the poll's; if the update is answered, that answer has a later one.
    fn take_part(&self, task: &RoundTask, reconnect: ReconnectWindow) -> Result<Visit, PipelineError> {
        if task.base != self.expected.base {
            return Err(PipelineError::Base { expected: self.expected.base, got: task.base });
        }
        let ended = |outcome| Ok(Visit { outcome, reconnect });
        if self.is_delivered(task.round)? {
            return ended(Outcome::AlreadyDelivered(task.round));
        }
        let Start { version, digest, .. } = task.start;
        let now_ms = Clock::system().unix_ms();
        if trouble::noted(&self.store)?.are_of(version, digest, now_ms) {
            return ended(Outcome::Troubled(version));
        }
        self.begin_or_continue(task)?;
        if let Some(why) = self.read_round(GIVEN_UP)? {
            // A kill may have come between that and this.
            self.clear_given_up()?;
            return ended(why_not(task.round, why));
        }
        match self.packed_update(task) {
            Ok(Some((packed, report))) => self.deliver(task, &packed, &report),
            Ok(None) => ended(Outcome::NoSamples),
            Err(PipelineError::Train(TrainingError::NoPairs { .. })) => {
                ended(self.give_up(task, GivenUp::NothingToLearn)?)
            }
            Err(PipelineError::Train(error)) if error.is_divergence() => {
                tracing::warn!("round {}: {error}: {:?}", task.round.0, std::error::Error::source(&error));
                ended(self.give_up(task, GivenUp::Diverged)?)
            }
            Err(PipelineError::Compress(error)) if error.is_divergence() => {
                tracing::warn!("round {}: {error}: {:?}", task.round.0, std::error::Error::source(&error));
                ended(self.give_up(task, GivenUp::Diverged)?)
            }
            Err(PipelineError::Install(error)) => Err(self.not_installed(version, digest, reconnect, error)),
            Err(error) => Err(error),
        }
    }

    fn is_delivered(&self, round: RoundId) -> Result<bool, StoreError> {
        upload::is_delivered(&self.store, &self.expected.trust, round)
    }

    /// Ends a round that was worked on to its end. Its update may have been taken though no receipt came: offered again,
    /// it gets the same receipt, even if its round is over and another has begun.
    fn finish_begun(&self) -> Result<Option<Visit>, PipelineError> {
        let Some(Begun { task, .. }) = self.read_round(BEGUN)? else { return Ok(None) };
        if self.is_delivered(task.round)? {
            // A kill came between the receipt and this.
            self.settle(&task)?;
            return Ok(None);
        }
        let is_of_now = self.store.read_remade(BEGUN)? == Some(self.begun_with(&task)?);
        if !is_of_now || task.base != self.expected.base {
            return Ok(None);
        }
        match self.packed_before(&task)? {
            Some((packed, report)) => Ok(Some(self.deliver(&task, &packed, &report)?)),
            None => Ok(None),
        }
    }

    /// Keeps what a kill left of this very task under these very terms; clears what is of others.
    fn begin_or_continue(&self, task: &RoundTask) -> Result<(), PipelineError> {
        let begun = self.begun_with(task)?;
        if self.store.read_remade(BEGUN)?.as_ref() != Some(&begun) {
            let is_packed = self.store.exists(PACKED_REPORT);
            self.clear_for(task, is_packed)?;
            self.store.write(BEGUN, &begun)?;
        }
        Ok(())
    }

    /// Leaves nothing of the round but that it was given up.
    fn give_up(&self, task: &RoundTask, why: GivenUp) -> Result<Outcome, PipelineError> {
        let refusal = match why {
            GivenUp::Refused(refusal) => Some(refusal),
            GivenUp::NothingToLearn | GivenUp::Diverged => None,
        };
        self.owe_still(task, refusal)?;
        self.write_json(GIVEN_UP, &why)?;
        self.clear_given_up()?;
        Ok(why_not(task.round, why))
    }

    fn clear_given_up(&self) -> Result<(), StoreError> {
        for name in [PAIRS, CHECKPOINT, PACKED_REPORT, PACKED, control::NEXT] {
            self.store.remove(name)?;
        }
        self.remove_chunks()
    }

    /// The update of this task that was packed before, if it is whole and its start is still to be had.
    fn packed_before(&self, task: &RoundTask) -> Result<Option<(Packed, PackedReport)>, PipelineError> {
        let (Some(bytes), Some(report)) = (self.store.read_remade(PACKED)?, self.read_round(PACKED_REPORT)?)
        else {
            return Ok(None);
        };
        let start = match self.start(task) {
            Err(error) if error.is_transient() => return Err(error),
            start => start.ok(),
        };
        let read = |start: Adapter| {
            let trainable = trainable(task.mode, task.round);
            Packed::from_disk(bytes, start.layout(), trainable, task.scaffold.is_on()).ok()
        };
        Ok(start.and_then(read).map(|packed| (packed, report)))
    }

    fn deliver(
        &self,
        task: &RoundTask,
        packed: &Packed,
        report: &PackedReport,
    ) -> Result<Visit, PipelineError> {
        let begun = Instant::now();
        let round = task.round;
        let open = upload::announce(round, self.expected.base, packed, report.report, report.samples);
        let open = Open { trace: self.tracer.as_ref().map(|tracer| tracer.upload(round)), ..open };
        let trust = &self.expected.trust;
        let send = || self.ask(upload::upload(&self.link, trust, self.id, &self.store, &open, packed));
        let mut sent = send()?;
        if let Err(UploadError::Signature { .. }) = &sent {
            // The key may have been rotated since the last poll: then the same receipt comes again.
            let before = trust.number();
            self.poll()?;
            if trust.number() != before {
                sent = send()?;
            }
        }
        match sent {
            Ok(uploaded) => {
                self.settle(task)?;
                self.stage(round.0, begun, Done::Upload { bytes: open.length });
                Ok(Visit { outcome: Outcome::Delivered(round), reconnect: uploaded.reconnect })
            }
            Err(error) => {
                let Some((refusal, reconnect)) = error.final_refusal() else { return Err(error.into()) };
                self.stage(round.0, begun, Done::Refused { reason: refusal.to_string() });
                let outcome = self.give_up(task, GivenUp::Refused(refusal))?;
                Ok(Visit { outcome, reconnect })
            }
        }
    }

    pub(crate) fn stage(&self, round: u64, begun: Instant, done: Done) {
        let event = Event::Stage { round, seconds: begun.elapsed().as_secs_f64(), done };
        if let (Some(tracer), Event::Stage { done, .. }) = (&self.tracer, &event) {
            tracer.stage(RoundId(round), begun, done);
        }
        doing::after_event(&self.store, &event);
        self.output.show(&event);
    }

    pub(crate) fn write_json(&self, name: &str, value: &impl Serialize) -> Result<(), StoreError> {
        self.store.write(name, &self.encode(name, value)?)
    }

    /// A file of the round as it is kept.
    pub(crate) fn encode(&self, name: &str, value: &impl Serialize) -> Result<Vec<u8>, StoreError> {
        serde_json::to_vec(value).map_err(|error| damaged(&self.store, name, &error))
    }
}

impl<L> Device<L> {
    /// A file of the round in progress. A damaged one is as good as none: its stage is done again.
    pub(crate) fn read_round<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StoreError> {
        read_stage(&self.store, name)
    }
}

/// As [`Device::read_round`], of any store.
pub(crate) fn read_stage<T: DeserializeOwned>(store: &Store, name: &str) -> Result<Option<T>, StoreError> {
    let Some(bytes) = store.read_remade(name)? else { return Ok(None) };
    let read = serde_json::from_slice(&bytes);
    Ok(read.inspect_err(|error| tracing::warn!("{}", damaged(store, name, error))).ok())
}

/// Ends when the handle is cancelled.
pub(crate) async fn until_cancelled(cancel: &Cancel) {
    while !cancel.is_cancelled() {
        tokio::time::sleep(CANCEL_LOOK).await;
    }
}

fn why_not(round: RoundId, why: GivenUp) -> Outcome {
    match why {
        GivenUp::NothingToLearn => Outcome::NoSamples,
        GivenUp::Diverged => Outcome::Diverged(round),
        GivenUp::Refused(refusal) => Outcome::Refused(round, refusal),
    }
}

impl From<UploadError> for PipelineError {
    fn from(error: UploadError) -> Self {
        Self::Upload(Box::new(error))
    }
}
