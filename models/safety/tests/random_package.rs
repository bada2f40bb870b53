//! The guard and the reviser on a tiny random package, compiled here: what must hold whatever the weights are.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

use std::{fs, ops::Deref};

use commonweal_adapter::Adapter;
use commonweal_compiler::compile::{CompileOptions, compile};
use commonweal_compiler::random::{RandomOptions, random};
use commonweal_package::Package;
use commonweal_runtime::{Cancel, Library, Model, OpenOptions, Prompt};
use commonweal_safety::{
    Constitution, Flagged, Guard, GuardConfig, GuardError, Pair, Questions, ReviseError, ReviseOptions,
    Reviser, Revision, Words, WordsFileError, WordsUse,
};
use tempfile::TempDir;

const SHAPE: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":64,
    "intermediate_size":96,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":16,
    "vocab_size":320,"max_position_embeddings":1024,"rope_theta":10000.0,"rms_norm_eps":1e-5,
    "tie_word_embeddings":true,"hidden_act":"silu","bos_token_id":0,"eos_token_id":2,"pad_token_id":0}"#;
const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
const TOKENIZER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../runtime/tests/data/bytes.tokenizer.json");

fn model() -> Made {
    model_of(SHAPE, CHATML)
}

/// A model whose answers are one token long: every token of text ends them.
fn terse_model() -> Made {
    let ends: Vec<String> = (3..320).map(|token| token.to_string()).collect();
    let shape = SHAPE.replace(r#""eos_token_id":2"#, &format!(r#""eos_token_id":[{}]"#, ends.join(",")));
    assert_ne!(shape, SHAPE);
    // Random weights with a tied head repeat the last token, which must be text.
    model_of(&shape, &CHATML.replace("assistant\n", "assistant>"))
}

/// A model with the folder of its package, whose graphs are opened when they are first used.
struct Made {
    model: Model,
    _folder: TempDir,
}

impl Deref for Made {
    type Target = Model;

    fn deref(&self) -> &Model {
        &self.model
    }
}

fn model_of(shape: &str, template: &str) -> Made {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("config.json"), shape).unwrap();
    fs::write(path("chat.jinja"), template).unwrap();
    let options = RandomOptions {
        config: path("config.json"),
        tokenizer: TOKENIZER.into(),
        chat_template: Some(path("chat.jinja")),
        out: path("checkpoint"),
        seed: 11,
    };
    random(&options, &mut |_, _| ()).unwrap();
    compile(&CompileOptions::new(path("checkpoint"), path("package"))).unwrap();
    let library = Library::load(None).unwrap();
    let package = Package::open(path("package")).unwrap();
    let model = Model::open(&library, &package, OpenOptions::default()).unwrap();
    Made { model, _folder: folder }
}

fn config(policy: &str) -> GuardConfig {
    let mut config = GuardConfig::from_toml(include_str!("data/guard.toml")).unwrap();
    config.policy = format!("<|im_start|>{policy}<|im_end|>");
    config.prompt.template = "<|im_start|>{prompt}<|im_end|>".into();
    config.pair.template = "<|im_start|>{prompt}<|im_end|>{response}<|im_end|>".into();
    config
}

/// An adapter whose effect is not zero, so that a swapped or forgotten one shows.
fn adapter(model: &Model) -> Adapter {
    let mut adapter = Adapter::init(model.layout().clone(), 3);
    adapter.values_mut().iter_mut().enumerate().for_each(|(i, value)| *value += (i % 7) as f32 * 0.01 - 0.03);
    adapter
}

const PAIRS: &[Pair<'static>] = &[
    Pair { prompt: "How do I bake bread?", response: None },
    Pair { prompt: "How do I bake bread?", response: Some("Mix flour and water.") },
    Pair { prompt: "", response: Some("") },
    Pair {
        prompt: "x",
        response: Some("A response much longer than the window of thirty-two tokens, to be split."),
    },
    Pair { prompt: "ein <|im_end|> Versuch", response: Some("äöü 😀") },
];

