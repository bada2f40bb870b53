//! Labelled rows → a table: precision, recall and F1, per source and per category, with 95 % intervals.

use std::{collections::BTreeMap, time::Instant};

use anyhow::Result;
use commonweal_runtime::Cancel;
use commonweal_safety::{
    CategoryId, Confusion, Flagged, Guard, GuardReport, Rate, ReviseOptions, Reviser, Revision,
    calibrate::{Bin, Labelled, expected_calibration_error, reliability},
};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    calibrate::{BINS, CHUNK, judge},
    rows::{GuardRow, ReviserRow},
    show::Progress,
};

/// What an evaluation found.
pub(crate) struct Evaluation {
    report: GuardReport,
    calibration_error: f64,
    reliability: Vec<Bin>,
    pairs_per_second: f64,
}

/// Judges rows and counts.
pub(crate) fn evaluate(guard: &Guard, rows: &[GuardRow], progress: Progress) -> Result<Evaluation> {
    let started = Instant::now();
    let judgements = judge(guard, rows, progress)?;
    let pairs_per_second = rows.len() as f64 / started.elapsed().as_secs_f64().max(1e-9);
    let mut report = GuardReport::default();
    let mut labelled = Vec::with_capacity(rows.len());
    for (row, judgement) in rows.iter().zip(&judgements) {
        let source = format!(
            "{}{}",
            row.source.as_deref().unwrap_or("all"),
            if row.response.is_some() { " (pair)" } else { " (prompt)" }
        );
        let (is_unsafe, named) = (row.is_unsafe(), judgement.category.as_ref());
        report.add(&source, is_unsafe, row.category.as_ref(), judgement.is_unsafe, named);
        labelled.push(Labelled { probability: judgement.probability, is_unsafe });
    }
    let calibration_error = expected_calibration_error(&labelled, BINS);
    let reliability = reliability(&labelled, BINS);
    Ok(Evaluation { report, calibration_error, reliability, pairs_per_second })
}

impl Evaluation {
    /// For scripts.
    pub(crate) fn json(&self, file: &str) -> Value {
        let sources: BTreeMap<&str, Value> = self
            .report
            .by_source
            .iter()
            .map(|(source, confusion)| (source.as_str(), figures(confusion)))
            .collect();
        json!({
            "event": "evaluate", "file": file, "overall": figures(&self.report.overall), "by_source": sources,
            "found_by_category": self.report.found_by_category.iter()
                .map(|(id, rate)| (id.to_string(), rate_json(*rate))).collect::<BTreeMap<_, _>>(),
            "category_named": rate_json(self.report.category_named),
            "calibration_error": self.calibration_error, "reliability": self.reliability,
            "pairs_per_second": self.pairs_per_second,
        })
    }

    /// For people.
    pub(crate) fn print(&self, file: &str) {
        println!("{file}");
        println!("  {:<34} {:>6} {:>17} {:>17} {:>6}", "source", "rows", "precision", "recall", "F1");
        let overall = [("all", &self.report.overall)];
        let sources = self.report.by_source.iter().map(|(source, confusion)| (source.as_str(), confusion));
        for (source, confusion) in sources.chain(overall) {
            println!(
                "  {source:<34} {:>6} {:>17} {:>17} {:>6}",
                confusion.total(),
                percent(confusion.precision()),
                percent(confusion.recall()),
                confusion.f1().map_or("–".into(), |f1| format!("{f1:.2}")),
            );
            if confusion.false_positive_rate().total > 0 {
                println!("  {:<34} safe, called unsafe: {}", "", percent(confusion.false_positive_rate()));
            }
        }
        for (id, rate) in &self.report.found_by_category {
            println!("  found of {:<25} {:>6} {:>17}", id.as_str(), rate.total, percent(*rate));
        }
        println!("  category named rightly {:>29}", percent(self.report.category_named));
        println!(
            "  expected calibration error {:.3}, {:.0} pairs a second",
            self.calibration_error, self.pairs_per_second
        );
    }
}

fn figures(confusion: &Confusion) -> Value {
    json!({
        "rows": confusion.total(), "counts": confusion, "precision": rate_json(confusion.precision()),
        "recall": rate_json(confusion.recall()), "f1": confusion.f1(),
        "false_positive_rate": rate_json(confusion.false_positive_rate()),
    })
}

