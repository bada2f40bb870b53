//! Every architecture but plain Llama in the real ONNX Runtime against Hugging Face's implementation
//! (`goldens/make_architectures.py`): logits at once and over the cache, loss, and the gradient of every adapter tensor in
//! every graph; and at 4 bits against floats of the same values.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed test may panic")]

#[path = "onnx_runtime/mod.rs"]
mod onnx_runtime;

use std::path::Path;

use commonweal_compiler::config::read_file;
use commonweal_compiler::{Accuracy, Architecture, Attention, Bias, Gemma, ModelConfig, Window};
use onnx_runtime::case::{Case, form};
use onnx_runtime::dequantize::dequantize;
use onnx_runtime::{goldens, read};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The reference's rotary tables are 32-bit floats; measured errors are about 1e-6.
const TOLERANCE: f64 = 2e-5;

/// Compiles a golden checkpoint as it is and compares every graph with the golden; then at 4 bits, and compares with floats
/// of the values that the codes stand for.
fn agrees(variant: &str, architecture: Architecture, attention: &Attention) -> ModelConfig {
    let directory = goldens().join("architectures").join(variant);
    // The text files are those of the other goldens.
    let checkpoint = TempDir::new().unwrap();
    for (from, names) in [
        (&directory, ["config.json", "model.safetensors"]),
        (&goldens().join("tied"), ["tokenizer.json", "chat_template.jinja"]),
    ] {
        for name in names {
            std::fs::copy(from.join(name), checkpoint.path().join(name)).unwrap();
        }
    }
    let golden = read(&format!("architectures/{variant}/golden.safetensors"));
    let compiled = |label: String, checkpoint: &Path, bits| {
        Case::new(&label, checkpoint, form(bits, 32, Accuracy::Exact), golden.clone(), golden.clone())
    };
    let case = compiled(variant.into(), checkpoint.path(), 32);
    let model = case.package.manifest().model.clone();
    assert_eq!((model.architecture, &model.attention), (architecture, attention));
    every_graph_agrees(case);

    let mut quantized = compiled(format!("{variant} 4"), checkpoint.path(), 4);
    let floats = TempDir::new().unwrap();
    dequantize(&quantized.package, checkpoint.path(), floats.path());
    quantized.expected = compiled(format!("{variant} of floats"), floats.path(), 32).computed();
    every_graph_agrees(quantized);
    model
}

/// The graphs that recompute more, train less or have no adapter too.
fn every_graph_agrees(mut case: Case) {
    case.gradients_agree(TOLERANCE);
    case.logits_agree(TOLERANCE);
    case.base_agrees(TOLERANCE);
}

#[test]
fn llama_with_biases() {
    agrees("llama-bias", Architecture::Llama, &Attention { bias: Bias::All, ..Attention::default() });
}

/// Short wavelengths as they are, long ones eight times as long, and some between.
#[test]
fn llama_with_stretched_wavelengths() {
    let model = agrees("llama3-rope", Architecture::Llama, &Attention::default());
    let scaling = model.rope_scaling.unwrap();
    assert_eq!((scaling.factor, scaling.original_context), (8.0, 64));
}

#[test]
fn mistral_with_its_window() {
    let window = Some(Window { tokens: 7, layers: vec![0, 1] });
    agrees("mistral", Architecture::Mistral, &Attention { window, ..Attention::default() });
}

#[test]
fn qwen2_with_and_without_a_window() {
    let attention = Attention { bias: Bias::Qkv, ..Attention::default() };
    agrees("qwen2", Architecture::Qwen2, &attention);
    let window = Some(Window { tokens: 5, layers: vec![1] });
    agrees("qwen2-window", Architecture::Qwen2, &Attention { window, ..attention });
}

#[test]
fn qwen3_with_norms_of_heads() {
    agrees("qwen3", Architecture::Qwen3, &Attention { head_norm: true, ..Attention::default() });
}

#[test]
fn smollm3_with_layers_that_do_not_rotate() {
    agrees("smollm3", Architecture::SmolLm3, &Attention { unrotated: vec![3], ..Attention::default() });
}

/// Both caps, norms behind the blocks, a window of 7 in every second of four layers and 20 tokens.
#[test]
fn gemma2_with_caps_and_windows() {
    let window = Some(Window { tokens: 7, layers: vec![0, 2] });
    let model = agrees("gemma2", Architecture::Gemma2, &Attention { window, ..Attention::default() });
    let gemma = Gemma {
        embedding_scale: f64::from(32_f32.sqrt()),
        query_scalar: 24.0,
        score_cap: Some(2.0),
        logit_cap: Some(3.0),
        local_theta: None,
        rope_stretch: None,
    };
    assert_eq!(model.gemma, Some(gemma));
}

/// Rotary wavelengths of two bases, one of them stretched, norms of heads, and the embedding's scale in bfloat16.
#[test]
fn gemma3_with_two_kinds_of_layers() {
    let window = Some(Window { tokens: 5, layers: vec![0, 1, 3] });
    let attention = Attention { window, head_norm: true, ..Attention::default() };
    let model = agrees("gemma3", Architecture::Gemma3, &attention);
    let gemma = Gemma {
        embedding_scale: 5.65625,
        query_scalar: 24.0,
        score_cap: None,
        logit_cap: None,
        local_theta: Some(10_000.0),
        rope_stretch: Some(8.0),
    };
    assert_eq!(model.gemma, Some(gemma));
}

/// What a file leaves out is what `transformers` takes for it (`goldens/make_configurations.py`).
#[test]
fn what_a_file_does_not_say() {
    let cases = std::fs::read(goldens().join("configurations.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_slice(&cases).unwrap();
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("config.json");
    for case in &cases {
        std::fs::write(&file, case["config"].to_string()).unwrap();
        let attention = read_file(&file).unwrap().model.attention;
        let window: Option<Window> = serde_json::from_value(case["window"].clone()).unwrap();
        let unrotated: Vec<usize> = serde_json::from_value(case["unrotated"].clone()).unwrap();
        assert_eq!((attention.window, attention.unrotated), (window, unrotated), "{}", case["config"]);
    }
    assert_eq!(cases.len(), 22);
}

/// The keys that `transformers` 5 writes say the same as those of the published files.
#[test]
fn gemma3_by_its_newer_keys() {
    let published = goldens().join("architectures/gemma3/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&published).unwrap()).unwrap();
    let keys = config.as_object_mut().unwrap();
    let old = ["sliding_window_pattern", "rope_theta", "rope_local_base_freq", "rope_scaling", "torch_dtype"];
    assert!(old.into_iter().all(|key| keys.remove(key).is_some()));
    let layer = |layer| if layer == 2 { "full_attention" } else { "sliding_attention" };
    keys.insert("layer_types".into(), json!([0, 1, 2, 3].map(layer)));
    keys.insert("dtype".into(), json!("bfloat16"));
    let ropes = json!({
        "full_attention": { "rope_type": "linear", "factor": 8.0, "rope_theta": 1e6 },
        "sliding_attention": { "rope_type": "default", "rope_theta": 1e4 },
    });
    keys.insert("rope_parameters".into(), ropes);
    let folder = TempDir::new().unwrap();
    let mut newer = folder.path().join("gemma3");
    std::fs::create_dir(&newer).unwrap();
    newer.push("config.json");
    std::fs::write(&newer, config.to_string()).unwrap();
    assert_eq!(read_file(&newer).unwrap(), read_file(&published).unwrap());
}
