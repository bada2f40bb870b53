//! The fuzz targets over their seeds and over mutations that are the same on every run.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../../fuzz/mutate.rs"]
mod mutate;
#[path = "fuzz/targets.rs"]
mod targets;

use commonweal_protocol::{AggregatorKey, Enrolled, KeyNumber, SigningKey};
use commonweal_transport::{Authority, Credentials, DeviceKey};
use std::path::Path;

#[test]
fn stream() {
    mutate::run("stream", 3_000, targets::stream);
}

#[test]
fn csr() {
    mutate::run("csr", 5_000, targets::csr);
}

#[test]
fn certificate() {
    mutate::run("certificate", 3_000, targets::certificate);
}

#[test]
fn identity() {
    mutate::run("identity", 1_000, targets::identity);
}

/// Seeds that are refused would test nothing. `COMMONWEAL_WRITE_SEEDS=1` writes them anew.
#[test]
fn the_seeds_are_of_the_tests_federation() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds");
    for (name, fresh) in targets::seeds() {
        let path = folder.join(&name);
        if std::env::var_os("COMMONWEAL_WRITE_SEEDS").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &fresh).unwrap();
        }
        // A signing request, alone or within a message, is signed anew each time: of one length, give or take 4 bytes.
        let held = std::fs::read(&path).unwrap();
        let is_signed_anew = ["csr/device", "stream/renew", "stream/enroll"].contains(&name.as_str());
        assert!(
            held == fresh || is_signed_anew && held.len().abs_diff(fresh.len()) <= 4,
            "{}",
            path.display()
        );
    }
}

/// Makes `fuzz/authority.pem` and `fuzz/device.pem` anew; then write the seeds too.
#[test]
#[ignore = "changes files of the repository"]
fn make_the_tests_federation() {
    let authority = Authority::create(targets::NOW_MS).unwrap();
    let key = DeviceKey::generate().unwrap();
    let chain = authority
        .issue_device(&key.csr().unwrap(), targets::DEVICE, targets::NOW_MS, targets::LIFE_MS)
        .unwrap();
    let signing_key = AggregatorKey::of(&SigningKey::from_bytes(&[5; 32]));
    let enrolled = Enrolled { device: targets::DEVICE, chain, signing_key, key_number: KeyNumber(0) };
    let credentials = Credentials::new(key, &enrolled, authority.digest()).unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz");
    std::fs::write(folder.join("authority.pem"), authority.to_pem().as_bytes()).unwrap();
    std::fs::write(folder.join("device.pem"), credentials.to_pem().as_bytes()).unwrap();
}
