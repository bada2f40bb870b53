//! The fuzz targets over their seeds and over mutations that are the same on every run.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

#[path = "../../../fuzz/mutate.rs"]
mod mutate;
#[path = "fuzz/targets.rs"]
mod targets;

use commonweal_safety::{Constitution, GuardConfig, Words};

#[test]
fn guard() {
    mutate::run("guard", 3_000, targets::guard);
}

#[test]
fn constitution() {
    mutate::run("constitution", 3_000, targets::constitution);
}

#[test]
fn words() {
    mutate::run("words", 5_000, targets::words);
}

/// Seeds that are refused would test nothing.
#[test]
fn the_seeds_are_read() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds");
    let text = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    for name in ["guard/asked", "guard/classifier", "guard/preset"] {
        GuardConfig::from_toml(&text(name)).unwrap();
    }
    Constitution::from_toml(&text("constitution/default")).unwrap();
    for name in ["words/plain", "words/clustered"] {
        Words::read(&std::fs::read(folder.join(name)).unwrap()).unwrap();
    }
}
