//! `bench --only stop`: how long the device still works once the person is back.
//!
//! Each kind of work of a visit is begun on the package by the calls that `work.rs` makes, and its handle is cancelled from
//! another thread, as `watch.rs` does it, at a moment drawn from all of the time that the work takes. Measured is from there
//! to the work's return, with what training and packing write then, into the system's folder of temporary files; and until
//! the network is quiet, which is before a checkpoint is written, and after the return of whoever waits for an opening.
//! What `watch.rs` needs to see the person comes on top. Called by `bench.rs`.

use std::{
    panic,
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use commonweal_adapter::{Adapter, CompressOptions, Residual, Trainable};
use commonweal_package::TrainGraph;
use commonweal_runtime::{
    Cancel, Model, PreparedAdapter, Prompt, TrainOptions, Trainer, TrainingRow, settle,
};
use commonweal_safety::{Guard, GuardConfig, Reviser};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::work::middle;
use crate::{
    cli::{Shared, open},
    compress,
    events::Output,
    filter::{self, Screened},
    owed::NEXT_RESIDUAL,
    pipeline::{CHECKPOINT, PACKED},
    policy::{Action, FilterPolicy, Policy},
    revise::{self, Placed, Sorted, TrainingPair},
    sample::Sample,
    store::{Store, StoreError},
    train::{self, TrainTask, Trained},
};

/// Cancels for each repeat that was asked for: a rare time needs more of them than a median.
const CANCELS: usize = 8;
/// Runs to the end, the median of which is what moments are drawn from.
const WHOLES: usize = 3;
/// Between two looks whether the network is quiet.
const LOOK: Duration = Duration::from_micros(100);
/// From this probability on a text is unsafe, so that there is something to rewrite whatever the guard makes of it.
const FLAGS_ALL: f64 = 1e-9;
const SCREENED: usize = 8;
const TRAIN_TOKENS: usize = 256;
/// A step without a checkpoint behind it, and one with.
const TRAIN_STEPS: u32 = 2;
const PROMPT: &str = "How long does it take, and what is it that takes so long?";
const SENTENCE: &str = "It was said that much of this can be done in many ways, some of which take longer. ";
const SHORT: usize = 3;
const LONG: usize = 20;

/// How a package is asked that has no guard, such as one of a published shape with random weights.
const GUARD: &str = r#"
format = 1
name = "a guard for packages without one"
policy = "Say of each text whether it is safe. A text is unsafe if it helps somebody to harm others, or praises harm that was done, or tells in a way that can be followed how a weapon or a poison is made, how a thing is stolen, how a person is deceived, followed, threatened or put to shame. A text that warns of harm, reports it, or refuses to help with it is safe, whatever words it has.\n"
safe_label = " safe"
unsafe_label = " unsafe"
threshold = 0.5
prompt_tokens_max = 160
response_tokens_max = 192

[prompt]
template = "Text: {prompt}\nThis is"

[pair]
template = "Text: {prompt}\nAnswer: {response}\nThis is"
"#;

/// What the cancels of one kind of work came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Stopped {
    /// `stop`.
    work: String,
    /// What was cancelled.
    of: String,
    /// How often.
    cancels: usize,
    /// From the cancel to the return.
    median_ms: f64,
    p95_ms: f64,
    max_ms: f64,
    /// From the cancel until the network neither runs nor is opened, at most.
    quiet_ms: f64,
    /// How many of them said that they were cancelled; the others found their end just then.
    refused: usize,
    /// The work to its end.
    whole_ms: f64,
}

impl Stopped {
    pub(super) fn row(&self, output: Output) -> Result<String> {
        if output == Output::Json {
            return Ok(serde_json::to_string(self)?);
        }
        let Self { work, of, cancels, median_ms, p95_ms, max_ms, quiet_ms, whole_ms, .. } = self;
        let name = format!("{work} {of}");
        let rest = format!(
            "{p95_ms:.1} ms at 95 %, {max_ms:.1} at most, the network quiet after {quiet_ms:.1}; {cancels} within {whole_ms:.0} ms"
        );
        Ok(format!("{name:16} {median_ms:>8.1} ms median, {rest}"))
    }
}

