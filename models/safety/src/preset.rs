//! Published guards by name: `form = "…"` in `guard.toml` stands for what a guard's authors fixed, its templates,
//! answers and categories. The rest of the file says which of our categories each of the guard's is, and how sure it
//! must be.
//!
//! A preset is a file of `presets/` in the very form that a person can write for a guard of their own
//! ([`GuardConfig`]), less the identifiers of the categories. Each says where its template is documented.

use std::collections::BTreeMap;

use serde::Deserialize;
use toml::{Table, Value};

use crate::{
    calibrate::Platt,
    category::CategoryId,
    config::{ConfigError, GuardConfig, WordsUse},
    problem::Problems,
};

/// The presets' names and files.
const PRESETS: [(&str, &str); 4] = [
    ("llama-guard-3-1b", include_str!("../presets/llama-guard-3-1b.toml")),
    ("llama-guard-3-8b", include_str!("../presets/llama-guard-3-8b.toml")),
    ("qwen3guard-gen", include_str!("../presets/qwen3guard-gen.toml")),
    ("shieldgemma", include_str!("../presets/shieldgemma.toml")),
];

/// A `guard.toml` that uses a preset. What is absent stays as the preset has it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PresetUse {
    format: u32,
    form: String,
    name: Option<String>,
    package: Option<String>,
    adapter: Option<String>,
    threshold: Option<f64>,
    prompt_tokens_max: Option<usize>,
    response_tokens_max: Option<usize>,
    also_safe: Option<Vec<String>>,
    also_unsafe: Option<Vec<String>>,
    category_line: Option<String>,
    words: Option<WordsUse>,
    /// From the guard's codes to our categories.
    #[serde(default)]
    map: BTreeMap<String, CategoryId>,
    /// Thresholds of our categories.
    #[serde(default)]
    thresholds: BTreeMap<CategoryId, f64>,
    #[serde(default)]
    prompt: Calibrated,
    #[serde(default)]
    pair: Calibrated,
}

/// The part of a layout that is not the preset's.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Calibrated {
    #[serde(default)]
    calibration: Platt,
}

/// The names of the presets.
pub(crate) fn names() -> Vec<&'static str> {
    PRESETS.iter().map(|(name, _)| *name).collect()
}

/// The configuration that a file with `form` stands for; not validated yet.
pub(crate) fn expand(file: Table) -> Result<GuardConfig, ConfigError> {
    let wanted: PresetUse = file.try_into().map_err(ConfigError::Parse)?;
    let Some((_, preset)) = PRESETS.iter().find(|(name, _)| *name == wanted.form) else {
        return Err(ConfigError::UnknownForm { form: wanted.form, known: names() });
    };
    let mut preset: Table = toml::from_str(preset).map_err(ConfigError::Parse)?;
    let empty = &mut Vec::new();
    let categories = preset.get_mut("categories").and_then(Value::as_array_mut).unwrap_or(empty);
    map_categories(&wanted, categories).into_result().map_err(ConfigError::Invalid)?;
    let mut config: GuardConfig = preset.try_into().map_err(ConfigError::Parse)?;
    config.format = wanted.format;
    config.name = wanted.name.unwrap_or(config.name);
    (config.package, config.adapter, config.words) = (wanted.package, wanted.adapter, wanted.words);
    config.threshold = wanted.threshold.unwrap_or(config.threshold);
    config.prompt_tokens_max = wanted.prompt_tokens_max.unwrap_or(config.prompt_tokens_max);
    config.response_tokens_max = wanted.response_tokens_max.unwrap_or(config.response_tokens_max);
    config.also_safe = wanted.also_safe.unwrap_or(config.also_safe);
    config.also_unsafe = wanted.also_unsafe.unwrap_or(config.also_unsafe);
    config.category_line = wanted.category_line.unwrap_or(config.category_line);
    config.prompt.calibration = wanted.prompt.calibration;
    config.pair.calibration = wanted.pair.calibration;
    for category in &mut config.categories {
        category.threshold = wanted.thresholds.get(&category.id).copied();
    }
    Ok(config)
}

