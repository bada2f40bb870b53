//! `guard.toml`: how a guard is asked, what it may answer, and how its answer becomes a probability.
//!
//! Read by [`crate::Guard::open`]. A Llama-Guard-like model is another file of this form, not other code.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{calibrate::Platt, category::Category};

/// A guard's policy, answers and layouts fit in a few kilobytes; more is a wrong file.
const FILE_BYTES_MAX: usize = 256 * 1024;
/// Llama Guard 3 has 14 categories; 64 leaves room for a finer taxonomy.
const CATEGORIES_MAX: usize = 64;
/// A window of text for one judgement: no model of ours reads more than this at once.
const WINDOW_TOKENS_MAX: usize = 32_768;

/// The file `guard.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuardConfig {
    /// 1.
    pub format: u32,
    /// For people.
    pub name: String,
    /// The adapter's file in the package; absent when the base itself is the guard.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    /// The text before every question, special tokens included. Its cache is computed once.
    pub policy: String,
    /// The answer for a safe text. Its first token must differ from that of `unsafe_label`.
    pub safe_label: String,
    /// The answer for an unsafe text.
    pub unsafe_label: String,
    /// What stands between `unsafe_label` and a category's label.
    #[serde(default)]
    pub category_lead: String,
    /// Unsafe from this calibrated probability on, for categories without their own.
    pub threshold: f64,
    /// Tokens of a prompt that are judged at once. A longer one is judged in windows, the worst counts.
    pub prompt_tokens_max: usize,
    /// Tokens of a response that are judged at once, likewise.
    pub response_tokens_max: usize,
    /// Asked about a prompt alone.
    pub prompt: Layout,
    /// Asked about a prompt with its response.
    pub pair: Layout,
    /// The kinds of harm; none when the guard only says safe or unsafe.
    #[serde(default)]
    pub categories: Vec<Category>,
}

/// One question: how the text is laid out, and the calibration of the answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layout {
    /// Text with `{prompt}` and, for a pair, `{response}`, each once and in this order. Special tokens written
    /// here are special; the same characters in a person's text are not.
    pub template: String,
    /// From the raw log-odds of the labels to a probability.
    #[serde(default)]
    pub calibration: Platt,
}

/// Where in a file a problem is, for example `categories[3].label`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place(pub String);

/// One thing that is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where.
    pub place: Place,
    /// What was expected, and what was got.
    pub message: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.place.0, self.message)
    }
}

/// Collects every problem of a file, so that a person corrects it once.
#[derive(Debug, Default)]
pub(crate) struct Problems(Vec<Problem>);

impl Problems {
    pub(crate) fn require(&mut self, holds: bool, place: impl Into<String>, message: impl Into<String>) {
        if !holds {
            self.0.push(Problem { place: Place(place.into()), message: message.into() });
        }
    }

    pub(crate) fn into_result(self) -> Result<(), Vec<Problem>> {
        if self.0.is_empty() { Ok(()) } else { Err(self.0) }
    }
}

pub(crate) fn list(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
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
    /// Every value that is out of its range.
    #[error("guard configuration is not valid: {}", list(.0))]
    Invalid(Vec<Problem>),
}

