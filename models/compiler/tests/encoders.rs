//! Encoders against Hugging Face's implementation (`goldens/make_encoders.py`): the logits of a ragged batch of texts and
//! pairs, in floats and quantized. What no graph has is refused by name.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed test may panic")]

#[path = "onnx_runtime/mod.rs"]
mod onnx_runtime;

use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use commonweal_compiler::compile::CompileError;
use commonweal_compiler::encoder::{EncoderOptions, compile};
use commonweal_compiler::{Accuracy, Bits, EncoderArchitecture, Probabilities};
use commonweal_package::EncoderPackage;
use onnx_runtime::{Golden, goldens, read, relative_error, run, session};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// The reference computes in 64-bit floats; measured errors are below 1e-6 in floats and about as much quantized.
const TOLERANCE: f64 = 2e-5;

/// A golden checkpoint with its tokenizer.
struct Checkpoint(TempDir);

impl Checkpoint {
    fn new(variant: &str) -> Self {
        let directory = TempDir::new().unwrap();
        let checkpoint = directory.path().join("checkpoint");
        fs::create_dir(&checkpoint).unwrap();
        let encoders = goldens().join("encoders");
        for name in ["config.json", "model.safetensors"] {
            fs::copy(encoders.join(variant).join(name), checkpoint.join(name)).unwrap();
        }
        fs::copy(encoders.join("tokenizer.json"), checkpoint.join("tokenizer.json")).unwrap();
        Self(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join("checkpoint").join(name)
    }

    /// Changes keys of `config.json`; null removes one.
    fn config(self, changes: &Value) -> Self {
        let path = self.path("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
            if value.is_null() {
                config.as_object_mut().unwrap().remove(key);
            }
        }
        fs::write(path, config.to_string()).unwrap();
        self
    }

    fn options(&self) -> EncoderOptions {
        EncoderOptions {
            accuracy: Accuracy::Exact,
            ..EncoderOptions::new(self.path(""), self.0.path().join("package"))
        }
    }

    /// Compiles, expects the message to have every one of `words`, and nothing to be left behind.
    fn refused(&self, words: &[&str]) {
        let error = compile(&self.options()).expect_err("must be refused");
        assert!(error.is_bad_input(), "{error:?} must count as bad input");
        let message = chain(&error);
        for word in words {
            assert!(message.contains(word), "{message:?} must mention {word:?}");
        }
        assert_eq!(fs::read_dir(self.0.path()).unwrap().count(), 1, "nothing may be left behind");
    }
}

fn chain(error: &CompileError) -> String {
    let causes = std::iter::successors(Some(error as &dyn Error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Compiles a golden checkpoint at each width and compares the logits.
fn agrees(variant: &str, architecture: EncoderArchitecture) {
    let golden = read(&format!("encoders/{variant}/golden.safetensors"));
    for bits in [Bits::Full, Bits::Eight, Bits::Four] {
        let checkpoint = Checkpoint::new(variant);
        let summary = compile(&EncoderOptions { bits, ..checkpoint.options() }).unwrap();
        assert_eq!(summary.manifest.encoder.architecture, architecture);
        let package = EncoderPackage::open(checkpoint.0.path().join("package")).unwrap();
        assert_eq!(fs::metadata(package.weights()).unwrap().len(), summary.weights_bytes);
        let mut session = session(&package.graph());
        let names: Vec<String> = session.inputs().iter().map(|input| input.name().to_owned()).collect();
        let types = names.contains(&"token_type_ids".to_owned());
        assert_eq!(types, package.manifest().encoder.token_types > 1);
        let inputs = names.into_iter().map(|name| (name.clone(), golden[&name].value())).collect();
        let got = run(&mut session, inputs);
        let expected = golden[&format!("logits.{}", bits.count())].floats();
        let error = relative_error(&got["logits"], expected);
        println!("{variant}, {} bits: relative error {error:.1e}", bits.count());
        assert!(
            error <= TOLERANCE,
            "{variant}, {bits:?}: {error:.1e}, got {:?}, expected {expected:?}",
            got["logits"]
        );
    }
}

#[test]
fn bert() {
    agrees("bert", EncoderArchitecture::Bert);
    agrees("bert-labels", EncoderArchitecture::Bert);
}

#[test]
fn roberta_counts_positions_behind_its_padding() {
    agrees("roberta", EncoderArchitecture::Roberta);
    let checkpoint = Checkpoint::new("roberta");
    let manifest = compile(&checkpoint.options()).unwrap().manifest;
    assert_eq!((manifest.encoder.context, manifest.encoder.token_types), (80 - 2, 1));
}

#[test]
fn deberta_with_shared_and_own_projections_of_positions() {
    agrees("deberta", EncoderArchitecture::Deberta);
    agrees("deberta-own", EncoderArchitecture::Deberta);
    agrees("deberta-c2p", EncoderArchitecture::Deberta);
}

#[test]
fn modernbert_of_either_pooling() {
    agrees("modernbert", EncoderArchitecture::ModernBert);
    agrees("modernbert-mean", EncoderArchitecture::ModernBert);
}

/// Every row alone, padded further than in the batch, gives what it gave there.
#[test]
fn rows_do_not_see_their_padding() {
    for variant in ["bert", "deberta", "modernbert-mean"] {
        let checkpoint = Checkpoint::new(variant);
        compile(&EncoderOptions { bits: Bits::Full, ..checkpoint.options() }).unwrap();
        let mut session = session(&checkpoint.0.path().join("package/classify.onnx"));
        let golden = read(&format!("encoders/{variant}/golden.safetensors"));
        let (Golden::Integers(shape, ids), Golden::Integers(_, lengths)) =
            (&golden["input_ids"], &golden["lengths"])
        else {
            panic!("ids and lengths must be integers")
        };
        let expected = golden["logits.32"].floats();
        let labels = expected.len() / lengths.len();
        for (row, &length) in lengths.iter().enumerate() {
            // Padding of a token that is not the padding's: nothing may depend on it.
            let mut own = ids[row * shape[1]..][..length as usize].to_vec();
            own.resize(72, 50);
            let types = vec![0; 72];
            let inputs = [
                ("input_ids", Golden::Integers(vec![1, 72], own)),
                ("lengths", Golden::Integers(vec![1], vec![length])),
                ("token_type_ids", Golden::Integers(vec![1, 72], types)),
            ];
            // Rows of pairs have other types.
            if variant == "bert" && row > 1 {
                continue;
            }
            let wanted: Vec<String> = session.inputs().iter().map(|input| input.name().to_owned()).collect();
            let inputs = inputs.into_iter().filter(|(name, _)| wanted.iter().any(|wanted| wanted == name));
            let got = run(&mut session, inputs.map(|(name, golden)| (name.into(), golden.value())).collect());
            let error = relative_error(&got["logits"], &expected[row * labels..][..labels]);
            assert!(error <= TOLERANCE, "{variant}, row {row}: {error:.1e}");
        }
    }
}

#[test]
fn what_a_package_says() {
    let manifest = compile(&Checkpoint::new("bert").options()).unwrap().manifest;
    let encoder = &manifest.encoder;
    assert_eq!(encoder.labels, ["safe", "unsafe"]);
    assert_eq!((encoder.probabilities, encoder.pad, encoder.context), (Probabilities::Softmax, 1, 80));
    let manifest = compile(&Checkpoint::new("bert-labels").options()).unwrap().manifest;
    assert_eq!(manifest.encoder.labels, ["toxic", "insult", "threat"]);
    assert_eq!(manifest.encoder.probabilities, Probabilities::Sigmoid);
    let checkpoint = Checkpoint::new("bert").config(&json!({ "id2label": null }));
    let options = EncoderOptions { context: Some(40), name: Some("named".into()), ..checkpoint.options() };
    let encoder = compile(&options).unwrap().manifest.encoder;
    assert_eq!((encoder.labels, encoder.context), (vec!["LABEL_0".to_owned(), "LABEL_1".into()], 40));
    assert_eq!(encoder.name, "named");
}

/// The same network however the file says it. `transformers` 5 writes bases and kinds of layers in other keys, and takes
/// 160,000 and 10,000 for bases that are not there; 4.53 takes the global base for a local one that is null.
#[test]
fn modernbert_by_its_newer_keys_and_without_its_bases() {
    let files = |change: &dyn Fn(&mut Map<String, Value>)| {
        let checkpoint = Checkpoint::new("modernbert");
        let path = checkpoint.path("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(config.as_object_mut().unwrap());
        fs::write(path, config.to_string()).unwrap();
        compile(&checkpoint.options()).unwrap().manifest.files
    };
    let remove = |config: &mut Map<String, Value>, keys: &[&str]| {
        assert!(keys.iter().all(|&key| config.remove(key).is_some()));
    };
    let published = files(&|_| ());
    let without = files(&|config| remove(config, &["global_rope_theta", "local_rope_theta"]));
    assert_eq!(without, published);
    let rope = |theta: f64| json!({ "rope_type": "default", "rope_theta": theta });
    let newer = |every: usize| {
        files(&|config| {
            remove(config, &["global_rope_theta", "local_rope_theta", "global_attn_every_n_layers"]);
            let kind = |layer: usize| {
                if layer.is_multiple_of(every) { "full_attention" } else { "sliding_attention" }
            };
            config.insert("layer_types".into(), json!([0, 1, 2, 3, 4].map(kind)));
            let ropes = json!({ "full_attention": rope(160_000.0), "sliding_attention": rope(10_000.0) });
            config.insert("rope_parameters".into(), ropes);
        })
    };
    assert_eq!(newer(3), published);
    assert_ne!(newer(2), published);
    let null = files(&|config| {
        config.insert("local_rope_theta".into(), Value::Null);
    });
    let as_global = files(&|config| {
        config.insert("local_rope_theta".into(), json!(160_000.0));
    });
    assert_eq!(null, as_global);
    assert_ne!(null, published);
}

#[test]
fn configurations_that_no_graph_has() {
    let cases: [(&str, Value, &[&str]); 31] = [
        ("bert", json!({ "architectures": ["ElectraForSequenceClassification"] }), &["Electra", "DebertaV2"]),
        ("bert", json!({ "hidden_act": "relu" }), &["hidden_act", "relu"]),
        (
            "bert",
            json!({ "position_embedding_type": "relative_key" }),
            &["position_embedding_type", "relative_key"],
        ),
        ("bert", json!({ "problem_type": "regression" }), &["problem_type", "regression"]),
        (
            "bert",
            json!({ "problem_type": "single_label_classification", "id2label": { "0": "a" } }),
            &["at least 2 labels"],
        ),
        ("bert", json!({ "is_decoder": true }), &["is_decoder"]),
        ("bert", json!({ "add_cross_attention": true }), &["add_cross_attention"]),
        (
            "bert",
            json!({ "quantization_config": { "quant_method": "gptq" } }),
            &["quantization_config", "gptq"],
        ),
        ("bert", json!({ "id2label": { "0": "a", "2": "b" } }), &["id2label", "1"]),
        ("bert", json!({ "id2label": { "0": "a", "1": "a" } }), &["label 1"]),
        ("bert", json!({ "num_labels": 3 }), &["num_labels", "3"]),
        ("bert", json!({ "num_labels": 3, "id2label": null }), &["classifier.weight", "[3, 32]"]),
        ("bert", json!({ "num_labels": 1_u64 << 40, "id2label": null }), &["number of labels"]),
        ("bert", json!({ "num_hidden_layers": u64::MAX }), &["layers"]),
        ("bert", json!({ "num_attention_heads": 5 }), &["heads", "5"]),
        ("bert", json!({ "layer_norm_eps": -1.0 }), &["layer_norm_eps", "-1"]),
        ("bert", json!({ "hidden_size": "wide" }), &["config.json"]),
        ("roberta", json!({ "pad_token_id": 90 }), &["context"]),
        ("deberta", json!({ "relative_attention": false }), &["relative_attention"]),
        ("deberta", json!({ "pos_att_type": "p2p" }), &["pos_att_type", "p2p"]),
        ("deberta", json!({ "conv_kernel_size": 3 }), &["conv_kernel_size", "3"]),
        ("deberta", json!({ "norm_rel_ebd": "batch_norm" }), &["norm_rel_ebd", "batch_norm"]),
        ("deberta", json!({ "embedding_size": 16 }), &["embedding_size", "16"]),
        ("deberta", json!({ "position_buckets": 1 }), &["position_buckets"]),
        ("modernbert", json!({ "classifier_pooling": "max" }), &["classifier_pooling", "max"]),
        ("modernbert", json!({ "rope_scaling": { "rope_type": "yarn" } }), &["rope_scaling", "yarn"]),
        (
            "modernbert",
            json!({ "rope_parameters": { "sliding_attention": { "rope_type": "linear", "factor": 2.0 } } }),
            &["rope_parameters", "linear"],
        ),
        (
            "modernbert",
            json!({ "rope_parameters": { "rope_theta": 5.0 } }),
            &["rope_parameters", "all layers"],
        ),
        ("modernbert", json!({ "layer_types": ["full_attention"] }), &["layer_types", "1 for 5 layers"]),
        ("modernbert", json!({ "layer_types": vec!["chunked"; 5] }), &["layer_types", "chunked"]),
        ("modernbert", json!({ "num_attention_heads": 4 }), &["head_dim", "8"]),
    ];
    for (variant, changes, words) in cases {
        Checkpoint::new(variant).config(&changes).refused(words);
    }
}

#[test]
fn tokenizers_that_frame_nothing() {
    let checkpoint = Checkpoint::new("bert");
    let path = checkpoint.path("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    tokenizer["post_processor"] = Value::Null;
    fs::write(path, tokenizer.to_string()).unwrap();
    checkpoint.refused(&["tokenizer.json", "special tokens"]);
}

#[test]
fn the_command_compiles_inspects_and_makes_random_ones() {
    let compiler = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_model-compiler")).args(arguments).output().unwrap()
    };
    let directory = TempDir::new().unwrap();
    let place = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let encoders = goldens().join("encoders");
    for variant in ["bert", "deberta", "modernbert"] {
        let config = encoders.join(variant).join("config.json");
        let (config, tokenizer) = (config.to_str().unwrap(), encoders.join("tokenizer.json"));
        let (random, package) = (place(&format!("{variant}.random")), place(&format!("{variant}.package")));
        let output = compiler(&[
            "random",
            "--config",
            config,
            "--tokenizer",
            tokenizer.to_str().unwrap(),
            "--out",
            &random,
        ]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let output = compiler(&["compile", "--checkpoint", &random, "--out", &package, "--licence", "MIT"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let shown = String::from_utf8(compiler(&["inspect", &package]).stdout).unwrap();
        for words in ["safe, unsafe, Softmax", "4 bits in blocks of 32", "MIT", "classify.onnx"] {
            assert!(shown.contains(words), "{shown}");
        }
    }
    let config = encoders.join("bert/config.json");
    let tokenizer = encoders.join("tokenizer.json");
    let output = compiler(&[
        "random",
        "--config",
        config.to_str().unwrap(),
        "--tokenizer",
        tokenizer.to_str().unwrap(),
        "--chat-template",
        tokenizer.to_str().unwrap(),
        "--out",
        &place("chat"),
    ]);
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).contains("chat template is for decoders"));
    let package = place("bert.package");
    let manifest: Value = serde_json::from_slice(&compiler(&["inspect", &package, "--json"]).stdout).unwrap();
    assert_eq!(manifest["kind"], "encoder");
    let (checkpoint, out) = (place("bert.random"), place("other"));
    let output = compiler(&["compile", "--checkpoint", &checkpoint, "--out", &out, "--rank", "4"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--rank is for decoders"));
    let output = compiler(&["compile", "--checkpoint", &checkpoint, "--out", &out, "--cache", "8"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--cache is for decoders"));
    let notice = format!("NOTICE={}", encoders.join("texts.json").display());
    let output = compiler(&["attach", &package, "--file", &notice]);
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).contains("must be of kind decoder, got encoder"));
}
