//! Trains an adapter: gradients (`gradient.rs`), SCAFFOLD's correction, proximal term, clipping, AdamW (`optimizer.rs`) at the scheduled rate
//! (`schedule.rs`). `preference.rs` adds learning from preferences, `train_state.rs` interrupts and resumes.
//! The base never changes.

use std::ops::Range;

use commonweal_adapter::{Adapter, LayoutError, TensorSpec, Trainable, scaffold::Correction, stack};
use commonweal_package::TrainGraph;
use serde::{Deserialize, Serialize};

use crate::{
    adapt::{self, AdaptError},
    cancel::{Cancel, Run, RunError},
    conversation::TrainingRow,
    gradient::gradient,
    model::{Model, OpenError},
    optimizer::{AdamW, Moments, clip, norm},
    schedule::Schedule,
};

/// How an adapter is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainOptions {
    /// Highest learning rate.
    pub learning_rate: f64,
    /// The optimizer's constants.
    pub optimizer: AdamW,
    /// How the learning rate goes on after the warm-up.
    pub schedule: Schedule,
    /// Steps over which the learning rate rises.
    pub warmup_steps: u64,
    /// Steps in all; a further one is refused.
    pub steps_max: u64,
    /// Runs of the graph that a step's rows are split into. More of them need less memory; the step is the same.
    pub accumulation: usize,
    /// Longest gradient; longer ones are scaled down. `None` never clips.
    pub clip_norm: Option<f64>,
    /// `μ` of FedProx (Li et al. 2020): adds `μ/2 · ‖θ − θ₀‖²` to the loss, θ₀ being the adapter training began
    /// with. 0 is off.
    pub proximal_mu: f64,
    /// Which factors change.
    pub trainable: Trainable,
    /// The gradient graph: all layers quickly, all layers in little memory, or the upper half alone.
    #[serde(default)]
    pub graph: TrainGraph,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            learning_rate: 2e-4,
            optimizer: AdamW::default(),
            schedule: Schedule::default(),
            warmup_steps: 0,
            steps_max: 100,
            accumulation: 1,
            clip_norm: Some(1.0),
            proximal_mu: 0.0,
            trainable: Trainable::Both,
            graph: TrainGraph::Full,
        }
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Steps made so far, this one included.
    pub step: u64,
    /// Loss before the step, in nats: `−Σ weight·logprob / Σ |weight|`. The proximal term is not in it.
    pub loss: f64,
    /// Norm of the trainable gradient, correction and proximal term included, before clipping.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Tokens that were predicted with a weight.
    pub tokens: usize,
}

/// Why a step was not made. The trainer is as it was before the call.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The call's `Cancel` handle was used.
    #[error("training was cancelled")]
    Cancelled,
    /// An option cannot be obeyed.
    #[error("training option {name} must be {expected}, got {got}")]
    Option {
        /// The option.
        name: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        got: f64,
    },
    /// The adapter does not fit the model.
    #[error(transparent)]
    Adapter(#[from] AdaptError),
    /// The package's gradient graph is for other linears.
    #[error("gradient graph trains the targets {expected}, the adapter has {got}")]
    Targets {
        /// The graph's.
        expected: String,
        /// The adapter's.
        got: String,
    },
    /// A row cannot be learned from.
    #[error("training row {row} must have {expected}, got {got}")]
    Row {
        /// Index of the row.
        row: usize,
        /// What it needs.
        expected: String,
        /// What it has.
        got: String,
    },
    /// No token has a weight.
    #[error("rows must hold at least one token with a weight, got {rows} rows without any")]
    NothingToLearn {
        /// Number of rows.
        rows: usize,
    },
    /// All steps are made.
    #[error("training has {steps_max} steps and all are made")]
    Finished {
        /// Steps in all.
        steps_max: u64,
    },
    /// The loss or the gradient overflowed.
    #[error("{what} of step {step} must be finite, got a value that is not")]
    NotFinite {
        /// Which of them.
        what: &'static str,
        /// The step.
        step: u64,
    },
    /// The gradient graph does not open.
    #[error(transparent)]
    Open(OpenError),
    /// The graph lacks an output or gives it another size.
    #[error("gradient graph must have output {name} of the adapter's size")]
    Output {
        /// The output.
        name: String,
    },
    /// A saved state cannot be resumed.
    #[error("training state must hold {expected}, got {got}")]
    State {
        /// What belongs there.
        expected: String,
        /// What is there.
        got: String,
    },
    /// A saved state is of an impossible adapter.
    #[error("training state has an impossible layout")]
    Layout(#[from] LayoutError),
    /// The runtime library failed.
    #[error("gradient graph does not run")]
    Engine(#[from] ort::Error),
}

impl From<OpenError> for TrainError {
    /// A cancelled step is the same whatever it waited for.
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Cancelled => Self::Cancelled,
            error => Self::Open(error),
        }
    }
}

impl From<RunError> for TrainError {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Cancelled => Self::Cancelled,
            RunError::Engine(source) => Self::Engine(source),
        }
    }
}