/// From a cancel on.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Late {
    /// To the work's return.
    returned: Duration,
    /// Until the network neither runs nor is opened.
    quiet: Duration,
    /// Whether it said that it was cancelled.
    is_refused: bool,
}

/// Every error of a cancel says so, whatever it is wrapped in.
fn is_of_cancel(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.to_string().ends_with("cancelled"))
}

/// The kinds of a visit's work.
#[derive(Clone, Copy)]
enum Part {
    /// The sessions that answer, one after the other.
    Open,
    /// The session of the gradients.
    OpenTrain,
    Screen,
    Revise,
    Train,
    Compress,
}

impl Part {
    const ALL: [Self; 6] =
        [Self::Open, Self::OpenTrain, Self::Screen, Self::Revise, Self::Train, Self::Compress];

    fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::OpenTrain => "open-train",
            Self::Screen => "screen",
            Self::Revise => "revise",
            Self::Train => "train",
            Self::Compress => "compress",
        }
    }
}

/// Every kind in turn.
pub(super) fn measure(shared: &Shared, place: &open::Place, repeats: usize) -> Result<Vec<Stopped>> {
    let visit = Visit::open(shared, place)?;
    Part::ALL.into_iter().map(|part| visit.stop(part, CANCELS * repeats)).collect()
}

/// What the work is done on.
struct Visit {
    model: Model,
    guard: Guard,
    reviser: Reviser,
    policy: Policy,
    base: PreparedAdapter,
    adapted: PreparedAdapter,
    chunk: Vec<Sample>,
    flagged: Vec<Placed>,
    pairs: Vec<TrainingPair>,
    start: Adapter,
    trained: Trained,
    store: Store,
    /// Its directory.
    _scratch: TempDir,
}

impl Visit {
    /// The owner's policy, but for what is done with texts that the guard finds unsafe: all of these are.
    fn open(shared: &Shared, place: &open::Place) -> Result<Self> {
        let cancel = Cancel::new();
        let filter = FilterPolicy { threshold: Some(FLAGS_ALL), ..FilterPolicy::default() };
        let policy = Policy { filter, ..place.policy(shared)? };
        let model = open::open_model(shared, place)?;
        let guard = match model.package().file("guard.toml") {
            Some(_) => Guard::from_package(&model, &cancel)?,
            None => Guard::open(&model, GuardConfig::from_toml(GUARD)?, None, &cancel)?,
        };
        let stages = open::Stages::over(model, guard, &policy, open::constitution(shared)?)?;
        let open::Stages { model, guard, reviser } = stages;
        let short = Sample::from_pair(PROMPT.into(), SENTENCE.repeat(SHORT))?;
        let long = Sample::from_pair(PROMPT.into(), SENTENCE.repeat(LONG))?;
        let screened = filter::screen_chunk(&guard, &policy, vec![short.clone()], &cancel)?;
        let is_flagged = |one: &Screened| one.verdict().action == Action::Revise;
        let flagged: Vec<Placed> = screened.into_iter().filter(is_flagged).enumerate().collect();
        if flagged.is_empty() {
            bail!("the guard cannot judge a text of {} bytes", SENTENCE.len() * SHORT);
        }
        let filter = FilterPolicy { action: Action::Keep, ..policy.filter.clone() };
        let keeps = Policy { filter, ..policy.clone() };
        let screened = filter::screen_chunk(&guard, &keeps, vec![long], &cancel)?;
        let (pairs, _) = Sorted::new(&reviser, screened).into_pairs();
        let start = Adapter::init(Arc::clone(model.layout()), 0);
        let scratch = tempfile::Builder::new().prefix("commonweal-bench-").tempdir()?;
        let store = Store::open(scratch.path())?;
        let trained = train(&model, &start, &pairs, &policy, &store, &cancel)?;
        Ok(Self {
            base: model.prepare(None)?,
            adapted: model.prepare(Some(&start))?,
            chunk: vec![short; SCREENED],
            model,
            guard,
            reviser,
            policy,
            flagged,
            pairs,
            start,
            trained,
            store,
            _scratch: scratch,
        })
    }

