//! `filter --evaluate`: the guard against labelled rows: precision, recall, per source.

use std::path::Path;

use anyhow::Result;
use commonweal_runtime::Cancel;
use commonweal_safety::{GuardReport, Pair};
use serde::Deserialize;

use super::{Shared, open};
use crate::{events::Output, forms};

/// A row with what is known of it; AdvBench's goals have no label, and all are unsafe.
#[derive(Deserialize)]
struct Labelled {
    #[serde(alias = "goal")]
    prompt: String,
    #[serde(default)]
    response: Option<String>,
    #[serde(default = "Label::of_goals")]
    label: Label,
    #[serde(default)]
    category: Option<String>,
    #[serde(default)]
    source: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Label {
    Safe,
    Unsafe,
}

impl Label {
    const fn of_goals() -> Self {
        Self::Unsafe
    }
}

pub(super) fn evaluate(shared: &Shared, file: &Path) -> Result<()> {
    let expected = "\"prompt\" (or goal), \"label\" safe or unsafe, perhaps \"response\" and \"source\"";
    let rows = open::read_rows(file, |row| forms::fields::<Labelled>(row, expected))?.good;
    let place = open::Place::find(shared)?;
    let cancel = Cancel::new();
    let stages = open::Stages::open(shared, &place, &place.policy(shared)?, &cancel)?;
    let bar = open::bar("judge", rows.len());
    let mut report = GuardReport::default();
    for chunk in rows.chunks(64) {
        let pairs: Vec<Pair<'_>> = chunk
            .iter()
            .map(|(_, row)| Pair { prompt: &row.prompt, response: row.response.as_deref() })
            .collect();
        for ((_, row), judgement) in chunk.iter().zip(stages.guard.judge(&pairs, &cancel)?) {
            let is_unsafe = row.label == Label::Unsafe;
            let source = row.source.as_deref().unwrap_or("all");
            let category = row.category.as_deref().and_then(|category| category.parse().ok());
            let named = judgement.category.as_ref();
            report.add(source, is_unsafe, category.as_ref(), judgement.is_unsafe, named);
        }
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    let output = shared.output();
    match output {
        Output::Json => output.say(&serde_json::to_string(&report)?),
        Output::Text => print(output, &report),
    }
    Ok(())
}

fn print(output: Output, report: &GuardReport) {
    output.say("source                           tp     fp     fn     tn  precision  recall");
    let all = std::iter::once(("all", &report.overall));
    for (source, confusion) in report.by_source.iter().map(|(name, c)| (name.as_str(), c)).chain(all) {
        let share = |rate: commonweal_safety::Rate| match rate.value() {
            Some(value) => format!("{value:.3}"),
            None => "–".into(),
        };
        output.say(&format!(
            "{source:28} {:6} {:6} {:6} {:6}  {:>9}  {:>6}",
            confusion.true_positive,
            confusion.false_positive,
            confusion.false_negative,
            confusion.true_negative,
            share(confusion.precision()),
            share(confusion.recall())
        ));
    }
}
