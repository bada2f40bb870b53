//! The fuzz targets over their seeds and over mutations that are the same on every run.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../../fuzz/mutate.rs"]
mod mutate;
mod samples;
#[path = "fuzz/targets.rs"]
mod targets;

use commonweal_protocol::{Digest, Invitation, SignedRelease, Token, encode};
use std::path::Path;

#[test]
fn frame() {
    mutate::run("frame", 20_000, targets::frame);
}

#[test]
fn release() {
    mutate::run("release", 5_000, targets::release);
}

#[test]
fn succession() {
    mutate::run("succession", 5_000, targets::succession);
}

#[test]
fn invitation() {
    mutate::run("invitation", 20_000, targets::invitation);
}

/// The seeds, by file name below `fuzz/seeds`.
fn seeds() -> Vec<(String, Vec<u8>)> {
    let mut seeds = Vec::new();
    let mut frame = |name: &str, frame: Vec<u8>| {
        seeds.push((format!("frame/{}", name.replace(' ', "-")), frame[4..].to_vec()));
    };
    for (name, message) in samples::requests() {
        frame(name, encode(&message).unwrap());
    }
    for (name, message) in samples::replies() {
        frame(name, encode(&message).unwrap());
    }
    for (name, message) in samples::enrolment_requests() {
        frame(name, encode(&message).unwrap());
    }
    for (name, message) in samples::enrolment_replies() {
        frame(name, encode(&message).unwrap());
    }
    let release = SignedRelease::sign(&targets::key(), samples::release()).unwrap();
    seeds.push(("release/signed".into(), postcard::to_stdvec(&release).unwrap()));
    let steps = targets::LINEAGE.steps();
    let swapped = [steps[1], steps[0]];
    for (name, steps) in
        [("one", &steps[..1]), ("three", steps), ("skips", &steps[1..]), ("swapped", &swapped)]
    {
        seeds.push((format!("succession/{name}"), postcard::to_stdvec(steps).unwrap()));
    }
    for (name, host) in [("name", "aggregator.example"), ("ipv4", "192.0.2.1"), ("ipv6", "2001:db8::1")] {
        let (token, authority) = (Token([0xab; 32]), Digest([0xcd; 32]));
        let invitation = Invitation { host: host.parse().unwrap(), port: 4433, token, authority };
        seeds.push((format!("invitation/{name}"), invitation.to_string().into_bytes()));
    }
    seeds
}

/// Seeds that are no messages would test nothing. `COMMONWEAL_WRITE_SEEDS=1` writes them anew.
#[test]
fn the_seeds_are_messages() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds");
    for (name, bytes) in seeds() {
        let path = folder.join(name);
        if std::env::var_os("COMMONWEAL_WRITE_SEEDS").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &bytes).unwrap();
        }
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "{}", path.display());
    }
}
