//! Stage 4, **train**: fits the round's adapter to the training pairs on the frozen base.
//!
//! From `revise.rs`, whose [`TrainingPair`] is the only thing it takes; to `compress.rs`. Every step depends on the
//! pairs, the settings and the seed only, so a run continued from a checkpoint ends in the same bits.

use commonweal_adapter::{Adapter, AdapterDelta, AdapterError, Trainable, scaffold::Correction};
use commonweal_package::TrainGraph;
use commonweal_runtime::{
    AdamW, Cancel, ConversationError, MemoryError, Message, Model, Preference, ReferredPreference, Schedule,
    TrainError, TrainOptions, Trainer, TrainingRow,
    memory::{self, Shape},
};
use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::{
    policy::{Method, TrainPolicy},
    revise::TrainingPair,
};

/// What a round asks of training; see `commonweal_protocol::TrainSettings` for the meaning of each.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainTask {
    /// Optimizer steps at most.
    pub steps_max: u32,
    /// Steps over which the learning rate rises.
    pub warmup_steps: u32,
    /// Rows of a step.
    pub step_rows: usize,
    /// Tokens of a row at most.
    pub row_tokens_max: usize,
    /// Peak learning rate.
    pub learning_rate: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Norm to which a step's gradient is clipped.
    pub clip_norm: f32,
    /// FedProx's pull towards the start; 0 is none.
    pub proximal_mu: f32,
    /// Which factors change.
    pub trainable: Trainable,
    /// Order of the rows.
    pub seed: u64,
    /// SCAFFOLD's shift of each gradient.
    pub correction: Option<Correction>,
    /// Ranks below this one stay as they are: those of an adapter beside which another is trained. 0 trains all.
    pub first_rank: usize,
}

/// A trained adapter's difference from where the round started, and how training went. Only [`train`] makes one.
#[derive(Clone, Debug)]
pub struct Trained {
    delta: AdapterDelta,
    adapter: Adapter,
    summary: TrainSummary,
    correction: Option<Correction>,
}

/// How training went.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TrainSummary {
    /// Optimizer steps, those before a restart included.
    pub steps: u32,
    /// Tokens learned from; those of a preference pair are both replies'.
    pub tokens: u64,
    /// Mean loss of the first tenth of the steps, at least one.
    pub loss_first: f32,
    /// Mean loss of the last tenth.
    pub loss_last: f32,
    /// Pairs left out because no token of the reply fits.
    pub too_long: u32,
    /// Step that a checkpoint let it continue from; 0 from the start.
    pub resumed_step: u32,
}

/// What happens between steps: progress, and bytes to keep so that a crash costs little.
pub trait Watch {
    /// A step is done.
    fn step(&mut self, step: u32, loss: f32);
    /// Keep these bytes; [`train`] resumes from them. An error stops training before more is lost.
    fn checkpoint(&mut self, bytes: Vec<u8>) -> Result<(), crate::store::StoreError>;
}

