//! The fuzz targets over their seeds and over mutations that are the same on every run.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

use std::path::Path;
use std::sync::Arc;

use commonweal_adapter::disk::{self, AdapterFacts, AdapterKind};
use commonweal_adapter::{
    Adapter, AdapterDelta, Bits, CompressOptions, DecodeLimits, PackedDelta, Residual, Trainable, compress,
    pair,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

#[path = "../../../fuzz/mutate.rs"]
mod mutate;
#[path = "fuzz/targets.rs"]
mod targets;

#[test]
fn packed_delta() {
    mutate::run("packed_delta", 20_000, targets::packed_delta);
}

#[test]
fn adapter_safetensors() {
    mutate::run("adapter_safetensors", 20_000, targets::adapter_safetensors);
}

/// The seeds, by file name below `fuzz/seeds`.
fn seeds() -> Vec<(String, Vec<u8>)> {
    let layout = targets::layout();
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut seeds = Vec::new();
    for bits in Bits::ALL {
        for (name, trainable, top_k, rotate) in
            [("all", Trainable::Both, None, false), ("top-half-rotated", Trainable::BOnly, Some(0.5), true)]
        {
            let values = Adapter::init(Arc::clone(&layout), 2).into_values();
            let values = values[..layout.trainable_parameters(trainable)].to_vec();
            let delta = AdapterDelta::from_values(Arc::clone(&layout), trainable, values).unwrap();
            let options = CompressOptions { bits, block: 16, top_k, rotate, stochastic: true, level: 1 };
            let mut residual = Residual::zeros(Arc::clone(&layout), trainable);
            let packed = compress(&delta, &mut residual, &options, &mut random).unwrap();
            if bits == Bits::Three && trainable == Trainable::Both {
                seeds.push(("packed_delta/pair".into(), pair::join(&packed, &packed)));
            }
            seeds.push((format!("packed_delta/{name}-{}-bits", u8::from(bits)), packed.into_bytes()));
        }
    }
    let facts = AdapterFacts { base: [7; 32], kind: AdapterKind::Assistant };
    let file = disk::write(&Adapter::init(layout, 3), &facts).unwrap();
    seeds.push(("adapter_safetensors/assistant".into(), file));
    seeds
}

/// Seeds that the readers refuse would test nothing. `COMMONWEAL_WRITE_SEEDS=1` writes them anew.
#[test]
fn seeds_are_accepted() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds");
    for (name, fresh) in seeds() {
        let path = folder.join(&name);
        if std::env::var_os("COMMONWEAL_WRITE_SEEDS").is_some() {
            std::fs::write(&path, fresh).unwrap();
        }
        let bytes = std::fs::read(&path).unwrap();
        if name.ends_with("pair") {
            pair::decode(&bytes, &targets::layout(), Trainable::Both, true).unwrap();
        } else if name.starts_with("packed") {
            let limits = DecodeLimits { bytes_max: bytes.len(), trainable: None };
            PackedDelta::decode(&bytes, &targets::layout(), &limits).unwrap();
        } else {
            disk::read(&bytes).unwrap();
        }
    }
}
