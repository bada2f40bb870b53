//! Checks a guard's configuration: every value by itself and against the others. `question.rs` then holds it against
//! the tokenizer.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    calibrate::Platt,
    category::{AskedAbout, CategoryId},
    config::{GuardConfig, Kind, Layout, WordsUse},
    problem::{Problem, Problems},
};

/// Llama Guard 3 has 14 categories; 64 leaves room for a finer taxonomy.
const CATEGORIES_MAX: usize = 64;
/// A window of text for one judgement: no model of ours reads more than this at once.
const WINDOW_TOKENS_MAX: usize = 32_768;
/// Qwen3Guard answers in three ways; a rubric has a handful.
const ANSWERS_MAX: usize = 16;
/// Beside a model whose log-odds are three times too large, its words weigh 3.
const WORDS_WEIGHT_MAX: f64 = 100.0;
/// A model's log-odds are the difference of two logits, seldom above 30. A threshold that needs more is never reached.
const LOG_ODDS_MAX: f64 = 100.0;
/// A chat template writes about five.
const SPECIAL_TOKENS_MAX: usize = 16;

impl GuardConfig {
    /// Checks every value; all problems come back at once.
    pub fn validate(&self) -> Result<(), Vec<Problem>> {
        let mut problems = Problems::default();
        problems.require(self.format == 1, "format", format!("expected 1, got {}", self.format));
        self.check_answers(&mut problems);
        check_probability(&mut problems, "threshold", self.threshold);
        if self.kind == Kind::Question {
            self.check_asked(&mut problems);
        } else {
            self.check_classifier(&mut problems);
        }
        if let Some(adapter) = &self.adapter {
            problems.require(is_inside(adapter), "adapter", "expected a path inside the package");
        }
        if let Some(words) = &self.words {
            check_words(&mut problems, words);
        }
        if let Some(package) = &self.package {
            problems.require(!package.is_empty(), "package", "expected a path, got nothing");
        }
        for (name, layout, with_response) in [("prompt", &self.prompt, false), ("pair", &self.pair, true)] {
            if self.kind == Kind::Question {
                check_template(&mut problems, name, layout, with_response);
            }
            check_calibration(&mut problems, name, layout.calibration);
            if let Some(threshold) = layout.threshold {
                check_probability(&mut problems, format!("{name}.threshold"), threshold);
            }
            self.check_reach(&mut problems, name, layout.calibration);
        }
        self.check_categories(&mut problems);
        self.check_questions(&mut problems);
        problems.into_result()
    }

    /// Every threshold must be within reach of a model's log-odds: one that is not switches the guard off unseen.
    fn check_reach(&self, problems: &mut Problems, name: &str, calibration: Platt) {
        let Platt { slope, intercept } = calibration;
        for threshold in
            self.own_thresholds().chain([self.threshold]).filter(|threshold| is_threshold(*threshold))
        {
            let needed = ((threshold / (1.0 - threshold)).ln() - intercept) / slope;
            // Not a number only where slope or intercept is not finite, which is a problem of its own.
            if needed > LOG_ODDS_MAX {
                let place = format!("{name}.calibration");
                let expected = format!("expected log-odds of at most {LOG_ODDS_MAX} to reach the threshold");
                problems.require(false, place, format!("{expected} {threshold}, got {needed}"));
                return;
            }
        }
    }

    /// What a guard that is asked needs, and has not.
    fn check_asked(&self, problems: &mut Problems) {
        for (place, tokens) in
            [("prompt_tokens_max", self.prompt_tokens_max), ("response_tokens_max", self.response_tokens_max)]
        {
            problems.require(
                (1..=WINDOW_TOKENS_MAX).contains(&tokens),
                place,
                format!("expected 1 to {WINDOW_TOKENS_MAX}, got {tokens}"),
            );
        }
        let expected = "expected nothing, since the guard is asked and not a classifier";
        problems.require(!self.separate_texts, "separate_texts", expected);
    }

    /// What a classifier needs, and what only a guard that is asked has.
    fn check_classifier(&self, problems: &mut Problems) {
        problems.require(self.package.is_some(), "package", "expected the classifier's package, got nothing");
        let any = !self.categories.is_empty() || self.answers().iter().any(|(_, _, is_unsafe)| *is_unsafe);
        problems.require(any, "unsafe_label", "expected a label or categories, got neither");
        for (place, is_absent) in [
            ("adapter", self.adapter.is_none()),
            ("policy", self.policy.is_empty()),
            ("whole_answers", !self.whole_answers),
            ("special_tokens", self.special_tokens.is_empty()),
            ("category_lead", self.category_lead.is_empty()),
            ("category_line", self.category_line.is_empty()),
            ("prompt_tokens_max", self.prompt_tokens_max == 0),
            ("response_tokens_max", self.response_tokens_max == 0),
            ("prompt.template", self.prompt.template.is_empty()),
            ("pair.template", self.pair.template.is_empty()),
        ] {
            problems.require(is_absent, place, "expected nothing, since a classifier is not asked");
        }
        let answers = self.answers();
        for (i, category) in self.categories.iter().enumerate() {
            let taken = answers.iter().any(|(_, answer, _)| *answer == category.label);
            let place = |field: &str| format!("categories[{i}].{field}");
            problems.require(!taken, place("label"), "expected another label than the answers'");
            let expected = "expected nothing, since a classifier knows its labels of every text";
            problems.require(category.only.is_none(), place("only"), expected);
        }
    }

