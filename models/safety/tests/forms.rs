//! Each form of guard, from its configuration to a score: its prompts against those that jinja2 rendered, its score
//! against the model's probabilities, and what every guard must hold.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

mod contract;
mod small;

use std::error::Error as _;

use commonweal_package::Architecture;
use commonweal_runtime::{Cancel, Model, TrainingRow};
use commonweal_safety::{Guard, GuardConfig, Pair, Questions};
use serde::Deserialize;
use tempfile::TempDir;

const FORMS: [&str; 4] = ["llama-guard-3-1b", "llama-guard-3-8b", "shieldgemma", "qwen3guard-gen"];

/// A prompt that jinja2 rendered, from templates of which some were typed again; `goldens/make_prompts.py` says which.
#[derive(Deserialize)]
struct Golden {
    form: String,
    /// The guard's code of the category that is asked about, where it is asked about each.
    category: Option<String>,
    prompt: String,
    response: Option<String>,
    rendered: String,
    /// What the guard writes before its answer.
    answer_lead: String,
}

fn goldens() -> Vec<Golden> {
    serde_json::from_str(include_str!("../goldens/prompts.json")).unwrap()
}

/// The codes of a form's categories.
fn codes(form: &str) -> Vec<&'static str> {
    match form {
        "llama-guard-3-1b" => (1..=13).map(code).collect(),
        "llama-guard-3-8b" => (1..=14).map(code).collect(),
        "shieldgemma" => vec!["dangerous", "harassment", "hate", "sexual"],
        _ => vec![
            "violent",
            "illegal",
            "sexual",
            "pii",
            "self_harm",
            "unethical",
            "political",
            "copyright",
            "jailbreak",
        ],
    }
}

fn code(number: usize) -> &'static str {
    ["S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8", "S9", "S10", "S11", "S12", "S13", "S14"][number - 1]
}

/// A `guard.toml` that uses a preset and calls each category by its code.
fn using(form: &str, extra: &str) -> String {
    let map: Vec<String> =
        codes(form).iter().map(|code| format!("{code} = \"{}\"\n", code.to_lowercase())).collect();
    format!("format = 1\nform = \"{form}\"\n{extra}\n[map]\n{}", map.concat())
}

fn config(form: &str) -> GuardConfig {
    GuardConfig::from_toml(&using(form, "prompt_tokens_max = 64\nresponse_tokens_max = 80\n")).unwrap()
}

/// The small model whose tokenizer has the guards' tokens, with the folder that holds it.
fn model() -> (TempDir, Model) {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = folder.path().join("tokenizer.json");
    small::write_tokenizer(&tokenizer, None);
    let package = small::write_package(folder.path(), "package", &tokenizer);
    (folder, small::model(&package))
}

/// ln(p(token) after a text), by the path that measures held-out loss.
fn logprob(model: &Model, ids: &[u32], token: u32) -> f64 {
    let mut row = TrainingRow { ids: ids.to_vec(), weights: vec![0.0; ids.len()] };
    row.ids.push(token);
    row.weights.push(1.0);
    model.score_rows(&model.prepare(None).unwrap(), &[row], &Cancel::new()).unwrap()[0].logprob
}

#[test]
fn each_form_asks_what_its_own_template_asks() {
    let (_folder, model) = model();
    let tokenizer = model.tokenizer();
    let mut compared = Vec::new();
    for golden in goldens() {
        let config = GuardConfig::from_toml(&using(&golden.form, "")).unwrap();
        let questions = Questions::new(tokenizer, &config, model.context()).unwrap();
        let pair = Pair { prompt: &golden.prompt, response: golden.response.as_deref() };
        let asked = questions.asked(tokenizer, pair).unwrap();
        let which = golden
            .category
            .as_ref()
            .map_or(0, |category| codes(&golden.form).iter().position(|code| code == category).unwrap());
        let expected = tokenizer.encode(&(golden.rendered.clone() + &golden.answer_lead)).unwrap();
        let got = [questions.policy(), &asked[which][0]].concat();
        assert_eq!(asked[which].len(), 1);
        let text = |ids: &[u32]| ids.iter().map(|&id| tokenizer.spelling(id).unwrap()).collect::<String>();
        assert_eq!(text(&got), text(&expected), "{} {:?}", golden.form, golden.category);
        assert_eq!(got, expected);
        compared.push((golden.form.clone(), golden.response.is_some()));
    }
    for form in FORMS {
        for with_response in [false, true] {
            assert!(compared.contains(&(form.to_owned(), with_response)), "no golden of {form}");
        }
    }
}

#[test]
fn each_forms_score_is_the_models_own() {
    let (_folder, model) = model();
    scores_are_the_models_own(&model, &FORMS);
}

