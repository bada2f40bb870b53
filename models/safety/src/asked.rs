//! The form of causal models: the guard is asked, and the probabilities of its answer's first token are the score.
//!
//! `question.rs` lays each pair out. One question about the whole pair, whose category is read behind an unsafe
//! answer; or one question for each category, where the template describes a category.

use commonweal_adapter::Adapter;
use commonweal_runtime::{Cancel, InferError, Model, PreparedAdapter, Prompt, SharedPrefix};

use crate::{
    category::CategoryId,
    config::GuardConfig,
    form::{Finding, Form, Near, Start},
    guard::{GuardError, Pair},
    question::Questions,
};

/// From this length on, the cache of what stands before every prompt is computed once and pairs are read one by one
/// behind it. Below, reading it again with every pair of a batch costs less than giving up the batch.
const SHARED_TOKENS_MIN: usize = 48;

/// Questions that are scored in one call: texts may be long, and their questions need not all be in memory.
const QUESTIONS_MAX: usize = 1024;

/// A causal model with its questions.
#[derive(Debug)]
pub(crate) struct Asked {
    model: Model,
    adapter: PreparedAdapter,
    questions: Questions,
    prompt_prefix: Option<SharedPrefix>,
    pair_prefix: Option<SharedPrefix>,
}

/// The most unsafe window of one question.
struct Worst {
    log_odds: f64,
    prompt: Prompt,
}

impl Asked {
    /// Reads the policy, unless it is to rest until the first pair comes.
    pub(crate) fn open(
        model: &Model,
        config: &GuardConfig,
        adapter: Option<&Adapter>,
        start: Start<'_>,
    ) -> Result<Self, GuardError> {
        let questions = Questions::new(model.tokenizer(), config, model.context())?;
        let adapter = model.prepare(adapter)?;
        let share = |with_response| -> Result<Option<SharedPrefix>, InferError> {
            let prefix = questions.prefix(with_response);
            let is_long = prefix.len() >= SHARED_TOKENS_MIN;
            let share = || match start {
                Start::Now(cancel) => model.share_prefix(&adapter, &prefix, cancel),
                Start::AtRest => model.prefix_at_rest(&adapter, &prefix),
            };
            is_long.then(share).transpose()
        };
        let (prompt_prefix, pair_prefix) = (share(false)?, share(true)?);
        Ok(Self { model: model.clone(), adapter, questions, prompt_prefix, pair_prefix })
    }

