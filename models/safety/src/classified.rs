//! The form of encoders that classify: the guard's labels have probabilities, and those that mean harm are the score.
//!
//! A label means a safe text, an unsafe one, or one of a category; none may be left without a meaning. Where exactly one
//! label holds (softmax) the score is the odds of all unsafe labels together, and the category is the most probable;
//! where each holds by itself (sigmoid) every unsafe label is a finding of its own.

use commonweal_package::Probabilities;
use commonweal_runtime::{Cancel, Classifier};

use crate::{
    category::CategoryId,
    config::GuardConfig,
    form::{Finding, Form, Near},
    guard::{GuardError, Pair},
};

/// Why a configuration does not fit a classifier's labels.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// The classifier has a label of which the configuration says nothing.
    #[error(
        "label {label:?} of the classifier must be safe, unsafe or of a category, the configuration has none of it"
    )]
    Unmapped {
        /// The label.
        label: String,
    },
    /// The configuration has a label that the classifier does not know.
    #[error("label {label:?} of the configuration must be one of {}", known.join(", "))]
    Unknown {
        /// The label.
        label: String,
        /// The classifier's.
        known: Vec<String>,
    },
    /// Exactly one label holds, and none of them is safe.
    #[error("one label of the classifier must mean a safe text, the configuration names none")]
    NoSafe,
}

/// What a label means.
#[derive(Clone, Debug, PartialEq)]
enum Meaning {
    Safe,
    Unsafe(Option<CategoryId>),
}

/// A classifier whose every label has a meaning.
#[derive(Debug)]
pub(crate) struct Classified {
    classifier: Classifier,
    /// In the order of the logits.
    meanings: Vec<Meaning>,
    separate_texts: bool,
}

impl Classified {
    pub(crate) fn open(classifier: Classifier, config: &GuardConfig) -> Result<Self, GuardError> {
        let meanings = meanings(classifier.labels(), config)?;
        let is_softmax = classifier.manifest().encoder.probabilities == Probabilities::Softmax;
        if is_softmax && !meanings.contains(&Meaning::Safe) {
            return Err(LabelError::NoSafe.into());
        }
        Ok(Self { classifier, meanings, separate_texts: config.separate_texts })
    }
}