    fn check_answers(&self, problems: &mut Problems) {
        let answers = self.answers();
        let mut seen = BTreeMap::new();
        for (place, answer, _) in &answers {
            problems.require(!answer.is_empty(), place.clone(), "expected text, got nothing");
            if let Some(first) = seen.insert(*answer, place) {
                problems.require(false, place.clone(), format!("expected another text than {first}"));
            }
        }
        let got = answers.len();
        problems.require(
            got <= ANSWERS_MAX,
            "also_unsafe",
            format!("expected at most {ANSWERS_MAX} answers, got {got}"),
        );
        let got = self.special_tokens.len();
        problems.require(
            got <= SPECIAL_TOKENS_MAX,
            "special_tokens",
            format!("expected at most {SPECIAL_TOKENS_MAX}, got {got}"),
        );
    }

    fn check_categories(&self, problems: &mut Problems) {
        let got = self.categories.len();
        problems.require(
            got <= CATEGORIES_MAX,
            "categories",
            format!("expected at most {CATEGORIES_MAX}, got {got}"),
        );
        let (mut ids, mut labels) = (BTreeMap::<&CategoryId, Option<f64>>::new(), BTreeSet::new());
        for (i, category) in self.categories.iter().enumerate() {
            let place = |field: &str| format!("categories[{i}].{field}");
            if let Some(other) = ids.insert(&category.id, category.threshold) {
                let twice = format!("{} occurs twice", category.id);
                problems.require(category.code.is_some(), place("id"), twice);
                let same = category.code.is_none() || other == category.threshold;
                let expected = format!("expected the same for every category that is {}", category.id);
                problems.require(same, place("threshold"), expected);
            }
            if !self.asks_by_category() {
                let label = &category.label;
                problems.require(!label.is_empty(), place("label"), "expected text, got nothing");
                problems.require(labels.insert(label), place("label"), format!("{label:?} occurs twice"));
            }
            // A brace could make a place for a person's text where there is none.
            let texts = [Some(category.code()), Some(&category.name), category.description.as_deref()];
            let plain = texts.into_iter().flatten().all(|text| !text.contains(['{', '}']));
            problems.require(plain, place("name"), "expected a code, name and description without braces");
            if let Some(threshold) = category.threshold {
                check_probability(problems, place("threshold"), threshold);
            }
        }
    }

    /// What templates say of categories must be there, and nothing else stand in a category's line.
    fn check_questions(&self, problems: &mut Problems) {
        let of_texts = ["{prompt}", "{response}", "{categories}"];
        problems.require(
            !of_texts.iter().any(|place| self.category_line.contains(place)),
            "category_line",
            "expected no place but {code}, {name} and {description}",
        );
        problems.require(
            self.prompt.asks_by_category() == self.pair.asks_by_category(),
            "prompt.template",
            "expected a question for each category in both layouts, or in none",
        );
        for (name, layout, asked) in
            [("prompt", &self.prompt, AskedAbout::Prompt), ("pair", &self.pair, AskedAbout::Pair)]
        {
            let place = format!("{name}.template");
            let listed = layout.template.contains("{categories}");
            problems.require(
                !listed || !self.category_line.is_empty(),
                "category_line",
                format!("expected text, since {place} lists the categories"),
            );
            let applies = |only: Option<AskedAbout>| AskedAbout::applies(only, asked == AskedAbout::Pair);
            let any = self.categories.iter().any(|category| applies(category.only));
            let asks = listed || layout.asks_by_category();
            problems.require(any || !asks, place, "expected categories, since the template speaks of them");
        }
        let described = [&self.prompt.template, &self.pair.template, &self.category_line];
        if described.iter().any(|text| text.contains("{description}")) {
            for (i, category) in self.categories.iter().enumerate() {
                problems.require(
                    category.description.is_some(),
                    format!("categories[{i}].description"),
                    "expected text, since a template writes it",
                );
            }
        }
    }
}

fn is_inside(path: &str) -> bool {
    !path.is_empty()
        && !path.starts_with(['/', '\\'])
        && path.split(['/', '\\']).all(|part| !part.is_empty() && part != "..")
}

