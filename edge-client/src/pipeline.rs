//! What a device does with a poll's answer: install what was published, then the round's stages in order.
//!
//! This file decides; the stages compute. Each stage leaves its result in `round/`, so that after a kill the round goes
//! on with the stage that was not finished: pairs, training checkpoint, packed update, receipt.

use std::time::Instant;

use commonweal_adapter::{Adapter, Residual, Trainable};
use commonweal_package::TrainGraph;
use commonweal_protocol::{
    Content, DeviceId, DeviceReport, Mode, Poll, PollReply, ReconnectWindow, Refusal, RoundId, RoundTask,
};
use commonweal_runtime::{Cancel, Model};
use commonweal_safety::{Guard, Reviser};
use commonweal_transport::Link;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::runtime::Handle;

use crate::{
    compress::{self, Packed},
    control::{self, Controls},
    events::{Done, Event, Output},
    filter,
    install::{self, Expected},
    pipeline_error::damaged,
    policy::Policy,
    revise::{self, ReviseCounts, TrainingPair},
    sample,
    store::{Store, StoreError},
    train::{self, TrainSummary, Trained, TrainingError},
    upload::{self, UploadError},
};

pub use crate::pipeline_error::PipelineError;
pub use crate::task::{base_of, train_task, trainable};

const BEGUN: &str = "round/task.json";
const GIVEN_UP: &str = "round/given-up.json";
const PAIRS: &str = "round/pairs.json";
const CHECKPOINT: &str = "round/training.safetensors";
const PACKED: &str = "round/update.packed";
const PACKED_REPORT: &str = "round/update.json";
const NEXT_RESIDUAL: &str = "round/residual.bin";
const RESIDUAL: &str = "residual.bin";
/// Of rounds that train `A` alone: what is owed of `A` waits there while `B` is trained.
const RESIDUAL_A: &str = "residual-a.bin";

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
}

/// A visit's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visit {
    /// What it came to.
    pub outcome: Outcome,
    /// When to come back.
    pub reconnect: ReconnectWindow,
}

/// What the round in progress was begun with. Work under another task or another policy of the owner is not gone on
/// with.
#[derive(Serialize, Deserialize)]
struct Begun {
    task: RoundTask,
    policy: Policy,
}

/// Why this round gets no update, so that the next poll does not do all the work again.
#[derive(Clone, Copy, Serialize, Deserialize)]
enum GivenUp {
    NothingToLearn,
    Diverged,
    Refused(Refusal),
}

/// The screened and revised samples of a round, as kept on disk.
#[derive(Serialize, Deserialize)]
struct Prepared {
    sampled: usize,
    counts: ReviseCounts,
    pairs: Vec<TrainingPair>,
}

/// The packed update's report, as kept on disk beside it.
#[derive(Serialize, Deserialize)]
struct PackedReport {
    report: DeviceReport,
    samples: u32,
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

    /// Asks for work and news, and installs what was published.
    pub fn poll(&self) -> Result<PollReply, PipelineError> {
        let installed = install::installed_version(&self.store, &self.expected)?;
        let poll = Poll { base: self.expected.base, installed };
        let reply = self.runtime.block_on(self.link.poll(poll))?;
        if let Some(release) =
            reply.release.as_ref().filter(|notice| Some(notice.release.version) != installed)
        {
            let begun = Instant::now();
            let done =
                self.runtime.block_on(install::install(&self.link, &self.store, &self.expected, release))?;
            let round = release.release.round.map_or(0, |round| round.0);
            self.stage(round, begun, Done::Install { version: done.version.0 });
        }
        Ok(reply)
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
        self.begin_or_continue(task)?;
        if let Some(why) = self.read_round(GIVEN_UP)? {
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
            Err(error) => Err(error),
        }
    }

    fn is_delivered(&self, round: RoundId) -> Result<bool, StoreError> {
        Ok(upload::delivered(&self.store)?.iter().any(|known| known.round == round))
    }

    /// Ends a round that was worked on to its end. Its update may have been taken though no receipt came: offered again,
    /// it gets the same receipt, even if its round is over and another has begun.
    fn finish_begun(&self) -> Result<Option<Visit>, PipelineError> {
        let Some(Begun { task, policy }) = self.read_round(BEGUN)? else { return Ok(None) };
        if self.is_delivered(task.round)? {
            // A kill came between the receipt and this.
            self.settle(&task)?;
            return Ok(None);
        }
        if policy != self.policy || task.base != self.expected.base {
            return Ok(None);
        }
        match self.packed_before(&task)? {
            Some((packed, report)) => Ok(Some(self.deliver(&task, &packed, &report)?)),
            None => Ok(None),
        }
    }