/// Why nothing was trained.
#[derive(Debug, thiserror::Error)]
pub enum TrainingError {
    /// Nothing to learn from.
    #[error("no training pairs: {too_long} were too long for {row_tokens_max} tokens")]
    NoPairs {
        /// Left out.
        too_long: u32,
        /// The bound.
        row_tokens_max: usize,
    },
    /// A conversation could not be encoded.
    #[error("training pair cannot be encoded")]
    Conversation(#[from] ConversationError),
    /// A step does not fit in memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A step failed.
    #[error("training failed")]
    Train(#[from] TrainError),
    /// The result is not finite.
    #[error("trained adapter cannot be used")]
    Adapter(#[from] AdapterError),
    /// A checkpoint could not be encoded, for want of memory.
    #[error("checkpoint cannot be encoded")]
    Checkpoint(#[from] postcard::Error),
    /// A checkpoint could not be kept.
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
}

impl TrainingError {
    /// Whether the settings made training diverge: the same steps would diverge again.
    pub fn is_divergence(&self) -> bool {
        matches!(
            self,
            Self::Train(TrainError::NotFinite { .. }) | Self::Adapter(AdapterError::NotFinite { .. })
        )
    }
}

impl Trained {
    /// Trained minus start.
    pub fn delta(&self) -> &AdapterDelta {
        &self.delta
    }

    /// The adapter itself, for a person who trains without a federation.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// SCAFFOLD's correction with the mean of all gradients, if the round had one.
    pub fn correction(&self) -> Option<&Correction> {
        self.correction.as_ref()
    }

    /// How training went.
    pub fn summary(&self) -> &TrainSummary {
        &self.summary
    }
}

/// Trains from `start`, or from where `checkpoint` stopped.
#[expect(
    clippy::too_many_arguments,
    reason = "each is another thing: what, how, from where, and who watches"
)]
pub fn train(
    model: &Model,
    start: &Adapter,
    pairs: &[TrainingPair],
    task: &TrainTask,
    policy: &TrainPolicy,
    checkpoint: Option<&[u8]>,
    watch: &mut impl Watch,
    cancel: &Cancel,
) -> Result<Trained, TrainingError> {
    let options = options(task, policy);
    let steps = options.steps_max as u32;
    // A checkpoint of other settings is of another round: begin anew.
    let restored = checkpoint.and_then(|bytes| Progress::restore(model, bytes)).filter(|(trainer, _)| {
        let shifts = [trainer.correction(), task.correction.as_ref()];
        let [saved, wanted] = shifts.map(|correction| correction.map(Correction::shift));
        *trainer.options() == options && trainer.start() == start && saved == wanted
    });
    let (mut trainer, mut progress) = if let Some(restored) = restored {
        restored
    } else {
        let trainer = Trainer::new(model, start.clone(), options)?;
        let trainer = match &task.correction {
            Some(correction) => trainer.corrected(correction.clone())?,
            None => trainer,
        };
        (trainer, Progress::default())
    };
    if task.first_rank > 0 {
        trainer = trainer.from_rank(task.first_rank)?;
    }
    let resumed_step = trainer.steps_done() as u32;
    let lessons = Lessons::new(model, &trainer, pairs, task, policy, cancel)?;
    for step in resumed_step..steps {
        let stepped = match lessons.draw(step, task) {
            Batch::Rows(rows) => {
                trainer.step(&rows, cancel).map(|report| (report.loss as f32, report.tokens))
            }
            Batch::Preferences(pairs, tokens) => trainer
                .step_preferences(&pairs, f64::from(policy.beta), cancel)
                .map(|report| (report.loss as f32, tokens)),
        };
        let (loss, tokens) = match stepped {
            Err(TrainError::Cancelled) if step > resumed_step => {
                // Whoever stopped it shall lose this step alone.
                watch.checkpoint(progress.checkpoint(&trainer)?)?;
                return Err(TrainError::Cancelled.into());
            }
            stepped => stepped?,
        };
        progress.losses.push(loss);
        progress.tokens += tokens as u64;
        watch.step(step + 1, loss);
        if (step + 1) % policy.checkpoint_steps == 0 || step + 1 == steps {
            watch.checkpoint(progress.checkpoint(&trainer)?)?;
        }
    }
    let (loss_first, loss_last) = ends(&progress.losses);
    let (steps, tokens, too_long) = (trainer.steps_done() as u32, progress.tokens, lessons.too_long);
    let summary = TrainSummary { steps, tokens, loss_first, loss_last, too_long, resumed_step };
    let correction = trainer.correction().cloned();
    let adapter = trainer.finish();
    let delta = AdapterDelta::between(start, &adapter, task.trainable)?;
    Ok(Trained { delta, adapter, summary, correction })
}

/// What the report tells of the steps so far; a restart must not forget it.
#[derive(Default, Serialize, Deserialize)]
struct Progress {
    losses: Vec<f32>,
    tokens: u64,
}

impl Progress {
    /// The progress, then the trainer's own bytes.
    fn checkpoint(&self, trainer: &Trainer) -> Result<Vec<u8>, TrainingError> {
        let mut bytes = postcard::to_stdvec(self)?;
        bytes.extend(trainer.checkpoint()?);
        Ok(bytes)
    }

    /// `None` for anything but a checkpoint of this base that tells of each of its steps.
    fn restore(model: &Model, bytes: &[u8]) -> Option<(Trainer, Self)> {
        let (progress, rest) = postcard::take_from_bytes::<Self>(bytes).ok()?;
        let trainer = Trainer::restore(model, rest).ok()?;
        (trainer.steps_done() == progress.losses.len() as u64).then_some((trainer, progress))
    }
}

fn options(task: &TrainTask, policy: &TrainPolicy) -> TrainOptions {
    let steps_max = u64::from(task.steps_max.min(policy.steps_max));
    TrainOptions {
        learning_rate: f64::from(task.learning_rate),
        optimizer: AdamW { weight_decay: f64::from(task.weight_decay), ..AdamW::default() },
        schedule: Schedule::default(),
        warmup_steps: u64::from(task.warmup_steps).min(steps_max),
        steps_max,
        accumulation: task.step_rows.div_ceil(policy.batch_rows).max(1),
        clip_norm: Some(f64::from(task.clip_norm)),
        proximal_mu: f64::from(task.proximal_mu),
        trainable: task.trainable,
        graph: policy.graph,
    }
}

/// Refuses to begin a step that runs so many tokens at once and has no room for them.
fn check_memory(model: &Model, graph: TrainGraph, tokens: usize) -> Result<(), MemoryError> {
    // A package that was opened has its weights; if they went away since, the gradient graph says so.
    let weights_bytes = std::fs::metadata(model.package().weights()).map_or(0, |file| file.len());
    let manifest = model.manifest();
    let shape = Shape { model: &manifest.model, cache: manifest.cache, weights_bytes };
    let step = shape.train_bytes(tokens, graph, model.layout().parameters());
    // A package at rest, whose rows were all judged before, is opened for the step.
    let (needed, available) = if model.is_at_rest() {
        (shape.settled_bytes() + step, memory::available_for_process())
    } else {
        (step, memory::available())
    };
    let lower = "graph = \"frugal\", a smaller batch_rows or sample_tokens_max in the policy's [train], or --context N, needs less";
    memory::check("a training step", needed, available, lower)
}

/// Says on the log how many pairs taught nothing.
pub(crate) fn tell_too_long(too_long: u32) {
    if too_long > 0 {
        tracing::warn!("{too_long} training pairs were left out: no token of the reply fits");
    }
}

/// Means of the first and the last tenth.
fn ends(losses: &[f32]) -> (f32, f32) {
    let count = (losses.len() / 10).max(1).min(losses.len());
    let mean =
        |part: &[f32]| if part.is_empty() { 0.0 } else { part.iter().sum::<f32>() / part.len() as f32 };
    (mean(&losses[..count]), mean(&losses[losses.len() - count..]))
}

/// All that can be learned from, encoded once.
struct Lessons {
    rows: Vec<TrainingRow>,
    /// With the tokens of both replies.
    preferences: Vec<(ReferredPreference, usize)>,
    too_long: u32,
}

enum Batch {
    Rows(Vec<TrainingRow>),
    Preferences(Vec<ReferredPreference>, usize),
}

impl Lessons {
    fn new(
        model: &Model,
        trainer: &Trainer,
        pairs: &[TrainingPair],
        task: &TrainTask,
        policy: &TrainPolicy,
        cancel: &Cancel,
    ) -> Result<Self, TrainingError> {
        let row_tokens_max =
            task.row_tokens_max.min(policy.sample_tokens_max.unwrap_or(usize::MAX)).min(model.context());
        let (mut rows, mut preferences, mut too_long) = (Vec::new(), Vec::new(), 0);
        for pair in pairs {
            // Thousands of them take their time.
            if cancel.is_cancelled() {
                return Err(TrainError::Cancelled.into());
            }
            let chosen = encode(model, pair.messages(), row_tokens_max)?;
            let rejected = match (policy.method, pair.rejected()) {
                (Method::Dpo, Some(messages)) => encode(model, messages, row_tokens_max)?,
                _ => None,
            };
            match (chosen, rejected) {
                (Some(chosen), Some(rejected)) => preferences.push(Preference { chosen, rejected }),
                (Some(row), None) => rows.push(row),
                (None, _) => too_long += 1,
            }
        }
        if rows.is_empty() && preferences.is_empty() {
            return Err(TrainingError::NoPairs { too_long, row_tokens_max });
        }
        let longest = rows.iter().chain(preferences.iter().flat_map(|pair| [&pair.chosen, &pair.rejected]));
        let longest = longest.map(|row| row.ids.len()).max().unwrap_or(0);
        // A run has the rows of a batch, or the two replies of one preference.
        let run_rows = policy.batch_rows.min(task.step_rows).max(if preferences.is_empty() { 1 } else { 2 });
        check_memory(model, policy.graph, run_rows * longest)?;
        let tokens = |pair: &Preference| pair.chosen.targets() + pair.rejected.targets();
        let tokens: Vec<usize> = preferences.iter().map(tokens).collect();
        let preferences = trainer.refer(preferences, cancel)?.into_iter().zip(tokens).collect();
        Ok(Self { rows, preferences, too_long })
    }

    /// The rows of one step: a permutation of everything an epoch, in an order that step and seed alone decide.
    fn draw(&self, step: u32, task: &TrainTask) -> Batch {
        let mut random = ChaCha8Rng::seed_from_u64(task.seed);
        random.set_stream(u64::from(step) + 1);
        let all = self.rows.len() + self.preferences.len();
        let choose_preferences = random.random_range(0..all) < self.preferences.len();
        let of = |count: usize| {
            permuted(count, u64::from(step) * task.step_rows as u64, task.step_rows, task.seed)
        };
        if choose_preferences {
            let (pairs, tokens): (Vec<_>, Vec<_>) =
                of(self.preferences.len()).map(|at| self.preferences[at].clone()).unzip();
            Batch::Preferences(pairs, tokens.iter().sum())
        } else {
            Batch::Rows(of(self.rows.len()).map(|at| self.rows[at].clone()).collect())
        }
    }
}

/// Places `start .. start + count` of an endless row of permutations of `0..length`.
fn permuted(length: usize, start: u64, count: usize, seed: u64) -> impl Iterator<Item = usize> {
    let mut epoch = None;
    let mut order: Vec<usize> = Vec::new();
    (start..start + count as u64).map(move |place| {
        let this = place / length as u64;
        if epoch != Some(this) {
            epoch = Some(this);
            order = (0..length).collect();
            let mut random = ChaCha8Rng::seed_from_u64(seed ^ 0x5eed);
            random.set_stream(this);
            order.shuffle(&mut random);
        }
        order[(place % length as u64) as usize]
    })
}

/// The row of a conversation that fits: the oldest exchanges are left out first, then the reply's end. `None` when
/// no token of a reply is left.
fn encode(
    model: &Model,
    mut messages: Vec<Message>,
    tokens_max: usize,
) -> Result<Option<TrainingRow>, ConversationError> {
    use commonweal_runtime::Role;
    let mut row = model.chat().training_row(&messages)?;
    while row.ids.len() > tokens_max {
        let first = usize::from(messages.first().is_some_and(|message| message.role == Role::System));
        let next_user = messages.iter().skip(first + 1).position(|message| message.role == Role::User);
        let Some(user) = next_user.map(|at| first + 1 + at) else {
            row = row.truncated(tokens_max);
            break;
        };
        messages.drain(first..user);
        row = model.chat().training_row(&messages)?;
    }
    Ok((row.targets() > 0).then_some(row))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_comes_once_an_epoch_and_the_order_is_the_seeds() {
        let mut seen: Vec<usize> = permuted(7, 0, 7, 1).collect();
        assert_eq!(permuted(7, 3, 4, 1).collect::<Vec<_>>(), seen[3..]);
        assert_ne!(permuted(7, 0, 7, 2).collect::<Vec<_>>(), seen);
        seen.sort_unstable();
        assert_eq!(seen, (0..7).collect::<Vec<_>>());
        // A batch may span epochs.
        assert_eq!(permuted(2, 1, 4, 1).count(), 4);
    }

    #[test]
    fn the_ends_are_means_of_a_tenth() {
        let losses: Vec<f32> = (0..20).map(|i| i as f32).collect();
        assert_eq!(ends(&losses), (0.5, 18.5));
        assert_eq!(ends(&[3.0]), (3.0, 3.0));
        assert_eq!(ends(&[]), (0.0, 0.0));
    }
}
