//! `filter`, `revise` and `train` on a file: the same stages as in a round, without an aggregator.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use commonweal_adapter::{Adapter, AdapterFacts, AdapterKind, Trainable, disk};
use commonweal_runtime::Cancel;
use serde_json::json;

use super::{Shared, exit::BadInput, open, voices};
use crate::{
    events::{Event, Output},
    filter::{self, Screened},
    personal,
    policy::Policy,
    revise::{self, ReviseCounts, TrainingPair},
    sample::Sample,
    store::{self, StoreError},
    train::{self, TrainTask},
};

/// A file's conversations on their way through the stages.
struct Work {
    place: open::Place,
    output: Output,
    policy: Policy,
    stages: open::Stages,
    /// Their lines in the file.
    lines: Vec<usize>,
    samples: Vec<Sample>,
    cancel: Cancel,
}

impl Work {
    /// The file first: what is wrong with it is said before a model is loaded.
    fn open(shared: &Shared, file: &Path) -> Result<Self> {
        let (lines, samples) = open::read_samples(file)?.good.into_iter().unzip();
        let place = open::Place::find(shared)?;
        let policy = place.policy(shared)?;
        let cancel = Cancel::new();
        let stages = open::Stages::open(shared, &place, &policy, &cancel)?;
        Ok(Self { place, output: shared.output(), policy, stages, lines, samples, cancel })
    }

