//! The training loop of both adapters: rows in tokens → steps → an adapter, with checkpoints and a log.
//!
//! `learn_guard.rs` and `learn_reviser.rs` bring the rows. State is saved every so many steps under a name made of all
//! inputs, so that a killed run resumes and a changed one begins anew.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use commonweal_adapter::{Adapter, AdapterLayout};
use commonweal_runtime::{AdamW, Cancel, Model, Schedule, StepReport, TrainOptions, Trainer, TrainingRow};
use serde_json::json;

use crate::{batches::Plan, show::Progress};

/// How to learn.
#[derive(Args, Clone, Debug)]
pub(crate) struct Recipe {
    /// Rank of the adapter
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// Alpha of the adapter; its scale is alpha / rank
    #[arg(long, default_value_t = 32.0)]
    alpha: f32,
    /// Highest learning rate
    #[arg(long, default_value_t = 2e-3)]
    learning_rate: f64,
    /// Passes over the rows
    #[arg(long, default_value_t = 2.0)]
    epochs: f64,
    /// Rows of a step
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Longest row in tokens; longer ones are left out and counted
    #[arg(long, default_value_t = 384)]
    tokens_max: usize,
    /// Seed of the adapter's start and of the rows' order
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Steps between saved states
    #[arg(long, default_value_t = 50)]
    save_every: u64,
}

impl Recipe {
    fn describe(&self) -> String {
        format!("{self:?}")
    }
}

/// A training run: where it is, and the rows it still has to learn from.
struct Run<'r> {
    trainer: Trainer,
    plan: Plan,
    rows: Vec<&'r TrainingRow>,
    state: StateFile,
    /// The batches of the epoch that the next step lies in.
    epoch: Option<(u64, Vec<Vec<usize>>)>,
    resumed: bool,
}

impl<'r> Run<'r> {
    /// Begins, or goes on where a run of the same inputs was.
    fn open(model: &Model, rows: &'r [TrainingRow], recipe: &Recipe, state: &Path) -> Result<Self> {
        ensure!(recipe.batch > 0 && recipe.save_every > 0, "batch and save-every must be at least 1, got 0");
        let epochs = recipe.epochs;
        ensure!(epochs.is_finite() && epochs > 0.0, "epochs must be above 0, got {epochs}");
        let state = StateFile::new(state, model, rows, recipe)?;
        let rows: Vec<&TrainingRow> = rows.iter().filter(|row| row.ids.len() <= recipe.tokens_max).collect();
        ensure!(!rows.is_empty(), "no row has at most {} tokens", recipe.tokens_max);
        let plan = Plan { rows: rows.len(), batch: recipe.batch, seed: recipe.seed };
        let steps_max = ((plan.steps_per_epoch() as f64 * epochs).round() as u64).max(1);
        let saved = state.load()?;
        let resumed = saved.is_some();
        let trainer = match saved {
            Some(bytes) => Trainer::restore(model, &bytes).context("saved state does not restore")?,
            None => begin(model, recipe, steps_max)?,
        };
        Ok(Self { trainer, plan, rows, state, epoch: None, resumed })
    }

    fn is_done(&self) -> bool {
        self.trainer.steps_done() >= self.trainer.options().steps_max
    }

    /// The next step; its report and the tokens that were read.
    fn step(&mut self) -> Result<(StepReport, usize)> {
        let done = self.trainer.steps_done();
        let (epoch, place) = (done / self.plan.steps_per_epoch(), done % self.plan.steps_per_epoch());
        if self.epoch.as_ref().is_none_or(|(current, _)| *current != epoch) {
            self.epoch = Some((epoch, self.plan.epoch(epoch, |row| self.rows[row].ids.len())));
        }
        let batch = self.epoch.as_ref().and_then(|(_, batches)| batches.get(place as usize));
        let batch = batch.context("step lies outside the plan")?;
        let rows: Vec<TrainingRow> = batch.iter().map(|&row| self.rows[row].clone()).collect();
        let report = self.trainer.step(&rows, &Cancel::new()).with_context(|| format!("step {done}"))?;
        Ok((report, rows.iter().map(|row| row.ids.len()).sum()))
    }