impl GuardConfig {
    /// Parses and validates `guard.toml`.
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        if text.len() > FILE_BYTES_MAX {
            return Err(ConfigError::TooLarge { bytes: text.len() });
        }
        let config: Self = toml::from_str(text).map_err(ConfigError::Parse)?;
        config.validate().map_err(ConfigError::Invalid)?;
        Ok(config)
    }

    /// The file's text.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    /// The threshold for a category, or the guard's own.
    pub fn threshold_for(&self, category: Option<&crate::CategoryId>) -> f64 {
        category
            .and_then(|id| self.categories.iter().find(|c| c.id == *id))
            .and_then(|c| c.threshold)
            .unwrap_or(self.threshold)
    }

    /// Below this probability no category can make a text unsafe.
    pub fn threshold_min(&self) -> f64 {
        self.categories.iter().filter_map(|c| c.threshold).fold(self.threshold, f64::min)
    }

    /// Checks every value; all problems come back at once.
    pub fn validate(&self) -> Result<(), Vec<Problem>> {
        let mut problems = Problems::default();
        problems.require(self.format == 1, "format", format!("expected 1, got {}", self.format));
        problems.require(!self.safe_label.is_empty(), "safe_label", "expected text, got nothing");
        problems.require(!self.unsafe_label.is_empty(), "unsafe_label", "expected text, got nothing");
        problems.require(
            self.safe_label != self.unsafe_label,
            "unsafe_label",
            "expected another text than safe_label",
        );
        check_probability(&mut problems, "threshold", self.threshold);
        for (place, tokens) in
            [("prompt_tokens_max", self.prompt_tokens_max), ("response_tokens_max", self.response_tokens_max)]
        {
            problems.require(
                (1..=WINDOW_TOKENS_MAX).contains(&tokens),
                place,
                format!("expected 1 to {WINDOW_TOKENS_MAX}, got {tokens}"),
            );
        }
        if let Some(adapter) = &self.adapter {
            let inside = !adapter.is_empty()
                && !adapter.starts_with(['/', '\\'])
                && adapter.split(['/', '\\']).all(|part| !part.is_empty() && part != "..");
            problems.require(inside, "adapter", "expected a path inside the package");
        }
        check_layout(&mut problems, "prompt", &self.prompt, false);
        check_layout(&mut problems, "pair", &self.pair, true);
        problems.require(
            self.categories.len() <= CATEGORIES_MAX,
            "categories",
            format!("expected at most {CATEGORIES_MAX}, got {}", self.categories.len()),
        );
        let (mut ids, mut labels) = (BTreeSet::new(), BTreeSet::new());
        for (i, category) in self.categories.iter().enumerate() {
            let place = |field: &str| format!("categories[{i}].{field}");
            problems.require(ids.insert(&category.id), place("id"), format!("{} occurs twice", category.id));
            problems.require(!category.label.is_empty(), place("label"), "expected text, got nothing");
            problems.require(
                labels.insert(&category.label),
                place("label"),
                format!("{:?} occurs twice", category.label),
            );
            if let Some(threshold) = category.threshold {
                check_probability(&mut problems, place("threshold"), threshold);
            }
        }
        problems.into_result()
    }
}

fn check_probability(problems: &mut Problems, place: impl Into<String>, value: f64) {
    // Above 1 is allowed to no one: a threshold that nothing reaches would switch the guard off unseen.
    problems.require(
        value > 0.0 && value <= 1.0,
        place,
        format!("expected a probability above 0, at most 1, got {value}"),
    );
}

fn check_layout(problems: &mut Problems, name: &str, layout: &Layout, with_response: bool) {
    let place = format!("{name}.template");
    let prompts = layout.template.matches("{prompt}").count();
    let responses = layout.template.matches("{response}").count();
    problems.require(
        prompts == 1,
        place.clone(),
        format!("expected {{prompt}} once, got it {prompts} times"),
    );
    let expected = usize::from(with_response);
    problems.require(
        responses == expected,
        place.clone(),
        format!("expected {{response}} {expected} times, got it {responses} times"),
    );
    if let (Some(p), Some(r)) = (layout.template.find("{prompt}"), layout.template.find("{response}")) {
        problems.require(p < r, place, "expected {prompt} before {response}");
    }
    let Platt { slope, intercept } = layout.calibration;
    problems.require(
        slope.is_finite() && slope > 0.0,
        format!("{name}.calibration.slope"),
        format!("expected a finite number above 0, got {slope}"),
    );
    problems.require(
        intercept.is_finite(),
        format!("{name}.calibration.intercept"),
        format!("expected a finite number, got {intercept}"),
    );
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
        assert!((config.threshold_for(Some(&id("violence"))) - 0.4).abs() < 1e-12);
        assert!((config.threshold_for(Some(&id("privacy"))) - 0.5).abs() < 1e-12);
        assert!((config.threshold_for(None) - 0.5).abs() < 1e-12);
        assert!((config.threshold_min() - 0.4).abs() < 1e-12);
    }

    #[test]
    fn every_problem_is_listed_with_its_place() {
        let mut config = GuardConfig::from_toml(GOOD).unwrap();
        config.format = 7;
        config.threshold = 1.5;
        config.adapter = Some("../x".into());
        config.prompt.template = "no text".into();
        config.pair.template = "{response} {prompt}".into();
        config.pair.calibration.slope = f64::NAN;
        config.categories[1].id = config.categories[0].id.clone();
        config.categories[1].threshold = Some(0.0);
        let places: Vec<String> = config.validate().unwrap_err().into_iter().map(|p| p.place.0).collect();
        assert_eq!(
            places,
            [
                "format",
                "threshold",
                "adapter",
                "prompt.template",
                "pair.template",
                "pair.calibration.slope",
                "categories[1].id",
                "categories[1].threshold",
            ]
        );
    }

    #[test]
    fn an_unknown_field_and_a_huge_file_are_refused() {
        let unknown = format!("{GOOD}\nsurprise = 1\n");
        assert!(matches!(GuardConfig::from_toml(&unknown), Err(ConfigError::Parse(_))));
        let huge = "#".repeat(FILE_BYTES_MAX + 1);
        assert!(matches!(GuardConfig::from_toml(&huge), Err(ConfigError::TooLarge { .. })));
    }
}
