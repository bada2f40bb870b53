//! `guard.toml`: how a guard is asked, what it may answer, and how its answer becomes a probability.
//!
//! Read by [`crate::Guard::open`]. A Llama-Guard-like model is another file of this form, not other code; for the
//! published ones `preset.rs` fills in what their authors fixed.

use serde::{Deserialize, Serialize};

use crate::{
    calibrate::Platt,
    category::{AskedAbout, Category, CategoryId},
    preset,
    problem::{Problem, list},
    words::Spoken,
};

/// A guard's policy, answers and layouts fit in a few kilobytes; more is a wrong file.
const FILE_BYTES_MAX: usize = 256 * 1024;
/// Where a template describes one category.
const CATEGORY_PLACES: [&str; 3] = ["{code}", "{name}", "{description}"];

/// The file `guard.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuardConfig {
    /// 1.
    pub format: u32,
    /// For people.
    pub name: String,
    /// What kind of model the guard is.
    #[serde(default, skip_serializing_if = "Kind::is_question")]
    pub kind: Kind,
    /// The guard's own package, where it is not an adapter over the base: a path, from the base's package if relative.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub package: Option<String>,
    /// The adapter's file in the guard's package; absent when the model itself is the guard.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    /// The text before every question, special tokens included. Its cache is computed once. A classifier has none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub policy: String,
    /// The answer for a safe text. Its first token must differ from that of `unsafe_label`. A classifier's label for
    /// one, where it has such a label.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub safe_label: String,
    /// The answer for an unsafe text. A classifier's label for one, where it has one that is of no category.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub unsafe_label: String,
    /// Further answers that count as safe.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also_safe: Vec<String>,
    /// Further answers that count as unsafe.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also_unsafe: Vec<String>,
    /// Whether each answer must be one token. Otherwise its first token stands for it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub whole_answers: bool,
    /// Tokens that the templates write and the tokenizer must have; another model's would read them as letters.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub special_tokens: Vec<String>,
    /// What stands between `unsafe_label` and a category's label.
    #[serde(default)]
    pub category_lead: String,
    /// One line of the list that `{categories}` in a template stands for; `{code}`, `{name}` and `{description}` are
    /// the category's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub category_line: String,
    /// Unsafe from this calibrated probability on, for categories without their own.
    pub threshold: f64,
    /// Tokens of a prompt that are judged at once. A longer one is judged in windows, the worst counts. A classifier
    /// reads as much as it can.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub prompt_tokens_max: usize,
    /// Tokens of a response that are judged at once, likewise.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub response_tokens_max: usize,
    /// Whether a classifier that knows no pairs reads prompt and response each by itself; the worse counts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub separate_texts: bool,
    /// Asked about a prompt alone.
    #[serde(default)]
    pub prompt: Layout,
    /// Asked about a prompt with its response.
    #[serde(default)]
    pub pair: Layout,
    /// A model of words that is heard beside the guard's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub words: Option<WordsUse>,
    /// The kinds of harm; none when the guard only says safe or unsafe.
    #[serde(default)]
    pub categories: Vec<Category>,
}

/// What kind of model a guard is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A causal model that is asked, and answers with a token.
    #[default]
    Question,
    /// An encoder that gives every label a probability; in a package of its own.
    Classifier,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde calls")]
fn is_zero(number: &usize) -> bool {
    *number == 0
}

impl Kind {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde calls")]
    fn is_question(&self) -> bool {
        *self == Self::Question
    }
}

/// One question: how the text is laid out, and the calibration of the answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layout {
    /// Text with `{prompt}` and, for a pair, `{response}`, each once and in this order. Special tokens written
    /// here are special; the same characters in a person's text are not. `{categories}` is the list of categories.
    /// With `{code}`, `{name}` or `{description}` the guard is asked about each category in turn. A classifier has
    /// none: it reads the texts as its tokenizer frames them.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub template: String,
    /// Unsafe from this calibrated probability on; the guard's own threshold where absent. A category's goes before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
    /// From the raw log-odds of the labels to a probability.
    #[serde(default)]
    pub calibration: Platt,
}

/// A file of [`crate::Words`], and how much its log-odds count beside the guard's, which count 1. The sum is calibrated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WordsUse {
    /// The file, in the package that has `guard.toml`.
    pub file: String,
    /// The weight of a prompt's words, where the prompt stands alone.
    pub prompt: f64,
    /// Their weight where it has a response.
    pub pair_prompt: f64,
    /// The weight of what the words of both say together.
    pub pair: f64,
}

impl WordsUse {
    /// Gives every score of prompts alone, or of pairs, the same weight.
    pub fn weigh(&mut self, weight: f64, with_response: bool) {
        if with_response {
            (self.pair_prompt, self.pair) = (weight, weight);
        } else {
            self.prompt = weight;
        }
    }

    /// What is added to the guard's log-odds.
    pub fn log_odds(&self, spoken: Spoken, with_response: bool) -> f64 {
        if with_response {
            self.pair_prompt * spoken.prompt + self.pair * spoken.pair
        } else {
            self.prompt * spoken.prompt
        }
    }
}

/// Why `guard.toml` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Larger than any real guard.
    #[error("guard configuration has {bytes} bytes, expected at most {FILE_BYTES_MAX}")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// Not TOML, or a field is missing, unknown or of another type.
    #[error("guard configuration does not parse")]
    Parse(#[source] toml::de::Error),
    /// No preset has this name.
    #[error("guard form {form:?} is not known, expected one of {}", known.join(", "))]
    UnknownForm {
        /// What the file says.
        form: String,
        /// The presets.
        known: Vec<&'static str>,
    },
    /// Every value that is out of its range.
    #[error("guard configuration is not valid: {}", list(.0))]
    Invalid(Vec<Problem>),
}

