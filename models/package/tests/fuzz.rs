//! The fuzz targets over their seeds and over mutations that are the same on every run.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

#[path = "../../../fuzz/mutate.rs"]
mod mutate;
#[path = "fuzz/targets.rs"]
mod targets;

use commonweal_package::{EncoderManifest, Manifest, ManifestError};

#[test]
fn manifest() {
    mutate::run("manifest", 5_000, targets::manifest);
}

/// Seeds that are refused would test nothing. `COMMONWEAL_WRITE_SEEDS=1` puts their bases right.
#[test]
fn the_seeds_are_manifests() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/manifest");
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    if std::env::var_os("COMMONWEAL_WRITE_SEEDS").is_some() {
        for name in ["decoder", "gemma", "encoder"] {
            let error = if name == "encoder" {
                EncoderManifest::parse(&read(name)).map(drop)
            } else {
                Manifest::parse(&read(name)).map(drop)
            };
            if let Err(ManifestError::Base { expected, got }) = error {
                let right = read(name).replacen(&got.to_string(), &expected.to_string(), 1);
                std::fs::write(folder.join(name), right).unwrap();
            }
        }
    }
    Manifest::parse(&read("decoder")).unwrap();
    Manifest::parse(&read("gemma")).unwrap();
    EncoderManifest::parse(&read("encoder")).unwrap();
}