impl Form for Classified {
    /// Categories cost nothing here, so that they are named whether a threshold is near or not.
    fn find(
        &self,
        pairs: &[Pair<'_>],
        _near: Near<'_>,
        cancel: &Cancel,
    ) -> Result<Vec<Vec<Finding>>, GuardError> {
        let (mut owners, mut texts) = (Vec::new(), Vec::new());
        for (owner, pair) in pairs.iter().enumerate() {
            let (prompt, response) = (pair.prompt.trim(), pair.response.map(str::trim));
            let whole = if self.separate_texts { None } else { response };
            owners.push(owner);
            texts.push((prompt, whole));
            if let Some(response) = response.filter(|_| self.separate_texts) {
                owners.push(owner);
                texts.push((response, None));
            }
        }
        let kind = self.classifier.manifest().encoder.probabilities;
        let mut found: Vec<Vec<Finding>> = vec![Vec::new(); pairs.len()];
        for (owner, windows) in owners.into_iter().zip(self.classifier.window_logits(&texts, cancel)?) {
            for logits in windows {
                keep_worst(&mut found[owner], findings(&logits, &self.meanings, kind));
            }
        }
        Ok(found)
    }

    /// Beside a training step there is room for it: an encoder is small.
    fn close_inference(&self) {}

    fn close(&self) {
        self.classifier.close();
    }
}

/// What each label means; every label of either side must be one of the other.
fn meanings(labels: &[String], config: &GuardConfig) -> Result<Vec<Meaning>, LabelError> {
    let answers = config.answers();
    let answers = answers
        .iter()
        .map(|&(_, label, is_unsafe)| (label, if is_unsafe { Meaning::Unsafe(None) } else { Meaning::Safe }));
    let categories = config.categories.iter();
    let categories =
        categories.map(|category| (category.label.as_str(), Meaning::Unsafe(Some(category.id.clone()))));
    let configured: Vec<(&str, Meaning)> = answers.chain(categories).collect();
    if let Some((label, _)) = configured.iter().find(|(label, _)| !labels.iter().any(|known| known == label))
    {
        return Err(LabelError::Unknown { label: (*label).to_owned(), known: labels.to_vec() });
    }
    let meaning = |label: &String| {
        let found = configured.iter().find(|(known, _)| known == label);
        found.map(|(_, meaning)| meaning.clone()).ok_or_else(|| LabelError::Unmapped { label: label.clone() })
    };
    labels.iter().map(meaning).collect()
}

/// What one window says, in the same order for every window. The logits are finite, so that no odds are NaN.
fn findings(logits: &[f32], meanings: &[Meaning], kind: Probabilities) -> Vec<Finding> {
    let labels = || logits.iter().map(|&logit| f64::from(logit)).zip(meanings);
    let harm = || {
        labels().filter_map(|(logit, meaning)| match meaning {
            Meaning::Safe => None,
            Meaning::Unsafe(category) => Some((logit, category)),
        })
    };
    match kind {
        Probabilities::Sigmoid => {
            harm().map(|(log_odds, category)| Finding { log_odds, category: category.clone() }).collect()
        }
        Probabilities::Softmax => {
            let safe = labels().filter(|(_, meaning)| **meaning == Meaning::Safe).map(|(logit, _)| logit);
            let log_odds = log_sum(harm().map(|(logit, _)| logit)) - log_sum(safe);
            let named = harm().filter(|(_, category)| category.is_some());
            let category =
                named.max_by(|x, y| x.0.total_cmp(&y.0)).and_then(|(_, category)| category.clone());
            vec![Finding { log_odds, category }]
        }
    }
}

/// Finding by finding the one with the greater odds.
fn keep_worst(worst: &mut Vec<Finding>, found: Vec<Finding>) {
    if worst.is_empty() {
        *worst = found;
        return;
    }
    for (worst, found) in worst.iter_mut().zip(found) {
        if found.log_odds > worst.log_odds {
            *worst = found;
        }
    }
}

/// ln(Σ e^x), without overflow.
fn log_sum(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let largest = values.clone().fold(f64::NEG_INFINITY, f64::max);
    largest + values.map(|x| (x - largest).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn harm(id: &str) -> Meaning {
        Meaning::Unsafe(Some(id.parse().unwrap()))
    }

    #[test]
    fn one_label_of_several_gives_one_finding() {
        let meanings = [Meaning::Safe, harm("violence"), harm("privacy"), Meaning::Unsafe(None)];
        // 0.4 safe; 0.1, 0.2 and 0.3 unsafe.
        let logits = [0.4_f32.ln(), 0.1_f32.ln(), 0.2_f32.ln(), 0.3_f32.ln()];
        let found = findings(&logits, &meanings, Probabilities::Softmax);
        assert_eq!(found.len(), 1);
        assert!((found[0].log_odds - 1.5_f64.ln()).abs() < 1e-6, "{found:?}");
        // Of those that are a category.
        assert_eq!(found[0].category.as_ref().unwrap().as_str(), "privacy");
        let huge = findings(&[1000.0, 2000.0], &meanings[..2], Probabilities::Softmax);
        assert!((huge[0].log_odds - 1000.0).abs() < 1e-9);
    }

    #[test]
    fn labels_that_hold_by_themselves_are_findings_apart() {
        let meanings = [harm("violence"), Meaning::Safe, Meaning::Unsafe(None)];
        let mut worst = findings(&[1.0, 5.0, -2.0], &meanings, Probabilities::Sigmoid);
        keep_worst(&mut worst, findings(&[-3.0, 5.0, 4.0], &meanings, Probabilities::Sigmoid));
        let odds: Vec<f64> = worst.iter().map(|finding| finding.log_odds).collect();
        assert_eq!(odds, [1.0, 4.0]);
        assert_eq!((worst[0].category.is_some(), worst[1].category.is_some()), (true, false));
    }
}
