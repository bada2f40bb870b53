//! The aggregator with a guard in a package of its own, as a device has it: by `guard.toml` alone.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::{fs, path::Path};

use aggregator::{
    config::Config,
    laboratory::{Answered, Laboratory, open_package},
};
use commonweal_compiler::compile::{CompileOptions, compile};
use commonweal_compiler::random::{RandomOptions, random};
use commonweal_package::{Package, attach};
use commonweal_runtime::{Cancel, Library, Model, OpenOptions};
use commonweal_safety::{Guard, GuardConfig, Judgement, Pair};
use commonweal_tests::program::workspace;

const SHAPE: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":64,
    "intermediate_size":96,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":16,
    "vocab_size":320,"max_position_embeddings":1024,"rope_theta":10000.0,"rms_norm_eps":1e-5,
    "tie_word_embeddings":true,"hidden_act":"silu","bos_token_id":0,"eos_token_id":2,"pad_token_id":0}"#;
const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
const ANSWERED: [(&str, &str); 3] =
    [("How do I bake bread?", "Mix flour and water."), ("x", "No."), ("", "A longer answer, to be cut off.")];

/// A small random package of these weights.
fn package(folder: &Path, name: &str, seed: u64) -> Package {
    let path = |extension: &str| folder.join(format!("{name}.{extension}"));
    fs::write(path("json"), SHAPE).unwrap();
    fs::write(path("jinja"), CHATML).unwrap();
    let options = RandomOptions {
        config: path("json"),
        tokenizer: workspace().join("models/runtime/tests/data/bytes.tokenizer.json"),
        chat_template: Some(path("jinja")),
        out: path("checkpoint"),
        seed,
    };
    random(&options, &mut |_, _| ()).unwrap();
    compile(&CompileOptions::new(path("checkpoint"), folder.join(name))).unwrap();
    Package::open(folder.join(name)).unwrap()
}

fn config(package: Option<&str>) -> GuardConfig {
    let text = fs::read_to_string(workspace().join("models/safety/tests/data/guard.toml")).unwrap();
    let mut config = GuardConfig::from_toml(&text).unwrap();
    config.policy = "<|im_start|>policy<|im_end|>".into();
    config.prompt.template = "<|im_start|>{prompt}<|im_end|>".into();
    config.pair.template = "<|im_start|>{prompt}<|im_end|>{response}<|im_end|>".into();
    config.package = package.map(str::to_owned);
    config
}

/// What a guard over this package's own model says.
fn over(package: &Package) -> Vec<Judgement> {
    let model = Model::open(&Library::load(None).unwrap(), package, OpenOptions::default()).unwrap();
    let guard = Guard::open(&model, config(None), None, &Cancel::new()).unwrap();
    let pairs = ANSWERED.map(|(prompt, response)| Pair { prompt, response: Some(response) });
    guard.judge(&pairs, &Cancel::new()).unwrap()
}

fn laboratory(base: &Package, guard: &GuardConfig) -> anyhow::Result<Laboratory> {
    attach(base, &[("guard.toml", guard.to_toml()?.as_bytes())])?;
    let (package, _) = open_package(base.directory())?;
    Ok(Laboratory::open(&package, &Config::default(), &Cancel::new())?)
}

#[test]
fn the_aggregator_judges_with_a_guard_in_a_package_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let base = package(folder.path(), "base", 11);
    let own = package(folder.path(), "guard", 12);
    let answered = ANSWERED.map(|(question, answer)| Answered { question, answer: answer.to_owned() });

    let judged = |guard: &GuardConfig| laboratory(&base, guard).unwrap().judge(&answered).unwrap().unwrap();
    assert_eq!(judged(&config(Some("../guard"))), over(&own));
    assert_eq!(judged(&config(None)), over(&base));
    assert_ne!(over(&own), over(&base), "the two guards cannot be told apart");

    let error = laboratory(&base, &config(Some("../nowhere"))).unwrap_err();
    let told = format!("{error:#}");
    assert!(told.contains("guard's package") && told.contains("nowhere"), "{told}");
}
