//! Guard rows → tokens with weights. `learn.rs` trains on them.

use anyhow::{Result, ensure};
use commonweal_runtime::{Model, TrainingRow};
use commonweal_safety::{GuardConfig, QuestionError, Questions};

use crate::rows::GuardRow;

/// The weight of a category's token beside the label's: naming the harm matters less than seeing it.
const CATEGORY_WEIGHT: f32 = 0.3;

/// One training row for each labelled row that fits a single window; safe and unsafe weigh the same in sum, for
/// prompts alone as for pairs, so that the guard does not learn how often a source says "unsafe".
pub(crate) fn guard_rows(model: &Model, config: &GuardConfig, rows: &[GuardRow]) -> Result<Vec<TrainingRow>> {
    let questions = Questions::new(model.tokenizer(), config, model.context())?;
    ensure!(
        !questions.asks_by_category(),
        "a guard that is asked about each category cannot be trained here"
    );
    let kind = |row: &GuardRow| (row.response.is_some(), row.is_unsafe());
    let count = |wanted| rows.iter().filter(|row| kind(row) == wanted).count();
    let mut learned = Vec::with_capacity(rows.len());
    for row in rows {
        let asked = match questions.asked(model.tokenizer(), row.pair()) {
            Err(QuestionError::Windows { .. }) => continue,
            asked => asked?,
        };
        let Some([window]) = asked.first().map(Vec::as_slice) else { continue };
        let (with_response, is_unsafe) = kind(row);
        let (same, other) = (count((with_response, is_unsafe)), count((with_response, !is_unsafe)));
        let balance = (same + other) as f32 / (2 * same) as f32;
        let mut learned_row = questions.answered(window, is_unsafe, row.category.as_ref(), CATEGORY_WEIGHT);
        learned_row.weights.iter_mut().for_each(|weight| *weight *= balance);
        learned.push(learned_row);
    }
    Ok(learned)
}