    fn save(&self) -> Result<()> {
        self.state.save(&self.trainer.checkpoint()?)
    }

    fn finish(self) -> Adapter {
        self.state.remove();
        self.trainer.finish()
    }
}

/// Trains an adapter on rows and gives it back; `log` gets one JSON line every ten steps.
pub(crate) fn learn(
    model: &Model,
    rows: &[TrainingRow],
    recipe: &Recipe,
    state: &Path,
    log: &Path,
    progress: Progress,
) -> Result<Adapter> {
    let mut run = Run::open(model, rows, recipe, state)?;
    progress
        .event(&json!({"event": "rows", "kept": run.rows.len(), "too_long": rows.len() - run.rows.len()}));
    let mut log_file = File::options()
        .create(true)
        .write(true)
        .append(run.resumed)
        .truncate(!run.resumed)
        .open(log)
        .with_context(|| format!("{} cannot be written", log.display()))?;
    let steps_max = run.trainer.options().steps_max;
    let bar = progress.bar(steps_max, run.trainer.steps_done());
    let (started, mut loss, mut tokens, mut since) = (Instant::now(), 0.0, 0_usize, 0_u32);
    while !run.is_done() {
        let (report, read) = run.step()?;
        (loss, tokens, since) = (loss + report.loss, tokens + read, since + 1);
        bar.inc(1);
        if report.step % 10 == 0 || report.step == steps_max {
            let mean = loss / f64::from(since);
            let line = json!({
                "step": report.step, "steps": steps_max, "loss": round(mean),
                "grad_norm": round(report.grad_norm), "learning_rate": report.learning_rate,
                "tokens_per_second": (tokens as f64 / started.elapsed().as_secs_f64()).round(),
            });
            writeln!(log_file, "{line}").with_context(|| format!("{} cannot be written", log.display()))?;
            progress.step(&line);
            bar.set_message(format!("loss {mean:.3}"));
            (loss, since) = (0.0, 0);
        }
        if report.step % recipe.save_every == 0 && report.step < steps_max {
            run.save()?;
        }
    }
    bar.finish_and_clear();
    Ok(run.finish())
}

fn begin(model: &Model, recipe: &Recipe, steps_max: u64) -> Result<Trainer> {
    let modules = model.layout().modules().to_vec();
    let layout = AdapterLayout::new(model.layout().layers(), recipe.rank, recipe.alpha, modules)?;
    let options = TrainOptions {
        learning_rate: recipe.learning_rate,
        optimizer: AdamW { weight_decay: 0.01, ..AdamW::default() },
        schedule: Schedule::Cosine,
        warmup_steps: (steps_max / 20).min(50),
        steps_max,
        ..TrainOptions::default()
    };
    Ok(Trainer::new(model, Adapter::init(layout.into(), recipe.seed), options)?)
}

fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

/// Where a run's state lies; the name says which inputs it belongs to.
struct StateFile(PathBuf);

impl StateFile {
    fn new(folder: &Path, model: &Model, rows: &[TrainingRow], recipe: &Recipe) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(model.manifest().base.to_string().as_bytes());
        hasher.update(recipe.describe().as_bytes());
        for row in rows {
            hasher.update(&(row.ids.len() as u64).to_le_bytes());
            for id in &row.ids {
                hasher.update(&id.to_le_bytes());
            }
            for weight in &row.weights {
                hasher.update(&weight.to_le_bytes());
            }
        }
        let name = hasher.finalize().to_hex();
        Ok(Self(folder.join(format!("state-{}.safetensors", &name.as_str()[..16]))))
    }

    fn load(&self) -> Result<Option<Vec<u8>>> {
        match fs::read(&self.0) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("{} cannot be read", self.0.display())),
        }
    }

    fn save(&self, bytes: &[u8]) -> Result<()> {
        write_whole(&self.0, bytes)
    }

    fn remove(&self) {
        // A state that stays behind costs space and nothing else: the finished adapter is what counts.
        fs::remove_file(&self.0).ok();
    }
}

