//! Small random packages, compiled here, whose tokenizer has the tokens that published guards write and answer with.

use std::{fs, path::Path};

use commonweal_compiler::compile::{CompileOptions, compile};
use commonweal_compiler::random::{RandomOptions, random};
use commonweal_package::{Package, attach};
use commonweal_runtime::{Library, Model, OpenOptions};
use serde_json::{Value, json};

const LLAMA: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":64,
    "intermediate_size":96,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":16,
    "vocab_size":320,"max_position_embeddings":8192,"rope_theta":10000.0,"rms_norm_eps":1e-5,
    "tie_word_embeddings":true,"hidden_act":"silu","bos_token_id":0,"eos_token_id":2,"pad_token_id":0}"#;
/// A Gemma 2, as ShieldGemma is, whose local layers see less than one of its questions.
pub(crate) const GEMMA: &str = r#"{"architectures":["Gemma2ForCausalLM"],"model_type":"gemma2","hidden_size":64,
    "intermediate_size":96,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":32,
    "vocab_size":320,"max_position_embeddings":8192,"rope_theta":10000.0,"rms_norm_eps":1e-6,
    "query_pre_attn_scalar":32,"attn_logit_softcapping":50.0,"final_logit_softcapping":30.0,"sliding_window":128,
    "hidden_activation":"gelu_pytorch_tanh","bos_token_id":0,"eos_token_id":2,"pad_token_id":0}"#;
const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
pub(crate) const BYTES: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../runtime/tests/data/bytes.tokenizer.json");

/// What the guards' templates write beside text.
const SPECIAL: [&str; 9] = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<think>",
    "</think>",
];
/// The guards' answers and how their categories begin, as their own tokenizers have them.
const WORDS: [&str; 21] = [
    "safe",
    "unsafe",
    "Yes",
    "No",
    " Safe",
    " Unsafe",
    " Cont",
    " Viol",
    " Non",
    " Sexual",
    " P",
    " Suicide",
    " Un",
    " Polit",
    " Copyright",
    " Jail",
    "10",
    "11",
    "12",
    "13",
    "14",
];

/// Writes a byte tokenizer with the guards' tokens, less one of them.
pub(crate) fn write_tokenizer(path: &Path, without: Option<&str>) {
    let mut tokenizer: Value = serde_json::from_str(&fs::read_to_string(BYTES).unwrap()).unwrap();
    let words = SPECIAL.iter().map(|token| (token, true)).chain(WORDS.iter().map(|word| (word, false)));
    let words = words.filter(|(word, _)| Some(**word) != without);
    let first = tokenizer["model"]["vocab"].as_object().unwrap().len();
    for (id, (content, special)) in (first..).zip(words) {
        tokenizer["added_tokens"].as_array_mut().unwrap().push(json!({
            "id": id, "content": content, "special": special,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        }));
    }
    fs::write(path, tokenizer.to_string()).unwrap();
}

/// Compiles a package of a small Llama with a tokenizer.
pub(crate) fn write_package(folder: &Path, name: &str, tokenizer: &Path) -> Package {
    write_package_of(LLAMA, folder, name, tokenizer)
}

/// Compiles a package of this shape with a tokenizer.
pub(crate) fn write_package_of(shape: &str, folder: &Path, name: &str, tokenizer: &Path) -> Package {
    let path = |extension: &str| folder.join(format!("{name}.{extension}"));
    fs::write(path("json"), shape).unwrap();
    fs::write(path("jinja"), CHATML).unwrap();
    let options = RandomOptions {
        config: path("json"),
        tokenizer: tokenizer.into(),
        chat_template: Some(path("jinja")),
        out: path("checkpoint"),
        seed: 11,
    };
    random(&options, &mut |_, _| ()).unwrap();
    compile(&CompileOptions::new(path("checkpoint"), folder.join(name))).unwrap();
    Package::open(folder.join(name)).unwrap()
}

/// A package with a `guard.toml`.
pub(crate) fn with_guard(package: &Package, guard: &str) -> Package {
    attach(package, &[("guard.toml", guard.as_bytes())]).unwrap();
    Package::open(package.directory()).unwrap()
}

pub(crate) fn model(package: &Package) -> Model {
    Model::open(&Library::load(None).unwrap(), package, OpenOptions::default()).unwrap()
}
