//! The guard: how probable is it that a pair is unsafe, and in which way.
//!
//! `question.rs` lays each pair out, the model scores the label tokens, `calibrate.rs` makes it a probability. What
//! comes out goes to a device's filter, to `revise.rs` and to the aggregator's evaluation.

use std::fmt;

use commonweal_adapter::Adapter;
use commonweal_runtime::{
    AdaptError, Cancel, InferError, Model, PreparedAdapter, Prompt, SharedPrefix, TokenizeError,
};

use crate::{
    category::CategoryId,
    config::{ConfigError, GuardConfig},
    question::{QuestionError, Questions},
};

/// From this length on, the policy's cache is computed once and pairs are read one by one behind it. Below, reading
/// the policy again with every pair of a batch costs less than giving up the batch.
const SHARED_POLICY_TOKENS_MIN: usize = 48;

/// What is judged: a prompt alone, or a prompt with its response.
#[derive(Clone, Copy)]
pub struct Pair<'t> {
    /// What was asked.
    pub prompt: &'t str,
    /// What was answered.
    pub response: Option<&'t str>,
}

impl fmt::Debug for Pair<'_> {
    /// Lengths only: a pair in a log must not be a person's text in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pair")
            .field("prompt_bytes", &self.prompt.len())
            .field("response_bytes", &self.response.map(str::len))
            .finish()
    }
}

/// What the guard says about one pair.
#[derive(Clone, Debug, PartialEq)]
pub struct Judgement {
    /// Calibrated probability that the pair is unsafe, 0 to 1; of the worst window where there are several.
    pub probability: f64,
    /// The same before calibration: ln(p(unsafe) / p(safe)).
    pub log_odds: f64,
    /// The most probable kind of harm; `None` when no threshold is near, or the guard knows no categories.
    pub category: Option<CategoryId>,
    /// The threshold that applied.
    pub threshold: f64,
    /// Whether `probability` reaches it.
    pub is_unsafe: bool,
}

/// A guard over an open model. Cheap calls, no text kept.
#[derive(Debug)]
pub struct Guard {
    model: Model,
    adapter: PreparedAdapter,
    config: GuardConfig,
    questions: Questions,
    policy: Option<SharedPrefix>,
}