impl GuardConfig {
    /// Parses and validates `guard.toml`, written out or with a preset's name as `form`.
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        if text.len() > FILE_BYTES_MAX {
            return Err(ConfigError::TooLarge { bytes: text.len() });
        }
        let file: toml::Table = toml::from_str(text).map_err(ConfigError::Parse)?;
        let config = if file.contains_key("form") {
            preset::expand(file)?
        } else {
            toml::from_str(text).map_err(ConfigError::Parse)?
        };
        config.validate().map_err(ConfigError::Invalid)?;
        Ok(config)
    }

    /// The file's text.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    /// The threshold for a category of a prompt alone or of a pair, or that of all of these, or the guard's own.
    pub fn threshold_for(&self, category: Option<&CategoryId>, with_response: bool) -> f64 {
        category
            .and_then(|id| self.categories.iter().find(|c| c.id == *id))
            .and_then(|c| c.threshold)
            .or(self.layout(with_response).threshold)
            .unwrap_or(self.threshold)
    }

    /// Below this probability nothing can make a text unsafe.
    pub fn threshold_min(&self) -> f64 {
        self.own_thresholds().fold(self.threshold, f64::min)
    }

    /// The thresholds of layouts and categories.
    pub(crate) fn own_thresholds(&self) -> impl Iterator<Item = f64> {
        let layouts = [self.prompt.threshold, self.pair.threshold];
        layouts.into_iter().chain(self.categories.iter().map(|category| category.threshold)).flatten()
    }

    /// What is asked about a prompt alone, or about a pair.
    pub(crate) fn layout(&self, with_response: bool) -> &Layout {
        if with_response { &self.pair } else { &self.prompt }
    }

    /// Every answer with its field, the safe ones first; whether it is an unsafe one.
    pub(crate) fn answers(&self) -> Vec<(String, &str, bool)> {
        let mut answers = Vec::new();
        for (first, label, field, others, is_unsafe) in [
            (&self.safe_label, "safe_label", "also_safe", &self.also_safe, false),
            (&self.unsafe_label, "unsafe_label", "also_unsafe", &self.also_unsafe, true),
        ] {
            // A classifier may have no label of a side.
            if self.kind == Kind::Question || !first.is_empty() {
                answers.push((label.to_owned(), first.as_str(), is_unsafe));
            }
            for (i, other) in others.iter().enumerate() {
                answers.push((format!("{field}[{i}]"), other.as_str(), is_unsafe));
            }
        }
        answers
    }

    /// Whether each category is a question of its own.
    pub(crate) fn asks_by_category(&self) -> bool {
        self.pair.asks_by_category()
    }

    /// The questions about a prompt or a pair, categories written in: one, or one for each category.
    pub(crate) fn templates(&self, with_response: bool) -> Vec<(Option<CategoryId>, String)> {
        let layout = self.layout(with_response);
        let applies = |category: &&Category| AskedAbout::applies(category.only, with_response);
        let categories = || self.categories.iter().filter(applies);
        let lines: Vec<String> = categories().map(|category| category.fill(&self.category_line)).collect();
        let template = layout.template.replace("{categories}", &lines.join("\n"));
        if !layout.asks_by_category() {
            return vec![(None, template)];
        }
        categories().map(|category| (Some(category.id.clone()), category.fill(&template))).collect()
    }

    /// What stays when thresholds and calibration are set: the form, which only the model can be opened with.
    pub(crate) fn without_thresholds(&self) -> Self {
        let mut form = self.clone();
        form.threshold = 1.0;
        form.categories.iter_mut().for_each(|category| category.threshold = None);
        (form.prompt.threshold, form.pair.threshold) = (None, None);
        (form.prompt.calibration, form.pair.calibration) = (Platt::default(), Platt::default());
        form
    }
}

impl Layout {
    /// Whether the template describes one category.
    pub(crate) fn asks_by_category(&self) -> bool {
        CATEGORY_PLACES.iter().any(|place| self.template.contains(place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = include_str!("../tests/data/guard.toml");

    #[test]
    fn a_file_round_trips() {
        let config = GuardConfig::from_toml(GOOD).unwrap();
        assert_eq!(GuardConfig::from_toml(&config.to_toml().unwrap()).unwrap(), config);
        assert_eq!(config.categories.len(), 2);
    }

    #[test]
    fn thresholds_fall_back_to_the_guards_own() {
        let config = GuardConfig::from_toml(GOOD).unwrap();
        let id = |text: &str| text.parse().unwrap();
        let close =
            |got: f64, expected: f64| assert!((got - expected).abs() < 1e-12, "{got}, not {expected}");
        close(config.threshold_for(Some(&id("violence")), true), 0.4);
        close(config.threshold_for(Some(&id("privacy")), true), 0.5);
        close(config.threshold_for(None, true), 0.5);
        close(config.threshold_min(), 0.4);
        let config = GuardConfig { pair: Layout { threshold: Some(0.3), ..config.pair.clone() }, ..config };
        assert_eq!(GuardConfig::from_toml(&config.to_toml().unwrap()).unwrap(), config);
        close(config.threshold_for(Some(&id("violence")), true), 0.4);
        close(config.threshold_for(Some(&id("privacy")), true), 0.3);
        close(config.threshold_for(None, false), 0.5);
        close(config.threshold_min(), 0.3);
    }

    #[test]
    fn an_unknown_field_and_a_huge_file_are_refused() {
        let unknown = format!("{GOOD}\nsurprise = 1\n");
        assert!(matches!(GuardConfig::from_toml(&unknown), Err(ConfigError::Parse(_))));
        let huge = "#".repeat(FILE_BYTES_MAX + 1);
        assert!(matches!(GuardConfig::from_toml(&huge), Err(ConfigError::TooLarge { .. })));
    }
}