/// The form over a network of its own architecture, in a package of its own, named by the base's `guard.toml`.
#[test]
fn shieldgemma_asks_a_gemma() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = folder.path().join("tokenizer.json");
    small::write_tokenizer(&tokenizer, None);
    let package = small::write_package_of(small::GEMMA, folder.path(), "shieldgemma", &tokenizer);
    let facts = &package.manifest().model;
    assert_eq!(facts.architecture, Architecture::Gemma2);
    let shortest = goldens().iter().map(|golden| golden.rendered.len()).min().unwrap();
    assert!(facts.attention.window_of(0).unwrap() < shortest, "a token is a byte or a few");

    let gemma = small::model(&package);
    scores_are_the_models_own(&gemma, &["shieldgemma"]);
    contract::holds(Guard::open(&gemma, config("shieldgemma"), None, &Cancel::new()).unwrap());
    let base = small::write_package(folder.path(), "base", small::BYTES.as_ref());
    let extra = "package = \"../shieldgemma\"\nprompt_tokens_max = 64\nresponse_tokens_max = 80\n";
    let model = small::model(&small::with_guard(&base, &using("shieldgemma", extra)));
    let named = Guard::from_package(&model, &Cancel::new()).unwrap();
    let expected = Guard::open(&gemma, config("shieldgemma"), None, &Cancel::new()).unwrap();
    assert_eq!(
        named.judge(&contract::PAIRS[..2], &Cancel::new()).unwrap(),
        expected.judge(&contract::PAIRS[..2], &Cancel::new()).unwrap()
    );
}

/// Holds the log-odds of every golden question of these forms against the model's own probabilities.
fn scores_are_the_models_own(model: &Model, forms: &[&str]) {
    let tokenizer = model.tokenizer();
    let token = |text: &str| tokenizer.token(text).unwrap();
    let mut goldens = goldens();
    goldens.retain(|golden| forms.contains(&golden.form.as_str()));
    assert!(!goldens.is_empty());
    goldens.sort_by_key(|golden| (golden.form.clone(), golden.prompt.clone(), golden.response.clone()));
    let same =
        |x: &Golden, y: &Golden| (&x.form, &x.prompt, &x.response) == (&y.form, &y.prompt, &y.response);
    for golden in goldens.chunk_by(same) {
        let form = golden[0].form.as_str();
        let (safe, unsafe_): (&str, &[&str]) = match form {
            "shieldgemma" => ("No", &["Yes"]),
            "qwen3guard-gen" => (" Safe", &[" Unsafe", " Cont"]),
            _ => ("safe", &["unsafe"]),
        };
        // One rendering for each category that is asked about; the worst counts.
        let odds = golden.iter().map(|golden| {
            let ids = tokenizer.encode(&(golden.rendered.clone() + &golden.answer_lead)).unwrap();
            let unsafe_: f64 = unsafe_.iter().map(|text| logprob(model, &ids, token(text)).exp()).sum();
            (unsafe_.ln() - logprob(model, &ids, token(safe)), golden.category.clone())
        });
        let (expected, category) = odds.max_by(|x, y| x.0.total_cmp(&y.0)).unwrap();
        let mut config = GuardConfig::from_toml(&using(form, "")).unwrap();
        config.threshold = 1e-9;
        let guard = Guard::open(model, config, None, &Cancel::new()).unwrap();
        let pair = Pair { prompt: &golden[0].prompt, response: golden[0].response.as_deref() };
        let judgement = guard.judge_one(pair, &Cancel::new()).unwrap();
        assert!((judgement.log_odds - expected).abs() < 1e-3, "{form}: {judgement:?}, expected {expected}");
        let probability = 1.0 / (1.0 + (-judgement.log_odds).exp());
        assert!((judgement.probability - probability).abs() < 1e-9);
        if let Some(category) = category {
            assert_eq!(golden.len(), 4, "shieldgemma asks four questions");
            assert_eq!(judgement.category.unwrap().as_str(), category);
        }
    }
}

#[test]
fn a_category_is_what_the_guard_would_write_next() {
    let (_folder, model) = model();
    let tokenizer = model.tokenizer();
    for (form, lead, labels) in [
        ("llama-guard-3-8b", "unsafe\nS", (1..=14).map(|number| number.to_string()).collect::<Vec<_>>()),
        (
            "qwen3guard-gen",
            " Unsafe\nCategories:",
            [" Viol", " Non", " Sexual", " P", " Suicide", " Un", " Polit", " Copyright"]
                .map(str::to_owned)
                .to_vec(),
        ),
    ] {
        let all = goldens();
        let golden = all.iter().find(|golden| golden.form == form && golden.response.is_some()).unwrap();
        let text = golden.rendered.clone() + &golden.answer_lead + lead;
        let ids = tokenizer.encode(&text).unwrap();
        let scored = labels.iter().map(|label| logprob(&model, &ids, tokenizer.token(label).unwrap()));
        let best = scored.enumerate().max_by(|x, y| x.1.total_cmp(&y.1)).unwrap().0;
        let mut config = GuardConfig::from_toml(&using(form, "")).unwrap();
        config.threshold = 1e-9;
        let guard = Guard::open(&model, config, None, &Cancel::new()).unwrap();
        let pair = Pair { prompt: &golden.prompt, response: golden.response.as_deref() };
        let category = guard.judge_one(pair, &Cancel::new()).unwrap().category.unwrap();
        assert_eq!(category.as_str(), codes(form)[best].to_lowercase(), "{form}");
    }
}