    /// Keeps what a kill left of this very task under this very policy; clears what is of another.
    fn begin_or_continue(&self, task: &RoundTask) -> Result<(), PipelineError> {
        // The time left differs from poll to poll.
        let begun = Begun { task: RoundTask { deadline_ms: 0, ..*task }, policy: self.policy.clone() };
        let begun = serde_json::to_vec(&begun).map_err(|error| damaged(&self.store, BEGUN, &error))?;
        if self.store.read(BEGUN)?.as_ref() != Some(&begun) {
            self.store.clear_round()?;
            self.store.write(BEGUN, &begun)?;
        }
        Ok(())
    }

    /// After a receipt: what compression owes now follows from what the aggregator has. Can be done again.
    fn settle(&self, task: &RoundTask) -> Result<(), StoreError> {
        self.store.rename(NEXT_RESIDUAL, residual_of(task))?;
        control::await_merge(&self.store)?;
        self.store.clear_round()
    }

    /// Leaves nothing of the round but that it was given up. What compression owed before it is owed still.
    fn give_up(&self, task: &RoundTask, why: GivenUp) -> Result<Outcome, PipelineError> {
        self.write_json(GIVEN_UP, &why)?;
        for name in [PAIRS, CHECKPOINT, PACKED_REPORT, PACKED, NEXT_RESIDUAL, control::NEXT] {
            self.store.remove(name)?;
        }
        Ok(why_not(task.round, why))
    }

    /// The update of this task that was packed before, if it is whole and its start is still to be had.
    fn packed_before(&self, task: &RoundTask) -> Result<Option<(Packed, PackedReport)>, PipelineError> {
        let (Some(bytes), Some(report)) = (self.store.read(PACKED)?, self.read_round(PACKED_REPORT)?) else {
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

    fn packed_update(&self, task: &RoundTask) -> Result<Option<(Packed, PackedReport)>, PipelineError> {
        let Some(prepared) = self.prepare(task)? else { return Ok(None) };
        let start = self.start(task)?;
        let layout = start.layout();
        let controls = control::begin(&self.link, &self.store, &self.expected, &task.scaffold, layout);
        let controls = self.runtime.block_on(controls)?;
        let trained = self.train(task, &start, &prepared, controls.as_ref())?;
        let begun = Instant::now();
        let (packed, residual, summary) = self.pack(task, &trained, controls.as_ref())?;
        let report = report(&prepared, trained.summary(), summary.norm);
        let report = PackedReport { report, samples: prepared.pairs.len() as u32 };
        // The report last: with it, the update counts as packed.
        self.store.write(NEXT_RESIDUAL, &residual.to_bytes())?;
        self.store.write(PACKED, packed.bytes())?;
        self.write_json(PACKED_REPORT, &report)?;
        let (bytes, bits_per_parameter) = (packed.bytes().len(), summary.bits_per_parameter);
        self.stage(task.round.0, begun, Done::Compress { bytes, bits_per_parameter, norm: summary.norm });
        Ok(Some((packed, report)))
    }

    /// Sample, filter, revise.
    fn prepare(&self, task: &RoundTask) -> Result<Option<Prepared>, PipelineError> {
        if let Some(prepared) = self.read_round(PAIRS)? {
            return Ok(Some(prepared));
        }
        let round = task.round.0;
        let begun = Instant::now();
        let samples = sample::draw(sample::stored(&self.store)?, self.policy.train.samples_max, task.seed);
        let sampled = samples.len();
        if sampled == 0 {
            return Ok(None);
        }
        self.stage(round, begun, Done::Sample { samples: sampled });

        let begun = Instant::now();
        let screened = filter::screen(&self.guard, &self.policy, samples, &self.cancel, |_| ())?;
        let found = filter::count(&screened);
        let filter::FilterCounts { kept, dropped, refused, flagged } = found;
        self.stage(round, begun, Done::Filter { kept, dropped, refused, flagged });

        let begun = Instant::now();
        let (pairs, counts) = revise::revise(
            &self.guard,
            &self.reviser,
            &self.policy,
            screened,
            task.seed,
            &self.cancel,
            |_| (),
        )?;
        let ReviseCounts { revised, refused, dropped, attempts, .. } = counts;
        self.stage(round, begun, Done::Revise { revised, refused, dropped, attempts });
        let prepared = Prepared { sampled, counts, pairs };
        self.write_json(PAIRS, &prepared)?;
        Ok(Some(prepared))
    }

    fn start(&self, task: &RoundTask) -> Result<Adapter, PipelineError> {
        let content = Content { digest: task.start.digest, length: task.start.length };
        Ok(self.runtime.block_on(install::obtain(&self.link, &self.store, &self.expected, content))?)
    }

    fn train(
        &self,
        task: &RoundTask,
        start: &Adapter,
        prepared: &Prepared,
        controls: Option<&Controls>,
    ) -> Result<Trained, PipelineError> {
        let begun = Instant::now();
        let checkpoint = self.store.read(CHECKPOINT)?;
        let mut watch = Watching { store: &self.store, output: self.output, round: task.round.0 };
        if self.policy.train.graph == TrainGraph::Frugal {
            self.model.close_inference();
        }
        let mut how = train_task(task);
        how.correction = controls.map(Controls::correction).transpose().map_err(TrainingError::from)?;
        let trained = train::train(
            &self.model,
            start,
            &prepared.pairs,
            &how,
            &self.policy.train,
            checkpoint.as_deref(),
            &mut watch,
            &self.cancel,
        )?;
        // Activations are needed for minutes a day; the base stays.
        self.model.close_training();
        let TrainSummary { steps, tokens, loss_first, loss_last, too_long, resumed_step } =
            *trained.summary();
        train::tell_too_long(too_long);
        self.stage(task.round.0, begun, Done::Train { steps, tokens, loss_first, loss_last, resumed_step });
        Ok(trained)
    }

    fn pack(
        &self,
        task: &RoundTask,
        trained: &Trained,
        controls: Option<&Controls>,
    ) -> Result<(Packed, Residual, compress::PackSummary), PipelineError> {
        let (layout, trainable) = (trained.delta().layout().clone(), trainable(task.mode, task.round));
        // A residual of another layout or mode is of another federation: begin with none.
        let owed = if task.mode == Mode::Exact { None } else { self.store.read(residual_of(task))? };
        let mut residual = owed
            .and_then(|bytes| Residual::from_bytes(&bytes, layout.clone(), trainable).ok())
            .unwrap_or_else(|| Residual::zeros(layout.clone(), trainable));
        let options = compress::options(&task.compress)?;
        let Some(controls) = controls else {
            let (packed, summary) = compress::compress(trained, &mut residual, &options, task.seed)?;
            if task.mode == Mode::Exact {
                // The next start is factored anew: what is owed of these factors would fit none of its.
                residual = Residual::zeros(layout, trainable);
            }
            return Ok((packed, residual, summary));
        };
        let (packed, summary, next) =
            compress::compress_corrected(trained, controls.own(), &mut residual, &options, task.seed)?;
        control::write_next(&self.store, task.round, self.expected.base, &next)?;
        Ok((packed, residual, summary))
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
        let key = &self.expected.key;
        let sent =
            self.runtime.block_on(upload::upload(&self.link, key, self.id, &self.store, &open, packed));
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

    fn stage(&self, round: u64, begun: Instant, done: Done) {
        self.output.show(&Event::Stage { round, seconds: begun.elapsed().as_secs_f64(), done });
    }

    /// A file of the round in progress. A damaged one is as good as none: its stage is done again.
    fn read_round<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StoreError> {
        let Some(bytes) = self.store.read(name)? else { return Ok(None) };
        let read = serde_json::from_slice(&bytes);
        Ok(read.inspect_err(|error| tracing::warn!("{}", damaged(&self.store, name, error))).ok())
    }

    fn write_json(&self, name: &str, value: &impl Serialize) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(value).map_err(|error| damaged(&self.store, name, &error))?;
        self.store.write(name, &bytes)
    }
}

/// Where a round's factors keep what compression owes.
fn residual_of(task: &RoundTask) -> &'static str {
    match trainable(task.mode, task.round) {
        Trainable::AOnly => RESIDUAL_A,
        Trainable::Both | Trainable::BOnly => RESIDUAL,
    }
}

/// Shows steps and keeps checkpoints.
struct Watching<'s> {
    store: &'s Store,
    output: Output,
    round: u64,
}