    /// For every pair and each of its questions the most unsafe window.
    fn worst_windows(&self, pairs: &[Pair<'_>], cancel: &Cancel) -> Result<Vec<Vec<Worst>>, GuardError> {
        let mut worst: Vec<Vec<Worst>> = pairs.iter().map(|_| Vec::new()).collect();
        let (mut owners, mut rows) = (Vec::new(), Vec::new());
        for (owner, pair) in pairs.iter().enumerate() {
            let asked = self.questions.asked(self.model.tokenizer(), *pair)?;
            for (question, windows) in asked.into_iter().enumerate() {
                for window in windows {
                    owners.push((owner, question));
                    let prompt = Prompt::from([self.questions.policy(), &window].concat());
                    rows.push((pair.response.is_some(), prompt));
                }
            }
            if rows.len() >= QUESTIONS_MAX || owner + 1 == pairs.len() {
                self.keep_worst(&mut worst, std::mem::take(&mut owners), std::mem::take(&mut rows), cancel)?;
            }
        }
        Ok(worst)
    }

    /// Scores questions, each of an owner and of its number there, and keeps the most unsafe window of each.
    fn keep_worst(
        &self,
        worst: &mut [Vec<Worst>],
        owners: Vec<(usize, usize)>,
        rows: Vec<(bool, Prompt)>,
        cancel: &Cancel,
    ) -> Result<(), GuardError> {
        let (safe, unsafe_) = self.questions.answers();
        let scores = self.score(&rows, &[safe, unsafe_].concat(), cancel)?;
        for (((owner, question), (_, prompt)), score) in owners.into_iter().zip(rows).zip(scores) {
            let log_odds = log_odds(&score, safe.len()).ok_or(InferError::NotFinite { row: owner })?;
            // Windows come in the order of their questions.
            match worst[owner].get_mut(question) {
                Some(known) if log_odds <= known.log_odds => {}
                Some(known) => *known = Worst { log_odds, prompt },
                None => worst[owner].push(Worst { log_odds, prompt }),
            }
        }
        Ok(())
    }

    /// The log-probabilities of candidates behind each row, each kind of row behind the cache of its own beginning.
    fn score(
        &self,
        rows: &[(bool, Prompt)],
        candidates: &[u32],
        cancel: &Cancel,
    ) -> Result<Vec<Vec<f32>>, GuardError> {
        let run = |prefix: Option<&SharedPrefix>, prompts: &[Prompt]| {
            self.model.score_next(&self.adapter, prefix, prompts, candidates, cancel)
        };
        if self.prompt_prefix.is_none() && self.pair_prefix.is_none() {
            let prompts: Vec<Prompt> = rows.iter().map(|(_, prompt)| prompt.clone()).collect();
            return Ok(run(None, &prompts)?);
        }
        let mut scores = vec![Vec::new(); rows.len()];
        for (with_response, prefix) in [(false, &self.prompt_prefix), (true, &self.pair_prefix)] {
            let (places, prompts): (Vec<usize>, Vec<Prompt>) = rows
                .iter()
                .enumerate()
                .filter(|(_, (kind, _))| *kind == with_response)
                .map(|(place, (_, prompt))| (place, prompt.clone()))
                .unzip();
            for (place, score) in places.into_iter().zip(run(prefix.as_ref(), &prompts)?) {
                scores[place] = score;
            }
        }
        Ok(scores)
    }

    /// Asks for the category where a threshold can be reached.
    fn name_categories(
        &self,
        pairs: &[Pair<'_>],
        found: &mut [Vec<Finding>],
        worst: &[Vec<Worst>],
        near: Near<'_>,
        cancel: &Cancel,
    ) -> Result<(), GuardError> {
        for with_response in [false, true] {
            let categories = self.questions.categories(with_response);
            let tokens: Vec<u32> = categories.iter().map(|(_, token)| *token).collect();
            let mut asked = Vec::new();
            let mut rows = Vec::new();
            for (index, (pair, worst)) in pairs.iter().zip(worst).enumerate() {
                let Some(worst) = worst.first().filter(|worst| near(index, worst.log_odds)) else { continue };
                if pair.response.is_some() == with_response {
                    asked.push(index);
                    let ids = [&worst.prompt.ids, self.questions.to_category()].concat();
                    rows.push((with_response, Prompt::from(ids)));
                }
            }
            if tokens.is_empty() || asked.is_empty() {
                continue;
            }
            for (index, score) in asked.into_iter().zip(self.score(&rows, &tokens, cancel)?) {
                let best = score.iter().zip(&categories).max_by(|(x, _), (y, _)| x.total_cmp(y));
                let category = best.map(|(_, (id, _))| (*id).clone());
                found[index].iter_mut().for_each(|finding| finding.category.clone_from(&category));
            }
        }
        Ok(())
    }
}

impl Form for Asked {
    fn find(
        &self,
        pairs: &[Pair<'_>],
        near: Near<'_>,
        cancel: &Cancel,
    ) -> Result<Vec<Vec<Finding>>, GuardError> {
        let worst = self.worst_windows(pairs, cancel)?;
        let mut found: Vec<Vec<Finding>> = Vec::with_capacity(pairs.len());
        for (pair, worst) in pairs.iter().zip(&worst) {
            let asked_about = self.questions.asked_about(pair.response.is_some());
            let finding = |(worst, category): (&Worst, Option<&CategoryId>)| Finding {
                log_odds: worst.log_odds,
                category: category.cloned(),
            };
            found.push(worst.iter().zip(asked_about).map(finding).collect());
        }
        if !self.questions.asks_by_category() {
            self.name_categories(pairs, &mut found, &worst, near, cancel)?;
        }
        Ok(found)
    }

    fn close_inference(&self) {
        self.model.close_inference();
    }

    fn close(&self) {
        self.model.close();
    }
}

/// ln(p(unsafe) / p(safe)) from log-probabilities, those of the safe answers first. `None` where they say nothing: no
/// comparison with them would hold, and what cannot be judged must not pass for safe.
fn log_odds(scores: &[f32], safe: usize) -> Option<f64> {
    let (safe, unsafe_) = scores.split_at_checked(safe)?;
    if safe.is_empty() || unsafe_.is_empty() {
        return None;
    }
    Some(log_sum(unsafe_) - log_sum(safe)).filter(|odds| !odds.is_nan())
}

/// The logarithm of the sum of probabilities, without underflow; of one, itself.
fn log_sum(logprobs: &[f32]) -> f64 {
    let largest = logprobs.iter().fold(f64::NEG_INFINITY, |largest, &x| largest.max(f64::from(x)));
    if let [one] = logprobs {
        return f64::from(*one);
    }
    if largest == f64::NEG_INFINITY && !logprobs.iter().any(|x| x.is_nan()) {
        return largest;
    }
    largest + logprobs.iter().map(|&x| (f64::from(x) - largest).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_judged_has_no_odds() {
        let none = f32::NEG_INFINITY;
        assert_eq!(log_odds(&[-2.0, -0.5], 1), Some(1.5));
        assert_eq!(log_odds(&[none, -0.5], 1), Some(f64::INFINITY));
        let silent =
            [&[none, none][..], &[f32::NAN, -1.0], &[-1.0], &[none, none, none], &[-1.0, f32::NAN, -1.0]];
        assert_eq!(silent.map(|scores| log_odds(scores, 1)), [None; 5]);
    }

    #[test]
    fn several_answers_of_one_side_add_up() {
        // 0.2 safe; 0.3 and 0.1 unsafe.
        let odds = log_odds(&[0.2_f32.ln(), 0.3_f32.ln(), 0.1_f32.ln()], 1).unwrap();
        assert!((odds - 2.0_f64.ln()).abs() < 1e-6, "{odds}");
        let odds = log_odds(&[0.2_f32.ln(), f32::NEG_INFINITY, 0.1_f32.ln()], 1).unwrap();
        assert!((odds - 0.5_f64.ln()).abs() < 1e-6, "{odds}");
    }
}