/// An adapter in training.
#[derive(Debug)]
pub struct Trainer {
    pub(crate) model: Model,
    pub(crate) options: TrainOptions,
    /// θ₀: the anchor of the proximal term and the reference of preferences.
    pub(crate) start: Adapter,
    pub(crate) adapter: Adapter,
    pub(crate) moments: Moments,
    pub(crate) correction: Option<Correction>,
    trainable: Vec<Range<usize>>,
}

impl Trainer {
    /// Begins at an adapter. Nothing is run yet; the gradient graph is opened by the first step.
    pub fn new(model: &Model, adapter: Adapter, options: TrainOptions) -> Result<Self, TrainError> {
        let moments = Moments::new(adapter.values().len());
        Self::resume(model, adapter.clone(), adapter, moments, options)
    }

    pub(crate) fn resume(
        model: &Model,
        start: Adapter,
        adapter: Adapter,
        moments: Moments,
        options: TrainOptions,
    ) -> Result<Self, TrainError> {
        options.check()?;
        adapt::check(&model.manifest().model, adapter.layout())?;
        if let Some((index, &got)) = adapter.values().iter().enumerate().find(|(_, value)| !value.is_finite())
        {
            return Err(AdaptError::NotFinite { index, got }.into());
        }
        let targets = |adapter: &commonweal_adapter::AdapterLayout| {
            adapter.modules().iter().map(|module| module.target.name()).collect::<Vec<_>>().join(", ")
        };
        let (expected, got) = (targets(model.layout()), targets(adapter.layout()));
        if expected != got {
            return Err(TrainError::Targets { expected, got });
        }
        let (specs, layers) = (adapter.layout().tensors().into_iter(), adapter.layout().layers());
        let trainable = specs.filter(|spec| options.trains(spec, layers)).map(|spec| spec.range).collect();
        let correction = None;
        Ok(Self { model: model.clone(), options, start, adapter, moments, correction, trainable })
    }

    /// The same with SCAFFOLD's correction: each gradient is shifted by it, before the proximal term and clipping.
    pub fn corrected(mut self, correction: Correction) -> Result<Self, TrainError> {
        self.adapter.layout().require(correction.shift().layout())?;
        self.correction = Some(correction);
        Ok(self)
    }

    /// The same with the ranks below the first one as they are: an adapter beside another, which training sees and does
    /// not change. A checkpoint does not keep this.
    pub fn from_rank(mut self, first: usize) -> Result<Self, TrainError> {
        let layout = self.adapter.layout();
        if first >= layout.rank() {
            let (name, expected) = ("first rank", "below the adapter's rank");
            return Err(TrainError::Option { name, expected, got: first as f64 });
        }
        let is_trained = |place: &Range<usize>| {
            self.trainable.iter().any(|whole| whole.start <= place.start && place.end <= whole.end)
        };
        let places = stack::places(layout, &(first..layout.rank()));
        self.trainable = places.into_iter().filter(is_trained).collect();
        Ok(self)
    }

    /// SCAFFOLD's correction with the mean of the gradients so far, if there is one.
    pub fn correction(&self) -> Option<&Correction> {
        self.correction.as_ref()
    }

    /// One update from some rows: the mean loss over their tokens, each weighted by its weight.
    pub fn step(&mut self, rows: &[TrainingRow], cancel: &Cancel) -> Result<StepReport, TrainError> {
        self.begin()?;
        for (index, row) in rows.iter().enumerate() {
            self.check_row(index, row)?;
        }
        let weight: f64 =
            rows.iter().flat_map(|row| row.weights.iter().skip(1)).map(|w| f64::from(w.abs())).sum();
        if weight == 0.0 {
            return Err(TrainError::NothingToLearn { rows: rows.len() });
        }
        let run = Run::new(cancel)?;
        let (mut loss, mut total) = (0.0, Vec::new());
        for rows in self.passes(rows) {
            let part =
                gradient(&self.model, &self.adapter, &rows, &vec![1.0; rows.len()], &self.options, &run)?;
            loss += part.loss / weight;
            add(&mut total, part.values, 1.0 / weight);
        }
        let (grad_norm, learning_rate) = self.update(loss, total)?;
        let tokens = rows.iter().map(TrainingRow::targets).sum();
        Ok(StepReport { step: self.moments.updates, loss, grad_norm, learning_rate, tokens })
    }

    /// The adapter as it is now.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// The adapter that training began with.
    pub fn start(&self) -> &Adapter {
        &self.start
    }

    /// Steps made.
    pub fn steps_done(&self) -> u64 {
        self.moments.updates
    }

    /// The options.
    pub fn options(&self) -> &TrainOptions {
        &self.options
    }

    /// Ends training.
    pub fn finish(self) -> Adapter {
        self.adapter
    }

    pub(crate) fn begin(&self) -> Result<(), TrainError> {
        match self.options.steps_max {
            steps_max if self.moments.updates >= steps_max => Err(TrainError::Finished { steps_max }),
            _ => Ok(()),
        }
    }