#[test]
fn every_form_holds_the_contract() {
    let (_folder, model) = model();
    for form in FORMS {
        contract::holds(Guard::open(&model, config(form), None, &Cancel::new()).unwrap());
    }
    let mut ours = GuardConfig::from_toml(include_str!("data/guard.toml")).unwrap();
    ours.policy = "<|im_start|>policy<|im_end|>".into();
    contract::holds(Guard::open(&model, ours, None, &Cancel::new()).unwrap());
}

#[test]
fn only_thresholds_can_be_set_on_an_open_guard() {
    let (_folder, model) = model();
    let guard = Guard::open(&model, config("shieldgemma"), None, &Cancel::new()).unwrap();
    let mut other = guard.config().clone();
    other.unsafe_label = "yes".into();
    let error = guard.with_thresholds(other).unwrap_err();
    assert!(error.to_string().contains("ShieldGemma"), "{error}");
}

#[test]
fn a_guard_in_a_package_of_its_own_is_used_by_configuration_alone() {
    let (folder, guard_model) = model();
    let base = small::write_package(folder.path(), "base", small::BYTES.as_ref());
    let absolute = folder.path().join("package");
    let expected = Guard::open(&guard_model, config("qwen3guard-gen"), None, &Cancel::new()).unwrap();
    let expected = expected.judge(contract::PAIRS, &Cancel::new()).unwrap();
    for path in ["../package", absolute.to_str().unwrap()] {
        let extra = format!("package = \"{path}\"\nprompt_tokens_max = 64\nresponse_tokens_max = 80\n");
        let text = using("qwen3guard-gen", &extra);
        let model = small::model(&small::with_guard(&base, &text));
        let guard = Guard::from_package(&model, &Cancel::new()).unwrap();
        assert_eq!(guard.judge(contract::PAIRS, &Cancel::new()).unwrap(), expected);
        // A guard that was closed for the time of a training step judges as before.
        guard.close_inference();
        assert_eq!(guard.judge(contract::PAIRS, &Cancel::new()).unwrap(), expected);
        // Over the base it would ask a model that was never trained to answer.
        let config = GuardConfig::from_toml(&text).unwrap();
        let error = Guard::open(&model, config, None, &Cancel::new()).unwrap_err();
        assert!(error.to_string().contains(path), "{error}");
    }
}

#[test]
fn a_wrong_configuration_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = folder.path().join("tokenizer.json");
    small::write_tokenizer(&tokenizer, Some("unsafe"));
    let lacks_answer = small::write_package(folder.path(), "lacks-answer", &tokenizer);
    let base = small::write_package(folder.path(), "base", small::BYTES.as_ref());
    let refused = |text: &str, expected: &[&str]| {
        let package = small::with_guard(&base, text);
        let error = Guard::from_package(&small::model(&package), &Cancel::new()).unwrap_err();
        let mut told = error.to_string();
        let mut cause = error.source();
        while let Some(source) = cause {
            told = format!("{told}: {source}");
            cause = source.source();
        }
        assert!(expected.iter().all(|part| told.contains(part)), "{told}, expected {expected:?}");
    };
    refused("format = 1\nform = \"llama-guard-4\"\n", &["llama-guard-4", "llama-guard-3-1b"]);
    refused(&using("shieldgemma", "package = \"../nowhere\""), &["nowhere", "does not open"]);
    refused(
        &using("shieldgemma", "adapter = \"adapters/guard.safetensors\""),
        &["adapters/guard.safetensors"],
    );
    let unmapped = using("shieldgemma", "").replace("hate = \"hate\"\n", "");
    refused(&unmapped, &["map.hate", "Hate Speech"]);
    refused(&using("llama-guard-3-8b", ""), &["<|begin_of_text|>"]);
    let own = format!("package = \"{}\"", lacks_answer.directory().display());
    refused(&using("llama-guard-3-8b", &own), &["unsafe", "one token"]);
    refused(
        &using("llama-guard-3-8b", "package = \"../lacks-answer\"\nprompt_tokens_max = 30000"),
        &["unsafe", "one token"],
    );
    refused(&using("shieldgemma", "package = \"../lacks-answer\"\nprompt_tokens_max = 30000"), &["8192"]);
}