impl train::Watch for Watching<'_> {
    fn step(&mut self, step: u32, loss: f32) {
        self.output.show(&Event::Step { round: self.round, step, loss });
    }

    fn checkpoint(&mut self, bytes: Vec<u8>) -> Result<(), StoreError> {
        self.store.write(CHECKPOINT, &bytes)
    }
}

fn why_not(round: RoundId, why: GivenUp) -> Outcome {
    match why {
        GivenUp::NothingToLearn => Outcome::NoSamples,
        GivenUp::Diverged => Outcome::Diverged(round),
        GivenUp::Refused(refusal) => Outcome::Refused(round, refusal),
    }
}

fn report(prepared: &Prepared, summary: &TrainSummary, norm: f64) -> DeviceReport {
    let ReviseCounts { kept, revised, refused, dropped, attempts } = prepared.counts;
    let count = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    DeviceReport {
        sampled: count(prepared.sampled),
        kept: count(kept),
        dropped: count(dropped),
        refused: count(refused),
        revised: count(revised),
        revision_attempts: count(attempts),
        steps: summary.steps,
        trained_tokens: summary.tokens,
        loss_first: summary.loss_first,
        loss_last: summary.loss_last,
        delta_norm: norm as f32,
    }
}

impl From<UploadError> for PipelineError {
    fn from(error: UploadError) -> Self {
        Self::Upload(Box::new(error))
    }
}
