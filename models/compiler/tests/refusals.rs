//! Every bad checkpoint, option and disk is refused with a message that names the subject, and leaves nothing behind.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed test may panic")]

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use commonweal_adapter::Target;
use commonweal_compiler::Bits;
use commonweal_compiler::compile::{CompileError, CompileOptions, Method, compile};
use commonweal_compiler::tensors::Tensors;
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens")
}

/// A copy of a golden checkpoint, to be spoilt.
struct Spoilt {
    directory: TempDir,
}

impl Spoilt {
    fn new(variant: &str) -> Self {
        let directory = TempDir::new().unwrap();
        fs::create_dir(directory.path().join("checkpoint")).unwrap();
        for entry in fs::read_dir(goldens().join(variant)).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), directory.path().join("checkpoint").join(entry.file_name())).unwrap();
        }
        Self { directory }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join("checkpoint").join(file)
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
        self.file("config.json", config.to_string())
    }

    fn file(self, name: &str, bytes: impl AsRef<[u8]>) -> Self {
        fs::write(self.path(name), bytes).unwrap();
        self
    }

    fn without(self, name: &str) -> Self {
        fs::remove_file(self.path(name)).unwrap();
        self
    }

    /// Rewrites `model.safetensors`.
    fn weights(self, change: impl FnOnce(&mut Vec<u8>)) -> Self {
        let mut bytes = fs::read(self.path("model.safetensors")).unwrap();
        change(&mut bytes);
        self.file("model.safetensors", bytes)
    }

    /// Rewrites the header of `model.safetensors`.
    fn header(self, change: impl FnOnce(&mut Value)) -> Self {
        self.weights(|bytes| {
            let (mut header, data) = parse(bytes);
            change(&mut header);
            *bytes = assemble(&header, &data);
        })
    }

    fn options(&self) -> CompileOptions {
        CompileOptions::new(self.directory.path().join("checkpoint"), self.directory.path().join("package"))
    }

    /// Compiles, expects the message to have every one of `words`, and nothing to be left behind.
    fn refused(&self, words: &[&str]) {
        self.refused_with(&self.options(), words);
    }

    fn refused_with(&self, options: &CompileOptions, words: &[&str]) {
        let error = compile(options).expect_err("must be refused");
        assert!(error.is_bad_input(), "{error:?} must count as bad input");
        let message = chain(&error);
        for word in words {
            assert!(message.contains(word), "{message:?} must mention {word:?}");
        }
        assert_eq!(self.left(), ["checkpoint"], "nothing may be left behind");
    }

    fn left(&self) -> Vec<String> {
        let entries = fs::read_dir(self.directory.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

fn chain(error: &CompileError) -> String {
    let causes = std::iter::successors(Some(error as &dyn Error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn parse(bytes: &[u8]) -> (Value, Vec<u8>) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).unwrap(), bytes[8 + length..].to_vec())
}

fn assemble(header: &Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

const NORM: &str = "model.norm.weight";

#[test]
fn the_golden_checkpoints_compile() {
    for variant in ["tied", "untied"] {
        let spoilt = Spoilt::new(variant);
        compile(&spoilt.options()).unwrap();
        assert!(spoilt.left().contains(&"package".to_owned()));
    }
}

static LLAMA3: LazyLock<Value> = LazyLock::new(|| {
    json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    })
});

/// Every key of a rotary scaling is obeyed, or refused by name.
#[test]
fn rotary_scalings() {
    let mut steep = LLAMA3.clone();
    steep["factor"] = json!(1e-300);
    let cases: [(Value, &[&str]); 10] = [
        (
            json!({ "rope_parameters": { "full_attention": { "full_attention": { "rope_theta": 1e4 } } } }),
            &["rope_parameters", "within a kind"],
        ),
        (json!({ "rope_scaling": { "factor": 4.0 } }), &["rope_scaling", "without rope_type"]),
        (
            json!({ "rope_parameters": { "rope_theta": 1e4, "factor": 4.0 } }),
            &["rope_parameters", "rope_type"],
        ),
        (
            json!({ "rope_parameters": { "full_attention": { "rope_type": "yarn", "factor": 4.0 } } }),
            &["rope_parameters", "each kind"],
        ),
        (
            json!({ "rope_parameters": { "rope_type": "default", "full_attention": { "rope_theta": 1e4 } } }),
            &["rope_parameters", "one for all"],
        ),
        (
            json!({ "rope_scaling": { "rope_type": "default", "type": "linear" } }),
            &["rope_type default with type linear"],
        ),
        (json!({ "rope_scaling": { "rope_type": "default", "mscale": 1.0 } }), &["the key mscale"]),
        (json!({ "rope_scaling": { "partial_rotary_factor": 0.5 } }), &["partial_rotary_factor 0.5"]),
        (
            json!({ "rope_scaling": LLAMA3.clone(), "rope_parameters": { "rope_type": "default" } }),
            &["another than rope_parameters"],
        ),
        (json!({ "rope_scaling": steep }), &["rotary frequency", "inf"]),
    ];
    for (changes, words) in cases {
        Spoilt::new("tied").config(&changes).refused(words);
    }
}

#[test]
fn configurations() {
    let cases: [(Value, &[&str]); 24] = [
        (json!({ "architectures": ["GPT2LMHeadModel"] }), &["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3"]),
        (json!({ "architectures": ["MistralForCausalLM"], "num_hidden_layers": u64::MAX }), &["layers"]),
        (json!({ "architectures": ["Qwen2ForCausalLM"] }), &["self_attn.q_proj.bias"]),
        (json!({ "architectures": ["Qwen3ForCausalLM"] }), &["self_attn.q_norm.weight"]),
        (json!({ "architectures": null }), &["architecture none"]),
        (json!({ "rope_scaling": { "type": "yarn", "factor": 2.0 } }), &["rope_scaling", "yarn"]),
        (json!({ "rope_scaling": { "rope_type": "llama3" } }), &["rope_scaling.factor"]),
        (json!({ "rope_scaling": { "rope_type": "linear", "factor": 2.0 } }), &["rope_scaling", "linear"]),
        (
            json!({ "rope_parameters": { "full_attention": { "rope_theta": 1e6 } } }),
            &["rope_parameters", "each kind"],
        ),
        (json!({ "attn_logit_softcapping": 50.0 }), &["attn_logit_softcapping", "50"]),
        (json!({ "final_logit_softcapping": 30.0 }), &["final_logit_softcapping", "30"]),
        (
            json!({ "architectures": ["MistralForCausalLM"], "sliding_window": 4, "layer_types": ["chunked_attention"] }),
            &["layer_types", "chunked_attention"],
        ),
        (json!({ "mlp_bias": true }), &["mlp_bias"]),
        (json!({ "hidden_act": "gelu" }), &["hidden_act", "gelu"]),
        (json!({ "sliding_window": 4096 }), &["sliding_window"]),
        (json!({ "quantization_config": { "quant_method": "gptq" } }), &["quantization_config", "gptq"]),
        (json!({ "hidden_size": null }), &["config.json", "hidden_size"]),
        (json!({ "num_key_value_heads": 3 }), &["heads", "kv_heads", "3"]),
        (json!({ "head_dim": 24 }), &["head_dim", "16", "24"]),
        (json!({ "num_attention_heads": 0, "head_dim": null }), &["heads", "0"]),
        (json!({ "vocab_size": 1_u64 << 40 }), &["vocab_size"]),
        (json!({ "num_hidden_layers": u64::MAX }), &["layers"]),
        (json!({ "rms_norm_eps": -1.0 }), &["rms_norm_eps", "-1"]),
        (json!({ "eos_token_id": 400 }), &["eos", "128", "400"]),
    ];
    for (changes, words) in cases {
        Spoilt::new("tied").config(&changes).refused(words);
    }
    Spoilt::new("tied").file("config.json", "{").refused(&["config.json"]);
    Spoilt::new("tied").without("config.json").refused(&["config.json"]);
    Spoilt::new("tied").config(&json!({ "eos_token_id": null })).refused(&["end-of-sequence"]);
    for good in [
        json!({ "rope_scaling": { "rope_type": "default" } }),
        json!({ "rope_scaling": { "rope_type": "default", "type": "default", "beta_fast": null } }),
        json!({ "rope_parameters": { "type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0 } }),
        json!({ "rope_scaling": LLAMA3.clone(), "rope_parameters": LLAMA3.clone() }),
    ] {
        compile(&Spoilt::new("tied").config(&good).options()).unwrap();
    }
}

/// Lists of layers that do not fit the layers, or that say another thing than the other keys, are refused by name.
#[test]
fn lists_of_layers() {
    let (full, sliding) = ("full_attention", "sliding_attention");
    let windows = json!({ "use_sliding_window": true, "sliding_window": 7 });
    let smollm3 = "SmolLM3ForCausalLM";
    let cases: [(&str, Value, &[&str]); 8] = [
        ("Qwen2ForCausalLM", json!({ "layer_types": [sliding] }), &["layer_types", "1 for 2 layers"]),
        ("Qwen3ForCausalLM", json!({ "layer_types": [full, full, sliding] }), &["layer_types", "3 for 2"]),
        ("Gemma2ForCausalLM", json!({ "layer_types": [] }), &["layer_types", "0 for 2 layers"]),
        ("MistralForCausalLM", json!({ "layer_types": [sliding, full] }), &["layer_types", full, "layer 1"]),
        (
            "Qwen2ForCausalLM",
            json!({ "use_sliding_window": false, "layer_types": [full, sliding] }),
            &["layer_types", sliding, "layer 1"],
        ),
        (smollm3, json!({ "layer_types": [sliding, full, full] }), &["layer_types", "3 for 2"]),
        (smollm3, json!({ "no_rope_layers": [1] }), &["no_rope_layers", "1 for 2 layers"]),
        (smollm3, json!({ "no_rope_layer_interval": 0 }), &["no_rope_layer_interval", "0"]),
    ];
    for (class, changes, words) in cases {
        let named = json!({ "architectures": [class] });
        Spoilt::new("tied").config(&named).config(&windows).config(&changes).refused(words);
    }
}

/// What a Gemma can say and no graph does. The checkpoint is a Llama's, whose keys that Gemma reads are the same.
#[test]
fn configurations_of_gemma() {
    let cases: [(&str, Value, &[&str]); 14] = [
        (
            "Gemma3ForConditionalGeneration",
            json!({ "hidden_size": null, "text_config": {} }),
            &["ConditionalGeneration"],
        ),
        (
            "Gemma3ForCausalLM",
            json!({ "vision_config": { "model_type": "siglip" } }),
            &["vision_config", "siglip"],
        ),
        (
            "Gemma3ForCausalLM",
            json!({ "use_bidirectional_attention": true }),
            &["use_bidirectional_attention"],
        ),
        ("Gemma3ForCausalLM", json!({ "attn_logit_softcapping": 50.0 }), &["attn_logit_softcapping", "50"]),
        ("Gemma3ForCausalLM", json!({ "rope_scaling": { "rope_type": "yarn" } }), &["rope_scaling", "yarn"]),
        ("Gemma3ForCausalLM", json!({ "rope_scaling": { "rope_type": "linear" } }), &["rope_scaling.factor"]),
        (
            "Gemma3ForCausalLM",
            json!({ "rope_parameters": { "sliding_attention": { "rope_type": "linear", "factor": 2.0 } } }),
            &["rope_parameters.sliding_attention", "linear"],
        ),
        ("Gemma3ForCausalLM", json!({ "sliding_window_pattern": 0 }), &["sliding_window_pattern", "0"]),
        ("Gemma3ForCausalLM", json!({}), &["q_norm.weight"]),
        ("Gemma2ForCausalLM", json!({}), &["pre_feedforward_layernorm.weight"]),
        ("Gemma2ForCausalLM", json!({ "sliding_window": null }), &["sliding_window", "none"]),
        ("Gemma2ForCausalLM", json!({ "hidden_activation": "gelu" }), &["hidden_activation", "gelu"]),
        ("Gemma2ForCausalLM", json!({ "query_pre_attn_scalar": 0 }), &["query_scalar", "positive", "0"]),
        ("Gemma2ForCausalLM", json!({ "final_logit_softcapping": 1e-60 }), &["logit_cap", "positive"]),
    ];
    for (class, changes, words) in cases {
        let gemma = json!({ "architectures": [class], "sliding_window": 7 });
        Spoilt::new("tied").config(&gemma).config(&changes).refused(words);
    }
}

#[test]
fn weight_files() {
    let tied = || Spoilt::new("tied");
    tied().without("model.safetensors").refused(&["model.safetensors", "neither"]);
    tied().weights(|bytes| bytes.truncate(5)).refused(&["model.safetensors"]);
    tied().weights(|bytes| bytes.truncate(100)).refused(&["header", "truncated"]);
    tied().weights(|bytes| bytes.truncate(bytes.len() - 2)).refused(&["bytes long", "truncated"]);
    tied().weights(|bytes| bytes.push(0)).refused(&["bytes long"]);
    tied().weights(|bytes| bytes[..8].fill(0xff)).refused(&["header", &u64::MAX.to_string()]);
    tied().weights(|bytes| bytes[8] = b'x').refused(&["damaged header"]);
    tied().header(|header| header[NORM]["data_offsets"][1] = json!(u64::MAX)).refused(&["damaged header"]);
    tied().header(|header| header[NORM]["data_offsets"] = json!([7, 71])).refused(&["damaged header"]);
    tied()
        .header(|header| header[NORM]["shape"] = json!([1_u64 << 40, 1_u64 << 40]))
        .refused(&["damaged header"]);
    tied().header(|header| header[NORM]["dtype"] = json!("F32")).refused(&["damaged header"]);
    tied().header(|header| header[NORM]["dtype"] = json!("Q9")).refused(&["damaged header"]);
    tied().header(|header| header[NORM]["dtype"] = json!("I16")).refused(&[NORM, "I16"]);
    tied().header(|header| header[NORM]["shape"] = json!([2, 16])).refused(&[NORM, "[32]", "[2, 16]"]);
    tied()
        .header(|header| {
            let entry = header.as_object_mut().unwrap().remove(NORM).unwrap();
            header["model.norm.gain"] = entry;
        })
        .refused(&[NORM, "missing"]);
}

#[test]
fn values_that_are_not_numbers() {
    for (bits, shown) in [(0x7fc0_u16, "NaN"), (0x7f80, "inf"), (0xff80, "-inf")] {
        let name = "model.layers.1.mlp.up_proj.weight";
        let spoilt = Spoilt::new("tied").weights(|bytes| {
            let (header, mut data) = parse(bytes);
            let start = header[name]["data_offsets"][0].as_u64().unwrap() as usize;
            // Row 3 of 32 columns of two bytes.
            data[start + 3 * 64 + 10..][..2].copy_from_slice(&bits.to_le_bytes());
            *bytes = assemble(&header, &data);
        });
        spoilt.refused(&[name, shown, "row 3"]);
    }
}

#[test]
fn shards() {
    let index = "model.safetensors.index.json";
    let untied = || Spoilt::new("untied");
    untied().file(index, "[]").refused(&["index"]);
    untied().file(index, r#"{"weight_map":{}}"#).refused(&["shards", "0"]);
    untied().file(index, r#"{"weight_map":{"x":"../model.safetensors"}}"#).refused(&["shards", "../model"]);
    untied().without("model-00002-of-00002.safetensors").refused(&["model-00002-of-00002.safetensors"]);
    let twice = untied();
    fs::copy(twice.path("model-00001-of-00002.safetensors"), twice.path("model-00002-of-00002.safetensors"))
        .unwrap();
    twice.refused(&["more than one file"]);
}

/// Gemma 3 1B's tokenizer has a token more than its embedding rows, which stands for an image.
#[test]
fn a_token_for_images_without_a_row_is_dropped() {
    let mut tokenizer: Value =
        serde_json::from_slice(&fs::read(goldens().join("tied/tokenizer.json")).unwrap()).unwrap();
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    for number in vocabulary.len()..128 {
        vocabulary.insert(format!("<unused{number}>"), number.into());
    }
    let added = |content: &str| {
        let mut tokenizer = tokenizer.clone();
        tokenizer["added_tokens"].as_array_mut().unwrap().push(json!({
            "id": 128, "content": content, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        }));
        Spoilt::new("tied").file("tokenizer.json", tokenizer.to_string())
    };
    added("<another>").refused(&["wrong tokenizer", "<another>", "128"]);
    let sees = added("<image_soft_token>");
    compile(&sees.options()).unwrap();
    let written = fs::read(sees.directory.path().join("package/tokenizer.json")).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&written).unwrap(), tokenizer);
}

#[test]
fn tokenizers_and_templates() {
    let tied = || Spoilt::new("tied");
    tied().without("tokenizer.json").refused(&["tokenizer.json"]);
    tied().file("tokenizer.json", "{}").refused(&["tokenizer.json", "not a tokenizer"]);
    let tokenizer = fs::read_to_string(goldens().join("tied/tokenizer.json")).unwrap();
    let larger = tokenizer.replacen(r#""<|unknown|>":101"#, r#""<|unknown|>":999"#, 1);
    assert_ne!(larger, tokenizer);
    tied().file("tokenizer.json", larger).refused(&["wrong tokenizer", "999", "128"]);
    tied().without("chat_template.jinja").refused(&["chat template", "--chat-template"]);
    tied().file("chat_template.jinja", "{% for %}").refused(&["chat_template.jinja"]);
    tied().file("special_tokens_map.json", r#"{"eos_token":"<|nowhere|>"}"#).refused(&["<|nowhere|>"]);
    let configured = json!({ "chat_template": "{{ messages }}", "eos_token": { "content": "<|user|>" } });
    let spoilt = tied().without("chat_template.jinja").file("tokenizer_config.json", configured.to_string());
    let summary = compile(&spoilt.options()).unwrap();
    assert_eq!(summary.manifest.tokens.eos, [4, 1]);
}

#[test]
fn options() {
    let spoilt = Spoilt::new("tied");
    let options = || spoilt.options();
    spoilt.refused_with(&CompileOptions { block_size: 48, ..options() }, &["block size", "48"]);
    compile(&CompileOptions {
        block_size: 64,
        bits: Bits::Full,
        out: spoilt.directory.path().join("checkpoint/inside"),
        ..options()
    })
    .unwrap();
    spoilt.refused_with(&CompileOptions { rank: 0, ..options() }, &["rank"]);
    spoilt.refused_with(&CompileOptions { targets: vec![Target::Q, Target::Q], ..options() }, &["q, q"]);
    spoilt.refused_with(&CompileOptions { context: Some(65), ..options() }, &["context", "64", "65"]);
    spoilt.refused_with(&CompileOptions { checkpoint: "/nowhere".into(), ..options() }, &["/nowhere"]);
    let template = Some("/nowhere.jinja".into());
    spoilt.refused_with(&CompileOptions { chat_template: template, ..options() }, &["/nowhere.jinja"]);
    let occupied = spoilt.path("");
    spoilt.refused_with(&CompileOptions { out: occupied, ..options() }, &["already exists"]);
    let occupied = spoilt.path("config.json");
    spoilt.refused_with(&CompileOptions { out: occupied, ..options() }, &["already exists"]);
}

#[test]
fn a_place_that_cannot_be_written() {
    let spoilt = Spoilt::new("tied");
    let out = spoilt.path("config.json").join("package");
    let error = compile(&CompileOptions { out, ..spoilt.options() }).unwrap_err();
    assert!(!error.is_bad_input());
    assert!(chain(&error).contains("cannot be written"), "{}", chain(&error));
    assert_eq!(spoilt.left(), ["checkpoint"]);
}

proptest! {
    /// Whatever the bytes, opening and reading ends in a value or an error.
    #[test]
    fn damaged_weight_files_never_panic(damage in prop::collection::vec((0_usize..3000, any::<u8>()), 1..8)) {
        let spoilt = Spoilt::new("tied").weights(|bytes| damage.iter().for_each(|&(at, byte)| bytes[at] = byte));
        if let Ok(tensors) = Tensors::open(&spoilt.path(""))
            && tensors.check(NORM, &[32]).is_ok()
        {
            let _ = tensors.rows(NORM, 0..32);
        }
    }
}

#[test]
fn packed_checkpoints_are_refused_by_name() {
    let name = "model.layers.0.self_attn.q_proj.weight";
    let packed = |header: &mut Value| {
        let tensor = header.as_object_mut().unwrap().remove(name).unwrap();
        header["model.layers.0.self_attn.q_proj.qweight"] = tensor;
    };
    Spoilt::new("tied").header(packed).refused(&[name, "qweight", "GPTQ or AWQ"]);
}

#[test]
fn a_method_without_its_text_is_refused() {
    let spoilt = Spoilt::new("tied");
    let options = CompileOptions { method: Method::Gptq, ..spoilt.options() };
    spoilt.refused_with(&options, &["Gptq", "calibration text, got none"]);
    spoilt.refused_with(&CompileOptions { bits: Bits::Full, ..options.clone() }, &["Gptq", "not rounded"]);
}
