//! Packages of encoders on a real disk: written whole, opened only when every byte is as written, and never taken for
//! the other kind.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

use std::error::Error;
use std::fs;
use std::path::PathBuf;

use commonweal_package::{
    Accuracy, Bits, ENCODER_REQUIRED, EncoderArchitecture, EncoderConfig, EncoderFacts, EncoderManifest,
    EncoderPackage, Package, PackageKind, PackageWriter, Probabilities, Quantization, WriteError,
    package_kind,
};
use tempfile::TempDir;

fn facts() -> EncoderFacts {
    let encoder = EncoderConfig {
        architecture: EncoderArchitecture::Bert,
        name: "test".into(),
        hidden_size: 32,
        intermediate_size: 64,
        layers: 2,
        heads: 4,
        vocab_size: 128,
        context: 64,
        token_types: 2,
        pad: 5,
        probabilities: Probabilities::Softmax,
        labels: vec!["safe".into(), "unsafe".into()],
    };
    let quantization = Quantization { bits: Bits::Four, block_size: 32, accuracy: Accuracy::Fast };
    EncoderFacts { licence: Some("Apache-2.0".into()), encoder, quantization }
}

fn write(facts: EncoderFacts, graph: &str) -> (TempDir, PathBuf, EncoderManifest) {
    let directory = TempDir::new().unwrap();
    let out = directory.path().join("package");
    let mut writer = PackageWriter::create_kind(PackageKind::Encoder, &out).unwrap();
    for file in ENCODER_REQUIRED {
        writer.write_bytes(file, if file == "classify.onnx" { graph } else { file }.as_bytes()).unwrap();
    }
    let manifest = writer.finish_encoder(facts).unwrap();
    (directory, out, manifest)
}

fn chain(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn refusal(out: &PathBuf) -> String {
    chain(&EncoderPackage::open(out).expect_err("must be refused"))
}

#[test]
fn opens_what_was_written() {
    let (_directory, out, manifest) = write(facts(), "graph");
    let package = EncoderPackage::open(&out).unwrap();
    assert_eq!((package.manifest(), package.base()), (&manifest, manifest.base));
    assert_eq!(fs::read(package.graph()).unwrap(), b"graph");
    assert_eq!(package_kind(&out).unwrap(), PackageKind::Encoder);
}

#[test]
fn the_other_kind_is_refused_by_name() {
    let (_directory, out, _) = write(facts(), "graph");
    let message = chain(&Package::open(&out).unwrap_err());
    assert!(message.contains("must be of kind decoder, got encoder"), "{message}");
    let text = fs::read_to_string(out.join("package.toml")).unwrap();
    // A decoder's manifest has no kind.
    fs::write(out.join("package.toml"), text.replace("kind = \"encoder\"\n", "")).unwrap();
    assert!(refusal(&out).contains("must be of kind encoder, got decoder"));
    assert_eq!(package_kind(&out).unwrap(), PackageKind::Decoder);
    fs::write(out.join("package.toml"), text.replace("\"encoder\"", "\"painter\"")).unwrap();
    assert!(refusal(&out).contains("got painter"));
    assert!(chain(&package_kind(&out).unwrap_err()).contains("got painter"));
    assert!(chain(&Package::open(&out).unwrap_err()).contains("got painter"));
}

#[test]
fn a_package_has_the_files_of_its_kind() {
    let directory = TempDir::new().unwrap();
    let out = directory.path().join("package");
    let mut writer = PackageWriter::create_kind(PackageKind::Encoder, &out).unwrap();
    assert!(matches!(writer.write_bytes("infer.onnx", b"1"), Err(WriteError::Name { .. })));
    writer.write_bytes("weights.bin", b"1").unwrap();
    assert!(writer.finish_encoder(facts()).is_err(), "files are missing");
    let mut writer = PackageWriter::create(&out).unwrap();
    assert!(matches!(writer.write_bytes("classify.onnx", b"1"), Err(WriteError::Name { .. })));
}

#[test]
fn the_identity_is_all_that_decides_an_answer() {
    let (_a, _, plain) = write(facts(), "graph");
    let mut same = facts();
    same.encoder.name = "another".into();
    same.licence = None;
    assert_eq!(write(same, "graph").2.base, plain.base);
    assert_ne!(write(facts(), "another graph").2.base, plain.base);
    let mut labels = facts();
    labels.encoder.labels.reverse();
    let mut sigmoid = facts();
    sigmoid.encoder.probabilities = Probabilities::Sigmoid;
    let mut bits = facts();
    bits.quantization.bits = Bits::Eight;
    for other in [labels, sigmoid, bits] {
        assert_ne!(write(other, "graph").2.base, plain.base);
    }
}

#[test]
fn damage_is_named() {
    let (_directory, out, manifest) = write(facts(), "graph");
    for file in ENCODER_REQUIRED {
        let whole = fs::read(out.join(file)).unwrap();
        fs::write(out.join(file), "other").unwrap();
        let message = refusal(&out);
        assert!(message.contains(file) && message.contains(&manifest.files[file].to_string()), "{message}");
        fs::write(out.join(file), whole).unwrap();
    }
    fs::write(out.join("NOTICE"), "dropped in").unwrap();
    assert!(refusal(&out).contains("NOTICE is not listed"));
}

#[test]
fn manifests_that_cannot_be_true() {
    let cases = [
        ("format = 1", "format = 2", "has format 2, this program reads format 1"),
        ("hidden_size = 32", "hidden_size = 32\nflavour = 1", "flavour"),
        ("hidden_size = 32", "hidden_size = 0", "hidden_size must be between"),
        ("layers = 2", "layers = 1000000", "layers must be between"),
        ("heads = 4", "heads = 5", "heads must divide hidden_size 32, got 5"),
        ("token_types = 2", "token_types = 17", "token_types must be between"),
        ("pad = 5", "pad = 128", "pad token must be below vocab_size 128, got 128"),
        ("\"bert\"", "\"ernie\"", "ernie"),
        ("\"softmax\"", "\"hardmax\"", "hardmax"),
        ("[\"safe\", \"unsafe\"]", "[]", "number of labels"),
        ("[\"safe\", \"unsafe\"]", "[\"safe\"]", "at least 2 labels, got 1"),
        ("[\"safe\", \"unsafe\"]", "[\"safe\", \"safe\"]", "label 1 must be"),
        ("[\"safe\", \"unsafe\"]", "[\"safe\", \"\"]", "label 1 must be"),
        ("[\"safe\", \"unsafe\"]", "[\"unsafe\", \"safe\"]", "must have base"),
        ("bits = 4", "bits = 8", "must have base"),
        ("block_size = 32", "block_size = 33", "block size must be"),
        ("\"classify.onnx\"", "\"infer.onnx\"", "must list classify.onnx"),
    ];
    let (_directory, out, _) = write(facts(), "graph");
    let text = fs::read_to_string(out.join("package.toml")).unwrap();
    for (from, to, expected) in cases {
        let changed = text.replacen(from, to, 1);
        assert_ne!(changed, text, "{from} is not in\n{text}");
        fs::write(out.join("package.toml"), changed).unwrap();
        let message = refusal(&out);
        assert!(message.contains(expected), "{message:?} must mention {expected:?}");
    }
}