/// Gives each of the preset's categories our identifier. Every one must have it: what is not mapped would be flagged
/// under no name, and no rule of a policy could apply.
fn map_categories(wanted: &PresetUse, categories: &mut [Value]) -> Problems {
    let mut problems = Problems::default();
    let mut codes = Vec::new();
    for category in categories.iter_mut().filter_map(Value::as_table_mut) {
        let text = |key: &str| category.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (code, name) = (text("code"), text("name"));
        match wanted.map.get(&code) {
            Some(id) => drop(category.insert("id".into(), Value::String(id.to_string()))),
            None => problems.require(
                false,
                format!("map.{code}"),
                format!("expected the category that {name} of {} is, got nothing", wanted.form),
            ),
        }
        codes.push(code);
    }
    for code in wanted.map.keys() {
        problems.require(
            codes.contains(code),
            format!("map.{code}"),
            format!("{} has no such category, expected one of {}", wanted.form, codes.join(", ")),
        );
    }
    for id in wanted.thresholds.keys() {
        problems.require(
            wanted.map.values().any(|mapped| mapped == id),
            format!("thresholds.{id}"),
            "expected a category that map leads to",
        );
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that maps every category of a preset to one of two.
    fn using(form: &str, extra: &str) -> String {
        let (_, preset) = PRESETS.iter().find(|(name, _)| *name == form).unwrap();
        let preset: Table = toml::from_str(preset).unwrap();
        let codes = preset["categories"].as_array().unwrap().iter().map(|c| c["code"].as_str().unwrap());
        let map: Vec<String> = codes
            .enumerate()
            .map(|(i, code)| format!("{code} = \"{}\"\n", ["crime", "other"][i % 2]))
            .collect();
        format!("format = 1\nform = \"{form}\"\n{extra}\n[map]\n{}", map.concat())
    }

    #[test]
    fn every_preset_is_a_valid_configuration() {
        for form in names() {
            let config = GuardConfig::from_toml(&using(form, "")).unwrap();
            assert_eq!(config.categories[1].id.as_str(), "other", "{form}");
            assert_eq!(GuardConfig::from_toml(&config.to_toml().unwrap()).unwrap(), config, "{form}");
        }
    }

    #[test]
    fn what_the_file_says_wins_over_the_preset() {
        let extra = "package = \"../guard\"\nthreshold = 0.3\nprompt_tokens_max = 100\nalso_unsafe = []\n\
                     also_safe = [\" Controversial\"]\n[thresholds]\nother = 0.2\n[pair.calibration]\n\
                     slope = 2.0\nintercept = 1.0\n";
        let config = GuardConfig::from_toml(&using("qwen3guard-gen", extra)).unwrap();
        assert_eq!(config.package.as_deref(), Some("../guard"));
        assert_eq!((config.prompt_tokens_max, config.response_tokens_max), (100, 2048));
        assert_eq!(config.pair.calibration, Platt { slope: 2.0, intercept: 1.0 });
        assert_eq!(config.prompt.calibration, Platt::default());
        let other = "other".parse().unwrap();
        assert!((config.threshold_for(Some(&other), true) - 0.2).abs() < 1e-12);
        assert!((config.threshold_for(None, true) - 0.3).abs() < 1e-12);
        assert_eq!(config.also_safe, [" Controversial"]);
        assert!(config.also_unsafe.is_empty());
    }

    #[test]
    fn the_documents_examples_are_valid() {
        let document = include_str!("../../../docs/package.md");
        let blocks = document.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next());
        let forms: Vec<&str> = blocks.filter(|block| block.contains("\nform = ")).collect();
        assert_eq!(forms.len(), 3);
        for form in forms {
            GuardConfig::from_toml(form).unwrap();
        }
    }

    #[test]
    fn llama_guards_categories_are_listed_with_descriptions_on_request() {
        let list = |extra: &str| {
            let config = GuardConfig::from_toml(&using("llama-guard-3-1b", extra)).unwrap();
            config.templates(true).remove(0).1
        };
        assert!(list("").contains("\nS11: Self-Harm.\nS12: Sexual Content.\nS13: Elections.\n<END"));
        let described = list("category_line = \"{code}: {name}.\\n{description}\"");
        assert!(
            described.contains("\nS12: Sexual Content.\nErotic content.\nS13: Elections.\n"),
            "{described}"
        );
    }

    #[test]
    fn an_unknown_form_and_an_incomplete_map_are_refused_by_name() {
        let error = GuardConfig::from_toml("format = 1\nform = \"llama-guard-9\"\n").unwrap_err();
        assert!(
            error.to_string().contains("llama-guard-9") && error.to_string().contains("shieldgemma"),
            "{error}"
        );
        let text = using("llama-guard-3-1b", "[thresholds]\nnone = 0.5\n");
        let text = text.replace("S5 = \"crime\"\n", "S14 = \"cyber\"\n");
        let ConfigError::Invalid(problems) = GuardConfig::from_toml(&text).unwrap_err() else { panic!() };
        let places: Vec<&str> = problems.iter().map(|problem| problem.place.0.as_str()).collect();
        assert_eq!(places, ["map.S5", "map.S14", "thresholds.none"]);
        assert!(problems[0].to_string().contains("Defamation"), "{}", problems[0]);
        let text = using("shieldgemma", "policy = \"x\"\n");
        assert!(matches!(GuardConfig::from_toml(&text), Err(ConfigError::Parse(_))));
    }
}
