//! What a round makes of texts that do not fit, cannot be judged or are rewritten.

use std::{
    fs,
    num::NonZeroUsize,
    process::{Command, Stdio},
    sync::Arc,
};

use commonweal_adapter::{Adapter, Trainable};
use commonweal_package::Package;
use commonweal_protocol::RoundId;
use commonweal_runtime::{Cancel, Library, Model, OpenOptions};
use commonweal_safety::{Guard, Reviser};
use edge_client::{
    filter, kept,
    pipeline::{Outcome, PipelineError},
    policy::{Action, Policy},
    revise::{self},
    sample::Sample,
    train,
};

use crate::world::*;

/// One sample with more text than the guard reads is left out; the others of its call are judged all the same.
#[test]
fn a_sample_that_cannot_be_judged_stops_no_other() {
    let (model, cancel) = (model(), Cancel::new());
    let guard = Guard::from_package(&model, &cancel).unwrap();
    let sample = |asked: &[&str]| -> Sample {
        let turn = |role: &str, content: &str| serde_json::json!({"role": role, "content": content});
        let mut messages: Vec<_> = asked.iter().map(|text| turn("user", text)).collect();
        messages.push(turn("assistant", "Mix flour and water."));
        edge_client::forms::sample_of(serde_json::json!({ "messages": messages })).unwrap()
    };
    let long = "the bread is in the box. ".repeat(2_500);
    let some = vec![sample(&["How do I bake?"]), sample(&[&*long; 32]), sample(&["And a cake?"])];
    let screened = filter::screen(&guard, &Policy::default(), some, &cancel, |_| ()).unwrap();
    let counts = filter::count(&screened);
    assert_eq!((screened.len(), counts.unjudged), (3, 1), "{counts:?}");
    assert_eq!((screened[1].verdict().action, screened[1].verdict().probability), (Action::Drop, None));
    assert!(screened[0].verdict().probability.is_some() && screened[2].verdict().probability.is_some());
}

/// Over-long samples: the newest exchange counts, a reply loses its end, and only what has no token of a reply left is
/// left out, counted, while the others are learned from.
#[test]
fn samples_that_are_too_long_lose_what_does_not_fit() {
    let (model, cancel) = (model(), Cancel::new());
    let (guard, reviser) =
        (Guard::from_package(&model, &cancel).unwrap(), Reviser::from_package(&model).unwrap());
    let mut policy = Policy::default();
    // Everything is kept: what is tested is the length.
    policy.filter.enabled = false;
    let long = "the bread is in the box and the box is on the shelf. ".repeat(40);
    let chat = |turns: &[(&str, &str)]| -> Sample {
        let messages: Vec<_> = turns
            .iter()
            .flat_map(|(asked, replied)| {
                [("user", asked), ("assistant", replied)]
                    .map(|(role, content)| serde_json::json!({"role": role, "content": content}))
            })
            .collect();
        edge_client::forms::sample_of(serde_json::json!({ "messages": messages })).unwrap()
    };
    let learned = |some: Vec<Sample>| {
        let screened = filter::screen(&guard, &policy, some, &cancel, |_| ()).unwrap();
        let (pairs, _) = revise::revise(&guard, &reviser, &policy, screened, 0, &cancel, |_| ()).unwrap();
        let task = train::TrainTask {
            steps_max: 1,
            warmup_steps: 0,
            step_rows: 1,
            row_tokens_max: 64,
            learning_rate: 1e-3,
            weight_decay: 0.0,
            clip_norm: 1.0,
            proximal_mu: 0.0,
            trainable: Trainable::Both,
            seed: 0,
            correction: None,
            first_rank: 0,
        };
        let start = Adapter::init(Arc::clone(model.layout()), 1);
        let mut keep = Keep::default();
        train::train(&model, &start, &pairs, &task, &policy.train, None, &mut keep, &cancel)
            .map(|trained| *trained.summary())
    };
    let short = ("Where is the bread?", "In the box.");
    let newest = learned(vec![chat(&[short])]).unwrap();
    let with_older = learned(vec![chat(&[(&long, &long), short])]).unwrap();
    assert_eq!((with_older.tokens, with_older.too_long), (newest.tokens, 0), "the older exchange goes");
    let cut = learned(vec![chat(&[("Where?", &long)])]).unwrap();
    assert!(cut.too_long == 0 && (30..64).contains(&cut.tokens), "the reply's end goes: {cut:?}");
    let mixed = learned(vec![chat(&[(&long, "Yes.")]), chat(&[short])]).unwrap();
    assert_eq!((mixed.tokens, mixed.too_long), (newest.tokens, 1), "one is left out, the other learned");
    let nothing = learned(vec![chat(&[(&long, "Yes.")])]).unwrap_err().to_string();
    assert_eq!(nothing, "no training pairs: 1 were too long for 64 tokens");
}

