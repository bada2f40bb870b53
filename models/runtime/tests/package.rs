//! Opening packages: what was changed, or does not fit together, is refused.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

mod support;

use commonweal_package::{OpenError as PackageError, Package, TrainGraph};
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

/// Why the tiny package does not open for running when one of its files is another one.
fn refusal(file: &str, bytes: &[u8]) -> OpenError {
    let folder = tempfile::tempdir().unwrap();
    let package = support::altered(folder.path(), |_| (), file, bytes);
    Model::open(&support::library(), &package, OpenOptions::default()).expect_err("must be refused")
}

#[test]
fn files_that_do_not_belong_together_are_refused() {
    let train = std::fs::read(support::package().train_graph(TrainGraph::Full).unwrap()).unwrap();
    let interface = refusal("infer.onnx", &train);
    assert!(matches!(&interface, OpenError::Interface { name, .. } if name == "seqlens_k"), "{interface}");
    let graph = refusal("infer.onnx", &train[..train.len() / 2]);
    assert!(matches!(graph, OpenError::Frozen { .. }) && graph.to_string().contains("infer.onnx"), "{graph}");
    let short = refusal("weights.bin", &[0; 4096]);
    assert!(matches!(short, OpenError::Frozen { .. }), "{short}");
    let template = refusal("chat_template.jinja", b"{% for %}");
    assert!(matches!(template, OpenError::Template(_)), "{template}");
    let tokenizer = refusal("tokenizer.json", b"{}");
    assert!(matches!(tokenizer, OpenError::Tokenizer(_)), "{tokenizer}");
    let words: Vec<String> = (0..=300).map(|word| format!(r#""w{word}":{word}"#)).collect();
    let words = words.join(",");
    let larger = format!(
        r#"{{"version":"1.0","added_tokens":[],"normalizer":null,"pre_tokenizer":null,"post_processor":null,
        "decoder":null,"truncation":null,"padding":null,
        "model":{{"type":"WordLevel","unk_token":"w0","vocab":{{{words}}}}}}}"#
    );
    let tokens = refusal("tokenizer.json", larger.as_bytes());
    assert!(matches!(tokens, OpenError::Vocabulary { expected: 288, got: 301 }), "{tokens}");
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
