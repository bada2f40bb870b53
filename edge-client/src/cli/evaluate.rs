//! `filter --evaluate`: the guard against labelled rows: precision, recall, false alarms and calibration, per source and
//! per category.
//!
//! Rows are JSONL or CSV under a header: `prompt`, `label`, perhaps `response`, `category` and `source`; or AdvBench's
//! `goal`, whose rows have no label and are all unsafe.

use std::path::Path;

use anyhow::Result;
use commonweal_runtime::Cancel;
use commonweal_safety::{
    CategoryId, Confusion, GuardReport, Pair, Rate,
    calibrate::{Bin, Labelled, expected_calibration_error, reliability},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Shared, open};
use crate::{events::Output, forms, rows::RowError};

const EXPECTED: &str = "\"prompt\" (or \"text\") with \"label\" safe, unsafe, 0 or 1, or \"goal\" alone; perhaps \"response\", \
    \"category\" (lower-case letters, digits and _) and \"source\"";
/// Pairs judged in one call of the guard.
const CHUNK: usize = 64;
/// Bins of the expected calibration error, as in the literature.
const BINS: usize = 10;

/// A row with what is known of it.
pub(super) struct Row {
    prompt: String,
    response: Option<String>,
    is_unsafe: bool,
    category: Option<CategoryId>,
    source: Option<String>,
}

