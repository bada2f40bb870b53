//! A dev split → calibration and thresholds in `guard.toml`.

use anyhow::{Context, Result, ensure};
use commonweal_runtime::Cancel;
use commonweal_safety::{
    CategoryId, Guard, GuardConfig, Judgement, Pair,
    calibrate::{Labelled, Platt, Scored, Target, expected_calibration_error, threshold_for},
};
use serde_json::{Value, json};

use crate::{rows::GuardRow, show::Progress};

/// Bins of the expected calibration error, as in the literature.
const BINS: usize = 10;
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

/// Fits both layouts' calibration and the thresholds; `config` is the one that `guard` runs with, thresholds lowered
/// so that every row has a category. Gives the new configuration and what was measured.
pub(crate) fn calibrate(
    config: &GuardConfig,
    rows: &[GuardRow],
    judgements: &[Judgement],
    target: Target,
    per_category: bool,
) -> Result<(GuardConfig, Value)> {
    let mut calibrated = config.clone();
    let mut measured = serde_json::Map::new();
    for (name, with_response) in [("prompt", false), ("pair", true)] {
        let of_layout =
            || rows.iter().zip(judgements).filter(|(row, _)| row.response.is_some() == with_response);
        let scored: Vec<Scored> = of_layout()
            .map(|(row, judgement)| Scored { log_odds: judgement.log_odds, is_unsafe: row.is_unsafe() })
            .collect();
        let platt = Platt::fit(&scored).with_context(|| format!("layout {name}"))?;
        let error = |platt: Platt| expected_calibration_error(&labelled(&scored, platt), BINS);
        measured.insert(
            name.to_owned(),
            json!({
                "rows": scored.len(), "slope": platt.slope, "intercept": platt.intercept,
                "calibration_error_before": error(Platt::default()), "calibration_error_after": error(platt),
            }),
        );
        let layout = if with_response { &mut calibrated.pair } else { &mut calibrated.prompt };
        layout.calibration = platt;
    }
    let probabilities: Vec<Labelled> = rows
        .iter()
        .zip(judgements)
        .map(|(row, judgement)| {
            let layout = if row.response.is_some() { &calibrated.pair } else { &calibrated.prompt };
            Labelled {
                probability: layout.calibration.probability(judgement.log_odds),
                is_unsafe: row.is_unsafe(),
            }
        })
        .collect();
    calibrated.threshold =
        threshold_for(&probabilities, target).context("no threshold reaches the target")?;
    measured.insert("threshold".into(), json!(calibrated.threshold));
    for category in &mut calibrated.categories {
        category.threshold =
            if per_category { of_category(&category.id, judgements, &probabilities, target) } else { None };
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
