//! Packages on a real disk: written whole, opened only when every byte is as written.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

use std::error::Error;
use std::fs;
use std::path::PathBuf;

use commonweal_adapter::Target;
use commonweal_package::{
    Accuracy, AdapterDefaults, Architecture, Attention, Bits, CacheForm, Facts, Gemma, Manifest, ModelConfig,
    Package, PackageWriter, Quantization, REQUIRED, RopeScaling, Rounding, Tokens, WriteError, attach,
};
use tempfile::TempDir;

fn facts() -> Facts {
    let model = ModelConfig {
        architecture: Architecture::Llama,
        name: "test".into(),
        hidden_size: 32,
        intermediate_size: 64,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        vocab_size: 128,
        context: 64,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tied: true,
        rope_scaling: None,
        attention: Attention::default(),
        gemma: None,
    };
    let quantization = Quantization { bits: Bits::Four, block_size: 32, accuracy: Accuracy::Fast };
    let adapter = AdapterDefaults { rank: 8, alpha: 16.0, targets: Target::ALL.to_vec() };
    let tokens = Tokens { bos: Some(0), eos: vec![4], pad: 5 };
    Facts {
        licence: Some("Apache-2.0".into()),
        model,
        quantization,
        rounding: Rounding::default(),
        cache: CacheForm::default(),
        adapter,
        tokens,
    }
}

fn write(facts: Facts, graph: &str) -> (TempDir, PathBuf, Manifest) {
    let directory = TempDir::new().unwrap();
    let out = directory.path().join("package");
    let mut writer = PackageWriter::create(&out).unwrap();
    for file in REQUIRED {
        writer
            .write_bytes(
                file,
                if ["infer.onnx", "train.onnx"].contains(&file) { graph } else { file }.as_bytes(),
            )
            .unwrap();
    }
    assert!(!out.exists(), "nothing may appear before it is finished");
    let manifest = writer.finish(facts).unwrap();
    (directory, out, manifest)
}