/// What is rewritten is judged by the thresholds that flagged it: filtered again, all of it is kept.
#[test]
fn revisions_pass_the_owners_own_filter() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    fs::write(file("policy.toml"), "[filter]\nthreshold = 0.1\n").unwrap();
    let rows = fs::read_to_string(workspace().join("models/reference/demo/hostile.jsonl")).unwrap();
    fs::write(file("rows.jsonl"), rows.lines().take(40).collect::<Vec<_>>().join("\n")).unwrap();
    let edge = |verb: &str, rows: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_edge-client"))
            .args([verb, rows, "--json", "--threads", "1", "--policy", &file("policy.toml"), "--dir"])
            .arg(directory.path())
            .arg("--package")
            .arg(package())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let pairs = edge("revise", &file("rows.jsonl"));
    let revised: Vec<&str> = pairs.lines().filter(|line| line.contains("\"origin\":\"revised\"")).collect();
    assert!(revised.len() > 20 && revised.iter().all(|line| line.contains("rejected_response")));
    fs::write(file("revised.jsonl"), revised.join("\n")).unwrap();
    let again = edge("filter", &file("revised.jsonl"));
    assert!(again.lines().all(|line| line.contains("\"keep\"") || line.contains("\"filtered\"")), "{again}");
}

/// A part of an ONNX file: what is appended to one is merged with it, as of any protocol buffer.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let length = u8::try_from(content.len()).unwrap();
    assert!(length < 0x80, "a longer one's length takes two bytes");
    [&[number << 3 | 2, length], content].concat()
}

/// A graph's second token as one more output, which a run of one token alone does not have.
fn fails_for_one_token() -> Vec<u8> {
    // The attribute: its name, its value, that it is an integer.
    let axis = [&field(1, b"axis")[..], &[3 << 3, 1, 0xa0, 1, 2]].concat();
    let node = [
        field(1, b"input_ids"),
        field(1, b"second"),
        field(2, b"fails"),
        field(4, b"Gather"),
        field(5, &axis),
    ];
    // A constant 1 of 64 bits.
    let second = [&[2 << 3, 7][..], &field(7, &[1]), &field(8, b"second")].concat();
    let output = [field(1, b"fails"), field(2, &field(1, &[1 << 3, 7]))].concat();
    field(7, &[field(1, &node.concat()), field(5, &second), field(12, &output)].concat())
}

/// A runtime library that fails in the middle of a round: real ones, a run that is stopped in the filter, an operator that
/// fails while an answer is written anew and a gradient graph that does not open any more when training begins.
#[test]
fn a_runtime_that_fails_in_the_middle_costs_no_sample() {
    let copied = tempfile::tempdir().unwrap();
    copy_folder(&package().join("adapters"), &copied.path().join("adapters"));
    for entry in fs::read_dir(package()).unwrap().map(Result::unwrap).filter(|entry| entry.path().is_file()) {
        fs::copy(entry.path(), copied.path().join(entry.file_name())).unwrap();
    }
    let library = Library::load_with(None, NonZeroUsize::new(1)).unwrap();
    let opened = Package::open(copied.path()).unwrap();
    let mut world = World::over(Model::open(&library, &opened, OpenOptions::default()).unwrap());
    let samples = |world: &World| kept::all(&world.device.store).unwrap().len();
    let before = samples(&world);
    assert!(before > 0);

    world.device.cancel.cancel();
    let error = world.device.visit().unwrap_err();
    assert!(matches!(error, PipelineError::Filter(_)) && !error.is_transient(), "{error}");
    assert_eq!(samples(&world), before);
    assert!(!world.has("round/pairs.json"), "a sample passed unseen");

    // Reading goes well, and writing, which is a token at a time, does not.
    world.device.cancel = Cancel::new();
    let graphs = ["infer.onnx", "infer-base.onnx"].map(|name| copied.path().join(name));
    let sound = graphs.clone().map(|graph| fs::read(graph).unwrap());
    for (graph, sound) in graphs.iter().zip(&sound) {
        fs::write(graph, [&sound[..], &fails_for_one_token()].concat()).unwrap();
    }
    world.device.model.close();
    let error = world.device.visit().unwrap_err();
    assert!(matches!(error, PipelineError::Revise(_)) && !error.is_transient(), "{error:?}");
    let told = format!("{:#}", anyhow::Error::new(error));
    assert!(told.contains("revise failed") && told.contains("Gather"), "{told}");
    assert_eq!(samples(&world), before);
    assert!(!world.has("round/pairs.json") && world.opened().is_empty());
    for (graph, sound) in graphs.iter().zip(&sound) {
        fs::write(graph, sound).unwrap();
    }
    world.device.model.close();

    let graph = copied.path().join("train.onnx");
    let whole = fs::read(&graph).unwrap();
    fs::write(&graph, &whole[..whole.len() / 2]).unwrap();
    let error = world.device.visit().unwrap_err();
    assert!(matches!(error, PipelineError::Train(_)) && !error.is_transient(), "{error}");
    let told = format!("{:#}", anyhow::Error::new(error));
    assert!(told.contains("train failed") && told.contains("train.onnx"), "{told}");
    assert_eq!(samples(&world), before);
    // What was filtered and revised is kept; nothing was sent.
    assert!(world.has("round/pairs.json") && world.opened().is_empty());

    fs::write(&graph, &whole).unwrap();
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    assert_eq!(samples(&world), before);
}
