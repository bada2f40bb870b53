//! The guard: how probable is it that a pair is unsafe, and in which way.
//!
//! A form (`form.rs`) finds what a model says about each pair, `calibrate.rs` makes it a probability, the thresholds
//! decide. What comes out goes to a device's filter, to `revise.rs` and to the aggregator's evaluation.

use std::fmt;

use commonweal_adapter::Adapter;
use commonweal_runtime::{AdaptError, Cancel, Classifier, ClassifyError, InferError, Model, TokenizeError};

use crate::{
    add_words::WithWords,
    asked::Asked,
    category::CategoryId,
    classified::{Classified, LabelError},
    config::{ConfigError, GuardConfig, Kind},
    form::{Finding, Form, Start},
    question::QuestionError,
    words::{Words, WordsFileError},
};

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
    /// The same before calibration: ln(p(unsafe) / p(safe)), what the words say added.
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
    config: GuardConfig,
    form: Box<dyn Form>,
}

/// Why a guard could not be opened or could not judge.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// The configuration has values out of range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The configuration names another package, and this model is not known to be it.
    #[error("guard is the package {package}, expected a configuration for the model that is open")]
    OtherPackage {
        /// What the configuration says.
        package: String,
    },
    /// More than thresholds and calibration was changed.
    #[error("guard {name} is open with other settings, only thresholds and calibration can be changed")]
    OtherForm {
        /// The guard's name.
        name: String,
    },
    /// The configuration is for another kind of model.
    #[error("guard {name} needs {expected}, got another kind of model")]
    OtherKind {
        /// The guard's name.
        name: String,
        /// What it needs.
        expected: &'static str,
    },
    /// The words that the configuration names cannot be used.
    #[error("guard's words cannot be used")]
    Words(#[from] WordsFileError),
    /// A model of words came without its place in the configuration, or the other way round.
    #[error("guard {name} must come {expected} a model of words")]
    OtherWords {
        /// The guard's name.
        name: String,
        /// With or without.
        expected: &'static str,
    },
    /// The configuration does not fit the classifier's labels.
    #[error("guard configuration does not fit the classifier")]
    Labels(#[from] LabelError),
    /// The classifier could not be run.
    #[error("guard cannot classify")]
    Classify(#[source] ClassifyError),
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

impl From<ClassifyError> for GuardError {
    /// A cancelled call is the same whatever it ran.
    fn from(error: ClassifyError) -> Self {
        match error {
            ClassifyError::Cancelled => Self::Infer(InferError::Cancelled),
            error => Self::Classify(error),
        }
    }
}

impl GuardError {
    /// Whether one pair is to blame, so that others can be judged.
    pub fn is_of_a_pair(&self) -> bool {
        match self {
            Self::Tokenize(_) => true,
            Self::Question(error) => {
                matches!(error, QuestionError::Windows { .. } | QuestionError::Tokenize(_))
            }
            Self::Classify(error) => {
                !matches!(error, ClassifyError::Cancelled | ClassifyError::Open(_) | ClassifyError::Engine(_))
            }
            Self::Infer(error) => matches!(
                error,
                InferError::Empty { .. }
                    | InferError::TooLong { .. }
                    | InferError::Token { .. }
                    | InferError::NotFinite { .. }
                    | InferError::Tokenize(_)
            ),
            _ => false,
        }
    }
}

impl Guard {
    /// Checks the configuration against the model, and reads the policy. `adapter` is the guard's own; `None` when
    /// the model itself is the guard. Words that the configuration names are those of the model's package. A
    /// configuration that names a package of the guard's own is refused: [`Guard::from_package`] opens that one.
    pub fn open(
        model: &Model,
        config: GuardConfig,
        adapter: Option<&Adapter>,
        cancel: &Cancel,
    ) -> Result<Self, GuardError> {
        if let Some(package) = config.package {
            return Err(GuardError::OtherPackage { package });
        }
        let words = config.open_words(model.package())?;
        Self::over(model, config, adapter, words, Start::Now(cancel))
    }

    /// Like [`Guard::open`], with words from elsewhere.
    pub fn open_with_words(
        model: &Model,
        config: GuardConfig,
        adapter: Option<&Adapter>,
        words: Option<Words>,
        cancel: &Cancel,
    ) -> Result<Self, GuardError> {
        if let Some(package) = config.package {
            return Err(GuardError::OtherPackage { package });
        }
        Self::over(model, config, adapter, words, Start::Now(cancel))
    }

    /// Like [`Guard::open`], over the model that the configuration names.
    pub(crate) fn over(
        model: &Model,
        config: GuardConfig,
        adapter: Option<&Adapter>,
        words: Option<Words>,
        start: Start<'_>,
    ) -> Result<Self, GuardError> {
        config.validate().map_err(ConfigError::Invalid)?;
        match config.kind {
            Kind::Question => {
                let form = Box::new(Asked::open(model, &config, adapter, start)?);
                Self::of_form(form, config, words)
            }
            Kind::Classifier => Err(GuardError::OtherKind { name: config.name, expected: "an encoder" }),
        }
    }

    /// Checks the configuration of a classifier against its labels. [`Guard::from_package`] opens the one that a
    /// configuration names.
    pub fn of_classifier(
        classifier: Classifier,
        config: GuardConfig,
        words: Option<Words>,
    ) -> Result<Self, GuardError> {
        config.validate().map_err(ConfigError::Invalid)?;
        if config.kind != Kind::Classifier {
            return Err(GuardError::OtherKind { name: config.name, expected: "a model that is asked" });
        }
        let form = Box::new(Classified::open(classifier, &config)?);
        Self::of_form(form, config, words)
    }

    /// A guard whose configuration names words is none without them.
    fn of_form(form: Box<dyn Form>, config: GuardConfig, words: Option<Words>) -> Result<Self, GuardError> {
        let form = match (&config.words, words) {
            (None, None) => form,
            (Some(heard), Some(words)) => Box::new(WithWords { form, words, heard: heard.clone() }),
            (heard, _) => {
                let expected = if heard.is_some() { "with" } else { "without" };
                return Err(GuardError::OtherWords { name: config.name, expected });
            }
        };
        Ok(Self { config, form })
    }

    /// The same guard by other thresholds or another calibration, such as those of a device's owner.
    pub fn with_thresholds(self, config: GuardConfig) -> Result<Self, GuardError> {
        config.validate().map_err(ConfigError::Invalid)?;
        if config.without_thresholds() != self.config.without_thresholds() {
            return Err(GuardError::OtherForm { name: self.config.name });
        }
        Ok(Self { config, form: self.form })
    }

    /// The configuration.
    pub fn config(&self) -> &GuardConfig {
        &self.config
    }

    /// A judgement for every pair, in their order.
    pub fn judge(&self, pairs: &[Pair<'_>], cancel: &Cancel) -> Result<Vec<Judgement>, GuardError> {
        let lowest = self.config.threshold_min();
        let near = |index: usize, log_odds: f64| self.probability(pairs[index], log_odds) >= lowest;
        let found = self.form.find(pairs, &near, cancel)?;
        if found.len() != pairs.len() {
            return Err(InferError::Empty { row: found.len() }.into());
        }
        let judged = pairs.iter().zip(&found).enumerate();
        let worst = judged.map(|(row, (pair, found))| {
            let judgements = found.iter().map(|finding| self.judgement(*pair, finding, lowest));
            let worst = judgements
                .max_by(|x, y| x.is_unsafe.cmp(&y.is_unsafe).then(x.probability.total_cmp(&y.probability)));
            worst.ok_or(GuardError::Infer(InferError::Empty { row }))
        });
        worst.collect()
    }

    /// Like [`Guard::judge`], but a pair that cannot be judged is an error of its own and the others are judged all the
    /// same: one with more text than is read, or of which the model's output says nothing. Such a pair must not pass for
    /// safe. An error of the whole is one of the model or of the call.
    pub fn judge_each(
        &self,
        pairs: &[Pair<'_>],
        cancel: &Cancel,
    ) -> Result<Vec<Result<Judgement, GuardError>>, GuardError> {
        match self.judge(pairs, cancel) {
            Ok(judgements) => Ok(judgements.into_iter().map(Ok).collect()),
            Err(error) if !error.is_of_a_pair() => Err(error),
            Err(error) if pairs.len() == 1 => Ok(vec![Err(error)]),
            Err(_) => {
                let each = pairs.iter().map(|pair| self.judge_each(&[*pair], cancel));
                Ok(each.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
            }
        }
    }

    /// The judgement of one pair.
    pub fn judge_one(&self, pair: Pair<'_>, cancel: &Cancel) -> Result<Judgement, GuardError> {
        let mut judgements = self.judge(&[pair], cancel)?;
        judgements.pop().ok_or(GuardError::Infer(InferError::Empty { row: 0 }))
    }

    /// Gives back the memory of the inference sessions, whether the guard is over the base or a model of its own; the next
    /// call opens them again. A classifier keeps its one session.
    pub fn close_inference(&self) {
        self.form.close_inference();
    }

    /// Gives back all that was opened, of the base too where the guard is over it; the next call opens it again.
    pub fn close(&self) {
        self.form.close();
    }

    fn probability(&self, pair: Pair<'_>, log_odds: f64) -> f64 {
        self.config.layout(pair.response.is_some()).calibration.probability(log_odds)
    }

    /// What a finding means; its category matters from the lowest threshold on.
    fn judgement(&self, pair: Pair<'_>, finding: &Finding, lowest: f64) -> Judgement {
        let probability = self.probability(pair, finding.log_odds);
        let threshold = self.config.threshold_for(finding.category.as_ref(), pair.response.is_some());
        let category = finding.category.clone().filter(|_| probability >= lowest);
        let is_unsafe = probability >= threshold;
        Judgement { probability, log_odds: finding.log_odds, category, threshold, is_unsafe }
    }
}