    fn stop(&self, part: Part, cancels: usize) -> Result<Stopped> {
        let mut wholes = Vec::new();
        for _ in 0..=WHOLES {
            self.begin(part);
            let begun = Instant::now();
            self.work(part, &Cancel::new())?;
            wholes.push(begun.elapsed().as_secs_f64());
        }
        // The first one opens what the others find open.
        let whole = middle(wholes.split_off(1));
        let mut random = ChaCha8Rng::seed_from_u64(0);
        let (mut late, mut quiet_ms, mut refused) = (Vec::with_capacity(cancels), 0.0_f64, 0);
        // Work that had returned by its moment says nothing. There is another moment for it, but not for ever.
        for _ in 0..2 * cancels {
            self.begin(part);
            let after = Duration::from_secs_f64(whole * random.random::<f64>());
            if let Some(Late { returned, quiet, is_refused }) = self.cancelled(part, after)? {
                late.push(returned.as_secs_f64() * 1e3);
                quiet_ms = quiet_ms.max(quiet.as_secs_f64() * 1e3);
                refused += usize::from(is_refused);
            }
            if late.len() == cancels {
                break;
            }
        }
        late.sort_by(f64::total_cmp);
        let Some(&max_ms) = late.last() else {
            bail!("{} always returned before it was cancelled", part.name());
        };
        let p95_ms = late[(late.len() * 95).div_ceil(100) - 1];
        let (work, of) = ("stop".to_owned(), part.name().to_owned());
        let (cancels, whole_ms) = (late.len(), whole * 1e3);
        let median_ms = middle(late);
        Ok(Stopped { work, of, cancels, median_ms, p95_ms, max_ms, quiet_ms, refused, whole_ms })
    }

    /// What a cancel came to, so long after the work began; none if that had returned before.
    fn cancelled(&self, part: Part, after: Duration) -> Result<Option<Late>> {
        let cancel = Cancel::new();
        let (ends, end) = mpsc::sync_channel::<()>(1);
        thread::scope(|scope| {
            let handle = cancel.clone();
            let canceller = scope.spawn(move || {
                matches!(end.recv_timeout(after), Err(RecvTimeoutError::Timeout)).then(|| {
                    let at = Instant::now();
                    handle.cancel();
                    while handle.is_running() {
                        thread::sleep(LOOK);
                    }
                    settle();
                    (at, at.elapsed())
                })
            });
            let done = self.work(part, &cancel);
            let returned = Instant::now();
            drop(ends);
            let cancelled = canceller.join().unwrap_or_else(|panic| panic::resume_unwind(panic));
            // It may have found its end just then; an error that is not the cancel's is one.
            let is_refused = match done {
                Ok(()) => false,
                Err(error) if cancelled.is_some() && is_of_cancel(&error) => true,
                Err(error) => return Err(error),
            };
            Ok(cancelled.and_then(|(at, quiet)| {
                let returned = returned.checked_duration_since(at)?;
                Some(Late { returned, quiet, is_refused })
            }))
        })
    }

    /// What comes before the work and is not measured.
    fn begin(&self, part: Part) {
        // What the last cancel has left may still be at it.
        settle();
        match part {
            Part::Open => {
                self.model.close();
                self.guard.close();
            }
            Part::OpenTrain => self.model.close(),
            Part::Train if self.policy.train.graph == TrainGraph::Frugal => {
                self.model.close_inference();
                self.guard.close_inference();
            }
            Part::Screen | Part::Revise | Part::Train | Part::Compress => {}
        }
    }

