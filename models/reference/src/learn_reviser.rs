//! Reviser rows → conversations in tokens, weighted on critique and rewriting. `learn.rs` trains on them.

use anyhow::{Context, Result};
use commonweal_runtime::{Message, Model, TrainingRow};
use commonweal_safety::{Constitution, critique_messages, revision_messages};

use crate::rows::ReviserRow;

/// One training row for each; the response that is criticised has no weight.
pub(crate) fn reviser_rows(
    model: &Model,
    constitution: &Constitution,
    rows: &[ReviserRow],
) -> Result<Vec<TrainingRow>> {
    let chat = model.chat();
    let mut learned = Vec::with_capacity(rows.len());
    for (index, row) in rows.iter().enumerate() {
        let principle = constitution.principles.iter().find(|p| p.id.as_str() == row.principle);
        let principle = principle.with_context(|| {
            format!("row {} names principle {:?}, which is absent", index + 1, row.principle)
        })?;
        let mut messages =
            revision_messages(&row.prompt, &row.response, constitution, principle, row.critique.trim());
        messages.push(Message::assistant(row.revision.trim()));
        let mut learned_row = chat.training_row(&messages)?;
        let given = chat.prompt(&critique_messages(&row.prompt, &row.response, principle))?.ids.len();
        learned_row.weights.iter_mut().take(given).for_each(|weight| *weight = 0.0);
        learned.push(learned_row);
    }
    Ok(learned)
}