fn refusal(out: &PathBuf) -> String {
    let error = Package::open(out).expect_err("must be refused");
    let causes = std::iter::successors(Some(&error as &dyn Error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[test]
fn opens_what_was_written() {
    let (_directory, out, manifest) = write(facts(), "graph");
    let package = Package::open(&out).unwrap();
    assert_eq!(package.manifest(), &manifest);
    assert_eq!(manifest.files.len(), REQUIRED.len());
    let layout = package.layout();
    assert_eq!((layout.layers(), layout.rank(), layout.modules().len()), (2, 8, 7));
    let down = layout.modules()[6];
    assert_eq!((down.target, down.inputs, down.outputs), (Target::Down, 64, 32));
    let key = layout.modules()[1];
    assert_eq!((key.target, key.inputs, key.outputs), (Target::K, 32, 32));
    assert_eq!(package.file("guard.toml"), None);
    assert_eq!(fs::read(package.file("weights.bin").unwrap()).unwrap(), b"weights.bin");
}

#[test]
fn an_unfinished_package_leaves_nothing() {
    let directory = TempDir::new().unwrap();
    let mut writer = PackageWriter::create(&directory.path().join("package")).unwrap();
    writer.write_bytes("weights.bin", b"1").unwrap();
    assert!(matches!(writer.write_bytes("virus.exe", b"1"), Err(WriteError::Name { .. })));
    assert!(writer.finish(facts()).is_err(), "files are missing");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn the_base_is_what_is_frozen() {
    let (_a, _, plain) = write(facts(), "graph");
    let mut same = facts();
    same.model.name = "another".into();
    same.quantization.accuracy = Accuracy::Exact;
    same.licence = None;
    same.adapter.rank = 4;
    assert_eq!(write(same, "a better graph").2.base, plain.base);
    let mut scaled = facts();
    let (factor, low_frequency_factor, high_frequency_factor) = (8.0, 1.0, 4.0);
    let scaling = RopeScaling { factor, low_frequency_factor, high_frequency_factor, original_context: 32 };
    scaled.model.rope_scaling = Some(scaling);
    let mut theta = facts();
    theta.model.rope_theta = 10_000.1;
    let mut bits = facts();
    bits.quantization.bits = Bits::Eight;
    let mut gemma = facts();
    gemma.model.gemma = Some(Gemma {
        embedding_scale: 5.65625,
        query_scalar: 24.0,
        score_cap: Some(50.0),
        logit_cap: None,
        local_theta: Some(1e4),
        rope_stretch: None,
    });
    let (_b, out, written) = write(gemma.clone(), "graph");
    assert_eq!(Package::open(&out).unwrap().manifest(), &written);
    let mut capped = gemma.clone();
    capped.model.gemma.as_mut().unwrap().logit_cap = Some(30.0);
    assert_ne!(write(capped, "graph").2.base, written.base);
    for other in [scaled, theta, bits, gemma] {
        assert_ne!(write(other, "graph").2.base, plain.base);
    }
    // Golden: other programs may compute it, and every trained adapter carries it.
    assert_eq!(plain.base.to_string(), "115b6e26a30745560d8176fa66594702bf459610721e7dca4316b028fa1e5003");
}

#[test]
fn damage_is_named() {
    for file in REQUIRED {
        let (_directory, out, manifest) = write(facts(), "graph");
        fs::write(out.join(file), "other").unwrap();
        let message = refusal(&out);
        let expected = manifest.files[file].to_string();
        let got = blake3::hash(b"other").to_hex();
        assert!([file, &expected, got.as_str()].iter().all(|word| message.contains(word)), "{message}");
        fs::remove_file(out.join(file)).unwrap();
        let message = refusal(&out);
        assert!(message.contains(file) && message.contains("missing"), "{message}");
        fs::create_dir(out.join(file)).unwrap();
        assert!(refusal(&out).contains("not a plain file"));
    }
}

#[test]
fn manifests_that_cannot_be_true() {
    let cases = [
        ("format = 1", "format = 2", "has format 2, this program reads format 1"),
        ("format = 1", "", "has format none"),
        ("hidden_size = 32", "hidden_size = 32\nflavour = 1", "flavour"),
        ("hidden_size = 32", "", "hidden_size"),
        ("hidden_size = 32", "hidden_size = 0", "hidden_size must be between"),
        ("hidden_size = 32", "hidden_size = -1", "hidden_size"),
        ("head_dim = 16", "head_dim = 12", "head_dim must be a multiple of 16"),
        ("kv_heads = 2", "kv_heads = 3", "multiple of kv_heads"),
        ("bits = 4", "bits = 5", "bits must be 4, 8 or 32"),
        ("block_size = 32", "block_size = 33", "block size must be"),
        ("eos = [4]", "eos = []", "end-of-sequence"),
        ("pad = 5", "pad = 128", "pad token"),
        ("rank = 8", "rank = 0", "rank"),
        ("[\"q\",", "[\"nose\",", "nose"),
        ("\"infer.onnx\"", "\"../infer.onnx\"", "infer.onnx"),
        ("rope_theta = 10000.0", "rope_theta = 500.0", "must have base"),
        ("rope_theta = 10000.0", "rope_theta = nan", "rope_theta must be a positive number"),
        ("base = \"", "base = \"x", "64 hexadecimal digits"),
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
    fs::write(out.join("package.toml"), vec![b' '; (1 << 20) + 1]).unwrap();
    assert!(refusal(&out).contains("longer than"));
    fs::remove_file(out.join("package.toml")).unwrap();
    assert!(refusal(&out).contains("package.toml is missing"));
}

#[test]
fn attached_files_are_vouched_for() {
    let (_directory, out, manifest) = write(facts(), "graph");
    fs::write(out.join("guard.toml"), "dropped in").unwrap();
    assert!(refusal(&out).contains("guard.toml is not listed"));
    let package = Package::open_base(&out).unwrap();
    attach(&package, &[("guard.toml", b"guard"), ("adapters/guard.safetensors", b"adapter")]).unwrap();
    let package = Package::open(&out).unwrap();
    assert_eq!(package.base(), manifest.base);
    assert_eq!(fs::read(package.file("adapters/guard.safetensors").unwrap()).unwrap(), b"adapter");
    assert!(matches!(attach(&package, &[("weights.bin", b"1")]), Err(WriteError::Name { .. })));
    fs::write(out.join("guard.toml"), "changed").unwrap();
    assert!(refusal(&out).contains("guard.toml must have the hash"));
}

#[test]
fn the_method_is_recorded_and_no_part_of_the_identity() {
    let (_plain, out, plain) = write(facts(), "graph");
    assert!(!fs::read_to_string(out.join("package.toml")).unwrap().contains("rounding"));
    for rounding in [Rounding::Rtn, Rounding::Wmse, Rounding::Gptq { tokens: 16_384, text: plain.base }] {
        let (_directory, out, manifest) = write(Facts { rounding, ..facts() }, "graph");
        assert_eq!((Package::open(&out).unwrap().manifest().rounding, manifest.base), (rounding, plain.base));
    }
    let text = fs::read_to_string(out.join("package.toml")).unwrap();
    assert!(Manifest::parse(&format!("{text}\n[rounding]\nmethod = \"awq\"\n")).is_err());
}

#[test]
fn the_form_of_the_cache_is_recorded_and_no_part_of_the_identity() {
    // A package without a word about it, as all were before there was a choice, keeps floats.
    let (_plain, out, plain) = write(facts(), "graph");
    let text = fs::read_to_string(out.join("package.toml")).unwrap();
    assert!(!text.contains("cache"));
    assert_eq!((plain.cache, plain.cache.component_bytes()), (CacheForm::Float, 4));
    let cache = CacheForm::Int8 { tokens: 16_384, text: plain.base };
    let (_directory, out, manifest) = write(Facts { cache, ..facts() }, "graph");
    assert_eq!((Package::open(&out).unwrap().manifest().cache, manifest.base), (cache, plain.base));
    assert_eq!(cache.component_bytes(), 1);
    assert!(Manifest::parse(&format!("{text}\n[cache]\nform = \"int4\"\n")).is_err());
}
