//! `filter`, `revise` and `train` on a file: the same stages as in a round, without an aggregator.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use commonweal_adapter::{Adapter, AdapterFacts, AdapterKind, Trainable, disk};
use commonweal_runtime::Cancel;
use serde_json::json;

use super::{Shared, exit::BadInput, open};
use crate::{
    events::{Event, Output},
    filter::{self, Screened},
    revise::{self, TrainingPair},
    store::{self, StoreError},
    train::{self, TrainTask},
};

fn screened(shared: &Shared, stages: &open::Stages, file: &Path, cancel: &Cancel) -> Result<Vec<Screened>> {
    let policy = open::Place::find(shared)?.policy(shared)?;
    let samples = open::read_samples(file)?.samples;
    let bar = open::bar("filter", samples.len());
    let screened =
        filter::screen(&stages.guard, &policy, samples, cancel, |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    Ok(screened)
}

fn pairs(shared: &Shared, stages: &open::Stages, file: &Path, cancel: &Cancel) -> Result<Vec<TrainingPair>> {
    let policy = open::Place::find(shared)?.policy(shared)?;
    let screened = screened(shared, stages, file, cancel)?;
    let bar = open::bar("revise", screened.len());
    let (pairs, counts) =
        revise::revise(&stages.guard, &stages.reviser, &policy, screened, 0, cancel, |done| {
            bar.set_position(done as u64);
        })?;
    bar.finish_and_clear();
    tracing::info!(?counts, "revised");
    Ok(pairs)
}

/// What the guard says of each row, and what the policy makes of it.
pub(super) fn filter(shared: &Shared, file: &Path) -> Result<()> {
    let place = open::Place::find(shared)?;
    let cancel = Cancel::new();
    let stages = open::Stages::open(shared, &place, &cancel)?;
    let screened = screened(shared, &stages, file, &cancel)?;
    let mut out = std::io::stdout().lock();
    for (row, one) in screened.iter().enumerate() {
        let verdict = one.verdict();
        if shared.output() == Output::Json {
            let line = json!({
                "row": row, "sample": one.sample().id().to_string(), "action": verdict.action,
                "probability": verdict.probability, "category": verdict.category,
            });
            writeln!(out, "{line}")?;
        } else {
            let category = verdict.category.as_ref().map_or("–", |category| category.as_str());
            let probability = verdict.probability.unwrap_or_default();
            writeln!(out, "{row:6}  {probability:5.3}  {:12} {:?}", category, verdict.action)?;
        }
    }
    let filter::FilterCounts { kept, dropped, refused, flagged } = filter::count(&screened);
    let summary = json!({"kept": kept, "dropped": dropped, "refused": refused, "flagged": flagged});
    match shared.output() {
        Output::Json => writeln!(out, "{}", json!({"event": "filtered", "counts": summary}))?,
        Output::Text => {
            writeln!(out, "{kept} kept, {flagged} to revise, {refused} to refuse, {dropped} dropped")?
        }
    }
    Ok(())
}

/// The pairs that training would use, as chat JSONL.
pub(super) fn revise(shared: &Shared, file: &Path) -> Result<()> {
    let place = open::Place::find(shared)?;
    let cancel = Cancel::new();
    let stages = open::Stages::open(shared, &place, &cancel)?;
    let mut out = std::io::stdout().lock();
    for pair in pairs(shared, &stages, file, &cancel)? {
        writeln!(out, "{}", json!({"messages": pair.messages(), "origin": pair.origin()}))?;
    }
    Ok(())
}

/// What `train` was asked for.
#[derive(Debug)]
pub(super) struct TrainRequest {
    pub(super) file: PathBuf,
    pub(super) out: PathBuf,
    pub(super) steps: u32,
    pub(super) learning_rate: f32,
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
    let place = open::Place::find(shared)?;
    let cancel = Cancel::new();
    let stages = open::Stages::open(shared, &place, &cancel)?;
    let policy = place.policy(shared)?;
    let pairs = pairs(shared, &stages, &request.file, &cancel)?;
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
    };
    let start = Adapter::init(stages.layout(), 0);
    let mut watch = Watching { output: shared.output(), bar: open::bar("train", request.steps as usize) };
    let trained =
        train::train(&stages.model, &start, &pairs, &task, &policy.train, None, &mut watch, &cancel)?;
    watch.bar.finish_and_clear();
    let facts = AdapterFacts { base: stages.base().0, kind: AdapterKind::Assistant };
    let bytes = disk::write(trained.adapter(), &facts).context("adapter")?;
    store::replace(&request.out, &bytes, false)?;
    let summary = trained.summary();
    let line = json!({
        "event": "trained", "out": request.out, "steps": summary.steps, "tokens": summary.tokens,
        "loss_first": summary.loss_first, "loss_last": summary.loss_last,
    });
    match shared.output() {
        Output::Json => println!("{line}"),
        Output::Text => println!(
            "{}: {} steps, loss {:.3} → {:.3}",
            request.out.display(),
            summary.steps,
            summary.loss_first,
            summary.loss_last
        ),
    }
    Ok(())
}
