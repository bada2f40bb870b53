//! Probabilities without generation: of chosen next tokens (a guard's verdict) and of whole rows (held-out loss).

use crate::{
    adapt::PreparedAdapter,
    cancel::{Cancel, Run},
    conversation::{Prompt, TrainingRow},
    infer::{InferError, Lane, check_prompt, check_tokens},
    model::Model,
    prefix::SharedPrefix,
    sample_token::logprobs,
};

/// How probable a row is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowScore {
    /// Sum of weight · log-probability over the row's tokens.
    pub logprob: f64,
    /// Sum of the weights: the number of scored tokens where weights are 0 and 1.
    pub weight: f64,
    /// Log-probability of every token whose weight is not 0, in order.
    pub token_logprobs: Vec<f32>,
}

/// Mean loss per token over rows, in nats: `−Σ logprob / Σ weight`. `None` when nothing was scored.
pub fn mean_loss(scores: &[RowScore]) -> Option<f64> {
    let weight: f64 = scores.iter().map(|score| score.weight).sum();
    let logprob: f64 = scores.iter().map(|score| score.logprob).sum();
    (weight > 0.0).then(|| -logprob / weight)
}

impl Model {
    /// For each prompt the log-probability of each candidate as its next token, in the candidates' order.
    pub fn score_next(
        &self,
        adapter: &PreparedAdapter,
        prefix: Option<&SharedPrefix>,
        prompts: &[Prompt],
        candidates: &[u32],
        cancel: &Cancel,
    ) -> Result<Vec<Vec<f32>>, InferError> {
        check_tokens(self, 0, candidates)?;
        for (row, prompt) in prompts.iter().enumerate() {
            check_prompt(self, row, &prompt.ids, self.context())?;
        }
        let rows: Vec<&[u32]> = prompts.iter().map(|prompt| prompt.ids.as_slice()).collect();
        let wanted: Vec<Vec<usize>> = rows.iter().map(|ids| vec![ids.len() - 1]).collect();
        let mut scores = vec![Vec::new(); prompts.len()];
        self.read_rows(adapter, prefix, &rows, &wanted, cancel, |row, _, logits| {
            scores[row] = logprobs(logits, candidates).ok_or(InferError::NotFinite { row })?;
            Ok(())
        })?;
        Ok(scores)
    }

    /// The log-probability of each row's tokens, weighted by the row's weights.
    pub fn score_rows(
        &self,
        adapter: &PreparedAdapter,
        rows: &[TrainingRow],
        cancel: &Cancel,
    ) -> Result<Vec<RowScore>, InferError> {
        for (index, row) in rows.iter().enumerate() {
            // The last token is predicted but never read, so a row may be one longer than the context.
            check_prompt(self, index, &row.ids, self.context() + 1)?;
            if row.weights.len() != row.ids.len() || row.weights.iter().any(|weight| !weight.is_finite()) {
                let (expected, got) = (row.ids.len(), row.weights.len());
                return Err(InferError::Weights { row: index, expected, got });
            }
        }
        let wanted: Vec<Vec<usize>> = rows
            .iter()
            .map(|row| (1..row.ids.len()).filter(|&at| row.weights[at] != 0.0).map(|at| at - 1).collect())
            .collect();
        // Nothing behind the last wanted position is read.
        let ids: Vec<&[u32]> = rows
            .iter()
            .zip(&wanted)
            .map(|(row, wanted)| &row.ids[..wanted.last().map_or(0, |last| last + 1)])
            .collect();
        let mut scores = vec![RowScore::default(); rows.len()];
        self.read_rows(adapter, None, &ids, &wanted, cancel, |index, at, logits| {
            let (row, score) = (&rows[index], &mut scores[index]);
            let logprob =
                logprobs(logits, &[row.ids[at + 1]]).ok_or(InferError::NotFinite { row: index })?[0];
            score.logprob += f64::from(row.weights[at + 1]) * f64::from(logprob);
            score.weight += f64::from(row.weights[at + 1]);
            score.token_logprobs.push(logprob);
            Ok(())
        })?;
        Ok(scores)
    }

    /// Reads rows, short ones side by side, and hands the logits of the wanted positions to `take`. Rows without a
    /// wanted position are not run.
    fn read_rows(
        &self,
        adapter: &PreparedAdapter,
        prefix: Option<&SharedPrefix>,
        rows: &[&[u32]],
        wanted: &[Vec<usize>],
        cancel: &Cancel,
        mut take: impl FnMut(usize, usize, &[f32]) -> Result<(), InferError>,
    ) -> Result<(), InferError> {
        let run = Run::new(cancel)?;
        let mut alone: Vec<usize> = Vec::new();
        let mut padded: Vec<usize> = Vec::new();
        if let Some(prefix) = prefix {
            prefix.check(adapter)?;
        }
        for row in (0..rows.len()).filter(|&row| !wanted[row].is_empty()) {
            let shared = prefix.map(|prefix| prefix.lane_for(&run, rows[row])).transpose()?.flatten();
            if let (Some(mut lane), Some(prefix)) = (shared, prefix) {
                lane.read(&run, rows[row], prefix.ids().len(), &wanted[row], |at, logits| {
                    take(row, at, logits)
                })?;
            } else if Lane::fits_padded(self, &[rows[row].len()], wanted[row].len()) {
                padded.push(row);
            } else {
                alone.push(row);
            }
        }
        // Rows of similar length waste little padding.
        padded.sort_by_key(|&row| rows[row].len());
        while !padded.is_empty() {
            let fits = |count: &usize| {
                let group = &padded[..*count];
                let lengths: Vec<usize> = group.iter().map(|&row| rows[row].len()).collect();
                Lane::fits_padded(self, &lengths, group.iter().map(|&row| wanted[row].len()).sum())
            };
            let most = padded.len().min(self.options().batch_max);
            let count = (1..=most).take_while(fits).last().unwrap_or(1);
            let group: Vec<usize> = padded.drain(..count).collect();
            let ids: Vec<&[u32]> = group.iter().map(|&row| rows[row]).collect();
            let positions: Vec<Vec<usize>> = group.iter().map(|&row| wanted[row].clone()).collect();
            let capacity = ids.iter().map(|ids| ids.len()).max().unwrap_or(1);
            let mut lane = Lane::new(self, adapter, group.len(), capacity)?;
            lane.read_padded(&run, &ids, &positions, |at, position, logits| {
                take(group[at], position, logits)
            })?;
        }
        let longest = alone.iter().map(|&row| rows[row].len()).max();
        if let Some(longest) = longest {
            let mut lane = Lane::new(self, adapter, 1, longest)?;
            for row in alone {
                lane.read(&run, rows[row], 0, &wanted[row], |at, logits| take(row, at, logits))?;
            }
        }
        Ok(())
    }
}