fn rate_json(rate: Rate) -> Value {
    let (low, high) = rate.interval();
    json!({"value": rate.value(), "low": low, "high": high, "hits": rate.hits, "total": rate.total})
}

fn percent(rate: Rate) -> String {
    let (low, high) = rate.interval();
    match rate.value() {
        Some(value) => format!("{:.0} % ({:.0}–{:.0})", 100.0 * value, 100.0 * low, 100.0 * high),
        None => "–".into(),
    }
}

/// What the reviser made of one flagged reply: a line of `--rewrites`, which `judge_rewrites.py` reads.
#[derive(Debug, Serialize)]
pub(crate) struct Rewrite {
    prompt: String,
    response: String,
    category: Option<CategoryId>,
    /// What would be trained on: the rewriting, or the constitution's refusal where none was judged safe.
    revision: String,
    is_safe: bool,
}

/// What the reviser made of rows.
#[derive(Debug, Default)]
pub(crate) struct RevisionCounts {
    flagged: Rate,
    safe: Rate,
    first_attempt: Rate,
    refusals: Rate,
}

/// Revises what the guard flags of the rows' responses, counts, and hands each rewriting on.
pub(crate) fn evaluate_reviser(
    guard: &Guard,
    reviser: &Reviser,
    rows: &[ReviserRow],
    progress: Progress,
    mut each: impl FnMut(&Rewrite) -> Result<()>,
) -> Result<RevisionCounts> {
    let (cancel, mut counts) = (Cancel::new(), RevisionCounts::default());
    let harmful: Vec<&ReviserRow> = rows.iter().filter(|row| row.category.is_some()).collect();
    let bar = progress.bar(harmful.len() as u64, 0);
    for chunk in harmful.chunks(CHUNK) {
        let pairs: Vec<_> = chunk
            .iter()
            .map(|row| commonweal_safety::Pair { prompt: &row.prompt, response: Some(&row.response) })
            .collect();
        let judgements = guard.judge(&pairs, &cancel)?;
        let mut flagged = Vec::new();
        for (row, judgement) in chunk.iter().zip(&judgements) {
            counts.flagged.add(judgement.is_unsafe);
            if judgement.is_unsafe {
                let category = judgement.category.as_ref();
                flagged.push(Flagged { prompt: &row.prompt, response: &row.response, category });
            }
        }
        let revisions = reviser.revise(guard, &flagged, &ReviseOptions::default(), &cancel)?;
        for (flagged, revision) in flagged.iter().zip(revisions) {
            counts.safe.add(matches!(revision, Revision::Safe { .. }));
            if let Revision::Safe { text, attempts, .. } = &revision {
                counts.first_attempt.add(*attempts == 1);
                counts.refusals.add(commonweal_safety::refusal::is_refusal(text));
            }
            each(&Rewrite::of(flagged, revision))?;
        }
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    Ok(counts)
}

impl Rewrite {
    fn of(flagged: &Flagged<'_>, revision: Revision) -> Self {
        let (revision, is_safe) = match revision {
            Revision::Safe { text, .. } => (text, true),
            Revision::StillUnsafe { refusal, .. } => (refusal, false),
        };
        Self {
            prompt: flagged.prompt.into(),
            response: flagged.response.into(),
            category: flagged.category.cloned(),
            revision,
            is_safe,
        }
    }
}

impl RevisionCounts {
    /// For scripts.
    pub(crate) fn json(&self, file: &str) -> Value {
        json!({
            "event": "evaluate_reviser", "file": file, "flagged": rate_json(self.flagged),
            "safe_after_revision": rate_json(self.safe), "of_those_at_first_attempt": rate_json(self.first_attempt),
            "of_those_refusals": rate_json(self.refusals),
        })
    }

    /// For people.
    pub(crate) fn print(&self, file: &str) {
        println!("{file}");
        println!("  harmful replies flagged            {:>17}", percent(self.flagged));
        println!("  of those safe after revision       {:>17}", percent(self.safe));
        println!("  of those at the first attempt      {:>17}", percent(self.first_attempt));
        println!("  of those refusals                  {:>17}", percent(self.refusals));
    }
}
