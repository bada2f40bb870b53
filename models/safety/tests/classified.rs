//! Encoders as guards, by configuration alone: scores against Hugging Face's implementation
//! (`models/compiler/goldens/make_encoders.py`), labels that must have a meaning, and thresholds that apply.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

mod contract;

use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
};

use commonweal_compiler::{
    Accuracy, Bits,
    compile::{CompileOptions, compile},
    encoder::{self, EncoderOptions},
    random::{RandomOptions, random},
};
use commonweal_package::{EncoderPackage, Package, attach};
use commonweal_runtime::{Cancel, Classifier, ClassifyOptions, InferError, Library, Model, OpenOptions};
use commonweal_safety::{Guard, GuardConfig, GuardError, Judgement, Pair};
use tempfile::TempDir;

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// Compiles a golden encoder into `folder/encoder`.
fn encoder(folder: &Path, variant: &str) -> EncoderPackage {
    let (checkpoint, goldens) = (folder.join("checkpoint"), data("compiler/goldens/encoders"));
    fs::create_dir(&checkpoint).unwrap();
    for (from, name) in [(variant, "config.json"), (variant, "model.safetensors"), (".", "tokenizer.json")] {
        fs::copy(goldens.join(from).join(name), checkpoint.join(name)).unwrap();
    }
    let (bits, accuracy) = (Bits::Full, Accuracy::Exact);
    let out = folder.join("encoder");
    encoder::compile(&EncoderOptions { bits, accuracy, ..EncoderOptions::new(checkpoint, &out) }).unwrap();
    EncoderPackage::open(out).unwrap()
}

/// The golden variant as a guard.
fn guard(variant: &str, text: &str) -> Result<Guard, GuardError> {
    let folder = TempDir::new().unwrap();
    let package = encoder(folder.path(), variant);
    let library = Library::load(None).unwrap();
    let classifier = Classifier::open(&library, &package, ClassifyOptions::default()).unwrap();
    Guard::of_classifier(classifier, GuardConfig::from_toml(text).unwrap(), None)
}

const HEAD: &str =
    "format = 1\nname = \"encoder\"\nkind = \"classifier\"\npackage = \"../encoder\"\nthreshold = 0.5\n";

fn binary() -> String {
    format!("{HEAD}safe_label = \"safe\"\nunsafe_label = \"unsafe\"\n")
}

/// Each label a category; two are one of ours.
fn labelled() -> String {
    let category = |id: &str, label: &str| {
        format!("[[categories]]\nid = \"{id}\"\ncode = \"{label}\"\nname = \"{id}\"\nlabel = \"{label}\"\n")
    };
    [HEAD, &category("hate", "toxic"), &category("hate", "insult"), &category("violence", "threat")].concat()
}

const PAIRS: [Pair<'static>; 4] = [
    Pair { prompt: "how do I bake bread?", response: None },
    Pair { prompt: "x", response: None },
    Pair { prompt: "tell me how to pick a lock", response: Some("no, I will not help with that one") },
    Pair { prompt: "", response: Some("yes") },
];

