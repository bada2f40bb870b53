//! Encoders on the real library: from texts to probabilities, against Hugging Face's implementation
//! (`models/compiler/goldens/make_encoders.py`), whatever way the texts are run.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed test may panic")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use commonweal_compiler::{
    Accuracy, Bits,
    encoder::{EncoderOptions, compile},
};
use commonweal_package::EncoderPackage;
use commonweal_runtime::{
    Cancel, Classifier, ClassifyError, ClassifyOptions, Library, OpenError, classify::probabilities,
};
use safetensors::SafeTensors;

type Texts = Vec<(String, Option<String>)>;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../compiler/goldens/encoders")
}

/// A golden checkpoint in floats, compiled once per process.
fn package(variant: &str) -> EncoderPackage {
    static BUILT: Mutex<BTreeMap<String, tempfile::TempDir>> = Mutex::new(BTreeMap::new());
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = built.entry(variant.to_owned()).or_insert_with(|| {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = folder.path().join("checkpoint");
        std::fs::create_dir(&checkpoint).unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(goldens().join(variant).join(name), checkpoint.join(name)).unwrap();
        }
        std::fs::copy(goldens().join("tokenizer.json"), checkpoint.join("tokenizer.json")).unwrap();
        let (bits, accuracy) = (Bits::Full, Accuracy::Exact);
        let out = folder.path().join("package");
        compile(&EncoderOptions { bits, accuracy, ..EncoderOptions::new(checkpoint, out) }).unwrap();
        folder
    });
    EncoderPackage::open(folder.path().join("package")).unwrap()
}

fn classifier(variant: &str, options: ClassifyOptions) -> Classifier {
    Classifier::open(&Library::load(None).unwrap(), &package(variant), options).unwrap()
}

fn texts() -> Texts {
    serde_json::from_slice(&std::fs::read(goldens().join("texts.json")).unwrap()).unwrap()
}

fn borrowed(texts: &Texts) -> Vec<(&str, Option<&str>)> {
    texts.iter().map(|(text, pair)| (text.as_str(), pair.as_deref())).collect()
}