fn check_words(problems: &mut Problems, words: &WordsUse) {
    problems.require(is_inside(&words.file), "words.file", "expected a path inside the package");
    for (place, weight) in
        [("words.prompt", words.prompt), ("words.pair_prompt", words.pair_prompt), ("words.pair", words.pair)]
    {
        problems.require(
            (0.0..=WORDS_WEIGHT_MAX).contains(&weight),
            place,
            format!("expected a weight from 0 to {WORDS_WEIGHT_MAX}, got {weight}"),
        );
    }
}

/// 1 is for no one: a threshold that nothing reaches would switch the guard off unseen.
fn is_threshold(value: f64) -> bool {
    value > 0.0 && value < 1.0
}

fn check_probability(problems: &mut Problems, place: impl Into<String>, value: f64) {
    let expected = "expected a probability above 0 and below 1";
    problems.require(is_threshold(value), place, format!("{expected}, got {value}"));
}

fn check_template(problems: &mut Problems, name: &str, layout: &Layout, with_response: bool) {
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
}

fn check_calibration(problems: &mut Problems, name: &str, calibration: Platt) {
    let Platt { slope, intercept } = calibration;
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
    fn a_guard_that_nothing_could_set_off_is_refused() {
        let places = |change: fn(&mut GuardConfig)| -> Vec<String> {
            let mut config = GuardConfig::from_toml(GOOD).unwrap();
            change(&mut config);
            let problems = config.validate().err().unwrap_or_default();
            problems.into_iter().map(|problem| problem.place.0).collect()
        };
        assert_eq!(places(|config| config.threshold = 1.0), ["threshold"]);
        assert_eq!(places(|config| config.categories[0].threshold = Some(1.0)), ["categories[0].threshold"]);
        assert_eq!(places(|config| config.pair.threshold = Some(0.0)), ["pair.threshold"]);
        assert_eq!(places(|config| config.prompt.calibration.intercept = -1e9), ["prompt.calibration"]);
        assert_eq!(places(|config| config.pair.calibration.slope = 1e-9), ["pair.calibration"]);
        assert_eq!(places(|config| config.threshold = 1.0 - 1e-12), [""; 0]);
        assert_eq!(places(|config| config.pair.calibration.intercept = -50.0), [""; 0]);
    }

    #[test]
    fn a_categorys_line_has_no_place_for_a_persons_text() {
        for line in ["{prompt}", "{code} {response}", "{categories}"] {
            let mut config = GuardConfig::from_toml(GOOD).unwrap();
            config.category_line = line.into();
            let problems = config.validate().unwrap_err();
            assert!(problems.iter().any(|problem| problem.place.0 == "category_line"), "{problems:?}");
        }
    }

    #[test]
    fn words_come_from_inside_the_package_with_a_weight() {
        let places = |file: &str, weight: f64| -> Vec<String> {
            let mut config = GuardConfig::from_toml(GOOD).unwrap();
            let words = WordsUse { file: file.into(), prompt: weight, pair_prompt: 1.0, pair: 1.0 };
            config.words = Some(words);
            let problems = config.validate().err().unwrap_or_default();
            problems.into_iter().map(|problem| problem.place.0).collect()
        };
        assert_eq!(places("adapters/guard.words", 0.0), [""; 0]);
        assert_eq!(places("../guard.words", 1.0), ["words.file"]);
        for weight in [-0.1, 1e9, f64::NAN, f64::INFINITY] {
            assert_eq!(places("w", weight), ["words.prompt"], "{weight}");
        }
    }

    #[test]
    fn a_template_that_speaks_of_categories_needs_them() {
        let mut config = GuardConfig::from_toml(GOOD).unwrap();
        config.prompt.template = "{categories} {prompt}".into();
        config.pair.template = "{prompt} {response} {description}".into();
        config.categories[0].name = "{prompt}".into();
        config.also_unsafe = vec![String::new(), "safe".into()];
        let problems = config.validate().unwrap_err();
        let places: Vec<&str> = problems.iter().map(|problem| problem.place.0.as_str()).collect();
        assert_eq!(
            places,
            [
                "also_unsafe[0]",
                "also_unsafe[1]",
                "categories[0].name",
                "prompt.template",
                "category_line",
                "categories[0].description",
                "categories[1].description",
            ]
        );
    }

    #[test]
    fn a_guards_finer_categories_may_be_one_of_ours() {
        let mut config = GuardConfig::from_toml(GOOD).unwrap();
        config.categories[1].id = config.categories[0].id.clone();
        config.categories[1].code = Some("S2".into());
        let problems = config.validate().unwrap_err();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert_eq!(problems[0].place.0, "categories[1].threshold");
        config.categories[1].threshold = config.categories[0].threshold;
        assert_eq!(config.validate(), Ok(()));
    }
}