    pub(crate) fn check_row(&self, row: usize, data: &TrainingRow) -> Result<(), TrainError> {
        let refuse = |expected: String, got: String| Err(TrainError::Row { row, expected, got });
        let (tokens, context) = (data.ids.len(), self.model.context());
        let vocab_size = self.model.manifest().model.vocab_size;
        // The last token is predicted but never read, so a row may be one longer than the context.
        if !(2..=context + 1).contains(&tokens) {
            return refuse(format!("2 to {} tokens", context + 1), tokens.to_string());
        }
        if data.weights.len() != tokens {
            return refuse(
                format!("a weight for each of its {tokens} tokens"),
                data.weights.len().to_string(),
            );
        }
        if let Some(weight) = data.weights.iter().find(|weight| !weight.is_finite()) {
            return refuse("finite weights".into(), weight.to_string());
        }
        match data.ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(id) => refuse(format!("tokens below {vocab_size}"), id.to_string()),
            None => Ok(()),
        }
    }

    /// The rows of each run: of similar length, so that little is padding; about equally many rows each. Rows that
    /// teach nothing are left out.
    fn passes<'r>(&self, rows: &'r [TrainingRow]) -> Vec<Vec<&'r TrainingRow>> {
        let mut rows: Vec<&TrainingRow> = rows.iter().filter(|row| row.targets() > 0).collect();
        rows.sort_by_key(|row| row.ids.len());
        let size = rows.len().div_ceil(self.options.accumulation).max(1);
        rows.chunks(size).map(<[_]>::to_vec).collect()
    }

    /// Moves the adapter along a gradient; the gradient's norm and the learning rate. Nothing changes on an error.
    pub(crate) fn update(&mut self, loss: f64, mut gradient: Vec<f32>) -> Result<(f64, f64), TrainError> {
        let TrainOptions { proximal_mu, clip_norm, learning_rate, schedule, warmup_steps, steps_max, .. } =
            self.options;
        let step = self.moments.updates;
        if !loss.is_finite() {
            return Err(TrainError::NotFinite { what: "loss", step });
        }
        let plain = self.correction.as_ref().map(|correction| {
            let plain = gradient.clone();
            gradient.iter_mut().zip(correction.shift().values()).for_each(|(g, shift)| *g += shift);
            plain
        });
        if proximal_mu > 0.0 {
            let moved = self.adapter.values().iter().zip(self.start.values()).map(|(now, start)| now - start);
            gradient.iter_mut().zip(moved).for_each(|(g, moved)| *g += proximal_mu as f32 * moved);
        }
        let grad_norm = norm(&gradient, &self.trainable);
        if !grad_norm.is_finite() {
            return Err(TrainError::NotFinite { what: "gradient", step });
        }
        if let (Some(correction), Some(plain)) = (&mut self.correction, plain) {
            correction.observe(&plain, &self.trainable);
        }
        if let Some(max) = clip_norm {
            clip(&mut gradient, grad_norm, max);
        }
        let learning_rate = learning_rate * schedule.factor(step, warmup_steps, steps_max);
        let values = self.adapter.values_mut();
        self.moments.update(&self.options.optimizer, learning_rate, &self.trainable, &gradient, values);
        Ok((grad_norm, learning_rate))
    }
}

/// `total += factor · part`, in the place of `part` where there is no total yet.
pub(crate) fn add(total: &mut Vec<f32>, mut part: Vec<f32>, factor: f64) {
    if total.is_empty() {
        for value in &mut part {
            *value *= factor as f32;
        }
        *total = part;
    } else {
        total.iter_mut().zip(part).for_each(|(total, part)| *total += factor as f32 * part);
    }
}

impl TrainOptions {
    /// Whether a tensor of an adapter of so many layers changes.
    pub(crate) fn trains(&self, tensor: &TensorSpec, layers: usize) -> bool {
        let first = if self.graph == TrainGraph::Upper { layers / 2 } else { 0 };
        tensor.layer >= first && self.trainable.includes(tensor.part)
    }

    fn check(&self) -> Result<(), TrainError> {
        let AdamW { betas, eps, weight_decay } = self.optimizer;
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let not_negative = |value: f64| value.is_finite() && value >= 0.0;
        for (name, expected, got, good) in [
            ("learning_rate", "above 0", self.learning_rate, positive(self.learning_rate)),
            ("first beta", "from 0 to below 1", betas.0, (0.0..1.0).contains(&betas.0)),
            ("second beta", "from 0 to below 1", betas.1, (0.0..1.0).contains(&betas.1)),
            ("eps", "above 0", eps, positive(eps)),
            ("weight_decay", "at least 0", weight_decay, not_negative(weight_decay)),
            ("accumulation", "at least 1", self.accumulation as f64, self.accumulation > 0),
            ("clip_norm", "above 0", self.clip_norm.unwrap_or(1.0), self.clip_norm.is_none_or(positive)),
            ("proximal_mu", "at least 0", self.proximal_mu, not_negative(self.proximal_mu)),
        ] {
            if !good {
                return Err(TrainError::Option { name, expected, got });
            }
        }
        Ok(())
    }
}