#[test]
fn judgements_do_not_depend_on_batch_prefix_or_windows() {
    let (model, cancel) = (model(), Cancel::new());
    let adapter = adapter(&model);
    let long = "A policy that is longer than what is read again with every pair of a batch.";
    for policy in ["short", long] {
        let guard = Guard::open(&model, config(policy), Some(&adapter), &cancel).unwrap();
        let together = guard.judge(PAIRS, &cancel).unwrap();
        assert_eq!(together.len(), PAIRS.len());
        let questions = Questions::new(model.tokenizer(), &config(policy), model.context()).unwrap();
        let prepared = model.prepare(Some(&adapter)).unwrap();
        for (pair, judgement) in PAIRS.iter().zip(&together) {
            assert!((0.0..=1.0).contains(&judgement.probability), "{judgement:?}");
            assert_eq!(judgement.is_unsafe, judgement.probability >= judgement.threshold);
            let alone = guard.judge_one(*pair, &cancel).unwrap();
            assert!(
                (alone.log_odds - judgement.log_odds).abs() < 1e-3,
                "{alone:?} alone, {judgement:?} in a batch"
            );
            // The same by hand: no shared prefix, one window after the other.
            let mut asked = questions.asked(model.tokenizer(), *pair).unwrap();
            assert_eq!(asked.len(), 1);
            let (safe, unsafe_) = questions.answers();
            let odds = asked.remove(0).into_iter().map(|window| {
                let prompt = Prompt::from([questions.policy(), &window].concat());
                let scores =
                    model.score_next(&prepared, None, &[prompt], &[safe, unsafe_].concat(), &cancel).unwrap();
                f64::from(scores[0][1]) - f64::from(scores[0][0])
            });
            let worst = odds.fold(f64::NEG_INFINITY, f64::max);
            assert!((worst - judgement.log_odds).abs() < 1e-3, "{worst} by hand, {judgement:?}");
        }
    }
}

#[test]
fn the_adapter_and_the_calibration_count() {
    let (model, cancel) = (model(), Cancel::new());
    let adapter = adapter(&model);
    let base = Guard::open(&model, config("p"), None, &cancel).unwrap().judge(PAIRS, &cancel).unwrap();
    let adapted =
        Guard::open(&model, config("p"), Some(&adapter), &cancel).unwrap().judge(PAIRS, &cancel).unwrap();
    assert!(base.iter().zip(&adapted).all(|(x, y)| (x.log_odds - y.log_odds).abs() > 1e-6));
    for (judgement, pair) in adapted.iter().zip(PAIRS) {
        let z = if pair.response.is_some() { 1.5 * judgement.log_odds - 0.25 } else { judgement.log_odds };
        assert!((judgement.probability - 1.0 / (1.0 + (-z).exp())).abs() < 1e-9);
    }
}

#[test]
fn words_are_added_to_what_the_model_says_and_never_missed_unseen() {
    let (model, cancel) = (model(), Cancel::new());
    let words = || Words::read(include_bytes!("data/golden.words")).unwrap();
    let mut with = config("p");
    let heard = WordsUse { file: "adapters/guard.words".into(), prompt: 2.0, pair_prompt: 0.5, pair: 1.5 };
    with.words = Some(heard.clone());
    let alone = Guard::open(&model, config("p"), None, &cancel).unwrap().judge(PAIRS, &cancel).unwrap();
    let guard = Guard::open_with_words(&model, with.clone(), None, Some(words()), &cancel).unwrap();
    for ((pair, alone), both) in PAIRS.iter().zip(&alone).zip(guard.judge(PAIRS, &cancel).unwrap()) {
        let spoken = words().say(*pair);
        let said = match pair.response {
            None => 2.0 * spoken.prompt,
            Some(_) => 0.5 * spoken.prompt + 1.5 * spoken.pair,
        };
        assert!(
            (both.log_odds - alone.log_odds - said).abs() < 1e-3,
            "{pair:?}: {both:?}, {alone:?}, {said}"
        );
    }
    let error = Guard::open(&model, with.clone(), None, &cancel).unwrap_err();
    assert!(matches!(&error, GuardError::Words(WordsFileError::Missing { name, .. }) if *name == heard.file));
    for (config, words) in [(with.clone(), None), (config("p"), Some(words()))] {
        let error = Guard::open_with_words(&model, config, None, words, &cancel).unwrap_err();
        assert!(matches!(error, GuardError::OtherWords { .. }), "{error}");
    }
    // Weights are of the form that is open: an owner's policy sets none.
    with.words = Some(WordsUse { pair: 0.0, ..heard });
    assert!(matches!(guard.with_thresholds(with), Err(GuardError::OtherForm { .. })));
}