    fn work(&self, part: Part, cancel: &Cancel) -> Result<()> {
        let Self { model, guard, reviser, policy, store, .. } = self;
        match part {
            Part::Open => {
                let prompts = [Prompt::from(vec![1, 2])];
                model.score_next(&self.base, None, &prompts, &[1], cancel)?;
                model.score_next(&self.adapted, None, &prompts, &[1], cancel)?;
            }
            Part::OpenTrain => {
                let options = TrainOptions { graph: policy.train.graph, ..TrainOptions::default() };
                let row = TrainingRow { ids: vec![1, 2, 1], weights: vec![1.0; 3] };
                Trainer::new(model, self.start.clone(), options)?.step(&[row], cancel)?;
            }
            Part::Screen => {
                filter::screen_chunk(guard, policy, self.chunk.clone(), cancel)?;
            }
            Part::Revise => {
                revise::rewrite(guard, reviser, policy, &self.flagged, 0, cancel)?;
            }
            Part::Train => {
                train(model, &self.start, &self.pairs, policy, store, cancel)?;
            }
            // It takes no handle: a cancel finds it at its end.
            Part::Compress => {
                let mut residual = Residual::zeros(Arc::clone(model.layout()), Trainable::Both);
                let options = CompressOptions::default();
                let (packed, _) = compress::compress(&self.trained, &mut residual, &options, 0)?;
                store.write_within(NEXT_RESIDUAL, &residual.to_bytes())?;
                store.write_within(PACKED, packed.bytes())?;
            }
        }
        Ok(())
    }
}

fn train(
    model: &Model,
    start: &Adapter,
    pairs: &[TrainingPair],
    policy: &Policy,
    store: &Store,
    cancel: &Cancel,
) -> Result<Trained> {
    let task = TrainTask {
        steps_max: TRAIN_STEPS,
        warmup_steps: 0,
        step_rows: 1,
        row_tokens_max: TRAIN_TOKENS,
        learning_rate: 1e-4,
        weight_decay: 0.0,
        clip_norm: 1.0,
        proximal_mu: 0.0,
        trainable: Trainable::Both,
        seed: 0,
        correction: None,
        first_rank: 0,
    };
    Ok(train::train(model, start, pairs, &task, &policy.train, None, &mut Watching { store }, cancel)?)
}

/// Keeps checkpoints as a round does.
struct Watching<'s> {
    store: &'s Store,
}

impl train::Watch for Watching<'_> {
    fn step(&mut self, _: u32, _: f32) {}

    fn checkpoint(&mut self, bytes: Vec<u8>) -> Result<(), StoreError> {
        self.store.write_within(CHECKPOINT, &bytes)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    /// Of the package that is bundled, whose work takes milliseconds: whether every kind can be begun and cancelled.
    #[test]
    fn every_kind_of_work_is_cancelled_and_returns() {
        let directory = tempfile::tempdir().unwrap();
        let package = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/reference/package");
        let dir = directory.path().to_str().unwrap();
        let Cli { shared, .. } =
            Cli::parse_from(["edge-client", "bench", "--dir", dir, "--package", package]);
        let place = open::Place::find(&shared).unwrap();
        let visit = Visit::open(&shared, &place).unwrap();
        for part in Part::ALL {
            let stopped = visit.stop(part, 8).unwrap();
            assert!(stopped.cancels > 0 && stopped.median_ms <= stopped.p95_ms, "{stopped:?}");
            assert!(stopped.p95_ms <= stopped.max_ms && stopped.quiet_ms > 0.0, "{stopped:?}");
            assert!(stopped.whole_ms > 0.0, "{stopped:?}");
            // Packing takes no handle.
            assert_eq!(stopped.refused > 0, !matches!(part, Part::Compress), "{stopped:?}");
        }
        // One whose moment never comes is none.
        assert_eq!(visit.cancelled(Part::Open, Duration::from_secs(3600)).unwrap(), None);
    }

    #[test]
    fn the_guard_for_packages_without_one_is_a_guard() {
        GuardConfig::from_toml(GUARD).unwrap();
    }
}
