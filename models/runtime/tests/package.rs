//! Opening packages: what was changed, or does not fit together, is refused.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

mod support;

use commonweal_package::{OpenError as PackageError, Package};
use commonweal_runtime::{Message, Model, OpenError, OpenOptions};

#[test]
fn changed_file_is_refused_before_anything_is_run() {
    let folder = tempfile::tempdir().unwrap();
    let path = support::build(folder.path());
    let graph = path.join("infer.onnx");
    let mut bytes = std::fs::read(&graph).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&graph, bytes).unwrap();
    let error = Package::open(&path).unwrap_err();
    assert!(matches!(error, PackageError::HashMismatch { .. }), "{error}");
}

#[test]
fn options_of_zero_are_refused() {
    let package = support::package();
    for options in [
        OpenOptions { context_max: Some(0), ..OpenOptions::default() },
        OpenOptions { batch_max: 0, ..OpenOptions::default() },
        OpenOptions { prefill_tokens_max: 0, ..OpenOptions::default() },
    ] {
        let error = Model::open(&support::library(), &package, options).unwrap_err();
        assert!(matches!(error, OpenError::Option { .. }), "{error}");
    }
}

#[test]
fn packages_template_and_tokens_reach_the_chat() {
    let model = support::model();
    let prompt = model.chat().prompt(&[Message::user("hi")]).unwrap();
    let start = model.tokenizer().token("<|im_start|>").unwrap();
    assert_eq!(prompt.ids.iter().filter(|&&id| id == start).count(), 2);
    assert_eq!(model.context(), 256);
}
