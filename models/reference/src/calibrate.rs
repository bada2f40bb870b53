//! A dev split → calibration and thresholds in `guard.toml`, and how much its words count.

use anyhow::{Context, Result, ensure};
use clap::Args;
use commonweal_runtime::Cancel;
use commonweal_safety::{
    CategoryId, Guard, GuardConfig, Judgement, Pair, Spoken, Words, WordsUse,
    calibrate::{Labelled, Platt, Scored, Target, expected_calibration_error, reliability, threshold_for},
};
use serde_json::{Value, json};

use crate::{rows::GuardRow, show::Progress};

/// Bins of the expected calibration error, as in the literature.
pub(crate) const BINS: usize = 10;
/// Where a package has its words.
const WORDS_FILE: &str = "adapters/guard.words";
/// A category keeps the guard's threshold with fewer dev rows of either label: a threshold from a handful is noise.
const CATEGORY_ROWS_MIN: usize = 25;
/// Pairs between two moves of the progress bar.
pub(crate) const CHUNK: usize = 64;

/// Judges rows in their order.
pub(crate) fn judge(guard: &Guard, rows: &[GuardRow], progress: Progress) -> Result<Vec<Judgement>> {
    let bar = progress.bar(rows.len() as u64, 0);
    let (cancel, mut judgements) = (Cancel::new(), Vec::with_capacity(rows.len()));
    for chunk in rows.chunks(CHUNK) {
        let pairs: Vec<Pair<'_>> = chunk.iter().map(GuardRow::pair).collect();
        judgements.extend(guard.judge(&pairs, &cancel)?);
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    Ok(judgements)
}

/// What gets a threshold of its own, besides the guard as a whole.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct OwnThresholds {
    /// Give prompts alone and pairs a threshold each
    #[arg(long)]
    per_form: bool,
    /// Give each category a threshold of its own where there are enough rows
    #[arg(long)]
    per_category: bool,
}

/// Fits both layouts' calibration and the thresholds; `judgements` are those of the guard without words, thresholds
/// lowered so that every row has a category. With words, the guard is calibrated by itself first: the words, whose
/// scores are log-odds already, then weigh as much as its calibrated log-odds, and the sum is calibrated again. Weights
/// that are fitted instead lean on the manner of the rows' sources, and called more unseen ones unsafe.
/// Gives the new configuration and what was measured.
pub(crate) fn calibrate(
    config: &GuardConfig,
    rows: &[GuardRow],
    judgements: &[Judgement],
    words: Option<&Words>,
    target: Target,
    own: OwnThresholds,
) -> Result<(GuardConfig, Value)> {
    let mut calibrated = config.clone();
    let mut measured = serde_json::Map::new();
    let spoken: Option<Vec<Spoken>> =
        words.map(|words| rows.iter().map(|row| words.say(row.pair())).collect());
    let file = config.words.as_ref().map_or_else(|| WORDS_FILE.to_owned(), |heard| heard.file.clone());
    calibrated.words = words.map(|_| WordsUse { file, prompt: 0.0, pair_prompt: 0.0, pair: 0.0 });
    let mut log_odds: Vec<f64> = judgements.iter().map(|judgement| judgement.log_odds).collect();
    for (name, with_response) in [("prompt", false), ("pair", true)] {
        let scored = |log_odds: &[f64]| -> Vec<Scored> {
            let of_layout =
                rows.iter().zip(log_odds).filter(|(row, _)| row.response.is_some() == with_response);
            of_layout
                .map(|(row, log_odds)| Scored { log_odds: *log_odds, is_unsafe: row.is_unsafe() })
                .collect()
        };
        let fit = |log_odds: &[f64]| Platt::fit(&scored(log_odds)).with_context(|| format!("layout {name}"));
        if let (Some(heard), Some(spoken)) = (&mut calibrated.words, &spoken) {
            heard.weigh(1.0 / fit(&log_odds)?.slope, with_response);
            for ((row, spoken), log_odds) in rows.iter().zip(spoken).zip(&mut log_odds) {
                if row.response.is_some() == with_response {
                    *log_odds += heard.log_odds(*spoken, with_response);
                }
            }
        }
        let (platt, scored) = (fit(&log_odds)?, scored(&log_odds));
        let error = |platt: Platt| expected_calibration_error(&labelled(&scored, platt), BINS);
        measured.insert(
            name.to_owned(),
            json!({
                "rows": scored.len(), "slope": platt.slope, "intercept": platt.intercept,
                "reliability": reliability(&labelled(&scored, platt), BINS),
                "calibration_error_before": error(Platt::default()), "calibration_error_after": error(platt),
            }),
        );
        let layout = if with_response { &mut calibrated.pair } else { &mut calibrated.prompt };
        layout.calibration = platt;
    }
    let probabilities: Vec<Labelled> = rows
        .iter()
        .zip(&log_odds)
        .map(|(row, log_odds)| {
            let layout = if row.response.is_some() { &calibrated.pair } else { &calibrated.prompt };
            Labelled { probability: layout.calibration.probability(*log_odds), is_unsafe: row.is_unsafe() }
        })
        .collect();
    calibrated.threshold =
        threshold_for(&probabilities, target).context("no threshold reaches the target")?;
    measured.insert("threshold".into(), json!(calibrated.threshold));
    for (name, with_response) in [("prompt_threshold", false), ("pair_threshold", true)] {
        let of_form = rows.iter().zip(&probabilities);
        let of_form = of_form.filter(|(row, _)| row.response.is_some() == with_response);
        let of_form: Vec<Labelled> = of_form.map(|(_, labelled)| *labelled).collect();
        let threshold = own.per_form.then(|| threshold_for(&of_form, target)).flatten();
        let layout = if with_response { &mut calibrated.pair } else { &mut calibrated.prompt };
        layout.threshold = threshold;
        measured.insert(name.into(), json!(threshold));
    }
    for category in &mut calibrated.categories {
        category.threshold = if own.per_category {
            of_category(&category.id, judgements, &probabilities, target)
        } else {
            None
        };
    }
    let problems = calibrated.validate();
    ensure!(problems.is_ok(), "calibrated configuration is not valid: {problems:?}");
    Ok((calibrated, Value::Object(measured)))
}