/// Why a guard could not be opened or could not judge.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// The configuration has values out of range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The configuration does not fit the tokenizer or the context.
    #[error("guard configuration does not fit the model")]
    Question(#[from] QuestionError),
    /// The adapter does not fit the model.
    #[error("guard adapter does not fit the model")]
    Adapt(#[from] AdaptError),
    /// A text could not be encoded.
    #[error("pair cannot be encoded for the guard")]
    Tokenize(#[from] TokenizeError),
    /// The model could not be run, or the call was cancelled.
    #[error("guard cannot score")]
    Infer(#[from] InferError),
}

impl Guard {
    /// Checks the configuration against the model, and reads the policy. `adapter` is the guard's own; `None` when
    /// the base itself is the guard.
    pub fn open(
        model: &Model,
        config: GuardConfig,
        adapter: Option<&Adapter>,
        cancel: &Cancel,
    ) -> Result<Self, GuardError> {
        config.validate().map_err(ConfigError::Invalid)?;
        let questions = Questions::new(model.tokenizer(), &config, model.context())?;
        let adapter = model.prepare(adapter)?;
        let is_long = questions.policy().len() >= SHARED_POLICY_TOKENS_MIN;
        let policy =
            if is_long { Some(model.share_prefix(&adapter, questions.policy(), cancel)?) } else { None };
        Ok(Self { model: model.clone(), adapter, config, questions, policy })
    }

    /// The configuration.
    pub fn config(&self) -> &GuardConfig {
        &self.config
    }

    /// A judgement for every pair, in their order.
    pub fn judge(&self, pairs: &[Pair<'_>], cancel: &Cancel) -> Result<Vec<Judgement>, GuardError> {
        let worst = self.worst_windows(pairs, cancel)?;
        let mut judgements: Vec<Judgement> = Vec::with_capacity(pairs.len());
        for (pair, (log_odds, _)) in pairs.iter().zip(&worst) {
            let layout = if pair.response.is_some() { &self.config.pair } else { &self.config.prompt };
            let probability = layout.calibration.probability(*log_odds);
            let threshold = self.config.threshold;
            judgements.push(Judgement {
                probability,
                log_odds: *log_odds,
                category: None,
                threshold,
                is_unsafe: probability >= threshold,
            });
        }
        self.name_categories(&mut judgements, worst, cancel)?;
        Ok(judgements)
    }

    /// The judgement of one pair.
    pub fn judge_one(&self, pair: Pair<'_>, cancel: &Cancel) -> Result<Judgement, GuardError> {
        let mut judgements = self.judge(&[pair], cancel)?;
        judgements.pop().ok_or(GuardError::Infer(InferError::Empty { row: 0 }))
    }

    /// For every pair the log-odds and the question of its most unsafe window.
    fn worst_windows(&self, pairs: &[Pair<'_>], cancel: &Cancel) -> Result<Vec<(f64, Vec<u32>)>, GuardError> {
        let (mut owners, mut prompts) = (Vec::new(), Vec::new());
        for (owner, pair) in pairs.iter().enumerate() {
            for window in self.questions.windows(self.model.tokenizer(), *pair)? {
                owners.push(owner);
                prompts.push(Prompt::from([self.questions.policy(), &window].concat()));
            }
        }
        let labels = self.questions.labels();
        let scores = self.model.score_next(&self.adapter, self.policy.as_ref(), &prompts, &labels, cancel)?;
        let mut worst = vec![(f64::NEG_INFINITY, Vec::new()); pairs.len()];
        for ((owner, prompt), score) in owners.into_iter().zip(prompts).zip(scores) {
            let log_odds = log_odds(&score).ok_or(InferError::NotFinite { row: owner })?;
            if log_odds > worst[owner].0 {
                worst[owner] = (log_odds, prompt.ids);
            }
        }
        Ok(worst)
    }

    /// Asks for the category where a threshold can be reached, and applies the category's own.
    fn name_categories(
        &self,
        judgements: &mut [Judgement],
        worst: Vec<(f64, Vec<u32>)>,
        cancel: &Cancel,
    ) -> Result<(), GuardError> {
        let categories = self.questions.categories();
        let tokens: Vec<u32> = categories.iter().map(|(_, token)| *token).collect();
        let asked: Vec<usize> = judgements
            .iter()
            .enumerate()
            .filter(|(_, judgement)| judgement.probability >= self.config.threshold_min())
            .map(|(index, _)| index)
            .collect();
        if tokens.is_empty() || asked.is_empty() {
            return Ok(());
        }
        let mut questions: Vec<Option<Vec<u32>>> = worst.into_iter().map(|(_, ids)| Some(ids)).collect();
        let prompts: Vec<Prompt> = asked
            .iter()
            .map(|&index| {
                let mut ids = questions[index].take().unwrap_or_default();
                ids.extend(self.questions.to_category());
                Prompt::from(ids)
            })
            .collect();
        let scores = self.model.score_next(&self.adapter, self.policy.as_ref(), &prompts, &tokens, cancel)?;
        for (index, score) in asked.into_iter().zip(scores) {
            let best = score.iter().zip(categories).max_by(|(x, _), (y, _)| x.total_cmp(y));
            let judgement = &mut judgements[index];
            judgement.category = best.map(|(_, (id, _))| id.clone());
            judgement.threshold = self.config.threshold_for(judgement.category.as_ref());
            judgement.is_unsafe = judgement.probability >= judgement.threshold;
        }
        Ok(())
    }
}

/// ln(p(unsafe) / p(safe)). `None` where the two scores say nothing: no comparison with them would hold, and what
/// cannot be judged must not pass for safe.
fn log_odds(scores: &[f32]) -> Option<f64> {
    let &[safe, unsafe_] = scores else { return None };
    Some(f64::from(unsafe_) - f64::from(safe)).filter(|odds| !odds.is_nan())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_judged_has_no_odds() {
        let none = f32::NEG_INFINITY;
        assert_eq!(log_odds(&[-2.0, -0.5]), Some(1.5));
        assert_eq!(log_odds(&[none, -0.5]), Some(f64::INFINITY));
        assert_eq!([log_odds(&[none, none]), log_odds(&[f32::NAN, -1.0]), log_odds(&[-1.0])], [None; 3]);
    }
}
