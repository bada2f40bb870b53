//! `bench`: what this device does a second: load, screening, generation, training. Medians of repeated runs.

use std::time::Instant;

use anyhow::Result;
use commonweal_adapter::Adapter;
use commonweal_runtime::{Cancel, GenerateOptions, Message, TrainOptions, Trainer, TrainingRow, memory};
use commonweal_safety::Pair;
use serde_json::json;

use super::{Shared, open};
use crate::events::Output;

const REPEATS: usize = 5;
const QUESTION: &str = "How do I keep bread fresh for a week without a freezer?";
const ANSWER: &str = "Keep it in a paper bag inside a bread box, away from the sun, and toast what gets dry.";

/// One measured figure.
struct Figure {
    work: &'static str,
    rate: f64,
    unit: &'static str,
}

pub(super) fn bench(shared: &Shared) -> Result<()> {
    let place = open::Place::find(shared)?;
    let cancel = Cancel::new();
    let begun = Instant::now();
    let stages = open::Stages::open(shared, &place, &place.policy(shared)?, &cancel)?;
    let mut figures = vec![Figure { work: "load", rate: begun.elapsed().as_secs_f64(), unit: "s" }];
    let base = stages.model.prepare(None)?;

    let pairs = [Pair { prompt: QUESTION, response: Some(ANSWER) }; 32];
    let seconds = median(|| stages.guard.judge(&pairs, &cancel).map(|_| ()).map_err(Into::into))?;
    figures.push(Figure { work: "filter", rate: pairs.len() as f64 / seconds, unit: "samples/s" });

    for rows in [1, 8] {
        let prompt = stages.model.chat().prompt(&[Message::user(QUESTION)])?;
        let prompts = vec![prompt; rows];
        let options = GenerateOptions { max_new_tokens: 64, temperature: 1.0, ..Default::default() };
        let mut tokens = 0;
        let seconds = median(|| {
            let answers = stages.model.generate(&base, &prompts, &options, &cancel)?;
            tokens = answers.iter().map(|answer| answer.tokens.len()).sum::<usize>();
            Ok(())
        })?;
        let work = if rows == 1 { "generate, 1 row" } else { "generate, 8 rows" };
        figures.push(Figure { work, rate: tokens as f64 / seconds, unit: "tokens/s" });
    }

    let vocab_size = stages.model.manifest().model.vocab_size as u32;
    let row =
        TrainingRow { ids: (0..256).map(|i| (i * 7919) % vocab_size).collect(), weights: vec![1.0; 256] };
    let start = Adapter::init(stages.layout(), 0);
    let mut trainer = Trainer::new(&stages.model, start, TrainOptions::default())?;
    trainer.step(std::slice::from_ref(&row), &cancel)?;
    let seconds =
        median(|| trainer.step(std::slice::from_ref(&row), &cancel).map(|_| ()).map_err(Into::into))?;
    figures.push(Figure { work: "train, 256 tokens", rate: 256.0 / seconds, unit: "tokens/s" });

    let peak = memory().map(|memory| memory.resident_bytes_max as f64 / 1e6);
    figures.extend(peak.map(|rate| Figure { work: "peak memory", rate, unit: "MB" }));
    let output = shared.output();
    for Figure { work, rate, unit } in &figures {
        match output {
            Output::Json => output.say(&json!({"work": work, "rate": rate, "unit": unit})),
            Output::Text => output.say(&format!("{work:20} {rate:10.1} {unit}")),
        }
    }
    Ok(())
}

fn median(mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut seconds = Vec::with_capacity(REPEATS);
    for _ in 0..REPEATS {
        let begun = Instant::now();
        run()?;
        seconds.push(begun.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[REPEATS / 2])
}
