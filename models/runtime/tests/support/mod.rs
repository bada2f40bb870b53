//! What the tests against the real library share: a tiny random package, compiled once per process, and adapters.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use commonweal_adapter::Adapter;
use commonweal_compiler::{
    Accuracy,
    compile::{CacheBits, CompileOptions, compile_with},
    layers::Calibration,
    random::RandomOptions,
};
use commonweal_package::{Facts, Manifest, Package, PackageWriter, REQUIRED};
use commonweal_runtime::{GenerateOptions, Library, Model, OpenOptions, Prompt, TrainingRow};

pub(crate) fn library() -> Library {
    Library::load(None).expect("the onnx runtime library, put in place by scripts/setup")
}

/// Every form of the cache: what holds for one holds for all.
pub(crate) const CACHES: [CacheBits; 2] = [CacheBits::Full, CacheBits::Eight];

/// A random Llama of two layers with a byte-level tokenizer; exact kernels, so that numbers compare closely.
pub(crate) fn package() -> Package {
    package_with(CacheBits::Full)
}

/// The same with a cache of that form.
pub(crate) fn package_with(cache: CacheBits) -> Package {
    static BUILT: [OnceLock<(tempfile::TempDir, PathBuf)>; 2] = [OnceLock::new(), OnceLock::new()];
    let (_, path) = BUILT[usize::from(cache == CacheBits::Eight)].get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = build_with(folder.path(), Accuracy::Exact, cache);
        (folder, path)
    });
    Package::open(path).unwrap()
}

/// Compiles the tiny package inside a folder.
pub(crate) fn build(folder: &Path) -> PathBuf {
    build_with(folder, Accuracy::Exact, CacheBits::Full)
}

/// The same with kernels of either kind and a cache of that form.
pub(crate) fn build_with(folder: &Path, accuracy: Accuracy, cache: CacheBits) -> PathBuf {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let (checkpoint, out) = (folder.join("checkpoint"), folder.join("package"));
    let options = RandomOptions {
        config: data.join("tiny.config.json"),
        tokenizer: data.join("bytes.tokenizer.json"),
        chat_template: Some(data.join("chatml.jinja")),
        out: checkpoint.clone(),
        seed: 1,
    };
    commonweal_compiler::random::random(&options, &mut |_, _| ()).unwrap();
    let options =
        CompileOptions { accuracy, rank: 4, alpha: 8.0, cache, ..CompileOptions::new(checkpoint, &out) };
    let (tokens, mut engine): (Vec<u32>, _) = ((0..512).map(|at| at * at % 287).collect(), library());
    let calibration =
        (cache == CacheBits::Eight).then_some(Calibration { tokens: &tokens, engine: &mut engine });
    compile_with(&options, calibration, &mut |_, _| ()).unwrap();
    out
}

/// The tiny package with other facts or files. The hashes are those of what it holds, so that only what is inside a
/// file can give it away.
pub(crate) fn altered(folder: &Path, change: impl FnOnce(&mut Facts), file: &str, bytes: &[u8]) -> Package {
    let (whole, out) = (package(), folder.join("altered"));
    let mut writer = PackageWriter::create(&out).unwrap();
    for name in REQUIRED {
        let own = std::fs::read(whole.directory().join(name)).unwrap();
        writer.write_bytes(name, if name == file { bytes } else { &own }).unwrap();
    }
    let manifest = whole.manifest().clone();
    let Manifest { licence, model, quantization, rounding, cache, adapter, tokens, .. } = manifest;
    let mut facts = Facts { licence, model, quantization, rounding, cache, adapter, tokens };
    change(&mut facts);
    writer.finish(facts).unwrap();
    Package::open(out).unwrap()
}

pub(crate) fn model() -> Model {
    model_with(OpenOptions::default())
}

pub(crate) fn model_with(options: OpenOptions) -> Model {
    Model::open(&library(), &package(), options).unwrap()
}

pub(crate) fn cached_model(cache: CacheBits, options: OpenOptions) -> Model {
    Model::open(&library(), &package_with(cache), options).unwrap()
}

/// An adapter that changes the model's output visibly.
pub(crate) fn adapter(model: &Model, seed: u64) -> Adapter {
    let mut adapter = Adapter::init(Arc::clone(model.layout()), seed);
    for (index, value) in adapter.values_mut().iter_mut().enumerate() {
        let wave =
            ((index as u64).wrapping_mul(2_654_435_761).wrapping_add(seed * 97) % 1000) as f32 / 1000.0;
        *value += 0.3 * (wave - 0.5);
    }
    adapter
}

pub(crate) fn prompts(model: &Model, texts: &[&str]) -> Vec<Prompt> {
    texts.iter().map(|text| Prompt::from(model.tokenizer().encode(text).unwrap())).collect()
}

/// A row that learns `answer` after `prompt`.
pub(crate) fn row(model: &Model, prompt: &str, answer: &str) -> TrainingRow {
    let mut ids = model.tokenizer().encode(prompt).unwrap();
    let mut weights = vec![0.0; ids.len()];
    ids.extend(model.tokenizer().encode(answer).unwrap());
    weights.resize(ids.len(), 1.0);
    TrainingRow { ids, weights }
}

pub(crate) fn greedy(max_new_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_new_tokens, ..GenerateOptions::default() }
}
