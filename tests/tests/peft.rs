//! What `aggregator export --format peft` writes, with what this project's own runtime makes of the same adapter: for
//! `scripts/check-peft`, which shows both to the real Hugging Face PEFT.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::{fs, path::PathBuf};

use aggregator::{
    directory::Directory,
    laboratory::open_package,
    publish::{Candidate, Publisher},
    store::{Access, Storage},
};
use commonweal_adapter::Adapter;
use commonweal_compiler::compile::{CompileOptions, compile};
use commonweal_package::Bits;
use commonweal_protocol::{Digest, ReportCard, RoundId, Version};
use commonweal_runtime::{Cancel, Library, Message, Model, OpenOptions, Prompt};
use commonweal_tests::program::{Finished, command, workspace};
use rand::{Rng, SeedableRng};

/// Conversations whose every prefix is scored.
const CONVERSATIONS: [(&str, &str); 3] = [
    ("How long do I boil an egg?", "Eight minutes in water that boils."),
    ("Name three rivers.", "The Danube, the Nile and the Amazon."),
    ("What is 2 + 2?", "4."),
];

#[test]
#[ignore = "writes what scripts/check-peft compares with the real PEFT"]
fn an_export_and_our_own_log_probabilities() {
    let out = PathBuf::from(std::env::var_os("COMMONWEAL_PEFT_OUT").expect("COMMONWEAL_PEFT_OUT"));
    let (state, package) = (out.join("state"), out.join("package"));
    let checkpoint = workspace().join("models/reference/checkpoint");
    compile(&CompileOptions { bits: Bits::Full, ..CompileOptions::new(checkpoint, &package) }).unwrap();
    let verb = |verb: &str, arguments: &[&str]| {
        let mut command = command("aggregator");
        command.arg(verb).args(arguments).arg("--dir").arg(&state);
        command
    };
    let mut init = verb("init", &["--no-evaluate", "--no-align", "--address", "127.0.0.1:4433"]);
    Finished::of(init.arg("--package").arg(&package)).with_code(0);

    // The first release changes nothing (B is zero), so another one follows it that does.
    let (package, base) = open_package(&package).unwrap();
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let mut adapter = Adapter::init(base.layout.clone(), 1);
    adapter.values_mut().iter_mut().for_each(|value| *value += random.random_range(-0.05..0.05));
    let bytes = base.write(&adapter).unwrap();
    let digest = Digest::of(&bytes);
    let storage = Storage::open(&state, Access::Shared).unwrap();
    storage.blob.put_if_absent(&digest, bytes.len() as u64, &mut bytes.as_slice()).unwrap();
    let signer = Directory::open(&state).unwrap().signer().unwrap();
    let card = ReportCard::default();
    Publisher::new(storage.coord, storage.blob, signer, base.hash)
        .publish(
            Candidate {
                round: Some(RoundId(1)),
                parent: Some(Version(0)),
                digest,
                state: aggregator::optimize::OptimizerState::default(),
                card,
            },
            1,
        )
        .unwrap();
    let exported = out.join("adapter").display().to_string();
    Finished::of(&mut verb("export", &["1", "--format", "peft", "--out", &exported])).with_code(0);

    let library = workspace().join("target/runtime/libonnxruntime.so");
    let library = Library::load_with(Some(&library), None).unwrap();
    let model = Model::open(&library, &package, OpenOptions::default()).unwrap();
    let prepared = model.prepare(Some(&adapter)).unwrap();
    let vocabulary: Vec<u32> = (0..model.manifest().model.vocab_size as u32).collect();
    let rows: Vec<_> = CONVERSATIONS
        .iter()
        .map(|(question, answer)| {
            let conversation = [Message::user(*question), Message::assistant(*answer)];
            let ids = model.chat().training_row(&conversation).unwrap().ids;
            let prefixes: Vec<Prompt> = (1..=ids.len()).map(|end| ids[..end].to_vec().into()).collect();
            let scored = model.score_next(&prepared, None, &prefixes, &vocabulary, &Cancel::new()).unwrap();
            serde_json::json!({ "ids": ids, "log_probabilities": scored })
        })
        .collect();
    fs::write(out.join("ours.json"), serde_json::to_vec(&rows).unwrap()).unwrap();
}
