//! `filter --evaluate`: the guard against labelled rows: precision, recall, per source.

use std::{fs::File, io::BufReader, path::Path};

use anyhow::{Context, Result};
use commonweal_runtime::Cancel;
use commonweal_safety::{GuardReport, Pair};
use serde::Deserialize;

use super::{Shared, exit::BadInput, open};
use crate::events::Output;

/// A labelled row; AdvBench's CSV counts every goal as unsafe.
#[derive(Deserialize)]
struct Labelled {
    #[serde(alias = "goal")]
    prompt: String,
    #[serde(default)]
    response: Option<String>,
    #[serde(default)]
    label: Option<String>,
    #[serde(default)]
    category: Option<String>,
    #[serde(default)]
    source: Option<String>,
}

pub(super) fn evaluate(shared: &Shared, file: &Path) -> Result<()> {
    let rows = read(file)?;
    let place = open::Place::find(shared)?;
    let cancel = Cancel::new();
    let stages = open::Stages::open(shared, &place, &cancel)?;
    let bar = open::bar("judge", rows.len());
    let mut report = GuardReport::default();
    for chunk in rows.chunks(64) {
        let pairs: Vec<Pair<'_>> =
            chunk.iter().map(|row| Pair { prompt: &row.prompt, response: row.response.as_deref() }).collect();
        for (row, judgement) in chunk.iter().zip(stages.guard.judge(&pairs, &cancel)?) {
            let is_unsafe = row.label.as_deref().unwrap_or("unsafe") == "unsafe";
            let source = row.source.as_deref().unwrap_or("all");
            let category = row.category.as_deref().and_then(|category| category.parse().ok());
            let named = judgement.category.as_ref();
            report.add(source, is_unsafe, category.as_ref(), judgement.is_unsafe, named);
        }
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    match shared.output() {
        Output::Json => println!("{}", serde_json::to_string(&report)?),
        Output::Text => print(&report),
    }
    Ok(())
}

fn read(file: &Path) -> Result<Vec<Labelled>> {
    let open = || File::open(file).with_context(|| format!("cannot open {}", file.display()));
    let mut rows = Vec::new();
    if crate::sample::Form::of(file) == crate::sample::Form::Csv {
        for (line, row) in csv::Reader::from_reader(BufReader::new(open()?)).deserialize().enumerate() {
            let row = row.map_err(|_| {
                BadInput(format!("{}: line {}: expected columns goal or prompt", file.display(), line + 2))
            })?;
            rows.push(row);
        }
    } else {
        for (line, text) in std::io::BufRead::lines(BufReader::new(open()?)).enumerate() {
            let text = text.with_context(|| format!("cannot read {}", file.display()))?;
            if text.trim().is_empty() {
                continue;
            }
            let row = serde_json::from_str(&text).map_err(|_| {
                let expected = "expected prompt, label, and perhaps response and source";
                BadInput(format!("{}: line {}: {expected}", file.display(), line + 1))
            })?;
            rows.push(row);
        }
    }
    match rows.is_empty() {
        true => Err(BadInput(format!("{}: no rows", file.display())).into()),
        false => Ok(rows),
    }
}

fn print(report: &GuardReport) {
    println!("{:28} {:>6} {:>6} {:>6} {:>6}  precision  recall", "source", "tp", "fp", "fn", "tn");
    let all = std::iter::once(("all", &report.overall));
    for (source, confusion) in report.by_source.iter().map(|(name, c)| (name.as_str(), c)).chain(all) {
        let share = |rate: commonweal_safety::Rate| match rate.value() {
            Some(value) => format!("{value:.3}"),
            None => "–".into(),
        };
        println!(
            "{source:28} {:6} {:6} {:6} {:6}  {:>9}  {:>6}",
            confusion.true_positive,
            confusion.false_positive,
            confusion.false_negative,
            confusion.true_negative,
            share(confusion.precision()),
            share(confusion.recall())
        );
    }
}