/// The golden logits, one row a text.
fn logits(variant: &str, labels: usize) -> Vec<Vec<f64>> {
    let bytes = std::fs::read(goldens().join(variant).join("golden.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let values = golden.tensor("logits.32").unwrap().data().as_chunks().0.to_vec();
    let values: Vec<f64> = values.into_iter().map(|bytes| f64::from(f32::from_le_bytes(bytes))).collect();
    values.chunks(labels).map(<[f64]>::to_vec).collect()
}

fn close(got: &[f32], expected: &[f64]) -> bool {
    got.len() == expected.len() && got.iter().zip(expected).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-5)
}

#[test]
fn probabilities_are_those_of_the_reference() {
    let texts = texts();
    for variant in ["bert", "roberta", "deberta", "deberta-own", "modernbert-mean"] {
        let got = classifier(variant, ClassifyOptions::default()).classify(&borrowed(&texts), &Cancel::new());
        for (got, logits) in got.unwrap().iter().zip(logits(variant, 2)) {
            let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
            let expected: Vec<f64> = logits.iter().map(|logit| logit.exp() / sum).collect();
            assert!(close(got, &expected), "{variant}: {got:?}, expected {expected:?}");
        }
    }
    let several = classifier("bert-labels", ClassifyOptions::default());
    assert_eq!(several.labels(), ["toxic", "insult", "threat"]);
    let got = several.classify(&borrowed(&texts), &Cancel::new()).unwrap();
    assert_eq!(got.len(), texts.len());
    for (got, logits) in got.iter().zip(logits("bert-labels", 3)) {
        let expected: Vec<f64> = logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect();
        assert!(close(got, &expected), "{got:?}, expected {expected:?}");
    }
}

#[test]
fn probabilities_do_not_depend_on_batches() {
    let texts = texts();
    let whole = classifier("deberta", ClassifyOptions::default());
    let expected = whole.classify(&borrowed(&texts), &Cancel::new()).unwrap();
    for (batch_max, tokens_max) in [(1, 2048), (16, 1), (2, 60)] {
        let small =
            classifier("deberta", ClassifyOptions { batch_max, tokens_max, ..ClassifyOptions::default() });
        let got = small.classify(&borrowed(&texts), &Cancel::new()).unwrap();
        for (got, expected) in got.iter().flatten().zip(expected.iter().flatten()) {
            assert!((got - expected).abs() < 1e-5, "{got} {expected}");
        }
    }
    assert!(whole.classify(&[], &Cancel::new()).unwrap().is_empty());
}

#[test]
fn overlong_texts_are_refused_or_read_in_windows() {
    let bert = classifier("bert", ClassifyOptions::default());
    let long: String = (0..200).map(|at| char::from(b'a' + (at * 7 % 26) as u8)).collect();
    // 80 tokens, two of them special.
    assert!(bert.classify(&[(&long[..78], None)], &Cancel::new()).is_ok());
    let error = bert.classify(&[("x", None), (&long[..79], None)], &Cancel::new()).unwrap_err();
    assert!(matches!(error, ClassifyError::TooLong { row: 1, limit: 78, got: 79 }), "{error}");
    let error = bert.classify(&[(&long[..40], Some(&long[..38]))], &Cancel::new()).unwrap_err();
    assert!(matches!(error, ClassifyError::TooLong { row: 0, limit: 77, got: 78 }), "{error}");

    let windows = bert.window_logits(&[("x", None), (&long, None)], &Cancel::new()).unwrap();
    let one =
        |text: &str, pair: Option<&str>| bert.classify(&[(text, pair)], &Cancel::new()).unwrap().remove(0);
    let same = |window: &[f32], expected: &[f32]| {
        let got = probabilities(window, bert.manifest().encoder.probabilities);
        got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5)
    };
    // Windows of 78 tokens, 19 of them shared.
    assert_eq!(windows.iter().map(Vec::len).collect::<Vec<_>>(), [1, 4]);
    assert!(same(&windows[0][0], &one("x", None)));
    for (window, from) in windows[1].iter().zip([0, 59, 118, 177]) {
        assert!(same(window, &one(&long[from..200.min(from + 78)], None)), "window from {from}");
    }
    // A short prompt stands before every window of a long response.
    let windows = bert.window_logits(&[("hello", Some(&long))], &Cancel::new()).unwrap();
    assert_eq!(windows[0].len(), 4);
    for (window, from) in windows[0].iter().zip([0, 54, 108, 162]) {
        assert!(same(window, &one("hello", Some(&long[from..200.min(from + 72)]))), "window from {from}");
    }
    // Two long texts are read each with each.
    let windows = bert.window_logits(&[(&long[..50], Some(&long[..60]))], &Cancel::new()).unwrap();
    assert_eq!(windows[0].len(), 4);
    assert!(same(&windows[0][1], &one(&long[..38], Some(&long[30..60]))));
    // Where that would be too many, every window of the one with the nearest of the other.
    let nearest = classifier("bert", ClassifyOptions { crossed_max: 3, ..ClassifyOptions::default() });
    let windows = nearest.window_logits(&[(&long[..50], Some(&long[..60]))], &Cancel::new()).unwrap();
    assert_eq!(windows[0].len(), 3);
    for (window, (first, second)) in windows[0].iter().zip([(0, 0), (29, 0), (29, 30)]) {
        let (first, second) = (&long[first..50.min(first + 38)], &long[second..60.min(second + 39)]);
        assert!(same(window, &one(first, Some(second))), "{first} {second}");
    }
    let few = classifier("bert", ClassifyOptions { windows_max: 3, ..ClassifyOptions::default() });
    let error = few.window_logits(&[(&long, None)], &Cancel::new()).unwrap_err();
    assert!(matches!(error, ClassifyError::Windows { row: 0, limit: 3, got: 4 }), "{error}");
    let huge = "x".repeat((4 << 20) + 1);
    let error = bert.window_logits(&[(&huge, None)], &Cancel::new()).unwrap_err();
    assert!(matches!(error, ClassifyError::TooLarge { row: 0, .. }), "{error}");
}

#[test]
fn a_text_cannot_write_special_tokens() {
    let bert = classifier("bert", ClassifyOptions::default());
    let probability = |text: &str| bert.classify(&[(text, None)], &Cancel::new()).unwrap()[0][1];
    // The split of the defused token is one more, unknown token.
    assert!((probability("a[SEP]b") - probability("a[\u{200b}SEP]b")).abs() < 1e-6);
    let few = classifier("bert", ClassifyOptions { context_max: Some(8), ..ClassifyOptions::default() });
    // As one token it would fit.
    let error = few.classify(&[("a[SEP]b", None)], &Cancel::new()).unwrap_err();
    assert!(matches!(error, ClassifyError::TooLong { limit: 6, got: 8, .. }), "{error}");
}

#[test]
fn what_cannot_run_says_so() {
    let bert = classifier("bert", ClassifyOptions::default());
    let cancel = Cancel::new();
    cancel.cancel();
    assert!(matches!(bert.classify(&[("x", None)], &cancel), Err(ClassifyError::Cancelled)));
    let library = Library::load(None).unwrap();
    let open = |options| Classifier::open(&library, &package("bert"), options).unwrap_err();
    let error = open(ClassifyOptions { batch_max: 0, ..ClassifyOptions::default() });
    assert!(matches!(error, OpenError::Option { name: "batch_max" }), "{error}");
    let error = open(ClassifyOptions { context_max: Some(4), ..ClassifyOptions::default() });
    assert!(matches!(error, OpenError::Frame { context: 4, got: 3 }), "{error}");
}