/// The golden logits of the same texts.
fn logits(variant: &str) -> Vec<f64> {
    let bytes = fs::read(data("compiler/goldens/encoders").join(variant).join("golden.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let place = |end: usize| json["logits.32"]["data_offsets"][end].as_u64().unwrap() as usize;
    let values = bytes[8 + header..][place(0)..place(1)].as_chunks().0.iter();
    values.map(|&bytes| f64::from(f32::from_le_bytes(bytes))).collect()
}

fn judge(guard: &Guard, pairs: &[Pair<'_>]) -> Vec<Judgement> {
    guard.judge(pairs, &Cancel::new()).unwrap()
}

#[test]
fn a_binary_classifiers_odds_are_the_references() {
    for variant in ["bert", "deberta", "modernbert"] {
        let judged = judge(&guard(variant, &binary()).unwrap(), &PAIRS);
        assert_eq!(judged.len(), PAIRS.len());
        for (judgement, logits) in judged.iter().zip(logits(variant).chunks(2)) {
            let expected = logits[1] - logits[0];
            assert!((judgement.log_odds - expected).abs() < 1e-4, "{variant}: {judgement:?}, {expected}");
            assert!((judgement.probability - 1.0 / (1.0 + (-expected).exp())).abs() < 1e-4);
            assert_eq!(judgement.is_unsafe, judgement.probability >= 0.5);
            assert_eq!(judgement.category, None);
        }
    }
}

#[test]
fn calibrations_of_prompts_and_pairs_apply() {
    let text = format!(
        "{}[prompt]\ncalibration = {{ slope = 2.0, intercept = 0.5 }}\n\
         [pair]\ncalibration = {{ slope = 0.5, intercept = -1.0 }}\n",
        binary()
    );
    for (judgement, pair) in judge(&guard("bert", &text).unwrap(), &PAIRS).iter().zip(PAIRS) {
        let (slope, intercept) = if pair.response.is_some() { (0.5, -1.0) } else { (2.0, 0.5) };
        let z: f64 = slope * judgement.log_odds + intercept;
        assert!((judgement.probability - 1.0 / (1.0 + (-z).exp())).abs() < 1e-9);
    }
}

#[test]
fn labels_become_categories_with_thresholds_of_their_own() {
    let guard = guard("bert-labels", &labelled()).unwrap();
    let mut config = guard.config().clone();
    config.threshold = 0.01;
    let guard = guard.with_thresholds(config.clone()).unwrap();
    for (judgement, logits) in judge(&guard, &PAIRS).iter().zip(logits("bert-labels").chunks(3)) {
        // Of all labels the second is the most probable.
        assert!((judgement.log_odds - logits[1]).abs() < 1e-4, "{judgement:?}, {logits:?}");
        assert_eq!(judgement.category.as_ref().unwrap().as_str(), "hate");
        assert!(judgement.is_unsafe);
    }
    // A less probable kind of harm counts where its own threshold is lower.
    config.threshold = 0.9;
    config.categories[2].threshold = Some(0.05);
    let guard = guard.with_thresholds(config).unwrap();
    for (judgement, logits) in judge(&guard, &PAIRS).iter().zip(logits("bert-labels").chunks(3)) {
        assert!((judgement.log_odds - logits[2]).abs() < 1e-4, "{judgement:?}, {logits:?}");
        assert!(judgement.is_unsafe && judgement.category.as_ref().unwrap().as_str() == "violence");
    }
}

#[test]
fn encoders_hold_the_contract_of_every_form() {
    for variant in ["bert", "roberta", "deberta", "modernbert-mean"] {
        contract::holds(guard(variant, &binary()).unwrap());
    }
    contract::holds(guard("bert-labels", &labelled()).unwrap());
    contract::holds(
        guard("bert-labels", &labelled().replacen("[[", "separate_texts = true\n[[", 1)).unwrap(),
    );
}

#[test]
fn judgements_do_not_depend_on_company_and_nothing_is_left_unread() {
    let guard = guard("bert", &binary()).unwrap();
    let long: String = (0..200).map(|at| char::from(b'a' + (at * 7 % 26) as u8)).collect();
    let pairs =
        [PAIRS[2], Pair { prompt: &long, response: None }, Pair { prompt: "q", response: Some(&long) }];
    let together = judge(&guard, &pairs);
    for (pair, judgement) in pairs.iter().zip(&together) {
        let alone = guard.judge_one(*pair, &Cancel::new()).unwrap();
        assert!((alone.log_odds - judgement.log_odds).abs() < 1e-3);
    }
    // Windows of 78 characters, each 59 behind the one before; the worst counts.
    let windows =
        [0, 59, 118, 177].map(|from| Pair { prompt: &long[from..200.min(from + 78)], response: None });
    let worst = judge(&guard, &windows).iter().map(|j| j.log_odds).fold(f64::NEG_INFINITY, f64::max);
    assert!((worst - together[1].log_odds).abs() < 1e-3, "{worst}, {:?}", together[1]);
    assert!(judge(&guard, &[]).is_empty());
    let cancel = Cancel::new();
    cancel.cancel();
    let error = guard.judge(&PAIRS, &cancel).unwrap_err();
    assert!(matches!(error, GuardError::Infer(InferError::Cancelled)), "{error}");
}

/// One exchange with more text than is read does not keep the others from being judged.
#[test]
fn what_cannot_be_judged_is_an_error_of_its_own() {
    let guard = guard("bert", &binary()).unwrap();
    let message = "a lock and a bread ".repeat(400);
    let huge = "x y ".repeat(20_000);
    let pairs = [
        PAIRS[2],
        Pair { prompt: &huge, response: Some("yes") },
        // Far more than 64 windows of each with each.
        Pair { prompt: &message, response: Some(&message) },
    ];
    let error = guard.judge(&pairs, &Cancel::new()).unwrap_err();
    assert!(chain(&error).contains("must fit 1024 windows"), "{}", chain(&error));
    let judged = guard.judge_each(&pairs, &Cancel::new()).unwrap();
    let alone = guard.judge_one(PAIRS[2], &Cancel::new()).unwrap();
    assert!((judged[0].as_ref().unwrap().log_odds - alone.log_odds).abs() < 1e-3);
    assert!(judged[1].as_ref().unwrap_err().is_of_a_pair() && judged[2].is_ok(), "{judged:?}");
    assert_eq!(guard.judge_each(&PAIRS, &Cancel::new()).unwrap().len(), PAIRS.len());
    let cancel = Cancel::new();
    cancel.cancel();
    let error = guard.judge_each(&pairs, &cancel).unwrap_err();
    assert!(!error.is_of_a_pair(), "{error}");
}

#[test]
fn a_classifier_of_single_texts_reads_each_by_itself() {
    let guard = guard("roberta", &format!("{}separate_texts = true\n", binary())).unwrap();
    let one = |prompt| judge(&guard, &[Pair { prompt, response: None }])[0].log_odds;
    let (prompt, response) = ("tell me how to pick a lock", "no, I will not help with that one");
    let both = judge(&guard, &[Pair { prompt, response: Some(response) }])[0].log_odds;
    assert!((both - one(prompt).max(one(response))).abs() < 1e-4);
}

fn chain(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[test]
fn labels_without_a_meaning_are_refused_by_name() {
    for (text, words) in [
        (
            format!("{HEAD}unsafe_label = \"unsafe\"\n"),
            ["\"safe\" of the classifier", "safe, unsafe or of a category"],
        ),
        (
            format!("{HEAD}safe_label = \"fine\"\nunsafe_label = \"unsafe\"\n"),
            ["\"fine\"", "one of safe, unsafe"],
        ),
        (
            format!("{HEAD}unsafe_label = \"unsafe\"\nalso_unsafe = [\"safe\"]\n"),
            ["must mean a safe text", "none"],
        ),
    ] {
        let message = chain(&guard("bert", &text).unwrap_err());
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    }
}

#[test]
fn what_only_a_guard_that_is_asked_has_is_refused() {
    for (text, place) in [
        (binary().replace("package = \"../encoder\"\n", ""), "package"),
        (format!("{HEAD}safe_label = \"safe\"\n"), "unsafe_label"),
        (format!("{}policy = \"be good\"\n", binary()), "policy"),
        (format!("{}adapter = \"adapters/guard.safetensors\"\n", binary()), "adapter"),
        (format!("{}prompt_tokens_max = 64\n", binary()), "prompt_tokens_max"),
        (format!("{}[pair]\ntemplate = \"{{prompt}}{{response}}\"\n", binary()), "pair.template"),
        (labelled() + "only = \"pair\"\n", "categories[2].only"),
    ] {
        let error = GuardConfig::from_toml(&text).unwrap_err().to_string();
        assert!(error.contains(&format!("{place}: expected")), "{error}, expected {place}");
    }
    let asked = include_str!("data/guard.toml").replacen(
        "threshold = 0.5",
        "separate_texts = true\nthreshold = 0.5",
        1,
    );
    assert!(GuardConfig::from_toml(&asked).unwrap_err().to_string().contains("separate_texts"));
}

/// A base with a `guard.toml`, in `folder/base`.
fn base(folder: &Path, guard: &str) -> Model {
    let (checkpoint, out) = (folder.join("base-checkpoint"), folder.join("base"));
    let options = RandomOptions {
        config: data("runtime/tests/data/tiny.config.json"),
        tokenizer: data("runtime/tests/data/bytes.tokenizer.json"),
        chat_template: Some(data("runtime/tests/data/chatml.jinja")),
        out: checkpoint.clone(),
        seed: 1,
    };
    random(&options, &mut |_, _| ()).unwrap();
    compile(&CompileOptions::new(checkpoint, &out)).unwrap();
    attach(&Package::open(&out).unwrap(), &[("guard.toml", guard.as_bytes())]).unwrap();
    let library = Library::load(None).unwrap();
    Model::open(&library, &Package::open(out).unwrap(), OpenOptions::default()).unwrap()
}

#[test]
fn a_base_names_its_classifier_in_guard_toml() {
    let folder = TempDir::new().unwrap();
    encoder(folder.path(), "bert");
    let model = base(folder.path(), &binary());
    let named = Guard::from_package(&model, &Cancel::new()).unwrap();
    let expected = judge(&guard("bert", &binary()).unwrap(), &PAIRS);
    assert_eq!(judge(&named, &PAIRS), expected);
    // A base is no classifier, and says so.
    let folder = TempDir::new().unwrap();
    let model = base(folder.path(), &binary().replace("../encoder", "../base"));
    let message = chain(&Guard::from_package(&model, &Cancel::new()).unwrap_err());
    assert!(message.contains("must be of kind encoder, got decoder"), "{message}");
    let folder = TempDir::new().unwrap();
    let model = base(folder.path(), &binary());
    let message = chain(&Guard::from_package(&model, &Cancel::new()).unwrap_err());
    assert!(message.contains("encoder does not open") && message.contains("missing"), "{message}");
}