    fn screen(&mut self) -> Result<Vec<Screened>> {
        let samples = std::mem::take(&mut self.samples);
        let bar = open::bar("filter", samples.len());
        let screened = filter::screen(&self.stages.guard, &self.policy, samples, &self.cancel, |done| {
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        Ok(screened)
    }

    fn pairs(&mut self) -> Result<Vec<TrainingPair>> {
        let screened = self.screen()?;
        let bar = open::bar("revise", screened.len());
        let open::Stages { guard, reviser, .. } = &self.stages;
        let (pairs, counts) =
            revise::revise(guard, reviser, &self.policy, screened, 0, &self.cancel, |done| {
                bar.set_position(done as u64);
            })?;
        bar.finish_and_clear();
        let ReviseCounts { kept, revised, refused, dropped, attempts } = counts;
        tracing::info!(
            "{kept} kept, {revised} revised in {attempts} attempts, {refused} refused, {dropped} dropped"
        );
        Ok(pairs)
    }
}

/// What the guard says of each row, and what the policy makes of it.
pub(super) fn filter(shared: &Shared, file: &Path) -> Result<()> {
    let mut work = Work::open(shared, file)?;
    let screened = work.screen()?;
    for (line, one) in work.lines.iter().zip(&screened) {
        let verdict = one.verdict();
        if work.output == Output::Json {
            work.output.say(&json!({
                "line": line, "sample": one.sample().id().to_string(), "action": verdict.action,
                "probability": verdict.probability, "category": verdict.category,
            }));
        } else {
            let category = verdict.category.as_ref().map_or("–", |category| category.as_str());
            let probability = verdict.probability.map_or("–".into(), |value| format!("{value:.3}"));
            work.output
                .say(&format!("line {line:6}  {probability:5}  {category:12}  {}", verdict.action.name()));
        }
    }
    let filter::FilterCounts { kept, dropped, unjudged, refused, flagged } = filter::count(&screened);
    match work.output {
        Output::Json => {
            let counts = json!({
                "kept": kept, "dropped": dropped, "unjudged": unjudged, "refused": refused, "flagged": flagged,
            });
            work.output.say(&json!({"event": "filtered", "counts": counts}));
        }
        Output::Text => {
            work.output
                .say(&format!("{kept} kept, {flagged} to revise, {refused} to refuse, {dropped} dropped"));
            if unjudged > 0 {
                work.output.say(&format!("{unjudged} of the dropped could not be judged"));
            }
        }
    }
    Ok(())
}

/// The pairs that training would use, as chat JSONL; `add` reads them again, the replies to avoid with them.
pub(super) fn revise(shared: &Shared, file: &Path) -> Result<()> {
    let mut work = Work::open(shared, file)?;
    for pair in work.pairs()? {
        let mut row = serde_json::to_value(pair.sample())?;
        row["origin"] = json!(pair.origin());
        work.output.say(&row);
    }
    Ok(())
}

/// What `train` was asked for.
#[derive(Debug)]
pub(super) struct TrainRequest {
    pub(super) file: PathBuf,
    pub(super) goal: Goal,
    pub(super) steps: u32,
    pub(super) learning_rate: f32,
}

/// What becomes of the trained adapter.
#[derive(Debug)]
pub(super) enum Goal {
    /// A file for its owner to use elsewhere.
    File(PathBuf),
    /// The personal adapter, beside the installed release.
    Personal { anew: bool },
}

struct Watching {
    output: Output,
    bar: indicatif::ProgressBar,
}

impl train::Watch for Watching {
    fn step(&mut self, step: u32, loss: f32) {
        self.bar.set_position(u64::from(step));
        self.output.show(&Event::Step { round: 0, step, loss });
    }

    fn checkpoint(&mut self, _: Vec<u8>) -> Result<(), StoreError> {
        Ok(())
    }
}

/// An adapter for oneself; nothing is sent.
pub(super) fn train(shared: &Shared, request: &TrainRequest) -> Result<()> {
    if !(request.learning_rate > 0.0 && request.learning_rate <= 1.0) || request.steps == 0 {
        return Err(
            BadInput("--steps must be at least 1, --learning-rate above 0 and at most 1".into()).into()
        );
    }
    if let Goal::File(out) = &request.goal {
        let folder = store::directory_of(out);
        if !folder.is_dir() {
            return Err(BadInput(format!("--out: there is no folder {}", folder.display())).into());
        }
    }
    let mut work = Work::open(shared, &request.file)?;
    let (start, first_rank) = start(&work, &request.goal)?;
    let trained_on = work.samples.iter().map(Sample::id).collect();
    if let Goal::Personal { .. } = request.goal {
        let store = work.place.look()?.within(work.policy.budget.disk);
        // Before hours are spent on what cannot be kept.
        personal::require_room(&store, &start, first_rank, work.stages.base()).context("personal adapter")?;
        personal::tell_samples(&store, work.samples.iter())?;
    }
    let pairs = work.pairs()?;
    let Work { place, output, policy, stages, cancel, .. } = work;
    let task = TrainTask {
        steps_max: request.steps,
        warmup_steps: request.steps / 10,
        step_rows: 8,
        row_tokens_max: stages.model.context(),
        learning_rate: request.learning_rate,
        weight_decay: 0.0,
        clip_norm: 1.0,
        proximal_mu: 0.0,
        trainable: Trainable::Both,
        seed: 0,
        correction: None,
        first_rank,
    };
    let mut watch = Watching { output, bar: open::bar("train", request.steps as usize) };
    let trained =
        train::train(&stages.model, &start, &pairs, &task, &policy.train, None, &mut watch, &cancel)?;
    watch.bar.finish_and_clear();
    let out = match &request.goal {
        Goal::File(out) => {
            let facts = AdapterFacts { base: stages.base().0, kind: AdapterKind::Assistant };
            store::replace(out, &disk::write(trained.adapter(), &facts).context("adapter")?)?;
            out.display().to_string()
        }
        Goal::Personal { .. } => {
            let adapter = personal::take(trained.adapter(), first_rank).context("personal adapter")?;
            personal::write(&place.look()?.within(policy.budget.disk), &adapter, stages.base(), &trained_on)?;
            "personal adapter".to_owned()
        }
    };
    let summary = trained.summary();
    train::tell_too_long(summary.too_long);
    let line = json!({
        "event": "trained", "out": out, "steps": summary.steps, "tokens": summary.tokens,
        "loss_first": summary.loss_first, "loss_last": summary.loss_last,
    });
    match output {
        Output::Json => output.say(&line),
        Output::Text => output.say(&format!(
            "{out}: {} steps, loss {:.3} → {:.3}",
            summary.steps, summary.loss_first, summary.loss_last
        )),
    }
    Ok(())
}

/// What training begins with, and how many of its ranks stay as they are.
fn start(work: &Work, goal: &Goal) -> Result<(Adapter, usize)> {
    let Goal::Personal { anew } = goal else { return Ok((Adapter::init(work.stages.layout(), 0), 0)) };
    let store = work.place.look()?;
    let release = voices::release(&work.stages.model, &store)?;
    let personal = if *anew { None } else { personal::read(&store, work.stages.base())? };
    let release = release.as_ref().map(|installed| &installed.adapter);
    personal::begin(release, personal, &work.stages.layout()).context("personal adapter")
}