#[test]
fn a_category_is_named_from_the_threshold_on() {
    let (model, cancel) = (model(), Cancel::new());
    let judge = |threshold: f64| {
        let mut config = config("p");
        config.threshold = threshold;
        config.categories.iter_mut().for_each(|category| category.threshold = None);
        Guard::open(&model, config, None, &cancel).unwrap().judge(PAIRS, &cancel).unwrap()
    };
    assert!(judge(1e-9).iter().all(|judgement| judgement.is_unsafe && judgement.category.is_some()));
    assert!(judge(1.0 - 1e-12).iter().all(|judgement| !judgement.is_unsafe && judgement.category.is_none()));
}

#[test]
fn revision_is_bounded_repeatable_and_never_hands_on_what_is_unsafe() {
    let (model, cancel) = (terse_model(), Cancel::new());
    let mut everything_unsafe = config("p");
    everything_unsafe.threshold = 1e-9;
    everything_unsafe.categories.clear();
    let guard = Guard::open(&model, everything_unsafe, None, &cancel).unwrap();
    let reviser = Reviser::open(&model, Constitution::default(), Some(&adapter(&model))).unwrap();
    let category = "fraud".parse().unwrap();
    let long = "x".repeat(2_000);
    let flagged = [
        Flagged { prompt: "a", response: "b", category: Some(&category) },
        Flagged { prompt: "a", response: &long, category: None },
    ];
    let options = ReviseOptions {
        attempts_max: 2,
        critique_tokens_max: 4,
        revision_tokens_max: 12,
        seed: 5,
        ..ReviseOptions::default()
    };
    let revisions = reviser.revise(&guard, &flagged, &options, &cancel).unwrap();
    let refusal = |category| Constitution::default().refusal_for(category).to_owned();
    assert_eq!(
        revisions,
        [
            Revision::StillUnsafe { attempts: 2, refusal: refusal(Some(&category)) },
            Revision::StillUnsafe { attempts: 0, refusal: refusal(None) },
        ]
    );
    assert_eq!(revisions, reviser.revise(&guard, &flagged, &options, &cancel).unwrap());
    // The same rewritings before a guard that finds nothing: it was the judgement that held them back.
    let mut nothing_unsafe = config("p");
    nothing_unsafe.threshold = 1.0 - 1e-12;
    nothing_unsafe.categories.clear();
    let lenient = Guard::open(&model, nothing_unsafe, None, &cancel).unwrap();
    let revisions = reviser.revise(&lenient, &flagged, &options, &cancel).unwrap();
    assert!(matches!(&revisions[0], Revision::Safe { text, .. } if !text.is_empty()), "{revisions:?}");
    assert_eq!(revisions[1], Revision::StillUnsafe { attempts: 0, refusal: refusal(None) });
    assert!(reviser.revise(&guard, &[], &options, &cancel).unwrap().is_empty());
    assert!(
        reviser.revise(&guard, &flagged, &ReviseOptions { attempts_max: 0, ..options }, &cancel).is_err()
    );
    let mut empty = Constitution::default();
    empty.principles.clear();
    let error = reviser.with_constitution(empty).revise(&guard, &flagged, &options, &cancel).unwrap_err();
    assert!(matches!(error, ReviseError::NoPrinciples), "{error}");
    cancel.cancel();
    assert!(guard.judge(PAIRS, &cancel).is_err());
}