/// Writes a file so that it is either the old one or the whole new one.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let write = || {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut file = File::create(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&partial, path)
    };
    write().with_context(|| format!("{} cannot be written", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_model::model;

    fn recipe() -> Recipe {
        Recipe {
            rank: 2,
            alpha: 4.0,
            learning_rate: 1e-2,
            epochs: 2.0,
            batch: 2,
            tokens_max: 8,
            seed: 3,
            save_every: 1,
        }
    }

    fn rows() -> Vec<TrainingRow> {
        let row = |i: u32| {
            let ids: Vec<u32> = (0..4 + i % 3).map(|j| 10 + i * 3 + j).collect();
            TrainingRow { weights: vec![1.0; ids.len()], ids }
        };
        (0..7).map(row).collect()
    }

    fn finish(mut run: Run<'_>) -> (Vec<f64>, Adapter) {
        let mut losses = Vec::new();
        while !run.is_done() {
            losses.push(run.step().unwrap().0.loss);
        }
        (losses, run.finish())
    }

    #[test]
    fn a_killed_run_goes_on_where_it_was() {
        let (model, rows, folder) = (model(), rows(), tempfile::tempdir().unwrap());
        let (losses, whole) = finish(Run::open(&model, &rows, &recipe(), folder.path()).unwrap());
        assert_eq!(losses.len(), 8);
        let mut killed = Run::open(&model, &rows, &recipe(), folder.path()).unwrap();
        assert!(!killed.resumed);
        for _ in 0..5 {
            killed.step().unwrap();
        }
        killed.save().unwrap();
        drop(killed);
        let resumed = Run::open(&model, &rows, &recipe(), folder.path()).unwrap();
        assert!(resumed.resumed);
        let (rest, adapter) = finish(resumed);
        assert_eq!(rest, losses[5..]);
        assert_eq!(adapter, whole);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "a finished run leaves no state");
    }

    #[test]
    fn another_recipe_or_other_rows_begin_anew() {
        let (model, rows, folder) = (model(), rows(), tempfile::tempdir().unwrap());
        let mut run = Run::open(&model, &rows, &recipe(), folder.path()).unwrap();
        run.step().unwrap();
        run.save().unwrap();
        let other = Recipe { seed: 4, ..recipe() };
        assert!(!Run::open(&model, &rows, &other, folder.path()).unwrap().resumed);
        assert!(!Run::open(&model, &rows[1..], &recipe(), folder.path()).unwrap().resumed);
        assert!(Run::open(&model, &rows, &recipe(), folder.path()).unwrap().resumed);
    }

    #[test]
    fn rows_that_are_too_long_are_left_out() {
        let (model, rows, folder) = (model(), rows(), tempfile::tempdir().unwrap());
        let short = Recipe { tokens_max: 4, ..recipe() };
        assert_eq!(Run::open(&model, &rows, &short, folder.path()).unwrap().rows.len(), 3);
        let none = Recipe { tokens_max: 1, ..recipe() };
        assert!(Run::open(&model, &rows, &none, folder.path()).is_err());
    }

    #[test]
    fn learning_lowers_the_loss_and_writes_a_log() {
        let (model, rows, folder) = (model(), rows(), tempfile::tempdir().unwrap());
        let long = Recipe { epochs: 10.0, ..recipe() };
        let log = folder.path().join("log.jsonl");
        learn(&model, &rows, &long, &folder.path().join("state"), &log, Progress::new(false)).unwrap();
        let lines = fs::read_to_string(log).unwrap();
        let losses: Vec<f64> = lines
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64().unwrap())
            .collect();
        assert_eq!(losses.len(), 4);
        assert!(losses[3] < losses[0] - 0.5, "{losses:?}");
    }
}