/// The threshold for the rows that the guard gives a category, where there are enough of them.
fn of_category(
    id: &CategoryId,
    judgements: &[Judgement],
    probabilities: &[Labelled],
    target: Target,
) -> Option<f64> {
    let named =
        judgements.iter().zip(probabilities).filter(|(judgement, _)| judgement.category.as_ref() == Some(id));
    let rows: Vec<Labelled> = named.map(|(_, row)| *row).collect();
    let positives = rows.iter().filter(|row| row.is_unsafe).count();
    let enough = positives >= CATEGORY_ROWS_MIN && rows.len() - positives >= CATEGORY_ROWS_MIN;
    enough.then(|| threshold_for(&rows, target)).flatten()
}

fn labelled(scored: &[Scored], platt: Platt) -> Vec<Labelled> {
    scored
        .iter()
        .map(|row| Labelled { probability: platt.probability(row.log_odds), is_unsafe: row.is_unsafe })
        .collect()
}

#[cfg(test)]
mod tests {
    use commonweal_safety::calibrate::CalibrateError;

    use super::*;
    use crate::rows::Label;

    /// Prompts that are told apart, and pairs of which one label has only `few`.
    #[test]
    fn a_layout_with_too_few_rows_is_named() {
        let config = GuardConfig::from_toml(include_str!("../guard.toml")).unwrap();
        let calibrate = |few: usize| {
            let mut rows = Vec::new();
            for (response, label, count) in [
                (None, Label::Safe, 12),
                (None, Label::Unsafe, 12),
                (Some("r"), Label::Safe, 12),
                (Some("r"), Label::Unsafe, few),
            ] {
                let row = GuardRow {
                    prompt: "p".into(),
                    response: response.map(str::to_owned),
                    label,
                    category: None,
                    source: None,
                };
                rows.extend(std::iter::repeat_n(row, count));
            }
            let judgement = |row: &GuardRow| Judgement {
                probability: 0.5,
                log_odds: if row.is_unsafe() { 1.0 } else { -1.0 },
                category: None,
                threshold: 0.5,
                is_unsafe: row.is_unsafe(),
            };
            let judgements: Vec<Judgement> = rows.iter().map(judgement).collect();
            let own = OwnThresholds { per_form: false, per_category: false };
            calibrate(&config, &rows, &judgements, None, Target::F1, own)
        };
        calibrate(10).unwrap();
        let error = calibrate(9).unwrap_err();
        assert_eq!(error.to_string(), "layout pair");
        let cause = error.downcast_ref::<CalibrateError>();
        assert_eq!(cause, Some(&CalibrateError::TooFew { positives: 9, negatives: 12 }));
    }
}