/// A row as it stands in the file. What is not named here is passed over: published sets have columns of their own.
#[derive(Deserialize)]
struct Fields {
    goal: Option<String>,
    #[serde(alias = "text")]
    prompt: Option<String>,
    response: Option<String>,
    label: Option<Label>,
    category: Option<String>,
    source: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Label {
    Number(u8),
    Word(String),
}

impl Label {
    fn is_unsafe(&self) -> Option<bool> {
        match self {
            Self::Number(0) => Some(false),
            Self::Number(1) => Some(true),
            Self::Number(_) => None,
            Self::Word(word) => match word.trim().to_lowercase().as_str() {
                "safe" | "0" => Some(false),
                "unsafe" | "1" => Some(true),
                _ => None,
            },
        }
    }
}

/// A labelled row, or what was expected. An empty field is an absent one, since CSV has no other way to say so.
pub(super) fn labelled(row: Value) -> Result<Row, RowError> {
    let fields: Fields = forms::fields(row, EXPECTED)?;
    let given = |text: Option<String>| text.filter(|text| !text.trim().is_empty());
    let known = |fields: Fields| {
        let (prompt, is_unsafe) = match (given(fields.prompt), given(fields.goal), fields.label) {
            (Some(prompt), None, Some(label)) | (None, Some(prompt), Some(label)) => {
                (prompt, label.is_unsafe()?)
            }
            (None, Some(goal), None) => (goal, true),
            _ => return None,
        };
        let category = match given(fields.category) {
            Some(category) => Some(category.trim().parse().ok()?),
            None => None,
        };
        let (response, source) = (given(fields.response), given(fields.source));
        Some(Row { prompt, response, is_unsafe, category, source })
    };
    known(fields).ok_or(RowError::Form(EXPECTED))
}

/// What `--json` prints.
#[derive(Serialize)]
struct Evaluation {
    #[serde(flatten)]
    report: GuardReport,
    precision: Option<f64>,
    recall: Option<f64>,
    f1: Option<f64>,
    /// The share of the safe rows that were called unsafe.
    false_alarms: Option<f64>,
    /// Rows that the guard could not judge; they are in no other figure.
    unjudged: usize,
    calibration_error: f64,
    reliability: Vec<Bin>,
}

impl Evaluation {
    fn of(report: GuardReport, labelled: &[Labelled], unjudged: usize) -> Self {
        Self {
            unjudged,
            precision: report.overall.precision().value(),
            recall: report.overall.recall().value(),
            f1: report.overall.f1(),
            false_alarms: report.overall.false_positive_rate().value(),
            calibration_error: expected_calibration_error(labelled, BINS),
            reliability: reliability(labelled, BINS),
            report,
        }
    }
}

pub(super) fn evaluate(shared: &Shared, file: &Path) -> Result<()> {
    let rows = open::read_rows(file, labelled)?.good;
    let place = open::Place::find(shared)?;
    let cancel = Cancel::new();
    let stages = open::Stages::open(shared, &place, &place.policy(shared)?, &cancel)?;
    let bar = open::bar("judge", rows.len());
    let (mut report, mut labelled, mut unjudged) =
        (GuardReport::default(), Vec::with_capacity(rows.len()), 0);
    for chunk in rows.chunks(CHUNK) {
        let pairs: Vec<Pair<'_>> = chunk
            .iter()
            .map(|(_, row)| Pair { prompt: &row.prompt, response: row.response.as_deref() })
            .collect();
        for ((line, row), judgement) in chunk.iter().zip(stages.guard.judge_each(&pairs, &cancel)?) {
            let judgement = match judgement {
                Ok(judgement) => judgement,
                Err(error) => {
                    tracing::warn!("{}: line {line}: {error}; not judged, and not counted", file.display());
                    unjudged += 1;
                    continue;
                }
            };
            let source = row.source.as_deref().unwrap_or("all");
            let named = judgement.category.as_ref();
            report.add(source, row.is_unsafe, row.category.as_ref(), judgement.is_unsafe, named);
            labelled.push(Labelled { probability: judgement.probability, is_unsafe: row.is_unsafe });
        }
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    let output = shared.output();
    let evaluation = Evaluation::of(report, &labelled, unjudged);
    match output {
        Output::Json => output.say(&serde_json::to_string(&evaluation)?),
        Output::Text => table(&evaluation).iter().for_each(|line| output.say(line)),
    }
    Ok(())
}

fn table(evaluation: &Evaluation) -> Vec<String> {
    let report = &evaluation.report;
    let mut lines = vec![format!(
        "{:28} {:>6} {:>6} {:>6} {:>6}  {:>9} {:>6} {:>6} {:>12}",
        "source", "tp", "fp", "fn", "tn", "precision", "recall", "F1", "false alarms"
    )];
    let all = std::iter::once(("in all", &report.overall));
    let sources = report.by_source.iter().map(|(name, confusion)| (name.as_str(), confusion));
    lines.extend(sources.chain(all).map(|(source, confusion)| line(source, confusion)));
    for (category, found) in &report.found_by_category {
        lines.push(format!("{category:28} {:>6} unsafe, found {}", found.total, share(*found)));
    }
    if report.category_named.total > 0 {
        lines.push(format!("category named rightly {}", share(report.category_named)));
    }
    lines.push(format!("expected calibration error {:.3}", evaluation.calibration_error));
    if evaluation.unjudged > 0 {
        lines.push(format!("{} rows could not be judged and are not counted", evaluation.unjudged));
    }
    lines
}

fn line(source: &str, confusion: &Confusion) -> String {
    format!(
        "{source:28} {:6} {:6} {:6} {:6}  {:>9} {:>6} {:>6} {:>12}",
        confusion.true_positive,
        confusion.false_positive,
        confusion.false_negative,
        confusion.true_negative,
        share(confusion.precision()),
        share(confusion.recall()),
        confusion.f1().map_or("–".into(), |f1| format!("{f1:.3}")),
        share(confusion.false_positive_rate()),
    )
}

fn share(rate: Rate) -> String {
    rate.value().map_or("–".into(), |value| format!("{value:.3}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::{self, Form, Parsed};

    fn parse(text: &str, form: Form) -> Parsed<Row> {
        rows::read(text.as_bytes(), form, labelled).unwrap()
    }

    fn lines(parsed: &Parsed<Row>) -> (Vec<usize>, Vec<usize>) {
        (parsed.good.iter().map(|(line, _)| *line).collect(), parsed.bad.iter().map(|bad| bad.line).collect())
    }

    #[test]
    fn goals_are_prompts_without_a_label_and_unsafe() {
        let parsed = parse("goal,target\n\"Write, a thing\",\"Sure, here\"\n,x\n", Form::Csv);
        assert_eq!(lines(&parsed), (vec![2], vec![3]));
        let row = &parsed.good[0].1;
        assert!(row.is_unsafe && row.response.is_none() && row.prompt == "Write, a thing");
    }

    #[test]
    fn columns_of_csv_may_be_empty_and_a_row_without_a_label_is_named() {
        let text = "Prompt,Label,response,source,category,note\na,unsafe,,s,crime,x\nb,Safe,yes,,,\nc,,,,,\nd,maybe,,,,\n\
                    e,1,,,Not A Category,\n";
        let parsed = parse(text, Form::Csv);
        assert_eq!(lines(&parsed), (vec![2, 3], vec![4, 5, 6]));
        let [(_, first), (_, second)] = &parsed.good[..] else { panic!() };
        assert!(first.is_unsafe && first.response.is_none() && first.source.as_deref() == Some("s"));
        assert_eq!(first.category.as_ref().map(CategoryId::as_str), Some("crime"));
        assert!(!second.is_unsafe && second.response.as_deref() == Some("yes") && second.source.is_none());
        assert!(parsed.bad[0].reason.to_string().contains("\"label\" safe, unsafe"));
    }

    #[test]
    fn lines_of_json_are_read_likewise() {
        let text = "{\"text\":\"a\",\"label\":1}\n{\"prompt\":\"a\",\"response\":null,\"label\":\"safe\"}\n\
                    {\"prompt\":\"a\"}\n{\"prompt\":\"a\",\"label\":2}\n{\"label\":\"safe\"}\n[]\n{\"goal\":\"g\",\"label\":0}\n";
        let parsed = parse(text, Form::Jsonl);
        assert_eq!(lines(&parsed), (vec![1, 2, 7], vec![3, 4, 5, 6]));
        assert_eq!(
            parsed.good.iter().map(|(_, row)| row.is_unsafe).collect::<Vec<_>>(),
            [true, false, false]
        );
    }

    #[test]
    fn the_table_has_every_figure() {
        let mut report = GuardReport::default();
        let crime: CategoryId = "crime".parse().unwrap();
        let mut rows = Vec::new();
        for (source, is_unsafe, called) in
            [("a", true, true), ("a", true, false), ("b", false, true), ("b", false, false)]
        {
            report.add(source, is_unsafe, is_unsafe.then_some(&crime), called, called.then_some(&crime));
            rows.push(Labelled { probability: if called { 0.9 } else { 0.1 }, is_unsafe });
        }
        let evaluation = Evaluation::of(report, &rows, 1);
        let printed: Vec<String> = table(&evaluation)
            .iter()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(
            printed,
            [
                "source tp fp fn tn precision recall F1 false alarms",
                "a 1 0 1 0 1.000 0.500 0.667 –",
                "b 0 1 0 1 0.000 – 0.000 0.500",
                "in all 1 1 1 1 0.500 0.500 0.500 0.500",
                "crime 2 unsafe, found 0.500",
                "category named rightly 1.000",
                "expected calibration error 0.400",
                "1 rows could not be judged and are not counted",
            ]
        );
        let json = serde_json::to_value(&evaluation).unwrap();
        for name in ["overall", "by_source", "precision", "recall", "f1", "false_alarms", "reliability"] {
            assert!(!json[name].is_null(), "{name}");
        }
    }
}
